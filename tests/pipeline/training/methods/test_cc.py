"""CC's forms against loops, the exact Gaussian kernel, and torchdistill."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchdistill.losses.mid_level import CCKDLoss

from pipeline.config.methods.cc import CcConfig
from pipeline.training.methods.cc import FORMS, Cc, kernel, neighbours, published
from tests.pipeline.training.methods.against import errors, finite, graded, random
from tests.pipeline.training.methods.stepping import batches, first, gradients, made, terms


def neighbours_loop(student: Tensor, teacher: Tensor) -> Tensor:
    found = [
        abs((student[i] * student[i + 1]).sum() - (teacher[i] * teacher[i + 1]).sum()) for i in range(len(student) - 1)
    ]
    return torch.stack(found).sum() / len(found)


def published_loop(student: Tensor, teacher: Tensor) -> Tensor:
    found = [
        abs(student[i, c] - teacher[i, c]) * abs(student[i + 1, c] - teacher[i + 1, c])
        for i in range(len(student) - 1)
        for c in range(student.shape[1])
    ]
    return torch.stack(found).sum() / (len(student) - 1)


def kernel_loop(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)

    def entry(f: Tensor, i: int, j: int) -> Tensor:
        a, b = (v / (v**2).sum().sqrt() for v in (f[i], f[j]))
        x = 2 * 0.4 * (a * b).sum()
        return math.exp(-2 * 0.4) * (1 + x + x**2 / 2)

    found = [(entry(student, i, j) - entry(teacher, i, j)) ** 2 for i in range(n) for j in range(n)]
    return torch.stack(found).sum() / n**2


LOOPS = {"neighbours": neighbours_loop, "published": published_loop, "kernel": kernel_loop}


def torchdistills(student: Tensor, teacher: Tensor) -> Tensor:
    """torchdistill's, squared: it divides the Frobenius norm by B^2, the paper its square. It normalises elsewhere."""
    loss = CCKDLoss("s", "t", {"type": "gaussian", "gamma": 0.4, "max_p": 2}, "batchmean")
    n, unit = len(student), [F.normalize(f, dim=1) for f in (student, teacher)]
    return (loss({"s": {"output": unit[0]}}, {"t": {"output": unit[1]}}) * n**2) ** 2 / n**2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "d"), [(2, 3), (7, 5), (16, 32)])
def test_each_form_is_what_its_formula_says(form: str, n: int, d: int) -> None:
    assert max(errors(FORMS[form], LOOPS[form], random(n, d, seed=1), random(n, d, seed=2))) < 1e-5


def test_the_kernel_is_torchdistills() -> None:
    assert max(errors(kernel, torchdistills, random(16, 32, seed=3), random(16, 32, seed=4))) < 1e-5


def test_the_series_tends_to_the_gaussian_kernel() -> None:
    s, t = random(6, 4, seed=5), random(6, 4, seed=6)
    exact = [torch.exp(-0.4 * torch.cdist(f, f).square()) for f in (F.normalize(s, dim=1), F.normalize(t, dim=1))]
    assert kernel(s, t, order=12).item() == pytest.approx((exact[0] - exact[1]).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_equal_embeddings_cost_nothing(form: str) -> None:
    s = random(6, 4, seed=7)
    value, gradient = graded(FORMS[form], s, s)
    assert value.item() == gradient.abs().max().item() == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_small_batches_equal_samples_and_large_or_half_precision_embeddings(form: str) -> None:
    loss = FORMS[form]
    assert finite(loss, random(1, 4), random(1, 4, seed=1)).item() == pytest.approx(0.0, abs=1e-12)
    finite(loss, random(2, 4), random(2, 4, seed=1))
    finite(loss, random(1, 4).expand(5, 4), random(5, 4, seed=1))
    finite(loss, random(6, 8, scale=1e4), random(6, 8, seed=1, scale=1e4))
    s, t = random(6, 8).half(), random(6, 8, seed=1).half()
    assert finite(loss, s, t) == finite(loss, s.float(), t.float())


def test_only_the_published_form_forgets_what_correlation_is() -> None:
    """A teacher turned as a whole correlates as before; the differences that were published do not see it."""
    s, turn = random(6, 4, seed=8), torch.linalg.qr(random(4, 4, seed=9))[0]
    assert neighbours(s, s @ turn).item() == pytest.approx(0.0, abs=1e-5)
    assert published(s, s @ turn).item() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_the_step_trains_both_embeddings(form: str) -> None:
    step, batch = made(Cc, CcConfig(form=form, embed_dim=9)), first(batches())
    s = step.own["embed_student"](step.trainable_module(batch.x).feat_2d)
    t = step.own["embed_teacher"](step._teachers[0](batch.x).feat_2d)
    assert terms(step, batch)["cc"].item() == FORMS[form](s, t).item()
    found = gradients(step, batch)
    for name in ("embed_student.weight", "embed_teacher.weight", "net.conv.weight"):
        assert found[name].abs().max() > 0
