"""Generators of other projects, built in plain torch as these projects build them, with random weights."""

import torch
from torch import nn

NGF = 4
JUNYANZ = ("conv_block", "deconv")  # the name of a block's layers, and how the image is upsampled
PYTORCH_GAN = ("block", "resize")
BLOCK_DECONV = ("block", "deconv")  # mixes of the two
CONV_BLOCK_RESIZE = ("conv_block", "resize")
NORMS = {
    "instance": nn.InstanceNorm2d,
    "instance_affine": lambda width: nn.InstanceNorm2d(width, affine=True),
    "batch": nn.BatchNorm2d,
    "none": lambda width: nn.Identity(),
}
STATISTICS = ("running_mean", "running_var")  # in files of old instance norms, which do not use them
COUNTED = (*STATISTICS, "num_batches_tracked")


class Block(nn.Module):
    def __init__(self, name, layers):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Sequential(*layers))

    def forward(self, x):
        return x + getattr(self, self.name)(x)


class ForeignGenerator(nn.Module):
    """A ResNet generator of another project with random weights.

    second: index of the second convolution in a block, 6 with dropout
    lead:   number of layers before a convolution of "resize": an nn.Upsample, maybe padding as a layer of its own
    pad:    of the convolution after it: by default zeros, as in PyTorch-GAN, and reflection with a layer of its own
    """

    def __init__(
        self,
        blocks=1,
        project=JUNYANZ,
        n=2,
        channels=3,
        norm="instance",
        second=5,
        lead=1,
        biases=False,
        pad="",
        resize="nearest",
        last=nn.Tanh,
    ):
        super().__init__()
        block, up = project
        width = NGF
        bias = biases or norm.startswith("instance")

        def conv(width_in, width_out, side, **options):
            return [nn.Conv2d(width_in, width_out, side, bias=bias, **options), NORMS[norm](width_out)]

        layers = [nn.ReflectionPad2d(3), *conv(channels, width, 7), nn.ReLU()]
        for _ in range(n):
            layers += [*conv(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()]
            width *= 2
        for _ in range(blocks):
            inner = [nn.ReflectionPad2d(1), *conv(width, width, 3), nn.ReLU()]
            if second == 6:
                inner.append(nn.Dropout())
            layers.append(Block(block, [*inner, nn.ReflectionPad2d(1), *conv(width, width, 3)]))
        for _ in range(n):
            width //= 2
            if up == "deconv":
                convolution = nn.ConvTranspose2d(2 * width, width, 3, 2, 1, output_padding=1, bias=bias)
                layers += [convolution, NORMS[norm](width), nn.ReLU()]
            else:
                layers += [nn.Upsample(scale_factor=2, mode=resize), nn.Identity(), nn.Identity()][:lead]
                layers += [
                    *conv(2 * width, width, 3, padding=1, padding_mode=pad or ("zeros" if lead == 1 else "reflect")),
                    nn.ReLU(),
                ]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, channels, 7), last()]
        self.model = nn.Sequential(*layers)
        noise = torch.Generator().manual_seed(0)
        for name, x in self.state_dict().items():
            if x.is_floating_point():
                x.copy_(0.1 * torch.randn(x.shape, generator=noise))
                if name.endswith("running_var") or (x.dim() == 1 and name.endswith("weight")):
                    x.add_(1)
        self.eval().requires_grad_(False)

    def forward(self, x):
        return self.model(x)


def foreign(*args, statistics=(), **kwargs):
    """The state dict of a ForeignGenerator; statistics: of instance norms, as old files have them."""
    net = ForeignGenerator(*args, **kwargs)
    state = net.state_dict()
    for name, module in net.named_modules():
        if isinstance(module, nn.InstanceNorm2d):
            state |= {f"{name}.{leaf}": torch.ones(module.num_features) for leaf in statistics}
    return state


def tracked_statistics(net):
    """Give the instance norms of a network running statistics, which they use in eval mode; returns it."""
    for name, module in net.named_modules():
        if isinstance(module, nn.InstanceNorm2d):
            width = module.num_features
            tracked = nn.InstanceNorm2d(width, track_running_stats=True).eval()
            tracked.running_mean.copy_(torch.linspace(-0.5, 0.5, width))
            tracked.running_var.copy_(torch.linspace(0.5, 2, width))
            net.set_submodule(name, tracked)
    return net
