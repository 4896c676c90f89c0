"""Generators of other projects: files made up after their key tables, judged by forward passes written here."""

import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models import GeneratorConfig, build_generator
from utils import InputError, save_state
from weights import load_generator, save_generator, to_junyanz

NGF = 4
JUNYANZ, PYTORCH_GAN = ("conv_block", "deconv"), ("block", "resize")


def foreign(blocks=1, project=JUNYANZ, n=2, channels=3, norm="instance", second=5, stale=()):
    """Random weights under the names and shapes of another project; stale: statistics beside instance norms."""
    source, state, (block, up) = torch.Generator().manual_seed(0), {}, project

    def noise(*shape):
        return torch.randn(*shape, generator=source) * 0.1

    def conv(name, width_in, width_out, side, transposed=False, bias=norm == "instance"):
        widths = (width_in, width_out) if transposed else (width_out, width_in)
        state[f"{name}.weight"] = noise(*widths, side, side)
        if bias:
            state[f"{name}.bias"] = noise(width_out)

    def normed(name, width):
        if norm == "batch":
            state[f"{name}.weight"], state[f"{name}.bias"] = 1 + noise(width), noise(width)
        if norm == "batch" or "mean" in stale:
            state[f"{name}.running_mean"], state[f"{name}.running_var"] = noise(width), 1 + noise(width).abs()
        if norm == "batch" or "count" in stale:
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    width, at = NGF, 4
    conv("model.1", channels, width, 7)
    normed("model.2", width)
    for _ in range(n):
        conv(f"model.{at}", width, 2 * width, 3)
        width *= 2
        normed(f"model.{at + 1}", width)
        at += 3
    for _ in range(blocks):
        for place in (1, second):
            conv(f"model.{at}.{block}.{place}", width, width, 3)
            normed(f"model.{at}.{block}.{place + 1}", width)
        at += 1
    for _ in range(n):
        at += up == "resize"
        conv(f"model.{at}", width, width // 2, 3, transposed=up == "deconv")
        width //= 2
        normed(f"model.{at + 1}", width)
        at += 3
    conv(f"model.{at + 1}", width, channels, 7, bias=True)
    return state


def translate(state, x, blocks=1, project=JUNYANZ, n=2, norm="instance", second=5, resize_pad="reflect"):
    """What the other project computes, in plain function calls.

    PyTorch-GAN pads with zeros after upsampling: resize_pad="constant". The networks here use reflection.
    """
    block, up = project

    def conv(x, name, pad=0, mode="reflect", **how):
        return F.conv2d(F.pad(x, [pad] * 4, mode), state[f"{name}.weight"], state.get(f"{name}.bias"), **how)

    def normed(x, name):
        if norm == "none":
            return x
        if norm == "instance":
            mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
            return (x - mean) / (var + 1e-5).sqrt()
        stats = [state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *stats, training=False)

    x, at = F.relu(normed(conv(x, "model.1", 3), "model.2")), 4
    for _ in range(n):
        x = F.relu(normed(conv(x, f"model.{at}", stride=2, padding=1), f"model.{at + 1}"))
        at += 3
    for _ in range(blocks):
        name = f"model.{at}.{block}"
        y = F.relu(normed(conv(x, f"{name}.1", 1), f"{name}.2"))
        x = x + normed(conv(y, f"{name}.{second}", 1), f"{name}.{second + 1}")
        at += 1
    for _ in range(n):
        if up == "resize":
            at += 1
            x = conv(F.interpolate(x, scale_factor=2), f"model.{at}", 1, resize_pad)
        else:
            kernel, bias = state[f"model.{at}.weight"], state.get(f"model.{at}.bias")
            x = F.conv_transpose2d(x, kernel, bias, stride=2, padding=1, output_padding=1)
        x = F.relu(normed(x, f"model.{at + 1}"))
        at += 3
    return torch.tanh(conv(x, f"model.{at + 1}", 3))


def load(state, name="latest_net_G.pth", **how):
    torch.save(state, name, **how)
    return load_generator(Path(name))


def picture(channels=3, side=32):
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def assert_same(state, net, recipe, **variant):
    """The loaded network computes what `state` does in its own project; in float64, beyond the noise of rounding."""
    x = picture(net.config.channels).double()
    state = {name: value.double() for name, value in state.items()}
    variant = {key: value for key, value in variant.items() if key not in ("channels", "stale")}
    with torch.no_grad():
        mine, theirs = net.double()(x), translate(state, x, **variant)
    assert theirs.std() > 0.05  # not all alike
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-9)
    assert not net.training
    assert recipe["layout"] == ("junyanz" if variant.get("project", JUNYANZ) == JUNYANZ else "pytorch_gan")
    assert (recipe["size"], recipe["range"]) == (None, [-1, 1])
    assert GeneratorConfig(**recipe["config"]) == net.config


def refused(value, *words):
    """One line that holds all the words."""
    with pytest.raises(InputError) as error:
        load(value)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# The made-up files are those of the tables


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ({}, 48),
        ({"stale": ("mean",)}, 94),
        ({"stale": ("mean", "count")}, 117),
        ({"norm": "batch"}, 140),
        ({"norm": "none"}, 25),
        ({"project": PYTORCH_GAN}, 48),
    ],
)
def test_the_made_up_files_have_as_many_tensors_as_real_ones(variant, count):
    assert len(foreign(9, **variant)) == count


@pytest.mark.parametrize(
    ("blocks", "project", "shapes"),
    [
        (9, JUNYANZ, {19: (16, 8, 3, 3), 22: (8, 4, 3, 3), 26: (3, 4, 7, 7)}),
        (6, JUNYANZ, {16: (16, 8, 3, 3), 19: (8, 4, 3, 3), 23: (3, 4, 7, 7)}),
        (9, PYTORCH_GAN, {20: (8, 16, 3, 3), 24: (4, 8, 3, 3), 28: (3, 4, 7, 7)}),
        (6, PYTORCH_GAN, {17: (8, 16, 3, 3), 21: (4, 8, 3, 3), 25: (3, 4, 7, 7)}),
    ],
)
def test_the_made_up_files_are_numbered_as_real_ones(blocks, project, shapes):
    state = foreign(blocks, project)
    for place, shape in {1: (4, 3, 7, 7), 4: (8, 4, 3, 3), 7: (16, 8, 3, 3), **shapes}.items():
        assert state[f"model.{place}.weight"].shape == shape
    for place in range(10, 10 + blocks):
        assert state[f"model.{place}.{project[0]}.5.weight"].shape == (16, 16, 3, 3)


# Reading


@pytest.mark.parametrize("project", [JUNYANZ, PYTORCH_GAN])
@pytest.mark.parametrize(
    "variant",
    [
        {"blocks": 9},
        {"blocks": 6},
        {"blocks": 0},
        {"blocks": 2, "n": 0},
        {"blocks": 1, "n": 1},
        {"blocks": 1, "n": 3},
        {"blocks": 0, "n": 4},
        {"blocks": 2, "channels": 1},
        {"blocks": 6, "stale": ("mean",)},
        {"blocks": 9, "stale": ("mean", "count")},
        {"blocks": 6, "second": 6},
        {"blocks": 2, "second": 6, "stale": ("mean", "count")},
        {"blocks": 9, "norm": "batch"},
        {"blocks": 2, "norm": "batch", "second": 6},
        {"blocks": 1, "norm": "none"},
    ],
    ids=str,
)
def test_a_foreign_generator_computes_what_it_computed_at_home(project, variant):
    state = foreign(project=project, **variant)
    net, recipe = load(state)
    assert_same(state, net, recipe, project=project, **variant)
    config = net.config
    assert (config.num_residual, config.n_downsampling) == (variant["blocks"], variant.get("n", 2))
    assert (config.norm, config.ngf) == (variant.get("norm", "instance"), NGF)
    assert (config.upsample, config.channels) == (project[1], variant.get("channels", 3))


def test_a_network_without_blocks_and_strides_is_read():
    state = foreign(0, n=0)
    net, recipe = load(state)
    assert_same(state, net, recipe, blocks=0, n=0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.module."])
@pytest.mark.parametrize("container", [None, "state_dict", "model_state_dict"])
def test_prefixes_and_containers_are_taken_off(prefix, container):
    state = foreign(2, norm="batch")
    wrapped = OrderedDict((prefix + name, x) for name, x in state.items())
    net, recipe = load({container: wrapped, "epoch": 3} if container else wrapped)
    assert_same(state, net, recipe, blocks=2, norm="batch")


def test_a_prefix_inside_the_name_is_taken_off():
    state = foreign(2)
    net, recipe = load({name.replace("model.", "model.module.", 1): x for name, x in state.items()})
    assert_same(state, net, recipe, blocks=2)


def test_a_module_saved_by_the_old_writer_is_read():
    """Files of 2018: no zip archive, and version metadata that calls running statistics unexpected."""
    state = OrderedDict(foreign(2, stale=("mean", "count")))
    state._metadata = OrderedDict({"": {"version": 1}, "model.2": {"version": 2}})
    net, recipe = load(state, _use_new_zipfile_serialization=False)
    assert_same(state, net, recipe, blocks=2)


def test_half_precision_and_parameters_become_float32():
    state = {name: torch.nn.Parameter(x.half()) for name, x in foreign(2).items()}
    net, recipe = load(state)
    assert net.stem[1].weight.dtype == torch.float32
    assert_same({name: x.float() for name, x in state.items()}, net, recipe, blocks=2)


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("latest_net_G_A.pth", "AtoB"),
        ("200_net_G_B.pth", "BtoA"),
        ("net_G_A.pth", "AtoB"),
        ("G_AB_199.pth", "AtoB"),
        ("G_BA_0.pth", "BtoA"),
        ("net_G_BA.pth", "BtoA"),
        ("latest_net_G.pth", None),
        ("net_G_Apples.pth", None),
        ("BIG_AB.pth", None),
        ("horse2zebra.pth", None),
    ],
)
def test_the_direction_is_in_the_name(name, direction):
    assert load(foreign(), name)[1]["direction"] == direction


def test_the_folder_tells_no_direction(tmp_path):
    (tmp_path / "G_AB").mkdir()
    assert load(foreign(), "G_AB/latest_net_G.pth")[1]["direction"] is None


def test_a_file_of_ours_is_known_by_its_content(tmp_path):
    net = build_generator(GeneratorConfig(ngf=4, num_residual=1))
    save_generator(tmp_path / "G", net, {"direction": "BtoA", "size": [16, 16]})
    back, recipe = load_generator(tmp_path / "G")
    assert torch.equal(back.stem[1].weight, net.stem[1].weight)
    assert recipe["direction"] == "BtoA"


# What is said


def test_a_plain_file_is_read_without_a_word(capsys):
    load(foreign(2, stale=("mean", "count")))
    load(foreign(2, norm="batch"))
    load(foreign(2, PYTORCH_GAN, n=0))
    assert capsys.readouterr().out == ""


def test_missing_biases_before_an_instance_norm_are_zeros_and_said(capsys):
    state = foreign(2)
    del state["model.1.bias"], state["model.11.conv_block.5.bias"], state["model.12.bias"]
    net, recipe = load(state)
    assert_same(state, net, recipe, blocks=2)
    assert "missing model.1.bias (3 such tensors); filled with zeros" in capsys.readouterr().out


def test_tracked_statistics_mark_an_instance_norm_even_without_biases(capsys):
    state = {name: x for name, x in foreign(2, stale=("mean",)).items() if x.dim() != 1 or "running" in name}
    state["model.19.bias"] = torch.zeros(3)
    net, recipe = load(state)
    assert_same(state, net, recipe, blocks=2)
    assert "missing model.1.bias (9 such tensors); filled with zeros" in capsys.readouterr().out


def test_a_network_without_norms_is_said(capsys):
    load(foreign(norm="none"))
    said = capsys.readouterr().out
    assert "missing model.1.bias (7 such tensors) and no sign of a norm: read as a network without norms" in said
    assert said.count("\n") == 1


def test_batch_norms_from_before_they_counted_are_read(capsys):
    state = {name: x for name, x in foreign(2, norm="batch").items() if not name.endswith("tracked")}
    net, recipe = load(state)
    assert_same(state, net, recipe, blocks=2, norm="batch")
    assert (
        "missing model.10.conv_block.2.num_batches_tracked (9 such tensors); filled with zeros"
        in capsys.readouterr().out
    )


def test_the_zero_padding_of_pytorch_gan_is_said_and_changes_little_but_the_border(capsys):
    state, x = foreign(2, PYTORCH_GAN), picture(side=64)
    net, _ = load(state, "G_AB_9.pth")
    assert "G_AB_9.pth: PyTorch-GAN pads with zeros after upsampling" in capsys.readouterr().out
    with torch.no_grad():
        apart = (net(x) - translate(state, x, 2, PYTORCH_GAN, resize_pad="constant")).abs()
    inner = apart[..., 8:-8, 8:-8].mean()
    assert 0 < inner < 0.1
    assert apart[..., :2].mean() > 3 * inner


# Refusals


def rename(state, old, new):
    return {re.sub(old, new, name): x for name, x in state.items()}


def without(state, *names):
    return {name: x for name, x in state.items() if name not in names}


DISCRIMINATOR = {"model.0.weight": torch.zeros(4, 3, 4, 4), "model.0.bias": torch.zeros(4)}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (foreign() | {"model.7.filt": torch.zeros(4, 1, 3, 3)}, ["CUT generator with antialiasing filters"]),
        ({"model.model.0.weight": torch.zeros(4, 3, 4, 4)}, ["a U-Net of pytorch-CycleGAN-and-pix2pix"]),
        ({"module.model.model.0.weight": torch.zeros(4, 3, 4, 4)}, ["a U-Net of"]),
        ({"net.modnet.weight": torch.zeros(4)}, ["a network of UVCGAN"]),
        (DISCRIMINATOR, ["holds a discriminator", "expected a ResNet generator"]),
        (DISCRIMINATOR | {"model.2.filt": torch.zeros(4, 1, 3, 3)}, ["holds a discriminator"]),
        ({"net.0.weight": torch.zeros(4, 3, 1, 1)}, ["holds a discriminator"]),
        ({name: torch.zeros(1) for name in "edcba"}, ["an unknown layout (a, b, c)"]),
        ({"model.1.weight": torch.zeros(4)}, ["an unknown layout (model.1.weight)"]),
        ({"a\nb": torch.zeros(1)}, [r"(a\nb)"]),
        (
            {"model.1.weight": torch.zeros(4, 3, 7, 7)},
            ["does not fit the network: model.5.bias is missing; model.5.weight is missing"],
        ),
        ({"format": 1, "nets": {}}, ["a whole training state", "--run_name and --epoch", "G_AB.safetensors"]),
        ({}, ["holds no tensors by name"]),
        (torch.zeros(3), ["holds no tensors by name"]),
        ([1, 2], ["holds no tensors by name"]),
        ({1: torch.zeros(3)}, ["holds no tensors by name"]),
        ({"model_state_dict": {"generator_ab": foreign()}}, ["holds no tensors by name"]),
        ({"model.1.weight": torch.zeros(1).expand(4, 3, 7, 7)}, ["holds no tensors by name"]),
        ({"model.1.weight": torch.zeros(4, 3, 7, 7).to_sparse()}, ["holds no tensors by name"]),
        ({"model.1.weight": torch.zeros(4, 3, 7, 7, device="meta")}, ["holds no tensors by name"]),
        (without(foreign(), "model.18.bias"), ["(junyanz layout)", "model.18.bias is missing"]),
        (without(foreign(), "model.4.weight"), ["model.4.weight is missing"]),
        (without(foreign(norm="batch"), "model.5.running_var"), ["model.5.running_var is missing"]),
        (without(foreign(norm="batch"), "model.5.bias"), ["model.5.bias is missing"]),
        (without(foreign(norm="batch"), "model.2.weight"), ["model.10.conv_block.2.bias is not part"]),
        (foreign(norm="batch") | {"model.1.bias": torch.zeros(4)}, ["model.1.bias is not part of this network"]),
        (foreign() | {"model.2.weight": torch.ones(4)}, ["model.2.weight is not part of this network"]),
        (foreign() | {"model.1.running_mean": torch.ones(4)}, ["model.1.running_mean is not part of this network"]),
        (foreign() | {"n_averaged": torch.tensor(3)}, ["n_averaged is not part of this network"]),
        (foreign() | {"model.1.bias": torch.full((4,), float("nan"))}, ["model.1.bias is not finite"]),
        (foreign() | {"model.1.bias": torch.full((4,), 1e300, dtype=torch.float64)}, ["model.1.bias is not finite"]),
        (foreign() | {"model.1.bias": torch.zeros(4, dtype=torch.int64)}, ["model.1.bias is torch.int64"]),
        (foreign() | {"model.1.weight": torch.zeros(4, 4, 7, 7)}, ["model.1.weight is (4, 4, 7, 7), expected (4, 3,"]),
        (foreign() | {"model.1.weight": torch.zeros(0, 3, 7, 7)}, ["model.1.weight is (0, 3, 7, 7), expected (1, 3,"]),
        (foreign(n=5), ["model.16.bias is not part of this network"]),
        (foreign() | {"model.9999.weight": torch.zeros(1, 1, 1, 1)}, ["does not fit the network", "more"]),
        (foreign(2, ("conv_block", "resize")), ["does not fit the network"]),
        (foreign(2, ("block", "deconv")), ["does not fit the network"]),
        (rename(foreign(2), r"conv_block\.1\.", "conv_block.0."), ["conv_block.0.bias is not part"]),
        (rename(foreign(2), r"model\.11\.", "model.111."), ["model.11", "does not fit the network"]),
        (foreign() | {"a\nb": torch.zeros(1)}, [r"a\nb is not part of this network"]),
    ],
)
def test_what_is_no_generator_of_a_known_layout_is_refused_by_name(state, words):
    refused(state, *words)


def test_a_resize_file_in_a_deconv_layout_is_refused_by_its_shapes():
    """Convolutions have the number of outputs first, transposed ones the number of inputs."""
    state = foreign(2)
    state["model.12.weight"] = state["model.12.weight"].transpose(0, 1).contiguous()
    refused(state, "model.12.weight is (8, 16, 3, 3), expected (16, 8, 3, 3)")


def test_a_training_state_of_ours_is_refused(tmp_path):
    save_state(tmp_path / "latest.pt", {"stage": "train", "nets": {}})
    with pytest.raises(InputError, match="whole training state; name it by --run_name and --epoch"):
        load_generator(tmp_path / "latest.pt")


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def test_nothing_in_a_file_is_executed():
    refused(foreign() | {"trap": Trap()}, "not a readable checkpoint of plain tensors and values")
    assert not Path("sprung").exists()


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "latest_net_G.pth"
    torch.save(foreign(), path)
    whole = path.read_bytes()
    for data in (b"", b"PK", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(data)
        with pytest.raises(InputError, match="not a readable checkpoint"):
            load_generator(path)
    place = whole.index(foreign()["model.1.bias"].numpy().tobytes())  # one bit of one weight
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(InputError, match="damaged"):
        load_generator(path)


# Writing


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize(("blocks", "n", "channels"), [(9, 2, 3), (6, 2, 1), (0, 0, 3), (1, 3, 3)])
def test_ours_to_junyanz_and_back_is_exact(norm, blocks, n, channels):
    config = GeneratorConfig(ngf=NGF, num_residual=blocks, n_downsampling=n, channels=channels, norm=norm)
    net = build_generator(config)
    for name, x in net.state_dict().items():
        if x.is_floating_point() and not (norm == "none" and name.endswith(".bias") and name != "head.1.bias"):
            x.uniform_(0.1, 1)
    state = to_junyanz(net)
    table = foreign(blocks, n=n, channels=channels, norm=norm)
    assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in table.items()}
    back, recipe = load(state, "latest_net_G_B.pth")
    assert recipe["direction"] == "BtoA"
    assert back.config == config
    for name, x in net.state_dict().items():
        assert torch.equal(back.state_dict()[name], x)


def test_theirs_to_ours_and_back_is_exact():
    state = foreign(2, norm="batch")
    back = to_junyanz(load(state)[0])
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], x) for name, x in state.items())


def test_what_is_written_computes_the_same_over_there():
    net = build_generator(GeneratorConfig(ngf=NGF, num_residual=2), init="kaiming").eval()
    x = picture()
    with torch.no_grad():
        assert torch.allclose(translate(to_junyanz(net), x, 2), net(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"upsample": "resize"}, "upsample resize"),
        ({"norm_output": True}, "norm_output"),
        ({"norm": "none"}, "norm none with biases"),
        ({"generator": "unet_vit"}, "generator unet_vit"),
    ],
)
def test_what_the_junyanz_layout_cannot_hold_is_refused(change, word):
    config = GeneratorConfig(ngf=NGF, num_residual=1, **change)
    net = build_generator(replace(config, generator="resnet"))
    net.config = config
    net.stem[1].bias.data.fill_(1.0)
    with pytest.raises(InputError, match=rf"{word}.*junyanz layout cannot hold it"):
        to_junyanz(net)
