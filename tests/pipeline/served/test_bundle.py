"""A student's folder is judged before anything of it is read: its files, their names, the code and the packages that a
server would take."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import UserError
from pipeline.served import bundle
from pipeline.served import code as served
from tests import mlmodel

ROOT = Path(__file__).resolve().parents[3]
CLASSES = ["dark", "light"]


def network(light: list[float] | None = None) -> onnx.ModelProto:
    """uint8 (n,4,4,3) -> probabilities: `light` as it is, or the mean brightness."""
    row, offset = ([-1, 1], [1, 0]) if light is None else ([0, 0], light)
    weights = {"scale": 255, "row": [row], "offset": [offset]}
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 18]>
        g (uint8[n, 4, 4, 3] images) => (float[n, 2] probabilities)
        <int64[3] axes = {1, 2, 3}, int64[1] one = {1}> {
            x = Cast<to=1>(images)
            unit = Div(x, scale)
            bright = ReduceMean<keepdims=0>(unit, axes)
            column = Unsqueeze(bright, one)
            signed = Mul(column, row)
            probabilities = Add(signed, offset)
        }""")
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.float32), k) for k, v in weights.items())
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A student's folder as MLflow 3.17.2 writes one."""
    made = tmp_path / "model"
    (made / "artifacts").mkdir(parents=True)
    onnx.save(network(), made / "artifacts/student.onnx")
    meta = {"classes": CLASSES, "image_size": 4, "in_chans": 3, "crop_pct": None}
    (made / "artifacts/meta.json").write_text(json.dumps(meta))
    (made / "artifacts/student.safetensors").write_bytes(b"weights")
    for name, text in mlmodel.files(run_id="r", model_id="m-1").items():
        (made / name).write_text(text)
    (made / "conda.yaml").write_text(
        "channels:\n- conda-forge\ndependencies:\n- python=3.11.7\n- pip<=23.2.1\n- pip:\n  - mlflow==3.17.2\n"
        "  - numpy==2.4.6\nname: mlflow-env\n"
    )
    (made / "python_env.yaml").write_text(
        "python: 3.11.7\nbuild_dependencies:\n- pip==23.2.1\n- setuptools==84.2.1\n- wheel\n"
        "dependencies:\n- -r requirements.txt\n"
    )
    return made


def register(folder: Path, tag: str | None = None) -> None:
    """As delivery brings version 3 of `trees`: with the manifest in its tag."""
    told = {"model_name": "trees", "model_version": "3", "asib.bundle": bundle.manifest(folder) if tag is None else tag}
    (folder / "registered_model_meta").write_text(json.dumps(told))


def test_a_manifest_has_every_file_and_fits_into_a_tag(folder: Path) -> None:
    register(folder)
    found = json.loads(bundle.manifest(folder))
    assert len(found) == 8
    assert found["artifacts/student.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert "registered_model_meta" not in found
    assert len(bundle.manifest(folder)) < 5000


def test_a_version_as_it_was_registered_is_read(folder: Path) -> None:
    register(folder)
    student = bundle.read(folder, "model=x")
    assert (student.version, student.bound, student.run_id, student.model_id) == ("models:/trees/3", True, "r", "m-1")
    assert student.net == folder / "artifacts/student.onnx"
    bundle.check_servable(student, "model=x")
    images = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    np.testing.assert_allclose(bundle.load(student, "model=x").probabilities(images), [[1, 0], [0, 1]], atol=1e-6)


def swap_net(folder: Path) -> None:
    onnx.save(network([1.0, 0.0]), folder / "artifacts/student.onnx")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swap_net, r"artifacts/student\.onnx of models:/trees/3 was changed"),
        (lambda f: (f / "student_pyfunc.py").write_text("raise SystemExit"), r"student_pyfunc\.py .* was changed"),
        (lambda f: (f / "MLmodel").write_text("!!python/object/apply:os.system [touch x]"), "MLmodel .* was changed"),
        (lambda f: (f / "artifacts/meta.json").unlink(), r"artifacts/meta\.json .* is missing"),
        (lambda f: (f / "numpy.py").write_text("import os"), r"numpy\.py .* is new"),
        (lambda f: [(f / n).unlink() for n in ("MLmodel", "conda.yaml")], r"MLmodel .* is missing \(and 1 more\)"),
    ],
)
def test_a_file_that_was_not_registered_is_refused_before_it_is_read(
    folder: Path, change: Callable[[Path], Any], says: str
) -> None:
    register(folder)
    change(folder)
    with pytest.raises(UserError, match=f"^model=x: {says}") as refused:
        bundle.read(folder, "model=x")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tag", ["no JSON", "[]", "{", "[" * 100_000, '{"MLmodel": {"a": 1}}', "{}"])
def test_a_tag_that_is_no_manifest_is_a_refusal(folder: Path, tag: str) -> None:
    register(folder, tag)
    with pytest.raises(UserError, match=r"^model=x: .*asib\.bundle"):
        bundle.read(folder, "model=x")


def test_a_version_without_a_manifest_is_read_with_a_line_that_says_how_to_go_on(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register(folder, "")
    with caplog.at_level(logging.WARNING, "asib"):
        student = bundle.read(folder, "model=x")
    assert (student.version, student.bound) == ("models:/trees/3", False)
    (line,) = caplog.messages
    assert "promote name=trees version=3" in line


# names ---------------------------------------------------------------------------------------------------------------


def point(folder: Path, part: str, to: object) -> None:
    told = json.loads((folder / "MLmodel").read_text())
    told["flavors"]["python_function"]["artifacts"][part]["path"] = to
    (folder / "MLmodel").write_text(json.dumps(told))


@pytest.mark.parametrize("part", ["net", "meta", "weights"])
@pytest.mark.parametrize("to", ["../../secret", "/etc/hostname", "artifacts/../../secret", "link", "", 7, "a\0b"])
def test_names_in_an_mlmodel_lead_nowhere_else(folder: Path, part: str, to: object) -> None:
    (folder.parent / "secret").write_text("{}")
    (folder / "link").symlink_to(folder.parent / "secret")
    point(folder, part, to)
    with pytest.raises(UserError, match="refused"):
        bundle.read(folder, "model=x")


@pytest.mark.parametrize("text", ["[1]", "flavors: 5", "&a [*a, *a]", "a: " + "[" * 50_000, "\0", "flavors: {x: {}}"])
def test_an_mlmodel_that_describes_nothing_is_one_line(folder: Path, text: str) -> None:
    (folder / "MLmodel").write_text(text)
    with pytest.raises(UserError, match=r"^model=x: .*MLmodel"):
        bundle.read(folder, "model=x")


# what a server would run ---------------------------------------------------------------------------------------------


def flavor(name: str = "python_function", **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        told = json.loads((folder / "MLmodel").read_text())
        told["flavors"][name] = told["flavors"].get(name, {}) | changes
        (folder / "MLmodel").write_text(json.dumps(told))

    return change


def other_net(folder: Path) -> None:
    onnx.save(network([1.0, 0.0]), folder / "artifacts/other.onnx")
    point(folder, "net", "artifacts/other.onnx")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (flavor(loader_module="evil"), "loader_module: evil"),
        (flavor(code="code"), "code: code"),
        (flavor(python_model="model.pkl"), "python_model"),
        (flavor(model_code_path="/x/other.py"), "other code"),
        (flavor("sklearn", pickled_model="model.pkl"), "sklearn"),
        (other_net, r"artifacts/other\.onnx"),
        (lambda f: (f / "student_pyfunc.py").write_text(served.CODE + "\n"), "none that this project has had"),
        (lambda f: (f / "numpy.py").write_text(""), "other code"),
        (lambda f: (f / "artifacts/x.so").write_bytes(b""), "other code"),
        (lambda f: (f / "requirements.txt").write_text("mlflow==3.17.2\nevil==1\n"), "asks for 'evil==1'"),
        (lambda f: (f / "requirements.txt").write_text("--index-url https://example.org\nmlflow"), "index-url"),
        (lambda f: (f / "requirements.txt").write_text("mlflow @ https://example.org/m.whl"), "mlflow @"),
        (lambda f: (f / "conda.yaml").write_text("dependencies: [python=3.11, {pip: [evil]}]"), "asks for 'evil'"),
        (lambda f: (f / "python_env.yaml").write_text("dependencies: [evil]"), "asks for 'evil'"),
    ],
)
def test_what_a_server_would_run_besides_is_refused(folder: Path, change: Callable[[Path], Any], says: str) -> None:
    change(folder)
    student = bundle.read(folder, "version 3")
    with pytest.raises(UserError, match=f"^version 3: .*{says}.* not promoted") as refused:
        bundle.check_servable(student, "version 3")
    assert "\n" not in str(refused.value)


def test_every_python_file_that_students_have_had_is_known() -> None:
    """As the history has it, at both places where the files have been: a new text makes that before it a former one."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout

    places = [
        ("pipeline/experiment/student_pyfunc.py", "pipeline/pictures.py"),
        ("pipeline/served/student_pyfunc.py", "pipeline/served/pictures.py"),
    ]
    commits = git("log", "--format=%H", "HEAD", "--", *sum(places, ())).split()
    if not commits:
        pytest.skip("no history here")
    known = {*bundle.FORMER, bundle.shipped()}
    for commit, (student, pictures) in itertools.product(commits, places):
        if text := git("show", f"{commit}:{student}"):
            shared = git("show", f"{commit}:{pictures}")
            whole = re.sub(r"^from pipeline\.[a-z.]*pictures import .+\n", lambda _: shared, text, flags=re.MULTILINE)  # noqa: B023
            found = hashlib.sha256(whole.encode()).hexdigest()
            assert found in known, f"{commit}: add {found} to bundle.FORMER"


# the network ---------------------------------------------------------------------------------------------------------


def outside(tensor: Any, place: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", place


def in_initializer(model: Any, place: str) -> None:
    outside(model.graph.initializer[0], place)


def in_attribute(model: Any, place: str) -> None:
    value = numpy_helper.from_array(np.zeros(4, np.float32), "v")
    outside(value, place)
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=value))


def in_subgraph(model: Any, place: str) -> None:
    inner = helper.make_graph([], "inner", [], [], [numpy_helper.from_array(np.zeros(4, np.float32), "w")])
    outside(inner.initializer[0], place)
    model.graph.node.append(helper.make_node("If", ["scale"], ["z"], then_branch=inner, else_branch=inner))


@pytest.mark.parametrize("place", ["../../secret", "/etc/hostname", "beside.bin"])
@pytest.mark.parametrize("where", [in_initializer, in_attribute, in_subgraph])
def test_a_network_reads_no_other_file(folder: Path, where: Callable[[Any, str], None], place: str) -> None:
    model = network()
    where(model, place)
    (folder / "artifacts/student.onnx").write_bytes(model.SerializeToString())
    student = bundle.read(folder, "model=x")
    with pytest.raises(UserError, match=f"^model=x: student.onnx takes weights from another file .*{re.escape(place)}"):
        bundle.load(student, "model=x")


def test_a_damaged_network_is_one_line(folder: Path) -> None:
    (folder / "artifacts/student.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match=r"^model=x: its files cannot"):
        bundle.load(bundle.read(folder, "model=x"), "model=x")
