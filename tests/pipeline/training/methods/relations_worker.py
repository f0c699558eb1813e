"""Trains small students by methods that relate samples, under torchrun or alone, and leaves in a folder what came out.

torchrun --nproc_per_node=2 -m tests.pipeline.training.methods.relations_worker <folder>
"""

import sys
from pathlib import Path
from typing import Any

import torch
from timm.utils import unwrap_model

from pipeline.config.methods.cc import CcConfig
from pipeline.config.methods.crd import CrdConfig
from pipeline.config.methods.itrd import ItrdConfig
from pipeline.config.methods.pkt import PktConfig
from pipeline.config.methods.rkd import RkdConfig
from pipeline.training import distributed
from pipeline.training.checkpoint import pack
from pipeline.training.methods.cc import Cc
from pipeline.training.methods.crd import Crd
from pipeline.training.methods.itrd import Itrd
from pipeline.training.methods.pkt import Pkt
from pipeline.training.methods.rkd import Rkd
from pipeline.training.objective import Moment
from pipeline.training.rng import Streams
from pipeline.training.step import Weights
from tests.pipeline.training.methods.stepping import batches, made

METHODS: dict[str, tuple[Any, Any]] = {
    "rkd": (Rkd, RkdConfig()),
    "pkt": (Pkt, PktConfig(kd_alpha=100.0)),
    "cc": (Cc, CcConfig(embed_dim=9, kd_alpha=1.0)),
    "cc, published": (Cc, CcConfig(embed_dim=9, kd_alpha=0.2, form="published")),
    "cc, kernel": (Cc, CcConfig(embed_dim=9, kd_alpha=10.0, form="kernel")),
    "crd": (Crd, CrdConfig(embed_dim=9, negatives=20)),
    "itrd": (Itrd, ItrdConfig()),
}


def outcome(name: str) -> dict[str, Any]:
    """An epoch of plain SGD: weights, own modules and the loss of every batch; the third update is skipped."""
    world, streams = distributed.world(), Streams(3)
    train = batches(rank=world.rank, world_size=world.size)
    step = made(*METHODS[name], train=train)
    if world.size > 1:
        step.prepare_distributed()
    step.begin_epoch(Weights(1.0))
    trained = [*step.trainable_module.parameters(), *step.own.parameters()]
    seen = []
    for number, batch in enumerate(train.epoch(train.draw(None, 0.0, lambda n: streams.generator(n, 0)))):
        out = step(batch, Moment("b", 0, number))
        gradient = torch.autograd.grad(out["loss"], trained) if world.size == 1 else None
        if gradient is None:
            step.zero_grad()
            out["loss"].backward()
            gradient = [p.grad for p in trained]
        skipped = number == 2
        with torch.no_grad():
            for p, g in zip(trained, gradient, strict=True):
                p -= 0.0 if skipped else 0.01 * g
        step.updated(torch.tensor(skipped), 0.1)
        seen.append(float(distributed.mean(out["loss"])))
    state = {f"student.{k}": v for k, v in unwrap_model(step.trainable_module).state_dict().items()}
    for module, values in step.own_state().items():
        state |= {f"{module}.{k}": v for k, v in values.items()}
    return {"state": state, "losses": seen}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = distributed.join()
    found = {name: outcome(name) for name in METHODS}
    (folder / f"rank{world.rank}").write_bytes(pack(found))
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
