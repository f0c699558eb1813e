"""Agreement among the processes of torchrun. With one process everything here is the identity."""

import atexit
import os
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.numbers import processes

T = TypeVar("T")


class World(NamedTuple):
    """This process among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def join() -> World:
    """Join the process group that torchrun describes in the environment; without torchrun, one process."""
    size = processes(os.environ)[1]
    if size == 1:
        return World()
    if not dist.is_initialized():
        if torch.cuda.is_available():  # from now on `cuda` means this process's own GPU
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    return world()


def _leave() -> None:
    """Leave the group before Python ends: gloo's threads that still run then abort the process now and then."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> World:
    """The group this process has joined."""
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def anyone(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if not dist.is_initialized():
        return flag
    raised = torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def gather_rows(rows: Tensor, at: slice | Tensor, size: int) -> Tensor:
    """The global batch's (size, ...) from every process's own rows, which lie `at` it; zero where no one has any."""
    if not dist.is_initialized() and len(rows) == size:
        return rows
    everything = rows.new_zeros((size, *rows.shape[1:]))
    everything[at] = rows
    return total(everything)


def barrier() -> None:
    """Wait until every process has arrived."""
    if dist.is_initialized():
        dist.barrier()


def first_process_says(value: T) -> T:
    """The first process's value, in every process: evaluations differ where batch statistics are per process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def mean(value: Tensor) -> Tensor:
    """The detached mean of a scalar over all processes."""
    if not dist.is_initialized():
        return value.detach()
    return total(value.detach().clone()) / dist.get_world_size()
