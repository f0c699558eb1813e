"""The fusion: information-bottleneck manifold-bridging module (IB-MBM) and the synergy head on top.

The student's feature queries the teachers' features; the answer is a Gaussian over the fused feature.
Sub-modules carry the names of the research code, so its `mbm.pth` loads with `strict=True`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Sampling = Literal["auto", "always", "never"]


class IBMBM(nn.Module):
    """Cross-attention from student to teachers, read out as N(μ, σ²) with reparametrised samples.

    q = LN(W_q·student); kv = LN(W_kv·teachers); u = MHA(q, kv, kv); h = LN(u + q); μ = Linear(h);
    logvar = clamp(Linear(h), ±logvar_clip); σ = max(exp(logvar/2), min_std); z = μ + σ·ε.
    Bottleneck and reparametrisation: Alemi et al. 2017 (deep variational information bottleneck),
    Kingma & Welling 2014; attention: Vaswani et al. 2017.

    Args:
        q_dim: width of the query feature; unused with `learnable_q`.
        kv_dim: width of one teacher's feature F, or K·F where the K teachers' features are concatenated.
        d_emb: width of the fused feature.
        n_head: attention heads; must divide d_emb.
        logvar_clip: bound on |logvar|.
        min_std: floor of σ.
        learnable_q: one global token `q_token` (d_emb) replaces the projected student feature.
        feature_norm: "l2" scales each input feature vector to length 1 first; "none" leaves it.

    Raises:
        AssertionError: torch's; d_emb is not divisible by n_head.
    """

    def __init__(
        self,
        q_dim: int,
        kv_dim: int,
        d_emb: int,
        n_head: int = 1,
        logvar_clip: float = 10.0,
        min_std: float = 1e-4,
        learnable_q: bool = False,
        feature_norm: str = "none",
    ) -> None:
        super().__init__()
        self.q_dim, self.kv_dim, self.d_emb = q_dim, kv_dim, d_emb
        self.logvar_clip, self.min_std = float(logvar_clip), float(min_std)
        self.learnable_q, self.feature_norm = learnable_q, feature_norm
        if learnable_q:
            # Not zeros: the LayerNorm that follows has no usable gradient at a constant vector.
            self.q_token = nn.Parameter(torch.randn(d_emb))
        else:
            self.q_proj = nn.Linear(q_dim, d_emb)
        self.kv_proj = nn.Linear(kv_dim, d_emb)
        self.q_norm = nn.LayerNorm(d_emb)
        self.kv_norm = nn.LayerNorm(d_emb)
        self.attn = nn.MultiheadAttention(d_emb, n_head, batch_first=True)
        self.out_norm = nn.LayerNorm(d_emb)
        self.mu = nn.Linear(d_emb, d_emb)
        self.logvar = nn.Linear(d_emb, d_emb)

    def forward(
        self,
        q_feat: torch.Tensor | None,
        kv_feats: torch.Tensor,
        sample: Sampling = "auto",
        eps: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fuse a batch.

        Args:
            q_feat: (B, q_dim) or (B, T, q_dim). With `learnable_q` it is not read and may be None.
            kv_feats: (B, K, F) with kv_dim = F (K tokens) or kv_dim = K·F (one token); (B, F); (B, C, h, w).
            sample: "auto" draws z in training mode only, "always" in both modes, "never" in neither.
            eps: standard normal noise of μ's shape to use instead of a draw (under DDP noise is drawn for the
                global batch and sliced, so that the result does not depend on the number of processes).

        Returns:
            (z, μ, logvar), each (B, d_emb), or (B, T, d_emb) for a query of T > 1 tokens.
            They are float32 (or wider) also under autocast.

        Raises:
            ValueError: shapes that do not fit; both are named.
        """
        kv = self.kv_norm(self.kv_proj(self._tokens(kv_feats)))
        q, single = self._query(q_feat, kv_feats)
        u, _ = self.attn(q, kv, kv, need_weights=False)
        h = self.out_norm(u + q)
        if single:
            h = h.squeeze(1)
        # exp(logvar/2) spans e^±5: half precision would lose the bottleneck's small rates.
        with torch.autocast(h.device.type, enabled=False):
            h = h.to(self.mu.weight.dtype)
            mu = self.mu(h)
            logvar = self.logvar(h).clamp(-self.logvar_clip, self.logvar_clip)
            if sample == "never" or (sample == "auto" and not self.training):
                return mu, mu, logvar
            if eps is None:
                eps = torch.randn_like(mu)
            sigma = (0.5 * logvar).exp().clamp_min(self.min_std)
            return mu + sigma * eps.to(mu.dtype), mu, logvar

    def _tokens(self, kv_feats: torch.Tensor) -> torch.Tensor:
        """Teachers' features as (B, tokens, kv_dim)."""
        shape, width = kv_feats.shape, self.kv_dim
        if kv_feats.dim() == 4:
            tokens = self._scale(kv_feats.flatten(1)).unsqueeze(1)
        elif kv_feats.dim() == 3:
            tokens = self._scale(kv_feats)
            if shape[2] != width and shape[1] * shape[2] == width:
                tokens = tokens.flatten(1).unsqueeze(1)
        elif kv_feats.dim() == 2:
            tokens = self._scale(kv_feats).unsqueeze(1)
        else:
            tokens = kv_feats
        if tokens.dim() != 3 or tokens.shape[2] != width:
            raise ValueError(
                f"IB-MBM: teacher features are {tuple(shape)}, but kv_proj takes (B, {width}), (B, K, {width}), "
                f"(B, K, F) with K·F = {width} or (B, C, h, w) with C·h·w = {width}; align the teachers' widths"
            )
        return tokens

    def _query(self, q_feat: torch.Tensor | None, kv_feats: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Normalised query (B, T, d_emb), and whether the output drops its token axis."""
        batch = kv_feats.shape[0]
        if self.learnable_q:
            return self.q_norm(self.q_token).expand(batch, 1, -1), True
        if q_feat is None:
            raise ValueError(
                f"IB-MBM: no query for teacher features {tuple(kv_feats.shape)}; give one or set learnable_q"
            )
        if q_feat.dim() not in (2, 3) or q_feat.shape[-1] != self.q_dim or q_feat.shape[0] != batch:
            raise ValueError(
                f"IB-MBM: the query is {tuple(q_feat.shape)} for teacher features {tuple(kv_feats.shape)}; "
                f"it must be ({batch}, {self.q_dim}) or ({batch}, T, {self.q_dim})"
            )
        q: torch.Tensor = self.q_norm(self.q_proj(self._scale(q_feat)))
        return (q.unsqueeze(1) if q_feat.dim() == 2 else q), q_feat.dim() == 2 or q_feat.shape[1] == 1

    def _scale(self, feat: torch.Tensor) -> torch.Tensor:
        return F.normalize(feat, dim=-1) if self.feature_norm == "l2" else feat


class SynergyHead(nn.Module):
    """Classifier on the fused feature: LayerNorm → GELU → Dropout(p) → Linear, optionally with a temperature.

    Args:
        in_dim: d_emb of the fusion.
        num_classes: N.
        p: dropout rate, 0 ≤ p < 1.
        learnable_temp: logits are divided by max(exp(`log_temp`), 1e-4).
        temp_init: first value of `log_temp`; 0 is temperature 1.
    """

    def __init__(
        self, in_dim: int, num_classes: int, p: float = 0.0, learnable_temp: bool = False, temp_init: float = 0.0
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(in_dim), nn.GELU(), nn.Dropout(p), nn.Linear(in_dim, num_classes))
        self.p, self.learnable_temp = p, learnable_temp
        if learnable_temp:
            self.log_temp = nn.Parameter(torch.tensor(float(temp_init)))

    def forward(self, z: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (…, N) of fused features (…, in_dim), before `synergy_logit_scale`.

        `keep` is a 0/1 mask of z's shape that replaces the dropout draw (scaled by 1/(1−p)) in training
        mode, for the same reason as `eps` in the fusion; it has no effect in eval mode or at p = 0.
        """
        norm, act, dropout, linear = self.net
        x = act(norm(z))
        if keep is None:
            x = dropout(x)
        elif self.training and self.p > 0:
            x = x * keep.to(x.dtype) / (1.0 - self.p)
        logits = linear(x)
        if self.learnable_temp:
            logits = logits / self.log_temp.exp().clamp_min(1e-4)
        return logits
