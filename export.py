"""Export a generator: as ONNX, checked against PyTorch, or in the layout of pytorch-CycleGAN-and-pix2pix; list a file.

python export.py --run_name horse2zebra --direction AtoB
python export.py --weights saved_models/horse2zebra_student/G_BA.safetensors --output zebra2horse.onnx
python export.py --run_name horse2zebra --for ncnn --size 256x256
python export.py --run_name horse2zebra --to junyanz
python export.py --list checkpoint.pth
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import argparse
import functools
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from toolkit.runtimes import RUNTIMES, Run, Runtime, Source, compress
from toolkit.values import ranges_of
from toolkit.weights import read_own
from utils import (
    InputError,
    RunError,
    counted,
    domain_names,
    epoch_name,
    folder_name,
    need_package,
    one_line,
    option,
    say,
)

TOLERANCE = 1e-3  # largest difference between the outputs of PyTorch and onnxruntime, which are in [-1, 1]
TOLERANCE_FIXED = 5e-3  # the same of runtimes that need a fixed size: some of them have faster, less exact convolutions
LEAST_PSNR = 30.0  # of outputs with rounded weights, in dB


def image_size(text: str) -> tuple[int, int] | None:
    """Accept a (height, width) in px such as 256x384, or "free", which is None; else raise ValueError."""
    if text == "free":
        return None
    height, _, width = text.partition("x")
    if not (
        height.isdecimal()
        and width.isdecimal()
        and 4 <= min(int(height), int(width)) <= max(int(height), int(width)) <= 8192
    ):
        raise ValueError(f"given {text!r}, expected free, or height and width in px such as 256x384")
    return int(height), int(width)


@dataclass(frozen=True)
class ExportOptions:
    """Which generator is exported, and where to."""

    run_name: str = option("horse2zebra", "run in saved_models", parse=folder_name)
    epoch: str = option("latest", "latest, best, or the number of a checkpoint", parse=epoch_name)
    weights: Path | None = option(None, "generator file, instead of a run", metavar="FILE")
    list: Path | None = option(None, "only show which networks a file of weights holds", metavar="FILE")
    assume: tuple[str, ...] = ASSUME
    direction: str | None = option(None, "which generator (default: AtoB, or the file's)", choices=("AtoB", "BtoA"))
    runtime: str = option("onnxruntime", "program that will run it", choices=tuple(RUNTIMES), flag="for")
    size: tuple[int, int] | None = option(
        None,
        "free, or fixed as HEIGHTxWIDTH (default: free; the training size where a runtime needs a fixed one)",
        parse=image_size,
        metavar="HxW",
    )
    batch: int = option(1, "images at once, of a fixed size", least=1, most=1024)
    weights_as: str = option("fp32", "how weights are stored", choices=("fp32", "fp16", "int8"))
    to: str = option("onnx", "an ONNX model, or weights for pytorch-CycleGAN-and-pix2pix", choices=("onnx", "junyanz"))
    output: Path | None = option(None, "file to write (default: beside the weights)", metavar="FILE")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="export.py", description=__doc__)
    cli.add_options(parser, "export", ExportOptions)
    args = parser.parse_args(argv)
    forms = ("for", "size", "batch", "weights_as")
    others = [("list", name) for name in ("weights", "run_name", "epoch", "direction", "to", "output", *forms)]
    cli.refuse_both(parser, args, ("weights", "run_name"), ("weights", "epoch"), ("to", "for"), *others)
    if args.to == "junyanz":
        cli.refuse_both(parser, args, *[("to", name) for name in forms])
    options = cli.config_of(ExportOptions, args)
    runtime = RUNTIMES[options.runtime]
    suffix = runtime.suffixes[0] if args.to == "onnx" else ".pth"
    folder_is_missing = args.output and not args.output.parent.is_dir()
    if args.output and (not args.output.name.endswith(suffix) or args.output.is_dir() or folder_is_missing):
        parser.error(f"--output {args.output}: expected a file that ends in {suffix}, in a folder that exists")
    if args.weights_as not in runtime.weights:
        allowed = ", ".join(runtime.weights)
        parser.error(f"--weights_as {args.weights_as}: --for {options.runtime} takes {allowed}")
    if runtime.is_fixed and "size" in args.given and args.size is None:
        parser.error(
            f"--size free: --for {options.runtime} needs a fixed size; give one such as 256x256, or leave it out"
        )
    if "batch" in args.given and not runtime.is_fixed and args.size is None:
        parser.error(f"--batch {args.batch}: has no effect on a free size; give --size, too")
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
    suffix = RUNTIMES[cli.config_of(ExportOptions, args).runtime].suffixes[0]
    name = f"{source.stem}{suffix}" if args.to == "onnx" else f"latest_net_G_{direction.source}.pth"
    output = args.output or source.parent / name
    if args.weights and output.resolve() == args.weights.resolve():
        raise InputError(f"--output {output}: would overwrite the weights that are read; choose another file")
    return output


@dataclass(frozen=True)
class Form:
    """What an exported network takes: a batch of images of a (height, width) in px, or any number of any size."""

    size: tuple[int, int] | None = None
    batch: int = 1
    weights_as: str = "fp32"

    def example(self, net: Generator) -> Tensor:
        """Return images of the shape with which the network is traced."""
        if self.size:
            return torch.zeros(self.batch, net.config.channels, *self.size)
        side = 2 * net.config.smallest_side + 3  # odd, so that the exporter keeps the padding for any size
        return torch.zeros(2, net.config.channels, side, side + 2)  # a batch of 1 would become a constant

    @property
    def dynamic_shapes(self) -> Any:
        """The dimensions that stay free, as torch.export takes them."""
        dynamic = torch.export.Dim.DYNAMIC
        return None if self.size else ({0: dynamic, 2: dynamic, 3: dynamic},)


FREE = Form()


def onnx_bytes(net: Generator, direction: Direction, metadata: dict, form: Form = FREE) -> bytes:
    """Convert a generator to ONNX: real_A → fake_B (or real_B → fake_A), float32 (N, C, H, W) in [-1, 1].

    Of a fixed size it has no arithmetic with shapes, and reflections are slices (toolkit/layers.py): few runtimes have more.
    """
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program: Any = torch.onnx.export(
            net,
            (form.example(net),),
            dynamo=True,
            input_names=[f"real_{direction.source}"],
            output_names=[f"fake_{direction.target}"],
            dynamic_shapes=form.dynamic_shapes,
            opset_version=18,
            verbose=False,
        )
    facts: dict[str, Any] = {"range": [-1, 1], "channels": net.config.channels}
    facts |= {"smallest_side": net.config.smallest_side, "direction": str(direction)}
    facts["domains"] = domain_names(str(metadata.get("dataset_name")), metadata.get("domains"))
    facts |= {name: metadata.get(name) for name in ("dataset_name", "run_name", "epoch", "step")}
    facts["size"] = form.size or metadata["size"] or UNKNOWN_SIZE
    facts |= {"form": "fixed" if form.size else "free", "weights_as": form.weights_as}
    facts["preprocess"] = PREPROCESS[0] if form.size else metadata.get("preprocess") or PREPROCESS[0]
    facts["resample"] = metadata.get(f"resample_{direction.source}") or RESAMPLE[0]
    facts |= {f"range_{domain}": limits for domain, limits in ranges_of(metadata).items()}
    model = program.model_proto
    compress(model, form.weights_as)
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    return model.SerializeToString()


@torch.no_grad()
def largest_differences(net: Generator, run: Run, size: tuple[int, int], batch: int = 0) -> dict[str, float]:
    """Return the largest differences of the outputs by image size, in [0, 2], over noise.

    batch: of a fixed size; 0: a free one, which is tried at `size`, the smallest, and an odd one
    """
    height, width = size
    least = net.config.smallest_side
    noise = torch.Generator().manual_seed(0)
    differences = {}
    sizes = (size, (least, least), (max(least, height // 2 + 5), max(least, width // 2 + 3)))
    for h, w in sizes[:1] if batch else sizes:
        images = torch.rand(batch or 2, net.config.channels, h, w, generator=noise) * 2 - 1
        differences[f"{w}x{h}"] = (net(images) - run(images)).abs().max().item()
    return differences


def check_run(net: Generator, run: Run, form: Form, size: tuple[int, int], tolerance: float, output: Path) -> None:
    """Print how far the outputs of a converted file are from PyTorch's; raise RunError if they are too far."""
    if form.weights_as == "fp32":
        differences = largest_differences(net, run, size, form.batch if form.size else 0)
        say(f"largest difference by image size: {', '.join(f'{size} {x:.2g}' for size, x in differences.items())}")
        if not max(differences.values()) <= tolerance:  # also if it is nan
            raise RunError(f"{output}: not written; its outputs differ from PyTorch's by more than {tolerance}")
        return
    noise = torch.Generator().manual_seed(0)
    images = torch.rand(form.batch, net.config.channels, *size, generator=noise) * 2 - 1
    decibels = metrics.psnr((run(images) + 1) * 127.5, (net(images) + 1) * 127.5)
    say(f"weights as {form.weights_as}: {decibels:.1f} dB to PyTorch in fp32, on noise of {size[1]}x{size[0]} px")
    if not decibels >= LEAST_PSNR:
        raise RunError(f"{output}: not written; {decibels:.1f} dB to PyTorch's outputs, expected at least {LEAST_PSNR}")


def check_form(net: Generator, name: str, form: Form) -> None:
    """Raise InputError if a runtime cannot take a network, or the network a size."""
    if net.config.generator == "unet_vit" and name in ("opencv", "ncnn"):
        reason = "OpenCV's importer cannot read it" if name == "opencv" else "ncnn has no layer for its reshapes"
        raise InputError(f"--for {name}: not possible for a unet_vit, {reason}; take onnxruntime or openvino")
    if form.size and min(form.size) < net.config.smallest_side:
        raise InputError(
            f"--size {form.size[0]}x{form.size[1]}: the generator needs {net.config.smallest_side} px a side"
        )
    multiple = 2**net.config.downsamplings
    if name == "ncnn" and form.size and (form.size[0] % multiple or form.size[1] % multiple):
        raise InputError(f"--size {form.size[0]}x{form.size[1]}: --for ncnn needs sides divisible by {multiple}")
    if name == "ncnn" and form.batch > 1:
        raise InputError(f"--batch {form.batch}: ncnn has no batches; leave it out")


@torch.no_grad()
def export_net(net: Generator, direction: Direction, metadata: dict, output: Path, options: ExportOptions) -> int:
    """Write the files of a runtime if its outputs equal PyTorch's, else raise RunError; returns their size in bytes."""
    runtime = RUNTIMES[options.runtime]
    size = options.size or metadata["size"] or UNKNOWN_SIZE
    form = Form(size if options.size or runtime.is_fixed else None, options.batch, options.weights_as)
    check_form(net, options.runtime, form)
    for package in runtime.packages:
        need_package(package, "--for " + options.runtime, runtime.install)
    names = (f"real_{direction.source}", f"fake_{direction.target}")
    shape = (form.batch, net.config.channels, *size)
    # only the ONNX file itself is stored with rounded weights; converters round them on their own
    onnx_form = form if runtime.suffixes == (".onnx",) else replace(form, weights_as="fp32")
    source = Source(
        net,
        lambda: onnx_bytes(net, direction, metadata, onnx_form),
        lambda: torch.export.export(net, (form.example(net),), dynamic_shapes=form.dynamic_shapes),
        form.weights_as,
        names,
        shape,
    )
    with tempfile.TemporaryDirectory() as folder:
        files, run = runtime.convert(source, Path(folder))
        check_run(net, run, form, size, TOLERANCE_FIXED if runtime.is_fixed else TOLERANCE, output)
        write_files(files, output, runtime)
        written = sum(file.stat().st_size for file in files)
    image = torch.zeros(form.batch, net.config.channels, *size)
    speeds = [metrics.median_ms(functools.partial(program, image)) for program in (net, run)]
    setting = f"{counted(form.batch, 'image')} of {size[1]}x{size[0]} px on {torch.get_num_threads()} CPU threads"
    say(f"{setting}: PyTorch fp32 {speeds[0]:.4g} ms, {options.runtime} {speeds[1]:.4g} ms")
    say(f"{options.runtime}: {runtime.hint}")
    return written


def write_files(files: Sequence[Path], output: Path, runtime: Runtime) -> None:
    """Copy the files of a runtime to where they were asked for, the main one last."""
    for file, suffix in reversed(list(zip(files, runtime.suffixes, strict=True))):
        target = output.with_name(output.name.removesuffix(runtime.suffixes[0]) + suffix)
        with atomic_write(target) as temporary:
            shutil.copyfile(file, temporary)


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
        written = export_net(net, direction, metadata, output, cli.config_of(ExportOptions, args))
    else:
        with atomic_write(output) as temporary:
            torch.save(converters.to_junyanz(net), temporary)
        for limit in converters.limits_of_junyanz(net.config):
            say(f"{output}, in pytorch-CycleGAN-and-pix2pix: {limit}")
        written = output.stat().st_size
    say(f"{direction} written to {output}, {written / 1e6:.1f} MB")
    return output


if __name__ == "__main__":
    main()
