"""Score translated digits by label: is a digit still the same digit after translation?

python benchmarks/digit_score.py --data datasets/mnist2usps --fake_B OUT/fake_B --fake_A OUT/fake_A

A small CNN is trained on the real training images of each domain (about a minute on two cores). It then classifies the
translated test images. The label is the first character of a file name (7_012.png is a seven). Prints for each folder the
accuracy on the translated images, on untranslated ones, and on the real test images of the target, which is the ceiling.
Higher is better; chance is 0.10.
"""

import argparse
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

SIDE = 32  # px; every image is read in greyscale, SIDE x SIDE


def read_folder(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 32, 32) in [-1, 1] and labels (N,) of every image in folder; the label is the name's first digit."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg"} and p.name[0].isdigit())
    if not files:
        raise SystemExit(f"{folder}: no image whose name starts with its digit, such as 7_012.png")
    rows = []
    for path in files:
        grey = Image.open(path).convert("L").resize((SIDE, SIDE), Image.BILINEAR)
        rows.append(torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, SIDE, SIDE))
    return torch.stack(rows).float() / 127.5 - 1, torch.tensor([int(p.name[0]) for p in files])


def classifier(images: torch.Tensor, labels: torch.Tensor, epochs: int = 12) -> nn.Module:
    """A small CNN fitted to images (N, 1, 32, 32), shifted by up to 2 px, and their labels (N,)."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 64, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    optim = torch.optim.Adam(net.parameters(), 1e-3)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            dy, dx = torch.randint(-2, 3, (2,)).tolist()
            batch = torch.roll(images[rows], (dy, dx), (2, 3))
            optim.zero_grad()
            F.cross_entropy(net(batch), labels[rows]).backward()
            optim.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (net(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with trainA, trainB, testA, testB")
    parser.add_argument("--fake_A", type=Path, help="folder of USPS test digits translated to MNIST")
    parser.add_argument("--fake_B", type=Path, help="folder of MNIST test digits translated to USPS")
    args = parser.parse_args()
    for domain, folder in (("A", args.fake_A), ("B", args.fake_B)):
        if folder is None:
            continue
        net = classifier(*read_folder(args.data / f"train{domain}"))
        source = "B" if domain == "A" else "A"
        print(
            f"fake_{domain}: accuracy {accuracy(net, *read_folder(folder)):.3f}"
            f"  (untranslated {source} images {accuracy(net, *read_folder(args.data / f'test{source}')):.3f},"
            f" real {domain} images {accuracy(net, *read_folder(args.data / f'test{domain}')):.3f})"
        )


if __name__ == "__main__":
    main()
