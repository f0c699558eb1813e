"""PKT against a loop over pairs, and torchdistill."""

import pytest
import torch
from torch import Tensor
from torchdistill.losses.mid_level import PKTLoss

from pipeline.config.methods.pkt import PktConfig
from pipeline.training.methods.pkt import Pkt, affinities, pkt
from tests.pipeline.training.methods.against import errors, finite, graded, random
from tests.pipeline.training.methods.stepping import batches, first, gradients, made, terms


def loop(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)

    def rows(f: Tensor) -> list[list[Tensor]]:
        unit = [v / (v**2).sum().sqrt() for v in f]
        near = [[((a * b).sum() + 1) / 2 for b in unit] for a in unit]
        return [[v / sum(row) for v in row] for row in near]

    p, q = rows(teacher), rows(student)
    return torch.stack([p[i][j] * (p[i][j] / q[i][j]).log() for i in range(n) for j in range(n)]).sum() / n**2


def published(student: Tensor, teacher: Tensor) -> Tensor:
    """torchdistill's. It adds 1e-7 to norms and to both probabilities of the logarithm, where ours has a lower bound:

    a difference of 1e-7 B for each probability of about 1/B.
    """
    return PKTLoss("s", "output", "t", "output")({"s": {"output": student}}, {"t": {"output": teacher}})


@pytest.mark.parametrize(("n", "d"), [(2, 3), (6, 5), (24, 16)])
def test_affinities_are_compared_pair_by_pair(n: int, d: int) -> None:
    assert max(errors(pkt, loop, random(n, d, seed=1), random(n, d + 2, seed=2))) < 1e-5


def test_near_the_teacher_the_loss_is_no_rounding() -> None:
    """sum p log(p/q) itself keeps no digit here in float32."""
    t = random(16, 32, seed=3)
    assert max(errors(pkt, loop, t + random(16, 32, seed=4, scale=1e-3), t)) < 2e-3


def test_it_is_torchdistills() -> None:
    assert max(errors(pkt, published, random(16, 64, seed=5), random(16, 32, seed=6))) < 2e-5


def test_rows_sum_to_1_and_equal_features_cost_nothing() -> None:
    s = random(7, 5, seed=7)
    assert affinities(s).sum(dim=1).tolist() == pytest.approx([1.0] * 7)
    value, gradient = graded(pkt, s, 3 * s)  # the direction counts, not the length
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert gradient.abs().max().item() < 1e-7


def test_one_sample_resembles_itself_only() -> None:
    assert finite(pkt, random(1, 4), random(1, 4, seed=1)).item() == 0.0


def test_opposite_equal_and_zero_features_are_finite() -> None:
    s = random(4, 5, seed=8)
    s[1], s[2] = -s[0], s[0]
    t = random(4, 5, seed=9)
    assert finite(pkt, s, t) > 0
    assert finite(pkt, t, s) > 0
    assert finite(pkt, torch.zeros(4, 5), t) > 0


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_small_large_and_half_precision_features(scale: float) -> None:
    finite(pkt, random(6, 8, scale=scale), random(6, 8, seed=1, scale=scale))
    s, t = random(6, 8).half(), random(6, 8, seed=1).half()
    assert finite(pkt, s, t) == finite(pkt, s.float(), t.float())


def test_the_step_compares_pooled_features() -> None:
    step, batch = made(Pkt, PktConfig()), first(batches())
    expected = pkt(step.trainable_module(batch.x).feat_2d, step._teachers[0](batch.x).feat_2d)
    assert terms(step, batch)["pkt"].item() == expected.item()
    assert step.term_weights() == {"pkt": 30_000.0}
    assert gradients(step, batch)["net.conv.weight"].abs().max() > 0
