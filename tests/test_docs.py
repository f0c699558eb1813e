"""The pages of docs/ name files and functions that exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def cited(page: str) -> Iterator[tuple[str, str]]:
    """(file, name) of a page's `Code:` paragraphs; the name is empty where the file alone is cited."""
    for paragraph in re.findall(r"^Code: (.*?)(?:\n\n|\Z)", page, re.MULTILINE | re.DOTALL):
        for part in paragraph.rstrip(".").split(";"):
            path, *names = re.findall(r"`([^`]+)`", part)
            yield from ((path, name) for name in names or [""])


def defined(path: Path) -> set[str]:
    """Names that a file defines: functions, classes with their methods as `Class.method`, constants."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("page", ["method.md", "architecture.md"])
def test_the_code_that_a_page_cites_is_there(page: str) -> None:
    found = list(cited((ROOT / "docs" / page).read_text()))
    assert len(found) > 10
    missing = []
    for path, name in found:
        file = ROOT / path if path.startswith(("models/", "steps/", "pipeline/")) else ROOT / "pipeline" / path
        if not file.exists() or (name and name not in defined(file)):
            missing.append(f"{path}: {name}")
    assert missing == []
