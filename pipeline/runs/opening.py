"""How a run begins or continues: new, from its folder or the tracking server, nested in another, or as a follower."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.compose import compose
from pipeline.compose.cli import Command
from pipeline.config import Config
from pipeline.config.places import output_dir
from pipeline.errors import NotThere, UserError
from pipeline.files import locked, release
from pipeline.journal import FILE, Carrier, Journal, NullJournal, read_entries, read_header, take
from pipeline.paths import inside
from pipeline.runs.continuation import check_computation
from pipeline.runs.description import NOTE, RUNNING
from pipeline.runs.folders import CONFIG, ended, find_folder, fresh_folder, writable
from pipeline.runs.naming import COMMAND, command_of, continued, name_of
from pipeline.runs.run import Run, remove_unbegun
from pipeline.runs.signals import Stop
from pipeline.tracking import start
from pipeline.tracking.pipe import Delivery
from pipeline.training.checkpoint import Slots


def open_run(
    step: str,
    config: Config,
    delivery: Delivery | None = None,
    stop: Stop | None = None,
    command: Command | None = None,
) -> Run:
    """Start a run, or continue the one that `resume` names; delivery starts at once, beside this process's imports.

    Args:
        delivery: that of a new run's folder, if it was already started.
        stop: records the process's signals; None: signals are not checked.
        command: what asks for the run; a new one is called after it.

    Raises:
        UserError: the run that `resume` names cannot be continued.
    """
    stop = stop or Stop()
    if config.resume is not None:
        run = _resume(step, config, config.resume, stop)
    else:
        folder = delivery.folder if delivery is not None else None
        run = _begin(step, config, folder or fresh_folder(config, step), delivery, stop, command)
    run.command = command
    return run


def follow(step: str, config: Config, folder: Path, parent: Run | None = None, stop: Stop | None = None) -> Run:
    """The first process's run, as another process sees it."""
    slots = Slots(folder / "checkpoints")
    state = slots.read()[0] if slots.manifest.exists() else None
    return Run(step, config, folder, NullJournal(), None, state, parent, stop=stop)


def carrier(config: Config, folder: Path, stands_for: Carrier, stop: Stop) -> Run:
    """What a worker has instead of a run: its nested runs become those of `stands_for`."""
    with writable(config):
        journal = Journal.create(folder, experiment=stands_for.experiment, name=None, carrier=stands_for)
    return Run("worker", config, folder, journal, _deliver(config, folder), stands_for=stands_for.journal, stop=stop)


def child(
    parent: Run,
    step: str,
    key: str,
    config: Config,
    name: str | None = None,
    folder: Path | None = None,
    distant: bool = False,
) -> Run:
    """A nested run in `<parent's folder>/<key>`; one that an interrupted parent left there is continued.

    Args:
        name: its name; by default it begins with the key.
        folder: its folder, if it is elsewhere.
        distant: look for it on the server if it is not on this machine, as for the children of a distant parent.
    """
    folder = folder or parent.folder / key
    if parent.follower:
        return follow(step, config, folder, parent)
    if (folder / FILE).exists() or (folder / "checkpoints" / "manifest.json").exists():
        # a copy of what another worker left, or begun by this parent, which was killed before it had named it
        parent.journal.child(folder)
        return _continue(step, config, folder, parent)
    delivery = parent.delivery if distant or parent.distant else None
    parent.journal.begin()
    known_as = parent.nested_id(key)
    called = name or name_of(step, config, label=key)
    journal = _create(step, config, folder, None, called, journal=known_as, parent=parent.folder)
    parent.journal.child(folder)
    run = Run(step, config, folder, journal, parent.delivery, None, parent, distant=delivery is not None)
    run.describe()
    # if the server has it, delivery has found it by its journal's id
    if delivery is not None and fetch_checkpoint(delivery, delivery.child_ready(folder), folder):
        run.journal.close()
        return _continue(step, config, folder, parent, distant=True)
    return run


# new -----------------------------------------------------------------------------------------------------------------


def _begin(
    step: str,
    config: Config,
    folder: Path,
    delivery: Delivery | None,
    stop: Stop,
    command: Command | None = None,
    known_as: str | None = None,
    distant: bool = False,
) -> Run:
    """Start an outermost run, whose record stays pending until it is `ready`.

    `known_as`: its journal id on the server, if there is no checkpoint there to continue from.
    """
    called = name_of(step, config, command)
    journal = _create(step, config, folder, config.run_name, called, delivery, journal=known_as, pending=True)
    try:
        delivery = delivery or _deliver(config, folder)
        run = Run(step, config, folder, journal, delivery, stop=stop, distant=distant)
        run.describe()
        if command is not None:
            journal.tags({COMMAND: command_of(step, command)})
    except UserError:
        journal.close()
        remove_unbegun(folder, delivery)
        raise
    return run


def _create(
    step: str,
    config: Config,
    folder: Path,
    name: str | None,
    usual: str,
    delivery: Delivery | None = None,
    **more: Any,
) -> Journal:
    experiment, tags = config.tracking.experiment, {"asib.step": step}
    try:
        with writable(config):
            folder.mkdir(parents=True, exist_ok=True)
        return Journal.create(folder, experiment=experiment, name=name, usual_name=usual, tags=tags, **more)
    except UserError:
        if not (folder / FILE).exists():
            remove_unbegun(folder, delivery)
        raise


def _deliver(config: Config, folder: Path) -> Delivery | None:
    if config.tracking.mode == "offline":
        return None
    return start.start_delivery(folder, uri=config.tracking.uri)


# continued -----------------------------------------------------------------------------------------------------------


def _resume(step: str, config: Config, name: str, stop: Stop) -> Run:
    root = output_dir(config)
    folder = find_folder(root, name)
    if folder is None:  # unknown on this machine: only the tracking server may have it
        if config.tracking.mode == "offline":
            raise UserError(f"resume={name}: no such run in output_dir={config.output_dir}, and tracking is offline")
        if "/" in name:
            raise UserError(f"resume={name}: no run in that folder; give the folder of a run, or a run id")
        with writable(config):
            root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"):
            folder = find_folder(root, name)  # another process may have downloaded it meanwhile
            if folder is None:
                return _from_tracking_server(step, config, name, stop)
    return _continue(step, config, folder, stop=stop)


def _from_tracking_server(step: str, config: Config, name: str, stop: Stop) -> Run:
    folder = fresh_folder(config, step, name[:6])
    with writable(config):
        folder.mkdir(parents=True)
    delivery = start.start_delivery(folder, uri=config.tracking.uri, resume=name)
    try:
        info = delivery.run_info(name)
        made_by, finished = info["tags"].get("asib.step"), info["status"] == "FINISHED"
        _check_resumable(name, step, made_by, finished, config.extend, True)
        found = fetch_checkpoint(delivery, name, folder)
        _check_resumable(name, step, made_by, finished, config.extend, found)
        if found:
            return _continue(step, config, folder, None, delivery, stop, distant=True)
    except UserError as error:
        remove_unbegun(folder, delivery)
        raise UserError(str(error) if str(error).startswith("resume=") else f"resume={name}: {error}") from error
    return _begin(step, config, folder, delivery, stop, known_as=info["tags"].get("asib.journal"), distant=True)


def _continue(
    step: str,
    config: Config,
    folder: Path,
    parent: Run | None = None,
    delivery: Delivery | None = None,
    stop: Stop | None = None,
    distant: bool = False,
) -> Run:
    """Continue the run in `folder` from its last checkpoint, or from the start; `delivery` may have downloaded it."""
    name = config.resume or folder.name
    slots = Slots(folder / "checkpoints")
    state: Any = None
    lock = take(folder)  # before anything is read: another process may be writing the run, or may just have finished it
    try:
        if parent is None and delivery is None:
            header = read_header(folder)
            made_by = header.data["tags"].get("asib.step") if header else None
            _check_resumable(name, step, made_by, ended(folder), config.extend, slots.manifest.exists())
        if slots.manifest.exists():
            state, saved = slots.read()
            here = parent is None and delivery is None  # nobody is told to paste a command that came from a server
            command = _to_continue(step, state["journal"], name) if here else ""
            check_computation(config, name, state["header"], command)  # checked before its record is touched
    except BaseException:
        release(lock)
        raise
    if state is not None:
        journal = Journal.restore(folder, state["journal"], (saved.path, saved.sha256, saved.slot), lock)
    else:
        journal = Journal.reopen(folder, lock)
    if parent is not None:
        delivery = parent.delivery
    elif delivery is None:
        delivery = _deliver(config, folder)
    run = Run(step, config, folder, journal, delivery, state, parent, stop=stop, distant=distant)
    position = "start" if state is None else "epoch {epoch}, batch {batch}".format_map(state["position"])
    if state is None:
        entries, _ = read_entries(folder / FILE)
        if not any(entry.kind == "artifact" and entry.data["path"] == CONFIG for entry in entries):
            run.describe()  # it was killed before it had recorded what it is
    elif not (folder / CONFIG).exists():
        run.write(CONFIG, compose.dump(config))  # only its checkpoint came here, from a server or another folder
    again = f"{RUNNING}, from {'the start' if state is None else position}"
    journal.tags({"asib.resumed_from": position, NOTE: again})  # the description told of the interruption
    return run


def _to_continue(step: str, journal: str, name: str) -> str:
    """The command that continues the run with this record; empty if the record names none."""
    tags: dict[str, str] = {}
    for entry in map(json.loads, journal.splitlines()):
        tags |= entry["values"] if entry["kind"] == "tags" else {}
    return continued(step, tags[COMMAND], name) if COMMAND in tags else ""


def fetch_checkpoint(delivery: Delivery, run_id: str, folder: Path) -> bool:
    """Bring a run's newest checkpoint from the server into `folder`; False if it has none. Raises UserError."""
    try:
        fetched = delivery.fetch(f"runs:/{run_id}/checkpoints", folder / "fetched")
    except NotThere:
        return False
    if not (fetched / "manifest.json").exists():  # it has finished: weights alone are left
        shutil.rmtree(folder / "fetched")
        return False
    try:
        newest = json.loads((fetched / "manifest.json").read_text())
        file, sha256 = inside(fetched, newest["file"]), str(newest["sha256"])
        if not (file.is_file() and not file.is_symlink()):
            raise UserError(f"its checkpoints/manifest.json names {file.name}, which is not there")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("its checkpoints/manifest.json is damaged") from error
    Slots(folder / "checkpoints").adopt(file, sha256)
    shutil.rmtree(folder / "fetched")
    return True


def _check_resumable(name: str, step: str, made_by: str | None, finished: bool, extend: bool, kept: bool) -> None:
    """Raise UserError unless a run may be continued. `kept`: whether there is a checkpoint of it."""
    if made_by not in (None, step):
        raise UserError(f"resume={name}: that run is of step {made_by}; continue it with steps.{made_by}")
    if finished and not extend:
        raise UserError(f"resume={name}: that run is finished; extend=true continues it for more epochs")
    if finished and not kept and step in ("distill", "baseline"):
        raise UserError(f"resume={name}: it finished, and its checkpoint was removed; checkpoint.keep=true keeps one")
