"""How soon a discriminator tells two domains apart, by its normalisation: real images only, no generator.

python benchmarks/discriminators.py --dataset datasets/horse2zebra

It is trained as in a CycleGAN: least squares, one image of each domain per step, half of them mirrored, Adam with beta1 0.5.
Every --every steps it prints the mean loss of these steps (0.25 if it cannot decide), and the fraction of test pairs in
which the image of B scores higher than that of A (area under the ROC curve: 0.5 is chance, 1 is perfect).
"""

import random
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import utils
from cyclegan import LossConfig, discriminator_loss
from toolkit import cli, devices, images, process

# "spectral": no normalisation layers, but weights of spectral norm 1 (Miyato et al. 2018, arXiv:1802.05957)
NORMS = (*models.NORMS, "spectral")


def build(norm: str, ndf: int, n_layers: int) -> nn.Module:
    """A PatchGAN with one of NORMS."""
    norm_layers = "none" if norm == "spectral" else norm
    net = models.build_discriminator(models.DiscriminatorConfig(ndf=ndf, n_layers=n_layers, norm=norm_layers))
    if norm == "spectral":
        for layer in [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]:
            nn.utils.parametrizations.spectral_norm(layer)
    return net


def read(folder: Path, size: int) -> Tensor:
    """All images of a folder: (N, 3, size, size) in [-1, 1]."""
    return torch.stack([images.load_image(path, (size, size)) for path in images.list_images(folder)])


@torch.no_grad()
def ranked(net: nn.Module, test_A: Tensor, test_B: Tensor) -> float:
    """Fraction of pairs of an image of A and one of B in which that of B scores higher."""
    scores_A, scores_B = (torch.cat([net(x).mean((1, 2, 3)) for x in test.split(32)]) for test in (test_A, test_B))
    return (scores_B[:, None] > scores_A).float().mean().item()


@process.command
def main(argv=None):
    parser = cli.Parser(prog="discriminators.py", description=__doc__)
    parser.add_argument("--dataset", type=Path, required=True, help="folder with trainA, trainB, testA, testB")
    parser.add_argument("--size", type=int, default=64, help="side of the images, px")
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=["instance", "group", "none", "spectral"])
    parser.add_argument("--ndf", type=int, default=64, help="width")
    parser.add_argument("--n_layers_D", type=int, default=3, help="strided layers")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--steps", type=int, default=1200, help="steps with each normalisation")
    parser.add_argument("--every", type=int, default=400, help="steps between two lines")
    args = parser.parse_args(argv)
    largest = models.DiscriminatorConfig().largest_n_layers(args.size)
    if args.n_layers_D > largest:
        raise utils.InputError(f"--n_layers_D {args.n_layers_D}: expected at most {largest} for --size {args.size}")
    train_A, train_B, test_A, test_B = (
        read(args.dataset / name, args.size) for name in ("trainA", "trainB", "testA", "testB")
    )
    for norm in args.norms:
        devices.seed_everything(0)
        net = build(norm, args.ndf, args.n_layers_D)
        optim = torch.optim.Adam(net.parameters(), args.lr, (0.5, 0.999))
        losses = []
        for step in range(1, args.steps + 1):
            pair = [random.choice(train)[None] for train in (train_A, train_B)]
            real_A, real_B = (x.flip(3) if random.random() < 0.5 else x for x in pair)
            loss = discriminator_loss(net, real_B, real_A, LossConfig())
            optim.zero_grad()
            loss.backward()
            optim.step()
            losses.append(loss.item())
            if step % args.every == 0:
                mean = statistics.fmean(losses[-args.every :])
                utils.say(f"{norm}: step {step}, loss {mean:.3f}, ranked {ranked(net, test_A, test_B):.3f}")


if __name__ == "__main__":
    main()
