"""Reading sweeps: files and settings, and one line for what would not do."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.compose.groups import names
from pipeline.errors import UserError
from pipeline.sweep.space.config import SweepConfig, load

TAU = "method.tau: {type: float, low: 1, high: 8}"


def written(folder: Path, text: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


def refusal(folder: Path, text: str, **settings: str) -> str:
    with pytest.raises(UserError) as caught:
        load(written(folder, text), {key.replace("__", "."): value for key, value in settings.items()})
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", names("sweep"))
def test_every_sweep_survives_json(name: str) -> None:
    sweep = load(name)
    assert sweep.name == name
    assert SweepConfig.model_validate_json(sweep.model_dump_json()) == sweep


def test_a_file_anywhere_in_short_forms(tmp_path: Path) -> None:
    text = (
        "space: {'method.student_epochs_per_stage[1]': {type: int, low: 1, high: 3}}\nsampler: {seed: 3}\npruner: none"
    )
    sweep = load(written(tmp_path, text))
    assert (sweep.name, list(sweep.space)) == ("mine", ["method.student_epochs_per_stage.1"])
    assert (sweep.sampler.name, sweep.sampler.seed, sweep.pruner.name) == ("tpe", 3, "none")


def test_1e_3_is_a_number_and_1_is_one_of_a_float_range(tmp_path: Path) -> None:
    sweep = load(written(tmp_path, "space: {method.ib_beta: {type: float, low: 1e-6, high: 1, log: true}}"))
    assert sweep.space["method.ib_beta"].model_dump(include={"low", "high"}) == {"low": 1e-6, "high": 1.0}


def test_several_objectives_are_not_pruned_by_default(tmp_path: Path) -> None:
    text = f"space: {{{TAU}}}\nobjectives: [{{metric: final/val_acc}}, {{metric: cost/gmacs, direction: minimize}}]"
    assert load(written(tmp_path, text)).pruner.name == "none"


@pytest.mark.parametrize(("seeds", "pruner"), [(1, "median"), (2, "none"), (3, "wilcoxon")])
def test_the_pruner_of_several_seeds(tmp_path: Path, seeds: int, pruner: str) -> None:
    file = written(tmp_path, f"space: {{{TAU}}}\nseeds: {seeds}")
    assert load(file).pruner.name == pruner
    assert load(file, {"seeds": "1"}).pruner.name == "median", "as if the file had never named it"


# settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "found"),
    [
        ("trials", "10", lambda s: s.trials == 10),
        ("sampler", "random", lambda s: s.sampler.name == "random"),
        ("sampler.name", "random", lambda s: s.sampler.name == "random"),  # drops startup_trials of the file
        ("pruner", "{name: patient, patience: 4}", lambda s: s.pruner.patience == 4),
        ("space.method.tau.high", "6", lambda s: s.space["method.tau"].high == 6),
        ("space.method.ib_beta.low", "1e-5", lambda s: s.space["method.ib_beta"].low == 1e-5),
        ("space.method.tau", "{type: grid, values: [1, 2]}", lambda s: s.space["method.tau"].values == (1, 2)),
        ("space.method.tau", "null", lambda s: set(s.space) == {"method.kd_alpha", "method.ib_beta"}),
        ("space.optim.student_lr", "{type: float, low: 1e-4, high: 1e-2}", lambda s: len(s.space) == 4),
        ("objectives.0.metric", "student/acc", lambda s: s.objectives[0].metric == "student/acc"),
        ("objectives[0].direction", "minimize", lambda s: s.objectives[0].direction == "minimize"),
        ("constraints", "[{metric: cost/gmacs, max: 1e3}]", lambda s: s.constraints[0].max == 1000),
        ("stop.patience", "5", lambda s: (s.stop.patience, s.stop.terminator) == (5, False)),
    ],
)
def test_settings(key: str, text: str, found: Any) -> None:
    assert found(load("kd_ib_tau", {key: text}))


def test_a_key_within_another_takes_the_longest(tmp_path: Path) -> None:
    sweep = load(
        written(tmp_path, "space: {model.teachers.0.name: {type: categorical, choices: [a]}, "
                          "model.teachers.0: {type: categorical, choices: [{name: b}]}}"),
        {"space.model.teachers.0.name.choices": "[c, d]"},
    )  # fmt: skip
    assert sweep.space["model.teachers.0.name"].model_dump()["choices"] == ("c", "d")


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("trails", "3", "sweep.trails: unknown key; did you mean sweep.trials?"),
        ("name", "x", "sweep.name: unknown key"),
        ("trials", "0", "sweep.trials: got 0; give a whole number from 1"),
        ("space.method.tuu.high", "6", "sweep.space has no method.tuu; did you mean method.tau?"),
        ("space.method.tau.hihg", "6", "float has no hihg; did you mean sweep.space.method.tau.high?"),
        ("objectives.3.metric", "x", "sweep.objectives has 1 entries, numbered from 0"),
        ("trials.x", "3", "sweep.trials.x=3: sweep.trials has no keys; give it whole"),
        ("space.seed", "null", "sweep.space has no seed"),
        ("sampler.name", "tp", "got 'tp'; did you mean tpe? give one of tpe, gp, cmaes, random, grid"),
    ],
)
def test_settings_that_are_refused(key: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load("kd_ib_tau", {key: text})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# files ---------------------------------------------------------------------------------------------------------------


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    written(tmp_path, "")
    for given, message in (
        ("kd_ib_tua", "did you mean kd_ib_tau?"),
        (str(tmp_path), "is a folder"),
        (f"{tmp_path}/mime.yaml", "mine.yaml?"),
    ):
        with pytest.raises(UserError) as caught:
            load(given)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"space: {{{TAU}}}\nspace: {{{TAU}}}", "not valid YAML in line 2, column 1: found duplicate key space"),
        (f"space:\n  {TAU}\n  {TAU}", "found duplicate key method.tau"),
        ("space: {'a[0]': {type: int, low: 1, high: 2}, a.0: {type: int, low: 1, high: 2}}", "space.a.0 is"),
        ("- 1", "holds no groups of keys"),
        ("", "space is missing: give a group of keys with values such as {type: float, low: …, high: …}"),
        ("space: {}", "space is empty"),
        ("space: 3", "space: got 3; give a group of keys with values"),
        ("space: {method.tau: 3}", "space.method.tau: got 3; give such as {type: float, low: …, high: …}"),
        ("space: {method.tau: {low: 1}}", "space.method.tau has no type: give one of float, int, categorical, grid"),
        ("space: {method.tau: {type: flaot}}", "space.method.tau.type: got 'flaot'; did you mean float? give one of"),
        ("space: {method.tau: {type: float, low: 1}}", "space.method.tau.high is missing: give a number"),
        ("space: {method.tau: {type: float, low: a, high: 2}}", "space.method.tau.low: got 'a'; give a number"),
        ("space: {method.tau: {type: float, low: true, high: 2}}", "space.method.tau.low: got true; give a number"),
        ("space: {method.tau: {type: float, low: 1, high: .inf}}", "space.method.tau.high: got inf; give a number"),
        ("space: {method.tau: {type: float, low: 3, high: 2}}", "space.method.tau.low=3.0 is above high=2.0"),
        ("space: {method.tau: {type: float, low: 0, high: 2, log: true}}", "log=true with low=0.0"),
        ("space: {method.tau: {type: float, low: 1, high: 2, log: true, step: 1}}", "log=true with step=1.0"),
        ("space: {method.tau: {type: float, low: 1, high: 2, step: 0}}", "step: got 0; give a number above 0"),
        ("space: {method.tau: {type: int, low: 1.5, high: 2}}", "space.method.tau.low: got 1.5; give a whole number"),
        ("space: {method.tau: {type: categorical, choices: []}}", "space.method.tau.choices is empty"),
        ("space: {method.tau: {type: categorical, choices: [.nan]}}", "choices holds nan: give numbers"),
        ("space: {schedule: {type: categorical, choices: [{1: 2}]}}", "a group with the key 1: keys are texts"),
        ("space: {method.tau: {type: [1], choices: [1]}}", "space.method.tau.type: got [1]; give one of float"),
        ("space: {method.tau: {type: categorical, choices: [1, 2, 1.0]}}", "choices holds 1.0 twice"),
        ("space: {method.tau: {type: categorical, values: [1]}}", "categorical has no values"),
        (f"space: {{{TAU}}}\nsampler: {{name: random, startup_trials: 3}}", "a key of tpe, gp, cmaes; it takes seed"),
        (f"space: {{{TAU}}}\npruner: {{name: none, startup_trials: 3}}", "of median, patient; it takes nothing"),
        (f"space: {{{TAU}}}\npruner: {{name: median, patience: 3}}", "pruner.patience: median has no patience"),
        (f"space: {{{TAU}}}\npruner: 3", "sweep.pruner: got 3; give such as {name: median"),
        (f"space: {{{TAU}}}\nobjectives: []", "objectives is empty"),
        (f"space: {{{TAU}}}\nobjectives: [{{metric: cost/gmacs, direction: max}}]", "direction: got 'max'; give"),
        (f"space: {{{TAU}}}\nobjectives: [3]", "objectives.0: got 3; give a group of keys, such as {metric"),
        (f"space: {{{TAU}}}\nobjectives: 3", "objectives: got 3; give a list of {metric"),
        (f"space: {{{TAU}}}\nconstraints: [{{metric: cost/gmacs}}]", "metric=cost/gmacs has no bound"),
        (f"space: {{{TAU}}}\nconstraints: [{{metric: a, min: 2, max: 1}}]", "min=2.0 is above max=1.0"),
        (f"space: {{{TAU}}}\nconstraints: [{{max: 1}}]", "constraints.0.metric is missing: give a text"),
        (f"space: {{{TAU}}}\nconstraints: [{{metric: a, max: 1}}, {{metric: a, min: 1}}]", "constraints name a twice"),
        (f"space: {{{TAU}}}\nheartbeat_seconds: 60", "grace_seconds=60 is not above heartbeat_seconds=60"),
        (f"space: {{{TAU}}}\nname: x", "a sweep is named after its file"),
        (f"space: {{{TAU}}}\ntrails: 3", "trails: unknown key; did you mean sweep.trials?"),
        (f"space: {{{TAU}}}\nsampler: grid", "space.method.tau has endlessly many values, and sampler.name=grid"),
        ("space: {seed: {type: int, low: 0, high: 100000}}\nsampler: grid", "this grid has 100,001 points"),
        (f"space: {{{TAU}}}\npruner: median\nobjectives: [{{metric: cost/gmacs}}]", "set pruner.name=none"),
        (f"space: {{{TAU}}}\nseeds: 0", "sweep.seeds: got 0; give a whole number from 1"),
        (f"space: {{{TAU}}}\npruner: wilcoxon", "wilcoxon with seeds=1: it compares the seeds of two trials"),
        (f"space: {{{TAU}}}\nseeds: 3\npruner: median", "with seeds=3: it compares the epochs of trials with one"),
        (f"space: {{{TAU}}}\nseeds: 2\npruner: wilcoxon", "it prunes after 2 seeds at the earliest"),
        (f"space: {{{TAU}}}\nseeds: 4\npruner: {{startup_seeds: 4}}", "it prunes after 4 seeds at the earliest"),
        (f"space: {{{TAU}}}\nseeds: 4\npruner: {{p_threshold: 0.125}}", "no p of 3 seeds is below 0.125"),
        ("space: {seed: {type: int, low: 0, high: 9}}\nseeds: 3", "space.seed with seeds=3: each trial trains seeds"),
        (f"space: {{{TAU}}}\nstop: {{terminator: true}}", "stop.terminator=true with seeds=1: it weighs"),
        (f"space: {{{TAU}}}\nstop: {{patience: 0}}", "stop.patience: got 0; give"),
        (f"space: {{{TAU}}}\nstop: {{patiense: 3}}", "patiense: unknown key; did you mean sweep.stop.patience?"),
        (f"space: {{{TAU}}}\nstop: {{terminator: true}}\nobjectives: [{{metric: a}}, {{metric: b}}]", "2 objectives"),
    ],
)  # fmt: skip
def test_a_file_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


@pytest.mark.parametrize("line", ["pruner: hyperband", "sampler: cmaes"])
def test_what_cannot_do_several_objectives(tmp_path: Path, line: str) -> None:
    text = f"space: {{{TAU}}}\nobjectives: [{{metric: final/val_acc}}, {{metric: cost/gmacs}}]\n{line}"
    assert "with 2 objectives" in refusal(tmp_path, text)


@pytest.mark.parametrize(("value", "violation"), [(5, -1), (6, 0), (8, 2), (2, 1), (float("nan"), float("inf"))])
def test_how_far_a_constraint_is_missed(tmp_path: Path, value: Any, violation: float) -> None:
    sweep = load(written(tmp_path, f"space: {{{TAU}}}\nconstraints: [{{metric: a, min: 3, max: 6}}]"))
    assert sweep.constraints[0].violation(value) == violation
