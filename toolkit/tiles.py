"""A large image in tiles: where they lie, how they blend, and how they share the statistics of their normalisations.

fake = translate_tiled(net, net, images, 512)  # (N, C, H, W) → the same shape

Tiles save memory, not time: an instance or group norm looks at the whole image, of which a part therefore passes the network
before any tile is translated.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models import Generator, GeneratorConfig

OVERLAP = 8  # tiles overlap by this part of their side
PIECES = 4  # pieces along the side of a tile, at most, in the batches that statistics are taken from
PATIENCE = 3.0  # seconds before a progress bar appears
Norm = nn.InstanceNorm2d | nn.GroupNorm  # whose statistics are those of an image


# ---------------------------------------------------------------------------------------------
# Where tiles lie, and how they blend


def tile_spans(length: int, tile: int, overlap: int, step: int = 1) -> list[slice]:
    """Where tiles lie along a side: evenly, no longer than need be, so that they overlap by at least so many px.

    step: their starts are multiples of it, so that the halvings of a tile fall where those of the whole image do;
          the last one can be longer than `tile` by less than a step
    """
    if length <= tile:
        return [slice(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    least = max(4, 2 * step)  # that a generator takes
    side = min(tile, max(least, math.ceil((length + (count - 1) * (overlap + step)) / count)))
    starts = [i * (length - side) // (count - 1) // step * step for i in range(count)]
    return [*(slice(start, start + side) for start in starts[:-1]), slice(starts[-1], length)]


def tiles_of(images: Tensor, tile: int, overlap: int, step: int = 1) -> list[tuple[slice, slice]]:
    """Rows and columns of the tiles that cover (N, C, H, W)."""
    rows = tile_spans(images.shape[2], tile, overlap, step)
    columns = tile_spans(images.shape[3], tile, overlap, step)
    return [(across, down) for across in rows for down in columns]


def fade(length: int, overlap: int) -> Tensor:
    """Weight of a tile along one of its sides: a line from 0 to 1 over the middle half of where tiles overlap."""
    edge = torch.arange(length) + 0.5  # the outermost pixels saw padding: they count where no other does
    return (torch.minimum(edge, edge.flip(0)) - overlap / 4).div(max(1, overlap / 2)).clamp(1e-3, 1)


def blend_tiles(translate: Callable, images: Tensor, spans: Sequence[tuple[slice, slice]], overlap: int) -> Tensor:
    """Translate (N, C, H, W) tile by tile, which overlap by so many px, and let each fade out towards its edges."""
    blended = torch.zeros_like(images)
    total = torch.zeros(images.shape[-2:])
    for rows, columns in spans:
        part = images[..., rows, columns]
        window = torch.outer(fade(part.shape[2], overlap), fade(part.shape[3], overlap))
        blended[..., rows, columns] += window * translate(part).cpu()
        total[rows, columns] += window
    return blended.div_(total)


def scattered_pieces(image: Tensor, piece: int, most: int, step: int) -> list[Tensor]:
    """Cut every second piece out of (1, C, H, W), as on a chess board, in batches of at most `most` from all over it.

    returns: (N, C, height, width) each, of equal height and width, about `piece` px
    """
    rows = tile_spans(image.shape[2], piece, 0, step)
    columns = tile_spans(image.shape[3], piece, 0, step)
    height = min(span.stop - span.start for span in rows)
    width = min(span.stop - span.start for span in columns)
    corners = [(row.start, column.start) for row in rows for column in columns]
    fields = [(i + j) % 2 for i in range(len(rows)) for j in range(len(columns))]
    chosen = [corner for corner, field in zip(corners, fields, strict=True) if field == 0]
    random.Random(0).shuffle(chosen)  # in order, every n-th could come from one column
    batches = []
    for i in range(math.ceil(len(chosen) / most)):
        some = chosen[i :: math.ceil(len(chosen) / most)]
        batches.append(torch.cat([image[..., y : y + height, x : x + width] for y, x in some]))
    return batches


# ---------------------------------------------------------------------------------------------
# Statistics that all tiles share


class AllSeen(Exception):
    """Raised when each normalisation has seen a batch; what the network would still compute tells nothing new."""


class Statistics:
    """Mean and mean square in front of each norm of a network, of each channel or group, over all pieces of one image."""

    def __init__(self, norms: Sequence[Norm]):
        self.norms = norms
        self.sums: dict[nn.Module, Tensor] = {}  # (2, C or groups), weighted by the number of pieces
        self.pieces = 0
        self.waiting: set[nn.Module] = set()  # norms that this batch has not reached

    def take(self, translate: Callable, batch: Tensor) -> None:
        """Add the statistics of a batch of pieces (N, C, H, W), which are normalised together."""
        self.waiting = set(self.norms)
        self.pieces += len(batch)
        with replaced_forward(self.norms, self._collect), suppress(AllSeen):
            translate(batch)

    def _collect(self, module: Norm, x: Tensor) -> Tensor:
        one = torch.ones(x.shape[1], device=x.device)  # in float32, so that the statistics are, too
        shape = (len(x), x.shape[1], x.shape[2] * x.shape[3], groups_of(module))
        maps = x.contiguous() if x.is_cpu else x.contiguous().float()  # only a CPU takes weights of another precision
        # of what torch has for this the fastest on a CPU, by factors of 2 to 7; (N, groups) each
        _, mean, rstd = torch.native_group_norm(maps, one, torch.zeros_like(one), *shape, module.eps)
        squares = rstd.float().view(len(x), -1).pow(-2) - module.eps + mean.float().view(len(x), -1).square()
        moments = torch.stack([mean.float().view(len(x), -1).sum(0), squares.sum(0)])
        self.sums[module] = self.sums[module].add_(moments) if module in self.sums else moments
        self.waiting.discard(module)
        if not self.waiting:
            raise AllSeen
        return normalised(module, x, moments / len(x))

    def normalise(self, module: Norm, x: Tensor) -> Tensor:
        """In place of a norm's own forward: use the statistics of all pieces."""
        return normalised(module, x, self.sums[module] / self.pieces)


def groups_of(module: Norm) -> int:
    """How many groups of channels a norm has; each channel is one for an instance norm."""
    return module.num_groups if isinstance(module, nn.GroupNorm) else module.num_features


def normalised(module: Norm, x: Tensor, moments: Tensor) -> Tensor:
    """Normalise (N, C, H, W) by the mean and mean square of each channel or group, (2, C or groups)."""
    mean, square = moments.repeat_interleave(x.shape[1] // groups_of(module), dim=1)
    var = (square - mean.square()).clamp(min=0)
    return F.batch_norm(x, mean, var, module.weight, module.bias, eps=module.eps)


@contextmanager
def replaced_forward(modules: Sequence[nn.Module], forward: Callable) -> Iterator[None]:
    """Let forward(module, x) stand in for the modules' own forward, while the block lasts."""
    for module in modules:
        module.forward = lambda x, module=module: forward(module, x)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def translate_tiled(net: Generator, translate: Callable, image: Tensor, tile: int) -> Tensor:
    """Translate (1, C, H, W) in tiles that all share the statistics of their norms, so that none stands out.

    A first pass takes mean and variance, from small pieces: a batch of them has the pixels of one tile, but comes from
    all over the image, and is normalised as one. So each layer sees nearly what it would see of the whole image,
    where a tile of sky alone would be normalised as if all were sky. The second pass translates.
    """
    if max(image.shape[-2:]) <= tile:
        return translate(image)
    norms = [module for module in net.modules() if isinstance(module, Norm)]
    step = 2**net.config.downsamplings
    piece = max(tile // PIECES, net.config.smallest_side, int(min(tile // 2, receptive_field(net.config))))
    batches = scattered_pieces(image, piece, (tile // piece) ** 2, step) if norms else []
    overlap = tile // OVERLAP
    spans = tiles_of(image, tile, overlap, step)
    statistics = Statistics(norms)
    with tqdm(desc="tiles", total=len(batches) + len(spans), unit="tile", leave=False, delay=PATIENCE) as bar:
        for batch in batches:
            statistics.take(translate, batch)
            bar.update()

        def translate_and_count(part: Tensor) -> Tensor:
            output = translate(part)
            bar.update()
            return output

        with replaced_forward(norms, statistics.normalise):
            return blend_tiles(translate_and_count, image, spans, overlap)


def receptive_field(config: GeneratorConfig) -> float:
    """Side of the square of input px on which an output pixel depends, at most, but for the normalisation layers."""
    if config.generator == "unet_vit":
        return math.inf  # attention looks everywhere
    sides = []
    for pixel in range(2**config.n_downsampling):  # the side varies with the pixel's place on the grid of the halvings
        first = pixel - 3  # the head's 7x7 convolution
        last = pixel + 3
        for _ in range(config.n_downsampling):  # upwards: which pixels of the smaller map these depend on
            first = (first if config.upsample == "deconv" else first - 1) // 2
            last = (last + 1) // 2
        first -= 2 * config.num_residual  # two 3x3 convolutions each
        last += 2 * config.num_residual
        for _ in range(config.n_downsampling):
            first = 2 * first - 1
            last = 2 * last + 1
        sides.append(last - first + 7)  # the stem's 7x7 convolution
    return max(sides)
