"""Images per second that the data loader delivers, by kind of cache and number of workers; or against another checkout.

python benchmarks/loader.py --size 64 --photo 256
python benchmarks/loader.py --size 256 --photo 512 --workers 0 4 8
python benchmarks/loader.py --size 256 --photo 4000x3000 --count 2 --against ../other_checkout

Draws JPEG photos of --photo px, and reads epochs of them as training at --size px does (resize, crop, mirror, stack).
The first epoch fills the cache and has its own column. Compare with images/s of benchmarks/step.py: the loader must be
faster. --against reads them in turns with the code of both checkouts, each in a process of its own on one thread, and
compares the CPU time. Prints a table in Markdown and writes loader.csv to --output.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, markdown_table, write_csv

import datasets
from toolkit import cli, process, synthetic

GRAIN = 12  # levels, the standard deviation of what is added to drawn scenes: files become as large as those of photos
TURNS = 3  # in which the code of two checkouts reads the same images
EPOCHS = """
import sys, time
sys.path.insert(0, ".")
import torch, datasets, pathlib
torch.set_num_threads(1)
config = datasets.DataConfig("photos", pathlib.Path(sys.argv[1]), 1, int(sys.argv[2]), int(sys.argv[2]), num_workers=0)
data = datasets.TrainingData(config, 0, torch.device("cpu"), {})
for epoch in range(4):
    start = time.process_time()
    read = sum(2 * len(x) for x, _ in data.batches(epoch, 0, torch.device("cpu")))
    print(1000 * (time.process_time() - start) / read)
"""  # ms of CPU time an image, by epoch; the first includes imports


def draw_photos(folder: Path, count: int, width: int, height: int) -> None:
    """Draw trainA and trainB: scenes with grain that is coarse and fine, as photos have it."""
    rng = np.random.default_rng(0)
    for domain, hour in (("A", "day"), ("B", "night")):
        (folder / f"train{domain}").mkdir(parents=True)
        for i in range(count):
            scene = synthetic.draw_scene(i, hour, min(width, height, 1000)).resize((width, height))
            grain = np.zeros((height, width))
            for scale in (1, 2, 4, 8):
                noise = rng.normal(0, GRAIN / 2, (height // scale + 1, width // scale + 1)).astype(np.float32)
                grain += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
            pixels = (np.asarray(scene) + grain[..., None]).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"train{domain}" / f"{i}.jpg", quality=90)


def images_per_second(args, root: Path, kind: str, workers: int) -> dict:
    """A row of the table: the first epoch, and the best of the others."""
    config = datasets.DataConfig("photos", root, args.batch, args.size, args.size, cache=kind, num_workers=workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = datasets.TrainingData(config, 0, device, {})
    rates = []
    for epoch in range(args.epochs):
        start = time.perf_counter()
        read = sum(2 * len(real_A) for real_A, _ in data.batches(epoch, 0, device))
        rates.append(read / (time.perf_counter() - start))
    data.close()
    return {"cache": kind, "workers": workers, "first epoch": round(rates[0]), "later": round(max(rates[1:]))}


def compare_checkouts(args, root: Path) -> list[dict]:
    """A row: the ms of CPU time an image that each checkout takes, the medians of its later epochs in all turns."""
    found: dict[Path, list[float]] = {args.against.resolve(): [], ROOT: []}
    for _ in range(TURNS):
        for checkout, times in found.items():
            argv = [sys.executable, "-c", EPOCHS, str(root.resolve()), str(args.size)]
            output = subprocess.run(argv, cwd=checkout, check=True, capture_output=True, text=True).stdout
            times += [float(line) for line in output.splitlines()[-3:]]
    theirs, ours = map(statistics.median, found.values())
    return [
        {"photo": args.photo, "theirs, ms": f"{theirs:.2f}", "ours, ms": f"{ours:.2f}", "times": f"{theirs / ours:.1f}"}
    ]


@process.command
def main(argv=None):
    parser = cli.Parser(prog="loader.py", description=__doc__)
    parser.add_argument("--size", type=int, default=64, help="side of the training images, px")
    parser.add_argument("--photo", default="256", help="side of the photos on disk, px, or WIDTHxHEIGHT")
    parser.add_argument("--count", type=int, default=200, help="photos of each domain")
    parser.add_argument("--batch", type=int, default=4, help="images of each domain in a batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of worker processes")
    parser.add_argument("--epochs", type=int, default=4, help="epochs; the first fills the cache")
    parser.add_argument("--against", type=Path, help="another checkout of this project, to compare with")
    parser.add_argument("--output", type=Path, default=Path("generated_images/benchmarks"), help="folder of loader.csv")
    args = parser.parse_args(argv)
    width, _, height = args.photo.partition("x")
    with tempfile.TemporaryDirectory() as folder:
        draw_photos(Path(folder, "photos"), args.count, int(width), int(height or width))
        if args.against:
            rows = compare_checkouts(args, Path(folder))
        else:
            kinds = [(kind, workers) for workers in args.workers for kind in ("none", "ram", "disk")]
            rows = [images_per_second(args, Path(folder), kind, workers) for kind, workers in kinds]
    print(
        f"images a second, or ms of CPU time an image, at {args.size} px from JPEG photos of {args.photo} px, batch {args.batch}"
    )
    print("\n".join(markdown_table(rows)))
    write_csv(args.output / "loader.csv", rows)


if __name__ == "__main__":
    main()
