"""The distillation adapter: brings a network's pooled feature to the width that the fusion works in.

It sits on the wrapper as `distillation_adapter`. Teachers' adapters belong to the fusion, not to the teacher.
"""

from torch import nn


class DistillationAdapter(nn.Sequential):
    """Linear → LayerNorm → GELU → Linear, (B, in_dim) → (B, out_dim).

    Args:
        in_dim: width of the network's pooled feature.
        out_dim: D, `distill_out_dim`.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(nn.Linear(in_dim, out_dim), nn.LayerNorm(out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))
        self.out_dim = out_dim
