"""Files of torch.save as other people write them, and as nobody should: they load, or are refused in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from models import pickles, torch_files
from models.weights import checked, load_weights, read_metadata, read_state, save_weights
from models.zoo import create_model

CLASSES = 3


@pytest.fixture(scope="module")
def model() -> Any:
    return create_model("cifar_resnet8", CLASSES)


@pytest.fixture(scope="module")
def state(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.net.state_dict()
    return found


class Callback:
    """What a trainer keeps in its checkpoints; the reader must not need it."""

    def __init__(self) -> None:
        self.best, self.names = 0.7, {"a": [1, 2]}


def other_people(state: dict[str, Any]) -> dict[str, Any]:
    """By the name of the file."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], momentum=0.9)
    lightning = {f"model.{k}": v for k, v in state.items()}
    return {
        "model_best.pth.tar": {"state_dict": state, "arch": "resnet", "optimizer": optimizer.state_dict()},
        "last.ckpt": {"state_dict": lightning, "callbacks": {"early": Callback()}, "hyper_parameters": {"lr": 0.1}},
        "checkpoint": OrderedDict(state),
        "backbone.pth": {f"backbone.{k}": v for k, v in state.items()},
        "parallel.pth": {"net": {f"module.backbone.{k}": v for k, v in state.items()}, "opt": Namespace(lr=0.05)},
        "numpy.pth": {
            "model": state,
            "best_acc": np.float64(71.5),
            "history": np.arange(3),
            7: np.random.RandomState(0),
        },
        "parameters.pt": {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()},
        "doubles.bin": {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_other_code_bases_are_told_by_their_content(
    tmp_path: Path, state: dict[str, Any], zipped: bool
) -> None:
    for name, content in other_people(state).items():
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        fresh = create_model("cifar_resnet8", CLASSES)
        assert load_weights(fresh, tmp_path / name) == {}
        assert all(torch.equal(v, state[k]) for k, v in fresh.net.state_dict().items()), name


def test_safetensors_are_told_by_their_content(tmp_path: Path, model: Any) -> None:
    save_weights(model, tmp_path / "weights", {"classes": ["a", "b", "c"]})
    assert load_weights(create_model("cifar_resnet8", CLASSES), tmp_path / "weights")["classes"] == ["a", "b", "c"]


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_those_that_torch_reads(tmp_path: Path, zipped: bool) -> None:
    """Views of one storage, other types, empty ones: the reference is torch.load."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    content = {
        "transposed": base.t(),
        "part": base[1:3, 2:5],
        "scalar": torch.tensor(7),
        "empty": torch.ones(0, 3),
        "half": base.half()[::2],
        "brain": base.bfloat16(),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "flags": base > 5,
    }
    if zipped:
        content["unsigned"] = torch.arange(5).to(torch.uint16)
    torch.save(content, tmp_path / "t", _use_new_zipfile_serialization=zipped)
    expected, found = torch.load(tmp_path / "t", weights_only=True), read_state(tmp_path / "t")
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_weights_of_torch_before_0_4_1_count_no_batches(tmp_path: Path, state: dict[str, Any]) -> None:
    old = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    fresh = create_model("cifar_resnet8", CLASSES)
    load_weights(fresh, tmp_path / "old.pth")
    found = fresh.net.state_dict()
    assert all(torch.equal(found[k], v) for k, v in old.items())
    assert {int(v) for k, v in found.items() if k not in old} == {0}
    some = {k: v for k, v in state.items() if k != "bn1.num_batches_tracked"}
    torch.save(some, tmp_path / "some.pth")
    with pytest.raises(ValueError, match=r"1 missing \(bn1\.num_batches_tracked\)"):
        load_weights(fresh, tmp_path / "some.pth")


# what cannot be weights ----------------------------------------------------------------------------------------------


def circular(state: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


def changed(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The state with `fc.weight` (or what is named) made of itself."""
    return lambda state: {
        **state,
        **{k.replace("_", ".", 1): f(state[k.replace("_", ".", 1)]) for k, f in values.items()},
    }


def with_value(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda value: value.clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(number).to(value))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (circular, "no state dict"),
        (lambda state: [state], "no state dict"),
        (
            lambda state: {**state, "fc.weight": state["fc.weight"].numpy()},
            r"no state dict: fc\.weight is not a tensor",
        ),
        (changed(fc_weight=torch.Tensor.to_sparse), r"fc\.weight is sparse"),
        (changed(fc_weight=torch.Tensor.to_sparse_csr), r"fc\.weight is sparse"),
        (changed(fc_weight=lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)), r"fc\.weight is quantised"),
        (changed(fc_weight=lambda v: v.to("meta")), r"fc\.weight is a meta tensor"),
        (changed(fc_weight=torch.Tensor.bool), r"fc\.weight is torch\.bool, and should be torch\.float32"),
        (changed(fc_weight=torch.Tensor.char), r"fc\.weight is torch\.int8, and should be"),
        (changed(fc_weight=lambda v: v.to(torch.complex64)), r"fc\.weight is torch\.complex64, and should be"),
        (changed(fc_weight=lambda v: v.to(torch.float8_e4m3fn)), r"fc\.weight is torch\.float8"),
        (changed(fc_weight=with_value(float("nan"))), r"fc\.weight has values that are not finite"),
        (changed(fc_weight=with_value(float("-inf"))), r"fc\.weight has values that are not finite"),
        (changed(fc_weight=lambda v: with_value(1e300)(v.double())), r"fc\.weight has values that are not finite"),
        (changed(bn1_running_var=torch.neg), r"bn1\.running_var has negative variances"),
        (changed(bn1_num_batches_tracked=torch.Tensor.float), r"bn1\.num_batches_tracked is torch\.float32"),
    ],
)
def test_what_cannot_be_weights_is_refused_in_one_line(
    tmp_path: Path, model: Any, state: dict[str, Any], make: Any, says: str
) -> None:
    torch.save(make(state), tmp_path / "x.pth")
    refused(model, tmp_path / "x.pth", says)


def test_safetensors_are_held_to_the_same(tmp_path: Path, model: Any, state: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(changed(fc_weight=torch.Tensor.bool)(state), tmp_path / "b.safetensors")
    refused(model, tmp_path / "b.safetensors", r"fc\.weight is torch\.bool")
    for record, says in (
        ({"classes": 5}, "record of classes is 5, not a list of names"),
        ({"mean": ["a"]}, "not a list of numbers"),
        (None, "is it whole"),
    ):
        text = "[" * 10**5 if record is None else json.dumps(record)
        save_file(state, tmp_path / "c.safetensors", metadata={"asib": text})
        refused(model, tmp_path / "c.safetensors", says)


def refused(model: Any, path: Path, says: str) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=says) as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# memory --------------------------------------------------------------------------------------------------------------

FLOATS = b"ctorch\nFloatStorage\n"


def archive(pickled: bytes, storage: bytes = b"", compress: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as made:
        made.writestr("a/data.pkl", pickled)
        made.writestr("a/data/0", storage)
    return buffer.getvalue()


def tensor(numel: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle of {"x": a tensor}, by hand: whatever it claims."""
    told = b"(" + b"Vstorage\n" + FLOATS + b"V0\nVcpu\n" + f"I{numel}\n".encode() + b"tQ"
    sizes = b"".join(b"(" + b"".join(f"L{n}L\n".encode() for n in values) + b"t" for values in (shape, stride))
    return b"}Vx\nctorch._utils\n_rebuild_tensor_v2\n(" + told + b"I0\n" + sizes + b"I00\nNtRs."


def test_old_files_have_views_of_storages(tmp_path: Path) -> None:
    """Numbers 2 to 4 of six, as torch < 0.4 named them: ("storage", type, key, place, 6, ("view", 2, 3))."""
    plain = tensor(6, (3,), (1,))
    pickled = plain.replace(b"I6\ntQ", b"I6\n(Vview\nI2\nI3\nttQ")
    assert pickled != plain
    (tmp_path / "old").write_bytes(legacy(pickled, np.arange(6, dtype="<f4").tobytes()))
    assert read_state(tmp_path / "old")["x"].tolist() == [2, 3, 4]
    (tmp_path / "out").write_bytes(legacy(pickled.replace(b"I2\nI3", b"I4\nI3"), bytes(24)))
    with pytest.raises(ValueError, match="lies outside itself"):
        read_state(tmp_path / "out")


def bombs() -> dict[str, tuple[bytes, str]]:
    zeros = bytes(60 * 2**20)
    deep = b"(" * 10 + b"".join(b"(" * 2 + b"t" * 2 for _ in range(5_000))
    header = b'{"__metadata__":{"a":"' + b"x" * (17 * 2**20) + b'"}}'
    return {
        "deflated": (archive(tensor(15 * 2**20, (15 * 2**20,), (1,)), zeros, zipfile.ZIP_DEFLATED), "unpacks to more"),
        "larger than its storage": (archive(tensor(1, (30000, 30000), (30000, 1)), bytes(4)), "larger than what the"),
        "larger than what is there": (archive(tensor(9 * 10**8, (9 * 10**8,), (1,)), bytes(4)), "ends before its"),
        "stretched": (archive(tensor(1, (30000, 30000), (0, 0)), bytes(4)), "larger than what the file holds"),
        "many objects": (archive(b"(" + b"}" * 30_000 + b"l."), "more than 25000 steps"),
        "deep": (archive(b"(" * 14_000 + b"l" * 10_000 + b"."), "no state dict"),
        "deep tuples": (archive(deep + b"."), "no state dict"),
        "tuples in tuples": (archive(b")" + b"\x85" * 20_000 + b"."), "no state dict"),
        "a key of tuples": (archive(b"})" + b"\x85" * 20_000 + b"Ns."), "no state dict"),
        "memo": (archive(b"}r\xff\xff\xff\x7f."), "no state dict"),
        "a long string": (archive(b"\x8d" + struct.pack("<Q", 2**40) + b"x."), "cannot be read"),
        "names": (struct.pack("<Q", len(header)) + header, "names of its tensors alone take 17 MB"),
        "names that are not there": (struct.pack("<Q", 2**33) + b"{", "names of its tensors alone"),
        "legacy": (legacy(tensor(9 * 10**8, (9 * 10**8,), (1,)), bytes(64), 9 * 10**8), "ends before its"),
    }


def legacy(pickled: bytes, storage: bytes, told: int | None = None) -> bytes:
    begin = [pickle.dumps(x, 2) for x in (torch_files.MAGIC, torch_files.PROTOCOL, {"little_endian": True})]
    count = len(storage) // 4 if told is None else told
    return b"".join([*begin, pickled, pickle.dumps(["0"], 2), struct.pack("<q", count), storage])


def test_no_file_unpacks_to_more_than_itself(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest of these takes 3 GB where it is believed."""
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 25_000)
    files = bombs()
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    for name, (content, says) in files.items():
        before, length = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(content)
        with pytest.raises(ValueError, match=says) as caught:
            load_weights(model, tmp_path / name)
        assert "\n" not in str(caught.value)
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert taken < 250e6 + 2 * length, name


# mutations -----------------------------------------------------------------------------------------------------------


class Bomb:
    """Writes a file if anybody runs what the pickle names."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_mutated_files_load_or_are_refused(tmp_path: Path) -> None:
    """Seeded: bytes changed, doubled, taken out; in the archive and in its pickle, whose steps then mean others."""
    boom = tmp_path / "boom"
    small = {"a.weight": torch.ones(3, 2), "a.bias": torch.zeros(3), "n": torch.tensor(4)}
    module = nn.ModuleDict({"a": nn.Linear(2, 3)})
    originals, saved = [], save({"a.weight": small["a.weight"], "a.bias": small["a.bias"]}, {"asib": '{"classes": []}'})
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"model": small, "x": Bomb(str(boom))}, buffer, _use_new_zipfile_serialization=zipped)
        originals.append(buffer.getvalue())
    with zipfile.ZipFile(io.BytesIO(originals[0])) as made:
        pickled = made.read(next(n for n in made.namelist() if n.endswith("data.pkl")))
    rng = random.Random(int(os.environ.get("ASIB_SEED", "0")))
    rounds = int(os.environ.get("ASIB_ROUNDS", "2")) * 200
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded, said = 0, set()
    for number in range(rounds):
        kind = number % 5
        content = mutated([*originals, saved, pickled, pickled][kind], rng)
        path = tmp_path / "m.pth"
        path.write_bytes(content if kind < 3 else archive(content, bytes(24)))
        try:
            read_metadata(path)
            state = read_state(path)
            loaded += 1
            assert all(v.numel() <= 10**4 for v in state.values())
            checked(module, state, "x")
        except ValueError as error:
            said.add(str(error))
    assert not [line for line in said if "\n" in line]
    assert not boom.exists()
    assert 0 < loaded < rounds
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200e6


def mutated(content: bytes, rng: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(made))
        match rng.randrange(5):
            case 0:
                made[at] = rng.randrange(256)
            case 1:
                made[at] ^= 1 << rng.randrange(8)
            case 2:
                del made[at : at + rng.randrange(1, 9)]
            case 3:
                made[at:at] = made[at : at + rng.randrange(1, 40)]
            case _:
                made[at : at + 4] = struct.pack("<I", rng.choice([0, 2**31 - 1, 2**32 - 1]))
    return bytes(made)
