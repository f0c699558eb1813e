"""List what runs have left on this machine that nothing needs any more, and remove it if asked to.

    python -m steps.tidy                  # what would go, and its size
    python -m steps.tidy apply=true

Checkpoints of finished runs (unless they were told to keep them), all weights of pruned trials,
files fetched for evaluations. Records, results, students of finished runs, fine-tuned teachers and
whatever an interrupted run continues from stay.
"""

import sys

from pipeline import tidy
from pipeline.runs.step import Step

STEP = Step("tidy", __doc__, tidy.OWN, act="pipeline.tidy:tidy", keys=("output_dir",))
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
