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
import devices
import flags
import images
import metrics
import test as test_stage
import train
import utils
from checkpoints import IMAGES, RUNS
from files import atomic_write, write_text
from logs import read_losses
from weights import load_generator

FAMILIES = {
    "resnet": ["--generator", "resnet", "--num_residual", "9", "--ngf", "32"],
    "unet_vit": ["--generator", "unet_vit", "--vit_size", "small"],
}
TIMED = 8  # steps of each family, in turns; their median is reported
SIDE = 64  # px
COLUMNS = 6  # images in rows.png


def common_flags(args):
    """What both families share: the recipe of the demo, which suits images of 64 px."""
    words = ["--dataset_name", args.dataset_name, "--data_root", str(args.data_root)]
    words += ["--img_height", str(SIDE), "--img_width", str(SIDE), "--ndf", "32", "--n_layers_D", "2"]
    words += ["--batch_size", "1", "--load_scale", "1", "--no-flip", "--seed", str(args.seed)]
    words += ["--num_epochs", str(args.num_epochs), "--eval_interval", "1"]
    return [*words, "--eval_metrics", "paired,cycle" if args.measure == "PSNR" else "cycle"]


def train_or_resume(args, family):
    """Train one family's run, or what is left of it; returns its flags."""
    name = f"compare_{family}"
    words = [*common_flags(args), *FAMILIES[family], "--run_name", name]
    state = RUNS / name / "latest.pt"
    train.main(["--run_name", name, "--start_from", "latest"] if state.is_file() else words)
    return words


def seconds_per_step(families):
    """Median time of a training step of each family, in turns, so that a busy machine slows both."""
    models = {}
    for family, words in families.items():
        args = flags.with_vit_defaults(train.parse_args([*words, "--eval_interval", "0"]))
        flags.check_run_flags(args)
        models[family] = train.make_model(args, train.make_nets(args, {}), devices.pick_device(args.device))
    times = {family: [] for family in families}
    for turn in range(TIMED + 2):
        for family, model in models.items():
            real_A, real_B = torch.rand(2, 1, 3, SIDE, SIDE, device=model.device) * 2 - 1
            start = time.perf_counter()
            losses = model.step(real_A, real_B, turn)
            losses["loss_G"].item()  # waits for the device
            if turn > 1:  # the first ones pay for set-up
                times[family].append(time.perf_counter() - start)
    return {family: statistics.median(values) for family, values in times.items()}


def curve(family, measure):
    """Steps and the mean of a measure over both directions, from measures.csv."""
    rows = read_losses(RUNS / f"compare_{family}" / "measures.csv")
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
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def draw_rows(args, families, path):
    """Draw the same test images as each family translates them."""
    dataset = datasets.find_dataset(args.data_root, args.dataset_name)
    rows = []
    for source, target in ("AB", "BA"):
        found = datasets.named_images(dataset / f"test{source}", (SIDE, SIDE), 3, most=COLUMNS)
        real = torch.cat(list(found.values()))
        rows.append((f"real_{source}", real))
        for family in families:
            net, _ = load_generator(RUNS / f"compare_{family}" / f"G_{source}{target}.safetensors")
            with torch.no_grad():
                rows.append((family, net(real)))
    images.save_image(images.draw_grid(rows), path)


def table_row(args, family, seconds, curve, limit):
    """The cells of one family; limit: seconds of training after which the measure is compared."""
    name = f"compare_{family}"
    wanted = "paired,cycle,losses" if args.measure == "PSNR" else "cycle,losses"
    scores = test_stage.main(["--run_name", name, "--data_root", str(args.data_root), "--metrics", wanted])
    net, _ = load_generator(RUNS / name / "G_AB.safetensors")
    paired = [scores[direction]["paired"]["model"] for direction in ("AtoB", "BtoA") if "paired" in scores[direction]]
    steps, values = curve
    return [
        family,
        f"{sum(p.numel() for p in net.parameters()):,}",
        f"{metrics.count_macs(net, SIDE, SIDE) / 1e6:,.0f}",
        f"{seconds:.3f}",
        f"{steps[-1]:,}",
        " / ".join(f"{row['PSNR']:.2f}" for row in paired) or "no pairs",
        " / ".join(f"{row['match@1']:.2f}" for row in paired) or "no pairs",
        " / ".join(f"{scores[direction]['cycle']:.3f}" for direction in ("AtoB", "BtoA")),
        ", ".join(f"{scores['losses'][name]:.2f}" for name in ("loss_G", "loss_D_A", "loss_D_B")),
        f"{at_time(steps, values, seconds, limit):.2f}",
    ]


def table(args, families, seconds, curves):
    """Lay out the comparison as lines of Markdown."""
    limit = min(seconds[family] * curves[family][0][-1] for family in families)
    columns = ["", "parameters", "MMACs", "s/step", "steps", "PSNR fake_B / fake_A", "match@1", "cycle A / B"]
    columns += ["loss_G, D_A, D_B (test)", f"{args.measure} at equal time"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for family in families:
        cells = table_row(args, family, seconds[family], curves[family], limit)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@utils.stage
def main(argv=None):
    parser = flags.Parser(prog="compare_generators.py", description=__doc__)
    add = flags.flag_group(parser, "what")
    add("--dataset_name", type=flags.folder_name, default="day2night", help="folder in --data_root")
    add("--data_root", type=Path, default=Path("datasets"), help="folder that holds the data sets")
    add("--num_epochs", type=flags.int_between(1), default=6, help="epochs of each family")
    add("--seed", type=flags.int_between(0, 2**32 - 1), default=0, help="seed of both")
    add("--measure", choices=("PSNR", "cycle"), default="PSNR", help="what the curves show; cycle for unpaired sets")
    args = parser.parse_args(argv)
    families = {family: train_or_resume(args, family) for family in FAMILIES}
    seconds = seconds_per_step(families)
    curves = {family: curve(family, args.measure) for family in families}
    folder = IMAGES / f"compare_{args.dataset_name}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = table(args, families, seconds, curves)
    write_text(folder / "compare.md", "\n".join(lines) + "\n")
    plot(curves, seconds, args.measure, folder / "compare.png")
    draw_rows(args, families, folder / "rows.png")
    for line in lines:
        utils.say(line)
    utils.say(f"written to {folder}/compare.md, compare.png and rows.png")


if __name__ == "__main__":
    main()
