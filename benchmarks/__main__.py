"""All speed benchmarks one after the other, then the tables: what `make bench` runs.

    python -m benchmarks [--quick] [--minutes 20]

Alone on the machine: whatever else runs is measured with it. About `--minutes` on two cores, less on a GPU.
"""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness
from pipeline.paths import REPOSITORY

STEPS_SHARE = 0.6
"""Of the minutes that the steps get; epochs, overhead and start take about seven minutes on two cores."""


def run(module: str, *arguments: str) -> bool:
    """Run a benchmark as a process of its own; whether it came to its end."""
    begun = time.perf_counter()
    print(f"\n== {module}", flush=True)
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *arguments], cwd=REPOSITORY, check=False)
    print(f"== {module}: {time.perf_counter() - begun:.0f} s", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = harness.parser(__doc__, "quick", "root")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--readme", type=Path, help="default: benchmarks/README.md; with --quick none is written")
    options = parser.parse_args()
    quick, root = ["--quick"] * options.quick, ["--root", str(options.root)]
    few = ["--pairs", "resnet56-resnet20", "--precisions", "fp32"] if options.quick else []
    done = [
        run("startup", *quick, *root),
        run("overhead", *quick, *root),
        run("epochs", *quick),
        run("steps", *quick, *root, *few, "--minutes", str(STEPS_SHARE * options.minutes)),
    ]
    if options.readme or not options.quick:
        kinds = ["quick"] if options.quick else ["cpu", "gpu"]
        done.append(run("render", "--kinds", *kinds, *(["--readme", str(options.readme)] if options.readme else [])))
    sys.exit(0 if all(done) else 1)


if __name__ == "__main__":
    main()
