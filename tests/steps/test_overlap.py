"""Class overlap as a step: teachers for each share, accuracy by who is taught a class, counted anew; bad input."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from pipeline.compose.compose import compose
from pipeline.distill import results, teachers, train
from pipeline.runs import records
from tests.steps.lab import Done, Lab, refused, short

GRID = ("rhos=0.5,1", "methods=aver,stack", "seeds=0,1", "method.num_stages=1", "method.student_epochs_per_stage=[1]")
THREE = "model.teachers=[{name: cifar_resnet8}, {name: cifar_resnet8}, {name: cifar_resnet8}]"
NAMES = {f"{method} rho {rho} seed {seed}" for method in ("aver", "stack") for rho in ("0.5", "1") for seed in (0, 1)}
TEACHERS = {f"rho{rho}-teacher_{k}" for rho in ("0.5", "1") for k in (0, 1)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The grid, off line."""
    lab = Lab(tmp_path_factory.mktemp("overlap"))
    with mock.patch.object(results, "curves"), mock.patch.object(results, "confusion"):  # pictures of single cells
        done = lab.step("overlap", *GRID)
    assert done.code == 0, done.err
    return done


def nested(folder: Path) -> dict[str, Path]:
    return {short(records.from_folder(path.parent).name): path.parent for path in folder.glob("*/journal.jsonl")}


def taught(folder: Path) -> list[set[int]]:
    """The classes of each teacher of a cell."""
    config = compose(str(folder / "config.yaml"))
    specs = teachers.with_classes(config, train.images(config)).model.teachers
    return [set(spec.classes) or {0, 1, 2, 3} for spec in specs]


@pytest.mark.slow
def test_accuracy_is_told_by_who_is_taught_a_class(made: Done) -> None:
    folders = nested(made.folder)
    assert set(folders) == NAMES | TEACHERS
    table = pd.read_csv(made.folder / "overlap/overlap.csv", index_col=["method", "rho"])
    assert list(table.index) == [(method, rho) for method in ("aver", "stack") for rho in (0.5, 1.0)]
    assert list(table["seeds"]) == [2] * 4
    for method, rho in table.index:
        folder = folders[f"{method} rho {rho:g} seed 0"]
        common = set.intersection(*taught(folder))
        assert len(common) == {0.5: 2, 1.0: 4}[rho]
        accuracies: dict[str, list[float]] = {"acc": [], "acc common": [], "acc own": []}
        for seed in (0, 1):
            stored = np.load(folders[f"{method} rho {rho:g} seed {seed}"] / "predictions.npz")
            right: dict[str, list[bool]] = {name: [] for name in accuracies}
            for label, predicted in zip(stored["labels"].tolist(), stored["predictions"].tolist(), strict=True):
                for name in ("acc", "acc common" if label in common else "acc own"):
                    right[name].append(label == predicted)
            for name, values in right.items():
                accuracies[name].append(100 * sum(values) / len(values) if values else np.nan)
        row = table.loc[method, rho]
        for name, (a, b) in accuracies.items():
            assert row[name] == pytest.approx((a + b) / 2, nan_ok=True), name
            assert row[f"{name} std"] == pytest.approx(abs(a - b) / 2**0.5, nan_ok=True), name
        assert (
            0 <= row["disagreement"] == pytest.approx(100 * records.from_folder(folder).metrics["teacher/disagreement"])
        )
    assert table.loc["aver", "disagreement"].tolist() == table.loc["stack", "disagreement"].tolist()


@pytest.mark.slow
def test_where_all_are_taught_all_the_cell_is_the_run_without_a_division(made: Done) -> None:
    plain, divided = (records.from_folder(nested(made.folder)[f"aver rho {rho} seed 0"]) for rho in ("1", "0.5"))
    assert plain.config["model.overlap"] == "null"
    assert divided.config["model.overlap"] == "0.5"
    assert plain.tags["asib.teachers"] != divided.tags["asib.teachers"]
    for kind in ("csv", "md", "png"):
        assert (made.folder / f"overlap/overlap.{kind}").stat().st_size > 0
    assert "aver" in made.out
    assert "stack" in (made.folder / "overlap/overlap.md").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rhos=0,1.5"], "rhos=1.5: give shares from 0 to 1"),
        (["rhos=nan"], "rhos=nan: give shares from 0 to 1"),
        (["rhos=,"], "rhos=,: give at least one"),
        (["methods=aver,kd"], "methods=kd: it distils from one teacher; choose from asib, aekd, aver"),
        (["methods=avr"], "methods=avr: no such method; did you mean aver?"),
        (["model.overlap=0.5"], "model.overlap: every cell has its own; choose with rhos= and methods="),
        (["method=aver"], "method: every cell has its own"),
        (["rhos=0", "methods=aver", "model.teachers=[{name: cifar_resnet8}]"], "needs two, model.teachers has 1"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(lab: Lab, words: list[str], says: str) -> None:
    assert says in lab.refuses("overlap", *words)


def test_shares_that_the_data_cannot_give_are_refused_before_the_first_run(lab: Lab) -> None:
    done = lab.step("overlap", "rhos=0.25,0", "methods=aver", THREE)
    refused(done, "model.overlap=0.0 leaves model.teachers.1 1 of the 4 classes, and it needs two")
    assert lab.run_folders() == []
