"""Some of torch's layers, computed otherwise where torch is slow or refuses: same tensors, same results but for rounding.

Two are faster on a CPU; while a network is exported, or runs elsewhere, they are torch's own. One repeats on a GPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InstanceNorm2d(nn.InstanceNorm2d):
    """Instance normalisation, (N, C, H, W) → (N, C, H, W); on a CPU as a faster group norm."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.is_contiguous() and x.shape[2] * x.shape[3] > 1 and not torch.compiler.is_exporting():
            return F.group_norm(x, x.shape[1], self.weight, self.bias, self.eps)
        return super().forward(x)


class ThinConv2d(nn.Conv2d):
    """A convolution to the few channels of an image, twice to three times as fast on a CPU; stride 1, no padding.

    x: (N, in_channels, H, W) → (N, out_channels, H - k + 1, W - k + 1)

    A CPU computes 16 output channels at a time, so that 3 waste most of it. Here the k rows of the kernel become
    channels of their own, 3k of them, whose results are added after a shift of a row each: the same sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or torch.compiler.is_exporting():
            return super().forward(x)
        thin, wide, k, _ = self.weight.shape
        height = x.shape[2]
        with torch.autocast("cpu", enabled=False):  # parts of a sum are not to be rounded to bfloat16
            rows = self.weight.transpose(1, 2).reshape(thin * k, wide, 1, k)
            x = F.conv2d(x.to(rows.dtype), rows)  # (N, thin * k, H, W - k + 1)
        # k rows more, and a view that is one row longer than the map, move map i up by i rows without a copy of each
        x = F.pad(x.reshape(len(x), thin, k * height, -1), (0, 0, 0, k)).unflatten(2, (k, height + 1))
        return x[:, :, :, : height - k + 1].sum(2) + self.bias[:, None, None]  # ty: ignore[not-subscriptable]


def mirror(x: Tensor, pad: Sequence[int]) -> Tensor:
    """What F.pad(x, pad, mode="reflect") gives, by slices; pad: left, right, above, below, each below the side in px."""
    for dim, before, after in ((3, pad[0], pad[1]), (2, pad[2], pad[3])):
        first = x.narrow(dim, 1, before).flip(dim)
        last = x.narrow(dim, x.shape[dim] - 1 - after, after).flip(dim)
        x = torch.cat([first, x, last], dim)
    return x


def reflection_pad(x: Tensor, pad: Sequence[int]) -> Tensor:
    """Pad (N, C, H, W) by reflection; for --deterministic by slices on a GPU, where torch's gradient is refused.

    torch adds the gradients of a pixel and its mirror images in any order there, so sums would not repeat.
    """
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return mirror(x, pad)
    return F.pad(x, pad, mode="reflect")


class ReflectionPad2d(nn.ReflectionPad2d):
    """Padding by reflection, (N, C, H, W) → (N, C, H + 2 padding, W + 2 padding), whose gradient can repeat on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return reflection_pad(x, self.padding)
