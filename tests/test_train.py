import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset, noise_picture
from PIL import Image

import train
import utils
from datasets import list_pictures, read_picture
from utils import load_state, read_losses

ROOT = Path(train.__file__).parent


def run(*argv):
    train.main(["--dataset_name", "tiny", *TINY, *map(str, argv)])


def state_of(name, file="latest.pt"):
    return load_state(Path("saved_models") / name / file)


def train_run(dataset, *flags):
    """The networks and all that belongs to them, as train.main would start them."""
    args = train.settle(train.parse_args(["--dataset_name", "tiny", *TINY, *flags]))
    return train.make_run(args, train.make_nets(args, {}), dataset, torch.device("cpu"))


def differences(a, b, path=""):
    """Paths at which two nested states differ; tensors are compared bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = a.keys() | b.keys()
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [path]


def test_a_run_leaves_what_the_design_promises(tiny):
    noise_picture(5, (40, 30)).save("cat.jpg")
    run("--num_epochs", 2, "--checkpoint_interval", 2, "--watch", "cat.jpg")
    saved, pictures = Path("saved_models/tiny"), Path("generated_images/tiny")
    assert {p.name for p in saved.iterdir()} == {
        *("latest.pt", "previous.pt", "epoch_0002.pt", "G_AB.safetensors", "G_BA.safetensors"),
        *("run.json", "losses.csv", ".lock"),
    }
    files = {str(p.relative_to(pictures)) for p in pictures.rglob("*") if p.is_file()}
    assert files == {
        *("index.html", "epoch_0001.png", "epoch_0002.png", "losses.png"),
        *("watch/cat/epoch_0001.png", "watch/cat/epoch_0002.png"),
    }
    state = state_of("tiny")
    assert {"format", "stage", "epoch", "step", "args", "config", "nets", "optims", "schedules"} <= state.keys()
    assert {"buffers", "rng", "loader", "ema", "scaler", "range"} <= state.keys()
    assert (state["epoch"], state["step"], state["range"]) == (2, 6, [-1, 1])
    assert set(state["nets"]) == {"G_AB", "G_BA", "D_A", "D_B"}
    facts = json.loads((saved / "run.json").read_text())
    assert facts["pictures"] == {"A": 5, "B": 4}
    assert facts["flags"]["lambda_cycle"] == 10.0
    rows = read_losses(saved / "losses.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)]
    assert [row["lr"] for row in rows] == pytest.approx([2e-4, 2e-4])  # decay from 1 to 2: full, then half
    assert (saved / "latest.pt").samefile(saved / "epoch_0002.pt")  # one copy on disk


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_every_weight_of_all_four_networks_learns(tiny, norm):
    run("--num_epochs", 1, "--norm", norm, "--run_name", norm)
    before = train_run(tiny, "--norm", norm)
    after = state_of(norm)["nets"]
    for name, net in before.nets.items():
        convs_before_a_norm = ("stem.1", "down", "body", "up", "layers.2")  # their bias has no true gradient
        for key, value in net.named_parameters():
            if key.endswith("bias") and any(part in key for part in convs_before_a_norm) and norm == "instance":
                continue
            assert not torch.equal(value.detach(), after[name][key]), f"{name} {key} did not move"


def test_the_generators_step_leaves_no_gradient_in_the_discriminators(tiny):
    ours = train_run(tiny)
    seen = []

    def watched(run, A, B):
        loss, terms, fakes = train.cyclegan_objective(run, A, B)
        loss.backward(retain_graph=True)
        seen.extend(p.grad is None for name in ("D_A", "D_B") for p in run.nets[name].parameters())
        return loss, terms, fakes

    train.train_step(ours, torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16), watched)
    assert seen
    assert all(seen)
    assert all(p.requires_grad for name in ("D_A", "D_B") for p in ours.nets[name].parameters())


def test_one_batch_can_be_learnt(tmp_path):
    """All terms fall on one picture of each domain: cycle, identity and the discriminators' confusion."""
    make_dataset(tmp_path / "datasets" / "one", (1, 1, 1, 1), (16, 16))
    flags = ["--dataset_name", "one", *TINY, "--ngf", "8", "--batch_size", "1", "--load_scale", "1", "--no-flip"]
    train.main([*flags, "--lr", "2e-3", "--num_epochs", "1", "--steps_per_epoch", "200"])
    rows = read_losses(Path("saved_models/one/losses.csv"))
    assert len(rows) == 10
    for term in ("loss_G", "cycle_A", "cycle_B", "identity_A", "identity_B"):
        assert rows[-1][term] < 0.5 * rows[0][term], term


# -- resume ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_three_epochs_equal_one_and_two_resumed_bit_for_bit(tiny, workers):
    common = ("--num_workers", workers, "--buffer_size", 3, "--checkpoint_interval", 1)
    run("--run_name", "whole", "--num_epochs", 3, *common)
    run("--run_name", "parts", "--num_epochs", 3, *common)
    Path("saved_models/parts/losses.csv").write_text(
        "spoilt\n"
    )  # must come from the cut log, not from a lucky leftover
    whole, folder = state_of("whole"), Path("saved_models/parts")
    lines = Path("saved_models/whole/losses.csv").read_text().splitlines(keepends=True)
    (folder / "losses.csv").write_text("".join(lines))
    torch.rand(100), np.random.default_rng(1)  # a fresh process has another state; so has this one
    train.main(
        [
            "--dataset_name",
            "tiny",
            "--run_name",
            "parts",
            "--start_from",
            "1",
            "--num_workers",
            str(workers),
            "--device",
            "cpu",
        ]
    )
    parts = state_of("parts")
    for state in (whole, parts):
        for name in ("run_name", "start_from", "num_workers"):
            state["args"].pop(name)
    assert differences(whole, parts) == []
    assert (folder / "losses.csv").read_text() == "".join(lines)
    for name in ("epoch_0002.png", "epoch_0003.png"):
        assert Path("generated_images/whole", name).read_bytes() == Path("generated_images/parts", name).read_bytes()


@pytest.mark.parametrize("stop_at", [1, 4])  # before the first row of losses.csv; the first step of epoch 2
def test_a_stop_in_the_middle_of_an_epoch_goes_on_with_the_next_batch(tiny, monkeypatch, stop_at):
    common = ("--num_epochs", 3, "--buffer_size", 3)
    run("--run_name", "whole", *common)
    plain, steps = train.train_step, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(SystemExit) as exit_:
        run("--run_name", "parts", *common)
    assert exit_.value.code == 143
    state = state_of("parts")
    assert (state["epoch"], state["step"], state["loader"]["place"]) == (stop_at // 3, stop_at, 1)
    monkeypatch.undo()
    os.chdir(tiny.parents[1])
    run("--run_name", "parts", "--start_from", "latest")
    whole, parts = state_of("whole"), state_of("parts")
    for state in (whole, parts):
        state["args"].pop("run_name"), state["args"].pop("start_from")
    assert differences(whole, parts) == []
    assert Path("saved_models/whole/losses.csv").read_text() == Path("saved_models/parts/losses.csv").read_text()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_program_saves_and_exits_with_its_code(tiny, signum, code):
    argv = [sys.executable, str(ROOT / "train.py"), "--dataset_name", "tiny", *TINY, "--num_epochs", "100000"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("watch "):
            break
    while not Path("saved_models/tiny/latest.pt").exists():
        assert process.poll() is None
    process.send_signal(signum)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert "--start_from latest" in out
    assert state_of("tiny")["step"] > 0


def test_resume_takes_flags_from_the_checkpoint_logs_changes_and_refuses_other_networks(tiny, capsys, refused):
    run("--num_epochs", 4, "--lr", 1e-3, "--decay_epoch", 1, "--steps_per_epoch", 1, "--checkpoint_interval", 1)
    resume = ["--dataset_name", "tiny", "--start_from", "2", "--device", "cpu"]
    train.main([*resume, "--num_epochs", "5"])
    out = capsys.readouterr().out
    assert "changed on resume: --num_epochs 4 → 5" in out
    args = state_of("tiny")["args"]
    assert (args["lr"], args["decay_epoch"], args["ngf"], args["steps_per_epoch"]) == (1e-3, 1, 4, 1)
    rates = [row["lr"] for row in read_losses(Path("saved_models/tiny/losses.csv"))]
    assert rates == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert "--ngf 8" in refused(train.main, *resume, "--ngf", "8")
    assert "--no-norm" not in refused(train.main, *resume, "--norm", "batch")
    train.main([*resume[:3], "latest", "--device", "cpu"])
    assert "nothing left to do: 5 of 5" in capsys.readouterr().out


def test_old_checkpoints_are_removed_when_only_some_are_kept(tiny):
    run("--num_epochs", 4, "--steps_per_epoch", 1, "--checkpoint_interval", 1, "--keep_checkpoints", 2)
    assert sorted(p.name for p in Path("saved_models/tiny").glob("*.pt")) == [
        "epoch_0003.pt",
        "epoch_0004.pt",
        "latest.pt",
        "previous.pt",
    ]


# -- flags that change what is learnt or shown ------------------------------------------------


def test_grids_are_drawn_at_the_interval_and_show_the_range_faithfully(tiny, monkeypatch):
    drawn = []
    monkeypatch.setattr(utils, "save_picture", lambda picture, path: drawn.append((path.name, picture)))
    run("--num_epochs", 1, "--steps_per_epoch", 5, "--sample_interval", 2)
    assert [name for name, _ in drawn] == ["epoch_0001.png"] * 3  # steps 2, 4 and the end
    grid = np.asarray(drawn[-1][1])
    real = np.asarray(read_picture(list_pictures(tiny / "testA")[0]).resize((16, 16), Image.Resampling.BICUBIC))
    left = grid.shape[1] - (2 * 130 + 2)
    assert np.array_equal(grid[2:130:8, left + 2 : left + 130 : 8], real)


@pytest.mark.parametrize(
    "flags",
    [
        ("--discriminator", "pixel", "--pool_D", "--gan_loss", "bce"),
        ("--upsample", "resize", "--n_downsampling", "1", "--gan_loss", "hinge", "--max_mult_D", "1"),
        ("--channels", "1", "--no-flip", "--load_scale", "1", "--lambda_identity", "0", "--norm", "none"),
        ("--init", "orthogonal", "--norm_output", "--img_width", "20", "--max_images", "2", "--deterministic"),
        (
            "--lr_D",
            "8e-4",
            "--beta1",
            "0.9",
            "--beta2",
            "0.99",
            "--lambda_gan",
            "2",
            "--precision",
            "bf16",
            "--seed",
            "7",
        ),
    ],
)
def test_variants_train_and_record_their_flags(tiny, flags):
    run("--num_epochs", 1, "--steps_per_epoch", 2, *flags)
    state = state_of("tiny")
    parser_values = utils.plain_flags(train.parse_args([*TINY, *flags]))
    for word in flags:
        if word.startswith("--") and not word.startswith("--no-"):
            assert state["args"][word[2:]] == parser_values[word[2:]]
    config = state["config"]
    assert config["D_A"]["pool"] == ("--pool_D" in flags)
    assert config["G_AB"]["upsample"] == ("resize" if "resize" in flags else "deconv")
    assert state["optims"]["D"]["param_groups"][0]["lr"] == (8e-4 if "--lr_D" in flags else 2e-4)
    assert state["optims"]["G"]["param_groups"][0]["betas"] == ((0.9, 0.99) if "--beta1" in flags else (0.5, 0.999))
    rows = read_losses(Path("saved_models/tiny/losses.csv"))
    assert np.isnan(rows[0]["identity_A"]) == ("--lambda_identity" in flags)


def test_the_seed_decides_everything(tiny):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        run("--run_name", name, "--num_epochs", 1, "--seed", seed)
    nets = [state_of(name)["nets"] for name in ("one", "two", "other")]
    assert differences(nets[0], nets[1]) == []
    assert differences(nets[0], nets[2])


def test_each_loss_weight_scales_its_term(tiny):
    ours = train_run(tiny)
    A, B = torch.rand(2, 2, 3, 16, 16)
    losses = {}
    for name in ("none", "lambda_gan", "lambda_cycle", "lambda_identity"):
        for key in ("lambda_gan", "lambda_cycle", "lambda_identity"):
            setattr(ours.args, key, 3.0 if key == name else 0.0)
        losses[name], terms, _ = train.cyclegan_objective(ours, A, B)
        if name != "none":
            parts = [value for key, value in terms.items() if key.startswith(name.removeprefix("lambda_"))]
            assert losses[name].item() == pytest.approx(3 * sum(parts).item(), rel=1e-5)
    assert losses["none"].item() == 0


def test_the_demo_set_is_drawn_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.DEMO_FOLDERS", dict.fromkeys(("trainA", "trainB", "testA", "testB"), ("day", 0, 2)))
    train.main(["--dataset_name", "day2night", *TINY, "--num_epochs", "1"])
    assert (tmp_path / "datasets/day2night/trainA/0001.png").exists()
    assert (tmp_path / "saved_models/day2night/latest.pt").exists()


def test_without_test_pictures_the_grids_show_training_pictures(tmp_path, capsys):
    make_dataset(tmp_path / "datasets/tiny", (3, 3, 0, 0))
    run("--num_epochs", 1)
    assert "the grids show training pictures" in capsys.readouterr().out


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset_name", "tinny"], "nearest existing: tiny"),
        (["--dataset_name", "../.."], "expected one folder name"),
        (["--run_name", "a/b"], "expected one folder name"),
        (["--data_root", "nowhere"], "nowhere holds no data set"),
        (["--batch_size", "0"], "given '0', expected a whole number of at least 1"),
        (["--lr", "nan"], "given 'nan', expected a number above 0"),
        (["--lambda_cycle", "-1"], "expected a number of at least 0"),
        (["--beta1", "1"], "at most 0.999999"),
        (["--img_height", "4", "--img_width", "4"], "need at least 8 px a side"),
        (["--n_layers_D", "5"], "the largest --n_layers_D that fits is 2"),
        (["--decay_epoch", "201"], "beyond --num_epochs 200"),
        (["--start_from", "7"], "none, nothing was saved yet"),
        (["--start_from", "latest", "--overwrite"], "give one of them"),
        (["--watch", "nobody.jpg"], "--watch nobody.jpg: not a readable picture"),
        (["--device", "cuda:9"], "not on this machine"),
        (["--lambda_id", "5"], "unrecognized arguments: --lambda_id 5"),
        (["--channels", "4"], "invalid choice"),
        (["--load_scale", "0.5"], "of at least 1"),
    ],
)
def test_wrong_flags_are_refused_in_one_line_before_anything_is_written(tiny, refused, flags, words):
    assert words in refused(train.main, "--dataset_name", "tiny", *TINY, *flags)
    assert not Path("saved_models").exists()
    assert not Path("generated_images").exists()


def test_a_second_start_is_refused_and_overwrite_deletes_only_the_runs_own_files(tiny, refused):
    run("--num_epochs", 1)
    Path("saved_models/tiny/notes.txt").write_text("mine")
    before = Path("saved_models/tiny/latest.pt").read_bytes()
    error = refused(train.main, "--dataset_name", "tiny", *TINY)
    assert "--start_from latest" in error
    assert "--overwrite" in error
    refused(train.main, "--dataset_name", "tiny", *TINY, "--overwrite", "--watch", "nobody.jpg")
    assert Path("saved_models/tiny/latest.pt").read_bytes() == before  # a refused start deletes nothing
    run("--num_epochs", 1, "--overwrite", "--steps_per_epoch", 1)
    assert state_of("tiny")["step"] == 1
    assert Path("saved_models/tiny/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("part", ["trainA", "trainB"])
def test_missing_and_empty_folders_are_named(tiny, refused, part):
    for path in list_pictures(tiny / part):
        path.write_bytes(b"torn")
    assert "are unreadable" in refused(train.main, "--dataset_name", "tiny", *TINY)
    for path in list_pictures(tiny / part):
        path.unlink()
    assert f"{part}: no picture inside" in refused(train.main, "--dataset_name", "tiny", *TINY)
    (tiny / part).rmdir()
    assert f"no {part}/ inside" in refused(train.main, "--dataset_name", "tiny", *TINY)


def test_a_set_with_one_unreadable_picture_cannot_train(tmp_path, refused):
    root = make_dataset(tmp_path / "datasets/tiny", (1, 1, 1, 1))
    (root / "trainA/0.png").write_bytes(b"torn")
    assert "none of its 1 pictures can be read" in refused(train.main, "--dataset_name", "tiny", *TINY)


def test_a_torn_picture_is_skipped_named_once_and_training_goes_on(tiny, capsys):
    path = tiny / "trainA" / "1.png"
    path.write_bytes(path.read_bytes()[:400])  # the header is whole, the pixels are not
    run("--num_epochs", 3)
    assert capsys.readouterr().err.count("skipped, unreadable") == 1
    assert state_of("tiny")["epoch"] == 3


def test_wrong_checkpoints_are_refused_and_kept(tiny, refused):
    run("--num_epochs", 1)
    path = Path("saved_models/tiny/latest.pt")
    whole = path.read_bytes()
    resume = ("--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "2")
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a readable checkpoint" in refused(train.main, *resume)
    for key in ("optims", "loader", "rng"):
        path.write_bytes(whole)
        state = load_state(path)
        del state[key]
        torch.save(state, path)
        assert "no whole training state" in refused(train.main, *resume)
    path.write_bytes(whole)
    state = load_state(path)
    state["nets"]["D_A"]["layers.0.weight"][0] = float("nan")
    torch.save(state, path)
    assert "D_A: does not fit the network: layers.0.weight is not finite" in refused(train.main, *resume)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(tiny, refused):
    run("--num_epochs", 1)
    argv = ["--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "9", "--lr", "1e30", "--device", "cpu"]
    error = refused(train.main, *argv, code=1)
    assert "not finite at step" in error
    assert "latest.pt" in error
    assert load_state(Path("saved_models/tiny/latest.pt"))["step"] >= 3


@pytest.fixture
def stopped(tiny, monkeypatch):
    """A run that was stopped at the fourth of six steps of its first epoch, its buffers full."""
    plain, steps = train.train_step, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        with pytest.raises(SystemExit):
            run("--num_epochs", 2, "--steps_per_epoch", 6, "--buffer_size", 4)
    return ["--dataset_name", "tiny", "--start_from", "latest", "--device", "cpu"]


def test_an_epoch_that_became_shorter_than_what_is_done_is_finished(stopped, capsys):
    train.main([*stopped, "--steps_per_epoch", "3"])
    assert "it is finished" in capsys.readouterr().out
    assert (state_of("tiny")["epoch"], state_of("tiny")["step"]) == (2, 7)


def test_buffers_start_empty_when_the_pictures_change_their_size(stopped, capsys):
    train.main([*stopped, "--img_height", "20"])
    assert "buffer of A starts empty" in capsys.readouterr().out
    assert state_of("tiny")["buffers"]["A"]["images"][0].shape == (3, 20, 16)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s["optims"]["G"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda s: s["optims"]["G"]["state"][0].update(step="x"),
        lambda s: s["optims"]["G"]["state"][0].pop("exp_avg_sq"),
        lambda s: s["optims"]["D"]["state"][0]["exp_avg"].fill_(float("nan")),
        lambda s: s.update(epoch="3"),
        lambda s: s.update(epoch=-5),
        lambda s: s.update(step=None),
        lambda s: s["loader"].update(place=1.5),
        lambda s: s["loader"]["meter"].update(count="3"),
        lambda s: s["loader"]["meter"].update(sums={"loss_G": torch.zeros(3)}),
        lambda s: s["rng"].update(python=()),
        lambda s: s["buffers"]["A"].update(rng=[2**70]),
        lambda s: s["buffers"].update(A=None),
        lambda s: s["args"].update(img_height=10**9),
        lambda s: s["args"].update(lr="fast"),
        lambda s: s["args"].pop("ngf"),
        lambda s: s.update(args=[1]),
        lambda s: s["nets"].update(G_AB={"stem": "x"}),
        lambda s: s.update(format=torch.zeros(2)),
    ],
)
def test_a_checkpoint_edited_by_hand_is_refused_in_one_line(stopped, refused, spoil):
    path = Path("saved_models/tiny/latest.pt")
    state = load_state(path)
    spoil(state)
    torch.save(state, path)
    assert "saved_models/tiny/latest.pt" in refused(train.main, *stopped)


def test_overwrite_deletes_nothing_before_the_new_run_can_be_written(tiny, refused):
    run("--num_epochs", 1)
    kept = {p.name: p.read_bytes() for p in Path("saved_models/tiny").iterdir()}
    shutil.rmtree("generated_images/tiny")
    Path("generated_images/tiny").write_text("a file")
    assert "generated_images/tiny: File exists" in refused(train.main, "--dataset_name", "tiny", *TINY, "--overwrite")
    assert {p.name: p.read_bytes() for p in Path("saved_models/tiny").iterdir()} == kept


def test_only_the_runs_own_checkpoints_are_counted_and_removed(tiny):
    run("--num_epochs", 1)
    Path("saved_models/tiny/epoch_best.pt").write_text("mine")
    Path("saved_models/tiny/epoch_0009.pt").write_text("of an abandoned future")
    argv = ["--start_from", "latest", "--num_epochs", "3", "--checkpoint_interval", "1", "--keep_checkpoints", "1"]
    train.main(["--dataset_name", "tiny", "--device", "cpu", *argv])
    names = sorted(p.name for p in Path("saved_models/tiny").glob("epoch_*"))
    assert names == ["epoch_0003.pt", "epoch_0009.pt", "epoch_best.pt"]


def test_a_spoilt_state_never_replaces_a_good_one(stopped, refused, monkeypatch):
    before = Path("saved_models/tiny/latest.pt").read_bytes()
    plain = train.train_step

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert "a weight of G_AB" in refused(train.main, *stopped, "--lr", "1e39", code=1)
    assert Path("saved_models/tiny/latest.pt").read_bytes() == before


def test_photos_of_one_name_and_of_odd_names_are_all_watched(tiny):
    for name in ("a/x.png", "b/x.png", "c/x.jpg", "...png", "-x.png"):
        Path(name).parent.mkdir(exist_ok=True)
        noise_picture(name).save(name, format="PNG")
    run("--num_epochs", 1, "--watch", "a/x.png", "b/x.png", "c/x.jpg", "...png", "./-x.png")
    assert sorted(p.name for p in Path("generated_images/tiny/watch").iterdir()) == ["-x", "photo", "x", "x_", "x__"]
    train.main(["--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "2", "--device", "cpu"])


def test_a_file_in_the_place_of_a_folder_is_one_line(tiny, refused):
    Path("saved_models").write_text("a file")
    assert "saved_models" in refused(train.main, "--dataset_name", "tiny", *TINY)
