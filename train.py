"""Train a CycleGAN: two generators and two discriminators on unpaired pictures of two domains.

python train.py --dataset_name day2night --img_height 64 --img_width 64 --num_residual 3
python train.py --dataset_name horse2zebra
python train.py --dataset_name horse2zebra --start_from latest
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import platform
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import datasets
import metrics
import models
import utils
import weights
from weights import DIRECTIONS

LOG_EVERY = 20  # steps between two rows of losses.csv
PLOT_SECONDS = 30  # at least, between two drawings of losses.png
COLUMNS = 6  # pictures in a sample grid
EVAL_PICTURES = 200  # of each domain, at most, in an evaluation
STUCK_SHARE = 0.02  # answers that differ less than this times the inputs do not depend on them
TERMS = ("loss_G", "loss_D_A", "loss_D_B", "gan_AB", "gan_BA", "cycle_A", "cycle_B", "identity_A", "identity_B")
VIT_FLAGS, RESNET_FLAGS = ("vit_size", "vit_blocks", "vit_heads"), ("num_residual", "ngf", "n_downsampling")
NETWORK_FLAGS = (
    *VIT_FLAGS,
    *("channels", "generator", "discriminator", "ngf", "ndf", "num_residual", "n_downsampling", "n_layers_D"),
    *("max_mult_D", "upsample", "norm", "norm_output", "pool_D"),
)
FIXED_FLAGS = (*NETWORK_FLAGS, "init", "freeze")  # a resumed run keeps them
NEVER_INHERITED = ("start_from", "overwrite", "device", "run_name")
PARTS = ("stem", "down", "blocks", "up", "head", "D")  # what --freeze can name


@dataclass
class Run:
    """Everything that learns or counts; what save_run writes is what load_run puts back."""

    args: argparse.Namespace
    device: torch.device
    precision: str
    nets: dict[str, nn.Module]
    optims: dict[str, torch.optim.Optimizer]
    buffers: dict[str, utils.FakeImageBuffer]
    samples: tuple[Tensor, Tensor]  # fixed pictures for the grids
    photos: dict[str, Tensor]  # watched ones, by name
    held_out: dict[str, Path]  # folders of the pictures to evaluate on, by domain
    ema: dict[str, nn.Module] = field(default_factory=dict)  # running averages of the generators, with --ema
    stage: str = "train"
    adapters: nn.ModuleDict = field(default_factory=nn.ModuleDict)  # of a distillation; they learn and are thrown away
    replaces: Sequence[Path] = ()  # states of an overwritten run; they go when the first of this one is saved
    saved_at: float = field(default_factory=time.monotonic)  # when a save was last tried, s
    unsaved: str = ""  # why the last save failed
    teacher: dict | None = None  # path and sha256 of the file a student learns from
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps
    place: int = 0  # finished steps of the epoch under way
    piece: int = 0  # pictures of a domain that are worked off at once; 0: all of a batch
    compiled: dict[str, Callable] = field(default_factory=dict)  # networks' calls by name, with --compile
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))  # for fp16
    meter: utils.Meter = field(default_factory=utils.Meter)
    board: utils.Board = field(default_factory=lambda: utils.Board(None, 0))  # with --log tensorboard

    @property
    def calls(self) -> dict[str, Callable]:
        """What the objective runs: the networks, compiled where that was asked for."""
        return {**self.nets, **self.compiled}

    @property
    def shown(self) -> dict[str, nn.Module]:
        """The networks to look at, test and ship: generators as their averages where these are kept."""
        return {**self.nets, **self.ema}

    @property
    def folder(self) -> Path:
        return Path("saved_models") / self.args.run_name

    @property
    def pictures(self) -> Path:
        return Path("generated_images") / self.args.run_name


@dataclass
class Feed:
    """Where the batches come from."""

    loader: DataLoader
    order: datasets.EpochSampler
    bad: dict[str, datasets.BadPictures]  # by domain
    counts: dict[str, int]  # pictures by domain


@dataclass
class Task:
    """What differs between training a teacher and distilling a student."""

    objective: Callable  # (run, real_A, real_B) → loss_G, terms, seen
    draw_rows: Callable  # (run, real_A, real_B) → labelled rows of a sample grid
    terms: Sequence[str]  # columns of losses.csv


# ---------------------------------------------------------------------------------------------
# The objective and the step


def together(net: nn.Module, *batches: Tensor) -> Sequence[Tensor]:
    """Run equally large batches through a network in one call; a batch norm would mix them, so it gets them apart."""
    if net.config.norm == "batch":
        return [net(batch) for batch in batches]
    return net(torch.cat(batches)).chunk(len(batches))


def first_pass(net: nn.Module, source: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Translate source pictures and, for the identity loss, target ones, in one call where `together` would.

    returns: fake, idt (None without target), and the hidden states of the source pictures, block by block
    """
    if target is None or net.config.norm == "batch":
        fake, hidden = net(source, return_hidden=True)
        return fake, None if target is None else net(target), hidden
    both, hidden = net(torch.cat([source, target]), return_hidden=True)
    fake, idt = both.chunk(2)
    return fake, idt, [state[: len(source)] for state in hidden]


def cyclegan_objective(run: Run, real_A: Tensor, real_B: Tensor) -> tuple[Tensor, dict[str, Tensor], dict]:
    """The generators' side of a step.

    real_A, real_B: (N, C, H, W) in [-1, 1]
    returns:        loss_G; its unweighted terms; what distillation looks at: fake_A, fake_B, and the
                    generators' hidden states as lists, hidden_AB and hidden_BA
    source:         Zhu et al. 2017, eq. 3; identity loss section 5.2
    """
    G_AB, G_BA, D_A, D_B = (run.calls[name] for name in ("G_AB", "G_BA", "D_A", "D_B"))
    args, with_identity = run.args, run.args.lambda_identity > 0
    with utils.autocast(run.device, run.precision):
        fake_B, idt_B, hidden_AB = first_pass(G_AB, real_A, real_B if with_identity else None)
        fake_A, idt_A, hidden_BA = first_pass(G_BA, real_B, real_A if with_identity else None)
        pictures = {"real_A": real_A, "rec_A": G_BA(fake_B), "real_B": real_B, "rec_B": G_AB(fake_A)}
        predictions = {"fake_A": D_A(fake_A), "fake_B": D_B(fake_B)}
        loss, terms = models.cyclegan_loss(
            pictures | {"idt_A": idt_A, "idt_B": idt_B},
            predictions,
            **{name: getattr(args, name) for name in models.LOSS_FLAGS},
        )
    return loss, terms, {"fake_A": fake_A, "fake_B": fake_B, "hidden_AB": hidden_AB, "hidden_BA": hidden_BA}


def judge(run: Run, domain: str, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminators' side of a step, for one of them; returns what it minimises, and its loss and penalty by name."""
    with utils.autocast(run.device, run.precision):
        on_real, on_fake = together(run.calls[f"D_{domain}"], real, fake)
        loss = models.gan_loss_D(on_real, on_fake, run.args.gan_loss)
    values = {f"loss_D_{domain}": loss}
    if run.args.lambda_gp and "D" in run.optims:  # in float32: a slope of slopes leaves bfloat16 few digits
        penalty = models.gradient_penalty(run.nets[f"D_{domain}"], real, fake, run.args.gp_target)
        loss, values = loss + run.args.lambda_gp * penalty, values | {f"gp_{domain}": penalty}
    return loss, values


def accumulate(run: Run, real_A: Tensor, real_B: Tensor, objective: Callable) -> dict[str, Tensor]:
    """Compute the gradients of a batch, piece by piece; returns its losses and terms by name, on the device."""
    size, losses, fakes = run.piece or len(real_A), defaultdict(float), {"A": [], "B": []}
    discriminators, learns = [run.nets["D_A"], run.nets["D_B"]], "D" in run.optims  # not with --freeze D
    for optim in run.optims.values():
        optim.zero_grad(set_to_none=True)

    def learn(loss: Tensor, values: dict[str, Tensor], count: int) -> None:
        share = count / len(real_A)
        if loss.requires_grad:
            run.scaler.scale(share * loss).backward()
        for name, value in values.items():
            losses[name] = losses[name] + share * value.detach()

    for net in discriminators:
        net.requires_grad_(False)  # they only judge here; their weights need no gradient
    for piece_A, piece_B in zip(real_A.split(size), real_B.split(size), strict=True):
        loss, terms, seen = objective(run, piece_A, piece_B)
        learn(loss, {"loss_G": loss, **terms}, len(piece_A))
        for domain, found in fakes.items():  # cloned, for a CUDA graph overwrites its answer in its next run
            found.append(seen[f"fake_{domain}"].detach().clone())
        del loss, terms, seen  # the next piece shall not have to fit beside them
    for net in discriminators:
        net.requires_grad_(learns)
    for domain, real in (("A", real_A), ("B", real_B)):
        fake = run.buffers[domain].exchange(torch.cat(fakes[domain]).to(real.dtype))
        for piece, fake_piece in zip(real.split(size), fake.split(size), strict=True):
            learn(*judge(run, domain, piece, fake_piece), len(piece))
    return dict(losses)


def train_step(run: Run, real_A: Tensor, real_B: Tensor, objective: Callable) -> dict[str, Tensor]:
    """One step of Zhu et al. 2017: both generators jointly, then both discriminators on buffered pictures.

    Out of memory, it begins again with pieces half as large, from the same random state; neither
    weights nor optimisers have changed by then.
    returns: losses and terms by name, on the device
    """
    if run.args.compile:
        torch.compiler.cudagraph_mark_step_begin()
    marks, random_state = [buffer.mark() for buffer in run.buffers.values()], utils.rng_state()
    while True:
        try:
            losses = accumulate(run, real_A, real_B, objective)
            break
        except torch.OutOfMemoryError:
            piece = run.piece or len(real_A)
            if piece == 1 or run.args.micro_batch != "auto" or run.nets["G_AB"].config.norm == "batch":
                raise
        run.piece = math.ceil(piece / 2)  # outside of `except`, which holds on to what was computed
        torch.cuda.empty_cache()
        words = f"the batch of {len(real_A)} is worked off in pieces of {run.piece} from now on"
        utils.say(f"out of memory: {words}", file=sys.stderr)
        for buffer, mark in zip(run.buffers.values(), marks, strict=True):
            buffer.back_to(mark)
        utils.set_rng_state(random_state)
    learning = [p for optim in run.optims.values() for group in optim.param_groups for p in group["params"]]
    statistics = [x for net in run.nets.values() for x in net.buffers() if x.is_floating_point()]  # of batch norms
    utils.average([*(p.grad for p in learning if p.grad is not None), *statistics])
    for optim in run.optims.values():
        run.scaler.step(optim)
    run.scaler.update()
    update_averages(run)
    return losses


@torch.no_grad()
def update_averages(run: Run) -> None:
    """Move the averages of the generators towards their weights; faster at first, so that the start is soon forgotten."""
    share = 1 - min(run.args.ema, (1 + run.step) / (10 + run.step))
    for name, average in run.ema.items():
        net = run.nets[name]
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), share)
        for own, theirs in zip(average.buffers(), net.buffers(), strict=True):
            own.copy_(theirs)


# ---------------------------------------------------------------------------------------------
# Looking at it


@torch.no_grad()
def translate(run: Run, net: nn.Module, pictures: Tensor) -> Tensor:
    """Run pictures (N, C, H, W) through a generator as testing will: eval mode, no gradient, float32 out."""
    was_training = net.training
    net.eval()
    with utils.autocast(run.device, run.precision):  # never the compiled call: sizes vary, graphs reuse memory
        answer = net(pictures.to(run.device)).float()
    net.train(was_training)
    return answer


def cyclegan_rows(run: Run, real_A: Tensor, real_B: Tensor) -> list[tuple[str, Tensor]]:
    """The labelled rows of a sample grid: pictures, translations, round trips."""
    G_AB, G_BA = run.shown["G_AB"], run.shown["G_BA"]
    fake_B, fake_A = translate(run, G_AB, real_A), translate(run, G_BA, real_B)
    rec_A, rec_B = translate(run, G_BA, fake_B), translate(run, G_AB, fake_A)
    rows = {"real_A": real_A, "fake_B": fake_B, "rec_A": rec_A, "real_B": real_B, "fake_A": fake_A, "rec_B": rec_B}
    return list(rows.items())


def load_samples(args: argparse.Namespace, dataset: Path) -> tuple[Tensor, Tensor]:
    """Read the fixed pictures that every grid shows: spread over the test (else val, else train) split."""
    split, size, samples = datasets.held_out_split(dataset), (args.img_height, args.img_width), []
    if split == "train":
        utils.say(f"{dataset}: no testA and testB with pictures, so the grids show training pictures")
    for domain in "AB":
        paths = datasets.list_pictures(dataset / f"{split}{domain}")
        chosen = paths[:: max(1, len(paths) // COLUMNS)][:COLUMNS]
        pictures = datasets.load_pictures(dataset / f"{split}{domain}", chosen, size, args.channels, args.on_bad_image)
        samples.append(torch.stack([picture for _, picture in pictures]))
    columns = min(map(len, samples))
    return samples[0][:columns], samples[1][:columns]


def load_watched(args: argparse.Namespace) -> dict[str, Tensor]:
    """Read the photos to follow, each with its own shape: its shorter side as long as that of the training pictures."""
    photos, shorter = {}, min(args.img_height, args.img_width)
    for path in args.watch:
        try:
            photo = datasets.read_picture(path, args.channels)
        except datasets.UnreadablePicture as error:
            raise utils.InputError(
                f"--watch {path}: not a readable picture ({error}); expected photos, such as PNG or JPEG"
            ) from None
        scale = shorter / min(photo.size)
        photo = photo.resize([min(4 * shorter, max(shorter, round(side * scale))) for side in photo.size])
        name = path.stem if path.stem.strip(".") else "photo"
        while name in photos:
            name += "_"
        photos[name] = utils.picture_to_tensor(photo)[None]
    return photos


def warn_if_stuck(rows: dict[str, Tensor]) -> None:
    """Say so when a generator answers (nearly) the same picture whatever it is shown.

    rows: a sample grid; a single picture tells nothing
    """
    spread = {label: pictures.float().std(0, correction=0).mean() for label, pictures in rows.items()}
    pairs = {"G_AB": ("real_A", "fake_B"), "G_BA": ("real_B", "fake_A")}
    stuck = [name for name, (asked, answer) in pairs.items() if spread[answer] < STUCK_SHARE * spread[asked]]
    if stuck:
        words = "draws the same picture whatever it is shown; go on from an earlier epoch, with --start_from N, at a lower --lr"
        utils.say(f"warning: {', '.join(stuck)}: {words}", file=sys.stderr)


@utils.first_rank
def draw_pictures(run: Run, draw_rows: Callable) -> None:
    """Write the sample grid of the epoch under way or just finished, and the watched photos."""
    name, rows = f"epoch_{run.epoch + bool(run.place):04d}.png", draw_rows(run, *run.samples)
    if not run.place:
        warn_if_stuck(dict(rows))
    drawn = {Path(): utils.draw_grid(rows)}
    for stem, photo in run.photos.items():
        rows = [("photo", photo), *((net, translate(run, run.shown[net], photo)) for net in DIRECTIONS)]
        drawn[Path("watch") / stem] = utils.draw_grid(rows)
    for folder, picture in drawn.items():
        utils.save_picture(picture, run.pictures / folder / name)
    run.board.add(run.step, {}, {folder.as_posix() if folder.name else "grid": p for folder, p in drawn.items()})


def find_held_out(args: argparse.Namespace, dataset: Path) -> dict[str, Path]:
    """Find the folders to evaluate on: of the val split, where there is one, else of the test split.

    raises: InputError if it has no pictures, or no pairs where --eval_metrics asks for them
    """
    if not args.eval_interval:
        return {}
    split = "val" if any((dataset / f"val{domain}").is_dir() for domain in "AB") else "test"
    folders = {domain: dataset / f"{split}{domain}" for domain in "AB"}
    names = []
    for folder in folders.values():
        paths = datasets.split_pictures(dataset, folder.name)
        names.append({path.relative_to(folder).with_suffix("") for path in paths})
    if "paired" in args.eval_metrics and not names[0] & names[1]:
        raise utils.InputError(
            f"--eval_metrics paired: no picture in {folders['A']} has the name of one in {folders['B']}; "
            "leave it out for unpaired sets"
        )
    return folders


@torch.no_grad()
def measure(run: Run) -> dict[str, float]:
    """Take the measures of --eval_metrics on the held-out pictures; each name ends in the domain it lives in."""
    args, row, size = run.args, {}, (run.args.img_height, run.args.img_width)
    reals = {
        d: datasets.named_pictures(folder, size, args.channels, args.on_bad_image, EVAL_PICTURES)
        for d, folder in run.held_out.items()
    }
    for source, target in ("AB", "BA"):
        there = functools.partial(translate, run, run.shown[f"G_{source}{target}"])
        back = functools.partial(translate, run, run.shown[f"G_{target}{source}"])
        fakes = {stem: there(x) for stem, x in reals[source].items()}
        if "cycle" in args.eval_metrics:
            row[f"cycle_{source}"] = metrics.mean_distance(
                [(back(fakes[stem]), x) for stem, x in reals[source].items()]
            )
        if "identity" in args.eval_metrics:
            row[f"identity_{target}"] = metrics.mean_distance([(there(x), x) for x in reals[target].values()])
        stems = sorted(fakes.keys() & reals[target].keys())
        if "paired" in args.eval_metrics and stems:
            both = ([utils.range_to_bytes(x[stem][0].cpu()) for stem in stems] for x in (fakes, reals[target]))
            scores = metrics.paired_scores(*both)
            row |= {f"{key}_{target}": scores[key] for key in ("PSNR", "SSIM", "match@1")}
    if "losses" in args.eval_metrics:
        flags = {name: getattr(args, name) for name in models.LOSS_FLAGS}
        pairs = zip(*(pictures.values() for pictures in reals.values()), strict=False)
        with utils.autocast(run.device, run.precision):
            row |= metrics.mean_row(
                [models.all_losses(run.shown, *(x.to(run.device) for x in p), **flags) for p in pairs]
            )
    return row


@utils.first_rank
def evaluate(run: Run) -> bool:
    """Measure, write the row into measures.csv, and tell whether this epoch is the best so far by --best_by."""
    row = {"epoch": run.epoch, "step": run.step, **measure(run)}
    path, best_by = run.folder / "measures.csv", run.args.best_by
    run.board.add(run.step, {f"measures/{name}": value for name, value in list(row.items())[2:]})
    if utils.attempt(lambda: utils.LossLog(path, list(row), run.step - 1).append(row)):
        return False
    utils.say("  ".join([f"epoch {run.epoch}:", *(f"{name} {value:.4g}" for name, value in list(row.items())[2:])]))
    if not best_by:
        return False
    rows = [
        [v for name, v in r.items() if name.rpartition("_")[0] == best_by or name == best_by]
        for r in utils.read_losses(path)
    ]
    scores = [sum(values) / len(values) for values in rows if values]
    return scores[-1] == utils.BEST_BY[best_by](scores) and scores.count(scores[-1]) == 1


# ---------------------------------------------------------------------------------------------
# Saving and resuming


def save_run(run: Run, feed: Feed, log: utils.LossLog, best: bool = False) -> None:
    """Save all that the run needs to go on; what fails now is said, kept in run.unsaved and tried again next time.

    best: the state shall also be kept as best.pt
    raises: RunError, before anything is written, if a loss or a weight is not finite
    """
    stop_if_not_finite(run, feed, run.meter.means())
    own = utils.gather(own_parts(run))
    run.unsaved, run.saved_at = utils.attempt(write_run, run, log, own, best), time.monotonic()


@utils.first_rank
def write_run(run: Run, log: utils.LossLog, own: Sequence[dict], best: bool) -> None:
    """Write the generator files, losses.csv and latest.pt, in which all counts as saved; where due epoch_NNNN.pt."""
    args = run.args
    recipe = {
        "stage": run.stage,
        "run_name": args.run_name,
        "dataset_name": args.dataset_name,
        "epoch": run.epoch,
        "step": run.step,
    }
    for name, direction in DIRECTIONS.items():
        recipe |= {"direction": direction, "size": [args.img_height, args.img_width]}
        weights.save_generator(run.folder / f"{name}.safetensors", run.shown[name], recipe)
    log.flush()
    due = run.place == 0 and run.epoch % args.checkpoint_interval == 0
    also = [run.folder / f"epoch_{run.epoch:04d}.pt"] * due + [run.folder / "best.pt"] * best
    utils.save_latest(run.folder, state_of(run, own), also)
    for path in {*run.replaces} - {*also}:
        path.unlink(missing_ok=True)
    run.replaces = ()
    kept = [path for epoch, path in utils.numbered_checkpoints(run.folder).items() if epoch <= run.epoch]
    for old in kept[: -args.keep_checkpoints] if due and args.keep_checkpoints else []:
        old.unlink()


def own_parts(run: Run) -> dict:
    """What of a state each rank has to itself."""
    buffers = {domain: buffer.state_dict() for domain, buffer in run.buffers.items()}
    return {"buffers": buffers, "rng": utils.rng_state(), "meter": run.meter.state_dict()}


def state_of(run: Run, own: Sequence[dict]) -> dict:
    """Everything that load_run puts back, as plain values and tensors; own: own_parts of each rank."""
    args = run.args
    state = {
        "stage": run.stage,
        "epoch": run.epoch,
        "step": run.step,
        "args": utils.plain_flags(args),
        "config": {name: dataclasses.asdict(net.config) for name, net in run.nets.items()},
        "nets": {name: net.state_dict() for name, net in run.nets.items()},
        "optims": {name: optim.state_dict() for name, optim in run.optims.items()},
        "schedules": {"num_epochs": args.num_epochs, "decay_epoch": args.decay_epoch},
        "buffers": own[0]["buffers"],
        "rng": own[0]["rng"],
        "loader": {"place": run.place, "meter": own[0]["meter"], "piece": run.piece},
        "other_ranks": own[1:],
        "ema": {name: net.state_dict() for name, net in run.ema.items()} or None,
        "scaler": run.scaler.state_dict() or None,
        "range": [-1, 1],
    }
    if run.teacher:
        state |= {"adapters": run.adapters.state_dict(), "teacher": run.teacher}
    return state


def load_run(run: Run, state: dict, path: Path) -> None:
    """Put a whole state back, so that the next step is the one that would have followed.

    raises: InputError if anything in it is not what save_run writes
    """
    try:
        for name, net in run.nets.items():
            weights.load_tensors(net, state["nets"][name], f"{path}, {name}")
        averages = state["ema"] or state["nets"]  # an average that begins now begins with the weights
        for name, net in run.ema.items():
            weights.load_tensors(net, averages[name], f"{path}, average of {name}")
        if run.teacher:
            weights.load_tensors(run.adapters, state["adapters"], f"{path}, adapters")
        for name, optim in run.optims.items():
            load_optim(optim, state["optims"][name])
        size, own = (run.args.channels, run.args.img_height, run.args.img_width), own_state(run, state)
        for domain, buffer in run.buffers.items():
            if own["buffers"]:
                buffer.load_state_dict(own["buffers"][domain], run.device)
            if any(image.shape != size for image in buffer.images):
                buffer.images = []
                utils.say(f"buffer of {domain} starts empty: its pictures have another size")
        run.epoch, run.step, run.place = state["epoch"], state["step"], state["loader"]["place"]
        run.piece = state["loader"].get("piece", 0)
        run.meter.load_state_dict(own["meter"], run.device)
        counts = run.epoch, run.step, run.place, run.piece, run.meter.count
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"epoch, step, place, piece, count are {counts}")
        run.meter.means()
        utils.set_rng_state(own["rng"])
        if state["scaler"] and run.scaler.is_enabled():
            run.scaler.load_state_dict(state["scaler"])
    except utils.InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise utils.InputError(f"{path}: no whole training state ({reason}); use another checkpoint") from error


def own_state(run: Run, state: dict) -> dict:
    """What of a state is this rank's alone: buffers, random numbers, sums of losses; says what another world changes."""
    first = {"buffers": state["buffers"], "rng": state["rng"], "meter": state["loader"]["meter"]}
    found = [first, *state.get("other_ranks", [])]
    if len(found) == utils.world():
        return found[utils.rank()]
    utils.say(
        f"saved by {len(found)} ranks, going on with {utils.world()}: the batches stay the same; buffers of pictures "
        "and random numbers of ranks that were not there start anew, so the numbers will differ from an unbroken run's"
    )
    new = {"buffers": None, "rng": utils.rng_state(), "meter": first["meter"]}
    return found[utils.rank()] | {"meter": first["meter"]} if utils.rank() < len(found) else new


def load_optim(optim: torch.optim.Optimizer, saved: dict) -> None:
    """Put back Adam's moments, checked: its fused kernels would run past a tensor that is too short."""
    own = optim.state_dict()
    optim.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})  # numbers come from the flags
    for weight, state in optim.state.items():
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        if not all(m.shape == weight.shape and m.dtype == weight.dtype and torch.isfinite(m).all() for m in moments):
            raise ValueError("a moment of Adam does not fit its weight")
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).reshape(())
        for key in ("exp_avg", "exp_avg_sq"):  # its fused kernels also take for granted that strides are the weight's
            state[key] = torch.empty_like(weight).copy_(state[key])


def resume_args(
    parser: utils.Parser, args: argparse.Namespace, saved: object, path: Path, fixed: Sequence[str] = FIXED_FLAGS
) -> argparse.Namespace:
    """Fill the flags that were not given from the checkpoint; refuse other networks, log other changes."""
    old, given = utils.recall_flags(parser, saved, path, NEVER_INHERITED), vars(args)
    for name in sorted(args.given - set(NEVER_INHERITED)):
        before, now = utils.plain_flags(old)[name], utils.plain_flags(args)[name]
        if before != now and name in fixed:
            raise utils.InputError(
                f"--{name} {now}: the run in {path.parent} was started with {before}; "
                "leave the flag out, or take another --run_name"
            )
        if before != now:
            utils.say(f"changed on resume: --{name} {before} → {now}")
    kept = {name: given[name] for name in {*args.given, *NEVER_INHERITED, "given"}}
    return argparse.Namespace(**{**vars(old), **kept})


def leftovers(args: argparse.Namespace) -> list[Path]:
    """List what an earlier run left under this name; names that no run writes are not ours."""
    folder, pictures = Path("saved_models") / args.run_name, Path("generated_images") / args.run_name
    names = ("latest.pt", "previous.pt", "best.pt", "G_AB.safetensors", "G_BA.safetensors")
    files = [folder / name for name in (*names, "run.json", "losses.csv", "measures.csv")]
    files += [
        *utils.numbered_checkpoints(folder).values(),
        folder / "tensorboard",
        pictures / "index.html",
        pictures / "losses.png",
        pictures / "watch",
        pictures / "test",
    ]
    files += utils.sample_pictures(pictures)
    return [path for path in files if path.exists()]


def flag_changes(args: argparse.Namespace) -> str:
    """Say in which flags a new start differs from the run that is in its folder, as far as its run.json tells."""
    try:
        there = json.loads((Path("saved_models") / args.run_name / "run.json").read_text(encoding="utf-8"))["flags"]
        now = {name: value for name, value in utils.plain_flags(args).items() if name not in NEVER_INHERITED}
        pairs = [(name, there[name], value) for name, value in now.items() if value is not None and name in there]
    except (OSError, ValueError, TypeError, KeyError):
        return "with flags that its run.json does not tell"
    changes = [f"--{name} {str(old)[:60]} → {str(new)[:60]}" for name, old, new in pairs if old != new]
    return f"with other flags: {', '.join(changes)}" if changes else "with the same flags"


def refuse_second_run(args: argparse.Namespace) -> None:
    """Refuse to start where a run is, unless with --overwrite."""
    left = leftovers(args)
    if left and not args.overwrite:
        raise utils.InputError(
            f"{left[0].parent} holds a run already, {flag_changes(args)}; go on with --start_from latest, "
            "choose another --run_name, or delete it with --overwrite"
        )


# ---------------------------------------------------------------------------------------------
# The loop


def training_loop(run: Run, feed: Feed, task: Task) -> None:
    """Run the epochs that are left; on Ctrl-C and SIGTERM save and exit with 130 or 143."""
    args, order, drawn = run.args, feed.order, -PLOT_SECONDS
    log = utils.LossLog(run.folder / "losses.csv", ["epoch", "step", "lr", *task.terms], run.step)
    total, done = args.num_epochs * order.steps, run.epoch * order.steps + run.place
    bar = tqdm(total=total, initial=done, unit="step", mininterval=0.5, smoothing=0.02, disable=utils.rank() > 0)
    utils.attempt(show_progress, run, total)
    run.board = utils.Board(run.folder / "tensorboard" if args.log == "tensorboard" else None, run.step)
    with utils.StopRequest() as stop, bar, contextlib.closing(run.board):
        signum = 0
        while run.epoch < args.num_epochs and not signum:
            factor = utils.linear_decay(run.epoch, args.num_epochs, args.decay_epoch)
            set_rates(run, factor)
            order.epoch, order.first_step = run.epoch, run.place
            bar.set_description(f"epoch {run.epoch + 1}/{args.num_epochs}", refresh=False)
            for batch in feed.loader:
                for domain, path, reason in batch["bad"]:
                    feed.bad[domain].note(path, reason)
                real_A, real_B = (batch[domain].to(run.device, non_blocking=True) for domain in "AB")
                run.meter.add(train_step(run, real_A, real_B, task.objective))
                run.step, run.place = run.step + 1, run.place + 1
                bar.update()
                ended = run.place == order.steps
                if run.meter.count == LOG_EVERY or ended:
                    means = run.meter.means()
                    stop_if_not_finite(run, feed, means)
                    log.append({"epoch": run.epoch + 1, "step": run.step, "lr": args.lr * factor, **means})
                    run.board.add(run.step, {"lr": args.lr * factor, **{f"losses/{k}": v for k, v in means.items()}})
                    bar.set_postfix({name: f"{means[name]:.3f}" for name in task.terms[:3]}, refresh=False)
                    run.meter = utils.Meter()
                if ended:
                    run.epoch, run.place = run.epoch + 1, 0
                if ended or run.step % args.sample_interval == 0:
                    utils.attempt(draw_pictures, run, task.draw_rows)
                    if not ended and time.monotonic() - drawn > PLOT_SECONDS:
                        utils.attempt(show_progress, run, total)
                        drawn = time.monotonic()
                signum = stop.agreed()
                if signum:
                    break
                if not ended and utils.agree(0 < 60 * args.save_minutes < time.monotonic() - run.saved_at):
                    save_run(run, feed, log)
            due = run.place == 0 and args.eval_interval and run.epoch % args.eval_interval == 0
            save_run(run, feed, log, best=bool(due) and evaluate(run))
            if time.monotonic() - drawn > PLOT_SECONDS or run.epoch == args.num_epochs or signum:
                utils.attempt(show_progress, run, total)
                drawn = time.monotonic()
    feed.loader = None  # its workers end now; when the program exits, it would wait up to 5 s for each
    if utils.agree(bool(run.unsaved)):
        raise utils.RunError(f"{run.unsaved}; the last save failed, {last_state(run)}; free the disk and go on from it")
    if signum:
        utils.say(
            f"stopped and saved after step {run.step}; go on with: --run_name {args.run_name} --start_from latest"
        )
        utils.leave_ranks()
        raise SystemExit(128 + signum)


def loss_names(args: argparse.Namespace) -> tuple[str, ...]:
    """Columns of losses.csv."""
    return (*TERMS, "gp_A", "gp_B") if args.lambda_gp else TERMS


def set_rates(run: Run, factor: float) -> None:
    """Set what the flags say about the optimisers, which a resumed run may have changed."""
    rates = {"G": run.args.lr, "D": run.args.lr_D or run.args.lr}
    for name, optim in run.optims.items():
        for group in optim.param_groups:
            group["lr"], group["betas"] = rates[name] * factor, (run.args.beta1, run.args.beta2)


@utils.first_rank
def show_progress(run: Run, total: int) -> None:
    """Draw losses.csv, and write the page that shows where the run is; total: steps of all epochs."""
    args, measures = run.args, run.folder / "measures.csv"
    utils.plot_losses(utils.read_losses(run.folder / "losses.csv"), run.pictures / "losses.png")
    done = f"{run.epoch} of {args.num_epochs} epochs" + f" and {run.place} steps of the next" * bool(run.place)
    facts = f"{done}; step {run.step:,}; written {time.strftime('%H:%M:%S')}"
    rows = utils.read_losses(measures)[-12:] if measures.is_file() else []
    table = metrics.format_table({f"epoch {row['epoch']}": dict(list(row.items())[2:]) for row in rows}) if rows else []
    share = min(1.0, run.epoch / args.num_epochs + run.place / total)
    utils.write_progress(run.pictures, args.run_name, facts, share, table)


def last_state(run: Run) -> str:
    """Say where a run that ends badly can go on."""
    last = run.folder / "latest.pt"  # of an overwritten run until the first save
    return f"the last good state is {last}" if last.exists() and not run.replaces else "nothing was saved yet"


def stop_if_not_finite(run: Run, feed: Feed, means: dict[str, float]) -> None:
    """End the run when a loss or a weight is not a number any more; the last save stays."""
    wrong = []
    for name, net in run.nets.items():
        if not all(torch.isfinite(p).all() for p in net.parameters()):
            wrong.append(f"a weight of {name}")
    if wrong or not all(map(math.isfinite, means.values())):
        terms, ago = run.meter.first_not_finite()
        feed.order.first_step = (run.place or feed.order.steps) - 1 - ago
        keys, paths = next(iter(feed.order)), feed.loader.dataset.paths
        pictures = [str(paths[domain][key[i]]) for domain, i in (("A", 2), ("B", 3)) for key in keys]
        found = utils.gather((bool(terms), ago, terms, pictures))  # the rank that met it first knows more
        _, ago, terms, pictures = max(found, default=(False, ago, terms, pictures))
        raise utils.RunError(
            f"{', '.join(terms or wrong)} not finite at step {run.step - ago}, pictures {' '.join(pictures)}; "
            f"{last_state(run)}; try a smaller --lr or --precision fp32"
        )


# ---------------------------------------------------------------------------------------------
# Building a run


def network_configs(args: argparse.Namespace) -> tuple[models.GeneratorConfig, models.DiscriminatorConfig]:
    """Turn the network flags into recipes, checked against the size of the pictures."""
    names = (field.name for field in dataclasses.fields(models.GeneratorConfig))
    try:
        generator = models.GeneratorConfig(**{name: getattr(args, name) for name in names})
    except ValueError as error:
        raise utils.InputError(f"--{error}") from error
    discriminator = models.DiscriminatorConfig(
        discriminator=args.discriminator,
        channels=args.channels,
        ndf=args.ndf,
        n_layers=args.n_layers_D,
        max_mult=args.max_mult_D,
        norm=args.norm,
        pool=args.pool_D,
    )
    check_sizes(args, generator, discriminator)
    return generator, discriminator


def check_sizes(
    args: argparse.Namespace, generator: models.GeneratorConfig, discriminator: models.DiscriminatorConfig
) -> None:
    """Raise InputError if the pictures are too small for a network, with the nearest that fits."""
    side = min(args.img_height, args.img_width)
    given = f"pictures of {args.img_width}x{args.img_height} px"
    if side < generator.smallest_side:
        raise utils.InputError(
            f"{given}: {generator.halvings} downsamplings need at least {generator.smallest_side} px a side; "
            "raise --img_height and --img_width, or lower --n_downsampling"
        )
    if discriminator.map_side(side) < 1:
        most = discriminator.largest_n_layers(side)
        remedy = f"the largest --n_layers_D that fits is {most}" if most else "take --discriminator pixel"
        raise utils.InputError(f"--n_layers_D {discriminator.n_layers}: its answer to {given} would be empty; {remedy}")


def check_memory(args: argparse.Namespace, generator: models.GeneratorConfig, device: torch.device) -> None:
    """Raise InputError if the tokens of a unet_vit cannot be held, before anything starts."""
    size, free = (args.img_height, args.img_width), utils.total_memory(device)
    share = args.batch_size // utils.world()
    smallest = args.micro_batch if args.micro_batch != "auto" else 1 if device.type == "cuda" else share
    wanted = (
        6 * min(share, smallest) * generator.token_bytes(*size)
    )  # six pictures of each pair pass a generator in a step
    if generator.tokens(*size) and wanted > free:
        raise utils.InputError(
            f"--generator unet_vit: {generator.tokens(*size):,} tokens a picture at {size[1]}x{size[0]} px take about "
            f"{wanted / 2**30:.0f} GiB in a step, and {device} has {free / 2**30:.0f}; lower --img_height and --img_width, "
            "--batch_size or --vit_blocks, or take --vit_size uvcgan (16 times fewer tokens) or --generator resnet"
        )


def make_feed(args: argparse.Namespace, device: torch.device) -> tuple[Path, Feed]:
    """Find the pictures, drawing the demo set when it is missing, and make their loader."""
    datasets.limit_pixels(1e6 * args.max_megapixels)
    share = utils.own_share(args.batch_size)
    with utils.one_by_one():
        if args.dataset_name == datasets.DEMO and not (args.data_root / datasets.DEMO).exists():
            datasets.draw_dataset(args.data_root)
    dataset, paths, bad = datasets.find_dataset(args.data_root, args.dataset_name), {}, {}
    for domain in "AB":
        found = datasets.split_pictures(dataset, f"train{domain}", args.max_images)
        bad[domain] = datasets.BadPictures(dataset / f"train{domain}", len(found), args.on_bad_image)
        paths[domain] = bad[domain].readable(found)
    counts = {domain: len(found) for domain, found in paths.items()}
    order = datasets.EpochSampler(tuple(counts.values()), args.batch_size, args.steps_per_epoch, args.seed, share)
    size = (args.img_height, args.img_width)
    pictures = datasets.UnpairedDataset(paths, size, args.channels, args.load_scale, args.flip, args.seed)
    workers = args.num_workers if args.num_workers is not None else (0 if device.type == "cpu" else 4)
    if args.cache != "none":
        pictures.caches = datasets.make_caches(args.cache, paths, pictures.load_size, args.channels, dataset, workers)
    loader = datasets.make_loader(pictures, order, workers, pin_memory=device.type == "cuda")
    utils.say(
        f"{dataset}: {counts['A']} pictures in trainA, {counts['B']} in trainB; {order.steps} steps of {args.batch_size} an epoch"
    )
    return dataset, Feed(loader, order, bad, counts)


def make_optims(nets: dict[str, nn.Module], args: argparse.Namespace, device: torch.device) -> dict:
    """One Adam for all whose names begin with G, one for the discriminators; frozen weights stay out."""
    optims = {}
    for letter in "GD":
        weights = [p for name, net in nets.items() if name.startswith(letter) for p in net.parameters()]
        weights = [p for p in weights if p.requires_grad]
        if weights:
            fused = device.type in ("cpu", "cuda")
            optims[letter] = torch.optim.Adam(weights, args.lr, (args.beta1, args.beta2), fused=fused)
    return optims


def freeze(nets: dict[str, nn.Module], parts: Sequence[str]) -> None:
    """Take the named parts of all generators ("D": the discriminators) out of learning, and say what is left."""
    for name, net in nets.items():
        children = {"D": net} if name.startswith("D") else dict(net.named_children())
        for part, module in children.items():
            module.requires_grad_(part not in parts)
        if parts:
            words = (f"{part} {'frozen' if part in parts else 'learns'}" for part in children)
            utils.say(f"{name}: {', '.join(words)}")


def load_pretrained(args: argparse.Namespace) -> tuple[argparse.Namespace, dict[str, nn.Module]]:
    """Read the files of --init_from and take the network flags that were not given from them."""
    nets: dict[str, nn.Module] = {}
    for path in args.init_from:
        net, recipe = weights.load_generator(path)
        name = {direction: name for name, direction in DIRECTIONS.items()}.get(recipe["direction"])
        if name is None:
            name = "G_BA" if "G_AB" in nets else "G_AB"
            utils.say(f"{path}: does not say its direction; taken for {name}")
        if name in nets:
            raise utils.InputError(
                f"--init_from {path}: a second file for {name}; expected one file for each direction"
            )
        config = {key: value for key, value in dataclasses.asdict(net.config).items() if hasattr(args, key)}
        for key, value in config.items():
            if (key in args.given or nets) and getattr(args, key) != value:
                raise utils.InputError(
                    f"--init_from {path}: its network has {key} {value}, not {getattr(args, key)}; leave the flag out"
                )
        args, nets[name] = argparse.Namespace(**{**vars(args), **config}), net
        utils.say(f"{name} starts from {path}")
    for name in DIRECTIONS if nets else ():
        if name not in nets:
            utils.say(f"{name} starts new: --init_from names no file for it")
    return args, nets


def make_nets(args: argparse.Namespace, pretrained: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Build the four networks, freshly seeded; `pretrained` generators take the place of new ones."""
    utils.seed_everything(args.seed, args.deterministic)
    generator, discriminator = network_configs(args)
    nets = {name: models.build_generator(generator, args.init) for name in DIRECTIONS}
    nets |= {name: models.build_discriminator(discriminator, args.init) for name in ("D_A", "D_B")}
    nets |= {name: net.train() for name, net in pretrained.items()}
    freeze(nets, args.freeze)
    if not any(p.requires_grad for name in DIRECTIONS for p in nets[name].parameters()):
        raise utils.InputError(f"--freeze {','.join(args.freeze)}: no part of the generators is left to learn")
    return nets


def make_run(
    args: argparse.Namespace,
    nets: dict[str, nn.Module],
    dataset: Path | None,
    device: torch.device,
    **distillation: object,
) -> Run:
    """Put networks on their device and make all that belongs to them; `distillation` are the fields that it adds.

    dataset: None where nothing is looked at, as in benchmarks
    """
    check_memory(args, nets["G_AB"].config, device)
    if nets["G_AB"].config.norm == "batch" and args.micro_batch != "auto":
        words = "a batch norm would see the pieces, not the batch"
        raise utils.InputError(f"--micro_batch {args.micro_batch}: {words}; leave it out, or lower --batch_size")
    learning = nets | {"G_adapters": distillation.get("adapters", nn.ModuleDict())}
    precision = utils.pick_precision(args.precision, device)
    for net in learning.values():
        net.to(device)
    compiled = compile_nets(nets, device) if args.compile else {}
    torch.manual_seed(args.seed + utils.rank())  # equal weights, then numbers of one's own
    return Run(
        args=args,
        device=device,
        precision=precision,
        nets=nets,
        compiled=compiled,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        piece=0 if args.micro_batch == "auto" else args.micro_batch,
        optims=make_optims(learning, args, device),
        buffers={
            domain: utils.FakeImageBuffer(args.buffer_size, f"{args.seed}-buffer-{domain}{utils.rank() or ''}")
            for domain in "AB"
        },
        samples=load_samples(args, dataset) if dataset else (),
        photos=load_watched(args),
        held_out=find_held_out(args, dataset),
        ema={name: copy.deepcopy(nets[name]).requires_grad_(False) for name in DIRECTIONS if args.ema},
        **distillation,
    )


def compile_nets(nets: dict[str, nn.Module], device: torch.device) -> dict[str, Callable]:
    """Compile the networks, into CUDA graphs, as second names, so that those in a state stay as they are.

    raises: InputError on anything but CUDA
    """
    if device.type != "cuda":
        raise utils.InputError(f"--compile: gains nothing on {device.type} (benchmarks/NOTES.md); leave the flag out")
    return {name: torch.compile(net, mode="reduce-overhead", dynamic=False) for name, net in nets.items()}


def describe(run: Run, feed: Feed) -> None:
    """Write run.json and say what is about to learn, on what."""
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in run.nets.items()}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
    }
    facts = {"flags": utils.plain_flags(run.args), "versions": versions, "pictures": feed.counts, "parameters": counts}
    facts |= {
        "device": str(run.device),
        "precision": run.precision,
        "threads": torch.get_num_threads(),
        "ranks": utils.world(),
    }
    utils.write_json(run.folder / "run.json", facts)
    utils.say(
        f"parameters: {', '.join(f'{name} {count:,}' for name, count in counts.items())}; {run.device}, {run.precision}"
    )
    utils.say(f"watch {run.pictures}/index.html ; checkpoints go to {run.folder}/")


# ---------------------------------------------------------------------------------------------
# The command line


def add_network_flags(parser: utils.Parser) -> None:
    """Shapes of the networks; they travel in every checkpoint, so that no later stage asks again."""
    add = utils.flag_group(parser, "network")
    add("--generator", choices=models.GENERATORS, default="resnet", help="kind of generator")
    add("--num_residual", type=utils.whole(0, 1000), default=9, help="residual blocks of a resnet")
    add("--ngf", type=utils.whole(1, 4096), default=64, help="width of the first layer of a resnet")
    add("--n_downsampling", type=int, choices=range(5), default=2, help="halvings of the picture in a resnet")
    add("--vit_size", choices=models.VIT_SIZES, default="small", help="unet_vit of the 64x64 study, or UVCGAN's")
    add("--vit_blocks", type=utils.whole(0, 1000), help="blocks of a unet_vit (default: 4 in small, 12 in uvcgan)")
    add("--vit_heads", type=utils.whole(1, 4096), help="heads of a unet_vit (default: 4 in small, 6 in uvcgan)")
    add("--upsample", choices=models.UPSAMPLES, default="deconv", help="transposed convolution, or resize and convolve")
    add("--discriminator", choices=models.DISCRIMINATORS, default="patch", help="judge patches or single pixels")
    add("--ndf", type=utils.whole(1, 4096), default=64, help="width of the discriminator's first layer")
    add("--n_layers_D", type=utils.whole(1, 16), default=3, help="strided layers of D: 1 to 5 see 16 34 70 142 286 px")
    add("--max_mult_D", type=utils.whole(1, 4096), default=8, help="D grows to at most this times --ndf")
    add("--pool_D", action="store_true", help="average the discriminator's answers to one per picture")
    add("--norm", choices=models.NORMS, default="instance", help="norm in all networks")
    add("--norm_output", action="store_true", help="norm before the generator's tanh: stalls learning, kept to show it")
    add("--init", choices=models.INITS, default="normal", help="how weights start")


def add_transfer_flags(parser: utils.Parser) -> None:
    """Starting from weights that exist."""
    add = utils.flag_group(parser, "transfer")
    files = {"type": Path, "nargs": "+", "default": [], "metavar": "FILE"}
    add("--init_from", **files, help="generator files to start from, one per direction")
    parts = {"type": utils.words_of(PARTS), "default": [], "metavar": ",".join(PARTS)}
    add("--freeze", **parts, help="parts that do not learn (default: none)")


def make_parser() -> utils.Parser:
    """Declare all flags of this stage."""
    parser = utils.Parser(prog="train.py", description=__doc__)
    groups = (utils.add_data_flags, add_network_flags, utils.add_loss_flags, utils.add_optim_flags)
    for add_flags in (*groups, add_transfer_flags, utils.add_run_flags, utils.add_speed_flags):
        add_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; args.given names the flags that stand on it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.given = utils.given_flags(parser, argv)
    args.run_name = args.run_name or args.dataset_name
    refuse_contradictions(parser, args)
    strange = args.given & set(VIT_FLAGS if args.generator == "resnet" else RESNET_FLAGS)
    if strange and args.start_from == "0" and not args.init_from:
        parser.error(f"--{min(strange)}: has no meaning for --generator {args.generator}: leave it out")
    return args


def refuse_contradictions(parser: utils.Parser, args: argparse.Namespace) -> None:
    """Refuse flags that speak of a new start together with --start_from."""
    for flag in ("overwrite", "init_from"):
        if flag in args.given and args.start_from != "0":
            words = f"contradicts --start_from {args.start_from}, which goes on with a run"
            parser.error(f"--{flag} {words}: give one of them")


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Fill the defaults that depend on another flag, and refuse flags that need another one."""
    if "gp_target" in args.given and not args.lambda_gp:
        raise utils.InputError(f"--gp_target {args.gp_target:g}: has no effect without --lambda_gp; give both or none")
    if "best_by" in args.given and args.best_by:
        needed = {"PSNR": "paired", "SSIM": "paired", "loss_G": "losses"}.get(args.best_by, args.best_by)
        if not args.eval_interval or needed not in args.eval_metrics:
            raise utils.InputError(
                f"--best_by {args.best_by}: needs --eval_interval and {needed} among --eval_metrics; give them, or leave it out"
            )
    if args.log == "tensorboard":
        utils.need_package("tensorboard", "--log tensorboard", "pip install tensorboard")
    if args.decay_epoch is not None and "decay_epoch" in args.given and args.decay_epoch > args.num_epochs:
        raise utils.InputError(
            f"--decay_epoch {args.decay_epoch}: beyond --num_epochs {args.num_epochs}; expected at most that"
        )
    defaults = {"decay_epoch": args.num_epochs // 2}
    if hasattr(args, "vit_size"):  # a distillation takes them from its teacher
        size = models.VIT_SIZES[args.vit_size]
        defaults |= {"vit_blocks": size.blocks, "vit_heads": size.heads}
    unset = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    return argparse.Namespace(**{**vars(args), **unset})


def clear(args: argparse.Namespace) -> list[Path]:
    """Delete what an earlier run left, but not its states and generators; returns the states that shall go later."""
    refuse_second_run(args)  # again, now that no other process can start here
    left = leftovers(args)
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.suffix not in (".pt", ".safetensors"):
            path.unlink()
    folder = Path("saved_models") / args.run_name
    return [folder / "previous.pt", folder / "best.pt", *utils.numbered_checkpoints(folder).values()]


def carry_out(run: Run, feed: Feed, task: Task, state: dict | None, checkpoint: Path | None) -> None:
    """Put a checkpoint back, if there is one, and run the loop to its end."""
    args = run.args
    if state:
        load_run(run, state, checkpoint)
        utils.say(f"going on after epoch {run.epoch}, step {run.step} of {checkpoint}")
        if run.place >= feed.order.steps:
            utils.say(f"epochs have {feed.order.steps} steps now, and {run.place} of this one are done: it is finished")
            run.epoch, run.place = run.epoch + 1, 0
        if run.epoch >= args.num_epochs:
            utils.say(
                f"nothing left to do: {run.epoch} of {args.num_epochs} epochs are finished; raise --num_epochs to go on"
            )
            return
    for folder in (run.folder, run.pictures):
        folder.mkdir(parents=True, exist_ok=True)
    with utils.sole_process(run.folder, run.pictures):
        with utils.one_by_one():
            if utils.rank() == 0 and not state:
                run.replaces = clear(args)
            elif utils.rank() == 0 and checkpoint.name == "previous.pt":
                utils.link_file(checkpoint, run.folder / "latest.pt")  # or the next save keeps the damaged one
        describe(run, feed)
        training_loop(run, feed, task)
    grid = run.pictures / f"epoch_{run.epoch:04d}.png"
    utils.say(
        f"done: {run.epoch} epochs, {run.step} steps; see {grid}, then: python test.py --run_name {args.run_name}"
    )


@utils.stage
def main(argv: Sequence[str] | None = None) -> None:
    """Train, from the start or from a checkpoint."""
    args = parse_args(argv)
    state, checkpoint, pretrained = None, None, {}
    if args.start_from != "0":
        folder = Path("saved_models") / args.run_name
        state, checkpoint = utils.load_checkpoint(folder, args.start_from, "--start_from", "train")
        args = resume_args(make_parser(), args, state.get("args"), checkpoint)
    else:
        refuse_second_run(args)
        args, pretrained = load_pretrained(args)
    args = settle(args)
    network_configs(args)
    device = utils.pick_device(args.device)
    dataset, feed = make_feed(args, device)
    run = make_run(args, make_nets(args, pretrained), dataset, device)
    carry_out(run, feed, Task(cyclegan_objective, cyclegan_rows, loss_names(args)), state, checkpoint)


if __name__ == "__main__":
    main()
