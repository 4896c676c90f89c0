"""Score translations by domain: of how many does a classifier predict the target domain?

python benchmarks/domain_score.py --dataset datasets/horse2zebra --fake_B generated_images/horse2zebra/test/fake_B

Three small CNNs learn to tell the real training images of both domains apart at 64 px (ten minutes on one core for 2,400
photos, and as long in greyscale). They then classify the test images: translated, untranslated, and real ones of the target
domain, which shows how reliable they are. A score is the mean of the three. Higher is better, but a classifier is easily
satisfied: look at the images, too.
"""

import functools
import math
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from datasets import named_images
from toolkit import cli, process
from toolkit.images import ImageReader

SIDE = 64  # px
SHIFT = 6  # px; training images are shifted by at most this much in each direction
BATCH = 32
CLASSIFIERS = 3  # the score of one alone varies by some points with its seed, and even with the number of threads
VIEWS = {"": 3, " in greyscale": 1}  # suffix of a score's name → channels that the classifier sees


def read_folder(folder: Path, channels: int = 3) -> Tensor:
    """All images of a folder: (N, channels, 64, 64) in [-1, 1]."""
    return torch.cat(list(named_images(folder, ImageReader((SIDE, SIDE), channels)).values()))


@functools.cache
def classifiers(dataset: Path, channels: int = 3) -> list[nn.Module]:
    """Small CNNs with different seeds that tell domain A (0) from B (1)."""
    real_A = read_folder(dataset / "trainA", channels)
    real_B = read_folder(dataset / "trainB", channels)
    x = torch.cat([real_A, real_B])
    y = torch.cat([torch.zeros(len(real_A)), torch.ones(len(real_B))])
    return [classifier(x, y, seed) for seed in range(CLASSIFIERS)]


def classifier(x: Tensor, y: Tensor, seed: int, epochs: int = 15) -> nn.Module:
    """A small CNN fitted to images (N, C, 64, 64), shifted and mirrored, and their labels (N), each 0 or 1."""
    torch.manual_seed(seed)
    layers = []
    for thin, wide in ((x.shape[1], 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(thin, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(128, 1))
    net.to(memory_format=torch.channels_last)  # a third faster on a CPU
    optim = torch.optim.Adam(net.parameters(), 1e-3)
    steps = epochs * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optim, 1, 0, steps)  # while the rate is high, scores vary by epoch
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            padded = F.pad(x[rows], (SHIFT,) * 4, mode="reflect")
            dy, dx = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
            batch = padded[:, :, dy : dy + SIDE, dx : dx + SIDE]
            if torch.rand(()) < 0.5:
                batch = batch.flip(3)
            optim.zero_grad()
            F.binary_cross_entropy_with_logits(net(batch)[:, 0], y[rows]).backward()
            optim.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def predicted_as(net: nn.Module, real_or_fake: Tensor, target: str) -> float:
    """Fraction of images (N, C, H, W) of which the classifier predicts the target domain."""
    predicts_B = torch.cat([net(batch)[:, 0] > 0 for batch in real_or_fake.split(64)])
    return (predicts_B == (target == "B")).float().mean().item()


def folder_score(dataset: Path, folder: Path, target: str, channels: int = 3) -> float:
    """Fraction of a folder's images of which this data set's classifiers predict the target domain: their mean."""
    real_or_fake = read_folder(folder, channels)
    return statistics.fmean(predicted_as(net, real_or_fake, target) for net in classifiers(dataset, channels))


@process.command
def main(argv=None):
    parser = cli.Parser(prog="domain_score.py", description=__doc__)
    parser.add_argument("--dataset", type=Path, required=True, help="folder with trainA, trainB, testA, testB")
    parser.add_argument("--fake_A", type=Path, help="translations of testB")
    parser.add_argument("--fake_B", type=Path, help="translations of testA")
    args = parser.parse_args(argv)
    if not (args.fake_A or args.fake_B):
        parser.error("nothing to score; expected --fake_A, --fake_B or both")
    for view, channels in VIEWS.items():
        for source, target, fake in (("A", "B", args.fake_B), ("B", "A", args.fake_A)):
            if fake is None:
                continue
            folders = (fake, args.dataset / f"test{source}", args.dataset / f"test{target}")
            found, before, real = (folder_score(args.dataset, folder, target, channels) for folder in folders)
            utils.say(
                f"fake_{target}{view}: {found:.3f} predicted as {target} "
                f"(untranslated {source} images {before:.3f}, real {target} images {real:.3f})"
            )


if __name__ == "__main__":
    main()
