"""How long users wait: `--help`, a configuration error, and the moment when training begins.

    python -m benchmarks.startup [--quick] [--rounds 3]

Each runs in its own process, as typed at a terminal. Training counts as begun when the step says that it is tracked
(SQLite), directly before its first batch, and is then stopped. Writes benchmarks/results/startup_<kind>.json.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.steps.clock import interleaved, spread
from pipeline.compose.compose import compose
from pipeline.distill import networks, train
from pipeline.paths import REPOSITORY

BEGINS = "tracked as"
ENDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "help": (0, ("--help",)),
    "error_unknown_key": (2, ("method.kd_alhpa=0.5", "tracking=offline")),
    "error_range": (2, ("method.kd_alpha=-1", "tracking=offline")),
    "error_rule": (2, ("cfg=base", "method.num_stages=3", "tracking=offline")),
    "error_missing_data": (2, ("dataset=cifar100", "dataset.root=/nowhere", "tracking=offline")),
}
"""Exit code and arguments of commands that end before they train."""
COMMAND = (sys.executable, "-m", "steps.distill")
LONGEST = 300.0


def until_end(words: tuple[str, ...], expected: int) -> float:
    """Seconds of a step that ends with this exit code."""
    begun = time.perf_counter()
    done = subprocess.run([*COMMAND, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=LONGEST)
    seconds = time.perf_counter() - begun
    if done.returncode != expected:
        raise SystemExit(f"{words}: exit code {done.returncode}, expected {expected}: {done.stderr[-500:]}")
    return seconds


def until_training(words: tuple[str, ...], folder: Path) -> float:
    """Seconds until the first batch of a tracked distillation, which is then stopped."""
    store = (f"tracking.uri=sqlite:///{folder / 'mlflow.db'}", f"output_dir={folder / 'runs'}")
    begun = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *words, *store], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if BEGINS in line:
            seconds = time.perf_counter() - begun
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=LONGEST)
            return seconds
    process.wait()
    raise SystemExit(f"{words}: training never began: {''.join(said)[-500:]}")


def with_teachers(cfg: str, words: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """The arguments plus checkpoints of untrained teachers: otherwise training would begin by fine-tuning them."""
    config = compose(cfg, words)
    data = train.images(config)
    found = []
    for index in range(len(config.model.teachers)):
        path = folder / cfg / f"teacher_{index}.safetensors"
        networks.save(networks.build_teacher(config, data, index), path, config, data)
        found.append(f"model.teachers.{index}.checkpoint={path}")
    return (f"cfg={cfg}", *words, *found)


def measure(rounds: int, root: Path) -> dict[str, Any]:
    """Seconds of each, in turn; the first use of a tracking store, which makes its tables, is measured separately."""
    with tempfile.TemporaryDirectory(prefix="asib-startup-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        training = {"training_quickstart": with_teachers("quickstart", (), folder)}
        if (root / "cifar-100-python").is_dir():
            words = ("dataset=cifar100", f"dataset.root={root.resolve()}")
            training["training_cifar100_two_teachers"] = with_teachers("base", words, folder)
        fresh = until_training(training["training_quickstart"], folder)
        turns: dict[str, Callable[[], float]] = {
            what: partial(until_end, words, expected) for what, (expected, words) in ENDS.items()
        }
        turns |= {what: partial(until_training, words, folder) for what, words in training.items()}
        found = interleaved(turns, rounds)
    return {"training_first_use_seconds": round(fresh, 2), "seconds": {k: spread(v) for k, v in found.items()}}


def main() -> None:
    parser = harness.parser(__doc__, "quick", "rounds", "root", "output")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    result = harness.described() | {"rounds": rounds} | measure(rounds, options.root)
    for what, seconds in result["seconds"].items():
        print(f"{what:34s} {seconds['median']:6.2f} s")
    harness.write(f"startup_{harness.kind(options.quick)}", result, options.output)


if __name__ == "__main__":
    main()
