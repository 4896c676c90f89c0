"""Devices, precision, memory, seeds, and the choices by rule."""

import math
import os
import random

import pytest
import torch

from toolkit import devices
from utils import InputError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "meta", "xpu", ""])
def test_devices_that_this_machine_does_not_have_are_refused(name):
    with pytest.raises(InputError, match=rf"--device {name}: .* expected auto"):
        devices.pick_device(name)
    assert devices.pick_device("cpu") == CPU
    assert devices.pick_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")]
)
def test_auto_precision_is_what_a_gpu_computes_natively(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.pick_precision("auto", CUDA) == precision
    assert devices.pick_precision("fp16", CUDA) == "fp16"


@pytest.mark.parametrize(
    ("supported", "precision"),
    [(("_is_avx512_bf16_supported",), "bf16"), (("_is_amx_tile_supported",), "bf16"), ((), "fp32")],
)
def test_auto_precision_is_what_a_cpu_computes_natively(monkeypatch, supported, precision):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):  # private: torch may not have them
        monkeypatch.delattr(torch.cpu, name, raising=False)
    for name in supported:
        monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    assert devices.pick_precision("auto", CPU) == precision
    assert devices.pick_precision("fp32", CPU) == "fp32"
    assert devices.pick_precision("auto", torch.device("mps")) == "fp32"
    with pytest.raises(InputError, match=f"--precision fp16: needs a CUDA GPU; expected on cpu: {precision}"):
        devices.pick_precision("fp16", CPU)


def test_memory_is_infinite_where_the_system_does_not_tell(monkeypatch):
    assert 2**20 < devices.free_memory() < math.inf
    monkeypatch.setattr(devices.Path, "read_text", lambda *_, **__: "MemTotal: 7 kB\n")
    assert devices.free_memory() == math.inf


def numbers():
    return [random.random(), *torch.rand(3).tolist()]


def test_a_seed_determines_the_random_numbers_of_python_and_torch():
    found = []
    for seed in (3, 3, 4):
        devices.seed_everything(seed)
        found.append(numbers())
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])


def test_random_numbers_continue_from_a_saved_state(tmp_path):
    torch.save(devices.rng_state(), tmp_path / "rng.pt")
    expected = numbers()
    devices.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))  # plain values: no code in it
    assert numbers() == expected


def test_deterministic_algorithms_are_switched_on_and_off(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    devices.seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    devices.seed_everything(0)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("device", "deterministic", "before", "after"),
    [
        ("cuda", False, False, True),
        ("cuda", True, True, False),
        ("cpu", False, False, False),
        ("cpu", False, True, True),
    ],
)
def test_backend_flags_are_set_for_a_gpu_only(monkeypatch, device, deterministic, before, after):
    precisions = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    devices.set_backend_flags(torch.device(device), deterministic)
    assert torch.backends.cudnn.benchmark == after
    assert precisions == (["high"] if device == "cuda" else [])


@pytest.mark.parametrize(("gpus", "expected"), [(2, ["cuda:0", "cuda:1"]), (1, ["cuda:0", "cuda:0"])])
def test_each_rank_has_a_gpu_of_its_own_or_shares_one_where_there_are_too_few(monkeypatch, gpus, expected):
    chosen = []
    monkeypatch.setattr(devices, "world_size", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, device: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for local_rank in "01":
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        devices.pick_device("cuda")
    assert chosen == expected
