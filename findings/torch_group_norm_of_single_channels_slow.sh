#!/usr/bin/env bash
# Package:  torch 2.14.1 (CPU)
# Guess:    the time of F.group_norm hardly depends on the number of groups, and channels_last suits it or does not.
# Happens:  in channels_last it is as fast as in the usual format, forward and backward, as long as groups have several
#           channels. With one channel a group (which is an instance norm) the backward pass takes 4 to 15 times as long
#           in float32 and 20 to 60 times as long in bfloat16; the forward pass of large maps does not show it. In the
#           usual format one channel a group costs nothing extra. F.batch_norm, called for each image, is the same
#           function as an instance norm, and as fast in channels_last as the group norm of several channels.
# Output:   milliseconds of the backward pass in channels_last, one thread (2, 64, 64, 64):
#           float32:  4 groups 2.1, 64 groups 8.3; usual format, 64 groups 1.8
#           bfloat16: 4 groups 1.4, 64 groups 28.5; usual format, 64 groups 0.6
# Hurts:    whoever replaces instance norms by group norms of single channels on a CPU (which is faster in the usual format,
#           and right where instance_norm's gradient in channels_last is wrong) and then converts to channels_last.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.0
"$folder/venv/bin/python" - <<'PYTHON'
import statistics
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
SHAPE = (2, 64, 64, 64)


def backward(dtype, memory_format, groups):
    """Milliseconds of one backward pass."""
    x = torch.randn(SHAPE, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    gradient = torch.randn(SHAPE, dtype=dtype).contiguous(memory_format=memory_format)
    y = F.group_norm(x, groups)
    start = time.perf_counter()
    y.backward(gradient)
    return 1000 * (time.perf_counter() - start)


cases = {"few": (torch.channels_last, 4), "single": (torch.channels_last, 64), "usual": (torch.contiguous_format, 64)}
print("milliseconds of the backward pass in channels_last, one thread (2, 64, 64, 64):")
for dtype, least in ((torch.float32, 3), (torch.bfloat16, 8)):
    times = {name: [] for name in cases}
    for turn in range(23):  # in turns, so that other programs slow all alike
        for name, case in cases.items():
            times[name].append(backward(dtype, *case))
    few, single, usual = (statistics.median(values[3:]) for values in times.values())
    name = str(dtype).removeprefix("torch.") + ":"
    print(f"{name:9} 4 groups {few:.1f}, 64 groups {single:.1f}; usual format, 64 groups {usual:.1f}")
    assert single > least * max(few, usual), "groups of one channel have become faster in channels_last"
PYTHON
