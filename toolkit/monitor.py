"""What a run shows while it learns: grids, watched photos, a page; with the numbers of `logs`.

monitor = Monitor(saved, images, (run_name, dataset_name), samples, photos, cyclegan_rows, loss_names(config))
monitor.open(step=0, with_tensorboard=False)
attempt(monitor.draw, model, epoch, step, True)
"""

import csv
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cyclegan import CycleGAN, translate
from datasets import held_out_split
from models import Nets
from toolkit.distributed import average, first_rank, rank
from toolkit.files import atomic_write, attempt, write_page, write_text
from toolkit.images import (
    UnreadableImage,
    data_address,
    draw_grid,
    image_to_tensor,
    list_images,
    load_images,
    read_image,
    save_image,
)
from toolkit.metrics import format_table
from utils import InputError, counted, domain_names, one_line, say, warn

MOST_STEPS = 2**53  # no run has so many; a larger number is damage, and floats cannot hold it


class Meter:
    """Running sums of named losses; they stay on the device until somebody looks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # of each name: a resumed run may compute other losses
        self.count = 0
        self.recent: list[dict[str, Tensor]] = []  # what was added; not saved, since what was saved was finite

    def add(self, values: dict[str, Tensor]) -> None:
        self.count += 1
        self.recent.append({name: value.detach() for name, value in values.items()})
        for name, value in self.recent[-1].items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def first_not_finite(self) -> tuple[list[str], int]:
        """Name the values that were the first not to be finite, and how many additions ago."""
        for ago, values in reversed(list(enumerate(reversed(self.recent)))):
            names = [name for name, value in values.items() if not torch.isfinite(value)]
            if names:
                return names, ago
        return [], 0

    def means(self) -> dict[str, float]:
        """Read the means, over all ranks; waits for the device."""
        sums = {name: value.detach().clone() for name, value in self.sums.items()}
        average(list(sums.values()))
        return {name: value.item() / max(1, self.counts[name]) for name, value in sums.items()}

    def state_dict(self) -> dict:
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return {"sums": sums, "count": self.count, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Put back a state; one without "counts" is of a time when all names had the same.

        raises: ValueError for counts that no meter has
        """
        counts = dict(state.get("counts", dict.fromkeys(state["sums"], state["count"])))
        whole = all(type(count) is int and count >= 0 for count in (state["count"], *counts.values()))
        if counts.keys() != state["sums"].keys() or not whole:
            raise ValueError(f"count {state['count']}, counts {counts}: expected a whole number for each sum")
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.counts = counts
        self.count = state["count"]


class LossLog:
    """A table of numbers, losses.csv or measures.csv: its rows are kept here, `save` writes the whole file.

    columns:   the first ones of the file; those of old and of new rows that are not among them follow
    last_step: rows of an existing file up to this step are kept, for a run that goes on from there; 0: a new one
    """

    def __init__(self, path: Path, columns: Sequence[str], last_step: int):
        self.path = path
        self.columns = list(columns)
        self.rows: list[dict] = []
        if last_step and rank() == 0:
            self._read_old(last_step)

    def _read_old(self, last_step: int) -> None:
        """Take the rows of an existing file, as far as it can be read; what is left out is said."""
        try:
            rows, damaged = parse_rows(self.path)
        except FileNotFoundError:
            return
        except OSError as error:
            warn(f"{self.path}: cannot be read ({error.strerror or error}), so its rows are left out")
            return
        if damaged:
            warn(
                f"{self.path}: line {damaged} is damaged: kept {counted(len(rows), 'row')} before it, left out the rest"
            )
        for row in rows:
            if row["step"] <= last_step:
                self.append(row)

    def append(self, row: dict) -> None:
        """Add a row, in memory; those of its step and later ones, of a run that was cut back, make room."""
        while self.rows and self.rows[-1]["step"] >= row["step"]:
            self.rows.pop()
        self.columns = list(dict.fromkeys([*self.columns, *row]))
        row = {name: row[name] for name in self.columns if name in row}
        self.rows.append({k: float(number(v)) if isinstance(v, float) else v for k, v in row.items()})  # as read back

    def save(self) -> None:
        """Write all rows, whole or not at all; raises OSError if that is impossible."""
        lines = [",".join(self.columns)]
        for row in self.rows:
            lines.append(",".join(number(row.get(name, math.nan)) for name in self.columns))  # nan: not computed
        write_text(self.path, "".join(f"{line}\n" for line in lines))


def number(value: float) -> str:
    """Write a number as it stands in a table; read and written again it stays the same."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def parse_rows(path: Path) -> tuple[list[dict], int]:
    """Read a file of LossLog: epoch and step whole, the rest as numbers.

    returns: the rows before the first line that is damaged, or torn by a crash; that line's number, or 0
    raises:  OSError if there is no file that can be read
    """
    rows = []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        try:
            names = reader.fieldnames or []
            if not {"epoch", "step"} <= set(names) or not all(re.fullmatch(r"[A-Za-z0-9_@]+", name) for name in names):
                return [], 1  # not written by us
            last_step = -1
            for row in reader:
                numbers: Any = {k: int(v) if k in ("epoch", "step") else float(v) for k, v in row.items()}
                step = numbers["step"]
                if not (last_step < step < MOST_STEPS and 0 <= numbers["epoch"] < MOST_STEPS):
                    raise ValueError("steps rise, and no run has so many")
                last_step = step
                rows.append(numbers)
        except (csv.Error, TypeError, ValueError):
            return rows, max(1, reader.line_num)
    return rows, 0


def read_losses(path: Path) -> list[dict]:
    """Read losses.csv or measures.csv, up to a line that is damaged; raises OSError if there is no such file."""
    return parse_rows(path)[0]


@first_rank
def plot_losses(rows: Sequence[dict], path: Path) -> None:
    """Draw a panel per loss and one with all its terms over steps: raw values pale, their running mean strong."""
    from matplotlib.figure import Figure  # takes half a second, which nobody waits for who plots nothing

    if not rows:
        return
    columns = dict.fromkeys(name for row in rows for name in row if name not in ("epoch", "step", "lr"))
    panels = [[name] for name in columns if name.startswith("loss_")]
    panels.append([name for name in columns if not name.startswith("loss_")])
    figure = Figure(figsize=(12, 7), layout="constrained")
    steps = [row["step"] for row in rows]
    marker = "o" if len(rows) == 1 else None  # a line of one point is nothing
    window = np.ones(max(1, len(rows) // 25))
    for axes, names in zip(figure.subplots(2, 2).flat, panels, strict=False):
        for name in names:
            values = np.array([row.get(name, math.nan) for row in rows])
            known = np.isfinite(values)
            if known.any():
                sums = np.convolve(np.where(known, values, 0), window)[: len(values)]
                counts = np.convolve(known, window)[: len(values)].clip(1)
                (line,) = axes.plot(steps, sums / counts, label=name, linewidth=1.5, marker=marker)
                axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.7)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
        if axes.lines:
            # above the curves, where it hides none of them
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize="small", frameon=False, ncols=4)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


class Board:
    """TensorBoard's log of a run, if there is to be one; what goes wrong is said once, for no logger ends a run."""

    def __init__(self, folder: Path | None = None, step: int = 0):
        self.writer: Any = None
        self.warned = False
        if folder and rank() == 0:
            self._safely(self._open, folder, step)

    def _open(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def _safely(self, write: Callable, *args: object) -> None:
        try:
            write(*args)
        except Exception as error:  # noqa: BLE001 (of a disk, a broken package, a dead thread of the writer)
            if not self.warned:
                warn(f"TensorBoard's log has gaps ({type(error).__name__}: {error}); the run goes on")
            self.warned = True

    def add(self, step: int, values: dict[str, float], images: dict[str, Image.Image] | None = None) -> None:
        """Log numbers (those that are finite) and images by name."""
        if self.writer:
            self._safely(self._write, step, values, images or {})

    def _write(self, step: int, values: dict[str, float], images: dict[str, Image.Image]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self.writer.add_scalar(name, value, step)
        for name, image in images.items():
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self._safely(self.writer.close)


COLUMNS = 6  # images in a sample grid
COLLAPSED_FRACTION = 0.02  # outputs that differ less than this times the inputs do not depend on them
MOMENTS = 8  # of a watched photo in the page, from the first epoch to the newest
PAGE_SIDE = 900  # px; larger images are reduced in the page and open at full size
MEASURES_SHOWN = 12  # rows of measures.csv in the page
FIRST_GRID = 60  # s after the start
FIRST_PACE = 30  # s of steps, after which it is said how long the run will take
SHOW_SECONDS = 30  # at least, between two drawings of the page
SHOW_FRACTION = 0.02  # of the time that a run may spend on them
LONG_EPOCH = 3600  # s; on a CPU it is worth a word
SMALLER = {"img_height": 64, "img_width": 64, "batch_size": 1}  # what a CPU trains in an evening: docs/recipes.md
NARROWER = {"num_residual": 6, "ngf": 32, "ndf": 32, "n_layers_D": 2}  # the same, in networks that start new

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
# How long it takes, and how it goes on


class Clock:
    """The pace of a run, and what is due. Time is that of the wall, in s."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.first = math.nan  # when the first step ended, which is slower than the others
        self.last = math.nan  # when the newest one ended
        self.steps = 0
        self.said = False
        self.grids = 0  # drawn since
        self.left: dict[Path, int] = {}  # those of a branch that the run leaves, with their times
        self.next_page = -math.inf

    @property
    def pace(self) -> float:
        """Seconds a step, with all that happens between two: saving, evaluating. nan until there were two steps."""
        return (self.last - self.first) / (self.steps - 1) if self.steps > 1 else math.nan

    def tick(self) -> bool:
        """Count a step that has ended; returns True once, when the pace is known well enough to be said."""
        self.last = time.monotonic()
        self.steps += 1
        if self.steps == 1:
            self.first = self.last
        due = not self.said and self.last - self.first >= FIRST_PACE
        self.said = self.said or due
        return due

    def first_grid_due(self) -> bool:
        return not self.grids and time.monotonic() - self.begun >= FIRST_GRID

    def page_due(self) -> bool:
        return time.monotonic() >= self.next_page


def duration(seconds: float) -> str:
    """A time to be read: 0.13 s, 206 s, 45 minutes, 69 hours, 5 days."""
    units = (("s", 1, 600), ("minutes", 60, 7200), ("hours", 3600, 4 * 86400), ("days", 86400, math.inf))
    unit, length, _ = next(unit for unit in units if seconds < unit[2])
    number = seconds / length
    return f"{number:.2g} {unit}" if number < 10 else f"{number:.0f} {unit}"


@first_rank
def say_duration(pace: float, left: int, steps_per_epoch: int, flags: dict, device: torch.device) -> None:
    """Say how long a run will take; on a CPU also what would be faster, if that is long.

    pace:  seconds a step
    left:  steps
    flags: of the run, as plain values
    """
    epoch = pace * steps_per_epoch
    say(f"{duration(pace)} a step, {duration(epoch)} an epoch: this run will take about {duration(pace * left)} more")
    if device.type == "cpu" and epoch > LONG_EPOCH:
        anew = "start again with --overwrite and" if flags.get("start_from") == "0" else "go on with"
        words = f"an epoch takes {duration(epoch)} on this CPU; {anew} flags that fit it"
        warn(f"{words} (docs/recipes.md): {faster_flags(pace, flags)}")


def faster_flags(pace: float, flags: dict) -> str:
    """The flags that fit a CPU, of those that a run can still get and that would make it faster."""
    fitting = dict(SMALLER)
    if flags.get("start_from") == "0" and not flags.get("init_from"):
        fitting |= NARROWER
    if flags.get("generator") == "unet_vit":
        fitting = {name: value for name, value in fitting.items() if name not in ("num_residual", "ngf")}
    faster = [f"--{name} {value}" for name, value in fitting.items() if flags.get(name, 0) > value]
    faster = faster or [f"--steps_per_epoch {max(1, int(LONG_EPOCH / pace / 6))}"]  # ten minutes
    return " ".join(faster)


def command_line(stage: str, *words: str) -> str:
    """A command line of a stage that works in the folder where this one was typed, whatever its words hold."""
    script = Path(__file__).resolve().parents[1] / stage
    here = Path.cwd()
    return shlex.join(["python", str(script.relative_to(here) if script.is_relative_to(here) else script), *words])


# ---------------------------------------------------------------------------------------------
# The page, which opens from disk


def legend(domains: tuple[str, str], taught: Sequence[str]) -> list[tuple[str, str]]:
    """What the rows of a grid are: their labels, each with its words; taught: generators that have a teacher."""
    lines = []
    for (source, target), name in zip(("AB", "BA"), domains, strict=True):
        into = domains[1] if source == "A" else domains[0]
        lines.append((f"real_{source}", f"{name}: images that are not learnt from, where the data set has such"))
        lines.append((f"fake_{target}", f"{into}: what G_{source}{target} makes of real_{source}"))
        if f"{source}{target}" in taught:
            lines.append((f"teacher_{target}", f"{into}: what its teacher makes of real_{source}"))
        lines.append(
            (f"rec_{source}", f"{name}: what G_{target}{source} makes of fake_{target}; ideally real_{source} again")
        )
    return lines


def embedded(folder: Path, path: Path) -> tuple[str, str, str]:
    """For the page: an image's address, its pixels (so that a notebook or a mail shows the page, too), its name."""
    address = quote(os.fsencode(path.relative_to(folder).as_posix()))
    return address, data_address(path, (PAGE_SIDE, 4 * PAGE_SIDE)) or address, one_line(path.stem)


def sample_grids(folder: Path) -> list[Path]:
    """The grids epoch_NNNN.png of a folder, oldest first."""
    found = [path for path in folder.glob("epoch_*.png") if path.stem[6:].isdecimal()]
    return sorted(found, key=epoch_of)


def epoch_of(grid: Path) -> int:
    """The number in the name of a grid."""
    return int(grid.stem[6:])


def evenly(paths: Sequence[Path], most: int) -> list[Path]:
    """At most so many of some paths, the first and the last among them."""
    count = min(most, len(paths))
    return [paths[round(k * (len(paths) - 1) / max(1, count - 1))] for k in range(count)]


@first_rank
def write_progress(
    folder: Path,
    title: str,
    facts: str,
    fraction: float,
    table: Sequence[str],
    domains: tuple[str, str] = ("A", "B"),
    taught: Sequence[str] = (),
    left: Collection[Path] = (),
) -> None:
    """Write index.html of a run: how far it is, curves, newest grids, and how the watched photos changed.

    fraction: of the steps that are done, in [0, 1]; below 1 the page loads itself anew every 15 s
    table:    lines of measures
    domains:  the names of A and B
    taught:   "AB", "BA": which generators are students
    left:     grids that are not shown
    """
    grids = [path for path in sample_grids(folder)[::-1] if path not in left]
    gallery = folder / "test" / "index.html"
    tested = gallery.is_file() and bool(grids) and gallery.stat().st_mtime >= grids[-1].stat().st_mtime
    newest = [path for path in (*grids[:1], folder / "losses.png") if path.is_file()]
    rows = [("earlier", "row", grids[1:4])] if grids[1:] else []
    for photo in sorted((folder / "watch").glob("*")):
        heading = f"{one_line(photo.name)}: the photo; {domains[1]}, made of it by G_AB; {domains[0]}, by G_BA"
        rows.append((heading, "row small", evenly([path for path in sample_grids(photo) if path not in left], MOMENTS)))
    write_page(
        folder / "index.html",
        "progress.html",
        title=one_line(title),
        facts=one_line(facts),
        fraction=fraction,
        table=table,
        domains=domains,
        legend=legend(domains, taught),
        tested=tested,  # and not by an earlier run of this name
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
    names: tuple[str, str]  # of the run and of its data set
    samples: tuple[Tensor, Tensor]  # what the grids show, of load_samples
    photos: dict[str, Tensor]  # watched ones by name, of load_watched
    draw_rows: Callable[[CycleGAN, Tensor, Tensor], Rows]  # of a grid, from a model and the samples
    term_names: Sequence[str]  # columns of losses.csv after epoch, step and lr
    log: Any = None  # losses.csv; this and the next from `open` on
    measures: Any = None  # measures.csv
    meter: Meter = field(default_factory=Meter)  # of the losses since the last row
    board: Board = field(default_factory=Board)
    clock: Clock = field(default_factory=Clock)  # begun anew by `open`

    def open(self, step: int, with_tensorboard: bool, epochs: int = 0) -> None:
        """Begin the logs, or go on with them after `step`; rows of later steps are cut off, later grids not shown.

        epochs: begun ones
        """
        self.clock = Clock()
        grids = [path for folder in (self.images, *self.images.glob("watch/*")) for path in sample_grids(folder)]
        self.clock.left = {path: path.stat().st_mtime_ns for path in grids if epoch_of(path) > epochs}
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
    def lacks_measures(self, step: int) -> bool:
        """Whether measures.csv, as it stands before `open`, has no row of a step."""
        try:
            return step not in [row["step"] for row in read_losses(self.saved / "measures.csv")]
        except FileNotFoundError:
            return True
        except OSError:
            return False  # `open` says that it cannot be read

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
        self.clock.grids += 1
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
        if self.clock.grids == 1:
            self.clock.next_page = -math.inf  # the page shows it at once

    @first_rank
    def show(
        self, epoch: int, step: int, step_in_epoch: int, num_epochs: int, steps_per_epoch: int, stopped: bool = False
    ) -> None:
        """Write losses.csv, losses.png and the page (raises OSError if the disk is full); epoch: finished ones."""
        begun = time.monotonic()
        self.clock.next_page = begun + SHOW_SECONDS  # also where the disk takes no page
        attempt(self.log.save)
        plot_losses(self.log.rows, self.images / "losses.png")
        facts = f"{epoch} of {counted(num_epochs, 'epoch')}"
        if step_in_epoch:
            facts += f" and {counted(step_in_epoch, 'step')} of the next"
        facts += f"; step {step:,}"
        left = (num_epochs - epoch) * steps_per_epoch - step_in_epoch
        if stopped:
            facts += "; stopped, goes on with --start_from latest"
        elif left and math.isfinite(self.clock.pace):
            facts += f"; about {duration(left * self.clock.pace)} left"
        facts += f"; written {time.strftime('%H:%M:%S')}"
        fraction = min(1.0, epoch / num_epochs + step_in_epoch / (num_epochs * steps_per_epoch))
        measures = {}
        for row in self.measures.rows[-MEASURES_SHOWN:]:
            measures[f"epoch {row['epoch']}"] = {k: v for k, v in row.items() if k not in ("epoch", "step")}
        table = format_table(measures) if measures else []
        run_name, dataset_name = self.names
        domains = domain_names(dataset_name)
        title = f"{run_name}: {domains[0]} ↔ {domains[1]}"
        taught = [term.removeprefix("output_") for term in self.term_names if term.startswith("output_")]
        left = {path for path, when in self.clock.left.items() if path.is_file() and path.stat().st_mtime_ns == when}
        write_progress(self.images, title, facts, fraction, table, domains, taught, left)
        self.clock.next_page = begun + max(SHOW_SECONDS, (time.monotonic() - begun) / SHOW_FRACTION)

    def close(self) -> None:
        """End the log of TensorBoard."""
        self.board.close()
