"""What the benchmarks share: options, description of the machine and versions, results, steps as processes, images."""

import argparse
import json
import os
import platform
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.distill.train import cpu_name
from pipeline.paths import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"
OPTIONS: dict[str, dict[str, Any]] = {
    "output": {"type": Path, "help": "default: benchmarks/results/"},
    "ours": {"nargs": "*", "default": [], "metavar": "KEY=VALUE", "help": "overrides of ours' configuration"},
    "quick": {"action": "store_true", "help": "tiny rounds: shows that it works, no numbers"},
    "root": {
        "type": Path,
        "default": Path(os.environ.get("CIFAR_ROOT", "data")),
        "help": "the folder of cifar-100-python; without it the bundled images are taken",
    },
    "rounds": {"type": int, "default": 3},
    "workers": {"type": int, "default": 2, "help": "processes"},
}
"""Options with the same meaning in several benchmarks."""


def parser(doc: str | None, *shared: str) -> argparse.ArgumentParser:
    """A parser described by a module's docstring, with the options of OPTIONS that `shared` names."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in shared:
        made.add_argument(f"--{name}", **OPTIONS[name])
    return made


def device() -> torch.device:
    """The GPU if there is one, else the processor."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def kind(quick: bool = False) -> str:
    """The kind of machine in a result's name: quick, gpu or cpu."""
    return "quick" if quick else "gpu" if device().type == "cuda" else "cpu"


def described(*packages: str) -> dict[str, Any]:
    """Date, commit, machine, and versions of Python, SQLite, torch, mlflow, optuna and `packages`."""
    names = sorted({"torch", "mlflow", "optuna", *packages})
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform(),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            **{name: version(name) for name in names},
        },
        "device": str(device()),
        "threads": torch.get_num_threads(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write(name: str, result: dict[str, Any], output: Path | None) -> None:
    """Write results/<name>.json, or `output`, with the load of the machine at the end."""
    path = output or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = result | {"load_after": round(os.getloadavg()[0], 2)}
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(path)


def step(name: str, *words: str, **environment: str) -> float:
    """Run a step in its own process; return its seconds, imports included."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", f"steps.{name}", *words]
    environment = {**os.environ, **environment}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def distil(folder: Path, *words: str, **environment: str) -> Path:
    """Run a distillation below `folder`; return the run's own folder."""
    before = set(folder.glob("*-distill-*"))
    step("distill", f"output_dir={folder}", *words, **environment)
    (made,) = set(folder.glob("*-distill-*")) - before
    return made


def write_images(path: Path, count: int) -> Path:
    """Random images of ten classes, for benchmarks where what is learned does not matter; 1/10 for testing."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, n in (("train", count), ("test", count // 10)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(n) % 10
    np.savez(path, **arrays)
    return path
