"""The fitted combination of teachers against a search of the simplex. torchdistill has nothing like it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.methods.stack import StackConfig
from pipeline.training import losses
from pipeline.training.evaluation import outputs
from pipeline.training.methods.stack import combined, fitted, nll
from pipeline.training.run_data import RunData
from tests.pipeline.training.builders import CLASSES, CPU, config, image_data
from tests.pipeline.training.methods.logit_reference import (
    check_equal_networks_cost_nothing,
    check_limits,
    errors,
    kl64,
    labels,
    logits,
    softmax64,
    step_of,
    terms_of,
)

TAU = 4.0
WEIGHTS = torch.tensor([0.5, 0.2, 0.3])


def loss(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    return losses.kd(s, combined(ts, WEIGHTS[: len(ts)]), TAU)


def loop(s: Tensor, ts: list[Tensor], y: Tensor) -> Tensor:
    values = []
    for i, row in enumerate(s):
        target = sum(w * t[i] for w, t in zip(WEIGHTS.double(), ts, strict=True))
        values.append(TAU**2 * kl64(softmax64(target, TAU), softmax64(row, TAU)))
    return torch.stack(values)


def teachers(y: Tensor, n: int, hits: list[float], scale: float = 1.0) -> list[Tensor]:
    """Teachers that know the labels the better, the higher their number in `hits`; the rest is noise."""
    hot = torch.nn.functional.one_hot(y, n)
    return [scale * (hit * hot + logits(len(y), n, 50 + i, 1.0)) for i, hit in enumerate(hits)]


@pytest.mark.parametrize(("b", "n"), [(16, 10), (1, 100), (5, 2)])
def test_value_and_gradient_are_those_of_the_formula(b: int, n: int) -> None:
    assert max(errors(loss, loop, logits(b, n, 1), [logits(b, n, 2 + i) for i in range(3)], labels(b, n))) < 2e-6


def test_limits() -> None:
    check_limits(loss, k=3)
    check_equal_networks_cost_nothing(loss, k=3)


def test_the_fit_measures_the_likelihood_of_the_combination() -> None:
    y = labels(30, 5)
    ts, w = teachers(y, 5, [1.0, 2.0, 0.0]), WEIGHTS.double().requires_grad_()
    value, slope = nll(ts, y, w.detach())
    expected = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(y):
        expected = expected - torch.log(softmax64(sum(a * t[i].double() for a, t in zip(w, ts, strict=True)))[label])
    (right,) = torch.autograd.grad(expected / 30, w)
    assert value == pytest.approx(expected.item() / 30, rel=1e-12)
    torch.testing.assert_close(slope, right)


@pytest.mark.parametrize("hits", [[1.0, 2.0, 0.0], [0.0, 3.0, 3.0], [4.0, 0.0, 0.0]])
def test_no_other_weights_are_likelier(hits: list[float]) -> None:
    y = labels(300, 5)
    ts = teachers(y, 5, hits)
    w = fitted(ts, y)
    assert w.sum().item() == pytest.approx(1, abs=1e-12)
    assert (w >= 0).all()
    best = nll(ts, y, w)[0]
    for i in range(21):
        for j in range(21 - i):
            other = torch.tensor([i, j, 20 - i - j], dtype=torch.float64) / 20
            assert nll(ts, y, other)[0] > best - 2e-6
    assert w.argmax().item() in [k for k, hit in enumerate(hits) if hit == max(hits)]


def test_identical_teachers_give_the_average() -> None:
    y = labels(100, 5)
    a, b = teachers(y, 5, [2.0, 1.0])
    w = fitted([a, a.clone(), a.clone()], y)
    assert w.tolist() == pytest.approx([1 / 3] * 3, abs=1e-9)
    torch.testing.assert_close(combined([a, a, a], w), a)
    w = fitted([a, b, a.clone()], y)  # a tie between the two: the smallest norm shares equally
    assert w[0].item() == pytest.approx(w[2].item(), abs=1e-4)
    alone = fitted([a, b], y)
    assert (w[0] + w[2]).item() == pytest.approx(alone[0].item(), abs=1e-3)


def test_one_teacher_is_plain_distillation() -> None:
    s, t, y = logits(6, 9, 1), logits(6, 9, 2), labels(6, 9)
    w = fitted([t], y)
    assert w.tolist() == [1.0]
    torch.testing.assert_close(losses.kd(s, combined([t], w), TAU), losses.kd(s, t, TAU), rtol=0, atol=0)


def test_logits_of_any_size_are_fitted() -> None:
    y = labels(60, 5)
    for scale in (1e-3, 1e4):
        w = fitted(teachers(y, 5, [1.0, 2.0], scale), y)
        assert w.sum().item() == pytest.approx(1)
        assert torch.isfinite(w).all()


def made(seed: int = 0) -> Any:
    """A step on a real split, whose teachers are of unequal merit."""
    data = RunData(config(), image_data(160, seed=seed), CPU)
    return step_of(StackConfig(), k=2, data=data)


def test_the_step_fits_once_on_held_out_images_and_distils_the_combination(caplog: pytest.LogCaptureFixture) -> None:
    step, (s, *ts), y = made(), [logits(6, CLASSES, i) for i in range(3)], labels(6, CLASSES)
    assert step.own["combination"].weights.isnan().all(), "fitted at first use"
    with caplog.at_level("INFO", "asib"):
        first, again = terms_of(step, s, ts, y)["stack"], terms_of(step, s, ts, y)["stack"]
    assert len(caplog.records) == 1
    assert torch.equal(first, again)
    held_out = made()._held_out
    seen = [outputs(t, held_out).logits for t in step._teachers]
    w = fitted(seen, held_out.labels)
    torch.testing.assert_close(step.own["combination"].weights, w.float())
    assert f"{w[0]:.3f}, {w[1]:.3f}" in caplog.text
    torch.testing.assert_close(first, losses.kd(s, combined(ts, w), TAU))
    torch.testing.assert_close(step.weighed, w.float())


def test_the_weights_of_a_checkpoint_are_not_fitted_again(caplog: pytest.LogCaptureFixture) -> None:
    step, (s, *ts), y = made(), [logits(6, CLASSES, i) for i in range(3)], labels(6, CLASSES)
    kept = {"combination.weights": torch.tensor([0.25, 0.75])}
    step.own.load_state_dict(kept)
    with caplog.at_level("INFO", "asib"):
        found = terms_of(step, s, ts, y)["stack"]
    assert not caplog.records
    torch.testing.assert_close(found, losses.kd(s, 0.25 * ts[0] + 0.75 * ts[1], TAU))
    assert torch.equal(step.own.state_dict()["combination.weights"], kept["combination.weights"])


def test_without_held_out_images_it_is_refused() -> None:
    for fraction, broken in ((0.0, 1), (0.1, 0)):
        found = list(StackConfig().rules(SimpleNamespace(dataset=SimpleNamespace(val_fraction=fraction))))
        assert len(found) == broken
