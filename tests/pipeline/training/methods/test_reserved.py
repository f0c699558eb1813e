"""Names that a method must not take: those of the step's own terms and parts of lessons."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import methods
from pipeline.config.methods.base import RESERVED
from pipeline.config.methods.kd import KdConfig
from pipeline.errors import UserError
from pipeline.training.methods.kd import Kd
from pipeline.training.step import Weights
from tests.pipeline.training.methods.stepping import MOMENT, batches, first, made


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        ("name: str = 'plus'", "plus"),
        ("term_weights = property(lambda self: {'mine': 1.0, 'weight': 1.0})", "weight"),
        ("term_weights = property(lambda self: {'loss': 1.0})", "loss"),
        ("term_weights = property(lambda self: {'mine': 1.0})", None),
    ],
)
def test_a_method_whose_term_has_such_a_name_is_refused_as_its_settings_are_read(
    body: str, taken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"taking_{taken}"
    text = f"from pipeline.config.methods.base import MethodConfig\nclass Mine(MethodConfig):\n    {body}\n"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    if taken is None:
        assert methods.settings("mine", name).__name__ == "Mine"
        return
    with pytest.raises(UserError) as caught:
        methods.settings("mine", name)
    assert str(caught.value) == (
        f"method.module={name}: it names a term {taken}, which is a name of the step's own: rename it"
    )


def test_no_method_of_this_repository_takes_one() -> None:
    for name in methods.names():
        assert RESERVED.isdisjoint(methods.settings(name)().term_weights)


@pytest.mark.parametrize("part", ["weight", "plus"])
def test_a_lesson_with_such_a_part_is_refused(part: str) -> None:
    """It would be taken for the weights of samples, or for the target of `plus`."""

    class Taking(Kd):
        def lesson(self, seen: Any, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return super().lesson(seen, y) | {part: torch.zeros(len(y), 4)}

    step = made(Taking, KdConfig())
    step.begin_epoch(Weights(1.0))
    with pytest.raises(
        UserError, match=f"^method=kd: its lesson has a part named {part}, which is a name of the step's"
    ):
        step(first(batches()), MOMENT)
