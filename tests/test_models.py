"""Configs, generators, discriminators, their initial weights; directions."""

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
    meta_network,
    norm_layer,
)
from utils import InputError


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.fixture
def tiny_vits(monkeypatch):
    """The two sizes of a UNet-ViT with few channels."""
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, uvcgan_layers=False))
    monkeypatch.setitem(VIT_SIZES, "uvcgan", VitSize((4, 4, 8, 8, 12), ffn=24, blocks=12, heads=6, uvcgan_layers=True))


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
        (GeneratorConfig, {"channels": 17}, "channels 17: expected at least 1 and at most 16"),
        (GeneratorConfig, {"ngf": 5000}, "ngf 5000: expected at least 1 and at most 4096"),
        (GeneratorConfig, {"num_residual": -1}, "num_residual -1: expected at least 0 and at most 1000"),
        (GeneratorConfig, {"n_downsampling": True}, "n_downsampling True: expected int"),
        (GeneratorConfig, {"norm_output": None}, "norm_output None: expected bool"),
        (GeneratorConfig, {"generator": "unet_vit", "vit_heads": 7}, "vit_heads 7: expected a divisor of 256"),
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
    ("n_layers", "size", "message"),
    [
        (5, (64, 64), "--n_layers_D 5: its output for images of 64x64 px would be empty; .* that fits is 4"),
        (1, (5, 8), "images of 8x5 px: the generator needs 8 px"),
    ],
)
def test_images_that_are_too_small_for_a_network_are_refused(n_layers, size, message):
    with pytest.raises(InputError, match=message):
        check_image_size(GeneratorConfig(), DiscriminatorConfig(n_layers=n_layers), *size)
    check_image_size(GeneratorConfig(), DiscriminatorConfig("pixel", n_layers=n_layers), 64, 64)


# -- ResNet generators -----------------------------------------------------------------------

RESNET_9 = 11_378_179
NORM_CHANNELS = 2 * 64 + 2 * 128 + 19 * 256


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({}, RESNET_9),
        ({"num_residual": 6}, 7_837_699),
        ({"ngf": 32}, 2_850_563),
        ({"num_residual": 6, "n_downsampling": 1}, 1_937_539),
        ({"channels": 1}, 11_365_633),
        ({"norm": "batch"}, 11_383_427),
        ({"norm": "instance_affine"}, RESNET_9 + 2 * NORM_CHANNELS),  # a scale and a shift for each channel
        ({"norm": "group"}, RESNET_9 + 2 * NORM_CHANNELS),
        ({"skips": True}, 11_419_331),
        ({"generator": "unet_vit"}, 4_150_727),
        ({"generator": "unet_vit", "vit_size": "uvcgan"}, 31_360_239),  # as published
        ({"generator": "unet_vit", "vit_size": "uvcgan", "vit_blocks": 6}, 20_713_449),
    ],
)
def test_generators_have_the_published_numbers_of_parameters(config, parameters):
    assert count(meta_network(GeneratorConfig(**config))) == parameters


RESNETS = [{"ngf": 2, "num_residual": 2, "n_downsampling": n} for n in range(5)]
VITS = [{"generator": "unet_vit"}, {"generator": "unet_vit", "vit_size": "uvcgan", "vit_blocks": 2, "vit_heads": 3}]


@pytest.mark.parametrize("shape", [*RESNETS, *VITS])
@pytest.mark.parametrize("upsample", ["deconv", "resize"])
@pytest.mark.parametrize("size", [(64, 64), (33, 46), (100, 70)])
def test_generators_translate_images_of_any_size_and_refuse_smaller_ones(tiny_vits, shape, upsample, size):
    config = GeneratorConfig(channels=1, upsample=upsample, **shape)
    net = build_generator(config)
    x = torch.rand(2, 1, *size) * 2 - 1
    output, hidden = net(x, return_hidden=True)
    assert output.shape == x.shape
    assert output.abs().max() <= 1
    height, width = (math.ceil(side / 2**config.downsamplings) for side in size)
    assert [state.shape for state in hidden] == [(2, config.hidden_width, height, width)] * config.blocks
    least = config.smallest_side
    assert net(x[..., :least, :least]).shape == (2, 1, least, least)
    with pytest.raises(ValueError, match=f"at least {least} px"):
        net(x[..., : least - 1])


def test_sizes_that_the_downsampling_does_not_divide_are_padded_by_reflection_and_cropped_back():
    net = build_generator(GeneratorConfig(ngf=2, num_residual=1))
    x = torch.rand(1, 3, 20, 24)
    assert torch.equal(net(x), net.head(net.up(net.blocks[0](net.down(net.stem(x))))).tanh())  # nothing to pad
    x = torch.rand(1, 3, 18, 21)
    assert torch.equal(net(x), net(F.pad(x, (0, 3, 0, 2), mode="reflect"))[..., :18, :21])


def test_hidden_states_are_the_outputs_of_all_blocks():
    net = build_generator(GeneratorConfig(ngf=2, num_residual=3))
    x = torch.rand(1, 3, 16, 16)
    output, hidden = net(x, return_hidden=True)
    assert torch.equal(output, net(x))
    expected = net.down(net.stem(x))
    for block, found in zip(net.blocks, hidden, strict=True):
        expected = block(expected)
        assert torch.equal(found, expected)


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


@pytest.mark.parametrize("generator", ["resnet", "unet_vit"])
def test_the_output_layer_is_normalised_only_with_norm_output(tiny_vits, generator):
    plain = build_generator(GeneratorConfig(generator, ngf=2))
    assert not any(isinstance(module, nn.InstanceNorm2d) for module in plain.head)
    net = build_generator(GeneratorConfig(generator, ngf=2, norm_output=True))
    before_tanh = torch.atanh(net(torch.rand(1, 3, 32, 32)).clamp(-0.999999, 0.999999))
    assert before_tanh.mean((2, 3)).abs().max() < 0.05  # so no image can be dark as a whole


# -- UNet-ViT generators ---------------------------------------------------------------------


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
    ("config", "expected"),
    [
        (GeneratorConfig(ngf=2, num_residual=1), 7),
        (GeneratorConfig("unet_vit"), 7),
        (GeneratorConfig("unet_vit", vit_size="uvcgan", vit_blocks=1), 16),
        (DiscriminatorConfig(ndf=2, n_layers=2), 2),
        (DiscriminatorConfig("pixel", ndf=2), 1),
    ],
)
def test_every_network_has_the_normalisation_of_its_config(tiny_vits, norm, config, expected):
    kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm}
    if isinstance(config, GeneratorConfig):
        net = build_generator(dataclasses.replace(config, norm=norm))
    else:
        net = build_discriminator(dataclasses.replace(config, norm=norm))
        norm = "instance" if norm == "group" else norm  # group norm prevents blobs, which only generators make
    assert net(torch.rand(2, 3, 32, 32)).shape[0] == 2
    norms = [m for m in net.modules() if isinstance(m, nn.InstanceNorm2d | nn.BatchNorm2d | nn.GroupNorm)]
    assert len(norms) == (0 if norm == "none" else expected)
    assert all(isinstance(m, kinds.get(norm, nn.InstanceNorm2d)) for m in norms)
    assert all(m.affine == (norm != "instance") for m in norms)


@pytest.mark.parametrize(
    ("width", "groups"), [(1, 1), (15, 1), (16, 1), (32, 2), (40, 2), (50, 2), (53, 1), (64, 4), (256, 16)]
)
def test_a_group_has_about_sixteen_channels(width, groups):
    assert norm_layer("group", width).num_groups == groups


# -- initial weights -------------------------------------------------------------------------


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
    scale = build_generator(GeneratorConfig(ngf=64, num_residual=1, norm="batch"), init).blocks[0].body[2].weight
    assert (scale.mean().item(), scale.std().item()) == (pytest.approx(1, abs=0.01), pytest.approx(0.02, rel=0.3))
    with pytest.raises(KeyError, match="zero"):
        build_generator(GeneratorConfig(ngf=2), "zero")
