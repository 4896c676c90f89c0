"""What several benchmarks share: flags of train.py, the model that flags describe, and tables."""

import csv
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import train
from cyclegan import CycleGAN
from toolkit import cli, devices
from toolkit.config import NETWORK_CONFIGS, RUN_CONFIGS, SHARED_CONFIGS, TrainConfig
from toolkit.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
# what most experiments on the demo set have in common
DAY2NIGHT = (
    "--dataset_name day2night --img_height 64 --img_width 64 --ndf 32 --n_layers_D 2 --batch_size 1 "
    "--load_scale 1 --no-flip"
)


def recipe(name: str) -> list[str]:
    """The flags of recipes/NAME.txt."""
    return shlex.split((ROOT / "recipes" / f"{name}.txt").read_text(), comments=True)


def expand(words: Iterable[str]) -> list[str]:
    """Replace each "@recipes/NAME.txt" by its flags, so that the working directory does not matter."""
    found = []
    for word in words:
        found += recipe(Path(word).stem) if word.startswith("@recipes/") else [word]
    return found


def train_config(argv: Sequence[object]) -> TrainConfig:
    """The config of a new run with these flags of train.py."""
    args = train.parse_args([str(word) for word in argv])
    config = TrainConfig(**cli.config_fields(args, SHARED_CONFIGS | NETWORK_CONFIGS | RUN_CONFIGS))
    config.check()
    config, _ = train.config_and_pretrained(config)
    return config


def build_model(config: TrainConfig, device: torch.device | None = None) -> CycleGAN:
    """The model of a new run, without its data."""
    return train.make_model(
        config, train.make_networks(config, {}), device or devices.pick_device(config.device.device)
    )


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write rows whose keys are the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict]:
    """Read the rows of a file, as text; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown_table(rows: Sequence[dict]) -> list[str]:
    """Lines of a Markdown table of rows whose keys are the columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(str(row.get(name, '')) for name in columns)} |" for row in rows]
