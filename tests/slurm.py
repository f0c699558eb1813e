"""A real Slurm of one node on loopback, for tests: its own keys, ports and folders, gone with its jobs at the end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.servers import free_port

START_S = 60.0
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

_CONF = """
ClusterName=asib
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
ReturnToService=2
KillWait=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 State=UP
"""


class SlurmCluster:
    """munged, slurmctld and slurmd of one cluster; `conf` is what SLURM_CONF must name."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="asib-slurm-"))  # short: the socket's path has a limit
        self.conf = self.folder / "slurm.conf"
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start it, and wait until its node takes jobs."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        host, cpus = socket.gethostname().split(".")[0], os.cpu_count()
        ports = {"controller": free_port(), "node": free_port()}
        self.conf.write_text(_CONF.format(folder=self.folder, host=host, cpus=cpus, **ports))
        # Slurm counts character devices, and does not look what they are
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        places = {"key-file": key.name, "socket": "munge.socket", "seed-file": "seed", "pid-file": "munged.pid"}
        places["log-file"] = "munged.log"
        self._spawn(["munged", "--foreground", "--force", *(f"--{k}={self.folder / v}" for k, v in places.items())])
        _wait_for((self.folder / "munge.socket").exists, "munged", self.log)
        self._spawn(["slurmctld", "-D", "-i"])
        self._spawn(["slurmd", "-D", "-N", host])
        _wait_for(lambda: self.run("sinfo", "-h", "-o", "%T").strip() == "idle", "an idle node", self.log)

    def run(self, *command: str) -> str:
        """What a Slurm command prints; empty when it fails."""
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else ""

    def environment(self) -> Mapping[str, str]:
        """This process's, with the cluster's configuration."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def clear(self) -> None:
        """End all jobs."""
        self.run("scancel", "--user=root")
        _wait_for(lambda: not self.run("squeue", "-h").strip(), "the end of all jobs", self.log)

    def stop(self) -> None:
        """End the jobs and the daemons, in whatever state they are, and remove the folder."""
        try:
            if len(self._processes) == 3:
                self.clear()
        finally:
            for process in reversed(self._processes):
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(10.0)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            shutil.rmtree(self.folder, ignore_errors=True)

    def log(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{p.name}:\n{p.read_text()[-1500:]}" for p in sorted(self.folder.glob("*.out.log")))

    def _spawn(self, command: list[str]) -> None:
        with (self.folder / f"{command[0]}.out.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=self.environment(), start_new_session=True)
            )


def _wait_for(condition: Callable[[], bool], what: str, log: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {START_S} s\n{log()}"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """One cluster for the session."""
    missing = [p for p in PROGRAMS if shutil.which(p) is None]
    assert not missing, f"{', '.join(missing)} missing: apt-get install slurmctld slurmd slurm-client munge"
    cluster = SlurmCluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster, which this process and what it starts will find; without jobs afterwards."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.conf))
    yield slurm_cluster
    slurm_cluster.clear()
