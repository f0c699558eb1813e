"""The benchmarks' tables and picture, from their results, between the markers of benchmarks/README.md.

    python -m benchmarks.render [--kinds cpu gpu] [--readme benchmarks/README.md]

What is written by hand outside the markers stays.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import kinds

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- results: written by python -m benchmarks.render -->", "<!-- end of results -->"
PICTURE = "speed.png"
TARGET = 0.9
"""Of ours against the limit (issue 6)."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, empty without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread_text(found: dict[str, Any], digits: int) -> str:
    """Median, and the range in brackets."""
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f}–{found['max']:.{digits}f})"


def about(result: dict[str, Any]) -> str:
    """What was measured on, in one line."""
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
    """Images per second and ratios of all cases."""
    rows = []
    for case in result["cases"]:
        for which, step in case["steps"].items():
            speed = {name: spread_text(found, 0) for name, found in step["images_per_second"].items()}
            row = [f"{case['pair']}, {case['batch']}", case["precision"], which.upper()]
            row += [f"{speed['limit']} {step['limit_kind']}", speed["ours"], speed.get("plain", "–")]
            row += [spread_text(step["ours_to_limit"], 2)]
            row += [spread_text(step["ours_to_plain"], 2) if "ours_to_plain" in step else "–"]
            row += [" / ".join(f"{100 * share:.0f} %" for share in step["ours_uses"].values())]
            rows.append(row)
    rates = result["rates"]
    text = table(
        [
            "pair, batch",
            "precision",
            "step",
            "limit, images/s",
            "ours",
            "plain",
            "ours / limit",
            "ours / plain",
            "uses",
        ],
        rows,
    )
    return (
        f"{text}\nMedian and range of {result['rounds']} rounds. «uses»: shares of what was measured here, "
        f"{rates['dense_fp32_tflops']:g} (fp32) and {rates['dense_bf16_tflops']:g} (bf16) TFLOP/s in dense operations "
        f"and {rates['copy_gb_per_second']:g} GB/s in copies, the latter as if every layer were a pass over memory of "
        "its own.\n" + across(result["cases"])
    )


def across(cases: Sequence[dict[str, Any]]) -> str:
    """Ours in bf16 against plain in fp32, where both were measured."""
    by = {(case["pair"], case["batch"], case["precision"]): case["steps"] for case in cases}
    lines = []
    for (pair, batch, precision), mine in by.items():
        plain = by.get((pair, batch, "fp32"))
        if precision != "bf16" or plain is None:
            continue
        for which in mine:
            speeds = mine[which]["images_per_second"], plain[which]["images_per_second"]
            if "plain" in speeds[1]:
                ratio = speeds[0]["ours"]["median"] / speeds[1]["plain"]["median"]
                lines.append(f"{pair}, {batch}, {which.upper()}-step {ratio:.2f} ×")
    return f"\nOurs in bf16 against plain in fp32: {'; '.join(lines)}.\n" if lines else ""


def epochs(result: dict[str, Any]) -> str:
    """Cost of an epoch against its images."""
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
    """What goes on beside training."""
    parts = ("training", "evaluation", "checkpoint_and_journal", "checkpoint_writer", "tracking")
    rows, after = [], []
    for which, epoch in result["epochs"].items():
        taken = [epoch.get(f"{part}_seconds") for part in parts]  # before it had a thread the writer was not apart
        row = [f"{which.upper()}-epoch", *("–" if seconds is None else f"{seconds:.2f}" for seconds in taken)]
        rows.append([*row, f"{100 * epoch['share_of_epoch']:.2f} %"])
        after.append(epoch.get("checkpoint_written_after_seconds", 0.0))
    once = result["teachers_on_validation_once_seconds"]
    columns = ("training", "evaluation", "checkpoint, journal", "checkpoint's writer", "tracking")
    head = ["50,000 images", *(f"{column}, s" for column in columns), "beside training"]
    written = f" A checkpoint is on disk {max(after):g} s after it was begun." if any(after) else ""
    return f"{table(head, rows)}\nOnce per run: the teachers on the validation images, {once:g} s.{written}\n"


def startup(result: dict[str, Any]) -> str:
    """How long people wait."""
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


def text(wanted: Sequence[str], folder: Path = kinds.RESULTS) -> str:
    """All tables of the wanted kinds of machine."""
    found = []
    for kind in wanted:
        for name, heading, make in PARTS:
            result = kinds.read(name, kind, folder)
            if result is not None:
                found.append(f"### {HEADINGS[kind]}: {heading}\n\n{about(result)}\n\n{make(result)}")
    return "\n".join(found)


def picture(wanted: Sequence[str], path: Path, folder: Path = kinds.RESULTS) -> bool:
    """Bars of ours against the limit for all steps; False where nothing was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = []
    for kind in wanted:
        result = kinds.read("steps", kind, folder) or {"cases": []}
        for case in result["cases"]:
            for which, step in case["steps"].items():
                name = f"{case['pair']}\n{case['precision']}, batch {case['batch']}, {which.upper()}-step, {kind}"
                plain = step["images_per_second"].get("plain", {}).get("median")
                limit = step["images_per_second"]["limit"]["median"]
                bars.append((name, step["ours_to_limit"], None if plain is None else plain / limit, case["precision"]))
    if not bars:
        return False
    bars.reverse()
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.42 * len(bars)), layout="constrained")
    colours = {"fp32": "#4477aa", "bf16": "#228833"}
    for at, (_, found, plain, precision) in enumerate(bars):
        error = [[found["median"] - found["min"]], [found["max"] - found["median"]]]
        axes.barh(at, found["median"], xerr=error, color=colours[precision], height=0.62, ecolor="#222222", capsize=2)
        if plain is not None:
            axes.plot([plain], [at], marker="D", color="#cc6677", linestyle="none", markersize=6, zorder=3)
    axes.axvline(TARGET, color="#222222", linestyle="--", linewidth=1)
    axes.axvline(1.0, color="#222222", linewidth=1)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=7)
    axes.set_xlabel("images/s relative to the limit: bars ours (median, range), diamonds plain; dashed: the target")
    axes.set_xlim(left=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def placed(readme: str, results: str) -> str:
    """The page with the results between its markers (at its end, where it has none yet)."""
    block = f"{BEGIN}\n\n{results.strip()}\n\n{END}"
    if BEGIN not in readme or END not in readme:
        return f"{readme.rstrip()}\n\n{block}\n" if readme.strip() else f"{block}\n"
    before, _, rest = readme.partition(BEGIN)
    return before + block + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=HEADINGS, default=["cpu", "gpu"])
    parser.add_argument("--results", type=Path, default=kinds.RESULTS)
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    options = parser.parse_args()
    results = text(options.kinds, options.results)
    if picture(options.kinds, options.readme.parent / PICTURE, options.results):
        results = f"![ours and plain against the limit]({PICTURE})\n\n{results}"
    before = options.readme.read_text() if options.readme.exists() else ""
    options.readme.write_text(placed(before, results))
    print(results)


if __name__ == "__main__":
    main()
