"""What an A-step weighs, trains and leaves alone; its loss: test_full_a_step.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.methods.asib.a_step import AStep
from pipeline.training.objective import Moment
from pipeline.training.optim import update
from tests.pipeline.training.builders import (
    Calls,
    config,
    differences,
    distillation,
    first_batch,
    loop_for,
    run_until,
)


@pytest.mark.parametrize(
    ("number", "keys", "expected"),  # of the weights: ce, kd, beta, certainty, penalties, tau
    [
        (0, {"ib_beta": 0.01}, (0.6, 0.4, 0.01, True, True, 4.0)),
        (0, {"teacher_adapt_alpha_kd": 0.9, "ib_beta": 0.02, "tau": 2.0}, (0.6, 0.9, 0.02, True, True, 2.0)),
        (0, {"synergy_only_epochs": 1, "ib_beta": 0.01}, (1.0, 0.0, 0.0, False, False, 4.0)),
        # the second A-epoch of stage 2: a = 3, e = 5 of 8
        (
            5,
            {"synergy_only_epochs": 1, "ib_beta": 0.01, "ib_beta_warmup_epochs": 4, "tau_schedule": (8.0, 1.0)},
            (0.6, 0.4, 0.01 * 2 / 4, True, True, 8.0 - 7.0 * 5 / 7),
        ),
        (0, {"use_ib": False, "ib_beta": 0.5}, (0.6, 0.4, 0.0, False, True, 4.0)),
    ],
)
def test_the_weights_of_an_epoch_follow_from_its_counters(
    number: int, keys: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    task = distillation(config(method=keys))
    task.begin_epoch(task.plan[number])
    assert task.a_step is not None
    w = task.a_step.weights
    assert (w.ce, w.kd, w.beta, w.certainty, w.penalties, w.tau) == pytest.approx(expected)


def test_cross_entropy_alone_is_for_the_first_a_epochs_of_the_run_and_not_of_each_stage() -> None:
    task = distillation(config(method={"synergy_only_epochs": 3, "ib_beta": 0.01}))
    objective = task.phases["a"].objective
    assert isinstance(objective, AStep)
    found = []
    for epoch in task.plan:
        if epoch.phase == "a":
            task.begin_epoch(epoch)
            w = objective.weights
            found.append((w.ce, w.kd, w.beta, w.certainty))
    assert found == [(1.0, 0.0, 0.0, False)] * 3 + [(0.6, 0.4, 0.01, True)]


def test_certainty_weights_reach_the_loss() -> None:
    """The research code computed them and used them nowhere."""
    losses = []
    for bounds in ((0.1, 0.2), (1.0, 1.0)):
        task = distillation(config(method={"min_cw": bounds[0], "max_cw": bounds[1], "ib_beta": 0.0}))
        task.begin_epoch(task.plan[0])
        losses.append(task.phases["a"].objective.train()(first_batch(task, "a"), Moment("a", 0, 0))["loss"].item())
    assert losses[0] == pytest.approx(0.2 * losses[1], rel=1e-4), "precisions lie around 1: clamped to 0.2 and to 1"


def test_only_the_fusion_gets_gradients_and_every_part_of_it_does() -> None:
    task = distillation(config(method={"ib_beta": 0.01}))
    task.begin_epoch(task.plan[0])
    task.phases["a"].objective.train()(first_batch(task, "a"), Moment("a", 0, 0))["loss"].backward()
    assert task.fusion is not None
    without = [n for n, p in task.fusion.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    for net in (task.student, *task.teachers):
        assert all(p.grad is None for p in net.parameters())


def test_an_a_step_trains_adapters_and_fusion_and_changes_nothing_else(tmp_path: Path) -> None:
    task = distillation(config())
    assert task.fusion is not None
    fixed = {k: [v.clone() for v in n.state_dict().values()] for k, n in enumerate((task.student, *task.teachers))}
    adapters = {k: v.clone() for k, v in task.fusion.adapters.state_dict().items()}
    run_until(task, tmp_path, (2, 0))
    for k, net in enumerate((task.student, *task.teachers)):
        assert differences(list(net.state_dict().values()), fixed[k]) == [], "weights and batch-norm statistics stay"
    moved = {k for k, v in task.fusion.adapters.state_dict().items() if not torch.equal(v, adapters[k])}
    assert moved == set(adapters)


def test_student_and_teachers_run_once_per_batch_in_eval_mode_without_gradient() -> None:
    task = distillation(config())
    student, *teachers = (Calls(n) for n in (task.student, *task.teachers))
    task.begin_epoch(task.plan[0])
    task.phases["a"].objective.train()(first_batch(task, "a"), Moment("a", 0, 0))
    assert [c.seen for c in (student, *teachers)] == [[(False, False, 10)]] * 3


@pytest.mark.parametrize(("alpha", "times"), [(0.0, 0), (0.5, 1)])
def test_the_student_is_not_run_where_neither_query_nor_target_needs_it(alpha: float, times: int) -> None:
    task = distillation(config(method={"learnable_q": True, "teacher_adapt_alpha_kd": alpha}))
    calls = Calls(task.student)
    task.begin_epoch(task.plan[0])
    task.phases["a"].objective.train()(first_batch(task, "a"), Moment("a", 0, 0))
    assert len(calls) == times


def test_deterministic_fusion_does_not_depend_on_noise() -> None:
    task = distillation(config(method={"use_ib": False, "synergy_head_dropout": 0.0}))
    objective = task.phases["a"].objective.train()
    task.begin_epoch(task.plan[0])
    batch = first_batch(task, "a")
    assert torch.equal(objective(batch, Moment("a", 0, 0))["loss"], objective(batch, Moment("a", 7, 3))["loss"])


def test_noise_and_dropout_follow_from_the_place_in_the_run() -> None:
    task = distillation(config())
    objective = task.phases["a"].objective.train()
    task.begin_epoch(task.plan[0])
    batch = first_batch(task, "a")
    torch.manual_seed(5)
    first = objective(batch, Moment("a", 0, 0))["loss"]
    assert torch.equal(objective(batch, Moment("a", 0, 0))["loss"], first)
    assert not torch.equal(objective(batch, Moment("a", 0, 1))["loss"], first)


def test_a_steps_lower_their_loss(tmp_path: Path) -> None:
    """One fixed batch, fixed noise: forty updates must fit it."""
    task = distillation(config(method={"ib_beta": 1e-4}))
    phase = task.phases["a"]
    assert isinstance(phase.objective, AStep)
    phase.objective.train()
    task.begin_epoch(task.plan[0])
    batch, precision = first_batch(task, "a"), loop_for(task, tmp_path).precision
    values = []
    for _ in range(40):
        out = phase.objective(batch, Moment("a", 0, 0))
        update(phase, out["loss"], precision)
        values.append(out["ce"].item())
    assert values[-1] < 0.7 * values[0]
