"""Devices, precision, memory, seeds, and what is chosen for a GPU by rule."""

import functools
import math
import multiprocessing
import os
import random
import signal
import threading
import time

import pytest
import torch

from toolkit import devices, executor
from utils import InputError

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# -- device, precision, memory, seeds --------------------------------------------------------


def test_devices_and_precisions_are_resolved_or_refused():
    assert devices.pick_device("cpu").type == "cpu"
    assert devices.pick_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "tpu", "meta", "xpu", ""):
        with pytest.raises(InputError, match="--device"):
            devices.pick_device(name)
    assert devices.pick_precision("fp32", CPU) == "fp32"
    assert devices.pick_precision("auto", CPU) in ("fp32", "bf16")
    with pytest.raises(InputError, match=r"--precision fp16: needs a CUDA GPU; expected on cpu: (bf16|fp32)"):
        devices.pick_precision("fp16", CPU)


def test_auto_takes_what_the_device_computes_natively(monkeypatch):
    cuda = torch.device("cuda")
    for capability, precision in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert devices.pick_precision("auto", cuda) == precision
    assert devices.pick_precision("fp16", cuda) == "fp16"


def test_a_cpu_is_asked_by_names_that_torch_may_not_have(monkeypatch):
    for names in (("_is_avx512_bf16_supported",), ("_is_amx_tile_supported",), ()):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.delattr(torch.cpu, name, raising=False)
        for name in names:
            monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
        assert devices.has_native_bf16(CPU) == bool(names)
    assert not devices.has_native_bf16(torch.device("mps"))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_networks_compute_in_the_precision_and_keep_their_weights(precision, dtype):
    layer = torch.nn.Linear(2, 2)
    with devices.autocast(CPU, precision):
        assert layer(torch.ones(1, 2)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_memory_is_told_or_taken_for_endless(monkeypatch):
    total = devices.total_memory(CPU)
    assert 2**20 < devices.free_memory() <= total < math.inf
    monkeypatch.setattr(os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert devices.total_memory(CPU) == math.inf
    monkeypatch.setattr(devices.Path, "read_text", lambda *_, **__: "MemTotal: 7 kB\n")
    assert devices.free_memory() == math.inf


def test_a_seed_decides_the_numbers_of_python_and_torch():
    def numbers(seed):
        devices.seed_everything(seed)
        return random.random(), torch.rand(3).tolist()

    assert numbers(3) == numbers(3)
    assert numbers(3)[0] != numbers(4)[0]
    assert numbers(3)[1] != numbers(4)[1]


def test_deterministic_is_switched_on_and_off_again(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    devices.seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    devices.seed_everything(0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_random_numbers_go_on_where_their_state_was_noted(tmp_path):
    torch.save(devices.rng_state(), tmp_path / "rng.pt")
    expected = [random.random(), *torch.rand(3).tolist()]
    devices.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))  # plain values: no code in it
    assert [random.random(), *torch.rand(3).tolist()] == expected


# -- compilation -----------------------------------------------------------------------------


def test_networks_are_compiled_into_cuda_graphs_of_one_size(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net, **options: (net, options))
    nets = {"G_AB": torch.nn.Linear(1, 1), "D_A": torch.nn.Linear(1, 1)}
    with torch._dynamo.config.patch(recompile_limit=8):
        compiled = executor.compile_nets(nets, torch.device("cuda"))
    assert compiled == {name: (net, {"mode": "reduce-overhead", "dynamic": False}) for name, net in nets.items()}
    with pytest.raises(InputError, match=r"--compile: gains nothing on cpu .*; leave the flag out"):
        executor.compile_nets(nets, CPU)


# -- choices by rule -------------------------------------------------------------------------


def test_backends_of_a_gpu_are_set_and_those_of_a_cpu_left_alone(monkeypatch):
    precisions = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    for device, deterministic, before, after in (
        *(("cuda", False, False, True), ("cuda", True, True, False)),
        *(("cpu", False, False, False), ("cpu", False, True, True)),
    ):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
        devices.set_cudnn_benchmark(torch.device(device), deterministic)
        assert torch.backends.cudnn.benchmark == after
        devices.set_tf32(torch.device(device))
    assert precisions == ["high", "high"]


def test_only_beside_a_gpu_images_are_read_by_other_processes():
    assert devices.default_workers(CPU) == 0
    assert devices.default_workers(torch.device("cuda")) == 4


# -- threads ---------------------------------------------------------------------------------


def test_two_calls_run_at_once_and_share_the_threads_of_the_cpu(two_threads):
    meeting = threading.Barrier(2, timeout=20)  # a call that came alone would break it

    def call(name):
        meeting.wait()
        return name, torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    calls = [functools.partial(call, name) for name in "AB"]
    assert executor.in_threads(calls, at_once=True) == [("A", 1, False), ("B", 1, False)]
    assert torch.get_num_threads() == 2
    meeting.reset()
    with pytest.raises(threading.BrokenBarrierError):
        executor.in_threads([functools.partial(meeting.wait, 0.1)] * 2, at_once=False)


@pytest.mark.parametrize(("threads", "at_once"), [(2, False), (1, True)])
def test_calls_that_follow_one_another_have_all_threads(threads, at_once, two_threads):
    torch.set_num_threads(threads)
    began = []

    def call(name):
        began.append(name)
        time.sleep(0.01 if name == "A" else 0)
        return name, len(began), torch.get_num_threads()

    calls = [functools.partial(call, name) for name in "AB"]
    assert executor.in_threads(calls, at_once) == [("A", 1, threads), ("B", 2, threads)]


def test_nothing_goes_on_when_one_of_two_calls_has_failed(two_threads):
    ended = []

    def failing():
        raise torch.OutOfMemoryError

    def slow():
        time.sleep(0.1)
        ended.append(True)

    with pytest.raises(torch.OutOfMemoryError):
        executor.in_threads([failing, slow], at_once=True)
    assert ended == [True]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that sends a signal")
@pytest.mark.parametrize("at_once", [True, False])
def test_a_signal_is_heard_while_calls_compute(at_once, two_threads):
    heard = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda signum, frame: heard.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert executor.in_threads([lambda: heard.wait(20)] * 2, at_once) == [True, True]
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_threads_of_its_own(two_threads):
    executor.in_threads([int, int], at_once=True)
    process = multiprocessing.get_context("fork").Process(target=executor.in_threads, args=([int, int], True))
    process.start()
    process.join(20)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()
