"""ASIB: the A-step teaches the fusion, the B-step teaches the student (method.md section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.features import FeatureNet
from pipeline.config import MethodConfig
from pipeline.data.batches import Batch
from pipeline.training import distributed, losses, targets
from pipeline.training.fusion import Fusion
from pipeline.training.objective import Moment, Objective, batch_mean, mixed_cross_entropy
from pipeline.training.rng import Streams


@dataclass(frozen=True)
class ALoss:
    """The weights of one A-epoch."""

    ce: float
    kd: float
    beta: float
    tau: float
    certainty: bool
    """Whether samples are weighted by certainty; not in CE-only epochs, and not in deterministic fusion."""


def a_loss(
    synergy_logits: Tensor,
    mu: Tensor,
    logvar: Tensor,
    student_logits: Tensor | None,
    batch: Batch,
    method: MethodConfig,
    weights: ALoss,
) -> dict[str, Tensor]:
    """L_A and its terms (method.md section 3), without the penalty on parameters.

    Args:
        synergy_logits: z_syn (B, N).
        mu, logvar: (B, D).
        student_logits: s (B, N); None where the KD weight is 0.
    """
    if weights.certainty:
        cw = losses.certainty_weights(logvar, method.min_cw, method.max_cw)
    else:
        cw = torch.ones(len(mu), device=mu.device)
    ce = batch_mean(cw * losses.cross_entropy(synergy_logits, batch.y, method.label_smoothing, "none"), batch)
    zero = torch.zeros((), device=mu.device)
    kd = ib = zero
    if student_logits is not None and weights.kd > 0:
        kd = batch_mean(cw * losses.kd(synergy_logits, student_logits, weights.tau, "none"), batch)
    if weights.beta > 0:
        ib = batch_mean(losses.ib_kl(mu, logvar, "none"), batch)
    return {
        "loss": weights.ce * ce + weights.kd * kd + weights.beta * ib,
        "ce": ce,
        "kd": kd,
        "ib": ib,
        "cw_mean": batch_mean(cw, batch),
        "cw_square": batch_mean(cw.square(), batch),
    }


class AStep(Objective):
    """Trains fusion, head and adapters; student and teachers are frozen, in eval mode, without gradient."""

    def __init__(
        self,
        fusion: Fusion,
        student: FeatureNet,
        teachers: list[FeatureNet],
        method: MethodConfig,
        streams: Streams,
        device: torch.device,
    ) -> None:
        super().__init__(fusion, [student, *teachers], device)
        self._networks = (student, *teachers)
        self.width, self.dropout = fusion.width, fusion.dropout
        self.method = method
        self.streams = streams
        self.weights = ALoss(1.0, 0.0, 0.0, method.tau, certainty=False)

    def forward(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        student, *teachers = self._networks
        needs_logits = self.weights.kd > 0
        with torch.no_grad():
            seen = student(batch.x) if needs_logits or not self.method.learnable_q else None
            features = [teacher(batch.x).feat_2d for teacher in teachers]
        query = None if self.method.learnable_q or seen is None else getattr(seen, self.method.ib_mbm_query_key)
        shape = (batch.global_size, self.width)
        eps = keep = None
        if self.method.use_ib:
            eps = self.streams.normal(shape, "ib_noise", *moment)[batch.rows].to(self.device)
        if self.dropout > 0:
            keep = self.streams.keep_mask(shape, self.dropout, "head_dropout", *moment)[batch.rows].to(self.device)
        z_syn, mu, logvar = self.trainable_module(query, features, eps, keep)
        s = seen.logits if needs_logits and seen is not None else None
        out = a_loss(z_syn, mu, logvar, s, batch, self.method, self.weights)
        if self.method.ib_mbm_reg_lambda > 0:
            penalty = losses.mean_square(list(self.trainable_module.parameters()))
            out["loss"] = out["loss"] + self.method.ib_mbm_reg_lambda * penalty
        return out | {"output": z_syn}

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        means = dict(means)
        square = means.pop("cw_square")
        return means | {"cw_std": max(square - means["cw_mean"] ** 2, 0.0) ** 0.5, "feat": 0.0, "cccp": 0.0}


@dataclass(frozen=True)
class BLoss:
    """The weights of one B-epoch."""

    kd: float
    """w(b) kd_alpha; 0: teachers and fusion are not run."""
    tau: float
    synergy: bool
    """Whether the gate is open and the target is the synergy's."""
    averaged_share: float
    """Share of the averaged teachers in synergy targets."""


class BStep(Objective):
    """Trains the student; teachers and fusion are frozen, in eval mode, without gradient."""

    def __init__(
        self,
        student: FeatureNet,
        teachers: list[FeatureNet],
        fusion: Fusion | None,
        method: MethodConfig,
        streams: Streams,
        device: torch.device,
    ) -> None:
        frozen = [*teachers] if fusion is None else [*teachers, fusion]
        super().__init__(student, list(frozen), device)
        self._student, self._teachers, self._fusion = (student,), tuple(teachers), (fusion,)
        self.method = method
        self.streams = streams
        self.weights = BLoss(0.0, method.tau, synergy=False, averaged_share=0.0)

    @torch.no_grad()
    def target(self, batch: Batch, query: Tensor | None) -> Tensor:
        """The probability vectors (b, N) of the clean view, one for each of this process's samples."""
        seen = [teacher(batch.x) for teacher in self._teachers]
        w = None if self.method.teacher_weights == "equal" else list(self.method.teacher_weights)

        def averaged() -> Tensor:
            return targets.averaged([s.logits for s in seen], w, self.weights.tau)

        if not self.weights.synergy:
            return averaged()
        (fusion,) = self._fusion
        assert fusion is not None
        p = targets.synergy(fusion(query, [s.feat_2d for s in seen]).logits, self.method.tau_syn)
        if self.weights.averaged_share > 0:
            p = targets.mixed(p, averaged(), self.weights.averaged_share)
        return p

    @torch.no_grad()
    def clean_query(self, batch: Batch) -> Tensor:
        """The student's query on the clean view: one eval-mode forward without gradient, modes restored."""
        (student,) = self._student
        student.eval()
        query: Tensor = getattr(student(batch.x), self.method.ib_mbm_query_key)
        student.train()
        return query

    def forward(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        self.streams.seed_global("network", *moment, int(batch.rows.start or 0))
        seen = self.trainable_module(batch.x_mixed)
        ce = mixed_cross_entropy(seen.logits, batch, self.method.ce_label_smoothing)
        kd = torch.zeros((), device=ce.device)
        if self.weights.kd > 0:
            query = None
            if self.weights.synergy and not self.method.learnable_q:
                query = (
                    self.clean_query(batch)
                    if batch.partner is not None
                    else getattr(seen, self.method.ib_mbm_query_key).detach()
                )
            p = self.target(batch, query)
            if batch.partner is not None:
                everyone = distributed.gather_rows(p, int(batch.rows.start or 0), batch.global_size)
                p = batch.lam * p + (1 - batch.lam) * everyone[batch.partner]
            kd = batch_mean(losses.kl_to(seen.logits, p, self.weights.tau), batch)
        loss = self.method.ce_alpha * ce + self.weights.kd * kd
        return {"loss": loss, "output": seen.logits, "ce": ce, "kd": kd}

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        return means | {"feat": 0.0}
