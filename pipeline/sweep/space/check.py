"""Validate a sweep against the configuration that it varies: one line per fault, before any trial starts."""

import logging
import math
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.compose.groups import groups
from pipeline.config import Config, config_hash, explain, flatten, inactive
from pipeline.config.identity import NOT_COMPUTATION, listed
from pipeline.config.words import expects, near_miss, written
from pipeline.errors import UserError
from pipeline.sweep.space.changes import takes, validated
from pipeline.sweep.space.config import VALIDATION, SweepConfig
from pipeline.sweep.space.dimensions import IntRange, Range

logger = logging.getLogger("asib")
COMBINATIONS = 64
"""Number of points that are tried against the rules between keys, besides each key's own limits."""
RANDOM_STATE = 0

METRICS = re.compile(
    r"final/val_acc|student/(acc|acc_ema|loss)|synergy/(acc|acc_ema)|gate/(open|averaged_share)"
    r"|teacher/(disagreement|both_wrong|(\d+/|avg_)acc)"
    r"|train/(images_per_second|nonfinite_steps)|schedule/(tau|ib_beta|lr|kd_weight)"
    r"|a_step/(loss|ce|kd|ib|feat|cccp|teacher_ce|cw_mean|cw_std|cw_at_bounds|raw_kl|sigma)"
    r"|b_step/(loss|ce|plus_kd|kd_clamped|target_entropy|sample_gate|label_guard)"
    r"|parameters/(student|fusion)_(total|trainable)"
    r"|cost/(gmacs|seconds|device_hours|compile_seconds|energy_kwh/[cg]pu|updates/[ab]|(macs_per_image|forward_images)/(student|fusion|teacher_\d+))"
)
"""Metrics of a trial's run, beside its method's terms: `b_step/<term>`."""
USUAL = (
    *(VALIDATION, "student/acc", "synergy/acc", "train/images_per_second", "cost/gmacs", "cost/seconds"),
    *("parameters/student_total", "cost/macs_per_image/student", "cost/updates/b"),
)
"""Names to suggest for a misspelt metric."""
TEST_SPLIT = re.compile(
    r"test/.*|final/(acc_last|acc_val_selected|acc_best|teacher_(\d+|avg)_acc|synergy_acc|student_alone_acc)"
)


def check(sweep: SweepConfig, base: Config, overridden: Collection[str]) -> None:
    """Refuse a sweep that cannot run over `base`; log what has no effect or is unknown.

    Args:
        overridden: the keys that the command line sets.

    Raises:
        UserError: one line that names the key, the value and what to give instead.
    """
    source = f"sweep={sweep.name}"
    if base.dataset.val_fraction == 0:
        raise UserError(
            f"{source}: dataset.val_fraction=0: a sweep never looks at the test split and needs validation images; "
            "set dataset.val_fraction=0.1"
        )
    given = {re.sub(r"\[(\d+)\]", r".\1", key) for key in overridden}
    for key in sweep.space:
        where = f"{source}: space.{key}"
        _check_key(where, key, sweep.space, given, base)
        _check_kind(where, key, sweep, base)
    if sweep.seeds > 1:
        try:
            validated(base, {"seed": base.seed + sweep.seeds - 1})
        except ValidationError as error:
            raise UserError(f"{source}: seeds={sweep.seeds} from seed={base.seed} on: {explain(error)}") from None
    _check_split(source, sweep)
    _check_weights(source, sweep, base)
    points = _check_values(source, sweep, base)
    _log_unknown(source, sweep, [base, *(config for _, config in points)])
    _log_inactive(sweep, points)
    _log_cmaes(sweep)


# keys ----------------------------------------------------------------------------------------------------------------


def _check_key(where: str, key: str, space: Collection[str], given: Collection[str], base: Config) -> None:
    """A key of the schema that changes what is computed, and not what is measured, and that nothing else sets."""
    if key in groups() and key not in Config.model_fields:
        raise UserError(f"{where}: {key} is a group of files; a space names keys, such as {_example(key)}")
    try:
        takes(key, base)
    except UserError as error:
        raise UserError(f"{where.removesuffix(key)[:-1]}: {error}") from None
    if key.split(".")[0] == "dataset" and key != "dataset.batch_size":
        raise UserError(
            f"{where}: it changes what the trials are measured on, so that they could not be compared; leave it out "
            f"and give {key}=… to the whole sweep"
        )
    if key.endswith(".checkpoint") or listed(key, NOT_COMPUTATION):
        raise UserError(
            f"{where}: the configuration's hash leaves this key out, all its trials would be the same; leave it out "
            f"and give {key}=… to the whole sweep"
        )
    inner = next((other for other in space if other.startswith(f"{key}.")), None)
    if inner:
        raise UserError(f"{where}: the space has {inner} in it too: leave one of them out")
    lost = next((other for other in given if other == key or other.startswith(f"{key}.")), None)
    if lost:
        raise UserError(f"{where}: the command line sets {lost}, and the sweep varies it: leave one of them out")


def _example(group: str) -> str:
    name = group.replace("/", ".").replace("model.teacher", "model.teachers.0")
    return next((k for k in flatten(Config()) if k.startswith(f"{name}.")), f"{name}.name")


def _check_kind(where: str, key: str, sweep: SweepConfig, base: Config) -> None:
    """Ranges are for numbers, and ranges of fractions not for whole numbers."""
    dimension = sweep.space[key]
    if not isinstance(dimension, Range):
        return
    field, rest = takes(key, base)
    annotation = field.annotation
    if rest:
        items = next(get_args(a) for a in (annotation, *get_args(annotation)) if get_origin(a) is tuple)
        annotation = items[min(int(rest[0]), len(items) - 1)] if items[-1] is not Ellipsis else items[0]
    kinds = _kinds(annotation)
    if "float" in kinds or ("int" in kinds and dimension.type == "int"):
        return
    does = "type: int" if "int" in kinds else "type: categorical with choices"
    section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    what = "a group of keys" if section else expects(field)
    raise UserError(f"{where}: type: {dimension.type}, and this key takes {what}: use {does}")


def _kinds(annotation: Any) -> set[str]:
    """What a key takes: the names of types; `list` and `one of` for tuples and choices."""
    if isinstance(annotation, type):
        return {annotation.__name__}
    if get_origin(annotation) is tuple:
        return {"list"}
    if get_origin(annotation) is Literal:
        return {"one of"}
    arguments = get_args(annotation)
    inner = arguments[:1] if hasattr(annotation, "__metadata__") else arguments
    return {kind for argument in inner for kind in _kinds(argument)}


def _check_weights(source: str, sweep: SweepConfig, base: Config) -> None:
    """`renorm_ce_kd` has rescaled both weights of `base`: changing one of them would mix two scales."""
    weights = {"method.ce_alpha", "method.kd_alpha"} & sweep.space.keys()
    if getattr(base.method, "renorm_ce_kd", False) and (
        len(weights) == 1 or (not weights and "method.renorm_ce_kd" in sweep.space)
    ):
        key = next(iter(weights), "method.renorm_ce_kd")
        raise UserError(
            f"{source}: space.{key}: method.renorm_ce_kd=true has already rescaled method.ce_alpha and method.kd_alpha "
            "of this configuration; set method.renorm_ce_kd=false, or put both weights into the space"
        )


# metrics -------------------------------------------------------------------------------------------------------------


def _metrics(sweep: SweepConfig) -> Iterator[tuple[str, str]]:
    """Where each metric is named, and its name."""
    yield from ((f"objectives.{i}.metric", o.metric) for i, o in enumerate(sweep.objectives))
    yield from ((f"constraints.{i}.metric", c.metric) for i, c in enumerate(sweep.constraints))


def _check_split(source: str, sweep: SweepConfig) -> None:
    for where, metric in _metrics(sweep):
        if TEST_SPLIT.fullmatch(metric):
            raise UserError(f"{source}: {where}={metric}: a sweep never looks at the test split; use {VALIDATION}")


def terms(configs: Sequence[Config]) -> list[str]:
    """The terms that any of these configurations gives a weight, as metrics."""
    weights = [term for config in configs for term in config.method.term_weights.items()]
    return list(dict.fromkeys(f"b_step/{name}" for name, weight in weights if weight > 0))


def _log_unknown(source: str, sweep: SweepConfig, configs: Sequence[Config]) -> None:
    """Log each metric that no trial over these configurations has."""
    known = terms(configs)
    for where, metric in _metrics(sweep):
        if not METRICS.fullmatch(metric) and metric not in known:
            near = near_miss(metric, [*USUAL, *known])
            hint = f"; did you mean {near}?" if near else ""
            logger.warning(
                "%s: %s=%s is an unknown metric: trials whose run lacks it fail%s", source, where, metric, hint
            )


# values --------------------------------------------------------------------------------------------------------------


def _check_values(source: str, sweep: SweepConfig, base: Config) -> list[tuple[Mapping[str, Any], Config]]:
    """Check each key's own limits, then points of the space against the rules between keys.

    Returns:
        Valid points with their configurations.

    Raises:
        UserError: values that no trial could have.
    """
    dice = random.Random(RANDOM_STATE)

    def attempt(fixed: Mapping[str, Any]) -> tuple[Mapping[str, Any], Config | str]:
        """A random point, and its configuration or why it is invalid."""
        values = {key: _drawn(dimension, dice) for key, dimension in sweep.space.items()} | dict(fixed)
        try:
            return values, validated(base, values)
        except ValidationError as error:
            return values, explain(error, base)
        except UserError as error:
            return values, str(error)

    for key, dimension in sweep.space.items():
        hashes: dict[str, str] = {}
        for name, value in _named_values(dimension):  # both ends of a range, each of a list's values
            where = f"{source}: space.{key}.{name}={_shown(value)}"
            try:
                found = validated(base, {key: value})
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            except ValidationError as error:  # a rule may be broken only by the key's neighbours
                own = any(problem["loc"] for problem in error.errors())
                if own or not any(isinstance(attempt({key: value})[1], Config) for _ in range(16)):
                    raise UserError(f"{where}: {explain(error, base)}") from None
                continue
            if not isinstance(dimension, Range):
                same = hashes.setdefault(config_hash(found), name)
                if same != name:
                    raise UserError(f"{where}: the same configuration as with {same}; leave one of them out")
    points = [attempt({}) for _ in range(COMBINATIONS)]
    valid = [(values, found) for values, found in points if isinstance(found, Config)]
    refused = [why for _, why in points if isinstance(why, str)]
    if refused and not valid:
        raise UserError(f"{source}: no point of the space is valid: {refused[0]}")
    if refused:
        words = "%s: %d of %d points of the space are invalid, and such trials fail: %s"
        logger.warning(words, source, len(refused), COMBINATIONS, refused[0])
    return valid


def _shown(value: Any) -> str:
    text = " ".join(written(value).split())
    return text if len(text) <= 80 else text[:77] + "…"


def _named_values(dimension: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(dimension, Range):
        yield from dimension.extremes.items()
    else:
        yield from ((f"{dimension.word}.{index}", value) for index, value in enumerate(dimension.listed()))


def _drawn(dimension: Any, source: random.Random) -> Any:
    if not isinstance(dimension, Range):
        return source.choice(dimension.listed())
    if isinstance(dimension, IntRange):
        return source.choice(dimension.values())
    low, high = dimension.extremes.values()
    if dimension.log:
        return min(max(math.exp(source.uniform(math.log(low), math.log(high))), low), high)
    return dimension.nearest(source.uniform(low, high))


# what acts -----------------------------------------------------------------------------------------------------------


def _log_inactive(sweep: SweepConfig, points: Sequence[tuple[Mapping[str, Any], Config]]) -> None:
    """Log each key that has no effect at any point that was tried."""
    defaults = flatten(Config())
    for key in sorted(sweep.space):
        changed = [config for values, config in points if values[key] != defaults.get(key)]
        sentences = [next((s for s in inactive(config) if re.split("[:=,]", s)[0] == key), None) for config in changed]
        if sentences and all(sentences):
            logger.info("has no effect here: %s", sentences[0])


def _log_cmaes(sweep: SweepConfig) -> None:
    if sweep.sampler.name != "cmaes":
        return
    lists = [key for key, dimension in sweep.space.items() if not isinstance(dimension, Range)]
    if lists:
        logger.warning("sampler.name=cmaes searches ranges only: %s are drawn at random", ", ".join(lists))
    if len(sweep.space) - len(lists) < 2:
        logger.warning("sampler.name=cmaes needs two ranges: all of this space is drawn at random; use tpe")
