"""Fine-tune the teachers: `python -m steps.finetune cfg=quickstart`."""

import sys

from pipeline.runs.step import execute

if __name__ == "__main__":
    sys.exit(execute("finetune", "pipeline.distill.finetune:finetune"))
