"""The promotion job: judge a challenger and move the aliases if it passes the gate; or roll back; or retire.

A decision is recorded three times: as the run, as tags of the version, and as a line of the version's history. Moving
aliases later removes none of these.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import escape
from pipeline.config import Config
from pipeline.data.image_files import ImageFiles
from pipeline.data.sources import ImageData
from pipeline.distill import networks
from pipeline.distill.train import images, load_data, prepare
from pipeline.errors import NotThere, UserError
from pipeline.promote import contender, decision, queue, report
from pipeline.promote.decision import Occasion
from pipeline.promote.gate import Verdict, judge
from pipeline.promote.registered_model import Overview, Registry, Version
from pipeline.promote.request import Plan, sides
from pipeline.reporting import tables
from pipeline.runs.ending import COMPLETED, Ending
from pipeline.runs.naming import name_of
from pipeline.runs.run import Run
from pipeline.served import bundle
from pipeline.tracking.model_tags import CHAMPION, PAST, PREVIOUS

logger = logging.getLogger("asib")
PROMOTED, REFUSED = Ending("FINISHED", "promoted", 0), Ending("FINISHED", "refused", 3)
FOLDER = "promotion"


def promote(run: Run, plan: Plan) -> Ending:
    """Do what the plan asks for; the run ends as completed, promoted, or refused by the gate.

    Raises UserError: bad input, another promotion under way, no permission; no alias has been moved.
    """
    run.ready()
    assert run.delivery is not None
    assert run.run_id is not None
    registry = Registry(run.delivery, plan.name)
    run.journal.params({f"promote.{key}": value for key, value in _params(plan).items()})
    run.journal.tags({"asib.action": plan.action})
    user = run.delivery.run_info(run.run_id)["tags"].get("mlflow.user", "")
    why = Occasion(run.run_id, user, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), plan.reason)
    if plan.dry_run:
        return _act(run, plan, registry, why, None)
    run.journal.tags({"asib.promote": plan.name})
    with queue.turn(registry, run.run_id, user):
        return _act(run, plan, registry, why, registry.repair())


def same_data(config: Config, name: str, versions: Sequence[Version]) -> None:
    """Check the device and the data of the versions to judge, before a run exists. Raises UserError."""
    networks.device_of(config)
    prepare(config)
    for version in versions:
        contender.same_images(name, version, images(config), config)


def _act(run: Run, plan: Plan, registry: Registry, why: Occasion, mended: dict[str, object] | None) -> Ending:
    now = registry.overview()
    registry.warn(now.said)
    if mended is not None:
        logger.info("an interrupted move was finished: %s (decided in run %s)", mended["why"], mended["run"])
        run.journal.tags({"asib.mended": str(mended["run"])})
    elif now.move is not None:
        logger.info("an interrupted move is still pending: %s", now.move["why"])
        now = _as_if_finished(now, now.move)
    match plan.action:
        case "rollback":
            _rollback(run, plan, registry, now, why)
        case "retire":
            _retire(run, plan, registry, now, why)
        case "promote":
            return _promote(run, plan, registry, now, why, mended)
    return COMPLETED


def _as_if_finished(now: Overview, move: dict[str, Any]) -> Overview:
    """What a dry run would find after the repair, which it does not carry out."""
    aliases = {k: v for k, v in {**now.aliases, **move["after"]}.items() if v is not None}
    return Overview(aliases, {**now.tags, PAST: json.dumps(move["past"])})


# promotion -----------------------------------------------------------------------------------------------------------


def _promote(
    run: Run, plan: Plan, registry: Registry, now: Overview, why: Occasion, mended: dict[str, object] | None
) -> Ending:
    challenger, champion = sides(plan, registry, now, mended is not None)
    if challenger is None:
        _conclude(run, f"{plan.name}: version {now.aliases[CHAMPION]} is the champion: its promotion is finished now")
        return PROMOTED
    prepare(run.config)
    data = load_data(run)
    both = {"challenger": challenger} | ({"champion": champion} if champion else {})
    for version in both.values():
        contender.same_images(plan.name, version, data, run.config)
        if version.run_id:
            run.journal.model_input(version.run_id)
    found = [_fetched(run, registry, now, side, version, data) for side, version in both.items()]
    look = 1
    if champion is not None:  # a dry run shows the same numbers, so it counts too
        pair = f"{challenger.number}-{champion.number}"
        look = registry.look(_test_digest(data), data.digest, pair, turn=not plan.dry_run)
    measured = dict(zip(both, contender.measure(found, data, run.config), strict=True))
    for each in found:
        number, manifest = each.version.number, each.manifest
        if manifest and not plan.dry_run:  # it was registered without one
            registry.ask("tag_manifest", number=number, manifest=manifest)
            logger.info("wrote the manifest of version %s (tag %s)", number, bundle.TAG)
    labels = data.test_y.numpy()
    verdict = judge(plan.gate, labels, data.classes, measured["challenger"], measured.get("champion"), look)
    run.journal.hold()
    for side, one in measured.items():
        run.journal.metrics({f"{side}/{name}": value for name, value in one.metrics.items()}, 0)
    run.journal.metrics(verdict.numbers | {"promotion/passed": float(verdict.passed)}, 0)
    run.journal.release()
    correct = {side: one.correct for side, one in measured.items()}
    for path in report.write(run.folder / FOLDER, verdict, plan.gate, labels, data.classes, correct):
        run.journal.artifact(path, FOLDER)
    _decide(run, plan, registry, now, why, challenger, champion, verdict)
    if not verdict.passed:
        return REFUSED
    return COMPLETED if plan.dry_run else PROMOTED


def _fetched(
    run: Run, registry: Registry, now: Overview, side: str, version: Version, data: ImageData
) -> contender.Contender:
    """Fetch a version. Raises UserError: its files are gone (and what to do about it), or are not a student's."""
    try:
        return contender.fetch(registry, version, data, run.config, run.folder / "fetched" / version.number)
    except NotThere as error:
        way = "promote another with version=<n>, or register it again"
        if side == "champion" and now.past:
            way = "rollback=true makes an earlier champion champion again; then promote"
        elif side == "champion":
            way = _as_a_first_one(registry)
        raise UserError(f"the files of version {version.number}, the {side}, are gone: {way} ({error})") from error


def _test_digest(data: ImageData) -> str:
    """SHA-256 (hex) of the test split alone: changing the training images does not make a fresh test set."""
    hashed = hashlib.sha256(data.test_y.numpy().tobytes())
    if isinstance(data.test_x, ImageFiles):
        for path in data.test_x.paths:
            hashed.update(hashlib.sha256(Path(path).read_bytes()).digest())
    else:
        hashed.update(data.test_x.cpu().numpy().tobytes())
    return hashed.hexdigest()


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
    """Print and record the verdict, and move the aliases if the challenger passed."""
    reason = report.sentence(verdict)
    against = f"version {champion.number}, the champion" if champion else "the thresholds of a first version"
    title = f"{plan.name}: version {challenger.number} against {against} (gate {plan.gate.words})"
    looks = report.looks(verdict, plan.gate)
    warning = report.warning(verdict, plan.gate)
    table = tables.text(title, [report.COLUMNS, *report.rows(verdict)], left=len(report.COLUMNS))
    print("\n".join(filter(None, [table, looks])), flush=True)
    if warning:
        logger.warning("%s", warning)
    did = "promoted" if verdict.passed else "refused"
    words = f"would be {did}" if plan.dry_run else did
    conclusion = f"{plan.name}: version {challenger.number} {words}: {reason}"
    tags = decision.verdict_tags(verdict, champion, plan.gate.words, why, reason, looks)
    if verdict.passed:
        _move(plan, registry, decision.promotion(now, challenger, champion, tags, why))
    else:
        _move(plan, registry, decision.refusal(now, challenger, tags, why))
    run.journal.tags(
        {name: tags[name] for name in ("asib.verdict", "asib.verdict_reason", "asib.against", "asib.gate")}
        | {
            **_renamed(run, f"version {challenger.number} {words}"),
            "asib.version": challenger.number,
            "asib.look": looks or "none: there is no champion",
            "mlflow.note.content": report.note(
                title, verdict, conclusion, *filter(None, [looks, warning]), repeat=run.repeat
            ),
            **tables.logged([f"{FOLDER}/{report.TABLE}"]),
        }
    )
    print(conclusion, flush=True)


def _move(plan: Plan, registry: Registry, move: dict[str, Any]) -> None:
    """Move the aliases and set the tags, except in a dry run. Raises UserError: it is no longer our turn."""
    if not plan.dry_run:
        queue.still_ours(registry, move["run"])
        registry.ask("move", plan=move)


# rollback and retirement ---------------------------------------------------------------------------------------------


def _rollback(run: Run, plan: Plan, registry: Registry, now: Overview, why: Occasion) -> None:
    versions: dict[str, Version] = {}
    for number in sorted({*decision.champions(now), *filter(None, [now.aliases.get(CHAMPION)])}):
        with suppress(NotThere):  # it was deleted in MLflow
            versions[number] = registry.version(number)
    gone = [number for number in decision.champions(now) if number not in versions]
    if gone:
        logger.warning("past champions that no longer exist: %s", ", ".join(gone))
    move = decision.rollback(_without(now, gone), versions, why)
    while not _has_files(run, registry, move["after"][CHAMPION]):
        gone.append(move["after"][CHAMPION])
        try:
            move = decision.rollback(_without(now, gone), versions, why)
        except UserError as error:
            left = f"rollback=true: no earlier champion of {plan.name} still has its files"
            raise UserError(f"{left}; to replace the present one, {_as_a_first_one(registry)}") from error
    _move(plan, registry, move)
    run.journal.tags({"asib.version": move["after"][CHAMPION], "asib.reason": plan.reason or "none given"})
    after = move["after"][PREVIOUS]
    then = f"version {after}" if after else "none: a further rollback would be refused"
    would = "would be: " if plan.dry_run else ""
    _conclude(run, f"{plan.name}: {would}{move['why']}; previous is now {then}")


def _as_a_first_one(registry: Registry) -> str:
    """How to promote without a champion to be judged against."""
    call = f"MlflowClient().delete_registered_model_alias({registry.name!r}, {CHAMPION!r})"
    return f"take its alias away ({call}), and promote again as a first version"


def _has_files(run: Run, registry: Registry, number: str) -> bool:
    """Whether a version can still be served: `mlflow gc` deletes files and keeps the version."""
    folder = run.folder / "fetched" / number
    try:
        if bundle.read(registry.fetch(number, folder), f"version {number}").weights.is_file():
            return True
        logger.warning("version %s is skipped: it no longer holds weights", number)
    except NotThere as error:
        logger.warning("version %s is skipped, its files are gone: %s", number, error)
    except UserError as error:
        logger.warning("%s; skipped", error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return False


def _without(now: Overview, gone: list[str]) -> Overview:
    kept = [number for number in decision.champions(now) if number not in gone]
    aliases = {alias: n for alias, n in now.aliases.items() if alias == CHAMPION or n not in gone}
    return Overview(aliases, {**now.tags, PAST: json.dumps(kept)})


def _retire(run: Run, plan: Plan, registry: Registry, now: Overview, why: Occasion) -> None:
    assert plan.version is not None
    _move(plan, registry, decision.retirement(registry.version(plan.version), now, why))
    run.journal.tags({"asib.version": plan.version, "asib.reason": plan.reason or "none given"})
    would = "would be retired" if plan.dry_run else "is retired: it stays where it is, and is never promoted"
    _conclude(run, f"{plan.name}: version {plan.version} {would}")


# words ---------------------------------------------------------------------------------------------------------------


def _renamed(run: Run, what: str) -> dict[str, str]:
    """The tag that adds to the run's name what was not known when it began, unless its user has named it."""
    assert run.delivery is not None
    assert run.run_id is not None
    usual = name_of(run.step, run.config, run.command)
    named = run.delivery.run_info(run.run_id)["name"]
    return {"mlflow.runName": f"{usual} {what}"} if named == usual else {}


def _conclude(run: Run, conclusion: str) -> None:
    parts = [f"**{escape.markdown(conclusion)}**", run.repeat]
    run.journal.tags({"mlflow.note.content": "\n\n".join(filter(None, parts))})
    print(conclusion, flush=True)


def _params(plan: Plan) -> dict[str, str]:
    own = {"action": plan.action, "name": plan.name, "version": plan.version or "", "gate": plan.gate.words}
    own |= {"dry_run": str(plan.dry_run).lower(), "reason": plan.reason}
    criteria = plan.gate.model_dump(exclude={"name", "changes"}) if plan.action == "promote" else {}
    criteria |= {f"first.{key}": value for key, value in criteria.pop("first", {}).items()}
    own |= {f"gate.{key}": str(value) for key, value in criteria.items()}
    return {key: value for key, value in own.items() if value}
