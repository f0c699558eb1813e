"""Train every rung of the ablation ladder with every seed, reusing finished runs, and compare.

python -m steps.ablate cfg=quickstart rungs=ladder seeds=0,1,2
python -m steps.ablate rungs=table
"""

import sys

from pipeline.ablate import request
from pipeline.ablate.plan import Plan
from pipeline.runs.step import Step

STEP = Step(
    "ablate",
    __doc__,
    request.OWN,
    request.read,
    "pipeline.ablate.ablate:ablate",
    words=Plan.words,
    act=request.print_table,
)
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
