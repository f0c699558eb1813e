"""What the speed benchmark measures is what it says: the same passes, fair turns, numbers that add up."""

import json
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import render
from benchmarks.steps import card
from benchmarks.steps.cases import Case, Pair, by_class, first_images
from benchmarks.steps.clock import Window, interleaved, ratios, spread
from benchmarks.steps.limit import KINDS, Limit, fastest
from benchmarks.steps.ours import ClockedDistillation, OneEpoch, next_epoch
from pipeline.journal import NullJournal
from pipeline.training.loop import Loop
from pipeline.training.optim import Precision
from tests.page_faults import PAGES, printed_by
from tests.pipeline.training.builders import config, image_data, networks

CPU = torch.device("cpu")
CASE = Case(Pair("tiny", ("one", "other"), "student"), "fp32", 10)


def passes_of_limit(kind: str, view: str) -> dict[str, dict[str, float]]:
    """Forward passes of each network in one bare step."""
    student, teachers = networks()
    limit = Limit(CASE, config(method={"kd_view": view}), student, teachers, CPU, kind)
    found = {}
    for which in ("a", "b"):
        calls: Counter[str] = Counter()
        hooks = [
            net.register_forward_hook(lambda *_, name=name, calls=calls: calls.update([name]))
            for name, net in limit.networks.items()
        ]
        limit.step(which)
        found[which] = {name: float(n) for name, n in calls.items()}
        for hook in hooks:
            hook.remove()
    return found


@pytest.mark.parametrize("view", ["clean", "mixed"])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_the_limit_makes_the_passes_of_the_real_steps(kind: str, view: str) -> None:
    method = {"cutmix_alpha_distill": 1.0, "kd_view": view}
    task = ClockedDistillation(Window(CPU), config(method=method), image_data(), *networks(), CPU)
    loop = Loop(task, NullJournal(), None, {}, Precision(task.optim, CPU), CPU, watch=OneEpoch())
    task.monitor.gate_open = True
    images = sum(stop - start for start, stop in task.batches.bounds)
    real: dict[str, dict[str, float]] = {}
    for epoch in task.plan[:3]:  # two A-epochs and a B-epoch
        before = dict(task.costs.images)
        next_epoch(loop)
        real[epoch.phase] = {name: (n - before[name]) / images for name, n in task.costs.images.items()}
    assert task.monitor.gate_open
    assert passes_of_limit(kind, view) == real
    assert 0 < task.window.seconds < 60


def test_a_bare_step_trains_what_the_step_trains_and_nothing_else() -> None:
    student, teachers = networks()
    limit = Limit(CASE, config(), student, teachers, CPU)
    for which, trained in (("a", {"fusion"}), ("b", {"student"})):
        before = {name: [p.clone() for p in net.parameters()] for name, net in limit.networks.items()}
        limit.step(which)
        changed = {
            name
            for name, net in limit.networks.items()
            if any(not torch.equal(p, old) for p, old in zip(net.parameters(), before[name], strict=True))
        }
        assert changed == trained


def test_the_fastest_teacher_says_what_the_teacher_says() -> None:
    """Without batch norms; in bf16 with weights that lie in bf16."""
    _, (teacher, _) = networks()
    x = torch.randn(4, 3, 8, 8)
    made, cast = fastest(teacher, None, (3, 8, 8)), fastest(teacher, torch.bfloat16, (3, 8, 8))
    with torch.no_grad():
        expected = teacher.eval()(x)
        logits, feature = made(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, _ = cast(x)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(feature, expected.feat_2d, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rounded.float(), expected.logits, rtol=0.05, atol=0.05)
    assert not [module for module in made.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    weights = [m.weight for m in cast.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}


def test_turns_go_round_and_ratios_are_taken_round_by_round() -> None:
    said: list[str] = []

    def contestant(name: str) -> Any:
        def turn() -> float:
            said.append(name)
            return float(len(said))

        return turn

    found = interleaved({"x": contestant("x"), "y": contestant("y")}, 3)
    assert said == ["x", "y", "y", "x", "x", "y"]
    assert found == {"x": [1.0, 4.0, 5.0], "y": [2.0, 3.0, 6.0]}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": [3.0, 1.0, 2.0]}
    assert ratios([1.0, 4.0, 9.0], [2.0, 2.0, 3.0])["median"] == 2.0


MEMORY = """
import json, torch
from benchmarks.steps.clock import untouched_memory
from tests.page_faults import faults
with untouched_memory(torch.device("cpu")):
    inside = faults(5)
print(json.dumps([inside, faults(5)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_the_plain_loop_is_not_given_the_memory_that_ours_keeps() -> None:
    """Page faults for a block's pages each time that it is taken."""
    inside, outside = json.loads(printed_by(MEMORY))
    assert inside == pytest.approx(5 * PAGES, rel=0.05)
    assert outside < 1.1 * PAGES


def test_work_is_counted_layer_by_layer() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False)), torch.zeros(2, 3, 16, 16)
    image, out, weight = 3 * 256, 8 * 256, 8 * 3 * 9
    assert card.traffic(net, x) == 4 * (2 * (image + out) + weight)
    work = card.work({"teacher_0": net, "student": net}, "b", x)  # a teacher forward, the student three times that
    assert work["gflops_per_image"] == pytest.approx(4 * 2 * out * 27 / 1e9)
    two = {"teacher_0": net, "teacher_1": net, "student": net}
    passes = [card.work(two, "b", x, query)["gflops_per_image"] * 1e9 / (2 * out * 27) for query in (True, False)]
    assert passes == pytest.approx([6, 5])  # with a fusion the student once more, unless its training pass is the query
    shares = card.used(1e9, {"gflops_per_image": 2.0, "mb_per_image": 4.0}, RATES, "bf16")
    assert shares == {"of_dense_rate": 1e9 * 2e9 / 500e12, "of_bandwidth_unfused": 1e9 * 4e6 / 2 / 100e9}


RATES = {"name": "processor", "dense_fp32_tflops": 1.0, "dense_bf16_tflops": 500.0, "copy_gb_per_second": 100.0}


def test_images_are_repeated_where_there_are_fewer_and_spread_over_the_classes() -> None:
    data = image_data(n=12)
    assert first_images(data, 30).train_y.tolist() == [k % 12 % data.num_classes for k in range(30)]
    shuffled = first_images(data, 12)
    order = torch.argsort(shuffled.train_y, stable=True)
    object.__setattr__(shuffled, "train_x", shuffled.train_x[order])
    object.__setattr__(shuffled, "train_y", shuffled.train_y[order])
    again = by_class(shuffled)
    assert again.train_y.tolist() == data.train_y.tolist()
    assert torch.equal(again.train_x, data.train_x)


def test_what_is_written_by_hand_stays() -> None:
    page = f"# Words\n\n{render.BEGIN}\nold\n{render.END}\n\nmore words\n"
    assert render.placed(page, "new") == f"# Words\n\n{render.BEGIN}\n\nnew\n\n{render.END}\n\nmore words\n"
    assert render.placed("# Words\n", "new") == f"# Words\n\n{render.BEGIN}\n\nnew\n\n{render.END}\n"
