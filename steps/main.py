"""Student alone, teachers, distillation, evaluation, as nested runs: `python -m steps.main cfg=quickstart`."""

import sys

from pipeline.runs.step import execute

if __name__ == "__main__":
    sys.exit(execute("main", "pipeline.main_job:main"))
