"""Errors and messages, options of the command line, and the buffer of translated images; imports nothing of the project."""

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


class InputError(Exception):
    """Raised for a wrong flag, folder, image or file. One line: what was given, what was expected, what to do."""

    exit_code = 2


class RunError(Exception):
    """Raised when the program was called correctly but failed while running."""

    exit_code = 1


def one_line(text: object) -> str:
    """Escape line breaks, control characters and broken unicode, so that a text can be printed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def domain_names(dataset_name: str, recorded: object = None) -> tuple[str, str]:
    """Return the names of the domains: two that were recorded, else those in the data set's (horse2zebra), else A and B."""
    if isinstance(recorded, list) and len(recorded) == 2 and all(isinstance(name, str) and name for name in recorded):
        return one_line(recorded[0])[:30], one_line(recorded[1])[:30]
    parts = re.split(r"(?<=[^\W\d_])2(?=[^\W\d_])", dataset_name)  # a 2 between letters: not that of photos2 or v2.1
    return (parts[0], parts[1]) if len(parts) == 2 else ("A", "B")


def with_domain(label: str, domains: tuple[str, str]) -> str:
    """Add the name of a domain to a label that ends with its letter: real_A: horse."""
    name = dict(zip("AB", domains, strict=True)).get(label[-1], label[-1])
    return label if name == label[-1] else f"{label}: {name}"


def duration(seconds: float) -> str:
    """Format a duration for reading: 0.13 s, 206 s, 45 minutes, 69 hours, 5 days."""
    units = (("s", 1, 600), ("minutes", 60, 7200), ("hours", 3600, 4 * 86400), ("days", 86400, math.inf))
    unit, length, _ = next(unit for unit in units if seconds < unit[2])
    number = seconds / length
    return f"{number:.2g} {unit}" if number < 10 else f"{number:.0f} {unit}"


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


def option(default: Any, help: str, **allowed: Any) -> Any:
    """Declare a field of a dataclass that is also an option of the command line.

    least, most, above:      the range of a number; `above` itself is not allowed
    parse:                   turns the text of the command line into a value; raises ValueError if it cannot
    choices, nargs, metavar: as in argparse
    saved:                   further choices that are in saved files alone
    flag:                    the option's name, where it is not the field's
    """
    metadata = {"help": help, **allowed}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_options(config: Any) -> None:
    """Raise ValueError for the first field of a config whose value is of another type, or not what its option allows."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        choices = field.metadata.get("choices", (value,))
        limits = range_in_words(**field.metadata)
        kind: Any = field.type
        if type(value) is not kind:
            raise ValueError(f"{field.name} {value!r}: expected {kind.__name__}")
        if value not in choices and value not in field.metadata.get("saved", ()):
            raise ValueError(f"{field.name} {value}: expected one of {', '.join(map(str, choices))}")
        if limits and not in_range(value, **field.metadata):
            raise ValueError(f"{field.name} {value}: expected {limits}")


def in_range(value: Any, least: float = -math.inf, most: float = math.inf, above: float = -math.inf, **_: Any) -> bool:
    """Return whether a value is a finite number within the limits of an option."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and least <= value <= most and above < value < math.inf


def range_in_words(**allowed: Any) -> str:
    """Return the range of an option for a message, such as "at least 1 and at most 4096"."""
    words = {"above": "above", "least": "at least", "most": "at most"}
    return " and ".join(f"{words[name]} {allowed[name]}" for name in words if name in allowed)


def is_folder_name(value: Any) -> bool:
    """Return whether a value is one plain folder name, which cannot lead out of the folder that contains it."""
    plain = isinstance(value, str) and value not in ("", ".", "..") and value[0] != "-"
    return plain and all(c not in '/\\:*?"<>|' and c.isprintable() for c in value)


def folder_name(text: Any) -> str:
    """Accept one plain folder name; else raise ValueError."""
    if not is_folder_name(text):
        raise ValueError(f'given {text!r}, expected one folder name without / \\ : * ? " < > |')
    return text


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
        for word in words:
            if word not in choices:
                raise ValueError(f"given {word!r}, expected some of {','.join(choices)}")
        return words

    return parse


class FakeImageBuffer:
    """The latest translated images, so that a discriminator also sees older ones.

    Once it is full, each new image is, with probability 1/2, exchanged for a stored one.
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

    def snapshot(self) -> dict:
        """Return the present state without a copy: stored images are replaced, never changed."""
        return {"images": list(self.images), "rng": self._rng.getstate()}

    def state_dict(self) -> dict:
        return self.snapshot() | {"images": [x.cpu() for x in self.images]}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Restore a state; of a larger buffer only the first `size` images are kept."""
        self.images = [x.to(device) for x in state["images"]][: self.size]
        self._rng.setstate(state["rng"])
