"""The networks: student and teachers."""

from typing import Any, Literal

from pydantic import field_validator, model_validator

from pipeline.config.base import Section, key
from pipeline.config.numbers import BelowOne, Count, Fraction, Seed


class StudentConfig(Section):
    """The network that is kept."""

    name: str = key("cifar_resnet8x4", "any timm classifier, cifar_* network or alias")
    pretrained: bool = key(False, "start from timm's pretrained weights")


def _not_an_efficientnet(teacher: Any, prefix: str) -> str | None:
    return None if "efficientnet" in teacher.name else f"{teacher.name} is not an EfficientNet"


class TeacherConfig(Section):
    """One teacher; without a checkpoint it is fine-tuned, or an earlier fine-tuning is reused."""

    name: str = key("cifar_resnet32x4", "any timm classifier, cifar_* network or alias")
    pretrained: bool = key(True, "start fine-tuning from timm's pretrained weights")
    checkpoint: str | None = key(None, "weights to use as they are: a file or runs:/<id>")
    efficientnet_dropout: BelowOne = key(0.3, "dropout before an EfficientNet's classifier", when=_not_an_efficientnet)
    classes: tuple[Count, ...] = key((), "classes that it is taught, by number; empty: all, or what model.overlap says")

    @model_validator(mode="before")
    @classmethod
    def _no_weights_of_cifar_networks(cls, data: Any) -> Any:
        """Default to no pretrained weights for cifar_* networks, which have none; asking for them is refused later."""
        if isinstance(data, dict) and str(data.get("name", cls.model_fields["name"].default)).startswith("cifar_"):
            return {"pretrained": False, **data}
        return data


def _divided(model: Any, prefix: str) -> str | None:
    return f"{prefix}overlap is null" if model.overlap is None else None


class ModelConfig(Section):
    """Student and teachers."""

    student: StudentConfig = key(StudentConfig(), "the student")
    teachers: tuple[TeacherConfig, ...] = key((), "the teachers, in order; empty: train the student alone")
    overlap: Fraction | None = key(
        None,
        "share of the classes that all teachers are taught, the others being divided among them; null: no division",
    )
    overlap_seed: Seed = key(0, "chooses the classes that all are taught, and who is taught the others", when=_divided)
    unseen: Literal["uniform", "masked"] = key(
        "uniform",
        "what a teacher says of classes that it was not taught; uniform: their share, evenly, masked: never",
    )

    @property
    def partly_taught(self) -> bool:
        """Whether a teacher is taught some of the classes only."""
        return self.overlap not in (None, 1) or any(teacher.classes for teacher in self.teachers)

    @field_validator("teachers", mode="before")
    @classmethod
    def _teachers_by_index(cls, value: Any) -> Any:
        """Read `{0: {...}, 1: {...}}`, which overrides of single items leave, as a list."""
        if isinstance(value, dict):
            numbered = {str(index): teacher for index, teacher in value.items()}
            indices = [str(index) for index in range(len(value))]
            return [numbered[index] for index in indices] if numbered.keys() == set(indices) else value
        return value
