"""The numbers of a run: running means, losses.csv and measures.csv, their plot, TensorBoard.

log = LossLog(Path("losses.csv"), ["epoch", "step"], last_step=0)
log.append({"epoch": 1, "step": 200, "loss_G": 3.2})
log.save()
"""

import csv
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from files import atomic_write, write_text
from utils import average, counted, first_rank, rank, warn

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
