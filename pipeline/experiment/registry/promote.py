"""The promotion job: judge a challenger against the champion, and move the aliases only then; or roll back, or retire.

A decision is kept three times: as the run, as tags of the version, and (what happened to a version, line by line) as
the version's history; moving aliases later takes none of it away.
"""

import getpass
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime

from pipeline.errors import UserError
from pipeline.experiment.registry import contender, decision, queue, report
from pipeline.experiment.registry import gate as gates
from pipeline.experiment.registry.decision import Occasion
from pipeline.experiment.registry.gate import Verdict
from pipeline.experiment.registry.plan import Plan, sides
from pipeline.experiment.registry.remote import CHAMPION, MOVE, PAST, PREVIOUS, Overview, Registry, Version
from pipeline.experiment.run import Run
from pipeline.experiment.session import load_data, prepare

logger = logging.getLogger("asib")
REFUSED = 3
"""Exit code of a promotion that the gate refuses."""
FOLDER = "promotion"


def promote(run: Run, plan: Plan) -> float | None:
    """Do what the plan asks for; the run's conclusion says how it went.

    Returns:
        The improvement in points, where two versions were compared.

    Raises:
        UserError: bad input, another promotion under way, no permission; then no alias was moved.
    """
    run.ready()
    assert run.delivery is not None
    assert run.run_id is not None
    registry = Registry(run.delivery, plan.name)
    run.journal.params({f"promote.{key}": value for key, value in _params(plan).items()})
    run.journal.tags({"asib.action": plan.action})
    user = str(run.delivery.run_info(run.run_id)["tags"].get("mlflow.user") or _user())
    why = Occasion(run.run_id, user, _now(), plan.reason)
    if plan.dry_run:
        return _act(run, plan, registry, why, None)
    run.journal.tags({"asib.promote": plan.name})
    with queue.turn(registry, run.run_id):
        return _act(run, plan, registry, why, registry.repair())


def _act(run: Run, plan: Plan, registry: Registry, why: Occasion, mended: dict[str, object] | None) -> float | None:
    now = registry.overview()
    if mended is not None:
        logger.info("an interrupted move was finished: %s (decided in run %s)", mended["why"], mended["run"])
        run.journal.tags({"asib.mended": str(mended["run"])})
    elif now.tags.get(MOVE):
        logger.info("an interrupted move waits to be finished: %s", json.loads(now.tags[MOVE])["why"])
        now = _as_if_finished(now)
    match plan.action:
        case "rollback":
            _rollback(run, plan, registry, now, why)
        case "retire":
            _retire(run, plan, registry, now, why)
        case "promote":
            return _promote(run, plan, registry, now, why, mended)
    return None


def _as_if_finished(now: Overview) -> Overview:
    """What a dry run would find after the repair that it does not do."""
    after = json.loads(now.tags[MOVE])
    aliases = {k: v for k, v in {**now.aliases, **after["after"]}.items() if v is not None}
    return Overview(aliases, {**now.tags, PAST: json.dumps(after["past"])})


# promotion -----------------------------------------------------------------------------------------------------------


def _promote(
    run: Run, plan: Plan, registry: Registry, now: Overview, why: Occasion, mended: dict[str, object] | None
) -> float | None:
    challenger, champion = sides(plan, registry, now, mended is not None)
    if challenger is None:
        run.conclusion = ("promoted", 0)
        _say(run, f"{plan.name}: version {now.aliases[CHAMPION]} is the champion: its promotion is finished now")
        return None
    prepare(run.config)
    data = load_data(run)
    both = {"challenger": challenger} | ({"champion": champion} if champion else {})
    for version in both.values():
        contender.same_images(plan.name, version, data, run.config)
        if version.run_id:
            run.journal.model_input(version.run_id)
    fetched = run.folder / "fetched"
    found = [contender.fetch(registry, v, data, run.config, fetched / v.number) for v in both.values()]
    judged = dict(zip(both, contender.judge(found, data, run.config), strict=True))
    measured = {side: one.measured for side, one in judged.items()}
    labels = data.test_y.numpy()
    verdict = gates.judge(plan.gate, labels, data.classes, measured["challenger"], measured.get("champion"))
    run.journal.hold()
    for side, one in judged.items():
        run.journal.metrics({f"{side}/{name}": value for name, value in one.metrics.items()}, 0)
    run.journal.metrics(verdict.numbers | {"promotion/passed": float(verdict.passed)}, 0)
    run.journal.release()
    correct = {side: one.correct for side, one in measured.items()}
    for path in report.write(run.folder / FOLDER, verdict, plan.gate, labels, data.classes, correct):
        run.journal.artifact(path, FOLDER)
    _decide(run, plan, registry, now, why, challenger, champion, verdict)
    return verdict.numbers.get("promotion/improvement")


def _decide(
    run: Run,
    plan: Plan,
    registry: Registry,
    now: Overview,
    why: Occasion,
    challenger: Version,
    champion: Version | None,
    verdict: Verdict,
) -> None:
    """Say the verdict, keep it, and move the aliases where it is a good one."""
    reason = report.sentence(verdict)
    against = f"version {champion.number}, the champion" if champion else "the thresholds of a first version"
    title = f"{plan.name}: version {challenger.number} against {against} (gate {plan.gate.name})"
    print(report.text(title, verdict), flush=True)
    did = "promoted" if verdict.passed else "refused"
    words = f"would be {did}" if plan.dry_run else did
    conclusion = f"{plan.name}: version {challenger.number} {words}: {reason}"
    tags = decision.verdict_tags(verdict, champion, plan.gate.name, why, reason)
    if not plan.dry_run:
        queue.still_ours(registry, why.run_id)
        if verdict.passed:
            registry.move(decision.promotion(now, challenger, champion, tags, why))
        else:
            line = f"refused against {tags['asib.against']} ({reason})"
            registry.tag(challenger.number, {**tags, **decision.history(challenger, why, line)})
    if verdict.passed:
        run.conclusion = ("completed" if plan.dry_run else "promoted", 0)
    else:
        run.conclusion = ("refused", REFUSED)
    run.journal.tags(
        {
            "asib.verdict": tags["asib.verdict"],
            "asib.verdict_reason": reason,
            "asib.version": challenger.number,
            "asib.against": tags["asib.against"],
            "mlflow.note.content": report.note(title, verdict, conclusion),
            "mlflow.loggedArtifacts": json.dumps([{"path": f"{FOLDER}/{report.TABLE}", "type": "table"}]),
        }
    )
    print(conclusion, flush=True)


# rollback and retirement ---------------------------------------------------------------------------------------------


def _rollback(run: Run, plan: Plan, registry: Registry, now: Overview, why: Occasion) -> None:
    numbers = {*decision.champions(now), *filter(None, [now.aliases.get(CHAMPION)])}
    versions = dict(_known(registry, numbers))
    gone = [number for number in decision.champions(now) if number not in versions]
    if gone:
        logger.warning("past champions that are no longer there: %s", ", ".join(gone))
    move = decision.rollback(_without(now, gone), versions, why)
    if not plan.dry_run:
        queue.still_ours(registry, why.run_id)
        registry.move(move)
    run.journal.tags({"asib.version": move["after"][CHAMPION], "asib.reason": plan.reason or "none given"})
    after = move["after"][PREVIOUS]
    then = f"version {after}" if after else "none: a further rollback would be refused"
    would = "would be: " if plan.dry_run else ""
    _say(run, f"{plan.name}: {would}{move['why']}; previous is now {then}")


def _known(registry: Registry, numbers: set[str]) -> Iterator[tuple[str, Version]]:
    """Versions that somebody has deleted in MLflow are left out."""
    for number in sorted(numbers):
        try:
            yield number, registry.version(number)
        except UserError as error:
            if "has no such version" not in str(error):
                raise


def _without(now: Overview, gone: list[str]) -> Overview:
    kept = [number for number in decision.champions(now) if number not in gone]
    aliases = {alias: number for alias, number in now.aliases.items() if number not in gone}
    return Overview(aliases, {**now.tags, PAST: json.dumps(kept)})


def _retire(run: Run, plan: Plan, registry: Registry, now: Overview, why: Occasion) -> None:
    assert plan.version is not None
    version = registry.version(plan.version)
    tags = decision.retirement(version, now, why)
    if not plan.dry_run:
        registry.tag(version.number, tags)
    run.journal.tags({"asib.version": version.number, "asib.reason": plan.reason or "none given"})
    would = "would be retired" if plan.dry_run else "is retired: it stays where it is, and is never promoted"
    _say(run, f"{plan.name}: version {version.number} {would}")


# words ---------------------------------------------------------------------------------------------------------------


def _say(run: Run, conclusion: str) -> None:
    run.journal.tags({"mlflow.note.content": f"**{conclusion}**"})
    print(conclusion, flush=True)


def _params(plan: Plan) -> dict[str, str]:
    own = {"action": plan.action, "name": plan.name, "version": plan.version or "", "gate": plan.gate.name}
    own |= {"dry_run": str(plan.dry_run).lower(), "reason": plan.reason}
    criteria = plan.gate.model_dump(exclude={"name"}) if plan.action == "promote" else {}
    criteria |= {f"first.{key}": value for key, value in criteria.pop("first", {}).items()}
    own |= {f"gate.{key}": str(value) for key, value in criteria.items()}
    return {key: value for key, value in own.items() if value}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


__all__ = ["REFUSED", "promote"]
