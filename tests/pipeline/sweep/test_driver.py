"""The time left, as the driver estimates it from the trials that the study has recorded."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.sweep.driver import time_left
from pipeline.sweep.study.retry import REPEATS


def trial(seconds: float, state: TrialState = TrialState.COMPLETE, **notes: int) -> FrozenTrial:
    """A trial that took that many seconds."""
    made = create_trial(state=state, value=1.0 if state == TrialState.COMPLETE else None, user_attrs=notes)
    made.datetime_start = datetime(2026, 1, 1)
    made.datetime_complete = made.datetime_start + timedelta(seconds=seconds)
    return made


@pytest.mark.parametrize(
    ("trials", "left", "workers", "said"),
    [
        ([trial(23)], 29, 2, "one trial took 23 s: about 6 min left with 2 workers"),  # 15 rounds of 23 s
        ([trial(23)], 1, 4, "one trial took 23 s: about 23 s left with 1 worker"),
        (
            [trial(600), trial(1200, TrialState.PRUNED)], 24, 1,
            "a trial takes 15 min on average: about 6.0 h left with 1 worker",
        ),
        (
            [trial(23), trial(0, TrialState.COMPLETE, **{REPEATS: 0}), trial(90, TrialState.FAIL)], 2, 2,
            "one trial took 23 s: about 23 s left with 2 workers",
        ),
        ([trial(90, TrialState.FAIL)], 5, 2, None),
        ([trial(23)], 0, 2, None),
    ],
)  # fmt: skip
def test_the_time_left_follows_from_the_trials_that_ran(
    trials: list[FrozenTrial], left: int, workers: int, said: str | None
) -> None:
    assert time_left(trials, left, workers) == said
