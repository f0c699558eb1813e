"""Files of `torch.save`, read without running anything that they name.

Such a file is a pickle beside the bytes of its storages. The pickle is followed (`pickles.Reader`) into descriptions of
tensors; whatever else it names stays a name. Nothing is imported or called, and nothing is allocated that
the file does not hold: a tensor that is larger than its storage, or an archive that unpacks to more than itself, is
refused by its description. Only the tensors that were asked for are read.
"""

import io
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from models.pickles import Name, Opaque, Reader

MAX_PICKLE = 64 * 2**20
"""Bytes of the pickles, without the storages."""
MAX_DIRECTORY = 4 * 2**20
"""Bytes of an archive's list of entries; fifty thousand tensors fill it."""
ZIP = b"PK\x03\x04"
MAGIC = 0x1950A86A20F9469CFC6C
"""Files of torch < 1.6 begin with this number, pickled."""
PROTOCOL = 1001

DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "Untyped": torch.uint8,
        "QInt8": torch.qint8,
        "QUInt8": torch.quint8,
        "QInt32": torch.qint32,
    }.items()
}
OTHER_KINDS = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_qtensor": "quantised",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, without values",
}


class Unusable(NamedTuple):
    """A tensor that cannot hold weights, and why."""

    why: str


class Storage(NamedTuple):
    """Numbers in the file: `length` of them from `first` on, in the storage `key`."""

    dtype: torch.dtype
    key: str
    first: int
    length: int


class Strided(NamedTuple):
    """A tensor, as the pickle describes it; it lies within its storage."""

    dtype: torch.dtype
    key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


Fetch = Callable[[str], bytearray]


def is_torch_file(head: bytes) -> bool:
    """Whether a file with these first 32 bytes was written by torch.save."""
    return head.startswith(ZIP) or (head[:1] == b"\x80" and MAGIC.to_bytes(10, "little") in head)


def read(path: Path, choose: Callable[[Any], Mapping[str, Strided]]) -> dict[str, Tensor]:
    """The tensors that `choose` picks from the file's content.

    Raises:
        ValueError: it is damaged, or unpacks to more than itself; what `choose` raises.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        zipped = file.read(len(ZIP)) == ZIP
        content, fetch = _archive(file, size) if zipped else _legacy(file, size)
        storages: dict[str, bytearray] = {}
        found = {}
        for name, tensor in choose(content).items():
            if tensor.key not in storages:
                storages[tensor.key] = fetch(tensor.key)
            found[name] = _tensor(tensor, storages[tensor.key])
        return found


def _tensor(described: Strided, storage: bytearray) -> Tensor:
    if math.prod(described.shape) == 0:
        return torch.empty(described.shape, dtype=described.dtype)
    flat = torch.frombuffer(storage, dtype=described.dtype, count=len(storage) // described.dtype.itemsize)
    return flat.as_strided(described.shape, described.stride, described.offset)


# the two formats -----------------------------------------------------------------------------------------------------


def _archive(file: BinaryIO, size: int) -> tuple[Any, Fetch]:
    """torch >= 1.6: a zip archive of stored entries."""
    _check_directory(file)
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > size:
        raise ValueError("it unpacks to more than it is; torch.save does not compress")
    pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError("it is an archive, but without the data.pkl of torch.save")
    folder = pickles[0].filename.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    if pickles[0].file_size > MAX_PICKLE:
        raise ValueError(f"its pickle alone has more than {MAX_PICKLE >> 20} MB")
    reader = _Reader()
    content = reader.run(io.BytesIO(archive.read(pickles[0])))

    def fetch(key: str) -> bytearray:
        entry = archive.getinfo(f"{folder}data/{key}")
        return _exactly(archive.open(entry), entry.file_size, reader.bytes_of(key))

    return content, fetch


def _check_directory(file: BinaryIO) -> None:
    """Refuse an archive whose list of entries would take more memory than all of a network's names."""
    file.seek(-min(98, file.seek(0, os.SEEK_END)), os.SEEK_END)
    tail = file.read()
    if tail[-22:-18] != b"PK\5\6":
        raise ValueError("its end is missing")
    size = int.from_bytes(tail[-10:-6], "little")
    if tail[-42:-38] == b"PK\6\7":  # zip64
        size = int.from_bytes(tail[-58:-50], "little")
    if size > MAX_DIRECTORY:
        raise ValueError(f"its list of entries alone has {size >> 20} MB")


def _legacy(file: BinaryIO, size: int) -> tuple[Any, Fetch]:
    """torch < 1.6: five pickles, then each storage behind its length."""
    file.seek(0)
    head = io.BytesIO(file.read(MAX_PICKLE))
    reader = _Reader()
    magic, protocol, system = (_Reader().run(head) for _ in range(3))
    if (magic, protocol) != (MAGIC, PROTOCOL) or not isinstance(system, dict) or not system.get("little_endian", True):
        raise ValueError("it is of another version or machine of torch")
    content, keys = reader.run(head), _Reader().run(head)
    if not isinstance(keys, list):
        raise ValueError("it has no list of storages")
    starts: dict[str, int] = {}
    at = head.tell()
    for key in keys:
        file.seek(at)
        count = int.from_bytes(file.read(8), "little")
        itemsize = reader.dtypes[key].itemsize
        if count * itemsize != reader.bytes_of(key) or at + 8 + count * itemsize > size:
            raise ValueError("it ends before its tensors do")
        starts[key] = at + 8
        at += 8 + count * itemsize

    def fetch(key: str) -> bytearray:
        file.seek(starts[key])
        return _exactly(file, reader.bytes_of(key), reader.bytes_of(key))

    return content, fetch


def _exactly(file: Any, held: int, needed: int) -> bytearray:
    if held < needed:
        raise ValueError("it ends before its tensors do")
    content = bytearray(file.read(held))
    if len(content) != held:
        raise ValueError("it ends before its tensors do")
    return content


# the pickle ----------------------------------------------------------------------------------------------------------


class _Reader(Reader):
    """Makes descriptions of tensors and their storages."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, torch.dtype] = {}
        self.counts: dict[str, int] = {}
        """Number of elements of each storage that was named."""

    def bytes_of(self, key: str) -> int:
        return self.counts[key] * self.dtypes[key].itemsize

    def referred(self, told: Any) -> Any:
        """The storage that a persistent id describes: ("storage", type, key, place, count[, (key, first, count)])."""
        if not (isinstance(told, tuple) and len(told) >= 5 and told[0] == "storage"):
            return Opaque("reference")
        kind, key, count = told[1], told[2], told[4]
        dtype = DTYPES.get(kind.name) if isinstance(kind, Name) and kind.module.startswith("torch") else None
        if dtype is None or not isinstance(key, str) or not _size(count):
            raise ValueError("it has a storage of an unknown type")
        if self.dtypes.setdefault(key, dtype).itemsize != dtype.itemsize:
            raise ValueError("it has a storage of two types")
        self.counts[key] = max(count, self.counts.get(key, 0))
        if len(told) > 5 and isinstance(told[5], tuple):  # a view of the storage, in old files
            _, first, count = told[5]
            if not (_size(first) and _size(count) and first + count <= self.counts[key]):
                raise ValueError("it has a storage that lies outside itself")
            return Storage(dtype, key, first, count)
        return Storage(dtype, key, 0, count)

    def made(self, called: Any, arguments: Any) -> Any:
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            return Opaque("object")
        if called.module == "torch" and called.name == "Size":
            return arguments[0] if arguments and isinstance(arguments[0], tuple) else ()
        if called.module in ("torch._utils", "torch._tensor"):
            if called.name in OTHER_KINDS:
                return Unusable(OTHER_KINDS[called.name])
            if called.name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
                return _strided(*arguments[:4])
            if called.name == "_rebuild_tensor_v3":
                storage, offset, shape, stride, _, _, kind, *_ = arguments
                return _strided(storage, offset, shape, stride, kind)
            if called.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
                return arguments[0]
            if called.name == "_rebuild_from_type_v2":
                return self.made(arguments[0], arguments[2])
        return super().made(called, arguments)


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _strided(storage: Any, offset: Any, shape: Any, stride: Any, kind: Any = None) -> Strided | Unusable:
    whole = isinstance(storage, Storage) and _size(offset) and isinstance(shape, tuple) and isinstance(stride, tuple)
    if not whole or len(shape) != len(stride) or len(shape) > 64 or not all(map(_size, (*shape, *stride))):
        return Unusable("described wrongly")
    dtype = storage.dtype
    if isinstance(kind, Name):  # a type for which there is no typed storage
        named = getattr(torch, kind.name, None) if kind.module == "torch" else None
        if not isinstance(named, torch.dtype):
            return Unusable("of an unknown type")
        dtype = named
    count, numel = storage.length * storage.dtype.itemsize // dtype.itemsize, math.prod(shape)
    last = storage.first + offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if numel else 0
    if numel > count or (numel and last >= storage.first + count):
        return Unusable("larger than what the file holds of it")
    return Strided(dtype, storage.key, storage.first + offset, shape, stride)
