"""A sweep's settings: its space, sampler, pruner, objectives, constraints. Needs no torch."""

import math
import re
from collections.abc import Mapping
from functools import reduce
from operator import or_
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, create_model, model_validator

from pipeline.compose.groups import locate
from pipeline.compose.settings import read_section
from pipeline.config.numbers import AtLeastOne, Count, Fraction, NonNegative, Real, Seeds, ShortSeed, Trials
from pipeline.sweep.space.dimensions import AtLeastTwo, Dimension, Part

VALIDATION = "final/val_acc"
GRID_LIMIT = 100_000
"""The grid sampler lists all points of a grid."""


# samplers and pruners ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A sampler or pruner of Optuna's.

    Attributes:
        optuna: its class.
        keys: key of the sweep's file -> (argument of the class, type, default).
        fixed: arguments that users cannot choose.
        wraps: the pruner that it wraps, whose keys it takes too.
        judges: what a pruner compares trials by.
    """

    optuna: str
    keys: Mapping[str, tuple[str, Any, Any]] = {}
    fixed: Mapping[str, Any] = {}
    wraps: "Row | None" = None
    judges: Literal["epochs", "seeds", "nothing"] = "epochs"


Population = AtLeastTwo | None
MaxEpochs = AtLeastOne | Literal["auto"]
MEDIAN = {"startup_trials": ("n_startup_trials", Count, 5), "warmup_epochs": ("n_warmup_steps", Count, 3)}
QUIET = {"warn_independent_sampling": False}
SAMPLERS = {
    "tpe": Row(
        "TPESampler",
        {"startup_trials": ("n_startup_trials", Count, 10), "candidates": ("n_ei_candidates", AtLeastOne, 24)},
        {"multivariate": True, "constant_liar": True},
    ),
    "gp": Row(
        "GPSampler",
        {"startup_trials": ("n_startup_trials", Count, 10), "deterministic": ("deterministic_objective", bool, False)},
        QUIET,
    ),
    "cmaes": Row(  # searches two or more ranges; lists of values are drawn at random
        "CmaEsSampler",
        {"startup_trials": ("n_startup_trials", Count, 1), "population": ("popsize", Population, None)},
        QUIET,
    ),
    "random": Row("RandomSampler"),
    "grid": Row("GridSampler"),  # not used directly: see study/samplers.py
}
PRUNERS = {
    "median": Row(
        "MedianPruner",
        MEDIAN | {"interval_epochs": ("interval_steps", AtLeastOne, 1), "min_trials": ("n_min_trials", AtLeastOne, 1)},
    ),
    "hyperband": Row(
        "HyperbandPruner",
        {
            "min_epochs": ("min_resource", AtLeastOne, 1),
            "max_epochs": ("max_resource", MaxEpochs, "auto"),  # auto: as the longest trial has reported
            "reduction": ("reduction_factor", AtLeastTwo, 3),
        },
    ),
    "patient": Row(  # as median, but only once a trial has not improved by min_delta for patience epochs
        "PatientPruner",
        {"patience": ("patience", Count, 3), "min_delta": ("min_delta", NonNegative, 0.0)},
        wraps=Row("MedianPruner", MEDIAN),
    ),
    "wilcoxon": Row(  # a signed-rank test against the best trial, seed by seed
        "WilcoxonPruner",
        {"p_threshold": ("p_threshold", Fraction, 0.3), "startup_seeds": ("n_startup_steps", Count, 2)},
        judges="seeds",
    ),
    "none": Row("NopPruner", judges="nothing"),
}


def _model(name: str, row: Row, **common: Any) -> type[Part]:
    """A model that checks the keys of a sampler or pruner."""
    keys = {**row.keys, **(row.wraps.keys if row.wraps else {})}
    fields: dict[str, Any] = {key: (kind, default) for key, (_, kind, default) in keys.items()}
    return create_model(name, __base__=Part, **{"name": (Literal[name], name), **common, **fields})


def _one_of(rows: Mapping[str, Row], **common: Any) -> Any:
    """A union of the rows' models, of which `name` selects one."""
    models = [_model(name, row, **common) for name, row in rows.items()]
    return Annotated[reduce(or_, models), Field(discriminator="name")]


if TYPE_CHECKING:
    Sampler = Any
    Pruner = Any
else:
    Sampler, Pruner = _one_of(SAMPLERS, seed=(ShortSeed, 0)), _one_of(PRUNERS)


# the sweep -----------------------------------------------------------------------------------------------------------


class Objective(Part):
    """A metric of the trial's run that is maximised or minimised."""

    metric: str = VALIDATION
    direction: Literal["maximize", "minimize"] = "maximize"

    @property
    def reported(self) -> str | None:
        """The per-epoch metric that represents it while the trial runs, for pruning; None without one."""
        if self.metric == VALIDATION:
            return "student/acc"
        return self.metric if self.metric.startswith("student/") else None


class Constraint(Part):
    """Bounds of a metric of the trial's run; a trial beyond them is never the best."""

    metric: str
    min: Real | None = None
    max: Real | None = None

    @model_validator(mode="after")
    def _rules(self) -> "Constraint":
        if self.min is None and self.max is None:
            raise ValueError(f"metric={self.metric} has no bound: give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}: no value satisfies both")
        return self

    def violation(self, value: float) -> float:
        """How far a value lies beyond the bounds; 0 or less satisfies them. NaN never does."""
        if math.isnan(value):
            return math.inf
        beyond = [] if self.max is None else [value - self.max]
        return max(beyond if self.min is None else [*beyond, self.min - value])


class Stop(Part):
    """When a study ends before its last trial: as soon as one of the rules holds.

    `patience`: this many trials in a row have completed without improvement. `terminator`: Optuna's bound of what can
    still be gained has fallen below the noise of the best trial's mean over its seeds; it judges from 20 trials on.
    """

    patience: AtLeastOne | None = None
    terminator: bool = False


class SweepConfig(Part):
    """A search over configurations; `name` is the stem of its file. Keys of `space` are dotted keys of the schema."""

    name: str
    space: dict[str, Dimension]
    sampler: Sampler = Field({"name": "tpe"})
    pruner: Pruner = Field({"name": "median"})
    objectives: tuple[Objective, ...] = Field((Objective(),), strict=False)
    constraints: tuple[Constraint, ...] = Field((), strict=False)
    trials: Trials = 30
    seeds: Seeds = 1
    stop: Stop = Stop()
    max_retry: Count = 2
    heartbeat_seconds: AtLeastOne = 15
    grace_seconds: AtLeastOne = 60

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        return _with_pruner(short_forms(data)) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _rules(self) -> "SweepConfig":
        if not self.space:
            raise ValueError(
                "space is empty: name at least one key, such as method.tau: {type: float, low: 1, high: 8}"
            )
        if not self.objectives:
            raise ValueError(f"objectives is empty: give [{{metric: {VALIDATION}, direction: maximize}}]")
        for what, metrics in (
            ("objectives", [o.metric for o in self.objectives]),
            ("constraints", [c.metric for c in self.constraints]),
        ):
            twice = next((m for m in metrics if metrics.count(m) > 1), None)
            if twice:
                raise ValueError(f"{what} name {twice} twice: give it once")
        self._check_together()
        return self

    def _check_together(self) -> None:
        """Refuse what sampler and pruner cannot do."""
        several = len(self.objectives) > 1
        if several and self.pruner.name != "none":
            raise ValueError(
                f"pruner.name={self.pruner.name} with {len(self.objectives)} objectives: pruning needs a single one; "
                "set pruner.name=none"
            )
        if several and self.sampler.name == "cmaes":
            raise ValueError(
                f"sampler.name=cmaes with {len(self.objectives)} objectives: it searches for a single one; "
                "use tpe, gp or random"
            )
        if several and self.stop.terminator:
            raise ValueError(
                f"stop.terminator=true with {len(self.objectives)} objectives: it bounds what a single one can still "
                "gain; use stop.patience=10"
            )
        if self.stop.terminator and self.seeds == 1:
            raise ValueError(
                "stop.terminator=true with seeds=1: it weighs what can still be gained against the spread of a trial's "
                "seeds; set seeds=3, or use stop.patience=10"
            )
        judges = PRUNERS[self.pruner.name].judges
        if self.seeds > 1:
            self._check_seeds(judges)
        elif judges == "seeds":
            raise ValueError(
                f"pruner.name={self.pruner.name} with seeds=1: it compares the seeds of two trials; set seeds=3, or "
                "pruner.name=median"
            )
        elif judges == "epochs" and self.objectives[0].reported is None:
            raise ValueError(
                f"pruner.name={self.pruner.name} with the objective {self.objectives[0].metric}, which is not known "
                f"before a trial's end: set pruner.name=none, or maximise {VALIDATION}"
            )
        if self.grace_seconds <= self.heartbeat_seconds:
            raise ValueError(
                f"grace_seconds={self.grace_seconds} is not above heartbeat_seconds={self.heartbeat_seconds}: "
                f"living trials would be taken for dead; give for example {4 * self.heartbeat_seconds}"
            )
        if self.sampler.name == "grid":
            self._check_grid()

    def _check_seeds(self, judges: str) -> None:
        """Refuse what would act on a single training, and a test that could never end a trial before its last seed."""
        if "seed" in self.space:
            raise ValueError(f"space.seed with seeds={self.seeds}: each trial trains seeds of its own; leave one out")
        if judges == "epochs":
            raise ValueError(
                f"pruner.name={self.pruner.name} with seeds={self.seeds}: it compares the epochs of trials with one "
                "seed; set pruner.name=wilcoxon or none"
            )
        if judges == "nothing":
            return
        tested, least = self.seeds - 1, 0.5 ** (self.seeds - 1)  # the last seed saves nothing; all are worse
        if tested < max(2, self.pruner.startup_seeds):
            raise ValueError(
                f"pruner.name={self.pruner.name} with seeds={self.seeds}: it prunes after "
                f"{max(2, self.pruner.startup_seeds)} seeds at the earliest, which leaves none to save; give more "
                "seeds, or set pruner.name=none"
            )
        if least >= self.pruner.p_threshold:
            raise ValueError(
                f"pruner.p_threshold={self.pruner.p_threshold} with seeds={self.seeds}: no p of {tested} seeds is "
                f"below {least:.3g}, so that nothing would be pruned; give a p_threshold above it, or more seeds"
            )

    def _check_grid(self) -> None:
        points = 1
        for key, dimension in self.space.items():
            size = dimension.size()
            if size is None:
                raise ValueError(
                    f"space.{key} has endlessly many values, and sampler.name=grid visits each: "
                    "give it a step, or type: grid with values"
                )
            points *= size
        if points > GRID_LIMIT:
            raise ValueError(
                f"sampler.name=grid: this grid has {points:,} points, more than {GRID_LIMIT:,}: use wider steps, or tpe"
            )


def short_forms(data: dict[str, Any]) -> dict[str, Any]:
    """`pruner: none` and `{seed: 1}` in full, `a[0]` as `a.0`."""
    data = dict(data)
    for part, default in (("sampler", "tpe"), ("pruner", _usual_pruner(data))):
        if part in data:
            given = "none" if data[part] is None else data[part]
            given = {"name": given} if isinstance(given, str) else given
            data[part] = {"name": default, **given} if isinstance(given, dict) else given
    if isinstance(data.get("space"), dict):
        data["space"] = _dotted_keys(data["space"])
    return data


def _usual_pruner(data: Mapping[str, Any]) -> str:
    """The pruner of a sweep with several seeds, and of any other one."""
    seeds = data.get("seeds", 1)
    return "median" if not isinstance(seeds, int) or seeds < 2 else "wilcoxon" if seeds > 2 else "none"


def _with_pruner(data: dict[str, Any]) -> dict[str, Any]:
    """Name the pruner that is not given: none for several objectives, which cannot be pruned."""
    objectives = data.get("objectives")
    several = isinstance(objectives, list | tuple) and len(objectives) > 1
    return {"pruner": {"name": "none" if several else _usual_pruner(data)}, **data}


def _dotted_keys(space: dict[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, dimension in space.items():
        name = re.sub(r"\[(\d+)\]", r".\1", str(key))
        if name in found:
            raise ValueError(f"space.{name} is there twice: give it once")
        found[name] = dimension
    return found


def load(name_or_path: str, settings: Mapping[str, str] = MappingProxyType({})) -> SweepConfig:
    """A sweep of conf/sweep, or of a YAML file anywhere, with the command line's settings.

    Args:
        settings: by key of the sweep, as texts: `{"trials": "10", "space.method.tau.high": "6", "pruner": "none"}`.
            Another `sampler.name`, `pruner.name` or `type` drops the file's keys that it does not have; a dimension
            set to null leaves the space.

    Raises:
        UserError: one line with the key, its value and what to give instead.
    """
    file = locate("sweep", name_or_path)
    found: SweepConfig = read_section(SweepConfig, "sweep", name_or_path, file, settings, short_forms, name=file.stem)
    return found
