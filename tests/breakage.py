"""Faults from outside, for tests: a full disk, a process that dies or is stopped in the middle, and a fake clock."""

import signal
import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from cyclegan import CycleGAN


class FakeTime:
    """Stands in for the module `time`; its clock moves only when a test sets it."""

    def __init__(self):
        self.now = 1000.0
        self.strftime = time.strftime

    def monotonic(self):
        return self.now


@contextmanager
def before_steps(actions: dict[int, Callable]):
    """Within the block, call an action before some training steps, counted from 1."""
    original = CycleGAN.step
    count = 0

    def step(*args):
        nonlocal count
        count += 1
        if count in actions:
            actions[count]()
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CycleGAN, "step", step)
        yield


@contextmanager
def steps_that_take(seconds):
    """Within the block, each training step takes so many seconds of a fake clock, and the first 100 more."""
    clock = FakeTime()
    original = CycleGAN.step
    first = True

    def step(*args):
        nonlocal first
        clock.now += seconds + (100 if first else 0)
        first = False
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.monitor.time", clock)
        patch.setattr(CycleGAN, "step", step)
        yield clock


class Dead(BaseException):
    """Ends the process: nothing in the code catches it."""


@contextmanager
def dies_in_step(number):
    """Within the block, the training process dies just before step `number`."""

    def die():
        raise Dead

    with pytest.raises(Dead), before_steps({number: die}):
        yield


@contextmanager
def stops_in_step(number, signum):
    """Within the block, the training gets a signal in step `number` and has to exit with its code."""
    with pytest.raises(SystemExit) as stop, before_steps({number: lambda: signal.raise_signal(signum)}):
        yield
    assert stop.value.code == 128 + signum


@contextmanager
def full_disk(room=0):
    """Within the block, no file can grow beyond `room` bytes; writes fail as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
