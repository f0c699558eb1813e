"""The schema against docs/method.md: defaults, ranges, identity, and what is filled in before the lock."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import Config, config_hash, explain, flatten
from pipeline.config.describe import expects
from pipeline.config.identity import computation
from pipeline.config.names import known_names, unknown_key
from pipeline.config.schema import TeacherConfig

# Typed from docs/method.md section 10; a value is what stands there, keys without a section are of `method`.
DEFAULTS = """
num_stages 1 · student_epochs_per_stage [20] · teacher_adapt_epochs 5 · synergy_only_epochs 0 · ce_alpha 1 · kd_alpha 0
renorm_ce_kd false · kd_target synergy · kd_loss kl · kd_view clean · tau 4 · tau_schedule null · tau_syn 4
synergy_logit_scale 1 · use_mu_for_kd true · teacher_weights equal · kd_ens_alpha 0 · kd_ens_alpha_max 0.8
hybrid_beta 0 · kd_warmup_epochs 0 · teacher_adapt_kd_warmup 0 · kd_max_ratio null · kd_cooldown_epochs 0
kd_uncertainty_weight 0 · kd_sample_gate false · kd_sample_thr 0.85 · kd_sample_min_ratio 0.1
kd_sample_max_ratio 0.5 · kd_sample_reweight true · kd_two_view_start_epoch null · kd_two_view_stop_epoch null
enable_kd_after_syn_acc 0 · gate_source snapshot · use_disagree_weight false · disagree_mode pred
disagree_lambda_high 1 · disagree_lambda_low 1 · use_ib true · ib_beta 0.001 · ib_beta_warmup_epochs 0
beta_schedule null · ib_epochs_per_stage null · ib_mbm_query_key feat_2d · ib_mbm_query_dim null · ib_mbm_out_dim 512
ib_mbm_n_head 4 · ib_mbm_feature_norm none · ib_mbm_logvar_clip 10 · ib_mbm_min_std 0.0001 · ib_mbm_lr_factor 1
ib_mbm_reg_lambda 0 · learnable_q false · synergy_head_dropout 0 · synergy_temp_learnable false · synergy_temp_init 0
use_cccp false · cccp_alpha 0.25 · cccp_nt 1 · cccp_ns 1 · synergy_ce_alpha 0.6 · teacher_adapt_alpha_kd null
teacher_ce_alpha 0 · min_cw 0.1 · max_cw 1 · reg_lambda 0 · teacher_eval_every 1 · synergy_ema_alpha 0.8
synergy_eval_teacher_indices null · optim.a_step_lr 0.0001 · optim.a_step_optimizer adamw
optim.a_step_weight_decay 0.0003 · use_teacher_finetuning false · use_distillation_adapter true · distill_out_dim 512
feat_kd_alpha 0 · feat_kd_key distill_feat · feat_kd_norm none · feat_kd_huber_beta 1 · feat_kd_clip null
use_partial_freeze false · student_freeze_level -1 · student_freeze_schedule null · student_freeze_bn false
teacher_freeze_level 0 · teacher_freeze_bn true · teacher_bn_head_only false · teacher_freeze_scope null
optim.optimizer adamw · optim.student_lr 0.001 · optim.student_weight_decay 0.0003 · schedule.type cosine
schedule.lr_warmup_epochs 0 · schedule.min_lr 0.000001 · optim.grad_clip_norm 0 · label_smoothing 0
ce_label_smoothing 0 · mixup_alpha 0 · cutmix_alpha_distill 0 · use_loss_clamp false · loss_clamp_mode soft
loss_clamp_max 1000 · loss_clamp_warmup_epochs 0 · disable_loss_clamp_in_a false · optim.ema_decay null
optim.ema_update_every 1 · optim.select_weights raw · optim.use_amp false · optim.amp_dtype bfloat16
optim.grad_scaler_init_scale 1024 · optim.safe_retry_patience 10 · optim.use_channels_last true
optim.deterministic true · augment.crop_flip true · augment.pad_mode zero · augment.randaugment false
dataset.batch_size 128 · dataset.val_fraction 0.1 · dataset.split_seed 0 · dataset.small_input auto
model.student.pretrained false
"""
PAIRS = [entry.split() for line in DEFAULTS.strip().splitlines() for entry in line.split(" · ")]
TABLE = {name if "." in name else f"method.{name}": value for name, value in PAIRS}


def typed(text):
    words = {"null": None, "true": True, "false": False, "[20]": [20]}
    if text in words:
        return words[text]
    try:
        return float(text)
    except ValueError:
        return text


def refusal(**sections) -> str:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(sections)
    return explain(caught.value)


@pytest.mark.parametrize(("name", "value"), TABLE.items(), ids=list(TABLE))
def test_default_is_that_of_the_method(name, value):
    found = flatten(Config())[name]
    assert (found, type(found) is bool) == (typed(value), type(typed(value)) is bool)


def test_no_method_key_is_missing_from_the_table():
    beyond = {"method.name", "method.dkd_alpha", "method.dkd_beta", "method.dkd_warmup_epochs"}  # of DKD's paper
    assert {n for n in flatten(Config()) if n.startswith("method.")} - beyond == {
        n for n in TABLE if n.startswith("method.")
    }


def test_teacher_defaults():
    fields = TeacherConfig.model_fields
    assert (fields["pretrained"].default, fields["checkpoint"].default) == (True, None)
    assert fields["efficientnet_dropout"].default == 0.3


def test_cifar_networks_are_pretrained_only_by_a_wrong_request():
    assert not TeacherConfig(name="cifar_resnet20").pretrained
    assert TeacherConfig(name="resnet50").pretrained
    message = refusal(model={"student": {"name": "cifar_resnet8", "pretrained": True}})
    assert message.startswith("model.student.pretrained=true: cifar_resnet8 has no published weights")


@pytest.mark.parametrize("student", ["mobilenet_v2", "mobilenetv2_100", "efficientnet_b0", "shufflenet_v2_x1_0"])
def test_small_students_get_a_width_of_256(student):
    config = Config.model_validate({"model": {"student": {"name": student}}})
    assert (config.method.distill_out_dim, config.method.ib_mbm_out_dim) == (256, 256)
    chosen = Config.model_validate({"model": {"student": {"name": student}}, "method": {"distill_out_dim": 64}})
    assert (chosen.method.distill_out_dim, chosen.method.ib_mbm_out_dim) == (64, 64)


@given(st.floats(0, 100), st.floats(0, 100))
def test_renormalised_weights_sum_to_one_and_stay(ce, kd):
    if ce + kd < 1e-6:
        return
    data = {"model": {"teachers": [{}, {}]}, "method": {"ce_alpha": ce, "kd_alpha": kd, "renorm_ce_kd": "true"}}
    method = Config.model_validate(data).method
    assert math.isclose(method.ce_alpha + method.kd_alpha, 1, abs_tol=1e-8)
    data["method"] |= {"ce_alpha": method.ce_alpha, "kd_alpha": method.kd_alpha}
    assert Config.model_validate(data).method == method


@pytest.mark.parametrize(
    ("given_as", "kept"),
    [("0.8", 0.8), (0.8, 0.8), (0, 0.0), (1, 1.0), ("avg", "avg"), ("avg-0", "avg"), ("avg - .020", "avg-0.02"),
     ("AVG-0.02", "avg-0.02"), ("avg+1e-2", "avg+0.01")],
)  # fmt: skip
def test_gate_threshold_has_one_spelling(given_as, kept):
    found = Config.model_validate({"method": {"enable_kd_after_syn_acc": given_as}}).method.enable_kd_after_syn_acc
    assert (found, type(found)) == (kept, type(kept))


@pytest.mark.parametrize(
    "bad", ["bad", "avg-", "avg-2", "80%", 80, "80", -0.1, math.nan, "nan", True, None, "mean-0.1"]
)
def test_gate_threshold_that_means_nothing_is_refused(bad):
    assert "enable_kd_after_syn_acc" in refusal(method={"enable_kd_after_syn_acc": bad})


# ------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"tau": "abc"}}, "method.tau: got 'abc'; give a number above 0"),
        ({"method": {"tau": -1}}, "method.tau: got -1; give a number above 0"),
        ({"method": {"tau": True}}, "method.tau: got true; give a number above 0"),
        ({"method": {"tau": math.nan}}, "method.tau: got nan; give a number above 0"),
        ({"method": {"num_stages": 1.5}}, "method.num_stages: got 1.5; give a whole number from 1"),
        ({"method": {"num_stages": True}}, "method.num_stages: got true; give a whole number from 1"),
        ({"method": {"use_ib": "maybe"}}, "method.use_ib: got 'maybe'; give true or false"),
        ({"method": {"kd_alpha": -0.1}}, "method.kd_alpha: got -0.1; give a number from 0"),
        ({"method": {"kd_view": "clear"}},
         "method.kd_view: got 'clear'; give one of clean, mixed (did you mean clean?)"),
        ({"method": {"student_epochs_per_stage": [True]}},
         "method.student_epochs_per_stage: got [true]; give a list of whole numbers from 0"),
        ({"method": {"tau_schedule": [1]}},
         "method.tau_schedule: got [1]; give a list of 2: a number above 0, a number above 0, or null"),
        ({"method": {"teacher_weights": [1, -1]}},
         "method.teacher_weights: got [1,-1]; give equal, or a list of numbers from 0"),
        ({"method": {"synergy_temp_init": math.inf}}, "method.synergy_temp_init: got inf; "
             "give a number from -20 to 20 (it is the logarithm of a temperature)"),
        ({"dataset": {"small_input": "x"}}, "dataset.small_input: got 'x'; give auto, or true or false"),
        ({"method": 3}, "method is a group of keys, got 3; give such as method.name=…"),
        ({"method": {"tua": 1}}, "method.tua: unknown key; did you mean method.tau?"),
        ({"tau": 1}, "tau: unknown key; did you mean method.tau?"),
        ({"finetune": {"schedule": {"typ": 1}}},
         "finetune.schedule.typ: unknown key; did you mean finetune.schedule.type?"),
        ({"model": {"teachers": [{"nam": "x"}]}},
         "model.teachers.0.nam: unknown key; did you mean model.teachers.0.name?"),
        ({"model": {"teachers": [{}, {"checkpoint": []}]}},
         "model.teachers.1.checkpoint: got []; give a text, or null"),
        ({"zzzz": 1}, "zzzz: unknown key; --help lists all keys"),
    ],
)  # fmt: skip
def test_one_line_says_key_value_and_what_would_do(sections, message):
    assert refusal(**sections) == message


def test_at_most_three_problems_are_told():
    message = refusal(method={"tau": 0, "tau_syn": 0, "num_stages": 0, "cccp_nt": 0})
    assert message.count("give") == 3
    assert message.endswith("; and 1 more")


@pytest.mark.parametrize(
    ("old", "new"),
    [("mbm_out_dim", "method.ib_mbm_out_dim"), ("student_iters", "method.student_epochs_per_stage"),
     ("teacher_iters", "method.teacher_adapt_epochs"), ("student_epochs_schedule", "method.student_epochs_per_stage"),
     ("teacher1_type", "model.teachers.0.name"), ("teacher2_freeze_bn", "method.teacher_freeze_bn"),
     ("cl_mode", "continual"), ("ib_mbm_dropout", "method.synergy_head_dropout"), ("data_aug", "augment.crop_flip"),
     ("train_distill_adapter_only", "method.use_teacher_finetuning"), ("mbm_something", "ib_mbm_"),
     ("small_input", "dataset.small_input")],
)  # fmt: skip
def test_old_names_lead_to_the_new_one(old, new):
    assert new in refusal(**{old: 1})
    assert new in refusal(method={old: 1})


def test_a_password_in_the_tracking_uri_is_refused_and_not_shown():
    message = refusal(tracking={"uri": "postgresql+psycopg://anna:se/cr@t@db:5432/mlflow"})
    assert "tracking.uri holds a password" in message
    assert "cr@t" not in message


def test_a_misplaced_key_is_not_called_old():
    assert unknown_key("optim.tau", known_names()) == "optim.tau: unknown key; did you mean method.tau?"


def test_every_key_has_words_for_help():
    for name, field in type(Config().method).model_fields.items():
        assert field.description, name
        assert expects(field) != "a group of keys", name


# ------------------------------------------------------------------------------------------ identity


def changed(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "other" if value is None or isinstance(value, str) else [*value, 1]


UNCOMPUTED = ("device", "threads", "output_dir", "run_name", "rung", "resume", "extend", "log_model", "debug",
              "bank", "bank_folder", "bank_gb",
              "register", "student", "dataset.root",
              "dataset.path", "dataset.download", "dataset.workers", "optim.use_amp", "optim.compile",
              "checkpoint.every_seconds",
              "tracking.uri", "tracking.mode", "tracking.experiment")  # fmt: skip


def with_value(name, value) -> Config:
    """A configuration with one other value; not validated, since the hash does not ask whether it makes sense."""
    *sections, key = name.split(".")
    parts = [Config()]
    for section in sections:
        parts.append(getattr(parts[-1], section))
    inner = parts.pop().model_copy(update={key: tuple(value) if isinstance(value, list) else value})
    for section, outer in zip(reversed(sections), reversed(parts), strict=True):
        inner = outer.model_copy(update={section: inner})
    return inner


@pytest.mark.parametrize("name", [n for n in flatten(Config()) if n != "model.teachers"])
def test_hash_covers_what_is_computed_and_nothing_else(name):
    other = with_value(name, changed(flatten(Config())[name]))
    skipped = name in UNCOMPUTED or name in ("dataset.eval_batch_size", "tracking.finish_seconds", "tracking.git_diff")
    assert (config_hash(other) == config_hash(Config())) == skipped
    assert (name in computation(other)) != skipped


def test_hash_goes_by_validated_values():
    def hashed(**method):
        return config_hash(Config.model_validate({"method": method}))

    assert hashed(tau=4) == hashed(tau=4.0) == hashed(tau="4") == hashed()
    assert hashed(hybrid_beta=-0.0) == hashed(hybrid_beta=0)
    assert hashed(enable_kd_after_syn_acc="0.5") == hashed(enable_kd_after_syn_acc=0.5) != hashed()
    assert hashed(student_epochs_per_stage=(20,)) == hashed(student_epochs_per_stage=[20])


def test_hash_leaves_paths_of_teachers_out():
    def hashed(**teacher):
        return config_hash(Config.model_validate({"model": {"teachers": [teacher]}}))

    assert hashed(checkpoint="a") == hashed(checkpoint="b")
    assert hashed(name="resnet18") != hashed(name="resnet34")
