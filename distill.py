"""Distil a trained teacher into a student with fewer blocks or channels.

    python distill.py --dataset_name horse2zebra
    python distill.py --teacher day2night --direction AtoB --student_residual 3 --student_ngf 16 --run_name thin
    python distill.py --teacher day2night --report

A student replaces its teacher in the CycleGAN objective, and also learns to match its hidden states and images; the
other networks continue from the teacher's run. The loop, the states and most options are those of train.py.
source: elephantmipt/cycle-gan-distillation (the idea); Li et al. 2020, GAN Compression (1x1 adapters)
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import copy
import dataclasses
import functools
from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cyclegan
import models
import train
from cyclegan import CycleGAN, LossConfig, Translation
from models import DIRECTIONS, Direction, DiscriminatorConfig, Generator, GeneratorConfig, Networks
from toolkit import checkpoints, cli, devices, report
from toolkit.checkpoints import RUNS, Checkpoint
from toolkit.config import RUN_CONFIGS, SHARED_CONFIGS, TrainConfig
from toolkit.files import sha256
from toolkit.images import PREPROCESS, RESAMPLE, limit_pixels
from toolkit.pages import CHOICES, use_pages
from toolkit.inference import check_together
from toolkit.monitor import cyclegan_rows
from toolkit.process import command
from toolkit.values import range_in_text, ranges_of
from toolkit.weights import load_generators
from utils import InputError, folder_name, in_range, is_folder_name, option, say


def run_or_file(text: str) -> str:
    """Accept an existing file, or the name of a folder in saved_models."""
    return text if Path(text).is_file() else folder_name(text)


def block_list(text: str) -> list[int] | None:
    """Accept block numbers separated by commas, or auto."""
    if text == "auto":
        return None
    words = text.split(",")
    if not all(word.isdecimal() and in_range(int(word), most=1000) for word in words):
        raise ValueError(f"given {text!r}, expected auto or block numbers such as 1,4,8")
    return [int(word) for word in words]


@dataclass(frozen=True)
class DistillationConfig:
    """The teacher, the shape of its students, and what they learn from it."""

    teacher: str | None = option(None, "run, checkpoint or generator (default: --dataset_name)", parse=run_or_file)
    direction: str = option(
        "both",
        "which generators get a student (default: both; of a single file the one in it)",
        choices=("both", *map(str, DIRECTIONS)),
    )
    student_residual: int = option(3, "blocks of the student", least=0, most=1000)
    student_ngf: int | None = option(None, "width of a resnet student (default: its teacher's)", least=1, most=4096)
    student_skips: bool | None = option(None, "skip connections of a resnet student (default: as its teacher)")
    hidden_layers: list[int] | None = option(None, "teacher block per student block (default: auto)", parse=block_list)
    lambda_hidden: float = option(1.0, "weight of the distance between hidden states", least=0)
    lambda_output: float = option(10.0, "weight of the distance between images", least=0)
    transfer: bool = option(True, "start from the teacher's first and last layers")
    report: bool = option(False, "compare an existing student with its teacher; trains nothing")

    @property
    def directions(self) -> list[Direction]:
        """The directions whose generators get a student."""
        return [direction for direction in DIRECTIONS if self.direction in ("both", str(direction))]


# -- The objective ---------------------------------------------------------------------------------
def hidden_loss(hidden: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean squared error between the hidden states of a student and of its teacher, averaged over the pairs.

    hidden, targets: states of the same shape, pair by pair
    returns:         scalar, at least 0
    raises:          ValueError if shapes or numbers differ (mse_loss would broadcast)
    """
    if [x.shape for x in hidden] != [x.shape for x in targets]:
        raise ValueError("hidden states differ in number or shape")
    losses: Any = (F.mse_loss(cyclegan.to_float(x), cyclegan.to_float(y)) for x, y in zip(hidden, targets, strict=True))
    return sum(losses) / len(hidden)


def pair_blocks(num_teacher_blocks: int, num_student_blocks: int) -> list[int]:
    """Return the teacher block that each student block imitates: evenly spread, the last for the last."""
    if (num_teacher_blocks, num_student_blocks) == (9, 3):
        return [1, 4, 8]  # as in elephantmipt/cycle-gan-distillation
    if not num_teacher_blocks:
        return []
    return [max(0, round((i + 1) * num_teacher_blocks / num_student_blocks) - 1) for i in range(num_student_blocks)]


@dataclass
class DistillationLoss:
    """The CycleGAN objective of students, plus the distance to their teachers. Called as cyclegan.generator_loss."""

    teachers: Networks  # frozen, by the name of the generator that learns from them
    adapters: nn.ModuleDict  # NAME_i projects block i of a student to the width of its teacher, where the widths differ
    teacher_blocks: dict[str, list[int]]  # by name: the teacher block that each student block imitates
    lambda_hidden: float
    lambda_output: float

    def __call__(
        self, networks: Networks, direction: Direction, real: Tensor, config: LossConfig
    ) -> tuple[Tensor, dict[str, Tensor], Translation]:
        """Add the terms output_XY and hidden_XY of the student that translates `real`."""
        name = direction.generator
        imitated = self.teacher_blocks.get(name) if self.lambda_hidden else None
        loss, terms, translation = cyclegan.generator_loss(networks, direction, real, config, bool(imitated))
        if name not in self.teachers or not (imitated or self.lambda_output):
            return loss, terms, translation
        with torch.no_grad():
            target, target_hidden = self.teachers[name](real, return_hidden=True)
        if self.lambda_output:
            output = f"output_{direction.source}{direction.target}"
            terms[output] = cyclegan.image_loss(translation.fake, target)
            loss = loss + self.lambda_output * terms[output]
        if imitated:
            states = translation.hidden
            if f"{name}_0" in self.adapters:
                states = [self.adapters[f"{name}_{i}"](x) for i, x in enumerate(states)]
            hidden = f"hidden_{direction.source}{direction.target}"
            terms[hidden] = hidden_loss(states, [target_hidden[block] for block in imitated])
            loss = loss + self.lambda_hidden * terms[hidden]
        return loss, terms, translation

    @property
    def names(self) -> list[str]:
        """Names of the terms that are added."""
        return [f"{kind}_{name[2:]}" for name in self.teachers for kind in ("output", "hidden")]


# -- The teacher -----------------------------------------------------------------------------------
@dataclass
class Teacher:
    """Frozen networks by name, and where they come from."""

    networks: Networks  # G_AB, G_BA, D_A, D_B; of a single file, one generator
    args: Any  # of its training run; None for a single file
    path: Path
    metadata: dict  # of a single file: size (height, width) in px, dataset_name


def load_teacher(name: str, directions: Sequence[Direction], assumed: Collection[str] = ()) -> Teacher:
    """Read a run's latest state, any training state, or a single generator file (ours or another project's).

    directions: those that get a student; a file without a recorded direction counts as the first
    raises:     InputError if there is no such teacher, or it cannot be used
    """
    path = Path(name)
    checkpoints.recover_run_of(path)
    state = None
    if (RUNS / name).is_dir() and not path.is_file():
        state, path = checkpoints.load_checkpoint(RUNS / name, "latest", f"--teacher {name}, epoch")
    if not path.is_file():
        raise InputError(f"--teacher {name}: no such run or file; runs found: {checkpoints.found_runs()}")
    if state or checkpoints.is_state(path):
        if assumed:
            raise InputError(
                f"--assume {','.join(assumed)}: of weights of other projects, and {path} is a run's; leave it out"
            )
        state = state or checkpoints.load_state(path)
        teacher = Teacher(checkpoints.networks_of(state, path), state.get("args") or {}, path, metadata={})
    else:
        # of both directions a single generator is enough, which choose_direction looks at
        asked = directions[0] if len(directions) == 1 else None
        generators = load_generators(path, asked, assumed)
        networks = {}
        for net, metadata in generators:
            if not metadata["direction"]:
                say(f"{path}: does not say its direction; used as {directions[0]}")
            networks[Direction.named(metadata["direction"] or str(directions[0])).generator] = net
        new = "a pair of generators, so the" if len(networks) == 2 else "a single generator, so the other one and the"
        say(f"{path}: {new} discriminators are newly initialised")
        teacher = Teacher(networks, None, path, generators[0][1])
    check_together(teacher.networks, path)
    for net in teacher.networks.values():
        net.requires_grad_(False).eval()
    return teacher


def choose_direction(distillation: DistillationConfig, given: Collection[str], teacher: Teacher) -> DistillationConfig:
    """Choose the only direction that a single generator has; raises InputError if another one was asked for."""
    present = [direction for direction in DIRECTIONS if direction.generator in teacher.networks]
    if len(present) == 1 and "direction" not in given:
        return dataclasses.replace(distillation, direction=str(present[0]))
    for direction in distillation.directions:
        if direction not in present:
            found = ", ".join(map(str, present)) or "nothing"
            raise InputError(f"--teacher {teacher.path}: translates {found}, not {direction}; give that --direction")
    return distillation


# -- The students ----------------------------------------------------------------------------------
def student_config(distillation: DistillationConfig, teacher_config: GeneratorConfig) -> GeneratorConfig:
    """Return the teacher's config with the blocks, width and skip connections of the student, which is never rotated."""
    if teacher_config.generator == "resnet":
        ngf = distillation.student_ngf or teacher_config.ngf
        skips = teacher_config.skips if distillation.student_skips is None else distillation.student_skips
        blocks = distillation.student_residual
        return dataclasses.replace(teacher_config, num_residual=blocks, ngf=ngf, skips=skips, rotated=False)
    if distillation.student_ngf:
        raise InputError(
            f"--student_ngf {distillation.student_ngf}: fixed for a {teacher_config.generator}; leave it out"
        )
    if distillation.student_skips is not None:
        raise InputError(f"--student_skips: a {teacher_config.generator} has fixed skip connections; leave it out")
    return dataclasses.replace(teacher_config, vit_blocks=distillation.student_residual)


def make_student(teacher_net: Generator, config: GeneratorConfig, transfer: bool) -> Generator:
    """Build a student; with transfer it starts from the teacher's layers of the same shape, except the blocks."""
    student = models.build_generator(config)
    if not transfer:
        return student
    available = teacher_net.state_dict()
    if teacher_net.config.rotated:
        available = {name: x.flip(2, 3) if x.dim() == 4 else x for name, x in available.items()}
    copied = {}
    for name, value in student.state_dict().items():
        if not name.startswith("blocks.") and name in available and available[name].shape == value.shape:
            copied[name] = available[name]
    student.load_state_dict(copied, strict=False)  # the blocks keep their new weights
    incomplete = {name.split(".")[0] for name in available.keys() - copied.keys()}
    complete = [part for part, _ in teacher_net.named_children() if part not in incomplete]
    say(f"student takes from its teacher: {', '.join(complete) or 'no whole part: the widths differ'}")
    return student


def make_student_networks(config: TrainConfig, distillation: DistillationConfig, teacher: Teacher) -> Networks:
    """Build students in place of their teachers; the other networks continue from the teacher's run, or are new."""
    devices.seed_everything(config.run.seed, config.run.deterministic)
    networks = copy.deepcopy(teacher.networks)
    for direction in distillation.directions:
        net = teacher.networks[direction.generator]
        shape = student_config(distillation, net.config)
        if config.run.start_from == "0":  # older runs of these kinds resume
            if distillation.student_skips and not net.config.downsamplings:
                raise InputError("--student_skips: has no effect without downsampling layers; leave it out")
            report.refuse_large(shape, net.config)
        networks[direction.generator] = make_student(net, shape, distillation.transfer)
    config_G = teacher.networks[distillation.directions[0].generator].config
    config_G = dataclasses.replace(config_G, rotated=False)
    config_D = DiscriminatorConfig(channels=config_G.channels)
    n_layers = max(1, min(config_D.n_layers, config_D.largest_n_layers(min(config.data.size))))
    config_D = dataclasses.replace(config_D, n_layers=n_layers)
    names = ("G_AB", "G_BA", "D_A", "D_B")
    for name in names:
        if name not in networks:  # the teacher is a single generator
            is_generator = name.startswith("G")
            networks[name] = models.build_generator(config_G) if is_generator else models.build_discriminator(config_D)
    for net in networks.values():
        net.requires_grad_(True).train()
    models.check_image_size(
        networks["G_AB"].config, networks["D_A"].config, *config.data.size, discriminator_is_fixed=True
    )
    return {name: networks[name] for name in names}


def make_adapters(teachers: Networks, students: Networks, teacher_blocks: dict[str, list[int]]) -> nn.ModuleDict:
    """Build a 1x1 convolution for each pair of blocks whose widths differ; saved in states, not part of the student."""
    adapters = nn.ModuleDict()
    for name, teacher in teachers.items():
        teacher_width = teacher.config.hidden_width
        student_width = students[name].config.hidden_width
        if teacher_width != student_width:
            for i in range(len(teacher_blocks[name])):
                adapters[f"{name}_{i}"] = nn.Conv2d(student_width, teacher_width, 1)
    return adapters


def choose_blocks(distillation: DistillationConfig, num_teacher_blocks: int) -> list[int]:
    """Return the teacher block that each student block imitates; raises InputError for impossible --hidden_layers."""
    blocks = distillation.hidden_layers
    if blocks is None:
        return pair_blocks(num_teacher_blocks, distillation.student_residual)
    if len(blocks) != distillation.student_residual or max(blocks, default=0) >= num_teacher_blocks:
        expected = f"{distillation.student_residual} teacher blocks from 0 to {num_teacher_blocks - 1}"
        raise InputError(f"--hidden_layers {','.join(map(str, blocks))}: expected {expected}, one a student block")
    return blocks


def make_student_model(
    config: TrainConfig, distillation: DistillationConfig, teacher: Teacher, device: torch.device
) -> CycleGAN:
    """Build the students and what trains them, and print their cost next to that of their teachers."""
    networks = make_student_networks(config, distillation, teacher)
    teachers = {
        direction.generator: teacher.networks[direction.generator].to(device) for direction in distillation.directions
    }
    blocks = {name: choose_blocks(distillation, net.config.blocks) for name, net in teachers.items()}
    adapters = make_adapters(teachers, networks, blocks)
    objective = DistillationLoss(teachers, adapters, blocks, distillation.lambda_hidden, distillation.lambda_output)
    model = train.make_model(config, networks, device, adapters=adapters, objective=objective)
    if config.run.start_from == "0":
        for name, net in teachers.items():
            costs = report.compare_costs(networks[name], net, config.data.size, model.precision)
            say(f"student {name}, {networks[name].config.blocks} blocks: {costs}")
    return model


# -- The command line ------------------------------------------------------------------------------

# the same on resume
FIXED_STUDENT_OPTIONS = {
    "student_residual",
    "student_ngf",
    "student_skips",
    "direction",
    "hidden_layers",
    "transfer",
    "channels",
}


def make_parser() -> cli.Parser:
    """Declare all options of this command."""
    parser = cli.Parser(prog="distill.py", description=__doc__)
    cli.add_options(parser, "distillation", DistillationConfig)
    for title, kind in SHARED_CONFIGS.items():
        cli.add_options(parser, title, kind, inherited_from="the teacher's")
    for title, kind in RUN_CONFIGS.items():
        cli.add_options(parser, title, kind)
    parser.options["run_name"].help = "name of the run and its folders (default: TEACHER_student or TEACHER_scratch)"
    return parser


def make_inherited_parser() -> cli.Parser:
    """Declare the options that a distillation takes from its teacher unless they are given, with their own defaults."""
    parser = cli.Parser()
    for title, kind in SHARED_CONFIGS.items():
        cli.add_options(parser, title, kind)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line; args.given names the options that were given, the inherited others are None."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.teacher = args.teacher or args.dataset_name or "horse2zebra"
    args.run_name = args.run_name or f"{teacher_name(args.teacher)}_{'student' if args.transfer else 'scratch'}"
    cli.refuse_contradictions(parser, args)
    return args


def teacher_name(teacher: str) -> str:
    """Return a folder name for runs of this teacher."""
    path = Path(teacher)
    return path.stem if path.is_file() else teacher


def inherit(args: Namespace, teacher: Teacher) -> Namespace:
    """Fill the options that were not given from the teacher's training, and say which."""
    is_single = teacher.args is None
    old = cli.saved_args(make_inherited_parser(), teacher.args or {}, teacher.path, quiet=is_single)
    if is_folder_name(teacher.metadata.get("dataset_name")):
        old["dataset_name"] = teacher.metadata["dataset_name"]
    if teacher.metadata.get("size"):
        old["img_height"], old["img_width"] = teacher.metadata["size"]
    old |= {f"range_{domain}": range_in_text(limits) for domain, limits in ranges_of(teacher.metadata).items()}
    if teacher.metadata.get("preprocess") in PREPROCESS:
        old["preprocess"] = teacher.metadata["preprocess"]
    if teacher.metadata.get("pages") in CHOICES:
        old["pages"] = teacher.metadata["pages"]
    for name in ("resample_A", "resample_B"):
        if teacher.metadata.get(name) in RESAMPLE:
            old[name] = teacher.metadata[name]
    if "num_epochs" in args.given:
        old["decay_epoch"] = None  # half of the new number
    channels = next(iter(teacher.networks.values())).config.channels
    if args.channels not in (None, channels):
        raise InputError(f"--channels {args.channels}: the teacher {teacher.path} has {channels}; leave the flag out")
    taken = {name: value for name, value in old.items() if name not in args.given}
    source = "defaults, and what the file says of itself" if is_single else f"inherited from {teacher.path}"
    settings = (f"--{name} {value}" for name, value in sorted(taken.items()) if value is not None)
    say(f"{source}: {' '.join(settings)}")
    return cli.changed(args, **{**taken, "channels": channels})


def resume_options(args: Namespace) -> tuple[Namespace, Checkpoint]:
    """Read the state to resume from, and the options that were not given; options added since take their defaults."""
    folder = RUNS / args.run_name
    checkpoint = Checkpoint(*checkpoints.load_checkpoint(folder, args.start_from, "--start_from", "distill"))
    args = cli.resume_args(make_parser(), args, checkpoint, FIXED_STUDENT_OPTIONS)
    for name, action in make_inherited_parser().options.items():
        if getattr(args, name) is None:
            setattr(args, name, action.default)
    return args, checkpoint


def check_same_teacher(run_name: str, teacher: Teacher, checkpoint: Checkpoint) -> None:
    """Raise InputError if a resumed distillation would learn from another teacher than before: a file of other contents."""
    known = checkpoint.state.get("teacher")
    if not isinstance(known, dict) or known.get("sha256") != sha256(teacher.path):
        remedy = f"give that one, perhaps an epoch_NNNN.pt, with --teacher FILE --run_name {run_name}"
        raise InputError(f"{teacher.path}: not the teacher of {checkpoint.path} (its content changed); {remedy}")


def read_configs(args: Namespace) -> tuple[TrainConfig, DistillationConfig, Teacher, Checkpoint | None]:
    """Find the teacher and the checkpoint to resume from, and complete the options by theirs."""
    checkpoint = None
    if args.start_from != "0":
        args, checkpoint = resume_options(args)
    elif not (args.report or args.dry_run):
        checkpoints.refuse_second_run(args.run_name, args.overwrite)
    distillation = cli.config_of(DistillationConfig, args)
    teacher = load_teacher(str(args.teacher), distillation.directions, args.assume)
    distillation = choose_direction(distillation, args.given, teacher)
    if teacher.path.resolve().parent == (RUNS / args.run_name).resolve():
        raise InputError(f"--run_name {args.run_name}: the teacher is there; a student needs a name of its own")
    if checkpoint:
        check_same_teacher(args.run_name, teacher, checkpoint)
    else:
        args = inherit(cli.changed(args, direction=distillation.direction), teacher)
    config = TrainConfig(**cli.config_fields(args, SHARED_CONFIGS | RUN_CONFIGS))
    distances = {"lambda_output": distillation.lambda_output}
    teacher_blocks = [teacher.networks[direction.generator].config.blocks for direction in distillation.directions]
    if min(distillation.student_residual, *teacher_blocks):  # without blocks there are no hidden states to match
        distances["lambda_hidden"] = distillation.lambda_hidden
    elif "lambda_hidden" in args.given and distillation.lambda_hidden:
        raise InputError(
            f"--lambda_hidden {distillation.lambda_hidden:g}: networks of 0 blocks have no hidden states to match; leave it out"
        )
    config.check(**distances)
    return config, distillation, teacher, checkpoint


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Distil, from the start or from a checkpoint; or compare an existing student with its teacher."""
    config, distillation, teacher, checkpoint = read_configs(parse_args(argv))
    device = devices.pick_device(config.device.device)
    if distillation.report:
        write_report(config, distillation, teacher, device)
    elif config.run.dry_run:
        train.dry_run(config, make_student_model(config, distillation, teacher, device))
    else:
        make_run(config, distillation, teacher, device).start(checkpoint)


def make_run(
    config: TrainConfig, distillation: DistillationConfig, teacher: Teacher, device: torch.device
) -> train.Run:
    """Build the run that trains the students."""
    model = make_student_model(config, distillation, teacher, device)
    data = train.load_data(config, device, measure=False)  # after what may be refused: it can fill a cache
    objective: Any = model.objective  # a DistillationLoss
    draw_rows = functools.partial(cyclegan_rows, teachers=objective.teachers)
    monitor = train.make_monitor(config, [*cyclegan.loss_names(config.loss), *objective.names], draw_rows)
    origin = {"path": str(teacher.path), "sha256": sha256(teacher.path)}
    return train.Run("distill", config, model, data, monitor, teacher=origin)


def write_report(config: TrainConfig, distillation: DistillationConfig, teacher: Teacher, device: torch.device) -> None:
    """Compare teacher, student, and the student from scratch where it exists."""
    limit_pixels(1e6 * config.data.max_megapixels)
    use_pages(config.data.pages)
    report.Report(
        teacher.networks,
        teacher.path,
        str(config.run.run_name),
        f"{teacher_name(str(distillation.teacher))}_scratch",
        config.data,
        device,
        devices.pick_precision(config.device.precision, device),
    ).write(distillation.directions, explicit="direction" in config.given)


if __name__ == "__main__":
    main()
