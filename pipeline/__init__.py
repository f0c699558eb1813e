"""Knowledge distillation, tracked. From Python: `from pipeline import distill, finetune, evaluate, sweep, runs`.

`FUNCTIONS` says where these are; each is imported when it is first used (docs/api.md). Some share their name with the
folder of their job here: that package can be called.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

FUNCTIONS = {
    **dict.fromkeys(("Finished", "distill", "evaluate", "finetune", "run", "sweep"), "pipeline.api"),
    **dict.fromkeys(("curves", "runs"), "pipeline.frames"),
    **dict.fromkeys(("Distiller", "run_stages"), "pipeline.parts"),
    "UserError": "pipeline.errors",
}
"""Name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(FUNCTIONS[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *FUNCTIONS]


class _Callable(ModuleType):
    """A package that shares its name with a function."""

    def __call__(self, *given: Any, **keys: Any) -> Any:
        """See docs/api.md."""
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(FUNCTIONS[name]), name)(*given, **keys)


class _Pipeline(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in FUNCTIONS and type(value) is ModuleType:  # Python sets each package here once it is imported
            value.__class__ = _Callable
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Pipeline
