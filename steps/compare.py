"""Compare finished runs: accuracy with confidence intervals, paired tests, curves.

python -m steps.compare parent=<run id of an ablation or a sweep>
python -m steps.compare runs=<run id>,<run id>
"""

import sys

from pipeline.compare import request
from pipeline.compose.help import WHERE
from pipeline.runs.step import Step

KEYS = ("output_dir", "run_name", *WHERE)
STEP = Step("compare", __doc__, request.OWN, request.read, "pipeline.compare.job:compare_runs", keys=KEYS)
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
