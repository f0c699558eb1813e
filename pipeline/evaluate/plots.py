"""Pictures of an evaluation: the reliability diagram, and the images of the pairs confused most."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.utils import make_grid

from pipeline.data.image_files import Images
from pipeline.evaluate.measures import Evaluation
from pipeline.reporting import figures

COLUMNS = 10
"""Images of a pair on the sheet."""


def reliability(evaluation: Evaluation, path: Path) -> None:
    """Accuracy over confidence, bin by bin, with the gaps that the calibration error sums; below, shares of images."""
    bins = evaluation.bins
    middle, width = (bins["low"] + bins["high"]) / 2, float(bins["high"][0] - bins["low"][0])
    made, (upper, lower) = figures.figure(2, 1, 5.5, 6.5, sharex=True, height_ratios=(3, 1))
    filled = bins["images"] > 0
    accuracy, confidence = bins["accuracy"][filled], bins["confidence"][filled]
    upper.bar(middle[filled], accuracy, width, color="tab:blue", edgecolor="white", label="accuracy")
    upper.bar(
        middle[filled],
        confidence - accuracy,
        width,
        bottom=accuracy,
        color="tab:red",
        alpha=0.35,
        edgecolor="white",
        label="gap to confidence",
    )
    upper.plot((0, 1), (0, 1), color="black", ls="--", lw=1, label="calibrated")
    found = evaluation.metrics
    ece, acc = found[f"{evaluation.split}/ece"], found[f"{evaluation.split}/acc"]
    title = f"{evaluation.split}: ECE {ece:.4f}, top-1 {acc:.2f} %"
    upper.set(title=title, ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    upper.legend(loc="upper left", fontsize=8)
    lower.bar(middle, bins["images"] / bins["images"].sum(), width, color="grey", edgecolor="white")
    lower.axvline(float(np.mean(evaluation.confidence)), color="tab:red", lw=1, label="mean confidence")
    lower.axvline(acc / 100, color="tab:blue", lw=1, label="accuracy")
    lower.set(xlabel="confidence", ylabel="share of images")
    lower.legend(loc="upper left", fontsize=8)
    figures.save(made, path)


def confused_sheet(
    pairs: pd.DataFrame,
    evaluation: Evaluation,
    images: Images,
    indices: Tensor,
    classes: tuple[str, ...],
    path: Path,
) -> None:
    """A row for each pair: its label, what was predicted, and the images that were predicted with most confidence.

    Args:
        pairs: as `measures.confused_pairs` gives them, at least one.
        images: uint8 (m, C, H, W), of which `indices` (n,) were evaluated, in the evaluation's order.
    """
    named = zip(pairs["label"], pairs["predicted"], strict=True)
    chosen = [_examples(evaluation, classes.index(a), classes.index(b)) for a, b in named]
    rows, columns = len(chosen), max(len(row) for row in chosen)
    size = images.shape[-1]
    blank = torch.full((rows, columns, *images.shape[1:]), 255, dtype=torch.uint8)
    for row, found in enumerate(chosen):
        blank[row, : len(found)] = images[indices[torch.from_numpy(found)]]
    grid = make_grid(blank.flatten(0, 1), nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy()
    made, axis = figures.figure(1, 1, 3 + 0.75 * columns, 0.6 + 0.75 * rows)
    axis.imshow(grid, interpolation="nearest")
    words = [f"{a} → {b}\n{count} images ({share:.0%})" for a, b, count, share in pairs.itertuples(index=False)]
    axis.set_yticks([2 + row * (size + 2) + size / 2 for row in range(rows)], words, fontsize=8)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(f"{evaluation.split}: most-confused pairs, label → predicted (of the label's images)", fontsize=9)
    figures.save(made, path)


def _examples(evaluation: Evaluation, label: int, predicted: int) -> NDArray[np.int64]:
    """Positions of a pair's images, the most confident first."""
    found = np.flatnonzero((evaluation.labels == label) & (evaluation.predicted == predicted))
    return found[np.argsort(-evaluation.confidence[found], kind="stable")][:COLUMNS]
