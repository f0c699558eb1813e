"""A method's step on small networks, without the loop: what it is made with, and one batch's terms."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.config import AugmentConfig
from pipeline.data.batches import Batch, TrainBatches
from pipeline.training.objective import Moment
from pipeline.training.rng import Streams
from pipeline.training.step import Setup, StudentStep
from tests.pipeline.training.builders import CPU, image_data, net

MOMENT = Moment("b", 0, 0)
N, SIZE = 44, 7


class Outputs(NamedTuple):
    """A network's `Features`, with two maps made of its last one."""

    logits: Tensor
    feat_2d: Tensor
    feat_4d: Tensor
    maps: tuple[Tensor, ...]


def outputs(network: Any, x: Tensor) -> Outputs:
    found = network(x)
    return Outputs(found.logits, found.feat_2d, found.feat_4d, (found.feat_4d.square(), found.feat_4d))


def batches(indices: Tensor | None = None, **more: Any) -> TrainBatches:
    data = image_data(N)
    taking_part = torch.arange(N) if indices is None else indices
    augment = AugmentConfig()
    return TrainBatches(
        data.train_x, data.train_y, taking_part, batch_size=SIZE, augment=augment, mean=data.mean, std=data.std,
        device=CPU, **more,
    )  # fmt: skip


def first(train: TrainBatches) -> Batch:
    streams = Streams(3)
    return next(iter(train.epoch(train.draw(None, 0.0, lambda name: streams.generator(name, 0)))))


def made(
    step: type[StudentStep],
    method: Any,
    teachers: int = 1,
    train: TrainBatches | None = None,
    channels: int | None = None,
) -> StudentStep:
    """The step of a method's settings, with a student of width 6 and teachers of widths 5, 7 and 4.

    `channels`: of the teachers' maps, where the pooled feature is made of something else.
    """
    student = net(6, 0, "group")
    taught = [net(width, 100 + k, "group").eval() for k, width in enumerate((5, 7, 4)[:teachers])]
    shape = (4, 4)
    data: Any = SimpleNamespace(train=train or batches())
    maps = [[(channels or t.feature_dim, *shape)] * 2 for t in taught]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return step(Setup(student, taught, method, Streams(0), CPU, 4, data, [(6, *shape)] * 2, maps)).train()


def terms(step: StudentStep, batch: Batch) -> dict[str, Tensor]:
    """One batch's terms, as the step asks for them."""
    with torch.no_grad():
        lesson = step.lesson([outputs(t, batch.x) for t in step._teachers], batch.y)
    return step.terms(outputs(step.trainable_module, batch.x_mixed), lesson, batch, MOMENT)


def gradients(step: StudentStep, batch: Batch) -> dict[str, Tensor]:
    """The gradient of the weighted sum of a batch's terms for each parameter that is trained."""
    step.zero_grad()
    weights = step.term_weights()
    found = terms(step, batch)
    assert found.keys() == weights.keys()
    sum(weights[name] * value.mean() for name, value in found.items()).backward()
    named = [*step.trainable_module.named_parameters(), *step.own.named_parameters()]
    return {name: p.grad for name, p in named if p.grad is not None}
