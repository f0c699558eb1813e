"""ASIB's B-step: it distils teachers and fusion into the student (docs/method.md section 3)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features import FeatureNet, undisturbed
from pipeline.config import MethodConfig
from pipeline.data.batches import Batch, Known
from pipeline.training import distributed, losses
from pipeline.training.methods.asib import targets
from pipeline.training.methods.asib.fusion import Fusion
from pipeline.training.objective import Moment, Objective, batch_mean, mixed_cross_entropy, teacher_outputs
from pipeline.training.rng import Streams

TINY = torch.finfo(torch.float32).tiny
Lesson = dict[str, Tensor]
"""What is taught about n images, each (n, .): `p` the target, and, where used, `average` (p_avg), `sure`
(the target at temperature 1), `mu`, `cw`, `weight` (disagreement), `guard` (0 where the label guard closes)."""


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


class BStep(Objective):
    """Trains the student; teachers and fusion are frozen, in eval mode, without gradient.

    `repeat` counts the `cccp_ns` updates of a batch: the target is made in the first and reused by the others.
    """

    def __init__(
        self,
        student: FeatureNet,
        teachers: list[FeatureNet],
        fusion: Fusion | None,
        method: MethodConfig,
        streams: Streams,
        device: torch.device,
    ) -> None:
        super().__init__(student, [*teachers] if fusion is None else [*teachers, fusion], device)
        self._student, self._teachers, self._fusion = (student,), tuple(teachers), (fusion,)
        self.method = method
        self.streams = streams
        self.weights = BLoss(0.0, method.tau, synergy=False, averaged_share=0.0)
        self._held: tuple[Lesson, Tensor] | None = None

    def begin_epoch(self, weights: BLoss) -> None:
        self.weights = weights

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
    def lesson(
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
        logits = [s.logits for s in seen]
        fused = syn = picked = guard = None
        if self._fuses():
            (fusion,) = self._fusion
            assert fusion is not None
            fused = fusion(query, [s.feat_2d for s in seen], eps, sample="never" if eps is None else "always")
            syn = fused.logits
        if m.kd_target == "auto_min" and syn is not None:
            average = targets.averaged(logits, m.averaging_weights, self.weights.tau)
            picked, guard = targets.best_of(targets.synergy(syn, m.tau_syn), average, y)
        found: Lesson = {}
        if m.kd_alpha > 0:
            found["p"] = self._target(logits, syn, picked, self.weights.tau, m.tau_syn)
            if guard is not None:
                found["guard"] = guard.float()
        if self._weighs_uncertainty():
            found["sure"] = self._target(logits, syn, picked, 1.0, 1.0)
        if m.hybrid_beta > 0:
            found["average"] = targets.averaged(logits, m.averaging_weights, self.weights.tau)
        if m.feat_kd_alpha > 0 and fused is not None:
            found["mu"] = fused.mu.float()
            found["cw"] = torch.ones(len(y), device=self.device)
            if m.use_ib:
                found["cw"] = losses.certainty_weights(fused.logvar, m.min_cw, m.max_cw)
        if m.use_disagree_weight:
            differ = targets.disagrees(logits, y, m.disagree_mode)
            found["weight"] = torch.where(differ, m.disagree_lambda_high, m.disagree_lambda_low)
        return found

    def _target(
        self, logits: list[Tensor], syn: Tensor | None, picked: Tensor | None, tau: float, tau_syn: float
    ) -> Tensor:
        """The target (n, N). `picked`: where `auto_min` takes the synergy, at any temperature."""
        m = self.method
        if m.kd_target == "weighted_conf":
            return targets.confidence_weighted(logits, tau)
        average = targets.averaged(logits, m.averaging_weights, tau)
        if syn is None or m.kd_target == "avg":  # syn is None: nothing fuses, or the gate is closed
            return average
        p = targets.synergy(syn, tau_syn)
        if picked is not None:
            return torch.where(picked[:, None], p, average)
        return torch.lerp(p, average, self.weights.averaged_share)

    # images and views ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _chosen(self, logits: Tensor, batch: Batch) -> Tensor:
        """Rows (n,) of the global batch that are distilled."""
        m = self.method
        if not m.kd_sample_gate:
            return torch.arange(batch.global_size, device=logits.device)
        confidence = F.softmax(logits.float(), dim=1).amax(dim=1)
        everyone = distributed.gather_rows(confidence, batch.rows, batch.global_size)
        return targets.select(everyone, m.kd_sample_thr, m.kd_sample_min_ratio, m.kd_sample_max_ratio)

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

    @torch.no_grad()
    def teach(self, batch: Batch, seen_logits: Tensor, seen_query: Tensor, moment: Moment) -> tuple[Lesson, Tensor]:
        """The lesson for this process's rows, mixed as the images are, and (b,) 1 for samples that are distilled.

        Teachers and fusion run only on the distilled samples and the mix partners that those need.
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

    def _lesson_of(self, own: Tensor | None, batch: Batch, seen_query: Tensor, moment: Moment) -> Lesson:
        """The lesson for some of this process's rows; None: for all."""
        m = self.method
        if len(batch.y if own is None else own) == 0:
            return {name: torch.zeros((0, *width), device=self.device) for name, width in self._widths().items()}

        def rows(value: Tensor) -> Tensor:
            return value if own is None else value[own]

        mixed = m.kd_view == "mixed" and batch.partner is not None
        x = batch.x_mixed if mixed else batch.x
        y = torch.where(batch.lam >= 0.5, batch.y, batch.y_b) if mixed else batch.y
        reuse = mixed or batch.partner is None  # the training pass saw these very images
        eps = None
        if not m.use_mu_for_kd and m.use_ib and self._fuses():
            (fusion,) = self._fusion
            assert fusion is not None
            noise = self.streams.normal((batch.global_size, fusion.width), "kd_noise", *moment)
            eps = rows(noise[batch.rows].to(self.device))
        picked = rows(x)
        query = self._query(picked, rows(seen_query) if reuse else None)
        found = self.lesson(picked, rows(y), query, eps, None if mixed else batch.known, own)
        if batch.x_second is not None:
            second = rows(batch.x_second)
            known = None if mixed else batch.known_second
            other = self.lesson(second, rows(y), self._query(second, None), eps, known, own)
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
        if m.use_disagree_weight:
            parts["weight"] = ()
        return parts

    @staticmethod
    def _mix(a: Lesson, b: Lesson, lam: Tensor) -> Lesson:
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

    def forward(self, batch: Batch, moment: Moment, repeat: int = 0) -> dict[str, Tensor]:
        m, w = self.method, self.weights
        self.streams.seed_global("network", *moment, repeat, batch.rows.start)
        seen = self.trainable_module(batch.x_mixed)
        ce = mixed_cross_entropy(seen.logits, batch, m.ce_label_smoothing)
        zero = torch.zeros((), device=ce.device)
        out = {"ce": ce, "kd": zero, "feat": zero}
        loss = m.ce_alpha * ce
        if w.scale > 0:
            if repeat == 0 or self._held is None:
                query = getattr(seen, m.ib_mbm_query_key) if self._fuses() and not m.learnable_q else seen.logits
                self._held = self.teach(batch, seen.logits.detach(), query.detach(), moment)
            loss = loss + self._distil(seen.logits, getattr(seen, m.feat_kd_key), *self._held, batch, loss, out)
        if w.bound is not None:
            loss = losses.clamp_loss(loss, w.bound, m.loss_clamp_mode, distributed.mean(loss))
        return {"loss": loss, "output": seen.logits, **out}

    def _distil(
        self,
        logits: Tensor,
        feature: Tensor | None,
        lesson: Lesson,
        distilled: Tensor,
        batch: Batch,
        ce: Tensor,
        out: dict[str, Tensor],
    ) -> Tensor:
        """w(b) (KD + feature KD + hybrid), with its terms and readings in `out`."""
        m, w = self.method, self.weights
        omega = lesson.get("weight", torch.ones_like(distilled))
        if "sure" in lesson:
            omega = omega * targets.uncertainty_weight(lesson["sure"], m.kd_uncertainty_weight)
        total = torch.zeros((), device=logits.device)
        if "p" in lesson:
            counted = distilled * omega * lesson.get("guard", torch.ones_like(distilled))
            out["kd"] = batch_mean(counted * self._divergence(logits, lesson, batch), batch)
            term = w.scale * m.kd_alpha * out["kd"]
            if w.ratio is not None:
                factor = losses.ratio_factor(distributed.mean(term), distributed.mean(ce), w.ratio)
                out["kd_clamped"] = (factor < 1).float()
                term = term * factor
            total = total + term
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
        return total

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """Average readings of targets over the distilled samples, not over all, so that gates leave them comparable."""
        share = means.get("sample_gate", 0.0)
        return {k: v / share if k in ("target_entropy", "label_guard") and share > 0 else v for k, v in means.items()}

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
        mixed = m.kd_view == "mixed" and batch.partner is not None
        return dkd(lesson["p"], torch.where(batch.lam >= 0.5, batch.y, batch.y_b) if mixed else batch.y)
