"""Score translations by domain: for which of both does a classifier take them?

python benchmarks/domain_score.py --dataset datasets/horse2zebra --fake_B generated_images/horse2zebra/test/fake_B

Three small CNNs learn to tell the real training images of both domains apart (ten minutes of one core for 2,400
photos, once more in grey) and are then shown the test images: translated, untranslated, and real ones of the target,
which is how right they are. They see them at 64 px; a score is the mean of the three. Higher is better, but a
classifier is easily pleased: look at the images, too.
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

SIDE = 64  # px
SHIFT = 6  # px at most, of a training image, up or down and to a side
BATCH = 32
CLASSIFIERS = 3  # one alone moves by some points with its seed, and even with how many threads its sums are split into
LOOKS = {"": 3, " in grey": 1}  # how the classifier is shown images: what this adds to a name → channels


def read_folder(folder: Path, channels: int = 3) -> Tensor:
    """All images of a folder: (N, channels, 64, 64) in [-1, 1]."""
    return torch.cat(list(named_images(folder, (SIDE, SIDE), channels).values()))


@functools.cache
def classifiers(dataset: Path, channels: int = 3) -> list[nn.Module]:
    """Small CNNs, of one seed each, that tell domain A (0) from B (1)."""
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
    schedule = torch.optim.lr_scheduler.LinearLR(optim, 1, 0, steps)  # while it is high, fractions differ by epochs
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
def taken_for(net: nn.Module, real_or_fake: Tensor, target: str) -> float:
    """Fraction of images (N, C, H, W) that the classifier takes for the target domain."""
    says_b = torch.cat([net(batch)[:, 0] > 0 for batch in real_or_fake.split(64)])
    return (says_b == (target == "B")).float().mean().item()


def folder_score(dataset: Path, folder: Path, target: str, channels: int = 3) -> float:
    """Fraction of the images of a folder that classifiers of this data set take for the target domain: their mean."""
    real_or_fake = read_folder(folder, channels)
    return statistics.fmean(taken_for(net, real_or_fake, target) for net in classifiers(dataset, channels))


@process.command
def main(argv=None):
    parser = cli.Parser(prog="domain_score.py", description=__doc__)
    add = cli.flag_group(parser, "folders")
    add("--dataset", type=Path, required=True, help="folder with trainA, trainB, testA, testB")
    add("--fake_A", type=Path, help="translations of testB")
    add("--fake_B", type=Path, help="translations of testA")
    args = parser.parse_args(argv)
    if not (args.fake_A or args.fake_B):
        parser.error("nothing to score; expected --fake_A, --fake_B or both")
    for look, channels in LOOKS.items():
        for source, target, fake in (("A", "B", args.fake_B), ("B", "A", args.fake_A)):
            if fake is None:
                continue
            folders = (fake, args.dataset / f"test{source}", args.dataset / f"test{target}")
            found, before, real = (folder_score(args.dataset, folder, target, channels) for folder in folders)
            say = f"fake_{target}{look}: {found:.3f} taken for {target}"
            utils.say(f"{say} (untranslated {source} images {before:.3f}, real {target} images {real:.3f})")


if __name__ == "__main__":
    main()
