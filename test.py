"""Translate images with trained generators, show them on a page, score them.

python test.py --dataset_name horse2zebra
python test.py --run_name horse2zebra --input photos --direction AtoB --scale native
python test.py --weights saved_models/horse2zebra/G_AB.safetensors --input photo.jpg
python test.py --weights saved_models/horse2zebra/G_AB.safetensors --input clip.mp4
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import dataclasses
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import datasets
from cyclegan import LossConfig
from models import Direction, Networks
from toolkit import cli, files, gallery, images, metrics, outputs, process, video
from toolkit.checkpoints import IMAGES
from toolkit.converters import ASSUME
from toolkit.devices import DeviceConfig
from toolkit.gallery import Result
from toolkit.inference import (
    Inputs,
    Translator,
    load_networks,
    plan_results,
    refuse_existing,
    translate_file,
    translate_folder,
)
from toolkit.pages import CHOICES, file_of, use_pages
from toolkit.readers import INSTALL
from toolkit.values import ValueRange, parse_range, range_option
from utils import (
    InputError,
    counted,
    domain_names,
    epoch_name,
    folder_name,
    is_folder_name,
    need_package,
    option,
    say,
    some_of,
    warn,
)

METRICS = metrics.MEASURES + ("fid", "kid")
NETWORKS_OF_METRICS = {"losses": {"G_AB", "G_BA", "D_A", "D_B"}, "cycle": {"G_AB", "G_BA"}}
TARGETS_OF_METRICS = {"train": {"paired", "fid", "kid"}, "test": {"identity", "losses", "fid", "kid"}}  # by split


@dataclass(frozen=True)
class TestConfig(DeviceConfig):
    """Which networks translate which images, where the results go, how they are scored; parse_args fills in some."""

    run_name: str = option(None, "run in saved_models (default: --dataset_name)", parse=folder_name)
    epoch: str = option("latest", "latest, best, or the number of a checkpoint", parse=epoch_name)
    weights: Path | None = option(None, "generator file, instead of a run", metavar="FILE")
    assume: tuple[str, ...] = ASSUME
    dataset_name: str | None = option(None, "data set to translate (default: the run's)", parse=folder_name)
    data_root: Path | None = option(None, "folder that contains the data sets (default: the run's)")
    input: Path | None = option(None, "images or clips of one domain, instead of a data set", metavar="FILE_OR_FOLDER")
    num_test: int | None = option(None, "translate only the first N images (default: all)", least=1)
    direction: str | None = option(
        None, "which way (default: both; with --input one)", choices=("both", "AtoB", "BtoA")
    )
    round_trip: bool = option(None, "also translate back (default: data sets yes, --input no)")
    scale: str = option(None, "resize to the training size, or not (default: train)", choices=("train", "native"))
    tile: int | None = option(None, "native scale in tiles of N px a side (default: whole)", least=16, most=2**16)
    output_size: str = option("input", "size of the results: the input's or the network's", choices=("input", "net"))
    output: Path = option(
        None,
        "folder for the results (default: generated_images/RUN/test or translated); of one --input also a new image file",
        metavar="DIR_OR_FILE",
    )
    format: str = option(
        None,
        "of the translations; same: that of the input; tif and npy hold the units of a domain with a value range"
        " (default: png)",
        choices=outputs.CHOICES,
    )
    keep_alpha: bool = option(False, "give translations the transparency of their inputs")
    fps: float = option(25.0, "images a second in --output FILE.mp4, of the images of --input", above=0, most=1000)
    skip_existing: bool = option(False, "keep earlier results, and leave out images that have just these already")
    metrics: list[str] = option([], f"some of {','.join(METRICS)} (default: none)", parse=some_of(METRICS))
    inception_weights: Path | None = option(None, "weights for fid and kid (default: download)", metavar="FILE")
    range_A: str = range_option("A", "that of the weights")
    range_B: str = range_option("B", "that of the weights")
    pages: str | None = option(
        None, "of a file of several images, use the first or all (default: the run's)", choices=CHOICES
    )
    max_megapixels: float = datasets.MAX_MEGAPIXELS
    on_bad_image: str = datasets.ON_BAD_IMAGE

    @property
    def ranges(self) -> dict[str, ValueRange | None]:
        """The value ranges that were given, by domain."""
        return {"A": parse_range(self.range_A), "B": parse_range(self.range_B)}

    @property
    def is_one_file(self) -> bool:
        """Whether --output names an image file, not a folder."""
        return names_a_file(self.output)


def names_a_file(output: Path) -> bool:
    """Whether a path is that of an image file, of a kind that can be written, unless there is a folder of that name."""
    return output.suffix.lower() in outputs.KINDS and not output.is_dir()


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="test.py", description=__doc__)
    cli.add_options(parser, "test", TestConfig)
    args = parser.parse_args(argv)
    pairs = (("weights", "run_name"), ("weights", "epoch"), ("input", "metrics"), ("input", "dataset_name"))
    cli.refuse_both(parser, args, *pairs)
    if args.inception_weights and not {"fid", "kid"} & set(args.metrics):
        parser.error("--inception_weights: has no effect without --metrics fid or kid; give both or none")
    if args.tile and args.scale == "train":
        parser.error("--tile: cuts images at their own size, and --scale train resizes them; leave one of them out")
    if args.output and names_a_file(args.output):
        refuse_with_one_file(parser, args)
    if args.format == "npy" and {"paired", "fid", "kid"} & set(args.metrics):
        parser.error("--format npy: paired, fid and kid compare image files; leave it or --metrics out")
    if args.keep_alpha and args.format in ("jpg", "npy"):
        parser.error(f"--keep_alpha: {args.format} files have no transparency; take --format png, tif or same")
    args.format = args.format or "png"
    if "fps" in args.given and not (args.output and video.is_clip(args.output)):
        parser.error("--fps: has no effect without --output FILE.mp4; give both or none")
    args.run_name = args.weights.stem if args.weights else args.run_name or args.dataset_name or "horse2zebra"
    args.output = args.output or IMAGES / args.run_name / ("translated" if args.input else "test")
    args.scale = args.scale or ("native" if args.tile else "train")
    if args.round_trip is None:
        args.round_trip = args.input is None
    return args


def refuse_with_one_file(parser: cli.Parser, args: Namespace) -> None:
    """Refuse what contradicts an --output that is one image file."""
    if not args.input:
        parser.error(f"--output {args.output}: one image file needs --input with one image; give a folder")
    cli.refuse_both(parser, args, *(("output", name) for name in ("format", "skip_existing", "round_trip")))
    if args.direction == "both":
        parser.error(f"--output {args.output}: one file holds one direction; give AtoB or BtoA")
    refuse_existing(args.output)


def choose_directions(
    config: TestConfig, asked: Direction | None, translator: Translator, dataset: Path
) -> list[Direction]:
    """Return the directions to translate: of photos one, of a data set those with test images, unless others are asked for."""
    if asked:
        translator.generators(asked)  # raises if there is none
        return [asked]
    if config.input and config.direction is None:
        other = "; --direction chooses the other way" if translator.directions[1:] else ""
        say(f"--input {config.input}: translates {translator.directions[0]}{other}")
        return translator.directions[:1]
    found = [
        way
        for way in translator.directions
        if config.input or images.list_images(datasets.split_folder(dataset, f"test{way.source}"))
    ]
    if config.direction is None and 0 < len(found) < len(translator.directions):
        say(f"{dataset}: has test images of {found[0].source} alone, so {found[0]} is all that is translated")
        return found
    return translator.directions


def choose_dataset(config: TestConfig, metadata: dict) -> tuple[str, Path]:
    """Return name and folder of the data set: as given, else those that the networks were trained on."""
    name: Any = config.dataset_name or metadata.get("dataset_name")
    if not is_folder_name(name):  # metadata may come from a stranger
        name = config.run_name
    if config.input:
        return name, Path()  # no data set is read
    recorded = None if config.weights else metadata.get("data_root")
    return name, datasets.find_dataset(config.data_root or Path(str(recorded or "datasets")), name)


def name_domains(dataset_name: str, dataset: Path, metadata: dict) -> tuple[str, str]:
    """Return the names of A and B: those of the networks, unless they were trained on another data set."""
    if metadata.get("domains") and dataset_name == metadata.get("dataset_name"):
        return domain_names(dataset_name, metadata["domains"])
    return datasets.domain_names(dataset) if dataset.name else domain_names(dataset_name)


def find_inputs(config: TestConfig, dataset: Path, direction: Direction) -> Inputs:
    """Return the images to translate; those of a data set with the test images of the same names in the target domain."""
    if config.input:
        root = config.input.parent if config.input.is_file() else config.input
        expected = video.SUFFIXES
        is_file = config.input.is_file()
        paths = images.with_pages(config.input, [config.input]) if is_file else images.list_images(root, expected)
    else:
        root = datasets.split_folder(dataset, f"test{direction.source}")
        paths = datasets.split_images(dataset, f"test{direction.source}")
    if not paths:
        raise InputError(f"--input {config.input}: no image there; expected {images.EXPECTED}")
    paths = images.BadImages(root, len(paths), config.on_bad_image).readable(paths)[: config.num_test]
    if config.input:
        return Inputs(root, paths, config.on_bad_image)
    target = datasets.split_folder(dataset, f"test{direction.target}")
    if not images.list_images(target):
        return Inputs(root, paths, config.on_bad_image)
    found = datasets.by_name({direction.source: root, direction.target: target})
    names = {path: name for name, path in found[direction.source].items()}
    truths = {}
    for path in paths:
        same = target / path.relative_to(root)  # 0.png before 0.bmp for 0.png
        name = names.get(path, datasets.pair_name(path, root))
        truths[path] = same if file_of(same).is_file() else found[direction.target].get(name)
    return Inputs(root, paths, config.on_bad_image, {path: truth for path, truth in truths.items() if truth})


def translate_videos(
    config: TestConfig, translator: Translator, directions: Sequence[Direction], settings: dict
) -> bool:
    """Translate the clips of --input, or its images into one clip; returns whether images are left to be translated."""
    clips = video.list_clips(config.input) if config.input else []
    to_file = video.is_clip(config.output)
    if not clips and not to_file:
        return True
    root = config.input if config.input and config.input.is_dir() else Path(config.input or "").parent
    has_images = config.input not in clips and bool(images.list_images(root, video.SUFFIXES))
    if translator.channels not in (1, 3):
        raise InputError(f"--input {config.input}: video has 3 channels, the networks {translator.channels}")
    missing = video.missing_package()
    if missing and has_images and not to_file:
        warn(f"{config.input}: leaves out {counted(len(clips), 'clip')}: {missing}")
        return True
    if missing:
        raise InputError(f"--input {config.input}: {missing}")
    if config.round_trip:
        warn("--round_trip: is of images alone, clips are translated one way")
    if to_file:
        translate_to_file(config, translator, directions, clips)
        return False
    with gallery.open_results(config.output, settings) as folder:
        for direction in directions:
            inputs = Inputs(root, clips, config.on_bad_image)
            video.translate_clips(translator, direction, inputs, folder, config.num_test, config.skip_existing)
    return has_images


def translate_to_file(
    config: TestConfig, translator: Translator, directions: Sequence[Direction], clips: Sequence[Path]
) -> None:
    """Write --output FILE.mp4: a translated clip, or the translated images of a folder."""
    name = config.output
    if not config.input or directions[1:] or (clips and clips != [config.input]):
        raise InputError(f"--output {name}: takes one clip or one folder of images, one way; or choose a folder for it")
    if name.suffix.lower() not in video.WRITTEN:
        raise InputError(f"--output {name}: video is written as {', '.join(video.WRITTEN)}; choose one of them")
    if name.exists():
        raise InputError(f"--output {name}: exists already; move it away, or choose another name")
    if clips:
        video.translate_clip_to(translator, directions[0], config.input, name, config.num_test)
    else:
        inputs = find_inputs(config, Path(), directions[0])
        video.video_of_images(translator, directions[0], inputs, name, config.fps)


def plan(
    config: TestConfig, translator: Translator, direction: Direction, inputs: Inputs, folder: gallery.ResultFolder
) -> list[Result]:
    """Return the results that the inputs of a direction will have; photos never replace the results of others."""
    _, back = translator.generators(direction)
    others = folder.inputs(direction) if config.input else {}
    value_range = translator.ranges.get(direction.target)
    round_trip = config.round_trip and back is not None
    in_colour = translator.is_in_colour(direction.target)
    return plan_results(direction, inputs, round_trip, others, value_range, config.format, in_colour)


def write_file(config: TestConfig, translator: Translator, direction: Direction, inputs: Inputs) -> dict:
    """Translate the only input into the file --output; returns no scores."""
    if len(inputs.paths) > 1:
        raise InputError(f"--output {config.output}: one file for {len(inputs.paths)} images; give a folder")
    translate_file(translator, direction, inputs.paths[0], config.output, config.keep_alpha)
    say(f"{inputs.paths[0]}: translated; open {config.output}")
    return {}


def check_metrics(config: TestConfig, networks: Networks, dataset: Path, inputs: Mapping[Direction, Inputs]) -> None:
    """Raise InputError, before anything is translated, if a metric lacks its networks, images or package."""
    wanted = config.metrics
    of_training_size = [name for name in wanted if name in ("losses", "spike")]
    if of_training_size and config.scale == "native":
        raise InputError(f"--metrics {of_training_size[0]}: is measured at the training size; leave --scale native out")
    for name in wanted:
        missing = NETWORKS_OF_METRICS.get(name, set()) - networks.keys()
        if missing:
            raise InputError(f"--metrics {name}: needs {', '.join(sorted(missing))}, which these weights do not hold")
        if name in ("fid", "kid"):
            need_package("torch_fidelity", f"--metrics {name}", "pip install -r requirements-metrics.txt")
    for direction, found in inputs.items():
        for split, names in TARGETS_OF_METRICS.items():
            if names & set(wanted):
                datasets.split_images(dataset, f"{split}{direction.target}")
        if "paired" in wanted and not found.truths:
            raise InputError(f"--metrics paired: no name is in both testA and testB of {dataset}; leave it out")


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
            translator = self.translator
            scores["losses"] = metrics.mean_losses(translator.networks, reals, loss_config, translator.precision)
        return scores

    def of_direction(self, direction: Direction, results: Sequence[Result]) -> dict:
        wanted = set(self.config.metrics)
        nets = self.translator.generators(direction)
        inputs = [result.input for result in results]
        sources = images.LazyImages(inputs, self.translator.reader(direction.source, self.size))
        targets = self.test_images(direction.target) if "identity" in wanted else {}
        scores: dict[str, Any] = metrics.measure_direction(self.translator, nets, sources, targets, wanted - {"paired"})
        if "spike" in wanted:
            scores["spike"] = metrics.mean_spike(nets[0], sources, self.translator.precision)
        if "paired" in wanted:
            scores["paired"] = self.paired(direction, results)
        if wanted & {"fid", "kid"}:
            scores["distribution"] = self.distribution(direction, results)
        return scores

    def distribution(self, direction: Direction, results: Sequence[Result]) -> dict[str, dict]:
        """Compare all translations with the test and with the training images of the target domain."""
        size = self.translator.size or (299, 299)  # Inception resizes to 299
        files = [self.config.output / result.files[f"fake_{direction.target}"] for result in results]
        reader = dataclasses.replace(self.translator.reader(direction.target, size), channels=3)
        fakes = metrics.ImageFiles(files, reader)
        weights = self.config.inception_weights
        tables = {}
        for split in (f"test{direction.target}", f"train{direction.target}"):
            reals = metrics.ImageFiles(self.readable(split), reader)
            tables[split] = metrics.fid_kid(fakes, reals, self.config.metrics, weights, self.translator.device)
        return tables

    def paired(self, direction: Direction, results: Sequence[Result]) -> dict[str, dict]:
        """Compare translations and two baselines with the truths, in the files that were written, one at a time.

        The baselines need no model: a copy of the input, and the mean of the training images of the target domain.
        """
        scored = [result for result in results if result.truth]
        if not scored:
            raise InputError("--metrics paired: no image that has a truth could be translated (see above)")
        if len(scored) < len(results):
            say(f"{direction}: {len(scored)} of {len(results)} images have a truth; paired scores are of these alone")
        real, fake, truth, _ = gallery.result_folders(direction)
        size = self.translator.size or self.pixels(scored[0], fake).shape[-2:]
        mean_image = self.mean_image(direction.target, size)

        def read(result: Result) -> tuple[dict[str, Tensor], Tensor]:
            output = self.pixels(result, fake)
            size = output.shape[-2:]
            outputs = {"model": output, "copy": self.pixels(result, real, size), "mean image": mean_image}
            return outputs, self.pixels(result, truth, size)

        table = metrics.paired_table(map(read, scored))
        value_range = self.translator.ranges.get(direction.target)
        if value_range:
            for row in table.values():
                row["RMSE in units"] = row["RMSE"] * (value_range[1] - value_range[0]) / 255
        return table

    def pixels(self, result: Result, folder: str, size: Any = None) -> Tensor:
        """Read an image of a result as (C, H, W) in [0, 255], resized to (height, width) as in training.

        returns: uint8; of a domain with a value range float32, of the values that the file in the folder was made from
        """
        channels = self.translator.channels
        value_range = self.translator.ranges.get(folder[-1])
        if value_range is None:
            return images.range_to_bytes(images.load_image(self.config.output / result.files[folder], size, channels))
        sources: dict[str, Any] = {"real": result.input, "truth": result.truth}
        sources["fake"] = self.config.output / (result.values or result.files[folder])
        return (images.ImageReader(size, channels, value_range)(sources[folder[:-2]]) + 1) * 127.5

    def mean_image(self, domain: str, size: Any) -> Tensor:
        """Return the mean of a domain's training images: uint8 (C, *size)."""
        split = f"train{domain}"
        paths = datasets.split_images(self.dataset, split)
        mean = torch.zeros(self.translator.channels, *size, dtype=torch.float64)
        read = images.load_images(
            datasets.split_folder(self.dataset, split),
            paths,
            self.translator.reader(domain, size),
            self.config.on_bad_image,
        )
        for count, (_, x) in enumerate(read, start=1):
            mean += (images.range_to_bytes(x) - mean) / count
        return mean.round().to(torch.uint8)

    def test_images(self, domain: str) -> images.LazyImages:
        paths = self.readable(f"test{domain}", self.config.num_test)
        return images.LazyImages(paths, self.translator.reader(domain, self.size))

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width at which errors are measured; None: those of each image."""
        return self.translator.size if self.config.scale == "train" else None

    def readable(self, split: str, most: int | None = None) -> list[Path]:
        """List the images of a split that can be read to their end, and are large enough; the others are named."""
        paths = datasets.split_images(self.dataset, split, most)
        bad = images.BadImages(datasets.split_folder(self.dataset, split), len(paths), self.config.on_bad_image)

        def read(path: Path) -> None:
            image = images.read_image(path, self.translator.channels, self.translator.ranges.get(split[-1]))
            if self.size is None and min(image.size) < self.translator.smallest_side:
                raise images.UnreadableImage(f"{image.width}x{image.height} px, too small for the generator")

        return [path for path, _ in bad.read(paths, read)]


def score_lines(scores: dict) -> list[str]:
    """Lay out all scores as lines of text."""
    lines = []
    for name, values in scores.items():
        figures = {metric: value for metric, value in values.items() if not isinstance(value, dict)}
        tables = [{"": figures}] if figures else []
        tables += [value for value in values.values() if isinstance(value, dict)]
        if tables:
            lines.append("losses on the test set" if name == "losses" else name)
        for table in tables:
            lines += metrics.format_table(table)
    return lines


def all_settings(
    config: TestConfig, translator: Translator, dataset_name: str | None, domains: Sequence[str]
) -> dict[str, Any]:
    """Return, as plain values, all that results depend on besides their input."""
    settings: dict[str, Any] = {"network": str(config.weights or config.run_name), "domains": list(domains)}
    settings |= {"dataset_name": None if config.input else dataset_name} | translator.settings()
    settings |= {"format": config.format} if config.format != "png" else {}
    return settings | ({"keep_alpha": True} if config.keep_alpha else {})


@process.command
def main(argv: Sequence[str] | None = None) -> dict:
    """Find networks and images, translate, show, score; returns the scores."""
    config = cli.config_of(TestConfig, parse_args(argv))
    images.limit_pixels(1e6 * config.max_megapixels)
    if config.inception_weights:
        files.read_archive(config.inception_weights)  # torch-fidelity would execute code in a hostile file
    asked = Direction.named(config.direction) if config.direction in ("AtoB", "BtoA") else None
    needs_losses = "losses" in config.metrics
    networks, metadata = load_networks(
        config.weights, config.run_name, config.epoch, asked, needs_losses, config.assume
    )
    translator = Translator(
        networks,
        metadata,
        config.device,
        config.precision,
        config.scale,
        config.tile,
        config.output_size,
        config.ranges,
    )
    use_pages(config.pages or (metadata["pages"] if metadata.get("pages") in CHOICES else CHOICES[0]))
    if translator.channels not in (1, 3) or translator.metadata.get("colours"):
        need_package("tifffile", f"translations of {translator.channels} bands", INSTALL)
    dataset_name, dataset = choose_dataset(config, metadata)
    directions = choose_directions(config, asked, translator, dataset)
    domains = name_domains(dataset_name, dataset, metadata)
    settings = all_settings(config, translator, dataset_name, domains)
    if not translate_videos(config, translator, directions, settings):
        return {}
    inputs = {direction: find_inputs(config, dataset, direction) for direction in directions}
    check_metrics(config, networks, dataset, inputs)
    if config.is_one_file:
        return write_file(config, translator, directions[0], inputs[directions[0]])
    keep = config.skip_existing or config.input is not None  # results of photos add up
    with gallery.open_results(config.output, settings) as folder:
        planned = {direction: plan(config, translator, direction, found, folder) for direction, found in inputs.items()}
        folder.claim(planned.values(), keep, bool(config.metrics))
        results = {
            direction: translate_folder(
                translator, direction, found, planned[direction], folder, config.skip_existing, config.keep_alpha
            )
            for direction, found in inputs.items()
        }
        folder.write_page([])  # now, since scores may fail
        folder.write_grid(domains, results)
        counts = {str(direction): len(translated) for direction, translated in results.items()}
        scores = {}
        if config.metrics:
            scores = Scorer(config, translator, dataset).scores(results, metadata.get("loss_config", LossConfig()))
            table = score_lines(scores)
            for line in table:
                say(line)
            folder.write_page(table)
            facts = settings | {"dataset_name": dataset_name, "images": counts}
            folder.write_text(gallery.SCORES, files.to_json(facts | scores))
    say(f"{counted(sum(counts.values()), 'image')} translated; open {config.output / gallery.PAGE}")
    return scores


if __name__ == "__main__":
    main()
