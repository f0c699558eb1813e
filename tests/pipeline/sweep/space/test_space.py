"""The space as Optuna sees it, the values that a trial gets, and the digest that names a study."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compose.compose import compose, dump
from pipeline.config import config_hash
from pipeline.sweep.space.space import SweepConfig, apply, digest, grid, load, study_name, suggest

BASE = compose("quickstart")
EPOCHS = [[3, 3, 3, 3], [1, 1, 2, 4]]
SPACE: dict[str, Any] = {
    "method.kd_alpha": {"type": "float", "low": 0.1, "high": 0.9, "step": 0.2},
    "method.ib_beta": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True},
    "method.teacher_adapt_epochs": {"type": "int", "low": 1, "high": 8, "step": 3},
    "method.cccp_ns": {"type": "int", "low": 1, "high": 64, "log": True},
    "method.student_epochs_per_stage": {"type": "categorical", "choices": EPOCHS},
    "method.tau": {"type": "grid", "values": [1, 2.5, 4]},
    "method.use_cccp": {"type": "categorical", "choices": [True, False]},
    "method.kd_max_ratio": {"type": "categorical", "choices": [None, 1.25]},
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def sweep(space: Any = SPACE, **rest: Any) -> SweepConfig:
    return SweepConfig.model_validate({"name": "mine", "space": space, **rest})


@pytest.mark.filterwarnings("error")
def test_what_is_suggested_lies_in_the_space_and_composes() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for index in range(30):
        values = suggest(study.ask(), sweep())
        assert values["method.kd_alpha"] in (0.1, 0.3, 0.5, 0.7, 0.9)
        assert 1e-6 <= values["method.ib_beta"] <= 1e-2
        assert values["method.teacher_adapt_epochs"] in (1, 4, 7)
        assert 1 <= values["method.cccp_ns"] <= 64
        assert values["method.student_epochs_per_stage"] in EPOCHS
        assert values["method.tau"] in (1, 2.5, 4)
        if index % 6 == 0:  # composing takes longer
            overrides = [f"{key}={'null' if value is None else value}" for key, value in values.items()]
            assert config_hash(apply(BASE, values)) == config_hash(compose("quickstart", overrides))


@pytest.mark.filterwarnings("error")
def test_storage_gives_the_same_values_back(tmp_path: Path) -> None:
    """A retried trial has its parameters from the data base, lists as their texts."""
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db")
    first = study.ask()
    values = suggest(first, sweep())
    study.enqueue_trial(first.params)
    assert suggest(study.ask(), sweep()) == values


def test_the_order_in_the_file_does_not_change_what_is_drawn() -> None:
    drawn = []
    for space in (SPACE, dict(reversed(SPACE.items()))):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
        drawn.append([suggest(study.ask(), sweep(space)) for _ in range(5)])
    assert drawn[0] == drawn[1]


@settings(deadline=None, max_examples=40)
@given(st.decimals(0, 1, places=3), st.decimals("0.001", "0.3", places=3), st.integers(0, 12))
def test_ranges_with_steps_are_exact(low: Any, step: Any, count: int) -> None:
    """Decimal arithmetic says what the values are; binary fractions would give 0.30000000000000004."""
    high = low + step * count + step / 3  # which no step reaches
    found = sweep({"method.tau": {"type": "float", "low": float(low), "high": float(high), "step": float(step)}})
    assert grid(found)["method.tau"] == [float(low + step * i) for i in range(count + 1)]


# the grid ------------------------------------------------------------------------------------------------------------


def test_a_grid_has_numbers_and_texts_for_lists() -> None:
    space = {k: SPACE[k] for k in ("method.kd_alpha", "method.teacher_adapt_epochs", "method.student_epochs_per_stage")}
    assert grid(sweep(space, sampler="grid")) == {
        "method.kd_alpha": [0.1, 0.3, 0.5, 0.7, 0.9],
        "method.student_epochs_per_stage": ["[3,3,3,3]", "[1,1,2,4]"],
        "method.teacher_adapt_epochs": [1, 4, 7],
    }


# the digest ----------------------------------------------------------------------------------------------------------

FIRST = sweep()


def test_digest_does_not_know_order_spelling_or_totals() -> None:
    spelt = {key: dict(reversed(value.items())) for key, value in reversed(SPACE.items())}
    spelt["method.tau"] = {"type": "grid", "values": [1.0, 2.5, 4.0]}
    spelt["method.student_epochs_per_stage"] = {"type": "categorical", "choices": [[3.0, 3, 3, 3], [1, 1, 2, 4]]}
    other = sweep(spelt, trials=7, max_retry=0, heartbeat_seconds=1, grace_seconds=5, sampler={"name": "tpe"})
    assert digest(other, BASE) == digest(FIRST, BASE)


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("method.kd_alpha=0.7", True),  # in the space
        ("method.student_epochs_per_stage=[1,2,3,4]", True),  # in the space
        ("tracking.experiment=x", True),
        ("threads=1", True),
        ("run_name=x", True),
        ("seed=1", False),
        ("method.tau_syn=2", False),
        ("optim.use_amp=true", False),
        ("model.teachers.0.checkpoint=x.safetensors", False),
        ("dataset.val_fraction=0.2", False),
    ],
)
def test_digest_of_another_base(override: str, same: bool) -> None:
    assert (digest(FIRST, compose("quickstart", [override])) == digest(FIRST, BASE)) is same


@pytest.mark.parametrize(
    "change",
    [
        {"space": {**SPACE, "method.tau": {"type": "grid", "values": [1, 2.5]}}},
        {"space": {**SPACE, "method.ib_beta": {"type": "float", "low": 1e-6, "high": 1e-2}}},
        {"space": {k: v for k, v in SPACE.items() if k != "method.tau"}},
        {"sampler": {"name": "tpe", "seed": 1}},
        {"sampler": {"name": "random"}},
        {"pruner": {"name": "none"}},
        {"pruner": {"name": "median", "warmup_epochs": 4}},
        {"objectives": [{"metric": "final/val_acc", "direction": "minimize"}]},
        {"constraints": [{"metric": "cost/gmacs", "max": 3}]},
    ],
)
def test_digest_of_another_search(change: dict[str, Any]) -> None:
    assert digest(sweep(**change), BASE) != digest(FIRST, BASE)


def test_digest_of_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(FIRST, BASE)
    monkeypatch.setattr("pipeline.sweep.space.space.sources_of", lambda base, root: "other")
    assert digest(FIRST, BASE) != before


def test_digest_with_one_entry_of_a_list_in_the_space() -> None:
    found = sweep({"method.student_epochs_per_stage.1": {"type": "int", "low": 1, "high": 4}})
    digests = [
        digest(found, compose("quickstart", [f"method.student_epochs_per_stage={epochs}"]))
        for epochs in ("[3,3,3,3]", "[3,9,3,3]", "[9,3,3,3]")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_digest_of_a_dumped_base(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(BASE))
    assert digest(FIRST, compose(str(tmp_path / "config.yaml"))) == digest(FIRST, BASE)


def test_a_study_is_named_after_sweep_and_digest() -> None:
    found = load("kd_ib_tau")
    assert study_name(found, BASE) == f"kd_ib_tau-{digest(found, BASE)[:10]}"
