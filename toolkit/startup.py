"""The first import of every command, since two things have to be settled before torch is loaded.

Ctrl-C during the imports, which take seconds, ends a command without a traceback. Later toolkit.process.command turns the
signal into KeyboardInterrupt again. A program that only imports a command, such as a test or a notebook, keeps its own
handler.

torch's CPU threads wait for each other many times in a step. By default they do so in a loop, which takes the core from
the very thread that they wait for as soon as another program is busy (benchmarks/shared_cores.py). Here they sleep.
"""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when OpenMP is loaded; workers inherit it
main_file = getattr(sys.modules["__main__"], "__file__", None)
is_command = main_file is not None and Path(main_file).resolve().parent == Path(__file__).resolve().parents[1]
if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
