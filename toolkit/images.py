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
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from toolkit import files, pages, readers
from toolkit.bands import Bands, bands_of, page_to_image, pick_bands, shown_bands
from toolkit.colour import to_srgb
from toolkit.readers import UnreadableImage
from toolkit.values import ValueRange, is_deep, scale_values
from utils import InputError, counted, say, warn

FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")  # no EPS: it needs Ghostscript
SUFFIXES = {".apng", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo"}
SUFFIXES |= {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
EXPECTED = "files such as .jpg .png .webp .tif .heic"  # for messages
PHONE_FORMATS = {".heic": "HEIF", ".heif": "HEIF", ".avif": "AVIF"}
SUFFIXES |= PHONE_FORMATS.keys() | readers.BY_SUFFIX.keys()
INSTALL = {"HEIF": "pip install pillow-heif", "AVIF": "pip install --upgrade pillow"}  # AVIF: from Pillow 11.3 on
# How images get the training size, as in junyanz's code; but nothing is stretched except by the first.
PREPROCESS = ("resize_and_crop", "crop", "scale_width_and_crop", "scale_shortside_and_crop")
WHOLE = ("none", "scale_width", "scale_shortside")  # without a crop: each image keeps its shape, so their sizes differ
PREPROCESS += WHOLE
RESAMPLE = ("bicubic", "nearest")  # nearest keeps the colours of label images
MULTIPLE = 4  # of which the sides of whole images are, as in junyanz's code
LEAST_SIDE = 64  # px; smaller whole images are enlarged, if they are smaller than the training size, too
DRAFT = 2  # times the wanted size, at least: what libjpeg reduces a much larger JPEG to while it decodes it
BAD_FRACTION = 0.05  # a run stops if more of a domain's images are unreadable
CELL = 128  # px; grids enlarge smaller images to this side, by a whole factor
LARGEST_CELL = 256  # px; grids and galleries reduce larger images to this side
max_pixels = 178e6  # of one image; set by limit_pixels
Size = tuple[int, int]  # width, height, px
Fit = Callable[[Size], Size]  # from the size of an image to that which it gets


def bytes_to_range(x: Tensor) -> Tensor:
    """Convert uint8 or float in [0, 255] to float32 in [-1, 1], any shape."""
    return (x.float() / 127.5).sub_(1)


def range_to_bytes(x: Tensor) -> Tensor:
    """Clamp to [-1, 1], because -1.01 would wrap to 255, and round to uint8 in [0, 255], any shape."""
    if x.dim() > 2 and x.numel() > 2**24:  # part by part, and in place: copies of large images fill the memory
        return torch.stack([range_to_bytes(part) for part in x])
    return x.detach().float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def image_to_pixels(image: Image.Image | Bands, channels: int = 3) -> Tensor:
    """Convert an image as read_image returns it to (channels, H, W): uint8 or, of mode F and Bands, float32 in [0, 255]."""
    if isinstance(image, Bands):
        return torch.from_numpy(image.levels.clip(0, 255)).permute(2, 0, 1)
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3) or (H, W)
    if image.mode == "F":  # interpolation overshoots
        return pixels.clamp_(0, 255).expand(channels, -1, -1)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def image_to_tensor(image: Image.Image | Bands, channels: int = 3) -> Tensor:
    """Convert an image as read_image returns it to (channels, H, W) in [-1, 1]."""
    return bytes_to_range(image_to_pixels(image, channels))


def tensor_to_image(x: Tensor) -> Image.Image:
    """Convert (channels, H, W), in [-1, 1] or uint8, to an RGB or, of one or two channels, L image; a fourth is not shown."""
    x = shown_bands(x)
    pixels = (x if x.dtype == torch.uint8 else range_to_bytes(x)).cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


@functools.cache
def formats() -> list[str]:
    """List the formats that can be read here; AVIF and HEIF depend on the installed packages."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return [*FORMATS, *sorted({"AVIF", "HEIF"} & set(Image.registered_extensions().values()))]


def missing_package(path: Path) -> str:
    """Return the command that makes files of this suffix readable; "" if they are."""
    reader = readers.DICOM if readers.is_dicom(path) else readers.BY_SUFFIX.get(readers.suffix_of(path))
    if reader:
        return reader.missing
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
            suffix = readers.suffix_of(path)
            if suffix in SUFFIXES or (not suffix and (is_image(path) or readers.is_dicom(path))):
                found.append(path)
            elif path.is_file() and path.suffix.lower() not in expected:
                others[path.suffix.lower() or "without suffix"] += 1
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        warn_once(f"{folder}: left out, since they are no images that can be read: {kinds}")
    hints = {path: missing_package(path) for path in found}
    skipped = Counter(f"({readers.suffix_of(path) or 'DICOM'}): {hint}" for path, hint in hints.items() if hint)
    for hint, count in sorted(skipped.items()):
        warn_once(f"{folder}: {counted(count, 'file')} skipped {hint}")
    return with_pages(folder, sorted((path for path in found if not hints[path]), key=natural_order))


def with_pages(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """List the images that some files hold, as pages.use_pages says."""
    return pages.expand(folder, {path: pages_in(path) for path in paths})


def pages_in(path: Path) -> int:
    """Count the images in a file; 1 if they cannot be counted, which is said where it is read."""
    try:
        facts = path.stat()
    except OSError:  # a broken link
        return 1
    return _count_pages(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=2**17)
def _count_pages(path: Path, size: int, changed: int) -> int:
    """Count the images in a file of this size and time of change."""
    suffix = readers.suffix_of(path)
    if suffix not in (*readers.BY_SUFFIX, *pages.SUFFIXES):
        return 1
    with suppress(UnreadableImage, OSError), unreadable_on_error(path):
        reader = readers.reader_of(path)
        if reader and not reader.missing:
            count = reader.layout(path).pages
            return count if count <= readers.MOST_PAGES else 1
        if suffix != ".png" or pages.may_be_animated(path):
            with Image.open(path, formats=formats()) as image:
                return len(pages.frames_of(image))
    return 1


def natural_order(path: Path) -> list[int | str]:
    """Return what sorts 2.png before 10.png."""
    return [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", str(path))]


def limit_pixels(pixels: float) -> None:
    """Make this process treat images of more pixels as unreadable, in place of Pillow's limit of 179 million."""
    global max_pixels
    max_pixels = pixels
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would also stop crops, and warn at half of it


def to_8_bit(image: Image.Image | Bands) -> Image.Image:
    """Convert an image of mode F, in [0, 255], to 8 bits, with its colour profile, and Bands to what is shown of them."""
    if isinstance(image, Bands):
        return image.to_8_bit()
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
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plug-ins raise a dozen types on hostile files
        command = missing_package(path)
        reason = f"nothing installed reads {path.suffix}: {command}" if command else f"{type(error).__name__}: {error}"
        raise UnreadableImage(reason) from error


def reader_for(path: Path, channels: int = 3, value_range: ValueRange | None = None) -> readers.Reader | None:
    """Return what reads a file in place of Pillow; None: Pillow does.

    raises: UnreadableImage if a package is missing, without which values or bands would be wrong
    """
    reader = readers.reader_of(path)
    if reader is None or not reader.missing:
        return reader
    if channels in (1, 3) and value_range in (None, (0, 65535)) and readers.pillow_reduces(path):
        warn_once(f"colours of 16 bits are reduced to 8, since {reader.package} is missing: {reader.missing}")
        return None
    raise UnreadableImage(f"{reader.package} is missing, which reads its bands and values: {reader.missing}")


def check_pixels(width: int, height: int) -> None:
    """Raise UnreadableImage for more pixels than max_pixels."""
    if width * height > max_pixels:
        raise UnreadableImage(f"{width}x{height} px; if you trust the file, raise --max_megapixels")


def open_image(path: Path) -> Image.Image:
    """Open an image, or a page of a file, and read its header; raises UnreadableImage, also for more pixels than max_pixels."""
    file, page = pages.file_and_page(path)
    with unreadable_on_error(path):
        image = Image.open(file, formats=formats())
        image.filename = ""  # else Pillow maps uncompressed TIFF files, and turned ones (EXIF) become stripes
        try:
            check_pixels(*image.size)
            if page:
                image.seek(pages.frames_of(image)[page])
                check_pixels(*image.size)
        except Exception:
            image.close()
            raise
    return image


def check_header(path: Path, channels: int = 3, value_range: ValueRange | None = None) -> None:
    """Read the header of an image; raises UnreadableImage."""
    file, page = pages.file_and_page(path)
    with unreadable_on_error(path):
        reader = reader_for(file, channels, value_range)
        if reader is None:
            open_image(path).close()
            return
        layout = reader.layout(file)
        check_pixels(layout.width, layout.height)
        if (page or 0) >= layout.pages:
            raise UnreadableImage(f"holds {counted(layout.pages, 'image')}")


def is_image(path: Path) -> bool:
    """Whether a file, whatever its name, has the header of an image."""
    try:
        check_header(path)
    except UnreadableImage:
        return False
    return True


def read_page(path: Path, channels: int = 3, value_range: ValueRange | None = None) -> readers.Page | None:
    """Return an image that a reader of toolkit/readers.py reads; None for those that Pillow does; raises UnreadableImage."""
    with unreadable_on_error(path):
        file, page = pages.file_and_page(path)
        reader = reader_for(file, channels, value_range)
        if reader is None:
            return None
        check_header(path, channels, value_range)
        found = reader.read(file, page or 0)
        if not found.values.size:
            raise UnreadableImage("holds no pixels")
        return found


def read_size(path: Path) -> tuple[int, int]:
    """Read an image to its end; returns width and height as stored; raises UnreadableImage."""
    page = read_page(path)
    if page:
        return page.values.shape[1], page.values.shape[0]
    with open_image(path) as image, unreadable_on_error(path):
        image.load()
        return image.size


def read_values(path: Path, channels: int = 3) -> np.ndarray | None:
    """Return the values of an image that has a value range, as stored: (H, W) or (H, W, bands) that networks get.

    returns: None for images of 8 bits, and photos, which have a colour profile
    raises:  UnreadableImage
    """
    page = read_page(path, channels)
    with unreadable_on_error(path):
        if page:
            is_photo = page.values.dtype == np.uint8 or page.profile
            return None if is_photo else pick_bands(page.values, channels, path)
        with open_image(path) as image:
            return np.asarray(image) if is_deep(image) and not image.info.get("icc_profile") else None


def read_image(
    path: Path, channels: int = 3, value_range: ValueRange | None = None, fit: Fit | None = None
) -> Image.Image | Bands:
    """Read any image as RGB (channels 3) or L (1) in sRGB, turned as EXIF says, transparency over white.

    Images of more than 8 bits become floats in [0, 255] by their domain's range: greys of mode F, colours Bands; those with
    a colour profile are photos, and become 8 bits. For other numbers of channels all images are Bands.
    fit:    to which size to reduce a JPEG that is much larger, which is faster than reading it at its own
    raises: UnreadableImage
    """
    page = read_page(path, channels, value_range)
    with unreadable_on_error(path):
        if page:
            image = page_to_image(page, channels, value_range, path)
            return image if isinstance(image, Bands) or image.mode == "F" else finished(image, channels, path)
        with open_image(path) as image:
            is_tiff = image.format == "TIFF"
            image = load_reduced(image, fit) if fit else image
            image.load()
            if is_deep(image):
                image = read_deep_image(image, value_range, path)
            else:
                ImageOps.exif_transpose(image, in_place=True)
            has_alpha = image.mode in ("LA", "RGBA")
            if is_tiff and has_alpha and not readers.looks_like_mask(np.asarray(image)[..., -1] / 255):
                image = image.convert(image.mode[:-1])  # the last band is infrared, or another
            if image.mode == "F" and channels in (1, 3):
                return image
            return finished(image, channels, path)


def finished(image: Image.Image, channels: int, path: Path) -> Image.Image | Bands:
    """Convert an upright image to sRGB without transparency: RGB (channels 3) or L (1), else Bands."""
    image = to_srgb(image)
    if channels not in (1, 3):
        return Bands(pick_bands(bands_of(image), channels, path).astype(np.float32))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def read_alpha(path: Path) -> Image.Image | None:
    """Return the transparency of an image, mode L, turned as EXIF says; None if it has none; raises UnreadableImage."""
    file = pages.file_of(path)
    if readers.reader_of(file):  # its bands are values
        return None
    with open_image(file) as image, unreadable_on_error(path):
        image = ImageOps.exif_transpose(image)
        has_alpha = image.has_transparency_data and not is_deep(image)
        return image.convert("RGBA").getchannel("A") if has_alpha else None


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


def load_reduced(image: Image.Image, fit: Fit) -> Image.Image:
    """Decode a JPEG that is much larger than needed at 1/2, 1/4 or 1/8 of its size, and resize it; return others unchanged.

    The JPEG comes out as it is stored, not yet turned, so that what libjpeg adds to its right and bottom edge is cut off.
    """
    is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by 90 degrees
    fitted = fit(image.size[::-1] if is_turned else image.size)
    size = fitted[::-1] if is_turned else fitted
    if not all(side >= 2 * DRAFT * wanted for side, wanted in zip(image.size, size, strict=True)):
        return image
    drafted = image.draft(None, (DRAFT * size[0], DRAFT * size[1]))  # None: no JPEG
    # by Pillow, whose result keeps the profile and the turn for what follows
    return image.resize(size, Image.Resampling.BICUBIC, drafted[1]) if drafted else image


def resize_image(image: Any, size: Size, resample: str = RESAMPLE[0]) -> Any:
    """Resize to (width, height), unless it has that size; resample: of RESAMPLE, of which bicubic is antialiased."""
    return image if image.size == size else image.resize(size, Image.Resampling[resample.upper()])


def resized_fast(image: Image.Image, size: Size) -> Tensor:
    """Return the pixels of an RGB or L image of (width, height), as image_to_pixels does, bicubic and antialiased.

    By torch, which gives what Pillow does to 1 level, but several times as fast.
    """
    pixels = image_to_pixels(image, len(image.getbands()))[None]
    return F.interpolate(pixels, size[::-1], mode="bicubic", antialias=True)[0]


def fitted_size(
    size: tuple[int, int], target: tuple[int, int], preprocess: str, to_crop: bool = True
) -> tuple[int, int]:
    """Return the (width, height) to which an image of a size is resized, by one of PREPROCESS.

    to_crop: whether it is then cropped to `target`, and so enlarged if it is smaller; else it is used as a whole
    returns: of WHOLE, unless cropped, multiples of MULTIPLE
    """
    if preprocess == "resize_and_crop":
        return target
    factors = [wanted / side for wanted, side in zip(target, size, strict=True)]
    whole = preprocess in WHOLE and not to_crop
    by_name = {"crop": 1.0, "scale_width": factors[0], "scale_shortside": max(factors), "none": 1.0}
    factor = by_name[preprocess.removesuffix("_and_crop")]
    factor = max(factor, *factors) if to_crop else factor
    factor = max(factor, min(LEAST_SIDE, *target) / min(size)) if whole else factor
    width, height = (max(1, round(factor * side)) for side in size)
    if whole:
        return (width + MULTIPLE // 2) // MULTIPLE * MULTIPLE, (height + MULTIPLE // 2) // MULTIPLE * MULTIPLE
    return (max(width, target[0]), max(height, target[1])) if to_crop else (width, height)  # rounding may lack a pixel


def crop_centre(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut (height, width) out of the middle of an image, (C, H, W)."""
    top, left = ((side - wanted) // 2 for side, wanted in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


@dataclass(frozen=True)
class ImageReader:
    """How the image files of a domain become inputs of a network."""

    size: tuple[int, int] | None  # height and width; None: their own
    channels: int = 3
    value_range: ValueRange | None = None
    preprocess: str = PREPROCESS[0]
    to_crop: bool = True  # whether images are cropped to `size` then; else they are used as a whole
    resample: str = RESAMPLE[0]
    is_fast: bool = False  # for training: pixels may be a level off, and those of much larger JPEGs a few

    def fit(self, size: Size) -> Size:
        """Return the (width, height) that an image of a size gets, before it is cropped."""
        return fitted_size(size, self.size[::-1], self.preprocess, self.to_crop) if self.size else size

    def pixels(self, path: Path) -> Tensor:
        """Read an image at the size that `fit` says, (channels, H, W) as image_to_pixels; raises UnreadableImage."""
        is_fast = self.is_fast and self.resample == "bicubic"  # else colours must not be mixed
        image = read_image(path, self.channels, self.value_range, self.fit if is_fast else None)
        size = self.fit(image.size)
        if is_fast and isinstance(image, Image.Image) and image.mode in ("L", "RGB") and image.size != size:
            return resized_fast(image, size)
        return image_to_pixels(resize_image(image, size, self.resample), self.channels)

    def __call__(self, path: Path) -> Tensor:
        """Read an image as (channels, H, W) in [-1, 1], cropped from the middle; raises UnreadableImage."""
        x = self.pixels(path)
        return bytes_to_range(crop_centre(x, self.size) if self.size and self.to_crop else x)


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
        return [path for path, _ in self.read(paths, check_header)]


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
    """Draw labelled rows of images, (N, channels, H, W) in [-1, 1] of one size; each takes CELL to LARGEST_CELL px."""
    from torchvision.utils import make_grid  # here, because its import takes two seconds

    cells = torch.cat([shown_bands(x.float().cpu()) for _, x in rows])
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
