"""MLflow as the steps see it: start a delivery beside the training, ask it for artifacts, wait for its end.

Imports no MLflow: the delivery process does. `python -m pipeline.experiment.tracking deliver <folder>…` brings
finished or interrupted folders to a server later, from any machine, any number of times.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import journal, urls
from pipeline.errors import UserError
from pipeline.tracking.client import Delivery, Ready
from pipeline.tracking.server import prepare_environment

DELIVER = "python -m pipeline.experiment.tracking deliver"
PATIENCE_S = 5.0
"""How long `deliver` waits for a delivery process that is about to end."""


@dataclass(frozen=True)
class Delivered:
    """What `deliver` did for one folder.

    Attributes:
        refused: how many things the server will never take (see delivery.log).
        damage: a line for each damaged line of its journals.
    """

    folder: Path
    run_id: str
    url: str
    complete: bool
    refused: int
    damage: list[str]


def default_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the working directory; never a relative path."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return urls.tracking(given, "MLFLOW_TRACKING_URI")
    return urls.tracking(f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def start_delivery(
    folder: Path,
    *,
    uri: str | None = None,
    fetch: Mapping[str, Path] | None = None,
    adopt: str | None = None,
    resume: str | None = None,
    grace: float = 120.0,
) -> Delivery:
    """Start the delivery process of the run in `folder` and return at once; its imports take seconds of its own.

    Args:
        folder: the run's folder. Its journal may be made later: `Delivery.wait_ready` needs it, fetching does not.
        uri: the tracking URI; `default_uri()` by default.
        fetch: artifact URI (`runs:/…`, `models:/…`) → local folder, downloaded first (`Delivery.wait_fetched`).
        adopt: the run that `mlflow run` has made; MLFLOW_RUN_ID by default, "" for none.
        resume: the run that the journal goes on with. An adopted run then gets `asib.resumes` and ends empty.
        grace: seconds of further attempts when the server is away and the trainer has ended.

    Raises:
        UserError: the URI is not one this project can use.
    """
    arguments = ["--grace", str(grace)]
    adopt = os.environ.get("MLFLOW_RUN_ID", "") if adopt is None else adopt
    for name, value in (("--adopt", adopt), ("--resume", resume)):
        if value:
            arguments += [name, value]
    for source, dest in (fetch or {}).items():
        arguments += ["--fetch", source, str(dest.absolute())]
    folder.mkdir(parents=True, exist_ok=True)
    where = urls.tracking(uri) if uri else default_uri()
    return Delivery(where, arguments, folder.absolute())


def fetch_now(uri: str, run_uri: str, dest: Path) -> Path:
    """Download one artifact with no run of one's own; takes the seconds of MLflow's import, in a process of its own.

    Raises:
        UserError: it is not there, or the server does not answer.
    """
    delivery = Delivery(urls.tracking(uri), ["--fetch", run_uri, str(dest.absolute())], None)
    path = delivery.wait_fetched(600.0)[run_uri]
    delivery.finish(0.0)
    return path


def deliver(folders: Sequence[Path], uri: str | None = None) -> list[Delivered]:
    """Bring the journals in these folders, and those of their nested runs, to the server; imports MLflow here.

    A folder whose trainer still writes keeps its run RUNNING; one that has no end and no writer ends KILLED.

    Raises:
        UserError: no journal, the server refuses or does not answer: then the same call later goes on.
    """
    ours = prepare_environment()
    uri = urls.tracking(uri) if uri else default_uri()
    for folder in folders:
        if journal.read_header(folder) is None:
            raise UserError(f"no journal in {folder}: give the folder of a run")
    from pipeline.tracking import server
    from pipeline.tracking.follow import DeliveryLoop

    client = server.connect(uri)
    server.patience(server.LATER_PATIENCE, ours)
    done = []
    for folder in folders:
        try:
            with DeliveryLoop(folder, uri, client=client, patience=PATIENCE_S) as loop:
                alive = loop.writer_alive()
                complete = loop.run_once(final=not alive)
                if not loop.writer_alive():
                    loop.close_unfinished()
                    complete = True
                state = loop.top.state
                done.append(Delivered(folder, state.run_id, state.url, complete, loop.refused, loop.damage()))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{folder}: {server.explain(error, uri)}") from error
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 everything is on the server; 2 with one line on stderr for each thing that is not."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking.deliver", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "deliver", help="bring the journals of runs to a tracking server"
    )
    command.add_argument("folders", nargs="+", type=Path, metavar="folder")
    command.add_argument("--uri", help="the tracking URI (default: MLFLOW_TRACKING_URI, else ./mlflow.db)")
    options = parser.parse_args(arguments)
    try:
        uri = urls.tracking(options.uri) if options.uri else default_uri()
        done = deliver(options.folders, uri)
        for result in done:
            note = "" if result.complete else " (still being written)"
            note += f" ({result.refused} refused: see the messages above)" if result.refused else ""
            print(f"{result.folder}: {result.run_id} {result.url}{note}")
            print(*result.damage, sep="\n", end="\n" if result.damage else "", file=sys.stderr)
        return 2 if any(result.damage for result in done) else 0
    except UserError as error:
        print(f"{error}", file=sys.stderr)
        return 2


__all__ = [
    "DELIVER",
    "Delivered",
    "Delivery",
    "Ready",
    "default_uri",
    "deliver",
    "fetch_now",
    "start_delivery",
]

if __name__ == "__main__":
    sys.exit(main())
