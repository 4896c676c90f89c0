"""Colour profiles: images come out in sRGB, whatever they were tagged with."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from profiles import D50, icc_profile, rgb_profile

from toolkit.colour import to_srgb
from toolkit.images import read_image

GREY = icc_profile("GRAY", [("wtpt", D50)], 1.0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def tagged(image, profile, kind="PNG"):
    """An image as it is read from a file with a profile."""
    image.save("image", format=kind, icc_profile=profile)
    return read_image(Path("image"))


# values from the definition of the spaces: linear light → XYZ → linear sRGB, clipped → sRGB
@pytest.mark.parametrize(
    ("name", "colour", "expected"),
    [
        ("P3", (230, 40, 40), (252, 0, 5)),
        ("P3", (255, 255, 255), (255, 255, 255)),
        ("P3", (0, 0, 0), (0, 0, 0)),
        ("P3", (128, 128, 128), (128, 128, 128)),
        ("Adobe", (230, 40, 40), (255, 35, 35)),
        ("Adobe", (224, 172, 150), (242, 174, 150)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_other_spaces_become_those_of_srgb(name, colour, expected, mode):
    image = Image.new("RGB", (4, 4), colour)
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    read = tagged(image, rgb_profile(name))
    assert np.abs(np.subtract(read.getpixel((0, 0)), expected)).max() <= 2
    assert "icc_profile" not in read.info


def test_transparency_lies_over_white_after_the_conversion():
    image = Image.new("RGBA", (2, 1), (230, 40, 40, 255))
    image.putpixel((1, 0), (230, 40, 40, 0))
    read = tagged(image, rgb_profile("P3"))
    assert np.abs(np.subtract(read.getpixel((0, 0)), (252, 0, 5))).max() <= 2
    assert read.getpixel((1, 0)) == (255, 255, 255)


def test_one_transparent_colour_remains_transparent():
    image = Image.new("RGB", (2, 1), (230, 40, 40))
    image.putpixel((1, 0), (1, 2, 3))
    image.save("image.png", icc_profile=rgb_profile("P3"), transparency=(1, 2, 3))
    read = read_image(Path("image.png"))
    assert read.getpixel((1, 0)) == (255, 255, 255)
    assert read.getpixel((0, 0))[0] > 245


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile_changes_greys(mode):
    image = Image.new(mode, (4, 4), {"L": 55, "LA": (55, 255), "I;16": 55 * 257}[mode])
    assert np.abs(np.subtract(tagged(image, GREY).getpixel((0, 0)), 128)).max() <= 2  # linear: 55 / 255 = 0.2157


def test_a_transparent_grey_remains_transparent():
    image = Image.new("L", (2, 1), 55)
    image.putpixel((1, 0), 3)
    image.save("image.png", icc_profile=GREY, transparency=3)
    read = read_image(Path("image.png"))
    assert abs(read.getpixel((0, 0))[0] - 128) <= 2
    assert read.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("profile", [SRGB, b"damaged", rgb_profile("P3")[:300], GREY, None])
def test_with_srgb_and_with_a_profile_that_does_not_fit_pixels_stay_as_they_are(profile):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if profile:
        image.info["icc_profile"] = profile
    read = to_srgb(image)
    assert np.array_equal(np.asarray(read), pixels)
    assert "icc_profile" not in read.info


def test_photos_of_phones_are_converted_too():
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    data = BytesIO()
    Image.new("RGB", (64, 64), (230, 40, 40)).save(data, format="HEIF", quality=-1, icc_profile=rgb_profile("P3"))
    Path("photo.heic").write_bytes(data.getvalue())
    assert np.abs(np.subtract(read_image(Path("photo.heic")).getpixel((20, 20)), (252, 0, 5))).max() <= 4
