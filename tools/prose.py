"""Phrases that English does without: `python tools/prose.py [file…]`; all tracked files by default.

A page or a comment that uses one is reported with what to write instead; a name that was retired, with its successor.
Spelling is codespell's (pyproject.toml).
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".md", ".yaml", ".toml", ".sh", ".sql")
PHRASES = {
    r"\bso (many|long)\b(?! (that|as)\b)": "the number, or `that many`",
    r"\bgo(es)? on with\b": "continues, resumes",
    r"\bwhat would do\b": "what to do",
    r"(?<!here )\bthere (is|are) none\b": "missing, does not exist, no …",
    r"\bas of (which|what)\b": "say it directly",
    r"\bnothing but\b": "only",
    r"\bbegins? with the (letter|word)\b": "starts with",
}
"""A pattern, and what to write instead."""
RETIRED = {
    r"_shrug\b": "ignore_outage",
    r"def tend\b|\.tend\(": "requeue_stale",
    r"def understand\b|\.understand\(|\bunderstood\(": "parse, as_user_error",
    r"def bury\b|\.bury\(": "mark_dead",
    r"\bforesee\(": "validate_early",
    r"pipeline[./]experiment\b(?!\.tracking|/(tracking|__init__|student_pyfunc))": "its name in docs/architecture.md",
    r"\.\./shared|\b(design|house|recipes)\.md": "docs/",
}
"""Names that the house no longer has."""


def faults(file: Path) -> list[str]:
    """`README.md:12: "go on with": continues` for each place."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        for pattern, instead in (PHRASES | RETIRED).items():
            if match := re.search(pattern, line, re.IGNORECASE if pattern in PHRASES else 0):
                found.append(f'{file.relative_to(ROOT)}:{number}: "{match[0]}": {instead}')
    return found


def main(names: list[str]) -> int:
    """1 with a line for each fault on standard output."""
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    files = [ROOT / name for name in names or tracked if name.endswith(SUFFIXES)]
    found = [line for file in files if file.is_file() and file.name != "prose.py" for line in faults(file.resolve())]
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
