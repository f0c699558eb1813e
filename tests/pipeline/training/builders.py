"""Small things that the tests of training are made of: data, networks, configurations, a record in memory."""

import math
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features import FeatureNet
from pipeline.config import Config, configure
from pipeline.data.batches import Batch
from pipeline.data.sources import ImageData
from pipeline.errors import Interrupted
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Slots
from pipeline.training.finetune import FineTuning
from pipeline.training.loop import Loop
from pipeline.training.methods.asib.task import AsibDistillation as Distillation
from pipeline.training.optim import Precision
from pipeline.training.run_data import Task

CPU = torch.device("cpu")
CLASSES = 4


class TinyNet(nn.Module):
    """Convolution, norm, ReLU, pooling, classifier: timm's interface and nothing else."""

    def __init__(self, width: int = 6, norm: str = "batch", classes: int = CLASSES, drop: float = 0.0) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.drop = classes, width, drop
        self.conv = nn.Conv2d(3, width, 3, padding=1, stride=2)
        self.norm: nn.Module = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(1, width)
        self.fc = nn.Linear(width, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.dropout(x.mean((2, 3)), self.drop, self.training)
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class StagedNet(TinyNet):
    """A TinyNet with two blocks before its pooling, which it declares as timm's networks do: it can be frozen."""

    def __init__(self, width: int = 6, norm: str = "batch", classes: int = CLASSES, drop: float = 0.0) -> None:
        super().__init__(width, norm, classes, drop)
        norms = [nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(1, width) for _ in range(2)]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), n) for n in norms)

    def forward_features(self, x: Tensor) -> Tensor:
        x = super().forward_features(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return x

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv|^norm", "blocks": r"^blocks\.(\d+)"}


def net(
    width: int,
    seed: int,
    norm: str = "batch",
    drop: float = 0.0,
    adapter: int | None = None,
    staged: bool = False,
    classes: int = CLASSES,
) -> FeatureNet:
    """A network with its own weights and running statistics that are not the initial ones."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed writes traces of the stack
        tiny: Any = (StagedNet if staged else TinyNet)(width, norm, classes, drop)
        made = FeatureNet(tiny, adapter)
        tiny.fc.weight.data.mul_(4)
        if norm == "batch":
            tiny.norm.running_mean.normal_(std=0.3)
            tiny.norm.running_var.uniform_(0.5, 2)
    return made.to(memory_format=torch.channels_last)


def networks(norm: str = "batch", seed: int = 0, drop: float = 0.0) -> tuple[FeatureNet, list[FeatureNet]]:
    """A student and two teachers of other widths."""
    return net(6, seed, norm, drop), [net(5, 100, norm), net(7, 101, norm)]


def image_data(n: int = 48, n_test: int = 24, size: int = 8, seed: int = 0, classes: int = CLASSES) -> ImageData:
    """Noise around one random picture per class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand((classes, 3, size, size), generator=generator) * 160

    def draw(count: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(count) % classes
        noise = torch.rand((count, 3, size, size), generator=generator) * 95
        return (centres[y] + noise).to(torch.uint8), y

    (x, y), (tx, ty) = draw(n), draw(n_test)
    mean, std = (0.5, 0.4, 0.45), (0.25, 0.2, 0.3)
    return ImageData("toy", x, y, tx, ty, tuple("abcd"[:classes]), mean, std, f"digest-{seed}-{n}", "nowhere")


def config(**sections: Any) -> Config:
    """A small run: two stages of 2 A- and 2 B-epochs, synergy targets; `method={...}` and so on replace keys."""
    base: dict[str, dict[str, Any]] = {
        "dataset": {"batch_size": 10, "eval_batch_size": 7, "val_fraction": 0.25},
        "model": {"teachers": [{"name": "cifar_resnet8"}, {"name": "cifar_resnet14"}]},
        "method": {
            "num_stages": 2,
            "student_epochs_per_stage": (2, 2),
            "teacher_adapt_epochs": 2,
            "kd_alpha": 0.4,
            "ce_alpha": 0.7,
            "kd_target": "synergy",
            "ib_mbm_out_dim": 8,
            "ib_mbm_n_head": 2,
            "distill_out_dim": 8,
            "ib_mbm_logvar_clip": 4.0,
            "synergy_head_dropout": 0.1,
            "label_smoothing": 0.05,
            "ce_label_smoothing": 0.05,
        },
        "optim": {"a_step_lr": 1e-2, "student_lr": 1e-2},
        "schedule": {},
        "finetune": {"epochs": 3, "lr": 1e-2},
        "augment": {},
    }
    top = {k: v for k, v in sections.items() if not isinstance(v, dict)}
    merged = {k: {**base.get(k, {}), **sections.get(k, {})} for k in {*base, *sections} - set(top)}
    return configure({**merged, **top, "device": "cpu"})


TUNED = {"use_teacher_finetuning": True, "teacher_ce_alpha": 0.5}
LEVELS = {"use_partial_freeze": True, "num_stages": 4, "student_epochs_per_stage": (1, 1, 1, 1)}
ONE_STAGE: dict[str, Any] = {"num_stages": 1, "student_epochs_per_stage": (1,), "teacher_adapt_epochs": 1}
"""Keys of `method` for the shortest run: an A-epoch and a B-epoch."""
EVERYTHING: dict[str, Any] = {
    "use_teacher_finetuning": True,
    "teacher_ce_alpha": 0.5,
    "kd_target": "auto",
    "kd_ens_alpha": 0.25,
    "enable_kd_after_syn_acc": "avg-0.6",
    "use_cccp": True,
    "cccp_nt": 2,
    "feat_kd_alpha": 0.05,
    "hybrid_beta": 0.1,
    "kd_sample_gate": True,
    "kd_uncertainty_weight": 0.5,
    "use_disagree_weight": True,
    "disagree_lambda_high": 2.0,
    "kd_max_ratio": 1.75,
    "use_loss_clamp": True,
    "loss_clamp_max": 20,
    "use_partial_freeze": True,
    "student_freeze_schedule": (-1, 1),
    "kd_two_view_start_epoch": 1,
    "kd_two_view_stop_epoch": 3,
    "cutmix_alpha_distill": 1.0,
    "use_mu_for_kd": False,
}
"""Keys of `method` for a run of two stages in which every part of it acts."""


def distillation(
    c: Config,
    data: ImageData | None = None,
    norm: str = "batch",
    seed: int = 0,
    device: torch.device = CPU,
    **given: Any,
) -> Distillation:
    """The task of `c`, with as many teachers; what it freezes has blocks, what its features need has an adapter."""
    data, m = data or image_data(), c.method
    adapts = m.feat_kd_alpha > 0 and m.feat_kd_key == "distill_feat"
    adapter = m.distill_out_dim if adapts else None
    more: dict[str, Any] = {"staged": m.use_partial_freeze, "classes": data.num_classes}
    widths = (5, 7, 4)[: len(c.model.teachers)]
    teachers = [net(width, 100 + k, norm, **more).to(device) for k, width in enumerate(widths)]
    return Distillation(c, data, net(6, seed, norm, adapter=adapter, **more).to(device), teachers, device, **given)


def fine_tuning(c: Config, data: ImageData | None = None, seed: int = 0, drop: float = 0.2) -> FineTuning:
    return FineTuning(c, data or image_data(), net(6, seed, drop=drop), CPU)


class Record:
    """A run's record in memory."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.order: list[str] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        timing = ("train/images_per_second", "cost/seconds", "cost/device_hours", "cost/compile_seconds")
        self.rows.append((step, {k: v for k, v in values.items() if k not in timing}))
        self.order.append("metrics")

    def snapshot(self) -> str:
        self.order.append("snapshot")
        return "text"

    def checkpoint(self, path: Path, sha256: str, slot: int) -> None:
        self.order.append("checkpoint")

    def hold(self) -> None:
        self.order.append("hold")

    def release(self) -> None:
        self.order.append("release")

    def series(self, name: str) -> list[float]:
        return [values[name] for _, values in self.rows if name in values]


def loop_for(
    task: Task, folder: Path, record: Record | None = None, stop: Callable[[], int] = lambda: 0, **more: Any
) -> Loop:
    precision = Precision(task.optim, CPU)
    folder.parent.mkdir(parents=True, exist_ok=True)  # a run's folder is there before its checkpoints
    recorder: Any = record or Record()
    return Loop(task, recorder, Slots(folder), {"test": True}, precision, CPU, stop=stop, **more)


def first_batch(task: Distillation, phase: str = "b", number: int = 0) -> Batch:
    """A real batch of the first epoch of a phase."""
    epoch = next(e for e in task.plan if e.phase == phase)
    return list(task.epoch_batches(epoch, 0))[number]


def double(module: Any) -> Any:
    """A float64 copy, in the same mode; None of None."""
    return None if module is None else deepcopy(module).double()


def copied(module: nn.Module) -> dict[str, Tensor]:
    """A module's state now."""
    return {k: v.clone() for k, v in module.state_dict().items()}


def moved(module: Any, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of a module's state that are not what they were before."""
    return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two trees of state differ, bit for bit (NaN equals NaN)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7e33), b.nan_to_num(7e33))
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        timing = (
            "costs/seconds",
            "cost/seconds",
            "cost/device_hours",
            "cost/compile_seconds",
        )  # how long it took is no result
        compared = [k for k in a if not f"{path}/{k}".endswith(timing)]
        return [d for k in compared for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    same = a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))
    return [] if same else [f"{path}: {a!r} and {b!r}"]


# what formulas say, by loops over plain numbers ---------------------------------------------------------------------


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    top = max(row)
    e = [math.exp((v - top) / tau) for v in row]
    return [v / sum(e) for v in e]


def ce(row: list[float], label: int, eps: float = 0.0) -> float:
    top = max(row)
    log_z = top + math.log(sum(math.exp(v - top) for v in row))
    n = len(row)
    return sum(((1 - eps) * (i == label) + eps / n) * (log_z - v) for i, v in enumerate(row))


def kl(p: list[float], row: list[float], tau: float) -> float:
    """tau^2 KL(p || softmax(row / tau))."""
    top = max(row)
    log_z = top / tau + math.log(sum(math.exp((v - top) / tau) for v in row))
    return tau**2 * sum(a * (math.log(a) - (v / tau - log_z)) for a, v in zip(p, row, strict=True) if a > 0)


# driving runs --------------------------------------------------------------------------------------------------------


class Calls:
    """Counts a network's forward passes: (in training mode, with gradient, images)."""

    def __init__(self, module: nn.Module) -> None:
        self.seen: list[tuple[bool, bool, int]] = []
        module.register_forward_hook(
            lambda m, args, out: self.seen.append((m.training, torch.is_grad_enabled(), len(args[0])))
        )

    def __len__(self) -> int:
        return len(self.seen)


class HeldUp:
    """Stands where checkpoint files are written, and waits with each for `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self._real = threading.Event(), checkpoint.write_atomically
        monkeypatch.setattr(checkpoint, "write_atomically", self)

    def __call__(self, path: Path, content: bytes) -> None:
        assert self.go.wait(60)
        self._real(path, content)


def run_until(task: Task, folder: Path, at: tuple[int, int], record: Record | None = None, state: Any = None) -> Loop:
    """Run to epoch and batch `at` of the plan, where a signal arrives."""
    loop = loop_for(task, folder, record, stop=lambda: 15 if (loop.epoch, loop.batch) >= at else 0)
    if state is not None:
        loop.load_state_dict(state)
    with pytest.raises(Interrupted) as caught:
        loop.run()
    assert caught.value.signum == 15
    return loop
