"""CA-MKD's two terms and their weights against loops over samples and teachers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.losses import kd
from pipeline.training.methods.ca_mkd import (
    Projector,
    classify,
    confidence_weights,
    weighted_distance,
    weighted_kd,
)
from tests.pipeline.training.builders import ce, kl, net, softmax
from tests.pipeline.training.methods.against import errors, finite, random

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
