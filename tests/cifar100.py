"""CIFAR-100 as published, where it lies packed beside this repository: unpacked once, which takes 20 s."""

import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def cifar100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds `cifar-100-python`."""
    unpack, folder = SHARED / "data/unpack_cifar100.py", tmp_path_factory.mktemp("cifar100")
    if not unpack.exists():
        pytest.skip(f"{unpack} with the packed CIFAR-100 is not beside this repository")
    subprocess.run([sys.executable, unpack, folder], check=True)
    return folder
