"""Packages that only some steps need: which extra of pyproject.toml installs them."""

from importlib.util import find_spec

from pipeline.errors import UserError

EXTRAS = {
    "apprise": "notify",
    "cmaes": "sweep",
    "datasets": "timm-data",
    "optuna": "sweep",
    "psutil": "system",
    "pynvml": "system",
    "starlette": "serve",
    "submitit": "sweep",
    "uvicorn": "serve",
    "webdataset": "timm-data",
}
"""Package -> extra."""


def missing(who: str, package: str) -> UserError:
    """The error for a package of `EXTRAS` that `who`, a step or a key, needs and that is not installed."""
    return UserError(f"{who} needs {package}: pip install 'asib[{EXTRAS[package]}]'")


def require(who: str, *packages: str) -> None:
    """Raise UserError for the first of these packages that is not installed; nothing is imported."""
    for package in packages:
        if find_spec(package) is None:
            raise missing(who, package)


def explained(error: BaseException, who: str) -> UserError | None:
    """The UserError for an import that failed because an extra is not installed; None for any other error."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return missing(who, package) if package in EXTRAS else None
