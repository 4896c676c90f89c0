"""Translate an image with an exported generator; needs onnxruntime, numpy and pillow, no torch.

python export.py --run_name day2night --direction AtoB
python examples/onnx_translate.py saved_models/day2night/G_AB.onnx photo.jpg night.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def translate(model: str, source: str, target: str) -> None:
    """Read an image, run it through the network at the size it was trained at, and write the output at the image's size."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    facts = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    with Image.open(source) as file:
        image = ImageOps.exif_transpose(file).convert("RGB" if facts["channels"] == 3 else "L")
    height, width = facts["size"] or image.size[::-1]
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    pixels = pixels.reshape(1, height, width, -1).transpose(0, 3, 1, 2)  # (1, channels, H, W) in [-1, 1]
    (output,) = session.run(None, {session.get_inputs()[0].name: pixels})
    output = np.rint((output[0].clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0).squeeze()
    Image.fromarray(output).resize(image.size, Image.Resampling.BICUBIC).save(target)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/onnx_translate.py MODEL.onnx IMAGE RESULT.png")
    translate(*sys.argv[1:])
