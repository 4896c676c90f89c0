"""The numbers of a run: means of losses, CSV files, the loss plot, TensorBoard."""

import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from breakage import full_disk
from conftest import noise_image, warnings_in
from PIL import Image

from toolkit import distributed, logs
from toolkit.files import attempt
from toolkit.logs import CsvLog, Meter, TensorBoardLog, plot_losses, read_losses

CPU = torch.device("cpu")
COLUMNS = ["epoch", "step", "lr", "loss_G"]


def row_of(step, **values):
    return {"epoch": 1, "step": step, "lr": 2e-4, "loss_G": step / 7, **values}


def log_of(path, columns=COLUMNS, steps=(), last_step=0, **values):
    """A log with a row for each step, saved."""
    log = CsvLog(path, columns, last_step)
    for step in steps:
        log.append(row_of(step, **values))
    log.save()
    return log


# -- means -----------------------------------------------------------------------------------


def test_a_loss_is_averaged_over_the_steps_that_computed_it_also_across_a_checkpoint():
    meter = Meter()
    restored = Meter()
    meter.add({"a": torch.tensor(1.0)})
    restored.load_state_dict(meter.state_dict(), CPU)
    for m in (meter, restored):
        m.add({"a": torch.tensor(2.0), "gp": torch.tensor(7.0)})  # as a run resumed with other loss weights
        assert m.means() == {"a": 1.5, "gp": 7.0}
        assert m.count == 2
    meter.load_state_dict({"sums": {"a": torch.tensor(6.0)}, "count": 4}, CPU)  # of an old state
    assert meter.means() == {"a": 1.5}
    meter.load_state_dict({"sums": {"a": torch.tensor(6.0)}, "count": 0}, CPU)  # of an edited one
    assert meter.means() == {"a": 6.0}


def test_means_are_float32_sums_in_the_order_of_the_steps_divided_once():
    values = torch.rand(20, generator=torch.Generator().manual_seed(0)) * 1000
    meter = Meter()
    total = torch.tensor(0.0)
    for value in values:
        meter.add({"a": value})
        total = total + value
    assert meter.means()["a"] == total.item() / 20


def test_the_first_step_that_was_not_finite_is_found():
    meter = Meter()
    for value in (0.0, 0.0, 0.0, math.nan, math.inf, 0.0):
        meter.add({"a": torch.tensor(1.0), "b": torch.tensor(value)})
    assert meter.first_not_finite() == (["b"], 2)
    assert Meter().first_not_finite() == ([], 0)


# -- CSV files -------------------------------------------------------------------------------


def test_a_log_is_cut_back_to_the_step_that_is_resumed(tmp_path):
    path = tmp_path / "losses.csv"
    log_of(path, steps=(20, 40, 60))
    text = path.read_text()
    path.write_text(text + "1,80,0.0")  # torn by a crash
    log_of(path, last_step=40)
    assert [row["step"] for row in read_losses(path)] == [20, 40]
    log_of(path, steps=[60], last_step=40)
    assert path.read_text() == text
    assert read_losses(path)[0] == row_of(20, loss_G=pytest.approx(20 / 7, rel=1e-5))


def test_the_format_of_the_file_does_not_change(tmp_path):
    """Byte for byte, so that a log can be continued in the file of an older version."""
    log = CsvLog(tmp_path / "losses.csv", ["epoch", "step", "lr", "loss_G", "identity_A"], 0)
    log.append({"epoch": 1, "step": 20, "lr": 2e-4, "loss_G": 123456.789})
    log.append({"epoch": 12, "step": 1234567, "lr": 1.23456789e-7, "loss_G": 1 / 3, "identity_A": math.inf})
    log.append({"epoch": 12, "step": 1234587, "lr": 0.0, "loss_G": 2.0, "identity_A": -0.1})
    log.save()
    expected = (
        b"epoch,step,lr,loss_G,identity_A\n"
        b"1,20,0.0002,123457,nan\n"
        b"12,1234567,1.23457e-07,0.333333,inf\n"
        b"12,1234587,0,2,-0.1\n"
    )
    assert log.path.read_bytes() == expected
    log_of(log.path, last_step=10**7)
    assert log.path.read_bytes() == expected


def test_rows_in_memory_equal_those_of_the_file(tmp_path):
    log = CsvLog(tmp_path / "losses.csv", COLUMNS, 0)
    for step in range(1, 50):
        log.append(row_of(step, loss_G=math.exp(step)))
    assert not log.path.exists()  # appending costs no disk access
    log.save()
    assert log.rows == read_losses(log.path)


def test_columns_of_old_rows_are_preserved_when_a_resumed_run_does_not_compute_them(tmp_path):
    path = tmp_path / "losses.csv"
    log_of(path, [*COLUMNS, "gp_A"], [20], gp_A=3.0)
    log_of(path, [*COLUMNS, "hidden_AB"], [40], last_step=20, hidden_AB=5.0)
    first, second = read_losses(path)
    assert list(first) == [*COLUMNS, "hidden_AB", "gp_A"]
    assert (first["gp_A"], second["hidden_AB"]) == (3, 5)
    assert math.isnan(first["hidden_AB"])
    assert math.isnan(second["gp_A"])


def test_a_second_row_of_a_step_replaces_the_first_and_all_after_it(tmp_path):
    log = log_of(tmp_path / "measures.csv", ["epoch", "step"], (3, 6, 9))
    log.append({"epoch": 2, "step": 6, "cycle_A": 0.4})
    assert log.rows == [row_of(3, loss_G=0.428571), {"epoch": 2, "step": 6, "cycle_A": 0.4}]


GOOD = "epoch,step,lr,loss_G\n1,20,0.0002,2.5\n"


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("", 0),
        ("foo,bar\n1,2\n", 0),
        ("x" * 200_000, 0),
        (GOOD + "x" * 200_000 + "\n1,40,0.0002,2\n", 1),
        (GOOD + "1,40,0.0002\n", 1),
        (GOOD + "1,40,0.0002,2,3\n", 1),
        (GOOD + "1,40,fast,2\n", 1),
        (GOOD + "1.5,40,0.0002,2\n", 1),
        (GOOD + "1," + "9" * 5000 + ",0.0002,2\n", 1),
        (GOOD + "\0\0\0\0\n", 1),
        (GOOD + '1,"40\n', 1),
    ],
)
def test_rows_before_a_damaged_line_are_kept_and_a_new_run_keeps_none(tmp_path, capsys, content, kept):
    path = tmp_path / "losses.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [row["step"] for row in read_losses(path)] == [20] * kept
    log_of(path, steps=[120], last_step=100)
    assert [row["step"] for row in read_losses(path)] == [*([20] * kept), 120]
    assert CsvLog(path, COLUMNS, 0).rows == CsvLog(tmp_path / "missing.csv", COLUMNS, 100).rows == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "content", [r"epoch,step,$\foo$", "epoch,step,", 'epoch,step,"a\nb"', noise_image(0).tobytes()]
)
def test_a_file_with_a_damaged_header_is_one_warning_and_written_anew(tmp_path, capsys, content):
    path = tmp_path / "losses.csv"
    path.write_bytes(content if isinstance(content, bytes) else f"{content}\n1,20,2.5\n".encode())
    log = log_of(path, steps=[120], last_step=100)
    assert warnings_in(capsys) == [f"warning: {path}: its header is damaged; its rows are left out"]
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    plot_losses(log.rows, tmp_path / "losses.png")


def test_rows_that_cannot_be_written_are_written_later_and_never_torn(tmp_path):
    path = tmp_path / "losses.csv"
    path.mkdir()  # in the place of the file
    log = CsvLog(path, COLUMNS, 100)
    log.append(row_of(120))
    assert "losses.csv" in attempt(log.save)
    path.rmdir()
    log.save()
    whole = path.read_text()
    with full_disk(room=len(whole) + 4):
        log.append(row_of(140))
        with pytest.raises(OSError, match=r"losses\.csv"):
            log.save()
    assert path.read_text() == whole
    log.append(row_of(160))
    log.save()
    assert read_losses(path) == log.rows
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_first_rank_reads_and_writes_the_log(tmp_path, monkeypatch, capsys):
    path = tmp_path / "losses.csv"
    path.write_text(GOOD)
    for module in (logs, distributed):
        monkeypatch.setattr(module, "rank", lambda: 1)
    assert len(log_of(path, steps=[120], last_step=100).rows) == 1
    board = TensorBoardLog(tmp_path / "tensorboard")
    board.add(1, {"loss_G": 1.0})
    assert path.read_text() == GOOD
    assert list(tmp_path.iterdir()) == [path]
    assert capsys.readouterr().err == ""


# -- the plot --------------------------------------------------------------------------------


def test_a_term_that_was_not_computed_is_logged_as_nan_and_left_out_of_the_plot(tmp_path):
    log = log_of(tmp_path / "losses.csv", [*COLUMNS, "identity_A"], range(1, 40))
    rows = read_losses(log.path)
    assert all(np.isnan(row["identity_A"]) for row in rows)
    plot_losses(rows, tmp_path / "losses.png")
    pixels = np.asarray(Image.open(tmp_path / "losses.png").convert("RGB"))
    assert pixels.std() > 10
    plot_losses(log.rows, tmp_path / "again.png")  # without the column
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "losses.png").read_bytes()


def test_no_rows_give_no_plot_and_odd_numbers_are_plotted(tmp_path):
    plot_losses([], tmp_path / "losses.png")
    assert not (tmp_path / "losses.png").exists()
    rows = [row_of(1, loss_G=math.nan), row_of(2, loss_G=math.inf), {"epoch": 1, "step": 3, "gp_A": -1.0}]
    plot_losses(rows, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").is_file()


# -- TensorBoard -----------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["add_scalar", "add_image", "flush", "close"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), TypeError("protobuf"), AssertionError()])
def test_errors_of_tensorboard_are_at_most_one_warning(tmp_path, capsys, broken, error):
    board = TensorBoardLog(tmp_path)
    board.writer = Mock()
    method = getattr(board.writer, broken)
    method.side_effect = error
    for step in range(3):
        board.add(step, {"loss_G": 1.0, "nan": math.nan}, {"grid": Image.new("RGB", (4, 4))})
    board.close()
    board.writer.close.assert_called_once()
    warnings = warnings_in(capsys)
    if broken == "close":
        assert warnings == []
    else:
        assert method.call_count == 3  # tried again: the disk may have been freed
        assert [type(error).__name__ in line for line in warnings] == [True]


def test_a_tensorboard_log_that_cannot_be_created_is_one_warning(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    board = TensorBoardLog(tmp_path / "tensorboard")
    board.add(1, {"loss_G": 1.0})
    board.add(2, {"loss_G": 1.0})
    board.close()
    assert len(warnings_in(capsys)) == 1


def test_tensorboard_gets_finite_values_and_a_resumed_run_continues_its_log(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    TensorBoardLog().add(1, {"loss_G": 1.0})  # without a folder: nothing
    board = TensorBoardLog(tmp_path / "log")
    for step in (3, 6, 9):
        board.add(step, {"loss_G": step / 2, "nan": math.nan}, {"grid": Image.new("RGB", (4, 4))})
    board.close()
    board = TensorBoardLog(tmp_path / "log", 6)
    board.add(9, {"loss_G": 7.0})
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path / "log")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss_G")] == [(3, 1.5), (6, 3), (9, 7)]
    assert [event.step for event in events.Images("grid")] == [3, 6]
    assert events.Tags()["scalars"] == ["loss_G"]
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
