"""A sweep's sampler and pruner as Optuna's; samplers are made anew for each claim, seeded by the claim's place."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from pipeline.sweep.space import space as sweep_space
from pipeline.sweep.space.space import SweepConfig


def sampler(sweep: SweepConfig, place: int) -> BaseSampler:
    """The sampler of the configuration at `place` (from 0) in the study."""
    chosen: Any = sweep.sampler
    seed = int(np.random.SeedSequence([chosen.seed, place]).generate_state(1)[0])
    match chosen.name:
        case "tpe":
            return optuna.samplers.TPESampler(
                n_startup_trials=chosen.startup_trials,
                n_ei_candidates=chosen.candidates,
                multivariate=True,
                constant_liar=True,
                seed=seed,
            )
        case "gp":
            return optuna.samplers.GPSampler(
                n_startup_trials=chosen.startup_trials,
                deterministic_objective=chosen.deterministic,
                warn_independent_sampling=False,
                seed=seed,
            )
        case "cmaes":
            return optuna.samplers.CmaEsSampler(
                n_startup_trials=chosen.startup_trials,
                popsize=chosen.population,
                warn_independent_sampling=False,
                seed=seed,
            )
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "grid":
            return GridPoint(sweep_space.grid(sweep), chosen.seed, place)
    raise AssertionError(chosen.name)


class GridPoint(BaseSampler):
    """One point of a grid. Optuna's own grid sampler goes by trial numbers, of which retries use some up.

    Args:
        values: of each key. seed: the order in which points are visited. place: which one this is, from 0.
    """

    def __init__(self, values: Mapping[str, Sequence[Any]], seed: int, place: int) -> None:
        points = list(itertools.product(*values.values()))
        order = np.random.default_rng(seed).permutation(len(points))
        self._point = dict(zip(values, points[order[place]], strict=True))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._point[param_name]


def pruner(sweep: SweepConfig) -> BasePruner:
    """Epochs are counted from 0, as they are reported."""
    chosen: Any = sweep.pruner
    match chosen.name:
        case "median":
            return optuna.pruners.MedianPruner(
                n_startup_trials=chosen.startup_trials,
                n_warmup_steps=chosen.warmup_epochs,
                interval_steps=chosen.interval_epochs,
                n_min_trials=chosen.min_trials,
            )
        case "hyperband":
            return optuna.pruners.HyperbandPruner(
                min_resource=chosen.min_epochs, max_resource=chosen.max_epochs, reduction_factor=chosen.reduction
            )
        case "patient":
            median = optuna.pruners.MedianPruner(chosen.startup_trials, chosen.warmup_epochs)
            return optuna.pruners.PatientPruner(median, chosen.patience, chosen.min_delta)
        case "none":
            return optuna.pruners.NopPruner()
    raise AssertionError(chosen.name)
