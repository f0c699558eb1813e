"""The request of `-e promote`: the step's own keys, checked before torch is imported, then against the registry."""

from dataclasses import dataclass
from typing import Literal

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.config.numbers import VERSIONS, whole
from pipeline.config.rules import registered_name_fault
from pipeline.errors import NotThere, UserError
from pipeline.promote import criteria, queue
from pipeline.promote.criteria import Gate
from pipeline.promote.registered_model import RETIRED, ROLLED_BACK, Overview, Registry, Version
from pipeline.tracking.model_tags import CHALLENGER, CHAMPION

OWN = {
    "name": "the registered model",
    "version": "the challenger; by default the version with the alias challenger",
    "gate": "its criteria: a name in conf/promotion (by default `default`), or a YAML file",
    "dry_run": "true: show what would happen, and move nothing",
    "rollback": "true: make the version with the alias previous champion again",
    "retire": "a version never to promote (again); nothing else changes",
    "reason": "why, in words; recorded with the decision",
    "gate.": "any key of the gate's file: gate.alpha=0.01, gate.first.min_acc=60",
}
LONGEST_REASON = 500
Action = Literal["promote", "rollback", "retire"]


@dataclass(frozen=True)
class Plan:
    """`version`: the one to promote (None: the one with the alias challenger) or to retire."""

    action: Action
    name: str
    version: str | None
    gate: Gate
    dry_run: bool
    reason: str

    def words(self) -> str:
        """What DRY_RUN=1 shows."""
        which = f"version {self.version}" if self.version else "the version with the alias challenger"
        does = {
            "promote": f"judge {which} of {self.name} by the gate {self.gate.words}",
            "rollback": f"make the version of {self.name} with the alias previous champion again",
            "retire": f"retire {which} of {self.name}",
        }
        return does[self.action] + (", and move nothing" if self.dry_run else "")


def read(config: Config, command: cli.Command) -> tuple[Config, Plan]:
    """Read the step's own keys; the configuration gets the run's name.

    Raises UserError: no name, mutually exclusive keys, a bad gate, tracking=offline.
    """
    own = command.own
    name = own.get("name", "")
    if not name:
        raise UserError("name is not set: give name=<registered model>")
    fault = registered_name_fault(name)
    if fault is not None:
        raise UserError(f"name={name}: {fault}")
    rollback, retire = cli.flag(own, "rollback"), own.get("retire") or None
    version = own.get("version") or None
    if sum((rollback, retire is not None, version is not None)) > 1:
        given = [f"{key}={own[key]}" for key in ("version", "rollback", "retire") if own.get(key)]
        raise UserError(f"{' and '.join(given)} exclude each other: give one of them")
    for key, number in (("version", version), ("retire", retire)):
        if number is not None:
            whole(key, number, high=VERSIONS, why=f"it is the number of a version, such as {key}=3")
    cli.one_process("promote", "start it without torchrun")
    if config.tracking.mode == "offline":
        raise UserError("tracking=offline: the registry is on the tracking server; leave tracking online")
    if config.resume is not None:
        raise UserError(
            f"resume={config.resume}: a promotion is never resumed; start it again, it finishes what was half done"
        )
    settings = cli.settings(own, "gate")
    gate = criteria.load(own.get("gate") or "default", settings)
    action: Action = "rollback" if rollback else "retire" if retire else "promote"
    reason = " ".join(own.get("reason", "").split())
    if len(reason) > LONGEST_REASON:
        raise UserError(f"reason has {len(reason)} characters: give at most {LONGEST_REASON}")
    if action != "promote" and (own.get("gate") or settings):
        raise UserError(f"{action} needs no gate: leave out gate and gate.*")
    plan = Plan(action, name, version or retire, gate, cli.flag(own, "dry_run"), reason)
    return config, plan


def check(plan: Plan, registry: Registry) -> list[Version]:
    """Check the request against the registry, before a run exists.

    Returns the versions to judge, as far as they are known: an interrupted move is finished first.

    Raises UserError: no such model or version, a challenger that must not be promoted, no permission, or somebody
    else's promotion under way.
    """
    now = registry.overview()
    if not plan.dry_run:
        registry.ask("may_edit")
        queue.refuse_if_busy(registry)
    if plan.action == "promote" and now.move is None:
        return [version for version in sides(plan, registry, now) if version is not None]
    if plan.version is not None:
        registry.version(plan.version)
    return []


def sides(plan: Plan, registry: Registry, now: Overview, mended: bool = False) -> tuple[Version | None, Version | None]:
    """Challenger and champion. No challenger: the repair has just finished its interrupted promotion.

    Raises UserError: there is no challenger, or one that must not be promoted, or the champion is gone.
    """
    number = plan.version or now.aliases.get(CHALLENGER)
    if number is None:
        raise UserError(
            f"name={plan.name}: no version has the alias {CHALLENGER}; give version=<n>, or register a student"
        )
    champion = now.aliases.get(CHAMPION)
    if champion is None:
        _refuse_without(registry, now)
    if number == champion:
        if mended:
            return None, None
        raise UserError(f"version {number} of {plan.name} is the champion already: there is nothing to promote")
    challenger = registry.version(number)
    if challenger.status != "READY":
        raise UserError(f"version {number} of {plan.name} is {challenger.status}: wait until it is READY")
    if RETIRED in challenger.tags:
        raise UserError(f"version {number} of {plan.name} is retired ({challenger.tags[RETIRED]}): take another")
    if challenger.tags.get(ROLLED_BACK) and plan.version is None:
        raise UserError(
            f"version {number} of {plan.name} was rolled back ({challenger.tags[ROLLED_BACK]}): version={number} "
            "promotes it anyway"
        )
    return challenger, None if champion is None else registry.version(champion)


def _refuse_without(registry: Registry, now: Overview) -> None:
    """Raise UserError if a deleted champion has a predecessor to be judged against."""
    for number in reversed(now.past):
        try:
            usable = RETIRED not in registry.version(number).tags
        except NotThere:  # deleted as well
            continue
        if usable:
            raise UserError(
                f"the champion of {registry.name} is gone (its version or its alias was deleted): rollback=true makes "
                f"version {number}, the one before it, champion again; then promote. Or retire={number} to start afresh"
            )
