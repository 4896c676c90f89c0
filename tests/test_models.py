"""Configs, generators, discriminators, their initial weights; directions."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import (
    DIRECTIONS,
    INITS,
    NORMS,
    VIT_SIZES,
    Attention,
    Direction,
    DiscriminatorConfig,
    GeneratorConfig,
    Position,
    VitSize,
    build_discriminator,
    build_generator,
    check_image_size,
    freeze,
    meta_network,
    norm_layer,
)
from utils import InputError


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.fixture
def tiny_vits(monkeypatch):
    """The two sizes of a UNet-ViT with few channels."""
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, full=False))
    monkeypatch.setitem(VIT_SIZES, "uvcgan", VitSize((4, 4, 8, 8, 12), ffn=24, blocks=12, heads=6, full=True))


# -- directions and configs ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "generator", "reverse"), [("AtoB", "G_AB", "BtoA"), ("BtoA", "G_BA", "AtoB")])
def test_a_direction_has_a_name_a_generator_and_a_reverse(name, generator, reverse):
    direction = Direction.named(name)
    source, target = direction
    assert f"{source}to{target}" == str(direction) == name
    assert direction.generator == generator
    assert str(direction.reverse) == reverse
    assert {direction, direction.reverse} == set(DIRECTIONS)
    with pytest.raises(KeyError):
        Direction.named(f"{name}oC")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (GeneratorConfig, {"generator": "unet"}, "generator unet: expected one of resnet, unet_vit"),
        (GeneratorConfig, {"vit_size": "huge"}, "vit_size huge: expected one of small, uvcgan"),
        (GeneratorConfig, {"channels": 2}, "channels 2: expected one of 3, 1"),
        (GeneratorConfig, {"norm": "layer"}, "norm layer: expected one of instance, "),
        (GeneratorConfig, {"ngf": 5000}, "ngf 5000: expected at least 1 and at most 4096"),
        (GeneratorConfig, {"ngf": "64"}, "ngf '64': expected int"),
        (GeneratorConfig, {"num_residual": -1}, "num_residual -1: expected at least 0 and at most 1000"),
        (GeneratorConfig, {"n_downsampling": 5}, "n_downsampling 5: expected at least 0 and at most 4"),
        (GeneratorConfig, {"n_downsampling": True}, "n_downsampling True: expected int"),
        (GeneratorConfig, {"norm_output": None}, "norm_output None: expected bool"),
        (GeneratorConfig, {"generator": "unet_vit", "vit_heads": 7}, "vit_heads 7: expected a divisor of 256"),
        (DiscriminatorConfig, {"discriminator": "style"}, "discriminator style: expected one of patch, pixel"),
        (DiscriminatorConfig, {"n_layers": 17}, "n_layers 17: expected at least 1 and at most 16"),
        (DiscriminatorConfig, {"pool": "no"}, "pool 'no': expected bool"),
    ],
)
def test_a_config_refuses_values_of_another_type_choice_or_range(kind, values, message):
    with pytest.raises(ValueError, match=f"^({message})"):
        kind(**values)


def test_unset_sizes_of_a_unet_vit_are_those_of_its_name():
    sizes = [GeneratorConfig(vit_size=name) for name in ("small", "uvcgan")]
    assert [(size.vit_blocks, size.vit_heads) for size in sizes] == [(4, 4), (12, 6)]
    config = GeneratorConfig("unet_vit", vit_size="uvcgan", vit_blocks=2)
    assert (config.blocks, config.vit_heads, config.hidden_width) == (2, 6, 384)
    assert GeneratorConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("generator", "discriminator", "size", "message"),
    [
        ({"n_downsampling": 3}, {}, (64, 15), "images of 15x64 px: 3 downsamplings need at least 16 px a side; "),
        (
            {},
            {"n_layers": 5},
            (64, 64),
            "--n_layers_D 5: its output for .* 64x64 px would be empty; the largest .* is 4",
        ),
        ({}, {"n_layers": 1}, (5, 8), "images of 8x5 px: 2 downsamplings need at least 8 px"),
        ({"n_downsampling": 1}, {"n_layers": 1}, (5, 5), "--n_layers_D 1: .* take --discriminator pixel"),
    ],
)
def test_images_that_are_too_small_for_a_network_are_refused(generator, discriminator, size, message):
    with pytest.raises(InputError, match=message):
        check_image_size(GeneratorConfig(**generator), DiscriminatorConfig(**discriminator), *size)
    check_image_size(GeneratorConfig(**generator), DiscriminatorConfig("pixel"), 64, 64)


# -- ResNet generators -----------------------------------------------------------------------

RESNET_9 = 11_378_179
NORM_CHANNELS = 2 * 64 + 2 * 128 + 19 * 256


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({}, RESNET_9),
        ({"num_residual": 6}, 7_837_699),
        ({"num_residual": 3}, 4_297_219),
        ({"ngf": 32}, 2_850_563),
        ({"num_residual": 6, "n_downsampling": 1}, 1_937_539),
        ({"channels": 1}, 11_365_633),
        ({"norm": "batch"}, 11_383_427),
        ({"norm": "instance_affine"}, RESNET_9 + 2 * NORM_CHANNELS),  # a scale and a shift for each channel
        ({"norm": "instance_affine", "ngf": 128}, 45_485_571),
        ({"norm": "group"}, RESNET_9 + 2 * NORM_CHANNELS),
        ({"skips": True}, 11_419_331),
        ({"skips": True, "num_residual": 6, "n_downsampling": 1}, 1_945_795),
        ({"generator": "unet_vit"}, 4_150_727),
        ({"generator": "unet_vit", "vit_size": "uvcgan"}, 31_360_239),  # as published
        ({"generator": "unet_vit", "vit_size": "uvcgan", "vit_blocks": 6}, 20_713_449),
        ({"generator": "unet_vit", "vit_size": "uvcgan", "vit_blocks": 6, "upsample": "resize"}, 20_713_449),
    ],
)
def test_generators_have_the_published_numbers_of_parameters(config, parameters):
    assert count(meta_network(GeneratorConfig(**config))) == parameters


@pytest.mark.parametrize("upsample", ["deconv", "resize"])
@pytest.mark.parametrize("n_downsampling", range(5))
@pytest.mark.parametrize("size", [(32, 32), (33, 46), (50, 35)])
def test_a_resnet_translates_images_of_any_size_into_the_value_range(upsample, n_downsampling, size):
    config = GeneratorConfig(channels=1, ngf=2, num_residual=1, upsample=upsample, n_downsampling=n_downsampling)
    output = build_generator(config)(torch.rand(2, 1, *size) * 2 - 1)
    assert output.shape == (2, 1, *size)
    assert output.abs().max() <= 1


def test_sizes_that_the_downsampling_does_not_divide_are_padded_by_reflection_and_cropped_back():
    net = build_generator(GeneratorConfig(ngf=2, num_residual=1))
    x = torch.rand(1, 3, 20, 24)
    assert torch.equal(net(x), net.head(net.up(net.blocks[0](net.down(net.stem(x))))).tanh())  # nothing to pad
    x = torch.rand(1, 3, 18, 21)
    assert torch.equal(net(x), net(F.pad(x, (0, 3, 0, 2), mode="reflect"))[..., :18, :21])


@pytest.mark.parametrize("n_downsampling", range(5))
def test_the_smallest_side_works_and_a_smaller_one_is_refused(n_downsampling):
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
    expected = [net.down(net.stem(x))]
    for block in net.blocks:
        expected.append(block(expected[-1]))
    assert [h.shape for h in hidden] == [(1, 8, 4, 4)] * 3
    assert all(map(torch.equal, hidden, expected[1:]))


def test_skip_connections_carry_detail_past_the_downsampling():
    net = build_generator(GeneratorConfig(ngf=4, num_residual=1, skips=True), "kaiming")
    x = torch.rand(2, 3, 18, 21) * 2 - 1
    for downsample in net.down:
        nn.init.zeros_(downsample[0].weight)  # nothing passes through the blocks
    a, b = net(x)
    assert not torch.allclose(a, b, atol=1e-2)
    for join in net.skips:
        nn.init.zeros_(join[0].weight[:, join[0].out_channels :])
    a, b = net(x)
    assert torch.allclose(a, b, atol=1e-6)


def test_the_output_layer_is_normalised_only_with_norm_output():
    def norms(net):
        return [module for module in net.head if isinstance(module, nn.InstanceNorm2d)]

    assert norms(build_generator(GeneratorConfig(ngf=2))) == []
    net = build_generator(GeneratorConfig(ngf=2, norm_output=True))
    assert len(norms(net)) == 1
    with torch.no_grad():
        before_tanh = torch.atanh(net(torch.rand(1, 3, 32, 32)).clamp(-0.999999, 0.999999))
    assert before_tanh.mean((2, 3)).abs().max() < 0.05  # so no image can be dark as a whole


# -- UNet-ViT generators ---------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"vit_size": "uvcgan", "vit_blocks": 2, "vit_heads": 3}])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("upsample", ["deconv", "resize"])
@pytest.mark.parametrize("size", [(64, 64), (96, 128), (100, 70), (33, 32)])
def test_a_unet_vit_translates_images_of_any_size(tiny_vits, sizes, norm, upsample, size):
    config = GeneratorConfig("unet_vit", channels=1, norm=norm, upsample=upsample, **sizes)
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
        heads.append(torch.softmax(a @ b.transpose(1, 2) / math.sqrt(8), dim=-1) @ c)
    assert torch.allclose(attention(x), attention.out(torch.cat(heads, dim=-1)), atol=1e-5)


def test_transformer_blocks_start_as_the_identity_and_then_mix_all_positions(tiny_vits):
    block = build_generator(GeneratorConfig("unet_vit")).blocks[0]
    x = torch.randn(1, 6, 16)
    assert torch.equal(block(x), x)
    nn.init.ones_(block.scale)
    other = x.clone()
    other[:, 5] += 1
    assert not torch.allclose(block(x)[:, 0], block(other)[:, 0])


def test_positions_of_tokens_differ_and_agree_between_image_sizes():
    position = Position(8)
    coarse = position(torch.zeros(1, 8, 3, 3))  # without content, so the position is all that differs
    assert len({tuple(token.tolist()) for token in coarse[0]}) == 9
    coarse = coarse.unflatten(1, (3, 3))
    fine = position(torch.zeros(1, 8, 9, 9)).unflatten(1, (9, 9))
    assert torch.allclose(fine[0, 4, 4], coarse[0, 1, 1])  # both in the middle
    assert torch.allclose(fine[0, 1, 7], coarse[0, 0, 2], atol=1e-6)


# -- discriminators --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"n_layers": 1}, 136_385),
        ({"n_layers": 2}, 662_977),
        ({}, 2_764_737),
        ({"norm": "instance_affine"}, 2_764_737 + 2 * (128 + 256 + 512)),
        ({"n_layers": 4}, 6_959_553),
        ({"max_mult": 2}, 3_136 + 131_200 + 2 * 262_272 + 2_049),
        ({"discriminator": "pixel"}, 8_705),
    ],
)
def test_discriminators_have_the_published_numbers_of_parameters(config, parameters):
    with torch.device("meta"):
        assert count(build_discriminator(DiscriminatorConfig(**config))) == parameters


@pytest.mark.parametrize("config", [*({"n_layers": n} for n in (1, 2, 3, 4)), {"discriminator": "pixel"}])
@pytest.mark.parametrize("side", [64, 50])
def test_the_output_of_a_discriminator_has_the_size_that_its_config_says(config, side):
    config = DiscriminatorConfig(ndf=2, **config)
    output = build_discriminator(config)(torch.zeros(1, 3, side, 64))
    assert output.shape == (1, 1, config.map_side(side), config.map_side(64))


def test_a_patch_discriminator_sees_70_px():
    net = build_discriminator(DiscriminatorConfig(ndf=2, norm="none"))
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    net(x)[0, 0, 7, 7].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_a_pixel_discriminator_sees_one_pixel_and_pool_averages_its_output():
    x = torch.rand(2, 3, 8, 8)
    net = build_discriminator(DiscriminatorConfig("pixel", ndf=2, norm="none"))
    changed = x.clone()
    changed[0, :, 3, 4] = 0
    assert ((net(x) - net(changed)).abs() > 0).sum() == 1
    pooled = build_discriminator(DiscriminatorConfig("pixel", ndf=2, norm="none", pool=True))
    pooled.load_state_dict(net.state_dict())
    assert torch.allclose(pooled(x)[:, 0, 0, 0], net(x).mean((1, 2, 3)))


@pytest.mark.parametrize(("kind", "convolutions"), [("patch", (0, 2, 5, 8)), ("pixel", (0, 2, 5))])
def test_weights_of_discriminators_have_the_names_that_checkpoints_contain(kind, convolutions):
    net = build_discriminator(DiscriminatorConfig(kind, ndf=2, n_layers=2))
    weights = [name for name in net.state_dict() if name.endswith("weight")]
    assert weights == [f"layers.{i}.weight" for i in convolutions]


# -- normalisation ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("build", "config", "expected"),
    [
        (build_generator, GeneratorConfig(ngf=2, num_residual=1), 7),
        (build_discriminator, DiscriminatorConfig(ndf=2, n_layers=2), 2),
        (build_discriminator, DiscriminatorConfig("pixel", ndf=2), 1),
    ],
)
def test_every_network_has_the_normalisation_of_its_config(norm, build, config, expected):
    kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "none": ()}
    net = build(dataclasses.replace(config, norm=norm))
    assert net(torch.rand(2, 3, 16, 16)).shape[0] == 2
    norms = [m for m in net.modules() if isinstance(m, nn.InstanceNorm2d | nn.BatchNorm2d | nn.GroupNorm)]
    assert len(norms) == (0 if norm == "none" else expected)
    assert all(isinstance(m, kinds.get(norm, nn.InstanceNorm2d)) for m in norms)
    assert all(m.affine == (norm != "instance") for m in norms)


@pytest.mark.parametrize(
    ("width", "groups"), [(1, 1), (15, 1), (16, 1), (32, 2), (40, 2), (50, 2), (53, 1), (64, 4), (256, 16)]
)
def test_a_group_has_about_sixteen_channels(width, groups):
    assert norm_layer("group", width).num_groups == groups


@pytest.mark.parametrize(("norm", "suppressed"), [("instance", 1), ("group", 16)])
def test_a_spike_suppresses_its_own_channel_and_with_a_group_norm_its_group(norm, suppressed):
    maps = torch.randn(1, 32, 16, 16)
    maps[0, 0, 3, 3] = 1000
    contrast = norm_layer(norm, 32)(maps)[0, :, 8:].std((1, 2)) / maps[0, :, 8:].std((1, 2))
    assert (contrast < 0.1).tolist() == [True] * suppressed + [False] * (32 - suppressed)


# -- initial weights, frozen parts -----------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_each_initialisation_has_its_spread_and_biases_of_zero(init):
    net = build_generator(GeneratorConfig(ngf=16, num_residual=1), init)
    fan = 64 * 9
    expected = {
        "normal": 0.02,
        "xavier": 0.02 * math.sqrt(2 / (2 * fan)),
        "kaiming": math.sqrt(2 / fan),
        "orthogonal": 0.02 / math.sqrt(fan),
    }
    assert net.blocks[0].body[1].weight.std().item() == pytest.approx(expected[init], rel=0.05)
    assert all(not p.any() for name, p in net.named_parameters() if name.endswith("bias"))
    with pytest.raises(KeyError, match="zero"):
        build_generator(GeneratorConfig(ngf=2), "zero")


def test_batch_norms_start_near_one():
    net = build_generator(GeneratorConfig(ngf=16, num_residual=9, norm="batch"))
    scales = torch.cat([m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert scales.mean().item() == pytest.approx(1, abs=0.003)
    assert scales.std().item() == pytest.approx(0.02, rel=0.1)


def test_an_instance_norm_with_a_learned_scale_starts_as_one_without():
    plain = build_generator(GeneratorConfig(ngf=2, num_residual=1)).double()
    affine = build_generator(GeneratorConfig(ngf=2, num_residual=1, norm="instance_affine")).double()
    affine.load_state_dict(plain.state_dict(), strict=False)
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    assert torch.allclose(affine(x), plain(x), atol=1e-12)


def test_frozen_parts_have_no_gradient_and_keep_their_running_statistics():
    networks = {
        "G_AB": build_generator(GeneratorConfig(ngf=2, num_residual=1, norm="batch")),
        "D_A": build_discriminator(DiscriminatorConfig(ndf=2, n_layers=1, norm="batch")),
    }
    freeze(networks, ["stem", "D"])
    before = {name: copy.deepcopy(net.state_dict()) for name, net in networks.items()}
    for net in networks.values():
        net(torch.rand(2, 3, 16, 16))
    for name, net in networks.items():
        frozen = [key for key, p in net.named_parameters() if not p.requires_grad]
        assert frozen == [key for key, _ in net.named_parameters() if name == "D_A" or key.startswith("stem.")]
        changed = [key for key, value in net.state_dict().items() if not torch.equal(value, before[name][key])]
        assert bool(changed) == (name == "G_AB")
        assert not any(key.startswith("stem.") for key in changed)
