"""Generator files of this project and of others.

The files of other projects are synthetic: they have the names and shapes of real ones. What they should compute is
written here as plain function calls.
"""

import errno
import json
import re
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from breakage import full_disk
from edits import EDITS, FUZZ, edited
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models import DiscriminatorConfig, GeneratorConfig, build_generator
from toolkit.checkpoints import save_state
from toolkit.converters import to_junyanz
from toolkit.weights import load_generator, load_pair, load_tensors, read_config, save_generator
from utils import InputError, one_line

CONFIG = GeneratorConfig(ngf=4, num_residual=1)


# -- files of this project ---------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    net = build_generator(CONFIG)
    save_generator(tmp_path / "G.safetensors", net, {"direction": "AtoB", "size": [16, 24], "epoch": 3})
    return tmp_path / "G.safetensors", net


def rewrite(path, change=None, tensors=None):
    """Write the file again with changed metadata or tensors."""
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["recipe"])
    if change:
        change(metadata)
    save_file(tensors or load_file(path), path, {"recipe": json.dumps(metadata)})


@pytest.mark.parametrize("kind", [Path, str])
def test_a_generator_is_loaded_with_its_metadata(saved, kind):
    path, net = saved
    loaded, metadata = load_generator(kind(path))
    x = torch.rand(1, 3, 16, 24)
    assert torch.equal(loaded(x), net(x))
    assert (loaded.config, loaded.training) == (CONFIG, False)
    assert (metadata["direction"], metadata["size"], metadata["range"]) == ("AtoB", [16, 24], [-1, 1])
    assert metadata["epoch"] == 3


def test_channels_last_weights_are_written_unchanged(saved):
    path, net = saved
    save_generator(str(path), net.to(memory_format=torch.channels_last), {"direction": "AtoB", "size": [16, 24]})
    assert torch.equal(load_generator(path)[0].stem[1].weight, net.stem[1].weight)


def test_a_file_is_recognised_by_its_content(tmp_path):
    net = build_generator(GeneratorConfig(ngf=2, num_residual=0))
    save_generator(tmp_path / "G", net, {"direction": "BtoA", "size": [16, 16]})
    loaded, metadata = load_generator(tmp_path / "G")
    assert torch.equal(loaded.stem[1].weight, net.stem[1].weight)
    assert metadata["direction"] == "BtoA"


def test_a_full_disk_is_named_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_text("old")
    with full_disk(room=4096), pytest.raises(OSError, match=r"file\.safetensors") as error:
        save_generator(path, build_generator(CONFIG), {})
    assert error.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_from_before_a_field_existed_gets_its_default(saved):
    def remove(metadata):
        for name in ("skips", "vit_size", "vit_blocks", "vit_heads"):
            del metadata["config"][name]

    rewrite(saved[0], remove)
    assert load_generator(saved[0])[0].config == CONFIG


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(direction="AtoC"), "direction = AtoC"),
        (lambda m: m.update(size=[16]), "size = "),
        (lambda m: m.update(size=[2, 10**9]), "size = "),
        (lambda m: m.update(size=[16.0, 16.0]), "size = "),
        (lambda m: m.update(format=2), "no metadata of this project"),
        (lambda m: m["config"].update(ngf=10**9), "ngf 1000000000: expected at least 1 and at most 4096"),
        (lambda m: m["config"].update(ngf=-1), "ngf -1: expected at least 1"),
        (lambda m: m["config"].update(ngf="4"), "ngf '4': expected int"),
        (lambda m: m["config"].update(ngf=True), "ngf True: expected int"),
        (lambda m: m["config"].update(norm="ev\nil"), r"norm ev\\nil: expected one of instance"),
        (lambda m: m["config"].update(vit_size=[1]), "its metadata says"),
        (lambda m: m["config"].update(vit_blocks=4.0), "vit_blocks 4.0: expected int"),
        (lambda m: m["config"].update(extra=1), "no GeneratorConfig; expected generator, channels, ngf"),
        (lambda m: m.update(config=[1]), "no GeneratorConfig"),
        (lambda m: m["config"].update(ngf=8), r"blocks.0.body.1.bias is \(16,\), expected \(32,\)"),
        (lambda m: m["config"].update(num_residual=2), "blocks.1.body.1.bias is missing"),
        (lambda m: m["config"].update(num_residual=0), r"blocks.0.body.1.bias, \(16,\), is not part of this network"),
    ],
)
def test_metadata_is_not_trusted(saved, change, words):
    rewrite(saved[0], change)
    with pytest.raises(InputError, match=words) as error:
        load_generator(saved[0])
    assert "\n" not in str(error.value)


def test_only_the_first_three_differences_are_named(saved):
    rewrite(saved[0], lambda m: m["config"].update(ngf=8))
    with pytest.raises(InputError, match=r"and [0-9]+ more") as error:
        load_generator(saved[0])
    assert str(error.value).count("expected") == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved, value):
    tensors = load_file(saved[0])
    tensors["head.1.bias"][0] = value
    rewrite(saved[0], tensors=tensors)
    with pytest.raises(InputError, match=r"head.1.bias is not finite"):
        load_generator(saved[0])


def test_files_that_hold_no_generator_are_refused(saved, tmp_path):
    path = saved[0]
    whole = path.read_bytes()
    for data in (b"", b"abc", whole[:100], whole[:-5], b"\xff" * 16 + whole, torch.rand(9).numpy().tobytes()):
        path.write_bytes(data)
        with pytest.raises(InputError, match="not a readable safetensors file"):
            load_generator(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="no metadata of this project"):
        load_generator(path)
    save_file({"w": torch.zeros(2)}, path, {"recipe": "{"})
    with pytest.raises(InputError, match="not a readable"):
        load_generator(path)
    with pytest.raises(InputError, match="no such file"):
        load_generator(tmp_path / "none.safetensors")


def test_load_tensors_refuses_other_types_and_containers():
    net = build_generator(CONFIG)
    tensors = net.state_dict() | {"head.1.bias": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(InputError, match=r"head.1.bias is torch.int64, expected torch.float32"):
        load_tensors(net, tensors, "x")
    for nothing in (None, [], {"a": 1}):
        with pytest.raises(InputError, match="no tensors by name"):
            load_tensors(net, nothing, "x")


def test_discriminator_configs_are_validated_too():
    config = DiscriminatorConfig(ndf=4, n_layers=2, norm="none")
    assert read_config(DiscriminatorConfig, asdict(config), "x") == config
    with pytest.raises(InputError, match="discriminator style: expected one of patch, pixel"):
        read_config(DiscriminatorConfig, {"discriminator": "style"}, "x")


def test_a_pair_is_loaded_by_the_directions_of_its_files(tmp_path, capsys):
    net = build_generator(CONFIG)
    for name, direction in (("1", "BtoA"), ("2", "AtoB")):
        save_generator(tmp_path / name, net, {"direction": direction, "size": [16, 16]})
    torch.save(to_junyanz(net), tmp_path / "3.pth")
    assert list(load_pair([tmp_path / "1", tmp_path / "2"])) == ["G_BA", "G_AB"]
    assert list(load_pair([tmp_path / "2", tmp_path / "3.pth"])) == ["G_AB", "G_BA"]
    assert "3.pth: does not say its direction; used as G_BA" in capsys.readouterr().out
    assert list(load_pair([tmp_path / "1"])) == ["G_BA"]
    assert "G_AB starts new" in capsys.readouterr().out
    assert load_pair([]) == {}
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="a second file for G_BA"):
        load_pair([tmp_path / "1", tmp_path / "1"])


# -- files of other projects --------------------------------------------------------------------

NGF = 4
JUNYANZ = ("conv_block", "deconv")  # the name of a block, and how it is upsampled
PYTORCH_GAN = ("block", "resize")
BLOCK_DECONV = ("block", "deconv")  # mixes of the two
CONV_BLOCK_RESIZE = ("conv_block", "resize")
WITH_BIASES = ("instance", "instance_affine")


def norm_tensors(noise, width, norm, stale):
    """The tensors of a normalisation layer."""
    tensors = {}
    if norm in ("batch", "instance_affine"):
        tensors = {"weight": 1 + noise(width), "bias": noise(width)}
    if norm == "batch" or "mean" in stale:
        tensors |= {"running_mean": noise(width), "running_var": 1 + noise(width).abs()}
    if norm == "batch" or "count" in stale:
        tensors["num_batches_tracked"] = torch.tensor(7)
    return tensors


def foreign(blocks=1, project=JUNYANZ, n=2, channels=3, norm="instance", second=5, lead=1, stale=(), biases=None):
    """Random weights with the names and shapes of another project.

    stale: unused statistics of instance norms; lead: layers before a "resize" convolution
    """
    source = torch.Generator().manual_seed(0)
    state = {}
    block, up = project

    def noise(*shape):
        return torch.randn(*shape, generator=source) * 0.1

    def conv(name, width_in, width_out, side, transposed=False, bias=biases or norm in WITH_BIASES):
        widths = (width_in, width_out) if transposed else (width_out, width_in)
        state[f"{name}.weight"] = noise(*widths, side, side)
        if bias:
            state[f"{name}.bias"] = noise(width_out)

    def normed(name, width):
        state.update({f"{name}.{leaf}": x for leaf, x in norm_tensors(noise, width, norm, stale).items()})

    width = NGF
    at = 4
    conv("model.1", channels, width, 7)
    normed("model.2", width)
    for _ in range(n):
        conv(f"model.{at}", width, 2 * width, 3)
        width *= 2
        normed(f"model.{at + 1}", width)
        at += 3
    for _ in range(blocks):
        for inner in (1, second):
            conv(f"model.{at}.{block}.{inner}", width, width, 3)
            normed(f"model.{at}.{block}.{inner + 1}", width)
        at += 1
    for _ in range(n):
        at += lead if up == "resize" else 0
        conv(f"model.{at}", width, width // 2, 3, transposed=up == "deconv")
        width //= 2
        normed(f"model.{at + 1}", width)
        at += 3
    conv(f"model.{at + 1}", width, channels, 7, bias=True)
    return state


def translate(state, x, blocks=1, project=JUNYANZ, n=2, norm="instance", second=5, lead=1, resize_pad="reflect"):
    """What the other project computes, in plain function calls.

    PyTorch-GAN pads with zeros after upsampling: resize_pad="constant". The networks here use reflection.
    """
    block, up = project

    def conv(x, name, pad=0, mode="reflect", **how):
        return F.conv2d(F.pad(x, [pad] * 4, mode), state[f"{name}.weight"], state.get(f"{name}.bias"), **how)

    def normed(x, name):
        if norm == "none":
            return x
        if norm in ("instance", "instance_affine"):
            mean = x.mean((2, 3), keepdim=True)
            var = x.var((2, 3), unbiased=False, keepdim=True)
            x = (x - mean) / (var + 1e-5).sqrt()
            if norm == "instance":
                return x
            return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]
        stats = [state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *stats, training=False)

    x = F.relu(normed(conv(x, "model.1", 3), "model.2"))
    at = 4
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
            at += lead
            x = conv(F.interpolate(x, scale_factor=2), f"model.{at}", 1, resize_pad)
        else:
            kernel = state[f"model.{at}.weight"]
            bias = state.get(f"model.{at}.bias")
            x = F.conv_transpose2d(x, kernel, bias, stride=2, padding=1, output_padding=1)
        x = F.relu(normed(x, f"model.{at + 1}"))
        at += 3
    return torch.tanh(conv(x, f"model.{at + 1}", 3))


def load(state, name="latest_net_G.pth", **how):
    torch.save(state, name, **how)
    return load_generator(Path(name))


def random_images(channels=3, side=32):
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def assert_same(state, net, metadata, **variant):
    """The loaded network computes what `state` computes in its own project, in float64."""
    x = random_images(net.config.channels).double()
    state = {name: value.double() for name, value in state.items()}
    tolerance = 1e-6 if "biases" in variant else 1e-9  # biases are folded into means in float32
    variant = {key: value for key, value in variant.items() if key not in ("channels", "stale", "biases")}
    with torch.no_grad():
        mine = net.double()(x)
        theirs = translate(state, x, **variant)
    assert theirs.std() > 0.05  # not all alike
    assert torch.allclose(mine, theirs, rtol=0, atol=tolerance)
    assert not net.training
    assert (metadata["size"], metadata["range"]) == (None, [-1, 1])
    assert GeneratorConfig(**metadata["config"]) == net.config


def refused(value, *words):
    """Loading is refused in one line that contains all the words."""
    with pytest.raises(InputError) as error:
        load(value)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# -- the synthetic files are like real ones -----------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ({}, 48),
        ({"stale": ("mean",)}, 94),
        ({"stale": ("mean", "count")}, 117),
        ({"norm": "batch"}, 140),
        ({"norm": "none"}, 25),
        ({"norm": "batch", "biases": True}, 163),
        ({"norm": "instance_affine"}, 94),
        ({"project": PYTORCH_GAN}, 48),
    ],
)
def test_the_synthetic_files_have_as_many_tensors_as_real_ones(variant, count):
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
def test_the_synthetic_files_are_numbered_like_real_ones(blocks, project, shapes):
    state = foreign(blocks, project)
    for index, shape in ({1: (4, 3, 7, 7), 4: (8, 4, 3, 3), 7: (16, 8, 3, 3)} | shapes).items():
        assert state[f"model.{index}.weight"].shape == shape
    for index in range(10, 10 + blocks):
        assert state[f"model.{index}.{project[0]}.5.weight"].shape == (16, 16, 3, 3)


# -- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("project", [JUNYANZ, PYTORCH_GAN, BLOCK_DECONV, CONV_BLOCK_RESIZE], ids="-".join)
@pytest.mark.parametrize(
    "variant",
    [
        {"blocks": 9},
        {"blocks": 6},
        {"blocks": 0},
        {"blocks": 0, "n": 0},
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
        {"blocks": 2, "norm": "batch", "biases": True},
        {"blocks": 1, "norm": "none"},
        {"blocks": 2, "norm": "instance_affine"},
        {"blocks": 1, "norm": "instance_affine", "second": 6, "lead": 2},
    ],
    ids=str,
)
def test_a_foreign_generator_computes_what_it_computes_in_its_project(project, variant):
    state = foreign(project=project, **variant)
    net, metadata = load(state)
    assert_same(state, net, metadata, project=project, **variant)
    config = net.config
    assert (config.num_residual, config.n_downsampling) == (variant["blocks"], variant.get("n", 2))
    assert (config.norm, config.ngf) == (variant.get("norm", "instance"), NGF)
    assert config.channels == variant.get("channels", 3)
    assert config.upsample == (project[1] if variant.get("n", 2) else "deconv")


@pytest.mark.parametrize(
    "old_and_new", [(r"model\.11\.conv_block", "model.11.block"), ("conv_block", "res"), ("model", "main")]
)
def test_the_names_of_blocks_and_sequential_do_not_matter(old_and_new):
    state = foreign(2, norm="instance_affine")
    net, metadata = load(rename(state, *old_and_new))
    assert_same(state, net, metadata, blocks=2, norm="instance_affine")


@pytest.mark.parametrize(("norm", "parameters"), [("instance", 7_707_651), ("instance_affine", 7_712_259)])
def test_a_wide_mix_is_read_with_all_its_parameters(norm, parameters, monkeypatch):
    """Blocks as in PyTorch-GAN, transposed convolutions as in junyanz, twice the usual width."""
    monkeypatch.setitem(globals(), "NGF", 128)
    net, _ = load(foreign(1, BLOCK_DECONV, norm=norm))
    assert (net.config.ngf, net.config.num_residual, net.config.upsample) == (128, 1, "deconv")
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.module.", "model.module."])
@pytest.mark.parametrize("container", [None, "state_dict", "model_state_dict"])
def test_prefixes_and_containers_are_removed(prefix, container):
    state = foreign(2, norm="batch")
    prefixed = OrderedDict((prefix + name.removeprefix("model."), x) for name, x in state.items())
    if prefix != "model.module.":
        prefixed = OrderedDict((prefix + name, x) for name, x in state.items())
    net, metadata = load({container: prefixed, "epoch": 3} if container else prefixed)
    assert_same(state, net, metadata, blocks=2, norm="batch")


def test_a_module_saved_by_the_old_writer_is_read():
    """Files of 2018: not a zip archive, and version metadata for which running statistics are unexpected."""
    state = OrderedDict(foreign(2, stale=("mean", "count")))
    state._metadata = OrderedDict({"": {"version": 1}, "model.2": {"version": 2}})
    net, metadata = load(state, _use_new_zipfile_serialization=False)
    assert_same(state, net, metadata, blocks=2)


def test_half_precision_and_parameters_become_float32():
    state = {name: torch.nn.Parameter(x.half()) for name, x in foreign(2).items()}
    net, metadata = load(state)
    assert net.stem[1].weight.dtype == torch.float32
    assert_same({name: x.float() for name, x in state.items()}, net, metadata, blocks=2)


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


# -- messages -----------------------------------------------------------------------------------


def without(state, *names):
    return {name: x for name, x in state.items() if name not in names}


ONLY_TRACKED = {name: x for name, x in foreign(2, stale=("mean",)).items() if x.dim() != 1 or "running" in name}


@pytest.mark.parametrize(
    ("state", "variant", "words"),
    [
        (foreign(2, stale=("mean", "count")), {}, ""),
        (foreign(2, norm="batch"), {"norm": "batch"}, ""),
        (foreign(2, PYTORCH_GAN, n=0), {"n": 0}, ""),
        (
            without(foreign(2), "model.1.bias", "model.11.conv_block.5.bias", "model.12.bias"),
            {},
            "latest_net_G.pth: missing model.1.bias (3 in all); filled with zeros\n",
        ),
        (
            ONLY_TRACKED | {"model.19.bias": torch.zeros(3)},
            {},
            "latest_net_G.pth: missing model.1.bias (9 in all); filled with zeros\n",
        ),
        (
            foreign(2, norm="none"),
            {"norm": "none"},
            "latest_net_G.pth: missing model.1.bias (9 in all); filled with zeros\n"
            "latest_net_G.pth: no sign of a normalisation; read as a network without one\n",
        ),
        (
            {name: x for name, x in foreign(2, norm="batch").items() if not name.endswith("tracked")},
            {"norm": "batch"},
            "latest_net_G.pth: missing model.10.conv_block.2.num_batches_tracked (9 in all); filled with zeros\n",
        ),
        (
            foreign(2, norm="batch", biases=True),
            {"norm": "batch", "biases": True},
            "latest_net_G.pth: 9 biases before batch norms became part of their means\n",
        ),
    ],
)
def test_what_a_file_lacks_is_filled_in_and_said(capsys, state, variant, words):
    net, metadata = load(state)
    assert capsys.readouterr().out == words
    assert net.config.norm == variant.get("norm", "instance")
    project = PYTORCH_GAN if "model.4.block.1.weight" in state else JUNYANZ
    assert_same(state, net, metadata, blocks=2, project=project, **variant)


def test_the_zero_padding_of_pytorch_gan_is_said_and_changes_little_but_the_border(capsys):
    state = foreign(2, PYTORCH_GAN)
    x = random_images(side=64)
    net, _ = load(state, "G_AB_9.pth")
    assert "G_AB_9.pth: PyTorch-GAN pads with zeros after upsampling" in capsys.readouterr().out
    with torch.no_grad():
        apart = (net(x) - translate(state, x, 2, PYTORCH_GAN, resize_pad="constant")).abs()
    inner = apart[..., 8:-8, 8:-8].mean()
    assert 0 < inner < 0.1
    assert apart[..., :2].mean() > 3 * inner


# -- refusals -----------------------------------------------------------------------------------


def rename(state, old, new):
    return {re.sub(old, new, name): x for name, x in state.items()}


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
        ({name: torch.zeros(1) for name in "edcba"}, ["an unknown layout (a (1,), b (1,), c (1,))"]),
        ({"model.1.weight": torch.zeros(4)}, ["an unknown layout (model.1.weight (4,))"]),
        ({"a\nb": torch.zeros(1)}, [r"(a\nb (1,))"]),
        (
            {"model.1.weight": torch.zeros(4, 3, 7, 7)},
            ["1 convolutions outside of blocks (model.1.weight (4, 3, 7, 7)); expected a first, a last, and as many"],
        ),
        (without(foreign(), "model.4.weight", "model.4.bias"), ["5 convolutions outside of blocks (model.1.weight"]),
        ({"format": 1, "nets": {}}, ["a whole training state; give --run_name and --epoch, or a G_AB.safetensors"]),
        ({}, ["holds no tensors by name"]),
        (torch.zeros(3), ["holds no tensors by name"]),
        ([1, 2], ["holds no tensors by name"]),
        ({1: torch.zeros(3)}, ["holds no tensors by name"]),
        ({"model_state_dict": {"generator_ab": foreign()}}, ["holds no tensors by name"]),
        ({"model.1.weight": torch.zeros(1).expand(4, 3, 7, 7)}, ["holds no tensors by name"]),
        ({"model.1.weight": torch.zeros(4, 3, 7, 7).to_sparse()}, ["holds no tensors by name"]),
        ({"model.1.weight": torch.zeros(4, 3, 7, 7, device="meta")}, ["holds no tensors by name"]),
        (without(foreign(), "model.18.bias"), ["model.18.bias is missing, expected (3,)"]),
        (without(foreign(), "model.4.weight"), ["model.4.weight is missing"]),
        (without(foreign(norm="batch"), "model.5.running_var"), ["model.5.running_var is missing, expected (8,)"]),
        (without(foreign(norm="batch"), "model.5.bias"), ["model.5.bias is missing, expected (8,)"]),
        (without(foreign(norm="batch"), "model.2.weight"), ["model.2.weight is missing"]),
        (without(foreign(norm="instance_affine"), "model.5.bias"), ["model.5.bias is missing, expected (8,)"]),
        (without(foreign(norm="instance_affine"), "model.5.weight"), ["model.5.weight is missing"]),
        (foreign(norm="batch") | {"model.1.bias": torch.zeros(5)}, ["model.1.bias, (5,), is not part"]),
        (foreign() | {"model.2.weight": torch.ones(4)}, ["model.2.weight, (4,), is not part of this network"]),
        (foreign() | {"model.1.running_mean": torch.ones(4)}, ["model.1.running_mean, (4,), is not part"]),
        (foreign() | {"n_averaged": torch.tensor(3)}, ["n_averaged, (), is not part of this network"]),
        (foreign() | {"model.13.query.weight": torch.ones(1, 8, 1, 1)}, ["model.13.query.weight, (1, 8, 1, 1), is"]),
        (foreign() | {"model.1.bias": torch.full((4,), float("nan"))}, ["model.1.bias is not finite"]),
        (foreign() | {"model.1.bias": torch.full((4,), 1e300, dtype=torch.float64)}, ["model.1.bias is not finite"]),
        (foreign() | {"model.1.bias": torch.zeros(4, dtype=torch.int64)}, ["model.1.bias is torch.int64"]),
        (foreign() | {"model.1.weight": torch.zeros(4, 4, 7, 7)}, ["model.1.weight is (4, 4, 7, 7); expected (4, 3,"]),
        (foreign() | {"model.1.weight": torch.zeros(0, 3, 7, 7)}, ["give ngf 0: expected at least 1 and at most 4096"]),
        (foreign(n=5), ["give n_downsampling 5: expected at least 0 and at most 4"]),
        (
            foreign() | {"model.9999.weight": torch.zeros(1, 1, 1, 1)},
            ["7 convolutions", "model.9999.weight (1, 1, 1, 1)"],
        ),
        (
            foreign() | {"model.4.weight": torch.zeros(8, 4, 4, 4)},
            ["model.4.weight is (8, 4, 4, 4); expected (8, 4, 3, 3) at position 4"],
        ),
        (
            rename(foreign(2), r"conv_block\.1\.", "conv_block.0."),  # blocks that pad with zeros
            [
                "model.10.conv_block.0.weight is (16, 16, 3, 3); expected (16, 16, 3, 3) at layer 1 of the block at position 10"
            ],
        ),
        (
            {k: x for k, x in foreign(2).items() if "10.conv_block.5" not in k},
            ["model.11.conv_block.1.weight is (16, 16, 3, 3)", "at layer 5 or 6 of the block at position 10"],
        ),
        (
            rename(foreign(2), r"model\.11\.", "model.111."),
            ["model.12.weight is (16, 8, 3, 3); expected (16, 16, 3, 3) at layer 1 of the block at position 11"],
        ),
        (foreign(2, PYTORCH_GAN, lead=3), ["model.15.weight is (8, 16, 3, 3)", "at position 13 or 14"]),
        (foreign(2, JUNYANZ) | {"a\nb": torch.zeros(1)}, [r"a\nb, (1,), is not part of this network"]),
    ],
)
def test_other_networks_and_layouts_are_refused_by_name(state, words):
    refused(state, *words)


def test_a_file_that_upsamples_in_two_ways_is_refused_by_its_shapes():
    """Convolutions have the number of output channels first, transposed ones the number of input channels."""
    state = foreign(2)
    state["model.15.weight"] = state["model.15.weight"].transpose(0, 1).contiguous()
    refused(state, "model.15.weight is (4, 8, 3, 3); expected (8, 4, 3, 3) at position 15")


def test_a_training_state_is_refused(tmp_path):
    save_state(tmp_path / "latest.pt", {"stage": "train", "nets": {}})
    with pytest.raises(InputError, match=r"latest\.pt: .*--run_name and --epoch"):
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
    start = whole.index(foreign()["model.1.bias"].numpy().tobytes())  # one bit of one weight
    path.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
    with pytest.raises(InputError, match="damaged"):
        load_generator(path)


# -- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["instance", "instance_affine", "batch", "none"])
@pytest.mark.parametrize(("blocks", "n", "channels"), [(9, 2, 3), (6, 2, 1), (0, 0, 3), (1, 3, 3)])
def test_writing_the_junyanz_layout_and_reading_it_is_exact(norm, blocks, n, channels):
    config = GeneratorConfig(ngf=NGF, num_residual=blocks, n_downsampling=n, channels=channels, norm=norm)
    net = build_generator(config)
    for name, x in net.state_dict().items():
        if x.is_floating_point() and not (norm == "none" and name.endswith(".bias") and name != "head.1.bias"):
            x.uniform_(0.1, 1)
    state = to_junyanz(net)
    table = foreign(blocks, n=n, channels=channels, norm=norm)
    assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in table.items()}
    back, metadata = load(state, "latest_net_G_B.pth")
    assert metadata["direction"] == "BtoA"
    assert back.config == config
    for name, x in net.state_dict().items():
        assert torch.equal(back.state_dict()[name], x)


@pytest.mark.parametrize("norm", ["batch", "instance_affine"])
def test_reading_the_junyanz_layout_and_writing_it_is_exact(norm):
    state = foreign(2, norm=norm)
    back = to_junyanz(load(state)[0])
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], x) for name, x in state.items())


def test_the_written_weights_compute_the_same_in_the_other_project():
    net = build_generator(GeneratorConfig(ngf=NGF, num_residual=2), init="kaiming").eval()
    x = random_images()
    with torch.no_grad():
        assert torch.allclose(translate(to_junyanz(net), x, 2), net(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"upsample": "resize"}, "upsample resize"),
        ({"norm_output": True}, "norm_output"),
        ({"skips": True}, "skips"),
        ({"norm": "group"}, "norm group"),
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


# -- damaged and invented files --------------------------------------------------------------


def assert_one_line(error, name):
    """An error names the file and is a line of reasonable length."""
    assert str(name) in str(error)
    assert len(one_line(error)) < 1000


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """A generator file, and a foreign one in both of torch's formats, as bytes by name."""
    folder = tmp_path_factory.mktemp("contents")
    net = build_generator(CONFIG)
    save_generator(folder / "a.safetensors", net, {"direction": "AtoB", "size": [16, 16]})
    torch.save(to_junyanz(net), folder / "b.pth")
    torch.save(to_junyanz(net), folder / "c.pth", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
@FUZZ
@given(edits=EDITS, name=st.sampled_from(["a.safetensors", "b.pth", "c.pth"]))
def test_damaged_files_of_weights_are_read_or_refused(tmp_path, contents, edits, name):
    path = tmp_path / name
    path.write_bytes(edited(contents[name], edits))
    try:
        load_generator(path)
    except InputError as error:
        assert_one_line(error, path)


NAMES = st.sampled_from(["model.1", "model.4", "model.10.conv_block.1", "model.26", "net.0", "x"])


@pytest.mark.slow
@FUZZ
@given(
    names=st.lists(NAMES, max_size=5),
    leaf=st.sampled_from(["weight", "bias", "running_mean"]),
    shape=st.lists(st.integers(0, 9), max_size=4),
    base=st.booleans(),
)
def test_invented_weights_are_read_or_refused(tmp_path, names, leaf, shape, base):
    state = to_junyanz(build_generator(CONFIG)) if base else {}
    state |= {f"{name}.{leaf}": torch.zeros(shape) for name in names}
    torch.save(state, tmp_path / "x.pth")
    try:
        load_generator(tmp_path / "x.pth")
    except InputError as error:
        assert_one_line(error, "x.pth")
