"""Make and check data sets: folders of images named trainA, trainB, testA and testB.

python prepare.py draw day2night --size 64
python prepare.py download horse2zebra
python prepare.py split --A faces --B caricatures --dataset_name face2caricature
python prepare.py split --pairs facades --sides BA --dataset_name facades
python prepare.py check face2caricature --sheet
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import errno
import http.client
import itertools
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

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets import DEMO, DOMAINS, MAX_MEGAPIXELS, DataConfig, find_dataset, find_range, outlook, split_images
from toolkit import checks, images
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


@dataclass(frozen=True)
class _DrawOptions:
    size: int = option(64, "side of the images in px", least=16, most=4096)


@dataclass(frozen=True)
class _SplitOptions:
    test_fraction: float = option(0.1, "fraction of the images that is kept for testing", least=0, most=0.9)
    max_images: int | None = option(None, "use at most N images of each domain (default: all)", least=2)
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


def unpack(archive: Path, folder: Path) -> dict[str, int]:
    """Unpack the images of trainA, trainB, testA, … from a zip, whatever surrounds them, and count them by split.

    raises: OSError if the disk is full; any other exception for a file that is damaged, hostile or no data set
    """
    with zipfile.ZipFile(archive) as file:
        entries = [entry for entry in file.infolist() if not entry.is_dir()]
        size = sum(entry.file_size for entry in entries)
        if size > MOST_BYTES:
            raise ValueError(f"claims {size / 2**30:.1f} GiB of images, more than any data set")
        if size > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, f"no space to unpack {size / 2**30:.1f} GiB; free some first", str(archive))
        for entry in tqdm(entries, desc="unpacking", leave=False):
            path = PurePosixPath(entry.filename.replace("\\", "/"))
            if entry.external_attr >> 28 == 0xA or path.is_absolute() or ".." in path.parts:  # 0xA: a link
                raise ValueError(f"would write outside its folder: {entry.filename}")
            parts = list(itertools.dropwhile(lambda part: part not in SPLITS, path.parts))
            if len(parts) > 1 and suffix_of(Path(path)) in images.SUFFIXES and not path.name.startswith("."):
                target = folder.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(entry) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
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


def split_dataset(args: Namespace) -> None:
    """Make the layout of a data set from two plain folders, by copying."""
    folder_A = args.A.resolve()
    folder_B = args.B.resolve()
    if folder_A in (folder_B, *folder_B.parents) or folder_B in folder_A.parents:
        raise InputError(f"--A {args.A} and --B {args.B}: the same folder, or one in the other; expected two")
    sources = {"A": args.A, "B": args.B}
    found = {}
    for domain, source in sources.items():  # both, before the images of A are read and copied
        if not source.is_dir():
            raise InputError(f"--{domain} {source}: no such folder; expected a folder with images")
        found[domain] = images.list_images(source)
        if not found[domain]:
            raise InputError(f"--{domain} {source}: no image inside; expected {images.EXPECTED}")
    with new_folder(args.data_root / args.dataset_name) as unfinished:
        for domain, source in sources.items():
            random.Random(f"{args.seed}-{domain}").shuffle(found[domain])
            bar = tqdm(found[domain], desc=f"reading {source.name}", leave=False)
            readable = images.BadImages(source, len(found[domain])).read(bar, images.read_size)
            paths = [path for path, _ in itertools.islice(readable, args.max_images)]
            if len(paths) < 2:
                raise InputError(
                    f"--{domain} {source}: {counted(len(paths), 'readable image')}; expected a folder with 2 or more"
                )
            tests = min(len(paths) - 1, math.ceil(len(paths) * args.test_fraction))
            _copy_images(paths[:tests], source, unfinished / f"test{domain}")
            _copy_images(paths[tests:], source, unfinished / f"train{domain}")
            trains = counted(len(paths) - tests, "image")
            say(f"{args.dataset_name}: {trains} in train{domain}, {tests} in test{domain}")
        if folder_A.name != folder_B.name:
            write_json(unfinished / DOMAINS, [folder_A.name, folder_B.name])


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
        if (folder / split).is_dir():
            facts, fault = checks.check_split(folder / split)
            readable[split] = list(facts)
            digests |= checks.digests_of_files(facts, folder)
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


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line of the sub-commands."""
    parser = Parser(prog="prepare.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="draw, download, split, check")
    new_name = argument_type(folder_name)
    source = argument_type(existing_or_new_path)
    draw = commands.add_parser("draw", help="draw the demo set")
    draw.add_argument("dataset_name", choices=[DEMO])
    add_options(draw, "settings", _DrawOptions)
    download = commands.add_parser("download", help="download a data set of the paper, or a zip with their layout")
    download.add_argument("dataset_name", type=new_name, help=OFFICIAL)
    download.add_argument("--url", help="address of a zip, in place of the authors'")
    split = commands.add_parser("split", help="make a data set from two folders of images")
    for domain in "AB":
        split.add_argument(f"--{domain}", type=source, metavar="DIR", help=f"images of domain {domain}")
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
    if args.command == "split" and args.pairs and (args.A or args.B):
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
