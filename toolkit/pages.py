"""Files that hold several images: stacks, animations, volumes. A page is named like a file, stack_p0003.tif, which is not there."""

import functools
import re
from pathlib import Path

from PIL import Image

from toolkit.readers import without_suffix
from utils import InputError, counted, say, warn

CHOICES = ("first", "all")
FORMATS = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")  # of Pillow; the further pictures in a phone's MPO file do not count
SUFFIXES = {".apng", ".avif", ".gif", ".png", ".tif", ".tiff", ".webp", ""}
OUTCOME = {  # of listing files of several images, by choice
    "first": "the first of each is used; --pages all for all",
    "whole": "the files are copied as they are",
    "all": "each is an image of its own",
}
choice = "first"  # set by use_pages


def use_pages(chosen: str) -> None:
    """Make this process list the first image of each file, or all; "whole": files are handled as such, in prepare.py."""
    global choice
    choice = chosen


def page_path(path: Path, number: int) -> Path:
    """Name a page of a file, counted from 0."""
    return path.with_name(f"{without_suffix(path).name}_p{number + 1:04d}{path.name[len(without_suffix(path).name) :]}")


def file_and_page(path: Path) -> tuple[Path, int | None]:
    """Return the file that an image is in, and which of its pages it is, counted from 0; None for a whole file."""
    if "_p" not in path.name:  # of most files, at little cost
        return path, None
    stem = without_suffix(path).name
    match = re.fullmatch(r"(.+)_p(\d{4,})", stem)
    if match is None or path.exists():
        return path, None
    file = path.with_name(match[1] + path.name[len(stem) :])
    return (file, int(match[2]) - 1) if file.is_file() else (path, None)


def file_of(path: Path) -> Path:
    """Return the file that an image is in."""
    return file_and_page(path)[0]


def frames_of(image: Image.Image) -> list[int]:
    """List the frames of an opened image that are images of their own; in TIFF files some are thumbnails or masks."""
    count = getattr(image, "n_frames", 1) if image.format in FORMATS else 1
    if image.format != "TIFF" or count == 1:
        return list(range(count))
    frames = []
    for i in range(count):
        image.seek(i)
        if not image.tag_v2.get(254, 0) & 5:  # ty: ignore[missing-attribute]  # 1: of reduced size, 4: a mask
            frames.append(i)
    image.seek(0)
    return frames or [0]


def may_be_animated(path: Path) -> bool:
    """Whether a PNG file announces an animation; so says a chunk before its pixels."""
    with path.open("rb") as file:
        head = file.read(2**16)
    return b"acTL" in head[: head.find(b"IDAT")]


warn_once = functools.cache(warn)
say_once = functools.cache(say)


def expand(folder: Path, counts: dict[Path, int]) -> list[Path]:
    """List images by the pages of their files, as chosen, and say once how many files hold several.

    raises: InputError if a page has the name of another file
    """
    several = {path: count for path, count in counts.items() if count > 1}
    if several:
        hold = "holds" if len(several) == 1 else "hold"
        tell = warn_once if choice == "first" else say_once
        tell(f"{folder}: {counted(len(several), 'file')} {hold} {sum(several.values())} images; {OUTCOME[choice]}")
    if choice != "all":
        return list(counts)
    listed = []
    for path, count in counts.items():
        pages = [page_path(path, i) for i in range(count)] if count > 1 else [path]
        listed += pages
        for page in pages:
            if page is not path and page.exists():
                raise InputError(f"{page}: has the name of a page of {path.name}; rename one of them")
    return listed
