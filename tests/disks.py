"""A disk of a size that a test chooses, with a real file system that runs full."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[float], Path]]:
    """Mount a disk of the given size in MB."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(megabytes: float) -> Path:
        size = f"size={int(megabytes * 1024)}k"
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", place], capture_output=True)
        if made.returncode:
            pytest.skip("this user may not mount a tmpfs")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", place], check=True)
