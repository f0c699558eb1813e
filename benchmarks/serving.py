"""How fast, and how reliably, a student is served: eight clients on loopback for a minute.

    python -m benchmarks.serving [--seconds 60] [--clients 8] [--images 1] [--model models:/<name>@champion]

A real `mlflow models serve`, started as docs/serving.md says; every client has one connection, and sends its next
request of base64 PNG images once the last answer has arrived and been checked. Without --model a student of the
quickstart is trained for two epochs and registered in a store of its own. Uses all cores; writes
benchmarks/results/serving.json.
"""

import base64
import http.client
import io
import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks import harness
from pipeline.config import DatasetConfig
from pipeline.data.sources import load
from pipeline.tracking import start
from tests.model_server import ModelServer

NAME = "quickstart"
BODIES = 64
"""Number of different requests, sent in turn."""
WARM_UP_S = 3.0
ERRORS_SHOWN = 5


def client(
    port: int, bodies: list[bytes], expected: list[list[str]], first: int, until: float
) -> tuple[list[float], list[str]]:
    """Send requests until time is up, beginning with body `first`.

    Args:
        expected: the classes in the answer to each body.

    Returns:
        Seconds from sending each request to having read its answer; errors.
    """
    latencies, errors = [], []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    index = first % len(bodies)
    while (began := time.perf_counter()) < until:
        try:
            connection.request("POST", "/invocations", bodies[index], {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            latencies.append(time.perf_counter() - began)
            if answer.status != 200:
                errors.append(f"{answer.status}: {content[:200]!r}")
            elif classes(content) != expected[index]:
                errors.append(f"request {index} got another answer than before")
        except (OSError, http.client.HTTPException) as error:
            errors.append(f"{type(error).__name__}: {error}")
            connection.close()
        index = (index + 1) % len(bodies)
    connection.close()
    return latencies, errors


def classes(answer: bytes) -> list[str]:
    """The classes in an answer."""
    return [image["class"] for image in json.loads(answer)["predictions"]]


def requests(count: int) -> list[bytes]:
    """Bodies with `count` images each, of the bundled sample's test split."""
    images = np.asarray(load(DatasetConfig(name="cifar100_sample")).test_x).transpose(0, 2, 3, 1)
    texts = []
    for image in images[:: max(1, len(images) // BODIES)][:BODIES]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        texts.append(base64.b64encode(buffer.getvalue()).decode())
    return [json.dumps({"inputs": (texts[i:] + texts[:i])[:count]}).encode() for i in range(len(texts))]


def answered(server: ModelServer, bodies: list[bytes]) -> list[list[str]]:
    """The classes in the answer to each body, asked alone."""
    found = []
    for body in bodies:
        status, content = server.ask("POST", "/invocations", body)
        if status != 200:
            raise SystemExit(f"the server refuses a request: {status} {content[:300]!r}")
        found.append(classes(content))
    return found


def cpu_seconds(server: ModelServer) -> float:
    """Processor time that the server has used so far."""
    times = [psutil.Process(number).cpu_times() for number in server.processes()]
    return sum(each.user + each.system for each in times)


def measure(server: ModelServer, clients: int, seconds: float, images: int) -> dict[str, Any]:
    """Latencies in ms, requests and images per second, errors, memory of the server."""
    bodies = requests(images)
    expected = answered(server, bodies)
    with ThreadPoolExecutor(clients) as pool:
        for duration in (min(WARM_UP_S, seconds), seconds):
            began, used = time.perf_counter(), cpu_seconds(server)
            asked = [
                pool.submit(client, server.port, bodies, expected, 7 * k, began + duration) for k in range(clients)
            ]
            found = [future.result() for future in asked]
            elapsed, used = time.perf_counter() - began, cpu_seconds(server) - used
    latencies = 1000 * np.array([value for taken, _ in found for value in taken])
    errors = [error for _, said in found for error in said]
    return {
        "clients": clients,
        "images_per_request": images,
        "bytes_per_request": round(float(np.mean([len(body) for body in bodies]))),
        "seconds": round(elapsed, 2),
        "requests": len(latencies),
        "requests_by_client": sorted(len(taken) for taken, _ in found),
        "errors": len(errors),
        "first_errors": errors[:ERRORS_SHOWN],
        "latency_ms": {f"p{p}": round(float(np.percentile(latencies, p)), 2) for p in (50, 95, 99)}
        | {"mean": round(float(latencies.mean()), 2), "max": round(float(latencies.max()), 2)},
        "requests_per_second": round(len(latencies) / elapsed, 1),
        "images_per_second": round(images * len(latencies) / elapsed, 1),
        "server_cpu_ms_per_request": round(1000 * used / len(latencies), 3),
        "server_memory_mb": round(
            sum(psutil.Process(number).memory_full_info().pss for number in server.processes()) / 2**20
        ),
    }


@contextmanager
def student(model: str | None) -> Iterator[tuple[str, str, str]]:
    """Model URI, tracking URI, and what is served, in words."""
    if model is not None:
        yield model, start.default_uri(), model
        return
    with tempfile.TemporaryDirectory(prefix="asib-serving-") as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        short = ("method.num_stages=1", "method.student_epochs_per_stage=[2]")
        where = (f"tracking.uri={uri}", f"output_dir={folder}/runs", f"register={NAME}")
        harness.step("baseline", "cfg=quickstart", *short, *where)
        words = "student of cfg=quickstart (cifar_resnet8, 20 classes, 32×32), two epochs"
        yield f"models:/{NAME}@challenger", uri, words


def main() -> None:
    parser = harness.parser(__doc__, "output")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 32], help="images in each request")
    parser.add_argument("--model", help="a registered model of MLFLOW_TRACKING_URI")
    options = parser.parse_args()
    result: dict[str, Any] = harness.described("onnxruntime", "numpy", "pillow", "uvicorn", "fastapi")
    result["results"] = []
    with student(options.model) as (model, uri, words), tempfile.TemporaryDirectory() as elsewhere:
        server = ModelServer(model, uri, Path(elsewhere))
        result |= {"model": words, "start_seconds": round(server.start(), 1)}
        try:
            for images in options.images:
                result["results"].append(measure(server, options.clients, options.seconds, images))
                print(json.dumps(result["results"][-1]), flush=True)
        finally:
            server.stop()
    harness.write("serving", result, options.output)
    if any(measured["errors"] for measured in result["results"]):
        raise SystemExit("there were errors: see first_errors")


if __name__ == "__main__":
    main()
