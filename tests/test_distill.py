import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from breakage import steps_that_take
from conftest import TINY, make_dataset
from tiny_runs import save_run
from torch import nn

import distill
import test as test_stage
import train
from models import GeneratorConfig, build_generator
from toolkit import metrics
from toolkit.checkpoints import load_state, save_state
from toolkit.monitor import read_losses
from toolkit.weights import load_generator
from utils import InputError, one_line

CPU = ["--device", "cpu", "--precision", "fp32"]
pytestmark = pytest.mark.usefixtures("no_plots")
SPREAD = 0.02  # of fresh weights: N(0, 0.02)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A data set and a teacher of 3 blocks, made once."""
    root = tmp_path_factory.mktemp("taught")
    make_dataset(root / "datasets" / "tiny", (4, 4, 2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train.main(["--dataset_name", "tiny", *TINY, "--num_residual", "3", "--num_epochs", "2"])
    return root


@pytest.fixture
def teacher(taught, tmp_path):
    for name in ("datasets", "saved_models"):
        shutil.copytree(taught / name, tmp_path / name)
    return tmp_path / "saved_models/tiny"


def run(*argv):
    """Distil one student, unless `argv` says otherwise."""
    given = ["--direction", "BtoA", "--student_residual", "1", "--num_epochs", "1", *map(str, argv)]
    distill.main(["--dataset_name", "tiny", *CPU, *given])


def make_student(net, num_residual, ngf, transfer):
    return distill.make_student(net, dataclasses.replace(net.config, num_residual=num_residual, ngf=ngf), transfer)


def state_of(name):
    return load_state(Path("saved_models") / name / "latest.pt", "distill")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- teacher and student ---------------------------------------------------------------------


def test_the_teacher_of_a_data_set_is_found_and_its_flags_inherited(teacher, capsys):
    distill.main(["--dataset_name", "tiny", "--device", "cpu", "--student_residual", "1"])
    out = capsys.readouterr().out
    assert "inherited from saved_models/tiny/latest.pt:" in out
    assert "--batch_size 2" in out
    state = state_of("tiny_student")
    assert state["args"]["num_epochs"] == 2
    assert state["args"]["lambda_identity"] == 5.0
    assert (state["epoch"], state["step"]) == (2, 4)
    assert state["teacher"]["path"] == "saved_models/tiny/latest.pt"
    assert state["args"]["direction"] == "both"
    assert [state["config"][name]["num_residual"] for name in ("G_AB", "G_BA")] == [1, 1]


def test_the_cost_of_a_student_is_said_before_it_learns(teacher, capsys):
    run("--direction", "both", "--student_ngf", 2)
    out = capsys.readouterr().out
    own, theirs = (GeneratorConfig(ngf=ngf, num_residual=blocks) for ngf, blocks in ((2, 1), (4, 3)))
    costs = []
    for config in (own, theirs):
        net = build_generator(config)
        costs += [sum(p.numel() for p in net.parameters()), metrics.count_macs(net, 16, 16) / 1e6]
    for name in ("G_AB", "G_BA"):
        (line,) = re.findall(rf"student {name}, 1 blocks: .*", out)
        assert out.index(line) < out.index("watch generated_images/tiny_student/index.html")
        assert f"{costs[0]:,} parameters (its teacher {costs[2]:,}, {costs[2] / costs[0]:.1f} times as many)" in line
        assert f"{costs[1]:,.1f} million multiply-accumulates an image of 16x16 px ({costs[3]:,.1f}, " in line
        assert re.search(r"[0-9.]+ ms on cpu \([0-9.]+, [0-9.]+ times\)$", line)
    distill.main(["--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "2", "--device", "cpu"])
    assert "million multiply-accumulates" not in capsys.readouterr().out


def test_the_student_learns_and_the_teacher_does_not(teacher, monkeypatch):
    seen = {}
    load_teacher = distill.load_teacher
    make_nets = distill.make_nets

    def watched_teacher(*args):
        seen["teacher"] = load_teacher(*args)
        return seen["teacher"]

    def watched_nets(*args):
        nets = make_nets(*args)
        seen["start"] = copy.deepcopy({name: net.state_dict() for name, net in nets.items()})
        return nets

    monkeypatch.setattr(distill, "load_teacher", watched_teacher)
    monkeypatch.setattr(distill, "make_nets", watched_nets)
    before = load_state(teacher / "latest.pt")["nets"]
    run()
    assert same(seen["teacher"].nets["G_BA"].state_dict(), before["G_BA"])
    assert same(load_state(teacher / "latest.pt")["nets"]["G_BA"], before["G_BA"])
    after = state_of("tiny_student")["nets"]
    for name in ("G_AB", "G_BA", "D_A", "D_B"):
        for key, value in seen["start"][name].items():
            before_a_norm = any(part in key for part in ("stem.1", "down", "body", "up", "layers.2"))
            if not (key.endswith("bias") and before_a_norm):
                assert not torch.equal(value, after[name][key]), f"{name} {key} did not move"
    for part in ("stem", "down", "up", "head"):  # copied at step 0
        for key in (k for k in before["G_BA"] if k.startswith(part)):
            assert torch.equal(seen["start"]["G_BA"][key], before["G_BA"][key])
    assert same(seen["start"]["G_AB"], before["G_AB"])
    assert same(seen["start"]["D_A"], before["D_A"])


def assert_fresh(part):
    """All convolutions of a part are drawn from N(0, 0.02), and their biases are zero."""
    convs = [module for module in part.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    assert convs
    for conv in convs:
        assert conv.weight.mean().item() == pytest.approx(0, abs=5 * SPREAD / conv.weight.numel() ** 0.5)
        assert conv.weight.std().item() == pytest.approx(SPREAD, rel=5 / (2 * conv.weight.numel()) ** 0.5)
        assert not conv.bias.any()


def strange_teacher(**config):
    """A teacher whose weights no fresh network has."""
    net = build_generator(GeneratorConfig(**config), "normal")
    with torch.no_grad():
        for p in net.parameters():
            p.uniform_(0.5, 1)
    return net


def test_without_transfer_the_student_starts_with_fresh_weights_and_none_of_its_teachers():
    net = strange_teacher(ngf=8, num_residual=3)
    fresh = make_student(net, 1, 8, False)
    assert len(fresh.blocks) == 1
    assert_fresh(fresh)
    theirs = net.state_dict()
    for name, value in fresh.state_dict().items():
        assert not torch.equal(value, theirs[name])


def test_with_transfer_only_the_blocks_are_fresh():
    net = strange_teacher(ngf=8, num_residual=3)
    copied = make_student(net, 2, 8, True)
    assert len(copied.blocks) == 2
    assert_fresh(copied.blocks)
    for part in ("stem", "down", "up", "head"):
        assert same(getattr(copied, part).state_dict(), getattr(net, part).state_dict())


def test_a_thinner_student_takes_what_has_the_same_shape_and_the_rest_is_fresh():
    net = strange_teacher(ngf=8, num_residual=3)
    thin = make_student(net, 3, 4, True)
    assert thin.config == GeneratorConfig(ngf=4, num_residual=3)
    for part in (thin.stem, thin.down, thin.blocks, thin.up):
        assert_fresh(part)
    assert torch.equal(thin.head[1].bias, net.head[1].bias)  # one value a channel, whatever the width


def test_a_run_without_transfer_has_a_name_of_its_own(teacher):
    run("--no-transfer")
    assert Path("saved_models/tiny_scratch/G_BA.safetensors").is_file()
    assert not state_of("tiny_scratch")["args"]["transfer"]


@pytest.mark.parametrize(("ngf", "said"), [(8, "stem, down, up, head"), (4, "no whole part: the widths differ")])
def test_what_a_student_takes_is_said_of_parts_that_it_has(ngf, said, capsys):
    net = build_generator(GeneratorConfig(ngf=8, num_residual=2), "normal")
    make_student(net, 1, ngf, True)
    assert f"student takes from its teacher: {said}\n" in capsys.readouterr().out


@pytest.mark.parametrize("skips", [True, False])
def test_a_student_takes_the_rest_of_a_teacher_that_has_other_skips(skips, capsys):
    net = strange_teacher(ngf=8, num_residual=3, skips=not skips)
    args = distill.parse_args(["--student_residual", "1", "--student_skips" if skips else "--no-student_skips"])
    student = distill.make_student(net, distill.student_config(args, net.config), True)
    assert student.config == GeneratorConfig(ngf=8, num_residual=1, skips=skips)
    assert "student takes from its teacher: stem, down, up, head\n" in capsys.readouterr().out
    for part in ("stem", "down", "up", "head"):
        assert same(getattr(student, part).state_dict(), getattr(net, part).state_dict())
    assert_fresh(student.blocks)
    if skips:
        assert_fresh(student.skips)


def test_a_student_has_skips_where_its_teacher_has_unless_asked_otherwise(capsys):
    net = strange_teacher(ngf=8, num_residual=3, skips=True)
    student = distill.make_student(net, distill.student_config(distill.parse_args([]), net.config), True)
    assert same(student.skips.state_dict(), net.skips.state_dict())
    assert "student takes from its teacher: stem, down, up, skips, head\n" in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "skips"), [("--student_skips", True), ("--no-student_skips", False)])
def test_a_student_with_other_skips_than_its_teacher_learns_and_is_compared(tiny, refused, flag, skips):
    teacher = save_run(num_residual=3, skips=not skips).nets["G_BA"].state_dict()
    run(flag, "--num_epochs", 2, "--checkpoint_interval", 1)
    assert same(load_state(Path("saved_models/tiny/latest.pt"))["nets"]["G_BA"], teacher)
    early, late = (load_state(Path(f"saved_models/tiny_student/epoch_000{i}.pt"))["nets"]["G_BA"] for i in (1, 2))
    assert any(name.startswith("skips") for name in late) == skips
    for name in late:
        if name.endswith("weight"):
            assert not torch.equal(early[name], late[name]), f"{name} did not move"
    assert {"output_BA", "hidden_BA"} <= read_losses(Path("saved_models/tiny_student/losses.csv"))[0].keys()
    other = "--no-student_skips" if skips else "--student_skips"
    resume = ["--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "3", "--device", "cpu"]
    assert f"--student_skips {not skips}: the run in" in refused(distill.main, *resume, other)
    distill.main(["--dataset_name", "tiny", "--report", *CPU])
    table = json.loads(Path("generated_images/tiny_student/report.json").read_text())["G_BA"]
    assert list(table) == ["teacher", "student"]


@pytest.mark.parametrize("flag", ["--student_skips", "--no-student_skips"])
def test_the_skips_of_a_unet_vit_cannot_be_chosen(flag):
    args = distill.parse_args([flag])
    with pytest.raises(InputError, match=f"^{flag}: the skips of a unet_vit are fixed; leave it out$"):
        distill.student_config(args, GeneratorConfig("unet_vit"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--student_skips"], "--student_residual 3 --student_skips: "),
        ([], "--student_residual 3: a student of 18,019 parameters is not smaller than its teacher of 18,019"),
        (["--student_residual", "4"], "--student_residual 4: "),
        (["--student_residual", "2", "--student_ngf", "8"], "--student_residual 2 --student_ngf 8: "),
    ],
)
def test_a_student_that_is_not_smaller_is_refused_with_what_would_be(teacher, refused, given, words):
    error = refused(distill.main, "--dataset_name", "tiny", *CPU, *given)
    assert words in error
    assert error.endswith("fewer than 3 blocks (--student_residual 1) or 3 blocks narrower than 4 (--student_ngf 2)")
    assert not Path("saved_models/tiny_student").exists()


def test_a_student_file_is_a_generator_file_without_adapters(teacher):
    run("--student_ngf", 2)
    state = state_of("tiny_student")
    assert set(state["adapters"]) == {"G_BA_0.weight", "G_BA_0.bias"}
    assert state["adapters"]["G_BA_0.weight"].shape == (16, 8, 1, 1)
    net, metadata = load_generator(Path("saved_models/tiny_student/G_BA.safetensors"))
    assert net.config == GeneratorConfig(ngf=2, num_residual=1)
    assert not [name for name in net.state_dict() if "adapter" in name]
    assert (metadata["stage"], metadata["direction"]) == ("distill", "BtoA")
    test_stage.main(["--dataset_name", "tiny", "--run_name", "tiny_student", *CPU, "--metrics", "paired,losses"])
    argv = ["--dataset_name", "tiny", "--run_name", "tuned", *TINY[:4], *CPU, "--num_epochs", "1", "--n_layers_D", "1"]
    train.main([*argv, "--init_from", "saved_models/tiny_student/G_BA.safetensors"])
    assert load_state(Path("saved_models/tuned/latest.pt"))["config"]["G_AB"]["ngf"] == 2


def test_two_directions_at_once_leave_what_two_runs_leave(teacher):
    for direction in ("both", "AtoB", "BtoA"):
        run("--direction", direction, "--run_name", direction, "--student_ngf", 2)
    files = [{p.name for p in Path("saved_models", name).iterdir()} for name in ("both", "AtoB", "BtoA")]
    assert files[0] == files[1] == files[2]
    shapes = {}
    for name in ("both", "AtoB", "BtoA"):
        nets = state_of(name)["nets"]
        shapes[name] = {key: {k: v.shape for k, v in nets[key].items()} for key in ("G_AB", "G_BA")}
    assert shapes["both"]["G_AB"] == shapes["AtoB"]["G_AB"]
    assert shapes["both"]["G_BA"] == shapes["BtoA"]["G_BA"]
    assert shapes["AtoB"]["G_BA"] != shapes["BtoA"]["G_BA"]  # there the teacher's own goes on
    assert set(state_of("both")["adapters"]) == {"G_AB_0.weight", "G_AB_0.bias", "G_BA_0.weight", "G_BA_0.bias"}
    rows = read_losses(Path("saved_models/both/losses.csv"))
    assert {"output_AB", "hidden_AB", "output_BA", "hidden_BA"} <= rows[0].keys()


@pytest.mark.slow
def test_hidden_states_and_images_of_the_teacher_are_learnt(teacher):
    """With only the two distillation losses a student comes close to its teacher."""
    flags = ("--lambda_gan", 0, "--lambda_cycle", 0, "--lambda_identity", 0, "--steps_per_epoch", 120, "--lr", 2e-3)
    run(*flags, "--student_residual", 2, "--load_scale", 1, "--no-flip")
    rows = read_losses(Path("saved_models/tiny_student/losses.csv"))
    assert rows[-1]["output_BA"] < 0.6 * rows[0]["output_BA"]
    assert rows[-1]["hidden_BA"] < 0.8 * rows[0]["hidden_BA"]


@pytest.mark.parametrize(
    ("teacher_blocks", "student_blocks", "pairs"),
    [
        (9, 3, [1, 4, 8]),
        (6, 3, [1, 3, 5]),
        (9, 9, list(range(9))),
        (9, 1, [8]),
        (4, 2, [1, 3]),
        (3, 5, [0, 0, 1, 1, 2]),
        (9, 0, []),
        (0, 3, []),
    ],
)
def test_blocks_are_paired_evenly(teacher_blocks, student_blocks, pairs):
    assert distill.pair_blocks(teacher_blocks, student_blocks) == pairs


def test_a_single_file_can_teach_one_direction(teacher, capsys, refused):
    shutil.move(teacher / "G_BA.safetensors", "alone.safetensors")
    flags = ["--teacher", "alone.safetensors", *CPU, "--student_residual", "1"]
    flags += ["--num_epochs", "1", "--batch_size", "2"]
    distill.main(flags)
    out = capsys.readouterr().out
    assert "alone.safetensors: a single generator" in out
    assert "inherited" not in out
    assert "--dataset_name tiny" in out  # which the file says
    state = state_of("alone_student")
    assert state["args"]["img_height"] == 16
    assert state["config"]["G_AB"]["num_residual"] == 3
    assert state["config"]["G_BA"]["num_residual"] == 1
    assert state["args"]["direction"] == "BtoA"
    distill.main(["--run_name", "alone_student", "--start_from", "latest", "--num_epochs", "2", "--device", "cpu"])
    assert state_of("alone_student")["epoch"] == 2
    for direction in ("AtoB", "both"):
        error = refused(distill.main, *flags, "--direction", direction, "--overwrite")
        assert "--teacher alone.safetensors" in error
        assert "translates BtoA only, not AtoB" in error


# -- going on --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--student_ngf", "2", "--student_skips")])
def test_a_resumed_distillation_equals_an_uninterrupted_one_bit_for_bit(teacher, flags):
    run("--run_name", "whole", "--num_epochs", 3, "--checkpoint_interval", 1, *flags)
    run("--run_name", "parts", "--num_epochs", 3, "--checkpoint_interval", 1, *flags)
    distill.main(["--dataset_name", "tiny", "--run_name", "parts", "--start_from", "1", "--device", "cpu"])
    whole = state_of("whole")
    parts = state_of("parts")
    for name in ("G_AB", "G_BA", "D_A", "D_B"):
        assert same(whole["nets"][name], parts["nets"][name])
    assert same(whole["adapters"], parts["adapters"])
    logs = [Path(f"saved_models/{name}/losses.csv").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert "output_BA,hidden_BA" in logs[0]


def test_a_changed_teacher_and_another_student_are_refused_on_resume(teacher, refused):
    run()
    resume = ["--dataset_name", "tiny", "--start_from", "latest", "--device", "cpu", "--num_epochs", "2"]
    assert "--student_residual 2" in refused(distill.main, *resume, "--student_residual", "2")
    assert "a state of train.py" in refused(distill.main, *resume, "--run_name", "tiny")
    shutil.copy(teacher / "latest.pt", teacher / "epoch_0001.pt")
    with (teacher / "latest.pt").open("ab") as file:
        file.write(b"\0")
    assert "saved_models/tiny/latest.pt: not the teacher" in refused(distill.main, *resume)
    distill.main([*resume, "--teacher", str(teacher / "epoch_0001.pt"), "--run_name", "tiny_student"])
    assert state_of("tiny_student")["epoch"] == 2


def test_of_an_older_state_each_flag_that_it_lacks_is_said_once(teacher, capsys):
    run("--checkpoint_interval", 1, "--num_epochs", 2)
    path = Path("saved_models/tiny_student/epoch_0001.pt")
    state = load_state(path)
    for name in ("lambda_gp", "cache"):
        del state["args"][name]
    save_state(path, state)
    capsys.readouterr()
    distill.main(["--dataset_name", "tiny", "--start_from", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert out.count("older than") == 1
    assert "older than --cache, --lambda_gp" in out or "older than --lambda_gp, --cache" in out
    assert (state_of("tiny_student")["args"]["cache"], state_of("tiny_student")["args"]["lambda_gp"]) == ("none", 0)


def test_a_slow_distillation_says_how_long_it_takes_and_names_flags_that_it_has(teacher, capsys):
    with steps_that_take(4000):
        run("--steps_per_epoch", 3)
    out, err = capsys.readouterr()
    assert "67 minutes a step, 3.3 hours an epoch: this run will take about 67 minutes more" in out
    (line,) = [line for line in err.splitlines() if "on this CPU" in line]
    distill.parse_args(line.partition("recipes.md): ")[2].split())


# -- the report ------------------------------------------------------------------------------


def test_the_report_compares_teacher_student_and_scratch(teacher, capsys, refused):
    error = refused(distill.main, "--dataset_name", "tiny", "--report", *CPU)
    assert "--report" in error
    assert "saved_models/tiny_student" in error
    run("--student_ngf", 2)
    run("--student_ngf", 2, "--no-transfer")
    capsys.readouterr()
    distill.main(["--dataset_name", "tiny", "--report", *CPU])
    out = capsys.readouterr().out
    table = json.loads(Path("generated_images/tiny_student/report.json").read_text())["G_BA"]
    assert list(table) == ["teacher", "student", "scratch"]
    assert table["teacher"]["parameters"] > 3 * table["student"]["parameters"]
    assert table["teacher"]["MMACs"] > 3 * table["student"]["MMACs"]
    assert table["teacher"]["L1 to teacher"] == 0
    assert table["student"]["L1 to teacher"] > 0
    assert {"ms", "MB", "PSNR", "SSIM", "match@1", "cycle"} <= table["student"].keys()
    assert "1 threads" in out
    assert Path("generated_images/tiny_student/report_G_BA.png").is_file()
    assert "AtoB: tiny_student has no student for it" in out
    assert not Path("generated_images/tiny_student/report_G_AB.png").exists()
    distill.main(["--dataset_name", "tiny", "--report", "--direction", "AtoB", *CPU])
    table = json.loads(Path("generated_images/tiny_student/report.json").read_text())["G_AB"]
    assert table["teacher"]["parameters"] == table["student"]["parameters"]


# -- wrong flags -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher", "../x"], "--teacher"),
        (["--teacher", "nobody"], "--teacher nobody: no such run or file; runs found: tiny"),
        (["--teacher", "saved_models/tiny/run.json"], "saved_models/tiny/run.json: not a readable"),
        (["--hidden_layers", "0,1", "--student_residual", "1"], "--hidden_layers 0,1: expected 1 "),
        (["--hidden_layers", "3", "--student_residual", "1"], "from 0 to 2"),
        (["--hidden_layers", "x"], "--hidden_layers: given 'x'"),
        (["--channels", "1"], "--channels 1: the teacher saved_models/tiny/latest.pt has 3"),
        (
            ["--student_residual", "1", "--img_height", "4", "--img_width", "4"],
            "images of 4x4 px: 2 downsamplings need at least 8 px",
        ),
        (["--start_from", "latest"], "--start_from latest: no saved_models/tiny_student/latest.pt"),
        (["--start_from", "latest", "--overwrite"], "--overwrite contradicts --start_from latest"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(teacher, refused, flags, words):
    error = refused(distill.main, "--dataset_name", "tiny", *CPU, *flags)
    assert words in error
    assert one_line(error) == error
    assert not Path("saved_models/tiny_student").exists()
