import errno
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from breakage import Dead, dies_in_step, full_disk, stops_in_step
from conftest import TINY, differences, make_dataset, tiny_model
from edits import EDITS, FUZZ, edited
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import run_tiny, save_run, saved_args, state_of

import distill
import test as test_stage
import train
from toolkit import cli, devices
from toolkit.checkpoints import (
    IMAGES,
    RUNS,
    Progress,
    Saver,
    checked_optim,
    find_checkpoint,
    load_checkpoint,
    load_state,
    networks_of,
    restore,
    save_latest,
    save_state,
)
from toolkit.files import write_text
from toolkit.monitor import Meter, read_losses
from utils import InputError, one_line


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {"nets": {"G": {"w": torch.rand(3)}}, "stage": "train", "rng": devices.rng_state()}
    save_state(tmp_path / "s.pt", state)
    back = load_state(tmp_path / "s.pt", "train")
    assert torch.equal(back["nets"]["G"]["w"], state["nets"]["G"]["w"])
    assert differences({**state, "format": 1}, back) == []
    before = torch.rand(3)
    devices.set_rng_state(back["rng"])
    assert torch.equal(torch.rand(3), before)


def test_states_of_other_programs_versions_and_stages_are_refused(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save({"format": 99, "nets": {}}, tmp_path / "new.pt")
    save_state(tmp_path / "distill.pt", {"nets": {}, "stage": "distill"})
    for name, words in (
        ("other", "holds no training state"),
        ("new", "format 99"),
        ("distill", "a state of distill.py"),
    ):
        with pytest.raises(InputError, match=words):
            load_state(tmp_path / f"{name}.pt", "train")
    with pytest.raises(InputError, match="no such file"):
        load_state(tmp_path / "none.pt")


def test_a_missing_checkpoint_lists_those_that_exist(tmp_path):
    for name in ("epoch_0010.pt", "epoch_0002.pt", "latest.pt"):
        (tmp_path / name).touch()
    assert find_checkpoint(tmp_path, "10", "--epoch").name == "epoch_0010.pt"
    with pytest.raises(InputError, match=r"--epoch 3: .*expected one of: 2, 10, latest"):
        find_checkpoint(tmp_path, "3", "--epoch")


def test_moments_that_were_saved_in_another_memory_format_fit_their_weights():
    """The fused kernels of Adam take for granted that they have the strides of their weights."""
    model = tiny_model()
    model.step(*torch.rand(2, 2, 3, 16, 16))
    state = model.state_dict()
    for optim in state["optims"].values():
        for moments in optim["state"].values():
            for key in ("exp_avg", "exp_avg_sq"):
                if moments[key].ndim == 4:
                    moments[key] = moments[key].to(memory_format=torch.channels_last)
    saved = state["optims"]["G"]["state"]
    weights = model.optims["G"].param_groups[0]["params"]
    assert any(saved[i]["exp_avg"].stride() != weight.stride() for i, weight in enumerate(weights))
    other = tiny_model(seed=1)
    checked = {name: checked_optim(optim, state["optims"][name]) for name, optim in other.optims.items()}
    other.load_state_dict({**state, "optims": checked})
    for optim in other.optims.values():
        for weight, moments in optim.state.items():
            assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == weight.stride()
    for i, weight in enumerate(other.optims["G"].param_groups[0]["params"]):
        assert torch.equal(other.optims["G"].state[weight]["exp_avg"], saved[i]["exp_avg"])


# -- a whole state is left whatever happens --------------------------------------------------


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


@pytest.mark.parametrize(("owner", "name"), [(os, "link"), (Path, "replace"), (os, "fsync"), (torch, "save")])
def test_wherever_a_save_is_interrupted_a_whole_state_is_left(tmp_path, monkeypatch, owner, name):
    """The process dies before each call in turn of those that touch the disk."""
    plain = getattr(owner, name)
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
            return plain(*args, **kwargs)

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
        if step == 3:  # what was written before latest.pt is there with it
            assert load_state(tmp_path / "epoch_0003.pt")["step"] == 3
        if survived:
            assert moment > 1
            return
    raise AssertionError("no save came to its end")


def test_a_full_disk_is_named_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.pt"
    path.write_text("old")
    with full_disk(room=4096), pytest.raises(OSError, match=r"file\.pt") as error:
        save_state(path, {"nets": {"w": torch.rand(10**5)}})
    assert error.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# -- which states of a run are kept ----------------------------------------------------------

SAVED = RUNS / "tiny"
DRAWN = IMAGES / "tiny"
START = ["--dataset_name", "tiny", *TINY]
RESUME = ["--dataset_name", "tiny", "--start_from", "latest", "--device", "cpu"]


def test_old_checkpoints_are_removed_when_only_some_are_kept(tiny, no_plots):
    run_tiny("--num_epochs", 4, "--steps_per_epoch", 1, "--checkpoint_interval", 1, "--keep_checkpoints", 2)
    kept = ["epoch_0003.pt", "epoch_0004.pt", "latest.pt", "previous.pt"]
    assert sorted(path.name for path in SAVED.glob("*.pt")) == kept


def test_only_the_runs_own_checkpoints_are_counted_and_removed(tiny, no_plots):
    run_tiny("--num_epochs", 1)
    (SAVED / "epoch_best.pt").write_text("mine")
    (SAVED / "epoch_0009.pt").write_text("of an abandoned future")
    train.main([*RESUME, "--num_epochs", "3", "--checkpoint_interval", "1", "--keep_checkpoints", "1"])
    names = sorted(path.name for path in SAVED.glob("epoch_*"))
    assert names == ["epoch_0003.pt", "epoch_0009.pt", "epoch_best.pt"]


def test_what_killed_processes_left_half_written_is_removed_and_never_written_into(tiny, no_plots):
    run_tiny("--num_epochs", 1)
    mine = SAVED / f".{os.getpid()}-{threading.get_native_id()}.tmp"
    os.link(SAVED / "latest.pt", mine)  # killed while it made previous.pt; the number is ours again
    before = (SAVED / "latest.pt").read_bytes()
    write_text(SAVED / "notes.txt", "x")
    assert (SAVED / "latest.pt").read_bytes() == before
    (SAVED / ".latest.tmp").write_text("half")
    (DRAWN / ".77.tmp").write_text("half")
    train.main([*RESUME, "--num_epochs", "2"])
    assert not [*SAVED.glob(".*.tmp"), *DRAWN.glob(".*.tmp")]


# -- a run where another one is --------------------------------------------------------------


def test_a_second_start_is_refused_and_overwrite_deletes_only_the_runs_own_files(tiny, refused, no_plots):
    run_tiny("--num_epochs", 1)
    (SAVED / "notes.txt").write_text("mine")
    before = (SAVED / "latest.pt").read_bytes()
    error = refused(train.main, *START)
    assert "saved_models/tiny" in error
    assert "--start_from latest" in error
    assert "--overwrite" in error
    refused(train.main, *START, "--overwrite", "--watch", "nobody.jpg")
    assert (SAVED / "latest.pt").read_bytes() == before  # a refused start deletes nothing
    run_tiny("--num_epochs", 1, "--overwrite", "--steps_per_epoch", 1)
    assert state_of("tiny")["step"] == 1
    assert (SAVED / "notes.txt").read_text() == "mine"


def test_a_second_start_is_told_in_which_flags_it_differs(tiny, refused, no_plots):
    run_tiny("--num_epochs", 1)
    error = refused(train.main, *START, "--lr", "0.1", "--no-flip")
    changes = error.split("with other flags: ")[1].split("; go on with")[0].split(", ")
    assert sorted(changes) == ["--flip True → False", "--lr 0.0002 → 0.1", "--num_epochs 1 → 200"]
    assert "with the same flags" in refused(train.main, *START, "--num_epochs", "1")
    for text in ("[]", '{"flags": 3}', "{", '{"flags": {"lr": null}}', "[" * 10**5):
        (SAVED / "run.json").write_text(text)
        assert "saved_models/tiny holds a run already, with" in refused(train.main, *START)


def test_translations_of_a_weights_file_with_the_name_of_a_run_are_no_run_and_stay(tiny, no_plots):
    image = DRAWN / "test" / "fake_B" / "photo.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"a translation")
    run_tiny("--num_epochs", 1, "--steps_per_epoch", 1)
    assert image.read_bytes() == b"a translation"


def test_overwrite_keeps_the_earlier_states_until_the_new_run_has_one(tiny, no_plots):
    run_tiny("--num_epochs", 2, "--checkpoint_interval", 1)
    kept = {name: (SAVED / name).read_bytes() for name in ("latest.pt", "epoch_0001.pt", "epoch_0002.pt")}
    with dies_in_step(3):
        run_tiny("--num_epochs", 1, "--overwrite", "--seed", 1)
    assert {name: (SAVED / name).read_bytes() for name in kept} == kept
    run_tiny("--num_epochs", 1, "--overwrite", "--seed", 1, "--checkpoint_interval", 1)
    assert {path.name for path in SAVED.glob("*.pt")} == {"latest.pt", "epoch_0001.pt"}
    assert state_of("tiny", "epoch_0001.pt")["args"]["seed"] == 1


def test_overwrite_deletes_nothing_before_the_new_run_can_be_written(tiny, refused, no_plots):
    run_tiny("--num_epochs", 1)
    kept = {path.name: path.read_bytes() for path in SAVED.iterdir()}
    shutil.rmtree(DRAWN)
    DRAWN.write_text("a file")
    assert "generated_images/tiny: File exists" in refused(train.main, *START, "--overwrite")
    assert {path.name: path.read_bytes() for path in SAVED.iterdir()} == kept


# -- going on from files that are damaged, edited or old -------------------------------------


def test_wrong_checkpoints_are_refused_and_kept(tiny, refused, no_plots):
    run_tiny("--num_epochs", 1)
    path = SAVED / "latest.pt"
    whole = path.read_bytes()
    resume = [*RESUME, "--num_epochs", "2"]

    def assert_refused(*words):
        written = path.read_bytes()
        error = refused(train.main, *resume)
        assert "saved_models/tiny/latest.pt" in error
        for word in words:
            assert word in error
        assert path.read_bytes() == written

    path.write_bytes(whole[: len(whole) // 2])
    assert_refused("not a readable checkpoint")
    for key in ("optims", "loader", "rng"):
        path.write_bytes(whole)
        state = load_state(path)
        del state[key]
        torch.save(state, path)
        assert_refused(f"KeyError: '{key}'")
    path.write_bytes(whole)
    state = load_state(path)
    state["nets"]["D_A"]["layers.0.weight"][0] = float("nan")
    torch.save(state, path)
    assert_refused("D_A", "layers.0.weight is not finite")


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """A run that was stopped at the fourth of six steps of its first epoch, its buffers full; made once."""
    root = tmp_path_factory.mktemp("stopped")
    make_dataset(root / "datasets" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("toolkit.monitor.plot_losses", lambda rows, path: None)
        with stops_in_step(4, signal.SIGINT):
            run_tiny("--num_epochs", 2, "--steps_per_epoch", 6, "--buffer_size", 4)
    return root


@pytest.fixture
def stopped(stopped_once, no_plots):
    """The flags that go on with a copy of that run."""
    shutil.copytree(stopped_once, ".", dirs_exist_ok=True)
    return RESUME


def test_buffers_start_empty_when_the_images_change_their_size(stopped, capsys):
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
    path = SAVED / "latest.pt"
    state = load_state(path)
    spoil(state)
    torch.save(state, path)
    assert "saved_models/tiny/latest.pt" in refused(train.main, *stopped)


def test_a_damaged_average_is_refused(refused):
    save_run(ema=0.9, argv=["--ema", "0.9"])
    path = SAVED / "latest.pt"
    make_dataset(Path("datasets/tiny"))
    (SAVED / "previous.pt").unlink()
    cpu = ["--device", "cpu", "--precision", "fp32"]
    for spoil in ({"G_AB": {}}, {"other": {}}, [1]):
        save_state(path, load_state(path) | {"ema": spoil})
        error = refused(train.main, *RESUME, "--num_epochs", "3")
        assert "saved_models/tiny/latest.pt" in error
        error = refused(test_stage.main, "--run_name", "tiny", "--epoch", "latest", "--metrics", "losses", *cpu)
        assert "saved_models/tiny/latest.pt" in error


def test_a_flag_that_is_none_in_a_checkpoint_is_refused(tiny, refused, no_plots):
    run_tiny("--num_epochs", 1)
    distill.main(["--teacher", "tiny", "--student_residual", "0", "--num_epochs", "1", "--device", "cpu"])
    for name, argv in (
        ("tiny", ["--teacher", "tiny", "--num_epochs", "2", "--overwrite"]),
        ("tiny_student", ["--run_name", "tiny_student", "--start_from", "latest", "--num_epochs", "2"]),
    ):
        path = RUNS / name / "latest.pt"
        before = path.read_bytes()
        state = load_state(path)
        state["args"]["lambda_cycle"] = None
        torch.save(state, path)
        (path.parent / "previous.pt").unlink(missing_ok=True)
        assert f"{path}: says --lambda_cycle None" in refused(distill.main, *argv, "--device", "cpu")
        path.write_bytes(before)


def test_checkpoints_from_before_a_flag_existed_go_on_with_its_default(tiny, capsys, no_plots):
    run_tiny("--num_epochs", 1)
    state = state_of("tiny")
    later = (
        "save_minutes",
        "max_megapixels",
        "on_bad_image",
        "ema",
        "eval_interval",
        "vit_size",
        "vit_blocks",
        "vit_heads",
    )
    for name in later:
        del state["args"][name]
    for config in state["config"].values():
        for name in ("vit_size", "vit_blocks", "vit_heads"):
            config.pop(name, None)
    save_state(SAVED / "latest.pt", state)
    train.main([*RESUME, "--num_epochs", "2"])
    out = capsys.readouterr().out
    assert "saved_models/tiny/latest.pt: older than" in out
    for name in later:
        assert f"--{name}" in out
    assert state_of("tiny")["args"]["save_minutes"] == 10.0
    assert state_of("tiny")["epoch"] == 2


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model that takes states, and the bytes of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("source"))
        model = save_run(epochs=1, ema=0.9, argv=["--ema", "0.9"])
        meter = Meter()
        meter.add(model.step(*torch.rand(2, 2, 3, 16, 16)))
        saver = Saver(SAVED, {"stage": "train", "args": saved_args("--ema", "0.9")}, {"size": [16, 16]})
        saver.save(model, Progress(1, 3, 1), meter.state_dict(), lambda: None)
        return model, (SAVED / "latest.pt").read_bytes()


def assert_one_line(error, name):
    """A refusal names what it is about and fits on a line that nobody has to scroll."""
    assert str(name) in str(error)
    assert len(one_line(error)) < 1000


def take(model, path):
    """Do with a state what a run that goes on does."""
    state = load_state(path, "train")
    typed = train.parse_args(["--dataset_name", "tiny", "--start_from", "latest"])
    args = cli.resume_flags(train.make_parser(), typed, state.get("args"), path)
    cli.check_run_flags(cli.with_vit_defaults(args))
    networks_of(state, path)
    return restore(state, path, model, Meter(), (3, 16, 16))


def test_an_untouched_state_is_taken(tmp_path, source):
    model, content = source
    (tmp_path / "x.pt").write_bytes(content)
    assert take(model, tmp_path / "x.pt") == Progress(1, 3, 1)


@pytest.mark.slow
@FUZZ
@given(edits=EDITS)
def test_damaged_states_are_read_or_refused(tmp_path, source, edits):
    model, content = source
    path = tmp_path / "x.pt"
    path.write_bytes(edited(content, edits))
    try:
        take(model, path)
    except InputError as error:
        assert_one_line(error, path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(torch.zeros(2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@FUZZ
@given(value=VALUES, way=st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_states_with_any_value_in_any_place_are_read_or_refused(tmp_path, source, value, way):
    model, content = source
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    state = load_state(path)
    place = state
    for i, number in enumerate(way):
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = keys[number % len(keys)]
        if i == len(way) - 1 or not isinstance(place[key], dict | list) or not place[key]:
            place[key] = value
            break
        place = place[key]
    torch.save(state, path)
    try:
        take(model, path)
    except InputError as error:
        assert_one_line(error, path)


# -- format 1, for ever ------------------------------------------------------------------------


def test_a_stored_state_of_format_1_resumes_and_ends_as_its_run_did(tiny):
    """Written in the middle of epoch 2 by the first code of this format, with averages, a penalty and full buffers."""
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
