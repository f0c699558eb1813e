"""docs/migrating.md: every name of the right column exists here, and the renamed keys are those of the schema."""

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

from pipeline.compose.groups import groups
from pipeline.compose.shortcuts import _SHORTCUTS
from pipeline.config import field_of
from pipeline.config.words import OLD_NAMES
from pipeline.evaluate import request

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "migrating.md").read_text()
TRACKING = (ROOT / "docs" / "tracking.md").read_text()
ROWS = [tuple(row.strip("|").split(" | ")) for row in re.findall(r"^\| .* \|$", PAGE, re.MULTILINE)]
TABLE = [(there.strip(), here.strip()) for there, here in ROWS if there.strip() != "there"]


def exists(name: str) -> bool:
    """Whether this project has such a step, member of a module or class, key, option, variable, or file of a run."""
    words = name.split()
    if words[:2] == ["python", "-m"]:
        path, *given = words[2:]
        named = (word.partition("=")[0] for word in given if "<" not in word)
        known = {"cfg", "methods", "table", *request.OWN, *groups()}
        return (ROOT / f"{path.replace('.', '/')}.py").exists() and {*named} <= known
    key, equals, option = name.partition("=")
    if equals:
        return option in groups().get(key, []) or (ROOT / "conf" / key / f"{option}.yaml").exists()
    if name.startswith(("pipeline.", "models.")):
        try:
            return resolve_name(name) is not None
        except (ImportError, AttributeError):
            module, _, field = name.rpartition(".")
            return field in getattr(resolve_name(module), "__annotations__", {})
    here = field_of(name.split(".")) is not None or name in request.OWN or name in {*_SHORTCUTS, "DRY_RUN"}
    return here or (ROOT / name).exists() or f"`{name}`" in TRACKING


@pytest.mark.parametrize(("there", "here"), TABLE)
def test_what_a_name_is_called_here_exists(there: str, here: str) -> None:
    names = re.findall(r"`([^`]+)`", here)
    assert names or here.startswith("not "), f"{there} has no name here, and no reason"
    left_alone = {"cfg", "β", "mlflow run", "mbm.pth", "classes", "feature_dim", "distillation_adapter.out_dim"}
    assert [name for name in names if name not in left_alone and not exists(name)] == []


def test_every_renamed_key_is_there() -> None:
    assert len(TABLE) > 200
    said = {name: here for there, here in TABLE for name in re.findall(r"`([^`]+)`", there)}
    for name, meant in OLD_NAMES.items():
        if meant.startswith("method.") or meant.partition(".")[0] in ("model", "optim", "dataset", "finetune"):
            assert f"`{meant.split()[0]}`" in said[name], name
        assert name in said
