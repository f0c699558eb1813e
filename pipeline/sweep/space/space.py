"""The search space of a sweep: its values as Optuna sees them and as a configuration takes them, and its digest.

config.py has the models and reads them, check.py refuses anything that cannot run. Needs no torch.
"""

import hashlib
import re
from typing import TYPE_CHECKING, Any

from pipeline.compose.groups import CONF
from pipeline.config import Config, sources_of
from pipeline.config.identity import canonical, computation
from pipeline.sweep.space.changes import apply
from pipeline.sweep.space.check import check
from pipeline.sweep.space.config import Objective, SweepConfig, load
from pipeline.sweep.space.dimensions import FloatRange, IntRange, Range

if TYPE_CHECKING:
    import optuna

__all__ = ["Objective", "SweepConfig", "apply", "check", "digest", "grid", "load", "study_name", "suggest"]

SEARCH = ("space", "sampler", "pruner", "objectives", "constraints", "seeds")
"""Parts of a sweep whose change makes another study, unlike the number of trials and retries, and when to stop."""


def suggest(trial: "optuna.Trial", sweep: SweepConfig) -> dict[str, Any]:
    """The trial's values, as `apply` takes them: numbers of a range with steps as they are written, lists as lists.

    Keys are suggested in sorted order, so that the order in the file changes nothing.
    """
    return {key: _suggest(trial, key, sweep.space[key]) for key in sorted(sweep.space)}


def _suggest(trial: "optuna.Trial", key: str, dimension: Any) -> Any:
    if isinstance(dimension, FloatRange):
        ends = dimension.extremes  # Optuna warns about an upper end that no step reaches
        found = trial.suggest_float(key, ends["low"], ends["high"], log=dimension.log, step=dimension.step)
        return dimension.nearest(found)
    if isinstance(dimension, IntRange):
        whole = dimension.extremes
        return trial.suggest_int(key, whole["low"], whole["high"], log=dimension.log, step=dimension.step or 1)
    return dimension.value(trial.suggest_categorical(key, dimension.labels()))


def grid(sweep: SweepConfig) -> dict[str, list[Any]]:
    """The values of each key as Optuna's GridSampler takes them: texts for lists. Only of a finite space."""
    return {
        key: list(dimension.values()) if isinstance(dimension, Range) else dimension.labels()
        for key, dimension in sorted(sweep.space.items())
    }


def digest(sweep: SweepConfig, base: Config) -> str:
    """SHA-256 (hex) of what is searched: two studies with the same digest are the same study.

    It covers the computation that `base` asks for without the keys of the space, mixed precision, the teachers'
    checkpoints, the space, sampler, pruner, objectives, constraints, seeds, and the sources; not the totals and times.
    """
    what = {
        "base": _kept(computation(base), sweep),
        "use_amp": base.optim.use_amp,
        "checkpoints": _kept(
            {f"model.teachers.{i}.checkpoint": t.checkpoint for i, t in enumerate(base.model.teachers)}, sweep
        ),
        **{name: _numbers(sweep.model_dump(mode="json")[name]) for name in SEARCH},
        "sources": sources_of(base, CONF.parent),
    }
    return hashlib.sha256(canonical(what).encode()).hexdigest()


def study_name(sweep: SweepConfig, base: Config) -> str:
    """`kd_ib_tau-1a2b3c4d5e`: the sweep's name and the beginning of its digest."""
    return f"{sweep.name}-{digest(sweep, base)[:10]}"


def _kept(flat: dict[str, Any], sweep: SweepConfig) -> dict[str, Any]:
    """Dotted keys without those that the space sets, single entries of lists included."""
    kept = {
        name: value
        for name, value in flat.items()
        if not any(name == key or name.startswith(f"{key}.") for key in sweep.space)
    }
    for key in sweep.space:
        name, _, last = key.rpartition(".")
        if isinstance(kept.get(name), list) and re.fullmatch(r"\d+", last) and int(last) < len(kept[name]):
            kept[name] = [None if i == int(last) else item for i, item in enumerate(kept[name])]
    return kept


def _numbers(value: Any) -> Any:
    """4.0 as 4: the same number in a list of choices."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
