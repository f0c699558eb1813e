"""Workers: what every backend promises, on this machine and under a real Slurm (marker slurm), then each one's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.launch import processes
from pipeline.launch import slurm as slurm_backend
from pipeline.launch.cluster import load
from pipeline.launch.launcher import Launcher
from pipeline.launch.workers import LAUNCHERS
from tests.pipeline.launch.launch_work import hold
from tests.slurm import SlurmCluster

REPOSITORY = Path(__file__).parents[3]
TIMEOUT_S = 60.0
SMALL = {"gpus_per_node": "0", "cpus_per_task": "1", "time_minutes": "10"}  # what the test's node can run two of


class Site:
    """A launcher's folder, and the folder that its workers write to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder / "launch", folder / "notes"
        self.notes.mkdir(parents=True)
        self.made: list[Launcher] = []

    def launcher(self, cluster: str = "local", workers: int = 1, **settings: str) -> Launcher:
        usual = {"slurm": SMALL, "command": {"command": "{command} &", "silent_s": "2"}}.get(cluster, {})
        loaded = load(cluster, {**usual, **settings})
        self.made.append(LAUNCHERS[loaded.kind](loaded, self.folder, workers))
        return self.made[-1]

    def read(self, *names: str) -> list[dict[str, Any]]:
        """What these workers have written, once all have."""
        wait_for(lambda: all((self.notes / n).exists() for n in names), f"{names} of {self.logs()}")
        return [json.loads((self.notes / n).read_text()) for n in names]

    def processes(self) -> list[dict[str, Any]]:
        """Who the workers' processes are, as each has recorded itself."""
        return [json.loads(path.read_text()) for path in sorted((self.folder / "processes").glob("*.json"))]

    def finish(self) -> None:
        (self.notes / "done").touch()

    def logs(self) -> str:
        return "\n".join(p.read_text()[-2000:] for p in (self.folder / "jobs").glob("*_log.out"))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A place to work from, where only PYTHONPATH leads to the repository; no worker is left."""
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    made = Site(tmp_path)
    yield made
    for launcher in made.made:
        launcher.stop(0.2)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, f"waited {TIMEOUT_S} s for {what}"
        time.sleep(0.05)


# every backend -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "command", pytest.param("slurm", marks=pytest.mark.slurm)])
def backend(request: pytest.FixtureRequest) -> str:
    """The one list of backends; its name in conf/cluster."""
    if request.param == "slurm":
        request.getfixturevalue("slurm")
    return str(request.param)


def test_workers_run_to_their_end_with_an_index_their_share_of_the_cores_and_the_repository(
    backend: str, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launcher = site.launcher(backend, 2)
    launcher.check()
    assert launcher.alive() == 0
    launcher.start(hold, 2, folder=str(site.notes))
    assert launcher.alive() == 2, "right after the start"
    seen = site.read("0.0.json", "1.0.json")
    threads = "1" if backend != "local" else str(max(1, len(os.sched_getaffinity(0)) // 2))
    for index, worker in enumerate(seen):
        assert worker["index"] == index
        assert (worker["OMP_NUM_THREADS"], worker["PYTHONPATH"]) == (threads, str(REPOSITORY))
        assert not worker["CUDA_VISIBLE_DEVICES"]
    assert "PYTHONPATH" not in os.environ
    assert {p["pid"] for p in site.processes()} == {s["pid"] for s in seen}
    site.finish()
    wait_for(lambda: launcher.alive() == 0, "the workers' end")


@pytest.mark.slow
def test_stop_brings_sigterm_to_the_work_and_waits_for_it(backend: str, site: Site) -> None:
    launcher = site.launcher(backend, 2)
    launcher.start(hold, 2, folder=str(site.notes))
    pids = [s["pid"] for s in site.read("0.0.json", "1.0.json")]
    launcher.stop()
    assert site.read("0.0.end", "1.0.end") == [{"pid": pid, "signal": "SIGTERM"} for pid in pids]
    assert launcher.alive() == 0


@pytest.mark.slow
def test_a_killed_worker_is_not_alive_and_has_a_successor(backend: str, site: Site) -> None:
    launcher = site.launcher(backend, 2)
    launcher.start(hold, 2, folder=str(site.notes))
    first, _ = site.read("0.0.json", "1.0.json")
    os.kill(first["pid"], signal.SIGKILL)
    wait_for(lambda: launcher.alive() == 1, "the loss of one worker")
    launcher.start(hold, 1, folder=str(site.notes))
    assert site.read("2.0.json")[0]["index"] == 2
    assert launcher.alive() == 2


@pytest.mark.slow
def test_stop_ends_a_worker_that_has_only_just_been_started(backend: str, site: Site) -> None:
    launcher = site.launcher(backend)
    launcher.start(hold, 1, folder=str(site.notes))
    launcher.stop()
    assert launcher.alive() == 0


@pytest.mark.slow
def test_the_next_launcher_of_the_same_folder_finds_and_stops_the_workers(backend: str, site: Site) -> None:
    site.launcher(backend).start(hold, 1, folder=str(site.notes))
    (seen,) = site.read("0.0.json")
    again = site.launcher(backend)
    assert again.alive() == 1
    again.stop()
    assert site.read("0.0.end") == [{"pid": seen["pid"], "signal": "SIGTERM"}]


# on this machine ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_have_devices_in_turn_and_a_successor_takes_that_of_the_lost_one(site: Site) -> None:
    launcher = site.launcher(workers=3, gpus="[4,6]")
    launcher.start(hold, 3, folder=str(site.notes))
    seen = site.read("0.0.json", "1.0.json", "2.0.json")
    assert [s["CUDA_VISIBLE_DEVICES"] for s in seen] == ["4", "6", "4"]
    os.kill(seen[1]["pid"], signal.SIGKILL)
    wait_for(lambda: launcher.alive() == 2, "the loss of one worker")
    launcher.start(hold, 1, folder=str(site.notes))
    assert site.read("3.0.json")[0]["CUDA_VISIBLE_DEVICES"] == "6"


@pytest.mark.slow
def test_the_processes_of_one_trial_are_a_group_with_a_device_each(site: Site) -> None:
    launcher = site.launcher(processes_per_trial="2", gpus="[0,1]")
    launcher.start(hold, 1, folder=str(site.notes))
    seen = site.read("0.0.json", "0.1.json")
    assert [(s["RANK"], s["LOCAL_RANK"], s["WORLD_SIZE"]) for s in seen] == [("0", "0", "2"), ("1", "1", "2")]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in seen] == ["0", "1"]
    assert len({s["MASTER_PORT"] for s in seen}) == 1
    launcher.stop()
    assert [e["signal"] for e in site.read("0.0.end", "0.1.end")] == ["SIGTERM", "SIGTERM"]


@pytest.mark.slow
def test_stop_kills_what_does_not_listen(site: Site) -> None:
    launcher = site.launcher()
    launcher.start(hold, 1, folder=str(site.notes), deaf=True)
    site.read("0.0.json")
    (process,) = site.processes()
    assert processes.lives(process)
    launcher.stop(grace_seconds=0.2)
    assert launcher.alive() == 0
    wait_for(lambda: not processes.lives(process), "the worker's own end")


DRIVER = """
import signal, sys, time
from pathlib import Path
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # in tests that run in the background they are ignored, which is inherited
from pipeline.launch.cluster import load
from pipeline.launch.local import Here
from tests.pipeline.launch.launch_work import hold
Here(load("local", {}), Path(sys.argv[1]), 1).start(hold, 1, folder=sys.argv[2])
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_workers_outlive_their_driver_and_hear_nothing_of_its_terminal(site: Site, number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", DRIVER, str(site.folder), str(site.notes)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True)
    assert driver.stdout is not None
    with driver.stdout:
        assert driver.stdout.readline() == b"started\n"
        if number == signal.SIGKILL:
            driver.kill()
        else:  # as a terminal does, to all processes in the foreground; the worker is not even up by now
            os.killpg(driver.pid, number)
    assert driver.wait(TIMEOUT_S) != 0
    (seen,) = site.read("0.0.json")
    again = site.launcher()
    assert again.alive() == 1, "the next launcher of the same folder finds it"
    again.stop()
    assert site.read("0.0.end") == [{"pid": seen["pid"], "signal": "SIGTERM"}]


def test_a_number_that_was_given_again_is_another_process() -> None:
    me = processes.identity(os.getpid())
    assert processes.lives(me)
    assert not processes.lives({**me, "started": "1"})
    assert not processes.lives({**me, "host": "elsewhere"})
    child = subprocess.Popen([sys.executable, "-c", ""])
    its = processes.identity(child.pid)
    wait_for(lambda: not processes.lives(its), "the child's end, also while nobody has waited for it")
    child.wait()


def test_the_local_plan_names_devices_and_threads(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert site.launcher(workers=3).plan().splitlines()[1:] == [
        "  worker 0: GPUs 1, OMP_NUM_THREADS=1",
        "  worker 1: GPUs 3, OMP_NUM_THREADS=1",
        "  worker 2: GPUs 1, OMP_NUM_THREADS=1",
    ]


# under Slurm -------------------------------------------------------------------------------------------------------


@pytest.mark.slurm
def test_stop_cancels_those_that_wait(site: Site, slurm: SlurmCluster) -> None:
    launcher = site.launcher("slurm", 3, array_parallelism="1")
    jobs = launcher.start(hold, 3, folder=str(site.notes))
    assert [job["id"].partition("_")[2] for job in jobs] == ["0", "1", "2"]
    site.read("0.0.json")
    assert launcher.alive() == 3
    launcher.stop()
    assert not (site.notes / "2.0.json").exists()
    assert launcher.alive() == 0


@pytest.mark.slurm
def test_a_preempted_worker_is_queued_again(site: Site, slurm: SlurmCluster) -> None:
    launcher = site.launcher("slurm")
    job = launcher.start(hold, 1, folder=str(site.notes))[0]["id"]
    site.read("0.0.json")
    slurm.run("scancel", "--signal=USR2", job)
    assert site.read("0.0.end")[0]["signal"] == "SIGUSR2", "its own handler, before anything else"
    wait_for(lambda: slurm.run("squeue", "-h", "-o", "%i %T") == f"{job} PENDING\n", "the requeued job")
    assert "Restarts=1" in slurm.run("scontrol", "show", "job", job)
    assert launcher.alive() == 1


@pytest.mark.slurm
@pytest.mark.parametrize(("requeue", "signal_"), [("false", "USR2"), ("true", "TERM")])
def test_a_worker_that_was_cancelled_or_shall_not_come_back_is_not_queued_again(
    site: Site, slurm: SlurmCluster, requeue: str, signal_: str
) -> None:
    launcher = site.launcher("slurm", requeue=requeue)
    job = launcher.start(hold, 1, folder=str(site.notes))[0]["id"]
    site.read("0.0.json")
    slurm.run("scancel", f"--signal={signal_}", job)
    wait_for(lambda: launcher.alive() == 0, "the worker's end")


def test_the_slurm_plan_is_the_arrays_script_and_needs_no_slurm(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(site.notes))
    settings = {"partition": "a100", "mem_gb": "1.5", "array_parallelism": "2", "additional.exclusive": "true"}
    usual = {"gpus_per_node": "1", "time_minutes": "240", "setup": "[module load cuda]"}
    lines = site.launcher("slurm", 4, **settings, **usual).plan().splitlines()
    assert lines[0] == "#!/bin/bash"
    wanted = ["array=0-3%2", "exclusive", "gpus-per-node=1", "mem=1536M", "partition=a100", "requeue", "time=240"]
    assert [line for line in lines if line[10:] in wanted] == [f"#SBATCH --{w}" for w in wanted]
    assert "#SBATCH --signal=USR2@180" in lines
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if line.startswith("srun "))


# through a command -------------------------------------------------------------------------------------------------

QUEUE = """#!/bin/sh
# a scheduler that never has room: it names the job, and notes what was cancelled
echo "Your job 41$#.head is queued"
"""


@pytest.fixture
def queue(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = site.notes.parent / "bin"
    programs.mkdir()
    for name, text in {"enqueue": QUEUE, "dequeue": f'#!/bin/sh\necho "$1" >>{site.notes}/cancelled\n'}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)


def test_a_command_gets_its_resources_and_what_waits_is_cancelled(site: Site, queue: None) -> None:
    given = {"resources": "-l gpu={gpus}", "command": "enqueue {resources} -N {name} {script}", "gpus_per_node": "2"}
    launcher = site.launcher("command", **given, cancel="dequeue {job}")
    launcher.check()
    assert launcher.plan().splitlines()[1] == f"  enqueue -l gpu={{gpus}} -N asib-0 {site.folder}/jobs/0.sh"
    assert launcher.start(hold, 1, folder=str(site.notes)) == [{"index": 0, "job": "415.head"}]
    assert launcher.alive() == 1, "it waits"
    launcher.stop()
    assert launcher.alive() == 0
    assert (site.notes / "cancelled").read_text() == "415.head\n"
    done = subprocess.run(["sh", str(site.folder / "jobs/0.sh")], timeout=TIMEOUT_S)  # it gets its turn all the same
    assert (done.returncode, (site.notes / "0.0.json").exists()) == (0, False)


def test_no_password_is_in_a_workers_files(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.lab")
    monkeypatch.setenv("ASIB_STORAGE", "postgresql://me:secret-word@db/optuna")
    site.launcher("command", command="true {script}").start(hold, 1, folder=str(site.notes))
    text = (site.folder / "jobs/0.sh").read_text()
    assert "export MLFLOW_TRACKING_URI=https://mlflow.lab\n" in text
    assert not [file for file in site.folder.rglob("*") if file.is_file() and "secret-word" in file.read_text()]


@pytest.mark.slow
def test_the_processes_of_a_commands_worker_are_a_group(site: Site) -> None:
    launcher = site.launcher("command", processes_per_trial="2", setup="['export CUDA_VISIBLE_DEVICES=3,5']")
    launcher.start(hold, 1, folder=str(site.notes))
    seen = site.read("0.0.json", "0.1.json")
    assert [(s["RANK"], s["WORLD_SIZE"], s["CUDA_VISIBLE_DEVICES"]) for s in seen] == [("0", "2", "3"), ("1", "2", "5")]
    launcher.stop()
    assert [end["signal"] for end in site.read("0.0.end", "0.1.end")] == ["SIGTERM", "SIGTERM"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"command": ""}, ["cluster=command", "cluster.command is not set", "qsub -V {resources} {script}"]),
        ({"command": "true"}, ["cluster.command=true starts no worker", "{command} or {script}"]),
        ({"command": "qsubb {script}"}, ["cluster.command: there is no program qsubb"]),
        ({"command": "true {script}", "cancel": "qdell {job}"}, ["cluster.cancel: there is no program qdell"]),
    ],
)
def test_a_command_that_starts_no_worker_is_refused(site: Site, settings: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        site.launcher("command", **settings).check()
    assert_line(refused.value, words)


def test_a_command_that_fails_says_why(site: Site) -> None:
    launcher = site.launcher("command", command="echo no such queue; false {script}")
    with pytest.raises(UserError) as refused:
        launcher.start(hold, 1, folder=str(site.notes))
    assert_line(refused.value, ["cluster.command has started no worker", "exit code 1: no such queue", "0_submit.out"])


# bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "settings", "words"),
    [
        ("slurn", {}, ["cluster=slurn", "did you mean slurm?"]),
        ("slurm", {"partitoin": "gpu"}, ["cluster.partitoin", "did you mean cluster.partition?"]),
        ("local", {"partition": "gpu"}, ["cluster.partition", "local has no partition", "a key of slurm", "gpus"]),
        ("local", {"name": "x"}, ["cluster.name: local has no name"]),
        ("local", {"gpus": "all"}, ["cluster.gpus: got 'all'", "auto, or a list of whole numbers"]),
        ("local", {"kind": "cloud"}, ["cluster.kind: got 'cloud'", "give one of local, slurm, command"]),
    ],
)
def test_a_bad_cluster_is_refused_in_one_line(cluster: str, settings: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load(cluster, settings)
    assert_line(refused.value, words)


def test_a_file_anywhere_is_a_cluster(tmp_path: Path) -> None:
    file = tmp_path / "night.yaml"
    file.write_text("kind: slurm\nadditional: {nice: 100}\n")
    cluster = load(str(file), {"partition": "1", "additional.exclusive": "true"})
    assert (cluster.name, cluster.kind) == ("night", "slurm")
    assert cluster.model_dump(include={"partition", "additional", "requeue"}) == {
        "partition": "1",
        "additional": {"nice": 100, "exclusive": True},
        "requeue": True,
    }


@pytest.mark.parametrize(
    ("workers", "settings", "words"),
    [
        (1, {"gpus": "[0,7]"}, ["cluster.gpus", "no GPU 7", "GPUs 0, 1"]),
        (1, {"processes_per_trial": "3"}, ["cluster.processes_per_trial=3", "there are 2"]),
    ],
)
def test_workers_that_this_machine_cannot_run_are_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch, workers: int, settings: dict[str, str], words: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError) as refused:
        site.launcher(workers=workers, **settings).check()
    assert_line(refused.value, words)


def test_no_slurm_on_this_machine_is_said_in_one_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(site.notes))
    with pytest.raises(UserError) as refused:
        site.launcher("slurm").check()
    assert_line(refused.value, ["cluster=slurm: no sbatch on this machine", "cluster=local"])


@pytest.mark.slurm
def test_no_controller_is_said_in_one_line(site: Site, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = site.notes / "slurm.conf"
    conf.write_text(slurm.conf.read_text().replace("SlurmctldPort=", "SlurmctldPort=1 #") + "MessageTimeout=2\n")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    with pytest.raises(UserError) as refused:
        site.launcher("slurm").check()
    assert_line(refused.value, ["cluster=slurm: no Slurm controller answers"])


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"partition": "mian"}, ["cluster.partition=mian", "did you mean main?"]),
        ({"gpus_per_node": "3"}, ["cluster.gpus_per_node=3", "more than 2"]),
        ({"gpus_per_node": "1", "processes_per_trial": "2"}, ["cluster.processes_per_trial=2", "gpus_per_node=2"]),
        ({"time_minutes": "240"}, ["cluster.time_minutes=240", "allows 60"]),  # it would wait for ever
        ({"mem_gb": "500"}, ["cluster=slurm", "node configuration is not available"]),
        ({"additional.no-such-option": "1"}, ["cluster=slurm", "no-such-option"]),
    ],
)
def test_what_slurm_would_not_run_is_refused(
    site: Site, slurm: SlurmCluster, settings: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        site.launcher("slurm", 1, **settings).check()
    assert_line(refused.value, words)
    assert slurm.run("squeue", "-h") == ""


def assert_line(error: UserError, words: list[str]) -> None:
    line = str(error)
    assert "\n" not in line
    assert all(word in line for word in words), line


SURROUNDINGS = {"SBATCH_PARTITION": "nowhere", "SBATCH_TIMELIMIT": "nonsense", "SLURM_JOB_ID": "7",
                "SQUEUE_FORMAT": "%j", "SLURM_CPUS_PER_TASK": "9", "SINFO_FORMAT": "%P"}  # fmt: skip


def test_slurms_programs_see_none_of_a_surrounding_jobs_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "sinfo"
    program.write_text("#!/bin/sh\nenv\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in {**SURROUNDINGS, "SLURM_CONF": "/etc/of/this/cluster"}.items():
        monkeypatch.setenv(name, value)
    done = slurm_backend._run("sinfo")
    assert done is not None
    seen = [line for line in done.stdout.splitlines() if line.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SINFO_"))]
    assert seen == ["SLURM_CONF=/etc/of/this/cluster"]
    assert os.environ["SBATCH_PARTITION"] == "nowhere"


@pytest.mark.slurm
def test_an_array_is_submitted_from_within_a_job_as_its_file_says(
    site: Site, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SURROUNDINGS.items():
        monkeypatch.setenv(name, value)
    launcher = site.launcher("slurm")
    launcher.check()
    launcher.start(hold, 1, folder=str(site.notes))
    (seen,) = site.read("0.0.json")
    assert seen["OMP_NUM_THREADS"] == "1"  # not 9
    assert launcher.alive() == 1
    site.finish()
    wait_for(lambda: launcher.alive() == 0, "the worker's end")
