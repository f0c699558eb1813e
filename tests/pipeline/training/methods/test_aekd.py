"""Weights for a common descent direction against the quadratic program, solved exactly by trying every set of bounds.

torchdistill has no loss for several teachers.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from pipeline.config.methods.aekd import AekdConfig
from pipeline.training import losses
from pipeline.training.methods.aekd import aekd, common_descent, gram
from tests.pipeline.training.methods.logit_reference import (
    check_equal_networks_cost_nothing,
    check_limits,
    check_step,
    errors,
    kl64,
    labels,
    logits,
    relative_error,
    softmax64,
)

TAU, TOLERANCE = 4.0, 0.6
WEIGHTS = torch.tensor([0.5, 0.2, 0.3])


def loss(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    targets = losses.softened(ts, TAU)
    return aekd(s, targets, common_descent(gram(s, targets, TAU), TOLERANCE), TAU)


def exact(products: Tensor, most: float) -> Tensor:
    """argmin w'Gw / 2 on the bounded simplex: the best of all stationary points with some weights at 0 or `most`."""
    k = len(products)
    most = max(most, 1 / k)
    found: list[tuple[float, Tensor]] = []
    for state in product((0.0, most, None), repeat=k):
        w = torch.tensor([v or 0.0 for v in state], dtype=torch.float64)
        free = [i for i, v in enumerate(state) if v is None]
        if free:  # G_ff w_f - lambda = -G_fb w_b, sum w_f = 1 - sum w_b
            system = torch.ones((len(free) + 1,) * 2, dtype=torch.float64)
            system[:-1, :-1], system[-1, -1] = products[free][:, free], 0.0
            right = torch.cat([-(products[free] @ w), 1 - w.sum().reshape(1)])
            w[free] = torch.linalg.lstsq(system, right).solution[:-1]
        if abs(w.sum() - 1) < 1e-9 and (w >= -1e-12).all() and (w <= most + 1e-12).all():
            found.append((float(w @ products @ w), w))
    return min(found, key=lambda pair: pair[0])[1]


def loop(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    gradients = []
    for t in ts:  # of each teacher's mean loss on all logits, by autograd
        free = s.detach().clone().requires_grad_()
        kds = [TAU**2 * kl64(softmax64(p, TAU), softmax64(row, TAU)) for row, p in zip(free, t, strict=True)]
        gradients.append(torch.autograd.grad(sum(kds), free)[0].flatten())
    g = torch.stack(gradients)
    weights = exact(g @ g.T, TOLERANCE)
    values = []
    for i, row in enumerate(s):
        kds = [TAU**2 * kl64(softmax64(t[i], TAU), softmax64(row, TAU)) for t in ts]
        values.append(sum(w * kd for w, kd in zip(weights, kds, strict=True)))
    return torch.stack(values)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize(("b", "n"), [(16, 10), (1, 100), (5, 2)])
def test_value_and_gradient_are_those_of_the_formula(b: int, n: int, k: int) -> None:
    """The solver is exact to some 1e-6, its tie-break included."""
    assert max(errors(loss, loop, logits(b, n, 1), [logits(b, n, 2 + i) for i in range(k)], labels(b, n))) < 2e-5


def test_the_gram_matrix_is_of_the_losses_gradients() -> None:
    s, ts = logits(6, 9, 1).requires_grad_(), [logits(6, 9, 2 + i) for i in range(3)]
    slopes = [torch.autograd.grad(losses.kd(s, t, TAU).sum(), s)[0].flatten().double() for t in ts]
    expected = torch.stack(slopes) @ torch.stack(slopes).T
    assert relative_error(gram(s, losses.softened(ts, TAU), TAU), expected) < 1e-6


def test_samples_without_a_lesson_do_not_count() -> None:
    s, ts = logits(6, 9, 1), [logits(6, 9, 2 + i) for i in range(3)]
    targets = losses.softened(ts, TAU)
    untaught = torch.cat([targets[:4], torch.zeros_like(targets[4:])])
    torch.testing.assert_close(gram(s, untaught, TAU), gram(s[:4], targets[:4], TAU))
    assert torch.equal(aekd(s, untaught, WEIGHTS, TAU)[4:], torch.zeros(2))


def test_limits() -> None:
    check_limits(loss, k=3)
    check_equal_networks_cost_nothing(loss, k=3)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_weights_sum_to_1_and_none_is_above_the_tolerance(k: int) -> None:
    for seed in range(5):
        targets = losses.softened([logits(8, 10, 10 * seed + i, 1.0 + 3 * i) for i in range(k)], TAU)
        w = common_descent(gram(logits(8, 10, 99), targets, TAU), TOLERANCE)
        assert w.sum().item() == pytest.approx(1, abs=1e-12)
        assert (w >= 0).all()
        assert (w <= max(TOLERANCE, 1 / k) + 1e-9).all()


def test_a_teacher_with_a_small_gradient_is_followed_up_to_the_tolerance() -> None:
    products = torch.diag(torch.tensor([1e-6, 1.0], dtype=torch.float64))
    assert common_descent(products, 0.6).tolist() == pytest.approx([0.6, 0.4], abs=1e-6)
    assert common_descent(products, 1.0).tolist() == pytest.approx([1.0, 0.0], abs=1e-4)
    # without a bound that acts: w_k in proportion to 1 / |g_k|^2 for orthogonal gradients
    products = torch.diag(torch.tensor([1.0, 1.25, 2.0], dtype=torch.float64))
    assert common_descent(products, 0.6).tolist() == pytest.approx([1 / 2.3, 0.8 / 2.3, 0.5 / 2.3], abs=1e-5)


def test_identical_teachers_share_equally() -> None:
    a, b = logits(6, 9, 1), logits(6, 9, 2)
    s = logits(6, 9, 3)
    w = common_descent(gram(s, losses.softened([a, a, a], TAU), TAU), TOLERANCE)
    assert w.tolist() == pytest.approx([1 / 3] * 3, abs=1e-9)
    w = common_descent(gram(s, losses.softened([a, b, a], TAU), TAU), TOLERANCE)
    assert w[0].item() == pytest.approx(w[2].item(), abs=1e-5)
    alone = common_descent(gram(s, losses.softened([a, b], TAU), TAU), 1.0)
    w = common_descent(gram(s, losses.softened([a, b, a], TAU), TAU), 1.0)
    assert (w[0] + w[2]).item() == pytest.approx(alone[0].item(), abs=1e-5)


def test_without_a_gradient_or_with_one_that_is_no_number_the_weights_are_equal() -> None:
    for products in (torch.zeros(2, 2), torch.full((2, 2), torch.nan), torch.full((2, 2), torch.inf)):
        assert common_descent(products.double(), TOLERANCE).tolist() == [0.5, 0.5]


def test_one_teacher_is_plain_distillation() -> None:
    s, t = logits(6, 9, 1), logits(6, 9, 2)
    assert torch.equal(loss(s, [t], labels(6, 9)), losses.kd(s, t, TAU))


def test_the_step_computes_the_loss() -> None:
    check_step(AekdConfig, loss, k=3)
