"""Generator files: weights with the metadata that builds their network, and the layouts of other projects.

save_generator(Path("G_AB.safetensors"), G_AB, {"direction": "AtoB", "size": [256, 256]})
G_AB, metadata = load_generator(Path("G_AB.safetensors"))
G_AB, metadata = load_generator(Path("latest_net_G_A.pth"))  # of pytorch-CycleGAN-and-pix2pix
torch.save(to_junyanz(G_AB), "latest_net_G_A.pth")
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from files import atomic_write, read_archive
from models import (
    DIRECTIONS,
    DISCRIMINATORS,
    GENERATORS,
    NORMS,
    UPSAMPLES,
    VIT_SIZES,
    DiscriminatorConfig,
    Generator,
    GeneratorConfig,
    Nets,
    build_generator,
)
from utils import InputError, one_line, say

METADATA_FORMAT = 1
METADATA_KEY = "recipe"  # in the file, where it has been since the first of them
LIMITS = {  # beyond: not a network but an attack on the memory
    **{"channels": (1, 3), "ngf": (1, 4096), "num_residual": (0, 1000), "n_downsampling": (0, 4)},
    **{"ndf": (1, 4096), "n_layers": (1, 16), "max_mult": (1, 4096), "vit_blocks": (0, 1000), "vit_heads": (1, 4096)},
}
WORDS = {
    **{"generator": GENERATORS, "discriminator": DISCRIMINATORS, "upsample": UPSAMPLES, "norm": NORMS},
    "vit_size": tuple(VIT_SIZES),
}
LATER = {"vit_size", "vit_blocks", "vit_heads", "skips"}  # files from before these came do not have them
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
Config = TypeVar("Config", GeneratorConfig, DiscriminatorConfig)


def is_state_dict(value: Any) -> bool:
    """Whether `value` maps names to ordinary tensors, none larger than what the file holds of it."""
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(x, Tensor)
        and x.layout == torch.strided
        and not (x.is_quantized or x.is_meta or x.is_nested)
        and x.numel() * x.element_size() <= x.untyped_storage().nbytes()
        for name, x in value.items()
    )


def check_tensors(wanted: dict[str, Tensor], tensors: Any, what: object) -> None:
    """Compare a state dict with that of a network before it is loaded, or say in one line what does not fit.

    raises: InputError with the first three names that are missing, foreign, of another shape or type, or not finite
    """
    if not is_state_dict(tensors):
        raise InputError(f"{what}: holds no tensors by name; expected the weights of one network")
    faults = []
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors:
            faults.append(f"{name} is missing")
        elif name not in wanted:
            faults.append(f"{one_line(name)[:80]} is not part of this network")
        elif tensors[name].shape != wanted[name].shape:
            faults.append(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}")
        elif tensors[name].is_floating_point() != wanted[name].is_floating_point():
            faults.append(f"{name} is {tensors[name].dtype}, expected {wanted[name].dtype}")
        elif not torch.isfinite(tensors[name].float()).all():  # as the network will hold it
            faults.append(f"{name} is not finite")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"{what}: does not fit the network: {'; '.join(faults[:3])}{more}")


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
            stage, run_name, dataset_name, epoch, step; the network's config and the range are added
    """
    metadata = {"format": METADATA_FORMAT, "range": [-1, 1], "config": dataclasses.asdict(net.config), **metadata}
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, {METADATA_KEY: json.dumps(metadata)}))  # save_file hides why a disk refuses


def meta_network(config: GeneratorConfig) -> Generator:
    """Build a generator of shapes only, on the meta device: a lying file costs no memory."""
    with torch.device("meta"):
        return build_generator(config)


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
# Layouts of other projects


def module_names(config: GeneratorConfig, layout: str, second: int = 5) -> Iterator[tuple[str, str]]:
    """Yield (their name, our name) of every convolution of a generator and of the norm after it.

    layout: "junyanz" or "pytorch_gan"; they differ in their blocks' name and in the upsampling
    second: place of the second convolution in a block of theirs: 5, after a dropout 6
    source: junyanz/pytorch-CycleGAN-and-pix2pix, models/networks.py, ResnetGenerator;
            eriklindernoren/PyTorch-GAN, implementations/cyclegan/models.py, GeneratorResNet
    """
    block, lead, conv = ("conv_block", 0, 0) if layout == "junyanz" else ("block", 1, 2)
    yield from (("model.1", "stem.1"), ("model.2", "stem.2"))
    place = 4  # in their one long Sequential
    for i in range(config.n_downsampling):
        yield from ((f"model.{place}", f"down.{i}.0"), (f"model.{place + 1}", f"down.{i}.1"))
        place += 3
    for i in range(config.num_residual):
        for theirs, ours in ((1, 1), (2, 2), (second, 5), (second + 1, 6)):
            yield f"model.{place}.{block}.{theirs}", f"blocks.{i}.body.{ours}"
        place += 1
    for i in range(config.n_downsampling):
        place += lead  # an nn.Upsample stands before the convolution
        yield f"model.{place}", f"up.{i}.{conv}"
        yield f"model.{place + 1}", f"up.{i}.{conv + 1}"
        place += 3
    yield f"model.{place + 1}", "head.1"


def tensor_names(net: Generator, layout: str, second: int = 5) -> dict[str, str]:
    """Name every tensor of a generator of ours in their layout: their name → our name."""
    theirs = {ours: name for name, ours in module_names(net.config, layout, second)}
    split = [name.rpartition(".") for name in net.state_dict()]
    return {f"{theirs[module]}.{leaf}": f"{module}.{leaf}" for module, _, leaf in split}


def to_junyanz(net: Generator) -> dict[str, Tensor]:
    """Return the state dict of a generator as pytorch-CycleGAN-and-pix2pix names it (*_net_G_A.pth).

    raises: InputError if that layout cannot hold the network
    """
    config = net.config
    tensors = net.state_dict()
    left_out = []
    if config.norm == "none":  # there only an instance normalisation lets the convolution before it have a bias
        left_out = [name for name in tensors if name.endswith(".bias") and name != "head.1.bias"]
    faults = {
        f"generator {config.generator}": config.generator != "resnet",
        f"upsample {config.upsample}": config.upsample != "deconv",
        "norm_output": config.norm_output,
        "skips": config.skips,
        "norm none with biases": any(tensors[name].any() for name in left_out),
    }
    if any(faults.values()):
        fault = ", ".join(name for name, present in faults.items() if present)
        raise InputError(
            f"{fault}: the junyanz layout cannot hold it; expected a resnet with deconv, no norm_output and no skips"
        )
    names = {theirs: ours for theirs, ours in tensor_names(net, "junyanz").items() if ours not in left_out}
    return {theirs: tensors[ours].detach().cpu().contiguous() for theirs, ours in names.items()}


def refuse_stranger(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise InputError, with what it is, on a file of weights that is no ResNet generator of a known layout."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    found = None
    if "net.0.weight" in shapes or shapes.get("model.0.weight", ())[2:] == (4, 4):
        found = "a discriminator"
    elif any(name.endswith(".filt") for name in shapes):
        found = "a CUT generator with antialiasing filters, which no network here has"
    elif any(name.startswith("model.model.") for name in shapes):
        found = "a U-Net of pytorch-CycleGAN-and-pix2pix"
    elif any(name.startswith("net.") for name in shapes):
        found = "a network of UVCGAN"
    elif len(shapes.get("model.1.weight", ())) != 4:
        found = f"an unknown layout ({', '.join(one_line(n)[:80] for n in sorted(shapes)[:3])})"
    if found:
        raise InputError(
            f"{path}: holds {found}; expected a ResNet generator of this project, pytorch-CycleGAN-and-pix2pix, CUT without antialiasing or PyTorch-GAN"
        )


def infer_config(tensors: dict[str, Tensor]) -> tuple[GeneratorConfig, str, int]:
    """Read the config, the layout and the place of a block's second convolution off names and shapes.

    Only the likeliest answer: check_tensors compares every name and shape with it afterwards.
    """
    blocks = {m[0] for name in tensors if (m := re.match(r"model\.[0-9]+\.(conv_)?block\.", name))}
    places = [m[1] for name in tensors if (m := re.fullmatch(r"model\.([0-9]{1,4})\.weight", name))]
    head = max(int(place) for place in places if tensors[f"model.{place}.weight"].dim() == 4)
    steps = head - 5 - len(blocks)  # 6 of their modules halve and double once; 7 where one is an nn.Upsample
    named_block = any(".block." in name for name in blocks)
    layout = "pytorch_gan" if named_block or (not blocks and steps % 6) else "junyanz"
    ngf, channels = tensors["model.1.weight"].shape[:2]
    hints = {name for name in tensors if name.endswith((".bias", ".running_mean"))}
    if {"model.2.weight", "model.2.running_mean"} <= tensors.keys():
        norm = "batch"
    else:  # an instance norm has no weights, but the convolution before it has a bias
        norm = "instance" if hints - {f"model.{head}.bias"} else "none"
    upsample, step = ("deconv", 6) if layout == "junyanz" else ("resize", 7)
    sizes: dict[str, Any] = {"ngf": ngf, "num_residual": len(blocks), "n_downsampling": steps // step}
    sizes = {name: min(max(value, LIMITS[name][0]), LIMITS[name][1]) for name, value in sizes.items()}
    config = GeneratorConfig(channels=1 if channels == 1 else 3, upsample=upsample, norm=norm, **sizes)
    dropout = any(n.endswith("block.6.weight") and x.dim() == 4 for n, x in tensors.items())
    return config, layout, 6 if dropout else 5


def read_foreign(path: Path) -> tuple[GeneratorConfig, dict[str, Tensor], dict]:
    """Read a generator file of pytorch-CycleGAN-and-pix2pix, CUT without antialiasing, or PyTorch-GAN.

    Running statistics of instance normalisations, which old files hold, are dropped; missing biases are zeros.
    PyTorch-GAN pads with zeros after upsampling, the network here by reflection: the border differs,
    and the rest a little, since the normalisation layers see the border too.
    returns: config, state dict in our names, metadata (size None: such files do not record it)
    raises:  InputError with what the file holds instead, or the first three names that do not fit
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
    refuse_stranger(path, tensors)
    config, layout, second = infer_config(tensors)
    net = meta_network(config)
    for theirs, ours in module_names(config, layout, second):
        if isinstance(net.get_submodule(ours), nn.InstanceNorm2d):
            for leaf in STATISTICS:
                tensors.pop(f"{theirs}.{leaf}", None)
    names = tensor_names(net, layout, second)
    state = net.state_dict()
    wanted = {theirs: state[ours] for theirs, ours in names.items()}
    optional = ".num_batches_tracked" if config.norm == "batch" else ".bias"
    missing = [n for n in wanted.keys() - tensors.keys() if n.endswith(optional) and names[n] != "head.1.bias"]
    tensors |= {name: torch.zeros_like(wanted[name], device="cpu") for name in missing}
    check_tensors(wanted, tensors, f"{path} ({layout} layout)")
    if missing:
        without = " and no sign of a normalisation: read as a network without one" if config.norm == "none" else ""
        say(f"{path}: missing {min(missing)} ({len(missing)} such tensors){without}; filled with zeros")
    if config.upsample == "resize" and config.n_downsampling:
        say(f"{path}: PyTorch-GAN pads with zeros after upsampling, here it is reflection; borders will differ")
    match = re.search(r"(?<![A-Za-z])(?:net_G_(A|B)|G_(AB|BA))(?![A-Za-z])", path.name)
    metadata = {
        "layout": layout,
        "direction": {"A": "AtoB", "B": "BtoA"}[(match[1] or match[2])[0]] if match else None,
        "size": None,
        "range": [-1, 1],
        "config": dataclasses.asdict(config),
    }
    return config, {ours: tensors[theirs] for theirs, ours in names.items()}, metadata


# ---------------------------------------------------------------------------------------------
# Reading


def load_generator(path: Path) -> tuple[Generator, dict]:
    """Read a generator file of this or another project: the network on the CPU in eval mode, and its metadata.

    returns: of our files the metadata that save_generator wrote; of others layout, range, config,
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
    names = {direction: name for name, direction in DIRECTIONS.items()}
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
        for name in DIRECTIONS.keys() - nets.keys():
            say(f"{name} starts new: no file is for it")
    return nets
