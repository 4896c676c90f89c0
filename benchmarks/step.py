"""Time our training step against a plain implementation of the paper's, in one process, in alternation.

python benchmarks/step.py --sizes 64 --batches 4 --threads 2
python benchmarks/step.py --sizes 256 --batches 1 10 --device cuda --compile
python benchmarks/step.py --check

The reference is written here from Zhu et al. 2017 and shares no code with train.py: float32, eager, six separate calls of
the generators, an optimiser for each discriminator, framework defaults. As in PyTorch-GAN, the generators' loss also
computes (and discards) gradients of the discriminators' weights. Prints medians over the rounds, and writes step.csv and
step.png to --output. --check compares the losses of 20 steps in float64.
"""

import argparse
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import build_model, train_config, write_csv

from toolkit import cli, devices, process

BUFFER_SIZE = 50


# ---------------------------------------------------------------------------------------------
# The reference


class PlainBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        layers = []
        for _ in range(2):
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def plain_generator(ngf: int, blocks: int) -> nn.Module:
    """c7s1-64, d128, d256, R256 x 9, u128, u64, c7s1-3."""
    layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7), nn.InstanceNorm2d(ngf), nn.ReLU()]
    for width in (ngf, 2 * ngf):
        layers += [nn.Conv2d(width, 2 * width, 3, 2, 1), nn.InstanceNorm2d(2 * width), nn.ReLU()]
    layers += [PlainBlock(4 * ngf) for _ in range(blocks)]
    for width in (4 * ngf, 2 * ngf):
        layers += [nn.ConvTranspose2d(width, width // 2, 3, 2, 1, 1), nn.InstanceNorm2d(width // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())


def plain_discriminator(ndf: int, n_layers: int) -> nn.Module:
    """C64, C128, C256, C512 and one output per patch."""
    layers = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
    width = ndf
    for i in range(1, n_layers + 1):
        wider = ndf * min(2**i, 8)
        layers += [nn.Conv2d(width, wider, 4, 2 if i < n_layers else 1, 1), nn.InstanceNorm2d(wider), nn.LeakyReLU(0.2)]
        width = wider
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))


class PlainPool:
    """Keeps 50 translated images; with probability 1/2 a new one is exchanged for an old one."""

    def __init__(self) -> None:
        self.kept = []

    def query(self, images: Tensor) -> Tensor:
        mixed = []
        for image in images:
            if len(self.kept) < BUFFER_SIZE:
                self.kept.append(image)
            elif random.random() < 0.5:
                i = random.randrange(BUFFER_SIZE)
                image, self.kept[i] = self.kept[i], image
            mixed.append(image)
        return torch.stack(mixed)


class Reference:
    """The step of the paper, as plain as possible."""

    def __init__(self, config: argparse.Namespace, device: torch.device):
        self.networks = {name: plain_generator(config.ngf, config.blocks) for name in ("G_AB", "G_BA")}
        self.networks |= {name: plain_discriminator(config.ngf, config.n_layers_D) for name in ("D_A", "D_B")}
        for net in self.networks.values():
            net.to(device)
        self.pools = {"A": PlainPool(), "B": PlainPool()}
        self.make_optimizers()

    def make_optimizers(self) -> None:
        generators = [*self.networks["G_AB"].parameters(), *self.networks["G_BA"].parameters()]
        self.optimizer_G = torch.optim.Adam(generators, 2e-4, (0.5, 0.999))
        self.optimizers_D = {}
        for domain in "AB":
            weights = self.networks[f"D_{domain}"].parameters()
            self.optimizers_D[domain] = torch.optim.Adam(weights, 2e-4, (0.5, 0.999))

    def step(self, real_A: Tensor, real_B: Tensor) -> dict[str, Tensor]:
        G_AB, G_BA, D_A, D_B = self.networks.values()
        fake_B, fake_A = G_AB(real_A), G_BA(real_B)
        rec_A, rec_B = G_BA(fake_B), G_AB(fake_A)
        idt_A, idt_B = G_BA(real_A), G_AB(real_B)
        on_A, on_B = D_A(fake_A), D_B(fake_B)
        loss_G = F.mse_loss(on_A, torch.ones_like(on_A)) + F.mse_loss(on_B, torch.ones_like(on_B))
        loss_G = loss_G + 10 * (F.l1_loss(rec_A, real_A) + F.l1_loss(rec_B, real_B))
        loss_G = loss_G + 5 * (F.l1_loss(idt_A, real_A) + F.l1_loss(idt_B, real_B))
        self.optimizer_G.zero_grad()
        loss_G.backward()
        self.optimizer_G.step()
        losses = {"loss_G": loss_G.detach()}
        for domain, D, real, fake in (("A", D_A, real_A, fake_A), ("B", D_B, real_B, fake_B)):
            self.optimizers_D[domain].zero_grad()
            on_real, on_fake = D(real), D(self.pools[domain].query(fake.detach()))
            loss = F.mse_loss(on_real, torch.ones_like(on_real)) + F.mse_loss(on_fake, torch.zeros_like(on_fake))
            loss = loss / 2
            loss.backward()
            self.optimizers_D[domain].step()
            losses[f"loss_D_{domain}"] = loss.detach()
        return losses


# ---------------------------------------------------------------------------------------------
# Ours


class Ours:
    def __init__(
        self, config: argparse.Namespace, device: torch.device, precision: str, compiled: bool, layout: str = "auto"
    ):
        argv = ["--img_height", config.size, "--img_width", config.size, "--batch_size", config.batch]
        argv += ["--ngf", config.ngf, "--num_residual", config.blocks]
        argv += ["--ndf", config.ngf, "--n_layers_D", config.n_layers_D, "--precision", precision]
        argv += ["--memory_format", layout]
        if compiled:
            argv.append("--compile")
        self.model = build_model(train_config(argv), device)

    def step(self, real_A: Tensor, real_B: Tensor) -> dict[str, Tensor]:
        return self.model.step(real_A, real_B)


def make_variants(config: argparse.Namespace, device: torch.device) -> dict[str, Callable]:
    """Functions that build what is compared, by name."""
    variants = {"reference": lambda: Reference(config, device)}
    for precision in config.precisions:
        layout = "contiguous" if config.choices else "auto"
        variants[precision] = lambda precision=precision, layout=layout: Ours(config, device, precision, False, layout)
        if config.compile:
            variants[f"{precision} compiled"] = lambda precision=precision: Ours(config, device, precision, True)
        if config.choices:
            variants[f"{precision} channels_last"] = lambda precision=precision: Ours(
                config, device, precision, False, "channels_last"
            )
    return variants


# ---------------------------------------------------------------------------------------------
# Measuring


def make_batch(config: argparse.Namespace, device: torch.device) -> Tensor:
    """Noise (2, N, 3, H, W) in [-1, 1]: real_A and real_B."""
    return torch.rand(2, config.batch, 3, config.size, config.size, device=device) * 2 - 1


def seconds(function: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations per second (a multiply-add is two) of a large convolution, forward: 256 → 256 channels, 3x3, 8x64x64.

    On a GPU, "fp32" is TF32, which torch uses for convolutions.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    conv = nn.Conv2d(256, 256, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(8, 256, 64, 64, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    calls = 20 if device.type == "cuda" else 1  # so that the launches are hidden

    def convolve() -> None:
        for _ in range(calls):
            conv(x)

    with torch.no_grad():
        times = [seconds(convolve, device) for _ in range(12)]
    return calls * 2 * 9 * 256 * 256 * 8 * 64 * 64 / min(times)


def two_steps(config: argparse.Namespace, device: torch.device, name: str) -> None:
    """Build a variant and take two steps."""
    variant = make_variants(config, device)[name]()
    real_A, real_B = make_batch(config, device)
    for _ in range(2):
        variant.step(real_A, real_B)


def peak_memory(config: argparse.Namespace, name: str) -> float:
    """Peak memory in MB of two steps on a CPU in a fresh process, torch included."""
    argv = [sys.executable, __file__, "--sizes", config.size, "--batches", config.batch, "--ngf", config.ngf]
    argv += ["--blocks", config.blocks, "--n_layers_D", config.n_layers_D, "--threads", config.threads]
    argv += ["--precisions", *config.precisions, "--device", "cpu", "--memory_of", name]
    if config.choices:
        argv.append("--choices")
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_own_memory(config: argparse.Namespace, device: torch.device, name: str) -> None:
    import resource

    two_steps(config, device, name)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def built_and_warm(
    config: argparse.Namespace, device: torch.device, name: str, real_A: Tensor, real_B: Tensor
) -> tuple[Any, float]:
    """A variant after its first steps, which include set-up and compilation, and the MB of a GPU that they took.

    Whether cuDNN benchmarks convolutions is the same for the whole process, because it caches its choices.
    """
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    variant = make_variants(config, device)[name]()
    torch.backends.cudnn.benchmark = device.type == "cuda" and not config.untried
    for _ in range(config.warm):
        variant.step(real_A, real_B)
    if device.type == "cuda":
        return variant, (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return variant, math.nan


def kernel_seconds(step: Callable, device: torch.device) -> float:
    """Total seconds of a step's kernels on a GPU; nan on a CPU."""
    if device.type != "cuda":
        return math.nan
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize(device)
    events = [event for event in profile.key_averages() if not event.is_user_annotation]
    return sum(event.self_device_time_total for event in events) / 1e6


def micro_batch_of(variant: Any) -> int | str:
    """Size of the micro-batches that our step had to use; empty if the whole batch fitted."""
    return (variant.model.executor.micro_batch_size or "") if isinstance(variant, Ours) else ""


def time_variants(config: argparse.Namespace, device: torch.device, peaks: dict[str, float]) -> list[dict]:
    """Time all variants at one size and batch in alternation; returns a row of figures for each that fits."""
    real_A, real_B = make_batch(config, device)
    variants = {}
    memory = {}
    for name in make_variants(config, device):
        try:
            variants[name], memory[name] = built_and_warm(config, device, name, real_A, real_B)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory at {config.size} px, batch {config.batch}", flush=True)
    times = {name: [] for name in variants}
    for _ in range(config.rounds):
        for name, variant in variants.items():
            times[name].append(seconds(lambda variant=variant: variant.step(real_A, real_B), device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    work = math.nan  # operations of our step, which discards nothing
    if config.precisions[0] in variants:
        with FlopCounterMode(display=False) as counter:
            variants[config.precisions[0]].step(real_A, real_B)
        work = counter.get_total_flops()
    rows = []
    for name, median in medians.items():
        precision = precision_of(name, device)
        kernels = kernel_seconds(lambda name=name: variants[name].step(real_A, real_B), device)  # after all timing
        if config.memory and device.type == "cpu":
            memory[name] = peak_memory(config, name)
        label = f"{name} untried" if config.untried else name
        rows.append(
            {
                "size": config.size,
                "batch": config.batch,
                "variant": label,
                "precision": precision,
                "s/step": round(median, 4),
                "steps/s": round(1 / median, 3),
                "images/s": round(2 * config.batch / median, 2),
                "ratio": rounded(medians.get("reference", math.nan) / median, 2),
                "fraction of peak": rounded(work / median / peaks[precision], 3),
                "in kernels": rounded(kernels / median, 2),
                "peak MB": rounded(memory[name], 0),
                "micro-batch": micro_batch_of(variants[name]),
            }
        )
        print("| " + " | ".join(str(value) for value in rows[-1].values()) + " |", flush=True)
    return rows


def rounded(value: float, digits: int) -> float | str:
    """A number for a table; empty where there is none."""
    return "" if math.isnan(value) else round(value, digits)


def precision_of(name: str, device: torch.device) -> str:
    """The precision of a variant."""
    return "fp32" if name == "reference" else devices.pick_precision(name.split()[0], device)


def check(config: argparse.Namespace) -> float:
    """Largest difference between our losses and the reference's over 20 steps in float64."""
    device = torch.device("cpu")
    ours = Ours(config, device, "fp32", False)
    plain = Reference(config, device)
    model = ours.model
    for name, net in model.networks.items():
        net.double()
        plain.networks[name].double()
        for target, source in zip(plain.networks[name].parameters(), net.parameters(), strict=True):
            target.data.copy_(source.data)
    model.make_optimizers()
    plain.make_optimizers()
    worst = 0.0
    for step in range(20):
        torch.manual_seed(step)
        real_A, real_B = make_batch(config, device).double()
        theirs = plain.step(real_A, real_B)
        mine = ours.step(real_A, real_B)
        worst = max(worst, *((theirs[name] - mine[name]).abs().item() for name in theirs))
    return worst


def draw(rows: list[dict], path: Path) -> None:
    """Draw the ratio to the reference as bars, by size and batch."""
    groups = list(dict.fromkeys((row["size"], row["batch"]) for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    axes = Figure(figsize=(1.5 + 2.2 * len(groups), 4), layout="constrained").subplots()
    for k, name in enumerate(names):
        values = {(row["size"], row["batch"]): row["ratio"] for row in rows if row["variant"] == name}
        centres = [i + 0.8 * (k + 0.5) / len(names) - 0.4 for i in range(len(groups))]
        bars = axes.bar(centres, [values[group] for group in groups], 0.8 / len(names), label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(groups)), [f"{size} px, batch {batch}" for size, batch in groups])
    axes.set_ylabel("times the speed of the plain step")
    axes.legend()
    axes.figure.savefig(path, dpi=100)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="step.py", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64], help="side of the images, px")
    parser.add_argument("--batches", type=int, nargs="+", default=[4], help="images of each domain in a step")
    parser.add_argument("--ngf", type=int, default=64, help="width of all networks")
    parser.add_argument("--blocks", type=int, default=9, help="residual blocks")
    parser.add_argument("--n_layers_D", type=int, default=3, help="strided layers of the discriminators")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "auto"], help="values of --precision")
    parser.add_argument("--compile", action="store_true", help="also measure with --compile")
    parser.add_argument(
        "--choices", action="store_true", help="compare the memory formats contiguous and channels_last"
    )
    parser.add_argument("--untried", action="store_true", help="switch off the benchmark mode of cuDNN")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each variant")
    parser.add_argument("--warm", type=int, default=2, help="steps of each variant before the timed ones")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--memory", action="store_true", help="also measure each variant's peak memory on a CPU")
    parser.add_argument("--memory_of", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="compare losses in float64, at a tiny size")
    parser.add_argument("--output", type=Path, default=Path("generated_images/benchmarks"), help="where results go")
    return parser.parse_args(argv)


@process.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    config = cli.changed(args, size=args.sizes[0], batch=args.batches[0])
    if args.check:
        config = cli.changed(config, size=16, batch=2, ngf=4, blocks=1, n_layers_D=1)
        print(f"largest difference of a loss over 20 steps in float64: {check(config):.1e}")
        return
    device = devices.pick_device(args.device)
    if args.memory_of:
        print_own_memory(config, device, args.memory_of)
        return
    torch.backends.cudnn.benchmark = device.type == "cuda" and not args.untried
    used = {precision_of(name, device) for name in make_variants(config, device)}
    peaks = {name: peak_flops(device, name) for name in sorted(used, reverse=True)}
    measured = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in peaks.items())
    print(
        f"{device}, {args.threads} threads, torch {torch.__version__}; measured peak of a large convolution: {measured}"
    )
    rows = []
    for size in args.sizes:
        for batch in args.batches:
            rows += time_variants(cli.changed(config, size=size, batch=batch), device, peaks)
            write_csv(args.output / "step.csv", rows)
    draw(rows, args.output / "step.png")
    print(f"written to {args.output}/step.csv and step.png")


if __name__ == "__main__":
    main()
