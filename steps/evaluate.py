"""Evaluate a model: accuracy, calibration, per-class tables, latency, agreement with the teachers.

python -m steps.evaluate cfg=quickstart model=runs:/<id>
python -m steps.evaluate cfg=quickstart model=models:/<name>@champion mode=synergy split=both
"""

import sys

from pipeline.compose.help import ELSEWHERE
from pipeline.evaluate import request
from pipeline.runs.step import Step

KEYS = ("model.student.name", "dataset.name", "dataset.root", "dataset.path", "dataset.eval_batch_size")
STEP = Step(
    "evaluate", __doc__, request.OWN, request.read, "pipeline.evaluate.evaluate:evaluate", keys=(*KEYS, *ELSEWHERE)
)
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
