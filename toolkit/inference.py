"""Find networks, and translate images and folders with them."""

import dataclasses
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cyclegan import LossConfig, translate
from models import DIRECTIONS, Direction, Generator, Networks
from toolkit import checkpoints, devices, files, gallery, images, outputs, tiles, weights
from toolkit.bands import Bands, band_values
from toolkit.executor import set_inference_format
from toolkit.pages import file_of
from toolkit.readers import without_suffix
from toolkit.values import ValueRange, parse_range, ranges_of, values_image
from utils import InputError, check_options, counted, duration, say, warn

BATCH = 16  # images in a batch, at most
BATCH_PIXELS = 2**20  # pixels in a batch, at most; a larger image is a batch of its own
QUEUE_PIXELS = 2**23  # pixels of images that were read ahead or are still to be written, at most
THREADS = 4  # that read and write images
UNKNOWN_SIZE = (256, 256)  # px; of the training images where weights do not say it: the paper's
TILE = 512  # px a side, where whole images would take too much memory
WHOLE_BYTES = 2e9  # that a generator may take for a whole image
TILED_BYTES = 2.5e9  # that an image may take in tiles, with its results
BYTES_PER_TILED_PIXEL = 35  # of an image and its results, measured; 12 are the float32 output
PASSES_IN_TILES = 1.8  # of each pixel through a network: the overlap of tiles, and half of the image for the statistics


def check_together(networks: Networks, what: object) -> None:
    """Raise InputError if networks differ in channels."""
    channels = {name: net.config.channels for name, net in networks.items()}
    if len(set(channels.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in channels.items())
        raise InputError(f"{what}: its networks differ in channels ({found}); expected networks of one run")


def load_networks(
    file: Path | None,
    run_name: str,
    epoch: str = "latest",
    asked: Direction | None = None,
    discriminators: bool = False,
    assumed: Collection[str] = (),
) -> tuple[Networks, dict]:
    """Load the generators of a file or, without one, the networks of a run; returns them by name, and metadata.

    asked:   the direction to translate; a file that does not say its own is used for it
    assumed: of a file of another project, as load_generators takes it
    returns: also metadata, of a file with its direction (of two: the first)
    raises:  InputError if the file is for the other direction, and as load_generators and load_run do
    """
    if file is None and assumed:
        raise InputError(f"--assume {','.join(assumed)}: has no effect without --weights; give both or none")
    if file is None:
        return load_run(run_name, epoch, discriminators)
    checkpoints.recover_run_of(file)
    networks = {}
    generators = weights.load_generators(file, asked, assumed)
    for net, metadata in generators:
        found = metadata["direction"]
        if asked and found not in (None, str(asked)):
            raise InputError(f"--direction {asked}: {file} translates {found}; leave the option out")
        if found is None and asked is None:
            say(f"{file}: does not say its direction; used as AtoB")
        metadata["direction"] = found or str(asked or DIRECTIONS[0])
        networks[Direction.named(metadata["direction"]).generator] = net
    check_together(networks, file)
    return networks, generators[0][1]


def load_run(run_name: str, epoch: str = "latest", discriminators: bool = False) -> tuple[Networks, dict]:
    """Load the generators of a run from their files, or all its networks from a checkpoint.

    epoch:   "latest", "best" or a number; other than the latest need a checkpoint, as discriminators do
    returns: networks by name; metadata: size, dataset_name, data_root, domains, epoch, step, of a checkpoint also loss_config
    raises:  InputError if there is no such run or epoch, or if its networks do not fit together
    """
    folder = checkpoints.RUNS / run_name
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run; runs found: {checkpoints.found_runs()}; train one with train.py")
    checkpoints.recover(run_name)
    networks: Networks = {}
    saves = set()
    for direction in DIRECTIONS:
        file = folder / f"{direction.generator}.safetensors"
        if epoch == "latest" and not discriminators and file.is_file():
            networks[direction.generator], metadata = weights.load_generator(file)
            saves.add((str(metadata.get("step")), str(metadata.get("pair"))))
            if metadata["direction"] != str(direction):
                raise InputError(f"{file}: its metadata says {metadata['direction']}, its name {direction}; rename it")
    doubtful = len(saves) > 1 or (len(networks) > 1 and "None" in {pair for _, pair in saves})  # of an older version
    doubtful = doubtful and (folder / "latest.pt").is_file()
    if len(saves) > 1 and doubtful:
        say(f"{folder}: its generator files are of different saves (one was interrupted); latest.pt is used")
    elif len(saves) > 1:
        warn(f"{folder}: its generator files are of different saves")
    if networks and not doubtful:
        check_together(networks, folder)
        return networks, metadata
    state, path = checkpoints.load_checkpoint(folder, epoch, "--epoch")
    networks = checkpoints.networks_of(state, path)
    try:
        saved = state["args"]
        metadata = {
            "size": [int(saved["img_height"]), int(saved["img_width"])],
            "dataset_name": saved["dataset_name"],
            "data_root": saved.get("data_root"),
            "domains": state.get("domains"),
            "epoch": state["epoch"],
            "step": state["step"],
            "loss_config": LossConfig(**{name: saved.get(name, value) for name, value in vars(LossConfig()).items()}),
        }
        check_options(metadata["loss_config"])
        metadata |= {name: saved.get(name) for name in ("preprocess", "resample_A", "resample_B", "pages")}
        metadata["colours"] = state.get("colours")
        metadata |= {f"range_{domain}": parse_range(str(saved.get(f"range_{domain}"))) for domain in "AB"}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise checkpoints.unusable(path, error) from error
    if not {"G_AB", "G_BA"} & networks.keys():
        raise InputError(f"{path}: holds no generator; use another checkpoint")
    return networks, metadata


@dataclass
class LoadedImage:
    """An image file that was read, or the reason why it cannot be translated."""

    path: Path
    image: Any = None  # a PIL image, at its own size; None if it cannot be translated
    network_input: Any = None  # the same at the size that the networks get
    reason: object = None

    @property
    def pixels(self) -> int:
        return self.image.width * self.image.height if self.image else 0

    def joins(self, batch: Sequence["LoadedImage"]) -> bool:
        """Whether it can pass the networks together with a batch."""
        if not self.image or not batch[0].image or self.network_input.size != batch[0].network_input.size:
            return False
        if self.network_input.mode != batch[0].network_input.mode:  # bytes or floats
            return False
        # a batch also keeps the images at their own size
        most = min(BATCH_PIXELS // math.prod(self.network_input.size), QUEUE_PIXELS // max(1, self.pixels))
        return len(batch) < min(BATCH, most)


def say_about(path: Path, text: str) -> None:
    """Print something about an image."""
    say(f"{path}: {text}")


@dataclass
class Translator:
    """Networks in eval mode on a device, and the sizes at which images pass through them.

    raises: InputError for a device that does not exist, a precision that it lacks, and tiles that are too small
    """

    networks: Networks
    metadata: dict  # as load_networks returns it
    device: Any = "auto"  # its name, then the torch.device
    precision: str = "auto"
    scale: str = "train"  # "train": resize images to the training size, if it is known; "native": keep their own size
    tile: int | None = None  # translate larger images in overlapping tiles of so many px a side; None: those too large
    output_size: str = "input"  # of the results: that of their image, or "net": that of the networks' output
    ranges: dict[str, ValueRange | None] = field(default_factory=dict)  # by domain, in place of those of the metadata
    hint: Callable[[Path, str], object] = say_about  # shows something about an image to the user
    said: set[str] = field(default_factory=set, init=False)  # kinds of hints that were given

    def __post_init__(self):
        self.device = devices.pick_device(self.device)
        self.precision = devices.pick_precision(self.precision, self.device)
        self.networks = {name: net.eval().to(self.device) for name, net in self.networks.items()}
        if self.metadata["size"] is None and self.scale == "train":
            say(
                "these weights do not say their training size: 256x256 px is assumed; --scale native keeps that of images"
            )
        self.ranges = ranges_of(self.metadata) | {domain: found for domain, found in self.ranges.items() if found}
        self.size: tuple[int, int] = tuple(self.metadata["size"] or UNKNOWN_SIZE)  # of the training images
        stated = self.metadata.get("preprocess")  # older files do not say it, and a stranger's may say anything
        self.preprocess = stated if stated in images.PREPROCESS else images.PREPROCESS[0]
        stated = {domain: self.metadata.get(f"resample_{domain}") for domain in "AB"}
        self.resamples = {
            domain: kind if kind in images.RESAMPLE else images.RESAMPLE[0] for domain, kind in stated.items()
        }
        self.directions = [direction for direction in DIRECTIONS if direction.generator in self.networks]
        for direction in self.directions:
            set_inference_format(self.networks[direction.generator], self.device, self.precision)
        configs = [self.networks[direction.generator].config for direction in self.directions]
        self.channels = configs[0].channels
        if self.channels not in (1, 3):  # a PNG shows three bands; the values of all are written as those of ranges are
            self.ranges = {"A": (0.0, 255.0), "B": (0.0, 255.0)} | self.ranges
        self.smallest_side = max(config.smallest_side for config in configs)  # that all generators accept, in px
        if self.tile and self.tile < self.smallest_side:
            raise InputError(f"--tile {self.tile}: the networks need at least {self.smallest_side} px; take as many")
        largest = max(self.size) if self.scale == "train" else math.inf  # side of an image, in px
        nets = [self.networks[direction.generator] for direction in self.directions]
        self.bytes_per_pixel = max(map(tiles.bytes_per_pixel, nets)) if largest > TILE else 0.0
        receptive_field = max(map(tiles.receptive_field, configs))
        if self.tile and self.tile < receptive_field:
            needed = f"{receptive_field} px" if math.isfinite(receptive_field) else "the whole image"
            warn(f"--tile {self.tile}: a pixel depends on {needed} around it, so tiles will not quite fit together")

    def is_in_colour(self, domain: str) -> bool:
        """Whether the values of a domain, in its units, have as many bands as the networks channels; else they are greys."""
        stated = self.metadata.get("colours")
        return self.channels not in (1, 3) or (self.channels == 3 and isinstance(stated, list) and domain in stated)

    def reader(self, domain: str, size: tuple[int, int] | None) -> images.ImageReader:
        """Return what reads the images of a domain for these networks, at a height and width or at their own."""
        resample = self.resamples[domain]
        return images.ImageReader(size, self.channels, self.ranges.get(domain), self.preprocess, resample=resample)

    def settings(self) -> dict:
        """Return, as plain values, all that a translation depends on besides its image."""
        networks = {str(d): weights.network_hash(self.networks[d.generator]) for d in self.directions}
        known = {name: self.metadata.get(name) for name in ("epoch", "step")}
        whole = {name: value if isinstance(value, int) else None for name, value in known.items()}  # a stranger's file
        sizes: dict[str, Any] = {
            "size": self.size,
            "scale": self.scale,
            "tile": self.tile,
            "output_size": self.output_size,
        }
        sizes |= {"ranges": self.ranges} if self.ranges else {}
        sizes |= {"preprocess": self.preprocess} if self.preprocess != images.PREPROCESS[0] else {}
        sizes |= {"resample": self.resamples} if "nearest" in self.resamples.values() else {}
        return whole | sizes | {"precision": self.precision, "networks": networks}

    def generators(self, direction: Direction) -> tuple[Generator, Generator | None]:
        """Return the generator of a direction and, if there is one, that of the way back."""
        if direction not in self.directions:
            present = ", ".join(map(str, self.directions))
            raise InputError(f"direction {direction}: these weights translate {present} only; choose that")
        return self.networks[direction.generator], self.networks.get(direction.reverse.generator)

    def __call__(self, net: Generator, x: Tensor) -> Tensor:
        """Run (N, C, H, W), float in [-1, 1] or uint8, through a network, in tiles where needed; returns float32 of that shape."""

        def run(x: Tensor) -> Tensor:
            x = images.bytes_to_range(x) if x.dtype == torch.uint8 else x
            return translate(net, x, precision=self.precision)

        tile = self.tile_for(*x.shape[-2:])
        if tile and max(x.shape[-2:]) > tile:
            return torch.cat([tiles.translate_tiled(net, run, image[None], tile) for image in x.cpu()])
        return run(x)

    def tile_for(self, height: int, width: int) -> int | None:
        """Return the side of the tiles of an image; None if it is translated whole."""
        return self.tile or (TILE if self.bytes_per_pixel * height * width > WHOLE_BYTES else None)

    def seconds_in_tiles(self, pixels: int) -> float:
        """Estimate how long a network takes for an image in tiles, from a small one."""
        side = max(128, 4 * self.smallest_side)
        x = torch.zeros(1, self.channels, side, side, device=self.device)
        for _ in range(2):  # the first is slower
            start = time.perf_counter()
            translate(self.networks[self.directions[0].generator], x, precision=self.precision).cpu()
            seconds = time.perf_counter() - start
        return PASSES_IN_TILES * seconds * pixels / side**2

    def load(self, path: Path, domain: str) -> LoadedImage:
        """Read an image of a domain and resize it for the networks."""
        try:
            return self.fit(path, images.read_image(path, self.channels, self.ranges.get(domain)), domain)
        except images.UnreadableImage as error:
            return LoadedImage(path, reason=error)

    def fit(self, path: Path, image: Image.Image | Bands, domain: str) -> LoadedImage:
        """Resize an image of a domain, as read_image returns it, for the networks."""
        reader = self.reader(domain, self.size if self.scale == "train" else None)
        width, height = dataclasses.replace(reader, to_crop=False).fit(image.size)
        if min(width, height) < self.smallest_side:
            return LoadedImage(path, reason=f"{width}x{height} px, the generator needs {self.smallest_side} px a side")
        if self.tile is None and self.tile_for(height, width):
            pixels = height * width
            needed = self.bytes_per_pixel * TILE**2 + BYTES_PER_TILED_PIXEL * pixels
            if needed > TILED_BYTES:
                reason = (
                    f"needs about {needed / 1e9:.1f} GB even in tiles; test.py --tile {TILE} translates it all the same"
                )
                return LoadedImage(path, reason=f"{width}x{height} px: {reason}")
            whole = f"{self.bytes_per_pixel * pixels / 1e9:.1f} GB"
            if "tiled" not in self.said:
                tiled = f"{needed / 1e9:.1f} GB and {duration(self.seconds_in_tiles(pixels))}"
                text = f"would take about {whole}; in tiles of {TILE} px about {tiled} for each network"
                self.say_once("tiled", path, text)
        elif self.output_size == "input" and max(image.size) > 2 * max(width, height):
            enlarged = f"translated at {width}x{height} px, then enlarged to {image.width}x{image.height} px"
            self.say_once("enlarged", path, f"{enlarged}; training at a larger size gives more detail")
        times = max(width, height) / max(self.size)
        if times > 2:
            finer = f"translated at {times:.0f} times the size of the training images"
            self.say_once(
                "finer", path, f"{finer}: textures such as stripes become that much finer; compare both sizes"
            )
        return LoadedImage(path, image, images.resize_image(image, (width, height), reader.resample))

    def say_once(self, kind: str, path: Path, text: str) -> None:
        """Show a hint, of each kind only the first."""
        if kind not in self.said:
            self.said.add(kind)
            self.hint(path, text)


def output_image(x: Tensor, size: tuple[int, int]) -> Image.Image:
    """Turn the output of a network, (C, H, W) in [-1, 1] or uint8, into an image of (width, height)."""
    return images.resize_image(images.tensor_to_image(x), size)


@dataclass
class Inputs:
    """Image files of one domain, which are translated together."""

    root: Path  # results have the names of their inputs relative to it
    paths: Sequence[Path]
    on_bad: str = "skip"  # or "stop" at an unreadable one
    truths: dict[Path, Path] = field(default_factory=dict)  # by input: what it should become, where that is known


def unique_name(name: Path, is_taken: Callable[[str], bool]) -> Path:
    """Add .png to a name, and underscores while it is taken: some file systems do not distinguish a.png from A.png."""
    result = name.with_name(f"{name.name}.png")
    while is_taken(str(result).lower()):
        result = result.with_stem(f"{result.stem}_")
    return result


def plan_results(
    direction: Direction,
    inputs: Inputs,
    round_trip: bool,
    others: Mapping[str, str | None],
    value_range: ValueRange | None = None,
    asked_format: str = "png",
    in_colour: bool = False,
) -> list[gallery.Result]:
    """Name the files for each input: its name and sub-folder; inputs that differ in suffix alone keep their suffix.

    others:       hashes of inputs by the lower-case names of their results, which only the same input may replace
    value_range:  of the translations; where their own files do not hold its values, they get a second one that does
    asked_format: of the translations, one of outputs.CHOICES
    in_colour:    whether the values of that range have several bands
    """
    real, fake, truth, rec = gallery.result_folders(direction)
    count = Counter(without_suffix(path) for path in inputs.paths)
    folders = {parent for path in inputs.paths for parent in path.relative_to(inputs.root).parents}
    taken = {
        str(folder.with_suffix(suffix)).lower()
        for folder in folders
        if folder.name
        for suffix in (folder.suffix, ".png")
    }
    results = []
    renamed = []
    for path in inputs.paths:

        def is_taken(name: str, path: Path = path) -> bool:
            return name in taken or (name in others and others[name] != files.sha256(file_of(path)))

        stem = without_suffix(path)
        wanted = (stem if count[stem] == 1 else path).relative_to(inputs.root)
        name = unique_name(wanted, is_taken)
        if name != unique_name(wanted, taken.__contains__):
            renamed.append(f"{path}: {name}")
        taken.add(str(name).lower())
        present = {real: True, fake: True, truth: path in inputs.truths, rec: round_trip}
        paths = {folder: Path(folder, name) for folder in present if present[folder]}
        written = outputs.choose_format(asked_format, path.suffix, value_range, in_colour)
        paths[fake] = paths[fake].with_suffix(f".{written.kind}")
        values = gallery.values_file(direction, name) if value_range and not written.in_units else None
        results.append(gallery.Result(path, name, paths, inputs.truths.get(path), values, written))
    changed = Counter(path.suffix for path in inputs.paths if path.suffix.lower() not in outputs.KINDS)
    if changed and asked_format == "same":
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(changed.items()))
        say(f"--format same: becomes {'TIFF' if value_range else 'PNG'}, since it is not written: {kinds}")
    if renamed:
        more = f", and {len(renamed) - 1} more" if renamed[1:] else ""
        say(
            f"results of other images have these names already, so they are called {renamed[0]}{more}; or use --output DIR"
        )
    return results


def in_batches(loaded: Iterable[LoadedImage]) -> Iterator[list[LoadedImage]]:
    """Group images of equal size into batches, in order; what cannot be translated is a batch of its own."""
    batch: list[LoadedImage] = []
    for image in loaded:
        if batch and not image.joins(batch):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


def run_ahead(pool: Executor, function: Callable, items: Iterable) -> Iterator[LoadedImage]:
    """Yield function(item) in order, while threads process the next items; the larger the images, the fewer."""
    queue = deque()
    most = THREADS
    for item in items:
        queue.append(pool.submit(function, item))
        while len(queue) > most:
            result = queue.popleft().result()
            if result.pixels:  # an unreadable image says nothing about the next ones
                most = min(2 * BATCH, max(1, QUEUE_PIXELS // result.pixels))
            yield result
    while queue:
        yield queue.popleft().result()


def translate_images(
    translator: Translator,
    nets: Sequence[Generator],
    loaded: Iterable[LoadedImage],
    bad: images.BadImages,
    as_floats: bool = False,
) -> Iterator[tuple[LoadedImage, list[Tensor]]]:
    """Yield each image with the outputs of the networks, each of which gets what the one before put out.

    yields: outputs (C, H, W): uint8, which takes less memory, or float32 in [-1, 1]
    """
    for batch in in_batches(loaded):
        if batch[0].reason:
            bad.note(batch[0].path, batch[0].reason)
            continue
        x = torch.stack([images.image_to_pixels(image.network_input, translator.channels) for image in batch])
        x = images.bytes_to_range(x) if x.is_floating_point() else x
        translated = []
        for net in nets:
            x = translator(net, x)
            translated.append((x if as_floats else images.range_to_bytes(x)).cpu())
        for i, image in enumerate(batch):
            yield image, [output[i] for output in translated]


def translation_of(
    translator: Translator, direction: Direction, loaded: LoadedImage, x: Tensor, keep_alpha: bool
) -> outputs.Translation:
    """Return what is written of an output of a network, (C, H, W) in [-1, 1] or uint8, for an image."""
    size = (loaded.image if translator.output_size == "input" else loaded.network_input).size
    value_range = translator.ranges.get(direction.target)
    translation = outputs.Translation(output_image(x, size))
    if value_range:
        in_units = band_values if translator.is_in_colour(direction.target) else values_image
        translation.values = in_units(x, size, value_range)
    translation.geotags = outputs.read_geotags(loaded.path, size)
    alpha = images.read_alpha(loaded.path) if keep_alpha else None
    translation.alpha = images.resize_image(alpha, size) if alpha else None
    return translation


def say_what_is_lost(
    translator: Translator,
    path: Path,
    translation: outputs.Translation,
    written: outputs.OutputFormat,
    with_values: bool = False,
) -> None:
    """Say of the first image what its file cannot hold; with_values: a TIFF of values is written, too."""
    if translation.geotags and written.kind != "tif" and not with_values:
        translator.say_once("geotags", path, f"its georeference is lost in .{written.kind}; TIFF files keep it")
    if translation.alpha and (written.in_units or written.kind in ("jpg", "npy")):
        translator.say_once("alpha", path, "its transparency is lost; PNG, WebP and TIFF of 8 bits keep it")


def translate_file(
    translator: Translator, direction: Direction, path: Path, output: Path, keep_alpha: bool = False
) -> None:
    """Write the translation of one image as a file, in the format that its suffix says.

    raises: InputError if the image is unreadable, or the file exists
    """
    net, _ = translator.generators(direction)
    value_range = translator.ranges.get(direction.target)
    bad = images.BadImages(path.parent, 1)
    loaded = [translator.load(path, direction.source)]
    for image, (x,) in translate_images(translator, [net], loaded, bad, bool(value_range)):
        translation = translation_of(translator, direction, image, x, keep_alpha)
        in_colour = translator.is_in_colour(direction.target)
        written = outputs.choose_format("same", output.suffix, value_range, in_colour)
        if written.kind != outputs.KINDS[output.suffix.lower()]:  # a PNG that cannot hold the values
            written = outputs.PNG
        if value_range and not written.in_units:
            low, high = value_range
            say_about(output, f"8 bits, in which 0 is {low:g} and 255 is {high:g}; a .tif has the values themselves")
        say_what_is_lost(translator, path, translation, written)
        output.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(output) as temporary:
            translation.save(temporary, written)
            refuse_existing(output)


def refuse_existing(output: Path) -> None:
    """Raise InputError if a file exists: there is no record that says whose it is."""
    if os.path.lexists(output):
        raise InputError(f"--output {output}: is there already; choose another name, or move it away")


def translate_folder(
    translator: Translator,
    direction: Direction,
    inputs: Inputs,
    results: Sequence[gallery.Result],
    folder: gallery.ResultFolder,
    skip_existing: bool = False,
    keep_alpha: bool = False,
) -> list[gallery.Result]:
    """Write the results of plan_results, of which the folder has the names; return those that exist then.

    Threads read ahead and write behind while batches pass through the networks.
    skip_existing: leave out results that the folder already has, made from just these inputs, networks and settings
    keep_alpha:    translations get the transparency of their inputs
    raises:        as BadImages.note does
    """
    _, _, truth, rec = gallery.result_folders(direction)
    net, back = translator.generators(direction)
    nets = [net, back] if back and any(rec in result.files for result in results) else [net]
    existing = {result.input for result in results if skip_existing and folder.has(result)}
    waiting = {result.input: result for result in results if result.input not in existing}
    bad = images.BadImages(inputs.root, len(inputs.paths), inputs.on_bad)
    value_range = translator.ranges.get(direction.target)
    origins: dict[Path, dict] = {}
    written = set()

    def read(path: Path) -> LoadedImage:
        origins[path] = folder.origin(waiting[path])  # before it is read: a file that changes meanwhile is made again
        return translator.load(path, direction.source)

    def write(item: tuple[LoadedImage, list[Tensor]]) -> LoadedImage:
        loaded, (fake, *recs) = item
        result = waiting[loaded.path]
        image = loaded.image if translator.output_size == "input" else loaded.network_input
        translation = translation_of(translator, direction, loaded, fake, keep_alpha)
        say_what_is_lost(translator, loaded.path, translation, result.format, bool(result.values))
        shown = [images.to_8_bit(image), translation.image, *(output_image(x, image.size) for x in recs)]
        origin = origins.pop(loaded.path)
        if result.truth:
            try:
                shown.insert(2, images.to_8_bit(images.read_image(result.truth, translator.channels, value_range)))
            except images.UnreadableImage as error:
                warn(f"{result.truth}: neither shown nor scored ({error})")
                result.files.pop(truth)
                result.truth = None
                origin["truth"] = None
        folder.save(result, shown, origin, translation)
        written.add(loaded.path)
        return loaded

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        translated = translate_images(translator, nets, run_ahead(pool, read, waiting), bad, bool(value_range))
        with tqdm(desc=str(direction), total=len(waiting), unit="image", mininterval=0.5) as bar:
            for _ in run_ahead(pool, write, translated):
                bar.update()
    kept = f"; {len(existing)} existed already" if existing else ""
    say(f"{direction}: {counted(len(written), 'image')} in {time.perf_counter() - start:.1f} s{kept}")
    return [result for result in results if result.input in existing.union(written)]
