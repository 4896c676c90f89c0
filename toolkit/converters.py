"""Other projects' generator files."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import LIMITS, Generator, GeneratorConfig, meta_network
from toolkit.files import check_tensors, is_state_dict, read_archive
from utils import InputError, one_line, say

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


# ---------------------------------------------------------------------------------------------
# Layouts of other projects


def conv_layers(net: nn.Module) -> list[str]:
    """Names of the convolutions of a generator of ours, in their order; behind each stands its normalisation layer."""
    return [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]


def next_layer(name: str) -> str:
    """Name of the layer behind another one in its Sequential."""
    container, _, place = name.rpartition(".")
    return f"{container}.{int(place) + 1}"


def tensor_names(state: Iterable[str], layers: dict[str, str]) -> dict[str, str]:
    """Name tensors of ours as another project does: their name → our name; layers: likewise of the convolutions."""
    theirs = {ours: name for name, ours in layers.items()}
    theirs |= {next_layer(ours): next_layer(name) for name, ours in layers.items()}
    split = [name.rpartition(".") for name in state]
    return {f"{theirs[module]}.{leaf}": f"{module}.{leaf}" for module, _, leaf in split}


def junyanz_layers(net: Generator) -> dict[str, str]:
    """Name the convolutions of a resnet as pytorch-CycleGAN-and-pix2pix does: their name → our name.

    source: junyanz/pytorch-CycleGAN-and-pix2pix, models/networks.py, ResnetGenerator
    """
    layers = {}
    place = 0  # in their one long Sequential
    for ours in conv_layers(net):
        part = ours.partition(".")[0]
        if part == "blocks":
            layer = ours.rpartition(".")[2]
            layers[f"model.{place}.conv_block.{layer}"] = ours
            place += layer == "5"  # the second convolution ends a block
        else:
            place += part in ("stem", "head")  # padding stands before it
            layers[f"model.{place}"] = ours
            place += 3  # normalisation and ReLU
    return layers


def to_junyanz(net: Generator) -> dict[str, Tensor]:
    """Return the state dict of a generator as pytorch-CycleGAN-and-pix2pix names it (*_net_G_A.pth).

    raises: InputError if that layout cannot hold the network
    """
    config = net.config
    tensors = net.state_dict()
    # there only an instance norm lets the convolution before it have a bias
    left_out = {name for name in tensors if config.norm == "none" and name.endswith(".bias")} - {"head.1.bias"}
    faults = {
        f"generator {config.generator}": config.generator != "resnet",
        f"upsample {config.upsample}": config.upsample != "deconv",
        "norm_output": config.norm_output,
        "skips": config.skips,
        "norm group": config.norm == "group",
        "norm none with biases": any(tensors[name].any() for name in left_out),
    }
    if any(faults.values()):
        fault = ", ".join(name for name, present in faults.items() if present)
        raise InputError(
            f"{fault}: the junyanz layout cannot hold it; expected a resnet with deconv, no norm_output, skips or group norm"
        )
    names = tensor_names(tensors.keys() - left_out, junyanz_layers(net))
    return {theirs: tensors[ours].detach().cpu().contiguous() for theirs, ours in names.items()}


def find_convs(path: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Find the convolutions of a ResNet generator, in their order: name → place in its one long Sequential, in a block or -1.

    What the Sequential and the blocks are called does not matter: "model.10.conv_block.1", "model.10.block.1".
    raises: InputError, with what it is, for another network
    """
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    convs = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"(\w+\.([0-9]{1,4})(?:\.\w+\.([0-9]{1,2}))?)\.weight", name)
        if match and len(shape) == 4:
            convs[match[1]] = (int(match[2]), int(match[3] or -1))
    found = None
    if "net.0.weight" in shapes or shapes.get("model.0.weight", ())[2:] == (4, 4):
        found = "a discriminator"
    elif any(name.endswith(".filt") for name in shapes):
        found = "a CUT generator with antialiasing filters, which no network here has"
    elif any(name.startswith("model.model.") for name in shapes):
        found = "a U-Net of pytorch-CycleGAN-and-pix2pix"
    elif any(name.startswith("net.") for name in shapes):
        found = "a network of UVCGAN"
    elif not convs:
        first = [f"{one_line(name)[:80]} {shapes[name]}" for name in sorted(shapes)[:3]]
        found = f"an unknown layout ({', '.join(first)})"
    if found:
        raise InputError(
            f"{path}: holds {found}; expected a ResNet generator of this project, pytorch-CycleGAN-and-pix2pix, CUT without antialiasing or PyTorch-GAN"
        )
    return dict(sorted(convs.items(), key=lambda item: item[1]))


def infer_norm(tensors: dict[str, Tensor], *convs: str) -> str:
    """Name the normalisation layer that most convolutions have behind them, all but the last."""
    kinds = Counter()
    for norm in map(next_layer, convs[:-1]):
        learnt = "batch" if f"{norm}.running_mean" in tensors else "instance_affine"
        kinds[learnt if f"{norm}.weight" in tensors else "instance"] += 1
    most = kinds.most_common(1)[0][0]
    hints = {name for name in tensors if name.endswith((".bias", ".running_mean"))} - {f"{convs[-1]}.bias"}
    # an instance norm has no weights either, but the convolution before it has a bias
    if most == "instance" and not hints:
        return "none"
    return most


def infer_config(path: Path, tensors: dict[str, Tensor], convs: dict[str, tuple[int, int]]) -> GeneratorConfig:
    """Read the config of a ResNet generator off its convolutions; match_layers compares every one with it afterwards.

    raises: InputError if convolutions are missing, or there are more than a network here can have
    """
    lost = {f"{name.removesuffix('.bias')}.weight" for name in tensors if name.endswith(".bias")} - tensors.keys()
    if lost:
        raise InputError(f"{path}: {one_line(min(lost))[:80]} is missing")
    outer = {name: tuple(tensors[f"{name}.weight"].shape) for name, (_, layer) in convs.items() if layer < 0}
    if len(outer) < 2 or len(outer) % 2:
        found = ", ".join(f"{one_line(name)[:80]}.weight {shape}" for name, shape in list(outer.items())[:8])
        words = "expected a first, a last, and as many that double the image as halve it"
        raise InputError(f"{path}: {len(outer)} convolutions outside of blocks ({found}); {words}")
    shapes = list(outer.values())
    rises = shapes[len(shapes) // 2]  # of a transposed convolution the number of inputs comes first
    sizes: dict[str, Any] = {"ngf": shapes[0][0], "n_downsampling": len(shapes) // 2 - 1}
    sizes["num_residual"] = len({place for place, layer in convs.values() if layer >= 0})
    for name, value in sizes.items():
        least, most = LIMITS[name]
        if not least <= value <= most:
            raise InputError(f"{path}: by names and shapes its {name} is {value}; expected {least} to {most}")
    upsample = "resize" if sizes["n_downsampling"] and rises[0] < rises[1] else "deconv"
    channels = 1 if shapes[0][1] == 1 else 3
    return GeneratorConfig(channels=channels, upsample=upsample, norm=infer_norm(tensors, *convs), **sizes)


def match_layers(
    path: Path, tensors: dict[str, Tensor], convs: dict[str, tuple[int, int]], net: Generator
) -> dict[str, str]:
    """Pair each convolution of a file with the one of ours that comes next, by shape and place: their name → our name.

    Before the one of a "resize" stand an nn.Upsample and maybe padding; a dropout may move a block's second one.
    raises: InputError with the first that is not what comes next
    """
    leads = {"stem": [1], "head": [1], "up": [0] if net.config.upsample == "deconv" else [1, 2]}
    state = net.state_dict()
    layers = {}
    free = 0  # next place
    pairs = zip(convs.items(), conv_layers(net), strict=False)  # where their numbers differ, a block has one or three
    for (theirs, (place, layer)), ours in pairs:
        part = ours.partition(".")[0]
        places = [free + lead for lead in leads.get(part, [0])]
        inner = {"1": [1], "5": [5, 6]}[ours[-1]] if part == "blocks" else [-1]
        shape = tuple(tensors[f"{theirs}.weight"].shape)
        wanted = tuple(state[f"{ours}.weight"].shape)
        if shape != wanted or place not in places or layer not in inner:
            where = f"layer {' or '.join(map(str, inner))} of the block at " if part == "blocks" else ""
            where += f"place {' or '.join(map(str, places))}"
            raise InputError(f"{path}: {theirs}.weight is {shape}; expected {wanted} at {where}")
        layers[theirs] = ours
        free = place + (3 if part != "blocks" else ours.endswith("5"))
    return layers


def fit_tensors(path: Path, tensors: dict[str, Tensor], net: Generator, layers: dict[str, str]) -> dict[str, Tensor]:
    """Bring the tensors of a file into the form that a generator of ours loads; `layers` as match_layers gives them.

    Statistics of instance normalisations are dropped, missing biases before a normalisation are zeros, and those
    before a batch norm, which shift what it subtracts, become part of its mean.
    raises: InputError with the first three names that do not fit
    """
    tensors = dict(tensors)
    state = net.state_dict()
    names = tensor_names(state, layers)
    wanted = {theirs: state[ours] for theirs, ours in names.items()}
    inner = list(layers)[:-1]
    folded = 0
    for theirs in inner:
        bias = f"{theirs}.bias"
        mean = f"{next_layer(theirs)}.running_mean"
        if net.config.norm != "batch":
            for leaf in STATISTICS:
                tensors.pop(f"{next_layer(theirs)}.{leaf}", None)
        elif bias in tensors and mean in tensors and tensors[bias].shape == tensors[mean].shape == wanted[mean].shape:
            tensors[mean] = tensors[mean] - tensors.pop(bias)
            folded += 1
    optional = {f"{theirs}.bias" for theirs in inner}
    optional |= {name for name in wanted if name.endswith(".num_batches_tracked")}  # old files do not count
    missing = (optional & wanted.keys()) - tensors.keys()
    tensors |= {name: torch.zeros_like(wanted[name], device="cpu") for name in missing}
    check_tensors(wanted, tensors, path)
    if folded:
        say(f"{path}: {folded} biases before batch norms became part of their means")
    if missing:
        without = " and no sign of a normalisation: read as a network without one" if net.config.norm == "none" else ""
        say(f"{path}: missing {min(missing)} ({len(missing)} in all){without}; filled with zeros")
    return {ours: tensors[theirs] for theirs, ours in names.items()}


def read_foreign(path: Path) -> tuple[GeneratorConfig, dict[str, Tensor], dict]:
    """Read a generator file of pytorch-CycleGAN-and-pix2pix, CUT without antialiasing, PyTorch-GAN, or a mix of them.

    PyTorch-GAN pads with zeros after upsampling, the network here by reflection: the border differs,
    and the rest a little, since the normalisation layers see the border too.
    returns: config, state dict in our names, metadata (size None: such files do not record it)
    raises:  InputError with what the file holds instead, or what in it does not fit
    source:  eriklindernoren/PyTorch-GAN, implementations/cyclegan/models.py, GeneratorResNet; others: to_junyanz
    """
    value: Any = read_archive(path)
    if isinstance(value, dict) and {"format", "nets"} <= value.keys():
        raise InputError(
            f"{path}: holds a whole training state; name it by --run_name and --epoch, or use the G_AB.safetensors or G_BA.safetensors beside it"
        )
    if isinstance(value, dict):
        value = value.get("state_dict", value.get("model_state_dict", value))
    if not is_state_dict(value) or not value:
        raise InputError(f"{path}: holds no tensors by name; expected the weights of one network")
    # DataParallel and torch.compile put themselves into the names, also one inside the other
    tensors = {re.sub(r"\b(module|_orig_mod)\.", "", name): x for name, x in value.items()}
    convs = find_convs(path, tensors)
    config = infer_config(path, tensors, convs)
    net = meta_network(config)
    tensors = fit_tensors(path, tensors, net, match_layers(path, tensors, convs, net))
    if config.upsample == "resize" and config.n_downsampling:
        say(f"{path}: PyTorch-GAN pads with zeros after upsampling, here it is reflection; borders will differ")
    match = re.search(r"(?<![A-Za-z])(?:net_G_(A|B)|G_(AB|BA))(?![A-Za-z])", path.name)
    metadata = {
        "direction": {"A": "AtoB", "B": "BtoA"}[(match[1] or match[2])[0]] if match else None,
        "size": None,
        "range": [-1, 1],
        "config": dataclasses.asdict(config),
    }
    return config, tensors, metadata
