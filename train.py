"""Train a CycleGAN: two generators and two discriminators on unpaired images of two domains.

python train.py @recipes/day2night.txt
python train.py --dataset_name horse2zebra --start_from latest
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import dataclasses
import functools
import math
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import datasets
import models
from cyclegan import LOSSES, CycleGAN, GeneratorLoss, generator_loss, loss_names
from datasets import TrainingData
from models import DIRECTIONS, DiscriminatorConfig, GeneratorConfig, Networks
from toolkit import checkpoints, cli, devices, files, metrics, synthetic
from toolkit.checkpoints import IMAGES, RUNS, Checkpoint, CheckpointSaver
from toolkit.config import FIXED_OPTIONS, NETWORK_CONFIGS, OPTIONS_OF, RUN_CONFIGS, SHARED_CONFIGS, TrainConfig
from toolkit.distributed import first_rank, first_rank_first, gather, leave_ranks, max_over_ranks, rank, world_size
from toolkit.executor import pick_memory_format
from toolkit.images import WHOLE, limit_pixels, list_images
from toolkit.pages import use_pages
from toolkit.monitor import Monitor, command_line, cyclegan_rows, load_samples, load_watched, say_duration
from toolkit.process import StopRequest, command
from toolkit.values import ValueRange, range_in_text
from toolkit.weights import load_pair
from utils import InputError, RunError, counted, duration, say, warn

LOG_EVERY = 20  # steps between two rows of losses.csv
MEASURED_PIXELS = 2**16  # of the images of a domain with which the memory formats are compared


# -- The run ---------------------------------------------------------------------------------------
class Run:
    """A training run: it owns the model, the data, the progress, the checkpoint saver and the monitor.

    command_name: "train" or "distill", which have the same loop
    facts:        extra entries of each saved state
    """

    def __init__(
        self,
        command_name: str,
        config: TrainConfig,
        model: CycleGAN,
        data: TrainingData,
        monitor: Monitor,
        **facts: object,
    ):
        self.command_name = command_name
        self.config = config
        self.model = model
        self.data = data
        self.monitor = monitor
        domains = list(monitor.domains)
        self.facts = {"stage": command_name, "args": config.flags, "domains": domains, "colours": data.colours, **facts}
        metadata: dict[str, Any] = {name: str(config.flags[name]) for name in ("run_name", "dataset_name", "data_root")}
        images: dict[str, Any] = {f"range_{domain}": limits for domain, limits in config.data.ranges.items() if limits}
        images |= {"size": list(config.data.size), "preprocess": config.data.preprocess}
        images |= {"colours": data.colours, "pages": config.data.pages}
        images |= {f"resample_{domain}": kind for domain, kind in config.data.resamples.items()}
        self.saver = CheckpointSaver(
            RUNS / config.run.run_name,
            metadata | {"stage": command_name, "domains": domains, **images},
            checkpoint_interval=config.run.checkpoint_interval,
            keep_checkpoints=config.run.keep_checkpoints,
            save_minutes=config.run.save_minutes,
        )
        self.epoch = 0  # finished epochs
        self.step_in_epoch = 0
        self.best: dict | None = None  # of best.pt: metric, score, epoch, split

    @property
    def finished_steps(self) -> int:
        """Steps since the start of the run."""
        return self.model.finished_steps

    @property
    def epoch_is_complete(self) -> bool:
        return self.step_in_epoch == self.data.steps_per_epoch

    def train(self) -> int:
        """Train the remaining epochs; returns the number of the signal that stopped it, or 0. The state is saved."""
        num_epochs = self.config.optim.num_epochs
        steps = self.data.steps_per_epoch
        done = self.epoch * steps + self.step_in_epoch  # not finished_steps: --steps_per_epoch may have changed
        bar = tqdm(total=num_epochs * steps, initial=done, unit="step", disable=rank() > 0)
        signum = 0
        with StopRequest() as stop, bar:
            while self.epoch < num_epochs and not signum:
                self.model.set_learning_rate(self.config.optim.learning_rate_factor(self.epoch))
                bar.set_description(f"epoch {self.epoch + 1}/{num_epochs}", refresh=False)
                for real_A, real_B in self.data.batches(self.epoch, self.step_in_epoch, self.model.device):
                    losses = self.model.step(real_A, real_B)
                    self.step_in_epoch += 1
                    self.log(losses, bar)
                    signum = stop.agreed()
                    if signum or self.epoch_is_complete:  # saves and draws below
                        break
                    self.draw_and_save_if_due()
                if self.epoch_is_complete:
                    self.epoch += 1
                    self.step_in_epoch = 0
                    self.draw()
                self.save()
                self.evaluate()  # after saving: a failure in it loses nothing
                signum = stop.agreed() if self.epoch < num_epochs else signum  # nothing to stop at the end
                self.update_page()
        self.update_page(at_once=True, stopped=bool(signum))
        return signum

    # -- logging and drawing --

    def log(self, losses: dict[str, Tensor], bar: tqdm) -> None:
        """Count the losses of a step; every LOG_EVERY steps add their means to the log and to the progress bar."""
        self.monitor.meter.add(losses)
        bar.update()
        if self.monitor.clock.tick():
            steps = self.data.steps_per_epoch
            steps_left = self.config.optim.num_epochs * steps - bar.n
            say_duration(self.monitor.clock.pace, steps_left, steps, self.model.device)
        if self.monitor.meter.count == LOG_EVERY or self.epoch_is_complete:
            means = self.monitor.meter.means()  # waits for the device
            self.stop_if_not_finite(means)
            lr = self.config.optim.lr * self.config.optim.learning_rate_factor(self.epoch)
            self.monitor.log_losses(self.epoch + 1, self.finished_steps, lr, means)
            bar.set_postfix({name: f"{means[name]:.3f}" for name in LOSSES if name in means}, refresh=False)

    def draw_and_save_if_due(self) -> None:
        """Between two steps of an epoch: draw the samples, update the page, save; drawing takes no random numbers."""
        if self.finished_steps % self.config.run.sample_interval == 0 or self.monitor.clock.first_grid_due():
            self.draw()
        self.update_page()
        if max_over_ranks(self.saver.due()):
            self.save()

    def draw(self) -> None:
        """Draw the sample grid and the watched photos."""
        files.attempt(self.monitor.draw, self.model, self.epoch, self.finished_steps, self.step_in_epoch == 0)

    def update_page(self, at_once: bool = False, stopped: bool = False) -> None:
        """Write losses.csv, its plot and the page; not too often, unless at_once."""
        if at_once or self.monitor.clock.page_due():
            counts = (self.epoch, self.finished_steps, self.step_in_epoch, self.config.optim.num_epochs)
            files.attempt(self.monitor.write_page, *counts, self.data.steps_per_epoch, stopped)

    def stop_if_not_finite(self, means: dict[str, float]) -> None:
        """Raise RunError if a loss or a weight is not a finite number; the last state on disk is a good one.

        Either all ranks raise it or none: the means are over all ranks, and the weights are equal.
        """
        wrong = []
        for name, net in self.model.networks.items():
            finite = [torch.isfinite(x).all() for x in net.state_dict().values()]
            if not torch.stack(finite).all():
                wrong.append(f"a weight of {name}")
        if wrong or not all(map(math.isfinite, means.values())):
            found = self.describe_not_finite(wrong)
            raise RunError(f"{found}; {self.saver.last_state()}; try a smaller --lr or --precision fp32")

    def describe_not_finite(self, wrong: list[str]) -> str:
        """Name the losses that were not finite first, on any rank, with their step and images; without one: `wrong`."""
        terms, steps_ago = self.monitor.meter.first_not_finite()
        last_step = (self.step_in_epoch or self.data.steps_per_epoch) - 1  # an epoch may have ended just now
        images = self.data.paths_of_step(last_step - steps_ago)
        found = gather((bool(terms), steps_ago, terms, images))
        _, steps_ago, terms, images = max(found, default=(False, steps_ago, terms, images))  # the earliest one
        step = self.finished_steps - steps_ago
        return f"{', '.join(terms or wrong)} not finite at step {step}, images {' '.join(images)}"

    # -- saving and resuming --

    def save(self, best: bool = False) -> None:
        """Save the state, after checking that all losses and weights are finite; best: also as best.pt."""
        self.stop_if_not_finite(self.monitor.meter.means())
        self.saver.save(self.state_dict(), self.model.ema_networks, self.monitor.log.save, best)

    def state_dict(self) -> dict:
        """Return everything that learns, counts or is random; all ranks have to call it.

        Not stored, since they follow from it: the learning rate (of the epoch) and the order of the batches (of seed and
        epoch).
        """
        state = {**self.model.state_dict(), "meter": self.monitor.meter.state_dict()}
        of_ranks = gather({name: state[name] for name in checkpoints.OF_RANK})
        return {
            **self.facts,
            **state,
            "other_ranks": of_ranks[1:],
            "config": {name: dataclasses.asdict(net.config) for name, net in self.model.networks.items()},
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "micro_batch_size": self.model.executor.micro_batch_size,
            "best": self.best,
            "range": [-1, 1],
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore a state, so that the next step is the one that would have followed.

        raises: InputError if it is not a state that `save` wrote
        """
        state, path = checkpoint
        try:
            own = checkpoints.own_rank_state(state)
            self.model.load_state_dict({**state, **own})
            micro_batch_size = int(state["micro_batch_size"])
            if not 0 <= micro_batch_size < 2**63:  # as Tensor.split takes
                raise ValueError(f"micro_batch_size {micro_batch_size}")
            self.model.executor.micro_batch_size = micro_batch_size
            if "memory_format" in self.config.given and self.config.executor.memory_format != "auto":
                self.model.set_memory_format(self.config.executor.memory_format)
            self.monitor.meter.load_state_dict(own["meter"], self.model.device)
            self.epoch = int(state["epoch"])
            self.step_in_epoch = int(state["step_in_epoch"])
            self.best = state.get("best")
            if self.best and not (self.best["metric"] in metrics.BEST_BY and math.isfinite(self.best["score"])):
                raise ValueError(f"best {self.best}")
        except Exception as error:  # an edited file can raise anything
            raise checkpoints.unusable(path, error) from error
        for domain, buffer in self.model.buffers.items():
            expected = (self.config.data.channels, *self.config.data.size)
            are_whole = self.config.data.preprocess in WHOLE  # of any size
            if not are_whole and any(image.shape != expected for image in buffer.images):
                buffer.images = []
                say(f"image buffer of {domain} starts empty: the image size has changed")
        say(f"resuming after epoch {self.epoch}, step {self.finished_steps} of {path}")
        if self.step_in_epoch >= self.data.steps_per_epoch:
            self.step_in_epoch = self.data.steps_per_epoch
            say(f"an epoch now has only {self.step_in_epoch} steps, all of them done: it counts as finished")

    # -- evaluation --

    def evaluation_due(self) -> bool:
        """Whether an epoch has just ended that --eval_interval selects."""
        epoch_ended = self.step_in_epoch == 0
        return bool(self.data.held_out) and epoch_ended and self.epoch % self.config.run.eval_interval == 0

    def evaluate(self) -> None:
        """Evaluate the epoch just saved, if it is due; the best one so far by --best_by becomes best.pt."""
        if not self.evaluation_due():
            return
        row = self.measure()
        best_by = self.config.run.best_by
        score = metrics.score_by(best_by, row) if row else None
        before = self.best
        better = score is not None and (before is None or metrics.is_better(str(best_by), score, before["score"]))
        if max_over_ranks(better):  # only the first rank has a score
            self.best = {"metric": best_by, "score": score, "epoch": self.epoch, "images": self.held_out_images}
            self.save(best=True)
            if self.saver.save_error:
                self.best = before  # best.pt is still the older one
        if row:  # last, so that a run that was killed before this evaluates again
            self.monitor.add_measures(self.epoch, self.finished_steps, row)

    @first_rank
    def measure(self) -> dict | None:
        """Return this epoch's row of measures.csv; None, with a warning, if the images cannot be read."""
        config = self.config.data
        model = self.model
        try:
            images = datasets.paired_images(self.data.held_out, config.readers, config.on_bad_image, most=200)
            measures = self.config.run.eval_metrics
            return metrics.measure_nets(model.ema_networks, images, measures, model.loss_config, model.precision)
        except (InputError, OSError) as error:
            warn(f"epoch {self.epoch} is not evaluated: {error}")
            return None

    @functools.cached_property
    def held_out_images(self) -> str:
        """Hash of the images that are evaluated."""
        return datasets.fingerprint(self.data.held_out.values())

    def best_so_far(self, args: dict) -> dict | None:
        """Return the best of the state that is resumed, with its options, if later scores compare with it."""
        best_by = self.config.run.best_by
        if self.best:
            losses = vars(self.config.loss) if self.best["metric"] == "loss_G" else ()
            read_by = (
                "img_height",
                "img_width",
                "preprocess",
                "pages",
                "range_A",
                "range_B",
                "resample_A",
                "resample_B",
            )
            now = {name: self.config.flags[name] for name in ("dataset_name", *read_by, *losses)}
            changed = [f"--{name}" for name, value in now.items() if args.get(name, value) != value]
            if self.data.held_out and self.best.get("images", self.held_out_images) != self.held_out_images:
                changed.append("held-out images")
            if changed:
                say(f"changed: {', '.join(changed)}; scores before do not compare, so the best epoch is sought anew")
                return None
        return checkpoints.best_score(self.saver.folder, self.best, best_by) if best_by else self.best

    def skipped_evaluation(self, state: dict) -> bool:
        """Return whether the run ended between a save and the evaluation that should have followed."""
        options = self.config.run
        unchanged = options.start_from == "latest" and state["args"].get("eval_interval") == options.eval_interval
        wanted = unchanged and self.evaluation_due()
        return bool(max_over_ranks(bool(wanted and self.monitor.lacks_measures(self.finished_steps))))

    # -- from start to end --

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Start, or resume from a checkpoint, and train to the end; after a signal exit with 128 + its number."""
        config = self.config
        evaluation_was_skipped = False
        if checkpoint:
            self.resume(checkpoint)
            evaluation_was_skipped = self.skipped_evaluation(checkpoint.state)
            if self.epoch >= config.optim.num_epochs and not evaluation_was_skipped:
                say(f"nothing left to do: all {self.epoch} epochs are finished; raise --num_epochs to train longer")
                return
        for folder in (self.saver.folder, self.monitor.images):
            folder.mkdir(parents=True, exist_ok=True)
        with files.sole_process(self.saver.folder, self.monitor.images):
            try:
                self.saver.take_folder(config.run.overwrite, checkpoint and checkpoint.path)
                self.monitor.open(
                    self.finished_steps, config.run.log == "tensorboard", self.epoch + (self.step_in_epoch > 0)
                )
                if checkpoint:
                    self.best = self.best_so_far(checkpoint.state["args"])
                self.describe()
                if evaluation_was_skipped:
                    self.evaluate()
                self.update_page()
                signum = self.train()
            finally:
                self.data.close()
                self.monitor.board.close()
                checkpoints.settle_overwriting(config.run.run_name, after_kill=False)
        self.report_end(signum)

    def describe(self) -> None:
        """Write run.json, and print the number of parameters and where to look."""
        model = self.model
        parameters = count_parameters(model.networks)
        record: dict[str, Any] = {"flags": self.config.flags, "images": self.data.counts, "parameters": parameters}
        record |= {"device": str(model.device), "precision": model.precision, **devices.versions()}
        files.write_json(self.saver.folder / "run.json", record)
        numbers = ", ".join(f"{name} {count:,}" for name, count in parameters.items())
        say(f"parameters: {numbers}; {model.device}, {model.precision}")
        say_cpu(model.device)
        steps = self.config.optim.num_epochs * self.data.steps_per_epoch
        if self.command_name == "train" and self.config.data.dataset_name != datasets.DEMO:
            say(datasets.outlook(min(self.data.counts.values()), steps))
        say(f"watch {self.monitor.images}/index.html ; checkpoints go to {self.saver.folder}/")

    def report_end(self, signum: int) -> None:
        """Say how the run ended and which command follows.

        raises: RunError if the last save failed; SystemExit after a signal
        """
        name = self.config.run.run_name
        if max_over_ranks(bool(self.saver.save_error)):
            raise RunError(f"the last save failed ({self.saver.save_error}); {self.saver.last_state()}; free space")
        if signum:
            again = command_line(f"{self.command_name}.py", "--run_name", name, "--start_from", "latest")
            say(f"stopped and saved after step {self.finished_steps}; go on with: {again}")
            leave_ranks()
            raise SystemExit(128 + signum)
        done = f"{counted(self.epoch, 'epoch')}, {counted(self.finished_steps, 'step')}"
        grid = self.monitor.images / f"epoch_{self.epoch:04d}.png"
        say(f"done: {done}; see {grid}, then: {command_line('test.py', '--run_name', name, *self.inputs_to_test())}")

    def inputs_to_test(self) -> list[str]:
        """Return what test.py needs to be told of a data set without test images: to translate those of training."""
        folder = datasets.find_dataset(self.config.data.data_root, self.config.data.dataset_name)
        tests = [datasets.split_folder(folder, f"test{domain}") for domain in "AB"]
        if any(map(list_images, tests)):
            return []
        return ["--input", str(datasets.split_folder(folder, "trainA"))]


# -- Building a run --------------------------------------------------------------------------------
def load_data(config: TrainConfig, device: torch.device, measure: bool) -> TrainingData:
    """Load the data set; the demo set is drawn if it does not exist. measure: as TrainingData takes it."""
    name = config.data.dataset_name
    root = config.data.data_root
    limit_pixels(1e6 * config.data.max_megapixels)
    use_pages(config.data.pages)
    with first_rank_first():
        if name == datasets.DEMO and not (root / name).exists():
            synthetic.draw_dataset(root)
    folder = datasets.find_dataset(root, name)
    paired = "paired" in config.run.eval_metrics
    held_out = datasets.held_out_folders(folder, paired) if config.run.eval_interval else {}
    return TrainingData(config.data, config.run.seed, device, held_out, measure)


def with_ranges(config: TrainConfig, ranges: Mapping[str, ValueRange | None]) -> TrainConfig:
    """Return the config with the value ranges that were measured, so that they are saved with the run."""
    found = {f"range_{domain}": range_in_text(limits) for domain, limits in ranges.items()}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **found), flags=config.flags | found)


def make_networks(config: TrainConfig, pretrained: Networks) -> Networks:
    """Build the four networks from the seed; pretrained generators replace new ones."""
    devices.seed_everything(config.run.seed, config.run.deterministic)
    generators = [direction.generator for direction in DIRECTIONS]
    networks: Networks = {name: models.build_generator(config.generator, config.init.init) for name in generators}
    networks |= {name: models.build_discriminator(config.discriminator, config.init.init) for name in ("D_A", "D_B")}
    networks |= {name: net.train() for name, net in pretrained.items()}
    frozen = config.init.freeze
    models.freeze(networks, frozen)
    if frozen:
        given = f"--freeze {','.join(frozen)}"
        say(f"{given}: these parts of the generators (D: the discriminators) do not learn")
        parts = {"D"}.union(*(dict(networks[name].named_children()) for name in generators))
        absent = ", ".join(sorted(set(frozen) - parts))
        if absent and config.run.start_from == "0":  # older runs may have been started with such a flag
            raise InputError(f"{given}: the generators have no {absent}; leave it out")
        if not any(p.requires_grad for name in generators for p in networks[name].parameters()):
            raise InputError(f"{given}: no part of the generators is left to learn")
    return networks


def make_model(
    config: TrainConfig,
    networks: Networks,
    device: torch.device,
    adapters: nn.ModuleDict | None = None,
    objective: GeneratorLoss = generator_loss,
) -> CycleGAN:
    """Put the networks on their device and build what trains them; only a distillation has adapters."""
    devices.set_backend_flags(device, config.run.deterministic)
    for module in (*networks.values(), adapters or nn.ModuleDict()):
        module.to(device)
    seed = config.run.seed
    torch.manual_seed(seed + rank())  # the weights are equal on all ranks; from here each draws its own numbers
    model = CycleGAN(
        networks,
        config.loss,
        config.optim,
        executor_config=config.executor,
        precision=devices.pick_precision(config.device.precision, device),
        seed=seed,
        adapters=adapters,
        objective=objective,
    )
    model.set_memory_format(choose_memory_format(config, model))
    return model


def choose_memory_format(config: TrainConfig, model: CycleGAN) -> str:
    """Return the memory format of a run: as given, as its state has it (until that is loaded: contiguous), or as measured."""
    asked = config.executor.memory_format
    if asked != "auto":
        return asked
    if config.run.start_from != "0" or config.run.deterministic:  # measured times differ from run to run
        return "contiguous"
    executor = model.executor
    size = executor.micro_batch_size or config.data.batch_size // world_size()
    enough = max(1, MEASURED_PIXELS // math.prod(config.data.size))  # images: more of them only take longer to measure
    shape = (min(size, enough), config.data.channels, *config.data.size)
    in_order = executor.in_order or executor.micro_batch_size > 0
    return pick_memory_format(model.networks["G_AB"], model.networks["D_B"], shape, model.precision, in_order)


def make_monitor(config: TrainConfig, terms: Sequence[str], draw_rows: Callable) -> Monitor:
    """Make the monitor, with the test images and the watched photos that it shows."""
    data = config.data
    name = config.run.run_name
    samples = load_samples(data.data_root / data.dataset_name, data.readers, data.on_bad_image)
    domains = datasets.domain_names(data.data_root / data.dataset_name)
    photos = load_watched(config.run.watch, data.size, data.channels, resumed="watch" not in config.given)
    return Monitor(RUNS / name, IMAGES / name, name, domains, samples, photos, draw_rows, terms)


def count_parameters(networks: Networks) -> dict[str, int]:
    """Return the number of parameters of each network."""
    return {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}


def say_cpu(device: torch.device) -> None:
    """Say so if the tables of docs do not hold for this CPU."""
    if device.type == "cpu" and devices.native_precision(device) == "fp32":
        say(
            "this CPU has no bfloat16 in hardware, so steps take longer than the tables in docs say for one that has it"
        )


def dry_run(config: TrainConfig, model: CycleGAN) -> None:
    """Print the complete configuration, and how long it would train; nothing is written."""
    data = config.data
    for name, value in sorted(config.flags.items()):
        say(f"--{name} {value}")
    for name, count in count_parameters(model.networks).items():
        say(f"{name}: {count:,} parameters")
    if data.dataset_name == datasets.DEMO and not (data.data_root / datasets.DEMO).exists():
        counts = [synthetic.DEMO_FOLDERS[f"train{domain}"][2] for domain in "AB"]
    else:
        folder = datasets.find_dataset(data.data_root, data.dataset_name)
        counts = [len(datasets.split_images(folder, f"train{domain}", data.max_images)) for domain in "AB"]
    steps = data.steps_per_epoch or math.ceil(max(counts) / data.batch_size)
    total = steps * config.optim.num_epochs
    steps_in_words = f"{counted(steps, 'step')} of {data.batch_size} an epoch, {total:,} in all"
    say(f"{counts[0]} images in trainA, {counts[1]} in trainB; {steps_in_words}")
    say_cpu(model.device)
    say(f"timing four steps with noise on {model.device} in {model.precision}, which may take minutes on a CPU")
    noise = torch.rand(data.batch_size, data.channels, *data.size, device=model.device) * 2 - 1
    times = [time.perf_counter()]
    for _ in range(4):
        model.step(noise, noise)["loss_G"].item()  # waits for the device
        times.append(time.perf_counter())
    pace = (times[4] - times[1]) / 3  # the first step is slower than the others
    say(f"{duration(pace)} a step: about {duration(pace * total)} in all")


# -- The command line ------------------------------------------------------------------------------
def make_parser() -> cli.Parser:
    """Declare all options of this command."""
    parser = cli.Parser(prog="train.py", description=__doc__)
    for title, kind in (SHARED_CONFIGS | NETWORK_CONFIGS | RUN_CONFIGS).items():
        cli.add_options(parser, title, kind)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line; args.given names the options that were given."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.run_name = args.run_name or args.dataset_name
    cli.refuse_contradictions(parser, args)
    meaningless = args.given & set().union(*OPTIONS_OF.values()) - OPTIONS_OF[args.generator]
    if meaningless and args.start_from == "0" and not args.init_from:
        parser.error(f"--{min(meaningless)}: has no meaning for --generator {args.generator}: leave it out")
    if "assume" in args.given and not args.init_from:
        parser.error("--assume: has no effect without --init_from; give both or none")
    is_uvcgan = args.generator == "unet_vit" and args.vit_size == "uvcgan"
    if is_uvcgan and "upsample" in args.given and args.upsample == "deconv" and args.start_from == "0":
        parser.error("--upsample deconv: --vit_size uvcgan upsamples by resize; leave it out")
    if args.skips and not args.n_downsampling and args.start_from == "0":
        parser.error("--skips: has no effect with --n_downsampling 0; leave it out")
    return args


def with_network_configs(
    config: TrainConfig, generator: GeneratorConfig, discriminator: DiscriminatorConfig
) -> TrainConfig:
    """Return the config with other networks; raises InputError if the images are too small for them."""
    is_resumed = config.run.start_from != "0"
    models.check_image_size(generator, discriminator, *config.data.size, discriminator_is_fixed=is_resumed)
    flags = {name: value for name, value in dataclasses.asdict(generator).items() if name in config.flags}
    flags["vit_size"] = generator.vit_size.removesuffix("_v0")  # the flag, if given again, is that of its first start
    data = dataclasses.replace(config.data, channels=generator.channels)
    return dataclasses.replace(
        config, data=data, flags=config.flags | flags, generator=generator, discriminator=discriminator
    )


def config_and_pretrained(config: TrainConfig) -> tuple[TrainConfig, Networks]:
    """Return the config of a new run, and the generators of --init_from, whose shape replaces options not given."""
    for path in config.init.init_from:
        checkpoints.recover_run_of(path)
    networks = load_pair(config.init.init_from, config.run.assume)
    generator = config.generator
    known = config.given
    path = ", ".join(map(str, config.init.init_from))
    for net in networks.values():
        shape = dataclasses.asdict(net.config)
        for name, value in shape.items():
            wanted = getattr(generator, name)
            if name in known and wanted != value:
                raise InputError(
                    f"--init_from {path}: has {name} {value}, not {wanted}; leave the flag out, or give it that value"
                )
        generator = net.config
        known = known | shape.keys()  # a second file has to agree with the first
    discriminator = dataclasses.replace(config.discriminator, channels=generator.channels, norm=generator.norm)
    return with_network_configs(config, generator, discriminator), networks


def config_from_checkpoint(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """Return the config with the networks of a training state."""
    try:
        state = checkpoint.state
        generator = GeneratorConfig.saved(state["config"]["G_AB"], state["nets"]["G_AB"])
        discriminator = DiscriminatorConfig(**state["config"]["D_A"])
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoints.unusable(checkpoint.path, error) from error
    return with_network_configs(config, generator, discriminator)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Train, from the start or from a checkpoint."""
    args = parse_args(argv)
    checkpoint = None
    pretrained: Networks = {}
    if args.start_from != "0":
        folder = RUNS / args.run_name
        checkpoint = Checkpoint(*checkpoints.load_checkpoint(folder, args.start_from, "--start_from", "train"))
        args = cli.resume_args(make_parser(), args, checkpoint, FIXED_OPTIONS)
    config = TrainConfig(**cli.config_fields(args, SHARED_CONFIGS | NETWORK_CONFIGS | RUN_CONFIGS))
    config.check()
    if checkpoint:
        config = config_from_checkpoint(config, checkpoint)
    else:
        if not config.run.dry_run:
            checkpoints.refuse_second_run(config.run.run_name, config.run.overwrite)
        config, pretrained = config_and_pretrained(config)
    device = devices.pick_device(config.device.device)
    if config.run.dry_run:
        dry_run(config, make_model(config, make_networks(config, pretrained), device))
        return
    data = load_data(config, device, measure=checkpoint is None)  # an older run has learned without measured ranges
    config = with_ranges(config, data.ranges)
    model = make_model(config, make_networks(config, pretrained), device)
    monitor = make_monitor(config, loss_names(config.loss), cyclegan_rows)
    Run("train", config, model, data, monitor).start(checkpoint)


if __name__ == "__main__":
    main()
