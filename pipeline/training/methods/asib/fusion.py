"""The fusion: teacher adapters, IB-MBM and synergy head, one module that A-steps train (docs/method.md section 1)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.adapter import DistillationAdapter
from models.features import FeatureNet
from models.ib_mbm import IBMBM, SynergyHead
from pipeline.config.methods.asib.settings import AsibConfig
from pipeline.errors import UserError


class Synergy(NamedTuple):
    """The fusion's outputs for a batch: logits z_syn (B, N), mean and log variance (B, D)."""

    logits: Tensor
    mu: Tensor
    logvar: Tensor


def query_width(method: AsibConfig, student: FeatureNet) -> int:
    """The width of the student's feature that queries the fusion."""
    return method.distill_out_dim if method.ib_mbm_query_key == "distill_feat" else student.feature_dim


class Fusion(nn.Module):
    """Fuses K teachers' `feat_2d`, of widths `teacher_dims`, under a query from the student, of width `query_dim`.

    Raises:
        UserError: teachers of different widths without adapters, a query of another width than requested.
    """

    def __init__(self, method: AsibConfig, teacher_dims: list[int], query_dim: int, num_classes: int) -> None:
        super().__init__()
        if method.use_distillation_adapter:
            self.adapters = nn.ModuleList(DistillationAdapter(d, method.distill_out_dim) for d in teacher_dims)
            kv_dim = method.distill_out_dim
        else:
            if len(set(teacher_dims)) > 1:
                raise UserError(
                    f"method.use_distillation_adapter=false: the teachers' features have widths {teacher_dims}; "
                    "set it to true, so that adapters bring them to method.distill_out_dim"
                )
            self.adapters = nn.ModuleList(nn.Identity() for _ in teacher_dims)
            kv_dim = teacher_dims[0]
        if method.ib_mbm_query_dim not in (None, 0, query_dim) and not method.learnable_q:
            raise UserError(
                f"method.ib_mbm_query_dim={method.ib_mbm_query_dim}: the student's {method.ib_mbm_query_key} has width "
                f"{query_dim}; leave the key at null"
            )
        self.ib_mbm = IBMBM(
            q_dim=query_dim,
            kv_dim=kv_dim,
            d_emb=method.ib_mbm_out_dim,
            n_head=method.ib_mbm_n_head,
            logvar_clip=method.ib_mbm_logvar_clip,
            min_std=method.ib_mbm_min_std,
            learnable_q=method.learnable_q,
            feature_norm=method.ib_mbm_feature_norm,
        )
        self.head = SynergyHead(
            method.ib_mbm_out_dim,
            num_classes,
            p=method.synergy_head_dropout,
            learnable_temp=method.synergy_temp_learnable,
            temp_init=method.synergy_temp_init,
        )
        self.dropout = method.synergy_head_dropout
        self.width = method.ib_mbm_out_dim
        self.stochastic = method.use_ib
        self.logit_scale = method.synergy_logit_scale

    def forward(
        self,
        query: Tensor | None,
        features: list[Tensor],
        eps: Tensor | None = None,
        keep: Tensor | None = None,
        teachers: tuple[int, ...] | None = None,
        sample: str = "auto",
    ) -> Synergy:
        """Fuse.

        Args:
            query: (B, query_dim); None with a learned query.
            features: each teacher's feat_2d, (B, C_k).
            eps: (B, D) standard normal noise of the training-mode sample.
            keep: (B, D) dropout mask of the head in training mode.
            teachers: indices of the teachers that `features` come from, when they are not all.
            sample: "always" draws z also in eval mode (`use_mu_for_kd: false`).
        """
        chosen = range(len(self.adapters)) if teachers is None else teachers
        tokens = [self.adapters[k](f) for k, f in zip(chosen, features, strict=True)]
        z, mu, logvar = self.ib_mbm(
            query, torch.stack(tokens, dim=1), sample=sample if self.stochastic else "never", eps=eps
        )
        return Synergy(self.logit_scale * self.head(z, keep=keep).float(), mu, logvar)
