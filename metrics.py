"""Scores of translated pictures against the truth, where a data set has one, and beside two baselines.

scores = paired_scores(answers, truths)  # two lists of uint8 pictures, (C, H, W)
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from utils import InputError, need_package, read_archive, say

PEAK = 255.0
PSNR_LIMIT = 100.0  # dB; identical pictures would score infinity and spoil every mean
DELTAS = (5, 10)  # 8-bit levels
FEW = 1000  # pictures; below, FID says more about their number than about the model


def psnr(answer: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio of one picture in dB, at most PSNR_LIMIT; higher is better."""
    mse = ((answer.double() - truth.double()) ** 2).mean().item()
    return min(PSNR_LIMIT, 10 * math.log10(PEAK**2 / mse)) if mse else PSNR_LIMIT


def ssim(answer: Tensor, truth: Tensor) -> float:
    """Structural similarity of one picture, mean over its channels; 1 for equal pictures.

    answer, truth: uint8 (C, H, W); below 11 px a side the answer is nan
    source:        Wang et al. 2004: Gaussian window of 11x11 px with sigma 1.5, borders left out
    """
    if min(truth.shape[-2:]) < 11:
        return math.nan
    x, y = answer.double()[:, None], truth.double()[:, None]  # (C, 1, H, W)
    line = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def blur(values: Tensor) -> Tensor:
        return F.conv2d(values, window)  # (C, 1, H - 10, W - 10)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    index = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return index.mean().item()


def match_at_1(answers: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """Share of answers whose nearest truth (L2) among all is their own; a model that ignores its input scores 1/N.

    answers, truths: uint8 (C, H, W), the i-th belong together; differing sizes are compared at that of the first truth
    """
    size = truths[0].shape[-2:]
    x, y = (
        torch.stack([resized(p, size).flatten() for p in pictures]).float() / PEAK - 0.5
        for pictures in (answers, truths)
    )
    nearest = [((row - y) ** 2).sum(1).argmin().item() for row in x]
    return sum(i == j for i, j in enumerate(nearest)) / len(nearest)


def resized(picture: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a uint8 picture (C, H, W) to (height, width), antialiased."""
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    wide = F.interpolate(picture[None].float(), tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return wide[0].clamp(0, PEAK).round().to(torch.uint8)


def mean_distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean over pairs of pictures of their mean absolute difference; in the units of training, [0, 2].

    Of a round trip and its input it is the cycle error, of a picture of the target domain and what
    the generator makes of it the identity error.
    """
    return sum((x.float().cpu() - y.float().cpu()).abs().mean().item() for x, y in pairs) / len(pairs)


def mean_row(rows: Sequence[dict]) -> dict[str, float]:
    """Mean of each named figure over rows that all have it."""
    return {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}


def paired_scores(answers: Sequence[Tensor], truths: Sequence[Tensor]) -> dict[str, float]:
    """Score pictures against the truth of the same index: the mean over pictures of each picture's score.

    answers, truths: uint8 (C, H, W); a truth of another size is resized to its answer's
    returns:         L1 and RMSE in 8-bit levels, PSNR in dB, SSIM, the share of pixels whose every
                     channel is within 5 and 10 levels of the truth, match@1
    """
    rows = []
    for answer, truth in zip(answers, truths, strict=True):
        truth = resized(truth, answer.shape[-2:])
        difference = (answer.double() - truth.double()).abs()
        row = {"L1": difference.mean().item(), "RMSE": (difference**2).mean().sqrt().item()}
        row |= {"PSNR": psnr(answer, truth), "SSIM": ssim(answer, truth)}
        worst = difference.amax(0)  # (H, W), over the channels
        rows.append(row | {f"within_{d}": (worst <= d).double().mean().item() for d in DELTAS})
    return mean_row(rows) | {"match@1": match_at_1(answers, truths)}


def paired_table(
    answers: Sequence[Tensor], inputs: Sequence[Tensor], truths: Sequence[Tensor], mean: Tensor
) -> dict[str, dict]:
    """Score a model beside two baselines that need no model: the input itself, and the mean picture of the target domain.

    mean: float (C, H, W) in [0, 255], of the training pictures, so that no truth is looked at
    """
    flat = mean.round().to(torch.uint8)
    return {
        "model": paired_scores(answers, truths),
        "copy": paired_scores([resized(x, a.shape[-2:]) for x, a in zip(inputs, answers, strict=True)], truths),
        "mean picture": paired_scores([resized(flat, a.shape[-2:]) for a in answers], truths),
    }


class Pictures(Dataset):
    """Files as torch-fidelity wants them: uint8 (3, H, W), all of one size."""

    def __init__(self, paths: Sequence[Path], load: Callable[[Path], Tensor]):
        self.paths, self.load = paths, load

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return self.load(self.paths[i])


def fid_kid(
    fakes: Sequence[Path],
    reals: Sequence[Path],
    load: Callable[[Path], Tensor],
    wanted: Sequence[str],
    weights: Path | None,
    device: torch.device,
) -> dict[str, float]:
    """Distances between the Inception features of two sets of pictures, by torch-fidelity; 0 for equal sets.

    load:    path → uint8 (3, H, W), of one size
    wanted:  "fid", "kid" or both; weights: Inception's, else they are downloaded
    returns: FID and KID with the numbers of pictures; both are biased by few pictures, FID heavily
    raises:  InputError without torch-fidelity or weights, or with fewer than two pictures
    source:  Heusel et al. 2017, arXiv:1706.08500; Bińkowski et al. 2018, arXiv:1801.01401
    """
    need_package("torch_fidelity", f"--metrics {','.join(wanted)}", "pip install -r requirements-metrics.txt")
    from torch_fidelity import calculate_metrics

    least = min(len(fakes), len(reals))
    if least < 2:
        raise InputError(
            f"--metrics {','.join(wanted)}: {least} picture on one side, expected at least 2, better 1,000"
        )
    if least < FEW:
        say(
            f"warning: FID and KID of {len(fakes)} against {len(reals)} pictures are biased; compare equal numbers only"
        )
    if weights:
        read_archive(weights)  # torch-fidelity would execute what a hostile file holds
    try:
        values = calculate_metrics(
            input1=Pictures(fakes, load),
            input2=Pictures(reals, load),
            **dict.fromkeys(wanted, True),
            cuda=device.type == "cuda",
            kid_subset_size=min(FEW, least),
            feature_extractor_weights_path=str(weights) if weights else None,
            save_cpu_ram=True,  # no worker processes
            verbose=False,
        )
    except OSError as error:
        raise InputError(
            f"Inception's weights cannot be fetched ({error}); give a file: --inception_weights FILE"
        ) from error
    except RuntimeError as error:
        if not weights:
            raise
        raise InputError(f"--inception_weights {weights}: not the weights that torch-fidelity takes") from error
    names = {"frechet_inception_distance": "FID", "kernel_inception_distance_mean": "KID"}
    row = {short: values[name] for name, short in names.items() if name in values}
    return row | {"translated": len(fakes), "real": len(reals)}


def median_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call in ms, after three that pay for set-up; the call itself must wait for its device."""
    times = []
    for _ in range(3 + repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def format_table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Lay out named rows of figures under their headings, as lines of text."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    widths, margin = {name: max(12, len(name) + 2) for name in columns}, max(map(len, rows))
    lines = [" " * margin + "".join(f"{name:>{widths[name]}}" for name in columns)]
    for label, row in rows.items():
        cells = (f"{row[name]:.4g}" if name in row else "" for name in columns)
        lines.append(
            label.ljust(margin) + "".join(f"{cell:>{widths[name]}}" for cell, name in zip(cells, columns, strict=True))
        )
    return lines
