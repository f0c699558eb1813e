"""The methods on feature maps as short runs of real networks: they train, in half precision too, and resume."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import models.cifar  # noqa: F401  registers the networks
from models.features import FeatureNet
from pipeline.config.schema import configure
from pipeline.training.student import Distillation, task_of
from tests.pipeline.training.builders import CLASSES, CPU, Record, copied, differences, image_data, loop_for, run_until

pytestmark = pytest.mark.step  # a run each
NAMES = ("at", "fitnet", "ft", "nst", "reviewkd", "sp", "vid")
STUDENT, TEACHER = "cifar_resnet8", "cifar_wrn_16_2"


def task(name: str, optim: dict[str, Any] | None = None, **method: Any) -> Distillation:
    keys: dict[str, Any] = {"name": name, "student_epochs_per_stage": (2,), "kd_view": "mixed"}
    keys |= {"paraphraser_epochs": 1} if name == "ft" else {}
    config = configure(
        {
            "dataset": {"batch_size": 12, "eval_batch_size": 24, "val_fraction": 0.25},
            "model": {"teachers": [{"name": TEACHER}]},
            "method": keys | method,
            "optim": {"optimizer": "sgd", "student_lr": 0.001, **(optim or {})},
            "device": "cpu",
        }
    )
    torch.manual_seed(0)
    student, teacher = (FeatureNet(timm.create_model(net, num_classes=CLASSES)) for net in (STUDENT, TEACHER))
    return task_of(config.method)(config, image_data(), student, [teacher], CPU)


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_ends_as_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    """What the method trains beside the student is trained, and part of the checkpoint."""
    made, whole, first, second = task(name, cutmix_alpha_distill=1.0), Record(), Record(), Record()
    before = copied(made.b_step.own)
    undisturbed = loop_for(made, tmp_path / "whole", whole)
    undisturbed.run()
    unmoved = before.keys() - {path.strip("/") for path in differences(before, copied(made.b_step.own))}
    assert not unmoved
    terms = whole.series(f"b_step/{name}")
    assert len(terms) == 2
    assert all(torch.isfinite(torch.tensor(terms)))
    assert sum(whole.series("train/nonfinite_steps")) == 0
    at = (len(made.plan) - 1, 1)
    state = run_until(task(name, cutmix_alpha_distill=1.0), tmp_path / "cut", at, first).state_dict()
    resumed = loop_for(task(name, cutmix_alpha_distill=1.0), tmp_path / "cut", second)
    resumed.load_state_dict(state)
    resumed.run()
    assert not differences(undisturbed.state_dict(), resumed.state_dict())
    assert whole.rows == first.rows + second.rows


@pytest.mark.parametrize(
    ("preact", "preacts"), [("teacher", (False, True)), ("both", (True, True)), ("none", (False, False))]
)
def test_reviewkd_takes_the_maps_before_relu_of_whom_its_key_says(preact: str, preacts: tuple[bool, bool]) -> None:
    made, x = task("reviewkd", preact=preact), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for net, before in zip((made.student.eval(), made.teachers[0]), preacts, strict=True):
        found, expected = net(x).maps, net.net.forward_intermediates(x, preact=before)[1]
        other = net.net.forward_intermediates(x, preact=not before)[1]
        for a, b, c in zip(found, expected, other, strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, c)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_half_precision_gives_nearly_the_same_terms(name: str, amp_dtype: str, tmp_path: Path) -> None:
    found = []
    for optim in ({}, {"use_amp": True, "amp_dtype": amp_dtype}):
        record = Record()
        loop_for(task(name, optim, student_epochs_per_stage=(1,)), tmp_path / f"{bool(optim)}", record).run()
        assert sum(record.series("train/nonfinite_steps")) == 0
        found.append(record.series(f"b_step/{name}")[0])
    assert found[1] == pytest.approx(found[0], rel=0.1)
