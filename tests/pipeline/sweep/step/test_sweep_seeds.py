"""Sweeps whose trials are means over several seeds."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Interrupted
from pipeline.runs.run import Run
from pipeline.sweep.study.claim import Claim
from tests.pipeline.sweep.step.sweeping import SHORT, parent, states, study, swept, trials
from tests.steps.lab import STUDENT, Lab, deliver, ending, journal, points, run_id, same_tensors, see


@pytest.fixture(scope="module")
def single_seeds(tmp_path_factory: pytest.TempPathFactory, teachers: Path) -> list[Lab]:
    """The same two trials with one seed each, in three sweeps: where the numbers of several seeds come from."""
    labs = []
    for seed in range(3):
        lab = Lab(tmp_path_factory.mktemp("single") / str(seed))
        shutil.copytree(teachers, lab.runs / "teachers")
        swept(lab, *SHORT, f"seed={seed}", trials=2)
        labs.append(lab)
    return labs


def assert_trials_are_means(lab: Lab, single: list[Lab]) -> None:
    """Two trials over the seeds of `single`, each of whose runs is point for point the one of a single seed."""
    done = [trial for trial in study(lab).trials if trial.state.name == "COMPLETE"]
    assert len(done) == 2
    for place, trial in enumerate(done):
        alone = [study(other).trials[place] for other in single]
        assert [trial.params] * len(single) == [other.params for other in alone]
        values = [float(other.value or 0) for other in alone]
        assert trial.intermediate_values == dict(enumerate(values))
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
        assert trial.value == pytest.approx(mean)
        assert trial.user_attrs["std"] == {"final/val_acc": pytest.approx(std)}
        folder = Path(trial.user_attrs["folder"])
        written = {name: values for (name, _), values in points(folder).items()}
        assert written == {
            "final/val_acc": [trial.value],
            "final/val_acc_std": [trial.user_attrs["std"]["final/val_acc"]],
        }
        for index, other in enumerate(single):
            assert points(folder / f"seed_{index}") == points(trials(other)[place])
            assert ending(folder / f"seed_{index}") == ("FINISHED", "completed", 0)


@pytest.mark.slow
def test_a_trial_of_several_seeds_is_their_mean(lab: Lab, single_seeds: list[Lab], sqlite_uri: str) -> None:
    done = swept(lab, *SHORT, "seeds=3", "sweep.pruner=none", trials=2)
    assert_trials_are_means(lab, single_seeds)
    best = study(lab).best_trial
    assert f"best: final/val_acc {best.value:.4g} ± {best.user_attrs['std']['final/val_acc']:.4g}" in done.out
    first = Path(best.user_attrs["folder"]) / "seed_0"
    assert same_tensors(parent(lab) / STUDENT, first / STUDENT)
    deliver(sqlite_uri, parent(lab))
    found = see(sqlite_uri, run_id(parent(lab)))
    assert found.metrics["sweep/best_value", 2] == [best.value]
    for trial in study(lab).trials:
        run = found.children[f"trial {trial.number}"]
        assert (run.status, set(run.children)) == ("FINISHED", {"seed 0", "seed 1", "seed 2"})
        assert {seed.tags["asib.trial"] for seed in run.children.values()} == {str(trial.number)}


@pytest.mark.slow
@pytest.mark.parametrize("place", [3, 1])
def test_an_interrupted_trial_is_continued_at_its_seed(
    lab: Lab, single_seeds: list[Lab], before_each_trial: Any, place: int
) -> None:
    """The worker leaves in the middle of the given run of six: every seed before it is not looked at again."""
    begun: list[tuple[str, str]] = []

    def leave(run: Run) -> None:
        begun.append((run.parent.folder.name if run.parent else "", run.folder.name))
        if len(begun) == place + 1:
            raise Interrupted(15)

    before_each_trial(leave)
    swept(lab, *SHORT, "seeds=3", "sweep.pruner=none", trials=2)
    second = "0001" if place > 2 else "0002"  # the retry has a number too
    whole = [(trial, f"seed_{seed}") for trial in ("0000", second) for seed in range(3)]
    assert begun == [*whole[: place + 1], *whole[place:]]
    assert states(lab).count("FAIL") == 1
    assert_trials_are_means(lab, single_seeds)


@pytest.mark.slow
def test_a_trial_that_is_worse_on_its_first_seeds_is_pruned(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Claim, "should_prune", lambda claim: (claim.number, claim._epoch) == (1, 1))
    swept(lab, *SHORT, "seeds=3", "seed=4", pruner="wilcoxon", trials=2)
    assert states(lab) == ["COMPLETE", "PRUNED"]
    pruned = study(lab).trials[1]
    assert set(pruned.intermediate_values) == {0, 1}
    assert pruned.user_attrs["asib.seed"] == 5
    assert "over 2 seeds was worse than the best trial's for the wilcoxon pruner" in pruned.user_attrs["asib.reason"]
    assert [path.name for path in sorted(trials(lab)[1].glob("seed_*"))] == ["seed_0", "seed_1"]
    tags = [entry.data["values"] for entry in journal(trials(lab)[1]) if entry.kind == "tags"]
    assert {"asib.pruned_seed": "5"}.items() <= tags[-1].items()
