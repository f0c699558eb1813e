"""Schedules against their closed forms, for every epoch and every update; optimisers against steps by hand."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import ScheduleConfig
from pipeline.config.methods.asib.settings import AsibConfig as MethodConfig
from pipeline.training import optim
from pipeline.training.methods.asib import schedules
from pipeline.training.methods.asib.schedules import make_plan
from pipeline.training.student import kd_weight


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [0.01] * 12),
        (  # rises over the epochs after those of cross-entropy alone
            {"synergy_only_epochs": 2, "ib_beta_warmup_epochs": 5},
            [0, 0, 0, 0.01 / 5, 0.02 / 5, 0.03 / 5, 0.04 / 5, 0.01, 0.01, 0.01, 0.01, 0.01],
        ),
        ({"ib_epochs_per_stage": 3}, [0.01, 0.01, 0.01, 0.0] * 3),
        ({"ib_epochs_per_stage": 0}, [0.0] * 12),
        ({"beta_schedule": (0.2, 0.1, 4)}, [0.2, 0.175, 0.15, 0.125, *[0.1] * 8]),
        ({"use_ib": False}, [0.0] * 12),
        ({"use_ib": False, "beta_schedule": (0.2, 0.1, 4)}, [0.0] * 12),
    ],
)
def test_beta_over_three_stages_of_four_a_epochs(keys: dict[str, object], expected: list[float]) -> None:
    method = MethodConfig.model_validate({"ib_beta": 0.01, **keys})
    assert [schedules.beta(method, a, a % 4) for a in range(12)] == pytest.approx(expected)


def test_the_temperature_goes_from_its_first_value_to_its_last_over_the_run() -> None:
    method = MethodConfig(tau_schedule=(6.0, 2.0))
    assert [schedules.tau(method, e, 5) for e in range(5)] == pytest.approx([6, 5, 4, 3, 2])
    assert schedules.tau(method, 0, 1) == 6.0
    assert [schedules.tau(MethodConfig(tau=3.0), e, 4) for e in range(4)] == [3.0] * 4


def test_the_distillation_weight_rises_to_one_in_its_warm_up() -> None:
    assert [kd_weight(MethodConfig(kd_warmup_epochs=4), b, 6) for b in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert kd_weight(MethodConfig(), 0, 6) == 1.0


def rates(config: ScheduleConfig, epochs: int, updates: int, peak: float = 0.1, more: int = 0) -> list[float]:
    """The learning rate of every update, and of `more` after them."""
    optimizer = optim.optimizer("sgd", [(nn.Linear(2, 2), peak)], 0.0, 0.9)
    scheduler = optim.lr_schedule(optimizer, config, epochs, updates)
    found = []
    for n in range(epochs * updates + more):
        scheduler.step_update(n)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("updates", [1, 7])
def test_the_cosine_starts_at_the_peak_after_the_warm_up_and_ends_at_its_minimum(warmup: int, updates: int) -> None:
    epochs, peak, low = 8, 0.1, 0.001
    w, total = warmup * updates, epochs * updates
    *found, end = rates(ScheduleConfig(lr_warmup_epochs=warmup, min_lr=low), epochs, updates, more=1)
    for n, lr in enumerate(found):
        if n < w:
            expected = peak / w + (peak - peak / w) * n / w
        else:
            expected = low + 0.5 * (peak - low) * (1 + math.cos(math.pi * (n - w) / (total - w)))
        assert lr == pytest.approx(expected, rel=1e-9), n
    assert found[w] == pytest.approx(peak)
    assert end == pytest.approx(low), "one update later it would be the minimum"


@pytest.mark.parametrize("warmup", [0, 1])
def test_the_steps_fall_with_the_first_update_of_their_milestones(warmup: int) -> None:
    """150/180/210 of the KD tables are epochs from the start of the run; the update before still has the old rate."""
    config = ScheduleConfig(type="step", milestones=(3, 5), gamma=0.1, lr_warmup_epochs=warmup)
    found = rates(config, 6, 7)
    for n, lr in enumerate(found):
        if n < 7 * warmup:
            expected = 0.1 / 7 + (0.1 - 0.1 / 7) * n / 7
        else:
            expected = 0.1 * 0.1 ** sum(n // 7 >= m for m in (3, 5))
        assert lr == pytest.approx(expected, rel=1e-9), n


def tensors() -> nn.Module:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.arange(6.0).view(2, 3) / 5)
        module.bias.copy_(torch.tensor([0.3, -0.2]))
    return module


GRADS = (0.5, -1.0, 2.0)


def stepped(name: str, lr: float, decay: float, momentum: float) -> tuple[list[float], nn.Module]:
    module = tensors()
    optimizer, before = optim.optimizer(name, [(module, lr)], decay, momentum), after(module)
    for g in GRADS:
        for p in module.parameters():
            p.grad = torch.full_like(p, g)
        optimizer.step()
    return before, module


def after(module: nn.Module) -> list[float]:
    return [v for p in module.parameters() for v in p.flatten().tolist()]


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_is_plain_momentum_with_decay_on_every_parameter(momentum: float) -> None:
    before, module = stepped("sgd", 0.1, 0.05, momentum)
    expected = []
    for w in before:
        v = 0.0
        for g in GRADS:
            v = momentum * v + g + 0.05 * w
            w -= 0.1 * v
        expected.append(w)
    assert after(module) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_follows_its_paper_and_decays_every_parameter(name: str) -> None:
    before, module = stepped(name, 0.1, 0.05, 0.9)
    expected = []
    for w in before:
        m = v = 0.0
        for t, g in enumerate(GRADS, start=1):
            if name == "adamw":
                w -= 0.1 * 0.05 * w
            else:
                g = g + 0.05 * w
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        expected.append(w)
    assert after(module) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_skipped_first_update_leaves_no_trace(name: str) -> None:
    """torch's fused SGD makes its momentum uninitialised in the first step; skipped, it would stay so."""
    _, undisturbed = stepped(name, 0.1, 0.05, 0.9)
    module = tensors()
    optimizer = optim.optimizer(name, [(module, 0.1)], 0.05, 0.9)
    torch.full((4096,), float("nan")).mul_(2)  # what freed memory may hold
    for g, bad in ((float("nan"), 1.0), *((g, 0.0) for g in GRADS)):
        for p in module.parameters():
            p.grad = torch.full_like(p, g)
        optimizer.found_inf = torch.tensor(bad)  # type: ignore[attr-defined]
        optimizer.step()
    assert after(module) == after(undisturbed)


def test_frozen_parameters_are_not_optimised() -> None:
    module = tensors()
    module.bias.requires_grad_(False)
    optimizer = optim.optimizer("adamw", [(module, 0.1)], 0.0, 0.9)
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(module.weight)]


@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 2), (3, 1), (4, 5)])
def test_the_last_epochs_have_no_distillation(warmup: int, cooldown: int) -> None:
    method = MethodConfig(kd_warmup_epochs=warmup, kd_cooldown_epochs=cooldown)
    found = [kd_weight(method, b, 6) for b in range(6)]
    assert found == pytest.approx([0.0 if b >= 6 - cooldown else min(1.0, (b + 1) / max(warmup, 1)) for b in range(6)])


@pytest.mark.parametrize(
    ("epochs", "cooldown", "plan"),
    [
        ((2, 2, 2), 0, "abbabbabb"),
        ((2, 2, 2), 1, "abbabbabb"),
        ((2, 2, 2), 2, "abbabbbb"),
        ((2, 2, 2), 3, "abbabbbb"),
        ((2, 2, 2), 4, "abbbbbb"),
        ((2, 2, 1), 1, "abbabbb"),
    ],
)
def test_a_steps_that_only_cooldown_follows_are_left_out(epochs: tuple[int, ...], cooldown: int, plan: str) -> None:
    keys: dict[str, Any] = {"num_stages": 3, "student_epochs_per_stage": epochs, "teacher_adapt_epochs": 1}
    found = make_plan(MethodConfig(**keys, kd_cooldown_epochs=cooldown), a_steps=True)
    assert "".join(e.phase for e in found) == plan
    assert all(b.overall == a.overall + 1 for a, b in pairwise(found))
