"""The first import of every command: Ctrl-C during the imports, which take seconds, ends it without a traceback.

Later toolkit.process.command turns the signal into KeyboardInterrupt again. A program that only imports a command, such
as a test or a notebook, keeps its own handler.
"""

import signal
import sys
from pathlib import Path

main_file = getattr(sys.modules["__main__"], "__file__", None)
is_command = main_file is not None and Path(main_file).resolve().parent == Path(__file__).resolve().parents[1]
if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
