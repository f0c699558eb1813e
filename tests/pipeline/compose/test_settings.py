"""Settings files: bounds for everybody's, and what a file of someone else's may choose."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import pytest

from pipeline.compose.compose import compose, dump
from pipeline.compose.foreign import check_refers_to_nothing
from pipeline.compose.settings import parse_data, read_data
from pipeline.config import Config, config_hash
from pipeline.errors import UserError
from pipeline.launch import cluster
from pipeline.promote import criteria as gate
from pipeline.sweep.space import space

URI = "runs:/0123456789abcdef0123456789abcdef/best.yaml"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 10)
)
BAD = {
    "a list that contains itself": ("a: &a [*a]\n", "cannot contain itself"),
    "a mapping that contains itself": ("a: &a {b: {c: *a}}\n", "cannot contain itself"),
    "itself merged": ("a: &a {<<: *a}\n", "cannot contain itself"),
    "ten billion values": (BOMB, "more than 50000 values"),
    "merges without end": ("a: &a {k: 1}\n" + "b: {<<: [" + "*a, " * 60_000 + "*a]}\n", "more than 50000 values"),
    "a deep list": ("[" * 5000, "nested deeper than 40"),
    "a deep mapping": ("".join(" " * k + "a:\n" for k in range(200)), "nested deeper than 40"),
    "deep by aliases": (
        "a0: &a0 [[[[[[[[[[x]]]]]]]]]]\n"
        + "".join(f"a{k}: &a{k} [[[[[[[[[[*a{k - 1}]]]]]]]]]]\n" for k in range(1, 5)),
        "nested deeper than 40",
    ),
    "a large file": ("a: " + "x" * 1_100_000, "larger than 1 MB"),
    "a tag that runs code": ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
}


def refusal(*arguments: object, **named: object) -> str:
    with pytest.raises(UserError) as refused:
        compose(*arguments, **named)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
    return str(refused.value)


@functools.cache
def quickstart(*overrides: str) -> Config:
    return compose("quickstart", overrides)


def fetched(tmp_path: Path, text: str, *overrides: str) -> Config:
    (tmp_path / "best.yaml").write_text(text)
    return compose(URI, list(overrides), fetch=lambda uri: tmp_path / "best.yaml")


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    (tmp_path / "best.yaml").write_text(text)
    return refusal(URI, list(overrides), fetch=lambda uri: tmp_path / "best.yaml")


# every file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_would_fill_the_memory_is_refused_wherever_one_is_read(case: str, tmp_path: Path) -> None:
    text, words = BAD[case]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    readers = {
        f"cfg={path}": lambda: compose(str(path)),
        f"sweep={path}": lambda: space.load(str(path)),
        f"gate={path}": lambda: gate.load(str(path), {}),
        f"cluster={path}": lambda: cluster.load(str(path), {}),
        "theirs": lambda: read_data(path, "theirs"),
    }
    for source, read in readers.items():
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value).startswith(source)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_anchors_that_share_a_few_values_stay_allowed() -> None:
    read = parse_data("a: &a {x: 1e-3}\nb: *a\nc: {<<: *a, y: 2}\n", "f")
    assert read == {"a": {"x": 0.001}, "b": {"x": 0.001}, "c": {"x": 0.001, "y": 2}}


def test_values_that_refer_to_each_other_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run_name: ${rung}\nrung: ${run_name}\n")
    assert "Recursive interpolation" in refusal(str(tmp_path / "mine.yaml"))


# secrets of the environment ----------------------------------------------------------------------------------------


REFERENCES = ["${oc.env:MLFLOW_TRACKING_PASSWORD}", "x${oc.env:${rung},none}", "${oc.decode:${oc.env:MY_TOKEN}}"]


@pytest.mark.parametrize("text", REFERENCES)
@pytest.mark.parametrize("key", ["run_name", "tracking.uri"])
def test_a_secret_of_the_environment_cannot_be_referred_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, key: str
) -> None:
    for name in ("MLFLOW_TRACKING_PASSWORD", "MY_TOKEN"):
        monkeypatch.setenv(name, "sword-fish")
    section, _, last = key.rpartition(".")
    own = f"{last}: {text}\n" if not section else f"{section}:\n  {last}: {text}\n"
    (tmp_path / "mine.yaml").write_text("rung: MLFLOW_TRACKING_PASSWORD\n" + own)
    message = refusal(str(tmp_path / "mine.yaml"))
    assert "looks like a secret" in message
    assert "sword-fish" not in message


def test_other_variables_of_the_environment_are_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB", "west")
    (tmp_path / "mine.yaml").write_text("run_name: ${oc.env:LAB}\nrung: ${oc.env:NOWHERE,east}\n")
    config = compose(str(tmp_path / "mine.yaml"))
    assert (config.run_name, config.rung) == ("west", "east")
    (tmp_path / "mine.yaml").write_text("run_name: ${oc.env:NOWHERE}\n")
    assert "'NOWHERE' not found" in refusal(str(tmp_path / "mine.yaml"))


# other people's files ----------------------------------------------------------------------------------------------


def test_a_fetched_file_says_neither_where_nor_what_to_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = """
tracking: {uri: 'http://evil', experiment: theirs, mode: offline}
output_dir: /tmp/theirs
bank_folder: /tmp/theirs
register: theirs
resume: ../../x
extend: true
log_model: false
debug: true
device: cuda
run_name: theirs
student: /etc/passwd
dataset: {root: /etc, path: /etc/passwd, download: true, workers: 64, batch_size: 64}
checkpoint: {every_seconds: 0.001}
method: {tau: 3}
"""
    with caplog.at_level(logging.INFO, "asib"):
        config = fetched(tmp_path, text)
    assert config == compose(None, ["dataset.batch_size=64", "method.tau=3"])
    (line,) = [record.getMessage() for record in caplog.records]
    for key in (
        *("tracking.uri", "tracking.experiment", "tracking.mode", "output_dir", "bank_folder", "register", "resume"),
        *("extend", "log_model", "debug", "device", "run_name", "student", "checkpoint.every_seconds"),
        *("dataset.root", "dataset.path", "dataset.download", "dataset.workers"),
    ):
        assert f" {key}" in line
    assert "evil" not in line


@pytest.mark.parametrize("section", ["method: {name: ditt, module: bait}", "method.module: bait\nmethod: {name: ditt}"])
def test_a_fetched_file_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, section: str
) -> None:
    (tmp_path / "bait.py").write_text(f"open({str(tmp_path / 'caught')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.INFO, "asib"):
        message = refused(tmp_path, section)
    assert message.startswith("method=ditt: no such method; did you mean dist?")
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["method.module"]
    assert not (tmp_path / "caught").exists()


def test_a_method_from_outside_that_the_command_line_names_is_used_with_a_fetched_file(tmp_path: Path) -> None:
    text = "method: {name: my_kd, module: bait, scale: 3}\nmodel: {teachers: [{name: cifar_resnet14}]}\n"
    config = fetched(tmp_path, text, "method.module=examples.my_method.my_kd")
    assert (config.method.module, config.method.scale) == ("examples.my_method.my_kd", 3)


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "a${b}", "${seed}", "${hydra:runtime.cwd}", "${now:%Y}", r"\${x}"])
def test_nothing_in_a_fetched_file_refers_to_anything(tmp_path: Path, value: str) -> None:
    for text in (
        f"model:\n  student:\n    name: {value}\n",
        f"method:\n  student_epochs_per_stage: [1, '{value}']\n",
        f"method:\n  teacher_weights: [[['{value}']]]\n",
        f"method:\n  '{value}': 1\n",
    ):
        assert "which only your own file may" in refused(tmp_path, text)
    assert fetched(tmp_path, f"run_name: '{value}'\n") == Config()


@pytest.mark.parametrize(
    "entry",
    [
        "/etc/passwd",
        "../../secret",
        "sibling",
        "override /tracking: offline",
        "override /hydra/launcher: x",
        "/dataset@tracking: cifar10",
        "override /dataset: ../../x",
        "experiment: quickstart",
        "optional sibling: x",
        "override /dataset: ${oc.env:HOME}",
    ],
)
def test_a_fetched_defaults_list_leads_to_known_groups_only(tmp_path: Path, entry: str) -> None:
    (tmp_path / "sibling.yaml").write_text("seed: 3\n")
    assert "defaults: " in refused(tmp_path, f"defaults:\n  - {entry}\n")


def test_known_groups_of_a_fetched_file_count(tmp_path: Path) -> None:
    text = "defaults:\n  - quickstart\n  - override /optim: sgd\n  - _self_\nseed: 7\n"
    (tmp_path / "own.yaml").write_text(text)
    assert fetched(tmp_path, text) == compose(str(tmp_path / "own.yaml"))


def test_what_a_sweep_wrote_repeats_the_trial(tmp_path: Path) -> None:
    run = "runs:/" + "a1" * 16
    overrides = ["method.tau=2.5", f"model.teachers.0.checkpoint={run}", "optim.use_amp=true", "threads=3"]
    written = compose("quickstart", overrides)
    again = fetched(tmp_path, dump(written))
    assert again == written
    assert config_hash(again) == config_hash(written)


@pytest.mark.parametrize("checkpoint", ["/home/me/t.safetensors", "runs:/../x", f"{URI}/../../x"])
def test_a_teacher_of_another_machine_is_asked_for(tmp_path: Path, checkpoint: str) -> None:
    expected = quickstart("model.teachers.0.checkpoint=mine.pt")
    text = dump(expected).replace("mine.pt", checkpoint)
    assert "model.teachers.0.checkpoint" in refused(tmp_path, text)
    assert fetched(tmp_path, text, "model.teachers.0.checkpoint=mine.pt") == expected


# a study that is joined --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["${oc.env:HOME}", r"\\${seed}", r"\\\\${seed}"])
def test_a_studys_configuration_refers_to_nothing(name: str) -> None:
    with pytest.raises(UserError, match="contains a reference"):
        check_refers_to_nothing(f"tracking:\n  experiment: '{name}'\n", "study s")


@pytest.mark.parametrize("name", ["a${b}", r"\${x}", r"\\\\${x}", "plain"])
def test_a_dump_refers_to_nothing_whatever_its_names(name: str) -> None:
    config = quickstart()
    check_refers_to_nothing(dump(config.model_copy(update={"run_name": name})), "study s")


def test_a_server_that_only_a_study_names_gets_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.sweep.worker import refuse_strange_server  # imports Optuna

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ours")
    for uri, told in (
        (None, []),
        ("http://ours", []),
        ("sqlite:///a.db", []),
        ("http://other", ["tracking.uri=http://other"]),
    ):
        refuse_strange_server("s", uri, told)
    with pytest.raises(UserError, match=r"join=s: its runs go to http://other; .* tracking.uri=http://other"):
        refuse_strange_server("s", "http://other", ["dataset.root=x"])
