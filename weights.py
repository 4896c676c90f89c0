"""Generator files: weights and the recipe that builds their network, in one safetensors file.

save_generator(Path("G_AB.safetensors"), G_AB, {"direction": "AtoB", "size": [256, 256]})
G_AB, recipe = load_generator(Path("G_AB.safetensors"))
"""

import dataclasses
import json
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models import (
    DISCRIMINATORS,
    GENERATORS,
    NORMS,
    UPSAMPLES,
    DiscriminatorConfig,
    GeneratorConfig,
    build_generator,
)
from utils import InputError, atomic_write, one_line

RECIPE_FORMAT = 1
LIMITS = {  # beyond: not a network but an attack on the memory
    **{"channels": (1, 3), "ngf": (1, 4096), "num_residual": (0, 1000), "n_downsampling": (0, 4)},
    **{"ndf": (1, 4096), "n_layers": (1, 16), "max_mult": (1, 4096)},
}
WORDS = {
    "generator": GENERATORS,
    "discriminator": DISCRIMINATORS,
    "upsample": UPSAMPLES,
    "norm": NORMS,
}
Config = TypeVar("Config", GeneratorConfig, DiscriminatorConfig)


def check_tensors(net: nn.Module, tensors: object, what: object) -> None:
    """Compare a state dict with a network before it is loaded, or say in one line what does not fit.

    raises: InputError with the first three names that are missing, foreign, of another shape or type, or not finite
    """
    if not isinstance(tensors, dict) or not all(
        isinstance(value, Tensor) for value in tensors.values()
    ):
        raise InputError(f"{what}: holds no tensors by name; expected the weights of one network")
    wanted, faults = net.state_dict(), []
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors:
            faults.append(f"{name} is missing")
        elif name not in wanted:
            faults.append(f"{name} is not part of this network")
        elif tensors[name].shape != wanted[name].shape:
            faults.append(
                f"{name} is {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}"
            )
        elif tensors[name].is_floating_point() != wanted[name].is_floating_point():
            faults.append(f"{name} is {tensors[name].dtype}, expected {wanted[name].dtype}")
        elif not torch.isfinite(tensors[name]).all():
            faults.append(f"{name} is not finite")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"{what}: does not fit the network: {'; '.join(faults[:3])}{more}")


def load_tensors(net: nn.Module, tensors: object, what: object) -> None:
    """Load a state dict strictly; raises InputError as check_tensors does."""
    check_tensors(net, tensors, what)
    net.load_state_dict(tensors, strict=True)


def read_config(kind: type[Config], values: object, what: object) -> Config:
    """Turn the config of a file into a GeneratorConfig or DiscriminatorConfig, trusting nothing in it.

    raises: InputError with the first value that is unknown, missing or out of range
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(values, dict) or values.keys() != fields.keys():
        raise InputError(f"{what}: its recipe is no {kind.__name__}; expected {', '.join(fields)}")
    for name, value in values.items():
        good = type(value) is type(fields[name].default)
        if name in WORDS:
            good = good and value in WORDS[name]
        if name in LIMITS:
            good = good and LIMITS[name][0] <= value <= LIMITS[name][1]
        if not good:
            raise InputError(
                f"{what}: its recipe says {name} = {one_line(value)[:40]}, which no network has"
            )
    return kind(**values)


def save_generator(path: Path, net: nn.Module, recipe: dict) -> None:
    """Write the weights of a generator and how to build and feed it.

    recipe: direction ("AtoB" or "BtoA"), size (height and width of the training pictures in px),
            stage, run_name, dataset_name, epoch, step; the network's config and the range are added
    """
    recipe = {
        "format": RECIPE_FORMAT,
        "range": [-1, 1],
        "config": dataclasses.asdict(net.config),
        **recipe,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"recipe": json.dumps(recipe)})


def load_generator(path: Path) -> tuple[nn.Module, dict]:
    """Read a generator file: the network on the CPU in eval mode, and its recipe.

    raises: InputError if the file is missing, damaged, foreign, or does not fit its own recipe
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; expected the generator of a run, such as saved_models/NAME/G_AB.safetensors"
        )
    try:
        with safe_open(path, "pt") as file:
            recipe = json.loads((file.metadata() or {}).get("recipe", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = one_line(error)[:120]
        raise InputError(f"{path}: not a readable safetensors file ({reason})") from error
    if not isinstance(recipe, dict) or recipe.get("format") != RECIPE_FORMAT:
        raise InputError(
            f"{path}: carries no recipe of this project; expected a file that train.py or distill.py wrote"
        )
    config, size = read_config(GeneratorConfig, recipe.get("config"), path), recipe.get("size")
    whole_sides = (
        isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
    )
    if not (whole_sides and all(config.smallest_side <= side <= 2**16 for side in size)):
        raise InputError(
            f"{path}: its recipe says size = {one_line(size)[:40]}, expected [height, width] in px"
        )
    if recipe.get("direction") not in ("AtoB", "BtoA"):
        raise InputError(
            f"{path}: its recipe says direction = {one_line(recipe.get('direction'))[:40]}, expected AtoB or BtoA"
        )
    with torch.device("meta"):  # shapes only: a lying recipe costs no memory
        sketch = build_generator(config)
    check_tensors(sketch, tensors, path)
    net = build_generator(config)
    net.load_state_dict(tensors, strict=True)
    return net.eval(), recipe
