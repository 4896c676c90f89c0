"""Short trainings on the demo set at 32 px, scored against the truth."""

from pathlib import Path

import pytest

import distill
import prepare
import test as test_command
import train
from toolkit.logs import read_losses

OPTIONS = ["--dataset_name", "day2night", "--img_height", "32", "--img_width", "32", "--num_residual", "2"]
OPTIONS += ["--ngf", "16", "--ndf", "16", "--n_layers_D", "2", "--batch_size", "1", "--device", "cpu"]


@pytest.mark.slow
def test_a_short_training_translates_and_its_student_learns_from_it():
    prepare.main(["draw", "day2night", "--size", "32"])
    train.main([*OPTIONS, "--num_epochs", "3", "--load_scale", "1", "--no-flip"])
    scores = test_command.main(["--dataset_name", "day2night", "--metrics", "paired", "--device", "cpu"])
    for direction in ("AtoB", "BtoA"):
        paired = scores[direction]["paired"]
        assert paired["model"]["PSNR"] > paired["mean image"]["PSNR"]
        assert paired["model"]["PSNR"] > paired["copy"]["PSNR"] + 6
        assert paired["model"]["match@1"] > 0.9
    distill.main(["--dataset_name", "day2night", "--student_residual", "1", "--num_epochs", "1", "--device", "cpu"])
    rows = read_losses(Path("saved_models/day2night_student/losses.csv"))
    assert rows[-1]["output_BA"] < 0.7 * rows[0]["output_BA"]
    student = test_command.main(["--run_name", "day2night_student", "--metrics", "paired", "--direction", "BtoA"])
    teacher = scores["BtoA"]["paired"]["model"]["PSNR"]
    assert student["BtoA"]["paired"]["model"]["PSNR"] > teacher - 2
