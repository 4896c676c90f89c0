"""Make and check data sets: folders trainA, trainB, testA, testB of images.

python prepare.py draw day2night --size 64
python prepare.py download horse2zebra
python prepare.py split --A faces --B caricatures --dataset_name face2caricature
python prepare.py check face2caricature --sheet
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports last: no traceback out of them

import errno
import http.client
import math
import random
import shutil
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from datasets import DEMO, find_dataset, split_images
from toolkit import checks, images
from toolkit.cli import Parser, add_pixel_flag, float_between, folder_name, int_between, path_name
from toolkit.files import new_folder, refuse_existing
from toolkit.process import command
from toolkit.synthetic import draw_dataset
from utils import InputError, RunError, counted, one_line, say, warn

SPLITS = ("trainA", "valA", "testA", "trainB", "valB", "testB")
SHEET_CELLS = {"train": 16, "val": 4, "test": 8}  # of each domain on the sheet, at most


# ---------------------------------------------------------------------------------------------
# Downloading

ADDRESS = "http://efrosgans.eecs.berkeley.edu/cyclegan/datasets"  # of the authors; a mirror is given with --url
OFFICIAL = (
    "ae_photos, apple2orange, cezanne2photo, facades, horse2zebra, iphone2dslr_flower, maps, monet2photo, "
    "summer2winter_yosemite, ukiyoe2photo, vangogh2photo"
)
MOST_BYTES = 30 * 2**30  # unpacked; the largest official set has 3 GiB
WAIT = 30  # seconds without a byte


def archive_url(dataset_name: str, url: str | None) -> str:
    """Return the address of a set's zip: the given one, or that of an official set.

    raises: InputError if there is no such set, or the address can be none
    """
    if not url and dataset_name not in OFFICIAL.split(", "):
        raise InputError(f"{dataset_name}: no official set; expected one of {OFFICIAL}, or a zip elsewhere: --url")
    url = url or f"{ADDRESS}/{dataset_name}.zip"
    try:
        scheme = urllib.parse.urlsplit(url).scheme
    except ValueError as error:  # of brackets, as in http://[bad
        raise InputError(f"--url {url}: not an address ({error}); expected such as http://host/set.zip") from error
    if scheme not in ("http", "https"):
        raise InputError(f"--url {url}: expected an address that begins with http:// or https://")
    return url


def fetch(url: str, part: Path) -> None:
    """Download a file, going on where an earlier attempt broke off.

    raises: InputError if there is no such file, or no connection; RunError if it breaks off (run it again)
    """
    done = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={done}-"} if done else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=WAIT) as response:
            if response.status != 206:  # the server starts again, so do we
                done = 0
            total = done + int(response.headers.get("Content-Length") or 0)
            if shutil.disk_usage(part.parent).free < total - done:
                raise RunError(f"{part.parent}: no room for {total / 1e6:,.0f} MB; make room and run it again")
            bar = tqdm(total=total or None, initial=done, unit="B", unit_scale=True, desc=part.stem.lstrip("."))
            with part.open("ab" if done else "wb") as file, bar:
                while block := response.read(2**16):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send
            return
        words = f"the server answers {error.code} {error.reason}; check the name, or give a mirror: --url"
        raise InputError(f"{url}: {words}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise broken_off(url, part, error) from error
    done = part.stat().st_size
    if done < total:
        raise RunError(f"{url}: broke off after {done / 1e6:.1f} of {total / 1e6:.1f} MB; run it again to go on")


def broken_off(url: str, part: Path, error: Exception) -> InputError | RunError:
    """Say what became of a download: broken off after some bytes, or never begun."""
    reason = getattr(error, "reason", None) or error
    kept = part.stat().st_size if part.exists() else 0
    if kept:
        return RunError(f"{url}: broke off after {kept / 1e6:.1f} MB ({reason}); run it again to go on")
    remedy = f"give a mirror with --url, or start with what needs none: python prepare.py draw {DEMO}"
    return InputError(f"{url}: cannot be reached ({reason}); check the connection, {remedy}")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the images of trainA, trainB, testA, … from a zip into `folder`, whatever lies around them.

    raises: InputError if it wants to write elsewhere, or claims more than any data set holds; RunError if it does not
            fit on the disk; anything at all if it is damaged or hostile
    """
    with zipfile.ZipFile(archive) as file:
        entries = [entry for entry in file.infolist() if not entry.is_dir()]
        names = {entry: PurePosixPath(entry.filename.replace("\\", "/")) for entry in entries}
        for entry, name in names.items():
            is_link = entry.external_attr >> 28 == 0xA
            if is_link or name.is_absolute() or ".." in name.parts:
                words = f"wants to write outside its folder ({one_line(entry.filename)[:80]}); not unpacked"
                raise InputError(f"{archive}: {words}")
        size = sum(entry.file_size for entry in entries)
        claim = f"{archive}: claims {size / 2**30:.1f} GiB of images, more than fit; not unpacked"
        if size > MOST_BYTES:
            raise InputError(claim)
        if size > shutil.disk_usage(folder).free:
            raise RunError(f"{claim}; make room and run it again")
        for entry, name in tqdm(names.items(), desc="unpacking", leave=False):
            depth = next((i for i, part in enumerate(name.parts[:-1]) if part in SPLITS), None)
            if depth is None or name.suffix.lower() not in images.SUFFIXES or name.name.startswith("."):
                continue
            target = folder.joinpath(*name.parts[depth:])
            target.parent.mkdir(parents=True, exist_ok=True)
            with file.open(entry) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def unpack_download(url: str, part: Path, folder: Path) -> dict[str, int]:
    """Unpack what was downloaded and count its images by folder; a file that is no data set is deleted.

    A full disk says nothing against the file: then it stays, and the next attempt starts from it.
    raises: InputError if it cannot be unpacked, or holds no training images
    """
    try:
        unpack(part, folder)
        counts = {name: len(images.list_images(folder / name)) for name in sorted(SPLITS) if (folder / name).is_dir()}
        if not (counts.get("trainA") and counts.get("trainB")):
            raise InputError(f"{url}: holds no trainA and trainB with images (found: {counts or 'none'}); deleted")
    except Exception as error:  # zipfile, zlib, bz2, lzma and the file system raise a dozen kinds on hostile files
        if isinstance(error, RunError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        part.unlink()
        if isinstance(error, InputError):
            raise
        reason = one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__)[:80]
        words = f"sent no zip that can be unpacked ({reason}); deleted; try again, or another --url"
        raise InputError(f"{url}: {words}") from error
    return counts


def download_dataset(args: Namespace) -> None:
    """Fetch one of the official sets, or any zip with their layout, and check what came."""
    url = archive_url(args.dataset_name, args.url)
    part = args.data_root / f".{args.dataset_name}.zip.part"
    with new_folder(args.data_root / args.dataset_name) as unfinished:
        say(f"fetching {url}")
        fetch(url, part)
        counts = unpack_download(url, part, unfinished)
    part.unlink()
    words = [f"{counted(count, 'image')} in {name}" for name, count in counts.items()]
    say(f"{args.data_root / args.dataset_name}: {', '.join(words)}")


# ---------------------------------------------------------------------------------------------
# Splitting


def choose_images(domain: str, source: Path, seed: int, max_images: int | None) -> list[Path]:
    """Draw images from a folder, in random order; each is read whole, and named if it cannot be.

    raises: InputError if too many cannot be read, or too few can
    """
    if not source.is_dir():
        raise InputError(f"--{domain} {source}: no such folder; expected a folder with images")
    paths = images.list_images(source)
    if not paths:
        raise InputError(f"--{domain} {source}: no image inside; expected {' '.join(sorted(images.SUFFIXES))}")
    random.Random(f"{seed}-{domain}").shuffle(paths)
    whole = []
    broken = 0
    for path in tqdm(paths, desc=f"reading {source.name}", leave=False):
        if len(whole) == max_images:
            break
        try:
            images.read_image(path)
            whole.append(path)
        except images.UnreadableImage as error:
            broken += 1
            warn(f"{path} cannot be read ({error}); left out")
    if broken > max(1, images.BAD_FRACTION * len(paths)):
        words = f"{broken} of {len(paths)} images cannot be read, more than {images.BAD_FRACTION:.0%}"
        raise InputError(f"--{domain} {source}: {words}; mend or remove those named above")
    if len(whole) < 2:
        found = counted(len(whole), "readable image")
        raise InputError(f"--{domain} {source}: {found}, expected 2: one to train, one to test")
    return whole


def copy_images(paths: Sequence[Path], source: Path, target: Path) -> None:
    """Copy images into a new folder, sub-folders kept."""
    target.mkdir()
    for path in tqdm(paths, desc=target.name, leave=False):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def split_dataset(args: Namespace) -> None:
    """Make the layout of a data set from two plain folders, by copying."""
    folder = args.data_root / args.dataset_name
    refuse_existing(folder)  # before every image is read
    sources = {"A": args.A, "B": args.B}
    one = args.A.resolve()
    other = args.B.resolve()
    if one == other:
        raise InputError(f"--A and --B are the same folder ({args.A}); expected one per domain")
    if one in other.parents or other in one.parents:
        raise InputError(f"--A {args.A} and --B {args.B}: one lies inside the other; expected two folders apart")
    chosen = {d: choose_images(d, source, args.seed, args.max_images) for d, source in sources.items()}
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
    """Count, measure and compare the images of a data set; exit code 2 if it cannot be trained on."""
    folder = find_dataset(args.data_root, args.dataset_name)
    for domain in "AB":
        split_images(folder, f"train{domain}")
    pixels = {}  # hashes by path in the data set
    cells = {}
    faults = []
    for name in SPLITS:
        if not (folder / name).is_dir():
            continue
        facts, fault = checks.check_split(folder / name, SHEET_CELLS[name[:-1]] if args.sheet else 0)
        if fault and name.startswith("train"):
            faults.append(fault)
        pixels |= {path.relative_to(folder): fact.pixels for path, fact in facts.items()}
        cells[name] = {str(p.relative_to(folder / name)): fact.cell for p, fact in facts.items() if fact.cell}
    twins = checks.find_twins(pixels)
    if args.sheet and any(cells.values()):
        rows = [{f"{split}{domain}": cells.get(f"{split}{domain}", {}) for domain in "AB"} for split in SHEET_CELLS]
        sheet = Path("generated_images") / args.dataset_name / "check.png"
        images.save_image(checks.draw_sheet(rows), sheet)
        say(f"sheet: {sheet}")
    if args.remove_twins:
        checks.remove_twins(folder, twins, pixels)
    elif checks.extra_twins(twins):
        say(f"to move the extra ones to {folder / 'removed'}, give --remove_twins")
    if faults:
        raise InputError(f"{folder}: unusable: {'; '.join(faults)}")


# ---------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line of the sub-commands."""
    parser = Parser(prog="prepare.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="draw, download, split, check")
    draw = commands.add_parser("draw", help="draw the demo set")
    draw.add_argument("dataset_name", choices=[DEMO])
    draw.add_argument("--size", type=int_between(16, 4096), default=64, help="side of the images, px (default: 64)")
    download = commands.add_parser("download", help="fetch one of the sets of the paper, or a zip with their layout")
    download.add_argument("dataset_name", type=folder_name, help=OFFICIAL)
    download.add_argument("--url", help="address of a zip, in place of the authors'")
    split = commands.add_parser("split", help="make a data set from two folders of images")
    split.add_argument("--A", type=path_name, required=True, metavar="DIR", help="images of domain A")
    split.add_argument("--B", type=path_name, required=True, metavar="DIR", help="images of domain B")
    split.add_argument("--dataset_name", type=folder_name, required=True, help="name of the new data set")
    split.add_argument("--test_fraction", type=float_between(0, 0.9), default=0.1, help="for testing (default: 0.1)")
    split.add_argument("--max_images", type=int_between(2), help="take at most so many of each domain (default: all)")
    split.add_argument("--seed", type=int_between(0), default=0, help="which images are taken (default: 0)")
    check = commands.add_parser("check", help="count, measure and compare the images of a data set")
    check.add_argument("dataset_name", type=folder_name)
    sheet = "also draw images of A beside images of B with their names: generated_images/NAME/check.png"
    check.add_argument("--sheet", action="store_true", help=sheet)
    twins = "move all but one of the same images to removed/ in the data set, those in train before those in test"
    check.add_argument("--remove_twins", action="store_true", help=twins)
    for sub in (split, check):
        add_pixel_flag(sub.add_argument)
    draw.set_defaults(run=lambda args: draw_dataset(args.data_root, args.size))
    download.set_defaults(run=download_dataset)
    split.set_defaults(run=split_dataset)
    check.set_defaults(run=check_dataset)
    for sub in (draw, download, split, check):
        sub.add_argument("--data_root", type=Path, default="datasets", help="folder of all (default: datasets)")
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
