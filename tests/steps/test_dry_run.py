"""DRY_RUN=1 and the environment's shortcuts in every step."""

from __future__ import annotations

import pytest
import yaml

from tests.steps.lab import Lab


@pytest.mark.parametrize(
    ("step", "own"),
    [
        ("main", []),
        ("finetune", []),
        ("distill", []),
        ("baseline", []),
        ("evaluate", ["student=runs:/ab"]),
        ("ablate", ["rungs=l0_baseline,l1_ib", "seeds=0,1"]),
        ("compare", ["runs=a,b"]),
    ],
)
def test_a_dry_run_shows_the_configuration_and_leaves_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, step: str, own: list[str]
) -> None:
    for name, value in {"DRY_RUN": "1", "SEED": "3", "STUDENT": "resnet14", "METHOD": "", "TEACHER_PAIR": ""}.items():
        monkeypatch.setenv(name, value)
    done = lab.step(step, *own)
    assert (done.code, done.new) == (0, []), done.err
    config = yaml.safe_load(done.out)
    assert (config["seed"], config["model"]["student"]["name"]) == (3, "cifar_resnet14")
    assert config["student"] == ("runs:/ab" if step == "evaluate" else None)
    assert done.lines == [
        "model.student.name=cifar_resnet14 model.student.pretrained=false (from the environment: STUDENT)",
        "seed=3 (from the environment: SEED)",
    ]
