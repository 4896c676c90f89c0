"""Inspection of a data set before training: odd images, duplicates, a sheet to look at.

facts, fault = check_split(folder / "trainA", sheet_images=0)
duplicates = find_duplicates({path.relative_to(folder): fact.digest for path, fact in facts.items()})
remove_duplicates(folder, duplicates, [path.relative_to(folder) for path in facts])
"""

import hashlib
import itertools
import math
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from datasets import spread
from toolkit import images
from utils import InputError, counted, one_line, say

NAMED = 6  # paths in a message; the others are counted
GREY_LEVELS = 6  # largest difference between the colours of a grey image, in means over 32x32 areas: JPEG adds some
SMALL = 256  # px, the usual training size; a side is very small if it is below this and below half the median
ELONGATED = 3  # ratio of the sides from which an image is hard to recognise once it is squeezed for training
SHEET_CELL = 160  # px, side of an image on the sheet
SHEET_COLUMNS = 4  # of each block


@dataclass
class ImageFacts:
    """What the inspection keeps of one image."""

    digest: bytes  # of its size and pixels
    size: tuple[int, int]  # width, height, px
    is_grey: bool
    cell: Image.Image | None  # reduced for the sheet, if it is shown there


def inspect_image(path: Path, on_sheet: bool) -> ImageFacts:
    """Read one image completely.

    raises: UnreadableImage
    """
    image = images.read_image(path)
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    colours = np.ptp(np.asarray(image.resize((32, 32), Image.Resampling.BOX)), axis=2)
    is_grey = bool(colours.max() <= GREY_LEVELS)
    return ImageFacts(digest, image.size, is_grey, sheet_cell(image) if on_sheet else None)


def check_split(folder: Path, sheet_images: int) -> tuple[dict[Path, ImageFacts], str]:
    """Read every image of one split completely, and print what it contains.

    sheet_images: number of images, evenly spread, that keep a cell for the sheet
    returns:      facts by path, and what makes the split unusable, or ""
    """
    paths = images.list_images(folder)
    shown = set(spread(paths, sheet_images))
    facts = {}
    for path in tqdm(paths, desc=folder.name, leave=False):
        try:
            facts[path] = inspect_image(path, path in shown)
        except images.UnreadableImage as error:
            say(f"  unreadable: {path} ({error})")
    unreadable = len(paths) - len(facts)
    sizes = Counter(fact.size for fact in facts.values())
    common = [f"{count} of {w}x{h}" for (w, h), count in sizes.most_common(3)] or ["nothing readable"]
    if len(sizes) > 3:
        common.append(counted(len(sizes) - 3, "other size"))
    say(f"{folder.name}: {counted(len(paths), 'image')}, {unreadable} unreadable; {', '.join(common)} px")
    if not facts:
        return facts, f"{folder.name} holds no readable image"
    for description, odd in odd_images(facts).items():
        if odd:
            say(f"  {len(odd)} {description}: {first_names([path.relative_to(folder.parent) for path in odd])}")
    if unreadable > max(1, images.BAD_FRACTION * len(paths)):
        limit = f"{images.BAD_FRACTION:.0%}"
        return facts, f"{unreadable} of {len(paths)} images in {folder.name} are unreadable, more than {limit}"
    return facts, ""


def odd_images(facts: dict[Path, ImageFacts]) -> dict[str, list[Path]]:
    """Find the images of one split that a person should look at, by what is odd about them."""
    grey = [path for path, fact in facts.items() if fact.is_grey]
    if 2 * len(grey) > len(facts):  # a grey data set
        grey = []
    sides = {path: min(fact.size) for path, fact in facts.items()}
    limit = min(SMALL, statistics.median(sides.values()) / 2)
    elongated = [path for path, fact in facts.items() if max(fact.size) > ELONGATED * sides[path]]
    return {
        "grey among coloured ones": grey,
        f"very small (a side under {limit:g} px)": [path for path, side in sides.items() if side < limit],
        f"very elongated (over {ELONGATED}:1)": elongated,
    }


def first_names(paths: Sequence[Path]) -> str:
    """Name the first paths and count the others."""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(map(str, paths[:NAMED])) + more


# ---------------------------------------------------------------------------------------------
# Duplicates. All paths are relative to the data set: they begin with their split, such as trainA


def find_duplicates(digests: dict[Path, bytes]) -> list[list[Path]]:
    """Group the images with the same pixels; print the first groups and how many there are."""
    by_digest = defaultdict(list)
    for path, digest in digests.items():
        by_digest[digest].append(path)
    groups = [paths for paths in by_digest.values() if len(paths) > 1]
    leaks = []
    for paths in groups:
        kinds = {path.parts[0][:-1] for path in paths}
        if "train" in kinds and len(kinds) > 1:
            leaks.append(paths)
    others = [paths for paths in groups if paths not in leaks]
    for paths in (leaks + others)[:NAMED]:
        say(f"  the same image: {' = '.join(map(str, paths))}")
    if len(groups) > NAMED:
        say(f"  and {len(groups) - NAMED} more")
    say(f"images that occur more than once: {len(groups)}; in train and also in test or val: {len(leaks)}")
    return groups


def extra_copies(groups: Sequence[Sequence[Path]]) -> list[Path]:
    """List the duplicates except one per image and domain: the one in test, else in val, else the first."""
    extra = []
    for paths in groups:
        for domain in "AB":
            own = [path for path in paths if path.parts[0].endswith(domain)]
            own.sort(key=lambda path: ("test", "val", "train").index(path.parts[0][:-1]))
            extra += own[1:]
    return extra


def remove_duplicates(folder: Path, groups: Sequence[Sequence[Path]], paths: Collection[Path]) -> None:
    """Move the extra copies to removed/; nothing is deleted or replaced.

    Links, and files that an image of the data set is a link to, are not moved.
    paths:  all images of the data set
    raises: InputError, and moves nothing, if no image would be left in a split
    """
    own = {path: folder.resolve() / path for path in paths}
    real = {path: (folder / path).resolve() for path in paths}
    linked = {real[path] for path in paths if real[path] != own[path]}
    extra = extra_copies(groups)
    moved = [path for path in extra if real[path] == own[path] and own[path] not in linked]
    counts = Counter(path.parts[0] for path in paths)
    for split, count in Counter(path.parts[0] for path in moved).items():
        if count == counts[split]:
            raise InputError(
                f"--remove_twins: all {count} images of {split} occur elsewhere, too; nothing is moved; "
                "make splits of different images with: python prepare.py split"
            )
    for path in moved:
        target = folder / "removed" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        numbers = itertools.count(2)
        while target.exists():
            target = target.with_name(f"{path.stem}_{next(numbers)}{path.suffix}")
        shutil.move(folder / path, target)
    say(f"moved {counted(len(moved), 'image')} to {folder / 'removed'}{': ' if moved else ''}{first_names(moved)}")
    if len(moved) < len(extra):
        say(f"duplicates that are links, or that links point to, and were not moved: {len(extra) - len(moved)}")
    both = [group for group in groups if len({path.parts[0][-1] for path in group}) > 1]
    if both:
        say(f"images that occur in both domains and were not moved: {len(both)}; which one is right, only you can tell")


# ---------------------------------------------------------------------------------------------
# The sheet


def sheet_cell(image: Image.Image) -> Image.Image:
    """Reduce an image to a cell of the sheet, or enlarge it by a whole factor."""
    factor = SHEET_CELL // max(image.size)
    if factor > 1:
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    cell = image.copy()
    cell.thumbnail((SHEET_CELL, SHEET_CELL))
    return cell


def draw_sheet(rows: Sequence[Mapping[str, Mapping[str, Image.Image]]]) -> Image.Image:
    """Draw images with their names: each row has blocks side by side, such as trainA and trainB.

    rows: cells by file name, by title of the block; rows without cells are left out
    """
    import matplotlib  # its font has the letters of most languages, Pillow's those of English

    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 11)
    step = SHEET_CELL + 8
    block_width = SHEET_COLUMNS * step + 16
    rows = [row for row in rows if any(row.values())]
    heights = []
    for row in rows:
        lines = math.ceil(max(map(len, row.values())) / SHEET_COLUMNS)
        heights.append(28 + lines * (step + 16))
    sheet = Image.new("RGB", (max(map(len, rows), default=0) * block_width, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = sum(heights[:number])
        for block, (title, cells) in enumerate(row.items()):
            left = block * block_width + 12
            draw.text((left, top + 6), title, fill="black", font=ImageFont.load_default(16))
            for i, (name, cell) in enumerate(cells.items()):
                x = left + i % SHEET_COLUMNS * step
                y = top + 28 + i // SHEET_COLUMNS * (step + 16)
                sheet.paste(cell, (x + (SHEET_CELL - cell.width) // 2, y + (SHEET_CELL - cell.height) // 2))
                draw.text((x, y + SHEET_CELL + 2), end_of_name(name, font), fill="black", font=font)
    return sheet


def end_of_name(name: str, font: ImageFont.FreeTypeFont) -> str:
    """Return the end of a name, which tells numbered files apart, as far as it fits under a cell."""
    name = one_line(name)
    if font.getlength(name) <= SHEET_CELL:
        return name
    while font.getlength(f"...{name}") > SHEET_CELL:
        name = name[1:]
    return f"...{name}"
