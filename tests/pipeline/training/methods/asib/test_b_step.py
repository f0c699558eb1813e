"""The B-step with every kind of mixing: who is run how often, what moves, what its weights follow."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.methods.asib.b_step import BLoss, BStep
from pipeline.training.methods.asib.task import Distillation
from pipeline.training.objective import Moment
from tests.pipeline.training.builders import (
    Calls,
    config,
    differences,
    distillation,
    first_batch,
    run_until,
)

MIXES = {"none": {}, "cutmix": {"cutmix_alpha_distill": 1.0}, "mixup": {"mixup_alpha": 0.8}}


def prepared(mix: str, **method: Any) -> tuple[Distillation, BStep, Any]:
    """A task before its first B-epoch, and a batch that is mixed for good (both labels count)."""
    task = distillation(config(method={**MIXES[mix], **method}))
    objective = task.phases["b"].objective.train()
    assert isinstance(objective, BStep)
    epoch = next(e for e in task.plan if e.phase == "b")
    batches = list(task.batches.epoch(task.draws(epoch)))
    if mix == "none":
        return task, objective, batches[0]
    return task, objective, max(batches, key=lambda b: float(b.lam * (1 - b.lam) * (b.y != b.y_b).sum()))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("learnable", [False, True])
def test_every_network_runs_once_per_batch_and_view(mix: str, learnable: bool) -> None:
    task, objective, batch = prepared(mix, learnable_q=learnable)
    student, *teachers = (Calls(n) for n in (task.student, *task.teachers))
    objective.begin_epoch(BLoss(1.0, 3.0, synergy=True, averaged_share=0.3))
    objective(batch, Moment("b", 0, 0))
    n = len(batch.x)
    clean_query = [(False, False, n)] if mix != "none" and not learnable else []
    assert student.seen == [(True, True, n), *clean_query]
    assert [c.seen for c in teachers] == [[(False, False, n)]] * 2
    assert all(m.training for m in task.student.modules()), "the student is in training mode again"


@pytest.mark.parametrize("mix", MIXES)
def test_with_the_gate_closed_neither_fusion_nor_a_second_student_pass_runs(mix: str) -> None:
    task, objective, batch = prepared(mix)
    calls = Counter[str]()
    task.student.register_forward_hook(lambda *_: calls.update(["student"]))
    assert task.fusion is not None
    task.fusion.register_forward_hook(lambda *_: calls.update(["fusion"]))
    objective.begin_epoch(BLoss(1.0, 3.0, synergy=False, averaged_share=0.3))
    objective(batch, Moment("b", 0, 0))
    assert calls == {"student": 1}


def test_without_distillation_weight_no_teacher_runs() -> None:
    task, objective, batch = prepared("cutmix")
    teachers = [Calls(t) for t in task.teachers]
    objective.begin_epoch(BLoss(0.0, 3.0, synergy=True, averaged_share=0.0))
    found = objective(batch, Moment("b", 0, 0))
    assert [len(c) for c in teachers] == [0, 0]
    assert found["loss"].item() == pytest.approx(0.7 * found["ce"].item())


@pytest.mark.parametrize("mix", MIXES)
def test_the_clean_pass_leaves_no_trace_in_the_batch_norm_statistics(mix: str) -> None:
    """Only the training pass on the mixed images updates them, with torch's momentum of 0.1."""
    task, objective, batch = prepared(mix)
    norm, conv = task.student.net.norm, task.student.net.conv
    with torch.no_grad():
        seen = conv(batch.x_mixed)
    expected = 0.9 * norm.running_mean + 0.1 * seen.mean((0, 2, 3))
    count = int(norm.num_batches_tracked)
    objective.begin_epoch(BLoss(1.0, 3.0, synergy=True, averaged_share=0.0))
    objective(batch, Moment("b", 0, 0))
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-5, atol=1e-6)
    assert int(norm.num_batches_tracked) == count + 1


def test_only_the_student_gets_gradients() -> None:
    task, objective, batch = prepared("cutmix")
    objective.begin_epoch(BLoss(1.0, 3.0, synergy=True, averaged_share=0.3))
    objective(batch, Moment("b", 0, 0))["loss"].backward()
    assert task.fusion is not None
    assert all(p.grad is not None for p in task.student.parameters())
    for module in (task.fusion, *task.teachers):
        assert all(p.grad is None for p in module.parameters())


def test_a_b_step_changes_the_student_alone(tmp_path: Path) -> None:
    task = distillation(config(method={"cutmix_alpha_distill": 1.0}))
    loop = run_until(task, tmp_path, (2, 0))
    assert task.fusion is not None
    fixed = [{k: v.clone() for k, v in m.state_dict().items()} for m in (task.fusion, *task.teachers)]
    student = {k: v.clone() for k, v in task.student.state_dict().items()}
    loop.stop = lambda: 0
    for epoch in (2, 3):
        loop._run_epoch(task.plan[epoch], _Bar())
    assert [
        differences(dict(m.state_dict()), s) for m, s in zip((task.fusion, *task.teachers), fixed, strict=True)
    ] == [[]] * 3
    assert all(not torch.equal(v, student[k]) for k, v in task.student.state_dict().items())


class _Bar:
    def set_description(self, text: str) -> None: ...

    def update(self) -> None: ...


def test_the_distillation_weight_warms_up_over_b_epochs_through_stages() -> None:
    task = distillation(config(method={"kd_warmup_epochs": 3, "kd_ens_alpha": 0.25, "teacher_adapt_kd_warmup": 2}))
    objective = task.phases["b"].objective
    assert isinstance(objective, BStep)
    found = []
    for epoch in task.plan:
        if epoch.phase == "b":
            task.begin_epoch(epoch)
            found.append((objective.weights.scale, objective.weights.averaged_share))
    assert found == [(pytest.approx(1 / 3), 0.25), (pytest.approx(2 / 3), 0.25), (1.0, 0.0), (1.0, 0.0)]


def test_both_labels_of_a_mixed_image_count() -> None:
    """CutMix images with cross-entropy against one label only: a fault of the research code."""
    _, objective, batch = prepared("cutmix", ce_label_smoothing=0.0)
    objective.begin_epoch(BLoss(0.0, 3.0, synergy=False, averaged_share=0.0))
    mixed = objective(batch, Moment("b", 0, 0))["ce"].item()
    first = objective(batch._replace(y_b=batch.y), Moment("b", 0, 0))["ce"].item()
    second = objective(batch._replace(y=batch.y_b), Moment("b", 0, 0))["ce"].item()
    lam = float(batch.lam)
    assert mixed == pytest.approx(lam * first + (1 - lam) * second, rel=1e-5)
    assert abs(first - second) > 1e-3


def test_first_batches_of_two_runs_that_differ_in_the_method_show_the_same_images() -> None:
    one = first_batch(distillation(config(method={"cutmix_alpha_distill": 1.0})))
    other = first_batch(
        distillation(config(method={"kd_target": "avg", "ce_alpha": 0.2, "tau": 1.0, "cutmix_alpha_distill": 1.0}))
    )
    assert torch.equal(one.x_mixed, other.x_mixed)
