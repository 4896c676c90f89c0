"""Folders of results: what a test removes and what it keeps, thumbnails, and the page."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import noise_image
from PIL import Image

from toolkit import gallery
from utils import InputError


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


SETTINGS = {"network": "tiny", "epoch": 1, "step": 4, "scale": "train"}


def leave(folder, *names):
    """Write files as a test does, with its record of them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / gallery.RECORD).write_text(json.dumps({"settings": {}, "files": {name: {} for name in names}}))


def result_of(path, name="a.png"):
    """The result of an image, of its translation alone."""
    return gallery.Result(path, Path(name), {"fake_B": Path("fake_B", name)})


@contextmanager
def written(path, *results, keep=False, with_scores=False, **settings):
    """A folder while a test of these results writes to it."""
    folder = gallery.ResultFolder(path, SETTINGS | settings)
    with folder.written([results], keep, with_scores):
        yield folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    noise_image(1).save(path)
    return path


def test_exactly_what_a_test_wrote_is_removed(tmp_path, capsys):
    leave(
        tmp_path, "fake_B/old.png", "index.html", "grid.png", "metrics.json", "thumbnails/fake_B/old.jpg", "rec_A/1.png"
    )
    for name in ("fake_B/mine.png", "notes.txt", "thumbnails/mine.jpg"):
        (tmp_path / name).write_text("mine")
    with written(tmp_path):
        assert files_in(tmp_path) == {"fake_B/mine.png", "notes.txt", "thumbnails/mine.jpg", gallery.RECORD}
    assert not (tmp_path / "rec_A").exists()
    assert "removed 6 files of the last test" in capsys.readouterr().out
    with written(tmp_path):
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "record", ['{"network": "run", "files": {"fake_B/a.png": [7, 1]}}', '{"files": ["fake_B/a.png"]}']
)
def test_records_of_older_versions_are_read(tmp_path, record):
    leave(tmp_path, "fake_B/a.png")
    (tmp_path / gallery.RECORD).write_text(record)
    with written(tmp_path):
        assert files_in(tmp_path) == {gallery.RECORD}


@pytest.mark.parametrize("name", ["../mine.txt", "notes.txt", "fake_B/../../mine.txt", "/etc/none", "", "fake_B"])
def test_a_record_that_leads_elsewhere_removes_nothing(tmp_path, name):
    output = tmp_path / "output"
    leave(output, "fake_B/a.png")
    (tmp_path / "mine.txt").write_text("mine")
    (output / "notes.txt").write_text("mine")
    (output / gallery.RECORD).write_text(json.dumps({"settings": {}, "files": {name: {}}}))
    with written(output):
        assert {"mine.txt", "output/notes.txt", "output/fake_B/a.png"} <= files_in(tmp_path)


DAMAGED = [
    "",
    "{",
    "7",
    "[1, 2]",
    '{"files": [1]}',
    '{"files": ["fake_B/\\u0000"]}',
    '{"files": {"fake_B/a.png": 1}, "settings": {}}',
]
DAMAGED += ['{"files": {}, "settings": [1]}', '{"files": {"fake_B/b.png": {"settings": [1]}}, "settings": {"x": {}}}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_record_removes_nothing(tmp_path, text, photo):
    leave(tmp_path, "fake_B/a.png")
    (tmp_path / gallery.RECORD).write_text(text)
    with written(tmp_path) as folder:
        gallery.write_gallery(folder, ("A", "B"), [])
    with (
        pytest.raises(InputError, match=r"fake_B/a\.png is there, and not written by test\.py"),
        written(tmp_path, result_of(photo)),
    ):
        pass
    assert (tmp_path / "fake_B/a.png").read_text() == "fake_B/a.png"


@pytest.mark.parametrize("name", ["fake_B/a.png", "thumbnails/fake_B/a.jpg", "index.html", "grid.png", "metrics.json"])
def test_somebody_elses_file_is_not_replaced_and_nothing_is_removed(tmp_path, photo, name):
    output = tmp_path / "output"
    leave(output, "fake_B/old.png")
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_text("mine")
    before = files_in(output)
    with (
        pytest.raises(InputError, match=rf"{name} is there, and not written by test\.py; choose another folder"),
        written(output, result_of(photo), with_scores=True),
    ):
        pass
    assert files_in(output) == before
    assert (output / name).read_text() == "mine"


def test_scores_of_somebody_else_stay_where_a_test_has_none(tmp_path, photo):
    (tmp_path / "metrics.json").write_text("mine")
    for _ in range(2):
        with written(tmp_path, result_of(photo)) as folder:
            folder.save(result_of(photo), [noise_image(2)])
    assert (tmp_path / "metrics.json").read_text() == "mine"


@pytest.mark.parametrize("keep", [True, False])
def test_an_input_among_the_files_of_the_test_is_refused_and_nothing_is_removed(tmp_path, photo, keep):
    leave(tmp_path, "fake_B/a.png", "fake_B/old.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "fake_B/a.png")
    before = files_in(tmp_path)
    for path in (tmp_path / "fake_B/a.png", tmp_path / "link.png"):
        for result in (result_of(path), gallery.Result(photo, Path("a.png"), {"fake_B": Path("fake_B/a.png")}, path)):
            with (
                pytest.raises(InputError, match=r"--output .* would remove or overwrite .*; choose another"),
                written(tmp_path, result, keep=keep),
            ):
                pass
    assert files_in(tmp_path) == before


def test_a_linked_folder_does_not_hide_an_input(tmp_path, photo):
    (tmp_path / "photos").mkdir()
    photo.rename(tmp_path / "photos/a.png")
    (tmp_path / "output").mkdir()
    (tmp_path / "output/fake_B").symlink_to(tmp_path / "photos")
    with (
        pytest.raises(InputError, match="not written by test"),
        written(tmp_path / "output", result_of(tmp_path / "photos/a.png")),
    ):
        pass


@pytest.mark.parametrize("side", [20, 300])
def test_a_result_is_there_once_it_is_saved_whole_and_a_large_one_has_a_thumbnail(tmp_path, photo, side):
    result = result_of(photo)
    file = result.files["fake_B"]
    with written(tmp_path, result) as folder:
        assert not folder.has(result)
        folder.save(result, [noise_image(0, (side, side))])
        assert folder.has(result)
    assert (tmp_path / gallery.thumbnail(file)).is_file() == (side > 256)
    assert gallery.ResultFolder(tmp_path, SETTINGS).has(result)
    data = (tmp_path / file).read_bytes()
    for changed in (data[: len(data) // 2], data[:-1], b"", data[:-20] + b"x" + data[-19:]):
        (tmp_path / file).write_bytes(changed)
        assert not gallery.ResultFolder(tmp_path, SETTINGS).has(result)


def test_a_result_of_another_network_setting_input_or_truth_is_none(tmp_path, photo):
    truth = tmp_path / "truth.png"
    noise_image(2).save(truth)
    result = gallery.Result(
        photo, Path("a.png"), {"fake_B": Path("fake_B/a.png"), "truth_B": Path("truth_B/a.png")}, truth
    )
    with written(tmp_path, result) as folder:
        folder.save(result, [noise_image(3), noise_image(2)])
    assert gallery.ResultFolder(tmp_path, SETTINGS).has(result)
    for change in ({"step": 5}, {"network": "two"}, {"scale": "native"}, {"networks": {"AtoB": "1"}}):
        assert not gallery.ResultFolder(tmp_path, SETTINGS | change).has(result)
    for path in (photo, truth):
        kept = path.read_bytes()
        noise_image(4).save(path)
        assert not gallery.ResultFolder(tmp_path, SETTINGS).has(result)
        path.write_bytes(kept)
    assert gallery.ResultFolder(tmp_path, SETTINGS).has(result)


def test_results_that_are_kept_are_shown_as_what_they_are(tmp_path, photo):
    for number in (1, 2):
        with written(tmp_path, result_of(photo, f"{number}.png"), keep=True, epoch=number) as folder:
            folder.save(result_of(photo, f"{number}.png"), [noise_image(number)])
            gallery.write_gallery(folder, ("day", "night"), [])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<h1>tiny, epoch 2, step 4</h1>" in page
    assert page.index("<h2>day → night: 1 image</h2>") < page.index(
        "day → night: 1 image of an earlier test: tiny, epoch 1, step 4; scale train</h2>"
    )
    assert page.index("fake_B/2.png") < page.index("fake_B/1.png")


def test_what_is_killed_leaves_its_names_and_no_results(tmp_path, photo):
    planned = [result_of(photo, "1.png"), result_of(photo, "2.png")]
    folder = gallery.ResultFolder(tmp_path, SETTINGS)
    block = folder.written([planned], False, False)
    block.__enter__()  # and not left, as after SIGKILL
    folder.save(planned[0], [noise_image(1)])
    again = gallery.ResultFolder(tmp_path, SETTINGS)
    assert not again.has(planned[0])  # its hash was not yet recorded
    with again.written([planned], True, False):
        again.save(planned[1], [noise_image(2)])
    assert set(gallery.read_record(tmp_path)[0]) == {"fake_B/1.png", "fake_B/2.png"}


def test_a_thumbnail_is_small_and_removed_for_an_image_that_needs_none(tmp_path):
    path = tmp_path / "new/x.jpg"
    for size, expected in (((300, 200), (256, 171)), ((4000, 100), (256, 7)), ((257, 257), (256, 256))):
        gallery.save_thumbnail(Image.new("L", size, 200), path)
        with Image.open(path) as small:
            assert small.size == expected
    gallery.save_thumbnail(Image.new("L", (256, 1)), path)
    assert not path.exists()


def test_the_page_escapes_names_and_links_to_files(tmp_path, photo):
    name = Path("<script>&#%.png")
    result = gallery.Result(photo, name, {"real_A": Path("real_A", name)})
    with written(tmp_path, result, epoch=3, step=None, network="<i>") as folder:
        folder.save(result, [noise_image(1)])
        gallery.write_gallery(folder, ("day", "night"), ["<b> 1"])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<h1>&lt;i&gt;, epoch 3</h1>" in page
    assert "<h2>day → night: 1 image</h2>" in page
    assert "<pre>&lt;b&gt; 1</pre>" in page
    assert "<script>" not in page
    assert 'href="real_A/%3Cscript%3E%26%23%25.png"' in page
    assert set(gallery.read_record(tmp_path)[0]) == {"index.html", f"real_A/{name}"}
