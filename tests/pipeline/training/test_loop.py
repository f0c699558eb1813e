"""The loop: updates, non-finite steps, clipping, precision, the order of a checkpoint and the entries it covers."""

import threading
import time
from collections.abc import Mapping
from concurrent.futures import wait
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import OptimConfig
from pipeline.errors import Interrupted, NonFinite, Pruned, Taken, UserError
from pipeline.training import checkpoint, optim
from pipeline.training.checkpoint import Slots, unpack
from pipeline.training.loop import Verdict, add
from pipeline.training.optim import Precision, restore_optimizer, update
from pipeline.training.phases import Phase
from tests.pipeline.training.builders import (
    CPU,
    HeldUp,
    Record,
    config,
    differences,
    distillation,
    fine_tuning,
    loop_for,
    run_until,
)

NAN, INF = float("nan"), float("inf")


def phase_for(
    name: str = "sgd", lr: float = 0.1, momentum: float = 0.9, decay: float = 0.05
) -> tuple[nn.Linear, Phase]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
    optimizer = optim.optimizer(name, [(module, lr)], decay, momentum)
    return module, Phase("x", None, optimizer, None)  # type: ignore[arg-type]


def precision(**keys: Any) -> Precision:
    return Precision(OptimConfig(**keys), CPU)


X = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.2, -1.0]])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["loss", "gradient", "infinite"])
@pytest.mark.parametrize("amp", [None, "float16"])
def test_a_non_finite_update_changes_neither_weights_nor_moments(
    name: str, clip: float, kind: str, amp: str | None
) -> None:
    runs = []
    for poison in (False, True):
        module, phase = phase_for(name)
        phase.clip = clip
        exact = precision(use_amp=amp is not None, amp_dtype=amp or "bfloat16", grad_scaler_init_scale=8.0)
        skipped = []
        for step in range(4):
            loss = module(X).square().mean()
            if step in (0, 2):
                if not poison:
                    continue
                if kind == "gradient":
                    loss = loss + _nan_gradient(module.weight)
                else:
                    loss = loss * (NAN if kind == "loss" else INF)
            skipped.append(bool(update(phase, loss, exact)))
        runs.append(([p.detach().clone() for p in module.parameters()], phase.optimizer.state_dict()["state"]))
        assert skipped == ([True, False, True, False] if poison else [False, False])
    assert differences(runs[0], runs[1]) == []


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: torch.Tensor) -> torch.Tensor:
        ctx.shape = w.shape
        return w.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.full(ctx.shape, NAN)


def _nan_gradient(w: torch.Tensor) -> torch.Tensor:
    return _NanGradient.apply(w)


@pytest.mark.parametrize("clip", [0.0, 0.1, 100.0])
@pytest.mark.parametrize("amp", [None, "float16"])
def test_gradients_are_clipped_to_the_norm(clip: float, amp: str | None) -> None:
    module, phase = phase_for(momentum=0.0, decay=0.0)
    before = [p.detach().clone() for p in module.parameters()]
    grads = torch.autograd.grad(module(X).square().sum(), list(module.parameters()))
    norm = sum(float(g.double().square().sum()) for g in grads) ** 0.5
    factor = min(1.0, clip / norm) if clip else 1.0
    exact = precision(use_amp=amp is not None, amp_dtype=amp or "bfloat16", grad_scaler_init_scale=64.0)
    phase.clip = clip
    update(phase, module(X).square().sum(), exact)
    for p, w, g in zip(module.parameters(), before, grads, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * factor * g, rtol=1e-4, atol=1e-6)


def test_the_gradient_scaler_halves_its_scale_when_it_overflows() -> None:
    module, phase = phase_for()
    exact = precision(use_amp=True, amp_dtype="float16", grad_scaler_init_scale=16.0)
    assert exact.scaler is not None
    update(phase, module(X).sum() * INF, exact)
    assert exact.scaler.get_scale() == 8.0


class Poison:
    """Makes the loss of some batches (phase, epoch, batch) non-finite; the network's own pass is untouched."""

    def __init__(self, task: Any, phase: str, *where: tuple[int, int]) -> None:
        objective = task.phases[phase].objective
        forward = objective.forward

        def poisoned(batch: Any, moment: Any, repeat: int = 0) -> dict[str, torch.Tensor]:
            out = forward(batch, moment, repeat)
            if (moment.epoch, moment.batch) in where:
                self.index = batch.index
                out["loss"] = out["loss"] * NAN
            return out

        objective.forward = poisoned


def test_a_non_finite_step_is_skipped_counted_and_named_in_the_metrics(tmp_path: Path) -> None:
    task, record = fine_tuning(config(optim={"safe_retry_patience": 3})), Record()
    network: Any = task.net.net
    Poison(task, "finetune", (0, 1), (0, 2), (1, 0), (1, 3), (2, 0))  # never three in a row
    weights = [network.fc.weight.detach().clone()]
    task.phases["finetune"].optimizer.register_step_post_hook(
        lambda *_: weights.append(network.fc.weight.detach().clone())
    )
    loop_for(task, tmp_path, record).run()
    assert record.series("train/nonfinite_steps") == [2.0, 2.0, 1.0]
    assert [n for n, (a, b) in enumerate(pairwise(weights)) if torch.equal(a, b)] == [1, 2, 4, 7, 8]


def test_too_many_in_a_row_end_the_run_with_step_terms_and_images(tmp_path: Path) -> None:
    """The row may cross the end of an epoch: batches 3 of epoch 1 and 1, 2 of epoch 2."""
    task = fine_tuning(config(optim={"safe_retry_patience": 3}))
    poison = Poison(task, "finetune", (0, 3), (1, 0), (1, 1), (1, 2))
    with pytest.raises(NonFinite) as caught:
        loop_for(task, tmp_path).run()
    text = str(caught.value)
    assert text.startswith("3 non-finite steps in a row at finetune-epoch 2, batch 2: loss=nan")
    assert str(poison.index[:8].tolist()) in text


def test_the_row_goes_on_in_a_continued_run(tmp_path: Path) -> None:
    task = fine_tuning(config(optim={"safe_retry_patience": 3}))
    Poison(task, "finetune", (0, 2), (0, 3))
    run_until(task, tmp_path, (1, 0))
    again = fine_tuning(config(optim={"safe_retry_patience": 3}))
    Poison(again, "finetune", (1, 0))
    loop = loop_for(again, tmp_path)
    loop.load_state_dict(Slots(tmp_path).read()[0])
    with pytest.raises(NonFinite, match="3 non-finite steps in a row at finetune-epoch 2, batch 1"):
        loop.run()


def test_a_step_terms_are_named_too(tmp_path: Path) -> None:
    task = distillation(config(optim={"safe_retry_patience": 1}))
    Poison(task, "a", (1, 2))
    with pytest.raises(NonFinite, match=r"at a-epoch 2, batch 3: loss=nan, ce=[\d.]+, kd=[\d.]+, ib="):
        loop_for(task, tmp_path).run()


def test_means_are_over_images_and_not_over_batches(tmp_path: Path) -> None:
    """36 training images in batches of 10, 10, 10 and 6: with a learning rate of almost 0 nothing else moves."""
    still = {"optimizer": "sgd", "lr": 1e-30, "weight_decay": 0.0, "schedule": {"min_lr": 0.0}}
    c = config(finetune={"epochs": 1, **still})
    task, record = fine_tuning(c, drop=0.0), Record()
    total = 0.0
    reference = fine_tuning(c, drop=0.0)
    with torch.no_grad():
        for batch in reference.batches.epoch(reference.draws(reference.plan[0])):
            logits = reference.net.train()(batch.x).logits.double()
            total += float(-logits.log_softmax(1).gather(1, batch.y[:, None]).sum())
    loop_for(task, tmp_path, record).run()
    assert record.series("finetune/loss") == pytest.approx([total / 36], rel=1e-6)


def test_sums_are_kept_in_double_precision() -> None:
    sums: dict[str, torch.Tensor] = {}
    for _ in range(1000):
        add(sums, {"x": torch.tensor(1e-3, dtype=torch.float32), "y": torch.tensor(1e6)})
    assert sums["x"].item() == pytest.approx(float(torch.tensor(1e-3)) * 1000, rel=1e-12)


def test_entries_wait_for_the_checkpoint_that_contains_them(tmp_path: Path) -> None:
    record = Record()
    loop = loop_for(fine_tuning(config(finetune={"epochs": 2})), tmp_path, record)
    loop.run()
    loop.finish({"final/acc_last": 1.0})
    assert record.order == ["hold", *["metrics", "snapshot", "checkpoint"] * 3, "release"]
    state = Slots(tmp_path).read()[0]
    assert state["finished"] is True
    assert state["journal"] == "text"
    record.order.clear()
    again = loop_for(fine_tuning(config(finetune={"epochs": 2})), tmp_path, record)
    again.load_state_dict(state)
    again.run()
    again.finish({"final/acc_last": 1.0})
    assert record.order == ["hold", "release"], "final metrics are not logged twice"


def test_long_epochs_have_checkpoints_within(tmp_path: Path) -> None:
    record = Record()
    loop = loop_for(fine_tuning(config(finetune={"epochs": 1})), tmp_path, record, every_seconds=0.0)
    positions: list[tuple[int, int]] = []
    record.snapshot = lambda: positions.append((loop.epoch, loop.batch)) or "text"  # type: ignore[method-assign, func-returns-value]
    loop.run()
    assert positions == [(0, 1), (0, 2), (0, 3), (1, 0)]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches an epoch: the file comes in the second one's, the record's entry when the file is there."""
    record, held_up = Record(), HeldUp(monkeypatch)
    loop = loop_for(fine_tuning(config(finetune={"epochs": 2})), tmp_path, record)
    states: list[Any] = []
    seen: dict[tuple[int, int], list[str]] = {}

    def snapshot() -> str:
        states.append(deepcopy(loop.state_dict()) | {"journal": "text"})
        return Record.snapshot(record)

    def look() -> int:
        seen[loop.epoch, loop.batch] = list(record.order)
        if (loop.epoch, loop.batch) == (1, 2):
            assert not Slots(tmp_path).manifest.exists()
            held_up.go.set()
            wait([loop.slots._pending])  # type: ignore[union-attr, list-item]
        return 0

    record.snapshot, loop.stop = snapshot, look  # type: ignore[method-assign]
    loop.run()
    assert seen[1, 2] == ["hold", "metrics", "snapshot"]
    assert seen[1, 3] == ["hold", "metrics", "snapshot", "checkpoint"]
    assert record.order == ["hold", *["metrics", "snapshot", "checkpoint"] * 2]
    for slot, state in enumerate(states):
        assert differences(unpack((tmp_path / f"slot{slot}.safetensors").read_bytes()), state) == []


class Sees:
    """A watch that says the same of every epoch."""

    reason = "it has seen enough"

    def __init__(self, verdict: Verdict) -> None:
        self._verdict = verdict

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> Verdict:
        return self._verdict if epoch == 1 else Verdict.GO_ON

    def still_ours(self) -> bool:
        return True


@pytest.mark.parametrize("reason", [NonFinite, Interrupted, Pruned, Taken, ZeroDivisionError])
def test_nobody_leaves_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: type[BaseException]
) -> None:
    record, held_up = Record(), HeldUp(monkeypatch)
    task = fine_tuning(config(optim={"safe_retry_patience": 1}))
    if reason is NonFinite:
        Poison(task, "finetune", (1, 1))
    verdicts: dict[type[BaseException], Verdict] = {Pruned: Verdict.PRUNE, Taken: Verdict.LEAVE}
    watch = Sees(verdicts.get(reason, Verdict.GO_ON))
    loop = loop_for(task, tmp_path, record, watch=watch)

    def stop() -> int:
        if (loop.epoch, loop.batch) == (1, 1):
            threading.Timer(0.2, held_up.go.set).start()  # not before the next batch
            if reason is ZeroDivisionError:
                raise ZeroDivisionError
            return 15 if reason is Interrupted else 0
        return 0

    loop.stop = stop
    with pytest.raises(reason):
        loop.run()
    epochs, batches = {Interrupted: (1, 1), Pruned: (2, 0)}.get(reason, (1, 0))
    assert Slots(tmp_path).read()[0]["position"] == {"epoch": epochs, "batch": batches, "streak": 0}
    # a record that another worker has taken over is left alone
    assert record.order[-1] == ("snapshot" if reason is Taken else "checkpoint")
    assert record.order.count("snapshot") == record.order.count("checkpoint") + (reason is Taken)


@pytest.mark.parametrize("signum", [0, 15])
def test_a_full_disk_ends_training_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int) -> None:
    """A signal does not hide it: what it promises, a checkpoint, is not there."""

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    record = Record()
    loop = loop_for(fine_tuning(config()), tmp_path, record, stop=lambda: signum if loop.epoch else 0)
    with pytest.raises(UserError, match=r"No space left.*output_dir") as caught:
        loop.run()
    assert "\n" not in str(caught.value)
    assert loop.epoch in (1, 2), "it is said in the epoch after, at its end at the latest"
    assert record.order == ["hold", "metrics", "snapshot"]
    assert list(tmp_path.iterdir()) == []


def test_the_last_checkpoint_is_there_when_the_run_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loop_for(fine_tuning(config(finetune={"epochs": 1})), tmp_path)
    loop.run()
    threading.Timer(0.2, HeldUp(monkeypatch).go.set).start()
    loop.finish({"final/acc_last": 1.0})
    assert Slots(tmp_path).read()[0]["finished"] is True


def test_without_slots_nothing_is_written(tmp_path: Path) -> None:
    record = Record()
    loop = loop_for(fine_tuning(config(finetune={"epochs": 1})), tmp_path / "none", record)
    loop.slots = None
    loop.run()
    assert record.order == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_restored_moments_have_the_memory_format_of_their_parameters(name: str) -> None:
    """A checkpoint is contiguous, weights are channels-last: fused kernels would pair values of different positions."""

    def conv() -> nn.Conv2d:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    def stepped(module: nn.Conv2d, *steps: int, state: Any = None) -> tuple[nn.Conv2d, Any]:
        optimizer = optim.optimizer(name, [(module, 0.1)], 0.0, 0.9)
        if state is not None:
            restore_optimizer(optimizer, state)
        for n in steps:
            generator = torch.Generator().manual_seed(n)
            optimizer.zero_grad()
            (module.weight * torch.randn(module.weight.shape, generator=generator)).sum().backward()
            optimizer.step()
        return module, optimizer.state_dict()

    straight, _ = stepped(conv(), 0, 1, 2, 3)
    first, state = stepped(conv(), 0, 1)
    for moments in state["state"].values():
        moments |= {n: v.contiguous() for n, v in moments.items() if isinstance(v, torch.Tensor)}
    second = conv()
    second.load_state_dict(first.state_dict())
    stepped(second, 2, 3, state=state)
    assert torch.equal(second.weight, straight.weight)


def test_images_per_second_is_logged(tmp_path: Path) -> None:
    found: list[float] = []
    record = Record()
    record.metrics = lambda values, step: found.append(values["train/images_per_second"])  # type: ignore[method-assign]
    start = time.perf_counter()
    loop_for(fine_tuning(config(finetune={"epochs": 1})), tmp_path, record).run()
    assert found[0] >= 36 / (time.perf_counter() - start)
