"""Generator files: weights with the metadata that builds their network, and the layouts of other projects.

save_generator(Path("G_AB.safetensors"), G_AB, {"direction": "AtoB", "size": [256, 256]})
G_AB, metadata = load_generator(Path("G_AB.safetensors"))
G_AB, metadata = load_generator(Path("latest_net_G_A.pth"))  # of pytorch-CycleGAN-and-pix2pix
torch.save(to_junyanz(G_AB), "latest_net_G_A.pth")
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from files import atomic_write, is_state_dict, read_archive
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
    ResnetGenerator,
    UnetVitGenerator,
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


def check_tensors(wanted: dict[str, Tensor], tensors: Any, what: object) -> None:
    """Compare a state dict with that of a network before it is loaded, or say in one line what does not fit.

    raises: InputError with the first three names that are missing, foreign, of another shape or type, or not finite
    """
    if not is_state_dict(tensors):
        raise InputError(f"{what}: holds no tensors by name; expected the weights of one network")
    faults = []
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors:
            faults.append(f"{name} is missing, expected {tuple(wanted[name].shape)}")
        elif name not in wanted:
            faults.append(f"{one_line(name)[:80]}, {tuple(tensors[name].shape)}, is not part of this network")
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
            stage, run_name, dataset_name, data_root, epoch, step; the network's config and the range are added
    """
    metadata = {"format": METADATA_FORMAT, "range": [-1, 1], "config": dataclasses.asdict(net.config), **metadata}
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, {METADATA_KEY: json.dumps(metadata)}))  # save_file hides why a disk refuses


def meta_network(config: GeneratorConfig) -> Generator:
    """Build a generator of shapes only, on the meta device: a lying file costs no memory.

    Not by build_generator: for random numbers on that device torch imports its compiler, which takes seconds.
    """
    kind = {"resnet": ResnetGenerator, "unet_vit": UnetVitGenerator}[config.generator]
    with torch.device("meta"):
        return kind(config)


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
