"""Where log lines go: the terminal, and the folder of a run."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline import secrets
from pipeline.config.training import LogConfig
from pipeline.files import explained
from pipeline.paths import user_path

logger = logging.getLogger("asib")


def log_to_terminal() -> None:
    """Show log lines on standard error, without secrets; only errors in processes other than torchrun's first."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(secrets.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
        logger.propagate = False


def configure(log: LogConfig) -> None:
    """Show what `log.level` asks for, and write it to `log.filename` too. Raises UserError: it cannot be written."""
    if os.environ.get("RANK", "0") != "0":
        return
    logger.setLevel(log.level.upper())
    if log.filename is not None:
        path = user_path(log.filename, "log.filename").absolute()
        if not any(getattr(handler, "baseFilename", None) == str(path) for handler in logger.handlers):
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                handler = _RunLog(path)
            handler.setFormatter(secrets.Formatter("%(asctime)s %(message)s"))
            logger.addHandler(handler)


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
