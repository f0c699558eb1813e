"""The methods on feature maps as steps: each teaches the teacher's maps, and trains all that is its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from models.features import Features
from pipeline.config.methods.at import AtConfig
from pipeline.config.methods.base import MethodConfig
from pipeline.config.methods.fitnet import FitnetConfig
from pipeline.config.methods.ft import FtConfig
from pipeline.config.methods.nst import NstConfig
from pipeline.config.methods.reviewkd import ReviewkdConfig
from pipeline.config.methods.sp import SpConfig
from pipeline.config.methods.vid import VidConfig
from pipeline.data.batches import Batch
from pipeline.errors import UserError
from pipeline.training.methods.at import At, attention_transfer
from pipeline.training.methods.fitnet import Fitnet
from pipeline.training.methods.ft import Ft, factor_distance
from pipeline.training.methods.maps import squared_distance
from pipeline.training.methods.nst import Nst, selectivity
from pipeline.training.methods.reviewkd import Reviewkd, review
from pipeline.training.methods.sp import Sp, similarity_preserving
from pipeline.training.methods.vid import Vid
from pipeline.training.objective import Moment
from pipeline.training.rng import Streams
from pipeline.training.step import Setup, StudentStep
from tests.pipeline.training.builders import CLASSES, CPU, net
from tests.pipeline.training.methods.feature_maps import maps

SHAPES = [(4, 8, 8), (6, 4, 4)], [(3, 8, 8), (7, 4, 4)]
ROOT = Path(__file__).resolve().parents[4]
MOMENT = Moment("b", 0, 0)
ALL: list[tuple[type[StudentStep], type[MethodConfig]]] = [
    (At, AtConfig), (Fitnet, FitnetConfig), (Ft, FtConfig), (Nst, NstConfig), (Reviewkd, ReviewkdConfig),
    (Sp, SpConfig), (Vid, VidConfig),
]  # fmt: skip


def make(kind: type[StudentStep], settings: MethodConfig, seed: int = 0) -> Any:
    student, teachers = net(6, 0), [net(7, 1)]
    torch.manual_seed(seed)
    return kind(
        Setup(student, teachers, settings, Streams(0), CPU, CLASSES, None, SHAPES[0], [SHAPES[1]])  # type: ignore[arg-type]
    )


def seen(side: int, n: int = 5) -> Features:
    """A forward pass's outputs with these maps: student's (0) or teacher's (1)."""
    stages = tuple(maps(n, *shape, seed=10 * side + i) for i, shape in enumerate(SHAPES[side]))
    pooled = stages[-1].mean(dim=(2, 3))
    return Features(torch.zeros(n, CLASSES), pooled, stages[-1], None, stages)


def batch(n: int = 5) -> Batch:
    x, y = torch.zeros(n, 3, 16, 16), torch.arange(n) % CLASSES
    return Batch(x, x, y, y, torch.ones(()), torch.arange(n), slice(0, n), n, None, None)


def expected(step: Any, student: Features, teacher: Features) -> Tensor:
    s, t = student.maps, teacher.maps
    if isinstance(step, At):
        return attention_transfer(s, t, 2)
    if isinstance(step, Fitnet):
        return squared_distance(step.own["regressor"](s[1]), t[1])
    if isinstance(step, Ft):
        return factor_distance(step.own["translator"](s[1]), step.paraphraser.encoder(t[1]))
    if isinstance(step, Nst):
        return selectivity(s, t)
    if isinstance(step, Reviewkd):
        pooled_s, pooled_t = student.feat_2d[:, :, None, None], teacher.feat_2d[:, :, None, None]
        return review(step.own["review"]([*s, pooled_s]), [*t, pooled_t])
    if isinstance(step, Sp):
        return similarity_preserving(s[-1], t[-1])
    return torch.stack([m(a, b) for m, a, b in zip(step.own["stages"].stages, s, t, strict=True)]).mean(dim=0)


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_a_step_s_term_is_its_loss_of_the_networks_maps(kind: type[StudentStep], settings: type[MethodConfig]) -> None:
    step, student, teacher = make(kind, settings()), seen(0), seen(1)
    with torch.no_grad():
        lesson = step.lesson([teacher], batch().y)
    assert all(len(part) == 5 for part in lesson.values())
    (found,) = step.terms(student, lesson, batch(), MOMENT).values()
    assert found.shape == ((5,) if settings.per_sample else ())
    assert found.dtype == torch.float32
    assert step.term_weights() == {settings().name: settings().kd_alpha}
    torch.testing.assert_close(found, expected(step, student, teacher))


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_all_that_is_a_method_s_own_gets_a_gradient(kind: type[StudentStep], settings: type[MethodConfig]) -> None:
    """VID's variances too: they are parameters of the step, not of a loss that no optimiser knows."""
    step, teacher = make(kind, settings()), seen(1)
    student = seen(0)
    student = student._replace(maps=tuple(x.requires_grad_() for x in student.maps))
    with torch.no_grad():
        lesson = step.lesson([teacher], batch().y)
    (found,) = step.terms(student, lesson, batch(), MOMENT).values()
    found.mean().backward()
    assert student.maps[-1].grad is not None
    assert student.maps[-1].grad.abs().max() > 0
    own = {f"{name}.{k}": p for name, module in step.own.items() for k, p in module.named_parameters()}
    assert bool(own) == (kind in (Fitnet, Ft, Reviewkd, Vid))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in own.values())
    if kind is Vid:
        rho = [p.grad for name, p in own.items() if name.endswith("rho")]
        assert len(rho) == 2
        assert all(g is not None and g.abs().min() > 0 for g in rho)


def test_a_hint_stage_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"method.hint_stage=3: student and teacher share 2 stages; choose 1 to 2"):
        make(Fitnet, FitnetConfig(hint_stage=3))


def test_a_variance_below_its_floor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method.init_variance=1e-06: give more than the floor of 1e-05"):
        VidConfig(init_variance=1e-6)


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_the_method_s_file_has_the_published_weight(kind: type[StudentStep], settings: type[MethodConfig]) -> None:
    weights = {"at": 1000, "fitnet": 100, "ft": 200, "nst": 50, "reviewkd": 1, "sp": 3000, "vid": 1}
    name = settings().name
    chosen = settings.model_validate(yaml.safe_load((ROOT / f"conf/method/{name}.yaml").read_text()))
    assert (chosen.name, chosen.kd_alpha, chosen.ce_alpha) == (name, weights[name], 1)
    assert chosen == settings(kd_warmup_epochs=20 if name == "reviewkd" else 0), "all else are the defaults"
