"""A folder of results: names of its folders, thumbnails, the record of what a test wrote, the grid and the page."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image

from models import DIRECTIONS, Direction
from toolkit.files import atomic_write, write_json, write_page
from toolkit.images import LARGEST_CELL, draw_grid, load_image, read_image, save_image
from utils import InputError, counted, domain_names, one_line, say

LEGEND = {  # of the page
    "real": "{} as it was given",
    "fake": "the translation to {}",
    "truth": "the image of the same name among those of {}",
    "rec": "the translation, translated back to {}",
}
RECORD = ".written.json"  # names the files that the last test wrote
PAGE = "index.html"
GRID = "grid.png"
SCORES = "metrics.json"
THUMBNAILS = "thumbnails"


@dataclass
class Result:
    """A translated image and its files, which are relative to the folder of results."""

    input: Path
    name: Path  # of each of its files, within their folders
    files: dict[str, Path]  # by folder: real_A, fake_B and, if there are such images, truth_B and rec_A
    truth: Path | None = None  # what the input should become, if that is known


def result_folders(direction: Direction) -> tuple[str, str, str, str]:
    """Return the folders for inputs, translations, truths and round trips."""
    source, target = direction
    return f"real_{source}", f"fake_{target}", f"truth_{target}", f"rec_{source}"


OWN_NAMES = (*result_folders(DIRECTIONS[0]), *result_folders(DIRECTIONS[1]), THUMBNAILS, PAGE, GRID, SCORES)


def read_record(output: Path) -> list[str]:
    """Return the names of the files that the last test wrote; none if their record is missing or damaged."""
    try:
        names = list(json.loads((output / RECORD).read_text(encoding="utf-8"))["files"])
        return [name for name in names if Path(name).parts[0] in OWN_NAMES and ".." not in Path(name).parts]
    except (OSError, ValueError, TypeError, LookupError):
        return []


def record(output: Path, names: Iterable[Path | str]) -> None:
    """Add to the record those files that exist, and their thumbnails."""
    found = set(read_record(output))
    for name in map(Path, names):
        found |= {path.as_posix() for path in (name, thumbnail(name)) if (output / path).is_file()}
    if found:
        write_json(output / RECORD, {"files": sorted(found)})


def clear(output: Path, inputs: Iterable[Path]) -> None:
    """Remove the files that the last test wrote; files that are not in its record are kept.

    raises: InputError as refuse_inputs does; nothing is removed then
    """
    refuse_inputs(output, inputs)
    found = [output / name for name in read_record(output) if (output / name).is_file()]
    for path in found:
        path.unlink()
    (output / RECORD).unlink(missing_ok=True)
    if found:
        say(f"{output}: removed {counted(len(found), 'file')} of the last test; --output DIR would keep them")


def refuse_inputs(output: Path, inputs: Iterable[Path]) -> None:
    """Raise InputError for an input where results are removed or written."""
    own = {(output / name).resolve() for name in OWN_NAMES}
    for path in inputs:
        real = path.resolve()
        if own & {real, *real.parents}:
            raise InputError(f"--output {output}: would remove or overwrite the input {path}; choose another folder")


def save_results(output: Path, result: Result, images: Sequence[Image.Image]) -> None:
    """Write the images of a result in the order of its files; a file that exists therefore has its thumbnail."""
    for file, image in zip(result.files.values(), images, strict=True):
        save_thumbnail(image, output / thumbnail(file))
        save_image(image, output / file)


def save_thumbnail(image: Image.Image, path: Path) -> None:
    """Write a JPEG of at most LARGEST_CELL px a side; remove it for an image that is no larger than that."""
    if max(image.size) <= LARGEST_CELL:
        path.unlink(missing_ok=True)
        return
    small = image.reduce(max(1, max(image.size) // (2 * LARGEST_CELL)))  # faster for large images
    small.thumbnail((LARGEST_CELL, LARGEST_CELL))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        small.save(temporary, format="JPEG", quality=88, subsampling=0)


def thumbnail(file: Path) -> Path:
    """Return where the thumbnail of a file is, if the file is large enough to have one."""
    return Path(THUMBNAILS, file).with_suffix(".jpg")


def small_file(output: Path, file: Path) -> Path:
    """Return the thumbnail of a file or, if it has none, the file itself."""
    small = thumbnail(file)
    return small if (output / small).is_file() else file


def is_complete(output: Path, result: Result) -> bool:
    """Whether all files of a result exist, whole: a copy of a folder may have been cut off."""
    files = [output / file for file in result.files.values()]
    return all(file.is_file() and file.read_bytes().endswith(b"IEND\xaeB`\x82") for file in files)  # the end of a PNG


def write_grid(output: Path, results: Mapping[Direction, Sequence[Result]]) -> None:
    """Write grid.png: up to six images of each direction, one column an image, all at the size of the first."""
    columns = min(6, *(len(translated) for translated in results.values()))
    size = None
    rows = []
    for translated in results.values():
        chosen = translated[:: len(translated) // columns][:columns]
        for folder in chosen[0].files:
            if all(folder in result.files for result in chosen):
                files = [output / small_file(output, result.files[folder]) for result in chosen]
                size = size or read_image(files[0]).size[::-1]
                rows.append((folder, torch.stack([load_image(file, size) for file in files])))
    save_image(draw_grid(rows), output / GRID)
    record(output, [GRID])


def _url(file: Path) -> str:
    return quote(file.as_posix(), errors="surrogateescape")


def write_gallery(
    output: Path, dataset_name: str, about: dict, results: Mapping[Direction, Sequence[Result]], table: Sequence[str]
) -> None:
    """Write index.html, which shows each input beside its results; a click opens the file.

    about: epoch and step of the networks, where they are known
    table: the scores, as lines of text
    """
    names = dict(zip("AB", domain_names(dataset_name), strict=True))
    known = [f"{name} {value}" for name, value in about.items() if value is not None]
    title = ", ".join([one_line(output.parent.name), *known])
    directions = []
    for (source, target), translated in results.items():
        folders = dict.fromkeys(folder for result in translated for folder in result.files)
        legend = [(folder, LEGEND[folder[:-2]].format(names[folder[-1]])) for folder in folders]
        rows = []
        for result in translated:
            files = result.files.items()
            figures = [(folder, _url(file), _url(small_file(output, file))) for folder, file in files]
            rows.append((one_line(result.name), figures))
        heading = f"{names[source]} → {names[target]}: {counted(len(rows), 'image')}"
        directions.append((heading, legend, rows))
    write_page(output / PAGE, "gallery.html", title=title, table=list(table), directions=directions)
    record(output, [PAGE])
