"""How a run handles SIGTERM and SIGINT."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import Interrupted

logger = logging.getLogger("asib")


class Stop:
    """The signal that arrived, or 0: the training loop checks between batches; elsewhere it ends the step at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._in_loop = False

    def __call__(self) -> int:
        return self.signum

    def install(self) -> None:
        """Handle this process's signals from now on; outside its main thread, Python leaves them to that."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.arrived)

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """Keep a signal for the loop, which leaves with a checkpoint; further ones change nothing."""
        self._in_loop = True
        try:
            yield
        finally:
            self._in_loop = False

    def arrived(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. Raises Interrupted outside `between_batches`."""
        if self.signum:
            return
        self.signum = number
        if not self._in_loop:
            raise Interrupted(number)
        logger.warning("signal %d: writing a checkpoint, then leaving", number)
