"""The delivery process: `MLFLOW_TRACKING_URI=… python -m pipeline.tracking.process --trainer <pid> [<folder>]`.

Started by `pipe.Delivery` in its own session. It imports MLflow so that the trainer need not, serves the
trainer over pipes (JSON lines: requests on stdin, events on stdout), and outlives it until the journal is delivered.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline import secrets
from pipeline.errors import UserError
from pipeline.tracking import server
from pipeline.tracking.faults import lasting
from pipeline.tracking.pipe import DELIVER

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from pipeline.tracking.follow import DeliveryLoop
    from pipeline.tracking.run_delivery import RunDelivery

log = logging.getLogger("asib.delivery")

POLL_S = 0.2
BACKOFF_S = (0.5, 30.0)
START_ATTEMPTS = 3
QUIET_S = 30.0  # give up on a journal that a process holds open but has not written to for this long


class Trainer:
    """The other end of the pipes, and whether it is still alive."""

    def __init__(self, pid: int, events: IO[str]) -> None:
        self._pid = pid
        self._events = events
        self.requests: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def dead(self) -> bool:
        """Whether the trainer is dead: the parent process changes at once, however it dies."""
        return os.getppid() != self._pid

    def tell(self, event: str, **values: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody is listening any more
            self._events.write(json.dumps({"event": event, **values}) + "\n")
            self._events.flush()

    def _listen(self) -> None:
        for line in sys.stdin:
            with contextlib.suppress(ValueError):
                self.requests.put(json.loads(line))


class Process:
    """The life of a delivery process."""

    def __init__(self, options: argparse.Namespace, trainer: Trainer) -> None:
        self.options = options
        self.trainer = trainer
        self._uri: str = options.uri  # already checked by `start_delivery`
        self._finishing = False
        self._leave_by = float("inf")
        self._client: MlflowClient | None = None
        self._loop: DeliveryLoop | None = None
        self._ready: bool = options.again

    def run(self) -> int:
        try:
            # a restarted process does not abandon its run over an outage
            self._client = server.connect(self._uri, answers=not self.options.again)
            self.trainer.tell("connected")
            if self.options.folder is None:
                while not self.trainer.dead() and not self._finishing:
                    self._answer(POLL_S)
                return 0
            from pipeline.tracking.follow import DeliveryLoop

            with DeliveryLoop(
                self.options.folder,
                self._uri,
                client=self._client,
                adopt=self.options.adopt,
                resume=self.options.resume,
                live=True,
                patience=90.0,
                on_attached=self._attached,
            ) as loop:
                for folder, upto in self.options.forgotten:
                    loop.top.forget(Path(folder), int(upto))
                return self._follow(loop)
        except UserError as error:
            log.error("%s", error)
            self.trainer.tell("refused", message=str(error))
            return 2

    def _follow(self, loop: DeliveryLoop) -> int:
        self._loop = loop
        pause, failures = BACKOFF_S[0], 0
        last_progress, last_change = loop.progress, time.monotonic()
        while True:
            dead = self.trainer.dead()
            if (dead or self._finishing) and not self._urgent():
                self._leave_by = time.monotonic() + self.options.grace
                pause = BACKOFF_S[0]
            if dead and loop.asked_to_leave():
                log.info("a newer delivery has asked for the folder")
                return 0
            loop.give_way(dead)
            # Asked before reading, so that nothing is written after the last read.
            abandoned = dead and (not loop.writer_alive() or time.monotonic() - last_change > QUIET_S)
            try:
                done = loop.run_once(final=abandoned)
                if abandoned or done:
                    loop.close_unfinished()
                pause, failures = BACKOFF_S[0], 0
                if self._finishing and not loop.top.attached:
                    return 0  # the step ended before its journal began
            except Exception as error:
                failures += 1
                self._failed(error, failures)
                if time.monotonic() > self._leave_by:
                    log.error("gave up; `%s %s` delivers the rest later", DELIVER, self.options.folder)
                    self.trainer.tell("finished", delivered=False, reason=server.explain(error, self._uri))
                    return 1
                self._answer(pause, leave_early=not self._urgent())
                pause = min(2 * pause, BACKOFF_S[1] if not self._urgent() else 5.0)
                continue
            if abandoned or (done and (self._finishing or dead)):
                self.trainer.tell("finished", delivered=True, refused=loop.refused)
                return 0
            if loop.progress != last_progress:
                last_progress, last_change = loop.progress, time.monotonic()
            self._answer(POLL_S)

    def _failed(self, error: Exception, failures: int) -> None:
        """Before the run exists, leave errors to the trainer; afterwards end only on what no retry can fix."""
        message = server.explain(error, self._uri)
        log.warning("attempt %d: %s", failures, message)
        refusal = lasting(error)
        denied = getattr(error, "error_code", "") in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")
        if self._ready:
            if refusal and isinstance(error, UserError):
                self.trainer.tell("finished", delivered=False, reason=str(error))
                raise error
            if refusal:
                log.error("unexpected", exc_info=error)
        elif refusal or denied or failures >= START_ATTEMPTS:
            raise error if isinstance(error, UserError) else UserError(message) from error

    def _urgent(self) -> bool:
        return self._leave_by != float("inf")

    def _attached(self, run: RunDelivery) -> None:
        state = run.state
        log.info("%s is run %s", run.folder, state.run_id)
        if not self._ready:
            self._ready = True
            self.trainer.tell("ready", run_id=state.run_id, experiment_id=state.experiment_id, url=state.url)

    def _answer(self, seconds: float, leave_early: bool = True) -> None:
        """Serve requests for some seconds; with `leave_early`, stop when the trainer dies."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                request = self.trainer.requests.get(timeout=min(left, POLL_S))
            except queue.Empty:
                if leave_early and self.trainer.dead():
                    return
                continue
            number, ask, values = request["id"], request["ask"], request["values"]
            if ask == "finish":
                self._finishing = True
                return
            assert self._client is not None
            answer = answer_to(self._client, self._loop, ask, values, request.get("again", False))
            self.trainer.tell("answer", id=number, **answer)


def answer_to(
    client: MlflowClient, loop: DeliveryLoop | None, ask: str, values: dict[str, Any], again: bool = False
) -> dict[str, Any]:
    """Answer a request; `again`: the process asked before was killed before it had answered."""
    from pipeline.tracking import aliases, requests  # MLflow, once its environment is prepared

    if ask == "forget":  # needs no answer from the server
        if loop is not None:  # otherwise nothing is followed
            loop.forget(Path(values["folder"]))
        return {"value": None}
    if again and ask == "move" and aliases.already_made(client, **values):
        return {"value": None}
    return requests.answer(client, ask, values)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pipeline.tracking.process", description=__doc__)
    parser.add_argument("folder", nargs="?", type=lambda text: Path(text).absolute())
    # By default from the environment: a URI may hold a password, and everyone can read a command line.
    parser.add_argument("--uri", default=os.environ.get("MLFLOW_TRACKING_URI", ""))
    parser.add_argument("--trainer", type=int, required=True, help="the process id of the trainer")
    parser.add_argument("--adopt", help="the run that `mlflow run` made")
    parser.add_argument("--resume", help="the run to continue")
    parser.add_argument("--grace", type=float, default=120.0, help="seconds to keep trying after the trainer has ended")
    parser.add_argument("--again", action="store_true", help="the run was on the server before this start")
    parser.add_argument("--forgotten", nargs=2, action="append", default=[], metavar=("FOLDER", "OFFSET"))
    options = parser.parse_args(arguments)
    # The real stdout is for events only; anything that a library prints goes into the log.
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(secrets.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # Ctrl-C, a job's SIGTERM and Slurm's warning, which reach every process of a job's step, are for the trainer,
    # which then writes its last entries.
    for name in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(5)
    server.prepare_environment()
    return Process(options, Trainer(options.trainer, events)).run()


if __name__ == "__main__":
    # Interpreter shutdown would wait for MLflow's threads, and we have nothing left to lose.
    code = main()
    logging.shutdown()
    os._exit(code)
