"""The life of a step's process: arguments, configuration, the run, signals, and the exit code that says how it ended.

Torch is imported only after the configuration is known to be good (or when a variable of the environment names a
network, which the zoo alone knows).
"""

import importlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pipeline import secrets
from pipeline.compose import cli, shortcuts
from pipeline.compose.compose import compose, dump
from pipeline.config import Config
from pipeline.config.names import UnknownKey
from pipeline.config.numbers import processes
from pipeline.config.places import check_there
from pipeline.errors import HelperFailed, Interrupted, NonFinite, UserError
from pipeline.runs.ending import ending_of, understood
from pipeline.runs.mlflow_run import kill_mlflow_run_parent

if TYPE_CHECKING:
    from pipeline.runs.run import Run
    from pipeline.tracking.client import Delivery

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
            signal.signal(number, self.arrived)

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """Inside, a signal is remembered for the loop, which leaves with a checkpoint; further ones change nothing."""
        self._in_loop = True
        try:
            yield
        finally:
            self._in_loop = False

    def arrived(self, number: int, frame: FrameType | None) -> None:
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
    dry_run: Callable[[Config], str] | None = None,
    own: Collection[str] = (),
    ask: "Callable[[Delivery], None] | None" = None,
) -> int:
    """Run a step from its command line.

    Args:
        step: its name, for `--help`, folders and tags.
        job: "module:function" that takes the Run and returns the metric the step optimises, imported late; or itself.
        argv: arguments without the program's name; None: sys.argv.
        variant: what the step makes of the composed configuration.
        dry_run: what DRY_RUN=1 prints below the configuration.
        own: the step's own keys, which `argv` no longer has, for what is said of a misspelt one.
        ask: asks the tracking server what it alone can tell of bad input, before there is a run; raises UserError.

    Returns:
        The exit code: 0 completed, 2 refused (bad input), 1 failed, 143 and 130 after SIGTERM and SIGINT, or what the
        job concludes with (`Run.conclusion`).
    """
    log_to_terminal()
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments or "debug=true" in arguments  # until the arguments are understood
    try:
        command = cli.parse(arguments)
        debug = command.debug
        if command.help:
            print(cli.help_text(step, command.cfg, command.overrides))
            return 0
        config = variant(configuration(command, own))
        if shortcuts.wants_dry_run(os.environ):
            _show(config, dry_run)
            return 0
        check_there(config, step)
        rank, _ = processes(os.environ)
        _check_device(step, config)
    except UserError as error:
        return _refuse(step, error, debug)
    stop.install()
    try:
        if rank != 0:
            return _follow(step, config, job)
        run = _open(step, config, ask)
        from pipeline.runs.run import log_to

        try:
            with log_to(run.folder):
                return _supervise(run, job)
        except UserError:
            if run.pending:
                run.discard()
            raise
    except UserError as error:
        return _refuse(step, error, config.debug)
    except Interrupted as error:
        return 128 + error.signum  # before the run, or after its end: nothing is lost


def _check_device(step: str, config: Config) -> None:
    """Raise UserError for a device that this machine lacks; without torch where there is nothing to ask."""
    if config.device in ("auto", "cpu"):
        return
    from pipeline.training.devices import DEVICELESS, device_of

    if step not in DEVICELESS:
        device_of(config)


def outside(step: str, argv: Sequence[str], act: Callable[[cli.Command], int]) -> int:
    """A command of a step that makes no run of its own; refusals are said as `execute` says them.

    Args:
        act: what it does; returns the exit code.
    """
    log_to_terminal()
    debug = "--debug" in argv
    try:
        command = cli.parse(argv)
        debug = command.debug
        return act(command)
    except Interrupted as error:
        return 128 + error.signum
    except Exception as error:
        said = understood(error, Path.cwd())
        if isinstance(said, UserError):
            return _refuse(step, said, debug)
        raise


def configuration(command: cli.Command, own: Collection[str] = ()) -> Config:
    """What a command line asks for, and the environment's shortcuts beneath it.

    Args:
        own: the step's own keys, for what is said of a misspelt one.

    Raises:
        UserError: it does not do.
    """
    try:
        found = shortcuts.read(os.environ, command.overrides)
        with tempfile.TemporaryDirectory(prefix="asib-fetched-") as folder:
            return compose(
                command.cfg,
                [*found.overrides, *command.overrides],
                lambda uri: _fetch(uri, command.overrides, Path(folder)),
                found.presets,
            )
    except UnknownKey as error:
        raise UnknownKey(error.name, own) from error


def _fetch(uri: str, overrides: Sequence[str], folder: Path) -> Path:
    """A file of a run for `cfg`, from where the overrides say that runs go. Raises UserError: it is not there."""
    from pipeline.tracking import start

    if re.fullmatch(r"runs:/+[^/]+/.*[^/]", uri) is None:
        raise UserError(f"cfg={uri}: give runs:/<run id>/<file>, such as runs:/<run id>/config.yaml")
    where = compose(None, [text for text in overrides if text.lstrip(" +~").startswith("tracking")]).tracking
    if where.mode == "offline":
        raise UserError(f"cfg={uri} lies on a tracking server, and tracking is off line: download it, give its path")
    try:
        path = start.fetch_now(where.uri or start.default_uri(), uri, folder)
    except UserError as error:
        raise UserError(f"cfg={uri}: {str(error).removeprefix(uri).lstrip(': ')}") from error
    if path.is_dir():
        raise UserError(f"cfg={uri} is a folder: give a YAML file in it")
    return path


def _show(config: Config, dry_run: Callable[[Config], str] | None) -> None:
    """DRY_RUN=1: the configuration as YAML, what would be done as a comment. Of several processes the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(dump(config), end="")
        if dry_run is not None:
            print("\n" + textwrap.indent(dry_run(config).rstrip(), "# "))


def _open(step: str, config: Config, ask: "Callable[[Delivery], None] | None") -> "Run":
    """The run; where its delivery is asked first and refuses, nothing is left of it. Raises UserError."""
    delivery = _asked(step, config, ask) if ask is not None else None
    from pipeline.runs.run import Run

    return Run.open(step, config, delivery)


def _asked(step: str, config: Config, ask: "Callable[[Delivery], None]") -> "Delivery":
    from pipeline.runs.folders import fresh_folder, writable
    from pipeline.tracking import start

    folder = fresh_folder(config, step)
    with writable(config):
        delivery = start.start_delivery(folder, uri=config.tracking.uri)
    try:
        ask(delivery)
    except (UserError, Interrupted):
        delivery.finish(0.0)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return delivery


def _call(job: str | Job, run: "Run") -> None:
    if isinstance(job, str):
        module, function = job.split(":")
        getattr(importlib.import_module(module), function)(run)
    else:
        job(run)


def _supervise(run: "Run", job: str | Job) -> int:
    from pipeline.training import distributed

    try:
        distributed.join()
        distributed.first_process_says(str(run.folder))
        _call(job, run)
    except (Interrupted, Exception) as raised:
        error = understood(raised, run.folder)
        if isinstance(error, UserError) and run.pending:
            raise error from raised
        if isinstance(error, UserError) and run.config.debug:
            traceback.print_exc()
        if isinstance(error, UserError | NonFinite):
            logger.error("%s", error)
        elif not isinstance(error, Interrupted):
            logger.error("the run failed", exc_info=error)
        ending = ending_of(error)
        run.close(*ending)
        if isinstance(error, Interrupted):
            _leave_mlflow_run()
        return ending.exit_code
    outcome, code = run.conclusion
    run.close("FINISHED", outcome, code)
    if code:
        _leave_mlflow_run()
    return code


def _follow(step: str, config: Config, job: str | Job) -> int:
    """Another process than torchrun's first: trains along, and leaves record and messages to the first."""
    from pipeline.runs.run import Run
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
    except NonFinite:
        return 1
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
            if str(second) != str(error):
                logger.error("%s", second)
    return 1 if isinstance(error, HelperFailed) else 2


def _fail_adopted_run(step: str, message: str) -> None:
    """A record of the refusal alone: there is no configuration whose parameters it could state."""
    from pipeline.journal import Journal
    from pipeline.tracking import start

    with tempfile.TemporaryDirectory(prefix="asib-refused-", ignore_cleanup_errors=True) as above:
        folder = Path(above) / step
        journal = Journal.create(folder, experiment="", name=None, tags={"asib.step": step})
        delivery = start.start_delivery(folder)
        journal.end("FAILED", "refused", 2, message)
        delivery.finish(60.0)


def _leave_mlflow_run() -> None:
    """`mlflow run` would overwrite KILLED, and a refusal's FINISHED, with FAILED: end it first (docs/tracking.md)."""
    kill_mlflow_run_parent()


def log_to_terminal() -> None:
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(secrets.Formatter("%(message)s"))
        logger.addHandler(handler)
        # torchrun's other processes would say the same
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
        logger.propagate = False
