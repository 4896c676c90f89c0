"""Folders of results: what a test removes and what it keeps, thumbnails, and the page."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import noise_image
from PIL import Image

from models import DIRECTIONS
from toolkit import files, gallery
from toolkit.files import sha256
from utils import InputError


def files_in(folder):
    """Without the record and the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in (gallery.RECORD, ".lock")]
    return {str(path.relative_to(folder)) for path in paths}


SETTINGS = {"network": "tiny", "epoch": 1, "step": 4, "scale": "train", "domains": ["day", "night"]}


def leave(folder, *names):
    """Write files as a test does, with its record of them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    lines = [json.dumps({"file": name, "sha256": sha256(folder / name)}) for name in names]
    (folder / gallery.RECORD).write_text("\n".join(lines) + "\n")


def result_of(path, name="a.png"):
    """The result of an image, of its translation alone."""
    return gallery.Result(path, Path(name), {"fake_B": Path("fake_B", name)})


@contextmanager
def written(path, *results, keep=False, with_scores=False, **settings):
    """A folder while a test of these results writes to it."""
    with gallery.open_results(path, SETTINGS | settings) as folder:
        folder.claim([results], keep, with_scores)
        yield folder


def save(folder, result, images):
    folder.save(result, images, folder.origin(result))


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
        assert files_in(tmp_path) == {"fake_B/mine.png", "notes.txt", "thumbnails/mine.jpg"}
    assert not (tmp_path / "rec_A").exists()
    assert "removed 6 files of the last test" in capsys.readouterr().out
    with written(tmp_path):
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("files", [{"fake_B/a.png": [7, 1]}, ["fake_B/a.png"], []])
def test_records_of_older_versions_are_read(tmp_path, files):
    leave(tmp_path, "fake_B/a.png")
    (tmp_path / gallery.RECORD).unlink()
    (tmp_path / gallery.OLD_RECORD).write_text(json.dumps({"network": "run", "files": files}))
    with written(tmp_path):
        assert files_in(tmp_path) == (set() if files else {"fake_B/a.png"})
    assert not (tmp_path / gallery.OLD_RECORD).exists()


def test_a_file_of_an_old_record_is_known_by_its_content_once_it_was_read(tmp_path, photo):
    leave(tmp_path, "fake_B/a.png")
    (tmp_path / gallery.RECORD).unlink()
    (tmp_path / gallery.OLD_RECORD).write_text('{"files": ["fake_B/a.png"]}')
    with written(tmp_path, result_of(photo, "b.png"), keep=True):
        pass
    (tmp_path / "fake_B/a.png").write_text("mine")
    with written(tmp_path):
        assert (tmp_path / "fake_B/a.png").read_text() == "mine"


def test_an_old_record_counts_by_content_even_if_the_first_test_is_refused(tmp_path, photo):
    leave(tmp_path, "fake_B/a.png")
    (tmp_path / gallery.RECORD).unlink()
    (tmp_path / gallery.OLD_RECORD).write_text('{"files": ["fake_B/a.png"]}')
    (tmp_path / "fake_B/b.png").write_text("mine")
    with pytest.raises(InputError, match=r"b\.png is there"), written(tmp_path, result_of(photo, "b.png")):
        pass
    (tmp_path / "fake_B/a.png").write_text("mine")
    (tmp_path / gallery.OLD_RECORD).write_text("my essay")
    with written(tmp_path):
        assert (tmp_path / "fake_B/a.png").read_text() == "mine"
    assert (tmp_path / gallery.OLD_RECORD).read_text() == "my essay"


def test_a_page_that_an_interrupt_left_without_an_entry_in_memory_is_the_tests_own(tmp_path, photo, monkeypatch):
    fsync = os.fsync

    def interrupted(file):
        if (tmp_path / "index.html").exists():  # it has its name, its folder is being synced
            raise KeyboardInterrupt
        fsync(file)

    with suppress(KeyboardInterrupt), written(tmp_path, result_of(photo)) as folder, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        folder.write_page([])
    with written(tmp_path, result_of(photo)) as folder:
        folder.write_page([])


@pytest.mark.parametrize("name", ["../mine.txt", "notes.txt", "fake_B/../../mine.txt", "/etc/none", "", "fake_B"])
def test_a_record_that_leads_elsewhere_removes_nothing(tmp_path, name):
    output = tmp_path / "output"
    leave(output, "fake_B/a.png")
    (tmp_path / "mine.txt").write_text("mine")
    (output / "notes.txt").write_text("mine")
    with (output / gallery.RECORD).open("a") as record:
        record.write(json.dumps({"file": name, "sha256": None}))
    with written(output):
        assert {"mine.txt", "output/notes.txt"} <= files_in(tmp_path)


DAMAGED = [
    "{",
    "7",
    "[" * 100_000,
    '{"files": 7}',
    '{"file": "fake_B/a.png"',
    "my notes",
    "\ud800".encode("utf-8", "surrogatepass"),
]


@pytest.mark.parametrize("name", [gallery.RECORD, gallery.OLD_RECORD])
@pytest.mark.parametrize("text", DAMAGED)
def test_what_is_no_record_is_refused(tmp_path, text, name):
    leave(tmp_path, "fake_B/a.png")
    (tmp_path / gallery.RECORD).unlink()
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"is not what test\.py wrote; choose another folder"), written(tmp_path):
        pass
    assert files_in(tmp_path) >= {"fake_B/a.png"}


def test_a_pipe_is_no_record(tmp_path):
    os.mkfifo(tmp_path / gallery.RECORD)
    with pytest.raises(InputError, match=r"is not what test\.py wrote"), written(tmp_path):
        pass


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "[1]", '"x"', '{"file": "fake_B/\\ud800"}', '{"file": "fake_B/\\u0000"}', '{"file": "fake_B//a.png"}', '{"key": 1}', '{"file": 7}',
        '{"file": "fake_B/a.png", "sha256": [], "settings": {}, "input": [1], "truth": 7}', '{"file": "fake_B/b.png"',
    ],
)  # fmt: skip
def test_damaged_lines_of_a_record_are_left_out(tmp_path, line, photo):
    leave(tmp_path, "index.html")
    with (tmp_path / gallery.RECORD).open("a") as record:
        record.write(line)
    (tmp_path / "fake_B").mkdir()
    (tmp_path / "fake_B/a.png").write_text("mine")
    with written(tmp_path) as folder:
        folder.inputs(DIRECTIONS[0])
        folder.write_page([])
    with pytest.raises(InputError, match=r"fake_B/a\.png is there"), written(tmp_path, result_of(photo)):
        pass
    assert files_in(tmp_path) == {"fake_B/a.png", "index.html", "photo.png"}


@pytest.mark.parametrize("name", ["fake_B/a.png", "thumbnails/fake_B/a.jpg", "index.html", "grid.png", "metrics.json"])
def test_somebody_elses_file_is_not_replaced_and_nothing_is_removed(tmp_path, photo, name):
    output = tmp_path / "output"
    leave(output, "fake_B/old.png")
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_text("mine")
    before = files_in(output)
    with (
        pytest.raises(InputError, match=rf"{name} is there, and not as test\.py wrote it; choose another folder"),
        written(output, result_of(photo), with_scores=True),
    ):
        pass
    assert files_in(output) == before
    assert (output / name).read_text() == "mine"


def test_scores_of_somebody_else_stay_where_a_test_has_none(tmp_path, photo):
    (tmp_path / "metrics.json").write_text("mine")
    for _ in range(2):
        with written(tmp_path, result_of(photo)) as folder:
            save(folder, result_of(photo), [noise_image(2)])
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
        pytest.raises(InputError, match="not as test"),
        written(tmp_path / "output", result_of(tmp_path / "photos/a.png")),
    ):
        pass


@pytest.mark.parametrize("side", [20, 300])
def test_a_result_is_there_once_it_is_saved_whole_and_a_large_one_has_a_thumbnail(tmp_path, photo, side):
    result = result_of(photo)
    file = result.files["fake_B"]
    with written(tmp_path, result) as folder:
        assert not folder.has(result)
        save(folder, result, [noise_image(0, (side, side))])
        assert folder.has(result)
    assert (tmp_path / gallery.thumbnail(file)).is_file() == (side > 256)
    assert gallery.ResultFolder(tmp_path, SETTINGS).has(result)
    data = (tmp_path / file).read_bytes()
    for changed in (data[: len(data) // 2], data[:-1], b"", data[:-20] + b"x" + data[-19:]):  # now somebody's own
        (tmp_path / file).write_bytes(changed)
        assert not gallery.ResultFolder(tmp_path, SETTINGS).has(result)
        with (
            pytest.raises(InputError, match=r"fake_B/a\.png is there, and not as test\.py wrote it"),
            written(tmp_path, result),
        ):
            pass
        with written(tmp_path, result_of(photo, "b.png")):
            assert (tmp_path / file).read_bytes() == changed
        (tmp_path / file).write_bytes(data)


def test_a_result_of_another_network_setting_input_or_truth_is_none(tmp_path, photo):
    truth = tmp_path / "truth.png"
    noise_image(2).save(truth)
    result = gallery.Result(
        photo, Path("a.png"), {"fake_B": Path("fake_B/a.png"), "truth_B": Path("truth_B/a.png")}, truth
    )
    with written(tmp_path, result) as folder:
        save(folder, result, [noise_image(3), noise_image(2)])
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
            save(folder, result_of(photo, f"{number}.png"), [noise_image(number)])
            folder.write_page([])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<h1>tiny, epoch 2, step 4</h1>" in page
    assert page.index("<h2>day → night: 1 image</h2>") < page.index(
        "day → night: 1 image of an earlier test: tiny, epoch 1, step 4; scale train</h2>"
    )
    assert page.index("fake_B/2.png") < page.index("fake_B/1.png")


def test_results_of_other_settings_are_replaced_only_with_a_word(tmp_path, photo, capsys):
    for scale, said in (("train", ""), ("train", ""), ("native", f"{tmp_path}: replaces 1 file of other settings; ")):
        with written(tmp_path, result_of(photo), keep=True, scale=scale) as folder:
            save(folder, result_of(photo), [noise_image(1)])
        assert capsys.readouterr().out == (f"{said}--output DIR would keep them\n" if said else "")


def test_a_line_of_the_record_that_was_cut_off_harms_no_other(tmp_path, photo):
    results = [result_of(photo, name) for name in ("a.png", "b.png")]
    with written(tmp_path, *results) as folder:
        with (tmp_path / gallery.RECORD).open("a", encoding="utf-8") as record:
            record.write('\n{"file": "fake_B/a.p')  # the disk was full
        for result in results:
            save(folder, result, [noise_image(1)])
    found = gallery.ResultFolder(tmp_path, SETTINGS)
    assert all(found.has(result) for result in results)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_test_that_is_killed_while_it_replaces_a_result_leaves_no_doubt_whose_it_is(
    tmp_path, photo, moment, monkeypatch
):
    result = result_of(photo)
    with written(tmp_path, result) as folder:
        save(folder, result, [noise_image(1, (300, 300))])
    replace = files.replace

    def killed(source, target):
        if target.suffix == ".png":
            if moment == "after":
                replace(source, target)
            raise KeyboardInterrupt
        replace(source, target)

    folder = gallery.ResultFolder(tmp_path, SETTINGS | {"epoch": 2})
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(files, "replace", killed)
        save(folder, result, [noise_image(2, (300, 300))])  # its record is not written anew, as after SIGKILL
    for epoch in (1, 2):
        assert gallery.ResultFolder(tmp_path, SETTINGS | {"epoch": epoch}).has(result) == (
            (moment == "after") == (epoch == 2)
        )


def test_a_thumbnail_of_another_network_is_not_shown(tmp_path, photo):
    result = result_of(photo)
    for epoch in (1, 2):
        with written(tmp_path, result, keep=True, epoch=epoch) as folder:
            save(folder, result, [noise_image(epoch, (300, 300) if epoch == 1 else (20, 20))])
            assert folder.small_file(Path("fake_B/a.png")) == Path(
                "thumbnails/fake_B/a.jpg" if epoch == 1 else "fake_B/a.png"
            )


def test_round_trips_and_truths_of_other_inputs_are_not_shown(tmp_path, photo):
    noise_image(9).save(tmp_path / "other.png")
    files = {folder: Path(folder, "a.png") for folder in ("real_A", "fake_B", "rec_A")}
    with written(tmp_path, gallery.Result(photo, Path("a.png"), files)) as folder:
        save(folder, gallery.Result(photo, Path("a.png"), files), [noise_image(i) for i in range(3)])
    del files["rec_A"]
    other = gallery.Result(tmp_path / "other.png", Path("a.png"), files)
    with written(tmp_path, other, keep=True) as folder:
        save(folder, other, [noise_image(i) for i in range(2)])
        (result,) = folder.results()[folder.key, DIRECTIONS[0]]
    assert result.files.keys() == {"real_A", "fake_B"}


@pytest.mark.parametrize("name", ["fake_B", "fake_B/a.png"])
def test_a_folder_or_file_in_the_way_is_refused_before_anything_is_removed(tmp_path, photo, name):
    leave(tmp_path, "real_A/old.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).mkdir() if name.endswith("png") else (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=rf"{name} is there"), written(tmp_path, result_of(photo)):
        pass
    assert "real_A/old.png" in files_in(tmp_path)


def test_a_second_test_in_one_folder_is_refused(tmp_path):
    hold = "import fcntl, sys; file = open('.lock', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
    hold += "print('4711', end='', file=file, flush=True); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with (
            pytest.raises(InputError, match=r"process 4711.* writes there; wait, or choose another --output"),
            written(Path()),
        ):
            pass
        other.kill()


def test_a_thumbnail_is_small(tmp_path):
    for size, expected in (((300, 200), (256, 171)), ((4000, 100), (256, 7)), ((257, 257), (256, 256))):
        gallery.save_thumbnail(Image.new("L", size, 200), tmp_path / "x.jpg")
        with Image.open(tmp_path / "x.jpg") as small:
            assert small.size == expected


def test_the_page_escapes_names_and_links_to_files(tmp_path, photo):
    name = Path("<script>&#%.png")
    result = result_of(photo, name)
    with written(tmp_path, result, epoch=3, step=None, network="<i>") as folder:
        save(folder, result, [noise_image(1)])
        folder.write_page(["<b> 1"])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<h1>&lt;i&gt;, epoch 3</h1>" in page
    assert "<h2>day → night: 1 image</h2>" in page
    assert "<pre>&lt;b&gt; 1</pre>" in page
    assert "<script>" not in page
    assert 'href="fake_B/%3Cscript%3E%26%23%25.png"' in page
    assert set(gallery.read_record(tmp_path)[0]) == {"index.html", f"fake_B/{name}"}


def test_unfinished_files_of_a_killed_test_are_removed_and_nothing_else(tmp_path):
    left = [tmp_path / name / ".cyclegan-1-2.tmp" for name in (".", "fake_B/sub", "thumbnails/real_A")]
    own = [tmp_path / "fake_B/.cyclegan-mine.tmp", tmp_path / "mine/.cyclegan-1-2.tmp"]
    for path in (*left, *own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    with gallery.open_results(tmp_path, {}):
        pass
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in own)
