"""Image files that Pillow cannot read, or does not read exactly: one table of readers, and what they yield.

Everything else is read by Pillow (toolkit/images.py). Libraries other than numpy are optional.
"""

import functools
import importlib.util
import logging
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

INSTALL = "pip install -r requirements-science.txt"
MOST_BANDS = 16
MOST_PAGES = 100_000  # of a file; a damaged header may claim any number
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JPEG_2000_MAGIC = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
FULL = {"u1": 255.0, "u2": 65535.0}  # opaque, by the type of the values; of floats 1


class UnreadableImage(Exception):
    """Raised for a file that is not a complete image, whatever is wrong with it."""


class Layout(NamedTuple):
    """What the header of a file says."""

    pages: int
    height: int
    width: int


class Page(NamedTuple):
    """One image of a file."""

    values: np.ndarray  # (H, W) or (H, W, bands), in native byte order; uint8: levels, else in the units of the file
    has_alpha: bool = False  # whether the last band is transparency, from 0 to FULL
    profile: bytes | None = None  # ICC


class Reader(NamedTuple):
    """A kind of file, and how it is read."""

    suffixes: tuple[str, ...]
    package: str
    yields: str
    layout: Callable[[Path], Layout]  # reads the header alone
    read: Callable[[Path, int], Page]  # one page, from 0 on

    @property
    def missing(self) -> str:
        """The command that installs the package; "" if it is there."""
        return "" if is_installed(self.package) else INSTALL


@functools.cache
def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def suffix_of(path: Path) -> str:
    """Return the suffix of a file in lower case; "" for numbers, with which names of DICOM files end; .nii.gz is one."""
    if path.name.lower().endswith(".nii.gz"):
        return ".nii.gz"
    return "" if path.suffix[1:].isdecimal() else path.suffix.lower()


def without_suffix(path: Path) -> Path:
    """Return a path without its suffix, as of suffix_of."""
    suffix = suffix_of(path)
    return path.with_name(path.name[: -len(suffix)]) if suffix and path.name.lower() != suffix else path


def quiet(package: str) -> Any:
    """Import tifffile or nibabel, and drop what they log about odd headers."""
    if package == "tifffile":
        import tifffile as library
    else:
        import nibabel as library
    logging.getLogger({"nibabel": "nibabel.global"}.get(package, package)).setLevel(logging.CRITICAL)
    return library


def native(values: np.ndarray) -> np.ndarray:
    """Return values in native byte order, contiguous, which torch and Pillow need."""
    return np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="), copy=False))


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, ...) upright, as the Orientation tag of TIFF and EXIF says."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return values[::rows, ::columns]


def looks_like_mask(alpha: np.ndarray) -> bool:
    """Whether a band in [0, 1] that is called transparency is that: half of it is opaque or transparent, not all of it transparent."""
    return bool(alpha.any() and np.mean((alpha == 0) | (alpha == 1)) >= 0.5)


# -- numpy -----------------------------------------------------------------------------------------


def array_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an array that is an image; raises ValueError for others."""
    if len(shape) == 2 or (len(shape) == 3 and 1 <= shape[2] <= MOST_BANDS):
        return shape
    raise ValueError(f"an array of shape {shape}; expected (H, W), or (H, W, bands) with 1 to {MOST_BANDS} bands")


def numpy_layout(path: Path) -> Layout:
    """Read the headers of a .npy file, or of the arrays in a .npz file, which are its pages."""
    if suffix_of(path) == ".npy":
        return Layout(1, *array_shape(np.load(path, mmap_mode="r", allow_pickle=False).shape)[:2])
    sizes = []
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                is_old = np.lib.format.read_magic(file) == (1, 0)
                read = np.lib.format.read_array_header_1_0 if is_old else np.lib.format.read_array_header_2_0
                sizes.append(array_shape(read(file)[0])[:2])
    height, width = max(sizes, key=math.prod)
    return Layout(len(sizes), height, width)


def read_numpy(path: Path, page: int) -> Page:
    """Read an array; truth values become 0 and 255."""
    values: Any = np.load(path, allow_pickle=False)
    if suffix_of(path) == ".npz":
        with values as arrays:
            values = arrays[arrays.files[page]]
    array_shape(values.shape)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"an array of {values.dtype}; expected numbers")
    values = values * np.uint8(255) if values.dtype.kind == "b" else values
    return Page(native(values))


# -- DICOM -----------------------------------------------------------------------------------------


def dicom_frames(data: Any) -> int:
    """Return the number of frames in a DICOM file."""
    return int(data.get("NumberOfFrames") or 1)


def dicom_layout(path: Path) -> Layout:
    """Read the header of a DICOM file; raises ValueError for one without an image."""
    import pydicom

    wanted = ["NumberOfFrames", "Rows", "Columns"]
    data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=wanted)
    if not data.get("Rows") or not data.get("Columns"):
        raise ValueError("holds no image")
    return Layout(dicom_frames(data), int(data.Rows), int(data.Columns))


def rescale_of(data: Any, frame: int) -> tuple[float, float]:
    """Return slope and intercept of a frame: its own, those that all frames share, or those of the file."""
    groups = [data]
    for name, number in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        if len(data.get(name) or ()) > number:
            groups += data[name][number].get("PixelValueTransformationSequence") or ()
    found = (1.0, 0.0)
    for group in groups:
        if "RescaleSlope" in group:
            found = float(group.RescaleSlope), float(group.get("RescaleIntercept") or 0)
    return found


def read_dicom(path: Path, page: int) -> Page:
    """Read a frame in the units of the file, such as Hounsfield units; greys of 8 bits without a rescaling remain levels.

    MONOCHROME1, in which small values are white, is inverted within the stored bits. pydicom does none of that by itself.
    """
    import pydicom
    from pydicom.pixels import apply_color_lut, pixel_array

    data = pydicom.dcmread(path)
    stored = pixel_array(data, index=page)
    kind = data.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, data)
        return Page(native(stored if stored.dtype == np.uint8 else (stored >> 8).astype(np.uint8)))
    if stored.ndim == 3 and stored.dtype == np.uint8:
        return Page(native(stored))
    slope, intercept = rescale_of(data, page)
    if kind == "MONOCHROME1":
        top = -1 if data.PixelRepresentation else 2**data.BitsStored - 1
        stored = (top - stored.astype(np.int64)).astype(stored.dtype)
    if stored.dtype == np.uint8 and (slope, intercept) == (1, 0):
        return Page(native(stored))
    return Page(native((stored * slope + intercept).astype(np.float32)))


# -- NIfTI -----------------------------------------------------------------------------------------


def nifti_axes(image: Any) -> list[tuple[int, int]]:
    """Return where each of the first three axes of an array points: 0 right, 1 front, 2 up; and 1, or -1 for the other way."""
    import nibabel

    if len(image.shape) < 2 or image.get_data_dtype().fields:
        raise ValueError(f"an array {image.shape} of {image.get_data_dtype()}; expected slices of numbers")
    if len(image.shape) == 2:  # without a third direction
        return [(0, 1), (1, 1), (2, 1)]
    return [(int(axis), int(sign)) for axis, sign in nibabel.io_orientation(image.affine)]


def nifti_layout(path: Path) -> Layout:
    """Count the axial slices of a volume; those of several volumes follow one after the other."""
    image: Any = quiet("nibabel").load(path)
    sides = [(*image.shape, 1)[:3][[axis for axis, _ in nifti_axes(image)].index(i)] for i in range(3)]
    return Layout(sides[2] * math.prod(image.shape[3:]), sides[1], sides[0])


def read_nifti(path: Path, page: int) -> Page:
    """Read an axial slice in the file's units, as radiologists see it: the patient's right is left, the front above.

    Slices are counted from the feet. Only one is read, unless the file is compressed.
    """
    image: Any = quiet("nibabel").load(path)
    axes = nifti_axes(image)
    order = [axis for axis, _ in axes]
    upward = order.index(2)
    shape = (*image.shape, 1)[:3]
    volume, k = divmod(page, shape[upward])
    index: list[Any] = [slice(None)] * min(3, len(image.shape))
    if upward < len(index):
        index[upward] = k if axes[upward][1] > 0 else shape[upward] - 1 - k
    index += np.unravel_index(volume, image.shape[3:], order="F") if len(image.shape) > 3 else ()
    values = np.asarray(image.dataobj[tuple(index)]).astype(np.float32)
    left = [axis for i, axis in enumerate(axes) if i != upward]
    values = values[tuple(slice(None, None, sign) for _, sign in left)]  # now towards right and front
    values = values if left[0][0] == 0 else values.T
    return Page(native(values[::-1, ::-1].T))


# -- TIFF ------------------------------------------------------------------------------------------


def tiff_tags(path: Path) -> dict[int, Any] | None:
    """Return the tags of a TIFF file's first page; None if Pillow cannot open it."""
    try:
        with Image.open(path, formats=["TIFF"]) as image:
            return dict(image.tag_v2)  # ty: ignore[missing-attribute]
    except Exception:  # noqa: BLE001 (Pillow raises a dozen types)
        return None


def is_beyond_pillow(path: Path, has_tifffile: bool) -> bool:
    """Whether Pillow cannot read all bands and bits of a TIFF file; of two or four of 8 bits only if something else can."""
    tags = tiff_tags(path)
    if tags is None:
        return True
    samples = tags.get(277, 1)
    is_deep = max(tags.get(258, (8,))) > 8
    if samples not in (1, 3) and tags.get(262) in (0, 1, 2) and has_tifffile:
        return True  # Pillow drops the last of two or four bands, or takes it for transparency
    return is_deep and (samples > 2 or tags.get(284) == 2)


def open_series(file: Any) -> tuple[Any, list[int], int | None]:
    """Return the first series of a TIFF file in full size, the axes that count its pages, and that of its bands."""
    level = file.series[0].levels[0]
    axes = level.axes
    bands = axes.find("S") if "S" in axes else axes.find("C")
    if "Y" not in axes or "X" not in axes:
        raise ValueError(f"axes {axes}; expected images")
    pages = [i for i, axis in enumerate(axes) if axis not in "YX" and i != bands]
    return level, pages, None if bands < 0 else bands


def tiff_layout(path: Path) -> Layout:
    """Read the header of a TIFF file."""
    with quiet("tifffile").TiffFile(path) as file:
        level, pages, _ = open_series(file)
        sides = dict(zip(level.axes, level.shape, strict=True))
        return Layout(math.prod(level.shape[i] for i in pages), sides["Y"], sides["X"])


def read_tiff(path: Path, page: int) -> Page:
    """Read a page with all its bands, as the tags say: transparency, orientation, white as 0, colour profile."""
    with quiet("tifffile").TiffFile(path) as file:
        level, pages, bands = open_series(file)
        first = level.keyframe
        if first.photometric not in (0, 1, 2, 6):  # greys, RGB, YCbCr
            raise ValueError(f"{first.photometric.name} of more than 8 bits; convert it to RGB")
        count = math.prod(level.shape[i] for i in pages)
        if count > 1 and count == len(level.pages) and level.axes[-2:] in ("YX", "XS"):  # else all are read
            values = file.asarray(key=page, series=0, level=0)
            order = "YXS"[: values.ndim]
        else:
            values = level.asarray().transpose([*pages, *(i for i in range(len(level.shape)) if i not in pages)])
            values = values.reshape(count, *values.shape[len(pages) :])[page]
            order = "".join(axis for i, axis in enumerate(level.axes) if i not in pages)
        rest = [order.index("Y"), order.index("X")]
        rest += [] if bands is None else [3 - sum(rest)]
        values = values.transpose(rest)
        tag = first.tags.get(274)
        profile = first.tags.get(34675)
        if first.photometric == 0:
            values = (2**first.bitspersample - 1 if values.dtype.kind == "u" else 1) - values
        extra = tuple(first.extrasamples or ())
    values = native(turned(values, tag.value if tag else 1))
    if values.ndim == 3 and values.shape[2] in (2, 4) and extra and extra[-1] in (1, 2):
        values, has_alpha = with_straight_alpha(values, extra[-1] == 1)
    else:
        has_alpha = False
    return Page(values, has_alpha, profile.value if profile else None)


def with_straight_alpha(values: np.ndarray, is_premultiplied: bool) -> tuple[np.ndarray, bool]:
    """Decide whether the last band is transparency, or infrared that is called so; undo the product with it, if it is."""
    alpha = values[..., -1:] / FULL.get(values.dtype.str[1:], 1.0)
    if not looks_like_mask(alpha):
        return values, False
    if is_premultiplied:
        colours = values[..., :-1] / np.where(alpha > 0, alpha, 1)
        values = np.dstack([colours.clip(0, FULL.get(values.dtype.str[1:])).astype(values.dtype), values[..., -1:]])
    return values, True


# -- PNG and JPEG 2000 in colour of more than 8 bits -----------------------------------------------


def jpeg2000_bits(path: Path) -> tuple[int, int]:
    """Return bands and bits of a JPEG 2000 file, from the header of its codestream; 0, 0 if there is none."""
    data = path.read_bytes()
    start = data.find(b"\xff\x4f\xff\x51")  # start of codestream, image size (ITU-T T.800, A.5.1)
    if not 0 <= start < len(data) - 42:
        return 0, 0
    return int.from_bytes(data[start + 40 : start + 42], "big"), 1 + (data[start + 42] & 0x7F)


def codec_layout(path: Path) -> Layout:
    """Read the header of a PNG or JPEG 2000 file."""
    with Image.open(path, formats=["PNG", "JPEG2000"]) as image:
        return Layout(1, image.height, image.width)


def read_codec(path: Path, page: int) -> Page:
    """Read a colour PNG of 16 bits, or a colour JPEG 2000 of more than 8, whose levels become those of 16 bits."""
    import imagecodecs

    with Image.open(path, formats=["PNG", "JPEG2000"]) as image:
        profile = image.info.get("icc_profile")
        orientation = image.getexif().get(274, 1)
        is_png = image.format == "PNG"
    data = path.read_bytes()
    values = imagecodecs.png_decode(data) if is_png else imagecodecs.jpeg2k_decode(data)
    if not is_png:
        _, bits = jpeg2000_bits(path)
        values = (values * (65535 / (2**bits - 1))).round().astype(np.uint16)
    has_alpha = values.ndim == 3 and values.shape[2] in (2, 4)
    return Page(native(turned(values, orientation)), has_alpha, profile)


# -- the table -------------------------------------------------------------------------------------

NUMPY = Reader((".npy", ".npz"), "numpy", "arrays (H, W) or (H, W, bands)", numpy_layout, read_numpy)
DICOM = Reader((".dcm", ".dicom"), "pydicom", "frames in rescaled values (Hounsfield units)", dicom_layout, read_dicom)
NIFTI = Reader((".nii", ".nii.gz"), "nibabel", "axial slices in scaled values", nifti_layout, read_nifti)
READERS = (NUMPY, DICOM, NIFTI)
# of these, Pillow reads what it reads exactly
TIFF = Reader((".tif", ".tiff"), "tifffile", "many bands, colour of more than 8 bits", tiff_layout, read_tiff)
CODEC = Reader((".png", ".jp2", ".j2k"), "imagecodecs", "colour of more than 8 bits", codec_layout, read_codec)

BY_SUFFIX = {suffix: reader for reader in READERS for suffix in reader.suffixes}


def first_bytes(path: Path) -> bytes:
    """Return the first 132 bytes of a file; none of one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(132)
    except OSError:
        return b""


def is_dicom(path: Path) -> bool:
    """Whether a file without suffix is a DICOM file."""
    return not suffix_of(path) and first_bytes(path)[128:] == b"DICM"


def reader_of(path: Path) -> Reader | None:
    """Return what reads a file in place of Pillow: by its suffix, else by its first bytes; None for what Pillow reads."""
    reader = BY_SUFFIX.get(suffix_of(path))
    if reader:
        return reader
    try:
        facts = path.stat()
    except OSError:  # it cannot be read either, which is said then
        return None
    return _reader_by_content(path, facts.st_size, facts.st_mtime_ns, is_installed("tifffile"))


@functools.lru_cache(maxsize=2**17)
def _reader_by_content(path: Path, size: int, changed: int, has_tifffile: bool) -> Reader | None:
    """Find what reads a file of this size and time of change, which epochs ask for again and again."""
    head = first_bytes(path)
    if head[128:] == b"DICM" and not suffix_of(path):
        return DICOM
    if head[:4] in TIFF_MAGIC and is_beyond_pillow(path, has_tifffile):
        return TIFF
    if (
        head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:25] == b"\x10" and head[25:26] in (b"\x02", b"\x04", b"\x06")
    ):  # bits, colour
        return CODEC
    if head.startswith(JPEG_2000_MAGIC):
        bands, bits = jpeg2000_bits(path)
        return CODEC if bands > 2 and bits > 8 else None
    return None


def pillow_reduces(path: Path) -> bool:
    """Whether Pillow reads the first three bands of a file rightly, in 8 of its 16 bits: if values are 0-65535, nothing shows."""
    head = first_bytes(path)
    if head[:4] not in TIFF_MAGIC:
        return head[:8] == b"\x89PNG\r\n\x1a\n"
    tags = tiff_tags(path)
    is_whole = tags is not None and tags.get(284, 1) == 1 and set(tags.get(339, (1,))) == {1}
    return bool(is_whole and tags and tags.get(262) == 2 and tags.get(277) in (3, 4))
