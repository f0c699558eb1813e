"""What a run knows of its teachers beside their lessons: accuracies on its splits (docs/method.md section 3)."""

from torch import Tensor

from models.features import FeatureNet
from pipeline.config import MethodConfig
from pipeline.training import distributed, samples
from pipeline.training.evaluation import Outputs, accuracy, outputs
from pipeline.training.run_data import RunData


class TeacherMonitor:
    """Evaluates the teachers; frozen ones run once per split."""

    def __init__(self, method: MethodConfig, data: RunData, teachers: list[FeatureNet]) -> None:
        self.data, self.teachers = data, teachers
        self._averaging = method.averaging_weights
        self._outputs: dict[str, list[Outputs]] = {}

    def teachers_on(self, split: str) -> list[Outputs]:
        """The teachers' outputs on the evaluation split ("eval") or the test split ("test")."""
        if split not in self._outputs:
            batches = self.data.eval if split == "eval" else self.data.test
            self._outputs[split] = [outputs(t, batches, f"teacher {k}") for k, t in enumerate(self.teachers)]
        return self._outputs[split]

    def forget_teachers(self) -> None:
        """Drop the teachers' stored outputs; to be called after the teachers have changed."""
        self._outputs.clear()

    def average(self, split: str) -> Tensor:
        """p_avg on a split at temperature 1, (n, N)."""
        return samples.averaged([t.logits for t in self.teachers_on(split)], self._averaging, tau=1.0)

    def average_accuracy(self) -> float:
        """The averaged teachers' accuracy in percent on the evaluation split."""
        return distributed.first_process_says(accuracy(self.average("eval"), self.data.eval.labels))

    def teachers_found(self) -> dict[str, float]:
        """The teachers' accuracies on the evaluation split, and how often they disagree."""
        seen, y = self.teachers_on("eval"), self.data.eval.labels
        differ, both_wrong = samples.disagreement([s.logits for s in seen], y)
        found = {f"teacher/{k}/acc": accuracy(s.logits, y) for k, s in enumerate(seen)}
        found |= {"teacher/avg_acc": accuracy(self.average("eval"), y)}
        return found | {"teacher/disagreement": differ.item(), "teacher/both_wrong": both_wrong.item()}

    def on_test(self) -> dict[str, float]:
        """Their final metrics on the test split."""
        labels = self.data.test.labels
        found = {f"final/teacher_{k}_acc": accuracy(t.logits, labels) for k, t in enumerate(self.teachers_on("test"))}
        return found | {"final/teacher_avg_acc": accuracy(self.average("test"), labels)}
