"""train.py from the command line: what a run leaves, shows, resumes, evaluates and refuses."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from breakage import before_steps, steps_that_take, stops_in_step
from conftest import TINY, differences, make_dataset, noise_image
from tiny_runs import run_tiny, save_run, state_of

import cyclegan
import datasets
import distill
import test as test_command
import train
from models import DIRECTIONS, VIT_SIZES, VitSize
from toolkit import cli, logs, metrics, monitor, synthetic
from toolkit.checkpoints import load_state, networks_of, save_state
from toolkit.converters import to_junyanz
from toolkit.logs import read_losses
from toolkit.weights import load_generator

pytestmark = pytest.mark.usefixtures("no_plots")
ROOT = Path(train.__file__).parent
SAVED = Path("saved_models/tiny")
DRAWN = Path("generated_images/tiny")
START = ["--dataset_name", "tiny", *TINY]
RESUME = ["--dataset_name", "tiny", "--start_from", "latest", "--device", "cpu"]
CPU = ["--device", "cpu", "--precision", "fp32"]
EVAL = ["--eval_interval", "1", "--eval_metrics", "losses,cycle,identity,paired"]
VIT = ["--dataset_name", "tiny", "--generator", "unet_vit"]
VIT += [word for i, word in enumerate(TINY) if not {"--num_residual", "--ngf"} & {*TINY[max(0, i - 1) : i + 1]}]


def weights_of(path):
    return load_generator(path)[0].state_dict()


def losses_of(name="tiny"):
    return read_losses(Path("saved_models", name, "losses.csv"))


# -- what a run leaves -----------------------------------------------------------------------


def test_a_run_leaves_the_files_that_the_design_promises(tiny, monkeypatch):
    monkeypatch.setattr(monitor, "plot_losses", logs.plot_losses)
    noise_image(5, (40, 30)).save("cat.jpg")
    run_tiny("--num_epochs", 2, "--checkpoint_interval", 2, "--watch", "cat.jpg", "--eval_interval", 2)
    assert {path.name for path in SAVED.iterdir()} == {
        *("latest.pt", "previous.pt", "epoch_0002.pt", "G_AB.safetensors", "G_BA.safetensors"),
        *("run.json", "losses.csv", "measures.csv", ".lock"),
    }
    assert {str(path.relative_to(DRAWN)) for path in DRAWN.rglob("*") if path.is_file()} == {
        *("index.html", "epoch_0001.png", "epoch_0002.png", "losses.png"),
        *("watch/cat/epoch_0001.png", "watch/cat/epoch_0002.png"),
    }
    state = state_of("tiny")
    assert state.keys() >= {
        *("format", "stage", "epoch", "step", "args", "config", "nets", "optims", "best"),
        *("buffers", "rng", "meter", "step_in_epoch", "micro_batch_size", "ema", "scaler", "range"),
    }
    assert (state["epoch"], state["step"], state["range"]) == (2, 6, [-1, 1])
    assert set(state["nets"]) == {"G_AB", "G_BA", "D_A", "D_B"}
    facts = json.loads((SAVED / "run.json").read_text())
    assert facts["images"] == {"A": 5, "B": 4}
    assert facts["flags"]["lambda_cycle"] == 10.0
    assert facts["parameters"]["G_AB"] == sum(x.numel() for x in state["nets"]["G_AB"].values())
    assert [(row["epoch"], row["step"]) for row in losses_of()] == [(1, 3), (2, 6)]
    assert [row["lr"] for row in losses_of()] == pytest.approx([2e-4, 2e-4])  # decay from 1 to 2: full, then half
    assert (SAVED / "latest.pt").samefile(SAVED / "epoch_0002.pt")  # one copy on disk
    page = (DRAWN / "index.html").read_text()
    links = re.findall(r'<a href="([^"]*)"><img loading="lazy" src="data:image/jpeg;base64,[^"]{50,}"', page)
    watched = ["watch/cat/epoch_0001.png", "watch/cat/epoch_0002.png"]
    assert links == ["epoch_0002.png", "losses.png", "epoch_0001.png", *watched]
    assert "2 of 2 epochs" in page
    assert "identity_A" in page
    assert "http" not in page  # nothing from other servers


@pytest.mark.slow
def test_one_batch_can_be_overfitted(tmp_path):
    make_dataset(tmp_path / "datasets" / "one", (1, 1, 1, 1), (16, 16))
    argv = ["--dataset_name", "one", *TINY, "--ngf", "8", "--batch_size", "1", "--load_scale", "1", "--no-flip"]
    train.main([*argv, "--lr", "2e-3", "--num_epochs", "1", "--steps_per_epoch", "120"])
    rows = losses_of("one")
    assert len(rows) == 6
    for term in ("loss_G", "cycle_A", "cycle_B", "identity_A", "identity_B"):
        assert rows[-1][term] < 0.5 * rows[0][term], term


# -- a dry run -------------------------------------------------------------------------------


def test_a_dry_run_prints_configuration_parameters_images_and_minutes_and_writes_nothing(tiny, capsys):
    before = sorted(Path().rglob("*"))
    run_tiny("--dry_run", "--num_epochs", 7)
    out = capsys.readouterr().out
    for text in (
        *("--lambda_cycle 10.0\n", "--num_epochs 7\n", "--img_height 16\n", "--vit_blocks 4\n", "D_B: "),
        *("5 images in trainA, 4 in trainB; 3 steps of 2 an epoch, 21 in all", " a step: about "),
    ):
        assert text in out, text
    save_run("teacher", 1, num_residual=3)
    capsys.readouterr()
    saved = sorted(Path().rglob("*"))
    distill.main(["--teacher", "teacher", "--student_residual", "1", "--num_epochs", "7", "--dry_run", *CPU])
    out = capsys.readouterr().out
    for text in ("--lambda_cycle 10.0\n", "--student_residual 1\n", "21 in all", " a step: about "):
        assert text in out, text
    assert sorted(Path().rglob("*")) == saved
    shutil.rmtree("saved_models")
    assert sorted(Path().rglob("*")) == before


def test_the_demo_set_is_drawn_when_it_is_missing_but_not_in_a_dry_run(monkeypatch, capsys):
    folders = {split: (time, seed, 2) for split, (time, seed, _) in synthetic.DEMO_FOLDERS.items()}
    monkeypatch.setattr(synthetic, "DEMO_FOLDERS", folders)
    argv = ["--dataset_name", "day2night", *TINY, "--num_epochs", "1"]
    train.main([*argv, "--dry_run"])
    assert "2 images in trainA, 2 in trainB; 1 step of 2 an epoch, 1 in all" in capsys.readouterr().out
    assert not Path("datasets").exists()
    train.main(argv)
    assert Path("datasets/day2night/trainA/0001.png").exists()
    assert Path("saved_models/day2night/latest.pt").exists()


# -- what a run shows ------------------------------------------------------------------------


def test_grids_and_the_page_are_renewed_within_an_epoch(tiny, monkeypatch):
    drawn = []
    fractions = []
    monkeypatch.setattr(monitor.Clock, "page_due", lambda clock: True)
    monkeypatch.setattr(monitor.Monitor, "write_index", lambda self, facts, fraction: fractions.append(fraction))
    monkeypatch.setattr(monitor, "save_image", lambda image, path: drawn.append(path.name))
    run_tiny("--num_epochs", 1, "--steps_per_epoch", 5, "--sample_interval", 2)
    assert drawn == ["epoch_0001.png"] * 3  # steps 2, 4 and the end
    assert fractions == sorted(fractions)
    assert set(fractions) == {0, 0.2, 0.4, 0.6, 0.8, 1.0}  # the page is there from the start


def test_a_slow_run_says_how_long_it_takes_and_shows_an_early_grid_and_the_time_left(tiny, monkeypatch, capsys):
    drawn = []
    facts = []
    monkeypatch.setattr("toolkit.monitor.save_image", lambda image, path: drawn.append(path.name))
    monkeypatch.setattr(monitor.Monitor, "write_index", lambda self, line, fraction: facts.append(line))
    with steps_that_take(2000):
        run_tiny("--num_epochs", 2)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if "a step, " in line]
    assert lines == ["33 minutes a step, 100 minutes an epoch: this run will take about 2.2 hours more"]  # 4 steps
    assert err.count("an epoch takes 100 minutes on this CPU; docs/recipes.md") == 1
    assert drawn == ["epoch_0001.png"] * 2 + ["epoch_0002.png"]  # after the first step, and at the ends of epochs
    assert "; step 2; about 2.2 hours left; written" in "".join(facts)
    assert "left" not in facts[-1]
    with stops_in_step(2, signal.SIGINT), steps_that_take(2000):
        run_tiny("--num_epochs", 4, "--start_from", "latest")
    assert "; step 8; stopped, resume with --start_from latest; written" in facts[-1]
    capsys.readouterr()
    with steps_that_take(9):
        run_tiny("--num_epochs", 1, "--run_name", "fast")
    out, err = capsys.readouterr()
    assert "a step, " not in out
    assert "CPU;" not in err


def test_the_printed_commands_test_and_resume_the_run_wherever_its_images_are(tmp_path, capsys):
    make_dataset(tmp_path / "my sets/tiny")
    run_tiny("--data_root", "my sets", "--run_name", "my run", "--num_epochs", 1)
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1].partition("then: ")[2])
    assert (words[0], words[2:]) == ("python", ["--run_name", "my run"])
    assert Path(words[1]).samefile(ROOT / "test.py")
    test_command.main([*words[2:], *CPU])
    assert len(list(Path("generated_images/my run/test/fake_B").iterdir())) == 2
    assert load_generator(Path("saved_models/my run/G_AB.safetensors"))[1]["data_root"] == "my sets"
    with stops_in_step(1, signal.SIGINT):
        run_tiny("--run_name", "my run", "--start_from", "latest", "--num_epochs", 2)
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1].partition("go on with: ")[2])
    train.main([*words[2:], "--device", "cpu"])
    assert state_of("my run")["epoch"] == 2


@pytest.mark.usefixtures("no_plots")
def test_the_names_of_the_domains_are_those_of_the_data_set_wherever_they_are_shown(tiny):
    (tiny / "domains.json").write_text('["dogs", "cats"]')
    run_tiny("--num_epochs", 1, "--checkpoint_interval", 1)
    assert "tiny: dogs ↔ cats" in (DRAWN / "index.html").read_text(encoding="utf-8")
    assert load_generator(SAVED / "G_AB.safetensors")[1]["domains"] == ["dogs", "cats"]
    (tiny / "domains.json").write_text(10**5 * "[")
    assert datasets.domain_names(tiny) == ("A", "B")
    (tiny / "domains.json").unlink()
    for epoch in ("latest", "1"):
        test_command.main(["--run_name", "tiny", "--epoch", epoch, *CPU])
        assert "<h2>dogs → cats: 2 images</h2>" in (DRAWN / "test/index.html").read_text(encoding="utf-8")
    make_dataset(tiny.parent / "horse2zebra")
    test_command.main(["--run_name", "tiny", "--dataset_name", "horse2zebra", *CPU])
    assert "<h2>horse → zebra: 2 images</h2>" in (DRAWN / "test/index.html").read_text(encoding="utf-8")


def test_tensorboard_logs_all_starts_of_a_run_and_a_new_run_deletes_the_log(tiny):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_tiny("--num_epochs", 1, "--log", "tensorboard")
    train.main([*RESUME, "--num_epochs", "2"])
    events = accumulator.EventAccumulator(str(SAVED / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("losses/loss_G")] == [3, 6]
    assert [event.step for event in events.Images("grid")] == [3, 6]
    run_tiny("--num_epochs", 1, "--overwrite", "--steps_per_epoch", 1)
    assert not (SAVED / "tensorboard").exists()
    assert "step 1;" in (DRAWN / "index.html").read_text()


# -- resuming --------------------------------------------------------------------------------


def without(state, *names):
    """A state without some of its options."""
    return {**state, "args": {name: value for name, value in state["args"].items() if name not in names}}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_three_epochs_equal_one_and_two_resumed_bit_for_bit(tiny, workers):
    common = ("--num_workers", workers, "--buffer_size", 3, "--checkpoint_interval", 1)
    for name in ("whole", "parts"):
        run_tiny("--run_name", name, "--num_epochs", 3, *common)
    log = Path("saved_models/parts/losses.csv")
    whole = Path("saved_models/whole/losses.csv").read_text()
    assert log.read_text() == whole
    header, *rows = whole.splitlines()
    later = [re.sub(r"[^,]+$", "99", row) for row in rows[1:]]  # rows of another run after epoch 1
    log.write_text("\n".join([header, rows[0], *later, re.sub(r"^3,9,", "9,27,", later[-1])]) + "\n")
    torch.rand(100)  # a new process has another state
    train.main([*RESUME[:2], "--run_name", "parts", "--start_from", "1", "--num_workers", str(workers), *CPU[:2]])
    states = [without(state_of(name), "run_name", "start_from", "num_workers") for name in ("whole", "parts")]
    assert differences(*states) == []
    assert log.read_text() == whole  # cut back to the first row, and written anew from there
    for name in ("epoch_0002.png", "epoch_0003.png"):
        assert Path("generated_images/whole", name).read_bytes() == Path("generated_images/parts", name).read_bytes()


# stopped before the first row of losses.csv; at the first step of epoch 2
@pytest.mark.parametrize(("stop_at", "memory_format"), [(1, "channels_last"), (4, "auto")])
def test_a_run_stopped_in_the_middle_of_an_epoch_resumes_with_the_next_batch(tiny, stop_at, memory_format):
    common = ("--num_epochs", 3, "--buffer_size", 3, "--memory_format", memory_format)
    run_tiny("--run_name", "whole", *common)
    with stops_in_step(stop_at, signal.SIGTERM):
        run_tiny("--run_name", "parts", *common)
    state = state_of("parts")
    assert (state["epoch"], state["step"], state["step_in_epoch"]) == (stop_at // 3, stop_at, 1)
    assert state["memory_format"] == {"channels_last": "channels_last", "auto": "contiguous"}[memory_format]
    run_tiny("--run_name", "parts", "--start_from", "latest")
    states = [without(state_of(name), "run_name", "start_from") for name in ("whole", "parts")]
    assert differences(*states) == []
    assert losses_of("whole") == losses_of("parts")


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_program_saves_and_exits_with_its_code(tiny, signum, code):
    argv = [sys.executable, str(ROOT / "train.py"), *START, "--num_epochs", "100000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            while not (SAVED / "latest.pt").exists():
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signum)
            out, _ = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == code
    assert "--start_from latest" in out
    assert state_of("tiny")["step"] > 0


def test_resume_takes_options_from_the_checkpoint_reports_changes_and_refuses_other_networks(tiny, capsys, refused):
    run_tiny("--num_epochs", 4, "--lr", 1e-3, "--decay_epoch", 1, "--steps_per_epoch", 1, "--checkpoint_interval", 1)
    resume = [*RESUME[:2], "--start_from", "2", "--device", "cpu"]
    train.main([*resume, "--num_epochs", "5"])
    out = capsys.readouterr().out
    assert "changed on resume: --num_epochs 4 → 5" in out
    assert "the learning rate falls from epoch 1 to 0 at 5" in out
    args = state_of("tiny")["args"]
    assert (args["lr"], args["decay_epoch"], args["ngf"], args["steps_per_epoch"]) == (1e-3, 1, 4, 1)
    assert [row["lr"] for row in losses_of()] == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    for option, value, before in (("--ngf", "8", "4"), ("--norm", "batch", "instance"), ("--channels", "1", "3")):
        error = refused(train.main, *resume, option, value)
        assert f"{option} {value}: saved_models/tiny has {before}" in error
    train.main(RESUME)
    assert "nothing left to do: all 5 epochs" in capsys.readouterr().out
    assert state_of("tiny")["step"] == 5


def test_an_epoch_that_became_shorter_than_its_finished_steps_is_finished(tiny, capsys):
    with stops_in_step(4, signal.SIGINT):
        run_tiny("--num_epochs", 2, "--steps_per_epoch", 6)
    train.main([*RESUME, "--steps_per_epoch", "3", "--eval_interval", "1"])
    assert "an epoch now has only 3 steps" in capsys.readouterr().out
    assert (state_of("tiny")["epoch"], state_of("tiny")["step"]) == (2, 7)
    measured = [(row["epoch"], row["step"]) for row in read_losses(SAVED / "measures.csv")]
    assert measured == [(1, 4), (2, 7)]  # the one that counts as finished is evaluated and drawn like the others
    assert (DRAWN / "epoch_0001.png").is_file()


def test_losses_and_weights_that_are_not_finite_end_the_run_and_the_last_good_state_is_kept(tiny, refused):
    with stops_in_step(4, signal.SIGINT):
        run_tiny("--num_epochs", 2, "--steps_per_epoch", 6)
    before = (SAVED / "latest.pt").read_bytes()
    error = refused(train.main, *RESUME, "--num_epochs", "9", "--lr", "1e30", code=1)
    assert "not finite at step" in error
    assert "latest.pt" in error
    with before_steps({1: lambda: signal.raise_signal(signal.SIGTERM)}):
        assert "a weight of G_AB" in refused(train.main, *RESUME, "--lr", "1e39", code=1)
    assert (SAVED / "latest.pt").read_bytes() == before


def test_losses_csv_that_is_deleted_during_training_is_written_anew(tiny):
    with before_steps({5: (SAVED / "losses.csv").unlink}):
        run_tiny("--num_epochs", 2)
    assert [row["step"] for row in losses_of()] == [3, 6]


# -- options that change what is learnt ------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        "--discriminator pixel --pool_D --gan_loss bce",
        "--upsample resize --n_downsampling 1 --gan_loss hinge --max_mult_D 1",
        "--channels 1 --no-flip --load_scale 1 --lambda_identity 0 --norm none",
        "--init orthogonal --img_width 20 --max_images 2 --deterministic",
        "--lr_D 8e-4 --beta1 0.9 --beta2 0.99 --lambda_gan 2 --precision bf16 --seed 7",
    ],
)
def test_variants_train_and_record_their_options(tiny, given):
    words = given.split()
    run_tiny("--num_epochs", 1, "--steps_per_epoch", 2, *words)
    state = state_of("tiny")
    expected = cli.plain_args(train.parse_args([*TINY, *words]))
    for word in words:
        if word.startswith("--") and not word.startswith("--no-"):
            assert state["args"][word[2:]] == expected[word[2:]]
    config = state["config"]
    assert config["D_A"]["pool"] == ("--pool_D" in words)
    assert config["G_AB"]["upsample"] == ("resize" if "resize" in words else "deconv")
    assert state["optims"]["D"]["param_groups"][0]["lr"] == (8e-4 if "--lr_D" in words else 2e-4)
    assert state["optims"]["G"]["param_groups"][0]["betas"] == ((0.9, 0.99) if "--beta1" in words else (0.5, 0.999))
    assert np.isnan(losses_of()[0]["identity_A"]) == ("--lambda_identity" in words)


def test_discriminators_may_be_skipped_for_some_epochs(tiny):
    run_tiny("--num_epochs", 1, "--steps_per_epoch", 2, "--lambda_gan", 0, "--eval_interval", 1)
    assert state_of("tiny")["optims"]["D"]["state"] == {}
    run_tiny("--start_from", "latest", "--num_epochs", 2, "--lambda_gan", 1)
    assert state_of("tiny")["optims"]["D"]["state"]
    for name in ("loss_D_A", "gan_AB"):
        assert [np.isnan(row[name]) for row in losses_of()] == [True, False]


def test_the_seed_decides_everything(tiny):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        run_tiny("--run_name", name, "--num_epochs", 1, "--seed", seed)
    one, two, other = (state_of(name)["nets"] for name in ("one", "two", "other"))
    assert differences(one, two) == []
    assert differences(one, other)


# -- starting from existing weights ----------------------------------------------------------


@pytest.fixture
def files():
    """Generator files of a run of 3 blocks."""
    return files_of_teacher()


def files_of_teacher(**changes):
    save_run("teacher", 1, num_residual=3, **changes)
    return [Path(f"saved_models/teacher/{direction.generator}.safetensors") for direction in DIRECTIONS]


def tune(*argv):
    run_tiny("--run_name", "tuned", "--num_residual", 3, "--num_epochs", 1, *argv)


def test_init_from_starts_from_the_weights_of_files(tiny, files, monkeypatch, capsys):
    starts = []
    monkeypatch.setattr(train.Run, "start", lambda self, *rest: starts.append(self.model.networks))
    tune("--init_from", *files)
    for file in files:
        assert differences(starts[0][file.stem].state_dict(), weights_of(file)) == []
        assert starts[0][file.stem].training
    tune("--init_from", files[1])
    assert "G_AB starts new" in capsys.readouterr().out
    assert differences(starts[1]["G_BA"].state_dict(), weights_of(files[1])) == []
    assert differences(starts[1]["G_AB"].state_dict(), weights_of(files[0]))
    argv = ["--dataset_name", "tiny", "--run_name", "tuned", *TINY[:4], *CPU, "--n_layers_D", "1"]
    train.main([*argv, "--init_from", str(files[0])])
    assert len(starts[2]["G_BA"].blocks) == 3  # the config comes from the file


@pytest.mark.parametrize("norm", ["instance", "batch"])  # batch: running statistics do not change either
def test_frozen_parts_do_not_change_and_the_others_do(tiny, capsys, norm):
    files = files_of_teacher(norm=norm)
    tune("--norm", norm, "--init_from", *files, "--freeze", "stem,down,blocks,D", "--eval_interval", 1)
    assert "--freeze stem,down,blocks,D: these parts" in capsys.readouterr().out
    train.main([*RESUME, "--run_name", "tuned", "--num_epochs", "2"])
    state = state_of("tuned")
    assert state["epoch"] == 2
    for file in files:
        before = weights_of(file)
        changed = {
            name.split(".")[0] for name in before if not torch.equal(before[name], state["nets"][file.stem][name])
        }
        assert changed == {"up", "head"}


def test_learned_scales_of_instance_norms_are_shipped_and_reused(tiny, capsys):
    run_tiny("--num_epochs", 1, "--norm", "instance_affine")
    net = load_generator(SAVED / "G_AB.safetensors")[0]
    assert net.config.norm == "instance_affine"
    assert 0 < (net.stem[2].weight - 1).abs().max() < 0.1
    torch.save(to_junyanz(net), "9_net_G_A.pth")
    run_tiny("--num_epochs", 1, "--steps_per_epoch", 1, "--init_from", "9_net_G_A.pth", "--run_name", "tuned")
    assert "G_AB starts from 9_net_G_A.pth" in capsys.readouterr().out
    tuned = state_of("tuned")
    assert {config["norm"] for config in tuned["config"].values()} == {"instance_affine"}
    assert "layers.3.weight" in tuned["nets"]["D_A"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--init_from", "no.safetensors"], "no.safetensors: no such file"),
        (["--init_from", "saved_models/teacher/G_AB.safetensors", "--ngf", "8"], "ngf 4, not 8"),
        (["--init_from", *["saved_models/teacher/G_AB.safetensors"] * 2], "a second file for G_AB"),
        (["--freeze", "stem,down,blocks,up,head"], "--freeze stem,down,blocks,up,head: "),
        (["--freeze", "stem,skips"], "--freeze stem,skips: the generators have no skips"),
    ],
)
def test_wrong_starting_weights_are_refused(tiny, files, refused, given, message):
    assert message in refused(train.main, *START, "--run_name", "tuned", "--num_residual", "3", *given)
    assert not Path("saved_models/tuned").exists()


# -- evaluation ------------------------------------------------------------------------------


@pytest.fixture
def scores(monkeypatch):
    """Set the PSNR of both directions of the evaluations that follow."""

    def set_scores(values):
        given = iter(values)
        measure = metrics.measure_nets
        monkeypatch.setattr(metrics, "measure_nets", lambda *args: measure(*args) | dict(next(given)))

    return set_scores


def test_an_evaluation_writes_a_row_and_keeps_the_best_epoch(tiny, scores):
    mean_is_best_in_the_second = [(20, 10), (25, 11), (21, 12), (24, 10)]
    scores([{"PSNR_B": b, "PSNR_A": a} for b, a in mean_is_best_in_the_second])
    run_tiny("--num_epochs", 4, *EVAL, "--best_by", "PSNR")
    rows = read_losses(SAVED / "measures.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6), (3, 9), (4, 12)]
    names = {"cycle_A", "cycle_B", "identity_A", "identity_B", "SSIM_A", "match@1_B", "loss_G", "loss_D_A"}
    assert names <= rows[0].keys()
    best = state_of("tiny", "best.pt")
    assert best["epoch"] == 2
    assert best["best"] == {"metric": "PSNR", "score": 18.0, "epoch": 2, "images": best["best"]["images"]}
    tested = test_command.main(["--dataset_name", "tiny", "--epoch", "best", "--metrics", "cycle", *CPU])
    assert tested["AtoB"]["cycle"] == pytest.approx(rows[1]["cycle_A"], rel=1e-4)


def test_measures_during_training_equal_those_of_testing(tiny):
    run_tiny("--num_epochs", 1, *EVAL)
    row = read_losses(SAVED / "measures.csv")[0]
    wanted = ["--metrics", "losses,cycle,identity,paired", "--output_size", "net"]
    tested = test_command.main(["--dataset_name", "tiny", *wanted, *CPU])
    for direction in DIRECTIONS:
        source, target = direction
        own = tested[str(direction)]
        assert row[f"cycle_{source}"] == pytest.approx(own["cycle"], rel=1e-4)
        assert row[f"identity_{target}"] == pytest.approx(own["identity"], rel=1e-4)
        assert row[f"match@1_{target}"] == own["paired"]["model"]["match@1"]
        assert row[f"PSNR_{target}"] == pytest.approx(own["paired"]["model"]["PSNR"], abs=0.1)
    for name, value in tested["losses"].items():
        assert row[name] == pytest.approx(value, rel=1e-4)


def test_a_resumed_run_cuts_measures_back_and_knows_its_best(tiny):
    run_tiny("--num_epochs", 3, "--checkpoint_interval", 1, *EVAL, "--best_by", "cycle")
    whole = (SAVED / "measures.csv").read_text()
    best = state_of("tiny", "best.pt")["epoch"]
    train.main([*RESUME[:2], "--start_from", "1"])
    assert (SAVED / "measures.csv").read_text() == whole
    assert state_of("tiny", "best.pt")["epoch"] == best


def test_best_pt_of_epochs_that_the_run_leaves_does_not_count(tiny, scores, capsys):
    values = (10.0, 11.0, 30.0, 20.0, 15.0)  # epochs 1, 2, 3; then 2 and 3 again
    scores([{"PSNR_A": value, "PSNR_B": value} for value in values])
    run_tiny("--num_epochs", 3, *EVAL, "--best_by", "PSNR", "--checkpoint_interval", 1)
    assert state_of("tiny", "best.pt")["epoch"] == 3
    train.main([*RESUME[:2], "--start_from", "1"])
    assert "best.pt: is not the best epoch of this run by PSNR" in capsys.readouterr().err
    best = state_of("tiny", "best.pt")
    assert (best["epoch"], best["best"]["score"]) == (2, 20.0)


def move(dataset):
    shutil.copytree(dataset, "moved/tiny")


def add_val_split(dataset):
    for domain in "AB":
        (dataset / f"val{domain}").mkdir()
        noise_image(domain).save(dataset / f"val{domain}/0.png")


@pytest.mark.parametrize(
    ("best_by", "changes", "act", "named"),
    [
        ("loss_G", ["--lambda_cycle", 20], None, "--lambda_cycle"),
        ("cycle", ["--img_height", 20], None, "--img_height"),
        ("cycle", [], add_val_split, "held-out images"),
        ("cycle", ["--data_root", "moved", "--lambda_cycle", 20], move, None),
    ],
)
@pytest.mark.usefixtures("no_plots")
def test_the_best_epoch_is_sought_anew_where_scores_do_not_compare(tiny, capsys, best_by, changes, act, named):
    run_tiny("--num_epochs", 1, "--eval_interval", 1, "--eval_metrics", "losses,cycle", "--best_by", best_by)
    state = load_state(SAVED / "latest.pt")
    state["best"]["score"] = 0.0  # that nothing reaches
    for name in ("latest", "best"):
        save_state(SAVED / f"{name}.pt", state)
    if act:
        act(tiny)
    train.main([*RESUME, *map(str, changes), "--num_epochs", "2", "--eval_interval", "0"])  # even if not evaluated now
    train.main([*RESUME, "--num_epochs", "3", "--eval_interval", "1"])
    out = capsys.readouterr().out
    assert f"changed: {named}; scores before do not compare" in out if named else "not compare" not in out
    assert state_of("tiny", "best.pt")["epoch"] == (3 if named else 1)


@pytest.mark.parametrize("epochs", [2, 3])
def test_an_evaluation_that_a_kill_prevented_is_made_on_resume(tiny, epochs, capsys):
    run_tiny("--num_epochs", 2, *EVAL, "--best_by", "cycle")
    whole = (SAVED / "measures.csv").read_text()
    best = state_of("tiny", "best.pt")["best"]
    (SAVED / "best.pt").unlink()
    (SAVED / "measures.csv").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    train.main([*RESUME[:4], "--num_epochs", str(epochs)])
    assert (SAVED / "measures.csv").read_text().startswith(whole)
    assert state_of("tiny", "best.pt")["best"] == best or state_of("tiny", "best.pt")["epoch"] == 3
    assert "epoch 2" in (DRAWN / "index.html").read_text()
    capsys.readouterr()
    train.main(RESUME)
    assert "nothing left to do" in capsys.readouterr().out


def test_a_signal_during_an_evaluation_stops_before_the_next_step(tiny, monkeypatch):
    measure = train.Run.measure
    monkeypatch.setattr(train.Run, "measure", lambda run: signal.raise_signal(signal.SIGTERM) or measure(run))
    with pytest.raises(SystemExit, match="143"):
        run_tiny("--num_epochs", 2, "--eval_interval", 1)
    assert state_of("tiny")["step"] == 3
    train.main(RESUME)  # after the last epoch nothing is left to stop
    assert state_of("tiny")["step"] == 6
    assert [row["step"] for row in read_losses(SAVED / "measures.csv")] == [3, 6]


def test_evaluation_changes_nothing_about_the_training(tiny):
    run_tiny("--num_epochs", 2, "--run_name", "plain", "--norm", "batch")
    run_tiny("--num_epochs", 2, "--run_name", "evaluated", "--norm", "batch", *EVAL)
    assert differences(state_of("plain")["nets"], state_of("evaluated")["nets"]) == []


def test_test_images_that_break_during_training_cost_no_epoch(tiny, capsys):
    def damage():
        for path in (tiny / "testB").iterdir():
            path.write_bytes(b"no image any more")

    with before_steps({2: damage}):
        run_tiny("--num_epochs", 1, "--eval_interval", 1, "--eval_metrics", "cycle")
    assert "epoch 1 is not evaluated" in capsys.readouterr().err
    assert state_of("tiny")["epoch"] == 1


def test_a_paired_evaluation_without_pairs_is_refused(tiny, refused):
    for path in (tiny / "testB").iterdir():
        path.rename(path.with_stem(f"b{path.stem}"))
    error = refused(train.main, *START, *EVAL)
    assert "--eval_metrics paired" in error
    assert "datasets/tiny/testA" in error
    assert not SAVED.exists()


# -- EMA weights -----------------------------------------------------------------------------


def test_ema_weights_are_tested_shipped_and_distilled(tiny):
    run_tiny("--num_epochs", 2, "--ema", 0.9, "--norm", "batch")
    state = state_of("tiny")
    ema = state["ema"]["G_AB"]
    assert differences(ema, state["nets"]["G_AB"])
    assert differences(weights_of(SAVED / "G_AB.safetensors"), ema) == []
    assert differences(networks_of(state, SAVED / "latest.pt")["G_AB"].state_dict(), ema) == []
    assert differences(distill.load_teacher("tiny", DIRECTIONS).networks["G_AB"].state_dict(), ema) == []


# -- memory and precision --------------------------------------------------------------------


@pytest.fixture
def scarce(monkeypatch):
    """Let a step have memory for no more than so many images at a time; returns how many were tried, call by call."""
    make_model = train.make_model

    def limit(most):
        tried = []

        def loss(networks, direction, real, *rest):
            tried.append(len(real))
            torch.rand(3)  # changes the random state before memory runs out
            if len(real) > most:
                raise torch.OutOfMemoryError
            return cyclegan.generator_loss(networks, direction, real, *rest)

        monkeypatch.setattr(train, "make_model", lambda *args: make_model(*args, objective=loss))
        return tried

    return limit


def test_the_size_of_micro_batches_is_kept_on_resume_and_one_image_has_to_fit(tiny, scarce, refused):
    tried = scarce(1)
    run_tiny("--num_epochs", 1)
    assert tried[:2] == [2, 1]
    assert state_of("tiny")["micro_batch_size"] == 1
    tried.clear()
    train.main([*RESUME, "--num_epochs", "2"])
    assert set(tried) == {1}
    scarce(0)
    assert "--batch_size" in refused(train.main, *START, "--overwrite", code=1)


@pytest.mark.slow
def test_a_unet_vit_trains_resumes_bit_for_bit_is_tested_and_distilled(tiny, monkeypatch, refused, capsys):
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, uvcgan_layers=False))
    given = [*VIT, "--lambda_gp", "0.1", "--ema", "0.9", *EVAL]
    train.main([*given, "--num_epochs", "3", "--run_name", "whole"])
    train.main([*given, "--num_epochs", "1", "--decay_epoch", "1", "--run_name", "parts"])
    train.main(["--run_name", "parts", "--start_from", "latest", "--num_epochs", "3"])
    for key in ("nets", "optims", "ema", "buffers", "rng"):
        assert differences(state_of("whole")[key], state_of("parts")[key]) == [], key
    assert all(row["gp_A"] > 0 and row["gp_B"] > 0 for row in losses_of("whole"))
    error = refused(train.main, "--run_name", "whole", "--start_from", "latest", "--vit_blocks", "2")
    assert "--vit_blocks 2: saved_models/whole has 4" in error
    tested = test_command.main(["--run_name", "whole", "--metrics", "paired", "--scale", "native", *CPU])
    assert tested["AtoB"]["paired"]["model"]["PSNR"] > 0
    distill.main(["--teacher", "whole", "--student_residual", "2", "--num_epochs", "1", "--lambda_gp", "0", *CPU])
    assert "student G_BA, 2 blocks:" in capsys.readouterr().out
    student = load_generator(Path("saved_models/whole_student/G_BA.safetensors"))[0]
    assert (student.config.generator, student.config.vit_blocks) == ("unet_vit", 2)
    error = refused(distill.main, "--teacher", "whole", "--student_ngf", "8", "--run_name", "thin", *CPU)
    assert "--student_ngf 8" in error
    assert "unet_vit" in error


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--dataset_name tinny", "datasets/tinny: no such data set; found in datasets: tiny"),
        ("--dataset_name tinny --dry_run", "datasets/tinny: no such data set; found in datasets: tiny"),
        ("--dataset_name ../..", "--dataset_name: given '../..'"),
        ("--data_root nowhere", "nowhere/tiny: no such data set"),
        ("--batch_size 0", "--batch_size: given '0', expected an integer, at least 1"),
        ("--beta1 1", "--beta1: given '1', expected a number, at least 0 and at most 0.999999"),
        ("--channels 17", "argument --channels: given '17', expected an integer, at least 1 and at most 16"),
        ("--lambda_id 5", "--lambda_id 5 → --lambda_identity 5"),
        ("@nothing.txt", "No such file or directory: 'nothing.txt'"),
        ("--img_height 4 --img_width 4", "images of 4x4 px: the generator needs 8 px"),
        ("--n_layers_D 5", "--n_layers_D 5: its output for images of 16x16 px would be empty; the largest"),
        ("--n_layers_D 5", "--n_layers_D that fits is 2"),
        ("--img_height 5 --n_downsampling 0", "take --discriminator pixel"),
        ("--lambda_gan 0 --lambda_cycle 0 --lambda_identity 0", "--lambda_gan, --lambda_cycle, --lambda_identity are"),
        ("--assume zeros", "--assume: has no effect without --init_from"),
        ("--gp_target 1", "--gp_target 1: has no effect without --lambda_gp"),
        ("--lambda_gan 0 --lambda_gp 0.1", "--lambda_gp 0.1: has no effect while the discriminators do not learn"),
        ("--freeze D --lambda_gp 0.1", "--lambda_gp 0.1: has no effect while the discriminators do not learn"),
        ("--decay_epoch 201", "--decay_epoch 201: expected at most --num_epochs 200"),
        ("--best_by PSNR", "--best_by PSNR: needs --eval_interval, and paired"),
        ("--best_by loss_G --eval_interval 1", "--best_by loss_G: needs --eval_interval, and losses"),
        ("--best_by SSIM --eval_interval 1 --eval_metrics paired --img_width 10", "--best_by SSIM: its window"),
        ("--rotate90 --img_width 20", "--rotate90: needs square images; give --img_height and --img_width one value"),
        ("--start_from 7", "--start_from 7: no saved_models/tiny/epoch_0007.pt"),
        ("--start_from latest --overwrite", "--overwrite contradicts --start_from latest"),
        ("--start_from latest --init_from x", "--init_from contradicts --start_from latest"),
        ("--watch nobody.jpg", "--watch nobody.jpg: "),
        ("--device cuda:9", "--device cuda:9: "),
        ("--precision fp16", "--precision fp16: needs a CUDA GPU"),
        ("--compile", "--compile: no gain on cpu"),
        ("--norm batch --micro_batch 1", "--micro_batch 1: not with --norm batch"),
        ("--vit_blocks 2", "--vit_blocks: has no meaning for --generator resnet"),
        ("--n_downsampling 0 --skips", "--skips: has no effect with --n_downsampling 0; leave it out"),
        ("--log tensorboard", "--log tensorboard: the package tensorboard is missing; install it with: pip install"),
    ],
)
def test_wrong_options_are_refused_in_one_line_before_anything_is_written(tiny, refused, monkeypatch, given, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert message in refused(train.main, *START, *given.split())
    assert not Path("saved_models").exists()
    assert not Path("generated_images").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--vit_heads 7", "--vit_heads 7: expected a divisor of 256"),
        ("--vit_size uvcgan", "images of 16x16 px: the generator needs 32 px"),
        ("--num_residual 9", "--num_residual: has no meaning for --generator unet_vit"),
    ],
)
def test_options_that_a_unet_vit_does_not_have_are_refused(tiny, refused, given, message):
    assert message in refused(train.main, *VIT, *given.split())
    assert not Path("saved_models").exists()


def test_an_inherited_best_by_is_checked_like_a_given_one(tiny, refused):
    run_tiny("--num_epochs", 1, "--best_by", "PSNR", "--eval_interval", 1, "--eval_metrics", "paired")
    error = refused(train.main, *RESUME, "--num_epochs", "2", "--eval_metrics", "cycle")
    assert "--best_by PSNR: needs --eval_interval, and paired" in error
    train.main([*RESUME, "--num_epochs", "2", "--eval_interval", "0"])  # nothing is evaluated: it has no effect


def test_an_inherited_gradient_penalty_waits_while_the_discriminators_are_skipped(tiny, refused):
    run_tiny("--num_epochs", 1, "--lambda_gp", 0.1)
    skip = [*RESUME, "--num_epochs", "2", "--lambda_gan", "0"]
    assert "--lambda_gp 0.2: has no effect" in refused(train.main, *skip, "--lambda_gp", "0.2")
    train.main(skip)
    assert state_of("tiny")["args"]["lambda_gp"] == 0.1


def test_a_resumed_run_is_not_told_to_change_its_discriminators(tiny, refused):
    run_tiny("--num_epochs", 1, "--n_downsampling", 0)
    error = refused(train.main, *RESUME, "--img_height", "4")
    assert error == "error: images of 16x4 px: the discriminators need 6 px; raise --img_height, --img_width"


def test_a_file_in_the_place_of_a_folder_is_one_line(tiny, refused):
    Path("saved_models").write_text("a file")
    assert "saved_models" in refused(train.main, *START)


def test_a_student_is_never_written_over_its_teacher(tiny, refused):
    run_tiny("--num_epochs", 1, "--run_name", "teacher")
    path = Path("saved_models/teacher/latest.pt")
    before = path.read_bytes()
    error = refused(distill.main, "--teacher", path, "--run_name", "teacher", "--overwrite", "--device", "cpu")
    assert "--run_name teacher" in error
    assert path.read_bytes() == before
    assert load_state(path)["stage"] == "train"
