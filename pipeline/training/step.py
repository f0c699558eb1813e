"""The student's step, which all methods share: cross-entropy and, weighted, what a method adds (docs/method.md 3).

A method subclasses `StudentStep` in a file of methods/, and says there what is taught and how far the student is from
it. Everything else is here, once: both labels of mixed images, the weight w(b), bounds, samples' weights, precision.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features import FeatureNet, Features
from pipeline.config import MethodConfig
from pipeline.config.methods.base import RESERVED
from pipeline.data.batches import Batch, Known, Seen
from pipeline.errors import UserError
from pipeline.training import distributed, losses, samples
from pipeline.training.objective import Moment, Objective, batch_mean, mixed_cross_entropy, teacher_outputs
from pipeline.training.rng import Streams
from pipeline.training.run_data import RunData

Penalty = Callable[[nn.Module], Tensor]
"""A term of the loss, already weighted, that depends on the student's weights alone: a scalar."""
TEACHER_WEIGHT = "teacher_weight_"
Lesson = dict[str, Tensor]
"""What is taught about n images: name -> (n, ...)."""


@dataclass(frozen=True)
class Setup:
    """What a method's step is made with."""

    student: FeatureNet
    teachers: list[FeatureNet]
    """Frozen, in eval mode."""
    method: MethodConfig
    """The method's settings; each method's step has its own kind."""
    streams: Streams
    device: torch.device
    num_classes: int
    data: RunData
    student_maps: list[tuple[int, int, int]] = field(default_factory=list)
    """(C, h, w) of the paired stages' maps, first to last; empty for methods that need none."""
    teacher_maps: list[list[tuple[int, int, int]]] = field(default_factory=list)
    """The same for each teacher, as many as the student's."""
    penalties: Mapping[str, Penalty] = field(default_factory=dict)
    """By their names in metrics."""
    first_class: int = 0
    """Cross-entropy tells apart the classes from this one on."""


@dataclass(frozen=True)
class Weights:
    """The weights of one B-epoch."""

    scale: float
    """w(b), on everything that is distilled; 0: teachers are not run."""
    ratio: float | None = None
    """Bound of the distilled terms relative to cross-entropy; None: not bounded."""
    bound: float | None = None
    """Bound of the total loss; None: not clamped."""


class StudentStep(Objective):
    """Trains the student; teachers are frozen, in eval mode, without gradient.

    `repeat` counts several updates on one batch: the lesson is made in the first and reused by the others.
    """

    of_lessons: tuple[str, ...] = (TEACHER_WEIGHT,)
    """Beginnings of the names of readings: no part of the loss, and 0 for samples that are not distilled."""

    def __init__(self, setup: Setup, frozen: Sequence[torch.nn.Module] = ()) -> None:
        super().__init__(setup.student, [*setup.teachers, *frozen], setup.device)
        self._student, self._teachers = (setup.student,), tuple(setup.teachers)
        self.method: Any = setup.method
        self.streams = setup.streams
        self.weights: Any = Weights(0.0)
        self._penalties = setup.penalties
        self._first_class = setup.first_class
        self._held: tuple[Lesson, Tensor] | None = None
        self.weighed: Tensor | None = None
        """What `terms` weighed the teachers with, (K,) or (b, K), detached, to be logged; None: it did not."""

    # what a method says ----------------------------------------------------------------------------------------------

    def lesson(self, seen: Sequence[Any], y: Tensor) -> Lesson:
        """What is taught about n images, without gradient; made once per batch.

        Args:
            seen: each teacher's `Features` of the images, or what the bank kept of them (logits and feat_2d).
            y: (n,), the labels.
        """
        raise NotImplementedError

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """The method's terms before weighting, float32: each one value per sample, (b,), or a scalar."""
        raise NotImplementedError

    def term_weights(self) -> dict[str, float]:
        """The weight of each term, as the settings declare it."""
        weights: dict[str, float] = self.method.term_weights
        return weights

    def compared(self, logits: Tensor) -> Tensor:
        """Logits as they are compared: standardised if the method's settings say so."""
        return losses.standardised(logits) if self.method.standardise else logits.float()

    # teaching --------------------------------------------------------------------------------------------------------

    def begin_epoch(self, weights: Any) -> None:
        self.weights = weights

    @torch.no_grad()
    def _chosen(self, logits: Tensor, batch: Batch) -> Tensor:
        """Rows (n,) of the global batch that are distilled."""
        m = self.method
        if not m.kd_sample_gate:
            return torch.arange(batch.global_size, device=logits.device)
        confidence = F.softmax(logits.float(), dim=1).amax(dim=1)
        everyone = distributed.gather_rows(confidence, batch.rows, batch.global_size)
        return samples.select(everyone, m.kd_sample_thr, m.kd_sample_min_ratio, m.kd_sample_max_ratio)

    @torch.no_grad()
    def teach(self, batch: Batch, seen_logits: Tensor, seen_query: Tensor, moment: Moment) -> tuple[Lesson, Tensor]:
        """The lesson for this process's rows, mixed as the images are, and (b,) 1 for samples that are distilled.

        Teachers run only on the distilled samples and the mix partners that those need.
        """
        m, size, start = self.method, batch.global_size, batch.rows.start
        clean_mix = batch.partner is not None and m.kd_view == "clean"
        if not m.kd_sample_gate and not clean_mix:  # every process teaches its own rows
            return self._lesson_of(None, batch, seen_query, moment), torch.ones(len(batch.y), device=self.device)
        chosen = self._chosen(seen_logits, batch)
        needed = chosen
        if m.kd_sample_gate and batch.partner is not None and clean_mix:
            partners = distributed.gather_rows(batch.partner, batch.rows, size)
            needed = torch.cat([chosen, partners[chosen]]).unique()
        stop = start + len(batch.y)
        own = needed[(needed >= start) & (needed < stop)] - start
        lesson = self._lesson_of(None if len(own) == len(batch.y) else own, batch, seen_query, moment)
        # sorted: the order of collective calls
        everyone = {k: distributed.gather_rows(lesson[k].float(), own + start, size) for k in sorted(lesson)}
        mine = {name: value[start:stop] for name, value in everyone.items()}
        distilled = torch.zeros(size, device=self.device)
        distilled[chosen] = size / max(len(chosen), 1) if m.kd_sample_reweight else 1.0
        if not clean_mix:
            return mine, distilled[start:stop]
        assert batch.partner is not None
        return self._mix(mine, {k: v[batch.partner] for k, v in everyone.items()}, batch.lam), distilled[start:stop]

    def _shown(self, batch: Batch) -> tuple[Tensor, Tensor, bool]:
        """The images (b,C,H,W) that teachers see of a batch, their labels (b,), and whether they are the mixed ones."""
        if batch.partner is None or self.method.kd_view == "clean":
            return batch.x, batch.y, False
        return batch.x_mixed, torch.where(batch.lam >= 0.5, batch.y, batch.y_b), True

    def _lesson_of(self, own: Tensor | None, batch: Batch, seen_query: Tensor, moment: Moment) -> Lesson:
        """The lesson for some of this process's rows; None: for all."""
        x, y, mixed = self._shown(batch)
        if own is None:
            return self._taught(x, y, None if mixed else batch.known, None)
        rows = own if len(own) else torch.zeros(1, dtype=torch.int64, device=self.device)  # no network runs on nothing
        found = self._taught(x[rows], y[rows], None if mixed else batch.known, rows)
        return {name: value[: len(own)] for name, value in found.items()}

    def _taught(self, x: Tensor, y: Tensor, known: Known | None, rows: Tensor | None) -> Lesson:
        m = self.method
        seen: Sequence[Seen | Features]
        seen = [teacher(x) for teacher in self._teachers] if m.maps else teacher_outputs(self._teachers, x, known, rows)
        seen = [whole_precision(s) for s in seen]
        logits = [s.logits for s in seen]
        with torch.autocast(self.device.type, enabled=False):
            lesson = self.lesson(seen, y)
            if taken := sorted(RESERVED & lesson.keys()):
                where = f"method={m.name}: its lesson has a part named {taken[0]}"
                raise UserError(f"{where}, which is a name of the step's own: rename it")
            return lesson | self._beside(logits, y)

    def _beside(self, logits: list[Tensor], y: Tensor) -> Lesson:
        """What the step itself needs of the teachers: the target of `plus`, and weights by disagreement."""
        m, found = self.method, Lesson()
        if m.plus:
            found["plus"] = samples.averaged([self.compared(t) for t in logits], m.averaging_weights, m.plus_tau)
        if m.use_disagree_weight:
            differ = samples.disagrees(logits, y, m.disagree_mode)
            found["weight"] = torch.where(differ, m.disagree_lambda_high, m.disagree_lambda_low)
        return found

    def _mix(self, a: Lesson, b: Lesson, lam: Tensor) -> Lesson:
        """The lesson of mixed samples from those of their two clean views."""
        return {name: lam * value + (1 - lam) * b[name] for name, value in a.items()}

    # the loss --------------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, moment: Moment, repeat: int = 0) -> dict[str, Tensor]:
        m, w = self.method, self.weights
        self.streams.seed_global("network", *moment, repeat, batch.rows.start)
        seen = self.trainable_module(batch.x_mixed)
        ce = mixed_cross_entropy(seen.logits, batch, m.ce_label_smoothing, self._first_class)
        out = {"ce": ce}
        loss = m.ce_alpha * ce
        if w.scale > 0:
            if repeat == 0 or self._held is None:
                self._held = self.teach(batch, seen.logits.detach(), self._query_of(seen).detach(), moment)
            loss = loss + self._distil(seen, *self._held, batch, moment, loss, out)
        for name, penalty in self._penalties.items():
            out[name] = penalty(self._student[0].net)
            loss = loss + out[name]
        if w.bound is not None:
            loss = losses.clamp_loss(loss, w.bound, m.loss_clamp_mode, distributed.mean(loss))
        return {"loss": loss, "output": seen.logits, **out}

    def _query_of(self, seen: Features) -> Tensor:
        """Of the student's training pass, what its lessons depend on."""
        return seen.logits

    def _distil(
        self,
        seen: Features,
        lesson: Lesson,
        distilled: Tensor,
        batch: Batch,
        moment: Moment,
        ce: Tensor,
        out: dict[str, Tensor],
    ) -> Tensor:
        """w(b) times the weighted terms, bounded; the terms also in `out`."""
        w, weights = self.weights, self.term_weights()
        self.weighed = None
        with torch.autocast(self.device.type, enabled=False):
            terms = self.terms(whole_precision(seen), lesson, batch, moment)
        counted = distilled * lesson.get("weight", torch.ones_like(distilled))
        if self.weighed is not None and any(weights.values()):
            taught = (distilled > 0).float()
            for k, weight in enumerate(self.weighed.to(taught).unbind(dim=-1)):
                out[f"{TEACHER_WEIGHT}{k}"] = batch_mean(taught * weight, batch)
        total = torch.zeros((), device=self.device)
        for name, value in terms.items():
            mean = batch_mean(counted * value, batch) if value.dim() else value
            total = total + weights[name] * mean
            if weights[name] > 0:
                out[name] = mean
        total = w.scale * (total + self._plus(seen.logits, lesson, counted, batch, out))
        if self.method.kd_sample_gate:
            out["sample_gate"] = batch_mean((distilled > 0).float(), batch)
        return total if w.ratio is None else self._bounded(total, ce, out)

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """Average what is read of lessons over the distilled samples, so that gates leave it comparable."""
        share = means.get("sample_gate", 0.0) or 1.0
        return {name: value / share if name.startswith(self.of_lessons) else value for name, value in means.items()}

    def _plus(
        self, logits: Tensor, lesson: Lesson, counted: Tensor, batch: Batch, out: dict[str, Tensor]
    ) -> Tensor | float:
        """The weighted terms of `plus`."""
        if "plus" not in lesson:
            return 0.0
        divergence = losses.kl_to(self.compared(logits), lesson["plus"], self.method.plus_tau)
        out["plus_kd"] = batch_mean(counted * divergence, batch)
        return float(self.method.plus_alpha) * out["plus_kd"]

    def _bounded(self, term: Tensor, ce: Tensor, out: dict[str, Tensor]) -> Tensor:
        """A weighted term, brought down to `ratio` times cross-entropy's where it is above."""
        factor = losses.ratio_factor(distributed.mean(term), distributed.mean(ce), self.weights.ratio)
        out["kd_clamped"] = (factor < 1).float()
        return term * factor


def whole_precision(seen: Any) -> Any:
    """A network's outputs in float32, whatever the autocast type."""
    found = {name: getattr(seen, name) for name in seen._fields}
    changed: dict[str, Any] = {name: value.float() for name, value in found.items() if isinstance(value, Tensor)}
    if "maps" in found:
        changed["maps"] = tuple(value.float() for value in found["maps"])
    return seen._replace(**changed)
