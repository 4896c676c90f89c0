#!/usr/bin/env bash
# Package:  pillow 12.3.0, tifffile 2026.3.3
# Guess:    Pillow, which has no mode for colour of 16 bits, reads such TIFF files as RGB of 8 bits by taking the upper byte
#           of each value, as it does with PNG and with TIFF files whose samples are interleaved, or refuses them.
# Happens:  where the planes lie one after the other, as tifffile writes an array (3, H, W) by default, and are uncompressed,
#           each byte of a plane is read as a pixel: upper and lower bytes alternate along the rows, and only the upper
#           half of the image is read. There is no error and no warning. Compressed with deflate the same array is right.
# Output:   interleaved:             largest error 0 of 255
#           planes, deflate:         largest error 0 of 255
#           planes, uncompressed:    largest error 250 of 255
# Hurts:    microscopy and satellite images, which come as (channels, height, width) arrays: thumbnails look striped, and a
#           network trains on low bytes, which are noise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==12.3.0 tifffile==2026.3.3 imagecodecs==2026.3.6 numpy==2.4.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import tifffile
from PIL import Image

planes = np.random.default_rng(0).integers(0, 65536, (3, 40, 60), dtype=np.uint16)
expected = (planes >> 8).transpose(1, 2, 0).astype(int)
interleaved = np.ascontiguousarray(planes.transpose(1, 2, 0))
cases = {
    "interleaved": (interleaved, {}, False),
    "planes, deflate": (planes, {"compression": "deflate"}, False),
    "planes, uncompressed": (planes, {}, True),
}
for name, (array, options, is_wrong) in cases.items():
    tifffile.imwrite("x.tif", array, photometric="rgb", **options)
    with Image.open("x.tif") as image:
        found = np.asarray(image).astype(int)
    error = np.abs(found - expected).max()
    print(f"{name + ':':24} largest error {error} of 255")
    assert (error > 1) == is_wrong, "the behaviour has changed"
PYTHON
