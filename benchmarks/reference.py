"""PSNR over minutes: our training against the plain one of the paper, on the same machine, from the same images.

python benchmarks/reference.py
python benchmarks/reference.py --seeds 0 1 2 --minutes 10 --threads 2
python benchmarks/reference.py --ours "--img_height 64 --img_width 64 --num_residual 3 --ngf 32 --skips --num_epochs 6"

The reference is the one of step.py (float32, no averaging), with what a user of the classic code gets who types only the
size: batch 1, rate 2e-4 (still constant, it would fall from epoch 100 on), weights from N(0, 0.02), images enlarged,
cropped and flipped. Ours trains by the flags of --ours, the rate falling over its own epochs, and ends with them if they
end before --minutes. The clock runs while a batch is read and a step is made, and stands still while the test pairs are
scored (the averaged weights, where there are any). A run whose scores are in reference.csv is not made again; writes it,
and reference.png, into --output.
"""

import argparse
import csv
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
import step as plain

import cyclegan
import datasets
import train
import utils
from toolkit import cli, devices, metrics, process
from toolkit.files import atomic_write
from toolkit.images import range_to_bytes

CLASSIC = "--batch_size 1 --lr 2e-4 --load_scale 1.12 --flip"
DEMO = "--img_height 64 --img_width 64 --num_residual 3 --ngf 16 --ndf 32 --n_layers_D 2 --batch_size 1 --load_scale 1"
DEMO += " --no-flip --skips --lr 4e-4 --ema 0.999 --num_epochs 8"
COLUMNS = ("which", "recipe", "threads", "limit", "seed", "minutes", "step", "PSNR_B", "PSNR_A")
TOGETHER = 8  # images that are translated at once to be scored
KEYS = COLUMNS[:5]  # what names a run; limit: --minutes
TITLES = {"PSNR_B": "A → B", "PSNR_A": "B → A"}


class Reference:
    """The plain step, from the paper's initial weights."""

    def __init__(self, args: argparse.Namespace, device: torch.device, config: argparse.Namespace):
        devices.seed_everything(args.seed)
        self.plain = plain.Reference(config, device)
        for net in self.plain.nets.values():
            for name, parameter in net.named_parameters():
                torch.nn.init.normal_(parameter, 0, 0.02) if name.endswith("weight") else parameter.data.zero_()
        self.precision = "fp32"
        self.nets = self.plain.nets
        self.device = device

    def start_epoch(self, epoch: int) -> bool:
        return True  # at a constant rate

    def step(self, real_A: torch.Tensor, real_B: torch.Tensor, finished_steps: int) -> None:
        self.plain.step(real_A, real_B)


class Ours:
    """train.py's model, its rate as its flags say."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args = args
        self.model = train.make_model(args, train.make_nets(args, {}), device)
        self.precision = self.model.precision
        self.nets = self.model.averaged_nets
        self.device = device

    def start_epoch(self, epoch: int) -> bool:
        """Set the rate of an epoch; False if there is none left."""
        if epoch < self.args.num_epochs:
            self.model.set_learning_rate(cyclegan.linear_decay(epoch, self.args.num_epochs, cli.decay_epoch(self.args)))
        return epoch < self.args.num_epochs

    def step(self, real_A: torch.Tensor, real_B: torch.Tensor, finished_steps: int) -> None:
        self.model.step(real_A, real_B, finished_steps)


def learn(learner: Reference | Ours, feed: datasets.Feed, reals: dict, limit: float, every: float) -> list[dict]:
    """Train until `limit` seconds of training are over, or the recipe is; returns a score for about each `every` seconds."""
    trained = 0.0
    steps = 0
    epoch = 0
    rows = [scores(learner, reals, trained, steps)]
    while trained < limit and learner.start_epoch(epoch):
        start = time.perf_counter()
        for real_A, real_B in feed.batches(epoch, 0, learner.device):
            learner.step(real_A, real_B, steps)
            steps += 1
            if learner.device.type == "cuda":
                torch.cuda.synchronize(learner.device)
            trained += time.perf_counter() - start
            if trained >= len(rows) * every or trained >= limit:
                rows.append(scores(learner, reals, trained, steps))
            if trained >= limit:
                break
            start = time.perf_counter()
        epoch += 1
    if rows[-1]["step"] < steps:
        rows.append(scores(learner, reals, trained, steps))
    return rows


def scores(learner: Reference | Ours, reals: dict, trained: float, steps: int) -> dict:
    """The mean PSNR of both directions on the test pairs, after so many seconds and steps of training."""
    row = {"minutes": trained / 60, "step": steps}
    for source, target in ("AB", "BA"):
        fakes = []
        for batch in reals[source].split(TOGETHER):
            fakes += cyclegan.translate(learner.nets[f"G_{source}{target}"], batch, learner.precision).cpu()
        pairs = zip(fakes, reals[target], strict=True)
        row[f"PSNR_{target}"] = metrics.mean([metrics.psnr(range_to_bytes(x), range_to_bytes(y)) for x, y in pairs])
    utils.say(f"{row['minutes']:6.2f} minutes, step {steps:,}: {row['PSNR_B']:.2f} / {row['PSNR_A']:.2f} dB")
    return row


def make_run(config: argparse.Namespace, key: dict) -> list[dict]:
    """Train one side from one seed; returns its rows of reference.csv."""
    recipe = config.ours
    if key["which"] == "reference":
        recipe = f"{CLASSIC} --img_height {config.size} --img_width {config.size}"
    words = ["--dataset_name", config.dataset_name, "--data_root", str(config.data_root), "--seed", key["seed"]]
    args = train.parse_args([*shlex.split(recipe), *words])
    cli.check_run_flags(args)
    device = devices.pick_device(args.device)
    dataset, feed = train.make_feed(args, device)
    size = (args.img_height, args.img_width)
    found = {domain: datasets.named_images(dataset / f"test{domain}", size, args.channels) for domain in "AB"}
    names = sorted(found["A"].keys() & found["B"].keys())
    if not names:
        raise utils.InputError(f"{dataset}: no image in testA has the name of one in testB; take a set with test pairs")
    reals = {domain: torch.cat([own[name] for name in names]) for domain, own in found.items()}  # (pairs, C, H, W) each
    learner = Reference(args, device, config) if key["which"] == "reference" else Ours(args, device)
    utils.say(f"{key['which']}, seed {key['seed']}, {device}, {learner.precision}")
    return [{**key, **row} for row in learn(learner, feed, reals, 60 * config.minutes, config.every)]


def read_rows(path: Path) -> list[dict]:
    """What earlier calls wrote, its numbers as numbers."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(row[name]) for name in COLUMNS if name not in KEYS}
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write reference.csv, whole or not at all."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def curves_of(rows: list[dict], which: str, measure: str, grid: np.ndarray) -> np.ndarray:
    """The measure of each seed at the minutes of a grid: (seeds, minutes), nan after the end of a run."""
    curves = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = [row for row in rows if (row["which"], row["seed"]) == (which, seed)]
        values = [row[measure] for row in own]
        curves.append(np.interp(grid, [row["minutes"] for row in own], values, right=np.nan))
    return np.array(curves)


def minutes_to(level: float, grid: np.ndarray, curve: np.ndarray) -> str:
    """The first minute of the grid at which a curve has a level, in words."""
    reached = grid[curve >= level]
    return f"{reached[0]:.1f}" if len(reached) else f"more than {grid[np.isfinite(curve)][-1]:.1f}"


def compare(rows: list[dict], minutes: float, every: float, path: Path) -> list[str]:
    """Draw both directions, a thin line for each seed and a thick one for their mean; returns what is to be said."""
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
        words = f"{title}: the reference has {level:.2f} dB after {minutes:g} minutes, ours after {taken}"
        lines.append(f"{words} (its seeds after {each})")
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
    add = cli.flag_group(parser, "what")
    add("--ours", default=DEMO, help="flags of train.py (default: those of make demo)")
    add("--ngf", type=cli.int_between(1), default=64, help="width of the reference's networks")
    add("--blocks", type=cli.int_between(0), default=9, help="residual blocks of the reference")
    add("--n_layers_D", type=cli.int_between(1), default=3, help="strided layers of the reference's discriminators")
    add("--size", type=cli.int_between(4), default=64, help="side of the reference's images, px")
    add("--dataset_name", type=cli.folder_name, default="day2night", help="folder in --data_root, with test pairs")
    add("--data_root", type=Path, default=Path("datasets"), help="folder that holds the data sets")
    add("--minutes", type=cli.float_between(0, above=True), default=10.0, help="minutes of training of each run")
    add("--every", type=cli.float_between(0, above=True), default=20.0, help="seconds of training between two scores")
    add("--seeds", type=cli.int_between(0, 2**32 - 1), nargs="+", default=[0], help="seeds of each side")
    add("--threads", type=cli.int_between(1), default=2, help="CPU threads")
    add("--output", type=Path, default=Path("generated_images/benchmarks"), help="where results go")
    return parser.parse_args(argv)


@process.command
def main(argv: list[str] | None = None) -> None:
    config = parse_args(argv)
    torch.set_num_threads(config.threads)
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / "reference.csv"
    rows = read_rows(path)
    classic = f"ngf {config.ngf}, {config.blocks} blocks, n_layers_D {config.n_layers_D}, {config.size} px"
    wanted = []
    for seed in config.seeds:
        for which, recipe in (("reference", classic), ("ours", config.ours)):
            values = (which, f"{config.dataset_name}: {recipe}", config.threads, config.minutes, seed)
            key = dict(zip(KEYS, map(str, values), strict=True))
            wanted.append(key)
            if not [row for row in rows if key.items() <= row.items()]:
                rows += make_run(config, key)
                write_rows(path, rows)
    chosen = [row for row in rows if any(key.items() <= row.items() for key in wanted)]
    for line in compare(chosen, config.minutes, config.every, config.output / "reference.png"):
        utils.say(line)
    utils.say(f"written to {path} and reference.png")


if __name__ == "__main__":
    main()
