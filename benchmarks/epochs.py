"""What an epoch costs besides its networks, by the number of images; and how much memory it takes.

    python -m benchmarks.epochs [--quick] [--sizes 10000 50000 200000 1000000] [--rounds 3]

The real loop with a student that is one linear layer on the image's mean colour and no teachers: what is left is the
images' way to the network, and the loop itself. Random images, 32×32; the sizes take turns in one process, the largest
first, whose peak of memory is compared with its images. Writes benchmarks/results/epochs_<kind>.json.
"""

import resource
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.steps.cases import PAIRS, TWO_TEACHERS, Case
from benchmarks.steps.clock import Window, interleaved, spread
from benchmarks.steps.ours import ClockedDistillation, OneEpoch, next_epoch
from models.cifar import CifarNet
from models.features import FeatureNet
from pipeline.config.datasets import CIFAR100
from pipeline.data.sources import ImageData
from pipeline.distill import train
from pipeline.journal import NullJournal
from pipeline.training.loop import Loop
from pipeline.training.optim import Precision

SIZES = (10_000, 50_000, 200_000, 1_000_000)
REFERENCE = 50_000
CLASSES = 100


class MeanColour(CifarNet):
    """A classifier that costs nothing: one linear layer on the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.finish(3, [])

    def stem(self, x: Tensor) -> Tensor:
        """The images (B, 3, H, W), unchanged."""
        return x


def random_images(count: int) -> ImageData:
    """`count` random training images of 100 classes, and few for testing."""
    x = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    y, few = torch.arange(count) % CLASSES, 64
    classes = tuple(map(str, range(CLASSES)))
    return ImageData(
        "random", x, y, x[:few], y[:few], classes, CIFAR100.mean, CIFAR100.std, f"random-{count}", "nowhere"
    )


class NullRun:
    """A run of the loop over the first `count` images, without record and checkpoints."""

    def __init__(self, data: ImageData, count: int, rounds: int, batch: int, device: torch.device) -> None:
        with tempfile.TemporaryDirectory() as folder:
            more = ("method.kd_alpha=0", "method.num_stages=1", f"method.student_epochs_per_stage=[{rounds}]")
            config = Case(PAIRS[TWO_TEACHERS], "fp32", batch).config(Path(folder), 1, more)
        train.prepare(config)
        mine = replace(data, train_x=data.train_x[:count], train_y=data.train_y[:count], digest=f"random-{count}")
        student = FeatureNet(MeanColour()).to(device)
        self.task = ClockedDistillation(Window(device), config, mine, student, [], device)
        self.loop = Loop(self.task, NullJournal(), None, {}, Precision(config.optim, device), device, watch=OneEpoch())

    def seconds(self) -> float:
        """Seconds of the next epoch."""
        next_epoch(self.loop)
        return self.task.window.seconds


def memory_mb() -> float:
    """The peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(sizes: Sequence[int], rounds: int, batch: int) -> dict[str, Any]:
    """Seconds of each size's epochs, per image relative to 50,000 (or the second size), and memory."""
    device = harness.device()
    NullRun(random_images(2 * batch), 2 * batch, 1, batch, device).seconds()  # warm-up of torch
    before = memory_mb()
    data = random_images(max(sizes))
    runs = {count: NullRun(data, count, rounds + 1, batch, device) for count in sorted(sizes, reverse=True)}
    first = {count: run.seconds() for count, run in runs.items()}  # not counted
    peak = memory_mb() - before
    on_card = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    found = interleaved({count: run.seconds for count, run in runs.items()}, rounds)
    reference = REFERENCE if REFERENCE in runs else sorted(runs)[1]
    per_image = {count: statistics.median(found[count]) / count for count in sorted(runs)}
    held = sum(t.nbytes for t in (data.train_x, data.train_y) if isinstance(t, torch.Tensor)) / 2**20
    return {
        "batch": batch,
        "first_epoch_of_largest_seconds": round(first[max(sizes)], 3),
        "epochs": [
            {
                "images": count,
                "seconds": spread(found[count], 4),
                "images_per_second": round(1 / each),
                "per_image_to_reference": round(each / per_image[reference], 4),
            }
            for count, each in per_image.items()
        ],
        "reference": reference,
        "memory": {
            "images_mb": round(held, 1),
            "peak_above_start_mb": round(peak, 1),
            "ratio": round(peak / held, 4),
            "of": "the sizes' first epochs; resident memory of the process",
            # every size has its own images on the card; the processor's memory holds them once
            "card_peak_mb": None if on_card is None else round(on_card, 1),
        },
    }


def main() -> None:
    parser = harness.parser(__doc__, "quick", "rounds", "output")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.rounds = [1_000, 2_000], 1
    result = harness.described("timm") | {"rounds": options.rounds}
    result |= measure(options.sizes, options.rounds, batch=128)
    for epoch in result["epochs"]:
        print(f"{epoch['images']:>9,} images  {epoch['images_per_second']:>9,} images/s")
    harness.write(f"epochs_{harness.kind(options.quick)}", result, options.output)


if __name__ == "__main__":
    main()
