"""What a run shows: sample grids, watched photos, its duration, the page."""

import math
import re
import shlex
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import torch
from breakage import FakeTime, full_disk
from conftest import differences, make_dataset, noise_image, tiny_model, warnings_in
from PIL import Image

from cyclegan import LossConfig, loss_names
from toolkit import devices, monitor
from toolkit.files import attempt
from toolkit.images import ImageReader
from toolkit.logs import read_losses
from toolkit.monitor import Monitor, cyclegan_rows, load_samples, load_watched
from utils import InputError

TERMS = loss_names(LossConfig())


def opened(tmp_path, *photos, step=0, epochs=0, names=("tiny", ("horse", "zebra")), terms=TERMS, tensorboard=False):
    """A monitor whose run starts, or is resumed after a step."""
    folders = (tmp_path / "saved", tmp_path / "drawn")
    for folder in folders:
        folder.mkdir(exist_ok=True)
    samples = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    watched = {name: torch.rand(1, 3, 16, 20) * 2 - 1 for name in photos}
    run = Monitor(*folders, *names, tuple(samples), watched, cyclegan_rows, terms)
    run.open(step, tensorboard, epochs)
    return run


def page_of(run, facts="facts", fraction=1.0):
    """The text of the page, written anew."""
    run.write_index(facts, fraction)
    return (run.images / "index.html").read_text(encoding="utf-8")


def images_of(page):
    """Links to the images of a page, in order; the page holds the pixels of each."""
    figures = re.findall(r'<a href="([^"]*)"><img loading="lazy" src="data:image/jpeg;base64,[^"]{50,}"', page)
    assert len(figures) == page.count("<img")
    return figures


def write_grids(folder, epochs):
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in epochs:
        Image.new("RGB", (4, 4)).save(folder / f"epoch_{epoch:04d}.png")


def epochs_on(page):
    return [int(link[-8:-4]) for link in images_of(page)]


# -- sample grids and watched photos ---------------------------------------------------------


@pytest.mark.parametrize(("counts", "columns"), [((1, 1, 13, 4), 4), ((1, 1, 13, 9), 6), ((3, 3, 0, 0), 3)], ids=str)
def test_samples_are_spread_over_the_held_out_split_as_many_of_each_domain(tmp_path, counts, columns):
    dataset = make_dataset(tmp_path / "set", counts)
    real_A, real_B = load_samples(dataset, dict.fromkeys("AB", ImageReader((16, 12))), "skip")
    assert real_A.shape == real_B.shape == (columns, 3, 16, 12)
    second = dataset / ("testA/2.png" if counts[2] else "trainA/1.png")
    expected = np.array(Image.open(second).resize((12, 16), Image.Resampling.BICUBIC))
    assert torch.equal(((real_A[1] + 1) * 127.5).round(), torch.from_numpy(expected).permute(2, 0, 1).float())


def test_photos_of_any_name_are_watched_and_unreadable_ones_refused_at_the_start_but_skipped_on_resume(capsys):
    paths = [Path("a/x.png"), Path("b/x.png"), Path("c/x.jpg"), Path("...png"), Path("-x.png")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        noise_image(str(path)).save(path, format="PNG")
    photos = load_watched(paths, (16, 16), 3)
    assert sorted(photos) == ["-x", "photo", "x", "x_", "x__"]
    assert not torch.equal(photos["x"], photos["x_"])
    paths[0].unlink()
    paths[1].write_bytes(b"torn")
    with pytest.raises(InputError, match=r"--watch a/x\.png: not a readable image"):
        load_watched(paths, (16, 16), 3)
    assert warnings_in(capsys) == []
    resumed = load_watched(paths, (16, 16), 3, resumed=True)
    assert [line.split()[2] for line in warnings_in(capsys)] == ["a/x.png:", "b/x.png:"]
    assert sorted(resumed) == ["-x", "photo", "x__"]  # under their old names, as their images are in these folders
    assert torch.equal(resumed["x__"], photos["x__"])


@pytest.mark.parametrize(
    ("size", "shape"), [((40, 30), (16, 21)), ((30, 40), (21, 16)), ((400, 10), (16, 64)), ((16, 16), (16, 16))]
)
def test_a_watched_photo_keeps_its_aspect_ratio(size, shape):
    noise_image(0, size).save("x.png")
    assert load_watched([Path("x.png")], (16, 24), 3)["x"].shape == (1, 3, *shape)


def test_grids_show_the_ema_weights(tmp_path):
    model = tiny_model(ema=0.9)
    real_A, real_B = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    for _ in range(2):
        model.step(real_A, real_B)
    rows = dict(cyclegan_rows(model, real_A, real_B))
    assert list(rows) == ["real_A", "fake_B", "rec_A", "real_B", "fake_A", "rec_B"]
    ema = {name: net.eval() for name, net in model.ema.items()}
    with torch.no_grad():
        assert torch.equal(rows["fake_B"], ema["G_AB"](real_A))
        assert torch.equal(rows["fake_A"], ema["G_BA"](real_B))
        assert torch.equal(rows["rec_A"], ema["G_BA"](rows["fake_B"]))
        assert torch.equal(rows["rec_B"], ema["G_AB"](rows["fake_A"]))


def test_a_generator_whose_output_does_not_depend_on_the_input_is_warned_about(capsys):
    one = torch.rand(1, 3, 8, 8)
    constant = torch.cat([one, one])
    varied = torch.cat([one, 1 - one])
    for images in (one, constant, varied):  # a single sample, equal inputs, different ones
        monitor.warn_if_collapsed([(label, images) for label in ("real_A", "fake_B", "real_B", "fake_A")])
    assert warnings_in(capsys) == []
    monitor.warn_if_collapsed([("real_A", varied), ("fake_B", varied), ("real_B", varied), ("fake_A", constant)])
    (warning,) = warnings_in(capsys)
    assert "warning: G_BA: nearly the same output" in warning


def test_a_collapse_is_reported_only_when_an_epoch_ends(tmp_path, capsys):
    model = tiny_model()
    run = opened(tmp_path)
    run.draw(model, 0, 1, True)
    torch.nn.init.zeros_(model.networks["G_AB"].head[1].weight)
    for finished in (False, True, False, True):
        run.draw(model, 1, 3, finished)
    lines = warnings_in(capsys)
    assert len(lines) == 2
    assert all("warning: G_AB: " in line for line in lines)


def test_drawing_does_not_change_the_networks(tmp_path):
    model = tiny_model(norm="batch", ema=0.9)
    run = opened(tmp_path, "cat")
    networks = model.networks | {f"ema {name}": net for name, net in model.ema.items()}
    next(networks["G_AB"].children()).eval()  # as a frozen part is

    def everything():
        tensors = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in networks.items()}
        modes = {name: [module.training for module in net.modules()] for name, net in networks.items()}
        return tensors, modes, devices.rng_state()

    before = everything()
    run.draw(model, 1, 3, True)
    assert differences(before, everything()) == []


# -- time --------------------------------------------------------------------------------------


@pytest.fixture
def fake_time(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr("toolkit.monitor.time", clock)
    return clock


@pytest.mark.parametrize(("seconds", "step"), [(206, 2), (2, 16), (30, 2), (29, 3)])
def test_the_pace_of_all_steps_but_the_first_is_announced_once_after_half_a_minute(fake_time, seconds, step):
    clock = monitor.Clock()
    announced = []
    for number in range(1, 31):
        fake_time.now += 500 if number == 1 else seconds
        if clock.tick():
            announced.append(number)
        assert math.isnan(clock.pace) if number == 1 else clock.pace == seconds
    assert announced == [step]
    fake_time.now += 60 + seconds  # an evaluation, a step
    clock.tick()
    assert clock.pace == seconds + 60 / 30


def test_a_first_grid_is_due_a_minute_after_the_start_unless_one_was_drawn(fake_time, tmp_path):
    run = opened(tmp_path)
    for seconds, due in ((0, False), (59, False), (1, True)):
        fake_time.now += seconds
        assert run.clock.first_grid_due() == due
    run.clock.next_page = math.inf
    run.draw(tiny_model(), 0, 1, False)
    assert not run.clock.first_grid_due()
    assert run.clock.page_due()  # the page shows it at once


@pytest.mark.parametrize(("seconds", "pause"), [(0.1, 30), (5, 250)])
def test_pages_take_little_of_the_time_of_a_run(fake_time, tmp_path, monkeypatch, seconds, pause):
    def write_index(self, facts, fraction):
        fake_time.now += seconds

    monkeypatch.setattr(Monitor, "write_index", write_index)
    run = opened(tmp_path)
    assert run.clock.page_due()
    started = fake_time.now
    run.write_page(0, 1, 1, 2, 2)
    fake_time.now = started + pause - 0.01
    assert not run.clock.page_due()
    fake_time.now = started + pause
    assert run.clock.page_due()


def test_a_run_announces_its_duration_and_warns_when_a_cpu_is_slow(capsys):
    monitor.say_duration(206, 1200, 6, torch.device("cpu"))
    monitor.say_duration(206, 12000, 60, torch.device("cuda"))
    expected = "206 s a step, 21 minutes an epoch: this run will take about 69 hours more\n"
    expected += "206 s a step, 3.4 hours an epoch: this run will take about 29 days more\n"
    assert capsys.readouterr() == (expected, "")
    monitor.say_duration(206, 12000, 60, torch.device("cpu"))
    assert warnings_in(capsys) == [
        "warning: an epoch takes 3.4 hours on this CPU; docs/recipes.md has settings for a CPU"
    ]


def test_a_printed_command_works_in_the_current_folder_and_is_quoted(monkeypatch):
    words = shlex.split(monitor.command_line("test.py", "--run_name", "my run; rm $HOME"))
    assert words[2:] == ["--run_name", "my run; rm $HOME"]
    assert Path(words[1]).is_file()
    monkeypatch.chdir(Path(monitor.__file__).parents[1])
    assert monitor.command_line("test.py", "--run_name", "tiny") == "python test.py --run_name tiny"


# -- the page --------------------------------------------------------------------------------


def test_a_page_explains_its_rows_its_curves_and_its_measures_where_it_has_them(tmp_path):
    run = opened(tmp_path, epochs=1, terms=[*TERMS, "output_AB"])
    noise_image(0).save(run.images / "epoch_0001.png")
    page = page_of(run)
    assert "location.reload()" not in page  # of a finished run
    legend = re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page)
    assert [label for label, _ in legend] == ["real_A", "fake_B", "teacher_B", "rec_A", "real_B", "fake_A", "rec_B"]
    assert dict(legend)["real_A"].startswith("horse: ")
    assert dict(legend)["fake_B"] == "zebra: G_AB(real_A)"
    assert dict(legend)["rec_B"] == "zebra: G_AB(fake_A), ideally equal to real_B"
    assert "Flat loss curves" not in page
    assert "higher is better" not in page
    (run.images / "epoch_0001.png").rename(run.images / "losses.png")
    run.add_measures(1, 3, {"PSNR_B": 12.0})
    page = page_of(run, fraction=0.25)
    assert "<dt>" not in page
    assert "location.reload()" in page
    assert "Flat loss curves" in page
    assert "higher is better" in page


HOSTILE = [
    "<b>&",
    '"onload="alert(1)',
    "'><script>alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "%2e%2e",
    "a\nb",
    "ä猫",
    b"\xff\xfe".decode("utf-8", "surrogateescape"),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_page_shows_any_name_as_text_and_links_to_its_file(tmp_path, name):
    run = opened(tmp_path, epochs=1, names=(name, ("A", "B")))
    folder = run.images / "watch" / name
    write_grids(folder, [1])
    page = page_of(run, facts=name)
    for injected in ("<b>", "<script>", 'onload="', "<h1>49"):
        assert injected not in page
    (link,) = images_of(page)
    assert (run.images / unquote_to_bytes(link).decode("utf-8", "surrogateescape")).is_file()


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 30])
def test_a_watched_photo_is_shown_at_the_first_epoch_the_last_and_some_between(tmp_path, count):
    run = opened(tmp_path, epochs=count)
    write_grids(run.images / "watch" / "cat", range(1, count + 1))
    epochs = epochs_on(page_of(run))
    assert epochs == sorted(set(epochs))
    assert len(epochs) == min(count, 8)
    assert (epochs[0], epochs[-1]) == (1, count)


def test_a_page_shows_the_newest_grid_three_earlier_ones_and_a_link_to_the_gallery(tmp_path):
    run = opened(tmp_path, epochs=100)
    write_grids(run.images, (9, 10, 11, 12, 13, 100))
    page = page_of(run)
    assert epochs_on(page) == [100, 13, 12, 11]
    assert "test/index.html" not in page
    gallery = run.images / "test" / "index.html"
    gallery.parent.mkdir()
    gallery.touch()
    assert '<a href="test/index.html">' in page_of(run)


def test_later_grids_than_the_resumed_epoch_are_hidden_until_they_are_drawn_again(tmp_path):
    for folder in (tmp_path / "drawn", tmp_path / "drawn/watch/cat"):
        write_grids(folder, range(1, 7))
    assert epochs_on(page_of(opened(tmp_path, step=1))) == []
    run = opened(tmp_path, "cat", step=6, epochs=3)
    assert epochs_on(page_of(run)) == [3, 2, 1, 1, 2, 3]
    run.draw(tiny_model(), 3, 7, False)
    assert epochs_on(page_of(run)) == [4, 3, 2, 1, 1, 2, 3, 4]


def test_a_page_reduces_large_images_and_links_damaged_ones(tmp_path):
    run = opened(tmp_path, epochs=2)
    for name in ("epoch_0002.png", "epoch_best.png"):  # the second is not one of ours
        noise_image(0, (2000, 10)).save(run.images / name)
    page = page_of(run)
    assert images_of(page) == ["epoch_0002.png"]
    assert len(page) < 60_000
    (run.images / "epoch_0001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert 'src="epoch_0001.png"' in page_of(run)


def test_the_page_says_how_far_a_run_is_and_how_long_is_left(tmp_path, monkeypatch, fake_time):
    seen = []
    monkeypatch.setattr(
        Monitor, "write_index", lambda self, facts, fraction: seen.append((facts.partition("; written")[0], fraction))
    )
    run = opened(tmp_path)
    run.write_page(0, 0, 0, 2, 60)
    for _ in range(3):
        fake_time.now += 206
        run.clock.tick()
    run.write_page(0, 3, 3, 2, 60)
    run.write_page(0, 3, 3, 2, 60, stopped=True)
    run.write_page(1, 61, 1, 2, 60)
    run.write_page(2, 120, 0, 2, 60)
    assert seen == [
        ("0 of 2 epochs; step 0", 0),
        ("0 of 2 epochs and 3 steps of the next; step 3; about 6.7 hours left", 0.025),
        ("0 of 2 epochs and 3 steps of the next; step 3; stopped, resume with --start_from latest", 0.025),
        ("1 of 2 epochs and 1 step of the next; step 61; about 3.4 hours left", pytest.approx(61 / 120)),
        ("2 of 2 epochs; step 120", 1),
    ]


# -- the monitor -----------------------------------------------------------------------------


def test_a_monitor_leaves_logs_plots_grids_photos_and_a_page(tmp_path, capsys):
    run = opened(tmp_path, "my cat")
    model = tiny_model()
    assert (tmp_path / "saved/losses.csv").read_text() == f"epoch,step,lr,{','.join(TERMS)}\n"
    for epoch in (1, 2, 3):
        run.meter.add(model.step(*torch.rand(2, 2, 3, 16, 16)))
        means = run.meter.means()
        run.log_losses(epoch, 3 * epoch, 2e-4, means)
        assert run.meter.count == 0
        run.draw(model, epoch, 3 * epoch, True)
        run.add_measures(epoch, 3 * epoch, {"cycle_A": 0.25, "PSNR_B": 12.0})
    run.draw(model, 3, 10, False)
    run.write_page(3, 9, 0, 3, 3)
    run.board.close()
    grids = [f"epoch_000{i}.png" for i in (1, 2, 3, 4)]
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {
        *("saved/losses.csv", "saved/measures.csv", "drawn/index.html", "drawn/losses.png"),
        *(f"drawn/{name}" for name in grids),
        *(f"drawn/watch/my cat/{name}" for name in grids),
    }
    page = (run.images / "index.html").read_text()
    earlier = ["epoch_0003.png", "epoch_0002.png", "epoch_0001.png"]
    watched = [f"watch/my%20cat/{name}" for name in grids]
    assert images_of(page) == ["epoch_0004.png", "losses.png", *earlier, *watched]
    assert "<h1>tiny: horse ↔ zebra</h1>" in page
    assert "3 of 3 epochs; step 9; written" in page
    assert 'value="1.0000"' in page
    assert "cycle_A" in page
    assert "http" not in page  # nothing is loaded from other servers
    assert [(row["epoch"], row["step"]) for row in read_losses(run.log.path)] == [(1, 3), (2, 6), (3, 9)]
    assert read_losses(run.log.path)[-1]["loss_G"] == pytest.approx(means["loss_G"], rel=1e-5)
    assert read_losses(run.measures.path)[2] == {"epoch": 3, "step": 9, "cycle_A": 0.25, "PSNR_B": 12.0}
    assert "epoch 3:  cycle_A 0.25  PSNR_B 12" in capsys.readouterr().out


def test_a_resumed_run_cuts_its_logs_back_and_ends_with_the_same_files(tmp_path):
    def train(run, epochs):
        for epoch in epochs:
            run.log_losses(epoch, 3 * epoch, 2e-4, {"loss_G": 1.0})
            run.add_measures(epoch, 3 * epoch, {"cycle_A": epoch / 8})
        run.log.save()
        return {path.name: path.read_text() for path in (tmp_path / "saved").iterdir()}

    run = opened(tmp_path)
    assert run.lacks_measures(3)
    whole = train(run, (1, 2, 3))
    assert not run.lacks_measures(3)
    assert run.lacks_measures(4)
    resumed = opened(tmp_path, step=3)
    for log in (resumed.log, resumed.measures):
        assert [row["step"] for row in log.rows] == [row["step"] for row in read_losses(log.path)] == [3]
    assert train(resumed, (2, 3)) == whole


def test_damaged_measures_are_one_warning(tmp_path, capsys):
    run = opened(tmp_path)
    run.measures.path.write_text("epoch,step,$\\foo$\n1,3,0.5\n")
    assert run.lacks_measures(3)
    opened(tmp_path, step=3)
    assert len(warnings_in(capsys)) == 1
    assert run.measures.path.read_text() == "epoch,step\n"


def test_logs_that_cannot_be_written_end_neither_the_page_nor_the_run(tmp_path, capsys):
    for name in ("losses.csv", "measures.csv"):
        (tmp_path / "saved" / name).mkdir(parents=True)
    run = opened(tmp_path, step=20)
    run.log_losses(2, 40, 2e-4, {"loss_G": 1.0})
    run.add_measures(2, 40, {"cycle_A": 0.5})
    run.write_page(2, 40, 0, 4, 20)
    run.board.close()
    errors = capsys.readouterr().err
    assert "losses.csv" in errors
    assert "measures.csv" in errors
    page = (run.images / "index.html").read_text()
    assert images_of(page) == ["losses.png"]
    assert "cycle_A" in page


def test_a_full_disk_raises_what_attempt_reports_and_the_page_is_not_due_at_once(tmp_path, capsys):
    run = opened(tmp_path)
    with full_disk(room=20):
        assert "epoch_0001.png" in attempt(run.draw, tiny_model(), 1, 3, True)
        assert attempt(run.write_page, 1, 3, 0, 2, 3)
    assert len(warnings_in(capsys)) == 3  # a grid, losses.csv, the page
    assert list(run.images.iterdir()) == []
    assert not run.clock.page_due()


def test_tensorboard_gets_losses_rates_grids_photos_and_measures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = opened(tmp_path, "cat", tensorboard=True)
    run.log_losses(1, 3, 2e-4, {"loss_G": 1.5, "cycle_A": 0.5})
    run.draw(tiny_model(), 1, 3, True)
    run.add_measures(1, 3, {"cycle_A": 0.25})
    run.board.close()
    events = accumulator.EventAccumulator(str(tmp_path / "saved/tensorboard")).Reload()
    values = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert values == pytest.approx({"lr": 2e-4, "losses/loss_G": 1.5, "losses/cycle_A": 0.5, "measures/cycle_A": 0.25})
    assert set(events.Tags()["images"]) == {"grid", "watch/cat"}
