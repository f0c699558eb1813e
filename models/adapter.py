"""The distillation adapter: brings a network's pooled feature to the width that the fusion works in.

It sits on the wrapper as `distillation_adapter`. Teachers' adapters belong to the fusion, not to the teacher.
"""

import torch
from torch import nn


class DistillationAdapter(nn.Sequential):
    """Linear → LayerNorm → GELU → Linear, (B, in_dim) → (B, out_dim).

    Args:
        in_dim: width of the network's pooled feature.
        out_dim: D, `distill_out_dim`.
        hidden_dim: width between the two linear maps; `out_dim` when None.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int | None = None) -> None:
        hidden = out_dim if hidden_dim is None else hidden_dim
        for name, width in (("in_dim", in_dim), ("out_dim", out_dim), ("hidden_dim", hidden)):
            if width < 1:
                raise ValueError(f"the adapter's {name} is {width}; it must be at least 1")
        super().__init__(nn.Linear(in_dim, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out_dim))
        self.in_dim = in_dim
        self.out_dim = out_dim

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in_dim) → (…, out_dim); ValueError when the last dimension is not in_dim."""
        if input.shape[-1] != self.in_dim:
            raise ValueError(f"the adapter takes features of width {self.in_dim}, got {tuple(input.shape)}")
        result: torch.Tensor = super().forward(input)
        return result
