"""What breaks from outside, for tests: a disk that is full, a process that ends or is stopped in the middle, time."""

import signal
import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from cyclegan import CycleGAN


class FakeTime:
    """A clock of the wall that stands still between two looks, unless it is set; for the rooms that show time."""

    def __init__(self):
        self.now = 1000.0
        self.strftime = time.strftime

    def monotonic(self):
        return self.now


@contextmanager
def steps_that_take(seconds):
    """Within the block each step of a training takes so many seconds of a fake clock; the first of them 100 more."""
    clock = FakeTime()
    plain = CycleGAN.step
    calls = []

    def step(*args):
        calls.append(1)
        clock.now += seconds + (100 if len(calls) == 1 else 0)
        return plain(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.monitor.time", clock)
        patch.setattr(CycleGAN, "step", step)
        yield clock


class Dead(BaseException):
    """The process ends here: nothing in the code catches it."""


@contextmanager
def before_steps(actions: dict[int, Callable]):
    """Within the block some steps of a training, counted from 1, begin with a call."""
    plain = CycleGAN.step
    calls = []

    def step(*args):
        calls.append(1)
        if len(calls) in actions:
            actions[len(calls)]()
        return plain(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CycleGAN, "step", step)
        yield


@contextmanager
def dies_in_step(number):
    """Within the block a training ends without a word before its step `number`."""

    def die():
        raise Dead

    with before_steps({number: die}):
        try:
            yield
        except Dead:
            return
    raise AssertionError(f"there was no step {number}")


@contextmanager
def stops_in_step(number, signum):
    """Within the block a training gets a signal in its step `number`, and obeys it when that is done."""
    code = 0
    with before_steps({number: lambda: signal.raise_signal(signum)}):
        try:
            yield
        except SystemExit as error:
            code = error.code
    if code != 128 + signum:
        raise AssertionError(f"the training ended with {code}, expected {128 + signum}")


@contextmanager
def full_disk(room=0):
    """Within the block no file can grow beyond `room` bytes; the system refuses, as when the disk is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
