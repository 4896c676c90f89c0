"""Files of other projects that hold more than one network, or say by a name which way it translates."""

import argparse
import collections
import enum
import pathlib
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models import DIRECTIONS, Direction, GeneratorConfig, build_generator
from toolkit.containers import direction_in, list_networks
from toolkit.converters import to_junyanz
from toolkit.inference import load_networks
from toolkit.weights import load_generators, load_pair
from utils import InputError

A_TO_B, B_TO_A = DIRECTIONS


def generator(bias):
    """Weights in the layout of pytorch-CycleGAN-and-pix2pix that can be told apart by the bias of the last layer."""
    net = build_generator(GeneratorConfig(ngf=2, num_residual=1))
    nn.init.constant_(net.head[1].bias, bias)
    return to_junyanz(net)


AB = generator(-1.0)
BA = generator(1.0)
D = {"model.0.weight": torch.zeros(4, 3, 4, 4), "model.0.bias": torch.zeros(4)}
OPTIMISER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}


def under(prefix, state):
    return {f"{prefix}{name}": x for name, x in state.items()}


def found(path, **options):
    """The directions of the generators in a file, and the biases that tell them apart."""
    return [(metadata["direction"], net.head[1].bias[0].item()) for net, metadata in load_generators(path, **options)]


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("netG_A2B.pth", A_TO_B),
        ("netG_B2A.pth", B_TO_A),
        ("netGB2A_100.pth", B_TO_A),
        ("G_AtoB.pkl", A_TO_B),
        ("G_BtoA", B_TO_A),
        ("G_XtoY.pkl", A_TO_B),
        ("G_YtoX.pkl", B_TO_A),
        ("g_YX", B_TO_A),
        ("gen_ab", A_TO_B),
        ("net_gen_ba.pth", B_TO_A),
        ("genB2A_latest.pt", B_TO_A),
        ("generator_A_to_B.pt", A_TO_B),
        ("horse2zebra_B2A.pth", B_TO_A),
        ("state_dict.G_AB", A_TO_B),
        ("netG_B_state_dict", B_TO_A),
        ("200_net_G_B.pth", B_TO_A),
        ("genX", A_TO_B),
        ("genY", B_TO_A),
        ("gen_A", None),  # some name a generator by what it reads, others by what it writes
        ("G_AB_and_G_BA.pth", None),
        ("G_AA", None),
        ("net_G_Apples.pth", None),
        ("data2bits.pth", None),
        ("Gab_latest.pth", None),  # projects that write it so mean B to A
        ("dog_b.pth", None),
        ("model_state_dict", None),
    ],
)
def test_a_name_says_which_way_its_network_translates(name, direction):
    assert direction_in(name) == direction


def test_a_direction_that_contradicts_a_name_is_refused():
    torch.save(BA, "netG_B2A.pth")
    with pytest.raises(InputError, match=r"--direction AtoB: netG_B2A.pth translates BtoA"):
        load_networks(pathlib.Path("netG_B2A.pth"), "", asked=A_TO_B)
    torch.save({"G_A2B": AB, "disc": D}, "netG_B2A.pth")
    with pytest.raises(
        InputError, match=r"G_A2B in it translates AtoB, but the file's name says BtoA; rename the file"
    ):
        load_generators("netG_B2A.pth")


def test_two_files_are_put_in_order_by_their_names(capsys):
    for name, state in (("netG_A2B.pth", AB), ("netG_B2A.pth", BA), ("unnamed.pth", BA), ("other.pth", AB)):
        torch.save(state, name)
    paths = {path.stem: path for path in pathlib.Path().glob("*.pth")}
    nets = load_pair([paths["netG_B2A"], paths["netG_A2B"]])
    assert [(name, net.head[1].bias[0].item()) for name, net in nets.items()] == [("G_BA", 1), ("G_AB", -1)]
    assert "the files are in the order BtoA, AtoB; each is used for its own direction" in capsys.readouterr().out
    assert list(load_pair([paths["unnamed"], paths["other"]])) == ["G_AB", "G_BA"]
    assert list(load_pair([paths["netG_A2B"], paths["unnamed"]])) == ["G_AB", "G_BA"]
    for contradictory in (["unnamed", "netG_A2B"], ["netG_B2A", "unnamed"]):
        with pytest.raises(InputError, match="expected one file for each direction, AtoB first"):
            load_pair([paths[name] for name in contradictory])


def test_one_file_can_hold_both_generators_of_a_training():
    torch.save({"G_BA": BA, "G_AB": AB}, "both.pth")
    assert {name: net.head[1].bias[0].item() for name, net in load_pair([pathlib.Path("both.pth")]).items()} == {
        "G_BA": 1,
        "G_AB": -1,
    }


# -- containers ---------------------------------------------------------------------------------

LIGHTNING = {**under("G_AB.", AB), **under("G_BA.", BA), **under("D_A.", D), "vgg.0.weight": torch.zeros(2, 3, 3, 3)}
PAIRS = {
    "networks and optimisers": {"epoch": 7, "G_A2B": AB, "G_B2A": BA, "D_A": D, "G_optimizer": OPTIMISER},
    "state dicts": {"netG_A_state_dict": AB, "netG_B_state_dict": BA, "optimizer_G_state_dict": OPTIMISER},
    "nested": {"nets": {"gen_ab": AB, "gen_ba": BA, "disc_a": D}, "opts": {"gen": OPTIMISER}},
    "Lightning": {"state_dict": LIGHTNING, "optimizer_states": [OPTIMISER], "hyper_parameters": {"lr": 2e-4}},
    "Lightning, compiled": {"state_dict": {**under("genX._orig_mod.", AB), **under("genY._orig_mod.", BA)}},
    "a module in Lightning's": {"state_dict": {**under("model.g_ab.", AB), **under("model.g_ba.", BA)}},
    "nn.ModuleDict": {**under("generators.AB.", AB), **under("generators.BA.", BA), **under("discriminators.A.", D)},
    "nn.ModuleDict in a larger module": {
        "state_dict": under("model.generators.", {**under("A2B.", AB), **under("B2A.", BA)})
    },
    "averaged beside raw": {"G_AB": BA, "G_BA": AB, "G_AB_ema": AB, "G_BA_ema": BA},
}


@pytest.mark.parametrize("value", PAIRS.values(), ids=PAIRS)
def test_the_networks_of_a_file_are_found_and_the_direction_chooses_one(value):
    torch.save(value, "x.ckpt")
    assert found("x.ckpt") == [("AtoB", -1), ("BtoA", 1)]
    assert found("x.ckpt", asked=B_TO_A) == [("BtoA", 1)]


SEQUENTIAL = {name.removeprefix("model."): x for name, x in AB.items()}
NORMALIZE = {"0.mean": torch.zeros(3, 1, 1), "0.std": torch.ones(3, 1, 1)}
SINGLE = {
    "model": {"model": AB, "optimizer": OPTIMISER},
    "generator": {"generator": AB, "discriminator": D, "generator_optimizer": OPTIMISER},
    "prefix": under("generator.", AB),
    "wrapped": {"state_dict": under("model.", AB)},
    "nn.Sequential": SEQUENTIAL,
    "nn.ModuleList of one": under("0.", AB),
    "nn.Sequential in another": under("0.", SEQUENTIAL),
    "called net": under("net.", SEQUENTIAL),
    "FSDP, checkpointed": {
        f"_fsdp_wrapped_module.{name.replace('10.', '10._checkpoint_wrapped_module.')}": x for name, x in AB.items()
    },
    "with a number": {**AB, "epoch": 3, "loss": torch.tensor(0.5)},
}
AVERAGED = {
    "EMA of BasicSR": {"params": BA, "params_ema": AB},
    "EMA beside a state dict": {"state_dict": BA, "ema_state_dict": AB},
    "EMA beside a generator": {"generator": BA, "ema": AB},
    "AveragedModel": {"n_averaged": torch.tensor(3), **under("module.", AB)},
    "WeightAveraging of Lightning": {"state_dict": AB, "current_model_state": BA, "averaging_state": {"steps": 3}},
    "ema-pytorch": {**under("online_model.", BA), **under("ema_model.", AB), "initted": torch.tensor(True)},
    "ema-pytorch beside raw": {"G": BA, "G_ema": {**under("online_model.", BA), **under("ema_model.", AB)}},
    "torch_ema": {
        "model": BA,
        "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": [*AB.values()], "collected_params": None},
    },
    "AveragedModel beside raw": {"model": BA, "swa_model": {"n_averaged": torch.tensor(3), **under("module.", AB)}},
}


@pytest.mark.parametrize("value", SINGLE.values(), ids=SINGLE)
def test_the_only_generator_of_a_file_is_read(value, capsys):
    torch.save(value, "x.pth")
    assert found("x.pth") == [(None, -1)]
    assert "averaged weights" not in capsys.readouterr().out


@pytest.mark.parametrize("value", AVERAGED.values(), ids=AVERAGED)
def test_averaged_weights_are_preferred_and_that_is_said(value, capsys):
    torch.save(value, "x.pth")
    assert found("x.pth") == [(None, -1)]
    assert "averaged weights" in capsys.readouterr().out


@pytest.mark.parametrize("state", [AB, under("netG_A.", AB)], ids=["plain", "prefixed"])
def test_safetensors_of_other_projects_are_read_like_pickles(state):
    save_file({name: x.clone() for name, x in state.items()}, "netG_A2B.safetensors")
    assert found("netG_A2B.safetensors") == [("AtoB", -1)]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"first": AB, "second": BA}, "holds several generators, and no name says which is which: first (pytorch-"),
        ({"G_AB": AB, "old_G_AB": BA}, "holds several generators"),
        ({"D_A": D, "D_B": D}, "holds D_A (a discriminator), D_B (a discriminator); holds a discriminator; expected"),
        (
            {**under("0.", AB), **under("1.", BA)},
            "no name says which is which: 0 (pytorch-CycleGAN-and-pix2pix), 1 (pytorch-",
        ),
        (
            under("generators.", {**under("0.", SEQUENTIAL), **under("1.", SEQUENTIAL)}),
            "generators.0 (pytorch-CycleGAN-and-pix2pix), generators.1",
        ),
        ({**NORMALIZE, **under("1.", AB)}, "holds a network with mean and std of images, which change the values"),
        ({"mean": torch.zeros(1, 3, 1, 1), **AB}, "holds a network with mean and std of images"),
        (under("1.", AB), "holds a network behind layers without weights, which may change the values"),
        ({**under("net.", AB), "vgg.0.weight": torch.zeros(2, 3, 3, 3)}, "holds a network in named parts (net, vgg)"),
        (
            {"decay": 0.9, "shadow_params": [*AB.values()]},
            "holds averaged weights of torch_ema without names, which no single",
        ),
        ([AB, BA], "holds several generators, and no name says which is which: 0 (pytorch-"),
        ({"a.b": AB, "a": {"b": BA}}, "holds several generators"),
        ({"a\nb": AB, "c": BA}, r"a\nb (pytorch-"),
        ({f"{'g.' * 3000}weight": torch.zeros(1)}, "holds no tensors by name"),
        ({"optimizer": OPTIMISER, "epoch": 3}, "holds no tensors by name; expected the weights of a generator"),
    ],
)
def test_what_is_inside_is_named_if_no_generator_can_be_chosen(value, words):
    torch.save(value, "x.pth")
    with pytest.raises(InputError) as error:
        load_generators("x.pth")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_second_generator_that_cannot_be_read_is_pointed_out(capsys):
    torch.save({"G_AB": AB, "G_BA": {**BA, "model.13.query.weight": torch.zeros(1, 8, 1, 1)}}, "x.pth")
    assert found("x.pth") == [("AtoB", -1)]
    assert "x.pth: G_BA cannot be read: does not fit the network" in capsys.readouterr().out


def test_averaged_weights_without_names_are_those_of_the_network_of_the_same_name_or_pointed_out(capsys):
    averaged = {f"ema_{name}": {"shadow_params": [*state.values()]} for name, state in (("G_AB", AB), ("G_BA", BA))}
    torch.save({"G_AB": BA, "G_BA": AB, **averaged}, "x.pth")
    assert found("x.pth") == [("AtoB", -1), ("BtoA", 1)]
    torch.save({"G_AB": AB, "G_BA": BA, "ema": averaged["ema_G_AB"]}, "x.pth")
    capsys.readouterr()
    assert found("x.pth") == [("AtoB", -1), ("BtoA", 1)]
    assert "x.pth: ema cannot be read: holds averaged weights of torch_ema without names" in capsys.readouterr().out


# -- objects beside the tensors -----------------------------------------------------------------


class Kind(enum.Enum):
    PHOTO = "photo"


class Settings(dict):
    """A mapping with attributes, as many projects have one."""


class Options:
    """Has what a configuration object may contain, and would leave a trace if it were built."""

    def __init__(self):
        self.paths = [pathlib.Path("datasets/maps"), pathlib.PurePosixPath("x")]
        self.defaults = collections.defaultdict(list, {"a": [1]})
        self.recent = collections.deque([1, 2], maxlen=3)
        self.kind = Kind.PHOTO
        self.loss = nn.MSELoss

    def __setstate__(self, state):
        pathlib.Path("built").touch()


@pytest.mark.parametrize(
    "extra",
    [
        pathlib.Path("x"),
        argparse.Namespace(lr=0.1, root=pathlib.Path("x")),
        Options(),
        Settings(a=1),
        nn.Conv2d(1, 1, 1),
    ],
    ids=lambda extra: type(extra).__name__,
)
def test_objects_beside_the_tensors_are_skipped_and_named(extra, capsys):
    torch.save({"G_AB": AB, "options": extra, "more": [extra]}, "x.pth")
    assert found("x.pth") == [("AtoB", -1)]
    said = capsys.readouterr().out
    assert "x.pth: objects in it are skipped: " in said
    assert type(extra).__name__ in said or "more" in said
    assert not pathlib.Path("built").exists()


@pytest.mark.parametrize("start", [b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", b"\n<html>"])
def test_what_was_downloaded_instead_of_the_file_is_named(start):
    pathlib.Path("x.pth").write_bytes(start)
    with pytest.raises(InputError, match="a Git LFS pointer or a web page; download the file itself"):
        load_generators("x.pth")


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        ("onnx", "an ONNX model; expected weights of PyTorch, safetensors or Keras"),
        ("pdparams", "weights of Paddle; expected weights of PyTorch, safetensors or Keras"),
        ("index", r"a checkpoint of TensorFlow; save the network there: generator\.save_weights"),
        ("data-00000-of-00001", r"a checkpoint of TensorFlow; save the network there: generator\.save_weights"),
    ],
)
def test_files_of_other_formats_are_named(suffix, words):
    Path(f"G.{suffix}").write_bytes(b"\x08\x07\x12\x07pytorch")
    with pytest.raises(InputError, match=words):
        load_generators(Path(f"G.{suffix}"))


def test_files_that_are_code_are_refused_with_the_way_to_save_their_tensors():
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 7)), "module.pth")
    with pytest.raises(InputError, match=r"a whole pickled module.*torch\.save\(net\.state_dict\(\), FILE\)"):
        load_generators("module.pth")
    torch.save({"state": AB, "options": Options()}, "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"objects of test_containers\.Options in it; save the tensors alone") as error:
        load_generators("old.pth")
    assert "\x1b" not in str(error.value)
    assert "x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("x/constants.pkl", "TorchScript; save its tensors: torch.save(torch.jit.load(FILE).state_dict()"),
        ("x/models/model.json", "a program of torch.export; save its tensors: torch.save(program.state_dict"),
    ],
)
def test_archives_of_compiled_programs_are_named(member, words):
    with zipfile.ZipFile("x.pt", "w") as archive:
        archive.writestr(member, "")
    with pytest.raises(InputError) as error:
        load_generators("x.pt")
    assert words in str(error.value)


def test_the_networks_of_a_file_have_the_names_that_lead_to_them():
    torch.save(PAIRS["Lightning"], "x.ckpt")
    names = [network.name for network in list_networks(pathlib.Path("x.ckpt"))]
    assert names == ["state_dict.G_AB", "state_dict.G_BA", "state_dict.D_A", "state_dict.vgg"]
    assert isinstance(list_networks(pathlib.Path("x.ckpt"))[0].direction, Direction)
