"""Two processes compute what one computes; they stop together, and skip bad steps together."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training import distributed
from pipeline.training.checkpoint import unpack
from tests.pipeline.training import ddp_worker
from tests.warm import group


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    group(ddp_worker.__name__, str(folder), log=folder / "log")
    return [unpack((folder / f"rank{rank}of2").read_bytes()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ddp_worker.SCENARIOS)
def test_two_processes_compute_what_one_computes(name: str, two: list[Any], tmp_path: Path) -> None:
    """Uneven slices, mixing partners in the other process, noise, dropout, clipping, momentum, several epochs."""
    one = ddp_worker.outcome(name, tmp_path)
    for found in two:
        assert found[name]["weights"].keys() == one["weights"].keys()
        for key, value in one["weights"].items():
            torch.testing.assert_close(found[name]["weights"][key], value, rtol=1e-3, atol=2e-5)
    assert [s for s, _ in two[0][name]["rows"]] == [s for s, _ in one["rows"]]
    for (_, found), (_, expected) in zip(two[0][name]["rows"], one["rows"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    found, expected = (
        {k: v for k, v in r["results"].items() if k not in ("cost/seconds", "cost/device_hours")}
        for r in (two[0][name], one)
    )
    assert found == pytest.approx(expected)
    assert two[1][name]["rows"] == [], "only the first process writes"


@pytest.mark.slow
def test_the_weights_of_both_processes_are_the_same_bits(two: list[Any]) -> None:
    for name in ddp_worker.SCENARIOS:
        for key, value in two[0][name]["weights"].items():
            assert torch.equal(value, two[1][name]["weights"][key]), (name, key)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_place(two: list[Any]) -> None:
    assert two[0]["stopped"] == two[1]["stopped"] == "signal 15 at 2, 0"
    assert two[0]["position"] == {"epoch": 2, "batch": 0, "streak": 0}


@pytest.mark.slow
def test_a_step_that_is_bad_in_one_process_is_skipped_in_both(two: list[Any]) -> None:
    expected = "2 non-finite steps in a row at finetune-epoch 1, batch 3, weights finite: True"
    assert [found["poisoned"] for found in two] == [expected, expected]
    kept = "3 of 4 steps, statistics finite: True"
    assert [found["poisoned statistics"] for found in two] == [kept, kept]


def test_with_one_process_everything_is_the_identity() -> None:
    values = torch.tensor([1.0, 2.0])
    assert distributed.world() == (0, 1, 0)
    assert torch.equal(distributed.total(values), values)
    assert torch.equal(distributed.gather_rows(values, slice(0, 2), 2), values)
    assert (distributed.anyone(True), distributed.anyone(False)) == (True, False)
    assert distributed.first_process_says([1.0, "x"]) == [1.0, "x"]
