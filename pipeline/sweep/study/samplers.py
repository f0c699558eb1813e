"""A sweep's sampler and pruner as Optuna's; each claim makes its own sampler, seeded by the claim's place."""

import itertools
from types import ModuleType
from typing import Any, cast

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler

from pipeline.sweep.space.config import PRUNERS, SAMPLERS, Part, Row
from pipeline.sweep.space.space import SweepConfig, grid


def sampler(sweep: SweepConfig, place: int) -> BaseSampler:
    """The sampler of the configuration at `place` (from 0) in the study."""
    name, seed = sweep.sampler.name, sweep.sampler.seed
    if name == "grid":  # Optuna's own uses trial numbers, some of which are retries
        keys, points = grid(sweep), [*itertools.product(*grid(sweep).values())]
        point = points[np.random.default_rng(seed).permutation(len(points))[place]]
        return PartialFixedSampler(dict(zip(keys, point, strict=True)), RandomSampler())
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
