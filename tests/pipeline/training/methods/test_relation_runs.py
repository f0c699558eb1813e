"""Relational and multi-teacher methods as short runs of real networks: they train, and resume bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import models.cifar  # noqa: F401  registers the networks
from models.features import FeatureNet
from pipeline.config.schema import configure
from pipeline.distill.costs import macs_found
from pipeline.training.student import Distillation, task_of
from tests.pipeline.training.builders import CLASSES, CPU, Record, copied, differences, image_data, loop_for, run_until

pytestmark = pytest.mark.step  # a run each
TEACHERS = ("cifar_wrn_16_2", "cifar_resnet14", "cifar_resnet8")
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "rkd": ({}, 1),
    "pkt": ({"kd_alpha": 100.0}, 1),
    "cc": ({"embed_dim": 9}, 1),
    "crd": ({"embed_dim": 9, "negatives": 20}, 1),
    "itrd": ({}, 1),
    "ca_mkd": ({}, 3),
    "fitnet_mkd": ({"plus": ("kd",)}, 2),
    "mmkd": ({"meta_interval": 2, "buffer_size": 16}, 2),
}
"""Method -> its keys and how many teachers."""


def task(name: str, optim: dict[str, Any] | None = None, **method: Any) -> Distillation:
    keys, count = RUNS[name]
    config = configure(
        {
            "dataset": {"batch_size": 12, "eval_batch_size": 24, "val_fraction": 0.25},
            "model": {"teachers": [{"name": teacher} for teacher in TEACHERS[:count]]},
            "method": {"name": name, "student_epochs_per_stage": (2,), "kd_view": "mixed", **keys, **method},
            "optim": {"optimizer": "sgd", "student_lr": 0.001, **(optim or {})},
            "device": "cpu",
        }
    )
    torch.manual_seed(0)
    networks = [FeatureNet(timm.create_model(net, num_classes=CLASSES)) for net in ("cifar_resnet8", *TEACHERS[:count])]
    return task_of(config.method)(config, image_data(), networks[0], networks[1:], CPU)


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_ends_as_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    """Own modules and CRD's memory, Z and negatives included; everything of its own has moved."""
    made, whole, first, second = task(name, mixup_alpha=1.0), Record(), Record(), Record()
    before = copied(made.b_step.own)
    undisturbed = loop_for(made, tmp_path / "whole", whole)
    undisturbed.run()
    unmoved = before.keys() - {path.strip("/") for path in differences(before, copied(made.b_step.own))}
    assert not unmoved
    for term in made.b_step.term_weights():
        assert torch.isfinite(torch.tensor(whole.series(f"b_step/{term}"))).tolist() == [True, True]
    assert sum(whole.series("train/nonfinite_steps")) == 0
    state = run_until(task(name, mixup_alpha=1.0), tmp_path / "cut", (1, 1), first).state_dict()
    resumed = loop_for(task(name, mixup_alpha=1.0), tmp_path / "cut", second)
    resumed.load_state_dict(state)
    resumed.run()
    assert not differences(undisturbed.state_dict(), resumed.state_dict())
    assert whole.rows == first.rows + second.rows


@pytest.mark.parametrize("name", RUNS)
def test_half_precision_gives_nearly_the_same_terms(name: str, tmp_path: Path) -> None:
    found = []
    for optim in ({}, {"use_amp": True, "amp_dtype": "bfloat16"}):
        record = Record()
        made = task(name, optim, student_epochs_per_stage=(1,))
        loop_for(made, tmp_path / f"{bool(optim)}", record).run()
        assert sum(record.series("train/nonfinite_steps")) == 0
        found.append([record.series(f"b_step/{term}")[0] for term in made.b_step.term_weights()])
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_samples_behind_the_gate_are_not_written_into_crds_memory(tmp_path: Path) -> None:
    made = task("crd", kd_sample_gate=True, kd_sample_thr=0.0, kd_sample_min_ratio=0.25, student_epochs_per_stage=(1,))
    before = copied(made.b_step.own)["memory.teacher"]
    loop_for(made, tmp_path, Record()).run()
    moved = (copied(made.b_step.own)["memory.teacher"] != before).any(dim=1)
    assert int(moved.sum()) == len(moved) // 4


def test_mmkds_virtual_steps_are_part_of_its_cost(tmp_path: Path) -> None:
    """36 images in three batches, the first and the last of which are followed by two steps, a third and a look."""
    made = task("mmkd", student_epochs_per_stage=(1,))
    loop_for(made, tmp_path, Record()).run()
    expected = {"student": 36 + 4 * 24, "projectors": 36 + 2 * 24, "teacher_0": 36 + 24, "teacher_1": 36 + 24}
    assert made.costs.images == expected
    found = macs_found(made, image_data(), made.costs.metrics())
    names = ("student", "projectors", "teacher_0", "teacher_1")
    student, projectors, *teachers = (found[f"cost/macs_per_image/{net}"] for net in names)
    # an update is three, a virtual step nine, the loss after them three; then the validation images
    passes = 3 * 36 + (3 * 9 + 3) * 24 + 12
    expected_macs = passes * student + (84 + 2 * 36) * projectors + 60 * sum(teachers)
    assert found["cost/gmacs"] == pytest.approx(expected_macs / 1e9)
