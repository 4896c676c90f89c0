"""Layers of torch in another form, where torch is slow or not deterministic: same weights, same results but for rounding."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
