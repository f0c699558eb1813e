"""The server of `steps.serve` on a real socket: what it takes, and what is too large, deep or slow, or no request."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.predict import serve
from pipeline.predict.predict import load
from pipeline.served.student_pyfunc import Classifier
from tests.pipeline.served.test_bundle import CLASSES, network

IDLE_S, BODY = 0.5, 300_000
LIMITS = serve.Limits(body=BODY, idle=IDLE_S, request=20.0)
JSON = {"Content-Type": "application/json"}
LIGHT = np.full((4, 4, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("served")
    onnx.save(network(), folder / "net.onnx")
    (folder / "meta.json").write_text(json.dumps({"classes": CLASSES, "image_size": 4, "in_chans": 3}))
    classifier = Classifier(str(folder / "net.onnx"), str(folder / "meta.json"))
    server = serve.server(serve.application(classifier, LIMITS, {"model": 'models:/\\a"b/1'}), LIMITS)
    with serve.listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield int(listener.getsockname()[1])
        server.should_exit = True
        thread.join(10)


def ask(
    port: int, body: bytes | None, headers: dict[str, str] | None = None, path: str = "/invocations", method: str = ""
) -> tuple[int, bytes, float]:
    """Status, body and seconds of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    began = time.monotonic()
    try:
        connection.request(
            method or ("GET" if body is None else "POST"), path, body, JSON if headers is None else headers
        )
        answer = connection.getresponse()
        return answer.status, answer.read(), time.monotonic() - began
    finally:
        connection.close()


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("1", (width, height), 1).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_pictures_and_pixels_are_answered(port: int) -> None:
    status, body, _ = ask(port, json.dumps({"inputs": [LIGHT.tolist(), (LIGHT * 0).tolist(), png(9, 5)]}).encode())
    assert status == 200
    found = json.loads(body)["predictions"]
    assert [one["class"] for one in found] == ["light", "dark", "light"]
    assert found[0] == {"class": "light", "probability": 1.0, "probabilities": {"dark": 0.0, "light": 1.0}}
    assert [ask(port, None, path=path)[:2] for path in ("/ping", "/health")] == [(200, b"\n")] * 2


def scraped(port: int) -> dict[str, float]:
    """Every sample of /metrics."""
    status, body, _ = ask(port, None, path="/metrics")
    assert status == 200
    lines = [line.rpartition(" ") for line in body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_metrics_count_requests_images_and_seconds(port: int) -> None:
    before = scraped(port)
    ask(port, json.dumps({"inputs": [LIGHT.tolist()] * 3}).encode())
    ask(port, b"[1]")
    ask(port, None, path="/ping")
    after = scraped(port)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown['asib_requests_total{status="200"}'] == 1
    assert grown['asib_requests_total{status="400"}'] == 1
    assert grown["asib_images_total"] == 3
    assert grown["asib_request_seconds_count"] == grown['asib_request_seconds_bucket{le="+Inf"}'] == 2
    bounds = [value for name, value in after.items() if name.startswith("asib_request_seconds_bucket")]
    assert bounds == sorted(bounds)
    assert 0 < grown["asib_request_seconds_sum"] < 60
    assert (after["asib_requests_running"], after['asib_model_info{model="models:/\\\\a\\"b/1"}']) == (0, 1)


def test_a_busy_server_asks_for_no_more(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(port, None, path="/ready")[:2] == (200, b"ready\n")
    monkeypatch.setattr(serve, "BUSY", 1)
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        until(lambda: ask(port, None, path="/ready")[0] == 503)
    until(lambda: ask(port, None, path="/ready")[0] == 200)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (b"{}", {}, 400, "no Content-Type"),
        (b"{}", {"Content-Type": "text/csv"}, 415, "application/json"),
        (b"{}", {"Content-Type": "application/json; charset=latin-1"}, 415, "UTF-8"),
        (b"[" * 100_000, None, 400, "nested too deeply"),
        (b'{"inputs": [' + b"[" * 900 + b"]" * 900 + b"]}", None, 400, "image 0"),
        (b'{"inputs": [' + b'{"a":' * 50_000, None, 400, "nested too deeply"),
        (b'{"inputs": [' + b"9" * 5000 + b"]}", None, 400, "not valid JSON"),
        (b"\xff\xfe\xfd", None, 400, "not valid JSON"),
        (b"[1]", None, 400, "inputs"),
        (b'{"inputs": "x"}', None, 400, "inputs"),
        (b'{"inputs": []}', None, 400, "empty"),
        (b'{"inputs": [' + b"1," * 1024 + b"1]}", None, 400, "1025 images, at most 1024"),
        (b" " * (BODY + 1), None, 413, f"more than {BODY} bytes"),
        (json.dumps({"inputs": [png(9000, 8000)]}).encode(), None, 400, "9000 × 8000 pixels"),
        (json.dumps({"inputs": [png(20000, 3000)] * 9}).encode(), None, 400, "540000000 pixels together"),
    ],
)
def test_what_is_no_request_or_too_much_is_refused(
    port: int, body: bytes, headers: dict[str, str] | None, status: int, says: str
) -> None:
    found, text, seconds = ask(port, body, headers)
    assert found == status, text
    assert says in json.loads(text)["message"]
    assert len(text) < 300
    assert seconds < 1.0
    assert ask(port, None, path="/ping")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/invocations", 405), ("DELETE", "/invocations", 405), ("POST", "/ping", 405), ("GET", "/docs", 404)],
)
def test_other_paths_and_methods(port: int, method: str, path: str, status: int) -> None:
    assert ask(port, b"" if method == "POST" else None, path=path, method=method)[0] == status


def raw(port: int, sent: bytes) -> tuple[bytes, float]:
    """What comes back until the server closes, and the seconds until then."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        began = time.monotonic()
        connection.sendall(sent)
        got = b""
        while part := connection.recv(65536):
            got += part
        return got, time.monotonic() - began


HEAD = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (HEAD + b"Content-Length: 100\r\n\r\n{", b"408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"408"),
        (HEAD + b"Content-Length: 99999999999\r\n\r\n{", b"413"),
        (HEAD + b"Content-Length: x\r\n\r\n{", b"400"),
        (HEAD, b""),
        (b"", b""),
    ],
)
def test_what_is_sent_half_times_out(port: int, sent: bytes, status: bytes) -> None:
    got, seconds = raw(port, sent)
    assert got.split(b" ")[1:2] == ([status] if status else []), got
    assert seconds < IDLE_S + serve.LINGER_S + 1.0


def test_an_endless_body_is_cut_off(port: int) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    got, _ = raw(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 8)
    assert got.startswith(b"HTTP/1.1 413")


def test_a_port_that_is_taken_is_one_line(port: int) -> None:
    with pytest.raises(UserError, match=f"^host=127.0.0.1 port={port}: cannot listen there"):
        serve.listen("127.0.0.1", port)


def test_a_folder_of_a_student_is_served_and_a_wrong_one_refused(tmp_path: Path) -> None:
    def none(uri: str, to: Path) -> Any:
        raise AssertionError("nothing is fetched for a folder")

    onnx.save(network(), tmp_path / "student.onnx")
    (tmp_path / "meta.json").write_text(json.dumps({"classes": CLASSES, "image_size": 4, "in_chans": 3}))
    student, classifier = load(str(tmp_path), none, tmp_path)
    assert (classifier.classes, student.folder, student.version) == (CLASSES, tmp_path, "")
    (tmp_path / "student.onnx").unlink()
    with pytest.raises(UserError, match=r"no student is in it"):
        load(str(tmp_path), none, tmp_path)


@pytest.mark.skipif(shutil.which("caddy") is None, reason="no caddy here")
def test_the_proxy_before_it_is_valid_and_limits_bodies_alike() -> None:
    file = Path(__file__).resolve().parents[3] / "deploy/serving.Caddyfile"
    names = ("SITE", "USER", "UPSTREAM")
    given = {f"ASIB_SERVING_{name}": "localhost:8443" for name in names} | {"ASIB_TLS": "tls internal"}
    command = ["caddy", "adapt", "--adapter", "caddyfile", "--config", str(file)]
    hashed = {"ASIB_SERVING_PASSWORD": "JDJhJDE0JA=="}
    done = subprocess.run(command, env={**os.environ, **given, **hashed}, capture_output=True, text=True, check=True)
    assert f'"max_size":{serve.Limits().body}' in done.stdout
    assert {"read_timeout", "read_header_timeout"} <= set(json.loads(done.stdout)["apps"]["http"]["servers"]["srv0"])
