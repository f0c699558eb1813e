"""The research code's shortcuts for batch jobs: environment variables that act as overrides in every step.

    TEACHER_PAIR="t1,t2"   the two networks that teach     STUDENT=<network>   the network that is kept
    METHOD=<name>          how it is distilled             SEED=<number>       of every random stream of the run
    METHOD="m1,m2"         the rows of -e table, the research code's METHOD_LIST; a run of another step has one method

They win over `cfg`, and an override of the same key on the command line wins over them. Empty ones are ignored.
MLflow's own MLFLOW_EXPERIMENT_NAME names the experiment where neither `cfg` nor an override does.
Names of networks are those of the zoo, which needs torch: it is imported only when a variable names one.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.compose import cli
from pipeline.compose.compose import Setting, keys_of
from pipeline.compose.groups import groups
from pipeline.config.numbers import MOST_SEED, whole
from pipeline.config.words import near_miss, suggestion
from pipeline.errors import UserError

logger = logging.getLogger("asib")
_NAMED = re.compile(r"model\.teachers=\[\s*([a-zA-Z][\w.]*(?:\s*,\s*[a-zA-Z][\w.]*)*)\s*\]")
_NAMES = ("model.teachers.0.name", "model.teachers.1.name")


@dataclass(frozen=True)
class Shortcuts:
    """What the environment asks for.

    Attributes:
        overrides: to be put before those of the command line, none of which sets the same key.
        teachers: the two networks of TEACHER_PAIR, or none.
        experiment: MLFLOW_EXPERIMENT_NAME, or none.
        methods: those of METHOD for a step that takes several, or none.
    """

    overrides: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    experiment: str = ""
    methods: tuple[str, ...] = ()

    def presets(self, composed: DictConfig) -> list[Setting]:
        """The experiment, unless a file names one, and the pair in place of the composed teachers."""
        named = OmegaConf.select(composed, "tracking.experiment") is not None
        found = [Setting("tracking.experiment", self.experiment)] if self.experiment and not named else []
        if self.teachers:
            found.append(Setting("model.teachers", _in_place_of(_entries(composed), self.teachers)))
        return found


def read(environment: Mapping[str, str], overrides: Sequence[str] = (), rows: str | None = None) -> Shortcuts:
    """The shortcuts that are set, each with one line in the log.

    Args:
        overrides: those of the command line.
        rows: `methods=` of a step that takes several methods, empty where it is not given; None: another step.

    Raises:
        UserError: an invalid value, named with its variable; an invalid override.

    Example:
        >>> read({"SEED": "3"}).overrides
        ('seed=3',)
    """
    asked = {name: text for name in _SHORTCUTS if (text := environment.get(name, "").strip().strip("'\"").strip())}
    given = keys_of(overrides) if asked else set()
    found: list[str] = []
    teachers: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    for name, text in asked.items():
        keys, resolve = _SHORTCUTS[name]
        if name == "METHOD" and rows is not None:
            if rows:
                logger.info("%s=%s in the environment is ignored: methods is given", name, text)
                continue
            methods = tuple(_listed(text))
            logger.info("methods=%s (from the environment: %s)", ",".join(methods), name)
            continue
        explicit = next((key for key in keys if key in given), None)
        if explicit is not None:
            logger.info("%s=%s in the environment is ignored: %s is given", name, text, explicit)
            continue
        meant, but = resolve(text), ""
        if name == "TEACHER_PAIR":
            teachers, meant = meant, (f"model.teachers=[{','.join(meant)}]",)
            but = "".join(f"; {key} is given" for key in _NAMES if key in given)
        else:
            found += meant
        logger.info("%s (from the environment: %s%s)", " ".join(meant), name, but)
    return Shortcuts(tuple(found), teachers, environment.get("MLFLOW_EXPERIMENT_NAME", "").strip(), methods)


def named_teachers(overrides: Sequence[str]) -> list[str]:
    """The overrides, where `model.teachers=[resnet56,wrn_40_2]` names networks, with their names in full.

    Raises UserError, with the nearest name: no such network.
    """
    return [_NAMED.sub(_in_full, text) for text in overrides]


def _in_full(found: re.Match[str]) -> str:
    names = [_network(word.strip(), found[0]) for word in found[1].split(",")]
    trained = {name: _has_weights(name) for name in names}
    logger.info("teachers: %s", ", ".join(f"{name} (pretrained)" if there else name for name, there in trained.items()))
    specs = [f"{{name: {name}, pretrained: {str(trained[name]).lower()}}}" for name in names]
    return f"model.teachers=[{','.join(specs)}]"


def wants_dry_run(environment: Mapping[str, str]) -> bool:
    """Whether DRY_RUN asks to show what would be done. Raises UserError: neither yes nor no."""
    text = environment.get("DRY_RUN", "").strip().lower()
    if text and text not in cli.TRUE + cli.FALSE:
        raise UserError(f"DRY_RUN={text} in the environment: give 1 or 0")
    return text in cli.TRUE


# ------------------------------------------------------------------------------------------------ the variables


def _pair(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if len(names) != 2 or not all(names):
        raise UserError(
            f"TEACHER_PAIR={text} in the environment: give two networks, such as cifar_resnet32x4,cifar_wrn_40_2"
            " (any number of teachers: model.teachers=[…])"
        )
    return tuple(_network(name, f"TEACHER_PAIR={text} in the environment") for name in names)


def _student(text: str) -> tuple[str, ...]:
    """As in the research code, a student without pretrained weights."""
    options = groups()["model/student"]
    name = text if text in options else _network(text, f"STUDENT={text} in the environment")
    if name in options:
        return (f"model/student={name}",)
    return f"model.student.name={name}", "model.student.pretrained=false"


def _listed(text: str) -> list[str]:
    """`kd,crd`, `kd crd` and `[kd, crd]` alike."""
    return list(filter(None, re.split(r"[\s,]+", text.strip("[]"))))


def _method(text: str) -> tuple[str, ...]:
    options = groups()["method"]
    if len(several := _listed(text)) > 1:
        raise UserError(
            f"METHOD={text} in the environment: a run has one method; compare several with -e table "
            f"(python -m steps.table methods={','.join(several)})"
        )
    if text not in options:
        hint = suggestion(text.lower(), options)
        raise UserError(f"METHOD={text} in the environment: no such method; {hint}there are {', '.join(options)}")
    return (f"method={text}",)


_SHORTCUTS: dict[str, tuple[tuple[str, ...], Callable[[str], tuple[str, ...]]]] = {
    "TEACHER_PAIR": (("model.teachers", "model/teacher"), _pair),
    "STUDENT": (("model/student", "model.student.name"), _student),
    "METHOD": (("method", "method.name"), _method),
    "SEED": (("seed",), lambda text: (f"seed={whole('SEED', text, 0, MOST_SEED, where=' in the environment')}",)),
}
"""Variable -> the keys it sets, and what reads it."""
VARIABLES = tuple(_SHORTCUTS)


# -------------------------------------------------------------------------------------------------- networks


def _network(text: str, source: str) -> str:
    """A network's name as configurations use it: the research code's `resnet8x4_scratch` is cifar_resnet8x4.

    Raises UserError, with the nearest name: no such network.
    """
    from timm import list_models

    from models import zoo

    name = text
    for role in zoo.ROLES:  # there the name included role and initialisation, which are separate keys here
        name = name.removesuffix(role) or name
    try:
        full = zoo.resolve(name)
    except ValueError as error:
        known = {word.removeprefix("cifar_"): word for word in (*list_models(), *zoo.ALIASES)}
        near = near_miss(name.removeprefix("cifar_"), known)
        hint = f"did you mean {known[near]}?" if near else "give a timm classifier or a cifar_* network"
        raise UserError(f"{source}: no network is called {text}; {hint}") from error
    return full if full == f"cifar_{name}" and name not in zoo.ALIASES else name


def _full_name(name: Any) -> str | None:
    """What the zoo makes of a name; None where it knows no such network."""
    from models import zoo

    try:
        return zoo.resolve(str(name))
    except ValueError:
        return None


def _has_weights(name: Any) -> bool:
    from timm.models import is_model_pretrained

    full = _full_name(name)
    return full is not None and bool(is_model_pretrained(full))


def _entries(composed: DictConfig) -> list[dict[str, Any]]:
    """The composed teachers, which may be a list or numbered keys."""
    teachers = OmegaConf.select(composed, "model.teachers")
    plain: Any = OmegaConf.to_container(teachers) if OmegaConf.is_config(teachers) else []
    items = list(plain.values()) if isinstance(plain, dict) else plain
    return [item if isinstance(item, dict) else {} for item in items]


def _in_place_of(before: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The teachers of these names.

    A network that is already among the teachers stays as it is, with its checkpoint. Any other takes over the settings
    of the teacher that it replaces, except its checkpoint; it is pretrained if it has weights, unless the replaced
    teacher has some too and was told not to use them.
    """
    left = list(before)
    teachers = []
    for index, name in enumerate(names):
        same = next((entry for entry in left if _full_name(entry.get("name")) == _full_name(name)), None)
        if same is not None:
            left.remove(same)
            teachers.append(same)
            continue
        former = before[index] if index < len(before) else {}
        spared = former.get("pretrained") is False and _has_weights(former.get("name"))
        kept = {key: value for key, value in former.items() if key != "checkpoint"}
        teachers.append({**kept, "name": name, "pretrained": _has_weights(name) and not spared})
    for entry in left:
        if entry.get("checkpoint"):
            logger.info("checkpoint %s of %s is left out", entry["checkpoint"], entry.get("name"))
    return teachers
