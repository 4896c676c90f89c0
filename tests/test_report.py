import copy
import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import differences, tiny_networks
from tiny_runs import save_run

from models import GeneratorConfig, build_generator
from toolkit import metrics
from toolkit.report import COLUMNS, compare_costs, compare_generators, refuse_large, report_rows
from utils import InputError


def test_what_would_be_smaller_is_smaller():
    for blocks, ngf, narrower in ((9, 64, True), (1, 2, True), (0, 3, True), (2, 1, False)):
        teacher = GeneratorConfig(num_residual=blocks, ngf=ngf)
        with pytest.raises(InputError) as error:
            refuse_large(teacher, teacher)
        fewer = re.search(r"--student_residual ([0-9]+)\)", str(error.value))
        thinner = re.search(r"--student_ngf ([0-9]+)\)", str(error.value))
        assert (bool(fewer), bool(thinner)) == (blocks > 0, narrower)
        if fewer:
            refuse_large(dataclasses.replace(teacher, num_residual=int(fewer[1])), teacher)
        if thinner:
            refuse_large(dataclasses.replace(teacher, ngf=int(thinner[1])), teacher)
    vit = GeneratorConfig("unet_vit")
    with pytest.raises(InputError, match=r"take fewer than 4 blocks \(--student_residual 1\)$"):
        refuse_large(vit, vit)
    with pytest.raises(InputError, match="another teacher"):
        refuse_large(GeneratorConfig(num_residual=0, ngf=1), GeneratorConfig(num_residual=0, ngf=1))


def test_costs_are_those_of_both_networks_and_measuring_changes_neither():
    teacher = build_generator(GeneratorConfig(ngf=4, num_residual=3, norm="batch"))
    student = build_generator(GeneratorConfig(ngf=2, num_residual=1, norm="batch")).train()
    before = [copy.deepcopy(net.state_dict()) for net in (student, teacher)]
    words = compare_costs(student, teacher, (16, 24), "fp32")
    own, theirs = (metrics.generator_cost(net, torch.zeros(1, 3, 16, 24), "fp32") for net in (student, teacher))
    assert words.startswith(
        f"{own['parameters']:,} parameters (its teacher {theirs['parameters']:,}, 7.2 times as many)"
    )
    assert f"{own['MMACs']:,.1f} million multiply-accumulates an image of 24x16 px ({theirs['MMACs']:,.1f}, " in words
    assert differences(before, [net.state_dict() for net in (student, teacher)]) == []
    assert student.training


def test_rows_are_compared_with_the_teacher_and_show_the_same_images():
    nets = {label: tiny_networks(seed=seed) for seed, label in enumerate(("teacher", "student"))}
    Path("G.bin").write_bytes(bytes(2000))
    names = [Path(str(i)) for i in range(2 * COLUMNS)]
    reals = dict(zip(names, torch.rand(len(names), 1, 3, 16, 16) * 2 - 1, strict=True))
    rows = {label: (nets[label], Path("G.bin")) for label in nets}
    table, grid = compare_generators(rows, "G_BA", reals, reals, "fp32")
    assert (table["teacher"]["L1 to teacher"], table["student"]["MB"]) == (0, 0.002)
    assert table["student"]["L1 to teacher"] > 0
    assert [label for label, _ in grid] == ["real_B", "teacher", "student", "real_A"]
    assert torch.equal(grid[0][1], torch.cat([reals[name] for name in names[::2]]))
    with torch.no_grad():
        assert torch.allclose(grid[2][1], nets["student"]["G_BA"](grid[0][1]), atol=1e-5)
    unpaired = {Path("other"): torch.zeros(1, 3, 16, 16)}
    assert "real_A" not in dict(compare_generators(rows, "G_BA", reals, unpaired, "fp32")[1])


def test_a_scratch_run_of_the_other_direction_is_no_row(tmp_path):
    nets = save_run("teacher").nets
    for run_name in ("student", "scratch"):  # as runs that learnt AtoB alone leave their G_BA
        shutil.copytree("saved_models/teacher", f"saved_models/{run_name}")
    path = Path("saved_models/teacher/latest.pt")
    rows, size = report_rows(nets, path, "G_BA", "student", "scratch")
    assert list(rows) == ["teacher", "student"]
    assert size == (16, 16)
    assert rows["teacher"][1] == path.parent / "G_BA.safetensors"
    with pytest.raises(InputError, match="no student in saved_models/nobody; distil one first"):
        report_rows(nets, path, "G_BA", "nobody", "scratch")
