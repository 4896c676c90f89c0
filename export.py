"""Ship a generator: as ONNX, checked against PyTorch, or in the layout of pytorch-CycleGAN-and-pix2pix.

python export.py --run_name horse2zebra --direction AtoB
python export.py --weights saved_models/horse2zebra_student/G_BA.safetensors --output zebra2horse.onnx
python export.py --run_name horse2zebra --to junyanz
"""

import argparse
import functools
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import metrics
import utils
import weights

NETWORKS = {direction: name for name, direction in weights.DIRECTIONS.items()}
OPSET = 18
TOLERANCE = 1e-3  # between PyTorch's answers and onnxruntime's, in the range [-1, 1]


def find_generator(args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """Read the generator that the flags name, and its recipe: direction, size in px, dataset_name."""
    if args.weights:
        net, recipe = weights.load_generator(args.weights)
        if args.direction not in (None, recipe["direction"] or args.direction):
            raise utils.InputError(
                f"--direction {args.direction}: {args.weights} translates {recipe['direction']}; leave the flag out"
            )
        return net, recipe | {"direction": recipe["direction"] or args.direction or "AtoB"}
    direction = args.direction or "AtoB"
    nets, recipe = weights.load_run(args.run_name, args.epoch)
    if NETWORKS[direction] not in nets:
        raise utils.InputError(f"--direction {direction}: the run {args.run_name} has no {NETWORKS[direction]}")
    return nets[NETWORKS[direction]].eval(), recipe | {"direction": direction}


# ---------------------------------------------------------------------------------------------
# ONNX


def onnx_bytes(net: nn.Module, recipe: dict) -> bytes:
    """Turn a generator into an ONNX model whose batch, height and width are free.

    Input real_X and output fake_Y: (N, channels, H, W), float32 in [-1, 1]; the metadata says which domains
    these are, and the size that the network was trained at.
    """
    import onnx

    source, target = recipe["direction"][0], recipe["direction"][-1]
    side = (
        2 * net.config.smallest_side + 3
    )  # divided by nothing: the exporter then keeps the padding, whatever the size
    picture = torch.zeros(2, net.config.channels, side, side + 2)  # a batch of 1 would become a constant
    free = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            net,
            (picture,),
            dynamo=True,
            input_names=[f"real_{source}"],
            output_names=[f"fake_{target}"],
            dynamic_shapes=({0: free, 2: free, 3: free},),
            opset_version=OPSET,
            verbose=False,
        )
    model = program.model_proto
    facts = {"range": [-1, 1], "channels": net.config.channels, "smallest_side": net.config.smallest_side}
    facts |= {name: recipe.get(name) for name in ("direction", "size", "dataset_name", "run_name", "epoch", "step")}
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    return model.SerializeToString()


def open_session(model: bytes) -> Callable[[Tensor], Tensor]:
    """Load an ONNX model into onnxruntime, on as many CPU threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pictures: torch.from_numpy(session.run(None, {name: pictures.numpy()})[0])


def check_sizes(net: nn.Module, recipe: dict) -> list[tuple[int, int]]:
    """Three sizes to compare at: as trained, the smallest, and one that nothing divides."""
    height, width = recipe["size"] or (256, 256)
    least = net.config.smallest_side
    return [(height, width), (least, least), (max(least, height // 2 + 5), max(least, width // 2 + 3))]


@torch.no_grad()
def compare(net: nn.Module, run: Callable[[Tensor], Tensor], sizes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Largest difference between PyTorch's answers and onnxruntime's, by size; in [0, 2]."""
    noise, differences = torch.Generator().manual_seed(0), {}
    for height, width in sizes:
        pictures = torch.rand(2, net.config.channels, height, width, generator=noise) * 2 - 1
        differences[f"{width}x{height}"] = (net(pictures) - run(pictures)).abs().max().item()
    return differences


@torch.no_grad()
def export_onnx(net: nn.Module, recipe: dict, output: Path) -> dict[str, float]:
    """Write the ONNX file once its answers equal PyTorch's at three sizes; returns the differences.

    raises: InputError if a package is missing; RunError if the answers differ, and nothing is written
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        utils.need_package(package, "--to onnx", "pip install -r requirements-export.txt")
    model = onnx_bytes(net, recipe)
    run, sizes = open_session(model), check_sizes(net, recipe)
    differences = compare(net, run, sizes)
    for line in metrics.format_table({"largest difference": differences}):
        utils.say(line)
    if not max(differences.values()) <= TOLERANCE:
        raise utils.RunError(
            f"{output}: not written; onnxruntime's answers differ from PyTorch's by more than {TOLERANCE}"
        )
    with utils.atomic_write(output) as temporary:
        temporary.write_bytes(model)
    picture = torch.zeros(1, net.config.channels, *sizes[0])
    programs = {"PyTorch, fp32": net, "onnxruntime": run}
    latency = {name: {"ms": metrics.median_ms(functools.partial(run, picture))} for name, run in programs.items()}
    utils.say(f"one picture of {sizes[0][1]}x{sizes[0][0]} px on {torch.get_num_threads()} CPU threads:")
    for line in metrics.format_table(latency):
        utils.say(line)
    return differences


# ---------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = utils.Parser(prog="export.py", description=__doc__)
    add = utils.flag_group(parser, "what")
    add("--run_name", type=utils.folder_name, default="horse2zebra", help="run in saved_models")
    add("--epoch", type=utils.epoch_name, default="latest", help="latest, best, or the number of a checkpoint")
    add("--weights", type=utils.path_name, default=None, metavar="FILE", help="a generator file, in place of a run")
    add("--direction", choices=("AtoB", "BtoA"), default=None, help="which generator (default: AtoB, or the file's)")
    add("--to", choices=("onnx", "junyanz"), default="onnx", help="an ONNX model, or weights under junyanz's names")
    add("--output", type=utils.path_name, metavar="FILE", help="where it goes (default: beside the weights)")
    args, given = parser.parse_args(argv), utils.given_flags(parser, argv)
    for flag in ("run_name", "epoch"):
        if args.weights and flag in given:
            parser.error(f"--weights and --{flag} contradict each other: give one of them")
    suffix = ".onnx" if args.to == "onnx" else ".pth"
    if args.output and (args.output.suffix != suffix or args.output.is_dir()):
        parser.error(f"--output {args.output}: expected a file that ends in {suffix}")
    return args


@utils.stage
def main(argv: Sequence[str] | None = None) -> Path:
    """Export one generator; returns the file."""
    args = parse_args(argv)
    net, recipe = find_generator(args)
    folder = args.weights.parent if args.weights else Path("saved_models") / args.run_name
    stem = args.weights.stem if args.weights else NETWORKS[recipe["direction"]]
    names = {"onnx": f"{stem}.onnx", "junyanz": f"latest_net_G_{recipe['direction'][0]}.pth"}
    output = args.output or folder / names[args.to]
    if not output.parent.is_dir():
        raise utils.InputError(f"--output {output}: no folder {output.parent}; make it first")
    if args.to == "onnx":
        export_onnx(net, recipe, output)
    else:
        with utils.atomic_write(output) as temporary:
            torch.save(weights.to_junyanz(net), temporary)
    utils.say(f"{recipe['direction']} written to {output}, {output.stat().st_size / 1e6:.1f} MB")
    return output


if __name__ == "__main__":
    main()
