"""Image files ↔ tensors, the one pair of range helpers, grids, and the handling of unreadable files.

x = load_image("photo.jpg", (256, 256))  # (3, 256, 256) in [-1, 1]
save_image(tensor_to_image(x), Path("photo.png"))
"""

import base64
import functools
import importlib
import importlib.util
import io
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from torch import Tensor

from toolkit.files import atomic_write
from utils import InputError, counted, say, warn

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no EPS: Pillow hands it to Ghostscript
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"}
PHONE_FORMATS = {".heic": "HEIF", ".heif": "HEIF", ".avif": "AVIF"}
INSTALL = {"HEIF": "pip install pillow-heif", "AVIF": "pip install --upgrade pillow"}  # AVIF: from Pillow 11.3 on
BAD_FRACTION = 0.05  # a run stops if more of a domain's images are unreadable
CELL = 128  # px; grids enlarge smaller images to this side, by a whole factor
LARGEST_CELL = 256  # px; grids and galleries reduce larger images to this side
max_pixels = 178e6  # of one image; set by limit_pixels


# ---------------------------------------------------------------------------------------------
# Ranges: values change their range only in these two pairs of functions


def bytes_to_range(x: Tensor) -> Tensor:
    """Convert uint8 in [0, 255] to float32 in [-1, 1], any shape."""
    return x.float() / 127.5 - 1


def range_to_bytes(x: Tensor) -> Tensor:
    """Clamp to [-1, 1] and round to uint8 in [0, 255], any shape.

    Without the clamp a value of -1.01 would wrap to 255: red, green and white dots in dark areas.
    """
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB or L image to (3 or 1, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3) or (H, W)
    return bytes_to_range(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1))


def tensor_to_image(x: Tensor) -> Image.Image:
    """Convert (3 or 1, H, W) in [-1, 1] to an RGB or L image."""
    pixels = range_to_bytes(x).cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


# ---------------------------------------------------------------------------------------------
# Reading


class UnreadableImage(Exception):
    """Raised for a file that is not a complete image, whatever is wrong with it."""


@functools.cache
def formats() -> tuple[str, ...]:
    """List the formats that can be read here; AVIF and HEIF depend on the installed packages."""
    optional = []
    if "avif" in features.modules and features.check("avif"):  # older versions warn about unknown features
        optional.append("AVIF")
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
        optional.append("HEIF")
    return (*FORMATS, *optional)


def missing_package(path: Path) -> str:
    """Return the command that makes files of this suffix readable; "" if they are."""
    kind = PHONE_FORMATS.get(path.suffix.lower())
    return "" if kind is None or kind in formats() else INSTALL[kind]


@functools.cache
def warn_once(text: str) -> None:
    """Print a warning once, however often a folder is listed."""
    warn(text)


def natural_key(path: Path) -> list:
    """Sort key under which 2.png comes before 10.png."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", str(path))]


def list_images(folder: Path) -> list[Path]:
    """List all images below a folder, by their suffix, in natural order, without hidden files.

    Sub-folders that cannot be read and broken links are listed too, so that they are reported as unreadable images.
    A warning counts the photos whose format needs a missing package.
    raises: OSError if the folder itself cannot be read
    """
    found = []
    skipped = Counter()  # by suffix and command

    def list_unreadable(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        found.append(Path(error.filename))

    for parent, folders, names in os.walk(folder, onerror=list_unreadable if folder.is_dir() else None):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            suffix = path.suffix.lower()
            if name.startswith(".") or suffix not in SUFFIXES:
                continue
            if missing_package(path):
                skipped[suffix, missing_package(path)] += 1
            elif path.is_file() or (path.is_symlink() and not path.exists()):
                found.append(path)
    for (suffix, command), count in sorted(skipped.items()):
        warn_once(f"{folder}: {counted(count, 'file')} skipped ({suffix}): {command}")
    return sorted(found, key=natural_key)


def limit_pixels(pixels: float) -> None:
    """Make this process treat images of more pixels as unreadable, in place of Pillow's limit of 179 million."""
    global max_pixels
    max_pixels = pixels
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would also stop crops, and warn at half of it


def to_8_bit(image: Image.Image) -> Image.Image:
    """Convert 16-bit, 32-bit and float greys to 8 bits; return other images unchanged."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    if image.mode != "F":
        values = values / 257  # 16 bits: 65535 → 255
    elif np.nanmax(values, initial=0) <= 1:
        values = values * 255  # floats are in [0, 1] or in [0, 255]
    return Image.fromarray(np.nan_to_num(values).clip(0, 255).round().astype(np.uint8))


def open_image(path: Path) -> Image.Image:
    """Open an image and read its header.

    raises: UnreadableImage, also for headers that claim more pixels than max_pixels
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about odd tags and large images
            image = Image.open(path, formats=formats())
    except Exception as error:  # Pillow's plug-ins raise a dozen types on hostile files
        command = missing_package(path)
        if command:
            raise UnreadableImage(f"nothing installed reads {path.suffix}: {command}") from error
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    if image.width * image.height > max_pixels:
        image.close()
        raise UnreadableImage(f"{image.width}x{image.height} px; if you trust the file, raise --max_megapixels")
    return image


def read_image(path: Path, channels: int = 3) -> Image.Image:
    """Read any image as RGB (channels 3) or L (1), turned as its EXIF tag says, transparency over white.

    raises: UnreadableImage, whatever is wrong with the file
    """
    with open_image(path) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.load()
                image = to_8_bit(ImageOps.exif_transpose(image))
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB" if channels == 3 else "L")
        except Exception as error:
            raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (width, height), unless it has that size."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def load_image(path: Path | str, size: tuple[int, int] | None, channels: int = 3) -> Tensor:
    """Read an image as (channels, H, W) in [-1, 1].

    size:   height and width; None keeps those of the image
    raises: UnreadableImage
    """
    image = read_image(Path(path), channels)
    return image_to_tensor(resize_image(image, size[::-1]) if size else image)


class BadImages:
    """The unreadable images of a folder: names each once, and ends the run if there are too many."""

    def __init__(self, folder: Path, total: int, on_bad: str = "skip"):
        self.folder = folder
        self.total = total
        self.on_bad = on_bad
        self.found: set[Path] = set()

    def note(self, path: Path, reason: object) -> None:
        """Count and name one unreadable image.

        raises: InputError if all images, or more than BAD_FRACTION of them and more than one, are unreadable;
                with "stop" at the first
        """
        if path in self.found:
            return
        self.found.add(path)
        if self.total == 1:
            raise InputError(f"{path}: cannot be read ({reason}); give another image, such as a PNG or JPEG")
        if self.on_bad == "stop":
            raise InputError(f"{path}: unreadable ({reason}); repair or remove it, or use --on_bad_image skip")
        say(f"skipped, unreadable ({len(self.found)} of {self.total}): {path} ({reason})", file=sys.stderr)
        if len(self.found) > max(1, BAD_FRACTION * self.total) or len(self.found) == self.total > 1:
            raise InputError(
                f"{self.folder}: {len(self.found)} or more of {self.total} images are unreadable, "
                f"more than {BAD_FRACTION:.0%}; repair or remove them"
            )

    def need_one(self) -> None:
        """Raise InputError if no image is left."""
        if len(self.found) == self.total:
            raise InputError(
                f"{self.folder}: none of its {self.total} images can be read; expected images such as PNG or JPEG"
            )

    def readable(self, paths: Sequence[Path]) -> list[Path]:
        """Return the paths whose header can be read, and note the others.

        raises: InputError if none is left
        """
        kept = []
        for path in paths:
            try:
                open_image(path).close()
                kept.append(path)
            except UnreadableImage as error:
                self.note(path, error)
        self.need_one()
        return kept


def load_images(
    folder: Path, paths: Sequence[Path], size: tuple[int, int] | None, channels: int, on_bad: str
) -> Iterator[tuple[Path, Tensor]]:
    """Yield images with their paths, read one by one as load_image does; name and skip unreadable ones.

    folder: the folder of the paths, for messages
    on_bad: "skip", or "stop" at the first unreadable image
    raises: InputError if too many, or all, are unreadable
    """
    bad = BadImages(folder, len(paths), on_bad)
    for path in paths:
        try:
            yield path, load_image(path, size, channels)
        except UnreadableImage as error:
            bad.note(path, error)
    bad.need_one()


class LazyImages(Mapping):
    """Images by path, (1, channels, H, W) in [-1, 1], each read on access: memory holds one at a time."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int] | None, channels: int = 3):
        self.paths = {path: path for path in paths}
        self.size = size
        self.channels = channels

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)

    def __getitem__(self, path: Path) -> Tensor:
        return load_image(self.paths[path], self.size, self.channels)[None]


# ---------------------------------------------------------------------------------------------
# Writing


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")


def data_url(path: Path, most: tuple[int, int]) -> str:
    """Return an image, reduced to at most (width, height), as a data: URL; "" if it cannot be read."""
    try:
        with Image.open(path) as image, io.BytesIO() as data:
            image = image.convert("RGB")
            image.thumbnail(most)
            image.save(data, format="jpeg", quality=88, subsampling=0)
            return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    except Exception:  # noqa: BLE001 (Pillow's plug-ins raise a dozen types on damaged files)
        return ""


def reduce_to_cell(x: Tensor) -> Tensor:
    """Resize (N, C, H, W) to at most LARGEST_CELL px a side."""
    factor = LARGEST_CELL / max(x.shape[-2:])
    if factor >= 1:
        return x
    size = [max(1, round(side * factor)) for side in x.shape[-2:]]
    return F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)


def draw_file_grid(rows: Sequence[tuple[str, Sequence[Path]]]) -> Image.Image:
    """Draw labelled rows of image files, all at the size of the first."""
    size = None
    cells = []
    for label, paths in rows:
        row = []
        for path in paths:
            image = read_image(path)
            if size is None:
                image.thumbnail((LARGEST_CELL, LARGEST_CELL))
                size = image.size
            row.append(image_to_tensor(resize_image(image, size)))
        cells.append((label, torch.stack(row)))
    return draw_grid(cells)


def draw_grid(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Draw labelled rows of images, one column per image; each takes CELL to LARGEST_CELL px.

    rows: pairs of a label and (N, 3 or 1, H, W) in [-1, 1]; N and the size are the same in each row
    """
    from torchvision.utils import make_grid  # here, because its import takes two seconds

    cells = range_to_bytes(torch.cat([reduce_to_cell(x.float().cpu()) for _, x in rows]))
    factor = max(1, CELL // max(cells.shape[-2:]))
    cells = cells.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    cells = make_grid(cells.expand(-1, 3, -1, -1), nrow=len(rows[0][1]), padding=2, pad_value=255)
    grid = Image.fromarray(cells.permute(1, 2, 0).numpy())
    font = ImageFont.load_default(14)
    margin = 12 + math.ceil(max(font.getlength(label) for label, _ in rows))
    sheet = Image.new("RGB", (margin + grid.width, grid.height), "white")
    sheet.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(sheet)
    for i, (label, _) in enumerate(rows):
        draw.text((6, (i + 0.5) * grid.height / len(rows)), label, fill="black", font=font, anchor="lm")
    return sheet
