"""One promotion of a registered model at a time: they form a queue, in tags of the model.

A promotion joins with a tag of its own (tracking/turns.py), then looks at the others. It gives way to a living one that
is older, and waits for younger ones, of which one may have looked before this one had joined: two promotions that look
at the same time see each other, so that never both go on. Older never waits for older, and so nobody waits for ever.
Which of two is older, the times in their tags decide, so that both see it alike, however their clocks differ.
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
"""A promotion that has not said for so long that it lives, or whose clock differs by so much, is watched."""
WATCH_S = 2.5 * BEAT_S
"""If it says nothing in this time either, it is dead."""
POLL_S = 0.5
WAIT_S = 600.0
"""How long a younger promotion, which has looked too early, is waited for."""


@contextmanager
def turn(registry: Registry, run_id: str, user: str = "") -> Iterator[None]:
    """Hold the model's queue.

    Raises:
        UserError: another promotion, which is named, was there before; or this user may not promote.
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
        with suppress(UserError):  # then it is found without a sign of life
            registry.ask("leave", run_id=run_id)


def _beat(registry: Registry, run_id: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with suppress(UserError):  # a server that is away, and having been taken for dead, are said where it matters
            registry.ask("beat", run_id=run_id)


def _wait(registry: Registry, run_id: str) -> None:
    deadline = time.monotonic() + WAIT_S
    told = False
    while True:
        others = living(registry, run_id)
        mine = next((k for k, other in enumerate(others) if other.run_id == run_id), None)
        if mine is None:
            raise UserError(f"this promotion of {registry.name} was taken for dead and ended: start it again")
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
    """Before aliases are moved: a machine that was asleep may have been taken for dead.

    Raises:
        UserError: it was.
    """
    if run_id not in [other.run_id for other in registry.queue()]:  # an older one that joined later waits
        raise UserError(f"this promotion of {registry.name} was taken for dead and ended: start it again")


def refuse_if_busy(registry: Registry) -> None:
    """Before there is a run: somebody else's promotion is plainly alive. Raises UserError, which names it."""
    for other in registry.queue():
        if other.silent_s < SILENT_S:
            raise UserError(f"{words(registry.name, other)}: wait for it and start again")


def words(name: str, other: Waiting) -> str:
    by = f" by {other.user}" if other.user else ""
    return f"another promotion of {name} is under way, run {other.run_id}{by}"


def living(registry: Registry, run_id: str, sleep: Callable[[float], None] = time.sleep) -> Sequence[Waiting]:
    """The queue without promotions whose machine is gone; one in doubt is watched for a while.

    Args:
        run_id: this promotion's own, which lives.
    """
    before = registry.queue()
    doubtful = {other.run_id: other.seen for other in before if other.run_id != run_id and other.silent_s > SILENT_S}
    if not doubtful:
        return before
    logger.info("no sign of life of %s: watching for %.0f s", ", ".join(doubtful), WATCH_S)
    sleep(WATCH_S)
    after = registry.queue()
    dead = {other.run_id for other in after if doubtful.get(other.run_id) == other.seen}
    for silent in sorted(dead):
        logger.warning("the promotion of run %s has given no sign of life: it is out of the queue", silent)
        registry.ask("mark_dead", run_id=silent)
    return [other for other in after if other.run_id not in dead]
