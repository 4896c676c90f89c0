"""What only a GPU can show: tests, step, loader, memory, ranks, inference, training.

make gpu                                          all benchmarks, on the GPU
make gpu DEVICE=cpu                               the same with tiny networks, in a few minutes
python benchmarks/gpu.py --benchmarks step loader
python benchmarks/gpu.py --benchmarks training --minutes 6 --recipes ours --data_root ../photos

Each benchmark is meant to take under 8 minutes. At its end its rows are written to gpu.json, and all rows to gpu.md, in
--output (docs/; on a CPU generated_images/gpu/). If a benchmark fails, its error is written there, and the next one runs.
Benchmarks that this machine has done are skipped, unless --benchmarks names them; an interrupted training run is resumed.
"""

import argparse
import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, build_model, markdown_table, read_csv, recipe, train_config

import datasets
import models
import utils
from models import DIRECTIONS
from toolkit import cli, devices, distributed, inference, process
from toolkit.files import write_json, write_text
from toolkit.metrics import median_ms
from toolkit.weights import save_generator

SCRATCH = Path("generated_images/gpu")  # intermediate files
TINY = "--img_height 16 --img_width 16 --num_residual 1 --ngf 4 --ndf 4 --n_layers_D 1"
RECIPES = {  # of the benchmark training: what is added to the paper's recipe
    "paper": "--precision fp32",
    "ours": "--precision bf16 --compile --skips --ema 0.999",
}


class BenchmarkError(Exception):
    """A program that a benchmark started has failed: its name and its last line."""


def run(*argv: object) -> str:
    """Run a program of this project; returns its output."""
    command = [sys.executable, *map(str, argv)]
    print(f"$ {' '.join(command[1:])}", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", flush=True)
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        program = next((Path(word).name for word in command[1:] if word.endswith(".py")), command[1])
        raise BenchmarkError(f"{program} ended with {done.returncode}: {' '.join(last)}")
    return done.stdout


# ---------------------------------------------------------------------------------------------
# The benchmarks: each takes the command line and returns its rows


def tests(args: argparse.Namespace) -> list[dict]:
    """The tests that need a GPU, in several processes if pytest-xdist is installed."""
    parallel = ["-n", str(args.processes)] if importlib.util.find_spec("xdist") and args.device.type == "cuda" else []
    argv = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", *parallel, str(ROOT / "tests/test_gpu.py")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout[-8000:], done.stderr[-2000:], flush=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    if not counts:
        raise BenchmarkError(f"pytest ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    row: dict = {"passed": 0, "failed": 0, "skipped": 0, **counts}
    if done.returncode:
        row["error"] = "failed: " + ", ".join(re.findall(r"^(?:FAILED|ERROR) \S+?::(\S+)", done.stdout, re.M))
    return [row]


def step(args: argparse.Namespace) -> list[dict]:
    """Our step against the plain one of the paper: precisions, memory formats, compiled."""
    output = SCRATCH / "step"
    common = ["--sizes", args.size, "--rounds", 9, "--warm", 4]
    if args.tiny:
        common = ["--sizes", 16, "--ngf", 4, "--blocks", 1, "--n_layers_D", 1, "--rounds", 2]
    common += ["--threads", 1, "--device", args.device, "--output", output]
    choices = ["--precisions", "fp32", "bf16", "--choices"]
    if args.device.type == "cuda":
        choices.append("--compile")
    rows = []
    for batch in (2,) if args.tiny else (1, 4, 10):
        print(run(ROOT / "benchmarks/step.py", *choices, *common, "--batches", batch))
        rows += read_csv(output / "step.csv")
    if args.device.type == "cuda":  # in its own process, because cuDNN caches its choices
        print(run(ROOT / "benchmarks/step.py", "--precisions", "bf16", "--untried", *common, "--batches", 1, 10))
        rows += read_csv(output / "step.csv")
    return rows


def loader(args: argparse.Namespace) -> list[dict]:
    """Images per second that worker processes deliver; compare with images/s of the step."""
    output = SCRATCH / "loader"
    sizes = ["--size", args.size, "--photo", 512]
    if args.tiny:
        sizes = ["--size", 16, "--photo", 32, "--count", 8, "--epochs", 2]
    workers = [0, 2] if args.tiny else [0, 4, 8]
    print(run(ROOT / "benchmarks/loader.py", *sizes, "--batch", 4, "--workers", *workers, "--output", output))
    return read_csv(output / "loader.csv")


def flags_of_size(args: argparse.Namespace) -> list[str]:
    """Flags of train.py for the size that this call measures."""
    return TINY.split() if args.tiny else ["--img_height", str(args.size), "--img_width", str(args.size)]


def train_drawn(args: argparse.Namespace, run_name: str, *argv: object) -> None:
    """Train a new run on the drawn data set."""
    common = ["--dataset_name", "day2night", *flags_of_size(args), "--device", args.device, "--run_name", run_name]
    run(ROOT / "train.py", *common, "--overwrite", "--sample_interval", 10**6, *argv)


def flat(state: object) -> list:
    """List the values of a nested state in the order of their names."""
    if isinstance(state, dict):
        return [x for key in sorted(state, key=str) for x in flat(state[key])]
    return [x for value in state for x in flat(value)] if isinstance(state, list | tuple) else [state]


def same_state(one: str, other: str) -> bool:
    """Whether two runs ended with the same weights, optimisers, buffers and random states, bit for bit."""
    values = []
    for name in (one, other):
        state = torch.load(f"saved_models/{name}/latest.pt", weights_only=True)
        values.append(flat({key: state[key] for key in ("nets", "optims", "buffers", "rng")}))
    pairs = zip(*values, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def memory(args: argparse.Namespace) -> list[dict]:
    """A step with less memory than it needs; and a run that is resumed, bit for bit."""
    rows = []
    batch = 2 if args.tiny else 10
    peak = 0.0
    for fraction in (1.0, 0.6, 0.3) if args.device.type == "cuda" else (1.0,):
        limit = ["--megabytes", fraction * peak] if peak else []
        found = pace(args, "--batch_size", batch, "--precision", "bf16", limit=limit)
        peak = peak or found["MB"]
        row = {"what": f"batch {batch} in {fraction:.0%} of the memory it needs", "peak MB": found["MB"]}
        row |= {"micro-batch": found["micro_batch"], "ms/step": round(1000 * found["seconds"], 1)}
        rows.append(row | {"first loss_G": round(found["loss_G"], 3)})
    common = ["--steps_per_epoch", 4, "--num_epochs", 2, "--checkpoint_interval", 1, "--precision", "bf16"]
    common += ["--deterministic", "--batch_size", 2]
    train_drawn(args, "gpu_whole", *common)
    train_drawn(args, "gpu_resumed", *common)
    resume = ["--device", args.device, "--precision", "bf16", "--start_from", 1]
    run(ROOT / "train.py", "--run_name", "gpu_resumed", *resume)
    row = {"what": "--deterministic, resumed in the middle: equal, bit for bit"}
    if not same_state("gpu_whole", "gpu_resumed"):
        row = {"what": "--deterministic, resumed in the middle", "error": "not equal"}
    return [*rows, row]


def pace(args: argparse.Namespace, *flags: object, launch: tuple = (), limit: list | None = None) -> dict:
    """Time the steps of train.py with these flags in a new process, or in those that `launch` starts.

    returns: seconds (per step), loss_G (of the first step), MB (peak memory of the GPU), micro_batch
    """
    steps = (2, 5) if args.tiny else (5, 30)
    all_flags = [*flags, *flags_of_size(args), "--device", args.device]
    return json.loads(run(*launch, __file__, *(limit or []), "--pace", *steps, *all_flags).splitlines()[-1])


def print_pace(warm: int, timed: int, megabytes: float | None, flags: list[str]) -> None:
    """Build a model and time its steps on noise, in all processes that torchrun started."""
    if megabytes:
        available = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(1e6 * megabytes / available)
    config = train_config(flags)
    data = config.data
    model = build_model(config)
    device = model.device
    noise = torch.Generator().manual_seed(0)
    shape = (2, data.batch_size, data.channels, *data.size)
    reals = (torch.rand(shape, generator=noise) * 2 - 1)[:, distributed.rank_slice(data.batch_size)].to(device)
    first = float(model.step(*reals)["loss_G"])
    start = 0.0
    for i in range(warm + timed):
        if i == warm:
            start = time.perf_counter()
        float(model.step(*reals)["loss_G"])  # waits for the device
    found = {"seconds": (time.perf_counter() - start) / timed, "loss_G": first}
    found["MB"] = round(torch.cuda.max_memory_allocated(device) / 1e6) if device.type == "cuda" else 0
    found["micro_batch"] = model.executor.micro_batch_size or data.batch_size
    utils.say(json.dumps(found))


def ranks(args: argparse.Namespace) -> list[dict]:
    """One rank (NCCL on a GPU) against no ranks, and two that share the GPU (gloo)."""
    rows = []
    for label, count in (("one process", 0), ("one rank", 1), ("two ranks on one device", 2)):
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count) if count else ()
        found = pace(args, "--batch_size", 4, "--precision", "bf16", launch=launch)
        row = {"what": f"{label}, batch 4", "ms/step": round(1000 * found["seconds"], 1)}
        rows.append(row | {"loss_G of the first rank's first images": round(found["loss_G"], 3)})
    return rows


def translator(args: argparse.Namespace, net: models.Generator, precision: str, tile: int | None) -> Callable:
    return inference.Translator({"G_AB": net}, {"size": None}, str(args.device), precision, "native", tile)


def onnx_session(net: models.Generator) -> Any:
    """An exported generator in onnxruntime on the GPU; None if that is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return None
    SCRATCH.mkdir(parents=True, exist_ok=True)
    weights = SCRATCH / "G_AB.safetensors"
    save_generator(weights, net, {"direction": "AtoB", "size": [64, 64]})
    run(ROOT / "export.py", "--weights", weights, "--output", SCRATCH / "G_AB.onnx")
    session = onnxruntime.InferenceSession(SCRATCH / "G_AB.onnx", providers=["CUDAExecutionProvider"])
    return session if session.get_providers()[0] == "CUDAExecutionProvider" else None  # it may fall back to the CPU


def one_image(args: argparse.Namespace) -> list[dict]:
    """Milliseconds per image, from the host's memory and back: a teacher and a thin student, whole and in tiles."""
    sides = (16, 32) if args.tiny else (256, 512, 1024)
    width = 4 if args.tiny else 64
    configs = {"teacher": models.GeneratorConfig(ngf=width)}
    configs["student"] = models.GeneratorConfig(ngf=width // 4, num_residual=3)
    rows = []
    for label, config in configs.items():
        net = models.build_generator(config)
        session = onnx_session(net)
        for side in sides:
            photo = torch.rand(1, 3, side, side) * 2 - 1
            row = {"network": label, "side": side, "fp32, ms": "", "bf16, ms": ""}
            calls = {precision: translator(args, net, precision, None) for precision in ("fp32", "bf16")}
            for precision, call in calls.items():
                row[f"{precision}, ms"] = round(median_ms(functools.partial(translated, call, net, photo)), 2)
            row["bf16 in tiles, ms"] = ""
            if side == sides[-1]:
                call = translator(args, net, "bf16", side // 2)
                row["bf16 in tiles, ms"] = round(median_ms(functools.partial(translated, call, net, photo), 3), 2)
            row["ONNX on CUDA, ms"] = ""
            if session:
                inputs = {"real_A": photo.numpy()}
                row["ONNX on CUDA, ms"] = round(median_ms(functools.partial(session.run, None, inputs)), 2)
            rows.append(row)
    return rows


def translated(call: Callable, net: models.Generator, photo: torch.Tensor) -> torch.Tensor:
    """Translate, and copy the result to the host."""
    return call(net, photo).cpu()


def training(args: argparse.Namespace) -> list[dict]:
    """Train as many steps as fit into --minutes; the learning rate falls over their second half."""
    rows = []
    for name in args.recipes:
        run_name = f"gpu_{args.dataset_name}_{args.size}px_{args.minutes:g}min_{name}"
        latest = Path(f"saved_models/{run_name}/latest.pt")
        begun = latest.exists()
        if begun:
            flags = ["--start_from", "latest"]
        else:
            flags = [*recipe("paper_256"), *RECIPES[name].split()]
            if args.device.type != "cuda" and "--compile" in flags:
                flags.remove("--compile")
            per_epoch = max(1, round(60 * args.minutes / pace(args, *flags)["seconds"] / args.epochs))
            flags += ["--dataset_name", args.dataset_name, "--data_root", args.data_root, *flags_of_size(args)]
            flags += ["--num_epochs", args.epochs, "--steps_per_epoch", per_epoch, "--sample_interval", 10**6]
            flags += ["--keep_checkpoints", 1, "--overwrite"]
        start = time.perf_counter()
        run(ROOT / "train.py", "--run_name", run_name, "--device", args.device, *flags)
        minutes = (time.perf_counter() - start) / 60
        run(ROOT / "test.py", "--run_name", run_name, "--device", args.device, "--metrics", "cycle,identity")
        steps = torch.load(latest, weights_only=True)["step"]
        row = {"recipe": name, "data": args.dataset_name, "side": args.size, "steps": steps}
        row["minutes"] = "resumed" if begun else round(minutes, 1)
        scores = json.loads(Path(f"generated_images/{run_name}/test/metrics.json").read_text(encoding="utf-8"))
        row |= flat_scores({str(direction): scores[str(direction)] for direction in DIRECTIONS})
        last = sorted(Path(f"generated_images/{run_name}").glob("epoch_*.png"))[-1]
        args.output.mkdir(parents=True, exist_ok=True)
        shutil.copy(last, args.output / f"{run_name}.png")
        rows.append({**row, "image": f"{run_name}.png"})
    return rows


def flat_scores(scores: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of a nested dict, each named by the keys that lead to it."""
    found: dict[str, float] = {}
    for key, value in scores.items():
        name = f"{prefix} {key}".strip()
        found |= flat_scores(value, name) if isinstance(value, dict) else {name: round(value, 4)}
    return found


BENCHMARKS: dict[str, tuple[Callable, str]] = {
    "tests": (tests, "`pytest -m gpu`"),
    "step": (step, "One training step, in alternation with a plain implementation of the paper"),
    "loader": (loader, "Images per second from disk"),
    "memory": (memory, "Less memory than a batch needs, and a resumed run"),
    "ranks": (ranks, "Ranks"),
    "inference": (one_image, "One image"),
    "training": (training, "Training for a given time"),
}


# ---------------------------------------------------------------------------------------------
# The report


def machine(device: torch.device) -> str:
    """Describe the machine."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    if device.type != "cuda":
        return f"{platform.machine()} CPU, {cores}, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name(device)}, {cores}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def table(rows: list[dict]) -> list[str]:
    """Rows of a benchmark as a Markdown table, with their images below."""
    lines = markdown_table([{name: value for name, value in row.items() if name != "image"} for row in rows])
    for row in rows:
        if "image" in row:
            lines += ["", f"![Test images after the last epoch, recipe {row['recipe']}]({row['image']})"]
    return lines


INTRODUCTION = """# GPU measurements

Written by `benchmarks/gpu.py` from `gpu.json`. To measure your own card, run `make gpu` (`DATA=DIR` names the folder that holds `horse2zebra`). Each benchmark is meant to take under 8 minutes and is skipped if this machine has done it.
What has no table here was never measured on a GPU.

What is tested without a GPU, by `tests/test_gpu_ready.py`, `test_cyclegan.py` and `test_train.py` (some of them slow):

* A whole float32 step of both generators, with gradient penalty, EMA weights and a student, runs on torch's meta device, so nothing in it (except Adam's own kernel) leaves a tensor on the host or reads one back.
* Every network is traced as one graph for each size, forward and backward, and the losses of such a step equal the eager ones (in float64, without a compiler of kernels).
* fp16, computed in half precision on a CPU, scales its losses, skips a step that overflows and keeps the scale across a resume.
* If memory runs out in any call of a step, the step is repeated in micro-batches with the same result, bit for bit.
* A run can be resumed in another memory format.

What these measurements will decide: [benchmarks/NOTES.md](../benchmarks/NOTES.md#what-a-gpu-will-decide)."""


def write(output: Path, results: dict) -> None:
    """Write gpu.json, and gpu.md from it."""
    output.mkdir(parents=True, exist_ok=True)
    lines = [INTRODUCTION]
    if results:
        write_json(output / "gpu.json", results)
    else:
        lines += ["", "**No GPU has been measured yet.**"]
    for device, benchmarks in results.items():
        lines += ["", f"## {device}"]
        for name, found in benchmarks.items():
            lines += ["", f"### {BENCHMARKS[name][1]}", "", f"`{found['command']}`, {found['seconds']:.0f} s", ""]
            lines += table(found["rows"])
    write_text(output / "gpu.md", "\n".join(lines) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="gpu.py", description=__doc__)
    parser.add_argument(
        "--benchmarks",
        nargs="*",
        choices=BENCHMARKS,
        help="run these, even again (default: those that are missing; without a name: only write gpu.md)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and images, to see that everything works")
    parser.add_argument("--size", type=int, default=256, help="side of the images, px")
    parser.add_argument("--processes", type=int, default=4, help="processes of the tests (needs pytest-xdist)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="what is trained")
    parser.add_argument("--minutes", type=float, default=2, help="duration of each training run")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each training run")
    parser.add_argument("--dataset_name", default="horse2zebra", help="data set of the training runs")
    parser.add_argument("--data_root", type=Path, default=Path("datasets"), help="folder that contains it")
    parser.add_argument("--output", type=Path, help="folder of gpu.json and gpu.md")
    parser.add_argument("--megabytes", type=float, help=argparse.SUPPRESS)  # limit of the GPU's memory for --pace
    parser.add_argument("--pace", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # warm-up steps, timed steps, flags
    args = parser.parse_args(argv)
    args.device = devices.pick_device(args.device)
    if args.tiny:
        args.size = 16
        args.minutes = 0.02
        args.dataset_name = "day2night"
    if args.output is None:
        args.output = ROOT / "docs" if args.device.type == "cuda" and not args.tiny else SCRATCH
    return args


def run_benchmark(args: argparse.Namespace, name: str) -> dict:
    """Run a benchmark; returns its rows, its seconds, the command that repeats it, and whether it succeeded."""
    print(f"-- {name}", flush=True)
    start = time.perf_counter()
    try:
        rows = BENCHMARKS[name][0](args)
    except BenchmarkError as error:
        rows = [{"error": str(error)}]
    command = f"python benchmarks/gpu.py --benchmarks {name} --size {args.size}"
    if args.tiny:
        command += " --tiny"
    if name == "training":
        command += f" --minutes {args.minutes:g} --recipes {' '.join(args.recipes)}"
    seconds = time.perf_counter() - start
    return {"command": command, "seconds": seconds, "rows": rows, "ok": not any("error" in row for row in rows)}


@process.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.pace:
        print_pace(int(args.pace[0]), int(args.pace[1]), args.megabytes, args.pace[2:])
        distributed.leave_ranks()  # a rank that just ends may abort while gloo's thread still runs
        return
    path = args.output / "gpu.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if args.benchmarks == []:
        write(args.output, results)
        return
    done = results.setdefault(machine(args.device), {})
    missing = [name for name in BENCHMARKS if not done.get(name, {}).get("ok")]
    names = args.benchmarks or missing
    if "training" in names and args.dataset_name != datasets.DEMO:
        datasets.find_dataset(args.data_root, args.dataset_name)  # fail now rather than after the others
    for name in names:
        done[name] = run_benchmark(args, name)
        write(args.output, results)
    print(f"written to {args.output}/gpu.json and gpu.md")
    failed = [name for name in names if not done[name]["ok"]]
    if failed:
        raise utils.RunError(f"failed: {', '.join(failed)}; see {args.output}/gpu.md and the output above")


if __name__ == "__main__":
    main()
