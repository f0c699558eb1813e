"""`mlflow models serve` with a registered student: the real server, without the repository, with pickle disabled."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.model_server import ModelServer
from tests.steps.lab import CLASSES, Lab, images, run_id
from tests.steps.predictions import checkpoint, crown

pytestmark = pytest.mark.slow

NAME = "trees"
COUNT = 40


def base64_of(picture: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> tuple[Lab, Path, str]:
    """A workplace, the checkpoint of a student that is its tracking store's champion, and that store.

    The run's folder is gone: what is served comes from the store.
    """
    lab = Lab(tmp_path_factory.mktemp("serving") / "lab")
    store = lab.folder / "mlflow.db"
    shutil.copyfile(sqlite_template, store)
    uri = f"sqlite:///{store}"
    done = lab.step("baseline", "tracking.mode=online", f"tracking.uri={uri}", "log_model=true")
    assert done.code == 0, done.err
    crown(uri, run_id(done.folder), NAME)
    file = Path(shutil.copy(done.folder / "checkpoints/student.safetensors", lab.folder))
    shutil.rmtree(lab.runs)
    return lab, file, uri


def started(uri: str, folder: Path, own: bool = False) -> Iterator[ModelServer]:
    made = ModelServer(f"models:/{NAME}@champion", uri, folder, own=own)
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def server(trained: tuple[Lab, Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    yield from started(trained[2], tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def expected(trained: tuple[Lab, Path, str]) -> Callable[[np.ndarray], np.ndarray]:
    """Of images, the probabilities of the training checkpoint."""
    return checkpoint(*trained[:2])


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return images(COUNT, seed=4321)[0]


def check(answer: tuple[int, Any], expected: np.ndarray) -> None:
    """Class names and probabilities of every image, as the checkpoint has them."""
    status, body = answer
    assert status == 200, body
    predictions = body["predictions"]
    found = np.array([[p["probabilities"][name] for name in CLASSES] for p in predictions])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert [p["class"] for p in predictions] == [CLASSES[k] for k in found.argmax(axis=1)]
    assert [p["probability"] for p in predictions] == found.max(axis=1).tolist()


@pytest.mark.parametrize("count", [1, 2, 7, COUNT, 600])
def test_arrays_of_any_batch_size_get_the_checkpoints_probabilities(
    server: ModelServer, expected: Any, x: np.ndarray, count: int
) -> None:
    batch = np.resize(x, (count, *x.shape[1:]))
    check(server.invoke({"inputs": batch.tolist()}), expected(batch))


def test_png_and_jpeg_strings_and_arrays_may_be_mixed(server: ModelServer, expected: Any, x: np.ndarray) -> None:
    jpeg = base64_of(Image.fromarray(x[1]), "JPEG", quality=80)
    with Image.open(io.BytesIO(base64.b64decode(jpeg))) as picture:
        seen = np.stack([x[0], np.asarray(picture), x[2]])
    given = [base64_of(Image.fromarray(x[0])), jpeg, x[2].tolist()]
    check(server.invoke({"inputs": given}), expected(seen))


PIXELS = np.full((16, 16, 3), 7)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ({"inputs": []}, "the list of images is empty"),
        ({"inputs": PIXELS.tolist()}, "image 0 has shape (16, 3), expected (16, 16, 3)"),
        ({"inputs": [(PIXELS / 255).tolist()]}, "image 0 has other pixels than integers from 0 to 255"),
        ({"inputs": [PIXELS.tolist(), [*PIXELS.tolist()[:-1], [[1]]]]}, "image 1 has rows of different lengths"),
        ({"inputs": [base64.b64encode(b"text").decode()]}, "image 0 is no base64 PNG or JPEG (not such a picture"),
    ],
)
def test_what_is_no_image_is_a_400_that_says_why(server: ModelServer, payload: Any, says: str) -> None:
    """And no more: a megabyte of pixels sent back would hide the reason."""
    status, body = server.invoke(payload)
    assert (status, body["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert body["message"].startswith(says)
    assert len(body["message"]) < 200


@pytest.mark.parametrize("body", [b"[[1]]", b'{"inputs": "text"}', b'{"inputs": 5}', b'{"data": []}', b"{", b"\xff"])
def test_what_is_no_request_is_a_400(server: ModelServer, body: bytes) -> None:
    status, answer = server.ask("POST", "/invocations", body)
    assert status == 400, answer
    assert json.loads(answer)["message"]


def test_the_server_goes_on_after_refusals(server: ModelServer, expected: Any, x: np.ndarray) -> None:
    for _ in range(3):
        assert server.invoke({"inputs": ["x"]})[0] == 400
    check(server.invoke({"inputs": x[:2].tolist()}), expected(x[:2]))
    assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def own(trained: tuple[Lab, Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """The same version, by this project's own code."""
    yield from started(trained[2], tmp_path_factory.mktemp("own"), own=True)


def test_the_projects_own_server_answers_byte_for_byte_alike(
    server: ModelServer, own: ModelServer, x: np.ndarray
) -> None:
    given: list[Any] = [{"inputs": x[:n].tolist()} for n in (1, 7, COUNT)]
    given += [{"inputs": [base64_of(Image.fromarray(x[0])), x[1].tolist()]}, {"inputs": [], "params": {}}]
    given += [{"inputs": ["no base64!"]}, {"inputs": [[[0.5]]]}, {"inputs": [x[0].tolist(), None]}]
    for payload in given:
        body = json.dumps(payload).encode()
        assert own.ask("POST", "/invocations", body) == server.ask("POST", "/invocations", body)
    for path in ("/ping", "/health", "/version", "/nothing", "/invocations"):
        assert own.ask("GET", path) == server.ask("GET", path)


def test_nothing_of_the_project_and_no_pytorch_is_in_the_servers_processes(server: ModelServer) -> None:
    mapped = "".join(Path(f"/proc/{number}/maps").read_text() for number in server.processes())
    assert "onnxruntime" in mapped
    assert "libtorch" not in mapped
    for number in server.processes():
        environment = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        assert b"MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false" in environment
        assert not [entry for entry in environment if entry.startswith(b"PYTHONPATH=")]
        assert Path(f"/proc/{number}/cwd").resolve() == server.folder.resolve()
