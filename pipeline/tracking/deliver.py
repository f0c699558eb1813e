"""Bring finished or interrupted runs to a tracking server later, from any machine, any number of times.

`python -m steps.deliver <run folder>…`. MLflow is imported once the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import journal, urls
from pipeline.errors import UserError
from pipeline.tracking import server
from pipeline.tracking.pipe import DELIVER
from pipeline.tracking.start import default_uri

PATIENCE_S = 5.0
"""How long `deliver` waits for a delivery process that is about to end."""


@dataclass(frozen=True)
class Delivered:
    """What `deliver` did for one folder."""

    folder: Path
    run_id: str
    url: str
    complete: bool
    refused: int
    """Number of items that the server will never accept (see delivery.log)."""
    damage: list[str]
    """A line for each damaged line of its journals."""


def deliver(folders: Sequence[Path], uri: str | None = None) -> list[Delivered]:
    """Deliver the journals in these folders, nested runs included; imports MLflow into this process.

    The run of a folder whose trainer still writes stays RUNNING; one with no end and no writer ends KILLED.

    Raises:
        UserError: no journal, or the server refuses or does not answer: repeat the call later to continue.
    """
    server.prepare_environment()
    uri = urls.tracking(uri) if uri else default_uri()
    for folder in folders:
        if journal.read_header(folder) is None:
            raise UserError(f"no journal in {folder}: give the folder of a run")
    from pipeline.tracking.follow import DeliveryLoop

    client = server.connect(uri)
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
    parser = argparse.ArgumentParser(prog=DELIVER, description="Deliver the journals of runs to a tracking server.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="folder", help="a run's folder")
    parser.add_argument("--uri", help="the tracking URI (default: MLFLOW_TRACKING_URI, else ./mlflow.db)")
    options = parser.parse_args(arguments)
    try:
        done = deliver(options.folders, options.uri)
        for result in done:
            note = "" if result.complete else " (still being written)"
            note += f" ({result.refused} refused: see the messages above)" if result.refused else ""
            print(f"{result.folder}: {result.run_id} {result.url}{note}")
            print(*result.damage, sep="\n", end="\n" if result.damage else "", file=sys.stderr)
        return 2 if any(result.damage for result in done) else 0
    except UserError as error:
        print(f"{error}", file=sys.stderr)
        return 2
