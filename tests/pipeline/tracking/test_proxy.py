"""A proxy that answers in the place of MLflow: its pages are an outage, whatever their status; its limits refuse."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.journal import Journal
from pipeline.tracking.follow import DeliveryLoop
from tests.servers import MlflowServer, artifacts_of, steps

pytestmark = pytest.mark.slow  # a server takes 10 s to start
NGINX = "<html>\r\n<head><title>{0}</title></head>\r\n<body>\r\n<center><h1>{0}</h1></center>\r\n</body>\r\n</html>\r\n"
CADDY = ""
GATEWAY = '{{"message": "no route matched with those values", "status": "{0}"}}'
FORBIDDEN = 403, b"Permission denied"
Page = tuple[int, str]


class Proxy:
    """Hands requests to the server, but those for which `page(method, path)` gives an answer of the proxy's own."""

    def __init__(self, server: MlflowServer) -> None:
        self.page: Callable[[str, str], Page | None] = lambda *_: None
        self.guards = False
        """As basic authentication does for all but the administrator: an unknown run is forbidden."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if (page := outer.page(self.command, self.path)) is not None:
                    status, content, kind = page[0], page[1].format(page[0]).encode(), "text/html"
                else:
                    there = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
                    headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                    there.request(self.command, self.path, body, headers)
                    found = there.getresponse()
                    status, content, kind = found.status, found.read(), found.headers.get("Content-Type", "text/plain")
                    there.close()
                    if outer.guards and status == 404 and "/runs/get" in self.path:
                        status, content, kind = *FORBIDDEN, "text/html"
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def proxy(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    made = Proxy(mlflow_server)
    yield made
    made.close()


def runs(client: MlflowClient, name: str) -> list[str]:
    experiment = client.get_experiment_by_name(name)
    return [run.info.run_id for run in client.search_runs([experiment.experiment_id])]


def page_at(places: Sequence[str], page: Page, method: str, path: str) -> Page | None:
    return page if any(place in path for place in places) else None


SAYS = r"error code|Error:|JSON|Response:|no route|error responses"
PAGES = {
    **{f"nginx {status}": (status, NGINX) for status in (400, 403, 404, 405, 502, 503)},
    **{f"caddy {status}": (status, CADDY) for status in (404, 502)},
    "gateway 404": (404, GATEWAY),
    "login page": (200, NGINX),
}


def test_a_proxys_pages_are_an_outage(mlflow_server: MlflowServer, proxy: Proxy, tmp_path: Path) -> None:
    client = MlflowClient(mlflow_server.uri)
    folder = tmp_path / "run"
    journal = Journal.create(folder, experiment="behind a proxy", name="n")
    with DeliveryLoop(folder, proxy.uri, live=True) as loop:
        loop.run_once()
        for step, page in enumerate(PAGES.values()):
            journal.metrics({"student/acc": 0.5}, step=step)
            (folder / f"{step}.txt").write_text(str(step))
            journal.artifact(folder / f"{step}.txt")
            # first everything is the proxy's; then MLflow takes the batch, and is gone before the file
            for at in ("/", "/log-batch" if page[0] == 200 else "/artifacts/"):
                proxy.page = partial(page_at, ("/version", at), page)
                with pytest.raises(Exception, match=SAYS):
                    loop.run_once()
        assert loop.refused == 0
    # a delivery that begins now knows of its run, and does not take it for one that is gone
    for page in PAGES.values():
        proxy.page = partial(page_at, ("/",), page)
        with (
            DeliveryLoop(folder, proxy.uri, client=MlflowClient(proxy.uri), live=True) as loop,
            pytest.raises(Exception, match=SAYS),
        ):
            loop.run_once()
    proxy.page = lambda *_: None
    journal.end("FINISHED", "completed", 0)
    with DeliveryLoop(folder, proxy.uri, live=True) as loop:
        assert loop.run_once()
        assert loop.refused == 0
        (run,) = runs(client, "behind a proxy")
    assert steps(client, run) == list(range(len(PAGES)))
    assert set(artifacts_of(client, run)) == {f"{step}.txt" for step in range(len(PAGES))}
    assert client.get_run(run).info.status == "FINISHED"


def test_what_a_proxy_never_lets_through_is_refused_once_its_server_is_there(
    mlflow_server: MlflowServer, proxy: Proxy, tmp_path: Path
) -> None:
    client = MlflowClient(mlflow_server.uri)
    folder = tmp_path / "run"
    journal = Journal.create(folder, experiment="limited", name="n")
    for name in ("large.bin", "small.bin"):
        (folder / name).write_bytes(b"x")
        journal.artifact(folder / name)
    journal.end("FINISHED", "completed", 0)

    def too_large(method: str, path: str) -> Page | None:
        return (413, NGINX) if method == "PUT" and path.endswith("large.bin") else None

    proxy.page = too_large
    with DeliveryLoop(folder, proxy.uri) as loop:
        assert loop.run_once()
        assert loop.refused == 1
    (run,) = runs(client, "limited")
    assert [file.path for file in client.list_artifacts(run)] == ["small.bin"]
    assert client.get_run(run).info.status == "FINISHED"


def test_what_is_forbidden_to_all_but_the_administrator_holds_nothing_up(
    mlflow_server: MlflowServer, proxy: Proxy, tmp_path: Path
) -> None:
    """A teacher that was fine-tuned off line is a journal of this machine; and a model that others look after."""
    proxy.guards = True
    proxy.page = partial(page_at, ("/model-versions/create", "/registered-models/create"), (403, "Permission denied"))
    client, folder = MlflowClient(mlflow_server.uri), tmp_path / "run"
    journal = Journal.create(folder, experiment="guarded", name="n")
    journal.model_input(32 * "0")
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"x")
    journal.model(folder / "model", "student", kind="weights")
    journal.register("the team's", model="student", alias="challenger", tags={})
    journal.metrics({"student/acc": 0.5}, step=0)
    journal.end("FINISHED", "completed", 0)
    with DeliveryLoop(folder, proxy.uri) as loop:
        assert loop.run_once()
        assert loop.refused == 1, "the version"
    (run,) = runs(client, "guarded")
    assert (client.get_run(run).info.status, client.get_run(run).data.metrics) == ("FINISHED", {"student/acc": 0.5})
    Journal.create(tmp_path / "other", experiment="guarded").close()
    with (
        DeliveryLoop(tmp_path / "other", proxy.uri, adopt=32 * "0") as loop,
        pytest.raises(UserError, match="knows no run"),
    ):
        loop.run_once()
