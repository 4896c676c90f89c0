"""Distil a trained teacher into a student with fewer blocks or channels.

    python distill.py --dataset_name horse2zebra
    python distill.py --teacher day2night --direction both --student_residual 3 --student_ngf 16 --run_name thin
    python distill.py --teacher day2night --no-transfer --run_name day2night_scratch
    python distill.py --teacher day2night --report

The student takes its teacher's place in the CycleGAN objective and also learns the teacher's
hidden states and pictures. The other generator and the discriminators go on from the teacher's.
The report takes test pictures of the same name for pairs; where they are none, its match@1 is near 0.
source: elephantmipt/cycle-gan-distillation (the idea); Li et al. 2020, GAN Compression (1x1 adapters)
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import datasets
import metrics
import models
import utils
import weights
from train import (
    Run,
    Task,
    carry_out,
    check_sizes,
    cyclegan_objective,
    cyclegan_rows,
    loss_names,
    make_feed,
    make_run,
    refuse_contradictions,
    refuse_second_run,
    resume_args,
    settle,
    translate,
)
from weights import DIRECTIONS

COPIED = ("stem", "down", "position", "leave", "up", "head")  # all but the blocks, whose number differs


@dataclass
class Teacher:
    """Frozen generators by name, where they come from, and what was learnt beside them."""

    nets: dict[str, nn.Module]  # G_AB, G_BA, D_A, D_B; of a single file, one generator
    flags: object  # of its training, not checked yet; a single file has none
    path: Path
    single: bool  # one generator alone
    size: list[int] | None = None  # height and width that a single file records, px

    def fingerprint(self) -> dict:
        """What a resumed distillation compares: it must go on with the very same teacher."""
        return {"path": str(self.path), "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()}


# ---------------------------------------------------------------------------------------------
# Teacher and student


def load_teacher(name: str, students: Sequence[str]) -> Teacher:
    """Read a run's latest state, any whole-state file, or a single generator file (ours or another project's).

    students: names of the generators that shall get one
    raises:   InputError if there is no such teacher, or it lacks one of these generators
    """
    folder, path, state = Path("saved_models") / name, Path(name), None
    if folder.is_dir() and not path.is_file():
        state, path = utils.load_checkpoint(folder, "latest", f"--teacher {name}, epoch")
    if not path.is_file():
        hint = f"runs found: {utils.found_runs()}; train one with: python train.py"
        raise utils.InputError(f"--teacher {name}: no such run or file; {hint}")
    if not state and utils.is_state(path):
        state = utils.load_state(path)
    if state:
        teacher = Teacher(weights.networks_of(state, path), state.get("args"), path, single=False)
    else:
        net, recipe = weights.load_generator(path)
        known = [key for key, direction in DIRECTIONS.items() if direction == recipe["direction"]] or students[:1]
        utils.say(f"{path}: a single generator, so the other one and the discriminators start new")
        teacher = Teacher({known[0]: net}, None, path, single=True, size=recipe["size"])
    missing = [DIRECTIONS[key] for key in students if key not in teacher.nets]
    if missing:
        present = ", ".join(DIRECTIONS[key] for key in teacher.nets if key in DIRECTIONS)
        raise utils.InputError(f"--teacher {path}: translates {present} only, not {missing[0]}; give that --direction")
    return teacher


def pair_blocks(teacher_blocks: int, student_blocks: int) -> list[int]:
    """Which teacher block each student block imitates: spread evenly, the last with the last; 1, 4, 8 for 9 → 3."""
    if (teacher_blocks, student_blocks) == (9, 3):
        return [1, 4, 8]
    return [
        max(0, round((i + 1) * teacher_blocks / student_blocks) - 1)
        for i in range(student_blocks if teacher_blocks else 0)
    ]


def make_student(teacher: nn.Module, num_residual: int, ngf: int, transfer: bool) -> nn.Module:
    """Build a smaller generator of the same family; with transfer it starts from what fits of its teacher."""
    resnet = teacher.config.generator == "resnet"
    smaller = {"num_residual": num_residual, "ngf": ngf} if resnet else {"vit_blocks": num_residual}
    config = dataclasses.replace(teacher.config, **smaller)
    student = models.build_generator(config)
    if transfer:
        theirs, copied = teacher.state_dict(), {}
        for name, value in student.state_dict().items():
            if name.split(".")[0] in COPIED and theirs[name].shape == value.shape:
                copied[name] = theirs[name]
        student.load_state_dict(copied, strict=False)  # the rest, above all the blocks, is meant to stay new
        names = {part: [name for name in theirs if name.split(".")[0] == part] for part in COPIED}
        parts = [part for part in COPIED if names[part] and all(name in copied for name in names[part])]
        utils.say(f"student takes from its teacher: {', '.join(parts) or 'no whole part: the widths differ'}")
    ratio = sum(p.numel() for p in teacher.parameters()) / sum(p.numel() for p in student.parameters())
    width = f", ngf {ngf}" if resnet else ""
    utils.say(f"student: {num_residual} blocks{width}: {ratio:.1f}x fewer parameters than its teacher")
    if ratio < 1:
        utils.say("warning: the student is larger than its teacher")
    return student


def make_adapters(
    teachers: dict[str, nn.Module], students: dict[str, nn.Module], pairs: Sequence[int]
) -> nn.ModuleDict:
    """Make a 1x1 convolution per pair of blocks where the widths differ; they learn with the student and are thrown away."""
    adapters = nn.ModuleDict()
    for name, teacher in teachers.items():
        wide, thin = (net.config.hidden_width for net in (teacher, students[name]))
        for i in range(len(pairs) if wide != thin else 0):
            adapters[f"{name}_{i}"] = nn.Conv2d(thin, wide, 1)
    return adapters


# ---------------------------------------------------------------------------------------------
# The objective


def distill_objective(
    run: Run, real_A: Tensor, real_B: Tensor, teachers: dict[str, nn.Module], pairs: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor], dict]:
    """The CycleGAN objective with the student in the teacher's place, its teacher's hidden states and pictures.

    returns: as cyclegan_objective, with the terms hidden_XY and output_XY of each student
    """
    loss, terms, seen = cyclegan_objective(run, real_A, real_B)
    for name, teacher in teachers.items():
        letters = name[2:]
        with utils.autocast(run.device, run.precision):
            with torch.no_grad():
                picture, states = teacher(real_A if letters[0] == "A" else real_B, return_hidden=True)
            own = seen[f"hidden_{letters}"]
            if f"{name}_0" in run.adapters:
                own = [run.adapters[f"{name}_{i}"](state) for i, state in enumerate(own)]
        terms[f"output_{letters}"] = models.picture_loss(seen[f"fake_{letters[1]}"], picture)
        loss = loss + run.args.lambda_output * terms[f"output_{letters}"]
        if pairs:
            terms[f"hidden_{letters}"] = models.hidden_loss(own, [states[block] for block in pairs])
            loss = loss + run.args.lambda_hidden * terms[f"hidden_{letters}"]
    return loss, terms, seen


def distill_rows(run: Run, real_A: Tensor, real_B: Tensor, teachers: dict[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """The rows of a CycleGAN grid, and under each student's pictures those of its teacher."""
    rows, reals = [], {"A": real_A, "B": real_B}
    for label, pictures in cyclegan_rows(run, real_A, real_B):
        rows.append((label, pictures))
        for name, teacher in teachers.items():
            if label == f"fake_{name[3]}":
                rows.append((f"teacher_{name[3]}", translate(run, teacher, reals[name[2]])))
    return rows


# ---------------------------------------------------------------------------------------------
# The report


@dataclass
class Row:
    """One row of the report: a run's generators, the file that would be shipped, the size it was trained at."""

    nets: dict[str, nn.Module]
    file: Path
    size: Sequence[int] | None


@torch.no_grad()
def report_direction(args: argparse.Namespace, name: str, rows: dict[str, Row], device: torch.device) -> dict:
    """Compare networks of one direction: cost, and quality on the held-out pictures; returns the figures by row."""
    source, target, size = name[2], name[3], rows["student"].size
    precision, channels = utils.pick_precision(args.precision, device), rows["student"].nets[name].config.channels
    dataset = datasets.find_dataset(args.data_root, args.dataset_name)
    folders = (dataset / f"{datasets.held_out_split(dataset)}{domain}" for domain in (source, target))
    reals, truths = (datasets.named_pictures(folder, size, channels, args.on_bad_image) for folder in folders)
    shown, paired, answers, table = list(reals)[:: max(1, len(reals) // 6)][:6], reals.keys() & truths.keys(), {}, {}

    blank = torch.zeros(1, channels, *size)

    def ask(net: nn.Module, picture: Tensor) -> Tensor:
        with utils.autocast(device, precision):
            return net(picture.to(device)).float()

    def run(net: nn.Module, pictures: dict[Path, Tensor]) -> dict[Path, Tensor]:
        net.to(device).eval()
        return {stem: ask(net, x).cpu() for stem, x in pictures.items()}

    def distance(these: dict[Path, Tensor], those: dict[Path, Tensor]) -> float:
        return metrics.mean_distance([(these[stem], those[stem]) for stem in reals])

    for label, row in rows.items():
        net, back = row.nets[name], row.nets.get(f"G_{target}{source}")
        mine = answers[label] = run(net, reals)
        table[label] = figures = {
            "parameters": sum(p.numel() for p in net.parameters()),
            "MMACs": models.count_macs(net, *size) / 1e6,
            "ms": metrics.median_ms(lambda net=net: ask(net, blank).cpu()),
            "MB": row.file.stat().st_size / 1e6,
            "L1 to teacher": distance(mine, answers["teacher"]),
        }
        if back:
            figures["cycle"] = distance(run(back, mine), reals)
        if paired:
            both = ([utils.range_to_bytes(pictures[stem][0]) for stem in sorted(paired)] for pictures in (mine, truths))
            scores = metrics.paired_scores(*both)
            figures |= {key: scores[key] for key in ("PSNR", "SSIM", "match@1")}
    grid = {f"real_{source}": reals, **answers} | ({f"real_{target}": truths} if set(shown) <= paired else {})
    picture = utils.draw_grid([(label, torch.cat([x[stem] for stem in shown])) for label, x in grid.items()])
    utils.save_picture(picture, Path("generated_images") / args.run_name / f"report_{name}.png")
    return table


def read_row(run_name: str, name: str) -> Row | None:
    """Read a run's generators for the report, if it has the one named."""
    files = {key: Path("saved_models") / run_name / f"{key}.safetensors" for key in DIRECTIONS}
    if not files[name].is_file():
        return None
    nets, size = {}, None
    for key, file in files.items():
        if file.is_file():
            nets[key], recipe = weights.load_generator(file)
            size = recipe["size"]
    return Row(nets, files[name], size)


def report(args: argparse.Namespace, teacher: Teacher, device: torch.device) -> None:
    """Print and write a table and a picture: teacher, student, and the student from scratch if its run exists."""
    datasets.limit_pixels(1e6 * args.max_megapixels)
    tables, folder = {}, Path("generated_images") / args.run_name
    about = f"{device}, {torch.get_num_threads()} threads, {utils.pick_precision(args.precision, device)}"
    for name in wanted(args):
        beside = teacher.path.parent / f"{name}.safetensors"  # what of a run is shipped, without optimisers
        rows = {"teacher": Row(teacher.nets, beside if beside.is_file() else teacher.path, teacher.size)}
        for label, run_name in (("student", args.run_name), ("scratch", f"{teacher_name(args)}_scratch")):
            row = read_row(run_name, name)
            rows |= {label: row} if row and (label == "student" or run_name != args.run_name) else {}
        channels = {row.nets[name].config.channels for row in rows.values()}
        if len(channels) > 1:
            raise utils.InputError(
                f"--report: {args.run_name} and its teacher differ in channels; it is no student of {args.teacher}"
            )
        if "student" not in rows:
            raise utils.InputError(
                f"--report: no student in saved_models/{args.run_name}; distil one first, without --report, or name one with --run_name"
            )
        tables[name] = report_direction(args, name, rows, device)
        utils.say(f"{DIRECTIONS[name]} at {'x'.join(map(str, rows['student'].size[::-1]))} px; milliseconds on {about}")
        for line in metrics.format_table(tables[name]):
            utils.say(line)
    utils.write_json(folder / "report.json", tables)
    utils.say(f"written to {folder}/report.json, pictures beside it")


# ---------------------------------------------------------------------------------------------
# The command line


def wanted(args: argparse.Namespace) -> list[str]:
    """Names of the generators that get a student."""
    return [name for name, direction in DIRECTIONS.items() if args.direction in ("both", direction)]


def teacher_name(args: argparse.Namespace) -> str:
    """A folder name for what is made from this teacher."""
    path = Path(args.teacher)
    return path.stem if path.is_file() else args.teacher


def run_or_file(text: str) -> str:
    """Flag type: an existing file, or one plain folder name in saved_models."""
    return text if Path(text).is_file() else utils.folder_name(text)


def block_list(text: str) -> list[int] | None:
    """Flag type: teacher blocks, separated by commas, or auto."""
    return None if text == "auto" else [utils.whole(0)(word) for word in text.split(",")]


def add_inherited_flags(parser: utils.Parser) -> None:
    """The flags that a distillation takes from its teacher unless they are given."""
    for add_flags in (utils.add_data_flags, utils.add_loss_flags, utils.add_optim_flags):
        add_flags(parser)


def plain_parser() -> utils.Parser:
    """The inherited flags alone, with the defaults of train.py."""
    parser = utils.Parser()
    add_inherited_flags(parser)
    return parser


def inherited_names() -> set[str]:
    """Names of the flags that a distillation can inherit."""
    return {action.dest for action in plain_parser()._actions if action.dest != "help"}


def make_parser() -> utils.Parser:
    """Declare all flags of this stage."""
    parser = utils.Parser(prog="distill.py", description=__doc__)
    add = utils.flag_group(parser, "distillation")
    words = "run, checkpoint or generator file (default: the run named --dataset_name)"
    add("--teacher", type=run_or_file, default=None, metavar="RUN_OR_FILE", help=words)
    add("--direction", choices=("BtoA", "AtoB", "both"), default="BtoA", help="which generator gets a student")
    add("--student_residual", type=utils.whole(0, 1000), default=3, help="blocks of the student")
    add("--student_ngf", type=utils.whole(1, 4096), help="width of a resnet student (default: its teacher's)")
    words = "teacher block for each student block (default: auto; 1,4,8 for 9 → 3)"
    add("--hidden_layers", type=block_list, default=None, metavar="I,J,…", help=words)
    add("--lambda_hidden", type=utils.number(0), default=1.0, help="weight of the distance between hidden states")
    add("--lambda_output", type=utils.number(0), default=10.0, help="weight of the distance to the teacher's picture")
    add("--transfer", action=argparse.BooleanOptionalAction, default=True, help="start from the teacher's outer layers")
    add("--report", action="store_true", help="compare teacher and student that exist; trains nothing")
    add_inherited_flags(parser)
    for action in parser._actions:
        if action.dest in inherited_names():
            action.default, action.help = None, f"{action.help.split(' (default')[0]} (default: the teacher's)"
    utils.add_run_flags(parser)
    utils.add_speed_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; args.given names the flags that stand on it, the inherited others are None."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.given = utils.given_flags(parser, argv)
    args.teacher = args.teacher or args.dataset_name or "horse2zebra"
    args.run_name = args.run_name or f"{teacher_name(args)}_{'student' if args.transfer else 'scratch'}"
    refuse_contradictions(parser, args)
    return args


def inherit(args: argparse.Namespace, teacher: Teacher) -> argparse.Namespace:
    """Fill the data, loss and optimiser flags that were not given from the teacher's training, and say which."""
    parser, values = plain_parser(), vars(args).copy()
    old = vars(parser.parse_args([]) if teacher.single else utils.recall_flags(parser, teacher.flags, teacher.path))
    if teacher.size:
        old |= {"img_height": teacher.size[0], "img_width": teacher.size[1]}
    if "num_epochs" in args.given:
        old["decay_epoch"] = None  # half of the new number, not of the teacher's
    channels = next(iter(teacher.nets.values())).config.channels
    if args.channels not in (None, channels):
        raise utils.InputError(
            f"--channels {args.channels}: the teacher {teacher.path} has {channels}; leave the flag out"
        )
    taken = {name: value for name, value in old.items() if name not in args.given}
    utils.say(
        f"inherited from {teacher.path}: " + " ".join(f"--{n} {v}" for n, v in sorted(taken.items()) if v is not None)
    )
    return argparse.Namespace(**{**values, **taken, "channels": channels})


def choose_pairs(args: argparse.Namespace, teacher_blocks: int) -> list[int]:
    """Settle which teacher block each student block imitates."""
    if args.hidden_layers is None:
        return pair_blocks(teacher_blocks, args.student_residual)
    if len(args.hidden_layers) != args.student_residual or max(args.hidden_layers, default=0) >= teacher_blocks:
        raise utils.InputError(
            f"--hidden_layers {','.join(map(str, args.hidden_layers))}: expected {args.student_residual} teacher blocks, "
            f"one for each student block, from 0 to {teacher_blocks - 1}"
        )
    return args.hidden_layers


def make_nets(args: argparse.Namespace, teacher: Teacher) -> dict[str, nn.Module]:
    """Put students in the place of their teachers; the rest goes on from what the teacher's run learnt, or starts new."""
    utils.seed_everything(args.seed, args.deterministic)
    model, nets = teacher.nets[wanted(args)[0]].config, {}
    judge = models.DiscriminatorConfig(channels=model.channels)
    deepest = judge.largest_n_layers(min(args.img_height, args.img_width))
    judge = dataclasses.replace(judge, n_layers=max(1, min(judge.n_layers, deepest)))
    if args.student_ngf and model.generator != "resnet":
        raise utils.InputError(
            f"--student_ngf {args.student_ngf}: the teacher is a {model.generator}, whose width is fixed; leave it out"
        )
    for name in wanted(args):
        ngf = args.student_ngf or teacher.nets[name].config.ngf
        nets[name] = make_student(teacher.nets[name], args.student_residual, ngf, args.transfer)
    for name in ("G_AB", "G_BA", "D_A", "D_B"):
        if name not in nets and name in teacher.nets:
            nets[name] = copy.deepcopy(teacher.nets[name])
        elif name not in nets:
            nets[name] = models.build_generator(model) if name in DIRECTIONS else models.build_discriminator(judge)
    nets = {name: nets[name] for name in ("G_AB", "G_BA", "D_A", "D_B")}
    for net in nets.values():
        net.requires_grad_(True).train()
    check_sizes(args, nets["G_AB"].config, nets["D_A"].config)
    return nets


@utils.stage
def main(argv: Sequence[str] | None = None) -> None:
    """Distil, from the start or from a checkpoint; or report."""
    args, state, checkpoint = parse_args(argv), None, None
    if args.start_from != "0":
        folder = Path("saved_models") / args.run_name
        state, checkpoint = utils.load_checkpoint(folder, args.start_from, "--start_from", "distill")
        plain = vars(utils.recall_flags(plain_parser(), state.get("args"), checkpoint))
        fixed = ("teacher", "direction", "student_residual", "student_ngf", "hidden_layers", "transfer", "channels")
        args = resume_args(make_parser(), args, state.get("args"), checkpoint, fixed)
        # what is still unset is newer than the checkpoint
        unset = {name: value for name, value in plain.items() if getattr(args, name) is None}
        args = argparse.Namespace(**{**vars(args), **unset})
    elif not args.report:
        refuse_second_run(args)
    if args.run_name == args.teacher:
        raise utils.InputError(f"--run_name {args.run_name}: that is the teacher; a student needs a name of its own")
    teacher = load_teacher(str(args.teacher), wanted(args))
    if not state:
        args = inherit(args, teacher)
    elif state.get("teacher") != teacher.fingerprint():
        raise utils.InputError(
            f"{teacher.path}: not the teacher that {checkpoint} learnt from (its content changed); put that file back"
        )
    args, device = settle(args), utils.pick_device(args.device)
    for net in teacher.nets.values():
        net.requires_grad_(False).eval()
    if args.report:
        report(args, teacher, device)
        return
    dataset, feed = make_feed(args, device)
    nets, teachers = make_nets(args, teacher), {name: teacher.nets[name].to(device) for name in wanted(args)}
    pairs = choose_pairs(args, next(iter(teachers.values())).config.blocks)
    adapters = make_adapters(teachers, nets, pairs)
    run = make_run(args, nets, dataset, device, adapters=adapters, teacher=teacher.fingerprint(), stage="distill")
    objective = functools.partial(distill_objective, teachers=teachers, pairs=pairs)
    terms = [f"{kind}_{name[2:]}" for name in teachers for kind in ("output", "hidden")]
    task = Task(objective, functools.partial(distill_rows, teachers=teachers), (*loss_names(args), *terms))
    carry_out(run, feed, task, state, checkpoint)


if __name__ == "__main__":
    main()
