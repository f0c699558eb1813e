"""Images per second of A- and B-steps: the bare networks, the real loop, the research documents' loop.

    python -m benchmarks.steps [--quick] [--minutes 12] [--rounds 3] [--pairs …] [--precisions fp32 bf16] [--compile]

Writes benchmarks/results/steps_<processor or card>.json.
"""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import described
from benchmarks.steps import card
from benchmarks.steps.cases import PAIRS, Case, cases, real_images
from benchmarks.steps.measure import Effort, measure

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHARE = 0.6
"""Of a case's time that is left for its rounds: networks, trials of the limit and MLflow's start take the rest."""
WEIGHTS = {"fp32": 1.5, "bf16": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds of one batch: shows that it works, no numbers")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all cases together, about")
    parser.add_argument("--rounds", type=int, help="default: 3, on a GPU 5")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--no-large", action="store_true", help="leave out the two-teacher pair at batch 256")
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain loop")
    parser.add_argument("--compile", action="store_true", help="try a compiled limit on the processor too")
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of ours' configuration")
    parser.add_argument("--root", type=Path, default=Path(os.environ.get("CIFAR_ROOT", "data")))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.getLogger("asib").setLevel(logging.WARNING)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    # the large batch takes minutes on a processor: there in bf16 alone
    large = [p for p in options.precisions if p == "bf16" or device.type == "cuda"]
    large = [] if options.no_large or options.quick else large
    todo = cases(options.pairs, options.precisions, options.batch, large)
    result = run(todo, options, device)
    kind = "quick" if options.quick else "gpu" if device.type == "cuda" else "cpu"
    output: Path = options.output or RESULTS / f"steps_{kind}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(output)


def run(todo: list[Case], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All cases, and what they were measured on and with."""
    data = real_images(options.root)
    machine = card.rates(device)
    rounds = options.rounds or (2 if options.quick else 5 if device.type == "cuda" else 3)
    result: dict[str, Any] = {
        **described("timm", "torchvision", "numpy"),
        "quick": options.quick,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "images": data.name,
        "rounds": rounds,
        "overrides": options.ours,
        "rates": machine,
        "cases": [],
    }
    for case in todo:
        effort = Effort(
            rounds=rounds,
            seconds=0.0 if options.quick else SHARE * 60 * options.minutes * _weight(case) / sum(map(_weight, todo)),
            compile=options.compile,
            plain=not options.no_plain,
            ours=tuple(options.ours),
        )
        found = measure(case, data, device, effort, machine)
        result["cases"].append(found)
        for which, step in found["steps"].items():
            print(line(case, which, step), flush=True)
    result["load_after"] = round(os.getloadavg()[0], 2)
    return result


def _weight(case: Case) -> float:
    """How much of the time a case gets: slower ones more, so that all have rounds of more than a batch or two."""
    slow = 3.0 if "resnet50" in case.pair.name else 1.5 if case.batch > 64 else 1.0
    return slow * WEIGHTS[case.precision]


def line(case: Case, which: str, step: dict[str, Any]) -> str:
    """For people who wait."""
    speeds = "  ".join(f"{name} {found['median']:8.1f}" for name, found in step["images_per_second"].items())
    to_plain = f"  {step['ours_to_plain']['median']:.2f} × plain" if "ours_to_plain" in step else ""
    return f"{case.name:48s} {which}  {speeds}  images/s  {step['ours_to_limit']['median']:.2f} × limit{to_plain}"


if __name__ == "__main__":
    main()
