"""Factor transfer as a run: the paraphraser's epochs come first, and train nothing else; a stopped run resumes."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import models.cifar  # noqa: F401  registers the networks
from models.features import FeatureNet
from pipeline.config.schema import configure
from pipeline.training.methods.ft import FactorTransfer
from tests.pipeline.training.builders import CLASSES, CPU, Record, copied, differences, image_data, loop_for, run_until

EPOCHS = 3


def task(**method: Any) -> FactorTransfer:
    keys = {"name": "ft", "student_epochs_per_stage": (1, 1), "num_stages": 2, "paraphraser_epochs": EPOCHS}
    config = configure(
        {
            "dataset": {"batch_size": 12, "eval_batch_size": 24, "val_fraction": 0.25},
            "model": {"teachers": [{"name": "cifar_resnet14"}]},
            "method": keys | method,
            "optim": {"optimizer": "sgd", "student_lr": 0.01},
            "device": "cpu",
        }
    )
    torch.manual_seed(0)
    student, teacher = (
        FeatureNet(timm.create_model(name, num_classes=CLASSES)) for name in ("cifar_resnet8", "cifar_resnet14")
    )
    return FactorTransfer(config, image_data(), student, [teacher], CPU)


def test_the_paraphraser_learns_first_and_alone(tmp_path: Path) -> None:
    made = task()
    assert [(e.phase, e.overall) for e in made.plan] == [("paraphrase", i) for i in range(EPOCHS)] + [
        ("b", 3),
        ("b", 4),
    ]
    student, translator, paraphraser = made.student, made.b_step.own["translator"], made.b_step.paraphraser
    before, record = (copied(student), copied(translator), copied(paraphraser)), Record()
    loop = run_until(made, tmp_path / "a", (EPOCHS, 0), record)
    assert not differences(before[0], copied(student))
    assert not differences(before[1], copied(translator))
    assert len(differences(before[2], copied(paraphraser))) == 12, "weight and bias of six layers"
    losses = record.series("paraphraser/loss")
    assert losses == sorted(losses, reverse=True)
    learned = copied(paraphraser)
    loop.stop = lambda: 0
    loop.run()
    assert not differences(learned, copied(paraphraser)), "the student's phase leaves it alone"
    assert differences(before[0], copied(student))
    assert differences(before[1], copied(translator))
    assert len(record.series("b_step/ft")) == 2
    images = made.costs.images
    assert (images["student"], images["paraphraser"]) == (2 * 36, 5 * 36)


@pytest.mark.step
@pytest.mark.parametrize("at", [(1, 1), (EPOCHS, 2)])
def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path: Path, at: tuple[int, int]) -> None:
    whole, first, second = Record(), Record(), Record()
    undisturbed = loop_for(task(), tmp_path / "whole", whole)
    undisturbed.run()
    state = run_until(task(), tmp_path / "cut", at, first).state_dict()
    resumed = loop_for(task(), tmp_path / "cut", second)
    resumed.load_state_dict(state)
    resumed.run()
    assert not differences(undisturbed.task.state_dict(), resumed.task.state_dict())
    assert whole.rows == first.rows + second.rows


def test_without_distillation_there_is_no_paraphraser() -> None:
    made = task(kd_alpha=0.0)
    assert {e.phase for e in made.plan} == {"b"}
    assert set(made.phases) == {"b"}
