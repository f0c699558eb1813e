"""What the speed benchmark measures is what it says: the same passes, fair turns, numbers that add up."""

import json
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import render
from benchmarks.steps import card
from benchmarks.steps.cases import Case, Pair, by_class, first_images
from benchmarks.steps.clock import Window, interleaved, ratios, spread
from benchmarks.steps.limit import KINDS, Limit, fastest
from benchmarks.steps.losses import LOSSES, Out, Sizes
from benchmarks.steps.ours import Clocked, ClockedDistillation, OneEpoch, next_epoch
from models.features import FeatureNet
from pipeline.config.schema import configure
from pipeline.journal import NullJournal
from pipeline.training import losses
from pipeline.training.loop import Loop
from pipeline.training.methods import at, ca_mkd, crd
from pipeline.training.optim import Precision
from tests.page_faults import PAGES, printed_by
from tests.pipeline.training.builders import config, image_data, networks

CPU = torch.device("cpu")
CASE = Case(Pair("tiny", ("one", "other"), "student"), "fp32", 10)


def passes_of(limit: Limit, case: Case) -> dict[str, dict[str, float]]:
    """Forward passes of each network in one bare step."""
    found = {}
    for which in case.steps:
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
    assert passes_of(Limit(CASE, config(method={"kd_view": view}), *networks(), CPU, kind), CASE) == real
    assert 0 < task.window.seconds < 60


@pytest.mark.parametrize(("method", "own"), [("kd", {}), ("at", {}), ("crd", {"negatives": 8}), ("ca_mkd", {})])
def test_a_methods_limit_makes_the_passes_of_its_steps(method: str, own: dict[str, Any]) -> None:
    """And trains what they train: as many parameters."""
    names = ["cifar_resnet14"] * (2 if method == "ca_mkd" else 1)
    case = Case(Pair("tiny", tuple(names), "cifar_resnet8"), "fp32", 12, method)
    c = configure(
        {
            "dataset": {"batch_size": 12, "val_fraction": 0.0},
            "model": {"teachers": [{"name": name} for name in names]},
            "method": {"name": method, "num_stages": 1, "student_epochs_per_stage": (1,), **own},
            "optim": {"optimizer": "sgd"},
            "device": "cpu",
        }
    )

    def made() -> tuple[FeatureNet, list[FeatureNet]]:
        student, *teachers = (FeatureNet(timm.create_model(n, num_classes=4)) for n in ("cifar_resnet8", *names))
        return student, teachers

    task = Clocked(Window(CPU), c, image_data(size=32), *made(), CPU)
    next_epoch(Loop(task, NullJournal(), None, {}, Precision(task.optim, CPU), CPU, watch=OneEpoch()))
    limit = Limit(case, c, *made(), CPU, "folded")
    nets = {"student", *(f"teacher_{k}" for k in range(len(names)))}
    assert passes_of(limit, case) == {"b": {k: task.costs.images[k] / 48 for k in nets}}
    sizes = [
        sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        for optimizer in (limit.optimizers["b"], task.phases["b"].optimizer)
    ]
    assert sizes[0] == sizes[1]


def outs(seed: int, width: int) -> Out:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((6, 4), (6, width), (6, width, 3, 3))
    logits, feature, last = (torch.randn(shape, generator=generator) for shape in shapes)
    return Out(logits, feature, (last,))


def test_the_limit_of_a_loss_is_the_methods_loss() -> None:
    """On random outputs, against the functions that the pipeline trains with."""
    student, teachers, y = outs(0, 5), [outs(1, 7), outs(2, 8)], torch.arange(6) % 4
    heads = [torch.nn.Linear(width, 4) for width in (7, 8)]
    nets: Any = [SimpleNamespace(get_classifier=lambda head=head: head) for head in heads]
    method = SimpleNamespace(tau=3.0, embed_dim=16, negatives=9)
    sizes = Sizes(6, 20, student, teachers)

    def limit(name: str) -> tuple[Any, Tensor]:
        made: Any = LOSSES[name](method, sizes)
        return made, made(student, teachers, y, nets)

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected.mean(), rtol=1e-5, atol=1e-6)

    close(limit("kd")[1], losses.kd(student.logits, teachers[0].logits, 3.0))
    close(limit("at")[1], at.attention_transfer(student.maps, teachers[0].maps, 2))
    made, found = limit("crd")
    s, t = (F.normalize(e(o.feature)) for e, o in zip(made.embed, (student, teachers[0]), strict=True))
    scores = [(a @ b.T / 3.0).gather(1, made.rows) for a, b in ((s, made.banks[1]), (t, made.banks[0]))]
    close(found, sum((crd.nce(z, torch.tensor(made.log_noise), 1.0) for z in scores), torch.zeros(6)))
    made, found = limit("ca_mkd")
    projected = [p(student.maps[-1]) for p in made.projectors]
    ce = [
        [losses.cross_entropy(z, y) for z in some]
        for some in (
            [o.logits for o in teachers],
            [head(p.mean((2, 3))) for head, p in zip(heads, projected, strict=True)],
        )
    ]
    of_logits, of_maps = (ca_mkd.confidence_weights(torch.stack(some)) for some in ce)
    kd = ca_mkd.weighted_kd(student.logits, torch.stack([o.logits for o in teachers]), of_logits, 3.0)
    close(found, kd + ca_mkd.weighted_distance(projected, [o.maps[-1] for o in teachers], of_maps))


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
        logits, feature, _ = made(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, *_ = cast(x)
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


@pytest.mark.slow
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
