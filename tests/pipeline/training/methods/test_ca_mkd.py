"""CA-MKD's two terms and their weights against loops over samples and teachers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.methods.ca_mkd import CaMkdConfig
from pipeline.errors import UserError
from pipeline.training.losses import kd
from pipeline.training.methods.ca_mkd import (
    CaMkd,
    Projector,
    classify,
    confidence_weights,
    weighted_distance,
    weighted_kd,
)
from tests.pipeline.training.builders import ce, kl, net, softmax
from tests.pipeline.training.methods.against import errors, finite, random
from tests.pipeline.training.methods.stepping import batches, first, gradients, made, outputs, terms

B, N, TAU = 6, 5, 4.0
Y = torch.arange(B) % N


def cross_entropies(logits: Tensor) -> Tensor:
    """(K, B) of logits (K, B, N)."""
    return torch.stack([F.cross_entropy(t, Y, reduction="none") for t in logits])


def weights_loop(logits: Tensor) -> list[list[float]]:
    """For each sample, each teacher's weight; straight from the paper."""
    found = []
    for i in range(logits.shape[1]):
        losses = [ce(t[i].tolist(), int(Y[i])) for t in logits]
        share = softmax(losses)
        found.append([(1 - v) / (len(share) - 1) for v in share])
    return found


@pytest.mark.parametrize("k", [2, 3, 5])
def test_weights_are_the_papers_and_sum_to_1(k: int) -> None:
    logits = random(k, B, N, seed=1, scale=3.0)
    found = confidence_weights(cross_entropies(logits))
    for column, expected in zip(found.T.tolist(), weights_loop(logits), strict=True):
        assert column == pytest.approx(expected, abs=1e-6)
    assert found.sum(dim=0).tolist() == pytest.approx([1.0] * B)


def test_one_teacher_has_the_weight_1_and_equal_ones_share_alike() -> None:
    one = random(1, B, N, seed=2)
    assert torch.equal(confidence_weights(cross_entropies(one)), torch.ones(1, B))
    torch.testing.assert_close(confidence_weights(cross_entropies(one.expand(4, B, N))), torch.full((4, B), 0.25))


def test_a_teacher_that_knows_the_label_outweighs_one_that_does_not() -> None:
    sure = 20.0 * F.one_hot(Y, N).float()
    found = confidence_weights(cross_entropies(torch.stack([sure, -sure, -sure])))
    assert (found[0] > 0.49).all()
    assert (found[0] > found[1]).all()


def kd_loop(student: Tensor, teachers: Tensor, weights: Tensor) -> Tensor:
    losses = []
    for i in range(len(student)):
        log_q = student[i] / TAU - (student[i] / TAU).exp().sum().log()
        loss = torch.zeros((), dtype=torch.float64)
        for k in range(len(teachers)):
            p = torch.tensor(softmax(teachers[k, i].tolist(), TAU), dtype=torch.float64)
            loss = loss + weights[k, i] * TAU**2 * sum(p[c] * (p[c].log() - log_q[c]) for c in range(N))
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.parametrize("k", [1, 3])
def test_each_samples_divergences_are_weighted(k: int) -> None:
    s, teachers = random(B, N, seed=3, scale=2.0), random(k, B, N, seed=4, scale=3.0)
    weights = confidence_weights(cross_entropies(teachers))
    assert max(errors(lambda *a: weighted_kd(*a, TAU), kd_loop, s, teachers, weights)) < 2e-5
    for i, value in enumerate(weighted_kd(s, teachers, weights, TAU).tolist()):
        p = [softmax(t[i].tolist(), TAU) for t in teachers]
        expected = sum(w * kl(q, s[i].tolist(), TAU) for w, q in zip(weights[:, i].tolist(), p, strict=True))
        assert value == pytest.approx(expected, rel=1e-4)


def distance_loop(student: Tensor, teachers: Tensor, weights: Tensor) -> Tensor:
    return torch.stack(
        [
            sum(
                weights[k, i] * sum((a - b) ** 2 for a, b in zip(student[i].flatten(), t[i].flatten(), strict=True))
                for k, t in enumerate(teachers)
            )
            / student[0].numel()
            for i in range(len(student))
        ]
    )


def test_each_samples_distances_are_weighted() -> None:
    s, teachers, weights = random(B, 3, 2, 2, seed=5), random(2, B, 3, 2, 2, seed=6), torch.rand(2, B)

    def ours(student: Tensor, maps: Tensor, w: Tensor) -> Tensor:
        return weighted_distance([student, student], maps.unbind(), w)

    assert max(errors(ours, distance_loop, s, teachers, weights)) < 1e-5


def test_with_one_teacher_it_is_kd_and_the_mean_squared_error() -> None:
    s, t, one = random(B, N, seed=7), random(1, B, N, seed=8), torch.ones(1, B)
    assert torch.equal(weighted_kd(s, t, one, TAU), kd(s, t[0], TAU))
    f, g = random(B, 3, 4, 4, seed=9), random(B, 3, 4, 4, seed=10)
    torch.testing.assert_close(weighted_distance([f], [g], one).mean(), F.mse_loss(f, g))


def test_equal_outputs_cost_nothing() -> None:
    s, f = random(B, N, seed=11), random(B, 3, 4, 4, seed=12)
    weights = torch.full((2, B), 0.5)
    assert weighted_kd(s, torch.stack([s, s]), weights, TAU).tolist() == pytest.approx([0.0] * B, abs=1e-5)
    assert torch.equal(weighted_distance([f, f], [f, f], weights), torch.zeros(B))


def test_one_sample_two_classes_and_large_or_half_precision_numbers() -> None:
    for scale, n in ((1.0, 1), (1e4, 4)):
        s, t = random(n, 2, scale=scale), random(3, n, 2, seed=1, scale=scale)
        weights = confidence_weights(torch.stack([F.cross_entropy(u, Y[:n] % 2, reduction="none") for u in t]))
        assert weights.sum(dim=0).tolist() == pytest.approx([1.0] * n)
        finite(lambda a, t=t, w=weights: weighted_kd(a, t, w, TAU), s)
        f = random(n, 3, 2, 2, seed=2, scale=scale)
        finite(lambda a, f=f, w=weights: weighted_distance([a] * 3, [f] * 3, w), f + scale)
    s, t, w = random(4, 3).half(), random(2, 4, 3, seed=1).half(), torch.full((2, 4), 0.5)
    assert torch.equal(finite(lambda a: weighted_kd(a, t, w, TAU), s), weighted_kd(s.float(), t.float(), w, TAU))


@pytest.mark.parametrize(
    ("student", "teacher"), [((6, 8, 8), (5, 4, 4)), ((6, 4, 4), (9, 8, 8)), ((3, 7, 7), (2, 7, 7))]
)
def test_a_projector_gives_the_teachers_shape(student: tuple[int, int, int], teacher: tuple[int, int, int]) -> None:
    found = Projector(student, teacher)(random(2, *student))
    assert found.shape == (2, *teacher)
    assert (found >= 0).all()


def test_a_teachers_classifier_reads_the_map_averaged() -> None:
    teacher = net(5, 100).eval()
    with torch.no_grad():
        out = teacher(random(3, 3, 8, 8))
    torch.testing.assert_close(classify(teacher, out.feat_4d), out.logits)


# the step ------------------------------------------------------------------------------------------------------------


def parts(step: Any, batch: Any) -> tuple[Any, list[Any], list[Tensor]]:
    """Student's and teachers' outputs, and the student's last map as each projector has it."""
    student = outputs(step.trainable_module, batch.x)
    taught = [outputs(t, batch.x) for t in step._teachers]
    return student, taught, [step.own[f"projector_{k}"](student.maps[-1]) for k in range(len(taught))]


@pytest.mark.parametrize("standardise", [False, True])
def test_the_step_weighs_logits_and_maps_by_cross_entropy(standardise: bool) -> None:
    step, batch = made(CaMkd, CaMkdConfig(standardise=standardise), 3), first(batches())
    student, taught, projected = parts(step, batch)
    found = terms(step, batch)

    def weights(logits: list[Tensor]) -> Tensor:
        return confidence_weights(torch.stack([F.cross_entropy(v, batch.y, reduction="none") for v in logits]))

    torch.testing.assert_close(step.weighed, weights([t.logits for t in taught]).T)
    by_map = weights([t.net.fc(p.mean((2, 3))) for t, p in zip(step._teachers, projected, strict=True)])
    distances = torch.stack([(p - t.maps[-1]).square().mean((1, 2, 3)) for p, t in zip(projected, taught, strict=True)])
    torch.testing.assert_close(found["ca_mkd_feat"], (by_map * distances).sum(0))
    targets = torch.stack([step.compared(t.logits) for t in taught])
    expected = weighted_kd(step.compared(student.logits), targets, weights([t.logits for t in taught]), 4.0)
    torch.testing.assert_close(found["ca_mkd_kd"], expected)
    assert step.term_weights() == {"ca_mkd_kd": 1.0, "ca_mkd_feat": 50.0}
    assert gradients(step, batch)["projector_2.block.0.weight"].abs().max() > 0


def test_one_teacher_is_distilled_as_by_kd_and_one_hint() -> None:
    step, batch = made(CaMkd, CaMkdConfig(), 1), first(batches())
    student, (teacher,), (projected,) = parts(step, batch)
    found = terms(step, batch)
    torch.testing.assert_close(found["ca_mkd_kd"], kd(student.logits, teacher.logits, 4.0))
    torch.testing.assert_close(found["ca_mkd_feat"].mean(), F.mse_loss(projected, teacher.maps[-1]))


@pytest.mark.parametrize("teachers", [1, 3])
def test_as_published_both_terms_are_divided_by_k_once_more(teachers: int) -> None:
    batch = first(batches())
    formula, code = (terms(made(CaMkd, CaMkdConfig(as_published=p), teachers), batch) for p in (False, True))
    for name, value in formula.items():
        torch.testing.assert_close(code[name], value / teachers)


def test_weights_are_held_fixed_unless_as_published() -> None:
    """sum w d with w fixed has the gradient of w d; the public code's has that of d w as well."""
    batch = first(batches())
    for published in (False, True):
        step = made(CaMkd, CaMkdConfig(as_published=published), 2)
        _, taught, projected = parts(step, batch)
        logits = [t.net.fc(p.mean((2, 3))) for t, p in zip(step._teachers, projected, strict=True)]
        by_map = confidence_weights(torch.stack([F.cross_entropy(v, batch.y, reduction="none") for v in logits]))
        by_map = by_map / 2 if published else by_map.detach()
        distance = weighted_distance(projected, [t.maps[-1] for t in taught], by_map).mean()
        weight = step.own["projector_0"].block[0].weight
        (expected,) = torch.autograd.grad(distance, weight)
        (found,) = torch.autograd.grad(terms(step, batch)["ca_mkd_feat"].mean(), weight)
        torch.testing.assert_close(found, expected)


def test_mixed_samples_are_weighed_by_both_labels() -> None:
    step, batch = made(CaMkd, CaMkdConfig(), 2), first(batches())
    mixed = batch._replace(y_b=(batch.y + 1) % 4, lam=torch.tensor(0.3))
    logits = [t(batch.x).logits for t in step._teachers]
    losses = [
        0.3 * F.cross_entropy(v, batch.y, reduction="none") + 0.7 * F.cross_entropy(v, mixed.y_b, reduction="none")
        for v in logits
    ]
    torch.testing.assert_close(CaMkd._weights(logits, mixed), confidence_weights(torch.stack(losses)))
    assert torch.isfinite(terms(step, mixed)["ca_mkd_kd"]).all()


def test_a_teacher_whose_classifier_reads_something_else_is_refused() -> None:
    with pytest.raises(UserError, match=r"last map to its classifier, which reads 5 features, not the map's 9"):
        made(CaMkd, CaMkdConfig(), 1, channels=9)
