"""Translate an image with ncnn: pip install ncnn pillow

python export.py --weights examples/horse2zebra.safetensors --for ncnn --size 256x256 --output zebra.ncnn.param
python examples/ncnn_translate.py zebra.ncnn examples/horse.jpg zebra.png 256 256
"""

import sys

import ncnn
import numpy as np
from PIL import Image, ImageOps

model, source, target, height, width = sys.argv[1:]
image = ImageOps.exif_transpose(Image.open(source)).convert("RGB")
resized = image.resize((int(width), int(height)), Image.Resampling.BICUBIC)
pixels = np.ascontiguousarray(np.asarray(resized, np.float32).transpose(2, 0, 1) / 127.5 - 1)  # (3, H, W) in [-1, 1]
net = ncnn.Net()
if net.load_param(f"{model}.param") or net.load_model(f"{model}.bin"):
    sys.exit(f"{model}.param, {model}.bin: cannot be loaded")
extractor = net.create_extractor()
extractor.input("in0", ncnn.Mat(pixels).clone())
output = np.array(extractor.extract("out0")[1]).transpose(1, 2, 0)
output = np.rint((output.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
Image.fromarray(output).resize(image.size, Image.Resampling.BICUBIC).save(target)
