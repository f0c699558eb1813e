"""100 classes of ImageNet: which ones each published list means, and that the digest tells lists apart."""

import hashlib
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo

from pipeline.config import DatasetConfig
from pipeline.data.image_files import ImageFiles
from pipeline.data.sources import CLASS_LISTS, ImageData, load
from pipeline.errors import UserError

OTHERS = ("n00000001", "n99999999")
"""Folders that no list names."""


def listed(name: str) -> list[str]:
    return [line for line in (CLASS_LISTS / f"{name}.txt").read_text().splitlines() if not line.startswith("#")]


pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in ImageNet's layout, with the classes of cmc and two more."""
    root = tmp_path_factory.mktemp("imagenet")
    for number, name in enumerate([*listed("cmc"), *OTHERS]):
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (2, 2), (number, 0, 0)).save(root / split / name / f"{split}_{number}.png")
    return root


def read(root: Path, **changes: Any) -> ImageData:
    return load(DatasetConfig(**{"name": "imagenet100", "root": str(root), "image_size": 2, "workers": 0, **changes}))


def test_lists_are_those_of_their_sources() -> None:
    order = list(ImageNetInfo().label_names())
    assert (len(order), order) == (1000, sorted(order))
    drawn = np.random.RandomState(1993).permutation(1000)[:100]  # gen_imagenet_subset.py: the same draw as its choice
    assert listed("podnet") == order[:100]
    assert listed("ucir") == sorted(order[k] for k in drawn)
    names = listed("cmc")
    assert len(set(names)) == 100
    assert set(names) < set(order)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()  # of the published file's lines, sorted
    assert digest == "d61d354b64beb3ce2c2c9cf04a874298362dc9fcd589e15ee34c5e4592145746"
    common = [len({*listed(a)} & {*listed(b)}) for a, b in combinations(("cmc", "podnet", "ucir"), 2)]
    assert sorted(common) == [7, 8, 9]


def test_only_the_classes_of_the_list_are_read(whole: Path, tmp_path: Path) -> None:
    data = read(whole, class_list="cmc")
    assert list(data.classes) == sorted(listed("cmc"))
    for images, labels in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert isinstance(images, ImageFiles)
        assert [Path(path).parent.name for path in images.paths] == list(data.classes)
        assert labels.tolist() == list(range(100))
        reds = images[:][:, 0, 0, 0].tolist()
        assert reds == [listed("cmc").index(name) for name in data.classes]
    shutil.copytree(whole, tmp_path / "extracted", ignore=shutil.ignore_patterns(*OTHERS))
    assert data.digest == read(tmp_path / "extracted", name="image_folder").digest


def test_the_digest_is_that_of_the_chosen_classes(whole: Path, tmp_path: Path) -> None:
    for file, names in {
        "a": OTHERS,
        "b": [*OTHERS[::-1], "", "# the same"],
        "c": [OTHERS[0], listed("cmc")[0]],
    }.items():
        (tmp_path / file).write_text("\n".join(names))
    digests = [read(whole, path=str(tmp_path / file)).digest for file in "abc"]
    assert digests[0] == digests[1]
    assert len({*digests, read(whole, class_list="cmc").digest}) == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"n00000001\nn00000002\n", "train/ has no folder n00000002, a class of the list (1 of 2 are missing)"),
        (b"n00000001\nn99999999\nn00000001", "it names n00000001 twice"),
        (b"# nothing\n\n", "it holds no name of a class"),
        (b"\xff\xfe\0", "it cannot be read as text"),
        (None, "it cannot be read as text"),
    ],
)
def test_a_list_that_does_not_fit_is_one_line(
    content: bytes | None, expected: str, whole: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(whole, path=str(tmp_path / "list.txt"))
    assert expected in str(caught.value)
    assert str(caught.value).startswith("dataset.")
    assert "\n" not in str(caught.value)


def test_another_list_than_the_folder_has_is_one_line(whole: Path) -> None:
    with pytest.raises(UserError, match=r"^dataset\.root=[^\n]* train/ has no folder n0144[^\n]* \(92 of 100 [^\n]*$"):
        read(whole, class_list="podnet")
