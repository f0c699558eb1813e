"""The records behind docs/results.md and README.md, and their tables and pictures from them.

    python -m benchmarks.evidence collect <folder> [<folder> …]   # finished runs at or below each folder
    python -m benchmarks.evidence render

A record is a JSON file beside this one: configuration, tags (hash, identity, digests), every metric by epoch, which
test images were classified correctly (packed bits), and the machine. Nothing on a page is typed by hand between the
markers `<!-- evidence: <part> -->` and `<!-- end -->`.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import harness
from benchmarks.evidence import report
from benchmarks.render import placed
from pipeline.compare.compare import ACCURACY
from pipeline.paths import REPOSITORY
from pipeline.runs import records
from pipeline.runs.records import Record

FOLDER = Path(__file__).resolve().parent
PAGES = (REPOSITORY / "docs" / "results.md", REPOSITORY / "README.md")
UNNEEDED = ("mlflow.",)
"""Prefixes of tags that only the tracking server's pages use."""


def collect(folder: Path) -> Iterator[Path]:
    """Write a record for every finished training and sweep, and for trials, pruned ones too, at or below a folder."""
    here = {key: value for key, value in harness.described("timm").items() if key in ("machine", "versions")}
    del here["machine"]["load_before"]  # the load of this moment
    for journal in sorted(folder.rglob("journal.jsonl")):
        run = records.from_folder(journal.parent)
        row = run.status == "FINISHED" and (ACCURACY in run.metrics or run.tags.get("asib.step") == "sweep")
        if row or (report.TRIAL in run.tags and run.status in ("FINISHED", "KILLED")):
            yield write(run, here)


def write(run: Record, machine: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write a run's record.

    Its name is its row (a teacher's its run's), epochs, seed, and its identity's beginning; with a sweep its study's,
    and the trial's number.
    """
    values = asdict(run) | machine
    values["tags"] = {key: value for key, value in run.tags.items() if not key.startswith(UNNEEDED)}
    if run.correct is not None:
        values["images"], values["correct"] = len(run.correct), _packed(run.correct)
    path = folder / f"{_name(run)}.json"
    path.write_text(json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n")
    return path


def _name(run: Record) -> str:
    if report.STUDY in run.tags:
        return run.tags[report.STUDY] + (f"-trial{int(run.tags[report.TRIAL]):02}" if report.TRIAL in run.tags else "")
    teacher = run.tags["asib.step"] == "finetune"
    row = f"{run.name.split()[1]}-{run.config['finetune.epochs']}" if teacher else f"{run.label}-{report.epochs(run)}"
    return f"{row}-s{run.seed}-{run.tags['asib.identity'][:8]}"


def _packed(correct: NDArray[np.bool_]) -> str:
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def read(path: Path) -> Record:
    """The run of a record."""
    values = json.loads(path.read_text())
    if values["correct"] is not None:
        packed = np.frombuffer(base64.b64decode(values["correct"]), np.uint8)
        values["correct"] = np.unpackbits(packed, count=values["images"]).astype(bool)
    values["histories"] = {name: [(int(s), float(v)) for s, v in at] for name, at in values["histories"].items()}
    return Record(**{name: values[name] for name in Record.__dataclass_fields__})


def kept() -> tuple[list[Record], list[Record]]:
    """The recorded runs: those of rows, and those that belong to sweeps."""
    runs = [*map(read, sorted(FOLDER.glob("*.json")))]
    rows = [run for run in runs if run.correct is not None and report.STUDY not in run.tags]
    return rows, [run for run in runs if report.STUDY in run.tags]


def rendered(pages: Sequence[str], parts: Mapping[str, str]) -> list[str]:
    """The pages with their parts made anew; ValueError where a part has no place, or two."""
    made = list(pages)
    for name, text in parts.items():
        mark = f"<!-- evidence: {name} -->"
        (at,) = (k for k, page in enumerate(made) for _ in range(page.count(mark)))
        made[at] = placed(made[at], text, mark, "<!-- end -->")
    return made


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("what", choices=("collect", "render"))
    parser.add_argument("folders", nargs="*", type=Path)
    options = parser.parse_args()
    if options.what == "collect":
        for path in (path for folder in options.folders for path in collect(folder)):
            print(path)
        return
    rows, searched = kept()
    texts = rendered([page.read_text() for page in PAGES], report.parts(rows, searched))
    for page, text in zip(PAGES, texts, strict=True):
        page.write_text(text)
    for name, image in report.pictures(rows).items():
        (PAGES[0].parent / name).write_bytes(image)


if __name__ == "__main__":
    main()
