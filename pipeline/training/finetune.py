"""Fine-tuning of one network with cross-entropy: teachers before they are distilled (docs/method.md section 7)."""

from typing import Any

import torch
from torch import Tensor

from models.features import FeatureNet
from pipeline.config import Config
from pipeline.data.batches import Batch
from pipeline.data.sources import ImageData
from pipeline.training import optim
from pipeline.training.costs import Costs
from pipeline.training.evaluation import outputs
from pipeline.training.objective import Moment, Objective, mixed_cross_entropy
from pipeline.training.phases import Epoch, Phase
from pipeline.training.rng import Streams
from pipeline.training.run_data import Scope, Selection, Task, prepare


class CrossEntropy(Objective):
    """Trains one network on labels, mixed or not, with cross-entropy alone."""

    def __init__(self, net: FeatureNet, label_smoothing: float, streams: Streams, device: torch.device) -> None:
        super().__init__(net, [], device)
        self.label_smoothing = label_smoothing
        self.streams = streams

    def forward(self, batch: Batch, moment: Moment, repeat: int = 0) -> dict[str, Tensor]:
        # networks draw their dropout locally; a slice's first row tells the processes apart
        self.streams.seed_global("network", *moment, batch.rows.start)
        logits = self.trainable_module(batch.x_mixed).logits
        loss = mixed_cross_entropy(logits, batch, self.label_smoothing)
        return {"loss": loss, "output": logits}


class FineTuning(Task):
    """The loop's task for a teacher: one phase. `scope`: the part of the data that it is taught; None: all."""

    def __init__(
        self, config: Config, data: ImageData, net: FeatureNet, device: torch.device, scope: Scope | None = None
    ) -> None:
        f = config.finetune
        super().__init__(config, data, net, "teacher", device, f.seed, scope)
        optimizer = optim.optimizer(f.optimizer, [(net, f.lr)], f.weight_decay, config.optim.momentum)
        self.costs = Costs({"teacher": net})
        self.phases = {
            "finetune": Phase(
                "finetune",
                CrossEntropy(net, f.label_smoothing, self.streams, device),
                optimizer,
                optim.lr_schedule(optimizer, f.schedule, f.epochs, len(self.batches)),
                mix="cutmix" if f.cutmix_alpha > 0 else None,
                mix_alpha=f.cutmix_alpha,
            )
        }
        prepare(self.phases, device, set())
        self.plan = [Epoch("finetune", 0, i, i, i, i == 0, i == f.epochs - 1) for i in range(f.epochs)]
        self.selection = Selection(net, self.data.selects)

    def end_epoch(self, epoch: Epoch) -> dict[str, float]:
        found = self.evaluated(outputs(self.net, self.data.eval, "teacher"))
        self.selection.offer(found["teacher/acc"], epoch.in_phase)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"net": self._last or self.net.state_dict(), "selection": self.selection.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = {}
        self.net.load_state_dict(state["net"])
        self.selection.load_state_dict(state["selection"])
