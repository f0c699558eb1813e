"""A small workplace for whole steps: data, a configuration of seconds, steps run in process, and what MLflow holds."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from pipeline.journal import read_entries
from pipeline.reporting import figures
from pipeline.tracking import deliver as delivery
from pipeline.training.loop import Loop
from tests.warm import Fork

CLASSES = ("ash", "birch", "cedar", "date")
SIZE, TRAIN, TEST, BATCH = 16, 160, 40, 32
BATCHES = 4  # of an epoch: 128 training images (20 % are validation) in batches of 32
PER_EPOCH = BATCHES  # a loop's questions whether a signal has come
EPOCHS = ("a", "b", "a", "b")  # of a distillation
STUDENT, FUSION = "checkpoints/student.safetensors", "checkpoints/fusion.safetensors"
NOT_COMPARED = {"train/images_per_second", "cost/seconds", "cost/device_hours", "cost/compile_seconds"}
NOT_COMPARED |= {"cost/energy_kwh/cpu", "cost/energy_kwh/gpu"}


def images(count: int, seed: int, classes: int = len(CLASSES), size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (count, size, size, 3) with a bright stripe where the label says, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = rng.integers(0, 120, (count, size, size, 3))
    width = size // classes
    for image, label in zip(pixels, labels, strict=True):
        image[:, label * width : (label + 1) * width] += 100
    return pixels.astype(np.uint8), labels.astype(np.int64)


def write_npz(path: Path, seed: int = 0, classes: int = len(CLASSES), size: int = SIZE, **changes: np.ndarray) -> Path:
    """A data set; `changes` replaces arrays."""
    x_train, y_train = images(TRAIN, seed, classes, size)
    x_test, y_test = images(TEST, seed + 1000, classes, size)
    names = np.array([*CLASSES, "elm", "fir"][:classes])
    arrays: dict[str, Any] = {
        "x_train": x_train,
        "y_train": y_train,
        "x_test": x_test,
        "y_test": y_test,
        "class_names": names,
    }
    np.savez(path, **{**arrays, **changes})
    return path


def settings(data: Path) -> dict[str, Any]:
    """Two stages of one A- and one B-epoch with two teachers: about a second of training."""
    return {
        "defaults": [
            {"override /dataset": "npz"},
            {"override /model/student": "cifar_resnet8"},
            {"override /model/teacher": "quickstart_pair"},
        ],
        "threads": 1,
        "log_model": False,
        "dataset": {"path": str(data), "batch_size": BATCH, "val_fraction": 0.2},
        "model": {"teachers": [{"name": "cifar_resnet8"}, {"name": "cifar_wrn_16_1"}]},
        "finetune": {"epochs": 1},
        "method": {
            "num_stages": 2,
            "student_epochs_per_stage": [1, 1],
            "teacher_adapt_epochs": 1,
            "ce_alpha": 0.5,
            "kd_alpha": 0.5,
            "synergy_head_dropout": 0.1,
            "mixup_alpha": 0.2,
            "distill_out_dim": 16,
            "ib_mbm_out_dim": 16,
        },
        "tracking": {"mode": "offline"},
    }


@dataclass
class Done:
    """A step that has ended."""

    code: int
    err: str
    out: str
    new: list[Path] = field(default_factory=list)
    """Run folders that were not there before."""

    @property
    def folder(self) -> Path:
        """The one run that it made."""
        assert len(self.new) == 1, (self.new, self.err)
        return self.new[0]

    @property
    def lines(self) -> list[str]:
        """Standard error without what every run says."""
        usual = (
            "tracked as ",
            "tracking was offline; to deliver: ",
            "fine-tuning teacher ",
            "teacher ",
            "no teacher ",
            "[",
            "all runs: ",
            "continuing at epoch ",
            "epoch ",
            "in ",
            "to continue: ",
        )
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith(usual)]


class Lab:
    """A folder with a data set, `tiny.yaml` and run folders in `runs`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        self.data = write_npz(folder / "data.npz")
        self.cfg = folder / "tiny.yaml"
        self.cfg.write_text(yaml.safe_dump(settings(self.data)))

    def arguments(self, *overrides: str) -> list[str]:
        """The command line of a step here."""
        given = {override.partition("=")[0] for override in overrides}
        usual = {"cfg": str(self.cfg), "output_dir": str(self.runs)}
        return [*(f"{key}={value}" for key, value in usual.items() if key not in given), *overrides]

    def step(self, step: str, *overrides: str) -> Done:
        """Run a step in this process."""
        return self.raw(step, self.arguments(*overrides))

    def raw(self, step: str, argv: list[str]) -> Done:
        """Run a step in this process with exactly these arguments."""
        before = set(self.run_folders())
        with _as_a_process() as (out, err), pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", [step, *argv])
            try:
                runpy.run_module(f"steps.{step}", run_name="__main__")
                code = 0
            except SystemExit as left:
                code = int(left.code or 0)
        return Done(code, err.getvalue(), out.getvalue(), sorted(set(self.run_folders()) - before))

    def disturbed(self, at: At, step: str, *overrides: str) -> Done:
        """Run a step in this process, and act in the middle of its training."""
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("pipeline.distill.train.Loop", at.loop)
            return self.step(step, *overrides)

    def refuses(self, step: str, *overrides: str) -> str:
        """Assert that a step is refused with one line and leaves nothing; the line."""
        before = sorted(self.folder.rglob("*"))
        line = refused(self.step(step, *overrides))
        assert sorted(self.folder.rglob("*")) == before
        return line

    def start(self, step: str, *overrides: str, log: Path = Path(os.devnull)) -> Fork:
        """Start a step as a process of its own, whose output goes into `log`."""
        return self.start_raw(step, self.arguments(*overrides), log)

    def start_raw(self, step: str, argv: list[str], log: Path) -> Fork:
        """The same with exactly these arguments."""
        with log.open("w") as file:
            command = [sys.executable, "-m", f"steps.{step}", *argv]
            return Fork(command, env=os.environ, stdout=file, stderr=file, start_new_session=True)

    def run_folders(self) -> list[Path]:
        """All run folders, nested ones left out."""
        return sorted(p for p in self.runs.glob("*") if p.is_dir() and p.name not in ("teachers", "bank"))


def _undrawn(made: Any, **_: Any) -> bytes:
    """Drawing is a third of a step's time: one picture stands for all (tests of the job itself draw them)."""
    return _picture()


@cache
def _picture(draw: Callable[..., bytes] = figures.png) -> bytes:
    return draw(figures.figure(1, 1, 2, 2)[0])


@contextlib.contextmanager
def _as_a_process() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What a step changes in its process is undone: signal handlers, log handlers, environment, torch's settings.

    Its delivery process is a fork of one that has imported MLflow already.
    """
    log = logging.getLogger("asib")
    environment, handlers = dict(os.environ), {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    log_handlers, threads = log.handlers[:], torch.get_num_threads()
    log.handlers.clear()
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patched:
            warm = SimpleNamespace(**{**vars(subprocess), "Popen": Fork})
            patched.setattr("pipeline.tracking.pipe.subprocess", warm)
            patched.setattr(figures, "png", _undrawn)
            yield out, err
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        log.handlers[:] = log_handlers
        os.environ.clear()
        os.environ.update(environment)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


class At:
    """Acts at the n-th question of training loops for a signal: after every batch, or after the epoch for its last."""

    def __init__(self, question: int, act: Callable[[], Any]) -> None:
        self._question, self._act, self.asked = question, act, 0

    def loop(self, *arguments: Any, stop: Callable[[], int], **more: Any) -> Loop:
        """A training loop that asks here first."""

        def ask() -> int:
            self.asked += 1
            if self.asked == self._question:
                self._act()
            return stop()

        made: Callable[..., Loop] = Loop
        return made(*arguments, stop=ask, **more)


def signal_at(question: int, number: int = signal.SIGTERM) -> At:
    """Sends this process a signal at the n-th question."""

    def send() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # the handler runs here

    return At(question, send)


# what is left -----------------------------------------------------------------------------------------------------


def tensors(path: Path) -> dict[str, Any]:
    """A safetensors file."""
    return dict(load_file(path))


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same bits under the same names."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def same_run(one: Path, other: Path) -> None:
    """Assert that weights are equal bit for bit, and every metric of every epoch is there once, with the same value."""
    assert same_tensors(one / STUDENT, other / STUDENT)
    assert same_tensors(one / FUSION, other / FUSION)
    found = points(one)
    assert found == points(other)
    assert {len(values) for values in found.values()} == {1}


def refused(done: Done, *needles: str) -> str:
    """Assert that a step has ended with code 2 and one line with these words; the line."""
    assert done.code == 2, done.err
    (line,) = done.lines
    assert line.isprintable()
    for needle in needles:
        assert needle in line
    return line


def journal(folder: Path) -> list[Any]:
    """The entries of a run's journal."""
    return read_entries(folder / "journal.jsonl")[0]


def points(folder: Path) -> dict[tuple[str, int], list[float]]:
    """Every metric in a journal: (name, step) -> values; what depends on the clock or on who filled the bank is not."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for entry in journal(folder):
        if entry.kind == "metrics":
            for name, value in entry.data["values"].items():
                if name not in NOT_COMPARED and not name.startswith("bank/"):
                    found[name, entry.data["step"]].append(float(value))
    return dict(found)


def ending(folder: Path) -> tuple[str, str, int]:
    """Status, outcome and exit code in a journal's last entry."""
    last = journal(folder)[-1]
    assert last.kind == "end", last.kind
    return last.data["status"], last.data["outcome"], last.data["exit_code"]


def deliver(uri: str, *folders: Path) -> None:
    """`python -m steps.deliver`, in this process."""
    with _as_a_process() as (_, err):
        assert delivery.main([*map(str, folders), "--uri", uri]) == 0, err.getvalue()


def run_id(folder: Path) -> str:
    """The MLflow run that a folder was delivered to."""
    return str(json.loads((folder / "delivery.json").read_text())["run_id"])


def client(uri: str) -> Any:
    """A client of a tracking store."""
    import mlflow
    from mlflow.tracking import MlflowClient

    mlflow.set_tracking_uri(uri)
    return MlflowClient(uri)


@dataclass
class Seen:
    """What MLflow holds of a run."""

    id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[tuple[str, int], list[float]]
    artifacts: set[str]
    datasets: list[tuple[str, str, str]]
    models_in: list[str]
    models_out: list[str]
    children: dict[str, Seen]

    @property
    def steady(self) -> dict[tuple[str, int], list[float]]:
        """Metrics that do not depend on the clock."""
        return {key: values for key, values in self.metrics.items() if key[0] not in NOT_COMPARED}


def see(uri: str, run: str) -> Seen:
    """Read a run and its nested runs back."""
    mlflow = client(uri)
    found = mlflow.get_run(run)
    metrics: dict[tuple[str, int], list[float]] = defaultdict(list)
    for name in found.data.metrics:
        for point in mlflow.get_metric_history(run, name):
            metrics[name, point.step].append(point.value)
    children = mlflow.search_runs([found.info.experiment_id], f"tags.mlflow.parentRunId = '{run}'")
    names = [child.info.run_name for child in children]
    assert len(names) == len(set(names)), f"nested runs come twice: {names}"
    return Seen(
        id=run,
        name=found.info.run_name,
        status=found.info.status,
        params=dict(found.data.params),
        tags=dict(found.data.tags),
        metrics=dict(metrics),
        artifacts=set(_files(mlflow, run, "")),
        datasets=sorted(
            (d.dataset.name, d.dataset.digest, next(t.value for t in d.tags)) for d in found.inputs.dataset_inputs
        ),
        models_in=[m.model_id for m in found.inputs.model_inputs],
        models_out=[m.model_id for m in (found.outputs.model_outputs if found.outputs else [])],
        children={short(child.info.run_name): see(uri, child.info.run_id) for child in children},
    )


def short(name: str) -> str:
    """A nested run's name up to what tells people of its configuration: `trial 3 tau=2` is `trial 3`."""
    found = re.match(r"trial \d+|\S*teacher_\d+|(student_alone|distill|evaluate)\b", name)
    return found[0] if found else name


def _files(mlflow: Any, run: str, path: str) -> Iterator[str]:
    for file in mlflow.list_artifacts(run, path or None):
        if file.is_dir:
            yield from _files(mlflow, run, file.path)
        else:
            yield str(file.path)


def all_runs(uri: str) -> dict[str, str]:
    """Run id -> status of every run in a store."""
    mlflow = client(uri)
    found = mlflow.search_runs([experiment.experiment_id for experiment in mlflow.search_experiments()])
    return {run.info.run_id: run.info.status for run in found}


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait for something."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
