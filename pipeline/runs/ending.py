"""How a run ends: status in MLflow, outcome and exit code, for each way out of a job."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import HelperFailed, Interrupted, NonFinite, Pruned, UserError
from pipeline.files import disk_trouble


class Ending(NamedTuple):
    """Status, outcome, exit code and message as `Journal.end` takes them, and tags."""

    status: str
    outcome: str
    exit_code: int
    message: str | None = None
    tags: Mapping[str, str] | None = None


COMPLETED = Ending("FINISHED", "completed", 0)


def ending_of(error: BaseException) -> Ending:
    """The ending of a run whose job raised `error`."""
    match error:
        case Interrupted():
            return Ending("KILLED", "killed", 128 + error.signum)
        case Pruned():
            tags = {f"asib.pruned_{error.unit}": str(error.at), "asib.pruned_reason": error.reason}
            return Ending("KILLED", "pruned", 0, tags=tags)
        case HelperFailed() | NonFinite():
            return Ending("FAILED", "failed", 1, str(error))
        case UserError():
            return Ending("FAILED", "refused", 2, str(error))
        case _:
            return Ending("FAILED", "failed", 1, f"{type(error).__name__}: {error}")


def as_user_error(error: BaseException, folder: Path) -> BaseException:
    """The error, or the UserError that explains it if the disk is full or the run's folder was removed."""
    if isinstance(error, UserError) or not isinstance(error, Exception):
        return error
    return disk_trouble(error, folder) or error
