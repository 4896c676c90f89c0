"""Training in several processes, started by torchrun; a single process is the ordinary case.

Each rank processes its slice of every batch. Gradients are averaged here, not by DistributedDataParallel: a rank may then
process its slice in micro-batches, or again after it ran out of memory, while the others wait.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from utils import InputError, RunError, say


def rank() -> int:
    """Return the number of this process; rank 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks() -> None:
    """Join the process group, if torchrun started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    nccl = dist.is_nccl_available() and gpus >= local_ranks  # which refuses ranks that share a GPU
    timeout = timedelta(minutes=30)  # the first rank may draw or evaluate for that long while the others wait
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timeout)
    if 0 < gpus < local_ranks:
        say(f"{local_ranks} ranks share {gpus} of this machine's GPUs, over gloo: slower than one rank a GPU")


def leave_ranks() -> None:
    """Wait until all ranks are done, then leave the process group."""
    if dist.is_initialized():
        max_over_ranks(0)  # waits
        dist.destroy_process_group()


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:100]
        raise RunError(f"lost another rank ({reason}); go on from the last save with --start_from latest") from error


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors (of one type, on one device) by their means over the ranks, in one message."""
    if not dist.is_initialized() or not tensors:
        return
    flat = torch.cat([x.detach().reshape(-1) for x in tensors])
    with _collective():
        dist.all_reduce(flat)
    flat /= world_size()
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.detach().copy_(mean.view_as(x))


def max_over_ranks(number: int) -> int:
    """Return the largest of the ranks' numbers; all ranks have to call it."""
    largest = torch.tensor(int(number))
    if world_size() > 1:
        with _collective():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def gather(value: object) -> list:
    """Return the values of all ranks in order on the first rank, an empty list on the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    with _collective():
        dist.gather_object(value, values)
    return values or []


def first_rank(function: Callable) -> Callable:
    """Decorate a function that only the first rank runs; the others get None."""

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        return function(*args, **kwargs) if rank() == 0 else None

    return call


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Run a block on the first rank before the others."""
    if rank() > 0:
        max_over_ranks(0)  # waits
    yield
    if rank() == 0:
        max_over_ranks(0)


def rank_slice(batch_size: int) -> slice:
    """Return the part of every batch that this rank processes; raise InputError if the ranks cannot share it equally."""
    ranks = world_size()
    if batch_size % ranks:
        raise InputError(f"--batch_size {batch_size}: {ranks} ranks cannot share it; expected a multiple of {ranks}")
    length = batch_size // ranks
    return slice(rank() * length, (rank() + 1) * length)
