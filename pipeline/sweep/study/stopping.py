"""A study that stops before its last trial, because it no longer improves.

Whoever claims a trial decides, with the study's lock held, and writes the reason into the study: then every worker
stops, and trials that have begun end as usual. The decision holds for the rule that made it: another `stop` continues
the study. The terminator is Optuna's, which version 5 deprecates and version 6 will not have.
"""

import warnings
from collections.abc import Sequence
from datetime import datetime

import optuna
from optuna.terminator import RegretBoundEvaluator, Terminator, report_cross_validation_scores
from optuna.trial import TrialState

from pipeline.sweep.space.config import Stop, SweepConfig

STOPPED = "stopped"
"""Fact of the study: the `stop` of its sweep that was met, and the reason in one line."""

warnings.filterwarnings("ignore", message=".*optuna.terminator", category=FutureWarning)


class Stopping:
    """The sweep's rules, applied to its study."""

    def __init__(self, study: optuna.Study, sweep: SweepConfig) -> None:
        self._study, self._sweep = study, sweep
        bound = RegretBoundEvaluator(seed=sweep.sampler.seed) if sweep.stop.terminator else None
        self._terminator = None if bound is None else Terminator(bound)

    def decide(self) -> bool:
        """Whether the study stops; a new decision is written down."""
        rules = self._sweep.stop
        if rules == Stop():
            return False
        if stopped(self._study, self._sweep):
            return True
        reason, stale = None, stagnation(self._study)
        if rules.patience is not None and stale >= rules.patience:
            reason = f"the last {stale} completed trials brought no improvement (stop.patience={rules.patience})"
        elif self._terminator is not None and self._terminator.should_terminate(self._study):
            reason = "what can still be gained is below the noise of what was found (stop.terminator=true)"
        if reason is not None:
            self._study.set_user_attr(STOPPED, {"rules": rules.model_dump(), "reason": reason})
        return reason is not None


def stopped(study: optuna.Study, sweep: SweepConfig) -> str | None:
    """The reason in one line; None unless the sweep's present rules have stopped the study."""
    if sweep.stop == Stop():
        return None
    found = study.user_attrs.get(STOPPED, {})
    return found["reason"] if found.get("rules") == sweep.stop.model_dump() else None


def stagnation(study: optuna.Study) -> int:
    """How many trials have completed since the best value, or the Pareto front, last changed; 0 before there is one.

    Pruned and failed trials do not count, nor does one that equals what was found before it.
    """
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    done = sorted(ended, key=lambda t: (t.datetime_complete or datetime.max, t.number))
    places = {t.number: place for place, t in enumerate(done)}
    first: dict[tuple[float, ...], int] = {}
    for trial in study.best_trials:
        values = tuple(trial.values)
        first[values] = min(places[trial.number], first.get(values, len(done)))
    return len(done) - 1 - max(first.values()) if first else 0


def report_scores(trial: optuna.Trial, scores: Sequence[float]) -> None:
    """Tell the terminator the objective of each seed, whose spread is the noise of the trial's mean."""
    if len(scores) > 1:
        report_cross_validation_scores(trial, list(scores))
