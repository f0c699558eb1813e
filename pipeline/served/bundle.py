"""A registered student as one bundle: which files it consists of, whether they are those that were registered, and
whether the code that a server would run is this project's own.

Nothing here runs, unpickles or executes a file of a model. MLflow does: `mlflow.pyfunc.load_model` and `mlflow models
serve` run the Python file of the version (docs/serving.md).
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import yaml_data
from pipeline.errors import UserError
from pipeline.paths import inside
from pipeline.served import code as served
from pipeline.served.student_pyfunc import Classifier

logger = logging.getLogger("asib")
TAG = "asib.bundle"
"""Tag of a version and of a LoggedModel: SHA-256 of all its files, as compact JSON (1.1 kB for a student)."""
REGISTERED = "registered_model_meta"
"""MLflow's file beside a downloaded version; `pipeline.tracking.requests.fetch` adds its `TAG` ("" if it has none)."""
PYTHON = served.PYFUNC.name
FORMER = frozenset(
    {
        "f501f8de1c0b243c0e516316ba12cb2a8cdd8a1dfd03db7bb5acc5ba310dcf6e",
        "18ad446e1126f2cf9de0404db3599dddd1489ae4ee79738a5148bf7261f992a5",
        "8744f23b4e7d5d694f885303e963590f0e6a01302a4eab2f3c3756bb0c5e5ece",
        "5c7b88ddd0d96c5ec51485bf3b2c31d46dde514f9309777adebdc81873d3f11f",
        "2b784fab85d67526b3d8ee699e23f07e046a65e2af16825ee7fd7a1ece5108a3",
        "3dd9186aa99a9cbef7ae4dd1b8e0bc1c0f4f27e1a04b2b75900f522e9a3923c9",
        "32d48fe63ffdcecdcf73728dfb574de8638445d8b12f96b97dd8394832ce02b3",
        "84f071526695c1474eb8ef9c445243f0c11b5c13f4fe327077e911b8a6ed1340",
        "13fa0724f1b73757ec3df57465e6c0a3c1c4079fb6c4a869b5bb0a7c554058d9",
        "0248b73a3e0048efaab47b7e2f49815c7f5248f7a71f944dfc8c76b0757195ab",
        "e5a8a7b0be8c15de534933d6e82104c7b4017af05a0e2be60196b76bd2fec20b",
        "d2b4448706025d31288d5f164425610519c07944dd74715a501d521c5396fc4b",
        "f004790b1b5d7de3e192a4847fe1997c242615cc26e724ce926b33d799d62f2b",
    }
)
"""SHA-256 of the served code in earlier versions of this project, the oldest first."""
FLAVOR = {"loader_module": "mlflow.pyfunc.loaders.code_model", "code": None, "streamable": False}
"""Contents of MLflow's flavor of a student, besides its artifacts, its environment and versions."""
DESCRIBED = {"artifacts", "cloudpickle_version", "env", "model_code_path", "python_version", *FLAVOR}
ARTIFACTS = {"net": "artifacts/student.onnx", "meta": "artifacts/meta.json"}
"""The served files, by where MLflow puts them."""
ENVIRONMENT = re.compile(
    r"(mlflow|numpy|onnxruntime|pillow|python|pip|setuptools|wheel)([<=]=?[\w.+!]+)?"
    r"|[\d.]+|-r requirements\.txt|conda-forge|mlflow-env"
)
"""Everything that a student's files for `--env-manager` may contain."""


@dataclass(frozen=True)
class Student:
    """A logged student on this machine.

    Attributes:
        folder: the logged model.
        net, meta, weights: student.onnx, meta.json, student.safetensors.
        run_id, model_id, version: where it comes from, `models:/<name>/<version>`; "" if the folder does not say.
        bound: whether its files were compared with its version's manifest.
    """

    folder: Path
    net: Path
    meta: Path
    weights: Path
    run_id: str = ""
    model_id: str = ""
    version: str = ""
    bound: bool = False


def manifest(folder: Path) -> str:
    """SHA-256 of every file of a logged model by its path in the folder, as compact JSON: the value of `TAG`."""
    return json.dumps(_hashes(folder), separators=(",", ":"))


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name != REGISTERED and path.is_file():
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read(folder: Path, where: str) -> Student:
    """What a logged model's folder holds, as MLflow stores it or as its run has prepared it, after `check`.

    Raises UserError, which begins with `where`: files other than those registered, or not a student.
    """
    version, bound = check(folder, where)
    net, meta, weights = (folder / name for name in ("student.onnx", "meta.json", "student.safetensors"))
    told: dict[str, Any] = {}
    if (folder / "MLmodel").exists():
        told = _yaml(folder / "MLmodel", where)
        try:
            artifacts = told["flavors"]["python_function"]["artifacts"]
            net, meta = (inside(folder, artifacts[name]["path"]) for name in ("net", "meta"))
            weights = inside(folder, artifacts["weights"]["path"]) if "weights" in artifacts else weights
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: {folder / 'MLmodel'} describes no student of this project") from error
    if not (net.is_file() and meta.is_file()):
        raise UserError(f"{where}: no student is in it; give the model of a distill run with log_model=true")
    run_id, model_id = (str(told.get(key) or "") for key in ("run_id", "model_id"))
    return Student(folder, net, meta, weights, run_id, model_id, version, bound)


def check(folder: Path, where: str) -> tuple[str, bool]:
    """Compare a fetched version's files with the manifest in its tag; nothing has been read of them before.

    Returns `models:/<name>/<version>`, "" for anything else; and whether there was a manifest. Without one, a warning
    says what to do.

    Raises UserError: a file was changed after registration, is missing, or was not registered.
    """
    if not (folder / REGISTERED).exists():
        return "", False
    told = _yaml(folder / REGISTERED, where)
    if not told.get("model_name"):
        return "", False
    name, number = str(told["model_name"]), str(told.get("model_version"))
    version = f"models:/{name}/{number}"
    if TAG not in told:
        return version, False  # downloaded with MLflow's own tools, which do not bring the tag
    if not told[TAG]:
        logger.warning(
            "%s was registered before versions had a manifest of their files (tag %s): they cannot be checked; "
            "promote name=%s version=%s checks what it can and writes the tag",
            *(version, TAG, name, number),
        )
        return version, False
    _compare(folder, str(told[TAG]), version, where)
    return version, True


CACHED = "delete it: Python wrote it when MLflow served the version (PYTHONDONTWRITEBYTECODE=1 prevents that)"


def _compare(folder: Path, tag: str, version: str, where: str) -> None:
    try:
        expected = json.loads(tag)
    except (ValueError, RecursionError):
        expected = None
    if not isinstance(expected, dict):
        raise UserError(f"{where}: the tag {TAG} of {version} is not a manifest of files: register the student again")
    found = _hashes(folder)
    names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if names:
        name = names[0]
        what = "is new" if name not in expected else "is missing" if name not in found else "was changed"
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise UserError(
            f"{where}: {name} of {version} {what}{more}: its files are not those in its tag {TAG}; "
            + (CACHED if "__pycache__" in name else "restore them, or register the student again")
        )


# what a server would run ---------------------------------------------------------------------------------------------


def check_servable(student: Student, where: str) -> None:
    """Raise UserError for a version that would make a server run, install or read anything but this project's own."""
    told = _yaml(student.folder / "MLmodel", where).get("flavors") or {}
    flavor = told.get("python_function") or {}
    artifacts = flavor.get("artifacts") or {}
    parts = {name: artifacts.get(name, {}).get("path") for name in ARTIFACTS}
    odd = {*told} - {"python_function"} or {*flavor} - DESCRIBED
    wrong = {key: flavor.get(key) for key, value in FLAVOR.items() if flavor.get(key) != value}
    if odd or wrong or parts != ARTIFACTS:
        what = ", ".join(sorted(odd)) or ", ".join(f"{k}: {v}" for k, v in {**wrong, **parts}.items())
        raise UserError(f"{where}: its MLmodel is not one of this project's ({what:.200}); it is not promoted")
    code = Path(str(flavor.get("model_code_path"))).name
    python = [path for path in sorted(student.folder.rglob("*")) if path.suffix.startswith((".py", ".so"))]
    if code != PYTHON or python != [student.folder / PYTHON]:
        raise UserError(f"{where}: it contains other code than {PYTHON}; it is not promoted")
    if hashlib.sha256(python[0].read_bytes()).hexdigest() not in {*FORMER, shipped()}:
        raise UserError(
            f"{where}: its {PYTHON}, which a server runs, is none that this project has had; it is not promoted: "
            "register the student again, with student_pyfunc.py and pictures.py of pipeline/served unchanged"
        )
    for name in ("requirements.txt", "conda.yaml", "python_env.yaml"):
        path = student.folder / name
        for text in _texts(_yaml(path, where) if name.endswith("yaml") else _lines(path)):
            if ENVIRONMENT.fullmatch(text) is None:
                raise UserError(f"{where}: {name} asks for {text!r:.100}, which no student needs; it is not promoted")


def shipped() -> str:
    """SHA-256 of the Python file that new students get."""
    return hashlib.sha256(served.CODE.encode()).hexdigest()


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
    elif value is not None:
        yield str(value)


def describe(student: Student, where: str) -> dict[str, Any]:
    """meta.json, checked. Raises UserError: it has other keys, or values, than the server reads."""
    try:
        meta = json.loads(student.meta.read_text(encoding="utf-8"))
        texts, numbers = [meta["architecture"], *meta["classes"]], [*meta["mean"], *meta["std"], meta["image_size"]]
        good = all(isinstance(text, str) for text in texts) and all(isinstance(n, int | float) for n in numbers)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        good = False
    if not good:
        raise UserError(f"{where}: its meta.json is not that of a student of this project")
    return dict(meta)


# the network ---------------------------------------------------------------------------------------------------------


def load(student: Student, where: str) -> Classifier:
    """The network, ready. Raises UserError: its files are damaged, or it would read files other than its own."""
    try:
        check_net(student.net)
        return Classifier(str(student.net), str(student.meta))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # onnxruntime has no common class for its exceptions
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"{where}: its files cannot be read ({reason}); fetch or log it again") from error


def check_net(path: Path) -> None:
    """Raise UserError for an ONNX file with tensors in other files, since it may name any path.

    Any other Exception: it is not an ONNX file.
    """
    import onnx

    for tensor in _tensors(onnx.load(str(path), load_external_data=False)):
        if tensor.external_data or tensor.data_location:
            places = [str(entry.value) for entry in tensor.external_data if entry.key == "location"]
            raise UserError(f"{path.name} takes weights from another file ({', '.join(places):.100}); refused")


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto below a protobuf message, wherever it is: initialisers, attributes, subgraphs, functions."""
    if message.DESCRIPTOR.full_name == "onnx.TensorProto":
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                yield from _tensors(part)


def _yaml(path: Path, where: str) -> dict[str, Any]:
    """A YAML file with keys; {} if it does not exist. Raises UserError."""
    source = f"{where}: {path}"
    content = yaml_data.parse(yaml_data.text_of(path, source), source) if path.exists() else {}
    return content if isinstance(content, dict) else {}
