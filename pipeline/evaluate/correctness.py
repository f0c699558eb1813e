"""`correctness.parquet`: a model's predictions for a split, image by image, for paired comparisons."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.evaluate.measures import Evaluation

FILE = "correctness.parquet"


def write(
    evaluation: Evaluation, index: NDArray[np.int64], data_digest: str, classes: tuple[str, ...], path: Path
) -> None:
    """A row for each image: its position among the data set's test (or training) images, its label, the prediction
    (both as numbers of classes), whether they agree, and the prediction's probability. The file's
    metadata, under "asib", holds everything else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "index": np.asarray(index, np.int64),
        "label": evaluation.labels.astype(np.int32),
        "predicted": evaluation.predicted.astype(np.int32),
        "correct": evaluation.correct,
        "confidence": evaluation.confidence.astype(np.float32),
    }
    record = {"data_digest": data_digest, "split": evaluation.split, "classes": list(classes)}
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata({b"asib": json.dumps(record).encode()}), path)
