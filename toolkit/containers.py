"""The networks that a file of weights of another project holds, whatever they are wrapped in.

People save one network, several beside their optimisers, averaged weights beside raw ones, or a whole Lightning module.
list_networks finds them all by name; toolkit.converters says which of them can be read.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from models import DIRECTIONS, Direction
from toolkit.files import classes_in, is_state_dict, read_archive
from utils import InputError, one_line

# added by DataParallel, AveragedModel, torch.compile, FSDP and activation checkpointing, sometimes several
WRAPPERS = r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
NUMBERED = r"[0-9]{1,4}(\.\w+\.[0-9]{1,2})?\.\w+"  # a tensor in a long nn.Sequential, or in a block there
LAYER = rf"\w+\.{NUMBERED}"  # the same in a module that has such a Sequential
PAIR = r"(?P<{0}s>[abxy])(?:2|[_-]?to[_-]?{1})(?P<{0}t>[abxy])"
DIRECTION = (
    re.compile(  # netG_A2B, G_AtoB, G_XtoY, gen_ab, genB2A; A2B alone; G_A of pytorch-CycleGAN-and-pix2pix; genX
        # not Gab: projects that write it so mean B to A
        rf"(?<![a-z])(?:g[_-]|gen[_-]?|generator[_-]?|generators[._-]){PAIR.format('g', '|')}(?![a-z0-9])"
        rf"|(?<![a-z])netg[_-]?{PAIR.format('n', '|')}(?![a-z0-9])"
        rf"|(?<![a-z0-9]){PAIR.format('p', '')}(?![a-z0-9])"
        r"|(?<![a-z])(?:net_?)?g_(?P<one>[ab])(?![a-z0-9])|(?<![a-z])gen(?P<lightning>[xy])(?![a-z0-9])",
        re.IGNORECASE,
    )
)
NETWORK = re.compile(  # a name that people give to a generator or a discriminator in a larger module
    r"(^|_)(net_?)?(g|d|gen|generator|dis|disc|discriminator|critic)(_?[abxy](_?(2|to)?_?[abxy])?)?(_|$)"
    r"|^(generators|discriminators)$"  # an nn.ModuleDict or nn.ModuleList
    r"|^(online|ema)_model$",  # of ema-pytorch
    re.IGNORECASE,
)
AVERAGED = re.compile(r"(?<![a-z])(ema|averaged?|swa)(?![a-z])", re.IGNORECASE)
LISTS = ("generators", "discriminators")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # not among the parameters of a network
MOST_DOTS = 50  # in the name of a tensor; real ones have about ten
COMMON_WORDS = {
    "",
    "ema",
    "average",
    "averaged",
    "swa",
    "online",
    "state",
    "dict",
    "params",
    "model",
    "weights",
    "net",
    "module",
}


@dataclass(eq=False)  # tensors cannot be compared
class StoredNetwork:
    """The tensors of one network in a file."""

    name: str  # keys and prefixes that lead to it, joined by dots; "" if the file is this network
    tensors: dict[str, Tensor]
    is_averaged: bool  # an exponential moving average of the weights

    @property
    def direction(self) -> Direction | None:
        return direction_in(self.name)

    @property
    def words(self) -> str:
        """Its name without what distinguishes averaged weights from the raw ones."""
        return "_".join(word for word in re.split(r"[._]", self.name.lower()) if word not in COMMON_WORDS)


def direction_in(name: str) -> Direction | None:
    """Return the direction that the name of a network or of its file says; None if it says none, or two.

    A single letter has the meaning of the project that writes it so: G_A of pytorch-CycleGAN-and-pix2pix reads A.
    """
    found = set()
    for match in DIRECTION.finditer(name):
        letters = "".join(letter for letter in match.groups() if letter).lower()
        found.add({"ab": 0, "xy": 0, "a": 0, "x": 0, "ba": 1, "yx": 1, "b": 1, "y": 1}.get(letters))
    index = found.pop() if len(found) == 1 else None
    return None if index is None else DIRECTIONS[index]


def list_networks(path: Path) -> list[StoredNetwork]:
    """List the networks in a torch or safetensors file, in its order; nothing in it is executed.

    raises: InputError if it cannot be read, or is a training state of this project
    """
    networks = _networks_in(_read_values(path), "")
    _name_averaged(networks)
    classes = classes_in(path)
    if not networks and any(name.startswith("torch.nn.modules.") for name in classes):
        found = ", ".join(name for name in classes if not name.startswith("torch.")) or "torch.nn"
        remedy = "in its own project, save the tensors alone: torch.save(net.state_dict(), FILE)"
        raise InputError(f"{path}: a whole pickled module ({found[:120]}), which is code; {remedy}")
    return networks


def _read_values(path: Path) -> Any:
    """Read a torch or safetensors file."""
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix != ".safetensors" and start[8:] != b"{":
        value = read_archive(path, skip_objects=True)
        if isinstance(value, dict) and {"format", "nets"} <= value.keys():
            raise InputError(
                f"{path}: holds a whole training state; give --run_name and --epoch, or a G_AB.safetensors"
            )
        return value
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({one_line(error)[:120]})") from error


def _networks_in(value: Any, name: str) -> list[StoredNetwork]:
    """List the networks in a dictionary of tensors, of such dictionaries, or of both beside other values."""
    if isinstance(value, list | tuple):  # not those of tensors
        value = {str(i): inner for i, inner in enumerate(value) if isinstance(inner, dict)}
    if not isinstance(value, dict) or "param_groups" in value:  # an optimiser has them
        return []
    if "averaging_state" in value:  # of Lightning's WeightAveraging: state_dict holds the averaged weights
        value = {"averaged": value.get("state_dict")}
    listed = value.get("shadow_params")
    if isinstance(listed, list):  # of torch_ema
        shadow = {f"shadow_params.{i}": x for i, x in enumerate(listed)}
        return [StoredNetwork(name, shadow, is_averaged=True)] if shadow and is_state_dict(shadow) else []
    networks = []
    tensors = {key: x for key, x in value.items() if isinstance(key, str) and isinstance(x, Tensor)}
    tensors = {key: x for key, x in tensors.items() if "." in key or x.dim() or key == "n_averaged"}  # no losses
    for key, inner in value.items():
        networks += _networks_in(inner, _joined(name, key))
    is_averaged = tensors.pop("n_averaged", None) is not None or AVERAGED.search(name) is not None
    is_deep = any(key.count(".") > MOST_DOTS for key in tensors)
    if tensors and not is_deep and is_state_dict(tensors) and (not networks or any("." in key for key in tensors)):
        tensors = {re.sub(WRAPPERS, "", key): x for key, x in tensors.items()}
        networks += _split(StoredNetwork(name, tensors, is_averaged))
    return networks


def _name_averaged(networks: list[StoredNetwork]) -> None:
    """Give averaged weights of torch_ema, a list of tensors, the names of the one network that has their shapes in order."""
    for averaged in networks:
        if "shadow_params.0" not in averaged.tensors:
            continue
        shapes = [x.shape for x in averaged.tensors.values()]
        fitting = []
        for network in networks:
            parameters = [key for key in network.tensors if not key.endswith(BUFFERS)]
            if network is not averaged and [network.tensors[key].shape for key in parameters] == shapes:
                fitting.append((network, parameters))
        if len(fitting) > 1:
            fitting = [(network, parameters) for network, parameters in fitting if network.words == averaged.words]
        if len(fitting) == 1:
            ((network, parameters),) = fitting
            averaged.tensors = network.tensors | dict(zip(parameters, averaged.tensors.values(), strict=True))


def _joined(name: str, key: object) -> str:
    """Add a key or prefix, which a stranger wrote, to the name of what contains it."""
    return ".".join(part for part in (name, one_line(key)[:80]) if part)


def _split(network: StoredNetwork) -> list[StoredNetwork]:
    """Split the tensors of a larger module, such as Lightning's, into its networks, by the first words of their names."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, x in network.tensors.items():
        first, _, rest = key.partition(".")
        parts.setdefault(first, {})[rest] = x
    convolutional = [part for part, tensors in parts.items() if any(x.dim() == 4 for x in tensors.values())]
    is_list = len(convolutional) > 1 and all(_is_sequential(parts[part]) for part in convolutional)
    is_list = is_list or (network.name.endswith(LISTS) and all("." in key for part in parts.values() for key in part))
    named = [
        part
        for part, tensors in parts.items()
        if (is_list or NETWORK.search(part)) and all("." in key for key, x in tensors.items() if x.dim())
    ]
    if named:
        networks = []
        for part, tensors in parts.items():
            name = _joined(network.name, part)
            if part in named:
                is_averaged = part != "online_model" and (network.is_averaged or AVERAGED.search(part) is not None)
                networks += _split(StoredNetwork(name, tensors, is_averaged))
            elif part in convolutional:
                networks.append(StoredNetwork(name, tensors, network.is_averaged))
        return networks
    if len(parts) == 1:
        ((wrapper, inner),) = parts.items()
        # alone in an nn.Sequential, but not at its start: behind something without weights that may change the image
        if (wrapper == "0" or not wrapper.isdecimal()) and _is_whole(inner):
            return _split(StoredNetwork(network.name, inner, network.is_averaged))
    is_sequential = all(part.isdecimal() for part in parts if part)  # an nn.Sequential by itself
    if is_sequential and not any(_is_sequential(parts[part]) for part in convolutional):
        tensors = {f"model.{key}": x for key, x in network.tensors.items()}
        return [StoredNetwork(network.name, tensors, network.is_averaged)]
    return [network]


def _is_whole(inner: dict[str, Tensor]) -> bool:
    """Whether the tensors of a module's only part are a generator, or several networks by name."""
    # the first layer of a generator in a long Sequential is padding; a U-Net of the same names begins with a convolution
    is_generator = all(re.fullmatch(LAYER, key) and ".0." not in key[:16] for key in inner) or _is_sequential(inner)
    return is_generator or any(NETWORK.search(key.partition(".")[0]) for key in inner if key.count(".") > 1)


def _is_sequential(tensors: dict[str, Tensor]) -> bool:
    """Whether these are the layers of a ResNet generator in one nn.Sequential, which begins and ends with 7x7 kernels."""
    wide = [x for x in tensors.values() if x.dim() == 4 and x.shape[2:] == (7, 7)]
    return len(wide) == 2 and all(re.fullmatch(rf"(\w+\.)?{NUMBERED}", key) for key in tensors)


def prefer_averaged(networks: list[StoredNetwork]) -> list[StoredNetwork]:
    """Leave out raw weights of which the file also has averaged ones, which translate better."""
    averaged = [network for network in networks if network.is_averaged]
    raw = [network for network in networks if not network.is_averaged]
    words = {network.words for network in averaged}
    beside_all = words == {""} and len(averaged) == len(raw) == 1
    return [network for network in networks if network.is_averaged or not (beside_all or network.words in words)]
