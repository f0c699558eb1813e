"""The ablation ladder: what each rung changes over its parent, applied over any configuration, and nothing else.

A rung is a file of conf/experiment (a few lines over its parent) and its entry in `RUNGS`, which states the keys that
it may change. Composing needs no torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.compose.compose import compose
from pipeline.compose.groups import CONF
from pipeline.compose.settings import read_data
from pipeline.config import Config, explain
from pipeline.config.describe import why, written
from pipeline.config.identity import computation
from pipeline.config.names import near_miss
from pipeline.config.numbers import MOST_SEED, whole
from pipeline.errors import UserError

ROOT = "base"
"""What the lowest rung's file is written over."""

FROM_CFG: Mapping[tuple[str, str], Callable[[Config], Any]] = {
    ("l0k_aver", "method.kd_alpha"): lambda cfg: cfg.method.kd_alpha,
    ("l2_control", "method.teacher_adapt_alpha_kd"): lambda cfg: cfg.method.cccp_alpha,
    ("side_two_view", "method.kd_two_view_start_epoch"): lambda cfg: sum(cfg.method.student_epochs_per_stage) // 4,
    ("side_two_view", "method.kd_two_view_stop_epoch"): lambda cfg: sum(cfg.method.student_epochs_per_stage),
}
"""Values that follow from the configuration that a rung is applied over; the files hold those of `base`."""


@dataclass(frozen=True)
class Rung:
    """`changes`: all keys in which it may differ from its parent. `words`: for tables."""

    name: str
    parent: str | None
    changes: tuple[str, ...]
    words: str

    @property
    def file(self) -> Path:
        return CONF / "experiment" / f"{self.name}.yaml"


def _rung(name: str, parent: str | None, changes: str, words: str) -> tuple[str, Rung]:
    return name, Rung(name, parent, tuple(f"method.{key}" for key in changes.split()), words)


RUNGS: dict[str, Rung] = dict(
    (
        _rung("l0_baseline", None, "kd_alpha", "L0: cross-entropy only"),
        _rung("l0k_aver", "l0_baseline", "kd_alpha kd_target", "L0k: AVER, averaged teachers"),
        _rung("l1d_deterministic", "l0k_aver", "kd_target use_ib", "L1d: deterministic fusion"),
        _rung("l1_ib", "l1d_deterministic", "use_ib", "L1: + information bottleneck"),
        _rung("l2_cccp", "l1_ib", "use_cccp cccp_nt", "L2: + CCCP"),
        _rung("l2_control", "l2_cccp", "use_cccp teacher_adapt_alpha_kd", "control of L2: CCCP off, as many updates"),
        _rung("l3a_auto", "l2_cccp", "kd_target kd_ens_alpha", "L3a: + target auto"),
        _rung("l3b_gate", "l3a_auto", "enable_kd_after_syn_acc", "L3b: + gate"),
        _rung("l3c_sample_gate", "l3b_gate", "kd_sample_gate", "L3c: + sample gate"),
        _rung("l3d_adaptive", "l3c_sample_gate", "kd_uncertainty_weight", "L3d: + uncertainty"),
        _rung(
            "l4_full",
            "l3d_adaptive",
            "use_partial_freeze student_freeze_schedule student_freeze_bn",
            "L4: + partial freezing",
        ),
        _rung("side_beta", "l3d_adaptive", "ib_beta", "L3d with beta 1e-3"),
        _rung("side_sampled_z", "l3d_adaptive", "use_mu_for_kd", "L3d with sampled z"),
        _rung("side_avg_target", "l3d_adaptive", "kd_target", "L3d with target avg"),
        _rung("side_weighted_conf", "l3d_adaptive", "kd_target", "L3d with target weighted_conf"),
        _rung("side_auto_min", "l3d_adaptive", "kd_target", "L3d with target auto_min"),
        _rung("side_two_view", "l3d_adaptive", "kd_two_view_start_epoch kd_two_view_stop_epoch", "L3d with two views"),
        _rung("side_dkd", "l3d_adaptive", "kd_loss", "L3d with the DKD form"),
        _rung("side_mixed_view", "l3d_adaptive", "kd_view", "L3d with the mixed view"),
        _rung("side_query_distill_feat", "l3d_adaptive", "ib_mbm_query_key feat_kd_alpha", "L3d, query distill_feat"),
        _rung("side_learnable_query", "l3d_adaptive", "learnable_q", "L3d with a learned query"),
    )
)
LADDER = tuple(name for name in RUNGS if not name.startswith("side_") and name != "l2_control")
SETS = {"ladder": LADDER, "all": tuple(RUNGS)}
ALIASES = {"l3_adaptive": "l3d_adaptive"}


# names -------------------------------------------------------------------------------------------------------------


def read_names(text: str) -> list[str]:
    """`l0_baseline,l1_ib`, `ladder`, `all`: names in the given order, each once. Raises UserError."""
    found: list[str] = []
    for word in filter(None, (part.strip() for part in text.strip("[] ").split(","))):
        name = ALIASES.get(word, word)
        if name not in RUNGS and name not in SETS:
            near = near_miss(word, [*RUNGS, *SETS])
            hint = f"did you mean {near}? " if near else ""
            raise UserError(f"rungs={word}: no such rung; {hint}there are {', '.join(SETS)} and {', '.join(RUNGS)}")
        found += SETS.get(name, (name,))
    if not found:
        raise UserError("rungs is empty: give rungs=ladder, rungs=all, or names such as l0_baseline,l1_ib")
    return list(dict.fromkeys(found))


def read_seeds(text: str) -> list[int]:
    """`0,1,2` or `[0, 1, 2]`: each once. Raises UserError."""
    words = [part.strip() for part in text.strip("[] ").split(",") if part.strip()]
    if not words:
        raise UserError(f"seeds={text}: give whole numbers from 0, such as seeds=0,1,2")
    return list(dict.fromkeys(whole("seeds", word, 0, MOST_SEED, why(Config.model_fields["seed"])) for word in words))


def lineage(name: str) -> list[Rung]:
    """The rung and those below it, the lowest first."""
    found = [RUNGS[name]]
    while (parent := found[0].parent) is not None:
        found.insert(0, RUNGS[parent])
    return found


# deltas ------------------------------------------------------------------------------------------------------------


def delta(rung: Rung, cfg: Config) -> dict[str, Any]:
    """The dotted keys that a rung sets over its parent, with the values that they have over `cfg`.

    Raises:
        UserError: the file changes something that `RUNGS` does not state, or has another parent.
    """
    content = read_data(rung.file, str(rung.file)) or {}
    wanted = [rung.parent or ROOT, "_self_"]
    if content.pop("defaults", None) != wanted:
        raise UserError(f"{rung.file}: a rung's defaults are its parent and itself: write [{', '.join(wanted)}]")
    if content.pop("rung", None) != rung.name:
        raise UserError(f"{rung.file}: write rung: {rung.name}")
    found = {f"{group}.{key}": value for group, keys in content.items() for key, value in dict(keys).items()}
    for key in found.keys() ^ set(rung.changes):
        what = "changes" if key in found else "does not change"
        raise UserError(f"rung {rung.name} {what} {key}, and states {', '.join(rung.changes)}: see {rung.file}")
    return {key: FROM_CFG.get((rung.name, key), lambda _, value=value: value)(cfg) for key, value in found.items()}


def configuration(cfg: Config, name: str, seed: int) -> Config:
    """The rung over `cfg`, from L0 up. Raises UserError: the rung does not fit this configuration."""
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
        raise UserError(f"rung {name}: {explain(error)}") from error


def configurations(cfg: Config, names: Iterable[str], seeds: Sequence[int]) -> list[Config]:
    """A configuration for each rung and seed, rung by rung, each checked against its parent.

    Raises:
        UserError: a rung that does not fit, changes nothing, or changes what it does not state.
    """
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


def configs(
    cfg: str | None, names: Iterable[str], seeds: Sequence[int] = (0,), overrides: Sequence[str] = ()
) -> list[Config]:
    """`configurations` over what `cfg` and `overrides` compose. Raises UserError."""
    refuse_overrides(names := list(names), overrides)
    return configurations(compose(cfg, overrides), names, seeds)


def check(rung: Rung, parent: Config, child: Config) -> None:
    """Refuse any difference between a rung and its parent other than the stated one. Raises UserError."""
    before, after = computation(parent), computation(child)
    before.pop("seed"), after.pop("seed")
    differing = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    below = rung.parent or "its cfg"
    # with renorm_ce_kd, cross-entropy's weight follows from that of distillation, before the lock
    follows = {"method.ce_alpha"} if parent.method.renorm_ce_kd else set()
    for key in sorted(differing - set(rung.changes) - follows):
        raise UserError(
            f"rung {rung.name} differs from {below} in {key} ({written(before.get(key))} -> "
            f"{written(after.get(key))}), and states {', '.join(rung.changes)} only"
        )
    if not differing:
        raise UserError(
            f"rung {rung.name} changes nothing over {below}: this cfg already has "
            + ", ".join(f"{key}={written(after[key])}" for key in rung.changes)
            + "; start from another cfg, or leave the rung out"
        )


def refuse_overrides(names: Iterable[str], overrides: Sequence[str]) -> None:
    """An override of what a rung sets would be lost: refused. Raises UserError."""
    given = {text.lstrip("+~ ").partition("=")[0].strip() for text in overrides}
    for name in names:
        for rung in lineage(name):
            for key in rung.changes:
                if key in given and (rung.name, key) not in FROM_CFG and key != "method.kd_alpha":
                    raise UserError(f"{key}: rung {rung.name} sets it; leave the override or the rung out")


def table(cfg: Config) -> str:
    """Markdown: every rung, its parent and what it changes over `cfg`."""
    lines = ["| rung | over | changes |", "|---|---|---|"]
    for rung in RUNGS.values():
        changed = ", ".join(f"`{k.removeprefix('method.')}={written(v)}`" for k, v in delta(rung, cfg).items())
        lines.append(f"| `{rung.name}` | `{rung.parent or 'cfg'}` | {changed} |")
    return "\n".join(lines)
