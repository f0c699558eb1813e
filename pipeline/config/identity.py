"""The lock and the identity of a result (docs/method.md section 6)."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.config.base import flatten
from pipeline.config.schema import Config

NOT_COMPUTATION = (
    "device",
    "threads",
    "output_dir",
    "run_name",
    "rung",
    "student",
    "resume",
    "extend",
    "log_model",
    "register",
    "debug",
    "dataset.root",
    "dataset.path",
    "dataset.id",
    "dataset.train_split",
    "dataset.test_split",
    "dataset.download",
    "dataset.eval_batch_size",
    "dataset.workers",
    "optim.use_amp",
    "optim.compile",
    "bank",
    "bank_folder",
    "bank_gb",
    "checkpoint.",
    "tracking.",
    "log.",
)
"""Keys, and prefixes of keys, that do not change what is computed."""
ONLY_WHERE_SET = (
    "dataset.class_list",
    "dataset.normalisation",
    "dataset.mean",
    "dataset.std",
    "method.module",
    "method.plus",
    "method.standardise",
)
"""Keys added later, left out of the hash while they are null, false, empty or exact: earlier results keep theirs."""
ROOMS = ("models", "pipeline", "steps")
"""Folders whose Python sources are part of every result's identity."""
_OF_PLUS = ("method.plus_alpha", "method.plus_tau")
_OF_SUBSETS = ("model.overlap", "model.overlap_seed", "model.unseen")


def listed(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key, or the section that it names, is among `names`, in which `tracking.` means a whole section.

    Example:
        >>> [listed(key, ["seed", "tracking."]) for key in ("seed", "seeds", "tracking.uri", "tracking")]
        [True, False, True, True]
    """
    return any(key == name or (name.endswith(".") and f"{key}.".startswith(name)) for name in names)


def computation(config: Config) -> dict[str, Any]:
    """Return the dotted keys that the hash covers: not teachers' checkpoint paths, whose weights are hashed instead."""
    return {
        name: value
        for name, value in flatten(config).items()
        if not name.endswith(".checkpoint")
        and not (name in ONLY_WHERE_SET and (not value or value == "exact"))
        and not (name in _OF_PLUS and not config.method.plus)
        and not (name in _OF_SUBSETS and not (config.model.partly_taught or config.continual.divides_teachers))
        and not (name.startswith("model.teachers.") and name.endswith(".classes") and not value)
        and not (name.startswith("continual.") and config.continual.num_tasks is None)
        and not listed(name, NOT_COMPUTATION)
    }


def canonical(values: Mapping[str, Any]) -> str:
    """Write JSON with sorted keys and no spaces; types are validated, so tau=4 and tau=4.0 agree."""
    return json.dumps(_unsigned(values), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _unsigned(value: Any) -> Any:
    """Turn -0.0 into 0.0: the same number, but different JSON."""
    if isinstance(value, Mapping):
        return {key: _unsigned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_unsigned(item) for item in value]
    return 0.0 if isinstance(value, float) and value == 0 else value


def config_hash(config: Config) -> str:
    """SHA-256 (hex) over the canonical JSON of what is computed."""
    return hashlib.sha256(canonical(computation(config)).encode()).hexdigest()


@lru_cache(maxsize=8)
def source_digest(root: Path) -> str:
    """SHA-256 (hex) over the Python sources of models, pipeline and steps under `root`, read once in a process."""
    digest = hashlib.sha256()
    for folder in ROOMS:
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def sources_of(config: Config, root: Path) -> str:
    """`source_digest`; for a method from outside the repository, SHA-256 (hex) over that and the method's own files."""
    m, digest = config.method, source_digest(root)
    return digest if m.module is None else _with_outside(digest, m.module, m.step, m.task)


@lru_cache(maxsize=8)
def _with_outside(digest: str, *places: str) -> str:
    """`digest` with the files of these modules, read once like them: what lies in a package comes with its folder."""
    found = hashlib.sha256(digest.encode())
    for name in dict.fromkeys(place.partition(":")[0] for place in places):
        if name.partition(".")[0] in ROOMS:
            continue
        try:
            spec = find_spec(name)
        except Exception:  # of somebody else's code: the method is refused where it is imported
            continue
        if spec is None or not spec.has_location or spec.origin is None:
            continue
        file = Path(spec.origin)
        packaged = "." in name or file.name == "__init__.py"
        for each in sorted({file, *(file.parent.rglob("*.py") if packaged else ())}):
            label = f"{name}:{each.relative_to(file.parent).as_posix()}"
            found.update(label.encode() + b"\0" + each.read_bytes() + b"\0")
    return found.hexdigest()


@dataclass(frozen=True)
class Identity:
    """What makes two results the same: it decides on reusing finished runs, on study names and on resuming."""

    config_hash: str
    amp_dtype: str
    teachers: tuple[str, ...]
    data_digest: str
    sources: str
    part: str = ""
    """Which of several results of one configuration it is: `teacher_0` of a fine-tuning."""
    bank: bool = False
    """Whether teachers' outputs came from the bank, whose fp16 rounding changes the bits."""
    compiled: bool = False
    """Whether the networks were compiled with torch.compile, which also rounds differently."""

    def digest(self) -> str:
        return hashlib.sha256(canonical(asdict(self)).encode()).hexdigest()
