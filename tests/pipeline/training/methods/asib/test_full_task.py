"""Stages with everything on: freezing per stage, fine-tuned teachers, EMA, cooldown, K = 3, N = 2, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.sweep.space.check import METRICS, TEST_SPLIT
from pipeline.training.evaluation import outputs
from pipeline.training.methods.asib.task import Distillation
from pipeline.training.optim import Precision
from tests.pipeline.training.builders import (
    CPU,
    EVERYTHING,
    Calls,
    Record,
    config,
    differences,
    distillation,
    first_batch,
    image_data,
    loop_for,
    net,
    run_until,
)

TUNED = {"use_teacher_finetuning": True, "teacher_ce_alpha": 0.5}
PAIR = [{"name": "cifar_resnet8"}, {"name": "cifar_resnet14"}]


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def moved(module: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


# freezing ------------------------------------------------------------------------------------------------------------

LEVELS = {"use_partial_freeze": True, "num_stages": 4, "student_epochs_per_stage": (1, 1, 1, 1)}


def begun(model: dict[str, Any] | None = None, **method: Any) -> tuple[Distillation, list[set[str]]]:
    """A run of four stages, and what of the student moved in each B-epoch."""
    task = distillation(config(method={**LEVELS, "teacher_adapt_epochs": 1, **method}, model=model or {}))
    found: list[set[str]] = []
    begin, end = task.begin_epoch, task.end_epoch
    before: dict[str, torch.Tensor] = {}

    def begin_epoch(epoch: Any) -> None:
        begin(epoch)
        before.update(weights(task.student))

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
    conv, head = sum(p.numel() for p in task.student.net.blocks[0][0].parameters()), 6 * 4 + 4
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
    before = [weights(t) for t in task.teachers]
    loop = run_until(task, tmp_path, (2, 0))
    for teacher, old in zip(task.teachers, before, strict=True):
        names = set(teacher.state_dict())
        expected = {k for k in names if k.startswith(prefixes)}
        normal = {k for k in names if k.startswith(("net.norm", "net.blocks.0.1", "net.blocks.1.1"))}
        assert moved(teacher, old) == (expected | normal if norms else expected - normal)
    middle = [weights(t) for t in task.teachers]
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
        seen.append([weights(task.fusion), *map(weights, task.teachers)])
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


# EMA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_the_moving_average_has_its_closed_form(every: int, tmp_path: Path) -> None:
    """e_1 = w_1, e_k = d e_(k-1) + (1 - d) w_k over every third (or every) update's weights."""
    keys = {"num_stages": 1, "student_epochs_per_stage": (2,), "kd_target": "avg"}
    task = distillation(config(method=keys, optim={"ema_decay": 0.8, "ema_update_every": every}))
    taken: list[dict[str, torch.Tensor]] = []
    task.phases["b"].optimizer.register_step_post_hook(lambda *_: taken.append(weights(task.student)))
    loop_for(task, tmp_path).run()
    assert len(taken) == 8
    kept = taken[every - 1 :: every]
    ema = task.phases["b"].objective.get_trainable_module(ema=True).module
    for name, found in ema.state_dict().items():
        if not found.is_floating_point():
            assert torch.equal(found, kept[-1][name])
            continue
        expected = 0.8 ** (len(kept) - 1) * kept[0][name].double()
        for k, w in enumerate(kept[1:], start=1):
            expected = expected + 0.2 * 0.8 ** (len(kept) - 1 - k) * w[name].double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("select", ["raw", "ema"])
@pytest.mark.parametrize("fraction", [0.25, 0.0])
def test_the_chosen_weights_are_exported(select: str, fraction: float, tmp_path: Path) -> None:
    optim = {"ema_decay": 0.5, "select_weights": select}
    task = distillation(config(method={"kd_target": "avg"}, optim=optim, dataset={"val_fraction": fraction}))
    averaged, raw, record, end = [], [], Record(), task.end_epoch

    def end_epoch(epoch: Any) -> dict[str, float]:
        averaged.append(weights(task.phases["b"].objective.get_trainable_module(ema=True).module))
        raw.append(weights(task.student))
        return end(epoch)

    task.end_epoch = end_epoch  # type: ignore[method-assign]
    loop_for(task, tmp_path, record).run()
    accuracies = record.series("student/acc_ema" if select == "ema" else "student/acc")
    best = accuracies.index(max(accuracies)) if fraction else 3
    assert task.selection.epoch == best
    task.results()
    assert differences(weights(task.student), (averaged if select == "ema" else raw)[best]) == []
    assert differences(averaged[best], raw[best]) != []


# cooldown, learned query ---------------------------------------------------------------------------------------------


def test_in_the_cooldown_neither_teachers_nor_fusion_run(tmp_path: Path) -> None:
    task = distillation(config(method={"kd_cooldown_epochs": 3, "hybrid_beta": 0.5, "feat_kd_alpha": 0.1}))
    assert "".join(e.phase for e in task.plan) == "aabbbb"
    loop = run_until(task, tmp_path, (3, 0))
    assert task.fusion is not None
    calls = [Calls(t) for t in task.teachers]
    fused: list[int] = []
    task.fusion.register_forward_hook(lambda *_: fused.append(1))
    record = Record()
    loop.recorder, loop.stop = record, lambda: 0
    loop.run()
    assert [len(c) for c in calls] == [0, 0]
    assert fused == []
    assert record.series("schedule/kd_weight") == [0.0] * 3
    assert record.series("b_step/kd") == [0.0] * 3
    assert "synergy/acc" not in {k for _, row in record.rows for k in row}


def test_a_learned_query_needs_no_student(tmp_path: Path) -> None:
    task = distillation(
        config(method={"learnable_q": True, "cutmix_alpha_distill": 1.0, "teacher_adapt_alpha_kd": 0.0})
    )
    loop_for(task, tmp_path).run()
    assert task.costs.metrics()["cost/forward_images/student"] == 4 * 36, "its training passes alone"
    assert task.costs.metrics()["cost/forward_images/teacher_1"] == 8 * 36


# sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.step
@pytest.mark.parametrize(
    ("target", "teachers", "classes"), [("auto", 2, 4), ("auto", 3, 2), ("auto_min", 3, 4), ("weighted_conf", 2, 2)]
)
def test_everything_at_once_trains_and_stays_finite(classes: int, teachers: int, target: str, tmp_path: Path) -> None:
    model = {"teachers": [{"name": "cifar_resnet8"}] * teachers}
    c = config(method={**EVERYTHING, "kd_target": target}, model=model, optim={"ema_decay": 0.9, "grad_clip_norm": 0.5})
    task, record = distillation(c, image_data(classes=classes)), Record()
    loop_for(task, tmp_path, record).run()
    results = task.results()
    assert results["final/synergy_acc"] >= 0
    assert f"final/teacher_{teachers - 1}_acc" in results
    logged = {name for _, row in record.rows for name in row}
    logged |= {name for name in results if not TEST_SPLIT.fullmatch(name)}
    assert [name for name in sorted(logged) if not METRICS.fullmatch(name)] == [], "a sweep may name them all"
    numbers = [v for _, row in record.rows for v in row.values()]
    assert all(abs(v) < 1e6 for v in numbers)
    assert sum(record.series("train/nonfinite_steps")) == 0
    assert task.fusion is not None
    assert len(task.fusion.adapters) == teachers


@pytest.mark.step
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_everything_at_once_in_half_precision(dtype: str, tmp_path: Path) -> None:
    task, record = distillation(config(method=EVERYTHING, optim={"use_amp": True, "amp_dtype": dtype})), Record()
    loop = loop_for(task, tmp_path, record)
    loop.precision = Precision(task.optim, CPU)
    loop.run()
    assert sum(record.series("train/nonfinite_steps")) == 0
    assert len(record.series("b_step/loss")) == 4


def test_one_class_in_a_batch() -> None:
    task = distillation(config(method={**EVERYTHING, "kd_target": "auto_min"}))
    epoch = next(e for e in task.plan if e.phase == "b")
    task.monitor.gate_open = True
    task.begin_epoch(epoch)
    batch = first_batch(task)
    same = torch.zeros_like(batch.y)
    from pipeline.training.objective import Moment

    out = task.phases["b"].objective.train()(batch._replace(y=same, y_b=same), Moment("b", 0, 0))
    assert torch.isfinite(out["loss"])


# refused before training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"feat_kd_alpha": 0.1, "feat_kd_key": "feat_2d"}, "feat_2d has width 6.*ib_mbm_out_dim=8"),
        ({**LEVELS, "student_freeze_schedule": (-1, -1, 2, 1), "staged": False}, "stage 3, student freeze level 2"),
        ({**TUNED, "use_partial_freeze": True, "staged": False}, "teacher_freeze_level=0"),
    ],
)
def test_what_cannot_be_is_said_before_training(keys: dict[str, Any], words: str) -> None:
    keys = dict(keys)
    staged = keys.pop("staged", True)
    c = config(method=keys)
    with pytest.raises(UserError, match=words):
        Distillation(c, image_data(), net(6, 0, staged=staged), [net(5, 1, staged=staged), net(7, 2)], CPU)


def test_a_student_without_the_adapter_that_its_features_need_is_refused_and_not_skipped() -> None:
    c = config(method={"feat_kd_alpha": 0.1})
    with pytest.raises(UserError, match="distill_feat has width None"):
        Distillation(c, image_data(), net(6, 0), [net(5, 1), net(7, 2)], CPU)


def test_decoupled_distillation_of_two_classes_is_refused() -> None:
    with pytest.raises(UserError, match=r"kd_loss=dkd.*2 classes"):
        distillation(config(method={"kd_loss": "dkd"}), image_data(classes=2))
    distillation(config(method={"kd_loss": "dkd"}), image_data(classes=3))
    distillation(config(method={"kd_loss": "dkd", "kd_alpha": 0.0, "hybrid_beta": 1.0}), image_data(classes=2))


def test_trying_a_later_stages_level_leaves_the_student_whole() -> None:
    task = distillation(config(method={**LEVELS, "student_freeze_schedule": (-1, 0, 0, 0)}))
    trained = {id(p) for g in task.phases["b"].optimizer.param_groups for p in g["params"]}
    assert trained == {id(p) for p in task.student.parameters()}
    assert all(p.requires_grad for p in task.student.parameters())
