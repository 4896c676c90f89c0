"""Train a CycleGAN: two generators and two discriminators on unpaired images of two domains.

python train.py --dataset_name day2night --img_height 64 --img_width 64 --num_residual 3
python train.py --dataset_name horse2zebra
python train.py --dataset_name horse2zebra --start_from latest
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports last: no traceback out of them

import dataclasses
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import datasets
import models
import utils
from cyclegan import TERMS, CycleGAN, LossConfig, OptimConfig, generator_loss, linear_decay, loss_names
from datasets import Feed
from toolkit import checkpoints, cli, devices, distributed, executor, files, metrics, process, synthetic
from toolkit.checkpoints import IMAGES, RUNS, Progress, Saver
from toolkit.distributed import max_over_ranks, rank
from toolkit.images import BadImages, limit_pixels
from toolkit.monitor import Meter, Monitor, command_line, cyclegan_rows, load_samples, load_watched, say_duration
from toolkit.weights import load_pair
from utils import InputError, counted, say

LOG_EVERY = 20  # steps between two rows of losses.csv
EVAL_IMAGES = 200  # of each domain, at most, in an evaluation


# ---------------------------------------------------------------------------------------------
# The loop


def training_loop(
    args: Namespace, model: CycleGAN, progress: Progress, feed: Feed, saver: Saver, monitor: Monitor
) -> int:
    """Run the epochs that are left; returns the number of the signal that ended it early, or 0. A save was tried."""
    steps = feed.order.steps
    done_steps = progress.epoch * steps + progress.step_in_epoch
    bar = tqdm(total=args.num_epochs * steps, initial=done_steps, unit="step", mininterval=0.5, disable=rank() > 0)
    signum = 0
    with process.StopRequest() as stop, bar:
        while progress.epoch < args.num_epochs and not signum:
            factor = linear_decay(progress.epoch, args.num_epochs, cli.decay_epoch(args))
            model.set_learning_rate(factor)
            bar.set_description(f"epoch {progress.epoch + 1}/{args.num_epochs}", refresh=False)
            for real_A, real_B in feed.batches(progress.epoch, progress.step_in_epoch, model.device):
                monitor.meter.add(model.step(real_A, real_B, progress.step))
                progress.step += 1
                progress.step_in_epoch += 1
                bar.update()
                if monitor.clock.tick():
                    left = (args.num_epochs - progress.epoch) * steps - progress.step_in_epoch
                    say_duration(monitor.clock.pace, left, steps, saver.facts["args"], model.device)
                ended = progress.step_in_epoch == steps
                if monitor.meter.count == LOG_EVERY or ended:
                    means = log_losses(model, progress, feed, saver, monitor, args.lr * factor)
                    bar.set_postfix({name: f"{means[name]:.3f}" for name in TERMS[:3] if name in means}, refresh=False)
                signum = stop.agreed()
                if signum or ended:
                    break
                if progress.step % args.sample_interval == 0 or monitor.clock.first_grid_due():
                    files.attempt(monitor.draw, model, progress.epoch, progress.step, False)
                show(args, progress, steps, monitor)
                if max_over_ranks(saver.due()):
                    save(model, progress, feed, saver, monitor)
            if progress.step_in_epoch >= steps:
                progress.epoch += 1
                progress.step_in_epoch = 0
                files.attempt(monitor.draw, model, progress.epoch, progress.step, True)
                show(args, progress, steps, monitor)
            save(model, progress, feed, saver, monitor)
            evaluate(args, model, progress, feed, saver, monitor)
            if progress.epoch < args.num_epochs:  # else nothing is left that could be stopped
                signum = signum or stop.agreed()
            stopped = signum > 0
            show(args, progress, steps, monitor, at_once=stopped or progress.epoch == args.num_epochs, stopped=stopped)
    return signum


def log_losses(
    model: CycleGAN, progress: Progress, feed: Feed, saver: Saver, monitor: Monitor, lr: float
) -> dict[str, float]:
    """Log the means of the losses since the last row (reading them waits for the device); returns them."""
    means = monitor.meter.means()
    stop_if_not_finite(model, progress, feed, saver, monitor.meter, means)
    monitor.log_losses(progress.epoch + 1, progress.step, lr, means)  # resets the meter, too
    return means


def save(model: CycleGAN, progress: Progress, feed: Feed, saver: Saver, monitor: Monitor, best: bool = False) -> None:
    """Save all that the run needs to go on, once all losses and weights are seen to be finite."""
    stop_if_not_finite(model, progress, feed, saver, monitor.meter, monitor.meter.means())
    saver.save(model, progress, monitor.meter.state_dict(), monitor.log.save, best)


def stop_if_not_finite(
    model: CycleGAN, progress: Progress, feed: Feed, saver: Saver, meter: Meter, means: dict[str, float]
) -> None:
    """End the run when a loss or a weight is not a number any more; the last save stays."""
    wrong = []
    for name, net in model.nets.items():
        if not all(torch.isfinite(x).all() for x in net.state_dict().values()):
            wrong.append(f"a weight of {name}")
    if not wrong and all(map(math.isfinite, means.values())):
        return
    terms, ago = meter.first_not_finite()
    seen = feed.paths_of_step((progress.step_in_epoch or feed.order.steps) - 1 - ago)
    found = distributed.gather((bool(terms), ago, terms, seen))  # of the rank whose first bad loss is oldest
    _, ago, terms, seen = max(found, default=(False, ago, terms, seen))
    raise utils.RunError(
        f"{', '.join(terms or wrong)} not finite at step {progress.step - ago}, images {' '.join(seen)}; "
        f"{saver.last_state()}; try a smaller --lr or --precision fp32"
    )


def show(
    args: Namespace, progress: Progress, steps: int, monitor: Monitor, at_once: bool = False, stopped: bool = False
) -> None:
    """Write the page that shows where the run is, losses.csv and its plot; not too often, unless at_once."""
    if at_once or monitor.clock.page_due():
        counts = (progress.epoch, progress.step, progress.step_in_epoch, args.num_epochs, steps)
        files.attempt(monitor.show, *counts, stopped)


# ---------------------------------------------------------------------------------------------
# Evaluation: after saving, so that a failure in it loses no training


def evaluation_due(args: Namespace, progress: Progress, feed: Feed) -> bool:
    """Whether --eval_interval wants this moment, the end of an epoch, evaluated."""
    return bool(feed.held_out) and not progress.step_in_epoch and progress.epoch % args.eval_interval == 0


def evaluate(args: Namespace, model: CycleGAN, progress: Progress, feed: Feed, saver: Saver, monitor: Monitor) -> None:
    """Evaluate the epoch just saved, if --eval_interval says so; the best so far by --best_by becomes best.pt."""
    if not evaluation_due(args, progress, feed):
        return
    row = measure(args, model, progress, feed.held_out)
    score = metrics.score_by(args.best_by, row) if row else None
    before = progress.best
    better = score is not None and (before is None or metrics.is_better(args.best_by, score, before["score"]))
    if max_over_ranks(better):  # only the first rank has a score
        progress.best = {"metric": args.best_by, "score": score, "epoch": progress.epoch}
        save(model, progress, feed, saver, monitor, best=True)
        if saver.save_error:
            progress.best = before  # the save failed: best.pt is still the older one
    if row:  # the last thing, so that a run that was killed before is seen to lack it
        monitor.add_measures(progress.epoch, progress.step, row)


@distributed.first_rank
def measure(args: Namespace, model: CycleGAN, progress: Progress, held_out: dict[str, Path]) -> dict | None:
    """The row of this epoch in measures.csv; None of what cannot be evaluated, which is said: the run goes on."""
    try:
        size = (args.img_height, args.img_width)
        reals = datasets.paired_images(held_out, size, args.channels, args.on_bad_image, EVAL_IMAGES)
        return metrics.measure_nets(model.averaged_nets, reals, args.eval_metrics, model.loss_config, model.precision)
    except (InputError, OSError) as error:
        utils.warn(f"epoch {progress.epoch} is not evaluated: {error}")
        return None


# ---------------------------------------------------------------------------------------------
# Building a run


def make_feed(args: Namespace, device: torch.device) -> tuple[Path, Feed]:
    """Find the images, drawing the demo set when it is missing, and make their loader."""
    limit_pixels(1e6 * args.max_megapixels)
    rank_slice = distributed.rank_slice(args.batch_size)
    with distributed.first_rank_first():
        if args.dataset_name == datasets.DEMO and not (args.data_root / datasets.DEMO).exists():
            synthetic.draw_dataset(args.data_root)
    dataset = datasets.find_dataset(args.data_root, args.dataset_name)
    paths = {}
    bad = {}
    for domain in "AB":
        found = datasets.split_images(dataset, f"train{domain}", args.max_images)
        bad[domain] = BadImages(dataset / f"train{domain}", len(found), args.on_bad_image)
        paths[domain] = bad[domain].readable(found)
    counts = {domain: len(found) for domain, found in paths.items()}
    order = datasets.EpochSampler(
        (counts["A"], counts["B"]), args.batch_size, args.steps_per_epoch, args.seed, rank_slice
    )
    size = (args.img_height, args.img_width)
    images = datasets.UnpairedDataset(paths, size, args.channels, args.load_scale, args.flip, args.seed)
    workers = args.num_workers if args.num_workers is not None else devices.default_workers(device)
    if args.cache != "none":
        images.caches = datasets.make_caches(args.cache, paths, images.load_size, args.channels, dataset, workers)
    loader = datasets.make_loader(images, order, workers, pin_memory=device.type == "cuda")
    numbers = f"{counted(counts['A'], 'image')} in trainA, {counts['B']} in trainB"
    say(f"{dataset}: {numbers}; {order.steps} steps of {args.batch_size} an epoch")
    held_out = datasets.held_out_folders(dataset, "paired" in args.eval_metrics) if args.eval_interval else {}
    return dataset, Feed(loader, order, bad, counts, held_out)


def load_pretrained(args: Namespace) -> tuple[Namespace, models.Nets]:
    """Read the files of --init_from and take the network flags that were not given from them."""
    nets = load_pair(args.init_from)
    given = args.given
    for path, net in zip(args.init_from, nets.values(), strict=True):
        for key, value in dataclasses.asdict(net.config).items():
            if key in given and getattr(args, key) != value:
                words = f"its network has {key} {value}, not {getattr(args, key)}"
                raise InputError(f"--init_from {path}: {words}; leave the flag out")
            args = cli.changed(args, **{key: value})
        given = given | dataclasses.asdict(net.config).keys()  # so that a second file has to agree with the first
    return args, nets


def freeze(nets: models.Nets, parts: Sequence[str]) -> None:
    """Take the named parts of all generators ("D": the discriminators) out of learning, and say what is left.

    The running statistics of a frozen batch norm stay, too.
    """
    for name, net in nets.items():
        children = {"D": net} if name.startswith("D") else dict(net.named_children())
        for part, module in children.items():
            module.requires_grad_(part not in parts)
            module.train(part not in parts)
        if parts:
            words = (f"{part} {'frozen' if part in parts else 'learns'}" for part in children)
            say(f"{name}: {', '.join(words)}")


def make_nets(args: Namespace, pretrained: models.Nets) -> models.Nets:
    """Build the four networks, freshly seeded; `pretrained` generators take the place of new ones."""
    generator, discriminator = cli.network_configs(args)
    devices.seed_everything(args.seed, args.deterministic)
    nets: models.Nets = {name: models.build_generator(generator, args.init) for name in models.LEGACY_DIRECTIONS}
    nets |= {name: models.build_discriminator(discriminator, args.init) for name in ("D_A", "D_B")}
    nets |= {name: net.train() for name, net in pretrained.items()}
    freeze(nets, args.freeze)
    absent = set(args.freeze) - {"D"}.union(*(dict(nets[name].named_children()) for name in models.LEGACY_DIRECTIONS))
    if absent and args.start_from == "0":  # else the run began before this was refused
        words = f"the generators have no {', '.join(sorted(absent))}; leave it out"
        raise InputError(f"--freeze {','.join(args.freeze)}: {words}")
    if not any(p.requires_grad for name in models.LEGACY_DIRECTIONS for p in nets[name].parameters()):
        raise InputError(f"--freeze {','.join(args.freeze)}: no part of the generators is left to learn")
    return nets


def make_model(
    args: Namespace,
    nets: models.Nets,
    device: torch.device,
    adapters: nn.ModuleDict | None = None,
    loss: Callable = generator_loss,
) -> CycleGAN:
    """Put networks on their device and make all that learns with them; adapters and loss are a distillation's."""
    cli.check_memory(args, nets["G_AB"].config, device)
    devices.set_cudnn_benchmark(device, args.deterministic)
    devices.set_tf32(device)
    for net in nets.values():
        net.to(device=device, memory_format=devices.memory_format(device))
    if adapters is not None:
        adapters.to(device)
    precision = devices.pick_precision(args.precision, device)
    torch.manual_seed(args.seed + rank())  # weights are equal on all ranks; from here each draws its own numbers
    losses = cli.config_of(LossConfig, args)
    model = CycleGAN(nets, losses, cli.config_of(OptimConfig, args), precision, args.seed, adapters, loss)
    if args.compile:
        model.compiled = executor.compile_nets(nets, device)
    return model


def make_saver(args: Namespace, stage: str, **facts: object) -> Saver:
    """Settle where and when states go, and what stands in each; facts: what a distillation adds."""
    schedules = {"num_epochs": args.num_epochs, "decay_epoch": cli.decay_epoch(args)}
    names = {name: str(getattr(args, name)) for name in ("run_name", "dataset_name", "data_root")}
    return Saver(
        RUNS / args.run_name,
        {"stage": stage, "args": cli.plain_flags(args), "schedules": schedules, **facts},
        {"stage": stage, **names, "size": [args.img_height, args.img_width]},
        checkpoint_interval=args.checkpoint_interval,
        keep_checkpoints=args.keep_checkpoints,
        save_minutes=args.save_minutes,
    )


def make_monitor(args: Namespace, dataset: Path, terms: Sequence[str], draw_rows: Callable) -> Monitor:
    """Read the fixed test images and the watched photos that the run shows."""
    size = (args.img_height, args.img_width)
    samples = load_samples(dataset, size, args.channels, args.on_bad_image)
    photos = load_watched(args.watch, size, args.channels, resumed="watch" not in args.given)
    names = (args.run_name, args.dataset_name)
    return Monitor(RUNS / args.run_name, IMAGES / args.run_name, names, samples, photos, draw_rows, terms)


# ---------------------------------------------------------------------------------------------
# Running it


def describe(args: Namespace, model: CycleGAN, counts: dict[str, int]) -> None:
    """Write run.json and say what is about to learn, on what."""
    facts = checkpoints.run_description(cli.plain_flags(args), counts, model)
    files.write_json(RUNS / args.run_name / "run.json", facts)
    parameters = ", ".join(f"{name} {count:,}" for name, count in facts["parameters"].items())
    say(f"parameters: {parameters}; {model.device}, {model.precision}")
    say(f"watch {IMAGES / args.run_name}/index.html ; checkpoints go to {RUNS / args.run_name}/")


def go_on(args: Namespace, model: CycleGAN, steps: int, meter: Meter, state: dict, checkpoint: Path) -> Progress:
    """Put a checkpoint back and say where the run stands."""
    progress = checkpoints.restore(state, checkpoint, model, meter, (args.channels, args.img_height, args.img_width))
    say(f"going on after epoch {progress.epoch}, step {progress.step} of {checkpoint}")
    if progress.step_in_epoch >= steps:
        say(f"an epoch has {steps} steps now, and {progress.step_in_epoch} are done: this one counts as finished")
        progress.step_in_epoch = steps
    return progress


def run(
    args: Namespace,
    model: CycleGAN,
    feed: Feed,
    saver: Saver,
    monitor: Monitor,
    state: dict | None,
    checkpoint: Path | None,
) -> None:
    """Start, or go on with a checkpoint, and run the loop to its end; after a signal exit with 128 + its number."""
    progress = Progress()
    missing = 0  # an evaluation after the last save, which a kill cut off
    if state and checkpoint:
        progress = go_on(args, model, feed.order.steps, monitor.meter, state, checkpoint)
        unchanged = args.start_from == "latest" and state["args"].get("eval_interval") == args.eval_interval
        wanted = unchanged and evaluation_due(args, progress, feed)
        missing = max_over_ranks(bool(wanted and monitor.lacks_measures(progress.step)))
        if progress.epoch >= args.num_epochs and not missing:
            say(f"nothing left to do: {progress.epoch} of {args.num_epochs} epochs are finished; raise --num_epochs")
            return
    for folder in (saver.folder, monitor.images):
        folder.mkdir(parents=True, exist_ok=True)
    with files.sole_process(saver.folder, monitor.images):
        saver.take_folder(args.overwrite, checkpoint)
        monitor.open(progress.step, args.log == "tensorboard", progress.epoch + (progress.step_in_epoch > 0))
        if state and args.best_by:
            progress.best = checkpoints.score_to_beat(saver.folder, model, progress, args.best_by)
        describe(args, model, feed.counts)
        if missing:
            evaluate(args, model, progress, feed, saver, monitor)
        show(args, progress, feed.order.steps, monitor)
        try:
            signum = training_loop(args, model, progress, feed, saver, monitor)
        finally:
            feed.loader = None  # ends its workers; after an error the program would wait for them for ever
            monitor.close()
    if max_over_ranks(bool(saver.save_error)):
        words = f"the last save failed, {saver.last_state()}"
        raise utils.RunError(f"{saver.save_error}; {words}; free the disk and go on from it")
    if signum:
        again = command_line(f"{saver.facts['stage']}.py", "--run_name", args.run_name, "--start_from", "latest")
        say(f"stopped and saved after step {progress.step}; go on with: {again}")
        distributed.leave_ranks()
        raise SystemExit(128 + signum)
    done = f"{counted(progress.epoch, 'epoch')}, {counted(progress.step, 'step')}; see {monitor.images}/epoch_{progress.epoch:04d}.png"
    say(f"done: {done}, then: {command_line('test.py', '--run_name', args.run_name)}")


def make_parser() -> cli.Parser:
    """Declare all flags of this stage."""
    parser = cli.Parser(prog="train.py", description=__doc__)
    groups = (cli.add_data_flags, cli.add_network_flags, cli.add_loss_flags, cli.add_optim_flags)
    for add_flags in (*groups, cli.add_transfer_flags, cli.add_run_flags, cli.add_speed_flags):
        add_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line; args.given names the flags that stand on it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.run_name = args.run_name or args.dataset_name
    cli.refuse_contradictions(parser, args)
    meaningless = args.given & set(cli.VIT_FLAGS if args.generator == "resnet" else cli.RESNET_FLAGS)
    if meaningless and args.start_from == "0" and not args.init_from:
        parser.error(f"--{min(meaningless)}: has no meaning for --generator {args.generator}: leave it out")
    return args


@process.command
def main(argv: Sequence[str] | None = None) -> None:
    """Train, from the start or from a checkpoint."""
    args = parse_args(argv)
    state = None
    checkpoint = None
    pretrained = {}
    if args.start_from == "0":
        checkpoints.refuse_second_run(args.run_name, args.overwrite, cli.plain_flags(args))
        args, pretrained = load_pretrained(args)
    else:
        state, checkpoint = checkpoints.load_checkpoint(RUNS / args.run_name, args.start_from, "--start_from", "train")
        args = cli.resume_flags(make_parser(), args, state.get("args"), checkpoint)
    args = cli.with_vit_defaults(args)
    cli.check_run_flags(args)
    cli.network_configs(args)  # refuses sizes before anything starts
    device = devices.pick_device(args.device)
    dataset, feed = make_feed(args, device)
    model = make_model(args, make_nets(args, pretrained), device)
    monitor = make_monitor(args, dataset, loss_names(model.loss_config), cyclegan_rows)
    run(args, model, feed, make_saver(args, "train"), monitor, state, checkpoint)


if __name__ == "__main__":
    main()
