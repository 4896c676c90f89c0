#!/usr/bin/env bash
# Package:  pillow 12.3.0
# Guess:    a TIFF file with an EXIF orientation of 6 (turned by 90 degrees) opens turned, or as stored; its pixels are right.
# Happens:  an uncompressed one in grey, palette, RGBA, CMYK or 16-bit grey, of one strip and not square, opened by its name,
#           is read with the width and height exchanged: its rows are cut at the wrong length, which gives diagonal
#           stripes. ImageOps.exif_transpose changes nothing about it. There is no warning. RGB files, compressed ones, and
#           the same file opened as a file object, or with image.filename = "" before loading, are right.
# Output:   L, from its name: wrong, 96 of 96 pixels differ
#           L, from a file object: right
#           RGB, from its name: right
#           L, compressed, from its name: right
# Hurts:    whoever trains on or translates scans: grey scans are often uncompressed TIFF files, and scanners and viewers
#           turn them by this tag. The network learns from stripes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==12.3.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from PIL import Image, ImageOps


def wrong_pixels(mode, by_name=True, **options):
    """Of an image of 12x8 px that its orientation tag turns."""
    image = Image.new(mode, (12, 8))
    for y in range(8):
        for x in range(12):
            level = 20 * x + y
            image.putpixel((x, y), level if mode == "L" else (level, 9, level))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save("scan.tif", exif=exif, **options)
    expected = image.transpose(Image.Transpose.ROTATE_270)
    with open("scan.tif", "rb") as file:
        read = ImageOps.exif_transpose(Image.open("scan.tif" if by_name else file))
        read.load()
    pixels = [(x, y) for y in range(expected.height) for x in range(expected.width)]
    inside = [xy for xy in pixels if xy[0] < read.width and xy[1] < read.height]  # the size may be wrong as well
    return len(pixels) - sum(read.getpixel(xy) == expected.getpixel(xy) for xy in inside)


cases = {
    "L, from its name": (wrong_pixels("L"), True),
    "L, from a file object": (wrong_pixels("L", by_name=False), False),
    "RGB, from its name": (wrong_pixels("RGB"), False),
    "L, compressed, from its name": (wrong_pixels("L", compression="tiff_deflate"), False),
}
for name, (count, is_wrong) in cases.items():
    print(f"{name}: {f'wrong, {count} of 96 pixels differ' if count else 'right'}")
    assert bool(count) == is_wrong, "the behaviour has changed"
PYTHON
