"""Generator files: weights with the metadata that builds their network, and the layouts of other projects.

save_generator(Path("G_AB.safetensors"), G_AB, {"direction": "AtoB", "size": [256, 256]})
G_AB, metadata = load_generator(Path("G_AB.safetensors"))
G_AB, metadata = load_generator(Path("latest_net_G_A.pth"))  # of pytorch-CycleGAN-and-pix2pix
torch.save(to_junyanz(G_AB), "latest_net_G_A.pth")
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from models import (
    DISCRIMINATORS,
    GENERATORS,
    LEGACY_DIRECTIONS,
    LIMITS,
    NORMS,
    UPSAMPLES,
    VIT_SIZES,
    DiscriminatorConfig,
    Generator,
    GeneratorConfig,
    Nets,
    build_generator,
    meta_network,
)
from toolkit.converters import read_foreign
from toolkit.files import atomic_write, check_tensors, is_state_dict
from utils import InputError, one_line, say

METADATA_FORMAT = 1
METADATA_KEY = "recipe"  # in the file, where it has been since the first of them
WORDS = {
    **{"generator": GENERATORS, "discriminator": DISCRIMINATORS, "upsample": UPSAMPLES, "norm": NORMS},
    "vit_size": tuple(VIT_SIZES),
}
LATER = {"vit_size", "vit_blocks", "vit_heads", "skips"}  # files from before these came do not have them
Config = TypeVar("Config", GeneratorConfig, DiscriminatorConfig)


def same_nets(saved: Any, nets: Nets) -> bool:
    """Whether a file holds the very weights of some networks, by their names; nothing in it is trusted."""
    if not isinstance(saved, dict) or not all(is_state_dict(saved.get(name)) for name in nets):
        return False
    for name, net in nets.items():
        own = {key: x.cpu() for key, x in net.state_dict().items()}
        alike = saved[name].keys() == own.keys() and all(saved[name][key].dtype == own[key].dtype for key in own)
        if not alike or not all(torch.equal(saved[name][key], own[key]) for key in own):
            return False
    return True


def load_tensors(net: nn.Module, tensors: Any, what: object) -> None:
    """Load a state dict strictly; raises InputError as check_tensors does."""
    check_tensors(net.state_dict(), tensors, what)
    net.load_state_dict(tensors, strict=True)


def read_config(kind: type[Config], values: object, what: object) -> Config:
    """Turn the config of a file into a GeneratorConfig or DiscriminatorConfig, trusting nothing in it.

    raises: InputError with the first value that is unknown, missing or out of range
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(values, dict) or not fields.keys() - LATER <= values.keys() <= fields.keys():
        raise InputError(f"{what}: its metadata is no {kind.__name__}; expected {', '.join(fields)}")
    for name, value in values.items():
        good = type(value) is type(fields[name].default)
        if name in WORDS:
            good = good and value in WORDS[name]
        if name in LIMITS:
            good = good and LIMITS[name][0] <= value <= LIMITS[name][1]
        if not good:
            raise InputError(f"{what}: its metadata says {name} = {one_line(value)[:40]}, which no network has")
    try:
        return kind(**values)
    except ValueError as error:
        raise InputError(f"{what}: its metadata says {error}") from error


def save_generator(path: Path, net: Generator, metadata: dict) -> None:
    """Write the weights of a generator and how to build and feed it.

    metadata: direction ("AtoB" or "BtoA"), size (height and width of the training images in px),
            stage, run_name, dataset_name, data_root, epoch, step; the network's config and the range are added
    """
    metadata = {"format": METADATA_FORMAT, "range": [-1, 1], "config": dataclasses.asdict(net.config), **metadata}
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, {METADATA_KEY: json.dumps(metadata)}))  # save_file hides why a disk refuses


def read_own(path: Path) -> tuple[GeneratorConfig, dict[str, Tensor], dict]:
    """Read a safetensors file of this project: config, state dict, metadata; none of them trusted."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = one_line(error)[:120]
        raise InputError(f"{path}: not a readable safetensors file ({reason})") from error
    if not isinstance(metadata, dict) or metadata.get("format") != METADATA_FORMAT:
        raise InputError(
            f"{path}: carries no metadata of this project; expected a file that train.py or distill.py wrote"
        )
    config = read_config(GeneratorConfig, metadata.get("config"), path)
    size = metadata.get("size")
    whole_sides = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
    if not (whole_sides and all(config.smallest_side <= side <= 2**16 for side in size)):
        raise InputError(f"{path}: its metadata says size = {one_line(size)[:40]}, expected [height, width] in px")
    if metadata.get("direction") not in ("AtoB", "BtoA"):
        raise InputError(
            f"{path}: its metadata says direction = {one_line(metadata.get('direction'))[:40]}, expected AtoB or BtoA"
        )
    check_tensors(meta_network(config).state_dict(), tensors, path)
    return config, tensors, metadata


# ---------------------------------------------------------------------------------------------
# Reading


def load_generator(path: Path) -> tuple[Generator, dict]:
    """Read a generator file of this or another project: the network on the CPU in eval mode, and its metadata.

    returns: of our files the metadata that save_generator wrote; of others range, config,
             direction ("AtoB", "BtoA"; None where the file's name tells none) and size None
    raises:  InputError if the file is missing, damaged, of an unknown layout, or does not fit its own metadata
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; expected the generator of a run, such as saved_models/NAME/G_AB.safetensors"
        )
    with path.open("rb") as file:
        start = file.read(9)  # of safetensors: the header's length in 8 bytes, then JSON
    own = path.suffix == ".safetensors" or start[8:] == b"{"
    config, tensors, metadata = read_own(path) if own else read_foreign(path)
    net = build_generator(config)
    net.load_state_dict(tensors, strict=True)
    return net.eval(), metadata


def load_pair(paths: Sequence[Path]) -> Nets:
    """Read generator files, one per direction, by the name of their direction; says which starts from which.

    raises: InputError as load_generator does, or for a second file of one direction
    """
    nets: Nets = {}
    names = {direction: name for name, direction in LEGACY_DIRECTIONS.items()}
    for path in paths:
        net, metadata = load_generator(path)
        name = names.get(metadata["direction"])
        if name is None:
            name = "G_BA" if "G_AB" in nets else "G_AB"
            say(f"{path}: does not say its direction; taken for {name}")
        if name in nets:
            raise InputError(f"{path}: a second file for {name}; expected one file for each direction")
        nets[name] = net
        say(f"{name} starts from {path}")
    if nets:
        for name in LEGACY_DIRECTIONS.keys() - nets.keys():
            say(f"{name} starts new: no file is for it")
    return nets
