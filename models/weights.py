"""Weights on disk: our safetensors files with their metadata, and checkpoints of other code bases.

Nothing is ever unpickled as code; a file that does not belong to the network is refused before it is touched.
"""

import argparse
import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from models.features import FeatureNet
from pipeline.files import replacing

METADATA_KEY = "asib"
ADAPTER = "distillation_adapter."
NESTED = ("state_dict", "model", "net")  # where other code bases keep the state dict in a checkpoint
PREFIXES = ("module.", "backbone.", "net.", "model.", "_orig_mod.")  # what wrappers put before the names


def save_weights(model: FeatureNet, path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Write a network as safetensors, atomically: after a crash there is the old file, or the new one, whole.

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
        "num_classes": model.num_classes,
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
        ValueError: no such file, not readable as safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    if path.suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({_first_line(error)}); is it whole?") from error
    return record if isinstance(record, dict) else {}


def load_weights(model: FeatureNet, path: str | Path, *, expect: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Load a checkpoint strictly into `model.net`, and into its adapter where both have one.

    Reads our safetensors, and `.pt`/`.pth` of other code bases: a plain state dict, or one under "state_dict",
    "model" or "net", with "module." or "backbone." before the names.

    Args:
        model: the wrapper to fill; left as it was when an error is raised.
        path: the file.
        expect: values that the file's metadata must have where it records them; `num_classes`, `architecture` and
            `small_input` are expected as the model has them unless given.

    Returns:
        The metadata record; empty for files of other code bases.

    Raises:
        ValueError: unreadable file; another class count, architecture or `small_input`; names or shapes that do not
            fit, with the first few named.
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
    check_fit(model.net, state, f"{path} is no checkpoint of {model.architecture}")
    if adapter and model.distillation_adapter is not None:
        check_fit(model.distillation_adapter, adapter, f"{path}: its distillation adapter does not fit")
        model.distillation_adapter.load_state_dict(adapter, strict=True)
    model.net.load_state_dict(state, strict=True)
    return record


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over sorted state-dict names, dtypes, shapes and bytes; the memory format has no part in it."""
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
    if path.suffix == ".safetensors":
        try:
            content: Any = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as safetensors ({_first_line(error)}); is it whole?") from error
    elif path.suffix in (".pt", ".pth"):
        try:
            # Checkpoints of the KD tables keep their options beside the weights; a Namespace only holds values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be read ({_first_line(error)}); it is damaged, or holds more than tensors: "
                "save its state dict alone"
            ) from error
    else:
        raise ValueError(
            f"{path}: {path.suffix or 'no suffix'} is no kind of checkpoint; use .safetensors, .pt or .pth"
        )
    while isinstance(content, Mapping):
        inner = next((content[k] for k in NESTED if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(v, torch.Tensor) for v in content.values())
    ):
        raise ValueError(f"{path} holds no state dict, neither at its top nor under {', '.join(NESTED)}")
    return _strip({str(k): v for k, v in content.items()})


def _strip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take off prefixes that all names (the adapter's apart) share."""
    while True:
        names = [k for k in state if not k.startswith(ADAPTER)]
        prefix = next((p for p in PREFIXES if names and all(k.startswith(p) for k in names)), None)
        if prefix is None:
            return state
        state = {k.removeprefix(prefix): v for k, v in state.items()}


def _count_classes(model: FeatureNet, state: Mapping[str, torch.Tensor], default: Any) -> Any:
    """Classes of a state dict, read off the classifier's weight; `default` where it is not found."""
    classifier = model.net.get_classifier()  # type: ignore[operator]
    name = next((n for n, m in model.net.named_modules() if m is classifier), "")
    weight = state.get(f"{name}.weight")
    return default if weight is None or weight.dim() == 0 else weight.shape[0]


def check_fit(module: nn.Module, state: Mapping[str, torch.Tensor], complaint: str) -> None:
    """ValueError, which begins with `complaint`, for names or shapes that are not the module's."""
    own = module.state_dict()
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    misshapen = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshapen))
        if names
    ]
    if faults:
        raise ValueError(f"{complaint}: {'; '.join(faults)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
