"""A student beside its teacher: what they cost, before it learns; a table of figures and a grid of images, after.

say(compare_costs(student, teacher, (256, 256), "fp32"))
table, grid = compare_generators(rows, "G_AB", reals, truths, "fp32")
"""

from pathlib import Path

import torch
from torch import Tensor

import metrics
from cyclegan import translate
from metrics import Images
from models import Generator, GeneratorConfig, Nets
from utils import InputError
from weights import meta_network

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
