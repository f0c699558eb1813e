"""What tracking over HTTP takes from training: the same distillation offline and online, alternating.

    python -m benchmarks.tracking_cost [--rounds 3] [--seconds 10] [--threads 1]

The quickstart's networks and schedule (two stages of two A- and two B-epochs) on as many synthetic images as make an
epoch of ten seconds here. On line: a local `mlflow server`, which with `--threads` below the number of cores has one
for itself, as on a machine of its own. What counts is the time from one epoch's metrics to the next ones': training,
evaluation, checkpoint, record. Writes benchmarks/results/tracking_cost.json.
"""

import itertools
import resource
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.steps.clock import interleaved, ratios
from pipeline.journal import read_entries
from pipeline.tracking.server import prepare_sqlite
from tests.servers import MlflowServer

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
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [*RUN, f"dataset.path={data}", f"threads={threads}", *tracking]
    made = harness.distil(folder, *words, OMP_NUM_THREADS=str(threads))
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    entries = [e for e in read_entries(made / "journal.jsonl")[0] if e.kind == "metrics" and SPEED in e.data["values"]]
    return {
        "epochs": [round((b.time - a.time) / 1000, 3) for a, b in itertools.pairwise(entries)],
        "images_per_second": [round(entry.data["values"][SPEED], 1) for entry in entries],
        "processor_seconds": round(usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime, 2),
    }


def measure(folder: Path, server: str, rounds: int, seconds: float, threads: int) -> dict[str, Any]:
    """Rounds of both ways; the ratios are of their summed epochs, online to offline."""
    small = distil(folder / "small", harness.write_images(folder / "small.npz", FEW), threads, "tracking=offline")
    speed = statistics.harmonic_mean(small["images_per_second"])
    count = max(FEW, round(speed * seconds / 0.9))  # a tenth is held out
    run = partial(distil, folder / "runs", harness.write_images(folder / "data.npz", count), threads)
    offline = partial(run, "tracking=offline")
    offline()  # fine-tunes the teachers that the others reuse
    ways = {"offline": offline, "online": partial(run, "tracking.mode=online", f"tracking.uri={server}")}
    found = interleaved(ways, rounds)
    epochs = {way: [one["epochs"] for one in runs] for way, runs in found.items()}
    # each epoch's best time over the rounds: this leaves out most of what other programs on the machine took
    fastest = {way: sum(map(min, zip(*every, strict=True))) for way, every in epochs.items()}
    return {
        "images": count,
        "threads": threads,
        "median_epoch_seconds": {
            way: round(statistics.median(itertools.chain(*every)), 3) for way, every in epochs.items()
        },
        "fastest_epochs_ratio": round(fastest["online"] / fastest["offline"], 4),
        "ratios": ratios(*([sum(each) for each in epochs[way]] for way in ("online", "offline"))),
        "rounds": found,
    }


def main() -> None:
    parser = harness.parser(__doc__, "rounds", "output")
    parser.add_argument("--seconds", type=float, default=10.0, help="of an epoch")
    parser.add_argument("--threads", type=int, default=1, help="of training")
    options = parser.parse_args()
    result = harness.described()
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
    harness.write("tracking_cost", result, options.output)


if __name__ == "__main__":
    main()
