"""Translate images with trained generators, show them in a gallery, score them.

python test.py --dataset_name horse2zebra
python test.py --run_name horse2zebra --input photos --direction AtoB --scale native
python test.py --weights saved_models/horse2zebra/G_AB.safetensors --input photo.jpg
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports last: no traceback out of them

import functools
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import datasets
import utils
from cyclegan import LossConfig
from toolkit import cli, files, images, metrics, process
from toolkit.checkpoints import IMAGES
from toolkit.gallery import Result, forget_scores, shown_file, sweep, write_gallery
from toolkit.inference import DOMAINS, Translator, load_networks, translate_folder
from toolkit.metrics import fid_kid, need_torch_fidelity
from utils import InputError

MEASURES = (*cli.MEASURES, "fid", "kid")
NEEDED = {"train": {"paired", "fid", "kid"}, "test": {"identity", "losses", "fid", "kid"}}  # of the target domain
COLUMNS = 6  # images in the grid


def find_inputs(args: Namespace, direction: str) -> tuple[Path, list[Path]]:
    """Return the folder that names are relative to, and the images of a direction."""
    root = args.input
    if root is None:
        root = datasets.find_dataset(args.data_root, args.dataset_name) / f"test{DOMAINS[direction][0]}"
        paths = datasets.split_images(root.parent, root.name)
    elif root.is_file():
        root = args.input.parent
        paths = [args.input]
    else:
        paths = images.list_images(root) if root.is_dir() else []
    if not paths:
        kinds = " ".join(sorted(images.SUFFIXES))
        raise InputError(f"--input {root}: no image there; expected one, or a folder of files that end in {kinds}")
    return root, images.BadImages(root, len(paths), args.on_bad_image).readable(paths)[: args.num_test]


def find_truths(args: Namespace, direction: str, paths: Sequence[Path], needed: bool = False) -> dict[Path, Path]:
    """By input, the image of the same name in the other domain's test folder, if the data set has one; needed: any."""
    if args.input:
        return {}
    source, target = (datasets.find_dataset(args.data_root, args.dataset_name) / f"test{d}" for d in DOMAINS[direction])
    named = {datasets.pair_name(path, target): path for path in images.list_images(target)}
    pairs = {path: named.get(datasets.pair_name(path, source)) for path in paths}
    truths = {path: truth for path, truth in pairs.items() if truth}
    if needed and not truths:
        words = f"no image in {target} has the name of one in {source.name}; leave it out for unpaired sets"
        raise InputError(f"--metrics paired: {words}")
    return truths


def write_grid(output: Path, results: dict[str, list[Result]]) -> None:
    """Write grid.png: some images of each direction."""
    columns = min(COLUMNS, *(len(translated) for translated in results.values()))
    rows = []
    for translated in results.values():
        chosen = translated[:: len(translated) // columns][:columns]
        for kind in chosen[0].files:
            if all(kind in result.files for result in chosen):
                rows.append((kind, [output / shown_file(output, result.files[kind]) for result in chosen]))
    images.save_image(images.draw_file_grid(rows), output / "grid.png")


# ---------------------------------------------------------------------------------------------
# Measures


def load_split(
    args: Namespace, split: str, size: tuple[int, int] | None, channels: int, most: int | None = None
) -> Iterator[tuple[Path, Tensor]]:
    """Read one part of the data set, image by image, with their paths; unreadable ones are named and left out."""
    folder = datasets.find_dataset(args.data_root, args.dataset_name) / split
    paths = datasets.split_images(folder.parent, split, most)
    return images.load_images(folder, paths, size, channels, args.on_bad_image)


def readable(args: Namespace, split: str, most: int | None = None) -> list[Path]:
    """The images of one part of the data set that are whole."""
    return [path for path, _ in load_split(args, split, None, 3, most)]


def test_images(args: Namespace, translator: Translator, domain: str) -> images.LazyImages:
    """The test images of a domain as the networks were trained, at the size of training."""
    paths = readable(args, f"test{domain}", args.num_test)
    return images.LazyImages(paths, translator.size, translator.channels)


def check_measures(args: Namespace, inputs: dict[str, tuple[Path, list[Path]]]) -> None:
    """Raise InputError, before anything is translated, if a measure that was asked for lacks its data or package."""
    compared = [name for name in ("fid", "kid") if name in args.metrics]
    if compared:
        need_torch_fidelity(compared)
    for direction, (folder, _) in inputs.items():
        for split, measures in NEEDED.items():
            if measures & set(args.metrics):
                datasets.split_images(folder.parent, f"{split}{DOMAINS[direction][1]}")


def measure(args: Namespace, translator: Translator, direction: str, results: Sequence[Result]) -> dict:
    """Compute the measures of one direction that were asked for; errors in the units of training, [0, 2]."""
    source, target = DOMAINS[direction]
    net, back = translator.generators(direction)
    there = functools.partial(translator, net)
    way_back = functools.partial(translator, back) if back else None
    scores = {}
    wanted = [name for name in ("cycle", "identity") if name in args.metrics]
    if wanted:
        sources = test_images(args, translator, source) if "cycle" in wanted else {}
        targets = test_images(args, translator, target) if "identity" in wanted else {}
        scores |= metrics.measure_direction(there, way_back, sources, targets, wanted)
    if "spike" in args.metrics:
        inputs = images.LazyImages([result.input for result in results], translator.size, translator.channels)
        scores["spike"] = metrics.mean_spike(net, inputs, translator.precision)
    if "paired" in args.metrics:
        scores["paired"] = measure_paired(args, translator, direction, results)
    if {"fid", "kid"} & set(args.metrics):
        scores["distribution"] = measure_distribution(args, translator, target, results)
    return scores


def as_bytes(path: Path, size: tuple[int, int] | None, channels: int = 3) -> Tensor:
    """Read an image as uint8 (channels, H, W), resized as for training; size is (height, width)."""
    return images.range_to_bytes(images.load_image(path, size, channels))


def measure_distribution(args: Namespace, translator: Translator, target: str, results: Sequence[Result]) -> dict:
    """Compare the written images as a whole with the test and with the training images of the target domain."""
    load = functools.partial(as_bytes, size=translator.size or (299, 299))  # Inception sees that in any case
    fakes = [args.output / result.files[f"fake_{target}"] for result in results]
    wanted = [name for name in ("fid", "kid") if name in args.metrics]
    tables = {}
    for split in (f"test{target}", f"train{target}"):
        tables[split] = fid_kid(fakes, readable(args, split), load, wanted, args.inception_weights, translator.device)
    return tables


def measure_paired(args: Namespace, translator: Translator, direction: str, results: Sequence[Result]) -> dict:
    """Compare the written images with those of the same name in the other domain's test folder, one at a time."""
    target = DOMAINS[direction][1]
    folder = datasets.find_dataset(args.data_root, args.dataset_name) / f"test{target}"
    channels = translator.channels
    truths = find_truths(args, direction, [result.input for result in results], needed=True)
    if len(truths) < len(results):
        utils.say(f"{folder}: {len(truths)} of {len(results)} images have their truth there; only these are scored")
    bad = images.BadImages(folder, len(truths), args.on_bad_image)

    def triples() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for result in results:
            if result.input in truths:
                fake = as_bytes(args.output / result.files[f"fake_{target}"], None, channels)
                its_size: Any = fake.shape[-2:]
                try:
                    truth = as_bytes(truths[result.input], its_size, channels)
                except images.UnreadableImage as error:
                    bad.note(truths[result.input], error)
                    continue
                yield fake, as_bytes(result.input, its_size, channels), truth

    size: Any = translator.size or next(triples())[0].shape[-2:]
    mean = torch.zeros(channels, *size, dtype=torch.float64)
    for count, (_, x) in enumerate(load_split(args, f"train{target}", size, channels), start=1):
        mean += (images.range_to_bytes(x) - mean) / count
    return metrics.paired_table(triples(), mean)


def mean_losses(args: Namespace, translator: Translator, saved: dict) -> dict[str, float]:
    """The training losses on the test images; weights and form of the losses are the run's."""
    reals = {domain: test_images(args, translator, domain) for domain in "AB"}
    config = cli.config_of(LossConfig, Namespace(**saved))
    return metrics.mean_losses(translator.nets, reals, config, translator.precision)


def report(scores: dict) -> list[str]:
    """Lay out all measures as lines of text."""
    lines = []
    for direction, measures in scores.items():
        plain = {name: value for name, value in measures.items() if not isinstance(value, dict)}
        tables = [{"": plain}] if plain else []
        tables += [measures[kind] for kind in ("paired", "distribution") if kind in measures]
        if tables:
            lines.append("losses on the test set" if direction == "losses" else direction)
        lines += [line for table in tables for line in metrics.format_table(table)]
        lines += metrics.below_mean_image(measures.get("paired", {}))
    return lines


# ---------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="test.py", description=__doc__)
    add = cli.flag_group(parser, "what")
    add("--dataset_name", type=cli.folder_name, help="set whose test images are translated (default: the run's)")
    add("--data_root", type=Path, default=None, help="folder that holds the data sets (default: the run's)")
    add("--run_name", type=cli.folder_name, help="run in saved_models (default: --dataset_name, else horse2zebra)")
    add("--epoch", type=cli.epoch_name, default="latest", help="latest, best, or the number of a checkpoint")
    add("--weights", type=cli.path_name, default=None, metavar="FILE", help="a generator file, in place of a run")
    add("--input", type=Path, metavar="FILE_OR_FOLDER", help="images of one domain, in place of a data set")
    words = "which generator to use (default: both; for --input AtoB, or what the file says)"
    add("--direction", choices=("both", "AtoB", "BtoA"), default=None, help=words)
    add("--skip_existing", action="store_true", help="leave images out whose results exist already")
    add("--num_test", type=cli.int_between(1), default=None, help="translate at most so many images (default: all)")
    add = cli.flag_group(parser, "how")
    add("--scale", choices=("train", "native"), default=None, help="seen as in training (default), or at its own size")
    add("--round_trip", action=BooleanOptionalAction, help="also translate back (default: data sets yes, --input no)")
    words = "native, in tiles of so many px a side: takes less memory, and more time (default: whole)"
    add("--tile", type=cli.int_between(16, 2**16), default=None, metavar="PIXELS", help=words)
    add("--output_size", choices=("input", "net"), default="input", help="size of the results: input's or network's")
    add("--output", type=Path, metavar="DIR", help="where results go (default: generated_images/<run or file>/test)")
    kinds = {"type": cli.words_of(MEASURES), "default": [], "metavar": ",".join(MEASURES)}
    add("--metrics", **kinds, help="measures on the test images (default: none)")
    add("--inception_weights", type=cli.path_name, metavar="FILE", help="weights for fid and kid (default: download)")
    cli.add_reading_flags(add)
    cli.add_device_flags(parser)
    args = parser.parse_args(argv)
    pairs = (("weights", "run_name"), ("weights", "epoch"), ("input", "metrics"), ("input", "dataset_name"))
    cli.refuse_both(parser, args, *pairs)
    if args.inception_weights and not {"fid", "kid"} & set(args.metrics):
        parser.error("--inception_weights: has no effect without --metrics fid or kid; give both or none")
    if args.tile and args.scale == "train":
        parser.error("--tile: cuts images at their own size, and --scale train reduces them; leave one of them out")
    scale = args.scale or ("native" if args.tile else "train")
    round_trip = args.input is None if args.round_trip is None else args.round_trip
    run_name = args.run_name or args.dataset_name or "horse2zebra"
    return cli.changed(args, run_name=run_name, scale=scale, round_trip=round_trip)


def choose_directions(args: Namespace, translator: Translator) -> list[str]:
    """Return the directions to translate; refuse what these weights cannot do."""
    present = translator.directions
    wanted = [args.direction] if args.direction in DOMAINS else present
    if args.input and args.direction is None:
        wanted = present[:1]
        utils.say(f"--input {args.input}: translated {wanted[0]}; --direction chooses another")
    if not set(wanted) <= set(present):
        raise InputError(f"--direction {args.direction}: these weights translate {', '.join(present)} only")
    needed = {"losses": {"G_AB", "G_BA", "D_A", "D_B"}, "cycle": {"G_AB", "G_BA"}}
    for name in needed.keys() & set(args.metrics):
        missing = needed[name] - translator.nets.keys()
        if missing:
            raise InputError(f"--metrics {name}: needs {', '.join(sorted(missing))}, which these weights do not hold")
    return wanted


def settle_names(args: Namespace, metadata: dict) -> Namespace:
    """Fill in on which data set the networks are tested and where results go, as far as that was not given."""
    run_name = args.weights.stem if args.weights else args.run_name
    recorded = metadata.get("dataset_name")
    dataset_name = args.dataset_name or (recorded if utils.is_folder_name(recorded) else run_name)
    recorded = None if args.weights or args.input else metadata.get("data_root")
    data_root = args.data_root or datasets.recorded_root(recorded)
    output = args.output or IMAGES / run_name / "test"
    return cli.changed(args, dataset_name=dataset_name, data_root=data_root, output=output)


@process.command
def main(argv: Sequence[str] | None = None) -> dict:
    """Translate, show, score; returns the scores."""
    args = parse_args(argv)
    images.limit_pixels(1e6 * args.max_megapixels)
    if args.inception_weights:
        files.read_archive(args.inception_weights)  # torch-fidelity would execute what a hostile file holds
    direction = args.direction if args.direction in DOMAINS else None
    nets, metadata = load_networks(args.weights, args.run_name, args.epoch, direction, "losses" in args.metrics)
    args = settle_names(args, metadata)
    translator = Translator(nets, metadata, args.device, args.precision, args.scale, args.tile, args.output_size)
    results = {}
    inputs = {direction: find_inputs(args, direction) for direction in choose_directions(args, translator)}
    check_measures(args, inputs)
    truths = {d: find_truths(args, d, paths, needed="paired" in args.metrics) for d, (_, paths) in inputs.items()}
    how = (args.output, args.on_bad_image, args.skip_existing, args.round_trip)
    for direction, (root, paths) in inputs.items():
        results[direction] = translate_folder(translator, direction, root, paths, *how, truths[direction])
    translated = [result for some in results.values() for result in some]
    written = [file for result in translated for file in result.files.values()]
    network = str(args.weights or args.run_name)
    sweep(args.output, written, [result.input for result in translated], network, args.skip_existing)
    about = {name: metadata.get(name) for name in ("epoch", "step")}
    what = {"network": network, "dataset_name": args.dataset_name, **about}
    what |= {"scale": args.scale, "output_size": args.output_size}
    if not args.skip_existing:
        forget_scores(args.output, what)
    gallery = functools.partial(write_gallery, args.output, args.dataset_name, about, results)
    gallery([])  # a measure may fail
    write_grid(args.output, results)
    scores = {direction: measure(args, translator, direction, some) for direction, some in results.items()}
    if "losses" in args.metrics:
        scores["losses"] = mean_losses(args, translator, metadata["flags"])
    table = report(scores)
    for line in table:
        utils.say(line)
    gallery(table)
    if args.metrics:
        counts = {direction: len(translated) for direction, translated in results.items()}
        files.write_json(args.output / "metrics.json", {**what, "images": counts, **scores})
    utils.say(f"{utils.counted(len(translated), 'image')} translated; look at {args.output / 'index.html'}")
    return scores


if __name__ == "__main__":
    main()
