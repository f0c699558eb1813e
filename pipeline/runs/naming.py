"""What runs are called, and the commands that repeat and continue them: people tell runs apart by these."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from pipeline import urls
from pipeline.compose import shortcuts
from pipeline.compose.cli import Command
from pipeline.config import Config
from pipeline.config.identity import NOT_COMPUTATION, listed

COMMAND = "asib.command"
"""The tag that holds the command."""
TRAINING = ("main", "finetune", "distill", "baseline", "continual")
"""Steps whose runs are called after their networks."""
LONGEST = 120
"""Characters of a name, which the UI shows in one line."""
SAID = ("seed", "method", "method.name", "model.student.name", "model/student", "model/teacher", "model.teachers")
"""Keys that a name says anyway."""
COLLECTIONS = ("ablate", "overlap", "sweep", "table")
"""Steps made of runs, which find their interrupted run by themselves, and copy their best student."""
LATE = ("method.num_stages", "method.student_epochs_per_stage", "finetune.", "dataset", "augment")
"""Keys named last, and cut off first where a name is too long: what tells a method's runs apart comes before them."""
CARELESS = ("force", "workers", "cluster", "cluster.", "storage", "anyway", "reason")
"""Steps' own keys that say how, not what."""


def name_of(step: str, config: Config, command: Command | None = None, label: str = "") -> str:
    """What a run is called unless its user has named it: step, networks, method, what was changed, seed.

    Args:
        label: instead of the step, of a nested run.

    Example:
        >>> from pipeline.compose.compose import compose
        >>> name_of("distill", compose("quickstart"), Command(overrides=("method.kd_alpha=0.8",)))
        'distill resnet8 ← resnet20+wrn_16_1 asib kd_alpha=0.8 s0'
    """
    words, m = [label or step], config.method
    if step not in TRAINING:
        words += [shown(config.model.student.name)] if step == "evaluate" else []
        words += [] if command is None else _own(step, command.own)
    elif step == "finetune":
        words.append(_teachers(config))
    elif step == "baseline" or not (m.distils and config.model.teachers):
        words.append(shown(config.model.student.name))
    else:
        words += [shown(config.model.student.name), "←", _teachers(config)]
    if step in ("main", "distill", "continual"):
        words.append(config.rung or method_of(config, command))
    changed = [] if command is None else [text.removeprefix(f"{step}.") for text in changes(command)]
    changed = [text for text in changed if step != "baseline" or not text.startswith("finetune.")]
    seed = [f"s{config.seed}"] if step in TRAINING else []
    while changed and len(" ".join([*words, *changed, *seed])) > LONGEST:
        changed = [*changed[:-2], "…"] if len(changed) > 1 else []
    return " ".join([*words, *changed, *seed])


def method_of(config: Config, command: Command | None) -> str:
    """The method's name, as it was asked for: replay, ewc and joint are keys of finetune (docs/continual.md)."""
    texts = () if command is None else command.overrides
    asked = [value for key, _, value in (text.partition("=") for text in texts) if key == "method"]
    return asked[-1] if asked and asked[-1].isidentifier() else config.method.name


def name_of_refused(step: str, message: str) -> str:
    """What a run of `mlflow run` is called that never began.

    Example:
        >>> name_of_refused("distill", "method.kd_alpha=2: must be at most 1")
        'distill refused: method.kd_alpha=2: must be at most 1'
    """
    name = f"{step} refused: {message}"
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def changes(command: Command) -> list[str]:
    """What the command changes in how its configuration computes, beyond what a name says anyway: `kd_alpha=0.8`.

    Those of `LATE` come last.
    """
    found: dict[str, str] = {}
    for text in command.overrides:
        key, _, value = text.lstrip("+").partition("=")
        if not (key in SAID or listed(key, NOT_COMPUTATION) or key.startswith(("model.teachers.", "~"))):
            found[key] = value.strip()
    return told({key: found[key] for key in sorted(found, key=_late)})


def _late(key: str) -> int:
    return next((rank for rank, late in enumerate(reversed(LATE), 1) if listed(key, [late, f"{late}."])), 0)


def told(values: Mapping[str, object]) -> list[str]:
    """Dotted keys and values, briefly; a teacher's fine-tuning in full, whose `epochs` are not the student's.

    Example:
        >>> told({"method.tau": 3.14159, "seed": 1})
        ['tau=3.142', 'seed=1']
    """
    short = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return [f"{key if key.startswith('finetune.') else key.rpartition('.')[2]}={v}" for key, v in short.items()]


def command_of(step: str, command: Command, environment: Mapping[str, str] = os.environ) -> str:
    """A line for a shell that asks for the same run anew, the variables that stand for overrides included.

    Passwords in addresses are hidden: everybody can read the line.
    """
    asked = [f"{name}={shlex.quote(environment[name])}" for name in shortcuts.VARIABLES if environment.get(name)]
    cfg = [f"cfg={command.cfg}"] if command.cfg else []
    overrides = [text for text in command.overrides if not text.startswith("resume=")]
    own = [f"{key}={value}" for key, value in command.own.items()]
    words = [urls.hidden(word) for word in (*cfg, *own, *overrides)]
    return " ".join([*asked, shlex.join(["python", "-m", f"steps.{step}", *words])])


def continued(step: str, command: str, run: str) -> str:
    """The line that continues an interrupted run, from the one that asked for it and the run's id or folder."""
    return command if step in COLLECTIONS else f"{command} resume={run}"


def _own(step: str, own: Mapping[str, str]) -> list[str]:
    """What a step that trains no single student was asked for; a key called like its step goes without saying."""
    given = {key: value for key, value in own.items() if value and not listed(key, CARELESS)}
    return [_brief(value) if key in (step, "name") else f"{key}={_brief(value)}" for key, value in given.items()]


def _brief(value: str) -> str:
    """Ids shortened, as people quote them; files of settings by their names."""
    if value.endswith((".yaml", ".yml")):
        return Path(value).stem
    return ",".join(part[:8] if len(part) == 32 else part for part in value.removeprefix("runs:/").split(","))


def _teachers(config: Config) -> str:
    return "+".join(shown(teacher.name) for teacher in config.model.teachers)


def shown(network: str) -> str:
    """A network as tables of the field call it."""
    return network.removeprefix("cifar_")
