"""What a trial costs outside training: several processes claim and complete many empty ones.

    python -m benchmarks.empty_trials [--trials 1000] [--workers 4] [--postgres postgresql://…]

On SQLite, and on PostgreSQL: a private server of the tests' kind where no URL is given. Uses all cores; writes
benchmarks/results/empty_trials.json.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import harness
from pipeline.sweep.space.space import SweepConfig
from pipeline.sweep.study.study import Study

SPACE = {
    "method.kd_alpha": {"type": "float", "low": 0.1, "high": 0.9},
    "method.ib_beta": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True},
    "method.tau": {"type": "float", "low": 1, "high": 8},
}
"""The search space of the default sweep."""
EDGE = 100
"""This many first and last trials are compared, to show whether the cost grows with the study."""


def worker(url: str, name: str, start: Any) -> None:
    """Claim and complete until nothing is left."""
    study = Study.open(url, name)
    start.wait()
    while (claim := study.claim(f"process {os.getpid()}")) is not None:
        claim.complete([claim.values["method.tau"]])


def measure(url: str, sampler: str, trials: int, workers: int) -> dict[str, Any]:
    """Seconds from the moment when every worker is ready to the end of the last one."""
    sweep = SweepConfig.model_validate(
        {"name": sampler, "space": SPACE, "sampler": {"name": sampler}, "pruner": {"name": "none"}, "trials": trials}
    )
    Study.create(url, sampler, sweep, {"digest": sampler}).close()
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(workers + 1)
    processes = [context.Process(target=worker, args=(url, sampler, start)) for _ in range(workers)]
    for process in processes:
        process.start()
    start.wait()
    begin = time.perf_counter()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - begin
    study = Study.open(url, sampler)
    found = study.trials()
    if study.counts().complete != trials or len(found) != trials:
        raise SystemExit(f"{url}: {study.counts()} instead of {trials} complete trials")
    starts = [trial.datetime_start for trial in found if trial.datetime_start is not None]
    edge = min(EDGE, trials // 2)
    return {
        "storage": url.partition(":")[0],
        "sampler": sampler,
        "trials": len(found),
        "complete": study.counts().complete,
        "workers": workers,
        "trials_by_worker": sorted(Counter(trial.user_attrs["asib.worker"] for trial in found).values()),
        "seconds": round(seconds, 3),
        "ms_per_trial": round(1000 * seconds / trials, 2),
        f"ms_per_trial_first_{edge}": round(1000 * (starts[edge] - starts[0]).total_seconds() / edge, 2),
        f"ms_per_trial_last_{edge}": round(1000 * (starts[-1] - starts[-1 - edge]).total_seconds() / edge, 2),
    }


@contextmanager
def storages(postgres: str | None) -> Iterator[list[str]]:
    """URLs of empty databases."""
    from tests.postgres import PostgresServer, programs

    with tempfile.TemporaryDirectory(prefix="asib-empty-trials-") as folder:
        urls = [f"sqlite:///{folder}/studies.db"]
        if postgres:
            yield [*urls, postgres]
        elif programs() is None:
            print("PostgreSQL is not installed (apt-get install postgresql): only SQLite is measured")
            yield urls
        else:
            server = PostgresServer(fsync=True)
            try:
                server.start()
                yield [*urls, server.create_database()]
            finally:
                server.close()


def main() -> None:
    parser = harness.parser(__doc__, "output")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--postgres", metavar="URL", help="an empty database")
    options = parser.parse_args()
    result: dict[str, Any] = harness.described("sqlalchemy", "psycopg") | {"results": []}
    with storages(options.postgres) as urls:
        for url in urls:
            for sampler in ("random", "tpe"):
                result["results"].append(measure(url, sampler, options.trials, options.workers))
                print(json.dumps(result["results"][-1]), flush=True)
    harness.write("empty_trials", result, options.output)


if __name__ == "__main__":
    main()
