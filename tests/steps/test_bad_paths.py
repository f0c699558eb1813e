"""Every key that names a file or folder takes what the file system does not as bad input: one line, code 2, no run."""

import os

import pytest

from tests.steps.lab import Lab

LONG, NOBODY, NOT_UTF8, NUL = "x" * 300, "~nobody-of-this-name/x", "caf\udce9", "a\0b"
LOOP, DANGLING = "{here}/loop", "{here}/dangling/x"
KEYS: dict[str, tuple[str, str, list[str]]] = {
    "cfg": ("distill", LONG, []),
    "output_dir": ("distill", NOBODY, []),
    "bank_folder": ("distill", DANGLING, []),
    "dataset.root": ("distill", LOOP, ["dataset.name=image_folder"]),
    "dataset.path": ("distill", NOT_UTF8, []),
    "model.teachers.0.checkpoint": ("distill", NUL, []),
    "resume": ("distill", LONG, []),
    "student": ("evaluate", LOOP, []),
    "model": ("evaluate", LONG, []),
    "fusion": ("evaluate", NOBODY, ["mode=synergy", "model=runs:/0"]),
    "images": ("predict", LOOP, ["model={here}"]),
    "to": ("predict", LONG, ["model={here}", "images={here}/pictures"]),
    "sweep": ("sweep", NOT_UTF8, []),
    "cluster": ("sweep", LOOP, []),
    "storage": ("sweep", "sqlite:///" + LONG, []),
    "gate": ("promote", NOBODY, ["name=x", "tracking.mode=online"]),
    "parent": ("compare", LONG, []),
    "runs": ("compare", f"{LONG},other", []),
    "tracking.uri": ("distill", "sqlite:///" + LOOP, ["tracking.mode=online"]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("paths") / "lab")
    (lab.folder / "loop").symlink_to(lab.folder / "loop")
    (lab.folder / "dangling").symlink_to(lab.folder / "nothing")
    (lab.folder / "pictures").mkdir()
    (lab.folder / "pictures" / "a.png").touch()
    return lab


@pytest.mark.parametrize("key", KEYS)
def test_a_path_that_cannot_be_is_refused_without_a_trace(place: Lab, key: str) -> None:
    step, value, others = KEYS[key]
    before = sorted(place.folder.rglob("*"))
    done = place.step(step, *(text.format(here=place.folder) for text in (f"{key}={value}", *others)))
    assert done.code == 2, done.err
    (line,) = done.lines
    assert line.startswith(f"{key}=")
    assert line.isprintable()
    assert sorted(place.folder.rglob("*")) == before


def test_home_is_expanded_where_no_shell_does_it(place: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow run -P output_dir=~/runs` made a folder of the name ~."""
    monkeypatch.setenv("HOME", str(place.folder))
    monkeypatch.chdir(place.folder)
    assert place.step("doctor", "output_dir=~/elsewhere").code in (0, 1)
    assert (place.folder / "elsewhere").is_dir()
    assert "~" not in os.listdir(place.folder)
