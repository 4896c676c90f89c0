"""Translate a large image in overlapping tiles that share the statistics of their norms: less memory, not less time."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models import Generator, GeneratorConfig

Norm = nn.InstanceNorm2d | nn.GroupNorm  # layers with statistics of one image


def translate_tiled(net: Generator, translate: Callable[[Tensor], Tensor], image: Tensor, tile: int) -> Tensor:
    """Translate an image (1, C, H, W) in tiles of `tile` px a side, normalised by shared statistics; translate runs `net`.

    If each tile had its own statistics, one that shows only sky would be normalised as if everything were sky. A first
    pass therefore estimates them from batches of patches. Each has as many pixels as one tile, but comes from all over
    the image and is normalised as one, so each layer sees nearly what it would see of the whole image.
    """
    if max(image.shape[-2:]) <= tile:
        return translate(image)
    norms = [module for module in net.modules() if isinstance(module, Norm)]
    step = 2**net.config.downsamplings
    overlap = tile // 8  # of adjacent tiles
    # at most 4 patches along the side of a tile; fewer if they would be smaller than what a pixel depends on
    side = max(tile // 4, net.config.smallest_side, int(min(tile // 2, receptive_field(net.config))))
    batches = sample_patches(image, side, (tile // side) ** 2, step) if norms else []
    statistics = SharedStatistics(norms)
    for batch in tqdm(batches, "measuring the whole image", unit="batch", leave=False, delay=3):
        statistics.add(translate, batch)
    with replaced_forward(norms, statistics.normalise):
        return blend_tiles(translate, image, tile, overlap, step)


def tile_spans(length: int, tile: int, overlap: int, step: int = 1) -> list[slice]:
    """Divide a side into evenly spaced tiles, no longer than needed, that overlap by at least `overlap` px.

    step: tiles start at its multiples, so that downsampling samples the same pixels as in the whole image;
          at most tile - overlap, as for every tile that a generator accepts
    """
    if length <= tile:
        return [slice(0, length)]
    farthest = (tile - overlap) // step * step  # from one start to the next
    count = 1 + math.ceil((length - tile) / farthest)
    shortest = max(4, 2 * step)  # that a generator accepts
    side = min(tile, max(shortest, math.ceil((length + (count - 1) * (overlap + step)) / count)))
    starts = [i * (length - side) // (count - 1) // step * step for i in range(count)]
    return [slice(start, start + side) for start in starts[:-1]] + [slice(starts[-1], length)]


def fade(length: int, overlap: int) -> Tensor:
    """Return the weights along the side of a tile: from 0 to 1 over the middle half of the overlap."""
    edge = torch.arange(length) + 0.5
    # never 0: the outermost pixels saw padding, and only count where there is no other tile
    return (torch.minimum(edge, edge.flip(0)) - overlap / 4).div(max(1, overlap / 2)).clamp(1e-3, 1)


def axis_weights(spans: Sequence[slice], overlap: int) -> list[Tensor]:
    """Return the weights of tiles along one side of an image; they add up to 1 at every pixel."""
    fades = [fade(span.stop - span.start, overlap) for span in spans]
    total = torch.zeros(spans[-1].stop)
    for span, weights in zip(spans, fades, strict=True):
        total[span] += weights
    assert total.all(), "tiles do not cover the image; the pixels between them would be black"
    return [weights / total[span] for span, weights in zip(spans, fades, strict=True)]


def blend_tiles(translate: Callable, images: Tensor, tile: int, overlap: int, step: int = 1) -> Tensor:
    """Translate images (N, C, H, W) in tiles of tile_spans for each side, and blend the tiles where they overlap."""
    rows, columns = (tile_spans(length, tile, overlap, step) for length in images.shape[-2:])
    weighted_rows, weighted_columns = (list(zip(x, axis_weights(x, overlap), strict=True)) for x in (rows, columns))
    blended = torch.zeros(images.shape)
    tiles = list(itertools.product(weighted_rows, weighted_columns))
    for (row, row_weights), (column, column_weights) in tqdm(
        tiles, "translating tiles", unit="tile", leave=False, delay=3
    ):
        weights = torch.outer(row_weights, column_weights)
        blended[..., row, column] += weights * translate(images[..., row, column]).cpu()
    return blended


def sample_patches(image: Tensor, side: int, batch_size: int, step: int) -> list[Tensor]:
    """Cut every second patch of about `side` px out of an image (1, C, H, W); return batches from all over the image."""
    rows = tile_spans(image.shape[2], side, 0, step)
    columns = tile_spans(image.shape[3], side, 0, step)
    height = min(span.stop - span.start for span in rows)
    width = min(span.stop - span.start for span in columns)
    patches = []
    for i, row in enumerate(rows):
        for column in columns[i % 2 :: 2]:  # the black squares of a chessboard
            patches.append(image[..., row.start : row.start + height, column.start : column.start + width])
    random.Random(0).shuffle(patches)  # in order, every n-th patch could be from the same column
    count = math.ceil(len(patches) / batch_size)
    return [torch.cat(patches[i::count]) for i in range(count)]


def bytes_per_pixel(net: Generator) -> float:
    """Estimate the memory that a generator needs per pixel of an image, in float32: twice that of its largest layer.

    Measured on a CPU, images of 1.5 million pixels: 1.3 to 1.9 times what the largest layer reads and writes.
    """
    side = max(64, 4 * net.config.smallest_side)
    floats = []

    def measure_layer(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        floats.append(sum(x.numel() for x in inputs) + output.numel())

    with ExitStack() as hooks, torch.inference_mode():
        for layer in net.modules():
            if not list(layer.children()):
                hooks.enter_context(layer.register_forward_hook(measure_layer))
        net(next(net.parameters()).new_zeros(1, net.config.channels, side, side))
    return 2 * 4 * max(floats) / side**2


def receptive_field(config: GeneratorConfig) -> float:
    """Return the side in px of the square of the input that one output pixel depends on, without normalisation layers."""
    if config.generator == "unet_vit":
        return math.inf  # attention sees everything
    sides = []
    for pixel in range(2**config.n_downsampling):  # depends on the position relative to the downsampling
        first, last = pixel - 3, pixel + 3  # the head's 7x7 convolution
        for _ in range(config.n_downsampling):  # upsampling layers, backwards
            wider = config.upsample == "resize" and config.resize_mode == "bilinear"
            first = (first if config.upsample == "deconv" else first - 1 - wider) // 2
            last = (last + 1 + wider) // 2
        first, last = first - 2 * config.num_residual, last + 2 * config.num_residual  # two 3x3 convolutions per block
        for _ in range(config.n_downsampling):
            first, last = 2 * first - 1, 2 * last + 1
        sides.append(last - first + 7)  # the stem's 7x7 convolution
    return max(sides)


class SharedStatistics:
    """Mean and mean square of the inputs of each norm, per channel or group, over all patches of an image."""

    def __init__(self, norms: Sequence[Norm]):
        self.norms = norms
        self.sums: dict[nn.Module, Tensor] = {}  # (2, C or groups), over the patches
        self.patches = 0

    def add(self, translate: Callable, batch: Tensor) -> None:
        """Add the statistics of a batch of patches (N, C, H, W), which are normalised as one image."""
        self.patches += len(batch)
        with replaced_forward(self.norms, self._collect):
            translate(batch)

    def _collect(self, norm: Norm, x: Tensor) -> Tensor:
        ones = torch.ones(x.shape[1], device=x.device)  # float32, so that the statistics are float32 too
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else norm.num_features
        shape = (len(x), x.shape[1], x.shape[2] * x.shape[3], groups)
        maps = x.contiguous() if x.is_cpu else x.contiguous().float()  # only a CPU accepts weights of another precision
        # 2 to 7 times as fast as other ways on a CPU; mean and rstd are (N, groups)
        _, mean, rstd = torch.native_group_norm(maps, ones, torch.zeros_like(ones), *shape, norm.eps)
        mean = mean.float().view(len(x), -1)
        squares = rstd.float().view(len(x), -1).pow(-2) - norm.eps + mean.square()
        moments = torch.stack([mean.sum(0), squares.sum(0)])
        self.sums[norm] = self.sums[norm].add_(moments) if norm in self.sums else moments
        return normalise_by(norm, x, moments / len(x))

    def normalise(self, norm: Norm, x: Tensor) -> Tensor:
        """Replace a norm's forward: normalise by the statistics of all patches."""
        return normalise_by(norm, x, self.sums[norm] / self.patches)


def normalise_by(norm: Norm, x: Tensor, moments: Tensor) -> Tensor:
    """Normalise (N, C, H, W) by the mean and mean square of each channel or group, (2, C or groups)."""
    mean, square = moments.repeat_interleave(x.shape[1] // moments.shape[1], dim=1)
    var = (square - mean.square()).clamp(min=0)
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, eps=norm.eps)


@contextmanager
def replaced_forward(modules: Sequence[nn.Module], forward: Callable) -> Iterator[None]:
    """Call forward(module, x) in place of the forward methods of modules within the block."""
    for module in modules:
        module.forward = lambda x, module=module: forward(module, x)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
