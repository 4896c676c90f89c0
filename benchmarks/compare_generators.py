"""Compare generators at equal steps and at equal minutes: the same data, discriminators, losses and optimiser.

python benchmarks/compare_generators.py
python benchmarks/compare_generators.py --seeds 0 1 2 --steps 800 --equal_minutes
python benchmarks/compare_generators.py --dataset_name horse2zebra --steps 20000 --measure cycle

Trains each network with each seed for the same number of steps and, with --equal_minutes, also for as many steps as it
makes in the time of the slowest. The learning rate of each run falls to 0 over its own steps. Seconds per step are measured
first, in turns, and stored in pace.json, so that a resumed comparison has the same steps; evaluating and saving are not
included. Existing runs are resumed. Writes generated_images/compare_DATASET/{runs.csv, compare.md, compare.png, rows.png}.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import DAY2NIGHT, build_model, markdown_table, train_config, write_csv

import datasets
import test as test_command
import train
import utils
from models import DIRECTIONS
from toolkit import cli, images, metrics, process
from toolkit.checkpoints import IMAGES, RUNS
from toolkit.files import atomic_write, write_json, write_text
from toolkit.logs import read_losses
from toolkit.weights import load_generator

RESNET = ["--generator", "resnet", "--num_residual", "6", "--ngf", "32"]
VARIANTS = {
    "resnet": RESNET,
    "resnet_skips": [*RESNET, "--skips"],
    "unet_vit": ["--generator", "unet_vit", "--vit_size", "small"],
}
TIMED_STEPS = 8  # of each network
SIDE = 64  # px
EPOCHS = 4  # of each run, whatever its steps: the number of points of its curve
IMAGES_PER_ROW = 6  # of rows.png
SCORES = {"PSNR": 2, "SSIM": 3, "match@1": 2, "cycle": 3}  # digits after the point


@dataclass
class PlannedRun:
    """One training run: which network, how long, with which seed."""

    variant: str
    budget: str  # as the table shows it
    seed: int
    run_name: str
    flags: list[str]  # of train.py
    steps: int
    pace: float  # seconds per step


def common_flags(args):
    """Flags that are the same for all networks."""
    metrics_of_epochs = "paired,cycle" if args.measure == "PSNR" else "cycle"
    return [
        *DAY2NIGHT.split(),
        *("--dataset_name", args.dataset_name, "--data_root", str(args.data_root)),
        *("--img_height", str(SIDE), "--img_width", str(SIDE), "--num_epochs", str(EPOCHS)),
        *("--eval_interval", "1", "--eval_metrics", metrics_of_epochs),
    ]


def seconds_per_step(args):
    """Median time of a training step of each network, in turns, so that other programs slow all of them alike."""
    models = {}
    for variant, network in VARIANTS.items():
        models[variant] = build_model(train_config([*common_flags(args), *network]))
    times = {variant: [] for variant in models}
    for turn in range(TIMED_STEPS + 2):
        for variant, model in models.items():
            real_A, real_B = torch.rand(2, 1, 3, SIDE, SIDE, device=model.device) * 2 - 1
            start = time.perf_counter()
            losses = model.step(real_A, real_B)
            losses["loss_G"].item()  # waits for the device
            if turn > 1:  # the first steps include set-up
                times[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(values) for variant, values in times.items()}


def stored_pace(args, path):
    """The pace that an earlier call measured; else measure it."""
    if not path.is_file():
        write_json(path, seconds_per_step(args))
    return json.loads(path.read_text())


def plan(args, paces):
    """All runs: at equal steps, then at equal minutes; seed by seed, so that finished runs can be compared early.

    A run is named by its steps, so the slowest network has one run for both.
    """
    budgets = {f"{args.steps} steps": dict.fromkeys(VARIANTS, args.steps)}
    if args.equal_minutes:
        seconds = args.steps * max(paces.values())
        budgets[f"{seconds / 60:.1f} minutes"] = {
            name: EPOCHS * round(seconds / pace / EPOCHS) for name, pace in paces.items()
        }
    runs = []
    for seed in args.seeds:
        for budget, counts in budgets.items():
            for variant, network in VARIANTS.items():
                steps = counts[variant]
                name = f"compare_{args.dataset_name}_{variant}_{steps}_{seed}"
                own = ["--steps_per_epoch", str(steps // EPOCHS), "--seed", str(seed), "--run_name", name]
                run_flags = [*common_flags(args), *network, *own]
                runs.append(PlannedRun(variant, budget, seed, name, run_flags, steps, paces[variant]))
    return runs


def score(args, run):
    """A row of runs.csv: the cost of a run, and its scores on the test split."""
    wanted = "paired,cycle" if args.measure == "PSNR" else "cycle"
    scores = test_command.main(["--run_name", run.run_name, "--data_root", str(args.data_root), "--metrics", wanted])
    net, _ = load_generator(RUNS / run.run_name / "G_AB.safetensors")
    row = {"budget": run.budget, "variant": run.variant, "seed": run.seed}
    row |= {"parameters": sum(p.numel() for p in net.parameters()), "MMACs": metrics.count_macs(net, SIDE, SIDE) / 1e6}
    row |= {"s/step": run.pace, "steps": run.steps, "minutes": run.steps * run.pace / 60}
    for direction in DIRECTIONS:
        found = scores[str(direction)]
        for key, value in found.get("paired", {}).get("model", {}).items():
            row[f"{key}_{direction.target}"] = value
        row[f"cycle_{direction.source}"] = found["cycle"]
    return row


def mean_and_deviation(values, digits):
    """The mean and, of several seeds, their standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def grouped(items, key):
    """Lists of items by their key, in order."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def table(rows):
    """Lines of a Markdown table with one row for all seeds of a network."""
    shown = {f"{score}_{domain}": digits for score, digits in SCORES.items() for domain in "BA"}
    shown = {name: digits for name, digits in shown.items() if name in rows[0]}
    costs = {"parameters": "{:,}", "MMACs": "{:,.0f}", "s/step": "{:.3f}", "steps": "{:,}", "minutes": "{:.1f}"}
    groups = grouped(rows, lambda row: (row["budget"], row["variant"]))
    cells = []
    for (budget, variant), group in groups.items():
        cells.append({"budget": budget, "variant": variant, "seeds": len(group)})
        cells[-1] |= {name: form.format(group[0][name]) for name, form in costs.items()}
        for name, digits in shown.items():
            cells[-1][name] = mean_and_deviation([row[name] for row in group], digits)
    return markdown_table(cells)


def curve(run, measure):
    """Steps and the mean of a measure over both directions, from measures.csv."""
    rows = read_losses(RUNS / run.run_name / "measures.csv")
    columns = [name for name in rows[0] if name.startswith(f"{measure}_")]
    return [row["step"] for row in rows], [statistics.fmean(row[name] for name in columns) for row in rows]


def plot(runs, measure, path):
    """Plot the measure over steps, at equal steps, and over minutes, at equal minutes; a thin line for each seed."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    budgets = grouped(runs, lambda run: run.budget)
    for axes, budget, unit in ((left, next(iter(budgets)), "steps"), (right, list(budgets)[-1], "minutes of steps")):
        for i, (variant, group) in enumerate(grouped(budgets[budget], lambda run: run.variant).items()):
            curves = [curve(run, measure) for run in group]
            scale = 1 if unit == "steps" else group[0].pace / 60
            x = [step * scale for step in curves[0][0]]
            for _, values in curves:
                axes.plot(x, values, color=f"C{i}", alpha=0.35, linewidth=0.8)
            means = [statistics.fmean(values) for values in zip(*(values for _, values in curves), strict=True)]
            axes.plot(x, means, color=f"C{i}", linewidth=2, marker="o", markersize=3, label=variant)
        axes.set_title(budget, fontsize=10)
        axes.set_xlabel(unit)
        axes.set_ylabel(f"{measure}, mean of both directions")
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def draw_rows(args, runs, path):
    """Draw the same test images as each run translates them."""
    dataset = datasets.find_dataset(args.data_root, args.dataset_name)
    rows = []
    for direction in DIRECTIONS:
        found = datasets.named_images(
            dataset / f"test{direction.source}", images.ImageReader((SIDE, SIDE)), most=IMAGES_PER_ROW
        )
        real = torch.cat(list(found.values()))
        rows.append((f"real_{direction.source}", real))
        for run in runs:
            net, _ = load_generator(RUNS / run.run_name / f"{direction.generator}.safetensors")
            with torch.no_grad():
                rows.append((run.variant, net(real)))
    images.save_image(images.draw_grid(rows), path)


@process.command
def main(argv=None):
    parser = cli.Parser(prog="compare_generators.py", description=__doc__)
    parser.add_argument("--dataset_name", default="day2night", help="folder in --data_root")
    parser.add_argument("--data_root", type=Path, default=Path("datasets"), help="folder that contains the data sets")
    parser.add_argument("--steps", type=int, default=2400, help=f"steps of each run, in {EPOCHS} epochs")
    parser.add_argument(
        "--equal_minutes", action="store_true", help="also compare at the minutes of the slowest network"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of each network")
    parser.add_argument(
        "--measure", choices=("PSNR", "cycle"), default="PSNR", help="what the curves show; cycle without test pairs"
    )
    args = parser.parse_args(argv)
    args.steps -= args.steps % EPOCHS
    folder = IMAGES / f"compare_{args.dataset_name}"
    folder.mkdir(parents=True, exist_ok=True)
    runs = plan(args, stored_pace(args, folder / "pace.json"))
    rows = []
    for run in runs:
        existing = (RUNS / run.run_name / "latest.pt").is_file()
        train.main(["--run_name", run.run_name, "--start_from", "latest"] if existing else run.flags)
        rows.append(score(args, run))
        write_csv(folder / "runs.csv", rows)
    lines = table(rows)
    write_text(folder / "compare.md", "\n".join(lines) + "\n")
    plot(runs, args.measure, folder / "compare.png")
    drawn = [run for run in runs if (run.budget, run.seed) == (runs[-1].budget, args.seeds[0])]
    draw_rows(args, drawn, folder / "rows.png")
    for line in lines:
        utils.say(line)
    utils.say(f"written to {folder}/runs.csv, compare.md, compare.png and rows.png")


if __name__ == "__main__":
    main()
