"""Fashion-MNIST's files, made small."""

from pathlib import Path

import numpy as np


def write_fashion_mnist(root: Path, images: int, cut: int = 0) -> None:
    """The IDX files that torchvision reads, with `images` 28×28 images per split."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        pixels = rng.integers(0, 256, (images, 28, 28), dtype=np.uint8)
        header = bytes([0, 0, 8, 3]) + b"".join(int(d).to_bytes(4, "big") for d in pixels.shape)
        content = header + pixels.tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(content[: len(content) - cut])
        labels = np.arange(images, dtype=np.uint8) % 10
        header = bytes([0, 0, 8, 1]) + images.to_bytes(4, "big")
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
