"""A command as a process: exit codes, one-line errors, signals."""

import errno
import functools
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

import torch

from toolkit.distributed import join_ranks, leave_ranks, max_over_ranks, rank, world_size
from utils import InputError, RunError, say


def explain(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the one line of an expected error; None for any other, which is a bug."""
    if isinstance(error, InputError | RunError):
        return error.exit_code, str(error)
    if isinstance(error, OSError):
        code = 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2
        file = error.filename or "output"
        return code, f"{file}: {error.strerror or error}; check the path, its rights and the space left"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):  # on a CPU
        return 1, "out of memory; lower --batch_size, or --img_height and --img_width; when testing, use --tile 512"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        reason = str(error).strip().splitlines()[0]
        return 1, f"a process that reads images died ({reason}); is the memory full? Lower --num_workers, then resume"
    return None


def command(main: Callable) -> Callable:
    """Decorate the main function of a command: expected errors become one line on stderr and an exit code."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> object:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a console that cannot print → must not end a training run
                stream.reconfigure(errors="backslashreplace")
        before = None
        in_main_thread = threading.current_thread() is threading.main_thread()  # others cannot set signal handlers
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as toolkit.startup left it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if in_main_thread and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun ends ranks that wait for each other
            before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes unfinished files
        try:
            join_ranks()
            result = main(argv)
            leave_ranks()
            return result
        except (Exception, KeyboardInterrupt) as error:
            explained = explain(error)
            if explained is None:
                raise
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
        code, message = explained
        if rank() > 0:  # the first rank reports what stops all; torchrun ends the others during this wait
            time.sleep(3)
            message = f"rank {rank()}: {message}"
        say(f"error: {message}", file=sys.stderr)
        raise SystemExit(code)

    return run


class StopRequest:
    """Turn Ctrl-C, SIGTERM and a lost terminal into a request to stop; a second signal ends the program."""

    signum: int | None = None

    def __enter__(self) -> "StopRequest":
        signals = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        if threading.current_thread() is not threading.main_thread():
            signals = []  # other threads get no signals
        self._previous = {signum: signal.signal(signum, self._note) for signum in signals}
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and world_size() == 1:  # torchrun repeats Ctrl-C to ranks that already got it
            raise SystemExit(128 + signum)
        if self.signum is None and rank() == 0:
            again = "; once more to leave without saving" if world_size() == 1 else ""
            with suppress(OSError):  # of a lost terminal; not `say`, whose stream may be in use at this moment
                os.write(2, f"\nfinishing this step, then saving{again}\n".encode())
        self.signum = signum

    def agreed(self) -> int:
        """Return the signal that this or another rank got, or 0; all ranks have to call it."""
        return max_over_ranks(self.signum or 0)

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
