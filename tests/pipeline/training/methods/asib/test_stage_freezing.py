"""What trains in each stage: the student by its levels, fine-tuned teachers by theirs, and what a snapshot holds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.evaluation import outputs
from pipeline.training.methods.asib.task import AsibDistillation as Distillation
from tests.pipeline.training.builders import (
    LEVELS,
    TUNED,
    Record,
    config,
    copied,
    differences,
    distillation,
    loop_for,
    moved,
    run_until,
)


def begun(model: dict[str, Any] | None = None, **method: Any) -> tuple[Distillation, list[set[str]]]:
    """A run of four stages, and what of the student moved in each B-epoch."""
    task = distillation(config(method={**LEVELS, "teacher_adapt_epochs": 1, **method}, model=model or {}))
    found: list[set[str]] = []
    begin, end = task.begin_epoch, task.end_epoch
    before: dict[str, torch.Tensor] = {}

    def begin_epoch(epoch: Any) -> None:
        begin(epoch)
        before.update(copied(task.student))

    def end_epoch(epoch: Any) -> dict[str, float]:
        if epoch.phase == "b":
            found.append(moved(task.student, before))
        else:
            assert moved(task.student, before) == set(), "A-steps leave the student alone"
        return end(epoch)

    task.begin_epoch, task.end_epoch = begin_epoch, end_epoch  # type: ignore[method-assign]
    loop = loop_for(task, Path("unused"))
    loop.slots = None
    loop.run()
    return task, found


def parts(task: Distillation, *prefixes: str, statistics: bool = True) -> set[str]:
    """Names of the student's state that begin so; `statistics`: and all of normalisation, which is not frozen."""
    names = set(task.student.state_dict())
    chosen = {k for k in names if k.startswith(prefixes)}
    norms = {k for k in names if k.startswith(("net.norm", "net.blocks.0.1", "net.blocks.1.1"))}
    return chosen | norms if statistics else chosen - norms


def test_each_stage_trains_what_its_level_says() -> None:
    """The research code unfroze the whole student before every B-step, so that freezing never applied."""
    task, found = begun(student_freeze_schedule=(-1, 2, 1, 0))
    assert found == [
        set(task.student.state_dict()),
        parts(task, "net.blocks", "net.fc"),
        parts(task, "net.blocks.1", "net.fc"),
        parts(task, "net.fc"),
    ]


@pytest.mark.parametrize("level", [-1, 0, 1, 2])
def test_frozen_normalisation_stands_still_in_every_stage(level: int) -> None:
    task, found = begun(student_freeze_schedule=(-1, level, level, level), student_freeze_bn=True)
    heads = {0: ("net.fc",), 1: ("net.blocks.1", "net.fc"), 2: ("net.blocks", "net.fc")}
    everything = set(task.student.state_dict())
    assert found[0] == everything
    for stage in found[1:]:
        assert stage == (everything if level == -1 else parts(task, *heads[level], statistics=False))


def test_the_parameters_that_train_are_logged_for_each_step(tmp_path: Path) -> None:
    task = distillation(config(method={**LEVELS, "teacher_adapt_epochs": 1, "student_freeze_schedule": (-1, 2, 1, 0),
                                       "student_freeze_bn": True}))  # fmt: skip
    record = Record()
    loop_for(task, tmp_path, record).run()
    total = sum(p.numel() for p in task.student.parameters())
    network: Any = task.student.net
    conv, head = sum(p.numel() for p in network.blocks[0][0].parameters()), 6 * 4 + 4
    assert record.series("parameters/student_total") == [total] * 4
    assert record.series("parameters/student_trainable") == [total, head + 2 * conv, head + conv, head]
    assert len(record.series("parameters/fusion_trainable")) == 4


def test_a_pretrained_student_may_begin_frozen_and_be_whole_later() -> None:
    model = {"student": {"name": "resnet18", "pretrained": True}}
    task, found = begun(model, student_freeze_schedule=(0, -1, 1, -1), student_freeze_bn=True)
    everything = set(task.student.state_dict())
    assert found[0] == parts(task, "net.fc", statistics=False)
    assert found[1] == found[3] == everything


def test_without_partial_freezing_its_keys_do_nothing() -> None:
    keys = {**TUNED, "student_freeze_level": 0, "teacher_bn_head_only": True}
    task = distillation(config(method=keys))
    task.begin_epoch(next(e for e in task.plan if e.phase == "b"))
    assert all(p.requires_grad for n in (task.student, *task.teachers) for p in n.parameters())


def test_trying_a_later_stages_level_leaves_the_student_whole() -> None:
    task = distillation(config(method={**LEVELS, "student_freeze_schedule": (-1, 0, 0, 0)}))
    trained = {id(p) for g in task.phases["b"].optimizer.param_groups for p in g["params"]}
    assert trained == {id(p) for p in task.student.parameters()}
    assert all(p.requires_grad for p in task.student.parameters())


TEACHER_PARTS: dict[str, tuple[dict[str, Any], tuple[str, ...], bool]] = {
    "head": ({}, ("net.fc",), False),
    "last block": ({"teacher_freeze_level": 1}, ("net.fc", "net.blocks.1"), False),
    "with norms": ({"teacher_freeze_level": 1, "teacher_freeze_bn": False}, ("net.fc", "net.blocks.1"), True),
    "norms and head": ({"teacher_bn_head_only": True, "teacher_freeze_level": 2}, ("net.fc",), True),
    "named parts": ({"teacher_freeze_scope": "features_classifier", "teacher_freeze_bn": False}, ("net.",), True),
}


@pytest.mark.parametrize("case", TEACHER_PARTS)
def test_the_teachers_unfrozen_part_trains_in_a_steps_alone(case: str, tmp_path: Path) -> None:
    keys, prefixes, norms = TEACHER_PARTS[case]
    task = distillation(config(method={**TUNED, "use_partial_freeze": True, **keys}, dataset={"val_fraction": 0.0}))
    before = [copied(t) for t in task.teachers]
    loop = run_until(task, tmp_path, (2, 0))
    for teacher, old in zip(task.teachers, before, strict=True):
        names = set(teacher.state_dict())
        expected = {k for k in names if k.startswith(prefixes)}
        normal = {k for k in names if k.startswith(("net.norm", "net.blocks.0.1", "net.blocks.1.1"))}
        assert moved(teacher, old) == (expected | normal if norms else expected - normal)
    middle = [copied(t) for t in task.teachers]
    loop.stop = lambda: 15 if loop.epoch >= 4 else 0
    loop = run_until(task, tmp_path, (4, 0), state=loop.state_dict())
    assert [moved(t, old) for t, old in zip(task.teachers, middle, strict=True)] == [set(), set()], "frozen in B-steps"


# fine-tuned teachers -------------------------------------------------------------------------------------------------


def test_the_snapshot_includes_fine_tuned_teachers_and_brings_them_back(tmp_path: Path) -> None:
    keys = {**TUNED, "num_stages": 1, "student_epochs_per_stage": (1,), "teacher_adapt_epochs": 3}
    task = distillation(config(method=keys))
    script, seen = [50.0, 70.0, 60.0, 10.0], []

    def accuracy(student: Any) -> float:
        assert task.fusion is not None
        seen.append([copied(task.fusion), *map(copied, task.teachers)])
        # what the monitor knows of the teachers is what they are now
        for k, t in enumerate(task.teachers):
            assert torch.equal(task.monitor.teachers_on("eval")[k].logits, outputs(t, task.data.eval).logits)
        return script[len(seen) - 1]

    task.monitor.synergy_accuracy = accuracy  # type: ignore[method-assign]
    loop = run_until(task, tmp_path, (3, 0))
    assert task.fusion is not None
    assert differences([dict(n.state_dict()) for n in (task.fusion, *task.teachers)], seen[1]) == []
    assert differences(seen[1], seen[2]) != []
    task.begin_phase(task.plan[3])
    for k, t in enumerate(task.teachers):
        assert torch.equal(task.monitor.teachers_on("eval")[k].logits, outputs(t, task.data.eval).logits)
    loop.stop = lambda: 0
    loop.run()
    assert len(seen) == 4
