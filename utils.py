"""What every room leans on: one-line errors, ranks, stop signals, the image buffer.

Knows no network, file or flag. Nothing here runs when it is imported.
"""

import errno
import functools
import importlib.util
import io
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

RANK_TIMEOUT = timedelta(minutes=30)  # the first rank may draw or evaluate for that long while the others wait


# ---------------------------------------------------------------------------------------------
# One-line errors


class InputError(Exception):
    """Wrong flag, folder, image or file. One line: what was given, what was expected, what to do."""

    exit_code = 2


class RunError(Exception):
    """The program was called correctly, but failed while running."""

    exit_code = 1


def one_line(text: object) -> str:
    """Make `text` safe to print: line breaks, control characters and broken unicode are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def domain_names(dataset_name: str) -> tuple[str, str]:
    """What the domains of a data set are called: horse and zebra in horse2zebra; A and B where the name tells none."""
    parts = re.split(r"(?<=[^\W\d_])2(?=[^\W\d_])", dataset_name)  # a 2 between letters: not that of photos2 or v2.1
    return (parts[0], parts[1]) if len(parts) == 2 else ("A", "B")


def say(text: object, file: TextIO | None = None) -> None:
    """Print one line without tearing a progress bar apart; on stdout only the first rank speaks."""
    if rank() > 0 and file is not sys.stderr:
        return
    tqdm.write(one_line(text), file=file or sys.stdout)
    (file or sys.stdout).flush()


def warn(text: object) -> None:
    """Print a line on stderr about what the user should know, and go on."""
    say(f"warning: {text}", file=sys.stderr)


def counted(number: int, noun: str) -> str:
    """A number of things in words: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def is_folder_name(value: object) -> bool:
    """Whether a value, maybe out of a file, is one plain folder name, which cannot leave the folder that it is put into."""
    if not isinstance(value, str) or value in ("", ".", "..") or value[0] == "-":
        return False
    return all(c not in '/\\:*?"<>|' and c.isprintable() for c in value)


def need_package(name: str, flag: str, command: str) -> None:
    """Refuse, in one line with the remedy, what needs an optional package that is missing."""
    if importlib.util.find_spec(name) is None:
        raise InputError(f"{flag}: the package {name} is missing; install it with: {command}")


def explain(error: BaseException) -> tuple[int, str] | None:
    """Turn an expected error into its exit code and one line; None: a mistake of ours, let it be seen."""
    if isinstance(error, InputError | RunError):
        return error.exit_code, str(error)
    if isinstance(error, OSError):
        code = 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2
        reason = f"{error.filename or 'output'}: {error.strerror or error}"
        return code, f"{reason}; check the path, its rights and the space left"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return (
            1,
            "out of memory; training, lower --batch_size, or --img_height and --img_width; testing, take --tile 512",
        )
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        reason = str(error).strip().splitlines()[0]
        return 1, f"a process that reads images died ({reason}); is the memory full? Lower --num_workers, then resume"
    return None


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit with 143 on which unfinished files are removed."""
    if threading.current_thread() is not threading.main_thread() or "TORCHELASTIC_RUN_ID" in os.environ:
        yield  # elsewhere Python takes no signals; and torchrun must be able to end ranks that wait for each other
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stage(main: Callable) -> Callable:
    """Decorate a stage's main: expected errors end in one line on stderr and their exit code."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> object:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a console that cannot write → must not end a training
                stream.reconfigure(errors="backslashreplace")
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as the stages leave it while they import
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with exit_on_sigterm():
                join_ranks()
                result = main(argv)
                leave_ranks()
                return result
        except (Exception, KeyboardInterrupt) as error:
            explained = explain(error)
            if explained is None:
                raise
        code, words = explained
        if rank() > 0:  # what stops all ranks is said by the first; torchrun then ends the others during this wait
            time.sleep(3)
            words = f"rank {rank()}: {words}"
        say(f"error: {words}", file=sys.stderr)
        raise SystemExit(code)

    return run


# ---------------------------------------------------------------------------------------------
# Ranks: the processes that torchrun started, each with its slice of every batch. A world of one is the ordinary case.
# Gradients are averaged by hand, in one message a step, and not by DistributedDataParallel: so a rank may process its
# slice in micro-batches, or again after it ran out of memory, while the others wait. Dead ranks are the business of
# torchrun, of the process group's timeout and of NCCL's watchdog.


def rank() -> int:
    """Number of this process among those of the run; 0 writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes work on the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks() -> None:
    """Meet the other processes, if torchrun started this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
    cards = torch.cuda.device_count()
    nccl = dist.is_nccl_available() and cards >= ranks_here
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"  # NCCL refuses ranks that share a GPU
    dist.init_process_group(backend, timeout=RANK_TIMEOUT)
    if 0 < cards < ranks_here:
        say(f"{ranks_here} ranks share {cards} of this machine's GPUs, over gloo: slower than one rank a GPU")


def leave_ranks() -> None:
    """Wait until all ranks are done, the first with its writing, too."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


@contextmanager
def collective() -> Iterator[None]:
    """Turn torch's error about a lost rank into one line."""
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
    with collective():
        dist.all_reduce(flat)
    flat /= world()
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.detach().copy_(mean.view_as(x))


def max_over_ranks(number: int) -> int:
    """The largest of the ranks' numbers; all ranks have to call it."""
    largest = torch.tensor(int(number))
    if world() > 1:
        with collective():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def barrier() -> None:
    """Wait until all ranks are here."""
    max_over_ranks(0)


def gather(value: object) -> list:
    """The values of all ranks in their order, at the first; elsewhere an empty list."""
    if world() == 1:
        return [value]
    values = [None] * world() if rank() == 0 else None
    with collective():
        dist.gather_object(value, values)
    return values or []


def first_rank(function: Callable) -> Callable:
    """Decorate what writes: only the first rank runs it, the others get None."""

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        return function(*args, **kwargs) if rank() == 0 else None

    return call


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Let the first rank run a block before the others, which then find its work done."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def rank_slice(batch_size: int) -> slice:
    """The part of every batch that this rank processes."""
    if batch_size % world():
        fitting = max(1, round(batch_size / world())) * world()
        raise InputError(f"--batch_size {batch_size}: cannot be shared by {world()} ranks; expected such as {fitting}")
    length = batch_size // world()
    return slice(rank() * length, (rank() + 1) * length)


# ---------------------------------------------------------------------------------------------
# Stop signals


class StopRequest:
    """Turn Ctrl-C, SIGTERM and a lost terminal into a request that the loop reads between two steps.

    The first is answered at once, a second one obeyed. nohup's choice to ignore the loss of the terminal is kept.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
            signals = {signal.SIGINT, signal.SIGTERM}
            hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
            if signal.getsignal(hangup) != signal.SIG_IGN:
                signals.add(hangup)
            for signum in signals:
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and world() == 1:  # torchrun hands Ctrl-C on to ranks that had it already
            raise SystemExit(128 + signum)
        if self.signum is None and rank() == 0:
            again = "; once more to leave without saving" if world() == 1 else ""
            with suppress(OSError):  # of a terminal that is lost; not by `say`, whose stream may be in use right now
                os.write(2, f"\nfinishing this step, then saving{again}\n".encode())
        self.signum = signum

    def agreed(self) -> int:
        """The signal that this rank or another got, or 0; all ranks have to call it."""
        return max_over_ranks(self.signum or 0)

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


# ---------------------------------------------------------------------------------------------
# The buffer of translated images


class FakeImageBuffer:
    """The last translated images, so that a discriminator also sees earlier ones.

    Until it is full every image is kept and handed back; then each is, with probability 1/2,
    exchanged for a kept one.
    source: Shrivastava et al. 2017, section 2.3; size 50 in Zhu et al. 2017, section 4
    """

    def __init__(self, size: int, seed: object):
        self.size = size
        self.images: list[Tensor] = []
        self._rng = random.Random(str(seed))

    def exchange(self, images: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W) of new and older images, without gradient."""
        exchanged = []
        for image in images.detach():
            if len(self.images) < self.size:
                self.images.append(image.clone())
            elif self.size and self._rng.random() < 0.5:
                i = self._rng.randrange(self.size)
                older = self.images[i]
                self.images[i] = image.clone()
                image = older
            exchanged.append(image)
        return torch.stack(exchanged)

    def mark(self) -> tuple:
        """Note the present state, cheaply; images are replaced, never changed."""
        return list(self.images), self._rng.getstate()

    def back_to(self, mark: tuple) -> None:
        """Return to a noted state."""
        images, random_state = mark
        self.images = list(images)
        self._rng.setstate(random_state)

    def state_dict(self) -> dict:
        return {"images": [x.cpu() for x in self.images], "rng": self._rng.getstate()}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Put back a state; of a larger buffer only the first `size` images are kept."""
        self.images = [x.to(device) for x in state["images"]][: self.size]
        self._rng.setstate(state["rng"])
