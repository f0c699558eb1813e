"""Evaluate a model: `python -m steps.evaluate cfg=quickstart model=runs:/<id> [mode=synergy] [split=both]`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.evaluate import request as requests
from pipeline.runs.step import execute

if TYPE_CHECKING:
    from pipeline.runs.run import Run


def main(argv: Sequence[str]) -> int:
    """The keys of `request.OWN` are the step's own; `model={…}` is the configuration's section."""
    try:
        own, rest = cli.take(argv, requests.OWN)
    except UserError:
        return execute("evaluate", "", list(argv))  # which says what is wrong with them
    if own.get("model", "").startswith("{"):
        rest.append(f"model={own.pop('model')}")
    if "--help" in rest:
        print("\n".join(f"  {key}: {words}" for key, words in requests.OWN.items()) + "\n")
    asked: list[requests.Request] = []

    def planned(config: Config) -> Config:
        asked.append(requests.read(own))
        config = requests.with_model(config, own.get("model"))
        requests.check(asked[0], config)
        return config

    def job(run: "Run") -> float | None:
        from pipeline.evaluate.evaluate import evaluate

        return evaluate(run, asked[0])

    return execute("evaluate", job, rest, planned, own=requests.OWN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
