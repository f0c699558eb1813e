"""ITRD's two terms against loops over features and pairs; torchdistill has no such method."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.config.methods.itrd import ItrdConfig
from pipeline.training.methods.itrd import Itrd, correlation, mutual
from tests.pipeline.training.methods.against import errors, finite, graded, random
from tests.pipeline.training.methods.stepping import batches, first, gradients, made, terms


def corr(student: Tensor, teacher: Tensor) -> Tensor:
    return correlation(student, teacher, 1.01)


def corr_loop(student: Tensor, teacher: Tensor) -> Tensor:
    n, d = student.shape

    def standard(f: Tensor, c: int) -> list[Tensor]:
        mean = sum(f[i, c] for i in range(n)) / n
        deviation = (sum((f[i, c] - mean) ** 2 for i in range(n)) / (n - 1)) ** 0.5
        return [(f[i, c] - mean) / deviation for i in range(n)]

    c = [sum(a * b for a, b in zip(standard(student, c), standard(teacher, c), strict=True)) / n for c in range(d)]
    return torch.log2(sum(abs(v - 1) ** (2 * 1.01) for v in c))


def mutual_loop(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)

    def gram(f: Tensor) -> list[list[Tensor]]:
        unit = [v / (v**2).sum().sqrt() for v in f]
        return [[(a * b).sum() for b in unit] for a in unit]

    g_s, g_t = gram(student), gram(teacher)
    g_st = [[a * b for a, b in zip(*rows, strict=True)] for rows in zip(g_s, g_t, strict=True)]

    def squared(g: list[list[Tensor]]) -> Tensor:
        trace = sum(g[i][i] for i in range(n))
        return sum((v / trace) ** 2 for row in g for v in row)

    return squared(g_s) - squared(g_st)


@pytest.mark.parametrize(("n", "d"), [(2, 3), (7, 5), (16, 24)])
def test_both_terms_are_what_their_formulas_say(n: int, d: int) -> None:
    s, t = random(n, d, seed=1) + 0.5, random(n, d, seed=2)
    if n > 2:  # the correlation of two samples is 1 or -1, and the loss flat
        assert max(errors(corr, corr_loop, s, t)) < 1e-5
    assert errors(corr, corr_loop, s, t).value < 1e-5
    assert max(errors(mutual, mutual_loop, s, random(n, d + 3, seed=3))) < 1e-5


def test_perfect_correlation_has_the_value_of_unbiased_variances() -> None:
    s = random(8, 5, seed=4)
    value, gradient = graded(corr, s, 3 * s + 1)
    assert value.item() == pytest.approx(math.log2(5) - 2 * 1.01 * math.log2(8), rel=1e-4)
    assert gradient.abs().max().item() < 1e-3


def test_samples_that_are_equal_or_orthogonal_in_both_networks_share_all_they_can() -> None:
    s = torch.eye(4)[[0, 0, 1, 2, 3, 3]]
    value, gradient = graded(mutual, s, 2 * s)
    assert value.item() == pytest.approx(0.0, abs=1e-7)
    assert torch.isfinite(gradient).all()
    assert mutual(random(5, 3), random(5, 3)).item() > 0, "0 is the lower bound, not what all equal features reach"


def test_a_constant_feature_correlates_with_nothing() -> None:
    """A ReLU that is dead in a batch: the public code divides by its deviation of 0."""
    s, t = random(6, 3, seed=5), random(6, 3, seed=6)
    dead = t.clone()
    dead[:, 1] = 0.0
    c = [torch.corrcoef(torch.stack([s[:, k], t[:, k]]))[0, 1].item() * 5 / 6 for k in (0, 2)]
    expected = math.log2(1 + sum((1 - v) ** 2.02 for v in c))
    assert finite(corr, s, dead).item() == pytest.approx(expected, rel=1e-4)
    finite(corr, s[:1].expand(6, 3), t)


def test_small_batches_equal_samples_and_large_or_half_precision_features() -> None:
    for loss in (corr, mutual):
        for n in (1, 2):
            finite(loss, random(n, 4), random(n, 4, seed=1))
        finite(loss, random(1, 4).expand(5, 4), random(5, 4, seed=1))
        finite(loss, torch.zeros(5, 4), random(5, 4, seed=1))
        finite(loss, random(6, 8, scale=1e4), random(6, 8, seed=1, scale=1e4))
        s, t = random(6, 8).half(), random(6, 8, seed=1).half()
        assert finite(loss, s, t) == finite(loss, s.float(), t.float())
    assert finite(corr, random(1, 4), random(1, 4, seed=1)).item() == pytest.approx(2.0), "nothing correlates"


def test_the_step_embeds_the_student_for_both_terms_unless_the_widths_are_the_teachers() -> None:
    step, batch = made(Itrd, ItrdConfig()), first(batches())
    plain, teacher = step.trainable_module(batch.x).feat_2d, step._teachers[0](batch.x).feat_2d
    embedded = step.own["embed"](plain)
    found = terms(step, batch)
    assert found["itrd_corr"].item() == corr(embedded, teacher).item()
    assert found["itrd_mutual"].item() == mutual(embedded, teacher).item()
    assert step.term_weights() == {"itrd_corr": 2.0, "itrd_mutual": 1.0}
    assert gradients(step, batch)["embed.weight"].abs().max() > 0
    step.same_width = True
    assert terms(step, batch)["itrd_mutual"].item() == mutual(plain, teacher).item()
