"""Factor transfer against a loop over the formula, torchdistill, and its limits; the paraphraser learns to rebuild."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdistill.losses.mid_level import FTLoss
from torchdistill.models.wrapper import Paraphraser4FactorTransfer, Translator4FactorTransfer

from pipeline.training.methods.ft import Paraphraser, Translator, factor_distance
from pipeline.training.methods.maps import squared_distance
from tests.pipeline.training.methods.feature_maps import (
    SIZES,
    Map,
    attend,
    differences,
    maps,
    mean_square,
    off,
    slope,
    to_smaller,
)

Shape = tuple[int, int, int]


def factors(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """After a leaky ReLU: of either sign."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return scale * nn.functional.leaky_relu(x, 0.1)


def loop(student: list[Map], teacher: list[Map]) -> list[float]:
    values = []
    for pair in zip(student, teacher, strict=True):
        s, t = (attend(x, 2) for x in to_smaller(*pair))
        values.append(sum(abs(a - b) for a, b in zip(s, t, strict=True)) / len(s))
    return values


def theirs(student: Tensor, teacher: Tensor) -> Tensor:
    given: list[Any] = [{"translator": {"output": student}}, {"paraphraser": {"output": teacher}}]
    found: Tensor = FTLoss()(*given)
    return found


@pytest.mark.parametrize(("s", "t"), SIZES)
def test_each_sample_has_the_formula_s_value_and_gradient(s: Shape, t: Shape) -> None:
    student, teacher = factors(2, *s), factors(2, *t, seed=1)
    reference = teacher.double().tolist()
    assert off(factor_distance(student, teacher), loop(student.double().tolist(), reference)) < 5e-6
    grad = slope(lambda x: factor_distance(x, teacher), student)
    assert (grad - differences(lambda x: loop(x, reference), student)).abs().max() < 1e-5 * max(1, grad.abs().max())


def test_torchdistill_agrees_on_the_factors_mean_square() -> None:
    """torchdistill, like the paper's equation 3, compares whole factors at unit length; RepDistiller, whose weight of
    200 this is, their mean over channels of squares, so that factors may differ in channels.
    """
    student, teacher = factors(8, 6, 4, 4), factors(8, 6, 4, 4, seed=1)
    squares = student.square().mean(dim=1, keepdim=True), teacher.square().mean(dim=1, keepdim=True)
    assert off(factor_distance(student, teacher).mean(), theirs(*squares)) < 2e-6
    assert off(factor_distance(student, teacher).mean(), theirs(student, teacher)) > 0.1


def test_paraphraser_and_translator_are_torchdistill_s() -> None:
    x = maps(4, 6, 5, 5)
    paraphraser, reference = Paraphraser(6, 3), Paraphraser4FactorTransfer(0.5, 6, uses_bn=False)
    reference.load_state_dict(paraphraser.state_dict())  # the same names
    assert off(paraphraser(x), reference(x)) < 1e-6
    assert paraphraser.encoder(x).shape == (4, 3, 5, 5)
    translator, model = Translator(6, 3), Translator4FactorTransfer(6, 3, uses_bn=True)
    model.load_state_dict(translator.state_dict())
    assert off(translator(x), model(x)) < 1e-6


def test_reconstruction_is_the_mean_square_of_each_sample() -> None:
    rebuilt, x = factors(3, 4, 2, 3), maps(3, 4, 2, 3, seed=1)
    pairs = zip(rebuilt.double().tolist(), x.double().tolist(), strict=True)
    assert off(squared_distance(rebuilt, x), [mean_square(a, b) for a, b in pairs]) < 1e-6


def test_equal_factors_cost_nothing_at_any_scale() -> None:
    x = factors(3, 4, 5, 5)
    assert factor_distance(x, x).tolist() == [0.0] * 3
    assert factor_distance(1e20 * x, x).max() < 1e-6
    assert factor_distance(-x, x).tolist() == [0.0] * 3


def test_limits() -> None:
    assert factor_distance(factors(1, 4, 5, 5), factors(1, 3, 2, 2)).shape == (1,)
    zeros, large = torch.zeros(2, 4, 3, 3), factors(2, 4, 3, 3, scale=1e30)
    for student, teacher in [(zeros, large), (large, zeros), (large, large.roll(1, 0)), (zeros, zeros)]:
        assert torch.isfinite(factor_distance(student, teacher)).all()
        assert torch.isfinite(slope(lambda x, t=teacher: factor_distance(x, t), student)).all()  # type: ignore[misc]
    half, other = factors(2, 4, 3, 3, scale=1e4).half(), factors(2, 4, 3, 3, seed=1, scale=1e4).half()
    assert factor_distance(half, other).dtype == torch.float32
    assert factor_distance(half, other).tolist() == factor_distance(half.float(), other.float()).tolist()
