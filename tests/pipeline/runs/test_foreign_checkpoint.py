"""`resume=<id>` from the server alone: what the run's `checkpoints/manifest.json` says is somebody's data."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.runs.opening import fetch_checkpoint
from pipeline.training.checkpoint import Slots, pack


class Server:
    """What is downloaded for a run's checkpoints: a copy of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fetch(self, uri: str, to: Path) -> Path:
        return Path(shutil.copytree(self.folder, to / "checkpoints", symlinks=True))


def fetch(tmp_path: Path, manifest: Any) -> Path:
    (tmp_path / "server" / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    fetch_checkpoint(Server(tmp_path / "server"), "0" * 32, tmp_path / "run")  # type: ignore[arg-type]
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    (tmp_path / "server").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "victim").mkdir()
    made = pack({"journal": "", "position": {"streak": 0}})
    (tmp_path / "server" / "slot1.safetensors").write_bytes(made)
    (tmp_path / "victim" / "thesis.txt").write_bytes(b"years of work")
    (tmp_path / "server" / "link").symlink_to(tmp_path / "victim" / "thesis.txt")
    return made


def test_the_file_that_the_manifest_names_is_taken_over(content: bytes, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(content).hexdigest()
    folder = fetch(tmp_path, {"file": "slot1.safetensors", "sha256": sha256, "slot": 1, "time": 1})
    assert Slots(folder).read()[1].sha256 == sha256


@pytest.mark.parametrize("where", ["absolute", "above", "link", "nowhere", "number", "list", "broken", "folder"])
def test_no_other_file_is_moved(content: bytes, tmp_path: Path, where: str) -> None:
    thesis = tmp_path / "victim" / "thesis.txt"
    sha256 = hashlib.sha256(b"years of work").hexdigest()
    names = {"absolute": str(thesis), "above": "../../../victim/thesis.txt", "nowhere": "x", "number": 3, "folder": "."}
    manifest: Any = {"file": names.get(where, where), "sha256": sha256}
    with pytest.raises(UserError) as refused:
        fetch(tmp_path, {"list": [], "broken": "{"}.get(where, manifest))
    assert "\n" not in str(refused.value)
    assert thesis.read_bytes() == b"years of work"
    assert not (tmp_path / "run" / "checkpoints" / "manifest.json").exists()


def test_the_hash_is_checked_before_anything_is_moved(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir()
    before = tmp_path / "run" / "checkpoints" / "slot0.safetensors"
    before.write_bytes(b"what was there")
    with pytest.raises(UserError, match="SHA-256"):
        fetch(tmp_path, {"file": "slot1.safetensors", "sha256": "0" * 64})
    assert before.read_bytes() == b"what was there"


@pytest.mark.parametrize("slot", ["../../victim/thesis.txt\0", "../../victim/x", 2, -1, None, [0], "0"])
def test_a_folders_manifest_names_its_two_slots_only(content: bytes, tmp_path: Path, slot: Any) -> None:
    (tmp_path / "victim" / "slotx.safetensors").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    record = {"checkpoints": [{"slot": slot, "sha256": sha256}]}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(record))
    slots = Slots(tmp_path / "run")
    with pytest.raises(UserError, match="no whole checkpoint"):
        slots.read()
    slots.write({"a": 1})
    saved = slots.settle()
    assert saved is not None
    assert saved.path.parent == tmp_path / "run"
