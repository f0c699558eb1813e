"""Train every method of a table on every pair with every seed, reusing finished runs, and compare.

python -m steps.table table=quick seeds=0,1
python -m steps.table table=kd_same methods=kd,crd seeds=0,1,2
"""

import sys

from pipeline.ablate import table
from pipeline.ablate.plan import Plan
from pipeline.runs.step import Step

STEP = Step(
    "table", __doc__, table.OWN, table.read, "pipeline.ablate.ablate:ablate", words=Plan.words, cfg=table.recipe
)
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
