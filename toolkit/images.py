"""Image files ↔ tensors, the one pair of range helpers, grids, and the handling of unreadable files."""

import base64
import functools
import io
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from toolkit import files
from toolkit.colour import to_srgb
from toolkit.values import ValueRange, is_deep, scale_values
from utils import InputError, counted, say, warn

FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")  # no EPS: it needs Ghostscript
SUFFIXES = {".apng", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo"}
SUFFIXES |= {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
EXPECTED = "files such as .jpg .png .webp .tif .heic"  # for messages
PHONE_FORMATS = {".heic": "HEIF", ".heif": "HEIF", ".avif": "AVIF"}
SUFFIXES |= PHONE_FORMATS.keys()
INSTALL = {"HEIF": "pip install pillow-heif", "AVIF": "pip install --upgrade pillow"}  # AVIF: from Pillow 11.3 on
# How images get the training size, as in junyanz's code; but nothing is stretched except by the first.
PREPROCESS = ("resize_and_crop", "crop", "scale_width_and_crop", "scale_shortside_and_crop")
BAD_FRACTION = 0.05  # a run stops if more of a domain's images are unreadable
CELL = 128  # px; grids enlarge smaller images to this side, by a whole factor
LARGEST_CELL = 256  # px; grids and galleries reduce larger images to this side
max_pixels = 178e6  # of one image; set by limit_pixels


def bytes_to_range(x: Tensor) -> Tensor:
    """Convert uint8 or float in [0, 255] to float32 in [-1, 1], any shape."""
    return x.float() / 127.5 - 1


def range_to_bytes(x: Tensor) -> Tensor:
    """Clamp to [-1, 1], because -1.01 would wrap to 255, and round to uint8 in [0, 255], any shape."""
    if x.dim() > 2 and x.numel() > 2**24:  # part by part, and in place: copies of large images fill the memory
        return torch.stack([range_to_bytes(part) for part in x])
    return x.detach().float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def image_to_pixels(image: Image.Image, channels: int = 3) -> Tensor:
    """Convert an image as read_image returns it to (channels, H, W): uint8 or, of mode F, float32 in [0, 255]."""
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3) or (H, W)
    if image.mode == "F":  # interpolation overshoots
        return pixels.clamp_(0, 255).expand(channels, -1, -1)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def image_to_tensor(image: Image.Image, channels: int = 3) -> Tensor:
    """Convert an image as read_image returns it to (channels, H, W) in [-1, 1]."""
    return bytes_to_range(image_to_pixels(image, channels))


def tensor_to_image(x: Tensor) -> Image.Image:
    """Convert (3 or 1, H, W), in [-1, 1] or uint8, to an RGB or L image."""
    pixels = (x if x.dtype == torch.uint8 else range_to_bytes(x)).cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def jpeg2000_bits(path: Path) -> int:
    """Return the bits of a channel of a JPEG 2000 file, from the header of its codestream; 0 if there is none."""
    data = path.read_bytes()
    start = data.find(b"\xff\x4f\xff\x51")  # start of codestream, image size; at byte 42: bits - 1 (ITU-T T.800, A.5.1)
    return 1 + (data[start + 42] & 0x7F) if 0 <= start < len(data) - 42 else 0


class UnreadableImage(Exception):
    """Raised for a file that is not a complete image, whatever is wrong with it."""


@functools.cache
def formats() -> list[str]:
    """List the formats that can be read here; AVIF and HEIF depend on the installed packages."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return [*FORMATS, *sorted({"AVIF", "HEIF"} & set(Image.registered_extensions().values()))]


def missing_package(path: Path) -> str:
    """Return the command that makes files of this suffix readable; "" if they are."""
    kind = PHONE_FORMATS.get(path.suffix.lower(), "PNG")
    return "" if kind in formats() else INSTALL[kind]


warn_once = functools.cache(warn)  # however often a folder is listed


def list_images(folder: Path, expected: Collection[str] = ()) -> list[Path]:
    """List all images below a folder, by their suffix, in natural order; of the other files, hidden ones aside, it is warned.

    Files without suffix are listed if they are images, broken links so that they are reported as unreadable. A sub-folder
    that cannot be read is only warned of.

    expected: suffixes of other files that belong there
    """
    found = []
    others: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, onerror=warn if folder.is_dir() else None):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in filter(Path.is_symlink, (Path(parent, name) for name in folders)):
            warn_once(f"{link}: a link to a folder, which is not followed; link the images, or copy them")
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        for path in paths:
            if not path.is_file() and path.exists():  # a pipe, a device
                continue
            if path.suffix.lower() in SUFFIXES or (not path.suffix and is_image(path)):
                found.append(path)
            elif path.is_file() and path.suffix.lower() not in expected:
                others[path.suffix.lower() or "without suffix"] += 1
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        warn_once(f"{folder}: left out, since they are no images that can be read: {kinds}")
    skipped = Counter(f"({path.suffix.lower()}): {missing_package(path)}" for path in found if missing_package(path))
    for hint, count in sorted(skipped.items()):
        warn_once(f"{folder}: {counted(count, 'file')} skipped {hint}")
    readable = [path for path in found if not missing_package(path)]
    return sorted(readable, key=natural_order)


def natural_order(path: Path) -> list[int | str]:
    """Return what sorts 2.png before 10.png."""
    return [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", str(path))]


def limit_pixels(pixels: float) -> None:
    """Make this process treat images of more pixels as unreadable, in place of Pillow's limit of 179 million."""
    global max_pixels
    max_pixels = pixels
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would also stop crops, and warn at half of it


def to_8_bit(image: Image.Image) -> Image.Image:
    """Convert an image of mode F, in [0, 255], to 8 bits, with its colour profile; return others unchanged."""
    if image.mode != "F":
        return image
    grey = Image.fromarray(np.asarray(image).clip(0, 255).round().astype(np.uint8))
    grey.info["icc_profile"] = image.info.get("icc_profile")
    return grey


@contextmanager
def unreadable_on_error(path: Path) -> Iterator[None]:
    """Turn whatever Pillow raises about a file into UnreadableImage; its warnings, about odd tags, are dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # Pillow's plug-ins raise a dozen types on hostile files
        command = missing_package(path)
        reason = f"nothing installed reads {path.suffix}: {command}" if command else f"{type(error).__name__}: {error}"
        raise UnreadableImage(reason) from error


def open_image(path: Path) -> Image.Image:
    """Open an image and read its header; raises UnreadableImage, also if it claims more pixels than max_pixels."""
    with unreadable_on_error(path):
        image = Image.open(path, formats=formats())
    image.filename = ""  # else Pillow maps uncompressed TIFF files, and turned ones (EXIF) become stripes
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # ty: ignore[missing-attribute]
        if tags.get(284) == 2 and max(tags.get(258, (8,))) > 8:  # planes one after the other
            image.close()
            raise UnreadableImage(
                "Pillow reads TIFF files of separate planes of more than 8 bits wrongly; convert it to PNG"
            )
    if image.format == "JPEG2000" and image.mode in ("RGB", "RGBA") and jpeg2000_bits(path) > 8:
        image.close()
        raise UnreadableImage("Pillow reads JPEG 2000 in colour of more than 8 bits wrongly; convert it to PNG or TIFF")
    if image.width * image.height > max_pixels:
        image.close()
        raise UnreadableImage(f"{image.width}x{image.height} px; if you trust the file, raise --max_megapixels")
    return image


def is_image(path: Path) -> bool:
    """Whether a file, whatever its name, has the header of an image."""
    try:
        open_image(path).close()
    except UnreadableImage:
        return False
    return True


def read_size(path: Path) -> tuple[int, int]:
    """Read an image to its end; returns width and height as stored; raises UnreadableImage."""
    with open_image(path) as image, unreadable_on_error(path):
        image.load()
        return image.size


def read_values(path: Path) -> np.ndarray | None:
    """Return the values (H, W) of an image that has a value range, as stored; None for others; raises UnreadableImage."""
    with open_image(path) as image, unreadable_on_error(path):
        return np.asarray(image) if is_deep(image) and not image.info.get("icc_profile") else None


def read_image(path: Path, channels: int = 3, value_range: ValueRange | None = None) -> Image.Image:
    """Read any image as RGB (channels 3) or L (1) in sRGB, turned as EXIF says, transparency over white.

    Greys of more than 8 bits become F, floats in [0, 255], by their domain's range; those with a colour profile are photos,
    and become 8 bits.
    raises: UnreadableImage
    """
    with open_image(path) as image, unreadable_on_error(path):
        image.load()
        with suppress(EOFError, OSError, ValueError, SyntaxError):  # of a torn later frame
            if image.format in ("GIF", "WEBP", "PNG", "TIFF") and getattr(image, "n_frames", 1) > 1:
                warn_once("of animated images, and of files with several pages, only the first one is used")
        image = read_deep_image(image, value_range, path) if is_deep(image) else ImageOps.exif_transpose(image)
        if image.mode == "F":
            return image
        image = to_srgb(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB" if channels == 3 else "L")


def read_deep_image(image: Image.Image, value_range: ValueRange | None, path: Path) -> Image.Image:
    """Convert an opened grey image of more than 8 bits to F in [0, 255], turned; one with a colour profile to 8 bits."""
    is_photo = bool(image.info.get("icc_profile"))
    is_negative = image.format == "TIFF" and image.tag_v2.get(262) == 0  # ty: ignore (0 is white)
    is_16_bit = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    turned = ImageOps.exif_transpose(image)
    grey = scale_values(turned, None if is_photo else value_range, is_16_bit, path)
    if is_negative:
        grey = Image.fromarray(255 - np.asarray(grey))
    grey.info["icc_profile"] = image.info.get("icc_profile")
    return to_8_bit(grey) if is_photo else grey


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (width, height), unless it has that size."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def fitted_size(
    size: tuple[int, int], target: tuple[int, int], preprocess: str, to_crop: bool = True
) -> tuple[int, int]:
    """Return the (width, height) to which an image of a size is resized, by one of PREPROCESS.

    to_crop: whether it is then cropped to `target`, and so enlarged if it is smaller; else it is used as a whole
    """
    if preprocess == "resize_and_crop":
        return target
    factors = [wanted / side for wanted, side in zip(target, size, strict=True)]
    factor = {"crop": 1.0, "scale_width_and_crop": factors[0], "scale_shortside_and_crop": max(factors)}[preprocess]
    factor = max(factor, *factors) if to_crop else factor
    width, height = (max(1, round(factor * side)) for side in size)
    return (max(width, target[0]), max(height, target[1])) if to_crop else (width, height)  # rounding may lack a pixel


def crop_centre(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cut (width, height) out of the middle of an image, unless it has that size."""
    left, top = ((side - wanted) // 2 for side, wanted in zip(image.size, size, strict=True))
    return image if image.size == size else image.crop((left, top, left + size[0], top + size[1]))


@dataclass(frozen=True)
class ImageReader:
    """How the image files of a domain become inputs of a network."""

    size: tuple[int, int] | None  # height and width; None: their own
    channels: int = 3
    value_range: ValueRange | None = None
    preprocess: str = PREPROCESS[0]

    def __call__(self, path: Path) -> Tensor:
        """Read an image as (channels, H, W) in [-1, 1]; raises UnreadableImage."""
        image = read_image(path, self.channels, self.value_range)
        if self.size:
            target = self.size[::-1]
            image = crop_centre(resize_image(image, fitted_size(image.size, target, self.preprocess)), target)
        return image_to_tensor(image, self.channels)


def load_image(path: Path | str, size: tuple[int, int] | None, channels: int = 3) -> Tensor:
    """Read an image as (channels, H, W) in [-1, 1], resized to a height and width or at its own; raises UnreadableImage."""
    return ImageReader(size, channels)(Path(path))


@dataclass
class BadImages:
    """The unreadable images of a folder: names each once, and ends the run if there are too many."""

    folder: Path
    total: int
    on_bad: str = "skip"
    found: set[Path] = field(default_factory=set)

    def note(self, path: Path, reason: object) -> None:
        """Name an unreadable image; raises InputError with "stop", or if all or more than BAD_FRACTION are unreadable."""
        if path in self.found:
            return
        self.found.add(path)
        if self.total == 1 or self.on_bad == "stop":
            remedy = ", or use --on_bad_image skip" if self.total > 1 else ""
            raise InputError(f"{path}: cannot be read ({reason}); replace it{remedy}")
        say(f"skipped, unreadable ({len(self.found)} of {self.total}): {path} ({reason})", file=sys.stderr)
        if len(self.found) > max(1, BAD_FRACTION * self.total) or len(self.found) == self.total:
            counts = f"{len(self.found)} or more of {self.total}"
            raise InputError(f"{self.folder}: {counts} images are unreadable; repair or remove them")

    def read(self, paths: Iterable[Path], read: Callable[[Path], Any]) -> Iterator[tuple[Path, Any]]:
        """Yield each path with what a function reads from it; note the unreadable ones."""
        for path in paths:
            try:
                yield path, read(path)
            except UnreadableImage as error:
                self.note(path, error)

    def readable(self, paths: Sequence[Path]) -> list[Path]:
        """Return the paths whose header can be read; note the others."""
        return [path for path, _ in self.read(paths, lambda path: open_image(path).close())]


def load_images(folder: Path, paths: Sequence[Path], reader: ImageReader, on_bad: str) -> Iterator[tuple[Path, Tensor]]:
    """Yield paths and images, (channels, H, W) in [-1, 1], read one by one; unreadable ones are noted as by BadImages."""
    return BadImages(folder, len(paths), on_bad).read(paths, reader)


@dataclass
class LazyImages(Mapping):
    """Images by path, (1, channels, H, W) in [-1, 1], each read on access: memory holds one at a time."""

    paths: Sequence[Path]
    reader: ImageReader

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)

    def __getitem__(self, path: Path) -> Tensor:
        return self.reader(path)[None]


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as temporary:
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


def draw_grid(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Draw labelled rows of images, (N, 3 or 1, H, W) in [-1, 1] of one size; each takes CELL to LARGEST_CELL px."""
    from torchvision.utils import make_grid  # here, because its import takes two seconds

    cells = torch.cat([x.float().cpu() for _, x in rows])
    factor = LARGEST_CELL / max(cells.shape[-2:])
    if factor < 1:
        size = [max(1, round(side * factor)) for side in cells.shape[-2:]]
        cells = F.interpolate(cells, size, mode="bicubic", antialias=True, align_corners=False)
    enlarged = max(1, CELL // max(cells.shape[-2:]))
    cells = range_to_bytes(cells).repeat_interleave(enlarged, 2).repeat_interleave(enlarged, 3)
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
