"""The configuration: all keys and the rules between them."""

from collections.abc import Collection
from typing import Any

from pydantic import ValidationError, model_validator

from pipeline.config import words
from pipeline.config.rules import check, derive
from pipeline.config.sections import Sections
from pipeline.errors import UserError


class Config(Sections):
    """The whole effective configuration, validated once and immutable; the code sees no other."""

    # repeated: pydantic would take abc's class method of this name for the inherited default
    register: str | None = Sections.model_fields["register"]  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _derived_defaults(cls, data: Any) -> Any:
        return derive(data)

    @model_validator(mode="after")
    def _rules(self) -> "Config":
        check(self)
        return self


ALONE = ("num_stages", "student_epochs_per_stage", "ce_label_smoothing", "mixup_alpha", "cutmix_alpha_distill")
"""Keys of `method` that act without teachers."""


def student_alone(config: Config) -> Config:
    """Drop the teachers: the same B-epochs with cross-entropy only, all other keys of the method at their defaults."""
    method = {name: getattr(config.method, name) for name in ALONE} | {"kd_target": "avg", "teacher_adapt_epochs": 0}
    model = {"student": config.model.student.model_dump()}
    return Config.model_validate(config.model_dump() | {"method": method, "model": model})


def known_names() -> list[str]:
    """Every dotted key of the configuration."""
    return list(words.key_names(Config))


def explain(error: ValidationError) -> str:
    """Explain a refused configuration in one line: key, value, what to do."""
    return words.explain(error, Config)


class UnknownKey(UserError):
    """The error for an unknown key; the message names the nearest of the configuration's keys and the step's `own`."""

    def __init__(self, name: str, own: Collection[str] = ()) -> None:
        self.name = name
        first, dot, rest = name.partition(".")
        near = [key + rest for key in own if dot and key.endswith(".") and words.near_miss(first, [key[:-1]], 0.75)]
        own_keys = [key for key in own if not key.endswith(".")]
        super().__init__(words.unknown_key(name, [*near, *known_names(), *own_keys]))
