"""What groups of keys are built from: `Section`, `key`, and the conditions under which a key acts."""

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from pipeline.config.words import written
from pipeline.paths import is_plain

Condition = Callable[[Any, str], str | None]
"""Takes a section and its prefix (`method.`); says why a key of that section cannot act, None if it can."""


def key(default: Any, words: str, when: str | Condition | tuple[str | Condition, ...] = ()) -> Any:
    """A field with its default, the sentence that `--help` prints, and the conditions under which it acts.

    Args:
        when: a switch of the same section (`"use_ib"`: neither false, 0 nor null), one of its values
            (`"kd_loss=dkd"`), or a `Condition`. All must hold; the first that does not is reported.
    """
    extra: Any = {"when": tuple(_condition(item) for item in (when if isinstance(when, tuple) else (when,)))}
    return Field(default=default, description=words, json_schema_extra=extra)


def _condition(when: str | Condition) -> Condition:
    if not isinstance(when, str):
        return when
    name, _, wanted = when.partition("=")

    def reason(section: Any, prefix: str) -> str | None:
        value = getattr(section, name)
        if wanted:
            return None if value == wanted else f"{prefix}{name} is not {wanted}"
        return None if value else f"{prefix}{name} is {written(value).removesuffix('.0')}"

    return reason


def unless(name: str) -> Condition:
    """The key acts unless this one, which takes precedence, is set."""
    return lambda section, prefix: f"{prefix}{name} takes precedence" if getattr(section, name) else None


def conditions(field: FieldInfo) -> tuple[Condition, ...]:
    """The conditions given to `key`."""
    extra: Any = field.json_schema_extra
    return tuple(extra["when"]) if extra else ()


class Section(BaseModel):
    """One immutable group of keys; unknown keys are an error."""

    # a run may be named 42, which YAML and overrides read as a number
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` for 1, also within lists: pydantic would accept it."""
        if isinstance(value, str) and not is_plain(value):
            raise PydanticCustomError("no_text", "no text")
        items = value if isinstance(value, list | tuple) else (value,)
        annotation = cls.model_fields[str(info.field_name)].annotation
        if any(isinstance(item, bool) for item in items) and "bool" not in str(annotation):
            raise PydanticCustomError("bool_for_number", "true and false are not numbers")
        return value


def leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, BaseModel, str]]:
    """The prefix, section and name of every key: `("model.teachers.0.", teacher, "name")`."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for i, item in enumerate(value):
                yield from leaves(item, f"{prefix}{name}.{i}.")
        else:
            yield prefix, section, name


def flatten(section: BaseModel) -> dict[str, Any]:
    """The configuration as dotted keys: `{"method.kd_alpha": 0.5, "model.teachers.0.name": ...}`."""
    flat = {prefix + name: getattr(holder, name) for prefix, holder, name in leaves(section)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}
