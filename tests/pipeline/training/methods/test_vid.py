"""Variational information distillation against a loop over the formula, torchdistill, and its limits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdistill.losses.mid_level import VIDLoss
from torchdistill.models.wrapper import Regressor4VID

from pipeline.training.methods.vid import Stages, Variational, negative_log_likelihood
from tests.pipeline.training.methods.feature_maps import SIZES, Map, differences, flat, maps, off, slope, to_smaller

Shape = tuple[int, int, int]


def loop(mean: list[Map], variance: list[float], target: list[Map]) -> list[float]:
    values = []
    for m, t in zip(mean, target, strict=True):
        terms = []
        for c, v in enumerate(variance):
            pairs = zip(flat(m[c]), flat(t[c]), strict=True)
            terms += [0.5 * ((a - b) ** 2 / v + math.log(v)) for a, b in pairs]
        values.append(sum(terms) / len(terms))
    return values


def stage(student: Shape, teacher: Shape, seed: int = 0, variance: float = 5.0) -> Variational:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Variational(student, teacher, variance)
        made.rho.data += torch.randn(teacher[0])
    return made


def test_each_sample_has_the_formula_s_value_and_gradients() -> None:
    mean, target = maps(3, 4, 3, 2), maps(3, 4, 3, 2, seed=1)
    variance = torch.tensor([5.0, 0.3, 1e-5, 80.0])
    lists = mean.double().tolist(), variance.double().tolist(), target.double().tolist()
    assert off(negative_log_likelihood(mean, variance, target), loop(*lists)) < 1e-6
    grad = slope(lambda x: negative_log_likelihood(x, variance, target), mean)
    assert off(grad, differences(lambda x: loop(x, *lists[1:]), mean)) < 1e-6
    moderate = variance.clamp_min(0.1)
    grad = slope(lambda v: negative_log_likelihood(mean, v, target), moderate)
    assert off(grad, differences(lambda v: loop(lists[0], v, lists[2]), moderate)) < 1e-6


def regress(net: Variational, x: Map) -> Map:
    """Three 1×1 convolutions with ReLUs between them, place by place."""
    for i in (0, 2, 4):
        weight = net.regressor[i].weight[:, :, 0, 0].double().tolist()
        rows, columns = range(len(x[0])), range(len(x[0][0]))
        x = [[[sum(w * x[c][a][b] for c, w in enumerate(row)) for b in columns] for a in rows] for row in weight]
        if i < 4:
            x = [[[max(v, 0.0) for v in line] for line in channel] for channel in x]
    return x


@pytest.mark.parametrize(("s", "t"), SIZES)
def test_a_stage_is_the_likelihood_of_what_its_regressor_makes_of_maps_of_one_size(s: Shape, t: Shape) -> None:
    net, student, teacher = stage(s, t), maps(2, *s), maps(2, *t, seed=1)
    variance = [math.log1p(math.exp(r)) + 1e-5 for r in net.rho.double().tolist()]
    expected = []
    for a, b in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        a, b = to_smaller(a, b)
        expected += loop([regress(net, a)], variance, [b])
    assert off(net(student, teacher), expected) < 2e-6


def test_torchdistill_agrees_but_sums_over_stages() -> None:
    """So does RepDistiller, with which the weight of 1 was published; here it is the mean over stages."""
    shapes = [(3, 4, 4), (5, 2, 2), (6, 1, 1)], [(4, 4, 4), (7, 2, 2), (3, 1, 1)]
    ours, student, teacher, pairs = Stages(*shapes, init_variance=5.0), [], [], {}
    seen_s: dict[str, Any] = {}
    seen_t: dict[str, Any] = {}
    for i, net in enumerate(ours.stages):
        assert isinstance(net, Variational)
        net.rho.data += torch.randn(len(net.rho), generator=torch.Generator().manual_seed(i))
        student.append(maps(8, *shapes[0][i], seed=i))
        teacher.append(maps(8, *shapes[1][i], seed=10 + i))
        theirs = Regressor4VID(shapes[0][i][0], shapes[1][i][0], shapes[1][i][0], eps=1e-5, init_pred_var=5.0)
        theirs.load_state_dict(
            {k.replace("rho", "soft_plus_param"): v for k, v in net.state_dict().items()}
        )  # the same names but for ρ's
        seen_s[f"{i}"] = {"output": theirs(student[-1])}
        seen_t[f"{i}"] = {"output": teacher[-1]}
        pairs[f"{i}"] = {side: {"io": "output", "path": f"{i}"} for side in ("student", "teacher")}
    assert off(ours(student, teacher).mean() * len(student), VIDLoss(pairs)(seen_s, seen_t).detach()) < 1e-6


@pytest.mark.parametrize("variance", [1e-4, 0.5, 5.0, 100.0, 1e6])
def test_variances_begin_where_they_are_set(variance: float) -> None:
    net = Variational((3, 2, 2), (4, 2, 2), variance)
    found = torch.nn.functional.softplus(net.rho) + 1e-5
    assert found.tolist() == pytest.approx([variance] * 4, rel=1e-3)


def test_variances_are_trained_towards_the_mean_squared_error_of_their_channel() -> None:
    """The optimum of ½(e²/σ² + log σ²) is σ² = mean e². One peer's public code never trains them."""
    net, student, teacher = stage((3, 4, 4), (2, 4, 4)), maps(16, 3, 4, 4), maps(16, 2, 4, 4, seed=1)
    teacher[:, 1] *= 3
    error = (net.regressor(student) - teacher).square().mean(dim=(0, 2, 3)).detach()
    for factor, low, high in [(0.5, -math.inf, -1e-3), (1.0, -1e-6, 1e-6), (2.0, 1e-3, math.inf)]:
        net.zero_grad()
        net.rho.data = torch.log(torch.expm1(factor * error - 1e-5))
        net(student, teacher).mean().backward()
        grads = {name: p.grad for name, p in net.named_parameters()}
        assert all(g is not None for g in grads.values())
        rho = grads["rho"]
        assert rho is not None
        assert low < rho.min()
        assert rho.max() < high


def test_a_perfect_regressor_pays_for_its_variance_alone() -> None:
    x: Tensor = maps(2, 3, 4, 4)
    assert off(negative_log_likelihood(x, torch.full((3,), 5.0), x), [0.5 * math.log(5.0)] * 2) < 1e-6
    assert negative_log_likelihood(x, torch.ones(3), x).tolist() == [0.0, 0.0]


def test_limits() -> None:
    net = stage((3, 4, 4), (2, 2, 2))
    one = net(maps(1, 3, 4, 4), maps(1, 2, 2, 2, seed=1))
    assert one.shape == (1,)
    for student, teacher in [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 2, 2)),
        (maps(2, 3, 4, 4, scale=1e12), maps(2, 2, 2, 2, scale=1e12)),
        (maps(2, 3, 4, 4, scale=1e4).half(), maps(2, 2, 2, 2, scale=1e4).half()),
    ]:
        net.zero_grad()
        x = student.clone().requires_grad_()
        found = net(x, teacher)
        found.sum().backward()
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()
        assert all(torch.isfinite(p.grad).all() for p in [x, *net.parameters()] if p.grad is not None)
