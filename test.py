"""Translate pictures with trained generators, show them in a gallery, score them.

python test.py --dataset_name horse2zebra
python test.py --run_name horse2zebra --input photos --direction AtoB --scale native
python test.py --weights saved_models/horse2zebra/G_AB.safetensors --input photo.jpg
"""

import argparse
import functools
import html
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import datasets
import metrics
import models
import utils
import weights

DIRECTIONS = {"AtoB": ("A", "B"), "BtoA": ("B", "A")}  # source and target domain
MEASURES = (*utils.MEASURES, "fid", "kid")
BATCH, BATCH_PIXELS = 16, 2**20  # pictures that pass a network together, and how many pixels at most
THREADS = 4  # that read and write
COLUMNS = 6  # pictures in the grid


@dataclass
class Tester:
    """Networks in eval mode on their device, what is known of their training, and what is asked of them."""

    nets: dict[str, nn.Module]  # G_AB, G_BA; for the losses also D_A, D_B
    recipe: dict
    args: argparse.Namespace
    device: torch.device
    precision: str
    dataset_name: str
    output: Path
    busy: float = 0.0  # seconds in the networks

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the training pictures; None: foreign weights do not record it, pictures keep their own."""
        return tuple(self.recipe["size"]) if self.recipe["size"] else None

    @property
    def channels(self) -> int:
        return next(iter(self.nets.values())).config.channels

    def generators(self, direction: str) -> tuple[nn.Module, nn.Module | None]:
        """The generator of a direction, and the one that leads back, if there is one."""
        source, target = DIRECTIONS[direction]
        return self.nets[f"G_{source}{target}"], self.nets.get(f"G_{target}{source}")

    @torch.no_grad()
    def __call__(self, net: nn.Module, pictures: Tensor) -> Tensor:
        """Run a network on (N, C, H, W), in tiles where --tile says so; the answer is float32."""
        start, tile = time.perf_counter(), self.args.tile

        def answer(x: Tensor) -> Tensor:
            with utils.autocast(self.device, self.precision):
                return net(x.to(self.device)).float()

        tiled = tile and max(pictures.shape[-2:]) > tile
        x = translate_tiled(net, answer, pictures.cpu(), tile) if tiled else answer(pictures)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.busy += time.perf_counter() - start
        return x


@dataclass
class Result:
    """One translated picture: its input, and the files written for it by folder (real_A, fake_B, rec_A)."""

    input: Path
    name: Path
    files: dict[str, Path]


# ---------------------------------------------------------------------------------------------
# Networks


def load_networks(args: argparse.Namespace) -> tuple[dict[str, nn.Module], dict]:
    """Find the networks that the flags name: a single file, a run's generator files, or one of its checkpoints."""
    if args.weights:
        net, recipe = weights.load_generator(args.weights)
        if args.direction not in ("both", recipe["direction"] or args.direction):
            raise utils.InputError(
                f"--direction {args.direction}: {args.weights} translates {recipe['direction']}; leave the flag out"
            )
        direction = recipe["direction"] or args.direction
        if direction == "both":
            direction = "AtoB"
            utils.say(f"{args.weights}: does not say its direction; taken for AtoB")
        return {"G_{}{}".format(*DIRECTIONS[direction]): net}, recipe
    return weights.load_run(args.run_name, args.epoch, "losses" in args.metrics)


# ---------------------------------------------------------------------------------------------
# Pictures in and out


def find_inputs(tester: Tester, directions: Sequence[str]) -> dict[str, tuple[Path, list[Path]]]:
    """Return for each direction the folder that names are relative to, and its pictures."""
    args, found = tester.args, {}
    for direction in directions:
        if args.input is None:
            dataset, split = (
                datasets.find_dataset(args.data_root, tester.dataset_name),
                f"test{DIRECTIONS[direction][0]}",
            )
            root, paths = dataset / split, datasets.split_pictures(dataset, split)
        elif args.input.is_file():
            root, paths = args.input.parent, [args.input]
        elif args.input.is_dir():
            root, paths = args.input, datasets.list_pictures(args.input)
            if not paths:
                raise utils.InputError(
                    f"--input {root}: no picture inside; expected files that end in {' '.join(sorted(datasets.SUFFIXES))}"
                )
        else:
            raise utils.InputError(
                f"--input {args.input}: no such file or folder; expected a picture or a folder of pictures"
            )
        bad = datasets.BadPictures(root, len(paths), args.on_bad_image)
        found[direction] = root, bad.readable(paths)[: args.num_test]
    return found


def output_names(root: Path, paths: Sequence[Path]) -> dict[Path, Path]:
    """Name each output after its input's stem, sub-folders kept; where that is taken, its suffix stays too."""
    names, taken = {}, set()
    stems = [path.relative_to(root).with_suffix("") for path in paths]
    for path, stem in zip(paths, stems, strict=True):
        name = Path(f"{stem}.png") if stems.count(stem) == 1 else Path(f"{path.relative_to(root)}.png")
        while str(name).lower() in taken:  # some file systems do not tell A from a
            name = name.with_name(f"{name.stem}_.png")
        taken.add(str(name).lower())
        names[path] = name
    return names


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin, so that they overlap by a quarter at least and the last one ends at the edge."""
    count = math.ceil((length - tile // 4) / (tile - tile // 4)) if length > tile else 1
    return [round(i * (length - tile) / max(1, count - 1)) for i in range(count)]


def blend_tiles(answer: Callable, pictures: Tensor, tile: int) -> Tensor:
    """Translate (N, C, H, W) in overlapping tiles and blend them, each fading out linearly towards its edges."""
    height, width = pictures.shape[-2:]

    def fade(length: int) -> Tensor:
        edge = torch.arange(length) + 0.5  # the outermost pixels saw padding: they count where no other does
        return (torch.minimum(edge, edge.flip(0)) - tile // 16).div(max(1, tile // 8)).clamp(1e-3, 1)

    window = torch.outer(fade(min(tile, height)), fade(min(tile, width)))
    blended, total = torch.zeros_like(pictures), torch.zeros(height, width)
    for top in tile_starts(height, tile):
        for left in tile_starts(width, tile):
            rows, columns = slice(top, top + tile), slice(left, left + tile)
            blended[..., rows, columns] += window * answer(pictures[..., rows, columns]).cpu()
            total[rows, columns] += window
    return blended.div_(total)


def translate_tiled(net: nn.Module, answer: Callable, pictures: Tensor, tile: int) -> Tensor:
    """Translate (N, C, H, W) in tiles that all share the statistics of their instance norms, so that none stands out.

    A first pass takes mean and variance over all tiles, each normalised by its own; the second uses them. Close to
    what the whole picture would give, not equal: deeper layers of the first pass saw tiles normalised by themselves.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.InstanceNorm2d)]
    sums, tiles = {}, len(tile_starts(pictures.shape[2], tile)) * len(tile_starts(pictures.shape[3], tile))

    def collect(module: nn.Module, inputs: tuple, _: Tensor) -> None:
        var, mean = torch.var_mean(inputs[0].float(), (2, 3), correction=0, keepdim=True)
        both = torch.stack([mean, var + mean.square()]) / tiles
        sums[module] = sums[module].add_(both) if module in sums else both  # new ones would scatter the free memory

    def share(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        mean, square = sums[module]
        scale = torch.rsqrt((square - mean.square()).clamp(min=0) + module.eps)
        return ((inputs[0].float() - mean) * scale).to(output.dtype)

    for hook in (collect, share) if norms else ():
        handles = [module.register_forward_hook(hook) for module in norms]
        try:
            x = blend_tiles(answer, pictures, tile)
        finally:
            for handle in handles:
                handle.remove()
    return x if norms else blend_tiles(answer, pictures, tile)


def read_seen(tester: Tester, net: nn.Module, path: Path) -> tuple[Path, Image.Image | None, object]:
    """Read a picture; returns its path, the picture, and it as the network shall see it, or None and what is wrong."""
    try:
        picture = datasets.read_picture(path, tester.channels)
    except datasets.UnreadablePicture as error:
        return path, None, error
    size = tester.size if tester.args.scale == "train" else None
    if size is None and min(picture.size) < net.config.smallest_side:
        wanted = f"the generator needs {net.config.smallest_side} px a side"
        return path, None, f"{picture.width}x{picture.height} px, {wanted}"
    height, width = size or picture.size[::-1]
    most = tester.args.tile or math.inf
    if net.config.token_bytes(min(height, most), min(width, most), blocks=1) > utils.total_memory(tester.device):
        tokens = f"{net.config.tokens(height, width):,} tokens, more than {tester.device} can hold"
        return path, None, f"{width}x{height} px are {tokens}; take --scale train"
    return path, picture, datasets.resize_picture(picture, (size[1], size[0])) if size else picture


def in_batches(tester: Tester, pictures: Iterable[tuple]) -> Iterator[list[tuple]]:
    """Group what read_seen answered into batches of equal size, in order; whatever is wrong comes alone."""
    batch = []
    for item in pictures:
        fits = batch and item[1] and batch[0][1] and item[2].size == batch[0][2].size
        if batch and not (fits and len(batch) < BATCH and (len(batch) + 1) * math.prod(item[2].size) <= BATCH_PIXELS):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def ahead(pool: Executor, function: Callable, items: Iterable) -> Iterator:
    """Yield function(item) in order, while threads work on the next ones; few are held at a time."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 2 * BATCH:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def translate_folder(tester: Tester, direction: str, root: Path, paths: Sequence[Path]) -> list[Result]:
    """Translate pictures and write what comes out, each under its input's name; reads and writes in threads."""
    (source, target), (net, back) = DIRECTIONS[direction], tester.generators(direction)
    bad, names = datasets.BadPictures(root, len(paths), tester.args.on_bad_image), output_names(root, paths)
    kinds = [f"real_{source}", f"fake_{target}", *([f"rec_{source}"] if back else [])]
    folders = [tester.output / f"{kind}_{domain}" for kind in ("real", "fake", "rec") for domain in "AB"]
    clash = {(folder / name).resolve() for folder in folders for name in names.values()} & {p.resolve() for p in paths}
    if clash:
        raise utils.InputError(
            f"--output {tester.output}: would overwrite the input {min(clash)}; choose another folder"
        )
    files = {path: {kind: Path(kind) / names[path] for kind in kinds} for path in paths}
    there = {
        p for p in paths if tester.args.skip_existing and all((tester.output / f).exists() for f in files[p].values())
    }
    if tester.args.tile and tester.args.tile < net.config.receptive_field:
        needed = f"{net.config.receptive_field} px" if net.config.tokens(1, 1) == 0 else "the whole picture"
        words = f"a pixel depends on {needed} around it, so tiles will not quite fit together"
        utils.say(f"warning: --tile {tester.args.tile}: {words}", file=sys.stderr)
    start, busy = time.perf_counter(), tester.busy
    bar = tqdm(total=len(paths) - len(there), desc=direction, unit="picture", mininterval=0.5)

    def translated(pictures: Iterable[tuple]) -> Iterator[tuple]:
        for batch in in_batches(tester, pictures):
            bar.update(len(batch))
            if batch[0][1] is None:
                bad.note(batch[0][0], batch[0][2])
                continue
            fakes = tester(net, torch.stack([utils.picture_to_tensor(seen) for _, _, seen in batch]))
            answers = [fakes.cpu(), *([tester(back, fakes).cpu()] if back else [])]
            for i, (path, picture, seen) in enumerate(batch):
                yield path, picture if tester.args.output_size == "input" else seen, [x[i] for x in answers]

    def write(item: tuple[Path, Image.Image, list[Tensor]]) -> Path:
        path, picture, answers = item
        shown = [datasets.resize_picture(utils.tensor_to_picture(x), picture.size) for x in answers]
        for file, result in zip(files[path].values(), [picture, *shown], strict=True):
            utils.save_picture(result, tester.output / file)
        return path

    with bar, ThreadPoolExecutor(THREADS) as pool:
        read = functools.partial(read_seen, tester, net)
        done = set(ahead(pool, write, translated(ahead(pool, read, (path for path in paths if path not in there)))))
    if not done | there:
        raise utils.InputError(f"{root}: no picture could be translated (see above)")
    taken, kept = time.perf_counter() - start, f"; {len(there)} were there already" if there else ""
    share = (tester.busy - busy) / taken
    speed = (
        f"{len(done)} pictures in {taken:.1f} s, {len(done) / taken:.1f} a second, {share:.0%} of it in the networks"
    )
    utils.say(f"{direction}: {speed}{kept}")
    return [Result(path, names[path], files[path]) for path in paths if path in done | there]


# ---------------------------------------------------------------------------------------------
# The gallery


def write_gallery(tester: Tester, title: str, results: dict[str, list[Result]], table: Sequence[str]) -> None:
    """Write index.html: input, translation and round trip of every picture; opens from disk."""
    body = [f"<pre>{html.escape(chr(10).join(table))}</pre>"] if table else []
    for direction, pictures in results.items():
        body.append(f"<h2>{direction}: {len(pictures)} pictures</h2>")
        for result in pictures:
            figures = []
            for folder, file in result.files.items():
                address = quote(os.fsencode(file.as_posix()))
                figures.append(utils.figure(address, address, folder))
            body.append(f'<p>{html.escape(utils.one_line(result.name))}</p><div class="row">{"".join(figures)}</div>')
    utils.write_page(tester.output / "index.html", title, body)


def write_grid(tester: Tester, results: dict[str, list[Result]]) -> None:
    """Write grid.png: the first pictures of each direction, all at the size of the first."""
    rows, size = [], None
    columns = min(COLUMNS, *map(len, results.values()), COLUMNS)
    for pictures in results.values():
        for folder in pictures[0].files:
            cells = []
            for result in pictures[:: max(1, len(pictures) // columns)][:columns]:
                cells.append(datasets.load_picture(tester.output / result.files[folder], size))
                size = size or tuple(cells[0].shape[-2:])
            rows.append((folder, torch.stack(cells)))
    utils.save_picture(utils.draw_grid(rows), tester.output / "grid.png")


# ---------------------------------------------------------------------------------------------
# Measures


def test_tensors(tester: Tester, domain: str) -> list[Tensor]:
    """Read a test folder as the networks were trained: (1, C, H, W) each, at the recipe's size."""
    dataset = datasets.find_dataset(tester.args.data_root, tester.dataset_name)
    paths = datasets.split_pictures(dataset, f"test{domain}", tester.args.num_test)
    pictures = datasets.load_pictures(
        dataset / f"test{domain}", paths, tester.size, tester.channels, tester.args.on_bad_image
    )
    return [picture[None] for _, picture in pictures]


@torch.no_grad()
def mean_losses(tester: Tester) -> dict[str, float]:
    """The training losses on the test pictures: generators and both discriminators, as the 64x64 study reports them.

    Weights and form of the losses are the run's; no older pictures; the shorter domain starts again.
    """
    flags, rows = {name: getattr(tester.recipe["flags"], name) for name in models.LOSS_FLAGS}, []
    both = [test_tensors(tester, domain) for domain in "AB"]
    for i in range(max(map(len, both))):
        pair = (pictures[i % len(pictures)].to(tester.device) for pictures in both)
        with utils.autocast(tester.device, tester.precision):
            rows.append(models.all_losses(tester.nets, *pair, **flags))
    return metrics.mean_row(rows)


def measure(tester: Tester, direction: str, results: Sequence[Result]) -> dict:
    """Compute the measures of one direction that were asked for; errors in the units of training, [0, 2]."""
    (source, target), (net, back), scores = DIRECTIONS[direction], tester.generators(direction), {}
    wanted = tester.args.metrics
    if "cycle" in wanted:
        pairs = [(tester(back, tester(net, x)), x) for x in test_tensors(tester, source)]
        scores["cycle"] = metrics.mean_distance(pairs)
    if "identity" in wanted:
        scores["identity"] = metrics.mean_distance([(tester(net, x), x) for x in test_tensors(tester, target)])
    if "paired" in wanted:
        scores["paired"] = measure_paired(tester, source, target, results)
    if {"fid", "kid"} & set(wanted):
        scores["distribution"] = measure_distribution(tester, target, results)
    return scores


def measure_distribution(tester: Tester, target: str, results: Sequence[Result]) -> dict[str, dict]:
    """Compare the written pictures as a whole with the test and with the training pictures of the target domain."""
    dataset, tables = datasets.find_dataset(tester.args.data_root, tester.dataset_name), {}
    size = tester.size or (299, 299)  # px; the second is what Inception sees in any case

    def load(path: Path) -> Tensor:
        return utils.range_to_bytes(datasets.load_picture(path, size))

    fakes = [tester.output / result.files[f"fake_{target}"] for result in results]
    for split in (f"test{target}", f"train{target}"):
        reals = [path for path in datasets.split_pictures(dataset, split) if readable(path)]
        wanted = [name for name in ("fid", "kid") if name in tester.args.metrics]
        tables[split] = metrics.fid_kid(fakes, reals, load, wanted, tester.args.inception_weights, tester.device)
    return tables


def as_bytes(path: Path, channels: int) -> Tensor:
    """Read a picture as uint8 (channels, H, W)."""
    return utils.range_to_bytes(datasets.load_picture(path, None, channels))


def readable(path: Path) -> bool:
    """Whether a picture is whole; if not, it is named."""
    try:
        datasets.read_picture(path)
    except datasets.UnreadablePicture as error:
        utils.say(f"skipped, unreadable: {path} ({error})", file=sys.stderr)
        return False
    return True


def measure_paired(tester: Tester, source: str, target: str, results: Sequence[Result]) -> dict[str, dict]:
    """Compare the written pictures with those of the same name in the other domain's test folder."""
    dataset, channels = datasets.find_dataset(tester.args.data_root, tester.dataset_name), tester.channels
    folder, inputs = dataset / f"test{target}", dataset / f"test{source}"
    truths = {path.relative_to(folder).with_suffix(""): path for path in datasets.split_pictures(dataset, folder.name)}
    pairs = [(result, truths.get(result.input.relative_to(inputs).with_suffix(""))) for result in results]
    pairs = [(result, truth) for result, truth in pairs if truth and readable(truth)]
    if not pairs:
        raise utils.InputError(
            f"--metrics paired: no picture in {folder} has the name of one in {inputs}; leave it out for unpaired sets"
        )
    if len(pairs) < len(results):
        utils.say(f"{folder}: {len(pairs)} of {len(results)} pictures have their truth there; only these are scored")
    truths = [as_bytes(truth, channels) for _, truth in pairs]
    size, parts = tester.size or truths[0].shape[-2:], datasets.split_pictures(dataset, f"train{target}")
    count, total = 0, 0.0
    for _, picture in datasets.load_pictures(
        dataset / f"train{target}", parts, size, channels, tester.args.on_bad_image
    ):
        count, total = count + 1, total + utils.range_to_bytes(picture).double()
    return metrics.paired_table(
        [as_bytes(tester.output / result.files[f"fake_{target}"], channels) for result, _ in pairs],
        [as_bytes(result.input, channels) for result, _ in pairs],
        truths,
        total / count,
    )


def report(scores: dict) -> list[str]:
    """Lay out all measures as lines of text."""
    lines = []
    for name, values in scores.items():
        if name == "losses":
            lines += ["losses on the test set", *metrics.format_table({"": values})]
        elif isinstance(values, dict):
            plain = {k: v for k, v in values.items() if not isinstance(v, dict)}
            tables = [{"": plain}] if plain else []
            tables += [values[kind] for kind in ("paired", "distribution") if kind in values]
            lines += [name, *(line for table in tables for line in metrics.format_table(table))]
    return lines


# ---------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = utils.Parser(prog="test.py", description=__doc__)
    add = utils.flag_group(parser, "what")
    add("--dataset_name", type=utils.folder_name, help="set whose test pictures are translated (default: the run's)")
    add("--data_root", type=Path, default=Path("datasets"), help="folder that holds the data sets")
    add("--run_name", type=utils.folder_name, help="run in saved_models (default: --dataset_name, else horse2zebra)")
    add("--epoch", type=utils.epoch_name, default="latest", help="latest, best, or the number of a checkpoint")
    add("--weights", type=utils.path_name, default=None, metavar="FILE", help="a generator file, in place of a run")
    add("--input", type=Path, metavar="FILE_OR_FOLDER", help="pictures of one domain, in place of a data set")
    add("--direction", choices=("both", "AtoB", "BtoA"), default="both", help="which generator to use")
    add("--skip_existing", action="store_true", help="leave pictures out whose results are there already")
    add("--num_test", type=utils.whole(1), default=None, help="translate at most so many pictures (default: all)")
    add = utils.flag_group(parser, "how")
    add("--scale", choices=("train", "native"), default="train", help="the network sees it as in training, or whole")
    words = "translate larger pictures in overlapping tiles of so many px a side (default: whole)"
    add("--tile", type=utils.whole(16, 2**16), default=None, metavar="PIXELS", help=words)
    add("--output_size", choices=("input", "net"), default="input", help="size of the results: input's or network's")
    add("--output", type=Path, metavar="DIR", help="where results go (default: generated_images/<run>/test)")
    kinds = {"type": utils.words_of(MEASURES), "default": [], "metavar": ",".join(MEASURES)}
    add("--metrics", **kinds, help="measures on the test pictures (default: none)")
    words = "weights for fid and kid, where they cannot be downloaded"
    add("--inception_weights", type=utils.path_name, default=None, metavar="FILE", help=words)
    utils.add_reading_flags(add)
    utils.add_device_flags(parser)
    args = parser.parse_args(argv)
    given = utils.given_flags(parser, argv)
    for one, other in (("weights", "run_name"), ("weights", "epoch"), ("input", "metrics"), ("input", "dataset_name")):
        if one in given and other in given:
            parser.error(f"--{one} and --{other} contradict each other: give one of them")
    if args.inception_weights and not {"fid", "kid"} & set(args.metrics):
        parser.error("--inception_weights: has no effect without --metrics fid or kid; give both or none")
    args.run_name = args.run_name or args.dataset_name or "horse2zebra"
    return args


def settle(args: argparse.Namespace, nets: dict[str, nn.Module]) -> list[str]:
    """Return the directions to translate; refuse what these weights cannot do."""
    present = [d for d, (source, target) in DIRECTIONS.items() if f"G_{source}{target}" in nets]
    if not present:
        raise utils.InputError(f"the run {args.run_name} holds no generator; train it first")
    wanted = list(present) if args.direction == "both" else [args.direction]
    if not set(wanted) <= set(present):
        raise utils.InputError(f"--direction {args.direction}: these weights translate {', '.join(present)} only")
    for name in ("losses", "cycle"):
        complete = len(present) == 2 and (name == "cycle" or {"D_A", "D_B"} <= set(nets))
        if name in args.metrics and not complete:
            raise utils.InputError(
                f"--metrics {name}: needs the generators of both directions; these weights translate {present[0]} only"
            )
    return wanted


def make_tester(args: argparse.Namespace) -> Tester:
    """Load the networks and settle which data set they are tested on and where results go."""
    nets, recipe = load_networks(args)
    device, run_name = utils.pick_device(args.device), args.run_name
    if args.weights:
        run_name = plain_name(recipe.get("run_name")) or args.weights.stem
    return Tester(
        nets={name: net.eval().to(device) for name, net in nets.items()},
        recipe=recipe,
        args=args,
        device=device,
        precision=utils.pick_precision(args.precision, device),
        dataset_name=args.dataset_name or plain_name(recipe.get("dataset_name")) or run_name,
        output=args.output or Path("generated_images") / run_name / "test",
    )


def plain_name(value: object) -> str | None:
    """A name out of a file, if it is one that cannot lead anywhere else."""
    try:
        return utils.folder_name(value) if isinstance(value, str) else None
    except argparse.ArgumentTypeError:
        return None


@utils.stage
def main(argv: Sequence[str] | None = None) -> dict:
    """Translate, show, score; returns the scores."""
    args = parse_args(argv)
    datasets.limit_pixels(1e6 * args.max_megapixels)
    tester = make_tester(args)
    directions = settle(args, tester.nets)
    results, scores = {}, {}
    for direction, (root, paths) in find_inputs(tester, directions).items():
        results[direction] = translate_folder(tester, direction, root, paths)
        scores[direction] = measure(tester, direction, results[direction])
    if "losses" in args.metrics:
        scores["losses"] = mean_losses(tester)
    table = report({name: values for name, values in scores.items() if values})
    for line in table:
        utils.say(line)
    about = {name: tester.recipe.get(name) for name in ("epoch", "step")}
    title = f"{utils.one_line(tester.output.parent.name)}: epoch {about['epoch']}, step {about['step']}"
    write_gallery(tester, title, results, table)
    write_grid(tester, results)
    if args.metrics:
        counts = {direction: len(pictures) for direction, pictures in results.items()}
        utils.write_json(
            tester.output / "metrics.json", {"dataset_name": tester.dataset_name, **about, "pictures": counts, **scores}
        )
    utils.say(f"{sum(map(len, results.values()))} pictures translated; look at {tester.output / 'index.html'}")
    return scores


if __name__ == "__main__":
    main()
