"""MMKD's weights and terms against loops, and its meta-gradient against differences of a loop in float64."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from models.features import FeatureNet
from pipeline.config import Config
from pipeline.config.inactive import inactive
from pipeline.config.methods.mmkd import MmkdConfig
from pipeline.config.schema import configure
from pipeline.data.batches import Batch
from pipeline.errors import UserError
from pipeline.training import distributed
from pipeline.training.losses import kd
from pipeline.training.methods.mmkd import HardImages, Mmkd, Projectors, differentiable_twice
from pipeline.training.objective import Moment
from pipeline.training.rng import Streams
from pipeline.training.step import Setup
from pipeline.training.student import task_of
from tests.pipeline.training.builders import CLASSES, CPU, TinyNet, copied, softmax
from tests.pipeline.training.methods.against import random
from tests.pipeline.training.methods.stepping import MOMENT, batches, first

ROOT = Path(__file__).resolve().parents[4]
LR, DONE, SKIPPED = 0.2, torch.tensor(False), torch.tensor(True)


class MappedNet(TinyNet):
    """A TinyNet that gives its last map."""

    def forward_intermediates(self, x: Tensor, stages: list[int]) -> tuple[Tensor, list[Tensor]]:
        raw = self.forward_features(x)
        return raw, [raw]


def net(width: int, seed: int) -> FeatureNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = FeatureNet(MappedNet(width))
    made.net.fc.weight.data.mul_(8)  # type: ignore[operator,union-attr]
    made.record([0])
    return made


def made(widths: tuple[int, ...] = (5, 7), seed: int = 0, **method: Any) -> Mmkd:
    """A student of width 6 with maps of 4 × 4; `widths`: of the teachers."""
    student, teachers = net(6, 0), [net(width, 100 + k).eval() for k, width in enumerate(widths)]
    settings, data = MmkdConfig(**{"buffer_size": 10, **method}), SimpleNamespace(train=batches())
    shapes = [[(width, 4, 4)] for width in widths]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Mmkd(
            Setup(student, teachers, settings, Streams(0), CPU, CLASSES, data, [(6, 4, 4)], shapes)  # type: ignore[arg-type]
        ).train()  # type: ignore[return-value]


def terms(step: Mmkd, batch: Batch, moment: Moment = MOMENT) -> dict[str, Tensor]:
    with torch.no_grad():
        lesson = step.lesson([t(batch.x) for t in step._teachers], batch.y)
    return step.terms(step.trainable_module(batch.x_mixed), lesson, batch, moment)


# the formula, in float64 ---------------------------------------------------------------------------------------------


class Exact:
    """A step's networks in float64, and what the formula makes of them."""

    def __init__(self, step: Mmkd) -> None:
        self.networks = [copy.deepcopy(n).double() for n in (step._student[0], step.own["projectors"], step.weigher)]
        self.teachers = [copy.deepcopy(t).double() for t in step._teachers]
        self.weigher, self.method = self.networks[2], step.method

    def weights(self, logits: list[Tensor], maps: list[Tensor]) -> list[list[list[float]]]:
        """Of logits and of maps: for each sample, one of each teacher."""
        pooled = [x.flatten(2).sum(dim=2) / x[0, 0].numel() for x in maps]
        found = []
        for network, inputs in ((self.weigher.of_logits, logits), (self.weigher.of_maps, pooled)):
            (w1, b1, w2, b2), rows = [p.detach() for p in network.parameters()], torch.cat(inputs, dim=1).detach()
            found.append([softmax((w2 @ (w1 @ row + b1).clamp_min(0) + b2).tolist()) for row in rows])
        return found

    def terms(self, student: nn.Module, projectors: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both terms, (B,)."""
        s, tau = student(x), self.method.tau
        with torch.no_grad():
            taught = [t(x) for t in self.teachers]
        of_logits, of_maps = self.weights(
            [s.logits, *(t.logits for t in taught)], [s.maps[-1], *(t.maps[-1] for t in taught)]
        )
        divergences, distances = [], []
        projected = [each(s.maps[-1]) for each in projectors.each]  # type: ignore[union-attr]
        for i in range(len(x)):
            log_q = s.logits[i] / tau - (s.logits[i] / tau).exp().sum().log()
            divergence, distance = torch.zeros(2, dtype=torch.float64).unbind()
            for k, t in enumerate(taught):
                p = torch.tensor(softmax(t.logits[i].tolist(), tau), dtype=torch.float64)
                divergence = divergence + of_logits[i][k] * tau**2 * (p * (p.log() - log_q)).sum()
                square = (projected[k][i] - t.maps[-1][i]) ** 2
                distance = distance + of_maps[i][k] * square.sum() / square.numel()
            divergences.append(divergence)
            distances.append(distance)
        return torch.stack(divergences), torch.stack(distances)

    def meta_loss(self, x: Tensor, y: Tensor, lr: float) -> float:
        """Two steps by the terms and one by cross-entropy, each a plain update; then the cross-entropy."""
        student, projectors = (copy.deepcopy(n) for n in self.networks[:2])

        def descend(loss: Tensor) -> None:
            parameters = [p for p in [*student.parameters(), *projectors.parameters()] if p.requires_grad]
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                p.data -= 0 if g is None else lr * g

        def ce() -> Tensor:
            logits = student(x).logits
            return (logits.exp().sum(dim=1).log() - logits[torch.arange(len(y)), y]).sum() / len(y)

        for _ in range(self.method.meta_steps):
            divergence, distance = self.terms(student, projectors, x)
            descend(self.method.kd_alpha * divergence.mean() + self.method.feat_alpha * distance.mean())
        descend(ce())
        return ce().item()


def off(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


# weights and terms ---------------------------------------------------------------------------------------------------


def test_each_network_gives_each_sample_weights_that_sum_to_1() -> None:
    step, batch = made(), first(batches())
    seen = [n(batch.x) for n in (step.trainable_module, *step._teachers)]
    logits, maps = [s.logits for s in seen], [s.maps[-1] for s in seen]
    expected = Exact(step).weights([v.double() for v in logits], [m.double() for m in maps])
    for found, loop in zip(step.weigher(logits, maps), expected, strict=True):
        assert found.shape == (2, len(batch.y))
        assert off(found.T, torch.tensor(loop, dtype=torch.float64)) < 1e-6
        assert found.sum(dim=0).tolist() == pytest.approx([1.0] * len(batch.y))
        assert found.std(dim=1).min() > 1e-4, "they are a sample's own"
    terms(step, batch)
    assert step.weighed is not None
    assert off(step.weighed, torch.tensor(expected[0], dtype=torch.float64)) < 1e-6, "those of the logits are logged"


@pytest.mark.parametrize("widths", [(5,), (5, 7), (5, 7, 4)])
def test_the_terms_and_their_gradients_are_the_formulas(widths: tuple[int, ...]) -> None:
    step, batch = made(widths), first(batches())
    exact = Exact(step)
    expected = exact.terms(*exact.networks[:2], batch.x.double())
    for (name, found), value in zip(terms(step, batch).items(), expected, strict=True):
        assert off(found, value) < 1e-5, name
        for ours, theirs in zip((step.trainable_module, step.own["projectors"]), exact.networks[:2], strict=True):
            gradients = [
                torch.autograd.grad(loss.sum(), [*n.parameters()], retain_graph=True, materialize_grads=True)
                for loss, n in ((found, ours), (value, theirs))
            ]
            largest = max(float(g.abs().max()) for g in gradients[1])
            assert max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)) <= 1e-5 * largest, name
    assert step.term_weights() == {"mmkd_kd": 1.0, "mmkd_feat": 100.0}
    assert all(p.grad is None for p in step.weigher.parameters())


def test_one_teacher_is_distilled_as_by_kd_and_one_hint_and_no_weights_are_learned() -> None:
    step, batch = made((5,)), first(batches())
    before, found = copied(step.weigher), terms(step, batch)
    student, teacher = step.trainable_module(batch.x), step._teachers[0](batch.x)
    torch.testing.assert_close(found["mmkd_kd"], kd(student.logits, teacher.logits, 4.0))
    (projected,) = step.own["projectors"](student.maps[-1])
    torch.testing.assert_close(found["mmkd_feat"].mean(), F.mse_loss(projected, teacher.maps[-1]))
    step.updated(DONE, LR)
    assert step.hard.filled == 0
    assert all(torch.equal(v, before[name]) for name, v in step.weigher.state_dict().items())


@pytest.mark.parametrize(
    ("student", "teacher"), [((3, 8, 4), (5, 4, 4)), ((1, 2, 2), (4, 4, 8)), ((3, 4, 4), (2, 4, 4))]
)
def test_maps_are_compared_at_the_smaller_size(student: tuple[int, int, int], teacher: tuple[int, int, int]) -> None:
    (found,) = Projectors(student, [teacher])(random(2, *student))
    assert found.shape == (2, teacher[0], min(student[1], teacher[1]), min(student[2], teacher[2]))


# the meta-gradient ---------------------------------------------------------------------------------------------------


def meta_gradient(step: Mmkd, x: Tensor, y: Tensor, lr: float = LR) -> Tensor:
    """(P,), of all the weight networks' parameters."""
    found = torch.autograd.grad(step.meta_loss(x, y, lr), [*step.weigher.parameters()], materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def difference(value: Callable[[], float], parameters: list[Tensor], along: Tensor, h: float = 1e-5) -> float:
    """The derivative of `value` along a direction in all parameters."""
    parts = [part.view_as(p) for part, p in zip(along.split([p.numel() for p in parameters]), parameters, strict=True)]
    found = []
    for sign in (1, -2, 1):
        for p, part in zip(parameters, parts, strict=True):
            p.data += sign * h * part
        found.append(value())
    return (found[0] - found[1]) / (2 * h)


@pytest.mark.parametrize("meta_steps", [1, 2])
@pytest.mark.parametrize("head_only", [False, True])
def test_the_meta_gradient_is_the_derivative_of_the_loss_after_the_virtual_steps(
    meta_steps: int, head_only: bool
) -> None:
    """Along random directions through all parameters, and along the largest ones alone; weights depend on steps too."""
    step, batch = made(meta_steps=meta_steps, feat_alpha=3.0), first(batches())
    if head_only:
        step._student[0].requires_grad_(False).net.fc.requires_grad_()  # type: ignore[operator,union-attr]
    found, exact = meta_gradient(step, batch.x, batch.y).double(), Exact(step)
    assert step.meta_loss(batch.x, batch.y, LR).item() == pytest.approx(
        exact.meta_loss(batch.x.double(), batch.y, LR), rel=1e-5
    )
    directions = [random(len(found), seed=k).double() for k in range(4)]
    directions += [F.one_hot(i, len(found)).double() for i in found.abs().topk(4).indices]
    for along in directions:
        expected = difference(
            lambda: exact.meta_loss(batch.x.double(), batch.y, LR), [*exact.weigher.parameters()], along
        )
        assert (found @ along).item() == pytest.approx(expected, rel=1e-4, abs=1e-5 * float(found.norm()))


def test_without_a_step_or_a_difference_of_the_teachers_there_is_nothing_to_learn() -> None:
    step, batch = made(feat_alpha=0.0), first(batches())
    assert meta_gradient(step, batch.x, batch.y).abs().max() > 1e-4
    assert meta_gradient(step, batch.x, batch.y, lr=0.0).abs().max() == 0
    twins = made((5, 5), feat_alpha=0.0)
    twins._teachers[1].load_state_dict(twins._teachers[0].state_dict())
    assert meta_gradient(twins, batch.x, batch.y).abs().max() < 1e-7


def test_attention_too_has_a_second_derivative() -> None:
    """Fused kernels, which torch chooses otherwise, have none."""
    q = random(1, 2, 3, 4).requires_grad_()
    found = []
    for attend in (F.scaled_dot_product_attention, lambda q, k, v: (q @ k.mT / 2).softmax(dim=-1) @ v):
        with differentiable_twice():
            (slope,) = torch.autograd.grad(attend(q, q, q).square().sum(), q, create_graph=True)
            found.append(torch.autograd.grad(slope.square().sum(), q)[0])
    torch.testing.assert_close(*found)


def test_a_virtual_step_leaves_the_student_and_its_statistics_as_they_are() -> None:
    step, batch = made(), first(batches())
    networks = [step._student[0], step.own, *step._teachers]
    before = [copied(n) for n in networks]
    meta_gradient(step, batch.x, batch.y)
    assert all(
        torch.equal(v, was[k]) for n, was in zip(networks, before, strict=True) for k, v in n.state_dict().items()
    )
    assert all(p.grad is None for n in networks for p in n.parameters())


def test_the_teacher_that_knows_the_labels_gains_weight() -> None:
    """One teacher's logits are the labels', the other's those of the next class."""
    step, batch, shares = made((5, 5), feat_alpha=0.0), first(batches()), []

    def saying(teacher: Any, shift: int) -> Callable[[Tensor], Any]:
        said = 8.0 * F.one_hot((batch.y + shift) % CLASSES, CLASSES)
        return lambda x: teacher(x)._replace(logits=said)

    step._teachers = tuple(saying(t, k) for k, t in enumerate(step._teachers))  # type: ignore[assignment]
    seen, lesson = step._student[0](batch.x), step.lesson([t(batch.x) for t in step._teachers], batch.y)
    descent = torch.optim.Adam(step.weigher.parameters(), lr=0.01)
    for _ in range(10):
        shares.append(step._weights(seen.logits, seen.maps[-1], lesson)[0][0].mean().item())
        descent.zero_grad()
        step.meta_loss(batch.x, batch.y, LR).backward(inputs=[*step.weigher.parameters()])
        descent.step()
    assert shares == sorted(shares)
    assert shares[-1] > 3 * shares[0]


# hard images and updates ---------------------------------------------------------------------------------------------


def pictures(values: list[int]) -> tuple[Tensor, Tensor]:
    y = torch.tensor(values)
    return y[:, None, None, None].float().expand(-1, 1, 2, 2), y


def held(images: HardImages) -> list[int]:
    assert torch.equal(images.x, images.y[:, None, None, None].float().expand_as(images.x)), "with its own label"
    return images.y.tolist()


def test_the_buffer_takes_all_until_it_is_full_and_then_what_the_student_got_wrong() -> None:
    images, generator = HardImages(5, (1, 2, 2), CPU), torch.Generator().manual_seed(0)
    images.offer(*pictures([1, 2, 3]), torch.zeros(3, dtype=torch.bool), DONE, generator)
    images.offer(*pictures([9, 9, 9]), torch.ones(3, dtype=torch.bool), SKIPPED, generator)
    assert sorted(images.draw(9, generator)[1].tolist()) == [1, 2, 3]
    images.offer(*pictures([4, 5, 6]), torch.zeros(3, dtype=torch.bool), DONE, generator)
    assert held(images) == [1, 2, 3, 4, 5]
    images.offer(*pictures([7, 8, 9]), torch.tensor([True, False, True]), DONE, generator)
    now = held(images)
    assert set(now) > {7, 9}
    assert len(set(now) & {1, 2, 3, 4, 5}) == 3
    images.offer(*pictures([10, 11]), torch.ones(2, dtype=torch.bool), SKIPPED, generator)
    assert held(images) == now
    images.offer(*pictures([*range(20, 30)]), torch.ones(10, dtype=torch.bool), DONE, generator)
    assert sorted(held(images)) == [20, 21, 22, 23, 24]
    x, y = images.draw(3, generator)
    assert (len(x), len(set(y.tolist()))) == (3, 3)


def test_of_a_mixed_image_either_label_is_right() -> None:
    step, batch = made(), first(batches())
    guess = step.trainable_module(batch.x).logits.argmax(dim=1)
    other = (guess + 1) % CLASSES
    for y, y_b, expected in ((guess, other, False), (other, guess, False), (other, other, True)):
        terms(step, batch._replace(y=y, y_b=y_b))
        assert step._seen is not None
        assert step._seen[1].tolist() == [expected] * len(y)


def test_weights_are_learned_every_few_batches_unless_the_update_was_skipped() -> None:
    step, batch, moved = made(meta_interval=3), first(batches()), []
    for i, skipped in enumerate((SKIPPED, DONE, DONE, DONE, DONE, DONE, SKIPPED, DONE, DONE, DONE)):
        before = copied(step.weigher)
        terms(step, batch, Moment("b", 0, i))
        step.updated(skipped, LR)
        step.updated(skipped, LR)  # an epoch in which nothing is distilled
        moved.append(any(not torch.equal(v, before[name]) for name, v in step.weigher.state_dict().items()))
    assert [i for i, it in enumerate(moved) if it] == [3, 9]


def test_the_update_is_adams_with_weight_decay_by_the_meta_gradient() -> None:
    step, batch = made(meta_lr=0.01, meta_weight_decay=0.1, buffer_size=7), first(batches())
    weights = [p.detach().clone().double() for p in step.weigher.parameters()]
    expected = torch.optim.Adam(weights, lr=0.01, weight_decay=0.1)
    terms(step, batch)
    step.updated(DONE, LR)
    x, y = step.hard.draw(7, step.streams.generator("mmkd_drawn", *MOMENT))
    other = made(meta_lr=0.01, meta_weight_decay=0.1, buffer_size=7)
    for w, g in zip(
        weights, torch.autograd.grad(other.meta_loss(x, y, LR), [*other.weigher.parameters()]), strict=True
    ):
        w.grad = g.double()
    expected.step()
    for found, w in zip(step.weigher.parameters(), weights, strict=True):
        torch.testing.assert_close(found.double(), w, rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_changes_no_weights() -> None:
    step, batch = made(), first(batches())
    before = copied(step.weigher)
    terms(step, batch)
    step.updated(DONE, float("inf"))
    assert all(torch.equal(v, before[name]) for name, v in step.weigher.state_dict().items())


# settings ------------------------------------------------------------------------------------------------------------


def test_the_methods_file_has_the_published_values() -> None:
    chosen = MmkdConfig.model_validate(yaml.safe_load((ROOT / "conf/method/mmkd.yaml").read_text()))
    assert chosen == MmkdConfig()
    assert (chosen.feat_alpha, chosen.meta_interval, chosen.meta_lr, chosen.buffer_size) == (100, 5, 1e-3, 256)


def configured(teachers: int, **method: Any) -> Config:
    model = {"teachers": [{"name": "cifar_resnet8"}] * teachers}
    return configure({"method": {"name": "mmkd", **method}, "model": model})


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(2)
    task_of(config.method).check(config, net(6, 0), CLASSES)
    monkeypatch.setattr(distributed, "world", lambda: distributed.World(0, 2))
    with pytest.raises(UserError, match=r"^method=mmkd with 2 processes: .* start it without torchrun$"):
        task_of(config.method).check(config, net(6, 0), CLASSES)


def test_a_buffer_of_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        MmkdConfig(buffer_size=1)


def test_of_one_teacher_keys_of_the_weight_networks_cannot_act() -> None:
    found = [inactive(configured(count, meta_lr=0.01)) for count in (1, 2)]
    assert found == [["method.meta_lr: the weight of a single teacher is 1"], []]
