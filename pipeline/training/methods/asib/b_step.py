"""ASIB's B-step: it distils teachers and fusion into the student (docs/method.md section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.features import Features, undisturbed
from pipeline.data.batches import Batch, Known
from pipeline.training import losses, samples
from pipeline.training.methods.asib import targets
from pipeline.training.methods.asib.fusion import Fusion
from pipeline.training.objective import Moment, batch_mean, teacher_outputs
from pipeline.training.step import Lesson, Setup, StudentStep

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class BLoss:
    """The weights of one B-epoch."""

    scale: float
    """w(b), on everything that is distilled; 0: teachers and fusion are not run."""
    tau: float
    synergy: bool
    """Whether the gate is open: synergy targets and feature distillation."""
    averaged_share: float
    """Share of the averaged teachers in synergy targets."""
    ratio: float | None = None
    """Bound of the KD term relative to cross-entropy; None: not bounded."""
    bound: float | None = None
    """Bound of the total loss; None: not clamped."""
    dkd: float = 1.0
    """DKD's own warm-up."""


class BStep(StudentStep):
    """Trains the student; teachers and fusion are frozen, in eval mode, without gradient.

    `repeat` counts the `cccp_ns` updates of a batch: the target is made in the first and reused by the others.

    A lesson holds, each (n, .): `p` the target, and, where used, `average` (p_avg), `sure` (the target at temperature
    1), `mu`, `cw`, `weight` (disagreement), `guard` (0 where the label guard closes), `plus`.
    """

    of_lessons = ("target_entropy", "label_guard")

    def __init__(self, setup: Setup, fusion: Fusion | None = None) -> None:
        super().__init__(setup, [] if fusion is None else [fusion])
        self._fusion = (fusion,)
        self.weights = BLoss(0.0, self.method.tau, synergy=False, averaged_share=0.0)

    # targets --------------------------------------------------------------------------------------------------------

    def _fuses(self) -> bool:
        """Whether this epoch uses the fusion."""
        m = self.method
        fused = m.kd_alpha > 0 and m.kd_target not in ("avg", "weighted_conf")
        return self.weights.synergy and (fused or m.feat_kd_alpha > 0)

    def _weighs_uncertainty(self) -> bool:
        """Whether a target's entropy affects any weight: the hybrid term alone has no sample weights."""
        m = self.method
        return m.kd_uncertainty_weight > 0 and (m.kd_alpha > 0 or m.feat_kd_alpha > 0)

    @torch.no_grad()
    def view(
        self,
        x: Tensor,
        y: Tensor,
        query: Tensor | None,
        eps: Tensor | None,
        known: Known | None = None,
        rows: Tensor | None = None,
    ) -> Lesson:
        """Make the lesson for images x (n,C,H,W) with labels y (n,); each network runs once.

        Args:
            known: the teachers' outputs for the batch, from the bank.
            rows: which of the batch's images x are; None: all.
        """
        m = self.method
        seen = teacher_outputs(self._teachers, x, known, rows)
        logits = [self.compared(s.logits) for s in seen]
        fused = syn = picked = guard = None
        if self._fuses():
            (fusion,) = self._fusion
            assert fusion is not None
            fused = fusion(query, [s.feat_2d for s in seen], eps, sample="never" if eps is None else "always")
            syn = self.compared(fused.logits)
        tau_syn = self.weights.tau if m.tau_syn is None else m.tau_syn
        if m.kd_target == "auto_min" and syn is not None:
            average = samples.averaged(logits, m.averaging_weights, self.weights.tau)
            picked, guard = targets.best_of(targets.synergy(syn, tau_syn), average, y)
        found: Lesson = {}
        if m.kd_alpha > 0:
            found["p"] = self._target(logits, syn, picked, self.weights.tau, tau_syn)
            if guard is not None:
                found["guard"] = guard.float()
        if self._weighs_uncertainty():
            found["sure"] = self._target(logits, syn, picked, 1.0, 1.0)
        if m.hybrid_beta > 0:
            found["average"] = samples.averaged(logits, m.averaging_weights, self.weights.tau)
        if m.feat_kd_alpha > 0 and fused is not None:
            found["mu"] = fused.mu.float()
            found["cw"] = torch.ones(len(y), device=self.device)
            if m.use_ib:
                found["cw"] = losses.certainty_weights(fused.logvar, m.min_cw, m.max_cw)
        return found | self._beside(logits, y)

    def _target(
        self, logits: list[Tensor], syn: Tensor | None, picked: Tensor | None, tau: float, tau_syn: float
    ) -> Tensor:
        """The target (n, N). `picked`: where `auto_min` takes the synergy, at any temperature."""
        m = self.method
        if m.kd_target == "weighted_conf":
            return targets.confidence_weighted(logits, tau)
        average = samples.averaged(logits, m.averaging_weights, tau)
        if syn is None or m.kd_target == "avg":  # syn is None: nothing fuses, or the gate is closed
            return average
        p = targets.synergy(syn, tau_syn)
        if picked is not None:
            return torch.where(picked[:, None], p, average)
        return torch.lerp(p, average, self.weights.averaged_share)

    # images and views ------------------------------------------------------------------------------------------------

    def _query(self, x: Tensor, features: Tensor | None) -> Tensor | None:
        """The student's query for images x: the training pass's own features, or one eval-mode forward."""
        if not self._fuses() or self.method.learnable_q:
            return None
        if features is not None:
            return features
        (student,) = self._student
        with undisturbed(student):
            query: Tensor = getattr(student(x), self.method.ib_mbm_query_key)
        return query

    def _lesson_of(self, own: Tensor | None, batch: Batch, seen_query: Tensor, moment: Moment) -> Lesson:
        """The lesson for some of this process's rows; None: for all."""
        m = self.method
        if len(batch.y if own is None else own) == 0:
            return {name: torch.zeros((0, *width), device=self.device) for name, width in self._widths().items()}

        def rows(value: Tensor) -> Tensor:
            return value if own is None else value[own]

        x, y, mixed = self._shown(batch)
        reuse = mixed or batch.partner is None  # the training pass saw these very images
        eps = None
        if not m.use_mu_for_kd and m.use_ib and self._fuses():
            (fusion,) = self._fusion
            assert fusion is not None
            noise = self.streams.normal((batch.global_size, fusion.width), "kd_noise", *moment)
            eps = rows(noise[batch.rows].to(self.device))
        picked = rows(x)
        query = self._query(picked, rows(seen_query) if reuse else None)
        found = self.view(picked, rows(y), query, eps, None if mixed else batch.known, own)
        if batch.x_second is not None:
            second = rows(batch.x_second)
            known = None if mixed else batch.known_second
            other = self.view(second, rows(y), self._query(second, None), eps, known, own)
            found, _ = self._blend(found, other, torch.full((), 0.5, device=self.device))
        return found

    def _widths(self) -> dict[str, tuple[int, ...]]:
        """The parts of a lesson in this epoch: the same in every process, even in one that taught no sample."""
        m = self.method
        (student,) = self._student
        n = (student.num_classes,)
        parts: dict[str, tuple[int, ...]] = {}
        if m.kd_alpha > 0:
            parts["p"] = n
            if m.kd_target == "auto_min" and self._fuses():
                parts["guard"] = ()
        if self._weighs_uncertainty():
            parts["sure"] = n
        if m.hybrid_beta > 0:
            parts["average"] = n
        (fusion,) = self._fusion
        if m.feat_kd_alpha > 0 and self._fuses() and fusion is not None:
            parts |= {"mu": (fusion.width,), "cw": ()}
        if m.plus:
            parts["plus"] = n
        if m.use_disagree_weight:
            parts["weight"] = ()
        return parts

    def _mix(self, a: Lesson, b: Lesson, lam: Tensor) -> Lesson:
        """The lesson of mixed samples from those of their two clean views; DKD decouples each by its own label."""
        mixed, share = BStep._blend(a, b, lam)
        return mixed | ({"p_a": a["p"], "p_b": b["p"], "share": share} if "p" in a else {})

    @staticmethod
    def _blend(a: Lesson, b: Lesson, lam: Tensor) -> tuple[Lesson, Tensor]:
        """The lesson of two views of each sample, and the share (n,) of the first in its target.

        Probability vectors and weights are mixed by lambda; a view that the label guard closes drops out, and the
        sample counts by the share that is left.
        """
        mixed = {}
        if "guard" in a:
            share_a, share_b = lam * a["guard"], (1 - lam) * b["guard"]
            left = share_a + share_b
            mixed["guard"] = left
            share = share_a / left.clamp_min(TINY)
            # if both views are closed the target is never used, but it must be finite
            share = torch.where(left > 0, share, lam)
        else:
            share = lam.expand(len(next(iter(a.values())))) if a else lam
        for name, value in a.items():
            if name == "guard":
                continue
            weight = share if name in ("p", "sure") else lam.expand(len(value))
            weight = weight.reshape(-1, *([1] * (value.dim() - 1)))
            mixed[name] = weight * value + (1 - weight) * b[name]
        return mixed, share

    # the loss --------------------------------------------------------------------------------------------------------

    def _query_of(self, seen: Features) -> Tensor:
        query = self._fuses() and not self.method.learnable_q
        return getattr(seen, self.method.ib_mbm_query_key) if query else seen.logits

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
        """w(b) (KD + feature KD + hybrid + plus), with its terms and readings in `out`; `ratio` bounds KD alone."""
        m, w = self.method, self.weights
        logits, feature = self.compared(seen.logits), getattr(seen, m.feat_kd_key)
        omega = lesson.get("weight", torch.ones_like(distilled))
        if "sure" in lesson:
            omega = omega * targets.uncertainty_weight(lesson["sure"], m.kd_uncertainty_weight)
        total = torch.zeros((), device=logits.device)
        if "p" in lesson:
            counted = distilled * omega * lesson.get("guard", torch.ones_like(distilled))
            out["kd"] = batch_mean(counted * self._divergence(logits, lesson, batch), batch)
            term = w.scale * m.kd_alpha * out["kd"]
            total = total + (term if w.ratio is None else self._bounded(term, ce, out))
            got = (distilled > 0).float()
            out["target_entropy"] = batch_mean(got * targets.entropy(lesson["p"]), batch)
            out["sample_gate"] = batch_mean(got, batch)
            if "guard" in lesson:
                out["label_guard"] = batch_mean(got * (lesson["guard"] == 0).float(), batch)
        if "mu" in lesson and feature is not None:
            distance = losses.feature_distance(
                losses.normalised(feature, m.feat_kd_norm),
                losses.normalised(lesson["mu"], m.feat_kd_norm),
                m.feat_kd_huber_beta,
                m.feat_kd_clip,
            )
            out["feat"] = batch_mean(distilled * omega * lesson["cw"] * distance, batch)
            total = total + w.scale * m.feat_kd_alpha * out["feat"]
        if "average" in lesson:
            out["hybrid"] = batch_mean(distilled * losses.kl_to(logits, lesson["average"], w.tau), batch)
            total = total + w.scale * m.hybrid_beta * out["hybrid"]
        return total + w.scale * self._plus(seen.logits, lesson, distilled * omega, batch, out)

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """Without a gate the share of distilled samples is not logged."""
        gated = self.method.kd_sample_gate
        return {k: v for k, v in super().summarise(means).items() if gated or k != "sample_gate"}

    def _divergence(self, logits: Tensor, lesson: Lesson, batch: Batch) -> Tensor:
        """KD_i of this process's samples, (b,)."""
        m, tau = self.method, self.weights.tau
        if m.kd_loss == "kl":
            return losses.kl_to(logits, lesson["p"], tau)

        def dkd(p: Tensor, y: Tensor) -> Tensor:
            return self.weights.dkd * losses.dkd(logits, p, y, tau, m.dkd_alpha, m.dkd_beta)

        if "p_a" in lesson:
            share = lesson["share"]
            return share * dkd(lesson["p_a"], batch.y) + (1 - share) * dkd(lesson["p_b"], batch.y_b)
        return dkd(lesson["p"], self._shown(batch)[1])
