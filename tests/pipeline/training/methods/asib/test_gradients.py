"""Whatever configuration is taken, an A- and a B-step give every trained parameter a gradient; else it is refused."""

import os
import random
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.training.methods.asib.task import AsibDistillation as Distillation
from pipeline.training.objective import Moment
from tests.pipeline.training.builders import config, distillation, first_batch, image_data

ROUNDS = 12 * int(os.environ.get("ASIB_ROUNDS", "3"))
GRID: dict[str, tuple[Any, ...]] = {
    "kd_target": ("synergy", "auto", "auto_min", "avg", "weighted_conf"),
    "kd_alpha": (0.4, 0.0),
    "ce_alpha": (0.7, 0.0),
    "hybrid_beta": (0.0, 0.1),
    "kd_loss": ("kl", "dkd"),
    "dkd_alpha": (1.0, 0.0),
    "dkd_beta": (8.0, 0.0),
    "feat_kd_alpha": (0.0, 0.1),
    "feat_kd_key": ("distill_feat", "feat_2d"),
    "feat_kd_norm": ("none", "l2"),
    "ib_mbm_query_key": ("feat_2d", "distill_feat"),
    "learnable_q": (False, True),
    "use_ib": (True, False),
    "ib_beta": (0.01, 0.0),
    "ib_mbm_min_std": (1e-4, 0.01, 8.0),
    "ib_mbm_feature_norm": ("none", "l2"),
    "use_mu_for_kd": (True, False),
    "synergy_temp_learnable": (False, True),
    "synergy_temp_init": (0.0, -12.0),
    "synergy_ce_alpha": (0.6, 0.0),
    "teacher_adapt_alpha_kd": (None, 0.0),
    "synergy_only_epochs": (0, 1),
    "use_cccp": (False, True),
    "cccp_alpha": (0.25, 0.0),
    "use_teacher_finetuning": (False, True),
    "teacher_ce_alpha": (0.0, 0.5),
    "kd_sample_gate": (False, True),
    "use_disagree_weight": (False, True),
    "disagree_lambda_high": (1.0, 0.0),
    "disagree_lambda_low": (1.0, 0.0),
    "kd_ens_alpha": (0.0, 1.0),
    "kd_ens_alpha_max": (0.8, 1.0),
    "use_partial_freeze": (False, True),
    "student_freeze_level": (-1, 0, 1),
    "teacher_freeze_level": (0, 1, -1),
    "teacher_bn_head_only": (False, True),
    "cutmix_alpha_distill": (0.0, 1.0),
}
PLAIN = {"num_stages": 1, "student_epochs_per_stage": (1,), "teacher_adapt_epochs": 1, "ib_mbm_out_dim": 6,
         "distill_out_dim": 6, "label_smoothing": 0.0, "ib_mbm_n_head": 2}  # fmt: skip
STUDENT = {"name": "cifar_resnet8"}


def made(method: dict[str, Any]) -> Config:
    return config(method={**PLAIN, **method}, model={"student": STUDENT}, dataset={"batch_size": 16})


def drawn(rng: random.Random) -> dict[str, Any]:
    """Some keys of the grid away from their first value."""
    chosen = rng.sample(list(GRID), rng.randint(1, 9))
    return {key: rng.choice(GRID[key][1:]) for key in chosen}


def without_gradient(method: dict[str, Any]) -> list[str]:
    """Names of trained parameters to which neither step gives a gradient; also UserError where it is refused."""
    c = made(method)
    task = distillation(c, image_data(32), norm="group")
    off: list[str] = []
    reached: dict[int, bool] = {}
    names: dict[int, str] = {}
    for epoch in task.plan:
        task.begin_phase(epoch)
        task.monitor.gate_open, task.monitor.share = True, c.method.kd_ens_alpha
        task.begin_epoch(epoch)
        phase = task.phases[epoch.phase]
        batch = first_batch(task, epoch.phase)
        phase.optimizer.zero_grad(set_to_none=True)
        out = phase.objective.train()(batch, Moment(epoch.phase, 0, 0))
        out["loss"].backward()
        off += [f"{epoch.phase}: the {term} term" for term in _wanted(epoch.phase, c) if not out[term].requires_grad]
        for name, p in phase.objective.trainable_module.named_parameters():
            if p.requires_grad:
                names[id(p)] = f"{epoch.phase}: {name}"
                some = p.grad is not None and bool(torch.any(p.grad != 0))
                reached[id(p)] = reached.get(id(p), False) or some
    return off + [names[k] for k, some in reached.items() if not some and not _idle(names[k], task)]


def _wanted(phase: str, c: Config) -> list[str]:
    """Terms that the configuration gives a weight."""
    m = c.method
    if phase == "b":
        weights = {"kd": m.kd_alpha, "hybrid": m.hybrid_beta, "feat": m.feat_kd_alpha}
        return [term for term, weight in weights.items() if weight > 0]
    return (
        [] if m.synergy_only_epochs else ["cccp"] * (m.use_cccp and m.cccp_alpha > 0) + ["feat"] * (m.feat_kd_alpha > 0)
    )


def _idle(name: str, task: Distillation) -> bool:
    """Deterministic fusion has log variances that nothing asks for: checkpoints of the research code have them."""
    return not task.method.use_ib and ".logvar." in name


@pytest.mark.step  # many random combinations of keys
def test_every_trained_parameter_gets_a_gradient() -> None:
    rng, tried, faults = random.Random(int(os.environ.get("ASIB_SEED", "0"))), 0, []
    while tried < ROUNDS:
        method = drawn(rng)
        try:
            found = without_gradient(method)
        except (ValidationError, UserError):
            continue
        tried += 1
        if found:
            faults.append((method, found))
    assert faults == []
