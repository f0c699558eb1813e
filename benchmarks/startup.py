"""How long people wait: `--help`, a configuration error, and the moment when training begins.

    python -m benchmarks.startup [--quick] [--rounds 3]

Each is a process of its own, as typed at a terminal; training begins when the step says that it is tracked (SQLite),
directly before its first batch, and is then stopped. Writes benchmarks/results/startup_<kind>.json.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import kinds
from benchmarks.machine import described
from benchmarks.steps.clock import spread
from pipeline.compose.compose import compose
from pipeline.distill import networks, train

ROOT = Path(__file__).resolve().parents[1]
BEGINS = "tracked as"
ERRORS = {
    "error_unknown_key": ("method.kd_alhpa=0.5",),
    "error_range": ("method.kd_alpha=-1",),
    "error_rule": ("cfg=base", "method.num_stages=3"),
    "error_missing_data": ("dataset=cifar100", "dataset.root=/nowhere"),
}
LONGEST = 300.0


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "steps.distill", *arguments]


def until_end(arguments: tuple[str, ...], expected: int, folder: Path) -> float:
    """Seconds of a step that ends with this exit code."""
    begun = time.perf_counter()
    where = () if "--help" in arguments else (f"output_dir={folder / 'runs'}", "tracking=offline")
    done = subprocess.run(command(*arguments, *where), cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
    seconds = time.perf_counter() - begun
    if done.returncode != expected:
        raise SystemExit(f"{arguments}: exit code {done.returncode}, expected {expected}: {done.stderr[-500:]}")
    return seconds


def until_training(arguments: tuple[str, ...], folder: Path) -> float:
    """Seconds until the first batch of a tracked distillation, which is then stopped."""
    store = (f"tracking.uri=sqlite:///{folder / 'mlflow.db'}", f"output_dir={folder / 'runs'}")
    begun = time.perf_counter()
    process = subprocess.Popen(command(*arguments, *store), cwd=ROOT, stderr=subprocess.PIPE, text=True)
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
    raise SystemExit(f"{arguments}: training never began: {''.join(said)[-500:]}")


def with_teachers(arguments: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """The arguments, and checkpoints of untrained teachers: training would else begin with their fine-tuning."""
    config = compose(arguments[0].removeprefix("cfg="), arguments[1:])
    data = train.images(config)
    found = []
    for index in range(len(config.model.teachers)):
        path = folder / arguments[0].removeprefix("cfg=") / f"teacher_{index}.safetensors"
        networks.save(networks.build_teacher(config, data, index), path, config, data)
        found.append(f"model.teachers.{index}.checkpoint={path}")
    return (*arguments, *found)


def measure(rounds: int, root: Path) -> dict[str, Any]:
    """Seconds of each, interleaved; the first use of a tracking store apart (its tables are made then)."""
    training: dict[str, tuple[str, ...]] = {"training_quickstart": ("cfg=quickstart",)}
    if (root / "cifar-100-python").is_dir():
        training["training_cifar100_two_teachers"] = ("cfg=base", "dataset=cifar100", f"dataset.root={root.resolve()}")
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="asib-startup-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        training = {key: with_teachers(arguments, folder) for key, arguments in training.items()}
        fresh = until_training(training["training_quickstart"], folder)
        for _ in range(rounds):
            found.setdefault("help", []).append(until_end(("--help",), 0, folder))
            for key, arguments in ERRORS.items():
                found.setdefault(key, []).append(until_end(arguments, 2, folder))
            for key, arguments in training.items():
                found.setdefault(key, []).append(until_training(arguments, folder))
    return {"training_first_use_seconds": round(fresh, 2), "seconds": {k: spread(v, 2) for k, v in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", type=Path, default=Path(os.environ.get("CIFAR_ROOT", "data")))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    on = kinds.device()
    result = described() | {"device": str(on), "rounds": rounds} | measure(rounds, options.root)
    for what, seconds in result["seconds"].items():
        print(f"{what:34s} {seconds['median']:6.2f} s", flush=True)
    print(kinds.write("startup", kinds.kind(on, options.quick), result, options.output))


if __name__ == "__main__":
    main()
