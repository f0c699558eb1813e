"""Makes the bundled sample: 20 classes of CIFAR-100, 100 training and 25 test images each.

    python pipeline/data/sample/make_cifar100_sample.py ROOT     (ROOT holds cifar-100-python/)

Which images, and how they are stored, is in README.md beside this file. The same input gives the same arrays.
"""

import hashlib
import io
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TARGET = Path(__file__).parent / "cifar100_sample.npz"
PER_CLASS = {"train": 100, "test": 25}
MD5 = {  # of the original distribution; nothing else is unpickled
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}


def read(root: Path, name: str) -> dict[str, Any]:
    """One of the original files; exits with a message if it is missing or is not the original."""
    path = root / "cifar-100-python" / name
    if not path.is_file():
        sys.exit(f"{path} is missing")
    content = path.read_bytes()
    if hashlib.md5(content).hexdigest() != MD5[name]:
        sys.exit(f"{path} is not the original file (md5 differs)")
    return dict(pickle.loads(content, encoding="latin1"))


def choose(fine: NDArray[np.int64], coarse: NDArray[np.int64], names: list[str]) -> list[str]:
    """The alphabetically first class of each super-class, sorted; their positions are the sample's labels."""
    return sorted(min(names[label] for label in np.unique(fine[coarse == group])) for group in np.unique(coarse))


def pack(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N,3,H,W) RGB -> planes (G, R−G, B−G), each pixel minus its left neighbour, mod 256: smaller when compressed."""
    green = images[:, 1]
    planes = np.stack([green, images[:, 0] - green, images[:, 2] - green], axis=1)
    packed = planes.copy()
    packed[..., 1:] -= planes[..., :-1]
    return packed


def write(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write an npz file without time stamps."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.external_attr = 0o644 << 16
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(member, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def make(root: Path, target: Path) -> None:
    """Reads the original below `root` and writes the sample."""
    names: list[str] = read(root, "meta")["fine_label_names"]
    arrays: dict[str, NDArray[Any]] = {}
    chosen: list[str] = []
    for split, count in PER_CLASS.items():
        original = read(root, split)
        fine = np.array(original["fine_labels"])
        chosen = chosen or choose(fine, np.array(original["coarse_labels"]), names)
        label_of = {names.index(name): label for label, name in enumerate(chosen)}
        rows = np.sort(np.concatenate([np.flatnonzero(fine == old)[:count] for old in label_of]))
        arrays[f"packed_{split}"] = pack(np.asarray(original["data"], np.uint8)[rows].reshape(-1, 3, 32, 32))
        arrays[f"y_{split}"] = np.array([label_of[old] for old in fine[rows].tolist()], np.uint8)
        arrays[f"original_{split}"] = rows.astype(np.int32)
    arrays["class_names"] = np.array(chosen)
    write(target, arrays)
    print(f"wrote {target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    make(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else TARGET)
