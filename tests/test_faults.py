"""What goes wrong from outside: full disks, damaged files, second processes, killed ones, hostile pictures."""

import errno
import io
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
import torch
from conftest import TINY, make_dataset, noise_picture
from PIL import Image
from test_train import differences, run, state_of

import datasets
import distill
import test as test_stage
import train
import utils
import weights
from utils import InputError, LossLog, RunError, load_state

SAVED, DRAWN = Path("saved_models/tiny"), Path("generated_images/tiny")
RESUME = ["--dataset_name", "tiny", "--start_from", "latest", "--device", "cpu"]
EACH_STEP = ("--save_minutes", 1e-9)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take most of the time of a tiny run, and show nothing here."""
    monkeypatch.setattr(utils, "plot_losses", lambda rows, path: None)


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """What a stage sets for its process ends with the test."""
    monkeypatch.setattr(datasets, "max_pixels", datasets.max_pixels)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


class Dead(BaseException):
    """The process ends here: nothing in the code catches it."""


@contextmanager
def dies_in_step(number):
    """Within the block a training ends without a word before its step `number`."""
    plain, calls = train.train_step, []

    def mortal(*args):
        calls.append(1)
        if len(calls) == number:
            raise Dead
        return plain(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", mortal)
        try:
            yield
        except Dead:
            return
    raise AssertionError(f"there was no step {number}")


@contextmanager
def full_disk(room=0):
    """Within the block no file can grow beyond `room` bytes; the system refuses, as when the disk is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files_of(*folders):
    """Contents of all files below folders, by name; links and times do not count."""
    return {str(p): p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file() and p.suffix}


def same_end(plain, other):
    """The differences between what two runs left: states, losses, grids."""
    found = differences(*({**state_of(name), "args": None} for name in (plain, other)))
    for file in ("losses.csv", "G_AB.safetensors"):
        if file.endswith("csv"):
            found += [file] * ((SAVED.parent / plain / file).read_text() != (SAVED.parent / other / file).read_text())
    grids = sorted(p.name for p in (DRAWN.parent / plain).glob("epoch_*.png"))
    return found + [
        g for g in grids if (DRAWN.parent / plain / g).read_bytes() != (DRAWN.parent / other / g).read_bytes()
    ]


# ---------------------------------------------------------------------------------------------
# Saving and going on


def test_states_are_saved_by_the_minute_and_a_dead_run_goes_on_with_the_next_batch(tiny, monkeypatch):
    saved, plain = [], utils.save_latest
    monkeypatch.setattr(
        utils, "save_latest", lambda f, state, also: (saved.append(state["step"]), plain(f, state, also))
    )
    run("--num_epochs", 2, "--run_name", "uninterrupted", "--save_minutes", 0)
    assert saved == [3, 6]
    saved.clear()
    with dies_in_step(6):
        run("--num_epochs", 2, *EACH_STEP)
    assert saved == [1, 2, 3, 4, 5]
    train.main(RESUME)
    assert saved[5:] == [6]
    assert same_end("uninterrupted", "tiny") == []


def test_a_damaged_latest_is_said_and_previous_is_used_to_the_same_end(tiny, capsys):
    run("--num_epochs", 3, "--run_name", "uninterrupted")
    with dies_in_step(8):
        run("--num_epochs", 3)
    path = SAVED / "latest.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    distill.load_teacher("tiny", ["G_AB"])
    weights.load_run_state(SAVED, "latest")
    lines = [line for line in capsys.readouterr().err.splitlines() if "using saved_models/tiny/previous.pt" in line]
    assert len(lines) == 2
    with dies_in_step(1):  # before anything is saved: a good state must be left
        train.main(RESUME)
    assert load_state(path)["step"] == load_state(SAVED / "previous.pt")["step"] == 3
    train.main(RESUME)
    assert same_end("uninterrupted", "tiny") == []
    assert load_state(SAVED / "previous.pt")["step"] == 6


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "text"])
def test_previous_is_read_whatever_happened_to_latest(tmp_path, capsys, damage):
    for step in (1, 2):
        utils.save_latest(tmp_path, {"nets": {}, "step": step, "stage": "train"})
    path = tmp_path / "latest.pt"
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": data[:-100], "empty": b"", "text": b"x" * 1000}[damage])
    state, used = utils.load_checkpoint(tmp_path, "latest", "--start_from", "train")
    assert (state["step"], used.name) == (1, "previous.pt")
    assert "previous.pt, step 1" in capsys.readouterr().err
    used.write_bytes(b"")
    with pytest.raises(InputError, match=r"latest\.pt"):
        utils.load_checkpoint(tmp_path, "latest", "--start_from", "train")


@pytest.mark.parametrize("call", ["os.link", "utils.replace", "os.fsync", "torch.save"])
def test_wherever_a_save_is_interrupted_a_whole_state_is_left(tmp_path, monkeypatch, call):
    """The process dies before each call in turn of those that touch the disk."""
    module, name = call.split(".")
    module = {"os": os, "utils": utils, "torch": torch}[module]
    plain, survived = getattr(module, name), False
    for moment in range(1, 20):
        for path in tmp_path.iterdir():
            path.unlink()
        for step in (1, 2):
            utils.save_latest(tmp_path, {"nets": {}, "step": step})
        calls = []

        def mortal(*args, calls=calls, moment=moment, **kwargs):
            calls.append(1)
            if len(calls) == moment:
                raise Dead
            return plain(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, mortal)
            try:
                utils.save_latest(tmp_path, {"nets": {}, "step": 3}, [tmp_path / "epoch_0003.pt"])
                survived = True
            except Dead:
                pass
        step = load_state(tmp_path / "latest.pt")["step"]
        assert step == 3 if survived else step in (2, 3)
        assert load_state(tmp_path / "previous.pt")["step"] in (step - 1, step)
        if step == 3:  # what was written before latest.pt is there with it
            assert load_state(tmp_path / "epoch_0003.pt")["step"] == 3
        if survived:
            return
    raise AssertionError("no save came to its end")


def test_generator_files_of_two_saves_are_not_mixed(tiny, capsys):
    run("--num_epochs", 1)
    old = (SAVED / "G_BA.safetensors").read_bytes()
    train.main([*RESUME, "--num_epochs", "2"])
    (SAVED / "G_BA.safetensors").write_bytes(old)
    nets, recipe = weights.load_run("tiny")
    assert "latest.pt is used" in capsys.readouterr().out
    assert recipe["step"] == 6
    assert differences({n: net.state_dict() for n, net in nets.items()}, state_of("tiny")["nets"]) == []


def test_overwrite_keeps_the_earlier_states_until_the_new_run_has_one(tiny):
    run("--num_epochs", 2, "--checkpoint_interval", 1)
    kept = {name: (SAVED / name).read_bytes() for name in ("latest.pt", "epoch_0001.pt", "epoch_0002.pt")}
    with dies_in_step(3):
        run("--num_epochs", 1, "--overwrite", "--seed", 1)
    assert {name: (SAVED / name).read_bytes() for name in kept} == kept
    run("--num_epochs", 1, "--overwrite", "--seed", 1, "--checkpoint_interval", 1)
    assert {p.name for p in SAVED.glob("*.pt")} == {"latest.pt", "epoch_0001.pt"}
    assert state_of("tiny", "epoch_0001.pt")["args"]["seed"] == 1


def test_what_killed_processes_left_half_written_is_removed_and_never_written_into(tiny):
    run("--num_epochs", 1)
    mine = SAVED / f".{os.getpid()}.tmp"
    os.link(SAVED / "latest.pt", mine)  # killed while it made previous.pt; the number is ours again
    before = (SAVED / "latest.pt").read_bytes()
    utils.write_text(SAVED / "notes.txt", "x")
    assert (SAVED / "latest.pt").read_bytes() == before
    (SAVED / ".latest.tmp").write_text("half")
    (DRAWN / ".77.tmp").write_text("half")
    train.main([*RESUME, "--num_epochs", "2"])
    assert not [*SAVED.glob(".*.tmp"), *DRAWN.glob(".*.tmp")]


# ---------------------------------------------------------------------------------------------
# The disk is full


def test_a_full_disk_is_survived_and_the_run_ends_as_it_would_have(tiny, capsys):
    run("--num_epochs", 3, "--run_name", "uninterrupted")
    capsys.readouterr()
    plain, calls = train.train_step, []
    with pytest.MonkeyPatch.context() as patch:
        full = full_disk(room=1000)

        def step(*args):
            calls.append(1)
            if len(calls) == 2:
                full.__enter__()
            if len(calls) == 8:
                full.__exit__(None, None, None)
            return plain(*args)

        patch.setattr(train, "train_step", step)
        run("--num_epochs", 3)
    warnings_ = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert len(warnings_) == 4  # two epochs' grids and states
    assert all("File too large" in line and "tries again" in line for line in warnings_)
    for number in (1, 2):
        shutil.copy(DRAWN.parent / f"uninterrupted/epoch_000{number}.png", DRAWN)  # these two are lost
    assert same_end("uninterrupted", "tiny") == []


def test_a_disk_that_stays_full_ends_in_exit_code_1_and_nothing_is_damaged(tiny, refused):
    run("--num_epochs", 1)
    before = {k: v for k, v in files_of(SAVED).items() if not k.endswith(("run.json", "losses.csv"))}
    (SAVED / "losses.csv").write_text(",".join(["epoch", "step", "lr", *train.TERMS]) + "\n")
    with full_disk(room=5000):
        error = refused(train.main, *RESUME, "--num_epochs", "3", code=1)
    assert "File too large; the last save failed, the last good state is saved_models/tiny/latest.pt" in error
    after = files_of(SAVED)
    assert {k: after[k] for k in before} == before
    assert not [*SAVED.glob(".*.tmp")]
    train.main([*RESUME, "--num_epochs", "3"])
    assert state_of("tiny")["step"] == 9


@pytest.mark.parametrize("kind", ["state", "generator", "text", "picture", "link"])
def test_every_writer_says_what_the_disk_says_and_keeps_the_old_file(tmp_path, kind):
    path = tmp_path / "file.pt"
    path.write_text("old")
    net = train.models.build_generator(train.models.GeneratorConfig(ngf=4, num_residual=1))
    write = {
        "state": lambda: utils.save_state(path, {"nets": {"w": torch.rand(10**5)}}),
        "generator": lambda: weights.save_generator(path, net, {}),
        "text": lambda: utils.write_text(path, "x" * 10**5),
        "picture": lambda: utils.save_picture(noise_picture(0, (200, 200)), path),
        "link": lambda: utils.link_file(tmp_path / "missing", path),
    }[kind]
    with full_disk(room=4096), pytest.raises(OSError, match=r"file\.pt") as error:
        write()
    assert error.value.errno == (errno.ENOENT if kind == "link" else errno.EFBIG)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_rows_that_the_disk_does_not_take_wait_and_are_never_torn(tmp_path):
    log = LossLog(tmp_path / "losses.csv", ["epoch", "step", "lr"], 0)
    rows = [{"epoch": 1, "step": step, "lr": 0.1} for step in (20, 40, 60)]
    log.append(rows[0])
    whole = (tmp_path / "losses.csv").read_text()
    with full_disk(room=len(whole) + 4):
        log.append(rows[1])
        with pytest.raises(OSError, match=r"losses\.csv"):
            log.flush()
    assert (tmp_path / "losses.csv").read_text() == whole
    log.append(rows[2])
    log.flush()
    assert utils.read_losses(log.path) == rows


# ---------------------------------------------------------------------------------------------
# Two processes, dead processes, signals


@pytest.mark.skipif(os.name == "nt", reason="locks by fcntl")
def test_a_second_process_in_the_folder_is_refused_until_the_first_is_dead(tiny, refused):
    run("--num_epochs", 1)
    before = files_of(SAVED, DRAWN)
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); f.write('4711');"
    code += "f.truncate(); f.flush(); print(flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(SAVED / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for argv in ([*RESUME, "--num_epochs", "2"], ["--dataset_name", "tiny", *TINY, "--overwrite"]):
            error = refused(train.main, *argv)
            assert "saved_models/tiny: process 4711 is training there" in error
        other.kill()
    assert files_of(SAVED, DRAWN) == before
    train.main([*RESUME, "--num_epochs", "2"])
    assert state_of("tiny")["epoch"] == 2


def test_a_folder_that_cannot_be_locked_is_said_and_used(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with utils.sole_process(tmp_path):
        assert "cannot be locked" in capsys.readouterr().out


def test_a_second_start_is_told_in_which_flags_it_differs(tiny, refused):
    run("--num_epochs", 1)
    error = refused(train.main, "--dataset_name", "tiny", *TINY, "--lr", "0.1", "--no-flip")
    changes = error.split("with other flags: ")[1].split("; go on with")[0].split(", ")
    assert sorted(changes) == ["--flip True → False", "--lr 0.0002 → 0.1", "--num_epochs 1 → 200"]
    assert "with the same flags" in refused(train.main, "--dataset_name", "tiny", *TINY, "--num_epochs", "1")
    for text in ("[]", '{"flags": 3}', "{", '{"flags": {"lr": null}}'):
        (SAVED / "run.json").write_text(text)
        assert "holds a run already, with" in refused(train.main, "--dataset_name", "tiny", *TINY)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_dead_worker_ends_the_run_in_one_line(tiny, refused, monkeypatch):
    plain, children, calls = train.train_step, [], []

    def murderous(*args):
        calls.append(1)
        if len(calls) == 4:
            loader_children = [p for p in torch.multiprocessing.active_children() if p.pid not in children]
            os.kill(loader_children[0].pid, signal.SIGKILL)
            time.sleep(0.2)
        return plain(*args)

    monkeypatch.setattr(train, "train_step", murderous)
    flags = ["--num_workers", "1", "--num_epochs", "99"]
    error = refused(train.main, "--dataset_name", "tiny", *TINY, *flags, code=1)
    assert "a process that reads pictures died" in error
    assert "killed by signal: Killed" in error
    assert load_state(SAVED / "latest.pt")["step"] >= 3


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals to lose")
def test_a_lost_terminal_is_a_wish_to_stop_unless_nohup_ignores_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    with utils.StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
    assert stop.signum == signal.SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with utils.StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
    assert stop.signum is None
    signal.signal(signal.SIGHUP, before)


def test_sigterm_while_the_demo_set_is_drawn_leaves_nothing(tmp_path, monkeypatch):
    def stopped(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(datasets, "draw_scene", stopped)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        datasets.main(["draw", "day2night"])
    assert exit_.value.code == 143
    assert list(Path("datasets").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


# ---------------------------------------------------------------------------------------------
# The watchdog


def test_a_step_that_is_not_finite_is_named_with_its_term_and_pictures(tmp_path, refused, monkeypatch):
    root = tmp_path / "datasets" / "tiny"
    for split in ("trainA", "trainB"):
        (root / split).mkdir(parents=True)
        for i in range(40):
            noise_picture(0).point(lambda _, i=i: 5 * i).save(root / split / f"{split[-1]}{i}.png")
    plain, seen = train.cyclegan_objective, []

    def poisoned(run_, real_A, real_B):
        loss, terms, pictures = plain(run_, real_A, real_B)
        seen.append([round(float((x.mean() + 1) * 127.5) / 5) for x in (*real_A, *real_B)])
        if len(seen) == 7:
            terms["cycle_A"] = terms["cycle_A"] * float("nan")
        return loss, terms, pictures

    monkeypatch.setattr(train, "cyclegan_objective", poisoned)
    error = refused(train.main, "--dataset_name", "tiny", *TINY, "--num_epochs", "2", code=1)
    names = [root / f"train{d}" / f"{d}{i}.png" for d, i in zip("AABB", seen[6], strict=True)]
    names = " ".join(str(path.relative_to(tmp_path)) for path in names)
    assert f"cycle_A not finite at step 7, pictures {names}; nothing was saved yet; try a smaller --lr" in error


def test_a_generator_that_answers_one_picture_is_warned_about_once_an_epoch(tiny, capsys, monkeypatch):
    run("--num_epochs", 1)
    assert "the same picture" not in capsys.readouterr().err
    plain = train.make_nets

    def constant(*args):
        nets = plain(*args)
        torch.nn.init.zeros_(nets["G_AB"].head[1].weight)
        return nets

    monkeypatch.setattr(train, "make_nets", constant)
    run("--num_epochs", 3, "--freeze", "head", "--run_name", "stuck", "--sample_interval", 1)
    lines = [line for line in capsys.readouterr().err.splitlines() if "the same picture" in line]
    assert len(lines) == 3
    assert all("warning: G_AB: draws" in line and "--start_from" in line for line in lines)


def test_a_single_sample_picture_tells_nothing(capsys):
    one, rows = torch.rand(1, 3, 8, 8), ("real_A", "fake_B", "real_B", "fake_A")
    train.warn_if_stuck(dict.fromkeys(rows, one))
    train.warn_if_stuck(dict.fromkeys(rows, torch.cat([one, one])))
    assert capsys.readouterr().err == ""
    train.warn_if_stuck(dict.fromkeys(rows, torch.cat([one, 1 - one])) | {"fake_A": torch.cat([one, one])})
    assert "warning: G_BA: draws" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Hostile pictures


def test_on_bad_image_stop_ends_at_the_first(tiny, refused):
    path = tiny / "trainA" / "1.png"
    path.write_bytes(path.read_bytes()[:400])
    error = refused(train.main, "--dataset_name", "tiny", *TINY, "--on_bad_image", "stop", "--num_epochs", "9")
    assert "trainA/1.png: unreadable" in error
    run("--num_epochs", 1, "--overwrite")
    (tiny / "testA" / "0.png").write_text("no picture")
    argv = ["--run_name", "tiny", "--direction", "AtoB", "--device", "cpu"]
    assert "testA/0.png: unreadable" in refused(test_stage.main, *argv, "--on_bad_image", "stop")
    test_stage.main(argv)


def test_the_limit_of_pixels_holds_everywhere_and_can_be_raised(tiny, refused, capsys, monkeypatch):
    for split in ("trainA", "testA"):
        noise_picture(1, (50, 50)).save(tiny / split / "0.png")
    argv = ("--dataset_name", "tiny", *TINY, "--on_bad_image", "stop", "--max_megapixels", "0.0004")
    assert "0.png: unreadable (50x50 px" in refused(train.main, *argv)
    datasets.main(["check", "tiny", "--max_megapixels", "0.0004"])
    assert "trainA: 5 pictures, 1 unreadable" in capsys.readouterr().out
    run("--num_epochs", 1, "--max_megapixels", 0.0024)
    assert "0.png (50x50 px; if it is no bomb, raise --max_megapixels" in capsys.readouterr().err
    for flag, count in (("0.0024", 1), ("0.0025", 2)):
        test_stage.main(["--run_name", "tiny", "--direction", "AtoB", "--device", "cpu", "--max_megapixels", flag])
        assert f"AtoB: {count} pictures" in (DRAWN / "test" / "index.html").read_text()
    assert "inherited" not in capsys.readouterr().out
    distill.main(["--teacher", "tiny", "--num_epochs", "1", "--device", "cpu"])
    assert "--max_megapixels 0.0024" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_have_the_same_limit_of_pixels(tiny):
    datasets.limit_pixels(300)
    sampler = datasets.EpochSampler((5, 4), 2)
    paths = {domain: datasets.list_pictures(tiny / f"train{domain}") for domain in "AB"}
    loader = datasets.make_loader(datasets.UnpairedDataset(paths, (16, 16)), sampler, 1, pin_memory=False)
    assert "20x18 px" in next(iter(loader))["bad"][0][2]


def test_a_small_file_that_claims_a_huge_picture_is_refused_at_once(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, "PNG")
    (tmp_path / "bomb.png").write_bytes(buffer.getvalue())
    start = time.monotonic()
    datasets.limit_pixels(178e6)
    with pytest.raises(datasets.UnreadablePicture, match="20000x10000 px"):
        datasets.read_picture(tmp_path / "bomb.png")
    assert time.monotonic() - start < 1


def test_postscript_named_as_a_picture_reaches_no_interpreter(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(datasets.UnreadablePicture, match="cannot identify"):
        datasets.read_picture(tmp_path / "x.jpg")
    noise_picture(0).save(tmp_path / "gif.png", "GIF")  # mislabelled, but a picture
    assert datasets.read_picture(tmp_path / "gif.png").size == (20, 18)


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
                noise_picture(f"{split}{i}").save(file, "PNG")
    (tiny / "trainA" / "torn\x1b[2J\n.png").write_bytes(b"")
    run("--num_epochs", 1)
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
    assert [p.name for p in datasets.list_pictures(tiny / "trainA")] == [*(f"{i}.png" for i in range(5)), "round.png"]
    run("--num_epochs", 1, "--run_name", "loops")
    assert capsys.readouterr().err.count("skipped, unreadable (1 of 6)") == 1
    (tiny / "trainB" / "closed").mkdir()
    plain = os.scandir

    def guarded(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", guarded)
    run("--num_epochs", 1)
    assert "skipped, unreadable (1 of 5): datasets/tiny/trainB/closed" in capsys.readouterr().err


def test_a_file_removed_during_the_run_is_replaced_and_named_once(tiny, capsys, monkeypatch):
    plain, calls = train.train_step, []

    def step(*args):
        calls.append(1)
        if len(calls) == 2:
            (tiny / "trainB" / "2.png").unlink()
        return plain(*args)

    monkeypatch.setattr(train, "train_step", step)
    run("--num_epochs", 4)
    errors = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(errors) == 1
    assert "trainB/2.png (FileNotFoundError" in errors[0]


def test_six_of_a_hundred_bad_headers_stop_before_the_first_step_and_two_do_not(tmp_path, refused, capsys):
    root = make_dataset(tmp_path / "datasets" / "tiny", (100, 100, 2, 2))
    for i in range(6):
        (root / "trainB" / f"{i}.png").write_bytes(b"\x89PNG")
    error = refused(train.main, "--dataset_name", "tiny", *TINY)
    assert "6 or more of 100 pictures are unreadable, more than 5%" in error
    assert not SAVED.exists()
    for i in range(2, 6):
        noise_picture(i).save(root / "trainB" / f"{i}.png")
    run("--num_epochs", 2, "--batch_size", 50)
    assert capsys.readouterr().err.count("skipped, unreadable") == 2


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
        for read in (load_state, weights.load_generator, lambda p: weights.networks_of(load_state(p), p)):
            if make is oversized_tensor and read is load_state:
                continue  # nothing wrong as long as no network takes it
            with pytest.raises(InputError, match=f"file{suffix}"):
                read(path)
    assert time.monotonic() - start < 10


def test_a_flag_that_is_none_in_a_checkpoint_is_refused(tiny, refused):
    run("--num_epochs", 1)
    distill.main(["--teacher", "tiny", "--num_epochs", "1", "--device", "cpu"])
    for name, argv in (
        ("tiny", ["--teacher", "tiny", "--num_epochs", "2", "--overwrite"]),
        ("tiny_student", ["--run_name", "tiny_student", "--start_from", "latest", "--num_epochs", "2"]),
    ):
        path = Path("saved_models") / name / "latest.pt"
        before = path.read_bytes()
        state = load_state(path)
        state["args"]["lambda_cycle"] = None
        torch.save(state, path)
        (path.parent / "previous.pt").unlink(missing_ok=True)
        assert f"{path}: says --lambda_cycle None" in refused(distill.main, *argv, "--device", "cpu")
        path.write_bytes(before)


def test_checkpoints_from_before_a_flag_existed_go_on_with_its_default(tiny):
    run("--num_epochs", 1)
    state = state_of("tiny")
    for name in ("save_minutes", "max_megapixels", "on_bad_image"):
        del state["args"][name]
    utils.save_state(SAVED / "latest.pt", state)
    train.main([*RESUME, "--num_epochs", "2"])
    assert state_of("tiny")["args"]["save_minutes"] == 10.0


def test_failed_saves_that_are_bugs_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(ZeroDivisionError):
        utils.attempt(lambda: 1 / 0)
    with pytest.raises(RunError):
        utils.attempt(lambda: (_ for _ in ()).throw(RunError("x")).__next__())


@pytest.mark.gpu
def test_on_cuda_a_deterministic_run_goes_on_bit_for_bit(tiny):
    flags = ("--num_epochs", 3, "--device", "cuda", "--deterministic")
    run(*flags, "--run_name", "uninterrupted")
    with dies_in_step(8):
        run(*flags, *EACH_STEP)
    train.main([*RESUME[:-1], "cuda"])
    assert same_end("uninterrupted", "tiny") == []
