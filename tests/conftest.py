"""Tiny data sets, networks and runs, made in a temporary folder that is also the working directory."""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import dataclasses
import random

import pytest
import torch
from PIL import Image

from cyclegan import CycleGAN, LossConfig, OptimConfig
from models import DIRECTIONS, DiscriminatorConfig, GeneratorConfig, build_discriminator, build_generator
from toolkit import images, pages, readers
from toolkit.devices import seed_everything
from toolkit.executor import ExecutorConfig

TINY = (
    "--img_height 16 --img_width 16 --num_residual 1 --ngf 4 --ndf 4 --n_layers_D 1 --batch_size 2 "
    "--precision fp32 --device cpu"
).split()


def noise_image(seed, size=(20, 18), mode="RGB"):
    """An image whose pixels all differ, from a seed; size is (width, height)."""
    data = random.Random(seed).randbytes(size[0] * size[1] * len(mode))
    return Image.frombytes(mode, size, data)


def make_dataset(root, counts=(5, 4, 2, 2), size=(20, 18)):
    """Write trainA trainB testA testB below root with so many images each."""
    for split, count in zip(("trainA", "trainB", "testA", "testB"), counts, strict=True):
        (root / split).mkdir(parents=True)
        for i in range(count):
            noise_image(f"{split}{i}", size).save(root / split / f"{i}.png")
    return root


def tiny_networks(**changes):
    """The four networks for 16 px, as random as their seed; changes: fields of their configs, init, seed."""
    seed_everything(changes.get("seed", 0))
    init = changes.get("init", "normal")
    generator = config_of(GeneratorConfig, {"ngf": 4, "num_residual": 1, **changes})
    discriminator = config_of(DiscriminatorConfig, {"ndf": 4, "n_layers": 1, **changes})
    networks = {direction.generator: build_generator(generator, init) for direction in DIRECTIONS}
    return networks | {name: build_discriminator(discriminator, init) for name in ("D_A", "D_B")}


def tiny_model(**changes):
    """A CycleGAN of tiny networks in float32 on the CPU, its next random number the same whatever was built.

    changes: fields of the configs, and arguments of CycleGAN, by name;
             dtype (float64 where equality is tested); networks, in place of new ones
    """
    known = {"init", "dtype", "networks"}
    for kind in (GeneratorConfig, DiscriminatorConfig, LossConfig, OptimConfig, ExecutorConfig):
        known |= {field.name for field in dataclasses.fields(kind)}
    networks = changes.get("networks") or tiny_networks(**changes)
    for net in networks.values():
        net.to(changes.get("dtype", torch.float32))
    seed_everything(changes.get("seed", 0))
    arguments = {name: value for name, value in changes.items() if name not in known}
    loss_config = config_of(LossConfig, changes)
    optim_config = config_of(OptimConfig, changes)
    executor_config = config_of(ExecutorConfig, changes)
    return CycleGAN(networks, loss_config, optim_config, executor_config=executor_config, **arguments)


def config_of(kind, values):
    """A config of those values that are fields of it."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def differences(a, b, path=""):
    """Paths at which two nested states differ; tensors are compared bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{path}/{key}" for key in a.keys() ^ b.keys()]
        return found + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits_of(a), bits_of(b))
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [path]


def bits_of(x):
    """A tensor as bytes: two zeros of different sign differ, and what is not a number equals itself."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture(autouse=True)
def in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of programs that a test starts; tiny networks gain nothing from more
    monkeypatch.setattr(images, "max_pixels", images.max_pixels)  # what a command sets for its process
    monkeypatch.setattr(pages, "choice", pages.choice)
    readers.is_installed.cache_clear()  # of a test in which nothing was installed
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield tmp_path
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny(tmp_path):
    """A data set named tiny below ./datasets."""
    return make_dataset(tmp_path / "datasets" / "tiny")


@pytest.fixture
def refused(capsys):
    """Call a main that must refuse: returns its one line on stderr."""

    def call(main, *argv, code=2):
        with pytest.raises(SystemExit) as exit_:
            main([str(word) for word in argv])
        lines = capsys.readouterr().err.strip().splitlines()
        assert exit_.value.code == code
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1
        assert lines[-1] == errors[0]
        return errors[0]

    return call


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """A file of random weights for FID and KID: the path is real, the numbers mean nothing."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with monkeypatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
        net = library.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


@pytest.fixture
def no_plots(monkeypatch):
    """Leave losses.png out: drawing it takes more time than all else in a tiny run."""
    monkeypatch.setattr("toolkit.monitor.plot_losses", lambda rows, path: None)


def warnings_in(capsys):
    """The warnings said since the last look."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
