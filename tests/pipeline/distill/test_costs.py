"""A run's multiply-accumulates against numbers counted by hand from the networks' shapes."""

from collections import Counter
from collections.abc import Callable
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
from tests.pipeline.training.builders import CLASSES, CPU, config, distillation, image_data, loop_for

TRAIN, VAL = 36, 12
"""Images of the builders' data with a quarter held out."""
RESNET8, WRN_16_2 = ((16, 8), (32, 4), (64, 2)), ((32, 8), (64, 4), (128, 2))
"""Channels and side of the stages' maps, for images of 8×8."""


def task(name: str, teachers: int, **method: Any) -> Distillation:
    c = configure(
        {
            "dataset": {"batch_size": 12, "eval_batch_size": 24, "val_fraction": 0.25},
            "model": {"teachers": [{"name": "cifar_wrn_16_2"}] * teachers},
            "method": {"name": name, "num_stages": 1, "student_epochs_per_stage": (2,), **method},
            "optim": {"optimizer": "sgd", "student_lr": 0.01},
            "device": "cpu",
        }
    )
    torch.manual_seed(0)
    nets = ("cifar_resnet8", *["cifar_wrn_16_2"] * teachers)
    student, *taught = (FeatureNet(timm.create_model(net, num_classes=CLASSES)) for net in nets)
    return task_of(c.method)(c, image_data(), student, taught, CPU)


def costs_of(made: Distillation, folder: Path) -> dict[str, float]:
    loop_for(made, folder / "run").run()
    counted = made.costs.metrics()
    return counted | macs_found(made, image_data(), counted)


def hint() -> dict[str, int]:
    """The second stage through a 1×1 convolution."""
    (c_s, side), (c_t, _) = RESNET8[1], WRN_16_2[1]
    return {"regressor": side**2 * c_s * c_t}


def contrast() -> dict[str, int]:
    """Embeddings of 16 numbers, each compared with the other network's of all training images."""
    return {"embed_student": 64 * 16, "embed_teacher": 128 * 16, "memory": 2 * TRAIN * 16}


def projections() -> dict[str, int]:
    """The last stage through a 1×1 convolution for each of two teachers."""
    (c_s, side), (c_t, _) = RESNET8[2], WRN_16_2[2]
    return {f"projector_{k}": side**2 * c_s * c_t for k in range(2)}


@pytest.mark.parametrize(
    ("name", "teachers", "method", "own"),
    [
        ("kd", 1, {}, dict),
        ("fitnet", 1, {}, hint),
        ("crd", 1, {"embed_dim": 16, "negatives": 8}, contrast),
        ("ca_mkd", 2, {"kd_cooldown_epochs": 1}, projections),
    ],
)
def test_own_modules_are_counted(
    name: str, teachers: int, method: dict[str, Any], own: Callable[[], dict[str, int]], tmp_path: Path
) -> None:
    found, modules = costs_of(task(name, teachers, **method), tmp_path), own()
    distilled = TRAIN * (2 - method.get("kd_cooldown_epochs", 0))
    assert {k: found[f"cost/macs_per_image/{k}"] for k in modules} == modules
    assert {found[f"cost/forward_images/{k}"] for k in modules} <= {distilled}
    macs = {k: found[f"cost/macs_per_image/{k}"] for k in ("student", "teacher_0")}
    total = 3 * (2 * TRAIN * macs["student"] + distilled * sum(modules.values()))
    total += distilled * teachers * macs["teacher_0"]
    total += 2 * VAL * macs["student"]  # the better epoch is kept
    assert found["cost/gmacs"] == pytest.approx(total / 1e9, rel=1e-12)


def test_a_paraphraser_is_trained_alone(tmp_path: Path) -> None:
    """Three 3×3 convolutions each: encoder and decoder of the teacher's last map, translator of the student's."""
    found = costs_of(task("ft", 1, paraphraser_epochs=3, paraphraser_ratio=0.5), tmp_path)
    (c_s, side), (c_t, _) = RESNET8[2], WRN_16_2[2]
    half = c_t // 2
    macs = {
        "paraphraser": 9 * side**2 * (c_t * c_t + c_t * half + half * half),
        "translator": 9 * side**2 * (c_s * c_s + c_s * half + half * half),
    }
    macs["reconstruction"] = macs["paraphraser"]
    assert {k: found[f"cost/macs_per_image/{k}"] for k in macs} == macs
    student, teacher = (found[f"cost/macs_per_image/{k}"] for k in ("student", "teacher_0"))
    total = 3 * TRAIN * (teacher + 3 * (macs["paraphraser"] + macs["reconstruction"]))
    total += 2 * TRAIN * (teacher + macs["paraphraser"] + 3 * (student + macs["translator"]))
    assert found["cost/gmacs"] == pytest.approx((total + 2 * VAL * student) / 1e9, rel=1e-12)


@pytest.mark.parametrize(
    ("method", "passes", "monitored"),
    [
        # before the first A-step, and after each of four B-epochs; the synergy after each of four A-epochs
        ({}, {"student": 5, "teacher_0": 1, "teacher_1": 1, "fusion": 4}, {"fusion": 4}),
        # only the last epoch of a step is judged
        ({"teacher_eval_every": 9}, {"student": 5, "teacher_0": 1, "teacher_1": 1, "fusion": 2}, {"fusion": 2}),
        # teachers that change: after each A-epoch, and with the snapshot of each step for a gate relative to them
        (
            {"use_teacher_finetuning": True, "teacher_ce_alpha": 1.0, "enable_kd_after_syn_acc": "avg-0.9"},
            {"student": 5, "teacher_0": 6, "teacher_1": 6, "fusion": 4},
            {"teacher_0": 1, "teacher_1": 1, "fusion": 4},
        ),
        ({"kd_target": "avg"}, {"student": 4}, {"teacher_0": 1, "teacher_1": 1}),
    ],
)
def test_what_the_gate_asks_is_counted(
    method: dict[str, Any], passes: dict[str, int], monitored: dict[str, int], tmp_path: Path
) -> None:
    """All passes that are really made over the validation images, but those that decide nothing.

    Args:
        monitored: the latter: the synergy's in B-epochs, the teachers' for their accuracies.
    """
    made, real = distillation(config(method=method)), Counter[str]()
    nets = {"student": made.student, "fusion": made.fusion} | {f"teacher_{k}": t for k, t in enumerate(made.teachers)}
    for name, net in nets.items():
        if net is not None:
            net.register_forward_pre_hook(lambda _, args, name=name: real.update({name: len(args[0])}))
    loop_for(made, tmp_path / "run").run()
    counted = made.costs.metrics()
    real.subtract({name: int(counted[f"cost/forward_images/{name}"]) for name in real})
    assert real == {k: VAL * (passes.get(k, 0) + monitored.get(k, 0)) for k in real}
    found = macs_found(made, image_data(), counted)
    macs, b = {k: found[f"cost/macs_per_image/{k}"] for k in real}, 4 * TRAIN
    total = sum(macs[k] * (VAL * passes.get(k, 0) + counted[f"cost/forward_images/{k}"]) for k in real)
    trained = {"student": b} | ({"fusion": b} if "fusion" in real else {})
    trained |= {k: b for k in real if k.startswith("teacher") and method.get("use_teacher_finetuning")}
    total += 2 * sum(macs[k] * n for k, n in trained.items())
    assert found["cost/gmacs"] == pytest.approx(total / 1e9, rel=1e-12)


def test_without_validation_nothing_is_chosen(tmp_path: Path) -> None:
    made = distillation(config(dataset={"val_fraction": 0.0}, method={"kd_target": "avg"}))
    loop_for(made, tmp_path / "run").run()
    found = macs_found(made, image_data(), made.costs.metrics())
    student, *teachers = (found[f"cost/macs_per_image/{k}"] for k in ("student", "teacher_0", "teacher_1"))
    assert found["cost/gmacs"] == pytest.approx(4 * 48 * (3 * student + sum(teachers)) / 1e9, rel=1e-12)
