"""FID and KID through torch-fidelity."""

import sys

import pytest
import torch
from conftest import make_dataset, noise_image

import utils
from toolkit import images
from toolkit.files import read_archive
from toolkit.images import load_image, range_to_bytes
from toolkit.metrics import fid_kid

CPU = torch.device("cpu")


def load(path):
    return range_to_bytes(load_image(path, (32, 32)))


def test_missing_torch_fidelity_and_wrong_weights_are_one_line(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        noise_image(i).save(path)
    given = (paths, paths, load, ["fid"])
    with pytest.raises(utils.InputError, match=r"none\.pth"):
        fid_kid(*given, tmp_path / "none.pth", CPU)
    with pytest.raises(utils.InputError, match="no such file"):  # what a stage asks before
        read_archive(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(utils.InputError, match=r"--inception_weights .*other\.pth: not the weights"):
        fid_kid(*given, tmp_path / "other.pth", CPU)
    with pytest.raises(utils.InputError, match="--metrics fid: 1 image on one side"):
        fid_kid(paths[:1], paths, load, ["fid"], None, CPU)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(utils.InputError, match=r"pip install -r requirements-metrics.txt"):
        fid_kid(*given, None, CPU)


def test_weights_that_cannot_be_fetched_name_the_flag_that_gives_them(tmp_path, monkeypatch):
    torch_fidelity = pytest.importorskip("torch_fidelity")

    def offline(**_):
        raise OSError("no network")

    monkeypatch.setattr(torch_fidelity, "calculate_metrics", offline)
    with pytest.raises(utils.InputError, match=r"no network.*--inception_weights FILE"):
        fid_kid([tmp_path] * 2, [tmp_path] * 2, load, ["kid"], None, CPU)


@pytest.mark.slow
def test_fid_of_a_folder_against_itself_is_zero_and_rises_with_blur(tmp_path, inception, capsys):
    real = make_dataset(tmp_path / "pictures", (12, 1, 1, 1), (64, 64)) / "trainA"
    paths = sorted(real.iterdir())
    values = []
    for strength in (0, 1, 4):
        blurred = []
        for path in paths:
            blurred.append(tmp_path / f"{strength}-{path.name}")
            photo = images.tensor_to_image(load_image(path, (64, 64)))
            side = 64 // (strength + 1)
            photo.resize((side, side)).resize((64, 64)).save(blurred[-1])
        values.append(fid_kid(blurred, paths, load, ["fid", "kid"], inception, CPU))
    assert "12 against 12 images are biased" in capsys.readouterr().err
    fids = [row["FID"] for row in values]
    assert fids[0] == pytest.approx(0, abs=1e-3)
    assert fids == sorted(fids)
    assert fids[1] > 10 * abs(fids[0])
    assert (values[0]["translated"], values[0]["real"]) == (12, 12)
