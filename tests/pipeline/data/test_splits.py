"""The validation split: stratified, and fixed by data digest and split seed alone."""

import hashlib

import numpy as np
import pytest
import torch

from pipeline.data.splits import split
from pipeline.errors import UserError


@pytest.mark.parametrize("fraction", [0.05, 0.1, 1 / 3, 0.5, 0.7])
@pytest.mark.parametrize("sizes", [[5, 60], [20] * 12, [5, 6, 7, 11, 13], [59, 7, 23, 41]])
def test_parts_are_disjoint_complete_sorted_and_stratified(sizes: list[int], fraction: float) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    train, val = split(labels, fraction, "d", 7)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(len(labels)))
    assert torch.equal(val, val.sort().values)
    assert torch.equal(train, train.sort().values)
    assert len(val) == round(fraction * len(labels))
    held_out = torch.bincount(labels[val], minlength=len(sizes))
    assert (held_out - fraction * torch.tensor(sizes)).abs().max() < 1


def test_split_is_independent_of_global_generators() -> None:
    labels = torch.arange(1000) % 10
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        state = torch.get_rng_state()
        results.append(split(labels, 0.2, "digest", 7).val)
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*results)


def test_digest_and_seed_both_change_the_split() -> None:
    labels = torch.arange(1000) % 10
    reference = split(labels, 0.2, "a", 0).val
    assert not torch.equal(reference, split(labels, 0.2, "b", 0).val)
    assert not torch.equal(reference, split(labels, 0.2, "a", 1).val)


def test_split_is_the_same_for_ever() -> None:
    """Written down, so that another version of torch or numpy cannot move images between the parts unnoticed."""
    val = split(torch.arange(1000) % 10, 0.1, "digest", 0).val
    assert (
        hashlib.sha256(val.numpy().astype("<i8").tobytes()).hexdigest()
        == "e84d00b1ffffd2177a348c3596818d9067dc1495c71492f9401a64b3e4f843ec"
    )


def test_fraction_zero_holds_out_nothing() -> None:
    train, val = split(torch.tensor([0, 1, 1]), 0, "d", 0)
    assert train.tolist() == [0, 1, 2]
    assert val.dtype == torch.int64
    assert len(val) == 0


def test_impossible_fractions_are_refused() -> None:
    with pytest.raises(UserError, match=r"dataset\.val_fraction=0.1 of 4 training images holds out none"):
        split(torch.tensor([0, 0, 1, 1]), 0.1, "d", 0)
    with pytest.raises(UserError, match=r"dataset\.val_fraction=0.9 leaves class 1 without training images"):
        split(torch.tensor([0] * 40 + [1]), 0.9, "d", 0)
