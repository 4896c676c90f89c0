"""How a batch is run."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from utils import InputError


@functools.cache
def thread_pair(pid: int) -> ThreadPoolExecutor:
    """Two threads of this process; a forked one has to make its own."""
    return ThreadPoolExecutor(2)


def in_threads(calls: Sequence[Callable], at_once: bool) -> list:
    """Results of two calls, made in threads of their own so that the main one hears signals while it waits.

    at_once: both at the same time, each with half of the threads that torch has on the CPU: small maps are too little
             work to be shared by all. They must not change the same things. Else one after the other, with all threads
    """
    threads = torch.get_num_threads()

    def start(call: Callable, share: int) -> Future:
        def run() -> object:
            torch.set_num_threads(share)  # of this thread
            return call()

        return thread_pair(os.getpid()).submit(run)

    try:
        if at_once and threads > 1:
            futures = [start(call, threads // 2) for call in calls]
            wait(futures)  # of both, also if one fails: nothing goes on behind the caller's back
            return [future.result() for future in futures]
        return [start(call, threads).result() for call in calls]
    finally:
        torch.set_num_threads(threads)  # what new threads begin with is what was set last, in any of them


def compile_nets(nets: dict[str, torch.nn.Module], device: torch.device) -> dict[str, Callable]:
    """Compile networks, into CUDA graphs, as second names, so that those in a state stay as they are.

    Sizes are fixed in training, so that no graph is made for all of them.
    raises: InputError on anything but CUDA
    """
    if device.type != "cuda":
        raise InputError(f"--compile: gains nothing on {device.type} (benchmarks/NOTES.md); leave the flag out")
    # micro-batches come in many sizes; after 8 of them, torch would go on uncompiled
    torch._dynamo.config.recompile_limit = 64  # ty: ignore[invalid-assignment]
    return {name: torch.compile(net, mode="reduce-overhead", dynamic=False) for name, net in nets.items()}
