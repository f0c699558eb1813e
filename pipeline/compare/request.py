"""The request of `-e compare`: the step's own keys, checked before torch is imported."""

from dataclasses import dataclass

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.paths import user_path

OWN = {
    "parent": "run id (or folder) of an ablation or a sweep, whose nested runs are compared",
    "runs": "run ids (or folders), separated by commas",
    "baseline": "rung or method that the others are compared with; by default the lowest rung, or the first method",
    "anyway": "true: compare runs even if their teachers, students, epochs, data or split differ",
}


@dataclass(frozen=True)
class Request:
    """The step's own keys: either `parent` or at least two `runs`."""

    parent: str
    runs: tuple[str, ...]
    anyway: bool
    baseline: str | None = None


def read(config: Config, command: cli.Command) -> tuple[Config, Request]:
    """Read the step's own keys; the configuration gets the run's name.

    Raises UserError: both `parent` and `runs` are given, or neither, or one run alone.
    """
    own = command.own
    parent = own.get("parent", "")
    runs = tuple(cli.listed(own.get("runs", "")))
    if bool(parent) == bool(runs):
        raise UserError("give parent=<run id>, or runs=<id>,<id>,…: one of them")
    if not parent and len(runs) < 2:
        raise UserError(f"runs={runs[0]} names one run: comparing needs two")
    for key, names in (("runs", runs), ("parent", filter(None, [parent]))):
        for name in names:
            user_path(name, key)
    request = Request(parent, runs, cli.flag(own, "anyway"), own.get("baseline") or None)
    return config, request
