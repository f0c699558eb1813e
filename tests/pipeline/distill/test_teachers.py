"""What a fine-tuned teacher depends on: its weights, and the identity by which other runs find them."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.weights import weights_hash
from pipeline.compose import rungs
from pipeline.compose.compose import compose
from pipeline.config import Config
from pipeline.distill import export, networks, teachers
from pipeline.errors import UserError
from pipeline.evaluate import fusions
from pipeline.evaluate.source import Source
from tests.pipeline.training.builders import config, differences, distillation, fine_tuning, image_data, loop_for

STUDENTS_OWN: dict[str, dict[str, Any]] = {
    "grad_clip_norm": {"optim": {"grad_clip_norm": 1e-3}},
    "student's optimiser": {"optim": {"optimizer": "sgd", "student_lr": 0.5, "student_weight_decay": 0.1}},
    "momentum of an optimiser without": {"optim": {"momentum": 0.1}},
    "moving average": {"optim": {"ema_decay": 0.9, "select_weights": "ema"}},
    "A-steps": {"optim": {"a_step_lr": 0.3, "a_step_optimizer": "sgd"}},
    "scaler without AMP": {"optim": {"grad_scaler_init_scale": 2.0, "amp_dtype": "float16"}},
    "schedule": {"schedule": {"lr_warmup_epochs": 1}},
    "method": {"method": {"label_smoothing": 0.3, "mixup_alpha": 0.2, "cutmix_alpha_distill": 1.0, "tau": 2.0}},
    "seed": {"seed": 5},
}


def identity(c: Config) -> str:
    return teachers.identity(c, image_data(), 0)


@pytest.mark.parametrize("case", STUDENTS_OWN)
def test_what_is_the_students_changes_no_fine_tuned_teacher(case: str, tmp_path: Path) -> None:
    plain, other = (config(**{"finetune": {"epochs": 1}, **keys}) for keys in ({}, STUDENTS_OWN[case]))
    trained = []
    for number, c in enumerate((plain, other)):
        task = fine_tuning(c)
        loop_for(task, tmp_path / str(number)).run()
        trained.append(task.net.state_dict())
    assert differences(trained[0], trained[1]) == []
    assert identity(plain) == identity(other)


def test_the_research_preset_shares_its_teachers_with_the_ladder() -> None:
    preset, base = compose("asib_stage"), compose("base")
    assert preset.optim.grad_clip_norm != base.optim.grad_clip_norm
    ladder = rungs.configuration(base, "l3d_adaptive", seed=1)
    assert identity(preset) == identity(base) == identity(ladder)


@pytest.mark.parametrize(
    "changes",
    [
        {"finetune": {"lr": 0.02}},
        {"finetune": {"optimizer": "sgd"}, "optim": {"momentum": 0.1}},
        {"optim": {"use_amp": True}},
        {"augment": {"crop_flip": False}},
        {"dataset": {"val_fraction": 0.5}},
    ],
)
def test_what_changes_its_weights_changes_its_identity(changes: dict[str, Any]) -> None:
    base = config(finetune={"optimizer": changes.get("finetune", {}).get("optimizer", "adamw")})
    assert identity(config(**changes)) != identity(base)


def test_other_sources_make_another_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = identity(config())
    (tmp_path / "models").mkdir()
    (tmp_path / "models/one.py").write_text("x = 1")
    monkeypatch.setattr(teachers, "REPOSITORY", tmp_path)
    assert identity(config()) != before


def test_a_teachers_classes_are_put_in_the_datas_order(tmp_path: Path) -> None:
    """Two files of one teacher, in two orders, are one teacher: the same hash, so the same bank and results."""
    c, data = config(), image_data()
    turned = replace(data, classes=data.classes[::-1])
    made = networks.build_teacher(c, data, 0)
    networks.save(made, tmp_path / "straight.safetensors", c, data)
    with torch.no_grad():
        for parameter in map(made.net.get_parameter, ("fc.weight", "fc.bias")):
            parameter.copy_(parameter.flip(0))
    networks.save(made, tmp_path / "turned.safetensors", c, turned)
    hashes = []
    for name in ("straight", "turned"):
        net = networks.build_teacher(c, data, 0)
        networks.load(net, tmp_path / f"{name}.safetensors", name, data)
        hashes.append(weights_hash(net.net))
    assert hashes[0] == hashes[1] != weights_hash(made.net)


def test_a_teacher_of_other_images_is_refused_with_the_key_that_would_do(tmp_path: Path) -> None:
    c, data = config(), image_data()  # mean 0.5, 0.4, 0.45
    path = tmp_path / "teacher.safetensors"
    networks.save(networks.build_teacher(c, data, 0), path, c, replace(data, mean=(0.5, 0.402, 0.45)))
    one, other = {"name": "cifar_resnet8", "checkpoint": str(path)}, {"name": "cifar_resnet8"}
    given = config(model={"teachers": [one, other]})
    with pytest.raises(UserError, match=r"^model\.teachers\.0\.checkpoint=.*set dataset\.mean=\[0\.5,0\.402,0\.45\]"):
        teachers.validate_early(given, data)
    bare = networks.build_teacher(c, data, 0)
    networks.load(bare, path, "as rounded statistics are", replace(data, mean=(0.5, 0.4015, 0.45)))
    for mean in ((0.5, 0.402, float("nan")), (0.5,)):
        with pytest.raises(ValueError, match="prepared with mean"):
            networks.check_prepared({"mean": list(mean)}, data)
    with pytest.raises(UserError, match="trained on other classes"):
        networks.load(bare, path, "x", replace(data, classes=("a", "b", "c", "x"), mean=(0.5, 0.402, 0.45)))
    torch.save(bare.net.state_dict(), tmp_path / "bare.pth")
    networks.load(bare, tmp_path / "bare.pth", "no record", replace(data, mean=(0.1, 0.1, 0.1)))


def test_a_fusion_of_other_classes_or_images_is_refused(tmp_path: Path) -> None:
    c, data = config(), image_data()
    made, other = (distillation(c, data).fusion for _ in range(2))
    assert made is not None
    assert other is not None
    export.save_fusion(made, tmp_path / "fusion.safetensors", data)
    run: Any = SimpleNamespace(config=c)  # the run that made it is not known
    place = Source(tmp_path / "fusion.safetensors")
    for strange, says in (
        (replace(data, classes=data.classes[::-1]), "other classes, or on these in another order"),
        (replace(data, std=(0.25, 0.25, 0.3)), r"set dataset\.std=\[0\.25,0\.2,0\.3\]"),
    ):
        with pytest.raises(UserError, match=says):
            fusions.load(run, place, other, [], strange)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    fusions.load(run, place, other, [], data)
    assert differences(made.state_dict(), other.state_dict()) == []
