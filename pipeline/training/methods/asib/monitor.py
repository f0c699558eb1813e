"""Monitors teachers and synergy: accuracies on the evaluation split, the gate, and the best fusion of an A-step
(docs/method.md section 3).
"""

from typing import Any

import torch
from torch import Tensor

from models.features import FeatureNet, undisturbed
from pipeline.config.methods.asib.settings import AsibConfig, gate_offset
from pipeline.training import distributed
from pipeline.training.checkpoint import cpu_copy
from pipeline.training.evaluation import Outputs, accuracy, outputs
from pipeline.training.methods.asib import targets
from pipeline.training.methods.asib.fusion import Fusion
from pipeline.training.nonfinite import require_finite
from pipeline.training.run_data import RunData
from pipeline.training.teachers import TeacherMonitor


def synergy_logits(
    fusion: Fusion, query: Tensor | None, teachers: list[Outputs], chosen: tuple[int, ...] | None = None
) -> Tensor:
    """z_syn (n, N) on the mean path from the outputs of all teachers on a split; the fusion's mode is restored.

    Args:
        query: the student's feature (n, C); None with a learned query.
        chosen: indices of the teachers to fuse; None: all.

    Raises:
        NonFinite: the logits are not all finite.
    """
    picked = [teachers[k].feat_2d for k in (range(len(teachers)) if chosen is None else chosen)]
    parts = []
    with undisturbed(fusion), torch.autocast(picked[0].device.type, enabled=False):
        for i in range(0, len(picked[0]), 1000):
            rows = slice(i, i + 1000)
            part = fusion(None if query is None else query[rows], [f[rows] for f in picked], teachers=chosen)
            parts.append(part.logits)
    logits = torch.cat(parts)
    require_finite(logits, "synergy")
    return logits


def threshold(setting: float | str, average_accuracy: float) -> float:
    """The gate's threshold in percent: a fraction, or relative to the averaged teachers' accuracy (`avg-0.02`)."""
    offset = gate_offset(setting)
    return 100.0 * float(setting) if offset is None else average_accuracy + 100.0 * offset


def is_open(accuracy: float | None, threshold: float) -> bool:
    """Open iff the accuracy is known, above 0 and at least the threshold."""
    return accuracy is not None and accuracy > 0 and accuracy >= threshold


class Monitor(TeacherMonitor):
    """Evaluates teachers and fusion, and decides the gate."""

    def __init__(self, method: AsibConfig, data: RunData, teachers: list[FeatureNet], fusion: Fusion | None) -> None:
        super().__init__(method, data, teachers)
        self.method, self.fusion = method, fusion
        self.accuracy: float | None = None
        """The synergy's accuracy in percent, with the weights in use; None: not known yet."""
        self.smoothed: float | None = None
        """The accuracy's moving average; starts at the first value and is unchanged by epochs without evaluation."""
        self.gate_open = False
        self.share = 0.0
        """c: share of the averaged teachers in `auto` targets."""
        self.snapshot: dict[str, Any] = {}

    # evaluation ------------------------------------------------------------------------------------------------------

    def synergy_on(self, split: str, student: Outputs, chosen: tuple[int, ...] | None = None) -> Tensor:
        """z_syn on a split, (n, N), eval mode, mean path, float32."""
        assert self.fusion is not None
        query = None if self.method.learnable_q else getattr(student, self.method.ib_mbm_query_key)
        return synergy_logits(self.fusion, query, self.teachers_on(split), chosen)

    def synergy_accuracy(self, student: Outputs) -> float:
        """The synergy's accuracy in percent on the evaluation split."""
        logits = self.synergy_on("eval", student, self.method.synergy_eval_teacher_indices)
        return distributed.first_process_says(accuracy(logits, self.data.eval.labels))

    # A-steps ---------------------------------------------------------------------------------------------------------

    def begin_a_step(self) -> None:
        """Start over: the best snapshot belongs to a single A-step."""
        self.snapshot = {}

    def update(self, acc: float) -> None:
        """Take a new accuracy: smoothed <- alpha smoothed + (1 - alpha) acc."""
        alpha = self.method.synergy_ema_alpha
        self.accuracy = acc
        self.smoothed = acc if self.smoothed is None else alpha * self.smoothed + (1 - alpha) * acc

    def end_a_epoch(self, student: Outputs, last: bool) -> dict[str, float]:
        """Evaluate the synergy; keep the best weights of this A-step and put them back at its end."""
        assert self.fusion is not None
        if self.method.use_teacher_finetuning:
            self.forget_teachers()
        acc = self.synergy_accuracy(student)
        self.update(acc)
        assert self.smoothed is not None
        if self.data.has_validation:
            if acc > self.snapshot.get("accuracy", float("-inf")):
                self.snapshot = {"accuracy": acc, "fusion": cpu_copy(self.fusion.state_dict())}
                if self.method.use_teacher_finetuning:
                    self.snapshot["teachers"] = [cpu_copy(t.state_dict()) for t in self.teachers]
            if last:
                self._restore()
        return {"synergy/acc": acc, "synergy/acc_ema": self.smoothed}

    def _restore(self) -> None:
        assert self.fusion is not None
        self.fusion.load_state_dict(self.snapshot["fusion"])
        for teacher, weights in zip(self.teachers, self.snapshot.get("teachers", []), strict=False):
            teacher.load_state_dict(weights)
        if self.method.use_teacher_finetuning:
            self.forget_teachers()
        self.accuracy = self.snapshot["accuracy"]

    # the gate --------------------------------------------------------------------------------------------------------

    @property
    def compares(self) -> bool:
        """Whether the gate, or `auto`'s share, depends on the averaged teachers' accuracy."""
        return isinstance(self.method.enable_kd_after_syn_acc, str) or self.method.kd_target == "auto"

    def decide(self, student: FeatureNet, trained: bool) -> None:
        """Decide before a B-step whether synergy targets are taught, and `auto`'s share of the averaged teachers.

        Args:
            trained: whether the fusion has been trained at all.
        """
        if not self.data.has_validation:
            # the schema then allows no threshold, and the test split must not decide
            self.gate_open = trained
            return
        m = self.method
        if self.accuracy is None:
            self.update(self.synergy_accuracy(outputs(student, self.data.eval, "student")))
        known = self.accuracy if m.gate_source == "snapshot" else self.smoothed
        average = self.average_accuracy() if self.compares else 0.0
        limit = threshold(m.enable_kd_after_syn_acc, average)
        self.gate_open = is_open(known, limit)
        if m.kd_target == "auto":
            self.share = 1.0
            if known is not None and self.gate_open:
                self.share = targets.averaged_share(known, limit, average, m.kd_ens_alpha, m.kd_ens_alpha_max)

    # state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "known": {"current": self.accuracy, "ema": self.smoothed},
            "gate_open": self.gate_open,
            "share": self.share,
            "snapshot": self.snapshot,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accuracy, self.smoothed = state["known"]["current"], state["known"]["ema"]
        self.gate_open, self.share, self.snapshot = state["gate_open"], state["share"], state["snapshot"]
        self.forget_teachers()
