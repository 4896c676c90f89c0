"""Sample grids, watched photos and the live page of a training run, and its logs."""

import math
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cyclegan import CycleGAN, translate
from datasets import held_out_split, split_folder
from models import DIRECTIONS, Networks
from toolkit import files, images, metrics
from toolkit.distributed import first_rank, rank
from toolkit.images import save_image
from toolkit.logs import CsvLog, Meter, TensorBoardLog, plot_losses, read_losses
from utils import InputError, counted, duration, one_line, say, warn, with_domain

Rows = list[tuple[str, Tensor]]  # of a grid: labels and images (N, C, H, W) in [-1, 1]


def load_samples(dataset: Path, readers: Mapping[str, images.ImageReader], on_bad: str) -> tuple[Tensor, Tensor]:
    """Read up to 6 held-out images of A and as many of B, for all sample grids: (N, C, H, W) in [-1, 1].

    readers: by domain, which give all images one size
    """
    split = held_out_split(dataset)
    samples = []
    for domain in "AB":
        folder = split_folder(dataset, f"{split}{domain}")
        paths = images.list_images(folder)
        chosen = paths[:: max(1, len(paths) // 6)][:6]
        samples.append(torch.stack([x for _, x in images.load_images(folder, chosen, readers[domain], on_bad)]))
    columns = min(map(len, samples))
    return samples[0][:columns], samples[1][:columns]


def load_watched(paths: list[Path], size: tuple[int, int], channels: int, resumed: bool = False) -> dict[str, Tensor]:
    """Read the photos of --watch, (1, channels, H, W) in [-1, 1], by name; their shorter side becomes that of `size`.

    resumed: leave out photos that cannot be read, with a warning; otherwise they raise InputError
    """
    named: dict[str, Path] = {}
    for path in paths:
        name = path.stem if path.stem.strip(".") else "photo"
        while name in named:
            name += "_"
        named[name] = path
    photos = {}
    shorter = min(size)
    for name, path in named.items():
        try:
            photo = images.read_image(images.with_pages(path, [path])[0], channels)
        except images.UnreadableImage as error:
            message = f"--watch {path}: not a readable image ({error}); expected a photo, such as PNG or JPEG"
            if not resumed:
                raise InputError(message) from None
            warn(f"{message}; the run continues without it")
            continue
        scale = shorter / min(photo.size)
        photo = photo.resize([min(4 * shorter, max(shorter, round(side * scale))) for side in photo.size])
        photos[name] = images.image_to_tensor(photo, channels)[None]
    return photos


def cyclegan_rows(model: CycleGAN, real_A: Tensor, real_B: Tensor, teachers: Networks | None = None) -> Rows:
    """Compute the rows of a sample grid: real images, their translations (then those of a teacher), the round trips."""
    rows = []
    for direction, real in zip(DIRECTIONS, (real_A, real_B), strict=True):
        source, target = direction
        fake = model.translate(direction.generator, real)
        rows += [(f"real_{source}", real), (f"fake_{target}", fake)]
        if teachers and direction.generator in teachers:
            rows.append((f"teacher_{target}", translate(teachers[direction.generator], real, model.precision)))
        rows.append((f"rec_{source}", model.translate(direction.reverse.generator, fake)))
    return rows


def warn_if_collapsed(rows: Rows) -> None:
    """Warn when a generator outputs nearly the same image for all inputs. A single sample cannot show it."""
    spread = {label: x.float().std(0, correction=0).mean() for label, x in rows}
    for source, target in DIRECTIONS:
        if spread[f"fake_{target}"] < 0.02 * spread[f"real_{source}"]:
            remedy = "resume from an earlier epoch, with --start_from N, at a lower --lr"
            warn(f"G_{source}{target}: nearly the same output for every input; {remedy}")


class Clock:
    """The pace of a run in wall time, in s, and what is due."""

    def __init__(self) -> None:
        self.next_grid = time.monotonic() + 60  # of the first grid; `draw` sets it to never
        self.next_page = -math.inf
        self.steps = 0
        self.first_step_end = math.inf  # the first step is slower than the others
        self.elapsed = 0.0  # since then
        self.pace = math.nan  # s per step, with what happens between steps (saving, evaluating)

    def tick(self) -> bool:
        """Count a finished step; return True once, after 30 s, when the pace can be announced."""
        self.first_step_end = min(self.first_step_end, time.monotonic())
        elapsed_before = self.elapsed
        self.elapsed = time.monotonic() - self.first_step_end
        self.pace = self.elapsed / self.steps if self.steps else math.nan
        self.steps += 1
        return elapsed_before < 30 <= self.elapsed

    def first_grid_due(self) -> bool:
        return time.monotonic() >= self.next_grid

    def page_due(self) -> bool:
        return time.monotonic() >= self.next_page


def say_duration(pace: float, steps_left: int, steps_per_epoch: int, device: torch.device) -> None:
    """Announce how long a run will take; pace: seconds per step."""
    epoch = duration(pace * steps_per_epoch)
    say(f"{duration(pace)} a step, {epoch} an epoch: this run will take about {duration(pace * steps_left)} more")
    if device.type == "cpu" and pace * steps_per_epoch > 3600 and rank() == 0:
        warn(f"an epoch takes {epoch} on this CPU; docs/recipes.md has settings for a CPU")


def command_line(script: str, *arguments: str) -> str:
    """Return a shell command that runs a script of this project from the user's current folder."""
    path = Path(__file__).resolve().parents[1] / script
    here = path.parent == Path.cwd()  # a relative path from elsewhere may lead to another drive
    return shlex.join(["python", script if here else str(path), *arguments])


@dataclass
class Monitor:
    """Everything that a run logs and shows during training; its page works from disk, without a server."""

    saved: Path  # folder of losses.csv, measures.csv and tensorboard/
    images: Path  # folder of index.html, losses.png, the grids and watch/
    run_name: str
    domains: tuple[str, str]  # names of A and B
    samples: tuple[Tensor, Tensor]  # images of the grids, from load_samples
    photos: dict[str, Tensor]  # watched photos by name, from load_watched
    draw_rows: Callable[[CycleGAN, Tensor, Tensor], Rows]  # computes the rows of a grid from a model and the samples
    term_names: Sequence[str]  # columns of losses.csv after epoch, step and lr
    meter: Meter = field(default_factory=Meter)  # of the losses since the last row
    board: TensorBoardLog = field(default_factory=TensorBoardLog)
    clock: Clock = field(default_factory=Clock)  # restarted by `open`
    log: CsvLog = field(init=False)  # losses.csv, from `open`
    measures: CsvLog = field(init=False)  # measures.csv, from `open`
    newest: int = 0  # epoch of the newest grid; later ones belong to an abandoned branch of a resumed run

    def open(self, step: int, with_tensorboard: bool, epochs: int = 0) -> None:
        """Start the logs, or resume them after `step` without the rows of later steps; epochs: started ones."""
        self.clock = Clock()
        self.newest = epochs
        self.log = CsvLog(self.saved / "losses.csv", ["epoch", "step", "lr", *self.term_names], step)
        self.measures = CsvLog(self.saved / "measures.csv", ["epoch", "step"], step)
        self.board = TensorBoardLog(self.saved / "tensorboard" if with_tensorboard else None, step)
        files.attempt(self.log.save)
        if self.measures.path.exists():
            files.attempt(self.measures.save)

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
        files.attempt(self.measures.save)
        say(f"epoch {epoch}:  {'  '.join(f'{name} {value:.4g}' for name, value in row.items())}")

    def draw_grid(self, rows: Rows) -> Image.Image:
        """Draw rows of images, with the names of the domains in their labels."""
        return images.draw_grid([(with_domain(label, self.domains), x) for label, x in rows])

    @first_rank
    def draw(self, model: CycleGAN, epoch: int, step: int, finished: bool) -> None:
        """Draw the samples and the watched photos after so many epochs; if not finished, during the next one."""
        if self.clock.next_grid < math.inf:  # the first grid is shown at once
            self.clock.next_page = -math.inf
        self.clock.next_grid = math.inf
        number = epoch if finished else epoch + 1
        file = f"epoch_{number:04d}.png"
        rows = self.draw_rows(model, *self.samples)
        if finished:
            warn_if_collapsed(rows)
        grids = {"grid": self.draw_grid(rows)}
        save_image(grids["grid"], self.images / file)
        self.newest = number
        for name, photo in self.photos.items():
            outputs = [(d.generator, model.translate(d.generator, photo)) for d in DIRECTIONS]
            grids[f"watch/{name}"] = self.draw_grid([("photo", photo), *outputs])
            save_image(grids[f"watch/{name}"], self.images / "watch" / name / file)
        self.board.add(step, {}, grids)

    @first_rank
    def write_page(
        self, epoch: int, step: int, step_in_epoch: int, num_epochs: int, steps_per_epoch: int, stopped: bool = False
    ) -> None:
        """Write losses.csv, losses.png and index.html; epoch: finished ones; stopped: by a signal."""
        started = time.monotonic()
        self.clock.next_page = started + 30  # holds also if writing fails
        files.attempt(self.log.save)
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
        # updates of the page may take 2% of the run's time
        self.clock.next_page = started + max(30, (time.monotonic() - started) / 0.02)

    def write_index(self, facts: str, fraction: float) -> None:
        """Write index.html; facts: how far the run is; fraction: of the steps, below 1 the page reloads every 15 s."""
        domain_A, domain_B = self.domains
        grids = self._grids(self.images)[::-1]
        rows = [("earlier", "row", grids[1:4])] if grids[1:] else []
        for photo in sorted((self.images / "watch").glob("*")):
            heading = f"{one_line(photo.name)}: the photo; translated to {domain_B} by G_AB; to {domain_A} by G_BA"
            versions = self._grids(photo)
            chosen = np.linspace(0, len(versions) - 1, min(8, len(versions))).round().astype(int)
            rows.append((heading, "row small", [versions[i] for i in chosen]))
        measures = {}
        for row in self.measures.rows[-12:]:
            measures[f"epoch {row['epoch']}"] = {k: v for k, v in row.items() if k not in ("epoch", "step")}
        plot = self.images / "losses.png"
        test = self.images / "test" / "index.html"
        page = files.render_page(
            "progress.html",
            title=one_line(f"{self.run_name}: {domain_A} ↔ {domain_B}"),
            facts=one_line(facts),
            fraction=fraction,
            tested=time.strftime("%d %B %Y, %H:%M", time.localtime(test.stat().st_mtime)) if test.is_file() else "",
            grid=self._figure(grids[0]) if grids else None,
            domains={"A": domain_A, "B": domain_B},
            term_names=self.term_names,
            plot=self._figure(plot) if plot.is_file() else None,
            table=metrics.format_table(measures) if measures else [],
            rows=[(heading, kind, map(self._figure, paths)) for heading, kind, paths in rows],
        )
        files.write_text(self.images / "index.html", page)

    def _grids(self, folder: Path) -> list[Path]:
        """List the grids epoch_NNNN.png of a folder up to the newest one, oldest first."""
        grids = {int(path.stem[6:]): path for path in folder.glob("epoch_*.png") if path.stem[6:].isdecimal()}
        return [grids[epoch] for epoch in sorted(grids) if epoch <= self.newest]

    def _figure(self, path: Path) -> tuple[str, str, str]:
        """Return an image's URL, its reduced pixels as a data URL, which notebooks and mails show too, and its name."""
        address = quote(os.fsencode(path.relative_to(self.images).as_posix()))
        return address, images.data_url(path, (900, 3600)) or address, one_line(path.stem)
