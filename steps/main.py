"""Student alone, teachers, distillation, evaluation, as nested runs: `python -m steps.main cfg=quickstart`."""

import sys

from pipeline.experiment.execute import execute

if __name__ == "__main__":
    sys.exit(execute("main", "pipeline.experiment.jobs:main"))
