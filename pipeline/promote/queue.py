"""One promotion of a registered model at a time: a queue in the model's tags.

A promotion joins with a tag of its own (tracking/turns.py), then reads the others. It gives up if an older one is
alive, and waits for younger ones, which may have read the queue before it joined. Two promotions that read at the same
time see each other, so they never both proceed; an older one never waits for a still older one, so none waits forever.
The times in the tags decide which is older, so that both agree even if their clocks differ.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from pipeline.errors import UserError
from pipeline.promote.registered_model import Registry, Waiting

logger = logging.getLogger("asib")

BEAT_S = 10.0
SILENT_S = 60.0
"""A promotion that has been silent for longer than this, or whose clock is further off, is watched."""
WATCH_S = 2.5 * BEAT_S
"""If it stays silent for this long while it is watched, it is dead."""
POLL_S = 0.5
WAIT_S = 600.0
"""The longest wait for a younger promotion that read the queue too early."""


@contextmanager
def turn(registry: Registry, run_id: str, user: str = "") -> Iterator[None]:
    """Hold the model's queue.

    Raises UserError: another promotion, which is named, came first; or this user may not promote.
    """
    registry.ask("join", run_id=run_id, user=user)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(registry, run_id, ended), name="promotion's heart", daemon=True)
    beat.start()
    try:
        _wait(registry, run_id)
        yield
    finally:
        ended.set()
        beat.join(2 * BEAT_S)
        with suppress(UserError):  # others then see that it is silent
            registry.ask("leave", run_id=run_id)


def _beat(registry: Registry, run_id: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with suppress(UserError):  # an outage, or being taken for dead, is reported where it matters
            registry.ask("beat", run_id=run_id)


def _wait(registry: Registry, run_id: str) -> None:
    deadline = time.monotonic() + WAIT_S
    told = False
    while True:
        others = living(registry, run_id)
        mine = next((k for k, other in enumerate(others) if other.run_id == run_id), None)
        if mine is None:
            raise _taken_for_dead(registry)
        if mine > 0:
            raise UserError(f"{words(registry.name, others[0])}: wait for it and start again")
        if len(others) == 1:
            return
        if time.monotonic() > deadline:
            raise UserError(f"{words(registry.name, others[1])}, for more than {WAIT_S:.0f} s: start again")
        if not told:
            logger.info("waiting: %s", words(registry.name, others[1]))
            told = True
        time.sleep(POLL_S)


def still_ours(registry: Registry, run_id: str) -> None:
    """Raise UserError, before aliases are moved, if this promotion was taken for dead: its machine may have slept."""
    if run_id not in [other.run_id for other in registry.queue()]:  # an older one that joined later waits
        raise _taken_for_dead(registry)


def _taken_for_dead(registry: Registry) -> UserError:
    return UserError(f"this promotion of {registry.name} was taken for dead and ended: start it again")


def refuse_if_busy(registry: Registry) -> None:
    """Raise UserError, before a run exists, if another promotion is clearly alive; it is named."""
    for other in registry.queue():
        if other.silent_s < SILENT_S:
            raise UserError(f"{words(registry.name, other)}: wait for it and start again")


def words(name: str, other: Waiting) -> str:
    by = f" by {other.user}" if other.user else ""
    return f"another promotion of {name} is under way, run {other.run_id}{by}"


def living(registry: Registry, run_id: str, sleep: Callable[[float], None] = time.sleep) -> Sequence[Waiting]:
    """The queue without dead promotions; `run_id` counts as alive, and a silent one is watched for a while."""
    before = registry.queue()
    doubtful = {other.run_id: other.seen for other in before if other.run_id != run_id and other.silent_s > SILENT_S}
    if not doubtful:
        return before
    logger.info("no sign of life from %s: watching for %.0f s", ", ".join(doubtful), WATCH_S)
    sleep(WATCH_S)
    after = registry.queue()
    dead = {other.run_id for other in after if doubtful.get(other.run_id) == other.seen}
    for silent in sorted(dead):
        logger.warning("the promotion of run %s gives no sign of life: removed from the queue", silent)
        registry.ask("mark_dead", run_id=silent)
    return [other for other in after if other.run_id not in dead]
