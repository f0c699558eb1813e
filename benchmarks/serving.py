"""How fast, and how reliably, a student is served: eight clients on loopback for a minute.

    python -m benchmarks.serving [--seconds 60] [--clients 8] [--images 1] [--model models:/<name>@champion]

A real `mlflow models serve`, started as docs/serving.md says; every client has one connection, and sends the next
request of base64 PNG images when the answer to the last has come and been found right. Without --model a student of the
quickstart is trained for two epochs and registered in a store of its own. Uses all cores; writes
benchmarks/results/serving.json.
"""

import argparse
import base64
import http.client
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import described
from tests.model_server import ModelServer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "serving.json"
NAME = "quickstart"
BODIES = 64
"""Different requests, taken in turn."""
WARM_UP_S = 3.0
ERRORS_SHOWN = 5


@dataclass
class Client:
    """One of those who ask at the same time; filled by its thread."""

    latencies: list[float] = field(default_factory=list)
    """Seconds from sending a request to having read its answer."""
    errors: list[str] = field(default_factory=list)

    def work(self, port: int, bodies: list[bytes], expected: list[list[str]], start: int, until: float) -> None:
        """Ask until the clock says so; `expected`: the classes in the answer to each body."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        number = start
        while time.perf_counter() < until:
            index = number % len(bodies)
            number += 1
            began = time.perf_counter()
            try:
                connection.request("POST", "/invocations", bodies[index], {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                connection.close()
                continue
            self.latencies.append(time.perf_counter() - began)
            if answer.status != 200:
                self.errors.append(f"{answer.status}: {content[:200]!r}")
            elif [found["class"] for found in json.loads(content)["predictions"]] != expected[index]:
                self.errors.append(f"request {index} got another answer than before")
        connection.close()


def requests(count: int) -> list[bytes]:
    """Bodies with `count` images each, of the bundled sample's test split."""
    from pipeline.data.sources import SAMPLE, _unpack

    with np.load(SAMPLE, allow_pickle=False) as stored:
        images = _unpack(stored["packed_test"])
    texts = []
    for image in images[:: max(1, len(images) // BODIES)]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        texts.append(base64.b64encode(buffer.getvalue()).decode())
    return [json.dumps({"inputs": (texts[i:] + texts[:i])[:count]}).encode() for i in range(min(BODIES, len(texts)))]


def answered(server: ModelServer, bodies: list[bytes]) -> list[list[str]]:
    """The classes in the answer to each body, asked alone."""
    found = []
    for body in bodies:
        status, content = server.ask("POST", "/invocations", body)
        if status != 200:
            raise SystemExit(f"the server refuses a request: {status} {content[:300]!r}")
        found.append([image["class"] for image in json.loads(content)["predictions"]])
    return found


def load(
    port: int, bodies: list[bytes], expected: list[list[str]], clients: int, seconds: float
) -> tuple[list[Client], float]:
    """Let `clients` clients ask for `seconds` s; returns them and the seconds until the last had its answer."""
    made = [Client() for _ in range(clients)]
    began = time.perf_counter()
    until = began + seconds
    threads = [
        threading.Thread(target=one.work, args=(port, bodies, expected, 7 * k, until)) for k, one in enumerate(made)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made, time.perf_counter() - began


def measure(server: ModelServer, clients: int, seconds: float, images: int) -> dict[str, Any]:
    """Latencies in ms, requests and images per second, errors, memory of the server."""
    bodies = requests(images)
    expected = answered(server, bodies)
    load(server.port, bodies, expected, clients, min(WARM_UP_S, seconds))
    made, elapsed = load(server.port, bodies, expected, clients, seconds)
    latencies = 1000 * np.array([value for one in made for value in one.latencies])
    errors = [error for one in made for error in one.errors]
    percentiles = zip(("p50", "p95", "p99"), np.percentile(latencies, (50, 95, 99)), strict=True)
    return {
        "clients": clients,
        "images_per_request": images,
        "bytes_per_request": round(float(np.mean([len(body) for body in bodies]))),
        "seconds": round(elapsed, 2),
        "requests": len(latencies),
        "requests_by_client": sorted(len(one.latencies) for one in made),
        "errors": len(errors),
        "first_errors": errors[:ERRORS_SHOWN],
        "latency_ms": {name: round(float(value), 2) for name, value in percentiles}
        | {"mean": round(float(latencies.mean()), 2), "max": round(float(latencies.max()), 2)},
        "requests_per_second": round(len(latencies) / elapsed, 1),
        "images_per_second": round(images * len(latencies) / elapsed, 1),
        "server_memory_mb": memory(server),
    }


def memory(server: ModelServer) -> int:
    """Proportional set size of the server's processes in MB."""
    total = 0
    for number in server.processes():
        text = Path(f"/proc/{number}/smaps_rollup").read_text()
        total += int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pss:")))
    return round(total / 1024)


@contextmanager
def student(model: str | None) -> Iterator[tuple[str, str, str]]:
    """Model URI, tracking URI, and what is served, in words."""
    if model is not None:
        from pipeline.tracking import start

        yield model, start.default_uri(), model
        return
    with tempfile.TemporaryDirectory(prefix="asib-serving-") as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        short = ("method.num_stages=1", "method.student_epochs_per_stage=[2]")
        where = (f"tracking.uri={uri}", f"output_dir={folder}/runs", f"register={NAME}")
        command = [sys.executable, "-m", "steps.baseline", "cfg=quickstart", *short, *where]
        subprocess.run(command, check=True, cwd=HERE.parent)
        yield (
            f"models:/{NAME}@challenger",
            uri,
            "student of cfg=quickstart (cifar_resnet8, 20 classes, 32×32), two epochs",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 32], help="images in each request")
    parser.add_argument("--model", help="a registered model of MLFLOW_TRACKING_URI")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    packages = ("onnxruntime", "numpy", "pillow", "uvicorn", "fastapi")
    result: dict[str, Any] = {**described(*packages), "results": []}
    with student(options.model) as (model, uri, words), tempfile.TemporaryDirectory() as elsewhere:
        server = ModelServer(model, uri, Path(elsewhere))
        result |= {"model": words, "start_seconds": round(server.start(), 1)}
        try:
            for images in options.images:
                measured = measure(server, options.clients, options.seconds, images)
                result["results"].append(measured)
                print(json.dumps(measured), flush=True)
        finally:
            server.stop()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(options.output)
    if any(measured["errors"] for measured in result["results"]):
        raise SystemExit("there were errors: see first_errors")


if __name__ == "__main__":
    main()
