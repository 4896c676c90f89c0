import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import differences, tiny_model, tiny_networks
from skimage.metrics import structural_similarity
from torch import nn

from cyclegan import LossConfig, translate
from models import (
    VIT_SIZES,
    Attention,
    DiscriminatorConfig,
    GeneratorConfig,
    VitSize,
    build_discriminator,
    build_generator,
)
from toolkit import devices, metrics
from toolkit.images import range_to_bytes
from toolkit.metrics import (
    all_losses,
    below_mean_image,
    count_macs,
    format_table,
    is_better,
    match_at_1,
    mean_losses,
    mean_spike,
    measure_direction,
    measure_nets,
    paired_scores,
    paired_table,
    psnr,
    score_by,
    record_spikes,
    ssim,
)

CPU = torch.device("cpu")
MEASURES = ("losses", "cycle", "identity", "paired")


def image(seed, size=(3, 24, 20)):
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def noisy(x, strength, seed=1):
    noise = torch.randint(-strength, strength + 1, x.shape, generator=torch.Generator().manual_seed(seed))
    return (x.int() + noise).clamp(0, 255).to(torch.uint8)


def held_out(seed, names, size=16):
    """Images as the networks see them, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {Path(name): torch.rand(1, 3, size, size, generator=generator) * 2 - 1 for name in names}


# -- scores of images ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 24, 20), (1, 11, 11), (3, 11, 40), (3, 64, 48)])
@pytest.mark.parametrize("strength", [0, 40, 255])
def test_ssim_equals_scikit_image(size, strength):
    target = torch.from_numpy(np.linspace(0, 255, math.prod(size)).reshape(size).astype(np.uint8))
    output = noisy(target, strength)
    reference = structural_similarity(
        output.numpy(),
        target.numpy(),
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
    )
    assert ssim(output, target) == pytest.approx(reference, abs=1e-10)
    assert ssim(target, target) == pytest.approx(1)
    assert math.isnan(ssim(target[:, :10], target[:, :10]))


@pytest.mark.parametrize("size", [(3, 24, 20), (1, 11, 30)])
def test_ssim_in_two_passes_equals_that_with_the_whole_window(size):
    line = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    for seed in range(5):
        target = image(seed, size)
        output = noisy(target, 60, seed)
        x, y = (values.double()[:, None] for values in (output, target))
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = (F.conv2d(v, window) for v in (x, y, x * x, y * y, x * y))
        c1, c2 = 2.55**2, 7.65**2
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        structure = (2 * (mean_xy - mean_x * mean_y) + c2) / (mean_xx - mean_x**2 + mean_yy - mean_y**2 + c2)
        assert ssim(output, target) == pytest.approx((luminance * structure).mean().item(), abs=1e-10)


def test_psnr_and_levels_by_hand():
    target = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    output = target.clone()
    output[:, :8] += 7  # half of the pixels are off by 7 in every channel
    output[0, 8:, 0] += 11  # eight more by 11 in one channel
    scores = paired_scores([output], [target])
    mse = (128 * 49 * 3 + 8 * 121) / 768
    assert scores["PSNR"] == pytest.approx(10 * math.log10(255**2 / mse))
    assert scores["RMSE"] == pytest.approx(math.sqrt(mse))
    assert scores["L1"] == pytest.approx((128 * 7 * 3 + 8 * 11) / 768)
    assert scores["within_5"] == pytest.approx(120 / 256)
    assert scores["within_10"] == pytest.approx(248 / 256)
    assert psnr(target, target) == 100


def test_scores_are_means_over_images():
    targets = [image(0), image(1)]
    outputs = [targets[0], image(2)]
    scores = paired_scores(outputs, targets)
    assert scores["PSNR"] == pytest.approx((100 + psnr(outputs[1], targets[1])) / 2)


def test_match_at_1_tells_a_translation_from_a_constant():
    targets = [image(i) for i in range(5)]
    near = [noisy(target, 3) for target in targets]
    assert match_at_1(near, targets) == 1
    assert match_at_1([targets[2]] * 5, targets) == pytest.approx(0.2)
    assert match_at_1(near[::-1], targets) == pytest.approx(0.2)


@pytest.mark.parametrize("levels", [256, 3])  # the fewer levels, the more ties
def test_match_at_1_decides_as_distances_one_by_one_do(levels):
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
        scores.append(match_at_1(list(x), list(y)))
        assert scores[-1] == sum(hits) / count
    assert len(set(scores)) > 5


def test_sizes_may_differ_between_images_and_from_the_truth():
    targets = [image(0, (3, 24, 20)), image(1, (3, 40, 32))]
    outputs = [image(2, (3, 12, 12)), image(3, (3, 40, 32))]
    scores = paired_scores(outputs, targets)
    assert 0 < scores["PSNR"] < 20
    assert 0 <= scores["match@1"] <= 1


def test_table_puts_the_baselines_beside_the_model():
    targets = [image(0), image(1)]
    inputs = [image(2), image(3)]
    table = paired_table(zip(targets, inputs, targets, strict=True), torch.stack(targets).double().mean(0))
    assert list(table) == ["model", "copy", "mean image"]
    assert table["model"]["PSNR"] == 100
    assert table["copy"]["PSNR"] == pytest.approx(paired_scores(inputs, targets)["PSNR"])
    assert table["mean image"]["PSNR"] > table["copy"]["PSNR"]
    assert [line.split()[0] for line in format_table(table)] == ["L1", "model", "copy", "mean"]


def test_a_model_that_scores_below_the_mean_image_is_told_so():
    targets = [image(0), image(1)]
    table = paired_table(zip(targets, targets, targets, strict=True), torch.stack(targets).double().mean(0))
    assert below_mean_image(table) == []
    assert below_mean_image({}) == []
    table["model"]["PSNR"] = 9.87654
    table["mean image"]["PSNR"] = 17.0
    assert below_mean_image(table) == [
        "PSNR 9.88 dB is below 17 dB, that of the mean image: it has not learnt this yet"
    ]


def test_a_table_says_units_and_which_way_is_better():
    names = ("PSNR", "SSIM_B", "cycle_A", "L1", "L1 to teacher", "match@1", "loss_D_A", "images")
    heading = format_table({"model": dict.fromkeys(names, 1.0)})[0]
    assert [" ".join(words.split()) for words in re.split(r"  +", heading.strip())] == [
        *("PSNR dB ↑", "SSIM_B ↑", "cycle_A ↓", "L1 levels ↓", "L1 to teacher ↓", "match@1 ↑", "loss_D_A", "images")
    ]


def test_a_table_leaves_a_cell_empty_where_a_row_has_no_figure():
    lines = format_table({"a": {"x": 1.0, "y": 2.0}, "long": {"y": math.nan}})
    assert [line.split() for line in lines] == [["x", "y"], ["a", "1", "2"], ["long", "nan"]]
    assert len({len(line) for line in lines}) == 1


# -- counts ----------------------------------------------------------------------------------


@pytest.fixture
def tiny_vits(monkeypatch):
    """The two named sizes with few channels."""
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, full=False))
    monkeypatch.setitem(VIT_SIZES, "uvcgan", VitSize((4, 4, 8, 8, 12), ffn=24, blocks=12, heads=6, full=True))


@pytest.mark.parametrize(
    ("flags", "size", "gmacs"),
    [
        ({}, 256, 49.55),
        ({}, 128, 12.39),
        ({"num_residual": 3}, 64, 1.29),
        ({"ngf": 32}, 256, 12.70),
        ({"num_residual": 3, "ngf": 16}, 256, 1.52),
    ],
)
def test_multiply_accumulates_are_those_of_the_published_networks(flags, size, gmacs):
    with torch.device("meta"):
        net = build_generator(GeneratorConfig(**flags))
    assert count_macs(net, size, size) / 1e9 == pytest.approx(gmacs, abs=0.006)


def test_multiply_accumulates_of_a_transformer_by_hand(tiny_vits):
    nets = {blocks: build_generator(GeneratorConfig(generator="unet_vit", vit_blocks=blocks)) for blocks in (0, 1)}
    macs = {blocks: count_macs(net, 16, 16) for blocks, net in nets.items()}
    tokens, width = 16, 16
    linear = tokens * (3 * width * width + width * width + 2 * width * 32)
    assert macs[1] - macs[0] == linear + 2 * tokens * tokens * width


def counted_by_hooks(net, height, width):
    """Multiply-accumulates layer by layer, from what passes each of them."""
    counts = []

    def count(module, inputs, output):
        if isinstance(module, Attention):  # each of T queries meets T keys, then T values
            counts.append(2 * output.shape[1] * output[0].numel())
        elif isinstance(module, nn.Linear):
            counts.append(module.weight.numel() * output.numel() // output.shape[-1])
        else:
            pixels = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            counts.append(module.weight.numel() * pixels[0, 0].numel())

    kinds = nn.Conv2d | nn.ConvTranspose2d | nn.Linear | Attention
    for module in net.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.zeros(1, net.config.channels, height, width))
    return sum(counts)


@pytest.mark.parametrize("upsample", ["deconv", "resize"])
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (33, 46)])
@pytest.mark.parametrize(
    "flags",
    [
        {"num_residual": 2, "ngf": 4},
        {"num_residual": 1, "ngf": 2, "n_downsampling": 4, "channels": 1},
        {"generator": "unet_vit", "vit_blocks": 2},
        {"generator": "unet_vit", "vit_size": "uvcgan", "vit_blocks": 1, "vit_heads": 6},
    ],
)
def test_multiply_accumulates_are_the_sum_over_all_layers(tiny_vits, upsample, size, flags):
    net = build_generator(GeneratorConfig(upsample=upsample, **flags))
    assert count_macs(net, *size) == counted_by_hooks(net, *size)


def test_a_discriminator_is_counted_too():
    net = build_discriminator(DiscriminatorConfig(ndf=4, n_layers=2))
    assert count_macs(net, 32, 48) == counted_by_hooks(net, 32, 48)


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

    row = measure_direction(there, back, sources, targets, ("cycle", "identity", "paired"))
    assert row["cycle"] == pytest.approx((abs(0.25 - 0.2) + abs(-0.05 + 0.4) + abs(0.15 - 0.0)) / 3)
    assert row["identity"] == pytest.approx(0.3)
    assert row["match@1"] == 1  # there(a) is the target a, there(b) the target b
    assert row["PSNR"] == 100
    assert row["L1"] == 0
    assert row.keys() >= {"RMSE", "SSIM", "within_5", "within_10"}
    assert len(calls) == 6  # each source once, each target once
    calls.clear()
    assert measure_direction(there, None, sources, targets, ("cycle", "paired")).keys() == row.keys() - {
        "cycle",
        "identity",
    }
    assert len(calls) == 2  # the pairs alone
    assert measure_direction(there, back, sources, {Path("z"): targets[Path("a")]}, ("paired",)) == {}


def test_pairs_are_scored_in_the_order_of_their_names(monkeypatch):
    """A set's order differs between two starts of Python, and with it the last bits of a mean."""
    reals = {Path(name): torch.full((1, 3, 8, 8), i / 10) for i, name in enumerate("hdbfacge")}
    seen = []
    monkeypatch.setattr(metrics, "paired_scores", lambda *both: seen.extend(both) or {})
    measure_direction(torch.clone, None, reals, reals, ("paired",))
    expected = [range_to_bytes(reals[Path(name)][0]) for name in "abcdefgh"]
    for found in seen:
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert len(seen) == 2


def test_a_loop_that_takes_long_shows_a_bar_that_goes_again(monkeypatch, capsys):
    x = held_out(0, "abc")
    measure_direction(torch.neg, torch.neg, x, x, ("cycle", "identity"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(metrics, "BAR_DELAY", 0)
    measure_direction(torch.neg, torch.neg, x, x, ("cycle", "identity"))
    shown = capsys.readouterr().err
    assert "translating" in shown
    assert "identity" in shown
    assert shown.endswith("\r")  # and the line is blank


def test_measures_of_networks_name_the_domain_they_live_in():
    nets = tiny_networks()
    reals = {"A": held_out(1, "abc"), "B": held_out(2, "bcd")}
    row = measure_nets(nets, reals, ("cycle", "identity", "paired"), LossConfig(), "fp32")
    names = ("cycle", "identity", "PSNR", "SSIM", "match@1")
    assert row.keys() == {f"{name}_{domain}" for name in names for domain in "AB"}
    for source, target in ("AB", "BA"):
        G = nets[f"G_{source}{target}"]
        G_back = nets[f"G_{target}{source}"]
        errors = [(translate(G_back, translate(G, x, "fp32"), "fp32") - x).abs().mean() for x in reals[source].values()]
        assert row[f"cycle_{source}"] == pytest.approx(sum(errors).item() / 3)
        errors = [(translate(G, y, "fp32") - y).abs().mean() for y in reals[target].values()]
        assert row[f"identity_{target}"] == pytest.approx(sum(errors).item() / 3)
        outputs = [range_to_bytes(translate(G, reals[source][Path(name)], "fp32")[0]) for name in "bc"]
        truths = [range_to_bytes(reals[target][Path(name)][0]) for name in "bc"]
        assert row[f"PSNR_{target}"] == paired_scores(outputs, truths)["PSNR"]


def test_terms_of_the_losses_never_overwrite_a_measure_of_their_name():
    nets = tiny_networks()
    reals = {"A": held_out(1, "abc"), "B": held_out(2, "bc")}  # the losses see two pairs, the measures all images
    config = LossConfig()
    alone = measure_nets(nets, reals, ("cycle", "identity"), config, "fp32")
    both = measure_nets(nets, reals, MEASURES, config, "fp32")
    losses = measure_nets(nets, reals, ("losses",), config, "fp32")
    assert {name: both[name] for name in alone} == alone
    assert alone["cycle_A"] != losses["cycle_A"]
    for name in ("loss_G", "loss_D_A", "loss_D_B", "gan_AB", "gan_BA"):
        assert both[name] == losses[name]
    assert losses.keys() == {*("loss_G", "loss_D_A", "loss_D_B"), *all_terms(nets, reals, config)}


def all_terms(nets, reals, config):
    pair = (next(iter(reals[domain].values())) for domain in "AB")
    return all_losses(nets, *pair, config)


def test_of_losses_on_a_test_set_the_shorter_domain_starts_again():
    nets = tiny_networks()
    reals = {"A": held_out(1, "abc"), "B": held_out(2, "bc")}
    row = mean_losses(nets, reals, LossConfig(), "fp32")
    images_A = list(reals["A"].values())
    images_B = list(reals["B"].values())
    rows = [all_losses(nets, images_A[i], images_B[i % 2], LossConfig()) for i in range(3)]
    for name, value in row.items():
        assert value == pytest.approx(sum(losses[name].item() for losses in rows) / 3), name


def test_all_losses_are_those_of_a_training_step():
    model = tiny_model()
    real_A, real_B = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    before = all_losses(model.nets, real_A, real_B, model.loss_config)
    step = model.step(real_A, real_B)
    assert before.keys() == step.keys()
    for name in before:
        assert before[name].item() == pytest.approx(step[name].item(), rel=1e-4), name


@pytest.mark.parametrize("config", [LossConfig(lambda_identity=0.0), LossConfig("hinge", 2.0, 3.0, 4.0)])
def test_all_losses_have_the_weights_and_the_form_of_the_run(config):
    nets = tiny_networks()
    losses = all_losses(nets, *torch.rand(2, 2, 3, 16, 16), config)
    weights = {"gan": config.lambda_gan, "cycle": config.lambda_cycle, "identity": config.lambda_identity}
    total = sum(weights[name.partition("_")[0]] * value for name, value in losses.items() if "loss" not in name)
    assert losses["loss_G"].item() == pytest.approx(total.item(), rel=1e-5)
    assert ("identity_A" in losses) == (config.lambda_identity > 0)


def everything_about(nets):
    """Whatever a measure could change."""
    return {
        "tensors": {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in nets.items()},
        "modes": {name: [module.training for module in net.modules()] for name, net in nets.items()},
        "learns": {name: [p.requires_grad for p in net.parameters()] for name, net in nets.items()},
        "slopes": {name: [p.grad for p in net.parameters()] for name, net in nets.items()},
        "hooks": {name: [len(m._forward_hooks) for m in net.modules()] for name, net in nets.items()},
        "random": devices.rng_state(),
    }


def call_of(name, nets):
    reals = {"A": held_out(1, "abc"), "B": held_out(2, "bcd")}
    config = LossConfig(lambda_gp=0.1)
    calls = {
        "all_losses": lambda: all_losses(nets, *torch.full((2, 2, 3, 16, 16), 0.3), config),
        "mean_losses": lambda: mean_losses(nets, reals, config, "fp32"),
        "measure_nets": lambda: measure_nets(nets, reals, MEASURES, config, "fp32"),
        "measure_nets_bf16": lambda: measure_nets(nets, reals, MEASURES, config, "bf16"),
        "generator_scores": lambda: metrics.generator_scores(
            nets["G_AB"], nets["G_BA"], reals["A"], reals["B"], ("cycle", "identity", "paired"), "fp32"
        ),
        "count_macs": lambda: [count_macs(net, 16, 16) for net in nets.values()],
    }
    return calls[name]


@pytest.mark.parametrize(
    "name",
    [
        *("all_losses", "mean_losses", "measure_nets", "measure_nets_bf16"),
        *("generator_scores", "count_macs"),
    ],
)
def test_a_measure_changes_nothing_about_the_networks(name):
    nets = tiny_networks(norm="batch")
    for net in nets.values():
        net.train()
        next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eval()  # as a frozen part stands
    next(nets["G_AB"].parameters()).requires_grad_(False)
    before = everything_about(nets)
    call_of(name, nets)()
    assert differences(before, everything_about(nets)) == []


def test_a_score_is_the_mean_of_both_directions_if_it_is_a_number():
    row = {"cycle_A": 0.1, "cycle_B": 0.3, "loss_G": 4.0, "SSIM_A": math.nan, "SSIM_B": 0.5, "match@1_A": 0.5}
    assert score_by("cycle", row) == pytest.approx(0.2)
    assert score_by("loss_G", row) == 4
    assert score_by("match@1", row) == 0.5
    for best_by in ("SSIM", "PSNR", None):
        assert score_by(best_by, row) is None


def test_images_shall_score_high_and_errors_low():
    for best_by, high in (("PSNR", True), ("SSIM", True), ("cycle", False), ("identity", False), ("loss_G", False)):
        assert is_better(best_by, 2.0, 1.0) == high
        assert is_better(best_by, 1.0, 2.0) != high
        assert not is_better(best_by, 1.0, 1.0)


def test_a_generator_is_described_by_what_it_costs_and_scores():
    nets = tiny_networks()
    reals = held_out(1, "abc")
    row = metrics.describe_generator(nets["G_AB"], nets["G_BA"], reals, held_out(2, "bcd"), "fp32")
    assert list(row) == ["parameters", "MMACs", "ms", "cycle", "PSNR", "SSIM", "match@1"]
    assert row["parameters"] == sum(p.numel() for p in nets["G_AB"].parameters())
    assert row["MMACs"] * 1e6 == count_macs(nets["G_AB"], 16, 16)
    assert row["ms"] > 0
    row = metrics.describe_generator(nets["G_AB"], None, reals, held_out(2, "xyz"), "fp32")
    assert list(row) == ["parameters", "MMACs", "ms"]


# -- spikes ----------------------------------------------------------------------------------


class Copies(nn.Module):
    """Maps that are the image itself, negated, and nothing."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 3, 1)
        self.head = nn.Sequential(nn.Conv2d(3, 1, 5))
        with torch.no_grad():
            self.body.weight.copy_(torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1, 1))
            self.body.bias.fill_(0.25)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_spike_is_how_much_of_a_map_its_farthest_pixel_is():
    one = torch.zeros(1, 1, 5, 5)
    one[..., 2, 3] = -0.7
    stripes = torch.ones(1, 1, 5, 5)
    stripes[..., :2] = -1  # 10 of 25 pixels
    farthest = 1.2 / (0.96**0.5 * 24**0.5)  # mean 0.2, variance 1 - 0.04
    net = Copies()
    with record_spikes(net) as spikes:
        net(torch.cat([one, stripes]))
        net(torch.zeros(1, 1, 5, 5))
        assert not net.head[0]._forward_hooks  # an image may have one bright pixel
    assert [x.tolist() for x in spikes] == [pytest.approx([1, farthest], abs=1e-5), [0]]
    net(one)
    assert len(spikes) == 2  # nobody looks any more
    assert mean_spike(net, {Path("a"): one, Path("b"): stripes}, "fp32") == pytest.approx((1 + farthest) / 2, abs=1e-5)


@pytest.mark.parametrize("changes", [{"skips": True}, {"generator": "unet_vit"}, {"norm": "none"}])
def test_record_spikes_both_generators_are_measured_on_held_out_images(changes, tiny_vits):
    nets = tiny_networks(**changes)
    reals = {domain: {Path(domain): torch.rand(1, 3, 16, 16) * 2 - 1} for domain in "AB"}
    row = measure_nets(nets, reals, ("spike",), LossConfig(), "fp32")
    assert row.keys() == {"spike_A", "spike_B"}
    assert all(0 < value <= 1 for value in row.values())
