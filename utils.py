"""What every room leans on: one-line errors, ranks, stop signals, the image buffer.

Knows no network, file or flag. Nothing here runs when it is imported.
"""

import importlib.util
import random
import re
import sys
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# One-line errors


class InputError(Exception):
    """Wrong flag, folder, image or file. One line: what was given, what was expected, what to do."""

    exit_code = 2


class RunError(Exception):
    """The program was called correctly, but failed while running."""

    exit_code = 1


def one_line(text: object) -> str:
    """Make `text` safe to print: line breaks, control characters and broken unicode are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def domain_names(dataset_name: str) -> tuple[str, str]:
    """What the domains of a data set are called: horse and zebra in horse2zebra; A and B where the name tells none."""
    parts = re.split(r"(?<=[^\W\d_])2(?=[^\W\d_])", dataset_name)  # a 2 between letters: not that of photos2 or v2.1
    return (parts[0], parts[1]) if len(parts) == 2 else ("A", "B")


def say(text: object, file: TextIO | None = None) -> None:
    """Print one line without tearing a progress bar apart; on stdout only the first rank speaks."""
    if file is not sys.stderr and dist.is_initialized() and dist.get_rank() > 0:
        return
    tqdm.write(one_line(text), file=file or sys.stdout)
    (file or sys.stdout).flush()


def warn(text: object) -> None:
    """Print a line on stderr about what the user should know, and go on."""
    say(f"warning: {text}", file=sys.stderr)


def counted(number: int, noun: str) -> str:
    """A number of things in words: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def is_folder_name(value: object) -> bool:
    """Whether a value, maybe out of a file, is one plain folder name, which cannot leave the folder that it is put into."""
    if not isinstance(value, str) or value in ("", ".", "..") or value[0] == "-":
        return False
    return all(c not in '/\\:*?"<>|' and c.isprintable() for c in value)


def need_package(name: str, flag: str, command: str) -> None:
    """Refuse, in one line with the remedy, what needs an optional package that is missing."""
    if importlib.util.find_spec(name) is None:
        raise InputError(f"{flag}: the package {name} is missing; install it with: {command}")


# ---------------------------------------------------------------------------------------------
# The buffer of translated images


class FakeImageBuffer:
    """The last translated images, so that a discriminator also sees earlier ones.

    Until it is full every image is kept and handed back; then each is, with probability 1/2,
    exchanged for a kept one.
    source: Shrivastava et al. 2017, section 2.3; size 50 in Zhu et al. 2017, section 4
    """

    def __init__(self, size: int, seed: object):
        self.size = size
        self.images: list[Tensor] = []
        self._rng = random.Random(str(seed))

    def exchange(self, images: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W) of new and older images, without gradient."""
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

    def mark(self) -> tuple:
        """Note the present state, cheaply; images are replaced, never changed."""
        return list(self.images), self._rng.getstate()

    def back_to(self, mark: tuple) -> None:
        """Return to a noted state."""
        images, random_state = mark
        self.images = list(images)
        self._rng.setstate(random_state)

    def state_dict(self) -> dict:
        return {"images": [x.cpu() for x in self.images], "rng": self._rng.getstate()}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Put back a state; of a larger buffer only the first `size` images are kept."""
        self.images = [x.to(device) for x in state["images"]][: self.size]
        self._rng.setstate(state["rng"])
