"""The configuration: all keys and the rules between them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

from pydantic import ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from pipeline.config import methods, words
from pipeline.config.methods.base import PROTOCOL
from pipeline.config.rules import check, derive
from pipeline.config.sections import Sections
from pipeline.errors import UserError


class Config(Sections):
    """The whole effective configuration, validated once and immutable; the code sees no other.

    This class has ASIB's keys under `method`; `schema` gives the subclass for another method, `configure` chooses.
    """

    # repeated, here and in `schema`: pydantic would take abc's class method of this name for the inherited default
    register: str | None = Sections.model_fields["register"]  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _derived_defaults(cls, data: Any) -> Any:
        return derive(data, cls)

    @model_validator(mode="after")
    def _rules(self) -> "Config":
        check(self)
        return self


REGISTER = (str | None, Sections.model_fields["register"])


@cache
def schema(method: str = "asib", module: str | None = None) -> type[Config]:
    """The configuration with a method's keys. Raises UserError: no such method."""
    settings = methods.settings(method, module)
    if settings is Config.model_fields["method"].annotation:
        return Config
    fields: dict[str, Any] = {"method": (settings, settings()), "register": REGISTER}
    made: type[Config] = create_model("Config", __base__=Config, __module__=__name__, **fields)
    return made


def schema_for(data: Any) -> type[Config]:
    """The configuration with the keys of the method that unvalidated data names. Raises UserError: no such method."""
    method = data.get("method") if isinstance(data, Mapping) else None
    if not isinstance(method, Mapping):
        return Config
    name, module = method.get("name", "asib"), method.get("module")
    if not isinstance(name, str) or not isinstance(module, str | None):
        return Config  # whose validation says what is wrong
    return schema(name, module)


def configure(data: Any) -> Config:
    """Validate a configuration of any method. Raises ValidationError; UserError: no such method."""
    return schema_for(data).model_validate(data)


def student_alone(config: Config) -> Config:
    """Drop the teachers: the same B-epochs with cross-entropy only, all other keys of the method at their defaults."""
    method = {name: getattr(config.method, name) for name in PROTOCOL} | {"kd_target": "avg", "teacher_adapt_epochs": 0}
    model = {"student": config.model.student.model_dump()}
    return Config.model_validate(config.model_dump() | {"method": method, "model": model})


def for_nested(config: Config) -> Config:
    """The configuration of a run nested in another: it logs no model, and is not the one that a command names."""
    return config.model_copy(update={"log_model": False, "register": None, "run_name": None, "resume": None})


def field_of(path: Sequence[str]) -> tuple[FieldInfo, int] | None:
    """`words.field_at` in the schema of the first method that has such a key, ASIB's first."""
    others = (schema(name) for name in methods.names() if path[0] == "method")  # made when they are asked
    roots: Iterator[type[Config]] = chain([Config], others)
    return next(filter(None, (words.field_at(path, root) for root in roots)), None)


def known_names() -> list[str]:
    """Every dotted key of the configuration, those of all methods included."""
    every = [*words.key_names(Config), *(key for name in methods.names() for key in words.key_names(schema(name)))]
    return list(dict.fromkeys(every))


def explain(error: ValidationError, data: Any = None) -> str:
    """Explain a refused configuration in one line: key, value, what to do. `data`: what was validated."""
    return words.explain(error, schema_for(data))


class UnknownKey(UserError):
    """The error for an unknown key; the message names the nearest of the configuration's keys and the step's `own`."""

    def __init__(self, name: str, own: Collection[str] = ()) -> None:
        self.name = name
        first, dot, rest = name.partition(".")
        near = [key + rest for key in own if dot and key.endswith(".") and words.near_miss(first, [key[:-1]], 0.75)]
        own_keys = [key for key in own if not key.endswith(".")]
        super().__init__(words.unknown_key(name, [*near, *known_names(), *own_keys]))
