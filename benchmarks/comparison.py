"""Scores over minutes: our recipe, a plain implementation, and the code of junyanz/pytorch-CycleGAN-and-pix2pix.

python benchmarks/comparison.py --junyanz DIR --seeds 0 1 2 --minutes 10
python benchmarks/comparison.py --junyanz DIR --dataset_name horse2zebra --data_root DIR --minutes 60 --every 900

DIR is a checkout of https://github.com/junyanz/pytorch-CycleGAN-and-pix2pix. It is trained through its own options, data
loader and CycleGANModel, with its own defaults except for what TASKS says; without --junyanz it is left out. The plain
implementation is that of reference.py.

All systems are trained on the CPU by one thread, on the same images, and scored on the same test images: by PSNR if these
are pairs, else by the classifiers of domain_score.py. A minute is one of the CPU time of this process, so that other
processes on the machine count little. The clock runs while batches are read (by this process: no system has workers) and
steps are taken, and stops during scoring.

Every score is appended to comparison_NAME.csv in --output. Runs that are finished there are not repeated; one that was
stopped starts again, and replaces its scores. After each run, the table of the data set in comparison.md and the image
comparison_NAME.jpg are renewed.
"""

import argparse
import contextlib
import functools
import importlib
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
import domain_score
import reference
from common import markdown_table, read_csv, recipe, write_csv

import datasets
import utils
from toolkit import cli, devices, process, synthetic
from toolkit.files import atomic_write, write_text
from toolkit.images import ImageReader, draw_grid, tensor_to_image


class Task(NamedTuple):
    """What is compared on a data set."""

    systems: dict[str, str]  # flags of train.py, reference.py, or the checkout
    minutes: tuple[float, ...]  # columns of the table
    has_pairs: bool


TASKS = {
    "day2night": Task(
        {
            "ours": "@recipes/day2night.txt",
            "plain": "--ngf 64 --blocks 9 --n_layers_D 3 --size 64",
            "junyanz": "--load_size 72 --crop_size 64",  # 286 to 256 px, as by default
            "junyanz, small network": (
                "--load_size 72 --crop_size 64 "
                "--netG resnet_6blocks --ngf 16 --netD n_layers --n_layers_D 2 --ndf 32"  # the fewest blocks there
            ),
        },
        minutes=(1, 2, 5, 10),
        has_pairs=True,
    ),
    "horse2zebra": Task(
        {
            "ours": "@recipes/horse2zebra_cpu.txt",
            "plain": "--ngf 64 --blocks 9 --n_layers_D 3 --size 96",
            "junyanz": "--load_size 107 --crop_size 96",
            "junyanz, small network": "--load_size 107 --crop_size 96 --netG resnet_6blocks --ngf 24",
        },
        minutes=(15, 30, 60),
        has_pairs=False,
    ),
}
KEYS = ("system", "settings", "limit", "seed")  # what identifies a run; limit: --minutes
FACTS = (*KEYS, "precision", "finished", "minutes", "step")  # of a row, before its scores
PACKAGES = ("data", "models", "options", "util")  # of the checkout; some have names of ours
SHOWN = 6  # test images of each domain in the image


class Junyanz(reference.Learner):
    """CycleGANModel of the checkout with its data loader."""

    def __init__(self, checkout: Path, flags: Sequence[str], dataset: Path, seed: int):
        if not (checkout / "models" / "cycle_gan_model.py").is_file():
            raise utils.InputError(
                f"{checkout}: no models/cycle_gan_model.py inside; expected a checkout of junyanz's code"
            )
        devices.seed_everything(seed)
        self.precision = "fp32"
        self.device = torch.device("cpu")
        with tempfile.TemporaryDirectory() as folder:
            files = ["--dataroot", str(dataset), "--checkpoints_dir", folder]  # it writes its options there
            argv = ["train.py", *files, "--num_threads", "0", *flags]
            with packages_of(checkout) as load, mock.patch.object(sys, "argv", argv):
                options = load("options.train_options").TrainOptions().parse()
                options.device = self.device
                self.loader: Iterable[dict] = load("data").create_dataset(options)
                self.model: Any = load("models").create_model(options)
                self.model.setup(options)
        self.networks = {"G_AB": self.model.netG_A, "G_BA": self.model.netG_B}
        self.size = options.crop_size

    def start_epoch(self, epoch: int) -> bool:
        if epoch:
            self.model.update_learning_rate()
        return True  # it falls from epoch 100 on

    def batches(self, epoch: int, first_step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            yield batch["A"], batch["B"]

    def step(self, real_A: Tensor, real_B: Tensor) -> None:
        self.model.set_input({"A": real_A, "B": real_B, "A_paths": [], "B_paths": []})
        self.model.optimize_parameters()


@contextlib.contextmanager
def packages_of(checkout: Path) -> Iterator[Any]:
    """Import from a checkout whose packages have names of our modules; ours return afterwards."""

    def take_out() -> dict:
        names = [name for name in sys.modules if name.split(".")[0] in PACKAGES]
        return {name: sys.modules.pop(name) for name in names}

    ours = take_out()
    try:
        with mock.patch.object(sys, "path", [str(checkout), *sys.path]):
            yield importlib.import_module
    finally:
        take_out()
        sys.modules.update(ours)


def make_learner(args: argparse.Namespace, key: dict) -> tuple[reference.Learner, reference.Data, tuple[int, int]]:
    """Build a system with its training data; returns also the size of its images."""
    if key["system"].startswith("junyanz"):
        dataset = datasets.find_dataset(args.data_root, args.dataset_name)
        learner = Junyanz(args.junyanz, shlex.split(key["settings"]), dataset, int(key["seed"]))
        return learner, learner, (learner.size, learner.size)
    which = "reference" if key["system"] == "plain" else "ours"
    flags = ["--ours", key["settings"]] if which == "ours" else shlex.split(key["settings"])
    flags += ["--dataset_name", args.dataset_name, "--data_root", str(args.data_root)]
    learner, data, shape = reference.make_learner(reference.parse_args(flags), which, key["seed"])
    return learner, data, shape.size


def load_reals(args: argparse.Namespace, size: tuple[int, int]) -> dict[str, Tensor]:
    """Load the test images, or pairs, of both domains: (N, 3, *size) in [-1, 1]."""
    dataset = datasets.find_dataset(args.data_root, args.dataset_name)
    if TASKS[args.dataset_name].has_pairs:
        return reference.load_pairs(dataset, size, 3)
    found = {domain: datasets.named_images(dataset / f"test{domain}", ImageReader(size)) for domain in "AB"}
    return {domain: torch.cat(list(images.values())) for domain, images in found.items()}


def predicted_domains(learner: reference.Learner, reals: dict[str, Tensor], dataset: Path) -> dict[str, float]:
    """For how many translations do classifiers predict the target domain, in colour and in greyscale?"""
    row = {}
    with tempfile.TemporaryDirectory() as folder:
        for target, fakes in reference.translations(learner, reals).items():
            (Path(folder) / target).mkdir()
            for i, fake in enumerate(fakes):
                tensor_to_image(fake).save(Path(folder) / target / f"{i}.png")
            for view, channels in domain_score.VIEWS.items():
                row[f"as {target}{view}"] = domain_score.folder_score(dataset, Path(folder) / target, target, channels)
    return row


def make_run(args: argparse.Namespace, key: dict, finished: list[dict]) -> list[dict]:
    """Train one system with one seed; returns its rows, which have been written below the finished ones."""
    learner, data, size = make_learner(args, key)
    reals = load_reals(args, size)
    score = functools.partial(reference.mean_psnr, reals=reals)
    if not TASKS[args.dataset_name].has_pairs:
        dataset = datasets.find_dataset(args.data_root, args.dataset_name)
        score = functools.partial(predicted_domains, reals=reals, dataset=dataset)
    utils.say(f"{key['system']}, seed {key['seed']}, {learner.precision}")
    rows: list[dict] = []
    for row in reference.train_and_score(learner, data, score, 60 * args.minutes, args.every, time.process_time):
        rows.append(key | {"precision": learner.precision, "finished": 0} | row)
        write_csv(scores_file(args), [*finished, *rows])
    rows[-1]["finished"] = 1
    write_csv(scores_file(args), [*finished, *rows])
    save_translations(learner, reals, translations_file(args, key))
    return rows


def scores_file(args: argparse.Namespace) -> Path:
    """Where the scores of a data set are."""
    return args.output / f"comparison_{args.dataset_name}.csv"


def key_of(row: dict) -> tuple:
    """The run of a row."""
    return tuple(row[name] for name in KEYS)


def finished_rows(rows: list[dict]) -> list[dict]:
    """The rows of the runs that reached their end."""
    finished = {key_of(row) for row in rows if row["finished"] in (1, "1")}
    return [row for row in rows if key_of(row) in finished]


def table(rows: list[dict], task: Task) -> list[str]:
    """Lines of Markdown: mean over the seeds of all scores after some minutes, in their order, of finished runs.

    Between two scores it is interpolated. A run that ended early keeps its last score.
    """
    measures = [name for name in rows[0] if name not in FACTS] if rows else []
    runs: dict[tuple, list[dict]] = {}
    for row in finished_rows(rows):
        runs.setdefault(key_of(row), []).append(row)
    lines = []
    for system, settings, limit in dict.fromkeys(key[:3] for key in runs):
        own = [run for key, run in runs.items() if key[:3] == (system, settings, limit)]
        line = {"": system, "precision": own[0][-1]["precision"], "seeds": len(own)}
        for minute in task.minutes:
            if minute <= float(limit):
                means = [np.mean([score_at(minute, run, measure) for run in own]) for measure in measures]
                line[f"{minute:g} min"] = " / ".join(
                    f"{mean:.1f}" if task.has_pairs else f"{mean:.2f}" for mean in means
                )
        line["steps"] = span([float(run[-1]["step"]) for run in own], "{:,.0f}")
        line["ended after, min"] = span([float(run[-1]["minutes"]) for run in own], "{:.1f}")
        lines.append(line)
    return markdown_table(lines) if lines else []


def score_at(minute: float, run: list[dict], measure: str) -> float:
    """A score of a run after so many minutes."""
    return float(np.interp(minute, [float(row["minutes"]) for row in run], [float(row[measure]) for row in run]))


def span(values: list[float], form: str) -> str:
    """The least and the largest value, or one if they look the same."""
    return " to ".join(dict.fromkeys(form.format(value) for value in (min(values), max(values))))


def write_table(args: argparse.Namespace, rows: list[dict]) -> None:
    """Renew the table of a data set between its marks in the page; a page without them is left as it is."""
    page = args.output / "comparison.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    begin, end = (f"<!-- {prefix}{args.dataset_name} -->" for prefix in ("", "end of "))
    if begin in text and end in text:
        lines = "\n".join(table(rows, TASKS[args.dataset_name]))
        write_text(page, f"{text.split(begin)[0]}{begin}\n{lines}\n{end}{text.split(end)[1]}")


def translations_file(args: argparse.Namespace, key: dict) -> Path:
    """Where the translations of a finished run are kept for the image."""
    name = "_".join(re.findall(r"\w+", key["system"]))
    return args.translations / args.dataset_name / f"{name}_{key['limit']}min_seed{key['seed']}.pt"


def save_translations(learner: reference.Learner, reals: dict, path: Path) -> None:
    """Keep what a trained system makes of some test images, spread over all, with these themselves."""
    shown = {domain: images[:: max(1, len(images) // SHOWN)][:SHOWN] for domain, images in reals.items()}
    found = {f"real_{domain}": images for domain, images in shown.items()}
    found |= {f"fake_{target}": images for target, images in reference.translations(learner, shown).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        torch.save(found, temporary)


def draw_translations(args: argparse.Namespace, keys: list[dict]) -> None:
    """Draw what each system made of the kept test images with the first seed, and the truths of pairs."""
    kept = {}
    for key in keys:
        path = translations_file(args, key)
        if key["seed"] == str(args.seeds[0]) and path.is_file():
            kept[key["system"]] = torch.load(path, weights_only=True)
    if kept:
        pair = next(iter(kept.values()))
        rows = []
        for source, target in ("AB", "BA"):
            rows.append((f"input {source}", pair[f"real_{source}"]))
            rows += [(system, found[f"fake_{target}"]) for system, found in kept.items()]
            if TASKS[args.dataset_name].has_pairs:
                rows.append((f"true {target}", pair[f"real_{target}"]))
        with atomic_write(scores_file(args).with_suffix(".jpg")) as temporary:
            draw_grid(rows).save(temporary, format="JPEG", quality=90)


def wanted_runs(args: argparse.Namespace) -> list[dict]:
    """The keys of all runs, seed by seed."""
    keys = []
    for seed in args.seeds:
        for system, settings in TASKS[args.dataset_name].systems.items():
            if system.startswith("junyanz") and args.junyanz is None:
                continue
            flags = shlex.join(recipe(Path(settings).stem)) if settings.startswith("@") else settings
            keys.append(dict(zip(KEYS, (system, flags, f"{args.minutes:g}", str(seed)), strict=True)))
    return keys


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="comparison.py", description=__doc__)
    parser.add_argument("--junyanz", type=Path, metavar="DIR", help="checkout of junyanz/pytorch-CycleGAN-and-pix2pix")
    parser.add_argument("--dataset_name", default="day2night", choices=TASKS, help="folder in --data_root")
    parser.add_argument("--data_root", type=Path, default=Path("datasets"), help="folder that contains the data sets")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of CPU time of each run")
    parser.add_argument("--every", type=float, default=60.0, help="seconds of CPU time between two scores")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of each system")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of scores, page and images")
    parser.add_argument(
        "--translations",
        type=Path,
        default=Path("generated_images/benchmarks/comparison"),
        help="folder that keeps translations of finished runs for the image",
    )
    return parser.parse_args(argv)


@process.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if torch.cuda.is_available():
        raise utils.InputError("the clock is CPU time: hide the GPU with CUDA_VISIBLE_DEVICES=")
    torch.set_num_threads(1)
    if args.dataset_name == datasets.DEMO and not (args.data_root / datasets.DEMO).exists():
        synthetic.draw_dataset(args.data_root)
    rows = finished_rows(read_csv(scores_file(args)))
    keys = wanted_runs(args)
    for key in keys:
        if key_of(key) not in {key_of(row) for row in rows}:
            rows += make_run(args, key, rows)
            write_table(args, rows)
            draw_translations(args, keys)
    print("\n".join(table(rows, TASKS[args.dataset_name])))


if __name__ == "__main__":
    main()
