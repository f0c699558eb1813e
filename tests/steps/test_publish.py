"""The publish step: a folder that timm and ONNX Runtime read, a card that says where it comes from, a hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

from models import weights, zoo
from pipeline.distill import export
from pipeline.journal import Journal
from tests import hub as hubs
from tests.steps.desk import to_onnx
from tests.steps.lab import CLASSES, SIZE, Done, Lab, client, deliver, ending, images, journal, run_id, see
from tests.steps.predictions import crown

FILES = ["README.md", "config.json", "model.onnx", "model.safetensors"]
ODD = "![x](http://evil.example/p.png)"


def student(folder: Path, **tags: str) -> Path:
    """A run's folder as a baseline leaves it, as far as publishing reads it; of 40 test images 30 are right."""
    net = zoo.create_model("cifar_resnet8", len(CLASSES), image_size=SIZE)
    stated = {"asib.teachers": "none", "asib.weights": weights.weights_hash(net.net), "asib.data_digest": "d" * 64}
    made = Journal.create(folder, experiment="e", name=ODD, tags={"asib.step": "baseline", **stated, **tags})
    made.metrics({"final/acc_val_selected": 75.0, "final/val_acc": 70.0, "test/nll": 1.0}, 0)
    made.end("FINISHED", "completed", 0)
    made.close()
    config = {"seed": 7, "dataset": {"name": "npz", "path": "/home/secret/data.npz"}, "method": {"name": ODD}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    labels = np.zeros(40, np.int32)
    np.savez(folder / "predictions.npz", labels=labels, predictions=(np.arange(40) >= 30).astype(np.int32))
    model = folder / "model"
    model.mkdir()
    weights.save_weights(net, model / "student.safetensors", {"classes": list(CLASSES)})
    (model / "student.onnx").write_bytes(b"whatever somebody has put here")
    meta = {"classes": list(CLASSES), "image_size": SIZE, "in_chans": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    (model / "meta.json").write_text(json.dumps({**meta, "architecture": "cifar_resnet8"}))
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "to_onnx", lambda net, data, path: to_onnx(net, data, path) and None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hubs.Hub]:
    with hubs.running() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
        monkeypatch.setenv("HF_TOKEN", hubs.TOKEN)
        yield made


def same_answers(folder: Path, checkpoint: Path) -> None:
    """ONNX Runtime and timm give the probabilities of the training checkpoint."""
    import timm

    net = zoo.create_model("cifar_resnet8", len(CLASSES), image_size=SIZE).eval()
    record = weights.load_weights(net, checkpoint)
    x = images(5, seed=9)[0]
    mean, std = (np.asarray(record.get(name, default)) for name, default in (("mean", [0.5] * 3), ("std", [0.25] * 3)))
    prepared = torch.tensor((x / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    published = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        expected = torch.softmax(net(prepared).logits, dim=1).numpy()
        assert torch.softmax(published(prepared), dim=1).numpy() == pytest.approx(expected, abs=1e-5)
    found = onnxruntime.InferenceSession(folder / "model.onnx").run(["probabilities"], {"images": x})[0]
    assert found == pytest.approx(expected, abs=1e-4)


def front(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run_becomes_a_folder_written_anew(
    lab: Lab, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = student(tmp_path / "run")
    to = tmp_path / "published"
    done = lab.step("publish", f"model={made}", f"to={to}", "license=apache-2.0")
    assert done.code == 0, done.err
    assert done.out == f"published: {to}\n"
    assert sorted(file.name for file in to.iterdir()) == FILES
    same_answers(to, made / "model/student.safetensors")
    config = json.loads((to / "config.json").read_text())
    assert (config["label_names"], config["num_classes"]) == (list(CLASSES), len(CLASSES))
    card = (to / "README.md").read_text()
    head = front(card)
    assert (head["license"], head["library_name"]) == ("apache-2.0", "timm")
    assert head["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.75}]
    (row,) = (line for line in card.splitlines() if line.startswith("| this student |"))
    low, high = (float(number) for number in row.split("|")[3].split("(")[0].split(" to "))
    # a bootstrap over 40 images is a binomial with 30 of 40: its 2.5 and 97.5 % points are 24 and 35 of 40
    assert (low, high) == pytest.approx((60.0, 87.5), abs=2.6)
    assert "(n = 40)" in row
    monkeypatch.chdir(made)
    shutil.copy(to / "model.onnx", made)
    Image.fromarray(images(1, seed=3)[0][0]).resize((30, 20)).save("picture.png")
    said: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], said)
    assert said["probabilities"].sum() == pytest.approx(1.0, abs=1e-5)
    assert f"| data (SHA-256) | `{'d' * 64}` |" in card
    assert "cross-entropy alone" in card
    assert ending(done.folder) == ("FINISHED", "completed", 0)
    again = lab.step("publish", f"model={made}", f"to={to}")
    assert again.code == 0, again.err
    assert front((to / "README.md").read_text())["license"] == "unknown"


def test_a_model_repository_describes_the_onnx_file_as_it_is(lab: Lab, quick: None, tmp_path: Path) -> None:
    made, to = student(tmp_path / "run"), tmp_path / "published"
    for _ in range(2):  # the second replaces the first
        done = lab.step("publish", f"model={made}", f"to={to}", "triton=trees")
        assert done.code == 0, done.err
    folder = to / "triton/trees"
    session = onnxruntime.InferenceSession(folder / "1/model.onnx")
    types = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}
    real = {(v.name, types[v.type], *v.shape[1:]) for v in (*session.get_inputs(), *session.get_outputs())}
    parts = re.findall(
        r'name: "(\w+)" data_type: (\w+) dims: \[ ([\d, ]+) \]', text := (folder / "config.pbtxt").read_text()
    )
    assert {(name, kind, *map(int, dims.split(","))) for name, kind, dims in parts} == real
    assert text.startswith('name: "trees"\nplatform: "onnxruntime_onnx"\n')
    assert (folder / "labels.txt").read_text().split() == list(CLASSES)


def test_what_comes_from_the_run_is_text(lab: Lab, quick: None, tmp_path: Path) -> None:
    made = student(tmp_path / "run", **{"asib.teachers": ODD, "asib.verdict": "promoted", "asib.verdict_reason": ODD})
    done = lab.step("publish", f"model={made}")
    assert done.code == 0, done.err
    card = (done.folder / "published/README.md").read_text()
    assert ODD not in card.replace(f"`{ODD}`", "")
    assert "/home/secret" not in card


def other_weights(made: Path) -> None:
    net = zoo.create_model("cifar_resnet8", len(CLASSES), image_size=SIZE)
    weights.save_weights(net, made / "model/student.safetensors", {"classes": list(CLASSES)})


def described_as(**changes: Any) -> Any:
    def change(made: Path) -> None:
        path = made / "model/meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def test_a_dry_run_names_all_that_would_be_written(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DRY_RUN", "HF_TOKEN"):
        monkeypatch.setenv(name, "1")
    made = student(tmp_path / "run")
    done = lab.step("publish", f"model={made}", f"to={tmp_path / 'out'}", "triton=mine", "push=me/it", "license=mit")
    said = f"publish {made} as the folder {tmp_path / 'out'}, with the Triton model mine, and upload it to me/it as mit"
    assert (done.code, done.new) == (0, []), done.err
    assert said in done.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_weights, "are not those in the tag asib.weights"),
        (described_as(image_size=10**7), "its meta.json is not that of a student"),
        (described_as(mean=[0.5]), "its meta.json is not that of a student"),
        (described_as(architecture="hf-hub:owner/name"), "unknown model 'hf-hub:owner/name'"),
        (lambda made: (made / "model/meta.json").unlink(), "no student is in it"),
    ],
)
def test_a_student_that_its_run_did_not_make_is_refused(lab: Lab, tmp_path: Path, change: Any, says: str) -> None:
    made = student(tmp_path / "run")
    change(made)
    done = lab.step("publish", f"model={made}")
    assert (done.code, done.new, len(done.lines)) == (2, [], 1), done.err
    assert done.lines[0].startswith(f"model={made}: ")
    assert says in done.lines[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": ""}, "model is not set"),
        ({"model": "models:/m@champion"}, "tracking=offline: model=models:/m@champion is on the tracking server"),
        ({"model": "{tmp}"}, "no run with a model is in it"),
        ({"model": "https://host/x"}, "give runs:/<id>"),
        ({"license": "My Licence"}, "license=My Licence: give the hub's name"),
        ({"push": "name"}, "push=name: give <owner>/<name>"),
        ({"push": "../name"}, "push=../name: give <owner>/<name>"),
        ({"push": "me/net"}, "push=me/net needs the hub's token: set it as HF_TOKEN"),
        ({"public": "true"}, "public=true is about a repository that push makes"),
        ({"to": "{tmp}"}, "to={tmp}: other.txt is in it"),
        ({"to": "{tmp}/nowhere/x"}, "cannot write in {tmp}/nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_run(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], says: str
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    made = tmp_path / "run"
    (made / "model").mkdir(parents=True)
    (made / "journal.jsonl").touch()
    full = tmp_path / "full"
    full.mkdir()
    (full / "other.txt").touch()
    given = {"model": str(made), **changes}
    done = lab.step("publish", *(f"{k}={v.format(tmp=full)}" for k, v in given.items()))
    assert (done.code, done.new, len(done.lines)) == (2, [], 1), done.err
    assert says.format(tmp=full) in done.lines[0]


def holders(text: str, *folders: Path) -> list[str]:
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return [str(file) for file in files if text.encode() in file.read_bytes()]


def test_push_uploads_the_folder_and_keeps_the_token(lab: Lab, quick: None, hub: hubs.Hub, tmp_path: Path) -> None:
    made = student(tmp_path / "run")
    done = lab.step("publish", f"model={made}", "push=lab/small-net", "license=mit")
    assert done.code == 0, done.err
    assert hub.made == {"lab/small-net": True}
    folder = done.folder / "published"
    assert hub.files["lab/small-net"] == {name: (folder / name).read_bytes() for name in FILES}
    address = f"{hub.endpoint}/lab/small-net/commit/{'0' * 40}"
    assert done.out.splitlines() == [f"published: {folder}", f"uploaded: {address}"]
    assert [e.data["values"]["asib.pushed"] for e in journal(done.folder) if "asib.pushed" in str(e.data)] == [address]
    assert 'hf_hub_download("lab/small-net", "model.onnx")' in (folder / "README.md").read_text()
    again = lab.step("publish", f"model={made}", "push=lab/small-net", "public=true")
    assert again.code == 0, again.err
    assert hub.made == {"lab/small-net": True}
    assert holders(hubs.TOKEN, lab.runs) == []
    assert hubs.TOKEN not in done.out + done.err + again.out + again.err


def test_a_hub_that_refuses_leaves_the_folder(
    lab: Lab, quick: None, hub: hubs.Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-somebody-else")
    done = lab.step("publish", f"model={student(tmp_path / 'run')}", "push=lab/small-net")
    assert done.code == 2
    assert done.lines[-1].startswith(f"push=lab/small-net: {hub.endpoint} did not take it (")
    assert sorted(file.name for file in (done.folder / "published").iterdir()) == FILES
    assert (hub.made, ending(done.folder)) == ({}, ("FAILED", "refused", 2))
    assert holders("of-somebody-else", lab.runs) == []


@pytest.mark.slow
def test_the_champion_is_published_from_the_server(bench: Lab, lab: Lab, sqlite_uri: str) -> None:
    trained: Done = bench.step("baseline", "log_model=true")
    deliver(sqlite_uri, trained.folder)
    made = run_id(trained.folder)
    model_id = crown(sqlite_uri, made, "trees")
    checkpoint = Path(shutil.copy(trained.folder / "checkpoints/student.safetensors", lab.folder))
    shutil.rmtree(trained.folder)
    client(sqlite_uri).set_model_version_tag("trees", "1", "asib.verdict", "promoted")
    tracked = ("tracking.mode=online", f"tracking.uri={sqlite_uri}")
    for model in ("models:/trees@champion", f"runs:/{made}"):
        done = lab.step("publish", *tracked, f"model={model}")
        assert done.code == 0, done.err
        same_answers(done.folder / "published", checkpoint)
        seen = see(sqlite_uri, run_id(done.folder))
        assert (seen.status, seen.tags["asib.step"], seen.models_in) == ("FINISHED", "publish", [model_id])
        assert seen.tags["asib.student"] == made
        assert {"published/README.md", "published/config.json"} <= seen.artifacts
        card = (done.folder / "published/README.md").read_text()
        assert f"| run | `{made}` |" in card
        assert ("models:/trees/1" in card) == ("A gate promoted it" in card) == ("champion" in model)
        assert "(n = 40)" in card
