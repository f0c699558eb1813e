"""How the walk over the schema's keys asks: for each, a configuration where it can act, another value, an observer."""

import functools
import json
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import ValidationError

from pipeline.config import Config, explain
from pipeline.data.sources import ImageData
from pipeline.errors import UserError
from tests.pipeline.training.builders import differences, image_data

Keys = dict[str, Any]
Observer = Callable[[Keys], Any]
NOTHING: Keys = {}


class Case(NamedTuple):
    """`base` is where the key can act; `to` is its other value, with which `more` must change (rules between keys)."""

    to: Any
    base: Keys = NOTHING
    observer: Observer | None = None
    more: Keys = NOTHING


def nested(keys: Keys) -> dict[str, Any]:
    """`{"method.tau": 2}` as sections; items of lists by their numbers."""
    tree: dict[str, Any] = {}
    for name, value in keys.items():
        *sections, last = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


def images() -> ImageData:
    return image_data(24, 12)


@functools.cache
def _seen(observer: Observer, written: str) -> Any:
    try:
        return observer(json.loads(written))
    except ValidationError as error:
        return explain(error)
    except UserError as error:
        return str(error)


def seen(observer: Observer, keys: Keys) -> Any:
    """What an observer sees, asked once; what a configuration is refused with is a difference too."""
    return _seen(observer, json.dumps(keys))


def assert_acts(
    key: str, case: Case, usual: Observer, refused: Collection[str], texts: Collection[Observer] = ()
) -> None:
    """Changing the key changes what it is for.

    Args:
        usual: the observer, if the case names none.
        refused: keys one of whose two values is refused where they are tried.
        texts: observers that see a text.
    """
    observer = case.observer or usual
    before, after = seen(observer, case.base), seen(observer, {**case.base, key: case.to, **case.more})
    if key not in refused:
        assert not isinstance(before, str) or observer in texts, before
        assert type(before) is type(after), after
    assert differences(before, after) != []


class Place:
    """A folder with two small data sets, in which runs are made; made once."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="asib-walk-")
        self.path = Path(self._folder.name)
        rng = np.random.default_rng(0)
        for name in ("one", "two"):
            arrays: dict[str, Any] = {
                f"x_{s}": rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for s, n in (("train", 24), ("test", 9))
            }
            np.savez(self.path / f"{name}.npz", **arrays, y_train=np.arange(24) % 3, y_test=np.arange(9) % 3)
        for k, pixels in enumerate(arrays["x_test"]):
            for split, shown in (("train", pixels), ("val", 255 - pixels)):
                (folder := self.path / "pictures" / split / str(k % 3)).mkdir(parents=True, exist_ok=True)
                Image.fromarray(shown).save(folder / f"{k}.png")

    def config(self, keys: Keys) -> Config:
        base = {
            "output_dir": str(self.path / "runs"),
            "device": "cpu",
            "threads": 1,
            "log_model": False,
            "dataset.name": "npz",
            "dataset.path": str(self.path / "one.npz"),
            "dataset.batch_size": 8,
            "dataset.val_fraction": 0.25,
            "model.student.name": "cifar_resnet8",
            "method.student_epochs_per_stage": [1],
            "method.kd_target": "avg",
            "tracking.mode": "offline",
        }
        return Config.model_validate(nested(json.loads(json.dumps(base | keys).replace("{here}", str(self.path)))))


@functools.cache
def place() -> Place:
    return Place()
