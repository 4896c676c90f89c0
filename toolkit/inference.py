"""Networks for use: find them, translate one image, a batch, a folder.

nets, metadata = load_networks(None, "horse2zebra")
translator = Translator(nets, metadata, device="auto")
translate_folder(translator, "AtoB", Path("photos"), list_images(Path("photos")), Path("zebras"))
"""

import hashlib
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import utils
from models import LEGACY_DIRECTIONS, Generator, GeneratorConfig, Nets
from toolkit import cli, devices
from toolkit.checkpoints import RUNS, found_runs, load_checkpoint, networks_of
from toolkit.gallery import DOMAINS, KINDS, Result, is_whole, save_thumbnail, thumbnail
from toolkit.images import (
    BadImages,
    UnreadableImage,
    image_to_tensor,
    read_image,
    resize_image,
    save_image,
    tensor_to_image,
)
from toolkit.tiles import receptive_field, translate_tiled
from toolkit.weights import load_generator
from utils import InputError, say, warn

NETWORKS = {direction: name for name, direction in LEGACY_DIRECTIONS.items()}  # "AtoB" → "G_AB"
BATCH = 16  # images that pass a network together, at most
BATCH_PIXELS = 2**20  # in them all; a larger image comes alone
AHEAD_PIXELS = 2**23  # of images that are read, or wait to be written, while a network is busy
THREADS = 4  # that read and write


# ---------------------------------------------------------------------------------------------
# Finding networks


def check_together(nets: Nets, what: object, size: Sequence[int] | None = None) -> None:
    """Raise InputError if networks cannot work on each other's images: their channels differ, or one needs larger ones.

    size: height and width of the images in px, where it is known
    """
    channels = {name: net.config.channels for name, net in nets.items()}
    if len(set(channels.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in channels.items())
        raise InputError(f"{what}: its networks differ in channels ({found}); expected networks of one run")
    side = min(size or [2**30])
    for name, config in ((name, net.config) for name, net in nets.items()):
        fits = side >= config.smallest_side if isinstance(config, GeneratorConfig) else config.map_side(side) >= 1
        if size and not fits:
            raise InputError(f"{what}: says its images are {size[1]}x{size[0]} px, too small for its {name}")


def load_networks(
    file: Path | None, run_name: str, epoch: str = "latest", direction: str | None = None, discriminators: bool = False
) -> tuple[Nets, dict]:
    """Find the network of a generator file or, without one, those of a run; direction: what is wanted, if that was said."""
    if file is None:
        return load_run(run_name, epoch, discriminators)
    net, metadata = load_generator(file)
    found = metadata["direction"]
    if direction and found not in (None, direction):
        raise InputError(f"--direction {direction}: {file} translates {found}; leave the flag out")
    if found is None and direction is None:
        say(f"{file}: does not say its direction; taken for AtoB")
    metadata["direction"] = found or direction or "AtoB"
    return {NETWORKS[metadata["direction"]]: net}, metadata


def load_run(run_name: str, epoch: str = "latest", discriminators: bool = False) -> tuple[Nets, dict]:
    """Find the networks of a run: those of its generator files, else, or with discriminators, of a whole-state file.

    epoch:   "latest", "best" or a number
    returns: networks by name, and metadata with size, dataset_name, data_root, epoch, step; of a state also its flags
    raises:  InputError if there is no such run or epoch, or if its networks do not fit together
    """
    folder = RUNS / run_name
    if not folder.is_dir():
        hint = f"runs found: {found_runs()}; train one with: python train.py --dataset_name NAME"
        raise InputError(f"{folder}: no such run; {hint}")
    files = [path for name in LEGACY_DIRECTIONS if (path := folder / f"{name}.safetensors").is_file()]
    if epoch != "latest" or discriminators or not files:
        return load_run_state(folder, epoch)
    nets = {}
    steps = set()
    for path in files:
        nets[path.stem], metadata = load_generator(path)
        if metadata["direction"] != LEGACY_DIRECTIONS[path.stem]:
            words = f"its metadata says {metadata['direction']}, its name {LEGACY_DIRECTIONS[path.stem]}"
            raise InputError(f"{path}: {words}; put it right")
        steps.add(str(metadata.get("step")))
    if len(steps) > 1 and (folder / "latest.pt").is_file():
        say(f"{folder}: the generator files are of two saves, the second one unfinished; latest.pt is used")
        return load_run_state(folder, "latest")
    check_together(nets, folder, metadata["size"])
    return nets, metadata


def load_run_state(folder: Path, epoch: str) -> tuple[Nets, dict]:
    """Build the networks of a whole-state file; returns them by name, and metadata with its flags."""
    state, path = load_checkpoint(folder, epoch, "--epoch")
    parser = cli.Parser()
    cli.add_data_flags(parser)
    cli.add_loss_flags(parser)
    saved = cli.saved_flags(parser, state.get("args"), path)  # checked as if they had been typed
    size: list[Any] = [saved["img_height"], saved["img_width"]]
    nets = networks_of(state, path)
    check_together(nets, path, size)
    if not LEGACY_DIRECTIONS.keys() & nets.keys():
        raise InputError(f"{path}: holds no generator; use another checkpoint")
    about = {"epoch": state.get("epoch"), "step": state.get("step"), "data_root": str(saved["data_root"])}
    return nets, {"size": size, "flags": saved, "dataset_name": saved["dataset_name"], **about}


# ---------------------------------------------------------------------------------------------
# Networks in use


@dataclass
class Source:
    """An image that was read, as the network shall see it, too; or why it cannot be translated."""

    path: Path
    image: Any = None  # at its own size; None where it cannot be translated
    seen: Any = None
    pixels: int = 0  # of the image
    fault: object = None


class Translator:
    """Networks in eval mode on their device, and how images pass them.

    nets, metadata: as load_networks gives them
    scale:          "train": a network sees images at the size of training, if that is known; "native": at their own
    tile:           larger images are translated in tiles of so many px a side; None: whole
    output_size:    "input": results have the size of the image; "net": that which the network saw
    raises:         InputError for a device that is not there, a precision it has not, and tiles that are too small
    """

    def __init__(
        self,
        nets: Nets,
        metadata: dict,
        device: str = "auto",
        precision: str = "auto",
        scale: str = "train",
        tile: int | None = None,
        output_size: str = "input",
    ):
        self.device = devices.pick_device(device)
        self.precision = devices.pick_precision(precision, self.device)
        self.nets = {name: net.eval().to(self.device) for name, net in nets.items()}
        self.size = tuple(metadata["size"]) if metadata["size"] else None  # height and width of the training images
        self.scale = scale
        self.tile = tile
        self.output_size = output_size
        self.busy = 0.0  # seconds in the networks
        self.directions = [direction for name, direction in LEGACY_DIRECTIONS.items() if name in nets]
        self.configs = [net.config for name, net in nets.items() if name in LEGACY_DIRECTIONS]
        self.channels = self.configs[0].channels
        self.smallest_side = max(config.smallest_side for config in self.configs)  # that all generators take, px
        field = max(map(receptive_field, self.configs))
        if tile and tile < self.smallest_side:
            raise InputError(f"--tile {tile}: the networks need at least {self.smallest_side} px; take that or more")
        if tile and tile < field:
            needed = f"{field} px" if math.isfinite(field) else "the whole image"
            warn(f"--tile {tile}: a pixel depends on {needed} around it, so tiles will not quite fit together")

    def generators(self, direction: str) -> tuple[Generator, Generator | None]:
        """The generator of a direction, and the one that leads back, if there is one."""
        if direction not in self.directions:
            raise InputError(f"these weights translate {', '.join(self.directions)} only; choose that direction")
        source, target = DOMAINS[direction]
        return self.nets[f"G_{source}{target}"], self.nets.get(f"G_{target}{source}")

    @torch.no_grad()
    def __call__(self, net: Generator, images: Tensor) -> Tensor:
        """Run (N, C, H, W) through a network, in tiles where they are wanted; float32 out."""
        start = time.perf_counter()

        def translate(x: Tensor) -> Tensor:
            with devices.autocast(self.device, self.precision):
                return net(x.to(self.device)).float()

        if self.tile and max(images.shape[-2:]) > self.tile:
            outputs = torch.cat([translate_tiled(net, translate, image[None], self.tile) for image in images.cpu()])
        else:
            outputs = translate(images)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.busy += time.perf_counter() - start
        return outputs

    def read_seen(self, path: Path) -> Source:
        """Read an image, and resize it to what the networks shall see."""
        try:
            image = read_image(path, self.channels)
        except UnreadableImage as error:
            return Source(path, fault=error)
        size = self.size if self.scale == "train" else None
        height, width = size or image.size[::-1]
        if min(height, width) < self.smallest_side:
            return Source(path, fault=f"{width}x{height} px, the generator needs {self.smallest_side} px a side")
        most = self.tile or math.inf
        for config in self.configs:
            if config.token_bytes(min(height, most), min(width, most), blocks=1) > devices.total_memory(self.device):
                tokens = f"{config.tokens(height, width):,} tokens, more than {self.device} can hold"
                return Source(path, fault=f"{width}x{height} px are {tokens}; take --scale train")
        return Source(path, image, resize_image(image, (width, height)), pixels=image.width * image.height)


def output_image(x: Tensor, size: tuple[int, int]) -> Image.Image:
    """(C, H, W) in [-1, 1] out of a network → an image of (width, height)."""
    return resize_image(tensor_to_image(x), size)


def free_name(name: Path, taken: set[str]) -> Path:
    """Add .png to a name, which is changed if it is too long, or among those taken, to which the new one is added."""
    stem = name.name
    while str(fitting := name.with_name(f"{shortened(stem)}.png")).lower() in taken:  # for some systems A is a
        stem += "_"
    taken.add(str(fitting).lower())
    return fitting


def shortened(stem: str, most: int = 251) -> str:
    """A name of at most so many bytes (with .png 255, what file systems take): the start of a longer one, and a checksum."""
    if len(os.fsencode(stem)) <= most:
        return stem
    mark = "~" + hashlib.sha256(os.fsencode(stem)).hexdigest()[:12]
    while len(os.fsencode(stem + mark)) > most:
        stem = stem[:-1]
    return stem + mark


def plan_results(
    direction: str, root: Path, paths: Sequence[Path], round_trip: bool, truths: Collection[Path] = ()
) -> dict[Path, Result]:
    """Name what each input will get after its stem, sub-folders kept; where two share one, their suffixes stay too."""
    source, target = DOMAINS[direction]
    plain = [f"real_{source}", f"fake_{target}"]
    back = [f"rec_{source}"] if round_trip else []
    stems = {path: path.relative_to(root).with_suffix("") for path in paths}
    count = Counter(stems.values())
    taken = set()
    results = {}
    for path, stem in stems.items():
        name = free_name(stem if count[stem] == 1 else path.relative_to(root), taken)
        truth = [f"truth_{target}"] if path in truths else []
        results[path] = Result(path, name, {kind: Path(kind, name) for kind in (*plain, *truth, *back)})
    return results


def refuse_overwriting(output: Path, results: dict[Path, Result]) -> None:
    """Raise InputError if an input lies where a file of this or the other direction would go."""
    inputs = {path.resolve() for path in results}
    clash = {(output / kind / result.name).resolve() for kind in KINDS for result in results.values()} & inputs
    if clash:
        raise InputError(f"--output {output}: would overwrite the input {min(clash)}; choose another folder")


def in_batches(sources: Iterable[Source]) -> Iterator[list[Source]]:
    """Group what read_seen gave into batches of equal size, in order; whatever is wrong comes alone."""
    batch = []
    for source in sources:
        alike = batch and source.seen and batch[0].seen and source.seen.size == batch[0].seen.size
        room = AHEAD_PIXELS // max(1, source.pixels)  # a photo waits at its own size for its small copy's neighbours
        most = min(BATCH, BATCH_PIXELS // math.prod(source.seen.size), room) if alike else 0
        if batch and len(batch) >= most:
            yield batch
            batch = []
        batch.append(source)
    if batch:
        yield batch


def ahead(pool: Executor, function: Callable, items: Iterable) -> Iterator[Source]:
    """Yield function(item) in order, while threads work on the next ones; the larger they are, the fewer."""
    waiting = deque()
    most = THREADS
    for item in items:
        waiting.append(pool.submit(function, item))
        while len(waiting) > most:
            result = waiting.popleft().result()
            if result.pixels:  # what cannot be read tells nothing about the next ones
                most = min(2 * BATCH, max(1, AHEAD_PIXELS // result.pixels))
            yield result
    while waiting:
        yield waiting.popleft().result()


def translate_sources(
    translator: Translator, nets: tuple[Generator, Generator | None], sources: Iterable[Source], bad: BadImages
) -> Iterator[tuple[Source, list[Tensor]]]:
    """Yield images with their translation and, where there is a way back, their round trip: (C, H, W) in [-1, 1]."""
    net, back = nets
    for batch in in_batches(sources):
        if batch[0].fault:
            bad.note(batch[0].path, batch[0].fault)
            continue
        fakes = translator(net, torch.stack([image_to_tensor(source.seen) for source in batch]))
        outputs = [fakes.cpu()]
        if back:
            outputs.append(translator(back, fakes).cpu())
        for i, source in enumerate(batch):
            yield source, [x[i] for x in outputs]


def translate_folder(
    translator: Translator,
    direction: str,
    root: Path,
    paths: Sequence[Path],
    output: Path,
    on_bad: str = "skip",
    skip_existing: bool = False,
    round_trip: bool = True,
    truths: Mapping[Path, Path] | None = None,
) -> list[Result]:
    """Translate images into `output`, each under its input's name; reads and writes in threads; returns all that are there.

    root:       the folder that names are relative to
    round_trip: also translate back, where there is a network for it
    truths:     by input, what it should become, to be shown beside it
    raises:     InputError if an input would be overwritten, or none can be translated
    """
    truths = truths or {}
    net, back = translator.generators(direction)
    back = back if round_trip else None
    results = plan_results(direction, root, paths, back is not None, truths)
    refuse_overwriting(output, results)
    existing = set()
    if skip_existing:
        existing = {p for p, result in results.items() if all(is_whole(output, f) for f in result.files.values())}
    waiting = [path for path in paths if path not in existing]
    bad = BadImages(root, len(paths), on_bad)

    def write(item: tuple[Source, list[Tensor]]) -> Source:
        source, tensors = item
        image = source.image if translator.output_size == "input" else source.seen
        shown = [image, *(output_image(x, image.size) for x in tensors)]
        files = results[source.path].files
        if source.path in truths:
            try:
                shown.insert(2, read_image(truths[source.path], translator.channels))
            except UnreadableImage:
                files.pop(f"truth_{DOMAINS[direction][1]}")
        for file, result in zip(files.values(), shown, strict=True):
            save_image(result, output / file)
            save_thumbnail(result, output / thumbnail(file))
        return source

    start = time.perf_counter()
    busy = translator.busy
    with ThreadPoolExecutor(THREADS) as pool:
        read = ahead(pool, translator.read_seen, waiting)
        with tqdm(read, direction, len(waiting), unit="image", mininterval=0.5) as sources:
            written = {x.path for x in ahead(pool, write, translate_sources(translator, (net, back), sources, bad))}
    if not written | existing:
        raise InputError(f"{root}: no image could be translated (see above)")
    seconds = time.perf_counter() - start
    speed = f"{len(written) / seconds:.1f} a second, {(translator.busy - busy) / seconds:.0%} of it in the networks"
    kept = f"; {len(existing)} existed already" if existing else ""
    say(f"{direction}: {utils.counted(len(written), 'image')} in {seconds:.1f} s, {speed}{kept}")
    return [result for path, result in results.items() if path in written | existing]
