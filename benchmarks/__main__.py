"""All speed benchmarks one after the other, then the tables: what `make bench` runs.

    python -m benchmarks [--quick] [--minutes 20]

Run it alone on the machine: anything else that runs is measured too. About `--minutes` on two cores, less on a GPU.
"""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness
from pipeline.paths import REPOSITORY

STEPS_SHARE = 0.6
"""The steps' share of the minutes; epochs, overhead and start take about seven minutes on two cores."""


def run(module: str, *arguments: str) -> bool:
    """Run a benchmark in its own process; return whether it succeeded."""
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
