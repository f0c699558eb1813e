"""What is measured at the end of each task: rows of the accuracy matrix, and the metrics of the matrix so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.tasks import seen_classes
from pipeline.training.continual import matrix
from pipeline.training.evaluation import percent

Row = dict[str, list[float] | float]


@dataclass(frozen=True)
class Probe:
    """What a student is asked after each task, on one split.

    Attributes:
        labels: (n,), of the split's images.
        tasks: the classes of each task.
        answers: (n,) for each task, what the answer should be; None: the labels, of the images of the task's classes.
            A stream of teachers has as many as there are teachers: what each predicts.
    """

    labels: Tensor
    tasks: Sequence[tuple[int, ...]]
    answers: Sequence[Tensor] | None = None

    def row(self, scores: Tensor, done: int) -> Row:
        """Accuracies in percent of scores (n, N) once `done` tasks are over.

        `class_il` (T,): of each task, among the classes seen so far; 0 for a task that has not come. `task_il` (T,):
        among the task's own. `seen`: of all images of classes seen so far; of all for none.
        """
        seen = seen_classes(self.tasks, max(done, 1))
        if self.answers is not None:
            agreed = [_share(scores, answer, seen) for answer in self.answers]
            return {"class_il": agreed, "task_il": agreed, "seen": _share(scores, self.labels, seen)}
        class_il, task_il = [], []
        for number, task in enumerate(self.tasks):
            own = torch.isin(self.labels, self.labels.new_tensor(task))
            task_il.append(_share(scores[own], self.labels[own], list(task)))
            class_il.append(_share(scores[own], self.labels[own], seen) if number < done else 0.0)
        of_seen = torch.isin(self.labels, self.labels.new_tensor(seen))
        return {
            "class_il": class_il,
            "task_il": task_il,
            "seen": _share(scores[of_seen], self.labels[of_seen], seen) if done else 0.0,
        }


def _share(scores: Tensor, y: Tensor, among: Sequence[int]) -> float:
    """Top-1 in percent among some classes."""
    columns = torch.tensor(among, device=scores.device)
    answer = columns[scores.index_select(1, columns).argmax(dim=1)]
    return percent(answer == y)


def metrics(rows: Sequence[Mapping[str, list[float] | float]], split: str, untrained: Row | None) -> dict[str, float]:
    """The metrics after the last of these rows, named `continual/<split>_…`; `untrained`: the row before any task."""
    done = len(rows)
    found: dict[str, float] = {}
    for kind, prefix in (("class_il", ""), ("task_il", "task_il_")):
        whole = np.array([row[kind] for row in rows])
        r = whole[:, :done]
        found |= {
            f"{prefix}average_acc": matrix.average(r),
            f"{prefix}forgetting": matrix.forgetting(r),
            f"{prefix}bwt": matrix.backward_transfer(r),
        }
        if kind == "task_il" and untrained is not None:
            found[f"{prefix}fwt"] = matrix.forward_transfer(r, np.array(untrained[kind])[:done])
    seen = np.array([row["seen"] for row in rows])
    found |= {"acc": float(seen[-1]), "incremental_acc": matrix.incremental(seen)}
    return {f"continual/{split}_{name}": value for name, value in found.items()}
