"""Train the student alone, with cross-entropy only: `python -m steps.baseline cfg=quickstart`."""

import sys

from pipeline.config.variants import student_alone
from pipeline.runs.step import execute

if __name__ == "__main__":
    sys.exit(execute("baseline", "pipeline.distill.distill:distill", variant=student_alone))
