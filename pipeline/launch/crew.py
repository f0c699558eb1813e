"""A driver's workers: as many as there is work for, replaced when they die, and stopped together."""

import logging
import time
from collections.abc import Callable
from typing import Any

from pipeline.errors import HelperFailed, Interrupted
from pipeline.launch.launcher import Launcher
from pipeline.runs.signals import Stop

logger = logging.getLogger("asib")


class Crew:
    """At most `number` workers that run `work`.

    Args:
        work: as `Launcher.start` takes it.
        stop: the driver's.
    """

    def __init__(self, launcher: Launcher, number: int, work: Callable[..., int], stop: Stop) -> None:
        self.launcher, self.number, self.work, self.stop = launcher, number, work, stop
        self._started = self._idle = 0

    def fill(self, left: int, taken: int, why: Callable[[], str | None], **arguments: Any) -> None:
        """Start as many workers as there is work for, counting those that are still starting.

        Args:
            left: pieces of work that nobody works on.
            taken: pieces that somebody works on.
            why: why the last ones failed.
            arguments: what a worker is started with.

        Raises:
            HelperFailed: too many have ended without progress.
        """
        alive = self.launcher.alive()
        missing = min(self.number - alive, left - max(0, alive - taken))
        if missing <= 0:
            return
        if self._idle >= 2 * self.number + 1:
            reason = why() or "no error was recorded"
            raise HelperFailed(f"{self._idle} workers ended without a result: {reason}; see {self.launcher.folder}")
        self.launcher.start(self.work, missing, **arguments)
        self._idle += missing if self._started else 0
        self._started += missing

    def progressed(self) -> None:
        """Workers that ended before now count no longer."""
        self._idle = 0

    def leave(self, words: str) -> None:
        """Stop them; `words`: what continues their work."""
        logger.warning("waiting for the workers to write their checkpoints; %s", words)
        self.launcher.stop()

    def wait(self, seconds: float) -> None:
        """Wait, within limits, until they have delivered what they have. Raises Interrupted."""
        until = time.monotonic() + seconds
        while self.launcher.alive() and time.monotonic() < until and not self.stop():
            time.sleep(0.2)
        if self.stop():
            raise Interrupted(self.stop())
