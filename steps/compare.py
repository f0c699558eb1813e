"""Compare finished runs: `python -m steps.compare parent=<run id>`, or `runs=<id>,<id>,…`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.paths import user_path
from pipeline.runs.step import execute

if TYPE_CHECKING:
    from pipeline.runs.run import Run

OWN = {
    "parent": "run id (or folder) of an ablation or a sweep, whose nested runs are compared",
    "runs": "run ids (or folders), separated by commas",
    "anyway": "true: compare also where teachers, students, epochs, data or split differ",
}


def main(argv: Sequence[str]) -> int:
    """`parent`, `runs` and `anyway` are the step's own."""
    try:
        own, rest = cli.take(argv, OWN)
    except UserError:
        return execute("compare", "", list(argv))
    if "--help" in rest:
        print("\n".join(f"  {key}: {words}" for key, words in OWN.items()) + "\n")
    parent = own.get("parent", "")
    runs = list(dict.fromkeys(filter(None, (part.strip() for part in own.get("runs", "").strip("[]").split(",")))))

    def asked(config: Config) -> Config:
        if bool(parent) == bool(runs):
            raise UserError("give parent=<run id>, or runs=<id>,<id>,…: one of them")
        if not parent and len(runs) < 2:
            raise UserError(f"runs={runs[0]} names one run: comparing needs two")
        cli.flag(own, "anyway")
        for name in runs:
            user_path(name, "runs")
        if parent:
            user_path(parent, "parent")
        return config if config.run_name else config.model_copy(update={"run_name": "compare"})

    def job(run: "Run") -> float | None:
        from pipeline.compare.job import compare_runs

        return compare_runs(run, parent, runs, cli.flag(own, "anyway"))

    return execute("compare", job, rest, asked, own=OWN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
