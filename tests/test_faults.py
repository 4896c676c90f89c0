"""What goes wrong from outside while stages run: full disks, damaged files, second processes, hostile images."""

import errno
import os
import pickle
import shutil
import signal
import string
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
import torch
from breakage import before_steps, dies_in_step, full_disk
from conftest import TINY, differences, make_dataset, noise_image
from edits import FUZZ
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import run_tiny, state_of

import cyclegan
import distill
import prepare
import test as test_stage
import train
from toolkit import checkpoints, images, inference, weights
from toolkit.checkpoints import load_state
from utils import InputError, one_line

pytestmark = pytest.mark.usefixtures("no_plots")
ROOT = Path(train.__file__).parent
SAVED = Path("saved_models/tiny")
DRAWN = Path("generated_images/tiny")
START = ["--dataset_name", "tiny", *TINY]
RESUME = ["--dataset_name", "tiny", "--start_from", "latest", "--device", "cpu"]
EACH_STEP = ("--save_minutes", 1e-9)


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """What a stage sets for its process ends with the test."""
    monkeypatch.setattr(images, "max_pixels", images.max_pixels)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def files_of(*folders):
    """Contents of all files below folders, by name; links and times do not count."""
    return {str(p): p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file() and p.suffix}


def same_end(plain, other):
    """The differences between what two runs left: states, losses, generators, grids."""
    found = differences(*({**state_of(name), "args": None} for name in (plain, other)))
    saved = [SAVED.parent / name for name in (plain, other)]
    drawn = [DRAWN.parent / name for name in (plain, other)]
    if (saved[0] / "losses.csv").read_text() != (saved[1] / "losses.csv").read_text():
        found.append("losses.csv")
    generators = [weights.load_generator(folder / "G_AB.safetensors")[0].state_dict() for folder in saved]
    found += differences(*generators)
    for grid in sorted(path.name for path in drawn[0].glob("epoch_*.png")):
        if (drawn[0] / grid).read_bytes() != (drawn[1] / grid).read_bytes():
            found.append(grid)
    return found


# ---------------------------------------------------------------------------------------------
# Saving and going on


def test_states_are_saved_by_the_minute_and_a_dead_run_goes_on_with_the_next_batch(tiny, monkeypatch):
    saved = []
    plain = checkpoints.save_latest

    def save_latest(folder, state, also):
        saved.append(state["step"])
        plain(folder, state, also)

    monkeypatch.setattr(checkpoints, "save_latest", save_latest)
    run_tiny("--num_epochs", 2, "--run_name", "uninterrupted", "--save_minutes", 0)
    assert saved == [3, 6]
    saved.clear()
    with dies_in_step(6):
        run_tiny("--num_epochs", 2, *EACH_STEP)
    assert saved == [1, 2, 3, 4, 5]
    train.main(RESUME)
    assert saved[5:] == [6]
    assert same_end("uninterrupted", "tiny") == []


def test_a_damaged_latest_is_said_and_previous_is_used_to_the_same_end(tiny, capsys):
    run_tiny("--num_epochs", 3, "--run_name", "uninterrupted")
    with dies_in_step(8):
        run_tiny("--num_epochs", 3)
    path = SAVED / "latest.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    distill.load_teacher("tiny", ["G_AB"])
    inference.load_run_state(SAVED, "latest")
    lines = [line for line in capsys.readouterr().err.splitlines() if "using saved_models/tiny/previous.pt" in line]
    assert len(lines) == 2
    with dies_in_step(1):  # before anything is saved: a good state must be left
        train.main(RESUME)
    assert load_state(path)["step"] == load_state(SAVED / "previous.pt")["step"] == 3
    train.main(RESUME)
    assert same_end("uninterrupted", "tiny") == []
    assert load_state(SAVED / "previous.pt")["step"] == 6


def test_generator_files_of_two_saves_are_not_mixed(tiny, capsys):
    run_tiny("--num_epochs", 1)
    old = (SAVED / "G_BA.safetensors").read_bytes()
    train.main([*RESUME, "--num_epochs", "2"])
    (SAVED / "G_BA.safetensors").write_bytes(old)
    nets, metadata = inference.load_run("tiny")
    assert "saved_models/tiny: " in capsys.readouterr().out
    assert metadata["step"] == 6
    assert differences({n: net.state_dict() for n, net in nets.items()}, state_of("tiny")["nets"]) == []


# ---------------------------------------------------------------------------------------------
# The disk is full


def test_a_full_disk_is_survived_and_the_run_ends_as_it_would_have(tiny, capsys):
    run_tiny("--num_epochs", 3, "--run_name", "uninterrupted")
    capsys.readouterr()
    full = full_disk(room=1000)
    with before_steps({2: full.__enter__, 8: lambda: full.__exit__(None, None, None)}):
        run_tiny("--num_epochs", 3)
    said = [line.split("warning: ")[1] for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    lost = ["generated_images/tiny/epoch_0001.png", "saved_models/tiny/G_AB.safetensors"]
    lost += ["generated_images/tiny/epoch_0002.png", "saved_models/tiny/G_AB.safetensors"]
    assert [line.split(": ")[0] for line in said] == lost  # two epochs' grids and states
    assert all("File too large" in line for line in said)
    for number in (1, 2):
        shutil.copy(DRAWN.parent / f"uninterrupted/epoch_000{number}.png", DRAWN)  # these two are lost
    assert same_end("uninterrupted", "tiny") == []


def test_a_disk_that_stays_full_ends_in_exit_code_1_and_nothing_is_damaged(tiny, refused):
    run_tiny("--num_epochs", 1)
    before = {k: v for k, v in files_of(SAVED).items() if not k.endswith(("run.json", "losses.csv"))}
    (SAVED / "losses.csv").write_text(",".join(["epoch", "step", "lr", *cyclegan.TERMS]) + "\n")
    with full_disk(room=5000):
        error = refused(train.main, *RESUME, "--num_epochs", "3", code=1)
    assert error.startswith("error: saved_models/tiny/G_AB.safetensors: File too large; ")
    assert "saved_models/tiny/latest.pt" in error
    after = files_of(SAVED)
    assert {k: after[k] for k in before} == before
    assert not [*SAVED.glob(".*.tmp")]
    train.main([*RESUME, "--num_epochs", "3"])
    assert state_of("tiny")["step"] == 9


# ---------------------------------------------------------------------------------------------
# Two processes, dead processes, signals


@pytest.mark.skipif(os.name == "nt", reason="locks by fcntl")
def test_a_second_process_in_the_folder_is_refused_until_the_first_is_dead(tiny, refused):
    run_tiny("--num_epochs", 1)
    before = files_of(SAVED, DRAWN)
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); f.write('4711');"
    code += "f.truncate(); f.flush(); print(flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(SAVED / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for argv in ([*RESUME, "--num_epochs", "2"], [*START, "--overwrite"]):
            error = refused(train.main, *argv)
            assert "saved_models/tiny: process 4711 " in error
        other.kill()
    assert files_of(SAVED, DRAWN) == before
    train.main([*RESUME, "--num_epochs", "2"])
    assert state_of("tiny")["epoch"] == 2


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_dead_worker_ends_the_run_in_one_line(tiny, refused):
    children = []

    def murder():
        worker = next(p for p in torch.multiprocessing.active_children() if p.pid not in children)
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.2)

    children += [process.pid for process in torch.multiprocessing.active_children()]
    with before_steps({4: murder}):
        error = refused(train.main, *START, "--num_workers", "1", "--num_epochs", "99", code=1)
    assert "--num_workers" in error
    assert "killed by signal: Killed" in error
    assert load_state(SAVED / "latest.pt")["step"] >= 3


# ---------------------------------------------------------------------------------------------
# The watchdog


def test_a_step_that_is_not_finite_is_named_with_its_term_and_images(tmp_path, refused, monkeypatch):
    root = tmp_path / "datasets" / "tiny"
    for split in ("trainA", "trainB"):
        (root / split).mkdir(parents=True)
        for i in range(40):
            noise_image(0).point(lambda _, i=i: 5 * i).save(root / split / f"{split[-1]}{i}.png")
    make_model = train.make_model
    seen = {"A": [], "B": []}

    def poisoned(nets, domain, real, config):
        loss, terms, outputs = cyclegan.generator_loss(nets, domain, real, config)
        seen[domain].append([round(float((x.mean() + 1) * 127.5) / 5) for x in real])
        if len(seen["A"]) == 7 and domain == "A":
            terms["cycle_A"] = terms["cycle_A"] * float("nan")
        return loss, terms, outputs

    monkeypatch.setattr(train, "make_model", lambda *args: make_model(*args, loss=poisoned))
    error = refused(train.main, *START, "--num_epochs", "2", code=1)
    names = [root / f"train{d}" / f"{d}{i}.png" for d, i in zip("AABB", seen["A"][6] + seen["B"][6], strict=True)]
    names = " ".join(str(path.relative_to(tmp_path)) for path in names)
    assert f"cycle_A not finite at step 7, images {names}; nothing was saved yet" in error
    assert "--lr" in error


def test_a_generator_that_collapsed_is_warned_about_once_an_epoch(tiny, capsys, monkeypatch):
    run_tiny("--num_epochs", 1)
    assert "warning" not in capsys.readouterr().err
    plain = train.make_nets

    def constant(*args):
        nets = plain(*args)
        torch.nn.init.zeros_(nets["G_AB"].head[1].weight)
        return nets

    monkeypatch.setattr(train, "make_nets", constant)
    run_tiny("--num_epochs", 3, "--freeze", "head", "--run_name", "collapsed", "--sample_interval", 1)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert len(lines) == 3
    assert all("warning: G_AB: " in line and "--start_from" in line for line in lines)


# ---------------------------------------------------------------------------------------------
# Hostile images


def test_on_bad_image_stop_ends_at_the_first(tiny, refused):
    path = tiny / "trainA" / "1.png"
    path.write_bytes(path.read_bytes()[:400])
    error = refused(train.main, *START, "--on_bad_image", "stop", "--num_epochs", "9")
    assert "trainA/1.png: unreadable" in error
    run_tiny("--num_epochs", 1, "--overwrite")
    (tiny / "testA" / "0.png").write_text("no image")
    argv = ["--run_name", "tiny", "--direction", "AtoB", "--device", "cpu"]
    assert "testA/0.png: unreadable" in refused(test_stage.main, *argv, "--on_bad_image", "stop")
    test_stage.main(argv)


def test_the_limit_of_pixels_holds_everywhere_and_can_be_raised(tiny, refused, capsys, monkeypatch):
    for split in ("trainA", "testA"):
        noise_image(1, (50, 50)).save(tiny / split / "0.png")
    argv = (*START, "--on_bad_image", "stop", "--max_megapixels", "0.0004")
    assert "0.png: unreadable (50x50 px" in refused(train.main, *argv)
    prepare.main(["check", "tiny", "--max_megapixels", "0.0004"])
    assert "trainA: 5 images, 1 unreadable" in capsys.readouterr().out
    run_tiny("--num_epochs", 1, "--max_megapixels", 0.0024)
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 2  # of trainA, and of testA for the grids
    assert all("0.png (50x50 px" in line and "--max_megapixels" in line for line in lines)
    for flag, count in (("0.0024", "1 image"), ("0.0025", "2 images")):
        test_stage.main(["--run_name", "tiny", "--direction", "AtoB", "--device", "cpu", "--max_megapixels", flag])
        assert f"\nAtoB: {count} in" in f"\n{capsys.readouterr().out}"
    assert "inherited" not in capsys.readouterr().out
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
def test_hostile_names_train_and_show_in_the_gallery_as_text(tiny, capsys):
    for split in ("trainA", "trainB", "testA", "testB"):
        shutil.rmtree(tiny / split)
        (tiny / split).mkdir()
        for i, name in enumerate(NAMES):
            with (tiny / split / name).open("wb") as file:
                noise_image(f"{split}{i}").save(file, "PNG")
    (tiny / "trainA" / "torn\x1b[2J\n.png").write_bytes(b"")
    run_tiny("--num_epochs", 1)
    error = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(error) == 1
    assert "torn\\x1b[2J\\n.png" in error[0]
    test_stage.main(["--run_name", "tiny", "--device", "cpu"])
    page = (DRAWN / "test" / "index.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;script&gt;" in page
    for source in page.split('src="')[1:]:
        assert (DRAWN / "test" / os.fsdecode(unquote_to_bytes(source.split('"')[0]))).is_file()


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_links_in_circles_and_closed_folders_are_named_and_counted(tiny, monkeypatch, capsys):
    (tiny / "trainA" / "loop").symlink_to(tiny / "trainA", target_is_directory=True)
    (tiny / "trainA" / "round.png").symlink_to(tiny / "trainA" / "round.png")
    assert [p.name for p in images.list_images(tiny / "trainA")] == [*(f"{i}.png" for i in range(5)), "round.png"]
    run_tiny("--num_epochs", 1, "--run_name", "loops")
    assert capsys.readouterr().err.count("skipped, unreadable (1 of 6)") == 1
    (tiny / "trainB" / "closed").mkdir()
    plain = os.scandir

    def guarded(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", guarded)
    run_tiny("--num_epochs", 1)
    assert "skipped, unreadable (1 of 5): datasets/tiny/trainB/closed" in capsys.readouterr().err


def test_a_file_removed_during_the_run_is_replaced_and_named_once(tiny, capsys):
    with before_steps({2: (tiny / "trainB" / "2.png").unlink}):
        run_tiny("--num_epochs", 4)
    errors = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(errors) == 1
    assert "trainB/2.png (FileNotFoundError" in errors[0]


def test_six_of_a_hundred_bad_headers_stop_before_the_first_step_and_two_do_not(tmp_path, refused, capsys):
    root = make_dataset(tmp_path / "datasets" / "tiny", (100, 100, 2, 2))
    for i in range(6):
        (root / "trainB" / f"{i}.png").write_bytes(b"\x89PNG")
    error = refused(train.main, *START)
    assert "datasets/tiny/trainB: 6 or more of 100 " in error
    assert not SAVED.exists()
    for i in range(2, 6):
        noise_image(i).save(root / "trainB" / f"{i}.png")
    run_tiny("--num_epochs", 2, "--batch_size", 50)
    assert capsys.readouterr().err.count("skipped, unreadable") == 2


# ---------------------------------------------------------------------------------------------
# Hostile command lines

WORDS = st.sampled_from(sorted(o for a in train.make_parser().flags.values() for o in a.option_strings))
WORDS = WORDS | st.text(string.printable, max_size=8) | st.integers().map(str) | st.floats().map(str)


@pytest.mark.slow
@FUZZ
@given(argv=st.lists(WORDS, max_size=8))
def test_any_command_line_is_understood_or_refused_in_one_line(argv):
    if {"-h", "--help"} & set(argv):
        return
    for stage in (train, distill, test_stage):
        refusal = "python"
        try:
            stage.parse_args(argv)
        except InputError as error:
            refusal = one_line(error)
        assert "python" in refusal
        assert len(refusal) < 1000


# ---------------------------------------------------------------------------------------------
# Hostile checkpoints and weights


def zip_bomb(path):
    """A small archive whose one member unpacks to a thousand times its size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as file:
        file.write(bytes(2**24))


def copies_of_copies(path):
    value = ["x"]
    for _ in range(60):
        value = [value, value]
    torch.save({"format": 1, "nets": {}, "args": value, "stage": value}, path)


def gigabyte_header(path):
    path.write_bytes(struct.pack("<Q", 2**30) + b'{"a":' + b" " * 1000)


def oversized_tensor(path):
    """Four bytes of storage, shown as a tensor of a terabyte."""
    torch.save({"format": 1, "nets": {"G_AB": {"w": torch.zeros(1).expand(10**6, 10**6)}}, "config": {}}, path)


def long_number(path):
    path.write_bytes(pickle.dumps({"format": 10**5000, "nets": {}}))


def no_zip(path):
    path.write_bytes(b"PK\x03\x04" + bytes(100))


@pytest.mark.parametrize("make", [zip_bomb, copies_of_copies, gigabyte_header, oversized_tensor, long_number, no_zip])
def test_archives_that_would_fill_memory_or_time_are_refused_at_once(tmp_path, make):
    start = time.monotonic()
    for suffix in (".pt", ".pth", ".safetensors"):
        path = tmp_path / f"file{suffix}"
        make(path)
        for read in (load_state, weights.load_generator, lambda p: checkpoints.networks_of(load_state(p), p)):
            if make is oversized_tensor and read is load_state:
                continue  # nothing wrong as long as no network takes it
            with pytest.raises(InputError, match=f"file{suffix}"):
                read(path)
    assert time.monotonic() - start < 10


@pytest.mark.gpu
def test_on_cuda_a_deterministic_run_goes_on_bit_for_bit(tiny):
    flags = ("--num_epochs", 3, "--device", "cuda", "--deterministic")
    run_tiny(*flags, "--run_name", "uninterrupted")
    with dies_in_step(8):
        run_tiny(*flags, *EACH_STEP)
    train.main([*RESUME[:-1], "cuda"])
    assert same_end("uninterrupted", "tiny") == []


@pytest.mark.slow
def test_killed_runs_end_as_uninterrupted_ones(tmp_path):
    """Three SIGKILLs at random moments; the benchmark does fifty."""
    words = [sys.executable, ROOT / "benchmarks" / "faults.py", "kills", "--count", "3", "--folder", tmp_path]
    result = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills" in result.stdout
