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

WRAPPERS = r"\b(module|_orig_mod)\."  # added by DataParallel, AveragedModel and torch.compile, sometimes several
LAYER = r"\w+\.[0-9]{1,4}(\.\w+\.[0-9]{1,2})?\.\w+"  # a tensor in a long nn.Sequential, or in a block there
PAIR = r"(?P<{0}s>[abxy])(?:2|[_-]?to[_-]?{1})(?P<{0}t>[abxy])"
DIRECTION = (
    re.compile(  # netG_A2B, G_AtoB, G_XtoY, gen_ab, genB2A; A2B alone; G_A of pytorch-CycleGAN-and-pix2pix; genX
        # not Gab: projects that write it so mean B to A
        rf"(?<![a-z])(?:g[_-]|gen[_-]?|generator[_-]?){PAIR.format('g', '|')}(?![a-z0-9])"
        rf"|(?<![a-z])netg[_-]?{PAIR.format('n', '|')}(?![a-z0-9])"
        rf"|(?<![a-z0-9]){PAIR.format('p', '')}(?![a-z0-9])"
        r"|(?<![a-z])(?:net_?)?g_(?P<one>[ab])(?![a-z0-9])|(?<![a-z])gen(?P<lightning>[xy])(?![a-z0-9])",
        re.IGNORECASE,
    )
)
NETWORK = re.compile(  # a name that people give to a generator or a discriminator in a larger module
    r"(^|_)(net_?)?(g|d|gen|generator|dis|disc|discriminator|critic)(_?[abxy](_?(2|to)?_?[abxy])?)?(_|$)"
    r"|^(online|ema)_model$",  # of ema-pytorch
    re.IGNORECASE,
)
AVERAGED = re.compile(r"(?<![a-z])(ema|averaged?|swa)(?![a-z])", re.IGNORECASE)
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


def _joined(name: str, key: object) -> str:
    """Add a key or prefix, which a stranger wrote, to the name of what contains it."""
    return ".".join(part for part in (name, one_line(key)[:80]) if part)


def _split(network: StoredNetwork) -> list[StoredNetwork]:
    """Split the tensors of a larger module, such as Lightning's, into its networks, by the first words of their names."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, x in network.tensors.items():
        first, _, rest = key.partition(".")
        parts.setdefault(first, {})[rest] = x
    named = [
        part
        for part, tensors in parts.items()
        if NETWORK.search(part) and all("." in key for key, x in tensors.items() if x.dim())
    ]
    if named:
        networks = []
        for part, tensors in parts.items():
            name = _joined(network.name, part)
            if part in named:
                is_averaged = part != "online_model" and (network.is_averaged or AVERAGED.search(part) is not None)
                networks += _split(StoredNetwork(name, tensors, is_averaged))
            elif any(x.dim() == 4 for x in tensors.values()):
                networks.append(StoredNetwork(name, tensors, network.is_averaged))
        return networks
    keys = network.tensors.keys()
    if all(key[0].isdecimal() for key in keys if key):  # an nn.Sequential by itself
        return [
            StoredNetwork(network.name, {f"model.{key}": x for key, x in network.tensors.items()}, network.is_averaged)
        ]
    (inner, *others) = parts.values()
    # the first layer of a generator in a long Sequential is padding; a U-Net of the same names begins with a convolution
    is_wrapped = not others and all(re.fullmatch(LAYER, key) and ".0." not in key[:16] for key in inner)
    if is_wrapped or (not others and any(NETWORK.search(key.partition(".")[0]) for key in inner if key.count(".") > 1)):
        return _split(StoredNetwork(network.name, inner, network.is_averaged))
    return [network]


def prefer_averaged(networks: list[StoredNetwork]) -> list[StoredNetwork]:
    """Leave out raw weights of which the file also has averaged ones, which translate better."""
    averaged = [network for network in networks if network.is_averaged]
    raw = [network for network in networks if not network.is_averaged]
    words = {network.words for network in averaged}
    beside_all = words == {""} and len(averaged) == len(raw) == 1
    return [network for network in networks if network.is_averaged or not (beside_all or network.words in words)]
