"""The pictures and figures of docs/questions.md, from two short runs on the demo set that differ in --norm_output alone.

python benchmarks/questions.py

Trains the runs norm_default and norm_output (goes on with what is there), scores every epoch, and writes
docs/norm_output.png, docs/wrap.png and docs/healthy_losses.png.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import test as test_stage
import train
import utils
import weights

RECIPE = ["--dataset_name", "day2night", "--img_height", "64", "--img_width", "64", "--num_residual", "3"]
RECIPE += ["--ngf", "32", "--ndf", "32", "--n_layers_D", "2", "--batch_size", "1", "--load_scale", "1", "--no-flip"]
RECIPE += ["--num_epochs", "6", "--checkpoint_interval", "1"]
RUNS = {"norm_default": [], "norm_output": ["--norm_output"]}
DOCS = Path(__file__).parents[1] / "docs"
WINDOW = 5  # rows of losses.csv in a running mean


def train_or_resume(name, flags):
    """Train one run, or what is left of it."""
    done = (Path("saved_models") / name / "latest.pt").is_file()
    train.main(["--run_name", name, "--start_from", "latest"] if done else [*RECIPE, *flags, "--run_name", name])


def psnr_by_epoch(name):
    """PSNR of fake_B and fake_A on the test pairs after every epoch."""
    rows = []
    for epoch in utils.numbered_checkpoints(Path("saved_models") / name):
        output = Path("generated_images") / name / f"test_{epoch}"
        argv = ["--run_name", name, "--epoch", str(epoch), "--metrics", "paired", "--output", str(output)]
        scores = test_stage.main(argv)
        rows.append([scores[direction]["paired"]["model"]["PSNR"] for direction in ("AtoB", "BtoA")])
    return rows


def first_pictures(domain, count=4):
    """The first test pictures of the demo set: (count, 3, 64, 64) in [-1, 1]."""
    pictures = datasets.named_pictures(Path("datasets/day2night") / f"test{domain}", (64, 64), 3)
    return torch.cat(list(pictures.values())[:count])


@torch.no_grad()
def answers(name, net, pictures):
    """What a run's generator makes of pictures: (N, 3, 64, 64) in [-1, 1]."""
    return weights.load_generator(Path("saved_models") / name / f"{net}.safetensors")[0](pictures)


def wrapped(pictures):
    """What a picture writer does to raw tanh output: times 255, and the fraction and all but the lowest 8 bits dropped."""
    byte = (pictures * 255).to(torch.int16) % 256
    return utils.bytes_to_range(byte)


def running_mean(values):
    return np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")


def draw_norms():
    """Rows of both runs: what they translate after the same steps."""
    rows = []
    for source, target in ("AB", "BA"):
        reals = first_pictures(source)
        rows.append((f"real_{source}", reals))
        rows += [(name, answers(name, f"G_{source}{target}", reals)) for name in RUNS]
    utils.save_picture(utils.draw_grid(rows), DOCS / "norm_output.png")


def draw_wrap():
    """Rows of one run: its pictures, and the same numbers without the way back to [0, 255]."""
    reals = first_pictures("B")
    fakes = answers("norm_default", "G_BA", reals)
    rows = [("real_B", reals), ("fake_A", fakes), ("unscaled", wrapped(fakes)), ("and real_B", wrapped(reals))]
    utils.save_picture(utils.draw_grid(rows), DOCS / "wrap.png")


def draw_losses():
    """Loss of the discriminators, adversarial and cycle terms of both runs over steps."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = {"loss_D": ("loss_D_A", "loss_D_B"), "gan": ("gan_AB", "gan_BA"), "cycle": ("cycle_A", "cycle_B")}
    for axes, (title, columns) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in RUNS:
            rows = utils.read_losses(Path("saved_models") / name / "losses.csv")
            values = running_mean([sum(row[column] for column in columns) / 2 for row in rows])
            axes.plot([row["step"] for row in rows][WINDOW - 1 :], values, label=name)
        if title != "cycle":
            axes.axhline(0.25, color="grey", linewidth=0.8, linestyle="--")
        axes.set_title(f"{title}, mean of both")
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    with utils.atomic_write(DOCS / "healthy_losses.png") as temporary:
        figure.savefig(temporary, dpi=90, format="png")


@utils.stage
def main(argv=None):
    utils.Parser(prog="questions.py", description=__doc__).parse_args(argv)
    for name, flags in RUNS.items():
        train_or_resume(name, flags)
    scores = {name: psnr_by_epoch(name) for name in RUNS}
    utils.say("epoch  " + "  ".join(f"{name}: fake_B fake_A" for name in RUNS))
    for epoch, pairs in enumerate(zip(*scores.values(), strict=True), 1):
        utils.say(f"{epoch:5}  " + "  ".join(f"{b:18.2f} {a:6.2f}" for b, a in pairs))
    draw_norms()
    draw_wrap()
    draw_losses()
    utils.say(f"written to {DOCS}: norm_output.png, wrap.png, healthy_losses.png")


if __name__ == "__main__":
    main()
