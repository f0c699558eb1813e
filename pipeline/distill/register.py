"""`register=<name>`: the student that training has logged becomes a version of a registered model."""

import json
from collections.abc import Mapping

from pipeline.config import Config, config_hash
from pipeline.data.sources import ImageData
from pipeline.journal import Journal
from pipeline.runs.run import Run
from pipeline.tracking.model_tags import CHALLENGER

FROM_RUN = ("asib.step", "asib.teachers", "asib.git_sha", "asib.git_dirty", "asib.weights")
"""Tags of the run that its version has too."""
MODEL = "student"
"""The LoggedModel's name."""


def student(run: Run, config: Config, data: ImageData, results: Mapping[str, float]) -> None:
    """Note in the run's record that its student is to be registered, if its configuration asks for that.

    Delivery makes the version once the model is on the server, and moves the alias challenger to it. `config`: what the
    student was trained with; a sweep's differs from its best trial's.
    """
    if run.config.register is None or not isinstance(run.journal, Journal):
        return
    tags = {name: value for name, value in _tags_of(run.journal).items() if name in FROM_RUN}
    tags |= {"asib.config_hash": config_hash(config), "asib.data_digest": data.digest, "asib.dataset": data.name}
    tags |= {"asib.architecture": config.model.student.name, "asib.seed": str(config.seed)}
    if "final/val_acc" in results:
        tags["asib.val_acc"] = f"{results['final/val_acc']:.2f}"
    run.journal.register(run.config.register, model=MODEL, alias=CHALLENGER, tags=tags)


def _tags_of(journal: Journal) -> dict[str, str]:
    """The tags in a run's record so far, including those that wait for a checkpoint."""
    found: dict[str, str] = {}
    for line in journal.snapshot().splitlines():
        entry = json.loads(line)
        found |= entry["tags"] if entry["kind"] == "open" else entry["values"] if entry["kind"] == "tags" else {}
    return found
