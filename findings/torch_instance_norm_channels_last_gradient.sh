#!/usr/bin/env bash
# Package:  torch 2.14.1 (CPU)
# Guess:    the memory format of a tensor changes the speed of F.instance_norm, not its gradient.
# Happens:  on a CPU, for a batch of one image, an input in channels_last and an incoming gradient in channels_last give a
#           gradient that has nothing to do with the right one: its cosine with that in float64 is about 0. The output is
#           right, there is no warning, and with a batch of two, or with a contiguous gradient, all is well. F.batch_norm
#           called for the one image, and F.group_norm with a group for each channel, are the same function and right.
# Output:   batch 1, gradient channels_last: instance_norm -0.006, group_norm 1.000, batch_norm 1.000
#           batch 1, gradient contiguous:    instance_norm 1.000, group_norm 1.000, batch_norm 1.000
#           batch 2, gradient channels_last: instance_norm 1.000, group_norm 1.000
# Hurts:    whoever trains CycleGANs or style transfer (batch 1, instance norm) on a CPU and follows the advice to convert
#           networks to channels_last: a gradient in that format comes out of every residual sum, so all layers in front of
#           a norm are trained with noise, while translations made with given weights are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F


def cosine(norm, batch, gradient_format):
    """Of the gradient in float32, channels_last, with that in float64."""
    torch.manual_seed(0)
    x = torch.randn(batch, 64, 7, 9, dtype=torch.float64)
    weights = torch.randn_like(x)
    exact = x.clone().requires_grad_()
    (F.instance_norm(exact) * weights).sum().backward()
    found = x.float().contiguous(memory_format=torch.channels_last).requires_grad_()
    norm(found).backward(weights.float().contiguous(memory_format=gradient_format))
    return F.cosine_similarity(found.grad.double().flatten(), exact.grad.flatten(), dim=0).item()


def of_one_image(x):
    return F.batch_norm(x, None, None, training=True)


def by_channel(x):
    return F.group_norm(x, x.shape[1])


last, first = torch.channels_last, torch.contiguous_format
wrong = cosine(F.instance_norm, 1, last)
right = [
    cosine(by_channel, 1, last), cosine(of_one_image, 1, last), cosine(F.instance_norm, 1, first),
    cosine(by_channel, 1, first), cosine(of_one_image, 1, first), cosine(F.instance_norm, 2, last), cosine(by_channel, 2, last),
]
print(f"batch 1, gradient channels_last: instance_norm {wrong:.3f}, group_norm {right[0]:.3f}, batch_norm {right[1]:.3f}")
print(f"batch 1, gradient contiguous:    instance_norm {right[2]:.3f}, group_norm {right[3]:.3f}, batch_norm {right[4]:.3f}")
print(f"batch 2, gradient channels_last: instance_norm {right[5]:.3f}, group_norm {right[6]:.3f}")
assert abs(wrong) < 0.5, "instance_norm has become right"
assert min(right) > 0.999
PYTHON
