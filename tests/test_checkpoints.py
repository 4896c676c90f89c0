"""Training states: what is saved, kept, refused and resumed, whatever happens in between."""

import errno
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from breakage import Dead, before_steps, dies_in_step, full_disk, stops_in_step
from conftest import TINY, differences, make_dataset, noise_image
from edits import FUZZ
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import run_tiny, save_run, state_of

import distill
import train
from models import DIRECTIONS
from toolkit import checkpoints, devices
from toolkit.checkpoints import IMAGES, RUNS, load_checkpoint, load_state, save_latest, save_state
from toolkit.files import temporary_name, write_text
from toolkit.inference import load_networks, load_run
from toolkit.logs import read_losses
from utils import InputError

pytestmark = pytest.mark.usefixtures("no_plots")
SAVED = RUNS / "tiny"
DRAWN = IMAGES / "tiny"
LATEST = SAVED / "latest.pt"
START = ["--dataset_name", "tiny", *TINY]
RESUME = ["--dataset_name", "tiny", "--start_from", "latest", "--device", "cpu"]


# -- reading states --------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {"nets": {"G": {"w": torch.rand(3)}}, "stage": "train", "rng": devices.rng_state()}
    save_state(tmp_path / "s.pt", state)
    loaded = load_state(tmp_path / "s.pt", "train")
    assert differences({**state, "format": 1}, loaded) == []
    before = torch.rand(3)
    devices.set_rng_state(loaded["rng"])
    assert torch.equal(torch.rand(3), before)


def test_states_of_other_programs_versions_and_commands_are_refused(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save({"format": 99, "nets": {}}, tmp_path / "new.pt")
    save_state(tmp_path / "distill.pt", {"nets": {}, "stage": "distill"})
    messages = {
        "other": "holds no training state",
        "new": "format 99",
        "distill": "a state of distill.py",
        "none": "no such file",
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            load_state(tmp_path / f"{name}.pt", "train")


def test_a_missing_checkpoint_lists_those_that_exist(tmp_path):
    for name in ("epoch_0010.pt", "epoch_0002.pt", "latest.pt"):
        (tmp_path / name).touch()
    for epoch, message in (("10", "epoch_0010.pt: "), ("3", "--epoch 3: .*expected one of: 2, 10, latest")):
        with pytest.raises(InputError, match=message):
            load_checkpoint(tmp_path, epoch, "--epoch")


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "text"])
def test_previous_is_read_whatever_happened_to_latest(tmp_path, capsys, damage):
    for step in (1, 2):
        save_latest(tmp_path, {"nets": {}, "step": step, "stage": "train"})
    path = tmp_path / "latest.pt"
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": data[:-100], "empty": b"", "text": b"x" * 1000}[damage])
    state, used = load_checkpoint(tmp_path, "latest", "--start_from", "train")
    assert (state["step"], used.name) == (1, "previous.pt")
    assert "previous.pt, step 1" in capsys.readouterr().err
    used.write_bytes(b"")
    with pytest.raises(InputError, match=r"latest\.pt"):
        load_checkpoint(tmp_path, "latest", "--start_from", "train")


# -- a whole state is left whatever happens --------------------------------------------------


@pytest.mark.parametrize(("owner", "name"), [(os, "link"), (Path, "replace"), (os, "fsync"), (torch, "save")])
def test_wherever_a_save_is_interrupted_a_whole_state_is_left(tmp_path, monkeypatch, owner, name):
    """The process dies before each call in turn of those that touch the disk."""
    original = getattr(owner, name)
    survived = False
    for moment in range(1, 20):
        for path in tmp_path.iterdir():
            path.unlink()
        for step in (1, 2):
            save_latest(tmp_path, {"nets": {}, "step": step})
        calls = []

        def mortal(*args, calls=calls, moment=moment, **kwargs):
            calls.append(1)
            if len(calls) == moment:
                raise Dead
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, mortal)
            try:
                save_latest(tmp_path, {"nets": {}, "step": 3}, [tmp_path / "epoch_0003.pt"])
                survived = True
            except Dead:
                pass
        step = load_state(tmp_path / "latest.pt")["step"]
        assert step == 3 if survived else step in (2, 3)
        assert load_state(tmp_path / "previous.pt")["step"] in (step - 1, step)
        if step == 3:  # what is written before latest.pt is there with it
            assert load_state(tmp_path / "epoch_0003.pt")["step"] == 3
        if survived:
            assert moment > 1
            return
    raise AssertionError("no save was completed")


def test_a_full_disk_is_reported_with_the_file_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.pt"
    path.write_text("old")
    with full_disk(room=4096), pytest.raises(OSError, match=r"file\.pt") as error:
        save_state(path, {"nets": {"w": torch.rand(10**5)}})
    assert error.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_newest_checkpoints_of_the_run_are_kept(tiny):
    run_tiny("--num_epochs", 1, "--steps_per_epoch", 1, "--checkpoint_interval", 1)
    (SAVED / "epoch_best.pt").write_text("mine")
    (SAVED / "epoch_0009.pt").write_text("of an abandoned future")
    train.main([*RESUME, "--num_epochs", "4", "--keep_checkpoints", "2"])
    names = sorted(path.name for path in SAVED.glob("*.pt"))
    kept = ["epoch_0003.pt", "epoch_0004.pt", "epoch_0009.pt", "epoch_best.pt"]
    assert names == [*kept, "latest.pt", "previous.pt"]


def test_what_killed_processes_left_half_written_is_removed_and_never_written_into(tiny):
    run_tiny("--num_epochs", 1)
    mine = SAVED / temporary_name(threading.get_native_id())
    os.link(LATEST, mine)  # killed while it made previous.pt; the number is ours again
    before = LATEST.read_bytes()
    write_text(SAVED / "notes.txt", "x")
    assert LATEST.read_bytes() == before
    (SAVED / ".cyclegan-76-0.tmp").write_text("half")
    (DRAWN / ".cyclegan-77-78.tmp").write_text("half")
    train.main([*RESUME, "--num_epochs", "2"])
    assert not [*SAVED.glob(".*.tmp"), *DRAWN.glob(".*.tmp")]


# -- a run whose name is taken ---------------------------------------------------------------


def test_a_second_start_is_refused_and_overwrite_deletes_only_the_runs_own_files(tiny, refused):
    run_tiny("--num_epochs", 1)
    (SAVED / "notes.txt").write_text("mine")
    before = LATEST.read_bytes()
    error = refused(train.main, *START)
    for text in ("saved_models/tiny", "--start_from latest", "--overwrite"):
        assert text in error
    refused(train.main, *START, "--overwrite", "--watch", "nobody.jpg")
    assert LATEST.read_bytes() == before  # a refused start deletes nothing
    run_tiny("--num_epochs", 1, "--overwrite", "--steps_per_epoch", 1)
    assert state_of("tiny")["step"] == 1
    assert (SAVED / "notes.txt").read_text() == "mine"


def test_translations_of_a_weights_file_with_the_name_of_a_run_are_kept(tiny):
    image = DRAWN / "test" / "fake_B" / "photo.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"a translation")
    run_tiny("--num_epochs", 1, "--steps_per_epoch", 1)
    assert image.read_bytes() == b"a translation"


def snapshot():
    """The contents of all files of a run, without the lock."""
    files = [path for folder in (SAVED, DRAWN) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): path.read_bytes() for path in files}


def finished_part(files):
    """A snapshot without what a killed run left."""
    return {name: content for name, content in files.items() if "unfinished" not in name}


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.usefixtures("no_plots")
def test_a_run_that_dies_before_its_first_save_leaves_the_one_it_would_replace(tiny, step):
    noise_image(1).save("cat.png")
    run_tiny("--num_epochs", 2, "--checkpoint_interval", 1, "--watch", "cat.png", "--eval_interval", 1)
    before = snapshot()
    assert f"{DRAWN}/watch/cat/epoch_0002.png" in before
    with dies_in_step(step):
        run_tiny("--num_epochs", 1, "--overwrite", "--seed", 1, "--sample_interval", 1)
    assert snapshot() == before


@pytest.mark.usefixtures("no_plots")
def test_overwrite_removes_the_earlier_run_at_the_first_save_and_nothing_else(tiny):
    noise_image(1).save("cat.png")
    run_tiny("--num_epochs", 2, "--checkpoint_interval", 1, "--watch", "cat.png")
    mine = [
        SAVED / "tensorboard/mine.txt",
        DRAWN / "watch/cat/mine.png",
        DRAWN / "test/fake_B/a.png",
        DRAWN / "mine.txt",
    ]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    run_tiny("--num_epochs", 1, "--overwrite", "--seed", 1, "--checkpoint_interval", 1)
    assert {path.name for path in SAVED.glob("*.pt")} == {"latest.pt", "epoch_0001.pt"}
    assert state_of("tiny", "epoch_0001.pt")["args"]["seed"] == 1
    assert [path.name for path in DRAWN.glob("epoch*.png")] == ["epoch_0001.png"]
    assert [path.name for path in (DRAWN / "watch/cat").iterdir()] == ["mine.png"]
    assert all(path.read_text() == "mine" for path in mine)
    assert not [*SAVED.rglob(".overwritten"), *DRAWN.rglob(".overwritten")]


def killed_after(count, function, monkeypatch):
    """Call a function that is killed after so many files were moved, removed or written; returns whether it was."""

    class Killed(BaseException):
        pass

    def counted(original):
        def act(*args, **kwargs):
            nonlocal count
            if not count:
                raise Killed
            count -= 1
            return original(*args, **kwargs)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(os, "renames", counted(os.renames))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(checkpoints, "write_json", counted(checkpoints.write_json))
        try:
            function()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("is_saved", [True, False])
@pytest.mark.parametrize("twice", [True, False])
def test_a_run_that_is_killed_anywhere_while_it_replaces_another_leaves_one_of_them(monkeypatch, is_saved, twice):
    old = {f"{SAVED}/{name}": f"old {name}" for name in ("latest.pt", "losses.csv", "epoch_0001.pt")}
    old |= {f"{DRAWN}/{name}": f"old {name}" for name in ("index.html", "epoch_0001.png", "watch/cat/epoch_0001.png")}
    new = {f"{SAVED}/latest.pt": "new"} if is_saved else {}
    new |= {f"{SAVED}/losses.csv": "new", f"{DRAWN}/epoch_0001.png": "new"}
    left = {f"{SAVED}/unfinished/losses.csv": "new", f"{DRAWN}/unfinished/epoch_0001.png": "new"}
    mine = {f"{SAVED}/overwritten/latest.pt": "mine", f"{SAVED}/notes.txt": "mine", f"{DRAWN}/test/a.png": "mine"}

    def put(files):
        for name, text in files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text)

    def begin():
        """The old run and a user's own files."""
        for folder in (SAVED, DRAWN):
            shutil.rmtree(folder, ignore_errors=True)
        put(old | mine)

    def texts():
        return {name: content.decode() for name, content in snapshot().items()}

    count = 0
    was_killed = True
    while was_killed:
        begin()
        was_killed = killed_after(count, lambda: checkpoints.set_aside("tiny"), monkeypatch)
        if was_killed:
            checkpoints.recover("tiny")
            assert texts() == old | mine
        count += 1
    count = 0
    was_killed = True
    while was_killed:
        begin()
        checkpoints.set_aside("tiny")
        put(new)
        checkpoints.expect_save("tiny", LATEST if is_saved else SAVED / "losses.csv")
        was_killed = killed_after(count, lambda: checkpoints.settle_overwriting("tiny"), monkeypatch)
        if was_killed and twice:
            killed_after(1, lambda: checkpoints.settle_overwriting("tiny"), monkeypatch)
        checkpoints.recover("tiny")
        assert texts() == mine | (new if is_saved else old | left)
        count += 1
    assert count > 5


@pytest.mark.usefixtures("no_plots")
def test_after_a_kill_every_command_finds_the_run_that_was_to_be_replaced(tiny, refused):
    run_tiny("--num_epochs", 2, "--checkpoint_interval", 1)
    before = snapshot()
    resume = [*RESUME, "--num_epochs", "2"]
    file = str(SAVED / "G_AB.safetensors")
    uses = (
        lambda: load_run("tiny"),
        lambda: load_checkpoint(SAVED, "1", "--epoch"),
        lambda: load_networks(Path(file), ""),
        lambda: train.main(resume),
        lambda: train.main([*START, "--num_epochs", "1", "--run_name", "other", "--init_from", file, "--dry_run"]),
        lambda: distill.load_teacher(file, DIRECTIONS),
    )
    for use in uses:
        checkpoints.set_aside("tiny")
        (SAVED / "G_AB.safetensors").write_text("of the new run, which was not saved")
        use()
        assert finished_part(snapshot()) == before
    assert "holds a run already" in refused(train.main, *START)


def test_a_latest_state_that_was_brought_back_by_hand_is_not_taken_for_that_of_the_new_run(tiny):
    for bring_back in (shutil.copyfile, os.rename):
        shutil.rmtree(SAVED, ignore_errors=True)
        save_run()
        before = snapshot()
        checkpoints.set_aside("tiny")
        bring_back(SAVED / ".overwritten/latest.pt", LATEST)
        (SAVED / "losses.csv").write_text("of the new run, which was not saved")
        checkpoints.recover("tiny")
        assert finished_part(snapshot()) == before


def test_what_is_put_into_the_folder_of_a_run_whose_overwriting_was_killed_is_not_lost(tiny, capsys):
    save_run()
    before = snapshot()
    checkpoints.set_aside("tiny")
    put = {}
    for name in ("epoch_0100.pt", "G_AB.safetensors", "latest.pt"):  # of a backup
        (SAVED / name).write_text(name)
        put[str(SAVED / "unfinished1" / name)] = name.encode()
    (SAVED / "unfinished").mkdir()
    for name in ("epoch_0100.pt", "G_AB.safetensors", "latest.pt"):
        (SAVED / "unfinished" / name).write_text("mine")
        put[str(SAVED / "unfinished" / name)] = b"mine"
    checkpoints.recover("tiny")
    assert snapshot() == before | put
    assert "ended before it was saved; what it left is in saved_models/tiny/unfinished" in capsys.readouterr().err


@pytest.mark.usefixtures("no_plots")
def test_a_folder_of_ones_own_is_not_used_to_set_a_run_aside(tiny, refused):
    run_tiny("--num_epochs", 1)
    before = snapshot()
    for folder in (SAVED, DRAWN):
        (folder / ".overwritten").mkdir()
        (folder / ".overwritten/latest.pt").write_text("mine")
        assert ".overwritten: needed for the run that is overwritten" in refused(train.main, *START, "--overwrite")
        assert (folder / ".overwritten/latest.pt").read_text() == "mine"
        shutil.rmtree(folder / ".overwritten")
        (folder / ".overwritten/watch/cat").mkdir(parents=True)  # an empty one is left by a kill
    assert snapshot() == before
    (DRAWN / ".overwritten/watch/.cyclegan-1-2.tmp").write_text("")
    run_tiny("--num_epochs", 1, "--overwrite", "--seed", 1)
    assert not [*SAVED.glob(".over*"), *DRAWN.glob(".over*")]


@pytest.mark.parametrize(
    "text", ["{", "[" * 200_000, "[]", '{"files": 3, "complete": true}', '{"files": [["/a"], []], "complete": false}']
)
def test_a_damaged_journal_is_refused(tiny, refused, text):
    save_run()
    (SAVED / ".overwritten").mkdir()
    (SAVED / ".overwritten/files.json").write_text(text)
    assert "files.json: damaged" in refused(train.main, *START, "--overwrite")
    with pytest.raises(InputError, match=r"files\.json: damaged"):
        load_run("tiny")


@pytest.mark.parametrize("best", ["text", {"x": 1}, [1], {"metric": "cycle", "score": "x", "epoch": 1}])
def test_an_edited_best_epoch_is_refused(tiny, refused, best):
    save_run()
    state = load_state(LATEST)
    save_state(LATEST, state | {"best": best})
    argv = ["--num_epochs", "3", "--eval_interval", "1", "--eval_metrics", "cycle", "--best_by", "cycle"]
    assert "latest.pt: not a whole training state" in refused(train.main, *RESUME, *argv)


def test_overwrite_deletes_nothing_before_the_new_run_can_be_written(tiny, refused):
    run_tiny("--num_epochs", 1)
    kept = {path.name: path.read_bytes() for path in SAVED.iterdir()}
    shutil.rmtree(DRAWN)
    DRAWN.write_text("a file")
    assert "generated_images/tiny: File exists" in refused(train.main, *START, "--overwrite")
    assert {path.name: path.read_bytes() for path in SAVED.iterdir()} == kept


# -- resuming from states that are damaged, edited or old ------------------------------------


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """A run that was stopped at the fourth of six steps of its first epoch, its buffers full; made once."""
    root = tmp_path_factory.mktemp("stopped")
    make_dataset(root / "datasets" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("toolkit.monitor.plot_losses", lambda rows, path: None)
        with stops_in_step(4, signal.SIGINT):
            run_tiny("--num_epochs", 2, "--steps_per_epoch", 6, "--buffer_size", 4, "--ema", "0.9")
    return root


@pytest.fixture
def stopped(stopped_once):
    """A copy of that run."""
    shutil.copytree(stopped_once, ".", dirs_exist_ok=True)


def test_buffers_start_empty_when_the_size_of_images_changes(stopped, capsys):
    train.main([*RESUME, "--img_height", "20"])
    assert "buffer of A starts empty" in capsys.readouterr().out
    assert state_of("tiny")["buffers"]["A"]["images"][0].shape == (3, 20, 16)


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    "edit",
    [
        lambda s: s.pop("optims"),
        lambda s: s.pop("step_in_epoch"),
        lambda s: s.pop("rng"),
        lambda s: s.update(args=[1]),
        lambda s: s.update(format=torch.zeros(2)),
        lambda s: s.update(epoch="x"),
        lambda s: s.update(micro_batch_size="x"),
        lambda s: s.update(micro_batch_size=-1),
        lambda s: s.update(micro_batch_size=2**63),
        lambda s: s.update(ema={"G_AB": {}}),
        lambda s: s["args"].update(img_height=10**9),
        lambda s: s["args"].update(lr="fast"),
        lambda s: s["args"].update(lambda_cycle=None),
        lambda s: s["buffers"].update(A=None),
        lambda s: s["config"]["G_AB"].update(ngf=8),
        lambda s: s["meter"].update(sums={"loss_G": torch.zeros(3)}),
        lambda s: s["nets"].update(G_AB={"stem": "x"}),
        lambda s: s["optims"]["G"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda s: s["optims"]["G"]["state"][0].pop("exp_avg_sq"),
        lambda s: s["rng"].update(python=()),
    ],
)
def test_an_edited_state_is_refused_in_one_line_and_kept(refused, edit):
    state = load_state(LATEST)
    edit(state)
    torch.save(state, LATEST)
    written = LATEST.read_bytes()
    assert str(LATEST) in refused(train.main, *RESUME)
    assert LATEST.read_bytes() == written


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("size", [1.5, True])
def test_an_edited_size_of_micro_batches_is_an_integer_again(size):
    state = load_state(LATEST)
    state["micro_batch_size"] = size
    torch.save(state, LATEST)
    train.main([*RESUME, "--num_epochs", "1"])
    assert differences(state_of("tiny")["micro_batch_size"], 1) == []


@pytest.mark.usefixtures("stopped")
def test_weights_that_are_not_finite_end_the_run_and_the_state_is_kept(refused):
    state = load_state(LATEST)
    state["nets"]["D_A"]["layers.0.weight"][0] = float("nan")
    torch.save(state, LATEST)
    written = LATEST.read_bytes()
    assert "not finite" in refused(train.main, *RESUME, code=1)
    assert LATEST.read_bytes() == written


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(torch.zeros(2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def replace_value(tree, way, value):
    """Put a value at a place of nested dicts and lists, which `way` chooses level by level."""
    for i, number in enumerate(way):
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = keys[number % len(keys)]
        if i == len(way) - 1 or not isinstance(tree[key], dict | list) or not tree[key]:
            tree[key] = value
            return
        tree = tree[key]


@pytest.mark.slow
@FUZZ
@given(value=VALUES, way=st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_a_state_with_any_value_at_any_place_is_resumed_or_refused(tmp_path, stopped_once, value, way):
    """Until the first step. Dead: the run was resumed; SystemExit: refused; anything else would be a traceback."""
    shutil.copytree(stopped_once, tmp_path, dirs_exist_ok=True)
    (SAVED / "previous.pt").unlink(missing_ok=True)
    state = load_state(LATEST)
    replace_value(state, way, value)
    torch.save(state, LATEST)

    def die():
        raise Dead

    with before_steps({1: die}), pytest.raises((Dead, SystemExit)):
        train.main([*RESUME, "--num_epochs", "2"])
    with before_steps({1: die}), pytest.raises((Dead, SystemExit)):
        distill.main(
            ["--teacher", "tiny", "--student_residual", "0", "--num_epochs", "1", "--overwrite", "--device", "cpu"]
        )


def test_a_state_from_before_an_option_existed_resumes_with_its_default(tiny, capsys):
    run_tiny("--num_epochs", 1)
    state = state_of("tiny")
    newer = ("save_minutes", "on_bad_image", "ema", "eval_interval", "vit_size", "vit_blocks", "vit_heads")
    for name in newer:
        del state["args"][name]
        for config in state["config"].values():
            config.pop(name, None)
    state["args"]["norm_output"] = False  # and with an option that exists no more
    save_state(LATEST, state)
    train.main([*RESUME, "--num_epochs", "2"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if f"{LATEST}: older than" in line]
    for name in newer:
        assert f"--{name}" in line
    assert state_of("tiny")["args"]["save_minutes"] == 10.0
    assert state_of("tiny")["epoch"] == 2


# -- format 1 always resumes -----------------------------------------------------------------


def test_a_stored_state_of_format_1_resumes_and_ends_as_its_run_did(tiny):
    """Written in the middle of epoch 2 by the first code of this format, with EMA, a penalty and full buffers."""
    stored = Path(__file__).parent / "data"
    folder = Path("saved_models/old")
    folder.mkdir(parents=True)
    shutil.copyfile(stored / "format_1.pt", folder / "latest.pt")
    expected = read_losses(stored / "format_1_losses.csv")
    write_text(folder / "losses.csv", (stored / "format_1_losses.csv").read_text().replace("\n2,6,", "\n2,7,"))
    train.main(["--run_name", "old", "--start_from", "latest", "--device", "cpu"])
    rows = read_losses(folder / "losses.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)]
    for name, value in expected[1].items():  # a later torch may add in another order
        assert rows[1][name] == pytest.approx(value, rel=1e-3), name
    state = state_of("old")
    assert (state["epoch"], state["step"]) == (2, 6)
    assert set(state["ema"]) == {"G_AB", "G_BA"}
