"""FitNet-MKD's mean hint against a loop and torch's mean squared error; torchdistill's FitNet is that too."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.methods.fitnet_mkd import FitnetMkdConfig
from pipeline.errors import UserError
from pipeline.training.methods.fitnet_mkd import FitnetMkd, mean_hint
from pipeline.training.methods.projectors import Regressor
from tests.pipeline.training.methods.against import errors, finite, random
from tests.pipeline.training.methods.stepping import batches, first, gradients, made, outputs, terms

SHAPES = [(3, 4, 4), (5, 2, 2)]


def loop(student: Tensor, *maps: Tensor) -> Tensor:
    """`student` (B, C, h, w) stands for what each regressor made of it: its first channels and places."""
    losses = []
    for i in range(len(student)):
        each = []
        for f in maps:
            c, h, w = f.shape[1:]
            at = [(a, b, d) for a in range(c) for b in range(h) for d in range(w)]
            each.append(sum((student[i, a, b, d] - f[i, a, b, d]) ** 2 for a, b, d in at) / len(at))
        losses.append(sum(each) / len(each))
    return torch.stack(losses)


def ours(student: Tensor, *maps: Tensor) -> Tensor:
    return mean_hint([student[:, : f.shape[1], : f.shape[2], : f.shape[3]] for f in maps], maps)


def test_hints_are_mean_squared_errors_averaged_over_teachers() -> None:
    maps = [random(3, *shape, seed=k) for k, shape in enumerate(SHAPES)]
    student = random(3, 5, 4, 4, seed=9)
    assert max(errors(ours, loop, student, *maps)) < 1e-5
    expected = sum(F.mse_loss(student[:, : f.shape[1], : f.shape[2], : f.shape[3]], f) for f in maps) / 2
    assert ours(student, *maps).mean().item() == pytest.approx(expected.item(), rel=1e-6)


def test_hints_carry_gradient_to_the_student_and_every_regressor() -> None:
    """The public code re-wraps the losses in a new tensor, which has none."""
    student = random(4, 6, 4, 4, seed=1).requires_grad_()
    regressors = [Regressor((6, 4, 4), shape) for shape in SHAPES]
    maps = [random(4, *shape, seed=k).relu() for k, shape in enumerate(SHAPES)]
    mean_hint([r(student) for r in regressors], maps).mean().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    for regressor in regressors:
        assert all(
            p.grad is not None and p.grad.abs().max() > 0 for n, p in regressor.named_parameters() if n != "0.bias"
        )


def test_one_teacher_gives_its_own_hint_and_equal_teachers_the_same() -> None:
    student, f = random(3, 5, 4, 4, seed=2), random(3, 5, 4, 4, seed=3)
    one = ours(student, f)
    torch.testing.assert_close(one.mean(), F.mse_loss(student, f))
    torch.testing.assert_close(ours(student, f, f), one)
    assert torch.equal(ours(f, f), torch.zeros(3))


def test_one_sample_and_large_or_half_precision_maps() -> None:
    finite(ours, random(1, 5, 4, 4), random(1, 5, 4, 4, seed=1))
    finite(ours, random(2, 5, 4, 4, scale=1e4), random(2, 5, 4, 4, seed=1, scale=1e4))
    s, f = random(2, 5, 4, 4).half(), random(2, 5, 4, 4, seed=1).half()
    assert torch.equal(finite(ours, s, f), ours(s.float(), f.float()))


@pytest.mark.parametrize("teachers", [1, 3])
def test_the_step_regresses_the_hint_stage_on_every_teacher(teachers: int) -> None:
    step, batch = made(FitnetMkd, FitnetMkdConfig(), teachers), first(batches())
    found = terms(step, batch)["fitnet_mkd"]
    student = outputs(step.trainable_module, batch.x).maps[1]
    pairs = [(step.own[f"regressor_{k}"](student), outputs(t, batch.x).maps[1]) for k, t in enumerate(step._teachers)]
    expected = sum(F.mse_loss(r, f) for r, f in pairs) / teachers
    assert found.shape == (len(batch.y),)
    assert found.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert step.term_weights() == {"fitnet_mkd": 100.0}
    graded = gradients(step, batch)
    for name in ["net.conv.weight", *(f"regressor_{k}.0.weight" for k in range(teachers))]:
        assert graded[name].abs().max() > 0, "the hint has no gradient"


def test_a_hint_stage_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"^method\.hint_stage=3 and 2 stages that .* share: give one from 1 to 2$"):
        made(FitnetMkd, FitnetMkdConfig(hint_stage=3), 2)
