"""Targets are probability vectors: averages of teachers, the synergy's, mixtures of both."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.features import FeatureNet
from pipeline.data.batches import EvalBatches
from pipeline.training import evaluation, samples
from pipeline.training.methods.asib import targets
from tests.pipeline.training.builders import TinyNet, image_data, softmax


def logits(n: int = 6, classes: int = 5, seed: int = 0, scale: float = 4.0) -> Tensor:
    return scale * torch.randn((n, classes), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", [None, [0.7, 0.3], [2.0, 6.0], [0.0, 1.0]])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_the_average_is_of_weighted_logits_with_weights_that_sum_to_one(
    weights: list[float] | None, tau: float
) -> None:
    a, b = logits(seed=0), logits(seed=1)
    w = weights or [0.5, 0.5]
    share = [v / sum(w) for v in w]
    expected = [
        softmax([share[0] * p + share[1] * q for p, q in zip(r, s, strict=True)], tau)
        for r, s in zip(a.tolist(), b.tolist(), strict=True)
    ]
    found = samples.averaged([a, b], weights, tau)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_half_precision_teachers_are_averaged_in_float32() -> None:
    a, b = logits(seed=0).half(), logits(seed=1).half()
    assert torch.equal(samples.averaged([a, b], None, 4.0), samples.averaged([a.float(), b.float()], None, 4.0))


def test_the_synergy_has_its_own_temperature() -> None:
    expected = [softmax(r, 3.0) for r in logits(seed=3).tolist()]
    torch.testing.assert_close(targets.synergy(logits(seed=3), 3.0), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_disagreement_counts_unequal_top_1_and_samples_that_all_miss() -> None:
    eye = torch.eye(3)
    first, second = eye[[0, 1, 2, 0, 1]], eye[[0, 2, 2, 1, 1]]
    y = torch.tensor([0, 0, 1, 0, 1])
    differ, both_wrong = samples.disagreement([first, second], y)
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
    assert isinstance(data.train_x, Tensor)
    batches = EvalBatches(data.train_x[:, :2], data.train_y, None, 5, (0.5, 0.5), (1.0, 1.0), "cpu")
    with pytest.raises(RuntimeError, match="channels"):
        evaluation.outputs(net, batches)
    assert net.training


def test_accuracy_is_in_percent_and_nll_in_nats() -> None:
    scores = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 1.0]])
    assert evaluation.accuracy(scores, torch.tensor([0, 1, 1])) == pytest.approx(200 / 3)
    assert evaluation.nll(torch.zeros(3, 4), torch.tensor([0, 1, 2])) == pytest.approx(1.3862944)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_confident_teachers_weigh_more(k: int, tau: float) -> None:
    teachers = [logits(5, 4, seed=i, scale=1.0 + i) for i in range(k)]
    found = targets.confidence_weighted(teachers, tau)
    for i in range(5):
        rows = [softmax(t[i].tolist(), tau) for t in teachers]
        w = [max(r) for r in rows]
        expected = [sum(a * r[c] for a, r in zip(w, rows, strict=True)) / sum(w) for c in range(4)]
        assert found[i].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("tau", [1.0, 4.0, 1e5])
def test_identical_teachers_make_every_average_equal(n: int, tau: float) -> None:
    t = logits(6, n)
    torch.testing.assert_close(targets.confidence_weighted([t, t, t], tau), samples.averaged([t, t, t], None, tau))
    torch.testing.assert_close(samples.averaged([t, t], [0.7, 0.3], tau), (t / tau).softmax(1))
    if tau == 1e5:
        torch.testing.assert_close(samples.averaged([t, t], None, tau), torch.full((6, n), 1 / n), rtol=1e-3, atol=0)


def test_targets_of_huge_logits_are_probabilities() -> None:
    t, other = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    for p in (samples.averaged([t, other], None, 1.0), targets.confidence_weighted([t, other], 1.0)):
        assert torch.isfinite(p).all()
        assert p.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("known", "threshold", "average", "expected"),
    [
        (60.0, 60.0, 80.0, 0.8),  # at the threshold
        (80.0, 60.0, 80.0, 0.25),  # at the averaged teachers
        (70.0, 60.0, 80.0, 0.525),  # half way
        (99.0, 60.0, 80.0, 0.25),  # beyond
        (50.0, 60.0, 80.0, 0.8),  # below (the gate would be closed): clamped
        (81.0, 80.0, 80.0, 0.25),  # nothing in between: straight to the lower share
        (90.0, 85.0, 80.0, 0.25),
        (40.0, 0.0, 80.0, 0.525),
    ],
)
def test_the_share_of_the_averaged_teachers_falls_with_the_synergys_accuracy(
    known: float, threshold: float, average: float, expected: float
) -> None:
    assert samples.averaged_share(known, threshold, average, least=0.25, most=0.8) == pytest.approx(expected)


def test_auto_min_picks_by_the_label_and_the_guard_closes_where_neither_knows_it() -> None:
    syn = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]])
    avg = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.3, 0.6], [0.3, 0.1, 0.6], [0.4, 0.3, 0.3]])
    y = torch.tensor([0, 2, 1, 0])
    picked, guard = targets.best_of(syn, avg, y)
    lower = [-math.log(s[k]) <= -math.log(a[k]) for s, a, k in zip(syn.tolist(), avg.tolist(), y.tolist(), strict=True)]
    assert picked.tolist() == lower == [True, False, True, True]
    assert guard.tolist() == [True, True, False, True]


def test_the_uncertainty_weight_goes_from_one_to_one_minus_u() -> None:
    p = torch.cat([torch.eye(4)[:1], torch.full((1, 4), 0.25), logits(3, 4).softmax(1)])
    found = targets.uncertainty_weight(p, 0.6).tolist()
    expected = [1 - 0.6 * -sum(v * math.log(v) for v in row if v > 0) / math.log(4) for row in p.tolist()]
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[:2] == pytest.approx([1.0, 0.4])
    assert targets.uncertainty_weight(torch.tensor([[0.5, 0.5]]), 1.0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "expected"), [("pred", [True, True, False, False]), ("both_wrong", [False, True, False, True])]
)
def test_disagreement(mode: str, expected: list[bool]) -> None:
    eye = torch.eye(4)
    # labels 0 1 2 3: one is right; all differ and miss; all right; all agree and miss
    teachers = [eye[[0, 0, 2, 1]], eye[[1, 2, 2, 1]], eye[[0, 3, 2, 1]]]
    assert samples.disagrees(teachers, torch.arange(4), mode).tolist() == expected
    if mode == "pred":
        differ, both = samples.disagreement(teachers, torch.arange(4))
        assert (differ.item(), both.item()) == (0.5, 0.5)


@given(
    st.lists(st.floats(0, 1, width=16), min_size=1, max_size=12),
    st.floats(0, 1),
    st.integers(0, 100),
    st.integers(0, 100),
)
@settings(max_examples=150, deadline=None)
def test_the_gate_takes_the_least_sure_within_its_bounds(
    confidence: list[float], threshold: float, one: int, other: int
) -> None:
    least, most = sorted((one, other))
    chosen = samples.select(torch.tensor(confidence), threshold, least / 100, most / 100).tolist()
    size = len(confidence)
    at_least = -(-least * size // 100)
    at_most = max(at_least, most * size // 100)
    below = sum(torch.tensor(confidence) < threshold)
    assert len(chosen) == min(max(int(below), at_least), at_most)
    assert chosen == sorted(set(chosen))
    ranked = sorted(range(size), key=lambda i: (confidence[i], i))  # ties: the earlier row
    assert set(chosen) == set(ranked[: len(chosen)])


def test_the_gate_may_choose_nobody_or_everybody() -> None:
    sure = torch.full((8,), 0.99)
    assert samples.select(sure, 0.85, 0.0, 0.5).tolist() == []
    assert samples.select(sure, 0.85, 0.25, 0.5).tolist() == [0, 1]
    assert samples.select(1 - sure, 0.85, 0.0, 0.5).tolist() == [0, 1, 2, 3]
    assert samples.select(1 - sure, 0.85, 0.0, 1.0).tolist() == list(range(8))
    assert samples.select(sure[:1], 0.85, 0.1, 0.5).tolist() == [0], "a batch of one"


@pytest.mark.parametrize("percent", range(101))
def test_ratios_round_as_decimals_do(percent: int) -> None:
    """0.07 * 100 is 7.000000000000001, and 0.29 * 100 is 28.999999999999996."""
    assert samples.gate_size(0, 100, percent / 100, 1.0) == percent
    assert samples.gate_size(100, 100, 0.0, percent / 100) == percent
