"""One trial held by one worker, with a heartbeat from the claim to its end."""

import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import Taken
from pipeline.sweep.space.space import SweepConfig
from pipeline.sweep.study.retry import ERROR, FAILED, OUTCOME, RELEASED, REPEATS, SEEDS, STD, history, queue_again
from pipeline.sweep.study.stopping import report_scores
from pipeline.sweep.study.storage import Database, is_away

logger = logging.getLogger("asib.study")
ERROR_LENGTH = 2000


class Claim:
    """A RUNNING trial of this worker; made by `Study.claim`, which has written its first heartbeat.

    Every method raises `Taken` once the trial is no longer RUNNING: we were silent for longer than the grace time, and
    another worker has it. A brief outage of the database loses reports, which the pruner can do without; the
    methods that end the trial wait for it (`Database.patiently`).

    Attributes:
        number: the trial's own. origin: the number of its first attempt; attempt: how many attempts preceded this one.
        values: what to apply to the configuration. notes: its user attributes, inherited by the next attempt.
        reached: the last epoch that earlier attempts have reported.
    """

    def __init__(
        self,
        database: Database,
        study: optuna.Study,
        sweep: SweepConfig,
        trial: optuna.Trial,
        trial_id: int,
        as_stored: FrozenTrial,
        values: dict[str, Any],
    ) -> None:
        self._database, self._study, self._sweep, self._trial = database, study, sweep, trial
        self._id = trial_id
        self.number = trial.number
        self.origin = [*history(as_stored), trial.number][0]
        self.attempt = len(history(as_stored))
        self.values = values
        self.notes: dict[str, Any] = dict(as_stored.user_attrs)
        self.reached = max(as_stored.intermediate_values, default=None)
        self._epoch: int | None = None
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"heartbeat of trial {self.number}", daemon=True)
        self._heart.start()

    # while it runs ---------------------------------------------------------------------------------------------------

    def note(self, **values: Any) -> None:
        """Write user attributes of the trial (JSON values)."""

        def write() -> None:
            for key, value in values.items():
                self._trial.set_user_attr(key, value)

        try:
            self._database.patiently(write)
        except UpdateFinishedTrialError:
            raise self._taken() from None
        self.notes.update(values)

    def same_as(self, config_hash: str) -> FrozenTrial | None:
        """The first trial that ended, COMPLETE or PRUNED, with this in its note `config_hash`."""
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        trials = self._database.patiently(lambda: self._study.get_trials(deepcopy=False, states=ended))
        return next((t for t in trials if t.user_attrs.get("config_hash") == config_hash), None)

    def report(self, value: float, epoch: int) -> None:
        """Report the single objective after `epoch` (from 0), for the pruner; with several seeds after each seed."""
        self.check()
        self._epoch = epoch
        try:
            # Trial.report would ignore an epoch that an earlier attempt has reported, with a warning.
            self._database.rdb.set_trial_intermediate_value(self._id, epoch, value)
        except UpdateFinishedTrialError:
            raise self._taken() from None
        except Exception as error:
            self._ignore_outage(error)

    def should_prune(self) -> bool:
        """The pruner's answer after the last report, or on what earlier attempts have reported."""
        try:
            trial = self._frozen()
            if trial.state != TrialState.RUNNING:
                raise self._taken()
            if self._epoch is not None:  # an earlier attempt may have got further than our checkpoint
                reported = trial.intermediate_values.items()
                trial.intermediate_values = {epoch: value for epoch, value in reported if epoch <= self._epoch}
            return self._study.pruner.prune(self._study, trial)
        except Taken:
            raise
        except Exception as error:
            self._ignore_outage(error)
            return False

    def check(self) -> None:
        """Raise `Taken` if another worker has the trial now."""
        try:
            running = self._database.state(self._id) == TrialState.RUNNING
        except Exception as error:
            self._ignore_outage(error)
            return
        if not running:
            raise self._taken()

    # its end ---------------------------------------------------------------------------------------------------------

    def complete(self, values: Sequence[float], constraints: Sequence[float] = ()) -> None:
        """Record the metrics of the sweep's objectives and constraints.

        An objective that is not a number is a failure: no sampler could learn from it.
        """
        bad = [o.metric for o, value in zip(self._sweep.objectives, values, strict=True) if math.isnan(value)]
        if bad:
            self.fail(f"{bad[0]} is not a number")
            return
        beyond = [c.violation(value) for c, value in zip(self._sweep.constraints, constraints, strict=True)]
        self._complete([float(value) for value in values], beyond)

    def repeat(self, twin: FrozenTrial) -> None:
        """End as `twin`, which has the same configuration, has ended: same state, values and constraints."""
        of_seeds = {name: twin.user_attrs[name] for name in (SEEDS, STD) if name in twin.user_attrs}
        self.note(**{OUTCOME: "repeated", REPEATS: twin.number}, **of_seeds)
        if twin.state == TrialState.COMPLETE:
            self._complete(list(twin.values), list(twin.constraints.values()))
            return

        def end() -> None:
            for epoch, value in twin.intermediate_values.items():
                self._database.rdb.set_trial_intermediate_value(self._id, epoch, value)
            self._study.tell(self.number, state=TrialState.PRUNED)

        self._end(end, TrialState.PRUNED)

    def prune(self, reason: str, at: int, unit: str = "epoch") -> None:
        """End it as pruned after an epoch or a seed."""
        self.note(**{OUTCOME: "pruned", "asib.reason": reason, f"asib.{unit}": at})
        self._end(lambda: self._study.tell(self.number, state=TrialState.PRUNED), TrialState.PRUNED)

    def fail(self, error: str) -> None:
        """End it as failed through its own configuration: it is not retried, and counts towards the total."""
        self.note(**{OUTCOME: FAILED, ERROR: error[:ERROR_LENGTH]})
        self._end(lambda: self._study.tell(self.number, state=TrialState.FAIL), TrialState.FAIL)

    def release(self) -> None:
        """Leave the trial to another worker at once; it does not count as a crash."""

        def end() -> None:
            self._study.tell(self.number, state=TrialState.FAIL)
            queue_again(self._study, self._frozen())

        self.note(**{OUTCOME: RELEASED})
        self._end(end, TrialState.FAIL)

    # -----------------------------------------------------------------------------------------------------------------

    def _complete(self, values: Sequence[float], constraints: Sequence[float]) -> None:
        metric = self._sweep.objectives[0].metric

        def end() -> None:
            for i, value in enumerate(constraints):
                self._trial.set_constraint(str(i), value)
            report_scores(self._trial, [seed["metrics"][metric] for seed in self.notes.get(SEEDS, ())])
            self._study.tell(self.number, list(values))

        self._end(end, TrialState.COMPLETE)

    def _end(self, end: Callable[[], object], state: TrialState) -> None:
        """Write the end under the lock: nobody may take over the trial between our look at its state and the write."""
        tried = False

        def locked() -> None:
            nonlocal tried
            with self._database.lock(self._study.study_name):
                present = self._database.state(self._id)
                if tried and present == state:  # the end was written, and only the answer was lost
                    return
                if present != TrialState.RUNNING:
                    raise self._taken()
                tried = True
                end()

        try:
            self._database.patiently(locked)
        finally:
            self._ended.set()
            self._heart.join()

    def _frozen(self) -> FrozenTrial:
        return self._database.rdb.get_trial(self._id)

    def _taken(self) -> Taken:
        self._ended.set()
        return Taken(f"trial {self.number} of {self._study.study_name} is another worker's by now")

    def _ignore_outage(self, error: Exception) -> None:
        """Continue despite an outage of the database; raise anything else."""
        if not is_away(error):
            raise error
        logger.warning("trial %d continues without its study: %s", self.number, self._database.explain(error))

    def _beat(self) -> None:
        while not self._ended.wait(self._sweep.heartbeat_seconds):
            try:
                self._database.rdb.record_heartbeat(self._id)
                self._database.rest()
            except Exception as error:  # the next heartbeat may get through
                logger.warning("heartbeat of trial %d: %s", self.number, self._database.explain(error))
        self._database.rdb.remove_session()
