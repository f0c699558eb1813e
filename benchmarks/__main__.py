"""All speed benchmarks one after the other, then the tables: what `make bench` runs.

    python -m benchmarks [--quick] [--minutes 20]

Alone on the machine: whatever else runs is measured with it. About `--minutes` on two cores, less on a GPU.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import kinds

ROOT = Path(__file__).resolve().parents[1]
STEPS_SHARE = 0.6
"""Of the minutes that the steps get; epochs, overhead and start take about seven minutes on two cores."""


def run(module: str, *arguments: str) -> bool:
    """Run a benchmark as a process of its own; whether it came to its end."""
    begun = time.perf_counter()
    print(f"\n== {module}", flush=True)
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *arguments], cwd=ROOT, check=False)
    print(f"== {module}: {time.perf_counter() - begun:.0f} s", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny rounds of one pair: shows that all of it works")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--root", type=Path, default=Path(os.environ.get("CIFAR_ROOT", "data")))
    parser.add_argument("--readme", type=Path, help="default: benchmarks/README.md; with --quick none is written")
    options = parser.parse_args()
    quick = ["--quick"] * options.quick
    data = ["--root", str(options.root)]
    few = ["--pairs", "resnet56-resnet20", "--precisions", "fp32"] if options.quick else []
    done = [
        run("startup", *quick, *data),
        run("overhead", *quick, *data),
        run("epochs", *quick),
        run("steps", *quick, *data, *few, "--minutes", str(STEPS_SHARE * options.minutes)),
    ]
    if options.readme or not options.quick:
        wanted = [kinds.kind(kinds.device(), True)] if options.quick else ["cpu", "gpu"]
        done.append(run("render", "--kinds", *wanted, *(["--readme", str(options.readme)] if options.readme else [])))
    sys.exit(0 if all(done) else 1)


if __name__ == "__main__":
    main()
