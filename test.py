"""Translate images with trained generators, show them on a page, score them.

python test.py --dataset_name horse2zebra
python test.py --run_name horse2zebra --input photos --direction AtoB --scale native
python test.py --weights saved_models/horse2zebra/G_AB.safetensors --input photo.jpg
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import functools
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import datasets
from cyclegan import LossConfig
from models import Direction, Networks
from toolkit import cli, files, gallery, images, metrics, process
from toolkit.checkpoints import IMAGES
from toolkit.devices import DeviceConfig
from toolkit.gallery import Result
from toolkit.inference import Translator, load_networks, translate_folder
from utils import InputError, counted, epoch_name, folder_name, is_folder_name, need_package, option, say, some_of

METRICS = metrics.MEASURES + ("fid", "kid")
NETWORKS_OF_METRICS = {"losses": {"G_AB", "G_BA", "D_A", "D_B"}, "cycle": {"G_AB", "G_BA"}}
TARGETS_OF_METRICS = {"train": {"paired", "fid", "kid"}, "test": {"identity", "losses", "fid", "kid"}}  # by split


@dataclass(frozen=True)
class TestOptions:
    """Which networks translate which images, where the results go, and how they are scored.

    parse_args fills in run_name, scale, round_trip and output if they were not given.
    """

    run_name: str = option(None, "run in saved_models (default: --dataset_name)", parse=folder_name)
    epoch: str = option("latest", "latest, best, or the number of a checkpoint", parse=epoch_name)
    weights: Path | None = option(None, "generator file, instead of a run", metavar="FILE")
    dataset_name: str | None = option(None, "data set to translate (default: the run's)", parse=folder_name)
    data_root: Path | None = option(None, "folder that contains the data sets (default: the run's)")
    input: Path | None = option(None, "images of one domain, instead of a data set", metavar="FILE_OR_FOLDER")
    num_test: int | None = option(None, "translate only the first N images (default: all)", least=1)
    direction: str | None = option(None, "(default: both; with --input one)", choices=("both", "AtoB", "BtoA"))
    round_trip: bool = option(None, "also translate back (default: data sets yes, --input no)")
    scale: str = option(None, "resize to the training size, or not (default: train)", choices=("train", "native"))
    tile: int | None = option(None, "native scale in tiles of N px a side (default: whole)", least=16, most=2**16)
    output_size: str = option("input", "size of the results: the input's or the network's", choices=("input", "net"))
    output: Path = option(None, "folder for the results (default: generated_images/RUN/test)", metavar="DIR")
    skip_existing: bool = option(False, "remove nothing, and leave out images whose results exist")
    metrics: list[str] = option([], f"some of {','.join(METRICS)} (default: none)", parse=some_of(METRICS))
    inception_weights: Path | None = option(None, "weights for fid and kid (default: download)", metavar="FILE")


@dataclass(frozen=True)
class TestConfig(TestOptions, datasets.ReadingConfig, DeviceConfig):
    """All options of a test."""


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="test.py", description=__doc__)
    cli.add_options(parser, "translation", TestOptions)
    cli.add_options(parser, "image files", datasets.ReadingConfig)
    cli.add_options(parser, "speed", DeviceConfig)
    args = parser.parse_args(argv)
    pairs = (("weights", "run_name"), ("weights", "epoch"), ("input", "metrics"), ("input", "dataset_name"))
    cli.refuse_both(parser, args, *pairs)
    if args.inception_weights and not {"fid", "kid"} & set(args.metrics):
        parser.error("--inception_weights: has no effect without --metrics fid or kid; give both or none")
    if args.tile and args.scale == "train":
        parser.error("--tile: cuts images at their own size, and --scale train resizes them; leave one of them out")
    args.run_name = args.weights.stem if args.weights else args.run_name or args.dataset_name or "horse2zebra"
    args.output = args.output or IMAGES / args.run_name / "test"
    args.scale = args.scale or ("native" if args.tile else "train")
    if args.round_trip is None:
        args.round_trip = args.input is None
    return args


# ---------------------------------------------------------------------------------------------
# Finding images


def choose_directions(direction: str | None, source: Path | None, translator: Translator) -> list[Direction]:
    """Return the directions to translate: of photos one, unless both are asked for."""
    if direction in ("AtoB", "BtoA"):
        translator.generators(Direction.named(direction))  # raises if there is none
        return [Direction.named(direction)]
    if source and direction is None:
        chosen = translator.directions[0]
        say(f"--input {source}: translated {chosen}; --direction chooses another")
        return [chosen]
    return translator.directions


def choose_dataset(config: TestConfig, metadata: dict) -> tuple[str, Path]:
    """Return name and folder of the data set: as given, else those that the networks were trained on."""
    dataset_name = config.dataset_name or str(metadata.get("dataset_name", ""))
    if not is_folder_name(dataset_name):  # metadata may come from a stranger
        dataset_name = config.run_name
    if config.input:  # no data set is read
        return dataset_name, Path(dataset_name)
    recorded = None if config.weights else metadata.get("data_root")
    root = config.data_root or Path(str(recorded or "datasets"))
    return dataset_name, datasets.find_dataset(root, dataset_name)


def find_inputs(config: TestConfig, dataset: Path, direction: Direction) -> tuple[Path, list[Path]]:
    """Return the folder that names of results are relative to, and the images to translate."""
    if config.input is None:
        root = dataset / f"test{direction.source}"
        paths = datasets.split_images(dataset, root.name)
    elif config.input.is_dir():
        root = config.input
        paths = images.list_images(root)
    else:
        root = config.input.parent
        paths = [config.input] if config.input.is_file() else []
    if not paths:
        suffixes = " ".join(sorted(images.SUFFIXES))
        raise InputError(
            f"--input {config.input}: no image there; expected one, or a folder of files that end in {suffixes}"
        )
    return root, images.BadImages(root, len(paths), config.on_bad_image).readable(paths)[: config.num_test]


def find_truths(dataset: Path, direction: Direction, paths: Sequence[Path]) -> dict[Path, Path]:
    """Return, by input, the test image of the same name in the target domain."""
    source = dataset / f"test{direction.source}"
    target = dataset / f"test{direction.target}"
    named = {datasets.pair_name(path, target): path for path in images.list_images(target)}
    found = {path: named.get(datasets.pair_name(path, source)) for path in paths}
    return {path: truth for path, truth in found.items() if truth}


# ---------------------------------------------------------------------------------------------
# Scores


def check_metrics(
    wanted: Sequence[str], networks: Networks, dataset: Path, truths: Mapping[Direction, Mapping]
) -> None:
    """Raise InputError, before anything is translated, if a metric lacks its networks, images or package."""
    for name in NETWORKS_OF_METRICS.keys() & set(wanted):
        missing = NETWORKS_OF_METRICS[name] - networks.keys()
        if missing:
            raise InputError(f"--metrics {name}: needs {', '.join(sorted(missing))}, which these weights do not hold")
    of_inception = [name for name in wanted if name in ("fid", "kid")]
    if of_inception:
        need_package("torch_fidelity", f"--metrics {','.join(of_inception)}", "pip install -r requirements-metrics.txt")
    for direction, found in truths.items():
        for split, names in TARGETS_OF_METRICS.items():
            if names & set(wanted):
                datasets.split_images(dataset, f"{split}{direction.target}")
        if "paired" in wanted and not found:
            raise no_truth(dataset, direction)


def no_truth(dataset: Path, direction: Direction) -> InputError:
    """Return the error for paired scores of unpaired images."""
    return InputError(
        f"--metrics paired: no image in {dataset}/test{direction.target} has the name of one in "
        f"test{direction.source}; leave it out for unpaired sets"
    )


def load_bytes(path: Path, size: tuple[int, int] | None, channels: int = 3) -> Tensor:
    """Read an image as uint8 (channels, H, W), resized to (height, width) as in training."""
    return images.range_to_bytes(images.load_image(path, size, channels))


@dataclass
class Scorer:
    """Scores of translated test images. Errors are in the units of training, [0, 2]."""

    config: TestConfig
    translator: Translator
    dataset: Path

    def scores(self, results: Mapping[Direction, Sequence[Result]], loss_config: LossConfig) -> dict:
        """Return the scores by direction, and the losses, which belong to both."""
        scores = {str(direction): self.of_direction(direction, translated) for direction, translated in results.items()}
        if "losses" in self.config.metrics:
            reals = {domain: self.test_images(domain) for domain in "AB"}
            networks = self.translator.networks
            scores["losses"] = metrics.mean_losses(networks, reals, loss_config, self.translator.precision)
        return scores

    def of_direction(self, direction: Direction, results: Sequence[Result]) -> dict:
        wanted = self.config.metrics
        net, back = self.translator.generators(direction)
        there = functools.partial(self.translator, net)
        way_back = functools.partial(self.translator, back) if back else None
        sources = self.test_images(direction.source) if "cycle" in wanted else {}
        targets = self.test_images(direction.target) if "identity" in wanted else {}
        errors = [name for name in ("cycle", "identity") if name in wanted]
        scores: dict[str, Any] = metrics.measure_direction(there, way_back, sources, targets, errors)
        if "spike" in wanted:
            inputs = self.lazy_images([result.input for result in results])
            scores["spike"] = metrics.mean_spike(net, inputs, self.translator.precision)
        if "paired" in wanted:
            scores["paired"] = self.paired(direction, results)
        if {"fid", "kid"} & set(wanted):
            scores["distribution"] = self.distribution(direction, results)
        return scores

    def distribution(self, direction: Direction, results: Sequence[Result]) -> dict[str, dict]:
        """Compare all translations with the test and with the training images of the target domain."""
        load = functools.partial(load_bytes, size=self.translator.size or (299, 299))  # Inception resizes to 299
        fakes = [self.config.output / result.files[f"fake_{direction.target}"] for result in results]
        wanted = [name for name in ("fid", "kid") if name in self.config.metrics]
        weights = self.config.inception_weights
        tables = {}
        for split in (f"test{direction.target}", f"train{direction.target}"):
            reals = self.readable(split)
            tables[split] = metrics.fid_kid(fakes, reals, load, wanted, weights, self.translator.device)
        return tables

    def paired(self, direction: Direction, results: Sequence[Result]) -> dict[str, dict]:
        """Compare translations with their truths, one at a time."""
        scored = [(result, result.truth) for result in results if result.truth]
        if not scored:
            raise no_truth(self.dataset, direction)
        folder = self.dataset / f"test{direction.target}"
        if len(scored) < len(results):
            say(f"{folder}: {len(scored)} of {len(results)} images have their truth there; only these are scored")
        bad = images.BadImages(folder, len(scored), self.config.on_bad_image)
        triples = functools.partial(self.read_triples, direction, scored, bad)
        size: Any = self.translator.size or next(triples())[0].shape[-2:]
        return metrics.paired_table(triples(), self.mean_image(f"train{direction.target}", size))

    def read_triples(
        self, direction: Direction, scored: Sequence[tuple[Result, Path]], bad: images.BadImages
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield translation, input and truth, all at the size of the translation."""
        channels = self.translator.channels
        for result, path in scored:
            fake = load_bytes(self.config.output / result.files[f"fake_{direction.target}"], None, channels)
            size: Any = fake.shape[-2:]
            try:
                truth = load_bytes(path, size, channels)
            except images.UnreadableImage as error:
                bad.note(path, error)
                continue
            yield fake, load_bytes(result.input, size, channels), truth

    def mean_image(self, split: str, size: tuple[int, int]) -> Tensor:
        """Return the mean of a split's images: float64 (C, H, W) in [0, 255]."""
        mean = torch.zeros(self.translator.channels, *size, dtype=torch.float64)
        for count, (_, x) in enumerate(self.load(split, size, self.translator.channels), start=1):
            mean += (images.range_to_bytes(x) - mean) / count
        return mean

    def test_images(self, domain: str) -> images.LazyImages:
        return self.lazy_images(self.readable(f"test{domain}", self.config.num_test))

    def lazy_images(self, paths: Sequence[Path]) -> images.LazyImages:
        return images.LazyImages(paths, self.translator.size, self.translator.channels)

    def readable(self, split: str, most: int | None = None) -> list[Path]:
        return [path for path, _ in self.load(split, None, 3, most)]

    def load(
        self, split: str, size: tuple[int, int] | None, channels: int, most: int | None = None
    ) -> Iterator[tuple[Path, Tensor]]:
        """Read the images of a split one by one; unreadable ones are named and left out."""
        paths = datasets.split_images(self.dataset, split, most)
        return images.load_images(self.dataset / split, paths, size, channels, self.config.on_bad_image)


def score_lines(scores: dict) -> list[str]:
    """Lay out all scores as lines of text."""
    lines = []
    for name, values in scores.items():
        plain = {metric: value for metric, value in values.items() if not isinstance(value, dict)}
        tables = [{"": plain}] if plain else []
        tables += [values[metric] for metric in ("paired", "distribution") if metric in values]
        if tables:
            lines.append("losses on the test set" if name == "losses" else name)
        for table in tables:
            lines += metrics.format_table(table)
        lines += metrics.below_mean_image(values.get("paired", {}))
    return lines


# ---------------------------------------------------------------------------------------------
# The command


@process.command
def main(argv: Sequence[str] | None = None) -> dict:
    """Find networks and images, translate, show, score; returns the scores."""
    config = cli.config_of(TestConfig, parse_args(argv))
    images.limit_pixels(1e6 * config.max_megapixels)
    if config.inception_weights:
        files.read_archive(config.inception_weights)  # torch-fidelity would execute code in a hostile file

    asked = Direction.named(config.direction) if config.direction in ("AtoB", "BtoA") else None
    networks, metadata = load_networks(config.weights, config.run_name, config.epoch, asked, "losses" in config.metrics)
    translator = Translator(
        networks, metadata, config.device, config.precision, config.scale, config.tile, config.output_size
    )

    dataset_name, dataset = choose_dataset(config, metadata)
    directions = choose_directions(config.direction, config.input, translator)
    inputs = {direction: find_inputs(config, dataset, direction) for direction in directions}
    truths = {}
    for direction, (_, paths) in inputs.items():
        truths[direction] = {} if config.input else find_truths(dataset, direction, paths)
    check_metrics(config.metrics, networks, dataset, truths)

    if not config.skip_existing:
        gallery.clear(config.output, [path for _, paths in inputs.values() for path in paths])
    results = {}
    for direction, (root, paths) in inputs.items():
        results[direction] = translate_folder(
            translator,
            direction,
            root,
            paths,
            config.output,
            on_bad=config.on_bad_image,
            skip_existing=config.skip_existing,
            round_trip=config.round_trip,
            truths=truths[direction],
        )

    about = {name: metadata.get(name) for name in ("epoch", "step")}
    gallery.write_gallery(config.output, dataset_name, about, results, [])  # now, since scores may fail
    gallery.write_grid(config.output, results)
    scores = {}
    if config.metrics:
        scores = Scorer(config, translator, dataset).scores(results, metadata.get("loss_config", LossConfig()))
        facts = {"network": str(config.weights or config.run_name), "dataset_name": dataset_name} | about
        facts |= {"scale": config.scale, "output_size": config.output_size}
        facts["images"] = {str(direction): len(translated) for direction, translated in results.items()}
        table = score_lines(scores)
        for line in table:
            say(line)
        gallery.write_gallery(config.output, dataset_name, about, results, table)
        gallery.write_scores(config.output, facts | scores)
    count = sum(len(translated) for translated in results.values())
    say(f"{counted(count, 'image')} translated; open {config.output / gallery.PAGE}")
    return scores


if __name__ == "__main__":
    main()
