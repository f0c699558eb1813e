"""Which trials of a study are the best; decided only here."""

import optuna
from optuna.trial import FrozenTrial


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial satisfies all constraints."""
    return all(excess <= 0 for excess in trial.constraints.values())


def front(study: optuna.Study) -> list[FrozenTrial]:
    """The best feasible trial, the first of equals; with several objectives the whole Pareto front, by number.

    Empty before a feasible trial has finished.
    """
    best = study.best_trials
    return best if len(study.directions) > 1 else best[:1]
