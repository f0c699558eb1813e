"""Every method trains in one table through `mlflow run`, and its run that kill -9 ended continues bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.config import DatasetConfig, methods
from pipeline.data import sources
from tests.steps.lab import BATCHES, STUDENT, Lab, journal, points, run_id, same_tensors, see, settings, until
from tests.steps.test_mlflow_run import run

METHODS = [name for name in methods.names() if methods.settings(name).from_teachers]
"""Those for one training; test_continual.py has the others."""
pytestmark = pytest.mark.slow

ONE = {"teachers": ["cifar_resnet8"], "student": "cifar_resnet8"}
OWN = {"crd": ["method.negatives=16"], "ft": ["method.paraphraser_epochs=1"], "asib": ["method.kd_target=avg"]}
"""What small data and one teacher need."""


def overrides(method: str) -> list[str]:
    """The batches of the workplace are mixed."""
    unmixed = [] if methods.settings(method).blends else ["method.kd_view=mixed"]
    return [f"method={method}", *OWN.get(method, []), *unmixed]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A workplace with ten pictures of each class of the bundled sample."""
    lab = Lab(tmp_path_factory.mktemp("every"))
    data = sources.load(DatasetConfig(name="cifar100_sample"))
    arrays: dict[str, Any] = {"class_names": np.array(data.classes)}
    for part, pictures, labels, count in (
        ("train", data.train_x, data.train_y, 8),
        ("test", data.test_x, data.test_y, 2),
    ):
        first = [int(i) for c in range(data.num_classes) for i in (labels == c).nonzero()[:count]]
        arrays |= {f"x_{part}": pictures[first].permute(0, 2, 3, 1).numpy(), f"y_{part}": labels[first].numpy()}
    np.savez(lab.data, **arrays)
    made = settings(lab.data)
    made["method"]["student_epochs_per_stage"] = [2, 2]
    lab.cfg.write_text(yaml.safe_dump(made))
    return lab


@pytest.fixture(scope="module")
def table(lab: Lab, sqlite_template: Path) -> Path:
    """The folder of a table that has every method with one teacher as a row."""
    database = shutil.copy(sqlite_template, lab.folder / "mlflow.db")
    rows = {method: overrides(method) for method in METHODS}
    content = {"recipe": str(lab.cfg), "pairs": {"pair": ONE}, "methods": rows, "baseline": "kd", "equal_cost": False}
    file = lab.folder / "every.yaml"
    file.write_text(yaml.safe_dump(content))
    done = run(lab, f"sqlite:///{database}", "table", f"table={file}")
    assert done.returncode == 0, done.stderr
    (folder,) = lab.run_folders()
    return folder


def test_a_table_of_all_methods_arrives_through_mlflow_run(lab: Lab, table: Path) -> None:
    found = see(f"sqlite:///{lab.folder / 'mlflow.db'}", run_id(table))
    assert set(found.children) == {"pair-teacher_0", *(f"{method} pair seed 0" for method in METHODS)}
    assert {run.status for run in (found, *found.children.values())} == {"FINISHED"}
    for method in METHODS:
        logged = {name for name, _ in found.children[f"{method} pair seed 0"].metrics}
        assert any(name.startswith(f"b_step/{'kd' if method == 'asib' else method}") for name in logged)
        assert {"student/acc", "final/acc_val_selected"} <= logged


@pytest.mark.parametrize("method", [name for name in METHODS if name != "asib"])  # test_kill.py kills ASIB's
def test_a_killed_run_of_a_method_continued_equals_an_undisturbed_one(lab: Lab, table: Path, method: str) -> None:
    chosen = [*overrides(method), "bank=lazy"]  # as the runs of a table
    if methods.settings(method).teachers[1] == 1:
        chosen += ["model.teachers=[{name: cifar_resnet8}]"]
        (undisturbed,) = table.glob(f"{method}_pair-seed0-*")
    else:  # with two
        done = lab.step("distill", *chosen)
        assert done.code == 0, done.err
        undisturbed = done.folder
    before = set(lab.run_folders())
    log = lab.folder / "killed.log"
    process = lab.start("distill", *chosen, "checkpoint.every_seconds=1e-6", log=log)
    until(lambda: len(lab.run_folders()) > len(before) or process.poll() is not None)
    (folder,) = set(lab.run_folders()) - before
    until(lambda: process.poll() is not None or sum(e.kind == "checkpoint" for e in journal(folder)) > BATCHES)
    process.kill()
    process.wait()
    assert journal(folder)[-1].kind != "end", log.read_text()
    continued = lab.step("distill", *chosen, f"resume={folder}")
    assert continued.code == 0, continued.err
    assert same_tensors(folder / STUDENT, undisturbed / STUDENT)
    assert points(folder) == points(undisturbed)
