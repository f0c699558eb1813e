"""Targets are probability vectors: averages of teachers, the synergy's, mixtures of both."""

import pytest
import torch
from torch import Tensor

from models.features import FeatureNet
from pipeline.data.batches import EvalBatches
from pipeline.training import evaluation
from pipeline.training.methods.asib import targets
from tests.pipeline.training.builders import TinyNet, image_data, softmax


def logits(seed: int, n: int = 5) -> Tensor:
    return 4 * torch.randn((6, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", [None, [0.7, 0.3], [2.0, 6.0], [0.0, 1.0]])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_the_average_is_of_weighted_logits_with_weights_that_sum_to_one(
    weights: list[float] | None, tau: float
) -> None:
    a, b = logits(0), logits(1)
    w = weights or [0.5, 0.5]
    share = [v / sum(w) for v in w]
    expected = [
        softmax([share[0] * p + share[1] * q for p, q in zip(r, s, strict=True)], tau)
        for r, s in zip(a.tolist(), b.tolist(), strict=True)
    ]
    found = targets.averaged([a, b], weights, tau)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_a_single_teacher_is_its_own_average() -> None:
    torch.testing.assert_close(targets.averaged([logits(2)], None, 2.0), (logits(2) / 2).softmax(1))


def test_half_precision_teachers_are_averaged_in_float32() -> None:
    a, b = logits(0).half(), logits(1).half()
    assert torch.equal(targets.averaged([a, b], None, 4.0), targets.averaged([a.float(), b.float()], None, 4.0))


def test_the_synergy_has_its_own_temperature() -> None:
    expected = [softmax(r, 3.0) for r in logits(3).tolist()]
    torch.testing.assert_close(targets.synergy(logits(3), 3.0), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_probabilities_are_mixed_and_not_logits() -> None:
    p, q = logits(4).softmax(1), logits(5).softmax(1)
    expected = [
        [0.75 * a + 0.25 * b for a, b in zip(r, s, strict=True)] for r, s in zip(p.tolist(), q.tolist(), strict=True)
    ]
    found = targets.mixed(p, q, 0.25)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.ones(6))
    of_logits = (0.75 * logits(4) + 0.25 * logits(5)).softmax(1)
    assert (found - of_logits).abs().max() > 0.05


def test_disagreement_counts_unequal_top_1_and_samples_that_all_miss() -> None:
    eye = torch.eye(3)
    first, second = eye[[0, 1, 2, 0, 1]], eye[[0, 2, 2, 1, 1]]
    y = torch.tensor([0, 0, 1, 0, 1])
    differ, both_wrong = targets.disagreement([first, second], y)
    assert differ.item() == pytest.approx(2 / 5)  # samples 1 and 3
    assert both_wrong.item() == pytest.approx(2 / 5)  # samples 1 and 2


def test_evaluation_is_in_eval_mode_in_float32_and_restores_the_mode() -> None:
    data = image_data(20)
    net = FeatureNet(TinyNet(4, drop=0.9)).train()
    batches = EvalBatches(data.train_x, data.train_y, torch.arange(3, 17), 5, data.mean, data.std, "cpu")
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluation.outputs(net, batches)
    assert net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
    net.eval()
    with torch.no_grad():
        expected = net((data.train_x[3:17] / 255 - mean) / std)
    assert found.logits.dtype == torch.float32
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.feat_2d, expected.feat_2d, rtol=1e-4, atol=1e-5)


def test_an_exception_in_evaluation_is_not_swallowed_and_the_mode_is_restored() -> None:
    data = image_data(8)
    net = FeatureNet(TinyNet(4)).train()
    batches = EvalBatches(data.train_x[:, :2], data.train_y, None, 5, (0.5, 0.5), (1.0, 1.0), "cpu")
    with pytest.raises(RuntimeError, match="channels"):
        evaluation.outputs(net, batches)
    assert net.training


def test_accuracy_is_in_percent_and_nll_in_nats() -> None:
    scores = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 1.0]])
    assert evaluation.accuracy(scores, torch.tensor([0, 1, 1])) == pytest.approx(200 / 3)
    assert evaluation.nll(torch.zeros(3, 4), torch.tensor([0, 1, 2])) == pytest.approx(1.3862944)
