"""Generator files of other projects: read them, and write the layout of pytorch-CycleGAN-and-pix2pix.

These projects put all layers of a ResNet generator into one long nn.Sequential. A file is read in three steps: find its
convolutions, infer the config from their number and shapes, and pair them in order with those of a generator that is
built from this config. Each normalisation layer follows its convolution.
"""

import dataclasses
import re
import statistics
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import PADDINGS, Direction, Generator, GeneratorConfig, meta_network
from toolkit import keras, uvcgan
from toolkit.containers import StoredNetwork, direction_in, list_networks, prefer_averaged
from toolkit.files import check_tensors, classes_in
from utils import InputError, one_line, option, say, some_of

Convs = dict[str, tuple[int, int]]  # name → index in the long Sequential, index in a residual block (outside: -1)
ASSUMPTIONS = (
    *PADDINGS,
    "bilinear",
    "sigmoid",
    "statistics",
    "instance",
)  # what a file cannot show: see docs/weights.md
ASSUME: Any = option(
    (),
    "facts that weights of another project do not show (default: none)",
    parse=lambda text: tuple(some_of(ASSUMPTIONS)(text)),
    metavar=",".join(ASSUMPTIONS),
)
LAYOUTS = {"deconv": "pytorch-CycleGAN-and-pix2pix", "resize": "PyTorch-GAN"}  # by the way they upsample
OTHER_NETWORKS = {  # by a tensor, as name and shape
    r"^shadow_params\.0 ": "averaged weights of torch_ema without names, which no single network "
    "beside them has in this order (save: with ema.average_parameters(): torch.save(net.state_dict(), FILE))",
    r"(^|\.)(mean|std) \(": "a network with mean and std of images, which change the values before or behind it",
    r"^[1-9]\d*\.\w+\.\d": "a network behind layers without weights, which may change the values",
    r"^(net\.0\.weight |model\.0\.weight \(\d+, \d+, 4, 4\))": "a discriminator",
    r"\.filt \(": "a CUT generator with antialiasing filters, which this project does not have",
    r"^model\.model\.": "a U-Net of pytorch-CycleGAN-and-pix2pix",
    r"^net\.(?!\d|model\.)": "a network of UVCGAN",
    r"^[\w.]+\.conv\.0\.weight \(\d+, 1, 3, 3\)": "a mobile generator of gan-compression, of separable convolutions",
    r"^stem\.1\.weight ": "a generator of this project without its config",
    r"^\w+\.\d+\.\d+\.weight \(\d+, \d+, \d, \d\)": "a generator of nested layers, such as model.1.0",
    r"\.(weight_orig|weight_bar|weight_v|parametrizations\.weight\.original\d?) \(": "weights under a spectral or weight "
    "norm, which its own project has to remove before saving",
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


def limits_of_junyanz(config: GeneratorConfig) -> list[str]:
    """Say what the code of pytorch-CycleGAN-and-pix2pix cannot do with a file that to_junyanz returns."""
    limits = []
    if config.num_residual not in (6, 9):
        limits.append(
            f"its code builds 6 or 9 blocks, not {config.num_residual}, and so cannot load this file unchanged"
        )
    if config.n_downsampling != 2:
        limits.append(f"its code has 2 downsampling layers, not {config.n_downsampling}, and so cannot load this file")
    if config.norm == "instance_affine":
        limits.append("its instance norms have no learned scale, and so it cannot load this file unchanged")
    if config.norm == "batch":
        limits.append("with batch norms its results are the same only with --eval")
    return limits


@dataclass
class ForeignNetwork:
    """A network in a file of another project, and what became of it here: a generator, or the reason why not."""

    stored: StoredNetwork
    config: Any = None  # a GeneratorConfig; None if it cannot be read
    state: dict[str, Tensor] = field(default_factory=dict)  # with our names
    size: list[int] | None = None  # height and width of the training images, if the file shows them
    notes: list[str] = field(default_factory=list)  # what was assumed or filled in
    reason: str = ""

    @property
    def layout(self) -> str:
        """Name of the project whose layout it has, or what else it is."""
        if self.config is None:
            return kind_of(self.stored.tensors)
        if self.config.rotated:
            return "Keras"
        return "UVCGAN" if self.config.generator == "unet_vit" else LAYOUTS[self.config.upsample]


def read_foreign(
    path: Path, asked: Direction | None = None, assumed: Collection[str] = ()
) -> list[tuple[GeneratorConfig, dict[str, Tensor], dict]]:
    """Read generators of pytorch-CycleGAN-and-pix2pix, CUT without antialiasing, PyTorch-GAN, a mix of these, UVCGAN, Keras.

    asked:   the direction that is wanted, where a file holds several generators
    assumed: some of ASSUMPTIONS
    returns: one generator, or the two of a pair if no direction is asked for: config, state dict with our names, metadata
             (direction: None if no name tells; size: None but for a UNet-ViT, since such files do not record it)
    raises:  InputError for a file that holds something else, does not fit, or holds several generators without directions
    source:  eriklindernoren/PyTorch-GAN, implementations/cyclegan/models.py, GeneratorResNet; others: _conv_positions
    """
    networks = foreign_networks(path, assumed)
    results = []
    chosen = _choose(path, networks, asked)
    for network in networks:
        is_wanted = network.stored.direction or network.stored.is_averaged
        if network.reason and is_wanted and network.layout != "a discriminator":
            say(f"{path}: {network.stored.name or 'it'} cannot be read: {network.reason}")
    for network in chosen:
        stored = network.stored
        for note in network.notes:
            say(f"{path}: {note}")
        direction = _direction_of(
            path, stored, is_alone=sum(other.stored.direction is not None for other in networks) == 1
        )
        name = f"{stored.name} is read" if stored.name and len(networks) > 1 else ""
        averaged = "averaged weights" if stored.is_averaged else ""
        translates = f"translates {direction} by its name" if direction else ""
        said = ", ".join(part for part in (name, averaged, translates) if part)
        if said:
            say(f"{path}: {said}")
        metadata = {"direction": str(direction) if direction else None, "size": network.size, "range": [-1, 1]}
        results.append((network.config, network.state, metadata | {"config": dataclasses.asdict(network.config)}))
    skipped = [name for name in classes_in(path) if not name.startswith(("builtins.", "collections."))]
    if skipped:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        say(f"{path}: objects in it are skipped: {', '.join(name[:60] for name in skipped[:3])}{more}")
    return results


def foreign_networks(path: Path, assumed: Collection[str] = ()) -> list[ForeignNetwork]:
    """Return all networks in a file, in its order; raises InputError if it cannot be read or holds none."""
    if keras.is_keras(path):
        if assumed:
            raise InputError(f"--assume {','.join(assumed)}: a file of Keras needs none; leave it out")
        config, state = keras.read_keras(path)
        return [ForeignNetwork(StoredNetwork("", state, is_averaged=False), config, state)]
    networks = []
    for stored in list_networks(path):
        network = ForeignNetwork(stored)
        what = f"{path}, {stored.name}" if stored.name else str(path)
        try:
            if uvcgan.is_unet_vit(stored.tensors):
                network.config, network.state, network.size = uvcgan.read_unet_vit(what, dict(stored.tensors))
                network.notes.append(
                    "a UNet-ViT of UVCGAN, read as the published one, with images in [0, 1] and a sigmoid"
                )
            else:
                is_uvcgan = uvcgan.direction_of(path) is not None
                network.config, network.state = _convert(what, dict(stored.tensors), assumed, network.notes, is_uvcgan)
        except InputError as error:
            network.reason = str(error).removeprefix(f"{what}: ")
        networks.append(network)
    if not networks:
        raise InputError(f"{path}: holds no tensors by name; expected the weights of a generator")
    return networks


def _choose(path: Path, networks: list[ForeignNetwork], asked: Direction | None) -> list[ForeignNetwork]:
    """Return the only generator of a file, that of the direction asked for, or a pair; raises InputError if it is unclear."""
    stored = prefer_averaged([network.stored for network in networks if network.config])
    readable = [network for network in networks if network.stored in stored]
    names = [
        f"{network.stored.name or 'the file'} ({network.stored.direction or network.layout})" for network in networks
    ]
    if not readable:
        inside = f"holds {', '.join(names)[:200]}; " if len(networks) > 1 else ""
        generators = [network for network in networks if network.layout != "a discriminator"] or networks
        raise InputError(f"{path}: {inside}{generators[0].reason}")
    found = [network.stored.direction for network in readable]
    if len(readable) > 1 and (None in found or len(set(found)) < len(found)):
        name = readable[0].stored.name
        hint = "save one alone"
        if name.isidentifier() and path.suffix != ".safetensors":
            hint = f'{hint}: torch.save(torch.load("{path.name}")["{name}"], "{name}.pth")'
        raise InputError(
            f"{path}: holds several generators, and no name says which is which: {', '.join(names)[:300]}; {hint}"
        )
    return [network for network in readable if len(readable) == 1 or asked in (None, network.stored.direction)]


def _direction_of(path: Path, stored: StoredNetwork, is_alone: bool) -> Direction | None:
    """Return the direction that the name in the file says, or else the file's own; InputError if they differ."""
    of_file = direction_in(path.name)
    if stored.direction and is_alone and of_file not in (None, stored.direction):
        given = f"{stored.name} in it translates {stored.direction}, but the file's name says {of_file}"
        raise InputError(f"{path}: {given}; rename the file")
    return stored.direction or of_file


def kind_of(tensors: dict[str, Tensor]) -> str:
    """Say what kind of network some tensors are if they are not a ResNet generator in one long nn.Sequential."""
    listing = [f"{one_line(name)[:80]} {tuple(tensors[name].shape)}" for name in sorted(tensors)]
    for tensor, kind in OTHER_NETWORKS.items():
        if re.search(tensor, "\n".join(listing), re.MULTILINE):
            return kind
    parts = list(dict.fromkeys(name.partition(".")[0] for name, x in tensors.items() if x.dim() == 4))
    if len(parts) > 1:
        return f"a network in named parts ({', '.join(map(one_line, parts))[:80]})"
    return f"an unknown layout ({', '.join(listing[:3])})"


def _convert(
    what: str, tensors: dict[str, Tensor], assumed: Collection[str], notes: list[str], is_uvcgan: bool
) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """Infer the config of a generator and give its tensors our names; adds to `notes` what was assumed or filled in."""
    convs = _find_convs(what, tensors)
    if is_uvcgan:
        uvcgan.check_resnet(what, tensors, list(convs))
        notes.append("a ResNet with a file name of UVCGAN, so read as one with images in [0, 1] and a sigmoid")
    if _unused_statistics(tensors, convs):
        if "statistics" in assumed:
            _use_statistics(tensors, convs)
        else:
            notes.append(
                "has running statistics beside instance norms; if its project runs it in eval mode, add --assume statistics"
            )
    elif "statistics" in assumed:
        raise InputError(f"{what}: has no running statistics beside instance norms; leave --assume statistics out")
    config = _infer_config(what, tensors, convs)
    if "instance" in assumed:
        if config.norm != "none":
            raise InputError(f"{what}: shows its norms; leave --assume instance out")
        config = dataclasses.replace(config, norm="instance")
    matched, has_padding_layers = _match_convs(what, tensors, convs, meta_network(config))
    config = _with_upsampling(what, config, has_padding_layers, assumed, notes)
    if is_uvcgan or "sigmoid" in assumed:
        stem, *_, head = convs
        uvcgan.fold_unit_range(tensors, stem, head)
    state = _fit_tensors(what, tensors, meta_network(config), matched, notes)
    if config.norm == "batch" and "statistics" not in assumed:
        notes.append("batch norms use their running statistics; pytorch-CycleGAN-and-pix2pix does so only with --eval")
    return config, state


def _unused_statistics(tensors: dict[str, Tensor], convs: Iterable[str]) -> list[str]:
    """Return the norms with running statistics but without a scale: instance norms, which use them in eval mode alone."""
    norms = map(_next_layer, convs)
    return [norm for norm in norms if f"{norm}.running_mean" in tensors and f"{norm}.weight" not in tensors]


def _use_statistics(tensors: dict[str, Tensor], convs: Iterable[str]) -> None:
    """Turn such instance norms into the batch norms that compute the same in eval mode: scale 1, shift 0."""
    for norm in _unused_statistics(tensors, convs):
        mean = tensors[f"{norm}.running_mean"]
        tensors[f"{norm}.weight"] = torch.ones_like(mean)
        tensors[f"{norm}.bias"] = torch.zeros_like(mean)


def _with_upsampling(
    what: str, config: GeneratorConfig, has_padding_layers: bool, assumed: Collection[str], notes: list[str]
) -> GeneratorConfig:
    """Complete the config by what a file does not show: the interpolation, and the padding after it."""
    told = [word for word in assumed if word in (*PADDINGS, "bilinear")]
    paddings = [word for word in told if word in PADDINGS]
    if config.upsample == "deconv" and told:
        raise InputError(f"{what}: has transposed convolutions; leave --assume {','.join(told)} out")
    if len(paddings) > 1:
        raise InputError(f"--assume {','.join(paddings)}: contradict each other; give one of them")
    if config.upsample == "deconv":
        return config
    if config.channels == 1 and not has_padding_layers and not paddings:
        raise InputError(
            f"{what}: a grey generator of PyTorch-GAN, which pads images by 1 px and so shrinks them, cannot be read; "
            "if this one pads by 3 px as those for colours do, add --assume zeros"
        )
    padding = paddings[0] if paddings else "reflect" if has_padding_layers else "zeros"
    mode = "bilinear" if "bilinear" in told else "nearest"
    if not told:
        notes.append(f"read as upsampling by {mode} neighbour with {padding} padding; --assume says otherwise")
    return dataclasses.replace(config, resize_padding=padding, resize_mode=mode)


def _find_convs(what: str, tensors: dict[str, Tensor]) -> Convs:
    """Find the convolutions of a ResNet generator, in order, whatever the names of the Sequential and of the blocks."""
    convs = {}
    for name, x in tensors.items():
        match = re.fullmatch(r"(\w+\.([0-9]{1,4})(?:\.\w+\.([0-9]{1,2}))?)\.weight", name)
        if match and x.dim() == 4:
            convs[match[1]] = (int(match[2]), int(match[3] or -1))
    kind = kind_of(tensors)
    if not convs or not kind.startswith("an unknown layout"):
        expected = "a ResNet generator of this project, pytorch-CycleGAN-and-pix2pix, CUT, PyTorch-GAN or UVCGAN"
        raise InputError(
            f"{what}: holds {kind}; expected {expected}; docs/extending.md shows how to convert another layout"
        )
    return dict(sorted(convs.items(), key=lambda item: item[1]))


def _infer_config(what: str, tensors: dict[str, Tensor], convs: Convs) -> GeneratorConfig:
    """Infer the config of a ResNet generator from its convolutions; _match_convs then compares each of them with it."""
    shapes = [tuple(tensors[f"{name}.weight"].shape) for name, (_, inner) in convs.items() if inner < 0]
    if len(shapes) < 2 or len(shapes) % 2:
        raise InputError(f"{what}: {len(shapes)} convolutions outside of blocks; expected those of a ResNet generator")
    if shapes[0][1] not in (1, 3):
        raise InputError(f"{what}: reads images of {shapes[0][1]} channels; expected 3, or 1")
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
        raise InputError(f"{what}: its names and shapes give {error}") from error


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


def _match_convs(what: str, tensors: dict[str, Tensor], convs: Convs, net: Generator) -> tuple[dict[str, str], bool]:
    """Pair the convolutions of a file with those of `net`, comparing shapes and positions.

    returns: their name → our name; whether a padding layer of its own precedes the convolutions after upsampling
    """
    matched = {}
    gaps_in_up = set()
    previous = 0
    # strict=False: too many or too few convolutions in a block show as a wrong position
    for (theirs, (index, inner)), (ours, gaps, inners) in zip(convs.items(), _conv_positions(net), strict=False):
        indices = [previous + gap for gap in gaps]
        shape = tuple(tensors[f"{theirs}.weight"].shape)
        expected = tuple(net.get_parameter(f"{ours}.weight").shape)
        if shape != expected or index not in indices or inner not in inners:
            layer = "" if inners == [-1] else f"layer {' or '.join(map(str, inners))} of the block at "
            where = f"{layer}position {' or '.join(map(str, indices))}"
            given = f"{theirs}.weight is {shape}" if shape != expected else f"{theirs}.weight is at another position"
            raise InputError(f"{what}: {given}; expected {expected} at {where}")
        if ours.startswith("up."):
            gaps_in_up.add(indices.index(index))
        matched[theirs] = ours
        previous = index
    if len(gaps_in_up) > 1:
        raise InputError(f"{what}: pads in one upsampling layer, but not in another; expected one kind")
    return matched, gaps_in_up == {1}


def _fit_tensors(
    what: str, tensors: dict[str, Tensor], net: Generator, convs: dict[str, str], notes: list[str]
) -> dict[str, Tensor]:
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
    check_tensors(wanted, tensors, what)
    if folded:
        notes.append(f"{folded} biases before batch norms became part of their means")
    if missing:
        notes.append(f"missing {min(missing)} ({len(missing)} in all); filled with zeros")
    if net.config.norm == "none":
        notes.append(
            "no sign of a normalisation; read as a network without one; if it has instance norms, add --assume instance"
        )
    return {ours: tensors[theirs] for theirs, ours in names.items()}
