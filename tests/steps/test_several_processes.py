"""torchrun with two gloo processes through the real step: the same result as one process, in one run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.steps.lab import Lab, all_runs, points, run_id, see, tensors, write_npz

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
NET = "test_convnext"  # timm's smallest network without batch normalisation


def test_two_processes_agree_with_one_and_make_one_run(lab: Lab, sqlite_uri: str) -> None:
    import numpy as np
    import timm

    net = timm.create_model(NET)
    assert not [m for m in net.modules() if "batchnorm" in type(m).__name__.lower()]
    write_npz(lab.data, size=32)
    nets = [f"model.student.name={NET}", *(f"model.teachers.{k}.name={NET}" for k in (0, 1))]
    nets += [f"model.teachers.{k}.pretrained=false" for k in (0, 1)]
    steady = ["optim.optimizer=sgd", "optim.a_step_optimizer=sgd", "finetune.optimizer=sgd"]
    alone = lab.step("distill", *nets, *steady)
    assert alone.code == 0, alone.err

    both = Lab(lab.folder / "both")
    arguments = both.arguments(*nets, *steady, "tracking.mode=online", f"tracking.uri={sqlite_uri}")
    arguments.append(f"dataset.path={lab.data}")
    done = subprocess.run([*TORCHRUN, "-m", "steps.distill", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = both.run_folders()
    found, expected = points(folder), points(alone.folder)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        loose = key[0].endswith(("acc", "acc_ema", "both_wrong", "disagreement"))
        # one image of 32 or 40 more or less is a rounding at the border of two classes
        assert found[key] == pytest.approx(values, rel=1e-3, abs=3.2 if loose else 1e-4), key
    ours, theirs = (tensors(f / "checkpoints/student.safetensors") for f in (folder, alone.folder))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4)

    seen = see(sqlite_uri, run_id(folder))
    assert seen.status == "FINISHED"
    assert set(seen.children) == {"teacher_0", "teacher_1"}
    assert seen.steady == points(folder)
    assert len(all_runs(sqlite_uri)) == 3
    assert done.stdout.count("distilled student") == 1, "the first process alone speaks"


def test_two_processes_learn_tasks_as_one_does(lab: Lab) -> None:
    """Replay and weight consolidation: both keep the same images, and only the first process writes."""
    import numpy as np

    from pipeline.distill.continual import KEPT

    write_npz(lab.data, size=32)
    given = [f"model.student.name={NET}", "model.teachers=[]", "method=finetune", "optim.optimizer=sgd", "tasks=2"]
    given += ["method.num_stages=1", "method.student_epochs_per_stage=[1]", "method.mixup_alpha=0"]
    given += ["continual.buffer_size=10", "continual.lambda_ewc=1", "continual.fisher_images=8"]
    alone = lab.step("continual", *given)
    assert alone.code == 0, alone.err
    both = Lab(lab.folder / "both")
    arguments = [*both.arguments(*given), f"dataset.path={lab.data}"]
    done = subprocess.run([*TORCHRUN, "-m", "steps.continual", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = both.run_folders()
    for task in ("task_1", "task_2"):
        ours, theirs = (tensors(f / task / KEPT) for f in (folder, alone.folder))
        assert (ours["memory.index"] == theirs["memory.index"]).all()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-2, atol=1e-4, err_msg=name)
    assert done.stdout.count("average accuracy  ") <= 1, "the first process alone speaks"


def test_no_process_is_in_the_group_any_more_when_python_ends(tmp_path: Path) -> None:
    """One exit in a dozen of a process that still was ended in «terminate called without an active exception»."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, torch.distributed as dist\n"
        "atexit.register(lambda: print(f'in a group: {dist.is_initialized()}\\n', end=''))\n"  # called last
        "from pipeline.training import distributed\n"
        "distributed.join()\n"
        "distributed.barrier()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*TORCHRUN, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.splitlines()) == 2 * ["in a group: False"]
