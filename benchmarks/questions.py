"""The images and figures of docs/questions.md: two short runs on the demo set, one with a normalised output layer.

python benchmarks/questions.py

Trains (or resumes) the runs norm_default and norm_output, scores every epoch, and writes docs/norm_output.png,
docs/wrap.png and docs/healthy_losses.png.
"""

import dataclasses
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import DAY2NIGHT

import datasets
import test as test_command
import train
import utils
from models import DIRECTIONS
from toolkit import cli, images, process
from toolkit.checkpoints import IMAGES, RUNS, numbered_checkpoints
from toolkit.files import atomic_write
from toolkit.logs import read_losses
from toolkit.weights import load_generator

FLAGS = f"{DAY2NIGHT} --num_residual 3 --ngf 32 --num_epochs 6 --checkpoint_interval 1"
RUN_NAMES = ("norm_default", "norm_output")
DOCS = Path(__file__).parents[1] / "docs"
WINDOW = 5  # rows of losses.csv in a running mean


def train_or_resume(name):
    """Train a run, or what is left of it. There is no flag for a normalised output layer, so the config is replaced."""
    config_fields = cli.config_fields

    def with_norm(args, kinds):
        fields = config_fields(args, kinds)
        generator = dataclasses.replace(fields["generator"], norm_output=name == "norm_output")
        return fields | {"generator": generator}

    argv = [*FLAGS.split(), "--run_name", name]
    if (RUNS / name / "latest.pt").is_file():
        argv = ["--run_name", name, "--start_from", "latest"]
    with mock.patch.object(cli, "config_fields", with_norm):
        train.main(argv)


def psnr_by_epoch(name):
    """PSNR of fake_B and fake_A on the test pairs after every epoch."""
    rows = []
    for epoch in numbered_checkpoints(RUNS / name):
        output = IMAGES / name / f"test_{epoch}"
        argv = ["--run_name", name, "--epoch", str(epoch), "--metrics", "paired", "--output", str(output)]
        scores = test_command.main(argv)
        rows.append([scores[str(direction)]["paired"]["model"]["PSNR"] for direction in DIRECTIONS])
    return rows


def first_images(domain, count=4):
    """The first test images of the demo set: (count, 3, 64, 64) in [-1, 1]."""
    found = datasets.named_images(Path("datasets/day2night") / f"test{domain}", images.ImageReader((64, 64)))
    return torch.cat(list(found.values())[:count])


@torch.no_grad()
def translated(run_name, direction, reals):
    """Translations of a run's generator: (N, 3, 64, 64) in [-1, 1]."""
    return load_generator(RUNS / run_name / f"{direction.generator}.safetensors")[0](reals)


def wrapped(x):
    """What an image writer makes of raw tanh output: it multiplies by 255 and keeps the lowest 8 bits."""
    byte = (x * 255).to(torch.int16) % 256
    return images.bytes_to_range(byte)


def running_mean(values):
    return np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")


def draw_norms():
    """Rows of translations of both runs after the same number of steps."""
    rows = []
    for direction in DIRECTIONS:
        reals = first_images(direction.source)
        rows.append((f"real_{direction.source}", reals))
        rows += [(name, translated(name, direction, reals)) for name in RUN_NAMES]
    images.save_image(images.draw_grid(rows), DOCS / "norm_output.png")


def draw_wrap():
    """Rows of one run: its translations, and the same numbers written without rescaling to [0, 255]."""
    reals = first_images("B")
    fakes = translated("norm_default", DIRECTIONS[1], reals)
    rows = [("real_B", reals), ("fake_A", fakes), ("unscaled", wrapped(fakes)), ("and real_B", wrapped(reals))]
    images.save_image(images.draw_grid(rows), DOCS / "wrap.png")


def draw_losses():
    """Discriminator losses, adversarial and cycle terms of both runs over the steps."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = {"loss_D": ("loss_D_A", "loss_D_B"), "gan": ("gan_AB", "gan_BA"), "cycle": ("cycle_A", "cycle_B")}
    for axes, (title, columns) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in RUN_NAMES:
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
    for name in RUN_NAMES:
        train_or_resume(name)
    scores = [psnr_by_epoch(name) for name in RUN_NAMES]
    utils.say("epoch  " + "  ".join(f"{name}: fake_B fake_A" for name in RUN_NAMES))
    for epoch, pairs in enumerate(zip(*scores, strict=True), 1):
        utils.say(f"{epoch:5}  " + "  ".join(f"{b:18.2f} {a:6.2f}" for b, a in pairs))
    draw_norms()
    draw_wrap()
    draw_losses()
    utils.say(f"written to {DOCS}: norm_output.png, wrap.png, healthy_losses.png")


if __name__ == "__main__":
    main()
