"""The networks of CycleGAN, their recipes and their losses; knows no command line, path or device.

G = build_generator(GeneratorConfig(num_residual=9))
G = build_generator(GeneratorConfig(generator="unet_vit", vit_size="small"))
D = build_discriminator(DiscriminatorConfig(n_layers=3))
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GENERATORS = ("resnet", "unet_vit")
DISCRIMINATORS = ("patch", "pixel")
NORMS = ("instance", "batch", "none")
UPSAMPLES = ("deconv", "resize")
INITS = ("normal", "xavier", "kaiming", "orthogonal")
GAN_LOSSES = ("lsgan", "bce", "hinge")
LOSS_FLAGS = ("lambda_gan", "lambda_cycle", "lambda_identity", "gan_loss")  # what shapes loss_G
INIT_GAIN = 0.02  # standard deviation of "normal", gain of "xavier" and "orthogonal"


# ---------------------------------------------------------------------------------------------
# Recipes: everything that is needed to build a network again, stored beside its weights


@dataclass(frozen=True)
class VitSize:
    """The numbers of a UNet-ViT that no flag changes."""

    widths: tuple[int, ...]  # channels after the stem and after each level; the last are those of a token
    ffn: int  # width of the feed-forward layers
    blocks: int
    heads: int
    full: bool  # two convolutions and a norm before each, in every level and block; else the leanest that works


VIT_SIZES = {
    "small": VitSize((64, 128, 256), ffn=1024, blocks=4, heads=4, full=False),
    "uvcgan": VitSize((48, 48, 96, 192, 384), ffn=1536, blocks=12, heads=6, full=True),
}


@dataclass(frozen=True)
class GeneratorConfig:
    """Recipe of a generator. Defaults are those of Zhu et al. 2017, appendix 7.2, at 256 px.

    ngf, num_residual and n_downsampling shape a resnet, vit_size, vit_blocks and vit_heads a unet_vit.
    """

    generator: str = "resnet"
    channels: int = 3
    ngf: int = 64
    num_residual: int = 9
    n_downsampling: int = 2
    upsample: str = "deconv"
    norm: str = "instance"
    norm_output: bool = False
    vit_size: str = "small"
    vit_blocks: int = 4
    vit_heads: int = 4

    def __post_init__(self) -> None:
        if self.generator == "unet_vit" and self.hidden_width % self.vit_heads:
            raise ValueError(
                f"vit_heads {self.vit_heads}: expected a divisor of {self.hidden_width}, the width of a token"
            )

    @property
    def halvings(self) -> int:
        """How often height and width are halved."""
        return self.n_downsampling if self.generator == "resnet" else len(VIT_SIZES[self.vit_size].widths) - 1

    @property
    def blocks(self) -> int:
        """Number of blocks between the halvings and the doublings; a student has fewer."""
        return self.num_residual if self.generator == "resnet" else self.vit_blocks

    @property
    def hidden_width(self) -> int:
        """Channels of the states between the blocks."""
        resnet = self.generator == "resnet"
        return self.ngf * 2**self.n_downsampling if resnet else VIT_SIZES[self.vit_size].widths[-1]

    @property
    def smallest_side(self) -> int:
        """Smallest height and width in px: a reflection needs a map larger than its pad."""
        return max(4, 2 ** (self.halvings + 1))

    @property
    def receptive_field(self) -> float:
        """Side of the square of input px on which an output pixel depends, not counting what norms see of all of them."""
        if self.generator == "unet_vit":
            return math.inf  # attention looks everywhere
        side = 2**self.n_downsampling
        return 13 + 4 * (side - 1) + 4 * side * self.num_residual

    def tokens(self, height: int, width: int) -> int:
        """Positions that attend to each other in one picture of (height, width) px; 0 for a resnet."""
        side = 2**self.halvings
        return math.ceil(height / side) * math.ceil(width / side) if self.generator == "unet_vit" else 0

    def token_bytes(self, height: int, width: int, blocks: int | None = None) -> int:
        """Memory that the blocks' states of one picture take in float32, all kept as in training, or of so many blocks.

        Eight vectors of the token's width and two of the feed-forward layer's are held in each; the
        attention matrix itself is never stored (fused kernels).
        """
        size = VIT_SIZES[self.vit_size]
        vectors = 8 * size.widths[-1] + 2 * size.ffn
        return 4 * self.tokens(height, width) * vectors * (self.vit_blocks if blocks is None else blocks)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Recipe of a discriminator. Defaults give the 70x70 PatchGAN of Isola et al. 2017."""

    discriminator: str = "patch"
    channels: int = 3
    ndf: int = 64
    n_layers: int = 3
    max_mult: int = 8
    norm: str = "instance"
    pool: bool = False

    def map_side(self, side: int) -> int:
        """Side of the answer for a picture side in px; below 1 the network cannot be run."""
        return side if self.discriminator == "pixel" else side // 2**self.n_layers - 2

    def largest_n_layers(self, side: int) -> int:
        """Largest n_layers whose answer is not empty for a side in px; 0 if there is none."""
        return max((n for n in range(1, 32) if side // 2**n - 2 >= 1), default=0)


# ---------------------------------------------------------------------------------------------
# Building blocks


class InstanceNorm2d(nn.InstanceNorm2d):
    """Instance norm without weights: (N, C, H, W) → (N, C, H, W); on a CPU as a group norm, the same sum in less time."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.is_contiguous() and x.shape[2] * x.shape[3] > 1 and not torch.compiler.is_exporting():
            return F.group_norm(x, x.shape[1], eps=self.eps)
        return super().forward(x)


def norm_layer(norm: str, width: int) -> nn.Module:
    """Make the norm that follows a convolution of `width` output channels.

    Instance norm keeps no running statistics: training and testing then compute the same.
    """
    if norm == "instance":
        return InstanceNorm2d(width)
    return nn.BatchNorm2d(width) if norm == "batch" else nn.Identity()


def upsample_layers(upsample: str, width_in: int, width_out: int, bias: bool) -> list[nn.Module]:
    """Double height and width: the paper's transposed convolution, or nearest neighbour + convolution.

    "resize" avoids the checkerboard of a kernel that its stride does not divide
    (Odena et al. 2016, Deconvolution and Checkerboard Artifacts).
    """
    if upsample == "deconv":
        return [nn.ConvTranspose2d(width_in, width_out, 3, 2, 1, output_padding=1, bias=bias)]
    return [nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.Conv2d(width_in, width_out, 3, bias=bias)]


class ThinConv2d(nn.Conv2d):
    """A convolution to the few channels of a picture, twice to three times as fast on a CPU; stride 1, no padding.

    x: (N, in_channels, H, W) → (N, out_channels, H - k + 1, W - k + 1)

    A CPU computes 16 output channels at a time, so that 3 waste most of it. Here the k rows of the kernel become
    channels of their own, 3k of them, whose results are added after a shift of a row each: the same sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or torch.compiler.is_exporting():
            return super().forward(x)
        thin, wide, k, _ = self.weight.shape
        height = x.shape[2]
        with torch.autocast("cpu", enabled=False):  # parts of a sum are not to be rounded to bfloat16
            rows = self.weight.transpose(1, 2).reshape(thin * k, wide, 1, k)
            x = F.conv2d(x.to(rows.dtype), rows)  # (N, thin * k, H, W - k + 1)
        # k rows more, and a view that is one row longer than the map, move map i up by i rows without a copy of each
        x = F.pad(x.reshape(len(x), thin, k * height, -1), (0, 0, 0, k)).unflatten(2, (k, height + 1))
        return x[:, :, :, : height - k + 1].sum(2) + self.bias[:, None, None]


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a skip, no activation after the sum (Johnson et al. 2016)."""

    def __init__(self, width: int, norm: str):
        super().__init__()
        bias = norm != "batch"  # a batch norm brings its own shift
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3, bias=bias),
            norm_layer(norm, width),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3, bias=bias),
            norm_layer(norm, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # (N, width, H, W)


# ---------------------------------------------------------------------------------------------
# Generators


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Extend (N, C, H, W) to the right and below by reflection until `multiple` divides H and W."""
    height, width = x.shape[-2:]
    right, below = -width % multiple, -height % multiple
    return F.pad(x, (0, right, 0, below), mode="reflect") if right or below else x


class ResnetGenerator(nn.Module):
    """Translate pictures: stem, strided convolutions, residual blocks, upsampling, head.

    x:       (N, channels, H, W) in [-1, 1]; H and W at least config.smallest_side, else free:
             what the downsampling does not divide is padded by reflection and cropped back
    returns: (N, channels, H, W) in [-1, 1]; with return_hidden also the list of the outputs of
             all residual blocks, each (N, ngf * 2**n_downsampling, H / 2**n, W / 2**n)
    raises:  ValueError if a side is too small
    source:  Zhu et al. 2017, arXiv:1703.10593, appendix 7.2. The paper's shorthand c7s1-3 reads
             as if the output layer had a norm; it has none (see --norm_output)
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        norm, width, bias = config.norm, config.ngf, config.norm != "batch"
        stem = [nn.ReflectionPad2d(3), nn.Conv2d(config.channels, width, 7, bias=bias)]
        self.stem = nn.Sequential(*stem, norm_layer(norm, width), nn.ReLU(inplace=True))
        self.down, self.blocks, self.up = nn.Sequential(), nn.ModuleList(), nn.Sequential()
        for _ in range(config.n_downsampling):
            conv = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=bias)
            width *= 2
            self.down.append(nn.Sequential(conv, norm_layer(norm, width), nn.ReLU(inplace=True)))
        self.blocks.extend(ResnetBlock(width, norm) for _ in range(config.num_residual))
        for _ in range(config.n_downsampling):
            layers = upsample_layers(config.upsample, width, width // 2, bias)
            width //= 2
            self.up.append(nn.Sequential(*layers, norm_layer(norm, width), nn.ReLU(inplace=True)))
        self.head = nn.Sequential(nn.ReflectionPad2d(3), ThinConv2d(width, config.channels, 7))
        if config.norm_output:
            self.head.append(norm_layer(norm, config.channels))

    def forward(self, x: Tensor, return_hidden: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        height, width = x.shape[-2:]
        if min(height, width) < self.config.smallest_side:
            raise ValueError(f"{width}x{height} px: the generator needs at least {self.config.smallest_side} px a side")
        x = pad_to_multiple(x, 2**self.config.n_downsampling)
        x = self.down(self.stem(x))  # (N, ngf * 2**n, H / 2**n, W / 2**n)
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        x = torch.tanh(self.head(self.up(x)))  # (N, channels, H, W)
        x = x[..., :height, :width]
        return (x, hidden) if return_hidden else x


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: (N, T, width) → (N, T, width) (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, heads, width / heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (N, heads, T, width / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))  # (N, T, width)


class VitBlock(nn.Module):
    """Attention and a feed-forward layer, each around a skip that one learnt scale, at first 0, lets in.

    source: Dosovitskiy et al. 2020 (the block); Bachlechner et al. 2020, ReZero (the scale)
    """

    def __init__(self, width: int, size: VitSize, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) if size.full else nn.Identity() for _ in range(2))
        self.attention = Attention(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, size.ffn), nn.GELU(), nn.Linear(size.ffn, width))
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.attention(self.norms[0](x))  # (N, T, width)
        return x + self.scale * self.ffn(self.norms[1](x))


class Position(nn.Module):
    """Tell each token where it lies, from coordinates in [-1, 1], so that a net works at sizes it never saw.

    x: (N, width, H, W) → tokens (N, H * W, width); source: Torbunov et al. 2022, UVCGAN, section 3.1
    """

    def __init__(self, width: int):
        super().__init__()
        self.waves, self.mix = nn.Linear(2, width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        sides = (
            (2 * torch.arange(n, device=x.device, dtype=self.waves.weight.dtype) + 1) / n - 1 for n in x.shape[-2:]
        )
        grid = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1)  # (H * W, 2), centres of pixels
        tokens, waves = x.flatten(2).transpose(1, 2), torch.sin(self.waves(grid))
        return self.mix(torch.cat([tokens, waves.expand(len(x), -1, -1).to(tokens.dtype)], dim=-1))


def double_conv(width_in: int, width: int, width_out: int, norm: str) -> nn.Sequential:
    """Two convolutions with a norm before each, as in every level of UVCGAN's U-Net."""
    first = [norm_layer(norm, width_in), nn.Conv2d(width_in, width, 3, padding=1), nn.LeakyReLU(0.2, inplace=True)]
    second = [norm_layer(norm, width), nn.Conv2d(width, width_out, 3, padding=1), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*first, *second)


class UnetVitGenerator(nn.Module):
    """Translate pictures: a U-Net whose lowest level is a transformer over the pixels of its map.

    x:       (N, channels, H, W) in [-1, 1]; sizes as for ResnetGenerator
    returns: (N, channels, H, W) in [-1, 1]; with return_hidden also the list of the outputs of all
             transformer blocks, each (N, config.hidden_width, H / 2**halvings, W / 2**halvings)
    raises:  ValueError if a side is too small
    source:  Torbunov et al. 2022, UVCGAN, arXiv:2203.02557; "uvcgan" has its very layers, with tanh in
             place of the sigmoid since pictures are in [-1, 1], and config.upsample "resize"; "small"
             is that of the 64x64 study: a CycleGAN's stem and halvings, skips, four blocks without norm; a
             1x1 convolution behind each skip is ours
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config, size, norm = config, VIT_SIZES[config.vit_size], config.norm
        widths, bias = size.widths, norm != "batch"
        if size.full:
            self.stem = nn.Sequential(
                nn.Conv2d(config.channels, widths[0], 3, padding=1), nn.LeakyReLU(0.2, inplace=True)
            )
            head = [nn.Conv2d(widths[0], config.channels, 1)]
        else:
            stem = [nn.ReflectionPad2d(3), nn.Conv2d(config.channels, widths[0], 7, bias=bias)]
            self.stem = nn.Sequential(*stem, norm_layer(norm, widths[0]), nn.ReLU(inplace=True))
            head = [nn.ReflectionPad2d(3), ThinConv2d(widths[0], config.channels, 7)]
        levels = [self._level(thin, wide) for thin, wide in itertools.pairwise(widths)]
        self.down = nn.ModuleList(down for down, _ in levels)
        self.position = Position(widths[-1])
        self.blocks = nn.ModuleList(VitBlock(widths[-1], size, config.vit_heads) for _ in range(config.vit_blocks))
        self.leave = nn.Linear(widths[-1], widths[-1])
        self.up = nn.ModuleList(up for _, up in reversed(levels))
        self.head = nn.Sequential(*head, *([norm_layer(norm, config.channels)] if config.norm_output else []))

    def _level(self, thin: int, wide: int) -> tuple[nn.ModuleList, nn.ModuleList]:
        """What a level does before its skip is taken and after, on the way down; likewise around the skip on the way up."""
        norm, upsample = self.config.norm, self.config.upsample
        if VIT_SIZES[self.config.vit_size].full:
            down = [double_conv(thin, wide, wide, norm), nn.Conv2d(wide, wide, 2, stride=2)]
            up = [nn.Sequential(*upsample_layers(upsample, wide, wide, True)), double_conv(2 * wide, wide, thin, norm)]
        else:
            bias = norm != "batch"
            conv = nn.Conv2d(thin, wide, 3, stride=2, padding=1, bias=bias)
            down = [nn.Identity(), nn.Sequential(conv, norm_layer(norm, wide), nn.ReLU(inplace=True))]
            double = [*upsample_layers(upsample, wide, thin, bias), norm_layer(norm, thin), nn.ReLU(inplace=True)]
            # without a nonlinearity behind the skip, colours of the input show through whatever stands there
            merge = [nn.Conv2d(2 * thin, thin, 1, bias=bias), norm_layer(norm, thin), nn.ReLU(inplace=True)]
            up = [nn.Sequential(*double), nn.Sequential(*merge)]
        return nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x: Tensor, return_hidden: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        height, width = x.shape[-2:]
        if min(height, width) < self.config.smallest_side:
            raise ValueError(f"{width}x{height} px: the generator needs at least {self.config.smallest_side} px a side")
        x, skips, hidden = self.stem(pad_to_multiple(x, 2**self.config.halvings)), [], []
        for body, halve in self.down:
            skips.append(body(x))
            x = halve(skips[-1])
        tokens, sides = self.position(x), x.shape[-2:]  # (N, T, F) with T = H * W / 4**halvings
        for block in self.blocks:
            tokens = block(tokens)
            hidden.append(tokens.transpose(1, 2).unflatten(2, sides))
        x = self.leave(tokens).transpose(1, 2).unflatten(2, sides)
        for double, body in self.up:
            x = body(torch.cat([double(x), skips.pop()], dim=1))
        x = torch.tanh(self.head(x))[..., :height, :width]  # (N, channels, H, W)
        return (x, hidden) if return_hidden else x


# ---------------------------------------------------------------------------------------------
# Discriminators


class PatchDiscriminator(nn.Module):
    """Judge overlapping patches: 16, 34, 70, 142 or 286 px for 1 to 5 strided layers.

    x:       (N, channels, H, W) in [-1, 1]
    returns: (N, 1, H / 2**n_layers - 2, W / 2**n_layers - 2), unbounded; (N, 1, 1, 1) with pool
    source:  Isola et al. 2017, arXiv:1611.07004; pool is the global average of the 64x64 study
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        bias, width = config.norm != "batch", config.ndf
        layers = [nn.Conv2d(config.channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(1, config.n_layers + 1):
            stride, wider = 2 if i < config.n_layers else 1, config.ndf * min(2**i, config.max_mult)
            layers += [nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=bias)]
            layers += [norm_layer(config.norm, wider), nn.LeakyReLU(0.2, inplace=True)]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)  # (N, 1, h, w)
        return x.mean((2, 3), keepdim=True) if self.config.pool else x


class PixelDiscriminator(nn.Module):
    """Judge each pixel by its colour alone, through 1x1 convolutions ("pixelGAN" of Isola et al. 2017).

    x:       (N, channels, H, W) in [-1, 1]
    returns: (N, 1, H, W), unbounded; (N, 1, 1, 1) with pool
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(
            nn.Conv2d(config.channels, config.ndf, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(config.ndf, 2 * config.ndf, 1, bias=config.norm != "batch"),
            norm_layer(config.norm, 2 * config.ndf),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * config.ndf, 1, 1, bias=config.norm != "batch"),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)  # (N, 1, H, W)
        return x.mean((2, 3), keepdim=True) if self.config.pool else x


# ---------------------------------------------------------------------------------------------
# Building


def init_weights(net: nn.Module, init: str = "normal") -> None:
    """Set every convolution by `init` and its bias to 0; batch norms to N(1, 0.02), 0.

    The linear layers of a transformer keep torch's start: N(0, 0.02) would flatten its positions.
    source: Radford et al. 2015, N(0, 0.02), is the default of the paper and of its successors
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            if init == "normal":
                nn.init.normal_(module.weight, 0.0, INIT_GAIN)
            elif init == "xavier":
                nn.init.xavier_normal_(module.weight, INIT_GAIN)
            elif init == "kaiming":
                nn.init.kaiming_normal_(module.weight)
            elif init == "orthogonal":
                nn.init.orthogonal_(module.weight, INIT_GAIN)
            else:
                raise ValueError(f"init {init!r}: expected one of {', '.join(INITS)}")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, INIT_GAIN)
            nn.init.zeros_(module.bias)


def build_generator(config: GeneratorConfig, init: str = "normal") -> nn.Module:
    """Make the generator that `config` describes, freshly initialised."""
    kinds = {"resnet": ResnetGenerator, "unet_vit": UnetVitGenerator}
    if config.generator not in kinds:
        raise ValueError(f"generator {config.generator!r}: expected one of {', '.join(kinds)}")
    net = kinds[config.generator](config)
    init_weights(net, init)
    return net


def build_discriminator(config: DiscriminatorConfig, init: str = "normal") -> nn.Module:
    """Make the discriminator that `config` describes, freshly initialised."""
    kinds = {"patch": PatchDiscriminator, "pixel": PixelDiscriminator}
    if config.discriminator not in kinds:
        raise ValueError(f"discriminator {config.discriminator!r}: expected one of {', '.join(kinds)}")
    net = kinds[config.discriminator](config)
    init_weights(net, init)
    return net


def count_macs(net: nn.Module, height: int, width: int) -> int:
    """Count the multiply-accumulates of all convolutions, linear layers and attentions for one picture of (height, width) px.

    A transposed convolution is counted as it is computed, once per input pixel; published figures
    often count it per output pixel, four times too much for stride 2 (56.8 G in place of 49.5 G).
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, Attention):  # each of T queries meets T keys, then T values
            total += 2 * output.shape[1] * output[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel() * output.numel() // output.shape[-1]
        else:
            pixels = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            total += module.weight.numel() * pixels[0, 0].numel()

    counted = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | Attention)]
    hooks = [module.register_forward_hook(count) for module in counted]
    weight = next(net.parameters())
    with torch.no_grad():
        net(torch.zeros(1, net.config.channels, height, width, device=weight.device, dtype=weight.dtype))
    for hook in hooks:
        hook.remove()
    return total


# ---------------------------------------------------------------------------------------------
# Losses: always in float32 (or float64), also where the networks computed in half precision


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def gan_loss_G(prediction: Tensor, kind: str = "lsgan") -> Tensor:
    """Loss of a generator whose pictures were judged as `prediction`: it wants them called real.

    prediction: any shape, unbounded
    returns:    scalar
    source:     lsgan Mao et al. 2017 (targets 0 and 1), bce Goodfellow et al. 2014 (non-saturating),
                hinge Lim & Ye 2017
    """
    prediction = _wide(prediction)
    if kind == "lsgan":
        return F.mse_loss(prediction, torch.ones_like(prediction))
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(prediction, torch.ones_like(prediction))
    if kind == "hinge":
        return -prediction.mean()
    raise ValueError(f"gan_loss {kind!r}: expected one of {', '.join(GAN_LOSSES)}")


def gan_loss_D(on_real: Tensor, on_fake: Tensor, kind: str = "lsgan") -> Tensor:
    """Loss of a discriminator, halved as in Zhu et al. 2017 to slow it down against the generator.

    on_real, on_fake: its answers to real and to translated pictures, unbounded
    returns:          scalar; 0.25 for an lsgan discriminator that cannot decide
    """
    on_real, on_fake = _wide(on_real), _wide(on_fake)
    if kind == "lsgan":
        loss = F.mse_loss(on_real, torch.ones_like(on_real)) + F.mse_loss(on_fake, torch.zeros_like(on_fake))
    elif kind == "bce":
        loss = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
    elif kind == "hinge":
        loss = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
    else:
        raise ValueError(f"gan_loss {kind!r}: expected one of {', '.join(GAN_LOSSES)}")
    return loss / 2


def gradient_penalty(judge: nn.Module, real: Tensor, fake: Tensor, target: float) -> Tensor:
    """How far the slope of a discriminator is from `target`, at pictures between real and translated ones.

    real, fake: (N, C, H, W) in [-1, 1]; each pair is mixed at random, so torch's random state moves
    target:     0 punishes the slope itself; another one its relative distance from it
    returns:    scalar, with a graph that reaches the discriminator's weights (double backward)
    source:     Gulrajani et al. 2017; relative to the target as in UVCGAN (0.1 and 100), centred at zero
                as in UVCGAN2 (0.01 and 0)
    """
    share = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
    mixed = (share * real + (1 - share) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(judge(mixed).sum(), mixed, create_graph=True)
    norms = (slope.flatten(1).square().sum(1) + 1e-12).sqrt()  # (N,); the root of 0 has no gradient
    return ((norms - target) / (target or 1.0)).square().mean()


def picture_loss(picture: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error between two batches of pictures (cycle, identity and output losses).

    picture, target: (N, C, H, W) in [-1, 1], same shape
    returns:         scalar in [0, 2]
    raises:          ValueError if the shapes differ (l1_loss would only warn and broadcast)
    source:          Zhu et al. 2017, eq. 2 and section 5.2
    """
    if picture.shape != target.shape:
        raise ValueError(f"shapes differ: {tuple(picture.shape)} and {tuple(target.shape)}")
    return F.l1_loss(_wide(picture), _wide(target))


def hidden_loss(hidden: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean squared error between a student's hidden states and those of its teacher, mean over the pairs.

    hidden, targets: states of equal shapes, pair by pair
    returns:         scalar, at least 0
    raises:          ValueError if the shapes or counts differ (mse_loss would broadcast one state over three)
    """
    if [x.shape for x in hidden] != [x.shape for x in targets]:
        raise ValueError("hidden states differ in number or shape")
    return sum(F.mse_loss(_wide(x), _wide(y)) for x, y in zip(hidden, targets, strict=True)) / len(hidden)


def cyclegan_loss(
    pictures: dict[str, Tensor],
    predictions: dict[str, Tensor],
    lambda_gan: float = 1.0,
    lambda_cycle: float = 10.0,
    lambda_identity: float = 5.0,
    gan_loss: str = "lsgan",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Joint loss of both generators.

    pictures:    real_A rec_A real_B rec_B, with lambda_identity > 0 also idt_A idt_B
    predictions: fake_A (by D_A) and fake_B (by D_B)
    returns:     loss_G = the weighted sum; its terms by name, unweighted
    source:      Zhu et al. 2017, eq. 3 and section 5.2 (identity)
    """
    terms = {
        "gan_AB": gan_loss_G(predictions["fake_B"], gan_loss),
        "gan_BA": gan_loss_G(predictions["fake_A"], gan_loss),
        "cycle_A": picture_loss(pictures["rec_A"], pictures["real_A"]),
        "cycle_B": picture_loss(pictures["rec_B"], pictures["real_B"]),
    }
    loss = lambda_gan * (terms["gan_AB"] + terms["gan_BA"]) + lambda_cycle * (terms["cycle_A"] + terms["cycle_B"])
    if lambda_identity > 0:
        terms["identity_A"] = picture_loss(pictures["idt_A"], pictures["real_A"])
        terms["identity_B"] = picture_loss(pictures["idt_B"], pictures["real_B"])
        loss = loss + lambda_identity * (terms["identity_A"] + terms["identity_B"])
    return loss, terms


def all_losses(
    nets: dict[str, nn.Module], real_A: Tensor, real_B: Tensor, gan_loss: str = "lsgan", **lambdas: float
) -> dict[str, Tensor]:
    """Every loss of a training step on one pair of batches, without older pictures: for watching and testing.

    nets:    G_AB G_BA D_A D_B
    lambdas: lambda_gan, lambda_cycle, lambda_identity
    returns: loss_G, loss_D_A, loss_D_B and the terms of cyclegan_loss
    """
    G_AB, G_BA, D_A, D_B = (nets[name] for name in ("G_AB", "G_BA", "D_A", "D_B"))
    fake_B, fake_A = G_AB(real_A), G_BA(real_B)
    pictures = {"real_A": real_A, "real_B": real_B, "rec_A": G_BA(fake_B), "rec_B": G_AB(fake_A)}
    pictures |= {"idt_A": G_BA(real_A), "idt_B": G_AB(real_B)}
    on_fake = {"fake_A": D_A(fake_A), "fake_B": D_B(fake_B)}
    loss, terms = cyclegan_loss(pictures, on_fake, gan_loss=gan_loss, **lambdas)
    loss_D_A = gan_loss_D(D_A(real_A), on_fake["fake_A"], gan_loss)
    loss_D_B = gan_loss_D(D_B(real_B), on_fake["fake_B"], gan_loss)
    return {"loss_G": loss, "loss_D_A": loss_D_A, "loss_D_B": loss_D_B, **terms}
