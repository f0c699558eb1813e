"""Neuron selectivity transfer against a loop over the formula, its form with Gram matrices, and its limits.

torchdistill has no such loss.
"""

import pytest
import torch
from torch import Tensor

from pipeline.training.methods.nst import selectivity
from tests.pipeline.training.methods.feature_maps import (
    SIZES,
    Map,
    differences,
    flat,
    maps,
    normalise,
    off,
    positive,
    slope,
    to_smaller,
)

Shape = tuple[int, int, int]


def loop(student: list[list[Map]], teacher: list[list[Map]]) -> list[float]:
    """Stages of samples."""

    def kernel(a: list[list[float]], b: list[list[float]]) -> float:
        return sum(sum(u * v for u, v in zip(x, y, strict=True)) ** 2 for x in a for y in b) / (len(a) * len(b))

    values = [0.0] * len(student[0])
    for stage_s, stage_t in zip(student, teacher, strict=True):
        for b, pair in enumerate(zip(stage_s, stage_t, strict=True)):
            s, t = ([normalise(flat(channel)) for channel in x] for x in to_smaller(*pair))
            values[b] += kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
    return values


@pytest.mark.parametrize(("s", "t"), SIZES)
def test_each_sample_has_the_formula_s_value_and_gradient(s: Shape, t: Shape) -> None:
    student, teacher = [positive(2, *s), maps(2, *t, seed=2)], [maps(2, *t, seed=1), maps(2, *s, seed=3)]
    lists = [x.double().tolist() for x in student], [x.double().tolist() for x in teacher]
    found = selectivity(student, teacher)
    assert found.tolist() == pytest.approx(loop(*lists), rel=2e-5, abs=5e-7)  # differences of terms near 1
    grad = slope(lambda x: selectivity([x], teacher[:1]), student[0])
    expected = differences(lambda x: loop([x], lists[1][:1]), student[0])
    assert (grad - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))


def test_it_is_the_distance_of_mean_outer_products() -> None:
    """Huang and Wang 2017, section 4.3: with d = 2 and c = 0 the discrepancy matches Gram matrices of places."""

    def gram(x: Tensor) -> Tensor:
        rows = torch.nn.functional.normalize(x.double().flatten(2), dim=2)
        return rows.transpose(1, 2) @ rows / rows.shape[1]

    student, teacher = maps(8, 6, 4, 4), maps(8, 10, 4, 4, seed=1)
    expected = (gram(student) - gram(teacher)).square().sum(dim=(1, 2))
    assert off(selectivity([student], [teacher]), expected) < 1e-5


def test_the_same_channels_in_another_order_cost_nothing() -> None:
    x = maps(4, 6, 5, 5)
    assert selectivity([x], [x]).abs().max() < 1e-6
    assert selectivity([3 * x[:, [5, 2, 0, 1, 3, 4]]], [x]).abs().max() < 1e-6
    assert selectivity([torch.cat([x, x], dim=1)], [x]).abs().max() < 1e-6


def test_dead_channels_stay_dead_and_have_finite_gradients() -> None:
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 4, 4, seed=1)
    student[0, 1], teacher[1] = 0, 0
    grad = slope(lambda x: selectivity([x], [teacher]), student)
    assert torch.isfinite(grad).all()
    assert grad[0, 1].abs().max() == 0
    assert slope(lambda x: selectivity([x], [teacher]), torch.zeros(2, 3, 4, 4)).abs().max() == 0


def test_large_and_small_values_are_finite() -> None:
    student, teacher = maps(2, 3, 4, 4, scale=1e30), maps(2, 5, 4, 4, seed=1, scale=1e-30)
    assert torch.isfinite(selectivity([student], [teacher])).all()
    assert torch.isfinite(slope(lambda x: selectivity([x], [teacher]), student)).all()
    assert torch.isfinite(slope(lambda x: selectivity([x], [student]), teacher)).all()


def test_half_precision_maps_are_taken_to_float32_first() -> None:
    student, teacher = (100 * maps(4, 3, 4, 4)).half(), (1000 * maps(4, 5, 2, 2, seed=1)).half()
    found = selectivity([student], [teacher])
    assert found.dtype == torch.float32
    assert found.tolist() == selectivity([student.float()], [teacher.float()]).tolist()


def test_one_image_alone_has_the_value_it_has_in_a_batch() -> None:
    student, teacher = maps(3, 4, 4, 4), maps(3, 5, 2, 2, seed=1)
    assert off(selectivity([student[1:2]], [teacher[1:2]]), selectivity([student], [teacher])[1:2]) < 1e-5
