"""deploy/: what docker would run is run natively here, and the files agree with each other."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from packaging.requirements import Requirement

from tests.postgres import PASSWORD, PostgresServer
from tests.servers import artifacts_of
from tests.team_server import ADMIN, BUCKET, DEPLOY, TeamServer, python_script

ROOT = DEPLOY.parent
SCRIPTS = sorted(DEPLOY.glob("*.sh"))
DAY_MS = 86_400_000


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


def first_start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ASIB_SECRETS": str(folder / "secrets"), "ASIB_NO_ENV": "1"}
    command = [str(DEPLOY / "first_start.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


# the files ---------------------------------------------------------------------------------------------------------


def test_only_the_proxy_is_reached() -> None:
    services = compose()["services"]
    assert set(services) == {"proxy", "server", "tools", "database", "store"}
    assert [name for name, service in services.items() if "ports" in service] == ["proxy"]
    for name, service in services.items():
        assert ("build" in service) != ("image" in service), name


def test_what_the_compose_file_names_is_there(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("long enough for it")
    assert first_start(tmp_path, "mlflow.example.org", str(tmp_path / "password")).returncode == 0
    made = {path.name for path in (tmp_path / "secrets").iterdir()}
    found = compose()
    assert {Path(secret["file"]).name for secret in found["secrets"].values()} == made
    for name, service in found["services"].items():
        assert set(service.get("secrets", ())) <= set(found["secrets"]), name
        assert set(service.get("depends_on", ())) <= set(found["services"]), name
        for volume in service.get("volumes", ()):
            source = volume.rpartition(":/")[0]
            file = DEPLOY / source
            assert source in found["volumes"] or source.startswith("${") or file.exists(), volume
    (command,) = found["services"]["server"]["command"]
    assert (ROOT / command.removeprefix("/")).stat().st_mode & 0o111
    assert (DEPLOY / found["services"]["server"]["build"]["context"] / "deploy" / "Dockerfile").exists()
    store = found["services"]["store"]["command"]
    assert json.loads((tmp_path / "secrets" / "s3.json").read_text())["identities"][0]["credentials"]
    assert "/run/secrets/s3" in store


def test_every_setting_of_the_compose_file_is_read_by_a_script() -> None:
    text = "".join(path.read_text() for path in [*SCRIPTS, DEPLOY / "bucket.py", DEPLOY / "Caddyfile"])
    services = compose()["services"]
    for service in ("server", "proxy"):
        for name in services[service]["environment"]:
            assert name in text or name in ("AWS_DEFAULT_REGION", "HOME"), name


def test_the_image_has_packages_of_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    for line in (DEPLOY / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            assert re.search(rf"^{Requirement(line).name}(\[[^\]]*\])?==", lock, re.MULTILINE | re.IGNORECASE), line


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_good_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.name == "common.sh" or path.stat().st_mode & 0o111


# the first start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("password", "words"), [("eleven char", "has 11 characters"), ("twelve chars\nand more", "several lines")]
)
def test_a_poor_first_password_is_refused(tmp_path: Path, password: str, words: str) -> None:
    (tmp_path / "password").write_text(password)
    done = first_start(tmp_path, "mlflow.example.org", str(tmp_path / "password"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert words in done.stderr
    assert not (tmp_path / "secrets" / "admin_password").exists()


def test_secrets_are_made_once_and_for_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("exactly_12ch\n")
    for _ in range(2):
        assert first_start(tmp_path, "mlflow.example.org", str(tmp_path / "password")).returncode == 0
        found = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
        assert {path.stat().st_mode & 0o077 for path in (tmp_path / "secrets").iterdir()} == {0}
        assert found["admin_password"] == "exactly_12ch"
        assert all(re.fullmatch("[0-9a-f]{48}", found[name]) for name in ("secret_key", "database_password"))
        (tmp_path / "password").write_text("another password")
    assert len({found[name] for name in ("secret_key", "database_password", "s3_access_key", "s3_secret_key")}) == 4


def test_the_server_does_not_start_without_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("long enough for it")
    first_start(tmp_path, "mlflow.example.org", str(tmp_path / "password"))
    secrets = tmp_path / "secrets"
    cases: list[tuple[dict[str, str], str]] = [
        ({}, "ASIB_ALLOWED_HOSTS is empty"),
        ({"ASIB_ALLOWED_HOSTS": "x", "MLFLOW_AUTH_ADMIN_PASSWORD": "short"}, "has 5 characters"),
        ({"ASIB_SECRETS": str(tmp_path)}, "first_start.sh"),
    ]
    for settings, words in cases:
        environment = {"PATH": os.environ["PATH"], "ASIB_SECRETS": str(secrets), "ASIB_MLFLOW": "false"} | settings
        done = subprocess.run([str(DEPLOY / "serve.sh")], env=environment, capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert words in done.stderr


# the running server --------------------------------------------------------------------------------------------------


def ask(uri: str, path: str, **headers: str) -> int:
    """The status of a POST with the administrator's password."""
    credentials = b64encode(":".join(ADMIN).encode()).decode()
    request = urllib.request.Request(
        f"{uri}{path}",
        data=b'{"max_results": 1}',
        headers={"Authorization": f"Basic {credentials}", "Content-Type": "application/json"} | headers,
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.postgres
def test_only_the_named_hosts_and_origins_are_served(team: TeamServer) -> None:
    search = "/api/2.0/mlflow/experiments/search"
    assert ask(team.uri, search) == 200
    assert ask(team.uri, search, Origin="https://mlflow.example.org") == 200
    assert ask(team.uri, search, Origin="https://elsewhere.example.org") == 403
    assert ask(team.uri, search, Host="elsewhere.example.org") == 403
    assert ask(team.uri, search, Authorization="") == 401


@pytest.mark.postgres
def test_nothing_shows_a_password(team: TeamServer) -> None:
    words = {PASSWORD, ADMIN[1], *((team.secrets / name).read_text() for name in ("secret_key", "s3_secret_key"))}
    for process in [team.pid, *(child.pid for child in psutil.Process(team.pid).children(recursive=True))]:
        line = Path(f"/proc/{process}/cmdline").read_text()
        assert not [word for word in words if word in line]
    log = (team.folder / "server.log").read_text()
    assert not [word for word in words if word in log]


@pytest.fixture
def runs(team: TeamServer, tmp_path: Path) -> dict[str, str]:
    """Runs that ended 40 days ago, or today, with a checkpoint, weights, a picture and a model: name -> id."""
    mlflow = MlflowClient(team.uri)
    experiment = mlflow.create_experiment(f"clean-up {tmp_path.name}")
    now = int(time.time() * 1000)
    found: dict[str, str] = {}
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("slot0.safetensors", "slot1.safetensors", "student.safetensors", "manifest.json"):
        (folder / name).write_bytes(bytes(1000))
    for name, status, days, above in [
        ("old", "FINISHED", 40, None),
        ("child of old", "FINISHED", 41, "old"),
        ("new", "FINISHED", 0, None),
        ("killed", "KILLED", 40, None),
        ("child of killed", "FINISHED", 41, "killed"),
    ]:
        tags = {"mlflow.parentRunId": found[above]} if above else {}
        run = mlflow.create_run(experiment, run_name=name, tags=tags).info.run_id
        mlflow.log_artifacts(run, str(folder), "checkpoints")
        mlflow.log_text(run, "x", "checkpoints_old/slot0.safetensors")
        mlflow.log_metric(run, "student/acc", 1.0)
        mlflow.set_terminated(run, status, end_time=now - days * DAY_MS)
        found[name] = run
    model = mlflow.create_logged_model(experiment, name="student", source_run_id=found["old"])
    mlflow.log_model_artifacts(model.model_id, str(folder))
    return found


def keys(team: TeamServer) -> set[str]:
    pages = team.bucket().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return {item["Key"] for page in pages for item in page.get("Contents", ())}


@pytest.mark.postgres
def test_clean_up_takes_old_checkpoints_and_nothing_else(
    team: TeamServer,
    runs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clean_up = python_script("clean_up")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.uri)
    bank = tmp_path / "bank"
    long_ago = time.time() - 40 * 86_400
    for name, used in (("used", time.time()), ("unused", long_ago)):
        (bank / name).mkdir(parents=True)
        (bank / name / "logits.bin").write_bytes(bytes(1000))
        os.utime(bank / name / "logits.bin", (used, long_ago))
    before = keys(team)
    assert clean_up.main(["--days", "30", "--bank", str(bank)]) == 0
    assert keys(team) == before, "without --apply nothing goes"
    said = capsys.readouterr().out
    assert "would remove" in said
    assert (bank / "unused").exists()
    # 3 files of 1000 bytes of 2 runs, and the bank's
    assert "would remove 0.007 MB" in said
    assert {run for run in runs.values() if run in said} == {runs["old"], runs["child of old"]}

    assert clean_up.main(["--days", "30", "--bank", str(bank), "--apply"]) == 0
    gone = {key.rpartition("/artifacts/")[::2] for key in before - keys(team)}
    names = {"checkpoints/manifest.json", "checkpoints/slot0.safetensors", "checkpoints/slot1.safetensors"}
    assert {path for _, path in gone} == names
    assert {place.rpartition("/")[2] for place, _ in gone} == {runs["old"], runs["child of old"]}
    assert [path.name for path in bank.iterdir()] == ["used"]
    mlflow = MlflowClient(team.uri)
    assert "asib.checkpoint_removed" in mlflow.get_run(runs["old"]).data.tags
    capsys.readouterr()
    assert clean_up.main(["--days", "30"]) == 0
    assert not [run for run in runs.values() if run in capsys.readouterr().out], "there is nothing left to remove"


@pytest.mark.postgres
def test_deleted_runs_go_for_good_with_their_artifacts(team: TeamServer, runs: dict[str, str]) -> None:
    mlflow = MlflowClient(team.uri)
    mlflow.delete_run(runs["new"])
    settings = {"PGPASSWORD": PASSWORD, "MLFLOW_TRACKING_URI": team.uri}
    settings |= {"MLFLOW_TRACKING_USERNAME": ADMIN[0], "MLFLOW_TRACKING_PASSWORD": ADMIN[1]}
    where = ["--backend-store-uri", team.environment["ASIB_DATABASE_URI"]]
    command = [team.environment["ASIB_MLFLOW"], "gc", "--run-ids", runs["new"], *where]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(MlflowException):
        mlflow.get_run(runs["new"])
    assert not [key for key in keys(team) if runs["new"] in key]
    assert [key for key in keys(team) if runs["old"] in key]


def test_clean_up_keeps_what_has_made_a_champion(
    sqlite_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the promotion's tag, by an alias alone, and when somebody has deleted the run: also on one person's server."""
    mlflow = MlflowClient(sqlite_uri)
    experiment = mlflow.create_experiment("e", (tmp_path / "artifacts").as_uri())
    found = {}
    for name in ("promoted", "aliased", "deleted", "of no use", "deleted and of no use"):
        run = found[name] = mlflow.create_run(experiment).info.run_id
        for file in ("fusion", "slot1"):
            mlflow.log_text(run, "x", f"checkpoints/{file}.safetensors")
        mlflow.set_terminated(run, "FINISHED", end_time=int(time.time() * 1000) - 3 * DAY_MS)
    mlflow.set_tag(found["promoted"], "asib.keep", "champion of m: version 7")
    mlflow.set_tag(found["of no use"], "mlflow.parentRunId", 32 * "0")  # a parent that `mlflow gc` has removed
    mlflow.create_registered_model("m")
    for name in ("aliased", "deleted"):
        version = mlflow.create_model_version("m", f"file:///{name}", run_id=found[name]).version
        mlflow.set_registered_model_alias("m", name, version)
    for name in ("deleted", "deleted and of no use"):
        mlflow.delete_run(found[name])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri)
    clean_up = python_script("clean_up")
    assert clean_up.main(["--days", "2", "--apply"]) == 0
    gone = {name for name, run in found.items() if len(artifacts_of(mlflow, run, "checkpoints")) < 2}
    assert gone == {"of no use"}
    assert artifacts_of(mlflow, found["of no use"]) == ["checkpoints/fusion.safetensors"]
    stages = {name: mlflow.get_run(run).info.lifecycle_stage for name, run in found.items()}
    assert {name for name, stage in stages.items() if stage == "deleted"} == {"deleted and of no use"}
    assert f"restored {found['deleted']}" in capsys.readouterr().out


def test_clean_up_says_in_one_line_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean_up = python_script("clean_up")
    with pytest.raises(SystemExit):
        clean_up.main(["--days", "0"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    capsys.readouterr()
    assert clean_up.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.postgres
@pytest.mark.skipif(shutil.which("pg_dump") is None, reason="apt-get install postgresql-client")
def test_a_backup_restored_elsewhere_is_the_same_server(
    team: TeamServer, runs: dict[str, str], postgres_server: PostgresServer, tmp_path: Path, monkeypatch: Any
) -> None:
    backups = tmp_path / "backups"
    made = team.script("backup.sh", str(backups))
    assert made.returncode == 0, made.stderr
    dump = made.stdout.strip().splitlines()[-1]
    again = team.script("backup.sh", str(backups))
    assert "0 files copied" in again.stderr, "the bucket's copy is incremental"

    uris = [f"postgresql+psycopg{without(postgres_server.create_database())}" for _ in range(2)]
    elsewhere = {"ASIB_DATABASE_URI": uris[0], "ASIB_AUTH_DATABASE_URI": uris[1], "ASIB_ARTIFACTS": "s3://restored"}
    restored = team.script("restore.sh", dump, **elsewhere)
    assert restored.returncode == 0, restored.stderr
    refused = team.script("restore.sh", dump, **elsewhere)
    assert refused.returncode == 2
    assert "empty databases" in refused.stderr
    upgraded = team.script("upgrade.sh", str(tmp_path / "before the upgrade"), **elsewhere)
    assert upgraded.returncode == 0, upgraded.stderr

    s3 = team.bucket()
    names = [item["Key"] for item in s3.list_objects_v2(Bucket="restored")["Contents"]]
    assert set(names) == keys(team)
    for key in names[:5]:
        bodies = [s3.get_object(Bucket=bucket, Key=key)["Body"].read() for bucket in (BUCKET, "restored")]
        assert bodies[0] == bodies[1]
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    one, other = MlflowClient(team.uri), MlflowClient(uris[0])
    for run in runs.values():
        assert one.get_run(run).to_dictionary() == other.get_run(run).to_dictionary()
    import psycopg

    with psycopg.connect(uris[1].replace("+psycopg", "")) as connection:
        assert ("admin", True) in connection.execute("select username, is_admin from users").fetchall()


def without(url: str) -> str:
    """What follows the scheme of a database's URL, without its password."""
    return re.sub(r"^postgresql|:[^:@/]*(?=@)", "", url)
