import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_dataset

import distill
import test as test_stage
import train
from models import GeneratorConfig, build_generator, count_macs
from utils import load_state, read_losses
from weights import load_generator, save_generator

CPU = ["--device", "cpu", "--precision", "fp32"]


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
    distill.main(["--dataset_name", "tiny", *CPU, "--student_residual", "1", "--num_epochs", "1", *map(str, argv)])


def state_of(name):
    return load_state(Path("saved_models") / name / "latest.pt", "distill")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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


def test_the_student_learns_and_the_teacher_does_not(teacher, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        distill, "make_run", lambda args, nets, *rest, **kw: seen.setdefault("run", plain(args, nets, *rest, **kw))
    )
    plain, original = train.make_run, distill.load_teacher
    monkeypatch.setattr(distill, "load_teacher", lambda *a: seen.setdefault("teacher", original(*a)))
    starts = {}
    make = distill.make_nets
    monkeypatch.setattr(
        distill, "make_nets", lambda *a: starts.setdefault("nets", make(*a)) and snapshot(starts["nets"], starts)
    )

    def snapshot(nets, into):
        into["weights"] = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in nets.items()}
        return nets

    before = load_state(teacher / "latest.pt")["nets"]
    run()
    assert same(seen["teacher"].nets["G_BA"].state_dict(), before["G_BA"])
    assert same(load_state(teacher / "latest.pt")["nets"]["G_BA"], before["G_BA"])
    after = state_of("tiny_student")["nets"]
    for name in ("G_AB", "G_BA", "D_A", "D_B"):
        for key, value in starts["weights"][name].items():
            before_a_norm = any(part in key for part in ("stem.1", "down", "body", "up", "layers.2"))
            if not (key.endswith("bias") and before_a_norm):
                assert not torch.equal(value, after[name][key]), f"{name} {key} did not move"
    for part in ("stem", "down", "up", "head"):  # copied at step 0
        for key in (k for k in before["G_BA"] if k.startswith(part)):
            assert torch.equal(starts["weights"]["G_BA"][key], before["G_BA"][key])
    assert same(starts["weights"]["G_AB"], before["G_AB"])
    assert same(starts["weights"]["D_A"], before["D_A"])


def test_without_transfer_the_student_starts_new(teacher):
    net = load_generator(teacher / "G_BA.safetensors")[0]
    copied, fresh = (distill.make_student(net, 1, 4, transfer) for transfer in (True, False))
    assert torch.equal(copied.stem[1].weight, net.stem[1].weight)
    assert not torch.equal(fresh.stem[1].weight, net.stem[1].weight)
    assert len(copied.blocks) == 1
    assert torch.equal(
        distill.make_student(net, 3, 2, True).blocks[0].body[1].weight.mean().isfinite(), torch.tensor(True)
    )
    run("--no-transfer")
    assert Path("saved_models/tiny_scratch/G_BA.safetensors").is_file()


def test_a_student_file_is_a_generator_file_without_adapters(teacher):
    run("--student_ngf", 2)
    state = state_of("tiny_student")
    assert set(state["adapters"]) == {"G_BA_0.weight", "G_BA_0.bias"}
    assert state["adapters"]["G_BA_0.weight"].shape == (16, 8, 1, 1)
    net, recipe = load_generator(Path("saved_models/tiny_student/G_BA.safetensors"))
    assert net.config == GeneratorConfig(ngf=2, num_residual=1)
    assert not [name for name in net.state_dict() if "adapter" in name]
    assert (recipe["stage"], recipe["direction"]) == ("distill", "BtoA")
    test_stage.main(["--dataset_name", "tiny", "--run_name", "tiny_student", *CPU, "--metrics", "paired,losses"])
    train.main(["--dataset_name", "tiny", "--run_name", "tuned", *TINY[:4], *CPU, "--num_epochs", "1", "--n_layers_D", "1",
                "--init_from", "saved_models/tiny_student/G_BA.safetensors"])  # fmt: skip
    assert load_state(Path("saved_models/tuned/latest.pt"))["config"]["G_AB"]["ngf"] == 2


@pytest.mark.parametrize("flags", [(), ("--student_ngf", "2")])
def test_a_resumed_distillation_equals_an_uninterrupted_one_bit_for_bit(teacher, flags):
    run("--run_name", "whole", "--num_epochs", 3, "--checkpoint_interval", 1, *flags)
    run("--run_name", "parts", "--num_epochs", 3, "--checkpoint_interval", 1, *flags)
    distill.main(["--dataset_name", "tiny", "--run_name", "parts", "--start_from", "1", "--device", "cpu"])
    whole, parts = state_of("whole"), state_of("parts")
    for name in ("G_AB", "G_BA", "D_A", "D_B"):
        assert same(whole["nets"][name], parts["nets"][name])
    assert same(whole["adapters"], parts["adapters"])
    logs = [Path(f"saved_models/{name}/losses.csv").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert "output_BA,hidden_BA" in logs[0]


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


def test_hidden_states_and_pictures_of_the_teacher_are_learnt(teacher):
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


@pytest.mark.parametrize(
    ("flags", "size", "gmacs"),
    [
        ({}, 256, 49.55),
        ({}, 128, 12.39),
        ({"num_residual": 3}, 64, 1.29),
        ({"ngf": 32}, 256, 12.70),
        ({"num_residual": 3, "ngf": 16}, 256, 1.52),
    ],
)
def test_multiply_accumulates_are_those_of_the_published_networks(flags, size, gmacs):
    with torch.device("meta"):
        net = build_generator(GeneratorConfig(**flags))
    assert count_macs(net, size, size) / 1e9 == pytest.approx(gmacs, abs=0.006)


def test_the_report_compares_teacher_student_and_scratch(teacher, capsys, refused):
    assert "distil one first" in refused(distill.main, "--dataset_name", "tiny", "--report", *CPU)
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


def test_a_single_file_can_teach_one_direction(teacher, capsys, refused):
    shutil.move(teacher / "G_BA.safetensors", "alone.safetensors")
    flags = [
        "--teacher",
        "alone.safetensors",
        "--dataset_name",
        "tiny",
        *CPU,
        "--student_residual",
        "1",
        "--num_epochs",
        "1",
    ]
    flags += ["--batch_size", "2"]
    distill.main(flags)
    assert "the other one and the discriminators start new" in capsys.readouterr().out
    state = state_of("alone_student")
    assert state["args"]["img_height"] == 16
    assert state["config"]["G_AB"]["num_residual"] == 3
    assert state["config"]["G_BA"]["num_residual"] == 1
    assert "give that --direction" in refused(distill.main, *flags, "--direction", "AtoB", "--overwrite")
    assert "give that --direction" in refused(distill.main, *flags, "--direction", "both", "--overwrite")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher", "../x"], "expected one folder name"),
        (["--teacher", "nobody"], "--teacher nobody: no such run or file; runs found: tiny"),
        (["--teacher", "saved_models/tiny/run.json"], "not a readable"),
        (["--hidden_layers", "0,1", "--student_residual", "1"], "expected 1 teacher blocks"),
        (["--hidden_layers", "3", "--student_residual", "1"], "from 0 to 2"),
        (["--hidden_layers", "x"], "expected a whole number"),
        (["--channels", "1"], "the teacher saved_models/tiny/latest.pt has 3"),
        (["--img_height", "4", "--img_width", "4"], "need at least 8 px"),
        (["--start_from", "latest"], "none, nothing was saved yet"),
        (["--start_from", "latest", "--overwrite"], "give one of them"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(teacher, refused, flags, words):
    assert words in refused(distill.main, "--dataset_name", "tiny", *CPU, *flags)
    assert not Path("saved_models/tiny_student").exists()


def test_a_changed_teacher_and_another_student_are_refused_on_resume(teacher, refused):
    run()
    resume = ["--dataset_name", "tiny", "--start_from", "latest", "--device", "cpu", "--num_epochs", "2"]
    assert "--student_residual 2" in refused(distill.main, *resume, "--student_residual", "2")
    assert "a state of train.py" in refused(distill.main, *resume, "--run_name", "tiny")
    with (teacher / "latest.pt").open("ab") as file:
        file.write(b"\0")
    assert "not the teacher that" in refused(distill.main, *resume)


def test_a_larger_student_is_warned_about(teacher, capsys):
    net = load_generator(teacher / "G_BA.safetensors")[0]
    distill.make_student(net, 5, 8, False)
    assert "warning: the student is larger" in capsys.readouterr().out


# -- train.py --init_from and --freeze: what a student file is also good for -------------------


def tune(*argv):
    train.main(
        [
            "--dataset_name",
            "tiny",
            "--run_name",
            "tuned",
            *TINY,
            "--num_residual",
            "3",
            "--num_epochs",
            "1",
            *map(str, argv),
        ]
    )


def test_init_from_starts_where_the_files_end(teacher, monkeypatch, capsys):
    files = [teacher / "G_AB.safetensors", teacher / "G_BA.safetensors"]
    starts = []
    monkeypatch.setattr(train, "carry_out", lambda run, *_: starts.append(run))
    tune("--init_from", *files)
    for name, file in zip(("G_AB", "G_BA"), files, strict=True):
        assert same(starts[0].nets[name].state_dict(), load_generator(file)[0].state_dict())
        assert starts[0].nets[name].training
    tune("--init_from", files[1])
    assert "G_AB starts new" in capsys.readouterr().out
    assert same(starts[1].nets["G_BA"].state_dict(), load_generator(files[1])[0].state_dict())
    train.main(
        [
            "--dataset_name",
            "tiny",
            "--run_name",
            "tuned",
            *TINY[:4],
            *CPU,
            "--n_layers_D",
            "1",
            "--init_from",
            str(files[0]),
        ]
    )
    assert len(starts[2].nets["G_BA"].blocks) == 3  # the recipe comes from the file


def test_frozen_parts_do_not_move_and_the_rest_does(teacher, capsys):
    files = [teacher / "G_AB.safetensors", teacher / "G_BA.safetensors"]
    tune("--init_from", *files, "--freeze", "stem,down,blocks,D")
    out = capsys.readouterr().out
    assert "G_AB: stem frozen, down frozen, blocks frozen, up learns, head learns" in out
    assert "D_A: D frozen" in out
    state = load_state(Path("saved_models/tuned/latest.pt"))
    for file in files:
        before = load_generator(file)[0].state_dict()
        for key, value in before.items():
            moved = not torch.equal(state["nets"][file.stem][key], value)
            if key.endswith("weight"):
                assert moved == key.startswith(("up", "head")), key
            else:
                assert not moved or key.startswith(("up", "head"))
    fresh = train.make_nets(
        train.settle(train.parse_args(["--dataset_name", "tiny", *TINY, "--num_residual", "3"])), {}
    )
    assert same(state["nets"]["D_A"], fresh["D_A"].state_dict())
    train.main(
        [
            "--dataset_name",
            "tiny",
            "--run_name",
            "tuned",
            "--start_from",
            "latest",
            "--num_epochs",
            "2",
            "--device",
            "cpu",
        ]
    )
    again = load_state(Path("saved_models/tuned/latest.pt"))
    assert torch.equal(again["nets"]["G_AB"]["stem.1.weight"], state["nets"]["G_AB"]["stem.1.weight"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--init_from", "no.safetensors"], "no such file"),
        (["--init_from", "saved_models/tiny/G_AB.safetensors", "--ngf", "8"], "its network has ngf 4, not 8"),
        (
            ["--init_from", "saved_models/tiny/G_AB.safetensors", "saved_models/tiny/G_AB.safetensors"],
            "a second file for G_AB",
        ),
        (["--freeze", "stem,down,blocks,up,head"], "no part of the generators is left"),
        (["--freeze", "tail"], "expected some of stem,down,blocks,up,head,D"),
        (["--init_from", "x", "--start_from", "latest"], "give one of them"),
    ],
)
def test_wrong_transfers_are_refused(teacher, refused, flags, words):
    tiny = ["--dataset_name", "tiny", "--run_name", "tuned", *TINY, "--num_residual", "3"]
    assert words in refused(train.main, *tiny, *flags)
    assert not Path("saved_models/tuned").exists()


def test_save_generator_needs_no_run(tmp_path):
    net = build_generator(GeneratorConfig(ngf=2, num_residual=0))
    save_generator(tmp_path / "x.safetensors", net, {"direction": "BtoA", "size": [16, 16]})
    assert len(load_generator(tmp_path / "x.safetensors")[0].blocks) == 0


@pytest.mark.parametrize(("ngf", "said"), [(8, "stem, down, up, head"), (4, "no whole part: the widths differ")])
def test_what_a_student_takes_is_said_of_parts_that_it_has(ngf, said, capsys):
    teacher = build_generator(GeneratorConfig(ngf=8, num_residual=2), "normal")
    distill.make_student(teacher, 1, ngf, True)
    assert f"student takes from its teacher: {said}\n" in capsys.readouterr().out
