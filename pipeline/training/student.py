"""The student's training, which all methods share: B-epochs, its moving average, freezing, selection, costs.

A method with phases of its own (ASIB's A-steps, factor transfer's paraphraser) subclasses `Distillation` in its file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from models import freeze
from models.features import FeatureNet, paired_maps
from models.fold import folded
from pipeline.config import Config, MethodConfig
from pipeline.data.batches import Batch, EpochDraws, TrainBatches
from pipeline.data.sources import ImageData
from pipeline.errors import UserError
from pipeline.training import distributed, optim
from pipeline.training.bank.lookup import BankedTeachers
from pipeline.training.compiling import check_device, compile_seconds, compiles
from pipeline.training.costs import Costs
from pipeline.training.evaluation import Outputs, accuracy, outputs
from pipeline.training.phases import Epoch, Phase
from pipeline.training.run_data import Scope, Selection, Task, prepare
from pipeline.training.step import Penalty, Setup, StudentStep, Weights
from pipeline.training.teachers import TeacherMonitor


def freeze_as(net: FeatureNet, policy: freeze.FreezePolicy, key: str) -> freeze.Frozen:
    """Apply a policy. Raises a UserError that names `key` if the network cannot be frozen like that."""
    try:
        return freeze.apply(net, policy)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


def trainable(name: str, module: nn.Module) -> dict[str, float]:
    """Numbers of trainable and of all parameters of what a step trains."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {
        f"parameters/{name}_trainable": trained,
        f"parameters/{name}_total": sum(p.numel() for p in module.parameters()),
    }


OpenBank = Callable[[TrainBatches, Sequence[FeatureNet], Costs], BankedTeachers | None]
"""A bank for given teachers and training images, which counts what it serves."""


def task_of(method: MethodConfig) -> "type[Distillation]":
    """What drives a method's epochs. Raises UserError: a module from outside that cannot be imported."""
    return _resolved(method, method.task)


def step_of(method: MethodConfig) -> type[StudentStep]:
    """A method's step."""
    return _resolved(method, method.step)


def _resolved(method: MethodConfig, where: str) -> Any:
    try:
        return resolve_name(where)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"method={method.name}: {where} cannot be imported: {error}") from error


def kd_weight(method: MethodConfig, b: int, total: int) -> float:
    """w(b) = min(1, (b + 1) / kd_warmup_epochs), 0 in the last `kd_cooldown_epochs` of `total` B-epochs (docs/method.md
    section 2).
    """
    if b >= total - method.kd_cooldown_epochs:
        return 0.0
    if method.kd_warmup_epochs == 0:
        return 1.0
    return min(1.0, (b + 1) / method.kd_warmup_epochs)


def two_views(method: MethodConfig, b: int) -> bool:
    """Whether the targets of B-epoch b are means over two views."""
    start, stop = method.kd_two_view_start_epoch, method.kd_two_view_stop_epoch
    return start is not None and stop is not None and start <= b < stop


class Distillation(Task):
    """The loop's task for a student: K >= 0 teachers, one method, stages.

    Args:
        student: trained in B-steps; with an adapter if its method asks for one.
        teachers: frozen, unless the method changes them.
        open_bank: gives a bank of the teachers' outputs for the training images, or None.
        scope: the part of the data that it is about; None: all.
        penalties: further terms of the student's loss, by their names in metrics.
    """

    fusion: Any = None
    """What fuses the teachers' features, in a method that does: kept beside the student, and evaluated."""

    def __init__(
        self,
        config: Config,
        data: ImageData,
        student: FeatureNet,
        teachers: list[FeatureNet],
        device: torch.device,
        open_bank: OpenBank = lambda batches, teachers, costs: None,
        scope: Scope | None = None,
        penalties: Mapping[str, Penalty] = MappingProxyType({}),
    ) -> None:
        check_device(config, device)
        super().__init__(config, data, student, "student", device, config.seed, scope)
        self.method: Any = config.method
        self.student, self.num_classes = student, data.num_classes if scope is None else len(scope.classes)
        self.teachers = teachers if config.method.distils else []
        remembered = self.method.replays and scope is not None and len(scope.memory) > 0
        self.distils = bool(self.teachers) or (self.method.distils and remembered)
        maps = self._pair_maps(data) if self.teachers and self.method.maps else ([], [])
        if not self.method.teachers_change:
            shape = (data.in_chans, data.image_size, data.image_size)
            self.teachers = [folded(teacher, shape) for teacher in self.teachers]
            for teacher in self.teachers:
                teacher.requires_grad_(False).eval()
        self.check(config, student, self.num_classes)
        self.begin(data)
        self._try_student_levels()
        self.compiled = compiles(config, device)
        if self.compiled:
            self._compiled_before = compile_seconds()
            for net in (student, *self.teachers):
                net.compile_pass(graphs=config.optim.compile == "graphs")
        self.monitor = self.make_monitor()
        networks: dict[str, nn.Module] = {"student": student}
        networks |= {f"teacher_{k}": t for k, t in enumerate(self.teachers)}
        self.plan = self.make_plan()
        setup = Setup(
            student,
            self.teachers,
            self.method,
            self.streams,
            device,
            self.num_classes,
            self.data,
            *maps,
            penalties=penalties,
            first_class=0 if scope is None else scope.first_class,
        )
        with self.streams.initialising("method"):
            self.b_step = self.make_step(setup)
        self.b_step.own.to(device)
        own = self.own_networks()
        self.costs = Costs(networks | own, measured=own.keys() - self.own_macs().keys())
        self.phases = self.own_phases() | {"b": self._b_phase()}
        self._stage = -1
        if self.optim.ema_decay is not None:
            self._check_average()
            self.b_step.setup_ema(decay=self.optim.ema_decay)
        prepare(self.phases, device, unused=self.unused())
        average = self._average()
        exported = average if average is not None and self.optim.select_weights == "ema" else student
        self.selection = Selection(exported, self.data.selects)
        self._student_seen: Outputs | None = None
        self.best_test = float("-inf")
        self.predicted: Tensor | None = None
        """The selected student's classes of the test images (n,), once `results` has seen them."""
        self.bank = open_bank(self.batches, self.teachers, self.costs)

    # what a method may say -------------------------------------------------------------------------------------------

    @staticmethod
    def check(config: Config, student: FeatureNet, num_classes: int) -> None:
        """Check a configuration against its networks and data. Raises UserError."""

    @staticmethod
    def check_teachers(config: Config, student: FeatureNet, teachers: Sequence[FeatureNet], num_classes: int) -> None:
        """Check a configuration's teachers before they are fine-tuned. Raises UserError."""

    def begin(self, data: ImageData) -> None:
        """Make what the method has beside its step."""

    def make_monitor(self) -> Any:
        """What evaluates the teachers."""
        return TeacherMonitor(self.method, self.data, self.teachers)

    def make_step(self, setup: Setup) -> StudentStep:
        """The method's step; without teachers, cross-entropy alone."""
        return step_of(self.method)(setup) if self.distils else StudentStep(setup)

    def make_plan(self) -> list[Epoch]:
        """The run's epochs."""
        return b_epochs_after([], self.method)

    def own_phases(self) -> dict[str, Phase]:
        """The phases beside B-steps."""
        return {}

    def own_networks(self) -> dict[str, nn.Module]:
        """Its own networks whose images are counted, by their names in metrics."""
        return dict(self.b_step.own.items())

    def unused(self) -> set[str]:
        """The phases in which some of the trained parameters get no gradient."""
        return set()

    def own_macs(self) -> dict[str, int]:
        """Multiply-accumulates per image of `own_networks`, where they are known; the others' are measured."""
        return {}

    def validation_passes(self) -> dict[str, int]:
        """How often each network runs over the validation images because selection, or a gate, has to know.

        What is only monitored does not count: a moving average that is not selected, the teachers' accuracies.
        """
        return {"student": self._b_epochs()}

    def trained_in(self, phase: str) -> list[str]:
        """The networks that a phase trains, by their names in metrics."""
        return ["student", *self.own_networks()]

    def begin_own_epoch(self, epoch: Epoch) -> None:
        """Called before an epoch of a phase of its own."""

    def end_own_epoch(self, epoch: Epoch) -> dict[str, float]:
        """Called after an epoch of a phase of its own: its metrics."""
        return {}

    def b_weights(self, epoch: Epoch) -> Any:
        """The weights of a B-epoch."""
        m, b = self.method, epoch.in_phase
        return Weights(
            scale=kd_weight(m, b, self._b_epochs()) if self.distils else 0.0,
            ratio=m.kd_max_ratio if b >= m.kd_warmup_epochs else None,
            bound=m.loss_clamp_max if m.use_loss_clamp and b >= m.loss_clamp_warmup_epochs else None,
        )

    def found_in_b_epoch(self, epoch: Epoch, student: Outputs) -> dict[str, float]:
        """More metrics of a B-epoch."""
        return {}

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the student."""
        return {"own": self.b_step.own_state()} if len(self.b_step.own) else {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore what `own_state` gave."""
        if len(self.b_step.own):
            self.b_step.load_own_state(state["own"])

    def own_results(self, selected: Outputs) -> dict[str, float]:
        """More test metrics; `selected`: the student's outputs."""
        return {}

    # construction ----------------------------------------------------------------------------------------------------

    def _pair_maps(self, data: ImageData) -> tuple[list[Any], list[list[Any]]]:
        """Record the maps of as many stages of student and teachers; their shapes."""
        size = (data.in_chans, data.image_size, data.image_size)
        try:
            return paired_maps(self.student, self.teachers, size, self.method.preacts)
        except ValueError as error:
            raise UserError(f"method={self.method.name} needs feature maps: {error}") from error

    def asked_of_teachers(self) -> Iterator[EpochDraws]:
        """The draws of all epochs that run teachers: what a bank is built ahead for."""
        for epoch in self.plan:
            if epoch.phase != "b" or kd_weight(self.method, epoch.in_phase, self._b_epochs()) > 0:
                yield self.draws(epoch)

    def _student_policy(self, stage: int) -> freeze.FreezePolicy:
        m = self.method
        level = m.student_freeze_level if m.student_freeze_schedule is None else m.student_freeze_schedule[stage]
        return freeze.FreezePolicy(level, m.student_freeze_bn)

    def _try_student_levels(self) -> None:
        """Refuse before training whatever a later stage could not freeze; the student is unfrozen again afterwards."""
        if self.method.use_partial_freeze:
            for stage in range(self.method.num_stages):
                policy = self._student_policy(stage)
                freeze_as(self.student, policy, f"stage {stage + 1}, student freeze level {policy.level}")
            freeze.apply(self.student, freeze.FreezePolicy())

    def _b_phase(self) -> Phase:
        m, o, updates = self.method, self.optim, len(self.batches)
        parts = [self.student, self.b_step.own] if any(True for _ in self.b_step.own.parameters()) else [self.student]
        trained = [(part, o.student_lr) for part in parts]
        optimizer = optim.optimizer(o.optimizer, trained, o.student_weight_decay, o.momentum)
        cutmix, repeats = m.cutmix_alpha_distill > 0, m.updates_per_batch
        return Phase(
            "b_step",
            self.b_step,
            optimizer,
            optim.lr_schedule(optimizer, self.config.schedule, self._b_epochs(), updates * repeats),
            mix="cutmix" if cutmix else "mixup" if m.mixup_alpha > 0 else None,
            mix_alpha=m.cutmix_alpha_distill if cutmix else m.mixup_alpha,
            repeats=repeats,
            clip=o.grad_clip_norm,
            title="B-step" if self.teachers else "student",
        )

    # what the loop calls ---------------------------------------------------------------------------------------------

    def two_views(self, epoch: Epoch) -> bool:
        return epoch.phase == "b" and two_views(self.method, epoch.in_phase)

    def epoch_batches(self, epoch: Epoch, start: int) -> Iterator[Batch]:
        draws = self.draws(epoch)
        batches = self.batches.epoch(draws, start)
        return batches if self.bank is None else self.bank.complete(batches, draws, start)

    def _check_average(self) -> None:
        """Raise UserError if the moving average would be exported without ever being updated."""
        o, updates = self.optim, self._b_epochs() * len(self.batches) * self.method.updates_per_batch
        if o.select_weights == "ema" and o.ema_update_every > updates:
            raise UserError(
                f"optim.ema_update_every={o.ema_update_every}: the run has {updates} updates of the student, and "
                "optim.select_weights=ema would export what it was before them; update it more often"
            )

    def _b_epochs(self) -> int:
        return sum(e.phase == "b" for e in self.plan)

    def begin_epoch(self, epoch: Epoch) -> None:
        if epoch.phase != "b":
            self.begin_own_epoch(epoch)
            return
        self._student_seen = None
        self._freeze_student(epoch.stage)
        self.b_step.begin_epoch(self.b_weights(epoch))

    def _freeze_student(self, stage: int) -> None:
        """Freeze the student as its stage requires, and wrap it again for several processes."""
        m = self.method
        if not m.use_partial_freeze or stage == self._stage:
            return
        self.b_step.refreeze(self.student, freeze.apply(self.student, self._student_policy(stage)))
        self._stage = stage
        prepare({"b": self.phases["b"]}, self.device, unused=set())

    def end_epoch(self, epoch: Epoch) -> dict[str, float]:
        found = self.monitor.teachers_found() if epoch.overall == 0 and self.teachers else {}
        if self.bank is not None:
            found |= self.bank.metrics()
        return found | (self._end_b_epoch(epoch) if epoch.phase == "b" else self.end_own_epoch(epoch))

    def _end_b_epoch(self, epoch: Epoch) -> dict[str, float]:
        out = self.student_outputs()
        found = self.evaluated(out) | {"schedule/kd_weight": self.b_step.weights.scale * self.method.kd_alpha}
        if (average := self._average()) is not None:
            averaged = outputs(average, self.data.eval, "student's moving average")
            found["student/acc_ema"] = distributed.first_process_says(accuracy(averaged.logits, self.data.eval.labels))
        chosen = found["student/acc_ema" if self.optim.select_weights == "ema" else "student/acc"]
        self.selection.offer(chosen, epoch.in_phase)
        if not self.data.has_validation:
            self.best_test = max(self.best_test, chosen)
        if epoch.first:
            found |= trainable("student", self.student)
        return found | self.found_in_b_epoch(epoch, out)

    def student_outputs(self) -> Outputs:
        """The student's outputs on the evaluation split, kept through A-epochs, which do not change it."""
        if self._student_seen is None:
            self._student_seen = outputs(self.student, self.data.eval, "student")
        return self._student_seen

    # state and results -----------------------------------------------------------------------------------------------

    def _average(self) -> FeatureNet | None:
        """The student's moving average."""
        ema = self.b_step.get_trainable_module(ema=True)
        return None if ema is None else ema.module

    def state_dict(self) -> dict[str, Any]:
        average = self._average()
        return {
            "student": self._last or self.student.state_dict(),
            "student_ema": None if average is None else average.state_dict(),
            **self.own_state(),
            "selection": self.selection.state_dict(),
            "best_test": self.best_test,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last, self._student_seen = {}, None
        self.student.load_state_dict(state["student"])
        if (average := self._average()) is not None:
            average.load_state_dict(state["student_ema"])
        self.load_own_state(state)
        self.best_test = state["best_test"]
        self.selection.load_state_dict(state["selection"])

    def results(self, test: bool = True) -> dict[str, float]:
        found = super().results(test)
        if not self.data.has_validation and self._b_epochs():
            found["final/acc_best"] = self.best_test
        if self.compiled:
            found["cost/compile_seconds"] = compile_seconds() - self._compiled_before
        return found

    def on_test(self, selected: Outputs) -> dict[str, float]:
        found = super().on_test(selected) | (self.monitor.on_test() if self.teachers else {})
        self.predicted = selected.logits.argmax(dim=1)
        return found | self.own_results(selected)


def b_epochs_after(plan: list[Epoch], method: MethodConfig) -> list[Epoch]:
    """A plan, and then the B-epochs of all stages."""
    b = 0
    for stage, epochs in enumerate(method.student_epochs_per_stage):
        for i in range(epochs):
            plan = [*plan, Epoch("b", stage, i, b, len(plan), i == 0, i == epochs - 1)]
            b += 1
    return plan
