"""Make and check data sets: folders of images named trainA, trainB, testA and testB.

python prepare.py draw day2night --size 64
python prepare.py download horse2zebra
python prepare.py split --A faces --B caricatures --dataset_name face2caricature
python prepare.py split --A 'photos/cat_*.jpg' --B dogs.tar.gz --dataset_name cat2dog
python prepare.py split --A all.parquet --B all.parquet --rows_A label=cat --rows_B label=dog --dataset_name cat2dog
python prepare.py split --pairs facades --sides BA --dataset_name facades
python prepare.py check face2caricature --sheet
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import bz2
import errno
import glob
import gzip
import http.client
import itertools
import lzma
import math
import random
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets import (
    DEMO,
    DOMAINS,
    MAX_MEGAPIXELS,
    DataConfig,
    find_dataset,
    find_range,
    outlook,
    split_folder,
    split_images,
)
from toolkit import checks, images, parquet
from toolkit.cli import Parser, add_options, argument_type
from toolkit.files import new_folder, write_json
from toolkit.pages import CHOICES, use_pages
from toolkit.process import command
from toolkit.readers import suffix_of
from toolkit.synthetic import draw_dataset
from utils import InputError, RunError, counted, existing_or_new_path, folder_name, one_line, option, say

SPLITS = ("trainA", "valA", "testA", "trainB", "valB", "testB")
ADDRESS = "http://efrosgans.eecs.berkeley.edu/cyclegan/datasets"  # of the authors; --url names a mirror
OFFICIAL = "ae_photos, apple2orange, cezanne2photo, facades, horse2zebra, iphone2dslr_flower, maps, monet2photo, summer2winter_yosemite, ukiyoe2photo, vangogh2photo"
MOST_BYTES = 30 * 2**30  # unpacked; the largest official data set has 3 GiB
MOST_BYTES_AT_ONCE = 2**20  # that may be read from a tar in one go: its headers are small
MOST_HEADERS = 2**29  # bytes in all of a tar, which tarfile keeps in memory; enough for half a million files
OPENERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # of compressed files, by their first bytes


@dataclass(frozen=True)
class _DrawOptions:
    size: int = option(64, "side of the images in px", least=16, most=4096)


@dataclass(frozen=True)
class _SplitOptions:
    test_fraction: float = option(0.1, "fraction of the images that is kept for testing", least=0, most=0.9)
    max_images: int | None = option(None, "use at most N images of each domain (default: all)", least=1)
    seed: int = option(0, "seed of the random choice of images", least=0)
    max_megapixels: float = MAX_MEGAPIXELS


@dataclass(frozen=True)
class _CheckOptions:
    sheet: bool = option(False, "also draw images of A beside images of B: generated_images/NAME/check.png")
    pages: str = option(
        "first", "of a file of several images, such as a stack, check the first or all", choices=CHOICES
    )
    remove_twins: bool = option(False, "move all but one of each duplicate to removed/, train before test; no links")
    max_megapixels: float = MAX_MEGAPIXELS


def fetch(url: str, part: Path) -> None:
    """Download a file, continuing where an earlier attempt stopped.

    raises: RunError if it does not fit on the disk or stops early, else InputError
    """
    done = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=30) as response:  # seconds without a byte
            if response.status != 206:  # the server sends the file from its start
                done = 0
            total = done + int(response.headers.get("Content-Length") or 0)
            if shutil.disk_usage(part.parent).free < total - done:
                raise RunError(f"{part.parent}: no space for {total / 1e6:,.0f} MB; free some and run it again")
            bar = tqdm.wrapattr(response, "read", total or None, initial=done, desc=part.stem.lstrip("."))
            with part.open("ab" if done else "wb") as file, bar as source:
                shutil.copyfileobj(source, file)
        if part.stat().st_size < total:
            raise OSError(f"of {total / 1e6:.1f} MB")
    except (OSError, http.client.HTTPException, ValueError) as error:
        code = getattr(error, "code", None)
        if code == 416:  # the file is already complete
            return
        kept = part.stat().st_size if part.exists() else 0
        if kept and not code:
            raise RunError(f"{url}: broke off after {kept / 1e6:.1f} MB ({error}); run it again to continue") from error
        remedy = f"check the name, give a mirror with --url, or take no download: python prepare.py draw {DEMO}"
        raise InputError(f"{url}: cannot be fetched ({error}); {remedy}") from error


class SmallReads:
    """A file whose reads are limited, so that a small tar whose header claims a long name does not fill the memory."""

    def __init__(self, file: Any):
        self.file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_BYTES_AT_ONCE:
            raise ValueError("a header is larger than that of any data set")
        return self.file.read(size)


def check_unpacked_size(size: int, archive: Path, folder: Path) -> None:
    """Raise ValueError if an archive unpacks to more than any data set, OSError if to more than the disk has left."""
    if size > MOST_BYTES:
        raise ValueError(f"claims {size / 2**30:.1f} GiB of images, more than any data set")
    if size > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, f"no space to unpack {size / 2**30:.1f} GiB; free some first", str(archive))


def entries_of_zip(archive: Path, folder: Path) -> Iterator[tuple[str, bool, Callable[[], IO[bytes] | None]]]:
    """Yield the files in a zip: name, whether it is a link, what opens it."""
    with zipfile.ZipFile(archive) as file:
        entries = [entry for entry in file.infolist() if not entry.is_dir()]
        check_unpacked_size(sum(entry.file_size for entry in entries), archive, folder)
        for entry in entries:
            yield entry.filename, entry.external_attr >> 28 == 0xA, lambda entry=entry: file.open(entry)


def entries_of_tar(archive: Path, folder: Path) -> Iterator[tuple[str, bool, Callable[[], IO[bytes] | None]]]:
    """Yield the files in a tar, which may be compressed, as entries_of_zip does; raises also tarfile.FilterError."""
    with archive.open("rb") as file:
        opener = OPENERS.get(file.read(2), open)
    size = 0
    with opener(archive, "rb") as unpacked, tarfile.open(fileobj=SmallReads(unpacked), mode="r:") as file:  # ty: ignore
        for entry in file:  # one by one, so that a small file of zeros is not unpacked before its size is known
            if entry.offset_data - size > MOST_HEADERS:
                raise ValueError("has more headers than any data set")
            size += entry.size
            check_unpacked_size(size if size > MOST_BYTES else entry.size, archive, folder)
            tarfile.data_filter(entry, str(folder))  # refuses devices, and links that lead out
            if not entry.isdir():
                yield entry.name, entry.issparse() or not entry.isreg(), lambda entry=entry: file.extractfile(entry)


def unpack_images(archive: Path, folder: Path, place: Callable[[PurePosixPath], Sequence[str]]) -> None:
    """Write the images of an archive into a folder.

    place:  returns the path of an image there by its path in the archive; an empty one leaves it out
    raises: OSError if the disk is full; any other exception for a file that is damaged or hostile
    """
    entries = entries_of_zip if zipfile.is_zipfile(archive) else entries_of_tar
    for name, is_link, open_entry in tqdm(entries(archive, folder), desc="unpacking", leave=False):
        path = PurePosixPath(name.replace("\\", "/"))
        if is_link or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"would write outside its folder: {name}")
        parts = place(path)
        if parts and suffix_of(Path(path)) in images.SUFFIXES and not path.name.startswith("."):
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            source = open_entry()
            if source:
                with source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def path_in_split(path: PurePosixPath) -> Sequence[str]:
    """Return where an image of an archive belongs: trainA/1.png of set/trainA/1.png, set/train/A/1.png and set/train_A/1.png."""
    parts = path.parts
    for i in range(len(parts) - 1):
        for split in SPLITS:
            if parts[i] in (split, f"{split[:-1]}_{split[-1]}"):
                return split, *parts[i + 1 :]
            if parts[i : i + 2] == (split[:-1], split[-1]) and len(parts) > i + 2:
                return split, *parts[i + 2 :]
    return ()


def unpack(archive: Path, folder: Path) -> dict[str, int]:
    """Unpack the images of trainA, trainB, testA, … from a zip or tar, whatever surrounds them; count them by split.

    raises: as unpack_images; also for what is no data set
    """
    unpack_images(archive, folder, path_in_split)
    counts = {split: len(images.list_images(folder / split)) for split in sorted(SPLITS)}
    if not counts["trainA"] or not counts["trainB"]:
        raise ValueError("holds no trainA and trainB with images")
    return counts


def download_dataset(args: Namespace) -> None:
    """Download one of the official data sets, or any zip with their layout; a full disk keeps the zip for another try."""
    if args.url and not args.url.startswith(("http://", "https://")):
        raise InputError(f"--url {args.url}: expected an address that begins with http:// or https://")
    if not args.url and args.dataset_name not in OFFICIAL.split(", "):
        raise InputError(f"{args.dataset_name}: no official set; expected one of {OFFICIAL}, or a zip elsewhere: --url")
    url = args.url or f"{ADDRESS}/{args.dataset_name}.zip"
    part = args.data_root / f".{args.dataset_name}.zip.part"
    with new_folder(args.data_root / args.dataset_name) as unfinished:
        say(f"downloading {url}")
        fetch(url, part)
        try:
            counts = unpack(part, unfinished)
        except Exception as error:  # zipfile, zlib, bz2, lzma and the file system raise a dozen types on hostile files
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            part.unlink()
            reason = one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__)[:120]
            raise InputError(f"{url}: sent no usable zip ({reason}); deleted; try again, or another --url") from error
    part.unlink()
    found = [f"{counted(count, 'image')} in {split}" for split, count in counts.items() if count]
    say(f"{args.data_root / args.dataset_name}: {', '.join(found)}")


def _copy_images(paths: Sequence[Path], source: Path, target: Path) -> None:
    target.mkdir()
    for path in tqdm(paths, desc=target.name, leave=False):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def list_source(source: Path, option: str) -> tuple[Path, list[Path]]:
    """List what --A or --B names: the images in a folder, or those that a pattern matches; or a file, as given.

    returns: the folder that names are relative to; images, parquet files or an archive
    """
    if source.is_file():
        return source.parent, [source]
    if source.is_dir():
        paths = images.list_images(source)
        return source, paths or sorted(source.rglob("*.parquet"), key=images.natural_order)
    if not glob.has_magic(str(source)):
        raise InputError(f"{option} {source}: no such folder; expected a folder with images")
    plain = list(itertools.takewhile(lambda part: not glob.has_magic(part), source.parts))
    found = list(Path(*plain).glob(str(Path(*source.parts[len(plain) :]))))
    files = {path for path in found if path.is_file()}
    known = {path for path in files if path.suffix.lower() in {*images.SUFFIXES, ".parquet"}}
    if files - known:
        say(f"{option} {source}: left out {counted(len(files - known), 'file')} that are no images")
    folders = [path for path in found if path.is_dir() and not any(path.is_relative_to(x) for x in found if x != path)]
    known |= {path for folder in folders for path in images.list_images(folder)}
    return Path(*plain), sorted(known, key=images.natural_order)


def gather(args: Namespace, domain: str, folder: Path) -> tuple[Path, list[Path]]:
    """List the images that --A or --B names; those of archives and parquet files are unpacked into a folder."""
    option, source = f"--{domain}", getattr(args, domain)
    rows = getattr(args, f"rows_{domain}")
    root, paths = list_source(source, option)
    tables = [path for path in paths if path.suffix == ".parquet"]
    if rows and not tables:
        raise InputError(f"--rows_{domain} {rows}: {option} {source} is no parquet file; leave it out")
    if tables or (source.is_file() and source.suffix.lower() not in images.SUFFIXES):
        folder.mkdir(parents=True)
        root = folder
        if tables:
            parquet.extract_images(tables, folder, domain, rows, MOST_BYTES)
        else:
            try:
                unpack_images(source, folder, lambda path: path.parts)
            except OSError as error:
                if error.errno:
                    raise
                raise InputError(f"{option} {source}: {error}; expected a folder, zip, tar or parquet file") from error
            except Exception as error:  # zipfile, tarfile and their decompressors raise a dozen types on hostile files
                reason = one_line(error)[:120]
                raise InputError(
                    f"{option} {source}: no usable archive ({reason}); expected a folder, zip, tar or parquet file"
                ) from error
        paths = images.list_images(folder)
    if not paths:
        raise InputError(f"{option} {source}: no image inside; expected {images.EXPECTED}")
    return root, paths


def source_name(args: Namespace, domain: str) -> str:
    """Return the name of a domain: of the rows that are taken, else of the folder or file."""
    source = getattr(args, domain)
    rows = getattr(args, f"rows_{domain}")
    if rows:
        return rows.partition("=")[2]
    if source.is_file():
        return source.name.partition(".")[0]
    return source.resolve().name if source.is_dir() else list_source(source, f"--{domain}")[0].resolve().name


def split_dataset(args: Namespace) -> None:
    """Make the layout of a data set from two sources, by copying."""
    folder_A = args.A.resolve()
    folder_B = args.B.resolve()
    is_nested = folder_A in folder_B.parents or folder_B in folder_A.parents
    is_same = folder_A == folder_B and args.rows_A == args.rows_B and args.A.suffix != ".parquet"
    if is_nested or is_same:
        raise InputError(f"--A {args.A} and --B {args.B}: the same folder, or one in the other; expected two")
    with new_folder(args.data_root / args.dataset_name) as unfinished:
        scratch = unfinished / ".sources"
        found = {domain: gather(args, domain, scratch / domain) for domain in "AB"}  # before the images are read
        refuse_same_images(args, found["A"][1], found["B"][1])
        for domain, (root, paths) in found.items():
            random.Random(f"{args.seed}-{domain}").shuffle(paths)
            bar = tqdm(paths, desc=f"reading {getattr(args, domain).name}", leave=False)
            readable = images.BadImages(root, len(paths)).read(bar, images.read_size)
            readable_paths = [path for path, _ in itertools.islice(readable, args.max_images)]
            tests = min(len(readable_paths) - 1, math.ceil(len(readable_paths) * args.test_fraction))
            if tests:
                _copy_images(readable_paths[:tests], root, unfinished / f"test{domain}")
            _copy_images(readable_paths[tests:], root, unfinished / f"train{domain}")
            trains = counted(len(readable_paths) - tests, "image")
            say(f"{args.dataset_name}: {trains} in train{domain}, {tests} in test{domain}")
        shutil.rmtree(scratch, ignore_errors=True)
        names = [source_name(args, domain) for domain in "AB"]
        if names[0] != names[1]:
            write_json(unfinished / DOMAINS, names)


def refuse_same_images(args: Namespace, paths_A: Sequence[Path], paths_B: Sequence[Path]) -> None:
    """Raise InputError if an image is in both sources, or both take the same rows of one parquet file."""
    same = {path.resolve() for path in paths_A} & {path.resolve() for path in paths_B}
    first_A, first_B = ([path.read_bytes() for path in paths[:10]] for paths in (paths_A, paths_B))
    if args.A.resolve() == args.B.resolve() and first_A == first_B:
        raise InputError(f"--A and --B {args.B}: the same images; choose rows: --rows_A COLUMN=VALUE, --rows_B")
    if same:
        raise InputError(f"--A {args.A} and --B {args.B}: both hold {min(same)}; expected two kinds of images")


def cut_pair(path: Path) -> list[Image.Image]:
    """Return the left and the right half of an image; raises UnreadableImage."""
    values = images.read_values(path)  # of more than 8 bits, which are kept
    if values is not None and values.ndim == 3:
        raise images.UnreadableImage("shows colours of more than 8 bits; cut it yourself, or convert it to 8 bits")
    image = images.to_8_bit(images.read_image(path)) if values is None else Image.fromarray(np.array(values))
    half = image.width // 2
    if not half:
        raise images.UnreadableImage("1 px wide, so it shows no pair")
    return [image.crop((left, 0, left + half, image.height)) for left in (0, image.width - half)]


def split_pairs(args: Namespace) -> None:
    """Make the layout from images that show both domains side by side; their own train, val and test folders remain."""
    if not args.pairs.is_dir():
        raise InputError(f"--pairs {args.pairs}: no such folder; expected a folder with images")
    kinds = [kind for kind in ("train", "val", "test") if (args.pairs / kind).is_dir()]
    found = {kind: images.list_images(args.pairs / kind)[: args.max_images] for kind in kinds}
    if not found.get("train"):
        paths = images.list_images(args.pairs)
        random.Random(f"{args.seed}-pairs").shuffle(paths)
        paths = paths[: args.max_images]
        tests = min(len(paths) - 1, math.ceil(len(paths) * args.test_fraction))
        found = {"train": paths[tests:], "test": paths[:tests]} if paths else {}
    if not found:
        raise InputError(f"--pairs {args.pairs}: no image inside; expected {images.EXPECTED}")
    with new_folder(args.data_root / args.dataset_name) as unfinished:
        for kind, paths in found.items():
            folder = args.pairs / kind if kinds else args.pairs
            bar = tqdm(paths, desc=kind, leave=False)
            for path, halves in images.BadImages(folder, len(paths)).read(bar, cut_pair):
                for domain, half in zip(args.sides, halves, strict=True):
                    suffix = ".png" if half.mode == "RGB" else ".tif"
                    target = unfinished / f"{kind}{domain}" / path.relative_to(folder).with_suffix(suffix)
                    if target.exists():  # a.jpg beside a.png
                        target = target.with_name(f"{path.name}{suffix}")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    half.save(target)
        counts = ", ".join(f"{counted(len(paths), 'pair')} in {kind}" for kind, paths in found.items())
        say(f"{args.dataset_name}: {counts}; the left half is {args.sides[0]}")


def check_dataset(args: Namespace) -> None:
    """Count, measure and compare the images of a data set; raises InputError if it cannot be trained on."""
    folder = find_dataset(args.data_root, args.dataset_name)
    for domain in "AB":
        split_images(folder, f"train{domain}")
    digests = {}  # by path in the data set
    readable = {}  # by split
    faults = []
    for split in SPLITS:
        inside = split_folder(folder, split)
        if inside.is_dir():
            facts, fault = checks.check_split(folder, split)
            readable[split] = list(facts)
            digests |= {split / path.relative_to(inside): fact.digest for path, fact in facts.items()}
            if fault and split.startswith("train"):
                faults.append(fault)
    ranges = {domain: find_range(DataConfig(), domain, readable[f"train{domain}"]) for domain in "AB"}
    duplicates = checks.find_duplicates(digests)
    if args.sheet and digests:
        sheet = Path("generated_images") / args.dataset_name / "check.png"
        images.save_image(checks.draw_sheet(readable, ranges), sheet)
        say(f"sheet: {sheet}")
    if args.remove_twins:
        checks.remove_duplicates(folder, duplicates, digests)
    elif checks.extra_copies(duplicates):
        say(f"to move the extra copies to {folder / 'removed'}, give --remove_twins")
    trained = [len(readable.get(f"train{domain}", ())) for domain in "AB"]
    if args.dataset_name != DEMO:
        say(outlook(min(trained)))
    if faults:
        raise InputError(f"{folder}: unusable: {'; '.join(faults)}")


def rows_text(text: str) -> str:
    """Accept COLUMN=VALUE; else raise ValueError."""
    column, _, value = text.partition("=")
    if not column or not value:
        raise ValueError(f"given {text!r}, expected COLUMN=VALUE, such as label=cat")
    return text


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line of the sub-commands."""
    parser = Parser(prog="prepare.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="draw, download, split, check")
    new_name = argument_type(folder_name)
    source = argument_type(existing_or_new_path)
    draw = commands.add_parser("draw", help="draw the demo set")
    draw.add_argument("dataset_name", choices=[DEMO])
    add_options(draw, "settings", _DrawOptions)
    download = commands.add_parser("download", help="download a data set of the paper, or an archive with their layout")
    download.add_argument("dataset_name", type=new_name, help=OFFICIAL)
    download.add_argument("--url", help="address of a zip or tar, in place of the authors'")
    split = commands.add_parser("split", help="make a data set from images of two kinds")
    for domain in "AB":
        split.add_argument(
            f"--{domain}",
            type=source,
            metavar="SOURCE",
            help=f"images of domain {domain}: a folder, a quoted pattern such as 'cat_*.jpg', a zip, tar or parquet file",
        )
    for domain in "AB":
        split.add_argument(
            f"--rows_{domain}",
            type=argument_type(rows_text),
            metavar="COLUMN=VALUE",
            help="rows of a parquet file to use",
        )
    split.add_argument(
        "--pairs", type=source, metavar="DIR", help="images that show A beside B, in place of --A and --B"
    )
    split.add_argument(
        "--sides", default="AB", choices=("AB", "BA"), help="which domain is left in --pairs (default: AB)"
    )
    split.add_argument("--dataset_name", type=new_name, required=True, help="name of the new data set")
    add_options(split, "settings", _SplitOptions)
    check = commands.add_parser("check", help="count, measure and compare the images of a data set")
    check.add_argument("dataset_name", type=new_name)
    add_options(check, "settings", _CheckOptions)
    for sub_parser in (draw, download, split, check):
        sub_parser.add_argument(
            "--data_root", type=Path, default="datasets", help="folder of the data sets (default: datasets)"
        )
    args = parser.parse_args(argv)
    if args.command == "split" and args.pairs and (args.A or args.B or args.rows_A or args.rows_B):
        parser.error("split: --pairs contradicts --A and --B; give it alone")
    if args.command == "split" and not (args.pairs or (args.A and args.B)):
        parser.error("split: needs --A and --B, or --pairs alone")
    return args


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run one sub-command."""
    args = parse_args(argv)
    use_pages(args.pages if args.command == "check" else "whole")
    if "max_megapixels" in args:
        images.limit_pixels(1e6 * args.max_megapixels)
    runs = {"download": download_dataset, "check": check_dataset}
    runs["split"] = split_pairs if args.command == "split" and args.pairs else split_dataset
    runs["draw"] = lambda args: draw_dataset(args.data_root, args.size)
    runs[args.command](args)


if __name__ == "__main__":
    main()
