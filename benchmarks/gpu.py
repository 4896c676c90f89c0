"""What only a GPU can show, stage by stage: tests, step, loader, memory, ranks, inference, training.

make gpu                                      all stages, on the GPU
make gpu DEVICE=cpu                           the same stages on tiny networks, in a few minutes
python benchmarks/gpu.py --stages step loader
python benchmarks/gpu.py --stages training --minutes 6 --recipes ours --data_root ../photos

Each stage takes under 8 minutes, and at its end writes its rows into gpu.json, and from all rows gpu.md, below --output
(docs/; of a CPU generated_images/gpu/). A stage that this machine has done is left out, unless --stages names it; an
interrupted training goes on from its last save.
"""

import argparse
import csv
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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import devices
import flags
import inference
import models
import train
import utils
from logs import read_losses
from metrics import median_ms
from weights import save_generator

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = Path("generated_images/gpu")  # what stages leave on the way to their rows
TINY = [
    "--img_height",
    "16",
    "--img_width",
    "16",
    "--num_residual",
    "1",
    "--ngf",
    "4",
    "--ndf",
    "4",
    "--n_layers_D",
    "1",
]
RECIPES = {  # of the stage training; the paper's is train.py's defaults in the paper's precision
    "paper": ["--batch_size", "1", "--precision", "fp32"],
    "ours": [
        "--batch_size",
        "1",
        "--precision",
        "bf16",
        "--compile",
        "--skips",
        "--ema",
        "0.999",
        "--upsample",
        "resize",
    ],
}


def run(*argv: object, **environment: str) -> str:
    """Run a program of this project; returns what it printed. What it says on the way is shown if it fails."""
    words = [sys.executable, *map(str, argv)]
    print(f"$ {' '.join(words[1:])}", flush=True)
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{words[1]} ended with {done.returncode}: {(done.stderr or done.stdout)[-3000:]}")
    return done.stdout


def read_csv(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------
# The stages: each takes the command line and returns its rows


def tests(args: argparse.Namespace) -> list[dict]:
    """The tests that need a GPU, in several processes where pytest-xdist is there."""
    parallel = ["-n", str(args.processes)] if args.processes > 1 else []
    argv = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", *parallel, str(ROOT / "tests/test_gpu.py")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout[-6000:])
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.M)
    return [{"passed": 0, "failed": 0, "skipped": 0, **counts, "which failed": ", ".join(failed)}]


def step(args: argparse.Namespace) -> list[dict]:
    """Our step against the plain one of the paper: precisions, memory formats, compiled."""
    output = SCRATCH / "step"
    if args.tiny:
        sizes = ["--sizes", 16, "--batches", 1, 2, "--ngf", 4, "--blocks", 1, "--n_layers_D", 1, "--rounds", 2]
    else:
        sizes = ["--sizes", args.size, "--batches", 1, 4, 10, "--rounds", 9, "--warm", 4]
    compiled = ["--compile"] if args.device.type == "cuda" else []
    rows = []
    for words in (["--precisions", "fp32"], ["--precisions", "bf16", "--choices", *compiled]):
        sizes_and_place = [*sizes, "--threads", 1, "--device", args.device, "--output", output]
        print(run(ROOT / "benchmarks/step.py", *words, *sizes_and_place))
        found = read_csv(output / "step.csv")
        rows += [row for row in found if not (rows and row["variant"] == "reference")]
    return rows


def loader(args: argparse.Namespace) -> list[dict]:
    """Images a second that reading processes deliver; compare with images/s of the step."""
    output = SCRATCH / "loader"
    sizes = (
        ["--size", 16, "--photo", 32, "--count", 8, "--epochs", 2]
        if args.tiny
        else ["--size", args.size, "--photo", 512]
    )
    workers = [0, 2] if args.tiny else [0, 4, 8]
    print(run(ROOT / "benchmarks/loader.py", *sizes, "--batch", 4, "--workers", *workers, "--output", output))
    return read_csv(output / "loader.csv")


def flags_of_size(args: argparse.Namespace) -> list[str]:
    """Flags of train.py for a network of the size that this call measures at."""
    return TINY if args.tiny else ["--img_height", str(args.size), "--img_width", str(args.size)]


def train_drawn(
    args: argparse.Namespace, run_name: str, *argv: object, launch: tuple = (), **environment: str
) -> float:
    """Train on the drawn set, anew; returns seconds from start to end."""
    words = ["--dataset_name", "day2night", *flags_of_size(args), "--device", args.device, "--run_name", run_name]
    start = time.perf_counter()
    run(*launch, ROOT / "train.py", *words, "--overwrite", "--sample_interval", 10**6, *argv, **environment)
    return time.perf_counter() - start


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
    steps = ["--steps_per_epoch", 4, "--num_epochs", 2, "--checkpoint_interval", 1, "--precision", "bf16"]
    batch = 2 if args.tiny else 10
    for fraction in (1.0, 0.25, 0.1) if args.device.type == "cuda" else (1.0,):
        limit = f"torch.cuda.set_per_process_memory_fraction({fraction}); " if fraction < 1 else ""
        code = f"import runpy, sys, torch; {limit}sys.path.insert(0, {str(ROOT)!r}); sys.argv = sys.argv[1:]; "
        code += "runpy.run_path(sys.argv[0], run_name='__main__')"
        name = f"gpu_memory_{fraction}"
        taken = train_drawn(args, name, *steps, "--batch_size", batch, launch=("-c", code))
        state = torch.load(f"saved_models/{name}/latest.pt", weights_only=True)
        micro_batch = state["loader"]["piece"] or batch
        loss = read_losses(Path(f"saved_models/{name}/losses.csv"))[-1]["loss_G"]
        rows.append({"what": f"batch {batch} in {fraction:.0%} of the memory", "s": round(taken, 1)})
        rows[-1] |= {"micro-batch": micro_batch, "loss_G": round(loss, 3)}
    common = [*steps, "--deterministic", "--batch_size", 2]
    train_drawn(args, "gpu_whole", *common)
    train_drawn(args, "gpu_resumed", *common)
    start = time.perf_counter()
    run(
        ROOT / "train.py",
        "--run_name",
        "gpu_resumed",
        "--device",
        args.device,
        "--precision",
        "bf16",
        "--start_from",
        1,
    )
    taken = round(time.perf_counter() - start, 1)
    equal = "equal, bit for bit" if same_state("gpu_whole", "gpu_resumed") else "NOT EQUAL"
    rows.append({"what": f"--deterministic, resumed in the middle: {equal}", "s": taken, "micro-batch": 2})
    return rows


def pace(args: argparse.Namespace, *words: object, launch: tuple = ()) -> dict:
    """Seconds a step of train.py with such flags, and the first loss, in a process of its own or in those of `launch`."""
    steps = (2, 5) if args.tiny else (5, 30)
    recipe = [*flags_of_size(args), "--device", args.device, *words]
    return json.loads(run(*launch, __file__, "--pace", *steps, *recipe).splitlines()[-1])


def print_pace(warm: int, timed: int, words: list[str]) -> None:
    """Make a model and time its steps on noise, in all processes that torchrun started."""
    utils.join_ranks()
    args = flags.with_vit_defaults(train.parse_args(words))
    device = devices.pick_device(args.device)
    model = train.make_model(args, train.make_nets(args, {}), device)
    noise = torch.Generator().manual_seed(0)
    shape = (2, args.batch_size, args.channels, args.img_height, args.img_width)
    reals = (torch.rand(shape, generator=noise) * 2 - 1)[:, utils.rank_slice(args.batch_size)].to(device)
    first = float(model.step(*reals)["loss_G"])
    for i in range(warm + timed):
        if i == warm:
            start = time.perf_counter()
        float(model.step(*reals, i + 1)["loss_G"])  # waits for the device
    seconds = (time.perf_counter() - start) / timed
    utils.say(json.dumps({"seconds": seconds, "loss_G": first}))
    utils.leave_ranks()


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


def onnx_ms(net: models.Generator, photo: torch.Tensor) -> float | str:
    """Milliseconds of an exported generator in onnxruntime on a GPU; empty where that is missing."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return ""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    weights = SCRATCH / "G_AB.safetensors"
    save_generator(weights, net, {"direction": "AtoB", "size": list(photo.shape[-2:])})
    run(ROOT / "export.py", "--weights", weights, "--output", SCRATCH / "G_AB.onnx")
    session = onnxruntime.InferenceSession(SCRATCH / "G_AB.onnx", providers=["CUDAExecutionProvider"])
    return round(median_ms(lambda: session.run(None, {"real_A": photo.numpy()})), 2)


def inference_(args: argparse.Namespace) -> list[dict]:
    """Milliseconds an image, from the host's memory and back: the default teacher and a thin student, whole and in tiles."""
    sides = (16, 32) if args.tiny else (256, 512, 1024)
    width = 4 if args.tiny else 64
    configs = {"teacher": models.GeneratorConfig(ngf=width)}
    configs["student"] = models.GeneratorConfig(ngf=width // 4, num_residual=3)
    rows = []
    for label, config in configs.items():
        net = models.build_generator(config)
        for side in sides:
            photo = torch.rand(1, 3, side, side) * 2 - 1
            row = {"network": label, "side": side}
            for precision in ("fp32", "bf16"):
                call = translator(args, net, precision, None)
                row[f"{precision}, ms"] = round(median_ms(lambda call=call, net=net, x=photo: call(net, x).cpu()), 2)
            row["bf16 in tiles, ms"] = ""
            if side == sides[-1]:
                call = translator(args, net, "bf16", side // 2)
                row["bf16 in tiles, ms"] = round(
                    median_ms(lambda call=call, net=net, x=photo: call(net, x).cpu(), 3), 2
                )
            row["ONNX on CUDA, ms"] = onnx_ms(net, photo)
            rows.append(row)
    return rows


def training(args: argparse.Namespace) -> list[dict]:
    """Train by the clock: as many steps as fit into --minutes, the rate falling over their second half."""
    rows = []
    for name in args.recipes:
        run_name = f"gpu_{args.dataset_name}_{name}"
        recipe = [word for word in RECIPES[name] if word != "--compile" or args.device.type == "cuda"]
        begun = Path(f"saved_models/{run_name}/latest.pt").exists()
        if begun:
            words = ["--start_from", "latest"]
        else:
            per_epoch = max(1, round(60 * args.minutes / pace(args, *recipe)["seconds"] / args.epochs))
            words = ["--dataset_name", args.dataset_name, "--data_root", args.data_root, *flags_of_size(args), *recipe]
            words += ["--num_epochs", args.epochs, "--steps_per_epoch", per_epoch, "--sample_interval", 10**6]
            words += ["--keep_checkpoints", 1, "--overwrite"]
        start = time.perf_counter()
        run(ROOT / "train.py", "--run_name", run_name, "--device", args.device, *words)
        minutes = (time.perf_counter() - start) / 60
        run(ROOT / "test.py", "--run_name", run_name, "--device", args.device, "--metrics", "cycle,identity")
        steps = torch.load(f"saved_models/{run_name}/latest.pt", weights_only=True)["step"]
        row = {"recipe": name, "data": args.dataset_name, "side": args.size, "steps": steps}
        row["minutes"] = "resumed" if begun else round(minutes, 1)
        scores = json.loads(Path(f"generated_images/{run_name}/test/metrics.json").read_text(encoding="utf-8"))
        rows.append(row | flat_scores({direction: scores[direction] for direction in ("AtoB", "BtoA")}))
        last = sorted(Path(f"generated_images/{run_name}").glob("epoch_*.png"))[-1]
        args.output.mkdir(parents=True, exist_ok=True)
        shutil.copy(last, args.output / f"{run_name}.png")
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
    "inference": (inference_, "One image"),
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
    """Rows of one stage as markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return lines + [f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in rows]


INTRODUCTION = """# What was measured on GPUs

Written by `benchmarks/gpu.py` from `gpu.json`. On your own card: `make gpu`, with `DATA=DIR` where `horse2zebra` lies; each stage takes
under 8 minutes, a stage that is done is left out. What is not in a table here was never measured on a GPU.

Proved without one, by the tests: a whole step, both generators, with gradient penalty, averages and a student, runs on torch's
meta device, so nothing in it waits for the GPU or leaves a tensor on the CPU; every network compiles as one graph, and the
compiled step's losses are the eager ones'; fp16 scales its losses, skips a step that overflows and keeps the scale over a resume; out of
memory at any call of a step, the step is repeated in micro-batches and teaches the same; states go on in another memory format.
What will be decided by these tables, and how: [benchmarks/NOTES.md](../benchmarks/NOTES.md#what-a-gpu-will-decide)."""


def write(output: Path, results: dict) -> None:
    """Write gpu.json, and gpu.md from it."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = [INTRODUCTION]
    if not results:
        lines += ["", "**No GPU has been measured yet.**"]
    for name, stages in results.items():
        lines += ["", f"## {name}"]
        for stage, found in stages.items():
            lines += ["", f"### {STAGES[stage][1]}", "", f"`{found['command']}`, {found['seconds']:.0f} s", ""]
            lines += table(found["rows"])
            for grid in sorted(output.glob("gpu_*.png")) if stage == "training" else ():
                lines += ["", f"![the fixed test images after the last epoch of {grid.stem}]({grid.name})"]
    (output / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


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
    parser.add_argument("--processes", type=int, default=1, help="that run the tests (needs pytest-xdist)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="what is trained")
    parser.add_argument("--minutes", type=float, default=3, help="of each training")
    parser.add_argument("--epochs", type=int, default=8, help="into which a training is divided")
    parser.add_argument("--dataset_name", default="horse2zebra", help="what is trained on")
    parser.add_argument("--data_root", type=Path, default=Path("datasets"), help="where that lies")
    parser.add_argument("--output", type=Path, help="where gpu.json and gpu.md go")
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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.pace:
        print_pace(int(args.pace[0]), int(args.pace[1]), args.pace[2:])
        return
    path = args.output / "gpu.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if args.stages == []:  # the pages alone
        write(args.output, results)
        return
    done = results.setdefault(machine(args.device), {})
    for name in args.stages or [name for name in STAGES if name not in done]:
        print(f"-- {name}", flush=True)
        start = time.perf_counter()
        rows = STAGES[name][0](args)
        command = f"python benchmarks/gpu.py {' '.join(argv or sys.argv[1:])}".strip()
        done[name] = {"command": command, "seconds": time.perf_counter() - start, "rows": rows}
        write(args.output, results)
    print(f"written to {args.output}/gpu.json and gpu.md")


if __name__ == "__main__":
    main()
