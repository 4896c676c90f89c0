"""Translate an image with OpenVINO: pip install openvino pillow

python export.py --weights examples/horse2zebra.safetensors --for openvino --size 256x256 --output zebra.xml
python examples/openvino_translate.py zebra.xml examples/horse.jpg zebra.png 256 256
"""

import sys

import numpy as np
import openvino
from PIL import Image, ImageOps

model, source, target, height, width = sys.argv[1:]
image = ImageOps.exif_transpose(Image.open(source)).convert("RGB")
resized = image.resize((int(width), int(height)), Image.Resampling.BICUBIC)
pixels = np.asarray(resized, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1  # (1, 3, H, W) in [-1, 1]
# without the hint, CPUs that can would compute in bfloat16
net = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
output = net(pixels)[0][0].transpose(1, 2, 0)
output = np.rint((output.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
Image.fromarray(output).resize(image.size, Image.Resampling.BICUBIC).save(target)
