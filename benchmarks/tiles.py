"""CPU time of translating in tiles, and how far the result is from that of the whole image.

OMP_NUM_THREADS=1 python benchmarks/tiles.py examples/day2night.safetensors --image docs/tiles.png
OMP_NUM_THREADS=1 python benchmarks/tiles.py --side 2048 --tiles 1024 512 --precision bf16 G_AB.safetensors

On drawn landscapes, in turns, so that other programs slow all ways alike; medians. For comparison, each tile size also
with tiles that are normalised independently. Prints a table in Markdown; --image shows the first landscape, whole and in
the smallest tiles.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import markdown_table

from toolkit import cli, devices, process, synthetic, tiles
from toolkit.images import image_to_tensor, resize_image, save_image, tensor_to_image
from toolkit.weights import load_generator

CPU = torch.device("cpu")
SEEDS = (200_000, 200_007)  # of the landscapes: two of the test split
SHOWN = 340  # px, side of each image of --image


def translate_independent_tiles(net, translate, image, tile):
    """Translate in the same tiles, each normalised by its own statistics."""
    overlap = tile // 8
    return tiles.blend_tiles(translate, image, tile, overlap, 2**net.config.downsamplings)


def save_side_by_side(outputs, path):
    """Write images (1, 3, H, W), reduced in size, side by side."""
    sheet = Image.new("RGB", (len(outputs) * (SHOWN + 10) - 10, SHOWN), "white")
    for i, output in enumerate(outputs):
        sheet.paste(resize_image(tensor_to_image(output[0]), (SHOWN, SHOWN)), (i * (SHOWN + 10), 0))
    save_image(sheet, path)


@torch.no_grad()
@process.command
def main(argv=None):
    parser = cli.Parser(prog="tiles.py", description=__doc__)
    parser.add_argument("file", type=Path, help="a generator file")
    parser.add_argument("--side", type=int, default=1024, help="side of the landscapes, px")
    parser.add_argument("--tiles", type=int, nargs="+", default=[512, 256], help="sides of the tiles, px")
    parser.add_argument("--turns", type=int, default=3, help="timed passes of each")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--image", type=Path, metavar="FILE.png", help="also write images to this file")
    args = parser.parse_args(argv)
    net, _ = load_generator(args.file)

    def translate(image):
        with devices.autocast(CPU, args.precision):
            return net(image).float()

    ways = {("whole", 0): lambda image: translate(image)}
    for tile in args.tiles:
        ways["shared statistics", tile] = lambda image, tile=tile: tiles.translate_tiled(net, translate, image, tile)
        ways["independent", tile] = lambda image, tile=tile: translate_independent_tiles(net, translate, image, tile)
    ratios = {way: [] for way in ways}
    distances = {way: [] for way in ways}
    for seed in SEEDS:
        image = image_to_tensor(synthetic.draw_scene(seed, "day", args.side))[None]
        whole = translate(image)
        for _ in range(args.turns):
            seconds = {}
            for way, run in ways.items():
                start = time.process_time()
                run(image)
                seconds[way] = time.process_time() - start
            for way in ways:
                ratios[way].append(seconds[way] / seconds["whole", 0])
        outputs = {way: run(image) for way, run in ways.items()}
        for way, output in outputs.items():
            distances[way].append(127.5 * F.l1_loss(output, whole).item())
        if args.image and seed == SEEDS[0]:
            smallest = min(args.tiles)
            kinds = [("whole", 0), ("independent", smallest), ("shared statistics", smallest)]
            save_side_by_side([outputs[kind] for kind in kinds], args.image)
    print(f"{args.side} px, {args.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    rows = []
    for (kind, tile), values in list(ratios.items())[1:]:
        rows.append(
            {"tile, px": tile, "statistics": kind, "CPU time, whole image = 1": f"{statistics.median(values):.2f}"}
        )
        differences = ", ".join(f"{value:.1f}" for value in distances[kind, tile])
        rows[-1]["mean difference to the whole image, of 255"] = differences
    print("\n".join(markdown_table(rows)))


if __name__ == "__main__":
    main()
