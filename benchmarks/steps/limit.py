"""The limit: the passes of an A- or B-step and nothing else, on random images that lie on the device.

A-step: student and teachers forward, fusion forward and backward, optimiser. B-step: student forward and backward,
optimiser; teachers, and with a fusion the student once more as the query, forward on the clean images; with
`kd_view=mixed` teachers forward on the mixed images, the student's training pass being the query. Losses are the
plainest of their kind: cross-entropy and KL divergence; methods beside ASIB have those of `losses`, and one batch of
images for all networks. No augmentation, mixing, norm of gradients, metric or record.
"""

import copy
from collections.abc import Callable
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.steps.cases import Case
from benchmarks.steps.clock import algorithms, timed
from benchmarks.steps.losses import LOSSES, Out, Sizes, divergence
from models.features import FeatureNet, decompose, paired_maps, undisturbed
from models.fold import folded
from pipeline.config import Config
from pipeline.training import optim
from pipeline.training.methods.asib.fusion import Fusion

KINDS = ("eager", "folded", "compiled")
IMAGE = (3, 32, 32)


class Bare(nn.Module):
    """A network without its wrapper: (B, C, H, W) → logits, feat_2d, and the maps that it records.

    Args:
        net: it is copied.
    """

    def __init__(self, net: FeatureNet) -> None:
        super().__init__()
        self.net, self.stages = copy.deepcopy(net.net), net.stages

    def forward(self, x: Tensor) -> Out:
        _, feature, logits, maps = decompose(self.net, x, self.stages)
        return Out(logits, feature, maps)


def fastest(net: FeatureNet, dtype: torch.dtype | None, input_size: tuple[int, int, int]) -> Bare:
    """A frozen copy in eval mode, its batch norms folded as the pipeline folds them, its weights cast once.

    Args:
        dtype: what autocast computes in; the pipeline's weights are cast in every pass, since autocast keeps casts of
            weights that need a gradient only. None: float32.
        input_size: (in_chans, H, W).
    """
    made = Bare(folded(net, input_size)).eval().to(memory_format=torch.channels_last)
    if dtype is not None:
        for module in made.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)
    return made


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
        self.dtype, self.device, self.kind = case.dtype, device, kind
        self.method: Any = config.method
        fuses = case.method == "asib" and len(teachers) > 1
        self.clean = self.method.kd_view == "clean"
        if self.method.maps:
            paired_maps(student, teachers, IMAGE)
        classes = student.num_classes
        if kind == "eager":
            frozen = [Bare(t).requires_grad_(False).eval() for t in teachers]
        else:
            frozen = [fastest(t, case.dtype, IMAGE) for t in teachers]
        student_net = Bare(student).to(memory_format=torch.channels_last)
        self.networks: dict[str, nn.Module] = {"student": student_net}
        self.networks |= {f"teacher_{k}": net for k, net in enumerate(frozen)}
        o = config.optim
        trained: list[nn.Module] = [student_net]
        self.loss: nn.Module | None = None
        if case.method in LOSSES:
            with undisturbed(student_net):
                blank = torch.zeros(1, *IMAGE, device=device)
                sizes = Sizes(case.batch, case.images, student_net(blank), [net(blank) for net in frozen])
            self.loss = LOSSES[case.method](self.method, sizes).to(device)
            trained += [self.loss] if list(self.loss.parameters()) else []
        groups = [(net, o.student_lr) for net in trained]
        self.optimizers = {"b": optim.optimizer(o.optimizer, groups, o.student_weight_decay, o.momentum)}
        if fuses:
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

    def _compiled(self, net: nn.Module) -> Any:
        return torch.compile(net, mode="reduce-overhead" if self.device.type == "cuda" else "default")

    def step(self, which: str) -> None:
        """One update."""
        if self.kind == "compiled":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            loss = self._a_loss() if which == "a" else self._b_loss()
        optimizer = self.optimizers[which]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def _teachers(self, x: Tensor) -> list[Out]:
        """Each teacher's outputs."""
        return [net(x) for name, net in self.run.items() if name.startswith("teacher_")]

    @torch.no_grad()
    def _asked(self) -> Out:
        """The student's outputs for the clean images, in eval mode: a pass for the query alone."""
        self.networks["student"].eval()
        found: Out = self.run["student"](self.x)
        return found

    def _a_loss(self) -> Tensor:
        seen, student, tau = self._teachers(self.x), self._asked(), self.method.tau
        self.networks["fusion"].train()
        synergy = self.run["fusion"](student.feature, [s.feature for s in seen], self.eps)
        mu, logvar = synergy.mu, synergy.logvar
        bottleneck = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()
        distance = divergence(synergy.logits, F.softmax(student.logits.float() / tau, dim=1), tau)
        loss: Tensor = F.cross_entropy(synergy.logits, self.y) + distance + self.method.ib_beta * bottleneck
        return loss

    def _b_loss(self) -> Tensor:
        seen = self._teachers(self.x if self.clean else self.x_mixed)
        asked = self._asked().feature if "fusion" in self.run and self.clean else None
        self.networks["student"].train()
        student: Out = self.run["student"](self.x_mixed)
        ce = F.cross_entropy(student.logits.float(), self.y)
        if self.loss is not None:
            teachers = [net.net for name, net in self.networks.items() if name.startswith("teacher_")]
            loss: Tensor = ce + self.loss(student, seen, self.y, teachers)
            return loss
        with torch.no_grad():
            target = seen[0].logits
            if "fusion" in self.run:
                self.networks["fusion"].eval()
                query = student.feature.detach() if asked is None else asked
                target = self.run["fusion"](query, [s.feature for s in seen], sample="never").logits
            target = F.softmax(target.float() / self.method.tau, dim=1)
        return ce + divergence(student.logits, target, self.method.tau)

    def seconds(self, which: str, steps: int) -> float:
        """Seconds that `steps` steps take."""
        with algorithms(deterministic=False):
            found = timed(self.device, lambda: self.step(which), steps)
        if self.kind == "compiled":
            _unmark()
        return found


def _unmark() -> None:
    """Once steps are marked, all in the process have to be; those of ours are not (`models.features.kept`)."""
    from torch._inductor.cudagraph_trees import MarkStepBox

    MarkStepBox.mark_step_counter = 0


def best(
    case: Case, make: Callable[[str], Limit], compile_: bool, steps: int
) -> tuple[dict[str, Limit], dict[str, dict[str, Any]]]:
    """The fastest kind for each step, and each kind's seconds per step in a short trial (or why it failed).

    Args:
        compile_: try the compiled kind too.
    """
    tried: dict[str, dict[str, Any]] = {}
    limits: dict[str, Limit] = {}
    for kind in KINDS if compile_ else KINDS[:2]:
        try:
            limits[kind] = make(kind)
            for which in case.steps:
                limits[kind].seconds(
                    which, 3 if kind == "compiled" else 1
                )  # not counted: warm-up, recordings of graphs
            tried[kind] = {which: round(limits[kind].seconds(which, steps) / steps, 5) for which in case.steps}
        except Exception as error:
            if kind != "compiled":
                raise
            tried[kind] = {"failed": f"{type(error).__name__}: {error}"[:200]}  # the other kinds still count
    fastest_kind = {which: min(tried, key=lambda k: tried[k].get(which, inf)) for which in case.steps}
    return {which: limits[kind] for which, kind in fastest_kind.items()}, tried
