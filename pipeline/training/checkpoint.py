"""Checkpoints: a tree of state in one safetensors file, two alternating slots, a manifest written last.

No pickle: tensors are stored as such, everything else as JSON in the file's header. Files are written atomically, so
that a slot holds either the whole new checkpoint or the one before. Training continues meanwhile.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import remove_parts, write_atomically
from pipeline.journal import SLOTS
from pipeline.training.nonfinite import is_finite

FORMAT = "asib-checkpoint-1"


def _split(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `tree`; copies of its tensors go to `tensors`, under the names that replace them."""
    if isinstance(tree, Tensor):
        name = f"{len(tensors)}{name}"  # paths alone may coincide: {1: …} and {"1": …}
        tensors[name] = tree.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[k, _split(v, f"{name}/{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list": [_split(v, f"{name}/{i}", tensors) for i, v in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TypeError(f"{name}: a checkpoint cannot hold a {type(tree).__name__}")


def _join(node: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _join(v, tensors) for k, v in content}
    if kind == "list":
        return [_join(v, tensors) for v in content]
    return content


class Copy:
    """A tree of state on the CPU, as it was when it was copied, unaffected by later training.

    Args:
        tree: dicts with str or int keys, lists, numbers, tensors.
    """

    def __init__(self, tree: Any) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._structure = _split(tree, "", self._tensors)

    def pack(self) -> bytes:
        """The bytes of a safetensors file that holds the tree; the copy itself is freed."""
        content = save_tensors(self._tensors, metadata={"format": FORMAT, "tree": json.dumps(self._structure)})
        self._tensors.clear()
        return content


def pack(tree: Any) -> bytes:
    """The bytes of a safetensors file that holds `tree`."""
    return Copy(tree).pack()


def unpack(content: bytes) -> Any:
    """The tree that was packed, with tuples as lists. Raises ValueError for any other bytes."""
    try:
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']}, expected {FORMAT}")
        return _join(json.loads(metadata["tree"]), load_tensors(content))
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError("not a checkpoint of this project") from error


class Saved(NamedTuple):
    """A checkpoint on disk."""

    path: Path
    sha256: str
    slot: int


class Slots:
    """Two alternating checkpoint files in `folder`, and `manifest.json`, which names the whole ones.

    A thread writes them. Until it is done, a second copy of the state is in memory: as tensors, then as
    the bytes of its file (and, during the conversion, as both).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / "manifest.json"
        self._whole: int | None = None
        """The slot of the newest whole checkpoint, which is never overwritten."""
        self._writer = futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: futures.Future[Saved] | None = None
        """The checkpoint that is being written, or was written but is not settled."""

    def _content(self, record: dict[str, Any]) -> bytes | None:
        """The bytes of a recorded checkpoint; None if they are missing or torn."""
        path = self.folder / f"slot{record['slot']}.safetensors"
        content = path.read_bytes() if path.exists() else b""
        return content if hashlib.sha256(content).hexdigest() == record["sha256"] else None

    def _records(self) -> list[dict[str, Any]]:
        """The manifest's records, newest first; anything else in it is ignored."""
        if not self.manifest.exists():
            return []
        try:
            found = list(json.loads(self.manifest.read_text())["checkpoints"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.manifest} is damaged: start a new run") from error
        return [
            r for r in found if isinstance(r, dict) and r.get("slot") in (0, 1) and isinstance(r.get("sha256"), str)
        ]

    def write(self, tree: Any) -> None:
        """Begin to write `tree` as it is now over the older (or damaged) slot, then the manifest.

        The previous write must have been settled.
        """
        assert self._pending is None
        self._pending = self._writer.submit(self._write, Copy(tree))

    def settle(self, wait: bool = True) -> Saved | None:
        """The pending checkpoint once it is written; None if nothing is pending or, without `wait`, finished.

        Raises:
            UserError: the disk is full; the checkpoints before it are as they were.
        """
        pending = self._pending
        if pending is None or not (wait or pending.done()):
            return None
        futures.wait([pending])  # before the pending write is forgotten: a signal's exception may end the waiting
        self._pending = None
        return pending.result()

    def _write(self, state: Copy) -> Saved:
        records = self._records()
        if self._whole is None:
            with suppress(FileNotFoundError):  # the run's folder was removed: writing will say so
                self.folder.mkdir(exist_ok=True)
            remove_parts(self.folder)
            self._whole = next((r["slot"] for r in records if self._content(r) is not None), None)
        slot = 0 if self._whole is None else 1 - self._whole
        path = self.folder / f"slot{slot}.safetensors"
        content = state.pack()
        sha256 = hashlib.sha256(content).hexdigest()
        write_atomically(path, content)
        kept = [r for r in records if r["slot"] != slot][:1]
        newest = {"slot": slot, "sha256": sha256}
        write_atomically(self.manifest, json.dumps({"checkpoints": [newest, *kept]}))
        self._whole = slot
        return Saved(path, sha256, slot)

    def adopt(self, path: Path, sha256: str) -> None:
        """Make a checkpoint file from elsewhere the newest one of this folder, if its hash is the announced one.

        Raises:
            UserError: its hash differs; the file is not moved.
        """
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise UserError(
                f"{path.name}: its SHA-256 is {found[:12]}, the manifest says {sha256[:12]}: damaged on its way"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        os.replace(path, self.folder / "slot0.safetensors")
        write_atomically(self.manifest, json.dumps({"checkpoints": [{"slot": 0, "sha256": sha256}]}))

    def clear(self) -> None:
        """Delete the checkpoints, the manifest first."""
        self.settle()
        for name in SLOTS:
            (self.folder / name).unlink(missing_ok=True)

    def read(self) -> tuple[Any, Saved]:
        """The newest intact checkpoint. Raises UserError if both are missing or damaged."""
        found = next(self._whole_ones(), None)
        if found is None:
            raise UserError(f"{self.folder}: no whole checkpoint there; start a new run")
        return found

    def read_good(self) -> tuple[Any, Saved] | None:
        """The newest whole checkpoint that is finite throughout and was not written amid non-finite steps, or None.

        The sums of an epoch's terms do not count: they include skipped steps.
        """
        for state, saved in self._whole_ones():
            if state["position"]["streak"] == 0 and is_finite({k: v for k, v in state.items() if k != "sums"}):
                return state, saved
        return None

    def _whole_ones(self) -> Iterator[tuple[Any, Saved]]:
        if self._pending is not None:
            futures.wait([self._pending])
        for record in self._records():
            content = self._content(record)
            if content is not None:
                path = self.folder / f"slot{record['slot']}.safetensors"
                yield unpack(content), Saved(path, record["sha256"], record["slot"])


def cpu_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict on the CPU that later training does not change."""
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def require_space(folder: Path, modules: list[torch.nn.Module]) -> None:
    """Raise UserError unless two checkpoints of these modules (weights, two moments, best copy) fit on disk."""
    weights = sum(v.numel() * v.element_size() for m in modules for v in m.state_dict().values())
    needed = 2 * 4 * weights + 5_000_000
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"output_dir={folder}: {free / 1e6:.0f} MB free, about {needed / 1e6:.0f} MB are needed for checkpoints: "
            "make room or choose another output_dir"
        )
