"""Classify a folder of pictures with a logged student, and write a table.

python -m steps.predict model=models:/<name>@champion images=<folder> to=predictions.csv
"""

import sys

from pipeline.compose.help import WHERE
from pipeline.predict import request
from pipeline.runs.step import Step

STEP = Step(
    "predict",
    __doc__,
    request.OWN,
    request.read,
    "pipeline.predict.predict:predict",
    words=request.Request.words,
    keys=("output_dir", "run_name", *WHERE),
)
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
