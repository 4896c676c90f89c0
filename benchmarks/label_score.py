"""Score translated label maps pixel by pixel: is the nearest colour of the palette the right one?

python benchmarks/label_score.py --fake generated_images/facades/test/fake_B --truth datasets/facades/testB

The palette is that of the facades set of Isola et al. 2017 (12 classes); its files are JPEG, so their colours are only close
to it. If a translation is smaller than its truth, its labels are enlarged without blurring. Prints pixel accuracy, mean
accuracy over the classes and mean intersection over union (Long et al. 2015, section 5, as in table 2 of Zhu et al. 2017).
Higher is better; 1/12 of the pixels would be right by chance.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from toolkit import cli, images, process

PALETTE = torch.tensor(
    [
        [0, 0, 222],
        [0, 48, 255],
        [0, 128, 255],
        [0, 207, 255],
        [32, 255, 224],
        [112, 255, 143],
        [192, 255, 63],
        [255, 240, 0],
        [255, 159, 0],
        [255, 80, 0],
        [255, 0, 0],
        [174, 0, 0],
    ]
)


def labels_of(image: Tensor) -> Tensor:
    """Class of each pixel, (H, W): the index of the nearest colour in PALETTE.

    image: uint8 (3, H, W)
    """
    pixels = image.flatten(1).T.float()  # (H * W, 3)
    return torch.cdist(pixels, PALETTE.float()).argmin(1).view(image.shape[1:])


def label_scores(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Scores over all pixels of pairs of a translation and its truth, uint8 (3, H, W).

    returns: pixel accuracy; mean accuracy and mean intersection over union of the classes that occur in the truth
    """
    classes = len(PALETTE)
    counts = torch.zeros(classes, classes)  # of pixels, by true and predicted class
    for output, truth in pairs:
        right = labels_of(truth)
        found = labels_of(output)[None, None].float()
        found = F.interpolate(found, right.shape, mode="nearest-exact")[0, 0].long()
        counts += torch.bincount(right.flatten() * classes + found.flatten(), minlength=classes**2).view(counts.shape)
    hits = counts.diag()
    true = counts.sum(1)
    occurs = true > 0
    union = true + counts.sum(0) - hits
    return {
        "pixel accuracy": (hits.sum() / true.sum()).item(),
        "mean accuracy": (hits / true)[occurs].mean().item(),
        "mean IoU": (hits / union)[occurs].mean().item(),
    }


def read(path: Path) -> Tensor:
    """An image as uint8 (3, H, W)."""
    return images.range_to_bytes(images.load_image(path, None))


def folder_scores(fake: Path, truth: Path) -> dict[str, float]:
    """label_scores of all images of a folder that have a truth of the same name."""
    truths = {path.stem: path for path in images.list_images(truth)}
    paths = [path for path in images.list_images(fake) if path.stem in truths]
    if not paths:
        raise utils.InputError(
            f"--fake {fake}: no image has a name that is also in {truth}; give the folders of one set"
        )
    return label_scores((read(path), read(truths[path.stem])) for path in paths)


@process.command
def main(argv=None):
    parser = cli.Parser(prog="label_score.py", description=__doc__)
    parser.add_argument("--fake", type=Path, required=True, help="folder of translated label maps")
    parser.add_argument("--truth", type=Path, required=True, help="folder of the real ones, with the same names")
    args = parser.parse_args(argv)
    for name, value in folder_scores(args.fake, args.truth).items():
        utils.say(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
