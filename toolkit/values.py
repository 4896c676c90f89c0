"""Value ranges: what black and white are in images of more than 8 bits, such as CT slices, depth maps and raw greys.

A range (low, high) belongs to a domain and is decided once: low becomes -1 and high 1 in a network. Images of 8 bits have
0-255 whatever the range is.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from utils import option, warn

ValueRange = tuple[float, float]  # low, high, in the units of the files
AUTO = "auto"
KNOWN = [(0.0, 1.0), (-1.0, 1.0), *((0.0, 2.0**bits - 1) for bits in (8, 10, 12, 14, 16))]
TOLERANCE = 0.05  # of a known range: values of few images do not reach its ends, and interpolation overshoots them
clipped_ranges: set[ValueRange] = set()  # of which a warning was printed


def range_option(domain: str, auto: str = "measured over its training images") -> str:
    """Declare the option of a domain's range; auto: what takes the place of a declared one."""
    return option(
        AUTO,
        f"values of {domain} that are black and white in images of more than 8 bits; auto: {auto}",
        parse=range_text,
        metavar="LOW,HIGH",
    )


def range_text(text: str) -> str:
    """Accept "auto" or two finite numbers, the first below the second, as text; else raise ValueError."""
    if text != AUTO and parse_range(text) is None:
        raise ValueError(f"given {text!r}, expected LOW,HIGH, such as 0,4095 or -1000,3000, or auto")
    return text.strip()


def parse_range(text: str) -> ValueRange | None:
    """Return the numbers of a range; None for "auto" and whatever else is none."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        return None
    return (low, high) if -math.inf < low < high < math.inf else None


def range_in_text(value_range: ValueRange | None) -> str:
    """Return a range as parse_range reads it; "auto" for None."""
    if value_range is None:
        return AUTO
    return ",".join(str(int(limit) if float(limit).is_integer() else limit) for limit in value_range)


def ranges_of(metadata: Mapping[str, Any]) -> dict[str, ValueRange]:
    """Return the ranges in the metadata of a generator file by domain; what a stranger's file says wrongly is left out."""
    found = {}
    for domain in "AB":
        limits = metadata.get(f"range_{domain}")
        if isinstance(limits, list | tuple) and len(limits) == 2:
            value_range = parse_range(",".join(map(str, limits)))
            found |= {domain: value_range} if value_range else {}
    return found


def is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits: Pillow opens greys as integers (I, I;16, I;16B) or floats (F)."""
    return image.mode.startswith(("I", "F"))


def extremes(values: np.ndarray) -> ValueRange:
    """Return the smallest and the largest finite value; infinity and -infinity if there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (math.inf, -math.inf)


def common_range(found: Sequence[ValueRange]) -> ValueRange | None:
    """Return the range of images from the extremes of each: a known one that they nearly fill, else their own.

    returns: None if there are no two values
    """
    low = min((low for low, _ in found), default=0.0)
    high = max((high for _, high in found), default=0.0)
    for known_low, known_high in KNOWN:
        slack = TOLERANCE * (known_high - known_low)
        if abs(low - known_low) <= slack and abs(high - known_high) <= slack:
            return known_low, known_high
    return (low, high) if low < high else None


def scale_values(image: Image.Image, value_range: ValueRange | None, is_16_bit: bool, path: Path) -> Image.Image:
    """Convert a grey image of more than 8 bits to float (mode F) in [0, 255], as scale_array does."""
    return Image.fromarray(scale_array(np.asarray(image), value_range, is_16_bit, path))


def scale_array(values: np.ndarray, value_range: ValueRange | None, is_16_bit: bool, path: Path) -> np.ndarray:
    """Convert values of any shape to float32 in [0, 255]: 0 is the lower end of their range, 255 the upper.

    Values outside are clipped, of which it is warned once for a range; nan becomes 0.
    raises: ValueError for values that need a range, if it is None
    """
    values = values.astype(np.float64)
    low, high = value_range or full_range(values, is_16_bit)
    scaled = 255 * (values - low) / (high - low)
    outside = ~((scaled >= 0) & (scaled <= 255))  # also nan
    if outside.any() and (low, high) not in clipped_ranges:
        clipped_ranges.add((low, high))
        share = f"{100 * outside.mean():.2g}% of its values are outside the range {low:g},{high:g}"
        warn(f"{path}: {share}, and clipped; of other images it is not said")
    return np.nan_to_num(scaled, nan=0.0).clip(0, 255).astype(np.float32)


def full_range(values: np.ndarray, is_16_bit: bool) -> ValueRange:
    """Return the range of values for which none is declared: 0-65535 of unsigned 16 bits, else 0-1."""
    low, high = (0.0, 65535.0) if is_16_bit else (0.0, 1.0)
    finite = values[np.isfinite(values)]
    slack = TOLERANCE * (high - low)
    if finite.size and not (low - slack <= finite.min() and finite.max() <= high + slack):
        found = f"values from {finite.min():g} to {finite.max():g}, and no range is known for them"
        raise ValueError(
            f"{found}; state it with --range_A or --range_B, such as --range_A {finite.min():g},{finite.max():g}"
        )
    return low, high


def values_image(x: Tensor, size: tuple[int, int], value_range: ValueRange) -> Image.Image:
    """Turn an output of a network, (C, H, W) in [-1, 1], into greys in units of its domain, mode F, of (width, height)."""
    low, high = value_range
    grey = x.float().mean(0).clamp(-1, 1)
    image = Image.fromarray((low + (high - low) * (grey + 1) / 2).numpy())
    if image.size == size:
        return image
    values = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray(values.clip(low, high))  # interpolation overshoots
