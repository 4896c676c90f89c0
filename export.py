"""Ship a generator: as ONNX, checked against PyTorch, or in the layout of pytorch-CycleGAN-and-pix2pix.

python export.py --run_name horse2zebra --direction AtoB
python export.py --weights saved_models/horse2zebra_student/G_BA.safetensors --output zebra2horse.onnx
python export.py --run_name horse2zebra --to junyanz
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import argparse
import functools
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from models import Generator
from toolkit import cli, converters, metrics, process
from toolkit.checkpoints import RUNS
from toolkit.files import atomic_write
from toolkit.inference import DOMAINS, NETWORKS, load_networks
from utils import InputError

OPSET = 18
TOLERANCE = 1e-3  # between PyTorch's outputs and onnxruntime's, in the range [-1, 1]


def find_generator(args: argparse.Namespace) -> tuple[Generator, dict]:
    """Read the generator that the flags name, and its metadata: direction, size in px, dataset_name."""
    nets, metadata = load_networks(args.weights, args.run_name, args.epoch, args.direction)
    direction = metadata["direction"] if args.weights else args.direction or "AtoB"
    if NETWORKS[direction] not in nets:
        raise InputError(f"--direction {direction}: the run {args.run_name} has no {NETWORKS[direction]}")
    return nets[NETWORKS[direction]].eval(), {**metadata, "direction": direction}


# ---------------------------------------------------------------------------------------------
# ONNX


def onnx_bytes(net: Generator, metadata: dict) -> bytes:
    """Turn a generator into an ONNX model whose batch, height and width are free.

    Input real_X and output fake_Y: (N, channels, H, W), float32 in [-1, 1]; the metadata says which domains
    these are, and the size that the network was trained at.
    """
    import onnx

    source, target = DOMAINS[metadata["direction"]]
    side = 2 * net.config.smallest_side + 3  # nothing divides it: the exporter then keeps the padding at any size
    images = torch.zeros(2, net.config.channels, side, side + 2)  # a batch of 1 would become a constant
    free = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program: Any = torch.onnx.export(
            net,
            (images,),
            dynamo=True,
            input_names=[f"real_{source}"],
            output_names=[f"fake_{target}"],
            dynamic_shapes=({0: free, 2: free, 3: free},),
            opset_version=OPSET,
            verbose=False,
        )
    model = program.model_proto
    facts: dict[str, Any] = {
        "range": [-1, 1],
        "channels": net.config.channels,
        "smallest_side": net.config.smallest_side,
    }
    facts |= {name: metadata.get(name) for name in ("direction", "size", "dataset_name", "run_name", "epoch", "step")}
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    return model.SerializeToString()


def open_session(model: bytes) -> Callable[[Tensor], Tensor]:
    """Load an ONNX model into onnxruntime, on as many CPU threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def check_sizes(net: Generator, metadata: dict) -> list[tuple[int, int]]:
    """Three sizes to compare at: as trained, the smallest, and one that nothing divides."""
    height, width = metadata["size"] or (256, 256)
    least = net.config.smallest_side
    return [(height, width), (least, least), (max(least, height // 2 + 5), max(least, width // 2 + 3))]


@torch.no_grad()
def compare(net: Generator, run: Callable[[Tensor], Tensor], sizes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Largest difference between PyTorch's outputs and onnxruntime's, by size; in [0, 2]."""
    noise = torch.Generator().manual_seed(0)
    differences = {}
    for height, width in sizes:
        images = torch.rand(2, net.config.channels, height, width, generator=noise) * 2 - 1
        differences[f"{width}x{height}"] = (net(images) - run(images)).abs().max().item()
    return differences


@torch.no_grad()
def export_onnx(net: Generator, metadata: dict, output: Path) -> dict[str, float]:
    """Write the ONNX file once its outputs equal PyTorch's at three sizes; returns the differences.

    raises: InputError if a package is missing; RunError if the outputs differ, and nothing is written
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        utils.need_package(package, "--to onnx", "pip install -r requirements-export.txt")
    model = onnx_bytes(net, metadata)
    run = open_session(model)
    sizes = check_sizes(net, metadata)
    differences = compare(net, run, sizes)
    for line in metrics.format_table({"largest difference": differences}):
        utils.say(line)
    if not max(differences.values()) <= TOLERANCE:
        words = f"onnxruntime's outputs differ from PyTorch's by more than {TOLERANCE}"
        raise utils.RunError(f"{output}: not written; {words}")
    with atomic_write(output) as temporary:
        temporary.write_bytes(model)
    image = torch.zeros(1, net.config.channels, *sizes[0])
    programs = {"PyTorch, fp32": net, "onnxruntime": run}
    latency = {name: {"ms": metrics.median_ms(functools.partial(run, image))} for name, run in programs.items()}
    utils.say(f"one image of {sizes[0][1]}x{sizes[0][0]} px on {torch.get_num_threads()} CPU threads:")
    for line in metrics.format_table(latency):
        utils.say(line)
    return differences


# ---------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="export.py", description=__doc__)
    add = cli.flag_group(parser, "what")
    add("--run_name", type=cli.folder_name, default="horse2zebra", help="run in saved_models")
    add("--epoch", type=cli.epoch_name, default="latest", help="latest, best, or the number of a checkpoint")
    add("--weights", type=cli.path_name, default=None, metavar="FILE", help="a generator file, in place of a run")
    add("--direction", choices=("AtoB", "BtoA"), default=None, help="which generator (default: AtoB, or the file's)")
    add("--to", choices=("onnx", "junyanz"), default="onnx", help="an ONNX model, or weights under junyanz's names")
    add("--output", type=cli.path_name, metavar="FILE", help="where it goes (default: beside the weights)")
    args = parser.parse_args(argv)
    cli.refuse_both(parser, args, ("weights", "run_name"), ("weights", "epoch"))
    suffix = ".onnx" if args.to == "onnx" else ".pth"
    if args.output and (args.output.suffix != suffix or args.output.is_dir()):
        parser.error(f"--output {args.output}: expected a file that ends in {suffix}")
    return args


@process.command
def main(argv: Sequence[str] | None = None) -> Path:
    """Export one generator; returns the file."""
    args = parse_args(argv)
    net, metadata = find_generator(args)
    folder = args.weights.parent if args.weights else RUNS / args.run_name
    stem = args.weights.stem if args.weights else NETWORKS[metadata["direction"]]
    names = {"onnx": f"{stem}.onnx", "junyanz": f"latest_net_G_{metadata['direction'][0]}.pth"}
    output = args.output or folder / names[args.to]
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: no folder {output.parent}; make it first")
    if args.weights and output.resolve() == args.weights.resolve():
        raise InputError(f"--output {output}: would overwrite the weights that are read; choose another file")
    if args.to == "onnx":
        export_onnx(net, metadata, output)
    else:
        with atomic_write(output) as temporary:
            torch.save(converters.to_junyanz(net), temporary)
    utils.say(f"{metadata['direction']} written to {output}, {output.stat().st_size / 1e6:.1f} MB")
    return output


if __name__ == "__main__":
    main()
