"""Scores of images against the truth, where a data set has one, and the one place where networks are measured.

scores = paired_scores(outputs, targets)  # two lists of uint8 images, (C, H, W)
scores = measure_nets(nets, {"A": images_A, "B": images_B}, ("cycle", "paired"), LossConfig(), "fp32")

Networks that are measured do not change: not in their weights, running statistics or modes.
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
from models import Generator, Nets
from toolkit.devices import autocast
from toolkit.distributed import rank
from toolkit.images import range_to_bytes
from utils import InputError, counted, need_package, warn

MEASURES = ("losses", "cycle", "identity", "paired", "spike")  # fast enough to be computed during training
BEST_BY = {"PSNR": "paired", "SSIM": "paired", "cycle": "cycle", "identity": "identity", "loss_G": "losses"}
PEAK = 255.0
PSNR_LIMIT = 100.0  # dB; identical images would score infinity and spoil every mean
WINDOW = 11  # px, side of SSIM's window
SIGMA = 1.5  # px, of the Gaussian in it
DELTAS = (5, 10)  # 8-bit levels
MATCH_SIDE = 64  # px a side at which match_at_1 compares images, at most: a folder of photos has to fit into memory
HEADINGS = {  # of tables: the unit, and which way is better
    **{"PSNR": "dB ↑", **dict.fromkeys(("SSIM", "match@1", "within_5", "within_10"), "↑")},
    **{"L1": "levels ↓", "RMSE": "levels ↓", "L1 to teacher": "↓", "cycle": "↓", "identity": "↓", "spike": "↓"},
    **dict.fromkeys(("FID", "KID", "parameters", "MMACs", "ms", "MB"), "↓"),
}
PATIENCE = 3.0  # seconds before a progress bar appears

Images = Mapping[Path, Tensor]  # (1, C, H, W) in [-1, 1] by name; read one by one, so it may load them when asked


# ---------------------------------------------------------------------------------------------
# Scores of images


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio of one image in dB, at most PSNR_LIMIT; higher is better."""
    mse = ((output.double() - target.double()) ** 2).mean().item()
    return min(PSNR_LIMIT, 10 * math.log10(PEAK**2 / mse)) if mse else PSNR_LIMIT


def blur(maps: Tensor, dim: int) -> Tensor:
    """Mean of WINDOW neighbours along a dimension, weighted by a Gaussian; borders left out.

    As a sum of shifted maps: torch's convolution is 12 times slower in float64.
    """
    weights = torch.exp(-((torch.arange(WINDOW) - WINDOW // 2).double() ** 2) / (2 * SIGMA**2))
    length = maps.shape[dim] - WINDOW + 1
    blurred = torch.zeros_like(maps.narrow(dim, 0, length))
    for i, weight in enumerate((weights / weights.sum()).tolist()):
        blurred.add_(maps.narrow(dim, i, length), alpha=weight)
    return blurred


def ssim(output: Tensor, target: Tensor) -> float:
    """Structural similarity of one image, mean over its channels; 1 for equal images.

    output, target: uint8 (C, H, W); below 11 px a side the result is nan
    source:         Wang et al. 2004: Gaussian window of 11x11 px with sigma 1.5, borders left out
    """
    if min(target.shape[-2:]) < WINDOW:
        return math.nan
    c1 = (0.01 * PEAK) ** 2
    c2 = (0.03 * PEAK) ** 2
    means = []
    for x, y in zip(output.double(), target.double(), strict=True):  # channel by channel: all maps fit into the cache
        maps = torch.stack([x, y, x * x, y * y, x * y])  # (5, H, W)
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = blur(blur(maps, -2), -1)  # each (H - 10, W - 10)
        var_x = mean_xx - mean_x**2
        var_y = mean_yy - mean_y**2
        cov = mean_xy - mean_x * mean_y
        index = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
        means.append(index.mean().item())
    return mean(means)


def match_at_1(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Fraction of outputs whose nearest target (L2) among all is their own; a model that ignores its input scores 1/N.

    outputs, targets: uint8 (C, H, W), the i-th belong together; compared at the size of the first target, or one of
                      at most MATCH_SIDE px a side; of targets at one distance the first counts as nearest
    """
    size = match_size(targets[0])
    # sums of integers in float64: exact, so that ties are ties
    x = torch.stack([resized(image, size).flatten() for image in outputs]).double()  # (N, C * H * W)
    y = torch.stack([resized(image, size).flatten() for image in targets]).double()
    distances = y.square().sum(1) - 2 * x @ y.T  # (N, N), |x - y|² less |x|², which does not matter
    own = torch.arange(len(x))
    return (distances.argmin(1) == own).sum().item() / len(x)


def match_size(target: Tensor) -> tuple[int, int]:
    """Height and width at which match_at_1 compares images with one of the size of `target`."""
    height, width = target.shape[-2:]
    factor = min(1, MATCH_SIDE / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a uint8 image (C, H, W) to (height, width), antialiased."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    wide = F.interpolate(image[None].float(), tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return wide[0].clamp(0, PEAK).round().to(torch.uint8)


def distance(x: Tensor, y: Tensor) -> float:
    """Mean absolute difference of two images; in the units of training, [0, 2]."""
    return (x.float().cpu() - y.float().cpu()).abs().mean().item()


def mean(values: Collection[float]) -> float:
    """Mean of some numbers, added in their order."""
    return sum(values) / len(values)


def mean_distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean over pairs of images of their mean absolute difference; in the units of training, [0, 2]."""
    return mean([distance(x, y) for x, y in pairs])


def mean_row(rows: Sequence[dict]) -> dict[str, float]:
    """Mean of each named figure over rows that all have it."""
    return {name: mean([float(row[name]) for row in rows]) for name in rows[0]}


def paired_scores(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, float]:
    """Score images against the truth of the same index: the mean over images of each image's score.

    outputs, targets: uint8 (C, H, W); a target of another size is resized to its output's
    returns:          L1 and RMSE in 8-bit levels, PSNR in dB, SSIM, the fraction of pixels whose every
                      channel is within 5 and 10 levels of the target, match@1
    """
    scores = PairedScores()
    for output, target in zip(outputs, targets, strict=True):
        scores.add(output, target)
    return scores.means()


class PairedScores:
    """The scores of paired_scores, taken pair by pair: of the images themselves only small copies are kept."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def add(self, output: Tensor, target: Tensor) -> None:
        """Score one image, uint8 (C, H, W), against its truth."""
        size = self.targets[0].shape[-2:] if self.targets else match_size(target)
        self.outputs.append(resized(output, size))
        self.targets.append(resized(target, size))
        target = resized(target, output.shape[-2:])
        difference = (output.double() - target.double()).abs()
        worst = difference.amax(0)  # (H, W), over the channels
        row = {"L1": difference.mean().item(), "RMSE": (difference**2).mean().sqrt().item()}
        row |= {"PSNR": psnr(output, target), "SSIM": ssim(output, target)}
        row |= {f"within_{delta}": (worst <= delta).double().mean().item() for delta in DELTAS}
        self.rows.append(row)

    def means(self) -> dict[str, float]:
        """Mean of each score over all pairs, and match@1."""
        return mean_row(self.rows) | {"match@1": match_at_1(self.outputs, self.targets)}


def paired_table(triples: Iterable[tuple[Tensor, Tensor, Tensor]], mean_image: Tensor) -> dict[str, dict]:
    """Score a model beside two baselines that need no model: the input itself, and the mean image of the target domain.

    triples:    output, input and truth of each image, uint8 (C, H, W); looked at one by one, so they may be read then
    mean_image: float (C, H, W) in [0, 255], of the training images, so that no truth is looked at
    """
    flat = mean_image.round().to(torch.uint8)
    # the rows of metrics.json, which readers of older ones know by these names
    table = {"model": PairedScores(), "copy": PairedScores(), "mean picture": PairedScores()}
    for output, x, target in triples:
        size = output.shape[-2:]
        table["model"].add(output, target)
        table["copy"].add(resized(x, size), target)
        table["mean picture"].add(resized(flat, size), target)
    return {name: scores.means() for name, scores in table.items()}


# ---------------------------------------------------------------------------------------------
# Networks on held-out images


def count_macs(net: Generator, height: int, width: int) -> int:
    """Count the multiply-accumulates of all convolutions, linear layers and attentions for one image of (height, width) px.

    A transposed convolution is counted as it is computed, once per input pixel; published figures
    often count it per output pixel, four times too much for stride 2 (56.8 G in place of 49.5 G).
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes a second, which nobody waits for who counts nothing

    meta = {name: value.to("meta") for name, value in net.state_dict().items()}  # shapes alone, so nothing is computed
    image = torch.zeros(1, net.config.channels, height, width, device="meta", dtype=next(net.parameters()).dtype)
    with eval_mode(net), FlopCounterMode(display=False) as counter:
        functional_call(net, meta, (image,))
    return counter.get_total_flops() // 2  # it counts a multiplication and an addition as two


def all_losses(nets: Nets, real_A: Tensor, real_B: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """Every loss of a training step on one pair of batches, without older images: for watching and testing.

    nets:    G_AB G_BA D_A D_B
    returns: loss_G, loss_D_A, loss_D_B and the terms of generator_loss
    """
    with eval_mode(*nets.values()):
        loss_of_A, terms_of_A, made_of_A = generator_loss(nets, "A", real_A, config)
        loss_of_B, terms_of_B, made_of_B = generator_loss(nets, "B", real_B, config)
        loss_D_A = discriminator_loss(nets["D_A"], real_A, made_of_B["fake"], config)
        loss_D_B = discriminator_loss(nets["D_B"], real_B, made_of_A["fake"], config)
    losses = {"loss_G": loss_of_A + loss_of_B, "loss_D_A": loss_D_A, "loss_D_B": loss_D_B}
    return losses | terms_of_A | terms_of_B


@contextmanager
def spikes_of(net: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block each call of a generator adds the largest spike (N,) among the maps of each image to a list.

    The spike of a map that leaves a convolution, the output layer's aside: how far its farthest pixel is from the map's
    mean, in standard deviations, as a fraction of the sqrt(pixels - 1) that are possible. At 1 one pixel holds all
    of the map's variance: a generator can so outwit the instance normalisation that follows, and is left with a blot.
    source: Karras et al. 2020, arXiv:1912.04958, section 2
    """
    found: list[Tensor] = []
    maps: list[Tensor] = []

    def look(layer: nn.Module, inputs: tuple, x: Tensor) -> None:
        x = x.float().flatten(2)  # (N, C, H * W)
        farthest = (x - x.mean(2, keepdim=True)).abs().amax(2)
        deviation = x.std(2, correction=0) * math.sqrt(x.shape[2] - 1)
        maps.append((farthest / deviation.clamp_min(1e-12)).amax(1))

    def collect(layer: nn.Module, inputs: tuple, output: object) -> None:
        found.append(torch.stack(maps).amax(0))
        maps.clear()

    layers = [layer for name, layer in net.named_modules() if not name.startswith("head.")]
    convolutions = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    hooks = [layer.register_forward_hook(look) for layer in convolutions]
    hooks.append(net.register_forward_hook(collect))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def mean_spike(G: Generator, images: Images, precision: str) -> float:
    """Mean over images of the largest spike in the maps that a generator makes of each, from 0 to 1."""
    with spikes_of(G) as spikes:
        for image in with_bar(images.values(), "spikes"):
            translate(G, image, precision)
    return mean([spike.item() for spike in spikes])


def losses_of_pairs(
    nets: Nets, reals: Mapping[str, Images], pairs: Sequence[tuple[Path, Path]], config: LossConfig, precision: str
) -> dict[str, float]:
    """Mean of all_losses over pairs of images, named in `pairs`, on the networks' device."""
    device = next(nets["G_AB"].parameters()).device
    rows = []
    for name_A, name_B in with_bar(pairs, "losses"):
        real_A = reals["A"][name_A].to(device)
        real_B = reals["B"][name_B].to(device)
        with autocast(device, precision):
            rows.append(all_losses(nets, real_A, real_B, config))
    return mean_row(rows)


def mean_losses(nets: Nets, reals: Mapping[str, Images], config: LossConfig, precision: str) -> dict[str, float]:
    """The training losses on all images: generators and both discriminators, as the 64x64 study reports them.

    nets:  G_AB G_BA D_A D_B
    reals: of "A" and "B"; the shorter domain starts again
    """
    names_A = list(reals["A"])
    names_B = list(reals["B"])
    count = max(len(names_A), len(names_B))
    pairs = [(names_A[i % len(names_A)], names_B[i % len(names_B)]) for i in range(count)]
    return losses_of_pairs(nets, reals, pairs, config, precision)


def with_bar(items: Collection, title: str) -> Iterable:
    """Show how far a loop over `items` is, if it takes long; of many ranks the first one's."""
    return tqdm(items, desc=title, unit="image", leave=False, delay=PATIENCE, disable=rank() > 0)


def measure_direction(
    there: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor] | None,
    sources: Images,
    targets: Images,
    wanted: Collection[str],
) -> dict[str, float]:
    """Measure one direction on held-out images.

    there, back:      (1, C, H, W) → (1, C, H, W) float32; without `back` there is no "cycle"
    sources, targets: a source's truth is the target of its name
    wanted:           some of "cycle" (back(there(x)) against x), "identity" (there(y) against y), and
                      "paired" (paired_scores of there(x) in 8 bits, where names are shared at all)
    returns:          the measures by name; cycle and identity in the units of training, [0, 2]
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
            cycles.append(distance(back(fake), x))
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
    """Measure generators by measure_direction, on their device; of the paired scores those that a run is followed by."""
    there = functools.partial(translate, G, precision=precision)
    back = functools.partial(translate, G_back, precision=precision) if G_back is not None else None
    scores = measure_direction(there, back, sources, targets, wanted)
    return {name: scores[name] for name in ("cycle", "identity", "PSNR", "SSIM", "match@1") if name in scores}


def measure_nets(
    nets: Nets, reals: Mapping[str, Images], wanted: Collection[str], loss_config: LossConfig, precision: str
) -> dict[str, float]:
    """Measure both directions on held-out images of domains "A" and "B"; each name ends in the domain it lives in.

    nets:    G_AB G_BA, for "losses" also D_A D_B
    wanted:  some of "cycle", "identity", "paired", "spike", "losses"
    returns: such as cycle_A, identity_B, PSNR_B, SSIM_B, match@1_B, spike_B, loss_G; terms of the losses whose name a
             measure has already are left out
    """
    row = {}
    for source, target in ("AB", "BA"):
        G = nets[f"G_{source}{target}"]
        G_back = nets[f"G_{target}{source}"]
        scores = generator_scores(G, G_back, reals[source], reals[target], wanted, precision)
        row |= {f"{name}_{source if name == 'cycle' else target}": value for name, value in scores.items()}
        if "spike" in wanted:
            row[f"spike_{target}"] = mean_spike(G, reals[source], precision)
    if "losses" in wanted:
        losses = losses_of_pairs(nets, reals, list(zip(reals["A"], reals["B"], strict=False)), loss_config, precision)
        row |= {name: value for name, value in losses.items() if name not in row}
    return row


def median_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call in ms, after three that pay for set-up; the call itself must wait for its device."""
    times = []
    for _ in range(3 + repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def score_by(best_by: str | None, row: dict[str, float]) -> float | None:
    """The mean over both directions of one measure out of a row of them; None if it is not there, or no number."""
    values = [value for name, value in row.items() if best_by in (name, name.rpartition("_")[0])]
    score = mean(values) if values else math.nan
    return score if math.isfinite(score) else None


def is_better(best_by: str, score: float, before: float) -> bool:
    """Compare two scores: PSNR and SSIM shall be high, errors and losses low."""
    return score > before if best_by in ("PSNR", "SSIM") else score < before


def generator_cost(net: Generator, image: Tensor, precision: str, repeats: int = 20) -> dict[str, float]:
    """What a generator costs: parameters, and for an image (1, C, H, W) millions of multiply-accumulates and ms."""
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "MMACs": count_macs(net, *image.shape[-2:]) / 1e6,
        "ms": median_ms(lambda: translate(net, image, precision).cpu(), repeats),
    }


def describe_generator(
    net: Generator, back: Generator | None, sources: Images, targets: Images, precision: str
) -> dict[str, float]:
    """What a generator costs, and its quality on held-out images: cycle error, and scores where images are pairs."""
    cost = generator_cost(net, next(iter(sources.values())), precision)
    return cost | generator_scores(net, back, sources, targets, ("cycle", "paired"), precision)


# ---------------------------------------------------------------------------------------------
# Tables


def heading(name: str) -> str:
    """A measure with its unit, and ↑ where higher is better, ↓ where lower is; losses of two players have neither."""
    return f"{name} {HEADINGS.get(name.removesuffix('_A').removesuffix('_B'), '')}".rstrip()


def below_mean_image(table: dict[str, dict[str, float]]) -> list[str]:
    """What has to be said of a paired_table whose model scores below the mean image, which has no content at all."""
    if not table:
        return []
    model = table["model"]["PSNR"]
    flat = table["mean picture"]["PSNR"]
    if model >= flat:
        return []
    return [f"PSNR {model:.3g} dB is below {flat:.3g} dB, that of the mean image: it has not learnt this yet"]


def format_table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Lay out named rows of figures under their headings, as lines of text."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    widths = {name: max(12, len(heading(name)) + 2) for name in columns}
    margin = max(map(len, rows))
    lines = [" " * margin + "".join(f"{heading(name):>{widths[name]}}" for name in columns)]
    for label, row in rows.items():
        line = label.ljust(margin)
        for name in columns:
            cell = f"{row[name]:.4g}" if name in row else ""
            line += f"{cell:>{widths[name]}}"
        lines.append(line)
    return lines


FEW = 1000  # images; below, FID says more about their number than about the model


class ImageFiles(Dataset):
    """Files as torch-fidelity wants them: uint8 (3, H, W), all of one size."""

    def __init__(self, paths: Sequence[Path], load: Callable[[Path], Tensor]):
        self.paths = paths
        self.load = load

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return self.load(self.paths[i])


def need_torch_fidelity(wanted: Sequence[str]) -> None:
    """Raise InputError without the package; wanted: of --metrics."""
    need_package("torch_fidelity", f"--metrics {','.join(wanted)}", "pip install -r requirements-metrics.txt")


def fid_kid(
    fakes: Sequence[Path],
    reals: Sequence[Path],
    load: Callable[[Path], Tensor],
    wanted: Sequence[str],
    weights: Path | None,
    device: torch.device,
) -> dict[str, float]:
    """Distances between the Inception features of two sets of images, by torch-fidelity; 0 for equal sets.

    load:    path → uint8 (3, H, W), of one size
    wanted:  "fid", "kid" or both
    weights: Inception's, a file that the caller has read with files.read_archive, for torch-fidelity would
             execute what a hostile one holds; None: they are downloaded
    returns: FID and KID with the numbers of images; both are biased by few images, FID heavily
    raises:  InputError without torch-fidelity or weights, or with fewer than two images
    source:  Heusel et al. 2017, arXiv:1706.08500; Bińkowski et al. 2018, arXiv:1801.01401
    """
    flag = f"--metrics {','.join(wanted)}"
    need_torch_fidelity(wanted)
    from torch_fidelity import calculate_metrics

    least = min(len(fakes), len(reals))
    if least < 2:
        raise InputError(f"{flag}: {counted(least, 'image')} on one side, expected at least 2, better {FEW:,}")
    if least < FEW:
        warn(f"FID and KID of {len(fakes)} against {len(reals)} images are biased; compare equal numbers only")
    try:
        values = calculate_metrics(
            input1=ImageFiles(fakes, load),
            input2=ImageFiles(reals, load),
            **dict.fromkeys(wanted, True),
            cuda=device.type == "cuda",
            kid_subset_size=min(FEW, least),
            feature_extractor_weights_path=str(weights) if weights else None,
            save_cpu_ram=True,  # no worker processes
            verbose=False,
        )
    except (OSError, RuntimeError) as error:
        if weights:
            words = f"not the weights that torch-fidelity takes ({str(error)[:100]})"
            raise InputError(f"--inception_weights {weights}: {words}") from error
        if isinstance(error, RuntimeError):
            raise
        words = "give a file: --inception_weights FILE"
        raise InputError(f"{flag}: Inception's weights cannot be fetched ({error}); {words}") from error
    names = {"frechet_inception_distance": "FID", "kernel_inception_distance_mean": "KID"}
    row = {short: values[name] for name, short in names.items() if name in values}
    return row | {"translated": len(fakes), "real": len(reals)}
