"""What a table's nested runs cost beside themselves: from the end of one to the beginning of the next one's training.

    python -m benchmarks.gap [KEY=VALUE …]

`table=quick` on the bundled images in runs of an epoch, tracked to SQLite. Training has begun when the run has stated
its identity, directly before its first batch. Writes benchmarks/results/gap.json.
"""

import json
import tempfile
from itertools import pairwise
from pathlib import Path

from benchmarks import harness
from benchmarks.steps.clock import spread
from pipeline.journal import read_entries

TARGET = 2.0
"""Seconds."""
WORDS = (
    *("table=quick", "seeds=0", "method.student_epochs_per_stage=[1]", "method.num_stages=1"),
    *("schedule.lr_warmup_epochs=0", "method.kd_warmup_epochs=0", "finetune.epochs=1"),
)


def gaps(folder: Path) -> dict[str, float]:
    """Seconds from the end of a run's nested run to the training of the next, by the latter's folder."""
    times = []
    for nested in folder.glob("*/journal.jsonl"):
        entries = read_entries(nested)[0]
        begun = [e.time for e in entries if e.kind == "tags" and "asib.identity" in e.data["values"]]
        times.append((begun[0], entries[-1].time, nested.parent.name))
    return {name: (begun - ended) / 1000 for (_, ended, _), (begun, _, name) in pairwise(sorted(times))}


def main() -> None:
    parser = harness.parser(__doc__, "output")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="more overrides of the table")
    options = parser.parse_args()
    result = harness.described()
    with tempfile.TemporaryDirectory(prefix="asib-gap-", ignore_cleanup_errors=True) as name:
        store = (f"output_dir={name}/runs", f"tracking.uri=sqlite:///{name}/mlflow.db")
        seconds = harness.step("table", *WORDS, *store, *options.words)
        (folder,) = (Path(name) / "runs").glob("*-table-*")
        found = gaps(folder)
    result |= {"words": [*WORDS, *options.words], "seconds": round(seconds, 1), "target_seconds": TARGET, "gaps": found}
    result["spread"] = spread(list(found.values()))
    print(json.dumps({"gaps": found, "seconds": result["seconds"]}, indent=2))
    harness.write("gap", result, options.output)


if __name__ == "__main__":
    main()
