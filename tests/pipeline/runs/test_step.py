"""The life of a step's process: a dry run, and a configuration that lies on a tracking server."""

from __future__ import annotations

import importlib
import io
import logging
from pathlib import Path

import pytest

from pipeline.compose import cli
from pipeline.compose.compose import compose, dump
from pipeline.config import Config, config_hash
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


def test_a_dry_run_prints_the_configuration_and_what_the_step_adds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], err: io.StringIO, tmp_path: Path
) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setenv("SEED", "3")
    argv = ["cfg=quickstart", "method.tau=2", f"output_dir={tmp_path / 'runs'}"]

    def request(config: Config, _: cli.Command) -> tuple[Config, int]:
        return config.model_copy(update={"rung": "x"}), config.seed

    assert Step("distill", request=request, job=never, words=lambda seed: f"2 jobs, {seed}\n").main(argv) == 0
    printed = capsys.readouterr().out
    expected = compose("quickstart", [*argv[1:], "seed=3", "rung=x"])
    assert printed == dump(expected) + "\n# 2 jobs, 3\n"
    (tmp_path / "again.yaml").write_text(printed)
    assert compose(str(tmp_path / "again.yaml")) == expected
    assert err.getvalue() == "seed=3 (from the environment: SEED)\n"
    assert not (tmp_path / "runs").exists()


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
def test_a_refusal_is_one_line(
    monkeypatch: pytest.MonkeyPatch, err: io.StringIO, variable: str, value: str, message: str
) -> None:
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
def test_a_configuration_of_a_run(
    monkeypatch: pytest.MonkeyPatch, err: io.StringIO, run_id: str, sqlite_uri: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    here = f"tracking.uri={sqlite_uri}"
    config = configuration(cli.parse([f"cfg=runs:/{run_id}/of the sweep/best.yaml", here, "seed=7"]))
    expected = compose("quickstart", ["method.tau=2.5", "optim=sgd", here, "seed=7"])
    assert config == expected
    assert config_hash(config) == config_hash(expected)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri)
    monkeypatch.setenv("DRY_RUN", "1")
    for path, words in (("missing.yaml", "cannot be fetched from sqlite:///"), ("broken.yaml", "not valid YAML")):
        err.truncate(err.seek(0))
        assert Step("distill", job=never).main([f"cfg=runs:/{run_id}/{path}"]) == 2
        assert err.getvalue().startswith(f"cfg=runs:/{run_id}/{path}")
        assert words in err.getvalue()
        assert err.getvalue().count("\n") == 1
    assert not list(tmp_path.glob("asib-*")), "what was fetched is still there"


@pytest.mark.parametrize(
    ("cfg", "override", "message"),
    [
        ("runs:/ab/best.yaml", "tracking.mode=offline", "tracking is offline"),
        ("runs:/ab/best.yaml", "tracking=offline", "tracking is offline"),
        ("runs:/ab/best.yaml", "tracking={mode: offline}", "tracking is offline"),
        *((cfg, "seed=0", "give runs:/<run id>/<file>") for cfg in ("runs:/ab", "runs:/ab/", "https://host/best.yaml")),
        ("models:/m/1", "seed=0", "give runs:/<run id>/<file>"),
    ],
)
def test_only_a_file_of_a_run_is_a_configuration(cfg: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        configuration(cli.parse([f"cfg={cfg}", override]))


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
def test_a_misspelt_key_is_answered_with_the_steps_own(
    monkeypatch: pytest.MonkeyPatch, err: io.StringIO, step: str, argument: str, meant: str, seed: str
) -> None:
    monkeypatch.setenv("SEED", seed)
    assert importlib.import_module(f"steps.{step}").main([argument]) == 2
    key = argument.partition("=")[0]
    assert err.getvalue() == f"{key}: unknown key; did you mean {meant}?\n"
