"""Translate an image with OpenCV 4 or 5 alone: pip install opencv-python-headless

python export.py --weights examples/horse2zebra.safetensors --for opencv --size 256x256 --output zebra.onnx
python examples/opencv_translate.py zebra.onnx examples/horse.jpg zebra.png 256 256
"""

import sys

import cv2
import numpy as np

model, source, target, height, width = sys.argv[1:]
image = cv2.imread(source)  # BGR, 8 bits
net = cv2.dnn.readNetFromONNX(model)
size = (int(width), int(height))
net.setInput(cv2.dnn.blobFromImage(image, 1 / 127.5, size, (127.5, 127.5, 127.5), swapRB=True))  # RGB in [-1, 1]
output = net.forward()[0].transpose(1, 2, 0)
output = np.rint((output.clip(-1, 1) + 1) * 127.5).astype(np.uint8)[:, :, ::-1]
cv2.imwrite(target, cv2.resize(output, image.shape[1::-1], interpolation=cv2.INTER_CUBIC))
