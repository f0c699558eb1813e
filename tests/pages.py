"""What the pages tell their readers to type."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = sorted(["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("**/*.md"))])
"""Pages whose every command is tested, or marked."""
_BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n+)?^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STEP = re.compile(r"(?:python|torchrun\b[^|;&]*?) -m steps\.(\w+)")


class Block(NamedTuple):
    """Commands between ```bash and ```; `not_run`: why no test runs them, empty where one does."""

    text: str
    not_run: str = ""


class Command(NamedTuple):
    """A command: variables set before it, the step that it starts (none: another program), and its arguments."""

    line: str
    variables: dict[str, str]
    step: str
    arguments: list[str]


def blocks(page: str) -> list[Block]:
    return [Block(text, why) for why, text in _BLOCK.findall((ROOT / page).read_text())]


def commands(text: str) -> Iterator[Command]:
    """The commands of a block, a line each."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        words = words[: next((k for k, word in enumerate(words) if re.match(r"\d?>|[|&]$", word)), len(words))]
        count = next((k for k, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
        variables, words = dict(word.split("=", 1) for word in words[:count]), words[count:]
        step, arguments = "", words
        if words[:3] == ["mlflow", "run", "."]:
            pairs = list(zip(words[3::2], words[4::2], strict=True))
            (step,) = (value for flag, value in pairs if flag == "-e")
            arguments = [value for flag, value in pairs if flag == "-P"]
        elif found := re.match(_STEP, " ".join(words)):
            step, arguments = found[1], words[words.index(f"steps.{found[1]}") + 1 :]
        yield Command(" ".join(line.split()), variables, step, arguments)
