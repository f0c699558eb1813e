"""What the site of docs/ has beside its pages: a hook of mkdocs (mkdocs.yml), which writes nothing to disk.

The README is the front page. Keys, methods, steps and the files of conf/ are read from the schema and the folders, as
`--help` reads them. Files elsewhere in the repository that a page links to lie below `repository/`, so that the same
links work here and on a code host.
"""

import importlib
import inspect
import posixpath
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from pipeline.compose.groups import CONF, names
from pipeline.compose.help import Key, _keys, _of_method
from pipeline.config import Config, MethodConfig, methods
from pipeline.config.words import expects, is_text, written
from pipeline.reporting.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
"""The target of a relative link or picture, without its anchor."""
FOLDERS = {"experiment": "cfg", "dataset": "dataset", "table": "table", "sweep": "sweep", "cluster": "cluster"} | {
    "promotion": "gate", "model/teacher": "model/teacher", "model/student": "model/student", "optim": "optim",
}  # fmt: skip
"""Folders of conf/ beside the methods', and how their files are named on the command line."""
MADE = "Made from the code when the site is built; on the command line,"


def comment(file: Path) -> str:
    """The comment at the head of a YAML file."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# @")]
    return " ".join(line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines))


def text(words: str) -> str:
    """Words that stand for themselves in Markdown and in the cell of a table."""
    return words if words.startswith("`") else words.replace("<", "&lt;").replace("|", r"\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown(head, [[text(cell) for cell in row] for row in rows], len(head)) if rows else ""


def key_table(keys: Sequence[Key], value: str = "default") -> str:
    head = ("key", value, "takes", "what it does")
    takes = ("text" if is_text(key.field) else expects(key.field) for key in keys)
    return table(head, [(f"`{k.name}`", f"`{written(k.value)}`", t, k.words) for k, t in zip(keys, takes, strict=True)])


def keys() -> Iterator[str]:
    yield f"# Keys\n\n{MADE} `--help all`. What a method adds to the keys of `method`: [methods](methods.md)."
    shared = [f"method.{name}" for name in MethodConfig.model_fields]
    every = [key for key in _keys(Config()) if not key.name.startswith("method.") or key.name in shared]
    sections = {key.name: key.words for key in every if key.field is None and "." not in key.name}
    for section, words in {"top level": "", **sections}.items():
        rows = [k for k in every if k.field is not None and k.name.split(".")[:-1][:1] == [section] * bool(words)]
        yield f"## {section}\n\n{words}\n\n{key_table(rows)}"


def all_methods() -> Iterator[str]:
    yield f"# Methods\n\n{MADE} `--help method=<name>`. What each computes: [the methods](../methods.md).\n"
    yield "Values are those of `conf/method/<name>.yaml`. Keys that all methods share: [method](keys.md#method)."
    base = {key.name: key.value for key in _keys(Config().model_copy(update={"method": MethodConfig(name="")}))}
    for name in names("method"):
        config = _of_method(name)
        rows = [key for key in _keys(config) if key.name.startswith(("method.", "continual.")) and key.field]
        rows = [key for key in rows if key.name != "method.name" and key.value != base.get(key.name, ...)]
        words = inspect.getdoc(type(config.method)) if name in methods.names() else f"`{config.method.name}` with:"
        about = text(comment(CONF / "method" / f"{name}.yaml"))
        yield f"## {name}\n\n{words}\n\n{about}\n\n{key_table(rows, 'value')}"


def steps() -> Iterator[str]:
    yield f"# Steps\n\n{MADE} `python -m steps.<step> --help`."
    for file in sorted((ROOT / "steps").glob("[!_]*.py")):
        module = importlib.import_module(f"steps.{file.stem}")
        lines = [line.strip() for line in inspect.cleandoc(module.__doc__ or "").splitlines()]
        commands = [line for line in lines if line.startswith("python ")]
        block = ["```bash", *commands, "```"] if commands else []
        said = "\n".join([*(text(line) for line in lines if line not in commands), "", *block])
        own = module.STEP.own if hasattr(module, "STEP") else {}
        rows = [(f"`{key}{'…' * key.endswith('.')}`", words) for key, words in own.items()]
        yield f"## {file.stem}\n\n{said}\n\n{table(('key of the step', 'what it does'), rows)}"


def files_of_conf() -> Iterator[str]:
    yield "# Files of conf/\n\nMade from the files' comments when the site is built."
    for folder, word in FOLDERS.items():
        rows = [(f"`{word}={name}`", comment(CONF / folder / f"{name}.yaml")) for name in names(folder)]
        yield f"## {word}\n\n{table(('', ''), rows)}"


PAGES = {"keys": keys, "methods": all_methods, "steps": steps, "files": files_of_conf}


def place(path: str) -> str:
    """Where the site has a file of the repository."""
    inside = path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
    return "index.md" if path == "README.md" else inside


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Add the pages that are made, and the files that pages link to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content="\n\n".join(page())))
    left = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages() if not file.generated_by)]
    seen = set(left[1:])
    while left:
        path = left.pop()
        if path not in seen and not path.startswith("docs/") and (ROOT / path).is_file():
            there, hidden_too = place(path), InclusionLevel.INCLUDED
            files.append(File.generated(config, there, abs_src_path=str(ROOT / path), inclusion=hidden_too))
        elif path not in seen or not path.endswith(".md"):
            continue
        seen.add(path)
        found = LINK.findall((ROOT / path).read_text()) if path.endswith(".md") else []
        paths = {posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) for target in found}
        left += paths - seen


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Lead links to where the site has their files."""
    here = page.file.src_uri
    source = here.removeprefix("repository/") if here.startswith("repository/") else f"docs/{here}"
    folder = "" if here == "index.md" else posixpath.dirname(source)

    def there(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[0]))
        return posixpath.relpath(place(path), posixpath.dirname(here) or ".")

    return LINK.sub(there, markdown)
