"""Costs of a network: counted by hand; latencies of a network whose time is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline.evaluate import speed

IMAGE = torch.zeros(1, 3, 16, 16).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def _budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "BUDGET_S", {1: 0.2, 256: 0.4})
    Slow.now = 0.0
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: Slow.now))


class Slow(nn.Module):
    """Takes a known time for a call and for an image, of a clock that only it moves."""

    now = 0.0

    def __init__(self, call: float, image: float) -> None:
        super().__init__()
        self.call, self.image = call, image
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert x.is_contiguous(memory_format=torch.channels_last)
        self.batches.append(len(x))
        Slow.now += self.call + self.image * len(x)
        return x


def test_parameters_and_macs_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    found = speed.size(net, IMAGE)
    assert found["parameters/total"] == (3 * 9 + 1) * 8 + (8 + 1) * 5
    assert found["cost/macs_per_image"] == 16 * 16 * 8 * 27 + 8 * 5


def test_latency_is_the_time_of_a_call() -> None:
    net = Slow(0.01, 0.0004)
    net.train()
    found = speed.latency(net, IMAGE)
    assert found["speed/latency_ms_1"] == pytest.approx(10.4)
    assert found["speed/latency_ms_256"] == pytest.approx(112.4)
    assert found["speed/images_per_second_256"] == pytest.approx(256_000 / found["speed/latency_ms_256"])
    assert net.training
    assert net.batches.count(1) >= 10


def test_a_large_batch_that_takes_seconds_runs_once() -> None:
    net = Slow(0.0, 0.0008)
    speed.latency(net, IMAGE)
    assert net.batches.count(256) == 1  # 0.205 s: another would exceed the budget


def test_what_would_take_a_minute_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PATIENCE_S", 0.5)
    found = speed.latency(Slow(0.0, 0.004), IMAGE)
    assert set(found) == {"speed/latency_ms_1"}
