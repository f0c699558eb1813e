"""Distil a student from its teachers: `python -m steps.distill cfg=quickstart`."""

import sys

from pipeline.runs.step import execute

if __name__ == "__main__":
    sys.exit(execute("distill", "pipeline.distill.distill:distill"))
