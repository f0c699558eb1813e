"""A sweep's study. Any number of workers on any machines claim its trials, but never too many of them.

    study = Study.create(url, name, sweep, facts)      # the driver; continues an existing one
    study = Study.open(url, name)                      # a worker
    while (claim := study.claim("worker 3")) is not None:
        claim.complete([train(claim.values)])

What decides how many trials there are (counting, claiming, ending, taking over) happens with the study's lock held, so
that totals are exact. The sampler of a claim is seeded by how many configurations there were before it: what is
suggested does not depend on which worker asks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from pipeline.config.words import near_miss, shown
from pipeline.errors import UserError
from pipeline.sweep.space.space import SEARCH, SweepConfig, grid, suggest
from pipeline.sweep.study import retry, samplers, stopping
from pipeline.sweep.study.claim import Claim
from pipeline.sweep.study.front import front
from pipeline.sweep.study.retry import ERROR, REPEATS, WORKER, Counts
from pipeline.sweep.study.storage import Database, database_url
from pipeline.tracking.server import sqlite_file

SWEEP, DIGEST = "sweep", "digest"
"""The facts that identify a study as this program's; the digest is written last."""


class Study:
    """Made by `create` or `open`.

    Attributes:
        optuna: Optuna's own study, for pictures and tables. Its trials are ended through claims only.
    """

    def __init__(self, database: Database, name: str, sweep: SweepConfig) -> None:
        self.name, self.sweep = name, sweep
        self._database = database
        self._cache = optuna.storages.get_storage(database.rdb)
        self.optuna = optuna.load_study(study_name=name, storage=self._cache, pruner=samplers.pruner(sweep))
        database.expect_heartbeats(sweep.heartbeat_seconds, sweep.grace_seconds)
        self._stopping = stopping.Stopping(self.optuna, sweep)

    @classmethod
    def open(cls, url: str, name: str) -> "Study":
        """Raises UserError: the database cannot be reached; no such study; it was not made by this program."""
        database = Database(url, create=False)
        study = _load(database, name)
        return cls(database, name, _sweep_of(database, study))

    @classmethod
    def create(cls, url: str, name: str, sweep: SweepConfig, facts: Mapping[str, Any]) -> "Study":
        """Create the study, or continue the existing one. Any number of processes may call this at once.

        Args:
            facts: JSON values, kept in the study; `digest` (`space.digest`) is its identity. A study that exists
                keeps its facts, and takes from `sweep` what the digest does not cover: trials, retries, seconds.

        Raises:
            UserError: the database cannot be reached; the existing study is another sweep's.
        """
        database = Database(url, create=True)
        directions = [objective.direction for objective in sweep.objectives]
        with database.lock("tables"):
            try:
                study = optuna.create_study(storage=database.rdb, study_name=name, directions=directions)
            except optuna.exceptions.DuplicatedStudyError:
                study = _load(database, name)
            present = study.user_attrs
            # A process that died between creating the study and writing the facts left it bare.
            bare = DIGEST not in present and not study.get_trials(deepcopy=False)
            if bare and [d.name.lower() for d in study.directions] == directions:
                for key, value in facts.items():
                    if key != DIGEST:
                        study.set_user_attr(key, value)
                study.set_user_attr(SWEEP, sweep.model_dump(mode="json"))
                study.set_user_attr(DIGEST, facts[DIGEST])
            else:
                _refuse_other(database, name, present, facts[DIGEST], sweep)
                study.set_user_attr(SWEEP, sweep.model_dump(mode="json"))
        return cls(database, name, sweep)

    @staticmethod
    def refuse_other(url: str, name: str, digest: str, sweep: SweepConfig) -> dict[str, Any]:
        """The study's facts; empty if there is no such study yet.

        Raises:
            UserError: where `create` would: the database cannot be reached, or has this study for another sweep.
        """
        database, facts = Database(url, create=True), dict[str, Any]()
        if name in optuna.study.get_all_study_names(database.rdb):
            study = _load(database, name)
            if DIGEST in study.user_attrs or study.get_trials(deepcopy=False):
                facts = study.user_attrs
                _refuse_other(database, name, facts, digest, sweep)
        database.close()
        return facts

    # reading ----------------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that `create` and `note` wrote, read from the database."""
        return self._database.patiently(lambda: self.optuna.user_attrs)

    def note(self, **values: Any) -> None:
        """Write facts (JSON values)."""

        def write() -> None:
            for key, value in values.items():
                self.optuna.set_user_attr(key, value)

        self._database.patiently(write)

    def trials(self) -> list[FrozenTrial]:
        """All trials by number, as they are now; not to be changed."""
        return self._database.patiently(lambda: self.optuna.get_trials(deepcopy=False))

    def counts(self) -> Counts:
        return retry.count(self.trials())

    def progress(self) -> int:
        """Grows with every result, and with every epoch that a configuration has not reached before."""
        reached: dict[int, int] = {}
        for trial in self.trials():
            origin = [*retry.history(trial), trial.number][0]
            done = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
            reached[origin] = max(reached.get(origin, 0), len(trial.intermediate_values) + done)
        return sum(reached.values())

    def best(self) -> FrozenTrial | None:
        """The best feasible trial; None before there is one, and with several objectives."""
        return None if len(self.sweep.objectives) > 1 else next(iter(self.front()), None)

    def front(self) -> list[FrozenTrial]:
        """The best feasible trial, or with several objectives the Pareto front (`front.front`)."""
        return self._database.patiently(lambda: front(self.optuna))

    def values_of(self, trial: FrozenTrial) -> dict[str, Any]:
        """The values that a trial's configuration has instead of the sweep's base, as in `Claim.values`."""
        return suggest(cast(optuna.Trial, optuna.trial.FixedTrial(trial.params)), self.sweep)

    def source_of(self, trial: FrozenTrial) -> FrozenTrial:
        """The trial that actually ran: another one if this trial took over its result (`Claim.repeat`)."""
        twin = trial.user_attrs.get(REPEATS)
        return trial if twin is None else self.trials()[twin]

    def last_error(self) -> str | None:
        """The error of the latest failed trial."""
        errors = [t.user_attrs[ERROR] for t in self.trials() if ERROR in t.user_attrs]
        return errors[-1] if errors else None

    # what workers and the driver call --------------------------------------------------------------------------------

    def claim(self, worker: str) -> Claim | None:
        """Claim the next trial: a waiting one, or, unless the study has stopped, a new one up to `self.total`.

        Returns None when there is nothing to do now; a running trial may still die, and then waits.
        """
        return self._database.patiently(lambda: self._claim(worker))

    def requeue_stale(self) -> Counts:
        """Fail the trials of dead workers and queue them again, as every claim does. Safe to repeat or interrupt."""

        def locked() -> Counts:
            with self._database.lock(self.name):
                return retry.count(self._requeue_stale())

        return self._database.patiently(locked)

    def close(self) -> None:
        """Release the connections; claims that have not ended continue without them."""
        self._database.close()

    def _claim(self, worker: str) -> Claim | None:
        with self._database.lock(self.name):
            trials = self._requeue_stale()
            counts = retry.count(trials)
            if counts.waiting == 0 and (counts.used >= self.total or self._stopping.decide()):
                return None
            sampler = samplers.sampler(self.sweep, _place(trials))
            trial = optuna.load_study(study_name=self.name, storage=self._cache, sampler=sampler).ask()
            values = suggest(trial, self.sweep)
            trial.set_user_attr(WORKER, worker)
            rdb = self._database.rdb
            # the database's number of a trial, which Optuna's own trials keep private
            trial_id = rdb.get_trial_id_from_study_id_trial_number(rdb.get_study_id_from_name(self.name), trial.number)
            as_stored = rdb.get_trial(trial_id)
            rdb.record_heartbeat(trial_id)
        return Claim(self._database, self.optuna, self.sweep, trial, trial_id, as_stored, values)

    def _requeue_stale(self) -> list[FrozenTrial]:
        return retry.requeue_stale(self.optuna, self._database.rdb, self.sweep.max_retry)

    def stopped(self) -> str | None:
        """Why the study stopped before its last trial, in one line; None unless it did."""
        return self._database.patiently(lambda: stopping.stopped(self.optuna, self.sweep))

    def goal(self, counts: Counts) -> int:
        """How many trials the study will have had: of a stopped one, those that have begun."""
        return counts.used if self.stopped() else self.total

    @property
    def total(self) -> int:
        """Number of trials: the sweep's, or the number of points of a grid if that is smaller."""
        if self.sweep.sampler.name == "grid":
            return min(self.sweep.trials, math.prod(len(values) for values in grid(self.sweep).values()))
        return self.sweep.trials


def _place(trials: Sequence[FrozenTrial]) -> int:
    """Which configuration of the study is next, from 0: attempts at one count once, and those that wait go first."""
    waiting = next((trial for trial in trials if trial.state == TrialState.WAITING), None)
    if waiting is not None:
        trials = trials[: (retry.history(waiting) or [waiting.number])[0]]
    return sum("retry_history" not in trial.system_attrs for trial in trials)


def studies(url: str) -> list[str]:
    """The names of this program's studies in the database; none if there is no such SQLite file.

    Raises UserError: the database cannot be reached.
    """
    file = sqlite_file(database_url(url))
    if file is not None and not file.exists():
        return []
    database = Database(url, create=True)
    found = database.patiently(database.rdb.get_all_studies)
    database.close()
    return [study.study_name for study in found if DIGEST in study.user_attrs]


def _load(database: Database, name: str) -> optuna.Study:
    try:
        return optuna.load_study(study_name=name, storage=database.rdb)
    except KeyError:
        names = optuna.study.get_all_study_names(database.rdb)
        near = near_miss(name, names)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(names[-5:])}" if names else "it has none"
        raise UserError(f"study {name}: not in {database.shown}; {hint}") from None


def _sweep_of(database: Database, study: optuna.Study) -> SweepConfig:
    present = study.user_attrs
    if DIGEST not in present or SWEEP not in present:
        raise UserError(f"study {study.study_name} in {database.shown} was not made by this program's sweep step")
    try:
        return SweepConfig.model_validate(present[SWEEP])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"study {study.study_name}: {key} is not understood: {first['msg']}") from None


def _refuse_other(database: Database, name: str, present: Mapping[str, Any], digest: str, sweep: SweepConfig) -> None:
    if DIGEST not in present:
        raise UserError(
            f"study {name} in {database.shown} was not made by this program's sweep step: give study=<another name>"
        )
    if present[DIGEST] == digest:
        return
    there = {
        "seeds": SweepConfig.model_fields["seeds"].default,
        **present[SWEEP],
    }  # older studies have no such key
    before, now = _flat(there), _flat(sweep.model_dump(mode="json", include={*SEARCH}))
    keys = [k for k in sorted(before.keys() | now) if k.split(".")[0] in SEARCH and before.get(k) != now.get(k)]
    differ = [f"{k} ({shown(before.get(k))} there, {shown(now.get(k))} here)" for k in keys[:3]]
    what = ", ".join(differ) + (" …" if len(keys) > 3 else "") if keys else "the configuration or the sources"
    raise UserError(
        f"study {name} in {database.shown} is another sweep's (digest {present[DIGEST][:10]}, here {digest[:10]}): "
        f"{what} differ: give study=<another name>"
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix.rstrip("."): value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
