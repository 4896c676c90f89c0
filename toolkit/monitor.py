"""Sample grids, watched photos and the live page of a training run, and its logs.

monitor = Monitor(saved, images, (run_name, dataset_name), samples, photos, cyclegan_rows, loss_names(config))
monitor.open(step=0, with_tensorboard=False)
monitor.log_losses(epoch=1, step=20, lr=2e-4, means=monitor.meter.means())
monitor.draw(model, epoch, step, finished=True)
"""

import math
import os
import shlex
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor

from cyclegan import CycleGAN, translate
from datasets import held_out_split
from models import DIRECTIONS, Direction, Networks
from toolkit import files
from toolkit.distributed import first_rank
from toolkit.files import attempt
from toolkit.images import (
    UnreadableImage,
    data_url,
    draw_grid,
    image_to_tensor,
    list_images,
    load_images,
    read_image,
    save_image,
)
from toolkit.logs import CsvLog, Meter, TensorBoardLog, plot_losses, read_losses
from toolkit.metrics import format_table
from utils import InputError, counted, domain_names, one_line, say, warn

Rows = Sequence[tuple[str, Tensor]]  # of a grid: labels and images (N, C, H, W) in [-1, 1]


# ---------------------------------------------------------------------------------------------
# Sample grids and watched photos

GRID_COLUMNS = 6
COLLAPSED_FRACTION = 0.02  # a generator whose outputs vary less than this times its inputs ignores them


def load_samples(dataset: Path, size: tuple[int, int], channels: int, on_bad: str) -> tuple[Tensor, Tensor]:
    """Read the fixed images of all sample grids, evenly spread over the test split (else val, else train).

    returns: images of A and as many of B, (N, channels, *size) in [-1, 1]
    """
    split = held_out_split(dataset)
    if split == "train":
        say(f"{dataset}: testA and testB have no images, so the sample grids show training images")
    samples = []
    for domain in "AB":
        folder = dataset / f"{split}{domain}"
        paths = list_images(folder)
        chosen = paths[:: max(1, len(paths) // GRID_COLUMNS)][:GRID_COLUMNS]
        samples.append(torch.stack([image for _, image in load_images(folder, chosen, size, channels, on_bad)]))
    columns = min(map(len, samples))
    return samples[0][:columns], samples[1][:columns]


def load_watched(
    paths: Sequence[Path], size: tuple[int, int], channels: int, resumed: bool = False
) -> dict[str, Tensor]:
    """Read the photos of --watch, each in its own aspect ratio, with the shorter side of the training images.

    size:    (height, width) of the training images
    resumed: leave out photos that cannot be read, with a warning
    returns: (1, channels, H, W) in [-1, 1] by name
    raises:  InputError for a photo that cannot be read, unless resumed
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
            if not resumed:
                raise InputError(
                    f"--watch {path}: not a readable image ({error}); expected a photo, such as PNG or JPEG"
                ) from None
            warn(f"--watch {path}: not a readable image ({error}); the run continues without it")
            continue
        scale = shorter / min(photo.size)
        photo = photo.resize([min(4 * shorter, max(shorter, round(side * scale))) for side in photo.size])
        photos[name] = image_to_tensor(photo)[None]
    return photos


def cyclegan_rows(model: CycleGAN, real_A: Tensor, real_B: Tensor) -> Rows:
    """Compute the rows of a sample grid: real images, their translations, and the round trips."""
    fake_B = model.translate("G_AB", real_A)
    fake_A = model.translate("G_BA", real_B)
    rec_A = model.translate("G_BA", fake_B)
    rec_B = model.translate("G_AB", fake_A)
    rows_A = [("real_A", real_A), ("fake_B", fake_B), ("rec_A", rec_A)]
    rows_B = [("real_B", real_B), ("fake_A", fake_A), ("rec_B", rec_B)]
    return rows_A + rows_B


def distillation_rows(model: CycleGAN, real_A: Tensor, real_B: Tensor, teachers: Networks) -> Rows:
    """Compute the rows of `cyclegan_rows`, and below each student's translations those of its teacher."""
    reals = {"A": real_A, "B": real_B}
    teacher_rows = {}
    for direction in DIRECTIONS:
        if direction.generator in teachers:
            images = translate(teachers[direction.generator], reals[direction.source], model.precision)
            teacher_rows[f"fake_{direction.target}"] = (f"teacher_{direction.target}", images)
    rows = []
    for label, images in cyclegan_rows(model, real_A, real_B):
        rows.append((label, images))
        if label in teacher_rows:
            rows.append(teacher_rows[label])
    return rows


def warn_if_collapsed(rows: Rows) -> None:
    """Warn when a generator outputs nearly the same image for all inputs. A single sample cannot show it."""
    spread = {label: images.float().std(0, correction=0).mean() for label, images in rows}
    collapsed = []
    for direction in DIRECTIONS:
        if spread[f"fake_{direction.target}"] < COLLAPSED_FRACTION * spread[f"real_{direction.source}"]:
            collapsed.append(direction.generator)
    if collapsed:
        warn(
            f"{', '.join(collapsed)}: nearly the same output for every input; "
            "resume from an earlier epoch, with --start_from N, at a lower --lr"
        )


# ---------------------------------------------------------------------------------------------
# Time

FIRST_GRID = 60  # s after the start
FIRST_PACE = 30  # s of steps, after which the pace is announced
PAGE_SECONDS = 30  # at least, between two updates of the page
PAGE_FRACTION = 0.02  # of the run's time that updates of the page may take
LONG_EPOCH = 3600  # s; for longer ones on a CPU, smaller settings are suggested


class Clock:
    """The pace of a run in wall time, in s, and what is due."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.first_step_end = math.nan  # the first step is slower than the others
        self.last_step_end = math.nan
        self.steps = 0
        self.grids = 0
        self.next_page = -math.inf

    @property
    def pace(self) -> float:
        """Seconds per step, including what happens between steps (saving, evaluating); nan before the second step."""
        return (self.last_step_end - self.first_step_end) / (self.steps - 1) if self.steps > 1 else math.nan

    def tick(self) -> bool:
        """Count a finished step; return True once, when the pace can be announced."""
        elapsed_before = self.last_step_end - self.first_step_end
        self.last_step_end = time.monotonic()
        self.steps += 1
        if self.steps == 1:
            self.first_step_end = self.last_step_end
        return elapsed_before < FIRST_PACE <= self.last_step_end - self.first_step_end

    def first_grid_due(self) -> bool:
        return not self.grids and time.monotonic() - self.started >= FIRST_GRID

    def page_due(self) -> bool:
        return time.monotonic() >= self.next_page


def duration(seconds: float) -> str:
    """Format a duration for reading: 0.13 s, 206 s, 45 minutes, 69 hours, 5 days."""
    units = (("s", 1, 600), ("minutes", 60, 7200), ("hours", 3600, 4 * 86400), ("days", 86400, math.inf))
    unit, length, _ = next(unit for unit in units if seconds < unit[2])
    number = seconds / length
    return f"{number:.2g} {unit}" if number < 10 else f"{number:.0f} {unit}"


@first_rank
def say_duration(pace: float, left: int, steps_per_epoch: int, flags: dict, device: torch.device) -> None:
    """Announce how long a run will take, and suggest smaller settings where that is long on a CPU.

    pace:  seconds per step
    left:  steps
    flags: the options of the run, as plain values
    """
    epoch = pace * steps_per_epoch
    say(f"{duration(pace)} a step, {duration(epoch)} an epoch: this run will take about {duration(pace * left)} more")
    if device.type == "cpu" and epoch > LONG_EPOCH:
        action = "start again with --overwrite and" if flags.get("start_from") == "0" else "resume with"
        settings = faster_settings(pace, flags)
        warn(f"an epoch takes {duration(epoch)} on this CPU; {action} smaller settings (docs/recipes.md): {settings}")


def faster_settings(pace: float, flags: dict) -> str:
    """Choose options for a CPU, among those that this run can still change and that would make it faster."""
    settings = {"img_height": 64, "img_width": 64, "batch_size": 1}
    if flags.get("start_from") == "0" and not flags.get("init_from"):  # the networks are new
        if flags.get("generator") != "unet_vit":
            settings |= {"num_residual": 6, "ngf": 32}
        settings |= {"ndf": 32, "n_layers_D": 2}
    faster = [f"--{name} {value}" for name, value in settings.items() if flags.get(name, 0) > value]
    if not faster:
        ten_minutes = max(1, int(LONG_EPOCH / pace / 6))
        faster = [f"--steps_per_epoch {ten_minutes}"]
    return " ".join(faster)


def command_line(script: str, *arguments: str) -> str:
    """Return a shell command that runs a script of this project from the user's current folder."""
    path = Path(__file__).resolve().parents[1] / script
    here = Path.cwd()
    return shlex.join(["python", str(path.relative_to(here) if path.is_relative_to(here) else path), *arguments])


# ---------------------------------------------------------------------------------------------
# The page, which works from disk, without a server

WATCHED_EPOCHS = 8  # versions of a watched photo on the page, from the first epoch to the newest
PAGE_WIDTH = 900  # px; larger images are reduced on the page and open in full size
TABLE_ROWS = 12  # of measures.csv on the page


def legend(domains: tuple[str, str], students: Collection[Direction]) -> list[tuple[str, str]]:
    """Explain the rows of a sample grid: pairs of a label and its text; students: directions that have a teacher."""
    names = dict(zip("AB", domains, strict=True))
    lines = []
    for direction in DIRECTIONS:
        source, target = direction
        lines.append((f"real_{source}", f"{names[source]}: test images, or training images if there are none"))
        lines.append((f"fake_{target}", f"{names[target]}: {direction.generator}(real_{source})"))
        if direction in students:
            lines.append((f"teacher_{target}", f"{names[target]}: real_{source} translated by the teacher"))
        round_trip = f"{direction.reverse.generator}(fake_{target})"
        lines.append((f"rec_{source}", f"{names[source]}: {round_trip}, ideally equal to real_{source}"))
    return lines


def embed_image(folder: Path, path: Path) -> tuple[str, str, str]:
    """Return an image's relative URL, its pixels as a data URL, and its name.

    The pixels are embedded so that the page also shows in notebooks and mails.
    """
    address = quote(os.fsencode(path.relative_to(folder).as_posix()))
    return address, data_url(path, (PAGE_WIDTH, 4 * PAGE_WIDTH)) or address, one_line(path.stem)


def sample_grids(folder: Path) -> dict[int, Path]:
    """Find the grids epoch_NNNN.png of a folder, by epoch, oldest first."""
    grids = {int(path.stem[6:]): path for path in folder.glob("epoch_*.png") if path.stem[6:].isdecimal()}
    return dict(sorted(grids.items()))


def spread_evenly(paths: Sequence[Path], most: int) -> list[Path]:
    """Choose at most `most` of the paths, including the first and the last."""
    count = min(most, len(paths))
    return [paths[round(k * (len(paths) - 1) / max(1, count - 1))] for k in range(count)]


# ---------------------------------------------------------------------------------------------
# The monitor


@dataclass
class Monitor:
    """Everything that a run logs and shows during training."""

    saved: Path  # folder of losses.csv, measures.csv and tensorboard/
    images: Path  # folder of index.html, losses.png, the grids and watch/
    names: tuple[str, str]  # of the run and of its data set
    samples: tuple[Tensor, Tensor]  # images of the grids, from load_samples
    photos: dict[str, Tensor]  # watched photos by name, from load_watched
    draw_rows: Callable[[CycleGAN, Tensor, Tensor], Rows]  # computes the rows of a grid from a model and the samples
    term_names: Sequence[str]  # columns of losses.csv after epoch, step and lr
    meter: Meter = field(default_factory=Meter)  # of the losses since the last row
    board: TensorBoardLog = field(default_factory=TensorBoardLog)
    clock: Clock = field(default_factory=Clock)  # restarted by `open`
    log: CsvLog = field(init=False)  # losses.csv, from `open`
    measures: CsvLog = field(init=False)  # measures.csv, from `open`
    outdated: dict[Path, int] = field(default_factory=dict)  # mtimes of the grids after the epoch that was resumed

    def open(self, step: int, with_tensorboard: bool, epochs: int = 0) -> None:
        """Start the logs, or resume them after `step`: rows of later steps are removed, later grids not shown.

        epochs: started ones
        """
        self.clock = Clock()
        for folder in (self.images, *self.images.glob("watch/*")):
            later = [path for epoch, path in sample_grids(folder).items() if epoch > epochs]
            self.outdated |= {path: path.stat().st_mtime_ns for path in later}
        self.log = CsvLog(self.saved / "losses.csv", ["epoch", "step", "lr", *self.term_names], step)
        self.measures = CsvLog(self.saved / "measures.csv", ["epoch", "step"], step)
        self.board = TensorBoardLog(self.saved / "tensorboard" if with_tensorboard else None, step)
        attempt(self.log.save)
        if self.measures.path.exists():
            attempt(self.measures.save)

    def log_losses(self, epoch: int, step: int, lr: float, means: dict[str, float]) -> None:
        """Add a row to losses.csv and reset the meter; epoch: the one that these steps belong to, from 1."""
        self.log.append({"epoch": epoch, "step": step, "lr": lr} | means)
        self.board.add(step, {"lr": lr} | {f"losses/{name}": value for name, value in means.items()})
        self.meter = Meter()

    @first_rank
    def lacks_measures(self, step: int) -> bool:
        """Whether measures.csv, before `open`, has no row of a step."""
        path = self.saved / "measures.csv"
        return not path.is_file() or step not in [row["step"] for row in read_losses(path)]

    @first_rank
    def add_measures(self, epoch: int, step: int, row: dict[str, float]) -> None:
        """Add a row to measures.csv and print it; epoch: finished ones."""
        self.board.add(step, {f"measures/{name}": value for name, value in row.items()})
        self.measures.append({"epoch": epoch, "step": step} | row)
        attempt(self.measures.save)
        figures = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
        say(f"epoch {epoch}:  {figures}")

    @first_rank
    def draw(self, model: CycleGAN, epoch: int, step: int, finished: bool) -> None:
        """Draw the samples and the watched photos; raises OSError if the disk is full.

        epoch:    finished ones
        finished: the last of them has just ended; otherwise the grid belongs to the current, unfinished epoch
        """
        self.clock.grids += 1
        file = f"epoch_{epoch if finished else epoch + 1:04d}.png"
        rows = self.draw_rows(model, *self.samples)
        if finished:
            warn_if_collapsed(rows)
        grids = {"grid": draw_grid(rows)}
        save_image(grids["grid"], self.images / file)
        for name, photo in self.photos.items():
            outputs = [(d.generator, model.translate(d.generator, photo)) for d in DIRECTIONS]
            grids[f"watch/{name}"] = draw_grid([("photo", photo), *outputs])
            save_image(grids[f"watch/{name}"], self.images / "watch" / name / file)
        self.board.add(step, {}, grids)
        if self.clock.grids == 1:
            self.clock.next_page = -math.inf  # show the first grid at once

    @first_rank
    def write_page(
        self, epoch: int, step: int, step_in_epoch: int, num_epochs: int, steps_per_epoch: int, stopped: bool = False
    ) -> None:
        """Write losses.csv, losses.png and index.html; raises OSError if the disk is full.

        epoch:   finished ones
        stopped: by a signal; the run can be resumed
        """
        started = time.monotonic()
        self.clock.next_page = started + PAGE_SECONDS  # holds also if writing fails
        attempt(self.log.save)
        plot_losses(self.log.rows, self.images / "losses.png")
        done = epoch * steps_per_epoch + step_in_epoch
        total = num_epochs * steps_per_epoch
        facts = f"{epoch} of {counted(num_epochs, 'epoch')}"
        if step_in_epoch:
            facts += f" and {counted(step_in_epoch, 'step')} of the next"
        facts += f"; step {step:,}"
        if stopped:
            facts += "; stopped, resume with --start_from latest"
        elif done != total and math.isfinite(self.clock.pace):
            facts += f"; about {duration((total - done) * self.clock.pace)} left"
        facts += f"; written {time.strftime('%H:%M:%S')}"
        self.write_index(facts, min(1.0, done / total))
        self.clock.next_page = started + max(PAGE_SECONDS, (time.monotonic() - started) / PAGE_FRACTION)

    def write_index(self, facts: str, fraction: float) -> None:
        """Write index.html: newest grid, loss curves, measures, earlier grids, watched photos.

        facts:    one line that says how far the run is
        fraction: of the steps that are finished, in [0, 1]; below 1 the page reloads every 15 s
        """
        run_name, dataset_name = self.names
        domain_A, domain_B = domain_names(dataset_name)
        grids = self._grids_shown(self.images)[::-1]
        rows = [("earlier", "row", grids[1:4])] if grids[1:] else []
        for photo in sorted((self.images / "watch").glob("*")):
            heading = f"{one_line(photo.name)}: the photo; translated to {domain_B} by G_AB; to {domain_A} by G_BA"
            rows.append((heading, "row small", spread_evenly(self._grids_shown(photo), WATCHED_EPOCHS)))
        plot = self.images / "losses.png"
        gallery = self.images / "test" / "index.html"  # may be of an earlier run with this name
        students = [d for d in DIRECTIONS if f"output_{d.source}{d.target}" in self.term_names]
        files.write_page(
            self.images / "index.html",
            "progress.html",
            title=one_line(f"{run_name}: {domain_A} ↔ {domain_B}"),
            facts=one_line(facts),
            fraction=fraction,
            tested=gallery.is_file() and bool(grids) and gallery.stat().st_mtime >= grids[-1].stat().st_mtime,
            grid=embed_image(self.images, grids[0]) if grids else None,
            legend=legend((domain_A, domain_B), students),
            plot=embed_image(self.images, plot) if plot.is_file() else None,
            table=self._measures_table(),
            rows=[(heading, kind, [embed_image(self.images, path) for path in paths]) for heading, kind, paths in rows],
        )

    def _measures_table(self) -> list[str]:
        rows = {}
        for row in self.measures.rows[-TABLE_ROWS:]:
            rows[f"epoch {row['epoch']}"] = {k: v for k, v in row.items() if k not in ("epoch", "step")}
        return format_table(rows) if rows else []

    def _grids_shown(self, folder: Path) -> list[Path]:
        """List the grids of a folder, without those that the resumed run has not drawn again."""
        grids = sample_grids(folder).values()
        return [path for path in grids if self.outdated.get(path) != path.stat().st_mtime_ns]

    def close(self) -> None:
        """Close the TensorBoard log."""
        self.board.close()
