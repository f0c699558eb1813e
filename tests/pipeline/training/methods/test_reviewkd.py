"""Knowledge review against loops over the formulas, torchdistill, and its limits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchdistill.losses.mid_level import HierarchicalContextLoss
from torchdistill.models.wrapper import AttentionBasedFusion

from pipeline.training.methods.reviewkd import Fusion, Review, hierarchical_context, review
from tests.pipeline.training.methods.feature_maps import Map, differences, maps, mean_square, off, pool, slope

Shape = tuple[int, int, int]
SHAPES = [(3, 8, 8), (4, 4, 4), (6, 2, 2), (6, 1, 1)], [(5, 8, 8), (7, 4, 4), (2, 2, 2), (9, 1, 1)]


def loop(fused: list[Map], target: list[Map]) -> list[float]:
    values = []
    for a, b in zip(fused, target, strict=True):
        terms, weights = [mean_square(a, b)], [1.0]
        for side in (4, 2, 1):
            if side < len(a[0]):
                weights.append(weights[-1] / 2)
                terms.append(mean_square(pool(a, side, side), pool(b, side, side)))
        values.append(sum(w * t for w, t in zip(weights, terms, strict=True)) / sum(weights))
    return values


def theirs(fused: Tensor, target: Tensor) -> Tensor:
    loss = HierarchicalContextLoss("abf", "output", "layer", "output")
    given: list[Any] = [{"abf": {"output": (fused, None)}}, {"layer": {"output": target}}]
    found: Tensor = loss(*given)
    return found


@pytest.mark.parametrize("shape", [(2, 7, 7), (2, 5, 6), (3, 4, 4), (3, 3, 2), (4, 2, 2), (8, 1, 1)])
def test_each_sample_has_the_pyramid_s_value_and_gradient(shape: Shape) -> None:
    fused, target = maps(2, *shape), maps(2, *shape, seed=1)
    reference = target.double().tolist()
    assert off(hierarchical_context(fused, target), loop(fused.double().tolist(), reference)) < 1e-6
    grad = slope(lambda x: hierarchical_context(x, target), fused)
    assert off(grad, differences(lambda x: loop(x, reference), fused)) < 2e-6


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8, 16])
def test_torchdistill_s_loss_agrees(side: int) -> None:
    fused, target = maps(8, 5, side, side), maps(8, 5, side, side, seed=1)
    assert off(hierarchical_context(fused, target).mean(), theirs(fused, target)) < 1e-6


@pytest.mark.parametrize("last", [True, False])
def test_torchdistill_s_fusion_agrees(last: bool) -> None:
    ours, reference = Fusion((3, 4, 4), (5, 4, 4), 6, last), AttentionBasedFusion(3, 6, 5, uses_attention=not last)
    names = {"inward": "conv1", "outward": "conv2", "attention": "attention_conv"}
    state = {".".join([names[k.split(".")[0]], *k.split(".")[1:]]): v for k, v in ours.state_dict().items()}
    reference.load_state_dict(state)
    x, later = maps(8, 3, 4, 4), None if last else maps(8, 6, 2, 2, seed=1)
    for mine, other in zip(ours(x, later), reference(x, later, 4), strict=True):
        assert off(mine, other) < 1e-6


def test_the_fused_map_and_what_is_passed_on_take_the_teacher_s_size() -> None:
    """As in the repository of the paper; torchdistill needs students with the teacher's sizes."""
    fusion = Fusion((3, 4, 4), (5, 7, 6), 6, last=False)
    out, passed = fusion(maps(2, 3, 4, 4), maps(2, 6, 2, 2, seed=1))
    assert out.shape == (2, 5, 7, 6)
    assert passed.shape == (2, 6, 7, 6)
    x = fusion.inward(maps(2, 3, 4, 4))
    later = F.interpolate(maps(2, 6, 2, 2, seed=1), size=(4, 4), mode="nearest")
    share = torch.sigmoid(F.conv2d(torch.cat([x, later], 1), fusion.attention[0].weight, fusion.attention[0].bias))  # type: ignore[index,arg-type]
    expected = share[:, :1] * x + share[:, 1:] * later
    torch.testing.assert_close(passed, F.interpolate(expected, size=(7, 6), mode="nearest"))


def test_stages_are_reviewed_from_the_last_to_the_first() -> None:
    """Each stage's output depends on its own map and on those of later stages, on none of earlier ones."""
    net = Review(*SHAPES, width=512).eval()
    assert net.stages[0].inward[0].out_channels == 6, "no wider than the student's last stage"  # type: ignore[index,union-attr]
    student = [maps(2, *shape, seed=i).requires_grad_() for i, shape in enumerate(SHAPES[0])]
    fused = net(student)
    assert [tuple(x.shape[1:]) for x in fused] == SHAPES[1]
    for i, out in enumerate(fused):
        grads = torch.autograd.grad(out.sum(), student, retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.abs().max() > 0) for g in grads] == [j >= i for j in range(4)]


def test_all_parameters_are_trained() -> None:
    net = Review(*SHAPES, width=512)
    student = [maps(4, *shape, seed=i) for i, shape in enumerate(SHAPES[0])]
    teacher = [maps(4, *shape, seed=9 + i) for i, shape in enumerate(SHAPES[1])]
    found = review(net(student), teacher)
    assert found.shape == (4,)
    found.mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_stages_are_summed() -> None:
    fused, teacher = [maps(3, *s, seed=i) for i, s in enumerate(SHAPES[1])], [maps(3, *s, seed=9) for s in SHAPES[1]]
    lists = [x.double().tolist() for x in fused], [x.double().tolist() for x in teacher]
    expected = [sum(stages) for stages in zip(*(loop(a, b) for a, b in zip(*lists, strict=True)), strict=True)]
    assert off(review(fused, teacher), expected) < 1e-6


def test_limits() -> None:
    x = maps(1, 4, 8, 8)
    assert hierarchical_context(x, x).tolist() == [0.0]
    large, half = maps(2, 4, 8, 8, scale=1e15), maps(2, 4, 8, 8, scale=1e3).half()
    assert torch.isfinite(slope(lambda x: hierarchical_context(x, -large), large)).all()
    assert torch.isfinite(hierarchical_context(large, -large)).all()
    assert torch.isfinite(hierarchical_context(half, -half)).all()
    assert hierarchical_context(half, -half).dtype == torch.float32
    net = Review(*SHAPES, width=512)
    one = net([maps(1, *shape, seed=i) for i, shape in enumerate(SHAPES[0])])
    assert all(torch.isfinite(y).all() for y in one), "the pooled stage of one image has one value per channel"
    zeros = net([torch.zeros(2, *shape) for shape in SHAPES[0]])
    sum(y.square().sum() for y in zeros).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
