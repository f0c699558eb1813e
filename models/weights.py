"""Weights on disk: our safetensors files with their metadata, and checkpoints of other code bases.

Nothing is ever unpickled as code; a file that does not belong to the network is refused before it is touched.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from models import torch_files
from models.features import FeatureNet
from pipeline.errors import first_line
from pipeline.files import replacing

logger = logging.getLogger("asib")
METADATA_KEY = "asib"
ADAPTER = "distillation_adapter."
NESTED = ("state_dict", "model", "net")  # where other code bases keep the state dict in a checkpoint
MAX_NESTED = 8
MAX_HEADER = 16 * 2**20
"""Bytes of names, shapes and metadata of safetensors."""
TRACKED = "num_batches_tracked"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RECORDED: dict[str, tuple[Any, str]] = {
    "classes": (str, "names"),
    "mean": ((int, float), "numbers"),
    "std": ((int, float), "numbers"),
}
"""Metadata that code relies on, with the types it must have."""
PREFIXES = ("module.", "backbone.", "net.", "model.", "_orig_mod.")  # prefixes that wrappers add to names


def save_weights(model: FeatureNet, path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Write a network as safetensors, atomically: after a crash there is either the old file or the whole new one.

    Args:
        model: the wrapper; its adapter is saved with it.
        path: target; its folder must exist.
        metadata: JSON values to travel with it (classes, mean, std, …). Architecture, class count, feature width and
            `small_input` are added from the model.

    Raises:
        UserError: the disk is full, or the file may not be written.
    """
    target = Path(path)
    record = {
        "architecture": model.architecture,
        "num_classes": int(model.net.num_classes),  # type: ignore[arg-type]
        "small_input": model.small_input,
        "feature_dim": model.feature_dim,
        **metadata,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    seen: set[int] = set()
    for name, value in tensors.items():
        # safetensors refuses tensors that share memory (tied weights).
        if value.numel() and value.untyped_storage().data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.untyped_storage().data_ptr())
    with replacing(target) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(record, sort_keys=True)})


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The record that `save_weights` wrote; empty for files of other code bases.

    Raises:
        ValueError: no such file, not readable as safetensors, an invalid record.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    if not _is_safetensors(path):
        return {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({_name(first_line(error))}); is it whole?") from error
    if not isinstance(record, dict):
        return {}
    for key, (kind, words) in RECORDED.items():
        value = record.get(key, [])
        if not (isinstance(value, list) and all(isinstance(v, kind) for v in value)):
            raise ValueError(f"{path}: its record of {key} is {_short(value)}, not a list of {words}")
    return record


def _is_safetensors(path: Path) -> bool:
    """Decide by content, or by name if the content is cut off. Raises ValueError: neither that nor torch.save's."""
    with path.open("rb") as file:
        head, size = file.read(32), os.fstat(file.fileno()).st_size
    if torch_files.is_torch_file(head):
        return False
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length > MAX_HEADER:
        raise ValueError(f"{path} cannot be read: the names of its tensors alone take {length >> 20} MB")
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and length <= size):
        return True
    raise ValueError(f"{path} cannot be read: it is not a torch.save or safetensors file; it begins with {head[:12]!r}")


def load_weights(
    model: FeatureNet,
    path: str | Path,
    *,
    expect: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Load a checkpoint strictly into `model.net`, and into its adapter where both have one.

    Reads our safetensors, and what torch.save has written in other code bases, whatever the file's name: a plain state
    dict, or one under "state_dict", "model" or "net", with "module." or "backbone." before the names.

    Args:
        model: the wrapper to fill; left as it was when an error is raised.
        path: the file.
        expect: values that the file's metadata must have where it records them; `num_classes`, `architecture` and
            `small_input` default to the model's own.
        classes: names, in the order of the logits that the model is to have. If the file records the same ones in
            another order, the classifier's rows are reordered to this one.

    Returns:
        The metadata record; empty for files of other code bases.

    Raises:
        ValueError: unreadable file; another class count, architecture or `small_input`; other classes; names, shapes or
            values that do not fit, with the first few named.
    """
    record = read_metadata(path)
    state = read_state(Path(path))
    adapter = {k.removeprefix(ADAPTER): v for k, v in state.items() if k.startswith(ADAPTER)}
    state = {k: v for k, v in state.items() if not k.startswith(ADAPTER)}
    wanted = {
        "num_classes": model.num_classes,
        "architecture": model.architecture,
        "small_input": model.small_input,
        **(expect or {}),
    }
    found = dict(record)
    if "num_classes" not in found:
        found["num_classes"] = _count_classes(model, state, wanted["num_classes"])
    for key, value in wanted.items():
        if key in found and found[key] != value:
            raise ValueError(
                f"{path}: {key} is {_short(found[key])} in the checkpoint, {_short(value)} here; "
                "choose the matching checkpoint or configuration"
            )
    state = checked(model.net, state, f"{path} is not a checkpoint of {model.architecture}")
    if classes is not None and "classes" in record:
        _reorder(model, state, record["classes"], list(classes), path)
    if adapter and model.distillation_adapter is not None:
        fill(model.distillation_adapter, adapter, f"{path}: its distillation adapter does not fit")
    model.net.load_state_dict(state, strict=True)
    return record


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over sorted state-dict names, dtypes, shapes and bytes; independent of the memory format."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file (as `load_weights` reads them), without wrappers' prefixes.

    Raises:
        ValueError: unreadable, or no state dict.
    """
    try:
        if _is_safetensors(path):
            return _strip(safetensors.torch.load_file(path))
        return _strip(torch_files.read(path, lambda content: _state_dict(content, path)))
    except (Refused, MemoryError):
        raise
    # on damaged files: SafetensorError, BadZipFile, UnpicklingError, IndexError, struct.error, …
    except Exception as error:
        kind = "as safetensors " if path.suffix == ".safetensors" else ""
        raise ValueError(f"{path} cannot be read {kind}({_name(first_line(error))}); is it whole?") from error


class Refused(ValueError):
    """The file can be read but holds no weights; the message names it."""


def _state_dict(content: Any, path: Path) -> dict[str, torch_files.Strided]:
    for _ in range(MAX_NESTED):
        if not isinstance(content, dict):
            break
        inner = [content[k] for k in NESTED if isinstance(content.get(k), (dict, torch_files.Opaque))]
        if not inner:
            break
        content = inner[0]
    if isinstance(content, torch_files.Opaque):
        raise Refused(f"{path} holds an object ({_name(content.what)}), not a state dict; save its state_dict() alone")
    if not isinstance(content, dict) or not content:
        raise Refused(f"{path} holds no state dict, neither at its top nor under {', '.join(NESTED)}")
    for name, value in content.items():
        if isinstance(value, torch_files.Unusable):
            raise Refused(f"{path}: {_name(name)} is {value.why}; weights are plain tensors")
        if not isinstance(value, torch_files.Strided):
            raise Refused(f"{path} holds no state dict: {_name(name)} is not a tensor")
    return content


def _strip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove prefixes that all names share (apart from the adapter's)."""
    while True:
        names = [k for k in state if not k.startswith(ADAPTER)]
        prefix = next((p for p in PREFIXES if names and all(k.startswith(p) for k in names)), None)
        if prefix is None:
            return state
        state = {k.removeprefix(prefix): v for k, v in state.items()}


def _reorder(
    model: FeatureNet, state: dict[str, torch.Tensor], theirs: list[str], ours: list[str], path: str | Path
) -> None:
    """Put the classifier's rows of a state that fits the model in the order of our classes."""
    if theirs == ours:
        return
    if sorted(theirs) != sorted(ours) or len(set(ours)) != len(ours):
        foreign = [name for name in theirs if name not in ours] or theirs
        raise ValueError(
            f"{path}: it was trained on other classes ({_name(', '.join(foreign[:3]))}, …) than the data has "
            f"({_name(', '.join(ours[:3]))}, …); choose another checkpoint or data set"
        )
    rows = torch.tensor([theirs.index(name) for name in ours])
    classifier = _classifier(model)
    for name in (f"{classifier}.weight", f"{classifier}.bias"):
        if name in state:
            state[name] = state[name][rows]
    logger.info("%s: its classes are in another order; the classifier's rows are put in the data's", path)


def _classifier(model: FeatureNet) -> str:
    """The name of the classifier in the network."""
    classifier = model.net.get_classifier()  # type: ignore[operator]
    return next((n for n, m in model.net.named_modules() if m is classifier), "")


def _count_classes(model: FeatureNet, state: Mapping[str, torch.Tensor], default: Any) -> Any:
    """Number of classes of a state dict, read off the classifier's weight; `default` if it has none."""
    weight = state.get(f"{_classifier(model)}.weight")
    return default if weight is None or weight.dim() == 0 else weight.shape[0]


def fill(module: nn.Module, state: Mapping[str, torch.Tensor], complaint: str) -> None:
    """Load a state dict that is `checked`. Raises ValueError before anything is changed."""
    module.load_state_dict(checked(module, state, complaint), strict=True)


def checked(module: nn.Module, state: Mapping[str, torch.Tensor], complaint: str) -> dict[str, torch.Tensor]:
    """The state dict, if a module can take it: its names and shapes, and values that weights can have.

    torch < 0.4.1 kept no `num_batches_tracked`: without any, the module's own are taken.

    Raises:
        ValueError: it begins with `complaint`.
    """
    own = module.state_dict()
    if not any(name.endswith(TRACKED) for name in state):
        state = {**state, **{name: value for name, value in own.items() if name.endswith(TRACKED)}}
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    misshapen = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(map(_name, names[:3]))}{', …' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshapen))
        if names
    ]
    faults = faults or [f"{name} {fault}" for name in own if (fault := _fault(name, state[name], own[name]))][:3]
    if faults:
        raise ValueError(f"{complaint}: {'; '.join(faults)}")
    return dict(state)


def _fault(name: str, value: torch.Tensor, own: torch.Tensor) -> str | None:
    """Why a tensor cannot be the weights or the buffer `own`, or None."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "is sparse, quantised or a meta tensor"
    if not own.is_floating_point():
        whole = not (value.is_floating_point() or value.is_complex())
        return None if whole else f"is {value.dtype}, and should be {own.dtype}"
    if value.dtype not in FLOATS:
        return f"is {value.dtype}, and should be {own.dtype}"
    if value.numel() == 0:
        return None
    low, high = value.to(own.dtype).aminmax()
    if not (low.isfinite() and high.isfinite()) and bool(own.isfinite().all()):
        return "has values that are not finite"
    return "has negative variances" if name.endswith("running_var") and low < 0 else None


def _name(text: str) -> str:
    """A name out of a file, fit for one line."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 80 else f"{text[:79]}…"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
