"""Names and descriptions by which people tell runs apart."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.compose.cli import Command, parse
from pipeline.compose.compose import compose
from pipeline.reporting.statistics import wilson
from pipeline.runs.description import describe
from pipeline.runs.ending import COMPLETED, Ending
from pipeline.runs.naming import COMMAND, LONGEST, command_of, name_of
from pipeline.runs.records import Record

SWEEP = ["sweep=kd_ib_tau", "trials=30", "workers=2"]


@pytest.mark.parametrize(
    ("step", "argv", "name"),
    [
        ("distill", [], "distill resnet8 ← resnet20+wrn_16_1 asib s0"),
        (
            "distill",
            ["method.kd_alpha=0.8", "seed=3", "tracking.uri=sqlite:///x.db", "model.student.name=cifar_resnet14"],
            "distill resnet14 ← resnet20+wrn_16_1 asib kd_alpha=0.8 s3",
        ),
        ("distill", ["method=aver", "optim=sgd"], "distill resnet8 ← resnet20+wrn_16_1 aver optim=sgd s0"),
        ("main", ["rung=l1_ib"], "main resnet8 ← resnet20+wrn_16_1 l1_ib s0"),
        ("baseline", [], "baseline resnet8 s0"),
        ("finetune", ["finetune.epochs=3"], "finetune resnet20+wrn_16_1 epochs=3 s0"),
        ("baseline", ["finetune.epochs=3"], "baseline resnet8 s0"),
        (
            "distill",
            ["method.student_epochs_per_stage=[2,2,2,2]", "finetune.epochs=3", "dataset.batch_size=8", "method.tau=2"],
            "distill resnet8 ← resnet20+wrn_16_1 asib tau=2 batch_size=8 finetune.epochs=3 "
            "student_epochs_per_stage=[2,2,2,2] s0",
        ),
        (
            "evaluate",
            ["dataset.batch_size=8", "model=runs:/" + "ab" * 16],
            "evaluate resnet8 model=abababab batch_size=8",
        ),
        ("sweep", SWEEP, "sweep kd_ib_tau trials=30"),
        ("sweep", ["sweep=/home/me/mine.yaml"], "sweep mine"),
        ("compare", ["parent=" + "ab" * 16], "compare parent=abababab"),
        ("promote", ["name=quickstart", "dry_run=true"], "promote quickstart dry_run=true"),
    ],
)
def test_a_run_is_called_after_what_it_is(step: str, argv: list[str], name: str) -> None:
    own = ["sweep", "trials", "workers", "parent", "name", "dry_run", "model"]
    command = parse(argv, own)
    assert name_of(step, compose("quickstart", command.overrides), command) == name


def test_a_strategy_is_called_as_it_was_asked_for() -> None:
    """replay is finetune with keys: the run says which of them was asked for."""
    command = parse(["method=replay", "continual.num_tasks=5"], [])
    name = name_of("continual", compose("quickstart", command.overrides), command)
    assert name == "continual resnet8 replay num_tasks=5 s0"


def test_a_name_that_is_too_long_loses_the_data_and_keeps_the_method() -> None:
    long = [f"dataset.{key}=0.123456789" for key in ("val_fraction", "split_seed", "batch_size", "small_input")]
    command = Command(overrides=(*long, "method.kd_alpha=0.2"))
    name = name_of("distill", compose("quickstart"), command)
    assert len(name) <= LONGEST
    assert " kd_alpha=0.2 " in name
    assert "small_input" not in name


def test_a_name_stays_within_a_line_of_the_table() -> None:
    texts = [f"method.{key}=0.123456" for key in ("kd_alpha", "ce_alpha", "ib_beta", "cccp_alpha", "hybrid_beta")]
    name = name_of("distill", compose("quickstart"), Command(overrides=tuple(2 * texts)))
    assert len(name) <= LONGEST
    assert name.endswith(" … s0")
    assert "kd_alpha=0.123456" in name


def test_the_command_repeats_the_run() -> None:
    command = parse(["--cfg", "quickstart", "--sweep", "x", "--overrides", "'run_name=my run' seed=1"], ["sweep"])
    line = command_of("sweep", command, {"METHOD": "kd,crd", "SEED": "", "HOME": "/root"})
    assert line == "METHOD=kd,crd python -m steps.sweep cfg=quickstart sweep=x 'run_name=my run' seed=1"
    assert parse(shlex.split(line)[4:], ["sweep"]) == command


def test_the_command_hides_passwords_in_addresses() -> None:
    command = parse(
        ["sweep=x", "storage=postgresql://me:pass@db/studies", "tracking.uri=https://u:p@s"], ["sweep", "storage"]
    )
    line = command_of("sweep", command, {})
    assert line.endswith("sweep=x 'storage=postgresql://me:***@db/studies' 'tracking.uri=https://u:***@s'")


def record(**metrics: float) -> Record:
    right = np.arange(500) < 199
    values = {name.replace("__", "/"): value for name, value in metrics.items()}
    return Record("f" * 32, "n", "RUNNING", {COMMAND: "python -m steps.distill"}, {}, values, correct=right)


def test_the_description_begins_with_the_result(tmp_path: Path) -> None:
    (tmp_path / "curves.png").touch()
    (tmp_path / "delivery.json").write_text('{"run_id": "abc", "experiment_id": "7"}')
    found = record(final__acc_val_selected=39.8, final__teacher_1_acc=37.8, final__synergy_acc=40.8, cost__gmacs=1840)
    lines = describe(found, compose("quickstart"), "distill", tmp_path, COMPLETED).splitlines()
    # Wilson's score interval, solved by hand for 199 of 500 and z = 1.96
    p, n, z = 0.398, 500, 1.959964
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    assert wilson(p, n) == pytest.approx((low, high), abs=1e-7)
    assert lines[0].startswith(f"**39.80 %** [{100 * low:.2f}, {100 * high:.2f}]: test top-1 of the student")
    assert "| teacher 1, wrn_16_1 | 37.80 |" in lines
    assert "Cost: 1,840 GMACs" in lines
    assert "Pictures: [curves](#/experiments/7/runs/abc/artifacts/curves.png?workflowType=machine_learning)" in lines
    assert lines[2] == "Repeat: `python -m steps.distill`"


def test_a_teachers_description_speaks_of_the_teacher(tmp_path: Path) -> None:
    metrics = {"final/acc_val_selected": 38.33, "final/val_acc": 44.0, "final/acc_last": 37.0, "teacher/acc": 44.44}
    teacher = Record("f" * 32, "n", "RUNNING", {"asib.teacher": "1"}, {}, metrics)
    found = describe(teacher, compose("quickstart"), "finetune", tmp_path, COMPLETED)
    first = found.splitlines()[0]
    assert first == "**38.33 %**: test top-1 of the teacher wrn_16_1 at the epoch that validation selected"
    assert "student" not in found
    assert "44.44" not in found, "an epoch's accuracy on validation images, among those of the test split"


def test_where_validation_selects_no_epoch_the_description_says_none(tmp_path: Path) -> None:
    continual = compose("quickstart", ["continual.num_tasks=5"])
    metrics = {"final__acc_val_selected": 39.8, "final__acc_last": 39.8, "final__val_acc": 41.0}
    for config, more, when in (
        (continual, {"continual__test_acc": 39.8}, "after the last task"),
        (continual, {}, "after the last epoch"),
    ):
        lines = describe(record(**metrics, **more), config, "distill", tmp_path, COMPLETED).splitlines()
        assert lines[0].split(": ")[1].startswith(f"test top-1 of the student {when}; ")
        assert not any("last epoch" in line for line in lines[1:])


def test_the_description_of_an_interrupted_run_says_how_it_continues(tmp_path: Path) -> None:
    killed = Ending("KILLED", "killed", 143)
    lines = describe(record(final__val_acc=1.0), compose("quickstart"), "distill", tmp_path, killed).splitlines()
    assert lines[0] == "**killed**"
    stopped = replace(record(), histories={"student/acc": [(0, 8.0), (6, 12.5)]}, tags={"asib.eval_split": "val"})
    reached = describe(stopped, compose("quickstart"), "distill", tmp_path, killed)
    assert reached == "**killed** after epoch 7, at 12.50 % on validation images"
    assert f"Continue: `python -m steps.distill resume={'f' * 32}`" in lines
    failed = describe(record(), compose("quickstart"), "distill", tmp_path, Ending("FAILED", "refused", 2, "no <b>!"))
    assert failed == "**refused**: no &#60;b>!"
