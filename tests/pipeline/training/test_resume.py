"""A run that is stopped anywhere and continued by new objects ends bit-identical to an undisturbed one."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.checkpoint import Slots
from pipeline.training.methods.asib.task import AsibDistillation as Distillation
from tests.pipeline.training.builders import (
    EVERYTHING,
    Record,
    config,
    differences,
    distillation,
    fine_tuning,
    loop_for,
    run_until,
)

pytestmark = pytest.mark.step  # trains to the end again and again

MIXED = {"cutmix_alpha_distill": 1.0, "kd_warmup_epochs": 2, "tau_schedule": (4.0, 2.0), "ib_beta": 0.01}
ASSORTED: dict[str, dict[str, Any]] = {
    "distil": {"method": MIXED},
    "distil sgd bfloat16": {
        "method": {"mixup_alpha": 0.4, "enable_kd_after_syn_acc": "avg-0.5", "teacher_eval_every": 2},
        "optim": {"optimizer": "sgd", "a_step_optimizer": "sgd", "use_amp": True, "grad_clip_norm": 0.5},
        "schedule": {"type": "step", "milestones": (1, 3), "lr_warmup_epochs": 1},
    },
    "distil float16": {"optim": {"use_amp": True, "amp_dtype": "float16"}, "dataset": {"val_fraction": 0.0}},
    "average": {"method": {"kd_target": "avg", "mixup_alpha": 0.2}, "optim": {"optimizer": "adam"}},
    "distil everything": {"method": EVERYTHING, "optim": {"ema_decay": 0.9, "ema_update_every": 3}},
    "distil everything else": {
        "method": {
            **EVERYTHING,
            "kd_target": "auto_min",
            "kd_loss": "dkd",
            "learnable_q": True,
            "cccp_ns": 2,
            "kd_cooldown_epochs": 1,
            "cutmix_alpha_distill": 0.0,
            "mixup_alpha": 0.4,
            "student_freeze_bn": True,
            "teacher_freeze_level": 1,
            "teacher_freeze_bn": False,
        },
        "optim": {"ema_decay": 0.9, "select_weights": "ema", "use_amp": True, "amp_dtype": "float16"},
    },
    "finetune": {"finetune": {"cutmix_alpha": 1.0, "label_smoothing": 0.1}},
    "finetune sgd bfloat16": {
        "finetune": {"optimizer": "sgd", "schedule": {"lr_warmup_epochs": 1}},
        "optim": {"use_amp": True},
    },
}


def task_for(name: str, seed: int = 0) -> Any:
    make: Any = fine_tuning if name.startswith("finetune") else distillation
    return make(config(**ASSORTED[name]), seed=seed)


def outcome(loop: Any, rows: list[Any]) -> Any:
    """Weights, moments, everything in the state; every metric; the final results and the selected weights."""
    state = loop.state_dict()
    results = loop.task.results()
    net = loop.task.student if isinstance(loop.task, Distillation) else loop.task.net
    return state, rows, results, dict(net.state_dict())


@functools.cache
def undisturbed(name: str) -> Any:
    record = Record()
    with tempfile.TemporaryDirectory() as folder:
        loop = loop_for(task_for(name), Path(folder), record)
        loop.run()
        return outcome(loop, record.rows)


def continued(name: str, folder: Path, *stops: tuple[int, int]) -> Any:
    """Stopped at each of `stops` (epochs done, batches done in the next), every time continued by new objects."""
    rows: list[Any] = []
    for n, at in enumerate([*stops, None]):
        # what a new process would have: other fresh weights, another global state
        task = task_for(name, seed=0 if n == 0 else 90 + n)
        torch.manual_seed(1000 + n)
        state: Any = Slots(folder).read()[0] if n else None
        record = Record()
        if at is not None:
            loop = run_until(task, folder, at, record, state)
            assert (loop.epoch, loop.batch) == at
        else:
            loop = loop_for(task, folder, record)
            loop.load_state_dict(state)
            loop.run()
        rows += record.rows
    return outcome(loop, rows)


IN_A, IN_B = [(0, 1), (1, 3), (4, 2), (5, 1)], [(2, 1), (3, 2), (6, 3), (7, 1)]
ENDS = [(1, 0), (2, 0), (4, 0), (6, 0), (8, 0)]


@pytest.mark.parametrize("at", [(1, 3), (4, 0), (6, 3)], ids=str)
def test_a_distillation_stopped_once_ends_as_if_undisturbed(at: tuple[int, int], tmp_path: Path) -> None:
    assert differences(continued("distil", tmp_path, at), undisturbed("distil")) == []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "everything" in name else name for name in ASSORTED]
)
def test_a_run_stopped_many_times_ends_as_if_undisturbed(name: str, tmp_path: Path) -> None:
    """The plain distillation at all of these places, longer assorted ones at every second: all kinds are among them."""
    epochs = len(task_for(name).plan)
    assert epochs == {"finetune": 3, "average": 4}.get(name.split()[0], 8)
    stops = [s for s in sorted([*IN_A, *IN_B, *ENDS]) if s <= (epochs, 0)]
    stops = stops if name == "distil" or epochs < 8 else stops[::2]
    assert len(stops) >= 5
    assert differences(continued(name, tmp_path, *stops), undisturbed(name)) == []


def test_two_undisturbed_runs_agree_and_two_seeds_do_not(tmp_path: Path) -> None:
    record = Record()
    loop = loop_for(task_for("distil"), tmp_path, record)
    loop.run()
    assert differences(outcome(loop, record.rows), undisturbed("distil")) == []
    other = distillation(config(method=MIXED, seed=1))
    loop = loop_for(other, tmp_path / "b")
    loop.run()
    assert differences(loop.state_dict()["task"]["student"], undisturbed("distil")[0]["task"]["student"]) != []


def test_killed_without_a_word_it_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    """kill -9 in an epoch: what came after the checkpoint is done again, to the bit."""
    record, task = Record(), task_for("distil")

    class Killed(BaseException):
        pass

    loop = loop_for(task, tmp_path, record)

    def kill() -> int:
        if (loop.epoch, loop.batch) == (3, 2):
            raise Killed
        return 0

    loop.stop = kill
    with pytest.raises(Killed):
        loop.run()
    again, rest = task_for("distil", seed=5), Record()
    loop = loop_for(again, tmp_path, rest)
    loop.load_state_dict(Slots(tmp_path).read()[0])
    loop.run()
    assert differences(outcome(loop, record.rows + rest.rows), undisturbed("distil")) == []


def test_longer_runs_continue_a_finished_one_from_its_last_weights(tmp_path: Path) -> None:
    """`extend=true`: with a constant rate, 3 + 2 epochs are 5 epochs."""

    def task(epochs: int) -> Any:
        return fine_tuning(config(finetune={"epochs": epochs, "schedule": {"type": "step", "milestones": (99,)}}))

    whole = loop_for(task(5), tmp_path / "whole")
    whole.run()
    short = loop_for(task(3), tmp_path / "short")
    short.run()
    short.finish(short.task.results())
    longer = loop_for(task(5), tmp_path / "short")
    longer.load_state_dict(Slots(tmp_path / "short").read()[0])
    longer.finished = False
    longer.run()
    assert differences(longer.state_dict(), whole.state_dict()) == []
