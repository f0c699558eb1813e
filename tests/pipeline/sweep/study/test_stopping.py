"""Studies that stop because they no longer improve, and go on when the rule is another."""

import time
from collections.abc import Sequence
from typing import Any

import optuna
import pytest
from optuna.terminator import RegretBoundEvaluator, Terminator, report_cross_validation_scores

from pipeline.sweep.study import report
from pipeline.sweep.study.retry import SEEDS, Counts
from pipeline.sweep.study.stopping import stagnation
from pipeline.sweep.study.study import Study
from tests.pipeline.sweep.study.studies import FACTS, claimed, die, running, score, sweep

METRIC = "final/val_acc"


def complete(study: Study, *values: float | Sequence[float], **more: Any) -> None:
    for value in values:
        claimed(study).complete([value] if isinstance(value, int | float) else value, **more)


def test_trials_since_the_best_value_rose(study_url: str) -> None:
    study = Study.create(study_url, "s", sweep(), FACTS)
    assert stagnation(study.optuna) == 0
    for value, stale in ((5, 0), (4, 1), (3, 2), (6, 0), (6, 1), (2, 2), (6.5, 0)):
        complete(study, value)
        assert stagnation(study.optuna) == stale


def test_what_ends_late_counts_where_it_ends(study_url: str) -> None:
    """The first trial is the last to complete, and the best: nothing is stale, although three were claimed after it."""
    study = Study.create(study_url, "s", sweep(), FACTS)
    first = claimed(study)
    complete(study, 3, 2, 1)
    first.complete([4])
    assert stagnation(study.optuna) == 0
    pruned = claimed(study)
    pruned.prune("below the median", 0)
    claimed(study).fail("broken")
    assert stagnation(study.optuna) == 0
    complete(study, 4)
    assert stagnation(study.optuna) == 1


def test_only_what_is_within_the_constraints_improves(study_url: str) -> None:
    study = Study.create(study_url, "s", sweep(constraints=[{"metric": "cost/gmacs", "max": 10}]), FACTS)
    complete(study, 9, 8, constraints=[11])
    assert stagnation(study.optuna) == 0, "there is no best trial that could be stale"
    complete(study, 5, constraints=[9])
    complete(study, 7, 6, constraints=[11])
    assert stagnation(study.optuna) == 2


def test_a_front_is_stale_while_nothing_joins_it(study_url: str) -> None:
    objectives = [{"metric": METRIC}, {"metric": "cost/gmacs", "direction": "minimize"}]
    study = Study.create(study_url, "s", sweep(objectives=objectives, stop={"patience": 2}), FACTS)
    complete(study, (80, 5), (90, 9), (70, 6), (70, 4))
    assert stagnation(study.optuna) == 0
    complete(study, (85, 9), (90, 9))
    assert stagnation(study.optuna) == 2
    assert study.claim("me") is None


def test_patience_stops_every_worker_and_lets_the_others_finish(study_url: str) -> None:
    study, other = (Study.create(study_url, "s", sweep(stop={"patience": 3}), FACTS) for _ in range(2))
    slow, lost = claimed(other), claimed(other)
    complete(study, 5, 6, 4, 4, 4)
    assert (study.stopped(), study.goal(study.counts())) == (None, 40), "nobody has asked for a trial yet"
    assert study.claim("me") is None
    assert other.claim("me") is None
    reason = "the last 3 completed trials brought no improvement (stop.patience=3)"
    assert study.stopped() == other.stopped() == reason
    slow.complete([9])  # an improvement that comes too late
    die(lost, study_url)
    again = claimed(other)  # it had begun
    assert again.attempt == 1
    again.complete([1])
    assert study.claim("me") is None
    counts = study.requeue_stale()
    assert counts == Counts(complete=7, retried=1)
    assert study.goal(counts) == counts.ended == 7
    assert f"7 of 40 trials: 7 complete (1 retried); stopped: {reason}" in report.text(study.optuna, study.sweep)
    assert f"stopped: {reason}" in report.note(study.optuna, study.sweep, storage=study_url).replace("\\", "")


def test_another_rule_continues_the_study_and_the_same_does_not(study_url: str) -> None:
    study = Study.create(study_url, "s", sweep(stop={"patience": 2}), FACTS)
    complete(study, 5, 4, 4)
    assert study.claim("me") is None
    assert Study.create(study_url, "s", sweep(stop={"patience": 2}, trials=50), FACTS).claim("me") is None
    longer = Study.create(study_url, "s", sweep(stop={"patience": 3}), FACTS)
    assert longer.stopped() is None
    complete(longer, 3)
    assert longer.claim("me") is None
    assert Study.create(study_url, "s", sweep(), FACTS).claim("me") is not None


def work(url: str) -> None:
    study = Study.open(url, "s")
    while (claim := study.claim("somebody")) is not None:
        time.sleep(0.01)
        claim.complete([score(claim.values)])


def test_all_processes_stop_together(study_url: str) -> None:
    """In the order in which they ended, exactly the patience lies behind the best trial, or what was running then."""
    Study.create(study_url, "s", sweep(stop={"patience": 6}, trials=400), FACTS).close()
    with running(3, work, study_url) as workers:
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0] * 3
    study = Study.open(study_url, "s")
    counts = study.counts()
    assert counts == Counts(complete=counts.used)
    assert counts.used < 400
    values = [t.value or 0.0 for t in sorted(study.trials(), key=lambda t: str(t.datetime_complete))]
    early = values[: len(values) - 2]  # at most two others were running
    assert max(len(early) - 1 - early.index(max(early)), len(values) - 1 - values.index(max(values))) >= 4


@pytest.mark.slow
@pytest.mark.parametrize(("spread", "stops"), [(0.001, False), (100.0, True)])
def test_the_terminator_weighs_what_can_be_gained_against_the_seeds_spread(
    study_url: str, spread: float, stops: bool
) -> None:
    """As Optuna's own does in a study in memory with the same trials."""
    rules = {"seeds": 3, "pruner": {"name": "none"}, "stop": {"terminator": True}, "trials": 23}
    study = Study.create(study_url, "s", sweep(**rules), FACTS)
    plain, judge = optuna.create_study(direction="maximize"), Terminator(RegretBoundEvaluator(seed=3))
    while (claim := study.claim("me")) is not None:
        assert not judge.should_terminate(plain)
        scores = [score(claim.values) + offset for offset in (-spread, 0, spread)]
        claim.note(**{SEEDS: [{"metrics": {METRIC: value}} for value in scores]})
        claim.complete([scores[1]])
        told = study.trials()[-1]
        plain.enqueue_trial(told.params)
        trial = plain.ask(told.distributions)
        report_cross_validation_scores(trial, scores)
        plain.tell(trial, told.value)
    assert len(plain.trials) == (20 if stops else 23)
    assert judge.should_terminate(plain) == stops == bool(study.stopped())
