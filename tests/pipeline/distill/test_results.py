"""The table at the end of a run."""

import pytest

from pipeline.config import Config
from pipeline.distill.results import print_results


@pytest.mark.parametrize("teachers", [1, 2])
def test_one_teacher_has_no_average(teachers: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config.model_validate({"model": {"teachers": [{"name": "cifar_resnet14"}] * teachers}})
    found = {f"final/teacher_{k}_acc": 60.0 for k in range(teachers)}
    print_results(config, found | {"final/teacher_avg_acc": 61.0, "final/acc_val_selected": 62.0})
    shown = capsys.readouterr().out
    assert ("teachers averaged" in shown, "61.00" in shown) == (teachers > 1,) * 2
    assert "62.00" in shown
