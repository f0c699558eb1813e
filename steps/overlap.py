"""Distil from teachers of class subsets: methods × shares of common classes × seeds, and compare.

python -m steps.overlap cfg=quickstart rhos=0,0.5,1 methods=asib,aver seeds=0,1
python -m steps.overlap cfg=quickstart model.unseen=masked
"""

import sys

from pipeline.ablate import overlap
from pipeline.ablate.plan import Plan
from pipeline.runs.step import Step

STEP = Step("overlap", __doc__, overlap.OWN, overlap.read, "pipeline.ablate.ablate:ablate", words=Plan.words)
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
