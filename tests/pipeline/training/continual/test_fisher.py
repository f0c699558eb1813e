"""The Fisher information against a float64 loop over images, and the penalty against one anchor for each task."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.class_view import ClassView
from pipeline.training.continual.fisher import Consolidation, Kind, fisher


def net() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    layers = nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    assert norm.running_mean is not None
    norm.running_mean.normal_()
    return nn.Sequential(*layers).eval()


def images(n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(x.split(23), y.split(23), strict=True)


SEEN = ClassView(torch.tensor([4, 0, 2]))


def loop(x: Tensor, y: Tensor, kind: Kind) -> dict[str, Tensor]:
    """One image at a time, its gradient by backward, in float64, from the definition."""
    model = net().double()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, label in zip(x.double(), y, strict=True):
        log_p = F.log_softmax(model(image[None])[0, [4, 0, 2]], dim=0)
        asked = [(1.0, int(label))] if kind == "empirical" else [(p, k) for k, p in enumerate(log_p.exp().tolist())]
        for share, k in asked:
            slopes = torch.autograd.grad(log_p[k], list(model.parameters()), retain_graph=True)
            for name, slope in zip(total, slopes, strict=True):
                total[name] += share * slope**2
    return {name: value / len(x) for name, value in total.items()}


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_fisher_is_that_of_a_loop_over_images(kind: Kind) -> None:
    x, y = images()
    found = fisher(net(), SEEN, batches(x, y), kind, torch.Generator())
    for name, expected in loop(x, y, kind).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-9)


def test_sampled_labels_approach_the_exact_information() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    x, y = torch.randn(20, 6), torch.zeros(20, dtype=torch.int64)
    many = batches(x.repeat(150, 1), y.repeat(150))
    found = fisher(linear, SEEN, many, "sampled", torch.Generator().manual_seed(0))
    exact = fisher(linear, SEEN, batches(x, y), "exact", torch.Generator())
    for name in exact:
        assert (found[name] - exact[name]).norm() < 0.1 * exact[name].norm(), name


def test_squares_are_of_single_images_not_of_a_batchs_mean() -> None:
    """Two opposite images cancel in the mean of a batch, and not in the mean of squares."""
    linear = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(linear.weight)
    x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0])
    view = ClassView(torch.tensor([0, 1]))
    found = fisher(linear, view, iter([(x, y)]), "empirical", torch.Generator())["weight"]
    assert torch.allclose(found, torch.full((2, 1), 0.25))  # (1 - p)^2 x^2 and p^2 x^2 at p = 1/2


def test_columns_of_unseen_classes_have_no_information() -> None:
    found = fisher(net(), SEEN, batches(*images()), "exact", torch.Generator())["4.weight"]
    assert (found[[1, 3]] == 0).all()
    assert (found[[0, 2, 4]].sum(dim=1) > 0).all()


def test_the_penalty_of_several_tasks_has_one_anchor_for_each() -> None:
    """Three tasks with anchors of their own: value and gradient are those of the sum over tasks, in float64."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Linear(6, 3)
    past, kept = [], Consolidation()
    for _ in range(3):
        weights = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
        found = {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}
        found["bias"][0] = 0  # a weight that no task has information on
        past.append((found, weights))
        kept = kept.with_task(found, weights)
    loss = kept.penalty(model, 7.0)
    loss.backward()  # type: ignore[no-untyped-call]
    twin = nn.Linear(6, 3).double()
    twin.load_state_dict(model.state_dict())
    terms = [
        (found[name].double() * (p - weights[name].double()) ** 2).sum()
        for found, weights in past
        for name, p in twin.named_parameters()
    ]
    expected = 7.0 / 2 * torch.stack(terms).sum()
    expected.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-5)


def test_consolidating_a_task_leaves_earlier_anchors_as_they_were() -> None:
    weights = {"w": torch.tensor([1.0])}
    first = Consolidation().with_task({"w": torch.tensor([2.0])}, weights)
    weights["w"] += 5  # training goes on in place
    first.with_task({"w": torch.tensor([2.0])}, weights)
    assert first.anchor["w"].item() == 1
