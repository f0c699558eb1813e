"""Train the student alone, with cross-entropy only: the baseline for distillation.

python -m steps.baseline cfg=quickstart
python -m steps.baseline cfg=quickstart model.student.name=cifar_resnet8x4 seed=1
"""

import sys

from pipeline.config import student_alone
from pipeline.runs.step import Step

STEP = Step(
    "baseline",
    __doc__,
    request=lambda config, command: (student_alone(config), None),
    job="pipeline.distill.distill:distill",
)
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
