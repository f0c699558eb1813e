"""Which classes come in which task."""

import pytest

from pipeline.config.continual import ContinualConfig
from pipeline.data.tasks import class_order, class_tasks
from pipeline.errors import UserError


def test_the_published_order_is_that_of_the_tables() -> None:
    """The first and last classes of CIFAR-100 in the option files of iCaRL, PODNet and PyCIL (seed 1993)."""
    order = class_order(ContinualConfig(num_tasks=10), 100)
    assert order[:10] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert order[-5:] == [67, 29, 49, 57, 33]
    assert sorted(order) == list(range(100))


def test_orders_by_seed_differ_and_stay() -> None:
    first, second = (class_order(ContinualConfig(num_tasks=2, order="seed", order_seed=s), 20) for s in (0, 1))
    assert first != second
    assert first == class_order(ContinualConfig(num_tasks=5, order="seed", order_seed=0), 20)


def test_tasks_divide_the_classes() -> None:
    tasks = class_tasks(ContinualConfig(num_tasks=6, base_classes=50, order="identity"), 100)
    assert [len(task) for task in tasks] == [50, 10, 10, 10, 10, 10]
    assert tasks[1] == tuple(range(50, 60))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_tasks": 3}, "continual.num_tasks=3 does not divide 20 classes equally: give 2, 4, 5, 10 or 20 tasks"),
        (
            {"num_tasks": 4, "base_classes": 10},
            "continual.base_classes=10 leaves 10 of 20 classes for 3 tasks equally: give 2, 3, 6 or 11 tasks",
        ),
        (
            {"num_tasks": 2, "base_classes": 20},
            "continual.base_classes=20 leaves 0 of 20 classes for 1 tasks: lower it",
        ),
        ({"num_tasks": 2, "order": (1, 0)}, "continual.order names 2 classes, and the data has 20: name each once"),
    ],
)
def test_what_cannot_be_divided_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as error:
        class_tasks(ContinualConfig.model_validate(given), 20)
    assert str(error.value) == said
