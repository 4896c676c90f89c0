"""Translate an image with an exported generator. Needs onnxruntime, numpy and pillow, but not torch.

python export.py --run_name day2night --direction AtoB
python examples/onnx_translate.py saved_models/day2night/G_AB.onnx photo.jpg night.png
"""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageCms, ImageOps


def open_model(path: str) -> tuple[onnxruntime.InferenceSession, dict]:
    """Open a network that export.py wrote.

    returns: the session, and from its metadata "channels", "size", (height, width) in px or None, "preprocess" and "resample"
    raises:  ValueError for any other file
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected a network written by: python export.py")
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, so they need not be logged too
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        facts = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
        if facts["size"] is not None:
            height, width = facts["size"]
            facts["size"] = (int(height), int(width))
        kept = {
            "preprocess": facts.get("preprocess", "resize_and_crop"),
            "resample": facts.get("resample"),
        }  # since 0.2
        return session, {"channels": facts["channels"], "size": facts["size"]} | kept
    except Exception as error:  # onnxruntime has a dozen kinds of errors; other networks have other metadata
        raise ValueError(f"{path}: not a network written by export.py; make one with: python export.py") from error


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image as its colour profile says; without one, or with one that does not fit, it stays as it is."""
    profile = image.info.pop("icc_profile", None)
    if not profile:
        return image
    opaque = image.convert({"P": "RGB", "PA": "RGB", "RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode))
    try:
        source, target = io.BytesIO(profile), ImageCms.createProfile("sRGB")
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        converted = ImageCms.profileToProfile(opaque, source, target, intent, "RGB", flags=flags)
    except ImageCms.PyCMSError:
        return image
    converted.info.pop("icc_profile")  # or Pillow would write it with the result
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


def open_image(path: str, channels: int) -> Image.Image:
    """Read an image as RGB or greyscale in sRGB, rotated as its EXIF orientation says, transparency over white.

    raises: ValueError if it cannot be read, or if it has 16 or 32 bits, which test.py scales to 8
    """
    if channels not in (1, 3):
        raise ValueError(f"{path}: the model translates images of {channels} bands; use test.py")
    try:
        with Image.open(path) as file:
            file.filename = ""  # else Pillow maps the file, and turns some TIFF files into stripes
            image = ImageOps.exif_transpose(file)
            is_jpeg_2000 = file.format == "JPEG2000"  # Pillow reads some of more than 8 bits wrongly
            tags = file.tag_v2 if file.format == "TIFF" else {}
        if is_jpeg_2000:
            raise ValueError("JPEG 2000; convert it to PNG or use test.py")
        if tags.get(284) == 2 and max(tags.get(258, (8,))) > 8:  # which Pillow reads wrongly
            raise ValueError("a TIFF file of separate planes of more than 8 bits; convert it to PNG")
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its mode is {image.mode}; convert it to 8 bits or use test.py")
        image = to_srgb(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB" if channels == 3 else "L")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; expected an image") from error
    except Exception as error:  # Pillow has a dozen kinds of errors for damaged files
        raise ValueError(f"{path}: cannot be read ({error}); expected an image such as PNG or JPEG") from error


def network_size(image: Image.Image, facts: dict) -> tuple[int, int]:
    """Return the width and height at which a network gets an image, as in test.py."""
    if facts["size"] is None or facts["preprocess"] == "crop":
        return image.size
    height, width = facts["size"]
    factors = {
        "none": 1.0,
        "scale_width": width / image.width,
        "scale_shortside": max(width / image.width, height / image.height),
    }
    kind = facts["preprocess"].removesuffix("_and_crop")
    if kind not in factors:  # the image is stretched
        return width, height
    factor = factors[kind]
    is_whole = kind == facts["preprocess"]  # in training, too
    if is_whole:
        factor = max(factor, min(64, height, width) / min(image.size))
    sides = [max(1, round(factor * side)) for side in image.size]
    return tuple((side + 2) // 4 * 4 for side in sides) if is_whole else tuple(sides)


def translate(model: str, source: str, target: str) -> None:
    """Translate an image file at the size that the network was trained at, and write the result at the image's size.

    raises: ValueError if the model or the image cannot be read, or the result cannot be written
    """
    if Path(target).resolve() == Path(source).resolve():
        raise ValueError(f"{target}: is the image that is read; choose another name for the result")
    session, facts = open_model(model)
    image = open_image(source, facts["channels"])
    if all(low == high for low, high in np.reshape(image.getextrema(), (-1, 2))):
        raise ValueError(
            f"{source}: one colour alone, of which normalisation would enlarge rounding errors; use another"
        )
    width, height = network_size(image, facts)
    resample = Image.Resampling.NEAREST if facts["resample"] == "nearest" else Image.Resampling.BICUBIC
    pixels = np.asarray(image.resize((width, height), resample), np.float32) / 127.5 - 1
    pixels = pixels.reshape(1, height, width, -1).transpose(0, 3, 1, 2)  # (1, channels, H, W) in [-1, 1]
    try:
        (output,) = session.run(None, {session.get_inputs()[0].name: pixels})
    except Exception as error:  # such as an image that is smaller than the padding
        raise ValueError(
            f"{source}: {model} cannot translate {width}x{height} px ({error}); use another image"
        ) from error
    output = np.rint((output[0].clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0).squeeze()
    try:
        Image.fromarray(output).resize(image.size, Image.Resampling.BICUBIC).save(target)
    except (OSError, ValueError) as error:
        raise ValueError(f"{target}: cannot be written ({error}); expected a name such as result.png") from error


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if len(argv) != 3:
        message = "usage: python examples/onnx_translate.py MODEL.onnx IMAGE RESULT.png"
    else:
        try:
            translate(*argv)
            return 0
        except ValueError as error:
            message = "error: " + " ".join(str(error).split())
    print(message, file=sys.stderr)  # noqa: T201
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
