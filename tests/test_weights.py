import errno
import json
from pathlib import Path

import pytest
import torch
from breakage import full_disk
from edits import EDITS, FUZZ, edited
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models import GeneratorConfig, build_generator
from toolkit.converters import to_junyanz
from toolkit.weights import load_generator, load_pair, save_generator
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


def test_a_file_is_recognised_by_its_content_and_channels_last_weights_are_unchanged(tmp_path):
    net = build_generator(CONFIG).to(memory_format=torch.channels_last)
    save_generator(str(tmp_path / "G"), net, {"direction": "BtoA", "size": [16, 16]})
    assert torch.equal(load_generator(tmp_path / "G")[0].stem[1].weight, net.stem[1].weight)


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
        (lambda m: m["config"].update(vit_size=[1]), "its metadata holds no valid config"),
        (lambda m: m["config"].update(vit_blocks=4.0), "vit_blocks 4.0: expected int"),
        (lambda m: m["config"].update(extra=1), "no valid config.*'extra'"),
        (lambda m: m.update(config=[1]), "no valid config"),
        (lambda m: m.pop("config"), "no valid config: 'config'"),
        (lambda m: m["config"].update(ngf=8), r"blocks.0.body.1.bias is \(16,\), expected \(32,\).*and [0-9]+ more"),
        (lambda m: m["config"].update(num_residual=2), "blocks.1.body.1.bias is missing"),
        (lambda m: m["config"].update(num_residual=0), r"blocks.0.body.1.bias, \(16,\), is not part of this network"),
    ],
)
def test_metadata_is_not_trusted(saved, change, words):
    rewrite(saved[0], change)
    with pytest.raises(InputError, match=words) as error:
        load_generator(saved[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        ([0, 0, float("nan")], "head.1.bias is not finite"),
        ([0, 0, float("inf")], "head.1.bias is not finite"),
        ([0, 0, 0], "head.1.bias is torch.int64, expected torch.float32"),
    ],
)
def test_weights_that_are_not_finite_or_of_another_type_are_refused(saved, bias, words):
    rewrite(saved[0], tensors=load_file(saved[0]) | {"head.1.bias": torch.tensor(bias)})
    with pytest.raises(InputError, match=words):
        load_generator(saved[0])


def test_files_that_hold_no_generator_are_refused(saved, tmp_path):
    path = saved[0]
    whole = path.read_bytes()
    for data in (b"", b"abc", whole[:100], whole[:-5], b"\xff" * 16 + whole, torch.rand(9).numpy().tobytes()):
        path.write_bytes(data)
        with pytest.raises(InputError, match="not a readable safetensors file"):
            load_generator(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="holds an unknown layout"):
        load_generator(path)
    save_file({"w": torch.zeros(2)}, path, {"recipe": "{"})
    with pytest.raises(InputError, match="not a readable"):
        load_generator(path)
    with pytest.raises(InputError, match="no such file"):
        load_generator(tmp_path / "none.safetensors")


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


def test_generators_of_two_saves_of_a_run_are_pointed_out(tmp_path, capsys):
    net = build_generator(CONFIG)
    for name, direction, pair in (("1", "AtoB", "x"), ("2", "BtoA", "x"), ("3", "BtoA", "y")):
        metadata = {"direction": direction, "size": [16, 16], "run_name": "r", "pair": pair}
        save_generator(tmp_path / name, net, metadata)
    load_pair([tmp_path / "1", tmp_path / "2"])
    assert capsys.readouterr().err == ""
    load_pair([tmp_path / "1", tmp_path / "3"])
    assert "3: of another save of r than the file for the other direction" in capsys.readouterr().err


# -- damaged and hostile files ------------------------------------------------------------------


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def test_nothing_in_a_file_is_executed():
    torch.save(to_junyanz(build_generator(CONFIG)) | {"trap": Trap()}, "latest_net_G.pth")
    with pytest.raises(InputError, match="not a readable checkpoint of plain tensors and values"):
        load_generator("latest_net_G.pth")
    assert not Path("sprung").exists()


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "latest_net_G.pth"
    net = build_generator(CONFIG, init="orthogonal")
    torch.save(to_junyanz(net), path)
    whole = path.read_bytes()
    for data in (b"", b"PK", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(data)
        with pytest.raises(InputError, match="not a readable checkpoint"):
            load_generator(path)
    start = whole.index(net.stem[1].weight.detach().numpy().tobytes())  # one bit of one weight
    path.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
    with pytest.raises(InputError, match="damaged"):
        load_generator(path)


def read_or_refused_in_one_line(path):
    line = str(path)
    try:
        load_generator(path)
    except InputError as error:
        line = one_line(error)
    assert str(path) in line
    assert len(line) < 1000


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
    read_or_refused_in_one_line(path)


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
    read_or_refused_in_one_line(tmp_path / "x.pth")
