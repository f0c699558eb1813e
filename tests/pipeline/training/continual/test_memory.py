"""Which images are kept: the reservoir's uniformity, herding's published order, quotas that are never exceeded."""

import torch
from scipy.stats import chisquare
from torch import Tensor

from pipeline.training.continual.memory import Memory, balanced, herded, merged, quotas, reservoir


def kept(memory: Memory, stream: Tensor, seed: int) -> Memory:
    rows = reservoir(memory.index, memory.seen, stream, memory.size, torch.Generator().manual_seed(seed))
    return merged(memory, *rows, stream, torch.zeros(len(stream), 0), 0)


def test_a_reservoir_keeps_every_image_of_all_tasks_with_the_same_probability() -> None:
    """3,000 streams of 60 images in three tasks, 12 kept: each is kept in 600 of them, whichever task brought it."""
    rounds, counts = 3000, torch.zeros(60)
    for seed in range(rounds):
        memory = Memory(12)
        for number, task in enumerate(torch.arange(60).split(20)):
            memory = kept(memory, task, seed * 3 + number)
        assert len(memory.index.unique()) == len(memory.index) == 12
        counts[memory.index] += 1
    assert counts.sum() == rounds * 12
    # of samples of 12 without replacement the statistic is smaller than chi-squared by 1 - 12 / 60
    statistic = chisquare(counts.numpy()).statistic / (1 - 12 / 60)
    assert 25 < statistic < 105  # 59 degrees of freedom: outside with a probability below 1e-4


def test_a_reservoir_keeps_everything_until_it_is_full() -> None:
    memory = kept(kept(Memory(10), torch.arange(4), 0), torch.arange(4, 9), 1)
    assert memory.index.tolist() == list(range(9))
    assert memory.seen == 9


def herding_loop(features: Tensor, count: int) -> list[int]:
    """Algorithm 4 of Rebuffi et al. 2017, one exemplar at a time, in float64."""
    phi = [f / f.norm() for f in features.double()]
    mu = torch.stack(phi).sum(dim=0) / len(phi)
    chosen: list[int] = []
    for k in range(1, count + 1):
        so_far = torch.stack([torch.zeros_like(mu), *(phi[j] for j in chosen)]).sum(dim=0)
        left = [i for i in range(len(phi)) if i not in chosen]
        chosen.append(min(left, key=lambda i: float((mu - (phi[i] + so_far) / k).norm())))
    return chosen


def test_herding_chooses_in_the_published_order() -> None:
    features = torch.randn(30, 7, generator=torch.Generator().manual_seed(0)) + 1
    assert herded(features, 12).tolist() == herding_loop(features, 12)
    assert herded(features, 99).sort().values.tolist() == list(range(30))


def test_quotas_share_the_room_and_no_more() -> None:
    assert quotas(10, 4) == [3, 3, 2, 2]
    assert quotas(3, 5) == [1, 1, 1, 0, 0]


def test_old_classes_give_up_their_last_images_and_new_ones_are_picked() -> None:
    memory = Memory(6, torch.tensor([10, 11, 12, 20, 21, 22]), torch.zeros(6, 0), torch.full((6,), 2), 6)
    stream, labels = torch.tensor([30, 31, 32]), torch.tensor([7, 7, 7])
    of_memory = torch.tensor([1, 1, 1, 2, 2, 2])
    rows = balanced(of_memory, labels, 6, lambda rows, n: rows.flip(0)[:n])
    after = merged(memory, *rows, stream, torch.zeros(3, 0), 3)
    assert after.index.tolist() == [10, 11, 20, 21, 32, 31]
    assert after.known.tolist() == [2, 2, 2, 2, 3, 3]
    assert after.seen == 9


def test_a_merged_memory_keeps_the_logits_of_each_images_own_time() -> None:
    memory = Memory(2, torch.tensor([5, 6]), torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([1, 1]), 2)
    after = merged(memory, torch.tensor([1, -1]), torch.tensor([-1, 0]), torch.tensor([8]), torch.tensor([[9.0, 9]]), 2)
    assert after.index.tolist() == [6, 8]
    assert after.logits.tolist() == [[3, 4], [9, 9]]
    assert after.known.tolist() == [1, 2]
