"""Attention transfer against a loop over the formula, torchdistill, and its limits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdistill.losses.mid_level import ATLoss

from pipeline.training.methods.at import attention_transfer
from tests.pipeline.training.methods.feature_maps import (
    SIZES,
    Map,
    attend,
    differences,
    maps,
    mean_square,
    off,
    positive,
    slope,
    to_smaller,
)

Shape = tuple[int, int, int]


def loop(student: list[list[Map]], teacher: list[list[Map]], p: int = 2) -> list[float]:
    """Stages of samples."""
    values = []
    for b in range(len(student[0])):
        pairs = [to_smaller(s[b], t[b]) for s, t in zip(student, teacher, strict=True)]
        values.append(sum(mean_square(attend(s, p), attend(t, p)) for s, t in pairs))
    return values


def theirs(student: list[Tensor], teacher: list[Tensor], mode: str = "code") -> Tensor:
    pairs = {
        str(i): {"student": {"io": "output", "path": str(i)}, "teacher": {"io": "output", "path": str(i)}}
        for i in range(len(student))
    }
    given: list[Any] = [{str(i): {"output": x} for i, x in enumerate(side)} for side in (student, teacher)]
    found: Tensor = ATLoss(pairs, mode)(*given)
    return found


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize(("s", "t"), SIZES)
def test_each_sample_has_the_formula_s_value_and_gradient(s: Shape, t: Shape, p: int) -> None:
    student, teacher = [positive(2, *s), positive(2, *t, seed=2)], [positive(2, *t, seed=1), positive(2, *s, seed=3)]
    lists = [x.double().tolist() for x in student], [x.double().tolist() for x in teacher]
    assert off(attention_transfer(student, teacher, p), loop(*lists, p)) < 5e-6
    grad = slope(lambda x: attention_transfer([x], teacher[:1], p), student[0])
    assert off(grad, differences(lambda x: loop([x], lists[1][:1], p), student[0])) < 2e-5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_torchdistill_agrees(scale: float) -> None:
    student = [maps(8, 4, 4, 4, scale=scale), maps(8, 6, 2, 2, seed=1, scale=scale)]
    teacher = [maps(8, 9, 4, 4, seed=2), maps(8, 5, 2, 2, seed=3)]
    assert off(attention_transfer(student, teacher, 2).mean(), theirs(student, teacher)) < 2e-6


def test_torchdistill_s_other_mode_is_the_paper_s_equation_2() -> None:
    """The norm of the difference in place of the mean square: not what weight 1000 was published with."""
    student, teacher = maps(8, 4, 4, 4), maps(8, 9, 4, 4, seed=2)
    norms = (attention_transfer([student], [teacher], 2) * 16).sqrt()  # of 4 × 4 places
    assert off(norms.mean(), theirs([student], [teacher], "paper")) < 2e-6


def test_small_maps_have_unit_attention_too() -> None:
    """In torchdistill the bound of `normalize`, 1e-12, acts on squared activations below 1e-6, and shrinks them."""
    tiny, same = maps(4, 3, 4, 4, scale=1e-7), maps(4, 3, 4, 4)
    assert attention_transfer([tiny], [same], 2).max() < 1e-12
    assert theirs([tiny], [same]) > 1e-3


def test_the_same_attention_at_another_scale_costs_nothing() -> None:
    x = maps(4, 3, 5, 5)
    assert attention_transfer([x], [x], 2).tolist() == [0.0] * 4
    assert attention_transfer([7 * x], [x], 2).max() < 1e-13


@pytest.mark.parametrize("p", [1, 2])
def test_one_sample_of_zeros_and_one_of_large_values_have_finite_gradients(p: int) -> None:
    student = torch.stack([torch.zeros(3, 4, 4), maps(3, 4, 4, scale=1e30), maps(3, 4, 4, scale=1e-20)])
    teacher = torch.stack([maps(3, 4, 4, seed=1), maps(3, 4, 4, seed=2, scale=1e30), torch.zeros(3, 4, 4)])
    assert torch.isfinite(attention_transfer([student], [teacher], p)).all()
    assert torch.isfinite(slope(lambda x: attention_transfer([x], [teacher], p), student)).all()
    assert slope(lambda x: attention_transfer([x], [teacher], 2), torch.zeros(3, 3, 4, 4)).abs().max() == 0


def test_half_precision_maps_are_taken_to_float32_first() -> None:
    student, teacher = (100 * maps(4, 3, 4, 4)).half(), (1000 * maps(4, 5, 4, 4, seed=1)).half()
    found = attention_transfer([student], [teacher], 2)
    assert found.dtype == torch.float32
    assert off(found, attention_transfer([student.float()], [teacher.float()], 2)) == 0


def test_one_place_carries_no_attention() -> None:
    assert attention_transfer([maps(1, 3, 1, 1) + 1], [maps(1, 2, 8, 8, seed=1)], 2).tolist() == [0.0]
    assert math.isfinite(float(attention_transfer([maps(1, 3, 4, 4)], [maps(1, 2, 8, 8, seed=1)], 2)))
