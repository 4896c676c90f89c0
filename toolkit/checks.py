"""What a person should know of a data set before it is trained on: odd images, and the same image twice.

facts, fault = check_split(folder / "trainA", most_cells=0)
twins = find_twins({path.relative_to(folder): fact.pixels for path, fact in facts.items()})
remove_twins(folder, twins, [path.relative_to(folder) for path in facts])
"""

import hashlib
import itertools
import math
import os
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from datasets import spread
from toolkit import images
from utils import InputError, counted, one_line, say, warn

FEW = 6  # are named, others only counted
GREY_LEVELS = 6  # between the colours of a grey image, at most, in means over 32x32 parts: JPEG adds some
SMALL = 256  # px, the usual size of a training; below it, and below half the median of its part, a side is very small
SHEET_CELL = 160  # px, side of an image on a sheet with names
LONG = 3  # times as long as wide is very elongated: squeezed in training until nobody knows it


@dataclass
class Facts:
    """What check keeps of one image."""

    pixels: bytes  # hash of its size and pixels
    size: tuple[int, int]  # width, height, px
    is_grey: bool
    cell: Image.Image | None  # the image reduced for the sheet, where it is chosen for it


def look_at(path: Path, with_cell: bool) -> Facts:
    """Read one image whole.

    raises: UnreadableImage
    """
    image = images.read_image(path)
    pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    colours = np.ptp(np.asarray(image.resize((32, 32), Image.Resampling.BOX)), axis=2)
    is_grey = bool(colours.max() <= GREY_LEVELS)
    return Facts(pixels, image.size, is_grey, sheet_cell(image) if with_cell else None)


def check_split(split: Path, most_cells: int) -> tuple[dict[Path, Facts], str]:
    """Read every image of one part whole and print what it holds.

    most_cells: so many images, evenly spread, keep a cell for the sheet
    returns:    facts by path, and what makes the part unusable, or ""
    """
    paths = images.list_images(split)
    chosen = set(spread(paths, most_cells))
    facts = {}
    for path in tqdm(paths, desc=split.name, leave=False):
        try:
            facts[path] = look_at(path, path in chosen)
        except images.UnreadableImage as error:
            say(f"  unreadable: {path} ({error})")
    faults = len(paths) - len(facts)
    sizes = Counter(fact.size for fact in facts.values())
    common = [f"{count} of {w}x{h}" for (w, h), count in sizes.most_common(3)] or ["nothing readable"]
    if len(sizes) > 3:
        common.append(counted(len(sizes) - 3, "other size"))
    say(f"{split.name}: {counted(len(paths), 'image')}, {faults} unreadable; {', '.join(common)} px")
    if not facts:
        return facts, f"{split.name} holds no readable image"
    for words, odd in odd_images(facts).items():
        if odd:
            say(f"  {len(odd)} {words}: {some([path.relative_to(split.parent) for path in odd])}")
    fault = f"{faults} of {len(paths)} images in {split.name} are unreadable, more than {images.BAD_FRACTION:.0%}"
    return facts, fault if faults > max(1, images.BAD_FRACTION * len(paths)) else ""


def odd_images(facts: dict[Path, Facts]) -> dict[str, list[Path]]:
    """Find the images of one part that a person should look at, by what is odd about them."""
    grey = [path for path, fact in facts.items() if fact.is_grey]
    if 2 * len(grey) > len(facts):  # a grey data set
        grey = []
    sides = {path: min(fact.size) for path, fact in facts.items()}
    limit = min(SMALL, statistics.median(sides.values()) / 2)
    return {
        "grey among coloured ones": grey,
        f"very small (a side under {limit:g} px)": [path for path, side in sides.items() if side < limit],
        f"very elongated (over {LONG:g}:1)": [p for p, fact in facts.items() if max(fact.size) > LONG * sides[p]],
    }


def some(paths: Sequence[Path]) -> str:
    """Name the first few, and count the others."""
    more = f" and {len(paths) - FEW} more" if len(paths) > FEW else ""
    return ", ".join(map(str, paths[:FEW])) + more


def find_twins(pixels: dict[Path, bytes]) -> list[list[Path]]:
    """Group the images with the same pixels, print the groups and count them; paths begin with their part."""
    owners = defaultdict(list)
    for path, value in pixels.items():
        owners[value].append(path)
    twins = [paths for paths in owners.values() if len(paths) > 1]
    leaks = []
    for paths in twins:
        kinds = {path.parts[0][:-1] for path in paths}
        if "train" in kinds and len(kinds) > 1:
            leaks.append(paths)
    for paths in [*leaks, *(paths for paths in twins if paths not in leaks)][:FEW]:
        say(f"  the same image: {' = '.join(map(str, paths))}")
    if len(twins) > FEW:
        say(f"  and {len(twins) - FEW} more")
    say(f"images that stand more than once: {len(twins)}; in train and also in test or val: {len(leaks)}")
    return twins


def extra_twins(twins: Sequence[Sequence[Path]]) -> dict[Path, Path]:
    """Choose one of each image of a domain to stay: in test, else in val, else the first.

    returns: the path that stays by the path of each of the others
    """
    extra = {}
    for paths in twins:
        for domain in "AB":
            own = [path for path in paths if path.parts[0].endswith(domain)]
            own.sort(key=lambda path: ("test", "val", "train").index(path.parts[0][:-1]))
            for path in own[1:]:
                extra[path] = own[0]
    return extra


def real_place(path: Path) -> Path:
    """Where a file or link itself stands, whatever linked folders lead there; a link at the end is not followed."""
    return Path(os.path.realpath(path.parent), path.name)


def needed_places(folder: Path, paths: Iterable[Path]) -> set[Path]:
    """The places of a data set that readers come to by another name than their own: no image may be moved from there.

    paths:   all images of the data set, beginning with their part
    returns: real places that a link below `folder` leads to, by way of other links, too, and those of images which
             stand in two parts because one part is a link to the other
    """
    names = Counter(real_place(folder / path) for path in paths)
    needed = set()
    for part in folder.iterdir():
        for place in (part, *part.rglob("*")):
            while place.is_symlink():
                place = real_place(place.parent / place.readlink())
                if place in needed:  # it was followed before, or leads in a circle
                    break
                needed.add(place)
    return needed | {place for place, count in names.items() if count > 1}


def remove_twins(folder: Path, twins: Sequence[Sequence[Path]], paths: Collection[Path]) -> None:
    """Move all but one of each image of a domain to removed/.

    Nothing is deleted or replaced: where a name is taken there, another is found. What a link leads to stays, so that
    every link stays readable, also one that is moved.
    paths:  all images of the data set; these and the twins' paths begin with their part
    raises: InputError, and moves nothing, if no image would be left in a part
    """
    extra = extra_twins(twins)
    counts = Counter(path.parts[0] for path in paths)
    for part, count in Counter(path.parts[0] for path in extra).items():
        if count == counts[part]:
            words = f"all {count} images of {part} stand elsewhere, too; nothing is moved"
            raise InputError(
                f"--remove_twins: {words}; make the parts of different images with: python prepare.py split"
            )
    needed = needed_places(folder, paths)
    moved = []
    for path in extra:
        source = folder / path
        if real_place(source) in needed:
            warn(f"{source} stays, though {folder / extra[path]} is the same image: a link leads to it")
            continue
        target = folder / "removed" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        numbers = itertools.count(2)
        while os.path.lexists(target):
            target = target.with_name(f"{path.stem}_{next(numbers)}{path.suffix}")
        if source.is_symlink():  # a relative link would lead nowhere from there
            target.symlink_to(source.resolve())
            source.unlink()
        else:
            shutil.move(source, target)
        moved.append(path)
    say(f"moved {counted(len(moved), 'image')} to {folder / 'removed'}{': ' if moved else ''}{some(moved)}")
    both = [paths for paths in twins if len({path.parts[0][-1] for path in paths}) > 1]
    if both:
        say(f"images that stand in both domains and stay: {len(both)}; which one is right, only you can tell")


# ---------------------------------------------------------------------------------------------
# The sheet


def sheet_cell(image: Image.Image) -> Image.Image:
    """Reduce an image to a cell of a sheet, or enlarge it by a whole factor as far as it fits."""
    factor = SHEET_CELL // max(image.size)
    if factor > 1:
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    cell = image.copy()
    cell.thumbnail((SHEET_CELL, SHEET_CELL))
    return cell


def draw_sheet(rows: Sequence[Mapping[str, Mapping[str, Image.Image]]], columns: int = 4) -> Image.Image:
    """Lay out images with their names: in each row blocks beside each other, such as trainA and trainB.

    rows: images of at most SHEET_CELL px a side, by name, by title of the block; a row without images is left out
    """
    import matplotlib  # whose font has the letters of most languages; that of Pillow has those of English

    step = SHEET_CELL + 8
    rows = [row for row in rows if any(row.values())]
    lines = [math.ceil(max(map(len, row.values())) / columns) for row in rows]
    width = max((len(row) for row in rows), default=0) * (columns * step + 16)
    sheet = Image.new("RGB", (width, sum(28 + count * (step + 16) for count in lines)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 11)
    top = 0
    for row, count in zip(rows, lines, strict=True):
        for number, (title, cells) in enumerate(row.items()):
            left = number * (columns * step + 16) + 12
            draw.text((left, top + 6), title, fill="black", font=ImageFont.load_default(16))
            for i, (name, cell) in enumerate(cells.items()):
                x = left + i % columns * step
                y = top + 28 + i // columns * (step + 16)
                sheet.paste(cell, (x + (SHEET_CELL - cell.width) // 2, y + (SHEET_CELL - cell.height) // 2))
                draw.text((x, y + SHEET_CELL + 2), shortened(name, font), fill="black", font=font)
        top += 28 + count * (step + 16)
    return sheet


def shortened(name: str, font: ImageFont.FreeTypeFont) -> str:
    """The end of a name, which tells numbered files apart, as far as it fits below a cell of a sheet."""
    name = one_line(name)
    if font.getlength(name) <= SHEET_CELL:
        return name
    while font.getlength(f"...{name}") > SHEET_CELL:
        name = name[1:]
    return f"...{name}"
