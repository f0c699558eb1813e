"""Runs a few small tasks under torchrun, or alone, and leaves what came out of them in a folder.

torchrun --nproc_per_node=2 -m tests.pipeline.training.ddp_worker <folder>
"""

import signal
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import Interrupted, NonFinite
from pipeline.training import distributed
from pipeline.training.checkpoint import Slots, pack
from pipeline.training.finetune import FineTuning
from pipeline.training.loop import Loop
from pipeline.training.methods.asib.task import AsibDistillation as Distillation
from tests.pipeline.training.builders import CPU, EVERYTHING, Record, config, distillation, image_data, loop_for, net

NORM = "group"  # batch statistics are per process on the CPU
SMALL = {"num_stages": 2, "student_epochs_per_stage": (1, 2), "teacher_adapt_epochs": 1, "ib_beta": 0.05}
SGD = {"optimizer": "sgd", "a_step_optimizer": "sgd", "grad_clip_norm": 0.5}
SCENARIOS: dict[str, dict[str, Any]] = {
    # batches of 7: slices of 3 and 4 images; the last batch has 5
    "cutmix": {"method": {**SMALL, "cutmix_alpha_distill": 1.0, "kd_ens_alpha": 0.25, "teacher_adapt_kd_warmup": 1}},
    "mixup": {"method": {**SMALL, "mixup_alpha": 0.8, "ib_mbm_reg_lambda": 0.1}},
    "average": {"method": {**SMALL, "kd_target": "avg", "cutmix_alpha_distill": 1.0}},
    "deterministic": {"method": {**SMALL, "use_ib": False}},
    "deterministic, with a penalty": {"method": {**SMALL, "use_ib": False, "ib_mbm_reg_lambda": 0.1}},
    "learned query": {"method": {**SMALL, "learnable_q": True, "mixup_alpha": 0.8}},
    "sample gate, clamps, CCCP, freezing": {
        "method": {
            **SMALL,
            "cutmix_alpha_distill": 1.0,
            "kd_sample_gate": True,
            "kd_sample_thr": 0.9,
            "kd_max_ratio": 0.3,
            "use_loss_clamp": True,
            "loss_clamp_max": 1.0,
            "use_cccp": True,
            "cccp_nt": 2,
            "cccp_ns": 2,
            "use_partial_freeze": True,
            "student_freeze_schedule": (-1, 1),
        }
    },
    # a third of the batch: some slices have nobody to teach
    "few samples, two views": {
        "method": {
            **SMALL,
            "kd_target": "auto_min",
            "kd_sample_gate": True,
            "kd_sample_thr": 0.0,
            "kd_sample_min_ratio": 0.1,
            "kd_two_view_start_epoch": 0,
            "kd_two_view_stop_epoch": 9,
            "kd_uncertainty_weight": 0.5,
            "kd_loss": "dkd",
        }
    },
    "everything": {"method": {**EVERYTHING, **SMALL}},
    "finetune": {"finetune": {"epochs": 2, "cutmix_alpha": 1.0, "optimizer": "sgd"}},
}


def task_for(name: str) -> Any:
    sections = {k: dict(v) for k, v in SCENARIOS[name].items()}
    sections["dataset"] = {"batch_size": 7}
    sections["optim"] = {**SGD, "student_lr": 0.05, "a_step_lr": 0.05, "ema_decay": 0.9}
    if name == "finetune":
        return FineTuning(config(**sections), image_data(44), net(6, 0, NORM), CPU)
    return distillation(config(**sections), image_data(44), norm=NORM)


def loop_of(task: Any, folder: Path, record: Record, **more: Any) -> Loop:
    loop = loop_for(task, folder, record, **more)
    if distributed.world().rank > 0:
        loop.slots = None
    return loop


def outcome(name: str, folder: Path) -> dict[str, Any]:
    task, record = task_for(name), Record()
    loop = loop_of(task, folder / name, record)
    loop.run()
    weights = dict((task.student if isinstance(task, Distillation) else task.net).state_dict())
    if isinstance(task, Distillation) and task.fusion is not None:
        weights |= {f"fusion.{k}": v for k, v in task.fusion.state_dict().items()}
        weights |= {f"teacher_{i}.{k}": v for i, t in enumerate(task.teachers) for k, v in t.state_dict().items()}
        weights |= {f"ema.{k}": v for k, v in task.state_dict()["student_ema"].items()}
    return {"weights": weights, "rows": [[s, v] for s, v in record.rows], "results": task.results()}


def stopped_by_one(folder: Path) -> str:
    """A signal that only the last process gets: all leave at the same place, with a checkpoint."""
    task = task_for("mixup")
    rank, size = distributed.world().rank, distributed.world().size
    loop = loop_of(task, folder, Record())
    loop.stop = lambda: signal.SIGTERM if rank == size - 1 and (loop.epoch, loop.batch) >= (1, 2) else 0
    try:
        loop.run()
    except Interrupted as interrupted:
        return f"signal {interrupted.signum} at {loop.epoch}, {loop.batch}"
    return "not stopped"


def poisoned(folder: Path) -> str:
    """One process's loss is not finite: no process takes the step, and all end together."""
    task = task_for("finetune")
    objective, rank = task.phases["finetune"].objective, distributed.world().rank
    forward = objective.forward

    def bad(batch: Any, moment: Any, repeat: int = 0) -> Any:
        out = forward(batch, moment, repeat)
        return out | {"loss": out["loss"] * float("nan")} if rank == 0 and moment.batch > 0 else out

    objective.forward = bad
    task.optim = task.optim.model_copy(update={"safe_retry_patience": 2})
    try:
        loop_of(task, folder, Record()).run()
    except NonFinite as error:
        finite = all(bool(torch.isfinite(p).all()) for p in task.net.parameters())
        return f"{str(error).split(':')[0]}, weights finite: {finite}"
    return "not noticed"


def poisoned_statistics(folder: Path) -> str:
    """One process's pictures are not finite in one step: no process keeps what its batch statistics make of it."""
    sections = {"dataset": {"batch_size": 8}, "finetune": {"epochs": 1}}
    task = FineTuning(config(**sections), image_data(44), net(6, 0), CPU)
    objective: Any = task.phases["finetune"].objective
    forward, rank = objective.forward, distributed.world().rank

    def bad(batch: Any, moment: Any, repeat: int = 0) -> Any:
        factor = float("nan") if rank == 1 and moment.batch == 1 else 1.0
        return forward(batch._replace(x_mixed=batch.x_mixed * factor), moment, repeat)

    objective.forward = bad
    loop_of(task, folder, Record()).run()
    norm: Any = task.net.net.norm
    finite = all(bool(torch.isfinite(b).all()) for b in (norm.running_mean, norm.running_var))
    return f"{int(norm.num_batches_tracked)} of {len(task.batches)} steps, statistics finite: {finite}"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = distributed.join()
    found: dict[str, Any] = {name: outcome(name, folder / "runs") for name in SCENARIOS}
    if world.size > 1:
        found["stopped"] = stopped_by_one(folder / "stopped")
        found["poisoned"] = poisoned(folder / "poisoned")
        found["poisoned statistics"] = poisoned_statistics(folder / "poisoned statistics")
        if world.rank == 0:
            found["position"] = Slots(folder / "stopped").read()[0]["position"]
    (folder / f"rank{world.rank}of{world.size}").write_bytes(pack(found))
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
