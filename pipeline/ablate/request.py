"""The request of `-e ablate`, checked before torch is imported, and the interrupted ablation that it continues."""

from pipeline.ablate.plan import Cell, Plan, continued, digest_of, nested
from pipeline.compose import cli, rungs
from pipeline.compose.compose import compose
from pipeline.config import Config
from pipeline.config.words import written
from pipeline.launch import workers
from pipeline.reporting import tables

OWN = {
    "rungs": "names of rungs, ladder (the default), or all; table prints what each rung changes",
    "seeds": "such as 0,1,2; by default the value of seed",
    "force": "true: rerun what has finished",
    **workers.OWN,
}


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
    crew = workers.read(own)
    rungs.refuse_overrides(names, command.overrides)
    cells = tuple(
        Cell(str(c.rung), nested(c), {"asib.parent_rung": rungs.known()[str(c.rung)].parent or "none"})
        for c in rungs.configurations(config, names, seeds)
    )
    digest = digest_of(config, cells, force=str(force).lower())
    config = continued(config, "ablate", digest, crew)
    params = {"rungs": ",".join(names), "seeds": ",".join(map(str, seeds))}
    return config, Plan(cells, force, digest, params, crew)


def table(cfg: Config) -> str:
    """Markdown: every rung, its parent and what it changes over `cfg`."""
    rows = []
    for rung in rungs.known().values():
        changes = (f"`{key.removeprefix('method.')}={written(value)}`" for key, value in rungs.delta(rung, cfg).items())
        rows.append([f"`{rung.name}`", f"`{rung.parent or 'cfg'}`", ", ".join(changes)])
    return tables.markdown(["rung", "over", "changes"], rows, left=3)
