"""Every key of the schema acts: for each, a configuration where it can, another value, and what then differs.

Here are those of training; where the table names no observer, the difference is in the student's weights after a tiny
run. The others are in test_schema_walk_around.py. A key that is missing from both tables fails, and so does one whose
change changes nothing.
"""

import contextlib
import functools
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from pydantic import ValidationError

from models.features import FeatureNet
from pipeline.config import Config
from pipeline.errors import NonFinite
from pipeline.training.evaluation import outputs
from pipeline.training.loop import Loop
from pipeline.training.methods.asib import monitor
from pipeline.training.run_data import Task
from tests.pipeline.config.walk import Case, Keys, Observer, assert_acts, images, nested
from tests.pipeline.training.builders import (
    Calls,
    config,
    differences,
    distillation,
    fine_tuning,
    loop_for,
)


def tiny(keys: Keys) -> Config:
    """The builders' configuration, of one stage, with these keys."""
    return config(**nested({"method.num_stages": 1, "method.student_epochs_per_stage": [2], **keys}))


def trained(task: Task) -> Loop:
    """The loop that has trained a task, without checkpoints."""
    loop = loop_for(task, Path(tempfile.gettempdir()) / "unused")
    loop.slots = None
    loop.run()
    return loop


@functools.cache
def _run(written: str) -> dict[str, Any]:
    c = tiny(json.loads(written))
    before, task = c.model_dump_json(), distillation(c, images())
    end, rows = task.end_epoch, []
    task.end_epoch = lambda epoch: rows.append(end(epoch)) or rows[-1]  # type: ignore[method-assign, func-returns-value]
    loop = trained(task)
    assert c.model_dump_json() == before, "a run leaves its configuration alone"
    student = {k: v.clone() for k, v in task.student.state_dict().items()}
    scaler = loop.precision.scaler
    task.results()
    return {
        "student": student,
        "rows": rows,
        "plan": task.plan,
        "exported": dict(task.student.state_dict()),
        "averaged": task.state_dict()["student_ema"],
        "scale": None if scaler is None else scaler.get_scale(),
    }


def student(keys: Keys) -> Any:
    """The student's weights after a run."""
    return _run(json.dumps(keys))["student"]


def part(name: str) -> Observer:
    """Another part of what a run leaves: rows, plan, exported, averaged, scale."""

    def observer(keys: Keys) -> Any:
        return _run(json.dumps(keys))[name]

    return observer


def tuned(keys: Keys) -> Any:
    """A fine-tuned network's weights."""
    task = fine_tuning(tiny(keys), images())
    trained(task)
    return dict(task.net.state_dict())


def gate(keys: Keys) -> Any:
    """Gate and share of the averaged teachers, where the snapshot has 70 %, the moving average 30, the teachers 80."""
    task = distillation(tiny(keys), images())
    task.monitor.accuracy, task.monitor.smoothed = 70.0, 30.0
    task.monitor.average_accuracy = lambda: 80.0  # type: ignore[method-assign]
    epoch = next(e for e in task.plan if e.phase == "b")
    task.begin_phase(epoch)
    task.begin_epoch(epoch)
    weights = task.phases["b"].objective.weights
    return [weights.synergy, weights.averaged_share]


def synergy_scores(keys: Keys) -> Any:
    """What the synergy's accuracy is taken of."""
    task = distillation(tiny(keys), images())
    with mock.patch.object(monitor, "accuracy", side_effect=lambda scores, y: float(scores.abs().sum())):
        return [task.monitor.synergy_accuracy(outputs(task.student, task.data.eval))]


def patience(keys: Keys) -> Any:
    """After how many non-finite steps a run ends."""
    task = fine_tuning(tiny(keys), images())
    objective = task.phases["finetune"].objective
    forward = objective.forward

    def bad(*args: Any) -> Any:
        return {k: v * float("nan") for k, v in forward(*args).items()}

    with mock.patch.object(objective, "forward", side_effect=bad) as steps, contextlib.suppress(NonFinite):
        trained(task)
    return steps.call_count


def first_images(keys: Keys) -> Any:
    """The first training batch."""
    task = distillation(tiny(keys), images())
    batch = next(iter(task.batches.epoch(task.draws(task.plan[0]))))
    return {"x": batch.x, "index": batch.index, "strides": batch.x.stride()}


def evaluation_batches(keys: Keys) -> Any:
    """Images per forward pass of an evaluation."""
    task = distillation(tiny(keys), images())
    calls = Calls(task.student)
    task.end_epoch(next(e for e in task.plan if e.phase == "b"))
    return calls.seen


def compiled(keys: Keys) -> Any:
    with mock.patch.object(FeatureNet, "compile_pass"):  # it takes seconds
        return distillation(tiny(keys), images()).compiled


# the table -----------------------------------------------------------------------------------------------------------


def m(**keys: Any) -> Keys:
    return {f"method.{k}": v for k, v in keys.items()}


def where(base: Keys, **to: Any) -> dict[str, Case]:
    """Cases of several keys of the method that act where these do."""
    return {key: Case(value, base) for key, value in m(**to).items()}


AUTO = m(kd_target="auto", kd_ens_alpha=0.1, enable_kd_after_syn_acc=0.6)
GATED = m(kd_target="avg", kd_sample_gate=True, kd_sample_thr=1.0, kd_sample_min_ratio=0.0, kd_sample_max_ratio=0.5)
DISAGREE = m(kd_target="avg", use_disagree_weight=True, disagree_lambda_high=3.0)
DKD = m(kd_target="avg", kd_loss="dkd")
FEATURES = m(feat_kd_alpha=0.3, feat_kd_key="distill_feat")
WIDE = {**FEATURES, **m(ib_mbm_out_dim=6, distill_out_dim=6)}
TUNED = m(use_teacher_finetuning=True, teacher_ce_alpha=0.5)
STAGES = m(num_stages=2, student_epochs_per_stage=[1, 1])
FROZEN = {**STAGES, **m(use_partial_freeze=True, student_freeze_schedule=[-1, 0])}
PRETRAINED = {"model.student.name": "resnet18", "model.student.pretrained": True}
HELD = {**TUNED, **m(use_partial_freeze=True, teacher_freeze_level=1)}
CLAMPED = m(use_loss_clamp=True, loss_clamp_max=0.5)
EMA = {"optim.ema_decay": 0.5}
SGD = {"optim.optimizer": "sgd"}
STEP = {"schedule.type": "step", "schedule.milestones": [1]}
FINE_STEP = {f"finetune.{key}": value for key, value in STEP.items()}
HALF = {"optim.use_amp": True, "optim.amp_dtype": "float16"}
TWO = m(kd_two_view_start_epoch=0, kd_two_view_stop_epoch=2)
MIXED = m(cutmix_alpha_distill=1.0)
WARM = m(teacher_adapt_kd_warmup=2, kd_ens_alpha=0.5)

SEEN_IN_THE_STUDENT = {
    "seed": 1, "dataset.batch_size": 6, "dataset.val_fraction": 0.5, "method.name": "fitnet",
    "method.module": "nobody.nothing",
    "method.synergy_only_epochs": 1, "method.ce_alpha": 0.1, "method.kd_alpha": 0.9, "method.renorm_ce_kd": True,
    "method.kd_target": "weighted_conf", "method.kd_loss": "dkd", "method.tau": 2.0, "method.tau_schedule": [4.0, 1.0],
    "method.tau_syn": 1.0, "method.synergy_logit_scale": 0.3, "method.use_mu_for_kd": False, "method.hybrid_beta": 0.5,
    "method.kd_warmup_epochs": 3, "method.kd_max_ratio": 1e-3, "method.kd_cooldown_epochs": 1,
    "method.kd_uncertainty_weight": 0.9, "method.kd_sample_gate": True, "method.enable_kd_after_syn_acc": 1.0,
    "method.use_ib": False, "method.ib_beta": 1.0, "method.beta_schedule": [1.0, 0.0, 3], "method.ib_mbm_query_dim": 7,
    "method.ib_mbm_out_dim": 12, "method.ib_mbm_n_head": 4, "method.ib_mbm_feature_norm": "l2",
    "method.ib_mbm_logvar_clip": 0.01, "method.ib_mbm_min_std": 2.0, "method.ib_mbm_lr_factor": 0.1,
    "method.ib_mbm_reg_lambda": 5.0, "method.learnable_q": True, "method.synergy_head_dropout": 0.5,
    "method.synergy_temp_learnable": True, "method.use_cccp": True, "method.cccp_nt": 2, "method.cccp_ns": 2,
    "method.synergy_ce_alpha": 0.1, "method.teacher_adapt_alpha_kd": 2.0, "method.max_cw": 0.4,
    "method.use_distillation_adapter": False, "method.distill_out_dim": 4, "method.feat_kd_alpha": 0.3,
    "method.label_smoothing": 0.4, "method.ce_label_smoothing": 0.4, "method.mixup_alpha": 0.8,
    "method.cutmix_alpha_distill": 0.8, "optim.optimizer": "adam", "optim.student_lr": 3e-3,
    "optim.student_weight_decay": 0.5, "optim.a_step_optimizer": "sgd", "optim.a_step_lr": 1e-3,
    "optim.a_step_weight_decay": 0.5, "optim.use_amp": True, "schedule.lr_warmup_epochs": 1, "schedule.min_lr": 5e-3,
}  # fmt: skip
"""Another value, which alone changes the student's weights after a run."""
SEEN_IN_FINE_TUNING = {
    "finetune.epochs": 2, "finetune.seed": 1, "finetune.optimizer": "sgd", "finetune.lr": 3e-3,
    "finetune.weight_decay": 0.5, "finetune.schedule.lr_warmup_epochs": 2, "finetune.schedule.min_lr": 5e-3,
    "finetune.cutmix_alpha": 1.0, "finetune.label_smoothing": 0.3,
}  # fmt: skip
SEEN_IN_IMAGES = {
    "dataset.split_seed": 1, "optim.use_channels_last": False, "augment.crop_flip": False,
    "augment.pad_mode": "reflect", "augment.randaugment": True,
}  # fmt: skip

TABLE: dict[str, Case] = {
    **{key: Case(to) for key, to in SEEN_IN_THE_STUDENT.items()},
    **{key: Case(to, observer=tuned) for key, to in SEEN_IN_FINE_TUNING.items()},
    **{key: Case(to, observer=first_images) for key, to in SEEN_IN_IMAGES.items()},
    "dataset.eval_batch_size": Case(5, observer=evaluation_batches),
    # stages
    "method.num_stages": Case(2, observer=part("plan"), more=m(student_epochs_per_stage=[1, 1])),
    "method.student_epochs_per_stage": Case([1], observer=part("plan")),
    "method.teacher_adapt_epochs": Case(1, observer=part("plan")),
    # targets and weights of the B-step
    **where(DKD, dkd_alpha=3.0, dkd_beta=2.0, dkd_warmup_epochs=3),
    "method.kd_view": Case("mixed", MIXED),
    "method.teacher_weights": Case([0.9, 0.1], m(kd_target="avg")),
    "method.kd_ens_alpha": Case(0.2, m(teacher_adapt_kd_warmup=2)),
    "method.kd_ens_alpha_max": Case(0.5, AUTO, gate),
    "method.teacher_adapt_kd_warmup": Case(1, WARM),
    "method.kd_sample_thr": Case(0.5, {**GATED, **m(kd_sample_max_ratio=1.0)}),
    "method.kd_sample_min_ratio": Case(0.3, {**GATED, **m(kd_sample_thr=0.01)}),
    **where(GATED, kd_sample_max_ratio=0.2, kd_sample_reweight=False),
    **where(TWO, kd_two_view_start_epoch=1, kd_two_view_stop_epoch=1),
    "method.gate_source": Case("ema", m(enable_kd_after_syn_acc=0.5), gate),
    "method.plus": Case(["kd"], m(kd_target="avg")),
    **where(m(kd_target="avg", plus=["kd"]), plus_alpha=0.3, plus_tau=2.0),
    "method.standardise": Case(True, m(kd_target="avg")),
    "method.use_disagree_weight": Case(True, m(disagree_lambda_high=3.0)),
    **where(DISAGREE, disagree_mode="both_wrong", disagree_lambda_high=0.1),
    "method.disagree_lambda_low": Case(0.1, {**DISAGREE, **m(disagree_mode="both_wrong")}),
    # fusion
    **where({**STAGES, **m(ib_beta=1.0)}, ib_beta_warmup_epochs=4, ib_epochs_per_stage=1),
    "method.synergy_temp_init": Case(1.0, m(synergy_temp_learnable=True)),
    "method.cccp_alpha": Case(2.0, m(use_cccp=True)),
    # the A-step
    **where(TUNED, teacher_ce_alpha=2.0, reg_lambda=5.0),
    "method.min_cw": Case(2.5, m(max_cw=3.0)),
    "method.teacher_eval_every": Case(2, observer=part("rows")),
    "method.synergy_ema_alpha": Case(0.1, {**STAGES, "optim.a_step_lr": 0.05}, part("rows")),
    "method.synergy_eval_teacher_indices": Case([0], observer=synergy_scores),
    "method.use_teacher_finetuning": Case(True, m(teacher_ce_alpha=0.5)),
    # feature distillation
    "method.feat_kd_key": Case("feat_2d", WIDE),
    **where(FEATURES, ib_mbm_query_key="distill_feat", feat_kd_norm="l2", feat_kd_huber_beta=0.1, feat_kd_clip=0.5),
    # partial freezing
    "method.use_partial_freeze": Case(True, {**STAGES, **m(student_freeze_schedule=[-1, 0])}),
    "method.student_freeze_level": Case(0, {**PRETRAINED, **m(use_partial_freeze=True)}),
    **where(FROZEN, student_freeze_schedule=[-1, 1], student_freeze_bn=True),
    **where(HELD, teacher_freeze_level=2, teacher_freeze_bn=False, teacher_bn_head_only=True),
    **where(HELD, teacher_freeze_scope="features_classifier"),
    # regularisation
    "method.use_loss_clamp": Case(True, m(loss_clamp_max=0.5)),
    **where(CLAMPED, loss_clamp_mode="hard", loss_clamp_max=1.0, loss_clamp_warmup_epochs=1),
    **where(CLAMPED, disable_loss_clamp_in_a=True),
    # optimisers and precision
    "optim.momentum": Case(0.1, SGD),
    "optim.grad_clip_norm": Case(0.01, SGD),
    "optim.ema_decay": Case(0.9, EMA, part("averaged")),
    "optim.ema_update_every": Case(3, EMA, part("averaged")),
    "optim.select_weights": Case("ema", EMA, part("exported")),
    "optim.amp_dtype": Case("float16", {"optim.use_amp": True}),
    "optim.grad_scaler_init_scale": Case(64.0, HALF, part("scale")),
    "optim.safe_retry_patience": Case(3, {"finetune.epochs": 9}, patience),
    "optim.compile": Case(True, observer=compiled),
    "schedule.type": Case("step", more={"schedule.milestones": [1]}),
    "schedule.milestones": Case([2], STEP),
    "schedule.gamma": Case(0.5, STEP),
    # fine-tuning
    "finetune.schedule.type": Case("step", {}, tuned, {"finetune.schedule.milestones": [1]}),
    "finetune.schedule.milestones": Case([2], FINE_STEP, tuned),
    "finetune.schedule.gamma": Case(0.5, FINE_STEP, tuned),
}
REFUSED = ("method.name", "method.module", "method.ib_mbm_query_dim", "method.use_distillation_adapter")
"""Keys one of whose two values is refused here."""


@pytest.mark.parametrize("key", TABLE)
def test_changing_the_key_changes_what_it_is_for(key: str) -> None:
    assert_acts(key, TABLE[key], student, REFUSED)


def test_the_observer_sees_nothing_where_nothing_differs() -> None:
    """Runs are reproducible: what differs above differs by the key."""
    first = _run(json.dumps({}))
    _run.cache_clear()
    assert differences(first, _run(json.dumps({}))) == []
    assert differences(tuned({}), tuned({})) == []


def test_a_configuration_is_no_scratch_pad() -> None:
    """The research code kept results in its configuration: here it cannot be written to."""
    c = tiny({})
    for section, name in ((c, "seed"), (c.method, "tau"), (c.optim, "use_amp"), (c.model.teachers[0], "checkpoint")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))
    with pytest.raises(ValidationError):
        c.method.result = 1.0  # type: ignore[attr-defined]
