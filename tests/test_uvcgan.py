"""Generators of UVCGAN, and networks that --vit_size uvcgan once was. Theirs are written here anew, in plain torch."""

import re
from itertools import pairwise

import pytest
import torch
from conftest import make_dataset
from safetensors.torch import load_file
from tiny_runs import save_run, state_of
from torch import nn

import train
from models import VIT_SIZES, GeneratorConfig, VitSize, build_generator
from toolkit.checkpoints import RUNS, load_state, networks_of, save_state
from toolkit.weights import load_generator, save_generator
from utils import InputError

WIDTHS = (4, 4, 8, 12)
HEADS = 6


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch):
    for name in ("uvcgan", "uvcgan_v0"):
        monkeypatch.setitem(VIT_SIZES, name, VitSize(WIDTHS, ffn=24, blocks=12, heads=HEADS, uvcgan_layers=True))


def nested(**parts):
    """A module that is only there for the names of its parts."""
    module = nn.Module()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


def two_convs(width_in, width, width_out):
    layers = []
    for a, b in ((width_in, width), (width, width_out)):
        layers += [nn.InstanceNorm2d(a), nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU()]
    return nested(block=nn.Sequential(*layers))


class UvcganUnetVit(nn.Module):
    """The published UNet-ViT for square images in [0, 1], of random weights; a side of the transformer's map has n pixels."""

    def __init__(self, n, channels=3, blocks=2, widths=WIDTHS):
        super().__init__()
        width = widths[-1]
        self.net = nested(layer_input=nn.Sequential(nn.Conv2d(channels, widths[0], 3, padding=1), nn.LeakyReLU()))
        self.net.add_module("layer_output", nn.Conv2d(widths[0], channels, 1))
        self.levels = []
        last, name = self.net, "unet"
        for thin, wide in pairwise(widths):
            conv = nested(block=two_convs(thin, wide, wide), downsample=nn.Conv2d(wide, wide, 2, stride=2))
            upsample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(wide, wide, 3, padding=1))
            level = nested(conv=conv, deconv=nested(block=two_convs(2 * wide, wide, thin), upsample=upsample))
            last.add_module(name, level)
            self.levels.append(level)
            last, name = level, "inner_module"
        start = nested(embed=nested(projector=nn.Linear(2, width)), output=nn.Linear(2 * width, width))
        start.register_buffer("x_const", torch.arange(float(n)).repeat_interleave(n)[None])
        start.register_buffer("y_const", torch.arange(float(n)).repeat(n)[None])
        encoder = nn.Sequential(*(self.block(width) for _ in range(blocks)))
        vit = nested(trans_input=start, encoder=nested(encoder=encoder), trans_output=nn.Linear(width, width))
        last.add_module(name, vit)
        for x in self.parameters():
            nn.init.normal_(x, std=0.5 if x.dim() == 1 else (2 / x[0].numel()) ** 0.5)
        self.eval().requires_grad_(False)

    @staticmethod
    def block(width):
        ffn = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
        block = nested(norm1=nn.LayerNorm(width), norm2=nn.LayerNorm(width), ffn=nested(net=ffn))
        block.add_module("atten", nn.MultiheadAttention(width, HEADS, batch_first=True))
        block.re_alpha = nn.Parameter(torch.zeros(1))
        return block

    def transform(self, x):
        vit = self.levels[-1].inner_module
        start = vit.trans_input
        n = x.shape[-1]
        where = torch.cat([start.x_const, start.y_const]).T * 2 / (n - 1) - 1
        waves = torch.sin(start.embed.projector(where)).expand(len(x), -1, -1)
        y = start.output(torch.cat([waves, x.flatten(2).transpose(1, 2)], dim=2))
        for block in vit.encoder.encoder:
            z = block.norm1(y)
            y = y + block.re_alpha * block.atten(z, z, z)[0]
            y = y + block.re_alpha * block.ffn.net(block.norm2(y))
        return vit.trans_output(y).transpose(1, 2).unflatten(2, (n, n))

    def forward(self, x):
        x = self.net.layer_input(x)
        skips = []
        for level in self.levels:
            skips.append(level.conv.block.block(x))
            x = level.conv.downsample(skips[-1])
        x = self.transform(x)
        for level in reversed(self.levels):
            x = level.deconv.block.block(torch.cat([level.deconv.upsample(x), skips.pop()], dim=1))
        return torch.sigmoid(self.net.layer_output(x))


def uvcgan_resnet(channels=3, norm=nn.InstanceNorm2d):
    """The ResNet of UVCGAN, without blocks and with one downsampling layer; only for colours it has a sigmoid."""
    bias = norm is nn.InstanceNorm2d
    layers = [nn.ReflectionPad2d(3), nn.Conv2d(channels, 4, 7, bias=bias), norm(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 8, 3, 2, 1, bias=bias), norm(8), nn.ReLU()]
    layers += [nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1, bias=bias), norm(4), nn.ReLU()]
    layers += [nn.ReflectionPad2d(3), nn.Conv2d(4, channels, 7), nn.Sigmoid()]
    for layer in (layers[1], layers[4], layers[7], layers[-2]):
        nn.init.normal_(layer.weight, std=0.3)
    return nested(model=nn.Sequential(*layers)).eval().requires_grad_(False)


def load(state, name="net_gen_ab.pth"):
    torch.save(state, name)
    return load_generator(name)


def assert_same(theirs, net, side):
    """Their network for images in [0, 1] computes what ours does for [-1, 1], in float64."""
    x = torch.rand(2, net.config.channels, side, side, dtype=torch.float64)
    expected = 2 * theirs.double()(x) - 1
    assert expected.std() > 0.05
    with torch.no_grad():
        assert (net.double()(2 * x - 1) - expected).abs().max() < 2e-6  # the weights of our stem are rounded to float32


# -- their files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "direction"), [("net_gen_ab.pth", "AtoB"), ("0500_net_gen_ba.pth", "BtoA"), ("net_encoder.pth", None)]
)
@pytest.mark.parametrize(("channels", "blocks", "n"), [(3, 2, 5), (1, 1, 2)])
def test_a_unet_vit_is_read_exactly_with_its_direction_and_training_size(capsys, name, direction, channels, blocks, n):
    theirs = UvcganUnetVit(n, channels, blocks)
    net, metadata = load(theirs.state_dict(), name)
    assert_same(theirs, net, 8 * n)
    assert (metadata["direction"], metadata["size"]) == (direction, [8 * n, 8 * n])
    config = GeneratorConfig("unet_vit", channels=channels, vit_size="uvcgan", vit_blocks=blocks, vit_heads=HEADS)
    assert net.config == config == GeneratorConfig(**metadata["config"])
    assert f"{name}: a UNet-ViT of UVCGAN, read as the published one" in capsys.readouterr().out


def test_weights_of_a_unet_vit_work_at_another_size_as_in_the_network_that_is_built_for_it():
    small, large = UvcganUnetVit(2), UvcganUnetVit(4)
    large.load_state_dict({name: x for name, x in small.state_dict().items() if "_const" not in name}, strict=False)
    assert_same(large, load(small.state_dict())[0], 32)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.BatchNorm2d])
def test_a_resnet_with_a_name_of_uvcgan_is_read_for_images_in_0_1(capsys, norm):
    theirs = uvcgan_resnet(norm=norm)
    net, metadata = load(theirs.state_dict(), "0010_net_gen_ba.pth")
    assert_same(theirs.model, net, 16)
    assert metadata["direction"] == "BtoA"
    assert "0010_net_gen_ba.pth: a ResNet with a file name of UVCGAN" in capsys.readouterr().out


STATE = UvcganUnetVit(2).state_dict()
POSITIONS = "net.unet.inner_module.inner_module.inner_module.trans_input"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (UvcganUnetVit(2, widths=(4, 4, 8, 18)).state_dict(), ".conv.block.block.1.bias is (18,), expected (12,)"),
        (UvcganUnetVit(2, channels=4).state_dict(), "net.layer_input.0.weight is (4, 4, 3, 3), expected (4, 3, 3, 3)"),
        (
            {**STATE, f"{POSITIONS}.x_const": torch.zeros(1, 4)},
            "coordinates (1, 4) and (1, 4); expected those of a square",
        ),
        (
            {**STATE, f"{POSITIONS}.y_const": torch.zeros(1, 6)},
            "coordinates (1, 4) and (1, 6); expected those of a square",
        ),
        ({name: x for name, x in STATE.items() if "trans" not in name}, "coordinates (0,) and (0,)"),
        ({name: x for name, x in STATE.items() if "layer_input" not in name}, "net.layer_input.0.bias is missing"),
        ({**STATE, "net.unet.deconv.re_alpha": torch.ones(1)}, "net.unet.deconv.re_alpha, (1,), is not part of this"),
        (
            {**STATE, **{f"x.encoder.encoder.{i}.x": torch.ones(1) for i in range(1001)}},
            "vit_blocks 1001: expected at least 0 and at most 1000",
        ),
        (uvcgan_resnet(1).state_dict(), "a ResNet of UVCGAN for grey images ends without a sigmoid"),
    ],
)
def test_other_networks_of_uvcgan_are_refused_in_one_line(state, words):
    with pytest.raises(InputError, match=f"^net_gen_ab.pth: .*{re.escape(words)}") as error:
        load(state)
    assert "\n" not in str(error.value)


# -- files from before --vit_size uvcgan was the published network --------------------------------


def old_network(upsample="deconv", vit_size="uvcgan_v0"):
    return build_generator(GeneratorConfig("unet_vit", vit_size=vit_size, vit_blocks=1, upsample=upsample), "kaiming")


def test_the_old_layers_differ_and_are_no_choice_of_the_command_line(refused):
    old, new = (old_network("resize", name).state_dict() for name in ("uvcgan_v0", "uvcgan"))
    assert old.keys() - new.keys() == {
        f"{layer}.{x}" for layer in ("stem.0", "up.0.0.2", "up.1.0.2", "up.2.0.2") for x in ("weight", "bias")
    }
    assert GeneratorConfig("unet_vit", vit_size="uvcgan").upsample == "resize"
    given = "--dataset_name tiny --generator unet_vit --vit_size".split()
    assert "invalid choice: 'uvcgan_v0' (choose from" in refused(train.main, *given, "uvcgan_v0")
    assert "--upsample deconv: --vit_size uvcgan upsamples by" in refused(
        train.main, *given, "uvcgan", "--upsample", "deconv"
    )


@pytest.mark.parametrize("upsample", ["deconv", "resize"])
@pytest.mark.parametrize("saved_as", ["uvcgan", "uvcgan_v0"])
def test_a_generator_file_with_the_old_layers_gives_the_same_images(monkeypatch, upsample, saved_as):
    net = old_network(upsample)
    x = torch.rand(1, 3, 24, 20)
    expected = net(x)
    object.__setattr__(net.config, "vit_size", saved_as)
    save_generator("G.safetensors", net, {"direction": "AtoB", "size": [32, 32]})
    loaded, metadata = load_generator("G.safetensors")
    assert torch.equal(loaded(x), expected)
    assert (metadata["config"]["vit_size"], metadata["config"]["upsample"]) == (saved_as, upsample)
    assert (loaded.config.vit_size, loaded.config.upsample) == ("uvcgan_v0", upsample)


def test_a_state_with_the_old_layers_goes_on_with_the_flags_it_was_started_with(tmp_path, no_plots):
    make_dataset(tmp_path / "datasets" / "tiny", counts=(2, 2, 1, 1))
    flags = (
        "--generator unet_vit --vit_size uvcgan --upsample deconv --vit_blocks 1 --img_height 16 --img_width 16".split()
    )
    save_run("old", epochs=1, argv=flags, generator="unet_vit", vit_size="uvcgan_v0", vit_blocks=1)
    path = RUNS / "old" / "latest.pt"
    state = load_state(path)
    for name in ("G_AB", "G_BA"):
        state["config"][name]["vit_size"] = "uvcgan"  # as it was saved then
    save_state(path, state)
    assert networks_of(state, path)["G_BA"].config.vit_size == "uvcgan_v0"
    train.main(["--run_name", "old", "--start_from", "latest", "--num_epochs", "2", "--device", "cpu", *flags])
    state = state_of("old")
    assert (state["epoch"], state["config"]["G_BA"]["vit_size"]) == (2, "uvcgan_v0")
    assert (state["args"]["vit_size"], state["args"]["upsample"]) == ("uvcgan", "deconv")
    assert load_file(RUNS / "old" / "G_AB.safetensors").keys() == old_network().state_dict().keys()
