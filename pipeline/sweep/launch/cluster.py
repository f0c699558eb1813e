"""Where a sweep's workers run: conf/cluster/<name>.yaml or a YAML file anywhere, and `-P cluster.<key>=<value>`.

Needs neither torch nor submitit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, ValidationError

from pipeline.compose.groups import locate
from pipeline.compose.settings import parse_data, read_yaml
from pipeline.config.describe import is_text, takes, written
from pipeline.config.names import near_miss
from pipeline.config.numbers import (
    AtLeastOne,
    Gigabytes,
    Group,
    Index,
    JobMinutes,
    Minutes,
    Processes,
    Threads,
    Whole,
)
from pipeline.config.schema import Section, key
from pipeline.errors import UserError


class ClusterConfig(Section):
    """What every kind of cluster has; `name` is the file's, without its folder and suffix."""

    kind: Literal["local", "slurm"]
    name: str = Field(default="", exclude=True)
    processes_per_trial: Group = key(1, "processes that train one trial together, each with a device of its own")


class LocalCluster(ClusterConfig):
    """Processes of this machine."""

    kind: Literal["local"] = "local"
    gpus: Literal["auto"] | tuple[Index, ...] = key("auto", "GPUs to use; auto: all that this machine shows")
    timeout_minutes: Minutes | None = key(None, "a worker gets SIGUSR2 half a minute before, then it is killed")


class SlurmCluster(ClusterConfig):
    """Jobs of a Slurm array; what is null is left to the cluster's own defaults."""

    kind: Literal["slurm"] = "slurm"
    partition: str | None = key(None, "of sinfo")
    account: str | None = key(None, "who pays")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "features that a node must have")
    comment: str | None = key(None, "shown by squeue")
    time_minutes: JobMinutes = key(240, "limit of one job; a worker is queued again when it comes near")
    gpus_per_node: Processes = key(1, "GPUs of one worker")
    cpus_per_task: Threads | None = key(None, "cores, and threads, of one process")
    mem_gb: Gigabytes | None = key(None, "memory of one worker")
    array_parallelism: AtLeastOne | None = key(None, "workers that may run at a time; null: all")
    requeue: bool = key(True, "a preempted worker, or one at its time limit, is queued again")
    signal_delay_s: AtLeastOne = key(
        180, "seconds between SIGUSR2 and the time limit: for a checkpoint and its delivery"
    )
    setup: tuple[str, ...] = key((), "shell lines before the worker, such as `module load cuda`")
    additional: dict[str, str | Whole | bool] = key({}, "further options of sbatch, such as {exclusive: true}")


KINDS: dict[str, type[ClusterConfig]] = {"local": LocalCluster, "slurm": SlurmCluster}


def load(name_or_path: str, settings: Mapping[str, str]) -> ClusterConfig:
    """A cluster's file with what was set on the command line.

    Args:
        name_or_path: a name in conf/cluster, or the path of a YAML file.
        settings: `{"partition": "gpu", "additional.exclusive": "true"}`, as `-P cluster.partition=gpu` gives them.

    Raises:
        UserError: no such file, an unknown key, a value that does not fit.
    """
    file = locate("cluster", name_or_path)
    content = _read(file, name_or_path)
    if content.get("kind") not in KINDS:
        kind = written(content.get("kind"))
        raise UserError(f"cluster={name_or_path}: kind: got {kind}; give one of {', '.join(KINDS)}")
    schema = KINDS[content["kind"]]
    for name, text in settings.items():
        head, _, inner = name.partition(".")
        field = schema.model_fields.get(head)
        value = text if field is not None and is_text(field) and text != "null" else _value(name, text)
        if inner and isinstance(content.get(head, {}), dict):
            content[head] = {**content.get(head, {}), inner: value}
        else:
            content[name] = value
    known = schema.model_fields.keys() - {"name"}
    for name in content:
        if name not in known:
            raise UserError(_unknown(str(name), known, content["kind"]))
    try:
        return schema.model_validate({**content, "name": file.stem})
    except ValidationError as error:
        raise UserError(_explain(error, schema)) from error


def _read(file: Path, given: str) -> dict[str, Any]:
    content = read_yaml(file, f"cluster={given}")
    if not isinstance(content, DictConfig):
        raise UserError(f"cluster={given}: holds no keys; begin with kind: local or kind: slurm")
    plain: Any = OmegaConf.to_container(content)
    return {str(name): value for name, value in plain.items()}


def _value(name: str, text: str) -> Any:
    return parse_data(text, f"cluster.{name}={text:.100}")


def _unknown(name: str, known: set[str], kind: str) -> str:
    others = [other for other, schema in KINDS.items() if name in schema.model_fields.keys() - {"name"}]
    if others:
        return f"cluster.{name}: a key of kind {others[0]}; kind {kind} has {', '.join(sorted(known))}"
    near = near_miss(name, known)
    hint = f"did you mean cluster.{near}?" if near else f"there are {', '.join(sorted(known))}"
    return f"cluster.{name}: unknown key; {hint}"


def _explain(error: ValidationError, schema: type[ClusterConfig]) -> str:
    problem = error.errors(include_url=False)[0]
    name, content = str(problem["loc"][0]), problem["input"]
    field = schema.model_fields[name]
    return f"cluster.{name}: got {written(content)}; give {takes(problem, field)}"
