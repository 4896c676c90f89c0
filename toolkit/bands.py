"""Images of any number of bands, and how those of a file become those of a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from toolkit.readers import FULL, Page
from toolkit.values import ValueRange, scale_array
from utils import counted, warn

GREY = np.array((0.299, 0.587, 0.114), np.float32)  # of red, green, blue, as in Pillow (ITU-R BT.601)


@dataclass(frozen=True)
class Bands:
    """An image of floats (H, W, bands) in [0, 255], with what is used of Pillow's, which holds no such images."""

    levels: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def width(self) -> int:
        return self.levels.shape[1]

    @property
    def height(self) -> int:
        return self.levels.shape[0]

    @property
    def mode(self) -> str:
        return f"{self.levels.shape[2]} bands"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.levels.astype(dtype or self.levels.dtype, copy=bool(copy))

    def resize(
        self, size: Sequence[int], resample: Image.Resampling = Image.Resampling.BICUBIC, box: Any = None
    ) -> "Bands":
        """Resize a part, or the whole, to (width, height), as Pillow does; interpolation may overshoot."""
        bands = [
            Image.fromarray(band).resize((size[0], size[1]), resample, box) for band in np.moveaxis(self.levels, 2, 0)
        ]
        return Bands(np.stack([np.asarray(band) for band in bands], axis=2))

    def crop(self, box: tuple[int, int, int, int]) -> "Bands":
        """Cut out (left, top, right, bottom)."""
        left, top, right, bottom = box
        return Bands(self.levels[top:bottom, left:right])

    def save(self, path: Path, format: str = "TIFF", tiffinfo: Any = None) -> None:  # as of Pillow
        """Write the bands, in any units, as a TIFF of 32-bit floats; needs tifffile. tiffinfo: further tags, as of Pillow."""
        import tifffile

        kind = "rgb" if self.levels.shape[2] == 3 else "minisblack"
        tags = []
        for tag, value in (tiffinfo or {}).items():
            count = len(value) if isinstance(value, str | tuple) else 1
            tags.append((tag, tiffinfo.tagtype[tag], count, value, True))
        values = self.levels.astype(np.float32)
        tifffile.imwrite(path, values, photometric=kind, planarconfig="contig", metadata=None, extratags=tags)

    def to_8_bit(self) -> Image.Image:
        """Return what is shown of it: the first three bands as RGB, of two bands the first."""
        levels = self.levels[..., :3] if self.levels.shape[2] > 2 else self.levels[..., 0]
        return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))


def band_values(x: Tensor, size: tuple[int, int], value_range: ValueRange) -> Bands:
    """Turn an output of a network, (C, H, W) in [-1, 1], into bands in units of its domain, of (width, height)."""
    low, high = value_range
    values = low + (high - low) * (x.float().clamp(-1, 1) + 1) / 2
    image = Bands(values.permute(1, 2, 0).numpy())
    return image if image.size == size else Bands(image.resize(size).levels.clip(low, high))


def shown_bands(x: Tensor) -> Tensor:
    """Return what is shown of (..., channels, H, W): three channels or, of one or two, the first."""
    return x[..., :3, :, :] if x.shape[-3] > 2 else x[..., :1, :, :]


said_of: set[tuple[int, int]] = set()  # numbers of bands and channels of which a warning was printed


def pick_bands(values: np.ndarray, channels: int, path: Path) -> np.ndarray:
    """Return what a network of some channels gets of (H, W) or (H, W, bands): (H, W), (H, W, 3) or (H, W, channels).

    Networks of 1 and 3 channels get one band, or three; others exactly their number.
    raises: ValueError for too few bands
    """
    found = values.shape[2] if values.ndim == 3 else 1
    if channels in (1, 3):
        used = 3 if found > 2 else 1
    else:
        used = channels
    if found < used:
        raise ValueError(
            f"has {counted(found, 'band')}, and the networks have {channels} channels; train with --channels {found}"
        )
    if found > used and (found, channels) not in said_of:
        said_of.add((found, channels))
        first = f"the first {used} are" if used > 1 else "the first is"
        warn(f"{path}: of its {found} bands {first} used, as of others; --channels {found} uses all of them")
    if values.ndim == 2:
        return values
    return np.ascontiguousarray(values[..., :used] if used > 1 else values[..., 0])


def split_alpha(page: Page, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the values of a page and its transparency (H, W) in [0, 1]; None where it is a band like others, or there is none."""
    bands = page.values.shape[2] if page.values.ndim == 3 else 1
    if not page.has_alpha or (channels not in (1, 3) and channels >= bands):
        return page.values, None
    values = page.values[..., :-1]
    alpha = page.values[..., -1] / np.float32(FULL.get(page.values.dtype.str[1:], 1))
    return values[..., 0] if bands == 2 else values, alpha


def page_to_image(page: Page, channels: int, value_range: ValueRange | None, path: Path) -> Image.Image | Bands:
    """Convert a page to what a network of some channels gets, before any resizing.

    returns: of greys and colours of 8 bits, and photos with a colour profile, an image of L, RGB, LA or RGBA with its profile;
             else floats in [0, 255] by the value range, as an image of mode F or as Bands
    raises:  ValueError for values without a known range, and too few bands
    """
    values, alpha = split_alpha(page, channels)
    values = pick_bands(values, channels, path)
    is_photo = page.profile is not None and values.dtype == np.uint16 and channels in (1, 3)
    if values.dtype == np.uint8:
        levels = values
    else:
        levels = scale_array(values, None if is_photo else value_range, values.dtype == np.uint16, path)
    if (values.dtype == np.uint8 or is_photo) and channels in (1, 3):
        image = Image.fromarray(levels.round().astype(np.uint8))
        if alpha is not None:
            image.putalpha(Image.fromarray((alpha * 255).round().astype(np.uint8)))
        if page.profile:
            image.info["icc_profile"] = page.profile
        return image
    levels = levels.astype(np.float32)
    if alpha is not None:  # over white
        share = alpha if levels.ndim == 2 else alpha[..., None]
        levels = (levels * share + 255 * (1 - share)).astype(np.float32)
    if channels == 1 and levels.ndim == 3:
        levels = levels @ GREY
    return Image.fromarray(levels) if levels.ndim == 2 else Bands(levels)


def bands_of(image: Image.Image) -> np.ndarray:
    """Return the bands of an image of 8 bits, transparency included: (H, W) or (H, W, bands)."""
    if image.mode in ("P", "PA", "1", "CMYK", "YCbCr"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return np.asarray(image)
