"""Export a generator: as ONNX, checked against PyTorch, or in the layout of pytorch-CycleGAN-and-pix2pix; list a file.

python export.py --run_name horse2zebra --direction AtoB
python export.py --weights saved_models/horse2zebra_student/G_BA.safetensors --output zebra2horse.onnx
python export.py --run_name horse2zebra --to junyanz
python export.py --list checkpoint.pth
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import argparse
import functools
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import DIRECTIONS, Direction, Generator
from toolkit import cli, converters, metrics, process
from toolkit.checkpoints import RUNS, is_state, load_state, networks_of
from toolkit.containers import direction_in
from toolkit.converters import ASSUME
from toolkit.files import atomic_write
from toolkit.images import PREPROCESS, RESAMPLE
from toolkit.inference import UNKNOWN_SIZE, load_networks
from toolkit.values import ranges_of
from toolkit.weights import read_own
from utils import InputError, RunError, domain_names, epoch_name, folder_name, need_package, one_line, option, say

TOLERANCE = 1e-3  # largest difference between the outputs of PyTorch and onnxruntime, which are in [-1, 1]


@dataclass(frozen=True)
class ExportOptions:
    """Which generator is exported, and where to."""

    run_name: str = option("horse2zebra", "run in saved_models", parse=folder_name)
    epoch: str = option("latest", "latest, best, or the number of a checkpoint", parse=epoch_name)
    weights: Path | None = option(None, "generator file, instead of a run", metavar="FILE")
    list: Path | None = option(None, "only show which networks a file of weights holds", metavar="FILE")
    assume: tuple[str, ...] = ASSUME
    direction: str | None = option(None, "which generator (default: AtoB, or the file's)", choices=("AtoB", "BtoA"))
    to: str = option("onnx", "an ONNX model, or weights for pytorch-CycleGAN-and-pix2pix", choices=("onnx", "junyanz"))
    output: Path | None = option(None, "file to write (default: beside the weights)", metavar="FILE")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="export.py", description=__doc__)
    cli.add_options(parser, "export", ExportOptions)
    args = parser.parse_args(argv)
    others = [("list", name) for name in ("weights", "run_name", "epoch", "direction", "to", "output")]
    cli.refuse_both(parser, args, ("weights", "run_name"), ("weights", "epoch"), *others)
    suffix = ".onnx" if args.to == "onnx" else ".pth"
    if args.output and (args.output.suffix != suffix or args.output.is_dir() or not args.output.parent.is_dir()):
        parser.error(f"--output {args.output}: expected a file that ends in {suffix}, in a folder that exists")
    return args


def find_generator(args: argparse.Namespace) -> tuple[Generator, Direction, dict]:
    """Load the generator that the options name, its direction, and its metadata."""
    asked = Direction.named(args.direction) if args.direction else None
    nets, metadata = load_networks(args.weights, args.run_name, args.epoch, asked, assumed=args.assume)
    if args.weights and len(nets) > 1:
        raise InputError(f"{args.weights}: holds generators of both directions; choose one with --direction")
    direction = Direction.named(metadata["direction"]) if args.weights else asked or DIRECTIONS[0]
    if direction.generator not in nets:
        raise InputError(f"--direction {direction}: the run {args.run_name} has no {direction.generator}")
    return nets[direction.generator].eval(), direction, metadata


def output_path(args: argparse.Namespace, direction: Direction) -> Path:
    """Return the file to write; raise InputError if it is the file that is read."""
    source = args.weights or RUNS / args.run_name / f"{direction.generator}.safetensors"
    name = f"{source.stem}.onnx" if args.to == "onnx" else f"latest_net_G_{direction.source}.pth"
    output = args.output or source.parent / name
    if args.weights and output.resolve() == args.weights.resolve():
        raise InputError(f"--output {output}: would overwrite the weights that are read; choose another file")
    return output


def onnx_bytes(net: Generator, direction: Direction, metadata: dict) -> bytes:
    """Convert a generator to ONNX: real_A → fake_B (or real_B → fake_A), float32 (N, C, H, W) of any N, H, W in [-1, 1]."""
    import onnx

    side = 2 * net.config.smallest_side + 3  # odd, so that the exporter keeps the padding for any size
    images = torch.zeros(2, net.config.channels, side, side + 2)  # a batch of 1 would become a constant
    dynamic = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program: Any = torch.onnx.export(
            net,
            (images,),
            dynamo=True,
            input_names=[f"real_{direction.source}"],
            output_names=[f"fake_{direction.target}"],
            dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
            opset_version=18,
            verbose=False,
        )
    facts: dict[str, Any] = {"range": [-1, 1], "channels": net.config.channels}
    facts |= {"smallest_side": net.config.smallest_side, "direction": str(direction)}
    facts["domains"] = domain_names(str(metadata.get("dataset_name")), metadata.get("domains"))
    facts |= {name: metadata.get(name) for name in ("dataset_name", "run_name", "epoch", "step")}
    facts["size"] = metadata["size"] or UNKNOWN_SIZE
    facts["preprocess"] = metadata.get("preprocess") or PREPROCESS[0]
    facts["resample"] = metadata.get(f"resample_{direction.source}") or RESAMPLE[0]
    facts |= {f"range_{domain}": limits for domain, limits in ranges_of(metadata).items()}
    model = program.model_proto
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    return model.SerializeToString()


def open_session(model: bytes) -> Callable[[Tensor], Tensor]:
    """Load an ONNX model into onnxruntime, with as many CPU threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


@torch.no_grad()
def largest_differences(net: Generator, run: Callable[[Tensor], Tensor], size: tuple[int, int]) -> dict[str, float]:
    """Return the largest differences of the outputs by image size: `size`, the smallest, and an odd one; in [0, 2]."""
    height, width = size
    least = net.config.smallest_side
    noise = torch.Generator().manual_seed(0)
    differences = {}
    for h, w in (size, (least, least), (max(least, height // 2 + 5), max(least, width // 2 + 3))):
        images = torch.rand(2, net.config.channels, h, w, generator=noise) * 2 - 1
        differences[f"{w}x{h}"] = (net(images) - run(images)).abs().max().item()
    return differences


@torch.no_grad()
def export_onnx(net: Generator, direction: Direction, metadata: dict, output: Path) -> None:
    """Write an ONNX file if its outputs equal PyTorch's, else raise RunError; print the differences and both speeds."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        need_package(package, "--to onnx", "pip install -r requirements-export.txt")
    model = onnx_bytes(net, direction, metadata)
    run = open_session(model)
    height, width = metadata["size"] or UNKNOWN_SIZE
    differences = largest_differences(net, run, (height, width))
    say(f"largest difference by image size: {', '.join(f'{size} {x:.2g}' for size, x in differences.items())}")
    if not max(differences.values()) <= TOLERANCE:  # also if it is nan
        raise RunError(f"{output}: not written; onnxruntime's outputs differ from PyTorch's by more than {TOLERANCE}")
    with atomic_write(output) as temporary:
        temporary.write_bytes(model)
    image = torch.zeros(1, net.config.channels, height, width)
    speeds = [metrics.median_ms(functools.partial(program, image)) for program in (net, run)]
    setting = f"one image of {width}x{height} px on {torch.get_num_threads()} CPU threads"
    say(f"{setting}: PyTorch fp32 {speeds[0]:.4g} ms, onnxruntime {speeds[1]:.4g} ms")


def list_file(path: Path, assumed: Sequence[str]) -> None:
    """Print a table of the networks in a file: of this project a generator or a training state, or of another project."""
    rows = [("network", "layout", "direction", "parameters", "channels", "readable")]
    if not path.is_file():
        raise InputError(f"--list {path}: no such file")
    if is_state(path):
        for name, net in networks_of(load_state(path), path).items():
            direction = direction_in(name) or "-"
            rows.append(
                (name, "this project", direction, count(net.state_dict()), net.config.channels, "with --run_name")
            )
    elif own := read_own(path):
        config, tensors, metadata = own
        rows.append(("the file", "this project", metadata["direction"], count(tensors), config.channels, "yes"))
    for network in [] if rows[1:] else converters.foreign_networks(path, assumed):
        name = network.stored.name or "the file"
        direction = network.stored.direction or (None if network.stored.name else direction_in(path.name))
        channels = network.config.channels if network.config else "-"
        readable = f"no: {network.reason}" if network.reason else "yes"
        readable = "no" if network.reason.startswith("holds ") else readable  # the layout says why
        readable += ", averaged weights" if network.stored.is_averaged else ""
        rows.append((name, network.layout, direction or "-", count(network.stored.tensors), channels, readable))
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def count(tensors: dict[str, Tensor]) -> str:
    """Return the number of weights among some tensors, which excludes running statistics."""
    return f"{sum(x.numel() for name, x in tensors.items() if name.endswith(('weight', 'bias', 'scale'))):,}"


@process.command
def main(argv: Sequence[str] | None = None) -> Path:
    """Export one generator; returns the file."""
    args = parse_args(argv)
    if args.list:
        list_file(args.list, args.assume)
        return args.list
    net, direction, metadata = find_generator(args)
    output = output_path(args, direction)
    if args.to == "onnx":
        export_onnx(net, direction, metadata, output)
    else:
        with atomic_write(output) as temporary:
            torch.save(converters.to_junyanz(net), temporary)
        for limit in converters.limits_of_junyanz(net.config):
            say(f"{output}, in pytorch-CycleGAN-and-pix2pix: {limit}")
    say(f"{direction} written to {output}, {output.stat().st_size / 1e6:.1f} MB")
    return output


if __name__ == "__main__":
    main()
