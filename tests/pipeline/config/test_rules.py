"""Every rule between keys, and the keys that cannot act."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import Config, explain, inactive
from pipeline.config.base import conditions, leaves

PAIR = {"teachers": [{"name": "cifar_resnet20"}, {"name": "cifar_wrn_16_1"}]}
ONE = {"teachers": [{"name": "cifar_resnet20"}]}


def distil(model: Any = None, **method: Any) -> dict[str, Any]:
    return {"model": PAIR if model is None else model, "method": {"kd_alpha": 0.5, **method}}


def refusal(sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(sections)
    return explain(caught.value)


STEP = {"type": "step"}
RULES: dict[str, tuple[Any, str]] = {
    "stages": ({"method": {"num_stages": 2}}, "method.student_epochs_per_stage=[20] does not fit method.num_stages=2"),
    "cooldown": (distil(kd_cooldown_epochs=20), "method.kd_cooldown_epochs=20 leaves none of the 20 B-epochs"),
    "two-view halves": (distil(kd_two_view_start_epoch=3), "kd_two_view_stop_epoch=null: give both"),
    "two-view order": (distil(kd_two_view_start_epoch=3, kd_two_view_stop_epoch=3), "the first below the second"),
    "two-view augmentation": (
        {**distil(kd_two_view_start_epoch=3, kd_two_view_stop_epoch=5), "augment": {"crop_flip": False}},
        "without augmentation both views are the same"),
    "two-view mixed": (distil(kd_two_view_start_epoch=3, kd_two_view_stop_epoch=5, kd_view="mixed"), "kd_view=clean"),
    "nothing to learn": ({"method": {"ce_alpha": 0}}, "method.ce_alpha=0 and no distillation weight"),
    "ce 0 in cooldown": (distil(ce_alpha=0, kd_cooldown_epochs=2), "it would learn nothing then"),
    "ce 0 and ratio": (distil(ce_alpha=0, kd_max_ratio=1), "bounds distillation by cross-entropy"),
    "no teachers": (distil(model={}), "method.kd_alpha=0.5 needs teachers, and model.teachers is empty"),
    "no teachers, hybrid": ({"method": {"hybrid_beta": 1}}, "method.hybrid_beta=1.0 needs teachers"),
    "one teacher": (distil(model=ONE), "method.kd_target=synergy fuses teachers and needs two, model.teachers has 1"),
    "one teacher, features": (distil(model=ONE, kd_target="avg", feat_kd_alpha=1), "method.feat_kd_alpha=1.0 fuses"),
    "no A-epochs": (distil(teacher_adapt_epochs=0), "nothing would train the fusion"),
    "idle A-step": (distil(synergy_ce_alpha=0, teacher_adapt_alpha_kd=0), "the A-step would learn nothing"),
    "weights": (distil(teacher_weights=[1, 2, 3]), "method.teacher_weights=[1.0, 2.0, 3.0] does not fit"),
    "zero weights": (distil(teacher_weights=[0, 0]), "method.teacher_weights are all 0"),
    "auto order": (distil(kd_target="auto", kd_ens_alpha=0.9), "method.kd_ens_alpha=0.9 is above"),
    "sample ratios": (distil(kd_sample_min_ratio=0.6), "method.kd_sample_min_ratio=0.6 is above"),
    "closed sample gate": (distil(kd_sample_gate=True, kd_sample_min_ratio=0, kd_sample_max_ratio=0), "no sample"),
    "gate": ({**distil(enable_kd_after_syn_acc=0.5), "dataset": {"val_fraction": 0}}, "dataset.val_fraction > 0"),
    "relative gate": ({**distil(enable_kd_after_syn_acc="avg"), "dataset": {"val_fraction": 0}}, "val_fraction > 0"),
    "auto": ({**distil(kd_target="auto"), "dataset": {"val_fraction": 0}}, "method.kd_target=auto reads validation"),
    "heads": ({"method": {"ib_mbm_out_dim": 10}}, "method.ib_mbm_out_dim=10 is not divisible by"),
    "certainty": ({"method": {"min_cw": 2}}, "method.min_cw=2.0 is above method.max_cw=1.0"),
    "no indices": (distil(synergy_eval_teacher_indices=[]), "synergy_eval_teacher_indices is empty"),
    "index": (distil(synergy_eval_teacher_indices=[2]), "teachers are numbered 0 to 1, each once"),
    "index twice": (distil(synergy_eval_teacher_indices=[1, 1]), "teachers are numbered 0 to 1, each once"),
    "query": (distil(ib_mbm_query_key="distill_feat"), "needs method.feat_kd_alpha > 0"),
    "query without training": (
        distil(ib_mbm_query_key="distill_feat", feat_kd_alpha=1, feat_kd_key="feat_2d"), "nothing trains the"),
    "constant sigma": (distil(ib_mbm_min_std=8, ib_mbm_logvar_clip=4), "nothing trains it"),
    "constant temperature": (distil(synergy_temp_learnable=True, synergy_temp_init=-12), "give more than -9.21"),
    "features alone": (distil(ce_alpha=0, kd_alpha=0, feat_kd_alpha=1), "and not its classifier"),
    "no weight": (distil(use_disagree_weight=True, disagree_lambda_high=0, disagree_lambda_low=0), "both 0"),
    "no dkd": (distil(kd_loss="dkd", dkd_alpha=0, dkd_beta=0), "kd_loss=dkd would distil nothing"),
    "averages alone": (distil(kd_target="auto", kd_ens_alpha=1, kd_ens_alpha_max=1), "trains a fusion for nothing"),
    "frozen feature": (
        {**distil({**PAIR, "student": {"name": "resnet18", "pretrained": True}}, use_partial_freeze=True,
                  student_freeze_level=0, feat_kd_alpha=1, feat_kd_key="feat_2d")}, "comes from what is frozen"),
    "query width": (distil(ib_mbm_query_key="distill_feat", feat_kd_alpha=1, ib_mbm_query_dim=64), "set it to null"),
    "no adapter": (distil(feat_kd_alpha=1, use_distillation_adapter=False), "method.use_distillation_adapter=true"),
    "feature widths": (distil(feat_kd_alpha=1, distill_out_dim=64), "feature distillation compares vectors"),
    "freeze length": ({"method": {"student_freeze_schedule": [-1, 2]}}, "student_freeze_schedule=[-1, 2] does not fit"),
    "freeze first stage": (
        {"method": {"use_partial_freeze": True, "student_freeze_schedule": [2]}}, "begin with -1"),
    "freeze level": ({"method": {"use_partial_freeze": True, "student_freeze_level": 0}}, "begin with -1"),
    "teachers' own loss": (distil(use_teacher_finetuning=True), "needs method.teacher_ce_alpha > 0"),
    "teachers without A-step": (
        distil(use_teacher_finetuning=True, teacher_ce_alpha=1, kd_target="avg"), "here there are none"),
    "teacher parts": (distil(teacher_bn_head_only=True, teacher_freeze_scope="features_classifier"), "give one"),
    "ema": ({"optim": {"select_weights": "ema"}}, "optim.select_weights=ema needs optim.ema_decay"),
    "milestones": ({"schedule": STEP}, "schedule.type=step needs schedule.milestones"),
    "milestones order": ({"finetune": {"schedule": {**STEP, "milestones": [3, 2]}}}, "milestones=[3, 2] must rise"),
    "lr warm-up": ({"schedule": {"lr_warmup_epochs": 20}}, "20 epochs after the warm-up: set it below 20"),
    "min_lr": ({"schedule": {"min_lr": 1}}, "schedule.min_lr=1.0 is above optim.student_lr=0.001"),
    "finetune min_lr": ({"finetune": {"schedule": {"min_lr": 1}}}, "finetune.schedule.min_lr=1.0 is above finetune.lr"),
    "npz": ({"dataset": {"name": "npz"}}, "dataset.name=npz needs dataset.path"),
    "no class list": ({"dataset": {"name": "imagenet100"}}, "dataset.name=imagenet100 needs one of dataset.class_list"),
    "two class lists": (
        {"dataset": {"name": "imagenet100", "class_list": "cmc", "path": "mine.txt"}},
        "dataset.name=imagenet100 needs one of dataset.class_list",
    ),
    "no id for timm": ({"dataset": {"name": "timm"}}, "dataset.id=null: dataset.name=timm needs one that begins with"),
    "another reader of timm's": (
        {"dataset": {"name": "timm", "id": "tfds/cifar10"}},
        "dataset.id=tfds/cifar10: dataset.name=timm needs one that begins with folder/…, torch/…, wds/…, hfds/…",
    ),
    "published of another": (
        {"dataset": {"name": "cifar10", "normalisation": "published"}},
        "no constants for cifar10, only for cifar100, cifar100_sample; set it to exact"),
    "published and given": (
        {"dataset": {"normalisation": "published", "std": [0.2] * 3}},
        "dataset.normalisation=published and dataset.std: give one of them"),
    "batch of one": ({"dataset": {"batch_size": 1}}, "dataset.batch_size=1"),
    "device": ({"device": "gpu"}, "device='gpu': give auto, cpu"),
    "overlap of one": ({"model": {**ONE, "overlap": 0.5}}, "model.overlap=0.5 divides classes among teachers, and"),
    "overlap and classes": (
        {"model": {"overlap": 0.5, "teachers": [{"classes": [0, 1]}, {}]}},
        "model.overlap=0.5 and model.teachers.0.classes: give one of them"),
    "class twice": ({"model": {"teachers": [{}, {"classes": [3, 1, 3]}]}}, "teachers.1.classes names class 3 twice"),
    "one class": ({"model": {"teachers": [{"classes": [3]}]}}, "model.teachers.0.classes=[3]: of one class"),
    "subsets and trained teachers": (
        distil({**PAIR, "overlap": 0.5}, use_teacher_finetuning=True, teacher_ce_alpha=1),
        "method.use_teacher_finetuning=true would teach all classes"),
    "masked and standardised": (
        distil({**PAIR, "overlap": 0.5, "unseen": "masked"}, standardise=True), "use model.unseen=uniform"),
    "untrained teacher": ({**distil(), "finetune": {"epochs": 0}}, "model.teachers.0 (cifar_resnet20) would stay"),
    "pretrained cifar": ({"model": {"teachers": [{"pretrained": True}]}}, "model.teachers.0.pretrained=true"),
    "no name": ({"model": {"student": {"name": ""}}}, "model.student.name is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_rule(case: str) -> None:
    sections, message = RULES[case]
    assert message in refusal(sections)


@pytest.mark.parametrize(
    "sections",
    [
        distil(model=ONE, kd_target="avg"),
        distil(model=ONE, kd_target="weighted_conf", teacher_adapt_epochs=0),
        distil(model=ONE, kd_alpha=0, hybrid_beta=1),
        distil(ib_mbm_query_key="distill_feat", learnable_q=True),
        distil(teacher_weights=[1, 0]),
        distil(use_partial_freeze=True, num_stages=4, student_epochs_per_stage=[1] * 4,
               student_freeze_schedule=[-1, -1, 2, 1]),
        {"schedule": {"type": "step", "milestones": [3]}, "optim": {"student_lr": 1e-7}},
        {**distil(kd_target="avg"), "dataset": {"val_fraction": 0}},
        {"model": {"student": {"name": "resnet18", "pretrained": True}},
         "method": {"use_partial_freeze": True, "student_freeze_level": 1}},
    ],
)  # fmt: skip
def test_what_the_method_allows_is_not_refused(sections: Any) -> None:
    Config.model_validate(sections)


NOTES: dict[str, tuple[Any, str]] = {
    "mixup": (distil(mixup_alpha=0.2, cutmix_alpha_distill=1), "method.mixup_alpha: method.cutmix_alpha_distill takes"),
    "min_std": (distil(ib_mbm_min_std=0.2, ib_mbm_logvar_clip=4), "method.ib_mbm_logvar_clip: its smallest sigma"),
    "ib warm-up": (distil(ib_beta_warmup_epochs=5), "method.ib_beta_warmup_epochs=5: 5 A-epochs use"),
    "synergy only": (distil(synergy_only_epochs=5), "method.synergy_only_epochs=5: the run has 5 A-epochs, all CE"),
    "student alone": ({"method": {"kd_warmup_epochs": 3}}, "method.kd_warmup_epochs: nothing is distilled"),
    "no fusion": (distil(kd_target="avg", learnable_q=True), "method.learnable_q: nothing uses the fusion"),
    "tau": (distil(tau=2, tau_schedule=[2, 4]), "method.tau: method.tau_schedule takes precedence"),
    "beta": (distil(ib_beta=1, beta_schedule=[0, 1, 3]), "method.ib_beta: method.beta_schedule takes precedence"),
    "no ib": (distil(use_ib=False, max_cw=2), "method.max_cw: method.use_ib is false"),
    "cosine": ({"schedule": {"milestones": [3]}}, "schedule.milestones: schedule.type is not step"),
    "late milestone": ({"schedule": {"type": "step", "milestones": [3, 20]}}, "schedule.milestones: [20] lie past"),
    "padding": ({"augment": {"crop_flip": False, "pad_mode": "reflect"}}, "augment.pad_mode: augment.crop_flip"),
    "switch": (distil(cccp_alpha=0.5), "method.cccp_alpha: method.use_cccp is false"),
    "ema": ({"optim": {"ema_update_every": 2}}, "optim.ema_update_every: optim.ema_decay is null"),
    "features": (distil(feat_kd_norm="l2"), "method.feat_kd_norm: method.feat_kd_alpha is 0"),
    "no share": (distil(kd_ens_alpha=0.2), "method.kd_ens_alpha: nothing mixes"),
    "share of auto": (distil(kd_target="auto", teacher_adapt_kd_warmup=2), "method.teacher_adapt_kd_warmup: method.kd"),
    "temperature": (distil(synergy_temp_init=0.5), "method.synergy_temp_init: method.synergy_temp_learnable is false"),
    "whole teachers": (
        distil(use_teacher_finetuning=True, teacher_ce_alpha=1, teacher_freeze_level=1),
        "method.teacher_freeze_level: method.use_partial_freeze is false"),
    "no A-steps": (distil(kd_target="avg", ib_beta=0.5), "method.ib_beta: nothing uses the fusion"),
    "gate source": (distil(gate_source="ema"), "method.gate_source: method.enable_kd_after_syn_acc is 0"),
    "scaler": ({"optim": {"grad_scaler_init_scale": 2}}, "optim.grad_scaler_init_scale: optim.amp_dtype is not"),
    "view": (distil(kd_view="mixed"), "method.kd_view: nothing is mixed"),
    "two-view": (distil(kd_two_view_start_epoch=20, kd_two_view_stop_epoch=30), "method.kd_two_view_start_epoch=20"),
    "query": (distil(learnable_q=True, ib_mbm_query_dim=3), "method.ib_mbm_query_dim: method.learnable_q takes"),
    "extend": ({"extend": True}, "extend: resume is null"),
    "dropout": ({"model": {"teachers": [{"efficientnet_dropout": 0.1}]}}, "model.teachers.0.efficientnet_dropout: c"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTES)
def test_a_key_that_cannot_act_is_named_once(case: str) -> None:
    sections, note = NOTES[case]
    notes = inactive(Config.model_validate(sections))
    assert [n.startswith(note) for n in notes].count(True) == 1, notes


def test_a_warm_up_as_long_as_the_run_acts() -> None:
    """Its weight rises to the last epoch: (b + 1) / 20 (docs/method.md section 5)."""
    assert inactive(Config.model_validate(distil(kd_warmup_epochs=20))) == inactive(Config.model_validate(distil()))


def test_conditions_name_switches_that_exist() -> None:
    for prefix, section, name in leaves(Config.model_validate({"model": ONE})):
        for condition in conditions(type(section).model_fields[name]):
            condition(section, prefix)


def test_defaults_are_silent() -> None:
    assert inactive(Config()) == []
    assert inactive(Config.model_validate(distil())) == []
