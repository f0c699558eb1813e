"""The request of `-e overlap`: shares of common classes × methods × seeds, checked before torch is imported."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.ablate.plan import Cell, Plan, continued, digest_of, nested
from pipeline.compose import cli, rungs, shortcuts
from pipeline.compose.compose import Setting, compose_each, keys_of
from pipeline.config import Config, methods
from pipeline.config.words import suggestion
from pipeline.errors import UserError
from pipeline.launch import workers
from pipeline.paths import printable

if TYPE_CHECKING:
    from pipeline.data.sources import ImageData
    from pipeline.runs.records import Record
    from pipeline.runs.run import Run

OWN = {
    "rhos": "shares of the classes that all teachers are taught (default 0,0.25,0.5,0.75,1)",
    "methods": "methods for several teachers (default asib,aver,ca_mkd,stack); the others are compared with the first",
    "seeds": "such as 0,1,2; by default the value of seed",
    "force": "true: rerun what has finished",
    **workers.OWN,
}
RHOS = "0,0.25,0.5,0.75,1"
METHODS = "asib,aver,ca_mkd,stack"
DECIDED = ("model.overlap", "method", "method.name", "rung")
"""Keys that a cell has of its own, so that no override may set them."""


def read(config: Config, command: cli.Command) -> tuple[Config, Plan]:
    """Read the step's own keys and compose every cell; the parent's configuration is that of the first one.

    Raises UserError: a share that is none, an unknown method or one for a single teacher, a cell that is not valid.
    """
    own = command.own
    cli.one_process("overlap", "start single runs with torchrun -m steps.distill model.overlap=<share>")
    found = shortcuts.read(os.environ, command.overrides, own.get("methods", ""))
    overrides = [*found.overrides, *command.overrides]
    for key in sorted(keys_of(overrides).intersection(DECIDED)):
        raise UserError(f"{key}: every cell has its own; choose with rhos= and methods=")
    rhos, names = _rhos(own.get("rhos") or RHOS), _methods(own.get("methods") or ",".join(found.methods) or METHODS)
    seeds = rungs.read_seeds(own.get("seeds") or str(config.seed))
    force, crew = cli.flag(own, "force"), workers.read(own)
    cells = tuple(_cells(command.cfg, overrides, found, rhos, names, seeds))
    first = cells[0].config
    shown = first.model_copy(update={k: getattr(config, k) for k in ("run_name", "resume", "extend", "seed")})
    digest = digest_of(first, cells, force=str(force).lower())
    params = {"rhos": ",".join(map(_shown, rhos)), "methods": ",".join(names), "seeds": ",".join(map(str, seeds))}
    plan = Plan(cells, force, digest, params, crew, best=False, baseline=names[0], report=_report)
    return continued(shown, "overlap", digest, crew), plan


def _listed(key: str, text: str, usual: str) -> list[str]:
    """`a,b` or `[a, b]`: each once. Raises UserError: none."""
    words = cli.listed(text)
    if not words:
        raise UserError(f"{key}={printable(text, 80)}: give at least one, such as {key}={usual}")
    return words


def _rhos(text: str) -> list[float]:
    found = []
    for word in _listed("rhos", text, RHOS):
        try:
            share = float(word)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:  # neither is a NaN
            raise UserError(f"rhos={printable(word, 80)}: give shares from 0 to 1, such as rhos={RHOS}")
        found.append(share)
    return list(dict.fromkeys(found))


def _methods(text: str) -> list[str]:
    several, names = ["asib", *methods.for_several_teachers()], _listed("methods", text, METHODS)
    for name in names:
        if name not in methods.names():
            hint = suggestion(name, several)
            given = printable(name, 80)
            raise UserError(f"methods={given}: no such method; {hint}there are {', '.join(several)}")
        if name not in several:
            raise UserError(f"methods={name}: it distils from one teacher; choose from {', '.join(several)}")
    return names


def _shown(rho: float) -> str:
    return f"{rho:g}"


def _cells(
    cfg: str | None,
    overrides: Sequence[str],
    found: shortcuts.Shortcuts,
    rhos: Sequence[float],
    names: Sequence[str],
    seeds: Sequence[int],
) -> Iterator[Cell]:
    presets = [partial(_divided, rho, found) for rho in rhos]
    for name in names:
        for rho, config in zip(rhos, compose_each(presets, cfg, [f"method={name}", *overrides]), strict=True):
            for seed in seeds:
                own = nested(config.model_copy(update={"seed": seed}))
                yield Cell(f"{name} rho {_shown(rho)}", own, {"asib.row": name}, f"rho{_shown(rho)}")


def _divided(rho: float, found: shortcuts.Shortcuts, composed: Any) -> list[Setting]:
    # where all are taught all, the run is the one without a division, and is reused as such
    return [*found.presets(composed), Setting("model.overlap", None if rho == 1 else rho)]


def _report(run: "Run", data: "ImageData", results: "Sequence[tuple[Cell, Record]]") -> None:
    from pipeline.ablate import overlap_report  # late: it imports torch and pandas

    overlap_report.log(run, data, results)
