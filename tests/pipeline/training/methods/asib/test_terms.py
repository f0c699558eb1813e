"""Terms, targets, weights, the sample gate and clamps, each against its formula computed another way."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import MethodConfig
from pipeline.training import losses
from pipeline.training.methods.asib import schedules, targets
from pipeline.training.methods.asib.schedules import make_plan
from tests.pipeline.training.builders import ce, kl, softmax


def random(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


# decoupled distillation ----------------------------------------------------------------------------------------------


def dkd(row: list[float], p: list[float], y: int, tau: float, alpha: float, beta: float) -> float:
    """Zhao et al. 2022, by its words: KL between (label, rest), and KL among the others, of target and prediction."""
    q = softmax(row, tau)

    def divergence(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / z) for x, z in zip(a, b, strict=True) if x > 0)

    rest_p, rest_q = ([v for i, v in enumerate(d) if i != y] for d in (p, q))
    tckd = divergence([p[y], sum(rest_p)], [q[y], sum(rest_q)])
    among = [v / sum(rest_p) for v in rest_p] if sum(rest_p) > 0 else [0.0] * len(rest_p)
    nckd = divergence(among, [v / sum(rest_q) for v in rest_q])
    return tau**2 * (alpha * tckd + beta * nckd)


@pytest.mark.parametrize(("n", "tau", "alpha", "beta"), [(3, 1.0, 1.0, 8.0), (7, 4.0, 0.5, 2.0), (5, 2.0, 0.0, 1.0)])
def test_dkd_by_loops(n: int, tau: float, alpha: float, beta: float) -> None:
    s, p, y = random(9, n), random(9, n, seed=1).softmax(1), torch.arange(9) % n
    expected = [dkd(*row, tau, alpha, beta) for row in zip(s.tolist(), p.tolist(), y.tolist(), strict=True)]
    assert losses.dkd(s, p, y, tau, alpha, beta).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(
    st.lists(st.floats(-20, 20), min_size=4, max_size=4),
    st.lists(st.floats(-6, 6), min_size=4, max_size=4),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_dkd_with_the_targets_own_weight_is_the_plain_divergence(s: list[float], t: list[float], y: int) -> None:
    """KL = TCKD + (1 - p_y) NCKD (eq. 6)."""
    p = torch.tensor([softmax(t)])
    found = losses.dkd(torch.tensor([s]), p, torch.tensor([y]), 2.0, 1.0, 1.0 - p[0, y].item())
    assert found.item() == pytest.approx(losses.kl_to(torch.tensor([s]), p, 2.0).item(), rel=1e-3, abs=2e-4)


def test_the_gradient_of_dkd_is_that_of_the_plain_divergence_in_float64() -> None:
    s, p, y = random(6, 5, dtype=torch.float64), random(6, 5, seed=1).double().softmax(1), torch.arange(6) % 5
    a, b = s.float().requires_grad_(), s.clone().requires_grad_()
    losses.dkd(a, p, y, 3.0, 0.7, 2.5).sum().backward()
    log_q = (b / 3).log_softmax(1)
    total = torch.zeros((), dtype=torch.float64)
    for i, k in enumerate(y.tolist()):
        rest = [c for c in range(5) if c != k]
        q_rest = log_q[i, rest].exp().sum()
        p_rest = p[i, rest].sum()
        total = total + 0.7 * (p[i, k] * (p[i, k].log() - log_q[i, k]) + p_rest * (p_rest.log() - q_rest.log()))
        for c in rest:
            share = p[i, c] / p_rest
            total = total + 2.5 * share * (share.log() - (log_q[i, c] - q_rest.log()))
    (9 * total).backward()
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top", [1.0, 1 - 1e-7])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_dkd_is_finite_with_one_hot_targets_and_huge_logits(top: float, scale: float) -> None:
    """The published code masks by subtracting 1000 from a logit, and takes the log of a sum of rounded softmaxes."""
    s = torch.tensor([[scale, -scale, 0.0], [-scale, scale, scale], [0.0, 0.0, scale]], requires_grad=True)
    p = torch.full((3, 3), (1 - top) / 2)
    p[:, 0] = top
    for y in (torch.zeros(3, dtype=torch.long), torch.tensor([1, 2, 0])):
        value = losses.dkd(s, p, y, 4.0, 1.0, 8.0)
        (grad,) = torch.autograd.grad(value.sum(), s)
        assert torch.isfinite(value).all()
        assert torch.isfinite(grad).all()
        assert (value >= -1e-3).all()
    if scale == 1e4:
        # a target on the label alone: TCKD is the label's negative log-likelihood, NCKD has nothing to say
        value = losses.dkd(s, torch.eye(3)[[0, 0, 0]], torch.zeros(3, dtype=torch.long), 4.0, 1.0, 8.0)
        assert value.tolist() == pytest.approx([0.0, 16 * (2e4 / 4 + math.log(2)), 16 * 1e4 / 4], rel=1e-5, abs=1e-4)


# features ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("clip", [None, 4.0])
def test_the_feature_distance_is_a_clipped_sum_of_huber_losses(beta: float, clip: float | None) -> None:
    feature, mu = random(6, 5, scale=2.0).requires_grad_(), random(6, 5, seed=1, scale=1.0)
    found = losses.feature_distance(feature, mu, beta, clip)
    found.sum().backward()
    clipped = 0
    for i, (row, other) in enumerate(zip(feature.tolist(), mu.tolist(), strict=True)):
        gaps = [a - b for a, b in zip(row, other, strict=True)]
        value = sum(g * g / (2 * beta) if abs(g) < beta else abs(g) - beta / 2 for g in gaps)
        slope = [g / beta if abs(g) < beta else math.copysign(1, g) for g in gaps]
        if clip is not None and value > clip:
            value, slope, clipped = clip, [0.0] * 5, clipped + 1
        assert found[i].item() == pytest.approx(value, rel=1e-5)
        assert feature.grad[i].tolist() == pytest.approx(slope, abs=1e-5)
    assert (0 < clipped < 6) == (clip is not None) or beta == 5.0


def test_normalised_features_have_unit_length_in_float32() -> None:
    x = random(4, 6).half()
    assert torch.equal(losses.normalised(x, "none"), x.float())
    for row, expected in zip(losses.normalised(x, "l2").tolist(), x.tolist(), strict=True):
        length = math.sqrt(sum(v * v for v in expected))
        assert row == pytest.approx([v / length for v in expected], rel=1e-5)
    assert torch.isfinite(losses.normalised(torch.zeros(1, 3), "l2")).all()


# targets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_confident_teachers_weigh_more(k: int, tau: float) -> None:
    teachers = [random(5, 4, seed=i, scale=1.0 + i) for i in range(k)]
    found = targets.confidence_weighted(teachers, tau)
    for i in range(5):
        rows = [softmax(t[i].tolist(), tau) for t in teachers]
        w = [max(r) for r in rows]
        expected = [sum(a * r[c] for a, r in zip(w, rows, strict=True)) / sum(w) for c in range(4)]
        assert found[i].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("tau", [1.0, 4.0, 1e5])
def test_identical_teachers_make_every_average_equal(n: int, tau: float) -> None:
    t = random(6, n)
    torch.testing.assert_close(targets.confidence_weighted([t, t, t], tau), targets.averaged([t, t, t], None, tau))
    torch.testing.assert_close(targets.averaged([t, t], [0.7, 0.3], tau), (t / tau).softmax(1))
    if tau == 1e5:
        torch.testing.assert_close(targets.averaged([t, t], None, tau), torch.full((6, n), 1 / n), rtol=1e-3, atol=0)


def test_targets_of_huge_logits_are_probabilities() -> None:
    t, other = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    for p in (targets.averaged([t, other], None, 1.0), targets.confidence_weighted([t, other], 1.0)):
        assert torch.isfinite(p).all()
        assert p.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("known", "threshold", "average", "expected"),
    [
        (60.0, 60.0, 80.0, 0.8),  # at the threshold
        (80.0, 60.0, 80.0, 0.25),  # at the averaged teachers
        (70.0, 60.0, 80.0, 0.525),  # half way
        (99.0, 60.0, 80.0, 0.25),  # beyond
        (50.0, 60.0, 80.0, 0.8),  # below (the gate would be closed): clamped
        (81.0, 80.0, 80.0, 0.25),  # nothing in between: straight to the lower share
        (90.0, 85.0, 80.0, 0.25),
        (40.0, 0.0, 80.0, 0.525),
    ],
)
def test_the_share_of_the_averaged_teachers_falls_with_the_synergys_accuracy(
    known: float, threshold: float, average: float, expected: float
) -> None:
    assert targets.averaged_share(known, threshold, average, least=0.25, most=0.8) == pytest.approx(expected)


def test_auto_min_picks_by_the_label_and_the_guard_closes_where_neither_knows_it() -> None:
    syn = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]])
    avg = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.3, 0.6], [0.3, 0.1, 0.6], [0.4, 0.3, 0.3]])
    y = torch.tensor([0, 2, 1, 0])
    picked, guard = targets.best_of(syn, avg, y)
    lower = [-math.log(s[k]) <= -math.log(a[k]) for s, a, k in zip(syn.tolist(), avg.tolist(), y.tolist(), strict=True)]
    assert picked.tolist() == lower == [True, False, True, True]
    assert guard.tolist() == [True, True, False, True]


# weights -------------------------------------------------------------------------------------------------------------


def test_the_uncertainty_weight_goes_from_one_to_one_minus_u() -> None:
    p = torch.cat([torch.eye(4)[:1], torch.full((1, 4), 0.25), random(3, 4).softmax(1)])
    found = targets.uncertainty_weight(p, 0.6).tolist()
    expected = [1 - 0.6 * -sum(v * math.log(v) for v in row if v > 0) / math.log(4) for row in p.tolist()]
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[:2] == pytest.approx([1.0, 0.4])
    assert targets.uncertainty_weight(torch.tensor([[0.5, 0.5]]), 1.0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("mode", "expected"), [("pred", [3, 3, 1, 1]), ("both_wrong", [1, 3, 1, 3])])
def test_disagreement_weights(mode: str, expected: list[int]) -> None:
    eye = torch.eye(4)
    # labels 0 1 2 3: one is right; all differ and miss; all right; all agree and miss
    teachers = [eye[[0, 0, 2, 1]], eye[[1, 2, 2, 1]], eye[[0, 3, 2, 1]]]
    found = targets.disagreement_weight(teachers, torch.arange(4), mode, 3.0, 1.0)
    assert found.tolist() == expected
    if mode == "pred":
        differ, both = targets.disagreement(teachers, torch.arange(4))
        assert (differ.item(), both.item()) == (0.5, 0.5)


# the sample gate -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 1, width=16), min_size=1, max_size=12),
    st.floats(0, 1),
    st.integers(0, 100),
    st.integers(0, 100),
)
@settings(max_examples=150, deadline=None)
def test_the_gate_takes_the_least_sure_within_its_bounds(
    confidence: list[float], threshold: float, one: int, other: int
) -> None:
    least, most = sorted((one, other))
    chosen = targets.select(torch.tensor(confidence), threshold, least / 100, most / 100).tolist()
    size = len(confidence)
    at_least = -(-least * size // 100)
    at_most = max(at_least, most * size // 100)
    below = sum(torch.tensor(confidence) < threshold)
    assert len(chosen) == min(max(int(below), at_least), at_most)
    assert chosen == sorted(set(chosen))
    ranked = sorted(range(size), key=lambda i: (confidence[i], i))  # ties: the earlier row
    assert set(chosen) == set(ranked[: len(chosen)])


def test_the_gate_may_choose_nobody_or_everybody() -> None:
    sure = torch.full((8,), 0.99)
    assert targets.select(sure, 0.85, 0.0, 0.5).tolist() == []
    assert targets.select(sure, 0.85, 0.25, 0.5).tolist() == [0, 1]
    assert targets.select(1 - sure, 0.85, 0.0, 0.5).tolist() == [0, 1, 2, 3]
    assert targets.select(1 - sure, 0.85, 0.0, 1.0).tolist() == list(range(8))
    assert targets.select(sure[:1], 0.85, 0.1, 0.5).tolist() == [0], "a batch of one"


@pytest.mark.parametrize("percent", range(101))
def test_ratios_round_as_decimals_do(percent: int) -> None:
    """0.07 * 100 is 7.000000000000001, and 0.29 * 100 is 28.999999999999996."""
    assert targets.gate_size(0, 100, percent / 100, 1.0) == percent
    assert targets.gate_size(100, 100, 0.0, percent / 100) == percent


# clamps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kd", "cross_entropy", "expected"),
    [(2.0, 4.0, 1.0), (5.0, 4.0, 1.0), (10.0, 4.0, 0.5), (0.0, 0.0, 1.0), (3.0, 0.0, 0.0)],
)
def test_the_ratio_clamp_is_a_detached_factor(kd: float, cross_entropy: float, expected: float) -> None:
    term, other = torch.tensor(kd, requires_grad=True), torch.tensor(cross_entropy, requires_grad=True)
    factor = losses.ratio_factor(term, other, 1.25)
    assert factor.item() == pytest.approx(expected)
    assert not factor.requires_grad
    (factor * term).backward()
    assert term.grad.item() == pytest.approx(expected), "the gradient is scaled as the value is"


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("value", [0.5, 20.0, 20.5, 55.0, 1e4])
def test_the_loss_clamp_and_its_gradient(mode: str, value: float) -> None:
    loss = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    found = losses.clamp_loss(loss, 20.0, mode)
    found.backward()
    if value <= 20:
        expected, slope = value, 1.0
    elif mode == "hard":
        expected, slope = 20.0, 0.0
    else:
        expected, slope = 20 + math.log(1 + value - 20), 1 / (1 + value - 20)
    assert found.item() == pytest.approx(expected)
    assert loss.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_several_processes_clamp_by_their_common_loss(mode: str) -> None:
    """The mean of their clamped losses is the clamped mean, also where one of them alone lies below the bound."""
    parts = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, 47.0)]
    overall = (sum(parts) / 2).detach()
    (sum(losses.clamp_loss(p, 20.0, mode, overall) for p in parts) / 2).backward()
    both = sum(losses.clamp_loss(p, 20.0, mode, overall) for p in parts).item() / 2
    alone = torch.tensor(25.0, dtype=torch.float64, requires_grad=True)
    whole = losses.clamp_loss(alone, 20.0, mode)
    whole.backward()
    assert both == pytest.approx(whole.item())
    assert [p.grad.item() for p in parts] == pytest.approx([alone.grad.item() / 2] * 2)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_a_clamp_hides_no_loss_that_is_not_finite(mode: str) -> None:
    for bad in (math.nan, math.inf):
        assert not torch.isfinite(losses.clamp_loss(torch.tensor(bad), 20.0, mode))


# the cooldown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 2), (3, 1), (4, 5)])
def test_the_last_epochs_have_no_distillation(warmup: int, cooldown: int) -> None:
    method = MethodConfig(kd_warmup_epochs=warmup, kd_cooldown_epochs=cooldown)
    found = [schedules.kd_weight(method, b, 6) for b in range(6)]
    assert found == pytest.approx([0.0 if b >= 6 - cooldown else min(1.0, (b + 1) / max(warmup, 1)) for b in range(6)])


@pytest.mark.parametrize(
    ("cooldown", "plan"), [(0, "abbabbabb"), (1, "abbabbabb"), (2, "abbabbbb"), (3, "abbabbbb"), (4, "abbbbbb")]
)
def test_a_steps_that_only_cooldown_follows_are_left_out(cooldown: int, plan: str) -> None:
    keys: dict[str, Any] = {"num_stages": 3, "student_epochs_per_stage": (2, 2, 2), "teacher_adapt_epochs": 1}
    epochs = make_plan(MethodConfig(**keys, kd_cooldown_epochs=cooldown), a_steps=True)
    assert "".join(e.phase for e in epochs) == plan
    assert all(b.overall == a.overall + 1 for a, b in pairwise(epochs))


def test_loops_agree_with_the_helpers() -> None:
    """The references of these tests against one another: a one-hot target is cross-entropy."""
    assert kl([0.0, 1.0, 0.0], [1.0, 2.0, 3.0], 1.0) == pytest.approx(ce([1.0, 2.0, 3.0], 1))
