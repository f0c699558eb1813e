"""What evaluation, checkpoints and tracking add to an epoch of 50,000 images (45,000 trained, 5,000 for validation).

    python -m benchmarks.overhead [--quick] [--rounds 3] [--validation 1000]

The two-teacher pair in a tracked run of short epochs: evaluation (scaled to 5,000 images), what checkpoint and journal
take of the training thread (it copies the state and writes the entries), and the processor time of what runs beside
it: the checkpoint's writer, a thread, and the delivery to MLflow (SQLite), a process of its own, which take that much
from training where every core trains. An epoch's training is 45,000 images at the speed measured in the same run. The
teachers' outputs on the validation images, made once per run, are reported separately, as are the seconds after which a
checkpoint is on disk. Writes benchmarks/results/overhead_<kind>.json.
"""

import logging
import os
import statistics
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.steps.cases import PAIRS, TWO_TEACHERS, Case, by_class, first_images, real_images
from benchmarks.steps.clock import children_seconds, wait_until_quiet
from benchmarks.steps.ours import Ours
from pipeline.data.sources import ImageData

TRAINED, VALIDATED = 45_000, 5_000


def measure(case: Case, data: ImageData, rounds: int, batches: int, val: int) -> dict[str, Any]:
    """Seconds per epoch of each part, for A- and B-epochs, and their share."""
    fraction = val / (val + batches * case.batch)
    more = (f"dataset.val_fraction={fraction!r}", "method.teacher_eval_every=2")
    seen: dict[str, list[dict[str, float]]] = {which: [] for which in case.steps}
    with tempfile.TemporaryDirectory(prefix="asib-overhead-", ignore_cleanup_errors=True) as name:
        images = first_images(by_class(data), val + batches * case.batch)
        with closing(Ours(case, images, rounds + 1, Path(name), more, fused=False)) as ours:
            for _ in range(rounds + 1):
                for which, found in seen.items():
                    wait_until_quiet()
                    before = children_seconds()
                    training = ours.seconds(which)
                    wait_until_quiet()
                    found.append(
                        {
                            "training_per_image": training / ours.images,
                            "evaluation": ours.evaluation_seconds,
                            "saving": ours.saving_seconds,
                            "writing": ours.slots.writing_seconds,
                            "writer": ours.slots.writer_processor_seconds,
                            "delivery": children_seconds() - before,
                        }
                    )
    first = seen[case.steps[0]]
    once = first[0]["evaluation"] - statistics.median(v["evaluation"] for v in first[1:])
    validated = len(ours.task.data.eval.indices)
    scale = VALIDATED / validated
    return {
        "case": case.name,
        "validation_images": validated,
        "teachers_on_validation_once_seconds": round(once * scale, 2),
        "epochs": {which: _summary(found[1:], scale) for which, found in seen.items()},
    }


def _summary(values: list[dict[str, float]], scale: float) -> dict[str, float]:
    medians = {part: statistics.median(v[part] for v in values) for part in values[0]}
    training = TRAINED * medians["training_per_image"]
    cores = len(os.sched_getaffinity(0))
    parts = {
        "evaluation": medians["evaluation"] * scale,
        "checkpoint_and_journal": medians["saving"],
        "checkpoint_writer": medians["writer"] / cores,
        "tracking": medians["delivery"] / cores,
    }
    beside = sum(parts.values())
    return {
        "training_seconds": round(training, 3),
        **{f"{part}_seconds": round(seconds, 4) for part, seconds in parts.items()},
        "checkpoint_written_after_seconds": round(medians["writing"], 3),
        "delivery_processor_seconds": round(medians["delivery"], 3),
        "share_of_epoch": round(beside / (training + beside), 5),
    }


def main() -> None:
    parser = harness.parser(__doc__, "quick", "rounds", "root", "output")
    parser.add_argument("--validation", type=int, help="images; default: 1000, on a GPU 5000")
    options = parser.parse_args()
    logging.getLogger("asib").setLevel(logging.WARNING)
    gpu = harness.device().type == "cuda"
    rounds = 1 if options.quick else options.rounds
    batches = 200 if gpu and not options.quick else 4
    val = 100 if options.quick else options.validation or (VALIDATED if gpu else 1000)
    result = harness.described("timm") | {"rounds": rounds}
    result |= measure(Case(PAIRS[TWO_TEACHERS], "fp32"), real_images(options.root), rounds, batches, val)
    for which, parts in result["epochs"].items():
        print(f"{which}-epoch: {100 * parts['share_of_epoch']:.2f} % beside training")
    harness.write(f"overhead_{harness.kind(options.quick)}", result, options.output)


if __name__ == "__main__":
    main()
