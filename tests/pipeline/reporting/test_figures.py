"""The x-axis of curves: student epochs, however many epochs other phases have."""

import numpy as np
import pytest

from pipeline.reporting.figures import student_epochs


@pytest.mark.parametrize("before", [0, 1, 8])
def test_the_students_epochs_are_where_they_are_without_other_phases(before: int) -> None:
    """Two stages of 3 student epochs, each after `before` others."""
    plan = ["a"] * before + ["b"] * 3 + ["a"] * before + ["b"] * 3
    student = [step for step, phase in enumerate(plan) if phase == "b"]
    places = student_epochs(range(len(plan)), student)
    assert [places[step] for step in student] == [1, 2, 3, 4, 5, 6]
    assert np.allclose(places[:before], [(i + 1) / (before + 1) for i in range(before)])
    assert np.all(np.diff(places) > 0)


def test_a_run_without_a_student_has_its_own_epochs() -> None:
    assert student_epochs([0, 1, 2], []) == [1, 2, 3]


def test_epochs_after_the_last_of_the_student_count_none() -> None:
    assert student_epochs([1, 2], [0, 1]) == [2, 2]
    assert student_epochs([], [0]) == []
