"""Files of an evaluation: they are read back as they were written, by this project and as MLflow reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.config import DatasetConfig
from pipeline.data import ImageData, load
from pipeline.distill import results
from pipeline.evaluate import measures, plots, tables

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
    tables.write_correctness(evaluation, index, data.digest, data.classes, tmp_path / tables.CORRECTNESS)
    plain = pd.read_parquet(tmp_path / tables.CORRECTNESS)  # with no code of ours
    assert list(plain) == ["index", "label", "predicted", "correct", "confidence"]
    assert [str(kind) for kind in plain.dtypes] == ["int64", "int32", "int32", "bool", "float32"]
    back = tables.read_correctness(tmp_path / tables.CORRECTNESS)
    assert (back.data_digest, back.split, back.classes) == (data.digest, "test", data.classes)
    assert back.table.equals(plain)
    np.testing.assert_array_equal(plain["index"], index)
    np.testing.assert_array_equal(plain["correct"], evaluation.correct)
    np.testing.assert_array_equal(plain["label"], data.test_y)
    np.testing.assert_array_equal(plain["confidence"], evaluation.probabilities.max(axis=1))


def test_tables_are_what_mlflow_shows(tmp_path: Path, sqlite_uri: str) -> None:
    """`mlflow.log_table` writes the same bytes and the same tag; numbers that are none are null."""
    from mlflow.tracking import MlflowClient

    table = pd.DataFrame({"class": ["ash", "fir"], "images": [3, 0], "accuracy": [100 / 3, np.nan]})
    tables.write_table(table, tmp_path / "per_class.json")
    client = MlflowClient(sqlite_uri)
    run = client.create_run("0").info.run_id
    client.log_table(run, table, "per_class.json")
    theirs = Path(client.download_artifacts(run, "per_class.json", str(tmp_path / "store")))
    assert (tmp_path / "per_class.json").read_bytes() == theirs.read_bytes()
    assert json.loads(theirs.read_text())["data"][1] == ["fir", 0, None]
    for name, value in tables.logged_tables(["per_class.json"]).items():
        assert client.get_run(run).data.tags[name] == value


def test_confusion_is_read_back_with_its_names(tmp_path: Path) -> None:
    tables.write_confusion(np.array([[2, 1], [0, 3]]), ("ash", "fir"), tmp_path / "confusion.csv")
    back = pd.read_csv(tmp_path / "confusion.csv", index_col="label")
    assert back.to_dict("index") == {"ash": {"ash": 2, "fir": 1}, "fir": {"ash": 0, "fir": 3}}


def test_class_names_are_no_formulas(tmp_path: Path) -> None:
    tables.write_confusion(np.eye(2, dtype=np.int64), ("=HYPERLINK(0)", "fir"), tmp_path / "confusion.csv")
    assert (tmp_path / "confusion.csv").read_text() == "label,'=HYPERLINK(0),fir\n'=HYPERLINK(0),1,0\nfir,0,1\n"


def test_pictures_are_drawn(evaluation: measures.Evaluation, data: ImageData, tmp_path: Path) -> None:
    counts = measures.confusion(evaluation.labels, evaluation.predicted, 20)
    pairs = measures.confused_pairs(counts, data.classes, 5)
    every = torch.arange(len(data.test_y))
    plots.reliability(evaluation, tmp_path / "reliability.png")
    results.draw_confusion(counts, data.classes, tmp_path / "confusion.png")
    assert plots.confused_sheet(pairs, evaluation, data.test_x, every, data.classes, tmp_path / "pairs.png")
    for name in ("reliability.png", "confusion.png", "pairs.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(SIGNATURE)
        assert len(content) > 5000
    none = tmp_path / "none.png"
    assert not plots.confused_sheet(pairs.head(0), evaluation, data.test_x, every, data.classes, none)
    assert not none.exists()


def test_the_sheet_shows_the_pairs_images(data: ImageData) -> None:
    """Of a pair those images, the most confident prediction first."""
    labels, predicted = np.array([0, 0, 1, 0, 0]), np.array([1, 0, 1, 1, 1])
    p = np.zeros((5, 2), np.float32)
    p[np.arange(5), predicted] = [0.6, 0.9, 0.9, 0.8, 0.7]
    seen = measures.Evaluation("test", {}, labels, predicted, labels == predicted, p, None, None)
    assert plots._examples(seen, 0, 1).tolist() == [3, 4, 0]
