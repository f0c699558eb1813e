"""Training with the teacher bank: the targets of training without it within fp16 rounding, the same bits every time."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.batches import Batch
from pipeline.training.bank import cache
from pipeline.training.bank.cache import BankCache
from pipeline.training.bank.lookup import BankedTeachers
from pipeline.training.bank.store import RECORDS
from pipeline.training.checkpoint import Slots
from pipeline.training.methods.asib.task import AsibDistillation as Distillation
from pipeline.training.objective import Moment
from tests.pipeline.training.builders import (
    ONE_STAGE,
    Calls,
    Record,
    config,
    differences,
    distillation,
    image_data,
    loop_for,
    run_until,
)

pytestmark = pytest.mark.step  # trains to the end again and again

HALF = 2.0**-11
"""Relative rounding of fp16 (10 bits behind the leading one, to nearest)."""
LOSS = 2e-3
"""Relative tolerance of one step's loss: logits below 16 move by at most 2^-8, softmax at tau = 4 by less than that."""
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cutmix and features": {"cutmix_alpha_distill": 1.0, "feat_kd_alpha": 0.3, "hybrid_beta": 0.2},
    "two views": {"kd_two_view_start_epoch": 0, "kd_two_view_stop_epoch": 9, "mixup_alpha": 0.5},
    "sample gate": {"kd_sample_gate": True, "kd_sample_thr": 1.0, "kd_sample_max_ratio": 0.4, "mixup_alpha": 0.5},
    "auto_min, dkd": {"kd_target": "auto_min", "kd_loss": "dkd", "kd_uncertainty_weight": 0.5},
    "cccp": {"use_cccp": True, "cccp_nt": 2, "cccp_ns": 2},
    "average": {"kd_target": "avg", "cutmix_alpha_distill": 1.0},
}


@pytest.fixture(autouse=True)
def _small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RESERVE", 0)


def banked(folder: Path, limit: int = 10**9, data: Any = None, **sections: Any) -> Distillation:
    data = data or image_data()

    def open_bank(batches: Any, teachers: Any, costs: Any) -> BankedTeachers:
        hashes = [f"hash {k}" for k in range(len(teachers))]
        return BankedTeachers(BankCache(folder, limit), data, batches, teachers, hashes, costs)

    return distillation(config(**sections), data, open_bank=open_bank)


def first(task: Distillation, phase: str) -> tuple[Batch, Moment]:
    epoch = next(e for e in task.plan if e.phase == phase)
    task.monitor.gate_open = True
    task.begin_epoch(epoch)
    return next(iter(task.epoch_batches(epoch, 1))), Moment(phase, epoch.in_phase, 1)


def trained(task: Distillation, folder: Path) -> tuple[dict[str, Any], Record]:
    record = Record()
    loop = loop_for(task, folder, record)
    loop.run()
    return {k: v.clone() for k, v in task.student.state_dict().items()}, record


@pytest.mark.parametrize(
    ("amp", "rank", "size"), [(False, 0, 1), (True, 0, 1), (False, 2, 3)], ids=["float32", "bfloat16", "third process"]
)
def test_known_outputs_are_those_of_the_teachers_within_half_precision(
    tmp_path: Path, amp: bool, rank: int, size: int
) -> None:
    """Beside fp16 rounding: the last bits of float32, where a batch of another size sums in another order."""
    task = banked(tmp_path, method={"kd_two_view_start_epoch": 0, "kd_two_view_stop_epoch": 9})
    task.batches.rank, task.batches.world_size = rank, size
    batch, _ = first(task, "b")
    assert len(batch.x) == (10 if size == 1 else 4)
    assert batch.known is not None
    assert batch.known_second is not None
    assert batch.x_second is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for x, known in ((batch.x, batch.known), (batch.x_second, batch.known_second)):
            for teacher, seen in zip(task.teachers, known(None), strict=True):
                expected = teacher(x)
                for name in ("logits", "feat_2d"):
                    wanted = getattr(expected, name).float()
                    torch.testing.assert_close(getattr(seen, name), wanted, rtol=1.01 * HALF + 1e-6, atol=1e-6)


def test_a_logit_beyond_half_precision_is_seen_in_full_by_this_run_and_the_next(tmp_path: Path) -> None:
    """fp16 ends at 65504. Rows with such a logit are computed each time; the others come from the bank."""
    for served in (False, True):
        task = banked(tmp_path)
        teacher = task.teachers[0]
        with torch.no_grad():
            next(p for name, p in reversed([*teacher.named_parameters()]) if name.endswith("bias"))[0] = 1e5
        batch, _ = first(task, "b")
        assert batch.known is not None
        with torch.no_grad():
            seen = batch.known(None)
            expected = [net(batch.x).logits for net in task.teachers]
        assert (expected[0][:, 0] > 65504).all()
        torch.testing.assert_close(seen[0].logits, expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(seen[1].logits, expected[1], rtol=1.01 * HALF + 1e-6, atol=1e-6)
        assert task.bank is not None
        assert (task.bank.epoch.served > 0) == served


@pytest.mark.parametrize(("case", "phase"), [(c, p) for c in CASES for p in "ab" if (c, p) != ("average", "a")])
def test_one_step_has_the_loss_that_it_has_without_a_bank(tmp_path: Path, case: str, phase: str) -> None:
    """Without, with an empty bank, with a full one."""
    method = CASES[case]
    found: list[dict[str, float]] = []
    costs: list[dict[str, int]] = []
    for task in (distillation(config(method=method)), banked(tmp_path, method=method), banked(tmp_path, method=method)):
        batch, moment = first(task, phase)
        objective = task.phases[phase].objective
        objective.train()
        calls = [Calls(t) for t in task.teachers]
        with task.costs.counting():
            terms = objective(batch, moment)
        costs.append(dict(task.costs.images))
        found.append({k: v.item() for k, v in terms.items() if k != "output"})
    assert [len(c) for c in calls] == [0, 0]
    assert costs[0] == costs[1] == costs[2]
    assert found[1] == found[2]
    for name, value in found[1].items():
        assert value == pytest.approx(found[0][name], rel=LOSS, abs=1e-5), name


def test_the_next_run_of_the_seed_asks_no_teacher_and_has_the_same_bits(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"method": {"cutmix_alpha_distill": 1.0}}
    first_run = banked(tmp_path / "bank", **sections)
    weights, record = trained(first_run, tmp_path / "one")
    images = len(first_run.data.train.indices)
    assert images == 36
    counts = {k: sum(record.series(f"bank/{k}")) for k in ("served", "computed")}
    assert sum(counts.values()) == 2 * 8 * images
    assert 0 < counts["served"] < 0.2 * counts["computed"]  # few of 8 draws of 162 views come twice
    costs = first_run.costs.metrics()
    assert costs["cost/forward_images/teacher_0"] == 8 * images, "what the method asks for, from the bank or not"

    again = banked(tmp_path / "bank", **sections)
    calls = [Calls(t) for t in again.teachers]
    second, record = trained(again, tmp_path / "two")
    evaluated = len(again.data.eval)
    assert [len(c) for c in calls] == [evaluated, evaluated]
    assert sum(record.series("bank/computed")) == 0
    assert differences(weights, second) == []

    other = banked(tmp_path / "bank", method={"cutmix_alpha_distill": 1.0, "tau": 2.0})  # another trial
    _, record = trained(other, tmp_path / "three")
    assert sum(record.series("bank/computed")) == 0


def test_built_ahead_nothing_is_left_to_compute(tmp_path: Path) -> None:
    method = {"kd_two_view_start_epoch": 1, "kd_two_view_stop_epoch": 3, "kd_cooldown_epochs": 1}
    task = banked(tmp_path / "bank", method=method)
    assert task.bank is not None
    with torch.no_grad():
        task.bank.build(task.asked_of_teachers())
    built = task.bank.total.computed
    _, record = trained(task, tmp_path / "run")
    assert built == sum(record.series("bank/computed"))  # the first epoch's row has them
    # a: 4 epochs, b: 3 of 4 with teachers, two of them with two views
    assert sum(record.series("bank/served")) == 2 * 36 * (4 + 3 + 2)


def test_a_run_stopped_within_an_epoch_goes_on_bit_identical(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"method": {**ONE_STAGE, "mixup_alpha": 0.5}, "optim": {"use_amp": True}}
    undisturbed, _ = trained(banked(tmp_path / "bank", **sections), tmp_path / "one")
    run_until(banked(tmp_path / "other", **sections), tmp_path / "two", (1, 2))
    task = banked(tmp_path / "other", **sections)
    loop = loop_for(task, tmp_path / "two")
    loop.load_state_dict(Slots(tmp_path / "two").read()[0])
    loop.run()
    assert differences(undisturbed, dict(task.student.state_dict())) == []


def test_a_damaged_bank_is_computed_anew(tmp_path: Path) -> None:
    weights, _ = trained(banked(tmp_path / "bank", method=ONE_STAGE), tmp_path / "one")
    for path in (tmp_path / "bank").rglob(RECORDS):
        content = bytearray(path.read_bytes())
        content[1000:3000] = bytes(2000)
        path.write_bytes(content)
    again, record = trained(banked(tmp_path / "bank", method=ONE_STAGE), tmp_path / "two")
    assert sum(record.series("bank/computed")) > 0
    assert differences(weights, again) == []


def test_a_full_disk_leaves_training_going(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    weights, _ = trained(banked(tmp_path / "bank", method=ONE_STAGE), tmp_path / "one")

    def full(fd: int, content: Any, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    again, record = trained(banked(tmp_path / "other", method=ONE_STAGE), tmp_path / "two")
    assert sum(record.series("bank/served")) == 0
    assert differences(weights, again) == []
    assert "No space left on device" in caplog.text


def test_other_weights_data_or_views_are_another_bank(tmp_path: Path) -> None:
    for sections in ({}, {"augment": {"pad_mode": "reflect"}}, {"augment": {"crop_flip": False}}):
        task = banked(tmp_path, **sections)
        assert task.bank is not None
        task.bank.begin()
    task = banked(tmp_path, data=image_data(seed=1))
    assert task.bank is not None
    task.bank.begin()
    task.bank.hashes = ["other", "another"]
    task.bank.begin()
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2 * 5
