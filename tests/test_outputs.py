"""Formats of translations, one file as output, transparency, georeference."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import noise_image, tiny_networks
from PIL import Image, TiffImagePlugin

import test as test_command
from toolkit import images, outputs
from toolkit.outputs import OutputFormat

SIDE = 16
RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
HU = {"range_A": [0, 4095], "range_B": [-1000, 3000]}
DEPTH = {"range_B": [0, 4095]}


@pytest.fixture
def translate(monkeypatch):
    """Return what calls test.py with networks that change nothing, and metadata."""

    def call(*argv, **metadata):
        argv = argv[0] if isinstance(argv[0], list) else argv  # as `refused` gives them
        networks = {name: net for name, net in tiny_networks().items() if name.startswith("G")}
        for net in networks.values():
            net.forward = lambda x: x
        loaded = (networks, {"size": [SIDE, SIDE], "dataset_name": "a2b", **metadata})
        monkeypatch.setattr(test_command, "load_networks", lambda *_: loaded)
        return test_command.main([*map(str, argv), "--device", "cpu", "--precision", "fp32"])

    return call


def write_inputs(*names):
    """Write images of the kinds that the names say into the folder "in": greys of 12 bits, HU, RGB, RGBA."""
    Path("in").mkdir()
    for name in names:
        path = Path("in", name)
        if path.stem == "deep":
            Image.fromarray((RAMP * 4095).round().astype(np.uint16)).save(path)
        elif path.stem == "float":
            Image.fromarray((RAMP * 4095).astype(np.float32)).save(path)
        else:
            noise_image(1, (SIDE, SIDE), "RGBA" if path.stem == "alpha" else "RGB").save(path)


def written(folder="generated_images/a2b/translated"):
    return {path.relative_to(folder).as_posix(): path for path in Path(folder).glob("[fv]*_B/*")}


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image


@pytest.mark.parametrize(
    ("asked", "suffix", "value_range", "expected"),
    [
        ("png", ".jpg", None, OutputFormat("png")),
        ("png", ".png", (0, 4095), OutputFormat("png")),
        ("jpg", ".tif", (0, 1), OutputFormat("jpg")),
        ("tif", ".png", None, OutputFormat("tif")),
        ("tif", ".png", (-1, 1), OutputFormat("tif", True)),
        ("npy", ".png", (-1, 1), OutputFormat("npy", True)),
        ("same", ".JPEG", None, OutputFormat("jpg")),
        ("same", ".jpg", (0, 4095), OutputFormat("jpg")),
        ("same", ".webp", None, OutputFormat("webp")),
        ("same", ".bmp", None, OutputFormat("png")),
        ("same", ".bmp", (0, 4095), OutputFormat("tif", True)),
        ("same", ".png", None, OutputFormat("png")),
        ("same", ".png", (400, 3400), OutputFormat("png", True)),
        ("same", ".png", (-1000, 3000), OutputFormat("tif", True)),
        ("same", ".png", (0, 1), OutputFormat("tif", True)),
        ("same", ".tiff", (-1000, 3000), OutputFormat("tif", True)),
    ],
)
def test_the_format_follows_what_was_asked_the_input_and_the_units(asked, suffix, value_range, expected):
    assert outputs.choose_format(asked, suffix, value_range) == expected


def test_same_writes_each_photo_in_its_own_format(translate, capsys):
    write_inputs("a.jpeg", "b.png", "c.webp", "d.tif", "e.bmp")
    options = ["--run_name", "a2b", "--input", "in", "--format", "same"]
    translate(*options)
    assert written().keys() == {"fake_B/a.jpg", "fake_B/b.png", "fake_B/c.webp", "fake_B/d.tif", "fake_B/e.png"}
    assert [opened(path).format for _, path in sorted(written().items())] == ["JPEG", "PNG", "WEBP", "TIFF", "PNG"]
    assert opened(written()["fake_B/b.png"]).tobytes() == opened("in/b.png").tobytes()
    assert opened(written()["fake_B/d.tif"]).tobytes() == opened("in/d.tif").tobytes()
    assert "becomes PNG, since it is not written: 1 .bmp" in capsys.readouterr().out
    page = Path("generated_images/a2b/translated/index.html").read_text(encoding="utf-8")
    assert 'href="fake_B/d.tif"' in page
    assert 'src="thumbnails/fake_B/d.jpg"' in page
    assert 'src="fake_B/a.jpg"' in page
    translate(*options, "--skip_existing")
    assert "5 existed already" in capsys.readouterr().out
    translate(*options[:-1], "png")  # under the same names
    assert written().keys() >= {"fake_B/a.png", "fake_B/c.png"}


@pytest.mark.parametrize(
    ("asked", "metadata", "names"),
    [
        ("png", DEPTH, {"fake_B/deep.png": (0, 255), "values_B/deep.tif": (0, 4095)}),
        ("same", DEPTH, {"fake_B/deep.png": (0, 4095)}),
        ("same", HU, {"fake_B/deep.tif": (-1000, 3000)}),
        ("npy", HU, {"fake_B/deep.npy": (-1000, 3000)}),
        ("jpg", HU, {"fake_B/deep.jpg": (0, 255), "values_B/deep.tif": (-1000, 3000)}),
        ("npy", {"range_A": [0, 4095]}, {"fake_B/deep.npy": (0, 255)}),
    ],
)
def test_values_are_written_once_in_the_units_of_their_domain(translate, asked, metadata, names):
    write_inputs("deep.png")
    translate("--run_name", "a2b", "--input", "in", "--format", asked, "--range_A", "0,4095", **metadata)
    assert written().keys() == names.keys()
    for name, (low, high) in names.items():
        path = written()[name]
        values = np.load(path) if path.suffix == ".npy" else tifffile.imread(path) if low else np.asarray(opened(path))
        values = values[..., 0] if values.ndim == 3 else values
        assert np.abs(values - (low + RAMP * (high - low))).max() <= (2 if path.suffix == ".jpg" else 1)
    thumbnail = Path("generated_images/a2b/translated/thumbnails/fake_B/deep.jpg")
    assert thumbnail.is_file() == (asked not in ("png", "jpg"))  # what browsers cannot show


def test_results_of_another_photo_or_format_are_not_mistaken(translate):
    write_inputs("deep.png", "a.jpg")
    Path("other").mkdir()
    noise_image(2, (SIDE, SIDE)).save("other/a.jpg")
    for folder in ("in", "other"):
        translate("--run_name", "a2b", "--input", f"{folder}/a.jpg", "--format", "jpg")
    assert written().keys() == {"fake_B/a.jpg", "fake_B/a_.jpg"}
    for asked, bits in (("png", "L"), ("same", "I;16")):
        options = ["--input", "in/deep.png", "--skip_existing", "--range_A", "0,4095"]
        translate("--run_name", "a2b", "--format", asked, *options, **DEPTH)
        assert opened(written()["fake_B/deep.png"]).mode in (bits, "RGB" if bits == "L" else bits)


@pytest.mark.parametrize("asked", ["same", "jpg"])
def test_scores_read_what_was_written(translate, asked, monkeypatch):
    for split in ("trainA", "trainB", "testA", "testB"):
        Path("datasets/a2b", split).mkdir(parents=True)
        for i in range(2):
            Image.fromarray((np.roll(RAMP, i) * 4095).round().astype(np.uint16)).save(f"datasets/a2b/{split}/{i}.png")
    differences = []

    def compare(fakes, reals, *_):
        differences.extend((fakes[i].float() - reals[i].float()).abs().max().item() for i in range(2))
        return {}

    monkeypatch.setattr("toolkit.metrics.fid_kid", compare)
    monkeypatch.setattr(test_command, "need_package", lambda *_: None)
    options = ["--metrics", "paired,kid", "--direction", "AtoB"]
    scores = translate("--dataset_name", "a2b", "--format", asked, *options, range_A=[0, 4095], range_B=[0, 4095])
    assert scores["AtoB"]["paired"]["model"]["RMSE in units"] < 0.5
    assert max(differences) <= (8 if asked == "jpg" else 2)


@pytest.mark.parametrize(
    ("name", "metadata", "kind", "limits"),
    [
        ("a.jpg", {}, "JPEG", None),
        ("sub/a.PNG", {}, "PNG", None),
        ("a.tiff", HU, "TIFF", (-1000, 3000)),
        ("a.png", DEPTH, "PNG", (0, 4095)),
        ("a.png", HU, "PNG", (0, 255)),
    ],
)
def test_one_image_can_be_written_as_just_the_wanted_file(translate, refused, capsys, name, metadata, kind, limits):
    write_inputs("deep.png")
    options = ["--run_name", "a2b", "--input", "in/deep.png", "--output", name]
    translate(*options, "--range_A", "0,4095", **metadata)
    assert opened(name).format == kind
    if limits:
        assert np.asarray(opened(name)).min() == pytest.approx(limits[0], abs=1)
        assert np.asarray(opened(name)).max() == pytest.approx(limits[1], abs=1)
    assert ("8 bits, in which 0 is -1000" in capsys.readouterr().out) == (limits == (0, 255))
    assert {path for path in Path.cwd().rglob("*") if path.is_file()} == {
        Path(name).absolute(),
        Path("in/deep.png").absolute(),
    }
    before = Path(name).read_bytes()
    assert "is there already; choose another name, or move it away" in refused(translate, *options)
    assert Path(name).read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--output", "x.jpg"], "needs --input with one image"),
        (["--output", "x.jpg", "--input", "in"], "one file for 2 images; give a folder"),
        (["--output", "x.jpg", "--input", "in", "--format", "png"], "--output and --format contradict"),
        (["--output", "x.jpg", "--input", "in", "--skip_existing"], "--output and --skip_existing contradict"),
        (["--output", "x.jpg", "--input", "in", "--direction", "both"], "one file holds one direction"),
        (["--output", "x.jpg", "--input", "in/torn.png"], "torn.png: cannot be read"),
        (["--format", "npy", "--metrics", "paired"], "compare image files"),
        (["--keep_alpha", "--format", "jpg"], "jpg files have no transparency"),
    ],
)
def test_what_cannot_be_written_so_is_refused(translate, refused, argv, expected):
    write_inputs("a.png", "b.png")
    if "in/torn.png" in argv:
        Path("in/torn.png").write_bytes(Path("in/a.png").read_bytes()[:300])
    assert expected in refused(translate, *argv)
    assert not Path("x.jpg").exists()


def test_a_file_that_appears_meanwhile_is_not_replaced(translate, refused, monkeypatch):
    write_inputs("a.png")
    save = outputs.Translation.save

    def save_late(translation, path, written):
        Path("x.png").write_text("mine", encoding="utf-8")
        save(translation, path, written)

    monkeypatch.setattr(outputs.Translation, "save", save_late)
    assert "is there already" in refused(translate, "--input", "in/a.png", "--output", "x.png")
    assert Path("x.png").read_text(encoding="utf-8") == "mine"
    assert [path.name for path in Path.cwd().iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.parametrize(("asked", "size"), [("png", "input"), ("tif", "net"), ("same", "net")])
def test_keep_alpha_puts_the_transparency_back(translate, asked, size):
    write_inputs("alpha.webp" if asked == "same" else "alpha.png", "plain.png")
    noise_image(1, (20, 24), "RGBA").save("in/alpha.png")
    options = ["--format", asked, "--output_size", size, "--keep_alpha"]
    translate("--run_name", "a2b", "--input", "in/alpha.png", *options)
    (path,) = written().values()
    alpha = opened("in/alpha.png").getchannel("A")
    expected = alpha if size == "input" else images.resize_image(alpha, (SIDE, SIDE))
    assert opened(path).getchannel("A").tobytes() == expected.tobytes()
    translate("--run_name", "a2b", "--input", "in/plain.png", *options)
    assert opened(path.with_stem("plain")).mode == "RGB"


def test_a_sprite_in_webp_keeps_its_alpha_and_values_that_cannot_are_said(translate, capsys):
    write_inputs("alpha.webp")
    options = ["--run_name", "a2b", "--input", "in", "--keep_alpha"]
    translate(*options, "--format", "same")
    (path,) = written().values()
    assert opened(path).getchannel("A").tobytes() == opened("in/alpha.webp").getchannel("A").tobytes()
    assert "is lost" not in capsys.readouterr().out
    translate(*options, "--format", "tif", **HU)
    assert "alpha.webp: its transparency is lost" in capsys.readouterr().out


def write_geotiff(path, size, is_point=False):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, kind, value in (
        (33550, 12, (10.0, 20.0, 0.0)),
        (33922, 12, (2.0, 4.0, 0.0, 500000.0, 4649776.0, 0.0)),
        (34735, 3, (1, 1, 0, 2, 1024, 0, 1, 1, 1025, 0, 1, 2 if is_point else 1)),
        (34737, 2, "WGS 84|"),
    ):
        tags.tagtype[tag] = kind
        tags[tag] = value
    noise_image(3, size).save(path, tiffinfo=tags)


def ground(path, column, row):
    """The place of a point of an image, in pixels from its upper left corner."""
    with tifffile.TiffFile(path) as file:
        tags = {tag: file.pages[0].tags[tag].value for tag in (33550, 33922, 34735, 34737)}
    assert tags[34737] == "WGS 84|"
    shift = 0.5 if tags[34735][-1] == 2 else 0
    i, j, _, x, y, _ = tags[33922]
    return x + (column - shift - i) * tags[33550][0], y - (row - shift - j) * tags[33550][1]


@pytest.mark.parametrize("is_point", [False, True])
def test_a_result_in_tiff_shows_the_same_ground_also_if_it_is_resized(translate, is_point):
    Path("in").mkdir()
    write_geotiff("in/geo.tif", (48, 32), is_point)
    for size, folder in (("net", "small"), ("input", "whole"))[: 1 if is_point else 2]:
        options = ["--format", "same", "--output_size", size, "--output", folder]
        translate("--run_name", "a2b", "--input", "in", *options)
    if not is_point:
        assert ground("whole/fake_B/geo.tif", 12, 6) == ground("in/geo.tif", 12, 6)
    assert opened("small/fake_B/geo.tif").size == (SIDE, SIDE)
    assert ground("small/fake_B/geo.tif", 4, 3) == pytest.approx(ground("in/geo.tif", 12, 6))


def test_a_matrix_is_scaled_like_a_pixel_scale():
    matrix = np.array([[10, 0, 0, 500000], [0, -20, 0, 4649776], [0, 0, 0, 0], [0, 0, 0, 1]], float)
    keys = (1, 1, 0, 1, *outputs.PIXEL_IS_POINT)
    tags = outputs.scale_geotags({34264: tuple(matrix.reshape(-1)), 34735: keys}, 0.5, 0.25)
    scaled = np.reshape(tags[34264], (4, 4))
    corner = np.array([-0.5, -0.5, 0, 1])  # in coordinates of the middle of pixels
    assert np.allclose(scaled @ corner, matrix @ corner)
    assert np.allclose(scaled @ [3.5, 3.5, 0, 1], matrix @ [7.5, 15.5, 0, 1])


def test_a_georeference_that_is_lost_or_damaged_is_said(translate, capsys):
    Path("in").mkdir()
    write_geotiff("in/geo.tif", (SIDE, SIDE))
    translate("--run_name", "a2b", "--input", "in")
    assert "geo.tif: its georeference is lost in .png; TIFF files keep it" in capsys.readouterr().out
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[33550] = 12
    tags[33550] = (1.0, 1.0)
    noise_image(3, (SIDE, SIDE)).save("in/geo.tif", tiffinfo=tags)
    translate("--run_name", "a2b", "--input", "in", "--format", "tif")
    assert "geo.tif: its georeference cannot be kept" in capsys.readouterr().err
