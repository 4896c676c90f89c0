"""The numbers of a training run: running means of losses, CSV files, the loss plot, TensorBoard."""

import csv
import io
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from toolkit.distributed import average, rank
from toolkit.files import atomic_write, write_text
from utils import warn


class Meter:
    """Running sums of named losses. They stay on the device until `means` is called."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # per name: a resumed run may compute other losses
        self.count = 0
        self.recent: list[dict[str, Tensor]] = []  # all values added; not saved, since only finite ones are

    def add(self, values: dict[str, Tensor]) -> None:
        self.count += 1
        self.recent.append({name: value.detach() for name, value in values.items()})
        for name, value in self.recent[-1].items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def first_not_finite(self) -> tuple[list[str], int]:
        """Return the names of the first values that are not finite, and how many additions ago they were added."""
        for number, values in enumerate(self.recent, 1):
            names = [name for name, value in values.items() if not torch.isfinite(value)]
            if names:
                return names, len(self.recent) - number
        return [], 0

    def means(self) -> dict[str, float]:
        """Compute the means over all ranks; waits for the device."""
        sums = {name: value.clone() for name, value in self.sums.items()}
        average(list(sums.values()))
        return {name: value.item() / max(1, self.counts[name]) for name, value in sums.items()}

    def state_dict(self) -> dict:
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return {"sums": sums, "count": self.count, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Restore a state. In old states, without "counts", every name has the same count."""
        counts = state.get("counts", dict.fromkeys(state["sums"], state["count"]))
        self.sums = {name: value.to(device).reshape(()) for name, value in state["sums"].items()}
        self.counts = {name: int(counts[name]) for name in self.sums}
        self.count = int(state["count"])


class CsvLog:
    """The rows of losses.csv or measures.csv, in memory; those of an existing file up to `last_step` are kept."""

    def __init__(self, path: Path, columns: Sequence[str], last_step: int):
        self.path = path
        self.columns = list(columns)  # the first ones; rows may add more
        self.rows: list[dict] = []
        if last_step and rank() == 0 and path.is_file():
            for row in read_losses(path, report_damage=True):
                if row["step"] <= last_step:
                    self.append(row)

    def append(self, row: dict) -> None:
        """Add a row in memory, with floats as they are read back; it replaces rows of the same and of later steps."""
        while self.rows and self.rows[-1]["step"] >= row["step"]:
            self.rows.pop()
        self.columns = list(dict.fromkeys([*self.columns, *row]))
        ordered = {name: row[name] for name in self.columns if name in row}
        self.rows.append({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in ordered.items()})

    def save(self) -> None:
        """Write all rows, atomically; raises OSError if that fails."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="nan", lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        write_text(self.path, text.getvalue())


def read_losses(path: Path, report_damage: bool = False) -> list[dict]:
    """Read the rows of losses.csv or measures.csv up to a damaged line: epoch and step as int, the rest as float.

    report_damage: warn of a damaged header, which leaves no rows
    """
    rows = []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        with suppress(csv.Error, KeyError, TypeError, ValueError):  # of a damaged line
            reader = csv.DictReader(file)
            if not all(re.fullmatch(r"[A-Za-z0-9_@]+", name) for name in reader.fieldnames or []):
                if report_damage:
                    warn(f"{path}: its header is damaged; its rows are left out")
                return []  # matplotlib would fail to draw $\foo$
            for cells in reader:
                counts = {name: int(cells[name]) for name in ("epoch", "step")}
                rows.append({name: float(cell) for name, cell in cells.items()} | counts)
    return rows


def plot_losses(rows: Sequence[dict], path: Path) -> None:
    """Plot each loss, and all terms together, over the steps: values pale, their running mean strong."""
    from matplotlib.figure import Figure  # here: the import takes half a second

    if not rows:
        return
    columns = dict.fromkeys(name for row in rows for name in row if name not in ("epoch", "step", "lr"))
    panels = [[name] for name in columns if name.startswith("loss_")]
    panels.append([name for name in columns if not name.startswith("loss_")])
    figure = Figure(figsize=(12, 7), layout="constrained")
    steps = [row["step"] for row in rows]
    marker = "o" if len(rows) == 1 else None  # a line through one point is invisible
    for axes, names in zip(figure.subplots(2, 2).flat, panels, strict=False):
        for name in names:
            values = np.array([row.get(name, math.nan) for row in rows])
            if np.isfinite(values).any():
                means = _running_mean(values, max(1, len(rows) // 25))
                (line,) = axes.plot(steps, means, label=name, linewidth=1.5, marker=marker)
                axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.7)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
        if axes.lines:  # the legend is above the curves, so that it hides none of them
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize="small", frameon=False, ncols=4)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _running_mean(values: np.ndarray, length: int) -> np.ndarray:
    """Average the finite values among the last `length` ones, at each position."""
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0), np.ones(length))[: len(values)]
    counts = np.convolve(finite, np.ones(length))[: len(values)]
    return sums / counts.clip(1)


class TensorBoardLog:
    """The TensorBoard log of a run; without a folder it does nothing."""

    def __init__(self, folder: Path | None = None, step: int = 0):
        self.folder = folder if rank() == 0 else None
        self.purge_step = step + 1 if step else None  # later steps of the folder are of an abandoned branch
        self.writer: Any = None
        self.warned = False

    def add(self, step: int, values: dict[str, float], images: dict[str, Image.Image] | None = None) -> None:
        """Log the finite numbers, and images, by name. Errors are reported once and never end the run."""
        if self.folder is None:
            return
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(self.folder, purge_step=self.purge_step)
            for name, value in values.items():
                if math.isfinite(value):
                    self.writer.add_scalar(name, value, step)
            for name, image in (images or {}).items():
                self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            self.writer.flush()
        except Exception as error:  # noqa: BLE001 (a full disk, a broken package, a dead writer thread)
            if not self.warned:
                warn(f"the TensorBoard log has gaps ({type(error).__name__}: {error}); the run continues")
            self.warned = True

    def close(self) -> None:
        if self.writer:
            with suppress(Exception):  # `add` has reported it
                self.writer.close()
