"""Errors and messages, options of the command line, and the buffer of translated images.

Everything else builds on this module; it imports nothing of the project.
"""

import copy
import dataclasses
import importlib.util
import math
import random
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# Errors and messages


class InputError(Exception):
    """Raised for a wrong flag, folder, image or file. One line: what was given, what was expected, what to do."""

    exit_code = 2


class RunError(Exception):
    """Raised when the program was called correctly but failed while running."""

    exit_code = 1


def one_line(text: object) -> str:
    """Escape line breaks, control characters and broken unicode, so that a text can be printed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def domain_names(dataset_name: str) -> tuple[str, str]:
    """Return the names of the domains of a data set: horse and zebra for horse2zebra, otherwise A and B."""
    parts = re.split(r"(?<=[^\W\d_])2(?=[^\W\d_])", dataset_name)  # a 2 between letters: not that of photos2 or v2.1
    return (parts[0], parts[1]) if len(parts) == 2 else ("A", "B")


def say(text: object, file: TextIO | None = None) -> None:
    """Print one line above any progress bar; on stdout only the first rank prints."""
    if file is not sys.stderr and dist.is_initialized() and dist.get_rank() > 0:
        return
    tqdm.write(one_line(text), file=file or sys.stdout)
    (file or sys.stdout).flush()


def warn(text: object) -> None:
    """Print a warning on stderr."""
    say(f"warning: {text}", file=sys.stderr)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def need_package(name: str, flag: str, command: str) -> None:
    """Raise InputError, with the command that installs it, if an optional package is missing."""
    if importlib.util.find_spec(name) is None:
        raise InputError(f"{flag}: the package {name} is missing; install it with: {command}")


# ---------------------------------------------------------------------------------------------
# Options: a field of a dataclass says its default, help and range; toolkit.cli.add_options makes command-line options of them


def option(
    default: Any,
    help: str,
    *,
    choices: Collection | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    parse: Callable[[str], Any] | None = None,
    nargs: str | None = None,
    metavar: str | None = None,
    flag: str | None = None,
) -> Any:
    """Declare a field of a dataclass that is also an option of the command line.

    choices:     the values that are allowed
    least, most: the range of a number, both included; above: a lower limit that is not included
    parse:       turns the text of the command line into a value; raises ValueError if it cannot
    nargs:       "+" or "*" for several values, as in argparse
    flag:        the option's name, where it is not the field's
    """
    metadata = {"help": help, "choices": choices, "least": least, "most": most, "above": above}
    metadata |= {"parse": parse, "nargs": nargs, "metavar": metavar, "flag": flag}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_options(config: Any) -> None:
    """Compare the fields of a config, each of one plain type, with what their options allow.

    raises: ValueError for the first value of another type, or out of range
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        allowed = field.metadata
        if type(value) is not field.type:
            raise ValueError(f"{field.name} {value!r}: expected {field.type.__name__}")
        if allowed.get("choices") and value not in allowed["choices"]:
            raise ValueError(f"{field.name} {value}: expected one of {', '.join(map(str, allowed['choices']))}")
        limits = {name: allowed.get(name) for name in ("least", "most", "above")}
        if any(limit is not None for limit in limits.values()) and not in_range(value, **limits):
            raise ValueError(f"{field.name} {value}: expected {range_in_words(**limits)}")


def in_range(value: Any, least: float | None = None, most: float | None = None, above: float | None = None) -> bool:
    """Whether a value is a finite number within the limits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if above is not None and value <= above:
        return False
    return (least is None or value >= least) and (most is None or value <= most)


def range_in_words(least: float | None = None, most: float | None = None, above: float | None = None) -> str:
    """A range for a message: "at least 1 and at most 4096"."""
    limits = {"above": above, "at least": least, "at most": most}
    return " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)


def folder_name(text: Any) -> str:
    """Accept one plain folder name, which cannot lead out of the folder that contains it; else raise ValueError."""
    plain = isinstance(text, str) and text not in ("", ".", "..") and text[0] != "-"
    if not plain or any(c in '/\\:*?"<>|' or not c.isprintable() for c in text):
        raise ValueError(f'given {text!r}, expected one folder name without / \\ : * ? " < > |')
    return text


def is_folder_name(value: object) -> bool:
    """Whether a value, which may come from a file, is one plain folder name."""
    try:
        return folder_name(value) == value
    except ValueError:
        return False


def epoch_name(text: str) -> str:
    """Accept a number of finished epochs, "latest" or "best"; else raise ValueError."""
    if text in ("latest", "best"):
        return text
    if not text.isdecimal():
        raise ValueError(f"given {text!r}, expected a number of finished epochs, latest or best")
    return str(int(text))


def existing_or_new_path(text: str) -> Path:
    """Accept a path that is not empty; an empty one would mean the current folder."""
    if not text:
        raise ValueError("given '', expected a path")
    return Path(text)


def some_of(choices: Collection[str]) -> Callable[[str], list[str]]:
    """Return a function that accepts some of the choices, separated by commas."""

    def parse(text: str) -> list[str]:
        words = [word for word in text.split(",") if word]
        wrong = [word for word in words if word not in choices]
        if wrong:
            raise ValueError(f"given {wrong[0]!r}, expected some of {','.join(choices)}")
        return words

    return parse


# ---------------------------------------------------------------------------------------------
# The buffer of translated images


class FakeImageBuffer:
    """The latest translated images, so that a discriminator also sees older ones.

    Until it is full, every image is stored and returned. Then each new image is, with probability 1/2, exchanged for a
    stored one.
    source: Shrivastava et al. 2017, section 2.3; size 50 in Zhu et al. 2017, section 4
    """

    def __init__(self, size: int, seed: object):
        self.size = size
        self.images: list[Tensor] = []
        self._rng = random.Random(str(seed))

    def exchange(self, images: Tensor) -> Tensor:
        """Store images (N, C, H, W) and return as many, new and older ones, without gradient."""
        exchanged = []
        for image in images.detach():
            if len(self.images) < self.size:
                self.images.append(image.clone())
            elif self.size and self._rng.random() < 0.5:
                i = self._rng.randrange(self.size)
                older = self.images[i]
                self.images[i] = image.clone()
                image = older
            exchanged.append(image)
        return torch.stack(exchanged)

    def snapshot(self) -> tuple:
        """Return the present state without a copy: stored images are replaced, never changed."""
        return list(self.images), self._rng.getstate()

    def restore(self, snapshot: tuple) -> None:
        images, random_state = snapshot
        self.images = list(images)
        self._rng.setstate(random_state)

    def state_dict(self) -> dict:
        return {"images": [x.cpu() for x in self.images], "rng": self._rng.getstate()}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Restore a state; of a larger buffer only the first `size` images are kept."""
        self.images = [x.to(device) for x in state["images"]][: self.size]
        self._rng.setstate(state["rng"])
