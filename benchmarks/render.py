"""The benchmarks' tables and picture, from their results, between the markers of benchmarks/README.md.

    python -m benchmarks.render [--kinds cpu gpu] [--readme benchmarks/README.md]

What is written by hand outside the markers stays.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from pipeline.reporting import figures, tables

PAGE = Path(__file__).resolve().parent / "README.md"
BEGIN, END = "<!-- results: written by python -m benchmarks.render -->", "<!-- end of results -->"
PICTURE = "speed.png"
TARGET = 0.95
"""The targeted ratio of ours to the limit."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns flush left."""
    return tables.markdown(head, rows, left=len(head)) + "\n"


def read(name: str, kind: str, folder: Path) -> dict[str, Any] | None:
    """A benchmark's result on a kind of machine; None if it was not measured."""
    path = folder / f"{name}_{kind}.json"
    return json.loads(path.read_text()) if path.exists() else None


def spread_text(found: dict[str, Any], digits: int) -> str:
    """Median, and the range in brackets."""
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f}–{found['max']:.{digits}f})"


def about(result: dict[str, Any]) -> str:
    """The machine and versions of a result, in one line."""
    machine, versions = result["machine"], result["versions"]
    card = result.get("rates", {}).get("name")
    where = f"{machine['cpu']}, {machine['cores']} cores" + (f", {card}" if card not in (None, "processor") else "")
    changed = " (changed)" if result["dirty"] else ""
    return (
        f"{where}; torch {versions['torch']}, mlflow {versions['mlflow']}; commit {result['commit'][:10]}{changed}, "
        f"{result['date'][:10]}; {result.get('threads', '–')} threads, load before "
        f"{machine['load_before']}"
    )


def steps(result: dict[str, Any]) -> str:
    """Images per second and ratios of all cases, and ours in bf16 against plain in fp32."""
    rows, across = [], []
    plain = {
        (case["pair"], case["batch"]): case["steps"]
        for case in result["cases"]
        if case["precision"] == "fp32" and case.get("method", "asib") == "asib"
    }
    for case in result["cases"]:
        name = f"{case['pair']}, {case['batch']}"
        for which, step in case["steps"].items():
            speed = {who: spread_text(found, 0) for who, found in step["images_per_second"].items()}
            row = [case.get("method", "asib"), name, case["precision"], which.upper()]
            row += [f"{speed['limit']} {step['limit_kind']}", speed["ours"], speed.get("plain", "–")]
            row += [spread_text(step[key], 2) if key in step else "–" for key in ("ours_to_limit", "ours_to_plain")]
            rows.append([*row, " / ".join(f"{100 * share:.0f} %" for share in step["ours_uses"].values())])
            other = plain.get((case["pair"], case["batch"]))
            if case["precision"] == "bf16" and other is not None:
                slow = other[which]["images_per_second"]["plain"]["median"]
                ratio = step["images_per_second"]["ours"]["median"] / slow
                across.append(f"{name}, {which.upper()}-step {ratio:.2f} ×")
    rates = result["rates"]
    head = ["method", "pair, batch", "precision", "step", "limit, images/s", "ours", "plain"]
    taken = "" if result.get("clock", "wall") == "wall" else ", in seconds of processor time on a machine in use"
    text = (
        f"{table([*head, 'ours / limit', 'ours / plain', 'uses'], rows)}\n"
        f"Median and range of {result['rounds']} rounds{taken}. «uses»: shares of what was measured here, "
        f"{rates['dense_fp32_tflops']:g} (fp32) and {rates['dense_bf16_tflops']:g} (bf16) TFLOP/s in dense operations "
        f"and {rates['copy_gb_per_second']:g} GB/s in copies, the latter as if every layer were a pass over memory of "
        "its own.\n"
    )
    return text + (f"\nOurs in bf16 against plain in fp32: {'; '.join(across)}.\n" if across else "")


def epochs(result: dict[str, Any]) -> str:
    """Cost of an epoch by its number of images."""
    rows = []
    for epoch in result["epochs"]:
        row = [f"{epoch['images']:,}", spread_text(epoch["seconds"], 2), f"{epoch['images_per_second']:,}"]
        rows.append([*row, f"{epoch['per_image_to_reference']:.3f}"])
    memory = result["memory"]
    text = table(["images", "seconds of an epoch", "images/s", f"per image, to {result['reference']:,}"], rows)
    return (
        f"{text}\nMemory: {memory['peak_above_start_mb']:,.0f} MB at its peak above the process's start, "
        f"{memory['ratio']:.2f} × the {memory['images_mb']:,.0f} MB of images.\n"
    )


def overhead(result: dict[str, Any]) -> str:
    """The costs besides training."""
    parts = {
        "training": "training",
        "evaluation": "evaluation",
        "checkpoint_and_journal": "checkpoint, journal",
        "checkpoint_writer": "checkpoint's writer",
        "tracking": "tracking",
    }
    rows = []
    for which, epoch in result["epochs"].items():
        seconds = [f"{epoch[f'{part}_seconds']:.2f}" for part in parts]
        rows.append([f"{which.upper()}-epoch", *seconds, f"{100 * epoch['share_of_epoch']:.2f} %"])
    head = ["50,000 images", *(f"{words}, s" for words in parts.values()), "beside training"]
    after = max(epoch["checkpoint_written_after_seconds"] for epoch in result["epochs"].values())
    return (
        f"{table(head, rows)}\nOnce per run: the teachers on the validation images, "
        f"{result['teachers_on_validation_once_seconds']:g} s. "
        f"A checkpoint is on disk {after:g} s after it was begun.\n"
    )


def startup(result: dict[str, Any]) -> str:
    """How long users wait."""
    rows = [[what.replace("_", " "), spread_text(seconds, 2)] for what, seconds in result["seconds"].items()]
    first = result["training_first_use_seconds"]
    return f"{table(['', 'seconds'], rows)}\nFirst use of a tracking store: training begins after {first:g} s.\n"


PARTS = (
    ("steps", "Steps", steps),
    ("epochs", "Epoch cost against data-set size", epochs),
    ("overhead", "Evaluation, checkpoints, tracking", overhead),
    ("startup", "Start", startup),
)
HEADINGS = {"cpu": "Processor", "gpu": "GPU", "quick": "Quick run (no numbers)"}


def text(wanted: Sequence[str], folder: Path = harness.RESULTS) -> str:
    """All tables of the wanted kinds of machine."""
    found = []
    for kind in wanted:
        for name, heading, make in PARTS:
            result = read(name, kind, folder)
            if result is not None:
                found.append(f"### {HEADINGS[kind]}: {heading}\n\n{about(result)}\n\n{make(result)}")
    return "\n".join(found)


def picture(wanted: Sequence[str], path: Path, folder: Path) -> bool:
    """Bars of ours against the limit for all steps; False where nothing was measured."""
    bars = []
    for kind in wanted:
        for case in (read("steps", kind, folder) or {"cases": []})["cases"]:
            for which, step in case["steps"].items():
                about_it = f"{case['precision']}, batch {case['batch']}, {which.upper()}-step, {kind}"
                name = f"{case.get('method', 'asib')}: {case['pair']}\n{about_it}"
                speed = {who: found["median"] for who, found in step["images_per_second"].items()}
                plain = speed.get("plain", float("nan")) / speed["limit"]
                bars.append((name, step["ours_to_limit"], plain, case["precision"]))
    if not bars:
        return False
    bars.reverse()
    figure, axes = figures.figure(1, 1, 9, 0.9 + 0.42 * len(bars))
    colours = {"fp32": "#4477aa", "bf16": "#228833"}
    for at, (_, found, plain, precision) in enumerate(bars):
        error = [[found["median"] - found["min"]], [found["max"] - found["median"]]]
        axes.barh(at, found["median"], xerr=error, color=colours[precision], height=0.62, ecolor="#222222", capsize=2)
        axes.plot([plain], [at], marker="D", color="#cc6677", linestyle="none", markersize=6, zorder=3)
    axes.axvline(TARGET, color="#222222", linestyle="--", linewidth=1)
    axes.axvline(1.0, color="#222222", linewidth=1)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=7)
    axes.set_xlabel("images/s relative to the limit: bars ours (median, range), diamonds plain; dashed: the target")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    figures.save(figure, path)
    return True


def placed(page: str, results: str, begin: str = BEGIN, end: str = END) -> str:
    """The page with the results between its markers (appended, if it has no markers yet)."""
    block = f"{begin}\n\n{results.strip()}\n\n{end}"
    if begin not in page or end not in page:
        return f"{page.rstrip()}\n\n{block}\n" if page.strip() else f"{block}\n"
    before, _, rest = page.partition(begin)
    return before + block + rest.partition(end)[2]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=HEADINGS, default=["cpu", "gpu"])
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--readme", type=Path, default=PAGE)
    options = parser.parse_args()
    results = text(options.kinds, options.results)
    if picture(options.kinds, options.readme.parent / PICTURE, options.results):
        results = f"![ours and plain against the limit]({PICTURE})\n\n{results}"
    before = options.readme.read_text() if options.readme.exists() else ""
    options.readme.write_text(placed(before, results))
    print(results)


if __name__ == "__main__":
    main()
