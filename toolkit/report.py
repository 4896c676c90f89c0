"""A student beside its teacher: what they cost, before it learns; a table of figures and a grid of images, after.

say(compare_costs(student, teacher, (256, 256), "fp32"))
table, grid = compare_generators(rows, "G_AB", reals, truths, "fp32")
"""

from pathlib import Path

import torch
from torch import Tensor

import datasets
from cyclegan import translate
from models import LEGACY_DIRECTIONS, Generator, GeneratorConfig, Nets, meta_network
from toolkit import metrics
from toolkit.checkpoints import RUNS
from toolkit.inference import check_together, load_run
from toolkit.metrics import Images
from utils import InputError, say

COLUMNS = 6  # images in the grid
BRIEF = 3  # images that are timed before a student learns


def count_parameters(config: GeneratorConfig) -> int:
    """How many parameters a generator has, told without building it."""
    return sum(p.numel() for p in meta_network(config).parameters())


def refuse_large(student: GeneratorConfig, teacher: GeneratorConfig) -> None:
    """Raise InputError, with what would be smaller, if a student had as many parameters as its teacher, or more."""
    own = count_parameters(student)
    theirs = count_parameters(teacher)
    smaller = []
    if teacher.blocks:
        smaller.append(f"fewer than {teacher.blocks} blocks (--student_residual {teacher.blocks // 3})")
    if teacher.generator == "resnet" and teacher.ngf > 1:
        smaller.append(f"{teacher.blocks} blocks narrower than {teacher.ngf} (--student_ngf {teacher.ngf // 2})")
    if own >= theirs:
        given = f"--student_residual {student.blocks}"
        if student.ngf != teacher.ngf:
            given += f" --student_ngf {student.ngf}"
        if student.skips and not teacher.skips:
            given += " --student_skips"
        words = f"a student of {own:,} parameters is not smaller than its teacher of {theirs:,}"
        raise InputError(f"{given}: {words}; take {' or '.join(smaller) or 'another teacher'}")


def compare_costs(student: Generator, teacher: Generator, size: tuple[int, int], precision: str) -> str:
    """Put into words what a student costs beside its teacher, for one image of (height, width) px on their device.

    Takes as long as six images, of which the last three are timed.
    """
    image = torch.zeros(1, teacher.config.channels, *size)
    own = metrics.generator_cost(student, image, precision, BRIEF)
    theirs = metrics.generator_cost(teacher, image, precision, BRIEF)
    times = {name: f"{theirs[name] / own[name]:.1f} times" for name in own}
    device = next(student.parameters()).device
    return (
        f"{own['parameters']:,} parameters (its teacher {theirs['parameters']:,}, {times['parameters']} as many), "
        f"{own['MMACs']:,.1f} million multiply-accumulates an image of {size[1]}x{size[0]} px ({theirs['MMACs']:,.1f}, "
        f"{times['MMACs']}), {own['ms']:.3g} ms on {device} ({theirs['ms']:.3g}, {times['ms']})"
    )


def compare_generators(
    rows: dict[str, tuple[Nets, Path]], name: str, reals: Images, truths: Images, precision: str
) -> tuple[dict[str, dict], list[tuple[str, Tensor]]]:
    """Measure generators of one direction, and translate images with them.

    rows:    by label, "teacher" among them the first: generators on one device, and the file that would be shipped
    name:    of the generator that is looked at, G_AB or G_BA
    returns: figures by label; the rows of a grid, of at most COLUMNS images
    """
    source, target = name[2:]
    table = {}
    shown = {f"real_{source}": reals}
    for label, (nets, file) in rows.items():
        table[label] = metrics.describe_generator(nets[name], nets.get(f"G_{target}{source}"), reals, truths, precision)
        shown[label] = {stem: translate(nets[name], x, precision).cpu() for stem, x in reals.items()}
        table[label]["MB"] = file.stat().st_size / 1e6
        pairs = [(shown[label][stem], shown["teacher"][stem]) for stem in reals]
        table[label]["L1 to teacher"] = metrics.mean_distance(pairs)
    chosen = list(reals)[:: max(1, len(reals) // COLUMNS)][:COLUMNS]
    if set(chosen) <= truths.keys():
        shown[f"real_{target}"] = truths
    return table, [(label, torch.cat([row[stem] for stem in chosen])) for label, row in shown.items()]


def report_rows(
    teachers: Nets, path: Path, name: str, run_name: str, scratch: str
) -> tuple[dict[str, tuple[Nets, Path]], tuple[int, int]]:
    """The networks of one direction to compare: teacher, student, and the student from scratch if its run exists.

    path:    of the teacher's state or file
    name:    of the generator, G_AB or G_BA
    scratch: name of the run that has the student from scratch
    returns: by label the generators and the file that would be shipped; height and width that the student learnt at
    raises:  InputError if `run_name` has no student, or the networks do not go together
    """
    file = path.parent / f"{name}.safetensors"  # what of a run is shipped, without optimisers
    rows = {"teacher": (teachers, file if file.is_file() else path)}
    sizes = {}
    for label, run in (("student", run_name), ("scratch", scratch)):
        file = RUNS / run / f"{name}.safetensors"
        if file.is_file() and (label == "student" or run != run_name):
            nets, metadata = load_run(run)
            check_together({**nets, "teacher": teachers[name]}, f"--report: {run}")
            if label == "student" or nets[name].config != teachers[name].config:  # else a copy of the teacher
                rows[label] = (nets, file)
                sizes[label] = tuple(metadata["size"])
    if "student" not in rows:
        words = f"no student in {RUNS / run_name}; distil one first, without --report"
        raise InputError(f"--report: {words}, or name one with --run_name")
    return rows, sizes["student"]


def report_direction(
    rows: dict[str, tuple[Nets, Path]],
    name: str,
    size: tuple[int, int],
    dataset: Path,
    on_bad_image: str,
    device: torch.device,
    precision: str,
) -> tuple[dict[str, dict], list[tuple[str, Tensor]]]:
    """Compare networks of one direction on the held-out images of a data set, and say the figures.

    size:    height and width that the images are brought to, px
    returns: as compare_generators: figures by row, and the rows of a grid
    """
    for nets, _ in rows.values():
        for net in nets.values():
            net.to(device)
    split = datasets.held_out_split(dataset)
    channels = rows["teacher"][0][name].config.channels
    reals = datasets.named_images(dataset / f"{split}{name[2]}", size, channels, on_bad_image)
    truths = datasets.named_images(dataset / f"{split}{name[3]}", size, channels, on_bad_image)
    table, grid = compare_generators(rows, name, reals, truths, precision)
    where = f"{size[1]}x{size[0]} px; milliseconds on {device}, {torch.get_num_threads()} threads, {precision}"
    say(f"{LEGACY_DIRECTIONS[name]} at {where}")
    for line in metrics.format_table(table):
        say(line)
    return table, grid
