"""Checkpoints: what goes in comes out, and a file is whole or the one before."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Saved, Slots, pack, unpack
from tests.pipeline.training.builders import HeldUp, differences

TENSORS = st.sampled_from(
    [
        torch.arange(6.0).view(2, 3),
        torch.tensor(3, dtype=torch.int64),
        torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        torch.tensor([0.1], dtype=torch.float16),
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor([True, False]),
        torch.zeros(0, 3),
        torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.arange(10.0)[::3],
    ]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | TENSORS
)
KEYS = st.integers(-3, 3) | st.sampled_from(["a", "b", "a/b", "1", "/", "", "dict", "tensor"])
TREES = st.recursive(LEAVES, lambda t: st.lists(t, max_size=3) | st.dictionaries(KEYS, t, max_size=4), max_leaves=12)


@given(tree=TREES)
@example(tree={"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3), "1": torch.tensor(4)})
@settings(max_examples=150, deadline=None)
def test_a_tree_of_state_comes_back_as_it_was(tree: Any) -> None:
    assert differences(unpack(pack(tree)), tree) == []


def test_integer_keys_numbers_beyond_json_and_tuples() -> None:
    back = unpack(pack({"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.999), "best": float("-inf")}))
    assert list(back["state"]) == [0]
    assert back["betas"] == [0.9, 0.999]
    assert back["best"] == float("-inf")


def test_tensors_that_share_memory_are_stored_each() -> None:
    weight = torch.arange(4.0)
    back = unpack(pack([weight, weight[:2], weight]))
    assert [t.tolist() for t in back] == [[0, 1, 2, 3], [0, 1], [0, 1, 2, 3]]


def test_what_a_checkpoint_cannot_hold_is_an_error_that_says_where() -> None:
    with pytest.raises(TypeError, match=r"/task/3.*set"):
        pack({"task": {3: {1, 2}}})


@pytest.mark.parametrize("damage", [b"", b"no file", b"\x00" * 40, "cut", "foreign"])
def test_bytes_that_are_no_checkpoint_are_refused(damage: Any) -> None:
    whole = pack({"a": torch.arange(100.0)})
    if damage == "cut":
        damage = whole[:-20]
    if damage == "foreign":
        from safetensors.torch import save

        damage = save({"a": torch.zeros(1)}, metadata={"format": "pt", "tree": "{}"})
    with pytest.raises(ValueError, match=r"checkpoint|format"):
        unpack(damage)


def written(slots: Slots, tree: Any) -> Saved:
    """A checkpoint that is there."""
    slots.write(tree)
    saved = slots.settle()
    assert saved is not None
    return saved


def test_two_slots_alternate_and_the_newest_is_read(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    used = [written(slots, {"n": n}).slot for n in range(4)]
    assert used == [0, 1, 0, 1]
    tree, saved = Slots(tmp_path).read()
    assert (tree, saved.slot) == ({"n": 3}, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "slot0.safetensors", "slot1.safetensors"]


@pytest.mark.parametrize("how", ["torn", "missing"])
def test_a_torn_slot_falls_back_to_the_other_which_is_then_not_written_over(tmp_path: Path, how: str) -> None:
    slots = Slots(tmp_path)
    written(slots, {"n": 0, "w": torch.arange(9.0)})
    newest = written(slots, {"n": 1, "w": torch.arange(9.0)})
    if how == "torn":
        newest.path.write_bytes(newest.path.read_bytes()[:-5])
    else:
        newest.path.unlink()
    again = Slots(tmp_path)
    tree, saved = again.read()
    assert (tree["n"], saved.slot) == (0, 0)
    for writer in (again, Slots(tmp_path)):  # the one that read, and one that did not
        assert written(writer, {"n": 2}).slot == 1
        assert [r["slot"] for r in json.loads(slots.manifest.read_text())["checkpoints"]] == [1, 0]
        newest.path.write_bytes(b"torn again")
    assert Slots(tmp_path).read()[0]["n"] == 0


def test_without_a_whole_slot_the_run_cannot_be_continued(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no whole checkpoint"):
        Slots(tmp_path).read()
    saved = written(Slots(tmp_path), {"n": 0})
    saved.path.write_bytes(b"")
    with pytest.raises(UserError, match="no whole checkpoint"):
        Slots(tmp_path).read()


def test_a_crash_at_any_write_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, its renaming, the manifest, its renaming: after each of them the newest that is recorded is whole."""
    written(Slots(tmp_path), {"n": 0})
    written(Slots(tmp_path), {"n": 1})
    replaced: list[Any] = []
    real = checkpoint.os.replace

    class Crash(BaseException):
        pass

    for allowed in (0, 1):
        replaced.clear()

        def replace(a: Any, b: Any, allowed: int = allowed) -> None:
            replaced.append(b)
            if len(replaced) > allowed:
                raise Crash
            real(a, b)

        monkeypatch.setattr(checkpoint.os, "replace", replace)
        with pytest.raises(Crash):
            written(Slots(tmp_path), {"n": 2})
        monkeypatch.setattr(checkpoint.os, "replace", real)
        assert Slots(tmp_path).read()[0] == {"n": 1}
    assert [Path(b).name for b in replaced] == ["slot0.safetensors", "manifest.json"], "the manifest comes last"


def test_a_checkpoint_is_of_the_moment_it_was_begun_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, held_up = Slots(tmp_path), HeldUp(monkeypatch)
    weight, values = torch.zeros(3), {"n": 0}
    slots.write({"weight": weight, "values": values})
    weight += 1
    values["n"] = 1
    assert slots.settle(wait=False) is None
    assert not slots.manifest.exists()
    held_up.go.set()
    saved = slots.settle()
    assert saved is not None
    assert slots.settle() is None, "it is told once"
    state, found = Slots(tmp_path).read()
    assert differences(state, {"weight": torch.zeros(3), "values": {"n": 0}}) == []
    assert found == saved


def test_nothing_is_read_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(tmp_path)
    written(slots, {"n": 0})
    held_up = HeldUp(monkeypatch)
    slots.write({"n": 1})
    threading.Timer(0.2, held_up.go.set).start()
    assert slots.read()[0] == {"n": 1}


def test_who_asks_for_a_checkpoint_that_could_not_be_written_hears_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = Slots(tmp_path)
    written(slots, {"n": 0})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, "fsync", full)
        slots.write({"n": 1})
        with pytest.raises(UserError, match=r"No space left.*output_dir"):
            slots.settle()
    assert slots.settle() is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "slot0.safetensors"]
    assert written(slots, {"n": 2}).slot == 1, "the whole one is not written over"
