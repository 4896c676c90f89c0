"""The command line: the parser, each shared flag once, flags → network configs, and how saved flags come back."""

import argparse
import copy
import dataclasses
import json
import math
import shlex
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import models
from toolkit.devices import total_memory
from toolkit.distributed import world_size
from utils import InputError, in_range, is_folder_name, need_package, range_in_words, say

MOST = 10**7  # of an integer option without an upper limit
MEASURES = ("losses", "cycle", "identity", "paired", "spike")  # cheap enough to be taken during training
BEST_BY = {"PSNR": "paired", "SSIM": "paired", "cycle": "cycle", "identity": "identity", "loss_G": "losses"}
LAMBDAS = ("lambda_gan", "lambda_cycle", "lambda_identity", "lambda_hidden", "lambda_output")
VIT_FLAGS = ("vit_size", "vit_blocks", "vit_heads")
RESNET_FLAGS = ("num_residual", "ngf", "n_downsampling", "skips")
FIXED_FLAGS = (  # a resumed run keeps them
    *(*VIT_FLAGS, *RESNET_FLAGS),
    *("channels", "generator", "upsample", "norm", "norm_output", "init", "freeze"),
    *("discriminator", "ndf", "n_layers_D", "max_mult_D", "pool_D"),
)
NEVER_INHERITED = frozenset({"start_from", "overwrite", "device", "run_name"})


# ---------------------------------------------------------------------------------------------
# The parser


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that remembers which options were given, and reads argument files.

    An argument file (python train.py @recipes/day2night.txt) has options as on the command line, on any number of
    lines; # begins a comment. Options after it override its own. An error is one line.
    """

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, fromfile_prefix_chars="@", **kwargs)
        self.options: dict[str, argparse.Action] = {}  # those of add_options, by name

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; all flags: python {self.prog} --help")

    def parse_args(self, argv: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # ty: ignore
        """Read the command line; args.given names the options that were given."""
        unset = object()
        args = super().parse_args(argv, argparse.Namespace(**dict.fromkeys(self.options, unset)))
        args.given = {name for name in self.options if getattr(args, name) is not unset}
        for name in self.options.keys() - args.given:
            setattr(args, name, copy.copy(self.options[name].default))
        return args


def add_options(parser: Parser, title: str, kind: type, inherited_from: str = "") -> None:
    """Make command-line options of the fields of a dataclass that were declared with utils.option.

    inherited_from: the owner of the values of options that are not given; these are None then
    """
    group = parser.add_argument_group(title)
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if "help" in field.metadata:
            name = field.metadata["flag"] or field.name
            parser.options[name] = add_option(group, f"--{name}", field, types[field.name], inherited_from)


def add_option(group: Any, flag: str, field: dataclasses.Field, hint: Any, inherited_from: str) -> argparse.Action:
    """Declare one option; its help ends with the default."""
    given = field.metadata
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    help = given["help"].replace("%", "%%")
    is_switch = hint is bool and default is False
    if inherited_from:
        help = f"{help.split(' (default')[0]} (default: {inherited_from})"
        default = None
    elif default not in (None, []) and not is_switch and "default" not in help:
        help += " (default: %(default)s)"
    if is_switch and not inherited_from:
        return group.add_argument(flag, action="store_true", help=help)
    if bool in (hint, *typing.get_args(hint)):
        return group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
    return group.add_argument(
        flag,
        type=(given["parse"] and argument_type(given["parse"])) or number_type(hint, given),
        choices=given["choices"],
        nargs=given["nargs"],
        metavar=given["metavar"],
        default=default,
        help=help,
    )


def argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse show the message of a ValueError."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def number_type(hint: Any, given: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return what turns text into a value of a field's type, within its range."""
    kinds = [kind for kind in (*typing.get_args(hint), hint) if kind in (int, float, Path, str)]
    kind = kinds[0]
    if kind in (Path, str):
        return kind
    limits = {name: given[name] for name in ("least", "most", "above")}
    if kind is int and limits["most"] is None:
        limits["most"] = MOST
    noun = "an integer" if kind is int else "a number"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if not in_range(value, **limits):
            raise ValueError(f"given {text!r}, expected {noun} {range_in_words(**limits)}".rstrip())
        return value

    return argument_type(parse)


def flag_group(parser: Parser, title: str) -> Callable:
    """Return a function that declares flags under a heading, their defaults written into the help."""
    group = parser.add_argument_group(title)

    def add(*names: str, help: str, **kwargs: Any) -> None:
        if kwargs.get("default") not in (None, []) and "default" not in help:
            help += " (default: %(default)s)"
        action = group.add_argument(*names, help=help, **kwargs)
        parser.options[action.dest] = action

    return add


def changed(args: argparse.Namespace, **values: object) -> argparse.Namespace:
    """A copy of the flags in which some have other values."""
    return argparse.Namespace(**{**vars(args), **values})


def plain_flags(args: argparse.Namespace) -> dict:
    """The flags as plain values, which a file can hold without code; paths become text."""
    return json.loads(json.dumps({name: value for name, value in vars(args).items() if name != "given"}, default=str))


# ---------------------------------------------------------------------------------------------
# Types of flags


def between(kind: Callable, noun: str, lowest: float, highest: float, above: bool = False) -> Callable:
    """Flag type: a finite number from `lowest` (not itself, with above) to `highest`."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest or value == math.inf or (above and value == lowest):
            limit = f"{'above' if above else 'of at least'} {lowest}"
            limit += f" and at most {highest}" if highest < math.inf else ""
            raise argparse.ArgumentTypeError(f"given {text!r}, expected {noun} {limit}")
        return value

    return convert


def int_between(lowest: int, highest: int = 10**7) -> Callable[[str], int]:
    """Flag type: an integer from `lowest` to `highest`."""
    return between(int, "an integer", lowest, highest)


def float_between(lowest: float, highest: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Flag type: a finite number from `lowest` (not itself, with above) to `highest`."""
    return between(float, "a number", lowest, highest, above)


def folder_name(text: str) -> str:
    """Flag type: one plain folder name, which cannot leave the folder that it is put into."""
    if not is_folder_name(text):
        raise argparse.ArgumentTypeError(f'given {text!r}, expected one folder name without / \\ : * ? " < > |')
    return text


def path_name(text: str) -> Path:
    """Flag type: a path that is not empty (an empty one would mean the current folder)."""
    if not text:
        raise argparse.ArgumentTypeError("given '', expected a path")
    return Path(text)


def words_of(choices: Collection[str]) -> Callable[[str], list[str]]:
    """Flag type: some of the choices, separated by commas."""

    def convert(text: str) -> list[str]:
        words = [word for word in text.split(",") if word]
        wrong = [word for word in words if word not in choices]
        if wrong:
            raise argparse.ArgumentTypeError(f"given {wrong[0]!r}, expected some of {','.join(choices)}")
        return words

    return convert


def epoch_name(text: str) -> str:
    """Flag type: a count of finished epochs, or one of the words latest and best."""
    return text if text in ("latest", "best") else str(int_between(0)(text))


def micro_batch(text: str) -> int | str:
    """Flag type: how many images are processed at once, or the word auto."""
    return text if text == "auto" else int_between(1)(text)


# ---------------------------------------------------------------------------------------------
# The flags that stages share, each declared once


def add_data_flags(parser: Parser) -> None:
    """Which images, how large, how they are varied."""
    add = flag_group(parser, "data")
    add("--dataset_name", type=folder_name, default="horse2zebra", help="folder in --data_root with trainA and trainB")
    add("--data_root", type=Path, default=Path("datasets"), help="folder that holds the data sets")
    add("--batch_size", type=int_between(1, 65536), default=10, help="images of each domain in a step, over all ranks")
    add("--img_height", type=int_between(4, 16384), default=256, help="height of the training images, px")
    add("--img_width", type=int_between(4, 16384), default=256, help="width of the training images, px")
    add("--channels", type=int, choices=(3, 1), default=3, help="3 colour, 1 grey")
    add("--load_scale", type=float_between(1, 8), default=1.12, help="resize to this times the size, then crop")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images")
    add("--num_workers", type=int_between(0), help="processes that read images (default: 0 on a CPU, else 4)")
    add(
        "--cache", choices=("none", "ram", "disk"), default="none", help="keep decoded images: disk: in DATA_SET/.cache"
    )
    add("--max_images", type=int_between(1), help="use only the first so many images of each domain (default: all)")
    add("--steps_per_epoch", type=int_between(1), help="steps in an epoch (default: until the larger domain was seen)")
    add_reading_flags(add)


def add_pixel_flag(add: Callable) -> None:
    """Declare --max_megapixels, which every stage that reads images has."""
    add("--max_megapixels", type=float_between(0, 10**6, above=True), default=178.0, help="more counts as unreadable")


def add_reading_flags(add: Callable) -> None:
    """What to do about images that cannot be read."""
    add_pixel_flag(add)
    add("--on_bad_image", choices=("skip", "stop"), default="skip", help="skip: up to 5 %% of a domain, each is named")


def add_network_flags(parser: Parser) -> None:
    """Shapes of the networks; they travel in every checkpoint, so that no later stage asks again."""
    add = flag_group(parser, "network")
    add("--generator", choices=models.GENERATORS, default="resnet", help="kind of generator")
    add("--num_residual", type=int_between(0, 1000), default=9, help="residual blocks of a resnet")
    add("--ngf", type=int_between(1, 4096), default=64, help="width of the first layer of a resnet")
    add("--n_downsampling", type=int, choices=range(5), default=2, help="halvings of the image in a resnet")
    add("--skips", action="store_true", help="lead what the halvings lose around the blocks of a resnet: outlines stay")
    add("--vit_size", choices=models.VIT_SIZES, default="small", help="unet_vit of the 64x64 study, or UVCGAN's")
    add("--vit_blocks", type=int_between(0, 1000), help="blocks of a unet_vit (default: 4 in small, 12 in uvcgan)")
    add("--vit_heads", type=int_between(1, 4096), help="heads of a unet_vit (default: 4 in small, 6 in uvcgan)")
    add("--upsample", choices=models.UPSAMPLES, default="deconv", help="transposed convolution, or resize and convolve")
    add("--discriminator", choices=models.DISCRIMINATORS, default="patch", help="look at patches or single pixels")
    add("--ndf", type=int_between(1, 4096), default=64, help="width of the discriminator's first layer")
    add("--n_layers_D", type=int_between(1, 16), default=3, help="strided layers of D: 1-5 see 16 34 70 142 286 px")
    add("--max_mult_D", type=int_between(1, 4096), default=8, help="D grows to at most this times --ndf")
    add("--pool_D", action="store_true", help="average the discriminator's output to one value per image")
    add("--norm", choices=models.NORMS, default="instance", help="normalisation; affine: learnt; group: in G alone")
    add("--norm_output", action="store_true", help="normalise before G's tanh: stalls learning, kept to show it")
    add("--init", choices=models.INITS, default="normal", help="how weights start")


def add_loss_flags(parser: Parser) -> None:
    """Weights and forms of the objective."""
    add = flag_group(parser, "loss")
    add("--lambda_cycle", type=float_between(0), default=10.0, help="weight of the cycle loss; 0 leaves it out")
    add("--lambda_identity", type=float_between(0), default=5.0, help="weight of the identity loss; 0 leaves it out")
    add("--lambda_gan", type=float_between(0), default=1.0, help="weight of the adversarial loss; 0: none, D rests")
    add("--gan_loss", choices=models.GAN_LOSSES, default="lsgan", help="form of the adversarial loss")
    add("--buffer_size", type=int_between(0), default=50, help="translated images kept to train the discriminators")
    add("--lambda_gp", type=float_between(0), default=0.0, help="weight of D's gradient penalty; 0: none")
    add("--gp_target", type=float_between(0), default=100.0, help="slope it aims at; UVCGAN: .1, 100; UVCGAN2: .01, 0")


def add_optim_flags(parser: Parser) -> None:
    """Adam and its schedule."""
    add = flag_group(parser, "optimiser")
    add("--num_epochs", type=int_between(1), default=200, help="epochs in all")
    add("--decay_epoch", type=int_between(0), help="from here the rate falls to 0 (default: half of --num_epochs)")
    add("--lr", type=float_between(0, above=True), default=2e-4, help="learning rate of Adam")
    add("--lr_D", type=float_between(0, above=True), help="rate of the discriminators (default: --lr; TTUR: 4 times)")
    add("--beta1", type=float_between(0, 0.999999), default=0.5, help="Adam's decay of the first moment")
    add("--beta2", type=float_between(0, 0.999999), default=0.999, help="Adam's decay of the second moment")
    add("--ema", type=float_between(0, 0.999999), default=0.0, help="decay of averaged generators, to ship; 0: none")


def add_transfer_flags(parser: Parser) -> None:
    """Starting from weights that exist."""
    add = flag_group(parser, "transfer")
    add("--init_from", type=Path, nargs="+", default=[], metavar="FILE", help="generators to start from: 1 a direction")
    parts = {"type": words_of(models.PARTS), "metavar": ",".join(models.PARTS)}
    add("--freeze", **parts, default=[], help="parts that do not learn (default: none)")


def add_run_flags(parser: Parser) -> None:
    """Names, intervals, seeds."""
    add = flag_group(parser, "run")
    add("--start_from", type=epoch_name, default="0", help="0: new; N: go on after epoch_N.pt; latest: after latest.pt")
    add("--run_name", type=folder_name, help="folder in saved_models and generated_images (default: --dataset_name)")
    add("--overwrite", action="store_true", help="delete what an earlier run left under this name")
    add("--sample_interval", type=int_between(1), default=200, help="steps between grids; more: 1st minute, epoch ends")
    add("--checkpoint_interval", type=int_between(1), default=10, help="epochs between two checkpoints that are kept")
    add("--keep_checkpoints", type=int_between(0), default=0, help="keep only the newest so many epoch_NNNN.pt; 0: all")
    add("--eval_interval", type=int_between(0), default=0, help="epochs between evaluations on val, else test; 0: none")
    kinds = {"type": words_of(MEASURES), "metavar": ",".join(MEASURES), "default": ["cycle", "identity"]}
    add("--eval_metrics", **kinds, help="what is evaluated, into measures.csv (default: cycle,identity)")
    add("--best_by", choices=tuple(BEST_BY), default=None, help="keep the epoch that evaluates best by this as best.pt")
    add("--save_minutes", type=float_between(0), default=10.0, help="minutes between two saves; 0: after each epoch")
    add("--watch", type=Path, nargs="*", default=[], metavar="PHOTO", help="photos to translate after each epoch")
    add("--log", choices=("none", "tensorboard"), default="none", help="also log into saved_models/RUN/tensorboard")
    add("--seed", type=int_between(0, 2**32 - 1), default=0, help="seed of all random choices")
    add("--deterministic", action="store_true", help="only algorithms that repeat bit for bit (a CPU does without)")


def add_device_flags(parser: Parser) -> Callable:
    """Where and how precisely to compute; returns what adds to the same heading."""
    add = flag_group(parser, "speed")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    choices = ("auto", "fp32", "bf16", "fp16")
    add("--precision", choices=choices, default="auto", help="auto: half where native, else fp32")
    return add


def add_speed_flags(parser: Parser) -> None:
    """Where and how to train."""
    add = add_device_flags(parser)
    add("--micro_batch", type=micro_batch, default="auto", help="images processed at once; auto: as many as fit")
    add("--compile", action="store_true", help="compile the networks into CUDA graphs; the first steps take minutes")


# ---------------------------------------------------------------------------------------------
# Checks that need more than one flag


def refuse_contradictions(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that speak of a new start together with --start_from."""
    for flag in ("overwrite", "init_from"):
        if flag in args.given and args.start_from != "0":
            words = f"contradicts --start_from {args.start_from}, which goes on with a run"
            parser.error(f"--{flag} {words}: give one of them")


def refuse_both(parser: Parser, args: argparse.Namespace, *pairs: tuple[str, str]) -> None:
    """Refuse pairs of flags that cannot be given together."""
    for one, other in pairs:
        if {one, other} <= args.given:
            parser.error(f"--{one} and --{other} contradict each other: give one of them")


def check_run_flags(args: argparse.Namespace) -> None:
    """Refuse flags that need another one; inherited flags are checked like typed ones."""
    if "gp_target" in args.given and not args.lambda_gp:
        raise InputError(f"--gp_target {args.gp_target:g}: has no effect without --lambda_gp; give both or none")
    if not any(getattr(args, name, 0) for name in LAMBDAS):
        words = "nothing is left to learn; give one of them a weight above 0"
        raise InputError(f"--{', --'.join(name for name in LAMBDAS if name in args)} are all 0: {words}")
    needed = BEST_BY.get(args.best_by)
    evaluated = args.eval_interval and needed in args.eval_metrics
    if needed and not evaluated and (args.eval_interval or "best_by" in args.given):
        words = f"needs --eval_interval and {needed} among --eval_metrics; give them, or leave it out"
        raise InputError(f"--best_by {args.best_by}: {words}")
    if args.best_by == "SSIM" and min(args.img_height, args.img_width) < 11:
        raise InputError("--best_by SSIM: its window needs images of 11 px a side; take --best_by PSNR")
    if args.log == "tensorboard":
        need_package("tensorboard", "--log tensorboard", "pip install tensorboard")
    if args.decay_epoch is not None and args.decay_epoch > args.num_epochs:  # the rate would never fall
        words = f"expected at most --num_epochs {args.num_epochs}; give a lower one"
        raise InputError(f"--decay_epoch {args.decay_epoch}: {words}")


def with_vit_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Fill the flags of a unet_vit that follow from --vit_size."""
    size = models.VIT_SIZES[args.vit_size]
    blocks = size.blocks if args.vit_blocks is None else args.vit_blocks
    heads = size.heads if args.vit_heads is None else args.vit_heads
    return changed(args, vit_blocks=blocks, vit_heads=heads)


def decay_epoch(args: argparse.Namespace) -> int:
    """The epoch after which the rate falls: as given, else half of all."""
    return args.num_epochs // 2 if args.decay_epoch is None else args.decay_epoch


# ---------------------------------------------------------------------------------------------
# Flags → configs


def config_of(kind: Any, args: argparse.Namespace) -> Any:
    """Fill a dataclass whose fields are named like flags."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def network_configs(args: argparse.Namespace) -> tuple[models.GeneratorConfig, models.DiscriminatorConfig]:
    """Turn the network flags into configs, checked against the size of the images."""
    try:
        generator = config_of(models.GeneratorConfig, with_vit_defaults(args))
    except ValueError as error:
        raise InputError(f"--{error}") from error
    norm = "instance" if args.norm == "group" else args.norm  # of discriminators: the blots are not theirs
    names = {"n_layers": args.n_layers_D, "max_mult": args.max_mult_D, "pool": args.pool_D, "norm": norm}
    discriminator = config_of(models.DiscriminatorConfig, changed(args, **names))
    check_sizes(args, generator, discriminator)
    return generator, discriminator


def check_sizes(
    args: argparse.Namespace, generator: models.GeneratorConfig, discriminator: models.DiscriminatorConfig
) -> None:
    """Raise InputError if the images are too small for a network, with the nearest that fits."""
    side = min(args.img_height, args.img_width)
    given = f"images of {args.img_width}x{args.img_height} px"
    if side < generator.smallest_side:
        words = f"{generator.halvings} downsamplings need at least {generator.smallest_side} px a side"
        raise InputError(f"{given}: {words}; raise --img_height and --img_width, or lower --n_downsampling")
    if discriminator.map_side(side) < 1:
        most = discriminator.largest_n_layers(side)
        remedy = f"the largest --n_layers_D that fits is {most}" if most else "take --discriminator pixel"
        raise InputError(f"--n_layers_D {discriminator.n_layers}: its output for {given} would be empty; {remedy}")


def check_memory(args: argparse.Namespace, generator: models.GeneratorConfig, device: torch.device) -> None:
    """Raise InputError if the tokens of a unet_vit cannot be held, before anything starts."""
    height = args.img_height
    width = args.img_width
    tokens = generator.tokens(height, width)
    own = args.batch_size // world_size()
    if args.micro_batch != "auto":
        own = min(own, args.micro_batch)
    elif device.type == "cuda":
        own = 1  # as far as an out-of-memory lets the micro-batch shrink; a CPU cannot catch one
    wanted = 6 * own * generator.token_bytes(height, width)  # six images of each pair pass a generator in a step
    free = total_memory(device)
    if tokens and wanted > free:
        words = f"take about {wanted / 2**30:.0f} GiB in a step, and {device} has {free / 2**30:.0f}"
        remedy = "lower --img_height and --img_width, or --batch_size, or take --vit_size uvcgan (16 times fewer)"
        raise InputError(f"--generator unet_vit: {tokens:,} tokens an image at {width}x{height} px {words}; {remedy}")


# ---------------------------------------------------------------------------------------------
# How saved flags come back


def check_saved(action: argparse.Action, value: Any, what: object) -> object:
    """Turn the saved value of a flag into what typing it would give.

    raises: InputError if it would be refused on the command line
    """
    complaint = f"{what}: says --{action.dest} {str(value)[:60]}"
    if value is None and action.default is not None:
        raise InputError(f"{complaint}; written by another program, or edited")
    if value is None:
        return value
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise InputError(f"{complaint}, expected true or false")
        return value
    convert: Any = action.type or str
    try:
        if action.nargs in ("*", "+"):
            if not isinstance(value, list | tuple):
                raise TypeError("expected a list")
            return [convert(str(v)) for v in value]
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        converted = convert(text)
    except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
        raise InputError(f"{complaint}: {error}") from None
    if action.choices is not None and converted not in action.choices:
        raise InputError(f"{complaint}, expected {', '.join(map(str, action.choices))}")
    return converted


def saved_flags(parser: Parser, saved: object, what: object, skip: Collection[str] = ()) -> dict[str, object]:
    """Read the flags of a checkpoint as if they had been typed, so that each is checked again.

    raises: InputError if there are none, or one would be refused on the command line
    """
    if not isinstance(saved, dict) or not saved:
        raise InputError(f"{what}: does not say its flags; written by another version, or no checkpoint")
    values: dict[str, Any] = {}
    for name, action in parser.options.items():
        if name not in skip:
            values[name] = check_saved(action, saved[name], what) if name in saved else copy.copy(action.default)
    newer = [f"--{name}" for name in values if name not in saved]
    if newer:
        say(f"{what}: older than {', '.join(newer)}; these have their defaults")
    num_epochs = values.get("num_epochs")  # a distillation may leave it to its teacher
    if num_epochs is not None and values.get("decay_epoch") == num_epochs // 2:
        values["decay_epoch"] = None  # where it would be if it had not been given: it follows num_epochs
    return values


def resume_flags(
    parser: Parser, args: argparse.Namespace, saved: object, path: Path, fixed: Collection[str] = FIXED_FLAGS
) -> argparse.Namespace:
    """Take the flags that were not given from the checkpoint; refuse other networks, say other changes."""
    old = saved_flags(parser, saved, path, NEVER_INHERITED)
    before = plain_flags(argparse.Namespace(**old))
    now = plain_flags(args)
    for name in sorted(args.given - NEVER_INHERITED):
        if before[name] == now[name]:
            continue
        if name in fixed:
            words = f"the run in {path.parent} was started with {before[name]}"
            raise InputError(f"--{name} {now[name]}: {words}; leave the flag out, or take another --run_name")
        say(f"changed on resume: --{name} {before[name]} → {now[name]}")
    resumed = changed(args, **{name: value for name, value in old.items() if name not in args.given})
    if before["num_epochs"] != resumed.num_epochs:
        say(f"the learning rate falls from epoch {decay_epoch(resumed)} to 0 at {resumed.num_epochs}")
    return resumed
