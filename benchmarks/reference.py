"""PSNR over minutes: our training against a plain implementation of the paper, on the same machine and images.

python benchmarks/reference.py
python benchmarks/reference.py --seeds 0 1 2 --minutes 10 --threads 2
python benchmarks/reference.py --ours "--img_height 64 --img_width 64 --num_residual 3 --ngf 32 --skips --num_epochs 6"

The reference is that of step.py (float32, no EMA weights), with the settings of the classic code at another size: batch 1,
learning rate 2e-4 (constant, because it would fall from epoch 100 on), weights from N(0, 0.02), images enlarged, cropped
and flipped. Ours is trained with the flags of --ours, by default the demo's recipe. Its learning rate falls over its own
epochs, and it ends with them if they end before --minutes. The clock runs while batches are read and steps are taken, and
stops while the test pairs are scored (with the EMA weights, if there are any). Runs whose scores are in reference.csv are
not repeated. Writes reference.csv and reference.png to --output.
"""

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
import step as plain
from common import build_model, read_csv, recipe, train_config, write_csv

import cyclegan
import datasets
import train
import utils
from models import DIRECTIONS
from toolkit import cli, devices, metrics, process
from toolkit.config import TrainConfig
from toolkit.files import atomic_write
from toolkit.images import ImageReader, range_to_bytes

CLASSIC = "--batch_size 1 --lr 2e-4 --load_scale 1.12 --flip"
KEYS = ("which", "recipe", "threads", "limit", "seed")  # what identifies a run; limit: --minutes
BATCH = 8  # images that are translated at once for a score
TITLES = {"PSNR_B": "A → B", "PSNR_A": "B → A"}


class Learner:
    """What is trained and scored."""

    networks: Mapping[str, torch.nn.Module]  # with the generators G_AB and G_BA
    precision: str
    device: torch.device

    def start_epoch(self, epoch: int) -> bool:
        """Set the learning rate of an epoch; False if none is left."""
        return True

    def step(self, real_A: torch.Tensor, real_B: torch.Tensor) -> None:
        raise NotImplementedError


class Data(Protocol):
    """What it is trained with."""

    def batches(self, epoch: int, first_step: int, device: torch.device) -> Iterable[Sequence[torch.Tensor]]: ...


class Reference(Learner):
    """The plain step, with the paper's initial weights, at a constant learning rate."""

    def __init__(self, args: argparse.Namespace, device: torch.device, seed: int):
        devices.seed_everything(seed)
        self.plain = plain.Reference(args, device)
        for net in self.plain.networks.values():
            for name, parameter in net.named_parameters():
                torch.nn.init.normal_(parameter, 0, 0.02) if name.endswith("weight") else parameter.data.zero_()
        self.precision = "fp32"
        self.networks = self.plain.networks
        self.device = device

    def step(self, real_A: torch.Tensor, real_B: torch.Tensor) -> None:
        self.plain.step(real_A, real_B)


class Ours(Learner):
    """The model of train.py with its learning rate."""

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config = config.optim
        self.model = build_model(config, device)
        self.precision = self.model.precision
        self.networks = self.model.ema_networks
        self.device = device

    def start_epoch(self, epoch: int) -> bool:
        if epoch >= self.config.num_epochs:
            return False
        self.model.set_learning_rate(self.config.learning_rate_factor(epoch))
        return True

    def step(self, real_A: torch.Tensor, real_B: torch.Tensor) -> None:
        self.model.step(real_A, real_B)


def train_and_score(
    learner: Learner,
    data: Data,
    score: Callable[[Learner], dict],
    limit: float,
    every: float,
    clock: Callable[[], float],
) -> Iterator[dict]:
    """Train for `limit` seconds of a clock or until the last epoch; yields scores for about every `every` seconds."""
    trained = 0.0
    steps = 0
    epoch = 0
    scored = 1

    def row() -> dict:
        found = {"minutes": trained / 60, "step": steps} | score(learner)
        utils.say(", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        return found

    yield row()
    last_scored = 0
    while trained < limit and learner.start_epoch(epoch):
        start = clock()
        for real_A, real_B in data.batches(epoch, 0, learner.device):
            learner.step(real_A, real_B)
            steps += 1
            if learner.device.type == "cuda":
                torch.cuda.synchronize(learner.device)
            trained += clock() - start
            if trained >= scored * every or trained >= limit:
                yield row()
                scored += 1
                last_scored = steps
            if trained >= limit:
                break
            start = clock()
        epoch += 1
    if last_scored < steps:
        yield row()


def translations(learner: Learner, reals: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate the images of both domains; returns (N, C, H, W) in [-1, 1] by target domain."""
    found = {}
    for direction in DIRECTIONS:
        net = learner.networks[direction.generator]
        batches = reals[direction.source].split(BATCH)
        found[direction.target] = torch.cat([cyclegan.translate(net, x, learner.precision).cpu() for x in batches])
    return found


def mean_psnr(learner: Learner, reals: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Mean PSNR of the translations of test pairs, by names such as PSNR_B."""
    row = {}
    for target, fakes in translations(learner, reals).items():
        pairs = zip(fakes, reals[target], strict=True)
        row[f"PSNR_{target}"] = metrics.mean([metrics.psnr(range_to_bytes(x), range_to_bytes(y)) for x, y in pairs])
    return row


def load_pairs(folder: Path, size: tuple[int, int], channels: int) -> dict[str, torch.Tensor]:
    """Load the test images whose names are in both domains, (pairs, C, H, W) each, by domain."""
    found = {domain: datasets.named_images(folder / f"test{domain}", ImageReader(size, channels)) for domain in "AB"}
    names = sorted(found["A"].keys() & found["B"].keys())
    if not names:
        raise utils.InputError(f"{folder}: no image in testA has the name of one in testB; take a set with test pairs")
    return {domain: torch.cat([own[name] for name in names]) for domain, own in found.items()}


def make_learner(args: argparse.Namespace, which: str, seed: object) -> tuple[Learner, Data, datasets.DataConfig]:
    """Build one side with its training data, and say what its images are."""
    flags: list[object] = [*shlex.split(args.ours)]
    if which == "reference":
        flags = [*CLASSIC.split(), "--img_height", args.size, "--img_width", args.size, "--n_layers_D", args.n_layers_D]
    flags += ["--dataset_name", args.dataset_name, "--data_root", args.data_root, "--seed", seed]
    config = train_config(flags)
    device = devices.pick_device(config.device.device)
    data = train.load_data(config, device, measure=True)
    learner = Reference(args, device, config.run.seed) if which == "reference" else Ours(config, device)
    return learner, data, config.data


def make_run(args: argparse.Namespace, key: dict) -> list[dict]:
    """Train one side with one seed; returns its rows of reference.csv."""
    learner, data, shape = make_learner(args, key["which"], key["seed"])
    reals = load_pairs(datasets.find_dataset(args.data_root, args.dataset_name), shape.size, shape.channels)
    utils.say(f"{key['which']}, seed {key['seed']}, {learner.device}, {learner.precision}")
    score = functools.partial(mean_psnr, reals=reals)
    rows = train_and_score(learner, data, score, 60 * args.minutes, args.every, time.perf_counter)
    return [key | row for row in rows]


def read_rows(path: Path) -> list[dict]:
    """Read the rows of earlier calls."""
    rows = read_csv(path)
    for row in rows:
        row |= {name: float(value) for name, value in row.items() if name not in KEYS}
    return rows


def curves_of(rows: list[dict], which: str, measure: str, grid: np.ndarray) -> np.ndarray:
    """The measure of each seed at given minutes: (seeds, minutes), nan after the end of a run."""
    curves = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = [row for row in rows if (row["which"], row["seed"]) == (which, seed)]
        values = [row[measure] for row in own]
        curves.append(np.interp(grid, [row["minutes"] for row in own], values, right=np.nan))
    return np.array(curves)


def minutes_to(level: float, grid: np.ndarray, curve: np.ndarray) -> str:
    """The first minute at which a curve has reached a level, for a message."""
    reached = grid[curve >= level]
    return f"{reached[0]:.1f}" if len(reached) else f"more than {grid[np.isfinite(curve)][-1]:.1f}"


def draw_curves(rows: list[dict], minutes: float, every: float, path: Path) -> list[str]:
    """Draw both directions, a thin line for each seed and a thick one for their mean; returns a line of text for each."""
    grid = np.linspace(0, minutes, 1 + max(1, round(60 * minutes / every)))
    figure = Figure(figsize=(10, 4), layout="constrained")
    lines = []
    for axes, (measure, title) in zip(figure.subplots(1, 2), TITLES.items(), strict=True):
        curves = {which: curves_of(rows, which, measure, grid) for which in ("reference", "ours")}
        for colour, (which, values) in zip(("C0", "C1"), curves.items(), strict=True):
            for curve in values:
                axes.plot(grid, curve, color=colour, alpha=0.35, linewidth=0.8)
            axes.plot(grid, values.mean(0), color=colour, linewidth=2.5, label=which)
        level = curves["reference"].mean(0)[-1]
        taken = minutes_to(level, grid, curves["ours"].mean(0))
        each = ", ".join(minutes_to(level, grid, curve) for curve in curves["ours"])
        lines.append(
            f"{title}: the reference has {level:.2f} dB after {minutes:g} minutes, ours after {taken} "
            f"(its seeds after {each})"
        )
        axes.axhline(level, color="C0", linestyle=":", linewidth=1)
        axes.set_title(f"{title}: ours needs {taken} minutes for the reference's {minutes:g}", fontsize=10)
        axes.set_xlabel("minutes of training")
        axes.set_ylabel("PSNR on the test pairs, dB")
        axes.set_xlim(0, minutes)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    return lines


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="reference.py", description=__doc__)
    parser.add_argument(
        "--ours", default=shlex.join(recipe("day2night")), help="flags of train.py (default: the demo's)"
    )
    parser.add_argument("--ngf", type=int, default=64, help="width of the reference's networks")
    parser.add_argument("--blocks", type=int, default=9, help="residual blocks of the reference")
    parser.add_argument("--n_layers_D", type=int, default=3, help="strided layers of the reference's discriminators")
    parser.add_argument("--size", type=int, default=64, help="side of the reference's images, px")
    parser.add_argument("--dataset_name", default="day2night", help="folder in --data_root, with test pairs")
    parser.add_argument("--data_root", type=Path, default=Path("datasets"), help="folder that contains the data sets")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of training of each run")
    parser.add_argument("--every", type=float, default=20.0, help="seconds of training between two scores")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--output", type=Path, default=Path("generated_images/benchmarks"), help="folder of the results"
    )
    return parser.parse_args(argv)


@process.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    path = args.output / "reference.csv"
    rows = read_rows(path)
    classic = f"ngf {args.ngf}, {args.blocks} blocks, n_layers_D {args.n_layers_D}, {args.size} px"
    wanted = []
    for seed in args.seeds:
        for which, settings in (("reference", classic), ("ours", args.ours)):
            values = (which, f"{args.dataset_name}: {settings}", args.threads, args.minutes, seed)
            key = dict(zip(KEYS, map(str, values), strict=True))
            wanted.append(key)
            if not [row for row in rows if key.items() <= row.items()]:
                rows += make_run(args, key)
                write_csv(path, rows)
    chosen = [row for row in rows if any(key.items() <= row.items() for key in wanted)]
    for line in draw_curves(chosen, args.minutes, args.every, args.output / "reference.png"):
        utils.say(line)
    utils.say(f"written to {path} and reference.png")


if __name__ == "__main__":
    main()
