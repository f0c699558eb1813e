"""What pictures in folders cost besides the network: an epoch with workers, compared with its parts.

    python -m benchmarks.folder [--jpegs <npz>] [--size 64] [--batch 64] [--batches 10] [--rounds 3]

Three measures take turns: the loader alone (decode, crop, flip, resize), the network alone (forward, backward and
optimiser of timm's resnet18, on images that lie on the device), and both together, as in training. `--jpegs`: an npz
file with `train_jpeg` (all files' bytes) and `train_offsets`; without it smooth noise is written as JPEG
files of ImageNet's usual 500 × 375 pixels. Writes benchmarks/results/folder_<kind>.json.
"""

import io
import json
import tempfile
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks import harness
from benchmarks.steps.clock import interleaved, spread, timed
from models import zoo
from pipeline.config import AugmentConfig, DatasetConfig
from pipeline.data.batches import Batch, TrainBatches
from pipeline.data.sources import load
from pipeline.training.allocator import keep_freed_memory

CLASSES = 10


def write_pictures(root: Path, jpegs: Path | None, count: int) -> None:
    """`count` training pictures in ten folders, and a few held-out ones."""
    for k, content in enumerate(_noise(count) if jpegs is None else _stored(jpegs, count)):
        for split in ("train",) if k >= CLASSES else ("train", "val"):
            folder = root / split / str(k % CLASSES)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{k}.jpg").write_bytes(content)


def _stored(path: Path, count: int) -> Iterator[bytes]:
    with np.load(path, allow_pickle=False) as archive:
        content, offsets = archive["train_jpeg"], archive["train_offsets"]
    for k in range(count):
        k %= len(offsets) - 1
        yield content[offsets[k] : offsets[k + 1]].tobytes()


def _noise(count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (38, 50, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        yield file.getvalue()


class Race:
    """The three measures."""

    def __init__(self, root: Path, size: int, workers: int, batch: int, device: torch.device) -> None:
        self.device, self.batch = device, batch
        data = load(DatasetConfig(name="image_folder", root=str(root), image_size=size, workers=workers))
        self.batches = TrainBatches(
            data.train_x,
            data.train_y,
            torch.arange(len(data.train_y)),
            batch_size=batch,
            augment=AugmentConfig(),
            mean=data.mean,
            std=data.std,
            device=device,
        )
        net = zoo.create_model("resnet18", num_classes=CLASSES, image_size=size)
        self.net = net.to(device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), fused=True)
        self.seed = 0
        shape = (batch, 3, size, size)
        self.x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        self.y = torch.arange(batch, device=device) % CLASSES

    def _epoch(self) -> Iterator[Batch]:
        self.seed += 1
        draws = self.batches.draw(None, 0.0, lambda _: torch.Generator().manual_seed(self.seed))
        return self.batches.epoch(draws)

    def _update(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.net(x).logits, y).backward()
        self.optimizer.step()

    def loader(self) -> None:
        """Load an epoch's images."""
        deque(self._epoch(), maxlen=0)

    def network(self) -> None:
        """Make as many updates as an epoch has, without loading."""
        for _ in range(len(self.batches)):
            self._update(self.x, self.y)

    def both(self) -> None:
        """Train for an epoch."""
        for batch in self._epoch():
            self._update(batch.x, batch.y)


def main() -> None:
    parser = harness.parser(__doc__, "rounds", "output")
    parser.add_argument("--jpegs", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=10)
    options = parser.parse_args()
    device = harness.device()
    keep_freed_memory()
    images = options.batch * options.batches
    found = []
    with tempfile.TemporaryDirectory(prefix="asib-folder-") as folder:
        write_pictures(Path(folder), options.jpegs, images)
        for workers in (0, 1, 2):
            race = Race(Path(folder), options.size, workers, options.batch, device)
            race.both()  # starts the workers; not counted
            measures = {"loader": race.loader, "network": race.network, "both": race.both}
            seconds = interleaved({n: partial(timed, device, act) for n, act in measures.items()}, options.rounds)
            speeds = {name: spread([images / s for s in values], 1) for name, values in seconds.items()}
            found.append({"workers": workers, "images_per_second": speeds})
            print(json.dumps(found[-1]), flush=True)
    asked = {name: str(value) for name, value in vars(options).items()}
    result = harness.described("torchvision", "pillow") | {"asked": asked, "runs": found}
    harness.write(f"folder_{harness.kind()}", result, options.output)


if __name__ == "__main__":
    main()
