"""Multi-teacher distillation with meta-learned weights (MMKD; Zhang et al. 2023).

Two small networks give each sample its weights over teachers, one for logits and one for feature maps. Every few
batches they learn: the student is taught virtually on images that it got wrong, then takes a virtual step by
cross-entropy, and the cross-entropy that is left on these images is differentiated through all these steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.features import FeatureNet, Features
from pipeline.config import Config
from pipeline.data.batches import Batch
from pipeline.errors import UserError
from pipeline.training import distributed, optim
from pipeline.training.losses import cross_entropy
from pipeline.training.methods.ca_mkd import weighted_distance, weighted_kd
from pipeline.training.methods.maps import pooled
from pipeline.training.methods.projectors import BatchNorm, Shape
from pipeline.training.objective import Moment
from pipeline.training.step import Lesson, Setup, StudentStep
from pipeline.training.student import Distillation

Values = dict[str, Tensor]
"""A module's trained parameters by name, at values that need not be its own."""


class Projector(nn.Sequential):
    """The student's map (B, C_s, h, w) with a teacher's channels: 1×1, 3×3 and 1×1 convolutions with BN and ReLU."""

    def __init__(self, student: int, teacher: int) -> None:
        mid = max(1, student // 2)
        layers: list[nn.Module] = []
        for before, after, side in ((student, mid, 1), (mid, mid, 3), (mid, teacher, 1)):
            layers += [nn.Conv2d(before, after, side, padding=side // 2), BatchNorm(after), nn.ReLU()]
        super().__init__(*layers)


class Projectors(nn.Module):
    """The student's map as each teacher's: K of (B, C_k, h_k, w_k), at the smaller size of student and teacher."""

    def __init__(self, student: Shape, teachers: Sequence[Shape]) -> None:
        super().__init__()
        self.sizes = [(min(student[1], t[1]), min(student[2], t[2])) for t in teachers]
        self.each = nn.ModuleList(Projector(student[0], t[0]) for t in teachers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [projector(pooled(x, size)) for projector, size in zip(self.each, self.sizes, strict=True)]


class Weigher(nn.Module):
    """Weights over K teachers for logits and for maps, each (K, B) with columns that sum to 1.

    Args:
        classes: N. channels: of the student's map and of the teachers'.
    """

    def __init__(self, classes: int, channels: Sequence[int]) -> None:
        super().__init__()
        networks = len(channels)
        self.of_logits = self._network(networks * classes, networks - 1)
        self.of_maps = self._network(sum(channels), networks - 1)

    @staticmethod
    def _network(width: int, teachers: int) -> nn.Sequential:
        mid = width // 2
        return nn.Sequential(nn.Linear(width, mid), nn.ReLU(), nn.Linear(mid, teachers), nn.Softmax(dim=1))

    def forward(self, logits: Sequence[Tensor], maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, N) and maps (B, C, h, w) of all networks, the student first."""
        of_logits, of_maps = torch.cat([*logits], dim=1), torch.cat([x.mean(dim=(2, 3)) for x in maps], dim=1)
        return self.of_logits(of_logits).T, self.of_maps(of_maps).T


class HardImages:
    """Images as the student saw them: at first all of a batch, and once it is full those that the student got wrong.

    Args:
        size: how many it holds. shape: (C, H, W).
    """

    def __init__(self, size: int, shape: Sequence[int], device: torch.device) -> None:
        self.x, self.y = torch.zeros((size, *shape), device=device), torch.zeros(size, dtype=torch.int64, device=device)
        self.filled = 0

    def offer(self, x: Tensor, y: Tensor, wrong: Tensor, skipped: Tensor, generator: torch.Generator) -> None:
        """Take what fits of a batch (b,C,H,W), (b,); where it is full, those that are `wrong` (b,) replace random ones.

        Nothing where `skipped`; a GPU is synchronised until it is full only.
        """
        room = len(self.y) - self.filled
        if room and not skipped:
            taken = slice(self.filled, self.filled + min(room, len(y)))
            self.x[taken], self.y[taken] = x[:room], y[:room]
            self.filled = taken.stop
        elif not room:
            at = torch.randperm(len(self.y), generator=generator)[: len(y)].to(y.device)
            left = ~wrong[: len(at)] | skipped
            self.x[at] = torch.where(left[:, None, None, None], self.x[at], x[: len(at)])
            self.y[at] = torch.where(left, self.y[at], y[: len(at)])

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """At most n of them, without replacement: images and labels."""
        at = torch.randperm(self.filled, generator=generator)[:n].to(self.y.device)
        return self.x[at], self.y[at]

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x, "y": self.y, "filled": self.filled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.x.copy_(state["x"])
        self.y.copy_(state["y"])
        self.filled = state["filled"]


def leaves(module: nn.Module) -> Values:
    """A module's trained parameters, as leaves of a new graph."""
    return {name: p.detach().requires_grad_() for name, p in module.named_parameters() if p.requires_grad}


def at(module: nn.Module, values: Values, x: Tensor) -> Any:
    """module(x) at these values; its own parameters and running statistics stay as they are."""
    statistics = {name: value.clone() for name, value in module.named_buffers()}
    return functional_call(module, {**statistics, **values}, (x,))


def derivative(of: Tensor | Sequence[Tensor], by: Sequence[Tensor], along: Sequence[Tensor] | None = None) -> Any:
    """The gradient of `of` (weighted with `along`) with respect to each tensor; it can be differentiated again."""
    return torch.autograd.grad(of, by, along, create_graph=True, materialize_grads=True)


def stepped(values: Values, gradient: Sequence[Tensor], lr: float) -> Values:
    """The values after one step of gradient descent."""
    return {name: value - lr * g for (name, value), g in zip(values.items(), gradient, strict=True)}


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Neither compiled passes nor fused attention, which have no second derivative."""
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        yield


class Mmkd(StudentStep):
    """Lesson: `logits` (n, K, N) and `map_k`, each teacher's last map, at the smaller size of student and teacher."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        m, student, taught = self.method, setup.student_maps[-1], [maps[-1] for maps in setup.teacher_maps]
        self.own["projectors"] = Projectors(student, taught)
        # not among its own modules, which the student's optimiser trains
        weigher = Weigher(setup.num_classes, [student[0], *(t[0] for t in taught)]).to(setup.device)
        self._weigher = (weigher,)
        self._optimizer = optim.optimizer("adam", [(weigher, m.meta_lr)], m.meta_weight_decay, 0.0)
        self.hard = HardImages(m.buffer_size, setup.data.train.images.shape[1:], setup.device)
        self._drawn = setup.data.train.batch_size
        self._seen: tuple[Batch, Tensor, Moment] | None = None

    @property
    def weigher(self) -> Weigher:
        return self._weigher[0]

    def lesson(self, seen: Sequence[Features], y: Tensor) -> Lesson:
        sizes: Any = self.own["projectors"].sizes
        maps = {f"map_{k}": pooled(s.maps[-1], size) for k, (s, size) in enumerate(zip(seen, sizes, strict=True))}
        return {"logits": torch.stack([s.logits.float() for s in seen], dim=1)} | maps

    def terms(self, student: Features, lesson: Lesson, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        logits, feature = student.logits, student.maps[-1]
        with torch.no_grad():
            weights = self._weights(logits, feature, lesson)
            self.weighed = weights[0].T if self.method.kd_alpha else None
            guess = logits.argmax(dim=1)
            self._seen = batch, (guess != batch.y) & (guess != batch.y_b), moment
        return self._weighted(logits, self.own["projectors"](feature), lesson, weights)

    def _maps(self, lesson: Lesson) -> list[Tensor]:
        return [lesson[f"map_{k}"] for k in range(len(self._teachers))]

    def _weights(self, logits: Tensor, feature: Tensor, lesson: Lesson) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.weigher(
            [logits, *lesson["logits"].unbind(dim=1)], [feature, *self._maps(lesson)]
        )
        return found

    def _weighted(
        self, logits: Tensor, projected: Sequence[Tensor], lesson: Lesson, weights: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        targets = torch.stack([self.compared(t) for t in lesson["logits"].unbind(dim=1)])
        return {
            "mmkd_kd": weighted_kd(self.compared(logits), targets, weights[0], self.method.tau),
            "mmkd_feat": weighted_distance(projected, self._maps(lesson), weights[1]),
        }

    # the weight networks ---------------------------------------------------------------------------------------------

    def updated(self, skipped: Tensor, lr: float) -> None:
        if self._seen is None or len(self._teachers) == 1:
            return
        (batch, wrong, moment), self._seen = self._seen, None
        skipped = skipped.bool()
        self.hard.offer(batch.x, batch.y, wrong, skipped, self.streams.generator("mmkd_places", *moment))
        if moment.batch % self.method.meta_interval == 0 and self.hard.filled:
            self._learn(skipped, lr, moment)

    def _learn(self, skipped: Tensor, lr: float, moment: Moment) -> None:
        """Update the weight networks; not where the student's update was `skipped`, nor by what is not finite."""
        x, y = self.hard.draw(self._drawn, self.streams.generator("mmkd_drawn", *moment))
        self.streams.seed_global("mmkd_network", *moment)
        parameters = [*self.weigher.parameters()]
        with differentiable_twice():
            gradient = torch.autograd.grad(self.meta_loss(x, y, lr), parameters, materialize_grads=True)
        for parameter, g in zip(parameters, gradient, strict=True):
            parameter.grad = g
        bad = skipped | ~torch.isfinite(torch.nn.utils.get_total_norm(gradient))
        self._optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # see optim.update
        self._optimizer.step()

    def meta_loss(self, x: Tensor, y: Tensor, lr: float) -> Tensor:
        """The student's cross-entropy after its virtual steps on images x (n,C,H,W) with labels y (n,), a scalar.

        Steps of plain gradient descent at learning rate `lr`. In each the weights are held fixed, as in the student's
        real updates, but the derivative knows that those of a later step depend on the earlier ones.
        """
        with torch.no_grad():
            lesson = self.lesson([teacher(x) for teacher in self._teachers], y)
        x = x.detach().requires_grad_()  # a partly frozen student's outputs have a gradient then, if only of 0
        student, projectors = self._student[0], self.own["projectors"]
        theta, psi = leaves(student), leaves(projectors)
        for _ in range(self.method.meta_steps):
            seen = at(student, theta, x)
            outputs = seen.logits, seen.maps[-1]
            weights = self._weights(*outputs, lesson)
            # the terms depend on copies: a derivative with respect to these passes the weights by
            logits, feature = (value.view_as(value) for value in outputs)
            terms = self._weighted(logits, at(projectors, psi, feature), lesson, weights)
            loss = torch.stack([weight * terms[name].mean() for name, weight in self.term_weights().items()]).sum()
            by_logits, by_feature, *by_psi = derivative(loss, [logits, feature, *psi.values()])
            by_theta = derivative(outputs, [*theta.values()], (by_logits, by_feature))
            theta, psi = stepped(theta, by_theta, lr), stepped(psi, by_psi, lr)
        loss = cross_entropy(at(student, theta, x).logits, y).mean()
        theta = stepped(theta, derivative(loss, [*theta.values()]), lr)
        return cross_entropy(at(student, theta, x).logits, y).mean()

    # state -----------------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"weigher": self.weigher, "meta_optimizer": self._optimizer, "hard": self.hard}
        return super().own_state() | {name: part.state_dict() for name, part in parts.items()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        super().load_own_state(state)
        self.weigher.load_state_dict(state["weigher"])
        optim.restore_optimizer(self._optimizer, state["meta_optimizer"])
        self.hard.load_state_dict(state["hard"])


class OneProcess(Distillation):
    """Several processes are refused, before teachers are fine-tuned: the weight networks learn from one's images."""

    @staticmethod
    def check(config: Config, student: FeatureNet, num_classes: int) -> None:
        processes = distributed.world().size
        if config.method.distils and processes > 1:
            raise UserError(
                f"method=mmkd with {processes} processes: its weight networks learn in one; start it without torchrun"
            )
