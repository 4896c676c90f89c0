"""Unpaired images: folders → batches, the same on every machine, from any step of any epoch.

paths = {domain: split_images(folder, f"train{domain}") for domain in "AB"}
dataset = UnpairedDataset(paths, size=(256, 256))
order = EpochSampler((len(paths["A"]), len(paths["B"])), batch_size=10)
for batch in make_loader(dataset, order, num_workers=4, pin_memory=True):
    batch["A"]  # (10, 3, 256, 256) in [-1, 1]
"""

import difflib
import functools
import hashlib
import math
import os
import random
import shutil
import signal
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from toolkit import images
from toolkit.devices import free_memory
from toolkit.distributed import world_size
from utils import InputError, folder_name, option

DEMO = "day2night"  # the set that prepare.py draws
CHECKSUM_BYTES = 8  # of each image in a cache


# ---------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class PixelConfig:
    """How large an image may be."""

    max_megapixels: float = option(
        178.0, "treat larger images as unreadable (protects the memory)", above=0, most=10**6
    )


@dataclass(frozen=True)
class ReadingConfig(PixelConfig):
    """How image files are read."""

    on_bad_image: str = option(
        "skip",
        "skip: leave out up to 5% of a domain, naming each file; stop: end at the first",
        choices=("skip", "stop"),
    )


@dataclass(frozen=True)
class DataConfig(ReadingConfig):
    """Which images to train on, at which size, and how to vary them."""

    dataset_name: str = option(
        "horse2zebra", "folder in --data_root that contains trainA and trainB", parse=folder_name
    )
    data_root: Path = option(Path("datasets"), "folder that contains the data sets")
    batch_size: int = option(10, "images of each domain per step, over all ranks", least=1, most=65536)
    img_height: int = option(256, "height of the training images in px", least=4, most=16384)
    img_width: int = option(256, "width of the training images in px", least=4, most=16384)
    channels: int = option(3, "3: colour; 1: grey", choices=(3, 1))
    load_scale: float = option(1.12, "resize to this times the training size, then crop at random", least=1, most=8)
    flip: bool = option(True, "mirror half of the images")
    num_workers: int | None = option(None, "processes that read images (default: 0 on a CPU, else 4)", least=0)
    cache: str = option(
        "none", "keep decoded images in memory or in DATA_SET/.cache on disk", choices=("none", "ram", "disk")
    )
    max_images: int | None = option(None, "use only the first N images of each domain (default: all)", least=1)
    steps_per_epoch: int | None = option(None, "steps per epoch (default: one pass over the larger domain)", least=1)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the training images."""
        return self.img_height, self.img_width


# ---------------------------------------------------------------------------------------------
# Folders of a data set


def recorded_root(recorded: object) -> Path:
    """The folder of the data sets that a run was trained on, as its files say; "datasets" where they do not.

    raises: InputError if it is gone
    """
    root = Path(recorded if isinstance(recorded, str) else "datasets")
    if root != Path("datasets") and not root.is_dir():
        raise InputError(f"{root}: held the data sets when the run was trained, and is gone; give their --data_root")
    return root


def find_dataset(data_root: Path, dataset_name: str) -> Path:
    """Return the folder of a data set, or say which one may have been meant."""
    folder = data_root / dataset_name
    if folder.is_dir():
        return folder
    others = sorted(p.name for p in data_root.iterdir() if p.is_dir()) if data_root.is_dir() else []
    near = difflib.get_close_matches(dataset_name, others, 1, cutoff=0)
    hint = f"nearest existing: {near[0]}" if near else f"{data_root} holds no data set"
    raise InputError(
        f"{folder}: no such data set; {hint}; make one with: python prepare.py split --A DIR --B DIR "
        f"--dataset_name {dataset_name}, or try --dataset_name {DEMO}"
    )


def split_images(folder: Path, split: str, max_images: int | None = None) -> list[Path]:
    """List the images of one part of a data set, such as trainA.

    raises: InputError if the folder is missing, or holds nothing that looks like an image
    """
    if not (folder / split).is_dir():
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folder"
        raise InputError(
            f"{folder}: no {split}/ inside (found: {found}); rename them, or make the layout with: "
            "python prepare.py split --A DIR --B DIR --dataset_name NAME"
        )
    paths = images.list_images(folder / split)
    if not paths:
        kinds = " ".join(sorted(images.SUFFIXES))
        raise InputError(f"{folder / split}: no image inside; expected files that end in {kinds}")
    return paths[:max_images]


def held_out_split(folder: Path) -> str:
    """Name the part that training may look at but not learn from: test, else val, else train itself."""
    for split in ("test", "val"):
        if all(images.list_images(folder / f"{split}{domain}") for domain in "AB"):
            return split
    return "train"


def held_out_folders(folder: Path, paired: bool) -> dict[str, Path]:
    """Find the folders to evaluate on, by domain: of the val split, where there is one, else of the test split.

    raises: InputError if one has no images or, if they shall be paired, no name in common with the other
    """
    split = "val" if any((folder / f"val{domain}").is_dir() for domain in "AB") else "test"
    folders = {domain: folder / f"{split}{domain}" for domain in "AB"}
    names = {}
    for domain, part in folders.items():
        names[domain] = {pair_name(path, part) for path in split_images(folder, part.name)}
    if paired and not names["A"] & names["B"]:
        words = f"no image in {folders['A']} has the name of one in {folders['B']}"
        raise InputError(f"--eval_metrics paired: {words}; leave it out for unpaired sets")
    return folders


def pair_name(path: Path, folder: Path) -> Path:
    """The name that the two images of a pair share: relative to their folders, without suffix."""
    return path.relative_to(folder).with_suffix("")


def spread(paths: list[Path], most: int | None) -> list[Path]:
    """Keep at most so many paths, evenly spread; None keeps all."""
    if most is None or len(paths) <= most:
        return paths
    return paths[:: math.ceil(len(paths) / most)] if most else []


def load_named(folder: Path, paths: Sequence[Path], size: tuple[int, int], channels: int, on_bad: str) -> dict:
    """Read images as (1, channels, H, W) in [-1, 1], by pair_name."""
    loaded = images.load_images(folder, paths, size, channels, on_bad)
    return {pair_name(path, folder): x[None] for path, x in loaded}


def named_images(
    folder: Path, size: tuple[int, int], channels: int, on_bad: str = "skip", most: int | None = None
) -> dict[Path, Tensor]:
    """Read a folder's images, or at most so many evenly spread ones, by the name without suffix that pairs share.

    returns: (1, channels, H, W) in [-1, 1] by name; size is (height, width)
    raises:  InputError as split_images and load_images do
    """
    return load_named(folder, spread(split_images(folder.parent, folder.name), most), size, channels, on_bad)


def paired_images(
    folders: dict[str, Path], size: tuple[int, int], channels: int, on_bad: str = "skip", most: int | None = None
) -> dict[str, dict[Path, Tensor]]:
    """Read the images of two domains as named_images does, so that pairs stay pairs.

    Names that both domains have come first, in the same order, and are thinned together to at
    most `most`; each domain's other images fill what room is left, evenly spread.
    """
    paths: dict[str, dict[Path, Path]] = {}  # by domain and name
    for domain, folder in folders.items():
        found = split_images(folder.parent, folder.name)
        paths[domain] = {pair_name(path, folder): path for path in found}
    first, second = paths.values()
    shared = [name for name in first if name in second]
    pairs = spread(shared, most)
    room = None if most is None else most - len(pairs)
    loaded = {}
    for domain, folder in folders.items():
        others = [name for name in paths[domain] if not (name in first and name in second)]
        chosen = [paths[domain][name] for name in (*pairs, *spread(others, room))]
        loaded[domain] = load_named(folder, chosen, size, channels, on_bad)
    return loaded


# ---------------------------------------------------------------------------------------------
# The cache


class ImageCache:
    """Images of one size, decoded and resized once: bytes in memory that the workers share, or in a file.

    An image counts as kept when its checksum says so: half-written ones, and two runs that fill
    one file at a time, do no harm. The file's name follows from the images' names, sizes and
    times, so that a changed data set gets a new one.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], channels: int, folder: Path | None, shared: bool):
        """folder: of the file; None keeps the images in memory, `shared` with worker processes."""
        checksums = len(paths) * CHECKSUM_BYTES
        total = checksums + len(paths) * math.prod(size) * channels
        if folder:
            facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
            name = hashlib.sha256(repr([size, channels, facts]).encode()).hexdigest()[:20]
            values = map_file(folder / f"{name}.uint8", total)
        else:
            values = torch.zeros(total, dtype=torch.uint8)
            values = values.share_memory_() if shared else values
        self.sums = values[:checksums].view(torch.int64)  # an image's CRC32 + 1; 0 where there is none
        self.pixels = values[checksums:].view(len(paths), *size, channels)

    def get(self, i: int) -> Image.Image | None:
        """The image of a path's index, if it is kept and whole."""
        expected = self.sums[i].item()
        pixels = self.pixels[i].numpy() if expected else None
        if pixels is None or zlib.crc32(pixels) + 1 != expected:
            return None
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)  # copies

    def put(self, i: int, image: Image.Image) -> None:
        """Keep an image of the cache's size."""
        pixels: Any = np.array(image).reshape(self.pixels.shape[1:])
        self.pixels[i] = torch.from_numpy(pixels)
        self.sums[i] = zlib.crc32(pixels) + 1


def map_file(path: Path, size: int) -> Tensor:
    """A file of `size` bytes as a tensor that all processes share; made where it is missing.

    raises: InputError if the disk is too full, or torch cannot map the file into memory
    """
    try:
        str(path).encode()  # torch knows no names that are not text; asked before the file takes its room
        return torch.from_file(str(reserve(path, size)), True, size, dtype=torch.uint8)
    except (UnicodeEncodeError, RuntimeError) as error:
        words = f"{path} cannot be mapped into memory ({str(error).splitlines()[0]})"
        raise InputError(f"--cache disk: {words}; take --cache ram, or another --data_root") from error


def reserve(path: Path, size: int) -> Path:
    """Make sure that a file of `size` bytes exists and has its room on the disk, new parts zero; returns its path.

    raises: InputError if the disk has less left (writing to it through memory would end in a bus error)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        missing = size - file.tell()
        free = shutil.disk_usage(path.parent).free
        if missing > free:
            words = f"needs {missing / 2**30:.1f} GiB in {path.parent}, which has {free / 2**30:.1f} left"
            raise InputError(f"--cache disk: {words}; lower --max_images, or leave it out")
        if missing > 0 and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif missing > 0:
            file.truncate(size)
    return path


def check_cache_memory(total: int, num_workers: int) -> None:
    """Raise InputError if a cache of `total` bytes does not fit into memory."""
    free = free_memory()
    where = "memory"
    shared = Path("/dev/shm")
    if num_workers and shared.is_dir() and shutil.disk_usage(shared).free < free:
        free = shutil.disk_usage(shared).free
        where = f"{shared}, through which workers share memory,"
    if total > free:
        words = f"needs {total / 2**30:.2f} GiB, and {where} has {free / 2**30:.2f} left"
        raise InputError(f"--cache ram: {words}; take --cache disk, or lower --max_images or --load_scale")


def make_caches(
    kind: str, paths: dict[str, list[Path]], size: tuple[int, int], channels: int, dataset: Path, num_workers: int
) -> dict[str, ImageCache]:
    """Make the caches of --cache (none, ram or disk) by domain; none are no caches.

    size:   of the kept images: height and width
    raises: InputError if memory, or the disk, does not suffice
    """
    if kind == "none":
        return {}
    if kind == "ram":
        total = sum(map(len, paths.values())) * (math.prod(size) * channels + CHECKSUM_BYTES)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1
        check_cache_memory(total * ranks_here, num_workers)
    folder = dataset / ".cache" if kind == "disk" else None
    return {d: ImageCache(found, size, channels, folder, num_workers > 0) for d, found in paths.items()}


# ---------------------------------------------------------------------------------------------
# Batches


class UnpairedDataset(Dataset):
    """Images of two domains, drawn independently; an item is fetched by (epoch, i, index_A, index_B).

    The random choices of image i come from (seed, epoch, i) alone, so that neither the number
    of workers nor an interruption changes them. returns {"A", "B"}: (channels, height, width) in
    [-1, 1], and "bad": the files that could not be read and were replaced by the next that can.
    """

    def __init__(
        self,
        paths: dict[str, list[Path]],
        size: tuple[int, int],
        channels: int = 3,
        load_scale: float = 1.12,
        flip: bool = True,
        seed: int = 0,
    ):
        self.paths = paths
        self.size = size
        self.load_size = (round(size[0] * load_scale), round(size[1] * load_scale))
        self.channels = channels
        self.flip = flip
        self.seed = seed
        self.caches: dict[str, ImageCache] = {}  # by domain; filled as images are read

    def __getitem__(self, key: tuple[int, int, int, int]) -> dict:
        epoch, i, *indices = key
        item = {"bad": []}
        for domain, index in zip("AB", indices, strict=True):
            image = self._read(domain, index, item["bad"])
            item[domain] = self._vary(image, random.Random(f"{self.seed}-{epoch}-{i}-{domain}"))
        return item

    def _read(self, domain: str, index: int, bad: list) -> Image.Image:
        """The image of an index, else the next that can be read, at load_size; unreadable ones go into `bad`."""
        paths = self.paths[domain]
        cache = self.caches.get(domain)
        for i in (*range(index, len(paths)), *range(index)):
            kept = cache.get(i) if cache else None
            if kept is not None:
                return kept
            try:
                image = images.resize_image(
                    images.read_image(paths[i], self.channels), (self.load_size[1], self.load_size[0])
                )
            except images.UnreadableImage as error:
                bad.append((domain, paths[i], str(error)))
                continue
            if cache:
                cache.put(i, image)
            return image
        blank = (self.load_size[1], self.load_size[0])  # never learnt from: `bad` ends the run
        return Image.new("RGB" if self.channels == 3 else "L", blank)

    def _vary(self, image: Image.Image, rng: random.Random) -> Tensor:
        """Crop at random, and mirror half of the images."""
        height, width = self.size
        top = rng.randint(0, self.load_size[0] - height)
        left = rng.randint(0, self.load_size[1] - width)
        image = image.crop((left, top, left + width, top + height))
        if self.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return images.image_to_tensor(image)


class EpochSampler:
    """The order of the images: full batches of (epoch, i, index_A, index_B), from any step of any epoch.

    An epoch lasts until the larger domain was seen, or `steps`; the smaller one starts again.
    Set `epoch` and `first_step` before each pass: they are read in the main process, where
    persistent workers cannot freeze them. `rank_slice` is the part of each batch that is handed
    out: a rank's own.
    """

    def __init__(
        self,
        counts: tuple[int, int],
        batch_size: int,
        steps: int | None = None,
        seed: int = 0,
        rank_slice: slice = slice(None),
    ):
        self.counts = counts
        self.batch_size = batch_size
        self.steps = steps or math.ceil(max(counts) / batch_size)
        self.seed = seed
        self.rank_slice = rank_slice
        self.epoch = 0
        self.first_step = 0

    def _order(self, domain: str, count: int) -> list[int]:
        """Indices for all steps of the epoch: whole shufflings of a domain, one after the other."""
        rng = random.Random(f"{self.seed}-{self.epoch}-{domain}")
        order = []
        while len(order) < self.steps * self.batch_size:
            order += rng.sample(range(count), count)
        return order

    def __iter__(self) -> Iterator[list[tuple[int, int, int, int]]]:
        order_A = self._order("A", self.counts[0])
        order_B = self._order("B", self.counts[1])
        for step in range(self.first_step, self.steps):
            numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
            yield [(self.epoch, i, order_A[i], order_B[i]) for i in numbers[self.rank_slice]]

    def __len__(self) -> int:
        return self.steps - self.first_step


def collate(items: list[dict]) -> dict:
    """Stack the items of a batch: A and B become (N, channels, H, W)."""
    batch = {domain: torch.stack([item[domain] for item in items]) for domain in "AB"}
    return batch | {"bad": [bad for item in items for bad in item["bad"]]}


def start_worker(worker: int, pixels: float) -> None:
    """Leave signals to the main process, which saves first and then ends its workers; keep its limit of pixels."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    images.limit_pixels(pixels)


def make_loader(dataset: UnpairedDataset, sampler: EpochSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """Make a loader that reads in the order of `sampler`."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(start_worker, pixels=images.max_pixels),
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # else each pass takes a number from the global one, and a resumed run differs
    )


@dataclass
class Feed:
    """Where batches come from."""

    loader: Any  # a DataLoader; None when its workers have been sent home
    order: EpochSampler
    bad: dict[str, images.BadImages]  # by domain
    counts: dict[str, int]  # readable images by domain
    held_out: dict[str, Path] = field(default_factory=dict)  # folders to evaluate on, by domain

    def batches(self, epoch: int, first_step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from a step on: real_A and real_B, on the device; unreadable files are named."""
        self.order.epoch = epoch
        self.order.first_step = first_step
        for batch in self.loader:
            for domain, path, reason in batch["bad"]:
                self.bad[domain].note(path, reason)
            yield batch["A"].to(device, non_blocking=True), batch["B"].to(device, non_blocking=True)

    def paths_of_step(self, step: int) -> list[str]:
        """The files of this rank's part of a batch, by its place in the epoch under way, for a message."""
        self.order.first_step = step
        paths = {"A": [], "B": []}
        for _, _, index_A, index_B in next(iter(self.order)):
            paths["A"].append(str(self.loader.dataset.paths["A"][index_A]))
            paths["B"].append(str(self.loader.dataset.paths["B"][index_B]))
        return paths["A"] + paths["B"]
