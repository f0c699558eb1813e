"""A sweep's worker: takes trials of a study, one after the other, and distils each in a nested run of the sweep's."""

import contextlib
import logging
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compose.compose import compose
from pipeline.compose.foreign import check_refers_to_nothing
from pipeline.config import Config, config_hash, for_nested
from pipeline.config.places import output_dir
from pipeline.errors import Interrupted, NonFinite, Pruned, Taken, UserError
from pipeline.files import replacing
from pipeline.journal import Carrier, writer_alive
from pipeline.launch import followers
from pipeline.launch.worker import begin, carrier, free_memory
from pipeline.paths import inside
from pipeline.runs.folders import CONFIG, DIFFERENCE, header_of
from pipeline.runs.naming import told
from pipeline.runs.signals import Stop
from pipeline.sweep.space.space import SweepConfig, apply
from pipeline.sweep.study.claim import Claim
from pipeline.sweep.study.retry import SEEDS, STD
from pipeline.sweep.study.study import Study
from pipeline.sweep.watch import Silent, TrialWatch, note_run
from pipeline.training.bank.policy import shared

if TYPE_CHECKING:
    from pipeline.runs.run import Run

logger = logging.getLogger("asib")
STORAGE = "ASIB_STORAGE"
HOPELESS = 3
"""Failures in a row after which a worker leaves: the next trials would fail too."""
LINK_S = 30.0
"""How long a finished trial waits for its run's id: once it has ended, it accepts no more notes."""


def work(
    index: int, study: str, storage: str | None = None, overrides: Sequence[str] = (), joined: bool = False
) -> int:
    """Take trials until none is left; run by submitit, by `join`, and in each process of torchrun.

    Args:
        storage: URL of the study's database; None: as the environment variable `STORAGE` says, where no
            file shows its password.
        overrides: what differs on this machine, such as dataset.root; nothing that changes what is computed.
        joined: whether it joined by hand, perhaps somebody else's study.

    Returns:
        0 when there was nothing left to do, 1 after `HOPELESS` failures, 128 + its number after a signal.
    """
    stop = begin()
    if os.environ.get("RANK", "0") != "0":
        return followers.follow(stop, _help)
    opened = Study.open(storage or os.environ[STORAGE], study)
    base = configuration(opened, overrides)
    if joined:
        refuse_strange_server(study, base.tracking.uri, overrides)
    worker = Worker(opened, base, stop)
    try:
        return worker.run()
    except Interrupted as stopped:
        return 128 + stopped.signum
    finally:
        worker.close()


def configuration(study: Study, overrides: Sequence[str]) -> Config:
    """Compose the study's base configuration on this machine. UserError: overrides that change what is computed."""
    with tempfile.TemporaryDirectory(prefix="asib-study-") as folder:
        file = Path(folder) / "study.yaml"
        check_refers_to_nothing(study.facts["config"], f"study {study.name}")  # others can write to its database
        file.write_text(study.facts["config"])
        config = compose(str(file), [*overrides])
    if config_hash(config) != study.facts["config_hash"]:
        raise UserError(f"join={study.name}: {' '.join(overrides)} changes what its trials compute; leave it out")
    return config


def refuse_strange_server(study: str, uri: str | None, overrides: Sequence[str]) -> None:
    """Send no password to a server that only somebody else's study names. Raises UserError."""
    told = any(text.lstrip(" +").startswith("tracking") for text in overrides)
    if uri and uri.startswith("http") and uri != os.environ.get("MLFLOW_TRACKING_URI") and not told:
        raise UserError(f"join={study}: its runs go to {uri}; confirm with tracking.uri={uri}")


class Worker:
    """What one worker keeps from trial to trial: the study and the carrier of its runs."""

    def __init__(self, study: Study, base: Config, stop: Stop) -> None:
        self.study, self.base, self.stop = study, base, stop
        facts = study.facts
        here = Path(facts["folder"])
        header = header_of(here)
        reachable = header is not None and header.data["journal"] == facts["parent_journal"]
        self.home = here if reachable else output_dir(base) / f"{study.name}-{facts['parent_journal'][:6]}"
        stands_for = Carrier(facts["parent_run"], facts["parent_journal"], base.tracking.experiment, here)
        self.run_ = carrier(base, self.home, stands_for, stop)
        self.name = self.run_.folder.name
        self._failures = 0
        self._together = False
        """Whether torchrun's other processes are in the middle of the trial, too."""

    def run(self) -> int:
        """Take trials until none is left."""
        from pipeline.training import distributed

        distributed.join()
        self._refuse_other_data()
        fetch_teachers(self.study.facts["teachers"], self.run_)
        self.run_.ready()  # a server that refuses us must not use up a trial
        while True:
            with self.stop.between_batches():  # a claim must not be interrupted
                claim = None if self.stop() else self.study.claim(self.name)
            if self.stop():
                if claim is not None:
                    claim.release()
                return 128 + self.stop()
            if claim is None:
                break
            self._take(claim)
            if self._failures >= HOPELESS:
                logger.error("%d trials have failed in a row: this worker stops", self._failures)
                break
        followers.tell(None)
        return 0 if claim is None else 1

    def close(self) -> None:
        """Wait until the worker's delivery process has sent the rest."""
        self.run_.close()

    def _refuse_other_data(self) -> None:
        from pipeline.distill.train import images

        known, found = self.study.facts.get("data"), images(self.base).digest
        if known not in (None, found):
            raise UserError(
                f"study {self.study.name}: its trials train on other data (digest {known[:12]}) than this "
                f"machine has (digest {found[:12]}); bring the same, or name it with dataset.root or dataset.path"
            )

    # one trial -------------------------------------------------------------------------------------------------------

    def _take(self, claim: Claim) -> None:
        """Run one claim to an end. Raises only on signals, and on errors that leave other processes behind."""
        self._together = False
        try:
            self._try(claim)
            self._failures = 0
        except Taken:
            logger.warning("trial %d was taken over by another worker", claim.number)
        except Interrupted:
            _release(claim)
            raise
        except NonFinite as error:  # a result of this configuration; all processes agree on it
            logger.error("trial %d diverged: %s", claim.number, error)
            with contextlib.suppress(Taken):
                claim.fail(str(error))
            free_memory()
        except Exception as error:  # however a configuration fails, the others get their turn
            if self.stop():  # the signal reached another process of the group first
                _release(claim)
                raise Interrupted(self.stop()) from error
            logger.error("trial %d failed: %s", claim.number, error, exc_info=not isinstance(error, UserError))
            with contextlib.suppress(Taken):
                claim.fail(f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error))
            self._failures += 1
            free_memory()
            if self._together and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise

    def _try(self, claim: Claim) -> None:
        from pipeline.distill.train import ALL_THREADS

        # a trial keeps the threads it began with: they decide the last bits
        threads = self.base.threads or claim.notes.get("threads") or ALL_THREADS
        config = trial_config(apply(self.base, claim.values), threads)
        digest = config_hash(config)
        claim.note(config_hash=digest)
        twin = claim.same_as(digest)
        if twin is not None:
            logger.info("trial %d has the configuration of trial %d, and is not run again", claim.number, twin.number)
            claim.repeat(twin)
            return
        folder, distant = self._folder(claim)
        results: Mapping[str, float] | None = finished(folder, digest)
        if results is not None:
            self.run_.journal.child(folder)  # deliver what the lost worker did not
            self._link(claim, folder)
        else:
            results = self._distil(claim, config, folder, distant)
        if results is not None:
            self._complete(claim, results)

    def _folder(self, claim: Claim) -> tuple[Path, bool]:
        """Where the trial's run is or will be, and whether only the server may have it.

        A folder that a lost worker still holds is left to it: the run continues from a copy of its checkpoint.
        """
        first = self.home / "trials" / f"{claim.origin:04d}"
        noted = Path(claim.notes.get("folder", first))
        before = noted if (noted / "journal.jsonl").exists() else first
        if not writer_alive(before):
            return before, bool(claim.attempt) and not (before / "journal.jsonl").exists()
        copy = first.with_name(f"{first.name}-{claim.attempt}-{claim.number}")
        copy.mkdir(parents=True)
        several = self.study.sweep.seeds > 1
        seed = seed_key(len(claim.notes.get(SEEDS, ()))) if several else ""
        if (before / seed / "checkpoints/manifest.json").exists():
            shutil.copytree(before / seed / "checkpoints", copy / seed / "checkpoints", ignore=_links)
            for name in (CONFIG, DIFFERENCE):  # the record in the checkpoint names them as written
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(before / seed / name, copy / seed / name)
        return copy, False

    def _distil(self, claim: Claim, config: Config, folder: Path, distant: bool) -> Mapping[str, float] | None:
        """The trial's metrics; None when it was pruned."""
        several = self.study.sweep.seeds > 1
        name = " ".join([f"trial {claim.origin}", *told(claim.values)])
        run = self._run(self.run_, claim, f"trial-{claim.origin}", config, name, folder, distant)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "threads": config.threads}
        claim.note(folder=str(folder), journal=run.journal.id, **me)
        try:
            with run.nested():
                if several:
                    results = self._distil_seeds(claim, run)
                else:
                    if claim.attempt and claim.should_prune():
                        raise Pruned(claim.reached or 0, "its worker ended while pruning it")
                    results = self._train(claim, run, folder)
        except Pruned as error:
            self._together = False
            self._link(claim, folder)
            claim.prune(error.reason, error.at, error.unit)
            return None
        self._link(claim, folder)
        return results

    def _run(
        self, parent: "Run", claim: Claim, key: str, config: Config, name: str, folder: Path, distant: bool
    ) -> "Run":
        """The nested run of a trial, or of one of its seeds, begun or continued."""
        from pipeline.runs import opening

        step = "trial" if parent is self.run_ and self.study.sweep.seeds > 1 else "distill"
        run = opening.child(parent, step, key, config, name, folder, distant)
        run.journal.tags({"asib.study": self.study.name, "asib.trial": str(claim.number)})
        return run

    def _train(self, claim: Claim, run: "Run", folder: Path) -> dict[str, float]:
        """Distil in `run`, together with torchrun's other processes. `folder`: the trial's."""
        from pipeline.distill import distill

        self._together = True
        followers.tell(run)
        results = distill.trial(run, TrialWatch(claim, self.study.sweep, folder))
        self._together = False
        return results

    # several seeds ---------------------------------------------------------------------------------------------------

    def _distil_seeds(self, claim: Claim, run: "Run") -> dict[str, float]:
        """Distil seeds s, s + 1, … in runs nested in the trial's; the means of the metrics that the sweep names.

        Seeds that have ended are noted in the study, where the next attempt finds them. Raises Pruned: after a seed.
        """
        sweep = self.study.sweep
        ended = [*claim.notes.get(SEEDS, ())]
        begun = len(ended) if claim.attempt else None  # the seed that a lost worker may have left on the server only
        for index in range(sweep.seeds):
            if index == len(ended):
                if self.stop():
                    raise Interrupted(self.stop())
                ended.append(self._distil_seed(claim, run, index, index == begun))
                claim.note(**{SEEDS: ended})
            elif (there := Path(ended[index]["folder"])).exists() and not there.is_relative_to(run.folder):
                run.journal.child(there)  # this trial continues in a copy
            metric = sweep.objectives[0].metric
            values = [seed["metrics"][metric] for seed in ended[: index + 1]]
            if len(sweep.objectives) > 1 or not math.isfinite(values[-1]):
                continue
            claim.report(values[-1], index)
            if index + 1 < sweep.seeds and claim.should_prune():
                found = f"{metric} {np.mean(values):.4g} over {len(values)} seeds"
                reason = f"{found} was worse than the best trial's for the {sweep.pruner.name} pruner"
                raise Pruned(run.config.seed + index, reason, "seed")
        return self._averaged(claim, run, [seed["metrics"] for seed in ended])

    def _distil_seed(self, claim: Claim, run: "Run", index: int, distant: bool) -> dict[str, Any]:
        """Distil one seed, unless a lost worker has; what the study notes of it."""
        config, folder = of_seed(run.config, index), run.folder / seed_key(index)
        results = finished(folder, config_hash(config))
        if results is None:
            seed = self._run(run, claim, seed_key(index), config, f"seed {config.seed}", folder, distant)
            with seed.nested():
                results = self._train(claim, seed, run.folder)
        sweep = self.study.sweep
        named = [*(o.metric for o in sweep.objectives), *(c.metric for c in sweep.constraints)]
        metrics = {name: _metric(results, name) for name in named}
        logger.info("trial %d, seed %d: %s", claim.number, config.seed, _values(sweep, results))
        seconds = results.get("cost/seconds", 0.0)
        return {"metrics": metrics, "seconds": seconds, "folder": str(folder), "run_id": self._run_id(folder)}

    def _averaged(self, claim: Claim, run: "Run", seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The means over the seeds, also in the trial's record, with the objectives' standard deviations."""
        from pipeline.distill.results import write_results
        from pipeline.runs import records

        means = {name: float(np.mean([seed[name] for seed in seeds])) for name in seeds[0]}
        objectives = [o.metric for o in self.study.sweep.objectives]
        spread = {name: float(np.std([seed[name] for seed in seeds], ddof=1)) for name in objectives}
        claim.note(**{STD: spread})
        found = means | {f"{name}_std": value for name, value in spread.items()}
        stated = records.from_folder(run.folder).metrics  # by a worker that died before the run's end
        run.journal.metrics({name: value for name, value in found.items() if stated.get(name) != value}, 0)
        write_results(run, found)
        return found

    # its run's id, and its end ---------------------------------------------------------------------------------------

    def _link(self, claim: Claim, folder: Path) -> None:
        """Note the trial's MLflow run; a short trial may end before delivery has created it."""
        if self.run_.delivery is None or note_run(claim, folder):
            return
        if run_id := self._run_id(folder):
            claim.note(run_id=run_id)

    def _run_id(self, folder: Path) -> str | None:
        """The MLflow run of a folder, waiting for it; None offline, and if delivery does not answer in time."""
        if self.run_.delivery is None:
            return None
        try:
            return self.run_.delivery.child_ready(folder, LINK_S)
        except UserError as error:
            logger.warning("%s ended without its run's id: %s", folder, error)
            return None

    def _complete(self, claim: Claim, results: Mapping[str, float]) -> None:
        sweep = self.study.sweep
        of_seeds = claim.notes.get(SEEDS)
        claim.note(seconds=sum(s["seconds"] for s in of_seeds) if of_seeds else results.get("cost/seconds"))
        claim.complete(
            [_metric(results, o.metric) for o in sweep.objectives],
            [_metric(results, c.metric) for c in sweep.constraints],
        )
        logger.info("trial %d: %s", claim.number, _values(sweep, results))


def _help(run: "Run") -> None:
    """Train together with the first process what that one has claimed."""
    from pipeline.distill import distill

    distill.trial(run, Silent())


def trial_config(config: Config, threads: int | None) -> Config:
    """A trial's configuration: it computes what `config` does, and records the threads so that it can be repeated.

    Trials share their teachers, and therefore the bank.
    """
    return shared(for_nested(config).model_copy(update={"extend": False, "rung": None, "threads": threads}))


def seed_key(index: int) -> str:
    """The folder of a trial's seed, from 0."""
    return f"seed_{index}"


def of_seed(config: Config, index: int) -> Config:
    """The configuration of one of a trial's seeds, from 0."""
    return config.model_copy(update={"seed": config.seed + index})


def finished(folder: Path, config_hash: str) -> dict[str, float] | None:
    """The last value of every metric of a trial whose run finished in `folder` although its worker died.

    Results of another configuration are not taken.
    """
    from pipeline.runs import records
    from pipeline.runs.folders import ended

    if not (folder / "results.json").exists() or not ended(folder):
        return None
    found = records.from_folder(folder)
    return dict(found.metrics) if found.tags.get("asib.config_hash") == config_hash else None


def _release(claim: Claim) -> None:
    with contextlib.suppress(Taken):  # its end was written before the signal arrived
        claim.release()


def _values(sweep: SweepConfig, results: Mapping[str, float]) -> str:
    return ", ".join(f"{o.metric} {results[o.metric]:.4g}" for o in sweep.objectives)


def _metric(results: Mapping[str, float], name: str) -> float:
    if name not in results:
        raise UserError(f"{name} is not a metric of a trial; it has {', '.join(sorted(results))}")
    return results[name]


def fetch_teachers(teachers: Sequence[Mapping[str, Any]], run: "Run") -> None:
    """Fetch the teachers that another machine fine-tuned to where `teachers.obtain` looks for them."""
    for made in teachers:
        path = inside(output_dir(run.config) / "teachers", made["file"])
        if path.exists() or not made["run_id"] or run.delivery is None:
            continue
        fetched = run.fetch(f"runs:/{made['run_id']}/checkpoints/teacher.safetensors", run.folder / "fetched")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            shutil.copyfile(fetched, part)


def _links(top: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(top, name).is_symlink()]
