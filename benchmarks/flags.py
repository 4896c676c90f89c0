"""Flags that several benchmarks share, and those of recipes/."""

import shlex
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# what most experiments on the demo set have in common
DAY2NIGHT = (
    "--dataset_name day2night --img_height 64 --img_width 64 --ndf 32 --n_layers_D 2 --batch_size 1 "
    "--load_scale 1 --no-flip"
)


def recipe(name: str) -> list[str]:
    """Return the flags of recipes/NAME.txt."""
    return shlex.split((ROOT / "recipes" / f"{name}.txt").read_text(), comments=True)


def expand(words: Iterable[str]) -> list[str]:
    """Replace each "@recipes/NAME.txt" by its flags, so that the working folder does not matter."""
    found = []
    for word in words:
        found += recipe(Path(word).stem) if word.startswith("@recipes/") else [word]
    return found
