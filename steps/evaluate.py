"""Evaluate a student on the test split: `python -m steps.evaluate cfg=quickstart`."""

import sys

from pipeline.experiment.execute import execute

if __name__ == "__main__":
    sys.exit(execute("evaluate", "pipeline.experiment.jobs:evaluate"))
