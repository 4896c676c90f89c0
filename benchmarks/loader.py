"""Images per second that the data loader delivers, by kind of cache and number of workers.

python benchmarks/loader.py --size 64 --photo 256
python benchmarks/loader.py --size 256 --photo 512 --workers 0 4 8

Draws JPEG photos of --photo px, and reads epochs of them as training at --size px does (resize, crop, mirror, stack).
The first epoch fills the cache and has its own column. Compare with images/s of benchmarks/step.py: the loader must be
faster. Prints a table in Markdown and writes loader.csv to --output.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import markdown_table, write_csv

import datasets
from toolkit import cli, process, synthetic


def draw_photos(folder: Path, count: int, side: int) -> dict[str, list[Path]]:
    paths = {"A": [], "B": []}
    for domain, hour in (("A", "day"), ("B", "night")):
        for i in range(count):
            paths[domain].append(folder / f"{domain}{i}.jpg")
            synthetic.draw_scene(i, hour, side).save(paths[domain][-1], quality=90)
    return paths


def images_per_second(args, paths: dict, folder: Path, kind: str, workers: int) -> dict:
    """A row of the table: the first epoch, and the best of the others."""
    images = datasets.UnpairedDataset(paths, (args.size, args.size))
    images.caches = datasets.open_caches(kind, images, folder / f"{kind}{workers}")
    sampler = datasets.EpochSampler((args.count, args.count), args.batch)
    loader = datasets.make_loader(images, sampler, workers, pin_memory=torch.cuda.is_available())
    rates = []
    for epoch in range(args.epochs):
        sampler.epoch = epoch
        start = time.perf_counter()
        read = sum(2 * len(batch["A"]) for batch in loader)
        rates.append(read / (time.perf_counter() - start))
    return {"cache": kind, "workers": workers, "first epoch": round(rates[0]), "later": round(max(rates[1:]))}


@process.command
def main(argv=None):
    parser = cli.Parser(prog="loader.py", description=__doc__)
    parser.add_argument("--size", type=int, default=64, help="side of the training images, px")
    parser.add_argument("--photo", type=int, default=256, help="side of the photos on disk, px")
    parser.add_argument("--count", type=int, default=200, help="photos of each domain")
    parser.add_argument("--batch", type=int, default=4, help="images of each domain in a batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of worker processes")
    parser.add_argument("--epochs", type=int, default=4, help="epochs; the first fills the cache")
    parser.add_argument("--output", type=Path, default=Path("generated_images/benchmarks"), help="folder of loader.csv")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_photos(Path(folder), args.count, args.photo)
        kinds = [(kind, workers) for workers in args.workers for kind in ("none", "ram", "disk")]
        rows = [images_per_second(args, paths, Path(folder), kind, workers) for kind, workers in kinds]
    print(f"images per second at {args.size} px from JPEG photos of {args.photo} px, batch {args.batch}")
    print("\n".join(markdown_table(rows)))
    write_csv(args.output / "loader.csv", rows)


if __name__ == "__main__":
    main()
