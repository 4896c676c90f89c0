import argparse
import os
import pickle
import signal
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from utils import (
    FakeImageBuffer,
    InputError,
    LossLog,
    Meter,
    Parser,
    RunError,
    StopRequest,
    atomic_write,
    bytes_to_range,
    draw_grid,
    find_checkpoint,
    folder_name,
    given_flags,
    linear_decay,
    link_file,
    load_state,
    number,
    one_line,
    pick_device,
    pick_precision,
    picture_to_tensor,
    plot_losses,
    range_to_bytes,
    read_archive,
    read_losses,
    save_state,
    stage,
    tensor_to_picture,
    whole,
)

# -- range -----------------------------------------------------------------------------------


def test_all_256_levels_survive_the_way_into_the_network_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    x = bytes_to_range(levels)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(range_to_bytes(x), levels)


def test_values_out_of_range_are_clamped_and_never_wrap():
    assert range_to_bytes(torch.tensor([-1.3, -1.001, 1.001, 7.0])).tolist() == [0, 0, 255, 255]
    assert range_to_bytes(torch.tensor([0.0, 0.0041])).tolist() == [128, 128]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_picture_survives_the_way_into_a_tensor_and_back(mode):
    picture = Image.frombytes(mode, (5, 4), np.random.default_rng(0).bytes(20 * len(mode)))
    x = picture_to_tensor(picture)
    assert x.shape == (len(mode), 4, 5)
    assert tensor_to_picture(x).tobytes() == picture.tobytes()


def test_a_grid_shows_each_picture_in_its_row_and_column():
    rows = [
        ("dark", torch.stack([torch.full((3, 64, 64), v) for v in (-1.0, -0.5)])),
        ("light", torch.ones(2, 3, 64, 64)),
    ]
    grid = np.asarray(draw_grid(rows)).astype(int)
    assert grid.shape[0] == 2 * 130 + 2  # 64 px pictures are enlarged to 128
    left = grid.shape[1] - (2 * 130 + 2)
    assert (grid[65, left + 65] == 0).all()
    assert (grid[65, left + 195] == 64).all()
    assert (grid[195, left + 65] == 255).all()
    assert grid[:, :left].min() < 100  # the labels are written


# -- buffer ----------------------------------------------------------------------------------


def numbered(*values):
    return torch.tensor([float(v) for v in values]).reshape(-1, 1, 1, 1)


def test_the_buffer_hands_everything_back_until_it_is_full():
    buffer = FakeImageBuffer(4, seed=0)
    assert torch.equal(buffer.exchange(numbered(1, 2, 3)), numbered(1, 2, 3))
    assert len(buffer.images) == 3


def test_a_full_buffer_exchanges_half_and_loses_nothing():
    buffer = FakeImageBuffer(50, seed=0)
    buffer.exchange(numbered(*range(50)))
    seen, older = [], 0
    for i in range(50, 1050):
        (answer,) = buffer.exchange(numbered(i)).flatten().tolist()
        seen.append(answer)
        older += answer != i
    assert 430 < older < 570
    kept = [x.item() for x in buffer.images]
    assert sorted(seen + kept) == list(range(1050))


def test_a_buffer_of_size_zero_passes_pictures_through():
    buffer = FakeImageBuffer(0, seed=0)
    assert torch.equal(buffer.exchange(numbered(1, 2)), numbered(1, 2))
    assert buffer.images == []


def test_the_buffer_keeps_copies_without_gradient():
    buffer, x = FakeImageBuffer(2, seed=0), numbered(1).requires_grad_()
    answer = buffer.exchange(x)
    assert not answer.requires_grad
    with torch.no_grad():
        x.fill_(9)
    assert buffer.images[0].item() == 1


def test_a_restored_buffer_goes_on_as_the_first_would():
    first, second = FakeImageBuffer(3, seed=0), FakeImageBuffer(3, seed=1)
    first.exchange(numbered(*range(10)))
    second.load_state_dict(first.state_dict(), torch.device("cpu"))
    for i in range(20):
        assert torch.equal(first.exchange(numbered(i)), second.exchange(numbered(i)))


# -- schedule, meter -------------------------------------------------------------------------


def test_the_rate_is_full_until_the_decay_and_would_be_zero_at_the_end():
    assert [linear_decay(e, 200, 100) for e in (0, 100, 150, 199, 200)] == pytest.approx([1, 1, 0.5, 0.01, 0])
    assert linear_decay(3, 4, 4) == 1
    assert linear_decay(0, 4, 0) == 1


def test_a_meter_gives_means_and_survives_a_checkpoint():
    meter, copy = Meter(), Meter()
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    copy.load_state_dict(meter.state_dict(), torch.device("cpu"))
    for m in (meter, copy):
        m.add({"a": torch.tensor(2.0), "b": torch.tensor(7.0)})
        assert m.means() == {"a": 1.5, "b": 6.0}


# -- files -----------------------------------------------------------------------------------


def test_a_failed_write_keeps_the_old_file_and_no_leftover(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_a_linked_file_keeps_its_content_when_the_source_is_replaced(tmp_path, monkeypatch):
    source, target = tmp_path / "latest.pt", tmp_path / "epoch.pt"
    for fails in (False, True):
        if fails:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
        source.write_text("one")
        link_file(source, target)
        with atomic_write(source) as temporary:
            temporary.write_text("two")
        assert target.read_text() == "one"


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {"nets": {"G": {"w": torch.rand(3)}}, "stage": "train", "rng": utils.rng_state()}
    save_state(tmp_path / "s.pt", state)
    back = load_state(tmp_path / "s.pt", "train")
    assert torch.equal(back["nets"]["G"]["w"], state["nets"]["G"]["w"])
    before = torch.rand(3)
    utils.set_rng_state(back["rng"])
    assert torch.equal(torch.rand(3), before)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_code_in_a_checkpoint_is_never_executed(tmp_path):
    torch.save({"nets": Evil(), "format": 1}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "evil.pkl"):
        with pytest.raises(InputError, match="not a readable checkpoint"):
            load_state(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_damaged_checkpoint_is_found_by_its_checksums(tmp_path):
    path = tmp_path / "s.pt"
    save_state(path, {"nets": {"w": torch.zeros(1000)}})
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.file_size == 4000)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"damaged|not a readable"):
        read_archive(path)
    path.write_bytes(data[:1500])
    with pytest.raises(InputError, match="not a readable checkpoint"):
        read_archive(path)


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


def test_the_loss_log_is_cut_back_to_the_step_that_goes_on(tmp_path):
    log = LossLog(tmp_path / "losses.csv", ["epoch", "step", "lr", "loss_G"], 0)
    for step in (20, 40, 60):
        log.append({"epoch": 1, "step": step, "lr": 2e-4, "loss_G": step / 7})
    text = (tmp_path / "losses.csv").read_text()
    (tmp_path / "losses.csv").write_text(text + "1,80,0.0")  # torn by a crash
    log = LossLog(tmp_path / "losses.csv", ["epoch", "step", "lr", "loss_G"], 40)
    assert [row["step"] for row in read_losses(log.path)] == [20, 40]
    log.append({"epoch": 1, "step": 60, "lr": 2e-4, "loss_G": 60 / 7})
    assert (tmp_path / "losses.csv").read_text() == text
    assert read_losses(log.path)[0] == {"epoch": 1, "step": 20, "lr": 2e-4, "loss_G": pytest.approx(20 / 7, rel=1e-5)}
    LossLog(log.path, ["epoch", "step"], 0)
    assert (tmp_path / "losses.csv").read_text() == "epoch,step\n"


def test_a_term_that_was_not_computed_is_logged_as_nan_and_plotted(tmp_path):
    log = LossLog(tmp_path / "losses.csv", ["epoch", "step", "lr", "loss_G", "identity_A"], 0)
    for step in range(1, 40):
        log.append({"epoch": 1, "step": step, "lr": 2e-4, "loss_G": 1 / step})
    rows = read_losses(log.path)
    assert all(np.isnan(row["identity_A"]) for row in rows)
    plot_losses(rows, tmp_path / "losses.png")
    pixels = np.asarray(Image.open(tmp_path / "losses.png").convert("RGB"))
    assert pixels.std() > 10


# -- errors, flags, signals ------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code"), [(InputError("a\nb\x1b[31m"), 2), (RunError("a\nb\x1b[31m"), 1)])
def test_an_expected_error_is_one_safe_line_and_its_exit_code(capsys, error, code):
    @stage
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == code
    assert capsys.readouterr().err == "error: a\\nb\\x1b[31m\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FileExistsError(17, "File exists", "runs"), 2, "runs: File exists"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "out of memory; lower --batch_size"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_machine_refuses_is_one_line_too(capsys, error, code, words):
    @stage
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == code
    assert words in capsys.readouterr().err


def test_one_line_escapes_what_a_terminal_would_obey():
    assert one_line("é 猫 a\nb\r\udcff") == "é 猫 a\\nb\\r\\udcff"


def test_given_flags_are_told_from_defaults():
    parser = Parser()
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--overwrite", action="store_true")
    assert given_flags(parser, []) == set()
    assert given_flags(parser, ["--lr", "1.0", "--flip"]) == {"lr", "flip"}
    with pytest.raises(InputError, match="unrecognized arguments: --over"):
        parser.parse_args(["--over"])


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (whole(1), ["1", "12"], ["0", "-1", "1.5", "x", "", "nan", "99999999999"]),
        (number(0), ["0", "2e-4"], ["-1", "nan", "inf", "x", ""]),
        (number(0, 1, above=True), ["1", "0.5"], ["0", "1.1"]),
        (folder_name, ["a", "день-1", "a.b c"], ["", ".", "..", "../..", "a/b", "a\\b", "/a", "-a", "a\nb", "c:x"]),
        (utils.epoch_name, ["0", "007", "latest"], ["-1", "last", "1.5"]),
    ],
)
def test_flag_types_take_what_makes_sense_and_nothing_else(kind, good, bad):
    for text in good:
        kind(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"given .*expected"):
            kind(text)


def test_devices_and_precisions_are_resolved_or_refused():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "tpu", "meta", "xpu", ""):
        with pytest.raises(InputError, match="--device"):
            pick_device(name)
    assert pick_precision("fp32", torch.device("cpu")) == "fp32"
    assert pick_precision("auto", torch.device("cpu")) in ("fp32", "bf16")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_noted_once_and_obeyed_the_second_time(signum):
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        assert stop.signum is None
        signal.raise_signal(signum)
        assert stop.signum == signum
        with pytest.raises(SystemExit) as exit_:
            signal.raise_signal(signum)
        assert exit_.value.code == 128 + signum
    assert signal.getsignal(signum) is before
