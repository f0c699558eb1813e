"""Images per second of A- and B-steps: the bare networks, the real loop, and ASIB's in the research documents' loop.

    python -m benchmarks.steps [--quick] [--minutes 12] [--rounds 3] [--methods asib kd at crd ca_mkd] [--compile]
                               [--pairs …] [--precisions fp32 bf16]

Writes benchmarks/results/steps_<processor or card>.json.
"""

import logging

from benchmarks import harness
from benchmarks.steps import card
from benchmarks.steps.cases import METHODS, PAIRS, Case, cases, real_images
from benchmarks.steps.clock import CLOCKS, Window
from benchmarks.steps.measure import measure

SHARE = 0.6
"""The rounds' share of a case's time: networks, trials of the limit and MLflow's start take the rest."""
WEIGHTS = {"fp32": 1.5, "bf16": 1.0}


def main() -> None:
    parser = harness.parser(__doc__, "quick", "ours", "root", "output")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all cases together, about")
    parser.add_argument("--rounds", type=int, help="default: 3, on a GPU 5")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="of ASIB's steps")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="of those")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: where others use the machine")
    parser.add_argument("--compile", action="store_true", help="try a compiled limit on the processor too")
    options = parser.parse_args()
    logging.getLogger("asib").setLevel(logging.WARNING)
    Window.clock = staticmethod(CLOCKS[options.clock])
    gpu = harness.device().type == "cuda"
    # the large batch takes minutes on a processor, so there it runs in bf16 only
    large = [p for p in options.precisions if (p == "bf16" or gpu) and not options.quick]
    todo = cases(options.methods, options.pairs, options.precisions, large)
    rounds = options.rounds or (2 if options.quick else 5 if gpu else 3)
    data, machine = real_images(options.root), card.rates(harness.device())
    result = harness.described("timm", "torchvision", "numpy")
    result |= {
        "images": data.name,
        "clock": options.clock,
        "rounds": rounds,
        "overrides": options.ours,
        "rates": machine,
        "cases": [],
    }
    for case in todo:
        seconds = 0.0 if options.quick else SHARE * 60 * options.minutes * _weight(case) / sum(map(_weight, todo))
        found = measure(case, data, machine, rounds, seconds, options.compile or gpu, tuple(options.ours))
        result["cases"].append(found)
        for which, step in found["steps"].items():
            speeds = "  ".join(f"{name} {speed['median']:8.1f}" for name, speed in step["images_per_second"].items())
            others = [other for other in ("limit", "plain") if f"ours_to_{other}" in step]
            ratios = "  ".join(f"{step[f'ours_to_{other}']['median']:.2f} × {other}" for other in others)
            print(f"{case.name:48s} {which}  {speeds}  images/s  {ratios}")
    harness.write(f"steps_{harness.kind(options.quick)}", result, options.output)


def _weight(case: Case) -> float:
    """A case's weight in sharing out the time: slower ones get more, so that a round has more than a batch or two."""
    slow = 3.0 if "resnet50" in case.pair.name else 1.5 if case.batch > 64 else 1.0
    return slow * WEIGHTS[case.precision]


if __name__ == "__main__":
    main()
