"""What an epoch costs beside its networks, against the number of images; and the memory that it takes.

    python -m benchmarks.epochs [--quick] [--sizes 10000 50000 200000 1000000] [--rounds 3]

The real loop with a student that is one linear layer on the image's mean colour and no teachers: what is left is the
images' way to the network, and the loop itself. Random images, 32×32; the sizes take turns in one process, the largest
first, whose peak of memory is compared with its images. Writes benchmarks/results/epochs_<kind>.json.
"""

import argparse
import resource
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kinds
from benchmarks.machine import described
from benchmarks.steps.cases import PAIRS, TWO_TEACHERS, Case
from benchmarks.steps.clock import Window, spread
from benchmarks.steps.ours import ClockedDistillation, OneEpoch
from models.features import FeatureNet
from pipeline.config.datasets import CIFAR100
from pipeline.data.sources import ImageData
from pipeline.distill import train
from pipeline.errors import Pruned
from pipeline.journal import NullJournal
from pipeline.training.loop import Loop
from pipeline.training.optim import Precision

SIZES = (10_000, 50_000, 200_000, 1_000_000)
REFERENCE = 50_000
CLASSES = 100


class MeanColour(nn.Module):
    """A timm-like classifier that costs nothing: one linear layer on the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.num_features = CLASSES, 3
        self.fc = nn.Linear(3, CLASSES)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), as it comes."""
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 3), or logits (B, N)."""
        feature = x.mean(dim=(2, 3))
        logits: Tensor = self.fc(feature)
        return feature if pre_logits else logits

    def get_classifier(self) -> nn.Module:
        return self.fc


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
            config = Case(PAIRS[TWO_TEACHERS], "fp32", batch).config(Path(folder), 1, str(device), more)
        train.prepare(config)
        mine = replace(data, train_x=data.train_x[:count], train_y=data.train_y[:count], digest=f"random-{count}")
        student = FeatureNet(MeanColour()).to(device)
        self.task = ClockedDistillation(config, mine, student, [], device)
        self.task.window = Window(device)
        self.loop = Loop(self.task, NullJournal(), None, {}, Precision(config.optim, device), device, watch=OneEpoch())

    def seconds(self) -> float:
        """Of the next epoch."""
        with suppress(Pruned):  # by `OneEpoch`
            self.loop.run()
        return self.task.window.seconds


def memory_mb() -> float:
    """The most that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(sizes: Sequence[int], rounds: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each size's epochs, per image relative to 50,000 (or the second size), and memory."""
    NullRun(random_images(2 * batch), 2 * batch, 1, batch, device).seconds()  # what torch takes the first time
    before = memory_mb()
    largest = max(sizes)
    data = random_images(largest)
    runs = {count: NullRun(data, count, rounds + 1, batch, device) for count in sorted(sizes, reverse=True)}
    found: dict[int, list[float]] = {count: [] for count in runs}
    first = runs[largest].seconds()
    peak = memory_mb() - before
    on_card = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    for count, run in runs.items():
        if count != largest:
            run.seconds()  # not counted
    for _ in range(rounds):
        for count, run in runs.items():
            found[count].append(run.seconds())
    reference = REFERENCE if REFERENCE in runs else sorted(runs)[1]
    per_image = {count: statistics.median(values) / count for count, values in found.items()}
    held = sum(t.nbytes for t in (data.train_x, data.train_y) if isinstance(t, torch.Tensor)) / 2**20
    return {
        "batch": batch,
        "first_epoch_of_largest_seconds": round(first, 3),
        "epochs": [
            {
                "images": count,
                "seconds": spread(found[count], 4),
                "images_per_second": round(1 / per_image[count]),
                "per_image_to_reference": round(per_image[count] / per_image[reference], 4),
            }
            for count in sorted(runs)
        ],
        "reference": reference,
        "memory": {
            "images_mb": round(held, 1),
            "peak_above_start_mb": round(peak, 1),
            "ratio": round(peak / held, 4),
            "of": "the largest size's first epoch; resident memory of the process",
            # every size has its images there, the processor's memory holds them once
            "card_peak_mb": None if on_card is None else round(on_card, 1),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.rounds = [1_000, 2_000], 1
    on = kinds.device()
    result = described("timm") | {"device": str(on), "threads": torch.get_num_threads(), "rounds": options.rounds}
    result |= measure(options.sizes, options.rounds, options.batch, on)
    for epoch in result["epochs"]:
        print(f"{epoch['images']:>9,} images  {epoch['images_per_second']:>9,} images/s", flush=True)
    print(kinds.write("epochs", kinds.kind(on, options.quick), result, options.output))


if __name__ == "__main__":
    main()
