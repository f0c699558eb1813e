"""Factor transfer: the student's translation of its map learns the teacher's paraphrase (Kim et al. 2018)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from models.features import FeatureNet, Features
from pipeline.config import ScheduleConfig
from pipeline.data.batches import Batch
from pipeline.training import optim
from pipeline.training.methods.maps import attention, same_size, squared_distance
from pipeline.training.methods.projectors import BatchNorm
from pipeline.training.objective import Moment, Objective, batch_mean
from pipeline.training.phases import Epoch, Phase
from pipeline.training.step import Lesson, Setup, StudentStep
from pipeline.training.student import Distillation, b_epochs_after

SLOPE = 0.1
"""Of the leaky ReLUs."""


def factor_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_hw |q̂_s − q̂_t|, q̂ = mean_c F² flattened, at unit length; (B,) from factors (B, ., ., .).

    The larger factor is average-pooled.
    """
    s, t = same_size(student, teacher)
    return (attention(s, 2) - attention(t, 2)).abs().mean(dim=1)


def _layers(kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], widths: Sequence[int], norm: bool) -> nn.Sequential:
    """A 3×3 convolution of this kind from each width to the next, each with its leaky ReLU."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [kind(before, after, 3, padding=1), *([BatchNorm(after)] if norm else []), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """Compresses the teacher's map (B, C, h, w) to a factor (B, kC, h, w), and reconstructs it from that.

    Without batch normalisation, as published: the reconstruction is compared in the map's own scale.
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.encoder = _layers(nn.Conv2d, (channels, channels, factor, factor), norm=False)
        self.decoder = _layers(nn.ConvTranspose2d, (factor, factor, channels, channels), norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction."""
        y: Tensor = self.decoder(self.encoder(x))
        return y


class Translator(nn.Sequential):
    """The student's map (B, C_s, h, w) as a factor (B, kC, h, w)."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__(*_layers(nn.Conv2d, (channels, channels, factor, factor), norm=True))


class Paraphrase(Objective):
    """The phase before the student's: the paraphraser learns to reconstruct the teacher's last map."""

    def __init__(self, paraphraser: Paraphraser, teacher: FeatureNet, device: torch.device) -> None:
        super().__init__(paraphraser, [teacher], device)
        self._teacher = (teacher,)

    def forward(self, batch: Batch, moment: Moment, repeat: int = 0) -> dict[str, Tensor]:
        (teacher,) = self._teacher
        with torch.no_grad():
            seen = teacher(batch.x)
        with torch.autocast(self.device.type, enabled=False):
            x = seen.maps[-1].float()
            loss = batch_mean(squared_distance(self.trainable_module(x), x), batch)
        return {"loss": loss, "output": seen.logits}


class Ft(StudentStep):
    """Acts on the last stage; the translator is trained with the student, the paraphraser before it."""

    def __init__(self, setup: Setup) -> None:
        channels = setup.teacher_maps[0][-1][0]
        method: Any = setup.method
        factor = max(1, int(channels * method.paraphraser_ratio))
        paraphraser = Paraphraser(channels, factor).to(setup.device)
        super().__init__(setup, frozen=[paraphraser])
        self._paraphraser = (paraphraser,)  # a tuple: not registered, for it is not trained here
        self.own["translator"] = Translator(setup.student_maps[-1][0], factor)

    @property
    def paraphraser(self) -> Paraphraser:
        return self._paraphraser[0]

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        return {"factor": self.paraphraser.encoder(seen[0].maps[-1])}

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"ft": factor_distance(self.own["translator"](student.maps[-1]), lesson["factor"])}


class FactorTransfer(Distillation):
    """The paraphraser's epochs, then the student's."""

    b_step: Ft

    def make_plan(self) -> list[Epoch]:
        n = self.method.a_epochs
        return b_epochs_after([Epoch("paraphrase", 0, i, i, i, i == 0, i == n - 1) for i in range(n)], self.method)

    def own_phases(self) -> dict[str, Phase]:
        m, o = self.method, self.optim
        if m.a_epochs == 0:
            return {}
        objective = Paraphrase(self.b_step.paraphraser, self.teachers[0], self.device)
        groups = [(objective.trainable_module, m.paraphraser_lr)]
        optimizer = optim.optimizer(o.optimizer, groups, o.student_weight_decay, o.momentum)
        constant = optim.lr_schedule(optimizer, ScheduleConfig(type="step"), m.a_epochs, len(self.batches))
        return {"paraphrase": Phase("paraphraser", objective, optimizer, constant)}

    def own_networks(self) -> dict[str, nn.Module]:
        if not self.teachers:
            return {}
        parts = {"paraphraser": self.b_step.paraphraser.encoder, "reconstruction": self.b_step.paraphraser.decoder}
        return super().own_networks() | parts

    def trained_in(self, phase: str) -> list[str]:
        return ["paraphraser", "reconstruction"] if phase == "paraphrase" else ["student", "translator"]

    def own_state(self) -> dict[str, Any]:
        state = super().own_state()
        return state | ({"paraphraser": self.b_step.paraphraser.state_dict()} if self.teachers else {})

    def load_own_state(self, state: dict[str, Any]) -> None:
        super().load_own_state(state)
        if self.teachers:
            self.b_step.paraphraser.load_state_dict(state["paraphraser"])
