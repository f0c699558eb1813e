"""Publish a logged student as a folder for others: model card, weights, timm's configuration, ONNX.

python -m steps.publish model=models:/<name>@champion to=<folder> license=apache-2.0
python -m steps.publish model=runs:/<id> push=<owner>/<name>
"""

import sys

from pipeline.compose.help import WHERE
from pipeline.publish import request
from pipeline.runs.step import Step

KEYS = ("output_dir", "run_name", *WHERE)
JOB = "pipeline.publish.publish:publish"
STEP = Step("publish", __doc__, request.OWN, request.read, JOB, words=request.Request.words, keys=KEYS)
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
