"""The code of a logged student: one file, since MLflow runs it by its path and without this project."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pipeline.pictures

PYFUNC = Path(__file__).with_name("student_pyfunc.py")
SHARED = "from pipeline.pictures import MAX_PIXELS, Refused, area, decode\n"


def code() -> str:
    """`student_pyfunc.py`, with the text of `pipeline.pictures` in the place of its import."""
    text, shared = PYFUNC.read_text(encoding="utf-8"), Path(pipeline.pictures.__file__).read_text(encoding="utf-8")
    before, found, after = text.partition(SHARED)
    if not found:
        raise RuntimeError(f"{PYFUNC.name} no longer has the line {SHARED.strip()!r}, which its logged copy replaces")
    return before + shared + after


def requirements() -> list[str]:
    """What that code needs, at this environment's versions."""
    found = []
    for name in ("mlflow", "numpy", "onnxruntime", "pillow"):
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:  # off line, a machine need not have MLflow
            found.append(name)
    return found
