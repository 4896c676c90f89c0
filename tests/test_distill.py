"""Distillation: what a student starts from, learns and inherits, how it resumes, and what is refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, differences, make_dataset, tiny_networks
from tiny_runs import run_tiny, save_pair, state_of
from tiny_steps import batch
from torch import nn

import distill
import test as test_command
import train
from cyclegan import LossConfig, generator_loss
from datasets import DataConfig
from distill import DistillationConfig, DistillationLoss
from models import DIRECTIONS, GeneratorConfig, build_generator
from toolkit import report
from toolkit.checkpoints import load_state, set_aside
from toolkit.config import RunConfig
from toolkit.converters import to_junyanz
from toolkit.logs import read_losses
from toolkit.weights import load_generator
from utils import InputError, one_line

A_TO_B, B_TO_A = DIRECTIONS
STUDENT = Path("saved_models/tiny_student")
COMMON = ["--dataset_name", "tiny", "--device", "cpu", "--precision", "fp32"]
NOTHING_ELSE = "--lambda_gan 0 --lambda_cycle 0 --lambda_identity 0 --lambda_output 0".split()  # than hidden states
pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set and a teacher of 3 blocks, made once."""
    root = tmp_path_factory.mktemp("trained")
    make_dataset(root / "datasets" / "tiny", (4, 4, 2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run_tiny("--num_residual", 3, "--num_epochs", 2)
    return root


@pytest.fixture
def teacher(trained, tmp_path):
    for name in ("datasets", "saved_models"):
        shutil.copytree(trained / name, tmp_path / name)
    return tmp_path / "saved_models/tiny"


def distil(*argv):
    """Distil a student of one block from the run named tiny, in one epoch unless `argv` says otherwise."""
    distill.main([*COMMON, "--student_residual", "1", "--num_epochs", "1", *map(str, argv)])


def same(one, other):
    return differences(dict(one), dict(other)) == []


# -- the objective ---------------------------------------------------------------------------


@pytest.mark.parametrize("ngf", [4, 2])
def test_the_objective_adds_the_distances_to_the_teachers_images_and_hidden_states(ngf):
    networks = tiny_networks(num_residual=1, ngf=ngf)
    teachers = {"G_BA": build_generator(GeneratorConfig(ngf=4, num_residual=3)).requires_grad_(False)}
    adapters = distill.make_adapters(teachers, networks, {"G_BA": [2]})
    assert list(adapters) == ([] if ngf == 4 else ["G_BA_0"])  # only where the widths differ
    objective = DistillationLoss(teachers, adapters, {"G_BA": [2]}, lambda_hidden=3, lambda_output=7)
    real = batch(0, 2)[0]
    plain, _, _ = generator_loss(networks, B_TO_A, real, LossConfig())
    loss, terms, translation = objective(networks, B_TO_A, real, LossConfig())
    target, targets = teachers["G_BA"](real, return_hidden=True)
    _, (hidden,) = networks["G_BA"](real, return_hidden=True)
    if ngf == 2:
        hidden = adapters["G_BA_0"](hidden)
    output = (translation.fake - target).abs().mean().item()
    distance = (hidden - targets[2]).square().mean().item()
    assert (terms["output_BA"].item(), terms["hidden_BA"].item()) == pytest.approx((output, distance))
    assert loss.item() == pytest.approx(plain.item() + 3 * distance + 7 * output)
    assert "output_AB" not in objective(networks, A_TO_B, real, LossConfig())[1]  # no student


def test_hidden_loss_is_the_mean_over_the_pairs_and_refuses_other_shapes():
    zeros = torch.zeros(1, 2, 3, 3)
    assert distill.hidden_loss([zeros, zeros], [zeros + 1, zeros + 3]).item() == (1 + 9) / 2
    for targets in ([zeros], [zeros, zeros[:, :1]]):
        with pytest.raises(ValueError, match="differ in number or shape"):
            distill.hidden_loss([zeros, zeros], targets)


@pytest.mark.parametrize(
    ("teacher_blocks", "pairs"),
    [(9, [1, 4, 8]), (6, [1, 3, 5]), (9, list(range(9))), (9, [8]), (4, [1, 3]), (3, [0, 0, 1, 1, 2]), (9, [])],
)
def test_blocks_are_paired_evenly(teacher_blocks, pairs):
    assert distill.pair_blocks(teacher_blocks, len(pairs)) == pairs
    assert distill.pair_blocks(0, len(pairs)) == []


# -- what a student starts from --------------------------------------------------------------


def is_new(part):
    """Whether all convolutions of a part have weights near 0, unlike those of `unusual_teacher`, and biases of 0."""
    convs = [module for module in part.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    assert convs
    return all(conv.weight.abs().max() < 0.2 and not conv.bias.any() for conv in convs)


@pytest.mark.parametrize(
    ("changes", "student", "copied"),
    [
        ({}, {"transfer": False}, []),
        ({}, {"student_residual": 2}, ["stem", "down", "up", "head"]),
        ({}, {"student_ngf": 4}, []),
        ({}, {"student_skips": True}, ["stem", "down", "up", "head"]),
        ({"skips": True}, {"student_skips": False}, ["stem", "down", "up", "head"]),
        ({"skips": True}, {}, ["stem", "down", "up", "skips", "head"]),
    ],
)
def test_a_student_starts_from_the_parts_of_its_teacher_that_have_the_same_shape(changes, student, copied, capsys):
    teacher = build_generator(GeneratorConfig(ngf=8, num_residual=3, **changes))
    for p in teacher.parameters():
        nn.init.uniform_(p, 0.5, 1)
    config = DistillationConfig(**student)
    shape = distill.student_config(config, teacher.config)
    net = distill.make_student(teacher, shape, config.transfer)
    assert shape == dataclasses.replace(
        teacher.config,
        num_residual=config.student_residual,
        ngf=config.student_ngf or 8,
        skips=student.get("student_skips", teacher.config.skips),
    )
    for name, part in net.named_children():
        if name in copied:
            assert same(part.state_dict(), getattr(teacher, name).state_dict()), name
        elif name != "head":  # whose biases have the same shape whatever the width
            assert is_new(part), name
    if config.transfer:
        listed = ", ".join(copied) or "no whole part: the widths differ"
        assert f"student takes from its teacher: {listed}\n" in capsys.readouterr().out


def test_the_other_networks_continue_from_the_teachers_run(teacher):
    student = DistillationConfig(direction="BtoA", student_residual=1)
    config = SimpleNamespace(run=RunConfig(), data=DataConfig(img_height=16, img_width=16))
    networks = distill.make_student_networks(config, student, distill.load_teacher("tiny", student.directions))
    state = state_of("tiny")["nets"]
    for name, net in networks.items():
        assert same(net.state_dict(), state[name]) == (name != "G_BA")
        assert net.training
        assert all(p.requires_grad for p in net.parameters())
    assert len(networks["G_BA"].blocks) == 1


# -- training --------------------------------------------------------------------------------


def test_students_inherit_the_options_of_the_teachers_run_and_learn_in_both_directions(teacher, capsys):
    before = (teacher / "latest.pt").read_bytes()
    distill.main([*COMMON, "--student_residual", "1", "--student_ngf", "2", "--checkpoint_interval", "1"])
    out = capsys.readouterr().out
    assert "inherited from saved_models/tiny/latest.pt:" in out
    assert "--batch_size 2" in out
    for name in ("G_AB", "G_BA"):
        costs = r"[0-9,]+ parameters \(its teacher [0-9,]+, .* million multiply-accumulates an image of 16x16 px .* ms on cpu"
        assert re.search(f"student {name}, 1 blocks: {costs}", out)
    first = load_state(STUDENT / "epoch_0001.pt")
    state = state_of("tiny_student")
    assert (state["args"]["num_epochs"], state["args"]["direction"], state["step"]) == (2, "both", 4)
    assert state["teacher"]["path"] == "saved_models/tiny/latest.pt"
    assert [state["config"][name]["num_residual"] for name in ("G_AB", "G_BA")] == [1, 1]
    assert set(state["adapters"]) == {"G_AB_0.weight", "G_AB_0.bias", "G_BA_0.weight", "G_BA_0.bias"}
    weights = state["nets"] | {"adapters": state["adapters"]}
    earlier = first["nets"] | {"adapters": first["adapters"]}
    for name, values in weights.items():
        unchanged = [key for key, value in values.items() if torch.equal(value, earlier[name][key])]
        assert [key for key in unchanged if key.endswith("weight")] == [], name
    assert {"output_AB", "hidden_AB", "output_BA", "hidden_BA"} <= read_losses(STUDENT / "losses.csv")[0].keys()
    assert (teacher / "latest.pt").read_bytes() == before


def test_a_student_with_blocks_can_learn_from_hidden_states_alone(teacher):
    distil("--steps_per_epoch", 1, *NOTHING_ELSE)
    assert read_losses(STUDENT / "losses.csv")[0]["hidden_AB"] > 0


def test_the_generators_of_a_teacher_can_differ_in_their_blocks(teacher):
    distil("--direction", "AtoB", "--student_residual", 2, "--run_name", "half")  # its G_BA keeps 3 blocks
    distil("--teacher", "half", "--student_residual", 1, "--student_ngf", 2, "--run_name", "both")
    state = state_of("both")
    assert [state["config"][name]["num_residual"] for name in ("G_AB", "G_BA")] == [1, 1]
    assert {"hidden_AB", "hidden_BA"} <= read_losses(Path("saved_models/both/losses.csv"))[0].keys()


def test_the_file_of_a_student_is_an_ordinary_generator_without_adapters(teacher):
    distil("--direction", "BtoA", "--student_ngf", 2)
    path = STUDENT / "G_BA.safetensors"
    net, metadata = load_generator(path)
    assert net.config == GeneratorConfig(ngf=2, num_residual=1)
    assert (metadata["stage"], metadata["direction"]) == ("distill", "BtoA")
    test_command.main([*COMMON, "--run_name", "tiny_student", "--metrics", "paired,losses"])
    train.main(
        [*COMMON, *TINY[:4], "--run_name", "tuned", "--num_epochs", "1", "--n_layers_D", "1", "--init_from", str(path)]
    )
    assert state_of("tuned")["config"]["G_AB"]["ngf"] == 2


@pytest.mark.parametrize("kind", ["ours", "junyanz"])
def test_a_single_file_can_be_the_teacher_of_its_direction(teacher, capsys, refused, kind):
    if kind == "ours":
        file = shutil.move(teacher / "G_BA.safetensors", "alone.safetensors")
        options = []  # its metadata has the data set and the size
    else:
        file = "alone_net_G_B.pth"
        torch.save(to_junyanz(load_generator(teacher / "G_BA.safetensors")[0]), file)
        options = ["--dataset_name", "tiny", *TINY[:4]]
    options += ["--teacher", file, "--run_name", "alone", "--device", "cpu", "--student_residual", "1"]
    distill.main([*options, "--batch_size", "2", "--num_epochs", "1"])
    out = capsys.readouterr().out
    assert f"{file}: a single generator" in out
    assert "inherited" not in out
    assert "--dataset_name tiny" in out or kind == "junyanz"
    state = state_of("alone")
    assert (state["args"]["img_height"], state["args"]["direction"]) == (16, "BtoA")
    assert [state["config"][name]["num_residual"] for name in ("G_AB", "G_BA")] == [3, 1]
    distill.main(["--run_name", "alone", "--start_from", "latest", "--num_epochs", "2", "--device", "cpu"])
    assert state_of("alone")["epoch"] == 2
    for direction in ("AtoB", "both"):
        error = refused(distill.main, *options, "--direction", direction, "--overwrite")
        assert f"--teacher {file}: translates BtoA, not AtoB" in error


def test_a_file_of_another_project_can_be_the_teacher_of_both_directions_or_of_one_that_is_said(capsys):
    nets = {name: to_junyanz(build_generator(GeneratorConfig(ngf=2, num_residual=1))) for name in ("G_BA", "G_AB")}
    torch.save(nets, "both.pth")
    assert distill.load_teacher("both.pth", DIRECTIONS).networks.keys() == nets.keys()
    assert "a pair of generators, so the discriminators are newly initialised" in capsys.readouterr().out
    assert [*distill.load_teacher("both.pth", DIRECTIONS[1:]).networks] == ["G_BA"]
    torch.save(nets["G_AB"], "alone.pth")
    assert [*distill.load_teacher("alone.pth", DIRECTIONS).networks] == ["G_AB"]
    assert "alone.pth: does not say its direction; used as AtoB" in capsys.readouterr().out


# -- resuming --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--student_ngf", "2", "--student_skips", "--no-transfer")])
def test_a_resumed_distillation_equals_an_uninterrupted_one_bit_for_bit(teacher, options):
    for name in ("whole", "parts"):
        distil("--direction", "BtoA", "--run_name", name, "--num_epochs", 3, "--checkpoint_interval", 1, *options)
    distill.main([*COMMON, "--run_name", "parts", "--start_from", "1"])
    whole, parts = (state_of(name) for name in ("whole", "parts"))
    for key in ("nets", "adapters", "optims", "buffers", "rng"):
        assert differences(whole[key], parts[key]) == [], key
    logs = [Path(f"saved_models/{name}/losses.csv").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert "output_BA,hidden_BA" in logs[0]


def test_the_size_of_a_student_is_checked_only_at_its_start(teacher, monkeypatch):
    distil("--steps_per_epoch", 1)
    monkeypatch.setattr(report, "refuse_large", lambda *_: pytest.fail("a resumed run is refused"))
    distill.main([*COMMON, "--start_from", "latest", "--num_epochs", "2"])
    assert state_of("tiny_student")["epoch"] == 2


def test_another_student_and_a_teacher_that_has_changed_are_refused_on_resume(teacher, refused):
    distil("--direction", "BtoA")
    resume = [*COMMON, "--start_from", "latest", "--num_epochs", "2"]
    assert "--student_residual 2" in refused(distill.main, *resume, "--student_residual", "2")
    assert "--student_skips True: saved_models/" in refused(distill.main, *resume, "--student_skips")
    assert "a state of train.py" in refused(distill.main, *resume, "--run_name", "tiny")
    shutil.copy(teacher / "latest.pt", teacher / "epoch_0001.pt")
    with (teacher / "latest.pt").open("ab") as file:
        file.write(b"\0")
    assert "saved_models/tiny/latest.pt: not the teacher of" in refused(distill.main, *resume)
    distill.main([*resume, "--teacher", str(teacher / "epoch_0001.pt"), "--run_name", "tiny_student"])
    assert state_of("tiny_student")["epoch"] == 2


# -- report and refusals ---------------------------------------------------------------------


def test_the_report_compares_teacher_student_and_scratch(teacher, capsys, refused):
    report = [*COMMON, "--report"]
    assert "--report: no student in saved_models/tiny_student" in refused(distill.main, *report)
    distil("--direction", "BtoA")
    distil("--direction", "BtoA", "--no-transfer")
    assert not state_of("tiny_scratch")["args"]["transfer"]
    folder = Path("generated_images/tiny_student")
    for run_name in ("tiny_student", "tiny_scratch"):  # of runs whose overwriting was killed
        set_aside(run_name)
    distill.main(report)
    table = json.loads((folder / "report.json").read_text())["G_BA"]
    assert list(table) == ["teacher", "student", "scratch"]
    assert (folder / "report_G_BA.png").is_file()
    assert "AtoB: tiny_student has no student for it" in capsys.readouterr().out
    assert not (folder / "report_G_AB.png").exists()
    distill.main([*report, "--direction", "AtoB"])
    assert "G_AB" in json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"student_ngf": 32}, "--student_ngf 32: fixed for a unet_vit; leave it out"),
        ({"student_skips": False}, "--student_skips: a unet_vit has fixed skip connections; leave it out"),
    ],
)
def test_the_student_of_a_unet_vit_can_only_have_fewer_blocks(student, message):
    assert distill.student_config(DistillationConfig(), GeneratorConfig("unet_vit")).vit_blocks == 3
    with pytest.raises(InputError, match=f"^{message}$"):
        distill.student_config(DistillationConfig(**student), GeneratorConfig("unet_vit"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student_residual", "2", "--student_ngf", "8"], "--student_residual 2: a student of "),
        ([], "3: a student of 18,019 parameters is not smaller than its teacher of 18,019; take fewer blocks"),
        (["--teacher", "../x"], "--teacher"),
        (
            ["--assume", "zeros"],
            "--assume zeros: of weights of other projects, and saved_models/tiny/latest.pt is a run's",
        ),
        (["--teacher", "nobody"], "--teacher nobody: no such run or file; runs found: tiny"),
        (["--teacher", "saved_models/tiny/run.json"], "saved_models/tiny/run.json: not a readable"),
        (["--run_name", "tiny", "--overwrite"], "--run_name tiny: the teacher is there"),
        (["--hidden_layers", "0,1", "--student_residual", "1"], "--hidden_layers 0,1: expected 1 "),
        (["--hidden_layers", "3", "--student_residual", "1"], "from 0 to 2"),
        (["--hidden_layers", "x"], "--hidden_layers: given 'x'"),
        (["--student_residual", "0", "--lambda_hidden", "3"], "--lambda_hidden 3: networks of 0 blocks have no hidden"),
        (["--channels", "1"], "--channels 1: the teacher saved_models/tiny/latest.pt has 3"),
        (["--student_residual", "1", "--img_height", "4"], "images of 16x4 px: the generator needs 8 px"),
        (["--student_residual", "0", *NOTHING_ELSE], "--lambda_output are all 0: nothing is left to learn"),
        (["--start_from", "latest"], "--start_from latest: no saved_models/tiny_student/latest.pt"),
        (["--start_from", "latest", "--overwrite"], "--overwrite contradicts --start_from latest"),
    ],
)
def test_wrong_options_are_refused_in_one_line(teacher, refused, options, message):
    error = refused(distill.main, *COMMON, "--cache", "disk", *options)
    assert message in error
    assert one_line(error) == error
    assert not STUDENT.exists()
    assert not Path("datasets/tiny/.cache").exists()


def test_images_that_are_too_small_for_the_discriminators_are_refused_without_flags_of_train(tiny, refused):
    save_pair("flat", G_AB=build_generator(GeneratorConfig(ngf=4, num_residual=2, n_downsampling=0)))
    small = ["--student_residual", 1, "--img_height", 4, "--img_width", 4, *COMMON]
    error = refused(distill.main, "--teacher", "saved_models/flat/G_AB.safetensors", *small)
    assert error == "error: images of 4x4 px: the discriminators need 6 px; raise --img_height, --img_width"


def test_skip_connections_of_a_student_without_downsampling_are_refused(tiny, refused):
    save_pair("flat", G_AB=build_generator(GeneratorConfig(ngf=4, num_residual=2, n_downsampling=0)))
    small = ["--student_residual", 1, "--student_skips", *COMMON]
    error = refused(distill.main, "--teacher", "saved_models/flat/G_AB.safetensors", *small)
    assert "--student_skips: has no effect without downsampling layers; leave it out" in error
