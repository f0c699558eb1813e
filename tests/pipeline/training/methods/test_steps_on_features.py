"""Whole trainings by methods on features: updates of the real step, and of a float64 loop written from the formulas."""

from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features import FeatureNet, Features, paired_maps
from pipeline.data.batches import Batch
from pipeline.training.methods.crd import Others, counted_bits
from pipeline.training.objective import Moment
from pipeline.training.rng import Streams
from pipeline.training.step import Setup, Weights
from tests.pipeline.training.builders import CLASSES, CPU, TinyNet, copied
from tests.pipeline.training.methods import test_rkd
from tests.pipeline.training.methods.logit_reference import relative_error

N, SIZE, NEGATIVES = 44, 5, 12
IMAGES, LABELS = torch.randn((N, 3, 8, 8), generator=torch.Generator().manual_seed(7)), torch.arange(N) % CLASSES


class SmoothNet(TinyNet):
    """Three stages without ReLUs, whose gradient jumps where rounding decides on which side of 0 an input is."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.feature_info = [{}] * 3
        more = ((nn.Conv2d(width, width, 3, stride, 1), nn.BatchNorm2d(width), nn.SiLU()) for stride in (1, 2))
        self.stages = nn.ModuleList(nn.Sequential(*layers) for layers in more)

    def forward_intermediates(self, x: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        maps = [F.silu(self.norm(self.conv(x)))]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[-1], [maps[i] for i in indices]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_intermediates(x, [])[0]


# the formulas --------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What a formula is of, all in float64."""

    own: Any
    """A copy of the step's own modules."""
    s: Features
    ts: list[Features]
    teachers: list[FeatureNet]
    batch: Batch
    moment: Moment


def unit(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(dim=1, keepdim=True).sqrt()


def fitnet(g: Given) -> Tensor:
    return F.mse_loss(g.own["regressor"](g.s.maps[1]), g.ts[0].maps[1])


def at(g: Given) -> Tensor:
    pairs = [[unit(x.square().mean(dim=1).flatten(1)) for x in maps] for maps in (g.s.maps, g.ts[0].maps)]
    return sum(((a - b).square().mean() for a, b in zip(*pairs, strict=True)), torch.zeros(()))


def sp(g: Given) -> Tensor:
    a, b = (unit(x.maps[-1].flatten(1) @ x.maps[-1].flatten(1).T) for x in (g.s, g.ts[0]))
    return (a - b).square().sum() / SIZE**2


def rkd(g: Given) -> Tensor:
    return test_rkd.total_loop(g.s.feat_2d, g.ts[0].feat_2d)


def vid(g: Given) -> Tensor:
    stages = []
    for stage, a, b in zip(g.own["stages"].stages, g.s.maps, g.ts[0].maps, strict=True):
        variance = (1 + stage.rho.exp()).log()[:, None, None] + 1e-5
        stages.append(0.5 * ((stage.regressor(a) - b).square() / variance + variance.log()).mean())
    return torch.stack(stages).mean()


def crd(g: Given) -> Tensor:
    """Also moves the memory, to a new tensor: the loss's gradient is of the one before the update."""
    memory, rows, total = g.own["memory"], g.batch.index, torch.zeros(())
    bits = counted_bits(Streams(0).derive("crd_negatives", *g.moment), g.batch.rows, NEGATIVES, CPU)
    places = torch.cat([rows[:, None], Others(LABELS)(g.batch.y, bits)], dim=1)
    new = [unit(g.own[f"embed_{side}"](x.feat_2d)) for side, x in (("student", g.s), ("teacher", g.ts[0]))]
    for i, bank in enumerate((memory.teacher, memory.student)):
        e = (torch.einsum("bd,bkd->bk", new[i], bank[places]) / 0.07).exp()
        if g.moment.batch == 0:
            memory.log_z[i] = (N * e.detach().mean()).log()
        p = e / memory.log_z[i].exp()
        h = p / (p + NEGATIVES / N)
        total = total - (h[:, 0].log() + (1 - h[:, 1:]).log().sum(dim=1)).mean()
    for side, embedded in zip(("student", "teacher"), new, strict=True):
        old = getattr(memory, side)
        setattr(memory, side, old.index_put((rows,), unit((old[rows] + embedded.detach()) / 2)))
    return total


def ca_mkd(g: Given) -> Tensor:
    def weighted(logits: list[Tensor], terms: list[Tensor]) -> Tensor:
        e = torch.stack([F.cross_entropy(x, g.batch.y, reduction="none") for x in logits]).detach().exp()
        return ((1 - e / e.sum(dim=0)) / (len(terms) - 1) * torch.stack(terms)).sum(dim=0).mean()

    projected = [g.own[f"projector_{k}"].block(g.s.maps[-1]) for k in range(len(g.ts))]
    guessed = [teacher.net.fc(p.mean((2, 3))) for p, teacher in zip(projected, g.teachers, strict=True)]
    hints = [(p - t.maps[-1]).square().mean((1, 2, 3)) for p, t in zip(projected, g.ts, strict=True)]
    log_q = F.log_softmax(g.s.logits / 4, dim=1)
    kds = [16 * F.kl_div(log_q, F.softmax(t.logits / 4, dim=1), reduction="none").sum(dim=1) for t in g.ts]
    return weighted([t.logits for t in g.ts], kds) + 50 * weighted(guessed, hints)


# the runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.step  # seconds each
@pytest.mark.parametrize(
    ("loss", "teachers", "keys"),
    [
        (fitnet, 1, {}),
        (at, 1, {}),
        # with SP's 3000 a float64 loop whose start differs by 1e-7 ends 3e-4 away, the step 1e-2
        (sp, 1, {"kd_alpha": 100.0}),
        (rkd, 1, {}),
        (vid, 1, {"kd_alpha": 30.0}),  # with 1 its own modules hardly move
        (crd, 1, {"negatives": NEGATIVES, "embed_dim": 8}),
        (ca_mkd, 2, {}),
    ],
)
def test_fifty_updates_are_those_of_a_plain_float64_loop(
    loss: Callable[[Given], Tensor], teachers: int, keys: dict[str, Any]
) -> None:
    name = loss.__name__
    config = getattr(import_module(f"pipeline.config.methods.{name}"), f"{name.title().replace('_', '')}Config")
    torch.manual_seed(0)
    student, *taught = [FeatureNet(SmoothNet(width)) for width in (6, 5, 7)[: 1 + teachers]]
    data: Any = SimpleNamespace(train=SimpleNamespace(indices=torch.arange(N), labels=LABELS))
    shapes = paired_maps(student, taught, (3, 8, 8))
    step = resolve_name(config.step)(Setup(student, taught, config(**keys), Streams(0), CPU, CLASSES, data, *shapes))
    step.begin_epoch(Weights(1.0))
    step.train()
    plain, exact = deepcopy(step.trained).double(), [deepcopy(teacher).double().eval() for teacher in taught]
    start = copied(plain)
    first, second = (torch.optim.SGD(n.parameters(), 0.01, momentum=0.9) for n in (step.trained, plain))
    draw = torch.Generator().manual_seed(8)
    for i in range(50):
        rows, moment = torch.randperm(N, generator=draw)[:SIZE], Moment("b", 0, i)
        x, y = IMAGES[rows], LABELS[rows]
        batch = Batch(x, x, y, y, torch.ones(()), rows, slice(0, SIZE), SIZE, None, None)
        first.zero_grad()
        step(batch, moment)["loss"].backward()
        first.step()
        step.updated(torch.tensor(False), 0.01)
        with torch.no_grad():
            seen = [teacher(x.double()) for teacher in exact]
        s = plain[0](x.double())
        second.zero_grad()
        term = loss(Given(plain[1], s, seen, exact, batch, moment))
        (F.cross_entropy(s.logits, y) + step.method.kd_alpha * term).backward()
        second.step()
    found = step.trained.state_dict()
    for key, value in plain.state_dict().items():
        if value.is_floating_point():
            assert relative_error(found[key], value) < 1e-4, key
            assert key.endswith("bias") or relative_error(value, start[key]) > 0.01, f"{key} has learned something"
