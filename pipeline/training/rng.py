"""Named streams of random numbers.

Every draw comes from a stream that is derived from (seed, stream name, phase, epoch in that phase[, batch]), so the
counters are all that is needed to continue a run, and runs that differ in one factor see the same images in the same
order (docs/tracking.md, "Random numbers").
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """The streams of one run.

    `part`: which of several trainings in a row of the same seed they are of.
    """

    seed: int
    part: str = ""

    def derive(self, stream: str, *where: str | int) -> int:
        """The seed, in [0, 2^63), of a stream at a place: SHA-256 over the seed, the name and the place."""
        text = "/".join(map(str, (self.seed, *filter(None, [self.part]), stream, *where)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, stream: str, *where: str | int) -> torch.Generator:
        """A generator on the CPU: draws are made there and moved, so that they agree on all devices."""
        return torch.Generator().manual_seed(self.derive(stream, *where))

    def normal(self, shape: tuple[int, ...], stream: str, *where: str | int) -> Tensor:
        """Standard normal noise of `shape`, on the CPU."""
        return torch.randn(shape, generator=self.generator(stream, *where))

    def keep_mask(self, shape: tuple[int, ...], p: float, stream: str, *where: str | int) -> Tensor:
        """A 0/1 dropout mask of `shape`: 0 with probability p, on the CPU."""
        return (torch.rand(shape, generator=self.generator(stream, *where)) >= p).float()

    def seed_global(self, stream: str, *where: str | int) -> None:
        """Seed torch's global generators, for the dropout and stochastic depth inside networks."""
        _seed(self.derive(stream, *where))

    @contextmanager
    def initialising(self, what: str) -> Iterator[None]:
        """Weights made inside depend on the seed and on `what` only; the global state is left as it was."""
        with torch.random.fork_rng():
            _seed(self.derive("init", what))
            yield


def _seed(seed: int) -> None:
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # it would write a trace of the stack for each kind of accelerator that might come yet
        torch.default_generator.manual_seed(seed)
