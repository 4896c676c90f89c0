"""Learning proved by learning: short trainings on the demo set at 32 px, scored against the truth."""

from pathlib import Path

import pytest

import distill
import prepare
import test as test_stage
import train
from toolkit.monitor import read_losses

FLAGS = ["--dataset_name", "day2night", "--img_height", "32", "--img_width", "32", "--num_residual", "2"]
FLAGS += ["--ngf", "16", "--ndf", "16", "--n_layers_D", "2", "--batch_size", "1", "--device", "cpu"]


@pytest.mark.slow
def test_a_short_training_translates_and_its_student_follows():
    prepare.main(["draw", "day2night", "--size", "32"])
    train.main([*FLAGS, "--num_epochs", "3", "--load_scale", "1", "--no-flip"])
    scores = test_stage.main(["--dataset_name", "day2night", "--metrics", "paired", "--device", "cpu"])
    for direction in ("AtoB", "BtoA"):
        paired = scores[direction]["paired"]
        assert paired["model"]["PSNR"] > paired["mean picture"]["PSNR"]
        assert paired["model"]["PSNR"] > paired["copy"]["PSNR"] + 6
        assert paired["model"]["match@1"] > 0.9
    distill.main(["--dataset_name", "day2night", "--student_residual", "1", "--num_epochs", "1", "--device", "cpu"])
    rows = read_losses(Path("saved_models/day2night_student/losses.csv"))
    assert rows[-1]["output_BA"] < 0.7 * rows[0]["output_BA"]
    student = test_stage.main(["--run_name", "day2night_student", "--metrics", "paired", "--direction", "BtoA"])
    teacher = scores["BtoA"]["paired"]["model"]["PSNR"]
    assert student["BtoA"]["paired"]["model"]["PSNR"] > teacher - 2
