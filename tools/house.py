"""How the house stands: lines per room, circles, arrows upward. `python tools/house.py`, from the repository's root.

A room is a folder or file directly below pipeline/; models and steps are rooms too. The floors are those of the import
contract in pyproject.toml, which `lint-imports` enforces; this prints them with what lies on each.
"""

import re
import sys
import tomllib
from collections import Counter, defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ("models", "pipeline", "steps")
MOST = 0.20
"""The largest share of all lines that one room may have."""


def room(module: str) -> str:
    """`pipeline.sweep.study.claim` -> `sweep`; `models.zoo` -> `models`."""
    first, *rest = module.split(".")
    return rest[0] if first == "pipeline" and rest else first


def lines_per_room() -> Counter[str]:
    """Lines of Python."""
    found: Counter[str] = Counter()
    for top in ROOTS:
        for file in (ROOT / top).rglob("*.py"):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[room(module)] += len(file.read_text(encoding="utf-8").splitlines())
    return +found


def floors() -> list[list[str]]:
    """Rooms by floor, the highest first, as the contract lists them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c.get("containers") == ["pipeline"])
    return [["steps"], *(re.split(r" *[:|] *", layer) for layer in layers)]


def circle(imports: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, [] where it has none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def main() -> int:
    """0 for a house without circles, arrows upward and rooms that are too large."""
    sys.path.insert(0, str(ROOT))
    graph = grimp.build_graph(*ROOTS)
    modules = {m: set(graph.find_modules_directly_imported_by(m)) for m in sorted(graph.modules)}
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, imported in modules.items():
        rooms[room(module)] |= {room(other) for other in imported} - {room(module)}
    level = {name: height for height, floor in enumerate(floors()) for name in floor}
    upward = [
        f"{module} -> {other}"
        for module, imported in modules.items()
        for other in sorted(imported)
        if level.get(room(module), -1) > level.get(room(other), 99)
    ]
    lines = lines_per_room()
    total = lines.total()
    for floor in floors():
        print("   ".join(f"{name} {lines[name]}" for name in floor))
    print(f"models {lines['models']}")
    (largest, most), *_ = lines.most_common()
    circles = [found for found in (circle(modules), circle(rooms)) if found]
    print(f"\n{total} lines in {len(lines)} rooms; the largest: {largest}, {most / total:.0%}")
    print(f"circles: {len(circles)}", *(" -> ".join(found) for found in circles), sep="\n  ")
    print(f"arrows upward: {len(upward)}", *upward, sep="\n  ")
    return int(bool(circles or upward or most > MOST * total))


if __name__ == "__main__":
    sys.exit(main())
