"""CRD: the loss against a loop and torchdistill, the draw of negatives, and what the memory remembers."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchdistill.losses.mid_level import CRDLoss

from pipeline.config.methods.crd import CrdConfig
from pipeline.errors import UserError
from pipeline.training.methods.crd import Crd, Memory, Others, counted_bits, nce
from pipeline.training.rng import Streams
from tests.pipeline.training.methods.against import errors, finite, graded, random
from tests.pipeline.training.methods.stepping import MOMENT, batches, first, gradients, made, terms

TAU, N, M, B, WIDTH = 0.07, 64, 20, 6, 16
LABELS = torch.arange(N) % 5 % 4  # classes of different sizes
CPU = torch.device("cpu")
GO, SKIP, ALL = torch.tensor(False), torch.tensor(True), torch.ones(B)


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(random(*shape, seed=seed), dim=-1)


def batch(seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's and teacher's embeddings, the samples' rows, their negatives."""
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:B]
    negatives = Others(LABELS)(LABELS[rows], counted_bits(seed, slice(0, B), M, CPU))
    return unit(B, WIDTH, seed=seed), unit(B, WIDTH, seed=seed + 50), rows, negatives


def memory(seed: int = 0) -> Memory:
    return Memory(N, M, WIDTH, TAU, 0.5, Streams(seed))


# the loss ------------------------------------------------------------------------------------------------------------


def loop(student: Tensor, teacher: Tensor, rows: Tensor, negatives: Tensor, kept: Memory) -> Tensor:
    """Both directions, sample by sample; Z is n times the mean of all exponentials of the batch."""
    losses = [torch.zeros((), dtype=torch.float64)] * B
    for anchor, bank in ((student, kept.teacher.double()), (teacher, kept.student.double())):
        e = [[(anchor[i] @ bank[j] / TAU).exp() for j in [rows[i], *negatives[i]]] for i in range(len(rows))]
        z = N * sum(v.item() for row in e for v in row) / sum(len(row) for row in e)
        h = [[(v / z) / (v / z + M / N) for v in row] for row in e]
        losses = [
            so_far - row[0].log() - sum((1 - v).log() for v in row[1:]) for so_far, row in zip(losses, h, strict=True)
        ]
    return torch.stack(losses)


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_each_positive_and_each_negative_is_told_apart_in_both_directions(network: str) -> None:
    s, t, rows, negatives = batch()

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return memory()(student, teacher, rows, negatives)[0]

    def reference(student: Tensor, teacher: Tensor) -> Tensor:
        return loop(student, teacher, rows, negatives, memory())

    if network == "student":
        assert max(errors(ours, reference, s, t)) < 1e-5
    else:
        assert max(errors(lambda a, b: ours(b, a), lambda a, b: reference(b, a), t, s)) < 1e-5


def torchdistills(student: Tensor, teacher: Tensor, rows: Tensor, negatives: Tensor, kept: Memory) -> Tensor:
    """torchdistill's. It adds 1e-7 to each denominator, sums to the batch's mean, and writes its memory at once.

    It is made with our memory, as its own is not of unit vectors, and with our negatives, as its own draw fails.
    """
    loss = CRDLoss("norm", "empty", "norm", WIDTH, N, M, N, TAU, 0.5, 1e-7)
    loss.memory_v1, loss.memory_v2 = kept.student.double(), kept.teacher.double()
    loss.params = loss.params.double()
    loss.params[1] = TAU
    at = {"pos_idx": rows, "contrast_idx": torch.cat([rows[:, None], negatives], dim=1)}
    student_io = {"norm": {"output": student}, "empty": {"input": at}}
    return loss(student_io, {"norm": {"output": teacher}}).squeeze()


def test_the_mean_over_the_batch_is_torchdistills() -> None:
    s, t, rows, negatives = batch()
    found = errors(
        lambda a, b: memory()(a, b, rows, negatives)[0].mean(),
        lambda a, b: torchdistills(a, b, rows, negatives, memory()),
        s,
        t,
    )
    assert max(found) < 1e-5


def test_a_negative_that_is_drawn_twice_counts_twice() -> None:
    s, t, rows, negatives = batch()
    negatives[:, 1] = negatives[:, 0]
    kept = memory()
    kept.log_z += 5.0
    kept.begun.fill_(True)
    twice, once = kept(s, t, rows, negatives)[0], kept(s, t, rows, negatives[:, 1:])[0]
    scores = [(a * bank[negatives[:, 0]]).sum(1) / TAU for a, bank in ((s, kept.teacher), (t, kept.student))]
    single = sum(F.softplus(score - 5.0 - math.log(M / N)) for score in scores)
    torch.testing.assert_close(twice - once, single)


def test_scores_of_any_size_are_finite() -> None:
    scores = torch.tensor([[1e4, -1e4, 1e4], [-1e4, 0.0, 0.0]])
    assert nce(scores, torch.zeros(()), 0.5).tolist() == pytest.approx([1e4, 1e4], rel=1e-3)
    finite(lambda x: nce(x, torch.tensor(3.0), 0.5), scores)
    half = random(3, 5).half()
    value = finite(lambda x: nce(x, torch.tensor(3.0), 0.5), half)
    assert torch.equal(value, nce(half.float(), torch.tensor(3.0), 0.5))


def test_batches_of_one_and_two_and_equal_samples() -> None:
    s, t, rows, negatives = batch()
    for n in (1, 2):
        finite(lambda a, n=n: memory()(a, t[:n], rows[:n], negatives[:n])[0], s[:n])
    finite(lambda a: memory()(a, t[:1].expand(B, WIDTH), rows, negatives)[0], s[:1].expand(B, WIDTH))


# negatives -----------------------------------------------------------------------------------------------------------


def test_bits_are_those_of_splitmix64_wherever_the_rows_are() -> None:
    """Published values of the generator for seed 1234567, without their sign bit."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
                16408922859458223821]  # fmt: skip
    assert counted_bits(1234567, slice(0, 1), 5, CPU)[0].tolist() == [v & (2**63 - 1) for v in expected]
    whole = counted_bits(9, slice(0, 7), 11, CPU)
    parts = [counted_bits(9, slice(*at), 11, CPU) for at in ((0, 3), (3, 3), (3, 7))]
    assert [len(p) for p in parts] == [3, 0, 4]
    assert torch.equal(torch.cat(parts), whole)
    assert (whole >= 0).all()


def test_each_image_of_another_class_is_drawn_for_the_same_share_of_bits() -> None:
    for y in range(4):
        others = LABELS.ne(y).nonzero().flatten()
        drawn = Others(LABELS)(torch.tensor([y]), torch.arange(3 * len(others))[None])
        assert torch.equal(drawn[0].sort().values, others.repeat_interleave(3))


def test_draws_are_uniform_and_independent_of_the_sample() -> None:
    """Pearson's chi-squared within four of its standard deviations."""
    y = torch.tensor([0, 3, 3])
    drawn = Others(LABELS)(y, counted_bits(Streams(0).derive("crd_negatives", "b", 0, 0), slice(0, 3), 60_000, CPU))
    assert (LABELS[drawn] != y[:, None]).all()
    for row, label in zip(drawn, y, strict=True):
        counts = torch.bincount(row, minlength=N)[LABELS.ne(label)].double()
        expected = counts.sum() / len(counts)
        chi, freedom = ((counts - expected).square() / expected).sum(), len(counts) - 1
        assert abs(float(chi) - freedom) < 4 * math.sqrt(2 * freedom)
    pairs = torch.bincount(drawn[1] * N + drawn[2], minlength=N * N).reshape(N, N)[LABELS != 3][:, LABELS != 3]
    expected = pairs.sum() / pairs.numel()
    chi = ((pairs - expected).square() / expected).sum()
    assert abs(float(chi) - pairs.numel()) < 4 * math.sqrt(2 * pairs.numel())


def test_a_class_without_images_is_no_trouble() -> None:
    labels = torch.tensor([0, 0, 3, 3, 3, 5])
    drawn = Others(labels)(torch.tensor([3, 0, 5]), counted_bits(1, slice(0, 3), 100, CPU))
    assert [sorted(set(row.tolist())) for row in drawn] == [[0, 1, 5], [2, 3, 4, 5], [0, 1, 2, 3, 4]]


# memory --------------------------------------------------------------------------------------------------------------


def test_memory_begins_with_the_seeds_unit_vectors() -> None:
    first, again, other = memory(), memory(), memory(1)
    assert torch.equal(first.student, again.student)
    assert torch.equal(first.teacher, again.teacher)
    assert not torch.equal(first.student, first.teacher)
    assert not torch.equal(first.student, other.student)
    torch.testing.assert_close(first.teacher.norm(dim=1), torch.ones(N))


def test_an_update_moves_the_batchs_rows_half_way_and_leaves_the_others() -> None:
    s, t, rows, negatives = batch()
    kept, before = memory(), memory()
    _, log_z = kept(s, t, rows, negatives)
    assert torch.equal(kept.student, before.student), "not before the update"
    kept.write(s, t, rows, ALL, log_z, GO)
    for bank, old, new in ((kept.student, before.student, s), (kept.teacher, before.teacher, t)):
        expected = old.clone()
        for row, embedding in zip(rows.tolist(), new, strict=True):
            middle = 0.5 * old[row] + 0.5 * embedding
            expected[row] = middle / middle.square().sum().sqrt()
        torch.testing.assert_close(bank, expected)


def test_z_is_that_of_the_first_update() -> None:
    s, t, rows, negatives = batch()
    kept = memory()
    _, first = kept(s, t, rows, negatives)
    kept.write(s, t, rows, ALL, first, GO)
    _, second = kept(*batch(2))
    assert torch.equal(second, first)
    assert torch.equal(kept.log_z, first)
    at = torch.cat([rows[:, None], negatives], dim=1)
    expected = [
        math.log(N * (torch.einsum("bd,bkd->bk", a, bank[at]) / TAU).double().exp().mean())
        for a, bank in ((s, memory().teacher), (t, memory().student))
    ]
    assert first.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_skipped_step_leaves_no_trace() -> None:
    s, t, rows, negatives = batch()
    kept = memory()
    kept.write(s * math.nan, t, rows, ALL, torch.full((2,), math.nan), SKIP)
    for name, value in memory().state_dict().items():
        assert torch.equal(kept.state_dict()[name], value), name
    value, log_z = kept(s, t, rows, negatives)
    fresh, expected = memory()(s, t, rows, negatives)
    assert torch.equal(value, fresh)
    assert torch.equal(log_z, expected), "the next step fixes Z"


def test_memory_continues_from_its_state_bit_for_bit() -> None:
    def steps(kept: Memory, numbers: list[int]) -> list[Any]:
        found = []
        for number in numbers:
            s, t, rows, negatives = batch(number)
            loss, log_z = kept(s, t, rows, negatives)
            kept.write(s, t, rows, ALL, log_z, GO)
            found.append(loss)
        return found

    kept = memory()
    steps(kept, [1, 2])
    state = {name: value.clone() for name, value in kept.state_dict().items()}
    resumed = memory(7)
    resumed.load_state_dict(state)
    for a, b in zip(steps(kept, [3, 4]), steps(resumed, [3, 4]), strict=True):
        assert torch.equal(a, b)
    for name, value in kept.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_memory_stays_in_eval_mode_and_has_nothing_to_train() -> None:
    holder = torch.nn.ModuleDict({"memory": memory()}).train()
    assert not holder["memory"].training
    assert not list(holder.parameters())
    s, t, rows, negatives = batch()
    assert graded(lambda a: memory()(a, t, rows, negatives)[0], s)[1].abs().min() > 0


# the step ------------------------------------------------------------------------------------------------------------


def crd(**keys: Any) -> CrdConfig:
    return CrdConfig(negatives=10, embed_dim=9, **keys)


def test_the_step_contrasts_each_image_of_a_split_with_its_own_row() -> None:
    """Rows count the training images, whatever their places in the data set."""
    train = batches(indices=torch.arange(3, 44, 2))
    step, seen = made(Crd, crd(), train=train), first(train)
    kept: Any = step.own["memory"]
    assert kept.student.shape == (21, 9)
    s, t = (
        F.normalize(step.own[name](network(seen.x).feat_2d), dim=1)
        for name, network in (("embed_student", step.trainable_module), ("embed_teacher", step._teachers[0]))
    )
    rows = (seen.index - 3) // 2
    labels = train.labels[train.indices]
    bits = counted_bits(Streams(0).derive("crd_negatives", *MOMENT), slice(0, 7), 10, CPU)
    expected, _ = kept(s, t, rows, Others(labels)(labels[rows], bits))
    found = terms(step, seen)["crd"]
    assert torch.equal(found, expected)
    assert step.term_weights() == {"crd": 0.8}
    before = kept.student.clone()
    step.updated(torch.tensor(False), 0.1)
    changed = (kept.student != before).any(dim=1).nonzero().flatten()
    assert torch.equal(changed, rows.sort().values)
    step.updated(torch.tensor(False), 0.1)  # an epoch in which nothing is distilled
    graded_names = gradients(step, seen)
    for name in ("embed_student.weight", "embed_teacher.weight", "net.conv.weight"):
        assert graded_names[name].abs().max() > 0


def test_the_step_leaves_the_memory_alone_when_an_update_is_skipped() -> None:
    step, seen = made(Crd, crd()), first(batches())
    state = {k: v.clone() for k, v in step.own_state()["memory"].items()}
    terms(step, seen)
    step.updated(torch.tensor(True), 0.1)
    assert all(torch.equal(v, state[k]) for k, v in step.own_state()["memory"].items())


def test_samples_behind_the_gate_leave_no_trace_in_the_memory() -> None:
    """Their lesson is 0, which would be written as the teacher's embedding of nothing."""
    step, seen = made(Crd, crd()), first(batches())
    before = step.own["memory"].state_dict()["teacher"].clone()
    lesson = {k: v.detach().clone() for k, v in step.lesson([step._teachers[0](seen.x)], seen.y).items()}
    for value in lesson.values():
        value[[1, 4]] = 0.0
    step.terms(step.trainable_module(seen.x), lesson, seen, MOMENT)
    step.updated(torch.tensor(False), 0.1)
    moved = (step.own["memory"].state_dict()["teacher"] != before).any(dim=1)
    assert moved[seen.index].tolist() == [True, False, True, True, False, True, True]


def test_other_moments_have_other_negatives_and_a_resumed_step_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    step, seen = made(Crd, crd()), first(batches())
    drawn = []
    forward = Others.forward
    monkeypatch.setattr(Others, "forward", lambda self, y, bits: drawn.append(forward(self, y, bits)) or drawn[-1])
    for moment in (MOMENT, MOMENT._replace(batch=1), MOMENT._replace(epoch=1), MOMENT):
        lesson = step.lesson([step._teachers[0](seen.x)], seen.y)
        step.terms(step.trainable_module(seen.x), lesson, seen, moment)
    assert torch.equal(drawn[0], drawn[3])
    assert len({tuple(d.flatten().tolist()) for d in drawn}) == 3


def test_as_many_negatives_as_images_and_a_single_class_are_refused() -> None:
    with pytest.raises(UserError, match=r"^method\.negatives=44 with 44 training images: set it to at most 43$"):
        made(Crd, CrdConfig(negatives=44))
    made(Crd, CrdConfig(negatives=43))
    with pytest.raises(UserError, match="contrasts classes, and all training images are of one"):
        made(Crd, crd(), train=batches(indices=torch.arange(0, 44, 4)))
