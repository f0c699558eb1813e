"""Stages: the plan, snapshots, the gate, selection, results, EMA, what is refused."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.methods.asib.settings import AsibConfig as MethodConfig
from pipeline.errors import UserError
from pipeline.sweep.space.check import METRICS, TEST_SPLIT, terms
from pipeline.training.evaluation import outputs
from pipeline.training.methods.asib.b_step import BStep
from pipeline.training.methods.asib.schedules import make_plan
from pipeline.training.methods.asib.task import AsibDistillation as Distillation
from pipeline.training.objective import Moment
from pipeline.training.optim import Precision
from pipeline.training.run_data import Selection, Task
from tests.pipeline.training.builders import (
    CPU,
    EVERYTHING,
    LEVELS,
    ONE_STAGE,
    TUNED,
    Calls,
    Record,
    config,
    copied,
    differences,
    distillation,
    fine_tuning,
    first_batch,
    image_data,
    loop_for,
    net,
    run_until,
)


def method(**keys: Any) -> MethodConfig:
    return MethodConfig.model_validate(keys)


def test_the_plan_counts_a_and_b_epochs_over_the_run() -> None:
    plan = make_plan(method(num_stages=2, student_epochs_per_stage=(3, 1), teacher_adapt_epochs=2), a_steps=True)
    assert [(e.phase, e.stage, e.in_stage, e.in_phase, e.overall, e.first, e.last) for e in plan] == [
        ("a", 0, 0, 0, 0, True, False),
        ("a", 0, 1, 1, 1, False, True),
        ("b", 0, 0, 0, 2, True, False),
        ("b", 0, 1, 1, 3, False, False),
        ("b", 0, 2, 2, 4, False, True),
        ("a", 1, 0, 2, 5, True, False),
        ("a", 1, 1, 3, 6, False, True),
        ("b", 1, 0, 3, 7, True, True),
    ]


@pytest.mark.parametrize("keys", [{"kd_target": "avg"}, {"kd_alpha": 0.0}, {"kd_alpha": 0.0, "kd_target": "avg"}])
def test_without_synergy_targets_there_is_no_fusion_and_no_a_step(keys: dict[str, Any]) -> None:
    task = distillation(config(method=keys))
    assert task.fusion is None
    assert {e.phase for e in task.plan} == {"b"}
    assert set(task.phases) == {"b"}


def test_a_student_alone_has_no_teachers() -> None:
    task = distillation(config(method={"kd_alpha": 0.0, "kd_target": "avg"}, model={"teachers": []}))
    assert task.teachers == []
    assert len(task.plan) == 4


def test_a_single_teacher_is_an_average_of_one(tmp_path: Path) -> None:
    task = distillation(config(method={"kd_target": "avg"}, model={"teachers": [{"name": "cifar_resnet8"}]}))
    record = Record()
    loop_for(task, tmp_path, record).run()
    assert len(record.series("b_step/kd")) == 4
    assert record.series("teacher/disagreement") == [0.0]


def test_learning_rates_run_through_all_stages_without_restart(tmp_path: Path) -> None:
    task = distillation(config(schedule={"lr_warmup_epochs": 1, "min_lr": 1e-4}))
    seen: dict[str, list[float]] = {"a": [], "b": []}
    for name, phase in task.phases.items():
        phase.optimizer.register_step_pre_hook(
            partial(lambda name, o, *_: seen[name].append(o.param_groups[0]["lr"]), name)
        )
    loop_for(task, tmp_path).run()
    cosine = torch.cos(torch.arange(16, dtype=torch.float64) / 16 * torch.pi)
    assert seen["a"] == pytest.approx((1e-4 + 0.5 * (1e-2 - 1e-4) * (1 + cosine)).tolist())
    falling = torch.cos(torch.arange(12, dtype=torch.float64) / 12 * torch.pi)
    rising = [1e-2 / 4 + (1e-2 - 1e-2 / 4) * n / 4 for n in range(4)]
    assert seen["b"] == pytest.approx(rising + (1e-4 + 0.5 * (1e-2 - 1e-4) * (1 + falling)).tolist())


# synergy accuracy and snapshots --------------------------------------------------------------------------------------


class Scripted:
    """Synergy accuracies in the order in which they are asked for, and the fusion's weights at those times."""

    def __init__(self, task: Distillation, *values: float) -> None:
        self.values, self.task = list(values), task
        self.weights: list[dict[str, torch.Tensor]] = []
        task.monitor.synergy_accuracy = self  # type: ignore[method-assign]

    def __call__(self, student: Any) -> float:
        assert self.task.fusion is not None
        self.weights.append(copied(self.task.fusion))
        return self.values[len(self.weights) - 1]


def fused(task: Distillation) -> dict[str, torch.Tensor]:
    assert task.fusion is not None
    return copied(task.fusion)


LONG = {"num_stages": 2, "student_epochs_per_stage": (1, 1), "teacher_adapt_epochs": 4}


def test_the_best_snapshot_of_this_a_step_is_in_use_at_its_end(tmp_path: Path) -> None:
    """Of this one: a better fusion of an earlier stage is not brought back. Ties go to the earlier epoch."""
    task = distillation(config(method=LONG))
    script = Scripted(task, 50, 70, 70, 60, 99, 30, 20, 40, 35, 99)  # the fifth and the last are monitored in B-steps
    loop = run_until(task, tmp_path, (4, 0))
    assert differences(fused(task), script.weights[1]) == []
    assert differences(fused(task), script.weights[2]) != []
    assert task.monitor.accuracy == 70
    loop = run_until(task, tmp_path, (9, 0), state=loop.state_dict())
    assert differences(fused(task), script.weights[7]) == []
    assert task.monitor.accuracy == 40


def test_epochs_without_evaluation_leave_the_moving_average_alone(tmp_path: Path) -> None:
    keys = {"num_stages": 1, "student_epochs_per_stage": (2,), "teacher_adapt_epochs": 5, "teacher_eval_every": 2}
    task = distillation(config(method={**keys, "synergy_ema_alpha": 0.5}))
    Scripted(task, 40, 60, 20, 77)
    record = Record()
    loop_for(task, tmp_path, record).run()
    logged = [(s, v["synergy/acc"], v.get("synergy/acc_ema")) for s, v in record.rows if "synergy/acc" in v]
    # A-epochs 2, 4 and the last; then, monitored, B-epoch 2
    assert logged == [(1, 40, 40), (3, 60, 50), (4, 20, 35), (6, 77, None)]
    assert (task.monitor.smoothed, task.monitor.accuracy) == (35, 60)


@pytest.mark.parametrize(
    ("source", "setting", "expected"),
    [
        ("snapshot", 0.6, True),  # the best of 40, 60, 20 is in use
        ("snapshot", 0.61, False),
        ("ema", 0.35, True),
        ("ema", 0.36, False),
    ],
)
def test_the_gate_reads_the_snapshot_or_the_moving_average(
    tmp_path: Path, source: str, setting: float, expected: bool
) -> None:
    keys = {"num_stages": 1, "student_epochs_per_stage": (1,), "teacher_adapt_epochs": 3, "synergy_ema_alpha": 0.5}
    task = distillation(config(method={**keys, "gate_source": source, "enable_kd_after_syn_acc": setting}))
    Scripted(task, 40, 60, 20, 0)
    record = Record()
    loop_for(task, tmp_path, record).run()
    assert record.series("gate/open") == [float(expected)]
    objective = task.phases["b"].objective
    assert isinstance(objective, BStep)
    assert objective.weights.synergy is expected


def test_a_relative_gate_goes_by_the_averaged_teachers_on_validation_images(tmp_path: Path) -> None:
    task = distillation(config(method={"enable_kd_after_syn_acc": "avg-0.02"}))
    hits = 0
    with torch.no_grad():
        for x, y in task.data.eval:
            hits += int((sum(t(x).logits for t in task.teachers).argmax(1) == y).sum())
    average = 100.0 * hits / len(task.data.eval.labels)
    for accuracy in (average - 2.5, average - 1.5):
        task.monitor.accuracy = accuracy
        task.begin_phase(next(e for e in task.plan if e.phase == "b"))
        assert task.monitor.gate_open is (accuracy > average - 2)


def test_an_unknown_accuracy_is_evaluated_once_before_a_b_step() -> None:
    task = distillation(config(method={"enable_kd_after_syn_acc": 0.3}))
    script = Scripted(task, 31)
    task.begin_phase(next(e for e in task.plan if e.phase == "b"))
    assert task.monitor.gate_open
    task.begin_phase(next(e for e in task.plan if e.phase == "b"))
    assert len(script.weights) == 1


def test_synergy_evaluation_can_be_narrowed_to_some_teachers() -> None:
    task = distillation(config(method={"synergy_eval_teacher_indices": (1,)}))
    assert task.fusion is not None
    hits = total = 0
    task.fusion.eval()
    with torch.no_grad():
        for x, y in task.data.eval:
            query, feature = task.student.eval()(x).feat_2d, task.teachers[1](x).feat_2d
            mu = task.fusion.ib_mbm(query, task.fusion.adapters[1](feature).unsqueeze(1), sample="never")[1]
            hits += int((task.fusion.head(mu).argmax(1) == y).sum())
            total += len(y)
    task.fusion.train()
    assert task.monitor.synergy_accuracy(outputs(task.student, task.data.eval)) == pytest.approx(100 * hits / total)
    assert task.fusion.training, "modes are restored"


def test_teachers_of_one_width_only_go_without_adapters() -> None:
    with pytest.raises(UserError, match=r"\[5, 7\].*use_distillation_adapter|use_distillation_adapter.*\[5, 7\]"):
        distillation(config(method={"use_distillation_adapter": False}))


def test_a_query_of_another_width_is_an_error_and_never_healed() -> None:
    with pytest.raises(UserError, match=r"ib_mbm_query_dim=9.*6"):
        distillation(config(method={"ib_mbm_query_dim": 9}))
    distillation(config(method={"ib_mbm_query_dim": 6}))
    distillation(config(method={"ib_mbm_query_dim": 0}))


# selection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by_validation", "best"), [(True, 1), (False, 3)])
def test_the_best_epoch_on_validation_is_kept_else_the_last_and_ties_go_to_the_earliest(
    by_validation: bool, best: int
) -> None:
    student: Any = net(6, 0)
    selection = Selection(student, by_validation)
    for epoch, accuracy in enumerate((50.0, 70.0, 60.0, 70.0)):
        student.net.fc.bias.data.fill_(epoch)
        selection.offer(accuracy, epoch)
    assert (selection.epoch, selection.accuracy) == (best, 70.0)
    assert selection.chosen()["net.fc.bias"].tolist() == [float(best)] * 4


@pytest.mark.parametrize("fraction", [0.25, 0.0])
@pytest.mark.parametrize("kind", ["distil", "finetune"])
def test_test_images_decide_nothing(tmp_path: Path, fraction: float, kind: str) -> None:
    """With the test labels turned around, every weight and every choice is the same."""
    data = image_data()
    turned = dataclasses.replace(data, test_y=(data.test_y + 1) % 4)
    c = config(dataset={"val_fraction": fraction})
    found = []
    for k, d in enumerate((data, turned)):
        task = distillation(c, d) if kind == "distil" else fine_tuning(c, d)
        record = Record()
        loop_for(task, tmp_path / str(k), record).run()
        rows = [values for _, values in record.rows]
        if not fraction:  # then every epoch is evaluated on test images
            ends, starts = ("acc", "acc_ema", "/loss"), ("teacher/", "student/")
            rows = [{n: v for n, v in r.items() if not (n.endswith(ends) or n.startswith(starts))} for r in rows]
        results = task.results()
        found.append((rows, copied(task.net), task.selection.epoch, results))
    assert differences(found[0][:3], found[1][:3]) == []
    assert found[0][3]["final/acc_last"] != found[1][3]["final/acc_last"]
    if not fraction:
        assert found[0][2] == (3 if kind == "distil" else 2), "the last epoch"
        assert found[0][3]["final/acc_val_selected"] == found[0][3]["final/acc_last"]
        assert "final/val_acc" not in found[0][3]


def test_validation_images_are_in_no_training_batch() -> None:
    task = distillation(config())
    held_out = set(task.data.eval.indices.tolist())
    assert len(held_out) == 12
    for epoch in task.plan:
        for batch in task.batches.epoch(task.draws(epoch)):
            assert not held_out & set(batch.index.tolist())


@pytest.mark.parametrize("kind", ["distil", "finetune"])
def test_results_are_of_the_selected_weights_and_the_checkpoint_keeps_the_last(tmp_path: Path, kind: str) -> None:
    """A finished run can be extended: its state goes on from the last weights, not from the selected ones."""
    c = config(method=ONE_STAGE, optim={"student_lr": 0.05}, finetune={"lr": 0.05, "epochs": 1})
    task: Task = distillation(c) if kind == "distil" else fine_tuning(c)
    loop_for(task, tmp_path).run()
    network, key = task.net, "student" if kind == "distil" else "net"
    last = copied(network)
    task.selection.weights = {k: torch.zeros_like(v) for k, v in last.items()}  # a selection that is not the last epoch
    results = task.results()
    # zeros everywhere: every image is taken for class 0, of which there are a quarter
    assert results["final/acc_val_selected"] == pytest.approx(25.0)
    assert results["final/val_acc"] == pytest.approx(25.0)
    assert differences(dict(network.state_dict()), task.selection.weights) == []
    assert differences(dict(task.state_dict()[key]), last) == []
    network.load_state_dict(last)
    again = 0
    with torch.no_grad():
        for x, y in task.data.test:
            again += int((network.eval()(x).logits.argmax(1) == y).sum())
    assert results["final/acc_last"] == pytest.approx(100 * again / 24)


CERTAINTY, BOTTLENECK = {"cw_mean", "cw_std", "cw_at_bounds"}, {"raw_kl", "sigma"}


@pytest.mark.parametrize(
    ("keys", "of_a", "of_b"),
    [
        ({}, {"kd", "ib"} | CERTAINTY | BOTTLENECK, {"kd", "target_entropy"}),
        (
            {"use_cccp": True, "feat_kd_alpha": 0.1, "hybrid_beta": 0.1, "kd_sample_gate": True, "kd_max_ratio": 2.0},
            {"cccp", "ib", "feat"} | CERTAINTY | BOTTLENECK,
            {"kd", "feat", "hybrid", "target_entropy", "sample_gate", "kd_clamped"},
        ),
        ({"synergy_only_epochs": 4, "feat_kd_alpha": 0.1, "kd_alpha": 0.0}, BOTTLENECK, {"feat"}),
        (
            {"use_ib": False, "enable_kd_after_syn_acc": 1.0, "feat_kd_alpha": 0.1},
            {"kd", "feat"},
            {"kd", "target_entropy"},
        ),
    ],
)
def test_what_is_logged_of_a_run(keys: dict[str, Any], of_a: set[str], of_b: set[str], tmp_path: Path) -> None:
    """The names of docs/tracking.md, and the phases that log them: no term that has no weight."""
    task = distillation(config(method=keys))
    record = Record()
    loop = loop_for(task, tmp_path, record)
    loop.run()
    always = {"schedule/tau", "schedule/lr", "train/nonfinite_steps"}
    a = {f"a_step/{k}" for k in {"loss", "ce"} | of_a}
    a |= {"schedule/ib_beta", "synergy/acc", "synergy/acc_ema"}
    b = {f"b_step/{k}" for k in {"loss", "ce"} | of_b}
    b |= {"student/acc", "student/loss", "schedule/kd_weight", "gate/open", "synergy/acc"}
    for step, values in record.rows:
        own = a if task.plan[step].phase == "a" else b
        assert {k for k in values if not k.startswith(("teacher/", "parameters/"))} == own | always
    assert [s for s, _ in record.rows] == list(range(8))
    assert "teacher/disagreement" in record.rows[0][1]


# EMA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_the_moving_average_has_its_closed_form(every: int, tmp_path: Path) -> None:
    """e_1 = w_1, e_k = d e_(k-1) + (1 - d) w_k over every third (or every) update's weights."""
    keys = {"num_stages": 1, "student_epochs_per_stage": (2,), "kd_target": "avg"}
    task = distillation(config(method=keys, optim={"ema_decay": 0.8, "ema_update_every": every}))
    taken: list[dict[str, torch.Tensor]] = []
    task.phases["b"].optimizer.register_step_post_hook(lambda *_: taken.append(copied(task.student)))
    loop_for(task, tmp_path).run()
    assert len(taken) == 8
    kept = taken[every - 1 :: every]
    ema = task.phases["b"].objective.get_trainable_module(ema=True).module
    for name, found in ema.state_dict().items():
        if not found.is_floating_point():
            assert torch.equal(found, kept[-1][name])
            continue
        expected = 0.8 ** (len(kept) - 1) * kept[0][name].double()
        for k, w in enumerate(kept[1:], start=1):
            expected = expected + 0.2 * 0.8 ** (len(kept) - 1 - k) * w[name].double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("select", ["raw", "ema"])
@pytest.mark.parametrize("fraction", [0.25, 0.0])
def test_the_chosen_weights_are_exported(select: str, fraction: float, tmp_path: Path) -> None:
    optim = {"ema_decay": 0.5, "select_weights": select}
    task = distillation(config(method={"kd_target": "avg"}, optim=optim, dataset={"val_fraction": fraction}))
    averaged, raw, record, end = [], [], Record(), task.end_epoch

    def end_epoch(epoch: Any) -> dict[str, float]:
        averaged.append(copied(task.phases["b"].objective.get_trainable_module(ema=True).module))
        raw.append(copied(task.student))
        return end(epoch)

    task.end_epoch = end_epoch  # type: ignore[method-assign]
    loop_for(task, tmp_path, record).run()
    accuracies = record.series("student/acc_ema" if select == "ema" else "student/acc")
    best = accuracies.index(max(accuracies)) if fraction else 3
    assert task.selection.epoch == best
    task.results()
    assert differences(copied(task.student), (averaged if select == "ema" else raw)[best]) == []
    assert differences(averaged[best], raw[best]) != []


# cooldown, learned query ---------------------------------------------------------------------------------------------


def test_in_the_cooldown_neither_teachers_nor_fusion_run(tmp_path: Path) -> None:
    task = distillation(config(method={"kd_cooldown_epochs": 3, "hybrid_beta": 0.5, "feat_kd_alpha": 0.1}))
    assert "".join(e.phase for e in task.plan) == "aabbbb"
    loop = run_until(task, tmp_path, (3, 0))
    assert task.fusion is not None
    calls = [Calls(t) for t in task.teachers]
    fused: list[int] = []
    task.fusion.register_forward_hook(lambda *_: fused.append(1))
    record: Any = Record()
    loop.recorder, loop.stop = record, lambda: 0
    loop.run()
    assert [len(c) for c in calls] == [0, 0]
    assert fused == []
    assert record.series("schedule/kd_weight") == [0.0] * 3
    assert record.series("b_step/loss") == pytest.approx([0.7 * ce for ce in record.series("b_step/ce")])
    assert not {"b_step/kd", "b_step/feat", "b_step/hybrid"} & {k for _, row in record.rows for k in row}
    assert "synergy/acc" not in {k for _, row in record.rows for k in row}


def test_a_learned_query_needs_no_student(tmp_path: Path) -> None:
    keys = {"learnable_q": True, "cutmix_alpha_distill": 1.0, "teacher_adapt_alpha_kd": 0.0}
    task = distillation(config(method={**ONE_STAGE, **keys}))
    loop_for(task, tmp_path).run()
    assert task.costs.metrics()["cost/forward_images/student"] == 36, "its training passes alone"
    assert task.costs.metrics()["cost/forward_images/teacher_1"] == 2 * 36


# sizes ---------------------------------------------------------------------------------------------------------------


SMALL = {**EVERYTHING, "student_epochs_per_stage": (1, 1), "teacher_adapt_epochs": 1, "kd_two_view_stop_epoch": 2}


@pytest.mark.step
@pytest.mark.parametrize(
    ("target", "teachers", "classes"), [("auto", 2, 4), ("auto", 3, 2), ("auto_min", 3, 4), ("weighted_conf", 2, 2)]
)
def test_everything_at_once_trains_and_stays_finite(classes: int, teachers: int, target: str, tmp_path: Path) -> None:
    model = {"teachers": [{"name": "cifar_resnet8"}] * teachers}
    c = config(method={**SMALL, "kd_target": target}, model=model, optim={"ema_decay": 0.9, "grad_clip_norm": 0.5})
    task, record = distillation(c, image_data(classes=classes)), Record()
    loop_for(task, tmp_path, record).run()
    results = task.results()
    assert results["final/synergy_acc"] >= 0
    assert f"final/teacher_{teachers - 1}_acc" in results
    logged = {name for _, row in record.rows for name in row}
    logged |= {name for name in results if not TEST_SPLIT.fullmatch(name)}
    assert logged > set(terms([c]))
    logged -= set(terms([c]))
    assert [name for name in sorted(logged) if not METRICS.fullmatch(name)] == [], "a sweep may name them all"
    numbers = [v for _, row in record.rows for v in row.values()]
    assert all(abs(v) < 1e6 for v in numbers)
    assert sum(record.series("train/nonfinite_steps")) == 0
    assert task.fusion is not None
    assert len(task.fusion.adapters) == teachers


@pytest.mark.step
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_everything_at_once_in_half_precision(dtype: str, tmp_path: Path) -> None:
    task, record = distillation(config(method=SMALL, optim={"use_amp": True, "amp_dtype": dtype})), Record()
    loop = loop_for(task, tmp_path, record)
    loop.precision = Precision(task.optim, CPU)
    loop.run()
    assert sum(record.series("train/nonfinite_steps")) == 0
    assert len(record.series("b_step/loss")) == 2


def test_one_class_in_a_batch() -> None:
    task = distillation(config(method={**EVERYTHING, "kd_target": "auto_min"}))
    epoch = next(e for e in task.plan if e.phase == "b")
    task.monitor.gate_open = True
    task.begin_epoch(epoch)
    batch = first_batch(task)
    same = torch.zeros_like(batch.y)
    out = task.phases["b"].objective.train()(batch._replace(y=same, y_b=same), Moment("b", 0, 0))
    assert torch.isfinite(out["loss"])


# refused before training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"feat_kd_alpha": 0.1, "feat_kd_key": "feat_2d"}, "feat_2d has width 6.*ib_mbm_out_dim=8"),
        ({**LEVELS, "student_freeze_schedule": (-1, -1, 2, 1), "staged": False}, "stage 3, student freeze level 2"),
        ({**TUNED, "use_partial_freeze": True, "staged": False}, "teacher_freeze_level=0"),
        ({"feat_kd_alpha": 0.1}, "distill_feat has width None"),
    ],
)
def test_what_cannot_be_is_said_before_training(keys: dict[str, Any], words: str) -> None:
    keys = dict(keys)
    staged = keys.pop("staged", True)
    c = config(method=keys)
    with pytest.raises(UserError, match=words):
        Distillation(c, image_data(), net(6, 0, staged=staged), [net(5, 1, staged=staged), net(7, 2)], CPU)


def test_decoupled_distillation_of_two_classes_is_refused() -> None:
    with pytest.raises(UserError, match=r"kd_loss=dkd.*2 classes"):
        distillation(config(method={"kd_loss": "dkd"}), image_data(classes=2))
    distillation(config(method={"kd_loss": "dkd"}), image_data(classes=3))
    distillation(config(method={"kd_loss": "dkd", "kd_alpha": 0.0, "hybrid_beta": 1.0}), image_data(classes=2))
