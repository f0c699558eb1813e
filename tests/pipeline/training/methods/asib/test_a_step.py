"""The A-step's loss against a float64 recomputation by loops, and what it trains and leaves alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.methods.asib.a_step import AStep
from pipeline.training.methods.asib.task import Distillation
from pipeline.training.objective import Moment
from pipeline.training.optim import update
from tests.pipeline.training.builders import (
    Calls,
    ce,
    config,
    differences,
    distillation,
    double,
    first_batch,
    kl,
    loop_for,
    run_until,
    softmax,
)


def reference(task: Distillation, batch: Any, moment: Moment, w: dict[str, float], tau: float) -> dict[str, float]:
    """L_A and its terms (docs/method.md section 3), sample by sample in float64."""
    m = task.method
    fusion, student, teachers = double(task.fusion), double(task.student).eval(), [double(t) for t in task.teachers]
    x = batch.x.double()
    with torch.no_grad():
        s = student(x)
        tokens = torch.stack([a(t(x).feat_2d) for a, t in zip(fusion.adapters, teachers, strict=True)], dim=1)
        _, mu, logvar = fusion.ib_mbm(s.feat_2d, tokens, sample="never")
    shape = (len(x), m.ib_mbm_out_dim)
    eps = task.streams.normal(shape, "ib_noise", *moment, 0).tolist()
    keep = task.streams.keep_mask(shape, m.synergy_head_dropout, "head_dropout", *moment, 0).tolist()
    norm, linear, temperature = fusion.head.net[0], fusion.head.net[3], 1.0
    sums = dict.fromkeys(("ce", "kd", "ib", "cw", "cw2"), 0.0)
    for i in range(len(x)):
        mean, lv = mu[i].tolist(), logvar[i].tolist()
        z = mean
        if m.use_ib:
            z = [a + max(math.exp(v / 2), m.ib_mbm_min_std) * e for a, v, e in zip(mean, lv, eps[i], strict=True)]
        centre = sum(z) / len(z)
        spread = math.sqrt(sum((v - centre) ** 2 for v in z) / len(z) + norm.eps)
        h = [(v - centre) / spread * g + b for v, g, b in zip(z, norm.weight.tolist(), norm.bias.tolist(), strict=True)]
        h = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in h]
        h = [v * k / (1 - m.synergy_head_dropout) for v, k in zip(h, keep[i], strict=True)]
        logits = [
            m.synergy_logit_scale * (sum(a * b for a, b in zip(row, h, strict=True)) + c) / temperature
            for row, c in zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)
        ]
        cw = 1.0
        if w["certainty"]:
            cw = min(max(sum(math.exp(-v) for v in lv) / len(lv), m.min_cw), m.max_cw)
        sums["ce"] += cw * ce(logits, int(batch.y[i]), m.label_smoothing)
        sums["kd"] += cw * kl(softmax(s.logits[i].tolist(), tau), logits, tau)
        sums["ib"] += sum(0.5 * (a * a + math.exp(v) - 1 - v) for a, v in zip(mean, lv, strict=True))
        sums["cw"] += cw
        sums["cw2"] += cw * cw
    means = {k: v / len(x) for k, v in sums.items()}
    penalty = [sum(v * v for v in p.flatten().tolist()) / p.numel() for p in fusion.parameters()]
    loss = w["ce"] * means["ce"] + w["kd"] * means["kd"] + w["beta"] * means["ib"]
    return means | {"loss": loss + w.get("penalty", m.ib_mbm_reg_lambda) * sum(penalty) / len(penalty)}


CASES: dict[str, tuple[dict[str, Any], int, dict[str, float], float]] = {
    "plain": (
        {"synergy_ce_alpha": 0.6, "ib_beta": 0.01},
        0,
        {"ce": 0.6, "kd": 0.4, "beta": 0.01, "certainty": True},
        4.0,
    ),
    "own kd weight, other bounds, scale, penalty": (
        {
            "teacher_adapt_alpha_kd": 0.9,
            "min_cw": 0.5,
            "max_cw": 1.02,
            "tau": 2.0,
            "synergy_logit_scale": 0.8,
            "ib_mbm_reg_lambda": 0.3,
            "ib_beta": 0.02,
        },
        0,
        {"ce": 0.6, "kd": 0.9, "beta": 0.02, "certainty": True},
        2.0,
    ),
    "cross-entropy alone": (
        {"synergy_only_epochs": 1, "ib_beta": 0.01, "feat_kd_alpha": 0.2, "ib_mbm_reg_lambda": 0.3},
        0,
        {"ce": 1.0, "kd": 0.0, "beta": 0.0, "certainty": False, "penalty": 0.0},
        4.0,
    ),
    "after it, in the beta warm-up and tau schedule": (
        {"synergy_only_epochs": 1, "ib_beta": 0.01, "ib_beta_warmup_epochs": 2, "tau_schedule": (8.0, 1.0)},
        5,  # the second A-epoch of stage 2: a = 3, e = 5 of 8
        {"ce": 0.6, "kd": 0.4, "beta": 0.01, "certainty": True},
        8.0 - 7.0 * 5 / 7,
    ),
    "deterministic": (
        {"use_ib": False, "ib_beta": 0.5},
        0,
        {"ce": 0.6, "kd": 0.4, "beta": 0.0, "certainty": False},
        4.0,
    ),
    "no distillation in the A-step": (
        {"teacher_adapt_alpha_kd": 0.0, "ib_beta": 0.01},
        0,
        {"ce": 0.6, "kd": 0.0, "beta": 0.01, "certainty": True},
        4.0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_the_method(case: str) -> None:
    method, number, weights, tau = CASES[case]
    task = distillation(config(method=method))
    epoch = task.plan[number]
    task.begin_epoch(epoch)
    objective = task.phases["a"].objective.train()
    batch, moment = first_batch(task, "a", 1), Moment("a", epoch.in_phase, 1)
    found = objective(batch, moment)
    expected = reference(task, batch, moment, weights, tau)
    assert found["loss"].item() == pytest.approx(expected["loss"], rel=2e-5)
    assert found["ce"].item() == pytest.approx(expected["ce"], rel=2e-5)
    assert found["cw_mean"].item() == pytest.approx(expected["cw"], rel=1e-5)
    if weights["kd"]:
        assert found["kd"].item() == pytest.approx(expected["kd"], rel=2e-5)
    if weights["beta"]:
        assert found["ib"].item() == pytest.approx(expected["ib"], rel=2e-5)
    logged = objective.summarise({"cw_mean": found["cw_mean"].item(), "cw_square": found["cw_square"].item()})
    assert logged["cw_std"] == pytest.approx(math.sqrt(max(expected["cw2"] - expected["cw"] ** 2, 0)), abs=5e-4)


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
