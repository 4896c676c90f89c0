"""A student beside its teacher: their costs before training, and a report on their quality after it.

say(compare_costs(student, teacher, (256, 256), "fp32"))
write_report(teachers, teacher_path, directions, "day2night_student", "day2night_scratch", dataset, "skip", device, "fp32")
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import datasets
from cyclegan import translate
from models import Direction, Generator, GeneratorConfig, Networks, meta_network
from toolkit import metrics
from toolkit.checkpoints import IMAGES, RUNS
from toolkit.files import write_json
from toolkit.images import draw_grid, save_image
from toolkit.inference import check_together, load_run
from toolkit.metrics import Images
from utils import InputError, say

GRID_IMAGES = 6
Rows = dict[str, tuple[Networks, Path]]  # by label: the networks, and the file that would be shipped


# ---------------------------------------------------------------------------------------------
# Before training


def count_parameters(config: GeneratorConfig) -> int:
    """Return the number of parameters of a generator without allocating them."""
    return sum(p.numel() for p in meta_network(config).parameters())


def refuse_large(student: GeneratorConfig, teacher: GeneratorConfig) -> None:
    """Raise InputError, with options for a smaller one, if a student has as many parameters as its teacher or more."""
    student_count = count_parameters(student)
    teacher_count = count_parameters(teacher)
    if student_count < teacher_count:
        return
    given = f"--student_residual {student.blocks}"
    if student.ngf != teacher.ngf:
        given += f" --student_ngf {student.ngf}"
    if student.skips and not teacher.skips:
        given += " --student_skips"
    smaller = []
    if teacher.blocks:
        smaller.append(f"fewer than {teacher.blocks} blocks (--student_residual {teacher.blocks // 3})")
    if teacher.generator == "resnet" and teacher.ngf > 1:
        smaller.append(f"{teacher.blocks} blocks narrower than {teacher.ngf} (--student_ngf {teacher.ngf // 2})")
    remedy = " or ".join(smaller) or "another teacher"
    raise InputError(
        f"{given}: a student of {student_count:,} parameters is not smaller than its teacher of {teacher_count:,}; take {remedy}"
    )


def compare_costs(student: Generator, teacher: Generator, size: tuple[int, int], precision: str) -> str:
    """Describe what a student costs beside its teacher, for one image of (height, width) px on their device.

    Takes the time of six images, of which the last three are timed.
    """
    image = torch.zeros(1, teacher.config.channels, *size)
    own = metrics.generator_cost(student, image, precision, repeats=3)
    theirs = metrics.generator_cost(teacher, image, precision, repeats=3)
    times = {name: f"{theirs[name] / own[name]:.1f} times" for name in own}
    device = next(student.parameters()).device
    return (
        f"{own['parameters']:,} parameters (its teacher {theirs['parameters']:,}, {times['parameters']} as many), "
        f"{own['MMACs']:,.1f} million multiply-accumulates an image of {size[1]}x{size[0]} px ({theirs['MMACs']:,.1f}, "
        f"{times['MMACs']}), {own['ms']:.3g} ms on {device} ({theirs['ms']:.3g}, {times['ms']})"
    )


# ---------------------------------------------------------------------------------------------
# The report


def write_report(
    teachers: Networks,
    teacher_path: Path,
    directions: Sequence[Direction],
    run_name: str,
    scratch_run: str,
    dataset: Path,
    on_bad_image: str,
    device: torch.device,
    precision: str,
    explicit: bool = False,
) -> dict[str, dict]:
    """Compare students with their teachers on held-out images, print tables, and write report.json and images.

    teachers:     generators by name
    teacher_path: the training state or generator file that they were loaded from
    run_name:     of the students
    scratch_run:  of the students trained without transfer; it is included if it exists
    dataset:      folder of the data set
    on_bad_image: "skip" or "stop"
    explicit:     also compare a direction for which the run only has a copy of the teacher
    returns:      by generator, the table of compare_generators
    raises:       InputError if the run has no student, or the networks do not go together
    """
    tables = {}
    folder = IMAGES / run_name
    split = datasets.held_out_split(dataset)
    for direction in directions:
        name = direction.generator
        rows, size = find_rows(teachers, teacher_path, direction, run_name, scratch_run)
        if not explicit and rows["student"][0][name].config == teachers[name].config:
            say(f"{direction}: {run_name} has no student for it")
            continue
        for nets, _ in rows.values():
            for net in nets.values():
                net.to(device)
        channels = teachers[name].config.channels
        reals = datasets.named_images(dataset / f"{split}{direction.source}", size, channels, on_bad_image)
        truths = datasets.named_images(dataset / f"{split}{direction.target}", size, channels, on_bad_image)
        tables[name], grid = compare_generators(rows, direction, reals, truths, precision)
        threads = torch.get_num_threads()
        say(f"{direction} at {size[1]}x{size[0]} px; milliseconds on {device}, {threads} threads, {precision}")
        for line in metrics.format_table(tables[name]):
            say(line)
        save_image(draw_grid(grid), folder / f"report_{name}.png")
    write_json(folder / "report.json", tables)
    say(f"written to {folder}/report.json, images beside it")
    return tables


def find_rows(
    teachers: Networks, teacher_path: Path, direction: Direction, run_name: str, scratch_run: str
) -> tuple[Rows, tuple[int, int]]:
    """Load what is compared: teacher, student, and the student from scratch if its run exists; parameters as above.

    returns: rows, and the height and width that the student was trained at
    """
    name = direction.generator
    file = teacher_path.parent / f"{name}.safetensors"  # a training state also holds optimizers, which are not shipped
    rows: Rows = {"teacher": (teachers, file if file.is_file() else teacher_path)}
    file = RUNS / run_name / f"{name}.safetensors"
    if not file.is_file():
        raise InputError(
            f"--report: no student in {RUNS / run_name}; distil one first, without --report, or name one with --run_name"
        )
    nets, metadata = load_run(run_name)
    check_together(nets | {"teacher": teachers[name]}, f"--report: {run_name}")
    rows["student"] = (nets, file)
    file = RUNS / scratch_run / f"{name}.safetensors"
    if file.is_file() and scratch_run != run_name:
        nets, _ = load_run(scratch_run)
        check_together(nets | {"teacher": teachers[name]}, f"--report: {scratch_run}")
        if nets[name].config != teachers[name].config:  # otherwise it is a copy of the teacher
            rows["scratch"] = (nets, file)
    return rows, tuple(metadata["size"])


def compare_generators(
    rows: Rows, direction: Direction, reals: Images, truths: Images, precision: str
) -> tuple[dict[str, dict], list[tuple[str, Tensor]]]:
    """Measure the generators of one direction, and translate images with them.

    rows:    the first is "teacher"; all networks on one device
    reals:   images of the source domain; those of `truths` with the same name are their targets
    returns: figures by label, and labelled rows of at most GRID_IMAGES images for a grid
    """
    table = {}
    shown = {f"real_{direction.source}": reals}
    for label, (nets, file) in rows.items():
        net = nets[direction.generator]
        back = nets.get(direction.reverse.generator)
        table[label] = metrics.generator_cost(net, next(iter(reals.values())), precision)
        table[label] |= metrics.generator_scores(net, back, reals, truths, ("cycle", "paired"), precision)
        table[label]["MB"] = file.stat().st_size / 1e6
        shown[label] = {name: translate(net, x, precision).cpu() for name, x in reals.items()}
        pairs = [(shown[label][name], shown["teacher"][name]) for name in reals]
        table[label]["L1 to teacher"] = metrics.mean_distance(pairs)
    chosen = list(reals)[:: max(1, len(reals) // GRID_IMAGES)][:GRID_IMAGES]
    if set(chosen) <= truths.keys():
        shown[f"real_{direction.target}"] = truths
    return table, [(label, torch.cat([images[name] for name in chosen])) for label, images in shown.items()]
