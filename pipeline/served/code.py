"""The code of a logged student: one file, since MLflow runs it by its path and without this project."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.served import pictures

PYFUNC = Path(__file__).with_name("student_pyfunc.py")
SHARED = re.compile(r"^from pipeline\.served\.pictures import .+\n", re.MULTILINE)


CODE = SHARED.sub(
    lambda _: Path(pictures.__file__).read_text(encoding="utf-8"), PYFUNC.read_text(encoding="utf-8"), count=1
)
"""`student_pyfunc.py`, with the text of `pipeline.served.pictures` in the place of its import.

Read at a run's beginning, not at its end: the files may have changed meanwhile (git pull)."""


def requirements() -> list[str]:
    """What that code needs, at this environment's versions."""
    found = []
    for name in ("mlflow", "numpy", "onnxruntime", "pillow"):
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:  # off line, a machine need not have MLflow
            found.append(name)
    return found
