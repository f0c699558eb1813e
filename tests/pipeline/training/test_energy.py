"""Time and energy of training, from a folder of counters as Linux has it."""

from pathlib import Path

import pytest
import torch

from pipeline.training import energy
from pipeline.training.costs import Costs

CPU = torch.device("cpu")


@pytest.fixture
def counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sockets at 1 J and 10 J, the second with metered memory; beside them zones that are part of others."""
    zones = {"0": ("package-0", 1), "0:0": ("core", 0), "1": ("package-1", 10), "1:1": ("dram", 0), "2": ("psys", 50)}
    for number, (name, joules) in zones.items():
        (tmp_path / f"intel-rapl:{number}").mkdir()
        (tmp_path / f"intel-rapl:{number}" / "name").write_text(f"{name}\n")
        (tmp_path / f"intel-rapl:{number}" / "max_energy_range_uj").write_text("100000000\n")
        show(tmp_path, number, joules)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    return tmp_path


def show(counters: Path, zone: str, joules: float) -> None:
    (counters / f"intel-rapl:{zone}" / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")


def test_the_joules_of_sockets_and_memory_are_added(counters: Path) -> None:
    meters = energy.Meters(CPU)
    for zone, joules in (("0", 3), ("0:0", 2), ("1", 14.5), ("1:1", 0.25), ("2", 99)):
        show(counters, zone, joules)
    assert meters.used() == {"cpu": pytest.approx((3 - 1) + (14.5 - 10) + 0.25)}
    assert meters.used() == {"cpu": 0.0}


def test_a_counter_that_starts_again_at_zero_has_not_run_backwards(counters: Path) -> None:
    show(counters, "0", 98)
    meters = energy.Meters(CPU)
    show(counters, "0", 5)
    assert meters.used() == {"cpu": pytest.approx(100 - 98 + 5)}


@pytest.mark.parametrize("of", ["a machine without meters", "counters for root alone"])
def test_where_nothing_can_be_read_no_energy_is_stated(counters: Path, of: str) -> None:
    for file in counters.glob("*/energy_uj"):
        file.unlink()
        if of == "counters for root alone":  # who runs the tests may be root: a folder cannot be read by anybody
            file.mkdir()
    costs = Costs({})
    costs.start(CPU)
    costs.lap()
    assert not [name for name in costs.metrics() if "energy" in name]


def test_energy_and_device_hours_of_two_laps(counters: Path) -> None:
    costs = Costs({})
    costs.start(CPU)
    for joules in (30, 73):
        show(counters, "0", joules)
        costs.lap()
    found = costs.metrics()
    assert found["cost/energy_kwh/cpu"] == pytest.approx(72 / 3.6e6)
    assert found["cost/device_hours"] == pytest.approx(found["cost/seconds"] / 3600)


def test_what_was_not_metered_from_the_beginning_is_not_stated(counters: Path) -> None:
    first = Costs({})
    first.start(CPU)
    show(counters, "0", 31)
    first.lap()
    saved = first.state_dict()

    def continued(**changes: object) -> dict[str, float]:
        costs = Costs({})
        costs.load_state_dict({**saved, **changes})
        costs.start(CPU)
        show(counters, "0", 41)
        costs.lap()
        show(counters, "0", 31)
        return costs.metrics()

    assert continued()["cost/energy_kwh/cpu"] == pytest.approx(40 / 3.6e6)
    assert "cost/energy_kwh/cpu" not in continued(joules={})
