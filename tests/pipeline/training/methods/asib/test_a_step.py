"""What an A-step weighs, trains and leaves alone; L_A, its gradient and readings against float64."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.training.methods.asib.a_step import AStep
from pipeline.training.methods.asib.task import AsibDistillation as Distillation
from pipeline.training.objective import Moment
from pipeline.training.optim import update
from tests.pipeline.training.builders import (
    Calls,
    config,
    copied,
    differences,
    distillation,
    double,
    first_batch,
    loop_for,
    run_until,
)

MOMENT = Moment("a", 0, 1)
TUNED: dict[str, Any] = {"use_teacher_finetuning": True, "teacher_ce_alpha": 0.5}


def prepared(model: Any = None, number: Any = 0, **method: Any) -> tuple[Distillation, AStep, Any]:
    task = distillation(config(method={"ib_beta": 0.01, "min_cw": 0.5, "max_cw": 1.02, **method}, model=model or {}))
    task.begin_epoch(task.plan[number])
    objective = task.phases["a"].objective.train()
    assert isinstance(objective, AStep)
    return task, objective, first_batch(task, "a", 1)


def reference(task: Distillation, batch: Any, w: Any) -> tuple[Tensor, list[Tensor], list[Tensor], dict[str, float]]:
    """L_A by loops over samples in float64, the parameters that it is differentiated by, and readings."""
    m = task.method
    fusion, student, teachers = double(task.fusion), double(task.student).eval(), [double(t) for t in task.teachers]
    x = batch.x.double()
    with torch.no_grad():
        s = student(x)
    seen = [t(x) for t in teachers]
    if not m.use_teacher_finetuning:
        seen = [type(t)(*(v.detach() if isinstance(v, Tensor) else v for v in t)) for t in seen]
    tokens = torch.stack([a(t.feat_2d) for a, t in zip(fusion.adapters, seen, strict=True)], 1)
    _, mu, logvar = fusion.ib_mbm(None if m.learnable_q else getattr(s, m.ib_mbm_query_key), tokens, sample="never")
    shape = (len(x), m.ib_mbm_out_dim)
    eps = task.streams.normal(shape, "ib_noise", *MOMENT, 0).double()
    keep = task.streams.keep_mask(shape, m.synergy_head_dropout, "head_dropout", *MOMENT, 0).double()
    z = mu + (logvar / 2).exp().clamp_min(m.ib_mbm_min_std) * eps if m.use_ib else mu
    norm, act, _, linear = fusion.head.net
    syn = m.synergy_logit_scale * linear(act(norm(z)) * keep / (1 - m.synergy_head_dropout))
    floor = 2 * torch.tensor(m.ib_mbm_min_std, dtype=torch.float64).log()
    loss, n, precisions, certainty = torch.zeros((), dtype=torch.float64), len(x), [], []

    def cross_entropy(row: Tensor, label: int) -> Any:
        log_q, eps, k = row.log_softmax(0), m.label_smoothing, len(row)
        return -sum(((1 - eps) * (c == label) + eps / k) * log_q[c] for c in range(k))

    for i in range(n):
        precisions.append(float(torch.exp(-logvar[i].detach()).mean()))
        cw = min(max(precisions[-1], m.min_cw), m.max_cw) if w.certainty else 1.0
        certainty.append(cw)
        p, log_q = (s.logits[i] / w.tau).softmax(0), (syn[i] / w.tau).log_softmax(0)
        divergence = w.tau**2 * sum(p[c] * (p[c].log() - log_q[c]) for c in range(len(p)))
        feature = getattr(s, m.feat_kd_key)
        distance = torch.zeros(())
        if feature is not None:
            f, g = feature[i], mu[i]
            if m.feat_kd_norm == "l2":
                f, g = f / f.norm(), g / g.norm()
            distance = ((f - g) ** 2).sum()
        floored = [torch.maximum(v, floor) for v in logvar[i]]
        kl = sum(0.5 * (a * a + v.exp() - 1 - v) for a, v in zip(mu[i], floored, strict=True))
        loss = loss + cw * w.ce * cross_entropy(syn[i], int(batch.y[i])) / n
        loss = loss + (m.cccp_alpha * divergence if m.use_cccp else cw * w.kd * divergence) / n
        loss = loss + (w.beta * kl + cw * w.feat * distance) / n
        if m.use_teacher_finetuning:
            for t in seen:
                loss = loss + m.teacher_ce_alpha * cross_entropy(t.logits[i], int(batch.y[i])) / n

    def penalty(parameters: list[Tensor]) -> Any:
        return sum((v * v).sum() / v.numel() for v in parameters) / len(parameters)

    if m.ib_mbm_reg_lambda and w.penalties:
        loss = loss + m.ib_mbm_reg_lambda * penalty(list(fusion.parameters()))
    trained = [p for t in teachers for p in t.parameters() if p.requires_grad]
    if m.reg_lambda:
        loss = loss + m.reg_lambda * penalty(trained)
    sigma = (logvar / 2).exp().clamp_min(m.ib_mbm_min_std)
    readings = {
        "sigma": sigma.mean().item(),
        "raw_kl": (0.5 * (mu**2 + sigma**2 - 1 - 2 * sigma.log())).mean().item(),
        "cw_at_bounds": sum(not m.min_cw < v < m.max_cw for v in precisions) / n if w.certainty else 0.0,
        "cw_mean": sum(certainty) / n,
        "cw_square": sum(v * v for v in certainty) / n,
    }
    return loss, list(fusion.parameters()), trained, readings


CASES: dict[str, dict[str, Any]] = {
    "features": {"feat_kd_alpha": 0.3},
    "features, feat_2d, l2": {
        "feat_kd_alpha": 0.3,
        "feat_kd_key": "feat_2d",
        "ib_mbm_out_dim": 6,
        "feat_kd_norm": "l2",
    },
    "features, queried by them": {"feat_kd_alpha": 0.3, "ib_mbm_query_key": "distill_feat"},
    "cccp": {"use_cccp": True, "cccp_alpha": 0.7},
    "cccp, features, penalty": {"use_cccp": True, "feat_kd_alpha": 0.2, "ib_mbm_reg_lambda": 0.4},
    "cccp, learned query": {"use_cccp": True, "learnable_q": True},
    "teachers": TUNED,
    "teachers, penalties": {**TUNED, "reg_lambda": 0.3, "ib_mbm_reg_lambda": 0.2, "use_cccp": True},
    "teachers, heads alone": {**TUNED, "reg_lambda": 0.3, "use_partial_freeze": True},
    "floor of sigma": {"ib_mbm_min_std": 1.0},
    "deterministic": {"use_ib": False, "feat_kd_alpha": 0.3},
    "other weights and bounds": {
        "teacher_adapt_alpha_kd": 0.9,
        "tau": 2.0,
        "synergy_logit_scale": 0.8,
        "ib_mbm_reg_lambda": 0.3,
        "max_cw": 1.01,
    },
    "cross-entropy alone": {"synergy_only_epochs": 1, "feat_kd_alpha": 0.2, "ib_mbm_reg_lambda": 0.3},
    "no distillation": {"teacher_adapt_alpha_kd": 0.0},
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradient_are_those_of_the_method(case: str) -> None:
    keys = CASES[case]
    # level -1 lets batch statistics of teachers train: their pass is in training mode then
    task, objective, batch = prepared(**keys)
    for teacher in task.teachers:
        assert teacher.training is bool(keys.get("use_teacher_finetuning"))
    expected, fusion, trained, readings = reference(task, batch, objective.weights)
    out = objective(batch, MOMENT)
    assert out["loss"].item() == pytest.approx(expected.item(), rel=2e-5)
    for name, value in readings.items():
        assert out[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    logged = objective.summarise({name: out[name].item() for name in ("cw_mean", "cw_square")})
    shown = set(objective.summarise(dict.fromkeys(("ce", "kd", "feat", "cccp"), 1.0)))
    distils = case not in ("cross-entropy alone", "no distillation") and "use_cccp" not in keys
    features = case != "cross-entropy alone" and "feat_kd_alpha" in keys
    terms = {"kd": distils, "feat": features, "cccp": "use_cccp" in keys}
    assert shown - {"ce"} == {name for name, acts in terms.items() if acts}
    spread = max(readings["cw_square"] - readings["cw_mean"] ** 2, 0.0)
    assert ("cw_std" in logged) == objective.weights.certainty
    assert logged.get("cw_std", 0.0) == pytest.approx(math.sqrt(spread), abs=1e-3)
    out["loss"].backward()
    expected.backward()
    assert task.fusion is not None
    mine = [p for t in task.teachers for p in t.parameters() if p.requires_grad]
    assert len(mine) == len(trained)
    assert bool(mine) == task.method.use_teacher_finetuning
    for p, q in zip([*task.fusion.parameters(), *mine], [*fusion, *trained], strict=True):
        if p.grad is not None and q.grad is not None and q.grad.any():
            torch.testing.assert_close(p.grad.double(), q.grad, rtol=5e-3, atol=1e-5)
        else:
            assert all(g is None or not g.any() for g in (p.grad, q.grad))


def test_cccp_takes_the_place_of_the_kd_term_and_has_no_certainty_weights() -> None:
    _, objective, batch = prepared(use_cccp=True, cccp_alpha=0.7)
    assert (objective.weights.kd, objective.weights.cccp) == (0.0, 0.7)
    first = objective(batch, MOMENT)["cccp"].item()
    for bounds in ((0.2, 0.3), (5.0, 6.0)):
        _, objective, batch = prepared(use_cccp=True, cccp_alpha=0.7, min_cw=bounds[0], max_cw=bounds[1])
        assert objective(batch, MOMENT)["cccp"].item() == pytest.approx(first, rel=1e-6)
    _, objective, batch = prepared(use_cccp=True, synergy_only_epochs=1)
    assert (objective.weights.kd, objective.weights.cccp) == (0.0, 0.0), "cross-entropy alone"


def test_repeats_hold_the_student_fixed_and_update_the_fusion_each_time(tmp_path: Path) -> None:
    task, objective, batch = prepared(use_cccp=True, cccp_nt=3)
    student, *teachers = (Calls(n) for n in (task.student, *task.teachers))
    assert task.fusion is not None
    precision, weights = loop_for(task, tmp_path).precision, [copied(task.fusion.head)]
    fixed = None
    for repeat in range(3):
        out = objective(batch, MOMENT, repeat)
        fixed = fixed or objective._fixed
        assert objective._fixed is fixed
        update(task.phases["a"], out["loss"], precision)
        weights.append(copied(task.fusion.head))
    assert [c.seen for c in (student, *teachers)] == [[(False, False, 10)]] * 3
    assert all(not torch.equal(a["net.3.weight"], b["net.3.weight"]) for a, b in pairwise(weights))


@pytest.mark.parametrize(("keys", "a", "b"), [({"use_cccp": True, "cccp_ns": 2}, 1, 2), (TUNED, 3, 1)])
def test_a_run_makes_nt_and_ns_updates_of_each_batch(keys: dict[str, Any], a: int, b: int, tmp_path: Path) -> None:
    """Frozen teachers run once per batch, whatever the repeats; fine-tuned ones with every repeat of an A-step."""
    stage = {"num_stages": 1, "student_epochs_per_stage": (2,), "teacher_adapt_epochs": 1}
    task = distillation(config(method={**stage, **keys, "cccp_nt": 3}))
    loop_for(task, tmp_path).run()
    costs = task.costs.metrics()
    assert costs["cost/updates/a"] == len(task.batches) * 3
    assert costs["cost/updates/b"] == 2 * len(task.batches) * b
    assert costs["cost/forward_images/teacher_0"] == 36 * a + 2 * 36


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_the_loss_clamp_acts_in_a_steps_unless_switched_off_there(mode: str) -> None:
    keys = {"use_loss_clamp": True, "loss_clamp_max": 0.5, "loss_clamp_mode": mode}
    plain = prepared()
    value = plain[1](plain[2], MOMENT)["loss"].item()
    assert value > 0.5
    _, objective, batch = prepared(**keys)
    bound = 0.5 if mode == "hard" else 0.5 + math.log1p(value - 0.5)
    assert objective(batch, MOMENT)["loss"].item() == pytest.approx(bound, rel=1e-5)
    for off in ({"disable_loss_clamp_in_a": True}, {"loss_clamp_warmup_epochs": 1}):
        _, objective, batch = prepared(**keys, **off)
        assert objective(batch, MOMENT)["loss"].item() == pytest.approx(value, rel=1e-6)


def test_an_a_step_trains_teachers_only_where_they_are_fine_tuned(tmp_path: Path) -> None:
    for keys, part in ((TUNED, ""), ({**TUNED, "use_partial_freeze": True}, "net.fc.")):
        task, objective, batch = prepared(**keys)
        before, student = [copied(t) for t in task.teachers], copied(task.student)
        update(task.phases["a"], objective(batch, MOMENT)["loss"], loop_for(task, tmp_path).precision)
        for teacher, old in zip(task.teachers, before, strict=True):
            moved = {k for k, v in teacher.state_dict().items() if not torch.equal(v, old[k])}
            assert moved == {k for k in old if k.startswith(part)}, "and with level 0 their batch statistics stay"
        assert differences(dict(task.student.state_dict()), student) == []


def test_teachers_have_the_a_steps_rate_and_the_fusion_its_own() -> None:
    task = distillation(config(method={**TUNED, "ib_mbm_lr_factor": 0.25}))
    assert [g["lr"] for g in task.phases["a"].optimizer.param_groups] == pytest.approx([0.0025, 0.01, 0.01])


def test_the_student_is_run_where_query_target_or_features_need_it() -> None:
    keys = {"learnable_q": True, "teacher_adapt_alpha_kd": 0.0}
    wanted = ({"feat_kd_alpha": 0.1}, {"use_cccp": True}, {"teacher_adapt_alpha_kd": 0.5})
    for more, times in (({}, 0), *((keys, 1) for keys in wanted)):
        task, objective, batch = prepared(**{**keys, **more})
        calls = Calls(task.student)
        objective(batch, MOMENT)
        assert len(calls) == times


def test_the_bound_on_the_students_gradient_does_not_reach_the_fusion(tmp_path: Path) -> None:
    after = []
    for bound in (0.0, 1e-6):
        task = distillation(config(optim={"grad_clip_norm": bound}))
        loop = loop_for(task, tmp_path / str(bound))
        phase = task.phases["a"]
        task.begin_epoch(task.plan[0])
        batch = first_batch(task, "a")
        update(phase, phase.objective.train()(batch, MOMENT)["loss"], loop.precision)
        after.append(task.fusion.state_dict() if task.fusion else {})
    assert differences(after[0], after[1]) == []


@pytest.mark.parametrize(
    ("number", "keys", "expected"),  # of the weights: ce, kd, beta, certainty, penalties, tau
    [
        (0, {"ib_beta": 0.01}, (0.6, 0.4, 0.01, True, True, 4.0)),
        (0, {"teacher_adapt_alpha_kd": 0.9, "ib_beta": 0.02, "tau": 2.0}, (0.6, 0.9, 0.02, True, True, 2.0)),
        (0, {"synergy_only_epochs": 1, "ib_beta": 0.01}, (1.0, 0.0, 0.0, False, False, 4.0)),
        # cross-entropy alone is for the first A-epochs of the run, not of each stage
        (4, {"synergy_only_epochs": 3, "ib_beta": 0.01}, (1.0, 0.0, 0.0, False, False, 4.0)),
        (5, {"synergy_only_epochs": 3, "ib_beta": 0.01}, (0.6, 0.4, 0.01, True, True, 4.0)),
        # the second A-epoch of stage 2: a = 3, e = 5 of 8
        (
            5,
            {"synergy_only_epochs": 1, "ib_beta": 0.01, "ib_beta_warmup_epochs": 4, "tau_schedule": (8.0, 1.0)},
            (0.6, 0.4, 0.01 * 2 / 4, True, True, 8.0 - 7.0 * 5 / 7),
        ),
        (0, {"use_ib": False, "ib_beta": 0.5}, (0.6, 0.4, 0.0, False, True, 4.0)),
    ],
)
def test_the_weights_of_an_epoch_follow_from_its_counters(
    number: int, keys: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    task = distillation(config(method=keys))
    task.begin_epoch(task.plan[number])
    assert task.a_step is not None
    w = task.a_step.weights
    assert (w.ce, w.kd, w.beta, w.certainty, w.penalties, w.tau) == pytest.approx(expected)


def test_an_a_step_trains_adapters_and_fusion_and_changes_nothing_else(tmp_path: Path) -> None:
    task = distillation(config())
    assert task.fusion is not None
    networks = (task.student, *task.teachers)
    fixed, adapters = [copied(n) for n in networks], copied(task.fusion.adapters)
    run_until(task, tmp_path, (2, 0))
    assert differences([copied(n) for n in networks], fixed) == [], "weights and batch-norm statistics stay"
    moved = {k for k, v in task.fusion.adapters.state_dict().items() if not torch.equal(v, adapters[k])}
    assert moved == set(adapters)


def test_noise_and_dropout_follow_from_the_place_in_the_run_and_deterministic_fusion_has_none() -> None:
    _, objective, batch = prepared()
    torch.manual_seed(5)
    first = objective(batch, MOMENT)["loss"]
    assert torch.equal(objective(batch, MOMENT)["loss"], first)
    assert not torch.equal(objective(batch, Moment("a", 0, 2))["loss"], first)
    _, objective, batch = prepared(use_ib=False, synergy_head_dropout=0.0)
    assert torch.equal(objective(batch, MOMENT)["loss"], objective(batch, Moment("a", 7, 3))["loss"])


def test_a_steps_lower_their_loss(tmp_path: Path) -> None:
    """One fixed batch, fixed noise: forty updates must fit it."""
    task, objective, batch = prepared(ib_beta=1e-4)
    precision, values = loop_for(task, tmp_path).precision, []
    for _ in range(40):
        out = objective(batch, MOMENT)
        update(task.phases["a"], out["loss"], precision)
        values.append(out["ce"].item())
    assert values[-1] < 0.7 * values[0]
