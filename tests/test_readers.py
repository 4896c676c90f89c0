"""Images that Pillow does not read, or not exactly: bands, depths, DICOM, NIfTI, arrays, pages."""

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, noise_image, tiny_networks, warnings_in
from PIL import Image, TiffImagePlugin
from profiles import rgb_profile
from tiny_runs import save_run

import datasets
import test as test_command
import train
from toolkit import bands, checks, images, pages, readers

SIDE = 24
Y, X = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
RGB = np.stack([X, Y, 1 - X], 2)  # in [0, 1]
LEVELS = (RGB * 255).round()
FIVE = (np.dstack([RGB, Y, X * Y]) * 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    for cache in (images.warn_once, pages.warn_once, pages.say_once, bands.said_of):
        getattr(cache, "cache_clear", getattr(cache, "clear", None))()


def pixels(path, channels=3, value_range=None):
    """An image as (H, W, channels) in [0, 255]."""
    image = images.read_image(Path(path), channels, value_range)
    return images.image_to_pixels(image, channels).permute(1, 2, 0).numpy().astype(float)


def without_libraries(monkeypatch):
    monkeypatch.setattr(readers, "is_installed", lambda package: package == "numpy")


# -- TIFF ------------------------------------------------------------------------------------------


def write_tiff(name, values, **options):
    tifffile = pytest.importorskip("tifffile")
    options = {"photometric": "rgb", **options}
    tifffile.imwrite(name, values, **options)
    return Path(name)


CONTIG = {"planarconfig": "contig"}
TIFFS = {  # values, options, value range: all show RGB
    "rgb8": (LEVELS.astype(np.uint8), {}, None),
    "rgb16_full": ((RGB * 65535).astype(np.uint16), {}, None),
    "rgb16_reflectance": ((RGB * 3000).astype(np.uint16), {}, (0, 3000)),
    "rgb_float": (RGB.astype(np.float32), {}, None),
    "rgb_float_in_units": ((RGB * 40 - 20).astype(np.float32), {}, (-20, 20)),
    "planar8": (np.moveaxis(LEVELS, 2, 0).astype(np.uint8), {"planarconfig": "separate"}, None),
    "planar16": (np.moveaxis(RGB * 65535, 2, 0).astype(np.uint16), {"planarconfig": "separate"}, None),
    "big_tiff": ((RGB * 65535).astype(np.uint16), {"bigtiff": True}, None),
    "big_endian": ((RGB * 65535).astype(np.uint16), {"byteorder": ">"}, None),
    "compressed": ((RGB * 65535).astype(np.uint16), {"compression": "zlib", "predictor": True}, None),
    "tiled": ((RGB * 65535).astype(np.uint16), {"tile": (16, 16)}, None),
    "infrared": (np.dstack([LEVELS, 255 * Y]).astype(np.uint8), {"extrasamples": ["unspecified"]}, None),
    "infrared_16": ((np.dstack([RGB, Y]) * 65535).astype(np.uint16), {"extrasamples": ["unspecified"]}, None),
    "infrared_called_alpha": (np.dstack([LEVELS, 255 * Y]).astype(np.uint8), {"extrasamples": ["unassalpha"]}, None),
    "infrared_called_product": (np.dstack([LEVELS, 99 * Y]).astype(np.uint8), {"extrasamples": ["assocalpha"]}, None),
    "five": (FIVE, {"photometric": "minisblack", **CONTIG}, None),
    "five_as_rgb": (FIVE, {"extrasamples": ["unspecified"] * 2}, None),
    "five_planar": (np.moveaxis(FIVE, 2, 0), {"photometric": "minisblack", "planarconfig": "separate"}, None),
}


@pytest.mark.parametrize("name", TIFFS)
def test_every_kind_of_tiff_shows_its_first_three_bands(name):
    values, options, value_range = TIFFS[name]
    path = write_tiff(f"{name}.tif", values, **options)
    assert np.abs(pixels(path, 3, value_range) - LEVELS).max() <= 1
    grey = LEVELS @ bands.GREY
    assert np.abs(pixels(path, 1, value_range)[..., 0] - grey).max() <= 1.5


def test_a_fourth_band_that_looks_like_a_mask_is_transparency():
    mask = 255 * (X > 0.5)
    expected = np.where(mask[..., None] > 0, LEVELS, 255)
    for dtype, full in ((np.uint8, 1), (np.uint16, 257)):
        values = (np.dstack([LEVELS, mask]) * full).astype(dtype)
        path = write_tiff(f"{full}.tif", values, extrasamples=["unassalpha"])
        assert np.abs(pixels(path) - expected).max() <= 1
        assert np.abs(pixels(path, 4)[..., 3] - mask).max() <= 1  # a band like others


def test_pillow_alone_tells_infrared_from_transparency(monkeypatch):
    flat = np.full((SIDE, SIDE, 4), (10, 20, 30, 40), np.uint8)
    path = write_tiff("flat.tif", flat, extrasamples=["unassalpha"])
    options = {"photometric": "minisblack", "extrasamples": ["unassalpha"], **CONTIG}
    two = write_tiff("two.tif", flat[..., :2], **options)
    for _ in range(2):
        assert np.array_equal(pixels(path), flat[..., :3])
        assert (pixels(two, 1) == 10).all()
        without_libraries(monkeypatch)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_a_network_of_more_channels_gets_as_many_bands(channels):
    for dtype, value_range in ((np.uint8, None), (np.float32, (0, 255))):
        path = write_tiff("five.tif", FIVE.astype(dtype), photometric="minisblack", **CONTIG)
        assert np.array_equal(pixels(path, channels, value_range), FIVE[..., :channels])
        small = images.ImageReader((8, 6), channels, value_range, "scale_shortside_and_crop")(path)
        assert small.shape == (channels, 8, 6)


def test_bands_that_are_left_out_are_said_once_and_too_few_are_refused(capsys):
    path = write_tiff("five.tif", FIVE, photometric="minisblack", **CONTIG)
    for _ in range(2):
        images.read_image(path)
    line = "warning: five.tif: of its 5 bands the first 3 are used, as of others; --channels 5 uses all of them"
    assert warnings_in(capsys) == [line]
    with pytest.raises(images.UnreadableImage, match="has 5 bands, and the networks have 6 channels"):
        images.read_image(path, 6)
    noise_image(0).save("rgb.png")
    with pytest.raises(images.UnreadableImage, match="has 3 bands"):
        images.read_image(Path("rgb.png"), 4)
    noise_image(0, mode="RGBA").save("rgba.png")
    assert images.read_image(Path("rgba.png"), 4).levels.shape == (18, 20, 4)


def test_tiff_files_in_which_0_is_white_and_turned_ones_are_read_right():
    values = (X * 4095).astype(np.uint16)
    path = write_tiff("white.tif", 4095 - values, photometric="miniswhite", bigtiff=True)
    assert np.abs(pixels(path, 1, (0, 4095))[..., 0] - X * 255).max() <= 1
    for orientation in range(1, 9):
        tag = [(274, "H", 1, orientation, True)]
        path = write_tiff("turned.tif", (RGB[:10] * 65535).astype(np.uint16), extratags=tag, metadata=None)
        write_tiff("turned8.tif", LEVELS[:10].astype(np.uint8), extratags=tag, metadata=None)
        assert np.abs(pixels(path) - pixels("turned8.tif")).max() <= 1, orientation


def test_colour_of_16_bits_without_its_library_is_reduced_and_said_or_refused(monkeypatch, capsys):
    path = write_tiff("rgb16.tif", (RGB * 65535).astype(np.uint16))
    deep = write_tiff("float.tif", RGB.astype(np.float32))
    without_libraries(monkeypatch)
    assert np.abs(pixels(path) - LEVELS).max() <= 1
    assert "colours of 16 bits are reduced to 8, since tifffile is missing" in capsys.readouterr().err
    for file, value_range in ((path, (0, 3000)), (deep, None)):
        with pytest.raises(images.UnreadableImage, match=r"pip install -r requirements-science\.txt"):
            images.read_image(file, 3, value_range)


def test_the_range_of_colours_is_measured_and_recorded():
    write_tiff("a.tif", (RGB * 3000).astype(np.uint16))
    found = datasets.find_range(datasets.DataConfig(), "A", [Path("a.tif")])
    assert found == (0, 3000)
    assert datasets.is_in_colour([Path("a.tif")], 3)
    assert np.abs(pixels("a.tif", 3, found) - LEVELS).max() <= 1


def test_photos_of_16_bits_with_a_profile_become_8_bits_of_srgb():
    profile = rgb_profile("P3")
    p3 = np.full((4, 4, 3), (234, 51, 35), np.uint16) * np.uint16(257)
    path = write_tiff("p3.tif", p3, iccprofile=profile)
    assert images.read_values(path) is None
    assert np.abs(pixels(path, 3, (0, 9)) - (255, 0, 0)).max() <= 6


# -- PNG and JPEG 2000 -----------------------------------------------------------------------------


def test_grey_png_of_16_bits_with_transparency_keeps_its_bits():
    codecs = pytest.importorskip("imagecodecs")
    grey = (X * 4095).astype(np.uint16)
    Path("a.png").write_bytes(codecs.png_encode(np.dstack([grey, np.where(Y > 0.5, 65535, 0).astype(np.uint16)])))
    expected = np.where(Y > 0.5, X * 255, 255)
    assert np.abs(pixels("a.png", 1, (0, 4095))[..., 0] - expected).max() <= 0.1


@pytest.mark.parametrize("kind", ["png", "jp2"])
def test_colour_of_more_than_8_bits_is_exact_and_white_is_white(kind):
    codecs = pytest.importorskip("imagecodecs")
    values = (RGB * 4095).astype(np.uint16)
    if kind == "png":
        data = codecs.png_encode(values)
        value_range = (0, 4095)
    else:
        data = codecs.jpeg2k_encode(values, level=0, bitspersample=12, reversible=True)
        value_range = None
    Path(f"a.{kind}").write_bytes(data)
    assert np.abs(pixels(f"a.{kind}", 3, value_range) - RGB * 255).max() <= 0.1


# -- arrays ----------------------------------------------------------------------------------------


def test_arrays_are_read_as_they_are():
    np.save("levels.npy", LEVELS.astype(np.uint8))
    np.save("unit.npy", RGB.astype(">f4"))
    np.save("five.npy", np.asfortranarray(FIVE))
    np.save("mask.npy", X > 0.5)
    np.savez("two.npz", a=X.astype(np.float32), b=1 - X)
    assert np.array_equal(pixels("levels.npy"), LEVELS)
    assert np.abs(pixels("unit.npy") - RGB * 255).max() <= 0.01
    assert np.array_equal(pixels("five.npy", 5), FIVE)
    assert np.array_equal(pixels("mask.npy", 1)[..., 0], 255 * (X > 0.5))
    assert np.abs(pixels("two.npz", 1)[..., 0] - X * 255).max() <= 0.01
    assert np.abs(pixels("two_p0002.npz", 1)[..., 0] - (255 - X * 255)).max() <= 0.01


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros((5, SIDE, SIDE), np.uint8), r"expected \(H, W\), or \(H, W, bands\)"),
        (np.zeros(9), r"shape \(9,\)"),
        (np.array([[{}]]), "Python objects"),
        (np.zeros((2, 2), complex), "expected numbers"),
    ],
)
def test_arrays_that_are_no_images_are_refused(values, reason):
    np.save("x.npy", values, allow_pickle=True)
    with pytest.raises(images.UnreadableImage, match=reason):
        images.read_image(Path("x.npy"))


# -- DICOM -----------------------------------------------------------------------------------------


def write_dicom(name, stored, **tags):
    """A DICOM file of (H, W), (frames, H, W) or (H, W, 3)."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian

    data = pydicom.Dataset()
    data.SOPClassUID = CTImageStorage
    data.SOPInstanceUID = "1.2.3"
    is_big = stored.dtype.byteorder == ">"
    is_rgb = stored.ndim == 3 and stored.shape[2] == 3
    data.SamplesPerPixel = 3 if is_rgb else 1
    data.PhotometricInterpretation = "RGB" if is_rgb else "MONOCHROME2"
    if is_rgb:
        data.PlanarConfiguration = 0
    elif stored.ndim == 3:
        data.NumberOfFrames = len(stored)
    data.Rows, data.Columns = stored.shape[:2] if is_rgb else stored.shape[-2:]
    data.BitsAllocated = 8 * stored.itemsize
    data.BitsStored = data.BitsAllocated
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    for tag, value in tags.items():
        setattr(data, tag, value)
    data.HighBit = data.BitsStored - 1
    data.PixelData = stored.tobytes()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRBigEndian if is_big else ExplicitVRLittleEndian
    data["PixelData"].VR = "OW" if stored.itemsize == 2 else "OB"
    data.save_as(name, enforce_file_format=True)
    return Path(name)


HU = (RGB[..., 0] * 4000 - 1000).round()
WINDOW = (-1000, 3000)


@pytest.mark.parametrize("dtype", ["<u2", "<i2", ">u2"])
def test_dicom_values_are_hounsfield_units(dtype):
    path = write_dicom("a.dcm", (HU + 1024).astype(dtype), RescaleSlope=1, RescaleIntercept=-1024, BitsStored=16)
    values = images.read_values(path)
    assert values.dtype == np.float32
    assert values.dtype.isnative
    assert np.array_equal(values, HU)
    assert np.abs(pixels(path, 1, WINDOW)[..., 0] - (HU + 1000) / 4000 * 255).max() <= 0.01


def test_each_frame_of_a_dicom_file_has_its_own_slope():
    pydicom = pytest.importorskip("pydicom")

    def group(slope, intercept):
        item, outer = pydicom.Dataset(), pydicom.Dataset()
        item.RescaleSlope, item.RescaleIntercept, item.RescaleType = slope, intercept, "HU"
        outer.PixelValueTransformationSequence = [item]
        return outer

    stored = np.stack([(HU + 1000) / 4] * 3).astype(np.uint16)
    frames = [group(4, -1000), group(8, 0), group(0.5, 7)]
    path = write_dicom("own.dcm", stored, PerFrameFunctionalGroupsSequence=frames)
    shared = write_dicom("shared.dcm", stored, SharedFunctionalGroupsSequence=[group(4, -1000)])
    pages.use_pages("all")
    for number, (slope, intercept) in enumerate(((4, -1000), (8, 0), (0.5, 7))):
        page = images.list_images(Path())[number]
        assert page.name == f"own_p000{number + 1}.dcm"
        assert np.array_equal(images.read_values(page), stored[0] * np.float32(slope) + intercept)
        assert np.array_equal(images.read_values(pages.page_path(shared, number)), stored[0] * 4.0 - 1000)
    assert images.pages_in(path) == 3


def test_in_monochrome1_small_values_are_white():
    values = (X * 4095).astype(np.uint16)
    path = write_dicom("a.dcm", 4095 - values, PhotometricInterpretation="MONOCHROME1", BitsStored=12)
    assert np.array_equal(images.read_values(path), values)
    path = write_dicom("b.dcm", (255 - X * 255).astype(np.uint8), PhotometricInterpretation="MONOCHROME1")
    assert np.abs(pixels(path, 1)[..., 0] - X * 255).max() <= 1


def test_dicom_files_are_found_by_their_contents_where_they_have_no_suffix(tmp_path, monkeypatch, capsys):
    write_dicom("IM0001", LEVELS.astype(np.uint8))
    write_dicom("1.2.840.7", LEVELS.astype(np.uint8))
    found = images.list_images(tmp_path)
    assert [path.name for path in found] == ["1.2.840.7", "IM0001"]
    assert all(np.array_equal(pixels(path), LEVELS) for path in found)
    assert datasets.pair_name(found[0], tmp_path) == Path("1.2.840.7")
    without_libraries(monkeypatch)
    for name in ("a.nii.gz", "b.nii", "c.dcm"):
        Path(name).write_bytes(b"volume")
    for _ in range(2):
        assert images.list_images(tmp_path) == []
    assert warnings_in(capsys) == [
        f"warning: {tmp_path}: {count} skipped ({kind}): pip install -r requirements-science.txt"
        for count, kind in (("1 file", ".dcm"), ("1 file", ".nii"), ("1 file", ".nii.gz"), ("2 files", "DICOM"))
    ]


# -- NIfTI -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "ASL"])
def test_nifti_slices_are_axial_whatever_the_axes_of_the_file(axes, suffix):
    """The patient's right is left, the front is above, slices go from the feet up."""
    nibabel = pytest.importorskip("nibabel")
    volume = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)  # right, front, up
    image = nibabel.Nifti1Image(volume, np.diag([2.0, 2, 3, 1]))
    image.header.set_slope_inter(2, -1000)
    ornt = nibabel.orientations.axcodes2ornt(axes)
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), ornt)
    nibabel.save(image.as_reoriented(turn), f"v.{suffix}")
    stored = nibabel.as_closest_canonical(nibabel.load(f"v.{suffix}")).get_fdata(dtype=np.float32)
    pages.use_pages("all")
    found = images.list_images(Path())
    assert [path.name for path in found] == [f"v_p000{i}.{suffix}" for i in range(1, 8)]
    for k, path in enumerate(found):
        values = images.read_values(path)
        assert values.dtype == np.float32
        assert np.array_equal(values, stored[::-1, ::-1, k].T)
    assert datasets.pair_name(found[0], Path()) == Path("v_p0001")


def test_the_volumes_of_a_nifti_file_follow_one_another():
    nibabel = pytest.importorskip("nibabel")
    values = np.random.default_rng(0).random((5, 6, 2, 3), np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), "v.nii")
    assert images.pages_in(Path("v.nii")) == 6
    assert np.array_equal(images.read_values(Path("v_p0004.nii")), values[::-1, ::-1, 1, 1].T)


# -- pages -----------------------------------------------------------------------------------------


def write_stacks():
    """Files of three and of two images, the first ones equal, beside one of one."""
    greys = [Image.new("L", (SIDE, SIDE), level) for level in (20, 120, 220)]
    greys[0].save("stack.tif", save_all=True, append_images=greys[1:])
    colours = [grey.convert("RGB") for grey in greys]
    colours[0].save("anim.webp", save_all=True, append_images=colours[1:2], lossless=True)
    noise_image(0).save("one.png")


def test_files_of_several_images_are_counted_and_all_pages_used_if_asked(tmp_path, capsys):
    write_stacks()
    assert [path.name for path in images.list_images(tmp_path)] == ["anim.webp", "one.png", "stack.tif"]
    line = f"warning: {tmp_path}: 2 files hold 5 images; the first of each is used; --pages all for all"
    assert warnings_in(capsys) == [line]
    pages.use_pages("all")
    found = images.list_images(tmp_path)
    expected = ["anim_p0001.webp", "anim_p0002.webp", "one.png", *(f"stack_p000{i}.tif" for i in (1, 2, 3))]
    assert [path.name for path in found] == expected
    assert [pixels(path)[0, 0, 0] for path in found if path.name != "one.png"] == [20, 120, 20, 120, 220]
    assert datasets.fingerprint([tmp_path])
    with pytest.raises(images.UnreadableImage):
        images.read_image(Path("stack_p0004.tif"))


def test_thumbnails_and_overviews_are_no_pages():
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter("pyramid.tif") as file:
        file.write(LEVELS.astype(np.uint8), subfiletype=1)
        file.write((RGB[..., 0] * 255).astype(np.uint8))
    assert images.pages_in(Path("pyramid.tif")) == 1


def test_a_file_with_the_name_of_a_page_is_refused(tmp_path):
    write_stacks()
    noise_image(0).save("stack_p0002.tif")
    pages.use_pages("all")
    with pytest.raises(images.InputError, match=r"stack_p0002\.tif: has the name of a page of stack\.tif; rename"):
        images.list_images(tmp_path)


@pytest.mark.parametrize("choice", pages.CHOICES)
def test_stacks_are_twins_if_all_their_pages_are(choice, tmp_path):
    greys = [Image.new("L", (SIDE, SIDE), level) for level in (0, 50, 60, 50)]
    for name, others in (("a", greys[1:3]), ("b", greys[2:]), ("c", greys[1:3])):
        greys[0].save(f"{name}.tif", save_all=True, append_images=others)
    pages.use_pages(choice)
    facts = {path: checks.inspect_image(path) for path in images.list_images(tmp_path)}
    digests = checks.digests_of_files(facts, tmp_path, "trainA")
    assert list(digests) == [Path("trainA/a.tif"), Path("trainA/b.tif"), Path("trainA/c.tif")]
    assert digests[Path("trainA/a.tif")] == digests[Path("trainA/c.tif")] != digests[Path("trainA/b.tif")]


def test_bands_are_written_with_further_tags():
    tifffile = pytest.importorskip("tifffile")
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, kind, value in ((33550, 12, (2.0, 2.0, 0.0)), (34735, 3, (1, 1, 0)), (34737, 2, "WGS 84|")):
        tags.tagtype[tag] = kind
        tags[tag] = value
    image = bands.Bands(FIVE.astype(np.float32))
    image.save(Path("geo.tif"), format="TIFF", tiffinfo=tags)
    assert np.array_equal(tifffile.imread("geo.tif"), FIVE)
    assert np.array_equal(np.asarray(image), FIVE)
    with tifffile.TiffFile("geo.tif") as file:
        found = file.pages[0].tags
        assert [found[tag].value for tag in (33550, 34735, 34737)] == [(2.0, 2.0, 0.0), (1, 1, 0), "WGS 84|"]


# -- through the commands --------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, pytest.param(2, marks=pytest.mark.slow)])  # the second is resumed
def test_networks_of_four_channels_train_resume_and_translate_all_bands(no_plots, epochs):
    tifffile = pytest.importorskip("tifffile")
    for split in ("trainA", "trainB", "testA", "testB"):
        Path("datasets/sat", split).mkdir(parents=True)
        values = (np.dstack([RGB, Y]) * 3000).astype(np.uint16)
        for i in range(2):
            write_tiff(f"datasets/sat/{split}/{i}.tif", np.rot90(values, i), extrasamples=["unspecified"])
    options = ["--dataset_name", "sat", *TINY, "--channels", "4", "--cache", "ram"]
    train.main([*options, "--num_epochs", "1"])
    if epochs > 1:
        train.main(["--run_name", "sat", "--start_from", "latest", "--num_epochs", str(epochs)])
    scores = test_command.main(["--run_name", "sat", "--metrics", "paired", "--direction", "AtoB"])
    results = Path("generated_images/sat/test")
    found = tifffile.imread(results / "values_B/0.tif")
    assert (found.shape, found.dtype) == ((SIDE, SIDE, 4), np.float32)
    assert 0 <= found.min() < found.max() <= 3000
    shown = np.asarray(Image.open(results / "real_A/0.png"))
    assert np.abs(shown - LEVELS).max() <= 1  # the first three bands
    assert scores["AtoB"]["paired"]["copy"]["RMSE in units"] < 1
    assert np.asarray(Image.open(results / "grid.png")).shape[2] == 3


def test_translations_of_colours_in_units_keep_their_colours(monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    networks = {"G_AB": tiny_networks()["G_AB"]}
    networks["G_AB"].forward = lambda x: x
    metadata = {
        "size": [SIDE, SIDE],
        "range_A": [0, 3000],
        "range_B": [0, 1],
        "direction": "AtoB",
        "colours": ["A", "B"],
    }
    monkeypatch.setattr(test_command, "load_networks", lambda *_: (networks, metadata))
    write_tiff("a.tif", (RGB * 3000).astype(np.uint16))
    test_command.main(["--run_name", "x", "--input", "a.tif", "--output", "out"])
    assert np.abs(tifffile.imread("out/values_B/a.tif") - RGB).max() <= 1e-3


def test_a_run_on_all_pages_is_tested_on_all_pages():
    for split in ("testA", "testB"):
        Path("datasets/tiny", split).mkdir(parents=True)
        stack = [noise_image(f"{split}{i}", mode="L") for i in range(3)]
        stack[0].save(f"datasets/tiny/{split}/s.tif", save_all=True, append_images=stack[1:])
    save_run(epochs=1, argv=("--pages", "all"))
    results = Path("generated_images/tiny/test")
    test_command.main(["--run_name", "tiny", "--epoch", "1", "--direction", "AtoB"])
    assert sorted(path.name for path in (results / "truth_B").iterdir()) == [f"s_p000{i}.png" for i in (1, 2, 3)]
