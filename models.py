"""The networks of CycleGAN and their configs; knows no loss, command line, path or device.

G = build_generator(GeneratorConfig(num_residual=9))
G = build_generator(GeneratorConfig(generator="unet_vit", vit_size="small"))
D = build_discriminator(DiscriminatorConfig(n_layers=3))
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.layers import InstanceNorm2d, ReflectionPad2d, ThinConv2d, reflection_pad

GENERATORS = ("resnet", "unet_vit")
DISCRIMINATORS = ("patch", "pixel")
NORMS = ("instance", "instance_affine", "batch", "group", "none")
UPSAMPLES = ("deconv", "resize")
INITS = ("normal", "xavier", "kaiming", "orthogonal")
GAN_LOSSES = ("lsgan", "bce", "hinge")
PARTS = ("stem", "down", "blocks", "up", "skips", "head", "D")  # what can be frozen: parts of G, or discriminators
LEGACY_DIRECTIONS = {"G_AB": "AtoB", "G_BA": "BtoA"}
CHANNELS_OF_A_GROUP = 16  # of a group norm, at least; one group where there are fewer channels
LIMITS = {  # beyond: not a network but an attack on the memory
    **{"channels": (1, 3), "ngf": (1, 4096), "num_residual": (0, 1000), "n_downsampling": (0, 4)},
    **{"ndf": (1, 4096), "n_layers": (1, 16), "max_mult": (1, 4096), "vit_blocks": (0, 1000), "vit_heads": (1, 4096)},
}
INIT_GAIN = 0.02  # standard deviation of "normal", gain of "xavier" and "orthogonal"


# ---------------------------------------------------------------------------------------------
# Domains and directions


class Direction(NamedTuple):
    """One way to translate: from a source domain to a target domain, each "A" or "B"."""

    source: str
    target: str

    def __str__(self) -> str:
        """The name on the command line and in files: "AtoB" or "BtoA"."""
        return f"{self.source}to{self.target}"

    @property
    def generator(self) -> str:
        """Name of the network that translates this way: "G_AB" or "G_BA"."""
        return f"G_{self.source}{self.target}"

    @property
    def reverse(self) -> "Direction":
        return Direction(self.target, self.source)

    @classmethod
    def named(cls, name: str) -> "Direction":
        """Return the direction that is called "AtoB" or "BtoA"."""
        return {str(direction): direction for direction in DIRECTIONS}[name]


DIRECTIONS = (Direction("A", "B"), Direction("B", "A"))


# ---------------------------------------------------------------------------------------------
# Configs: everything that is needed to build a network again, stored beside its weights


@dataclass(frozen=True)
class VitSize:
    """The numbers of a UNet-ViT that no flag changes."""

    widths: tuple[int, ...]  # channels after the stem and after each level; the last are those of a token
    ffn: int  # width of the feed-forward layers
    blocks: int
    heads: int
    full: bool  # two convolutions, each after a normalisation, in every level and block; else the leanest that works


VIT_SIZES = {
    "small": VitSize((64, 128, 256), ffn=1024, blocks=4, heads=4, full=False),
    "uvcgan": VitSize((48, 48, 96, 192, 384), ffn=1536, blocks=12, heads=6, full=True),
}


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything that shapes a generator. Defaults are those of Zhu et al. 2017, appendix 7.2, at 256 px.

    ngf, num_residual, n_downsampling and skips shape a resnet, vit_size, vit_blocks and vit_heads a unet_vit.
    """

    generator: str = "resnet"
    channels: int = 3
    ngf: int = 64
    num_residual: int = 9
    n_downsampling: int = 2
    upsample: str = "deconv"
    norm: str = "instance"
    norm_output: bool = False
    skips: bool = False
    vit_size: str = "small"
    vit_blocks: int = 4
    vit_heads: int = 4

    def __post_init__(self) -> None:
        if self.generator == "unet_vit" and self.hidden_width % self.vit_heads:
            words = f"expected a divisor of {self.hidden_width}, the width of a token"
            raise ValueError(f"vit_heads {self.vit_heads}: {words}")

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

    def tokens(self, height: int, width: int) -> int:
        """Positions that attend to each other in one image of (height, width) px; 0 for a resnet."""
        side = 2**self.halvings
        return math.ceil(height / side) * math.ceil(width / side) if self.generator == "unet_vit" else 0

    def token_bytes(self, height: int, width: int, blocks: int | None = None) -> int:
        """Memory that the blocks' states of one image take in float32, all kept as in training, or of so many blocks.

        Eight vectors of the token's width and two of the feed-forward layer's are held in each; the
        attention matrix itself is never stored (fused kernels).
        """
        size = VIT_SIZES[self.vit_size]
        vectors = 8 * size.widths[-1] + 2 * size.ffn
        return 4 * self.tokens(height, width) * vectors * (self.vit_blocks if blocks is None else blocks)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Everything that shapes a discriminator. Defaults give the 70x70 PatchGAN of Isola et al. 2017."""

    discriminator: str = "patch"
    channels: int = 3
    ndf: int = 64
    n_layers: int = 3
    max_mult: int = 8
    norm: str = "instance"
    pool: bool = False

    def map_side(self, side: int) -> int:
        """Side of the output for an image side in px; below 1 the network cannot be run."""
        return side if self.discriminator == "pixel" else side // 2**self.n_layers - 2

    def largest_n_layers(self, side: int) -> int:
        """Largest n_layers whose output is not empty for a side in px; 0 if there is none."""
        return max((n for n in range(1, 32) if side // 2**n - 2 >= 1), default=0)


# ---------------------------------------------------------------------------------------------
# Building blocks


def norm_layer(norm: str, width: int) -> nn.Module:
    """Make the normalisation layer that follows a convolution of `width` output channels.

    Instance normalisation keeps no running statistics: training and testing then compute the same. With
    "instance_affine" it learns a scale, at first 1, and a shift, at first 0, for each channel. "group" does so too, but
    about 16 channels share their statistics, so that a spike in one of them cannot make that map alone small.
    """
    if norm in ("instance", "instance_affine"):
        return InstanceNorm2d(width, affine=norm == "instance_affine")
    if norm == "group":  # Wu and He 2018, arXiv:1803.08494
        groups = max((n for n in range(1, width // CHANNELS_OF_A_GROUP + 1) if width % n == 0), default=1)
        return nn.GroupNorm(groups, width)
    return nn.BatchNorm2d(width) if norm == "batch" else nn.Identity()


def upsample_layers(upsample: str, width_in: int, width_out: int, bias: bool) -> list[nn.Module]:
    """Double height and width: the paper's transposed convolution, or nearest neighbour + convolution.

    "resize" avoids the checkerboard of a kernel that its stride does not divide
    (Odena et al. 2016, Deconvolution and Checkerboard Artifacts).
    """
    if upsample == "deconv":
        return [nn.ConvTranspose2d(width_in, width_out, 3, 2, 1, output_padding=1, bias=bias)]
    return [nn.Upsample(scale_factor=2), ReflectionPad2d(1), nn.Conv2d(width_in, width_out, 3, bias=bias)]


def normed(norm: str, width: int, *layers: nn.Module) -> nn.Sequential:
    """Layers whose last gives `width` channels, then normalisation and ReLU."""
    return nn.Sequential(*layers, norm_layer(norm, width), nn.ReLU(inplace=True))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a skip, no activation after the sum (Johnson et al. 2016)."""

    def __init__(self, width: int, norm: str):
        super().__init__()
        bias = norm != "batch"  # a batch norm brings its own shift
        first = normed(norm, width, ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=bias))
        second = [ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=bias), norm_layer(norm, width)]
        self.body = nn.Sequential(*first, *second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # (N, width, H, W)


# ---------------------------------------------------------------------------------------------
# Generators


def pad_to_halve(x: Tensor, config: GeneratorConfig) -> Tensor:
    """Extend (N, C, H, W) by reflection until H and W can be halved; ValueError below config.smallest_side."""
    height, width = x.shape[-2:]
    if min(height, width) < config.smallest_side:
        raise ValueError(f"{width}x{height} px: the generator needs at least {config.smallest_side} px a side")
    right = -width % 2**config.halvings
    below = -height % 2**config.halvings
    return reflection_pad(x, (0, right, 0, below)) if right or below else x


class ResnetGenerator(nn.Module):
    """Translate images: stem, strided convolutions, residual blocks, upsampling, head.

    With config.skips each doubled map is joined by the one of its size from before the halvings, which knows where
    edges were (Ronneberger et al. 2015, U-Net); the paper has none.

    x:       (N, channels, H, W) in [-1, 1]; H and W at least config.smallest_side, else free:
             what the downsampling does not divide is padded by reflection and cropped back
    returns: (N, channels, H, W) in [-1, 1]; with return_hidden also the list of the outputs of
             all residual blocks, each (N, ngf * 2**n_downsampling, H / 2**n, W / 2**n)
    raises:  ValueError if a side is too small
    source:  Zhu et al. 2017, arXiv:1703.10593, appendix 7.2. The paper's shorthand c7s1-3 reads
             as if the output layer were normalised; it is not (see --norm_output)
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        norm = config.norm
        width = config.ngf
        bias = norm != "batch"  # a batch norm brings its own shift
        self.stem = normed(norm, width, ReflectionPad2d(3), nn.Conv2d(config.channels, width, 7, bias=bias))
        self.down = nn.Sequential()
        self.blocks = nn.ModuleList()
        self.up = nn.Sequential()
        for _ in range(config.n_downsampling):
            conv = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=bias)
            width *= 2
            self.down.append(normed(norm, width, conv))
        self.blocks.extend(ResnetBlock(width, norm) for _ in range(config.num_residual))
        for _ in range(config.n_downsampling):
            layers = upsample_layers(config.upsample, width, width // 2, bias)
            width //= 2
            self.up.append(normed(norm, width, *layers))
        if config.skips:  # without a nonlinearity behind each, the input's colours show through whatever stands there
            widths = [config.ngf * 2**i for i in reversed(range(config.n_downsampling))]
            self.skips = nn.ModuleList(normed(norm, w, nn.Conv2d(2 * w, w, 1, bias=bias)) for w in widths)
        self.head = nn.Sequential(ReflectionPad2d(3), ThinConv2d(width, config.channels, 7))
        if config.norm_output:
            self.head.append(norm_layer(norm, config.channels))

    def forward(self, x: Tensor, return_hidden: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        height, width = x.shape[-2:]
        x = self.stem(pad_to_halve(x, self.config))  # (N, ngf, H, W)
        skipped = []
        hidden = []
        for halve in self.down:
            if self.config.skips:
                skipped.append(x)
            x = halve(x)  # (N, ngf * 2**i, H / 2**i, W / 2**i)
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        for i, double in enumerate(self.up):
            x = double(x)
            if self.config.skips:
                x = self.skips[i](torch.cat([x, skipped.pop()], dim=1))
        x = torch.tanh(self.head(x))[..., :height, :width]  # (N, channels, H, W)
        return (x, hidden) if return_hidden else x


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: (N, T, width) → (N, T, width) (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, heads, width / heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (N, heads, T, width / heads)
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
        self.waves = nn.Linear(2, width)
        self.mix = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        centres = []  # of pixels, along each side
        for n in x.shape[-2:]:
            centres.append((2 * torch.arange(n, device=x.device, dtype=self.waves.weight.dtype) + 1) / n - 1)
        grid = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)  # (H * W, 2)
        tokens = x.flatten(2).transpose(1, 2)
        waves = torch.sin(self.waves(grid))
        return self.mix(torch.cat([tokens, waves.expand(len(x), -1, -1).to(tokens.dtype)], dim=-1))


def double_conv(width_in: int, width: int, width_out: int, norm: str) -> nn.Sequential:
    """Two convolutions with a normalisation before each, as in every level of UVCGAN's U-Net."""
    first = [norm_layer(norm, width_in), nn.Conv2d(width_in, width, 3, padding=1), nn.LeakyReLU(0.2, inplace=True)]
    second = [norm_layer(norm, width), nn.Conv2d(width, width_out, 3, padding=1), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*first, *second)


class UnetVitGenerator(nn.Module):
    """Translate images: a U-Net whose lowest level is a transformer over the pixels of its map.

    x:       (N, channels, H, W) in [-1, 1]; sizes as for ResnetGenerator
    returns: (N, channels, H, W) in [-1, 1]; with return_hidden also the list of the outputs of all
             transformer blocks, each (N, config.hidden_width, H / 2**halvings, W / 2**halvings)
    raises:  ValueError if a side is too small
    source:  Torbunov et al. 2022, UVCGAN, arXiv:2203.02557; "uvcgan" has its very layers, with tanh in
             place of the sigmoid since images are in [-1, 1], and config.upsample "resize"; "small"
             is that of the 64x64 study: a CycleGAN's stem and halvings, skips, four blocks without normalisation; a
             1x1 convolution behind each skip is ours
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        size = VIT_SIZES[config.vit_size]
        widths = size.widths
        norm = config.norm
        bias = norm != "batch"
        if size.full:
            conv = nn.Conv2d(config.channels, widths[0], 3, padding=1)
            self.stem = nn.Sequential(conv, nn.LeakyReLU(0.2, inplace=True))
            head = [nn.Conv2d(widths[0], config.channels, 1)]
        else:
            conv = nn.Conv2d(config.channels, widths[0], 7, bias=bias)
            self.stem = normed(norm, widths[0], ReflectionPad2d(3), conv)
            head = [ReflectionPad2d(3), ThinConv2d(widths[0], config.channels, 7)]
        levels = [self._level(thin, wide) for thin, wide in itertools.pairwise(widths)]
        self.down = nn.ModuleList(down for down, _ in levels)
        self.position = Position(widths[-1])
        self.blocks = nn.ModuleList(VitBlock(widths[-1], size, config.vit_heads) for _ in range(config.vit_blocks))
        self.leave = nn.Linear(widths[-1], widths[-1])
        self.up = nn.ModuleList(up for _, up in reversed(levels))
        self.head = nn.Sequential(*head, *([norm_layer(norm, config.channels)] if config.norm_output else []))

    def _level(self, thin: int, wide: int) -> tuple[nn.ModuleList, nn.ModuleList]:
        """What a level does around its skip: before it is taken and after on the way down, likewise on the way up."""
        norm = self.config.norm
        upsample = self.config.upsample
        if VIT_SIZES[self.config.vit_size].full:
            down = [double_conv(thin, wide, wide, norm), nn.Conv2d(wide, wide, 2, stride=2)]
            up = [nn.Sequential(*upsample_layers(upsample, wide, wide, True)), double_conv(2 * wide, wide, thin, norm)]
        else:
            bias = norm != "batch"
            conv = nn.Conv2d(thin, wide, 3, stride=2, padding=1, bias=bias)
            down = [nn.Identity(), normed(norm, wide, conv)]
            double = normed(norm, thin, *upsample_layers(upsample, wide, thin, bias))
            # without a nonlinearity behind the skip, colours of the input show through whatever stands there
            up = [double, normed(norm, thin, nn.Conv2d(2 * thin, thin, 1, bias=bias))]
        return nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x: Tensor, return_hidden: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        height, width = x.shape[-2:]
        x = self.stem(pad_to_halve(x, self.config))
        skips = []
        hidden = []
        for body, halve in self.down:  # ty: ignore[not-iterable]
            skips.append(body(x))
            x = halve(skips[-1])
        sides = x.shape[-2:]
        tokens = self.position(x)  # (N, T, F) with T = H * W / 4**halvings
        for block in self.blocks:
            tokens = block(tokens)
            hidden.append(tokens.transpose(1, 2).unflatten(2, sides))
        x = self.leave(tokens).transpose(1, 2).unflatten(2, sides)
        for double, body in self.up:  # ty: ignore[not-iterable]
            x = body(torch.cat([double(x), skips.pop()], dim=1))
        x = torch.tanh(self.head(x))[..., :height, :width]  # (N, channels, H, W)
        return (x, hidden) if return_hidden else x


Generator = ResnetGenerator | UnetVitGenerator
Nets = dict[str, Any]  # G_AB, G_BA, D_A, D_B; Any, since a compiled network is of none of their classes


# ---------------------------------------------------------------------------------------------
# Discriminators


def patch_layers(config: DiscriminatorConfig) -> list[nn.Module]:
    """PatchGAN: strided 4x4 convolutions that see overlapping patches (Isola et al. 2017, arXiv:1611.07004)."""
    bias = config.norm != "batch"
    width = config.ndf
    layers: list[nn.Module] = [nn.Conv2d(config.channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
    for i in range(1, config.n_layers + 1):
        stride = 2 if i < config.n_layers else 1
        wider = config.ndf * min(2**i, config.max_mult)
        layers += [nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=bias)]
        layers += [norm_layer(config.norm, wider), nn.LeakyReLU(0.2, inplace=True)]
        width = wider
    return [*layers, nn.Conv2d(width, 1, 4, padding=1)]


def pixel_layers(config: DiscriminatorConfig) -> list[nn.Module]:
    """1x1 convolutions that see each pixel's colour alone ("pixelGAN" of Isola et al. 2017)."""
    bias = config.norm != "batch"
    return [
        nn.Conv2d(config.channels, config.ndf, 1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(config.ndf, 2 * config.ndf, 1, bias=bias),
        norm_layer(config.norm, 2 * config.ndf),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(2 * config.ndf, 1, 1, bias=bias),
    ]


class Discriminator(nn.Module):
    """Tell real from translated, patch by patch (16, 34, 70, 142 or 286 px for 1 to 5 n_layers) or pixel by pixel.

    x:       (N, channels, H, W) in [-1, 1]
    returns: unbounded; patches (N, 1, H / 2**n_layers - 2, W / 2**n_layers - 2), pixels (N, 1, H, W);
             with pool, the global average of the 64x64 study, (N, 1, 1, 1)
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        make_layers = {"patch": patch_layers, "pixel": pixel_layers}[config.discriminator]
        self.layers = nn.Sequential(*make_layers(config))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)  # (N, 1, h, w)
        return x.mean((2, 3), keepdim=True) if self.config.pool else x


# ---------------------------------------------------------------------------------------------
# Building


def init_weights(net: nn.Module, init: str = "normal") -> None:
    """Set every convolution by `init` and its bias to 0; batch norms to N(1, 0.02), 0.

    The linear layers of a transformer keep torch's start: N(0, 0.02) would flatten its positions.
    source: Radford et al. 2015, N(0, 0.02), is the default of the paper and of its successors
    """
    start = {
        "normal": functools.partial(nn.init.normal_, std=INIT_GAIN),
        "xavier": functools.partial(nn.init.xavier_normal_, gain=INIT_GAIN),
        "kaiming": nn.init.kaiming_normal_,
        "orthogonal": functools.partial(nn.init.orthogonal_, gain=INIT_GAIN),
    }[init]
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            start(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, INIT_GAIN)
            nn.init.zeros_(module.bias)


def build_generator(config: GeneratorConfig, init: str = "normal") -> Generator:
    """Make the generator that `config` describes, freshly initialised."""
    net = {"resnet": ResnetGenerator, "unet_vit": UnetVitGenerator}[config.generator](config)
    init_weights(net, init)
    return net


def build_discriminator(config: DiscriminatorConfig, init: str = "normal") -> Discriminator:
    """Make the discriminator that `config` describes, freshly initialised."""
    net = Discriminator(config)
    init_weights(net, init)
    return net


def meta_network(config: GeneratorConfig) -> Generator:
    """Build a generator of shapes only, on the meta device: a lying file costs no memory.

    Not by build_generator: for random numbers on that device torch imports its compiler, which takes seconds.
    """
    kind = {"resnet": ResnetGenerator, "unet_vit": UnetVitGenerator}[config.generator]
    with torch.device("meta"):
        return kind(config)
