"""Whether a server that runs the images of concurrent requests together through the network would be faster.

    python -m benchmarks.batching [--seconds 15] [--clients 16] [--rounds 3] [--model models:/<name>@champion]

The application of `steps.serve` in a process of its own, as it is and with a thread that collects whatever waits for
the network; one PNG image in a request, clients and student as in benchmarks.serving. Uses all cores; writes
benchmarks/results/batching.json.
"""

import json
import multiprocessing
import os
import queue
import tempfile
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from socket import socket
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks import harness
from benchmarks.serving import measure, student
from pipeline.predict import serve
from pipeline.predict.predict import load
from pipeline.served.student_pyfunc import Classifier
from pipeline.tracking import start
from tests.model_server import ModelServer

IMAGES = 4096
"""Through the network alone."""
Images = NDArray[np.uint8]
Rows = NDArray[np.float32]


class Collected(Classifier):
    """A classifier whose callers share a run of the network; nobody waits for others to come."""

    def __init__(self, alone: Classifier) -> None:
        vars(self).update(vars(alone))
        self._waiting: queue.SimpleQueue[tuple[Images, Future[Rows]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def probabilities(self, images: Images) -> Rows:
        found: Future[Rows] = Future()
        self._waiting.put((images, found))
        return found.result()

    def _run(self) -> None:
        while True:
            taken = [self._waiting.get()]
            while not self._waiting.empty():
                taken.append(self._waiting.get())
            rows = super().probabilities(np.concatenate([images for images, _ in taken]))
            for (_, found), part in zip(taken, np.split(rows, np.cumsum([len(i) for i, _ in taken])[:-1]), strict=True):
                found.set_result(part)


class Forked(ModelServer):
    """The application on a free port; `places`: requests that are in work at the same time, by default the cores."""

    def launch(self, collected: bool, places: int | None) -> None:
        listening = serve.listen("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        arguments = (listening, collected, places)
        self.process = multiprocessing.get_context("fork").Process(target=self._serve, args=arguments)
        self.process.start()
        listening.close()
        self.ask("GET", "/ping")

    def _serve(self, listening: socket, collected: bool, places: int | None) -> None:
        limits = serve.Limits()
        _, classifier = load(self.model, lambda what, to: start.fetch_now(self.tracking_uri, what, to), self.folder)
        with mock.patch("os.cpu_count", return_value=places or os.cpu_count()):
            application = serve.application(Collected(classifier) if collected else classifier, limits)
        serve.server(application, limits).run(sockets=[listening])

    def processes(self) -> list[int]:
        return [self.process.pid or 0]


def network(model: str, uri: str) -> dict[str, float]:
    """Processor time of the network alone, for an image, in batches of 1 and 16: what batching could save."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(_network, model, uri, Path(folder)).result()


def _network(model: str, uri: str, folder: Path) -> dict[str, float]:
    _, classifier = load(model, lambda what, to: start.fetch_now(uri, what, to), folder)
    found = {}
    for count in (1, 16):
        images = np.zeros((count, classifier.size, classifier.size, classifier.channels), np.uint8)
        used = []
        for _ in range(IMAGES // count):
            began = time.process_time()
            classifier.probabilities(images)
            used.append(time.process_time() - began)
        found[f"in batches of {count}"] = round(1000 * float(np.median(used)) / count, 3)
    return found


def main() -> None:
    parser = harness.parser(__doc__, "output", "rounds")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model", help="a registered model of MLFLOW_TRACKING_URI")
    options = parser.parse_args()
    result: dict[str, Any] = harness.described("onnxruntime", "numpy", "pillow", "uvicorn", "starlette")
    result["results"] = []
    ways = {
        "alone": (False, None),
        "collected, 4 in work": (True, 4),
        "collected, all in work": (True, options.clients),
    }
    with student(options.model) as (model, uri, words):
        result |= {"model": words, "network_cpu_ms_per_image": network(model, uri)}
        print(json.dumps(result["network_cpu_ms_per_image"]), flush=True)
        for _ in range(options.rounds):
            for way, (collected, places) in ways.items():
                with tempfile.TemporaryDirectory() as folder:
                    server = Forked(model, uri, Path(folder))
                    server.launch(collected, places)
                    result["results"].append({"way": way, **measure(server, options.clients, options.seconds, 1)})
                    server.process.terminate()
                    server.process.join()
                print(json.dumps(result["results"][-1]), flush=True)
    harness.write("batching", result, options.output)


if __name__ == "__main__":
    main()
