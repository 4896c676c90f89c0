"""Generators of UVCGAN: their names for the layers of our unet_vit, and their images in [0, 1].

source: Torbunov et al. 2022, arXiv:2203.02557; LS4GAN/uvcgan, models/generator/vitunet.py and base/networks.py
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from models import GeneratorConfig, meta_network
from toolkit.files import check_tensors
from utils import InputError

FILE_NAME = re.compile(r"(?<![A-Za-z])net_gen_(ab|ba)(?![A-Za-z])")  # maybe after the number of an epoch


def direction_of(path: Path) -> str | None:
    """Return the direction that a file name of UVCGAN tells, else None."""
    match = FILE_NAME.search(path.name)
    return {"ab": "AtoB", "ba": "BtoA"}[match[1]] if match else None


def is_unet_vit(tensors: dict[str, Tensor]) -> bool:
    """Whether these are the tensors of a UNet-ViT of UVCGAN; the networks of its second version have other names."""
    return "net.unet.conv.block.block.1.weight" in tensors


def read_unet_vit(what: str, tensors: dict[str, Tensor]) -> tuple[GeneratorConfig, dict[str, Tensor], list[int]]:
    """Convert the tensors of a UNet-ViT.

    returns: config, state dict with our names, [height, width] of the training images in px
    raises:  InputError for other sizes than the published ones, and for images that were not square
    """
    stem = tensors.get("net.layer_input.0.weight", torch.empty(0))
    blocks = {match[1] for name in tensors if (match := re.search(r"\.encoder\.encoder\.(\d+)\.", name))}
    try:
        channels = 1 if stem.shape[1:2] == (1,) else 3
        config = GeneratorConfig("unet_vit", channels=channels, vit_size="uvcgan", vit_blocks=len(blocks))
    except ValueError as error:
        raise InputError(f"{what}: its names and shapes give {error}") from error
    side = _pop_map_side(what, tensors, config) * 2**config.downsamplings
    net = meta_network(config).state_dict()
    names = _tensor_names(config)
    check_tensors({theirs: net[ours] for theirs, ours in names.items()}, tensors, what)
    state = {ours: tensors[theirs].float() for theirs, ours in names.items()}
    positions, features = state["position.mix.weight"].chunk(2, dim=1)
    state["position.mix.weight"] = torch.cat([features, positions], dim=1)  # ours has the features first
    fold_unit_range(state, "stem.1", "head.0")
    return config, state, [side, side]


def _pop_map_side(what: str, tensors: dict[str, Tensor], config: GeneratorConfig) -> int:
    """Take the coordinates of the tokens from the tensors, and return the side of their square map."""
    found = [tensors.pop(f"{_transformer(config)}.trans_input.{name}_const", torch.empty(0)) for name in "xy"]
    side = math.isqrt(found[0].numel())
    steps = torch.arange(side)
    expected = [steps.repeat_interleave(side), steps.repeat(side)]  # the first is the row, in spite of its name
    if side < 2 or any(not torch.equal(x.flatten(), y.to(x.dtype)) for x, y in zip(found, expected, strict=True)):
        shapes = " and ".join(str(tuple(x.shape)) for x in found)
        raise InputError(f"{what}: trans_input has coordinates {shapes}; expected those of a square map of 2x2 or more")
    return side


def _transformer(config: GeneratorConfig) -> str:
    return "net.unet" + config.downsamplings * ".inner_module"


def _tensor_names(config: GeneratorConfig) -> dict[str, str]:
    """Return the names of all tensors of a UNet-ViT: theirs → ours."""
    vit = _transformer(config)
    layers = {"net.layer_input.0": "stem.1", "net.layer_output": "head.0", f"{vit}.trans_output": "leave"}
    layers |= {f"{vit}.trans_input.embed.projector": "position.waves", f"{vit}.trans_input.output": "position.mix"}
    for level in range(config.downsamplings):
        unet = "net.unet" + level * ".inner_module"
        up = f"up.{config.downsamplings - 1 - level}"
        layers |= {f"{unet}.conv.downsample": f"down.{level}.1", f"{unet}.deconv.upsample.1": f"{up}.0.1"}
        for i in (1, 4):
            layers |= {f"{unet}.conv.block.block.{i}": f"down.{level}.0.{i}"}
            layers |= {f"{unet}.deconv.block.block.{i}": f"{up}.1.{i}"}
    names = {}
    for i in range(config.vit_blocks):
        block, ours = f"{vit}.encoder.encoder.{i}", f"blocks.{i}"
        layers |= {f"{block}.norm1": f"{ours}.norms.0", f"{block}.norm2": f"{ours}.norms.1"}
        layers |= {f"{block}.ffn.net.0": f"{ours}.ffn.0", f"{block}.ffn.net.2": f"{ours}.ffn.2"}
        layers |= {f"{block}.atten.out_proj": f"{ours}.attention.out"}
        names |= {f"{block}.atten.in_proj_{leaf}": f"{ours}.attention.qkv.{leaf}" for leaf in ("weight", "bias")}
        names |= {f"{block}.re_alpha": f"{ours}.scale"}
    return names | {f"{name}.{leaf}": f"{layers[name]}.{leaf}" for name in layers for leaf in ("weight", "bias")}


def fold_unit_range(tensors: dict[str, Tensor], stem: str, head: str) -> None:
    """Let a network for images in [0, 1] that ends in a sigmoid take and give images in [-1, 1] by a tanh.

    stem, head: names of its first and last convolutions. Exact if the stem pads with black, as reflection also does:
                W ((x + 1) / 2) = (W / 2) x + W 1 / 2, and 2 sigmoid(y) - 1 = tanh(y / 2)
    """
    weight = tensors[f"{stem}.weight"].double()
    bias = tensors.get(f"{stem}.bias", torch.zeros(len(weight))).double()
    tensors[f"{stem}.weight"] = (weight / 2).float()
    if bias.shape == (len(weight),):  # else it is found later
        tensors[f"{stem}.bias"] = (bias + weight.sum((1, 2, 3)) / 2).float()
    for name in {f"{head}.weight", f"{head}.bias"} & tensors.keys():
        tensors[name] = tensors[name].float() / 2


def check_resnet(what: str, tensors: dict[str, Tensor], convs: list[str]) -> None:
    """Raise InputError for a ResNet of UVCGAN, whose convolutions are given in order, that does not end in a sigmoid."""
    if len(tensors[f"{convs[-1]}.weight"]) == 1 or f"{convs[-1]}.bias" not in tensors:
        raise InputError(
            f"{what}: a ResNet of UVCGAN for grey images ends without a sigmoid; expected one of 3 channels"
        )
