"""ASIB's stages: A-steps teach the fusion, B-steps the student, as one task of the loop (method.md section 3)."""

from typing import Any

import torch
from torch import Tensor

from models.features import FeatureNet
from pipeline.config import Config, MethodConfig
from pipeline.config.rules import needs_distillation, uses_fusion
from pipeline.config.schema import ScheduleConfig
from pipeline.data.batches import EpochDraws
from pipeline.data.sources import ImageData
from pipeline.training import distributed, gate, schedules, targets
from pipeline.training.checkpoint import cpu_copy
from pipeline.training.common import RunData, Selection, prepare
from pipeline.training.evaluation import (
    Outputs,
    accuracy,
    average_probabilities,
    nll,
    outputs,
    synergy_logits,
)
from pipeline.training.fusion import Fusion
from pipeline.training.loop import Epoch, Phase
from pipeline.training.methods.asib import ALoss, AStep, BLoss, BStep
from pipeline.training.rng import Streams


def make_plan(method: MethodConfig, a_steps: bool) -> list[Epoch]:
    """The run's epochs: `num_stages` times an A-step (skipped at 0 epochs, or without fusion), then a B-step."""
    plan: list[Epoch] = []
    counts = {"a": 0, "b": 0}
    for stage, b_epochs in enumerate(method.student_epochs_per_stage):
        for phase, epochs in (("a", method.teacher_adapt_epochs if a_steps else 0), ("b", b_epochs)):
            for i in range(epochs):
                plan.append(Epoch(phase, stage, i, counts[phase], len(plan), i == 0, i == epochs - 1))
                counts[phase] += 1
    return plan


class Distillation:
    """The loop's task for a student: K >= 0 teachers, a fusion where targets need one, stages.

    Args:
        config: the whole configuration.
        data: images and labels.
        student: trained in B-steps.
        teachers: frozen.
        device: where all of them are.
    """

    def __init__(
        self,
        config: Config,
        data: ImageData,
        student: FeatureNet,
        teachers: list[FeatureNet],
        device: torch.device,
    ) -> None:
        self.config, self.method, self.optim = config, config.method, config.optim
        self.student = student
        self.teachers = teachers if needs_distillation(config) else []
        for net in self.teachers:
            net.requires_grad_(False).eval()
        self.data = RunData(config, data, device)
        self.batches = self.data.train
        self.streams = Streams(config.seed)
        self.fusion = self._make_fusion(data.num_classes, device) if uses_fusion(config) else None
        self.plan = make_plan(self.method, a_steps=self.fusion is not None)
        self.phases = self._make_phases(device)
        # deterministic fusion has no use for log variances, unless their penalty gives them a gradient
        idle = not self.method.use_ib and self.method.ib_mbm_reg_lambda == 0
        prepare(self.phases, device, unused={"a"} if idle else set())
        self.known = gate.SynergyAccuracy(self.method.synergy_ema_alpha)
        self.gate_open = False
        self.snapshot: dict[str, Any] = {}
        self.selection = Selection(student, self.data.has_validation)
        self._last: dict[str, Tensor] = {}
        self.best_test = float("-inf")
        self._teacher_outputs: dict[str, list[Outputs]] = {}

    def _make_fusion(self, num_classes: int, device: torch.device) -> Fusion:
        with self.streams.initialising("fusion"):
            fusion = Fusion(self.method, [t.feature_dim for t in self.teachers], self.student.feature_dim, num_classes)
        return fusion.to(device)

    def _make_phases(self, device: torch.device) -> dict[str, Phase]:
        m, o, updates = self.method, self.optim, len(self.batches)
        phases: dict[str, Phase] = {}
        if self.fusion is not None:
            lr = o.a_step_lr * m.ib_mbm_lr_factor
            optimizer = schedules.optimizer(o.a_step_optimizer, self.fusion, lr, o.a_step_weight_decay, o.momentum)
            # the A-steps' own cosine, without warm-up, over all A-epochs of the run
            shape = ScheduleConfig(min_lr=min(self.config.schedule.min_lr, lr))
            phases["a"] = Phase(
                "a_step",
                AStep(self.fusion, self.student, self.teachers, m, self.streams, device),
                optimizer,
                schedules.lr_schedule(optimizer, shape, sum(e.phase == "a" for e in self.plan), updates),
            )
        optimizer = schedules.optimizer(o.optimizer, self.student, o.student_lr, o.student_weight_decay, o.momentum)
        cutmix = m.cutmix_alpha_distill > 0
        phases["b"] = Phase(
            "b_step",
            BStep(self.student, self.teachers, self.fusion, m, self.streams, device),
            optimizer,
            schedules.lr_schedule(optimizer, self.config.schedule, sum(e.phase == "b" for e in self.plan), updates),
            mix="cutmix" if cutmix else "mixup" if m.mixup_alpha > 0 else None,
            mix_alpha=m.cutmix_alpha_distill if cutmix else m.mixup_alpha,
        )
        return phases

    # what the loop calls ---------------------------------------------------------------------------------------------

    def draws(self, epoch: Epoch) -> EpochDraws:
        return self.data.draws(self.streams, epoch, self.phases[epoch.phase])

    def begin_phase(self, epoch: Epoch) -> None:
        if epoch.phase == "a":
            self.snapshot = {}
            return
        if self.fusion is None:
            return
        if self.data.has_validation and self.known.current is None:
            self.known.update(self._synergy_accuracy(outputs(self.student, self.data.eval)))
        self.gate_open = self._decide_gate(epoch)

    def begin_epoch(self, epoch: Epoch) -> None:
        m = self.method
        tau = schedules.tau(m, epoch.overall, len(self.plan))
        if epoch.phase == "a":
            ce_only = epoch.in_phase < m.synergy_only_epochs
            kd = m.kd_alpha if m.teacher_adapt_alpha_kd is None else m.teacher_adapt_alpha_kd
            objective = self.phases["a"].objective
            assert isinstance(objective, AStep)
            objective.weights = ALoss(
                ce=1.0 if ce_only else m.synergy_ce_alpha,
                kd=0.0 if ce_only else kd,
                beta=schedules.beta(m, epoch.in_phase, epoch.in_stage),
                tau=tau,
                certainty=m.use_ib and not ce_only,
            )
            return
        objective = self.phases["b"].objective
        assert isinstance(objective, BStep)
        objective.weights = BLoss(
            kd=schedules.kd_weight(m, epoch.in_phase) * m.kd_alpha,
            tau=tau,
            synergy=self.gate_open,
            averaged_share=m.kd_ens_alpha if epoch.in_phase < m.teacher_adapt_kd_warmup else 0.0,
        )

    def end_epoch(self, epoch: Epoch) -> dict[str, float]:
        found = {"schedule/tau": schedules.tau(self.method, epoch.overall, len(self.plan))}
        if epoch.overall == 0 and self.teachers:
            found |= self._teachers_found()
        if epoch.phase == "a":
            found |= self._end_a_epoch(epoch)
        else:
            found |= self._end_b_epoch(epoch)
        return found

    def _end_a_epoch(self, epoch: Epoch) -> dict[str, float]:
        found = {"schedule/ib_beta": schedules.beta(self.method, epoch.in_phase, epoch.in_stage)}
        if (epoch.in_stage + 1) % self.method.teacher_eval_every and not epoch.last:
            return found
        acc = self._synergy_accuracy(outputs(self.student, self.data.eval))
        self.known.update(acc)
        assert self.known.ema is not None
        assert self.fusion is not None
        if self.data.has_validation:
            if acc > self.snapshot.get("accuracy", float("-inf")):
                self.snapshot = {"accuracy": acc, "fusion": cpu_copy(self.fusion.state_dict())}
            if epoch.last:
                self.fusion.load_state_dict(self.snapshot["fusion"])
                self.known.current = self.snapshot["accuracy"]
        return found | {"synergy/acc": acc, "synergy/acc_ema": self.known.ema}

    def _end_b_epoch(self, epoch: Epoch) -> dict[str, float]:
        out, y = outputs(self.student, self.data.eval), self.data.eval.labels
        acc, loss = distributed.first_says([accuracy(out.logits, y), nll(out.logits, y)], self.batches.device)
        self.selection.offer(acc, epoch.in_phase)
        if not self.data.has_validation:
            self.best_test = max(self.best_test, acc)
        found = {
            "student/acc": acc,
            "student/loss": loss,
            "schedule/kd_weight": schedules.kd_weight(self.method, epoch.in_phase) * self.method.kd_alpha,
        }
        if self.fusion is not None:
            found["gate/open"] = float(self.gate_open)
            if (epoch.in_stage + 1) % self.method.teacher_eval_every == 0 or epoch.last:
                found["synergy/acc"] = self._synergy_accuracy(out)  # monitored, without effect
        return found

    # synergy and gate ------------------------------------------------------------------------------------------------

    def _teachers_on(self, split: str) -> list[Outputs]:
        """The frozen teachers' outputs on a split, computed once."""
        if split not in self._teacher_outputs:
            batches = self.data.eval if split == "eval" else self.data.test
            self._teacher_outputs[split] = [outputs(t, batches) for t in self.teachers]
        return self._teacher_outputs[split]

    def _synergy_on(self, split: str, student: Outputs, chosen: tuple[int, ...] | None = None) -> Tensor:
        assert self.fusion is not None
        query = None if self.method.learnable_q else student.feat_2d
        return synergy_logits(self.fusion, query, self._teachers_on(split), chosen)

    def _synergy_accuracy(self, student: Outputs) -> float:
        """In percent, on the evaluation split, eval mode, mean path, float32."""
        logits = self._synergy_on("eval", student, self.method.synergy_eval_teacher_indices)
        (acc,) = distributed.first_says([accuracy(logits, self.data.eval.labels)], self.batches.device)
        return acc

    def _average_accuracy(self) -> float:
        probabilities = average_probabilities(self._teachers_on("eval"), self._teacher_weights())
        (acc,) = distributed.first_says([accuracy(probabilities, self.data.eval.labels)], self.batches.device)
        return acc

    def _teacher_weights(self) -> list[float] | None:
        return None if self.method.teacher_weights == "equal" else list(self.method.teacher_weights)

    def _decide_gate(self, epoch: Epoch) -> bool:
        if not self.data.has_validation:
            # the schema allows no threshold then; the test split must not decide: open once the fusion has been trained
            return epoch.overall > 0
        known = self.known.current if self.method.gate_source == "snapshot" else self.known.ema
        setting = self.method.enable_kd_after_syn_acc
        average = self._average_accuracy() if isinstance(setting, str) else 0.0
        return gate.is_open(known, gate.threshold(setting, average))

    def _teachers_found(self) -> dict[str, float]:
        """Once per run: the teachers on the evaluation split, and how often they disagree."""
        seen, y = self._teachers_on("eval"), self.data.eval.labels
        differ, both_wrong = targets.disagreement([s.logits for s in seen], y)
        found = {f"teacher/{k}/acc": accuracy(s.logits, y) for k, s in enumerate(seen)}
        found |= {"teacher/avg_acc": accuracy(average_probabilities(seen, self._teacher_weights()), y)}
        return found | {"teacher/disagreement": differ.item(), "teacher/both_wrong": both_wrong.item()}

    # state and results -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self._last or self.student.state_dict(),
            "fusion": None if self.fusion is None else self.fusion.state_dict(),
            "known": self.known.state_dict(),
            "gate_open": self.gate_open,
            "snapshot": self.snapshot,
            "selection": self.selection.state_dict(),
            "best_test": self.best_test,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = {}
        self.student.load_state_dict(state["student"])
        if self.fusion is not None:
            self.fusion.load_state_dict(state["fusion"])
        self.known.load_state_dict(state["known"])
        self.gate_open, self.snapshot, self.best_test = state["gate_open"], state["snapshot"], state["best_test"]
        self.selection.load_state_dict(state["selection"])

    def results(self) -> dict[str, float]:
        """Final accuracies, in percent; the student holds the selected weights afterwards."""
        test = self.data.test
        last = outputs(self.student, test)
        found = {"final/acc_last": accuracy(last.logits, test.labels)}
        self._last = cpu_copy(self.student.state_dict())  # what a checkpoint continues from
        self.student.load_state_dict(self.selection.chosen())
        selected = outputs(self.student, test)
        found["final/acc_val_selected"] = accuracy(selected.logits, test.labels)
        if self.data.has_validation:
            val = self.data.eval
            found["final/val_acc"] = accuracy(outputs(self.student, val).logits, val.labels)
        elif any(e.phase == "b" for e in self.plan):
            found["final/acc_best"] = self.best_test
        seen = self._teachers_on("test") if self.teachers else []
        for k, teacher in enumerate(seen):
            found[f"final/teacher_{k}_acc"] = accuracy(teacher.logits, test.labels)
        if seen:
            found["final/teacher_avg_acc"] = accuracy(average_probabilities(seen, self._teacher_weights()), test.labels)
        if self.fusion is not None:
            found["final/synergy_acc"] = accuracy(self._synergy_on("test", selected), test.labels)
        return found
