"""The request of `-e table`: pairs × methods × seeds of conf/table, composed and checked before torch is imported."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.ablate.plan import Cell, Plan, continued, digest_of, nested
from pipeline.compose import cli, rungs, shortcuts
from pipeline.compose.compose import Setting, compose_each, keys_of
from pipeline.compose.groups import locate
from pipeline.compose.settings import read_section
from pipeline.config import Config, TeacherConfig, config_hash, configure, explain, student_alone
from pipeline.config.words import suggestion
from pipeline.errors import UserError
from pipeline.launch import workers

if TYPE_CHECKING:
    from pipeline.runs.records import Record

DEFAULT = "quick"
OWN = {
    "table": "pairs, methods and recipe: a file of conf/table, or any YAML file (default quick)",
    "pairs": "some of the table's pairs, separated by commas; by default all",
    "methods": "some of its methods; by default all",
    "seeds": "such as 0,1,2; by default the value of seed",
    "force": "true: rerun what has finished",
    "anyway": "true: compare methods even if they differ in their epochs",
    **workers.OWN,
    "table.": "a key of the file, such as table.baseline=kd or table.equal_cost=false",
}
ALONE = "alone"
"""The row of the student without teachers."""
ALIKE = 0.05
"""Total costs that differ by less than this share are equal, as in pipeline/compare/pools.py."""


class Part(BaseModel):
    """A part of a table's file: no other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Pair(Part):
    """`teachers`: networks, fine-tuned where they have no checkpoint. `student`: a network without weights."""

    teachers: Annotated[tuple[TeacherConfig, ...], Field(min_length=1)]
    student: str

    @field_validator("teachers", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return (
            [{"name": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )


class TableConfig(Part):
    """A table; `name` is the stem of its file.

    Attributes:
        recipe: what `cfg=` names, which decides on everything but pair and method.
        methods: rows; their overrides, null for `method=<the row>`. `alone` is the student without teachers.
        baseline: the row that the others are compared with.
        equal_cost: whether the baseline is also trained until it costs as much as each dearer row.
    """

    name: str
    recipe: str
    pairs: dict[str, Pair] = Field(min_length=1)
    methods: dict[str, tuple[str, ...] | None] = Field(min_length=1)
    baseline: str
    equal_cost: bool = True


def recipe(own: Mapping[str, str]) -> str:
    """What `cfg` names unless it is given. Raises UserError: an unknown table."""
    return _table(own).recipe


def _table(own: Mapping[str, str]) -> TableConfig:
    given = own.get("table") or DEFAULT
    file = locate("table", given)
    found: TableConfig = read_section(TableConfig, "table", given, file, cli.settings(own, "table"), name=file.stem)
    return found


def read(config: Config, command: cli.Command) -> tuple[Config, Plan]:
    """Read the step's own keys and compose every cell; the parent's configuration is that of the first one.

    Raises UserError: an unknown table, pair or method; a cell that is not valid; rows that cannot be compared.
    """
    own = command.own
    cli.one_process("table", "start single runs with torchrun -m steps.distill cfg=<recipe> method=<name>")
    table = _table(own)
    pairs = _chosen("pairs", own.get("pairs"), table.pairs)
    found = shortcuts.read(os.environ, command.overrides, own.get("methods", ""))
    asked = ("METHOD", ",".join(found.methods)) if found.methods else ("methods", own.get("methods"))
    methods = _chosen(*asked, table.methods)
    if table.baseline not in methods:
        hint = suggestion(table.baseline, methods)
        raise UserError(f"table.baseline={table.baseline}: no row of this table; {hint}there are {', '.join(methods)}")
    seeds = rungs.read_seeds(own.get("seeds") or str(config.seed))
    crew = workers.read(own)
    force, anyway = cli.flag(own, "force"), cli.flag(own, "anyway")
    cells = tuple(_cells(table, command, found, pairs, methods, seeds))
    _check(table, cells, anyway)
    first = cells[0].config
    shown = first.model_copy(update={k: getattr(config, k) for k in ("run_name", "resume", "extend", "seed")})
    digest = digest_of(first, cells, force=str(force).lower(), baseline=table.baseline, equal_cost=table.equal_cost)
    params = {
        "table": table.name,
        "pairs": ",".join(pairs),
        "methods": ",".join(methods),
        "seeds": ",".join(map(str, seeds)),
    }
    more = partial(_longer, table.baseline) if table.equal_cost else lambda results: ()
    plan = Plan(cells, force, digest, params, crew, best=False, baseline=table.baseline, anyway=anyway, more=more)
    return continued(shown, "table", digest, crew), plan


def _chosen(key: str, given: str | None, known: Mapping[str, Any]) -> list[str]:
    """The names that are given, or all. Raises UserError: one that the table does not have."""
    names = cli.listed(given or "")
    for name in names:
        if name not in known:
            raise UserError(f"{key}={name}: not in this table; {suggestion(name, known)}there are {', '.join(known)}")
    return names or list(known)


# cells ---------------------------------------------------------------------------------------------------------------


def _cells(
    table: TableConfig,
    command: cli.Command,
    found: shortcuts.Shortcuts,
    pairs: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
) -> Iterator[Cell]:
    """A cell for each pair, method and seed; a student alone that several pairs share comes once."""
    overrides = [*found.overrides, *command.overrides]
    asked = sorted({key for key in keys_of(overrides) if _decided(key)})
    if asked or found.teachers:
        key = asked[0] if asked else "TEACHER_PAIR in the environment"
        raise UserError(
            f"{key}: a table's rows have their own; choose with pairs= and methods=, or write another table"
        )
    configs = {method: _configurations(table, command.cfg, overrides, found, pairs, method) for method in methods}
    seen: dict[str, str] = {}
    for pair in pairs:
        for method in methods:
            config = _next(configs[method], f"{method}, {pair}")
            key = config_hash(config)
            if key in seen and seen[key] == method == ALONE:
                continue
            if key in seen:
                raise UserError(f"table={table.name}: {seen[key]} and {method} are the same configuration: keep one")
            seen[key] = method
            for seed in seeds:
                row = f"{method} {config.model.student.name.removeprefix('cifar_') if method == ALONE else pair}"
                yield Cell(row, config.model_copy(update={"seed": seed}), {"asib.row": method}, pair)


def _next(configs: Iterator[Config], name: str) -> Config:
    """The next configuration; a UserError names the cell."""
    try:
        return next(configs)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _decided(key: str) -> bool:
    """Whether pairs and methods decide on a key, so that no override may."""
    return key.startswith(("model.", "model/")) or key in ("model", "method", "method.name", "rung")


def _configurations(
    table: TableConfig,
    cfg: str | None,
    overrides: list[str],
    found: shortcuts.Shortcuts,
    pairs: Sequence[str],
    method: str,
) -> Iterator[Config]:
    """What `steps.distill cfg=<recipe>` with each pair and this method would compose."""
    # a student alone has its schedule from a method that is valid for these teachers
    of = next((m for m in (table.baseline, *table.methods) if m != ALONE), ALONE) if method == ALONE else method
    own = table.methods[of]
    of_method = ([] if of == ALONE else [f"method={of}"]) if own is None else list(own)
    for key in keys_of(of_method):
        if key.startswith("dataset") or (key != "method" and _decided(key)):
            raise UserError(f"table={table.name}: methods.{method} sets {key}, which all rows share; leave it out")
    presets = [partial(_networks, table.pairs[pair], found) for pair in pairs]
    for config in compose_each(presets, cfg or table.recipe, [*of_method, *overrides]):
        yield nested(student_alone(config) if method == ALONE else config)


def _networks(pair: Pair, found: shortcuts.Shortcuts, composed: Any) -> list[Setting]:
    return [
        *found.presets(composed),
        Setting("model.student", {"name": pair.student, "pretrained": False}),
        Setting("model.teachers", [teacher.model_dump() for teacher in pair.teachers]),
    ]


def _check(table: TableConfig, cells: Sequence[Cell], anyway: bool) -> None:
    """Refuse before training what a comparison would refuse after it. Raises UserError."""
    epochs = {str(cell.tags["asib.row"]): _epochs(cell.config) for cell in cells}
    for row, number in epochs.items():
        if number != epochs[table.baseline] and not anyway:
            raise UserError(
                f"table={table.name}: {row} has {number} epochs and {table.baseline} {epochs[table.baseline]}: give "
                "them equally many, or anyway=true"
            )


# equal total cost ----------------------------------------------------------------------------------------------------


def _epochs(config: Config) -> int:
    return config.method.b_epochs


def _longer(baseline: str, results: Sequence[tuple[Cell, "Record"]]) -> list[Cell]:
    """The baseline of each pair with as many epochs as make it cost what a dearer row costs, for each such cost."""
    cells: dict[tuple[str, int], Cell] = {}
    for pair in dict.fromkeys(cell.pair for cell, _ in results):
        costs: dict[str, list[float]] = {}
        for cell, record in results:
            if cell.pair == pair and "cost/gmacs" in record.metrics:
                costs.setdefault(cell.tags["asib.row"], []).append(record.metrics["cost/gmacs"])
        own = [cell for cell, _ in results if cell.pair == pair and cell.tags["asib.row"] == baseline]
        if not own or baseline not in costs:
            continue
        usual, mean = _epochs(own[0].config), {row: fmean(of) for row, of in costs.items()}
        wanted: list[int] = []
        for row in sorted(mean, key=lambda row: mean[row]):
            ratio = mean[row] / mean[baseline]
            epochs = round(usual * ratio)
            if ratio > 1 + ALIKE and not any(abs(n / (usual * ratio) - 1) <= ALIKE / 2 for n in wanted):
                wanted.append(epochs)
        for epochs in wanted:
            for cell in own:
                row = f"{cell.row} {epochs} epochs"
                cells[row, cell.config.seed] = replace(cell, row=row, config=stretched(cell.config, epochs))
    return list(cells.values())


def stretched(config: Config, epochs: int) -> Config:
    """The configuration with this many student epochs, in equal shares of its stages; the schedule falls as early.

    Warm-ups keep their length. Raises UserError: it is not valid.

    Example:
        >>> stretched(compose("quickstart"), 30).method.student_epochs_per_stage
        (8, 7, 8, 7)
    """
    usual = config.method.student_epochs_per_stage
    ends = [round(epochs * sum(usual[: k + 1]) / sum(usual)) for k in range(len(usual))]
    stages = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    values = config.model_dump()
    values["method"]["student_epochs_per_stage"] = stages
    values["schedule"]["milestones"] = [round(m * epochs / sum(usual)) for m in config.schedule.milestones]
    try:
        return configure(values)
    except ValidationError as error:
        raise UserError(f"{epochs} epochs: {explain(error, values)}") from error
