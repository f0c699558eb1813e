"""What tracking over HTTP takes from training: the same distillation off line and on line, turn about.

    python -m benchmarks.tracking_cost [--rounds 3] [--seconds 10] [--threads 1]

The quickstart's networks and schedule (two stages of two A- and two B-epochs) on as many synthetic images as make an
epoch of ten seconds here. On line: a local `mlflow server`, which with `--threads` below the number of cores has one
for itself, as on a machine of its own. What counts is the time from one epoch's metrics to the next ones': training,
evaluation, checkpoint, record. Writes benchmarks/results/tracking_cost.json.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.images import write_images
from benchmarks.machine import described
from pipeline.journal import read_entries
from pipeline.tracking.server import prepare_sqlite
from tests.servers import MlflowServer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "tracking_cost.json"
FEW = 640
"""Images with which the speed of this machine is found."""
SPEED = "train/images_per_second"
RUN = [
    "cfg=quickstart", "dataset=npz", "dataset.val_fraction=0.1", "finetune.epochs=1", "log_model=false",
    "method.num_stages=2", "method.student_epochs_per_stage=[2,2]", "method.teacher_adapt_epochs=2",
]  # fmt: skip


def distil(folder: Path, data: Path, threads: int, *tracking: str) -> dict[str, Any]:
    """One run as a process of its own.

    Returns:
        `epochs`: seconds of each epoch but the first; `images_per_second` of each; `processor_seconds` of the run and
        its delivery, imports included.
    """
    before = set(folder.glob("*-distill-*"))
    command = [sys.executable, "-m", "steps.distill", *RUN, f"dataset.path={data}", f"threads={threads}"]
    process = subprocess.Popen(
        [*command, f"output_dir={folder}", *tracking],
        cwd=HERE.parent,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    (made,) = set(folder.glob("*-distill-*")) - before
    if process.returncode:
        raise SystemExit(f"steps.distill ended with {process.returncode}: see {made}/run.log")
    entries = [e for e in read_entries(made / "journal.jsonl")[0] if e.kind == "metrics" and SPEED in e.data["values"]]
    times = [entry.time / 1000 for entry in entries]
    return {
        "epochs": [round(b - a, 3) for a, b in itertools.pairwise(times)],
        "images_per_second": [round(entry.data["values"][SPEED], 1) for entry in entries],
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
    }


def measure(folder: Path, server: str, rounds: int, seconds: float, threads: int) -> dict[str, Any]:
    """Pairs of runs; `ratio` is of their summed epochs, on line to off line."""
    small = distil(folder / "small", write_images(folder / "small.npz", FEW), threads, "tracking=offline")
    speed = statistics.harmonic_mean(small["images_per_second"])
    count = max(FEW, round(speed * seconds / 0.9))  # a tenth is held out
    data, runs = write_images(folder / "data.npz", count), folder / "runs"
    ways = {"offline": ["tracking=offline"], "online": ["tracking.mode=online", f"tracking.uri={server}"]}
    distil(runs, data, threads, *ways["offline"])  # fine-tunes the teachers that the others find
    pairs = []
    for number in range(rounds):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        found = {way: distil(runs, data, threads, *ways[way]) for way in order}
        ratio = sum(found["online"]["epochs"]) / sum(found["offline"]["epochs"])
        pairs.append({"first": order[0], "ratio": round(ratio, 4), **found})
        print(json.dumps({"round": number, "ratio": round(ratio, 4)}), flush=True)
    every = {way: [s for pair in pairs for s in pair[way]["epochs"]] for way in ways}
    return {
        "images": count,
        "threads": threads,
        "median_epoch_seconds": {way: round(statistics.median(every[way]), 3) for way in ways},
        "fastest_epochs_ratio": round(
            statistics.mean(fastest(pairs, "online")) / statistics.mean(fastest(pairs, "offline")), 4
        ),
        "median_ratio": round(statistics.median(pair["ratio"] for pair in pairs), 4),
        "rounds": pairs,
    }


def fastest(pairs: list[dict[str, Any]], way: str) -> list[float]:
    """Each epoch's best time over the rounds: what other programs on the machine took is left out as far as it goes."""
    return [min(times) for times in zip(*(pair[way]["epochs"] for pair in pairs), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of an epoch")
    parser.add_argument("--threads", type=int, default=1, help="of training")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = described()
    with tempfile.TemporaryDirectory(prefix="asib-tracking-cost-") as name:
        folder = Path(name)
        prepare_sqlite(f"sqlite:///{folder / 'template.db'}")
        (folder / "server").mkdir()
        server = MlflowServer(folder / "server", folder / "template.db")
        server.start()
        try:
            result |= measure(folder, server.uri, options.rounds, options.seconds, options.threads)
        finally:
            server.stop()
    result["load_after"] = round(os.getloadavg()[0], 2)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
