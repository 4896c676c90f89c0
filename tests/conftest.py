"""Tiny data sets and runs, made in a temporary folder that is also the working directory."""

import random

import pytest
import torch
from PIL import Image

TINY = [
    *("--img_height", "16", "--img_width", "16", "--num_residual", "1", "--ngf", "4", "--ndf", "4"),
    *("--n_layers_D", "1", "--batch_size", "2", "--precision", "fp32", "--device", "cpu"),
]


def noise_picture(seed, size=(20, 18), mode="RGB"):
    """A picture whose pixels all differ, from a seed; size is (width, height)."""
    data = random.Random(seed).randbytes(size[0] * size[1] * len(mode))
    return Image.frombytes(mode, size, data)


def make_dataset(root, counts=(5, 4, 2, 2), size=(20, 18)):
    """Write trainA trainB testA testB below root with so many pictures each."""
    for split, count in zip(("trainA", "trainB", "testA", "testB"), counts, strict=True):
        (root / split).mkdir(parents=True)
        for i in range(count):
            noise_picture(f"{split}{i}", size).save(root / split / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of programs that a test starts; tiny networks gain nothing from more
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
