"""WebDataset shards through whole steps: the same run as from the arrays that they were written from, continued too."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.steps.lab import (
    BATCHES,
    CLASSES,
    SIZE,
    TEST,
    TRAIN,
    Done,
    Lab,
    ending,
    images,
    same_run,
    settings,
    signal_at,
)

pytest.importorskip("webdataset")


def write_shards(root: Path) -> Path:
    """The lab's images as PNG files, which lose nothing."""
    root.mkdir()
    for split, count, seed in (("train", TRAIN, 0), ("validation", TEST, 1000)):
        pixels, labels = images(count, seed)
        for shard in range(2):
            with tarfile.open(root / f"{split}-{shard}.tar", "w") as tar:
                for number in range(shard * count // 2, (shard + 1) * count // 2):
                    picture = io.BytesIO()
                    Image.fromarray(pixels[number]).save(picture, "PNG")
                    for key, content in (("png", picture.getvalue()), ("cls", str(labels[number]).encode())):
                        header = tarfile.TarInfo(f"{number:03}.{key}")
                        header.size = len(content)
                        tar.addfile(header, io.BytesIO(content))
    (root / "names.txt").write_text("\n".join(CLASSES))
    return root


@pytest.mark.slow
def test_shards_train_as_their_arrays_do_and_a_run_is_continued(
    lab: Lab, undisturbed: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(lab.folder / "cache"))
    root = write_shards(lab.folder / "shards")
    content = settings(lab.data)
    content["defaults"][0] = {"override /dataset": "timm"}
    content["dataset"] |= {"id": "wds/shards", "root": str(root.parent), "path": str(root / "names.txt")}
    content["dataset"] |= {"train_split": "train-{0..1}.tar", "test_split": "validation-{0..1}.tar"}
    content["dataset"] |= {"image_size": SIZE}
    lab.cfg.write_text(yaml.safe_dump(content))
    killed = lab.disturbed(signal_at(BATCHES + 3), "distill")  # in the first B-step
    assert killed.code == 143, killed.err
    assert ending(killed.folder) == ("KILLED", "killed", 143)
    again = lab.step("distill", f"resume={killed.folder}")
    assert again.code == 0, again.err
    same_run(killed.folder, undisturbed.folder)
