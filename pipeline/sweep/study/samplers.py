"""A sweep's sampler and pruner as Optuna's; each claim makes its own sampler, seeded by the claim's place."""

import itertools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from pipeline.sweep.space.config import PRUNERS, SAMPLERS, Part, Row
from pipeline.sweep.space.space import SweepConfig, grid


def sampler(sweep: SweepConfig, place: int) -> BaseSampler:
    """The sampler of the configuration at `place` (from 0) in the study."""
    name, seed = sweep.sampler.name, sweep.sampler.seed
    if name == "grid":
        return GridPoint(grid(sweep), seed, place)
    own = int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
    return cast(BaseSampler, _made(optuna.samplers, SAMPLERS[name], sweep.sampler, seed=own))


def pruner(sweep: SweepConfig) -> BasePruner:
    """Epochs are counted from 0, as they are reported."""
    return cast(BasePruner, _made(optuna.pruners, PRUNERS[sweep.pruner.name], sweep.pruner))


def _made(module: ModuleType, row: Row, chosen: Part, **more: Any) -> object:
    arguments = {argument: getattr(chosen, key) for key, (argument, *_) in row.keys.items()}
    if row.wraps is not None:
        more["wrapped_pruner"] = _made(module, row.wraps, chosen)
    return getattr(module, row.optuna)(**arguments, **row.fixed, **more)


class GridPoint(BaseSampler):
    """One point of a grid. Optuna's own grid sampler goes by trial numbers, some of which go to retries.

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
