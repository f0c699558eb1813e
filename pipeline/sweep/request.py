"""A sweep's request, checked before torch is imported, and the earlier run of its study."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import urls
from pipeline.compose import cli
from pipeline.compose.compose import keys_of
from pipeline.compose.shortcuts import wants_dry_run
from pipeline.config import Config
from pipeline.config.numbers import MOST_SEEDS, MOST_TRIALS, whole
from pipeline.config.places import output_dir
from pipeline.config.words import why
from pipeline.errors import UserError
from pipeline.journal import writer_alive
from pipeline.launch import workers
from pipeline.launch.launcher import Launcher
from pipeline.launch.workers import Workers
from pipeline.runs.folders import header_of, tagged
from pipeline.sweep.space import space
from pipeline.sweep.space.space import SweepConfig
from pipeline.sweep.study.storage import shown_url
from pipeline.sweep.study.study import Study

logger = logging.getLogger("asib")
STUDY_TAG = "asib.study"
DEFAULT = "kd_ib_tau"


@dataclass(frozen=True)
class Plan:
    """`storage`: the database's URL. `name`: the study's name. `digest`: of everything that decides its results."""

    sweep: SweepConfig
    workers: Workers
    storage: str
    name: str
    digest: str

    def launcher(self, folder: Path) -> Launcher:
        """What starts its workers; `folder` is for their logs."""
        return self.workers.launcher(folder)

    def words(self) -> str:
        """What DRY_RUN=1 shows: the study, and the jobs that would run its trials."""
        each = f" of {self.sweep.seeds} seeds" if self.sweep.seeds > 1 else ""
        where = f"study {self.name} in {shown_url(self.storage)}"
        head = f"{where}: {self.sweep.trials} trials{each}, {self.workers.number} at a time"
        return f"{head}\n{self.launcher(Path()).plan()}"


def read(config: Config, command: cli.Command) -> tuple[Config, Plan]:
    """Read the step's own keys; the configuration is the parent run's, which may continue an earlier sweep.

    Raises:
        UserError: a key, space or cluster that is not valid; as `_prepared`.
    """
    own = command.own
    cli.one_process("sweep", "several for each trial are cluster.processes_per_trial=2")
    settings = cli.settings(own, "sweep")
    for key, most in (("trials", MOST_TRIALS), ("seeds", MOST_SEEDS)):
        if own.get(key):
            settings[key] = str(whole(key, own[key], high=most, why=why(SweepConfig.model_fields[key])))
    sweep = space.load(own.get("sweep") or DEFAULT, settings)
    space.check(sweep, config, keys_of(command.overrides))
    crew = workers.read(own)
    name = own.get("study") or space.study_name(sweep, config)
    storage = storage_url(own.get("storage"), config)
    plan = Plan(sweep, crew, storage, name, space.digest(sweep, config))
    return _prepared(config, plan), plan


def storage_url(given: str | None, config: Config) -> str:
    """URL of the database; never a relative path, which may mean another file to another process."""
    url = given or os.environ.get("ASIB_STORAGE") or f"sqlite:///{output_dir(config).absolute() / 'studies.db'}"
    return urls.sqlite(url, "storage") if url.startswith(urls.SQLITE) else url


def _prepared(config: Config, plan: Plan) -> Config:
    """The parent run's configuration: its name, and the earlier run of this study that it resumes.

    Raises:
        UserError: workers that cannot start, a database out of reach, another study of that name, a study that
            another sweep is running.
    """
    if wants_dry_run(os.environ):
        return config
    plan.launcher(output_dir(config)).check()
    facts = Study.refuse_other(plan.storage, plan.name, plan.digest, plan.sweep)
    if "***" in shown_url(plan.storage) and os.environ.get("ASIB_STORAGE") != plan.storage:
        logger.warning(
            "storage=%s: a command line, and under mlflow run the run's parameters, show the password to others; "
            "give it as ASIB_STORAGE, or leave it to ~/.pgpass",
            shown_url(plan.storage),
        )
    root = output_dir(config)
    driven = [Path(facts["folder"])] if writer_alive(Path(facts.get("folder", "/nowhere"))) else []
    for folder in (*driven, *tagged(root, "sweep", STUDY_TAG, plan.name, alive=True)):
        raise UserError(f"study {plan.name}: the sweep in {folder} is running it; help with join={plan.name}")
    if config.resume is None:
        earlier = tagged(root, "sweep", STUDY_TAG, plan.name)
        before = next((folder for folder in earlier if _of_this_study(folder, facts)), None)
        if before is not None:
            config = config.model_copy(update={"resume": str(before), "extend": True})
    return config


def _of_this_study(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a sweep's run belongs to the study in this database: others may have a study of the same name."""
    if not facts:  # it ended while fine-tuning the teachers, before it created the study
        return not any((folder / name).exists() for name in ("launched", "trials"))
    header = header_of(folder)
    return header is not None and header.data["journal"] in (facts.get("parent_journal"), *facts.get("parents", ()))


def params(plan: Plan) -> dict[str, str]:
    """Parameters of the parent run besides the base configuration."""
    keys = {f"sweep.space.{key}": str(d.model_dump(exclude_defaults=True)) for key, d in plan.sweep.space.items()}
    unset = {"seeds", "stop"} - plan.sweep.model_dump(exclude_defaults=True).keys()
    others = {f"sweep.{key}": str(value) for key, value in plan.sweep.model_dump(exclude={"space", *unset}).items()}
    return keys | others | {"sweep.storage": shown_url(plan.storage)}
