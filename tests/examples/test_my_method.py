"""`examples/my_method`, copied out of the repository, is a method like any other."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.compose.compose import compose
from pipeline.config import identity, methods, schema
from tests.steps.conftest import _environment  # noqa: F401  of steps in this process
from tests.steps.lab import BATCH, PER_EPOCH, STUDENT, Lab, ending, journal, points, same_tensors, signal_at

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "my_method"
FILES = ("my_kd.py", "my_kd_step.py", "my_kd.yaml")


def sources() -> dict[Path, bytes]:
    folders = ("pipeline", "models", "steps", "conf", "examples")
    return {f: f.read_bytes() for name in folders for f in (ROOT / name).rglob("*") if f.suffix in (".py", ".yaml")}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A workplace beside a copy of the example whose settings are a module `my_kd`; `tiny.yaml` is the example's."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in FILES:
        shutil.copy(EXAMPLE / name, folder)
    monkeypatch.syspath_prepend(folder)
    for name in ("my_kd", "my_kd_step"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    for cached in (methods.settings, schema, identity._with_outside):
        cached.cache_clear()
    lab = Lab(tmp_path / "lab")
    given = yaml.safe_load((folder / "my_kd.yaml").read_text())
    given["defaults"][0] = {"override /dataset": "npz"}
    given["dataset"] = {"path": str(lab.data), "batch_size": BATCH, "val_fraction": 0.2}
    given["method"] |= {"module": "my_kd", "student_epochs_per_stage": [2]}
    given["model"]["teachers"] = [{"name": "cifar_resnet8"}]
    given |= {"threads": 1, "log_model": False, "finetune": {"epochs": 1}, "tracking": {"mode": "offline"}}
    lab.cfg.write_text(yaml.safe_dump(given))
    return lab


def test_it_trains_and_is_recorded_as_any_method_is_and_touches_no_file_of_the_repository(outside: Lab) -> None:
    before = sources()
    done = outside.step("distill")
    assert done.code == 0, done.err
    assert ending(done.folder) == ("FINISHED", "completed", 0)
    found = points(done.folder)
    first, last = (found["b_step/my_kd", epoch][0] for epoch in sorted(e for n, e in found if n == "b_step/my_kd"))
    assert 0 < last < first, "the student's logits approach the teacher's"
    params = next(entry.data for entry in journal(done.folder) if entry.kind == "params")
    assert params["values"]["method.scale"] == "2.0"
    assert sources() == before
    assert Path(sys.modules["my_kd_step"].__file__ or "").parent == outside.folder.parent / "mine"


def test_a_run_that_was_stopped_resumes_as_any_does(outside: Lab) -> None:
    whole = outside.step("distill")
    cut = outside.disturbed(signal_at(PER_EPOCH + 2), "distill")
    assert (whole.code, cut.code) == (0, 143), cut.err
    assert outside.step("distill", f"resume={cut.folder}").code == 0
    assert same_tensors(whole.folder / STUDENT, cut.folder / STUDENT)


def test_its_keys_have_help_and_are_checked(outside: Lab) -> None:
    shown = outside.raw("distill", ["--help", "method", f"cfg={outside.cfg}"])
    assert shown.code == 0, shown.err
    assert "Regression on logits (Ba and Caruana 2014)" in shown.out
    assert "* method.scale = 2.0  [1.0]" in shown.out
    assert "method.scale: got 0; give a number above 0" in outside.refuses("distill", "method.scale=0")
    assert "did you mean method.scale?" in outside.refuses("distill", "method.scal=2")


def test_as_it_lies_there_it_is_composed_and_is_short() -> None:
    method = compose(str(EXAMPLE / "my_kd.yaml")).method
    assert (method.name, method.scale, method.step) == ("my_kd", 2, "examples.my_method.my_kd_step:MyKd")
    assert sum(len((EXAMPLE / name).read_text().splitlines()) for name in FILES[:2]) < 40
