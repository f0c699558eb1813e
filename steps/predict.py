"""Classify a folder of pictures: `python -m steps.predict model=models:/<name>@champion images=<folder>`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.compose import cli
from pipeline.compose.groups import STUDENTS
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.runs.step import execute

if TYPE_CHECKING:
    from pipeline.predict.predict import Request
    from pipeline.runs.run import Run

OWN = {
    "model": STUDENTS,
    "images": "a folder with picture files, at any depth",
    "to": "the table to write, .csv or .parquet; predictions.csv in the run's folder by default",
}


def main(argv: Sequence[str]) -> int:
    """`model`, `images` and `to` are the step's own."""
    try:
        own, rest = cli.take(argv, OWN)
    except UserError:
        return execute("predict", "", list(argv))  # which says what is wrong with them
    if "--help" in rest:
        print("\n".join(f"  {key}: {words}" for key, words in OWN.items()) + "\n")
    found: list[Request] = []

    def asked(config: Config) -> Config:
        from pipeline.predict import predict

        found.append(predict.parse(own))
        return config if config.run_name else config.model_copy(update={"run_name": "predict"})

    def job(run: "Run") -> float | None:
        from pipeline.predict.predict import predict

        return predict(run, found[0])

    return execute("predict", job, rest, asked, dry_run=lambda config: found[0].words(), own=OWN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
