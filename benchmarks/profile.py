"""Where an A- and a B-step spend their time: torch.profiler over some steps of the real loop.

    python -m benchmarks.profile [--pair resnet32x4+wrn_40_2-resnet8x4] [--precision fp32] [--label before]

Writes benchmarks/profiles/<kind>_<pair>_<precision>_<step>_<label>.txt: the networks' and the optimiser's parts, then
operators by self time, the three largest named at the top.
"""

import logging
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import harness
from benchmarks.steps.cases import PAIRS, TWO_TEACHERS, Case, first_images, real_images
from benchmarks.steps.clock import Window
from benchmarks.steps.ours import Ours

PROFILES = Path(__file__).resolve().parent / "profiles"
ROWS = 30


class ProfiledWindow(Window):
    """A window with the profiler running inside."""

    def open(self) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self.profiler: Any = profile(activities=activities)
        self.profiler.start()
        super().open()

    def shut(self) -> float:
        seconds = super().shut()
        self.profiler.stop()
        return seconds


def mark(name: str, net: nn.Module) -> None:
    """Make every forward pass of the network a range of the profile."""
    entered: list[Any] = []

    def before(*_: Any) -> None:
        entered.append(record_function(f"part: {name} forward"))
        entered[-1].__enter__()

    def after(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    net.register_forward_pre_hook(before)
    net.register_forward_hook(after)


def summary(case: Case, which: str, window: ProfiledWindow, steps: int) -> str:
    """The text of a profile."""
    device = "device" if window.device.type == "cuda" else "cpu"
    field, whole = f"self_{device}_time_total", f"{device}_time_total"
    events = window.profiler.key_averages()
    total = sum(getattr(e, field) for e in events) or 1.0
    largest = sorted(events, key=lambda e: getattr(e, field), reverse=True)
    ranges = [e for e in events if e.key.startswith(("part: ", "Optimizer.step"))]
    about = harness.described("timm")
    lines = [
        f"{case.name}, {which.upper()}-step, {steps} steps in {window.seconds:.3f} s (profiled), {window.device}",
        f"{about['date']}  commit {about['commit'][:10]}{' (changed)' * about['dirty']}  {about['machine']['cpu']}  "
        f"torch {about['versions']['torch']}  {torch.get_num_threads()} threads",
        "",
        "largest: " + ", ".join(f"{e.key} {100 * getattr(e, field) / total:.1f} %" for e in largest[:3]),
        "",
        "parts (time inside; forward passes, the rest is backward, losses, images and the loop):",
    ]
    for event in sorted(ranges, key=lambda e: getattr(e, whole), reverse=True):
        taken = getattr(event, whole) / 1e6
        share = 100 * taken / window.seconds
        lines.append(f"  {event.key:40s} {1e3 * taken:10.1f} ms  {share:5.1f} %  {event.count} calls")
    table = events.table(sort_by=field, row_limit=ROWS, max_name_column_width=50)
    return "\n".join([*lines, "", table]) + "\n"


def main() -> None:
    parser = harness.parser(__doc__, "ours", "root")
    parser.add_argument("--pair", choices=PAIRS, default=TWO_TEACHERS)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--label", default="now", help="before, after, …")
    parser.add_argument("--folder", type=Path, default=PROFILES)
    options = parser.parse_args()
    logging.getLogger("asib").setLevel(logging.WARNING)
    on = harness.device()
    case = Case(PAIRS[options.pair], options.precision)
    steps = 20 if on.type == "cuda" else 3
    images = first_images(real_images(options.root), steps * case.batch)
    options.folder.mkdir(parents=True, exist_ok=True)
    window = ProfiledWindow(on)
    with (
        tempfile.TemporaryDirectory(prefix="asib-profile-", ignore_cleanup_errors=True) as name,
        closing(Ours(case, images, 2, Path(name), options.ours, window=window)) as ours,
    ):
        for which in case.steps:
            ours.seconds(which)  # warm-up of torch
        task = ours.task
        nets: dict[str, nn.Module | None] = {"student": task.student, "fusion": task.fusion}
        nets |= {f"teacher_{k}": t for k, t in enumerate(task.teachers)}
        for network, net in nets.items():
            if net is not None:
                mark(network, net)
        for which in case.steps:
            ours.seconds(which)
            label = f"{harness.kind()}_{case.pair.name}_{case.precision}_{which}_{options.label}"
            path = options.folder / f"{label}.txt"
            path.write_text(summary(case, which, window, steps))
            print(path, flush=True)


if __name__ == "__main__":
    main()
