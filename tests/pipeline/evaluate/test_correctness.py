"""Files of an evaluation: correctness is read back as it was written; pictures are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import DatasetConfig
from pipeline.data.sources import ImageData, load
from pipeline.distill import results
from pipeline.evaluate import correctness, measures, plots

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load(DatasetConfig())


@pytest.fixture(scope="module")
def evaluation(data: ImageData) -> measures.Evaluation:
    logits = 3 * torch.eye(20)[data.test_y] + torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    return measures.evaluate_model(data, logits, data.test_y, "test")


def test_correctness_is_read_back(evaluation: measures.Evaluation, data: ImageData, tmp_path: Path) -> None:
    index = np.arange(500)[::-1].copy()
    correctness.write(evaluation, index, data.digest, data.classes, tmp_path / correctness.FILE)
    plain = pd.read_parquet(tmp_path / correctness.FILE)  # with no code of ours
    assert list(plain) == ["index", "label", "predicted", "correct", "confidence"]
    assert [str(kind) for kind in plain.dtypes] == ["int64", "int32", "int32", "bool", "float32"]
    record = json.loads(pq.read_schema(tmp_path / correctness.FILE).metadata[b"asib"])
    assert record == {"data_digest": data.digest, "split": "test", "classes": list(data.classes)}
    np.testing.assert_array_equal(plain["index"], index)
    np.testing.assert_array_equal(plain["correct"], evaluation.correct)
    np.testing.assert_array_equal(plain["label"], data.test_y)
    np.testing.assert_array_equal(plain["confidence"], evaluation.probabilities.max(axis=1))


def test_pictures_are_drawn(evaluation: measures.Evaluation, data: ImageData, tmp_path: Path) -> None:
    counts = measures.confusion(evaluation.labels, evaluation.predicted, 20)
    pairs = measures.confused_pairs(counts, data.classes, 5)
    every = torch.arange(len(data.test_y))
    plots.reliability(evaluation, tmp_path / "reliability.png")
    results.draw_confusion(counts, data.classes, tmp_path / "confusion.png")
    plots.confused_sheet(pairs, evaluation, data.test_x, every, data.classes, tmp_path / "pairs.png")
    for name in ("reliability.png", "confusion.png", "pairs.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(SIGNATURE)
        assert len(content) > 5000


def test_the_sheet_shows_the_pairs_images(data: ImageData) -> None:
    """Of a pair those images, the most confident prediction first."""
    labels, predicted = np.array([0, 0, 1, 0, 0]), np.array([1, 0, 1, 1, 1])
    p = np.zeros((5, 2), np.float32)
    p[np.arange(5), predicted] = [0.6, 0.9, 0.9, 0.8, 0.7]
    seen = measures.Evaluation("test", {}, labels, predicted, labels == predicted, p, None, None)
    assert plots._examples(seen, 0, 1).tolist() == [3, 4, 0]
