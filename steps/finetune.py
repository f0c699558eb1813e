"""Fine-tune the teachers, each in a nested run; later runs on this machine use them as they are.

python -m steps.finetune cfg=quickstart
python -m steps.finetune cfg=quickstart model/teacher=resnet32x4_wrn_40_2 finetune.epochs=40
"""

import sys

from pipeline.compose.help import USUAL, WHERE
from pipeline.runs.step import Step

KEYS = ("dataset.name", "dataset.root", "finetune.epochs", "finetune.lr", "finetune.optimizer", "finetune.seed")
STEP = Step("finetune", __doc__, job="pipeline.distill.finetune:finetune", keys=(*KEYS, *USUAL[-2:], *WHERE))
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
