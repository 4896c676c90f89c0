"""Colour profiles: images are converted to sRGB, which networks learn, and which results have without saying so."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # of a profile, by the mode of images
UNNOTICED = 2  # levels; what a profile of sRGB itself changes by rounding


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image of 8 bits as its ICC profile says; one without a profile, or with one that does not fit, stays as it is.

    The result has no profile; its mode is RGB or RGBA if it was converted.
    """
    profile = image.info.pop("icc_profile", None)
    if not profile:
        return image
    opaque = image.convert({"P": "RGB", "PA": "RGB", "RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode))
    transform = transform_to_srgb(profile, opaque.mode)
    if transform is None:
        return image
    converted = transform.apply(opaque)
    del converted.info["icc_profile"]
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


@functools.lru_cache(maxsize=16)
def transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB; None if it is damaged, of another kind of image, or that of sRGB.

    Relative colorimetric with black point compensation, as in browsers: white remains white.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != SPACES.get(mode):
            return None
        target = ImageCms.createProfile("sRGB")
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(source, target, mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "RGB":
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3)
        changed = np.asarray(transform.apply(Image.fromarray(colours))).astype(int)
        if np.abs(changed - colours).max() <= UNNOTICED:
            return None
    return transform
