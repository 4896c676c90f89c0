import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import differences, tiny_networks
from tiny_runs import save_run

from models import DIRECTIONS, GeneratorConfig, build_generator
from toolkit import metrics
from toolkit.report import compare_costs, compare_generators, find_rows, refuse_large, write_report
from utils import InputError

AtoB, BtoA = DIRECTIONS


@pytest.mark.parametrize(
    ("blocks", "ngf", "can_be_narrower"), [(9, 64, True), (1, 2, True), (0, 3, True), (2, 1, False)]
)
def test_a_large_student_is_refused_with_smaller_ones_that_are_accepted(blocks, ngf, can_be_narrower):
    teacher = GeneratorConfig(num_residual=blocks, ngf=ngf)
    with pytest.raises(InputError) as error:
        refuse_large(teacher, teacher)
    fewer = re.search(r"--student_residual ([0-9]+)\)", str(error.value))
    narrower = re.search(r"--student_ngf ([0-9]+)\)", str(error.value))
    assert (bool(fewer), bool(narrower)) == (blocks > 0, can_be_narrower)
    if fewer:
        refuse_large(dataclasses.replace(teacher, num_residual=int(fewer[1])), teacher)
    if narrower:
        refuse_large(dataclasses.replace(teacher, ngf=int(narrower[1])), teacher)


def test_a_large_student_is_refused_also_where_little_can_be_smaller():
    vit = GeneratorConfig("unet_vit")
    with pytest.raises(InputError, match=r"take fewer than 4 blocks \(--student_residual 1\)$"):
        refuse_large(vit, vit)
    smallest = GeneratorConfig(num_residual=0, ngf=1)
    with pytest.raises(InputError, match="another teacher"):
        refuse_large(smallest, smallest)


def test_costs_are_those_of_both_networks_and_measuring_changes_neither():
    teacher = build_generator(GeneratorConfig(ngf=4, num_residual=3, norm="batch"))
    student = build_generator(GeneratorConfig(ngf=2, num_residual=1, norm="batch")).train()
    before = [copy.deepcopy(net.state_dict()) for net in (student, teacher)]
    words = compare_costs(student, teacher, (16, 24), "fp32")
    image = torch.zeros(1, 3, 16, 24)
    own = metrics.generator_cost(student, image, "fp32")
    theirs = metrics.generator_cost(teacher, image, "fp32")
    assert words.startswith(
        f"{own['parameters']:,} parameters (its teacher {theirs['parameters']:,}, 7.2 times as many)"
    )
    assert f"{own['MMACs']:,.1f} million multiply-accumulates an image of 24x16 px ({theirs['MMACs']:,.1f}, " in words
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


def test_a_scratch_run_of_the_other_direction_is_no_row():
    nets = save_run("teacher").networks
    for run_name in ("student", "scratch"):  # as runs for AtoB alone leave their G_BA
        shutil.copytree("saved_models/teacher", f"saved_models/{run_name}")
    path = Path("saved_models/teacher/latest.pt")
    rows, size = find_rows(nets, path, BtoA, "student", "scratch")
    assert list(rows) == ["teacher", "student"]
    assert size == (16, 16)
    assert rows["teacher"][1] == path.parent / "G_BA.safetensors"
    with pytest.raises(InputError, match="no student in saved_models/nobody; distil one first"):
        find_rows(nets, path, BtoA, "nobody", "scratch")


def test_a_report_compares_the_directions_that_have_a_student(tiny, capsys):
    teachers = save_run("teacher").networks
    save_run("student", ngf=2)
    shutil.copy("saved_models/teacher/G_BA.safetensors", "saved_models/student/G_BA.safetensors")
    path = Path("saved_models/teacher/latest.pt")
    given = ("student", "scratch", tiny, "skip", torch.device("cpu"), "fp32")
    tables = write_report(teachers, path, DIRECTIONS, *given)
    assert json.loads(Path("generated_images/student/report.json").read_text()) == tables
    assert {name: list(table) for name, table in tables.items()} == {"G_AB": ["teacher", "student"]}
    assert Path("generated_images/student/report_G_AB.png").is_file()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("AtoB at 16x16 px; milliseconds on cpu")
    assert said[-2:] == [
        "BtoA: student has no student for it",
        "written to generated_images/student/report.json, images beside it",
    ]
    assert list(write_report(teachers, path, [BtoA], *given, explicit=True)) == ["G_BA"]
