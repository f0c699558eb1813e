"""What a sweep is expected to cost: counts and bytes against a real run, and what measuring must leave alone."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.features import FeatureNet
from pipeline.distill import networks
from pipeline.sweep import estimate as sweep_estimate
from pipeline.sweep.estimate import AROUND_S, OTHER_BYTES, Estimate, Rates, Work
from pipeline.training.bank import cache
from pipeline.training.bank.cache import BankCache
from pipeline.training.bank.lookup import BankedTeachers
from pipeline.training.methods.asib import monitor
from pipeline.training.methods.asib import task as stages
from tests.pipeline.training.builders import EVERYTHING, config, differences, distillation, image_data, loop_for

NET = {"name": "cifar_resnet8"}
GROUND: dict[str, Any] = {"model": {"student": NET, "teachers": [NET, {"name": "cifar_resnet14"}]}}


def teachers(c: Any, data: Any) -> list[FeatureNet]:
    return [networks.build_teacher(c, data, k) for k in range(len(c.model.teachers))]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"method": {"teacher_eval_every": 2, "teacher_adapt_epochs": 3}, "optim": {"ema_decay": 0.9}},
        {"method": {"kd_alpha": 0.0}, "dataset": {"batch_size": 36}},
        {"method": {"kd_target": "avg", "kd_cooldown_epochs": 1}},
        {"method": {"use_partial_freeze": True, "student_freeze_schedule": (-1, 1), "cccp_ns": 2}},
        {"method": {"use_teacher_finetuning": True, "teacher_ce_alpha": 0.5}},
    ],
)
def test_work_is_what_a_run_does(sections: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates and images of evaluations, counted in a real run of the same task."""
    seen: Counter[int] = Counter()
    real = stages.outputs

    def counted(net: Any, batches: Any, name: str) -> Any:
        seen[id(net)] += len(batches.labels)
        return real(net, batches, name)

    monkeypatch.setattr(stages, "outputs", counted)
    monkeypatch.setattr(monitor, "outputs", counted)
    task = distillation(config(**sections))
    work = sweep_estimate.work(task)
    task = distillation(config(**sections))
    loop_for(task, tmp_path).run()
    task.results(test=False)
    batches: Counter[str] = Counter()
    for (phase, *_), n in work.batches.items():
        batches[phase] += n
    assert {p: n * task.phases[p].repeats for p, n in batches.items()} == task.costs.updates
    ema = task.phases["b"].objective.get_trainable_module(ema=True)
    averaged = seen[id(ema.module)] if ema is not None else 0
    assert work.images["student"] == seen[id(task.student)] + averaged
    assert [work.images[f"teacher_{k}"] for k in range(len(task.teachers))] == [seen[id(t)] for t in task.teachers]
    assert work.checkpoints == len(task.plan)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"augment": {"crop_flip": False}},
        {"method": {"kd_sample_gate": True}},
        {"method": {"kd_target": "avg", "student_epochs_per_stage": (3, 3), "kd_cooldown_epochs": 2}},
        {"method": {"kd_target": "avg", "kd_two_view_start_epoch": 1, "kd_two_view_stop_epoch": 3}},
    ],
)
def test_what_a_bank_is_asked_is_what_a_run_asks(
    sections: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by the bank of a real run whose gate is open; how many views differ is a mean of random draws."""
    monkeypatch.setattr(cache, "RESERVE", 0)
    monkeypatch.setattr(monitor.Monitor, "decide", lambda self, *_, **__: setattr(self, "gate_open", True))
    c, data = config(**sections), image_data()
    task = distillation(c, data)
    hashes = [f"hash {k}" for k in range(len(task.teachers))]
    bank = BankedTeachers(BankCache(tmp_path / "bank", 10**9), data, task.data.train, task.teachers, hashes)
    task.use_bank(bank)
    loop_for(task, tmp_path).run()
    work = sweep_estimate.work(distillation(c, data))
    assert bank.total.served + bank.total.computed == len(task.teachers) * work.asked
    assert bank.total.computed == pytest.approx(len(task.teachers) * sweep_estimate._views(task, work, 1), rel=0.05)


def test_epochs_of_different_cost_are_told_apart() -> None:
    """Of six B-epochs two are without distillation and two with a second view; two stages freeze differently."""
    method = {"student_epochs_per_stage": (3, 3), "kd_cooldown_epochs": 2, "kd_target": "avg"}
    views = {"kd_two_view_start_epoch": 1, "kd_two_view_stop_epoch": 3}
    found = sweep_estimate.kinds(distillation(config(method={**method, **views})))
    assert sorted(len(epochs) for epochs in found.values()) == [2, 2, 2]
    frozen = {"use_partial_freeze": True, "student_freeze_schedule": (-1, 1)}
    assert len(sweep_estimate.kinds(distillation(config(method={**method, **views, **frozen})))) == 4


def test_seconds_are_a_sum_of_products() -> None:
    work = Work({("a",): 30, ("b", 1): 50}, {"student": 1000, "teacher_0": 200}, 7)
    rates = Rates({("a",): 0.5, ("b", 1): 0.2}, {"student": 0.01, "teacher_0": 0.02}, 0.1)
    assert rates.seconds(work) == pytest.approx(AROUND_S + 15 + 10 + 10 + 4 + 0.7)
    banked = dataclasses.replace(rates, looked_up=0.001)
    assert banked.seconds(dataclasses.replace(work, asked=500)) == pytest.approx(rates.seconds(work) + 0.5)


@pytest.mark.parametrize("batch_size", [10, 30])
@pytest.mark.parametrize(("trials", "workers", "rounds"), [(30, 2, 15), (7, 3, 3), (1, 1, 1)])
@pytest.mark.parametrize(("bank", "seeds"), [("auto", 1), ("auto", 3), ("off", 1)])
def test_an_estimate_with_a_clock_that_ticks(
    batch_size: int, trials: int, workers: int, rounds: int, bank: str, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything measured takes a second: a small batch, one evaluation pass over at most 16 images, a checkpoint, and
    looking up 512 images. Trials share a bank, which is filled once."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(sweep_estimate.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(sweep_estimate, "cores", lambda: 8)
    sections = {**GROUND, "bank": bank, "dataset": {"batch_size": batch_size, "eval_batch_size": 6}}
    c, data = config(**sections), image_data()
    found = sweep_estimate.estimate(c, data, teachers(c, data), trials, workers, seeds)
    # 36 training images, 12 for validation; two stages of two A- and two B-epochs
    batches = {10: 4, 30: 2}[batch_size] * 8
    of_a_batch = max(1, batch_size / 16)
    images = (4 + 1 + 1) * 12 + 2 * 12  # the student once before, and after every B-epoch
    expected, filling = AROUND_S + batches * of_a_batch + images / 6 + 8, 0.0
    if bank == "auto":
        expected += 8 * 36 / 512
        filling = 36 * 162 * (1 - (161 / 162) ** (8 * seeds)) * 2 / 6
    assert found.seconds_per_trial == pytest.approx(expected)
    assert found.filling == pytest.approx(filling)
    assert found.seconds == pytest.approx(filling + rounds * expected)
    assert (found.bytes, found.trials, found.workers) == (trials * found.bytes_per_trial, trials, workers)


def test_with_a_bank_updates_leave_the_teachers_out() -> None:
    """Measured on the real clock: the teachers of these batches cost several times the student."""
    heavy = {"model": {"student": NET, "teachers": [{"name": "cifar_resnet32x4"}] * 2}}
    method = {"kd_target": "avg", "student_epochs_per_stage": (2, 2)}
    c = config(**heavy, method=method)
    data = image_data(size=32)
    nets = teachers(c, data)
    run = c.model_copy(update={"bank": "off"})
    found, without = (sweep_estimate.estimate(x, data, nets, 1, 1) for x in (c, run))
    assert found.seconds_per_trial - AROUND_S < 0.7 * (without.seconds_per_trial - AROUND_S)
    assert without.filling == 0 < found.filling


@pytest.mark.parametrize("method", [{}, {"kd_alpha": 0.0}, {"use_teacher_finetuning": True, "teacher_ce_alpha": 0.5}])
def test_bytes_are_those_of_the_folder_of_a_run(method: Any, tmp_path: Path) -> None:
    """Both checkpoints as a run leaves them; beside them the kept weights and 1 MB."""
    c, data = config(**GROUND, method=method), image_data()
    found = sweep_estimate.estimate(c, data, teachers(c, data), 1, 1)
    task = stages.Distillation(c, data, networks.build_student(c, data), teachers(c, data), torch.device("cpu"))
    loop_for(task, tmp_path).run()
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    kept = sum(v.numel() * v.element_size() for m in (task.student, task.fusion) if m for v in m.state_dict().values())
    assert found.bytes_per_trial - OTHER_BYTES == pytest.approx(written + kept, rel=0.03)


@pytest.mark.parametrize("method", [{}, EVERYTHING])
def test_measuring_leaves_teachers_and_random_states_alone(method: Any) -> None:
    c, data = config(**GROUND, method={**method, "ib_mbm_out_dim": 8}), image_data()
    nets = teachers(c, data)
    nets[0].train()
    for p in nets[1].parameters():
        p.requires_grad_(False)
    before = [(copy.deepcopy(t.state_dict()), t.training, [p.requires_grad for p in t.parameters()]) for t in nets]
    hooks = [len(t._forward_pre_hooks) for t in nets]
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads())
    sweep_estimate.estimate(c, data, nets, 3, 2)
    after = [(t.state_dict(), t.training, [p.requires_grad for p in t.parameters()]) for t in nets]
    assert differences(before, after) == []
    assert [len(t._forward_pre_hooks) for t in nets] == hooks
    assert all(p.grad is None for t in nets for p in t.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads()) == states[1:]


@pytest.mark.gpu
def test_measuring_leaves_the_gpus_random_state_alone() -> None:
    c, data = config(**GROUND).model_copy(update={"device": "cuda"}), image_data()
    nets = teachers(c, data)
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    assert sweep_estimate.estimate(c, data, nets, 3, 2).seconds > 0
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            Estimate(14.2, 213.0, 12_000_000, 360_000_000, 30, 2),
            "30 trials of about 14 s with 2 workers: about 3.5 min (upper bound: pruning saves part of it); "
            "12 MB each, 360 MB together, 53 GB free in runs/",
        ),
        (
            Estimate(7200.0, 7200.0 * 90, 2_500_000_000, 225_000_000_000, 1, 1),
            "1 trial of about 2.0 h with 1 worker: about 7.5 days (upper bound: pruning saves part of it); "
            "2.5 GB each, 225 GB together, 53 GB free in runs/: that does not fit, make room or choose another "
            "output_dir",
        ),
        (
            Estimate(4.2, 83.0, 12_000_000, 360_000_000, 30, 2, 20.0),
            "30 trials of about 4 s with 2 workers after 20 s for the teacher bank: about 83 s (upper bound: pruning "
            "and what the bank holds already save part of it); 12 MB each, 360 MB together, 53 GB free in runs/",
        ),
    ],
)
def test_words(found: Estimate, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(sweep_estimate.shutil.disk_usage("."))(10**12, 10**12 - 53 * 10**9, 53 * 10**9)
    monkeypatch.setattr(sweep_estimate.shutil, "disk_usage", lambda _: usage)
    assert sweep_estimate.words(found, Path("runs")) == expected
