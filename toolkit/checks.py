"""Inspection of a data set before training: odd images, duplicates, a sheet to look at."""

import hashlib
import itertools
import re
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from datasets import split_folder, spread
from toolkit import images, pages
from toolkit.values import ValueRange
from utils import InputError, counted, say

NAMED = 6  # paths in a message
LABELS = 32  # colours, at most, of an image that counts as a map of labels: photos have hundreds at least
SHEET_COLUMNS = 4  # of each domain


class ImageFacts(NamedTuple):
    """What the inspection keeps of one image."""

    digest: bytes  # of its size and pixels; of a whole file, those of all its pages
    size: tuple[int, int]  # width, height, px
    is_grey: bool
    is_label: bool  # whether it has few colours


def inspect_image(path: Path) -> ImageFacts:
    """Read one image completely, and the other pages of its file if it stands for all; raises UnreadableImage."""
    facts = inspect_page(path)
    count = images.pages_in(path)
    if count == 1:
        return facts
    digests = [inspect_page(pages.page_path(path, number)).digest for number in range(count)]
    return facts._replace(digest=digest_of_all(digests))


def digest_of_all(digests: Sequence[bytes]) -> bytes:
    """Return the digest of a file from those of its pages."""
    return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()


def digests_of_files(facts: Mapping[Path, ImageFacts], folder: Path, split: str) -> dict[Path, bytes]:
    """Return the digests of the files that the images of a split are in, by their path in the data set.

    folder: of the split; its name may differ, as in train/A, but paths begin with the usual one
    """
    found = defaultdict(list)
    for path, fact in facts.items():
        found[split / pages.file_of(path).relative_to(folder)].append(fact.digest)
    return {file: digest_of_all(digests) for file, digests in found.items()}


def inspect_page(path: Path) -> ImageFacts:
    """Read one image completely; raises UnreadableImage."""
    page = images.read_page(path)  # with all its bands
    values = page.values if page else images.read_values(path)
    if values is not None:  # the file's own, since its range is not known
        digest = hashlib.sha256(repr(values.shape).encode() + values.tobytes()).digest()
        return ImageFacts(digest, (values.shape[1], values.shape[0]), values.ndim == 2, False)
    image: Any = images.read_image(path)
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    colours = np.ptp(np.asarray(image.resize((32, 32), Image.Resampling.BOX)), axis=2)
    is_label = image.getcolors(LABELS) is not None
    return ImageFacts(
        digest, image.size, bool(colours.max() <= 6), is_label
    )  # of 255, because JPEG adds some colour to grey


def check_split(dataset: Path, split: str) -> tuple[dict[Path, ImageFacts], str]:
    """Read every image of one split, and print what it contains; returns facts by path, and what makes it unusable."""
    folder = split_folder(dataset, split)
    paths = images.list_images(folder)
    facts = {}
    for path in tqdm(paths, desc=split, leave=False):
        try:
            facts[path] = inspect_image(path)
        except images.UnreadableImage as error:
            say(f"  unreadable: {path} ({error})")
    unreadable = len(paths) - len(facts)
    sizes = Counter(fact.size for fact in facts.values())
    common = [f"{count} of {w}x{h}" for (w, h), count in sizes.most_common(3)] or ["nothing readable"]
    if len(sizes) > 3:
        common.append(counted(len(sizes) - 3, "other size"))
    say(f"{split}: {counted(len(paths), 'image')}, {unreadable} unreadable; {', '.join(common)} px")
    if not facts:
        return facts, f"{split} holds no readable image"
    for description, odd in odd_images(facts).items():
        if odd:
            names = ", ".join(str(split / path.relative_to(folder)) for path in odd[:NAMED])
            say(f"  {len(odd)} {description}: {names}{', ...' if odd[NAMED:] else ''}")
    is_training = split.startswith("train")
    for advice in (shape_advice(facts), label_advice(facts, split[-1])) if is_training else ():
        if advice:
            say(f"  {advice}")
    fault = f"{unreadable} of {len(paths)} images in {split} are unreadable, more than {images.BAD_FRACTION:.0%}"
    return facts, fault if unreadable > max(1, images.BAD_FRACTION * len(paths)) else ""


def odd_images(facts: dict[Path, ImageFacts]) -> dict[str, list[Path]]:
    """Find the images of one split that a person should look at, by what is odd about them."""
    grey = [path for path, fact in facts.items() if fact.is_grey]
    sides = {path: sorted(fact.size) for path, fact in facts.items()}
    limit = min(256, statistics.median(shorter for shorter, _ in sides.values()) / 2)  # 256 px: usual in training
    return {
        "grey among coloured ones": grey if 2 * len(grey) <= len(facts) else [],
        f"very small (a side under {limit:g} px)": [path for path in sides if sides[path][0] < limit],
        "very elongated (over 3:1)": [path for path, (a, b) in sides.items() if b > 3 * a],  # squeezed in training
    }


def shape_advice(facts: Mapping[Path, ImageFacts]) -> str:
    """Say how far a square training size stretches the images of a split, and what avoids it; "" if hardly."""
    shapes = [fact.size[0] / fact.size[1] for fact in facts.values()]
    factors = [max(shape, 1 / shape) for shape in shapes]
    if max(factors) < 1.05:
        return ""
    stretched = f"a square training size stretches them {statistics.median(factors):.2f} times (median)"
    remedy = "--preprocess scale_shortside_and_crop keeps their shapes"
    if max(shapes) / min(shapes) < 1.05:
        shape = statistics.median(shapes)
        height, width = 4 * round(64 / max(1, shape)), 4 * round(64 * min(1, shape))
        remedy += f", and so does --img_height {height} --img_width {width}"
    return f"{stretched}, at most {max(factors):.2f} times; {remedy}"


def label_advice(facts: Mapping[Path, ImageFacts], domain: str) -> str:
    """Recommend --resample nearest if nearly all images of a split have few colours; else ""."""
    count = sum(fact.is_label for fact in facts.values())
    if count < 0.9 * len(facts):
        return ""
    found = f"{count} of {len(facts)} have at most {LABELS} colours"
    return f"{found}; if these are labels, --resample_{domain} nearest mixes no new ones"


def find_duplicates(digests: dict[Path, bytes]) -> list[list[Path]]:
    """Group the images with the same pixels, by their path in the data set; print the first groups, and how many there are."""
    by_digest = defaultdict(list)
    for path, digest in digests.items():
        by_digest[digest].append(path)
    groups = [paths for paths in by_digest.values() if len(paths) > 1]
    leaks = []
    for paths in groups:
        kinds = {path.parts[0][:-1] for path in paths}  # of split
        if "train" in kinds and len(kinds) > 1:
            leaks.append(paths)
    for paths in sorted(groups, key=lambda paths: paths not in leaks)[:NAMED]:
        say(f"  the same image: {' = '.join(map(str, paths))}")
    say(f"images that occur more than once: {len(groups)}; in train and also in test or val: {len(leaks)}")
    return groups


def extra_copies(groups: Sequence[Sequence[Path]]) -> list[Path]:
    """List the duplicates except one per image and domain: the one in test, else in val, else the first."""
    extra = []
    for paths, domain in itertools.product(groups, "AB"):
        own = [path for path in paths if path.parts[0].endswith(domain)]
        own.sort(key=lambda path: ("test", "val", "train").index(path.parts[0][:-1]))
        extra += own[1:]
    return extra


def partner_names(path: Path) -> set[Path]:
    """Return the names, without suffix, that the partner of an image may have: testB/1 of testA/1, also testB/1_B of testA/1_A."""
    split = path.parts[0]
    domain, other = split[-1], {"A": "B", "B": "A"}[split[-1]]
    same = Path(split[:-1] + other, *path.with_suffix("").parts[1:])
    return {same, same.with_name(re.sub(rf"(?<=.[_-]){domain}$", other, same.name))}


def left_without_partner(paths: Collection[Path], moved: Collection[Path]) -> list[Path]:
    """List the val and test images that remain, whose partner in the other domain is moved."""
    remaining = [path for path in paths if path not in moved and path.parts[0][:-1] in ("val", "test")]
    present = {path.with_suffix("") for path in remaining}
    gone = {path.with_suffix("") for path in moved}
    left = [path for path in remaining if not present & partner_names(path)]
    return [path for path in left if gone & partner_names(path)]


def remove_duplicates(folder: Path, groups: Sequence[Sequence[Path]], paths: Collection[Path]) -> None:
    """Move the extra copies among `paths`, the images of the data set, to removed/.

    raises: InputError, and moves nothing, if an image is a link, or if no image would be left in a split
    """
    places = {path: split_folder(folder, path.parts[0]).joinpath(*path.parts[1:]) for path in paths}
    links = [path for path in paths if places[path].resolve() != folder.resolve() / places[path].relative_to(folder)]
    if links:
        raise InputError(f"--remove_twins: does not move links such as {links[0]}; replace them by their files")
    moved = extra_copies(groups)
    counts = Counter(path.parts[0] for path in paths)
    for split, count in Counter(path.parts[0] for path in moved).items():
        if count == counts[split]:
            raise InputError(f"--remove_twins: all {count} images of {split} occur elsewhere; split them anew")
    for path in moved:
        target = folder / "removed" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        numbers = itertools.count(2)
        while target.exists():
            target = target.with_name(f"{path.stem}_{next(numbers)}{path.suffix}")
        shutil.move(places[path], target)
    say(f"moved {counted(len(moved), 'image')} to {folder / 'removed'}")
    both = [group for group in groups if len({path.parts[0][-1] for path in group}) > 1]
    if both:
        say(f"  in both domains, and not moved: {counted(len(both), 'image')}; remove the wrong copies by hand")
    left = left_without_partner(paths, set(moved))
    if left:  # these would have no truth in paired scores
        names = ", ".join(map(str, left[:NAMED])) + (", ..." if left[NAMED:] else "")
        found = f"{counted(len(left), 'image')} whose partner was moved: {names}"
        say(f"  {found}; of a paired set, move these too")


def draw_sheet(splits: Mapping[str, list[Path]], ranges: Mapping[str, ValueRange | None]) -> Image.Image:
    """Draw readable images by split, evenly spread: those of A on the left, of B on the right; at least one is needed."""
    rows = []
    for kind, most in (("train", 16), ("val", 4), ("test", 8)):
        chosen = [spread(splits.get(f"{kind}{domain}", []), most) for domain in "AB"]
        for i in range(0, max(map(len, chosen)), SHEET_COLUMNS):
            cells = torch.ones(2 * SHEET_COLUMNS + 1, 3, images.CELL, images.CELL)  # white; the middle remains a gap
            for domain, start, paths in zip("AB", (0, SHEET_COLUMNS + 1), chosen, strict=True):
                for column, path in enumerate(paths[i : i + SHEET_COLUMNS], start):
                    image = images.to_8_bit(images.read_image(path, value_range=ranges[domain])).convert("RGB")
                    image = ImageOps.pad(image, (images.CELL, images.CELL), color="white")
                    cells[column] = images.image_to_tensor(image)
            rows.append((f"{kind}A | {kind}B", cells))
    return images.draw_grid(rows)
