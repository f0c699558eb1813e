"""Seeded mutants: how many of thirty small faults do the tests notice?

    OMP_NUM_THREADS=1 python tools/mutants.py [--count 30] [--first 1] [--seed 0] [--only losses,gate]

Each mutant is one flipped comparison, exchanged operator, changed constant or negated condition in a file of PLACES,
tested in a copy of the repository by the tests beside it, up to the first that fails. Forked processes have imported
the large libraries already. A survivor needs a test, or a reason why none can tell.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ASIB, JOURNAL = "training/methods/asib", "journal/test_journal.py"
PLACES = {
    "training/losses.py": ["training/test_losses.py"],
    f"{ASIB}/schedules.py": [f"{ASIB}/test_schedules.py", f"{ASIB}/test_task.py"],
    f"{ASIB}/targets.py": [f"{ASIB}/test_targets.py", f"{ASIB}/test_b_step.py"],
    f"{ASIB}/b_step.py": [f"{ASIB}/test_b_step.py"],
    f"{ASIB}/a_step.py": [f"{ASIB}/test_a_step.py"],
    "reporting/statistics.py": ["reporting/test_statistics.py"],
    "promote/spending.py": ["promote/test_spending.py"],
    "promote/gate.py": ["promote/test_gate.py"],
    "promote/decision.py": ["promote/test_decision.py"],
    "sweep/study/claim.py": ["sweep/study/test_study.py", "sweep/study/test_samplers.py"],
    "journal/entries.py": [JOURNAL],
    "journal/writer.py": [JOURNAL],
}
"""File of pipeline/ -> its tests in tests/pipeline/."""
LARGE = ("hypothesis", "mlflow", "optuna", "pandas", "timm", "torch")
"""Imported once; nothing of this repository, which each process imports from the copy."""
EQUIVALENT = {"deepcopy": "a copy of trials equals them", "strict": "lengths that are checked before"}
"""Arguments that no test can tell apart, and why; they are not changed."""
NOT_RUN = (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED)
LIMIT_S = 180
COPIED = ("models", "pipeline", "steps", "conf", "tests", "docs", "pyproject.toml")
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
}  # fmt: skip


def sites(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(index in `ast.walk`, kind) of everything that can be changed; text, types and messages of errors stay."""
    spared = {
        id(part)
        for node in ast.walk(tree)
        for root in (
            [node]
            if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom)
            or (isinstance(node, ast.keyword) and node.arg in EQUIVALENT)
            else [getattr(node, "annotation", None), getattr(node, "returns", None)]
        )
        if root is not None
        for part in ast.walk(root)
    }
    for index, node in enumerate(ast.walk(tree)):
        if id(node) in spared:
            continue
        match node:
            case ast.Compare(ops=[op]) | ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
                yield index, "operator"
            case ast.Constant(value=bool() | int() | float()):
                yield index, "constant"
            case ast.If() | ast.IfExp() | ast.While():
                yield index, "condition"


def mutate(tree: ast.AST, index: int, kind: str) -> tuple[str, str]:
    """Change one node in place; the expression before and after."""
    node = list(ast.walk(tree))[index]
    assert isinstance(node, ast.expr | ast.stmt)
    shown = node.test if isinstance(node, ast.If | ast.While) else node
    before = ast.unparse(shown)
    match node:
        case ast.Compare():
            node.ops = [SWAPS[type(node.ops[0])]()]  # type: ignore[list-item]
        case ast.BinOp() | ast.BoolOp():
            node.op = SWAPS[type(node.op)]()  # type: ignore[assignment]
        case ast.Constant(value=bool(value)):
            node.value = not value
        case ast.Constant(value=int() | float() as number):
            node.value = number + 1
        case ast.If() | ast.IfExp() | ast.While():
            node.test = shown = ast.UnaryOp(ast.Not(), copy.deepcopy(node.test))
    return before, ast.unparse(shown)


def run_tests(folder: Path, tests: list[str]) -> None:
    """Run tests of the copy in this forked process, which leaves with pytest's exit code."""
    os.setsid()
    os.chdir(folder)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    words = ["-x", "-n0", "-pno:cacheprovider", f"--rootdir={folder}", "-m", "not slow and not gpu and not postgres"]
    sys.exit(pytest.main([*words, *(f"tests/pipeline/{test}" for test in tests)]))


def verdict(folder: Path, tests: list[str], seconds: float | None) -> str:
    """`killed` by a test, by the time limit, or `SURVIVED`."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, tests))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.ident or 0, signal.SIGKILL)
        process.join()
        return "killed (too slow)"
    if process.exitcode in NOT_RUN:
        sys.exit(f"pytest could not run {tests}: exit code {process.exitcode}")
    return "killed" if process.exitcode else "SURVIVED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--first", type=int, default=1, help="number of the first mutant, to continue")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="parts of paths, separated by commas")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    places = [place for place in PLACES if any(part in place for part in given.only.split(","))]
    found = []
    for name in LARGE:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as temporary:
        copied = Path(temporary) / "repository"
        copied.mkdir()
        for name in COPIED:
            where = ROOT / name
            shutil.copytree(where, copied / name) if where.is_dir() else shutil.copy2(where, copied / name)
        unchanged = verdict(copied, sorted({test for place in places for test in PLACES[place]}), None)
        if unchanged != "SURVIVED":
            sys.exit("the tests fail before anything is changed: nothing can be learned from mutants")
        sys.dont_write_bytecode = True  # what is not changed has been compiled
        for number in range(1, given.count + 1):
            place = places[(number - 1) % len(places)]
            original = (ROOT / "pipeline" / place).read_text()
            tree = ast.parse(original)
            index, kind = draw.choice(list(sites(tree)))
            if number < given.first:
                continue
            line = list(ast.walk(tree))[index].lineno  # type: ignore[attr-defined]
            before, after = mutate(tree, index, kind)
            target = copied / "pipeline" / place
            target.write_text(ast.unparse(tree))
            begun = time.monotonic()
            found.append(verdict(copied, PLACES[place], LIMIT_S))
            target.write_text(original)
            taken = f"{time.monotonic() - begun:.0f} s"
            print(f"{number:3} {found[-1]:9} {taken:>5}  pipeline/{place}:{line}: {before}  ->  {after}", flush=True)
    survived = found.count("SURVIVED")
    print(f"{len(found) - survived} of {len(found)} mutants killed, {survived} survived")


if __name__ == "__main__":
    main()
