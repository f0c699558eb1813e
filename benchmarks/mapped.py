"""What mapped images cost: the first and later starts, their memory, and an epoch's batches beside those from memory.

    python -m benchmarks.mapped [--images 1281167] [--layout npz] [--batch 256] [--rounds 1]

Writes noise in the layout of ImageNet at 32×32 pixels (twice its size is needed on the disk of the temporary folder),
and reads it in processes of their own. Batches are shuffled, cropped, flipped and normalised on the device. Writes
benchmarks/results/mapped_<kind>.json.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from pipeline.config import AugmentConfig, DatasetConfig
from pipeline.data.batches import TrainBatches
from pipeline.data.imagenet32 import CLASSES, TEST, TRAIN
from pipeline.data.sources import load

HELD_OUT = 50_000


def write(root: Path, images: int, layout: str) -> None:
    """The ten batches and val_data, as pickles or npz files."""
    rng = np.random.default_rng(0)
    for name, count in (*((name, images // 10) for name in TRAIN), (TEST[0], min(HELD_OUT, images))):
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = np.arange(count) % CLASSES + 1
        if layout == "npz":
            np.savez(root / f"{name}.npz", data=data, labels=labels)
        else:
            (root / name).write_bytes(pickle.dumps({"data": data, "labels": labels.tolist()}, 3))


def memory() -> dict[str, int]:
    """This process's own memory and its pages of files, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) // 1000 for name in ("RssAnon", "RssFile", "VmHWM")}


def measure(root: Path, what: str, batch: int) -> None:
    """Load the data set, and for `mapped` and `resident` make an epoch's batches; print what it took as JSON."""
    before = memory()
    start = time.perf_counter()
    data = load(DatasetConfig(name="imagenet32", root=str(root)))
    found = {"start_s": round(time.perf_counter() - start, 2), "before_mb": before, "after_mb": memory()}
    if what in ("mapped", "resident"):
        assert isinstance(data.train_x, torch.Tensor)
        images = data.train_x if what == "mapped" else data.train_x.clone()
        batches = TrainBatches(
            images,
            data.train_y,
            torch.arange(len(images)),
            batch_size=batch,
            augment=AugmentConfig(),
            mean=data.mean,
            std=data.std,
            device=harness.device(),
        )
        draws = batches.draw(None, 0.0, lambda _: torch.Generator().manual_seed(0))
        start = time.perf_counter()
        deque(batches.epoch(draws), maxlen=0)
        seconds = time.perf_counter() - start
        found |= {"epoch_s": round(seconds, 1), "images_per_second": round(len(images) / seconds), "end_mb": memory()}
    print(json.dumps(found))


def main() -> None:
    parser = harness.parser(__doc__, "rounds", "output")
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--layout", choices=("npz", "pickle"), default="npz")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child is not None:
        measure(Path(options.child[0]), options.child[1], options.batch)
        return
    found: dict[str, list[object]] = {}
    with tempfile.TemporaryDirectory(prefix="asib-mapped-") as folder:
        write(root := Path(folder), options.images, options.layout)
        environment = {**os.environ, "XDG_CACHE_HOME": str(root / "cache")}
        child = [sys.executable, "-m", "benchmarks.mapped", "--batch", str(options.batch), "--child", folder]
        for what in ("first", *("later", "mapped", "resident") * options.rounds):
            done = subprocess.run([*child, what], env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found.setdefault(what, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(what, found[what][-1], flush=True)
    asked = {name: str(value) for name, value in vars(options).items()}
    result = harness.described("numpy") | {"asked": asked, "found": found}
    harness.write(f"mapped_{harness.kind()}", result, options.output)


if __name__ == "__main__":
    main()
