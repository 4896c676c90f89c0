import io
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_image, warnings_in
from edits import EDITS, FUZZ, edited
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features
from profiles import rgb_profile

from toolkit import images, readers
from utils import InputError


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animated_image_the_first_frame_is_used_and_that_is_said_once(suffix, capsys, tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "white")]
    frames[0].save(f"a.{suffix}", save_all=True, append_images=frames[1:])
    for _ in range(2):
        (path,) = images.list_images(tmp_path)
        red, green, blue = images.read_image(path).getpixel((3, 3))
        assert red > 200 > 50 > max(green, blue)
    said = f"warning: {tmp_path}: 1 file holds 3 images; the first of each is used; --pages all for all"
    assert warnings_in(capsys) == [said]


def test_all_256_levels_survive_the_way_into_the_network_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    x = images.bytes_to_range(levels)
    assert (x.min(), x.max()) == (-1, 1)
    assert x.dtype == torch.float32
    assert torch.equal(images.range_to_bytes(x), levels)


def test_values_out_of_range_are_clamped_and_never_wrap():
    assert images.range_to_bytes(torch.tensor([-1.3, -1.001, 1.001, 7.0])).tolist() == [0, 0, 255, 255]
    assert images.range_to_bytes(torch.tensor([0.0, 0.0041])).tolist() == [128, 128]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_image_survives_the_way_into_a_tensor_and_back(mode):
    image = noise_image(0, (5, 4), mode)
    x = images.image_to_tensor(image)
    assert x.shape == (len(mode), 4, 5)
    assert images.tensor_to_image(x).mode == mode
    assert images.tensor_to_image(x).tobytes() == image.tobytes()


def test_a_grid_shows_each_image_in_its_row_and_column():
    dark = torch.stack([torch.full((3, 64, 64), v) for v in (-1.0, -0.5)])
    grid = np.asarray(images.draw_grid([("dark", dark), ("light", torch.ones(2, 3, 64, 64))])).astype(int)
    assert grid.shape[0] == 2 * 130 + 2  # 64 px images are enlarged to 128
    left = grid.shape[1] - (2 * 130 + 2)
    assert (grid[65, left + 65] == 0).all()
    assert (grid[65, left + 195] == 64).all()
    assert (grid[195, left + 65] == 255).all()
    assert grid[:, :left].min() < 100  # the labels are written


def test_cells_of_up_to_256_px_keep_their_size_and_larger_ones_are_reduced():
    grid = np.asarray(images.draw_grid([("x", torch.full((2, 1, 200, 150), 0.0))])).astype(int)
    assert grid.shape[0] == 200 + 4
    assert (grid[100, -80] == 128).all()  # grey
    assert (grid[100, -1] == 255).all()  # the border
    large = images.draw_grid([("x", torch.zeros(2, 3, 1200, 700)), ("y", torch.zeros(2, 3, 1200, 700))])
    assert large.width < 2 * 160 + 60
    assert 2 * 256 <= large.height < 2 * 260 + 10
    assert images.draw_grid([("x", torch.zeros(2, 3, 9000, 1))]).height == 256 + 4


def test_a_saved_image_is_a_complete_png_and_its_folder_is_created(tmp_path):
    image = noise_image(0)
    path = tmp_path / "new" / "folder" / "x.jpg"  # the name does not choose the format
    images.save_image(image, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert images.read_image(path).tobytes() == image.tobytes()
    assert list(path.parent.iterdir()) == [path]


def test_grey_images_of_8_and_16_bits_have_the_same_greys(tmp_path):
    grey = np.tile(np.linspace(0, 1, 16), (12, 1))  # a ramp from left to right
    expected = grey * 255
    Image.fromarray(expected.round().astype(np.uint8)).save(tmp_path / "L.png")
    for suffix in ("png", "tif", "pgm", "jp2"):
        Image.fromarray((grey * 65535).round().astype(np.uint16)).save(tmp_path / f"16.{suffix}")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "unit.tiff")
    assert len(images.list_images(tmp_path)) == 6
    for path in images.list_images(tmp_path):
        for channels in (1, 3):
            pixels = images.image_to_pixels(images.read_image(path, channels), channels)
            assert pixels.shape == (channels, 12, 16)
            assert np.abs(pixels.numpy() - expected).max() <= (0.5 if path.stem == "L" else 0.01), path.name


HAS_AVIF = "avif" in features.modules and features.check("avif")


@pytest.mark.parametrize(
    ("mode", "suffix", "error"),
    [
        ("RGB", "jpg", 6),
        ("RGB", "png", 0),
        ("RGB", "webp", 6),
        ("RGB", "bmp", 0),
        ("RGB", "tiff", 0),
        ("P", "png", 0),
        ("CMYK", "jpg", 12),
        pytest.param("RGB", "avif", 6, marks=pytest.mark.skipif(not HAS_AVIF, reason="needs a Pillow with AVIF")),
    ],
)
def test_every_format_and_mode_reads_as_the_colour_it_was_saved_as(tmp_path, mode, suffix, error):
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (16, 16), (204, 51, 102)).convert(mode).save(path)
    assert np.abs(np.asarray(images.read_image(path)).astype(int) - (204, 51, 102)).max() <= error
    assert images.list_images(tmp_path) == [path]


@pytest.mark.parametrize(
    ("mode", "colour", "options", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), {}, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 128), {}, (255, 127, 127)),
        ("LA", (0, 0), {}, (255, 255, 255)),
        ("P", 0, {"transparency": 0}, (255, 255, 255)),
        ("1", 1, {}, (255, 255, 255)),
    ],
)
def test_transparency_is_laid_over_white(tmp_path, mode, colour, options, expected):
    Image.new(mode, (8, 8), colour).save(tmp_path / "x.png", **options)
    assert images.read_image(tmp_path / "x.png").getpixel((0, 0)) == expected


def test_the_orientation_of_the_camera_is_applied(tmp_path):
    upright = Image.new("RGB", (20, 10), "white")
    upright.paste("black", (0, 0, 5, 10))  # the left edge is black
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees counter-clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.png", exif=exif)
    image = images.read_image(tmp_path / "x.png")
    assert image.size == (20, 10)
    assert image.getpixel((1, 5)) == (0, 0, 0)
    assert image.getpixel((18, 5)) == (255, 255, 255)


def test_images_are_found_in_nested_folders_in_natural_order(tmp_path):
    for name in ("10.png", "9.PNG", "sub/2.jpeg", "sub/.hidden.png", ".cache/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [str(p.relative_to(tmp_path)) for p in images.list_images(tmp_path)] == ["9.PNG", "10.png", "sub/2.jpeg"]
    assert images.list_images(tmp_path / "none") == []


@pytest.mark.skipif(os.name == "nt", reason="pipes and links of POSIX")
def test_pipes_and_folders_are_not_listed_and_broken_links_are_listed_as_unreadable(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    noise_image(0).save(tmp_path / "real.png")
    assert [path.name for path in images.list_images(tmp_path)] == ["nowhere.png", "real.png", "round.png"]
    for name in ("nowhere.png", "round.png"):
        with pytest.raises(images.UnreadableImage):
            images.read_image(tmp_path / name)


def test_a_closed_folder_is_warned_of(tmp_path, monkeypatch, capsys):
    noise_image(0).save(tmp_path / "x.png")
    (tmp_path / "closed").mkdir()
    plain = os.scandir

    def guarded(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert images.list_images(tmp_path) == [tmp_path / "x.png"]
    assert images.list_images(tmp_path / "closed") == []
    assert capsys.readouterr().err.count(f"warning: [Errno 13] Permission denied: '{tmp_path / 'closed'}'") == 2


def test_images_are_resized_to_height_and_width_unless_they_have_that_size(tmp_path):
    image = noise_image(0, (20, 18))
    image.save(tmp_path / "x.png")
    assert images.load_image(tmp_path / "x.png", (8, 12)).shape == (3, 8, 12)
    assert images.load_image(str(tmp_path / "x.png"), None, 1).shape == (1, 18, 20)
    assert images.resize_image(image, (20, 18)) is image
    assert images.resize_image(image, (9, 20)).size == (9, 20)


@pytest.fixture
def without_readers(monkeypatch):
    """As if neither pillow-heif nor a Pillow that reads AVIF were installed."""
    monkeypatch.setattr(images, "formats", lambda: images.FORMATS)
    images.warn_once.cache_clear()


def test_photos_that_need_a_missing_package_are_counted_and_named_once(tmp_path, capsys, without_readers):
    for name in ("1.heic", "2.HEIC", "3.avif", ".hidden.heic"):
        (tmp_path / name).write_bytes(b"photo")
    noise_image(0).save(tmp_path / "4.png")
    for _ in range(2):
        assert images.list_images(tmp_path) == [tmp_path / "4.png"]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {tmp_path}: 1 file skipped (.avif): pip install --upgrade pillow",
        f"warning: {tmp_path}: 2 files skipped (.heic): pip install pillow-heif",
    ]
    with pytest.raises(images.UnreadableImage, match="pip install pillow-heif"):
        images.read_image(tmp_path / "1.heic")


def test_heic_is_read_if_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    image = Image.new("RGB", (64, 32), (204, 51, 102))
    image.save(tmp_path / "1.heic")
    image.save(tmp_path / "mislabelled.jpg", format="HEIF")
    assert images.list_images(tmp_path) == [tmp_path / "1.heic", tmp_path / "mislabelled.jpg"]
    for path in images.list_images(tmp_path):
        found = images.read_image(path)
        assert found.size == (64, 32)
        assert np.abs(np.asarray(found).astype(int) - (204, 51, 102)).max() <= 8
    (tmp_path / "1.heic").write_bytes((tmp_path / "1.heic").read_bytes()[:100])
    with pytest.raises(images.UnreadableImage):
        images.read_image(tmp_path / "1.heic")


def encoded(kind, mode, size=(24, 24)):
    buffer = io.BytesIO()
    noise_image(1, size).convert(mode).save(buffer, kind)
    return buffer.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"no image", id="text"),
        pytest.param(encoded("PNG", "RGB", (64, 64))[:6000], id="half"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + b"\xff" * 99, id="header"),
        pytest.param(POSTSCRIPT, id="PostScript, which no interpreter may get"),
    ],
)
def test_a_damaged_image_raises_one_type_of_error(tmp_path, data):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(images.UnreadableImage):
        images.read_image(tmp_path / "x.png")


def test_a_small_file_that_claims_a_huge_image_is_refused_by_its_header(tmp_path, monkeypatch):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image.Image, "load", None)  # whoever decodes, fails otherwise
    images.limit_pixels(178e6)
    with pytest.raises(images.UnreadableImage, match=r"20000x10000 px.*--max_megapixels"):
        images.read_image(tmp_path / "bomb.png")
    assert Image.MAX_IMAGE_PIXELS is None
    images.limit_pixels(200e6)
    images.open_image(tmp_path / "bomb.png").close()


def test_bad_images_are_named_once_and_stop_above_five_percent(tmp_path, capsys):
    bad = images.BadImages(tmp_path / "trainA", 60)
    for i in (0, 0, 1, 2):
        bad.note(tmp_path / f"{i}\n.png", "torn")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"skipped, unreadable ({i + 1} of 60): {tmp_path}/{i}\\n.png (torn)" for i in range(3)]
    with pytest.raises(InputError, match=rf"{re.escape(str(tmp_path))}/trainA: 4 .* 60 images are unreadable"):
        bad.note(tmp_path / "3.png", "torn")
    small = images.BadImages(tmp_path, 3)
    small.note(tmp_path / "one.png", "a single one never stops")
    with pytest.raises(InputError):
        small.note(tmp_path / "two.png", "torn")


@pytest.mark.parametrize(
    ("total", "on_bad", "remedy"),
    [(100, "stop", "replace it, or use --on_bad_image skip"), (1, "skip", "replace it"), (1, "stop", "replace it")],
)
def test_the_first_bad_image_stops_if_it_is_the_only_one_or_was_to_stop(tmp_path, total, on_bad, remedy):
    with pytest.raises(InputError, match=rf"x\.png: cannot be read \(torn\); {remedy}$"):
        images.BadImages(tmp_path, total, on_bad).note(tmp_path / "x.png", "torn")


def test_images_are_loaded_one_by_one_and_bad_ones_skipped(tmp_path, capsys):
    for i in range(3):
        noise_image(i).save(tmp_path / f"{i}.png")
    paths = images.list_images(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:300])  # a good header, but half of the pixels
    assert images.BadImages(tmp_path, 3).readable(paths) == paths
    loaded = dict(images.load_images(tmp_path, paths, images.ImageReader((8, 6), 1), "skip"))
    assert list(loaded) == [paths[0], paths[2]]
    assert all(x.shape == (1, 8, 6) for x in loaded.values())
    assert capsys.readouterr().err.count("skipped, unreadable") == 1
    paths[1].write_bytes(b"torn")
    assert images.BadImages(tmp_path, 3).readable(paths) == [paths[0], paths[2]]


KINDS = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "1"), ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK")]
KINDS += [("WEBP", "RGBA"), ("BMP", "RGB"), ("TIFF", "F"), ("GIF", "P")]


@pytest.mark.slow
@FUZZ
@given(edits=EDITS, kind=st.sampled_from(KINDS))
def test_edited_images_are_read_or_called_unreadable(tmp_path, edits, kind):
    path = tmp_path / "x.png"
    path.write_bytes(edited(encoded(*kind), edits))
    try:
        x = images.load_image(path, (8, 8))
    except images.UnreadableImage:
        return
    assert x.shape == (3, 8, 8)
    assert x.min() >= -1
    assert x.max() <= 1
    assert all(map(math.isfinite, x.flatten().tolist()))


# -- what a folder holds ---------------------------------------------------------------------------


def test_whatever_can_be_read_is_listed_and_the_rest_is_counted_in_one_line(tmp_path, capsys):
    kinds = {"c.jfif": "JPEG", "d.jpe": "JPEG", "e.ppm": "PPM", "f.pnm": "PPM", "g.gif": "GIF", "h.jp2": "JPEG2000"}
    kinds |= {"i.tga": "TGA", "j.PNG": "PNG", "k": "PNG", "m.dib": "DIB", "n.bmp": "BMP", "o.mpo": "MPO"}
    for name, kind in kinds.items():
        noise_image(name).save(tmp_path / name, format=kind)
    for name in ("p.csv", "q.jxl", "r.JXL", "LICENSE", ".hidden.npy"):
        (tmp_path / name).write_text("no image")
    for _ in range(2):
        assert [path.name for path in images.list_images(tmp_path)] == sorted(kinds)
    for path in images.list_images(tmp_path):
        assert images.read_image(path).size == noise_image(0).size
    assert warnings_in(capsys) == [
        f"warning: {tmp_path}: left out, since they are no images that can be read: 1 .csv, 2 .jxl, 1 without suffix"
    ]


def test_linked_folders_are_not_followed_which_is_said(tmp_path, capsys):
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    noise_image(0).save(tmp_path / "far/0.png")
    (tmp_path / "near/link").symlink_to(tmp_path / "far")
    assert images.list_images(tmp_path / "near") == []
    assert "link: a link to a folder, which is not followed" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "I;16"])
@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_turned_tiff_files_come_out_turned_and_whole(mode, orientation):
    """From a file name, Pillow 12.3 turns uncompressed ones into stripes (findings/)."""
    image = noise_image(0, (30, 20), "L").point(lambda x: x * 257, "I").convert("I;16") if mode == "I;16" else None
    image = image or noise_image(0, (30, 20), "RGB").convert(mode)
    exif = Image.Exif()
    exif[274] = orientation
    image.save("image.tif", exif=exif)
    if mode != "CMYK":
        image.save("image.png")
    read = images.read_image(Path("image.tif"))
    turn = {6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}.get(orientation)
    expected = images.read_image(Path("image.png")) if mode != "CMYK" else image.convert("RGB")
    assert read.tobytes() == (expected.transpose(turn) if turn else expected).tobytes()


def test_tiff_files_of_separate_planes_of_16_bits_are_refused_without_their_library(monkeypatch):
    monkeypatch.setattr(readers, "is_installed", lambda package: False)
    image = Image.new("RGB", (4, 4))
    image.save("image.tif", tiffinfo={284: 1})
    data = bytearray(Path("image.tif").read_bytes())
    planes = data.find(b"\x1c\x01\x03\x00\x01\x00\x00\x00")  # 284, PlanarConfiguration: one SHORT
    data[planes + 8] = 2
    Path("image.tif").write_bytes(data)
    images.open_image(Path("image.tif")).close()  # 8 bits are read
    bits = data.find(b"\x08\x00\x08\x00\x08\x00")
    data[bits : bits + 6] = b"\x10\x00\x10\x00\x10\x00"
    Path("image.tif").write_bytes(data)
    with pytest.raises(images.UnreadableImage):
        images.read_image(Path("image.tif"))


@pytest.mark.parametrize(("mode", "white"), [("I;16", 65535), ("F", 1)])
def test_tiff_files_of_more_than_8_bits_in_which_0_is_white_are_inverted(mode, white):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), white)
    image.save("image.tif")
    data = bytearray(Path("image.tif").read_bytes())
    tag = data.find(b"\x06\x01\x03\x00\x01\x00\x00\x00")  # 262, PhotometricInterpretation: one SHORT
    for photometric, expected in ((1, (0, 255)), (0, (255, 0))):
        data[tag + 8] = photometric
        Path("image.tif").write_bytes(data)
        read = images.read_image(Path("image.tif"), 1)
        assert tuple(read.getpixel((x, 0)) for x in range(2)) == expected


@pytest.mark.parametrize("kind", ["jp2", "j2k"])
def test_jpeg_2000_in_colour_of_more_than_8_bits_is_refused_without_its_library(kind, monkeypatch):
    monkeypatch.setattr(readers, "is_installed", lambda package: False)
    path = Path(f"image.{kind}")
    noise_image(0).save(path)
    data = bytearray(path.read_bytes())
    start = data.find(b"\xff\x4f\xff\x51")
    assert images.read_image(path).mode == "RGB"
    for channel in range(3):
        assert data[start + 42 + 3 * channel] == 7  # bits - 1
        data[start + 42 + 3 * channel] = 11
    path.write_bytes(data)
    with pytest.raises(images.UnreadableImage, match=r"imagecodecs is missing.*requirements-science"):
        images.read_image(path)


SHAPES = ["80x40", "40x80", "60x60", "200x50", "20x10"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preprocess", images.PREPROCESS)
def test_every_way_of_preprocessing_fills_the_training_size_and_only_the_first_stretches(preprocess, shape):
    width, height = map(int, shape.split("x"))
    fitted = images.fitted_size((width, height), (32, 24), preprocess)
    assert fitted[0] >= 32
    assert fitted[1] >= 24
    if preprocess == "resize_and_crop":
        assert fitted == (32, 24)
        return
    assert fitted[0] * height == pytest.approx(fitted[1] * width, rel=0.03)
    whole = images.fitted_size((width, height), (32, 24), preprocess, to_crop=False)
    if preprocess in images.WHOLE:
        least = max(24, min(width, height) if preprocess == "none" else 0)
        assert all(side % 4 == 0 and side >= 24 for side in whole)
        assert preprocess != "none" or min(whole) == pytest.approx(least, abs=2)
        assert whole[0] * height == pytest.approx(whole[1] * width, rel=0.15)
        return
    expected = {"crop": (width, height), "scale_width_and_crop": (32, round(32 * height / width))}
    assert whole == expected.get(preprocess, fitted)


@pytest.mark.parametrize("preprocess", images.PREPROCESS[1:])
def test_a_circle_remains_a_circle_unless_images_are_stretched(preprocess):
    x, y = np.meshgrid(np.arange(120), np.arange(60))
    Image.fromarray((255 * ((x - 60) ** 2 + (y - 30) ** 2 < 100)).astype(np.uint8)).save("circle.png")
    reader = images.ImageReader((40, 40), 1, None, preprocess)
    disc = reader(Path("circle.png"))[0] > 0
    assert disc.shape == (40, 40)
    assert abs(int(disc.any(0).sum()) - int(disc.any(1).sum())) <= 1
    assert disc[20, 20]


# -- speed that changes hardly a pixel ------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB", "F"])
@pytest.mark.parametrize("size", [(9, 20), (57, 40), (20, 5)])
def test_training_images_are_resized_as_by_pillow_to_one_level_and_others_just_so(mode, size):
    image = noise_image(0, (20, 18), "L" if mode == "F" else mode).convert(mode)
    image.save("x.tif")
    expected = images.image_to_pixels(image.resize(size, Image.Resampling.BICUBIC), len(mode)).float()
    readers = [images.ImageReader(size[::-1], len(mode), (0, 255), is_fast=is_fast) for is_fast in (False, True)]
    exact, fast = (reader.pixels(Path("x.tif")).float() for reader in readers)
    assert (exact - expected).abs().max() < 1e-3
    assert (fast - expected).abs().max() < (1e-3 if mode == "F" else 1.1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "size"), [("RGB", (243, 203)), ("L", (243, 203)), ("CMYK", (243, 203)), ("P3", (240, 208))]
)
def test_large_jpegs_are_reduced_while_they_are_decoded_to_nearly_the_same_pixels(kind, size, orientation):
    options = {"quality": 95, "icc_profile": rgb_profile("P3")} if kind == "P3" else {"quality": 95}
    exif = Image.Exif()
    exif[274] = orientation
    image = noise_image(1, (24, 20)).resize(size, Image.Resampling.BICUBIC)  # 8 divides both sides, or none
    image = image.point(lambda level: 64 + level // 2)  # within sRGB
    image.convert("RGB" if kind == "P3" else kind).save("x.jpg", exif=exif, **options)
    reader = images.ImageReader((23, 27), is_fast=True)
    assert images.read_image(Path("x.jpg"), fit=reader.fit).size == (27, 23)
    whole = images.read_image(Path("x.jpg")).resize((27, 23), Image.Resampling.BICUBIC)
    error = np.asarray(images.tensor_to_image(reader(Path("x.jpg"))), float) - np.asarray(whole, float)
    assert 10 * math.log10(255**2 / (error**2).mean()) > 40  # a pixel that is off costs more


def test_jpegs_that_are_not_much_larger_are_read_at_their_own_size():
    noise_image(0, (80, 79)).save("x.jpg")
    for size, expected in (((20, 20), (80, 79)), ((19, 20), (20, 19))):
        assert images.read_image(Path("x.jpg"), fit=images.ImageReader(size).fit).size == expected


def test_label_images_keep_their_colours_when_they_are_resized_to_the_nearest():
    labels = noise_image(0, (5, 1)).resize((100, 100), Image.Resampling.NEAREST)
    labels.quantize(5).save("labels.png")
    labels.save("labels.bmp")
    for name in ("labels.png", "labels.bmp"):
        colours = {}
        for resample in images.RESAMPLE:
            x = images.ImageReader((24, 24), resample=resample).pixels(Path(name))
            colours[resample] = len(torch.unique(x.flatten(1), dim=1).T)
        assert colours["nearest"] == 5 < colours["bicubic"]
