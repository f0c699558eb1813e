"""Messages at the end of a run, to a real HTTP server: what they say, and that nothing else knows the address."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import apprise  # noqa: F401 - on a busy machine its first import takes longer than a message may
import pytest

from pipeline.compose.compose import compose
from pipeline.errors import UserError
from pipeline.journal import read_entries
from pipeline.runs import notify, opening
from pipeline.runs.ending import Ending
from pipeline.runs.run import Run
from pipeline.runs.step import Step

TOKEN = "address-of-our-channel"


@pytest.fixture(autouse=True)
def err(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What steps say on standard error; environment and signal handlers are as before afterwards."""
    for name in ("SEED", "METHOD", "STUDENT", "TEACHER_PAIR", "DRY_RUN", "RANK", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(notify.VARIABLE, raising=False)
    log, before = logging.getLogger("asib"), dict(os.environ)
    handlers, stream = log.handlers[:], io.StringIO()
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    log.handlers[:] = [logging.StreamHandler(stream)]
    log.setLevel(logging.INFO)
    yield stream
    log.handlers[:] = handlers
    for number, handler in signals.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(before)


class Channel:
    """The messages that arrived, and the address to send them to."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(this) -> None:
                assert this.path == f"/{TOKEN}"
                self.messages.append(json.loads(this.rfile.read(int(this.headers["Content-Length"]))))
                this.send_response(self.status)
                this.end_headers()

            def log_message(this, *_: Any) -> None:
                pass

        self.status = 200
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"json://127.0.0.1:{self.server.server_port}/{TOKEN}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def text(self) -> str:
        """The one message."""
        (said,) = self.messages
        return str(said["message"])


@pytest.fixture
def channel() -> Iterator[Channel]:
    made = Channel()
    yield made
    made.server.shutdown()
    made.server.server_close()


def start(tmp_path: Path, job: Callable[[Run], Any], *given: str) -> tuple[int, Path]:
    """Run a job as the step `distill`, off line; its exit code, and the run's folder."""
    argv = ["cfg=quickstart", "tracking=offline", f"output_dir={tmp_path / 'runs'}", "tracking.git_diff=false", *given]
    code = Step("distill", job=job).main(argv)
    return code, next((tmp_path / "runs").iterdir())


def measured(run: Run) -> float:
    run.ready()
    run.journal.metrics({"final/val_acc": 70.0, "final/acc_val_selected": 71.25}, 0)
    return 70.0


def test_the_end_of_a_run_is_told_and_its_address_is_nowhere(
    tmp_path: Path, channel: Channel, err: io.StringIO
) -> None:
    code, folder = start(tmp_path, measured, f"notify.url={channel.url}", "run_name=kd")
    assert code == 0
    assert channel.text.startswith("71.25 %: test top-1 of the student at the epoch that validation")
    assert "(distill kd, 0 min " in channel.text
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 2
    assert [file.name for file in files if TOKEN in file.read_text(errors="replace")] == []
    assert TOKEN not in err.getvalue()
    params = {k for e in read_entries(folder / "journal.jsonl")[0] if e.kind == "params" for k in e.data["values"]}
    assert "seed" in params
    assert not [name for name in params if name.startswith("notify")]


def failing(run: Run) -> None:
    run.ready()
    raise RuntimeError(f"{TOKEN} is wrong, and so is {os.environ[notify.VARIABLE]}")


def stopped(run: Run) -> None:
    run.ready()
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("the handler has raised")


def promoted(run: Run) -> Ending:
    run.ready()
    tags = {"asib.action": "promote", "asib.promote": "trees", "asib.version": "3"}
    run.journal.tags({**tags, "asib.verdict": "promoted", "asib.verdict_reason": "2.1 points better"})
    return Ending("FINISHED", "promoted", 0)


def rolled_back(run: Run) -> None:
    run.step = "promote"
    run.ready()
    run.journal.tags({"asib.action": "rollback", "mlflow.note.content": "**trees: version 2 is champion &#91;again**"})


def with_nested(run: Run) -> float:
    run.ready()
    with opening.child(run, "distill", "inner", run.config).nested():
        pass
    return 0.5


@pytest.mark.parametrize(
    ("job", "code", "says"),
    [
        (failing, 1, f"failed: RuntimeError: {TOKEN} is wrong, and so is *** (distill "),
        (stopped, 143, "killed: resume continues it (distill "),
        (promoted, 0, "trees version 3 promoted: 2.1 points better (distill "),
        (rolled_back, 0, "trees: version 2 is champion [again (promote "),
        (with_nested, 0, "0.5 (distill "),
    ],
)
def test_each_way_out_is_one_message(
    tmp_path: Path, channel: Channel, monkeypatch: pytest.MonkeyPatch, job: Any, code: int, says: str
) -> None:
    monkeypatch.setenv(notify.VARIABLE, channel.url)
    assert start(tmp_path, job)[0] == code
    assert channel.text.startswith(says)
    assert "\n" not in channel.text


def test_a_channel_that_is_away_costs_a_line(
    tmp_path: Path, channel: Channel, monkeypatch: pytest.MonkeyPatch, err: io.StringIO
) -> None:
    monkeypatch.setattr(notify, "LIMIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections and never answers
        assert start(tmp_path, measured, f"notify.url=json://127.0.0.1:{deaf.getsockname()[1]}/{TOKEN}")[0] == 0
    assert "notify.url: no message reached json://…: no answer within 0.2 s\n" in err.getvalue()
    monkeypatch.setattr(notify, "LIMIT_S", 20.0)
    channel.status = 403
    assert start(tmp_path, measured, f"notify.url={channel.url}")[0] == 0
    assert "notify.url: no message reached json://…: it was not accepted\n" in err.getvalue()
    assert TOKEN not in err.getvalue()


def test_an_address_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, err: io.StringIO
) -> None:
    def never(run: Run) -> None:
        raise AssertionError("it has run")

    argv = [f"output_dir={tmp_path}", "tracking=offline"]
    assert Step("distill", job=never).main([*argv, "notify.url=me@lab.org"]) == 2
    assert Step("distill", job=never).main([*argv, "notify.ulr=json://host"]) == 2
    monkeypatch.setitem(sys.modules, "apprise", None)
    assert Step("distill", job=never).main([*argv, "notify.url=json://host"]) == 2
    assert err.getvalue().splitlines() == [
        "notify.url: give an address as apprise writes them, such as mailto://…",
        "notify.ulr: unknown key; did you mean notify.url?",
        "notify.url needs apprise: pip install 'asib[notify]'",
    ]
    (tmp_path / "mine.yaml").write_text("run_name: ${oc.env:ASIB_NOTIFY_URL}\n")
    with pytest.raises(UserError, match="ASIB_NOTIFY_URL} looks like a secret"):
        compose(str(tmp_path / "mine.yaml"))
