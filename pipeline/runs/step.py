"""The life of a step's process: arguments, configuration, the run, signals, and the exit code that says how it ended.

Torch is imported only after the configuration has been checked, as far as that needs neither data nor networks (or
when an environment variable names a network, since only the zoo knows those).
"""

import logging
import os
import pkgutil
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from pipeline import extras
from pipeline.compose import cli, shortcuts
from pipeline.compose.compose import compose, dump
from pipeline.compose.help import USUAL, step_help
from pipeline.config import Config, UnknownKey
from pipeline.config.numbers import processes
from pipeline.config.places import check_there
from pipeline.errors import Interrupted, NonFinite, UserError
from pipeline.runs import machine, notify, run_log
from pipeline.runs.ending import COMPLETED, Ending, as_user_error, ending_of
from pipeline.runs.mlflow_run import kill_mlflow_run_parent
from pipeline.runs.naming import name_of_refused
from pipeline.runs.run_log import log_to, log_to_terminal
from pipeline.runs.signals import Stop

if TYPE_CHECKING:
    from pipeline.runs.run import Run
    from pipeline.tracking.pipe import Delivery, Ready

logger = logging.getLogger("asib")
Target = TypeVar("Target")
Late: TypeAlias = str | Target


class Done(NamedTuple):
    """A step that has ended."""

    exit_code: int
    ending: Ending | None = None
    """Of its run; None without one."""
    folder: Path | None = None
    """That run's."""
    tracked: "Ready | None" = None
    """Where it is on the tracking server, if it got there."""
    error: BaseException | None = None
    """What ended it before its job was done."""


@dataclass(frozen=True)
class Step:
    """A step, as its file in steps/ declares it. References are "module:name" and imported late, or functions.

    Attributes:
        name: used for folders, tags and `--help`.
        about: what `--help` begins with: the docstring of the step's file.
        own: the step's own keys, with descriptions; one that ends with a dot covers every key with that prefix.
        request: turns the configuration and the command line into the run's configuration and the job's request
            (None: no request); raises UserError.
        job: takes the run, and the request if there is one; an `Ending` that it returns is the run's.
        words: describes a request; DRY_RUN=1 prints it below the configuration.
        ask: given request, configuration and delivery, checks the input against the tracking server before there is
            a run; raises UserError.
        act: given the configuration and the command line, does work that needs no run and returns the exit code;
            None: a run is needed.
        keys: those of the configuration that `--help` shows.
        cfg: names the step's configuration, given its own keys, where `cfg` is not given.
        short: those of its own keys that stand for one of the configuration.
    """

    name: str
    about: str | None = None
    own: Mapping[str, str] = field(default_factory=dict)
    request: "Late[Callable[[Config, cli.Command], tuple[Config, Any]]] | None" = None
    job: "Late[Callable[..., Ending | float | None]]" = ""
    words: Callable[[Any], str] | None = None
    ask: "Callable[[Any, Config, Delivery], None] | None" = None
    act: "Late[Callable[[Config, cli.Command], int | None]] | None" = None
    keys: tuple[str, ...] = USUAL
    cfg: Callable[[Mapping[str, str]], str] | None = None
    short: Mapping[str, str] = field(default_factory=dict)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the step from its command line (by default the process's), and return the exit code.

        0 completed, 2 refused (bad input), 1 failed, 143 and 130 after SIGTERM and SIGINT, or the job's `Ending`'s.
        """
        log_to_terminal()
        try:
            done = self.call(sys.argv[1:] if argv is None else argv)
        except Interrupted as error:
            return 128 + error.signum  # before the run or after its end, so nothing is lost
        except UserError as error:
            return _refuse(self.name, error)
        if done.exit_code and done.ending is not None and done.ending.status != "FAILED":
            # it would overwrite KILLED, or a refusal's FINISHED, with FAILED (docs/tracking.md)
            kill_mlflow_run_parent()
        return done.exit_code

    def call(self, arguments: Sequence[str]) -> Done:
        """Run the step in a process that lives on.

        Raises:
            UserError: refused before there was a run; what ended a run is in the returned `Done`.
            Interrupted: by a signal, before there was a run.
        """
        debug = "--debug" in arguments or "debug=true" in arguments  # until the arguments are parsed
        try:
            own = {**self.own, **(notify.OWN if self.job else {})}
            command = cli.parse(arguments, own)
            debug = command.debug
            if command.help is not None:
                print(step_help(self.name, self.about or "", own, self.keys, command), end="")
                return Done(0)
            command, address = notify.taken(command, bool(self.job))
            if self.cfg is not None and command.cfg is None:
                command = replace(command, cfg=self.cfg(command.own))
            given = [f"{key}={command.own[name]}" for name, key in self.short.items() if command.own.get(name)]
            left = {name: value for name, value in command.own.items() if name not in self.short}
            command = replace(command, own=left, overrides=(*given, *shortcuts.named_teachers(command.overrides)))
            config = configuration(command, own)
            debug = config.debug
            with notify.kept(address):
                code = None if self.act is None else _late(self.act)(config, command)
                return self._run(config, command) if code is None else Done(code)
        except Exception as error:
            said = extras.explained(error, self.name) or as_user_error(error, Path.cwd())
            if not isinstance(said, UserError):
                raise
            if debug:
                traceback.print_exception(said)
            if said is error:
                raise
            raise said from error

    def _run(self, config: Config, command: cli.Command) -> Done:
        request = None
        if self.request is not None:
            config, request = _late(self.request)(config, command)
        if shortcuts.wants_dry_run(os.environ):
            if os.environ.get("RANK", "0") == "0":
                print(dump(config), end="")
                if self.words is not None and (plan := self.words(request)):
                    print("\n" + textwrap.indent(plan.rstrip(), "# "))
            return Done(0)
        run_log.configure(config.log)
        check_there(config, self.name)
        rank, _ = processes(os.environ)
        if config.device not in ("auto", "cpu"):
            from pipeline.training.devices import DEVICELESS, device_of  # late: it imports torch

            if self.name not in DEVICELESS:
                device_of(config)  # refuses one that this machine lacks
        stop = Stop()
        stop.install()
        given = () if request is None else (request,)
        if rank != 0:
            return _follow(self.name, config, stop, lambda run: _late(self.job)(run, *given))
        delivery = None if self.ask is None else _asked(self.name, config, partial(self.ask, request, config))
        from pipeline.runs.opening import open_run  # late, like the job: it imports torch

        run = open_run(self.name, config, delivery, stop, command)
        try:
            with log_to(run.folder):
                return _supervise(run, lambda run: _late(self.job)(run, *given))
        except UserError:
            if run.pending:
                run.discard()
            raise


def _late(target: "Late[Target]") -> "Target":
    """The function that "module:name" names."""
    return pkgutil.resolve_name(target) if isinstance(target, str) else target


def configuration(command: cli.Command, own: Collection[str] = ()) -> Config:
    """The configuration from the command line, with the environment's shortcuts beneath it. Raises UserError.

    `own`: the step's own keys, for suggestions when one is misspelt.
    """
    try:
        rows = command.own.get("methods", "") if "methods" in own else None
        found = shortcuts.read(os.environ, command.overrides, rows)
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
    """A file of a run for `cfg`, from wherever the overrides send runs. Raises UserError: it does not exist."""
    from pipeline.tracking import start

    if re.fullmatch(r"runs:/+[^/]+/.*[^/]", uri) is None:
        raise UserError(f"cfg={uri}: give runs:/<run id>/<file>, such as runs:/<run id>/config.yaml")
    where = compose(None, [text for text in overrides if text.lstrip(" +~").startswith("tracking")]).tracking
    if where.mode == "offline":
        raise UserError(f"cfg={uri} lies on a tracking server, and tracking is offline: download it, give its path")
    try:
        path = start.fetch_now(where.uri or start.default_uri(), uri, folder)
    except UserError as error:
        raise UserError(f"cfg={uri}: {str(error).removeprefix(uri).lstrip(': ')}") from error
    if path.is_dir():
        raise UserError(f"cfg={uri} is a folder: give a YAML file in it")
    return path


def _asked(step: str, config: Config, ask: "Callable[[Delivery], None]") -> "Delivery":
    """Start a new run's delivery and ask it; a refusal leaves nothing behind. Raises UserError."""
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


def _supervise(run: "Run", job: "Callable[[Run], Ending | float | None]") -> Done:
    """Run the job, and end the run the way the job ended."""
    from pipeline.training import distributed

    found: Ending | float | None = None
    error: BaseException | None = None
    try:
        distributed.join()
        distributed.first_process_says(str(run.folder))
        with machine.watched(run):
            found = job(run)
        ending = found if isinstance(found, Ending) else COMPLETED
    except (Interrupted, Exception) as raised:
        error = extras.explained(raised, run.step) or as_user_error(raised, run.folder)
        if isinstance(error, UserError) and run.pending:
            raise error from raised
        if isinstance(error, UserError) and run.config.debug:
            traceback.print_exc()
        if isinstance(error, UserError | NonFinite):
            logger.error("%s", error)
        elif not isinstance(error, Interrupted):
            logger.error("the run failed", exc_info=error)
        ending = ending_of(error)
    run.close(ending)
    notify.ended(run, ending, found if isinstance(found, float) else None)
    tracked = None
    with suppress(UserError):
        tracked = run.delivery.wait_ready(0) if run.delivery is not None else None
    return Done(ending.exit_code, ending, run.folder, tracked, error)


def _follow(step: str, config: Config, stop: Stop, job: "Callable[[Run], Ending | float | None]") -> Done:
    """Train in a process other than torchrun's first, which alone keeps the record and prints."""
    from pipeline.runs.opening import follow
    from pipeline.training import distributed

    logger.setLevel(logging.ERROR)
    distributed.join()
    run = follow(step, config, Path(distributed.first_process_says("")), stop=stop)
    try:
        job(run)
    except (Interrupted, UserError, NonFinite) as error:
        return Done(ending_of(error).exit_code, folder=run.folder, error=error)
    return Done(0, folder=run.folder)


def _refuse(step: str, error: UserError) -> int:
    """Report bad input in one line, before there is a run; a run that `mlflow run` made ends FAILED with that line."""
    logger.error("%s", error)
    if os.environ.get("MLFLOW_RUN_ID"):
        try:
            _fail_adopted_run(step, str(error))
        except UserError as second:
            if str(second) != str(error):
                logger.error("%s", second)
    return ending_of(error).exit_code


def _fail_adopted_run(step: str, message: str) -> None:
    """Record the refusal alone: there is no configuration whose parameters could be logged."""
    from pipeline.journal import Journal
    from pipeline.tracking import start

    with tempfile.TemporaryDirectory(prefix="asib-refused-", ignore_cleanup_errors=True) as above:
        folder = Path(above) / step
        name, tags = name_of_refused(step, message), {"asib.step": step}
        journal = Journal.create(folder, experiment="", name=None, usual_name=name, tags=tags)
        delivery = start.start_delivery(folder)
        journal.end("FAILED", "refused", 2, message)
        delivery.finish(60.0)
