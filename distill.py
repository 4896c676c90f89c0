"""Distil a trained teacher into a student with fewer blocks or channels.

    python distill.py --dataset_name horse2zebra
    python distill.py --teacher day2night --direction AtoB --student_residual 3 --student_ngf 16 --run_name thin
    python distill.py --teacher day2night --no-transfer --run_name day2night_scratch
    python distill.py --teacher day2night --report

The student takes its teacher's place in the CycleGAN objective and also learns its hidden states and images; the
other networks go on from the teacher's. The report takes test images of one name for pairs.
source: elephantmipt/cycle-gan-distillation (the idea); Li et al. 2020, GAN Compression (1x1 adapters)
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports last: no traceback out of them

import copy
import dataclasses
import functools
import hashlib
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cyclegan
import datasets
import models
import train
import utils
from models import LEGACY_DIRECTIONS
from toolkit import checkpoints, cli, devices, images, process
from toolkit.checkpoints import IMAGES, RUNS
from toolkit.files import write_json
from toolkit.inference import check_together
from toolkit.monitor import distillation_rows
from toolkit.report import compare_costs, refuse_large, report_direction, report_rows
from toolkit.weights import load_generator
from utils import InputError, say

COPIED = ("stem", "down", "position", "leave", "up", "skips", "head")  # all but the blocks, whose number differs
STUDENT_FLAGS = ("student_residual", "student_ngf", "student_skips")
FIXED_FLAGS = (*STUDENT_FLAGS, "direction", "hidden_layers", "transfer", "channels")


# ---------------------------------------------------------------------------------------------
# The objective


def hidden_loss(hidden: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean squared error between a student's hidden states and those of its teacher, mean over the pairs.

    hidden, targets: states of equal shapes, pair by pair
    returns:         scalar, at least 0
    raises:          ValueError if the shapes or counts differ (mse_loss would broadcast one state over three)
    """
    if [x.shape for x in hidden] != [x.shape for x in targets]:
        raise ValueError("hidden states differ in number or shape")
    losses: Any = (F.mse_loss(cyclegan.to_float(x), cyclegan.to_float(y)) for x, y in zip(hidden, targets, strict=True))
    return sum(losses) / len(hidden)


def pair_blocks(teacher_blocks: int, student_blocks: int) -> list[int]:
    """Which teacher block each student block imitates: spread evenly, the last with the last; 1, 4, 8 for 9 → 3."""
    if (teacher_blocks, student_blocks) == (9, 3):
        return [1, 4, 8]
    if not teacher_blocks:
        return []
    return [max(0, round((i + 1) * teacher_blocks / student_blocks) - 1) for i in range(student_blocks)]


@dataclass
class DistillationLoss:
    """The CycleGAN objective with students in their teachers' places, plus the distance to their teachers."""

    teachers: models.Nets  # frozen, by the name of the generator that learns from them
    adapters: nn.ModuleDict  # where widths differ: NAME_i brings block i of a student to its teacher's width
    pairs: Sequence[int]  # the teacher block that each student block imitates
    lambda_hidden: float
    lambda_output: float

    def __call__(
        self, nets: dict[str, Callable], domain: str, real: Tensor, config: cyclegan.LossConfig
    ) -> tuple[Tensor, dict[str, Tensor], dict]:
        """As cyclegan.generator_loss, with the terms hidden_XY and output_XY of the student that translates `real`."""
        letters = domain + cyclegan.OTHER[domain]
        name = f"G_{letters}"
        taught = name in self.teachers
        with_hidden = taught and bool(self.pairs)
        loss, terms, images = cyclegan.generator_loss(nets, domain, real, config, with_hidden)
        if not taught:
            return loss, terms, images
        with torch.no_grad():
            target, states = self.teachers[name](real, return_hidden=True)
        terms[f"output_{letters}"] = cyclegan.image_loss(images["fake"], target)
        loss = loss + self.lambda_output * terms[f"output_{letters}"]
        if self.pairs:
            hidden = images["hidden"]
            if f"{name}_0" in self.adapters:
                hidden = [self.adapters[f"{name}_{i}"](state) for i, state in enumerate(hidden)]
            terms[f"hidden_{letters}"] = hidden_loss(hidden, [states[block] for block in self.pairs])
            loss = loss + self.lambda_hidden * terms[f"hidden_{letters}"]
        return loss, terms, images


# ---------------------------------------------------------------------------------------------
# Teacher and student


@dataclass
class Teacher:
    """Frozen generators by name, where they come from, and what was learnt beside them."""

    nets: models.Nets  # G_AB, G_BA, D_A, D_B; of a single file, one generator
    flags: object  # of its training, not checked yet; a single file has none
    path: Path
    single: bool  # one generator alone
    facts: dict  # that a single file records: size (height, width) in px, dataset_name

    def fingerprint(self) -> str:
        """What a resumed distillation compares: it must go on with the very same teacher, wherever that lies now."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def load_teacher(name: str, students: Sequence[str]) -> Teacher:
    """Read a run's latest state, any whole-state file, or a single generator file (ours or another project's).

    students: names of the generators that shall get one; the first names a file that tells no direction
    raises:   InputError if there is no such teacher, or it cannot be used
    """
    path = Path(name)
    state = None
    if (RUNS / name).is_dir() and not path.is_file():
        state, path = checkpoints.load_checkpoint(RUNS / name, "latest", f"--teacher {name}, epoch")
    if not path.is_file():
        hint = f"runs found: {checkpoints.found_runs()}; train one with: python train.py"
        raise InputError(f"--teacher {name}: no such run or file; {hint}")
    if state or checkpoints.is_state(path):
        state = state or checkpoints.load_state(path)
        teacher = Teacher(checkpoints.networks_of(state, path), state.get("args"), path, single=False, facts={})
    else:
        net, metadata = load_generator(path)
        name = next((key for key in LEGACY_DIRECTIONS if LEGACY_DIRECTIONS[key] == metadata["direction"]), students[0])
        say(f"{path}: a single generator, so the other one and the discriminators start new")
        teacher = Teacher({name: net}, None, path, single=True, facts=metadata)
    check_together(teacher.nets, path, teacher.facts.get("size"))
    for net in teacher.nets.values():
        net.requires_grad_(False).eval()
    return teacher


def settle_direction(args: Namespace, teacher: Teacher) -> Namespace:
    """Let a single generator have the one student that it can have; raises InputError if another one was asked for."""
    present = [direction for name, direction in LEGACY_DIRECTIONS.items() if name in teacher.nets]
    if len(present) == 1 and "direction" not in args.given:
        return cli.changed(args, direction=present[0])
    missing = [LEGACY_DIRECTIONS[name] for name in students_of(args) if name not in teacher.nets]
    if missing:
        words = f"translates {', '.join(present) or 'nothing'} only, not {missing[0]}; give that --direction"
        raise InputError(f"--teacher {teacher.path}: {words}")
    return args


def copy_outer_layers(student: models.Generator, teacher: models.Generator) -> None:
    """Start a student from what fits of its teacher, all but the blocks, and say what that is."""
    theirs = teacher.state_dict()
    copied = {}
    for name, value in student.state_dict().items():
        part = name.split(".")[0]
        if part in COPIED and name in theirs and theirs[name].shape == value.shape:  # skips may be the student's alone
            copied[name] = theirs[name]
    student.load_state_dict(copied, strict=False)  # the rest, above all the blocks, is meant to stay new
    changed = {name.split(".")[0] for name in theirs.keys() - copied.keys()}
    whole = [part for part, _ in teacher.named_children() if part not in changed]
    say(f"student takes from its teacher: {', '.join(whole) or 'no whole part: the widths differ'}")


def student_config(args: Namespace, teacher: models.GeneratorConfig) -> models.GeneratorConfig:
    """The config of a teacher, but for the blocks, the width and the skips of its student."""
    if teacher.generator == "resnet":
        ngf = args.student_ngf or teacher.ngf
        skips = teacher.skips if args.student_skips is None else args.student_skips
        return dataclasses.replace(teacher, num_residual=args.student_residual, ngf=ngf, skips=skips)
    if args.student_ngf:
        raise InputError(f"--student_ngf {args.student_ngf}: the width of a {teacher.generator} is fixed; leave it out")
    if args.student_skips is not None:
        given = "--student_skips" if args.student_skips else "--no-student_skips"
        raise InputError(f"{given}: the skips of a {teacher.generator} are fixed; leave it out")
    return dataclasses.replace(teacher, vit_blocks=args.student_residual)


def make_student(teacher: models.Generator, config: models.GeneratorConfig, transfer: bool) -> models.Generator:
    """Build a smaller generator of the same family; with transfer it starts from what fits of its teacher."""
    student = models.build_generator(config)
    if transfer:
        copy_outer_layers(student, teacher)
    return student


def make_adapters(teachers: models.Nets, students: models.Nets, pairs: Sequence[int]) -> nn.ModuleDict:
    """Make a 1x1 convolution per pair of blocks where the widths differ; they learn and are thrown away."""
    adapters = nn.ModuleDict()
    for name, teacher in teachers.items():
        wide = teacher.config.hidden_width
        thin = students[name].config.hidden_width
        if wide != thin:
            for i in range(len(pairs)):
                adapters[f"{name}_{i}"] = nn.Conv2d(thin, wide, 1)
    return adapters


def make_nets(args: Namespace, teacher: Teacher) -> models.Nets:
    """Put students in their teachers' places; the rest goes on from what the teacher's run learnt, or starts new."""
    devices.seed_everything(args.seed, args.deterministic)
    config = teacher.nets[students_of(args)[0]].config
    config_D = models.DiscriminatorConfig(channels=config.channels)
    deepest = config_D.largest_n_layers(min(args.img_height, args.img_width))
    config_D = dataclasses.replace(config_D, n_layers=max(1, min(config_D.n_layers, deepest)))
    nets: models.Nets = {}
    for name in students_of(args):
        net = teacher.nets[name]
        nets[name] = make_student(net, student_config(args, net.config), args.transfer)
    for name in ("G_AB", "G_BA", "D_A", "D_B"):
        if name not in nets and name in teacher.nets:
            nets[name] = copy.deepcopy(teacher.nets[name])
        elif name not in nets:
            nets[name] = (
                models.build_generator(config) if name in LEGACY_DIRECTIONS else models.build_discriminator(config_D)
            )
    for net in nets.values():
        net.requires_grad_(True).train()
    cli.check_sizes(args, nets["G_AB"].config, nets["D_A"].config)
    return {name: nets[name] for name in ("G_AB", "G_BA", "D_A", "D_B")}


# ---------------------------------------------------------------------------------------------
# The report


def report(args: Namespace, teacher: Teacher, device: torch.device) -> None:
    """Print and write a table and a grid of images: teacher, student, and the student from scratch."""
    images.limit_pixels(1e6 * args.max_megapixels)
    tables = {}
    for name in students_of(args):
        rows, size = report_rows(teacher.nets, teacher.path, name, args.run_name, f"{teacher_name(args)}_scratch")
        if "direction" in args.given or rows["student"][0][name].config != teacher.nets[name].config:
            dataset = datasets.find_dataset(args.data_root, args.dataset_name)
            precision = devices.pick_precision(args.precision, device)
            tables[name], grid = report_direction(rows, name, size, dataset, args.on_bad_image, device, precision)
            images.save_image(images.draw_grid(grid), IMAGES / args.run_name / f"report_{name}.png")
        else:
            say(f"{LEGACY_DIRECTIONS[name]}: {args.run_name} has no student for it")
    write_json(IMAGES / args.run_name / "report.json", tables)
    say(f"written to {IMAGES / args.run_name}/report.json, images beside it")


# ---------------------------------------------------------------------------------------------
# The command line


def students_of(args: Namespace) -> list[str]:
    """Names of the generators that get a student."""
    return [name for name, direction in LEGACY_DIRECTIONS.items() if args.direction in ("both", direction)]


def teacher_name(args: Namespace) -> str:
    """A folder name for what is made from this teacher."""
    path = Path(args.teacher)
    return path.stem if path.is_file() else args.teacher


def run_or_file(text: str) -> str:
    """Flag type: an existing file, or one plain folder name in saved_models."""
    return text if Path(text).is_file() else cli.folder_name(text)


def block_list(text: str) -> list[int] | None:
    """Flag type: teacher blocks, separated by commas, or auto."""
    return None if text == "auto" else [cli.int_between(0)(word) for word in text.split(",")]


def add_inherited_flags(parser: cli.Parser) -> cli.Parser:
    """Declare the flags that a distillation takes from its teacher unless they are given; returns the parser."""
    for add_flags in (cli.add_data_flags, cli.add_loss_flags, cli.add_optim_flags):
        add_flags(parser)
    return parser


def make_parser() -> cli.Parser:
    """Declare all flags of this stage."""
    parser = cli.Parser(prog="distill.py", description=__doc__)
    add = cli.flag_group(parser, "distillation")
    words = "run, checkpoint or generator file (default: the run named --dataset_name)"
    add("--teacher", type=run_or_file, default=None, metavar="RUN_OR_FILE", help=words)
    words = "which generators get a student (of a single file: the one that it holds)"
    add("--direction", choices=("both", *LEGACY_DIRECTIONS.values()), default="both", help=words)
    add("--student_residual", type=cli.int_between(0, 1000), default=3, help="blocks of the student")
    add("--student_ngf", type=cli.int_between(1, 4096), help="width of a resnet student (default: its teacher's)")
    words = "lead what the halvings lose around the blocks of a resnet student (default: as its teacher)"
    add("--student_skips", action=BooleanOptionalAction, default=None, help=words)
    words = "teacher block for each student block (default: auto; 1,4,8 for 9 → 3)"
    add("--hidden_layers", type=block_list, default=None, metavar="I,J,…", help=words)
    add("--lambda_hidden", type=cli.float_between(0), default=1.0, help="weight of the distance of hidden states")
    add("--lambda_output", type=cli.float_between(0), default=10.0, help="weight of the distance of images")
    add("--transfer", action=BooleanOptionalAction, default=True, help="start from the teacher's outer layers")
    add("--report", action="store_true", help="compare teacher and student that exist; trains nothing")
    add_inherited_flags(parser)
    for name in add_inherited_flags(cli.Parser()).options:
        action = parser.options[name]
        action.default = None
        action.help = f"{str(action.help).split(' (default')[0]} (default: the teacher's)"
    cli.add_run_flags(parser)
    cli.add_speed_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line; args.given names the flags that stand on it, the inherited others are None."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.teacher = args.teacher or args.dataset_name or "horse2zebra"
    args.run_name = args.run_name or f"{teacher_name(args)}_{'student' if args.transfer else 'scratch'}"
    cli.refuse_contradictions(parser, args)
    return args


def inherit(args: Namespace, teacher: Teacher) -> Namespace:
    """Fill the data, loss and optimiser flags that were not given from the teacher's training, and say which."""
    parser = add_inherited_flags(cli.Parser())
    if teacher.single:
        old = {name: action.default for name, action in parser.options.items()}
    else:
        old = cli.saved_flags(parser, teacher.flags, teacher.path)
    if utils.is_folder_name(teacher.facts.get("dataset_name")):
        old["dataset_name"] = teacher.facts["dataset_name"]
    if teacher.facts.get("size"):
        old |= dict(zip(("img_height", "img_width"), teacher.facts["size"], strict=True))
    if "num_epochs" in args.given:
        old["decay_epoch"] = None  # half of the new number, not of the teacher's
    channels = next(iter(teacher.nets.values())).config.channels
    if args.channels not in (None, channels):
        raise InputError(f"--channels {args.channels}: the teacher {teacher.path} has {channels}; leave the flag out")
    taken = {name: value for name, value in old.items() if name not in args.given}
    words = " ".join(f"--{name} {value}" for name, value in sorted(taken.items()) if value is not None)
    source = "defaults, and what the file says of itself" if teacher.single else f"inherited from {teacher.path}"
    say(f"{source}: {words}")
    return cli.changed(args, **{**taken, "channels": channels})


def choose_pairs(args: Namespace, teacher_blocks: int) -> list[int]:
    """Settle which teacher block each student block imitates."""
    if args.hidden_layers is None:
        return pair_blocks(teacher_blocks, args.student_residual)
    if len(args.hidden_layers) != args.student_residual or max(args.hidden_layers, default=0) >= teacher_blocks:
        given = ",".join(map(str, args.hidden_layers))
        words = f"expected {args.student_residual} teacher blocks, one for each student block"
        raise InputError(f"--hidden_layers {given}: {words}, from 0 to {teacher_blocks - 1}")
    return args.hidden_layers


def distil(args: Namespace, teacher: Teacher, device: torch.device, state: dict | None, path: Path | None) -> None:
    """Build the students and what they learn from, and run train.py's loop with their objective."""
    if state is None:
        for name in students_of(args):
            refuse_large(student_config(args, teacher.nets[name].config), teacher.nets[name].config)
    dataset, feed = train.make_feed(args, device)
    nets = make_nets(args, teacher)
    teachers = {name: teacher.nets[name].to(device) for name in students_of(args)}
    pairs = choose_pairs(args, next(iter(teachers.values())).config.blocks)
    adapters = make_adapters(teachers, nets, pairs)
    loss = DistillationLoss(teachers, adapters, pairs, args.lambda_hidden, args.lambda_output)
    model = train.make_model(args, nets, device, adapters, loss)
    if state is None:
        for name, net in teachers.items():
            costs = compare_costs(nets[name], net, (args.img_height, args.img_width), model.precision)
            say(f"student {name}, {nets[name].config.blocks} blocks: {costs}")
    draw_rows = functools.partial(distillation_rows, teachers=teachers)
    terms = [f"{kind}_{name[2:]}" for name in teachers for kind in ("output", "hidden")]
    monitor = train.make_monitor(args, dataset, [*cyclegan.loss_names(model.loss_config), *terms], draw_rows)
    saver = train.make_saver(args, "distill", teacher={"path": str(teacher.path), "sha256": teacher.fingerprint()})
    train.run(args, model, feed, saver, monitor, state, path)


@process.command
def main(argv: Sequence[str] | None = None) -> None:
    """Distil, from the start or from a checkpoint; or report."""
    args = parse_args(argv)
    state = None
    checkpoint = None
    if args.start_from != "0":
        folder = RUNS / args.run_name
        state, checkpoint = checkpoints.load_checkpoint(folder, args.start_from, "--start_from", "distill")
        args = cli.resume_flags(make_parser(), args, state.get("args"), checkpoint, FIXED_FLAGS)
        parser = add_inherited_flags(cli.Parser())
        defaults = {name: action.default for name, action in parser.options.items()}  # of flags that came later
        later = cli.saved_flags(parser, defaults | state["args"], checkpoint)
        args = cli.changed(args, **{name: v for name, v in later.items() if getattr(args, name) is None})
    elif not args.report:
        checkpoints.refuse_second_run(args.run_name, args.overwrite, cli.plain_flags(args))
    teacher = load_teacher(str(args.teacher), students_of(args))
    args = settle_direction(args, teacher)
    if teacher.path.resolve().parent == (RUNS / args.run_name).resolve():  # however it is named
        raise InputError(f"--run_name {args.run_name}: the teacher is there; a student needs a name of its own")
    if state is None:
        args = inherit(args, teacher)
    elif not isinstance(known := state.get("teacher"), dict) or known.get("sha256") != teacher.fingerprint():
        words = f"not the teacher that {checkpoint} learnt from (its content changed)"
        give = f"give that one, maybe kept as an epoch_NNNN.pt, with --teacher FILE --run_name {args.run_name}"
        raise InputError(f"{teacher.path}: {words}; {give}")
    cli.check_run_flags(args)
    device = devices.pick_device(args.device)
    if args.report:
        report(args, teacher, device)
    else:
        distil(args, teacher, device, state, checkpoint)


if __name__ == "__main__":
    main()
