"""Samplers and pruners of a study as configured, held against numbers worked out by hand."""

from typing import Any

import pytest

from pipeline.sweep.study.study import Study
from tests.pipeline.sweep.study.studies import FACTS, claimed, die, score, sweep

STEPS = {
    "method.tau": {"type": "float", "low": 1, "high": 4, "step": 1},
    "model.student.name": {"type": "categorical", "choices": ["a", "b"]},
    "method.layers": {"type": "grid", "values": [[1, 2], [3]]},
}


def run(study: Study, count: int) -> list[float]:
    values = []
    for _ in range(count):
        claim = claimed(study)
        values.append(score(claim.values))
        claim.complete([values[-1]])
    return values


@pytest.mark.parametrize("name", ["tpe", pytest.param("gp", marks=pytest.mark.slow), "cmaes"])
def test_samplers_learn_from_the_trials_before(study_url: str, name: str) -> None:
    drawn = run(Study.create(study_url, "random", sweep(), FACTS), 12)
    study = Study.create(study_url, name, sweep(sampler={"name": name, "seed": 3, "startup_trials": 4}), FACTS)
    found = run(study, 12)
    assert found[:4] == drawn[:4], "until startup_trials have ended they draw as the random sampler"
    assert sum(found[4:]) > sum(drawn[4:])
    assert study.counts().complete == 12


def test_suggestion_depends_on_its_place_alone(study_url: str) -> None:
    """Two workers take turns in one study, in the other a single one has to begin its second trial again."""
    first, second = (Study.create(study_url, "two", sweep(), FACTS) for _ in range(2))
    taken = [claimed(worker).values for worker in (first, second, second, first)]
    alone = Study.create(study_url, "one", sweep(), FACTS)
    first_claim = claimed(alone)
    die(claimed(alone), study_url)
    again = claimed(alone)
    values = [first_claim.values, again.values, claimed(alone).values, claimed(alone).values]
    assert [again.attempt, values] == [1, taken]


def test_grid_is_visited_once_whatever_the_total_and_the_retries(study_url: str) -> None:
    study = Study.create(study_url, "s", sweep(space=STEPS, sampler={"name": "grid"}, trials=99), FACTS)
    seen = []
    while (claim := study.claim("me")) is not None:
        if claim.number % 5 == 2 and not claim.attempt:
            claim.release()
            continue
        seen.append(claim.values)
        claim.complete([1.0])
    points = [(v["method.tau"], v["model.student.name"], tuple(v["method.layers"])) for v in seen]
    assert sorted(points) == sorted((t, n, k) for t in (1, 2, 3, 4) for n in "ab" for k in ((1, 2), (3,)))
    assert study.counts().complete == 16


def decisions(study: Study, reports: dict[int, float]) -> list[bool]:
    """What the pruner says of a trial after each epoch; the trial then goes away."""
    claim = claimed(study)
    said = []
    for epoch, value in reports.items():
        claim.report(value, epoch)
        said.append(claim.should_prune())
    claim.fail("only asked")
    return said


def curves(study: Study, *values: list[float]) -> None:
    for curve in values:
        claim = claimed(study)
        for epoch, value in enumerate(curve):
            claim.report(value, epoch)
        claim.complete([curve[-1]])


def test_median_of_the_trials_that_ended(study_url: str) -> None:
    pruner = {"name": "median", "startup_trials": 3, "warmup_epochs": 1}
    study = Study.create(study_url, "s", sweep(pruner=pruner), FACTS)
    curves(study, [1, 10, 40], [2, 60, 50])
    assert decisions(study, {0: 0, 1: 0}) == [False, False], "two are fewer than startup_trials"
    curves(study, [3, 20, 90])
    # the medians are 2, 20 and 50; a trial is judged by its best epoch so far, from epoch 1
    assert decisions(study, {0: 0, 1: 19, 2: 49}) == [False, True, True]
    assert decisions(study, {0: 0, 1: 20, 2: 51}) == [False, False, False]
    assert decisions(study, {0: 55, 1: 0, 2: 0}) == [False, False, False]


def test_retry_is_judged_by_the_epochs_that_it_has_reached_itself(study_url: str) -> None:
    pruner = {"name": "median", "startup_trials": 1, "warmup_epochs": 0}
    study = Study.create(study_url, "s", sweep(pruner=pruner), FACTS)
    curves(study, [10, 50])
    claim = claimed(study)
    claim.report(20, 0)
    claim.report(40, 1)
    claim.release()
    again = claimed(study)
    assert again.should_prune(), "what the attempt before has reported last lies below the median"
    again.report(20, 0)
    assert not again.should_prune()
    again.report(40, 1)
    assert again.should_prune()


def test_patience_waits_for_the_trial_to_stop_improving(study_url: str) -> None:
    pruner = {"name": "patient", "patience": 1, "min_delta": 1, "startup_trials": 1, "warmup_epochs": 0}
    study = Study.create(study_url, "s", sweep(pruner=pruner), FACTS)
    curves(study, [50, 50, 50, 50])
    # worse than 9 - min_delta for two epochs in a row only at the end
    assert decisions(study, {0: 9, 1: 7, 2: 8.5, 3: 7}) == [False, False, False, False]
    assert decisions(study, {0: 9, 1: 7, 2: 7}) == [False, False, True]
    assert decisions(study, {0: 60, 1: 7, 2: 7}) == [False, False, False], "its best is above the median"


def test_hyperband_promotes_the_best_third(study_url: str) -> None:
    # one bracket: floor(log3(2/1)) + 1; its rung is at epoch 1
    pruner = {"name": "hyperband", "min_epochs": 1, "max_epochs": 2, "reduction": 3}
    study = Study.create(study_url, "s", sweep(pruner=pruner), FACTS)
    asked: list[Any] = [decisions(study, {0: value, 1: value}) for value in (10, 5, 20, 15, 30, 25)]
    # of up to five the best alone is promoted, of six the two best
    assert [second for _, second in asked] == [False, True, False, True, False, False]
    assert not any(first for first, _ in asked)


def test_wilcoxon_prunes_what_is_worse_on_every_seed(study_url: str) -> None:
    """Two seeds that are both worse have p = 1/4, three that all are 1/8; one of three that is better, at least 1/4."""
    pruner = {"name": "wilcoxon", "p_threshold": 0.2, "startup_seeds": 2}
    study = Study.create(study_url, "s", sweep(pruner=pruner, seeds=4), FACTS)
    claim = claimed(study)
    for seed, value in enumerate((50, 60, 70, 80)):
        claim.report(value, seed)
    claim.complete([65])
    assert decisions(study, {0: 49, 1: 57, 2: 65}) == [False, False, True]
    assert decisions(study, {0: 49, 1: 61, 2: 65}) == [False, False, False]
    assert decisions(study, {0: 51, 1: 62, 2: 73}) == [False, False, False]
    looser = Study.create(study_url, "t", sweep(pruner={**pruner, "p_threshold": 0.26}, seeds=4), FACTS)
    claim = claimed(looser)
    for seed, value in enumerate((50, 60, 70, 80)):
        claim.report(value, seed)
    claim.complete([65])
    assert decisions(looser, {0: 49, 1: 57}) == [False, True]
