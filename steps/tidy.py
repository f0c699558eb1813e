"""List what runs have left on this machine that nothing needs any more, and remove it if asked to.

    python -m steps.tidy                  # what would go, and its size
    python -m steps.tidy apply=true
    python -m steps.tidy keep=best        # also students of trials and rungs that were not the best

Checkpoints of finished runs (unless they were told to keep them), all weights of pruned trials,
files fetched for evaluations. Records, results, students of finished runs, fine-tuned teachers and
whatever an interrupted run continues from stay; so does what was logged as a model. Results and
predictions stay with keep=best and keep=none too, so that runs can still be compared and reused.
"""

import sys

from pipeline import tidy
from pipeline.runs.step import Step

STEP = Step("tidy", __doc__, tidy.OWN, act="pipeline.tidy:tidy", keys=("output_dir",))
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
