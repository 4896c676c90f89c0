"""Folders of results: what a test removes and what it keeps, thumbnails, and the page."""

import json
from pathlib import Path

import pytest
from conftest import noise_image
from PIL import Image

from models import DIRECTIONS
from toolkit import gallery
from toolkit.images import save_image
from utils import InputError


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def leave(folder, *names):
    """Write files as a test does, with its record of them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    gallery.record(folder, names)


def test_exactly_what_a_test_wrote_is_removed(tmp_path, capsys):
    leave(tmp_path, "fake_B/old.png", "index.html")
    leave(tmp_path, "grid.png", "metrics.json", "thumbnails/fake_B/old.jpg")
    for name in ("fake_B/mine.png", "notes.txt", "thumbnails/mine.jpg"):
        (tmp_path / name).write_text("mine")
    gallery.clear(tmp_path, [Path("elsewhere.png")])
    assert files_in(tmp_path) == {"fake_B/mine.png", "notes.txt", "thumbnails/mine.jpg"}
    assert "removed 5 files of the last test" in capsys.readouterr().out
    gallery.clear(tmp_path, [])
    assert capsys.readouterr().out == ""


def test_a_thumbnail_is_recorded_with_its_file_and_missing_files_are_not(tmp_path):
    leave(tmp_path, "thumbnails/fake_B/a.jpg", "fake_B/a.png")
    (tmp_path / gallery.RECORD).unlink()
    gallery.record(tmp_path, [Path("fake_B/a.png"), Path("fake_B/none.png")])
    assert gallery.read_record(tmp_path) == ["fake_B/a.png", "thumbnails/fake_B/a.jpg"]


def test_records_of_older_versions_are_read(tmp_path):
    leave(tmp_path, "fake_B/a.png")
    (tmp_path / gallery.RECORD).write_text('{"network": "run", "files": {"fake_B/a.png": [7, 1]}}')
    gallery.clear(tmp_path, [])
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize("name", ["../mine.txt", "notes.txt", "fake_B/../../mine.txt", "/etc/none", "", "fake_B"])
def test_a_record_that_leads_elsewhere_removes_nothing(tmp_path, name):
    output = tmp_path / "output"
    leave(output, "fake_B/a.png")
    (tmp_path / "mine.txt").write_text("mine")
    (output / "notes.txt").write_text("mine")
    (output / gallery.RECORD).write_text(json.dumps({"files": [name]}))
    gallery.clear(output, [])
    assert {"mine.txt", "output/notes.txt", "output/fake_B/a.png"} <= files_in(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "7", "[1, 2]", '{"files": [1]}', '{"files": ["fake_B/\\u0000"]}'])
def test_a_damaged_record_removes_nothing(tmp_path, text):
    leave(tmp_path, "fake_B/a.png")
    (tmp_path / gallery.RECORD).write_text(text)
    gallery.clear(tmp_path, [])
    assert "fake_B/a.png" in files_in(tmp_path)


@pytest.mark.parametrize("name", ["fake_B/old.png", "fake_B/mine.png", "real_A/sub/mine.png", "grid.png"])
def test_an_input_among_the_results_is_refused_and_nothing_is_removed(tmp_path, name):
    leave(tmp_path, "fake_B/old.png")
    before = files_in(tmp_path)
    with pytest.raises(InputError, match=r"--output .* would remove or overwrite the input .*; choose another"):
        gallery.clear(tmp_path, [Path("good.png"), tmp_path / name])
    assert files_in(tmp_path) == before


def test_links_do_not_hide_that_an_input_is_among_the_results(tmp_path):
    leave(tmp_path / "photos", "fake_B/a.png")
    (tmp_path / "output").mkdir()
    (tmp_path / "output/real_A").symlink_to(tmp_path / "photos")
    (tmp_path / "link.png").symlink_to(tmp_path / "photos/fake_B/a.png")
    for path in ("photos/fake_B/a.png", "link.png"):
        with pytest.raises(InputError, match="would remove or overwrite"):
            gallery.refuse_inputs(tmp_path / "output", [tmp_path / path])


@pytest.mark.parametrize("side", [20, 300])
def test_a_result_is_complete_once_it_is_saved_whole_and_a_large_one_has_a_thumbnail(tmp_path, side):
    file = Path("fake_B/a.png")
    result = gallery.Result(Path("a.png"), Path("a.png"), {"fake_B": file})
    assert not gallery.is_complete(tmp_path, result)
    gallery.save_results(tmp_path, result, [noise_image(0, (side, side))])
    assert gallery.is_complete(tmp_path, result)
    assert (tmp_path / gallery.thumbnail(file)).is_file() == (side > 256)
    data = (tmp_path / file).read_bytes()
    for size in (len(data) // 2, len(data) - 1, 3, 0):
        (tmp_path / file).write_bytes(data[:size])
        assert not gallery.is_complete(tmp_path, result)


def test_a_thumbnail_is_small_and_removed_for_an_image_that_needs_none(tmp_path):
    path = tmp_path / "new/x.jpg"
    for size, expected in (((300, 200), (256, 171)), ((4000, 100), (256, 7)), ((257, 257), (256, 256))):
        gallery.save_thumbnail(Image.new("L", size, 200), path)
        with Image.open(path) as small:
            assert small.size == expected
    gallery.save_thumbnail(Image.new("L", (256, 1)), path)
    assert not path.exists()


def test_the_page_escapes_names_and_links_to_files(tmp_path):
    name = Path("<script>&#%.png")
    save_image(noise_image(1), tmp_path / "real_A" / name)
    result = gallery.Result(name, name, {"real_A": Path("real_A", name)})
    gallery.write_gallery(tmp_path, "day2night", {"epoch": 3, "step": None}, {DIRECTIONS[0]: [result]}, ["<b> 1"])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert f"<h1>{tmp_path.parent.name}, epoch 3</h1>" in page
    assert "<h2>day → night: 1 image</h2>" in page
    assert "<pre>&lt;b&gt; 1</pre>" in page
    assert "<script>" not in page
    assert 'href="real_A/%3Cscript%3E%26%23%25.png"' in page
    assert gallery.read_record(tmp_path) == ["index.html"]
