"""Distil a student from its teachers, fine-tuning first those without a checkpoint.

python -m steps.distill cfg=quickstart
python -m steps.distill cfg=quickstart model.student.name=cifar_resnet8x4 method.tau=2 seed=1
python -m steps.distill cfg=quickstart resume=<run id>
"""

import sys

from pipeline.runs.step import Step

STEP = Step("distill", __doc__, job="pipeline.distill.distill:distill")
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
