"""The whole of L_B, value and gradient, against a float64 recomputation sample by sample; and what is run for it."""

from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.training.methods.asib.b_step import BLoss, BStep
from pipeline.training.methods.asib.fusion import Synergy
from pipeline.training.objective import Moment
from pipeline.training.optim import update
from tests.pipeline.training.builders import (
    Calls,
    Record,
    config,
    copied,
    differences,
    distillation,
    first_batch,
    loop_for,
    run_until,
)
from tests.pipeline.training.methods.asib.b_step_reference import MOMENT, Reference

MIXES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cutmix": {"cutmix_alpha_distill": 1.0},
    "mixup": {"mixup_alpha": 0.8},
}
TWO_VIEWS: dict[str, Any] = {"kd_two_view_start_epoch": 0, "kd_two_view_stop_epoch": 99}
GATE: dict[str, Any] = {"kd_sample_gate": True, "kd_sample_thr": 0.6, "kd_sample_min_ratio": 0.3}
FEATURES: dict[str, Any] = {"feat_kd_alpha": 0.3, "feat_kd_huber_beta": 0.7}


def prepared(mix: str, teachers: Any = 2, optim: Any = None, **method: Any) -> Any:
    """Task, objective and a batch that is mixed for good, in the epoch for which the schedules are set."""
    model = {"teachers": [{"name": "cifar_resnet8"}] * teachers}
    keys = {"feat_kd_key": "distill_feat", "tau_syn": 2.5, "synergy_logit_scale": 2.0, **MIXES[mix], **method}
    task = distillation(config(method=keys, model=model, optim=optim or {}))
    with torch.no_grad():
        # a fusion that has an opinion: the fresh one says the same of every image
        if task.fusion is not None:
            dict(task.fusion.named_parameters())["head.net.3.weight"].mul_(4)
    epoch = next(e for e in task.plan if e.phase == "b")
    task.monitor.gate_open = True
    task.begin_epoch(epoch)
    objective = task.phases["b"].objective.train()
    assert isinstance(objective, BStep)
    batches = list(task.batches.epoch(task.draws(epoch)))
    if mix == "plain":
        return task, objective, batches[0]
    whole = [b for b in batches if len(b.x) == 10]
    return task, objective, max(whole, key=lambda b: float(b.lam * (1 - b.lam) * (b.y != b.y_b).sum()))


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: mix, method, weights
    "avg, weights": ("cutmix", {"kd_target": "avg", "teacher_weights": (0.7, 0.3)}, {}),
    "avg beside features": ("plain", {"kd_target": "avg", **FEATURES}, {}),
    "confidence, mixed view": ("mixup", {"kd_target": "weighted_conf", "kd_view": "mixed"}, {}),
    "confidence, uncertainty": ("cutmix", {"kd_target": "weighted_conf", "kd_uncertainty_weight": 0.5}, {}),
    "synergy, mixed view": ("cutmix", {"kd_view": "mixed", "kd_uncertainty_weight": 0.8}, {}),
    "synergy, hybrid, shares": ("mixup", {"hybrid_beta": 0.7}, {"averaged_share": 0.3, "scale": 0.6}),
    "closed gate": ("cutmix", {"kd_target": "auto", **FEATURES}, {"synergy": False, "averaged_share": 1.0}),
    "auto": ("cutmix", {"kd_target": "auto", "kd_uncertainty_weight": 0.5}, {"averaged_share": 0.4}),
    "auto, one temperature": ("plain", {"kd_target": "auto", "tau_syn": None}, {"averaged_share": 0.4}),
    "auto_min, one temperature": ("plain", {"kd_target": "auto_min", "tau_syn": None}, {}),
    "auto_min": ("plain", {"kd_target": "auto_min", "kd_uncertainty_weight": 0.9}, {}),
    "auto_min, clean": ("cutmix", {"kd_target": "auto_min", "kd_uncertainty_weight": 0.9}, {}),
    "auto_min, mixed view": ("mixup", {"kd_target": "auto_min", "kd_view": "mixed"}, {}),
    "auto_min, two views": ("plain", {"kd_target": "auto_min", "kd_uncertainty_weight": 0.5, **TWO_VIEWS}, {}),
    "auto_min, two views, mixed": ("cutmix", {"kd_target": "auto_min", **TWO_VIEWS}, {}),
    "two views": ("plain", {**TWO_VIEWS, **FEATURES}, {"averaged_share": 0.2}),
    "two views, gate": ("mixup", {**TWO_VIEWS, **GATE, "kd_uncertainty_weight": 0.5}, {}),
    "two views, dkd": ("plain", {**TWO_VIEWS, "kd_loss": "dkd", "dkd_beta": 2.0}, {}),
    "sampled z": ("cutmix", {"use_mu_for_kd": False, **FEATURES}, {}),
    "sampled z, gate, two views": ("plain", {"use_mu_for_kd": False, **GATE, **TWO_VIEWS}, {}),
    "learned query": ("cutmix", {"learnable_q": True, **GATE}, {}),
    "deterministic": ("mixup", {"use_ib": False, **FEATURES, "use_mu_for_kd": False}, {}),
    "gate": ("plain", {**GATE}, {}),
    "gate, no reweighting": ("cutmix", {**GATE, "kd_sample_reweight": False, "hybrid_beta": 0.4}, {}),
    "gate, mixed view": ("cutmix", {**GATE, "kd_view": "mixed", "kd_target": "auto_min"}, {}),
    "gate, everything": (
        "cutmix",
        {
            **GATE,
            **FEATURES,
            "hybrid_beta": 0.4,
            "kd_uncertainty_weight": 0.5,
            "use_disagree_weight": True,
            "disagree_lambda_high": 3.0,
            "kd_target": "auto",
            "feat_kd_norm": "l2",
            "min_cw": 0.5,
            "max_cw": 1.01,
        },
        {"averaged_share": 0.5, "ratio": 0.4, "bound": 1.0, "scale": 0.8},
    ),
    "disagreement": ("mixup", {"use_disagree_weight": True, "disagree_lambda_low": 0.2}, {}),
    "both wrong": (
        "plain",
        {"use_disagree_weight": True, "disagree_mode": "both_wrong", "disagree_lambda_high": 0.1, "kd_target": "avg"},
        {},
    ),
    "features alone, uncertainty": ("cutmix", {"kd_alpha": 0.0, **FEATURES, "kd_uncertainty_weight": 0.7}, {}),
    "features, clip, feat_2d": ("plain", {**FEATURES, "feat_kd_clip": 4.0, "feat_kd_key": "feat_2d"}, {}),
    "features, queried": ("cutmix", {**FEATURES, "ib_mbm_query_key": "distill_feat"}, {}),
    "dkd": ("plain", {"kd_loss": "dkd", "dkd_alpha": 0.5, "dkd_beta": 3.0}, {"dkd": 0.25}),
    "dkd, clean": ("cutmix", {"kd_loss": "dkd", "kd_target": "auto_min"}, {}),
    "dkd, mixed view, gate": ("cutmix", {"kd_loss": "dkd", "kd_view": "mixed", **GATE}, {}),
    "ratio": ("mixup", {"kd_alpha": 3.0}, {"ratio": 0.5}),
    "ratio that holds": ("plain", {}, {"ratio": 50.0}),
    "soft clamp": ("cutmix", {}, {"bound": 0.3}),
    "hard clamp": ("cutmix", {"loss_clamp_mode": "hard"}, {"bound": 0.3}),
    "hard clamp that holds": ("cutmix", {"loss_clamp_mode": "hard"}, {"bound": 30.0}),
    "hybrid alone": ("cutmix", {"kd_alpha": 0.0, "hybrid_beta": 1.0, **GATE}, {}),
    "three teachers": ("cutmix", {"kd_target": "auto_min", "teachers": 3, "use_disagree_weight": True,
                                  "disagree_lambda_low": 0.5}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradient_are_those_of_the_method(case: str) -> None:
    mix, method, weights = CASES[case]
    if method.get("feat_kd_key") == "feat_2d":
        method = {**method, "ib_mbm_out_dim": 6}
    task, objective, batch = prepared(mix, **method)
    w = BLoss(**{"scale": 1.0, "tau": 3.0, "synergy": True, "averaged_share": 0.0, **weights})
    objective.begin_epoch(w)
    if task.method.kd_view == "mixed":
        batch = batch._replace(lam=torch.minimum(batch.lam, 1 - batch.lam))
    expected = Reference(task, batch, w)
    found = objective(batch, MOMENT)
    assert task.method.kd_view != "mixed" or batch.lam < 0.5, "the partner's label is the larger one"
    m = task.method
    used = {"ce": m.ce_alpha, "kd": m.kd_alpha, "feat": m.feat_kd_alpha * w.synergy, "hybrid": m.hybrid_beta}
    for name in (name for name, weight in used.items() if weight > 0):
        value = expected.terms[name].item()
        assert found[name].item() == pytest.approx(value, rel=2e-4, abs=1e-6), name
        assert value > 1e-3, name
    assert found["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-4)
    found["loss"].backward()
    expected.loss.backward()
    for (name, p), q in zip(task.student.named_parameters(), expected.student.parameters(), strict=True):
        if p.grad is None or q.grad is None:
            assert all(g is None or not g.any() for g in (p.grad, q.grad)), name
        else:
            named = partial("{}: {}".format, name)
            torch.testing.assert_close(p.grad.double(), q.grad, rtol=2e-3, atol=2e-5, msg=named)
    readings(case, found, expected)


def readings(case: str, found: dict[str, Tensor], expected: Reference) -> None:
    """That the cases reach what they are for, and what is logged of it."""
    m, n = expected.m, expected.size
    if m.kd_alpha > 0:
        assert found["sample_gate"].item() == pytest.approx(len(expected.chosen) / n)
        assert (len(expected.chosen) < n) == m.kd_sample_gate
        p = [expected.lessons[i]["p"] for i in expected.chosen]
        entropy = sum(-float((v * v.clamp_min(1e-300).log()).sum()) for v in p) / n
        assert found["target_entropy"].item() == pytest.approx(entropy, rel=1e-3)
    if m.kd_target == "auto_min" and expected.w.synergy:
        closed = sum(expected.lessons[i]["guard"] == 0 for i in expected.chosen)
        assert found["label_guard"].item() == pytest.approx(closed / n)
    if expected.w.ratio is not None:
        held = case == "ratio that holds"
        assert found["kd_clamped"].item() == (0.0 if held else 1.0)


def test_the_guard_closes_in_some_of_these_cases() -> None:
    """Otherwise they would show nothing of it: one view of a mixed sample, both, and one of two views."""
    seen = Counter[float]()
    for mix, method in (("plain", {}), ("cutmix", {}), ("plain", TWO_VIEWS)):
        task, _, batch = prepared(mix, kd_target="auto_min", **method)
        w = BLoss(1.0, 3.0, synergy=True, averaged_share=0.0)
        seen.update(round(lesson["guard"], 3) for lesson in Reference(task, batch, w).lessons)
    assert seen[0.0] > 0
    assert seen[1.0] > 0
    assert sum(n for guard, n in seen.items() if 0 < guard < 1) > 0


def test_certainty_is_that_of_the_target_which_is_taught() -> None:
    """`auto_min` picks at the temperatures that are taught; at temperature 1 it would have picked the other here."""
    _, objective, _ = prepared("plain", kd_target="auto_min", kd_uncertainty_weight=0.5, tau_syn=1.0)
    average, synergy = torch.tensor([[1.0, 0.0, 0.0, -9.0]]), torch.tensor([[4.0, 3.9, 0.0, -9.0]])
    said = SimpleNamespace(logits=average, feat_2d=None)
    objective._teachers = (lambda x: said,)
    objective._fusion = (lambda *args, **more: Synergy(synergy, torch.zeros(1, 8), torch.zeros(1, 8)),)
    objective.begin_epoch(BLoss(1.0, 10.0, synergy=True, averaged_share=0.0))
    lesson = objective.view(torch.zeros(1, 3, 8, 8), torch.tensor([0]), None, None)
    assert synergy.softmax(1)[0, 0] < average.softmax(1)[0, 0]
    assert synergy.softmax(1)[0, 0] > (average / 10).softmax(1)[0, 0]
    torch.testing.assert_close(lesson["p"], synergy.softmax(1))
    torch.testing.assert_close(lesson["sure"], synergy.softmax(1))


# what is run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
def test_with_the_sample_gate_teachers_see_only_what_is_distilled(mix: str, ratio: float) -> None:
    keys = {"kd_sample_gate": True, "kd_sample_thr": 1.0, "kd_sample_max_ratio": ratio, "kd_sample_min_ratio": 0.1}
    task, objective, batch = prepared(mix, **keys)
    teachers, student = [Calls(t) for t in task.teachers], Calls(task.student)
    fused: list[int] = []
    assert task.fusion is not None
    task.fusion.register_forward_hook(lambda m, args, out: fused.append(len(out.logits)))
    with task.costs.counting():
        found = objective(batch, MOMENT)
    chosen = int(ratio * 10)
    logits = found["output"].detach().softmax(1).amax(1)
    rows = set(torch.argsort(logits, stable=True)[:chosen].tolist())
    needed = len(rows | {int(batch.partner[i]) for i in rows}) if mix != "plain" else chosen
    assert [c.seen for c in teachers] == [[(False, False, needed)]] * 2
    assert fused == [needed]
    assert student.seen == [(True, True, 10)] + ([(False, False, needed)] if mix != "plain" else [])
    assert task.costs.images == {
        "student": 10 + (needed if mix != "plain" else 0),
        "teacher_0": needed,
        "teacher_1": needed,
        "fusion": needed,
    }
    assert needed <= min(10, 2 * chosen)


def test_over_a_run_images_and_readings_follow_the_gate(tmp_path: Path) -> None:
    """B-steps only, ratios of 1 and 0.4 of batches of 10, 10, 10 and 6: readings are of the distilled samples."""
    found, costs = {}, {}
    for ratio in (1.0, 0.4):
        keys = {"kd_target": "avg", "kd_sample_gate": True, "kd_sample_thr": 1.0, "kd_sample_max_ratio": ratio}
        task, record = distillation(config(method=keys)), Record()
        loop_for(task, tmp_path / str(ratio), record).run()
        found[ratio] = (record.series("b_step/target_entropy")[0], record.series("b_step/sample_gate")[0])
        costs[ratio] = task.costs.metrics()
    assert found[1.0][1] == 1.0
    assert found[0.4][1] == pytest.approx((4 + 4 + 4 + 2) / 36)
    assert found[0.4][0] == pytest.approx(found[1.0][0], rel=0.2), "not 0.4 of it"
    assert costs[1.0]["cost/forward_images/teacher_0"] == 4 * 36
    assert costs[0.4]["cost/forward_images/teacher_0"] == 4 * (4 + 4 + 4 + 2)
    assert costs[0.4]["cost/forward_images/student"] == 4 * 36


@pytest.mark.parametrize(
    "keys", [{}, {"kd_target": "auto_min", **FEATURES, "hybrid_beta": 0.1, "kd_uncertainty_weight": 0.5}]
)
def test_a_process_whose_slice_is_empty_has_the_same_parts_of_a_lesson(keys: dict[str, Any]) -> None:
    """Otherwise it would miss a collective call of the others, and all would wait for ever."""
    task, objective, batch = prepared("plain", **keys)
    whole, _ = objective.teach(batch, torch.zeros(10, 4), task.student(batch.x).feat_2d.detach(), MOMENT)
    empty = batch._replace(x=batch.x[:0], x_mixed=batch.x[:0], y=batch.y[:0], y_b=batch.y[:0], rows=slice(10, 10))
    none, _ = objective.teach(empty, torch.zeros(0, 4), torch.zeros(0, 6), MOMENT)
    assert {k: v.shape[1:] for k, v in none.items()} == {k: v.shape[1:] for k, v in whole.items()}
    assert all(len(v) == 0 for v in none.values())


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("keys", [{}, {"kd_target": "auto_min", **FEATURES}])
def test_with_the_sample_gate_off_nothing_changes_to_the_bit(mix: str, keys: dict[str, Any]) -> None:
    found = []
    for more in (
        {},
        {"kd_sample_thr": 0.1, "kd_sample_reweight": False, "kd_sample_max_ratio": 0.2},
        # open for all: the same samples by the other path
        {"kd_sample_gate": True, "kd_sample_thr": 1.0, "kd_sample_min_ratio": 1.0, "kd_sample_max_ratio": 1.0},
    ):
        task, objective, batch = prepared(mix, **keys, **more)
        out = objective(batch, MOMENT)
        out["loss"].backward()
        found.append([out["loss"], *(p.grad for p in task.student.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("more", [{}, FEATURES, {"hybrid_beta": 1.0, "kd_loss": "dkd", "kd_uncertainty_weight": 1.0}])
def test_a_batch_in_which_nobody_is_chosen_is_cross_entropy_alone(mix: str, more: dict[str, Any]) -> None:
    keys = {"kd_sample_gate": True, "kd_sample_thr": 1e-6, "kd_sample_min_ratio": 0.0, **more}
    task, objective, batch = prepared(mix, **keys)
    teachers = [Calls(t) for t in task.teachers]
    found = objective(batch, MOMENT)
    assert [len(t) for t in teachers] == [0, 0]
    assert found["loss"].item() == pytest.approx(0.7 * found["ce"].item(), rel=1e-6)
    found["loss"].backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in task.student.parameters())


@pytest.mark.parametrize("mix", MIXES)
def test_a_subset_of_one(mix: str) -> None:
    keys = {"kd_sample_gate": True, "kd_sample_thr": 1e-6, "kd_sample_min_ratio": 0.1, "kd_target": "auto_min"}
    task, objective, batch = prepared(mix, **keys)
    w = BLoss(1.0, 3.0, synergy=True, averaged_share=0.0)
    objective.begin_epoch(w)
    expected = Reference(task, batch, w)
    assert len(expected.chosen) == 1
    assert objective(batch, MOMENT)["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-4)


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_the_mixed_view_costs_no_further_student_pass(mix: str) -> None:
    task, objective, batch = prepared(mix, kd_view="mixed")
    student, *teachers = (Calls(n) for n in (task.student, *task.teachers))
    objective(batch, MOMENT)
    assert student.seen == [(True, True, 10)]
    assert [t.seen for t in teachers] == [[(False, False, 10)]] * 2


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("learnable", [False, True])
def test_two_views_cost_teachers_a_second_pass_and_the_student_no_training_pass(mix: str, learnable: bool) -> None:
    task, objective, batch = prepared(mix, **TWO_VIEWS, learnable_q=learnable, optim={"ema_decay": 0.9})
    student, *teachers = (Calls(n) for n in (task.student, *task.teachers))
    norm = task.student.net.norm
    updates = int(norm.num_batches_tracked)
    with torch.no_grad():
        mean = 0.9 * norm.running_mean + 0.1 * task.student.net.conv(batch.x_mixed).mean((0, 2, 3))
    ema = task.phases["b"].objective.get_trainable_module(ema=True)
    before = copied(ema.module)
    assert batch.x_second is not None
    objective(batch, MOMENT)
    queries = 0 if learnable else 1 if mix == "plain" else 2
    assert student.seen == [(True, True, 10)] + [(False, False, 10)] * queries
    assert [t.seen for t in teachers] == [[(False, False, 10)] * 2] * 2
    assert int(norm.num_batches_tracked) == updates + 1
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    assert differences(copied(ema.module), before) == []


def test_two_views_are_independent_and_begin_and_stop_with_their_epochs() -> None:
    keys = {"kd_two_view_start_epoch": 1, "kd_two_view_stop_epoch": 3}
    task = distillation(config(method=keys))
    found = []
    for epoch in (e for e in task.plan if e.phase == "b"):
        task.begin_epoch(epoch)
        batch = next(iter(task.batches.epoch(task.draws(epoch))))
        found.append(batch.x_second is not None)
        if batch.x_second is not None:
            assert not torch.equal(batch.x_second, batch.x)
    assert found == [False, True, True, False]


def test_sampled_z_runs_the_fusion_once_and_does_not_repeat_its_noise() -> None:
    task, objective, batch = prepared("cutmix", use_mu_for_kd=False, **FEATURES)
    assert task.fusion is not None
    calls = Counter[str]()
    task.fusion.register_forward_hook(lambda *_: calls.update(["fusion"]))
    state, values = copied(task.student), []
    for number in (0, 0, 1):
        task.student.load_state_dict(state)  # batch statistics move with every pass
        values.append(objective(batch, Moment("b", 0, number))["kd"].item())
    assert calls["fusion"] == 3
    assert values[0] == values[1] != values[2]


def test_repeats_of_a_batch_reuse_its_target_and_update_the_student_each_time(tmp_path: Path) -> None:
    task, objective, batch = prepared("cutmix", cccp_ns=3)
    student, *teachers = (Calls(n) for n in (task.student, *task.teachers))
    precision, weights = loop_for(task, tmp_path).precision, []
    for repeat in range(3):
        out = objective(batch, MOMENT, repeat)
        lesson = objective._held
        update(task.phases["b"], out["loss"], precision)
        weights.append(task.student.net.fc.weight.detach().clone())
        assert lesson is objective._held
    assert [len(t) for t in teachers] == [1, 1]
    assert [c for c in student.seen if c[1]] == [(True, True, 10)] * 3
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["gate, everything", "dkd, clean", "auto_min, two views, mixed", "sampled z"])
def test_in_half_precision_losses_are_float32_and_finite(case: str, dtype: torch.dtype) -> None:
    mix, method, _ = CASES[case]
    task, objective, batch = prepared(mix, **method)
    exact = objective(batch, MOMENT)
    with torch.autocast("cpu", dtype=dtype):
        found = objective(batch, MOMENT)
    found["loss"].backward()
    assert found["loss"].dtype == torch.float32
    assert all(torch.isfinite(v).all() for k, v in found.items() if k != "output")
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in task.student.parameters())
    assert found["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.1)


def test_logits_of_ten_thousand_leave_the_loss_finite() -> None:
    for keys in ({}, {"kd_loss": "dkd"}, {"kd_target": "auto_min", "kd_uncertainty_weight": 1.0}):
        task, objective, batch = prepared("cutmix", **keys)
        with torch.no_grad():
            for net in (task.student, *task.teachers):
                net.net.fc.weight.mul_(1e4)
        found = objective(batch, MOMENT)
        found["loss"].backward()
        assert torch.isfinite(found["loss"])
        assert found["loss"] > 0
        assert all(torch.isfinite(p.grad).all() for p in task.student.parameters())


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("learnable", [False, True])
def test_every_network_runs_once_per_batch_and_view(mix: str, learnable: bool) -> None:
    task, objective, batch = prepared(mix, learnable_q=learnable)
    student, *teachers = (Calls(n) for n in (task.student, *task.teachers))
    objective(batch, MOMENT)
    clean_query = [(False, False, 10)] if mix != "plain" and not learnable else []
    assert student.seen == [(True, True, 10), *clean_query]
    assert [c.seen for c in teachers] == [[(False, False, 10)]] * 2
    assert all(m.training for m in task.student.modules()), "the student is in training mode again"


@pytest.mark.parametrize("mix", MIXES)
def test_with_the_gate_closed_neither_fusion_nor_a_second_student_pass_runs(mix: str) -> None:
    task, objective, batch = prepared(mix)
    calls = Counter[str]()
    task.student.register_forward_hook(lambda *_: calls.update(["student"]))
    assert task.fusion is not None
    task.fusion.register_forward_hook(lambda *_: calls.update(["fusion"]))
    objective.begin_epoch(BLoss(1.0, 3.0, synergy=False, averaged_share=0.3))
    objective(batch, MOMENT)
    assert calls == {"student": 1}


def test_a_b_step_changes_the_student_alone(tmp_path: Path) -> None:
    task = distillation(config(method={"cutmix_alpha_distill": 1.0}))
    loop = run_until(task, tmp_path, (2, 0))
    assert task.fusion is not None
    others = (task.fusion, *task.teachers)
    fixed, student = [copied(m) for m in others], copied(task.student)
    run_until(task, tmp_path, (4, 0), state=loop.state_dict())
    assert differences([copied(m) for m in others], fixed) == []
    assert all(not torch.equal(v, student[k]) for k, v in task.student.state_dict().items())


def test_the_distillation_weight_warms_up_over_b_epochs_through_stages() -> None:
    task = distillation(config(method={"kd_warmup_epochs": 3, "kd_ens_alpha": 0.25, "teacher_adapt_kd_warmup": 2}))
    objective = task.phases["b"].objective
    assert isinstance(objective, BStep)
    found = []
    for epoch in task.plan:
        if epoch.phase == "b":
            task.begin_epoch(epoch)
            found.append((objective.weights.scale, objective.weights.averaged_share))
    assert found == [(pytest.approx(1 / 3), 0.25), (pytest.approx(2 / 3), 0.25), (1.0, 0.0), (1.0, 0.0)]


def test_first_batches_of_two_runs_that_differ_in_the_method_show_the_same_images() -> None:
    one = first_batch(distillation(config(method={"cutmix_alpha_distill": 1.0})))
    other = first_batch(
        distillation(config(method={"kd_target": "avg", "ce_alpha": 0.2, "tau": 1.0, "cutmix_alpha_distill": 1.0}))
    )
    assert torch.equal(one.x_mixed, other.x_mixed)
