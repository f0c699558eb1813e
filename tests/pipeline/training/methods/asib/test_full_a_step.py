"""The rest of L_A: features, CCCP, fine-tuned teachers, clamps, readings; against float64, gradients included."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.training.methods.asib.a_step import AStep
from pipeline.training.methods.asib.task import Distillation
from pipeline.training.objective import Moment
from pipeline.training.optim import update
from tests.pipeline.training.builders import Calls, config, differences, distillation, double, first_batch, loop_for

MOMENT = Moment("a", 0, 1)
TUNED = {"use_teacher_finetuning": True, "teacher_ce_alpha": 0.5}


def prepared(model: dict[str, Any] | None = None, number: int = 0, **method: Any) -> tuple[Distillation, AStep, Any]:
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
        seen = [type(t)(*(None if v is None else v.detach() for v in t)) for t in seen]
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

    def cross_entropy(row: Tensor, label: int) -> Tensor:
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

    def penalty(parameters: list[Tensor]) -> Tensor:
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
    spread = max(readings["cw_square"] - readings["cw_mean"] ** 2, 0.0)
    assert logged["cw_std"] == pytest.approx(math.sqrt(spread), abs=1e-3)
    out["loss"].backward()
    expected.backward()
    assert task.fusion is not None
    mine = [p for t in task.teachers for p in t.parameters() if p.requires_grad]
    assert len(mine) == len(trained)
    assert bool(mine) == task.method.use_teacher_finetuning
    for p, q in zip([*task.fusion.parameters(), *mine], [*fusion, *trained], strict=True):
        if q.grad is not None and q.grad.any():
            torch.testing.assert_close(p.grad.double(), q.grad, rtol=5e-3, atol=1e-5)
        else:
            assert p.grad is None or not p.grad.any()


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
    precision, weights = loop_for(task, tmp_path).precision, [task.fusion.head.net[3].weight.detach().clone()]
    fixed = None
    for repeat in range(3):
        out = objective(batch, MOMENT, repeat)
        fixed = fixed or objective._fixed
        assert objective._fixed is fixed
        update(task.phases["a"], out["loss"], precision)
        weights.append(task.fusion.head.net[3].weight.detach().clone())
    assert [c.seen for c in (student, *teachers)] == [[(False, False, 10)]] * 3
    assert all(not torch.equal(a, b) for a, b in pairwise(weights))


def test_a_run_makes_nt_and_ns_updates_of_each_batch(tmp_path: Path) -> None:
    task = distillation(config(method={"use_cccp": True, "cccp_nt": 3, "cccp_ns": 2}))
    loop_for(task, tmp_path).run()
    costs = task.costs.metrics()
    batches = len(task.batches)
    assert costs["cost/updates/a"] == 4 * batches * 3
    assert costs["cost/updates/b"] == 4 * batches * 2
    assert costs["cost/forward_images/teacher_0"] == 8 * 36, "once per batch, whatever the repeats"


def test_fine_tuned_teachers_run_with_every_repeat(tmp_path: Path) -> None:
    task = distillation(config(method={**TUNED, "cccp_nt": 2}))
    loop_for(task, tmp_path).run()
    assert task.costs.metrics()["cost/forward_images/teacher_0"] == 4 * 36 * 2 + 4 * 36


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
        before = [{k: v.clone() for k, v in t.state_dict().items()} for t in task.teachers]
        student = {k: v.clone() for k, v in task.student.state_dict().items()}
        update(task.phases["a"], objective(batch, MOMENT)["loss"], loop_for(task, tmp_path).precision)
        for teacher, old in zip(task.teachers, before, strict=True):
            moved = {k for k, v in teacher.state_dict().items() if not torch.equal(v, old[k])}
            assert moved == {k for k in old if k.startswith(part)}, "and with level 0 their batch statistics stay"
        assert differences(dict(task.student.state_dict()), student) == []


def test_teachers_have_the_a_steps_rate_and_the_fusion_its_own() -> None:
    task = distillation(config(method={**TUNED, "ib_mbm_lr_factor": 0.25}))
    assert [g["lr"] for g in task.phases["a"].optimizer.param_groups] == pytest.approx([0.0025, 0.01, 0.01])


def test_the_student_is_run_for_its_features_alone() -> None:
    keys = {"learnable_q": True, "teacher_adapt_alpha_kd": 0.0}
    for more, times in (({}, 0), ({"feat_kd_alpha": 0.1}, 1), ({"use_cccp": True}, 1)):
        task, objective, batch = prepared(**keys, **more)
        calls = Calls(task.student)
        objective(batch, MOMENT)
        assert len(calls) == times


def test_without_certainty_weights_none_is_at_its_bounds() -> None:
    for keys in ({"use_ib": False}, {"synergy_only_epochs": 1}):
        _, objective, batch = prepared(**keys, max_cw=1.0)
        out = objective(batch, MOMENT)
        assert (out["cw_at_bounds"].item(), out["cw_mean"].item()) == (0.0, pytest.approx(1.0))


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
