"""Generator files of other projects: read them, and write the layout of pytorch-CycleGAN-and-pix2pix.

config, tensors, metadata = read_foreign(Path("latest_net_G_A.pth"))
torch.save(to_junyanz(G_AB), "latest_net_G_A.pth")

These projects put all layers of a ResNet generator into one long nn.Sequential. A file is read in three steps: find its
convolutions, infer the config from their number and shapes, and pair them in order with those of a generator that is
built from this config. Each normalisation layer follows its convolution.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import Generator, GeneratorConfig, meta_network
from toolkit.files import check_tensors, is_state_dict, read_archive
from utils import InputError, one_line, say

Convs = dict[str, tuple[int, int]]  # name → index in the long Sequential, index in a residual block (outside: -1)


# ---------------------------------------------------------------------------------------------
# Names of layers


def conv_layers(net: nn.Module) -> list[str]:
    """Return the names of the convolutions of a generator, in order."""
    return [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]


def next_layer(name: str) -> str:
    """Return the name of the layer that follows in the same Sequential."""
    container, _, index = name.rpartition(".")
    return f"{container}.{int(index) + 1}"


def tensor_names(state: Iterable[str], convs: dict[str, str]) -> dict[str, str]:
    """Return the names that tensors have in another project: their name → our name.

    convs: the same for the convolutions
    """
    theirs = {ours: name for name, ours in convs.items()}
    theirs |= {next_layer(ours): next_layer(name) for name, ours in convs.items()}
    split = [name.rpartition(".") for name in state]
    return {f"{theirs[module]}.{leaf}": f"{module}.{leaf}" for module, _, leaf in split}


# ---------------------------------------------------------------------------------------------
# Writing


def junyanz_convs(net: Generator) -> dict[str, str]:
    """Return the names of the convolutions in pytorch-CycleGAN-and-pix2pix: their name → our name.

    source: junyanz/pytorch-CycleGAN-and-pix2pix, models/networks.py, ResnetGenerator
    """
    convs = {}
    index = 0
    for ours in conv_layers(net):
        part = ours.partition(".")[0]
        if part == "blocks":
            inner = ours.rpartition(".")[2]
            convs[f"model.{index}.conv_block.{inner}"] = ours
            index += inner == "5"  # the second convolution ends a block
        else:
            index += part in ("stem", "head")  # padding comes first
            convs[f"model.{index}"] = ours
            index += 3  # normalisation and ReLU follow
    return convs


def to_junyanz(net: Generator) -> dict[str, Tensor]:
    """Return the state dict of a generator with the names of pytorch-CycleGAN-and-pix2pix (*_net_G_A.pth).

    raises: InputError if that layout cannot hold the network
    """
    config = net.config
    tensors = net.state_dict()
    # in that project only an instance norm lets the convolution before it have a bias
    omitted = {name for name in tensors if config.norm == "none" and name.endswith(".bias")} - {"head.1.bias"}
    obstacles = {
        f"generator {config.generator}": config.generator != "resnet",
        f"upsample {config.upsample}": config.upsample != "deconv",
        "norm_output": config.norm_output,
        "skips": config.skips,
        "norm group": config.norm == "group",
        "norm none with biases": any(tensors[name].any() for name in omitted),
    }
    found = ", ".join(name for name, present in obstacles.items() if present)
    if found:
        raise InputError(
            f"{found}: the junyanz layout cannot hold it; expected a resnet with deconv, no norm_output, skips or group norm"
        )
    names = tensor_names([name for name in tensors if name not in omitted], junyanz_convs(net))
    return {theirs: tensors[ours].detach().cpu().contiguous() for theirs, ours in names.items()}


# ---------------------------------------------------------------------------------------------
# Reading


def read_foreign(path: Path) -> tuple[GeneratorConfig, dict[str, Tensor], dict]:
    """Read a generator of pytorch-CycleGAN-and-pix2pix, CUT without antialiasing, PyTorch-GAN, or a mix of their layouts.

    PyTorch-GAN pads with zeros after upsampling, this project by reflection: the border of its images differs, and the
    rest a little, since the normalisation layers see the border too.
    returns: config, state dict with our names, metadata (size None: such files do not record it)
    raises:  InputError that says what the file holds instead, or what in it does not fit
    source:  eriklindernoren/PyTorch-GAN, implementations/cyclegan/models.py, GeneratorResNet; others: junyanz_convs
    """
    value: Any = read_archive(path)
    if isinstance(value, dict) and {"format", "nets"} <= value.keys():
        raise InputError(f"{path}: holds a whole training state; give --run_name and --epoch, or a G_AB.safetensors")
    if isinstance(value, dict):
        value = value.get("state_dict", value.get("model_state_dict", value))
    if not is_state_dict(value) or not value:
        raise InputError(f"{path}: holds no tensors by name; expected the weights of one network")
    # DataParallel and torch.compile add these prefixes, sometimes both
    tensors = {re.sub(r"\b(module|_orig_mod)\.", "", name): x for name, x in value.items()}
    convs = find_convs(path, tensors)
    config = infer_config(path, tensors, convs)
    net = meta_network(config)
    tensors = fit_tensors(path, tensors, net, match_convs(path, tensors, convs, net))
    if config.upsample == "resize":
        say(f"{path}: PyTorch-GAN pads with zeros after upsampling, here it is reflection; borders will differ")
    match = re.search(r"(?<![A-Za-z])(?:net_G_(A|B)|G_(AB|BA))(?![A-Za-z])", path.name)
    direction = {"A": "AtoB", "B": "BtoA"}[(match[1] or match[2])[0]] if match else None
    metadata = {"direction": direction, "size": None, "range": [-1, 1], "config": dataclasses.asdict(config)}
    return config, tensors, metadata


def find_convs(path: Path, tensors: dict[str, Tensor]) -> Convs:
    """Find the convolutions of a ResNet generator, in order.

    The names of the Sequential and of the blocks do not matter: "model.10.conv_block.1", "model.10.block.1".
    raises: InputError for another network
    """
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    convs = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"(\w+\.([0-9]{1,4})(?:\.\w+\.([0-9]{1,2}))?)\.weight", name)
        if match and len(shape) == 4:
            convs[match[1]] = (int(match[2]), int(match[3] or -1))
    other = None
    if "net.0.weight" in shapes or shapes.get("model.0.weight", ())[2:] == (4, 4):
        other = "a discriminator"
    elif any(name.endswith(".filt") for name in shapes):
        other = "a CUT generator with antialiasing filters, which this project does not have"
    elif any(name.startswith("model.model.") for name in shapes):
        other = "a U-Net of pytorch-CycleGAN-and-pix2pix"
    elif any(name.startswith("net.") for name in shapes):
        other = "a network of UVCGAN"
    elif not convs:
        first = [f"{one_line(name)[:80]} {shapes[name]}" for name in sorted(shapes)[:3]]
        other = f"an unknown layout ({', '.join(first)})"
    if other:
        raise InputError(
            f"{path}: holds {other}; expected a ResNet generator of this project, pytorch-CycleGAN-and-pix2pix, CUT without antialiasing or PyTorch-GAN"
        )
    return dict(sorted(convs.items(), key=lambda item: item[1]))


def infer_config(path: Path, tensors: dict[str, Tensor], convs: Convs) -> GeneratorConfig:
    """Infer the config of a ResNet generator from its convolutions; match_convs then compares each of them with it.

    raises: InputError if convolutions are missing, or a value is out of range
    """
    missing = {f"{name.removesuffix('.bias')}.weight" for name in tensors if name.endswith(".bias")} - tensors.keys()
    if missing:
        raise InputError(f"{path}: {one_line(min(missing))[:80]} is missing")
    outer = {name: tuple(tensors[f"{name}.weight"].shape) for name, (_, inner) in convs.items() if inner < 0}
    if len(outer) < 2 or len(outer) % 2:
        found = ", ".join(f"{one_line(name)[:80]}.weight {shape}" for name, shape in list(outer.items())[:8])
        raise InputError(
            f"{path}: {len(outer)} convolutions outside of blocks ({found}); expected a first, a last, and as many upsampling as downsampling ones"
        )
    shapes = list(outer.values())
    first_up = shapes[len(shapes) // 2]  # (out, in, height, width), but (in, out, ...) of a transposed convolution
    try:
        return GeneratorConfig(
            channels=1 if shapes[0][1] == 1 else 3,
            ngf=shapes[0][0],
            num_residual=len({index for index, inner in convs.values() if inner >= 0}),
            n_downsampling=len(shapes) // 2 - 1,
            upsample="resize" if len(shapes) > 2 and first_up[0] < first_up[1] else "deconv",
            norm=infer_norm(tensors, list(convs)),
        )
    except ValueError as error:
        raise InputError(f"{path}: its names and shapes give {error}") from error


def infer_norm(tensors: dict[str, Tensor], convs: list[str]) -> str:
    """Return the kind of normalisation layer that follows most convolutions, the last one excluded."""
    kinds = Counter()
    for norm in map(next_layer, convs[:-1]):
        learned = "batch" if f"{norm}.running_mean" in tensors else "instance_affine"
        kinds[learned if f"{norm}.weight" in tensors else "instance"] += 1
    kind = kinds.most_common(1)[0][0]
    # without learned weights an instance norm only shows by biases before it, or by running statistics
    signs = {name for name in tensors if name.endswith((".bias", ".running_mean"))} - {f"{convs[-1]}.bias"}
    return "none" if kind == "instance" and not signs else kind


def match_convs(path: Path, tensors: dict[str, Tensor], convs: Convs, net: Generator) -> dict[str, str]:
    """Pair the convolutions of a file, in order, with those of `net`: their name → our name.

    raises: InputError for the first one whose shape or position is not the expected one
    """
    # how many layers precede a convolution: padding; in "resize" an nn.Upsample and maybe padding
    preceding = {"stem": [1], "head": [1], "up": [0] if net.config.upsample == "deconv" else [1, 2]}
    state = net.state_dict()
    matched = {}
    start = 0  # index of the next layer
    # strict=False: too many or too few convolutions in a block show as a wrong position
    for (theirs, (index, inner)), ours in zip(convs.items(), conv_layers(net), strict=False):
        part = ours.partition(".")[0]
        indices = [start + count for count in preceding.get(part, [0])]
        where = f"position {' or '.join(map(str, indices))}"
        inners = [-1]
        if part == "blocks":
            inners = [1] if ours.endswith("1") else [5, 6]  # a dropout layer may shift the second convolution
            where = f"layer {' or '.join(map(str, inners))} of the block at {where}"
        shape = tuple(tensors[f"{theirs}.weight"].shape)
        expected = tuple(state[f"{ours}.weight"].shape)
        if shape != expected or index not in indices or inner not in inners:
            raise InputError(f"{path}: {theirs}.weight is {shape}; expected {expected} at {where}")
        matched[theirs] = ours
        start = index + (3 if part != "blocks" else ours.endswith("5"))  # normalisation and ReLU; a block's end
    return matched


def fit_tensors(path: Path, tensors: dict[str, Tensor], net: Generator, convs: dict[str, str]) -> dict[str, Tensor]:
    """Convert the tensors of a file to the state dict of `net`.

    Running statistics of instance norms, which are not used, are dropped. Missing biases before a normalisation layer,
    which would remove them, are zeros; biases before a batch norm are subtracted from its running mean.
    convs:  as match_convs returns them
    raises: InputError with the first three names that do not fit
    """
    tensors = dict(tensors)
    state = net.state_dict()
    names = tensor_names(state, convs)
    wanted = {theirs: state[ours] for theirs, ours in names.items()}
    optional = {name for name in wanted if name.endswith(".num_batches_tracked")}  # old files do not have them
    folded = 0
    for conv in list(convs)[:-1]:
        bias = f"{conv}.bias"
        mean = f"{next_layer(conv)}.running_mean"
        optional.add(bias)
        if net.config.norm != "batch":
            for leaf in ("running_mean", "running_var", "num_batches_tracked"):
                tensors.pop(f"{next_layer(conv)}.{leaf}", None)
        elif bias in tensors and mean in tensors and tensors[bias].shape == tensors[mean].shape:
            tensors[mean] = tensors[mean] - tensors.pop(bias)
            folded += 1
    missing = (optional & wanted.keys()) - tensors.keys()
    tensors |= {name: torch.zeros_like(wanted[name], device="cpu") for name in missing}
    check_tensors(wanted, tensors, path)
    if folded:
        say(f"{path}: {folded} biases before batch norms became part of their means")
    if missing:
        say(f"{path}: missing {min(missing)} ({len(missing)} in all); filled with zeros")
    if net.config.norm == "none":
        say(f"{path}: no sign of a normalisation; read as a network without one")
    return {ours: tensors[theirs] for theirs, ours in names.items()}
