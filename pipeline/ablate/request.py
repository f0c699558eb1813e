"""The request of `-e ablate`, checked before torch is imported, and the interrupted ablation that it continues."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.compose import cli, rungs
from pipeline.compose.compose import compose
from pipeline.config import Config, config_hash, source_digest
from pipeline.config.identity import canonical
from pipeline.config.places import output_dir
from pipeline.config.words import written
from pipeline.paths import REPOSITORY
from pipeline.reporting import tables
from pipeline.runs.folders import interrupted
from pipeline.training.bank.policy import shared

logger = logging.getLogger("asib")
OWN = {
    "rungs": "names of rungs, ladder (the default), or all; table prints what each rung changes",
    "seeds": "such as 0,1,2; by default the value of seed",
    "force": "true: rerun what has finished",
}
PLAN_TAG = "asib.plan"


@dataclass(frozen=True)
class Plan:
    """`configs`: one for each rung and seed, rung by rung. `digest`: equal for equal commands and sources."""

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    force: bool
    configs: tuple[Config, ...]
    digest: str


def print_table(config: Config, command: cli.Command) -> int | None:
    """Print what the rungs change, for `rungs=table`, and return 0; None for other rungs."""
    if command.own.get("rungs") != "table":
        return None
    print(table(compose(command.cfg or rungs.ROOT, command.overrides)))
    return 0


def read(config: Config, command: cli.Command) -> tuple[Config, Plan]:
    """Read the step's own keys; the configuration is the parent run's, which may continue an interrupted ablation.

    Raises UserError: unknown rungs, or rungs that do not fit the configuration.
    """
    own = command.own
    cli.one_process("ablate", "start single rungs with torchrun -m steps.distill cfg=<rung>")
    names = rungs.read_names(own.get("rungs") or "ladder")
    seeds = rungs.read_seeds(own.get("seeds") or str(config.seed))
    force = cli.flag(own, "force")
    rungs.refuse_overrides(names, command.overrides)
    unlogged = {"log_model": False, "register": None}  # the parent's model is the best one's
    configs = [shared(c.model_copy(update=unlogged)) for c in rungs.configurations(config, names, seeds)]
    what = {
        "children": [[c.rung, config_hash(c)] for c in configs],
        "teachers": [t.model_dump() for t in config.model.teachers],
        "sources": source_digest(REPOSITORY),
        "to": [config.tracking.mode, config.tracking.uri, config.tracking.experiment],
        "force": str(force).lower(),
        "amp": config.optim.use_amp,  # not part of the hash, but it changes the identity
    }
    digest = hashlib.sha256(canonical(what).encode()).hexdigest()
    if config.resume is None:
        before = interrupted(output_dir(config), "ablate", PLAN_TAG, digest)
        if before is not None:
            logger.info("continuing %s, which was interrupted", before)
            config = config.model_copy(update={"resume": str(before)})
    config = cli.named(config, f"ablate {_count(names, 'rung')}, {_count(seeds, 'seed')}")
    return config, Plan(tuple(names), tuple(seeds), force, tuple(configs), digest)


def table(cfg: Config) -> str:
    """Markdown: every rung, its parent and what it changes over `cfg`."""
    rows = []
    for rung in rungs.known().values():
        changes = (f"`{key.removeprefix('method.')}={written(value)}`" for key, value in rungs.delta(rung, cfg).items())
        rows.append([f"`{rung.name}`", f"`{rung.parent or 'cfg'}`", ", ".join(changes)])
    return tables.markdown(["rung", "over", "changes"], rows, left=3)


def _count(items: Sequence[object], word: str) -> str:
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"
