"""How a run begins or continues: new, from its folder or the tracking server, nested in another, or as a follower."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config.places import output_dir
from pipeline.errors import NotThere, UserError
from pipeline.files import locked, release
from pipeline.journal import FILE, Carrier, Journal, NullJournal, read_entries, read_header, take
from pipeline.paths import inside
from pipeline.runs.folders import ended, find_folder, fresh_folder, writable
from pipeline.runs.run import CONFIG, Run, remove_unbegun, tracking_uri
from pipeline.runs.signals import Stop
from pipeline.tracking import start
from pipeline.tracking.client import Delivery
from pipeline.training.checkpoint import Slots


def open_run(step: str, config: Config, delivery: Delivery | None = None, stop: Stop | None = None) -> Run:
    """Start a run, or continue the one that `resume` names; delivery starts at once, beside this process's imports.

    Args:
        delivery: that of a new run's folder, where it was started before.
        stop: what the process's signals are kept in; None: signals are not asked for.

    Raises:
        UserError: what `resume` names cannot be continued.
    """
    stop = stop or Stop()
    if config.resume is not None:
        return _resume(step, config, config.resume, stop)
    folder = delivery.folder if delivery is not None else None
    return _begin(step, config, folder or fresh_folder(config, step), delivery, stop)


def follow(step: str, config: Config, folder: Path, parent: Run | None = None, stop: Stop | None = None) -> Run:
    """The first process's run, seen from another."""
    slots = Slots(folder / "checkpoints")
    state = slots.read()[0] if slots.manifest.exists() else None
    return Run(step, config, folder, NullJournal(), None, state, parent, stop=stop)


def carrier(config: Config, folder: Path, stands_for: Carrier, stop: Stop) -> Run:
    """What a sweep's worker has in the place of a run: its nested runs become those of `stands_for`."""
    with writable(config):
        journal = Journal.create(folder, experiment=stands_for.experiment, name=None, carrier=stands_for)
    return Run("sweep", config, folder, journal, _deliver(config, folder), stands_for=stands_for.journal, stop=stop)


def child(
    parent: Run,
    step: str,
    key: str,
    config: Config,
    name: str | None = None,
    folder: Path | None = None,
    distant: bool = False,
) -> Run:
    """A nested run in `<parent's folder>/<key>`; what an interrupted parent left there is continued.

    Args:
        name: its name; the folder's by default.
        folder: where it is instead.
        distant: look for it on the server where it is not on this machine, as for the children of a distant parent.
    """
    folder = folder or parent.folder / key
    if parent.follower:
        return follow(step, config, folder, parent)
    if (folder / FILE).exists() or (folder / "checkpoints" / "manifest.json").exists():
        # begun by another worker, a copy of what that has left, or by this parent, killed before it had named it
        parent.journal.child(folder)
        return _continue(step, config, folder, parent)
    delivery = parent.delivery if distant or parent.distant else None
    run = _begin_nested(step, config, folder, parent, name, key, distant=delivery is not None)
    # by its journal's id delivery has found what there is of it on the server
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
    known_as: str | None = None,
    distant: bool = False,
) -> Run:
    """Start an outermost run, whose record stays pending until it is `ready`.

    Args:
        known_as: the journal id that the server has of it, where it has no checkpoint to continue from.
    """
    try:
        journal = _create(step, config, folder, config.run_name, journal=known_as, pending=True)
    except UserError:
        if not (folder / FILE).exists():
            remove_unbegun(folder, delivery)
        raise
    try:
        delivery = delivery or _deliver(config, folder)
    except UserError:
        journal.close()
        remove_unbegun(folder, None)
        raise
    run = Run(step, config, folder, journal, delivery, stop=stop, distant=distant)
    try:
        run.describe()
    except UserError:
        run.discard()
        raise
    return run


def _begin_nested(
    step: str, config: Config, folder: Path, parent: Run, name: str | None, key: str, distant: bool
) -> Run:
    parent.journal.begin()
    try:
        journal = _create(
            step, config, folder, name or folder.name, journal=parent.nested_id(key), parent=parent.folder
        )
    except UserError:
        if not (folder / FILE).exists():
            remove_unbegun(folder, None)
        raise
    parent.journal.child(folder)
    run = Run(step, config, folder, journal, parent.delivery, None, parent, distant=distant)
    run.describe()
    return run


def _create(step: str, config: Config, folder: Path, name: str | None, **more: Any) -> Journal:
    usual = " ".join([step, config.rung or config.model.student.name, f"seed {config.seed}"])
    with writable(config):
        folder.mkdir(parents=True, exist_ok=True)
    experiment, tags = config.tracking.experiment, {"asib.step": step}
    return Journal.create(folder, experiment=experiment, name=name, usual_name=usual, tags=tags, **more)


def _deliver(config: Config, folder: Path) -> Delivery | None:
    if config.tracking.mode == "offline":
        return None
    return start.start_delivery(folder, uri=tracking_uri(config))


# continued -----------------------------------------------------------------------------------------------------------


def _resume(step: str, config: Config, name: str, stop: Stop) -> Run:
    root = output_dir(config)
    folder = find_folder(root, name)
    if folder is None:  # unknown to this machine: only the tracking server may have it
        if config.tracking.mode == "offline":
            raise UserError(f"resume={name}: no such run in output_dir={config.output_dir}, and tracking is offline")
        if "/" in name:
            raise UserError(f"resume={name}: no run in that folder; give the folder of a run, or a run id")
        with writable(config):
            root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"):
            folder = find_folder(root, name)  # another process may have brought it here meanwhile
            if folder is None:
                return _from_tracking_server(step, config, name, stop)
    return _continue(step, config, folder, stop=stop)


def _from_tracking_server(step: str, config: Config, name: str, stop: Stop) -> Run:
    folder = fresh_folder(config, step, name[:6])
    with writable(config):
        folder.mkdir(parents=True)
    delivery = start.start_delivery(folder, uri=tracking_uri(config), resume=name)
    try:
        info = delivery.run_info(name)
        _refuse_other_step(name, info["tags"].get("asib.step"), step)
        _refuse_finished(name, info["status"] == "FINISHED", config)
        begun = fetch_checkpoint(delivery, name, folder)
    except UserError as error:
        remove_unbegun(folder, delivery)
        raise UserError(str(error) if str(error).startswith("resume=") else f"resume={name}: {error}") from error
    if begun:
        return _continue(step, config, folder, None, delivery, stop, distant=True)
    return _begin(step, config, folder, delivery, stop, info["tags"].get("asib.journal"), distant=True)


def _continue(
    step: str,
    config: Config,
    folder: Path,
    parent: Run | None = None,
    delivery: Delivery | None = None,
    stop: Stop | None = None,
    distant: bool = False,
) -> Run:
    """Continue the run in `folder` from its last checkpoint, or from the start without one.

    Args:
        delivery: what has brought it here from the server, where something has.
    """
    name = config.resume or folder.name
    slots = Slots(folder / "checkpoints")
    state: Any = None
    lock = take(folder)  # before anything is read: another process may be writing it, or may just have finished it
    try:
        if parent is None and delivery is None:
            header = read_header(folder)
            _refuse_other_step(name, header.data["tags"].get("asib.step") if header else None, step)
            _refuse_finished(name, ended(folder), config)
        if slots.manifest.exists():
            state, saved = slots.read()
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
    if state is None and not _described(folder):
        run.describe()  # it was killed before it had stated what it is
    journal.tags({"asib.resumed_from": _position(state)})
    return run


def fetch_checkpoint(delivery: Delivery, run_id: str, folder: Path) -> bool:
    """Bring a run's newest checkpoint from the server into `folder`; False if it has none. Raises UserError."""
    try:
        fetched = delivery.fetch(f"runs:/{run_id}/checkpoints", folder / "fetched")
    except NotThere:
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


def _described(folder: Path) -> bool:
    entries, _ = read_entries(folder / FILE)
    return any(entry.kind == "artifact" and entry.data["path"] == CONFIG for entry in entries)


def _refuse_other_step(name: str, made_by: str | None, step: str) -> None:
    if made_by not in (None, step):
        raise UserError(f"resume={name}: that run is of step {made_by}; continue it with steps.{made_by}")


def _refuse_finished(name: str, finished: bool, config: Config) -> None:
    if finished and not config.extend:
        raise UserError(f"resume={name}: that run is finished; extend=true continues it for more epochs")


def _position(state: Any) -> str:
    if state is None:
        return "start"
    position = state["position"]
    return f"epoch {position['epoch']}, batch {position['batch']}"
