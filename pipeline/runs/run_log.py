"""The log of a run in its folder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline import secrets
from pipeline.files import explained

logger = logging.getLogger("asib")


@contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Log lines also go to `<folder>/run.log`."""
    with explained(folder / "run.log"):
        handler = _RunLog(folder / "run.log")
    handler.setFormatter(secrets.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


class _RunLog(logging.FileHandler):
    """A full disk ends a run at the next file that counts, not at a line of its log."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass
