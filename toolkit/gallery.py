"""A folder of results: names of its folders, thumbnails, the record of what a test wrote, the grid and the page."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image

from models import DIRECTIONS, Direction
from toolkit.files import atomic_write, remove_files, render_page, sha256, sole_process, write_text
from toolkit.images import LARGEST_CELL, draw_grid, load_image, natural_order, read_image
from toolkit.outputs import PNG, VALUES, OutputFormat, Translation
from toolkit.pages import file_of
from utils import InputError, counted, domain_names, one_line, say, with_domain

LEGEND = {  # of the page
    "real": "{} as it was given",
    "fake": "the translation to {}",
    "truth": "the image of the same name among those of {}",
    "rec": "the translation, translated back to {}",
}
RECORD = ".written.jsonl"  # a line for each file that test.py wrote in the folder: its hash, and what it was made from
OLD_RECORD = ".written.json"  # of older versions: names alone
PAGE = "index.html"
GRID = "grid.png"
SCORES = "metrics.json"
THUMBNAILS = "thumbnails"


@dataclass
class Result:
    """A translated image and its files, which are relative to the folder of results."""

    input: Path
    name: Path  # of each of its files, within their folders; that of the translation has the suffix of its format
    files: dict[str, Path]  # by folder: real_A, fake_B and, if there are such images, truth_B and rec_A
    truth: Path | None = None  # what the input should become, if that is known
    values: Path | None = None  # of the translation in the units of its domain, if its own file has none of these
    format: OutputFormat = PNG  # of the translation

    @property
    def written(self) -> list[Path]:
        """All its files."""
        return [*self.files.values(), *([self.values] if self.values else [])]


def result_folders(direction: Direction) -> tuple[str, str, str, str]:
    """Return the folders for inputs, translations, truths and round trips."""
    source, target = direction
    return f"real_{source}", f"fake_{target}", f"truth_{target}", f"rec_{source}"


def values_file(direction: Direction, name: Path) -> Path:
    """Return the file of a translation in the units of its domain: a TIFF of 32-bit floats."""
    return Path(f"values_{direction.target}", name).with_suffix(".tif")


DIRECTION_OF = {folder: direction for direction in DIRECTIONS for folder in result_folders(direction)}
ORIGIN = ("settings", "input", "truth")  # what a file was made from: the key of the settings, the hashes of two files
NOTHING = dict.fromkeys(ORIGIN)
OWN_FOLDERS = (*DIRECTION_OF, "values_A", "values_B", THUMBNAILS)
OWN_NAMES = (*OWN_FOLDERS, PAGE, GRID, SCORES)
CLIPS = re.compile(r".*_fake_[AB]_*\.mp4", re.DOTALL)  # translated clips, which are in none of these folders


def is_own(file: Path) -> bool:
    """Whether a file, relative to a folder of results, has a name that test.py gives."""
    is_inside = ".." not in file.parts and not file.anchor
    return is_inside and (file.parts[0] in OWN_NAMES or CLIPS.fullmatch(file.name) is not None)


def thumbnail(file: Path) -> Path:
    """Return where the thumbnail of a file is, if the file is large enough to have one."""
    return Path(THUMBNAILS, file).with_suffix(".jpg")


def origin_of(entry: Mapping) -> dict:
    """Return the part of an entry of the record that says what the file was made from."""
    return {part: entry[part] for part in ORIGIN}


def read_record(output: Path) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """Return the entries of a record by file, the newest last, and the settings by key; damaged lines are left out.

    raises: InputError for a file that is no record
    """
    entries: dict[str, list[dict]] = {}
    settings: dict[str, dict] = {}
    path = output / (RECORD if os.path.lexists(output / RECORD) else OLD_RECORD)
    if not os.path.lexists(path):
        return entries, settings
    refusal = InputError(
        f"--output {output}: {path.name} is not what test.py wrote; choose another folder, or move it away"
    )
    if not path.is_file():
        raise refusal
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    understood = not lines
    if path.name == OLD_RECORD:
        with suppress(ValueError, RecursionError, TypeError, LookupError):
            lines = [json.dumps({"file": name, "sha256": None}) for name in json.loads(text)["files"]]
            understood = True
    for line in lines:
        with suppress(ValueError, RecursionError, TypeError, LookupError):
            entry = json.loads(line)
            if "key" in entry:
                settings[str(entry["key"])] = dict(entry["settings"])
            else:
                name = entry["file"]
                os.fsencode(name)  # raises for what can be no name
                if is_own(Path(name)) and "\0" not in name and Path(name).as_posix() == name:
                    facts = {part: entry.get(part) and str(entry[part]) for part in ("sha256", *ORIGIN)}
                    entries.setdefault(name, []).append(facts)
            understood = True
    if not understood:
        raise refusal
    return entries, settings


class ResultFolder:
    """A folder of results, with a record of what test.py wrote there, from which inputs, networks and settings.

    What is not as the record says is somebody's own: it is never replaced or removed, and neither shown nor scored.
    """

    def __init__(self, path: Path, settings: dict):
        """Read the record, and the files that it names; settings: of this test, plain values."""
        self.path = path
        self.settings = settings
        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.is_old = not os.path.lexists(path / RECORD) and os.path.lexists(path / OLD_RECORD)
        recorded, self.known_settings = read_record(path)
        self.files: dict[str, dict] = {}  # by name: hash and origin
        for name, entries in recorded.items():
            if (path / name).is_file():
                digest = sha256(path / name)
                matching = [entry for entry in entries if entry["sha256"] in (digest, None)]
                if matching:
                    self.files[name] = {**matching[-1], "sha256": digest}

    def claim(self, planned: Iterable[Sequence[Result]], keep: bool, with_scores: bool) -> None:
        """Check that a test may write its files, and remove those of earlier tests.

        keep:   remove only their page and scores, which the results of this test outdate
        raises: InputError, before anything changes, if somebody's own file is in the way, or an input would change
        """
        results = [result for of_direction in planned for result in of_direction]
        paths = [path for result in results for file in result.files.values() for path in (file, thumbnail(file))]
        paths += [result.values for result in results if result.values]
        names = [path.as_posix() for path in paths] + [PAGE, GRID] + [SCORES] * with_scores
        for name in names:
            if name not in self.files:
                self.refuse_other(name)
        removed = [name for name in self.files if not keep or name in (PAGE, GRID, SCORES)]
        changed = {(self.path / name).resolve() for name in (*names, *removed)}
        for path in [path for result in results for path in (result.input, result.truth) if path]:
            if path.resolve() in changed:
                raise InputError(f"--output {self.path}: would remove or overwrite {path}; choose another folder")
        count = remove_files([self.path / name for name in removed], self.path)
        replaced = [file for result in results for file in result.files.values() if self.is_of_other_settings(file)]
        if replaced and keep:
            say(
                f"{self.path}: replaces {counted(len(replaced), 'file')} of other settings; --output DIR would keep them"
            )
        if count and not keep:
            say(f"{self.path}: removed {counted(count, 'file')} of the last test; --output DIR would keep them")
        for name in removed:
            del self.files[name]
        self.known_settings[self.key] = self.settings
        self.write_record()

    def refuse_other(self, name: str) -> None:
        """Raise InputError if something that test.py did not write has a name, or is a file where its folder would be."""
        parents = [parent for parent in Path(name).parents if os.path.lexists(self.path / parent)]
        in_the_way = [parent for parent in parents if not (self.path / parent).is_dir()]
        if in_the_way or os.path.lexists(self.path / name):
            found = f"{in_the_way[0] if in_the_way else name} is there, and not as test.py wrote it"
            raise InputError(f"--output {self.path}: {found}; choose another folder, or move it away")

    def write_record(self) -> None:
        """Write the record anew: one line for each settings in use, and for each file."""
        files = dict(self.files)
        used = {entry["settings"] for entry in files.values()} | {self.key}
        lines = [{"key": key, "settings": value} for key, value in self.known_settings.items() if key in used]
        lines += [{"file": name} | entry for name, entry in files.items()]
        write_text(self.path / RECORD, "\n".join(map(json.dumps, lines)))
        if self.is_old:
            (self.path / OLD_RECORD).unlink(missing_ok=True)

    def write(self, file: Path | str, write: Callable[[Path], object], origin: Mapping = NOTHING) -> None:
        """Write a file atomically; the record has its hash before it has its name, so that a kill leaves no doubt."""
        path = self.path / file
        name = Path(file).as_posix()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            write(temporary)
            if os.path.lexists(path) and (name not in self.files or sha256(path) != self.files[name]["sha256"]):
                self.refuse_other(name)  # it was changed meanwhile
            entry = {"sha256": sha256(temporary), **origin}
            with (self.path / RECORD).open("a", encoding="utf-8") as record:
                record.write("\n" + json.dumps({"file": name} | entry))  # first: a line may have been cut off
        self.files[name] = entry

    def write_text(self, name: str, text: str) -> None:
        """Write a page, or scores."""
        self.write(name, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))

    def origin(self, result: Result) -> dict:
        """Return what the files of a result are made from: hashes of input and truth, and the key of the settings."""
        hashes = {}
        for part, path in (("input", result.input), ("truth", result.truth)):
            hashes[part] = None
            with suppress(OSError):  # then it cannot be read either, which is said where it is
                hashes[part] = path and sha256(file_of(path))
        return {"settings": self.key, **hashes}

    def is_of(self, file: Path, origin: Mapping) -> bool:
        """Whether a file is there, made from just this."""
        name = file.as_posix()
        return name in self.files and origin_of(self.files[name]) == origin

    def is_of_other_settings(self, file: Path) -> bool:
        """Whether a file is there, made by another network or otherwise."""
        name = file.as_posix()
        return name in self.files and self.files[name]["settings"] != self.key

    def has(self, result: Result) -> bool:
        """Whether all files of a result are there, made from just this input, truth, networks and settings."""
        origin = self.origin(result)
        return all(self.is_of(file, origin) for file in result.written)

    def inputs(self, direction: Direction) -> dict[str, str | None]:
        """Return the hashes of the inputs of a direction's results by their names in lower case."""
        fake = result_folders(direction)[1]
        parts = {name: Path(name).with_suffix(".png").parts for name in self.files}
        return {
            str(Path(*parts[name][1:])).lower(): self.files[name]["input"] for name in parts if parts[name][0] == fake
        }

    def save(
        self, result: Result, images: Sequence[Image.Image], origin: Mapping, translation: Translation | None = None
    ) -> None:
        """Write the images of a result in the order of its files, and thumbnails of those too large for a page.

        translation: its second image in full, with what is written besides its 8 bits
        """
        if result.values and translation:
            self.write(result.values, functools.partial(translation.save, written=VALUES), origin)
        for i, (file, image) in enumerate(zip(result.files.values(), images, strict=True)):
            written = result.format if i == 1 else PNG
            whole = translation if i == 1 and translation else Translation(image)
            self.write(file, functools.partial(whole.save, written=written), origin)
            if max(image.size) > LARGEST_CELL or not written.is_for_browsers:
                self.write(thumbnail(file), functools.partial(save_thumbnail, image), origin)

    def results(self) -> dict[tuple[str, Direction], list[Result]]:
        """Return all results by key of their settings and by direction, those of this test first."""
        found: dict[tuple[str, Direction], list[Result]] = {(self.key, direction): [] for direction in DIRECTIONS}
        for direction in DIRECTIONS:
            folders = result_folders(direction)
            for name, entry in list(self.files.items()):
                folder, *rest = Path(name).parts
                if folder == folders[1] and entry["settings"] in self.known_settings:
                    files = {folder: Path(folder, *rest).with_suffix(".png") for folder in folders}
                    files[folder] = Path(name)
                    files = {folder: file for folder, file in files.items() if self.is_of(file, origin_of(entry))}
                    values = values_file(direction, Path(*rest))
                    result = Result(Path(), Path(*rest), files)
                    result.values = values if self.is_of(values, origin_of(entry)) else None
                    found.setdefault((entry["settings"], direction), []).append(result)
        # threads wrote them, in any order
        return {group: sorted(found[group], key=lambda x: natural_order(x.name)) for group in found if found[group]}

    def small_file(self, file: Path) -> Path:
        """Return the thumbnail of a file or, if it has none, the file itself."""
        small = thumbnail(file)
        return small if self.is_of(small, origin_of(self.files[file.as_posix()])) else file

    def write_grid(self, domains: tuple[str, str], results: Mapping[Direction, Sequence[Result]]) -> None:
        """Write grid.png: up to six images of each direction, one column an image, all at the size of the first."""
        columns = min(6, *(len(translated) for translated in results.values()))
        size = None
        rows = []
        for translated in results.values():
            chosen = translated[:: len(translated) // columns][:columns]
            for folder in chosen[0].files:
                if all(folder in result.files for result in chosen):
                    files = [self.path / self.small_file(result.files[folder]) for result in chosen]
                    size = size or read_image(files[0]).size[::-1]
                    rows.append((with_domain(folder, domains), torch.stack([load_image(file, size) for file in files])))
        self.write(GRID, functools.partial(draw_grid(rows).save, format="PNG"))

    def write_page(self, table: Sequence[str]) -> None:
        """Write index.html, which shows each input beside its results; a click opens the file.

        table: the scores, as lines of text
        """
        directions = []
        for (key, (source, target)), translated in self.results().items():
            settings = self.known_settings[key]
            names = dict(zip("AB", domain_names("", settings.get("domains")), strict=True))
            folders = dict.fromkeys(name for result in translated for name in result.files)
            legend = [(name, LEGEND[name[:-2]].format(names[name[-1]])) for name in folders]
            if any(result.values for result in translated):
                legend.append((f"values_{target}", "a folder with the translations in their own units"))
            rows = []
            for result in translated:
                files = result.files.items()
                figures = [(name, _url(file), _url(self.small_file(file))) for name, file in files]
                rows.append((one_line(result.name), figures))
            heading = f"{names[source]} → {names[target]}: {counted(len(rows), 'image')}"
            if key != self.key:
                shown = ("dataset_name", "scale", "tile", "output_size")
                sizes = ", ".join(f"{name} {settings[name]}" for name in shown if settings.get(name))
                heading += f" of an earlier test: {_title(settings)}; {one_line(sizes)}"
            directions.append((heading, legend, rows))
        page = render_page("gallery.html", title=_title(self.settings), table=list(table), directions=directions)
        self.write_text(PAGE, page)


@contextmanager
def open_results(path: Path, settings: dict) -> Iterator[ResultFolder]:
    """Open a folder of results for one test at a time; raises InputError if another one writes there."""
    path.mkdir(parents=True, exist_ok=True)
    with sole_process(path, *(path / name for name in OWN_FOLDERS), remedy="another --output"):
        folder = ResultFolder(path, settings)
        if folder.is_old:  # from now on hashes count, not names
            folder.write_record()
        yield folder


def save_thumbnail(image: Image.Image, path: Path) -> None:
    """Write a JPEG of at most LARGEST_CELL px a side."""
    small = image.reduce(max(1, max(image.size) // (2 * LARGEST_CELL)))  # faster for large images
    small.thumbnail((LARGEST_CELL, LARGEST_CELL))
    small.save(path, format="JPEG", quality=88, subsampling=0)


def _url(file: Path) -> str:
    return quote(file.as_posix(), errors="surrogateescape")


def _title(settings: Mapping) -> str:
    """Name the networks of a test, with their epoch and step where they are known."""
    known = [f"{name} {settings[name]}" for name in ("epoch", "step") if settings.get(name) is not None]
    return one_line(", ".join([str(settings.get("network")), *known]))
