"""Errors for users: one line that says what is wrong, which key, and what to do about it."""

from typing import Literal


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, or the error's name if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class UserError(Exception):
    """Something the user can fix. Steps print it as one line and exit with code 2, without a traceback."""


class NotThere(UserError):
    """What was requested from the tracking server does not exist or cannot be read."""


class HelperFailed(UserError):
    """A helper process of this one has ended; the user's input was not at fault. Exit code 1."""


class Interrupted(BaseException):
    """A signal ended the run; what training had done is in its checkpoint. No library may swallow it as an error."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


class Pruned(Exception):
    """The pruner ended a trial after an epoch, or after a whole seed, whose record and checkpoint are complete.

    `at`: the number of that epoch or seed; `unit`: which of them.
    """

    def __init__(self, at: int, reason: str, unit: Literal["epoch", "seed"] = "epoch") -> None:
        super().__init__(f"pruned after {unit} {at}: {reason}")
        self.at, self.reason, self.unit = at, reason, unit


class NonFinite(Exception):
    """Too many non-finite steps in a row, or outputs that are not finite in evaluation (docs/method.md section 5)."""


class Taken(Exception):
    """Another worker has taken over this trial: nothing more of it may be written here."""
