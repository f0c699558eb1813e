"""Classes in common, and shares of the rest: counted by hand."""

import pytest

from pipeline.data.subsets import subsets


@pytest.mark.parametrize(
    ("classes", "teachers", "overlap", "common", "own"),
    [
        (100, 2, 0.5, 50, [25, 25]),
        (20, 3, 0.25, 5, [5, 5, 5]),
        (20, 3, 0.2, 4, [6, 5, 5]),
        (7, 2, 0.0, 0, [4, 3]),
        (10, 4, 0.74, 7, [1, 1, 1, 0]),
        (10, 2, 1.0, 10, [0, 0]),
    ],
)
def test_a_share_is_common_and_the_rest_is_divided_evenly(
    classes: int, teachers: int, overlap: float, common: int, own: list[int]
) -> None:
    found = [set(part) for part in subsets(classes, teachers, overlap, seed=3)]
    shared = set.intersection(*found)
    assert len(shared) == common
    assert [len(part - shared) for part in found] == own
    assert len(set.union(*found)) == classes == common + sum(own), "each class is taught, and no other's share twice"
    assert set.union(*found) == set(range(classes))


def test_the_seed_chooses_and_more_overlap_only_adds_to_what_is_common() -> None:
    assert subsets(20, 2, 0.5, seed=0) == subsets(20, 2, 0.5, seed=0) != subsets(20, 2, 0.5, seed=1)
    few, many = (set.intersection(*map(set, subsets(20, 2, overlap, seed=0))) for overlap in (0.25, 0.5))
    assert few < many
