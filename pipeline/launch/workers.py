"""How many workers a step has and where they run: its own keys `workers` and `cluster`, and what starts them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.config.numbers import WORKERS, whole
from pipeline.extras import require
from pipeline.launch import cluster
from pipeline.launch.cluster import ClusterConfig, CommandCluster, LocalCluster, SlurmCluster
from pipeline.launch.command import Command
from pipeline.launch.launcher import Launcher
from pipeline.launch.local import Here
from pipeline.launch.slurm import Slurm

OWN = {
    "workers": "how many run at a time; 1 by default",
    "cluster": "where workers run: local (the default), slurm, command, or a YAML file",
    "cluster.": "any key of the cluster's file: cluster.partition=gpu",
}
LAUNCHERS: dict[str, type[Launcher]] = {"local": Here, "slurm": Slurm, "command": Command}
"""Launchers by kind of cluster."""


@dataclass(frozen=True)
class Workers:
    """`number`: how many run at a time."""

    cluster: ClusterConfig
    number: int

    @property
    def needless(self) -> bool:
        """Whether the step's own process would do the same."""
        return self.number == 1 and self.cluster.model_dump() == LocalCluster().model_dump()

    def on_gpus(self, config: Config) -> bool:
        """Whether they compute on GPUs although this machine may have none: it only submits them."""
        there = isinstance(self.cluster, SlurmCluster | CommandCluster) and self.cluster.gpus_per_node > 0
        return there and config.device == "auto"

    def launcher(self, folder: Path) -> Launcher:
        """What starts them; `folder` is for their logs. Raises UserError: submitit is not installed."""
        if not isinstance(self.cluster, CommandCluster):
            require(f"cluster={self.cluster.name}", "submitit")
        return LAUNCHERS[self.cluster.kind](self.cluster, folder, self.number)


def read(own: Mapping[str, str]) -> Workers:
    """Read `workers`, `cluster` and `cluster.<key>`. Raises UserError."""
    number = whole("workers", own.get("workers") or "1", high=WORKERS, why="each is a process or a cluster's job")
    return Workers(cluster.load(own.get("cluster") or "local", cli.settings(own, "cluster")), number)
