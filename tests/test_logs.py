"""The numbers of a run: means, losses.csv and its plot, TensorBoard's log."""

import errno
import math

import numpy as np
import pytest
import torch
from breakage import full_disk
from conftest import noise_image, warnings_in
from PIL import Image

from toolkit import distributed
from toolkit.files import attempt
from toolkit.monitor import Board, LossLog, Meter, plot_losses, read_losses

CPU = torch.device("cpu")
COLUMNS = ["epoch", "step", "lr", "loss_G"]


def row_of(step, **values):
    return {"epoch": 1, "step": step, "lr": 2e-4, "loss_G": step / 7, **values}


# -- means -----------------------------------------------------------------------------------


def test_a_meter_gives_means_and_survives_a_checkpoint():
    meter, copy = Meter(), Meter()
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    copy.load_state_dict(meter.state_dict(), CPU)
    for m in (meter, copy):
        m.add({"a": torch.tensor(2.0), "b": torch.tensor(7.0)})
        assert m.means() == {"a": 1.5, "b": 6.0}


def test_the_mean_of_a_loss_is_over_the_steps_that_computed_it():
    """A run that goes on with other weights computes other losses before the next row."""
    meter = Meter()
    meter.add({"a": torch.tensor(1.0)})
    meter.add({"a": torch.tensor(2.0), "gp": torch.tensor(7.0)})
    copy = Meter()
    copy.load_state_dict(meter.state_dict(), CPU)
    for m in (meter, copy):
        assert m.means() == {"a": 1.5, "gp": 7.0}
        assert m.count == 2


def test_a_meter_takes_states_from_before_each_name_had_its_count():
    meter = Meter()
    meter.load_state_dict({"sums": {"a": torch.tensor(6.0)}, "count": 4}, CPU)
    assert meter.means() == {"a": 1.5}
    meter.load_state_dict({"sums": {}, "count": 0}, CPU)
    assert meter.means() == {}


@pytest.mark.parametrize(
    "spoil", [{"count": "3"}, {"count": -1}, {"counts": {}}, {"counts": {"a": 1.5}}, {"counts": {"a": True}}]
)
def test_a_meter_refuses_counts_that_none_has_and_stays_as_it_was(spoil):
    meter = Meter()
    meter.add({"a": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="count"):
        meter.load_state_dict({**meter.state_dict(), **spoil}, CPU)
    assert meter.means() == {"a": 1.0}


def test_means_are_sums_in_the_order_of_the_steps_divided_once():
    values = torch.rand(20, generator=torch.Generator().manual_seed(0)) * 1000
    meter = Meter()
    for value in values:
        meter.add({"a": value})
    total = values[0]
    for value in values[1:]:
        total = total + value  # float32, one after the other
    assert meter.means()["a"] == total.item() / 20


def test_the_first_step_that_was_not_finite_is_found():
    meter = Meter()
    for step in range(6):
        bad = math.nan if step == 3 else math.inf if step == 4 else 0.0
        meter.add({"a": torch.tensor(1.0), "b": torch.tensor(bad)})
    assert meter.first_not_finite() == (["b"], 2)
    assert Meter().first_not_finite() == ([], 0)


# -- losses.csv ------------------------------------------------------------------------------


def test_the_loss_log_is_cut_back_to_the_step_that_goes_on(tmp_path):
    path = tmp_path / "losses.csv"
    log = LossLog(path, COLUMNS, 0)
    for step in (20, 40, 60):
        log.append(row_of(step))
    log.save()
    text = path.read_text()
    path.write_text(text + "1,80,0.0")  # torn by a crash
    log = LossLog(path, COLUMNS, 40)
    log.save()
    assert [row["step"] for row in read_losses(path)] == [20, 40]
    log.append(row_of(60))
    log.save()
    assert path.read_text() == text
    assert read_losses(path)[0] == row_of(20, loss_G=pytest.approx(20 / 7, rel=1e-5))
    LossLog(path, ["epoch", "step"], 0).save()
    assert path.read_text() == "epoch,step\n"


def test_lines_are_written_as_ever(tmp_path):
    """Byte for byte, so that a log goes on in the file of an older version."""
    log = LossLog(tmp_path / "losses.csv", ["epoch", "step", "lr", "loss_G", "identity_A"], 0)
    log.append({"epoch": 1, "step": 20, "lr": 2e-4, "loss_G": 123456.789})
    log.append({"epoch": 12, "step": 1234567, "lr": 1.23456789e-7, "loss_G": 1 / 3, "identity_A": math.inf})
    log.append({"epoch": 12, "step": 1234587, "lr": 0.0, "loss_G": 2.0, "identity_A": -0.1})
    log.save()
    assert log.path.read_bytes() == (
        b"epoch,step,lr,loss_G,identity_A\n"
        b"1,20,0.0002,123457,nan\n"
        b"12,1234567,1.23457e-07,0.333333,inf\n"
        b"12,1234587,0,2,-0.1\n"
    )
    again = LossLog(tmp_path / "losses.csv", COLUMNS, 10**7)
    again.save()
    assert len(again.rows) == 3
    assert again.path.read_text().startswith("epoch,step,lr,loss_G,identity_A\n1,20,0.0002,123457,nan\n12,")


def test_rows_in_memory_are_those_of_the_file(tmp_path):
    log = LossLog(tmp_path / "losses.csv", COLUMNS, 0)
    for step in range(1, 50):
        log.append(row_of(step, loss_G=math.exp(step)))
    assert not log.path.exists()  # a row costs no access to the disk
    log.save()
    assert log.rows == read_losses(log.path)


def test_columns_of_old_rows_stay_when_a_run_goes_on_without_them(tmp_path):
    log = LossLog(tmp_path / "losses.csv", [*COLUMNS, "gp_A"], 0)
    log.append(row_of(20, gp_A=3.0))
    log.save()
    log = LossLog(log.path, [*COLUMNS, "hidden_AB"], 20)
    log.append(row_of(40, hidden_AB=5.0))
    log.save()
    first, second = read_losses(log.path)
    assert list(first) == [*COLUMNS, "hidden_AB", "gp_A"]
    assert (first["gp_A"], second["hidden_AB"]) == (3, 5)
    assert math.isnan(first["hidden_AB"])
    assert math.isnan(second["gp_A"])


def test_a_second_row_of_a_step_replaces_the_first_and_all_after_it(tmp_path):
    log = LossLog(tmp_path / "measures.csv", ["epoch", "step"], 0)
    for step, value in ((3, 0.1), (6, 0.2), (9, 0.3), (6, 0.4)):
        log.append({"epoch": step // 3, "step": step, "cycle_A": value})
    assert [(row["step"], row["cycle_A"]) for row in log.rows] == [(3, 0.1), (6, 0.4)]


GOOD = "epoch,step,lr,loss_G\n1,20,0.0002,2.5\n"


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("foo,bar\n1,2\n", 0),
        (GOOD + "x" * 200_000 + "\n1,40,0.0002,2\n", 1),
        ("x" * 200_000, 0),
        ("", 0),
        ("\n\n", 0),
        (GOOD + "1,40,0.0002\n", 1),
        (GOOD + "1,40,0.0002,2,3\n", 1),
        (GOOD + "1,40,fast,2\n", 1),
        (GOOD + "1.5,40,0.0002,2\n", 1),
        (GOOD + "1," + "9" * 5000 + ",0.0002,2\n", 1),
        (GOOD + "\0\0\0\0\n", 1),
        (GOOD + "1,20,0.0002,2\n", 1),
        (GOOD + "1,10,0.0002,2\n", 1),
        (GOOD + "1,99999999999999999999,0.0002,2\n", 1),
        (GOOD + "-1,40,0.0002,2\n", 1),
        (GOOD + '1,"40\n', 1),
        ('epoch,step,"a,b"\n1,20,3\n', 0),
        ('epoch,step,"a\nb"\n1,20,3\n', 0),
        ("epoch,step,猫\n1,20,3\n", 0),
        ("epoch,loss_G\n1,2\n", 0),
        (noise_image(0).tobytes(), 0),
    ],
)
def test_of_a_damaged_log_the_rows_before_the_damage_are_kept(tmp_path, capsys, content, kept):
    path = tmp_path / "losses.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [row["step"] for row in read_losses(path)] == [20] * kept
    log = LossLog(path, COLUMNS, 100)
    (warning,) = warnings_in(capsys)
    assert "losses.csv: line" in warning
    assert "is damaged" in warning
    assert [row["step"] for row in log.rows] == [20] * kept
    log.append(row_of(120))
    log.save()
    assert [row["step"] for row in read_losses(path)] == [*([20] * kept), 120]
    LossLog(path, COLUMNS, 200)
    assert warnings_in(capsys) == []


def test_a_new_run_and_a_missing_log_start_without_a_word(tmp_path, capsys):
    (tmp_path / "old.csv").write_text("foo,bar\n1,2\n")
    for name, last_step in (("losses.csv", 100), ("old.csv", 0)):
        assert LossLog(tmp_path / name, COLUMNS, last_step).rows == []
    assert capsys.readouterr().err == ""
    with pytest.raises(FileNotFoundError):
        read_losses(tmp_path / "losses.csv")


def test_a_folder_in_the_place_of_a_log_is_said_and_ends_nothing(tmp_path, capsys):
    path = tmp_path / "losses.csv"
    path.mkdir()
    log = LossLog(path, COLUMNS, 100)
    (warning,) = warnings_in(capsys)
    assert "losses.csv: cannot be read" in warning
    log.append(row_of(120))
    with pytest.raises(OSError, match=r"losses\.csv"):
        log.save()
    assert "losses.csv" in attempt(log.save)
    path.rmdir()
    log.save()
    assert read_losses(path) == log.rows
    assert list(tmp_path.iterdir()) == [path]


def test_rows_that_the_disk_does_not_take_wait_and_are_never_torn(tmp_path):
    log = LossLog(tmp_path / "losses.csv", ["epoch", "step", "lr"], 0)
    rows = [{"epoch": 1, "step": step, "lr": 0.1} for step in (20, 40, 60)]
    log.append(rows[0])
    log.save()
    whole = log.path.read_text()
    with full_disk(room=len(whole) + 4):
        log.append(rows[1])
        with pytest.raises(OSError, match=r"losses\.csv") as error:
            log.save()
    assert error.value.errno == errno.EFBIG
    assert log.path.read_text() == whole
    log.append(rows[2])
    log.save()
    assert read_losses(log.path) == rows


def test_only_the_first_rank_reads_and_writes_the_log(tmp_path, monkeypatch, capsys):
    path = tmp_path / "losses.csv"
    path.write_text("foo\n")
    monkeypatch.setattr("toolkit.monitor.rank", lambda: 1)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    log = LossLog(path, COLUMNS, 100)
    log.append(row_of(120))
    log.save()
    assert path.read_text() == "foo\n"
    assert capsys.readouterr().err == ""


# -- its plot --------------------------------------------------------------------------------


def test_a_term_that_was_not_computed_is_logged_as_nan_and_plotted(tmp_path):
    log = LossLog(tmp_path / "losses.csv", [*COLUMNS, "identity_A"], 0)
    for step in range(1, 40):
        log.append(row_of(step, loss_G=1 / step))
    log.save()
    rows = read_losses(log.path)
    assert all(np.isnan(row["identity_A"]) for row in rows)
    plot_losses(rows, tmp_path / "losses.png")
    pixels = np.asarray(Image.open(tmp_path / "losses.png").convert("RGB"))
    assert pixels.std() > 10
    plot_losses(log.rows, tmp_path / "again.png")  # without the column
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "losses.png").read_bytes()


def test_a_plot_of_nothing_is_no_file_and_one_of_odd_numbers_is_drawn(tmp_path):
    (tmp_path / "losses.csv").write_text("foo,bar\n1,2\n")
    plot_losses(read_losses(tmp_path / "losses.csv"), tmp_path / "losses.png")
    assert not (tmp_path / "losses.png").exists()
    rows = [row_of(1, loss_G=math.nan), row_of(2, loss_G=math.inf), {"epoch": 1, "step": 3, "gp_A": -1.0}]
    plot_losses(rows, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").is_file()


# -- TensorBoard -----------------------------------------------------------------------------


class BrokenWriter:
    """Fails in every way that a logger can."""

    def __init__(self, error, fails):
        self.error = error
        self.fails = fails
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            if name in self.fails:
                raise self.error

        return call


@pytest.mark.parametrize("fails", ["add_scalar", "add_image", "flush", "close"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), TypeError("protobuf"), RuntimeError("thread"), AssertionError()]
)
def test_whatever_goes_wrong_in_a_logger_is_one_warning(capsys, fails, error):
    board = Board()
    board.writer = writer = BrokenWriter(error, {fails})
    for step in range(3):
        board.add(step, {"loss_G": 1.0, "nan": math.nan}, {"grid": Image.new("RGB", (4, 4))})
    board.close()
    (warning,) = warnings_in(capsys)
    assert type(error).__name__ in warning
    assert writer.calls.count("close") == 1
    assert writer.calls.count(fails) == (1 if fails == "close" else 3)  # it is tried again: a disk may be freed


def test_a_logger_that_cannot_be_made_is_one_warning(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    board = Board(tmp_path / "tensorboard", 0)
    board.add(1, {"loss_G": 1.0})
    board.close()
    assert len(warnings_in(capsys)) == 1


def test_a_board_logs_what_is_finite_and_a_resumed_one_goes_on(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = Board(tmp_path, 0)
    for step in (3, 6, 9):
        board.add(step, {"loss_G": step / 2, "nan": math.nan}, {"grid": Image.new("RGB", (4, 4))})
    board.close()
    board = Board(tmp_path, 6)
    board.add(9, {"loss_G": 7.0})
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss_G")] == [(3, 1.5), (6, 3), (9, 7)]
    assert [event.step for event in events.Images("grid")] == [3, 6]
    assert events.Tags()["scalars"] == ["loss_G"]


def test_a_board_that_nobody_wants_writes_nothing(tmp_path):
    board = Board()
    board.add(1, {"loss_G": 1.0}, {"grid": Image.new("RGB", (4, 4))})
    board.close()
    assert list(tmp_path.iterdir()) == []
