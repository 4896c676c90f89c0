"""What several benchmarks share: flags of train.py, and the model that flags describe."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import train
from cyclegan import CycleGAN
from toolkit import devices
from toolkit.config import TrainConfig

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
    train.check_args(args)
    config, _ = train.load_pretrained(train.make_config(args, *train.network_configs(args)))
    return config


def build_model(config: TrainConfig, device: torch.device | None = None) -> CycleGAN:
    """The model of a new run, without its data."""
    return train.make_model(
        config, train.make_networks(config, {}), device or devices.pick_device(config.device.device)
    )
