"""Metrics of the accuracy matrix, on matrices worked out by hand."""

import numpy as np
import pytest
import torch

from pipeline.training.continual import matrix
from pipeline.training.continual.report import Probe, metrics

R = np.array([[90.0, 0.0, 0.0], [60.0, 80.0, 0.0], [30.0, 85.0, 70.0]])


def test_metrics_of_a_matrix_worked_out_by_hand() -> None:
    assert matrix.average(R) == pytest.approx((30 + 85 + 70) / 3)
    # task 0 was at 90 at best, task 1 at 80; task 1 has gained since
    assert matrix.forgetting(R) == pytest.approx(((90 - 30) + (80 - 85)) / 2)
    assert matrix.backward_transfer(R) == pytest.approx(((30 - 90) + (85 - 80)) / 2)
    assert matrix.incremental(np.array([90.0, 70.0, 61.0])) == pytest.approx((90 + 70 + 61) / 3)


def test_forgetting_counts_from_the_best_moment_not_from_the_first() -> None:
    risen = np.array([[50.0, 0.0, 0.0], [70.0, 40.0, 0.0], [60.0, 40.0, 90.0]])
    assert matrix.forgetting(risen) == pytest.approx(((70 - 60) + 0) / 2)
    assert matrix.backward_transfer(risen) == pytest.approx(((60 - 50) + 0) / 2)


def test_forward_transfer_compares_with_the_untrained_network() -> None:
    ahead = np.array([[90.0, 30.0, 26.0], [60.0, 80.0, 31.0], [30.0, 85.0, 70.0]])
    assert matrix.forward_transfer(ahead, np.array([25.0, 25.0, 24.0])) == pytest.approx(((30 - 25) + (31 - 24)) / 2)


def test_one_task_has_nothing_to_forget() -> None:
    one = np.array([[75.0]])
    assert matrix.forgetting(one) == matrix.backward_transfer(one) == matrix.forward_transfer(one, np.array([1.0])) == 0


def test_a_row_among_seen_classes_and_among_the_tasks_own() -> None:
    """Classes 2, 0 come first, then 3, 1. The scores of class 3 are the highest wherever they count."""
    labels = torch.tensor([0, 0, 1, 2, 3, 3])
    scores = torch.tensor(
        [
            [3.0, 0.0, 1.0, 9.0],  # 0: right within its task, 3 takes it once 3 is seen
            [1.0, 0.0, 2.0, 0.0],  # 0: wrong
            [0.0, 4.0, 0.0, 9.0],  # 1: 3 takes it even within its task
            [1.0, 5.0, 2.0, 0.0],  # 2: right until 1 is seen
            [0.0, 0.0, 0.0, 1.0],
            [0.0, 0.0, 0.0, 1.0],
        ]
    )
    probe = Probe(labels, [(2, 0), (3, 1)])
    before = probe.row(scores, 1)
    assert before["class_il"] == pytest.approx([200 / 3, 0])
    assert before["task_il"] == pytest.approx([200 / 3, 200 / 3])
    assert before["seen"] == pytest.approx(200 / 3)
    after = probe.row(scores, 2)
    assert after["class_il"] == pytest.approx([0, 200 / 3])
    assert after["seen"] == pytest.approx(100 * 2 / 6)
    assert probe.row(scores, 0)["class_il"] == [0, 0]


def test_a_stream_of_teachers_is_measured_by_agreement() -> None:
    everything, answers = [(0, 1, 2, 3)] * 2, [torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 0, 3])]
    row = Probe(torch.tensor([0, 1, 2, 0]), everything, answers).row(torch.eye(4), 1)
    assert row == {"class_il": [100, 50], "task_il": [100, 50], "seen": 75}


def test_metrics_after_two_of_three_tasks_see_those_two_only() -> None:
    rows = [
        {"class_il": [90.0, 0, 0], "task_il": [90.0, 40, 50], "seen": 90.0},
        {"class_il": [50.0, 70.0, 0], "task_il": [80.0, 75, 50], "seen": 60.0},
    ]
    found = metrics(rows, "val", {"class_il": [0.0, 0, 0], "task_il": [50.0, 30, 50], "seen": 0.0})
    assert found["continual/val_average_acc"] == 60
    assert found["continual/val_forgetting"] == 40
    assert found["continual/val_task_il_bwt"] == -10
    assert found["continual/val_task_il_fwt"] == 10
    assert (found["continual/val_acc"], found["continual/val_incremental_acc"]) == (60, 75)
