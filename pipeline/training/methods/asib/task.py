"""ASIB's stages: A-steps teach the fusion, B-steps the student, as one task of the loop (docs/method.md section 3)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from models import freeze
from models.features import FeatureNet
from pipeline.config import Config, ScheduleConfig
from pipeline.data.sources import ImageData
from pipeline.errors import UserError
from pipeline.training import costs, optim
from pipeline.training.evaluation import Outputs, accuracy
from pipeline.training.methods.asib import schedules
from pipeline.training.methods.asib.a_step import ALoss, AStep
from pipeline.training.methods.asib.b_step import BLoss, BStep
from pipeline.training.methods.asib.fusion import Fusion, query_width
from pipeline.training.methods.asib.monitor import Monitor
from pipeline.training.phases import Epoch, Phase
from pipeline.training.step import Setup, StudentStep
from pipeline.training.student import Distillation, freeze_as, kd_weight, trainable


class AsibDistillation(Distillation):
    """K >= 0 teachers, a fusion if targets need one, stages of an A-step and a B-step; teachers may be fine-tuned."""

    fusion: Fusion | None
    monitor: Monitor

    @staticmethod
    def check(config: Config, student: FeatureNet, num_classes: int) -> None:
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
                    f"method.feat_kd_alpha={m.feat_kd_alpha}: the student's {m.feat_kd_key} has width {width}, the "
                    f"fusion method.ib_mbm_out_dim={m.ib_mbm_out_dim}: set it to the student's, or "
                    "feat_kd_key=distill_feat"
                )

    @staticmethod
    def check_teachers(config: Config, student: FeatureNet, teachers: Sequence[FeatureNet], num_classes: int) -> None:
        if config.method.uses_fusion:
            with torch.random.fork_rng(devices=[]):
                widths = [net.feature_dim for net in teachers]
                Fusion(config.method, widths, query_width(config.method, student), num_classes)

    # construction ----------------------------------------------------------------------------------------------------

    def begin(self, data: ImageData) -> None:
        self.fusion = self._make_fusion(self.num_classes, self.device) if self.method.uses_fusion else None
        self.held = self._freeze_teachers()
        self.a_step: AStep | None = None

    def make_monitor(self) -> Monitor:
        return Monitor(self.method, self.data, self.teachers, self.fusion)

    def make_step(self, setup: Setup) -> StudentStep:
        if self.fusion is not None:
            made = (self.fusion, self.student, self.teachers, self.method, self.streams, self.device, self.held)
            self.a_step = AStep(*made)
        return BStep(setup, self.fusion)

    def make_plan(self) -> list[Epoch]:
        return schedules.make_plan(self.method, a_steps=self.fusion is not None)

    def unused(self) -> set[str]:
        # deterministic fusion has no use for log variances, unless their penalty gives them a gradient
        return {"a"} if not self.method.use_ib and self.method.ib_mbm_reg_lambda == 0 else set()

    def own_networks(self) -> dict[str, nn.Module]:
        return {} if self.fusion is None else {"fusion": self.fusion}

    def trained_in(self, phase: str) -> list[str]:
        if phase == "b":
            return ["student"]
        tuned = len(self.teachers) if self.method.use_teacher_finetuning else 0
        return ["fusion", *(f"teacher_{k}" for k in range(tuned))]

    def own_macs(self) -> dict[str, int]:
        if self.fusion is None:
            return {}
        query = torch.zeros(1, query_width(self.method, self.student), device=self.device)
        features = [torch.zeros(1, t.feature_dim, device=self.device) for t in self.teachers]
        return {"fusion": costs.macs(self.fusion, None if self.method.learnable_q else query, features)}

    def validation_passes(self) -> dict[str, int]:
        """The gate and each A-step's snapshot ask the fusion, its teachers, and the student, which queries it."""
        found, m = super().validation_passes(), self.method
        if self.fusion is None:
            return found
        a = [e for e in self.plan if e.phase == "a" and self._is_judged(e)]
        steps = len({e.stage for e in a})
        # selection has run the student, unless it asked the student's average
        found["student"] += max(steps, 1) if self.optim.select_weights == "ema" else 1
        of_teachers = 1
        if m.use_teacher_finetuning and a:  # after each epoch; for the gate once more, with the snapshot
            of_teachers = len(a) + (steps if self.monitor.compares else 0)
        return found | {f"teacher_{k}": of_teachers for k in range(len(self.teachers))} | {"fusion": max(len(a), 1)}

    def _is_judged(self, epoch: Epoch) -> bool:
        """Whether the synergy is evaluated after this epoch of its step."""
        return (epoch.in_stage + 1) % self.method.teacher_eval_every == 0 or epoch.last

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
                frozen = freeze_as(net, policy, f"method.teacher_freeze_level={m.teacher_freeze_level}")
                held.append((frozen, net))
        return held

    def own_phases(self) -> dict[str, Phase]:
        m, o, updates = self.method, self.optim, len(self.batches)
        if self.fusion is None or self.a_step is None:
            return {}
        lr = o.a_step_lr * m.ib_mbm_lr_factor
        groups: list[tuple[nn.Module, float]] = [(self.fusion, lr)]
        if m.use_teacher_finetuning:
            groups += [(t, o.a_step_lr) for t in self.teachers]
        optimizer = optim.optimizer(o.a_step_optimizer, groups, o.a_step_weight_decay, o.momentum)
        # the A-steps' own cosine, without warm-up, over all A-epochs of the run
        shape = ScheduleConfig(min_lr=min(self.config.schedule.min_lr, lr))
        a_epochs = sum(e.phase == "a" for e in self.plan)
        schedule = optim.lr_schedule(optimizer, shape, a_epochs, updates * m.cccp_nt)
        return {"a": Phase("a_step", self.a_step, optimizer, schedule, repeats=m.cccp_nt, title="A-step")}

    # what the loop calls ---------------------------------------------------------------------------------------------

    def begin_phase(self, epoch: Epoch) -> None:
        if epoch.phase == "a":
            self.monitor.begin_a_step()
        elif self.fusion is not None and kd_weight(self.method, epoch.in_phase, self._b_epochs()) > 0:
            self.monitor.decide(self.student, trained=epoch.overall > 0)

    def b_weights(self, epoch: Epoch) -> BLoss:
        m, b, common = self.method, epoch.in_phase, super().b_weights(epoch)
        return BLoss(
            scale=common.scale,
            tau=schedules.tau(m, epoch.overall, len(self.plan)),
            synergy=self.monitor.gate_open,
            averaged_share=self._averaged_share(b),
            ratio=common.ratio,
            bound=common.bound,
            dkd=min(1.0, (b + 1) / m.dkd_warmup_epochs) if m.dkd_warmup_epochs else 1.0,
        )

    def begin_own_epoch(self, epoch: Epoch) -> None:
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

    def end_epoch(self, epoch: Epoch) -> dict[str, float]:
        return {"schedule/tau": schedules.tau(self.method, epoch.overall, len(self.plan))} | super().end_epoch(epoch)

    def end_own_epoch(self, epoch: Epoch) -> dict[str, float]:
        found = {"schedule/ib_beta": schedules.beta(self.method, epoch.in_phase, epoch.in_stage)}
        if epoch.first:
            found |= trainable("fusion", self.phases["a"].objective.trainable_module)
        if not self._is_judged(epoch):
            return found
        return found | self.monitor.end_a_epoch(self.student_outputs(), epoch.last)

    def found_in_b_epoch(self, epoch: Epoch, student: Outputs) -> dict[str, float]:
        """Gate and synergy in a B-epoch: monitored only; teachers and fusion do not run in the cooldown."""
        if self.fusion is None:
            return {}
        found = {"gate/open": float(self.monitor.gate_open)}
        if self.method.kd_target == "auto":
            found["gate/averaged_share"] = self.monitor.share
        if self._is_judged(epoch) and self.b_step.weights.scale > 0:
            found["synergy/acc"] = self.monitor.synergy_accuracy(student)
        return found

    # state and results -----------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        return {
            "fusion": None if self.fusion is None else self.fusion.state_dict(),
            "teachers": [t.state_dict() for t in self.teachers] if self.method.use_teacher_finetuning else [],
            "monitor": self.monitor.state_dict(),
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        if self.fusion is not None:
            self.fusion.load_state_dict(state["fusion"])
        for teacher, weights in zip(self.teachers, state["teachers"], strict=False):
            teacher.load_state_dict(weights)
        self.monitor.load_state_dict(state["monitor"])

    def own_results(self, selected: Outputs) -> dict[str, float]:
        if self.fusion is None:
            return {}
        labels = self.data.test.labels
        return {"final/synergy_acc": accuracy(self.monitor.synergy_on("test", selected), labels)}
