"""A message to people when a run ends: `notify.url=…`, or ASIB_NOTIFY_URL, an address as apprise writes them.

The address is a secret: it is kept in the environment, whose secrets no record shows, and nowhere else. Only a step's
own run notifies; nested runs and workers have no step of their own.
"""

import html
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from pipeline import extras, secrets
from pipeline.compose.cli import Command
from pipeline.errors import UserError
from pipeline.runs.ending import Ending

if TYPE_CHECKING:
    from pipeline.runs.records import Record
    from pipeline.runs.run import Run

logger = logging.getLogger("asib")
KEY, VARIABLE = "notify.url", "ASIB_NOTIFY_URL"
OWN = {KEY: f"where a message goes when the run has ended; {VARIABLE} instead keeps it out of the command line"}
LIMIT_S = 8.0
"""How long the end of a step waits for the message to be taken."""
LONGEST = 400


def taken(command: Command, runs: bool) -> tuple[Command, str | None]:
    """The command without the address, and the address; None without one, and for a step that makes no run.

    Raises UserError: it cannot be an address, or apprise is not installed.
    """
    own = dict(command.own)
    given = own.pop(KEY, None)
    address = given or os.environ.get(VARIABLE)
    if not address or not runs:
        return replace(command, own=own), None
    if "://" not in address:
        raise UserError(f"{KEY if given else VARIABLE}: give an address as apprise writes them, such as mailto://…")
    extras.require(KEY, "apprise")
    if given and "MLFLOW_RUN_ID" in os.environ:
        logger.warning("%s: `mlflow run` has logged it as a parameter; change it, and give it as %s", KEY, VARIABLE)
    return replace(command, own=own), address


@contextmanager
def kept(address: str | None) -> Iterator[None]:
    """Keep an address in the environment within the block, so that every record and log line masks it."""
    before = os.environ.get(VARIABLE)
    if address is not None:
        os.environ[VARIABLE] = address
        # its import takes seconds on a cold disk, which the message's limit would count
        threading.Thread(target=import_module, args=("apprise",), name="import of apprise", daemon=True).start()
    try:
        yield
    finally:
        if before is not None:
            os.environ[VARIABLE] = before
        else:
            os.environ.pop(VARIABLE, None)


def ended(run: "Run", ending: Ending, value: float | None) -> None:
    """Send the message of a run that has ended, if somebody is to be told. Never raises, never waits for long.

    value: what the job returned, for runs whose description shows no result.
    """
    address = os.environ.get(VARIABLE)
    if not address or run.parent is not None or run.follower:
        return
    try:
        from pipeline.runs import description, records

        record = records.from_folder(run.folder)
        words, found = next(description.results(record, run.config), ("", None))
        result = f"{found:.2f} %: {words}" if found is not None else "" if value is None else f"{value:.4g}"
        text = message(record, run.step, ending, result, time.monotonic() - run.started)
    except Exception as error:  # a message is not worth a run
        logger.warning("%s: no message was sent (%s)", KEY, type(error).__name__)
        return
    sent: list[bool] = []
    sender = threading.Thread(target=_send, args=(address, text, sent), name="notify", daemon=True)
    sender.start()
    sender.join(LIMIT_S)
    if sent != [True]:
        kind = address.partition("://")[0]
        why = f"no answer within {LIMIT_S:g} s" if sender.is_alive() else "it was not accepted"
        logger.warning("%s: no message reached %s://…: %s", KEY, kind, why)


def message(record: "Record", step: str, ending: Ending, result: str, seconds: float) -> str:
    """One line: the result, or what went wrong, then the run."""
    if ending.outcome in ("failed", "killed") or (ending.outcome == "refused" and ending.message):
        first = f"{ending.outcome}: {ending.message or 'resume continues it'}"
    else:
        first = _decision(record.tags, ending) or result or ending.outcome
    names = record.name if record.name.startswith(step) else f"{step} {record.name}".strip()
    last = f" ({names}, {_duration(seconds)}, run {record.id})"
    return secrets.mask(" ".join(first.split())[: LONGEST - len(last)] + last)


def _decision(tags: Mapping[str, str], ending: Ending) -> str:
    """What a promotion, a rollback or a retirement has decided; empty for other runs."""
    if "asib.action" not in tags:
        return ""
    if "asib.verdict" not in tags:
        return html.unescape(tags.get("mlflow.note.content", "").partition("\n")[0].strip("*"))
    version = f"{tags.get('asib.promote', '')} version {tags.get('asib.version', '')}".strip()
    would = "" if "asib.promote" in tags else "would be "
    return f"{version} {would}{tags['asib.verdict']}: {tags.get('asib.verdict_reason', '')}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _send(address: str, text: str, sent: list[bool]) -> None:
    log = logging.getLogger("apprise")
    log.propagate, log.disabled = False, True  # its lines name hosts and users
    try:
        import apprise

        services = apprise.Apprise(asset=apprise.AppriseAsset(app_id="asib"))
        sent.append(services.add(address) and bool(services.notify(body=text, title="")))
    except Exception:  # whatever a service's plugin raises
        sent.append(False)
