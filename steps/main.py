"""Train the student alone, fine-tune the teachers, distil and evaluate, as nested runs of one job.

python -m steps.main cfg=quickstart
python -m steps.main cfg=quickstart register=quickstart tracking.uri=http://127.0.0.1:5000
python -m steps.main cfg=quickstart resume=<run id>
"""

import sys

from pipeline.runs.step import Step

STEP = Step("main", __doc__, job="pipeline.main_job:main")
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
