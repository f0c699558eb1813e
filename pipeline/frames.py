"""Runs as pandas data frames: a row for each run, or for each value that was logged (docs/api.md)."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from pandas import DataFrame, to_numeric

from pipeline.compare import job
from pipeline.compose import cli
from pipeline.compose.keywords import Given, words
from pipeline.config import Config
from pipeline.config.identity import NOT_COMPUTATION, listed
from pipeline.config.places import output_dir
from pipeline.errors import UserError
from pipeline.paths import user_path
from pipeline.runs import records
from pipeline.runs.folders import find_folder, folders_with, header_of
from pipeline.runs.records import Record
from pipeline.runs.run import tracking_uri
from pipeline.runs.step import configuration
from pipeline.tracking.pipe import Delivery

FINAL = ("final/", "test/", "val/", "train/acc")
"""Metrics of a run's end, by what their names begin with."""
PLAIN = {"true": True, "false": False, "null": None}


class Left(Protocol):
    """What a step left, as `pipeline.api` returns it."""

    @property
    def folder(self) -> Path: ...


Which: TypeAlias = str | os.PathLike[str] | Left
Server: TypeAlias = Callable[[], Delivery]


def runs(which: Which | Iterable[Which], *given: Given, **keys: Any) -> DataFrame:
    """A row for each run: what it is, the keys in which the runs differ, and its final metrics.

    Args:
        which: "parent=<id or folder>" for the runs nested in one; "experiment=<name>"; or ids, folders and what steps
            returned, one or a list. Folders are read, ids looked for in `output_dir` and then on the tracking server.
        given, keys: where to look, as steps take it: `output_dir`, `tracking.uri`, `tracking="offline"`.

    Keys that change nothing that is computed (where things are, what they are called) are left out.

    Raises UserError: there is no such run.
    """
    found = _read(which, words(given, keys))
    keys_of = dict.fromkeys(key for record in found for key in record.config if not listed(key, NOT_COMPUTATION))
    differ = [key for key in keys_of if len({record.config.get(key) for record in found}) > 1]
    ends = sorted({name for record in found for name in record.metrics if name.startswith(FINAL)})
    rows = []
    for r in found:
        values = [r.config.get(key, "null") for key in differ]
        own = [r.id, r.name, r.tags.get("asib.step"), r.label, r.status]
        rows.append([*own, *(PLAIN.get(text, text) for text in values), *map(r.metrics.get, ends)])
    frame = DataFrame(rows, columns=["run", "name", "step", "label", "status", *differ, *ends])
    for key in differ:
        try:
            frame[key] = to_numeric(frame[key])
        except (TypeError, ValueError):  # words and lists
            continue
    return frame


def curves(which: Which | Iterable[Which], *given: Given, **keys: Any) -> DataFrame:
    """A row for each value that the runs logged: run, epoch (from 0), metric, value. Arguments are those of `runs`."""
    rows = [
        (record.id, epoch, metric, value)
        for record in _read(which, words(given, keys), everything=True)
        for metric, points in record.histories.items()
        for epoch, value in points
    ]
    return DataFrame(rows, columns=["run", "epoch", "metric", "value"])


def _read(which: Which | Iterable[Which], where: list[str], everything: bool = False) -> list[Record]:
    given: list[Any] = [which] if isinstance(which, str | os.PathLike) or hasattr(which, "folder") else list(which)
    config = configuration(cli.parse(where))
    with _server(config) as server:
        return [
            record
            for each in given
            for name in _names(os.fspath(getattr(each, "folder", each)), config, server)
            for record in _record(name, config, server, everything)
        ]


@contextmanager
def _server(config: Config) -> Iterator[Server]:
    """The tracking server, which is asked only if something is not on this machine."""
    asked: list[Delivery] = []

    def server() -> Delivery:
        if not asked:
            asked.append(Delivery(tracking_uri(config), [], None))
        return asked[0]

    try:
        yield server
    finally:
        for delivery in asked:
            delivery.finish(10.0)


def _names(given: str, config: Config, server: Server) -> list[str]:
    """Folders and ids of the runs that are meant."""
    kind, _, value = given.partition("=")
    if kind == "parent" and value:
        folder = find_folder(output_dir(config), value, "parent")
        if folder is not None:
            reused = job.reused(records.from_folder(folder).tags)
            return [*map(str, job.children(folder)), *reused]
        _refuse_offline(given, config)
        return [*server().ask("nested_runs", run_id=value), *job.reused(server().run_info(value)["tags"])]
    if kind == "experiment" and value:
        return _of_experiment(value, config, server)
    return [given]


def _of_experiment(name: str, config: Config, server: Server) -> list[str]:
    """Those on this machine, and those that the server knows besides; nested runs are their parents'."""
    here = [path for path in folders_with(output_dir(config), "journal.jsonl") if path.parent == output_dir(config)]
    headers = {path: header_of(path) for path in here}
    found = [path for path, header in headers.items() if header is not None and header.data["experiment"] == name]
    if config.tracking.mode == "offline":
        there: list[str] = []
    else:
        delivered = {records.delivered_as(path) for path in found}
        there = [run for run in server().ask("runs_of_experiment", name=name) if run not in delivered]
    if not found and not there:
        raise UserError(f"experiment={name}: no run of it in output_dir={config.output_dir}, nor on the server")
    return [*map(str, found), *there]


def _record(name: str, config: Config, server: Server, everything: bool) -> Iterator[Record]:
    """The run of this folder or id, with the histories of all metrics or of none."""
    folder = find_folder(output_dir(config), name, "runs")
    if folder is not None:
        yield records.from_folder(folder, None if everything else ())
        return
    _refuse_offline(f"runs={name}", config)
    metrics = list(server().run_info(name)["metrics"]) if everything else []
    with tempfile.TemporaryDirectory(prefix="asib-runs-") as to:
        (fetched,) = server().read_runs([name], Path(to), metrics)
        yield records.from_server(fetched)


def _refuse_offline(given: str, config: Config) -> None:
    if config.tracking.mode == "offline":
        raise UserError(f"{given}: no such run in output_dir={config.output_dir}, and tracking is offline")
    if "/" in given and not user_path(given.partition("=")[2], "runs").exists():
        raise UserError(f"{given}: there is no run in that folder")
