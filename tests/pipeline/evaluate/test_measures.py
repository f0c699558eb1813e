"""Measures against scikit-learn, closed forms and numbers computed by hand."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics
from sklearn.calibration import calibration_curve

from pipeline.config import DatasetConfig
from pipeline.data.sources import ImageData, load
from pipeline.evaluate import measures
from pipeline.evaluate.measures import evaluate_model
from pipeline.evaluate.superclasses import CIFAR100, superclasses
from pipeline.training.evaluation import percent

N, IMAGES = 20, 400


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load(DatasetConfig())


@pytest.fixture(scope="module")
def answers() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that know something, and labels; the last class does not occur."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, N - 1, (IMAGES,), generator=generator)
    logits = 2 * torch.randn(IMAGES, N, generator=generator)
    logits[torch.arange(IMAGES), y] += 2.5
    return logits, y


@pytest.fixture(scope="module")
def found(data: ImageData, answers: tuple[torch.Tensor, torch.Tensor]) -> measures.Evaluation:
    return evaluate_model(data, *answers, "test")


def test_numbers_are_scikit_learns(found: measures.Evaluation, answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, y = (values.double().numpy() for values in answers)
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    every = range(N)
    assert found.metrics == {
        "test/acc": pytest.approx(100 * metrics.accuracy_score(y, scores.argmax(1))),
        "test/top5": pytest.approx(100 * metrics.top_k_accuracy_score(y, scores, k=5, labels=every)),
        "test/nll": pytest.approx(metrics.log_loss(y, p, labels=every), rel=1e-6),
        "test/ece": found.metrics["test/ece"],
    }
    np.testing.assert_allclose(found.probabilities, p, atol=1e-6)
    assert found.probabilities.dtype == np.float32
    assert found.correct.dtype == bool
    assert 100 * found.correct.mean() == pytest.approx(found.metrics["test/acc"])


def test_classes_are_counted_one_by_one(found: measures.Evaluation, data: ImageData) -> None:
    """Against loops; no image has the last class: it has no accuracy."""
    table = found.per_class
    assert list(table) == ["class", "images", "accuracy", "precision", "confidence"]
    assert tuple(table["class"]) == data.classes
    for k, row in table.iterrows():
        mine = [i for i in range(IMAGES) if found.labels[i] == k]
        called = [i for i in range(IMAGES) if found.predicted[i] == k]
        hits = len(set(mine) & set(called))
        assert row["images"] == len(mine)
        for name, group in (("accuracy", mine), ("precision", called)):
            expected = 100 * hits / len(group) if group else np.nan
            assert row[name] == pytest.approx(expected, nan_ok=True), name
        confidence = np.mean([found.confidence[i] for i in mine]) if mine else np.nan
        assert row["confidence"] == pytest.approx(confidence, nan_ok=True)
    assert np.isnan(table["accuracy"].iloc[-1])


# calibration -------------------------------------------------------------------------------------------------------


def test_bins_by_hand() -> None:
    """A bin holds its upper edge, and not its lower one."""
    confidence = np.array([0.1, 0.5, 0.51, 0.75, 0.76, 1.0], np.float32)
    correct = np.array([1, 0, 1, 1, 0, 1], bool)
    bins = measures.calibration(confidence, correct, bins=4)
    assert bins["images"].tolist() == [1, 1, 2, 2]
    assert bins["confidence"].tolist() == pytest.approx([0.1, 0.5, 0.63, 0.88])
    assert bins["accuracy"].tolist() == [1.0, 0.0, 1.0, 0.5]
    expected = (1 * 0.9 + 1 * 0.5 + 2 * 0.37 + 2 * 0.38) / 6
    assert measures.calibration_error(bins) == pytest.approx(expected)


def test_bins_are_scikit_learns(found: measures.Evaluation) -> None:
    accuracy, confidence = calibration_curve(found.correct, found.confidence, n_bins=measures.BINS)
    filled = found.bins[found.bins["images"] > 0]
    np.testing.assert_allclose(filled["accuracy"], accuracy)
    np.testing.assert_allclose(filled["confidence"], confidence, rtol=1e-6)
    assert found.bins["images"].sum() == IMAGES


@pytest.mark.parametrize(("confidence", "right"), [(0.95, 6), (0.3, 6), (0.6, 6), (1.0, 0)])
def test_one_confidence_for_all_errs_by_its_distance_from_the_accuracy(confidence: float, right: int) -> None:
    correct = np.arange(10) < right
    bins = measures.calibration(np.full(10, confidence, np.float32), correct)
    assert measures.calibration_error(bins) == pytest.approx(abs(confidence - right / 10), abs=1e-7)


def test_what_is_right_as_often_as_it_is_confident_has_no_calibration_error() -> None:
    """E|k/n - p| of k ~ B(n, p) is about sqrt(2 p (1 - p) / (pi n)): with p in 15 bins it is below 0.004 here."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.05, 1.0, 300_000).astype(np.float32)
    calibrated = measures.calibration(confidence, rng.uniform(size=confidence.shape) < confidence)
    assert measures.calibration_error(calibrated) < 0.004
    # squaring makes it right with probability c²: E[c - c²] over [a, 1] in closed form
    boastful = measures.calibration(confidence, rng.uniform(size=confidence.shape) < confidence**2)
    a = 0.05
    expected = ((1 - a**2) / 2 - (1 - a**3) / 3) / (1 - a)
    assert measures.calibration_error(boastful) == pytest.approx(expected, abs=0.004)


# super-classes, pairs, teachers ------------------------------------------------------------------------------------


def test_super_classes_are_twenty_times_five() -> None:
    names = [name for group in CIFAR100.values() for name in group.split()]
    assert len(CIFAR100) == 20
    assert len(set(names)) == 100
    assert all(len(group.split()) == 5 for group in CIFAR100.values())
    assert superclasses(["apple", "no class of CIFAR-100"]) is None
    assert superclasses(["apple", "bee"]) is None, "of each super-class one class"
    assert superclasses(["apple", "pear", "bee"]) == ("fruit_and_vegetables", "fruit_and_vegetables", "insects")


def test_the_sample_holds_the_first_class_of_each(data: ImageData) -> None:
    """sample/README.md says how its classes were chosen, from the original file's coarse labels."""
    assert sorted(min(group.split()) for group in CIFAR100.values()) == list(data.classes)


@pytest.mark.slow
def test_super_classes_are_the_original_files(cifar100: Path) -> None:
    folder = cifar100 / "cifar-100-python"
    meta = pickle.loads((folder / "meta").read_bytes())
    train = pickle.loads((folder / "train").read_bytes(), encoding="latin1")
    coarse = dict(zip(train["fine_labels"], train["coarse_labels"], strict=True))
    original = [meta["coarse_label_names"][coarse[fine]] for fine in range(100)]
    assert superclasses(meta["fine_label_names"]) == tuple(original)


def test_a_brother_counts_for_the_super_class() -> None:
    groups = ["tree", "tree", "fish"]
    labels, predicted = np.array([0, 1, 1, 2, 2]), np.array([1, 1, 2, 2, 0])
    assert measures.superclass_accuracy(labels, predicted, groups) == pytest.approx(60.0)
    evaluation = measures.Evaluation(
        "test", {}, labels, predicted, labels == predicted, np.ones((5, 3), np.float32), None, None
    )
    table = measures.by_superclass(pd.DataFrame({"superclass": groups}), evaluation)
    assert table.to_dict("list") == {
        "superclass": ["fish", "tree"],
        "images": [2, 3],
        "accuracy": [50.0, pytest.approx(100 / 3)],
        "superclass_accuracy": [50.0, pytest.approx(200 / 3)],
    }


def test_most_confused_pairs() -> None:
    counts = np.array([[5, 3, 0], [1, 9, 3], [0, 0, 0]])
    pairs = measures.confused_pairs(counts, ("a", "b", "c"), 10)
    assert pairs.to_dict("split")["data"] == [["a", "b", 3, 3 / 8], ["b", "c", 3, 3 / 13], ["b", "a", 1, 1 / 13]]
    assert len(measures.confused_pairs(counts, ("a", "b", "c"), 1)) == 1
    diagonal = measures.confusion(np.array([0, 0, 2]), np.array([0, 0, 2]), 3)  # one class does not occur
    assert diagonal.tolist() == [[2, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert measures.confused_pairs(diagonal, ("a", "b", "c"), 10).empty


def test_agreement_by_hand() -> None:
    """Four images, labels 0: the student says 0 1 1 2, one teacher 0 1 0 1, the other 0 1 2 1."""

    def logits(classes: list[int]) -> torch.Tensor:
        return torch.eye(3)[classes]

    found = measures.agreement(
        "test", logits([0, 1, 1, 2]), [logits([0, 1, 0, 1]), logits([0, 1, 2, 1])], torch.zeros(4, dtype=torch.long)
    )
    assert found == pytest.approx(
        {
            "test/teacher_0/acc": 50.0,
            "test/teacher_0/agreement": 0.5,
            "test/teacher_0/both_wrong": 0.5,
            "test/teacher_1/acc": 25.0,
            "test/teacher_1/agreement": 0.5,
            "test/teacher_1/both_wrong": 0.75,
            "test/teachers/agreement": 0.75,
            "test/teachers/both_wrong": 0.5,
        }
    )


def test_shapes_that_do_not_fit_are_refused(data: ImageData) -> None:
    for rows, columns, labels in ((3, N, 4), (3, N - 1, 3), (0, N, 0)):
        with pytest.raises(ValueError, match="logits"):
            evaluate_model(data, torch.zeros(rows, columns), torch.zeros(labels, dtype=torch.long), "test")


def test_an_accuracy_is_the_nearest_number_to_what_it_says() -> None:
    """194 of 500 is 38.8: the UI shows every digit of 38.800000000000004."""
    assert percent(torch.arange(500) < 194) == 38.8
