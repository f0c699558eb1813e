"""The life of a step's process: a dry run, and a configuration that lies on a tracking server."""

from __future__ import annotations

import importlib
import io
import logging
from pathlib import Path

import pytest

from pipeline.compose import cli
from pipeline.compose.compose import compose, dump
from pipeline.config import config_hash
from pipeline.errors import UserError
from pipeline.runs.step import Step, configuration

pytest_plugins = ["tests.servers"]


@pytest.fixture(autouse=True)
def err(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the step says on standard error; nothing of this machine's environment gets in."""
    names = ("TEACHER_PAIR", "STUDENT", "METHOD", "SEED", "DRY_RUN", "RANK", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    log = logging.getLogger("asib")
    stream = io.StringIO()
    log.handlers[:] = [logging.StreamHandler(stream)]
    log.setLevel(logging.INFO)
    return stream


def never(run: object) -> float | None:
    raise AssertionError("a dry run has run")


def test_a_dry_run_prints_the_configuration_and_ends(monkeypatch, capsys, err, tmp_path: Path):
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setenv("SEED", "3")
    argv = ["cfg=quickstart", "method.tau=2", f"output_dir={tmp_path / 'runs'}"]
    step = Step("distill", request=lambda config, _: (config.model_copy(update={"rung": "x"}), None), job=never)
    assert step.main(argv) == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    expected = compose("quickstart", [*argv[1:], "seed=3", "rung=x"])
    assert compose(str(again)) == expected
    assert err.getvalue() == "seed=3 (from the environment: SEED)\n"
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_what_the_step_adds(monkeypatch, capsys):
    monkeypatch.setenv("DRY_RUN", "1")
    step = Step(
        "sweep", request=lambda config, _: (config, config.seed), job=never, words=lambda seed: f"2 jobs, {seed}\n"
    )
    assert step.main(["cfg=quickstart"]) == 0
    assert capsys.readouterr().out == dump(compose("quickstart")) + "\n# 2 jobs, 0\n"


def refuses(request: object) -> str:
    raise UserError("cluster=slurm: no sbatch here")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SEED", "x", "SEED=x in the environment: give a whole number from 0 to 9223372036854775807"),
        ("DRY_RUN", "x", "DRY_RUN=x in the environment: give 1 or 0"),
        ("DRY_RUN", "1", "cluster=slurm: no sbatch here"),
    ],
)
def test_a_refusal_is_one_line(monkeypatch, err, variable, value, message):
    monkeypatch.setenv(variable, value)
    assert Step("distill", job=never, words=refuses).main(["cfg=quickstart"]) == 2
    assert err.getvalue() == message + "\n"


# ------------------------------------------------------------------------------------------ cfg=runs:/…


@pytest.fixture
def run_id(sqlite_uri: str, tmp_path: Path) -> str:
    """A run with a configuration as an artifact, and what is none."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(sqlite_uri)
    made = client.create_run(client.create_experiment("e", (tmp_path / "artifacts").as_uri())).info.run_id
    best = dump(compose("quickstart", ["method.tau=2.5", "optim=sgd"]))
    client.log_text(made, best, "of the sweep/best.yaml")
    client.log_text(made, "method: {tau: 1", "broken.yaml")
    return str(made)


@pytest.mark.usefixtures("warm_deliveries")
def test_a_configuration_of_a_run(monkeypatch, err, run_id: str, sqlite_uri: str, tmp_path: Path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    here = f"tracking.uri={sqlite_uri}"
    config = configuration(cli.parse([f"cfg=runs:/{run_id}/of the sweep/best.yaml", here, "seed=7"]))
    expected = compose("quickstart", ["method.tau=2.5", "optim=sgd", here, "seed=7"])
    assert config == expected
    assert config_hash(config) == config_hash(expected)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri)
    monkeypatch.setenv("DRY_RUN", "1")
    for path, words in (("missing.yaml", "cannot be fetched from sqlite:///"), ("broken.yaml", "no valid YAML")):
        err.truncate(err.seek(0))
        assert Step("distill", job=never).main([f"cfg=runs:/{run_id}/{path}"]) == 2
        assert err.getvalue().startswith(f"cfg=runs:/{run_id}/{path}")
        assert words in err.getvalue()
        assert err.getvalue().count("\n") == 1
    assert not list(tmp_path.glob("asib-*")), "what was fetched is still there"


@pytest.mark.parametrize("override", ["tracking.mode=offline", "tracking=offline", "tracking={mode: offline}"])
def test_off_line_there_is_nothing_to_fetch_from(override):
    with pytest.raises(UserError, match="tracking is offline"):
        configuration(cli.parse(["cfg=runs:/ab/best.yaml", override]))


@pytest.mark.parametrize("cfg", ["runs:/ab", "runs:/ab/", "https://host/best.yaml", "models:/m/1"])
def test_only_a_file_of_a_run_is_a_configuration(cfg):
    with pytest.raises(UserError, match="give runs:/<run id>/<file>"):
        configuration(cli.parse([f"cfg={cfg}"]))


# ------------------------------------------------------------------------------------------ a step's own keys


@pytest.mark.parametrize("seed", ["", "3"])
@pytest.mark.parametrize(
    ("step", "argument", "meant"),
    [
        ("promote", "nam=x", "name"),
        ("promote", "gates.alpha=0.1", "gate.alpha"),
        ("promote", "metod.tau=2", "method.tau"),
        ("predict", "image=x", "images"),
        ("evaluate", "splits=test", "split"),
        ("compare", "run=a,b", "runs"),
        ("ablate", "sedes=0,1", "seeds"),
        ("sweep", "trails=3", "trials"),
        ("sweep", "swep.sampler.name=gp", "sweep.sampler.name"),
    ],
)
def test_a_misspelt_key_of_a_step_is_answered_with_its_own_keys_too(monkeypatch, err, step, argument, meant, seed):
    monkeypatch.setenv("SEED", seed)
    assert importlib.import_module(f"steps.{step}").main([argument]) == 2
    key = argument.partition("=")[0]
    assert err.getvalue() == f"{key}: unknown key; did you mean {meant}?\n"
