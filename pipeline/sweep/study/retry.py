"""Trials whose worker is gone: found, failed, and queued again; and how many trials of each kind there are.

Everything here is called with the study's lock held, and may be killed between any two statements: `requeue_stale`
finishes the rest.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

OUTCOME = "asib.outcome"
"""Note, written by a trial's own worker just before ending it: one of these, pruned or repeated."""
FAILED, RELEASED = "failed", "released"
WORKER = "asib.worker"
"""Note: who runs it. Written after the last parameter was suggested: without it the parameters may be incomplete."""
REPEATS = "asib.repeats"
"""Note: the number of the trial of the same configuration, whose result this one got without running."""
ERROR = "asib.error"
SEEDS = "seeds"
"""Note of trials with several seeds: `metrics`, `seconds`, `folder`, `run_id` of each seed that has ended."""
STD = "std"
"""Note of trials with several seeds: the standard deviation of each objective over them."""
OF_ATTEMPT = (OUTCOME, REPEATS, ERROR, "asib.reason", "asib.epoch", "asib.seed")
"""Notes that a retry does not inherit."""
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.FAIL: "failed",
}
"""Names of trial states."""
CRASHES = "asib:crashes"
"""System attribute: how many of a trial's attempts before this one have died."""

NEVER_BEAT = sqlalchemy.text(
    "SELECT trials.trial_id FROM trials LEFT JOIN trial_heartbeats ON trials.trial_id = trial_heartbeats.trial_id "
    "WHERE trials.study_id = :study AND trials.state = 'RUNNING' AND trial_heartbeats.trial_id IS NULL"
)


@dataclass(frozen=True)
class Counts:
    """Trials by state. `failed`: those that are not tried again; `retried`: those that another trial has replaced."""

    complete: int = 0
    pruned: int = 0
    running: int = 0
    waiting: int = 0
    failed: int = 0
    retried: int = 0

    @property
    def used(self) -> int:
        """Trials that count towards the total."""
        return self.complete + self.pruned + self.running + self.waiting + self.failed

    @property
    def ended(self) -> int:
        """Trials that have ended for good."""
        return self.complete + self.pruned + self.failed


def history(trial: FrozenTrial) -> list[int]:
    """The numbers of the attempts before this one, first to last."""
    return list(trial.system_attrs.get("retry_history", []))


def replaced(trials: Iterable[FrozenTrial]) -> set[int]:
    """The numbers of the trials that a later attempt continues."""
    return {number for trial in trials for number in history(trial)}


def count(trials: Sequence[FrozenTrial]) -> Counts:
    """Count each trial once, by its state."""
    old = replaced(trials)
    return Counts(**Counter("retried" if t.number in old else STATES[t.state] for t in trials))


def requeue_stale(study: optuna.Study, rdb: RDBStorage, max_retry: int) -> list[FrozenTrial]:
    """Fail the trials whose heartbeat has stopped, queue again those that may be retried, and return all trials."""
    optuna.storages.fail_stale_trials(study)
    # A trial's first heartbeat is written under the lock that its claim holds, and we hold it now: whoever claimed a
    # trial that has none is dead.
    with rdb.engine.connect() as connection:
        dead = connection.execute(NEVER_BEAT, {"study": rdb.get_study_id_from_name(study.study_name)}).scalars().all()
    for trial_id in dead:
        with contextlib.suppress(UpdateFinishedTrialError):
            rdb.set_trial_state_values(trial_id, TrialState.FAIL)
    trials = study.get_trials(deepcopy=False)
    old = replaced(trials)
    due = [t for t in trials if t.state == TrialState.FAIL and t.number not in old and _may_retry(t, max_retry)]
    for trial in due:
        queue_again(study, trial)
    return study.get_trials(deepcopy=False) if due else trials


def _may_retry(trial: FrozenTrial, max_retry: int) -> bool:
    outcome = trial.user_attrs.get(OUTCOME)
    # A trial that was to be pruned but is FAIL died in between.
    return outcome == RELEASED or (outcome != FAILED and _crashes(trial) < max_retry)


def _crashes(trial: FrozenTrial) -> int:
    return int(trial.system_attrs.get(CRASHES, 0))


def queue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Add a WAITING trial with what `trial` had, through Optuna's own callback."""
    again = copy.deepcopy(trial)  # Optuna returned its own cache
    crashed = trial.user_attrs.get(OUTCOME) != RELEASED
    again.user_attrs = {key: value for key, value in again.user_attrs.items() if key not in OF_ATTEMPT}
    again.system_attrs = {k: v for k, v in again.system_attrs.items() if not k.startswith("constraints")}
    if WORKER not in trial.user_attrs:
        # Its worker died while parameters were suggested: all are suggested again, from the same random numbers.
        again.params, again.distributions = {}, {}
        kept = ("failed_trial", "retry_history", "fixed_params", CRASHES)
        again.system_attrs = {key: again.system_attrs[key] for key in kept if key in again.system_attrs}
    again.system_attrs[CRASHES] = _crashes(again) + crashed
    RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, again)
