"""What a network says of classes that it was not taught, in float64 against the definitions."""

import pytest
import torch

from models.class_view import ClassView
from tests.pipeline.training.builders import softmax

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 3.0, -4.0], [0.0, 30.0, -30.0, 1.0, 2.0]], dtype=torch.float64)


def test_of_untaught_classes_uniform_says_one_in_all_and_divides_the_rest_as_before() -> None:
    known = torch.tensor([True, False, True, True, False])
    found = ClassView(torch.arange(5), known, "uniform")(LOGITS).softmax(1)
    for row, logits in zip(found.tolist(), LOGITS.tolist(), strict=True):
        among = dict(zip((0, 2, 3), softmax([logits[i] for i in (0, 2, 3)]), strict=True))
        assert row == pytest.approx([among[i] * 3 / 5 if i in among else 1 / 5 for i in range(5)], rel=1e-6)


@pytest.mark.parametrize("tau", [1.0, 4.0, 100.0])
def test_of_masked_classes_it_never_speaks_at_any_temperature(tau: float) -> None:
    known = torch.tensor([False, True, True, False, True])
    found = (ClassView(torch.arange(5), known, "masked")(LOGITS) / tau).softmax(1)
    for row, logits in zip(found.tolist(), LOGITS.tolist(), strict=True):
        among = dict(zip((1, 2, 4), softmax([logits[i] for i in (1, 2, 4)], tau), strict=True))
        assert row == pytest.approx([among.get(i, 0.0) for i in range(5)], rel=1e-9, abs=1e-12)


def test_columns_are_those_asked_for_in_order() -> None:
    assert ClassView(torch.tensor([3, 0]))(LOGITS).tolist() == [[3.0, 2.0], [1.0, 0.0]]
