"""Folders of results: what a test clears away, and what it never touches."""

import json
from pathlib import Path

import pytest
from conftest import noise_image

from toolkit import gallery
from toolkit.images import save_image

NETWORK = "run"


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def leave(folder, *names):
    """What a test wrote: files, and the list of them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    gallery.sweep(folder, [Path(name) for name in names], [], NETWORK, keep=False)


def test_only_what_a_test_wrote_and_nobody_changed_is_removed(tmp_path, capsys):
    leave(tmp_path, "fake_B/old.png", "fake_B/changed.png", "fake_B/input.png", "fake_B/kept.png")
    (tmp_path / "fake_B/changed.png").write_text("touched up by hand")
    (tmp_path / "fake_B/mine.png").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    capsys.readouterr()
    gallery.sweep(tmp_path, [Path("fake_B/kept.png")], [tmp_path / "fake_B/input.png"], NETWORK, keep=False)
    expected = {f"fake_B/{name}.png" for name in ("changed", "input", "kept", "mine")} | {"notes.txt", gallery.WRITTEN}
    assert files_in(tmp_path) == expected
    out = capsys.readouterr().out
    assert "removed 1 file of" in out
    assert "files that this test did not write: 3, such as" in out


def test_what_is_kept_once_can_be_removed_later(tmp_path):
    leave(tmp_path, "fake_B/old.png")
    gallery.sweep(tmp_path, [], [], NETWORK, keep=True)
    assert "fake_B/old.png" in files_in(tmp_path)
    gallery.sweep(tmp_path, [], [], NETWORK, keep=False)
    assert files_in(tmp_path) == {gallery.WRITTEN}


@pytest.mark.parametrize("name", ["../mine.txt", "notes.txt", "fake_B/../../mine.txt", "/etc/none", ""])
def test_a_list_that_leads_elsewhere_removes_nothing(tmp_path, name):
    output = tmp_path / "output"
    leave(output, "fake_B/a.png")
    (tmp_path / "mine.txt").write_text("mine")
    (output / "notes.txt").write_text("mine")
    (output / gallery.WRITTEN).write_text(
        json.dumps({"network": NETWORK, "files": {name: gallery.stamp(output / name)}})
    )
    gallery.sweep(output, [], [], NETWORK, keep=False)
    assert {"mine.txt", "output/notes.txt", "output/fake_B/a.png"} <= files_in(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[1, 2]", "{", "7", '{"network": "run", "files": {"fake_B/a.png": null}}', "[" * 10**5, "[[1,2]]"),
        *(
            '{"network": "run", "files": {"fake_B/none.png": []}}',
            '{"network": "run", "files": {"fake_B/\\u0000": [1]}}',
        ),
        '{"network": "run", "files": [1]}',
    ],
)
def test_a_damaged_list_removes_nothing(tmp_path, text):
    leave(tmp_path, "fake_B/a.png")
    (tmp_path / gallery.WRITTEN).write_text(text)
    gallery.sweep(tmp_path, [], [], NETWORK, keep=False)
    assert "fake_B/a.png" in files_in(tmp_path)


def test_what_another_network_gave_stays_and_is_not_cleared_later(tmp_path, capsys):
    """All our generator files are called G_AB or G_BA, so their results share a folder."""
    leave(tmp_path, "fake_B/cat.png")
    for _ in range(2):
        gallery.sweep(tmp_path, [], [], "saved_models/other/G_AB.safetensors", keep=False)
        assert "fake_B/cat.png" in files_in(tmp_path)
        assert "files that this test did not write: 1, such as" in capsys.readouterr().out


@pytest.mark.parametrize("side", [20, 300])
def test_a_result_whose_end_is_missing_is_not_whole(tmp_path, side):
    file = Path("fake_B/a.png")
    assert not gallery.is_whole(tmp_path, file)
    save_image(noise_image(0, (side, side)), tmp_path / file)
    assert gallery.is_whole(tmp_path, file)
    assert (tmp_path / gallery.thumbnail(file)).is_file() == (side > 256)
    data = (tmp_path / file).read_bytes()
    for size in (len(data) // 2, len(data) - 1, 3, 0):
        (tmp_path / file).write_bytes(data[:size])
        assert not gallery.is_whole(tmp_path, file)
