"""A folder of results: names of its folders, thumbnails, the record of what a test wrote, the grid and the page."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image

from models import DIRECTIONS, Direction
from toolkit.files import atomic_write, remove_files, sha256, write_json, write_page
from toolkit.images import LARGEST_CELL, draw_grid, load_image, read_image, save_image
from utils import InputError, counted, one_line, say, with_domain

LEGEND = {  # of the page
    "real": "{} as it was given",
    "fake": "the translation to {}",
    "truth": "the image of the same name among those of {}",
    "rec": "the translation, translated back to {}",
}
RECORD = ".written.json"  # what test.py wrote in the folder, and from what
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


DIRECTION_OF = {folder: direction for direction in DIRECTIONS for folder in result_folders(direction)}
OWN_NAMES = (*DIRECTION_OF, THUMBNAILS, PAGE, GRID, SCORES)


def thumbnail(file: Path) -> Path:
    """Return where the thumbnail of a file is, if the file is large enough to have one."""
    return Path(THUMBNAILS, file).with_suffix(".jpg")


def read_record(output: Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """Return what the record of a folder holds, nothing if it is missing or damaged: files by name, settings by key.

    Of a result it holds hashes of the file, of its input and truth, and the key of the settings; other entries are empty.
    """
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        files = record["files"]
        if "settings" not in record:  # older ones only have the names
            files = {name: {} for name in files}
        settings = {key: dict(value) for key, value in record.get("settings", {}).items()}
        own = {name: dict(entry) for name, entry in files.items() if Path(name).parts[0] in OWN_NAMES}
        return {name: entry for name, entry in own.items() if not {"..", "\0"} & {*Path(name).parts, *name}}, settings
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return {}, {}


class ResultFolder:
    """A folder of results, with a record of what test.py wrote there, from which inputs, networks and settings.

    What the record does not name is somebody's own: it is never replaced or removed. Results are reused, shown and scored
    only as what the record says they are.
    """

    def __init__(self, path: Path, settings: dict):
        """settings: of this test: the networks with their hashes, sizes, precision; plain values."""
        self.path = path
        self.settings = settings
        self.files, self.known_settings = read_record(path)
        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    @contextmanager
    def written(self, planned: Iterable[Sequence[Result]], keep: bool, with_scores: bool) -> Iterator[None]:
        """Take the names of all files that a test writes in the block, and remove what earlier tests left.

        keep:   only their page and scores, which the results of this test outdate
        raises: InputError, before anything changes, if a file of such a name is not in the record, or is an input
        """
        results = [result for of_direction in planned for result in of_direction]
        paths = [path for result in results for file in result.files.values() for path in (file, thumbnail(file))]
        names = [path.as_posix() for path in paths] + [PAGE, GRID] + [SCORES] * with_scores
        removed = [name for name in self.files if not keep or name in (PAGE, GRID, SCORES)]
        for name in names:
            if name not in self.files and os.path.lexists(self.path / name):
                taken = f"{name} is there, and not written by test.py"
                raise InputError(f"--output {self.path}: {taken}; choose another folder, or move it away")
        changed = {(self.path / name).resolve() for name in (*names, *removed)}
        for path in [path for result in results for path in (result.input, result.truth) if path]:
            if path.resolve() in changed:
                raise InputError(f"--output {self.path}: would remove or overwrite {path}; choose another folder")
        count = remove_files([self.path / name for name in removed], self.path)
        if count and not keep:
            say(f"{self.path}: removed {counted(count, 'file')} of the last test; --output DIR would keep them")
        self.path.mkdir(parents=True, exist_ok=True)
        kept = {name: entry for name, entry in self.files.items() if name not in removed}
        self.files = {name: {} for name in names} | kept
        self.known_settings[self.key] = self.settings
        self.write_record()
        try:
            yield
        finally:  # also after Ctrl-C
            self.files = {name: entry for name, entry in self.files.items() if (self.path / name).is_file()}
            self.write_record()

    def write_record(self) -> None:
        """Write the record, without settings that no file has."""
        files = dict(self.files)  # threads may add to it
        used = {entry.get("settings") for entry in files.values()}
        settings = {key: value for key, value in self.known_settings.items() if key in used}
        write_json(self.path / RECORD, {"settings": settings, "files": files})

    def origin(self, result: Result) -> dict:
        """Return what the files of a result are made from: hashes of input and truth, and the key of the settings."""
        truth = sha256(result.truth) if result.truth else None
        return {"settings": self.key, "input": sha256(result.input), "truth": truth}

    def has(self, result: Result) -> bool:
        """Whether all files of a result are there, made from just this and not changed since."""
        origin = self.origin(result)
        for name in map(Path.as_posix, result.files.values()):
            entry = self.files.get(name)
            if not entry or not (self.path / name).is_file() or entry != origin | {"sha256": sha256(self.path / name)}:
                return False
        return True

    def inputs(self, direction: Direction) -> dict[str, str]:
        """Return the hashes of the inputs of a direction's results by their names in lower case."""
        fake = result_folders(direction)[1]
        found = {}
        for name, entry in self.files.items():
            folder, *rest = Path(name).parts
            if folder == fake and "input" in entry:
                found[str(Path(*rest)).lower()] = entry["input"]
        return found

    def save(self, result: Result, images: Sequence[Image.Image]) -> None:
        """Write the images of a result in the order of its files."""
        origin = self.origin(result)
        for file, image in zip(result.files.values(), images, strict=True):
            save_thumbnail(image, self.path / thumbnail(file))
            save_image(image, self.path / file)
            self.files[file.as_posix()] = origin | {"sha256": sha256(self.path / file)}

    def results(self) -> dict[tuple[str, Direction], list[Result]]:
        """Return all results of the record by key of their settings and by direction, those of this test first."""
        found: dict[tuple[str, Direction], dict[Path, Result]] = {(self.key, direction): {} for direction in DIRECTIONS}
        for file, entry in self.files.items():
            folder, *rest = Path(file).parts
            key = str(entry.get("settings"))
            if rest and key in self.known_settings and folder in DIRECTION_OF:
                group = found.setdefault((key, DIRECTION_OF[folder]), {})
                result = group.setdefault(Path(*rest), Result(Path(), Path(*rest), {}))
                result.files[folder] = Path(file)
        return {group: list(results.values()) for group, results in found.items() if results}


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


def small_file(output: Path, file: Path) -> Path:
    """Return the thumbnail of a file or, if it has none, the file itself."""
    small = thumbnail(file)
    return small if (output / small).is_file() else file


def write_grid(output: Path, domains: tuple[str, str], results: Mapping[Direction, Sequence[Result]]) -> None:
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
                rows.append((with_domain(folder, domains), torch.stack([load_image(file, size) for file in files])))
    save_image(draw_grid(rows), output / GRID)


def _url(file: Path) -> str:
    return quote(file.as_posix(), errors="surrogateescape")


def _title(settings: Mapping) -> str:
    """Name the networks of a test, with their epoch and step where they are known."""
    known = [f"{name} {settings[name]}" for name in ("epoch", "step") if settings.get(name) is not None]
    return one_line(", ".join([str(settings.get("network")), *known]))


def write_gallery(folder: ResultFolder, domains: tuple[str, str], table: Sequence[str]) -> None:
    """Write index.html, which shows each input beside its results; a click opens the file.

    domains: names of A and B
    table:   the scores, as lines of text
    """
    names = dict(zip("AB", domains, strict=True))
    directions = []
    for (key, (source, target)), translated in folder.results().items():
        folders = dict.fromkeys(name for result in translated for name in result.files)
        legend = [(name, LEGEND[name[:-2]].format(names[name[-1]])) for name in folders]
        rows = []
        for result in translated:
            files = result.files.items()
            figures = [(name, _url(file), _url(small_file(folder.path, file))) for name, file in files]
            rows.append((one_line(result.name), figures))
        heading = f"{names[source]} → {names[target]}: {counted(len(rows), 'image')}"
        if key != folder.key:
            settings = folder.known_settings[key]
            sizes = ", ".join(
                f"{name} {settings[name]}" for name in ("scale", "tile", "output_size") if settings.get(name)
            )
            heading += f" of an earlier test: {_title(settings)}; {one_line(sizes)}"
        directions.append((heading, legend, rows))
    title = _title(folder.settings)
    write_page(folder.path / PAGE, "gallery.html", title=title, table=list(table), directions=directions)
