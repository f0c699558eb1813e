"""Similarity-preserving distillation against a loop over the formula, torchdistill, and its limits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchdistill.losses.mid_level import SPKDLoss

from pipeline.training.methods.sp import similarities, similarity_preserving
from tests.pipeline.training.methods.feature_maps import SIZES, Map, differences, flat, maps, normalise, off, slope

Shape = tuple[int, int, int]


def loop(student: list[Map], teacher: list[Map]) -> float:
    def rows(batch: list[Map]) -> list[list[float]]:
        images = [flat(x) for x in batch]
        return [normalise([sum(u * v for u, v in zip(a, b, strict=True)) for b in images]) for a in images]

    pairs = zip(flat(rows(student)), flat(rows(teacher)), strict=True)
    return sum((g - h) ** 2 for g, h in pairs) / len(student) ** 2


def theirs(student: Tensor, teacher: Tensor) -> Tensor:
    given: list[Any] = [{"map": {"output": x}} for x in (student, teacher)]
    found: Tensor = SPKDLoss("map", "map", "batchmean")(*given)
    return found


@pytest.mark.parametrize(("s", "t"), SIZES)
def test_value_and_gradient_are_the_formula_s(s: Shape, t: Shape) -> None:
    student, teacher = maps(4, *s) + 0.01, maps(4, *t, seed=1) + 0.01
    reference = teacher.double().tolist()
    assert off(similarity_preserving(student, teacher), loop(student.double().tolist(), reference)) < 2e-6
    grad = slope(lambda x: similarity_preserving(x, teacher), student)
    assert off(grad, differences(lambda x: loop(x, reference), student)) < 2e-5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_torchdistill_agrees_but_for_the_norm_of_its_rows(scale: float) -> None:
    """Its `normalize(G, 1)` passes 1 for the norm's order, not for the dimension: rows sum to 1, and the loss is about
    B times smaller than the paper's, whose equation 3 has the L2 norm.
    """
    student, teacher = maps(16, 6, 4, 4, scale=scale), maps(16, 9, 2, 2, seed=1)
    s, t = (g / g.sum(dim=1, keepdim=True) for g in (similarities(student), similarities(teacher)))
    assert off((s - t).square().mean(), theirs(student, teacher)) < 5e-6
    assert similarity_preserving(student, teacher) > 5 * theirs(student, teacher)


def test_similarities_survive_any_scale() -> None:
    """torchdistill's products of activations reach its bound of 1e-12 at 1e-9, and infinity at 1e20."""
    student, teacher = maps(16, 6, 4, 4), maps(16, 9, 2, 2, seed=1)
    for scale in (1e-9, 1e25):
        assert off(similarity_preserving(scale * student, teacher), similarity_preserving(student, teacher)) < 1e-5
        assert not off(theirs(scale * student, teacher), theirs(student, teacher)) < 1e-2


def test_alike_up_to_a_rotation_and_a_factor_costs_nothing() -> None:
    x = maps(6, 4, 3, 3)
    turned = torch.linalg.qr(torch.randn(36, 36, generator=torch.Generator().manual_seed(1)))[0]
    assert similarity_preserving(x, x) == 0
    assert similarity_preserving(3 * (x.flatten(1) @ turned).reshape(6, 36, 1, 1), x) < 1e-12


def test_a_single_image_has_nothing_to_be_similar_to() -> None:
    assert similarity_preserving(maps(1, 4, 3, 3), maps(1, 2, 5, 5, seed=1)) == 0


def test_images_of_zeros_have_rows_of_zeros_and_moderate_gradients() -> None:
    """With a bound of 1e-12 in the normalisation, one dead image would send a gradient of that order to all others."""
    student, teacher = maps(4, 3, 2, 2), maps(4, 5, 2, 2, seed=1)
    student[1] = 0
    assert similarities(student)[1].tolist() == [0.0] * 4
    assert slope(lambda x: similarity_preserving(x, teacher), student).abs().max() < 10
    nothing = torch.zeros(4, 3, 2, 2)
    assert torch.isfinite(slope(lambda x: similarity_preserving(x, teacher), nothing)).all()
    assert torch.isfinite(slope(lambda x: similarity_preserving(x, nothing), student)).all()


def test_large_values_have_finite_gradients() -> None:
    student, teacher = maps(4, 3, 2, 2, scale=1e30), maps(4, 5, 2, 2, seed=1, scale=1e30)
    assert torch.isfinite(similarity_preserving(student, teacher))
    assert torch.isfinite(slope(lambda x: similarity_preserving(x, teacher), student)).all()


def test_half_precision_maps_are_taken_to_float32_first() -> None:
    student, teacher = (100 * maps(4, 3, 4, 4)).half(), (1000 * maps(4, 5, 4, 4, seed=1)).half()
    found = similarity_preserving(student, teacher)
    assert found.dtype == torch.float32
    assert found == similarity_preserving(student.float(), teacher.float())
