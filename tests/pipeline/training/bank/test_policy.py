"""When a configuration uses the teacher bank, and that it changes no hash but the identity."""

import dataclasses
from typing import Any

import pytest

from pipeline.config import Config, Identity, config_hash
from pipeline.training.bank.policy import bank_use, saved_alone, shared

PAIR = {"teachers": [{"name": "cifar_resnet8"}, {"name": "cifar_resnet14"}]}
TUNED = {"use_teacher_finetuning": True, "teacher_ce_alpha": 0.5}


def made(bank: Any = "lazy", method: Any = None, **sections: Any) -> Config:
    method = {"kd_alpha": 0.4, "student_epochs_per_stage": (20,), "teacher_adapt_epochs": 5, **(method or {})}
    return Config.model_validate({"bank": bank, "model": PAIR, "method": method, **sections})


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"augment": {"randaugment": True}}, "augment.randaugment=true"),
        ({"method": {"kd_view": "mixed", "mixup_alpha": 0.2}}, "method.kd_view=mixed"),
        ({"method": {"kd_view": "mixed", "cutmix_alpha_distill": 1.0}}, "method.kd_view=mixed"),
        ({"method": TUNED}, "method.use_teacher_finetuning=true"),
        ({"method": {"kd_alpha": 0.0}}, "nothing is distilled"),
        ({"bank": "off"}, "bank=off"),
        ({"bank": False}, "bank=off"),  # what YAML makes of off
    ],
)
def test_the_bank_is_off_where_outputs_do_not_come_again(sections: Any, reason: str) -> None:
    use = bank_use(made(**sections))
    assert not use.on
    assert use.reason.startswith(reason)


@pytest.mark.parametrize(
    "method", [{}, {"kd_view": "mixed"}, {"cutmix_alpha_distill": 1.0}, {"kd_sample_gate": True}, {"kd_target": "avg"}]
)
@pytest.mark.parametrize("mode", ["lazy", "ahead"])
def test_the_bank_is_used_where_they_do(mode: str, method: Any) -> None:
    assert bank_use(made(mode, method)).mode == mode


def different(draws: int) -> float:
    """Mean number of different ones among 162 views: every draw adds the chance that it is new."""
    found = 0.0
    for _ in range(draws):
        found += 1 - found / 162
    return found


def test_what_one_run_saves_is_what_repeated_draws_save() -> None:
    averaged = {"kd_target": "avg", "student_epochs_per_stage": (240,)}
    assert saved_alone(made(method=averaged)) == pytest.approx(1 - different(240) / 240)
    assert saved_alone(made(method=averaged, augment={"crop_flip": False})) == pytest.approx(1 - 1 / 240)
    half = {**averaged, "kd_sample_gate": True, "kd_sample_max_ratio": 0.5}
    assert saved_alone(made(method=half)) == pytest.approx(1 - different(240) / 120)
    staged = {
        "num_stages": 2,
        "student_epochs_per_stage": (40, 60),
        "teacher_adapt_epochs": 10,
        "kd_cooldown_epochs": 5,
    }
    twice = {**staged, "kd_cooldown_epochs": 5, "kd_two_view_start_epoch": 20, "kd_two_view_stop_epoch": 80}
    assert saved_alone(made(method=twice)) == pytest.approx(1 - different(20 + 95 + 60) / (20 + 95 + 60))


@pytest.mark.parametrize(("epochs", "mode"), [(20, "off"), (240, "lazy")])
def test_auto_uses_a_bank_for_a_run_that_saves_with_it_and_for_shared_teachers(epochs: int, mode: str) -> None:
    config = made("auto", {"student_epochs_per_stage": (epochs,)})
    assert bank_use(config).mode == mode
    assert bank_use(shared(config)).mode == "lazy"
    assert shared(made("off")).bank == "off"
    assert config_hash(shared(config)) == config_hash(config)


def test_a_result_with_the_bank_is_another_result() -> None:
    one = Identity("c", "float32", ("t",), "d", "s")
    assert dataclasses.replace(one, bank=True).digest() != one.digest()
