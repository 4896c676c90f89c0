"""What a run shows while it learns: grids, watched photos, a page; with the numbers of `logs`.

monitor = Monitor(saved, images, title, samples, photos, cyclegan_rows, loss_names(config))
monitor.open(step=0, with_tensorboard=False)
attempt(monitor.draw, model, epoch, step, True)
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from cyclegan import CycleGAN, translate
from datasets import held_out_split
from files import attempt, write_page
from images import (
    UnreadableImage,
    data_address,
    draw_grid,
    image_to_tensor,
    list_images,
    load_images,
    read_image,
    save_image,
)
from logs import Board, LossLog, Meter, plot_losses
from metrics import format_table
from models import Nets
from utils import InputError, first_rank, one_line, say, warn

COLUMNS = 6  # images in a sample grid
COLLAPSED_FRACTION = 0.02  # outputs that differ less than this times the inputs do not depend on them
MOMENTS = 8  # of a watched photo in the page, from the first epoch to the newest
PAGE_SIDE = 900  # px; larger images are reduced in the page and open at full size
MEASURES_SHOWN = 12  # rows of measures.csv in the page

Rows = Sequence[tuple[str, Tensor]]  # of a grid: labels and images (N, C, H, W) in [-1, 1]


# ---------------------------------------------------------------------------------------------
# Grids and watched photos


def load_samples(dataset: Path, size: tuple[int, int], channels: int, on_bad: str) -> tuple[Tensor, Tensor]:
    """Read the fixed images that every grid shows: spread over the test (else val, else train) split.

    returns: images of A and as many of B, (N, channels, *size) in [-1, 1]
    """
    split = held_out_split(dataset)
    if split == "train":
        say(f"{dataset}: no testA and testB with images, so the grids show training images")
    samples = []
    for domain in "AB":
        folder = dataset / f"{split}{domain}"
        paths = list_images(folder)
        chosen = paths[:: max(1, len(paths) // COLUMNS)][:COLUMNS]
        samples.append(torch.stack([image for _, image in load_images(folder, chosen, size, channels, on_bad)]))
    columns = min(map(len, samples))
    return samples[0][:columns], samples[1][:columns]


def load_watched(
    paths: Sequence[Path], size: tuple[int, int], channels: int, resumed: bool = False
) -> dict[str, Tensor]:
    """Read the photos to follow, each with its own shape: its shorter side as long as that of the training images.

    size:    (height, width) of the training images
    resumed: a photo that is gone or unreadable by now is left out
    returns: (1, channels, H, W) in [-1, 1] by name
    raises:  InputError for a photo that cannot be read when a run starts
    """
    named = {}
    for path in paths:
        name = path.stem if path.stem.strip(".") else "photo"
        while name in named:
            name += "_"
        named[name] = path
    photos = {}
    shorter = min(size)
    for name, path in named.items():
        try:
            photo = read_image(path, channels)
        except UnreadableImage as error:
            words = f"--watch {path}: not a readable image ({error})"
            if not resumed:
                raise InputError(f"{words}; expected photos, such as PNG or JPEG") from None
            warn(f"{words}; the run goes on without it")
            continue
        scale = shorter / min(photo.size)
        photo = photo.resize([min(4 * shorter, max(shorter, round(side * scale))) for side in photo.size])
        photos[name] = image_to_tensor(photo)[None]
    return photos


def cyclegan_rows(model: CycleGAN, real_A: Tensor, real_B: Tensor) -> Rows:
    """The labelled rows of a sample grid: images, translations, round trips."""
    fake_B = model.translate("G_AB", real_A)
    fake_A = model.translate("G_BA", real_B)
    rec_A = model.translate("G_BA", fake_B)
    rec_B = model.translate("G_AB", fake_A)
    rows = {"real_A": real_A, "fake_B": fake_B, "rec_A": rec_A, "real_B": real_B, "fake_A": fake_A, "rec_B": rec_B}
    return list(rows.items())


def distillation_rows(model: CycleGAN, real_A: Tensor, real_B: Tensor, teachers: Nets) -> Rows:
    """The rows of a CycleGAN grid, and under each student's images those of its teacher."""
    reals = {"A": real_A, "B": real_B}
    rows = []
    for label, row in cyclegan_rows(model, real_A, real_B):
        rows.append((label, row))
        for name, teacher in teachers.items():
            if label == f"fake_{name[3]}":
                taught = translate(teacher, reals[name[2]], model.precision)
                rows.append((f"teacher_{name[3]}", taught))
    return rows


def warn_if_collapsed(rows: Rows) -> None:
    """Say so when a generator gives (nearly) the same image whatever it is shown; a single image tells nothing."""
    spread = {label: images.float().std(0, correction=0).mean() for label, images in dict(rows).items()}
    pairs = {"G_AB": ("real_A", "fake_B"), "G_BA": ("real_B", "fake_A")}
    collapsed = [name for name, (real, fake) in pairs.items() if spread[fake] < COLLAPSED_FRACTION * spread[real]]
    if collapsed:
        words = "draws the same image whatever it is shown"
        remedy = "go on from an earlier epoch, with --start_from N, at a lower --lr"
        warn(f"{', '.join(collapsed)}: {words}; {remedy}")


# ---------------------------------------------------------------------------------------------
# The page, which opens from disk


def embedded(folder: Path, path: Path) -> tuple[str, str, str]:
    """For the page: an image's address, its pixels (so that a notebook or a mail shows the page, too), its name."""
    address = quote(os.fsencode(path.relative_to(folder).as_posix()))
    return address, data_address(path, (PAGE_SIDE, 4 * PAGE_SIDE)) or address, one_line(path.stem)


def sample_grids(folder: Path) -> list[Path]:
    """The grids epoch_NNNN.png of a folder, oldest first."""
    found = [path for path in folder.glob("epoch_*.png") if path.stem[6:].isdecimal()]
    return sorted(found, key=lambda path: int(path.stem[6:]))


def evenly(paths: Sequence[Path], most: int) -> list[Path]:
    """At most so many of some paths, the first and the last among them."""
    count = min(most, len(paths))
    return [paths[round(k * (len(paths) - 1) / max(1, count - 1))] for k in range(count)]


@first_rank
def write_progress(folder: Path, title: str, facts: str, fraction: float, table: Sequence[str]) -> None:
    """Write index.html of a run: how far it is, curves, newest grids, and how the watched photos changed.

    fraction: of the steps that are done, in [0, 1]; below 1 the page loads itself anew every 15 s
    table:    lines of measures
    """
    grids = sample_grids(folder)[::-1]
    newest = [path for path in (*grids[:1], folder / "losses.png") if path.is_file()]
    rows = [("earlier", "row", grids[1:4])] if grids[1:] else []
    for photo in sorted((folder / "watch").glob("*")):
        rows.append((one_line(photo.name), "row small", evenly(sample_grids(photo), MOMENTS)))
    write_page(
        folder / "index.html",
        "progress.html",
        title=one_line(title),
        facts=one_line(facts),
        fraction=fraction,
        table=table,
        tested=(folder / "test" / "index.html").is_file(),
        newest=[embedded(folder, path) for path in newest],
        rows=[(heading, kind, [embedded(folder, path) for path in paths]) for heading, kind, paths in rows],
    )


# ---------------------------------------------------------------------------------------------
# All of it


@dataclass
class Monitor:
    """What a run shows while it learns."""

    saved: Path  # folder of losses.csv, measures.csv and tensorboard/
    images: Path  # folder of index.html, losses.png, the grids and watch/
    title: str  # of the page
    samples: tuple[Tensor, Tensor]  # what the grids show, of load_samples
    photos: dict[str, Tensor]  # watched ones by name, of load_watched
    draw_rows: Callable[[CycleGAN, Tensor, Tensor], Rows]  # of a grid, from a model and the samples
    term_names: Sequence[str]  # columns of losses.csv after epoch, step and lr
    log: Any = None  # losses.csv; this and the next from `open` on
    measures: Any = None  # measures.csv
    meter: Meter = field(default_factory=Meter)  # of the losses since the last row
    board: Board = field(default_factory=Board)
    shown_at: float = -math.inf  # when the loop last called `show`, s

    def open(self, step: int, with_tensorboard: bool) -> None:
        """Begin the logs, or go on with them after `step`; rows of later steps are cut off."""
        self.log = LossLog(self.saved / "losses.csv", ["epoch", "step", "lr", *self.term_names], step)
        self.measures = LossLog(self.saved / "measures.csv", ["epoch", "step"], step)
        self.board = Board(self.saved / "tensorboard" if with_tensorboard else None, step)
        attempt(self.log.save)
        if self.measures.path.exists():
            attempt(self.measures.save)

    def log_losses(self, epoch: int, step: int, lr: float, means: dict[str, float]) -> None:
        """Add a row of losses and begin new means; epoch: the one that these steps belong to, from 1."""
        self.log.append({"epoch": epoch, "step": step, "lr": lr, **means})
        self.board.add(step, {"lr": lr, **{f"losses/{name}": value for name, value in means.items()}})
        self.meter = Meter()

    @first_rank
    def add_measures(self, epoch: int, step: int, row: dict[str, float]) -> None:
        """Add a row to measures.csv and say it; epoch: finished ones."""
        self.board.add(step, {f"measures/{name}": value for name, value in row.items()})
        self.measures.append({"epoch": epoch, "step": step, **row})
        attempt(self.measures.save)
        say("  ".join([f"epoch {epoch}:", *(f"{name} {value:.4g}" for name, value in row.items())]))

    @first_rank
    def draw(self, model: CycleGAN, epoch: int, step: int, finished: bool) -> None:
        """Draw the samples and the watched photos; raises OSError if the disk does not take them.

        epoch:    finished ones
        finished: the last of them just now; otherwise the grid is that of the epoch under way
        """
        file = f"epoch_{epoch if finished else epoch + 1:04d}.png"
        rows = self.draw_rows(model, *self.samples)
        if finished:
            warn_if_collapsed(rows)
        grids = {"grid": draw_grid(rows)}
        save_image(grids["grid"], self.images / file)
        for name, photo in self.photos.items():
            outputs = [(net, model.translate(net, photo)) for net in ("G_AB", "G_BA")]
            grids[f"watch/{name}"] = draw_grid([("photo", photo), *outputs])
            save_image(grids[f"watch/{name}"], self.images / "watch" / name / file)
        self.board.add(step, {}, grids)

    @first_rank
    def show(self, epoch: int, step: int, step_in_epoch: int, num_epochs: int, steps_per_epoch: int) -> None:
        """Write losses.csv, losses.png and the page (raises OSError if the disk is full); epoch: finished ones."""
        attempt(self.log.save)
        plot_losses(self.log.rows, self.images / "losses.png")
        facts = f"{epoch} of {num_epochs} epochs"
        if step_in_epoch:
            facts += f" and {step_in_epoch} steps of the next"
        facts += f"; step {step:,}; written {time.strftime('%H:%M:%S')}"
        fraction = min(1.0, epoch / num_epochs + step_in_epoch / (num_epochs * steps_per_epoch))
        measures = {}
        for row in self.measures.rows[-MEASURES_SHOWN:]:
            measures[f"epoch {row['epoch']}"] = {k: v for k, v in row.items() if k not in ("epoch", "step")}
        table = format_table(measures) if measures else []
        write_progress(self.images, self.title, facts, fraction, table)

    def close(self) -> None:
        """End the log of TensorBoard."""
        self.board.close()
