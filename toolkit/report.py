"""A student beside its teacher: their costs before training, and a report on their quality after it."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import datasets
from cyclegan import translate
from models import Direction, Generator, GeneratorConfig, Networks, meta_network
from toolkit import checkpoints, files, images, inference, metrics
from toolkit.checkpoints import IMAGES, RUNS
from utils import InputError, say

Rows = dict[str, tuple[Networks, Path]]  # by label: the networks, and the file that would be shipped


def refuse_large(student: GeneratorConfig, teacher: GeneratorConfig) -> None:
    """Raise InputError if a student has as many parameters as its teacher, or more."""
    own, theirs = (sum(p.numel() for p in meta_network(config).parameters()) for config in (student, teacher))
    if own >= theirs:
        given = f"--student_residual {student.blocks}: a student of {own:,} parameters"
        raise InputError(f"{given} is not smaller than its teacher of {theirs:,}; take fewer blocks")


def compare_costs(student: Generator, teacher: Generator, size: tuple[int, int], precision: str) -> str:
    """Describe what a student costs beside its teacher, for one image of (height, width) px on their device."""
    image = torch.zeros(1, teacher.config.channels, *size)
    own = metrics.generator_cost(student, image, precision, repeats=3)
    theirs = metrics.generator_cost(teacher, image, precision, repeats=3)
    times = {name: f"{theirs[name] / own[name]:.1f} times" for name in own}
    device = next(student.parameters()).device
    return f"{own['parameters']:,} parameters (its teacher {theirs['parameters']:,}, {times['parameters']} as many), {own['MMACs']:,.1f} million multiply-accumulates an image of {size[1]}x{size[0]} px ({theirs['MMACs']:,.1f}, {times['MMACs']}), {own['ms']:.3g} ms on {device} ({theirs['ms']:.3g}, {times['ms']})"


@dataclass(frozen=True)
class Report:
    """Compares students with their teachers on the held-out images of a data set."""

    teachers: Networks  # generators by name
    teacher_path: Path  # the training state or generator file that they were loaded from
    run_name: str  # of the students
    scratch_run: str  # of the students trained without transfer; it is included if it exists
    data: datasets.DataConfig
    device: torch.device
    precision: str

    def write(self, directions: Sequence[Direction], explicit: bool = False) -> dict[str, dict]:
        """Print tables, write report.json and images; with explicit also where the run only has a copy of the teacher."""
        tables = {}
        folder = IMAGES / self.run_name
        dataset = datasets.find_dataset(self.data.data_root, self.data.dataset_name)
        split = datasets.held_out_split(dataset)
        for direction in directions:
            name = direction.generator
            teacher = self.teachers[name].config
            rows, size = self.find_rows(direction)
            if not explicit and rows["student"][0][name].config == teacher:
                say(f"{direction}: {self.run_name} has no student for it")
                continue
            for nets, _ in rows.values():
                torch.nn.ModuleDict(nets).to(self.device)
            folders = {domain: datasets.split_folder(dataset, f"{split}{domain}") for domain in direction}
            readers = {
                domain: dataclasses.replace(reader, size=size, channels=teacher.channels)
                for domain, reader in self.data.readers.items()
            }
            reals, truths = datasets.paired_images(folders, readers, self.data.on_bad_image).values()
            tables[name], grid = compare_generators(rows, direction, reals, truths, self.precision)
            setting = f"{self.device}, {torch.get_num_threads()} threads, {self.precision}"
            say(f"{direction} at {size[1]}x{size[0]} px; milliseconds on {setting}")
            for line in metrics.format_table(tables[name]):
                say(line)
            images.save_image(images.draw_grid(grid), folder / f"report_{name}.png")
        files.write_json(folder / "report.json", tables)
        say(f"written to {folder}/report.json, images beside it")
        return tables

    def find_rows(self, direction: Direction) -> tuple[Rows, tuple[int, int]]:
        """Load what is compared; return it with the height and width that the student was trained at."""
        name = direction.generator
        file = self.teacher_path.parent / f"{name}.safetensors"  # a training state also holds optimizers
        rows: Rows = {"teacher": (self.teachers, file if file.is_file() else self.teacher_path)}
        for run_name in (self.run_name, self.scratch_run):
            checkpoints.recover(run_name)
        file = RUNS / self.run_name / f"{name}.safetensors"
        if not file.is_file():
            raise InputError(f"--report: no student in {file.parent}; distil one first, or name one with --run_name")
        nets, metadata = inference.load_run(self.run_name)
        rows["student"] = (nets, file)
        file = RUNS / self.scratch_run / f"{name}.safetensors"
        if file.is_file() and self.scratch_run != self.run_name:
            nets, _ = inference.load_run(self.scratch_run)
            if nets[name].config != self.teachers[name].config:  # otherwise it is a copy of the teacher
                rows["scratch"] = (nets, file)
        inference.check_together({label: nets[name] for label, (nets, _) in rows.items()}, "--report")
        return rows, tuple(metadata["size"])


def compare_generators(
    rows: Rows, direction: Direction, reals: metrics.Images, truths: metrics.Images, precision: str
) -> tuple[dict[str, dict], list[tuple[str, Tensor]]]:
    """Return figures of the generators of one direction by label, and labelled rows of at most 6 images."""
    run = functools.partial(translate, precision=precision)
    table = {}
    shown = {f"real_{direction.source}": reals}
    for label, (nets, file) in rows.items():  # the first is "teacher"
        net = nets[direction.generator]
        back = nets.get(direction.reverse.generator)
        table[label] = metrics.generator_cost(net, next(iter(reals.values())), precision)
        table[label] |= metrics.measure_direction(run, (net, back), reals, truths, ("cycle", "paired"))
        table[label]["MB"] = file.stat().st_size / 1e6
        shown[label] = {name: run(net, x).cpu() for name, x in reals.items()}
        pairs = [(shown[label][name], shown["teacher"][name]) for name in reals]
        table[label]["L1 to teacher"] = metrics.mean_distance(pairs)
    chosen = list(reals)[:: max(1, len(reals) // 6)][:6]
    if set(chosen) <= truths.keys():
        shown[f"real_{direction.target}"] = truths
    return table, [(label, torch.cat([row[name] for name in chosen])) for label, row in shown.items()]
