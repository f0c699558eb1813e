"""Which classes a network answers about, and what it says of those that it was not taught."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

MASKED = -1e4
"""The logit of a masked class: its probability is 0 at any temperature up to 100, and 16-bit numbers hold it."""
Rule = Literal["masked", "uniform"]


@dataclass(frozen=True)
class ClassView:
    """The columns of a head that covers all N classes.

    Attributes:
        columns: (M,) int64, the classes that are asked about, in order.
        known: (M,) bool, those that the network was taught; None: all.
        rule: what it says of the others. `masked`: never. `uniform`: their share is 1 / M each (at temperature 1), and
            what it knows divides the rest as before. One that knows none of them says the same of all.
    """

    columns: Tensor
    known: Tensor | None = None
    rule: Rule = "masked"
    taught: int = field(init=False)
    """How many of the columns are known; counted once, since a GPU would be waited for."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "taught", len(self.columns) if self.known is None else int(self.known.sum()))

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, N) -> (B, M)."""
        asked = logits.index_select(1, self.columns)
        if self.known is None:
            return asked
        if not self.taught:
            return torch.zeros_like(asked)
        if self.rule == "masked":
            return asked.masked_fill(~self.known, MASKED)
        known = asked.float().masked_fill(~self.known, -torch.inf)
        mean = known.logsumexp(dim=1, keepdim=True) - math.log(self.taught)
        return torch.where(self.known, asked, mean.to(asked.dtype))

    def to(self, device: torch.device) -> "ClassView":
        """The same view, on another device."""
        known = None if self.known is None else self.known.to(device)
        return ClassView(self.columns.to(device), known, self.rule)
