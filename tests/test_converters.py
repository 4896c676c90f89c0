"""Generator files of other projects; foreign_nets.py builds their networks as these projects do."""

import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign_nets import (
    BLOCK_DECONV,
    CONV_BLOCK_RESIZE,
    COUNTED,
    JUNYANZ,
    NGF,
    PYTORCH_GAN,
    STATISTICS,
    ForeignGenerator,
    foreign,
    tracked_statistics,
)
from torch import nn

from models import GeneratorConfig, build_generator
from toolkit.checkpoints import save_state
from toolkit.converters import limits_of_junyanz, to_junyanz
from toolkit.weights import load_generator, load_generators
from utils import InputError


def load(state, name="latest_net_G.pth", assumed=(), **options):
    torch.save(state, name, **options)
    (generator,) = load_generators(name, assumed=assumed)
    return generator


def random_images(channels=3, side=32):
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def assert_same(theirs, net, metadata, tolerance=1e-9):
    """A loaded network computes what a network of another project computes, in float64."""
    x = random_images(net.config.channels).double()
    expected = theirs.double()(x)
    assert expected.std() > 0.05
    with torch.no_grad():
        assert torch.allclose(net.double()(x), expected, rtol=0, atol=tolerance)
    assert not net.training
    assert (metadata["size"], metadata["range"]) == (None, [-1, 1])
    assert GeneratorConfig(**metadata["config"]) == net.config


def rename(state, old, new):
    return OrderedDict((re.sub(old, new, name), x) for name, x in state.items())


def without(state, *endings):
    return {name: x for name, x in state.items() if not name.endswith(endings)}


# -- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("project", "last"),
    [(JUNYANZ, {19: (16, 8, 3, 3), 26: (3, 4, 7, 7)}), (PYTORCH_GAN, {20: (8, 16, 3, 3), 28: (3, 4, 7, 7)})],
)
def test_the_synthetic_files_have_the_names_of_real_ones(project, last):
    state = foreign(9, project)
    assert len(state) == 48
    for index, shape in ({1: (4, 3, 7, 7), 4: (8, 4, 3, 3), 7: (16, 8, 3, 3)} | last).items():
        assert state[f"model.{index}.weight"].shape == shape
    for index in range(10, 19):
        assert state[f"model.{index}.{project[0]}.5.weight"].shape == (16, 16, 3, 3)


@pytest.mark.parametrize("project", [JUNYANZ, PYTORCH_GAN, BLOCK_DECONV, CONV_BLOCK_RESIZE], ids="-".join)
@pytest.mark.parametrize(
    "variant",
    [
        {"blocks": 9},
        {"blocks": 6, "second": 6},
        {"blocks": 0},
        {"blocks": 2, "n": 0},
        {"blocks": 1, "n": 3},
        {"blocks": 0, "n": 4},
        {"blocks": 2, "channels": 1},
        {"blocks": 2, "norm": "batch", "second": 6},
        {"blocks": 1, "norm": "none"},
        {"blocks": 1, "norm": "instance_affine", "second": 6, "lead": 2},
    ],
    ids=str,
)
def test_a_foreign_generator_computes_what_it_computes_in_its_project(project, variant):
    theirs = ForeignGenerator(project=project, **variant)
    is_grey = variant.get("channels") == 1 and project[1] == "resize"
    net, metadata = load(theirs.state_dict(), assumed=["zeros"] if is_grey else [])
    assert_same(theirs, net, metadata)
    config = net.config
    n = variant.get("n", 2)
    assert (config.num_residual, config.n_downsampling, config.ngf) == (variant["blocks"], n, NGF)
    assert (config.norm, config.channels) == (variant.get("norm", "instance"), variant.get("channels", 3))
    assert config.upsample == (project[1] if n else "deconv")


@pytest.mark.parametrize("project", [JUNYANZ, PYTORCH_GAN], ids="-".join)
@pytest.mark.parametrize("statistics", [STATISTICS, COUNTED])
@pytest.mark.parametrize("second", [5, 6])
def test_statistics_of_instance_norms_are_ignored(project, statistics, second):
    theirs = ForeignGenerator(2, project, second=second)
    assert_same(theirs, *load(foreign(2, project, second=second, statistics=statistics)))


@pytest.mark.parametrize("container", [None, "state_dict", "model_state_dict"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"model\.11\.conv_block", "model.11.block"),
        ("conv_block", "res"),
        ("model", "main"),
        ("^", "module."),
        ("^", "module._orig_mod.module."),
        (r"^model\.", "model.module."),
    ],
)
def test_prefixes_containers_and_the_names_of_blocks_do_not_matter(old, new, container):
    theirs = ForeignGenerator(2, norm="batch")
    state = rename(theirs.state_dict(), old, new)
    assert_same(theirs, *load({container: state, "epoch": 3} if container else state))


def test_a_module_saved_by_the_old_writer_is_read():
    """Files of 2018: not a zip archive, and version metadata for which running statistics are unexpected."""
    state = OrderedDict(foreign(2, statistics=COUNTED))
    state._metadata = OrderedDict({"": {"version": 1}, "model.2": {"version": 2}})
    assert_same(ForeignGenerator(2), *load(state, _use_new_zipfile_serialization=False))


def test_half_precision_and_parameters_become_float32():
    theirs = ForeignGenerator(2).half()
    net, metadata = load({name: nn.Parameter(x) for name, x in theirs.state_dict().items()})
    assert net.stem[1].weight.dtype == torch.float32
    assert_same(theirs, net, metadata)


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("latest_net_G_A.pth", "AtoB"),
        ("200_net_G_B.pth", "BtoA"),
        ("G_AB_199.pth", "AtoB"),
        ("G_BA_0.pth", "BtoA"),
        ("net_G_BA.pth", "BtoA"),
        ("latest_net_G.pth", None),
        ("net_G_Apples.pth", None),
        ("G_AB/latest_net_G.pth", None),
    ],
)
def test_the_direction_is_in_the_file_name(name, direction):
    Path(name).parent.mkdir(exist_ok=True)
    assert load(foreign(), name)[1]["direction"] == direction


# -- messages -----------------------------------------------------------------------------------

BATCH = "batch norms use their running statistics; pytorch-CycleGAN-and-pix2pix does so only with --eval"
NO_NORM = "no sign of a normalisation; read as a network without one; if it has instance norms, add --assume instance"
ZEROS = "missing model.1.bias ({} in all); filled with zeros"


@pytest.mark.parametrize(
    ("net", "change", "said"),
    [
        ({"norm": "batch"}, dict, [BATCH]),
        ({"project": PYTORCH_GAN, "n": 0}, dict, []),
        ({}, lambda state: without(state, "model.1.bias", "11.conv_block.5.bias", "12.bias"), [ZEROS.format(3)]),
        ({"norm": "none"}, dict, [ZEROS.format(9), NO_NORM]),
        (
            {"norm": "batch"},
            lambda state: without(state, "tracked"),
            ["missing model.10.conv_block.2.num_batches_tracked (9 in all); filled with zeros", BATCH],
        ),
        ({"norm": "batch", "biases": True}, dict, ["9 biases before batch norms became part of their means", BATCH]),
    ],
)
def test_what_a_file_lacks_is_filled_in_and_said(capsys, net, change, said):
    theirs = ForeignGenerator(2, **net)
    loaded, metadata = load(change(theirs.state_dict()))
    assert capsys.readouterr().out.splitlines() == [f"latest_net_G.pth: {line}" for line in said]
    assert_same(theirs, loaded, metadata, tolerance=1e-6)  # biases are folded into means in float32
    assert loaded.config.norm == net.get("norm", "instance")


def test_statistics_reveal_an_instance_norm_without_biases():
    state = without(foreign(2, statistics=STATISTICS), ".bias") | {"model.19.bias": torch.zeros(3)}
    assert load(state)[0].config.norm == "instance"


@pytest.mark.parametrize("project", [PYTORCH_GAN, CONV_BLOCK_RESIZE], ids="-".join)
@pytest.mark.parametrize(
    ("net", "assumed"),
    [
        ({"pad": "reflect"}, ["reflect"]),
        ({"pad": "replicate"}, ["replicate"]),
        ({"resize": "bilinear"}, ["bilinear"]),
        ({"resize": "bilinear", "pad": "replicate"}, ["bilinear", "replicate"]),
        ({"lead": 2, "pad": "zeros"}, ["zeros"]),
        ({"channels": 1, "pad": "reflect"}, ["reflect"]),
    ],
    ids=str,
)
def test_what_a_file_cannot_show_of_its_upsampling_can_be_told(capsys, project, net, assumed):
    theirs = ForeignGenerator(2, project, **net)
    assert_same(theirs, *load(theirs.state_dict(), assumed=assumed))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("lead", "padding"), [(1, "zeros"), (2, "reflect")])
def test_how_upsampling_was_read_is_said(capsys, lead, padding):
    load(foreign(2, PYTORCH_GAN, lead=lead), "G_9.pth")
    assert capsys.readouterr().out.splitlines() == [
        f"G_9.pth: read as upsampling by nearest neighbour with {padding} padding; --assume says otherwise"
    ]


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_a_generator_of_images_from_0_to_1_with_a_sigmoid_becomes_one_of_ours(norm):
    theirs = ForeignGenerator(2, norm=norm, last=nn.Sigmoid)
    net, _ = load(theirs.state_dict(), assumed=["sigmoid"])
    x = random_images().double()
    with torch.no_grad():
        assert torch.allclose(net.double()(x) / 2 + 0.5, theirs.double()(x / 2 + 0.5), rtol=0, atol=1e-6)


def test_a_wrong_shape_is_found_whatever_is_assumed():
    with pytest.raises(InputError, match=r"model.1.bias is \(5,\), expected \(4,\)"):
        load(foreign() | {"model.1.bias": torch.zeros(5)}, assumed=["sigmoid"])


def test_statistics_that_a_project_uses_in_eval_mode_can_be_told(capsys):
    theirs = tracked_statistics(ForeignGenerator(2))
    load(theirs.state_dict())
    assert "if its project runs it in eval mode, add --assume statistics" in capsys.readouterr().out
    net, metadata = load(theirs.state_dict(), assumed=["statistics"])
    assert net.config.norm == "batch"
    assert_same(theirs, net, metadata, tolerance=1e-5)  # biases become part of the means in float32


@pytest.mark.parametrize(
    ("net", "assumed", "words"),
    [
        ({}, ["zeros"], "has transposed convolutions; leave --assume zeros out"),
        ({}, ["statistics"], "has no running statistics beside instance norms; leave --assume statistics out"),
        ({"project": PYTORCH_GAN}, ["zeros", "reflect"], "--assume zeros,reflect: contradict each other"),
        ({"project": PYTORCH_GAN, "channels": 1}, [], "a grey generator of PyTorch-GAN, which pads images by 1 px"),
    ],
)
def test_assumptions_that_a_file_contradicts_are_refused(net, assumed, words):
    with pytest.raises(InputError) as error:
        load(foreign(2, **net), assumed=assumed)
    assert words in str(error.value)


DISCRIMINATOR = {"model.0.weight": torch.zeros(4, 3, 4, 4), "model.0.bias": torch.zeros(4)}
NO_TENSORS = "holds no tensors by name"
BATCH = foreign(norm="batch")
AFFINE = foreign(norm="instance_affine")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (foreign() | {"model.7.filt": torch.zeros(4, 1, 3, 3)}, "holds a CUT generator with antialiasing filters"),
        ({"model.model.0.weight": torch.zeros(4, 3, 4, 4)}, "holds a U-Net of pytorch-CycleGAN-and-pix2pix"),
        ({"net.modnet.weight": torch.zeros(4)}, "holds a network of UVCGAN"),
        ({"stem.1.weight": torch.zeros(4, 3, 7, 7)}, "holds a generator of this project without its config"),
        (rename(foreign(), r"(model\.\d+)\.w", r"\1.0.w"), "holds a generator of nested layers, such as model.1.0"),
        (rename(foreign(), "weight", "weight_orig"), "holds weights under a spectral or weight norm, which its own"),
        (rename(foreign(), "weight", "parametrizations.weight.original0"), "holds weights under a spectral"),
        (foreign() | {"model.1.weight": torch.zeros(4, 4, 7, 7)}, "reads images of 4 channels; expected 3, or 1"),
        (DISCRIMINATOR, "holds a discriminator; expected a ResNet generator"),
        ({"net.0.weight": torch.zeros(4, 3, 1, 1)}, "holds a discriminator"),
        ({name: torch.zeros(1) for name in "edcba"}, "holds an unknown layout (a (1,), b (1,), c (1,))"),
        ({"a\nb": torch.zeros(1)}, r"(a\nb (1,))"),
        ({"model.1.weight": torch.zeros(4, 3, 7, 7)}, "1 convolutions outside of blocks; expected those of a ResNet"),
        (without(foreign(), "model.4.weight", "model.4.bias"), "5 convolutions outside of blocks"),
        (foreign() | {"model.9999.weight": torch.zeros(1, 1, 1, 1)}, "7 convolutions outside of blocks"),
        ({"format": 1, "nets": {}}, "holds a whole training state; give --run_name and --epoch"),
        ({}, NO_TENSORS),
        ({1: torch.zeros(3)}, NO_TENSORS),
        ({"model.1.weight": torch.zeros(1).expand(4, 3, 7, 7)}, NO_TENSORS),
        ({"model.1.weight": torch.zeros(4, 3, 7, 7).to_sparse()}, NO_TENSORS),
        ({"model.1.weight": torch.zeros(4, 3, 7, 7, device="meta")}, NO_TENSORS),
        (without(foreign(), "model.18.bias"), "model.18.bias is missing, expected (3,)"),
        (without(BATCH, "model.5.running_var"), "model.5.running_var is missing, expected (8,)"),
        (without(AFFINE, "model.5.weight"), "model.5.weight is missing"),
        (BATCH | {"model.1.bias": torch.zeros(5)}, "model.1.bias, (5,), is not part"),
        (foreign() | {"model.2.weight": torch.ones(4)}, "model.2.weight, (4,), is not part of this network"),
        (foreign() | {"model.13.query.weight": torch.ones(1, 8, 1, 1)}, "model.13.query.weight, (1, 8, 1, 1), is"),
        (foreign() | {"a\nb": torch.zeros(1)}, r"a\nb, (1,), is not part of this network"),
        (foreign() | {"model.1.bias": torch.full((4,), 1e300, dtype=torch.float64)}, "model.1.bias is not finite"),
        (foreign() | {"model.1.weight": torch.zeros(0, 3, 7, 7)}, "give ngf 0: expected at least 1 and at most 4096"),
        (foreign(n=5), "give n_downsampling 5: expected at least 0 and at most 4"),
        (foreign() | {"model.4.weight": torch.zeros(8, 4, 4, 4)}, "expected (8, 4, 3, 3) at position 4"),
        # upsampling in two ways: convolutions have the number of output channels first, transposed ones that of inputs
        (
            foreign(2) | {"model.15.weight": torch.zeros(4, 8, 3, 3)},
            "(4, 8, 3, 3); expected (8, 4, 3, 3) at position 15",
        ),
        # blocks that pad with zeros
        (
            rename(foreign(2), r"conv_block\.1\.", "conv_block.0."),
            "(16, 16, 3, 3) at layer 1 of the block at position 10",
        ),
        (
            without(foreign(2), "10.conv_block.5.weight", "10.conv_block.5.bias"),
            "layer 5 or 6 of the block at position 10",
        ),
        (rename(foreign(2), r"model\.11\.", "model.111."), "model.12.weight is (16, 8, 3, 3); expected (16, 16, 3, 3)"),
        (
            foreign(2, PYTORCH_GAN, lead=3),
            "model.15.weight is at another position; expected (8, 16, 3, 3) at position 13 or 14",
        ),
    ],
)
def test_other_networks_and_layouts_are_refused_in_one_line(state, words):
    with pytest.raises(InputError) as error:
        load(state)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_training_state_is_refused(tmp_path):
    save_state(tmp_path / "latest.pt", {"stage": "train", "nets": {}})
    with pytest.raises(InputError, match=r"latest\.pt: .*--run_name and --epoch"):
        load_generator(tmp_path / "latest.pt")


# -- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["instance", "instance_affine", "batch"])
@pytest.mark.parametrize(("blocks", "n", "channels"), [(9, 2, 3), (6, 2, 1), (0, 0, 3), (1, 3, 3)])
def test_writing_the_junyanz_layout_and_reading_it_is_exact(norm, blocks, n, channels):
    config = GeneratorConfig(ngf=NGF, num_residual=blocks, n_downsampling=n, channels=channels, norm=norm)
    net = build_generator(config)
    for x in net.state_dict().values():
        if x.is_floating_point():
            x.uniform_(0.1, 1)
    state = to_junyanz(net)
    theirs = foreign(blocks, n=n, channels=channels, norm=norm)
    assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in theirs.items()}
    loaded, metadata = load(state, "latest_net_G_B.pth")
    assert (metadata["direction"], loaded.config) == ("BtoA", config)
    for name, x in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"upsample": "resize"}, "upsample resize"),
        ({"norm_output": True}, "norm_output"),
        ({"skips": True}, "skips"),
        ({"norm": "group"}, "norm group"),
        ({"norm": "none"}, "norm none"),
        ({"generator": "unet_vit"}, "generator unet_vit"),
    ],
)
def test_what_the_junyanz_layout_cannot_hold_is_refused(change, word):
    config = GeneratorConfig(ngf=NGF, num_residual=1, **change)
    net = build_generator(replace(config, generator="resnet"))
    net.config = config
    with pytest.raises(InputError, match=rf"{word}.*junyanz layout cannot hold it"):
        to_junyanz(net)


@pytest.mark.parametrize(
    ("change", "limits"),
    [
        ({}, []),
        ({"num_residual": 6, "channels": 1}, []),
        ({"num_residual": 3}, ["its code builds 6 or 9 blocks, not 3"]),
        ({"n_downsampling": 3}, ["its code has 2 downsampling layers, not 3"]),
        ({"norm": "instance_affine", "num_residual": 1}, ["6 or 9 blocks", "no learned scale"]),
        ({"norm": "batch"}, ["only with --eval"]),
    ],
    ids=str,
)
def test_what_the_code_of_junyanz_cannot_load_is_said(change, limits):
    said = limits_of_junyanz(GeneratorConfig(**change))
    assert len(said) == len(limits)
    assert all(limit in line for limit, line in zip(limits, said, strict=True))
