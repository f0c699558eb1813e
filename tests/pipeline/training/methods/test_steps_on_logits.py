"""Every method on logits in the step that all share: batches, samples that are left out, mixed images, repeats."""

from copy import deepcopy
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.methods.base import MethodConfig
from pipeline.data.batches import Batch
from pipeline.training.objective import Moment
from pipeline.training.run_data import RunData
from pipeline.training.step import Weights
from tests.pipeline.training.builders import CLASSES, CPU, config, image_data
from tests.pipeline.training.methods import (
    test_aekd,
    test_aver,
    test_dist,
    test_dkd,
    test_ebkd,
    test_kd,
    test_nkd,
    test_ttm,
    test_wttm,
)
from tests.pipeline.training.methods.logit_reference import Loss, relative_error, step_of

SINGLE = ("kd", "dkd", "dist", "ttm", "wttm", "nkd")
SEVERAL = ("aver", "ebkd", "aekd", "stack")
METHODS = [(name, 1) for name in SINGLE + SEVERAL] + [(name, 3) for name in SEVERAL]
PER_SAMPLE = [(name, k) for name, k in METHODS if name != "dist"]


def settings(name: str, **keys: Any) -> MethodConfig:
    made: MethodConfig = getattr(import_module(f"pipeline.config.methods.{name}"), f"{name.title()}Config")(**keys)
    return made


def batch(mixed: bool = False, n: int = 12) -> Batch:
    x, y = torch.randn((n, 3, 8, 8), generator=torch.Generator().manual_seed(5)), torch.arange(n) % CLASSES
    if not mixed:
        return Batch(x, x, y, y, torch.ones(()), torch.arange(n), slice(0, n), n, None, None)
    partner, lam = torch.arange(n).flip(0), torch.tensor(0.3)
    blended = lam * x + (1 - lam) * x[partner]
    return Batch(x, blended, y, y[partner], lam, torch.arange(n), slice(0, n), n, partner, None)


def outcome(name: str, k: int, given: Batch, **keys: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Terms and loss of one batch at full weight, and the gradient on the student's classifier."""
    data = RunData(config(), image_data(96), CPU)
    step = step_of(settings(name, **keys), k, data=data)
    step.begin_epoch(Weights(1.0))
    step.train()
    out = step(given, Moment("b", 0, 0))
    out["loss"].backward()
    return out, step.trainable_module.net.fc.weight.grad


@pytest.mark.parametrize(("name", "k"), METHODS)
def test_the_loss_is_cross_entropy_and_the_weighted_terms(name: str, k: int) -> None:
    out, slope = outcome(name, k, batch())
    chosen = settings(name)
    terms = [value for key, value in out.items() if key.startswith(name)]
    assert terms, "the terms are named after the method"
    torch.testing.assert_close(out["loss"], chosen.ce_alpha * out["ce"] + chosen.kd_alpha * sum(terms))
    assert torch.isfinite(slope).all()
    idle, without = outcome(name, k, batch(), kd_alpha=0.0)
    assert not [key for key in idle if key.startswith(name)], "what has no weight is not logged"
    assert (slope - without).abs().max() > 1e-4, "it pulls at the student"


@pytest.mark.parametrize(("name", "k"), PER_SAMPLE)
def test_a_gate_that_lets_all_pass_changes_nothing(name: str, k: int) -> None:
    (out, slope), gate = outcome(name, k, batch()), {"kd_sample_gate": True, "kd_sample_max_ratio": 1.0}
    gated, gated_slope = outcome(name, k, batch(), kd_sample_min_ratio=1.0, **gate)
    torch.testing.assert_close(gated["loss"], out["loss"])
    torch.testing.assert_close(gated_slope, slope)


@pytest.mark.parametrize(("name", "k"), PER_SAMPLE)
def test_samples_that_a_gate_leaves_out_have_no_part(name: str, k: int) -> None:
    gate = partial(outcome, name, k, kd_sample_gate=True, kd_sample_min_ratio=0.5, kd_sample_thr=0.0)
    out, slope = gate(batch())
    assert out["sample_gate"] == 0.5
    for part in (out["loss"], slope):
        assert torch.isfinite(part).all()
    assert out["loss"] > 0


@pytest.mark.parametrize("gate", [{}, {"kd_sample_gate": True, "kd_sample_max_ratio": 0.5, "kd_sample_thr": 1.0}])
@pytest.mark.parametrize(("name", "k"), [(name, k) for name, k in METHODS if name in ("ebkd", "aekd", "stack")])
def test_the_teachers_weights_are_logged_and_their_means_sum_to_1(name: str, k: int, gate: dict[str, Any]) -> None:
    data = RunData(config(), image_data(96), CPU)
    step = step_of(settings(name, **gate), k, data=data)
    step.begin_epoch(Weights(1.0))
    given = batch()
    means = step.summarise(
        {key: value.item() for key, value in step(given, Moment("b", 0, 0)).items() if key != "output"}
    )
    logged = [means[f"teacher_weight_{i}"] for i in range(k)]
    assert sum(logged) == pytest.approx(1.0, abs=1e-6)
    if name == "ebkd" and k > 1 and not gate:
        p = torch.stack([F.softmax(t(given.x).logits.double(), dim=1) for t in step._teachers])
        entropies = torch.special.entr(p).sum(dim=2)
        assert logged == pytest.approx(((1 - entropies / entropies.sum(0)) / (k - 1)).mean(1).tolist(), abs=1e-6)
    assert not [key for key in outcome(name, k, given, kd_alpha=0.0)[0] if key.startswith("teacher_weight")]


@pytest.mark.parametrize(
    ("name", "k", "view"),
    # a lesson with labels cannot be mixed: the schema refuses clean views there
    [(name, k, view) for name, k in METHODS for view in ("clean", "mixed") if view == "mixed" or settings(name).blends],
)
def test_mixed_images_are_taught(name: str, k: int, view: str) -> None:
    out, slope = outcome(name, k, batch(mixed=True), mixup_alpha=1.0, kd_view=view)
    for part in (out["loss"], slope):
        assert torch.isfinite(part).all()


@pytest.mark.parametrize("name", ["kd", "ttm", "wttm", "stack", "aver"])
def test_the_pull_of_a_mixed_sample_is_the_mixture_of_its_two_lessons(name: str) -> None:
    """The student's softmax is linear in the target: where targets are mixed, so are gradients."""
    data = RunData(config(), image_data(96), CPU)
    step = step_of(settings(name, mixup_alpha=1.0), 1, data=data)
    step.begin_epoch(Weights(1.0))
    given, size = batch(mixed=True), 12
    lesson, _ = step.teach(given, torch.zeros(size, CLASSES), torch.zeros(size, 1), Moment("b", 0, 0))
    clean, _ = step.teach(batch(), torch.zeros(size, CLASSES), torch.zeros(size, 1), Moment("b", 0, 0))
    partners = {key: value[given.partner] for key, value in clean.items()}
    seen = step.trainable_module(given.x_mixed)

    def pull(taught: dict[str, Tensor]) -> Tensor:
        (term,) = step.terms(seen, taught, given, Moment("b", 0, 0)).values()
        return torch.autograd.grad(term.sum(), seen.logits, retain_graph=True)[0]

    torch.testing.assert_close(pull(lesson), 0.3 * pull(clean) + 0.7 * pull(partners), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SEVERAL)
def test_with_one_teacher_the_step_is_that_of_plain_distillation(name: str) -> None:
    (out, slope), (plain, plain_slope) = (
        outcome(name, 1, batch()),
        outcome("kd", 1, batch(), ce_alpha=1.0, kd_alpha=1.0),
    )
    torch.testing.assert_close(out["loss"], plain["loss"])
    torch.testing.assert_close(slope, plain_slope)


@pytest.mark.step  # seconds each
@pytest.mark.parametrize(
    ("name", "k", "keys", "loop"),
    [
        ("kd", 1, {}, test_kd.loop),
        ("dkd", 1, {}, test_dkd.loop),
        ("dist", 1, {"gamma": test_dist.GAMMA}, test_dist.loop),
        ("ttm", 1, {}, test_ttm.loop),
        ("wttm", 1, {}, test_wttm.loop),
        ("nkd", 1, {"tau": 2.0}, test_nkd.loop),
        ("aver", 3, {}, test_aver.loop),
        ("ebkd", 3, {}, test_ebkd.loop),
        ("aekd", 3, {}, test_aekd.loop),
    ],
)
def test_fifty_updates_are_those_of_a_plain_float64_loop(name: str, k: int, keys: dict[str, Any], loop: Loss) -> None:
    step = step_of(settings(name, ce_alpha=0.5, kd_alpha=1.0, **keys), k)
    step.begin_epoch(Weights(1.0))
    step.train()
    plain = deepcopy(step.trainable_module).double()
    teachers = [deepcopy(teacher).double() for teacher in step._teachers]
    first, second = (torch.optim.SGD(n.parameters(), 0.02, momentum=0.9) for n in (step.trainable_module, plain))
    start = deepcopy(plain.state_dict())
    x = torch.randn((50, 6, 3, 8, 8), generator=torch.Generator().manual_seed(7))
    for i, images in enumerate(x):
        y = torch.arange(i, i + 6) % CLASSES
        given = Batch(images, images, y, y, torch.ones(()), torch.arange(6), slice(0, 6), 6, None, None)
        first.zero_grad()
        step(given, Moment("b", 0, i))["loss"].backward()
        first.step()
        with torch.no_grad():
            taught = [teacher.eval()(images.double()).logits for teacher in teachers]
        s = plain(images.double()).logits
        second.zero_grad()
        (0.5 * F.cross_entropy(s, y) + loop(s, taught, y).mean()).backward()
        second.step()
    for key, value in plain.state_dict().items():
        if value.is_floating_point():
            assert relative_error(step.trainable_module.state_dict()[key], value) < 1e-4, key
    assert relative_error(plain.net.fc.weight.detach(), start["net.fc.weight"]) > 0.01, "it has learned something"
