"""Continual learning: the tasks that come one after another, and what is kept of the past (docs/continual.md)."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.config.base import Section, key
from pipeline.config.numbers import AtLeastOne, Count, NonNegative, Seed

Share = Annotated[float, Field(gt=0, lt=1)]
_TASKS, _CLASSES, _MEMORY = "num_tasks", "scenario=classes", "buffer_size"


class ContinualConfig(Section):
    """Tasks one after another, each trained as a run of its own is; null for `num_tasks`: one training on all data."""

    num_tasks: AtLeastOne | None = key(None, "tasks that come one after another; null: no continual learning")
    scenario: Literal["classes", "teachers"] = key(
        "classes", "what a task brings; classes: new classes with their images; teachers: another teacher, for all"
        " classes", when=_TASKS,
    )  # fmt: skip
    base_classes: AtLeastOne | None = key(
        None, "classes of the first task, the others dividing the rest; null: as many in each", when=(_TASKS, _CLASSES)
    )
    order: Literal["published", "identity", "seed"] | tuple[Count, ...] = key(
        "published", "order in which classes come; published: PyCIL's, NumPy's permutation of seed 1993; seed:"
        " order_seed's; or the classes' numbers", when=(_TASKS, _CLASSES),
    )  # fmt: skip
    order_seed: Seed = key(0, "seed of the classes' order", when=(_TASKS, "order=seed"))
    joint: bool = key(False, "train on all images of the classes seen so far: an upper bound", when=(_TASKS, _CLASSES))
    past: bool = key(False, "the student as it was before the task is one more teacher", when=_TASKS)
    teachers: Literal["oracle", "task", "tasks"] = key(
        "oracle", "what teachers know; oracle: all classes, from the start; task: each its task's classes, and teaches"
        " in that task only; tasks: and in all later ones", when=(_TASKS, _CLASSES),
    )  # fmt: skip
    buffer_size: Count = key(0, "training images kept of past tasks", when=(_TASKS, _CLASSES))
    buffer_rule: Literal["reservoir", "balanced", "herding"] = key(
        "reservoir", "which images are kept; balanced: equally many of each class, at random; herding: those whose mean"
        " feature is nearest their class's", when=(_TASKS, _MEMORY),
    )  # fmt: skip
    replay_ratio: Share | None = key(
        0.5, "share of each batch that comes from the kept images; null: an epoch has each of them once, as new ones",
        when=(_TASKS, _MEMORY),
    )  # fmt: skip
    ce_classes: Literal["seen", "new"] = key(
        "seen", "classes that cross-entropy tells apart; seen: all up to now; new: the task's", when=(_TASKS, _CLASSES)
    )
    classifier: Literal["head", "nearest_mean"] = key(
        "head", "what classifies; nearest_mean: the mean feature of each class's kept images", when=(_TASKS, _MEMORY)
    )
    lambda_ewc: NonNegative = key(0.0, "weight of elastic weight consolidation", when=_TASKS)
    fisher: Literal["sampled", "empirical", "exact"] = key(
        "sampled", "whose labels the Fisher information is of; sampled: the model's, drawn; empirical: the data's;"
        " exact: the model's, in expectation", when=(_TASKS, "lambda_ewc"),
    )  # fmt: skip
    fisher_images: AtLeastOne | None = key(
        1000, "training images of a task that its Fisher information is estimated on; null: all",
        when=(_TASKS, "lambda_ewc"),
    )  # fmt: skip

    @property
    def divides_teachers(self) -> bool:
        """Whether some teacher answers about classes that it was not taught: `model.unseen` acts."""
        return self.num_tasks is not None and (self.teachers != "oracle" or self.past)

    def teachers_at_once(self, named: int) -> int:
        """The most teachers that a task has, of as many that the configuration names."""
        if self.num_tasks is None:
            return named
        if self.scenario == "teachers":
            return min(named, 1) + self.past
        return named * (self.num_tasks if self.teachers == "tasks" else 1) + self.past

    def rules(self, config: Any) -> Iterator[str]:
        """One sentence for each rule that a whole configuration breaks, as far as that needs no data."""
        tasks, m = self.num_tasks, config.method
        if tasks is None:
            if m.past or m.replays:
                yield f"method={m.name} learns from its own past: give continual.num_tasks, as -e continual does"
            return
        if m.averaging_weights is not None and self.teachers_at_once(1) > 1:
            yield "method.teacher_weights weighs model.teachers, and tasks have other teachers: set it to equal"
        yield from self._of_method(config)
        if tasks == 1:
            yield "continual.num_tasks=1 leaves nothing to forget: give at least 2, or null for one training"
        if self.scenario == "teachers":
            yield from self._stream(config)
            return
        if not isinstance(self.order, str) and sorted(self.order) != list(range(len(self.order))):
            yield f"continual.order is no permutation of 0…{len(self.order) - 1}: name each class once"
        if self.classifier == "nearest_mean" and self.buffer_size == 0:
            yield "continual.classifier=nearest_mean classifies by kept images: give continual.buffer_size"
        if self.ce_classes == "new" and (self.buffer_size or self.joint):
            named = "joint=true" if self.joint else f"buffer_size={self.buffer_size}"
            yield (
                f"continual.ce_classes=new has no logits for past classes, and continual.{named} brings their images: "
                "set it to seen"
            )
        if m.replays and self.buffer_size == 0:
            yield f"method={m.name} replays kept images: give continual.buffer_size"
        if self.joint and (self.buffer_size or self.lambda_ewc):
            named = "buffer_size" if self.buffer_size else "lambda_ewc"
            yield f"continual.joint=true trains on all that was seen: set continual.{named}, which keeps a part, to 0"
        if self.teachers != "oracle" and config.finetune.epochs == 0:
            yield f"continual.teachers={self.teachers} fine-tunes a teacher for each task: raise finetune.epochs"
        for k, teacher in enumerate(config.model.teachers) if self.teachers != "oracle" else ():
            if teacher.checkpoint is not None:
                yield (
                    f"model.teachers.{k}.checkpoint with continual.teachers={self.teachers}, which fine-tunes a "
                    "teacher for each task: leave it out, or use continual.teachers=oracle"
                )

    def _of_method(self, config: Any) -> Iterator[str]:
        """What the method and its teachers cannot do task by task."""
        m, model = config.method, config.model
        if config.extend:
            yield "extend=true: finished tasks are not trained again; start a run with more epochs"
        if self.past and not m.distils:
            yield f"continual.past=true: method={m.name} distils nothing; choose one that does, such as lwf or aver"
        if m.ce_alpha == 0 and (m.past or m.replays):
            yield f"method.ce_alpha=0: method={m.name} alone teaches no new class; raise it"
        if m.past and m.samples == "old" and self.buffer_size == 0:
            yield "method.samples=old: a task has no images of old classes; give continual.buffer_size"
        if m.replays and (m.plus or m.use_disagree_weight):
            yield f"method={m.name} has no teachers, which method.plus and method.use_disagree_weight act on"
        if m.standardise and m.past and m.logits == "all":
            yield "method.logits=all: method.standardise divides by a deviation that masked logits dominate: use old"
        if self.lambda_ewc and m.use_partial_freeze:
            yield "continual.lambda_ewc holds all weights, method.use_partial_freeze trains some: leave one out"
        if self.classifier == "nearest_mean" and config.register is not None:
            yield "register: a served model classifies by its head, and continual.classifier is nearest_mean"
        if m.taught and self.teachers != "oracle" and self.scenario == "classes":
            if model.overlap is not None or any(teacher.classes for teacher in model.teachers):
                given = "model.overlap" if model.overlap is not None else "model.teachers.<k>.classes"
                yield f"continual.teachers={self.teachers} says what each teacher is taught: leave {given} out"
            if model.unseen == "masked" and m.standardise:
                yield (
                    "model.unseen=masked: method.standardise divides by a deviation that masked logits dominate: use "
                    "uniform"
                )

    def _stream(self, config: Any) -> Iterator[str]:
        count = len(config.model.teachers)
        if not config.method.taught:
            yield f"continual.scenario=teachers: method={config.method.name} learns from no teacher; choose another"
        if count != self.num_tasks:
            yield (
                f"continual.scenario=teachers has a task for each teacher: continual.num_tasks={self.num_tasks}, and "
                f"model.teachers has {count}"
            )
        if self.classifier == "nearest_mean":
            yield "continual.classifier=nearest_mean needs kept images, and continual.scenario=teachers keeps none"
        for name in ("joint", "buffer_size", "base_classes"):
            if getattr(self, name):
                yield f"continual.{name}: continual.scenario=teachers has all images in every task; leave it out"
