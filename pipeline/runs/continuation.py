"""How a run may be continued: with the same computation or, with `extend`, more epochs of it."""

from typing import Any

from pipeline.config import Config, config_hash
from pipeline.config.identity import computation
from pipeline.errors import UserError

EXTENDED = {"method.student_epochs_per_stage", "method.num_stages", "finetune.epochs"}
"""Keys that `extend` may change."""


def check_computation(config: Config, name: str, header: dict[str, Any], command: str = "") -> None:
    """Raise UserError, naming both hashes, unless `config` may continue the run whose checkpoint has this `header`.

    `command`: what would continue it, for the error.
    """
    old, new = header["computation"], computation(config)
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    if config.extend:
        _check_extension(name, old, new)
        changed -= EXTENDED
    if changed:
        raise UserError(
            f"resume={name}: configuration {header['config_hash'][:12]} cannot be continued with "
            f"{config_hash(config)[:12]}; they differ in {', '.join(sorted(changed)[:5])}"
            + (f"; to continue: {command}" if command else "")
        )


def _check_extension(name: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Epochs can only be added after those that were trained."""
    key = "method.student_epochs_per_stage"
    old, new = before[key], after[key]
    if len(new) < len(old) or new[: len(old) - 1] != old[:-1] or new[len(old) - 1] < old[-1]:
        raise UserError(
            f"resume={name}: extend=true adds epochs at the end: {key}={list(new)} does not begin with the "
            f"{list(old)} that were trained"
        )
    if after["finetune.epochs"] < before["finetune.epochs"]:
        raise UserError(
            f"resume={name}: extend=true adds epochs: finetune.epochs={after['finetune.epochs']} is less than the "
            f"{before['finetune.epochs']} that were trained"
        )
