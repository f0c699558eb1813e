"""The pages of docs/, and the docstrings of pipeline/, name files and functions that exist, and what those say."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.config import Config, MethodConfig, methods

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("pipeline", "models", "steps")
NOT_MODULES = {*Config.model_fields, "asib"}
"""Sections of the configuration and the prefix of our tags, which some modules are called too."""
SUFFIXES = ("bin", "html", "json", "parquet", "py", "safetensors")


def cited(page: str) -> Iterator[tuple[str, str]]:
    """(file, name) of a page's `Code:` paragraphs; the name is empty where the file alone is cited."""
    for paragraph in re.findall(r"^Code: (.*?)(?:\n\n|\Z)", page, re.MULTILINE | re.DOTALL):
        for part in paragraph.rstrip(".").split(";"):
            path, *names = re.findall(r"`([^`]+)`", part)
            yield from ((path, name) for name in names or [""])


@functools.cache
def module(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def defined(path: Path) -> set[str]:
    """Names that a file defines: functions, classes with their methods as `Class.method`, constants."""
    found = set()
    for node in module(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("page", ["method.md", "architecture.md", "data.md"])
def test_the_code_that_a_page_cites_is_there(page: str) -> None:
    found = list(cited((ROOT / "docs" / page).read_text()))
    assert len(found) > 6
    missing = []
    for path, name in found:
        file = ROOT / path if path.startswith(("models/", "steps/", "pipeline/")) else ROOT / "pipeline" / path
        if not file.exists() or (name and name not in defined(file)):
            missing.append(f"{path}: {name}")
    assert missing == []


def owners() -> dict[str, set[str]]:
    """Folders, modules and classes by their names, each with what lies in it; namesakes share an entry."""
    found: dict[str, set[str]] = {}
    for file in (file for room in ROOMS for file in (ROOT / room).rglob("*.py")):
        found.setdefault(file.parent.name, set()).add(file.stem)
        found.setdefault(file.parent.parent.name, set()).add(file.parent.name)
        found.setdefault(file.stem, set()).update(defined(file))
        for made in (node for node in ast.walk(module(file)) if isinstance(node, ast.ClassDef)):
            inside = found.setdefault(made.name, set())
            for node in ast.walk(made):
                if isinstance(node, ast.FunctionDef):
                    inside.add(node.name)
                elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                    inside.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def dotted(file: Path) -> Iterator[str]:
    """What docstrings of a file name: `module.name`, `Class.name`, or a path from `pipeline` on."""
    if not re.search(r"`\w+\.", file.read_text()):
        return
    for node in ast.walk(module(file)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for name in re.findall(r"`([A-Za-z_]+(?:\.\w+)+)(?:\([^`]*\))?`", node.value.value):
                first, *rest = name.split(".")
                if first in ROOMS or (len(rest) == 1 and first not in NOT_MODULES and rest[0] not in SUFFIXES):
                    yield name


def test_what_a_docstring_names_is_there() -> None:
    known, missing, checked = owners(), [], 0
    for file in sorted((ROOT / "pipeline").rglob("*.py")):
        for name in dotted(file):
            *_, owner, member = name.split(".")
            ours = owner in known
            checked += ours
            # a module that is gone is noticed by its class
            if (ours and member not in known[owner]) or (not ours and owner.islower() and member[0].isupper()):
                missing.append(f"{file.relative_to(ROOT)}: {name}")
    assert missing == []
    assert checked > 30


def rows(section: str) -> dict[str, list[str]]:
    """The tables of a section of docs/methods.md: first cell -> the other cells; each stands there once."""
    text = re.split(r"^## ", (ROOT / "docs" / "methods.md").read_text(), flags=re.MULTILINE)
    (body,) = (part for part in text if part.startswith(section))
    lines = [line.strip("|").split("|") for line in re.findall(r"^\| `.*\|$", body, re.MULTILINE)]
    found = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    assert len(found) == len(lines)
    return found


def needs(method: type[MethodConfig]) -> str:
    fewest, most = method.teachers
    if not method.from_teachers:
        return "its past, sample" if method.past else "kept images, sample" if method.replays else "0"
    teachers = str(fewest) if most == fewest else "0 or more" if fewest == 0 else "≥ 1"
    bank = "maps" if method.maps else "bank unless teachers are trained" if method is type(Config().method) else "bank"
    return f"{teachers}, {bank}, {'sample' if method.per_sample else 'batch'}"


def test_the_page_of_methods_has_each_of_them_as_its_settings_say() -> None:
    said = {name.strip("`"): cells[2].partition(";")[0] for name, cells in rows("All methods").items()}
    assert said == {name: needs(methods.settings(name)) for name in methods.names()}


def test_the_page_of_methods_states_the_published_numbers() -> None:
    published: dict[str, float] = {}
    for block in yaml.safe_load((ROOT / "conf" / "published.yaml").read_text()):
        for name, values in block["values"].items():
            value = dict(zip(block["pairs"], values, strict=True)).get("resnet32x4-resnet8x4")
            if value is not None:
                published.setdefault(name, value[0] if isinstance(value, list) else value)
    page = (ROOT / "docs" / "methods.md").read_text()
    assert f"(the student alone: {published['alone']:.2f})" in page
    one_teacher = {n.strip("`"): cells[3] for n, cells in rows("All methods").items() if cells[2].startswith("1,")}
    said = {name: float(cell.split()[0]) for name, cell in one_teacher.items() if cell != "–"}
    assert said == {name: published[name] for name in one_teacher if name in published}


def test_the_page_of_methods_has_the_errors_of_all_of_them() -> None:
    measured = {re.split(r"[`, ]+", name)[1] for name in rows("Errors")}
    assert measured == {*methods.names(), "standardise"} - {"asib", "finetune"}
