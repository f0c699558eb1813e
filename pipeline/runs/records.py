"""Runs as comparisons read them, from their folders on this machine or from the tracking server."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from pipeline.compose.settings import read_data
from pipeline.config.words import written
from pipeline.errors import UserError
from pipeline.files import read_state, warn_once
from pipeline.journal import damage, decode_number, read_entries, read_header

PREDICTIONS = "predictions.npz"
ALONE = "alone"
"""How tables name the student that learns from no teacher."""


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        id: MLflow run id; offline the journal's.
        config: dotted key -> value, written as in an override.
        metrics: the last value of each.
        histories: (epoch, value) of each metric that was asked for.
        correct: (n,) whether each test image was classified correctly; None for runs that stored no predictions.
    """

    id: str
    name: str
    status: str
    tags: Mapping[str, str]
    config: Mapping[str, str]
    metrics: Mapping[str, float]
    histories: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    classes: int | None = None
    correct: NDArray[np.bool_] | None = None

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @property
    def rung(self) -> str | None:
        return self.tags.get("asib.rung")

    @property
    def label(self) -> str:
        """What it is a row of: a ladder's rung, a table's row, the student alone, or its method; empty: unknown."""
        named = self.rung or self.tags.get("asib.row")
        return named or (ALONE if self.tags.get("asib.teachers") == "none" else self.config.get("method.name", ""))

    @property
    def digest(self) -> str:
        return self.tags.get("asib.data_digest", "")


def from_folder(folder: Path, histories: Sequence[str] | None = None, predictions: bool = True) -> Record:
    """Read the run in `folder` from its journal; damaged entries are warned about and left out.

    `histories`: of these metrics; None: of all. `predictions`: whether those on the test split are read.

    Raises UserError: there is no journal, or its header is damaged.
    """
    if read_header(folder) is None:
        raise UserError(f"{folder}: no run in this folder")
    tags: dict[str, str] = {}
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    header: Mapping[str, Any] = {}
    status, classes = "RUNNING", None
    for entry in read_entries(folder / "journal.jsonl")[0]:
        data = entry.data
        match entry.kind:
            case "open":
                header, tags = data, dict(data["tags"])
            case "tags":
                tags |= data["values"]
            case "metrics":
                for name, value in data["values"].items():
                    points[name].append((data["step"], decode_number(value)))
            case "dataset":
                classes = (data["profile"] or {}).get("classes", classes)
            case "end":
                status = data["status"]
            case "resume":
                status = "RUNNING"
            case "damaged":
                for line in damage(folder / "journal.jsonl"):
                    warn_once(line)
    return Record(
        id=delivered_as(folder) or header["journal"],
        name=header["name"] or header.get("usual_name") or folder.name,
        status=status,
        tags=tags,
        config=_config(folder / "config.yaml"),
        metrics={name: values[-1][1] for name, values in points.items()},
        histories={name: points[name] for name in (points if histories is None else histories) if name in points},
        classes=classes,
        correct=_correct(folder / PREDICTIONS) if predictions else None,
    )


def results(folder: Path) -> dict[str, float]:
    """The final metrics that a run's `results.json` states; empty without one."""
    found = (read_state(folder / "results.json") or {}).get("metrics")
    return found if isinstance(found, dict) else {}


def from_server(folder: Path) -> Record:
    """Read a run that `Delivery.read_runs` has downloaded to `folder`."""
    values = json.loads((folder / "record.json").read_text())
    return Record(
        id=values["id"],
        name=values["name"],
        status=values["status"],
        tags=values["tags"],
        config=_config(folder / "config.yaml") or values["params"],
        metrics={name: float(value) for name, value in values["metrics"].items()},
        histories={k: [(int(s), float(v)) for s, v in points] for k, points in values["histories"].items()},
        classes=values["classes"],
        correct=_correct(folder / PREDICTIONS),
    )


def delivered_as(folder: Path, uri: str | None = None) -> str | None:
    """The MLflow run id that a folder was delivered as (to `uri`, if given)."""
    values = read_state(folder / "delivery.json") or {}
    return values.get("run_id") or None if uri in (None, values.get("uri")) else None


def delivered_whole(folder: Path) -> bool:
    """Whether a server has the whole journal of a folder, including its end."""
    values = read_state(folder / "delivery.json") or {}
    return bool(values.get("ended")) and values.get("offset", 0) >= (folder / "journal.jsonl").stat().st_size


def _config(path: Path) -> dict[str, str]:
    """Flatten a dumped configuration as MLflow's parameters are."""
    if not path.exists():
        return {}
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = written(value)

    walk("", read_data(path, str(path)))
    return flat


def _correct(path: Path) -> NDArray[np.bool_] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            return np.asarray(stored["labels"] == stored["predictions"])
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:  # cut short by a full disk, or not ours
        warn_once(f"{path}: no predictions can be read from it ({type(error).__name__}): left out")
        return None
