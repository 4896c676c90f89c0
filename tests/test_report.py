import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import differences, tiny_networks
from tiny_runs import save_run

from datasets import DataConfig
from models import DIRECTIONS, GeneratorConfig, build_generator
from toolkit import metrics
from toolkit.report import Report, compare_costs, compare_generators, refuse_large
from utils import InputError

AtoB, BtoA = DIRECTIONS


@pytest.mark.parametrize("generator", ["resnet", "unet_vit"])
def test_a_student_as_large_as_its_teacher_is_refused(generator):
    teacher = GeneratorConfig(generator, ngf=4)
    with pytest.raises(InputError, match="parameters is not smaller than its teacher of"):
        refuse_large(teacher, teacher)
    refuse_large(dataclasses.replace(teacher, num_residual=8, vit_blocks=3), teacher)


def test_costs_are_those_of_both_networks_and_measuring_changes_neither():
    teacher = build_generator(GeneratorConfig(ngf=4, num_residual=3, norm="batch"))
    student = build_generator(GeneratorConfig(ngf=2, num_residual=1, norm="batch")).train()
    before = [copy.deepcopy(net.state_dict()) for net in (student, teacher)]
    text = compare_costs(student, teacher, (16, 24), "fp32")
    own, theirs = (metrics.generator_cost(net, torch.zeros(1, 3, 16, 24), "fp32") for net in (student, teacher))
    expected = f"{own['parameters']:,} parameters (its teacher {theirs['parameters']:,}, 7.2 times as many), {own['MMACs']:,.1f} million multiply-accumulates an image of 24x16 px ({theirs['MMACs']:,.1f}, "
    assert text.startswith(expected)
    assert differences(before, [net.state_dict() for net in (student, teacher)]) == []
    assert student.training


def test_rows_are_compared_with_the_teacher_and_show_the_same_images():
    nets = {label: tiny_networks(seed=seed) for seed, label in enumerate(("teacher", "student"))}
    Path("G.bin").write_bytes(bytes(2000))
    names = [Path(str(i)) for i in range(12)]
    reals = dict(zip(names, torch.rand(len(names), 1, 3, 16, 16) * 2 - 1, strict=True))
    rows = {label: (nets[label], Path("G.bin")) for label in nets}
    table, grid = compare_generators(rows, BtoA, reals, reals, "fp32")
    scores = ["cycle", "PSNR", "SSIM", "match@1"]
    assert list(table["student"]) == ["parameters", "MMACs", "ms", *scores, "MB", "L1 to teacher"]
    assert (table["teacher"]["L1 to teacher"], table["student"]["MB"]) == (0, 0.002)
    assert table["student"]["L1 to teacher"] > 0
    assert [label for label, _ in grid] == ["real_B", "teacher", "student", "real_A"]
    assert torch.equal(grid[0][1], torch.cat([reals[name] for name in names[::2]]))
    with torch.no_grad():
        assert torch.allclose(grid[2][1], nets["student"]["G_BA"](grid[0][1]), atol=1e-5)
    unpaired = {Path("other"): torch.zeros(1, 3, 16, 16)}
    table, grid = compare_generators(rows, BtoA, reals, unpaired, "fp32")
    assert "PSNR" not in table["student"]
    assert "real_A" not in dict(grid)


def report(teachers, student="student"):
    path = Path("saved_models/teacher/latest.pt")
    return Report(teachers, path, student, "scratch", DataConfig("tiny"), torch.device("cpu"), "fp32")


def test_a_scratch_run_of_the_other_direction_is_no_row():
    nets = save_run("teacher").networks
    for run_name in ("student", "scratch"):  # as runs for AtoB alone leave their G_BA
        shutil.copytree("saved_models/teacher", f"saved_models/{run_name}")
    rows, size = report(nets).find_rows(BtoA)
    assert list(rows) == ["teacher", "student"]
    assert size == (16, 16)
    assert rows["teacher"][1] == Path("saved_models/teacher/G_BA.safetensors")
    with pytest.raises(InputError, match="no student in saved_models/nobody; distil one first"):
        report(nets, "nobody").find_rows(BtoA)


def test_a_report_compares_the_directions_that_have_a_student(tiny, capsys):
    teachers = save_run("teacher").networks
    save_run("student", ngf=2)
    shutil.copy("saved_models/teacher/G_BA.safetensors", "saved_models/student/G_BA.safetensors")
    for path in Path("saved_models/student").glob("*.pt"):  # else its latest.pt would replace files of two saves
        path.unlink()
    tables = report(teachers).write(DIRECTIONS)
    assert json.loads(Path("generated_images/student/report.json").read_text()) == tables
    assert {name: list(table) for name, table in tables.items()} == {"G_AB": ["teacher", "student"]}
    assert Path("generated_images/student/report_G_AB.png").is_file()
    first, *_, without, last = capsys.readouterr().out.splitlines()
    assert first.startswith("AtoB at 16x16 px; milliseconds on cpu")
    assert without == "BtoA: student has no student for it"
    assert last == "written to generated_images/student/report.json, images beside it"
    assert list(report(teachers).write([BtoA], explicit=True)) == ["G_BA"]
