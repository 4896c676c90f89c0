"""Generator files of other projects: read them, and write the layout of pytorch-CycleGAN-and-pix2pix.

These projects put all layers of a ResNet generator into one long nn.Sequential. A file is read in three steps: find its
convolutions, infer the config from their number and shapes, and pair them in order with those of a generator that is
built from this config. Each normalisation layer follows its convolution.
"""

import dataclasses
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import Generator, GeneratorConfig, meta_network
from toolkit import keras, uvcgan
from toolkit.files import check_tensors, is_state_dict, read_archive
from utils import InputError, one_line, say

Convs = dict[str, tuple[int, int]]  # name → index in the long Sequential, index in a residual block (outside: -1)
OTHER_NETWORKS = {  # by a tensor, as name and shape
    r"^(net\.0\.weight |model\.0\.weight \(\d+, \d+, 4, 4\))": "a discriminator",
    r"\.filt \(": "a CUT generator with antialiasing filters, which this project does not have",
    r"^model\.model\.": "a U-Net of pytorch-CycleGAN-and-pix2pix",
    r"^net\.": "a network of UVCGAN",
}


def _conv_positions(net: Generator) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield the convolutions of a generator in order, and where other projects have them.

    yields: our name, possible distances from the convolution before it in the long Sequential, possible indices in a
            residual block (outside: -1); the first ones are those of pytorch-CycleGAN-and-pix2pix
    source: junyanz/pytorch-CycleGAN-and-pix2pix, models/networks.py, ResnetGenerator
    """
    # how many layers precede a convolution: padding; in "resize" an nn.Upsample and maybe padding
    preceding = {"stem": [1], "head": [1], "up": [0] if net.config.upsample == "deconv" else [1, 2]}
    following = 0
    for name in (name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)):
        part = name.partition(".")[0]
        gaps = [following + count for count in preceding.get(part, [0])]
        inners = [-1]
        following = 3  # normalisation and ReLU, then the next layer
        if part == "blocks":
            inners = [5, 6] if name.endswith(".5") else [1]  # a dropout layer may shift the second convolution
            following = int(name.endswith(".5"))  # which ends the block
        yield name, gaps, inners


def _next_layer(name: str) -> str:
    container, _, index = name.rpartition(".")
    return f"{container}.{int(index) + 1}"


def _tensor_names(state: Iterable[str], convs: dict[str, str]) -> dict[str, str]:
    """Return the names that our tensors have in another project, from those of the convolutions: their name → ours."""
    theirs = {ours: name for name, ours in convs.items()}
    theirs |= {_next_layer(ours): _next_layer(name) for name, ours in convs.items()}
    split = [name.rpartition(".") for name in state]
    return {f"{theirs[module]}.{leaf}": f"{module}.{leaf}" for module, _, leaf in split}


def to_junyanz(net: Generator) -> dict[str, Tensor]:
    """Return the state dict of a generator with the names of pytorch-CycleGAN-and-pix2pix, or raise InputError."""
    expected = {
        "generator": ["resnet"],
        "upsample": ["deconv"],
        "norm": ["instance", "instance_affine", "batch"],  # without a norm, that project has no biases
        "norm_output": [False],
        "skips": [False],
        "rotated": [False],
    }
    found = {name: getattr(net.config, name) for name in expected}
    obstacles = [f"{name} {value}" for name, value in found.items() if value not in expected[name]]
    if obstacles:
        expected = "a resnet with deconv and an instance or batch norm, without norm_output and skips"
        raise InputError(f"{', '.join(obstacles)}: the junyanz layout cannot hold it; expected {expected}")
    convs = {}
    index = 0
    for ours, gaps, inners in _conv_positions(net):
        index += gaps[0]
        convs[f"model.{index}.conv_block.{inners[0]}" if inners[0] > 0 else f"model.{index}"] = ours
    tensors = net.state_dict()
    names = _tensor_names(tensors, convs)
    return {theirs: tensors[ours].cpu().contiguous() for theirs, ours in names.items()}


def read_foreign(path: Path) -> tuple[GeneratorConfig, dict[str, Tensor], dict]:
    """Read a generator of pytorch-CycleGAN-and-pix2pix, CUT without antialiasing, PyTorch-GAN, a mix of these, UVCGAN, or Keras.

    returns: config, state dict with our names, metadata (size None, except of a UNet-ViT: such files do not record it)
    raises:  InputError for a file that holds something else, or does not fit
    source:  eriklindernoren/PyTorch-GAN, implementations/cyclegan/models.py, GeneratorResNet; others: _conv_positions
    """
    if keras.is_keras(path):
        config, state = keras.read_keras(path)
        return config, state, _metadata(path, config)
    value: Any = read_archive(path)
    if isinstance(value, dict) and {"format", "nets"} <= value.keys():
        raise InputError(f"{path}: holds a whole training state; give --run_name and --epoch, or a G_AB.safetensors")
    if isinstance(value, dict):
        value = value.get("state_dict", value.get("model_state_dict", value))
    if not is_state_dict(value) or not value:
        raise InputError(f"{path}: holds no tensors by name; expected the weights of one network")
    # DataParallel and torch.compile add these prefixes, sometimes both
    tensors = {re.sub(r"\b(module|_orig_mod)\.", "", name): x for name, x in value.items()}
    if uvcgan.is_unet_vit(tensors):
        config, state, size = uvcgan.read_unet_vit(path, tensors)
        return config, state, _metadata(path, config, size)
    convs = _find_convs(path, tensors)
    if uvcgan.direction_of(path):
        uvcgan.fold_resnet(path, tensors, list(convs))
    config = _infer_config(path, tensors, convs)
    net = meta_network(config)
    state = _fit_tensors(path, tensors, net, _match_convs(path, tensors, convs, net))
    if config.upsample == "resize":
        say(f"{path}: PyTorch-GAN pads with zeros after upsampling, here it is reflection; borders will differ")
    return config, state, _metadata(path, config)


def _metadata(path: Path, config: GeneratorConfig, size: list[int] | None = None) -> dict:
    """Return the metadata of a foreign file; size: [height, width] of the training images in px, if it records them."""
    match = re.search(r"(?<![A-Za-z])(?:net_G_(A|B)|G_(AB|BA))(?![A-Za-z])", path.name)
    direction = {"A": "AtoB", "B": "BtoA"}[(match[1] or match[2])[0]] if match else uvcgan.direction_of(path)
    return {"direction": direction, "size": size, "range": [-1, 1], "config": dataclasses.asdict(config)}


def _find_convs(path: Path, tensors: dict[str, Tensor]) -> Convs:
    """Find the convolutions of a ResNet generator, in order, whatever the names of the Sequential and of the blocks."""
    convs = {}
    for name, x in tensors.items():
        match = re.fullmatch(r"(\w+\.([0-9]{1,4})(?:\.\w+\.([0-9]{1,2}))?)\.weight", name)
        if match and x.dim() == 4:
            convs[match[1]] = (int(match[2]), int(match[3] or -1))
    listing = [f"{one_line(name)[:80]} {tuple(tensors[name].shape)}" for name in sorted(tensors)]
    found = [kind for tensor, kind in OTHER_NETWORKS.items() if re.search(tensor, "\n".join(listing), re.MULTILINE)]
    if not convs:
        found.append(f"an unknown layout ({', '.join(listing[:3])})")
    if found:
        expected = "a ResNet generator of this project, pytorch-CycleGAN-and-pix2pix, CUT, PyTorch-GAN or UVCGAN"
        raise InputError(f"{path}: holds {found[0]}; expected {expected}")
    return dict(sorted(convs.items(), key=lambda item: item[1]))


def _infer_config(path: Path, tensors: dict[str, Tensor], convs: Convs) -> GeneratorConfig:
    """Infer the config of a ResNet generator from its convolutions; _match_convs then compares each of them with it."""
    shapes = [tuple(tensors[f"{name}.weight"].shape) for name, (_, inner) in convs.items() if inner < 0]
    if len(shapes) < 2 or len(shapes) % 2:
        raise InputError(f"{path}: {len(shapes)} convolutions outside of blocks; expected those of a ResNet generator")
    first_up = shapes[len(shapes) // 2]  # (out, in, height, width), but (in, out, ...) of a transposed convolution
    try:
        return GeneratorConfig(
            channels=1 if shapes[0][1] == 1 else 3,
            ngf=shapes[0][0],
            num_residual=len({index for index, inner in convs.values() if inner >= 0}),
            n_downsampling=len(shapes) // 2 - 1,
            upsample="resize" if len(shapes) > 2 and first_up[0] < first_up[1] else "deconv",
            norm=_infer_norm(tensors, list(convs)),
        )
    except ValueError as error:
        raise InputError(f"{path}: its names and shapes give {error}") from error


def _infer_norm(tensors: dict[str, Tensor], convs: list[str]) -> str:
    """Return the kind of normalisation layer that follows most convolutions, the last one excluded."""
    kinds = []
    for norm in map(_next_layer, convs[:-1]):
        learned = "batch" if f"{norm}.running_mean" in tensors else "instance_affine"
        kinds.append(learned if f"{norm}.weight" in tensors else "instance")
    # without learned weights an instance norm only shows by biases before it, or by running statistics
    signs = {name for name in tensors if name.endswith((".bias", ".running_mean"))} - {f"{convs[-1]}.bias"}
    kind = statistics.mode(kinds)
    return "none" if kind == "instance" and not signs else kind


def _match_convs(path: Path, tensors: dict[str, Tensor], convs: Convs, net: Generator) -> dict[str, str]:
    """Pair the convolutions of a file with those of `net`, comparing shapes and positions: their name → our name."""
    matched = {}
    previous = 0
    # strict=False: too many or too few convolutions in a block show as a wrong position
    for (theirs, (index, inner)), (ours, gaps, inners) in zip(convs.items(), _conv_positions(net), strict=False):
        indices = [previous + gap for gap in gaps]
        shape = tuple(tensors[f"{theirs}.weight"].shape)
        expected = tuple(net.get_parameter(f"{ours}.weight").shape)
        if shape != expected or index not in indices or inner not in inners:
            layer = "" if inners == [-1] else f"layer {' or '.join(map(str, inners))} of the block at "
            where = f"{layer}position {' or '.join(map(str, indices))}"
            raise InputError(f"{path}: {theirs}.weight is {shape}; expected {expected} at {where}")
        matched[theirs] = ours
        previous = index
    return matched


def _fit_tensors(path: Path, tensors: dict[str, Tensor], net: Generator, convs: dict[str, str]) -> dict[str, Tensor]:
    """Convert the tensors of a file to the state dict of `net`, without unused running statistics of instance norms.

    A normalisation layer removes biases before it: missing ones are zeros, those before a batch norm go into its mean.
    """
    state = net.state_dict()
    names = _tensor_names(state, convs)
    wanted = {theirs: state[ours] for theirs, ours in names.items()}
    optional = {name for name in wanted if name.endswith(".num_batches_tracked")}  # old files do not have them
    folded = 0
    for conv in list(convs)[:-1]:
        bias = f"{conv}.bias"
        mean = f"{_next_layer(conv)}.running_mean"
        optional.add(bias)
        if net.config.norm != "batch":
            for leaf in ("running_mean", "running_var", "num_batches_tracked"):
                tensors.pop(f"{_next_layer(conv)}.{leaf}", None)
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
