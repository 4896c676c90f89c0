"""Folders of results: small copies for a gallery, and which files a test may clear away.

save_thumbnail(image, output / thumbnail(Path("fake_B", "0001.png")))
sweep(output, files, inputs, network="day2night", keep=False)
"""

import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

import utils
from toolkit.files import atomic_write, write_json, write_page
from toolkit.images import LARGEST_CELL, UnreadableImage, read_image
from utils import counted, say

KINDS = ("real_A", "fake_B", "truth_B", "rec_A", "real_B", "fake_A", "truth_A", "rec_B")  # folders of results
DOMAINS = {"AtoB": ("A", "B"), "BtoA": ("B", "A")}  # source and target domain
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
WRITTEN = ".written.json"  # in a folder of results: the files that a test wrote there


def save_thumbnail(image: Image.Image, path: Path) -> None:
    """Write a JPEG of at most LARGEST_CELL px a side; its folder is made. For a smaller image one is removed."""
    if max(image.size) <= LARGEST_CELL:  # is shown as it is
        path.unlink(missing_ok=True)
        return
    small = image.copy() if max(image.size) < 4 * LARGEST_CELL else image.reduce(max(image.size) // (2 * LARGEST_CELL))
    small.thumbnail((LARGEST_CELL, LARGEST_CELL))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        small.save(temporary, format="JPEG", quality=88, subsampling=0)


def thumbnail(file: Path) -> Path:
    """Where the small copy of a result lies, beside the folders of all; there is one if the result is large."""
    return Path("thumbnails", file).with_suffix(".jpg")


def shown_file(output: Path, file: Path) -> Path:
    """The small copy of a result, or the result itself where that is small."""
    small = thumbnail(file)
    return small if (output / small).is_file() else file


def is_whole(output: Path, file: Path) -> bool:
    """Tell whether a result is there to its end and, without a small copy, can be read; then that copy is written."""
    try:
        with (output / file).open("rb") as opened:
            opened.seek(-len(PNG_END), os.SEEK_END)
            if opened.read() != PNG_END:
                return False
    except OSError:  # it is not there, or shorter than that
        return False
    if not (output / thumbnail(file)).exists():
        try:
            save_thumbnail(read_image(output / file), output / thumbnail(file))
        except UnreadableImage:
            return False
    return True


def stamp(path: Path) -> list[int]:
    """Size and time of a file, which change with it; empty if it is not there."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []


def is_result(name: str) -> bool:
    """Tell whether a name out of WRITTEN is one that a test gives to its files."""
    parts = Path(name).parts
    return ".." not in parts and parts[:1] in [(kind,) for kind in (*KINDS, "thumbnails")]


def read_written(output: Path, network: str) -> dict[str, list]:
    """The stamps of files that earlier tests of this network wrote; of what is no such list, none."""
    try:
        written = json.loads((output / WRITTEN).read_text(encoding="utf-8"))
        files = written["files"] if written["network"] == network else {}
        return {name: old for name, old in files.items() if is_result(name) and old and stamp(output / name) == old}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def sweep(output: Path, files: Collection[Path], inputs: Iterable[Path], network: str, keep: bool) -> None:
    """Remove what earlier tests wrote into `output` and this one did not; say what else lies in its folders.

    Only files that WRITTEN names are removed, and only those that have not changed since and are no inputs.
    files:   what this test wrote, relative to output; with thumbnails, where there are any
    network: the run or file that was tested; what another one gave stays
    keep:    remove nothing
    """
    mine = {str(file) for file in files}
    mine |= {str(small) for file in files if (output / (small := thumbnail(file))).is_file()}
    left = {name: old for name, old in read_written(output, network).items() if name not in mine}
    needed = {path.resolve() for path in inputs}
    removed = [] if keep else [name for name in left if (output / name).resolve() not in needed]
    for name in removed:
        (output / name).unlink(missing_ok=True)
        del left[name]
    if removed:
        (output / "metrics.json").unlink(missing_ok=True)  # the scores of what was removed
        say(f"{output}: removed {counted(len(removed), 'file')} of an earlier test; --output DIR keeps them apart")
    found = [path for kind in KINDS for path in sorted((output / kind).rglob("*")) if path.is_file()]
    stay = [path for path in found if str(path.relative_to(output)) not in mine]
    if stay:
        say(f"{output}: files that this test did not write: {len(stay)}, such as {stay[0]}; they stay")
    stamps = left | {name: stamp(output / name) for name in sorted(mine)}
    write_json(output / WRITTEN, {"network": network, "files": stamps})


def forget_scores(output: Path, what: dict) -> None:
    """Remove the scores of images that a test has just replaced, unless those were made in the same way.

    what: the entries of metrics.json that say how; a file that lacks one is not known to be ours, and stays
    """
    path = output / "metrics.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        known = {name: scores[name] for name in what}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return
    if known != what:
        path.unlink()


LEGEND = {  # of the gallery
    "real": "{} as it was given",
    "fake": "the translation to {}",
    "truth": "the image of the same name among those of {}",
    "rec": "the translation, translated back to {}",
}


# ---------------------------------------------------------------------------------------------
# Folders


@dataclass
class Result:
    """A translated image: its input, and the files written for it by folder (real_A, fake_B, truth_B, rec_A)."""

    input: Path
    name: Path
    files: dict[str, Path]


# ---------------------------------------------------------------------------------------------
# The gallery


def address(file: Path) -> str:
    """A file below a page's folder as its links write it."""
    return quote(os.fsencode(file.as_posix()))


def write_gallery(
    output: Path, dataset_name: str, about: dict, results: dict[str, list[Result]], table: Sequence[str]
) -> None:
    """Write index.html: input, translation and what else there is of every image, small, each leading to its file."""
    names = dict(zip("AB", utils.domain_names(dataset_name), strict=True))
    known = [f"{name} {value}" for name, value in about.items() if value is not None]  # epoch and step
    title = ", ".join([utils.one_line(output.parent.name), *known])
    directions = []
    for direction, translated in results.items():
        source, target = DOMAINS[direction]
        kinds = dict.fromkeys(kind for result in translated for kind in result.files)
        legend = [(kind, LEGEND[kind[:-2]].format(names[kind[-1]])) for kind in kinds]
        rows = []
        for result in translated:
            figures = [(kind, address(file), address(shown_file(output, file))) for kind, file in result.files.items()]
            rows.append((utils.one_line(result.name), figures))
        directions.append((f"{names[source]} → {names[target]}: {utils.counted(len(rows), 'image')}", legend, rows))
    write_page(output / "index.html", "gallery.html", title=title, table=list(table), directions=directions)
