"""Unpaired pictures: folders → batches; and the makers and checkers of such folders.

python datasets.py draw day2night --size 64
python datasets.py download horse2zebra
python datasets.py split --A faces --B caricatures --dataset_name face2caricature
python datasets.py check face2caricature --sheet
"""

import difflib
import functools
import hashlib
import http.client
import math
import os
import random
import re
import shutil
import signal
import sys
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils import (
    InputError,
    Parser,
    RunError,
    add_pixel_flag,
    draw_grid,
    folder_name,
    free_memory,
    number,
    one_line,
    path_name,
    picture_to_tensor,
    save_picture,
    say,
    stage,
    whole,
    world,
)

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no EPS: Pillow hands it to Ghostscript
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
BAD_SHARE = 0.05  # of a domain's pictures may be unreadable; above this the run stops
DEMO = "day2night"
max_pixels = 178e6  # of one picture; set by limit_pixels


# ---------------------------------------------------------------------------------------------
# Reading pictures


class UnreadablePicture(Exception):
    """Raised for a file that is no whole picture, whatever is wrong with it."""


def natural_key(path: Path) -> list:
    """Sort key under which 2.png comes before 10.png."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", str(path))]


def list_pictures(folder: Path) -> list[Path]:
    """All pictures below a folder, by their suffix, in natural order; hidden files are left out.

    A sub-folder that cannot be read, and a link that leads nowhere or in a circle, are listed too:
    who reads them names them as unreadable pictures.
    raises: OSError if the folder itself cannot be read
    """
    found = []

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        found.append(Path(error.filename))

    for parent, folders, names in os.walk(folder, onerror=unreadable if folder.is_dir() else None):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        paths = (path for path in paths if path.suffix.lower() in SUFFIXES)
        found += [path for path in paths if path.is_file() or (path.is_symlink() and not path.exists())]
    return sorted(found, key=natural_key)


def limit_pixels(pixels: float) -> None:
    """Set above how many pixels this process calls a picture unreadable, in place of Pillow's limit of 179 million."""
    global max_pixels
    max_pixels, Image.MAX_IMAGE_PIXELS = pixels, None  # Pillow's would also stop crops, and warn at half of it


def to_8_bit(picture: Image.Image) -> Image.Image:
    """Bring 16-bit, 32-bit and float greys to 8 bits; others pass through."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture).astype(np.float64)
    if picture.mode == "F":
        values = values * 255 if np.nanmax(values, initial=0) <= 1 else values  # floats come as [0, 1] or [0, 255]
    else:
        values = values / 257  # 16 bits: 65535 → 255
    return Image.fromarray(np.nan_to_num(values).clip(0, 255).round().astype(np.uint8))


def open_picture(path: Path) -> Image.Image:
    """Open a picture; only its header is read.

    raises: UnreadablePicture, also for headers that claim more pixels than max_pixels
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's advice on odd tags and large pictures
            picture = Image.open(path, formats=FORMATS)
    except Exception as error:  # Pillow's plug-ins raise a dozen kinds on hostile files
        raise UnreadablePicture(f"{type(error).__name__}: {error}") from error
    if picture.width * picture.height > max_pixels:
        picture.close()
        raise UnreadablePicture(f"{picture.width}x{picture.height} px; if it is no bomb, raise --max_megapixels")
    return picture


def read_picture(path: Path, channels: int = 3) -> Image.Image:
    """Read any picture as RGB (channels 3) or L (1): turned as its camera was held, transparency over white.

    raises: UnreadablePicture, whatever is wrong with the file
    """
    with open_picture(path) as picture:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                picture.load()
                picture = to_8_bit(ImageOps.exif_transpose(picture))
            if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB" if channels == 3 else "L")
        except Exception as error:
            raise UnreadablePicture(f"{type(error).__name__}: {error}") from error


def resize_picture(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (width, height), unless it has that size."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def load_pictures(
    folder: Path, paths: Sequence[Path], size: tuple[int, int] | None, channels: int, on_bad: str
) -> Iterator[tuple[Path, Tensor]]:
    """Read pictures as load_picture does, one by one, with their paths; unreadable ones are named and left out.

    folder: what the paths belong to, for the message
    on_bad: "skip" or "stop" at the first unreadable one
    raises: InputError if too many, or all, cannot be read
    """
    bad = BadPictures(folder, len(paths), on_bad)
    for path in paths:
        try:
            yield path, load_picture(path, size, channels)
        except UnreadablePicture as error:
            bad.note(path, error)
    if len(bad.found) == len(paths):
        raise InputError(
            f"{folder}: none of its {len(paths)} pictures can be read; expected pictures such as PNG or JPEG"
        )


def load_picture(path: Path, size: tuple[int, int] | None, channels: int = 3) -> Tensor:
    """Read a picture as (channels, H, W) in [-1, 1]; size is (height, width), None keeps its own."""
    picture = read_picture(path, channels)
    return picture_to_tensor(resize_picture(picture, size[::-1]) if size else picture)


# ---------------------------------------------------------------------------------------------
# Folders of a data set


def find_dataset(data_root: Path, dataset_name: str) -> Path:
    """Return the folder of a data set, or say which one may have been meant."""
    folder = data_root / dataset_name
    if folder.is_dir():
        return folder
    others = sorted(p.name for p in data_root.iterdir() if p.is_dir()) if data_root.is_dir() else []
    near = difflib.get_close_matches(dataset_name, others, 1, cutoff=0)
    hint = f"nearest existing: {near[0]}" if near else f"{data_root} holds no data set"
    raise InputError(
        f"{folder}: no such data set; {hint}; make one with: python datasets.py split --A DIR --B DIR "
        f"--dataset_name {dataset_name}, or try --dataset_name {DEMO}"
    )


def split_pictures(folder: Path, split: str, max_images: int | None = None) -> list[Path]:
    """List the pictures of one part of a data set, such as trainA.

    raises: InputError if the folder is missing, or holds nothing that looks like a picture
    """
    if not (folder / split).is_dir():
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folder"
        raise InputError(
            f"{folder}: no {split}/ inside (found: {found}); rename them, or make the layout with: "
            "python datasets.py split --A DIR --B DIR --dataset_name NAME"
        )
    pictures = list_pictures(folder / split)
    if not pictures:
        kinds = " ".join(sorted(SUFFIXES))
        raise InputError(f"{folder / split}: no picture inside; expected files that end in {kinds}")
    return pictures[:max_images]


def named_pictures(
    folder: Path, size: tuple[int, int], channels: int, on_bad: str = "skip", most: int | None = None
) -> dict[Path, Tensor]:
    """Read a folder's pictures, or at most so many evenly spread ones, by the name without suffix that pairs share.

    returns: (1, channels, H, W) in [-1, 1] by name; size is (height, width)
    raises:  InputError as split_pictures and load_pictures do
    """
    paths = split_pictures(folder.parent, folder.name)
    paths = paths[:: math.ceil(len(paths) / most)] if most else paths
    pictures = load_pictures(folder, paths, size, channels, on_bad)
    return {path.relative_to(folder).with_suffix(""): picture[None] for path, picture in pictures}


def held_out_split(folder: Path) -> str:
    """Name the part that training may look at but not learn from: test, else val, else train itself."""
    for split in ("test", "val"):
        if all(list_pictures(folder / f"{split}{domain}") for domain in "AB"):
            return split
    return "train"


class BadPictures:
    """Names each unreadable picture of a domain once, and ends the run when they are too many, or at the first."""

    def __init__(self, folder: Path, total: int, on_bad: str = "skip"):
        self.folder, self.total, self.on_bad, self.found = folder, total, on_bad, set()

    def note(self, path: Path, reason: object) -> None:
        """Take down one unreadable picture.

        raises: InputError when more than BAD_SHARE of the domain (and more than one) are unreadable; with "stop" always
        """
        if path in self.found:
            return
        self.found.add(path)
        if self.on_bad == "stop":
            raise InputError(f"{path}: unreadable ({reason}); mend or remove it, or take --on_bad_image skip")
        say(f"skipped, unreadable ({len(self.found)} of {self.total}): {path} ({reason})", file=sys.stderr)
        if len(self.found) > max(1, BAD_SHARE * self.total) or len(self.found) == self.total > 1:
            raise InputError(
                f"{self.folder}: {len(self.found)} or more of {self.total} pictures are unreadable, "
                f"more than {BAD_SHARE:.0%}; list them with: python datasets.py check {self.folder.parent.name}"
            )

    def readable(self, paths: Sequence[Path]) -> list[Path]:
        """Return the paths whose header can be read, and take down the others.

        raises: InputError if none is left
        """
        kept = []
        for path in paths:
            try:
                open_picture(path).close()
                kept.append(path)
            except UnreadablePicture as error:
                self.note(path, error)
        if not kept:
            raise InputError(
                f"{self.folder}: none of its {self.total} pictures can be read; expected pictures such as PNG or JPEG"
            )
        return kept


# ---------------------------------------------------------------------------------------------
# Batches


class PictureCache:
    """Pictures of one size, decoded and resized once: bytes in memory that the workers share, or in a file.

    A picture counts as there when its checksum says so: half-written ones, and two runs that fill
    one file at a time, do no harm. The file's name follows from the pictures' names, sizes and
    times, so that a changed data set gets a new one.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], channels: int, folder: Path | None, shared: bool):
        """folder: of the file; None keeps the pictures in memory, `shared` with worker processes."""
        length = math.prod(size) * channels
        total = len(paths) * (length + 8)
        if folder:
            facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
            name = hashlib.sha256(repr([size, channels, facts]).encode()).hexdigest()[:20]
            values = torch.from_file(str(reserve(folder / f"{name}.uint8", total)), True, total, dtype=torch.uint8)
        else:
            values = torch.zeros(total, dtype=torch.uint8)
            values = values.share_memory_() if shared else values
        self.sums = values[: 8 * len(paths)].view(torch.int64)  # a picture's CRC32 + 1; 0 where there is none
        self.pixels = values[8 * len(paths) :].view(len(paths), *size, channels)

    def get(self, i: int) -> Image.Image | None:
        """The picture at a place, if it is there, whole."""
        expected = self.sums[i].item()
        pixels = self.pixels[i].numpy() if expected else None
        if pixels is None or zlib.crc32(pixels) + 1 != expected:
            return None
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)  # copies

    def put(self, i: int, picture: Image.Image) -> None:
        """Keep a picture of the cache's size."""
        pixels = np.array(picture).reshape(self.pixels.shape[1:])
        self.pixels[i] = torch.from_numpy(pixels)
        self.sums[i] = zlib.crc32(pixels) + 1


def reserve(path: Path, size: int) -> Path:
    """Make sure that a file of `size` bytes exists and has its place on the disk, new parts zero; returns its path.

    raises: InputError if the disk has less left (writing to it through memory would end in a bus error)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        wanted, free = size - file.tell(), shutil.disk_usage(path.parent).free
        if wanted > free:
            words = f"needs {wanted / 2**30:.1f} GiB in {path.parent}, which has {free / 2**30:.1f} left"
            raise InputError(f"--cache disk: {words}; lower --max_images, or leave it out")
        if wanted > 0 and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif wanted > 0:
            file.truncate(size)
    return path


def make_caches(
    kind: str, paths: dict[str, list[Path]], size: tuple[int, int], channels: int, dataset: Path, num_workers: int
) -> dict[str, PictureCache]:
    """Make the caches of --cache, by domain: none, ram, or disk.

    size:   of the kept pictures: height and width
    raises: InputError if memory does not suffice
    """
    total = sum(map(len, paths.values())) * (math.prod(size) * channels + 8)
    total *= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world() > 1 else 1  # of the ranks on this machine
    free, where = free_memory(), "memory"
    if num_workers and Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free < free:
        free, where = shutil.disk_usage("/dev/shm").free, "/dev/shm, through which workers share memory,"
    if kind == "ram" and total > free:
        words = f"needs {total / 2**30:.2f} GiB, and {where} has {free / 2**30:.2f} left"
        raise InputError(f"--cache ram: {words}; take --cache disk, or lower --max_images or --load_scale")
    folder = dataset / ".cache" if kind == "disk" else None
    return {d: PictureCache(found, size, channels, folder, num_workers > 0) for d, found in paths.items()}


class UnpairedDataset(Dataset):
    """Pictures of two domains, drawn independently; an item is asked for by (epoch, i, index_A, index_B).

    The random choices of picture i come from (seed, epoch, i) alone, so that neither the number
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
        self.paths, self.size, self.channels, self.flip, self.seed = (paths, size, channels, flip, seed)
        self.load_size = tuple(round(side * load_scale) for side in size)
        self.caches: dict[str, PictureCache] = {}  # by domain; filled as pictures are read

    def __getitem__(self, key: tuple[int, int, int, int]) -> dict:
        epoch, i, *indices = key
        item = {"bad": []}
        for domain, index in zip("AB", indices, strict=True):
            picture = self._read(domain, index, item["bad"])
            item[domain] = self._vary(picture, random.Random(f"{self.seed}-{epoch}-{i}-{domain}"))
        return item

    def _read(self, domain: str, index: int, bad: list) -> Image.Image:
        paths, cache = self.paths[domain], self.caches.get(domain)
        for place in (*range(index, len(paths)), *range(index)):
            picture = cache.get(place) if cache else None
            if picture:
                return picture
            try:
                picture = resize_picture(read_picture(paths[place], self.channels), self.load_size[::-1])
            except UnreadablePicture as error:
                bad.append((domain, paths[place], str(error)))
                continue
            if cache:
                cache.put(place, picture)
            return picture
        blank = self.load_size[::-1]  # never learnt from: `bad` ends the run
        return Image.new("RGB" if self.channels == 3 else "L", blank)

    def _vary(self, picture: Image.Image, rng: random.Random) -> Tensor:
        (height, width), (load_height, load_width) = self.size, self.load_size
        top, left = rng.randint(0, load_height - height), rng.randint(0, load_width - width)
        picture = picture.crop((left, top, left + width, top + height))
        if self.flip and rng.random() < 0.5:
            picture = ImageOps.mirror(picture)
        return picture_to_tensor(picture)


class EpochSampler:
    """The order of the pictures: full batches of (epoch, i, index_A, index_B), from any step of any epoch.

    An epoch lasts until the larger domain was seen, or `steps`; the smaller one starts again.
    Set `epoch` and `first_step` before each pass: they are read in the main process, where
    persistent workers cannot freeze them. `share` is the part of each batch that is handed out:
    a rank's own.
    """

    def __init__(
        self,
        counts: tuple[int, int],
        batch_size: int,
        steps: int | None = None,
        seed: int = 0,
        share: slice = slice(None),
    ):
        self.counts, self.batch_size, self.seed, self.share = counts, batch_size, seed, share
        self.steps = steps or math.ceil(max(counts) / batch_size)
        self.epoch, self.first_step = 0, 0

    def _order(self, domain: str, count: int) -> list[int]:
        rng, order = random.Random(f"{self.seed}-{self.epoch}-{domain}"), []
        while len(order) < self.steps * self.batch_size:
            order += rng.sample(range(count), count)
        return order

    def __iter__(self) -> Iterator[list[tuple[int, int, int, int]]]:
        order_A, order_B = (self._order(domain, count) for domain, count in zip("AB", self.counts, strict=True))
        for step in range(self.first_step, self.steps):
            pictures = range(step * self.batch_size, (step + 1) * self.batch_size)
            yield [(self.epoch, i, order_A[i], order_B[i]) for i in pictures[self.share]]

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
    limit_pixels(pixels)


def make_loader(dataset: UnpairedDataset, sampler: EpochSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """Make a loader that reads in the order of `sampler`."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(start_worker, pixels=max_pixels),
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # else each pass takes a number from the global one, and a resumed run differs
    )


# ---------------------------------------------------------------------------------------------
# The demo set: the same landscape by day (A) and by night (B), drawn from a seed

SKY = {"day": ((80, 145, 230), (205, 228, 250)), "night": ((14, 18, 66), (86, 70, 130))}
LAMP, GLASS, ROOF, TRUNK, LEAVES = ((255, 224, 120), (74, 92, 116), (128, 52, 44), (94, 62, 40), (34, 104, 54))
HAZE, DARK, SUN, MOON, STAR = ((150, 160, 180), (16, 20, 78), (255, 214, 60), (236, 238, 225), (255, 255, 240))
WALLS = [(205, 120, 88), (226, 204, 160), (164, 164, 190), (196, 92, 84), (240, 236, 226)]
GROUNDS = [(70, 140, 66), (150, 160, 70), (190, 150, 90), (225, 230, 235)]
DEMO_FOLDERS = {
    "trainA": ("day", 0, 400),
    "trainB": ("night", 100_000, 400),
    "testA": ("day", 200_000, 40),
    "testB": ("night", 200_000, 40),
}


def mix(a: tuple, b: tuple, share: float) -> tuple[int, ...]:
    """Blend two colours; share 0 gives a, 1 gives b."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def draw_scene(seed: int, time: str, size: int = 64) -> Image.Image:
    """Draw one landscape as an RGB picture of (size, size) px; time is "day" or "night".

    Everything at night follows from the day: the moon stands where the sun stood, walls and hills
    are dimmed by one rule, windows are lit, and the stars never change. So a test pair is an
    honest truth for an unpaired model. Drawn at three times the size, then reduced.
    """
    r, s, night = random.Random(seed), 3 * size, time == "night"

    def lit(colour: tuple) -> tuple:
        return mix(colour, DARK, 0.55) if night else colour

    picture = Image.new("RGB", (s, s))
    draw = ImageDraw.Draw(picture)

    def disc(x: float, y: float, radius: float, colour: tuple) -> None:
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)

    horizon = s * r.uniform(0.35, 0.68)
    for y in range(s):
        draw.line([(0, y), (s, y)], fill=mix(*SKY[time], min(1, y / horizon)))
    for i in range(9 if night else 0):
        disc(random.Random(i).random() * s, random.Random(1000 + i).random() * 0.3 * s, s / 90, STAR)
    disc(s * r.uniform(0.12, 0.88), s * r.uniform(0.1, 0.28), s * r.uniform(0.06, 0.11), MOON if night else SUN)

    ground = r.choice(GROUNDS)
    for layer, haze in enumerate((0.45, 0.0)):
        base, phases = horizon + layer * s * 0.09, [r.uniform(0, 6.28) for _ in range(3)]
        ridge = []
        for x in range(0, s + 3, 3):
            ridge.append((x, base - s * 0.045 * sum(math.sin(x / s * (3 + 2 * i) + p) for i, p in enumerate(phases))))
        draw.polygon([*ridge, (s, s), (0, s)], fill=lit(mix(ground, HAZE, haze)))
    for _ in range(r.randint(1, 3)):
        x, y, w = s * r.uniform(0.03, 0.72), s * r.uniform(0.66, 0.92), s * r.uniform(0.17, 0.3)
        h, wall = w * r.uniform(0.7, 1.2), r.choice(WALLS)
        draw.rectangle([x, y - h, x + w, y], fill=lit(wall))
        draw.polygon([(x - w * 0.1, y - h), (x + w / 2, y - h * 1.6), (x + w * 1.1, y - h)], fill=lit(ROOF))
        for left in (0.16, 0.58):
            window = [x + w * left, y - h * 0.72, x + w * (left + 0.26), y - h * 0.32]
            draw.rectangle(window, fill=LAMP if night else GLASS)
    for _ in range(r.randint(1, 4)):
        x, y, w = s * r.uniform(0, 1), s * r.uniform(0.72, 0.98), s * r.uniform(0.1, 0.2)
        draw.rectangle([x - w * 0.08, y - w * 0.4, x + w * 0.08, y], fill=lit(TRUNK))
        draw.polygon([(x - w * 0.42, y - w * 0.3), (x, y - w * 1.6), (x + w * 0.42, y - w * 0.3)], fill=lit(LEAVES))
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def new_dataset(data_root: Path, dataset_name: str) -> tuple[Path, Path]:
    """Return the folder of a data set to be made, and an empty one to fill first and rename at the end.

    raises: InputError if the data set exists
    """
    folder, unfinished = data_root / dataset_name, data_root / f".{os.getpid()}.{dataset_name}"
    if folder.exists():
        raise InputError(f"{folder}: exists already; choose another name, or remove it first")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process with our number
    unfinished.mkdir(parents=True)
    return folder, unfinished


def draw_dataset(data_root: Path, size: int = 64) -> Path:
    """Draw day2night: 400 + 400 training pictures, 40 test pairs."""
    folder, unfinished = new_dataset(data_root, DEMO)
    try:
        for name, (time, first, count) in DEMO_FOLDERS.items():
            (unfinished / name).mkdir()
            for i in tqdm(range(count), desc=f"drawing {DEMO}/{name}", leave=False):
                draw_scene(first + i, time, size).save(unfinished / name / f"{i:04d}.png")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    say(f"drew {folder} at {size}x{size} px: A = landscapes by day, B = by night")
    return folder


# ---------------------------------------------------------------------------------------------
# Downloading

ADDRESS = "http://efrosgans.eecs.berkeley.edu/cyclegan/datasets"  # of the authors; a mirror is given with --url
OFFICIAL = (
    *("ae_photos", "apple2orange", "cezanne2photo", "facades", "horse2zebra", "iphone2dslr_flower", "maps"),
    *("monet2photo", "summer2winter_yosemite", "ukiyoe2photo", "vangogh2photo"),
)
MOST_BYTES = 30 * 2**30  # unpacked; the largest official set has 3 GiB
WAIT = 30  # seconds without a byte
FOLDERS = {f"{part}{domain}" for part in ("train", "val", "test") for domain in "AB"}


def fetch(url: str, part: Path) -> None:
    """Download a file, going on where an earlier attempt broke off.

    raises: InputError if there is no such file, or no connection; RunError if it breaks off (run it again)
    """
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            if done and answer.status != 206:  # the server starts again, so do we
                done = 0
            total = done + int(answer.headers.get("Content-Length") or 0)
            if shutil.disk_usage(part.parent).free < total - done:
                raise RunError(
                    f"{part.parent}: {total / 1e6:,.0f} MB do not fit on the disk; make room and run it again"
                )
            bar = tqdm(total=total or None, initial=done, unit="B", unit_scale=True, desc=part.stem.lstrip("."))
            with part.open("ab" if done else "wb") as file, bar:
                while block := answer.read(2**16):
                    file.write(block)
                    bar.update(len(block))
            done = part.stat().st_size
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send
            return
        raise InputError(
            f"{url}: the server answers {error.code} {error.reason}; check the name, or give a mirror: --url"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason, kept = getattr(error, "reason", None) or error, part.stat().st_size if part.exists() else 0
        if kept:
            raise RunError(f"{url}: broke off after {kept / 1e6:.1f} MB ({reason}); run it again to go on") from error
        raise InputError(
            f"{url}: cannot be reached ({reason}); check the connection, give a mirror with --url, "
            f"or start with what needs none: python datasets.py draw {DEMO}"
        ) from error
    if done < total:
        raise RunError(f"{url}: broke off after {done / 1e6:.1f} of {total / 1e6:.1f} MB; run it again to go on")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the pictures of trainA, trainB, testA, … from a zip into `folder`, whatever lies around them.

    raises: InputError if it is damaged, wants to write elsewhere, or is far larger than any data set
    """
    with zipfile.ZipFile(archive) as file:
        entries = [entry for entry in file.infolist() if not entry.is_dir()]
        names = {entry: PurePosixPath(entry.filename.replace("\\", "/")) for entry in entries}
        strange = [
            e for e, name in names.items() if name.is_absolute() or ".." in name.parts or e.external_attr >> 28 == 0xA
        ]
        if strange:
            raise InputError(
                f"{archive}: wants to write outside its folder ({one_line(strange[0].filename)[:80]}); not unpacked"
            )
        size = sum(entry.file_size for entry in entries)
        if size > min(MOST_BYTES, shutil.disk_usage(folder).free):
            raise InputError(f"{archive}: claims {size / 2**30:.1f} GiB of pictures, more than fit; not unpacked")
        for entry, name in tqdm(names.items(), desc="unpacking", leave=False):
            place = next((i for i, part in enumerate(name.parts[:-1]) if part in FOLDERS), None)
            if place is None or name.suffix.lower() not in SUFFIXES or name.name.startswith("."):
                continue
            target = folder.joinpath(*name.parts[place:])
            target.parent.mkdir(parents=True, exist_ok=True)
            with file.open(entry) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def download_dataset(args: Namespace) -> None:
    """Fetch one of the official sets, or any zip with their layout, and check what came."""
    url = args.url or f"{ADDRESS}/{args.dataset_name}.zip"
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise InputError(f"--url {url}: expected an address that begins with http:// or https://")
    if not args.url and args.dataset_name not in OFFICIAL:
        raise InputError(
            f"{args.dataset_name}: no official set; expected one of {', '.join(OFFICIAL)}, or a zip elsewhere: --url"
        )
    part = args.data_root / f".{args.dataset_name}.zip.part"
    folder, unfinished = new_dataset(args.data_root, args.dataset_name)
    try:
        say(f"fetching {url}")
        fetch(url, part)
        try:
            unpack(part, unfinished)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            part.unlink()
            raise InputError(
                f"{url}: sent no whole zip ({one_line(error)[:80]}); deleted; try again, or another --url"
            ) from error
        except InputError:
            part.unlink()
            raise
        counts = {
            name: len(list_pictures(unfinished / name)) for name in sorted(FOLDERS) if (unfinished / name).is_dir()
        }
        if not (counts.get("trainA") and counts.get("trainB")):
            part.unlink()
            raise InputError(f"{url}: holds no trainA and trainB with pictures (found: {counts or 'none'}); deleted")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    part.unlink()
    say(f"{folder}: {', '.join(f'{count} pictures in {name}' for name, count in counts.items())}")


# ---------------------------------------------------------------------------------------------
# Sub-commands


def split_dataset(args: Namespace) -> None:
    """Make the layout of a data set from two plain folders, by copying."""
    pictures, one, other = {}, args.A.resolve(), args.B.resolve()
    if one == other:
        raise InputError(f"--A and --B are the same folder ({args.A}); expected one per domain")
    if one in other.parents or other in one.parents:
        raise InputError(f"--A {args.A} and --B {args.B}: one lies inside the other; expected two folders apart")
    for domain, source in (("A", args.A), ("B", args.B)):
        if not source.is_dir():
            raise InputError(f"--{domain} {source}: no such folder; expected a folder with pictures")
        paths = list_pictures(source)
        if not paths:
            raise InputError(
                f"--{domain} {source}: no picture inside; expected files that end in {' '.join(sorted(SUFFIXES))}"
            )
        random.Random(f"{args.seed}-{domain}").shuffle(paths)
        paths = BadPictures(source, len(paths)).readable(paths)[: args.max_images]
        if len(paths) < 2:
            raise InputError(
                f"--{domain} {source}: {len(paths)} readable picture, expected at least 2: one to train, one to test"
            )
        pictures[domain] = source, paths
    folder, unfinished = new_dataset(args.data_root, args.dataset_name)
    try:
        for domain, (source, paths) in pictures.items():
            tests = min(len(paths) - 1, math.ceil(len(paths) * args.test_fraction))
            for part, chosen in (("test", paths[:tests]), ("train", paths[tests:])):
                (unfinished / f"{part}{domain}").mkdir()
                for path in tqdm(chosen, desc=f"{part}{domain}", leave=False):
                    copy = unfinished / f"{part}{domain}" / path.relative_to(source)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
            say(f"{folder}: {len(paths) - tests} pictures in train{domain}, {tests} in test{domain}")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_split(split: Path, sheet: Path | None) -> tuple[dict[Path, str], str]:
    """Read every picture of one part whole and print what it holds.

    returns: a hash of the pixels by path, and what makes the part unusable, or ""
    """
    paths, sizes, hashes, faults = list_pictures(split), Counter(), {}, 0
    for path in tqdm(paths, desc=split.name, leave=False):
        try:
            picture = read_picture(path)
        except UnreadablePicture as error:
            faults += 1
            say(f"  unreadable: {path} ({error})")
            continue
        sizes[picture.size] += 1
        hashes[path] = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    common = ", ".join(f"{count} of {w}x{h}" for (w, h), count in sizes.most_common(3))
    common += f", {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
    say(f"{split.name}: {len(paths)} pictures, {faults} unreadable; {common or 'nothing readable'} px")
    if sheet and hashes:
        chosen = list(hashes)[:: max(1, len(hashes) // 32)][:32]
        cells = torch.stack([load_picture(path, (96, 96)) for path in chosen])
        rows = [(split.name, row) for row in cells.split(8) if len(row) == min(8, len(cells))]
        save_picture(draw_grid(rows), sheet)
        say(f"  {sheet}")
    if not hashes:
        return hashes, f"{split.name} holds no readable picture"
    too_many = faults > max(1, BAD_SHARE * len(paths))
    return (
        hashes,
        f"{faults} of {len(paths)} pictures in {split.name} are unreadable, more than {BAD_SHARE:.0%}" * too_many,
    )


def check_dataset(args: Namespace) -> None:
    """Count, measure and compare the pictures of a data set; exit code 2 if it cannot be trained on."""
    folder, owners, faults = find_dataset(args.data_root, args.dataset_name), defaultdict(list), []
    for domain in "AB":
        split_pictures(folder, f"train{domain}")
    for split in (folder / f"{part}{domain}" for domain in "AB" for part in ("train", "val", "test")):
        if split.is_dir():
            sheet = Path("generated_images") / args.dataset_name / "check" / f"{split.name}.png"
            hashes, fault = check_split(split, sheet if args.sheet else None)
            faults += [fault] if fault and split.name.startswith("train") else []
            for path, pixels in hashes.items():
                owners[pixels].append(path.relative_to(folder))
    twins = [paths for paths in owners.values() if len(paths) > 1]
    leaks = [paths for paths in twins if len({path.parts[0] for path in paths}) > 1]
    for paths in leaks[:10]:
        say(f"  the same picture: {' = '.join(map(str, paths))}")
    say(
        f"{len(leaks)} pictures stand in more than one part (leaks into the test), {len(twins) - len(leaks)} twice in one part"
    )
    if faults:
        raise InputError(f"{folder}: unusable: {'; '.join(faults)}")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line of the sub-commands."""
    parser = Parser(prog="datasets.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="draw, download, split, check")
    draw = commands.add_parser("draw", help="draw the demo set")
    draw.add_argument("dataset_name", choices=[DEMO])
    draw.add_argument("--size", type=whole(16, 4096), default=64, help="side of the pictures, px (default: 64)")
    download = commands.add_parser("download", help="fetch one of the sets of the paper, or a zip with their layout")
    download.add_argument("dataset_name", type=folder_name, help=", ".join(OFFICIAL))
    download.add_argument("--url", help="address of a zip, in place of the authors'")
    split = commands.add_parser("split", help="make a data set from two folders of pictures")
    split.add_argument("--A", type=path_name, required=True, metavar="DIR", help="pictures of domain A")
    split.add_argument("--B", type=path_name, required=True, metavar="DIR", help="pictures of domain B")
    split.add_argument("--dataset_name", type=folder_name, required=True, help="name of the new data set")
    split.add_argument(
        "--test_fraction", type=number(0, 0.9), default=0.1, help="share kept for testing (default: 0.1)"
    )
    split.add_argument(
        "--max_images", type=whole(2), default=None, help="take at most so many of each domain (default: all)"
    )
    split.add_argument("--seed", type=whole(0), default=0, help="which pictures are taken (default: 0)")
    check = commands.add_parser("check", help="count, measure and compare the pictures of a data set")
    check.add_argument("dataset_name", type=folder_name)
    check.add_argument("--sheet", action="store_true", help="also write a contact sheet per part into generated_images")
    for command, run in (
        (draw, lambda args: draw_dataset(args.data_root, args.size)),
        (download, download_dataset),
        (split, split_dataset),
        (check, check_dataset),
    ):
        command.add_argument(
            "--data_root", type=Path, default=Path("datasets"), help="folder of the data sets (default: datasets)"
        )
        command.set_defaults(run=run)
    for command in (split, check):
        add_pixel_flag(command.add_argument)
    return parser.parse_args(argv)


@stage
def main(argv: Sequence[str] | None = None) -> None:
    """Run one sub-command."""
    args = parse_args(argv)
    if "max_megapixels" in args:
        limit_pixels(1e6 * args.max_megapixels)
    args.run(args)


if __name__ == "__main__":
    main()
