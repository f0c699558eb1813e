"""The life of a step's process: arguments, configuration, the run, signals, and the exit code that says how it ended.

Torch is imported only after the configuration is known to be good.
"""

import importlib
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.errors import Interrupted, UserError
from pipeline.experiment import cli
from pipeline.experiment.compose import compose

if TYPE_CHECKING:
    from pipeline.experiment.run import Run

logger = logging.getLogger("asib")
Job = Callable[["Run"], float | None]


class Stop:
    """SIGTERM and SIGINT: the training loop asks between batches; anywhere else the first one ends the step at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._in_loop = False

    def __call__(self) -> int:
        return self.signum

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._arrived)

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """Inside, a signal is remembered for the loop, which leaves with a checkpoint; further ones change nothing."""
        self._in_loop = True
        try:
            yield
        finally:
            self._in_loop = False

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.signum:
            return
        self.signum = number
        if not self._in_loop:
            raise Interrupted(number)
        logger.warning("signal %d: writing a checkpoint, then leaving", number)


stop = Stop()


def execute(
    step: str,
    job: str | Job,
    argv: list[str] | None = None,
    variant: Callable[[Config], Config] = lambda config: config,
) -> int:
    """Run a step from its command line.

    Args:
        step: its name, for `--help`, folders and tags.
        job: "module:function" that takes the Run and returns the metric the step optimises, imported late; or itself.
        argv: arguments without the program's name; None: sys.argv.
        variant: what the step makes of the composed configuration.

    Returns:
        The exit code: 0 completed, 2 refused (bad input), 1 failed, 143 and 130 after SIGTERM and SIGINT.
    """
    _log_to_terminal()
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments or "debug=true" in arguments  # until the arguments are understood
    try:
        command = cli.parse(arguments)
        debug = command.debug
        if command.help:
            print(cli.help_text(step, command.cfg, command.overrides))
            return 0
        config = variant(compose(command.cfg, command.overrides))
    except UserError as error:
        return _refuse(step, error, debug)
    stop.install()
    try:
        if os.environ.get("RANK", "0") != "0":
            return _follow(step, config, job)
        from pipeline.experiment.run import Run, log_to

        run = Run.open(step, config)
        with log_to(run.folder):
            return _supervise(run, job)
    except UserError as error:
        return _refuse(step, error, config.debug)
    except Interrupted as error:
        return 128 + error.signum  # before the run, or after its end: nothing is lost


def _call(job: str | Job, run: "Run") -> None:
    if isinstance(job, str):
        module, function = job.split(":")
        getattr(importlib.import_module(module), function)(run)
    else:
        job(run)


def _supervise(run: "Run", job: str | Job) -> int:
    from pipeline.training import distributed
    from pipeline.training.loop import NonFinite

    try:
        distributed.join()
        distributed.first_process_says(str(run.folder))
        _call(job, run)
    except Interrupted as error:
        code = 128 + error.signum
        run.close("KILLED", "killed", code)
        _leave_mlflow_run()
        return code
    except UserError as error:
        if run.config.debug:
            traceback.print_exc()
        logger.error("%s", error)
        run.close("FAILED", "refused", 2, str(error))
        return 2
    except NonFinite as error:
        logger.error("%s", error)
        run.close("FAILED", "failed", 1, str(error))
        return 1
    except Exception as error:
        logger.exception("the run failed")
        run.close("FAILED", "failed", 1, f"{type(error).__name__}: {error}")
        return 1
    run.close("FINISHED", "completed", 0)
    return 0


def _follow(step: str, config: Config, job: str | Job) -> int:
    """Another process than torchrun's first: trains along, and leaves record and messages to the first."""
    from pipeline.experiment.run import Run
    from pipeline.training import distributed

    logger.setLevel(logging.ERROR)
    distributed.join()
    run = Run.follow(step, config, Path(distributed.first_process_says("")))
    try:
        _call(job, run)
    except Interrupted as error:
        return 128 + error.signum
    except UserError:
        return 2
    return 0


def _refuse(step: str, error: UserError, debug: bool) -> int:
    """Bad input before there was a run: one line; the run that `mlflow run` has made ends FAILED with it."""
    if debug:
        traceback.print_exception(error)
    logger.error("%s", error)
    if os.environ.get("MLFLOW_RUN_ID"):
        try:
            _fail_adopted_run(step, str(error))
        except UserError as second:
            logger.error("%s", second)
    return 2


def _fail_adopted_run(step: str, message: str) -> None:
    """A record of the refusal alone: there is no configuration whose parameters it could state."""
    from pipeline.experiment import tracking
    from pipeline.journal import Journal

    with tempfile.TemporaryDirectory(prefix="asib-refused-", ignore_cleanup_errors=True) as above:
        folder = Path(above) / step
        journal = Journal.create(folder, experiment="", name=None, tags={"asib.step": step})
        delivery = tracking.start_delivery(folder)
        journal.end("FAILED", "refused", 2, message)
        delivery.finish(60.0)


def _leave_mlflow_run() -> None:
    """`mlflow run` would overwrite KILLED with FAILED when its child ends: end it first (recipes.md)."""
    from pipeline.experiment import tracking

    tracking.kill_mlflow_run_parent()


def _log_to_terminal() -> None:
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
