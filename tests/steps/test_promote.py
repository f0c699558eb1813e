"""`-e promote` on a real store: a better student is promoted, an equal and a worse one are not, rollback restores.

The students' accuracies, and the p-values between them, are known exactly (tests/steps/desk.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
from PIL import Image

from pipeline.predict.serve import answer
from pipeline.served.pictures import Refused
from pipeline.served.student_pyfunc import Classifier
from tests.pipeline.promote.local import Fragile, LocalDelivery
from tests.steps.desk import LAX, NAME, Desk, runs_of
from tests.steps.lab import CLASSES, TEST, Lab, client, ending, points, run_id, see

pytest_plugins = ["tests.servers"]


@pytest.mark.slow
def test_only_a_better_student_becomes_champion(desk: Desk) -> None:
    desk.register("half", "half", "bad", "good")
    assert desk.aliases == {"challenger": "4"}

    first = desk.promote("version=1")
    assert first.code == 0, first.err
    assert desk.aliases == {"challenger": "4", "champion": "1"}
    seen = see(desk.uri, run_id(first.folder))
    assert (seen.status, seen.tags["asib.outcome"], seen.tags["asib.exit_code"]) == ("FINISHED", "promoted", "0")
    assert seen.metrics["challenger/test/acc", 0] == [50.0]
    assert desk.tags(1)["asib.gate"] == "default"

    trial = desk.promote("version=2", "dry_run=true", *LAX)
    assert "look 1 at these 40 test images" in trial.out
    for number, look, improvement, p, words in (("3", 2, -50.0, 2.0**-19, "worse"), ("2", 1, 0.0, 1.0, "equally good")):
        done = desk.promote(f"version={number}", *LAX, "reason=nightly run")
        assert done.code == 3, done.err
        assert desk.aliases == {"challenger": "4", "champion": "1"}
        assert f"look {look} at these 40 test images" in done.out
        seen = see(desk.uri, run_id(done.folder))
        assert (seen.status, seen.tags["asib.outcome"], seen.tags["asib.exit_code"]) == ("FINISHED", "refused", "3")
        assert ending(done.folder) == ("FINISHED", "refused", 3)
        assert seen.metrics["promotion/improvement", 0] == [improvement]
        assert seen.metrics["promotion/p_value", 0] == [pytest.approx(p)]
        assert seen.metrics["promotion/look", 0] == [look]
        assert seen.metrics["promotion/alpha", 0] == [pytest.approx(0.05 / (look * (look + 1)))]
        assert words in seen.tags["asib.verdict_reason"]
        assert words in done.out
        assert f"version {number} refused" in done.out
        tags = desk.tags(int(number))
        assert (tags["asib.verdict"], tags["asib.against"]) == ("refused", "version 1")
        assert tags["asib.decided_in"] == seen.id
        assert tags["asib.reason"] == "nightly run"
        assert f"look {look} at" in tags["asib.look"]

    trial = desk.promote("dry_run=true", "run_name=mine", *LAX)
    assert trial.code == 0, trial.err
    assert see(desk.uri, run_id(trial.folder)).name == "mine"
    assert "version 4 would be promoted" in trial.out
    assert desk.aliases == {"challenger": "4", "champion": "1"}
    assert "asib.verdict" not in desk.tags(4)

    done = desk.promote(*LAX)
    assert done.code == 0, done.err
    assert desk.aliases == {"challenger": "4", "champion": "4", "previous": "1"}
    tags = desk.tags(4)
    against = (tags["asib.verdict"], tags["asib.against"], tags["asib.against_run"])
    assert against == ("promoted", "version 1", desk.runs[0])
    assert float(tags["asib.promotion_p_value"]) == pytest.approx(2.0**-19, rel=1e-5)
    assert "promoted over version 1" in tags["asib.history"]
    assert "replaced as champion by version 4" in desk.tags(1)["asib.history"]
    seen = see(desk.uri, run_id(done.folder))
    # `gate.alpha=0.999` once left no trace on the version: «default, all 4 criteria hold»
    gate = "default with max_ece_increase=1.0 (0.05), max_latency_ratio=50.0 (1.5)"
    assert tags["asib.gate"] == seen.tags["asib.gate"] == seen.params["promote.gate"] == gate
    for text in (done.out, tags["asib.history"], seen.tags["mlflow.note.content"]):
        assert f"gate {gate}" in text
    assert seen.steady == points(done.folder)
    assert (seen.metrics["challenger/test/acc", 0], seen.metrics["champion/test/acc", 0]) == ([100.0], [50.0])
    assert seen.metrics["promotion/challenger_only", 0] == [TEST / 2]
    assert {"promotion/verdict.json", "promotion/differences.png", "promotion/paired.parquet"} <= seen.artifacts
    assert len(seen.models_in) == 2
    assert "| McNemar test |" in seen.tags["mlflow.note.content"]
    assert seen.name.startswith("promote stripes ")
    assert seen.name.endswith(" version 4 promoted")
    result, again, *_ = seen.tags["mlflow.note.content"].split("\n\n")
    assert result.startswith("**stripes: version 4 promoted: "), result
    assert again == f"Repeat: `{seen.tags['asib.command']}`"
    paired = pd.read_parquet(done.folder / "promotion/paired.parquet")
    labels = np.arange(TEST) % len(CLASSES)
    np.testing.assert_array_equal(paired["label"], labels)
    np.testing.assert_array_equal(paired["champion_correct"], labels >= 2)
    assert paired["challenger_correct"].all()
    store = client(desk.uri)
    (looks,) = [v for k, v in store.get_registered_model(NAME).tags.items() if k.startswith("asib.looks.")]
    assert looks == "2-1 3-1 4-1"
    table = store.load_table(store.get_run(seen.id).info.experiment_id, "promotion/verdict.json", [seen.id])
    assert list(table["criterion"][:3]) == ["improvement", "McNemar test", "bootstrap interval"]
    assert set(table["verdict"]) == {"passed"}
    assert not (done.folder / "fetched").exists() or not list((done.folder / "fetched").rglob("*.safetensors"))

    again = desk.promote(*LAX)
    assert (again.code, len(again.lines)) == (2, 1)
    assert "champion already" in again.lines[0]


@pytest.mark.slow
def test_rollback_restores_and_what_was_rolled_back_is_not_promoted_by_chance(desk: Desk) -> None:
    desk.register("bad", "half", "good")
    nothing = desk.promote("rollback=true")
    assert nothing.code == 2
    for number in "123":
        assert desk.promote(f"version={number}", "gate.first.min_acc=0", *LAX).code == 0
    assert desk.aliases == {"challenger": "3", "champion": "3", "previous": "2"}
    trial = desk.promote("rollback=true", "dry_run=true")
    assert (trial.code, "would be" in trial.out) == (0, True)
    assert desk.aliases["champion"] == "3"
    back = desk.promote("rollback=true", "reason=it is slow on the old phones")
    assert back.code == 0, back.err
    assert desk.aliases == {"challenger": "3", "champion": "2", "previous": "1"}
    assert "it is slow on the old phones" in desk.tags(3)["asib.rolled_back"]
    assert see(desk.uri, run_id(back.folder)).tags["asib.reason"] == "it is slow on the old phones"

    nightly = desk.promote(*LAX)
    assert nightly.code == 2
    assert "it is slow on the old phones" in nightly.lines[0]
    assert desk.aliases["champion"] == "2"
    assert desk.promote("version=3", *LAX).code == 0
    assert desk.aliases == {"challenger": "3", "champion": "3", "previous": "2"}

    assert desk.promote("retire=3").code == 2, "the champion"
    assert desk.promote("retire=1", "reason=old data").code == 0
    retired = desk.promote("version=1", *LAX)
    assert retired.code == 2
    assert "is retired" in retired.lines[0]
    assert len(client(desk.uri).search_model_versions(f"name = '{NAME}'")) == 3


@pytest.mark.slow
def test_a_promotion_that_breaks_off_is_finished_by_the_next_call(desk: Desk) -> None:
    """Wherever it breaks off behind the verdict: the next call ends with version 2 as champion and says so.

    Before its first change, and behind each: what is before a later one is behind another.
    """
    desk.register("half", "good")
    assert desk.promote("version=1").code == 0

    class AtTheMove(Fragile):
        """Dies at the n-th change from the one on that says what is about to be moved."""

        begun = False

        def __getattr__(self, name: str) -> Any:
            self.begun = self.begun or name == "set_model_version_tag"
            if self.begun and "registered_model_" in name and not name.startswith("get_"):
                return super().__getattr__(name)
            return getattr(self._client, name)

    plain = client(desk.uri)
    for step in range(10):
        desk.registry = AtTheMove(plain, max(step, 1), after=step > 0)
        broken = desk.promote(*LAX)
        desk.registry = None
        if broken.code == 0:
            break
        assert desk.aliases["champion"] in ("1", "2")
        done = desk.promote(*LAX)
        assert done.code == 0 or (step >= 5 and "champion already" in done.err), done.err
        assert desk.aliases == {"challenger": "2", "champion": "2", "previous": "1"}
        assert step == 0 or "McNemar" not in done.out
        assert desk.tags(2)["asib.verdict"] == "promoted"
        assert desk.promote("rollback=true").code == 0
        plain.delete_model_version_tag(NAME, "2", "asib.rolled_back")
        assert desk.aliases == {"challenger": "2", "champion": "1"}
    assert step >= 5


def no_student(desk: Desk) -> list[str]:
    desk.students = {"half": {"readme.txt": b"nothing"}}
    desk.register("half")
    return ["version 1 of stripes: no student is in it"]


def other_classes(desk: Desk) -> list[str]:
    meta = json.loads(desk.students["half"]["artifacts/meta.json"])
    meta["classes"] = ["one", "two", "three", "four"]
    desk.students = {"half": {**desk.students["half"], "artifacts/meta.json": json.dumps(meta).encode()}}
    desk.register("half")
    return ["version 1 of stripes knows other classes (one, two, three"]


def constant(desk: Desk) -> list[str]:
    """Good weights under an ONNX file that says «ash» of everything: only what is served is wrong."""
    good = desk.students["good"]
    model = onnx.load_from_string(good["artifacts/student.onnx"])
    (last,) = (node for node in model.graph.node if "probabilities" in node.output)
    last.output[0] = "unused"
    ash = onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32)[:1], "ash")
    model.graph.initializer.append(ash)
    model.graph.node.append(onnx.helper.make_node("Gemm", ["logits", "zeros"], ["nothing"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((4, 4), np.float32), "zeros"))
    model.graph.node.append(onnx.helper.make_node("Add", ["nothing", "ash"], ["probabilities"]))
    desk.students = {"half": {**good, "artifacts/student.onnx": model.SerializeToString()}}
    desk.register("half")
    return [f"differs from its weights on {TEST} of {TEST} test images", "not promoted"]


def other_code(desk: Desk) -> list[str]:
    desk.students = {"half": {**desk.students["half"], "student_pyfunc.py": b"raise SystemExit('it ran')"}}
    desk.register("half")
    return ["version 1 of stripes: its student_pyfunc.py, which a server runs, is none that this project has had"]


def changed_since(desk: Desk) -> list[str]:
    desk.register("good", "half")
    one, two = (stored(desk, number) / "artifacts" for number in (1, 2))
    for name in ("student.onnx", "student.safetensors"):
        shutil.copy(two / name, one / name)
    client(desk.uri).set_registered_model_alias(NAME, "challenger", "1")
    return ["artifacts/student.onnx of models:/stripes/1 was changed (and 1 more)"]


def stored(desk: Desk, number: int) -> Path:
    """Where the store keeps a version's files: whoever may write into the experiment may write there."""
    store = client(desk.uri)
    model = store.get_logged_model(store.get_model_version(NAME, str(number)).source.rpartition("/")[2])
    return Path(model.artifact_location.removeprefix("file://"))


def no_challenger(desk: Desk) -> list[str]:
    desk.register("half")
    client(desk.uri).delete_registered_model_alias(NAME, "challenger")
    return ["no version has the alias challenger"]


def unknown_model(desk: Desk) -> list[str]:
    return ["name=stripes: the registry has no such model"]


@pytest.mark.parametrize("prepare", [no_student, other_classes, constant, other_code, changed_since])
def test_bad_input_is_said_in_one_line_and_nothing_moves(desk: Desk, prepare: Callable[[Desk], list[str]]) -> None:
    needles = prepare(desk)
    done = desk.promote()
    lines = [line for line in done.lines if not line.startswith("evaluating ")]
    assert (done.code, len(lines)) == (2, 1), done.err
    for needle in needles:
        assert needle in lines[0]
    assert ending(done.folder) == ("FAILED", "refused", 2)
    assert "champion" not in desk.aliases


def test_a_version_of_before_gets_its_manifest_when_it_is_judged(desk: Desk) -> None:
    desk.register("half")
    store = client(desk.uri)
    assert json.loads(desk.tags(1)["asib.bundle"]) == {
        name: hashlib.sha256(content).hexdigest() for name, content in desk.students["half"].items()
    }
    store.delete_model_version_tag(NAME, "1", "asib.bundle")
    trial = desk.promote("dry_run=true")
    assert trial.code == 0, trial.err
    assert "asib.bundle" not in desk.tags(1)
    assert "version=1 checks what it can and writes the tag" in trial.err
    done = desk.promote()
    assert done.code == 0, done.err
    assert (desk.aliases["champion"], len(json.loads(desk.tags(1)["asib.bundle"]))) == ("1", 6)
    where = ["tracking.mode=online", f"tracking.uri={desk.uri}", f"model=models:/{NAME}@champion"]
    (stored(desk, 1) / "artifacts/student.onnx").write_bytes(b"")
    for step, own in (("evaluate", []), ("predict", ["images=docs/pictures"])):
        done = desk.lab.step(step, *where, *own)
        assert done.code == 2, done.err
        assert f"artifacts/student.onnx of models:/{NAME}/1 was changed" in done.lines[-1]


def other_data(desk: Desk) -> list[str]:
    desk.register("half", data_digest="e" * 64, dataset="image_folder")
    cfg = f"cfg=runs:/{desk.runs[0]}/config.yaml dataset.root=<folder>"
    return [f"version 1 of stripes is of data eeeeeeeeeeee: versions are compared on the same images; give {cfg}"]


def no_digest(desk: Desk) -> list[str]:
    desk.register("half")
    client(desk.uri).delete_model_version_tag(NAME, "1", "asib.data_digest")
    return ["no tag asib.data_digest"]


def busy(desk: Desk) -> list[str]:
    desk.register("half")
    LocalDelivery(None, desk.uri).ask("join", name=NAME, run_id="a" * 32, user="ada")
    return [f"another promotion of stripes is under way, run {'a' * 32} by ada"]


def test_predict_runs_no_code_of_a_version(desk: Desk) -> None:
    other_code(desk)
    where = ["tracking.mode=online", f"tracking.uri={desk.uri}", f"model=models:/{NAME}/1"]
    done = desk.lab.step("predict", *where, "images=docs/pictures")
    assert done.code == 0, done.err
    assert "it ran" not in done.err + done.out


def no_version(desk: Desk) -> list[str]:
    desk.register("half")
    return ["version=7: stripes has no such version; it has 1"]


@pytest.mark.parametrize(
    ("prepare", "own"),
    [
        (unknown_model, []),
        (no_challenger, ["dry_run=true"]),
        (no_version, ["version=7"]),
        (no_version, ["retire=7"]),
        (other_data, []),
        (no_digest, ["dry_run=true"]),
        (busy, []),
    ],
)
def test_what_the_registry_alone_can_tell_leaves_no_run(
    desk: Desk, prepare: Callable[[Desk], list[str]], own: list[str]
) -> None:
    (needle,) = prepare(desk)
    before = runs_of(desk)
    done = desk.promote(*own)
    assert (done.code, len(done.lines)) == (2, 1), done.err
    assert needle in done.lines[0]
    assert (done.new, runs_of(desk)) == ([], before)


@pytest.mark.slow
def test_an_unknown_model_is_said_by_a_real_delivery_and_leaves_nothing(lab: Lab, sqlite_uri: str) -> None:
    done = lab.step("promote", "name=stripes", "tracking.mode=online", f"tracking.uri={sqlite_uri}")
    assert (done.code, len(done.lines), done.new) == (2, 1, []), done.err
    assert "name=stripes: the registry has no such model" in done.lines[0]
    store = client(sqlite_uri)
    assert store.search_runs([e.experiment_id for e in store.search_experiments()]) == []


@pytest.mark.slow
def test_garbage_in_every_tag_is_a_line_each_and_blocks_nothing(desk: Desk) -> None:
    desk.register("half", "good")
    assert desk.promote("version=1").code == 0
    store = client(desk.uri)
    digest = next(iter(t for t in store.get_registered_model(NAME).tags if t.startswith("asib.looks.")), None)
    assert digest is None, "a first version is compared with nothing"
    assert desk.promote("version=2", "dry_run=true", *LAX).code == 0
    (look,) = (t for t in store.get_registered_model(NAME).tags if t.startswith("asib.look."))
    short = look.split(".")[2]
    garbage = ["asib.move", "asib.champions", f"asib.looks.{short}", f"asib.turn.{'0' * 32}", "asib.turn.x"]
    for tag in garbage:
        store.set_registered_model_tag(NAME, tag, "abc")
    for tag in ("asib.history", "asib.history.1", "asib.pending", "asib.against", "asib.decided_at", "asib.gate"):
        for number in "12":
            store.set_model_version_tag(NAME, number, tag, "[{abc\x7f")
    done = desk.promote("version=2", *LAX)
    assert done.code == 0, done.err
    for tag in garbage:
        assert sum(f"tag {tag}='abc'" in line for line in done.lines) == 1, (tag, done.err)
    assert "Traceback" not in done.err
    assert desk.aliases == {"challenger": "2", "champion": "2", "previous": "1"}
    tags = store.get_registered_model(NAME).tags
    assert tags == {"asib.champions": '["1"]', f"asib.looks.{short}": "2-1"}
    assert desk.tags(2)["asib.history"].startswith("[{abc")
    assert desk.promote("rollback=true").code == 0


@pytest.mark.slow
def test_a_champion_that_is_gone_is_no_dead_end(desk: Desk) -> None:
    """Its version deleted, or its files: one line each, and what it says leads on."""
    store = client(desk.uri)
    desk.register("bad", "half", "good", "half")
    for number in "123":
        assert desk.promote(f"version={number}", "gate.first.min_acc=0", *LAX).code == 0
    assert "champion of stripes" in store.get_run(desk.runs[2]).data.tags["asib.keep"]
    store.delete_model_version(NAME, "3")
    done = desk.promote("version=4", *LAX)
    assert (done.code, len(done.lines), done.new) == (2, 1, [])
    assert "the champion of stripes is gone" in done.lines[0]
    assert "rollback=true makes version 2" in done.lines[0]
    back = desk.promote("rollback=true")
    assert back.code == 0, back.err
    assert desk.aliases == {"challenger": "4", "champion": "2", "previous": "1"}

    for number in "12":  # as `mlflow gc` does
        source = store.get_model_version(NAME, number).source.removeprefix("models:/")
        shutil.rmtree(store.get_logged_model(source).artifact_location.removeprefix("file://"))
    done = desk.promote("version=4", *LAX)
    assert done.code == 2
    assert "the files of version 2, the champion, are gone: rollback=true makes" in done.lines[-1]
    back = desk.promote("rollback=true")
    assert back.code == 2
    assert any("version 1 is skipped, its files are gone" in line for line in back.lines)
    assert "delete_registered_model_alias('stripes', 'champion')" in back.lines[-1]
    store.delete_registered_model_alias(NAME, "champion")
    done = desk.promote("version=4", *LAX)
    assert (done.code, "retire=1 to start afresh" in done.err) == (2, True), done.err
    assert desk.promote("retire=1").code == 0
    assert desk.promote("version=4", *LAX).code == 0
    assert desk.aliases["champion"] == "4"


@pytest.mark.slow
def test_the_latency_judged_is_that_of_what_is_served(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Classifier.probabilities

    def slow(self: Classifier, images: Any) -> Any:
        time.sleep(0.05)
        return original(self, images)

    desk.register("good")
    with monkeypatch.context() as patched:
        patched.setattr(Classifier, "probabilities", slow)
        refused = desk.promote("gate.max_latency_ms=40")
    assert (refused.code, "latency" in refused.out) == (3, True), refused.out
    assert desk.promote("gate.max_latency_ms=40").code == 0


def test_probabilities_that_are_not_finite_are_no_class(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a version that is judged nor of pictures, whether a file or a request brings them."""
    desk.register("good")
    session = onnxruntime.InferenceSession

    class Broken:
        def __init__(self, *args: Any, **more: Any) -> None:
            self._session = session(*args, **more)

        def run(self, *asked: Any) -> list[Any]:
            return [np.full_like(found, np.nan) for found in self._session.run(*asked)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Broken)
    done = desk.promote()
    assert done.code == 2
    assert "version 1: test images cannot be classified: the network's probabilities are not finite" in done.lines[-1]
    assert "champion" not in desk.aliases
    pictures = desk.lab.folder / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "grey.png")
    where = ["tracking.mode=online", f"tracking.uri={desk.uri}"]
    told = desk.lab.step("predict", f"model=models:/{NAME}/1", f"images={pictures}", *where)
    assert told.code == 2
    assert (
        "grey.png and what follows cannot be classified: the network's probabilities are not finite" in told.lines[-1]
    )
    net, meta = desk.lab.folder / "student.onnx", desk.lab.folder / "meta.json"
    net.write_bytes(desk.students["good"]["artifacts/student.onnx"])
    meta.write_bytes(desk.students["good"]["artifacts/meta.json"])
    classifier = Classifier(str(net), str(meta))
    request = {"inputs": np.zeros((1, classifier.size, classifier.size, 3), int).tolist()}
    with pytest.raises(Refused, match="probabilities are not finite"):
        answer(classifier, json.dumps(request).encode())
