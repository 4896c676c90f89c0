"""What a run leaves, and how it goes on: whole states, previous.pt, generator files, refusing a second run.

state, path = load_checkpoint(RUNS / "horse2zebra", "latest", "--epoch")
nets = networks_of(state, path)

A whole-state file is a plain dict of values and tensors: all that learns, counts or is random, so that the step after
a resume is the step that would have followed. Each rank's buffers and random numbers stand in it apart.
"""

import dataclasses
import json
import math
import platform
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cyclegan import CycleGAN
from models import LEGACY_DIRECTIONS, DiscriminatorConfig, GeneratorConfig, Nets, build_discriminator, build_generator
from toolkit.cli import NEVER_INHERITED
from toolkit.devices import rng_state, set_rng_state
from toolkit.distributed import first_rank, first_rank_first, gather, rank, world_size
from toolkit.files import atomic_write, attempt, check_tensors, link_file, read_archive, replace
from toolkit.weights import load_tensors, read_config, same_nets, save_generator
from utils import InputError, counted, one_line, say, warn

RUNS = Path("saved_models")
IMAGES = Path("generated_images")
STATE_FORMAT = 1  # of the whole-state files; raised when an old reader could not follow


@dataclass
class Progress:
    """What counts in a run: how much is finished, and which epoch evaluated best."""

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    best: dict | None = None  # of best.pt: metric, score, epoch


# ---------------------------------------------------------------------------------------------
# Files of whole states


def save_state(path: Path, state: dict) -> None:
    """Write a whole-state file."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save({"format": STATE_FORMAT, **state}, file)
        except RuntimeError as error:  # torch's writer hides what the file said
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def save_latest(folder: Path, state: dict, also: Sequence[Path] = ()) -> None:
    """Write latest.pt; the one before becomes previous.pt, and `also` are further names of the new one.

    The last rename is what counts: interrupted anywhere before it, the run goes on from the latest.pt that was.
    """
    fresh = folder / ".latest.tmp"
    try:
        save_state(fresh, state)
        if (folder / "latest.pt").is_file():
            link_file(folder / "latest.pt", folder / "previous.pt")
        for path in also:
            link_file(fresh, path)
        replace(fresh, folder / "latest.pt")
    finally:
        fresh.unlink(missing_ok=True)


def is_state(path: Path) -> bool:
    """Tell a whole-state file from other files of weights, by what it holds."""
    if path.suffix == ".safetensors":
        return False
    value = read_archive(path)
    return isinstance(value, dict) and {"format", "nets"} <= value.keys()


def load_state(path: Path, stage: str | None = None) -> dict:
    """Read a whole-state file of the given stage ("train" or "distill"; None: either)."""
    state = read_archive(path)
    if not isinstance(state, dict) or "format" not in state or "nets" not in state:
        raise InputError(f"{path}: holds no training state; expected a file that train.py or distill.py wrote")
    if not isinstance(state["format"], int) or state["format"] != STATE_FORMAT:
        found = one_line(state["format"])[:40]
        raise InputError(f"{path}: format {found}, expected {STATE_FORMAT}; written by another version")
    if stage and state.get("stage") != stage:
        raise InputError(f"{path}: a state of {one_line(state.get('stage'))[:40]}.py, expected one of {stage}.py")
    return state


def found_runs() -> str:
    """Name the runs in saved_models, for a message."""
    return ", ".join(sorted(path.name for path in RUNS.glob("*") if path.is_dir())) or "none"


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """The epoch_NNNN.pt files of a run by their epoch, in its order; other names are not ours."""
    found = {}
    for path in folder.glob("epoch_*.pt"):
        if re.fullmatch(r"[0-9]{4,}", path.stem[6:]) and path.is_file():
            found[int(path.stem[6:])] = path
    return dict(sorted(found.items()))


def find_checkpoint(folder: Path, epoch: str, flag: str) -> Path:
    """Return the whole-state file of an epoch ("latest", "best" or a number), or list those that exist."""
    path = folder / (f"epoch_{int(epoch):04d}.pt" if epoch.isdecimal() else f"{epoch}.pt")
    if not path.is_file():
        words = (word for word in ("latest", "best") if (folder / f"{word}.pt").is_file())
        found = [*numbered_checkpoints(folder), *words]
        listed = ", ".join(map(str, found)) or "none, nothing was saved yet"
        raise InputError(f"{flag} {epoch}: no {path}; expected one of: {listed}")
    return path


def load_checkpoint(folder: Path, epoch: str, flag: str, stage: str | None = None) -> tuple[dict, Path]:
    """Read the whole-state file of an epoch; in place of a latest.pt that is damaged or gone, previous.pt."""
    previous = folder / "previous.pt"
    try:
        path = find_checkpoint(folder, epoch, flag)
        return load_state(path, stage), path
    except InputError as error:
        if epoch != "latest" or not previous.is_file():
            raise
        try:
            state = load_state(previous, stage)
        except InputError:
            raise error from None
        warn(f"{error}; using {previous}, step {one_line(state.get('step'))[:40]}")
        return state, previous


def networks_of(state: dict, path: Path) -> Nets:
    """Build the networks of a whole-state file, by name, generators from their averages where it has them.

    raises: InputError if a config or its tensors do not fit; nothing in the file is trusted
    """
    configs: Any = state.get("config")
    tensors: Any = state.get("nets")
    averages: Any = state.get("ema") or {}
    plain = all(isinstance(value, dict) for value in (configs, tensors, averages))
    if not plain or configs.keys() != {**tensors, **averages}.keys():
        raise InputError(f"{path}: its networks and their configs differ; use another checkpoint")
    nets: Nets = {}
    for name, values in configs.items():
        what = f"{path}, {name}"
        if name in LEGACY_DIRECTIONS:
            net = build_generator(read_config(GeneratorConfig, values, what))
        elif name in ("D_A", "D_B"):
            net = build_discriminator(read_config(DiscriminatorConfig, values, what))
        else:
            raise InputError(f"{path}: holds a network {one_line(name)[:40]}; expected G_AB, G_BA, D_A, D_B")
        load_tensors(net, averages.get(name, tensors.get(name)), what)
        nets[name] = net
    return nets


# ---------------------------------------------------------------------------------------------
# Saving a run


@dataclass
class Saver:
    """Where and when the states of a run go, and what stands in each of them beside what learns."""

    folder: Path
    facts: dict  # stage, args, schedules; of a distillation also teacher: path and sha256
    metadata: dict  # of the generator files: stage, run_name, dataset_name, data_root, size
    checkpoint_interval: int = 10  # epochs
    keep_checkpoints: int = 0
    save_minutes: float = 10.0
    old_checkpoints: Sequence[Path] = ()  # of an overwritten run; they go when the first of this one is saved
    saved_at: float = field(default_factory=time.monotonic)  # when a save was last tried, s
    save_error: str = ""  # why the last save failed

    def take_folder(self, overwrite: bool, checkpoint: Path | None) -> None:
        """Make room for the run, which starts or goes on with a checkpoint, in its folder that nobody else uses now."""
        with first_rank_first():
            if rank() == 0 and checkpoint is None:
                refuse_second_run(self.folder.name, overwrite, self.facts["args"])  # again, now that none can start
                self.old_checkpoints = clear(self.folder.name)
            elif rank() == 0 and checkpoint and checkpoint.name == "previous.pt":
                link_file(checkpoint, self.folder / "latest.pt")  # or the next save keeps the damaged one

    def due(self) -> bool:
        """Whether the last save is longer ago than save_minutes, if these are not 0."""
        return 0 < 60 * self.save_minutes < time.monotonic() - self.saved_at

    def save(
        self, model: CycleGAN, progress: Progress, meter: dict, save_log: Callable[[], None], best: bool = False
    ) -> None:
        """Save all that the run needs to go on; what fails now is said, kept in save_error and tried again next time.

        meter:    the state of the running means of the losses
        save_log: writes losses.csv, which belongs to the state
        best:     the state shall also be kept as best.pt
        """
        buffers = {domain: buffer.state_dict() for domain, buffer in model.buffers.items()}
        own_parts = gather({"buffers": buffers, "rng": rng_state(), "meter": meter})
        self.save_error = attempt(self._write, model, progress, own_parts, save_log, best)
        self.saved_at = time.monotonic()

    @first_rank
    def _write(
        self, model: CycleGAN, progress: Progress, own_parts: list[dict], save_log: Callable[[], None], best: bool
    ) -> None:
        """Write the generator files, losses.csv and latest.pt, in which all counts as saved; where due epoch_N.pt."""
        for name, direction in LEGACY_DIRECTIONS.items():
            metadata = {**self.metadata, "direction": direction, "epoch": progress.epoch, "step": progress.step}
            save_generator(self.folder / f"{name}.safetensors", model.averaged_nets[name], metadata)
        save_log()
        also = []
        due = progress.step_in_epoch == 0 and progress.epoch % self.checkpoint_interval == 0
        if due:
            also.append(self.folder / f"epoch_{progress.epoch:04d}.pt")
        if best:
            also.append(self.folder / "best.pt")
        save_latest(self.folder, {**self.facts, **state_of(model, progress, own_parts)}, also)
        for path in {*self.old_checkpoints} - {*also}:
            path.unlink(missing_ok=True)
        self.old_checkpoints = ()
        if due and self.keep_checkpoints:
            numbered = numbered_checkpoints(self.folder)
            for old in [path for epoch, path in numbered.items() if epoch <= progress.epoch][: -self.keep_checkpoints]:
                old.unlink()

    def last_state(self) -> str:
        """Say where a run that ends badly can go on."""
        last = self.folder / "latest.pt"  # of an overwritten run until the first save
        saved = last.exists() and not self.old_checkpoints
        return f"the last good state is {last}" if saved else "nothing was saved yet"


def state_of(model: CycleGAN, progress: Progress, own_parts: list[dict]) -> dict:
    """Everything that learns, counts or is random, as plain values and tensors; own_parts: of each rank."""
    return {
        **model.state_dict(),
        "epoch": progress.epoch,
        "step": progress.step,
        "best": progress.best,
        "config": {name: dataclasses.asdict(net.config) for name, net in model.nets.items()},
        "buffers": own_parts[0]["buffers"],
        "rng": own_parts[0]["rng"],
        "loader": {"place": progress.step_in_epoch, "meter": own_parts[0]["meter"], "piece": model.micro_batch_size},
        "other_ranks": own_parts[1:],
        "range": [-1, 1],
    }


# ---------------------------------------------------------------------------------------------
# Going on with a run


def restore(state: dict, path: Path, model: CycleGAN, meter: Any, image_shape: tuple[int, int, int]) -> Progress:
    """Put a whole state back, so that the next step is the one that would have followed; returns how far it is.

    meter:       of the losses' running means; takes its state
    image_shape: channels, height and width of the training images; buffered ones of another shape are dropped
    raises:      InputError if anything in the file is not what Saver writes
    """
    try:
        check_networks(state, path, model)
        optims = {name: checked_optim(optim, state["optims"][name]) for name, optim in model.optims.items()}
        model.load_state_dict({**state, "optims": optims})
        own = own_part(state)
        restore_buffers(model, own["buffers"], image_shape)
        model.micro_batch_size = state["loader"].get("piece", 0)
        meter.load_state_dict(own["meter"], model.device)
        meter.means()  # fails now, not later, if they are no numbers
        progress = Progress(state["epoch"], state["step"], state["loader"]["place"], read_best(state.get("best")))
        counts = (progress.epoch, progress.step, progress.step_in_epoch, model.micro_batch_size, meter.count)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"epoch, step, place, piece, count are {counts}")
        set_rng_state(own["rng"])
        return progress
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise InputError(f"{path}: no whole training state ({reason}); use another checkpoint") from error


def check_networks(state: dict, path: Path, model: CycleGAN) -> None:
    """Raise InputError if a tensor of the state does not fit its network."""
    for name, net in model.nets.items():
        check_tensors(net.state_dict(), state["nets"][name], f"{path}, {name}")
    for name, averaged in model.averages.items():
        tensors = (state["ema"] or state["nets"])[name]
        check_tensors(averaged.state_dict(), tensors, f"{path}, average of {name}")
    check_tensors(model.adapters.state_dict(), state.get("adapters") or {}, f"{path}, adapters")


def checked_optim(optim: torch.optim.Optimizer, saved: dict) -> dict:
    """Check the saved state of Adam, since its fused kernels would run past a tensor that is too short.

    returns: the state with the weights' own strides, which those kernels take for granted
    raises:  ValueError if a moment does not fit its weight
    """
    weights = [weight for group in optim.param_groups for weight in group["params"]]
    checked = {}
    for i, moments in saved["state"].items():
        checked[i] = {"step": torch.as_tensor(moments["step"], dtype=torch.float32).reshape(())}
        for key in ("exp_avg", "exp_avg_sq"):
            moment = moments[key]
            fits = moment.shape == weights[i].shape and moment.dtype == weights[i].dtype
            if not (fits and torch.isfinite(moment).all()):
                raise ValueError("a moment of Adam does not fit its weight")
            checked[i][key] = torch.empty_like(weights[i]).copy_(moment)
    return {"state": checked}


def own_part(state: dict) -> dict:
    """What of a state is this rank's alone: buffers, random numbers, sums of losses; says what more ranks change."""
    first = {"buffers": state["buffers"], "rng": state["rng"], "meter": state["loader"]["meter"]}
    found = [first, *state.get("other_ranks", [])]
    if len(found) == world_size():
        return found[rank()]
    say(
        f"saved by {counted(len(found), 'rank')}, going on with {world_size()}: the batches stay the same; buffers of images "
        "and random numbers of ranks that were not there start anew, so the numbers will differ from an unbroken run's"
    )
    new = {"buffers": None, "rng": rng_state()}
    return {**(found[rank()] if rank() < len(found) else new), "meter": first["meter"]}


def restore_buffers(model: CycleGAN, saved: dict | None, image_shape: tuple[int, int, int]) -> None:
    """Put the images of the buffers back, if they have the size that is trained now."""
    for domain, buffer in model.buffers.items():
        if saved:
            buffer.load_state_dict(saved[domain], model.device)
        if any(image.shape != image_shape for image in buffer.images):
            buffer.images = []
            say(f"buffer of {domain} starts empty: its images have another size")


def read_best(best: Any) -> dict | None:
    """The best score of a state; older states have none."""
    if best is None:
        return None
    metric = str(best["metric"])
    score = float(best["score"])
    if not math.isfinite(score):
        raise ValueError(f"the best {metric} is {score}")
    return {"metric": metric, "score": score, "epoch": int(best["epoch"])}


def score_to_beat(folder: Path, model: CycleGAN, progress: Progress, best_by: str) -> dict | None:
    """What best.pt holds, if it is of the run that goes on and was chosen by the same measure; else says why not."""
    path = folder / "best.pt"
    if not path.is_file():
        return None
    try:
        state = load_state(path)
        held = read_best(state.get("best"))
        own = held == progress.best or same_nets(state["nets"], model.nets)  # saved before it was found to be the best
    except (InputError, ValueError, TypeError, KeyError) as error:
        warn(f"{one_line(error)}; the next evaluation replaces it")
        return None
    if held is not None and own and held["metric"] == best_by:
        return held
    reason = "does not say its score"
    if held is not None:
        reason = (
            f"is of epoch {held['epoch']}{'' if own else ' of the branch that this run leaves'}, by {held['metric']}"
        )
    say(f"{path}: {reason}; the next evaluation replaces it")
    return None


# ---------------------------------------------------------------------------------------------
# A run that stands where another shall start


def leftovers(run_name: str) -> list[Path]:
    """List what an earlier run left under this name; names that no run writes are not ours."""
    folder = RUNS / run_name
    images = IMAGES / run_name
    names = ("latest.pt", "previous.pt", "best.pt", "G_AB.safetensors", "G_BA.safetensors")
    found = [folder / name for name in (*names, "run.json", "losses.csv", "measures.csv")]
    found += [*numbered_checkpoints(folder).values(), folder / "tensorboard"]
    found += [images / name for name in ("index.html", "losses.png", "watch", "test")]
    found += [path for path in images.glob("epoch_*.png") if path.stem[6:].isdecimal()]
    left = [path for path in found if path.exists()]
    return [] if left == [images / "test"] else left  # test.py --weights leaves that, without any run


def flag_changes(run_name: str, flags: dict) -> str:
    """Say in which flags a new start differs from the run that is in its folder, as far as its run.json tells."""
    try:
        old = json.loads((RUNS / run_name / "run.json").read_text(encoding="utf-8"))["flags"]
        changes = []
        for name, value in flags.items():
            if value is not None and name in old and name not in NEVER_INHERITED and old[name] != value:
                changes.append(f"--{name} {str(old[name])[:60]} → {str(value)[:60]}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "with flags that its run.json does not tell"
    return f"with other flags: {', '.join(changes)}" if changes else "with the same flags"


def refuse_second_run(run_name: str, overwrite: bool, flags: dict) -> None:
    """Refuse to start where a run is, unless it may be overwritten."""
    left = leftovers(run_name)
    if left and not overwrite:
        raise InputError(
            f"{left[0].parent} holds a run already, {flag_changes(run_name, flags)}; go on with --start_from latest, "
            "choose another --run_name, or delete it with --overwrite"
        )


def clear(run_name: str) -> list[Path]:
    """Delete what an earlier run left, but not its states and generators; returns the states that shall go later."""
    for path in leftovers(run_name):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.suffix not in (".pt", ".safetensors"):
            path.unlink()
    folder = RUNS / run_name
    return [folder / "previous.pt", folder / "best.pt", *numbered_checkpoints(folder).values()]


def run_description(flags: dict, counts: dict[str, int], model: CycleGAN) -> dict:
    """What run.json says: flags, versions, numbers of images and weights, where it runs."""
    others = {name: version(name) for name in ("torchvision", "pillow")}
    return {
        "flags": flags,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **others},
        "images": counts,
        "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in model.nets.items()},
        "device": str(model.device),
        "precision": model.precision,
        "threads": torch.get_num_threads(),
        "ranks": world_size(),
    }
