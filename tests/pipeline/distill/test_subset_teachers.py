"""Teachers that are taught some of the classes: what they see, what of their head moves, who they are afterwards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from models.features import FeatureNet
from models.weights import read_state
from pipeline.config import Config, config_hash, configure
from pipeline.config.identity import computation
from pipeline.distill import bank, networks, teachers, train
from pipeline.errors import UserError
from pipeline.runs.opening import open_run
from pipeline.training.costs import Costs
from tests.pipeline.training.builders import differences, distillation

LR, DECAY = 0.01, 0.5
STEADY = {"type": "step", "milestones": [100]}


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    """Two teachers to be fine-tuned on 4 classes of 8 images, all of whose pixels are 50 times their class."""
    labels = np.arange(32) % 4
    images = np.broadcast_to((50 * labels).astype(np.uint8)[:, None, None, None], (32, 16, 16, 3))
    np.savez(tmp_path / "data.npz", x_train=images, x_test=images[:12], y_train=labels, y_test=labels[:12])
    return {
        "output_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "threads": 1,
        "log_model": False,
        "dataset": {"name": "npz", "path": str(tmp_path / "data.npz"), "batch_size": 8, "val_fraction": 0.25},
        "model": {"student": {"name": "cifar_resnet8"}, "teachers": [{"name": "cifar_resnet8"}] * 2},
        "method": {"student_epochs_per_stage": [1], "kd_alpha": 0.5, "kd_target": "avg"},
        "augment": {"crop_flip": False},
        "finetune": {"epochs": 2, "lr": LR, "weight_decay": DECAY, "schedule": STEADY},
        "tracking": {"mode": "offline"},
    }


def with_model(keys: dict[str, Any], classes: Any = ((), ()), **model: Any) -> Config:
    specs = [{"name": "cifar_resnet8", "classes": each} for each in classes]
    return configure({**keys, "model": {**keys["model"], "teachers": specs, **model}})


def test_it_sees_its_own_classes_only_and_keeps_the_rest_of_its_head(plain: dict[str, Any]) -> None:
    plain["dataset"]["val_fraction"] = 0
    config, own = with_model(plain, [(1, 3), ()]), [1, 3]
    data = train.images(config)
    before = {k: v.clone() for k, v in networks.build_teacher(config, data, 0).net.state_dict().items()}
    seen, updates = set(), 0

    def look(module: Any, args: Any) -> None:
        nonlocal updates
        if isinstance(module, FeatureNet):
            pixels = 255 * (args[0][:, 0] * data.std[0] + data.mean[0])
            seen.update((pixels / 50).round().long().unique().tolist())
            updates += module.training

    run = open_run("finetune", config)
    hook = register_module_forward_pre_hook(look)
    try:
        results = teachers.finetune(run, 0)
    finally:
        hook.remove()
    run.close()
    assert seen == set(own), "of training and test images"
    after = read_state(teachers.store(config, data, 0))
    kept = (1 - LR * DECAY) ** updates
    assert updates == 4
    for name in ("fc.weight", "fc.bias"):
        torch.testing.assert_close(after[name][[0, 2]], kept * before[name][[0, 2]], rtol=1e-5, atol=1e-9)
        assert (after[name][own] - kept * before[name][own]).abs().min() > 1e-4
    net = networks.build_teacher(config, data, 0).eval()
    networks.load(net, teachers.store(config, data, 0), "its own", data)
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    right = [
        own[int(net((x[None] / 255 - mean) / std).logits[0, own].argmax())] == y
        for x, y in zip(data.test_x, data.test_y.tolist(), strict=True)
        if y in own
    ]
    assert results["final/acc_val_selected"] == pytest.approx(100 * sum(right) / len(right))


def test_teachers_of_subsets_are_distilled_by_the_rule_from_the_bank_too(plain: dict[str, Any]) -> None:
    made = {}
    for rule in ("uniform", "masked"):
        config = with_model(plain, overlap=0.5, unseen=rule)
        data = train.images(config)
        run = open_run("distill", config)
        found = teachers.obtain(run, data, networks.build_student(config, data))
        run.close()
        made[rule] = found
        assert [len(t.classes) for t in found] == [3, 3]
        opened = bank.opener(config.model_copy(update={"bank": "lazy"}), data, [t.hash for t in found])
        batches = distillation(config, data).batches
        looked_up = opened(batches, [t.net.eval() for t in found], Costs({}))
        assert looked_up is not None
        for _ in ("computed", "looked up"):
            for teacher, banked in zip(found, looked_up.look_up(np.arange(4)), strict=True):
                said = banked.logits.double().softmax(1)
                (unseen,) = {0, 1, 2, 3}.difference(teacher.classes)
                share = {"uniform": 1 / 4, "masked": 0.0}[rule]
                assert said[:, unseen].tolist() == pytest.approx([share] * 4, abs=0.01), "to half precision"
        assert (looked_up.total.computed, looked_up.total.served) == (8, 8)
        looked_up.close()
    assert made["uniform"][0].hash != made["masked"][0].hash, "so each has a bank and results of its own"
    states = [made[rule][0].net.net.state_dict() for rule in made]
    assert differences(*states) == [], "and was fine-tuned once"


def test_another_subset_is_another_teacher_and_all_classes_are_none_in_particular(plain: dict[str, Any]) -> None:
    config = with_model(plain)
    data = train.images(config)

    def stored(classes: Any = ((), ()), **model: Any) -> Path:
        return teachers.store(with_model(plain, classes, **model), data, 0)

    assert len({stored(), stored([(0, 1), ()]), stored([(0, 2), ()]), stored(overlap=0)}) == 4
    assert stored() == stored([(3, 1, 2, 0), ()]) == stored(overlap=1) == stored(unseen="masked")
    assert stored([(0, 1), ()]) == stored([(1, 0), (2, 3)], unseen="masked")
    (first, second) = (t.classes for t in teachers.with_classes(with_model(plain, overlap=0.5), data).model.teachers)
    assert stored(overlap=0.5) == stored([first, second])


def test_keys_of_subsets_are_part_of_the_hash_only_where_a_teacher_has_one(plain: dict[str, Any]) -> None:
    of_subsets = {"model.overlap", "model.overlap_seed", "model.unseen", "model.teachers.0.classes"}
    base = with_model(plain)
    assert not of_subsets & computation(base).keys()
    for same in (with_model(plain, unseen="masked"), with_model(plain, overlap=1, overlap_seed=3)):
        assert config_hash(same) == config_hash(base)
    changed = [
        with_model(plain, overlap=0),
        with_model(plain, overlap=0.5),
        with_model(plain, overlap=0.5, overlap_seed=1),
        with_model(plain, overlap=0.5, unseen="masked"),
        with_model(plain, [(0, 1), ()]),
        with_model(plain, [(0, 1), ()], unseen="masked"),
    ]
    assert len({config_hash(c) for c in (base, *changed)}) == 7


@pytest.mark.parametrize(
    ("classes", "method", "model", "says"),
    [
        ([(0, 4), ()], {}, {}, r"model\.teachers\.0\.classes names class 4: give numbers from 0 to 3"),
        ([(), (), ()], {}, {"overlap": 0}, r"model\.overlap=0\.0 leaves model\.teachers\.1 1 of the 4 classes"),
        ([(0, 1), (1, 2)], {"ce_alpha": 0}, {}, r"class 3 \(3\) was taught to no teacher, and method\.ce_alpha=0"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_fine_tuning(
    classes: Any, method: dict[str, Any], model: dict[str, Any], says: str, plain: dict[str, Any]
) -> None:
    config = with_model({**plain, "method": {**plain["method"], **method}}, classes, **model)
    with pytest.raises(UserError, match=says):
        teachers.validate_early(config, train.images(config))
