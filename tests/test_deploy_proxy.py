"""The proxy of deploy/: TLS, and passwords that cannot be tried by the dozen."""

from __future__ import annotations

import http.client
import os
import shutil
import ssl
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.servers import free_port
from tests.team_server import DEPLOY, TeamServer, administration, python_script


@contextmanager
def proxy(team: TeamServer, folder: Path) -> Iterator[tuple[str, Path]]:
    """Caddy with deploy/Caddyfile and a certificate of its own authority: its URL, and that authority's certificate."""
    ports = [free_port(), free_port()]
    settings = {
        "ASIB_SITE": f"127.0.0.1:{ports[0]}",
        "ASIB_TLS": "tls internal",
        "ASIB_UPSTREAM": team.uri.removeprefix("http://"),
        "XDG_DATA_HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder),
    }
    # its own ports, and no certificate into the system's store
    head = f"{{\n\thttp_port {ports[1]}\n\tadmin off\n\tskip_install_trust\n}}\n"
    (folder / "Caddyfile").write_text(head + (DEPLOY / "Caddyfile").read_text())
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")],
            env=os.environ | settings,
            stdout=log,
            stderr=log,
        )
    authority = folder / "caddy/pki/authorities/local/root.crt"
    try:
        deadline = time.monotonic() + 60
        while "serving initial configuration" not in (folder / "log").read_text() or not authority.exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"https://127.0.0.1:{ports[0]}", authority
    finally:
        process.terminate()
        process.wait()


def test_wrong_passwords_are_counted_by_all_workers_and_forgiven_with_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passwords = python_script("wrong_passwords")
    now = 1000.0
    monkeypatch.setattr(passwords.time, "monotonic", lambda: now)
    one, other = (passwords.Limit(str(tmp_path / "file"), tries=10) for _ in range(2))
    for number in range(10):
        assert one.wait_s("10.0.0.1", "anna") == 0
        (one, other)[number % 2].tried_in_vain("10.0.0.1", "anna")
    assert one.wait_s("10.0.0.1", "anna") == other.wait_s("10.0.0.1", "anna") == pytest.approx(6.0)
    assert one.wait_s("10.0.0.1", "bert") == one.wait_s("10.0.0.2", "anna") == 0
    for number in range(20):  # names by the dozen, from one address
        one.tried_in_vain("10.0.0.1", f"name {number}")
    assert one.wait_s("10.0.0.1", "bert") == pytest.approx(2.0)
    assert one.wait_s("10.0.0.2", "bert") == 0
    now += 6.0
    assert one.wait_s("10.0.0.1", "anna") == 0
    one.tried_in_vain("10.0.0.1", "anna")
    assert one.wait_s("10.0.0.1", "anna") == pytest.approx(6.0)
    now += 60.0
    assert other.wait_s("10.0.0.1", "anna") == 0
    assert (tmp_path / "file").stat().st_size == 8 * 65536


def log_in_at(uri: str, authority: Path, user: str, password: str, source: str, claimed: str) -> tuple[int, str]:
    """Status, and seconds to wait, of a request from an address of this machine that claims to be forwarded."""
    tls = ssl.create_default_context(cafile=str(authority))
    host, port = uri.removeprefix("https://").split(":")
    there = http.client.HTTPSConnection(host, int(port), timeout=60, context=tls, source_address=(source, 0))
    credentials = b64encode(f"{user}:{password}".encode()).decode()
    headers = {"Authorization": f"Basic {credentials}", "X-Forwarded-For": claimed}
    there.request("GET", "/api/2.0/mlflow/experiments/search?max_results=1", headers=headers)
    answer = there.getresponse()
    answer.read()
    there.close()
    return answer.status, answer.headers.get("Retry-After", "")


@pytest.mark.postgres
@pytest.mark.skipif(shutil.which("caddy") is None, reason="apt-get install caddy")
def test_passwords_cannot_be_tried_by_the_dozen(team: TeamServer, tmp_path: Path) -> None:
    administration(team).create_user("tried", "the right password")
    administration(team).create_user("neighbour", "another one's password")
    with proxy(team, tmp_path) as (uri, authority):
        began = time.monotonic()
        tries = [log_in_at(uri, authority, "tried", f"guess {n}", "127.0.0.1", f"10.1.1.{n}") for n in range(30)]
        more = int((time.monotonic() - began) / 6)  # that time has forgiven
        assert [status for status, _ in tries[:10]] == 10 * [401]
        assert sum(status == 401 for status, _ in tries) <= 10 + more
        assert {status for status, _ in tries} == {401, 429}
        # others from there, and the same from elsewhere, are served; and soon that one too
        assert log_in_at(uri, authority, "neighbour", "another one's password", "127.0.0.1", "")[0] == 200
        assert log_in_at(uri, authority, "tried", "the right password", "127.0.0.2", "")[0] == 200
        status, wait = log_in_at(uri, authority, "tried", "the right password", "127.0.0.1", "")
        if status == 429:
            assert 1 <= int(wait) <= 6
            time.sleep(int(wait))
            status, _ = log_in_at(uri, authority, "tried", "the right password", "127.0.0.1", "")
        assert status == 200


@pytest.mark.postgres
@pytest.mark.skipif(shutil.which("caddy") is None, reason="apt-get install caddy")
def test_clients_work_through_the_proxy_over_tls(
    team: TeamServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxy(team, tmp_path) as (uri, authority):
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(authority))
        mlflow = MlflowClient(uri)
        run = mlflow.create_run(mlflow.create_experiment(f"proxied {tmp_path.name}")).info.run_id
        (tmp_path / "large.bin").write_bytes(os.urandom(20_000_000))
        mlflow.log_artifact(run, str(tmp_path / "large.bin"))
        path = mlflow.download_artifacts(run, "large.bin", str(tmp_path / ".."))
        assert Path(path).read_bytes() == (tmp_path / "large.bin").read_bytes()
