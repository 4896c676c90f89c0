"""Milliseconds per image in PyTorch and onnxruntime on the CPU, and how far their outputs differ, by generator file.

python benchmarks/latency.py saved_models/day2night/G_AB.safetensors saved_models/day2night_student/G_AB.safetensors
OMP_NUM_THREADS=1 python benchmarks/latency.py --sides 64 256 --turns 30 teacher.safetensors student.safetensors

Batch 1; medians of passes made in turns, so that other programs slow all of them alike. The difference, in [0, 2], is the
largest at the three sizes of export.py. Needs the packages of requirements-export.txt. Prints a table in Markdown.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import markdown_table

import export
from models import Direction
from toolkit import cli, devices, process
from toolkit.runtimes import open_session
from toolkit.weights import load_generator

CPU = torch.device("cpu")


def in_bf16(net):
    def run(image):
        with devices.autocast(CPU, "bf16"):
            return net(image)

    return run


@torch.no_grad()
def median_times(programs, turns):
    """Median time of each program in ms; programs: (function, image) by any key."""
    times = {key: [] for key in programs}
    for turn in range(turns + 2):
        for key, (run, image) in programs.items():
            time.sleep(0.02)  # the threads of onnxruntime stay busy for a while, which would slow the next program
            start = time.perf_counter()
            run(image)
            if turn > 1:  # the first passes include set-up
                times[key].append(1000 * (time.perf_counter() - start))
    return {key: statistics.median(values) for key, values in times.items()}


@process.command
def main(argv=None):
    parser = cli.Parser(prog="latency.py", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="generator files")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 256], help="sides of the timed images, px")
    parser.add_argument("--turns", type=int, default=20, help="timed passes of each")
    args = parser.parse_args(argv)
    rows = {}
    programs = {}
    for file in args.files:
        net, metadata = load_generator(file)
        model = export.onnx_bytes(net, Direction.named(metadata["direction"] or "AtoB"), metadata)
        runs = {"PyTorch fp32": net, "PyTorch bf16": in_bf16(net), "onnxruntime": open_session(model)}
        size = metadata["size"] or (256, 256)
        difference = max(export.largest_differences(net, runs["onnxruntime"], size).values())
        parameters = sum(p.numel() for p in net.parameters())
        rows[file] = {"file": file, "parameters": f"{parameters:,}", "ONNX, MB": f"{len(model) / 1e6:.1f}"}
        rows[file]["difference"] = f"{difference:.1e}"
        for side in args.sides:
            image = torch.rand(1, net.config.channels, side, side) * 2 - 1
            programs |= {(file, f"{name}, {side} px"): (run, image) for name, run in runs.items()}
    for (file, column), milliseconds in median_times(programs, args.turns).items():
        rows[file][column] = f"{milliseconds:.1f}"
    bf16 = "in hardware" if devices.pick_precision("auto", CPU) == "bf16" else "emulated"
    print(f"milliseconds, {torch.get_num_threads()} CPU threads, batch 1, median of {args.turns}; bf16 is {bf16}")
    print("\n".join(markdown_table(list(rows.values()))))


if __name__ == "__main__":
    main()
