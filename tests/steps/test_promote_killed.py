"""Promotions in processes of their own: two at once, and killed at any moment."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import subprocess
import time
from collections import Counter

import psutil
import pytest
import sqlalchemy

from pipeline.promote import queue
from tests.pipeline.promote.history import history
from tests.steps.desk import LAX, NAME, Desk, runs_of
from tests.steps.lab import client, deliver


@pytest.mark.slow
def test_of_two_promotions_at_once_one_promotes(desk: Desk) -> None:
    """Two processes, each with a delivery of its own: whoever loses is told in one line, and no move is half done."""
    desk.register("half")
    own = [f"name={NAME}", "tracking.mode=online", f"tracking.uri={desk.uri}"]
    logs = [desk.lab.folder / f"{number}.log" for number in range(2)]
    both = [desk.lab.start("promote", *own, log=log) for log in logs]
    codes = [process.wait(300) for process in both]
    said = [log.read_text() for log in logs]
    assert sorted(codes) == [0, 2], said
    loser = said[codes.index(2)]
    assert "another promotion of stripes is under way" in loser or "champion already" in loser
    assert desk.aliases == {"challenger": "1", "champion": "1"}
    assert desk.tags(1)["asib.history"].count("\n") == 0


class Forked:
    """A promotion in a fork of this process, which has imported everything; its delivery is in it."""

    def __init__(self, desk: Desk) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=promote_alone, args=(desk,))
        self._process.start()

    def ended(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self, draw: random.Random) -> str:
        self._process.kill()
        self._process.join()
        return "both"


class Real:
    """A step with a delivery in a process of its own: either is killed, or both."""

    def __init__(self, desk: Desk) -> None:
        own = [f"name={NAME}", "version=2", *LAX, "tracking.mode=online", f"tracking.uri={desk.uri}"]
        self._process = desk.lab.start("promote", *own)
        self._all = psutil.Process(self._process.pid)

    def ended(self, seconds: float) -> int | None:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self, draw: random.Random) -> str:
        try:
            helpers = self._all.children(recursive=True)
        except psutil.NoSuchProcess:
            helpers = []
        which = draw.choice(["both", "step", "delivery"])
        if which != "delivery":
            self._process.kill()
        if which != "step":
            for helper in helpers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    helper.kill()
        self._process.wait(300)  # of a delivery that was killed the step makes another
        psutil.wait_procs(helpers, 300)  # a delivery outlives its step until everything is on the server
        return which


@pytest.mark.slow
@pytest.mark.parametrize("start", [Forked, Real])
def test_promotions_killed_at_any_moment_are_finished_once(
    desk: Desk, start: type[Forked] | type[Real], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of a step and its delivery, then once more: promoted, said once in each history, nothing left over.

    ASIB_ROUNDS=20 kills twenty. Moments are drawn from what an undisturbed promotion takes.
    """
    rounds, draw = int(os.environ.get("ASIB_ROUNDS", "3" if start is Forked else "1")), random.Random(0)
    monkeypatch.setattr(queue, "SILENT_S", 0.0)  # of the step that comes after, which finds the dead one in the queue
    monkeypatch.setattr(queue, "WATCH_S", 0.2)
    desk.register("half", "good")
    assert desk.promote("version=1").code == 0
    took, reached = 0.0, Counter[str]()
    undisturbed = 2 if start is Forked else 1  # the second fork is as fast as those that follow
    for k in range(rounds + undisturbed):
        began, before = time.monotonic(), set(desk.lab.run_folders())
        process = start(desk)
        if k < undisturbed:
            assert process.ended(300) == 0
            took = time.monotonic() - began
        else:
            process.ended(took * draw.uniform(0.05, 1.0))
            killed = process.kill(draw)
            new = [p for p in set(desk.lab.run_folders()) - before if (p / "journal.jsonl").exists()]
            tags = client(desk.uri).get_registered_model(NAME).tags
            queued = any(tag.startswith("asib.turn") for tag in tags)
            moving = "asib.move" in tags or desk.aliases["champion"] == "2"
            stages = {"ended": process.ended(0) == 0, "moving": moving, "in its turn": queued, "with a run": bool(new)}
            reached[f"{killed} {next((name for name, there in stages.items() if there), 'without a run')}"] += 1
            done = desk.promote("version=2", *LAX)
            assert done.code == 0 or "champion already" in done.err, done.err
            if new:
                deliver(desk.uri, *new)
        assert desk.aliases == {"challenger": "2", "champion": "2", "previous": "1"}
        store = client(desk.uri)
        left = store.get_registered_model(NAME).tags.keys()
        assert not [tag for tag in left if tag.startswith(("asib.move", "asib.turn", "asib.look."))], left
        assert not desk.tags(2).get("asib.pending")
        lines = [history(desk.tags(n)) for n in (1, 2)]
        assert sum("replaced as champion by version 2" in line for line in lines[0]) == k + 1
        assert sum("promoted over version 1" in line for line in lines[1]) == k + 1
        assert "RUNNING" not in {store.get_run(run).info.status for run in runs_of(desk)}
        assert desk.promote("rollback=true").code == 0
        store.set_model_version_tag(NAME, "2", "asib.rolled_back", "")
    print(f"{rounds} kills: {dict(reached)}")


def promote_alone(desk: Desk) -> None:
    """In a fork: with connections to the database of its own."""
    for engine in [found for found in gc.get_objects() if isinstance(found, sqlalchemy.Engine)]:
        engine.dispose(close=False)
    os._exit(desk.promote("version=2", *LAX).code)
