"""The flags of other projects and what they are here: for whoever types them, and for docs/coming_from.md.

python -m toolkit.foreign_flags   prints the tables of that page
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import NamedTuple

Values = Mapping[str, str]  # of flags of the other project, by name without dashes; "" without a value


class Row(NamedTuple):
    """Flags of another project that belong together."""

    there: str  # flags and examples, as Markdown
    here: str  # ours, as Markdown
    # our flags: for each of theirs a text with {} for its value, or a function of all their values
    translated: dict[str, str] | Callable[[Values], str]
    flags: tuple[str, ...] = ()  # theirs, if `translated` is a function

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.translated) if isinstance(self.translated, dict) else self.flags

    def answer(self, given: Values) -> str:
        """Return our flags for those of a command line."""
        if not isinstance(self.translated, dict):
            return self.translated(given)
        parts = [text.format(given[name]) for name, text in self.translated.items() if name in given]
        return " ".join(dict.fromkeys(parts))


def _data(given: Values) -> str:
    path = PurePath(given.get("dataroot", ""))
    data = f"--dataset_name {path.name} --data_root {path.parent}" if path.name else ""
    run = f"--run_name {given['name']}" if "name" in given else ""
    return f"{data} {run}".strip()


def _epochs(given: Values) -> str:
    constant = _number(given.get("n_epochs", "100"))
    decaying = _number(given.get("n_epochs_decay", "100"))
    if constant is None or decaying is None:
        return "--num_epochs, the sum of both, and --decay_epoch, the first"
    total = f"--num_epochs {constant + decaying} --decay_epoch {constant}"
    if "n_epochs_decay" in given:
        return total
    return f"--num_epochs {constant} if it comes from PyTorch-GAN, else {total}"


def _sizes(given: Values) -> str:
    load = _number(given.get("load_size", "286"))
    crop = _number(given.get("crop_size", "256"))
    scale = f"{load / crop:.4g}" if load and crop else "LOAD/CROP"
    return f"--load_scale {scale} --img_height {crop or 'CROP'} --img_width {crop or 'CROP'}"


def _resumed(given: Values) -> str:
    epoch = _number(given.get("epoch_count", ""))
    return f"--start_from {epoch - 1}" if epoch else "--start_from latest"


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 8 else None


def _choice(**ours: str) -> Callable[[Values], str]:
    """Translate the value of a single flag; "other" is what all further values become."""
    return lambda given: ours.get("".join(given.values()), ours["other"])


def _generator(given: Values) -> str:
    blocks = given["netG"].removeprefix("resnet_").removesuffix("blocks")
    return f"--num_residual {blocks}" if blocks.isdecimal() else "--num_residual N (resnet) or --generator unet_vit"


def _device(given: Values) -> str:
    first = given["gpu_ids"].split(",")[0]
    return "--device cpu" if first == "-1" else f"--device cuda:{first}" if first.isdecimal() else "--device cuda"


NOT_NEEDED = "not needed: leave it out"
JUNYANZ = (
    Row(
        "`--dataroot ./datasets/maps --name maps`",
        "`--dataset_name maps` (`--data_root datasets`), `--run_name` if it differs",
        _data,
        ("dataroot", "name"),
    ),
    Row(
        "`--n_epochs 100 --n_epochs_decay 100`",
        "`--num_epochs 200 --decay_epoch 100` (the defaults)",
        _epochs,
        ("n_epochs", "n_epochs_decay"),
    ),
    Row("`--batch_size 1`", "`--batch_size 1` (the default is 10)", {}),
    Row(
        "`--load_size 286 --crop_size 256`",
        "`--load_scale 1.12 --img_height 256 --img_width 256`; any shape, not only squares",
        _sizes,
        ("load_size", "crop_size"),
    ),
    Row(
        "`--preprocess resize_and_crop`, `crop`, `scale_width_and_crop`",
        "[the same](images.md#shapes); images smaller than the crop are enlarged, not stretched",
        {},
    ),
    Row(
        "`--preprocess none`, `scale_width`",
        "[the same](images.md#shapes), with `--batch_size 1`; `scale_width` uses `--img_width`, as there `--load_size`",
        {},
    ),
    Row(
        "`--no_flip`",
        "`--no-flip`; also `--flip_vertical` and `--rotate90`, for images without an upside",
        {"no_flip": "--no-flip"},
    ),
    Row("`--netG resnet_9blocks --ngf 64`", "`--num_residual 9 --ngf 64`; any number of blocks", _generator, ("netG",)),
    Row(
        "`--netD n_layers --n_layers_D 2`, `--netD pixel`",
        "`--n_layers_D 2`, `--discriminator pixel`",
        _choice(pixel="--discriminator pixel", n_layers="--n_layers_D N alone", basic=NOT_NEEDED, other=NOT_NEEDED),
        ("netD",),
    ),
    Row(
        "`--norm instance`, `--init_type normal`",
        "`--norm instance`, `--init normal`; with `affine=True` in the code `--norm instance_affine`",
        {"init_type": "--init {}"},
    ),
    Row(
        "`--lambda_A 10 --lambda_B 10`",
        "`--lambda_cycle 10`",
        {"lambda_A": "--lambda_cycle {}", "lambda_B": "--lambda_cycle {}"},
    ),
    Row("`--lambda_identity 0.5` (times lambda_A)", "`--lambda_identity 5` (by itself)", {}),
    Row(
        "`--gan_mode lsgan`, `vanilla`",
        "`--gan_loss lsgan`, `bce`",
        _choice(lsgan="--gan_loss lsgan", vanilla="--gan_loss bce", other="--gan_loss lsgan or bce"),
        ("gan_mode",),
    ),
    Row("`--pool_size 50`", "`--buffer_size 50`", {"pool_size": "--buffer_size {}"}),
    Row(
        "`--continue_train --epoch_count 31`",
        "`--start_from latest`, or `--start_from 30`; no other flag has to be repeated",
        _resumed,
        ("continue_train", "epoch_count"),
    ),
    Row("`--input_nc 1 --output_nc 1`", "`--channels 1`", {"input_nc": "--channels {}", "output_nc": "--channels {}"}),
    Row(
        "`--direction BtoA` (in training: swaps the domains)",
        "no counterpart in training; in testing `--direction BtoA`",
        {"direction": "no counterpart in training, which learns both directions"},
    ),
    Row("`--num_test 50` (the default)", "all images, unless `--num_test` says otherwise", {}),
    Row(
        "`--model test --no_dropout`",
        "`test.py --weights FILE --input DIR`",
        {"model": "not needed: test.py --weights FILE --input DIR tests one generator", "no_dropout": NOT_NEEDED},
    ),
    Row("`--gpu_ids -1`", "`--device cpu`; by default a GPU is used if there is one", _device, ("gpu_ids",)),
    Row("`--num_threads 4`", "`--num_workers 4`", {"num_threads": "--num_workers {}"}),
    Row("`--save_epoch_freq 5`", "`--checkpoint_interval 5`", {"save_epoch_freq": "--checkpoint_interval {}"}),
    Row("`--results_dir DIR`", "`--output DIR`", {"results_dir": "--output {}"}),
    Row(
        "`--display_id 0`, visdom",
        "not needed: grids and curves are files",
        dict.fromkeys(("display_id", "no_html", "use_wandb", "dataset_mode", "lr_policy"), NOT_NEEDED),
    ),
)
PYTORCH_GAN = (
    Row("`--epoch 30`", "`--start_from 30`", {"epoch": "--start_from {}"}),
    Row("`--n_epochs 200 --decay_epoch 100`", "`--num_epochs 200 --decay_epoch 100`", {}),
    Row("`--b1 0.5 --b2 0.999`", "`--beta1 0.5 --beta2 0.999`", {"b1": "--beta1 {}", "b2": "--beta2 {}"}),
    Row("`--n_cpu 8`", "`--num_workers 8`", {"n_cpu": "--num_workers {}"}),
    Row("`--n_residual_blocks 9`", "`--num_residual 9`", {"n_residual_blocks": "--num_residual {}"}),
    Row(
        "`--lambda_cyc 10 --lambda_id 5`",
        "`--lambda_cycle 10 --lambda_identity 5`. There, all terms are averaged over both directions: the ratios are the "
        "same, the printed sum is half of ours",
        {"lambda_cyc": "--lambda_cycle {}", "lambda_id": "--lambda_identity {}"},
    ),
    Row("`--sample_interval 100`", "`--sample_interval 100` (steps)", {}),
    Row(
        "`--checkpoint_interval -1` (the default: never saves)",
        "every epoch; `--checkpoint_interval 10` keeps every tenth",
        {},
    ),
)


def answers(words: Iterable[str], known: set[str]) -> tuple[list[str], list[str]]:
    """Translate the words of a command line that were not understood.

    known:   names of the options that were understood
    returns: "theirs → ours" for each row that answers some of them, and the words of no row
    """
    rows = (*JUNYANZ, *PYTORCH_GAN)
    names = {name for row in rows for name in row.names}
    values: dict[str, str] = {}
    others = []
    flag = ""  # of this row, which still lacks its value
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in names:
            values[name] = value
            flag = "" if value else name
        elif flag and not word.startswith("--"):
            values[flag] = word.strip()
            flag = ""
        else:
            others.append(word)
            flag = ""
    found = []
    for row in rows:
        mine = {name: values[name] for name in row.names if name in values}
        if mine:
            of_pytorch_gan = "n_epochs" in mine and "decay_epoch" in known
            ours = f"--num_epochs {mine['n_epochs']}" if of_pytorch_gan else row.answer(mine)
            theirs = " ".join(f"--{name} {value}".strip() for name, value in mine.items())
            found.append(f"{theirs} → {ours}")
    return found, others


def table(rows: Iterable[Row]) -> str:
    """Return rows as a Markdown table."""
    return "\n".join(["| flag there | flag here |", "|---|---|", *(f"| {row.there} | {row.here} |" for row in rows)])


if __name__ == "__main__":
    sys.stdout.write(f"{table(JUNYANZ)}\n\n{table(PYTORCH_GAN)}\n")
