"""A sweep against the schema and the configuration that it varies: refused in one line, without torch."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import create_model

from pipeline.compose.compose import compose
from pipeline.compose.groups import NOT_GROUPS, groups, names
from pipeline.config import Config, methods
from pipeline.config.base import Section
from pipeline.errors import UserError
from pipeline.sweep.space.changes import takes
from pipeline.sweep.space.check import check
from pipeline.sweep.space.config import SweepConfig, load

ROOT = Path(__file__).resolve().parents[4]
BASE = compose("quickstart")
BOUND: dict[str, dict[str, int]] = {"objectives": {}, "constraints": {"max": 1}}


def sweep(space: Any, **rest: Any) -> SweepConfig:
    return SweepConfig.model_validate({"name": "mine", "space": space, **rest})


def ranged(low: Any, high: float, kind: str = "float", **rest: Any) -> dict[str, Any]:
    return {"type": kind, "low": low, "high": high, **rest}


def one_of(*choices: Any) -> dict[str, Any]:
    return {"type": "categorical", "choices": choices}


def refusal(space: Any, *overridden: str, base: Config = BASE, **rest: Any) -> str:
    with pytest.raises(UserError) as caught:
        check(sweep(space, **rest), base, overridden)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("sweep=mine: ")
    return message


@pytest.mark.parametrize("name", names("sweep"))
def test_every_sweep_fits_the_quickstart(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="asib")
    chosen = [f"method={name}", "model/teacher=resnet56"] if name in methods.names() else []  # named for its method
    chosen += ["method=ewc", "continual.num_tasks=2"] if name == "lambda_ewc" else []
    check(load(name), compose("quickstart", chosen), ["dataset.download", "tracking.uri"])
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("key", "dimension", "message"),
    [
        # keys
        ("method.kd_alhpa", ranged(0, 1), "space: method.kd_alhpa: unknown key; did you mean method.kd_alpha?"),
        ("teacher_iters", ranged(1, 2, "int"), "this key is now method.teacher_adapt_epochs"),
        ("model/student", one_of("cifar_resnet8"), "a group of files; a space names keys, such as model.student.name"),
        ("experiment", one_of("base"), "experiment is a group of files"),
        ("schedule", one_of("cosine", "step"), "schedule is a group of keys, got 'cosine'"),
        ("model.teachers.5.name", one_of("x"), "model.teachers has 2 entries, numbered from 0"),
        ("threads", ranged(1, 2, "int"), "the configuration's hash leaves this key out"),
        ("checkpoint.every_seconds", ranged(1, 2), "the configuration's hash leaves this key out"),
        ("tracking", one_of({"mode": "offline"}), "the configuration's hash leaves this key out"),
        ("model.teachers.0.checkpoint", one_of("a", "b"), "the configuration's hash leaves this key out"),
        ("dataset.val_fraction", ranged(0.1, 0.2), "it changes what the trials are measured on"),
        ("dataset", one_of({"name": "cifar10"}), "it changes what the trials are measured on"),
        # types
        ("method.num_stages", ranged(1, 2), "type: float, and this key takes a whole number from 1: use type: int"),
        ("method.kd_target", ranged(0, 1), "takes one of avg, weighted_conf, synergy, auto, auto_min: use type: cat"),
        ("method.use_cccp", ranged(0, 1, "int"), "takes true or false: use type: categorical with choices"),
        ("model.student.name", ranged(0, 1), "takes a text: use type: categorical with choices"),
        ("method.tau_schedule", ranged(1, 2), "takes a list of 2"),
        ("method.student_epochs_per_stage.0", ranged(1, 2), "use type: int"),
        ("method", ranged(1, 2), "takes a group of keys"),
        # values
        ("method.tau", ranged(0, 8), "space.method.tau.low=0.0: method.tau: got 0.0; give a number above 0"),
        ("method.kd_ens_alpha", ranged(0.5, 1.5), ".high=1.5: method.kd_ens_alpha: got 1.5; give a number from 0 to 1"),
        ("method.tau", one_of(1, 0), "space.method.tau.choices.1=0: method.tau: got 0; give a number above 0"),
        ("method.tau", {"type": "grid", "values": [1, "x"]}, "space.method.tau.values.1=x: method.tau: got 'x'"),
        ("method.kd_target", one_of("avg", "synergi"), "(did you mean synergy?)"),
        ("method.student_epochs_per_stage", one_of([3, 3], [3]), "=[3, 3] does not fit method.num_stages=4"),
        ("method.ib_mbm_n_head", one_of(4, 5), "method.ib_mbm_out_dim=64 is not divisible by method.ib_mbm_n_head=5"),
        ("method.enable_kd_after_syn_acc", one_of(0.5, "avg+0", "avg"), "the same configuration as with choices.1"),
        ("optim.student_lr", ranged(1e-9, 1e-2, log=True), "schedule.min_lr=1e-06 is above optim.student_lr=1e-09"),
    ],
)  # fmt: skip
def test_a_dimension_that_is_refused(key: str, dimension: Any, message: str) -> None:
    assert message in refusal({key: dimension})


@pytest.mark.parametrize(
    ("key", "dimension"),
    [
        ("method.tau", ranged(1, 8, "int")),  # whole numbers for a number
        ("method.enable_kd_after_syn_acc", ranged(0.1, 0.9)),
        ("method.enable_kd_after_syn_acc", one_of(0.5, "avg-0.02")),
        ("method.kd_max_ratio", ranged(0.5, 2)),  # may be null
        ("method.student_epochs_per_stage.0", ranged(1, 2, "int")),
        ("method.teacher_weights", one_of("equal", [1, 2], [2, 1])),
        ("model.teachers.0.name", one_of("cifar_resnet8", "cifar_resnet20")),
        ("schedule", one_of({"type": "cosine"}, {"type": "step", "milestones": [3]})),
        ("dataset.batch_size", one_of(32, 64)),
        ("finetune.lr", ranged(1e-4, 1e-2, log=True)),
        ("seed", ranged(0, 5, "int", step=2)),
    ],
)
def test_a_dimension_that_does(key: str, dimension: Any) -> None:
    check(sweep({key: dimension}), BASE, ())


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ("schedule", True),
        ("schedule.milestones[0]", True),
        ("schedule.gamma", True),
        ("optim.student_lr", False),
        ("model/student", False),
    ],
)
def test_a_key_of_the_space_that_the_command_line_sets(given: Any, refused: bool) -> None:
    space = {"schedule": one_of({"type": "cosine"}, {"type": "step", "milestones": [3]})}
    if refused:
        assert "the command line sets schedule" in refusal(space, given)
    else:
        check(sweep(space), BASE, [given])


def test_a_key_within_another() -> None:
    space = {"schedule": one_of({"gamma": 0.5}, {"gamma": 0.2}), "schedule.gamma": ranged(0.1, 0.5)}
    assert "space.schedule: the space has schedule.gamma in it too" in refusal(space)


def test_without_validation_images() -> None:
    base = compose("quickstart", ["dataset.val_fraction=0"])
    assert "dataset.val_fraction=0: a sweep never looks at the test split" in refusal(
        {"method.tau": ranged(1, 2)}, base=base
    )


def test_rescaled_weights_are_varied_both_or_not() -> None:
    base = compose("quickstart", ["method.renorm_ce_kd=true", "method.ce_alpha=1"])
    kd, ce = {"method.kd_alpha": ranged(0.1, 0.9)}, {"method.ce_alpha": ranged(0.1, 0.9)}
    assert "method.renorm_ce_kd=true has already rescaled" in refusal(kd, base=base)
    check(sweep(kd | ce), base, ())


class OtherMethod(Section):
    """A method with a key of its own, and without most of ASIB's."""

    name: str = "other"
    tau: float = 4.0
    negatives: int = 16


def test_the_keys_are_those_of_the_chosen_method() -> None:
    schema: Any = create_model("Config", __base__=Config, method=(OtherMethod, OtherMethod()))
    base = schema.model_construct(**{**dict(BASE), "method": OtherMethod()})
    assert takes("method.negatives", base)[0].annotation is int
    with pytest.raises(UserError, match=r"method\.tau_syn: method=other has no such key; did you mean method\.tau\?"):
        takes("method.tau_syn", base)
    with pytest.raises(UserError, match=r"method\.negatvies: unknown key; did you mean method\.negatives\?"):
        takes("method.negatvies", base)
    with pytest.raises(UserError, match=r"method\.negatives: method=asib has no such key; leave"):
        takes("method.negatives", BASE)


def test_a_method_that_lacks_a_key_of_the_space() -> None:
    base = compose("quickstart", ["method=kd", "model/teacher=resnet56"])
    alpha = {"method.alpha": ranged(0.5, 2)}
    assert "space: method.alpha: method=kd has no such key; did you mean method.kd_alpha?" in refusal(alpha, base=base)
    check(sweep(alpha), compose("quickstart", ["method=dkd", "model/teacher=resnet56"]), ())


def test_more_seeds_than_there_are() -> None:
    base = compose("quickstart", [f"seed={2**63 - 2}"])
    check(sweep({"method.tau": ranged(1, 2)}, seeds=2), base, ())
    assert "seeds=3 from seed=9223372036854775806 on: seed" in refusal({"method.tau": ranged(1, 2)}, base=base, seeds=3)


# rules between keys --------------------------------------------------------------------------------------------------


def test_keys_that_do_only_together() -> None:
    """min_cw up to 2 is above the configuration's max_cw=1, and below every max_cw of the space."""
    check(sweep({"method.min_cw": ranged(0.5, 2), "method.max_cw": ranged(2, 4)}), BASE, ())


def test_points_that_do_not_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    check(sweep({"method.min_cw": ranged(0.5, 2), "method.max_cw": ranged(1, 4)}), BASE, ())
    assert "of 64 points of the space are invalid, and such trials fail: method.min_cw=" in caplog.text


def test_a_space_of_which_no_point_does() -> None:
    space = {
        "method.kd_sample_min_ratio": ranged(0.41, 0.5),
        "method.kd_sample_max_ratio": ranged(0.2, 0.4),
    }
    assert "is above method.kd_sample_max_ratio" in refusal(space)


# metrics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric",
    ["final/acc_last", "final/acc_val_selected", "final/acc_best", "test/acc", "final/teacher_0_acc",
     "final/teacher_avg_acc", "final/synergy_acc", "final/student_alone_acc"],
)  # fmt: skip
@pytest.mark.parametrize("part", ["objectives", "constraints"])
def test_a_sweep_never_looks_at_the_test_split(metric: str, part: str) -> None:
    named: Any = {part: [{"metric": metric} | BOUND[part]]}
    message = refusal({"method.tau": ranged(1, 2)}, pruner="none", **named)
    assert f"{part}.0.metric={metric}: a sweep never looks at the test split; use final/val_acc" in message


@pytest.mark.parametrize(
    ("metric", "hint"), [("final/val_ac", "final/val_acc"), ("parameters/student", "parameters/student_total")]
)
def test_an_unknown_metric_is_a_warning(metric: str, hint: str, caplog: pytest.LogCaptureFixture) -> None:
    constraints = [{"metric": metric, "max": 1}]
    check(sweep({"method.tau": ranged(1, 2)}, constraints=constraints), BASE, ())
    assert f"constraints.0.metric={metric} is an unknown metric" in caplog.text
    assert f"did you mean {hint}?" in caplog.text


@pytest.mark.parametrize(
    ("method", "key", "metric", "known"),
    [
        ("crd", "kd_alpha", "b_step/crd", True),
        ("crd", "kd_alpha", "b_step/kd", False),
        ("rkd", "angle_alpha", "b_step/rkd_angle", True),
        ("kd", "tau", "b_step/kd", True),
        ("asib", "kd_alpha", "b_step/kd", True),
        ("asib", "tau", "b_step/feat", False),
        ("asib", "feat_kd_alpha", "b_step/feat", True),  # with the weights of the space
    ],
)
def test_terms_are_those_of_the_method(
    method: str, key: str, metric: str, known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    base = BASE if method == "asib" else compose("quickstart", [f"method={method}", "model/teacher=resnet56"])
    check(sweep({f"method.{key}": ranged(0.5, 1)}, objectives=[{"metric": metric}], pruner="none"), base, ())
    assert (f"objectives.0.metric={metric} is an unknown metric" in caplog.text) is not known


# what acts -----------------------------------------------------------------------------------------------------------


def test_a_key_without_effect_is_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="asib")
    alpha = {"method.cccp_alpha": ranged(0.1, 0.9)}
    check(sweep(alpha | {"method.use_cccp": one_of(True, False)}), BASE, ())
    assert caplog.messages == [], "it acts with some choice"
    check(sweep(alpha), BASE, ())
    assert caplog.messages == ["has no effect here: method.cccp_alpha: method.use_cccp is false"]


def test_cmaes_and_lists(caplog: pytest.LogCaptureFixture) -> None:
    check(sweep({"method.tau": ranged(1, 2), "method.kd_target": one_of("avg", "synergy")}, sampler="cmaes"), BASE, ())
    assert "method.kd_target are drawn at random" in caplog.text
    assert "needs two ranges" in caplog.text


# surroundings --------------------------------------------------------------------------------------------------------


def test_sweep_and_cluster_are_no_groups_of_a_run() -> None:
    assert {group.split("/")[0] for group in groups()}.isdisjoint(NOT_GROUPS)
    assert "kd_ib_tau" in names("sweep")


@pytest.mark.parametrize("given", ["sweep=kd_ib_tau", "sweep.trials=3", "cluster=slurm", "+sweep=kd_ib_tau"])
def test_a_step_that_is_no_sweep_says_so(given: Any) -> None:
    with pytest.raises(UserError) as caught:
        compose("quickstart", [given])
    assert "this is for -e sweep" in str(caught.value)


def test_bad_input_is_found_without_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("space: {method.tau: {type: float, low: 0, high: 8}}")
    code = (
        "import sys\n"
        "from pipeline.compose import compose\n"
        "from pipeline.sweep.space import space\n"
        f"sweep = space.load({str(tmp_path / 'bad.yaml')!r})\n"
        "try: space.check(sweep, compose.compose('quickstart'), [])\n"
        "except compose.UserError as error: print(error)\n"
        "print([name for name in ('torch', 'mlflow', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [
        "sweep=bad: space.method.tau.low=0.0: method.tau: got 0.0; give a number above 0",
        "[]",
    ]
