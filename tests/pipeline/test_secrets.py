"""What looks like a secret, and texts without it."""

import logging
import os
import sys
from pathlib import Path

import pytest

from pipeline import secrets
from pipeline.journal import Journal, read_entries

SECRET = ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "DB_PASS"]
SECRET += ["WANDB_API_KEY", "OPENAI_KEY", "GITHUB_PAT", "MYSQL_PWD", "db.password", "private_key", "clientSecret"]
SECRET += ["x-api-key", "GOOGLE_CREDENTIALS", "MLFLOW_FLASK_SERVER_SECRET_KEY", "PGPASSWORD"]
OPEN = ["PWD", "OLDPWD", "PATH", "AWS_REGION", "PGPASSFILE", "method.feat_kd_key", "ib_mbm_query_key", "learnable_q"]
OPEN += ["tokenizer", "compass", "HOME", "MLFLOW_TRACKING_USERNAME", "SSH_AUTH_SOCK", "PATTERN", "optim.momentum"]


@pytest.mark.parametrize(("name", "secret"), [*((n, True) for n in SECRET), *((n, False) for n in OPEN)])
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert secrets.looks_secret(name) is secret


@pytest.mark.parametrize(
    "line",
    [
        '+token = "SWORDFISH-1"',
        "+API_KEY=SWORDFISH-1",
        "  password: SWORDFISH-1, and SWORDFISH-1",
        '-  "secret": "SWORDFISH-1",',
        '+os.environ["MLFLOW_TRACKING_PASSWORD"] = "SWORDFISH-1"',
        "+connect(host, password='SWORDFISH-1', user=me)",
        "+mysql --password SWORDFISH-1 -u me",
        "+machine host login me password SWORDFISH-1",
        "+uri = 'http://me:SWORDFISH-1@host/path'",
        "+see http://host/x?token=SWORDFISH-1&page=2",
        "+Authorization: Bearer SWORDFISH-1",
        "+curl -H 'X-Auth: Bearer SWORDFISH-1'",
        "+password = f'SWORDFISH-1'",
    ],
)
def test_a_line_with_a_secret_keeps_the_rest(line: str) -> None:
    masked = secrets.mask_lines(line)
    assert "SWORDFISH" not in masked
    assert secrets.MASK in masked
    assert masked[:4] == line[:4]


@pytest.mark.parametrize("kind", ["ghp_" + "a1" * 18, "AKIA" + "Q1" * 8, "glpat-" + "a1" * 10, "hf_" + "aB" * 17])
def test_well_known_shapes_need_no_name(kind: str) -> None:
    assert secrets.mask_lines(f"+x = load({kind!r})") == "+x = load('***')"


def test_a_private_key_goes_line_by_line_and_what_follows_stays() -> None:
    text = "a\n+-----BEGIN RSA PRIVATE KEY-----\n+MIIEpAIBAAKCAQEA\n+-----END RSA PRIVATE KEY-----\nb"
    assert secrets.mask_lines(text) == "a\n+***\n+***\n+***\nb"


@pytest.mark.parametrize(
    "line",
    ["+def f(token: str | None = None) -> int:", "+feat_kd_key: feat_2d", "+if password == given:", "+password:"],
)
def test_code_and_other_keys_stay(line: str) -> None:
    assert secrets.mask_lines(line) == line


def test_values_of_the_environment_are_masked_as_whole_words_and_short_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"MLFLOW_TRACKING_PASSWORD": "sword.fish", "API_TOKEN": "abc", "OTHER": "plain-text"}.items():
        monkeypatch.setenv(name, value)
    assert secrets.mask("run sword.fish-7 of abc, plain-text") == "run ***-7 of abc, plain-text"
    assert secrets.mask("passwords.fishes") == "passwords.fishes"


def test_a_journal_holds_no_secret_whichever_way_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", 'sword fish-é"1')
    monkeypatch.setenv("MY_TOKEN", "journal")
    secret = os.environ["MLFLOW_TRACKING_PASSWORD"]
    folder = tmp_path / "journal"
    journal = Journal.create(folder, experiment=secret, name=f"run {secret}", tags={"a": secret})
    journal.params({"run_name": secret, "tracking.uri": "http://me:pass@host"})
    journal.tags({"note": f"see {secret}."})
    (folder / "journal").mkdir()
    journal.artifact(folder / "journal", "journal")
    journal.dataset("d", "0", "training", f"http://me:{secret}@host/x", profile={"classes": 2, "from": secret})
    journal.end("FAILED", "failed", 1, f"401 for {secret}")
    text = (folder / "journal.jsonl").read_text()
    assert "sword" not in text
    assert ":pass@" not in text
    entries = read_entries(folder / "journal.jsonl")[0]
    assert entries[0].data["name"] == "run ***"
    assert entries[-1].data["message"] == "401 for ***"
    (artifact,) = [entry.data for entry in entries if entry.kind == "artifact"]
    assert (artifact["path"], artifact["to"]) == ("journal", "journal"), "names of files are the record's own"


def test_log_lines_and_tracebacks_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "sword-fish")
    try:
        raise ValueError("refused: sword-fish")
    except ValueError:
        record = logging.LogRecord("x", 40, "f", 1, "at %s", ("http://me:pw@host",), sys.exc_info())
    text = secrets.Formatter("%(message)s").format(record)
    assert "sword-fish" not in text
    assert text.startswith("at http://me:***@host\nTraceback")
