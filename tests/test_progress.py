"""What a run shows: grids and watched photos, the page."""

import math
import os
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

from cyclegan import TERMS
from toolkit import devices, monitor
from toolkit.files import attempt, page_templates
from toolkit.monitor import (
    MOMENTS,
    Clock,
    Monitor,
    command_line,
    cyclegan_rows,
    duration,
    faster_flags,
    legend,
    load_samples,
    load_watched,
    read_losses,
    say_duration,
    warn_if_collapsed,
    write_progress,
)
from utils import InputError

# -- grids and watched photos ----------------------------------------------------------------


@pytest.mark.parametrize(("test_images_B", "columns"), [(4, 4), (9, 6)])
def test_samples_are_spread_over_the_held_out_split_as_many_of_each_domain(tmp_path, capsys, test_images_B, columns):
    dataset = make_dataset(tmp_path / "set", (1, 1, 13, test_images_B))
    real_A, real_B = load_samples(dataset, (16, 12), 3, "skip")
    assert real_A.shape == real_B.shape == (columns, 3, 16, 12)
    assert capsys.readouterr().out == ""
    wanted = [Image.open(dataset / "testA" / f"{i}.png").resize((12, 16), Image.Resampling.BICUBIC) for i in (0, 2)]
    for x, photo in zip(real_A, wanted, strict=False):
        assert torch.equal(((x + 1) * 127.5).round(), torch.from_numpy(np.array(photo)).permute(2, 0, 1).float())


def test_without_test_images_the_grids_show_training_images(tmp_path, capsys):
    real_A, _ = load_samples(make_dataset(tmp_path / "set", (3, 3, 0, 0)), (16, 16), 1, "skip")
    assert real_A.shape == (3, 1, 16, 16)
    assert "training images" in capsys.readouterr().out


def write_photos(*names):
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        noise_image(name).save(name, format="PNG")
    return [Path(name) for name in names]


def test_photos_of_one_name_and_of_odd_names_are_all_watched():
    paths = write_photos("a/x.png", "b/x.png", "c/x.jpg", "...png", "-x.png")
    photos = load_watched(paths, (16, 16), 3)
    assert sorted(photos) == ["-x", "photo", "x", "x_", "x__"]
    assert not torch.equal(photos["x"], photos["x_"])


@pytest.mark.parametrize(
    ("size", "shape"), [((40, 30), (16, 21)), ((30, 40), (21, 16)), ((400, 10), (16, 64)), ((16, 16), (16, 16))]
)
def test_a_watched_photo_keeps_its_shape(size, shape):
    noise_image(0, size).save("x.png")
    assert load_watched([Path("x.png")], (16, 24), 3)["x"].shape == (1, 3, *shape)


def test_a_watched_photo_that_cannot_be_read_is_refused_at_the_start_and_left_out_when_a_run_goes_on(capsys):
    paths = write_photos("a/x.png", "b/x.png", "c/x.png")
    before = load_watched(paths, (16, 16), 3)
    paths[0].unlink()
    paths[1].write_bytes(b"torn")
    for bad in paths[:2]:
        with pytest.raises(InputError, match=f"--watch {bad}: not a readable image"):
            load_watched([bad], (16, 16), 3)
    assert capsys.readouterr().err == ""
    after = load_watched(paths, (16, 16), 3, resumed=True)
    assert [line.split()[2] for line in warnings_in(capsys)] == ["a/x.png:", "b/x.png:"]
    assert list(after) == ["x__"]  # under the name it had, so that its pictures go on in their folder
    assert torch.equal(after["x__"], before["x__"])


def test_a_single_sample_image_tells_nothing_of_a_collapse(capsys):
    one, rows = torch.rand(1, 3, 8, 8), ("real_A", "fake_B", "real_B", "fake_A")
    warn_if_collapsed(dict.fromkeys(rows, one))
    warn_if_collapsed(dict.fromkeys(rows, torch.cat([one, one])))
    assert capsys.readouterr().err == ""
    varied = dict.fromkeys(rows, torch.cat([one, 1 - one]))
    warn_if_collapsed(list(varied.items()))
    assert capsys.readouterr().err == ""
    warn_if_collapsed([*varied.items(), ("fake_A", torch.cat([one, one]))])
    (warning,) = warnings_in(capsys)
    assert "warning: G_BA: draws the same image" in warning
    assert "--start_from" in warning


# -- how long it takes, and how it goes on -----------------------------------------------------


@pytest.fixture
def fake_time(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr("toolkit.monitor.time", clock)
    return clock


def test_the_pace_is_that_of_all_steps_but_the_first_and_of_what_happens_between_them(fake_time):
    clock = Clock()
    for seconds in (100, 2, 2):
        fake_time.now += seconds
        clock.tick()
    assert clock.pace == 2
    fake_time.now += 60 + 2  # an evaluation, a step
    clock.tick()
    assert clock.pace == (2 + 2 + 62) / 3
    assert math.isnan(Clock().pace)


@pytest.mark.parametrize(("seconds", "due"), [(206, [2]), (2, [16]), (30, [2]), (29, [3])])
def test_the_pace_is_said_once_and_not_before_half_a_minute_of_steps(fake_time, seconds, due):
    clock = Clock()
    said = []
    for step in range(1, 31):
        fake_time.now += seconds + (500 if step == 1 else 0)
        if clock.tick():
            said.append(step)
            assert clock.pace == seconds
    assert said == due


def test_a_first_grid_is_due_after_a_minute_unless_there_was_one(fake_time, tmp_path):
    monitor = monitor_of(tmp_path)
    fake_time.now += 500  # of building: the run begins where it opens its logs
    monitor.open(0, with_tensorboard=False)
    assert not monitor.clock.first_grid_due()
    fake_time.now += 59
    assert not monitor.clock.first_grid_due()
    fake_time.now += 1
    assert monitor.clock.first_grid_due()
    monitor.clock.next_page = math.inf
    monitor.draw(tiny_model(), 0, 1, False)
    assert not monitor.clock.first_grid_due()
    assert monitor.clock.page_due()  # it is shown at once


def test_pages_take_little_of_a_runs_time_also_where_a_disk_takes_none(fake_time, tmp_path, monkeypatch):
    monitor = monitor_of(tmp_path)
    monitor.open(0, with_tensorboard=False)
    assert monitor.clock.page_due()

    def write(seconds, error=None):
        fake_time.now += seconds
        if error:
            raise error

    for seconds, pause in ((0.1, 30), (5, 250)):
        monkeypatch.setattr("toolkit.monitor.write_progress", lambda *_, seconds=seconds: write(seconds))
        begun = fake_time.now
        monitor.show(0, 1, 1, 2, 2)
        fake_time.now = begun + pause - 0.01
        assert not monitor.clock.page_due()
        fake_time.now = begun + pause
        assert monitor.clock.page_due()
    monkeypatch.setattr("toolkit.monitor.write_progress", lambda *_: write(1, OSError("full")))
    attempt(monitor.show, 0, 1, 1, 2, 2)
    assert not monitor.clock.page_due()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.1312, "0.13 s"),
        (206.4, "206 s"),
        (2700, "45 minutes"),
        (9000, "2.5 hours"),
        (69 * 3600, "69 hours"),
        (95.2 * 86400, "95 days"),
    ],
)
def test_times_are_said_as_a_person_would(seconds, words):
    assert duration(seconds) == words


PAPER = {"start_from": "0", "generator": "resnet", "img_height": 256, "img_width": 256, "batch_size": 10}
PAPER |= {"num_residual": 9, "ngf": 64, "ndf": 64, "n_layers_D": 3, "init_from": []}
CPU = torch.device("cpu")


def test_it_is_said_how_long_a_run_takes_and_on_a_slow_cpu_what_would_be_faster(capsys):
    say_duration(206, 1200, 6, PAPER, CPU)
    assert capsys.readouterr() == ("206 s a step, 21 minutes an epoch: this run will take about 69 hours more\n", "")
    say_duration(206, 12000, 60, PAPER, CPU)
    out, err = capsys.readouterr()
    assert out == "206 s a step, 3.4 hours an epoch: this run will take about 29 days more\n"
    assert err.startswith("warning: an epoch takes 3.4 hours on this CPU; start again with --overwrite and flags that")
    assert err.count("\n") == 1
    say_duration(206, 12000, 60, PAPER, torch.device("cuda"))
    assert capsys.readouterr().err == ""


def test_the_flags_that_fit_a_cpu_are_those_of_the_recipes_as_far_as_they_can_still_be_changed():
    recipes = (Path(monitor.__file__).parents[1] / "docs/recipes.md").read_text()
    small = "--img_height 64 --img_width 64 --batch_size 1"
    narrow = "--num_residual 6 --ngf 32 --ndf 32 --n_layers_D 2"
    assert faster_flags(206, PAPER) == f"{small} {narrow}"
    for flag in (*small.split(" --"), narrow):
        assert flag in recipes
    assert faster_flags(206, {**PAPER, "start_from": "latest"}) == small
    assert faster_flags(206, {**PAPER, "init_from": ["G_AB.safetensors"]}) == small
    assert faster_flags(206, {**PAPER, "generator": "unet_vit"}) == f"{small} --ndf 32 --n_layers_D 2"
    student = {name: PAPER[name] for name in ("start_from", "img_height", "img_width", "batch_size")}
    assert faster_flags(206, {**student, "img_height": 64}) == "--img_width 64 --batch_size 1"
    assert (
        faster_flags(0.2, {**student, "img_height": 32, "img_width": 32, "batch_size": 1}) == "--steps_per_epoch 3000"
    )


def test_a_command_works_where_it_is_typed_and_quotes_what_a_shell_would_take_apart(monkeypatch):
    words = shlex.split(command_line("test.py", "--run_name", "my run; rm $HOME"))
    assert words[2:] == ["--run_name", "my run; rm $HOME"]
    assert Path(words[1]).is_file()
    monkeypatch.chdir(Path(monitor.__file__).parents[1])
    assert command_line("test.py", "--run_name", "tiny") == "python test.py --run_name tiny"
    monkeypatch.chdir("tests")
    assert Path(shlex.split(command_line("test.py"))[1]).is_file()


# -- the page --------------------------------------------------------------------------------


def test_a_legend_names_the_domains_and_explains_each_row_of_a_grid():
    plain = dict(legend(("horse", "zebra"), []))
    assert list(plain) == ["real_A", "fake_B", "rec_A", "real_B", "fake_A", "rec_B"]
    assert plain["real_A"].startswith("horse: ")
    assert plain["fake_B"] == "zebra: what G_AB makes of real_A"
    assert plain["fake_A"] == "horse: what G_BA makes of real_B"
    taught = dict(legend(("A", "B"), ["BA"]))
    assert list(taught) == ["real_A", "fake_B", "rec_A", "real_B", "fake_A", "teacher_A", "rec_B"]


def test_a_page_explains_its_rows_its_curves_and_its_measures_where_it_has_them(tmp_path):
    noise_image(0).save(tmp_path / "epoch_0001.png")
    write_progress(tmp_path, "run", "facts", 1.0, [], ("horse", "<zebra>"), ["AB"])
    page = (tmp_path / "index.html").read_text()
    assert "<dt>fake_B</dt><dd>&lt;zebra&gt;: what G_AB makes of real_A</dd>" in page
    assert "<dt>teacher_B</dt>" in page
    assert "Flat curves" not in page
    assert "higher is better" not in page
    (tmp_path / "epoch_0001.png").rename(tmp_path / "losses.png")
    write_progress(tmp_path, "run", "facts", 1.0, ["PSNR"])
    page = (tmp_path / "index.html").read_text()
    assert "<dt>" not in page
    assert "Flat curves" in page
    assert "higher is better" in page


def images_of(page):
    """Links to the images of a page, in their order; each has its pixels inside."""
    figures = re.findall(r'<a href="([^"]*)"><img loading="lazy" src="data:image/jpeg;base64,[^"]{50,}"', page)
    assert len(figures) == page.count("<img")
    return figures


def test_a_page_loads_itself_anew_only_while_there_is_something_to_come(tmp_path):
    for fraction in (0.25, 1.0):
        write_progress(tmp_path, "run", "facts", fraction, [])
        assert ("location.reload()" in (tmp_path / "index.html").read_text()) == (fraction < 1)


def test_names_of_photos_cannot_write_html(tmp_path):
    folder = tmp_path / "watch" / "<b>&"
    folder.mkdir(parents=True)
    noise_image(0).save(folder / "epoch_0001.png")
    write_progress(tmp_path, "<i>", "<u>", 1.0, ["<s>"])
    page = (tmp_path / "index.html").read_text()
    assert not any(f"<{letter}>" in page for letter in "bius")
    assert images_of(page) == ["watch/%3Cb%3E%26/epoch_0001.png"]


HOSTILE = [
    '"onload="alert(1)',
    "'><script>alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "%2e%2e",
    "a\nb",
    "ä猫",
    b"\xff\xfe".decode("utf-8", "surrogateescape"),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_page_shows_any_name_as_it_is_and_links_to_its_file(tmp_path, name):
    folder = tmp_path / "watch" / name
    folder.mkdir(parents=True)
    noise_image(0).save(folder / "epoch_0001.png")
    write_progress(tmp_path, name, name, 1.0, [])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert 'onload="' not in page
    assert "<h1>49" not in page
    (link,) = images_of(page)
    assert (tmp_path / unquote_to_bytes(link).decode("utf-8", "surrogateescape")).is_file()


def test_a_gallery_escapes_what_users_named(tmp_path):
    page = (
        page_templates()
        .get_template("gallery.html")
        .render(
            title="<i>",
            table=["<s>", "  1  2"],
            directions=[
                (
                    "A → B: 1 images",
                    [("real_A", "<u> as it was given")],
                    [
                        (
                            "<b>.png",
                            [
                                ("real_A", "real_A/%3Cb%3E.png", "thumbnails/real_A/%3Cb%3E.jpg"),
                                ("fake_B", "fake_B/x.png", "fake_B/x.png"),
                            ],
                        )
                    ],
                )
            ],
        )
    )
    assert not any(f"<{letter}>" in page for letter in "isu")
    assert "<b>.png" not in page
    assert "<pre>&lt;s&gt;\n  1  2</pre>" in page
    assert re.findall(r'<a href="(.*?)"><img loading="lazy" src="(.*?)" alt="">', page) == [
        ("real_A/%3Cb%3E.png", "thumbnails/real_A/%3Cb%3E.jpg"),
        ("fake_B/x.png", "fake_B/x.png"),
    ]
    assert "<h2>A → B: 1 images</h2>" in page
    assert page.count("<figure>") == 2
    assert "http" not in page  # nothing from elsewhere
    assert "<pre>" not in page_templates().get_template("gallery.html").render(title="", table=[], directions=[])


def test_of_many_epochs_a_photo_shows_the_first_the_last_and_some_between(tmp_path):
    folder = tmp_path / "watch" / "cat"
    folder.mkdir(parents=True)
    for epoch in range(1, 31):
        Image.new("RGB", (4, 4)).save(folder / f"epoch_{epoch:04d}.png")
    write_progress(tmp_path, "run", "facts", 1.0, [])
    epochs = [int(link[-8:-4]) for link in images_of((tmp_path / "index.html").read_text())]
    assert len(epochs) == MOMENTS
    assert epochs == sorted(epochs)
    assert (epochs[0], epochs[-1]) == (1, 30)


def test_a_page_shows_the_newest_grid_and_three_earlier_ones(tmp_path):
    for epoch in (9, 10, 11, 12, 13, 100):
        Image.new("RGB", (4, 4)).save(tmp_path / f"epoch_{epoch:04d}.png")
    write_progress(tmp_path, "run", "facts", 1.0, [])
    page = (tmp_path / "index.html").read_text()
    assert [int(link[-8:-4]) for link in images_of(page)] == [100, 13, 12, 11]
    assert "test/index.html" not in page
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "index.html").write_text("")
    write_progress(tmp_path, "run", "facts", 1.0, [])
    assert '<a href="test/index.html">' in (tmp_path / "index.html").read_text()


def test_grids_of_a_branch_that_the_run_left_are_not_shown_until_drawn_again(tmp_path):
    monitor = monitor_of(tmp_path)
    folders = (monitor.images, monitor.images / "watch" / "cat")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for epoch in range(1, 7):
            Image.new("RGB", (4, 4)).save(folder / f"epoch_{epoch:04d}.png")

    def shown():
        monitor.show(3, 6, 0, 6, 2)
        return images_of((monitor.images / "index.html").read_text())

    monitor.open(6, with_tensorboard=False, epochs=3)
    assert [int(link[-8:-4]) for link in shown()] == [3, 2, 1, 1, 2, 3]
    os.utime(folders[0] / "epoch_0004.png", (1, 1))  # drawn again
    assert [int(link[-8:-4]) for link in shown()] == [4, 3, 2, 1, 1, 2, 3]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9])
def test_of_few_epochs_a_photo_shows_all(count):
    chosen = monitor.evenly(list(range(count)), MOMENTS)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, MOMENTS)


def test_large_images_are_reduced_in_the_page(tmp_path):
    noise_image(0, (2000, 10)).save(tmp_path / "epoch_0001.png")
    noise_image(0, (2000, 10)).save(tmp_path / "epoch_best.png")  # not ours
    write_progress(tmp_path, "run", "facts", 1.0, [])
    page = (tmp_path / "index.html").read_text()
    assert images_of(page) == ["epoch_0001.png"]
    assert len(page) < 60_000


def test_a_grid_that_cannot_be_read_keeps_its_place_in_the_page(tmp_path):
    """A disk that was full left half an image; the page links to it, and the run goes on."""
    (tmp_path / "epoch_0001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write_progress(tmp_path, "run", "facts", 1.0, [])
    assert 'src="epoch_0001.png"' in (tmp_path / "index.html").read_text()


# -- all of it -------------------------------------------------------------------------------


def monitor_of(tmp_path, photos=(), count=2, **changes):
    saved = tmp_path / "saved"
    drawn = tmp_path / "drawn"
    for folder in (saved, drawn):
        folder.mkdir(exist_ok=True)
    samples = torch.rand(2, count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    watched = {name: torch.rand(1, 3, 16, 20) * 2 - 1 for name in photos}
    values = {
        "names": ("tiny", "horse2zebra"),
        "samples": tuple(samples),
        "photos": watched,
        "draw_rows": cyclegan_rows,
    }
    return Monitor(saved, drawn, **{**values, "term_names": TERMS, **changes})


def test_a_monitor_leaves_logs_plots_grids_photos_and_a_page(tmp_path, capsys):
    monitor = monitor_of(tmp_path, ["my cat"])
    model = tiny_model()
    monitor.open(0, with_tensorboard=False)
    assert (tmp_path / "saved/losses.csv").read_text() == f"epoch,step,lr,{','.join(TERMS)}\n"
    for epoch in (1, 2, 3):
        monitor.meter.add(model.step(*torch.rand(2, 2, 3, 16, 16)))
        means = monitor.meter.means()
        monitor.log_losses(epoch, 3 * epoch, 2e-4, means)
        assert monitor.meter.count == 0
        monitor.draw(model, epoch, 3 * epoch, True)
        monitor.add_measures(epoch, 3 * epoch, {"cycle_A": 0.25, "PSNR_B": 12.0})
    monitor.draw(model, 3, 10, False)
    monitor.show(3, 9, 0, 3, 3)
    monitor.close()
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    grids = [f"epoch_000{i}.png" for i in (1, 2, 3, 4)]
    assert files == {
        *("saved/losses.csv", "saved/measures.csv", "drawn/index.html", "drawn/losses.png"),
        *(f"drawn/{name}" for name in grids),
        *(f"drawn/watch/my cat/{name}" for name in grids),
    }
    page = (tmp_path / "drawn/index.html").read_text()
    watched = [f"watch/my%20cat/{name}" for name in grids]
    assert images_of(page) == [
        "epoch_0004.png",
        "losses.png",
        "epoch_0003.png",
        "epoch_0002.png",
        "epoch_0001.png",
        *watched,
    ]
    assert "3 of 3 epochs; step 9; written" in page
    assert 'value="1.0000"' in page
    assert "cycle_A" in page
    assert "http" not in page
    assert [(row["epoch"], row["step"]) for row in read_losses(monitor.log.path)] == [(1, 3), (2, 6), (3, 9)]
    assert read_losses(monitor.log.path)[-1]["loss_G"] == pytest.approx(means["loss_G"], rel=1e-5)
    rows = read_losses(monitor.measures.path)
    assert rows[2] == {"epoch": 3, "step": 9, "cycle_A": 0.25, "PSNR_B": 12.0}
    assert "epoch 3:  cycle_A 0.25  PSNR_B 12" in capsys.readouterr().out


def test_the_page_says_how_far_a_run_is_within_an_epoch(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "toolkit.monitor.write_progress", lambda folder, title, facts, fraction, *_: seen.append((facts, fraction))
    )
    monitor = monitor_of(tmp_path)
    monitor.open(0, with_tensorboard=False)
    for epoch, place in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0)):
        monitor.show(epoch, 2 * epoch + place, place, 2, 2)
    assert [fraction for _, fraction in seen] == [0, 0.25, 0.5, 0.75, 1.0]
    assert seen[3][0].startswith("1 of 2 epochs and 1 step of the next; step 3; written ")


def test_the_page_is_titled_by_run_and_domains_and_says_how_long_is_left(tmp_path, monkeypatch, fake_time):
    seen = []
    monkeypatch.setattr("toolkit.monitor.write_progress", lambda *args: seen.append(args))
    monitor = monitor_of(tmp_path, term_names=[*TERMS, "output_BA", "hidden_BA"])
    monitor.open(0, with_tensorboard=False)
    monitor.show(0, 0, 0, 2, 60)
    for _ in range(3):
        fake_time.now += 206
        monitor.clock.tick()
    monitor.show(0, 3, 3, 2, 60)
    monitor.show(0, 3, 3, 2, 60, stopped=True)
    monitor.show(2, 120, 0, 2, 60)
    assert all(args[1] == "tiny: horse ↔ zebra" and args[5:7] == (("horse", "zebra"), ["BA"]) for args in seen)
    facts = [args[2].partition("; written")[0] for args in seen]
    assert facts[0] == "0 of 2 epochs; step 0"
    assert facts[1] == "0 of 2 epochs and 3 steps of the next; step 3; about 6.7 hours left"
    assert facts[2] == "0 of 2 epochs and 3 steps of the next; step 3; stopped, goes on with --start_from latest"
    assert facts[3] == "2 of 2 epochs; step 120"


def test_a_monitor_that_goes_on_cuts_its_logs_back(tmp_path):
    monitor = monitor_of(tmp_path)
    monitor.open(0, with_tensorboard=False)
    for epoch in (1, 2, 3):
        monitor.log_losses(epoch, 3 * epoch, 2e-4, {"loss_G": 1.0})
        monitor.add_measures(epoch, 3 * epoch, {"cycle_A": epoch / 8})
    monitor.log.save()
    whole = {path.name: path.read_text() for path in (tmp_path / "saved").iterdir()}
    again = monitor_of(tmp_path)
    again.open(3, with_tensorboard=False)
    for log in (again.log, again.measures):
        assert [row["step"] for row in log.rows] == [row["step"] for row in read_losses(log.path)] == [3]
    for epoch in (2, 3):
        again.log_losses(epoch, 3 * epoch, 2e-4, {"loss_G": 1.0})
        again.add_measures(epoch, 3 * epoch, {"cycle_A": epoch / 8})
    again.log.save()
    assert {path.name: path.read_text() for path in (tmp_path / "saved").iterdir()} == whole


def test_other_measures_do_not_erase_what_was_measured_before(tmp_path):
    monitor = monitor_of(tmp_path)
    monitor.open(0, with_tensorboard=False)
    monitor.add_measures(1, 3, {"cycle_A": 0.5})
    monitor.add_measures(2, 6, {"PSNR_B": 20.0})
    monitor.show(2, 6, 0, 4, 3)
    first, second = read_losses(monitor.measures.path)
    assert (first["cycle_A"], second["PSNR_B"]) == (0.5, 20)
    assert math.isnan(second["cycle_A"])


def test_drawing_changes_nothing_about_the_networks(tmp_path):
    model = tiny_model(norm="batch", ema=0.9)
    monitor = monitor_of(tmp_path, ["cat"])
    monitor.open(0, with_tensorboard=False)
    nets = {**model.nets, **{f"average of {name}": net for name, net in model.averages.items()}}
    next(nets["G_AB"].children()).eval()  # as a frozen part stands

    def all_of_it():
        tensors = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in nets.items()}
        modes = {name: [module.training for module in net.modules()] for name, net in nets.items()}
        return tensors, modes, devices.rng_state()

    before = all_of_it()
    monitor.draw(model, 1, 3, True)
    assert differences(before, all_of_it()) == []


def test_grids_show_the_averaged_generators(tmp_path):
    model = tiny_model(ema=0.9)
    real_A, real_B = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    for step in range(2):
        model.step(real_A, real_B, step)
    rows = dict(cyclegan_rows(model, real_A, real_B))
    assert list(rows) == ["real_A", "fake_B", "rec_A", "real_B", "fake_A", "rec_B"]
    with torch.no_grad():
        assert torch.equal(rows["fake_B"], model.averages["G_AB"].eval()(real_A))
        assert torch.equal(rows["fake_A"], model.averages["G_BA"].eval()(real_B))
        assert torch.equal(rows["rec_A"], model.averages["G_BA"](rows["fake_B"]))
        assert torch.equal(rows["rec_B"], model.averages["G_AB"](rows["fake_A"]))


def test_a_generator_that_gives_one_image_is_warned_about_when_an_epoch_ends(tmp_path, capsys):
    model = tiny_model()
    monitor = monitor_of(tmp_path)
    monitor.open(0, with_tensorboard=False)
    monitor.draw(model, 0, 1, True)
    torch.nn.init.zeros_(model.nets["G_AB"].head[1].weight)
    for finished in (False, True, False, True):
        monitor.draw(model, 1, 3, finished)
    lines = warnings_in(capsys)
    assert len(lines) == 2
    assert all("warning: G_AB: draws" in line and "--start_from" in line for line in lines)


def test_a_log_that_cannot_be_written_stops_neither_the_page_nor_the_run(tmp_path, capsys):
    (tmp_path / "saved").mkdir()
    for name in ("losses.csv", "measures.csv", "tensorboard"):
        (tmp_path / "saved" / name).mkdir()
    monitor = monitor_of(tmp_path)
    monitor.open(20, with_tensorboard=False)
    monitor.log_losses(2, 40, 2e-4, {"loss_G": 1.0})
    monitor.add_measures(2, 40, {"cycle_A": 0.5})
    monitor.show(2, 40, 0, 4, 20)
    monitor.close()
    errors = capsys.readouterr().err
    assert "losses.csv" in errors
    assert "measures.csv" in errors
    page = (tmp_path / "drawn/index.html").read_text()
    assert images_of(page) == ["losses.png"]
    assert "cycle_A" in page


def test_a_disk_that_takes_no_grid_raises_what_attempt_says(tmp_path, capsys):
    monitor = monitor_of(tmp_path)
    monitor.open(0, with_tensorboard=False)
    with full_disk(room=20):
        assert "epoch_0001.png" in attempt(monitor.draw, tiny_model(), 1, 3, True)
        assert attempt(monitor.show, 1, 3, 0, 2, 3)
    assert len(warnings_in(capsys)) == 3  # a grid, losses.csv, the page
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == []


def test_tensorboard_gets_losses_rates_grids_photos_and_measures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = monitor_of(tmp_path, ["cat"])
    monitor.open(0, with_tensorboard=True)
    monitor.log_losses(1, 3, 2e-4, {"loss_G": 1.5, "cycle_A": 0.5})
    monitor.draw(tiny_model(), 1, 3, True)
    monitor.add_measures(1, 3, {"cycle_A": 0.25})
    monitor.close()
    events = accumulator.EventAccumulator(str(tmp_path / "saved/tensorboard")).Reload()
    values = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert values == pytest.approx({"lr": 2e-4, "losses/loss_G": 1.5, "losses/cycle_A": 0.5, "measures/cycle_A": 0.25})
    assert set(events.Tags()["images"]) == {"grid", "watch/cat"}
