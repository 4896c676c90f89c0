"""What every stage shares: errors, flags, device, seeds, pictures, plots and files; knows no network.

Nothing here runs when it is imported.
"""

import argparse
import base64
import csv
import errno
import functools
import html
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from urllib.parse import quote

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

if os.name == "nt":
    import msvcrt
else:
    import fcntl

STATE_FORMAT = 1  # of the whole-state files; raised when an old reader could not follow
MEASURES = ("losses", "cycle", "identity", "paired")  # cheap enough to be taken during training
BEST_BY = {"PSNR": max, "SSIM": max, "cycle": min, "identity": min, "loss_G": min}  # and which value is best
MOST_VALUES = 10**5  # in a whole-state file; the largest network has thousands
CELL = 128  # px; smaller pictures are enlarged to this side in grids, by a whole factor


# ---------------------------------------------------------------------------------------------
# The one-line error exit


class InputError(Exception):
    """Wrong flag, folder, picture or file. One line: what was given, what was expected, what to do."""

    exit_code = 2


class RunError(Exception):
    """The program was used rightly and failed while running."""

    exit_code = 1


def one_line(text: object) -> str:
    """Make `text` safe to print: line breaks, control characters and broken unicode are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def say(text: object, file: object = None) -> None:
    """Print one line without tearing a progress bar apart; of many ranks the first speaks, errors come from all."""
    if rank() > 0 and file is not sys.stderr:
        return
    tqdm.write(one_line(text), file=file or sys.stdout)
    (file or sys.stdout).flush()


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit with 143 on which unfinished files are removed."""
    if threading.current_thread() is not threading.main_thread() or "TORCHELASTIC_RUN_ID" in os.environ:
        yield  # elsewhere Python takes no signals; and torchrun must be able to end ranks that wait for each other
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stage(main: Callable) -> Callable:
    """Decorate a stage's main: expected errors end in one line on stderr and their exit code."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> object:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a console that cannot write → must not end a training
                stream.reconfigure(errors="backslashreplace")
        try:
            with exit_on_sigterm():
                join_ranks()
                answer = main(argv)
                leave_ranks()
                return answer
        except (InputError, RunError) as error:
            code, words = error.exit_code, str(error)
        except OSError as error:
            code = 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2
            words = f"{error.filename or 'output'}: {error.strerror or error}; check the path, its rights and the space left"
        except (MemoryError, torch.OutOfMemoryError):
            code, words = 1, "out of memory; lower --batch_size, or --img_height and --img_width"
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason, code = str(error).strip().splitlines()[0], 1
            words = (
                f"a process that reads pictures died ({reason}); is the memory full? Lower --num_workers, then resume"
            )
        except KeyboardInterrupt:
            code, words = 130, "interrupted"
        if rank() > 0:  # what stops all ranks is said by the first; torchrun then ends the others during this wait
            time.sleep(3)
            words = f"rank {rank()}: {words}"
        say(f"error: {words}", file=sys.stderr)
        raise SystemExit(code) from None

    return run


# ---------------------------------------------------------------------------------------------
# Ranks: the processes that torchrun started, each with its share of every batch. A world of one is the ordinary case.
# Gradients are averaged by hand, in one message a step, and not by DistributedDataParallel: so a rank may work its
# share off in pieces, or again after it ran out of memory, while the others wait.

BEAT = 3  # seconds between two signs of life
SILENCE = 40  # seconds without one, after which a rank is taken for dead


def rank() -> int:
    """Number of this process among those of the run; 0 writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes work on the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks() -> None:
    """Meet the other processes, if torchrun started this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # the first rank may draw or test for long
    threading.Thread(target=watch_ranks, daemon=True).start()


def leave_ranks() -> None:
    """Wait until all ranks are done, the first with its writing, too."""
    if dist.is_initialized():
        agree(0)
        dist.destroy_process_group()


def watch_ranks() -> None:
    """Give signs of life, look for those of the others, and end this process when one fell silent.

    Needed beside torchrun, whose agents look after their own machine only, and beside the collectives: on a GPU
    they wait for hours.
    """
    me, heard = rank(), dict.fromkeys(range(world()), (0, time.monotonic()))
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        while dist.is_initialized():
            store.add(f"beat-{me}", 1)
            for other, (beats, since) in heard.items():
                now = store.add(f"beat-{other}", 0)
                heard[other] = (now, time.monotonic()) if now != beats else (beats, since)
            silent = [other for other, (_, since) in heard.items() if time.monotonic() - since > SILENCE]
            if silent:
                give_up(f"rank {silent[0]} has given no sign of life for {SILENCE} s")
            time.sleep(BEAT)
    except RuntimeError as error:  # torch raises it, also for a lost connection
        if dist.is_initialized():
            give_up(f"the first machine cannot be reached ({str(error).splitlines()[0][:80]})")


def give_up(reason: str) -> None:
    """End this process at once: its main thread may wait for a dead rank without end."""
    say(f"error: rank {rank()}: {reason}; go on from the last save with --start_from latest", file=sys.stderr)
    os._exit(1)


@contextmanager
def collective() -> Iterator[None]:
    """Turn torch's error about a lost rank into one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:100]
        raise RunError(f"lost another rank ({reason}); go on from the last save with --start_from latest") from error


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors (of one type, on one device) by their means over the ranks, in one message."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([x.detach().reshape(-1) for x in tensors])
    with collective():
        dist.all_reduce(flat)
    flat /= world()
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.detach().copy_(mean.view_as(x))


def agree(number: int) -> int:
    """The largest of the ranks' numbers; all ranks have to ask."""
    largest = torch.tensor(int(number))
    if world() > 1:
        with collective():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def gather(value: object) -> list:
    """The values of all ranks in their order, at the first; elsewhere an empty list."""
    if world() == 1:
        return [value]
    values = [None] * world() if rank() == 0 else None
    with collective():
        dist.gather_object(value, values)
    return values or []


def first_rank(function: Callable) -> Callable:
    """Decorate what writes: only the first rank runs it."""

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        return function(*args, **kwargs) if rank() == 0 else None

    return call


@contextmanager
def one_by_one() -> Iterator[None]:
    """Let the first rank run a block before the others, which then find its work done."""
    if rank() > 0:
        agree(0)
    yield
    if rank() == 0:
        agree(0)


def own_share(batch_size: int) -> slice:
    """The part of every batch that is this rank's."""
    if batch_size % world():
        fitting = max(1, round(batch_size / world())) * world()
        raise InputError(f"--batch_size {batch_size}: cannot be shared by {world()} ranks; expected such as {fitting}")
    share = batch_size // world()
    return slice(rank() * share, (rank() + 1) * share)


# ---------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error is one line and whose help shows each default once."""

    def __init__(self, **kwargs: object):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        raise InputError(f"{message}; all flags: python {self.prog} --help")


def flag_group(parser: Parser, title: str) -> Callable:
    """Return a function that declares flags under a heading, their defaults written into the help."""
    group = parser.add_argument_group(title)

    def add(*names: str, help: str, **kwargs: object) -> None:
        shown = kwargs.get("default") not in (None, []) and "default" not in help
        group.add_argument(*names, help=f"{help} (default: %(default)s)" if shown else help, **kwargs)

    return add


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """Name the flags that stand on the command line, as opposed to those left at their default."""
    unset = object()
    actions = [a for a in parser._actions if a.dest not in ("help", argparse.SUPPRESS)]
    args = parser.parse_args(argv, argparse.Namespace(**{a.dest: unset for a in actions}))
    return {name for name, value in vars(args).items() if value is not unset}


def recall_flags(
    parser: argparse.ArgumentParser, saved: object, what: object, skip: Sequence[str] = ()
) -> argparse.Namespace:
    """Read the flags of a checkpoint as if they had been typed, so that each is checked again.

    raises: InputError if there are none, or one would be refused on the command line
    """
    argv, unknown = [], []
    if not isinstance(saved, dict) or not saved:
        raise InputError(f"{what}: does not say its flags; written by another version, or no checkpoint")
    for action in parser._actions:
        if action.dest in skip or not action.option_strings or action.dest == "help":
            continue
        if action.dest not in saved:  # a flag that came later than the checkpoint has its default there
            unknown.append(f"--{action.dest}")
            continue
        value, option = saved[action.dest], action.option_strings[0]
        if isinstance(value, bool) or action.nargs == 0:
            off = f"--no-{option[2:]}" if isinstance(action, argparse.BooleanOptionalAction) else None
            argv += [option] if value else [off] * bool(off)
        elif isinstance(value, list | tuple):
            words = [f"./{v}" if str(v).startswith("-") else str(v) for v in value]
            words = words if action.nargs else [",".join(words)]
            argv += [option, *words] if value else []
        elif value is not None:
            argv.append(f"{option}={value}")
        elif action.default is not None:
            raise InputError(f"{what}: says --{action.dest} None; written by another program, or edited")
    if unknown:
        say(f"{what}: older than {', '.join(unknown)}; these have their defaults")
    try:
        return parser.parse_args(argv)
    except InputError as error:
        raise InputError(f"{what}: {str(error).split(';')[0]}") from None


def plain_flags(args: argparse.Namespace) -> dict:
    """The flags as plain values, which a file can hold without code."""

    def plain(value: object) -> object:
        return (
            [plain(v) for v in value] if isinstance(value, list) else str(value) if isinstance(value, Path) else value
        )

    return {name: plain(value) for name, value in vars(args).items() if name != "given"}


def whole(lowest: int, highest: int = 10**7) -> Callable[[str], int]:
    """Flag type: a whole number from `lowest` to `highest`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if not lowest <= value <= highest:
            limit = f"of at least {lowest}" + (f" and at most {highest}" if value > highest else "")
            raise argparse.ArgumentTypeError(f"given {text!r}, expected a whole number {limit}")
        return value

    return convert


def number(lowest: float, highest: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Flag type: a finite number from `lowest` (not itself, with above) to `highest`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and lowest <= value <= highest) or (above and value == lowest):
            limit = f"{'above' if above else 'of at least'} {lowest:g}"
            limit += f" and at most {highest:g}" if math.isfinite(highest) else ""
            raise argparse.ArgumentTypeError(f"given {text!r}, expected a number {limit}")
        return value

    return convert


def folder_name(text: str) -> str:
    """Flag type: one plain folder name, which cannot leave the folder that it is put into."""
    if not text or text in (".", "..") or text[0] == "-" or any(c in '/\\:*?"<>|' or not c.isprintable() for c in text):
        raise argparse.ArgumentTypeError(f'given {text!r}, expected one folder name without / \\ : * ? " < > |')
    return text


def path_name(text: str) -> Path:
    """Flag type: a path that is not empty (an empty one would mean the current folder)."""
    if not text:
        raise argparse.ArgumentTypeError("given '', expected a path")
    return Path(text)


def words_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Flag type: some of the choices, separated by commas."""

    def convert(text: str) -> list[str]:
        words = [word for word in text.split(",") if word]
        wrong = [word for word in words if word not in choices]
        if wrong:
            raise argparse.ArgumentTypeError(f"given {wrong[0]!r}, expected some of {','.join(choices)}")
        return words

    return convert


def epoch_name(text: str) -> str:
    """Flag type: a count of finished epochs, or one of the words latest and best."""
    return text if text in ("latest", "best") else str(whole(0)(text))


def add_data_flags(parser: Parser) -> None:
    """Which pictures, how large, how they are varied."""
    add = flag_group(parser, "data")
    add("--dataset_name", type=folder_name, default="horse2zebra", help="folder in --data_root with trainA and trainB")
    add("--data_root", type=Path, default=Path("datasets"), help="folder that holds the data sets")
    add("--batch_size", type=whole(1, 65536), default=10, help="pictures of each domain in a step, over all ranks")
    add("--img_height", type=whole(4, 16384), default=256, help="height of the training pictures, px")
    add("--img_width", type=whole(4, 16384), default=256, help="width of the training pictures, px")
    add("--channels", type=int, choices=(3, 1), default=3, help="3 colour, 1 grey")
    add("--load_scale", type=number(1, 8), default=1.12, help="resize to this times the size, then crop at random")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the pictures")
    add("--num_workers", type=whole(0), default=None, help="processes that read pictures (default: 0 on a CPU, else 4)")
    words = "keep pictures decoded and resized: in memory, or in .cache beside the data set, which you may delete"
    add("--cache", choices=("none", "ram", "disk"), default="none", help=words)
    add("--max_images", type=whole(1), help="use only the first so many pictures of each domain (default: all)")
    add("--steps_per_epoch", type=whole(1), help="steps in an epoch (default: until the larger domain was seen)")
    add_reading_flags(add)


def add_pixel_flag(add: Callable) -> None:
    """Declare --max_megapixels, which every stage that reads pictures has."""
    words = "larger pictures count as unreadable: a file of a few kB may claim any size; million pixels"
    add("--max_megapixels", type=number(0, 10**6, above=True), default=178.0, help=f"{words} (default: 178)")


def add_reading_flags(add: Callable) -> None:
    """What to do about pictures that cannot be read."""
    add_pixel_flag(add)
    words = "name an unreadable picture and go on (more than 5 %% of a domain end the run), or stop at the first"
    add("--on_bad_image", choices=("skip", "stop"), default="skip", help=words)


def add_loss_flags(parser: Parser) -> None:
    """Weights and forms of the objective."""
    add = flag_group(parser, "loss")
    add("--lambda_cycle", type=number(0), default=10.0, help="weight of the cycle loss")
    add("--lambda_identity", type=number(0), default=5.0, help="weight of the identity loss; 0 leaves it out")
    add("--lambda_gan", type=number(0), default=1.0, help="weight of the adversarial loss")
    add("--gan_loss", choices=("lsgan", "bce", "hinge"), default="lsgan", help="form of the adversarial loss")
    add("--buffer_size", type=whole(0), default=50, help="translated pictures kept to train the discriminators")
    add("--lambda_gp", type=number(0), default=0.0, help="weight of the discriminators' gradient penalty; 0: none")
    add("--gp_target", type=number(0), default=100.0, help="slope it aims at; UVCGAN: 0.1 and 100, UVCGAN2: 0.01 and 0")


def add_optim_flags(parser: Parser) -> None:
    """Adam and its schedule."""
    add = flag_group(parser, "optimiser")
    add("--num_epochs", type=whole(1), default=200, help="epochs in all")
    add("--decay_epoch", type=whole(0), help="from here the rate falls to 0 (default: half of --num_epochs)")
    add("--lr", type=number(0, above=True), default=2e-4, help="learning rate of Adam")
    add("--lr_D", type=number(0, above=True), help="rate of the discriminators (default: --lr; TTUR: 4 times)")
    add("--beta1", type=number(0, 0.999999), default=0.5, help="Adam's decay of the first moment")
    add("--beta2", type=number(0, 0.999999), default=0.999, help="Adam's decay of the second moment")
    words = "decay of the generators' running average, which is then what is shown, tested and shipped; 0: none"
    add("--ema", type=number(0, 0.999999), default=0.0, help=words)


def add_device_flags(parser: Parser) -> None:
    """Where and how precisely to compute."""
    add = flag_group(parser, "speed")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    words = "auto: bf16 where the device computes it natively, fp16 on older GPUs with tensor cores, else fp32"
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=words)


def pieces(text: str) -> int | str:
    """Flag type: how many pictures are worked off at once, or the word auto."""
    return text if text == "auto" else whole(1)(text)


def add_speed_flags(parser: Parser) -> None:
    """Where and how to train."""
    add_device_flags(parser)
    add = parser._action_groups[-1].add_argument
    words = "pictures of each domain that are worked off at once, gradients added up; auto: as many as fit"
    add("--micro_batch", type=pieces, default="auto", help=f"{words} (default: auto)")
    add("--compile", action="store_true", help="compile the networks into CUDA graphs; the first steps take minutes")


def add_run_flags(parser: Parser) -> None:
    """Names, intervals, seeds."""
    add = flag_group(parser, "run")
    add("--start_from", type=epoch_name, default="0", help="0: new; N: go on after epoch_N.pt; latest: after latest.pt")
    add("--run_name", type=folder_name, help="folder in saved_models and generated_images (default: --dataset_name)")
    add("--overwrite", action="store_true", help="delete what an earlier run left under this name")
    add("--sample_interval", type=whole(1), default=200, help="steps between two grids; one is at each epoch's end")
    add("--checkpoint_interval", type=whole(1), default=10, help="epochs between two checkpoints that are kept")
    add("--keep_checkpoints", type=whole(0), default=0, help="keep only the newest so many epoch_NNNN.pt; 0: all")
    add("--eval_interval", type=whole(0), default=0, help="epochs between two evaluations on val, else test; 0: none")
    kinds = {"type": words_of(MEASURES), "default": ["cycle", "identity"], "metavar": ",".join(MEASURES)}
    add("--eval_metrics", **kinds, help="what is evaluated, into measures.csv (default: cycle,identity)")
    add("--best_by", choices=BEST_BY, default=None, help="keep the epoch that evaluates best by this as best.pt")
    add("--save_minutes", type=number(0), default=10.0, help="minutes between two saves; 0: only after each epoch")
    add("--watch", type=Path, nargs="+", default=[], metavar="PHOTO", help="photos to translate after each epoch")
    add("--log", choices=("none", "tensorboard"), default="none", help="also log into saved_models/RUN/tensorboard")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="seed of all random choices")
    add("--deterministic", action="store_true", help="only algorithms that repeat bit for bit (a CPU does without)")


# ---------------------------------------------------------------------------------------------
# Device, precision, seeds


def pick_device(name: str) -> torch.device:
    """Turn a flag into a device that exists; auto takes a CUDA GPU, each rank its own, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise InputError(f"--device {name}: not on this machine; expected auto or one of {', '.join(found)}") from None
    if device.type == "meta":
        raise InputError("--device meta: holds no pictures; expected auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL and graphs work on the current one
    return device


def has_native_bf16(device: torch.device) -> bool:
    """Tell whether bfloat16 is computed by the hardware: CUDA from Ampere, CPUs with avx512_bf16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe)  # private names, so guarded


def pick_precision(name: str, device: torch.device) -> str:
    """Resolve --precision auto for a device.

    raises: InputError for fp16 where there is no loss scaling, or no gain: on anything but CUDA
    """
    best = "bf16" if has_native_bf16(device) else "fp32"
    if device.type == "cuda" and best == "fp32" and torch.cuda.get_device_capability(device) >= (7, 0):
        best = "fp16"  # tensor cores since Volta
    if name == "fp16" and device.type != "cuda":
        raise InputError(f"--precision fp16: needs a CUDA GPU; expected on {device.type}: {best}")
    return best if name == "auto" else name


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Compute the networks in half precision where `precision` says so; weights stay in float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def total_memory(device: torch.device) -> float:
    """Memory of a device in bytes; infinity where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def free_memory() -> float:
    """Memory that programs can still take, in bytes; infinity where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return math.inf


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python and torch; with deterministic, refuse algorithms that do not repeat."""
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)


def rng_state() -> dict:
    """Collect the states of all generators of random numbers, as plain values."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict) -> None:
    """Put back what rng_state collected; a different number of GPUs leaves theirs as seeded."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def linear_decay(epoch: int, num_epochs: int, decay_epoch: int) -> float:
    """Factor of the learning rate in the epoch that follows `epoch` finished ones.

    1 until decay_epoch, then falling in equal steps; it would be 0 after num_epochs.
    source: Zhu et al. 2017, section 4, "Training details"
    """
    return 1 - max(0, epoch - decay_epoch) / max(1, num_epochs - decay_epoch)


class StopRequest:
    """Turn Ctrl-C, SIGTERM and a lost terminal into a wish that the loop reads between two steps.

    A second one is obeyed at once. nohup's choice to ignore the loss of the terminal is kept.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
            hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
            ignored = signal.getsignal(hangup) == signal.SIG_IGN
            for signum in {signal.SIGINT, signal.SIGTERM, *([] if ignored else [hangup])}:
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and world() == 1:  # torchrun hands Ctrl-C on to ranks that had it already
            raise SystemExit(128 + signum)
        self.signum = signum

    def agreed(self) -> int:
        """The signal that this rank or another got, or 0; all ranks have to ask."""
        return agree(self.signum or 0)

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


# ---------------------------------------------------------------------------------------------
# Pictures. The two pairs below are the only places where values change their range


def bytes_to_range(x: Tensor) -> Tensor:
    """uint8 in [0, 255] → float32 in [-1, 1], any shape."""
    return x.float() / 127.5 - 1


def range_to_bytes(x: Tensor) -> Tensor:
    """[-1, 1] → clamp → round → uint8 in [0, 255], any shape.

    Without the clamp an answer of -1.01 would wrap to 255: red, green and white dots in the dark.
    """
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def picture_to_tensor(picture: Image.Image) -> Tensor:
    """An RGB or L picture → (3 or 1, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture))  # (H, W, 3) or (H, W)
    return bytes_to_range(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1))


def tensor_to_picture(x: Tensor) -> Image.Image:
    """(3 or 1, H, W) in [-1, 1] → an RGB or L picture."""
    pixels = range_to_bytes(x).cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def draw_grid(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Lay out labelled rows of pictures, one column per picture.

    rows: pairs of a label and (N, 3 or 1, H, W) in [-1, 1]; N and the size are the same in each row
    """
    columns = len(rows[0][1])
    pictures = range_to_bytes(torch.cat([x.float().cpu() for _, x in rows]))
    enlarge = max(1, CELL // max(pictures.shape[-2:]))
    pictures = pictures.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    tiles = make_grid(pictures, nrow=columns, padding=2, pad_value=255)  # (3, H', W')
    grid, font = Image.fromarray(tiles.permute(1, 2, 0).numpy()), ImageFont.load_default(14)
    margin = 12 + math.ceil(max(font.getlength(label) for label, _ in rows))
    sheet = Image.new("RGB", (margin + grid.width, grid.height), "white")
    sheet.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(sheet)
    for i, (label, _) in enumerate(rows):
        draw.text((6, (i + 0.5) * grid.height / len(rows)), label, fill="black", font=font, anchor="lm")
    return sheet


class FakeImageBuffer:
    """The last translated pictures, so that a discriminator also sees earlier answers.

    Until it is full every picture is kept and handed back; then each is, with probability 1/2,
    exchanged for a kept one.
    source: Shrivastava et al. 2017, section 2.3; size 50 in Zhu et al. 2017, section 4
    """

    def __init__(self, size: int, seed: object):
        self.size, self.images, self._rng = size, [], random.Random(str(seed))

    def exchange(self, images: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W) of new and older pictures, without gradient."""
        images, answer = images.detach(), []
        for image in images:
            if len(self.images) < self.size:
                self.images.append(image.clone())
            elif self.size and self._rng.random() < 0.5:
                i = self._rng.randrange(self.size)
                image, self.images[i] = self.images[i], image.clone()
            answer.append(image)
        return torch.stack(answer)

    def mark(self) -> tuple:
        """Note the present state, cheaply; pictures are replaced, never changed."""
        return list(self.images), self._rng.getstate()

    def back_to(self, mark: tuple) -> None:
        """Return to a noted state."""
        self.images = list(mark[0])
        self._rng.setstate(mark[1])

    def state_dict(self) -> dict:
        return {"images": [x.cpu() for x in self.images], "rng": self._rng.getstate()}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Put back a state; of a larger buffer only the first `size` pictures are kept."""
        self.images = [x.to(device) for x in state["images"]][: self.size]
        self._rng.setstate(state["rng"])


# ---------------------------------------------------------------------------------------------
# Files: every write is a temporary name, flush, fsync, rename


UMASK = threading.Lock()  # to read it is to change it, for all threads


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it replaces `path`, else it is removed."""
    temporary = path.with_name(f".{os.getpid()}-{threading.get_native_id()}.tmp")  # short: long names have a limit
    temporary.unlink(missing_ok=True)  # of a killed process with our number it may be a second name of a good file
    try:
        yield temporary
        with UMASK:
            os.umask(mask := os.umask(0))
        temporary.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        if error.errno:
            error.filename, error.filename2 = str(path), None  # what the user knows, not the temporary name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """Rename, so that also after a power cut the target is the old file or the new one."""
    source.replace(target)
    if os.name == "posix":  # the new name is on the disk when its folder is
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@first_rank
def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Write readable JSON; what JSON does not know (paths) becomes text."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name without a second copy, where the file system can; `target` is replaced whole."""
    with atomic_write(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


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


def attempt(write: Callable, *args: object) -> str:
    """Call what writes files and can be done later: returns "", or why it failed, which is said in one line."""
    try:
        write(*args)
    except OSError as error:
        reason = f"{error.filename or 'output'}: {error.strerror or error}"
        say(f"warning: {reason}; what was there stays, the run goes on and tries again next time", file=sys.stderr)
        return reason
    return ""


@contextmanager
def sole_process(folder: Path, *others: Path) -> Iterator[None]:
    """Lock a folder until the block or this process ends, whatever ends it; children do not inherit the lock.

    What a killed process left half written there, and in `others`, is removed.
    raises: InputError if another process holds the lock
    """
    if rank() > 0:
        yield
        return
    with (folder / ".lock").open("a+b", buffering=0) as file:
        file.seek(0)
        try:
            if os.name == "nt":
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would live on in forked workers
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                say(f"warning: {folder} cannot be locked ({error.strerror}); start no second run in it")
            else:
                owner = "another process" if os.name == "nt" else f"process {one_line(file.read(20).decode('latin-1'))}"
                words = "is training there; wait for its end, stop it, or choose another --run_name"
                raise InputError(f"{folder}: {owner} {words}") from None
        with suppress(OSError):
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        for place in (folder, *others):
            for path in place.glob(".*.tmp"):
                path.unlink()
        yield


def count_values(value: object) -> int:
    """Count nested plain values; a small file can hold copies of copies that no loop would come to the end of.

    raises: ValueError beyond MOST_VALUES, and for whole numbers that are too long to be printed
    """
    waiting, count = [value], 0
    while waiting:
        x, count = waiting.pop(), count + 1
        if count > MOST_VALUES or (isinstance(x, int) and x.bit_length() > 128):
            raise ValueError("more in it than a checkpoint has")
        if isinstance(x, dict):
            waiting += [*x.keys(), *x.values()]
        elif isinstance(x, list | tuple | set):
            waiting += x
    return count


def read_archive(path: Path) -> object:
    """Read any torch file as plain values and tensors; nothing in it is executed.

    raises: InputError if it is missing, damaged, or holds more than plain values
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                    raise ValueError("it would unpack to more than its own size")  # torch never compresses
                damaged = archive.testzip()
            if damaged:
                raise InputError(f"{path}: damaged (checksum of {damaged} is wrong); use another checkpoint")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's reader, about what a hostile file claims to be
            value = torch.load(path, map_location="cpu", weights_only=True)
        count_values(value)
        return value
    except InputError:
        raise
    except Exception as error:
        reason = one_line(str(error).strip().split("\n")[0][:120]) or type(error).__name__
        raise InputError(f"{path}: not a readable checkpoint of plain tensors and values ({reason})") from error


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
    return ", ".join(sorted(path.name for path in Path("saved_models").glob("*") if path.is_dir())) or "none"


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """The epoch_NNNN.pt files of a run by their epoch, in its order; other names are not ours."""
    found = {
        int(p.stem[6:]): p for p in folder.glob("epoch_*.pt") if re.fullmatch(r"[0-9]{4,}", p.stem[6:]) and p.is_file()
    }
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
        say(f"warning: {error}; using {previous}, step {one_line(state.get('step'))[:40]}", file=sys.stderr)
        return state, previous


class LossLog:
    """losses.csv: one row per interval, cut back when a run resumes from an earlier step."""

    def __init__(self, path: Path, columns: Sequence[str], last_step: int):
        self.path, self.columns, self._waiting = path, list(columns), ""
        kept = (
            [row for row in read_losses(path) if row.get("step", math.inf) <= last_step]
            if last_step and path.exists()
            else []
        )
        write_text(path, "".join(f"{line}\n" for line in [",".join(columns), *map(self._line, kept)]))

    def _line(self, row: dict) -> str:
        values = (row.get(name, math.nan) for name in self.columns)  # nan: not computed
        return ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values)

    @first_rank
    def append(self, row: dict) -> None:
        """Add a row; one that the disk does not take waits for the next, and for `flush`."""
        self._waiting += self._line(row) + "\n"
        with suppress(OSError):
            self._write()

    def flush(self) -> None:
        """Bring all rows to the disk; raises OSError if that is impossible."""
        self._write()
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())

    def _write(self) -> None:
        try:
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(self._waiting.encode()) < len(self._waiting):
                    file.truncate(end)  # no torn line, to which the next would be glued
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            error.filename = str(self.path)
            raise
        self._waiting = ""


def read_losses(path: Path) -> list[dict]:
    """Read losses.csv: epoch and step whole, the rest as numbers. A torn last line is left out."""
    rows = []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            try:
                rows.append({k: int(v) if k in ("epoch", "step") else float(v) for k, v in row.items()})
            except (TypeError, ValueError):
                break
    return rows


@first_rank
def plot_losses(rows: Sequence[dict], path: Path) -> None:
    """Draw a panel per loss and one with all its terms over steps: raw values pale, their running mean strong."""
    if not rows:
        return
    terms = [name for name in rows[0] if name not in ("epoch", "step", "lr") and not name.startswith("loss_")]
    panels = [[name] for name in rows[0] if name.startswith("loss_")] + [terms]
    figure = Figure(figsize=(12, 7), layout="constrained")
    steps, window = [row["step"] for row in rows], max(1, len(rows) // 25)
    for axes, names in zip(figure.subplots(2, 2).flat, panels, strict=False):
        for name in names:
            values = np.array([row[name] for row in rows])
            known, ones = np.isfinite(values), np.ones(window)
            if known.any():
                sums = np.convolve(np.where(known, values, 0), ones)[: len(values)]
                counts = np.convolve(known, ones)[: len(values)].clip(1)
                (line,) = axes.plot(steps, sums / counts, label=name, linewidth=1.5)
                axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.7)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="upper right", fontsize="small", ncols=2 if len(names) > 4 else 1)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


# ---------------------------------------------------------------------------------------------
# The live view: a page that opens from disk, and TensorBoard

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px system-ui, sans-serif; margin: 2em; color: #222; background: #fafafa }}
.row {{ display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 26px }}
figure {{ margin: 0 }} figcaption {{ color: #666; padding-top: 3px }}
img {{ display: block; width: 256px; max-width: 90vw; border-radius: 4px }} .wide img {{ width: 900px }} .small img {{ width: 150px }}
pre {{ background: #eee; padding: 1em; overflow-x: auto }} progress {{ width: 900px; max-width: 90vw; height: 1.2em }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
REFRESH = "<script>if (self === top) setTimeout(() => location.reload(), 15000)</script>"  # ms; not inside a notebook
MOMENTS = 8  # of a watched photo, from the first epoch to the newest
PAGE_SIDE = 900  # px; larger pictures are reduced in the page and open at full size


def write_page(path: Path, title: str, body: Sequence[str]) -> None:
    """Write a page of HTML; `body` is HTML already, the title is not."""
    write_text(path, PAGE.format(title=html.escape(title), body="\n".join(body)))


def figure(address: str, source: str, words: object) -> str:
    """HTML of a picture that links to its file; addresses are quoted already."""
    words = html.escape(one_line(words))
    return f'<figure><a href="{address}"><img loading="lazy" src="{source}" alt=""></a><figcaption>{words}</figcaption></figure>'


def embedded(folder: Path, path: Path, words: object) -> str:
    """HTML of a picture below `folder`: pixels inside, so that a notebook or a mail shows the page too; a link to the file."""
    with Image.open(path) as picture, io.BytesIO() as data:
        picture = picture.convert("RGB")
        picture.thumbnail((PAGE_SIDE, 4 * PAGE_SIDE))
        picture.save(data, format="jpeg", quality=88, subsampling=0)
        source = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    return figure(quote(os.fsencode(path.relative_to(folder).as_posix())), source, words)


def sample_pictures(folder: Path) -> list[Path]:
    """The grids epoch_NNNN.png of a folder, oldest first."""
    found = [path for path in folder.glob("epoch_*.png") if path.stem[6:].isdecimal()]
    return sorted(found, key=lambda path: int(path.stem[6:]))


@first_rank
def write_progress(folder: Path, title: str, facts: str, share: float, measures: Sequence[str]) -> None:
    """Write index.html of a run: how far it is, curves, newest grids, and how the watched photos changed.

    share: of the steps that are done, in [0, 1]; below 1 the page loads itself anew every 15 s
    measures: lines of a table
    """
    body = [REFRESH] if share < 1 else []
    body.append(f'<p>{html.escape(facts)}</p><p><progress value="{share:.4f}"></progress></p>')
    if (folder / "test" / "index.html").is_file():
        body.append('<p><a href="test/index.html">translated test pictures</a></p>')
    grids = sample_pictures(folder)[::-1]
    wide = [(grids[0], grids[0].stem)] if grids else []
    wide += [(folder / "losses.png", "losses")] if (folder / "losses.png").is_file() else []
    body += [f'<div class="wide">{embedded(folder, path, words)}</div>' for path, words in wide]
    body += [f"<pre>{html.escape(chr(10).join(measures))}</pre>"] if measures else []
    rows = [("earlier", "row", grids[1:4])] if grids[1:] else []
    for photo in sorted((folder / "watch").glob("*")):
        moments, last = sample_pictures(photo), MOMENTS - 1
        chosen = {round(k * (len(moments) - 1) / last) for k in range(MOMENTS)} if moments else ()
        rows.append((photo.name, "row small", [moments[i] for i in sorted(chosen)]))
    for words, kind, paths in rows:
        pictures = "".join(embedded(folder, path, path.stem) for path in paths)
        body.append(f'<h2>{html.escape(one_line(words))}</h2><div class="{kind}">{pictures}</div>')
    write_page(folder / "index.html", title, body)


def need_package(name: str, flag: str, command: str) -> None:
    """Refuse, in one line with the remedy, what needs an optional package that is missing."""
    if importlib.util.find_spec(name) is None:
        raise InputError(f"{flag}: the package {name} is missing; install it with: {command}")


class Board:
    """TensorBoard's log of a run, if there is to be one; it goes on where a resumed run goes on."""

    def __init__(self, folder: Path | None, step: int):
        self.writer = None
        if folder and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def add(self, step: int, values: dict[str, float], pictures: dict[str, Image.Image] | None = None) -> None:
        """Log numbers (those that are finite) and pictures by name; what the disk does not take is said, no more."""
        if self.writer:
            attempt(self._write, step, values, pictures or {})

    def _write(self, step: int, values: dict[str, float], pictures: dict[str, Image.Image]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self.writer.add_scalar(name, value, step)
        for name, picture in pictures.items():
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        if self.writer:
            attempt(self.writer.close)


class Meter:
    """Running sums of named losses; they stay on the device until somebody looks."""

    def __init__(self) -> None:
        self.sums, self.count = {}, 0
        self.recent: list[dict[str, Tensor]] = []  # what was added; not saved, since what was saved was finite

    def add(self, values: dict[str, Tensor]) -> None:
        self.count += 1
        self.recent.append({name: value.detach() for name, value in values.items()})
        for name, value in self.recent[-1].items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

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
        return {name: value.item() / max(1, self.count) for name, value in sums.items()}

    def state_dict(self) -> dict:
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "count": self.count}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.sums, self.count = ({name: value.to(device) for name, value in state["sums"].items()}, state["count"])
