"""Draw slices like those of MR (A: 12 bits in PNG) and CT (B: Hounsfield units in float TIFF), or read results in units.

python benchmarks/mr2ct.py datasets/mr2ct                                                  # draws the data set
python benchmarks/mr2ct.py datasets/mr2ct --results generated_images/mr2ct/test/values_B   # the error per tissue, in HU

A slice is a body of fat, muscle, bone, marrow and air. No value of A gives that of B by itself: bone and air are both black
in A. Training slices are unpaired; those for testing are pairs with known truth. Needs tifffile.
"""

import argparse
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

SIDE = 64  # px
COUNTS = {"trainA": 400, "trainB": 400, "testA": 40, "testB": 40}
TISSUES = {  # value in A, of 4095; in B, HU
    "outside": (40, -1000),
    "fat": (3400, -100),
    "muscle": (1700, 50),
    "bone": (100, 1400),
    "marrow": (2700, 250),
    "air": (60, -900),
}


def ellipse(rows: np.ndarray, columns: np.ndarray, centre: np.ndarray, radii: np.ndarray, angle: float) -> np.ndarray:
    """Whether points are in an ellipse; all lengths as fractions of the side."""
    y, x = rows - centre[0], columns - centre[1]
    u = (np.cos(angle) * x + np.sin(angle) * y) / radii[1]
    v = (np.cos(angle) * y - np.sin(angle) * x) / radii[0]
    return u**2 + v**2 <= 1


def draw_tissues(seed: int) -> np.ndarray:
    """Draw a slice: (4 * SIDE, 4 * SIDE) numbers of TISSUES."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.mgrid[0 : 4 * SIDE, 0 : 4 * SIDE] + 0.5) / (4 * SIDE)
    names = list(TISSUES)
    found = np.zeros(rows.shape, int)
    body = rng.uniform([0.30, 0.36], [0.40, 0.46])
    angle = rng.uniform(-0.3, 0.3)
    middle = np.array([0.5, 0.5]) + rng.uniform(-0.03, 0.03, 2)
    for name, factor in (("fat", 1.0), ("muscle", rng.uniform(0.8, 0.92))):
        found[ellipse(rows, columns, middle, factor * body, angle)] = names.index(name)
    for side in (-1, 1):
        place = middle + [rng.uniform(-0.05, 0.05), side * rng.uniform(0.14, 0.2)]
        found[ellipse(rows, columns, place, rng.uniform(0.06, 0.12, 2), rng.uniform(0, 3))] = names.index("air")
    place = middle + [rng.uniform(0.12, 0.18), rng.uniform(-0.03, 0.03)]
    radii = rng.uniform(0.06, 0.09, 2)
    found[ellipse(rows, columns, place, radii, 0)] = names.index("bone")
    found[ellipse(rows, columns, place, 0.6 * radii, 0)] = names.index("marrow")
    return found


def render(tissues: np.ndarray, domain: str, seed: int) -> np.ndarray:
    """Return the values (SIDE, SIDE) of a slice in a domain, with the noise of a scanner."""
    values = np.array([pair["AB".index(domain)] for pair in TISSUES.values()], float)[tissues]
    values = values.reshape(SIDE, 4, SIDE, 4).mean((1, 3))
    noise = np.random.default_rng(seed).normal(size=values.shape)
    if domain == "A":
        return (values + 40 * noise).clip(0, 4095).round().astype(np.uint16)
    return (values + 15 * noise).clip(-1024, 3071).astype(np.float32)


def draw(folder: Path) -> None:
    """Write trainA, trainB, testA, testB; the test slices are pairs."""
    for split, count in COUNTS.items():
        (folder / split).mkdir(parents=True)
        first = {"trainA": 0, "trainB": 10_000}.get(split, 20_000)
        for i in range(first, first + count):
            values = render(draw_tissues(i), split[-1], i + (split[-1] == "B"))
            if split[-1] == "A":
                Image.fromarray(values).save(folder / split / f"{i:05}.png")
            else:
                tifffile.imwrite(folder / split / f"{i:05}.tif", values)


def report(folder: Path, results: Path) -> None:
    """Print the errors of results in B, as tifffile reads them, in all pixels and in the pixels of one tissue."""
    found = np.stack([tifffile.imread(path) for path in sorted(results.glob("*.tif"))])
    truth = np.stack([tifffile.imread(path) for path in sorted((folder / "testB").glob("*.tif"))])
    tissues = np.stack([draw_tissues(int(path.stem)) for path in sorted(results.glob("*.tif"))])
    whole = tissues.reshape(len(found), SIDE, 4, SIDE, 4).swapaxes(2, 3).reshape(*found.shape, 16)
    print(f"{len(found)} files, {found.dtype}, from {found.min():.0f} to {found.max():.0f} HU")
    print(f"{'all':10} RMSE {np.sqrt(np.mean((found - truth) ** 2)):6.1f} HU")
    for number, name in enumerate(TISSUES):
        inside = (whole == number).all(-1)
        error = np.sqrt(np.mean((found - truth)[inside] ** 2))
        print(f"{name:10} RMSE {error:6.1f} HU, mean {found[inside].mean():7.1f} of {truth[inside].mean():7.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the data set")
    parser.add_argument("--results", type=Path, help="folder of translations to B, in place of drawing")
    args = parser.parse_args()
    if args.results:
        report(args.folder, args.results)
    else:
        draw(args.folder)


if __name__ == "__main__":
    main()
