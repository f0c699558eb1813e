"""Where workers run: conf/cluster/<name>.yaml or a YAML file anywhere, and `-P cluster.<key>=<value>`.

Needs neither torch nor submitit.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from pipeline.compose.groups import locate
from pipeline.compose.settings import read_section
from pipeline.config import Section, key
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


class ClusterConfig(Section):
    """The keys of every kind of cluster; `name` is the file's, without its folder and suffix."""

    kind: Literal["local", "slurm", "command"]
    name: str = Field(default="", exclude=True)
    processes_per_trial: Group = key(1, "processes that train one trial together, each with a device of its own")


class LocalCluster(ClusterConfig):
    """Workers that are processes of this machine."""

    kind: Literal["local"] = "local"
    gpus: Literal["auto"] | tuple[Index, ...] = key("auto", "GPUs to use; auto: all that this machine shows")
    timeout_minutes: Minutes | None = key(None, "a worker gets SIGUSR2 half a minute before, then it is killed")


class SlurmCluster(ClusterConfig):
    """Workers that are jobs of a Slurm array; null leaves a key to the cluster's own defaults."""

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


class CommandCluster(ClusterConfig):
    """Workers that a line of shell starts, one each: any scheduler, `ssh`, or a program of your own."""

    kind: Literal["command"] = "command"
    command: str = key("", "starts a worker; {command} and {script}: what it runs, {resources}, {name}, {gpus}, {cpus}")
    resources: str = key("", "what {resources} stands for: options of the scheduler")
    cancel: str | None = key(None, "ends a job; {job}: the first word with a digit in what the command has printed")
    gpus_per_node: Processes = key(0, "GPUs of one worker: {gpus}")
    cpus_per_task: Threads | None = key(None, "cores, and threads, of one process: {cpus}; null: 1")
    setup: tuple[str, ...] = key((), "shell lines before the worker, such as `module load cuda`")
    silent_s: AtLeastOne = key(180, "seconds without a sign of life after which a worker is replaced")


Cluster = Annotated[LocalCluster | SlurmCluster | CommandCluster, Field(discriminator="kind")]


def load(name_or_path: str, settings: Mapping[str, str]) -> ClusterConfig:
    """A cluster's file with what was set on the command line.

    Args:
        name_or_path: a name in conf/cluster, or the path of a YAML file.
        settings: `{"partition": "gpu", "additional.exclusive": "true"}`, as `-P cluster.partition=gpu` gives them.

    Raises:
        UserError: no such file, an unknown key, a value that does not fit.
    """
    file = locate("cluster", name_or_path)
    found: ClusterConfig = read_section(Cluster, "cluster", name_or_path, file, settings, name=file.stem)
    return found
