"""Generator files: the weights of a generator and the metadata that builds it, in one safetensors file."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models import DIRECTIONS, Direction, Generator, GeneratorConfig, Networks, build_generator, meta_network
from toolkit.converters import read_foreign
from toolkit.files import atomic_write, check_tensors
from utils import InputError, one_line, say, warn

METADATA_KEY = "recipe"  # the name of the entry in the file; older files have it too


def network_hash(net: Generator) -> str:
    """Return a hash of the config and the weights of a generator."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    return hashlib.sha256(repr(net.config).encode() + save(tensors)).hexdigest()


def save_generator(path: str | Path, net: Generator, metadata: dict) -> None:
    """Write the weights of a generator and what is needed to build and run it.

    metadata: direction ("AtoB" or "BtoA"), size ([height, width] of the training images in px), and for the record
              stage, run_name, dataset_name, data_root, domains (names of A and B), epoch, step, pair (hash of both
              generators). The network's config and value range are added
    """
    metadata = {"format": 1, "range": [-1, 1], "config": dataclasses.asdict(net.config)} | metadata
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    with atomic_write(Path(path)) as temporary:
        # not safetensors.save_file, which hides why a disk refuses
        temporary.write_bytes(save(tensors, {METADATA_KEY: json.dumps(metadata)}))


def load_generator(path: str | Path) -> tuple[Generator, dict]:
    """Load a generator file of this project or of another one.

    returns: the network, on the CPU in eval mode, and its metadata as save_generator wrote it; that of other projects
             has range, config, direction (None if the file name does not tell) and size (None)
    raises:  InputError if the file is missing, damaged, of an unknown layout, or does not fit its own metadata
    """
    generators = load_generators(path)
    if len(generators) > 1:
        raise InputError(f"{path}: holds generators of both directions; take load_generators")
    return generators[0]


def load_generators(
    path: str | Path, asked: Direction | None = None, assumed: Collection[str] = ()
) -> list[tuple[Generator, dict]]:
    """Load all generators of a file, as load_generator does one: of another project's file a pair, too.

    asked:   of a pair, the one of this direction alone
    assumed: of toolkit.converters.ASSUMPTIONS, what a file of another project does not show
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected such as saved_models/NAME/G_AB.safetensors")
    own = read_own(path)
    if own and assumed:
        raise InputError(
            f"--assume {','.join(assumed)}: {path} is a file of this project, which says all; leave it out"
        )
    generators = []
    for config, tensors, metadata in [own] if own else read_foreign(path, asked, assumed):
        net = build_generator(config)
        net.load_state_dict(tensors, strict=True)
        generators.append((net.eval(), metadata))
    return generators


def load_pair(paths: Sequence[Path], assumed: Collection[str] = ()) -> Networks:
    """Load generators to start a training from, at most one per direction; returns them by name.

    Of files that do not say their direction, the first is used for AtoB, the second for BtoA.
    raises: InputError as load_generators does, or for a second generator of one direction
    """
    nets: Networks = {}
    pairs: dict[str, object] = {}  # by run
    loaded = [(path, *generator) for path in paths for generator in load_generators(path, assumed=assumed)]
    if [metadata["direction"] for _, _, metadata in loaded] == ["BtoA", "AtoB"]:
        say("the files are in the order BtoA, AtoB; each is used for its own direction")
    for index, (path, net, metadata) in enumerate(loaded):
        run, pair = str(metadata.get("run_name")), metadata.get("pair")
        if pairs.setdefault(run, pair) != pair:
            warn(f"{path}: of another save of {run} than the file for the other direction")
        if metadata["direction"]:
            name = Direction.named(metadata["direction"]).generator
        else:
            name = DIRECTIONS[min(index, 1)].generator
            say(f"{path}: does not say its direction; used as {name}")
        if name in nets:
            raise InputError(f"{path}: a second file for {name}; expected one file for each direction, AtoB first")
        nets[name] = net
        say(f"{name} starts from {path}")
    for direction in DIRECTIONS:
        if nets and direction.generator not in nets:
            say(f"{direction.generator} starts new: no file is given for it")
    return nets


def read_own(path: Path) -> tuple[GeneratorConfig, dict[str, Tensor], dict] | None:
    """Read a file of this project, which may come from a stranger; None for one of another project."""
    with path.open("rb") as file:
        start = file.read(9)  # safetensors: the length of the header in 8 bytes, then JSON
    if path.suffix != ".safetensors" and start[8:] != b"{":
        return None
    try:
        with safe_open(path, "pt") as file:
            if METADATA_KEY not in (file.metadata() or {}):
                return None
            metadata = json.loads(file.metadata()[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({one_line(error)[:120]})") from error
    if not isinstance(metadata, dict) or metadata.get("format") != 1:
        raise InputError(f"{path}: has no metadata of this project; expected a file written by train.py or distill.py")
    config = _check_metadata(metadata, tensors, path)
    check_tensors(meta_network(config).state_dict(), tensors, path)  # before memory is allocated for the network
    return config, tensors, metadata


def _check_metadata(metadata: dict, tensors: dict[str, Tensor], path: Path) -> GeneratorConfig:
    """Check direction and size, and build the config; fields that an older file lacks get their defaults."""
    try:
        config = GeneratorConfig.saved(metadata["config"], tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its metadata holds no valid config: {one_line(error)[:120]}") from error
    size = metadata.get("size")
    is_pair = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
    if not is_pair or min(size) < config.smallest_side or max(size) > 2**16:
        raise InputError(f"{path}: its metadata says size = {one_line(size)[:40]}, expected [height, width] in px")
    direction = metadata.get("direction")
    if direction not in map(str, DIRECTIONS):
        raise InputError(f"{path}: its metadata says direction = {one_line(direction)[:40]}, expected AtoB or BtoA")
    return config
