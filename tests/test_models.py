import math

import pytest
import torch
from torch import nn

from models import (
    INITS,
    NORMS,
    VIT_SIZES,
    Attention,
    Discriminator,
    DiscriminatorConfig,
    GeneratorConfig,
    Position,
    VitSize,
    build_discriminator,
    build_generator,
    norm_layer,
)


def count(net):
    return sum(p.numel() for p in net.parameters())


# -- ResNet generator ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "parameters"),
    [
        ({}, 11_378_179),
        ({"num_residual": 6}, 7_837_699),
        ({"num_residual": 3}, 4_297_219),
        ({"ngf": 32}, 2_850_563),
        ({"num_residual": 6, "n_downsampling": 1}, 1_937_539),
        ({"channels": 1}, 11_365_633),
        ({"norm": "batch"}, 11_383_427),
        ({"norm": "instance_affine"}, 11_378_179 + 2 * (2 * 64 + 2 * 128 + 19 * 256)),  # a scale and a shift a channel
        ({"norm": "instance_affine", "ngf": 128}, 45_485_571),
        ({"norm": "group"}, 11_378_179 + 2 * (2 * 64 + 2 * 128 + 19 * 256)),
        ({"skips": True}, 11_419_331),
        ({"skips": True, "num_residual": 6, "n_downsampling": 1}, 1_945_795),
    ],
)
def test_generator_parameter_counts_are_those_of_the_paper_and_its_variants(flags, parameters):
    with torch.device("meta"):
        assert count(build_generator(GeneratorConfig(**flags))) == parameters


@pytest.mark.parametrize("upsample", ["deconv", "resize"])
@pytest.mark.parametrize("n_downsampling", range(5))
@pytest.mark.parametrize("size", [(32, 32), (33, 46), (50, 35)])
def test_generator_keeps_any_size_and_stays_in_range(upsample, n_downsampling, size):
    config = GeneratorConfig(channels=1, ngf=2, num_residual=1, upsample=upsample, n_downsampling=n_downsampling)
    output = build_generator(config)(torch.rand(2, 1, *size) * 2 - 1)
    assert output.shape == (2, 1, *size)
    assert output.abs().max() <= 1


def test_padding_to_a_multiple_changes_nothing_for_sizes_that_divide():
    net = build_generator(GeneratorConfig(ngf=2, num_residual=1))
    x = torch.rand(1, 3, 20, 24)
    y = net.head(net.up(net.blocks[0](net.down(net.stem(x))))).tanh()
    assert torch.equal(net(x), y)


def test_other_sizes_are_padded_by_reflection_and_cropped_back():
    net = build_generator(GeneratorConfig(ngf=2, num_residual=1))
    x = torch.rand(1, 3, 18, 21)
    padded = torch.nn.functional.pad(x, (0, 3, 0, 2), mode="reflect")
    assert torch.equal(net(x), net(padded)[..., :18, :21])


@pytest.mark.parametrize("n_downsampling", range(5))
def test_smallest_side_works_and_one_less_is_refused(n_downsampling):
    config = GeneratorConfig(ngf=2, num_residual=1, n_downsampling=n_downsampling)
    net = build_generator(config)
    side = config.smallest_side
    assert net(torch.zeros(1, 3, side, side)).shape == (1, 3, side, side)
    for size in ((side, side - 1), (side - 1, side)):
        with pytest.raises(ValueError, match=f"at least {side} px"):
            net(torch.zeros(1, 3, *size))


def test_hidden_states_are_the_outputs_of_all_blocks():
    net = build_generator(GeneratorConfig(ngf=2, num_residual=3))
    x = torch.rand(1, 3, 16, 16)
    output, hidden = net(x, return_hidden=True)
    assert torch.equal(output, net(x))
    assert [h.shape for h in hidden] == [(1, 8, 4, 4)] * 3
    expected = net.blocks[0](net.down(net.stem(x)))
    assert torch.equal(hidden[0], expected)
    assert not torch.equal(hidden[0], hidden[1])


def test_skips_lead_what_the_halvings_lose_to_the_output():
    """Without them, what a halving's convolution does not pass on is lost."""
    net = build_generator(GeneratorConfig(ngf=4, num_residual=1, n_downsampling=2, skips=True), "kaiming")
    x = torch.rand(2, 3, 18, 21) * 2 - 1
    for halve in net.down:
        nn.init.zeros_(halve[0].weight)  # no way through the middle
    a, b = net(x)
    assert not torch.allclose(a, b, atol=1e-2)
    for join in net.skips:
        nn.init.zeros_(join[0].weight[:, join[0].out_channels :])
    a, b = net(x)
    assert torch.allclose(a, b, atol=1e-6)


def test_output_layer_has_no_norm_unless_asked_for():
    def norms(net):
        return [m for m in net.head if isinstance(m, nn.InstanceNorm2d)]

    assert norms(build_generator(GeneratorConfig(ngf=2))) == []
    net = build_generator(GeneratorConfig(ngf=2, norm_output=True))
    assert len(norms(net)) == 1
    with torch.no_grad():
        before_tanh = torch.atanh(net(torch.rand(1, 3, 32, 32, dtype=torch.float32)).clamp(-0.999999, 0.999999))
    assert before_tanh.mean((2, 3)).abs().max() < 0.05  # so no image can be dark as a whole


@pytest.mark.parametrize("norm", NORMS)
def test_norm_flag_reaches_every_network(norm):
    kinds = {"instance": nn.InstanceNorm2d, "instance_affine": nn.InstanceNorm2d}
    kinds |= {"batch": nn.BatchNorm2d, "group": nn.GroupNorm}
    nets = [
        build_generator(GeneratorConfig(ngf=2, num_residual=1, norm=norm)),
        build_discriminator(DiscriminatorConfig(ndf=2, n_layers=2, norm=norm)),
        build_discriminator(DiscriminatorConfig("pixel", ndf=2, norm=norm)),
    ]
    for net, expected in zip(nets, (7, 2, 1), strict=True):
        found = [m for m in net.modules() if isinstance(m, tuple(kinds.values()))]
        assert len(found) == (0 if norm == "none" else expected)
        assert norm == "none" or all(isinstance(m, kinds[norm]) for m in found)
        assert norm == "none" or all(m.affine == (norm != "instance") for m in found)
        assert net(torch.rand(2, 3, 16, 16)).shape[0] == 2


@pytest.mark.parametrize(
    ("width", "groups"), [(1, 1), (15, 1), (16, 1), (32, 2), (40, 2), (50, 2), (53, 1), (64, 4), (256, 16)]
)
def test_about_sixteen_channels_form_a_group(width, groups):
    assert norm_layer("group", width).num_groups == groups


def test_a_spike_makes_its_own_map_small_and_under_a_group_norm_its_neighbours_as_well():
    maps = torch.randn(1, 32, 16, 16)
    maps[0, 0, 3, 3] = 1000
    small = {}
    for norm in ("instance", "group"):
        small[norm] = (norm_layer(norm, 32)(maps)[:, :, 8:].std((2, 3)) / maps[:, :, 8:].std((2, 3)) < 0.1)[0].tolist()
    assert small["instance"] == [True] + 31 * [False]
    assert small["group"] == 16 * [True] + 16 * [False]


# -- discriminators --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "parameters"),
    [
        ({"n_layers": 1}, 136_385),
        ({"n_layers": 2}, 662_977),
        ({"n_layers": 3}, 2_764_737),
        ({"n_layers": 3, "norm": "instance_affine"}, 2_764_737 + 2 * (128 + 256 + 512)),
        ({"n_layers": 4}, 6_959_553),
        ({"n_layers": 3, "max_mult": 2}, 3_136 + 131_200 + 2 * 262_272 + 2_049),
        ({"discriminator": "pixel"}, 8_705),
    ],
)
def test_discriminator_parameter_counts(flags, parameters):
    with torch.device("meta"):
        assert count(build_discriminator(DiscriminatorConfig(**flags))) == parameters


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [64, 50])
def test_discriminator_map_is_as_large_as_its_config_says(n_layers, side):
    config = DiscriminatorConfig(ndf=2, n_layers=n_layers)
    output = build_discriminator(config)(torch.zeros(1, 3, side, 64))
    assert output.shape == (1, 1, config.map_side(side), config.map_side(64))


def test_discriminator_config_names_the_largest_depth_that_fits():
    config = DiscriminatorConfig(ndf=1, n_layers=5)
    assert config.map_side(64) == 0
    assert config.largest_n_layers(64) == 4
    assert config.largest_n_layers(5) == 0
    with pytest.raises((RuntimeError, ValueError)):
        build_discriminator(config)(torch.zeros(1, 3, 64, 64))
    assert build_discriminator(DiscriminatorConfig(ndf=1, n_layers=4))(torch.zeros(1, 3, 64, 64)).shape[-1] == 2


def test_patch_discriminator_sees_70_px():
    net = build_discriminator(DiscriminatorConfig(ndf=2, norm="none"))
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    net(x)[0, 0, 7, 7].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_pixel_discriminator_sees_one_pixel_and_pool_averages():
    x = torch.rand(2, 3, 8, 8)
    net = build_discriminator(DiscriminatorConfig("pixel", ndf=2, norm="none"))
    changed = x.clone()
    changed[0, :, 3, 4] = 0
    assert ((net(x) - net(changed)).abs() > 0).sum() == 1
    pooled = build_discriminator(DiscriminatorConfig("pixel", ndf=2, norm="none", pool=True))
    pooled.load_state_dict(net.state_dict())
    assert torch.allclose(pooled(x)[:, 0, 0, 0], net(x).mean((1, 2, 3)))


def test_both_discriminators_are_of_one_class_and_keep_the_names_of_their_weights():
    """Checkpoints hold these names."""
    nets = {kind: build_discriminator(DiscriminatorConfig(kind, ndf=2, n_layers=2)) for kind in ("patch", "pixel")}
    assert all(type(net) is Discriminator for net in nets.values())
    weights = {kind: [name for name in net.state_dict() if name.endswith("weight")] for kind, net in nets.items()}
    assert weights["patch"] == [f"layers.{i}.weight" for i in (0, 2, 5, 8)]
    assert weights["pixel"] == [f"layers.{i}.weight" for i in (0, 2, 5)]


# -- building blocks -------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_inits_differ_and_leave_biases_at_zero(init):
    net = build_generator(GeneratorConfig(ngf=16, num_residual=1), init)
    weight = net.blocks[0].body[1].weight
    fan = 64 * 9
    expected = {
        "normal": 0.02,
        "xavier": 0.02 * math.sqrt(2 / (2 * fan)),
        "kaiming": math.sqrt(2 / fan),
        "orthogonal": 0.02 / math.sqrt(fan),
    }
    assert weight.std().item() == pytest.approx(expected[init], rel=0.05)
    assert all(not p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def test_batch_norms_begin_around_one():
    net = build_generator(GeneratorConfig(ngf=16, num_residual=9, norm="batch"))
    scales = torch.cat([m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert scales.mean().item() == pytest.approx(1, abs=0.003)
    assert scales.std().item() == pytest.approx(0.02, rel=0.1)


def test_unknown_words_are_refused():
    with pytest.raises(KeyError, match="zero"):
        build_generator(GeneratorConfig(ngf=2), "zero")
    with pytest.raises(KeyError, match="unet"):
        build_generator(GeneratorConfig("unet"))
    with pytest.raises(KeyError, match="style"):
        build_discriminator(DiscriminatorConfig("style"))


def test_learnt_scales_of_instance_norms_begin_as_if_there_were_none():
    plain = build_generator(GeneratorConfig(ngf=2, num_residual=1)).double()
    affine = build_generator(GeneratorConfig(ngf=2, num_residual=1, norm="instance_affine")).double()
    affine.load_state_dict(plain.state_dict(), strict=False)
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    assert torch.allclose(affine(x), plain(x), atol=1e-12)


# -- UNet-ViT --------------------------------------------------------------------------------


def vit(**flags):
    return GeneratorConfig(generator="unet_vit", **flags)


@pytest.fixture
def tiny_vits(monkeypatch):
    """The two named sizes with few channels."""
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, full=False))
    monkeypatch.setitem(VIT_SIZES, "uvcgan", VitSize((4, 4, 8, 8, 12), ffn=24, blocks=12, heads=6, full=True))


@pytest.mark.parametrize(
    ("flags", "parameters"),
    [
        ({"vit_size": "uvcgan", "vit_blocks": 12, "vit_heads": 6}, 31_360_239),  # as published
        ({"vit_size": "uvcgan", "vit_blocks": 6, "vit_heads": 6}, 20_713_449),
        ({"vit_size": "uvcgan", "vit_blocks": 6, "vit_heads": 6, "upsample": "resize"}, 20_713_449),
        ({}, 4_150_727),
    ],
)
def test_unet_vit_parameter_counts_are_those_of_uvcgan(flags, parameters):
    with torch.device("meta"):
        assert count(build_generator(vit(**flags))) == parameters


@pytest.mark.parametrize("flags", [{}, {"vit_size": "uvcgan", "vit_blocks": 2, "vit_heads": 3}])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("upsample", ["deconv", "resize"])
@pytest.mark.parametrize("size", [(64, 64), (96, 128), (100, 70), (33, 32)])
def test_one_unet_vit_translates_images_of_any_size(tiny_vits, flags, norm, upsample, size):
    config = vit(channels=1, norm=norm, upsample=upsample, **flags)
    net = build_generator(config)
    x = torch.rand(2, 1, *size) * 2 - 1
    output, hidden = net(x, return_hidden=True)
    assert output.shape == x.shape
    assert output.abs().max() <= 1
    side = 2**config.downsamplings
    shape = (2, config.hidden_width, math.ceil(size[0] / side), math.ceil(size[1] / side))
    assert [state.shape for state in hidden] == [shape] * config.vit_blocks
    assert config.tokens(*size) == shape[2] * shape[3]
    with pytest.raises(ValueError, match=f"at least {config.smallest_side} px"):
        net(x[..., : config.smallest_side - 1])


def test_attention_equals_a_naive_softmax():
    attention = Attention(32, 4)
    x = torch.randn(2, 9, 32)
    q, k, v = attention.qkv(x).split(32, dim=-1)
    heads = []
    for head in range(4):
        a, b, c = (part[..., 8 * head : 8 * head + 8] for part in (q, k, v))
        weights = (a @ b.transpose(1, 2) / math.sqrt(8)).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ c)
    expected = attention.out(torch.cat(heads, dim=-1))
    assert torch.allclose(attention(x), expected, atol=1e-5)


def test_transformer_blocks_begin_as_the_identity_and_then_mix_all_positions(tiny_vits):
    block = build_generator(vit()).blocks[0]
    x = torch.randn(1, 6, 16)
    assert torch.equal(block(x), x)
    torch.nn.init.ones_(block.scale)
    other = x.clone()
    other[:, 5] += 1
    assert not torch.allclose(block(x)[:, 0], block(other)[:, 0])


def test_a_token_knows_where_it_lies_at_every_size():
    position = Position(8)
    flat = position(torch.zeros(1, 8, 3, 3))  # nothing to see, so all that differs is the position
    assert len({tuple(token.tolist()) for token in flat[0]}) == 9
    finer = position(torch.zeros(1, 8, 9, 9)).unflatten(1, (9, 9))
    assert torch.allclose(finer[0, 4, 4], flat.unflatten(1, (3, 3))[0, 1, 1])  # the middle is the middle
    assert torch.allclose(finer[0, 1, 7], flat.unflatten(1, (3, 3))[0, 0, 2], atol=1e-6)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="divisor of 256"):
        vit(vit_heads=7)
