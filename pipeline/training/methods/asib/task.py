"""ASIB's stages: A-steps teach the fusion, B-steps the student, as one task of the loop (docs/method.md section 3)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models import freeze
from models.features import FeatureNet
from models.fold import folded
from pipeline.config import Config, ScheduleConfig
from pipeline.data.batches import Batch, EpochDraws, TrainBatches
from pipeline.data.sources import ImageData
from pipeline.errors import UserError
from pipeline.training import distributed, optim
from pipeline.training.bank.lookup import BankedTeachers
from pipeline.training.compiling import check_device, compile_seconds, compiles
from pipeline.training.costs import Costs
from pipeline.training.evaluation import Outputs, accuracy, outputs
from pipeline.training.methods.asib import schedules
from pipeline.training.methods.asib.a_step import ALoss, AStep
from pipeline.training.methods.asib.b_step import BLoss, BStep
from pipeline.training.methods.asib.fusion import Fusion, query_width
from pipeline.training.methods.asib.monitor import Monitor
from pipeline.training.phases import Epoch, Phase
from pipeline.training.run_data import Selection, Task, prepare


def check_student(config: Config, student: FeatureNet, num_classes: int) -> None:
    """Check a configuration against its networks and data. Raises UserError."""
    m = config.method
    if not config.method.distils:
        return
    if m.kd_loss == "dkd" and m.kd_alpha > 0 and num_classes < 3:
        raise UserError(
            f"method.kd_loss=dkd: it splits what is not the label, and the data has {num_classes} classes; use kl"
        )
    if m.feat_kd_alpha > 0:
        adapter = student.distillation_adapter
        width = student.feature_dim if m.feat_kd_key == "feat_2d" else None if adapter is None else adapter.out_dim
        if width != m.ib_mbm_out_dim:
            raise UserError(
                f"method.feat_kd_alpha={m.feat_kd_alpha}: the student's {m.feat_kd_key} has width {width}, the fusion "
                f"method.ib_mbm_out_dim={m.ib_mbm_out_dim}: set it to the student's, or feat_kd_key=distill_feat"
            )


def _freeze(net: FeatureNet, policy: freeze.FreezePolicy, key: str) -> freeze.Frozen:
    """Apply a policy. Raises a UserError that names `key` if the network cannot be frozen like that."""
    try:
        return freeze.apply(net, policy)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


def _trainable(name: str, module: nn.Module) -> dict[str, float]:
    """Numbers of trainable and of all parameters of what a step trains."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {
        f"parameters/{name}_trainable": trained,
        f"parameters/{name}_total": sum(p.numel() for p in module.parameters()),
    }


OpenBank = Callable[[TrainBatches, Sequence[FeatureNet], Costs], BankedTeachers | None]
"""A bank for given teachers and training images, which counts what it serves."""


class Distillation(Task):
    """The loop's task for a student: K >= 0 teachers, a fusion if targets need one, stages.

    Args:
        student: trained in B-steps; with an adapter if its `distill_feat` is used.
        teachers: frozen, or fine-tuned in A-steps.
        open_bank: gives a bank of the teachers' outputs for the training images, or None.
    """

    def __init__(
        self,
        config: Config,
        data: ImageData,
        student: FeatureNet,
        teachers: list[FeatureNet],
        device: torch.device,
        open_bank: OpenBank = lambda batches, teachers, costs: None,
    ) -> None:
        check_device(config, device)
        super().__init__(config, data, student, "student", device, config.seed)
        self.method, self.student = config.method, student
        self.teachers = teachers if config.method.distils else []
        if not self.method.use_teacher_finetuning:
            shape = (data.in_chans, data.image_size, data.image_size)
            self.teachers = [folded(teacher, shape) for teacher in self.teachers]
        check_student(config, student, data.num_classes)
        self.fusion = self._make_fusion(data.num_classes, device) if config.method.uses_fusion else None
        held = self._freeze_teachers()
        self._try_student_levels()
        self.compiled = compiles(config, device)
        if self.compiled:
            self._compiled_before = compile_seconds()
            for net in (student, *self.teachers):
                net.compile_pass(graphs=config.optim.compile == "graphs")
        self.monitor = Monitor(self.method, self.data, self.teachers, self.fusion)
        networks: dict[str, nn.Module] = {"student": student}
        networks |= {f"teacher_{k}": t for k, t in enumerate(self.teachers)}
        self.costs = Costs(networks | ({"fusion": self.fusion} if self.fusion is not None else {}))
        self.plan = schedules.make_plan(self.method, a_steps=self.fusion is not None)
        self.b_step = BStep(student, self.teachers, self.fusion, self.method, self.streams, device)
        self.a_step: AStep | None = None
        if self.fusion is not None:
            self.a_step = AStep(self.fusion, student, self.teachers, self.method, self.streams, device, held)
        self.phases = self._make_phases()
        # deterministic fusion has no use for log variances, unless their penalty gives them a gradient
        idle = not self.method.use_ib and self.method.ib_mbm_reg_lambda == 0
        self._stage = -1
        if self.optim.ema_decay is not None:
            self._check_average()
            self.b_step.setup_ema(decay=self.optim.ema_decay)
        prepare(self.phases, device, unused={"a"} if idle else set())
        average = self._average()
        exported = average if average is not None and self.optim.select_weights == "ema" else student
        self.selection = Selection(exported, self.data.has_validation)
        self._student_seen: Outputs | None = None
        self.best_test = float("-inf")
        self.predicted: Tensor | None = None
        """The selected student's classes of the test images (n,), once `results` has seen them."""
        self.bank = open_bank(self.batches, self.teachers, self.costs)

    def asked_of_teachers(self) -> Iterator[EpochDraws]:
        """The draws of all epochs that run teachers: what a bank is built ahead for."""
        for epoch in self.plan:
            if epoch.phase == "a" or schedules.kd_weight(self.method, epoch.in_phase, self._b_epochs()) > 0:
                yield self.draws(epoch)

    # construction ----------------------------------------------------------------------------------------------------

    def _make_fusion(self, num_classes: int, device: torch.device) -> Fusion:
        query = query_width(self.method, self.student)
        with self.streams.initialising("fusion"):
            fusion = Fusion(self.method, [t.feature_dim for t in self.teachers], query, num_classes)
        return fusion.to(device)

    def _freeze_teachers(self) -> list[tuple[freeze.Frozen, nn.Module]]:
        """Freeze the teachers; of those that are fine-tuned, the parts that stay frozen."""
        m = self.method
        held: list[tuple[freeze.Frozen, nn.Module]] = []
        for net in self.teachers:
            net.requires_grad_(False).eval()
            if m.use_teacher_finetuning:
                policy = freeze.FreezePolicy()
                if m.use_partial_freeze:
                    policy = freeze.FreezePolicy(
                        m.teacher_freeze_level, m.teacher_freeze_bn, m.teacher_bn_head_only, m.teacher_freeze_scope
                    )
                frozen = _freeze(net, policy, f"method.teacher_freeze_level={m.teacher_freeze_level}")
                held.append((frozen, net))
        return held

    def _student_policy(self, stage: int) -> freeze.FreezePolicy:
        m = self.method
        level = m.student_freeze_level if m.student_freeze_schedule is None else m.student_freeze_schedule[stage]
        return freeze.FreezePolicy(level, m.student_freeze_bn)

    def _try_student_levels(self) -> None:
        """Refuse before training whatever a later stage could not freeze; the student is unfrozen again afterwards."""
        if self.method.use_partial_freeze:
            for stage in range(self.method.num_stages):
                policy = self._student_policy(stage)
                _freeze(self.student, policy, f"stage {stage + 1}, student freeze level {policy.level}")
            freeze.apply(self.student, freeze.FreezePolicy())

    def _make_phases(self) -> dict[str, Phase]:
        m, o, updates = self.method, self.optim, len(self.batches)
        phases: dict[str, Phase] = {}
        if self.fusion is not None and self.a_step is not None:
            lr = o.a_step_lr * m.ib_mbm_lr_factor
            groups: list[tuple[nn.Module, float]] = [(self.fusion, lr)]
            if m.use_teacher_finetuning:
                groups += [(t, o.a_step_lr) for t in self.teachers]
            optimizer = optim.optimizer(o.a_step_optimizer, groups, o.a_step_weight_decay, o.momentum)
            # the A-steps' own cosine, without warm-up, over all A-epochs of the run
            shape = ScheduleConfig(min_lr=min(self.config.schedule.min_lr, lr))
            a_epochs = sum(e.phase == "a" for e in self.plan)
            phases["a"] = Phase(
                "a_step",
                self.a_step,
                optimizer,
                optim.lr_schedule(optimizer, shape, a_epochs, updates * m.cccp_nt),
                repeats=m.cccp_nt,
            )
        optimizer = optim.optimizer(o.optimizer, [(self.student, o.student_lr)], o.student_weight_decay, o.momentum)
        cutmix = m.cutmix_alpha_distill > 0
        phases["b"] = Phase(
            "b_step",
            self.b_step,
            optimizer,
            optim.lr_schedule(optimizer, self.config.schedule, self._b_epochs(), updates * m.cccp_ns),
            mix="cutmix" if cutmix else "mixup" if m.mixup_alpha > 0 else None,
            mix_alpha=m.cutmix_alpha_distill if cutmix else m.mixup_alpha,
            repeats=m.cccp_ns,
            clip=o.grad_clip_norm,
        )
        return phases

    # what the loop calls ---------------------------------------------------------------------------------------------

    def two_views(self, epoch: Epoch) -> bool:
        return epoch.phase == "b" and schedules.two_views(self.method, epoch.in_phase)

    def epoch_batches(self, epoch: Epoch, start: int) -> Iterator[Batch]:
        draws = self.draws(epoch)
        batches = self.batches.epoch(draws, start)
        return batches if self.bank is None else self.bank.complete(batches, draws, start)

    def begin_phase(self, epoch: Epoch) -> None:
        if epoch.phase == "a":
            self.monitor.begin_a_step()
        elif self.fusion is not None and schedules.kd_weight(self.method, epoch.in_phase, self._b_epochs()) > 0:
            self.monitor.decide(self.student, trained=epoch.overall > 0)

    def _check_average(self) -> None:
        """Raise UserError if the moving average would be exported without ever being updated."""
        o, updates = self.optim, self._b_epochs() * len(self.batches) * self.method.cccp_ns
        if o.select_weights == "ema" and o.ema_update_every > updates:
            raise UserError(
                f"optim.ema_update_every={o.ema_update_every}: the run has {updates} updates of the student, and "
                "optim.select_weights=ema would export what it was before them; update it more often"
            )

    def _b_epochs(self) -> int:
        return sum(e.phase == "b" for e in self.plan)

    def begin_epoch(self, epoch: Epoch) -> None:
        if epoch.phase == "a":
            self._begin_a_epoch(epoch)
            return
        self._student_seen = None
        self._freeze_student(epoch.stage)
        m, b = self.method, epoch.in_phase
        weights = BLoss(
            scale=schedules.kd_weight(m, b, self._b_epochs()) if self.teachers else 0.0,
            tau=schedules.tau(m, epoch.overall, len(self.plan)),
            synergy=self.monitor.gate_open,
            averaged_share=self._averaged_share(b),
            ratio=m.kd_max_ratio if b >= m.kd_warmup_epochs else None,
            bound=m.loss_clamp_max if m.use_loss_clamp and b >= m.loss_clamp_warmup_epochs else None,
            dkd=min(1.0, (b + 1) / m.dkd_warmup_epochs) if m.dkd_warmup_epochs else 1.0,
        )
        self.b_step.begin_epoch(weights)

    def _begin_a_epoch(self, epoch: Epoch) -> None:
        m, a = self.method, epoch.in_phase
        ce_only = a < m.synergy_only_epochs
        kd = m.kd_alpha if m.teacher_adapt_alpha_kd is None else m.teacher_adapt_alpha_kd
        clamps = m.use_loss_clamp and not m.disable_loss_clamp_in_a and a >= m.loss_clamp_warmup_epochs
        weights = ALoss(
            ce=1.0 if ce_only else m.synergy_ce_alpha,
            kd=0.0 if ce_only or m.use_cccp else kd,
            cccp=m.cccp_alpha if m.use_cccp and not ce_only else 0.0,
            beta=schedules.beta(m, a, epoch.in_stage),
            tau=schedules.tau(m, epoch.overall, len(self.plan)),
            certainty=m.use_ib and not ce_only,
            feat=0.0 if ce_only else m.feat_kd_alpha,
            teacher_ce=m.teacher_ce_alpha if m.use_teacher_finetuning else 0.0,
            penalties=not ce_only,
            bound=m.loss_clamp_max if clamps else None,
        )
        assert self.a_step is not None
        self.a_step.begin_epoch(weights)

    def _averaged_share(self, b: int) -> float:
        if self.method.kd_target == "auto":
            return self.monitor.share
        return self.method.kd_ens_alpha if b < self.method.teacher_adapt_kd_warmup else 0.0

    def _freeze_student(self, stage: int) -> None:
        """Freeze the student as its stage requires, and wrap it again for several processes."""
        m = self.method
        if not m.use_partial_freeze or stage == self._stage:
            return
        self.b_step.refreeze(self.student, freeze.apply(self.student, self._student_policy(stage)))
        self._stage = stage
        prepare({"b": self.phases["b"]}, self.device, unused=set())

    def end_epoch(self, epoch: Epoch) -> dict[str, float]:
        found = {"schedule/tau": schedules.tau(self.method, epoch.overall, len(self.plan))}
        if epoch.overall == 0 and self.teachers:
            found |= self.monitor.teachers_found()
        if self.bank is not None:
            found |= self.bank.metrics()
        return found | (self._end_a_epoch(epoch) if epoch.phase == "a" else self._end_b_epoch(epoch))

    def _end_a_epoch(self, epoch: Epoch) -> dict[str, float]:
        found = {"schedule/ib_beta": schedules.beta(self.method, epoch.in_phase, epoch.in_stage)}
        if epoch.first:
            found |= _trainable("fusion", self.phases["a"].objective.trainable_module)
        if (epoch.in_stage + 1) % self.method.teacher_eval_every and not epoch.last:
            return found
        return found | self.monitor.end_a_epoch(self._student_outputs(), epoch.last)

    def _end_b_epoch(self, epoch: Epoch) -> dict[str, float]:
        out = self._student_outputs()
        found = self.evaluated(out) | {"schedule/kd_weight": self.b_step.weights.scale * self.method.kd_alpha}
        if (average := self._average()) is not None:
            averaged = outputs(average, self.data.eval, "student's moving average")
            found["student/acc_ema"] = distributed.first_process_says(accuracy(averaged.logits, self.data.eval.labels))
        chosen = found["student/acc_ema" if self.optim.select_weights == "ema" else "student/acc"]
        self.selection.offer(chosen, epoch.in_phase)
        if not self.data.has_validation:
            self.best_test = max(self.best_test, chosen)
        if epoch.first:
            found |= _trainable("student", self.student)
        return found | self._synergy_found(epoch, out)

    def _student_outputs(self) -> Outputs:
        """The student's outputs on the evaluation split, kept through A-epochs, which do not change it."""
        if self._student_seen is None:
            self._student_seen = outputs(self.student, self.data.eval, "student")
        return self._student_seen

    def _synergy_found(self, epoch: Epoch, student: Outputs) -> dict[str, float]:
        """Gate and synergy in a B-epoch: monitored only; teachers and fusion do not run in the cooldown."""
        if self.fusion is None:
            return {}
        found = {"gate/open": float(self.monitor.gate_open)}
        if self.method.kd_target == "auto":
            found["gate/averaged_share"] = self.monitor.share
        due = (epoch.in_stage + 1) % self.method.teacher_eval_every == 0 or epoch.last
        if due and self.b_step.weights.scale > 0:
            found["synergy/acc"] = self.monitor.synergy_accuracy(student)
        return found

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
            "fusion": None if self.fusion is None else self.fusion.state_dict(),
            "teachers": [t.state_dict() for t in self.teachers] if self.method.use_teacher_finetuning else [],
            "monitor": self.monitor.state_dict(),
            "selection": self.selection.state_dict(),
            "best_test": self.best_test,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last, self._student_seen = {}, None
        self.student.load_state_dict(state["student"])
        if (average := self._average()) is not None:
            average.load_state_dict(state["student_ema"])
        if self.fusion is not None:
            self.fusion.load_state_dict(state["fusion"])
        for teacher, weights in zip(self.teachers, state["teachers"], strict=False):
            teacher.load_state_dict(weights)
        self.monitor.load_state_dict(state["monitor"])
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
        found, labels = super().on_test(selected), self.data.test.labels
        if self.teachers:
            for k, teacher in enumerate(self.monitor.teachers_on("test")):
                found[f"final/teacher_{k}_acc"] = accuracy(teacher.logits, labels)
            found["final/teacher_avg_acc"] = accuracy(self.monitor.average("test"), labels)
        if self.fusion is not None:
            found["final/synergy_acc"] = accuracy(self.monitor.synergy_on("test", selected), labels)
        self.predicted = selected.logits.argmax(dim=1)
        return found
