"""Training states: saving, resuming, latest.pt and previous.pt, and refusing to overwrite a run.

A state holds everything that learns, counts or is random, so a resumed run takes the very step that would have followed.
"""

import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from models import DIRECTIONS, DiscriminatorConfig, GeneratorConfig, Networks, build_discriminator, build_generator
from toolkit.devices import rng_state
from toolkit.distributed import first_rank, first_rank_first, rank, world_size
from toolkit.files import (
    atomic_write,
    attempt,
    is_temporary,
    link_file,
    read_archive,
    remove_files,
    replace,
    sha256,
    sole_process,
    temporary_name,
    write_json,
)
from toolkit.keras import is_keras
from toolkit.weights import network_hash, save_generator
from utils import InputError, counted, one_line, say, warn

RUNS = Path("saved_models")
IMAGES = Path("generated_images")
STATE_FORMAT = 1  # its states always resume here; 0.1.0 has the same number, but refuses states of later versions
ASIDE = ".overwritten"  # sub-folders for the files of a run until the run that replaces it is saved
JOURNAL = "files.json"  # in that of the states: names of the files, whether all are there, hash of the new latest.pt
UNFINISHED = "unfinished"  # sub-folders for what a run left that was killed before it was saved
OF_RANK = ("buffers", "rng", "meter")  # entries of a state that differ between the ranks of torchrun


class Checkpoint(NamedTuple):
    """A training state, and the file that it was read from."""

    state: dict
    path: Path


def load_state(path: Path, command: str | None = None) -> dict:
    """Read a state that the given command ("train", "distill", None: either) has saved; raise InputError if it is none."""
    state = read_archive(path)
    if not isinstance(state, dict) or "format" not in state or "nets" not in state:
        raise InputError(f"{path}: holds no training state; expected a file that train.py or distill.py wrote")
    found, writer = (one_line(state.get(name))[:40] for name in ("format", "stage"))
    if found != str(STATE_FORMAT):
        raise InputError(f"{path}: format {found}, expected {STATE_FORMAT}; written by another version")
    if command and writer != command:
        raise InputError(f"{path}: a state of {writer}.py, expected one of {command}.py")
    loader = state.pop("loader", None)  # how version 0.1.0 grouped and named these
    if isinstance(loader, dict):
        state["meter"] = loader.get("meter")
        state["step_in_epoch"] = loader.get("place")
        state["micro_batch_size"] = loader.get("piece", 0)
    return state


def is_state(path: Path) -> bool:
    """Return whether a file of weights is a training state."""
    value = None
    if path.suffix != ".safetensors" and not is_keras(path):
        value = read_archive(path, skip_objects=True)
    return isinstance(value, dict) and {"format", "nets"} <= value.keys()


def found_runs() -> str:
    """Return the names of the runs in saved_models, for a message."""
    return ", ".join(sorted(path.name for path in RUNS.glob("*") if path.is_dir())) or "none"


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the epoch_NNNN.pt files of a run by epoch, in order."""
    paths = [path for path in folder.glob("epoch_*.pt") if re.fullmatch(r"epoch_[0-9]{4,}", path.stem)]
    return {int(path.stem[6:]): path for path in sorted(paths, key=lambda path: int(path.stem[6:])) if path.is_file()}


def load_checkpoint(folder: Path, epoch: str, flag: str, command: str | None = None) -> tuple[dict, Path]:
    """Read the state of an epoch ("latest", "best" or a number), which `flag` names; previous.pt for a bad latest.pt."""
    if flag == "--start_from":  # all ranks resume, so all of them wait
        with first_rank_first():
            recover(folder.name)
    else:
        recover(folder.name)
    path = folder / (f"epoch_{int(epoch):04d}.pt" if epoch.isdecimal() else f"{epoch}.pt")
    previous = folder / "previous.pt"
    try:
        if not path.is_file():
            found = list(map(str, numbered_checkpoints(folder)))
            found += [name for name in ("latest", "best") if (folder / f"{name}.pt").is_file()]
            listed = ", ".join(found) or f"none, nothing was saved yet; runs found: {found_runs()}"
            raise InputError(f"{flag} {epoch}: no {path}; expected one of: {listed}")
        return load_state(path, command), path
    except InputError as error:
        if epoch != "latest" or not previous.is_file():
            raise
        try:
            state = load_state(previous, command)
        except InputError:
            raise error from None
        warn(f"{error}; using {previous}, step {one_line(state.get('step'))[:40]}")
        return state, previous


def networks_of(state: dict, path: Path) -> Networks:
    """Build the networks of a state by name, generators with their EMA weights if it has them; raise InputError."""
    networks: Networks = {}
    try:
        weights = state["nets"] | (state.get("ema") or {})
        for name, values in state["config"].items():
            if name.startswith("G"):
                networks[name] = build_generator(GeneratorConfig.saved(values, weights[name]))
            else:
                networks[name] = build_discriminator(DiscriminatorConfig(**values))
            networks[name].load_state_dict(weights[name])
    except Exception as error:  # an edited file can raise anything
        raise unusable(path, error) from error
    return networks


def unusable(path: Path, error: Exception) -> InputError:
    """Turn whatever goes wrong while a state is used into one line."""
    reason = one_line(str(error).split("\n")[0][:160])
    return InputError(f"{path}: not a whole training state ({type(error).__name__}: {reason}); use another checkpoint")


def own_rank_state(state: dict) -> dict:
    """Return the part of a state that belongs to this rank: buffers, random state, meter."""
    first = {name: state[name] for name in OF_RANK}
    saved = [first, *state.get("other_ranks", [])]
    if len(saved) == world_size():
        return saved[rank()]
    effect = "new ranks have new image buffers and random numbers, so the figures will differ"
    say(f"saved by {counted(len(saved), 'rank')}, resumed with {world_size()}: {effect}")
    own = saved[rank()] if rank() < len(saved) else {"buffers": None, "rng": rng_state()}
    return own | {"meter": first["meter"]}


def best_score(folder: Path, saved: dict | None, best_by: str) -> dict | None:
    """Return what best.pt holds (metric, score, epoch) if it is `saved`, the best of the state that is resumed."""
    path = folder / "best.pt"
    if not path.is_file():
        return None
    reason = f"{path}: is not the best epoch of this run by {best_by}"
    try:
        held = load_state(path).get("best")
        if held and held == saved and held["metric"] == best_by:
            return held
    except InputError as error:
        reason = str(error)
    warn(f"{reason}; the next evaluation replaces it")
    return None


def save_state(path: Path, state: dict) -> None:
    """Write a training state."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save({"format": STATE_FORMAT, **state}, file)
        except RuntimeError as error:  # torch's writer hides the reason
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def save_latest(folder: Path, state: dict, also: Sequence[Path] = ()) -> None:
    """Write latest.pt; the one before becomes previous.pt, and `also` are further names of the new one."""
    fresh = folder / temporary_name(0)
    try:
        save_state(fresh, state)
        expect_save(folder.name, fresh)
        if (folder / "latest.pt").is_file():
            link_file(folder / "latest.pt", folder / "previous.pt")
        for path in also:
            link_file(fresh, path)
        replace(fresh, folder / "latest.pt")  # completes the save: before it, the run resumes from the old one
    finally:
        fresh.unlink(missing_ok=True)


@dataclass
class CheckpointSaver:
    """Writes the files of a run: latest.pt, previous.pt, best.pt, epoch_NNNN.pt and the generators."""

    folder: Path
    metadata: dict  # of the generator files: stage, run_name, dataset_name, data_root, domains, size
    checkpoint_interval: int = 10  # epochs
    keep_checkpoints: int = 0
    save_minutes: float = 10.0
    saved_at: float = field(default_factory=time.monotonic)  # time of the last attempt, s
    save_error: str = ""  # why the last save failed

    def take_folder(self, overwrite: bool, checkpoint: Path | None) -> None:
        """Prepare the folder, which this process has locked, for a run that starts or resumes from a checkpoint."""
        with first_rank_first():
            settle_overwriting(self.folder.name)
            if rank() == 0 and checkpoint is None:
                refuse_second_run(self.folder.name, overwrite)  # again, now that no other process can start one
                set_aside(self.folder.name)
            elif rank() == 0 and checkpoint and checkpoint.name == "previous.pt":
                link_file(checkpoint, self.folder / "latest.pt")  # so that the next save does not keep the damaged one

    def due(self) -> bool:
        """Return whether save_minutes have passed since the last save; never if they are 0."""
        return 0 < 60 * self.save_minutes < time.monotonic() - self.saved_at

    def save(self, state: dict, generators: Networks, save_log: Callable[[], None], best: bool = False) -> None:
        """Write everything that the run needs to resume, losses.csv by save_log included; save_error tells why it failed."""
        self.save_error = attempt(self._write, state, generators, save_log, best)
        self.saved_at = time.monotonic()

    @first_rank
    def _write(self, state: dict, generators: Networks, save_log: Callable[[], None], best: bool) -> None:
        epoch = state["epoch"]
        pair = hashlib.sha256("".join(network_hash(generators[d.generator]) for d in DIRECTIONS).encode()).hexdigest()
        for direction in DIRECTIONS:
            metadata = {
                **self.metadata,
                "direction": str(direction),
                "epoch": epoch,
                "step": state["step"],
                "pair": pair,
            }
            path = self.folder / f"{direction.generator}.safetensors"
            save_generator(path, generators[direction.generator], metadata)
        save_log()
        also = [self.folder / "best.pt"] if best else []
        is_numbered = state["step_in_epoch"] == 0 and epoch % self.checkpoint_interval == 0
        if is_numbered:
            also.append(self.folder / f"epoch_{epoch:04d}.pt")
        save_latest(self.folder, state, also)
        settle_overwriting(self.folder.name)
        if is_numbered and self.keep_checkpoints:
            kept = [path for number, path in numbered_checkpoints(self.folder).items() if number <= epoch]
            for path in kept[: -self.keep_checkpoints]:
                path.unlink()

    def last_state(self) -> str:
        """Say from where a run that ends badly can be resumed."""
        path = self.folder / "latest.pt"
        return f"the last good state is {path}" if path.exists() else "nothing was saved yet"


def files_of_run(run_name: str) -> list[Path]:
    """List the files that training wrote under this name; those of anybody else are not listed."""
    folder = RUNS / run_name
    images = IMAGES / run_name
    names = "latest.pt previous.pt best.pt G_AB.safetensors G_BA.safetensors run.json losses.csv measures.csv"
    found = [folder / name for name in names.split()]
    found += [*numbered_checkpoints(folder).values(), *folder.glob("tensorboard/events.out.tfevents.*")]
    found += [images / "index.html", images / "losses.png"]
    grids = (*images.glob("epoch_*.png"), *images.glob("watch/*/epoch_*.png"))
    found += [path for path in grids if re.fullmatch(r"epoch_[0-9]{4,}", path.stem)]
    return [path for path in found if path.is_file()]


def refuse_second_run(run_name: str, overwrite: bool) -> None:
    """Raise InputError if a run of this name exists, unless it may be overwritten."""
    found = files_of_run(run_name)
    if found and not overwrite:
        remedy = "go on with --start_from latest, choose another --run_name, or delete it with --overwrite"
        raise InputError(f"{found[0].parent} holds a run already; {remedy}")


def folders_of_run(run_name: str) -> tuple[Path, Path]:
    """Return the folders of its states and of its images."""
    return RUNS / run_name, IMAGES / run_name


def set_aside(run_name: str) -> None:
    """Move the files of a run into sub-folders, until the new run of that name is saved."""
    found = files_of_run(run_name)
    if not found:
        return
    folders = folders_of_run(run_name)
    names = [[str(path.relative_to(folder)) for path in found if folder in path.parents] for folder in folders]
    for folder in folders:
        with suppress(OSError):  # what a killed process left: temporary files and empty folders
            for parent, _, files in os.walk(folder / ASIDE, topdown=False):
                for path in filter(is_temporary, (Path(parent, name) for name in files)):
                    path.unlink()
                Path(parent).rmdir()
        if os.path.lexists(folder / ASIDE):
            raise InputError(f"{folder / ASIDE}: needed for the run that is overwritten; move it away")
    record = {"files": names, "saved": None}
    journal = folders[0] / ASIDE / JOURNAL
    journal.parent.mkdir(parents=True)
    write_json(journal, record | {"complete": False})
    for folder, own in zip(folders, names, strict=True):
        for name in own:
            os.renames(folder / name, folder / ASIDE / name)
    write_json(journal, record | {"complete": True})


def expect_save(run_name: str, state: Path) -> None:
    """Record which file, once it is called latest.pt, means that the run that replaces another one was saved."""
    journal = folders_of_run(run_name)[0] / ASIDE / JOURNAL
    if journal.is_file():
        write_json(journal, json.loads(journal.read_text(encoding="utf-8")) | {"saved": sha256(state)})


def read_journal(run_name: str) -> tuple[dict, list[tuple[Path, Path]]]:
    """Return the journal of a run that is being replaced, and where each of its files was and is to be set aside to.

    raises: InputError if it is damaged
    """
    folders = folders_of_run(run_name)
    journal = folders[0] / ASIDE / JOURNAL
    try:
        record = json.loads(journal.read_text(encoding="utf-8"))
        moved = []
        for folder, names in zip(folders, record["files"], strict=True):
            for name in map(Path, names):
                if name.is_absolute() or ".." in name.parts or not name.parts:
                    raise ValueError("no file of a run")
                moved.append((folder / ASIDE / name, folder / name))
        return {"files": record["files"], "complete": bool(record["complete"]), "saved": record["saved"]}, moved
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(f"{journal}: damaged; move the files beside it to where they belong, and remove it") from error


@first_rank
def settle_overwriting(run_name: str, after_kill: bool = True) -> None:
    """Remove the files that were set aside if the new run was saved, else bring them back; the folder must be locked.

    What is there instead of them is removed if this process wrote it. After a kill it goes to sub-folders, since somebody
    may have put it there by hand. The journal goes last, so that this can be cut off anywhere and done again.
    """
    folders = folders_of_run(run_name)
    journal = folders[0] / ASIDE / JOURNAL
    if not journal.is_file():
        return
    record, moved = read_journal(run_name)
    latest = folders[0] / "latest.pt"
    if record["complete"] and latest.is_file() and sha256(latest) == record["saved"]:
        for folder in folders:
            remove_files([source for source, _ in moved if folder in source.parents], folder)
    else:
        if record["complete"]:
            brought_back = {target for source, target in moved if not os.path.lexists(source)}  # by hand
            others = [path for path in files_of_run(run_name) if path not in brought_back]
            if after_kill:
                put_by(run_name, others)
            else:
                for folder in folders:
                    remove_files([path for path in others if folder in path.parents], folder)
            write_json(journal, record | {"complete": False})
        for source, target in moved:
            if os.path.lexists(source):
                os.renames(source, target)
    remove_files([*filter(is_temporary, journal.parent.iterdir()), journal], folders[0])


def put_by(run_name: str, paths: Sequence[Path]) -> None:
    """Move files of a run into sub-folders, replacing nothing."""
    folders = folders_of_run(run_name)
    for path in paths:
        folder = next(folder for folder in folders if folder in path.parents)
        places = (folder / f"{UNFINISHED}{number or ''}" / path.relative_to(folder) for number in itertools.count())
        os.renames(path, next(place for place in places if not os.path.lexists(place)))
    if paths:
        left = folders[0] / UNFINISHED
        warn(f"{run_name}: the run that was to replace it ended before it was saved; what it left is in {left}")


@first_rank
def recover(run_name: str) -> None:
    """Settle what a killed process left of two runs; raise InputError while another process overwrites one."""
    folder = RUNS / run_name
    if (folder / ASIDE / JOURNAL).is_file():
        with sole_process(folder, remedy="another run"):
            settle_overwriting(run_name)


def recover_run_of(file: Path) -> None:
    """Do so for the run whose folder a file is in, if it is in one."""
    folder = file.resolve().parent
    if folder.parent == RUNS.resolve():
        recover(folder.name)
