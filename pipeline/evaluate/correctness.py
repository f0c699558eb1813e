"""`correctness.parquet`: a model's predictions for a split, image by image, for paired comparisons."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.evaluate.measures import Evaluation

FILE = "correctness.parquet"
COLUMNS = ("index", "label", "predicted", "correct", "confidence")
METADATA = b"asib"


@dataclass(frozen=True, eq=False)
class Correctness:
    """A model's predictions for a split, image by image.

    Attributes:
        table: one row for each image; `COLUMNS`: its position among the data set's test (or training) images, label and
            prediction as numbers of classes, whether they agree, and the prediction's probability.
        data_digest: of the data set.
        split: test, train or val.
        classes: their names.
    """

    table: pd.DataFrame
    data_digest: str
    split: str
    classes: tuple[str, ...]


def write(
    evaluation: Evaluation, index: NDArray[np.int64], data_digest: str, classes: tuple[str, ...], path: Path
) -> None:
    """`Correctness` as parquet; what is not in the columns is in the file's metadata, under "asib"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = (
        np.asarray(index, np.int64),
        evaluation.labels.astype(np.int32),
        evaluation.predicted.astype(np.int32),
        evaluation.correct,
        evaluation.confidence.astype(np.float32),
    )
    record = {"data_digest": data_digest, "split": evaluation.split, "classes": list(classes)}
    table = pa.table(dict(zip(COLUMNS, columns, strict=True)))
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(record).encode()}), path)


def read(path: Path) -> Correctness:
    """What `write` wrote."""
    table = pq.read_table(path)
    record = json.loads(table.schema.metadata[METADATA])
    return Correctness(table.to_pandas(), record["data_digest"], record["split"], tuple(record["classes"]))
