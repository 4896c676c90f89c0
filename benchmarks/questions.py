"""The images and figures of docs/questions.md, from two short runs on the demo set that differ in --norm_output alone.

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
from toolkit import cli, images, process
from toolkit.checkpoints import IMAGES, RUNS, numbered_checkpoints
from toolkit.files import atomic_write
from toolkit.monitor import read_losses
from toolkit.weights import load_generator

RECIPE = ["--dataset_name", "day2night", "--img_height", "64", "--img_width", "64", "--num_residual", "3"]
RECIPE += ["--ngf", "32", "--ndf", "32", "--n_layers_D", "2", "--batch_size", "1", "--load_scale", "1", "--no-flip"]
RECIPE += ["--num_epochs", "6", "--checkpoint_interval", "1"]
VARIANTS = {"norm_default": [], "norm_output": ["--norm_output"]}
DOCS = Path(__file__).parents[1] / "docs"
WINDOW = 5  # rows of losses.csv in a running mean


def train_or_resume(name, words):
    """Train one run, or what is left of it."""
    done = (RUNS / name / "latest.pt").is_file()
    train.main(["--run_name", name, "--start_from", "latest"] if done else [*RECIPE, *words, "--run_name", name])


def psnr_by_epoch(name):
    """PSNR of fake_B and fake_A on the test pairs after every epoch."""
    rows = []
    for epoch in numbered_checkpoints(RUNS / name):
        output = IMAGES / name / f"test_{epoch}"
        argv = ["--run_name", name, "--epoch", str(epoch), "--metrics", "paired", "--output", str(output)]
        scores = test_stage.main(argv)
        rows.append([scores[direction]["paired"]["model"]["PSNR"] for direction in ("AtoB", "BtoA")])
    return rows


def first_images(domain, count=4):
    """The first test images of the demo set: (count, 3, 64, 64) in [-1, 1]."""
    found = datasets.named_images(Path("datasets/day2night") / f"test{domain}", (64, 64), 3)
    return torch.cat(list(found.values())[:count])


@torch.no_grad()
def translated(name, net, reals):
    """What a run's generator makes of images: (N, 3, 64, 64) in [-1, 1]."""
    return load_generator(RUNS / name / f"{net}.safetensors")[0](reals)


def wrapped(x):
    """What an image writer does to raw tanh output: times 255, and the fraction and all but the lowest 8 bits dropped."""
    byte = (x * 255).to(torch.int16) % 256
    return images.bytes_to_range(byte)


def running_mean(values):
    return np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")


def draw_norms():
    """Rows of both runs: what they translate after the same steps."""
    rows = []
    for source, target in ("AB", "BA"):
        reals = first_images(source)
        rows.append((f"real_{source}", reals))
        rows += [(name, translated(name, f"G_{source}{target}", reals)) for name in VARIANTS]
    images.save_image(images.draw_grid(rows), DOCS / "norm_output.png")


def draw_wrap():
    """Rows of one run: its images, and the same numbers without the way back to [0, 255]."""
    reals = first_images("B")
    fakes = translated("norm_default", "G_BA", reals)
    rows = [("real_B", reals), ("fake_A", fakes), ("unscaled", wrapped(fakes)), ("and real_B", wrapped(reals))]
    images.save_image(images.draw_grid(rows), DOCS / "wrap.png")


def draw_losses():
    """Loss of the discriminators, adversarial and cycle terms of both runs over steps."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = {"loss_D": ("loss_D_A", "loss_D_B"), "gan": ("gan_AB", "gan_BA"), "cycle": ("cycle_A", "cycle_B")}
    for axes, (title, columns) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in VARIANTS:
            rows = read_losses(RUNS / name / "losses.csv")
            values = running_mean([sum(row[column] for column in columns) / 2 for row in rows])
            axes.plot([row["step"] for row in rows][WINDOW - 1 :], values, label=name)
        if title != "cycle":
            axes.axhline(0.25, color="grey", linewidth=0.8, linestyle="--")
        axes.set_title(f"{title}, mean of both")
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    with atomic_write(DOCS / "healthy_losses.png") as temporary:
        figure.savefig(temporary, dpi=90, format="png")


@process.command
def main(argv=None):
    cli.Parser(prog="questions.py", description=__doc__).parse_args(argv)
    for name, words in VARIANTS.items():
        train_or_resume(name, words)
    scores = {name: psnr_by_epoch(name) for name in VARIANTS}
    utils.say("epoch  " + "  ".join(f"{name}: fake_B fake_A" for name in VARIANTS))
    for epoch, pairs in enumerate(zip(*scores.values(), strict=True), 1):
        utils.say(f"{epoch:5}  " + "  ".join(f"{b:18.2f} {a:6.2f}" for b, a in pairs))
    draw_norms()
    draw_wrap()
    draw_losses()
    utils.say(f"written to {DOCS}: norm_output.png, wrap.png, healthy_losses.png")


if __name__ == "__main__":
    main()
