"""Scores of images, losses and scores of networks on held-out images, and what a network costs.

scores = paired_scores(outputs, targets)  # lists of uint8 images, (C, H, W)
scores = measure_nets(nets, {"A": images_A, "B": images_B}, ["cycle", "paired"], LossConfig(), "fp32")
cost = generator_cost(G_AB, image, "fp32")

Measuring never changes a network: not its weights, running statistics or modes.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import Dataset
from tqdm import tqdm

from cyclegan import LossConfig, discriminator_loss, eval_mode, generator_loss, translate
from models import DIRECTIONS, Generator, Networks
from toolkit.devices import autocast
from toolkit.distributed import rank
from toolkit.images import range_to_bytes
from utils import InputError, counted, need_package, warn

MEASURES = ("losses", "cycle", "identity", "paired", "spike")  # fast enough to be computed during training
BEST_BY = {"PSNR": "paired", "SSIM": "paired", "cycle": "cycle", "identity": "identity", "loss_G": "losses"}
PEAK = 255.0
PSNR_LIMIT = 100.0  # dB; identical images would score infinity and spoil every mean
SSIM_WINDOW = 11  # px
MATCH_SIDE = 64  # px; match_at_1 compares images of at most this side, so that a folder of photos fits into memory
BAR_DELAY = 3.0  # seconds before a progress bar appears
UNITS = {"PSNR": "dB", "L1": "levels", "RMSE": "levels"}
HIGHER_IS_BETTER = ("PSNR", "SSIM", "match@1", "within_5", "within_10")
ERRORS = ("L1", "RMSE", "L1 to teacher", "cycle", "identity", "spike", "FID", "KID")
COSTS = ("parameters", "MMACs", "ms", "MB")

Images = Mapping[Path, Tensor]  # by name, (1, C, H, W) in [-1, 1]; accessed one by one, so that they may be read lazily


# ---------------------------------------------------------------------------------------------
# Scores of images


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
    """Return the peak signal-to-noise ratio of a uint8 image in dB, at most PSNR_LIMIT."""
    mse = ((output.double() - target.double()) ** 2).mean().item()
    return min(PSNR_LIMIT, 10 * math.log10(PEAK**2 / mse)) if mse else PSNR_LIMIT


def gaussian_blur(maps: Tensor, dim: int) -> Tensor:
    """Blur along a dimension with the window of SSIM, sigma 1.5 px, without padding.

    As a sum of shifted maps: torch's convolution takes 12 times as long in float64.
    """
    weights = torch.exp(-((torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2).double() ** 2) / (2 * 1.5**2))
    length = maps.shape[dim] - SSIM_WINDOW + 1
    blurred = torch.zeros_like(maps.narrow(dim, 0, length))
    for i, weight in enumerate((weights / weights.sum()).tolist()):
        blurred.add_(maps.narrow(dim, i, length), alpha=weight)
    return blurred


def ssim(output: Tensor, target: Tensor) -> float:
    """Return the structural similarity of an image, mean over its channels; 1 for equal images.

    output, target: uint8 (C, H, W); below 11 px a side the result is nan
    source:         Wang et al. 2004: Gaussian window of 11x11 px with sigma 1.5, no padding
    """
    if min(target.shape[-2:]) < SSIM_WINDOW:
        return math.nan
    c1 = (0.01 * PEAK) ** 2
    c2 = (0.03 * PEAK) ** 2
    means = []
    for x, y in zip(output.double(), target.double(), strict=True):  # channel by channel, to stay within the cache
        maps = torch.stack([x, y, x * x, y * y, x * y])  # (5, H, W)
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = gaussian_blur(gaussian_blur(maps, -2), -1)  # (H - 10, W - 10) each
        var_x = mean_xx - mean_x**2
        var_y = mean_yy - mean_y**2
        cov = mean_xy - mean_x * mean_y
        index = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
        means.append(index.mean().item())
    return mean(means)


def match_at_1(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Return the fraction of outputs whose nearest target (L2) among all is their own.

    A model that ignores its input scores 1/N. Of targets at the same distance the first counts as the nearest.
    outputs, targets: uint8 (C, H, W), the i-th belong together; all are resized to match_size of the first target
    """
    size = match_size(targets[0])
    # sums of integers in float64 are exact, so equal distances are equal
    x = torch.stack([resize_bytes(image, size).flatten() for image in outputs]).double()  # (N, C * H * W)
    y = torch.stack([resize_bytes(image, size).flatten() for image in targets]).double()
    distances = y.square().sum(1) - 2 * x @ y.T  # (N, N), |x - y|² without |x|², which is the same for all targets
    own = torch.arange(len(x))
    return (distances.argmin(1) == own).sum().item() / len(x)


def match_size(target: Tensor) -> tuple[int, int]:
    """Return the height and width at which match_at_1 compares images."""
    height, width = target.shape[-2:]
    factor = min(1, MATCH_SIDE / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_bytes(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a uint8 image (C, H, W) to (height, width), antialiased."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    resized = F.interpolate(image[None].float(), tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0, PEAK).round().to(torch.uint8)


class PairedScores:
    """Scores of images against their targets, added pair by pair; only small copies of the images are kept."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def add(self, output: Tensor, target: Tensor) -> None:
        """Score one image, uint8 (C, H, W); a target of another size is resized to the output's."""
        size = self.targets[0].shape[-2:] if self.targets else match_size(target)
        self.outputs.append(resize_bytes(output, size))
        self.targets.append(resize_bytes(target, size))
        target = resize_bytes(target, output.shape[-2:])
        difference = (output.double() - target.double()).abs()
        worst = difference.amax(0)  # (H, W), over the channels
        self.rows.append(
            {
                "L1": difference.mean().item(),
                "RMSE": (difference**2).mean().sqrt().item(),
                "PSNR": psnr(output, target),
                "SSIM": ssim(output, target),
                "within_5": (worst <= 5).double().mean().item(),
                "within_10": (worst <= 10).double().mean().item(),
            }
        )

    def means(self) -> dict[str, float]:
        """Return the mean of each score over all pairs, and match@1."""
        return mean_row(self.rows) | {"match@1": match_at_1(self.outputs, self.targets)}


def paired_scores(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, float]:
    """Score images against the targets of the same index.

    outputs, targets: uint8 (C, H, W)
    returns:          means over the images: L1 and RMSE in 8-bit levels, PSNR in dB, SSIM, the fractions of pixels
                      whose every channel is within 5 and within 10 levels of the target; and match@1
    """
    scores = PairedScores()
    for output, target in zip(outputs, targets, strict=True):
        scores.add(output, target)
    return scores.means()


def paired_table(triples: Iterable[tuple[Tensor, Tensor, Tensor]], mean_image: Tensor) -> dict[str, dict]:
    """Score a model beside two baselines that need none: a copy of the input, and the mean image of the target domain.

    triples:    output, input and target of each image, uint8 (C, H, W); accessed one by one
    mean_image: float (C, H, W) in [0, 255], the mean of the training images
    """
    mean_bytes = mean_image.round().to(torch.uint8)
    table = {"model": PairedScores(), "copy": PairedScores(), "mean image": PairedScores()}
    for output, x, target in triples:
        size = output.shape[-2:]
        table["model"].add(output, target)
        table["copy"].add(resize_bytes(x, size), target)
        table["mean image"].add(resize_bytes(mean_bytes, size), target)
    return {name: scores.means() for name, scores in table.items()}


# ---------------------------------------------------------------------------------------------
# Losses on held-out images


def all_losses(nets: Networks, real_A: Tensor, real_B: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """Compute every loss of a training step on one pair of batches, without the image buffers.

    nets:    G_AB G_BA D_A D_B
    returns: loss_G, loss_D_A, loss_D_B and the terms of generator_loss
    """
    AtoB, BtoA = DIRECTIONS
    with eval_mode(*nets.values()):
        loss_AtoB, terms_AtoB, translated_A = generator_loss(nets, AtoB, real_A, config)
        loss_BtoA, terms_BtoA, translated_B = generator_loss(nets, BtoA, real_B, config)
        loss_D_A = discriminator_loss(nets["D_A"], real_A, translated_B.fake, config)
        loss_D_B = discriminator_loss(nets["D_B"], real_B, translated_A.fake, config)
    losses = {"loss_G": loss_AtoB + loss_BtoA, "loss_D_A": loss_D_A, "loss_D_B": loss_D_B}
    return losses | terms_AtoB | terms_BtoA


def mean_losses(
    nets: Networks, reals: Mapping[str, Images], config: LossConfig, precision: str, repeat: bool = True
) -> dict[str, float]:
    """Return the means of all_losses over images in pairs, the first of A with the first of B and so on.

    nets:   G_AB G_BA D_A D_B
    reals:  by domain, "A" and "B"
    repeat: whether the images of the smaller domain are repeated, or some of the larger one are left out
    """
    device = next(nets["G_AB"].parameters()).device
    names_A = list(reals["A"])
    names_B = list(reals["B"])
    count = max(len(names_A), len(names_B)) if repeat else min(len(names_A), len(names_B))
    rows = []
    for i in with_bar(range(count), "losses"):
        real_A = reals["A"][names_A[i % len(names_A)]].to(device)
        real_B = reals["B"][names_B[i % len(names_B)]].to(device)
        with autocast(device, precision):
            rows.append(all_losses(nets, real_A, real_B, config))
    return mean_row(rows)


# ---------------------------------------------------------------------------------------------
# Scores on held-out images


def with_bar(items: Collection, title: str) -> Iterable:
    """Show a progress bar over a loop that takes long; of several ranks only on the first."""
    return tqdm(items, desc=title, unit="image", leave=False, delay=BAR_DELAY, disable=rank() > 0)


def measure_direction(
    there: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor] | None,
    sources: Images,
    targets: Images,
    wanted: Collection[str],
) -> dict[str, float]:
    """Measure one direction on held-out images.

    there, back:      translate (1, C, H, W) and return float32; without `back` there is no "cycle"
    sources, targets: images of both domains; those of the same name are pairs
    wanted:           some of "cycle" (back(there(x)) against x), "identity" (there(y) against y), and "paired"
                      (paired_scores of there(x) in 8 bits, if there are pairs)
    returns:          the scores by name; cycle and identity in [0, 2]
    """
    with_cycle = "cycle" in wanted and back is not None
    pairs = sorted(sources.keys() & targets.keys()) if "paired" in wanted else []
    cycles = []
    outputs = {}
    row = {}
    for name in with_bar(list(sources) if with_cycle else pairs, "translating"):
        x = sources[name]
        fake = there(x)
        if with_cycle:
            cycles.append(mean_distance([(back(fake), x)]))
        if pairs and name in targets:
            outputs[name] = range_to_bytes(fake[0]).cpu()
    if cycles:
        row["cycle"] = mean(cycles)
    if "identity" in wanted:
        row["identity"] = mean_distance((there(y), y) for y in with_bar(targets.values(), "identity"))
    if pairs:
        truths = [range_to_bytes(targets[name][0]).cpu() for name in pairs]
        row |= paired_scores([outputs[name] for name in pairs], truths)
    return row


def generator_scores(
    G: Generator, G_back: Generator | None, sources: Images, targets: Images, wanted: Collection[str], precision: str
) -> dict[str, float]:
    """Measure a generator by measure_direction, on its device; of the paired scores PSNR, SSIM and match@1."""
    there = functools.partial(translate, G, precision=precision)
    back = functools.partial(translate, G_back, precision=precision) if G_back is not None else None
    scores = measure_direction(there, back, sources, targets, wanted)
    return {name: scores[name] for name in ("cycle", "identity", "PSNR", "SSIM", "match@1") if name in scores}


def measure_nets(
    nets: Networks, reals: Mapping[str, Images], wanted: Collection[str], loss_config: LossConfig, precision: str
) -> dict[str, float]:
    """Measure both directions on held-out images; each name ends in the domain of the images that are judged.

    nets:    G_AB G_BA, for "losses" also D_A D_B
    reals:   by domain, "A" and "B"
    wanted:  some of MEASURES
    returns: such as cycle_A, identity_B, PSNR_B, SSIM_B, match@1_B, spike_B, loss_G. "cycle" and "identity" replace the
             loss terms of these names, which are means over fewer images
    """
    row = {}
    for direction in DIRECTIONS:
        source, target = direction
        G = nets[direction.generator]
        G_back = nets[direction.reverse.generator]
        scores = generator_scores(G, G_back, reals[source], reals[target], wanted, precision)
        row |= {f"{name}_{source if name == 'cycle' else target}": value for name, value in scores.items()}
        if "spike" in wanted:
            row[f"spike_{target}"] = mean_spike(G, reals[source], precision)
    if "losses" in wanted:
        losses = mean_losses(nets, reals, loss_config, precision, repeat=False)
        row |= {name: value for name, value in losses.items() if name not in row}
    return row


def score_by(best_by: str | None, row: dict[str, float]) -> float | None:
    """Return the mean of one measure over both directions; None if the row lacks it, or if it is not finite."""
    values = [value for name, value in row.items() if best_by in (name, name.rpartition("_")[0])]
    score = mean(values) if values else math.nan
    return score if math.isfinite(score) else None


def is_better(best_by: str, score: float, before: float) -> bool:
    """Compare two scores: higher is better for PSNR and SSIM, lower for errors and losses."""
    return score > before if best_by in HIGHER_IS_BETTER else score < before


@contextmanager
def record_spikes(net: nn.Module) -> Iterator[list[Tensor]]:
    """Record the largest spike of each image, (N,), for every call of a generator within the block.

    The spike of a map is the distance of its farthest pixel from the mean, in standard deviations, divided by the largest
    possible value, sqrt(pixels - 1). At 1 a single pixel has all the variance of the map: so a generator can circumvent
    the instance normalisation that follows, which leaves a blob in the image. All convolutions count but the last one.
    source: Karras et al. 2020, arXiv:1912.04958, section 2
    """
    spikes: list[Tensor] = []
    of_layers: list[Tensor] = []

    def measure_layer(layer: nn.Module, inputs: tuple, x: Tensor) -> None:
        x = x.float().flatten(2)  # (N, C, H * W)
        farthest = (x - x.mean(2, keepdim=True)).abs().amax(2)
        largest = x.std(2, correction=0) * math.sqrt(x.shape[2] - 1)
        of_layers.append((farthest / largest.clamp_min(1e-12)).amax(1))

    def finish_call(layer: nn.Module, inputs: tuple, output: object) -> None:
        spikes.append(torch.stack(of_layers).amax(0))
        of_layers.clear()

    hooks = [net.register_forward_hook(finish_call)]
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and not name.startswith("head."):
            hooks.append(layer.register_forward_hook(measure_layer))
    try:
        yield spikes
    finally:
        for hook in hooks:
            hook.remove()


def mean_spike(G: Generator, images: Images, precision: str) -> float:
    """Return the mean over images of the largest spike in the maps of a generator, in [0, 1]."""
    with record_spikes(G) as spikes:
        for image in with_bar(images.values(), "spikes"):
            translate(G, image, precision)
    return mean([spike.item() for spike in spikes])


# ---------------------------------------------------------------------------------------------
# Cost of a network


def count_macs(net: Generator, height: int, width: int) -> int:
    """Count the multiply-accumulates of all convolutions, linear layers and attention for one image.

    A transposed convolution is counted as it is computed, once per input pixel. Published figures often count it once
    per output pixel, four times too many for stride 2 (56.8 G instead of 49.5 G).
    """
    from torch.utils.flop_counter import FlopCounterMode  # its import takes a second

    meta = {name: value.to("meta") for name, value in net.state_dict().items()}  # shapes only: nothing is computed
    image = torch.zeros(1, net.config.channels, height, width, device="meta", dtype=next(net.parameters()).dtype)
    with eval_mode(net), FlopCounterMode(display=False) as counter:
        functional_call(net, meta, (image,))
    return counter.get_total_flops() // 2  # a multiplication and an addition count as two


def median_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of single calls in ms, after three for warm-up; the call must wait for its device.

    torch.utils.benchmark times blocks of calls, or calls that each have two of their own for warm-up.
    """
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


# ---------------------------------------------------------------------------------------------
# FID and KID


class ImageFiles(Dataset):
    """Image files as torch-fidelity wants them: uint8 (3, H, W), all of one size."""

    def __init__(self, paths: Sequence[Path], load: Callable[[Path], Tensor]):
        self.paths = paths
        self.load = load

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return self.load(self.paths[i])


def need_torch_fidelity(wanted: Sequence[str]) -> None:
    """Raise InputError if the package is missing; wanted: values of --metrics."""
    need_package("torch_fidelity", f"--metrics {','.join(wanted)}", "pip install -r requirements-metrics.txt")


def fid_kid(
    fakes: Sequence[Path],
    reals: Sequence[Path],
    load: Callable[[Path], Tensor],
    wanted: Sequence[str],
    weights: Path | None,
    device: torch.device,
) -> dict[str, float]:
    """Compute the distances between the Inception features of two sets of images with torch-fidelity; 0 for equal sets.

    load:    path → uint8 (3, H, W), of one size
    wanted:  "fid", "kid" or both
    weights: of Inception; a file that files.read_archive has accepted, since torch-fidelity would execute what a
             hostile one holds. None: they are downloaded
    returns: FID and KID with the numbers of images; few images bias both, FID heavily
    raises:  InputError without torch-fidelity or weights, or with fewer than two images
    source:  Heusel et al. 2017, arXiv:1706.08500; Bińkowski et al. 2018, arXiv:1801.01401
    """
    flag = f"--metrics {','.join(wanted)}"
    need_torch_fidelity(wanted)
    from torch_fidelity import calculate_metrics

    count = min(len(fakes), len(reals))
    if count < 2:
        raise InputError(f"{flag}: {counted(count, 'image')} on one side, expected at least 2, better 1,000")
    if count < 1000:
        warn(f"FID and KID of {len(fakes)} against {len(reals)} images are biased; compare equal numbers only")
    try:
        values = calculate_metrics(
            input1=ImageFiles(fakes, load),
            input2=ImageFiles(reals, load),
            fid="fid" in wanted,
            kid="kid" in wanted,
            cuda=device.type == "cuda",
            kid_subset_size=min(1000, count),
            feature_extractor_weights_path=str(weights) if weights else None,
            save_cpu_ram=True,  # no worker processes
            verbose=False,
        )
    except (OSError, RuntimeError) as error:
        if weights:
            raise InputError(
                f"--inception_weights {weights}: not the weights that torch-fidelity takes ({str(error)[:100]})"
            ) from error
        if isinstance(error, RuntimeError):
            raise
        raise InputError(
            f"{flag}: Inception's weights cannot be downloaded ({error}); give a file: --inception_weights FILE"
        ) from error
    names = {"frechet_inception_distance": "FID", "kernel_inception_distance_mean": "KID"}
    row = {short: values[name] for name, short in names.items() if name in values}
    return row | {"translated": len(fakes), "real": len(reals)}


# ---------------------------------------------------------------------------------------------
# Tables


def heading(name: str) -> str:
    """Return a measure with its unit and an arrow: ↑ if higher is better; the losses of two players have none."""
    measure = name.removesuffix("_A").removesuffix("_B")
    arrow = ""
    if measure in HIGHER_IS_BETTER:
        arrow = "↑"
    elif measure in ERRORS + COSTS:
        arrow = "↓"
    return " ".join(part for part in (name, UNITS.get(measure), arrow) if part)


def format_table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Lay out named rows of figures below their headings, as lines of text."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    widths = {name: max(12, len(heading(name)) + 2) for name in columns}
    margin = max(map(len, rows))
    lines = [" " * margin + "".join(f"{heading(name):>{widths[name]}}" for name in columns)]
    for label, row in rows.items():
        cells = {name: f"{row[name]:.4g}" if name in row else "" for name in columns}
        lines.append(label.ljust(margin) + "".join(f"{cells[name]:>{widths[name]}}" for name in columns))
    return lines


def below_mean_image(table: dict[str, dict[str, float]]) -> list[str]:
    """Return a remark on a paired_table if its model scores below the mean image, which has no content at all."""
    if not table or table["model"]["PSNR"] >= table["mean image"]["PSNR"]:
        return []
    scores = {name: row["PSNR"] for name, row in table.items()}
    return [
        f"PSNR {scores['model']:.3g} dB is below {scores['mean image']:.3g} dB, that of the mean image: it has not learnt this yet"
    ]
