"""A command as a process."""

import errno
import functools
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch

from toolkit.distributed import join_ranks, leave_ranks, max_over_ranks, rank, world_size
from utils import InputError, RunError, say


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


def command(main: Callable) -> Callable:
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
        if self.signum is not None and world_size() == 1:  # torchrun hands Ctrl-C on to ranks that had it already
            raise SystemExit(128 + signum)
        if self.signum is None and rank() == 0:
            again = "; once more to leave without saving" if world_size() == 1 else ""
            with suppress(OSError):  # of a terminal that is lost; not by `say`, whose stream may be in use right now
                os.write(2, f"\nfinishing this step, then saving{again}\n".encode())
        self.signum = signum

    def agreed(self) -> int:
        """The signal that this rank or another got, or 0; all ranks have to call it."""
        return max_over_ranks(self.signum or 0)

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
