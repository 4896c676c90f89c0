"""Unpaired images: folders → batches, the same on every machine and from any step of any epoch.

datasets/horse2zebra/
  trainA/  trainB/   training images of the two domains, also in sub-folders
  testA/   testB/    test images; those of one name in both are pairs with known truth
  valA/    valB/     optional: used by --eval_interval instead of the test images
train/A and train_A are other names of trainA, and so on.

data = TrainingData(DataConfig(), seed=0, device=torch.device("cuda"), held_out={})
for real_A, real_B in data.batches(epoch=0, first_step=0, device=torch.device("cuda")):
    ...  # each (10, 3, 256, 256) in [-1, 1]
"""

import errno
import functools
import hashlib
import json
import math
import mmap
import os
import random
import re
import shutil
import signal
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import utils
from toolkit import devices, images
from toolkit.distributed import rank_slice
from toolkit.files import sha256
from toolkit.pages import CHOICES, file_of
from toolkit.readers import without_suffix
from toolkit.values import ValueRange, common_range, extremes, parse_range, range_option
from utils import InputError, counted, folder_name, option, say

DEMO = "day2night"  # the data set that prepare.py draws
DOMAINS = "domains.json"  # in a data set: the names of A and B, as prepare.py split found them
MEASURED = 1000  # images of a domain from which its value range is measured, evenly spread
MAX_MEGAPIXELS = option(178.0, "treat larger images as unreadable (protects the memory)", above=0, most=10**6)
ON_BAD_IMAGE = option(
    "skip", "at an unreadable image: skip it (up to 5% of a domain), or stop", choices=("skip", "stop")
)


@dataclass(frozen=True)
class DataConfig:
    """Which images to train on, at which size, and how to vary them."""

    dataset_name: str = option("horse2zebra", "folder in --data_root with trainA and trainB", parse=folder_name)
    data_root: Path = option(Path("datasets"), "folder that contains the data sets")
    batch_size: int = option(10, "images of each domain per step, over all ranks", least=1, most=65536)
    img_height: int = option(256, "height of the training images in px", least=4, most=16384)
    img_width: int = option(256, "width of the training images in px", least=4, most=16384)
    channels: int = option(3, "3: colour; 1: grey; else that many bands of the images", least=1, most=16)
    pages: str = option("first", "of a file of several images, such as a stack, use the first or all", choices=CHOICES)
    load_scale: float = option(1.12, "resize to this times the training size, then crop at random", least=1, most=8)
    preprocess: str = option(
        images.PREPROCESS[0],
        "stretch images to one shape, or keep theirs: scale the width, the shorter side or nothing; with or without a crop",
        choices=images.PREPROCESS,
    )
    flip: bool = option(True, "mirror half of the images")
    flip_vertical: bool = option(False, "turn half of the images upside down: for aerial and microscope images")
    rotate90: bool = option(False, "turn images by 0, 90, 180 or 270 degrees; they have to be square")
    num_workers: int | None = option(None, "processes that read images (default: 0 on a CPU, else 4)", least=0)
    cache: str = option("none", "keep decoded images in memory or DATA_SET/.cache", choices=("none", "ram", "disk"))
    range_A: str = range_option("A")
    range_B: str = range_option("B")
    resample_A: str = option("bicubic", "how images of A are resized; nearest: label images", choices=images.RESAMPLE)
    resample_B: str = option("bicubic", "the same for B", choices=images.RESAMPLE)
    max_images: int | None = option(None, "use only the first N images of each domain (default: all)", least=1)
    steps_per_epoch: int | None = option(None, "steps per epoch (default: one pass over the larger domain)", least=1)
    max_megapixels: float = MAX_MEGAPIXELS
    on_bad_image: str = ON_BAD_IMAGE

    @property
    def size(self) -> tuple[int, int]:
        return self.img_height, self.img_width

    @property
    def ranges(self) -> dict[str, ValueRange | None]:
        """The value ranges by domain; None where none is declared."""
        return {"A": parse_range(self.range_A), "B": parse_range(self.range_B)}

    @property
    def resamples(self) -> dict[str, str]:
        """How images are resized, by domain."""
        return {"A": self.resample_A, "B": self.resample_B}

    @property
    def readers(self) -> dict[str, images.ImageReader]:
        """What reads the images of a domain for a network, without random changes."""
        return {
            domain: images.ImageReader(
                self.size, self.channels, value_range, self.preprocess, resample=self.resamples[domain]
            )
            for domain, value_range in self.ranges.items()
        }


@dataclass
class UnpairedDataset(Dataset):
    """Images of two domains, drawn independently; the key of an item is (epoch, i, index_A, index_B).

    The random choices for image i depend on (seed, epoch, i) alone, not on workers or interruptions. An item has "A" and
    "B", (channels, height, width), uint8 or float32 in [0, 255], and "bad": unreadable files, replaced by the next
    readable ones.
    """

    paths: dict[str, list[Path]]  # by domain
    size: tuple[int, int]
    channels: int = 3
    load_scale: float = 1.12
    flip: bool = True
    flip_vertical: bool = False
    rotate90: bool = False
    seed: int = 0
    ranges: dict[str, ValueRange | None] = field(default_factory=dict)  # by domain
    preprocess: str = images.PREPROCESS[0]
    resamples: dict[str, str] = field(default_factory=dict)  # by domain
    caches: dict[str, "ImageCache"] = field(default_factory=dict)  # by domain; filled as images are read

    @property
    def load_size(self) -> tuple[int, int]:
        return round(self.size[0] * self.load_scale), round(self.size[1] * self.load_scale)

    def __getitem__(self, key: tuple[int, int, int, int]) -> dict:
        epoch, i, *indices = key
        item = {"bad": []}
        for domain, index in zip("AB", indices, strict=True):
            pixels = self._read(domain, index, item["bad"])
            item[domain] = self._augment(pixels, random.Random(f"{self.seed}-{epoch}-{i}-{domain}"))
        return item

    def _read(self, domain: str, index: int, bad: list) -> Tensor:
        paths = self.paths[domain]
        cache = self.caches.get(domain)
        for i in [*range(index, len(paths)), *range(index)]:
            pixels = cache.get(i) if cache else None
            try:
                if pixels is None:
                    pixels = self._reader(domain).pixels(paths[i])
                    if cache:
                        cache.put(i, pixels)
                return pixels
            except images.UnreadableImage as error:
                bad.append((domain, paths[i], str(error)))
        return torch.zeros(self.channels, *self.load_size, dtype=torch.uint8)  # never seen: `bad` ends the run

    def _reader(self, domain: str) -> images.ImageReader:
        is_whole = self.preprocess in images.WHOLE
        size = self.size if is_whole or self.preprocess == "crop" else self.load_size
        resample = self.resamples.get(domain, images.RESAMPLE[0])
        limits = self.ranges.get(domain)
        return images.ImageReader(size, self.channels, limits, self.preprocess, not is_whole, resample, is_fast=True)

    def _augment(self, pixels: Tensor, rng: random.Random) -> Tensor:
        from torchvision.transforms.v2 import functional  # here, because its import takes two seconds

        height, width = pixels.shape[1:] if self.preprocess in images.WHOLE else self.size
        top = rng.randint(0, pixels.shape[1] - height)
        left = rng.randint(0, pixels.shape[2] - width)
        x = functional.crop(pixels, top, left, height, width)
        if self.flip and rng.random() < 0.5:
            x = functional.horizontal_flip(x)
        if self.flip_vertical and rng.random() < 0.5:
            x = functional.vertical_flip(x)
        if self.rotate90:
            x = torch.rot90(x, rng.randrange(4), dims=(1, 2))
        return x


@dataclass
class EpochSampler:
    """Batches of keys (epoch, i, index_A, index_B) in random order, from any step of any epoch.

    An epoch is one pass over the larger domain, or `steps`; the smaller domain starts again. Batches are always full.
    Set `epoch` and `first_step` before each pass: they are read in the main process, so persistent workers follow.
    """

    counts: tuple[int, int]
    batch_size: int
    steps: int = 0  # 0: one pass
    seed: int = 0
    epoch: int = 0
    first_step: int = 0

    def __post_init__(self):
        self.steps = self.steps or math.ceil(max(self.counts) / self.batch_size)
        self.rank_slice = rank_slice(self.batch_size)  # the part of each batch that this rank reads

    def __iter__(self) -> Iterator[list[tuple[int, int, int, int]]]:
        order_A = self._order("A", self.counts[0])
        order_B = self._order("B", self.counts[1])
        for step in range(self.first_step, self.steps):
            numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
            yield [(self.epoch, i, order_A[i], order_B[i]) for i in numbers[self.rank_slice]]

    def _order(self, domain: str, count: int) -> list[int]:
        rng = random.Random(f"{self.seed}-{self.epoch}-{domain}")
        order = []  # one shuffled pass over the domain after the other
        while len(order) < self.steps * self.batch_size:
            order += rng.sample(range(count), count)
        return order


def make_loader(dataset: UnpairedDataset, sampler: EpochSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """Make a data loader of batches {"A": (N, channels, H, W), "B": the same, "bad": of all items}, as `sampler` says.

    The images are uint8 or float32 in [0, 255], as those of the data set; images.bytes_to_range makes them inputs.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(start_worker, max_pixels=images.max_pixels),
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # else each pass takes a number from the global one, and a resumed run differs
    )


def _collate(items: list[dict]) -> dict:
    batch = {domain: torch.stack([item[domain] for item in items]) for domain in "AB"}
    return batch | {"bad": [bad for item in items for bad in item["bad"]]}


def start_worker(worker: int, max_pixels: float) -> None:
    """Ignore signals in a worker: the main process saves first and then ends its workers."""
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & vars(signal).keys():
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    images.limit_pixels(max_pixels)


class TrainingData:
    """The images of a training run, without those whose header is unreadable."""

    def __init__(
        self, config: DataConfig, seed: int, device: torch.device, held_out: dict[str, Path], measure: bool = True
    ):
        """measure: find the value ranges that are not declared; False where networks have already learned with others."""
        self.held_out = held_out  # folders to evaluate on, by domain
        self.bad_images = {}
        paths = {}
        folder = find_dataset(config.data_root, config.dataset_name)
        for domain in "AB":
            found = split_images(folder, f"train{domain}", config.max_images)
            self.bad_images[domain] = images.BadImages(
                split_folder(folder, f"train{domain}"), len(found), config.on_bad_image
            )
            paths[domain] = self.bad_images[domain].readable(found)
        self.counts = {domain: len(found) for domain, found in paths.items()}
        self.ranges = config.ranges
        if measure:
            self.ranges = {domain: find_range(config, domain, paths[domain]) for domain in "AB"}
        self.colours = [
            domain for domain in "AB" if self.ranges[domain] and is_in_colour(paths[domain], config.channels)
        ]
        counts = (self.counts["A"], self.counts["B"])
        self.sampler = EpochSampler(counts, config.batch_size, config.steps_per_epoch or 0, seed)
        self.steps_per_epoch = self.sampler.steps
        names = ("size", "channels", "load_scale", "preprocess", "resamples", "flip", "flip_vertical", "rotate90")
        dataset = UnpairedDataset(
            paths, **{name: getattr(config, name) for name in names}, seed=seed, ranges=self.ranges
        )
        if config.preprocess in images.WHOLE:
            say(f"--preprocess {config.preprocess}: images are whole; sides become multiples of {images.MULTIPLE} px")
        dataset.caches = open_caches(config.cache, dataset, folder)
        default_workers = 0 if device.type == "cpu" else 4  # a CPU has no cores to spare; 4 for a GPU are a guess
        workers = default_workers if config.num_workers is None else config.num_workers
        self.loader: Any = make_loader(dataset, self.sampler, workers, pin_memory=device.type == "cuda")
        found = f"{counted(self.counts['A'], 'image')} in trainA, {self.counts['B']} in trainB"
        say(f"{folder}: {found}; {self.steps_per_epoch} steps of {config.batch_size} an epoch")

    def batches(self, epoch: int, first_step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield real_A and real_B, (N, channels, H, W) in [-1, 1]; raises InputError if too many files are unreadable."""
        self.sampler.epoch = epoch
        self.sampler.first_step = first_step
        for batch in self.loader:
            for domain, path, reason in batch["bad"]:
                self.bad_images[domain].note(path, reason)
            real_A, real_B = (batch[domain].to(device, non_blocking=True) for domain in "AB")  # bytes: less to copy
            yield images.bytes_to_range(real_A), images.bytes_to_range(real_B)

    def paths_of_step(self, step: int) -> list[str]:
        """List the files that this rank reads in a step of the current epoch, for a message."""
        self.sampler.first_step = step
        keys = next(iter(self.sampler))
        paths = self.loader.dataset.paths
        return [str(paths["A"][key[2]]) for key in keys] + [str(paths["B"][key[3]]) for key in keys]

    def close(self) -> None:
        """End the workers, which Python would otherwise wait for after an error."""
        self.loader = None


def find_range(config: DataConfig, domain: str, paths: Sequence[Path]) -> ValueRange | None:
    """Return the declared range of a domain, or measure it over at most MEASURED images of more than 8 bits and say it."""
    declared = config.ranges[domain]
    if declared:
        return declared
    deep = []  # extremes of each image of more than 8 bits
    for path in spread(list(paths), MEASURED):
        with suppress(images.UnreadableImage):
            values = images.read_values(path, config.channels)
            if values is not None:
                deep.append(extremes(values))
    found = common_range(deep)
    if deep and found is None:
        raise InputError(f"train{domain}: all values of its images are equal; give --range_{domain} LOW,HIGH")
    if found:
        counts = f"train{domain}: {counted(len(deep), 'image')} of more than 8 bits"
        say(f"{counts}; values from {found[0]:g} to {found[1]:g} become black to white (--range_{domain})")
    return found


def is_in_colour(paths: Sequence[Path], channels: int) -> bool:
    """Whether the first image of more than 8 bits, among the first ten, has several bands that the networks get."""
    for path in paths[:10]:
        with suppress(images.UnreadableImage):
            values = images.read_values(path, channels)
            if values is not None:
                return values.ndim == 3
    return False


def find_dataset(data_root: Path, dataset_name: str) -> Path:
    """Return the folder of a data set; raises InputError if it does not exist."""
    folder = data_root / dataset_name
    if not folder.is_dir():
        found = ", ".join(sorted(path.name for path in data_root.glob("*") if path.is_dir())) or "none"
        remedy = f"give another --data_root, try --dataset_name {DEMO}, or make one with: python prepare.py split"
        raise InputError(f"{folder}: no such data set; found in {data_root}: {found}; {remedy}")
    return folder


def domain_names(folder: Path) -> tuple[str, str]:
    """Return the names of the domains of a data set, as prepare.py split has recorded them or as its name tells."""
    recorded = None
    with suppress(OSError, ValueError, RecursionError):
        recorded = json.loads((folder / DOMAINS).read_text(encoding="utf-8"))
    return utils.domain_names(folder.name, recorded)


def outlook(images: int, steps: int | None = None) -> str:
    """Say what to expect from so many photos of the smaller domain, and so many steps; measured: horse2zebra at 96 px."""
    seen = "horses got their stripes after 7,000 to 9,000 steps, with 1,000 photos of each kind"
    few = ([f"{steps:,} steps"] if steps and steps < 7000 else []) + ([f"{images} photos"] if images < 200 else [])
    return f"what to expect: {seen}" + (f"; {' and '.join(few)} are a trial" if few else "")


def split_folder(folder: Path, split: str) -> Path:
    """Return the folder of a split in a data set: trainA, or else train/A or train_A; trainA if there is none."""
    kind, domain = split[:-1], split[-1]
    spellings = [folder / split, folder / kind / domain, folder / f"{kind}_{domain}"]
    return next((path for path in spellings if path.is_dir()), spellings[0])


def split_images(folder: Path, split: str, max_images: int | None = None) -> list[Path]:
    """List the images of a split, such as trainA; raises InputError if it is missing or contains no image."""
    inside = split_folder(folder, split)
    if not inside.is_dir():
        found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "no folder"
        raise InputError(f"{folder}: no {split}/ inside (found: {found}); python prepare.py split makes the layout")
    paths = images.list_images(inside)
    if not paths:
        raise InputError(f"{inside}: no image inside; expected {images.EXPECTED}")
    return paths[:max_images]


def held_out_split(folder: Path) -> str:
    """Name the split to show during training: test, else val, else train itself."""
    for split in ("test", "val"):
        if all(images.list_images(split_folder(folder, f"{split}{domain}")) for domain in "AB"):
            return split
    return "train"


def fingerprint(folders: Iterable[Path]) -> str:
    """Return a hash of the images in some folders, and of their names."""
    facts = []
    for folder in folders:
        for path in images.list_images(folder):
            with suppress(OSError):  # it is not evaluated either
                facts.append((folder.name, path.relative_to(folder).as_posix(), sha256(file_of(path))))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def held_out_folders(folder: Path, paired: bool) -> dict[str, Path]:
    """Find the val folders, else test folders, by domain; InputError if one is empty or, with paired, no names match."""
    split = "val" if any(split_folder(folder, f"val{domain}").is_dir() for domain in "AB") else "test"
    folders = {domain: split_folder(folder, f"{split}{domain}") for domain in "AB"}
    names_A, names_B = (paths.keys() for paths in by_name(folders).values())
    if paired and not names_A & names_B:
        raise InputError(f"--eval_metrics paired: no pair of names in {folders['A']} and {folders['B']}; leave it out")
    return folders


def pair_name(path: Path, folder: Path) -> Path:
    """Return the name that both images of a pair share: relative to their folder, without the suffix."""
    return without_suffix(path.relative_to(folder))


def by_name(folders: Mapping[str, Path]) -> dict[str, dict[Path, Path]]:
    """List the images of some folders, by domain, as paths by the name that pairs share: by pair_name.

    1_A.png and 1_B.png are a pair, too, called 1, unless an image of the other domain has the full name of one of them.
    """
    found = {
        domain: {pair_name(path, folder): path for path in split_images(folder.parent, folder.name)}
        for domain, folder in folders.items()
    }
    if found.keys() != {"A", "B"}:
        return found
    lone = {}  # domain → name without its letter → full name
    for domain, other in ("AB", "BA"):
        names = found[domain].keys() - found[other].keys()
        lone[domain] = {
            name.with_name(name.name[:-2]): name for name in names if re.fullmatch(rf".+[_-]{domain}", name.name)
        }
    for name in sorted(lone["A"].keys() & lone["B"].keys()):
        if not any(name in found[domain] for domain in "AB"):
            for domain in "AB":
                found[domain][name] = found[domain].pop(lone[domain][name])
    return found


def spread(paths: list[Path], most: int | None) -> list[Path]:
    """Keep at most `most` paths, evenly spread; None keeps all."""
    step = math.ceil(len(paths) / most) if most else 1
    return paths[:: step or 1][:most]


def paired_images(
    folders: dict[str, Path], readers: Mapping[str, images.ImageReader], on_bad: str = "skip", most: int | None = None
) -> dict[str, dict[Path, Tensor]]:
    """Read at most `most` images of each folder, evenly spread, as (1, channels, H, W) in [-1, 1] by pair_name.

    folders, readers: by domain
    returns:          by domain; the pairs come first, in the same order in all domains, the other images fill the rest
    """
    paths = by_name(folders)
    shared = set.intersection(*map(set, paths.values()))
    pairs = spread([name for name in next(iter(paths.values())) if name in shared], most)
    loaded = {}
    for domain, folder in folders.items():
        others = [name for name in paths[domain] if name not in shared]
        others = spread(others, None if most is None else most - len(pairs))
        chosen = [paths[domain][name] for name in pairs + others]
        read = images.load_images(folder, chosen, readers[domain], on_bad)
        names = {path: name for name, path in paths[domain].items()}
        loaded[domain] = {names[path]: x[None] for path, x in read}
    return loaded


def named_images(
    folder: Path, reader: images.ImageReader, on_bad: str = "skip", most: int | None = None
) -> dict[Path, Tensor]:
    """Read the images of one folder, or at most `most` evenly spread ones, as paired_images does."""
    return paired_images({"": folder}, {"": reader}, on_bad, most)[""]


class ImageCache:
    """Decoded and resized images that all processes share: of a file in a folder, else of plain memory.

    They take a byte a channel; in a domain with a value range 16 bits a pixel, and 16 a channel where these are not 1 or 3.
    An image counts as cached if its checksum is right, so a half-written one does no harm.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: tuple[int, int],
        channels: int,
        folder: Path | None,
        value_range: ValueRange | None = None,
        resample: str = images.RESAMPLE[0],
    ):
        self.channels = channels
        self.is_8_bit = value_range is None and channels in (1, 3)
        dtype = torch.uint8 if self.is_8_bit else torch.uint16
        start = 8 * len(paths)
        total = start + len(paths) * bytes_in_cache(size, channels, value_range)
        if folder:
            stats = [file_of(path).stat() for path in paths]
            facts = [(str(path), x.st_size, x.st_mtime_ns) for path, x in zip(paths, stats, strict=True)]
            # of other facts, or an image that has changed, it is a new file
            described = ["planes", resample, size, channels, facts, *([value_range] if value_range else [])]
            name = hashlib.sha256(repr(described).encode()).hexdigest()[:20]
            memory = _map_file(folder / f"{name}.{'uint8' if self.is_8_bit else 'uint16'}", total)
        else:
            memory = mmap.mmap(-1, total)
        values = torch.frombuffer(memory, dtype=torch.uint8)
        self.checksums = values[:start].view(torch.int64)  # CRC32 of the image + 1; 0: not cached
        self.pixels = values[start:].view(dtype).view(len(paths), -1, *size)

    def get(self, i: int) -> Tensor | None:
        """Return the pixels of an image, (channels, H, W), as they were put; None if it is not cached."""
        pixels = self.pixels[i]
        if self.checksums[i] != zlib.crc32(pixels.numpy()) + 1:
            return None
        return pixels if self.is_8_bit else (pixels.float() / 257).expand(self.channels, -1, -1)

    def put(self, i: int, pixels: Tensor) -> None:
        """Keep the pixels of an image; one of another type than the domain's other images is not cached."""
        if pixels.is_floating_point() == self.is_8_bit:
            return
        if not self.is_8_bit:
            planes = self.pixels.shape[1]
            if planes < len(pixels) and pixels.stride(0):  # not one grey plane that is seen several times
                images.warn_once("--cache: colours of more than 8 bits are not kept, but read each time")
                return
            pixels = (pixels[:planes] * 257).round().to(torch.uint16)
        self.pixels[i] = pixels
        self.checksums[i] = zlib.crc32(self.pixels[i].numpy()) + 1


def bytes_in_cache(size: tuple[int, int], channels: int, value_range: ValueRange | None) -> int:
    """Return what an image takes in a cache."""
    if channels not in (1, 3):
        return math.prod(size) * 2 * channels
    return math.prod(size) * (2 if value_range else channels)


def _map_file(path: Path, size: int) -> mmap.mmap:
    """Map a file of `size` bytes, created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    try:
        with path.open("a+b") as file:
            # if the disk became full later, writing would end in a bus error
            if size - file.tell() > shutil.disk_usage(path.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        if not existed:  # it may belong to another user
            path.unlink(missing_ok=True)
        raise InputError(f"--cache disk: {size / 2**30:.1f} GiB: {error.strerror}; use --cache ram") from error


def open_caches(kind: str, dataset: UnpairedDataset, folder: Path) -> dict[str, ImageCache]:
    """Open the caches of a data set by domain: none, in memory (ram), or in folder/.cache; InputError if they do not fit."""
    if kind == "none":
        return {}
    ranges = {domain: dataset.ranges.get(domain) for domain in dataset.paths}
    total = sum(
        len(paths) * bytes_in_cache(dataset.load_size, dataset.channels, ranges[domain])
        for domain, paths in dataset.paths.items()
    )
    total *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks on this machine, as torchrun says
    free = devices.free_memory()
    if kind == "ram" and total > free:
        raise InputError(f"--cache ram: needs {total / 2**30:.2f} GiB, {free / 2**30:.2f} are free; use --cache disk")
    where = folder / ".cache" if kind == "disk" else None
    return {
        domain: ImageCache(
            paths, dataset.load_size, dataset.channels, where, ranges[domain], dataset.resamples.get(domain, "bicubic")
        )
        for domain, paths in dataset.paths.items()
    }
