"""The table of docs/weights.md: each row is a file as its project saves it, and what becomes of it here."""

from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from foreign_nets import PYTORCH_GAN, STATISTICS, ForeignGenerator, foreign, tracked_statistics
from safetensors.torch import save_file
from torch import nn

import train
from toolkit.weights import load_generators
from utils import InputError

PAGE = Path(train.__file__).parent / "docs" / "weights.md"


def junyanz(**changes):
    return ForeignGenerator(3, **changes)


def pytorch_gan(**changes):
    return ForeignGenerator(3, PYTORCH_GAN, **changes)


def renamed(state, *pairs, prefix=""):
    for old, new in pairs:
        state = {name.replace(old, new): x for name, x in state.items()}
    return {f"{prefix}{name}": x for name, x in state.items()}


class Row(NamedTuple):
    """One row of the table. The file is the state dict of the network, unless `value` makes something else of it."""

    project: str
    file: str  # as documented; its name is the part up to a colon
    result: str  # as documented: read, or "refused: ..." with words of the message
    net: Any = junyanz
    value: Any = lambda state: state
    assume: tuple[str, ...] = ()
    difference: str = "1e-5"  # the largest in float32, at 64x64 and 100x72 px


AVERAGED = {"decay": 0.999, "params": foreign(3)}
D = {"model.0.weight": torch.zeros(4, 3, 4, 4)}
OTHER = foreign(3, norm="batch")
OPTIMISER = {"state": {}, "param_groups": []}
ROWS = [
    Row("pytorch-CycleGAN-and-pix2pix", "latest_net_G_A.pth", "read, AtoB"),
    Row("pytorch-CycleGAN-and-pix2pix", "latest_net_G_B.pth: of 2018, with running statistics", "read, BtoA",
        value=lambda state: state | foreign(3, statistics=STATISTICS)),
    Row("pytorch-CycleGAN-and-pix2pix", "latest_net_G.pth: `--norm batch`, tested with `--eval`", "read",
        lambda: junyanz(norm="batch")),
    Row("pytorch-CycleGAN-and-pix2pix", "latest_net_G.pth: with dropout", "read", lambda: junyanz(second=6)),
    Row("pytorch-CycleGAN-and-pix2pix", "latest_net_G.pth: `--netG unet_256`", "refused: a U-Net",
        value=lambda state: {"model.model.0.weight": torch.zeros(4, 3, 4, 4)}),
    Row("pytorch-CycleGAN-and-pix2pix", "latest_net_D_A.pth", "refused: a discriminator", value=lambda state: D),
    Row("CUT", "latest_net_G.pth: `--no_antialias --no_antialias_up`", "read"),
    Row("CUT", "latest_net_G.pth: the default", "refused: a CUT generator with antialiasing filters",
        value=lambda state: state | {"model.7.filt": torch.zeros(8, 1, 3, 3)}),
    Row("gan-compression", "latest_net_G_A.pth: resnet_9blocks", "read, AtoB"),
    Row("gan-compression", "latest_net_G.pth: mobile_resnet_9blocks",
        "refused: a mobile generator of gan-compression, of separable convolutions",
        value=lambda state: state | {"model.10.conv_block.1.conv.0.weight": torch.zeros(16, 1, 3, 3)}),
    Row("PyTorch-CycleGAN (aitorzip)", "netG_A2B.pth", "read, AtoB"),
    Row("CycleGAN-PyTorch (Lornatang)", "netG_B2A.pth: `main`, `res`", "read, BtoA",
        value=lambda state: renamed(state, ("model.", "main."), ("conv_block.", "res."))),
    Row("PyTorch-GAN", "G_AB_199.pth", "read, AtoB", pytorch_gan),
    Row("PyTorch-GAN", "G_BA_199.pth: `--channels 1`", "refused: a grey generator of PyTorch-GAN",
        lambda: pytorch_gan(channels=1)),
    Row("any", "netG.pth: nn.Upsample, reflection padding, convolution", "read", lambda: pytorch_gan(lead=2)),
    Row("any", "netG.pth: bilinear upsampling", "read with `--assume bilinear`", lambda: pytorch_gan(resize="bilinear"),
        assume=("bilinear",)),
    Row("any", "netG.pth: replication padding after upsampling", "read with `--assume replicate`",
        lambda: pytorch_gan(pad="replicate"), assume=("replicate",)),
    Row("any", "netG.pth: images in [0, 1], sigmoid", "read with `--assume sigmoid`", lambda: junyanz(last=nn.Sigmoid),
        assume=("sigmoid",)),
    Row("any", "netG.pth: instance norms with running statistics, in eval mode", "read with `--assume statistics`",
        lambda: tracked_statistics(junyanz()), assume=("statistics",)),
    Row("any", "netG.pth: DataParallel, torch.compile", "read",
        value=lambda state: renamed(state, prefix="_orig_mod.module.")),
    Row("any", "checkpoint.pth: `{G_AB, G_BA, optimizers}`", "read, the one of `--direction`, or both",
        value=lambda state: {"epoch": 9, "G_AB": state, "D_A": D, "opt": OPTIMISER}),
    Row("any", "checkpoint.pth: `{netG_A_state_dict, …}`", "read, the one of `--direction`, or both",
        value=lambda state: {"netG_A_state_dict": state, "netD_A_state_dict": D, "optimizer": OPTIMISER}),
    Row("any", "checkpoint.pth: Path, Namespace or DictConfig beside the tensors", "read, the objects are skipped",
        value=lambda state: {"model": state, "args": Namespace(root=Path("x"))}),
    Row("BasicSR", "net_g_latest.pth: `params`, `params_ema`", "read, the averaged weights",
        value=lambda state: {"params": OTHER, "params_ema": state}),
    Row("PyTorch", "averaged.pth: AveragedModel", "read, the averaged weights",
        value=lambda state: {"n_averaged": torch.tensor(9), **renamed(state, prefix="module.")}),
    Row("Lightning", "last.ckpt: `G_AB.`, `genX.`", "read, the one of `--direction`, or both",
        value=lambda state: {"state_dict": renamed(state, prefix="genX."), "optimizer_states": [OPTIMISER]}),
    Row("Hugging Face", "model.safetensors", "read", pytorch_gan),
    Row("any", "genh.pth.tar: `initial`, `down_blocks`, `res_blocks`", "refused: a network in named parts",
        value=lambda state: {"state_dict": {"initial.0.weight": D["model.0.weight"], "down.0.weight": D["model.0.weight"]}}),
    Row("any", "netG.pth: a whole module, torch.save(net)", "refused: a whole pickled module", value=lambda state: nn.Sequential(nn.Conv2d(3, 4, 7))),
]  # fmt: skip


def save(row):
    """Write the file of a row; returns its network and the path."""
    net = row.net()
    path = Path(row.file.partition(":")[0])
    value = row.value(net.state_dict())
    if path.suffix == ".safetensors":
        save_file(value, path)
    else:
        torch.save(value, path)
    return net, path


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.project} {row.file}")
def test_a_file_becomes_what_the_table_says(row, capsys):
    theirs, path = save(row)
    if row.result.startswith("refused: "):
        with pytest.raises(InputError) as error:
            load_generators(path)
        assert row.result.removeprefix("refused: ") in str(error.value)
        assert "\n" not in str(error.value)
        return
    ((net, metadata),) = load_generators(path, assumed=row.assume)
    said = capsys.readouterr().out
    direction = row.result.partition(", ")[2]
    assert (metadata["direction"] == direction) if direction.endswith(("toA", "toB")) else True
    assert ("averaged weights" in said) == ("averaged weights" in row.result)
    assert ("objects in it are skipped" in said) == ("skipped" in row.result)
    noise = torch.Generator().manual_seed(1)
    has_unit_range = "sigmoid" in row.assume
    for height, width in ((64, 64), (72, 100)):
        x = torch.rand(1, 3, height, width, generator=noise) * 2 - 1
        with torch.no_grad():
            expected = theirs(x / 2 + 0.5) * 2 - 1 if has_unit_range else theirs(x)
            assert expected.std() > 0.01
            assert (net(x) - expected).abs().max() <= float(row.difference)


def test_the_page_has_a_row_for_each_file():
    text = PAGE.read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    for row in ROWS:
        difference = "" if row.result.startswith("refused") else row.difference
        name, _, rest = row.file.partition(":")
        assert f"| {row.project} | `{name}`{':' if rest else ''}{rest} | {row.result} | {difference} |" in table
    assert len([line for line in table if line.count("|") == 5]) == len(ROWS) + 1
