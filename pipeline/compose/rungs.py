"""The ablation ladder: what each rung changes over its parent, applied over any configuration, and nothing else.

A rung is a file of conf/experiment: its name, its parent and the few keys that it sets. The ladder leads from `LOWEST`
to `HIGHEST`; other rungs are side runs. Composing needs no torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.compose import cli
from pipeline.compose.groups import CONF
from pipeline.compose.settings import read_data
from pipeline.config import Config, explain
from pipeline.config.identity import computation
from pipeline.config.numbers import MOST_SEED, whole
from pipeline.config.words import suggestion, why, written
from pipeline.errors import UserError

ROOT, LOWEST, HIGHEST = "base", "l0_baseline", "l4_full"
"""What the lowest rung's file builds on; the ends of the ladder."""

FROM_CFG: Mapping[tuple[str, str], Callable[[Config], Any]] = {
    ("l0k_aver", "method.kd_alpha"): lambda cfg: cfg.method.kd_alpha,
    ("l2_control", "method.teacher_adapt_alpha_kd"): lambda cfg: cfg.method.cccp_alpha,
    ("side_two_view", "method.kd_two_view_start_epoch"): lambda cfg: sum(cfg.method.student_epochs_per_stage) // 4,
    ("side_two_view", "method.kd_two_view_stop_epoch"): lambda cfg: sum(cfg.method.student_epochs_per_stage),
}
"""Values that follow from the configuration that a rung is applied over; the files hold those of `base`."""


@dataclass(frozen=True)
class Rung:
    """A file of conf/experiment over another rung's, or over `base`."""

    name: str
    parent: str | None
    """None for the lowest rung."""
    sets: Mapping[str, Any]
    """Its dotted keys and their values: all that it may change relative to its parent."""


def known() -> dict[str, Rung]:
    """Every rung by name, parents first; children of the same depth in alphabetical order."""
    return _known(CONF / "experiment")


@cache
def _known(folder: Path) -> dict[str, Rung]:
    found = {file.stem: rung for file in sorted(folder.glob("*.yaml")) if isinstance(rung := _read(file), Rung)}
    levels = [[found[name] for name in found if name == LOWEST and found[name].parent is None]]
    while levels[-1]:
        below = {rung.name for rung in levels[-1]}
        levels.append([rung for rung in found.values() if rung.parent in below])
    return {rung.name: rung for level in levels for rung in level}


def _read(file: Path) -> Rung | str | None:
    """The rung in a file, or the name of the rung that the file is an alias of; None: neither."""
    try:
        content = read_data(file, str(file))
    except UserError:  # a broken file of the user's, which is refused once it is used
        return None
    if not isinstance(content, dict):
        return None
    defaults, name = content.pop("defaults", None), content.pop("rung", None)
    match defaults:
        case [str(other)] if name is None and not content:
            return other
        case [str(parent), "_self_"] if name == file.stem and all(isinstance(keys, dict) for keys in content.values()):
            sets = {f"{group}.{key}": value for group, keys in content.items() for key, value in keys.items()}
            return Rung(file.stem, None if parent == ROOT else parent, sets)
    return None


def ladder() -> list[str]:
    """The names from the lowest rung to the highest."""
    return [rung.name for rung in lineage(HIGHEST)]


# names -------------------------------------------------------------------------------------------------------------


def read_names(text: str) -> list[str]:
    """`l0_baseline,l1_ib`, `ladder`, `all`: names in the given order, each once. Raises UserError."""
    found: list[str] = []
    for word in cli.listed(text):
        found += {"ladder": ladder, "all": lambda: list(known())}.get(word, lambda word=word: [_named(word)])()
    if not found:
        raise UserError("rungs is empty: give rungs=ladder, rungs=all, or names such as l0_baseline,l1_ib")
    return list(dict.fromkeys(found))


def _named(word: str) -> str:
    """The name of a rung, given directly or by an alias. Raises UserError."""
    if word in known():
        return word
    file = CONF / "experiment" / f"{word}.yaml"
    if file.parent == CONF / "experiment" and file.is_file():
        other = _read(file)
        if isinstance(other, str) and other in known():
            return other
        raise UserError(
            f"rungs={word}: {file} is not one: write rung: {word}, defaults: [<the rung below it>, _self_], and the "
            "keys that it changes"
        )
    hint = suggestion(word, [*known(), "ladder", "all"])
    raise UserError(f"rungs={word}: no such rung; {hint}there are ladder, all and {', '.join(known())}")


def read_seeds(text: str) -> list[int]:
    """`0,1,2` or `[0, 1, 2]`: each once. Raises UserError."""
    words = cli.listed(text)
    if not words:
        raise UserError(f"seeds={text}: give whole numbers from 0, such as seeds=0,1,2")
    return list(dict.fromkeys(whole("seeds", word, 0, MOST_SEED, why(Config.model_fields["seed"])) for word in words))


def lineage(name: str) -> list[Rung]:
    """The rung and those below it, the lowest first. Raises UserError: no such rung."""
    found = [known()[_named(name)]]
    while (parent := found[0].parent) is not None:
        found.insert(0, known()[parent])
    return found


# configurations ------------------------------------------------------------------------------------------------------


def delta(rung: Rung, cfg: Config) -> dict[str, Any]:
    """The dotted keys that a rung sets over its parent, with the values that they have over `cfg`."""
    return {key: FROM_CFG.get((rung.name, key), lambda _, value=value: value)(cfg) for key, value in rung.sets.items()}


def configuration(cfg: Config, name: str, seed: int) -> Config:
    """The rung over `cfg`, from L0 up. Raises UserError: the rung does not fit this configuration."""
    if cfg.method.name != "asib":
        raise UserError(f"method={cfg.method.name}: the rungs are ASIB's; compare methods with python -m steps.table")
    values = cfg.model_dump()
    for rung in lineage(name):
        for key, value in delta(rung, cfg).items():
            group, inner = key.split(".")
            values[group][inner] = value
    values |= {"rung": name, "seed": seed, "run_name": None, "resume": None, "extend": False}
    if name == "l4_full" and cfg.method.num_stages != len(values["method"]["student_freeze_schedule"]):
        raise UserError(
            f"rung l4_full freezes by stage, {written(values['method']['student_freeze_schedule'])}, and "
            f"method.num_stages is {cfg.method.num_stages}: set method.num_stages=4 with four "
            "method.student_epochs_per_stage, or leave the rung out"
        )
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"rung {name}: {explain(error, values)}") from error


def configurations(cfg: Config, names: Iterable[str], seeds: Sequence[int]) -> list[Config]:
    """A configuration for each rung and seed, rung by rung. Raises UserError: one does not fit or changes nothing."""
    if cfg.method.kd_alpha == 0:
        raise UserError("method.kd_alpha=0: the rungs above l0_baseline distil with the configuration's weight; set it")
    found = []
    checked: dict[str | None, Config] = {None: cfg}
    for name in names:
        for rung in lineage(name):
            if rung.name not in checked:
                checked[rung.name] = configuration(cfg, rung.name, seeds[0])
                check(rung, checked[rung.parent], checked[rung.name])
        found += [configuration(cfg, name, seed) for seed in seeds]
    return found


def check(rung: Rung, parent: Config, child: Config) -> None:
    """Refuse any difference between a rung and its parent other than the stated one. Raises UserError."""
    before, after = computation(parent), computation(child)
    before.pop("seed"), after.pop("seed")
    differing = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    below = rung.parent or "its cfg"
    # with renorm_ce_kd, cross-entropy's weight follows from that of distillation, before the lock
    follows = {"method.ce_alpha"} if getattr(parent.method, "renorm_ce_kd", False) else set()
    for key in sorted(differing - set(rung.sets) - follows):
        raise UserError(
            f"rung {rung.name} differs from {below} in {key} ({written(before.get(key))} -> "
            f"{written(after.get(key))}), and states {', '.join(rung.sets)} only"
        )
    if not differing:
        raise UserError(
            f"rung {rung.name} changes nothing over {below}: this cfg already has "
            + ", ".join(f"{key}={written(after[key])}" for key in rung.sets)
            + "; start from another cfg, or leave the rung out"
        )


def refuse_overrides(names: Iterable[str], overrides: Sequence[str]) -> None:
    """Raise UserError for an override of a key that a rung sets: it would be lost."""
    given = {text.lstrip("+~ ").partition("=")[0].strip() for text in overrides}
    for name in names:
        for rung in lineage(name):
            for key in rung.sets:
                if key in given and (rung.name, key) not in FROM_CFG and key != "method.kd_alpha":
                    raise UserError(f"{key}: rung {rung.name} sets it; leave the override or the rung out")
