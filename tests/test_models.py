import math

import pytest
import torch
from torch import nn

from models import (
    INITS,
    DiscriminatorConfig,
    GeneratorConfig,
    build_discriminator,
    build_generator,
    cyclegan_loss,
    gan_loss_D,
    gan_loss_G,
    picture_loss,
)


def count(net):
    return sum(p.numel() for p in net.parameters())


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
    ],
)
def test_generator_parameter_counts_are_those_of_the_paper_and_its_variants(flags, parameters):
    with torch.device("meta"):
        assert count(build_generator(GeneratorConfig(**flags))) == parameters


@pytest.mark.parametrize(
    ("flags", "parameters"),
    [
        ({"n_layers": 1}, 136_385),
        ({"n_layers": 2}, 662_977),
        ({"n_layers": 3}, 2_764_737),
        ({"n_layers": 4}, 6_959_553),
        ({"n_layers": 3, "max_mult": 2}, 3_136 + 131_200 + 2 * 262_272 + 2_049),
        ({"discriminator": "pixel"}, 8_705),
    ],
)
def test_discriminator_parameter_counts(flags, parameters):
    with torch.device("meta"):
        assert count(build_discriminator(DiscriminatorConfig(**flags))) == parameters


@pytest.mark.parametrize("upsample", ["deconv", "resize"])
@pytest.mark.parametrize("n_downsampling", range(5))
@pytest.mark.parametrize("size", [(32, 32), (33, 46), (50, 35)])
def test_generator_keeps_any_size_and_stays_in_range(upsample, n_downsampling, size):
    config = GeneratorConfig(channels=1, ngf=2, num_residual=1, upsample=upsample, n_downsampling=n_downsampling)
    answer = build_generator(config)(torch.rand(2, 1, *size) * 2 - 1)
    assert answer.shape == (2, 1, *size)
    assert answer.abs().max() <= 1


def test_padding_to_a_multiple_changes_nothing_for_sizes_that_divide():
    net = build_generator(GeneratorConfig(ngf=2, num_residual=1))
    x = torch.rand(1, 3, 20, 24)
    y = net.head(net.up(net.blocks[0](net.down(net.stem(x))))).tanh()
    assert torch.equal(net(x), y)


@pytest.mark.parametrize("n_downsampling", range(5))
def test_smallest_side_works_and_one_less_is_refused(n_downsampling):
    config = GeneratorConfig(ngf=2, num_residual=1, n_downsampling=n_downsampling)
    net, side = build_generator(config), config.smallest_side
    assert net(torch.zeros(1, 3, side, side)).shape == (1, 3, side, side)
    with pytest.raises(ValueError, match=f"at least {side} px"):
        net(torch.zeros(1, 3, side, side - 1))


def test_hidden_states_are_the_outputs_of_all_blocks():
    net = build_generator(GeneratorConfig(ngf=2, num_residual=3))
    x = torch.rand(1, 3, 16, 16)
    answer, hidden = net(x, return_hidden=True)
    assert torch.equal(answer, net(x))
    assert [h.shape for h in hidden] == [(1, 8, 4, 4)] * 3
    expected = net.blocks[0](net.down(net.stem(x)))
    assert torch.equal(hidden[0], expected)
    assert not torch.equal(hidden[0], hidden[1])


def test_output_layer_has_no_norm_unless_asked_for():
    def norms(net):
        return [m for m in net.head if isinstance(m, nn.InstanceNorm2d)]

    assert norms(build_generator(GeneratorConfig(ngf=2))) == []
    net = build_generator(GeneratorConfig(ngf=2, norm_output=True))
    assert len(norms(net)) == 1
    with torch.no_grad():
        before_tanh = torch.atanh(net(torch.rand(1, 3, 32, 32, dtype=torch.float32)).clamp(-0.999999, 0.999999))
    assert before_tanh.mean((2, 3)).abs().max() < 0.05  # so no picture can be dark as a whole


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_norm_flag_reaches_every_network(norm):
    kinds = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d}
    nets = [
        build_generator(GeneratorConfig(ngf=2, num_residual=1, norm=norm)),
        build_discriminator(DiscriminatorConfig(ndf=2, n_layers=2, norm=norm)),
        build_discriminator(DiscriminatorConfig("pixel", ndf=2, norm=norm)),
    ]
    for net, expected in zip(nets, (7, 2, 1), strict=True):
        found = [m for m in net.modules() if isinstance(m, tuple(kinds.values()))]
        assert len(found) == (0 if norm == "none" else expected)
        assert norm == "none" or all(isinstance(m, kinds[norm]) for m in found)
        assert net(torch.rand(2, 3, 16, 16)).shape[0] == 2


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [64, 50])
def test_discriminator_map_is_as_large_as_its_config_says(n_layers, side):
    config = DiscriminatorConfig(ndf=2, n_layers=n_layers)
    assert build_discriminator(config)(torch.zeros(1, 3, side, 64)).shape == (
        1,
        1,
        config.map_side(side),
        config.map_side(64),
    )


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


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="init 'zero'"):
        build_generator(GeneratorConfig(ngf=2), "zero")
    with pytest.raises(ValueError, match="generator 'unet'"):
        build_generator(GeneratorConfig("unet"))
    with pytest.raises(ValueError, match="discriminator 'style'"):
        build_discriminator(DiscriminatorConfig("style"))
    for loss in (
        lambda kind: gan_loss_G(torch.ones(1), kind),
        lambda kind: gan_loss_D(torch.ones(1), torch.ones(1), kind),
    ):
        with pytest.raises(ValueError, match="gan_loss 'wgan'"):
            loss("wgan")


def test_adversarial_losses_by_hand():
    real, fake = torch.tensor([0.5, 1.0]), torch.tensor([0.0, 2.0])
    assert gan_loss_D(real, fake).item() == pytest.approx(((0.25 + 0) / 2 + (0 + 4) / 2) / 2)
    assert gan_loss_G(fake).item() == pytest.approx((1 + 1) / 2)
    log = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(2))]
    assert gan_loss_D(real, fake, "bce").item() == pytest.approx(sum(log) / 4)
    assert gan_loss_G(fake, "bce").item() == pytest.approx((math.log(2) + math.log1p(math.exp(-2))) / 2)
    assert gan_loss_D(real, fake, "hinge").item() == pytest.approx((0.25 + (1 + 3) / 2) / 2)
    assert gan_loss_G(fake, "hinge").item() == pytest.approx(-1)


def test_an_undecided_lsgan_discriminator_loses_a_quarter():
    half = torch.full((4,), 0.5)
    assert gan_loss_D(half, half).item() == pytest.approx(0.25)


def test_cyclegan_loss_is_the_weighted_sum_of_its_terms():
    def flat(value):
        return torch.full((1, 3, 4, 4), value)

    pictures = {"real_A": flat(0.0), "rec_A": flat(0.1), "idt_A": flat(0.3)}
    pictures |= {"real_B": flat(1.0), "rec_B": flat(0.8), "idt_B": flat(0.6)}
    judged = {"fake_A": torch.tensor([0.5]), "fake_B": torch.tensor([0.0])}
    loss, terms = cyclegan_loss(pictures, judged, lambda_gan=2, lambda_cycle=10, lambda_identity=5)
    by_hand = {"gan_AB": 1.0, "gan_BA": 0.25, "cycle_A": 0.1, "cycle_B": 0.2, "identity_A": 0.3, "identity_B": 0.4}
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(by_hand)
    assert loss.item() == pytest.approx(2 * 1.25 + 10 * 0.3 + 5 * 0.7)
    loss, terms = cyclegan_loss(pictures, judged, lambda_identity=0)
    assert "identity_A" not in terms
    assert loss.item() == pytest.approx(1.25 + 3)


def test_losses_are_computed_in_float32_from_half_precision():
    x = torch.full((1, 3, 64, 64), 0.1, dtype=torch.bfloat16)
    assert picture_loss(x, torch.zeros(1, 3, 64, 64)).dtype == torch.float32
    assert gan_loss_D(x, x).dtype == torch.float32


def test_picture_loss_refuses_what_would_broadcast():
    with pytest.raises(ValueError, match="shapes differ"):
        picture_loss(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))
