"""ASIB's steps in this checkout to those in another, turn by turn: what the commits between them cost.

    git worktree add /tmp/before 27d011c
    python -m benchmarks.against /tmp/before [--pair …] [--rounds 6] [--batches 4]

Each checkout has a process of its own, which waits while the other one trains an epoch. Ratios are taken round by
round, of seconds and of processor time, which other users of the machine disturb less. Writes results/against.json.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.steps.cases import PAIRS, TWO_TEACHERS, Case, first_images, real_images
from benchmarks.steps.clock import Window, in_turn, ratios
from benchmarks.steps.ours import Ours
from pipeline.paths import REPOSITORY

KINDS = ("seconds", "processor_seconds")


class ProcessorWindow(Window):
    """A window that knows its processor time, too."""

    used = 0.0

    def open(self) -> None:
        super().open()
        self._used = time.process_time()

    def shut(self) -> float:
        self.used = time.process_time() - self._used
        return super().shut()


def serve(case: Case, options: argparse.Namespace) -> None:
    """Train an epoch of each phase that is asked for on a line of stdin; answer with its `KINDS`."""
    images = first_images(real_images(options.root), options.batches * case.batch)
    window = ProcessorWindow(torch.device("cpu"))
    with (
        tempfile.TemporaryDirectory(prefix="asib-against-", ignore_cleanup_errors=True) as name,
        closing(Ours(case, images, options.rounds + 1, Path(name), options.ours, window=window)) as ours,
    ):
        print(json.dumps(str(REPOSITORY)), flush=True)
        for line in sys.stdin:
            print(json.dumps((ours.seconds(line.strip()), window.used)), flush=True)


class Checkout:
    """A process that serves in a checkout, whatever its code is: this file with the modules of that folder."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-P", __file__, *sys.argv[1:], "--serve"]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self.said() != str(folder):
            raise SystemExit(f"{folder}: the modules of another checkout were imported")

    def said(self) -> Any:
        """Its next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args!r}: ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, which: str) -> dict[str, float]:
        """The `KINDS` of an epoch of this phase."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{which}\n")
        self.process.stdin.flush()
        return dict(zip(KINDS, self.said(), strict=True))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(case: Case, other: Path, rounds: int) -> dict[str, Any]:
    """Ratios of this checkout to the other, by step."""
    with ExitStack() as stack:
        both = {
            name: stack.enter_context(closing(Checkout(folder)))
            for name, folder in (("this", REPOSITORY), ("other", other))
        }
        taken: dict[str, dict[str, list[dict[str, float]]]] = {
            which: {name: [] for name in both} for which in case.steps
        }
        for number in range(-1, rounds):  # the first is not counted
            for which, found in taken.items():
                for name in in_turn(both, number):
                    answer = both[name].ask(which)
                    if number >= 0:
                        found[name].append(answer)
    return {
        which: {
            "seconds": found,
            "this_to_other": {
                kind: ratios(*([answer[kind] for answer in found[name]] for name in ("this", "other")))
                for kind in KINDS
            },
        }
        for which, found in taken.items()
    }


def main() -> None:
    parser = harness.parser(__doc__, "ours", "root", "output")
    parser.add_argument("other", type=Path, help="the folder of another checkout")
    parser.add_argument("--pair", choices=PAIRS, default=TWO_TEACHERS)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batches", type=int, default=4, help="of a round of one step")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("asib").setLevel(logging.WARNING)
    case = Case(PAIRS[options.pair], options.precision)
    if options.serve:
        serve(case, options)
        return
    other = options.other.resolve()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=other, capture_output=True, text=True, check=True).stdout
    result = harness.described("timm") | {"other": commit.strip(), "case": case.name, "batches": options.batches}
    result["steps"] = measure(case, other, options.rounds)
    print(json.dumps({which: found["this_to_other"] for which, found in result["steps"].items()}, indent=2))
    harness.write("against", result, options.output)


if __name__ == "__main__":
    main()
