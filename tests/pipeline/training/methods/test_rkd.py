"""RKD against loops over pairs and triplets, and torchdistill."""

import pytest
import torch
from torch import Tensor
from torchdistill.losses.mid_level import RKDLoss

from pipeline.config.methods.rkd import RkdConfig
from pipeline.training.methods.rkd import Rkd, rkd
from tests.pipeline.training.methods.against import errors, finite, graded, random
from tests.pipeline.training.methods.stepping import batches, first, gradients, made, terms


def total(student: Tensor, teacher: Tensor) -> Tensor:
    """The published sum of both terms."""
    terms = rkd(student, teacher, 25.0, 50.0)
    return 25 * terms["rkd_distance"] + 50 * terms["rkd_angle"]


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    return rkd(student, teacher, 1.0, 0.0)["rkd_distance"]


def angle(student: Tensor, teacher: Tensor) -> Tensor:
    return rkd(student, teacher, 0.0, 1.0)["rkd_angle"]


def huber(x: Tensor) -> Tensor:
    return x**2 / 2 if abs(x) < 1 else abs(x) - 0.5


def distance_loop(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]

    def over_mean(f: Tensor) -> list[Tensor]:
        lengths = [((f[i] - f[j]) ** 2).sum().sqrt() for i, j in pairs]
        return [length / (sum(lengths) / len(pairs)) for length in lengths]

    found = [huber(s - t) for s, t in zip(over_mean(student), over_mean(teacher), strict=True)]
    return torch.stack(found).sum() / n**2


def angle_loop(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)

    def cosine(f: Tensor, i: int, j: int, k: int) -> Tensor:
        a, b = f[i] - f[j], f[k] - f[j]
        return (a * b).sum() / (a**2).sum().sqrt() / (b**2).sum().sqrt()

    triplets = [(i, j, k) for i in range(n) for j in range(n) for k in range(n) if j not in (i, k)]
    found = [huber(cosine(student, *at) - cosine(teacher, *at)) for at in triplets]
    return torch.stack(found).sum() / n**3


def total_loop(student: Tensor, teacher: Tensor) -> Tensor:
    return 25 * distance_loop(student, teacher) + 50 * angle_loop(student, teacher)


def published(student: Tensor, teacher: Tensor) -> Tensor:
    """torchdistill's. The same quantity: it takes distances from a Gram matrix, hence float64 here."""
    loss = RKDLoss("s", "t", 25.0, 50.0, "mean")
    return loss({"s": {"output": student}}, {"t": {"output": teacher}})


@pytest.mark.parametrize("n", [3, 6])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_distances_and_angles_are_those_of_all_pairs_and_triplets(n: int, offset: float) -> None:
    """Also for features far from the origin, where a Gram matrix would round."""
    s, t = random(n, 5, seed=1, scale=2.0) + offset, random(n, 8, seed=2)
    for loss, loop in ((distance, distance_loop), (angle, angle_loop), (total, total_loop)):
        assert max(errors(loss, loop, s, t)) < 2e-5


def test_the_published_weights_are_of_the_means_that_torchdistill_takes() -> None:
    assert max(errors(total, published, random(16, 64, seed=3), random(16, 32, seed=4))) < 1e-5


def test_congruent_features_cost_nothing() -> None:
    """Equal, moved, scaled or turned: relations stay."""
    s = random(8, 6, seed=5)
    turn = torch.linalg.qr(random(6, 6, seed=6))[0]
    for t in (s, s + 3.0, s * 0.01, s @ turn):
        value, gradient = graded(total, s, t)
        assert value.item() == pytest.approx(0.0, abs=1e-10)
        assert gradient.abs().max().item() < 1e-5


def test_one_sample_has_no_relations_and_two_have_one_distance() -> None:
    for n in (1, 2):
        assert finite(total, random(n, 4), random(n, 4, seed=1)).item() == pytest.approx(0.0, abs=1e-12)


def test_coinciding_samples_have_distance_0_and_no_gradient_of_infinity() -> None:
    s, t = random(5, 4, seed=7), random(5, 4, seed=8)
    s[3], t[1] = s[0], t[2]
    assert finite(total, s, t) > 0
    assert finite(total, s[:1].expand(5, 4), t) > 0
    assert finite(total, s, t[:1].expand(5, 4)) > 0


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_small_large_and_half_precision_features(scale: float) -> None:
    finite(total, random(6, 8, scale=scale), random(6, 8, seed=1, scale=scale))
    s, t = random(6, 8).half(), random(6, 8, seed=1).half()
    assert finite(total, s, t) == finite(total, s.float(), t.float())


def test_the_step_relates_pooled_features_and_leaves_out_what_weighs_nothing() -> None:
    step, batch = made(Rkd, RkdConfig()), first(batches())
    student, teacher = step.trainable_module(batch.x).feat_2d, step._teachers[0](batch.x).feat_2d
    found, expected = terms(step, batch), rkd(student, teacher, 1.0, 1.0)
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    assert step.term_weights() == {"rkd_distance": 25.0, "rkd_angle": 50.0}
    without = made(Rkd, RkdConfig(kd_alpha=0.5, angle_alpha=0.0))
    assert terms(without, batch).keys() == without.term_weights().keys() == {"rkd_distance"}
    assert without.term_weights() == {"rkd_distance": 12.5}
    assert "net.conv.weight" in gradients(without, batch)
    with pytest.raises(ValueError, match="leave nothing to distil: set one of them above 0"):
        RkdConfig(distance_alpha=0.0, angle_alpha=0.0)
