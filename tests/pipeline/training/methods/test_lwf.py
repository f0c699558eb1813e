"""Learning without forgetting: which logits of which images are distilled, against the formula in float64."""

import pytest
import torch
from torch import Tensor

from models.class_view import ClassView
from pipeline.config.methods.lwf import LwfConfig
from pipeline.data.batches import Batch
from pipeline.training.methods.lwf import Lwf
from pipeline.training.rng import Streams
from pipeline.training.step import Setup, Weights
from tests.pipeline.training.builders import CPU, net
from tests.pipeline.training.methods.logit_reference import kl64, relative_error, softmax64, terms_of
from tests.pipeline.training.methods.stepping import MOMENT

OLD, M = 2, 4
S = torch.randn(6, M, generator=torch.Generator().manual_seed(0)) * 2
T = torch.randn(6, M, generator=torch.Generator().manual_seed(1)) * 2
Y = torch.tensor([0, 2, 1, 3, 3, 0])


def step(**keys: object) -> Lwf:
    """The second task of two: the past knows the first two of four classes."""
    past = net(5, 100, "group").eval()
    past.show(ClassView(torch.arange(M), torch.arange(M) < OLD, "masked"))
    data: object = None
    return Lwf(Setup(net(6, 0, "group"), [past], LwfConfig.model_validate(keys), Streams(0), CPU, M, data)).train()  # type: ignore[arg-type]


def loop(logits: str, samples: str, tau: float) -> Tensor:
    """tau^2 KL of each image over the wanted classes; the past gives new classes probability 0."""
    found = []
    for s, t, y in zip(S, T, Y, strict=True):
        if (samples == "new" and y < OLD) or (samples == "old" and y >= OLD):
            found.append(torch.zeros((), dtype=torch.float64))
            continue
        p = softmax64(t[:OLD], tau)
        if logits == "all":
            p = torch.cat([p, torch.zeros(M - OLD, dtype=torch.float64)])
        q = softmax64(s[: len(p)], tau)
        found.append(tau**2 * kl64(p, q))
    return torch.stack(found)


@pytest.mark.parametrize("samples", ["all", "new", "old"])
@pytest.mark.parametrize("logits", ["old", "all"])
def test_terms_are_those_of_the_formula(logits: str, samples: str) -> None:
    made = step(logits=logits, samples=samples, tau=2.0)
    past = made._teachers[0].view(T)
    found = terms_of(made, S, [past], Y)["lwf"]
    assert relative_error(found, loop(logits, samples, 2.0)) < 1e-6


def test_new_classes_get_no_gradient_unless_they_are_compared() -> None:
    for logits, moved in (("old", False), ("all", True)):
        s = S.clone().requires_grad_()
        made = step(logits=logits)
        terms_of(made, s, [made._teachers[0].view(T)], Y)["lwf"].sum().backward()
        assert s.grad is not None
        assert bool((s.grad[:, OLD:] != 0).any()) == moved
        assert (s.grad[:, :OLD] != 0).any()


def test_a_batch_goes_through_the_step_that_all_methods_share() -> None:
    x = torch.randn((6, 3, 8, 8), generator=torch.Generator().manual_seed(5))
    batch = Batch(x, x, Y, Y, torch.ones(()), torch.arange(6), slice(0, 6), 6, None, None)
    made = step(samples="new")
    made.begin_epoch(Weights(1.0))
    out = made(batch, MOMENT)
    assert out["loss"].item() == pytest.approx((out["ce"] + 0.75 * out["lwf"]).item(), rel=1e-6)
