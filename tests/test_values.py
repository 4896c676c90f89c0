"""Value ranges of images of more than 8 bits: measured, declared, recorded, used."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_networks
from PIL import Image
from tiny_runs import save_run

import datasets
import distill
import test as test_command
import train
from toolkit import images
from toolkit.values import clipped_ranges, common_range, parse_range, range_in_text, range_text, ranges_of
from toolkit.weights import load_generator

SIDE = 20
RAMP = np.add.outer(np.arange(SIDE), np.arange(SIDE)) / (2 * SIDE - 2)  # 0 to 1
LEVELS = RAMP * 255
FILES = {  # name: values, the range of a folder with this file alone
    "u16.png": ((RAMP * 65535).astype(np.uint16), (0, 65535)),
    "12_bit.png": ((RAMP * 4095).astype(np.uint16), (0, 4095)),
    "depth_mm.png": ((400 + RAMP * 3000).astype(np.uint16), (400, 3400)),
    "labels.tif": (LEVELS.astype(np.int32), (0, 255)),
    "unit.tif": (RAMP.astype(np.float32), (0, 1)),
    "overshoot.tif": ((RAMP * 1.04 - 0.02).astype(np.float32), (0, 1)),
    "signed.tif": ((RAMP * 2 - 1).astype(np.float32), (-1, 1)),
    "hounsfield.tif": ((RAMP * 4000 - 1000).astype(np.float32), (-1000, 3000)),
    "levels.tif": (LEVELS.astype(np.float32), (0, 255)),
}


@pytest.fixture(autouse=True)
def _no_warning_yet():
    clipped_ranges.clear()


def make_ct(root, counts=(4, 4, 2, 2)):
    """A data set whose A are slices of 12 bits and whose B are Hounsfield units, as floats."""
    for split, count in zip(("trainA", "trainB", "testA", "testB"), counts, strict=True):
        (root / split).mkdir(parents=True)
        for i in range(count):
            turned = np.rot90(RAMP, i) if i < 4 else RAMP
            if split.endswith("A"):
                Image.fromarray((turned * 4095).astype(np.uint16)).save(root / split / f"{i}.png")
            else:
                Image.fromarray((turned * 4000 - 1000).astype(np.float32)).save(root / split / f"{i}.tif")
    return root


@pytest.mark.parametrize("name", FILES)
def test_the_range_of_a_folder_is_measured_and_gives_all_levels(name, capsys):
    values, expected = FILES[name]
    Image.fromarray(values).save(name)
    found = datasets.find_range(datasets.DataConfig(), "A", [Path(name)])
    assert found == expected
    assert "1 image of more than 8 bits" in capsys.readouterr().out
    for channels in (1, 3):
        x = images.ImageReader(None, channels, found)(Path(name))
        assert x.shape == (channels, SIDE, SIDE)
        tolerance = 5 if name == "overshoot.tif" else 1
        assert np.abs((x[0].numpy() + 1) * 127.5 - LEVELS).max() <= tolerance


def test_a_range_belongs_to_the_folder_not_to_an_image():
    Image.fromarray(LEVELS.astype(np.float32)).save("a.tif")
    Image.fromarray((RAMP * 0.9).astype(np.float32)).save("dark.tif")
    found = datasets.find_range(datasets.DataConfig(), "B", [Path("a.tif"), Path("dark.tif")])
    assert found == (0, 255)
    assert images.image_to_pixels(images.read_image(Path("dark.tif"), 1, found)).max() == pytest.approx(0.9)


def test_a_declared_range_is_not_measured():
    config = datasets.DataConfig(range_A="0,100")
    assert datasets.find_range(config, "A", [Path("missing.tif")]) == (0, 100)


def test_images_of_8_bits_have_no_range():
    Image.fromarray(LEVELS.astype(np.uint8)).save("a.png")
    assert datasets.find_range(datasets.DataConfig(), "A", [Path("a.png")]) is None
    narrow = images.read_image(Path("a.png"), 1, (0.0, 10.0))
    assert np.array_equal(np.asarray(narrow), LEVELS.astype(np.uint8))


def test_values_outside_are_clipped_and_that_is_said_once(capsys):
    values = RAMP.astype(np.float32)
    values[:2] = np.inf
    values[2, :3] = (-7, -np.inf, np.nan)
    for name in ("a.tif", "b.tif"):
        Image.fromarray(values).save(name)
        found = datasets.find_range(datasets.DataConfig(range_A="0,1"), "A", [])
        pixels = images.image_to_pixels(images.read_image(Path(name), 1, found))
        assert (pixels[0, :2] == 255).all()
        assert (pixels[0, 2, :3] == 0).all()
    assert capsys.readouterr().err.count("11% of its values are outside the range 0,1, and clipped") == 1


def test_infinite_values_do_not_count_for_a_range():
    sky = RAMP.astype(np.float32)
    sky[-3:] = np.inf
    Image.fromarray(sky).save("sky.tif")
    assert datasets.find_range(datasets.DataConfig(), "A", [Path("sky.tif")]) == (0, sky[:-3].max())


def test_a_constant_domain_needs_a_declared_range(refused):
    make_ct(Path("datasets/ct"))
    for path in Path("datasets/ct/trainA").iterdir():
        Image.fromarray(np.full((SIDE, SIDE), 7, np.uint16)).save(path)
    line = refused(train.main, "--dataset_name", "ct", *TINY)
    assert "trainA: all values of its images are equal; give --range_A LOW,HIGH" in line


@pytest.mark.parametrize(
    ("extremes", "expected"),
    [
        ([(3, 4000)], (0, 4095)),
        ([(-0.04, 1.04)], (0, 1)),
        ([(-0.04, 1.2)], (-0.04, 1.2)),
        ([(0, 100), (50, 700)], (0, 700)),
        ([(math.inf, -math.inf), (2, 3)], (2, 3)),
        ([(5, 5)], None),
        ([], None),
    ],
)
def test_a_known_range_is_recognised_if_values_nearly_fill_it(extremes, expected):
    assert common_range(extremes) == expected


@pytest.mark.parametrize("text", ["0,4095", "-1000,3000", "0.05,1e4", "-1.5,-0.25", "auto"])
def test_a_range_survives_as_text(text):
    assert parse_range(range_in_text(parse_range(text))) == parse_range(text)
    assert range_text(text) == text


@pytest.mark.parametrize("text", ["", "1", "3,1", "1,1", "a,b", "0,inf", "nan,1", "1,2,3", "Auto"])
def test_what_is_no_range_is_refused(text, refused):
    line = refused(train.main, "--range_A", text)
    assert "expected LOW,HIGH, such as 0,4095 or -1000,3000, or auto" in line


@pytest.mark.parametrize("limits", [[1], [2, 1], ["a", "b"], [0, math.inf], {"0": 1}, None, "01", [[0], [1]]])
def test_a_wrong_range_in_foreign_metadata_is_left_out(limits):
    assert ranges_of({"range_A": limits, "range_B": [0, 255]}) == {"B": (0, 255)}


def test_a_range_that_begins_with_a_minus_is_a_value_on_the_command_line_and_in_a_recipe():
    Path("ct.txt").write_text("--range_B -1000,3000\n--lr 1e-4", encoding="utf-8")
    for argv in (["--range_B", "-1000,3000"], ["@ct.txt"], ["--range_B=-1000,3000"]):
        args = train.parse_args(argv)
        assert args.range_B == "-1000,3000"


def test_values_without_a_known_range_are_refused_with_the_flag_that_states_it(refused, tmp_path):
    Image.fromarray(LEVELS.astype(np.float32)).save("levels.tif")
    with pytest.raises(images.UnreadableImage, match=r"values from 0 to 255, and no range is known.*--range_A 0,255"):
        images.read_image(Path("levels.tif"))


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_training_images_keep_more_than_8_bits(cache):
    make_ct(Path("datasets/ct"))
    config = datasets.DataConfig(
        dataset_name="ct", img_height=SIDE, img_width=SIDE, load_scale=1, flip=False, batch_size=4, cache=cache
    )
    data = datasets.TrainingData(config, 0, torch.device("cpu"), {})
    assert data.ranges == {"A": (0, 4095), "B": (-1000, 3000)}
    for epoch in range(2):  # the second from the cache
        for real_A, real_B in data.batches(epoch, 0, torch.device("cpu")):
            for real, step in ((real_A, 1 / 4095), (real_B, 1 / 65535)):
                assert real.shape == (4, 3, SIDE, SIDE)
                assert real.dtype == torch.float32
                values = ((real[0, 0] + 1) / 2).sort().values.flatten().sort().values
                expected = torch.from_numpy(RAMP).flatten().sort().values
                assert (values - expected).abs().max() <= step + 1e-6


@pytest.mark.slow
def test_a_run_records_its_ranges_and_everything_after_it_uses_them(capsys):
    make_ct(Path("datasets/ct"))
    options = ["--dataset_name", "ct", *TINY, "--num_epochs", "1"]
    train.main([*options, "--eval_interval", "1", "--checkpoint_interval", "1"])
    flags = json.loads(Path("saved_models/ct/run.json").read_text(encoding="utf-8"))["flags"]
    assert (flags["range_A"], flags["range_B"]) == ("0,4095", "-1000,3000")
    _, metadata = load_generator("saved_models/ct/G_AB.safetensors")
    assert ranges_of(metadata) == {"A": (0, 4095), "B": (-1000, 3000)}
    for path in Path("datasets/ct/trainA").iterdir():  # other values do not move a range that is recorded
        Image.fromarray((RAMP * 1000).astype(np.uint16)).save(path)
    train.main(["--run_name", "ct", "--start_from", "latest", "--num_epochs", "2"])
    distill.main(["--dataset_name", "ct", "--num_epochs", "1", "--student_residual", "0", "--run_name", "student"])
    for run in ("ct", "student"):
        flags = json.loads(Path(f"saved_models/{run}/run.json").read_text(encoding="utf-8"))["flags"]
        assert (flags["range_A"], flags["range_B"]) == ("0,4095", "-1000,3000")
    for epoch in ("latest", "1"):
        metrics = "paired,identity,losses,spike,cycle"
        scores = test_command.main(["--run_name", "ct", "--epoch", epoch, "--metrics", metrics])
        for name, pixels in (("real_A/0.png", LEVELS), ("truth_B/0.png", LEVELS)):
            found = Image.open(Path("generated_images/ct/test", name))
            assert np.abs(np.asarray(found.convert("L")).astype(int) - pixels).max() <= 1
        assert "RMSE in units" in scores["AtoB"]["paired"]["model"]
    assert "error" not in capsys.readouterr().err


def test_another_range_makes_results_anew():
    make_ct(Path("datasets/ct"))
    train.main(["--dataset_name", "ct", *TINY, "--num_epochs", "1"])
    results = Path("generated_images/ct/translated")
    options = ["--run_name", "ct", "--input", "datasets/ct/testA", "--skip_existing"]
    test_command.main(options)
    first = (results / "real_A" / "0.png").read_bytes()
    test_command.main([*options, "--range_A", "0,8190"])
    assert (results / "real_A" / "0.png").read_bytes() != first


def test_translations_are_also_written_in_the_units_of_their_domain(monkeypatch):
    make_ct(Path("datasets/ct"))
    networks = {name: tiny_networks()[name] for name in ("G_AB", "G_BA")}
    for net in networks.values():
        net.forward = lambda x: x / 2
    metadata = {"size": [SIDE, SIDE], "range_A": [0, 4095], "range_B": [-1000, 3000], "dataset_name": "ct"}
    monkeypatch.setattr(test_command, "load_networks", lambda *_: (networks, metadata))
    scores = test_command.main(["--run_name", "ct", "--dataset_name", "ct", "--metrics", "paired"])
    results = Path("generated_images/ct/test")
    found = Image.open(results / "values_B" / "0.tif")
    assert found.mode == "F"
    assert np.abs(np.asarray(found) - (RAMP * 2000)).max() <= 1  # of 4,000 units; a level has 15.7
    expected = math.sqrt(np.mean((RAMP * 2000 - (RAMP * 4000 - 1000)) ** 2))
    assert scores["AtoB"]["paired"]["model"]["RMSE in units"] == pytest.approx(expected, rel=2e-3)
    assert "values_B" in (results / "index.html").read_text(encoding="utf-8")
    test_command.main(["--run_name", "ct", "--dataset_name", "ct", "--skip_existing", "--direction", "AtoB"])
    (results / "values_B" / "0.tif").unlink()
    test_command.main(["--run_name", "ct", "--dataset_name", "ct", "--skip_existing", "--direction", "AtoB"])
    assert (results / "values_B" / "0.tif").is_file()


def test_a_run_and_a_student_of_networks_without_ranges_do_not_measure_any(capsys):
    for split in ("trainA", "trainB", "testA", "testB"):
        Path("datasets/tiny", split).mkdir(parents=True)
        for i in range(2):
            Image.fromarray((RAMP * 40000).astype(np.uint16)).save(f"datasets/tiny/{split}/{i}.png")
    save_run(epochs=1, num_residual=2)  # as a version without value ranges left it
    train.main(["--run_name", "tiny", "--start_from", "latest", "--num_epochs", "2"])
    distill.main(["--teacher", "tiny", "--run_name", "student", "--student_residual", "1", "--num_epochs", "1"])
    assert "more than 8 bits" not in capsys.readouterr().out
    for run in ("tiny", "student"):
        flags = json.loads(Path(f"saved_models/{run}/run.json").read_text(encoding="utf-8"))["flags"]
        assert flags["range_A"] == "auto"


def test_test_images_of_unknown_range_are_named_and_not_scored(refused):
    for split in ("trainA", "trainB", "testA", "testB"):
        Path("datasets/tiny", split).mkdir(parents=True)
        for i in range(2):
            values = RAMP.astype(np.float32) * (255 if split == "testB" else 1)
            Image.fromarray(values).save(f"datasets/tiny/{split}/{i}.tif")
    save_run(epochs=1)
    line = refused(test_command.main, "--run_name", "tiny", "--direction", "AtoB", "--metrics", "identity")
    assert "images are unreadable; repair or remove them" in line
