"""Deliver the journals of runs to a tracking server: `python -m steps.deliver <run folder>…`."""

import sys

from pipeline.tracking.deliver import main

if __name__ == "__main__":
    sys.exit(main())
