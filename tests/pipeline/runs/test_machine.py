"""`tracking.system_metrics`: what is read is what the kernel says, and a run logs it beside its own metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.runs import machine
from tests.steps.lab import Lab, points

READ = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/system_memory_usage_percentage",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("machine"))


def test_memory_is_what_the_kernel_says() -> None:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kibibytes = {words[0].rstrip(":"): float(words[1]) for words in lines}
    found = machine.readings([])
    share = 1 - kibibytes["MemAvailable"] / kibibytes["MemTotal"]
    assert found["system/system_memory_usage_percentage"] == pytest.approx(100 * share, abs=3)
    assert 0 < found["system/system_memory_usage_megabytes"] < kibibytes["MemTotal"] * 1024 / 1e6


def test_a_run_logs_readings_until_its_end(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "EVERY_S", 0.05)
    done = lab.step("distill", "tracking.mode=offline", "tracking.system_metrics=true")
    assert done.code == 0, done.err
    (folder,) = (folder for folder in done.new if "distill" in folder.name)
    found = points(folder)
    times = {name: [step for n, step in found if n == name] for name in READ}
    assert {name for name, _ in found if name.startswith("system/")} == READ
    assert all(times.values())
    assert all(step >= 0 for steps in times.values() for step in steps)
