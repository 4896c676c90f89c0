"""Scores, losses, costs and tables."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import differences, make_dataset, noise_image, tiny_model, tiny_networks
from skimage.metrics import structural_similarity
from torch import nn

from cyclegan import LossConfig, translate
from models import DIRECTIONS, VIT_SIZES, GeneratorConfig, VitSize, build_generator
from toolkit import devices, metrics
from toolkit.images import ImageReader, load_image, range_to_bytes, tensor_to_image
from utils import InputError

CPU = torch.device("cpu")


def image(seed, size=(3, 24, 20)):
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def noisy(x, strength, seed=1):
    noise = torch.randint(-strength, strength + 1, x.shape, generator=torch.Generator().manual_seed(seed))
    return (x.int() + noise).clamp(0, 255).to(torch.uint8)


def held_out(seed, names, size=16):
    """Images in [-1, 1] by name."""
    generator = torch.Generator().manual_seed(seed)
    return {Path(name): torch.rand(1, 3, size, size, generator=generator) * 2 - 1 for name in names}


def scores_of(outputs, targets):
    """Paired scores of the outputs of one model."""
    return metrics.paired_table(({"model": x}, y) for x, y in zip(outputs, targets, strict=True))["model"]


# -- scores of images ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 24, 20), (1, 11, 11), (3, 11, 40), (3, 64, 48)])
@pytest.mark.parametrize("strength", [0, 40, 255])
def test_ssim_equals_scikit_image(size, strength):
    target = torch.from_numpy(np.linspace(0, 255, math.prod(size)).reshape(size).astype(np.uint8))
    output = noisy(target, strength)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    reference = structural_similarity(output.numpy(), target.numpy(), channel_axis=0, **options)
    assert metrics.ssim(output, target) == pytest.approx(reference, abs=1e-10)
    assert metrics.ssim(target, target) == pytest.approx(1)
    assert math.isnan(metrics.ssim(target[:, :10], target[:, :10]))


def test_psnr_and_levels_by_hand():
    target = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    output = target.clone()
    output[:, :8] += 7  # half of the pixels are off by 7 in every channel
    output[0, 8:, 0] += 11  # eight more by 11 in one channel
    scores = scores_of([output], [target])
    mse = (128 * 49 * 3 + 8 * 121) / 768
    assert scores["PSNR"] == pytest.approx(10 * math.log10(255**2 / mse))
    assert scores["RMSE"] == pytest.approx(math.sqrt(mse))
    assert scores["L1"] == pytest.approx((128 * 7 * 3 + 8 * 11) / 768)
    assert scores["within_5"] == pytest.approx(120 / 256)
    assert scores["within_10"] == pytest.approx(248 / 256)
    assert metrics.psnr(target, target) == 100


@pytest.mark.parametrize("levels", [256, 3])  # the fewer levels, the more ties
def test_match_at_1_is_what_distances_one_by_one_give(levels):
    generator = torch.Generator().manual_seed(levels)
    scores = []
    for trial in range(60):
        count = 1 + trial % 9
        x, y = torch.randint(0, levels, (2, count, 3, 4, 5), dtype=torch.uint8, generator=generator)
        if trial % 2:  # some targets twice
            y = y[torch.randint(0, count, (count,), generator=generator)]
        if trial % 3:
            x = noisy(y, 2, trial)
        nearest = [((row.long() - y.long()) ** 2).flatten(1).sum(1).tolist() for row in x]
        hits = [distances.index(min(distances)) == i for i, distances in enumerate(nearest)]  # of ties the first
        scores.append(metrics.match_at_1(list(x), list(y)))
        assert scores[-1] == sum(hits) / count
    assert len(set(scores)) > 5


def test_sizes_may_differ_between_images_and_from_the_truth():
    targets = [image(0, (3, 24, 20)), image(1, (3, 40, 32))]
    outputs = [image(2, (3, 12, 12)), targets[1]]
    scores = scores_of(outputs, targets)
    assert scores["PSNR"] == pytest.approx((scores_of(outputs[:1], targets[:1])["PSNR"] + 100) / 2)
    assert scores["match@1"] in (0.5, 1)


def test_a_table_has_each_output_beside_the_model():
    targets = [image(0), image(1)]
    inputs = [image(2), image(3)]
    table = metrics.paired_table(({"model": y, "copy": x}, y) for x, y in zip(inputs, targets, strict=True))
    assert list(table) == ["model", "copy"]
    assert table["model"]["PSNR"] == 100
    assert table["copy"] == scores_of(inputs, targets)


def test_a_table_tells_units_and_the_better_side_and_leaves_unknown_cells_empty():
    headings = ["PSNR dB ↑", "SSIM_B ↑", "cycle_A ↓", "L1 levels ↓", "L1 to teacher ↓", "match@1 ↑", "loss_D_A", "ms ↓"]
    names = ("PSNR", "SSIM_B", "cycle_A", "L1", "L1 to teacher", "match@1", "loss_D_A", "ms")
    lines = metrics.format_table({"a": dict.fromkeys(names, 1.0), "long": {"ms": math.nan}})
    assert re.split(r"  +", lines[0].strip()) == headings
    assert [line.split() for line in lines[1:]] == [["a", *"11111111"], ["long", "nan"]]
    assert len({len(line) for line in lines}) == 1


# -- costs -----------------------------------------------------------------------------------


@pytest.fixture
def tiny_vits(monkeypatch):
    """The two named sizes with few channels."""
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, uvcgan_layers=False))
    monkeypatch.setitem(VIT_SIZES, "uvcgan", VitSize((4, 4, 8, 8, 12), ffn=24, blocks=12, heads=6, uvcgan_layers=True))


@pytest.mark.parametrize(
    ("config", "size", "gmacs"),
    [({}, 256, 49.55), ({}, 128, 12.39), ({"ngf": 32}, 256, 12.70), ({"num_residual": 3, "ngf": 16}, 256, 1.52)],
)
def test_multiply_accumulates_are_those_of_the_published_networks(config, size, gmacs):
    with torch.device("meta"):
        net = build_generator(GeneratorConfig(**config))
    assert metrics.count_macs(net, size, size) / 1e9 == pytest.approx(gmacs, abs=0.006)


def test_multiply_accumulates_of_attention_by_hand(tiny_vits):
    nets = {blocks: build_generator(GeneratorConfig(generator="unet_vit", vit_blocks=blocks)) for blocks in (0, 1)}
    macs = {blocks: metrics.count_macs(net, 16, 16) for blocks, net in nets.items()}
    tokens, width = 16, 16
    linear = tokens * (3 * width * width + width * width + 2 * width * 32)
    assert macs[1] - macs[0] == linear + 2 * tokens * tokens * width


def test_a_generator_costs_parameters_operations_and_time():
    net = build_generator(GeneratorConfig(ngf=1, num_residual=1, n_downsampling=1))
    cost = metrics.generator_cost(net, torch.zeros(1, 3, 32, 48), "fp32")
    assert list(cost) == ["parameters", "MMACs", "ms"]
    assert cost["parameters"] == sum(p.numel() for p in net.parameters())
    stem = head = 7 * 7 * 3
    at_half_size = 3 * 3 * 2 + 2 * 3 * 3 * 2 * 2 + 3 * 3 * 2  # down, the block's two convolutions, up
    assert cost["MMACs"] * 1e6 == 32 * 48 * (stem + head) + 16 * 24 * at_half_size
    assert cost["ms"] > 0


# -- networks on held-out images -------------------------------------------------------------


def test_measures_of_a_direction_by_hand():
    sources = {Path(name): torch.full((1, 3, 16, 16), value) for name, value in (("b", 0.2), ("a", -0.4), ("x", 0.0))}
    targets = {Path(name): torch.full((1, 3, 16, 16), value) for name, value in (("a", -0.1), ("b", 0.5), ("y", 0.9))}
    calls = []

    def there(x):
        calls.append(x)
        return x + 0.3

    def back(x):
        return 0.5 * x

    def measure(nets, targets, *wanted):
        return metrics.measure_direction(lambda net, x: net(x), nets, sources, targets, wanted)

    row = measure((there, back), targets, "cycle", "identity", "paired")
    assert row["cycle"] == pytest.approx((abs(0.25 - 0.2) + abs(-0.05 + 0.4) + abs(0.15 - 0.0)) / 3)
    assert row["identity"] == pytest.approx(0.3)
    assert row["match@1"] == 1  # there(a) is the target a, there(b) the target b
    assert row["PSNR"] == 100
    assert row.keys() == {"cycle", "identity", "PSNR", "SSIM", "match@1"}
    assert len(calls) == 6  # each source once, each target once
    calls.clear()
    alone = measure((there, None), targets, "cycle", "paired")
    assert alone.keys() == row.keys() - {"cycle", "identity"}
    assert len(calls) == 2  # the pairs alone
    assert measure((there, back), {Path("z"): targets[Path("a")]}, "paired") == {}


def test_pairs_are_scored_in_the_order_of_their_names(monkeypatch):
    """A set's order differs between two starts of Python, and with it the last bits of a mean."""
    reals = {Path(name): torch.full((1, 3, 8, 8), i / 10) for i, name in enumerate("hdbfacge")}
    seen = []
    table = metrics.paired_table
    monkeypatch.setattr(metrics, "paired_table", lambda images: table(seen.append(pair) or pair for pair in images))
    metrics.measure_direction(lambda _, x: x, (None, None), reals, reals, ("paired",))
    expected = [range_to_bytes(reals[Path(name)][0]) for name in "abcdefgh"]
    for (outputs, target), truth in zip(seen, expected, strict=True):
        assert torch.equal(outputs["model"], truth)
        assert torch.equal(target, truth)


def test_a_loop_that_takes_long_shows_a_bar_that_is_removed_afterwards(monkeypatch, capsys):
    x = held_out(0, "abc")
    metrics.measure_direction(lambda net, x: net(x), (torch.neg, torch.neg), x, x, ("cycle", "identity"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(metrics, "BAR_DELAY", 0)
    metrics.measure_direction(lambda net, x: net(x), (torch.neg, torch.neg), x, x, ("cycle", "identity"))
    shown = capsys.readouterr().err
    assert {"translating", "identity"} <= set(re.findall(r"\w+", shown))
    assert shown.endswith("\r")


def test_measures_of_networks_end_in_the_domain_that_is_judged():
    nets = tiny_networks()
    reals = {"A": held_out(1, "abc"), "B": held_out(2, "bcd")}
    row = metrics.measure_nets(nets, reals, ("cycle", "identity", "paired"), LossConfig(), "fp32")
    names = ("cycle", "identity", "PSNR", "SSIM", "match@1")
    assert row.keys() == {f"{name}_{domain}" for name in names for domain in "AB"}
    for direction in DIRECTIONS:
        source, target = direction
        G = nets[direction.generator]
        G_back = nets[direction.reverse.generator]
        errors = [(translate(G_back, translate(G, x, "fp32"), "fp32") - x).abs().mean() for x in reals[source].values()]
        assert row[f"cycle_{source}"] == pytest.approx(sum(errors).item() / 3)
        errors = [(translate(G, y, "fp32") - y).abs().mean() for y in reals[target].values()]
        assert row[f"identity_{target}"] == pytest.approx(sum(errors).item() / 3)
        outputs = [range_to_bytes(translate(G, reals[source][Path(name)], "fp32")[0]) for name in "bc"]
        truths = [range_to_bytes(reals[target][Path(name)][0]) for name in "bc"]
        assert row[f"PSNR_{target}"] == scores_of(outputs, truths)["PSNR"]


def test_terms_of_the_losses_never_overwrite_a_measure_of_their_name():
    nets = tiny_networks()
    reals = {"A": held_out(1, "abc"), "B": held_out(2, "bc")}  # the losses see two pairs, the measures all images
    config = LossConfig()
    alone = metrics.measure_nets(nets, reals, ("cycle", "identity"), config, "fp32")
    both = metrics.measure_nets(nets, reals, metrics.MEASURES, config, "fp32")
    losses = metrics.measure_nets(nets, reals, ("losses",), config, "fp32")
    assert {name: both[name] for name in alone} == alone
    assert alone["cycle_A"] != losses["cycle_A"]
    for name in ("loss_G", "loss_D_A", "loss_D_B", "gan_AB", "gan_BA"):
        assert both[name] == losses[name]
    assert losses.keys() == metrics.mean_losses(nets, reals, config, "fp32").keys()


def losses_of(nets, real_A, real_B, config):
    return metrics.mean_losses(nets, {"A": {Path("a"): real_A}, "B": {Path("b"): real_B}}, config, "fp32")


def test_losses_repeat_the_images_of_the_smaller_domain():
    nets = tiny_networks()
    reals = {"A": held_out(1, "abc"), "B": held_out(2, "bc")}
    row = metrics.mean_losses(nets, reals, LossConfig(), "fp32")
    images_A = list(reals["A"].values())
    images_B = list(reals["B"].values())
    rows = [losses_of(nets, images_A[i], images_B[i % 2], LossConfig()) for i in range(3)]
    for name, value in row.items():
        assert value == pytest.approx(sum(losses[name] for losses in rows) / 3), name


@pytest.mark.parametrize(
    "config", [{}, {"lambda_identity": 0.0}, {"gan_loss": "hinge", "lambda_gan": 2.0, "lambda_cycle": 3.0}]
)
def test_losses_are_those_of_a_training_step(config):
    model = tiny_model(**config)
    real_A, real_B = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    losses = losses_of(model.networks, real_A, real_B, model.loss_config)
    step = model.step(real_A, real_B)
    assert losses.keys() == step.keys()
    for name in losses:
        assert losses[name] == pytest.approx(step[name].item(), rel=1e-4), name
    weights = {"gan": config.get("lambda_gan", 1), "cycle": config.get("lambda_cycle", 10), "identity": 5}
    total = sum(weights[name.partition("_")[0]] * value for name, value in losses.items() if "loss" not in name)
    assert losses["loss_G"] == pytest.approx(total, rel=1e-5)
    assert ("identity_A" in losses) == (model.loss_config.lambda_identity > 0)


def everything_about(nets):
    """Whatever a measure could change."""
    return {
        "tensors": {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in nets.items()},
        "modes": {name: [module.training for module in net.modules()] for name, net in nets.items()},
        "learns": {name: [p.requires_grad for p in net.parameters()] for name, net in nets.items()},
        "gradients": {name: [p.grad for p in net.parameters()] for name, net in nets.items()},
        "hooks": {name: [len(m._forward_hooks) for m in net.modules()] for name, net in nets.items()},
        "random": devices.rng_state(),
    }


@pytest.mark.parametrize(
    "measure",
    [
        lambda nets, A, B: metrics.mean_losses(nets, {"A": A, "B": B}, LossConfig(lambda_gp=0.1), "fp32"),
        lambda nets, A, B: metrics.measure_nets(nets, {"A": A, "B": B}, metrics.MEASURES, LossConfig(), "fp32"),
        lambda nets, A, B: metrics.measure_nets(nets, {"A": A, "B": B}, metrics.MEASURES, LossConfig(), "bf16"),
        lambda nets, A, B: metrics.generator_cost(nets["G_AB"], A[Path("a")], "fp32"),
        lambda nets, A, B: metrics.count_macs(nets["D_A"], 16, 16),
    ],
)
def test_a_measure_changes_nothing_about_the_networks(measure):
    nets = tiny_networks(norm="batch")
    for net in nets.values():
        net.train()
        next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eval()  # like a frozen part
    next(nets["G_AB"].parameters()).requires_grad_(False)
    before = everything_about(nets)
    measure(nets, held_out(1, "abc"), held_out(2, "bcd"))
    assert differences(before, everything_about(nets)) == []


def test_a_score_is_the_mean_of_both_directions_if_it_is_a_number():
    row = {"cycle_A": 0.1, "cycle_B": 0.3, "loss_G": 4.0, "SSIM_A": math.nan, "SSIM_B": 0.5, "match@1_A": 0.5}
    assert metrics.score_by("cycle", row) == pytest.approx(0.2)
    assert metrics.score_by("loss_G", row) == 4
    assert metrics.score_by("match@1", row) == 0.5
    for best_by in ("SSIM", "PSNR", None):
        assert metrics.score_by(best_by, row) is None


@pytest.mark.parametrize(("best_by", "high"), [("PSNR", True), ("SSIM", True), ("cycle", False), ("loss_G", False)])
def test_higher_is_better_for_psnr_and_ssim_and_lower_for_errors(best_by, high):
    assert metrics.is_better(best_by, 2.0, 1.0) == high
    assert metrics.is_better(best_by, 1.0, 2.0) != high
    assert not metrics.is_better(best_by, 1.0, 1.0)


# -- spikes ----------------------------------------------------------------------------------


class Copies(nn.Module):
    """Its maps are the image, the negated image, and zeros."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 3, 1)
        self.head = nn.Sequential(nn.Conv2d(3, 1, 5))
        with torch.no_grad():
            self.body.weight.copy_(torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1, 1))
            self.body.bias.fill_(0.25)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_spike_is_the_share_of_the_farthest_pixel_in_a_map():
    one = torch.zeros(1, 1, 5, 5)
    one[..., 2, 3] = -0.7
    stripes = torch.ones(1, 1, 5, 5)
    stripes[..., :2] = -1  # 10 of 25 pixels
    farthest = 1.2 / (0.96**0.5 * 24**0.5)  # mean 0.2, variance 1 - 0.04
    net = Copies()
    images = {Path("a"): one, Path("b"): stripes, Path("c"): torch.zeros(1, 1, 5, 5)}
    assert metrics.mean_spike(net, images, "fp32") == pytest.approx((1 + farthest + 0) / 3, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("colour", [(-1.0, -1.0, -1.0), (1.0, 1.0, 1.0), (0.3, -0.17, 0.77)])
def test_a_flat_image_has_no_spike_but_where_borders_differ(colour, precision):
    image = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    stem_only = tiny_networks(num_residual=0, n_downsampling=0)["G_AB"]
    assert metrics.mean_spike(stem_only, {Path("a"): image}, precision) == 0
    zero_padded = tiny_networks(norm="none", init="kaiming")["G_AB"]
    assert 0 < metrics.mean_spike(zero_padded, {Path("a"): image}, precision) <= 1


@pytest.mark.parametrize(("height", "precision", "spike"), [(0.2, "fp32", 1), (0.2, "bf16", 1), (0.003, "bf16", 0)])
def test_one_pixel_of_a_map_is_a_spike_unless_it_is_only_rounding(height, precision, spike):
    net = Copies()
    nn.init.zeros_(net.body.bias)
    image = torch.full((1, 1, 64, 64), 0.75)
    image[..., 20, 30] += height  # the next number of bfloat16 is 0.7539
    assert metrics.mean_spike(net, {Path("a"): image}, precision) == pytest.approx(spike, abs=1e-3)


@pytest.mark.parametrize("changes", [{"skips": True}, {"generator": "unet_vit"}, {"norm": "none"}])
def test_spikes_of_both_generators_are_measured_on_held_out_images(changes, tiny_vits):
    nets = tiny_networks(**changes)
    reals = {domain: {Path(domain): torch.rand(1, 3, 16, 16) * 2 - 1} for domain in "AB"}
    row = metrics.measure_nets(nets, reals, ("spike",), LossConfig(), "fp32")
    assert row.keys() == {"spike_A", "spike_B"}
    assert all(0 < value <= 1 for value in row.values())


# -- FID and KID -----------------------------------------------------------------------------


def test_what_fid_needs_and_does_not_get_is_named_in_one_line(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        noise_image(i).save(path)
    folder = metrics.ImageFiles(paths, ImageReader((32, 32)))
    given = (folder, folder, ["fid"])
    with pytest.raises(InputError, match=r"none\.pth"):
        metrics.fid_kid(*given, tmp_path / "none.pth", CPU)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"weights of Inception from .*other\.pth "):
        metrics.fid_kid(*given, tmp_path / "other.pth", CPU)
    with pytest.raises(InputError, match="--metrics fid: 1 image on one side"):
        metrics.fid_kid(metrics.ImageFiles(paths[:1], ImageReader((32, 32))), folder, ["fid"], None, CPU)


def test_weights_that_cannot_be_downloaded_name_the_option_for_a_file(tmp_path, monkeypatch):
    def offline(**_):
        raise OSError("no network")

    monkeypatch.setattr(pytest.importorskip("torch_fidelity"), "calculate_metrics", offline)
    folder = metrics.ImageFiles([tmp_path] * 2, ImageReader((32, 32)))
    with pytest.raises(InputError, match=r"no network.*--inception_weights"):
        metrics.fid_kid(folder, folder, ["kid"], None, CPU)


@pytest.mark.slow
def test_fid_of_a_folder_against_itself_is_zero_and_rises_with_blur(tmp_path, inception, capsys):
    real = make_dataset(tmp_path / "images", (12, 1, 1, 1), (64, 64)) / "trainA"
    paths = sorted(real.iterdir())
    rows = []
    for strength in (0, 1, 4):
        blurred = []
        for path in paths:
            blurred.append(tmp_path / f"{strength}-{path.name}")
            photo = tensor_to_image(load_image(path, (64, 64)))
            side = 64 // (strength + 1)
            photo.resize((side, side)).resize((64, 64)).save(blurred[-1])
        fakes = metrics.ImageFiles(blurred, ImageReader((32, 32)))
        rows.append(
            metrics.fid_kid(fakes, metrics.ImageFiles(paths, ImageReader((32, 32))), ["fid", "kid"], inception, CPU)
        )
    assert "FID of 12 against 12 images is biased, KID is noisy" in capsys.readouterr().err
    fids = [row["FID"] for row in rows]
    assert fids[0] == pytest.approx(0, abs=1e-3)
    assert fids == sorted(fids)
    assert fids[1] > 10 * abs(fids[0])
    assert (rows[0]["translated"], rows[0]["real"]) == (12, 12)
