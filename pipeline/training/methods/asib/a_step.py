"""ASIB's A-step: it teaches the fusion, and the teachers where they are fine-tuned (docs/method.md section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.features import FeatureNet
from models.freeze import Frozen
from pipeline.config.methods.asib.settings import AsibConfig
from pipeline.data.batches import Batch
from pipeline.training import distributed, losses
from pipeline.training.methods.asib.fusion import Fusion, Synergy
from pipeline.training.objective import Moment, Objective, batch_mean, teacher_outputs
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
    feat: float = 0.0
    cccp: float = 0.0
    """Weight of the concave-convex term, which takes the KD term's place."""
    teacher_ce: float = 0.0
    penalties: bool = True
    """Whether trained parameters are penalised; not in CE-only epochs."""
    bound: float | None = None
    """Bound of the total loss; None: not clamped."""


def a_loss(
    synergy: Synergy,
    student_logits: Tensor | None,
    student_feature: Tensor | None,
    batch: Batch,
    method: AsibConfig,
    weights: ALoss,
) -> dict[str, Tensor]:
    """L_A and its terms (docs/method.md section 3), without teachers' own cross-entropy and penalties on parameters.

    Args:
        synergy: z_syn (B, N), mu and logvar (B, D).
        student_logits: s (B, N); None where neither KD nor CCCP needs them.
        student_feature: (B, D), for feature distillation; None without.
    """
    z_syn, mu, logvar = synergy
    cw = torch.ones(len(mu), device=mu.device)
    if weights.certainty:
        cw = losses.certainty_weights(logvar, method.min_cw, method.max_cw)
    ce = batch_mean(cw * losses.cross_entropy(z_syn, batch.y, method.label_smoothing), batch)
    kd = ib = feat = cccp = torch.zeros((), device=mu.device)
    if student_logits is not None:
        divergence = losses.kd(z_syn, student_logits, weights.tau)
        kd = batch_mean(cw * divergence, batch)
        cccp = batch_mean(divergence, batch)
    raw_kl = batch_mean(losses.ib_kl(mu, logvar, method.ib_mbm_min_std), batch)
    if weights.beta > 0:
        ib = raw_kl
    if student_feature is not None and weights.feat > 0:
        feature = losses.normalised(student_feature.detach(), method.feat_kd_norm)
        distance = (feature - losses.normalised(mu, method.feat_kd_norm)).square().sum(dim=1)
        feat = batch_mean(cw * distance, batch)
    loss = weights.ce * ce + weights.kd * kd + weights.cccp * cccp + weights.beta * ib + weights.feat * feat
    outside = ((cw <= method.min_cw) | (cw >= method.max_cw)) & weights.certainty
    sigma = torch.exp(0.5 * logvar.detach().float()).clamp_min(method.ib_mbm_min_std)
    return {
        "loss": loss,
        "ce": ce,
        "kd": kd,
        "ib": ib,
        "feat": feat,
        "cccp": cccp if weights.cccp > 0 else torch.zeros_like(cccp),
        "cw_mean": batch_mean(cw, batch),
        "cw_square": batch_mean(cw.square(), batch),
        "cw_at_bounds": batch_mean(outside.float(), batch),
        "raw_kl": raw_kl.detach() / mu.shape[1],
        "sigma": batch_mean(sigma.mean(dim=1), batch),
    }


class FusionAndTeachers(nn.Module):
    """What an A-step trains when teachers are fine-tuned: one module, so that it is wrapped and clipped as one."""

    def __init__(self, fusion: Fusion, teachers: list[FeatureNet]) -> None:
        super().__init__()
        self.fusion = fusion
        self.teachers = nn.ModuleList(teachers)

    def forward(
        self, query: Tensor | None, x: Tensor, eps: Tensor | None, keep: Tensor | None
    ) -> tuple[Synergy, list[Tensor]]:
        seen = [teacher(x) for teacher in self.teachers]
        return self.fusion(query, [s.feat_2d for s in seen], eps, keep), [s.logits for s in seen]


class AStep(Objective):
    """Trains fusion, head and adapters; student and teacher backbones are frozen, in eval mode, without gradient.

    With `use_teacher_finetuning` the teachers' unfrozen part trains too. `repeat` counts the `cccp_nt` updates of a
    batch: the student's prediction is made in the first and held fixed for the others.
    """

    def __init__(
        self,
        fusion: Fusion,
        student: FeatureNet,
        teachers: list[FeatureNet],
        method: AsibConfig,
        streams: Streams,
        device: torch.device,
        held: Sequence[tuple[Frozen, nn.Module]] = (),
    ) -> None:
        self.finetunes = method.use_teacher_finetuning
        trainable = FusionAndTeachers(fusion, teachers) if self.finetunes else fusion
        super().__init__(trainable, [student] if self.finetunes else [student, *teachers], device, held)
        self._student, self._teachers, self._fusion = (student,), tuple(teachers), (fusion,)
        self.width, self.dropout = fusion.width, fusion.dropout
        self.method = method
        self.streams = streams
        self.weights = ALoss(1.0, 0.0, 0.0, method.tau, certainty=False)
        self._fixed: tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]] | None = None

    def begin_epoch(self, weights: ALoss) -> None:
        self.weights = weights

    @torch.no_grad()
    def look(self, batch: Batch) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
        """What stays fixed for a batch: the student's query, logits and feature, and frozen teachers' features."""
        m, w = self.method, self.weights
        logits = w.kd > 0 or w.cccp > 0
        feature = w.feat > 0
        (student,) = self._student
        seen = student(batch.x) if logits or feature or not m.learnable_q else None
        features = [] if self.finetunes else [s.feat_2d for s in teacher_outputs(self._teachers, batch.x, batch.known)]
        if seen is None:
            return None, None, None, features
        return (
            None if m.learnable_q else getattr(seen, m.ib_mbm_query_key),
            seen.logits if logits else None,
            getattr(seen, m.feat_kd_key) if feature else None,
            features,
        )

    def forward(self, batch: Batch, moment: Moment, repeat: int = 0) -> dict[str, Tensor]:
        if repeat == 0 or self._fixed is None:
            self._fixed = self.look(batch)
        query, student_logits, student_feature, features = self._fixed
        shape, where = (batch.global_size, self.width), (*moment, repeat)
        eps = keep = None
        if self.method.use_ib:
            eps = self.streams.normal(shape, "ib_noise", *where)[batch.rows].to(self.device)
        if self.dropout > 0:
            keep = self.streams.keep_mask(shape, self.dropout, "head_dropout", *where)[batch.rows].to(self.device)
        teacher_logits: list[Tensor] = []
        if self.finetunes:
            self.streams.seed_global("network", *where, batch.rows.start)
            synergy, teacher_logits = self.trainable_module(query, batch.x, eps, keep)
        else:
            synergy = self.trainable_module(query, features, eps, keep)
        out = a_loss(synergy, student_logits, student_feature, batch, self.method, self.weights)
        out["loss"] = out["loss"] + self._more(batch, teacher_logits, out)
        if self.weights.bound is not None:
            mode, overall = self.method.loss_clamp_mode, distributed.mean(out["loss"])
            out["loss"] = losses.clamp_loss(out["loss"], self.weights.bound, mode, overall)
        return out | {"output": synergy.logits}

    def _more(self, batch: Batch, teacher_logits: list[Tensor], out: dict[str, Tensor]) -> Tensor:
        """Each fine-tuned teacher's own cross-entropy, and the penalties on trained parameters."""
        m = self.method
        total = torch.zeros((), device=self.device)
        if teacher_logits and self.weights.teacher_ce > 0:
            each = [batch_mean(losses.cross_entropy(t, batch.y, m.label_smoothing), batch) for t in teacher_logits]
            out["teacher_ce"] = torch.stack(each).sum()
            total = total + self.weights.teacher_ce * out["teacher_ce"]
        if not self.weights.penalties:
            return total
        if m.ib_mbm_reg_lambda > 0:
            total = total + m.ib_mbm_reg_lambda * losses.mean_square(list(self._fusion[0].parameters()))
        if self.finetunes and m.reg_lambda > 0:
            trained = [p for t in self._teachers for p in t.parameters() if p.requires_grad]
            total = total + m.reg_lambda * losses.mean_square(trained)
        return total

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """The means of what acts in this epoch, with the deviation of the certainty."""
        w = self.weights
        acts = {"kd": w.kd > 0, "ib": w.beta > 0, "feat": w.feat > 0, "cccp": w.cccp > 0}
        acts |= dict.fromkeys(("cw_mean", "cw_square", "cw_at_bounds"), w.certainty)
        acts |= dict.fromkeys(("raw_kl", "sigma"), self.method.use_ib)
        means = {name: value for name, value in means.items() if acts.get(name, True)}
        square = means.pop("cw_square", 0.0)
        if "cw_mean" in means:
            means["cw_std"] = max(square - means["cw_mean"] ** 2, 0.0) ** 0.5
        return means
