"""Commands as processes: exit codes, one-line errors, signals, and what happens before torch is loaded."""

import errno
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from toolkit import process, startup
from toolkit.process import StopRequest, command, explain
from utils import InputError, RunError

ROOT = Path(train.__file__).parent


def run_command(function, argv=()):
    """Run a function as a command that must exit; returns its exit code."""
    with pytest.raises(SystemExit) as exit_:
        command(function)(argv)
    return exit_.value.code


def raising(error):
    def main(argv):
        raise error

    return main


# -- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (InputError("a\nb\x1b[31m"), 2, "error: a\\nb\\x1b[31m\n"),
        (RunError("a\nb\x1b[31m"), 1, "error: a\\nb\\x1b[31m\n"),
        (FileExistsError(errno.EEXIST, "File exists", "runs"), 2, "runs: File exists; check the path"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x.pt"), 1, "x.pt: Disk quota exceeded"),
        (MemoryError(), 1, "out of memory; lower --batch_size"),
        (torch.OutOfMemoryError("CUDA"), 1, "out of memory; lower --batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; lower --batch_size"),
        (RuntimeError("DataLoader worker (pid 7) is killed.\nmore"), 1, "(DataLoader worker (pid 7) is killed.); is"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_an_expected_error_is_one_line_and_an_exit_code(capsys, error, code, expected):
    assert run_command(raising(error)) == code
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a mistake"), RuntimeError("shapes differ"), AssertionError()])
def test_an_unexpected_error_keeps_its_traceback(error):
    assert explain(error) is None
    with pytest.raises(type(error)):
        command(raising(error))([])


def test_a_command_passes_on_its_result_and_its_own_exit():
    assert command(lambda argv: argv)(["a"]) == ["a"]
    assert run_command(raising(SystemExit(7))) == 7


def test_a_rank_that_is_not_the_first_gives_its_number(capsys, monkeypatch):
    monkeypatch.setattr(process, "rank", lambda: 3)
    monkeypatch.setattr(process, "time", SimpleNamespace(sleep=lambda seconds: None))
    assert run_command(raising(InputError("wrong"))) == 2
    assert capsys.readouterr().err == "error: rank 3: wrong\n"


# -- signals ---------------------------------------------------------------------------------


def test_sigterm_ends_a_command_with_143_after_it_has_cleaned_up():
    cleaned = []
    before = signal.getsignal(signal.SIGTERM)

    def main(argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)

    assert run_command(main) == 143
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_acknowledged_and_the_second_ends_the_program(signum, capfd):
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        assert stop.agreed() == 0
        signal.raise_signal(signum)
        assert stop.agreed() == signum
        assert capfd.readouterr().err == "\nfinishing this step, then saving; once more to leave without saving\n"
        with pytest.raises(SystemExit, match=str(128 + signum)):
            signal.raise_signal(signum)
    assert signal.getsignal(signum) is before


def test_with_several_ranks_a_second_signal_does_not_end_the_program(monkeypatch, capfd):
    """torchrun repeats to all ranks what the terminal has sent to them."""
    monkeypatch.setattr(process, "world_size", lambda: 2)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
    assert capfd.readouterr().err == "\nfinishing this step, then saving\n"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals to lose")
@pytest.mark.parametrize(("handler", "noted"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_lost_terminal_is_a_request_to_stop_unless_nohup_ignores_it(handler, noted):
    before = signal.signal(signal.SIGHUP, handler)  # the tests themselves may run under nohup
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signum == (signal.SIGHUP if noted else None)
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_signal_handlers_are_left_alone(keep_sigint):
    def main(argv):
        with StopRequest() as stop:
            return stop.signum, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    found = []
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    thread = threading.Thread(target=lambda: found.append(command(main)()))
    thread.start()
    thread.join()
    assert found == [(None, before, signal.SIG_DFL)]


# -- startup ---------------------------------------------------------------------------------


@pytest.fixture
def keep_sigint():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("main_file", "before", "after"),
    [
        (ROOT / "train.py", signal.default_int_handler, signal.SIG_DFL),
        (ROOT / "train.py", signal.SIG_IGN, signal.SIG_IGN),  # as a shell starts programs in the background
        (ROOT / "tests" / "test_train.py", signal.default_int_handler, signal.default_int_handler),
        (None, signal.default_int_handler, signal.default_int_handler),  # a notebook
    ],
)
def test_only_a_command_itself_has_another_handler_of_ctrl_c_while_it_imports(
    monkeypatch, keep_sigint, main_file, before, after
):
    signal.signal(signal.SIGINT, before)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=main_file))
    runpy.run_path(startup.__file__)
    assert signal.getsignal(signal.SIGINT) == after


def test_threads_sleep_while_they_wait_unless_the_user_wants_otherwise(monkeypatch):
    for before, after in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY")
        if before:
            monkeypatch.setenv("OMP_WAIT_POLICY", before)
        runpy.run_path(startup.__file__)
        assert os.environ["OMP_WAIT_POLICY"] == after


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
def test_openmp_knows_how_to_wait_when_a_command_loads_it(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("OMP_DISPLAY_ENV", "TRUE")
    done = subprocess.run([sys.executable, "-c", "import train"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


def test_ctrl_c_is_one_line_once_the_imports_are_done(keep_sigint, capsys):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    assert run_command(lambda argv: signal.raise_signal(signal.SIGINT)) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see how far the imports are")
def test_ctrl_c_during_the_imports_ends_without_a_traceback():
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    maps = Path(f"/proc/{running.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert (running.returncode, out) == (-signal.SIGINT, "")  # which a shell calls 130
    assert "Traceback" not in err
