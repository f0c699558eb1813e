"""`mlflow models serve` with a registered student: the real server, without the repository, with pickle disabled."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.model_server import ModelServer
from tests.steps.lab import CLASSES, Lab, client, images, run_id, see

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
    run = run_id(done.folder)
    (model_id,) = see(uri, run).models_out
    mlflow = client(uri)
    mlflow.create_registered_model(NAME)
    version = mlflow.create_model_version(NAME, f"models:/{model_id}", run, model_id=model_id)
    mlflow.set_registered_model_alias(NAME, "champion", version.version)
    checkpoint = Path(shutil.copy(done.folder / "checkpoints/student.safetensors", lab.folder))
    shutil.rmtree(lab.runs)
    return lab, checkpoint, uri


@pytest.fixture(scope="module")
def server(trained: tuple[Lab, Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    made = ModelServer(f"models:/{NAME}@champion", trained[2], tmp_path_factory.mktemp("elsewhere"))
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def checkpoint(trained: tuple[Lab, Path, str]) -> Any:
    """uint8 images (n,H,W,3) -> probabilities (n,N) of the training checkpoint, in PyTorch."""
    import torch

    from models import weights, zoo
    from pipeline.compose.compose import compose
    from pipeline.data import sources

    lab, file, _ = trained
    data = sources.load(compose(str(lab.cfg)).dataset)
    net = zoo.create_model("cifar_resnet8", len(CLASSES), image_size=16).eval()
    weights.load_weights(net, file)

    def probabilities(x: np.ndarray) -> np.ndarray:
        prepared = torch.tensor((x / 255 - np.array(data.mean)) / np.array(data.std), dtype=torch.float32)
        with torch.no_grad():
            found: np.ndarray = torch.softmax(net(prepared.permute(0, 3, 1, 2)).logits, dim=1).numpy()
        return found

    return probabilities


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
    server: ModelServer, checkpoint: Any, x: np.ndarray, count: int
) -> None:
    batch = np.resize(x, (count, *x.shape[1:]))
    check(server.invoke({"inputs": batch.tolist()}), checkpoint(batch))


def test_png_and_jpeg_strings_and_arrays_may_be_mixed(server: ModelServer, checkpoint: Any, x: np.ndarray) -> None:
    jpeg = base64_of(Image.fromarray(x[1]), "JPEG", quality=80)
    with Image.open(io.BytesIO(base64.b64decode(jpeg))) as picture:
        seen = np.stack([x[0], np.asarray(picture), x[2]])
    given = [base64_of(Image.fromarray(x[0])), jpeg, x[2].tolist()]
    check(server.invoke({"inputs": given}), checkpoint(seen))


def test_pictures_of_other_kinds_are_converted(server: ModelServer, checkpoint: Any, x: np.ndarray) -> None:
    grey, half = x[0, ..., 0], np.full((16, 16, 1), 0, np.uint8)
    given = [
        base64_of(Image.fromarray(grey)),
        base64_of(Image.fromarray(np.concatenate([x[1], half], axis=2))),  # all transparent
        base64_of(Image.new("CMYK", (50, 20), (0, 0, 0, 255)), "JPEG"),
        base64_of(Image.fromarray(np.kron(x[2], np.ones((1, 1, 1), np.uint8)))),
    ]
    white, black = np.full_like(x[0], 255), np.zeros_like(x[0])
    seen = np.stack([np.repeat(grey[..., None], 3, axis=2), white, black, x[2]])
    check(server.invoke({"inputs": given}), checkpoint(seen))


PIXELS = np.full((16, 16, 3), 7)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ({"inputs": []}, "the list of images is empty"),
        ({"inputs": [np.full((8, 8, 3), 7).tolist()]}, "image 0 has shape (8, 8, 3), expected (16, 16, 3)"),
        ({"inputs": [PIXELS[..., 0].tolist()]}, "image 0 has shape (16, 16), expected (16, 16, 3)"),
        ({"inputs": PIXELS.tolist()}, "image 0 has shape (16, 3), expected (16, 16, 3)"),
        ({"inputs": [(PIXELS / 255).tolist()]}, "image 0 has other pixels than integers from 0 to 255"),
        ({"inputs": [(PIXELS + 249).tolist()]}, "image 0 has other pixels than integers from 0 to 255"),
        ({"inputs": [(PIXELS - 8).tolist()]}, "image 0 has other pixels than integers from 0 to 255"),
        ({"inputs": [PIXELS.tolist(), [*PIXELS.tolist()[:-1], [[1]]]]}, "image 1 has rows of different lengths"),
        ({"inputs": ["not base64!"]}, "image 0 is no base64 PNG or JPEG"),
        ({"inputs": [base64.b64encode(b"text").decode()]}, "image 0 is no base64 PNG or JPEG (not such a picture"),
        ({"inputs": [PIXELS.tolist(), None]}, "image 1 is neither nested lists of pixels"),
        ({"inputs": [{"image": "x"}]}, "image 0 is neither nested lists of pixels"),
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


def test_the_server_goes_on_after_refusals(server: ModelServer, checkpoint: Any, x: np.ndarray) -> None:
    for _ in range(3):
        assert server.invoke({"inputs": ["x"]})[0] == 400
    check(server.invoke({"inputs": x[:2].tolist()}), checkpoint(x[:2]))
    assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def own(trained: tuple[Lab, Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """The same version, by this project's own code."""
    made = ModelServer(f"models:/{NAME}@champion", trained[2], tmp_path_factory.mktemp("own"), own=True)
    made.start()
    try:
        yield made
    finally:
        made.stop()


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
