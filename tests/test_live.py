"""The page that shows a training, and TensorBoard's log of it."""

import re
import sys
from pathlib import Path

import pytest
from conftest import TINY, noise_picture
from PIL import Image

import train
import utils

RUN = [*TINY, "--dataset_name", "tiny", "--num_epochs", "1", "--checkpoint_interval", "1"]
PAGE = Path("generated_images/tiny/index.html")


def pictures_of(page):
    """Links to the pictures of a page, in their order; each has its pixels inside."""
    figures = re.findall(r'<a href="([^"]*)"><img loading="lazy" src="data:image/jpeg;base64,[^"]{50,}"', page)
    assert len(figures) == page.count("<img")
    return figures


def test_a_run_leaves_a_page_with_grids_curves_measures_and_the_watched_photos(tiny):
    noise_picture("cat").save("my cat.png")
    train.main([*RUN, "--eval_interval", "1", "--watch", "my cat.png", "--num_epochs", "3"])
    page = PAGE.read_text()
    watched = [f"watch/my%20cat/epoch_000{i}.png" for i in (1, 2, 3)]
    assert pictures_of(page) == ["epoch_0003.png", "losses.png", "epoch_0002.png", "epoch_0001.png", *watched]
    for link in pictures_of(page):
        assert (PAGE.parent / link.replace("%20", " ")).is_file()
    assert "3 of 3 epochs" in page
    assert 'value="1.0000"' in page
    assert "cycle_A" in page
    assert "http" not in page  # nothing from elsewhere


def test_a_page_loads_itself_anew_only_while_there_is_something_to_come(tmp_path):
    for share in (0.25, 1.0):
        utils.write_progress(tmp_path, "run", "facts", share, [])
        assert ("location.reload()" in (tmp_path / "index.html").read_text()) == (share < 1)


def test_the_page_is_renewed_within_an_epoch(tiny, monkeypatch):
    shares = []
    monkeypatch.setattr(train, "PLOT_SECONDS", -1)
    monkeypatch.setattr(utils, "write_progress", lambda folder, title, facts, share, rows: shares.append(share))
    train.main([*RUN, "--sample_interval", "1", "--steps_per_epoch", "2", "--num_epochs", "2"])
    assert shares == [0, 0.25, 0.5, 0.75, 1.0]  # the page is there from the start


def test_names_of_photos_cannot_write_html(tmp_path):
    folder = tmp_path / "watch" / "<b>&"
    folder.mkdir(parents=True)
    noise_picture(0).save(folder / "epoch_0001.png")
    utils.write_progress(tmp_path, "<i>", "<u>", 1.0, ["<s>"])
    page = (tmp_path / "index.html").read_text()
    assert not any(f"<{letter}>" in page for letter in "bius")
    assert pictures_of(page) == ["watch/%3Cb%3E%26/epoch_0001.png"]


def test_of_many_epochs_a_photo_shows_the_first_the_last_and_some_between(tmp_path):
    folder = tmp_path / "watch" / "cat"
    folder.mkdir(parents=True)
    for epoch in range(1, 31):
        Image.new("RGB", (4, 4)).save(folder / f"epoch_{epoch:04d}.png")
    utils.write_progress(tmp_path, "run", "facts", 1.0, [])
    epochs = [int(link[-8:-4]) for link in pictures_of((tmp_path / "index.html").read_text())]
    assert len(epochs) == utils.MOMENTS
    assert epochs == sorted(epochs)
    assert (epochs[0], epochs[-1]) == (1, 30)


def test_tensorboard_gets_losses_rates_grids_photos_and_measures_and_a_resumed_run_goes_on(tiny):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    noise_picture("cat").save("cat.png")
    more = ["--log", "tensorboard", "--watch", "cat.png", "--eval_interval", "1"]
    train.main([*RUN, *more])
    train.main(["--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "2"])
    events = accumulator.EventAccumulator("saved_models/tiny/tensorboard").Reload()
    steps = 3  # of 5 pictures in batches of 2
    for name in ("lr", "losses/loss_G", "losses/cycle_A", "measures/cycle_A"):
        assert [event.step for event in events.Scalars(name)] == [steps, 2 * steps], name
    for name in ("grid", "watch/cat"):
        assert [event.step for event in events.Images(name)] == [steps, 2 * steps], name
    rows = utils.read_losses(Path("saved_models/tiny/losses.csv"))
    assert events.Scalars("losses/loss_G")[-1].value == pytest.approx(rows[-1]["loss_G"], rel=1e-5)


def test_without_tensorboard_its_flag_is_refused_before_anything_is_written(tiny, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install tensorboard" in refused(train.main, *RUN, "--log", "tensorboard")
    assert not Path("saved_models").exists()


def test_a_new_start_leaves_neither_page_nor_log_of_the_old_run(tiny):
    pytest.importorskip("tensorboard")
    train.main([*RUN, "--log", "tensorboard"])
    train.main([*RUN, "--overwrite", "--steps_per_epoch", "1"])
    assert not Path("saved_models/tiny/tensorboard").exists()
    assert "step 1;" in PAGE.read_text()
