"""Device, precision, memory, seeds, and the state of random numbers."""

import math
import os
import platform
import random
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from toolkit.distributed import world_size
from utils import InputError, option


@dataclass(frozen=True)
class DeviceConfig:
    """Where and how precisely to compute."""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = option(
        "auto", "auto: half precision if the hardware has it", choices=("auto", "fp32", "bf16", "fp16")
    )


def pick_device(name: str) -> torch.device:
    """Return the device of a name, for each rank a GPU of its own if possible; raise InputError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % max(1, torch.cuda.device_count())}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # fails on the device "meta" too
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise InputError(f"--device {name}: not on this machine; expected auto or one of {', '.join(found)}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL and graphs work on the current one
    return device


def native_precision(device: torch.device) -> str:
    """Return the fastest precision that a device computes in hardware: fp32, bf16 or fp16."""
    if device.type == "cuda":
        generation, _ = torch.cuda.get_device_capability(device)
        if generation >= 7:  # Volta has tensor cores, Ampere also computes bfloat16
            return "bf16" if generation >= 8 else "fp16"
    elif device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so torch may not have them
        if any(getattr(torch.cpu, name, bool)() for name in names):
            return "bf16"
    return "fp32"


def pick_precision(name: str, device: torch.device) -> str:
    """Resolve --precision auto to what the hardware computes natively; raise InputError for fp16 without CUDA."""
    best = native_precision(device)
    if name == "fp16" and device.type != "cuda":  # no loss scaling, or no gain
        raise InputError(f"--precision fp16: needs a CUDA GPU; expected on {device.type}: {best}")
    return best if name == "auto" else name


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Run networks in half precision if `precision` says so; weights stay in float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def free_memory() -> float:
    """Return the free main memory in bytes; infinity where the system does not tell."""
    file = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", file.read_text(encoding="utf-8")) if file.exists() else None
    return 1024 * int(found[1]) if found else math.inf


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python and torch; with deterministic, allow only algorithms that repeat bit for bit."""
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def rng_state() -> dict:
    """Return the states of all random number generators, as plain values."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict) -> None:
    """Restore what rng_state returned; with another number of GPUs, theirs keep their seed."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def set_backend_flags(device: torch.device, deterministic: bool) -> None:
    """Let cuDNN choose algorithms by time, unless runs must repeat bit for bit; multiply float32 matrices in TF32."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
        torch.set_float32_matmul_precision("high")


def versions() -> dict:
    """Return what run.json says about software and hardware."""
    packages = {"python": platform.python_version(), "torch": torch.__version__}
    packages |= {name: version(name) for name in ("torchvision", "pillow")}
    return {"versions": packages, "threads": torch.get_num_threads(), "ranks": world_size()}
