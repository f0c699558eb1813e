"""Serve a student over HTTP without running its version's code; answers as `mlflow models serve` does.

    python -m steps.serve model=models:/<name>@champion port=5001

Creates no run; stops on SIGTERM or Ctrl-C.
"""

import sys

from pipeline.compose.groups import STUDENTS
from pipeline.runs.step import Step

OWN = {
    "model": STUDENTS,
    "host": "the address to listen on, 127.0.0.1 by default; others behind a proxy with passwords and TLS (deploy/)",
    "port": "5001 by default; 0 takes a free one",
    "timeout": "seconds that a request may take, 60 by default",
    "max_bytes": "size limit of a request, 33554432 by default",
}
STEP = Step("serve", __doc__, OWN, act="pipeline.predict.serve:serve", keys=("tracking.uri",))
main = STEP.main

if __name__ == "__main__":
    sys.exit(main())
