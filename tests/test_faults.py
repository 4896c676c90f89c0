"""Faults from outside while commands run: full disks, damaged files, second processes, hostile images and weights."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
import torch
from breakage import before_steps, dies_in_step, full_disk
from conftest import TINY, differences, noise_image
from PIL import Image
from tiny_runs import run_tiny, state_of

import cyclegan
import distill
import prepare
import test as test_command
import train
from models import DIRECTIONS
from toolkit import checkpoints, images, inference, weights
from toolkit.checkpoints import load_state
from utils import InputError

pytestmark = pytest.mark.usefixtures("no_plots")
ROOT = Path(train.__file__).parent
SAVED = Path("saved_models/tiny")
DRAWN = Path("generated_images/tiny")
START = ["--dataset_name", "tiny", *TINY]
RESUME = ["--dataset_name", "tiny", "--start_from", "latest", "--device", "cpu"]
EACH_STEP = ("--save_minutes", 1e-9)


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Reset after each test what a command sets for its process."""
    monkeypatch.setattr(images, "max_pixels", images.max_pixels)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def files_of(*folders):
    """Contents of all files in folders, by path; without the lock, which has no suffix."""
    return {str(p): p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file() and p.suffix}


def lines_with(text, printed):
    return [line for line in printed.splitlines() if text in line]


def end_of(name):
    """What a run left: its state without the options, losses, grids, and the generators as they are loaded."""
    folder = SAVED.parent / name
    generators = [weights.load_generator(folder / f"{d.generator}.safetensors")[0] for d in DIRECTIONS]
    return {
        "state": {**state_of(name), "args": None},
        "losses": (folder / "losses.csv").read_text(),
        "grids": {path.name: path.read_bytes() for path in (DRAWN.parent / name).glob("epoch_*.png")},
        "generators": [net.state_dict() for net in generators],
    }


# ---------------------------------------------------------------------------------------------
# Saving and resuming


def test_states_are_saved_by_the_minute_and_a_dead_run_resumes_with_the_next_batch(tiny, monkeypatch):
    saved = []
    original = checkpoints.save_latest

    def save_latest(folder, state, also):
        saved.append(state["step"])
        original(folder, state, also)

    monkeypatch.setattr(checkpoints, "save_latest", save_latest)
    run_tiny("--num_epochs", 2, "--run_name", "uninterrupted", "--save_minutes", 0)
    assert saved == [3, 6]
    saved.clear()
    with dies_in_step(6):
        run_tiny("--num_epochs", 2, *EACH_STEP)
    assert saved == [1, 2, 3, 4, 5]
    train.main(RESUME)
    assert saved[5:] == [6]
    assert differences(end_of("uninterrupted"), end_of("tiny")) == []


def test_previous_replaces_a_damaged_latest_and_the_run_ends_the_same(tiny, capsys):
    run_tiny("--num_epochs", 3, "--run_name", "uninterrupted")
    with dies_in_step(8):
        run_tiny("--num_epochs", 3)
    path = SAVED / "latest.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    distill.load_teacher("tiny", DIRECTIONS[:1])
    inference.load_run("tiny", discriminators=True)
    assert len(lines_with("using saved_models/tiny/previous.pt", capsys.readouterr().err)) == 2
    with dies_in_step(1):  # before anything is saved: a good state must be left
        train.main(RESUME)
    assert load_state(path)["step"] == load_state(SAVED / "previous.pt")["step"] == 3
    train.main(RESUME)
    assert differences(end_of("uninterrupted"), end_of("tiny")) == []
    assert load_state(SAVED / "previous.pt")["step"] == 6


# ---------------------------------------------------------------------------------------------
# The disk is full


def test_a_run_survives_a_full_disk_and_ends_as_it_would_have(tiny, capsys):
    run_tiny("--num_epochs", 3, "--run_name", "uninterrupted")
    capsys.readouterr()
    full = full_disk(room=1000)
    with before_steps({2: full.__enter__, 8: lambda: full.__exit__(None, None, None)}):
        run_tiny("--num_epochs", 3)
    warnings = [line.split("warning: ")[1] for line in lines_with("warning: ", capsys.readouterr().err)]
    lost = []
    for number in (1, 2):  # two epochs' grids and states
        lost += [f"generated_images/tiny/epoch_000{number}.png", "saved_models/tiny/G_AB.safetensors"]
        shutil.copy(DRAWN.parent / f"uninterrupted/epoch_000{number}.png", DRAWN)
    lost.insert(2, "generated_images/tiny/index.html")  # the next one is not due yet
    assert [line.split(": ")[0] for line in warnings] == lost
    assert all("File too large" in line for line in warnings)
    assert differences(end_of("uninterrupted"), end_of("tiny")) == []


def test_a_disk_that_remains_full_is_exit_code_1_and_nothing_is_damaged(tiny, refused):
    run_tiny("--num_epochs", 1)
    before = {k: v for k, v in files_of(SAVED).items() if not k.endswith(("run.json", "losses.csv"))}
    (SAVED / "losses.csv").write_text(",".join(["epoch", "step", "lr", *cyclegan.LOSSES, *cyclegan.TERMS]) + "\n")
    with full_disk(room=5000):
        error = refused(train.main, *RESUME, "--num_epochs", "3", code=1)
    assert error.startswith("error: the last save failed (saved_models/tiny/G_AB.safetensors: File too large); ")
    assert "saved_models/tiny/latest.pt" in error
    after = files_of(SAVED)
    assert {k: after[k] for k in before} == before
    assert not [*SAVED.glob(".*.tmp")]
    train.main([*RESUME, "--num_epochs", "3"])
    assert state_of("tiny")["step"] == 9


# ---------------------------------------------------------------------------------------------
# Second and dead processes


@pytest.mark.skipif(os.name == "nt", reason="locks by fcntl")
def test_a_second_process_in_the_folder_is_refused_until_the_first_is_dead(tiny, refused):
    run_tiny("--num_epochs", 1)
    before = files_of(SAVED, DRAWN)
    hold = "import fcntl, sys; file = open('saved_models/tiny/.lock', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
    hold += "print('4711', file=file, flush=True); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for argv in ([*RESUME, "--num_epochs", "2"], [*START, "--overwrite"]):
            assert "saved_models/tiny: process 4711" in refused(train.main, *argv)
        other.kill()
    assert files_of(SAVED, DRAWN) == before
    train.main([*RESUME, "--num_epochs", "2"])
    assert state_of("tiny")["epoch"] == 2


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_dead_worker_ends_the_run_in_one_line(tiny, refused):
    others = torch.multiprocessing.active_children()

    def kill_worker():
        worker = next(process for process in torch.multiprocessing.active_children() if process not in others)
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # until it is dead, but leave it to torch to find out

    with before_steps({4: kill_worker}):
        error = refused(train.main, *START, "--num_workers", "1", "--num_epochs", "99", code=1)
    assert "--num_workers" in error
    assert "killed by signal: Killed" in error
    assert load_state(SAVED / "latest.pt")["step"] >= 3


# ---------------------------------------------------------------------------------------------
# Losses that are not finite


def test_a_loss_that_is_not_finite_is_reported_with_its_step_and_images(tmp_path, refused, monkeypatch):
    root = tmp_path / "datasets" / "tiny"
    for split in ("trainA", "trainB"):
        (root / split).mkdir(parents=True)
        for i in range(40):
            noise_image(0).point(lambda _, i=i: 5 * i).save(root / split / f"{split[-1]}{i}.png")
    seen = {"A": [], "B": []}  # numbers of the images of each step
    make_model = train.make_model

    def poisoned(networks, direction, real, *rest):
        loss, terms, translation = cyclegan.generator_loss(networks, direction, real, *rest)
        seen[direction.source].append([round(float((x.mean() + 1) * 127.5) / 5) for x in real])
        if len(seen["A"]) == 7 and direction.source == "A":
            terms["cycle_A"] = terms["cycle_A"] * float("nan")
        return loss, terms, translation

    monkeypatch.setattr(train, "make_model", lambda *args: make_model(*args, objective=poisoned))
    error = refused(train.main, *START, "--num_epochs", "2", code=1)
    paths = [f"datasets/tiny/train{d}/{d}{i}.png" for d in "AB" for i in seen[d][6]]
    assert f"cycle_A not finite at step 7, images {' '.join(paths)}; nothing was saved yet" in error
    assert "--lr" in error


# ---------------------------------------------------------------------------------------------
# Hostile images


def test_on_bad_image_stop_ends_at_the_first(tiny, refused):
    path = tiny / "trainA" / "1.png"
    path.write_bytes(path.read_bytes()[:400])
    error = refused(train.main, *START, "--on_bad_image", "stop", "--num_epochs", "9")
    assert "trainA/1.png: cannot be read" in error
    run_tiny("--num_epochs", 1, "--overwrite")
    (tiny / "testA" / "0.png").write_text("no image")
    argv = ["--run_name", "tiny", "--direction", "AtoB", "--device", "cpu"]
    assert "testA/0.png: cannot be read" in refused(test_command.main, *argv, "--on_bad_image", "stop")
    test_command.main(argv)


def test_the_limit_of_pixels_holds_in_all_commands_and_can_be_raised(tiny, refused, capsys):
    for split in ("trainA", "testA"):
        noise_image(1, (50, 50)).save(tiny / split / "0.png")
    argv = (*START, "--on_bad_image", "stop", "--max_megapixels", "0.0004")
    assert "0.png: cannot be read (50x50 px" in refused(train.main, *argv)
    prepare.main(["check", "tiny", "--max_megapixels", "0.0004"])
    assert "trainA: 5 images, 1 unreadable" in capsys.readouterr().out
    run_tiny("--num_epochs", 1, "--max_megapixels", 0.0024)
    skipped = lines_with("skipped", capsys.readouterr().err)
    assert len(skipped) == 2  # of trainA, and of testA for the grids
    assert all("0.png (50x50 px" in line and "--max_megapixels" in line for line in skipped)
    for limit, count in (("0.0024", "1 image"), ("0.0025", "2 images")):
        test_command.main(["--run_name", "tiny", "--direction", "AtoB", "--device", "cpu", "--max_megapixels", limit])
        assert f"\nAtoB: {count} in" in f"\n{capsys.readouterr().out}"
    distill.main(["--teacher", "tiny", "--student_residual", "0", "--num_epochs", "1", "--device", "cpu"])
    assert "--max_megapixels 0.0024" in capsys.readouterr().out


NAMES = [
    "a\nb.png",
    "<script>alert(1)<script>.png",
    "-rf.png",
    "naïve 猫.png",
    os.fsdecode(b"\xff\xfe.png"),
    "'\"&.png",
]


@pytest.mark.skipif(os.name == "nt", reason="names that Windows does not allow")
def test_images_with_hostile_names_are_trained_on_and_shown_as_text_in_the_gallery(tiny, capsys):
    for split in ("trainA", "trainB", "testA", "testB"):
        shutil.rmtree(tiny / split)
        (tiny / split).mkdir()
        for i, name in enumerate(NAMES):
            with (tiny / split / name).open("wb") as file:
                noise_image(f"{split}{i}").save(file, "PNG")
    (tiny / "trainA" / "torn\x1b[2J\n.png").write_bytes(b"")
    run_tiny("--num_epochs", 1)
    (line,) = lines_with("skipped", capsys.readouterr().err)
    assert "torn\\x1b[2J\\n.png" in line
    test_command.main(["--run_name", "tiny", "--device", "cpu"])
    page = (DRAWN / "test" / "index.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;script&gt;" in page
    for source in page.split('src="')[1:]:
        assert (DRAWN / "test" / os.fsdecode(unquote_to_bytes(source.split('"')[0]))).is_file()


# ---------------------------------------------------------------------------------------------
# Hostile weights


def gigabyte_header(path):
    path.write_bytes(struct.pack("<Q", 2**30) + b'{"a":' + b" " * 1000)


def oversized_tensor(path):
    """Four bytes of storage that claim to be a tensor of a terabyte."""
    tensors = {"w": torch.zeros(1).expand(10**6, 10**6)}
    torch.save({"format": 1, "nets": {"G_AB": tensors}, "config": {"G_AB": {}}}, path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("make", [gigabyte_header, oversized_tensor])
def test_weights_that_claim_to_be_huge_are_refused_at_once(tmp_path, make, suffix):
    path = tmp_path / f"file{suffix}"
    make(path)
    start = time.monotonic()
    for read in (weights.load_generator, lambda path: checkpoints.networks_of(load_state(path), path)):
        with pytest.raises(InputError, match=f"file{suffix}"):
            read(path)
    assert time.monotonic() - start < 60


# ---------------------------------------------------------------------------------------------
# On CUDA, and killed for real


@pytest.mark.gpu
def test_on_cuda_a_deterministic_run_resumes_bit_for_bit(tiny):
    options = ("--num_epochs", 3, "--device", "cuda", "--deterministic")
    run_tiny(*options, "--run_name", "uninterrupted")
    with dies_in_step(8):
        run_tiny(*options, *EACH_STEP)
    train.main([*RESUME[:-1], "cuda"])
    assert differences(end_of("uninterrupted"), end_of("tiny")) == []


@pytest.mark.slow
def test_killed_runs_end_as_uninterrupted_ones(tmp_path):
    """Three SIGKILLs at random moments; the benchmark can do more."""
    command = [sys.executable, ROOT / "benchmarks" / "faults.py", "kills", "--count", "3", "--folder", tmp_path]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills" in result.stdout
