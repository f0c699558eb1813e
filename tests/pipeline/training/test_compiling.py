"""Folded and compiled networks: one step's losses are those of the networks as they are, within stated rounding."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.journal import NullJournal
from pipeline.training.compiling import LONG, check_device, compile_seconds, compiles
from pipeline.training.evaluation import outputs
from pipeline.training.loop import Loop
from pipeline.training.methods.asib.task import AsibDistillation as Distillation
from pipeline.training.objective import Moment
from pipeline.training.optim import Precision
from tests.pipeline.training.builders import CPU, config, distillation, image_data

pytestmark = pytest.mark.step  # the compiler takes seconds

ROUNDING = 1e-5
"""Relative tolerance of a float32 loss after sums in another order; measured: below 1e-6."""
GPU_ROUNDING = 1e-3
"""The same after updates on a GPU, whose kernels differ more; a bound, not measured yet."""
METHOD = {"feat_kd_alpha": 0.3, "hybrid_beta": 0.2, "cutmix_alpha_distill": 1.0}


def step_losses(task: Distillation) -> list[float]:
    """Loss and norm of its gradient, of the first batch of the first A- and B-epoch."""
    found: list[float] = []
    for phase in ("a", "b"):
        epoch = next(e for e in task.plan if e.phase == phase)
        task.monitor.gate_open = True
        task.begin_epoch(epoch)
        objective = task.phases[phase].objective
        objective.train()
        batch = next(iter(task.batches.epoch(task.draws(epoch))))
        loss = objective(batch, Moment(phase, epoch.in_phase, 0), 0)["loss"]
        task.phases[phase].optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grads = [p.grad for p in objective.trainable_module.parameters() if p.grad is not None]
        found += [loss.item(), float(torch.nn.utils.get_total_norm(grads))]
    return found


def test_folded_teachers_give_the_losses_of_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[..., object] = lambda net, size: net  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.training.student.folded", plain)
        expected = step_losses(distillation(config(method=METHOD)))
    task = distillation(config(method=METHOD))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for teacher in task.teachers for m in teacher.modules())
    assert step_losses(task) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.slow
def test_compiled_networks_give_the_losses_of_eager_ones() -> None:
    expected = step_losses(distillation(config(method=METHOD, optim={"compile": False})))
    task = distillation(config(method=METHOD, optim={"compile": True}))
    assert task.compiled
    assert step_losses(task) == pytest.approx(expected, rel=ROUNDING)
    assert task.costs.images["student"] == 0, "only training counts"


def test_the_seconds_of_compiling_are_reported_where_something_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced alike, and soon done
    alone: dict[str, Any] = {"method": {"kd_alpha": 0.0, "kd_target": "avg"}, "model": {"teachers": []}}
    begun = time.perf_counter()
    task = distillation(config(**alone, optim={"compile": True}))
    assert 0 < task.results()["cost/compile_seconds"] < time.perf_counter() - begun
    other = distillation(config(**alone, optim={"compile": True}))
    assert other._compiled_before == compile_seconds(), "a process's earlier runs do not count"
    assert "cost/compile_seconds" not in distillation(config(**alone, optim={"compile": False})).results()


def trained(asked: bool | str, device: torch.device) -> tuple[list[float], list[torch.Tensor]]:
    """The losses of the updates of an A- and a B-epoch, and what the student then says of the validation images."""
    sgd = {"optimizer": "sgd", "a_step_optimizer": "sgd"}  # AdamW makes much of gradients near 0
    c = config(method=METHOD, optim={"compile": asked, **sgd})
    task, losses = distillation(c, image_data(96), device=device), []
    loop = Loop(task, NullJournal(), None, {}, Precision(task.optim, device), device)
    for name in ("a", "b"):
        epoch, phase = next(e for e in task.plan if e.phase == name), task.phases[name]
        task.monitor.gate_open = True
        task.begin_epoch(epoch)
        phase.objective.train()
        loop.batch = 0
        losses += [float(sums["loss"] / sums["images"]) for sums in loop._updates(epoch, phase)]
    seen = [outputs(task.student, task.data.eval) for _ in range(2)]
    return losses, [part for out in seen for part in (out.logits, out.feat_2d)]


@pytest.mark.gpu
@pytest.mark.parametrize("asked", [True, "graphs"])
def test_on_a_gpu_updates_are_those_of_eager_networks(asked: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight updates each, the last of another size: graphs are recorded in the second, and replayed from the third."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    gpu = torch.device("cuda", 0)
    expected, found = trained(False, gpu), trained(asked, gpu)
    assert found[0] == pytest.approx(expected[0], rel=GPU_ROUNDING)
    for out, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(out, other, rtol=GPU_ROUNDING, atol=GPU_ROUNDING)
    if asked == "graphs":
        from torch._inductor import cudagraph_trees

        manager = cudagraph_trees.get_manager(gpu.index, create_if_none_exists=False)
        assert manager is not None
        assert any(manager.get_roots()), "nothing was recorded"


def test_cuda_graphs_are_refused_on_a_processor() -> None:
    c = config(optim={"compile": "graphs"})
    with pytest.raises(UserError, match=r"optim\.compile=graphs: .* device=cpu .*optim\.compile=true") as caught:
        distillation(c)
    assert "\n" not in str(caught.value)
    check_device(c, torch.device("cuda", 0))
    check_device(config(optim={"compile": True}), CPU)


@pytest.mark.parametrize(
    ("asked", "device", "epochs", "expected"),
    [("auto", "cpu", 240, False), ("auto", "cuda", LONG, True), ("auto", "cuda", LONG - 1, False),
     (True, "cpu", 1, True), (False, "cuda", 240, False), ("graphs", "cuda", 1, True)],
)  # fmt: skip
def test_auto_compiles_long_runs_on_a_gpu(asked: bool | str, device: str, epochs: int, expected: bool) -> None:
    method = {"num_stages": 1, "student_epochs_per_stage": (epochs,), "teacher_adapt_epochs": 0, "kd_target": "avg"}
    made = config(method=method, optim={"compile": asked})
    assert compiles(made, torch.device(device)) is expected
