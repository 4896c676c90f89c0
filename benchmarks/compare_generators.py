"""Compare the generator families: the same data, seed, steps, discriminator, losses and optimiser; only --generator differs.

python benchmarks/compare_generators.py
python benchmarks/compare_generators.py --dataset_name horse2zebra --num_epochs 20 --measure cycle

Trains one run per family (goes on with what is there), tests both, times both in turns, and writes
generated_images/compare_DATASET/{compare.md, compare.png, rows.png}. "At equal time" reads the slower
family's curve at the minute in which the faster one ended; its learning rate had not yet fallen by then.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import models
import test as test_stage
import train
import utils
import weights

FAMILIES = {
    "resnet": ["--generator", "resnet", "--num_residual", "9", "--ngf", "32"],
    "unet_vit": ["--generator", "unet_vit", "--vit_size", "small"],
}
TIMED = 8  # steps of each family, in turns; their median is reported
COLUMNS = 6  # pictures in rows.png


def common_flags(args):
    """What both families share: the recipe of the demo, which suits pictures of 64 px."""
    flags = [
        "--dataset_name",
        args.dataset_name,
        "--data_root",
        str(args.data_root),
        "--img_height",
        "64",
        "--img_width",
        "64",
        "--ndf",
        "32",
    ]
    flags += ["--n_layers_D", "2", "--batch_size", "1", "--load_scale", "1", "--no-flip", "--seed", str(args.seed)]
    flags += ["--num_epochs", str(args.num_epochs), "--eval_interval", "1"]
    return [*flags, "--eval_metrics", "paired,cycle" if args.measure == "PSNR" else "cycle"]


def train_or_resume(args, family):
    """Train one family's run, or what is left of it; returns its flags."""
    name = f"compare_{family}"
    flags = [*common_flags(args), *FAMILIES[family], "--run_name", name]
    state = Path("saved_models") / name / "latest.pt"
    train.main(["--run_name", name, "--start_from", "latest"] if state.is_file() else flags)
    return flags


def seconds_per_step(families):
    """Median time of a training step of each family, in turns, so that a busy machine slows both."""
    runs, times = {}, {family: [] for family in families}
    for family, flags in families.items():
        args = train.settle(train.parse_args([*flags, "--eval_interval", "0"]))
        device = utils.pick_device(args.device)
        dataset = datasets.find_dataset(args.data_root, args.dataset_name)
        runs[family] = train.make_run(args, train.make_nets(args, {}), dataset, device)
    for turn in range(TIMED + 2):
        for family, run in runs.items():
            real_A, real_B = (torch.rand(1, 3, 64, 64, device=run.device) * 2 - 1 for _ in "AB")
            start = time.perf_counter()
            terms = train.train_step(run, real_A, real_B, train.cyclegan_objective)
            float(terms["loss_G"].detach())  # waits for the device
            if turn > 1:  # the first ones pay for set-up
                times[family].append(time.perf_counter() - start)
    return {family: statistics.median(values) for family, values in times.items()}


def curve(family, measure):
    """Steps and the mean of a measure over both directions, from measures.csv."""
    rows = utils.read_losses(Path("saved_models") / f"compare_{family}" / "measures.csv")
    columns = [name for name in rows[0] if name.startswith(f"{measure}_")]
    return [row["step"] for row in rows], [statistics.fmean(row[name] for name in columns) for row in rows]


def at_time(steps, values, seconds, limit):
    """The last value that a curve had reached after `limit` seconds."""
    reached = [value for step, value in zip(steps, values, strict=True) if step * seconds <= limit * 1.0001]
    return reached[-1] if reached else float("nan")


def plot(curves, seconds, measure, path):
    """Draw the measure over steps and over minutes of this machine."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for family, (steps, values) in curves.items():
        left.plot(steps, values, marker="o", label=family)
        right.plot([step * seconds[family] / 60 for step in steps], values, marker="o", label=family)
    left.set_xlabel("steps")
    right.set_xlabel("minutes of training steps")
    for axes in (left, right):
        axes.set_ylabel(f"{measure}, mean of both directions")
        axes.grid(alpha=0.3)
        axes.legend()
    with utils.atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def draw_rows(args, families, path):
    """Draw the same test pictures as each family translates them."""
    dataset, rows = datasets.find_dataset(args.data_root, args.dataset_name), []
    for source, target in ("AB", "BA"):
        real = list(datasets.named_pictures(dataset / f"test{source}", (64, 64), 3, most=COLUMNS).values())[:COLUMNS]
        rows.append((f"real_{source}", torch.cat(real)))
        for family in families:
            net, _ = weights.load_generator(Path(f"saved_models/compare_{family}/G_{source}{target}.safetensors"))
            with torch.no_grad():
                rows.append((family, net(torch.cat(real))))
    utils.save_picture(utils.draw_grid(rows), path)


def table(args, families, seconds, curves, measure):
    """Lay out the comparison as lines of Markdown."""
    limit = min(seconds[family] * curves[family][0][-1] for family in families)
    lines = [
        "| | parameters | MMACs | s/step | steps | PSNR fake_B / fake_A | match@1 | cycle A / B | "
        f"loss_G, D_A, D_B (test) | {measure} at equal time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family in families:
        wanted = "paired,cycle,losses" if measure == "PSNR" else "cycle,losses"
        name, root = f"compare_{family}", str(args.data_root)
        scores = test_stage.main(["--run_name", name, "--data_root", root, "--metrics", wanted])
        net, _ = weights.load_generator(Path(f"saved_models/compare_{family}/G_AB.safetensors"))
        paired = [scores[d].get("paired", {}).get("model", {}) for d in ("AtoB", "BtoA")]
        losses = scores["losses"]
        steps, values = curves[family]
        cells = [
            family,
            f"{sum(p.numel() for p in net.parameters()):,}",
            f"{models.count_macs(net, 64, 64) / 1e6:,.0f}",
            f"{seconds[family]:.3f}",
            f"{steps[-1]:,}",
            " / ".join(f"{p['PSNR']:.2f}" for p in paired if p) or "no pairs",
            " / ".join(f"{p['match@1']:.2f}" for p in paired if p) or "no pairs",
            " / ".join(f"{scores[d]['cycle']:.3f}" for d in ("AtoB", "BtoA")),
            ", ".join(f"{losses[name]:.2f}" for name in ("loss_G", "loss_D_A", "loss_D_B")),
            f"{at_time(steps, values, seconds[family], limit):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@utils.stage
def main(argv=None):
    parser = utils.Parser(prog="compare_generators.py", description=__doc__)
    add = utils.flag_group(parser, "what")
    add("--dataset_name", type=utils.folder_name, default="day2night", help="folder in --data_root")
    add("--data_root", type=Path, default=Path("datasets"), help="folder that holds the data sets")
    add("--num_epochs", type=utils.whole(1), default=6, help="epochs of each family")
    add("--seed", type=utils.whole(0, 2**32 - 1), default=0, help="seed of both")
    add("--measure", choices=("PSNR", "cycle"), default="PSNR", help="what the curves show; cycle for unpaired sets")
    args = parser.parse_args(argv)
    families = {family: train_or_resume(args, family) for family in FAMILIES}
    seconds = seconds_per_step(families)
    curves = {family: curve(family, args.measure) for family in families}
    folder = Path("generated_images") / f"compare_{args.dataset_name}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = table(args, families, seconds, curves, args.measure)
    utils.write_text(folder / "compare.md", "\n".join(lines) + "\n")
    plot(curves, seconds, args.measure, folder / "compare.png")
    draw_rows(args, families, folder / "rows.png")
    for line in lines:
        utils.say(line)
    utils.say(f"written to {folder}/compare.md, compare.png and rows.png")


if __name__ == "__main__":
    main()
