"""Methods that relate samples of a batch, or remember them, compute in two processes what they compute in one."""

from typing import Any

import pytest
import torch

from pipeline.training.checkpoint import unpack
from tests.pipeline.training.methods import relations_worker
from tests.warm import group


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    group(relations_worker.__name__, str(folder), log=folder / "log")
    return [unpack((folder / f"rank{rank}").read_bytes()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", relations_worker.METHODS)
def test_two_processes_compute_what_one_computes(name: str, two: list[Any]) -> None:
    """Uneven slices, a skipped update, a last batch of two; both processes end with the same bits."""
    one = relations_worker.outcome(name)
    for found in two:
        assert found[name]["state"].keys() == one["state"].keys()
        for key, value in one["state"].items():
            torch.testing.assert_close(found[name]["state"][key], value, rtol=1e-4, atol=1e-5, msg=key)
        assert found[name]["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for key, value in two[0][name]["state"].items():
        assert torch.equal(value, two[1][name]["state"][key]), key
