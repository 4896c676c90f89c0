"""Translations as files: their format, bit depth, transparency and georeference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from toolkit import images
from toolkit.bands import Bands
from toolkit.pages import file_of
from toolkit.readers import reader_of
from toolkit.values import ValueRange
from utils import warn

CHOICES = ("png", "jpg", "tif", "npy", "same")
KINDS = {".jpg": "jpg", ".png": "png", ".tif": "tif", ".webp": "webp", ".npy": "npy"}  # of files that can be written
KINDS |= {".jpeg": "jpg", ".jpe": "jpg", ".jfif": "jpg", ".mpo": "jpg", ".tiff": "tif", ".apng": "png"}
TYPES = {33550: 12, 33922: 12, 34264: 12, 34735: 3, 34736: 12, 34737: 2}  # GeoTIFF tags: float64, uint16, text
SCALE, TIEPOINTS, MATRIX, KEYS = 33550, 33922, 34264, 34735
PIXEL_IS_POINT = (1025, 0, 1, 2)  # in KEYS: coordinates are those of the middle of a pixel, not of its corner


class OutputFormat(NamedTuple):
    """How a translation is written."""

    kind: str = "png"  # jpg, png, tif, webp or npy, which is its suffix, too
    in_units: bool = False  # the values of its domain; else 8 bits

    @property
    def is_for_browsers(self) -> bool:
        """Whether a page can show it."""
        return self.kind in ("jpg", "png", "webp") and not self.in_units


PNG = OutputFormat()
VALUES = OutputFormat("tif", in_units=True)


def choose_format(asked: str, suffix: str, value_range: ValueRange | None, in_colour: bool = False) -> OutputFormat:
    """Return the format of a translation into a domain with a value range, or without.

    asked:     one of CHOICES
    suffix:    of the input, which "same" follows; what cannot be written becomes PNG or, with a value range, TIFF
    in_colour: whether the values have several bands, of which a PNG holds 8 bits
    """
    kind = asked if asked != "same" else KINDS.get(suffix.lower(), "tif" if value_range else "png")
    if value_range is None or kind in ("tif", "npy"):
        return OutputFormat(kind, value_range is not None)
    if asked == "same" and kind == "png":
        return OutputFormat("png" if fits_16_bits(value_range) and not in_colour else "tif", True)
    return OutputFormat(kind)


def fits_16_bits(value_range: ValueRange) -> bool:
    """Whether a PNG of 16 bits can hold the values of a range: whole numbers from 0 to 65535, at least 256 of them."""
    low, high = value_range
    return low >= 0 and high <= 65535 and high - low >= 255


@dataclass
class Translation:
    """A translated image, and what is written with it."""

    image: Image.Image  # of 8 bits
    values: Image.Image | Bands | None = None  # in the units of its domain, mode F or bands, if that has a value range
    alpha: Image.Image | None = None  # mode L
    geotags: ImageFileDirectory_v2 | None = None

    def save(self, path: Path, written: OutputFormat) -> None:
        """Write the file in a format; the name may have any suffix."""
        image: Any = self.values if written.in_units and self.values else self.image
        if self.alpha and isinstance(image, Image.Image) and image is self.image:
            image = image.copy()
            image.putalpha(self.alpha)
        if written.kind == "npy":
            with path.open("wb") as file:
                np.save(file, np.asarray(image))
        elif written.kind == "tif":
            image.save(path, format="TIFF", tiffinfo=self.geotags or {})
        elif written.kind == "png":
            if image.mode == "F":
                image = Image.fromarray(np.asarray(image).round().astype(np.uint16))
            image.save(path, format="PNG")
        elif written.kind == "webp":
            image.save(path, format="WEBP", quality=95)
        else:
            image.save(path, format="JPEG", quality=95, subsampling=0)


def read_geotags(path: Path, size: tuple[int, int]) -> ImageFileDirectory_v2 | None:
    """Return the GeoTIFF tags of a file, for a result of (width, height) that shows the same ground.

    None if it has none; if they are damaged, or the image is turned by its EXIF tag, it is warned.
    raises: UnreadableImage
    """
    if KINDS.get(path.suffix.lower()) != "tif":
        return None
    found, stored = read_tags(path)
    values = {tag: found[tag] for tag in TYPES if tag in found}
    if not values.keys() & {SCALE, TIEPOINTS, MATRIX}:
        return None
    factors = [wanted / side for wanted, side in zip(size, stored, strict=True)]
    try:
        if found.get(274, 1) != 1:  # orientation
            raise ValueError("the image is turned")
        return scale_geotags(values, *factors)
    except (TypeError, ValueError) as error:
        warn(f"{path}: its georeference cannot be kept ({error})")
        return None


def read_tags(path: Path) -> tuple[Any, tuple[int, int]]:
    """Return the tags of a TIFF file by their number, and its (width, height); raises UnreadableImage."""
    file = file_of(path)
    if reader_of(file):  # Pillow cannot open it
        import tifffile

        with images.unreadable_on_error(path), tifffile.TiffFile(file) as stored:
            page: Any = stored.pages[0]
            return {tag.code: tag.value for tag in page.tags}, (page.imagewidth, page.imagelength)
    with images.open_image(file) as image:
        return dict(getattr(image, "tag_v2", {})), image.size


def scale_geotags(values: dict[int, Any], x: float, y: float) -> ImageFileDirectory_v2:
    """Return the tags of an image whose width and height are x and y times those of the image with these tags.

    raises: ValueError, TypeError if they are not as the standard says
    source: OGC GeoTIFF 1.1, annex B.6 (ModelTiepoint, ModelPixelScale, ModelTransformation)
    """
    tags = ImageFileDirectory_v2()
    for tag, value in values.items():
        tags.tagtype[tag] = TYPES[tag]
        if TYPES[tag] == 2:
            tags[tag] = str(value)
        else:
            tags[tag] = tuple(np.array(value, np.uint16 if TYPES[tag] == 3 else np.float64).reshape(-1).tolist())
    keys = tags.get(KEYS, ())
    is_point = PIXEL_IS_POINT in [tuple(keys[i : i + 4]) for i in range(4, len(keys), 4)]
    shift = np.array([x - 1, y - 1]) / 2 if is_point else np.zeros(2)  # of raster coordinates, after scaling
    factors = np.array([x, y])
    if SCALE in tags:
        sizes = np.reshape(tags[SCALE], 3)
        tags[SCALE] = (*(sizes[:2] / factors).tolist(), float(sizes[2]))
    if TIEPOINTS in tags:
        points = np.reshape(tags[TIEPOINTS], (-1, 6))
        points[:, :2] = points[:, :2] * factors + shift
        tags[TIEPOINTS] = tuple(points.reshape(-1).tolist())
    if MATRIX in tags:
        matrix = np.reshape(tags[MATRIX], (4, 4))
        matrix[:, :2] /= factors
        matrix[:, 3] -= matrix[:, :2] @ shift
        tags[MATRIX] = tuple(matrix.reshape(-1).tolist())
    return tags
