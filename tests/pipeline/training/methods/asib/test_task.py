"""Stages: the plan, synergy accuracy, snapshots, the gate before a B-step, selection, final results."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import MethodConfig
from pipeline.training.methods.asib.b_step import BStep
from pipeline.training.methods.asib.schedules import make_plan
from pipeline.training.methods.asib.task import Distillation
from pipeline.training.run_data import Selection
from tests.pipeline.training.builders import (
    Record,
    config,
    differences,
    distillation,
    fine_tuning,
    image_data,
    loop_for,
    net,
    run_until,
)


def method(**keys: Any) -> MethodConfig:
    return MethodConfig.model_validate(keys)


def names(**keys: Any) -> str:
    return "".join(e.phase for e in make_plan(method(**keys), a_steps=True))


def test_the_plan_alternates_a_steps_and_b_steps() -> None:
    assert names(num_stages=3, student_epochs_per_stage=(2, 0, 3), teacher_adapt_epochs=1) == "abb" + "a" + "abbb"
    assert names(num_stages=1, student_epochs_per_stage=(3,), teacher_adapt_epochs=0) == "bbb"


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
            lambda o, args, kwargs, name=name: seen[name].append(o.param_groups[0]["lr"])
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
        self.values, self.weights, self.task = list(values), [], task
        task.monitor.synergy_accuracy = self  # type: ignore[method-assign, assignment]

    def __call__(self, student: Any) -> float:
        assert self.task.fusion is not None
        self.weights.append({k: v.clone() for k, v in self.task.fusion.state_dict().items()})
        return self.values[len(self.weights) - 1]


def fused(task: Distillation) -> dict[str, torch.Tensor]:
    assert task.fusion is not None
    return dict(task.fusion.state_dict())


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


def test_the_snapshot_is_the_best_by_an_evaluation_of_its_own(tmp_path: Path) -> None:
    """Unscripted: fusions of all A-epochs are kept and evaluated here once more; the one in use is the best of them."""
    task = distillation(
        config(method={**LONG, "num_stages": 1, "student_epochs_per_stage": (1,)}, optim={"a_step_lr": 0.05})
    )
    kept: list[dict[str, torch.Tensor]] = []
    end = task.end_epoch

    def end_epoch(epoch: Any) -> dict[str, float]:
        if epoch.phase == "a":
            kept.append({k: v.clone() for k, v in fused(task).items()})
        return end(epoch)

    task.end_epoch = end_epoch  # type: ignore[method-assign]
    record = Record()
    run_until(task, tmp_path, (4, 0), record)
    final = {k: v.clone() for k, v in fused(task).items()}
    scores = [evaluated(task, weights) for weights in kept]
    assert record.series("synergy/acc") == pytest.approx(scores)
    assert differences(final, kept[scores.index(max(scores))]) == []
    assert task.monitor.accuracy == pytest.approx(max(scores))


def evaluated(task: Distillation, weights: dict[str, torch.Tensor]) -> float:
    """Synergy accuracy on the validation split, image by image."""
    assert task.fusion is not None
    task.fusion.load_state_dict(weights)
    task.fusion.eval()
    hits = total = 0
    with torch.no_grad():
        for x, y in task.data.eval:
            for i in range(len(x)):
                one = x[i : i + 1]
                query = task.student.eval()(one).feat_2d
                z = task.fusion(query, [t(one).feat_2d for t in task.teachers]).logits
                hits += int(z.argmax() == y[i])
                total += 1
    return 100.0 * hits / total


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
    from pipeline.training.evaluation import outputs

    task.fusion.train()
    assert task.monitor.synergy_accuracy(outputs(task.student, task.data.eval)) == pytest.approx(100 * hits / total)
    assert task.fusion.training, "modes are restored"


def test_teachers_of_one_width_only_go_without_adapters() -> None:
    from pipeline.errors import UserError

    with pytest.raises(UserError, match=r"\[5, 7\].*use_distillation_adapter|use_distillation_adapter.*\[5, 7\]"):
        distillation(config(method={"use_distillation_adapter": False}))


def test_a_query_of_another_width_is_an_error_and_never_healed() -> None:
    from pipeline.errors import UserError

    with pytest.raises(UserError, match=r"ib_mbm_query_dim=9.*6"):
        distillation(config(method={"ib_mbm_query_dim": 9}))
    distillation(config(method={"ib_mbm_query_dim": 6}))
    distillation(config(method={"ib_mbm_query_dim": 0}))


# selection -----------------------------------------------------------------------------------------------------------


def test_the_best_epoch_on_validation_is_kept_and_ties_go_to_the_earliest() -> None:
    student = net(6, 0)
    selection = Selection(student, by_validation=True)
    for epoch, accuracy in enumerate((50.0, 70.0, 60.0, 70.0)):
        student.net.fc.bias.data.fill_(epoch)
        selection.offer(accuracy, epoch)
    assert (selection.epoch, selection.accuracy) == (1, 70.0)
    assert selection.chosen()["net.fc.bias"].tolist() == [1.0] * 4


def test_without_validation_the_last_epoch_is_kept() -> None:
    student = net(6, 0)
    selection = Selection(student, by_validation=False)
    for epoch, accuracy in enumerate((70.0, 50.0)):
        student.net.fc.bias.data.fill_(epoch)
        selection.offer(accuracy, epoch)
    assert selection.epoch == 1
    assert selection.chosen()["net.fc.bias"].tolist() == [1.0] * 4


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
        rows = [
            {n: v for n, v in r.items() if fraction or not n.endswith(("acc", "acc_ema", "/loss"))}
            for _, r in record.rows
        ]
        if not fraction:
            rows = [{n: v for n, v in r.items() if not n.startswith(("teacher/", "student/"))} for r in rows]
        results = task.results()
        weights = (task.student if isinstance(task, Distillation) else task.net).state_dict()
        found.append((rows, dict(weights), task.selection.epoch, results))
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
    c = config(optim={"student_lr": 0.05}, finetune={"lr": 0.05})
    task = distillation(c) if kind == "distil" else fine_tuning(c)
    loop_for(task, tmp_path).run()
    network = task.student if isinstance(task, Distillation) else task.net
    key = "student" if isinstance(task, Distillation) else "net"
    last = {k: v.clone() for k, v in network.state_dict().items()}
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


def test_what_is_logged_of_a_run(tmp_path: Path) -> None:
    """The names of docs/tracking.md, and the phases that log them."""
    task = distillation(config())
    record = Record()
    loop = loop_for(task, tmp_path, record)
    loop.run()
    always = {"schedule/tau", "schedule/lr", "train/nonfinite_steps"}
    a = {f"a_step/{k}" for k in ("loss", "ce", "kd", "ib", "feat", "cccp", "cw_mean", "cw_std")}
    a |= {"a_step/raw_kl", "a_step/sigma", "a_step/cw_at_bounds"}  # docs/method.md section 9: for reading the ladder
    a |= {"schedule/ib_beta", "synergy/acc", "synergy/acc_ema"}
    b = {f"b_step/{k}" for k in ("loss", "ce", "kd", "feat")}
    b |= {"b_step/target_entropy", "b_step/sample_gate"}
    b |= {"student/acc", "student/loss", "schedule/kd_weight", "gate/open", "synergy/acc"}
    for step, values in record.rows:
        own = a if task.plan[step].phase == "a" else b
        assert {k for k in values if not k.startswith(("teacher/", "parameters/"))} == own | always
    assert [s for s, _ in record.rows] == list(range(8))
    assert "teacher/disagreement" in record.rows[0][1]
