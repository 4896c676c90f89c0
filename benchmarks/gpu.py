"""What only a GPU can show, stage by stage: tests, step, loader, memory, ranks, inference, training.

make gpu                                      all stages, on the GPU
make gpu DEVICE=cpu                           the same stages on tiny networks, in a few minutes
python benchmarks/gpu.py --stages step loader
python benchmarks/gpu.py --stages training --minutes 6 --recipes ours --data_root ../photos

Each stage is meant to take under 8 minutes, and at its end writes its rows into gpu.json, and from all rows gpu.md, below
--output (docs/; of a CPU generated_images/gpu/). What a stage could not do stands there as an error, and the next stage
follows. A stage that this machine has done is left out, unless --stages names it; an interrupted training goes on from its
last save.
"""

import argparse
import csv
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
import datasets
import models
import train
import utils
from toolkit import cli, devices, distributed, inference, process
from toolkit.files import write_json, write_text
from toolkit.metrics import median_ms
from toolkit.weights import save_generator

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = Path("generated_images/gpu")  # what stages leave on the way to their rows
TINY = "--img_height 16 --img_width 16 --num_residual 1 --ngf 4 --ndf 4 --n_layers_D 1"
RECIPES = {  # of the stage training; the paper's is train.py's defaults in the paper's batch and precision
    "paper": "--batch_size 1 --precision fp32",
    "ours": "--batch_size 1 --precision bf16 --compile --skips --ema 0.999",
}


class StageError(Exception):
    """A program that a stage started ended with an error: its name and its last line."""


def run(*argv: object) -> str:
    """Run a program of this project; returns what it printed."""
    words = [sys.executable, *map(str, argv)]
    print(f"$ {' '.join(words[1:])}", flush=True)
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", flush=True)
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        program = next((Path(word).name for word in words[1:] if word.endswith(".py")), words[1])
        raise StageError(f"{program} ended with {done.returncode}: {' '.join(last)}")
    return done.stdout


def read_csv(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------
# The stages: each takes the command line and returns its rows


def tests(args: argparse.Namespace) -> list[dict]:
    """The tests that need a GPU, in several processes where pytest-xdist is there."""
    parallel = ["-n", str(args.processes)] if importlib.util.find_spec("xdist") and args.device.type == "cuda" else []
    argv = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", *parallel, str(ROOT / "tests/test_gpu.py")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout[-8000:], done.stderr[-2000:], flush=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    if not counts:
        raise StageError(f"pytest ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    row: dict = {"passed": 0, "failed": 0, "skipped": 0, **counts}
    if done.returncode:
        row["error"] = "failed: " + ", ".join(re.findall(r"^(?:FAILED|ERROR) \S+?::(\S+)", done.stdout, re.M))
    return [row]


def step(args: argparse.Namespace) -> list[dict]:
    """Our step against the plain one of the paper: precisions, memory formats, compiled."""
    output = SCRATCH / "step"
    sizes = ["--sizes", args.size, "--rounds", 9, "--warm", 4, "--threads", 1]
    if args.tiny:
        sizes = ["--sizes", 16, "--ngf", 4, "--blocks", 1, "--n_layers_D", 1, "--rounds", 2, "--threads", 1]
    compiled = ["--compile"] if args.device.type == "cuda" else []
    rows = []
    for batch in (2,) if args.tiny else (1, 4, 10):
        words = [*sizes, "--batches", batch, "--device", args.device, "--output", output]
        print(run(ROOT / "benchmarks/step.py", "--precisions", "fp32", "bf16", "--choices", *compiled, *words))
        rows += read_csv(output / "step.csv")
    if args.device.type == "cuda":  # in a process of its own, since cuDNN remembers what it tried
        words = [*sizes, "--batches", 1, 10, "--device", args.device, "--output", output]
        print(run(ROOT / "benchmarks/step.py", "--precisions", "bf16", "--untried", *words))
        rows += read_csv(output / "step.csv")
    return rows


def loader(args: argparse.Namespace) -> list[dict]:
    """Images a second that reading processes deliver; compare with images/s of the step."""
    output = SCRATCH / "loader"
    sizes = ["--size", args.size, "--photo", 512]
    if args.tiny:
        sizes = ["--size", 16, "--photo", 32, "--count", 8, "--epochs", 2]
    workers = [0, 2] if args.tiny else [0, 4, 8]
    print(run(ROOT / "benchmarks/loader.py", *sizes, "--batch", 4, "--workers", *workers, "--output", output))
    return read_csv(output / "loader.csv")


def flags_of_size(args: argparse.Namespace) -> list[str]:
    """Flags of train.py for a network of the size that this call measures at."""
    return TINY.split() if args.tiny else ["--img_height", str(args.size), "--img_width", str(args.size)]


def train_drawn(args: argparse.Namespace, run_name: str, *argv: object) -> None:
    """Train on the drawn set, anew."""
    words = ["--dataset_name", "day2night", *flags_of_size(args), "--device", args.device, "--run_name", run_name]
    run(ROOT / "train.py", *words, "--overwrite", "--sample_interval", 10**6, *argv)


def flat(state: object) -> list:
    """The values of a nested state, in the order of their names."""
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
    """A card of which only a part may be used; and a run that is resumed, bit for bit."""
    rows = []
    batch = 2 if args.tiny else 10
    peak = 0.0
    for fraction in (1.0, 0.6, 0.3) if args.device.type == "cuda" else (1.0,):
        limit = ["--megabytes", fraction * peak] if peak else []
        found = pace(args, "--batch_size", batch, "--precision", "bf16", limit=limit)
        peak = peak or found["MB"]
        rows.append({"what": f"batch {batch} in {fraction:.0%} of the memory it takes", "peak MB": found["MB"]})
        rows[-1] |= {"micro-batch": found["micro_batch"], "ms/step": round(1000 * found["seconds"], 1)}
        rows[-1]["first loss_G"] = round(found["loss_G"], 3)
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


def pace(args: argparse.Namespace, *words: object, launch: tuple = (), limit: list | None = None) -> dict:
    """What train.py's steps take with such flags, in a process of its own or in those of `launch`.

    returns: seconds (a step), loss_G (of the first), MB (the GPU's, at most), micro_batch
    """
    steps = (2, 5) if args.tiny else (5, 30)
    recipe = [*flags_of_size(args), "--device", args.device, *words]
    return json.loads(run(*launch, __file__, *(limit or []), "--pace", *steps, *recipe).splitlines()[-1])


def print_pace(warm: int, timed: int, megabytes: float | None, words: list[str]) -> None:
    """Make a model and time its steps on noise, in all processes that torchrun started."""
    args = cli.with_vit_defaults(train.parse_args(words))
    device = devices.pick_device(args.device)
    if megabytes:
        torch.cuda.set_per_process_memory_fraction(1e6 * megabytes / devices.total_memory(device))
    model = train.make_model(args, train.make_nets(args, {}), device)
    noise = torch.Generator().manual_seed(0)
    shape = (2, args.batch_size, args.channels, args.img_height, args.img_width)
    reals = (torch.rand(shape, generator=noise) * 2 - 1)[:, distributed.rank_slice(args.batch_size)].to(device)
    first = float(model.step(*reals)["loss_G"])
    start = 0.0
    for i in range(warm + timed):
        if i == warm:
            start = time.perf_counter()
        float(model.step(*reals, i + 1)["loss_G"])  # waits for the device
    found = {"seconds": (time.perf_counter() - start) / timed, "loss_G": first}
    found["MB"] = round(torch.cuda.max_memory_allocated(device) / 1e6) if device.type == "cuda" else 0
    found["micro_batch"] = model.micro_batch_size or args.batch_size
    utils.say(json.dumps(found))


def ranks(args: argparse.Namespace) -> list[dict]:
    """One rank (NCCL on a GPU) against no ranks, and two that share the card (gloo)."""
    rows = []
    for label, count in (("one process", 0), ("one rank", 1), ("two ranks on one device", 2)):
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count) if count else ()
        found = pace(args, "--batch_size", 4, "--precision", "bf16", launch=launch)
        rows.append({"what": f"{label}, batch 4", "ms/step": round(1000 * found["seconds"], 1)})
        rows[-1]["loss_G of the first rank's first images"] = round(found["loss_G"], 3)
    return rows


def translator(args: argparse.Namespace, net: models.Generator, precision: str, tile: int | None) -> Callable:
    size = {"size": None, "direction": "AtoB"}
    return inference.Translator({"G_AB": net}, size, str(args.device), precision, "native", tile)


def onnx_session(net: models.Generator) -> Any:
    """An exported generator in onnxruntime on the GPU; None where that is missing."""
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
    return session if session.get_providers()[0] == "CUDAExecutionProvider" else None  # it falls back to the CPU


def one_image(args: argparse.Namespace) -> list[dict]:
    """Milliseconds an image, from the host's memory and back: the default teacher and a thin student, whole and in tiles."""
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
                feed = {"real_A": photo.numpy()}
                row["ONNX on CUDA, ms"] = round(median_ms(functools.partial(session.run, None, feed)), 2)
            rows.append(row)
    return rows


def translated(call: Callable, net: models.Generator, photo: torch.Tensor) -> torch.Tensor:
    """A translation, back in the host's memory."""
    return call(net, photo).cpu()


def training(args: argparse.Namespace) -> list[dict]:
    """Train by the clock: as many steps as fit into --minutes, the rate falling over their second half."""
    rows = []
    for name in args.recipes:
        run_name = f"gpu_{args.dataset_name}_{args.size}px_{args.minutes:g}min_{name}"
        latest = Path(f"saved_models/{run_name}/latest.pt")
        begun = latest.exists()
        if begun:
            words = ["--start_from", "latest"]
        else:
            recipe = [word for word in RECIPES[name].split() if word != "--compile" or args.device.type == "cuda"]
            per_epoch = max(1, round(60 * args.minutes / pace(args, *recipe)["seconds"] / args.epochs))
            words = ["--dataset_name", args.dataset_name, "--data_root", args.data_root, *flags_of_size(args), *recipe]
            words += ["--num_epochs", args.epochs, "--steps_per_epoch", per_epoch, "--sample_interval", 10**6]
            words += ["--keep_checkpoints", 1, "--overwrite"]
        start = time.perf_counter()
        run(ROOT / "train.py", "--run_name", run_name, "--device", args.device, *words)
        minutes = (time.perf_counter() - start) / 60
        run(ROOT / "test.py", "--run_name", run_name, "--device", args.device, "--metrics", "cycle,identity")
        steps = torch.load(latest, weights_only=True)["step"]
        row = {"recipe": name, "data": args.dataset_name, "side": args.size, "steps": steps}
        row["minutes"] = "resumed" if begun else round(minutes, 1)
        scores = json.loads(Path(f"generated_images/{run_name}/test/metrics.json").read_text(encoding="utf-8"))
        row |= flat_scores({direction: scores[direction] for direction in ("AtoB", "BtoA")})
        last = sorted(Path(f"generated_images/{run_name}").glob("epoch_*.png"))[-1]
        args.output.mkdir(parents=True, exist_ok=True)
        shutil.copy(last, args.output / f"{run_name}.png")
        rows.append({**row, "image": f"{run_name}.png"})
    return rows


def flat_scores(scores: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of a nested dict, each named by the words that lead to it."""
    found: dict[str, float] = {}
    for key, value in scores.items():
        name = f"{prefix} {key}".strip()
        found |= flat_scores(value, name) if isinstance(value, dict) else {name: round(value, 4)}
    return found


STAGES: dict[str, tuple[Callable, str]] = {
    "tests": (tests, "`pytest -m gpu`"),
    "step": (step, "Two generators, two discriminators: one step, turn by turn with the plain one of the paper"),
    "loader": (loader, "Images a second from the disk"),
    "memory": (memory, "Less memory than a batch needs, and a resumed run"),
    "ranks": (ranks, "Processes"),
    "inference": (one_image, "One image"),
    "training": (training, "Training by the clock"),
}


# ---------------------------------------------------------------------------------------------
# The report


def machine(device: torch.device) -> str:
    """What the rows were measured on."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    if device.type != "cuda":
        return f"{platform.machine()} CPU, {cores}, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name(device)}, {cores}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def table(rows: list[dict]) -> list[str]:
    """Rows of one stage as markdown, their images below."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "image"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in rows]
    for row in rows:
        if "image" in row:
            lines += ["", f"![the fixed test images after the last epoch: {row['recipe']}]({row['image']})"]
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
    for name, stages in results.items():
        lines += ["", f"## {name}"]
        for stage, found in stages.items():
            lines += ["", f"### {STAGES[stage][1]}", "", f"`{found['command']}`, {found['seconds']:.0f} s", ""]
            lines += table(found["rows"])
    write_text(output / "gpu.md", "\n".join(lines) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stages",
        nargs="*",
        choices=STAGES,
        help="do these, again if need be (default: those that are missing; none: write gpu.md alone)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and images: to see that all stages work")
    parser.add_argument("--size", type=int, default=256, help="side of the images, px")
    parser.add_argument("--processes", type=int, default=4, help="that run the tests (needs pytest-xdist)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="what is trained")
    parser.add_argument("--minutes", type=float, default=2, help="of each training")
    parser.add_argument("--epochs", type=int, default=8, help="into which a training is divided")
    parser.add_argument("--dataset_name", default="horse2zebra", help="what is trained on")
    parser.add_argument("--data_root", type=Path, default=Path("datasets"), help="where that lies")
    parser.add_argument("--output", type=Path, help="where gpu.json and gpu.md go")
    parser.add_argument("--megabytes", type=float, help=argparse.SUPPRESS)  # of the GPU that --pace may take
    parser.add_argument("--pace", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # warm and timed steps, flags
    args = parser.parse_args(argv)
    args.device = devices.pick_device(args.device)
    if args.tiny:
        args.size = 16
        args.minutes = 0.02
        args.dataset_name = "day2night"
    if args.output is None:
        args.output = ROOT / "docs" if args.device.type == "cuda" and not args.tiny else SCRATCH
    return args


def do_stage(args: argparse.Namespace, name: str) -> dict:
    """The rows of a stage, its seconds, the command that makes them, and whether all of it worked."""
    print(f"-- {name}", flush=True)
    start = time.perf_counter()
    try:
        rows = STAGES[name][0](args)
    except StageError as error:
        rows = [{"error": str(error)}]
    words = ["python benchmarks/gpu.py --stages", name, *(["--tiny"] if args.tiny else []), "--size", str(args.size)]
    if name == "training":
        words += ["--minutes", f"{args.minutes:g}", "--recipes", *args.recipes]
    seconds = time.perf_counter() - start
    return {"command": " ".join(words), "seconds": seconds, "rows": rows, "ok": not any("error" in row for row in rows)}


@process.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.pace:
        print_pace(int(args.pace[0]), int(args.pace[1]), args.megabytes, args.pace[2:])
        return
    path = args.output / "gpu.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if args.stages == []:
        write(args.output, results)
        return
    done = results.setdefault(machine(args.device), {})
    missing = [name for name in STAGES if not done.get(name, {}).get("ok")]
    names = args.stages or missing
    if "training" in names and args.dataset_name != datasets.DEMO:
        datasets.find_dataset(args.data_root, args.dataset_name)  # said now rather than after all other stages
    for name in names:
        done[name] = do_stage(args, name)
        write(args.output, results)
    print(f"written to {args.output}/gpu.json and gpu.md")
    failed = [name for name in names if not done[name]["ok"]]
    if failed:
        raise utils.RunError(f"not all worked: {', '.join(failed)}; see {args.output}/gpu.md and the output above")


if __name__ == "__main__":
    main()
