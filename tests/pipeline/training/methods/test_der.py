"""Dark experience replay++: squared differences to kept logits, of kept images only, against a float64 loop."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from models.features import Features
from pipeline.config.methods.der import DerConfig
from pipeline.data.batches import Batch
from pipeline.training.methods.der import Der
from pipeline.training.rng import Streams
from pipeline.training.run_data import Scope
from pipeline.training.step import Setup
from tests.pipeline.training.builders import CPU, net
from tests.pipeline.training.methods.stepping import MOMENT

CLASSES = (5, 1, 0, 3)  # of six; 5 was seen in the first task, 1 in the second
KEPT = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
S = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
INDEX = torch.tensor([20, 7, 3, 9, 11, 7])  # images 7, 9 and 20 are kept, one of them twice in the batch


def found(logits: str, share: float | None) -> Tensor:
    scope = Scope(CLASSES, (0, 3), torch.tensor([7, 20, 9]), KEPT, torch.tensor([1, 2, 1]), share)
    train = SimpleNamespace(labels=torch.zeros(30, dtype=torch.int64), order=range(12))
    data: object = SimpleNamespace(scope=scope, train=train)
    method = DerConfig.model_validate({"logits": logits})
    step = Der(Setup(net(6, 0, "group"), [], method, Streams(0), CPU, 4, data))  # type: ignore[arg-type]
    y = torch.zeros(6, dtype=torch.int64)
    x = torch.zeros(6, 3, 8, 8)
    batch = Batch(x, x, y, y, torch.ones(()), INDEX, slice(0, 6), 6, None, None)
    return step.terms(Features(S, S, x, None), {}, batch, MOMENT)["der"]


@pytest.mark.parametrize("logits", ["all", "old"])
def test_terms_are_those_of_the_formula(logits: str) -> None:
    expected = []
    rows = {7: (0, 1), 20: (1, 2), 9: (2, 1)}  # image -> its row in memory, classes seen when it was kept
    for s, image in zip(S.double(), INDEX.tolist(), strict=True):
        if image not in rows:
            expected.append(0.0)
            continue
        row, seen = rows[image]
        wanted = range(4) if logits == "all" else range(seen)
        differences = [float(s[k] - KEPT[row, CLASSES[k]].double()) ** 2 for k in wanted]
        expected.append(sum(differences) / len(differences) / (4 / 6))  # four of the batch's six are kept ones
    assert found(logits, 0.5).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_mean_over_a_batch_is_that_over_its_kept_images() -> None:
    values = (S[[0, 1, 3, 5]] - KEPT[[1, 0, 2, 0]][:, list(CLASSES)]).square().mean(dim=1)
    assert torch.allclose(found("all", 0.5).mean(), values.mean())


def test_new_images_have_no_gradient() -> None:
    (slope,) = torch.autograd.grad(found("all", 0.5).sum(), S)
    assert slope.abs().sum(dim=1).gt(0).tolist() == [True, True, False, True, False, True]
