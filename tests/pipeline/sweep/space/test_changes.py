"""Changed keys: the same configuration, and the same hash, as overrides of the command line give."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compose.compose import compose, dump
from pipeline.config import config_hash
from pipeline.errors import UserError
from pipeline.sweep.space.changes import apply

QUICKSTART = compose("quickstart")
PLAIN = compose("base")


@pytest.mark.parametrize(
    ("cfg", "values"),
    [
        ("quickstart", {"method.kd_alpha": 0.3, "method.ib_beta": 1e-6, "method.tau": 8}),
        ("quickstart", {"method.student_epochs_per_stage": [6, 6, 1, 2]}),
        ("quickstart", {"method.student_epochs_per_stage.1": 9}),
        ("quickstart", {"method.tau_schedule": [1, 4]}),
        ("quickstart", {"method.kd_max_ratio": None}),
        ("quickstart", {"method.teacher_weights": [1, 3], "method.kd_target": "avg"}),
        ("quickstart", {"method.enable_kd_after_syn_acc": "avg-0.02"}),
        ("quickstart", {"model.teachers.1.name": "resnet18", "model.teachers.1.pretrained": True}),
        ("quickstart", {"model.teachers": [{"name": "cifar_resnet8"}, {"name": "resnet18"}]}),
        ("quickstart", {"model.teachers.0": {"name": "cifar_resnet8"}}),
        ("quickstart", {"schedule": {"type": "step", "milestones": [3, 5]}}),
        ("base", {"model.student": {"name": "mobilenetv2_100", "pretrained": True}}),
        ("base", {"model.student.name": "cifar_resnet20"}),
        ("base", {"method.distill_out_dim": 128}),
    ],
)
def test_as_overrides_would(cfg: str, values: dict[str, Any]) -> None:
    assert config_hash(apply(compose(cfg), values)) == _overridden(cfg, values)


@settings(deadline=None, max_examples=10)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "method.kd_alpha": st.floats(1e-9, 1e3),
            "method.ib_beta": st.floats(1e-12, 1.0),
            "method.tau": st.floats(1e-3, 100) | st.integers(1, 100),
            "method.student_epochs_per_stage": st.lists(st.integers(1, 300), min_size=4, max_size=4),
            "method.learnable_q": st.booleans(),
            "method.kd_target": st.sampled_from(["avg", "synergy", "auto"]),
            "optim.grad_clip_norm": st.integers(0, 5) | st.floats(0, 5),
            "seed": st.integers(0, 2**31),
            "dataset.batch_size": st.integers(2, 512),
        },
    )
)
def test_any_values_as_overrides_would(values: dict[str, Any]) -> None:
    assert config_hash(apply(QUICKSTART, values)) == _overridden("quickstart", values)


def _overridden(cfg: str, values: dict[str, Any]) -> str:
    texts = [f"{key}={'null' if value is None else value}" for key, value in values.items()]
    return config_hash(compose(cfg, [text.replace("'", "") for text in texts]))


def test_widths_follow_the_student_back_again() -> None:
    """256 for small students, else 512 (docs/method.md section 1)."""
    small = apply(PLAIN, {"model.student.name": "mobilenetv2_100"})
    again = apply(small, {"model.student.name": PLAIN.model.student.name})
    assert (small.method.distill_out_dim, small.method.ib_mbm_out_dim) == (256, 256)
    assert (again.method.distill_out_dim, again.method.ib_mbm_out_dim) == (512, 512)


def test_a_dumped_base_gives_the_same(tmp_path: Path) -> None:
    """A worker that joins later has the base configuration as a file, which names every key."""
    (tmp_path / "base.yaml").write_text(dump(PLAIN))
    values = {"model.student.name": "mobilenetv2_100", "method.kd_alpha": 0.7}
    assert apply(compose(str(tmp_path / "base.yaml")), values) == apply(PLAIN, values)


def test_the_base_stays_as_it_is() -> None:
    before = dump(QUICKSTART)
    apply(QUICKSTART, {"method.student_epochs_per_stage.1": 9, "model.teachers.0.name": "cifar_resnet8"})
    assert dump(QUICKSTART) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method.kd_alhpa", 1, "method.kd_alhpa: unknown key; did you mean method.kd_alpha?"),
        ("method.tau.x", 1, "did you mean method.tau?"),
        ("method.tau", 0, "method.tau: got 0; give a number above 0"),
        ("model.teachers.2.name", "x", "model.teachers has 2 entries, numbered from 0"),
        ("method.student_epochs_per_stage.4", 1, "method.student_epochs_per_stage has 4 entries"),
        ("method.tau_schedule.0", 1, "there is no list yet; set the whole method.tau_schedule=[…]"),
        ("method.num_stages", 2, "give one number of B-epochs for each stage"),
    ],
)
def test_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        apply(QUICKSTART, {key: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
