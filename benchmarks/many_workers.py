"""What a study's database bears: 64 light workers claim and complete trials without training.

    python -m benchmarks.many_workers [--trials 640] [--workers 64] [--processes 4] [--postgres postgresql://…]

Three ways to the same PostgreSQL (a private server where no URL is given): this project's workers, which hold the
study's lock while they claim; Optuna's own `ask` and `tell`; and these through Optuna's gRPC proxy, if grpcio is
installed, which this project does not need. Workers are threads of a few processes, each with a storage of its own.
Writes benchmarks/results/many_workers.json.
"""

import importlib.util
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import optuna
import sqlalchemy

from benchmarks import harness
from benchmarks.empty_trials import SPACE
from pipeline.sweep.space.space import SweepConfig
from pipeline.sweep.study.storage import database_url
from pipeline.sweep.study.study import Study

CONNECTIONS = sqlalchemy.text("select count(*) from pg_stat_activity where datname = current_database()")
PROXY = "from optuna.storages import *; run_grpc_proxy_server(RDBStorage({url!r}), host='127.0.0.1', port={port})"


def claims(url: str, name: str, share: int) -> None:
    """A worker of this project; the study itself knows when it is complete."""
    study = Study.open(url, name)
    while (claim := study.claim(name)) is not None:
        claim.complete([claim.values["method.tau"]])


def asks(storage: Callable[[], Any], name: str, share: int) -> None:
    """A worker of Optuna's."""
    study = optuna.load_study(study_name=name, storage=storage(), sampler=optuna.samplers.RandomSampler())
    for _ in range(share):
        trial = study.ask()
        values = [trial.suggest_float(key, 1e-6, 1.0) for key in SPACE]
        study.tell(trial, values[-1])


def direct(url: str, name: str, share: int) -> None:
    asks(lambda: optuna.storages.RDBStorage(database_url(url), {"pool_size": 1, "max_overflow": 1}), name, share)


def proxied(port: str, name: str, share: int) -> None:
    asks(lambda: optuna.storages.GrpcStorageProxy(host="127.0.0.1", port=int(port)), name, share)


def threads(work: Callable[[str, str, int], None], where: str, name: str, count: int, share: int, start: Any) -> None:
    """A process with its share of the workers."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made = [threading.Thread(target=work, args=(where, name, share)) for _ in range(count)]
    start.wait()
    for each in made:
        each.start()
    for each in made:
        each.join()


def measure(work: Callable[[str, str, int], None], where: str, name: str, url: str, options: Any) -> dict[str, Any]:
    """Seconds from the moment when every process is ready to the end of the last worker."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(options.processes + 1)
    count, share = options.workers // options.processes, options.trials // options.workers
    arguments = (work, where, name, count, share, start)
    processes = [context.Process(target=threads, args=arguments, daemon=True) for _ in range(options.processes)]
    for process in processes:
        process.start()
    engine, most = sqlalchemy.create_engine(database_url(url)), 0
    start.wait()
    begin = time.perf_counter()
    with engine.connect() as connection:
        while any(process.is_alive() for process in processes):
            most = max(most, int(connection.execute(CONNECTIONS).scalar_one()) - 1)
            connection.rollback()
            time.sleep(0.2)
    seconds = time.perf_counter() - begin
    complete = [
        t for t in optuna.load_study(study_name=name, storage=database_url(url)).trials if t.state.is_finished()
    ]
    if len(complete) != options.trials or any(process.exitcode for process in processes):
        raise SystemExit(
            f"{name}: {len(complete)} of {options.trials} trials; exit codes {[p.exitcode for p in processes]}"
        )
    return {
        "way": name,
        "workers": options.workers,
        "trials": len(complete),
        "seconds": round(seconds, 2),
        "ms_per_trial": round(1000 * seconds / options.trials, 2),
        "connections": most,
    }


@contextmanager
def proxy(url: str, port: int) -> Iterator[None]:
    """Optuna's proxy in a process of its own."""
    command = [sys.executable, "-c", PROXY.format(url=database_url(url), port=port)]
    process = subprocess.Popen(command)
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
    parser = harness.parser(__doc__, "output")
    parser.add_argument("--trials", type=int, default=640)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--port", type=int, default=13017, help="of the proxy")
    parser.add_argument("--postgres", metavar="URL", help="an empty database")
    options = parser.parse_args()
    result: dict[str, Any] = harness.described("sqlalchemy", "psycopg") | {"results": []}
    with database(options.postgres, 5 * options.workers + 50) as url:
        space = {"name": "ours", "space": SPACE, "sampler": {"name": "random"}, "pruner": {"name": "none"}}
        Study.create(
            url, "ours", SweepConfig.model_validate({**space, "trials": options.trials}), {"digest": "ours"}
        ).close()
        found = [measure(claims, url, "ours", url, options)]
        optuna.create_study(study_name="optuna", storage=database_url(url))
        found.append(measure(direct, url, "optuna", url, options))
        if importlib.util.find_spec("grpc") is not None:
            with proxy(url, options.port):
                time.sleep(5)
                optuna.create_study(study_name="proxy", storage=database_url(url))
                found.append(measure(proxied, str(options.port), "proxy", url, options))
        else:
            print("grpcio is not installed: Optuna's gRPC proxy is not measured")
    result["results"] = found
    print(json.dumps(found, indent=2))
    harness.write("many_workers", result, options.output)


if __name__ == "__main__":
    main()
