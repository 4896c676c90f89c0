"""Flags of other projects are answered with ours, from the table that docs/coming_from.md shows."""

import re
from pathlib import Path

import pytest

import test as test_command
import train
from toolkit.foreign_flags import JUNYANZ, PYTORCH_GAN, answers, table
from utils import InputError

PAGE = Path(train.__file__).parent / "docs" / "coming_from.md"


def test_the_page_shows_the_tables_of_the_code():
    text = PAGE.read_text(encoding="utf-8")
    for rows in (JUNYANZ, PYTORCH_GAN):
        assert table(rows) + "\n" in text, "python -m toolkit.foreign_flags prints the tables"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--dataroot ./datasets/maps --name maps", "--dataset_name maps --data_root datasets --run_name maps"),
        ("--dataroot /data/maps", "--dataset_name maps --data_root /data"),
        ("--n_epochs 100 --n_epochs_decay 100", "--num_epochs 200 --decay_epoch 100"),
        ("--n_epochs 50 --n_epochs_decay 20", "--num_epochs 70 --decay_epoch 50"),
        ("--n_epochs_decay 20", "--num_epochs 120 --decay_epoch 100"),
        ("--load_size 286 --crop_size 256", "--load_scale 1.117 --img_height 256 --img_width 256"),
        ("--crop_size=128", "--load_scale 2.234 --img_height 128 --img_width 128"),
        ("--no_flip", "--no-flip"),
        ("--netG resnet_6blocks", "--num_residual 6"),
        ("--netD pixel", "--discriminator pixel"),
        ("--init_type xavier", "--init xavier"),
        ("--lambda_A 10 --lambda_B 10", "--lambda_cycle 10"),
        ("--gan_mode vanilla", "--gan_loss bce"),
        ("--pool_size 0", "--buffer_size 0"),
        ("--continue_train --epoch_count 31", "--start_from 30"),
        ("--continue_train", "--start_from latest"),
        ("--input_nc 1 --output_nc 1", "--channels 1"),
        ("--gpu_ids -1", "--device cpu"),
        ("--gpu_ids 1,2", "--device cuda:1"),
        ("--epoch 30", "--start_from 30"),
        ("--b1 0.5 --b2 0.9", "--beta1 0.5 --beta2 0.9"),
        ("--n_cpu 8", "--num_workers 8"),
        ("--n_residual_blocks 9", "--num_residual 9"),
        ("--lambda_cyc 10 --lambda_id 5", "--lambda_cycle 10 --lambda_identity 5"),
    ],
)
def test_a_flag_of_another_project_is_answered_with_ours_and_its_value(theirs, ours):
    with pytest.raises(InputError) as error:
        train.parse_args(theirs.split())
    assert f"flags of another project: {theirs.replace('=', ' ')} → {ours} (docs/coming_from.md)" in str(error.value)
    if ours.startswith("--"):
        train.parse_args(ours.split())


def test_the_same_flag_is_read_as_its_project_means_it():
    assert answers(["--n_epochs", "200"], {"decay_epoch"}) == (["--n_epochs 200 → --num_epochs 200"], [])
    (answer,), _ = answers(["--n_epochs", "200"], set())
    assert answer.endswith("--num_epochs 200 if it comes from PyTorch-GAN, else --num_epochs 300 --decay_epoch 200")


def test_unknown_words_beside_them_are_named_and_flags_that_a_command_lacks_are_not_needed():
    with pytest.raises(InputError, match=r"--n_cpu 8 → --num_workers 8.*; unrecognized arguments: stray --foo 3;"):
        train.parse_args("--n_cpu 8 stray --foo 3".split())
    with pytest.raises(InputError, match=r"--load_size 286 → .*, which test.py does not need: leave it out"):
        test_command.parse_args(["--load_size", "286"])


@pytest.mark.parametrize("row", [*JUNYANZ, *PYTORCH_GAN], ids=lambda row: row.there)
def test_each_row_answers_its_own_flags_whatever_their_values(row):
    assert set(row.names) - {"no_html", "use_wandb", "dataset_mode", "lr_policy"} <= set(
        re.findall(r"--(\w+)", row.there)
    )
    for value in ("", "x", "9" * 30, "{}"):
        for name in row.names:
            (answer,), others = answers([f"--{name}={value}"], set())
            assert " → " in answer
            assert not others
