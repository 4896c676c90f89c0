"""How a training step is executed: precision, micro-batches, a retry when memory runs out, CPU threads, compilation."""

import functools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.devices import autocast, rng_state, set_rng_state
from utils import FakeImageBuffer, InputError, in_range, option, warn


def parse_micro_batch(text: str) -> int | str:
    """Accept "auto" or a number of images; else raise ValueError."""
    if text == "auto":
        return text
    if not text.isdecimal() or not in_range(int(text), least=1):
        raise ValueError(f"given {text!r}, expected auto or an integer of at least 1")
    return int(text)


@dataclass(frozen=True)
class ExecutorConfig:
    """How a batch is processed; the results are the same but for rounding."""

    micro_batch: int | str = option(
        "auto", "images processed at once; auto: the whole batch, less when memory runs out", parse=parse_micro_batch
    )
    compile: bool = option(False, "compile the networks into CUDA graphs; the first steps then take minutes")


class Executor:
    """Runs the forward and backward passes of a step; raises InputError for settings that are not supported."""

    def __init__(
        self, networks: dict[str, nn.Module], device: torch.device, precision: str, config: ExecutorConfig, norm: str
    ):
        if norm == "batch" and config.micro_batch != "auto":
            raise InputError(
                f"--micro_batch {config.micro_batch}: with --norm batch the statistics would be those of a micro-batch; leave it out, or lower --batch_size"
            )
        self.device = device
        self.precision = precision
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.micro_batch_size = 0 if isinstance(config.micro_batch, str) else config.micro_batch  # 0: the whole batch
        self.may_shrink = config.micro_batch == "auto" and norm != "batch"
        self.compiled = compile_networks(networks, device) if config.compile else {}
        self.networks = {**networks, **self.compiled}

    def autocast(self) -> AbstractContextManager:
        return autocast(self.device, self.precision)

    def run(self, compute: Callable[[], Any], batch_size: int, buffers: Iterable[FakeImageBuffer]) -> Any:
        """Return compute(); when memory runs out, restore buffers and random state, and retry in smaller micro-batches."""
        snapshots = [(buffer, buffer.snapshot()) for buffer in buffers]
        random_state = rng_state()
        while True:
            try:
                if self.compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                return compute()
            except torch.OutOfMemoryError:
                size = self.micro_batch_size or batch_size
                if size == 1 or not self.may_shrink:
                    raise
            # outside of `except`, whose traceback keeps the tensors alive
            self.micro_batch_size = math.ceil(size / 2)
            if self.compiled:
                torch.compiler.reset()  # CUDA graphs keep the memory that they were recorded with
            torch.cuda.empty_cache()
            size = self.micro_batch_size
            warn(f"out of memory: from now on the batch of {batch_size} runs in micro-batches of {size}")
            for buffer, snapshot in snapshots:
                buffer.load_state_dict(snapshot, self.device)
            set_rng_state(random_state)

    def backward(self, loss_function: Callable, *batches: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Accumulate the gradients of a loss over a batch, micro-batch by micro-batch.

        loss_function: (micro-batch of each of `batches`) → loss, its terms by name, an image or None for each input
        returns:       means of the terms over the batch; the images, detached
        """
        size = self.micro_batch_size or len(batches[0])
        means: dict[str, Any] = defaultdict(float)
        outputs = []
        for micro_batches in zip(*(batch.split(size) for batch in batches), strict=True):
            loss, terms, images = loss_function(*micro_batches)
            if images is not None:
                outputs.append(images.detach().clone())  # the next replay of a CUDA graph overwrites its output
            weight = len(micro_batches[0]) / len(batches[0])
            if loss.requires_grad:
                self.scaler.scale(weight * loss).backward()
            for name, value in terms.items():
                means[name] = means[name] + weight * value.detach()
            del loss, terms, images  # free their memory before the next micro-batch
        return dict(means), torch.cat(outputs) if outputs else None

    def run_both(self, function: Callable, arguments: Sequence, in_order: bool) -> list:
        """Return function(x) for two arguments; on a CPU at the same time, in a thread each, unless in_order.

        The order counts where random numbers are drawn, or more than two gradients of a weight are added.
        """
        calls = [functools.partial(function, x) for x in arguments]
        if self.device.type != "cpu":
            return [call() for call in calls]
        return run_in_threads(calls, at_once=not (in_order or self.micro_batch_size or self.compiled))


@functools.cache
def _thread_pair(pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2)  # a forked process needs its own


def run_in_threads(calls: Sequence[Callable], at_once: bool) -> list:
    """Return the results of two calls, made in threads of their own so that the main thread still receives signals.

    at_once: both at the same time with half of torch's CPU threads each, else one after the other with all of them
    """
    threads = torch.get_num_threads()

    def start(call: Callable, share: int) -> Future:
        def run() -> object:
            torch.set_num_threads(share)  # of this thread
            return call()

        return _thread_pair(os.getpid()).submit(run)

    try:
        if at_once and threads > 1:
            futures = [start(call, threads // 2) for call in calls]
            wait(futures)  # for both, even if one fails: nothing may continue in the background
            return [future.result() for future in futures]
        return [start(call, threads).result() for call in calls]
    finally:
        torch.set_num_threads(threads)  # a new thread starts with the number that any thread set last


def compile_networks(networks: dict[str, nn.Module], device: torch.device) -> dict[str, Callable]:
    """Compile networks into CUDA graphs, without changing their saved names; raise InputError on anything but CUDA."""
    if device.type != "cuda":
        raise InputError(f"--compile: no gain on {device.type} (benchmarks/NOTES.md); leave the flag out")
    # each size of micro-batch is compiled anew; after 8 of them torch would continue uncompiled
    torch._dynamo.config.recompile_limit = 64  # ty: ignore[invalid-assignment]
    return {name: torch.compile(net, mode="reduce-overhead", dynamic=False) for name, net in networks.items()}
