"""Layers of torch in another form, where torch is slow or not deterministic: same weights, same results but for rounding."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_CHANNELS = 32  # of a convolution by Winograd's method
LEAST_TILES = 32  # of 4x4 outputs, all images together


class InstanceNorm2d(nn.InstanceNorm2d):
    """Instance normalisation, (N, C, H, W) → (N, C, H, W); on a CPU by other norms, which are faster.

    In channels_last torch's own has a wrong gradient for one image on a CPU, and a group norm a slow one (findings/); there
    each image is a batch of its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.is_contiguous() and x.shape[2] * x.shape[3] > 1 and not torch.compiler.is_exporting():
            return F.group_norm(x, x.shape[1], self.weight, self.bias, self.eps)
        if not x.is_cpu or torch.compiler.is_compiling() or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        images = [F.batch_norm(y, None, None, self.weight, self.bias, True, eps=self.eps) for y in x.split(1)]
        return images[0] if len(images) == 1 else torch.cat(images)


# The transforms of Winograd's F(4x4, 3x3), of inputs, weights and outputs (Lavin and Gray 2015, section 4.3), along one side
INPUT_TRANSFORM = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
WEIGHT_TRANSFORM = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
OUTPUT_TRANSFORM = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


@functools.cache
def winograd_transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Return the transforms of a tile along both sides, as matrices: inputs (36, 36), weights (36, 9), outputs (16, 36)."""
    sides = [torch.tensor(side) for side in (INPUT_TRANSFORM, WEIGHT_TRANSFORM, OUTPUT_TRANSFORM)]
    inputs, weights, outputs = (torch.kron(side, side).float() for side in sides)
    return inputs, weights, outputs


class Winograd(torch.autograd.Function):
    """A 3x3 convolution in which 36 products of matrices give 4x4 outputs each, a quarter of the multiplications.

    x, weight: (N, in, H + 2, W + 2) and (out, in, 3, 3), float32 in channels_last on a CPU; H and W multiples of 4
    returns:   (N, out, H, W), also in channels_last
    source:    Lavin and Gray 2015, arXiv:1509.09308: Y = A'[(G g G') * (B' d B)]A
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)  # their transforms would take two to four times the memory
        rows, columns = ((side - 2) // 4 for side in x.shape[2:])
        products = torch.bmm(Winograd.transform_input(x), Winograd.transform_weight(weight).mT)  # (36, tiles, out)
        tiles = winograd_transforms()[2] @ products.flatten(1)
        tiles = tiles.view(4, 4, len(x), rows, columns, -1).permute(2, 3, 0, 4, 1, 5)  # (N, rows, 4, columns, 4, out)
        return tiles.reshape(len(x), 4 * rows, 4 * columns, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        of_inputs, of_weights, of_outputs = winograd_transforms()
        n, width_in, height, width = x.shape
        rows, columns = (height - 2) // 4, (width - 2) // 4
        tiles = gradient.permute(0, 2, 3, 1).reshape(n, rows, 4, columns, 4, -1).permute(2, 4, 0, 1, 3, 5)
        products = (of_outputs.T @ tiles.reshape(16, -1)).view(36, n * rows * columns, -1)  # (36, tiles, out)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad = torch.bmm(products.mT, Winograd.transform_input(x))  # (36, out, in)
            grad = (of_weights.T @ grad.flatten(1)).view(3, 3, *weight.shape[:2])
            grad_weight = grad.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)
        if ctx.needs_input_grad[0]:
            grad = torch.bmm(products, Winograd.transform_weight(weight))  # (36, tiles, in)
            tiles = (of_inputs.T @ grad.flatten(1)).view(6, 6, n, rows, columns, width_in)
            tiles = tiles.permute(2, 3, 0, 4, 1, 5)  # (N, rows, 6, columns, 6, in); neighbours overlap by 2
            grad = x.new_zeros(n, rows + 1, 4, columns + 1, 4, width_in)
            grad[:, :-1, :, :-1] = tiles[:, :, :4, :, :4]
            grad[:, 1:, :2, :-1] += tiles[:, :, 4:, :, :4]
            grad[:, :-1, :, 1:, :2] += tiles[:, :, :4, :, 4:]
            grad[:, 1:, :2, 1:, :2] += tiles[:, :, 4:, :, 4:]
            grad_x = grad.view(n, height + 2, width + 2, width_in)[:, :height, :width].permute(0, 3, 1, 2)
        return grad_x, grad_weight

    @staticmethod
    def transform_input(x: Tensor) -> Tensor:
        """Return the transformed 6x6 tiles of an image, which overlap by 2: (36, tiles, in)."""
        n, width_in, height, width = x.shape
        image, _, row, column = x.stride()
        tiles = (6, 6, n, (height - 2) // 4, (width - 2) // 4, width_in)
        tiles = x.as_strided(tiles, (row, column, image, 4 * row, 4 * column, 1))
        return (winograd_transforms()[0] @ tiles.reshape(36, -1)).view(36, -1, width_in)

    @staticmethod
    def transform_weight(weight: Tensor) -> Tensor:
        """Return the transformed weights, (36, out, in)."""
        width_out, width_in = weight.shape[:2]
        flat = weight.permute(2, 3, 0, 1).reshape(9, -1)
        return (winograd_transforms()[1] @ flat).view(36, width_out, width_in)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution without padding, (N, in, H + 2, W + 2) → (N, out, H, W); on a CPU by Winograd's method if that pays.

    It pays in float32, in channels_last, if there are enough channels and tiles for the products of matrices.
    """

    def __init__(self, width_in: int, width_out: int, bias: bool = True):
        super().__init__(width_in, width_out, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.winograd_pays(x):
            return super().forward(x)
        height, width = (side - 2 for side in x.shape[2:])
        odd = height % 4 or width % 4
        x = F.pad(x, (0, -width % 4, 0, -height % 4)) if odd else x
        x = Winograd.apply(x, self.weight)
        x = x[..., :height, :width].contiguous(memory_format=torch.channels_last) if odd else x
        return x if self.bias is None else x + self.bias[:, None, None]

    def winograd_pays(self, x: Tensor) -> bool:
        """Whether Winograd's method is likely to be faster than torch's convolution (benchmarks/NOTES.md)."""
        if not x.is_cpu or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return False
        tiles = len(x) * math.ceil((x.shape[2] - 2) / 4) * math.ceil((x.shape[3] - 2) / 4)
        if min(self.in_channels, self.out_channels) < LEAST_CHANNELS or tiles < LEAST_TILES:
            return False
        layout = torch.channels_last
        return x.is_contiguous(memory_format=layout) and self.weight.is_contiguous(memory_format=layout)


class ThinConv2d(nn.Conv2d):
    """A convolution to few channels, (N, in, H, W) → (N, out, H - k + 1, W - k + 1); two to three times as fast on a CPU.

    A CPU computes 16 output channels at a time, so 3 of them waste most of its work. Here each of the k rows of the
    kernel becomes an output channel of its own, 3k of them. Each is shifted by its row, and their sum is the result.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or torch.compiler.is_exporting():
            return super().forward(x)
        thin, wide, k, _ = self.weight.shape
        height = x.shape[2]
        with torch.autocast("cpu", enabled=False):  # partial sums must not be rounded to bfloat16
            rows = self.weight.transpose(1, 2).reshape(thin * k, wide, 1, k)
            x = F.conv2d(x.to(rows.dtype), rows)  # (N, thin * k, H, W - k + 1)
        # k more rows, read as maps that are one row higher: this shifts map i by i rows without copying each map
        x = F.pad(x.reshape(len(x), thin, k * height, -1), (0, 0, 0, k)).unflatten(2, (k, height + 1))
        return x[:, :, :, : height - k + 1].sum(2) + self.bias[:, None, None]  # ty: ignore[not-subscriptable]


def mirror(x: Tensor, pad: Sequence[int]) -> Tensor:
    """Return F.pad(x, pad, mode="reflect"), computed by slices of one row each; pad: left, right, above, below in px."""
    for dim, before, after in ((3, pad[0], pad[1]), (2, pad[2], pad[3])):
        first = [x.narrow(dim, i, 1) for i in range(before, 0, -1)]
        last = [x.narrow(dim, x.shape[dim] - 1 - i, 1) for i in range(1, after + 1)]
        x = torch.cat([*first, x, *last], dim)
    return x


def reflection_pad(x: Tensor, pad: Sequence[int]) -> Tensor:
    """Pad (N, C, H, W) by reflection.

    By slices with --deterministic on a GPU, where torch's own gradient is an error, and in an export of a fixed size, since
    few programs that run networks can pad by reflection.
    """
    is_fixed = torch.compiler.is_exporting() and isinstance(x.shape[2], int) and isinstance(x.shape[3], int)
    if is_fixed or (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return mirror(x, pad)
    return F.pad(x, pad, mode="reflect")


class ReflectionPad2d(nn.ReflectionPad2d):
    """Reflection padding, (N, C, H, W) → (N, C, H + 2 padding, W + 2 padding), as reflection_pad."""

    def forward(self, x: Tensor) -> Tensor:
        return reflection_pad(x, self.padding)
