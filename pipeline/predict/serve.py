"""A student over HTTP without its version's code: the answers of `mlflow models serve`, from this project's own code.

`/ping`, `/health`, `/version` and `/invocations` as MLflow 3 has them for a student, and for whoever runs it `/ready`
and `/metrics`. Requests that are too large, too deeply nested or too slow are refused; see `Limits`.
"""

import asyncio
import functools
import importlib.metadata
import json
import logging
import os
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.compose import cli
from pipeline.compose.groups import STUDENTS
from pipeline.config import Config
from pipeline.config.numbers import whole
from pipeline.errors import UserError
from pipeline.predict.metrics import CONTENT_TYPE, Metrics, Outcome
from pipeline.predict.predict import load
from pipeline.served.pictures import Refused
from pipeline.served.student_pyfunc import Classifier, answers
from pipeline.tracking import start

MOST = 1 << 31
CONNECTIONS = 256
"""Simultaneous connections; further ones are answered with 503."""
LINGER_S, LINGER_BYTES = 1.0, 64 << 20
"""How long and how much of a refused body is still read, so that its sender sees the refusal, not a reset."""

logger = logging.getLogger("asib")


@dataclass(frozen=True)
class Limits:
    """`body`: bytes of a request. `idle`: seconds without a byte of a request; `request`: seconds for all of it."""

    body: int = 32 << 20
    idle: float = 10.0
    request: float = 60.0


class Refusal(Response):
    """An error as MLflow 3.17 writes it, byte for byte. `last`: no further request of this connection is read."""

    def __init__(self, message: str, status: int = 400, code: str = "INVALID_PARAMETER_VALUE", last: bool = False):
        said = {"error_code": code, "message": message}
        if code == "INVALID_PARAMETER_VALUE":
            said |= {"sqlstate": "KAM00", "error_class": code}
        headers = {"connection": "close"} if last else None
        super().__init__(json.dumps(said), status, headers, "application/json")
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._last:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                left = LINGER_BYTES
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        break
        await send({"type": "http.response.body", "body": b""})


BUSY = CONNECTIONS // 2
"""From this many requests at a time on, the server asks for no more: `/ready` says so to whoever distributes them."""


def application(classifier: Classifier, limits: Limits, served: Mapping[str, str] | None = None) -> Starlette:
    """The server for a network that is loaded; `served`: what `/metrics` says of it."""
    counted = Metrics(served or {})
    places = asyncio.Semaphore(max(1, os.cpu_count() or 1))

    async def ping(request: Request) -> Response:
        return Response("\n", media_type="application/json")

    async def ready(request: Request) -> Response:
        if counted.running >= BUSY:
            return Response("busy\n", 503, media_type="text/plain")
        return Response("ready\n", media_type="text/plain")

    async def metrics(request: Request) -> Response:
        return Response(counted.text(), media_type=CONTENT_TYPE)

    async def version(request: Request) -> Response:
        try:
            return Response(importlib.metadata.version("mlflow"), media_type="application/json")
        except importlib.metadata.PackageNotFoundError:  # it is not needed for a student on this machine
            return Response(status_code=404)

    async def invocations(request: Request) -> Response:
        with counted.request() as outcome:
            response = await invoked(request, outcome)
            outcome.status = response.status_code
        return response

    async def invoked(request: Request, outcome: Outcome) -> Response:
        refused = _content_type(request.headers)
        if refused is not None:
            return refused
        try:
            async with asyncio.timeout(limits.request):
                body = await _body(request, limits)
                if isinstance(body, Response):
                    return body
                async with places:
                    text, outcome.images = await asyncio.to_thread(answer, classifier, body)
        except Refused as error:
            return Refusal(str(error))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except TimeoutError:
            return Refusal(f"more than {limits.request:g} s", 504, "TEMPORARILY_UNAVAILABLE", last=True)
        return Response(text, media_type="application/json")

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    routes = [
        Route("/ping", ping),
        Route("/health", ping),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/version", version),
        Route("/invocations", invocations, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse})


def _content_type(headers: Mapping[str, str]) -> Response | None:
    given = headers.get("content-type")
    if given is None:
        return Refusal("no Content-Type: send application/json", last=True)
    kind, *parameters = (part.strip() for part in given.split(";"))
    charset = [value.strip("\"'").lower() for name, _, value in (p.partition("=") for p in parameters) if name]
    if kind.lower() != "application/json" or any(value != "utf-8" for value in charset):
        return Refusal(f"Content-Type {given!r:.100}: send application/json in UTF-8", 415, "BAD_REQUEST", last=True)
    return None


async def _body(request: Request, limits: Limits) -> bytes | Response:
    """A request's body, or the refusal of it."""
    large = f"more than {limits.body} bytes"
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.body:
        return Refusal(large, 413, "BAD_REQUEST", last=True)
    parts: list[bytes] = []
    size, stream = 0, request.stream()
    while True:
        try:
            async with asyncio.timeout(limits.idle):
                part = await anext(stream, None)
        except TimeoutError:
            return Refusal(f"nothing was sent for {limits.idle:g} s", 408, "BAD_REQUEST", last=True)
        if part is None:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > limits.body:
            return Refusal(large, 413, "BAD_REQUEST", last=True)


def answer(classifier: Classifier, body: bytes) -> tuple[str, int]:
    """From a request's JSON to the answer's, and the number of images. Raises Refused."""
    try:
        asked = json.loads(body)
    except RecursionError as error:
        raise Refused("the JSON is nested too deeply") from error
    except ValueError as error:  # also raised for invalid UTF-8 and numbers of thousands of digits
        raise Refused(f"not valid JSON: {error!s:.100}") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("inputs"), list):
        raise Refused('send a JSON object whose key "inputs" is a list of images')
    found = answers(classifier, asked["inputs"])
    return json.dumps({"predictions": found}), len(found)


# the server ----------------------------------------------------------------------------------------------------------


class Patient(H11Protocol):
    """A connection that is closed if no whole header arrives within `idle` seconds; uvicorn alone would wait."""

    def __init__(self, idle: float, **values: Any) -> None:
        super().__init__(**values)
        self._idle = idle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(self._idle, lambda: None if self.cycle is not None else transport.close())


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve on; port 0: a free one. Raises UserError: the address is taken, or not this machine's."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"host={host} port={port}: cannot listen there ({error}); give others") from error


def server(app: Starlette, limits: Limits) -> uvicorn.Server:
    """The server, to be run with `run(sockets=[…])`."""
    protocol: Any = functools.partial(Patient, limits.idle)
    usual: dict[str, Any] = {"ws": "none", "lifespan": "off", "log_level": "warning"}
    return uvicorn.Server(uvicorn.Config(app, http=protocol, limit_concurrency=CONNECTIONS, **usual))


# the step ------------------------------------------------------------------------------------------------------------


def serve(config: Config, command: cli.Command) -> int:
    """Serve the student that the step's own keys name, until a signal arrives; the exit code. Raises UserError."""
    own = command.own
    source = own.get("model", "")
    if not source:
        raise UserError(f"model is not set: give model={STUDENTS}")
    port = whole("port", own.get("port") or "5001", 0, 65535)
    timeout = whole("timeout", own.get("timeout") or "60", high=MOST)
    size = whole("max_bytes", own.get("max_bytes") or str(32 << 20), high=MOST)
    limits = Limits(body=size, request=timeout)
    with listen(own.get("host") or "127.0.0.1", port) as listening:
        with tempfile.TemporaryDirectory(prefix="asib-served-") as folder:
            # asked for a server only where one is needed: a model's folder may be all there is, and nothing writable
            student, classifier = load(
                source,
                lambda what, to: start.fetch_now(config.tracking.uri or start.default_uri(), what, to),
                Path(folder),
            )
        side, channels = classifier.size, classifier.channels
        classifier.probabilities(np.zeros((1, side, side, channels), np.uint8))  # the first answer takes longest
        host, port = listening.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        logger.info("serving %s on http://%s:%d", student.version or source, address, port)
        try:
            server(application(classifier, limits, {"model": student.version or source}), limits).run(
                sockets=[listening]
            )
        except KeyboardInterrupt:
            return 130
    return 0
