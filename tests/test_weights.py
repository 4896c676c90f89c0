import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import DiscriminatorConfig, GeneratorConfig, build_generator
from utils import InputError
from weights import load_generator, load_tensors, read_config, save_generator

CONFIG = GeneratorConfig(ngf=4, num_residual=1)


@pytest.fixture
def saved(tmp_path):
    net = build_generator(CONFIG)
    save_generator(tmp_path / "G.safetensors", net, {"direction": "AtoB", "size": [16, 24], "epoch": 3})
    return tmp_path / "G.safetensors", net


def rewrite(path, change=None, tensors=None):
    """Write the file again with a changed recipe or changed tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    if change:
        change(recipe)
    save_file(tensors or load_file(path), path, {"recipe": json.dumps(recipe)})


def test_a_generator_comes_back_with_its_recipe(saved):
    path, net = saved
    back, recipe = load_generator(path)
    x = torch.rand(1, 3, 16, 24)
    assert torch.equal(back(x), net(x))
    assert back.config == CONFIG
    assert not back.training
    assert (recipe["direction"], recipe["size"], recipe["range"], recipe["epoch"]) == ("AtoB", [16, 24], [-1, 1], 3)


def test_channels_last_weights_are_written_whole(saved):
    path, net = saved
    save_generator(path, net.to(memory_format=torch.channels_last), {"direction": "AtoB", "size": [16, 24]})
    assert torch.equal(load_generator(path)[0].stem[1].weight, net.stem[1].weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(direction="AtoC"), "direction = AtoC"),
        (lambda r: r.update(size=[16]), "size = "),
        (lambda r: r.update(size=[2, 10**9]), "size = "),
        (lambda r: r.update(size=[16.0, 16.0]), "size = "),
        (lambda r: r.update(format=2), "no recipe of this project"),
        (lambda r: r["config"].update(ngf=10**9), "ngf = 1000000000"),
        (lambda r: r["config"].update(ngf=-1), "ngf = -1"),
        (lambda r: r["config"].update(ngf="4"), "ngf = 4"),
        (lambda r: r["config"].update(ngf=True), "ngf = True"),
        (lambda r: r["config"].update(norm="evil"), "norm = evil"),
        (lambda r: r["config"].pop("ngf"), "no GeneratorConfig"),
        (lambda r: r["config"].update(extra=1), "no GeneratorConfig"),
        (lambda r: r.update(config=[1]), "no GeneratorConfig"),
        (lambda r: r["config"].update(ngf=8), r"blocks.0.body.1.bias is \(16,\), expected \(32,\)"),
        (lambda r: r["config"].update(num_residual=2), "blocks.1.body.1.bias is missing"),
        (lambda r: r["config"].update(num_residual=0), "blocks.0.body.1.bias is not part of this network"),
    ],
)
def test_a_recipe_is_not_trusted(saved, change, words):
    rewrite(saved[0], change)
    with pytest.raises(InputError, match=words) as error:
        load_generator(saved[0])
    assert "\n" not in str(error.value)


def test_only_the_first_three_differences_are_named(saved):
    rewrite(saved[0], lambda r: r["config"].update(ngf=8))
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


def test_files_that_are_no_generators_are_refused(saved, tmp_path):
    path = saved[0]
    whole = path.read_bytes()
    for data in (b"", b"abc", whole[:100], whole[:-5], b"\xff" * 16 + whole, torch.rand(9).numpy().tobytes()):
        path.write_bytes(data)
        with pytest.raises(InputError, match="not a readable safetensors file"):
            load_generator(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="no recipe of this project"):
        load_generator(path)
    save_file({"w": torch.zeros(2)}, path, {"recipe": "{"})
    with pytest.raises(InputError, match="not a readable"):
        load_generator(path)
    with pytest.raises(InputError, match="no such file"):
        load_generator(tmp_path / "none.safetensors")


def test_load_tensors_refuses_other_types_and_containers():
    net = build_generator(CONFIG)
    tensors = dict(net.state_dict())
    with pytest.raises(InputError, match=r"head.1.bias is torch.int64, expected torch.float32"):
        load_tensors(net, tensors | {"head.1.bias": torch.zeros(3, dtype=torch.int64)}, "x")
    for nothing in (None, [], {"a": 1}):
        with pytest.raises(InputError, match="no tensors by name"):
            load_tensors(net, nothing, "x")


def test_discriminator_configs_are_read_with_the_same_distrust():
    values = {
        "discriminator": "patch",
        "channels": 3,
        "ndf": 4,
        "n_layers": 2,
        "max_mult": 8,
        "norm": "none",
        "pool": False,
    }
    assert read_config(DiscriminatorConfig, values, "x") == DiscriminatorConfig(ndf=4, n_layers=2, norm="none")
    with pytest.raises(InputError, match="discriminator = style"):
        read_config(DiscriminatorConfig, values | {"discriminator": "style"}, "x")
