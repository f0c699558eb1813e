"""Random streams: their values are fixed, and only their names decide them."""

import pytest
import torch

from pipeline.training.rng import Streams


def test_streams_keep_their_values_for_ever() -> None:
    """Runs of today are continued by the code of tomorrow: SHA-256 of «seed/stream/place», computed by hand."""
    assert Streams(0).derive("permutation", "a", 3) == 0x54003923A66C8914
    assert Streams(7).derive("init", "fusion") == 0x6D9DEBF07A8D78DA
    assert torch.randperm(8, generator=Streams(0).generator("permutation", "b", 0)).tolist() == [7, 0, 2, 5, 6, 1, 3, 4]


@pytest.mark.parametrize(
    "other",
    [
        Streams(1).derive("mix", "a", 1, 2),
        Streams(0).derive("crop_flip", "a", 1, 2),
        Streams(0).derive("mix", "b", 1, 2),
        Streams(0).derive("mix", "a", 2, 2),
        Streams(0).derive("mix", "a", 1, 3),
        Streams(0).derive("mix", "a", 12),
        Streams(0).derive("mix", "a", 1),
    ],
)
def test_seed_stream_phase_epoch_and_batch_each_give_another_stream(other: int) -> None:
    assert Streams(0).derive("mix", "a", 1, 2) != other


def test_a_stream_neither_reads_nor_changes_the_global_state() -> None:
    torch.manual_seed(1)
    first = Streams(3).normal((4,), "ib_noise", "a", 0, 0)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert torch.equal(Streams(3).normal((4,), "ib_noise", "a", 0, 0), first)
    Streams(3).keep_mask((4,), 0.5, "head_dropout", "a", 0, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_initialisation_depends_on_seed_and_name_and_leaves_the_global_state() -> None:
    before = torch.random.get_rng_state()
    with Streams(0).initialising("fusion"):
        a = torch.nn.Linear(3, 3).weight
    torch.rand(7)
    with Streams(0).initialising("fusion"):
        b = torch.nn.Linear(3, 3).weight
    with Streams(1).initialising("fusion"):
        c = torch.nn.Linear(3, 3).weight
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.random.set_rng_state(before)
    with Streams(0).initialising("fusion"):
        torch.rand(99)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_noise_is_standard_normal_and_masks_drop_their_share() -> None:
    noise = Streams(0).normal((200, 200), "ib_noise", "a", 0, 0)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)
    mask = Streams(0).keep_mask((200, 200), 0.3, "head_dropout", "a", 0, 0)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.7, abs=0.01)
