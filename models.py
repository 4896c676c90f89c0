"""The networks of CycleGAN, their configs and their initial weights.

G = build_generator(GeneratorConfig(num_residual=9))
G = build_generator(GeneratorConfig(generator="unet_vit", vit_size="small"))
D = build_discriminator(DiscriminatorConfig(n_layers=3))
"""

import functools
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.layers import Conv3x3, InstanceNorm2d, ReflectionPad2d, ThinConv2d, reflection_pad
from utils import InputError, check_options, option

NORMS = ("instance", "instance_affine", "batch", "group", "none")
INITS = ("normal", "xavier", "kaiming", "orthogonal")
PADDINGS = {"reflect": ReflectionPad2d, "zeros": nn.ZeroPad2d, "replicate": nn.ReplicationPad2d}
GENERATOR_PARTS = ("stem", "down", "blocks", "up", "skips", "head")  # that can be frozen
INIT_GAIN = 0.02  # standard deviation of "normal", gain of "xavier" and "orthogonal"


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


# -- Configs: everything that is needed to rebuild a network. They are saved beside its weights ----
@dataclass(frozen=True)
class VitSize:
    """The sizes of a UNet-ViT that have no option of their own."""

    widths: tuple[int, ...]  # channels after the stem and after each downsampling; the last is the width of a token
    ffn: int  # width of the feed-forward layers
    blocks: int
    heads: int
    uvcgan_layers: bool  #  two convolutions with normalisation at each resolution, and layer norms in each block


VIT_SIZES = {
    "small": VitSize((64, 128, 256), ffn=1024, blocks=4, heads=4, uvcgan_layers=False),
    "uvcgan": VitSize((48, 48, 96, 192, 384), ffn=1536, blocks=12, heads=6, uvcgan_layers=True),
}
VIT_SIZES["uvcgan_v0"] = VIT_SIZES["uvcgan"]  # other layers of those sizes, which "uvcgan" once was; in old files alone


@dataclass(frozen=True)
class GeneratorConfig:
    """The shape of a generator. The defaults are those of Zhu et al. 2017, appendix 7.2, at 256 px.

    raises: ValueError for a value out of its range
    """

    generator: str = option("resnet", "architecture of the generators", choices=("resnet", "unet_vit"))
    channels: int = field(default=3, metadata={"least": 1, "most": 16})  # the option is DataConfig's
    ngf: int = option(64, "channels of the first layer of a resnet", least=1, most=4096)
    num_residual: int = option(9, "residual blocks of a resnet", least=0, most=1000)
    n_downsampling: int = option(2, "downsampling layers of a resnet, and as many upsampling ones", least=0, most=4)
    upsample: str = option("deconv", "transposed convolution, or resize + convolution", choices=("deconv", "resize"))
    # of a file of another project, after "resize"; no options, since they make no difference to training
    resize_padding: str = field(default="reflect", metadata={"choices": tuple(PADDINGS)})
    resize_mode: str = field(default="nearest", metadata={"choices": ("nearest", "bilinear")})
    norm: str = option("instance", "normalisation (affine: learned scale; group: generators only)", choices=NORMS)
    norm_output: bool = False  # also before the tanh; no option, since training then stalls (docs/questions.md)
    skips: bool = option(False, "U-Net skip connections around the blocks of a resnet, which preserve edges")
    rotated: bool = False  # a resnet works on images turned by 180°, as one of Keras does (toolkit/keras.py)
    vit_size: str = option(
        "small", "unet_vit of the 64x64 study, or of UVCGAN", choices=("small", "uvcgan"), saved=("uvcgan_v0",)
    )
    vit_blocks: int = option(None, "blocks of a unet_vit (default: small 4, uvcgan 12)", least=0, most=1000)
    vit_heads: int = option(None, "attention heads of a unet_vit (default: small 4, uvcgan 6)", least=1, most=4096)

    def __post_init__(self) -> None:
        if self.vit_size in VIT_SIZES:
            size = VIT_SIZES[self.vit_size]
            for name, default in (("vit_blocks", size.blocks), ("vit_heads", size.heads)):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, default)
        check_options(self)
        if self.is_published_uvcgan:
            object.__setattr__(self, "upsample", "resize")
        if self.generator == "unet_vit" and self.rotated:
            raise ValueError("rotated True: expected False for a unet_vit")
        if self.generator == "unet_vit" and self.hidden_width % self.vit_heads:
            raise ValueError(f"vit_heads {self.vit_heads}: expected a divisor of {self.hidden_width}")

    @classmethod
    def saved(cls, values: Mapping[str, Any], tensors: Collection[str]) -> "GeneratorConfig":
        """Return the config of a file that has these values beside tensors of these names; errors: as of the class."""
        config = cls(**values)
        if config.is_published_uvcgan and "stem.0.weight" in tensors:  # the published layers have "stem.1.weight"
            older: dict[str, Any] = {**values, "vit_size": "uvcgan_v0"}
            config = cls(**older)
        return config

    @property
    def is_published_uvcgan(self) -> bool:
        """Whether this is the network of UVCGAN, layer by layer."""
        return self.generator == "unet_vit" and self.vit_size == "uvcgan"

    @property
    def downsamplings(self) -> int:
        """Number of layers that halve height and width."""
        return self.n_downsampling if self.generator == "resnet" else len(VIT_SIZES[self.vit_size].widths) - 1

    @property
    def blocks(self) -> int:
        """Number of blocks at the lowest resolution; a student has fewer than its teacher."""
        return self.num_residual if self.generator == "resnet" else self.vit_blocks

    @property
    def hidden_width(self) -> int:
        """Channels of the hidden states between the blocks."""
        resnet = self.generator == "resnet"
        return self.ngf * 2**self.n_downsampling if resnet else VIT_SIZES[self.vit_size].widths[-1]

    @property
    def smallest_side(self) -> int:
        """Smallest height and width in px: reflection padding needs a map larger than its pad."""
        return max(4, 2 ** (self.downsamplings + 1))


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The shape of a discriminator. The defaults give the 70x70 PatchGAN of Isola et al. 2017.

    raises: ValueError for a value out of its range
    """

    discriminator: str = option("patch", "judge overlapping patches, or single pixels", choices=("patch", "pixel"))
    channels: int = field(default=3, metadata={"least": 1, "most": 16})  # the option is DataConfig's
    ndf: int = option(64, "channels of the discriminators' first layer", least=1, most=4096)
    n_layers: int = option(3, "strided layers: 1-5 see 16 34 70 142 286 px", least=1, most=16, flag="n_layers_D")
    max_mult: int = option(8, "channels grow up to this times --ndf", least=1, most=4096, flag="max_mult_D")
    norm: str = field(default="instance", metadata={"choices": NORMS})  # the option is GeneratorConfig's
    pool: bool = option(False, "average the discriminators' output to one value per image", flag="pool_D")

    def __post_init__(self) -> None:
        check_options(self)
        if self.norm == "group":  # group norm prevents blobs, which only generators produce
            object.__setattr__(self, "norm", "instance")

    def map_side(self, side: int) -> int:
        """Return the side of the output for an image side in px; below 1 the network cannot be run."""
        return side if self.discriminator == "pixel" else side // 2**self.n_layers - 2

    def largest_n_layers(self, side: int) -> int:
        """Return the largest n_layers whose output is not empty for a side in px; 0 if there is none."""
        return max((n for n in range(1, 32) if side // 2**n - 2 >= 1), default=0)


# -- Building blocks -------------------------------------------------------------------------------
def norm_layer(norm: str, width: int) -> nn.Module:
    """Make the normalisation layer that follows a convolution with `width` output channels.

    instance:        no running statistics, so training and testing compute the same
    instance_affine: the same with a learned scale and shift for each channel
    group:           groups of about 16 channels share their statistics, so a spike in one channel cannot suppress the
                     rest of its map; with scale and shift (Wu and He 2018, arXiv:1803.08494)
    """
    if norm in ("instance", "instance_affine"):
        return InstanceNorm2d(width, affine=norm == "instance_affine")
    if norm == "group":
        groups = max((n for n in range(1, width // 16 + 1) if width % n == 0), default=1)
        return nn.GroupNorm(groups, width)
    return nn.BatchNorm2d(width) if norm == "batch" else nn.Identity()


def upsample_layers(config: GeneratorConfig, width_in: int, width_out: int, bias: bool) -> list[nn.Module]:
    """Double height and width by the paper's transposed convolution, or by nearest neighbour + convolution.

    "resize" avoids checkerboard artefacts, which a kernel size that the stride does not divide can cause
    (Odena et al. 2016, Deconvolution and Checkerboard Artifacts).
    """
    if config.upsample == "deconv":
        return [nn.ConvTranspose2d(width_in, width_out, 3, 2, 1, output_padding=1, bias=bias)]
    resize = nn.Upsample(scale_factor=2, mode=config.resize_mode)
    return [resize, PADDINGS[config.resize_padding](1), Conv3x3(width_in, width_out, bias)]


def with_norm(norm: str, width: int, *layers: nn.Module) -> nn.Sequential:
    """Add normalisation and ReLU to layers that end in `width` channels."""
    return nn.Sequential(*layers, norm_layer(norm, width), nn.ReLU(inplace=True))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection, no activation after the sum (Johnson et al. 2016)."""

    def __init__(self, width: int, norm: str):
        super().__init__()
        bias = norm != "batch"  # a batch norm has its own shift
        first = with_norm(norm, width, ReflectionPad2d(1), Conv3x3(width, width, bias=bias))
        second = [ReflectionPad2d(1), Conv3x3(width, width, bias=bias), norm_layer(norm, width)]
        self.body = nn.Sequential(*first, *second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # (N, width, H, W)


# -- Generators ------------------------------------------------------------------------------------
def pad_to_multiple(x: Tensor, config: GeneratorConfig) -> Tensor:
    """Extend (N, C, H, W) by reflection until the downsampling divides H and W.

    raises: ValueError below config.smallest_side
    """
    height, width = x.shape[-2:]
    if min(height, width) < config.smallest_side:
        raise ValueError(f"{width}x{height} px: the generator needs at least {config.smallest_side} px a side")
    right = -width % 2**config.downsamplings
    below = -height % 2**config.downsamplings
    return reflection_pad(x, (0, right, 0, below)) if right or below else x


class ResnetGenerator(nn.Module):
    """Translate images: stem, strided convolutions, residual blocks, upsampling, head.

    With config.skips each upsampled map is concatenated with the map of its size from before the downsampling, as in a
    U-Net (Ronneberger et al. 2015); the paper has no such connections.

    x:       (N, channels, H, W) in [-1, 1]; H and W at least config.smallest_side, else free:
             what the downsampling does not divide is padded by reflection and cropped back
    returns: (N, channels, H, W) in [-1, 1]; with return_hidden also the list of the outputs of
             all residual blocks, each (N, ngf * 2**n_downsampling, H / 2**n, W / 2**n)
    raises:  ValueError if a side is too small
    source:  Zhu et al. 2017, arXiv:1703.10593, appendix 7.2. The paper's shorthand c7s1-3 reads
             as if the output layer were normalised; it is not (docs/questions.md)
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        norm = config.norm
        width = config.ngf
        bias = norm != "batch"  # a batch norm has its own shift
        self.stem = with_norm(norm, width, ReflectionPad2d(3), nn.Conv2d(config.channels, width, 7, bias=bias))
        self.down = nn.Sequential()
        self.blocks = nn.ModuleList()
        self.up = nn.Sequential()
        for _ in range(config.n_downsampling):
            conv = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=bias)
            width *= 2
            self.down.append(with_norm(norm, width, conv))
        self.blocks.extend(ResnetBlock(width, norm) for _ in range(config.num_residual))
        for _ in range(config.n_downsampling):
            layers = upsample_layers(config, width, width // 2, bias)
            width //= 2
            self.up.append(with_norm(norm, width, *layers))
        if config.skips:  # without a nonlinearity after each, the input's colours show through
            widths = [config.ngf * 2**i for i in reversed(range(config.n_downsampling))]
            self.skips = nn.ModuleList(with_norm(norm, w, nn.Conv2d(2 * w, w, 1, bias=bias)) for w in widths)
        self.head = nn.Sequential(ReflectionPad2d(3), ThinConv2d(width, config.channels, 7))
        if config.norm_output:
            self.head.append(norm_layer(norm, config.channels))

    def forward(self, x: Tensor, return_hidden: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.config)
        x = self.stem(x.flip(2, 3) if self.config.rotated else x)  # (N, ngf, H, W)
        skipped = []
        hidden = []
        for downsample in self.down:
            if self.config.skips:
                skipped.append(x)
            x = downsample(x)  # (N, ngf * 2**i, H / 2**i, W / 2**i)
        for block in self.blocks:
            x = block(x)
            if return_hidden:
                hidden.append(x)
        for i, upsample in enumerate(self.up):
            x = upsample(x)  # (N, ngf * 2**(n - 1 - i), 2 * H', 2 * W')
            if self.config.skips:
                x = self.skips[i](torch.cat([x, skipped.pop()], dim=1))
        x = torch.tanh(self.head(x))
        if self.config.rotated:
            x = x.flip(2, 3)
            hidden = [state.flip(2, 3) for state in hidden]
        x = x[..., :height, :width]  # (N, channels, H, W)
        return (x, hidden) if return_hidden else x


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: (N, T, width) → (N, T, width) (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, heads, width / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, width / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))  # (N, T, width)


class VitBlock(nn.Module):
    """Attention and a feed-forward layer, each with a residual connection and a learned scale that starts at 0.

    source: Dosovitskiy et al. 2020 (the block); Bachlechner et al. 2020, ReZero (the scale)
    """

    def __init__(self, width: int, size: VitSize, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) if size.uvcgan_layers else nn.Identity() for _ in range(2))
        self.attention = Attention(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, size.ffn), nn.GELU(), nn.Linear(size.ffn, width))
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.attention(self.norms[0](x))  # (N, T, width)
        return x + self.scale * self.ffn(self.norms[1](x))


class Position(nn.Module):
    """Add a position to each token, computed from coordinates in [-1, 1], so that any image size works.

    x: (N, width, H, W) → tokens (N, H * W, width); source: Torbunov et al. 2022, UVCGAN, section 3.1

    end_to_end: -1 and 1 are the centres of the outermost pixels, as in UVCGAN; else the edges of the map
    """

    def __init__(self, width: int, end_to_end: bool = False):
        super().__init__()
        self.end_to_end = end_to_end
        self.waves = nn.Linear(2, width)
        self.mix = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        centres = []  # of pixels, along each side
        for n in x.shape[-2:]:
            steps = 2 * torch.arange(n, device=x.device, dtype=self.waves.weight.dtype)
            centres.append(steps / (n - 1) - 1 if self.end_to_end else (steps + 1) / n - 1)
        grid = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)  # (H * W, 2)
        tokens = x.flatten(2).transpose(1, 2)
        waves = torch.sin(self.waves(grid)).expand(x.shape[0], -1, -1)  # len(x) would be a constant in an export
        return self.mix(torch.cat([tokens, waves.to(tokens.dtype)], dim=-1))


def double_conv(width_in: int, width: int, width_out: int, norm: str, slope: float) -> nn.Sequential:
    """Two convolutions with normalisation before each, as at every resolution of UVCGAN's U-Net; slope: of their ReLUs."""
    first = [norm_layer(norm, width_in), nn.Conv2d(width_in, width, 3, padding=1), nn.LeakyReLU(slope, inplace=True)]
    second = [norm_layer(norm, width), nn.Conv2d(width, width_out, 3, padding=1), nn.LeakyReLU(slope, inplace=True)]
    return nn.Sequential(*first, *second)


class UnetVitGenerator(nn.Module):
    """Translate images: a U-Net with a transformer over the pixels of its smallest map.

    x:       (N, channels, H, W) in [-1, 1]; sizes as for ResnetGenerator
    returns: (N, channels, H, W) in [-1, 1]; with return_hidden also the list of the outputs of all
             transformer blocks, each (N, config.hidden_width, H / 2**n, W / 2**n), n = config.downsamplings
    raises:  ValueError if a side is too small
    source:  Torbunov et al. 2022, UVCGAN, arXiv:2203.02557. "uvcgan" is the published network, for images in [-1, 1]: what
             it pads with 0, black, is -1 in the stem, and its sigmoid a tanh (toolkit/uvcgan.py). "small" is that of a
             study at 64x64 px: CycleGAN's stem and downsampling, skip connections, four blocks without normalisation;
             the 1x1 convolution after each skip connection is ours
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        size = VIT_SIZES[config.vit_size]
        widths = size.widths
        norm = config.norm
        bias = norm != "batch"
        if config.is_published_uvcgan:
            conv = nn.Conv2d(config.channels, widths[0], 3)
            self.stem = nn.Sequential(nn.ConstantPad2d(1, -1.0), conv, nn.LeakyReLU(0.01, inplace=True))
            head = [nn.Conv2d(widths[0], config.channels, 1)]
        elif size.uvcgan_layers:
            conv = nn.Conv2d(config.channels, widths[0], 3, padding=1)
            self.stem = nn.Sequential(conv, nn.LeakyReLU(0.2, inplace=True))
            head = [nn.Conv2d(widths[0], config.channels, 1)]
        else:
            conv = nn.Conv2d(config.channels, widths[0], 7, bias=bias)
            self.stem = with_norm(norm, widths[0], ReflectionPad2d(3), conv)
            head = [ReflectionPad2d(3), ThinConv2d(widths[0], config.channels, 7)]
        levels = [self._level(thin, wide) for thin, wide in itertools.pairwise(widths)]
        self.down = nn.ModuleList(down for down, _ in levels)
        self.position = Position(widths[-1], end_to_end=config.is_published_uvcgan)
        self.blocks = nn.ModuleList(VitBlock(widths[-1], size, config.vit_heads) for _ in range(config.vit_blocks))
        self.leave = nn.Linear(widths[-1], widths[-1])
        self.up = nn.ModuleList(up for _, up in reversed(levels))
        self.head = nn.Sequential(*head, *([norm_layer(norm, config.channels)] if config.norm_output else []))

    def _level(self, thin: int, wide: int) -> tuple[nn.ModuleList, nn.ModuleList]:
        """Make the layers of one resolution: before and after its skip connection, downwards and upwards."""
        norm = self.config.norm
        if VIT_SIZES[self.config.vit_size].uvcgan_layers:
            published = self.config.is_published_uvcgan
            slope = 0.01 if published else 0.2
            layers = upsample_layers(self.config, wide, wide, True)
            if published:
                layers = [nn.Upsample(scale_factor=2), nn.Conv2d(wide, wide, 3, padding=1)]
            down = [double_conv(thin, wide, wide, norm, slope), nn.Conv2d(wide, wide, 2, stride=2)]
            up = [nn.Sequential(*layers), double_conv(2 * wide, wide, thin, norm, slope)]
        else:
            bias = norm != "batch"
            conv = nn.Conv2d(thin, wide, 3, stride=2, padding=1, bias=bias)
            down = [nn.Identity(), with_norm(norm, wide, conv)]
            upsample_to_thin = with_norm(norm, thin, *upsample_layers(self.config, wide, thin, bias))
            # without a nonlinearity after the skip connection, the input's colours show through
            up = [upsample_to_thin, with_norm(norm, thin, nn.Conv2d(2 * thin, thin, 1, bias=bias))]
        return nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x: Tensor, return_hidden: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        height, width = x.shape[-2:]
        x = self.stem(pad_to_multiple(x, self.config))
        skips = []
        hidden = []
        for body, downsample in self.down:  # ty: ignore[not-iterable]
            skips.append(body(x))  # (N, widths[i], H / 2**i, W / 2**i)
            x = downsample(skips[-1])
        sides = x.shape[-2:]
        tokens = self.position(x)  # (N, T, width) with T = H * W / 4**n
        for block in self.blocks:
            tokens = block(tokens)
            if return_hidden:
                hidden.append(tokens.transpose(1, 2).unflatten(2, sides))
        x = self.leave(tokens).transpose(1, 2).unflatten(2, sides)
        for upsample, body in self.up:  # ty: ignore[not-iterable]
            x = body(torch.cat([upsample(x), skips.pop()], dim=1))  # (N, widths[i], H / 2**i, W / 2**i)
        x = torch.tanh(self.head(x))[..., :height, :width]  # (N, channels, H, W)
        return (x, hidden) if return_hidden else x


Generator = ResnetGenerator | UnetVitGenerator
Networks = dict[str, Any]  # by name: G_AB, G_BA, D_A, D_B; Any, since a compiled network has another class


# -- Discriminators --------------------------------------------------------------------------------
def patch_layers(config: DiscriminatorConfig) -> list[nn.Module]:
    """PatchGAN: strided 4x4 convolutions over overlapping patches (Isola et al. 2017, arXiv:1611.07004)."""
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
    """1x1 convolutions, which judge the colour of each pixel alone (PixelGAN, Isola et al. 2017)."""
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
    """Tell real images from translated ones, by patches (16, 34, 70, 142, 286 px for n_layers 1 to 5) or by pixels.

    x:       (N, channels, H, W) in [-1, 1]
    returns: unbounded; patches (N, 1, H / 2**n_layers - 2, W / 2**n_layers - 2), pixels (N, 1, H, W);
             with pool the average of them, (N, 1, 1, 1)
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        make_layers = {"patch": patch_layers, "pixel": pixel_layers}[config.discriminator]
        self.layers = nn.Sequential(*make_layers(config))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)  # (N, 1, h, w)
        return x.mean((2, 3), keepdim=True) if self.config.pool else x


# -- Building --------------------------------------------------------------------------------------
def init_weights(net: nn.Module, init: str = "normal") -> None:
    """Initialise the weights of every convolution by `init`, biases to 0, batch norms to N(1, 0.02).

    The linear layers of a transformer keep torch's initialisation: N(0, 0.02) would flatten its positions.
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


def build_generator(config: GeneratorConfig, init: str | None = "normal") -> Generator:
    """Build the generator that a config describes; init None: with torch's initialisation, since its weights are replaced."""
    net = {"resnet": ResnetGenerator, "unet_vit": UnetVitGenerator}[config.generator](config)
    if init:
        init_weights(net, init)
    return net


def build_discriminator(config: DiscriminatorConfig, init: str = "normal") -> Discriminator:
    """Build the discriminator that a config describes, newly initialised."""
    net = Discriminator(config)
    init_weights(net, init)
    return net


def freeze(networks: Networks, parts: Collection[str]) -> None:
    """Stop the named parts of all generators ("D": the discriminators) from learning; the others learn.

    The running statistics of a frozen batch norm do not change either.
    """
    for name, net in networks.items():
        children = {"D": net} if name.startswith("D") else dict(net.named_children())
        for part, module in children.items():
            module.requires_grad_(part not in parts)
            module.train(part not in parts)


def check_image_size(
    generator: GeneratorConfig,
    discriminator: DiscriminatorConfig,
    height: int,
    width: int,
    discriminator_is_fixed: bool = False,
) -> None:
    """Raise InputError if images of (height, width) px are too small for a network, with the option that would fit."""
    side = min(height, width)
    given = f"images of {width}x{height} px"
    if side < generator.smallest_side:
        raise InputError(f"{given}: the generator needs {generator.smallest_side} px; raise --img_height, --img_width")
    if discriminator.map_side(side) < 1 and discriminator_is_fixed:
        least = 3 * 2**discriminator.n_layers  # for a map_side of 1
        raise InputError(f"{given}: the discriminators need {least} px; raise --img_height, --img_width")
    if discriminator.map_side(side) < 1:
        most = discriminator.largest_n_layers(side)
        remedy = f"the largest --n_layers_D that fits is {most}" if most else "take --discriminator pixel"
        raise InputError(f"--n_layers_D {discriminator.n_layers}: its output for {given} would be empty; {remedy}")


def meta_network(config: GeneratorConfig) -> Generator:
    """Build a generator without memory for its weights, on the meta device.

    Its weights are not initialised: for random numbers on that device torch imports its compiler, which takes seconds.
    """
    with torch.device("meta"):
        return build_generator(config, init=None)
