"""The limit: the passes of an A- or B-step and nothing else, on random images that lie on the device.

A-step: student and teachers forward, fusion forward and backward, optimiser. B-step: student forward and backward,
optimiser; teachers, and with a fusion the student once more as the query, forward on the clean images; with
`kd_view=mixed` teachers forward on the mixed images, the student's training pass being the query. Losses are the
plainest of their kind: cross-entropy and KL divergence. No augmentation, mixing, norm of gradients, metric or record.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.steps.bare import bare, fastest
from benchmarks.steps.cases import Case
from benchmarks.steps.clock import Window, algorithms
from models.features import FeatureNet
from pipeline.config import Config
from pipeline.training import optim
from pipeline.training.methods.asib.fusion import Fusion

KINDS = ("eager", "folded", "compiled")
IMAGE = (3, 32, 32)


class Limit:
    """The networks of a case, ready to make bare steps.

    Args:
        config: where the fusion's widths and the optimisers come from.
        student, teachers: copied.
        kind: `eager`: the networks as they are; `folded`: teachers with folded batch norms and cast weights;
            `compiled`: that, through torch.compile.

    Attributes:
        networks: what is run, by the names that the pipeline's costs have.
    """

    def __init__(
        self,
        case: Case,
        config: Config,
        student: FeatureNet,
        teachers: list[FeatureNet],
        device: torch.device,
        kind: str = "eager",
    ) -> None:
        self.case, self.device, self.kind = case, device, kind
        self.tau, self.beta = config.method.tau, config.method.ib_beta
        self.clean = config.method.kd_view == "clean"
        classes = student.num_classes
        if kind == "eager":
            frozen = [bare(t).requires_grad_(False).eval() for t in teachers]
        else:
            frozen = [fastest(t, case.dtype, IMAGE) for t in teachers]
        student_net: nn.Module = bare(student).to(memory_format=torch.channels_last)
        self.networks: dict[str, nn.Module] = {"student": student_net}
        self.networks |= {f"teacher_{k}": net for k, net in enumerate(frozen)}
        o = config.optim
        self.optimizers = {
            "b": optim.optimizer(o.optimizer, [(student_net, o.student_lr)], o.student_weight_decay, o.momentum)
        }
        fused = len(teachers) > 1
        if fused:
            fusion = Fusion(config.method, [t.feature_dim for t in teachers], student.feature_dim, classes).to(device)
            self.networks["fusion"] = fusion
            self.optimizers["a"] = optim.optimizer(
                o.a_step_optimizer, [(fusion, o.a_step_lr)], o.a_step_weight_decay, o.momentum
            )
            self.eps = torch.randn(case.batch, fusion.width, device=device)
        self.run = {name: self._compiled(net) if kind == "compiled" else net for name, net in self.networks.items()}
        shape = (case.batch, *IMAGE)
        self.x, self.x_mixed = (
            torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2)
        )
        self.y = torch.randint(classes, (case.batch,), device=device)
        self.work: dict[str, dict[str, float]] = {}
        """What an image of each step takes of the machine, where it was asked for."""

    def _compiled(self, net: nn.Module) -> nn.Module:
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        made: Any = torch.compile(net, mode=mode)
        return cast(nn.Module, made)

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.case.dtype is None else torch.autocast(self.device.type, dtype=self.case.dtype)

    # the steps -------------------------------------------------------------------------------------------------------

    def step(self, which: str) -> None:
        """One update."""
        if self.kind == "compiled":
            torch.compiler.cudagraph_mark_step_begin()
        with self._autocast():
            loss = self._a_loss() if which == "a" else self._b_loss()
        optimizer = self.optimizers[which]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def _teachers(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits and features of each."""
        return [net(x) for name, net in self.run.items() if name.startswith("teacher_")]

    @torch.no_grad()
    def _asked(self) -> tuple[Tensor, Tensor]:
        """The student's logits and feature of the clean images, in eval mode: a pass for the query alone."""
        self.networks["student"].eval()
        found: tuple[Tensor, Tensor] = self.run["student"](self.x)
        return found

    def _a_loss(self) -> Tensor:
        seen, student = self._teachers(self.x), self._asked()
        self.networks["fusion"].train()
        synergy = self.run["fusion"](student[1], [feature for _, feature in seen], self.eps)
        mu, logvar = synergy.mu, synergy.logvar
        bottleneck = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()
        divergence = self._divergence(synergy.logits, F.softmax(student[0].float() / self.tau, dim=1))
        loss: Tensor = F.cross_entropy(synergy.logits, self.y) + divergence + self.beta * bottleneck
        return loss

    def _b_loss(self) -> Tensor:
        seen = self._teachers(self.x if self.clean else self.x_mixed)
        asked = self._asked()[1] if "fusion" in self.run and self.clean else None
        self.networks["student"].train()
        logits, feature = self.run["student"](self.x_mixed)
        with torch.no_grad():
            target = seen[0][0]
            if "fusion" in self.run:
                self.networks["fusion"].eval()
                query = feature.detach() if asked is None else asked
                target = self.run["fusion"](query, [feature for _, feature in seen], sample="never").logits
            target = F.softmax(target.float() / self.tau, dim=1)
        logits = logits.float()
        return F.cross_entropy(logits, self.y) + self._divergence(logits, target)

    def _divergence(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.tau**2 * F.kl_div(F.log_softmax(logits / self.tau, dim=1), target, reduction="batchmean")

    # measuring -------------------------------------------------------------------------------------------------------

    def seconds(self, which: str, steps: int) -> float:
        """Seconds that `steps` steps take."""
        with algorithms(deterministic=False):
            window = Window(self.device)
            window.open()
            for _ in range(steps):
                self.step(which)
            found = window.shut()
        if self.kind == "compiled":
            _unmark()
        return found


def _unmark() -> None:
    """Once steps are marked, all in the process have to be; those of ours are not (`models.features.kept`)."""
    from torch._inductor.cudagraph_trees import MarkStepBox

    MarkStepBox.mark_step_counter = 0


def kinds(device: torch.device, compile_: bool) -> tuple[str, ...]:
    """What is tried: compiled always on a GPU, elsewhere where wanted (it takes minutes)."""
    return KINDS if compile_ or device.type == "cuda" else KINDS[:2]


def best(
    case: Case,
    make: Callable[[str], Limit],
    kinds_: tuple[str, ...],
    steps: int,
) -> tuple[dict[str, Limit], dict[str, dict[str, float | str]]]:
    """The fastest kind for each step, and what each kind took per step in a short trial (seconds, or why it failed)."""
    tried: dict[str, dict[str, float | str]] = {}
    fastest: dict[str, tuple[float, Limit]] = {}
    for kind in kinds_:
        try:
            limit = make(kind)
            for which in case.pair.steps:
                limit.seconds(which, 1 if kind != "compiled" else 3)  # not counted: first times, recordings of graphs
            taken = {which: limit.seconds(which, steps) / steps for which in case.pair.steps}
        except Exception as error:  # a network that cannot be compiled: the other kinds stand
            tried[kind] = {
                "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            }
            continue
        tried[kind] = {which: round(seconds, 5) for which, seconds in taken.items()}
        for which, seconds in taken.items():
            if which not in fastest or seconds < fastest[which][0]:
                fastest[which] = (seconds, limit)
    if len(fastest) < len(case.pair.steps):
        raise SystemExit(f"{case.name}: no kind of limit could be run: {tried}")
    return {which: limit for which, (_, limit) in fastest.items()}, tried
