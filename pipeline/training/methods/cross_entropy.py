"""Cross-entropy alone: teacher fine-tuning (docs/method.md section 7)."""

import torch
from torch import Tensor

from models.features import FeatureNet
from pipeline.data.batches import Batch
from pipeline.training.objective import Moment, Objective, mixed_cross_entropy
from pipeline.training.rng import Streams


class CrossEntropy(Objective):
    """Trains one network on labels, mixed or not."""

    def __init__(self, net: FeatureNet, label_smoothing: float, streams: Streams, device: torch.device) -> None:
        super().__init__(net, [], device)
        self.label_smoothing = label_smoothing
        self.streams = streams

    def forward(self, batch: Batch, moment: Moment, repeat: int = 0) -> dict[str, Tensor]:
        # networks draw their dropout locally; a slice's first row tells the processes apart
        self.streams.seed_global("network", *moment, batch.first_row)
        logits = self.trainable_module(batch.x_mixed).logits
        loss = mixed_cross_entropy(logits, batch, self.label_smoothing)
        return {"loss": loss, "output": logits}
