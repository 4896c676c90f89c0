"""What is measured during and after training, the averages that are shown, and the UNet-ViT through every stage."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_dataset, noise_picture
from test_train import differences, state_of, train_run

import distill
import metrics
import models
import test as test_stage
import train
import utils
from datasets import load_picture
from models import VIT_SIZES, VitSize
from utils import load_state, range_to_bytes, read_losses, save_state
from weights import load_generator, networks_of

VIT = ["--generator", "unet_vit"]
EVAL = ["--eval_interval", "1", "--eval_metrics", "losses,cycle,identity,paired"]
CPU = ["--device", "cpu", "--precision", "fp32"]


@pytest.fixture
def tiny_vit(monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, full=False))


def flags(*argv):
    """TINY without the flags that only a resnet has."""
    plain = [w for i, w in enumerate(TINY) if not {"--num_residual", "--ngf"} & set(TINY[max(0, i - 1) : i + 1])]
    return ["--dataset_name", "tiny", *(plain if "unet_vit" in argv else TINY), *map(str, argv)]


def run(*argv):
    train.main(flags(*argv))


# -- during training -------------------------------------------------------------------------


def test_evaluation_writes_a_row_an_interval_and_keeps_the_best_epoch(tiny, monkeypatch):
    psnr = iter([(20, 10), (25, 11), (21, 12), (24, 10)])  # mean of both directions is best in the second epoch
    plain = train.measure
    monkeypatch.setattr(
        train, "measure", lambda run: plain(run) | dict(zip(("PSNR_B", "PSNR_A"), next(psnr), strict=True))
    )
    run("--num_epochs", 4, *EVAL, "--best_by", "PSNR")
    rows = read_losses(Path("saved_models/tiny/measures.csv"))
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert {"cycle_A", "cycle_B", "identity_A", "identity_B", "SSIM_A", "match@1_B", "loss_G", "loss_D_A"} <= rows[
        0
    ].keys()
    assert state_of("tiny", "best.pt")["epoch"] == 2
    scores = test_stage.main(["--dataset_name", "tiny", "--epoch", "best", "--metrics", "cycle", *CPU])
    assert scores["AtoB"]["cycle"] == pytest.approx(rows[1]["cycle_A"], rel=1e-4)


def test_measures_during_training_equal_those_of_testing(tiny):
    run("--num_epochs", 1, *EVAL)
    row = read_losses(Path("saved_models/tiny/measures.csv"))[0]
    wanted = ["--metrics", "losses,cycle,identity,paired", "--output_size", "net"]
    scores = test_stage.main(["--dataset_name", "tiny", *wanted, *CPU])
    for direction, (source, target) in {"AtoB": "AB", "BtoA": "BA"}.items():
        assert row[f"cycle_{source}"] == pytest.approx(scores[direction]["cycle"], rel=1e-4)
        assert row[f"identity_{target}"] == pytest.approx(scores[direction]["identity"], rel=1e-4)
        assert row[f"match@1_{target}"] == scores[direction]["paired"]["model"]["match@1"]
        assert row[f"PSNR_{target}"] == pytest.approx(scores[direction]["paired"]["model"]["PSNR"], abs=0.1)
    for name, value in scores["losses"].items():
        assert row[name] == pytest.approx(value, rel=1e-4)


def test_the_val_split_is_evaluated_where_there_is_one(tiny, refused):
    for domain in "AB":
        shutil.move(tiny / f"test{domain}", tiny / f"val{domain}")
        (tiny / f"test{domain}").mkdir()
        noise_picture(7).save(tiny / f"test{domain}" / "x.png")
    args = train.settle(train.parse_args([*flags(), "--eval_interval", "1"]))
    assert train.find_held_out(args, tiny) == {"A": tiny / "valA", "B": tiny / "valB"}
    for path in (tiny / "valB").iterdir():
        path.unlink()
    assert "valB: no picture inside" in refused(train.main, *flags("--eval_interval", 1))


def test_a_resumed_run_cuts_measures_back_and_knows_its_best(tiny):
    run("--num_epochs", 3, "--checkpoint_interval", 1, *EVAL, "--best_by", "cycle")
    whole = Path("saved_models/tiny/measures.csv").read_text()
    best = state_of("tiny", "best.pt")["epoch"]
    train.main(["--dataset_name", "tiny", "--start_from", "1"])
    assert Path("saved_models/tiny/measures.csv").read_text() == whole
    assert state_of("tiny", "best.pt")["epoch"] == best


def test_evaluation_changes_nothing_about_the_training(tiny):
    run("--num_epochs", 2, "--run_name", "plain")
    run("--num_epochs", 2, "--run_name", "watched", *EVAL)
    assert differences(state_of("plain")["nets"], state_of("watched")["nets"]) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--gp_target", "1"], "without --lambda_gp"),
        (["--best_by", "PSNR"], "needs --eval_interval and paired"),
        (["--best_by", "loss_G", "--eval_interval", "1"], "needs --eval_interval and losses"),
        (["--eval_metrics", "psnr"], "expected some of losses,cycle,identity,paired"),
        (["--vit_blocks", "2"], "--vit_blocks: has no meaning for --generator resnet"),
        ([*VIT, "--vit_heads", "7"], "expected a divisor of 256"),
        ([*VIT, "--vit_size", "uvcgan"], "4 downsamplings need at least 32 px"),
        ([*VIT, "--num_residual", "9"], "--num_residual: has no meaning for --generator unet_vit"),
    ],
)
def test_contradicting_flags_are_refused_in_one_line(tiny, refused, given, words):
    assert words in refused(train.main, *flags(*given))
    assert not Path("saved_models/tiny").exists()


def test_pairs_that_are_none_are_refused(tiny, refused):
    for path in (tiny / "testB").iterdir():
        path.rename(path.with_stem(f"b{path.stem}"))
    assert "no picture in datasets/tiny/testA has the name" in refused(train.main, *flags(*EVAL))


# -- averages --------------------------------------------------------------------------------


def test_averages_follow_the_weights_by_the_stated_rule(tiny):
    ours = train_run(tiny, "--ema", "0.5")
    expected = {k: v.clone() for k, v in ours.nets["G_AB"].state_dict().items()}
    for step in range(4):
        real_A, real_B = torch.rand(2, 2, 3, 16, 16) * 2 - 1
        train.train_step(ours, real_A, real_B, train.cyclegan_objective)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in ours.nets["G_AB"].state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
        ours.step += 1
    for name, value in ours.ema["G_AB"].state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-7)
        assert not torch.equal(value, ours.nets["G_AB"].state_dict()[name])


def test_averages_are_what_is_shown_tested_shipped_and_taught(tiny):
    run("--num_epochs", 2, "--ema", 0.9, "--norm", "batch")
    state, path = state_of("tiny"), Path("saved_models/tiny/latest.pt")
    assert differences(state["ema"]["G_AB"], state["nets"]["G_AB"])
    shipped = load_generator(Path("saved_models/tiny/G_AB.safetensors"))[0].state_dict()
    assert differences(shipped, state["ema"]["G_AB"]) == []
    assert differences(networks_of(state, path)["G_AB"].state_dict(), state["ema"]["G_AB"]) == []
    assert differences(distill.load_teacher("tiny", ["G_AB"]).nets["G_AB"].state_dict(), state["ema"]["G_AB"]) == []


def test_an_average_can_begin_and_end_when_a_run_goes_on(tiny):
    run("--num_epochs", 1)
    before = state_of("tiny")["nets"]["G_AB"]
    train.main(["--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "2", "--ema", "0.999"])
    state = state_of("tiny")
    first = next(iter(before))
    low, high = (
        torch.minimum(before[first], state["nets"]["G_AB"][first]),
        torch.maximum(before[first], state["nets"]["G_AB"][first]),
    )
    assert ((state["ema"]["G_AB"][first] - low).min() > -1e-3) & ((high - state["ema"]["G_AB"][first]).min() > -1e-3)
    train.main(["--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "3", "--ema", "0"])
    assert state_of("tiny")["ema"] is None


def test_a_damaged_average_is_refused(tiny, refused):
    run("--num_epochs", 1, "--ema", 0.9)
    path = Path("saved_models/tiny/latest.pt")
    for spoil in ({"G_AB": {}}, {"other": {}}, [1]):
        save_state(path, load_state(path) | {"ema": spoil})
        refused(train.main, "--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "2")
        refused(test_stage.main, "--run_name", "tiny", "--epoch", "latest", "--metrics", "losses", *CPU)


# -- the whole way with a transformer, a penalty and averages --------------------------------


def test_a_unet_vit_trains_resumes_bit_for_bit_is_tested_and_taught(tiny, tiny_vit, refused, capsys):
    given = (*VIT, "--lambda_gp", "0.1", "--ema", "0.9", *EVAL)
    run(*given, "--num_epochs", 3, "--run_name", "whole")
    whole = state_of("whole")
    run(*given, "--num_epochs", 1, "--decay_epoch", 1, "--run_name", "parts")
    train.main(["--run_name", "parts", "--start_from", "latest", "--num_epochs", "3"])
    resumed = state_of("parts")
    for key in ("nets", "optims", "ema", "buffers", "rng"):
        assert differences(whole[key], resumed[key]) == [], key
    rows = read_losses(Path("saved_models/whole/losses.csv"))
    assert all(row["gp_A"] > 0 and row["gp_B"] > 0 for row in rows)
    words = refused(train.main, "--run_name", "whole", "--start_from", "latest", "--vit_blocks", "2")
    assert "--vit_blocks 2: the run in saved_models/whole was started with 4" in words
    scores = test_stage.main(["--run_name", "whole", "--metrics", "paired", "--scale", "native", *CPU])
    assert scores["AtoB"]["paired"]["model"]["PSNR"] > 0
    distill.main(["--teacher", "whole", "--student_residual", "2", "--num_epochs", "1", "--lambda_gp", "0", *CPU])
    assert "2 blocks:" in capsys.readouterr().out
    student = load_generator(Path("saved_models/whole_student/G_BA.safetensors"))[0]
    assert (student.config.generator, student.config.vit_blocks) == ("unet_vit", 2)
    words = refused(distill.main, "--teacher", "whole", "--student_ngf", "8", "--run_name", "thin", *CPU)
    assert "whose width is fixed" in words


def test_every_weight_of_a_unet_vit_learns(tiny, tiny_vit):
    args = train.settle(train.parse_args(flags(*VIT)))
    ours = train.make_run(args, train.make_nets(args, {}), tiny, torch.device("cpu"))
    before = {k: v.clone() for k, v in ours.nets["G_AB"].state_dict().items()}
    for _ in range(3):  # the blocks' scales leave 0 in the first step, the weights behind them in the second
        real_A, real_B = torch.rand(2, 2, 3, 16, 16) * 2 - 1
        train.train_step(ours, real_A, real_B, train.cyclegan_objective)
    after = ours.nets["G_AB"].state_dict()
    still = [name for name in before if torch.equal(before[name], after[name]) and not name.endswith("bias")]
    assert still == []


def test_too_many_tokens_are_refused_before_the_start_and_skipped_in_testing(
    tiny, tiny_vit, refused, monkeypatch, capsys
):
    run(*VIT, "--num_epochs", 1)
    monkeypatch.setattr(utils, "total_memory", lambda device: 4e5)
    words = refused(train.main, *flags(*VIT, "--run_name", "large", "--img_height", 64, "--img_width", 64))
    assert "256 tokens a picture at 64x64 px" in words
    assert "lower --img_height" in words
    noise_picture(1, (400, 400)).save("large.png")
    refused(test_stage.main, "--run_name", "tiny", "--input", "large.png", "--scale", "native", *CPU)


def test_files_from_before_a_flag_came_are_resumed_with_its_default(tiny, capsys):
    run("--num_epochs", 1)
    path = Path("saved_models/tiny/latest.pt")
    state = load_state(path)
    for name in ("ema", "vit_size", "vit_blocks", "vit_heads", "eval_interval"):
        del state["args"][name]
    for config in state["config"].values():
        for name in ("vit_size", "vit_blocks", "vit_heads"):
            config.pop(name, None)
    save_state(path, state)
    train.main(["--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "2"])
    assert "older than" in capsys.readouterr().out
    assert state_of("tiny")["epoch"] == 2


# -- FID and KID -----------------------------------------------------------------------------


def load(path):
    return range_to_bytes(load_picture(path, (32, 32)))


def test_missing_torch_fidelity_and_wrong_weights_are_one_line(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        noise_picture(i).save(path)
    given = (paths, paths, load, ["fid"])
    with pytest.raises(utils.InputError, match="no such file"):
        metrics.fid_kid(*given, tmp_path / "none.pth", torch.device("cpu"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(utils.InputError, match="not the weights that torch-fidelity takes"):
        metrics.fid_kid(*given, tmp_path / "other.pth", torch.device("cpu"))
    with pytest.raises(utils.InputError, match="1 picture on one side"):
        metrics.fid_kid(paths[:1], paths, load, ["fid"], None, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(utils.InputError, match=r"pip install -r requirements-metrics.txt"):
        metrics.fid_kid(*given, None, torch.device("cpu"))


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """A file of random weights: the path is real, the numbers mean nothing."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with monkeypatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
        net = library.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


@pytest.mark.slow
def test_fid_of_a_folder_against_itself_is_zero_and_rises_with_blur(tmp_path, inception, capsys):
    real = make_dataset(tmp_path / "pictures", (12, 1, 1, 1), (64, 64)) / "trainA"
    paths = sorted(real.iterdir())
    values = []
    for strength in (0, 1, 4):
        blurred = []
        for path in paths:
            blurred.append(tmp_path / f"{strength}-{path.name}")
            picture = utils.tensor_to_picture(load_picture(path, (64, 64)))
            side = 64 // (strength + 1)
            picture.resize((side, side)).resize((64, 64)).save(blurred[-1])
        values.append(metrics.fid_kid(blurred, paths, load, ["fid", "kid"], inception, torch.device("cpu")))
    assert "12 against 12 pictures are biased" in capsys.readouterr().out
    fids = [row["FID"] for row in values]
    assert fids[0] == pytest.approx(0, abs=1e-3)
    assert fids == sorted(fids)
    assert fids[1] > 10 * abs(fids[0])
    assert (values[0]["translated"], values[0]["real"]) == (12, 12)


@pytest.mark.slow
def test_kid_is_taken_against_the_test_and_the_training_pictures(tiny, inception):
    run("--num_epochs", 1)
    scores = test_stage.main(
        ["--dataset_name", "tiny", "--metrics", "kid", "--inception_weights", str(inception), *CPU]
    )
    table = scores["AtoB"]["distribution"]
    assert table.keys() == {"testB", "trainB"}
    assert (table["testB"]["translated"], table["testB"]["real"], table["trainB"]["real"]) == (2, 2, 4)
    assert table["testB"]["KID"] != table["trainB"]["KID"]


def test_all_losses_are_those_of_a_training_step(tiny):
    ours = train_run(tiny)
    real_A, real_B = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    before = models.all_losses(
        ours.nets, real_A, real_B, "lsgan", lambda_gan=1.0, lambda_cycle=10.0, lambda_identity=5.0
    )
    step = train.train_step(ours, real_A, real_B, train.cyclegan_objective)
    assert before.keys() == step.keys()
    for name in before:
        assert before[name].item() == pytest.approx(step[name].item(), rel=1e-4), name
