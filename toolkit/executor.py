"""How a training step is executed: precision, micro-batches, a retry when memory runs out, CPU threads, compilation."""

import copy
import functools
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.devices import autocast, rng_state, set_rng_state
from toolkit.distributed import max_over_ranks
from utils import InputError, counted, in_range, option, say, warn

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LEAST_WIDTH = 64  # channels between the blocks of a generator below which channels_last has not been faster
LEAST_GAIN = 1.03  # of channels_last, to be preferred: below it, chance would decide


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
        "auto", "images at once; auto: all, on a GPU as many as fit into its memory", parse=parse_micro_batch
    )
    compile: bool = option(False, "compile the networks into CUDA graphs; the first steps then take minutes")
    memory_format: str = option(
        "auto",
        "memory layout of the networks; auto: on a CPU the faster one, as measured when a run begins",
        choices=("auto", *MEMORY_FORMATS),
    )


class Executor:
    """Runs the forward and backward passes of a step.

    in_order: whether both halves of a step have to run one after the other: where random numbers are drawn, running
              statistics change, or more than two gradients of a weight are added
    raises:   InputError for settings that are not supported
    """

    def __init__(
        self, networks: dict[str, nn.Module], config: ExecutorConfig, precision: str, norm: str, in_order: bool = False
    ):
        if norm == "batch" and config.micro_batch != "auto":
            raise InputError(f"--micro_batch {config.micro_batch}: not with --norm batch; lower --batch_size instead")
        self.device = next(networks["G_AB"].parameters()).device
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.micro_batch_size = 0 if isinstance(config.micro_batch, str) else config.micro_batch  # 0: the whole batch
        self.may_shrink = config.micro_batch == "auto" and norm != "batch"
        self.in_order = in_order
        self.compiled = compile_networks(networks, self.device) if config.compile else {}
        self.networks = {**networks, **self.compiled}

    def backward(self, loss_function: Callable, *halves: tuple) -> tuple[dict[str, Tensor], list[Any]]:
        """Add up the gradients of a loss over two batches; on a CPU both at the same time, in a thread each.

        loss_function: (key, micro-batch of each tensor) → loss, its terms by name, images or None
        halves:        two tuples of a key and the tensors of its batch
        returns:       means of the terms over each batch, those of one name added; the images of each half, detached
        """
        calls = [functools.partial(self._backward, loss_function, *half) for half in halves]
        if self.device.type == "cpu":
            results = run_in_threads(calls, at_once=not (self.in_order or self.micro_batch_size or self.compiled))
        else:
            results = [call() for call in calls]
        losses: dict[str, Tensor] = {}
        for terms, _ in results:
            for name, value in terms.items():
                losses[name] = losses[name] + value if name in losses else value
        return losses, [images for _, images in results]

    def _backward(self, loss_function: Callable, key: Any, *batches: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Process one batch, micro-batch by micro-batch."""
        size = self.micro_batch_size or len(batches[0])
        means: dict[str, Any] = defaultdict(float)
        outputs = []
        for micro_batches in zip(*(batch.split(size) for batch in batches), strict=True):
            with autocast(self.device, self.precision):
                loss, terms, images = loss_function(key, *micro_batches)
            if images is not None:
                outputs.append(images.detach().clone())  # the next replay of a CUDA graph overwrites its output
            weight = len(micro_batches[0]) / len(batches[0])
            if loss.requires_grad:
                self.scaler.scale(weight * loss).backward()
            for name, value in terms.items():
                means[name] = means[name] + weight * value.detach()
            del loss, terms, images  # free their memory before the next micro-batch
        return dict(means), torch.cat(outputs) if outputs else None


def retry_in_micro_batches(compute_gradients: Callable) -> Callable:
    """Decorate a method that computes the gradients of one batch: when memory runs out, retry in smaller micro-batches.

    The method belongs to a model with an `executor` and image `buffers`; these and the random state are restored first.
    """

    @functools.wraps(compute_gradients)
    def run(model: Any, real_A: Tensor, real_B: Tensor) -> Any:
        executor: Executor = model.executor
        snapshots = {domain: buffer.snapshot() for domain, buffer in model.buffers.items()}
        random_state = rng_state()
        while True:
            try:
                if executor.compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                return compute_gradients(model, real_A, real_B)
            except torch.OutOfMemoryError:
                size = executor.micro_batch_size or len(real_A)
                if size == 1 or not executor.may_shrink:
                    raise
            # outside of `except`, whose traceback keeps the tensors alive
            executor.micro_batch_size = math.ceil(size / 2)
            if executor.compiled:
                torch.compiler.reset()  # CUDA graphs keep the memory that they were recorded with
            torch.cuda.empty_cache()
            warn(f"out of memory: the batch of {len(real_A)} now runs in micro-batches of {executor.micro_batch_size}")
            for domain, snapshot in snapshots.items():
                model.buffers[domain].load_state_dict(snapshot, executor.device)
            set_rng_state(random_state)

    return run


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


def pick_memory_format(
    generator: Any, discriminator: nn.Module, batch_shape: Sequence[int], precision: str, in_order: bool
) -> str:
    """Measure in which memory format a training step is faster; returns a key of MEMORY_FORMATS, the same on all ranks.

    Copies of the networks process noise, forward and backward, in turns: as much as three or four steps. Only a CPU is
    measured, and only networks wide enough to gain.
    batch_shape: (N, C, H, W) of the images of one domain that are processed at once
    in_order:    whether both halves of a step run one after the other
    """
    device = next(generator.parameters()).device
    if device.type != "cpu" or generator.config.hidden_width < LEAST_WIDTH:
        return "contiguous"
    say(f"comparing two memory formats, for about as long as four steps of {counted(batch_shape[0], 'image')}")
    noise = torch.rand(2 * batch_shape[0], *batch_shape[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
    seconds: dict[str, list[float]] = {name: [] for name in MEMORY_FORMATS}
    copies = {}
    for name, layout in MEMORY_FORMATS.items():
        copies[name] = [
            copy.deepcopy(net).requires_grad_().to(memory_format=layout) for net in (generator, discriminator)
        ]

    def differentiate(G: nn.Module, D: nn.Module) -> None:
        with autocast(device, precision):
            loss = D(G(noise)).float().sum()
        torch.autograd.grad(loss, [*G.parameters(), *D.parameters()], allow_unused=True)

    for turn in range(3):
        for name, networks in copies.items():
            start = time.perf_counter()
            run_in_threads([functools.partial(differentiate, *networks)] * 2, at_once=not in_order)
            if turn > 0:  # the first includes set-up
                seconds[name].append(time.perf_counter() - start)
    gain = min(seconds["contiguous"]) / min(seconds["channels_last"])
    is_faster = bool(max_over_ranks(int(gain > LEAST_GAIN)))
    chosen = "channels_last" if is_faster else "contiguous"
    say(f"memory format: {chosen}; channels_last is {gain:.2f} times as fast as contiguous here")
    return chosen


def set_inference_format(net: Any, device: torch.device, precision: str) -> None:
    """Put a generator that only translates into channels_last where that is faster: in float32 on a CPU, if it is wide."""
    if device.type == "cpu" and precision == "fp32" and net.config.generator == "resnet":
        is_wide = net.config.hidden_width >= LEAST_WIDTH
        net.to(memory_format=MEMORY_FORMATS["channels_last" if is_wide else "contiguous"])


def compile_networks(networks: dict[str, nn.Module], device: torch.device) -> dict[str, Callable]:
    """Compile networks into CUDA graphs, without changing their saved names; raise InputError on anything but CUDA."""
    if device.type != "cuda":
        raise InputError(f"--compile: no gain on {device.type} (benchmarks/NOTES.md); leave the flag out")
    # each size of micro-batch is compiled anew; after 8 of them torch would continue uncompiled
    torch._dynamo.config.recompile_limit = 64  # ty: ignore[invalid-assignment]
    return {name: torch.compile(net, mode="reduce-overhead", dynamic=False) for name, net in networks.items()}
