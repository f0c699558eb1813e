"""The methods' settings, found by the names of the files here: one file or folder for each method."""

import importlib
import inspect
import pkgutil
import re
from functools import cache

from pipeline.config.methods.base import RESERVED, MethodConfig
from pipeline.config.words import suggestion
from pipeline.errors import UserError, first_line
from pipeline.paths import printable

_HERE = {
    file.name: f"{__name__}.{file.name}" + ".settings" * file.ispkg
    for file in pkgutil.iter_modules(__path__)
    if file.name != "base"
}
"""Method -> the module of its settings."""


def names() -> list[str]:
    """The methods of this repository, in alphabetical order."""
    return sorted(_HERE)


@cache
def settings(name: str, module: str | None = None) -> type[MethodConfig]:
    """The settings of a method, of this repository or of a `module` from outside.

    Raises UserError: no such method, or the module cannot be imported or has no settings.
    """
    if module is None:
        if name not in _HERE:
            given = printable(name, 80)
            raise UserError(
                f"method={given}: no such method; {suggestion(given, names())}there are {', '.join(names())}"
            )
        return _of(_HERE[name])
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module) is None:
        raise UserError(f"method.module={printable(module, 80)}: give a Python module, such as my_lab.my_kd")
    try:
        found = _of(module)
        taken = sorted(RESERVED & found().term_weights.keys())
    except (Exception, SystemExit) as error:  # somebody else's code may raise anything
        raise UserError(
            f"method.module={module}: {first_line(error)}; it must be importable (PYTHONPATH) and define a subclass of "
            "pipeline.config.methods.base.MethodConfig (examples/my_method)"
        ) from error
    if taken:
        raise UserError(
            f"method.module={module}: it names a term {taken[0]}, which is a name of the step's own: rename it"
        )
    return found


def _of(module: str) -> type[MethodConfig]:
    """The one class of settings that a module defines."""
    classes = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    found = [c for _, c in classes if issubclass(c, MethodConfig) and c.__module__ == module]
    if len(found) != 1:
        raise ValueError(f"it defines {len(found)} classes of settings, not one")
    return found[0]


def for_several_teachers() -> list[str]:
    """The methods that distil from more than one teacher."""
    several = (name for name in names() if name != "asib" and settings(name).teachers[1] != 1)
    return [name for name in several if settings(name).from_teachers]
