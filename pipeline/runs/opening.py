"""What a run is begun or continued with: its delivery, its checkpoint from the server, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline import urls
from pipeline.config import Config
from pipeline.errors import NotThere, UserError
from pipeline.journal import read_entries
from pipeline.paths import inside
from pipeline.tracking import start
from pipeline.tracking.client import Delivery
from pipeline.training.checkpoint import Slots

CONFIG = "config.yaml"


def give_up(folder: Path, delivery: Delivery | None) -> None:
    """Leave nothing of a run that has not begun."""
    if delivery is not None:
        delivery.finish(0.0)
    shutil.rmtree(folder, ignore_errors=True)


def tracking_uri(config: Config) -> str:
    """Where runs go; never a relative path."""
    return urls.tracking(config.tracking.uri) if config.tracking.uri else start.default_uri()


def fetch_checkpoint(delivery: Delivery, run_id: str, folder: Path) -> bool:
    """Bring a run's newest checkpoint from the server into `folder`; False where it has none. Raises UserError."""
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


def deliver(config: Config, folder: Path) -> Delivery | None:
    if config.tracking.mode == "offline":
        return None
    return start.start_delivery(folder, uri=tracking_uri(config))


def described(folder: Path) -> bool:
    entries, _ = read_entries(folder / "journal.jsonl")
    return any(entry.kind == "artifact" and entry.data["path"] == CONFIG for entry in entries)


def refuse_other_step(name: str, made_by: str | None, step: str) -> None:
    if made_by not in (None, step):
        raise UserError(f"resume={name}: that run is of step {made_by}; continue it with steps.{made_by}")


def refuse_finished(name: str, finished: bool, config: Config) -> None:
    if finished and not config.extend:
        raise UserError(f"resume={name}: that run is finished; extend=true continues it for more epochs")


def position(state: Any) -> str:
    if state is None:
        return "start"
    position = state["position"]
    return f"epoch {position['epoch']}, batch {position['batch']}"
