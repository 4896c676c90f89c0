"""Train, score and draw the tables of docs/experiments again.

python benchmarks/reproduce.py day2night
python benchmarks/reproduce.py mnist2usps daisy2sunflower --data_root DATA
python benchmarks/reproduce.py --list

The runs of a task are trained one after the other (or resumed), scored on the test split, and written to docs/results.json
and to a table on the task's page of docs/experiments. Its image is docs/results_TASK.png, or .jpg. The demo set is drawn;
the others must be in --data_root.
"""

import io
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parent))

import digit_score
import domain_score
import label_score
from common import DAY2NIGHT, ROOT, expand, markdown_table

import distill
import test as test_command
import train
import utils
from models import DIRECTIONS, Direction
from toolkit import cli, devices, images, metrics, process
from toolkit.checkpoints import IMAGES, RUNS, numbered_checkpoints
from toolkit.files import atomic_write, write_json, write_text
from toolkit.inference import load_run
from toolkit.logs import read_losses
from toolkit.weights import load_generator

STORE = ROOT / "docs" / "results.json"
PAGES = ROOT / "docs" / "experiments"
FILM_ROWS = 8
PHOTO = 128  # px, side of translated photos

# ---------------------------------------------------------------------------------------------
# Flags; after "then", what changes once all epochs are done

SMALL = f"{DAY2NIGHT} --num_residual 3 --ngf 32 --num_epochs 4"
STUDENT = "--teacher teacher_0 --direction both --num_epochs 6 --eval_interval 1 --eval_metrics paired"
TUNED = f"{DAY2NIGHT} --num_residual 6 --ngf 32 --num_epochs 2"
FROM_FLOWERS = "--init_from saved_models/flowers/G_AB.safetensors saved_models/flowers/G_BA.safetensors"
STUDY = f"{DAY2NIGHT} --ngf 32 --num_epochs 4"
TEACHER = (
    f"{DAY2NIGHT} --num_residual 9 --ngf 32 --lr 4e-4 --num_epochs 12 --ema 0.999 "
    "--eval_interval 1 --eval_metrics paired"
)
SKIPS = (
    f"{DAY2NIGHT} --num_residual 6 --ngf 32 --skips --lr 4e-4 --ema 0.999 --num_epochs 18 "
    "--eval_interval 6 --eval_metrics paired,spike"
)
SKIPS_STUDENT = "@recipes/student.txt --teacher skips_teacher --eval_interval 6 --eval_metrics paired"
FLOWERS = "@recipes/photos_64.txt --dataset_name daisy2sunflower"
FACADES = "@recipes/photos_64.txt --dataset_name facades --lr 4e-4 --ema 0.999 --num_epochs 10"
MAPS = "@recipes/photos_64.txt --dataset_name maps"
PHOTOS_128 = (
    "--img_height 128 --img_width 128 --num_residual 6 --ngf 24 --ndf 32 --n_layers_D 3 --batch_size 1 "
    "--lr 4e-4 --ema 0.999 --lambda_identity 0"
)
FACADES_128 = f"--dataset_name facades {PHOTOS_128} --num_epochs 10"
MAPS_128 = f"--dataset_name maps {PHOTOS_128} --num_epochs 3"
HORSES = "@recipes/horse2zebra_cpu.txt then --lambda_cycle 2 --num_epochs 116 --decay_epoch 104"
HORSES_STUDENT = (
    "--teacher horses --direction both --student_residual 3 --student_ngf 16 --student_skips --img_height 128 "
    "--img_width 128 --load_scale 1 --lambda_cycle 0 --lambda_output 5 --num_epochs 20 "
    "then --lambda_output 1 --num_epochs 28 --decay_epoch 20"
)
PIXELS = "--dataset_name day2night --batch_size 1 --num_residual 6 --steps_per_epoch 200 --num_epochs 1"


@dataclass
class Task:
    """A table of docs/experiments: its runs, how they are scored, and what is drawn."""

    title: str
    runs: dict[str, str]  # name → command and flags
    score: Callable  # (run, dataset) → cells by column
    baselines: Callable  # (dataset, run) → rows that need no training
    page: str = ""  # of docs/experiments (default: named like the task)
    drawn: tuple[str, ...] | None = ()  # runs in the task's image; () for all, None for no image
    curve: bool = False  # the image shows PSNR over minutes instead of translations
    side: int = 64  # px, side of the translations in the image
    columns: int = 6  # images in a row, evenly spread over the test images
    zoom: int = 1  # whole factor by which translations are enlarged
    filmed: str = ""  # a run: a second image has a row for each of its kept epochs, A → B

    def file(self, name: str, suffix: str = "") -> str:
        """Name of an image of this task in docs: JPEG for photos, otherwise PNG."""
        return f"results_{name}{suffix}.{'jpg' if self.side == PHOTO else 'png'}"


# ---------------------------------------------------------------------------------------------
# Scores: cells by column


def run_test(run: str, dataset: Path, *flags: str) -> dict:
    """Run test.py on a data set; returns its scores."""
    argv = ["--run_name", run, "--data_root", str(dataset.parent), "--dataset_name", dataset.name, *flags]
    return test_command.main(argv)


def both(values: Iterable[float], digits: int) -> str:
    """A cell with the values of both directions, or domains."""
    return " / ".join(f"{value:.{digits}f}" for value in values)


def paired_cells(run: str, dataset: Path) -> dict[str, str]:
    """PSNR, SSIM and match@1 of both directions on the test pairs."""
    scores = run_test(run, dataset, "--metrics", "paired,cycle")
    rows = [scores[str(direction)]["paired"]["model"] for direction in DIRECTIONS]
    digits = {"PSNR": 2, "SSIM": 3, "match@1": 2}
    cells = {f"{key} A→B / B→A": both([row[key] for row in rows], count) for key, count in digits.items()}
    return cells | cycle_cell(scores)


def cycle_cell(scores: dict) -> dict[str, str]:
    """Cycle errors of both domains."""
    return {"cycle A / B": both([scores[str(direction)]["cycle"] for direction in DIRECTIONS], 3)}


def maps_cells(run: str, dataset: Path) -> dict[str, str]:
    """Root mean square error and fraction of pixels within 5 and 10 levels, aerial photo → map."""
    row = run_test(run, dataset, "--metrics", "paired", "--direction", "AtoB")["AtoB"]["paired"]["model"]
    return {key: f"{value:.3f}" for key, value in row.items() if key != "match@1"}


def paired_baselines(dataset: Path, run: str) -> dict[str, dict[str, str]]:
    """Rows that need no network: the input itself, and the mean image of the domain."""
    scores = json.loads((IMAGES / run / "test" / "metrics.json").read_text())
    tables = [scores[str(direction)]["paired"] for direction in DIRECTIONS if str(direction) in scores]
    column = "PSNR A→B / B→A" if len(tables) == 2 else "PSNR"
    return {name: {column: both([table[name]["PSNR"] for table in tables], 2)} for name in tables[0] if name != "model"}


def digit_cells(run: str, dataset: Path) -> dict[str, str]:
    """Fraction of translated test digits whose label a classifier predicts that was trained on real digits of the target."""
    output = IMAGES / run / "digits"
    cells = {}
    for direction in DIRECTIONS:
        inputs = str(dataset / f"test{direction.source}")
        argv = ["--run_name", run, "--input", inputs, "--direction", str(direction), "--output_size", "net"]
        test_command.main([*argv, "--output", str(output)])
        cells |= label_cell(dataset, direction, output / f"fake_{direction.target}")
    return cells


def label_cell(dataset: Path, direction: Direction, folder: Path) -> dict[str, str]:
    """Fraction of the digits in a folder whose label the classifier of the target predicts."""
    net = digit_score.classifier(*digit_score.read_folder(dataset / f"train{direction.target}"))
    found = digit_score.accuracy(net, *digit_score.read_folder(folder))
    return {f"predicted as their label {direction.source}→{direction.target}": f"{found:.3f}"}


def digit_baselines(dataset: Path, _: str) -> dict[str, dict[str, str]]:
    """The same for untranslated digits, and for real ones of the target domain: the ceiling."""
    rows = {"untranslated": {}, "real digits of the target": {}}
    for direction in DIRECTIONS:
        for row, domain in zip(rows.values(), direction, strict=True):
            row |= label_cell(dataset, direction, dataset / f"test{domain}")
    return rows


def domain_cells(dataset: Path, folders: dict[str, Path], views: Iterable[str]) -> dict[str, str]:
    """Fractions of the images in the folders of "B" and of "A" of which a classifier predicts that domain.

    views: names of domain_score.VIEWS
    """
    cells = {}
    for view in views:
        channels = domain_score.VIEWS[view]
        found = [domain_score.folder_score(dataset, folders[domain], domain, channels) for domain in "BA"]
        cells[f"predicted as the target{view} A→B / B→A"] = both(found, 2)
    return cells


def fakes_of(run: str) -> dict[str, Path]:
    """Folders of a run's translations by domain."""
    return {domain: IMAGES / run / "test" / f"fake_{domain}" for domain in "AB"}


def classified_cells(run: str, dataset: Path) -> dict[str, str]:
    """Cycle error, and the fraction of translations of which a classifier predicts the target domain."""
    return cycle_cell(run_test(run, dataset, "--metrics", "cycle")) | domain_cells(dataset, fakes_of(run), [""])


def classified_baselines(dataset: Path, _: str, views: Iterable[str] = ("",)) -> dict[str, dict[str, str]]:
    """The same fraction of untranslated images, and of real ones of the target: how reliable the classifier is."""
    untranslated = {"A": dataset / "testB", "B": dataset / "testA"}
    real = {domain: dataset / f"test{domain}" for domain in "AB"}
    rows = {"untranslated": untranslated, "real images of the target": real}
    return {name: domain_cells(dataset, folders, views) for name, folders in rows.items()}


def photo_cells(run: str, dataset: Path) -> dict[str, str]:
    """Size, cycle error, and predictions of classifiers with and without colour, all at 128 px.

    The networks were trained on crops but translate whole photos: the test images are reduced to that size first.
    """
    small = Path("datasets") / f"{dataset.name}_{PHOTO}"
    for path in [*images.list_images(dataset / "testA"), *images.list_images(dataset / "testB")]:
        copy = small / path.parent.name / f"{path.stem}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        images.save_image(images.tensor_to_image(images.load_image(path, (PHOTO, PHOTO))), copy)
    scores = run_test(run, small, "--metrics", "cycle", "--scale", "native")
    cells = size_cells(run, PHOTO) | cycle_cell(scores)
    return cells | domain_cells(dataset, fakes_of(run), domain_score.VIEWS)


def label_cells(run: str, dataset: Path) -> dict[str, str]:
    """Scores of the label maps of facades, photo → labels, at the network's size."""
    output = IMAGES / run / "test"
    argv = ["--run_name", run, "--input", str(dataset / "testA"), "--direction", "AtoB", "--output_size", "net"]
    test_command.main([*argv, "--output", str(output)])
    scores = label_score.folder_scores(output / "fake_B", dataset / "testB")
    return {name: f"{value:.3f}" for name, value in scores.items()}


def label_baselines(dataset: Path, _: str, side: int = 64) -> dict[str, dict[str, str]]:
    """The same for the photos themselves, and for the true label maps at side x side px, which is the ceiling."""
    small = [images.load_image(path, (side, side), 3) for path in images.list_images(dataset / "testB")]
    truths = [label_score.read(path) for path in images.list_images(dataset / "testB")]
    reached = label_score.label_scores(zip(map(images.range_to_bytes, small), truths, strict=True))
    before = label_score.folder_scores(dataset / "testA", dataset / "testB")
    rows = {"untranslated": before, f"real at {side} px": reached}
    return {name: {key: f"{value:.3f}" for key, value in row.items()} for name, row in rows.items()}


def nyquist(folder: Path) -> float:
    """Fraction of the energy (without the mean) at the highest row and column frequency: checkerboards of 2 px."""
    fractions = []
    for image in domain_score.read_folder(folder):
        energy = torch.fft.fft2(image.double()).abs().square()
        energy[:, 0, 0] = 0
        top = energy[:, 32, :].sum() + energy[:, :, 32].sum() - energy[:, 32, 32].sum()
        fractions.append((top / energy.sum()).item())
    return statistics.fmean(fractions)


def checkerboard_cells(run: str, dataset: Path) -> dict[str, str]:
    """The paired scores, and the Nyquist energy of translations relative to that of real images."""
    cells = paired_cells(run, dataset)
    ratios = []
    for target in "BA":
        ratios.append(nyquist(IMAGES / run / "test" / f"fake_{target}") / nyquist(dataset / f"test{target}"))
    return cells | {"Nyquist energy, times that of real images A→B / B→A": both(ratios, 1)}


def pace(run: str, _: Path) -> dict[str, str]:
    """Seconds per step, including data loading and a sample grid at the end."""
    _, metadata = load_generator(RUNS / run / "G_AB.safetensors")
    return {"s/step": f"{60 * json.loads((RUNS / run / 'minutes.json').read_text()) / metadata['step']:.3f}"}


def size_cells(run: str, side: int) -> dict[str, str]:
    """Parameters of the generator, and its multiply-accumulates for an image of side x side px."""
    net, _ = load_generator(RUNS / run / "G_AB.safetensors")
    parameters = sum(p.numel() for p in net.parameters())
    return {"parameters": f"{parameters:,}", "MMACs": f"{metrics.count_macs(net, side, side) / 1e6:,.0f}"}


def size_and_scores(run: str, dataset: Path) -> dict[str, str]:
    """The paired scores beside the size of the generator and its multiply-accumulates."""
    return size_cells(run, 64) | paired_cells(run, dataset)


# ---------------------------------------------------------------------------------------------
# Images


def chosen(paths: list[Path], count: int) -> list[Path]:
    """Every k-th image, so that nobody picks."""
    return paths[:: max(1, len(paths) // count)][:count]


def translations(task: Task, dataset: Path) -> Image.Image:
    """Rows of the same test images, translated by each of a task's runs."""
    digits = dataset.name == "mnist2usps"
    rows = []
    for source, target in DIRECTIONS:
        folders = {f"real_{source}": dataset / f"test{source}"}
        for run in task.drawn or task.runs:
            folders[run] = IMAGES / run / ("digits" if digits else "test") / f"fake_{target}"
        if not all(folder.is_dir() for folder in folders.values()):
            continue  # maps are scored in one direction
        for name, folder in folders.items():
            paths = images.list_images(folder)
            some = chosen(paths, task.columns)
            row = torch.stack([images.load_image(path, (task.side, task.side), 1 if digits else 3) for path in some])
            rows.append((name, row.repeat_interleave(task.zoom, 2).repeat_interleave(task.zoom, 3)))
    return images.draw_grid(rows)


def film(task: Task, dataset: Path) -> Image.Image:
    """Rows of the same photos of testA, translated by the epochs that a run has kept."""
    paths = images.list_images(dataset / "testA")
    side = (task.side, task.side)
    photos = torch.stack([images.load_image(path, side) for path in chosen(paths, task.columns)])
    rows = [("photo", photos)]
    kept = sorted(numbered_checkpoints(RUNS / task.filmed), reverse=True)
    for epoch in reversed(kept[:: math.ceil(len(kept) / FILM_ROWS) or 1]):  # always with the last one
        nets, metadata = load_run(task.filmed, str(epoch))
        with torch.inference_mode():
            rows.append((f"{metadata['step']:,} steps", torch.cat([nets["G_AB"].eval()(x[None]) for x in photos])))
    return images.draw_grid(rows)


def curves(task: Task, rows: dict) -> Image.Image:
    """Mean PSNR of both directions over the minutes of training of each run."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in task.drawn or task.runs:
        measured = read_losses(RUNS / name / "measures.csv")
        minutes = rows[name]["minutes"] / measured[-1]["step"]  # per step
        values = [statistics.fmean(v for k, v in row.items() if k.startswith("PSNR")) for row in measured]
        axes.plot([row["step"] * minutes for row in measured], values, marker="o", label=name)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("PSNR, mean of both directions, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    with io.BytesIO() as data:
        figure.savefig(data, dpi=100, format="png")
        return Image.open(data).convert("RGB")


# ---------------------------------------------------------------------------------------------
# Tasks

TASKS = {
    "day2night": Task(
        "Day and night: teacher, students, UNet-ViT",
        {
            **{f"teacher_{seed}": f"train {TEACHER} --seed {seed}" for seed in range(3)},
            "student": f"distill {STUDENT}",
            "thin": f"distill {STUDENT} --student_ngf 16",
            "unet_vit": f"train {DAY2NIGHT} --generator unet_vit --ema 0.999 --num_epochs 4",
        },
        size_and_scores,
        paired_baselines,
        drawn=("teacher_0", "student", "thin", "unet_vit"),
    ),
    "skips": Task(
        "Day and night with skip connections: teacher and student",
        {
            "skips_teacher": f"train {SKIPS}",
            **{f"skips_teacher_{seed}": f"train {SKIPS} --seed {seed}" for seed in (1, 2)},
            "skips_student": f"distill {SKIPS_STUDENT}",
            "skips_student_10": f"distill {SKIPS_STUDENT} --lambda_output 10",
        },
        size_and_scores,
        paired_baselines,
        drawn=("skips_teacher", "skips_student"),
        zoom=2,
    ),
    "mnist2usps": Task(
        "MNIST and USPS: test digits and their translations",
        {f"digits_{seed}": f"train @recipes/digits.txt --seed {seed}" for seed in range(3)},
        digit_cells,
        digit_baselines,
        page="digits",
        drawn=("digits_0",),
        side=digit_score.SIDE,
    ),
    "daisy2sunflower": Task(
        "Daisies and sunflowers: what helps with 600 photos",
        {
            "flowers": f"train {FLOWERS} --ema 0.999",
            "flowers_no_ema": f"train {FLOWERS}",
            "flowers_no_flip_no_crop": f"train {FLOWERS} --ema 0.999 --no-flip --load_scale 1",
            "flowers_identity_0": f"train {FLOWERS} --ema 0.999 --lambda_identity 0",
        },
        classified_cells,
        classified_baselines,
    ),
    "checkerboards": Task(
        "Checkerboards: transposed convolution or resize and convolution",
        {"reference": f"train {SMALL}", "resize": f"train {SMALL} --upsample resize"},
        checkerboard_cells,
        paired_baselines,
        zoom=3,
    ),
    "distillation": Task(
        "Distillation: quality over minutes",
        {
            "teacher_0": f"train {TEACHER}",
            "student": f"distill {STUDENT}",
            "scratch": f"distill {STUDENT} --no-transfer",
        },
        size_and_scores,
        paired_baselines,
        curve=True,
    ),
    "ablations": Task(
        "Ablations on day2night",
        {
            "reference": f"train {SMALL}",
            "ttur_4x": f"train {SMALL} --lr_D 8e-4",
            "identity_0": f"train {SMALL} --lambda_identity 0",
            "bce": f"train {SMALL} --gan_loss bce",
            "slow_D": f"train {SMALL} --lr_D 1e-4",
            "one_downsampling": f"train {SMALL} --n_downsampling 1",
            # a published study at 64 px, with half its width
            "study_reference": f"train {STUDY} --num_residual 9 --n_layers_D 3",
            "study_a": f"train {STUDY} --num_residual 6 --n_layers_D 2",
            "study_b": f"train {STUDY} --num_residual 6 --n_downsampling 1 --ngf 16 --ndf 16 --n_layers_D 3",
            "study_c": f"train {STUDY} --num_residual 6 --n_downsampling 1 --n_layers_D 1 --max_mult_D 2",
        },
        size_and_scores,
        paired_baselines,
    ),
    "fine_tuning": Task(
        "Fine-tuning on day2night",
        {
            "new": f"train {TUNED}",
            "tuned": f"train {TUNED} {FROM_FLOWERS}",
            "tuned_last": f"train {TUNED} {FROM_FLOWERS} --freeze stem,down,blocks,up",
        },
        paired_cells,
        paired_baselines,
    ),
    "pixels": Task(
        "The same step at 128 and at 64 px",
        {f"px_{side}": f"train {PIXELS} --img_height {side} --img_width {side}" for side in (64, 128)},
        pace,
        lambda *_: {},
        page="image_size",
        drawn=None,
    ),
    "maps": Task(
        "Aerial photos and maps, 64 px: with and without skips",
        {"maps_64": f"train {MAPS}", "maps_64_skips": f"train {MAPS} --skips"},
        maps_cells,
        paired_baselines,
    ),
    "horse2zebra": Task(
        "Horses and zebras, photos of 128 px",
        {"horses": f"train {HORSES}", "horses_student": f"distill {HORSES_STUDENT}"},
        photo_cells,
        partial(classified_baselines, views=domain_score.VIEWS),
        side=PHOTO,
        columns=8,
        filmed="horses",
    ),
    "facades": Task(
        "Photos of facades and their labels, 64 px: with and without skips",
        {"facades_64": f"train {FACADES}", "facades_64_skips": f"train {FACADES} --skips"},
        label_cells,
        label_baselines,
    ),
    "facades_128": Task(
        "Photos of facades and their labels, 128 px: with and without skips",
        {"facades_128": f"train {FACADES_128}", "facades_128_skips": f"train {FACADES_128} --skips"},
        label_cells,
        partial(label_baselines, side=PHOTO),
        page="facades",
        side=PHOTO,
    ),
    "maps_128": Task(
        "Aerial photos and maps, 128 px: with and without skips",
        {"maps_128": f"train {MAPS_128}", "maps_128_skips": f"train {MAPS_128} --skips"},
        maps_cells,
        paired_baselines,
        page="maps",
        side=PHOTO,
    ),
}


# ---------------------------------------------------------------------------------------------
# Training, scoring and writing


def commit() -> str:
    """The commit of the code that ran, with + where Python files differ from it."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = git("diff", "--name-only", "HEAD", "*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def processor() -> str:
    """Describe the machine."""
    names = [line.split(":")[1] for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    device = devices.pick_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else (names or [platform.processor()])[0].strip()
    threads = torch.get_num_threads()
    cores = f"{threads} thread" if threads == 1 else f"{threads} threads"
    return f"{name}, {cores}, {devices.pick_precision('auto', device)}, torch {torch.__version__}"


def read_lines(path: str) -> list[str]:
    """Lines of a file; none if it does not exist."""
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def train_run(name: str, recipe: str, data_root: Path) -> float:
    """Train a run, or what is left of it; returns the minutes that it took in all."""
    first, *later = recipe.split(" then ")
    command, *words = first.split()
    flags = expand(words)
    main = {"train": train.main, "distill": distill.main}[command]
    clock = RUNS / name / "minutes.json"
    before = json.loads(clock.read_text()) if clock.is_file() else 0.0
    again = ["--run_name", name, "--start_from", "latest"]
    if command == "distill":
        again += ["--teacher", flag_value(flags, "--teacher")]
    new = [*flags, "--run_name", name]
    if command == "train":
        new += ["--data_root", "datasets" if "day2night" in flags else str(data_root)]
    begun = (RUNS / name / "latest.pt").is_file()
    start = time.monotonic()
    try:
        main(again if begun else new)
        for changes in later:
            main([*again, *changes.split()])
    finally:
        minutes = before + (time.monotonic() - start) / 60
        if clock.parent.is_dir():
            write_json(clock, minutes)
    return minutes


def dataset_of(task: Task, data_root: Path) -> Path:
    """The folder of a task's data set."""
    flags = expand(next(recipe.split() for recipe in task.runs.values() if recipe.startswith("train")))
    name = flag_value(flags, "--dataset_name")
    return (Path("datasets") if name == "day2night" else data_root) / name


def flag_value(flags: list[str], flag: str) -> str:
    """The value of a flag; of several, the last one counts."""
    return dict(itertools.pairwise(flags))[flag]


def layout_block(name: str, stored: dict) -> str:
    """A task's block on its page: machine, table, image and commands."""
    rows = stored["rows"]
    task = TASKS[name]
    empty = dict.fromkeys(["", *(column for row in rows.values() for column in row["cells"]), "minutes", "commit"], "")
    table = []
    for run, row in rows.items():
        costs = {key: row.get(key, "") for key in ("minutes", "commit")}
        table.append(empty | row["cells"] | costs | {"": run})
    commands = []
    for run, recipe in task.runs.items():
        command, flags = recipe.split(" ", 1)
        first, *later = flags.split(" then ")
        if run in rows:
            commands.append(f"python {command}.py {first} --run_name {run}")
            commands += [f"python {command}.py --run_name {run} --start_from latest {changes}" for changes in later]
    image = [f"![{task.title}](../{task.file(name)})", ""] if task.drawn is not None else []
    if task.filmed:
        image += [f"![Translations of {task.filmed} in the course of training](../{task.file(name, '_film')})", ""]
    again = f"`python benchmarks/reproduce.py {name}` ({stored['machine']}) trains, scores and writes this:"
    return "\n".join([again, "", *markdown_table(table), "", *image, "```bash", *commands, "```"])


def read_store() -> dict:
    """The rows of all tasks."""
    return json.loads(STORE.read_text()) if STORE.is_file() else {}


def save_page_image(image: Image.Image, name: str) -> None:
    """Write an image to docs, in the format of its suffix."""
    with atomic_write(STORE.parent / name) as temporary:
        if name.endswith(".jpg"):
            image.save(temporary, format="JPEG", quality=88, subsampling=0)
        else:
            image.save(temporary, format="PNG")


def write_results(name: str, stored: dict) -> None:
    """Write a task's rows to docs/results.json, and its block to its page, between its two marks."""
    begin = f"<!-- {name} -->"
    end = f"<!-- end of {name} -->"
    page = PAGES / f"{TASKS[name].page or name}.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# {TASKS[name].title}\n"
    if begin not in text:
        text = f"{text.rstrip()}\n\n{begin}\n{end}\n"
    head = text.split(begin)[0]
    tail = text.split(end)[1]
    write_text(page, f"{head}{begin}\n{layout_block(name, stored)}\n{end}{tail}")
    write_json(STORE, read_store() | {name: stored})


def reproduce(name: str, data_root: Path, only: list[str]) -> None:
    """Train and score the runs of a task; each row is written as soon as it is known."""
    task = TASKS[name]
    dataset = dataset_of(task, data_root)
    rows = read_store().get(name, {}).get("rows", {})
    for run, recipe in task.runs.items():
        if only and run not in only:
            continue
        minutes = train_run(run, recipe, data_root)
        rows = read_store().get(name, {}).get("rows", {})  # another process may have added one meanwhile
        rows[run] = {"cells": task.score(run, dataset), "minutes": round(minutes, 1), "commit": commit()}
        rows |= {label: {"cells": cells} for label, cells in task.baselines(dataset, run).items()}
        rows = {label: rows[label] for label in [*task.runs, *sorted(rows.keys() - task.runs.keys())] if label in rows}
        write_results(name, {"machine": processor(), "rows": rows})
    if task.drawn is not None and all(run in rows and (IMAGES / run).is_dir() for run in task.drawn or task.runs):
        image = curves(task, rows) if task.curve else translations(task, dataset)
        save_page_image(image, task.file(name))
    if task.filmed and (RUNS / task.filmed).is_dir():
        save_page_image(film(task, dataset), task.file(name, "_film"))


@process.command
def main(argv=None):
    parser = cli.Parser(prog="reproduce.py", description=__doc__)
    parser.add_argument("task", nargs="*", choices=[*TASKS, []], help="what to reproduce")
    parser.add_argument(
        "--data_root",
        type=Path,
        default=Path("datasets"),
        help="folder with mnist2usps, daisy2sunflower, maps, facades and horse2zebra",
    )
    parser.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="only these runs of the tasks")
    parser.add_argument("--list", action="store_true", help="list the runs of every task")
    args = parser.parse_args(argv)
    if args.list:
        for name, task in TASKS.items():
            utils.say(f"{name}: {', '.join(task.runs)}")
    for name in args.task:
        reproduce(name, args.data_root, args.runs)


if __name__ == "__main__":
    main()
