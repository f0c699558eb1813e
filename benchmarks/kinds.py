"""Where results go: one file for each benchmark and kind of machine; `quick` ones show that it works, nothing else."""

import json
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def kind(on: torch.device, quick: bool) -> str:
    """quick, gpu or cpu."""
    return "quick" if quick else "gpu" if on.type == "cuda" else "cpu"


def write(name: str, kind_: str, result: dict[str, Any], output: Path | None = None) -> Path:
    """Write results/<name>_<kind>.json, or `output`."""
    path = output or RESULTS / f"{name}_{kind_}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return path


def read(name: str, kind_: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """What `write` wrote; None where it is not there."""
    path = folder / f"{name}_{kind_}.json"
    return json.loads(path.read_text()) if path.exists() else None
