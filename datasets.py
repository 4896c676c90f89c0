"""Unpaired images: folders → batches, the same on every machine and from any step of any epoch.

data = load_training_data(DataConfig(), seed=0, device=torch.device("cuda"), held_out={})
for real_A, real_B in data.batches(epoch=0, first_step=0, device=torch.device("cuda")):
    ...  # each (10, 3, 256, 256) in [-1, 1]
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from toolkit import images
from toolkit.devices import default_workers, free_memory
from toolkit.distributed import rank_slice, world_size
from utils import InputError, counted, folder_name, option, say

DEMO = "day2night"  # the data set that prepare.py draws
CHECKSUM_BYTES = 8  # per image in a cache


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
    """Return the folder of data sets that a run was trained on, as its files say; by default "datasets".

    raises: InputError if it no longer exists
    """
    root = Path(recorded if isinstance(recorded, str) else "datasets")
    if root != Path("datasets") and not root.is_dir():
        raise InputError(f"{root}: held the data sets when the run was trained, and is gone; give their --data_root")
    return root


def find_dataset(data_root: Path, dataset_name: str) -> Path:
    """Return the folder of a data set.

    raises: InputError, with the most similar name, if it does not exist
    """
    folder = data_root / dataset_name
    if folder.is_dir():
        return folder
    others = sorted(path.name for path in data_root.iterdir() if path.is_dir()) if data_root.is_dir() else []
    near = difflib.get_close_matches(dataset_name, others, 1, cutoff=0)
    raise InputError(
        f"{folder}: no such data set; nearest existing: {near[0] if near else 'none'}; make one with: "
        f"python prepare.py split --A DIR --B DIR --dataset_name {dataset_name}, or try --dataset_name {DEMO}"
    )


def split_images(folder: Path, split: str, max_images: int | None = None) -> list[Path]:
    """List the images of one split of a data set, such as trainA.

    raises: InputError if the folder is missing or contains no image
    """
    if not (folder / split).is_dir():
        found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "no folder"
        raise InputError(
            f"{folder}: no {split}/ inside (found: {found}); rename the folders, or make the layout with: "
            "python prepare.py split --A DIR --B DIR --dataset_name NAME"
        )
    paths = images.list_images(folder / split)
    if not paths:
        suffixes = " ".join(sorted(images.SUFFIXES))
        raise InputError(f"{folder / split}: no image inside; expected files that end in {suffixes}")
    return paths[:max_images]


def held_out_split(folder: Path) -> str:
    """Name the split to show during training: test, else val, else train itself."""
    for split in ("test", "val"):
        if all(images.list_images(folder / f"{split}{domain}") for domain in "AB"):
            return split
    return "train"


def held_out_folders(folder: Path, paired: bool) -> dict[str, Path]:
    """Find the folders to evaluate on, by domain: of the val split if there is one, else of the test split.

    raises: InputError if one contains no image or, with paired, if they have no image name in common
    """
    split = "val" if any((folder / f"val{domain}").is_dir() for domain in "AB") else "test"
    folders = {domain: folder / f"{split}{domain}" for domain in "AB"}
    names = {}
    for domain, path in folders.items():
        names[domain] = {pair_name(image, path) for image in split_images(folder, path.name)}
    if paired and not names["A"] & names["B"]:
        raise InputError(
            f"--eval_metrics paired: no image in {folders['A']} has the name of one in {folders['B']}; "
            "leave it out for unpaired sets"
        )
    return folders


def pair_name(path: Path, folder: Path) -> Path:
    """Return the name that both images of a pair share: relative to their folder, without the suffix."""
    return path.relative_to(folder).with_suffix("")


def spread(paths: list[Path], most: int | None) -> list[Path]:
    """Keep at most `most` paths, evenly spread; None keeps all."""
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
    """Read the images of a folder, or at most `most` evenly spread ones, by pair_name.

    size:    height and width
    returns: (1, channels, H, W) in [-1, 1] by name
    raises:  InputError as split_images and load_images do
    """
    paths = spread(split_images(folder.parent, folder.name), most)
    return load_named(folder, paths, size, channels, on_bad)


def paired_images(
    folders: dict[str, Path], size: tuple[int, int], channels: int, on_bad: str = "skip", most: int | None = None
) -> dict[str, dict[Path, Tensor]]:
    """Read the images of two domains as named_images does, and keep pairs together.

    The pairs come first, in the same order in both domains, evenly spread and at most `most`.
    The other images of each domain fill the rest, evenly spread.
    """
    paths: dict[str, dict[Path, Path]] = {}  # by domain and name
    for domain, folder in folders.items():
        found = split_images(folder.parent, folder.name)
        paths[domain] = {pair_name(path, folder): path for path in found}
    first, second = paths.values()
    pairs = spread([name for name in first if name in second], most)
    rest = None if most is None else most - len(pairs)
    loaded = {}
    for domain, folder in folders.items():
        unpaired = [name for name in paths[domain] if not (name in first and name in second)]
        names = pairs + spread(unpaired, rest)
        loaded[domain] = load_named(folder, [paths[domain][name] for name in names], size, channels, on_bad)
    return loaded


# ---------------------------------------------------------------------------------------------
# The cache


class ImageCache:
    """Decoded and resized images: bytes in memory that the workers share, or in a file.

    An image counts as cached if its checksum is right, so a half-written image or two runs that fill
    the same file do no harm. The name of the file depends on the names, sizes and times of the images,
    so a changed data set gets a new one.
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
        self.sums = values[:checksums].view(torch.int64)  # CRC32 of the image + 1; 0: not cached
        self.pixels = values[checksums:].view(len(paths), *size, channels)

    def get(self, i: int) -> Image.Image | None:
        """Return the image of a path's index if it is cached."""
        expected = self.sums[i].item()
        if not expected:
            return None
        pixels = self.pixels[i].numpy()
        if zlib.crc32(pixels) + 1 != expected:
            return None
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)  # copies

    def put(self, i: int, image: Image.Image) -> None:
        """Cache an image, which has the size of the cache."""
        pixels: Any = np.array(image).reshape(self.pixels.shape[1:])
        self.pixels[i] = torch.from_numpy(pixels)
        self.sums[i] = zlib.crc32(pixels) + 1


def map_file(path: Path, size: int) -> Tensor:
    """Return a file of `size` bytes, created if missing, as a tensor that all processes share.

    raises: InputError if the disk is too full (writing through memory would end in a bus error), or if the
            file cannot be mapped into memory
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        missing = size - file.tell()
        free = shutil.disk_usage(path.parent).free
        if missing > free:
            raise InputError(
                f"--cache disk: needs {missing / 2**30:.1f} GiB in {path.parent}, which has {free / 2**30:.1f} GiB "
                "left; lower --max_images, or leave --cache out"
            )
        if missing > 0 and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif missing > 0:
            file.truncate(size)
    try:
        return torch.from_file(str(path), True, size, dtype=torch.uint8)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--cache disk: {path} cannot be mapped into memory ({str(error).splitlines()[0]}); "
            "use --cache ram, or another --data_root"
        ) from error


def check_cache_memory(total: int, num_workers: int) -> None:
    """Raise InputError if a cache of `total` bytes does not fit into memory."""
    free = free_memory()
    where = "memory"
    shared = Path("/dev/shm")
    if num_workers and shared.is_dir() and shutil.disk_usage(shared).free < free:
        free = shutil.disk_usage(shared).free
        where = f"{shared}, the memory that workers share,"
    if total > free:
        raise InputError(
            f"--cache ram: needs {total / 2**30:.2f} GiB, and {where} has {free / 2**30:.2f} GiB left; "
            "use --cache disk, or lower --max_images or --load_scale"
        )


def open_caches(kind: str, dataset: "UnpairedDataset", folder: Path, num_workers: int) -> dict[str, ImageCache]:
    """Open the caches of a data set by domain.

    kind:   none, ram or disk (in folder/.cache)
    raises: InputError if there is not enough memory or disk space
    """
    if kind == "none":
        return {}
    size = dataset.load_size
    if kind == "ram":
        total = sum(map(len, dataset.paths.values())) * (math.prod(size) * dataset.channels + CHECKSUM_BYTES)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1
        check_cache_memory(total * ranks_here, num_workers)
    caches = {}
    for domain, paths in dataset.paths.items():
        cache_folder = folder / ".cache" if kind == "disk" else None
        caches[domain] = ImageCache(paths, size, dataset.channels, cache_folder, num_workers > 0)
    return caches


# ---------------------------------------------------------------------------------------------
# Batches


class UnpairedDataset(Dataset):
    """Images of two domains, drawn independently; the key of an item is (epoch, i, index_A, index_B).

    The random choices for image i depend on (seed, epoch, i) alone, so neither the number of workers nor an
    interruption changes them.

    returns: "A" and "B": (channels, height, width) in [-1, 1]; "bad": the unreadable files, each replaced by the
             next readable one
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
            item[domain] = self._augment(image, random.Random(f"{self.seed}-{epoch}-{i}-{domain}"))
        return item

    def _read(self, domain: str, index: int, bad: list) -> Image.Image:
        """Read the image of an index, else the next readable one, at load_size; add unreadable files to `bad`."""
        paths = self.paths[domain]
        for offset in range(len(paths)):
            i = (index + offset) % len(paths)
            try:
                return self._load(domain, i)
            except images.UnreadableImage as error:
                bad.append((domain, paths[i], str(error)))
        return Image.new("RGB" if self.channels == 3 else "L", self.load_size[::-1])  # never seen: `bad` ends the run

    def _load(self, domain: str, i: int) -> Image.Image:
        cache = self.caches.get(domain)
        cached = cache.get(i) if cache else None
        if cached is not None:
            return cached
        image = images.read_image(self.paths[domain][i], self.channels)
        image = images.resize_image(image, self.load_size[::-1])
        if cache:
            cache.put(i, image)
        return image

    def _augment(self, image: Image.Image, rng: random.Random) -> Tensor:
        """Crop at random, and mirror half of the images."""
        from torchvision.transforms.v2 import functional  # here, because its import takes two seconds

        height, width = self.size
        top = rng.randint(0, self.load_size[0] - height)
        left = rng.randint(0, self.load_size[1] - width)
        x = functional.crop(functional.pil_to_tensor(image), top, left, height, width)
        if self.flip and rng.random() < 0.5:
            x = functional.horizontal_flip(x)
        return images.bytes_to_range(x)


class EpochSampler:
    """Batches of keys (epoch, i, index_A, index_B) in random order, from any step of any epoch.

    An epoch is one pass over the larger domain, or `steps`; the smaller domain starts again. Batches are always full.
    Set `epoch` and `first_step` before each pass: they are read in the main process, so persistent workers follow.
    `rank_slice` selects the part of each batch that this rank reads.
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
        """Indices for all steps of the epoch: one shuffled pass over the domain after the other."""
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


def start_worker(worker: int, max_pixels: float) -> None:
    """Ignore signals in a worker: the main process saves first and then ends its workers."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    images.limit_pixels(max_pixels)


def make_loader(dataset: UnpairedDataset, sampler: EpochSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """Make a data loader that reads in the order of `sampler`."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(start_worker, max_pixels=images.max_pixels),
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # else each pass takes a number from the global one, and a resumed run differs
    )


@dataclass
class TrainingData:
    """The images of a training run."""

    loader: Any  # a DataLoader; None after close()
    sampler: EpochSampler
    bad_images: dict[str, images.BadImages]  # by domain
    counts: dict[str, int]  # readable images by domain
    held_out: dict[str, Path]  # folders to evaluate on, by domain

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps

    def batches(self, epoch: int, first_step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield real_A and real_B, (N, channels, H, W) in [-1, 1] on the device, from a step of an epoch on.

        Unreadable files are named. raises: InputError if there are too many
        """
        self.sampler.epoch = epoch
        self.sampler.first_step = first_step
        for batch in self.loader:
            for domain, path, reason in batch["bad"]:
                self.bad_images[domain].note(path, reason)
            yield batch["A"].to(device, non_blocking=True), batch["B"].to(device, non_blocking=True)

    def paths_of_step(self, step: int) -> list[str]:
        """List the files that this rank reads in a step of the current epoch, for a message."""
        self.sampler.first_step = step
        paths = {"A": [], "B": []}
        for _, _, index_A, index_B in next(iter(self.sampler)):
            paths["A"].append(str(self.loader.dataset.paths["A"][index_A]))
            paths["B"].append(str(self.loader.dataset.paths["B"][index_B]))
        return paths["A"] + paths["B"]

    def close(self) -> None:
        """End the workers, which Python would otherwise wait for after an error."""
        self.loader = None


def load_training_data(config: DataConfig, seed: int, device: torch.device, held_out: dict[str, Path]) -> TrainingData:
    """Find the images of a data set, leave out those whose header is unreadable, and make their data loader.

    held_out: folders to evaluate on, by domain
    raises:   InputError if images are missing, too many are unreadable, or the cache does not fit
    """
    folder = find_dataset(config.data_root, config.dataset_name)
    paths = {}
    bad_images = {}
    for domain in "AB":
        found = split_images(folder, f"train{domain}", config.max_images)
        bad_images[domain] = images.BadImages(folder / f"train{domain}", len(found), config.on_bad_image)
        paths[domain] = bad_images[domain].readable(found)
    counts = {domain: len(found) for domain, found in paths.items()}
    sampler = EpochSampler(
        (counts["A"], counts["B"]), config.batch_size, config.steps_per_epoch, seed, rank_slice(config.batch_size)
    )
    dataset = UnpairedDataset(paths, config.size, config.channels, config.load_scale, config.flip, seed)
    workers = default_workers(device) if config.num_workers is None else config.num_workers
    dataset.caches = open_caches(config.cache, dataset, folder, workers)
    loader = make_loader(dataset, sampler, workers, pin_memory=device.type == "cuda")
    say(
        f"{folder}: {counted(counts['A'], 'image')} in trainA, {counts['B']} in trainB; "
        f"{sampler.steps} steps of {config.batch_size} an epoch"
    )
    return TrainingData(loader, sampler, bad_images, counts, held_out)
