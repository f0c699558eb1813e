"""`python -m pipeline.experiment.tracking deliver` of earlier releases; it is `python -m steps.deliver` now."""

import sys

from pipeline.tracking.deliver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:] if sys.argv[1:2] == ["deliver"] else sys.argv[1:]))
