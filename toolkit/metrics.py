"""Scores of images and of networks, and what a network costs. Measuring never changes a network."""

import functools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from cyclegan import LossConfig, discriminator_loss, eval_mode, generator_loss, translate
from models import DIRECTIONS, Generator, Networks
from toolkit.devices import autocast
from toolkit.distributed import rank
from toolkit.images import ImageReader, range_to_bytes
from utils import InputError, counted, warn

MEASURES = ("losses", "cycle", "identity", "paired", "spike")  # fast enough to be computed during training
BEST_BY = {"PSNR": "paired", "SSIM": "paired", "cycle": "cycle", "identity": "identity", "loss_G": "losses"}
PEAK = 255.0
SSIM_WINDOW = 11  # px
BAR_DELAY = 3.0  # seconds before a progress bar appears
MARKS = {"PSNR": " dB ↑", "L1": " levels ↓", "RMSE": " levels ↓"}  # of headings: unit, arrow to the better side
MARKS |= dict.fromkeys(("SSIM", "match@1", "within_5", "within_10"), " ↑")
MARKS |= dict.fromkeys(("L1 to teacher", "cycle", "identity", "spike", "FID", "KID"), " ↓")
MARKS |= dict.fromkeys(("parameters", "MMACs", "ms", "MB"), " ↓")

Run = Callable[[Generator, Tensor], Tensor]  # translates (1, C, H, W) with a generator, into float32
Images = Mapping[Path, Tensor]  # by name, (1, C, H, W) in [-1, 1]; accessed one by one, so that they may be read lazily


def mean(values: Collection[float]) -> float:
    """Return the mean of numbers, summed in their order."""
    return sum(values) / len(values)


def mean_row(rows: Sequence[dict]) -> dict[str, float]:
    """Return the mean of each value over rows with the same names."""
    return {name: mean([float(row[name]) for row in rows]) for name in rows[0]}


def mean_distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the mean absolute error of pairs of images; in [0, 2] for images in [-1, 1]."""
    return mean([(x.float().cpu() - y.float().cpu()).abs().mean().item() for x, y in pairs])


def psnr(output: Tensor, target: Tensor) -> float:
    """Return the peak signal-to-noise ratio of an image in [0, 255], in dB, at most 100: infinity would spoil every mean."""
    mse = ((output.double() - target.double()) ** 2).mean().item()
    return min(100.0, 10 * math.log10(PEAK**2 / mse)) if mse else 100.0


def ssim(output: Tensor, target: Tensor) -> float:
    """Return the structural similarity of images (C, H, W) in [0, 255], mean over the channels; nan below 11 px a side.

    source: Wang et al. 2004: Gaussian window of 11x11 px with sigma 1.5, no padding
    """
    if min(target.shape[-2:]) < SSIM_WINDOW:
        return math.nan
    c1 = (0.01 * PEAK) ** 2
    c2 = (0.03 * PEAK) ** 2
    window = torch.exp(-((torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2).double() ** 2) / (2 * 1.5**2))
    means = []
    for x, y in zip(output.double(), target.double(), strict=True):  # channel by channel, to stay within the cache
        maps = torch.stack([x, y, x * x, y * y, x * y])  # (5, H, W)
        for dim in (-2, -1):  # blur by a sum of shifted maps: torch's convolution takes 12 times as long in float64
            shifted = [maps.narrow(dim, i, maps.shape[dim] - SSIM_WINDOW + 1) for i in range(SSIM_WINDOW)]
            maps = torch.zeros_like(shifted[0])
            for part, weight in zip(shifted, (window / window.sum()).tolist(), strict=True):
                maps.add_(part, alpha=weight)
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = maps  # (H - 10, W - 10) each
        var_x = mean_xx - mean_x**2
        var_y = mean_yy - mean_y**2
        cov = mean_xy - mean_x * mean_y
        index = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
        means.append(index.mean().item())
    return mean(means)


def match_at_1(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Return the fraction of outputs, uint8 of one size, whose nearest target (L2, of equal ones the first) is their own."""
    # sums of integers in float64 are exact, so equal distances are equal
    x = torch.stack(list(outputs)).flatten(1).double()  # (N, C * H * W)
    y = torch.stack(list(targets)).flatten(1).double()
    distances = y.square().sum(1) - 2 * x @ y.T  # (N, N), |x - y|² without |x|², which is the same for all targets
    return (distances.argmin(1) == torch.arange(len(x))).sum().item() / len(x)


def _resize(image: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    x = image[None].float()
    x = nn.functional.interpolate(x, tuple(size), mode="bicubic", antialias=True, align_corners=False)
    x = x[0].clamp(0, PEAK)
    return x if image.is_floating_point() else x.round().to(torch.uint8)


def paired_table(images: Iterable[tuple[dict[str, Tensor], Tensor]]) -> dict[str, dict[str, float]]:
    """Score one or more outputs for each image against its target; returns mean scores by name of output.

    images:  outputs by name, such as "model" and "copy", and the target, (C, H, W), uint8 or float in [0, 255]; all are
             resized to the first output
    returns: L1, RMSE (8-bit levels), PSNR (dB), SSIM, the fractions within_5 and within_10 of pixels; match@1
    """
    rows = defaultdict(list)
    small_outputs = defaultdict(list)
    small_targets: list[Tensor] = []  # at most 64 px a side, so that a folder of photos fits into memory
    for outputs, target in images:
        if not small_targets:
            factor = min(1, 64 / max(target.shape[-2:]))
            small_size = [max(1, round(side * factor)) for side in target.shape[-2:]]
        small_targets.append(_resize(target, small_size))
        size = next(iter(outputs.values())).shape[-2:]
        y = _resize(target, size)
        for name, output in outputs.items():
            x = _resize(output, size)
            small_outputs[name].append(_resize(x, small_size))
            difference = (x.double() - y.double()).abs()
            row = {"L1": difference.mean().item(), "RMSE": (difference**2).mean().sqrt().item()}
            row |= {"PSNR": psnr(x, y), "SSIM": ssim(x, y)}
            for most in (5, 10):  # levels, in every channel
                row[f"within_{most}"] = (difference.amax(0) <= most).double().mean().item()
            rows[name].append(row)
    return {name: mean_row(rows[name]) | {"match@1": match_at_1(small_outputs[name], small_targets)} for name in rows}


def _with_bar(items: Collection, title: str) -> Iterable:
    return tqdm(items, desc=title, unit="image", leave=False, delay=BAR_DELAY, disable=rank() > 0)


def mean_losses(
    nets: Networks, reals: Mapping[str, Images], config: LossConfig, precision: str, repeat: bool = True
) -> dict[str, float]:
    """Return the means of all losses and their terms of a training step, without image buffers, over images in pairs.

    nets:    G_AB G_BA D_A D_B
    reals:   by domain, "A" and "B"; the first of A belongs to the first of B and so on
    repeat:  whether the images of the smaller domain are repeated, or some of the larger one are left out
    """
    AtoB, BtoA = DIRECTIONS
    device = next(nets["G_AB"].parameters()).device
    names_A = list(reals["A"])
    names_B = list(reals["B"])
    count = max if repeat else min
    rows = []
    for i in _with_bar(range(count(len(names_A), len(names_B))), "losses"):
        real_A = reals["A"][names_A[i % len(names_A)]].to(device)
        real_B = reals["B"][names_B[i % len(names_B)]].to(device)
        with eval_mode(*nets.values()), autocast(device, precision):
            loss_AtoB, terms_AtoB, translated_A = generator_loss(nets, AtoB, real_A, config)
            loss_BtoA, terms_BtoA, translated_B = generator_loss(nets, BtoA, real_B, config)
            loss_D_A = discriminator_loss(nets["D_A"], real_A, translated_B.fake, config)
            loss_D_B = discriminator_loss(nets["D_B"], real_B, translated_A.fake, config)
        losses = {"loss_G": loss_AtoB + loss_BtoA, "loss_D_A": loss_D_A, "loss_D_B": loss_D_B}
        rows.append(losses | terms_AtoB | terms_BtoA)
    return mean_row(rows)


def measure_direction(
    run: Run, nets: tuple[Generator, Generator | None], sources: Images, targets: Images, wanted: Collection[str]
) -> dict[str, float]:
    """Measure one direction on held-out images; those of the same name are pairs.

    nets:   the generators of the direction and, if there is one, of the way back
    wanted: "cycle", if there is a way back, and "identity": mean absolute errors in [0, 2]; "paired": PSNR, SSIM, match@1
    """
    net, back = nets
    pairs = sorted(sources.keys() & targets.keys()) if "paired" in wanted else []
    with_cycle = back is not None and "cycle" in wanted
    cycles = []
    outputs = {}
    row = {}
    for name in _with_bar(list(sources) if with_cycle else pairs, "translating"):
        x = sources[name]
        fake = run(net, x)
        if with_cycle:
            cycles.append(mean_distance([(run(back, fake), x)]))
        if pairs and name in targets:
            outputs[name] = range_to_bytes(fake[0]).cpu()
    if cycles:
        row["cycle"] = mean(cycles)
    if "identity" in wanted:
        row["identity"] = mean_distance((run(net, y), y) for y in _with_bar(targets.values(), "identity"))
    if pairs:
        scored = (({"model": outputs[name]}, range_to_bytes(targets[name][0]).cpu()) for name in pairs)
        scores = paired_table(scored)["model"]
        row |= {name: scores[name] for name in ("PSNR", "SSIM", "match@1")}
    return row


def measure_nets(
    nets: Networks, reals: Mapping[str, Images], wanted: Collection[str], loss_config: LossConfig, precision: str
) -> dict[str, float]:
    """Measure both directions on held-out images, nets and reals as for mean_losses, wanted: some of MEASURES.

    returns: by name and domain of the judged images, such as cycle_A, PSNR_B, match@1_B, spike_B, loss_G. "cycle" and
             "identity" replace the loss terms of these names, which are means over fewer images
    """
    row = {}
    run = functools.partial(translate, precision=precision)
    for direction in DIRECTIONS:
        source, target = direction
        G = nets[direction.generator]
        scores = measure_direction(run, (G, nets[direction.reverse.generator]), reals[source], reals[target], wanted)
        row |= {f"{name}_{source if name == 'cycle' else target}": value for name, value in scores.items()}
        if "spike" in wanted:
            row[f"spike_{target}"] = mean_spike(G, reals[source], precision)
    if "losses" in wanted:
        row |= mean_losses(nets, reals, loss_config, precision, repeat=False) | row
    return row


def score_by(best_by: str | None, row: dict[str, float]) -> float | None:
    """Return the mean of one measure over both directions; None if the row lacks it, or if it is not finite."""
    values = [value for name, value in row.items() if best_by in (name, name.rpartition("_")[0])]
    score = mean(values) if values else math.nan
    return score if math.isfinite(score) else None


def is_better(best_by: str, score: float, before: float) -> bool:
    """Compare two scores: higher is better for PSNR and SSIM, lower for errors and losses."""
    return score > before if best_by in ("PSNR", "SSIM") else score < before


def mean_spike(G: Generator, images: Images, precision: str) -> float:
    """Return the mean over images of the largest spike in the maps of a generator, all convolutions but the last; in [0, 1].

    The spike of a map is the distance of its farthest pixel from the mean, in standard deviations, divided by the largest
    possible value, sqrt(pixels - 1). At 1 one pixel has all the variance: it circumvents the instance normalisation that
    follows, and leaves a blob in the image (Karras et al. 2020, arXiv:1912.04958, section 2). A flat map has none.
    """
    of_layers: list[Tensor] = []

    def measure_layer(layer: nn.Module, inputs: tuple, x: Tensor) -> None:
        rounding = torch.finfo(x.dtype).eps
        x = x.float().flatten(2)  # (1, C, H * W)
        # by the range: a mean is rounded, and a standard deviation hides one pixel among many
        flat = x.amax(2) - x.amin(2) <= rounding * x.abs().amax(2)
        farthest = (x - x.mean(2, keepdim=True)).abs().amax(2)
        largest = x.std(2, correction=0) * math.sqrt(x.shape[2] - 1)
        spike = (farthest / largest.clamp_min(1e-12)).clamp(max=1)
        of_layers.append(spike.masked_fill(flat, 0).amax())

    spikes = []
    with ExitStack() as hooks:
        for name, layer in G.named_modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and not name.startswith("head."):
                hooks.enter_context(layer.register_forward_hook(measure_layer))
        for image in _with_bar(images.values(), "spikes"):
            translate(G, image, precision)
            spikes.append(torch.stack(of_layers).amax().item())
            of_layers.clear()
    return mean(spikes)


def count_macs(net: Generator, height: int, width: int) -> int:
    """Count the multiply-accumulates of all convolutions, linear layers and attention for one image.

    A transposed convolution is counted once per input pixel; published figures often count output pixels (56.8 G, not 49.5).
    """
    from torch.utils.flop_counter import FlopCounterMode  # its import takes a second

    meta = {name: value.to("meta") for name, value in net.state_dict().items()}  # shapes only: nothing is computed
    image = torch.zeros(1, net.config.channels, height, width, device="meta", dtype=next(net.parameters()).dtype)
    with eval_mode(net), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(net, meta, (image,))
    return counter.get_total_flops() // 2  # a multiplication and an addition count as two


def median_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of single calls in ms, after three for warm-up; the call must wait for its device."""
    times = []
    for _ in range(3 + repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def generator_cost(net: Generator, image: Tensor, precision: str, repeats: int = 20) -> dict[str, float]:
    """Return parameters, and for an image (1, C, H, W) millions of multiply-accumulates (MMACs) and milliseconds."""
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "MMACs": count_macs(net, *image.shape[-2:]) / 1e6,
        "ms": median_ms(lambda: translate(net, image, precision).cpu(), repeats),
    }


@dataclass
class ImageFiles(Dataset):
    """Image files as torch-fidelity wants them: uint8 (3, H, W)."""

    paths: Sequence[Path]
    reader: ImageReader  # of 3 channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return range_to_bytes(self.reader(self.paths[i]))


def fid_kid(
    fakes: ImageFiles, reals: ImageFiles, wanted: Sequence[str], weights: Path | None, device: torch.device
) -> dict[str, float]:
    """Return FID and KID of two sets of images, by torch-fidelity, with the numbers of images; 0 for equal sets.

    weights: of Inception (None: they are downloaded), checked by files.read_archive: torch-fidelity executes hostile ones
    source:  Heusel et al. 2017, arXiv:1706.08500; Bińkowski et al. 2018, arXiv:1801.01401
    """
    from torch_fidelity import calculate_metrics  # an optional package

    flag = f"--metrics {','.join(wanted)}"
    count = min(len(fakes), len(reals))
    if count < 2:
        raise InputError(f"{flag}: {counted(count, 'image')} on one side, expected at least 2, better 1,000")
    if count < 1000:
        found = f"{len(fakes)} against {len(reals)} images"
        warn(f"FID of {found} is biased, KID is noisy; compare FID of equal numbers only")
    try:
        values = calculate_metrics(
            input1=fakes,
            input2=reals,
            fid="fid" in wanted,
            kid="kid" in wanted,
            cuda=device.type == "cuda",
            kid_subset_size=min(1000, count),
            feature_extractor_weights_path=str(weights) if weights else None,
            save_cpu_ram=True,  # no worker processes
            verbose=False,
        )
    except (OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and weights is None):
            raise  # not about the weights
        source = f"the weights of Inception from {weights or 'the internet'} ({error!s:.100})"
        raise InputError(f"{flag}: cannot load {source}; give another file with --inception_weights") from error
    names = {"frechet_inception_distance": "FID", "kernel_inception_distance_mean": "KID"}
    row = {short: values[name] for name, short in names.items() if name in values}
    return row | {"translated": len(fakes), "real": len(reals)}


def format_table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Lay out named rows of figures below their headings, with units and arrows to the better side, as lines of text."""
    names = [name for row in rows.values() for name in row]
    headings = {name: name + MARKS.get(name.removesuffix("_A").removesuffix("_B"), "") for name in names}
    widths = {name: max(12, len(heading) + 2) for name, heading in headings.items()}
    margin = max(map(len, rows))
    lines = [" " * margin + "".join(f"{heading:>{widths[name]}}" for name, heading in headings.items())]
    for label, row in rows.items():
        cells = {name: f"{row[name]:.4g}" if name in row else "" for name in headings}
        lines.append(label.ljust(margin) + "".join(f"{cells[name]:>{widths[name]}}" for name in headings))
    return lines
