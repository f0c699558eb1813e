"""A forward pass that is not finite leaves nothing behind, and is never taken for an accuracy."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import NonFinite
from pipeline.training.checkpoint import Slots, cpu_copy
from pipeline.training.evaluation import outputs
from pipeline.training.nonfinite import Kept, update_average
from pipeline.training.objective import Objective
from tests.pipeline.training.builders import (
    CPU,
    ONE_STAGE,
    Record,
    config,
    copied,
    differences,
    distillation,
    fine_tuning,
    image_data,
    loop_for,
    net,
)

NAN, INF = float("nan"), float("inf")
TUNED = {"use_teacher_finetuning": True, "teacher_ce_alpha": 0.5}


class PoisonedPictures:
    """Multiplies the images of one batch by `factor`: what every network computes of them is spoilt.

    `before` and `after`: all that is kept of networks, as it was at that step's begin and at the next one's.
    """

    def __init__(self, task: Any, phase: str, factor: float, epoch: int = 0, number: int = 1) -> None:
        objective, state = task.phases[phase].objective, task.state_dict
        forward = objective.forward
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}

        def poisoned(batch: Any, moment: Any, repeat: int = 0) -> Any:
            at = (moment.epoch, moment.batch)
            if at == (epoch, number):
                self.before = _copied(state())
                batch = batch._replace(x=batch.x * factor, x_mixed=batch.x_mixed * factor)
            elif at == (epoch, number + 1) and not self.after:
                self.after = _copied(state())
            return forward(batch, moment, repeat)

        objective.forward = poisoned


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    trees = {k: state[k] for k in ("student", "student_ema", "fusion", "net") if state.get(k)}
    return {k: cpu_copy(v) for k, v in trees.items()} | {"teachers": [cpu_copy(t) for t in state.get("teachers", [])]}


CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "student": ("b", {}, NAN),
    "student under AMP": ("b", {"optim": {"use_amp": True}}, NAN),
    "student under float16": ("b", {"optim": {"use_amp": True, "amp_dtype": "float16"}}, INF),
    "student, two updates per batch": ("b", {"method": {"cccp_ns": 2}}, NAN),
    "variance overflows, logits do not": ("b", {}, 1e25),
    "fine-tuned teachers": ("a", {"method": TUNED}, NAN),
    "teacher before distillation": ("finetune", {}, NAN),
}


@pytest.mark.parametrize("case", CASES)
def test_a_skipped_step_leaves_no_trace(case: str, tmp_path: Path) -> None:
    phase, sections, factor = CASES[case]
    method = {**ONE_STAGE, **sections.get("method", {})}
    optim = {**sections.get("optim", {}), "ema_decay": 0.9, "safe_retry_patience": 5}
    keys = {**sections, "method": method, "optim": optim}
    task: Any = fine_tuning(config(**keys)) if phase == "finetune" else distillation(config(**keys))
    poison, record = PoisonedPictures(task, phase, factor), Record()
    loop_for(task, tmp_path, record).run()
    assert poison.before
    assert differences(poison.before, poison.after) == []
    skipped = task.phases[phase].repeats
    assert sum(record.series("train/nonfinite_steps")) == skipped, "the step is counted, and no other is spoilt by it"
    assert all(torch.isfinite(torch.tensor(record.series("teacher/loss" if phase == "finetune" else "student/loss"))))


def test_batch_statistics_and_average_move_in_every_other_step(tmp_path: Path) -> None:
    """What is put back is the one skipped step's: the count of batches says how many were kept."""
    task = distillation(config(method=ONE_STAGE, optim={"ema_decay": 0.9}))
    PoisonedPictures(task, "b", NAN)
    loop_for(task, tmp_path).run()
    average = task.phases["b"].objective.get_trainable_module(ema=True)
    assert average is not None
    student: Any
    for student in (task.student, average.module):
        assert student.net.norm.num_batches_tracked == len(task.batches) - 1


@pytest.mark.parametrize("skipped", [True, False])
def test_what_is_kept_comes_back_bit_for_bit(skipped: bool) -> None:
    """As a GPU does it, which nobody asks whether the step is skipped: also over NaN, and for counters."""
    values = [torch.randn(3), torch.tensor(2), torch.randn(2, 4)[:, ::2], torch.tensor([INF, 1.0]), torch.tensor(5)]
    before = [v.clone() for v in values]
    kept = Kept(values)
    kept.save()
    assert not kept.broken()
    for v in values:
        v.copy_(v * 3 if not v.is_floating_point() else torch.full_like(v, NAN))
    assert kept.broken()
    changed = [v.clone() for v in values]
    kept.put_back(torch.tensor(skipped))
    assert differences(values, before if skipped else changed) == []


class _OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("skipped", [True, False])
def test_the_average_on_a_gpu_stays_where_a_step_is_skipped(skipped: bool) -> None:
    """The way of a GPU, walked on the CPU: it ends where timm's own average does, or where it was."""
    ends = []
    for gpu in (True, False):
        norm: Any = nn.BatchNorm1d(2)
        task = Objective(norm, [], CPU)
        task.setup_ema(decay=0.5)
        norm.weight.data.fill_(3.0)
        norm.num_batches_tracked.fill_(7)
        flag = torch.tensor(skipped)
        update_average(task, 5, flag.as_subclass(_OnGpu) if gpu else flag)
        average = task.get_trainable_module(ema=True)
        assert average is not None
        ends.append(cpu_copy(average.module.state_dict()))
    assert differences(ends[0], ends[1]) == []
    assert ends[0]["weight"].tolist() == ([1.0, 1.0] if skipped else [2.0, 2.0])


# checkpoints ---------------------------------------------------------------------------------------------------------


def test_only_a_finite_checkpoint_is_good(tmp_path: Path) -> None:
    def state(number: int, **changes: Any) -> dict[str, Any]:
        weights, unknown = torch.full((2,), float(number)), float("-inf")
        plain = {"task": {"student": weights, "selection": {"accuracy": unknown}}, "sums": {"loss": torch.tensor(NAN)}}
        return {"position": {"epoch": number, "streak": 0}, **plain, **changes}

    def good() -> Any:
        found = slots.read_good()
        return None if found is None else found[0]["position"]["epoch"]

    slots = Slots(tmp_path)
    for number, changes, expected in (
        (0, {"optimizers": {"b": {0: torch.tensor([1.0, NAN])}}}, None),
        (1, {}, 1),
        (2, {"task": {"student": torch.tensor([1.0, INF])}}, 1),
        (3, {"task": {"monitor": {"ema": NAN}}}, None),
    ):
        slots.write(state(number, **changes))
        slots.settle()
        assert good() == expected, number


# evaluation ----------------------------------------------------------------------------------------------------------

BLOWS_UP = {"student_lr": 1e6, "student_weight_decay": 1e6}
"""AdamW's decay multiplies each weight by -1e12 in every step."""
FUSION_BLOWS_UP = {"a_step_lr": 1e6, "a_step_weight_decay": 1e6}
TEACHER_BLOWS_UP = {"lr": 1e6, "weight_decay": 1e6, "epochs": 1}
ENDS: dict[str, tuple[dict[str, Any], str]] = {
    "student": ({"optim": BLOWS_UP}, r"student: \d+ of 12 outputs in evaluation are not finite"),
    "synergy": ({"optim": FUSION_BLOWS_UP}, r"synergy: \d+ of 12 outputs in evaluation are not finite"),
    "moving average": ({"optim": {**BLOWS_UP, "ema_decay": 0.9, "select_weights": "ema"}}, r"student: \d+ of 12"),
    "teacher": ({"finetune": TEACHER_BLOWS_UP}, r"teacher: \d+ of 12 outputs in evaluation are not finite"),
}


@pytest.mark.parametrize("case", ENDS)
def test_outputs_that_are_not_finite_are_a_divergence_and_no_accuracy(case: str, tmp_path: Path) -> None:
    """Also in runs of fewer updates than `safe_retry_patience`: nobody else would notice."""
    sections, said = ENDS[case]
    optim = {**sections.get("optim", {}), "safe_retry_patience": 100}
    c = config(**{"method": ONE_STAGE, **sections, "optim": optim})
    task: Any = fine_tuning(c) if case == "teacher" else distillation(c)
    record = Record()
    with pytest.raises(NonFinite) as caught:
        loop_for(task, tmp_path, record).run()
    assert re.match(said, str(caught.value))
    assert "\n" not in str(caught.value)
    assert record.series("student/acc") == record.series("teacher/acc") == []
    assert task.selection.weights == {}


def test_one_image_is_enough() -> None:
    """Logits overflow for one picture only; its argmax would have been class 0, and right for a quarter of them."""
    task = distillation(config(), image_data(48))
    student: Any = net(6, 0)
    rows = task.data.eval.indices
    with torch.no_grad():
        student.net.fc.bias[1] = INF
    with pytest.raises(NonFinite, match=f"it: {len(rows)} of {len(rows)} outputs"):
        outputs(student, task.data.eval, "it")
    losses_overflow: Any = net(6, 0)
    with torch.no_grad():
        losses_overflow.net.fc.weight.fill_(0)
        losses_overflow.net.fc.bias.copy_(torch.tensor([3e38, -3e38, 0.0, 0.0]))
    tuning = fine_tuning(config(finetune={"epochs": 1, "lr": 1e-30, "schedule": {"min_lr": 0.0}}))
    tuning.net.load_state_dict(losses_overflow.state_dict())
    with pytest.raises(NonFinite, match="teacher: 1 of 1 mean losses"):
        tuning.end_epoch(tuning.plan[0])


@pytest.mark.slow
def test_compiled_networks_leave_no_trace_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced passes write their buffers back at their end: what is put back must be what they write to."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    task = distillation(config(method=ONE_STAGE, optim={"compile": True, "ema_decay": 0.9}))
    poison = PoisonedPictures(task, "b", NAN)
    loop_for(task, tmp_path).run()
    assert task.compiled
    assert poison.before
    assert differences(poison.before, poison.after) == []
    assert copied(task.student)["net.norm.num_batches_tracked"] == len(task.batches) - 1
