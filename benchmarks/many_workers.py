"""What a study's database bears: 64 light workers claim and complete trials without training.

    python -m benchmarks.many_workers [--trials 256] [--workers 64] [--processes 4] [--rounds 3] [--postgres URL]

Three ways to the same PostgreSQL (a private server where no URL is given): this project's workers, which hold the
study's lock while they claim; Optuna's own `ask` and `tell`; and these through Optuna's gRPC proxy, if grpcio is
installed, which this project does not need. Workers are threads of a few forked processes, each with a storage of its
own; time runs from when all have opened it. Writes benchmarks/results/many_workers.json.
"""

import importlib.util
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from typing import Any

import optuna
import sqlalchemy

from benchmarks import harness
from benchmarks.empty_trials import SPACE
from pipeline.sweep.space.space import SweepConfig
from pipeline.sweep.study.storage import database_url
from pipeline.sweep.study.study import Study

CONNECTIONS = sqlalchemy.text("select count(*) from pg_stat_activity where datname = current_database()")
PROXY = """
from optuna.storages import get_storage, run_grpc_proxy_server
run_grpc_proxy_server(get_storage({url!r}), host="127.0.0.1", port={port})
"""
OPEN_S = 120
"""How long all workers together may take to open the study."""
Worker = Callable[[str, str, int, Callable[[], object]], None]
"""Opens what is at an address, says that it is ready, and makes its share of a study's trials."""


def claims(url: str, name: str, share: int, ready: Callable[[], object]) -> None:
    """A worker of this project; the study itself knows when it is complete."""
    study = Study.open(url, name)
    ready()
    while (claim := study.claim(name)) is not None:
        claim.complete([claim.values["method.tau"]])


def asks(storage: Any, name: str, share: int, ready: Callable[[], object]) -> None:
    """A worker of Optuna's."""
    study = optuna.load_study(study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler())
    ready()
    for _ in range(share):
        trial = study.ask()
        values = [trial.suggest_float(key, 1e-6, 1.0) for key in SPACE]
        study.tell(trial, values[-1])


def direct(url: str, name: str, share: int, ready: Callable[[], object]) -> None:
    storage = optuna.storages.RDBStorage(database_url(url), {"pool_size": 1, "max_overflow": 1})
    asks(optuna.storages.get_storage(storage), name, share, ready)


def proxied(port: str, name: str, share: int, ready: Callable[[], object]) -> None:
    storage = optuna.storages.GrpcStorageProxy(host="127.0.0.1", port=int(port))
    storage.wait_server_ready()
    asks(storage, name, share, ready)


def threads(work: Worker, where: str, name: str, count: int, share: int, ready: Callable[[], object]) -> None:
    """A process with its share of the workers."""
    made = [threading.Thread(target=work, args=(where, name, share, ready)) for _ in range(count)]
    for each in made:
        each.start()
    for each in made:
        each.join()


def measure(way: str, work: Worker, where: str, name: str, url: str, options: Any) -> dict[str, Any]:
    """Seconds from the moment when every worker is ready to the end of the last one.

    Raises SystemExit: a process failed, or the study has other than `options.trials` complete trials.
    """
    context = multiprocessing.get_context("fork")  # none of them imports anything
    count, share = options.workers // options.processes, options.trials // options.workers
    start = context.Barrier(count * options.processes + 1, timeout=OPEN_S)
    arguments = (work, where, name, count, share, start.wait)
    processes = [context.Process(target=threads, args=arguments, daemon=True) for _ in range(options.processes)]
    began = time.perf_counter()
    for process in processes:
        process.start()
    start.wait()
    begin, most = time.perf_counter(), 0
    engine = sqlalchemy.create_engine(database_url(url), poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        while any(process.is_alive() for process in processes):
            most = max(most, int(connection.execute(CONNECTIONS).scalar_one()) - 1)
            connection.rollback()
            time.sleep(0.1)
    seconds = time.perf_counter() - begin
    storage = optuna.storages.RDBStorage(database_url(url), {"poolclass": sqlalchemy.NullPool})
    trials = optuna.load_study(study_name=name, storage=storage).trials
    complete = sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials)
    if complete != options.trials or any(process.exitcode for process in processes):
        raise SystemExit(f"{name}: {complete} of {options.trials} trials; exit codes {[p.exitcode for p in processes]}")
    return {
        "way": way,
        "workers": count * options.processes,
        "trials": complete,
        "seconds_to_open": round(begin - began, 2),
        "seconds": round(seconds, 2),
        "trials_per_second": round(complete / seconds, 1),
        "connections": most,
    }


@contextmanager
def proxy(url: str, port: int) -> Iterator[None]:
    """Optuna's proxy in a process of its own."""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", PROXY.format(url=database_url(url), port=port)])
    try:
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)


@contextmanager
def database(given: str | None, connections: int) -> Iterator[str]:
    """The URL of an empty PostgreSQL database that allows that many connections."""
    from tests.postgres import PostgresServer, programs

    if given:
        yield given
        return
    if programs() is None:
        raise SystemExit("PostgreSQL is not installed: apt-get install postgresql, or give --postgres <URL>")
    server = PostgresServer(fsync=True)
    with (server.folder / "data/postgresql.conf").open("a") as file:
        file.write(f"max_connections = {connections}\n")
    try:
        server.start()
        yield server.create_database()
    finally:
        server.close()


def main() -> None:
    parser = harness.parser(__doc__, "output", "rounds")
    parser.add_argument("--trials", type=int, default=256)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--port", type=int, default=13017, help="of the proxy")
    parser.add_argument("--postgres", metavar="URL", help="an empty database")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    result: dict[str, Any] = harness.described("sqlalchemy", "psycopg") | {"results": []}
    sweep = {"name": "ours", "space": SPACE, "sampler": {"name": "random"}, "pruner": {"name": "none"}}
    with database(options.postgres, 5 * options.workers + 50) as url:
        ways: dict[str, tuple[Worker, str]] = {"ours": (claims, url), "optuna": (direct, url)}
        with ExitStack() as stack:
            if importlib.util.find_spec("grpc") is None:
                print("grpcio is not installed: Optuna's gRPC proxy is not measured")
            else:
                stack.enter_context(proxy(url, options.port))
                result["versions"]["grpcio"] = version("grpcio")
                ways["proxy"] = (proxied, str(options.port))
            for number in range(options.rounds):
                for way, (work, where) in ways.items():
                    name = f"{way} {number}"
                    if way == "ours":
                        config = SweepConfig.model_validate(sweep | {"trials": options.trials})
                        Study.create(url, name, config, {"digest": name}).close()
                    else:
                        storage = optuna.storages.RDBStorage(database_url(url), {"poolclass": sqlalchemy.NullPool})
                        optuna.create_study(study_name=name, storage=storage)
                    result["results"].append(measure(way, work, where, name, url, options))
                    print(json.dumps(result["results"][-1]), flush=True)
    harness.write("many_workers", result, options.output)


if __name__ == "__main__":
    main()
