"""Make and check data sets: folders of images named trainA, trainB, testA and testB.

python prepare.py draw day2night --size 64
python prepare.py download horse2zebra
python prepare.py split --A faces --B caricatures --dataset_name face2caricature
python prepare.py check face2caricature --sheet
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import errno
import http.client
import math
import random
import shutil
import urllib.error
import urllib.request
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from datasets import DEMO, PixelConfig, find_dataset, split_images
from toolkit import checks, images
from toolkit.cli import Parser, add_options, argument_type
from toolkit.files import new_folder, refuse_existing
from toolkit.process import command
from toolkit.synthetic import draw_dataset
from utils import InputError, RunError, counted, existing_or_new_path, folder_name, one_line, option, say, warn

SPLITS = ("trainA", "valA", "testA", "trainB", "valB", "testB")
SHEET_IMAGES = {"train": 16, "val": 4, "test": 8}  # of each domain on the sheet, at most
ADDRESS = "http://efrosgans.eecs.berkeley.edu/cyclegan/datasets"  # of the authors; --url names a mirror
OFFICIAL = (
    "ae_photos, apple2orange, cezanne2photo, facades, horse2zebra, iphone2dslr_flower, maps, monet2photo, "
    "summer2winter_yosemite, ukiyoe2photo, vangogh2photo"
)
MOST_BYTES = 30 * 2**30  # unpacked; the largest official data set has 3 GiB
TIMEOUT = 30  # seconds without a byte


# ---------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class DrawOptions:
    """How to draw the demo set."""

    size: int = option(64, "side of the images in px", least=16, most=4096)


@dataclass(frozen=True)
class SplitOptions(PixelConfig):
    """How to divide two folders of images."""

    test_fraction: float = option(0.1, "fraction of the images that is kept for testing", least=0, most=0.9)
    max_images: int | None = option(None, "use at most N images of each domain (default: all)", least=2)
    seed: int = option(0, "seed of the random choice of images", least=0)


@dataclass(frozen=True)
class CheckOptions(PixelConfig):
    """What to do beyond printing."""

    sheet: bool = option(False, "also draw images of A beside images of B: generated_images/NAME/check.png")
    remove_twins: bool = option(
        False, "move all but one of the same images to removed/ in the data set, those in train before those in test"
    )


# ---------------------------------------------------------------------------------------------
# Drawing and downloading


def draw_demo_set(args: Namespace) -> None:
    """Draw day2night."""
    draw_dataset(args.data_root, args.size)


def archive_url(dataset_name: str, url: str | None) -> str:
    """Return the address of the zip of a data set: the given one, or that of an official data set.

    raises: InputError if there is no such data set, or the address is not one
    """
    if url and not url.startswith(("http://", "https://")):
        raise InputError(f"--url {url}: expected an address that begins with http:// or https://")
    if not url and dataset_name not in OFFICIAL.split(", "):
        raise InputError(f"{dataset_name}: no official set; expected one of {OFFICIAL}, or a zip elsewhere: --url")
    return url or f"{ADDRESS}/{dataset_name}.zip"


def fetch(url: str, part: Path) -> None:
    """Download a file, continuing where an earlier attempt stopped.

    raises: InputError if there is no such file, or no connection; RunError if the download stops early
    """
    done = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={done}-"} if done else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
            if response.status != 206:  # the server sends the file from its start
                done = 0
            total = done + int(response.headers.get("Content-Length") or 0)
            if shutil.disk_usage(part.parent).free < total - done:
                raise RunError(f"{part.parent}: no space for {total / 1e6:,.0f} MB; free some and run it again")
            bar = tqdm(total=total or None, initial=done, unit="B", unit_scale=True, desc=part.stem.lstrip("."))
            with part.open("ab" if done else "wb") as file, bar:
                while block := response.read(2**16):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file is already complete
            return
        raise InputError(
            f"{url}: the server answers {error.code} {error.reason}; check the name, or give a mirror: --url"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise connection_error(url, part, error) from error
    done = part.stat().st_size
    if done < total:
        raise RunError(f"{url}: broke off after {done / 1e6:.1f} of {total / 1e6:.1f} MB; run it again to continue")


def connection_error(url: str, part: Path, error: Exception) -> InputError | RunError:
    """Describe a download that broke off after some bytes, or never began."""
    reason = getattr(error, "reason", None) or error
    kept = part.stat().st_size if part.exists() else 0
    if kept:
        return RunError(f"{url}: broke off after {kept / 1e6:.1f} MB ({reason}); run it again to continue")
    return InputError(
        f"{url}: cannot be reached ({reason}); check the connection, give a mirror with --url, "
        f"or start without a download: python prepare.py draw {DEMO}"
    )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the images of trainA, trainB, testA, … from a zip, whatever folders and files surround them.

    raises: InputError if it would write outside `folder`, or is larger than any data set; RunError if the disk is too
            full; any other exception if it is damaged or hostile
    """
    with zipfile.ZipFile(archive) as file:
        entries = [entry for entry in file.infolist() if not entry.is_dir()]
        paths = {entry: PurePosixPath(entry.filename.replace("\\", "/")) for entry in entries}
        for entry, path in paths.items():
            is_link = entry.external_attr >> 28 == 0xA
            if is_link or path.is_absolute() or ".." in path.parts:
                raise InputError(
                    f"{archive}: would write outside its folder ({one_line(entry.filename)[:80]}); not unpacked"
                )
        size = sum(entry.file_size for entry in entries)
        if size > MOST_BYTES:
            raise InputError(
                f"{archive}: claims {size / 2**30:.1f} GiB of images, more than any data set; not unpacked"
            )
        if size > shutil.disk_usage(folder).free:
            raise RunError(f"{archive}: no space to unpack {size / 2**30:.1f} GiB; free some and run it again")
        for entry, path in tqdm(paths.items(), desc="unpacking", leave=False):
            depth = next((i for i, part in enumerate(path.parts[:-1]) if part in SPLITS), None)
            if depth is None or path.suffix.lower() not in images.SUFFIXES or path.name.startswith("."):
                continue
            target = folder.joinpath(*path.parts[depth:])
            target.parent.mkdir(parents=True, exist_ok=True)
            with file.open(entry) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def unpack_download(url: str, part: Path, folder: Path) -> dict[str, int]:
    """Unpack a download and count its images by split; delete a file that is not a data set.

    If the disk is full the file is kept, and the next attempt uses it.
    raises: InputError if it cannot be unpacked, or has no training images
    """
    try:
        unpack(part, folder)
        counts = {}
        for split in sorted(SPLITS):
            if (folder / split).is_dir():
                counts[split] = len(images.list_images(folder / split))
        if not (counts.get("trainA") and counts.get("trainB")):
            raise InputError(f"{url}: holds no trainA and trainB with images (found: {counts or 'none'}); deleted")
    except Exception as error:  # zipfile, zlib, bz2, lzma and the file system raise a dozen types on hostile files
        if isinstance(error, RunError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        part.unlink()
        if isinstance(error, InputError):
            raise
        reason = one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__)[:80]
        raise InputError(
            f"{url}: sent no zip that can be unpacked ({reason}); deleted; try again, or another --url"
        ) from error
    return counts


def download_dataset(args: Namespace) -> None:
    """Download one of the official data sets, or any zip with their layout."""
    url = archive_url(args.dataset_name, args.url)
    part = args.data_root / f".{args.dataset_name}.zip.part"
    with new_folder(args.data_root / args.dataset_name) as unfinished:
        say(f"downloading {url}")
        fetch(url, part)
        counts = unpack_download(url, part, unfinished)
    part.unlink()
    splits = [f"{counted(count, 'image')} in {split}" for split, count in counts.items()]
    say(f"{args.data_root / args.dataset_name}: {', '.join(splits)}")


# ---------------------------------------------------------------------------------------------
# Splitting


def choose_images(domain: str, source: Path, seed: int, max_images: int | None) -> list[Path]:
    """Choose readable images from a folder, in random order; name the unreadable ones.

    raises: InputError if too many are unreadable, or fewer than two readable
    """
    if not source.is_dir():
        raise InputError(f"--{domain} {source}: no such folder; expected a folder with images")
    paths = images.list_images(source)
    if not paths:
        raise InputError(f"--{domain} {source}: no image inside; expected {' '.join(sorted(images.SUFFIXES))}")
    random.Random(f"{seed}-{domain}").shuffle(paths)
    readable = []
    unreadable = 0
    for path in tqdm(paths, desc=f"reading {source.name}", leave=False):
        if len(readable) == max_images:
            break
        try:
            images.read_image(path)
            readable.append(path)
        except images.UnreadableImage as error:
            unreadable += 1
            warn(f"{path} cannot be read ({error}); left out")
    if unreadable > max(1, images.BAD_FRACTION * len(paths)):
        raise InputError(
            f"--{domain} {source}: {unreadable} of {len(paths)} images cannot be read, "
            f"more than {images.BAD_FRACTION:.0%}; repair or remove those named above"
        )
    if len(readable) < 2:
        raise InputError(
            f"--{domain} {source}: {counted(len(readable), 'readable image')}, expected 2: one to train, one to test"
        )
    return readable


def copy_images(paths: Sequence[Path], source: Path, target: Path) -> None:
    """Copy images into a new folder, with their sub-folders."""
    target.mkdir()
    for path in tqdm(paths, desc=target.name, leave=False):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def split_dataset(args: Namespace) -> None:
    """Make the layout of a data set from two plain folders, by copying."""
    folder = args.data_root / args.dataset_name
    refuse_existing(folder)  # before every image is read
    folder_A = args.A.resolve()
    folder_B = args.B.resolve()
    if folder_A == folder_B:
        raise InputError(f"--A and --B are the same folder ({args.A}); expected one per domain")
    if folder_A in folder_B.parents or folder_B in folder_A.parents:
        raise InputError(f"--A {args.A} and --B {args.B}: one is inside the other; expected separate folders")
    sources = {"A": args.A, "B": args.B}
    chosen = {}
    for domain, source in sources.items():
        chosen[domain] = choose_images(domain, source, args.seed, args.max_images)
    with new_folder(folder) as unfinished:
        for domain, paths in chosen.items():
            tests = min(len(paths) - 1, math.ceil(len(paths) * args.test_fraction))
            copy_images(paths[:tests], sources[domain], unfinished / f"test{domain}")
            copy_images(paths[tests:], sources[domain], unfinished / f"train{domain}")
            trains = counted(len(paths) - tests, "image")
            say(f"{args.dataset_name}: {trains} in train{domain}, {tests} in test{domain}")


# ---------------------------------------------------------------------------------------------
# Checking


def check_dataset(args: Namespace) -> None:
    """Count, measure and compare the images of a data set.

    raises: InputError if it cannot be trained on
    """
    folder = find_dataset(args.data_root, args.dataset_name)
    for domain in "AB":
        split_images(folder, f"train{domain}")
    digests = {}  # by path in the data set
    cells = {}  # of the sheet, by split and name
    faults = []
    for split in SPLITS:
        if not (folder / split).is_dir():
            continue
        facts, fault = checks.check_split(folder / split, SHEET_IMAGES[split[:-1]] if args.sheet else 0)
        if fault and split.startswith("train"):
            faults.append(fault)
        digests |= {path.relative_to(folder): fact.digest for path, fact in facts.items()}
        cells[split] = {str(path.relative_to(folder / split)): fact.cell for path, fact in facts.items() if fact.cell}
    duplicates = checks.find_duplicates(digests)
    if args.sheet and any(cells.values()):
        rows = []
        for kind in SHEET_IMAGES:
            rows.append({split: cells.get(split, {}) for split in (f"{kind}A", f"{kind}B")})
        sheet = Path("generated_images") / args.dataset_name / "check.png"
        images.save_image(checks.draw_sheet(rows), sheet)
        say(f"sheet: {sheet}")
    if args.remove_twins:
        checks.remove_duplicates(folder, duplicates, digests)
    elif checks.extra_copies(duplicates):
        say(f"to move the extra copies to {folder / 'removed'}, give --remove_twins")
    if faults:
        raise InputError(f"{folder}: unusable: {'; '.join(faults)}")


# ---------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line of the sub-commands."""
    parser = Parser(prog="prepare.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="draw, download, split, check")
    new_name = argument_type(folder_name)
    draw = commands.add_parser("draw", help="draw the demo set")
    draw.add_argument("dataset_name", choices=[DEMO])
    download = commands.add_parser("download", help="download a data set of the paper, or a zip with their layout")
    download.add_argument("dataset_name", type=new_name, help=OFFICIAL)
    download.add_argument("--url", help="address of a zip, in place of the authors'")
    split = commands.add_parser("split", help="make a data set from two folders of images")
    source = argument_type(existing_or_new_path)
    split.add_argument("--A", type=source, required=True, metavar="DIR", help="images of domain A")
    split.add_argument("--B", type=source, required=True, metavar="DIR", help="images of domain B")
    split.add_argument("--dataset_name", type=new_name, required=True, help="name of the new data set")
    check = commands.add_parser("check", help="count, measure and compare the images of a data set")
    check.add_argument("dataset_name", type=new_name)
    add_options(draw, "settings", DrawOptions)
    add_options(split, "settings", SplitOptions)
    add_options(check, "settings", CheckOptions)
    runs = {draw: draw_demo_set, download: download_dataset, split: split_dataset, check: check_dataset}
    for sub_parser, run in runs.items():
        sub_parser.add_argument(
            "--data_root", type=Path, default="datasets", help="folder of the data sets (default: datasets)"
        )
        sub_parser.set_defaults(run=run)
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run one sub-command."""
    args = parse_args(argv)
    if "max_megapixels" in args:
        images.limit_pixels(1e6 * args.max_megapixels)
    args.run(args)


if __name__ == "__main__":
    main()
