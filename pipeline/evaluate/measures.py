"""Measures of a classifier from its logits: pure functions of arrays.

Accuracies are in percent, rates and calibration errors fractions in [0, 1], likelihoods in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn import metrics
from torch import Tensor

from pipeline.data.sources import ImageData
from pipeline.evaluate.superclasses import superclasses
from pipeline.training import samples
from pipeline.training.evaluation import accuracy, percent

BINS = 15
"""Bins of the calibration error, as in Guo et al., «On calibration of modern neural networks», 2017."""

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A classifier on the n images of a split, in the split's order.

    Attributes:
        metrics: `<split>/acc`, `/top5`, `/nll`, `/ece`, and `/superclass_acc` where some
            classes share one of CIFAR-100's super-classes.
        correct: (n,) whether the top-1 class is the label.
        probabilities: (n, N).
        per_class: class, superclass (where there are any), images, accuracy, precision (in percent; NaN where there is
            no image, or no prediction), confidence (mean of the class's images).
        bins: of the calibration error: low, high, images, confidence, accuracy (fractions; NaN in empty bins).
    """

    split: str
    metrics: dict[str, float]
    labels: Ints
    predicted: Ints
    correct: Bools
    probabilities: Floats
    per_class: pd.DataFrame
    bins: pd.DataFrame

    @property
    def confidence(self) -> Floats:
        """(n,) probability of the predicted class."""
        return np.asarray(self.probabilities.max(axis=1))


def evaluate_model(data: ImageData, logits: Tensor, labels: Tensor, split: str) -> Evaluation:
    """All measures of logits (n, N) against labels (n,), n > 0, on a split of `data`, for metrics named `<split>/…`.

    Raises ValueError: shapes that do not fit, or no image.
    """
    if logits.shape != (len(labels), data.num_classes) or not len(labels):
        raise ValueError(f"logits {tuple(logits.shape)} for {len(labels)} labels of {data.num_classes} classes")
    logits, y = logits.detach().float().cpu(), labels.cpu()
    probabilities = F.softmax(logits, dim=1)
    truth, predicted = y.numpy(), logits.argmax(dim=1).numpy()
    correct = truth == predicted
    confidence = probabilities.max(dim=1).values.numpy()
    bins = calibration(confidence, correct)
    groups = superclasses(data.classes)
    found = {
        "acc": accuracy(logits, y),
        "top5": top_k(logits, y, 5),
        "nll": F.cross_entropy(logits.double(), y).item(),
        "ece": calibration_error(bins),
    }
    if groups is not None:
        found["superclass_acc"] = superclass_accuracy(truth, predicted, groups)
    return Evaluation(
        split=split,
        metrics={f"{split}/{name}": value for name, value in found.items()},
        labels=truth,
        predicted=predicted,
        correct=correct,
        probabilities=probabilities.numpy(),
        per_class=by_class(truth, predicted, confidence, data.classes, groups),
        bins=bins,
    )


def top_k(logits: Tensor, y: Tensor, k: int) -> float:
    """Share of images whose label is among the k highest logits, in percent; k is at most the number of classes."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return percent((best == y[:, None]).any(dim=1))


def calibration(confidence: Floats, correct: Bools, bins: int = BINS) -> pd.DataFrame:
    """Mean confidence and accuracy in equal bins ((m-1)/M, m/M] of confidence: the reliability diagram's numbers."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    which = np.digitize(confidence, edges[1:-1], right=True)
    counts = np.bincount(which, minlength=bins)
    sums = [np.bincount(which, weights=np.asarray(v, np.float64), minlength=bins) for v in (confidence, correct)]
    with np.errstate(invalid="ignore"):
        mean_confidence, mean_correct = (total / counts for total in sums)
    return pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "images": counts,
            "confidence": mean_confidence,
            "accuracy": mean_correct,
        }
    )


def calibration_error(bins: pd.DataFrame) -> float:
    """ECE = sum_m n_m/n |accuracy_m - confidence_m|, a fraction."""
    gaps = (bins["accuracy"] - bins["confidence"]).abs()
    return float((gaps * bins["images"]).sum() / bins["images"].sum())  # empty bins are NaN and are left out


def superclass_accuracy(labels: Ints, predicted: Ints, groups: Sequence[str]) -> float:
    """Share of images predicted as some class of their label's super-class, in percent."""
    names = np.asarray(groups)
    return 100.0 * float(metrics.accuracy_score(names[labels], names[predicted]))


def by_class(
    labels: Ints, predicted: Ints, confidence: Floats, classes: Sequence[str], groups: Sequence[str] | None
) -> pd.DataFrame:
    """`Evaluation.per_class`."""
    precision, recall, _, images = metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(len(classes)), zero_division=np.nan
    )
    means = pd.Series(np.asarray(confidence, np.float64)).groupby(labels).mean().reindex(range(len(classes)))
    columns = {"class": classes} | ({"superclass": groups} if groups is not None else {})
    numbers = {"images": images, "accuracy": 100.0 * recall, "precision": 100.0 * precision, "confidence": means}
    return pd.DataFrame(columns | {name: np.asarray(values) for name, values in numbers.items()})


def by_superclass(per_class: pd.DataFrame, evaluation: Evaluation) -> pd.DataFrame:
    """superclass, images, and in percent: accuracy (of the class), superclass_accuracy (of the super-class)."""
    groups = per_class["superclass"].to_numpy()
    right = groups[evaluation.labels] == groups[evaluation.predicted]
    table = pd.DataFrame(
        {"superclass": groups[evaluation.labels], "accuracy": evaluation.correct, "superclass_accuracy": right}
    )
    found = 100.0 * table.groupby("superclass").mean()
    found.insert(0, "images", table.groupby("superclass").size())
    return found.reset_index()


def confusion(labels: Ints, predicted: Ints, n: int) -> Ints:
    """Counts (N, N): rows are labels, columns predictions."""
    return np.asarray(metrics.confusion_matrix(labels, predicted, labels=range(n)))


def confused_pairs(counts: Ints, classes: Sequence[str], most: int) -> pd.DataFrame:
    """The pairs of different classes that are confused most: label, predicted, images, share of the label's images.

    Ties go to the earlier label, then to the earlier prediction; pairs that are never confused are left out.
    """
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    rows, columns = np.unravel_index(order, wrong.shape)
    kept = wrong[rows, columns] > 0
    rows, columns = rows[kept], columns[kept]
    names = np.asarray(classes, dtype=object)
    images = wrong[rows, columns]
    share = images / counts[rows].sum(axis=1)
    return pd.DataFrame({"label": names[rows], "predicted": names[columns], "images": images, "share": share})


def agreement(split: str, logits: Tensor, teachers: Sequence[Tensor], labels: Tensor) -> dict[str, float]:
    """How teachers (n, N) agree with each other and with what is evaluated (n, N).

    Returns:
        `<split>/teacher_<k>/acc` in percent, and rates: `/agreement`, on which its top-1 is the evaluated one's, and
        `/both_wrong`, on which both miss the label; `<split>/teachers/agreement`, on which all teachers' top-1 is one,
        and `<split>/teachers/both_wrong`, on which all miss the label.
    """
    found: dict[str, float] = {}
    for k, teacher in enumerate(teachers):
        name = f"{split}/teacher_{k}"
        differ, both_wrong = samples.disagreement([logits, teacher], labels)
        found[f"{name}/acc"] = accuracy(teacher, labels)
        found |= {f"{name}/agreement": 1.0 - differ.item(), f"{name}/both_wrong": both_wrong.item()}
    if teachers:
        differ, both_wrong = samples.disagreement(list(teachers), labels)
        found[f"{split}/teachers/agreement"] = 1.0 - differ.item()
        found[f"{split}/teachers/both_wrong"] = both_wrong.item()
    return found
