"""Check whether a run would work here: packages, devices, folders, the tracking server, data.

    python -m steps.doctor cfg=quickstart

Exit codes: 0 a run would work, 1 it would fail, 2 the configuration itself is wrong.
"""

import sys

from pipeline.compose.help import ELSEWHERE
from pipeline.runs.step import Step

KEYS = ("dataset.name", "dataset.root", "dataset.path", "model.student.name", *ELSEWHERE)
STEP = Step("doctor", __doc__, act="pipeline.doctor:report", keys=KEYS)
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
