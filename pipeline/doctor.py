"""Check whether a run would work here: packages, devices, where runs go, data; one screen."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.config.places import output_dir
from pipeline.errors import UserError
from pipeline.runs.folders import writable
from pipeline.runs.run import tracking_uri
from pipeline.tracking import start

PACKAGES = ("torch", "torchvision", "timm", "mlflow", "hydra-core", "optuna", "pandas", "pydantic", "safetensors")
MARKS = {True: "ok  ", False: "FAIL", None: "note"}


class Finding(NamedTuple):
    """One line; `good` is None for what is worth knowing but does not stop a run."""

    good: bool | None
    topic: str
    detail: str


def examine(config: Config) -> Iterator[Finding]:
    """Check everything, cheap checks first."""
    for check in (_python, _packages, _devices, _environment_managers, _output, _tracking, _data):
        try:
            yield from check(config)
        except UserError as error:
            yield Finding(False, check.__name__.strip("_").replace("_", " "), str(error))


def _python(config: Config) -> Iterator[Finding]:
    yield Finding(True, "python", f"{platform.python_version()} at {sys.executable}")


def _packages(config: Config) -> Iterator[Finding]:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding(True, "packages", ", ".join(found))
    if missing:
        yield Finding(False, "packages", f"missing: {', '.join(missing)}; run make setup")


def _devices(config: Config) -> Iterator[Finding]:
    import torch

    from pipeline.distill.networks import device_of

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(True, "processor", f"{cores} cores, {platform.machine()}")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding(True if names else None, "GPUs", ", ".join(names) or "none; runs use the processor")
    yield Finding(True, "device", f"device={config.device} means {device_of(config)}")


def _environment_managers(config: Config) -> Iterator[Finding]:
    local = shutil.which("python")
    same = local is not None and Path(local).resolve() == Path(sys.executable).resolve()
    works = {
        "--env-manager local": same,
        "--env-manager uv": shutil.which("uv") is not None,
        "bare (conda)": shutil.which("conda") is not None or bool(os.environ.get("MLFLOW_CONDA_HOME")),
    }
    good = [name for name, there in works.items() if there]
    if not same:
        good.append("local after: source .venv/bin/activate")
    yield Finding(True if same else None, "mlflow run .", ", ".join(good))


def _output(config: Config) -> Iterator[Finding]:
    folder = output_dir(config)
    with writable(config):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    free = shutil.disk_usage(folder).free / 1e9
    yield Finding(free > 1, "runs' folder", f"{folder.resolve()}, {free:.1f} GB free")


def _tracking(config: Config) -> Iterator[Finding]:
    if config.tracking.mode == "offline":
        yield Finding(None, "tracking", "offline: journals can be delivered later")
        return
    uri = tracking_uri(config)
    with tempfile.TemporaryDirectory() as folder:
        delivery = start.start_delivery(Path(folder), uri=uri, adopt="")
        delivery.wait_connected(timeout=120)  # it answers, and its schema exists
        delivery.finish(0.0)
    yield Finding(True, "tracking", f"{uri} answers; experiment {config.tracking.experiment!r}")


def _data(config: Config) -> Iterator[Finding]:
    from pipeline.data import sources

    data = sources.load(config.dataset)
    size = f"{data.image_size}×{data.image_size}×{data.in_chans}"
    images = f"{len(data.train_y)} + {len(data.test_y)} images, {size}, {data.num_classes} classes"
    yield Finding(True, "data", f"{data.name}: {images}, digest {data.digest[:12]}")


def report(config: Config, command: cli.Command) -> int:
    """Print the findings; 1 if a run would fail, else 0."""
    failed = False
    for finding in examine(config):
        failed |= finding.good is False
        print(f"{MARKS[finding.good]}  {finding.topic:<13} {finding.detail}", flush=True)
    print("a run would fail: fix the lines marked FAIL" if failed else "a run would work")
    return int(failed)
