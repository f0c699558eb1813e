"""Composition: Hydra groups of conf/, a user's file and overrides become one validated `Config`.

Group choices go to Hydra; values are set on what it composed, because Hydra's overrides neither reach into lists
nor take values such as `a=b` or `it's.pt` without quoting. Imports no torch: composing takes well under a second.
"""

import logging
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, Sweep, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipeline.compose.foreign import foreign
from pipeline.compose.groups import CONF, NOT_GROUPS, groups, locate
from pipeline.compose.settings import read_yaml
from pipeline.config import Config, UnknownKey, configure, explain, field_of, flatten
from pipeline.config.methods.base import PROTOCOL
from pipeline.config.words import is_list_of_sections, is_text, section_of, suggestion, written
from pipeline.errors import UserError
from pipeline.paths import printable

logger = logging.getLogger("asib")
_EXPERIMENT = "experiment"
_SECTIONS = tuple(name for name, field in Config.model_fields.items() if section_of(field) is not None)
_HYDRA_IS_GLOBAL = threading.Lock()
_PARSER = OverridesParser.create()
_URI = re.compile(r"[a-z][a-z0-9+.-]*:/", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """One override of a value: `key=value`, or `~key` to return to the default."""

    key: str
    value: Any = None
    delete: bool = False


def compose(
    cfg: str | None = None,
    overrides: Sequence[str] = (),
    fetch: Callable[[str], Path] | None = None,
    presets: Callable[[DictConfig], Sequence[Setting]] = lambda composed: (),
) -> Config:
    """The effective configuration, validated and immutable.

    Args:
        cfg: name of a file in conf/experiment, or path of a YAML file anywhere: changes, or a whole dumped
            configuration, with or without a Hydra defaults list. None: the defaults. Of a fetched file
            (`runs:/…`) only what changes the computation is used.
        overrides: `method.tau=2`, `model.teachers.0.checkpoint=x`, group choices such as `dataset=cifar100`;
            Hydra's `~key`, `+key` and `++key` work too. The last one wins; they win over `cfg`.
        fetch: downloads `runs:/<id>/best.yaml` and returns its path.
        presets: values derived from what groups and `cfg` yield; they win over both, and `overrides` over them.

    Raises:
        UserError: one line with the key, its value and what to give instead.

    Example:
        >>> compose("quickstart", ["method.kd_alpha=0.4"]).method.kd_alpha
        0.4
    """
    return next(compose_each([presets], cfg, overrides, fetch))


def compose_each(
    presets: Iterable[Callable[[DictConfig], Sequence[Setting]]],
    cfg: str | None = None,
    overrides: Sequence[str] = (),
    fetch: Callable[[str], Path] | None = None,
) -> Iterator[Config]:
    """What `compose` gives for each of several presets; Hydra, which takes half a second, is asked once."""
    choices, settings = _read_overrides(overrides)
    if _EXPERIMENT in choices:
        if cfg:
            raise UserError(f"experiment={choices[_EXPERIMENT]} and cfg={cfg} name the same thing: give one of them")
        cfg = choices.pop(_EXPERIMENT)
    source = f"cfg={cfg}" if cfg else "conf/config.yaml"
    with _one_line(source):
        file, theirs = None, None
        if cfg and _URI.match(cfg):
            if fetch is None:
                raise UserError(f"{source} lies on a tracking server: download it and give its path")
            theirs, left_out = foreign(fetch(cfg), source, [*choices, *(setting.key for setting in settings)])
            if left_out:
                logger.info("%s: left out, since they say where, or what to run: %s", source, ", ".join(left_out))
        elif cfg:
            file = locate(_EXPERIMENT, cfg, "cfg")
            if not isinstance(read_yaml(file, source), DictConfig):
                raise UserError(f"{source}: holds a list, not groups of keys")
        groups_alone = _compose_groups(file, theirs, choices)
    for preset in presets:
        with _one_line(source):
            composed = deepcopy(groups_alone)
            for setting in [*preset(composed), *settings]:
                _apply(composed, setting)
            plain: Any = OmegaConf.to_container(composed, resolve=True)
        sections = {name: value for name, value in plain.items() if value is not None or name not in _SECTIONS}
        try:
            made = configure(sections)
        except ValidationError as error:
            raise UserError(explain(error, sections)) from error
        yield made


def dump(config: Config) -> str:
    """The effective configuration as YAML; `compose(cfg=<that file>)` gives an equal one with the same hash."""
    values = _escaped(config.model_dump(mode="json"))
    text: str = yaml.dump(values, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return text


class _Dumper(getattr(yaml, "CDumper", yaml.Dumper)):  # type: ignore[misc]
    """What `OmegaConf.to_yaml` writes, on libyaml where that is there: several times as fast.

    `get_omega_conf_dumper` is private API of omegaconf, checked with 2.3.1.
    """


_Dumper.add_representer(str, get_omega_conf_dumper().str_representer)


def params(config: Config) -> dict[str, str]:
    """The configuration flattened for MLflow; each value is written as an override would be (`null`, `[6,6]`)."""
    return {name: written(value) for name, value in flatten(config).items()}


# ---------------------------------------------------------------------------------------------- overrides


def keys_of(overrides: Sequence[str]) -> set[str]:
    """The groups and the dotted keys that overrides set. Raises UserError: an invalid override.

    Example:
        >>> sorted(keys_of(["optim=sgd", "model={student: {name: resnet18}}"]))
        ['model.student.name', 'optim']
    """
    choices, settings = _read_overrides(overrides)
    return {*choices, *(key for setting in settings for key in _leaves(setting.key, setting.value))}


def _leaves(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, dict):
        yield key
        return
    for inner, item in value.items():
        yield from _leaves(f"{key}.{inner}", item)


def _read_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], list[Setting]]:
    """Group choices (the last of each group) and settings of values, in order."""
    options = groups()
    choices: dict[str, str] = {}
    settings: list[Setting] = []
    for text in overrides:
        prefix, key, value = _split(text)
        if "@" in key:
            raise UserError(f"{text}: packages (@) are not for overrides; choose {key.split('@')[0]}=<option>")
        if key.split(".")[0] in NOT_GROUPS:
            if key.split(".")[0] == "promotion":
                raise UserError(f"{text}: a gate is named for -e promote: python -m steps.promote gate=<file> …")
            raise UserError(f"{text}: this is for -e sweep: python -m steps.sweep {text} …")
        if (key in options or "/" in key) and not (value or "").lstrip().startswith("{"):
            if prefix == "~":
                choices.pop(key, None)
                if key not in (_EXPERIMENT, "model/teacher"):
                    raise UserError(f"{text}: {key} cannot be left out; choose {' or '.join(options.get(key, []))}")
                if key == "model/teacher":
                    choices[key] = "none"
                continue
            choices[key] = _option(key, value or "", options)
        else:
            settings.append(_setting(prefix, key, value))
    return choices, settings


def _split(text: str) -> tuple[str, str, str | None]:
    """`++a[0].b=x` -> `("++", "a.0.b", "x")`."""
    match = re.match(r"\s*(\+\+|\+|~|)([^\s=+~]+)\s*(?:=(.*))?$", text, re.DOTALL)
    if match is None or (match[3] is None and match[1] != "~"):
        raise UserError(
            f"{text!r} is not an override: write key=value, such as method.kd_alpha=0.5 (quote values with spaces)"
        )
    return match[1], re.sub(r"\[(\d+)\]", r".\1", match[2]), match[3]


def _option(group: str, value: str, options: dict[str, list[str]]) -> str:
    if group not in options:
        raise UserError(f"{group}: no such group; {suggestion(group, options)}there are {', '.join(options)}")
    chosen = value.strip().strip("'\"").removesuffix(".yaml")
    if chosen not in options[group]:
        hint = suggestion(chosen, options[group])
        raise UserError(f"{group}={chosen}: no such option; {hint}there are {', '.join(options[group])}")
    return chosen


def _setting(prefix: str, key: str, value: str | None) -> Setting:
    path = key.split(".")
    found = field_of(path)
    if found is None and path[0] == "method" and len(path) == 2 and prefix != "~":
        # a key of a method from outside, or one that validation refuses
        parsed = _parse(key, value or "")
        return Setting(key, (value or "").strip() if parsed is None else parsed.value())
    if found is None:
        raise UnknownKey(key)
    beyond = path[found[1] :]  # at most the number of an item: schedule.milestones.0
    if beyond and not (_is_list(found[0]) and len(beyond) == 1 and beyond[0].isdecimal()):
        raise UnknownKey(key)
    if prefix == "~":
        return Setting(key, delete=True)
    text = value or ""
    parsed = _parse(key, text)
    element = parsed.value() if parsed is not None and parsed.value_type == ValueType.ELEMENT else None
    if is_text(found[0]):  # taken literally: 12e4567 is a run, not a number
        quoted = parsed is not None and isinstance(parsed._value, QuotedString)
        null = parsed is not None and parsed.value_type == ValueType.ELEMENT and element is None
        return Setting(key, element if quoted else None if null else text.strip())
    if parsed is None:
        return Setting(key, text.strip())
    if isinstance(parsed._value, Sweep):
        if key == "seed":
            raise UserError(
                f"seed={text}: several runs; a step that makes them takes seeds={text}: table, ablate, sweep"
            )
        raise UserError(f"{key}={text}: several values; a list is written {key}=[…], several runs are a sweep")
    return Setting(key, element)


def _parse(key: str, text: str) -> Override | None:
    """The value by Hydra's grammar; None if that refuses it, and the text is meant literally."""
    try:
        parsed: Override = _PARSER.parse_override(f"key={text}")
    except HydraException:
        if text.lstrip()[:1] in ("[", "{"):
            raise UserError(f"{key}={text}: the brackets or quotes of this value do not match") from None
        return None
    except ValueError:  # Python reads no numbers of thousands of digits
        raise UserError(f"{key}={printable(text, 60)}: a number with too many digits; give a smaller one") from None
    return parsed


def _apply(composed: DictConfig, setting: Setting) -> None:
    """Set (or drop) one value; lists and items of lists must exist."""
    node: Any = composed
    path = setting.key.split(".")
    for depth, part in enumerate(path):
        whole = ".".join(path[:depth])
        if isinstance(node, ListConfig) and (not part.isdecimal() or int(part) >= len(node)):
            raise UserError(
                f"{setting.key}: {whole} has {len(node)} entries, numbered from 0; set the whole {whole}=[…]"
            )
        index: Any = int(part) if isinstance(node, ListConfig) else part
        if depth == len(path) - 1:
            break
        if not OmegaConf.is_config(child := node._get_node(index)) or child._is_none():
            if setting.delete:
                return
            field = field_of(path[: depth + 1])
            if field is not None and _is_list(field[0]):
                what = "are no entries" if is_list_of_sections(field[0]) else "is no list"
                raise UserError(f"{setting.key}: there {what} yet; set the whole {'.'.join(path[: field[1]])}=[…]")
            node[index] = {}
        node = node._get_node(index)
    if setting.delete:
        if isinstance(node, ListConfig) or index in node:
            del node[index]
    elif isinstance(setting.value, dict) and OmegaConf.is_dict(node.get(index)):
        node[index] = OmegaConf.merge(node[index], setting.value)
    else:
        node[index] = setting.value


def _is_list(field: FieldInfo) -> bool:
    return "tuple" in str(field.annotation)


# ---------------------------------------------------------------------------------------------- Hydra


def _compose_groups(file: Path | None, theirs: str | None, choices: dict[str, str]) -> DictConfig:
    """What Hydra makes of the groups, the file (or somebody else's text) and the choices.

    Explicit choices come last: they win over the file, a dumped configuration included, which names every key. Of the
    file's method, another one that is chosen takes over how long and on what the student is trained (`PROTOCOL`).
    """
    with (
        _HYDRA_IS_GLOBAL,
        _search_path(file, theirs) as (paths, name),
        initialize_config_dir(str(CONF), version_base="1.3"),
    ):
        chosen = [f"{group}={option}" for group, option in choices.items()]
        experiment = [f"{_EXPERIMENT}@_global_={name}"] if name else []
        composed = hydra_compose("config", overrides=[*paths, *chosen, *experiment])
        again = hydra_compose(None, overrides=[f"+{choice}" for choice in chosen]) if name and chosen else {}
        if name and "method" in choices:
            others = [f"{group}={option}" for group, option in choices.items() if group != "method"]
            before = hydra_compose("config", overrides=[*paths, *others, *experiment]).method
            if before.get("name") != again["method"]["name"]:  # the file's keys are another method's
                OmegaConf.set_struct(composed, False)
                composed.method = {key: before[key] for key in PROTOCOL if key in before}
    OmegaConf.set_struct(composed, False)
    merged = OmegaConf.merge(composed, again)
    OmegaConf.set_struct(merged, False)
    assert isinstance(merged, DictConfig)
    return merged


@contextmanager
def _search_path(file: Path | None, theirs: str | None) -> Iterator[tuple[list[str], str | None]]:
    """Hydra overrides and option name that make a file, wherever it lies, or a text an option of `experiment`."""
    inside = CONF / _EXPERIMENT
    if file is not None and file.is_relative_to(inside) and file.suffix == ".yaml":
        yield [], file.relative_to(inside).with_suffix("").as_posix()
    elif file is None and theirs is None:
        yield [], None
    else:
        with tempfile.TemporaryDirectory(prefix="asib-cfg-") as folder:
            own, siblings = Path(folder, "own", _EXPERIMENT), Path(folder, "siblings", _EXPERIMENT)
            own.mkdir(parents=True)
            siblings.parent.mkdir()
            if file is not None:
                siblings.symlink_to(file.parent, target_is_directory=True)
            (own / "given_file.yaml").write_bytes(file.read_bytes() if file is not None else (theirs or "").encode())
            yield [f"hydra.searchpath=['file://{own.parent}','file://{siblings.parent}']"], "given_file"


# ---------------------------------------------------------------------------------------------- errors, dumping


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Errors of YAML, OmegaConf and Hydra as one line."""
    try:
        yield
    except (yaml.YAMLError, UnicodeDecodeError) as error:  # the error is in another file that the defaults list names
        raise UserError(f"{source}: not valid YAML: {_flat(str(error))}") from error
    except RecursionError as error:
        raise UserError(f"{source}: refers to itself without end") from error
    except (HydraException, OmegaConfBaseException) as error:  # before OSError, which some of Hydra's are too
        raise UserError(f"{source}: {_flat(str(error)).replace('experiment/given_file', 'the file')}") from error
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error


def _flat(message: str) -> str:
    """Hydra's several lines as one, without the search path."""
    message = re.split(r"Config search path:|Set the environment variable|full_key:", message)[0]
    return re.sub(r"\s+", " ", message).strip()


def _escaped(value: Any) -> Any:
    """Escape texts so that OmegaConf reads them literally: `${` would be an interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)
    return value
