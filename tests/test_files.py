import errno
import io
import json
import math
import os
import pickle
import signal
import stat
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import pytest
import torch
from breakage import Dead, full_disk
from conftest import noise_image
from edits import EDITS, FUZZ, edited
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import save_run

import test as test_command
from toolkit import checkpoints, distributed, files, images
from toolkit.checkpoints import RUNS
from utils import InputError, one_line

posix = pytest.mark.skipif(os.name == "nt", reason="locks and links of POSIX")


@pytest.mark.parametrize("error", [OSError, ZeroDivisionError, KeyboardInterrupt, SystemExit, Dead])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail():
        with files.atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_kept_until_the_new_one_is_complete_and_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_text("old")
    synced = []
    plain = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append((os.fstat(number), path.read_text())), plain(number))
    )
    with files.atomic_write(path) as temporary:
        temporary.write_text("the new one")
        assert temporary.parent == path.parent  # of the same file system, so that a rename can replace
        assert path.read_text() == "old"
    assert synced[0][0].st_size == len("the new one")
    assert synced[0][1] == "old"
    if os.name == "posix":  # then the folder, which has the new name
        assert stat.S_ISDIR(synced[1][0].st_mode)
        assert synced[1][1] == "the new one"


def test_a_leftover_with_our_number_is_never_written_into(tmp_path):
    """It may be a link to a good file, left by a killed process that had our number."""
    good = tmp_path / "latest.pt"
    good.write_text("good")
    with files.atomic_write(tmp_path / "x.txt") as temporary:
        name = temporary.name
        temporary.write_text("")
    os.link(good, tmp_path / name)
    files.write_text(tmp_path / "x.txt", "other")
    assert good.read_text() == "good"


def test_threads_write_beside_each_other(tmp_path):
    def work(i):
        for _ in range(20):
            files.write_text(tmp_path / "x.txt", str(i) * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert (tmp_path / "x.txt").read_text() in [str(i) * 1000 for i in range(4)]
    assert len(list(tmp_path.iterdir())) == 1


def test_text_is_utf8_with_plain_line_ends_and_json_knows_paths(tmp_path):
    path = tmp_path / ("n" * 250 + ".txt")  # the longest name
    files.write_text(path, "é 猫\nb\n")
    assert path.read_bytes() == "é 猫\nb\n".encode()
    files.write_json(tmp_path / "x.json", {"folder": Path("a/b"), "sizes": [1, math.inf]})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"folder": "a/b", "sizes": [1, None]}
    assert text.count("\n") > 3  # for people to read


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(files, "rank", lambda: 1)
    files.write_text(tmp_path / "x.txt", "hello")
    files.write_json(tmp_path / "x.json", {})
    with files.sole_process(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_linked_file_keeps_its_content_when_the_source_is_replaced(tmp_path, monkeypatch):
    source = tmp_path / "latest.pt"
    target = tmp_path / "epoch.pt"
    for fails in (False, True):
        if fails:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
        source.write_text("one")
        files.link_file(source, target)
        assert source.samefile(target) != fails
        with files.atomic_write(source) as temporary:
            temporary.write_text("two")
        assert target.read_text() == "one"


@pytest.mark.parametrize("kind", ["text", "json", "image", "link", "missing folder"])
def test_every_writer_names_the_file_that_the_user_knows(tmp_path, kind):
    path = tmp_path / "file.png"
    path.write_text("old")
    write = {
        "text": lambda: files.write_text(path, "x" * 10**5),
        "json": lambda: files.write_json(path, ["x" * 10**5]),
        "image": lambda: images.save_image(noise_image(0, (200, 200)), path),
        "link": lambda: files.link_file(tmp_path / "missing", path),
        "missing folder": lambda: files.write_text(tmp_path / "no" / "file.png", "x"),
    }[kind]
    with full_disk(room=4096), pytest.raises(OSError, match=r"file\.png") as error:
        write()
    assert error.value.errno == (errno.ENOENT if kind in ("link", "missing folder") else errno.EFBIG)
    assert ".tmp" not in str(error.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_that_can_be_repeated_is_reported(tmp_path, capsys):
    path = tmp_path / "file.txt"
    with full_disk():
        reason = files.attempt(files.write_text, path, "text")
    assert reason == f"{path}: File too large"
    assert capsys.readouterr().err.startswith(f"warning: {path}: File too large; ")
    assert files.attempt(files.write_text, path, "text") == ""
    assert (path.read_text(), capsys.readouterr().err) == ("text", "")
    with pytest.raises(ZeroDivisionError):  # a bug is not treated as a full disk
        files.attempt(lambda: 1 / 0)


HOLDER = """
import fcntl, os, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
file.truncate(0)
print(os.getpid(), end="", file=file, flush=True)
print("locked", flush=True)
sys.stdin.read()
"""


def locks(folder):
    """The command line of a program that locks a folder until its stdin ends, as files.sole_process does."""
    return [sys.executable, "-c", HOLDER, str(folder / ".lock")]


@posix
def test_only_own_temporary_files_are_removed(tmp_path):
    others = {".2024-11.tmp", ".77.tmp", ".latest.tmp", ".letter.tmp"}
    for name in (*others, ".cyclegan-1-2.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".cyclegan-5-5.tmp").mkdir()
    with files.sole_process(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".cyclegan-5-5.tmp", *others}


@posix
@pytest.mark.parametrize("make", ["link", "second name", "text", "late text", "folder", "pipe"])
def test_what_is_no_lock_is_refused_and_left_alone(tmp_path, make):
    lock = tmp_path / ".lock"
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "number").write_text("20000")
    {
        "link": lambda: lock.symlink_to("mine"),
        "second name": lambda: os.link(tmp_path / "number", lock),
        "text": lambda: lock.write_text("mine"),
        "late text": lambda: lock.write_text(40 * " " + "mine"),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
    }[make]()
    with pytest.raises(InputError, match=r"\.lock: needed to keep other processes out"), files.sole_process(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "number").read_text() == "20000"
    assert make != "text" or lock.read_text() == "mine"


@posix
def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    with subprocess.Popen(locks(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        (tmp_path / ".cyclegan-12-34.tmp").touch()
        for _ in range(2):
            with pytest.raises(InputError, match=f"{tmp_path}: process {process.pid} writes there"):
                files.sole_process(tmp_path).__enter__()
        assert (tmp_path / ".cyclegan-12-34.tmp").exists()  # it is the other's
        process.send_signal(signal.SIGKILL)
        process.wait()
        with files.sole_process(tmp_path):
            assert (tmp_path / ".lock").read_text() == str(os.getpid())
            assert not (tmp_path / ".cyclegan-12-34.tmp").exists()


@posix
def test_a_run_that_another_process_is_overwriting_is_refused(tiny, refused):
    save_run()
    checkpoints.set_aside("tiny")
    with subprocess.Popen(locks(RUNS / "tiny"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        error = refused(test_command.main, "--run_name", "tiny")
        assert f"saved_models/tiny: process {process.pid} writes there; wait" in error
        process.kill()


@posix
def test_the_lock_holds_against_other_processes_and_ends_with_the_block(tmp_path):
    """It is a lockf lock, which a worker that outlives its killed parent does not keep (with flock it would)."""
    with files.sole_process(tmp_path):
        second = subprocess.run(locks(tmp_path), input=b"", capture_output=True, check=False)
    assert second.returncode == 1
    assert b"BlockingIOError" in second.stderr
    assert subprocess.run(locks(tmp_path), input=b"", capture_output=True, check=False).returncode == 0


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    saved = tmp_path / "saved"
    drawn = tmp_path / "drawn"
    for folder in (saved, drawn):
        folder.mkdir()
        (folder / ".cyclegan-77-78.tmp").write_text("half")
        (folder / ".cyclegan-77-0.tmp").write_text("half")
        (folder / "my.tmp").write_text("mine")
    with files.sole_process(saved, drawn):
        assert sorted(path.name for path in saved.iterdir()) == [".lock", "my.tmp"]
        assert sorted(path.name for path in drawn.iterdir()) == ["my.tmp"]


@posix
def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with files.sole_process(tmp_path):
        assert f"warning: {tmp_path} cannot be locked (No locks available)" in capsys.readouterr().err


VALUE = {"nets": {"G": {"w": torch.arange(1000.0)}}, "words": ["a", 1, 2.5, None, True], "pair": (1, 2)}


@pytest.mark.parametrize("in_zip", [True, False])
def test_an_archive_comes_back_as_it_was(tmp_path, in_zip):
    torch.save(VALUE, tmp_path / "x.pt", _use_new_zipfile_serialization=in_zip)
    found = files.read_archive(tmp_path / "x.pt")
    assert torch.equal(found["nets"]["G"]["w"], VALUE["nets"]["G"]["w"])
    assert (found["words"], found["pair"]) == (VALUE["words"], VALUE["pair"])


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_code_in_an_archive_is_never_executed(tmp_path):
    torch.save({"nets": Evil(), "format": 1}, tmp_path / "evil.pt")
    torch.save({"nets": Evil()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "old.pt", "evil.pkl"):
        with pytest.raises(InputError, match="not a readable checkpoint"):
            files.read_archive(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_missing_file_and_a_folder_are_no_archive(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            files.read_archive(path)


def test_damage_is_found_by_the_checksums(tmp_path):
    path = tmp_path / "s.pt"
    torch.save({"nets": {"w": torch.zeros(1000)}}, path)
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.file_size == 4000)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"s\.pt: .*damaged: checksum of {info.filename} is wrong"):
        files.read_archive(path)
    path.write_bytes(data[:1500])
    with pytest.raises(InputError, match="not a readable checkpoint"):
        files.read_archive(path)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def nested(levels, copies=1):
    value = ["x"]
    for _ in range(levels):
        value = [value] * copies
    return value


def zip_bomb():
    """A small archive whose only member unpacks to a thousand times its size."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    return buffer.getvalue()


MORE = "it contains more than a checkpoint does"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(zip_bomb(), "it would unpack to more than its own size", id="zip bomb"),
        pytest.param(saved(nested(60, copies=2)), MORE, id="copies of copies"),
        pytest.param(saved(nested(101)), MORE, id="deep"),
        pytest.param(saved({"format": 10**300}), MORE, id="long number"),
        pytest.param(pickle.dumps({"format": 10**5000}), "", id="longer number"),
        pytest.param(saved(list(range(10**5))), MORE, id="many"),
        pytest.param(b"", "", id="empty"),
        pytest.param(b"x" * 1000, "", id="text"),
    ],
)
def test_archives_that_would_fill_memory_or_time_are_rejected(tmp_path, data, reason):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(InputError, match=rf"x\.pt: not a readable checkpoint .*\({reason}") as error:
        files.read_archive(tmp_path / "x.pt")
    assert len(one_line(error.value)) < 300


def test_ordinary_values_pass_and_values_that_contain_themselves_do_not():
    files.check_values([1, (2, {"a": {3, 4}}), None, 2**128 - 1])
    itself = []
    itself.append(itself)
    for value in (itself, {2**128: 0}):
        with pytest.raises(ValueError, match="more than a checkpoint"):
            files.check_values(value)


@FUZZ
@given(edits=EDITS, in_zip=st.booleans())
def test_damaged_archives_are_read_or_rejected_in_one_line(tmp_path, edits, in_zip):
    path = tmp_path / "x.pt"
    torch.save(VALUE, path, _use_new_zipfile_serialization=in_zip)
    path.write_bytes(edited(path.read_bytes(), edits))
    message = f"{path}: "
    try:
        files.read_archive(path)
    except InputError as error:
        message = one_line(error)
    assert message.startswith(f"{path}: ")
    assert len(message) < 1000


@pytest.fixture
def templates(monkeypatch):
    """Templates as a dict in place of the folder templates/."""
    pages = {}
    monkeypatch.setattr(jinja2, "FileSystemLoader", lambda folder: jinja2.DictLoader(pages))
    return pages


def test_values_are_escaped_in_every_page(templates):
    """File names are a stranger's input."""
    templates["base.html"] = "<h1>{{ title }}</h1>{% block body %}{% endblock %}"
    templates["page.txt"] = (
        '{% extends "base.html" %}{% block body %}<a href="{{ title }}">{{ title }}</a>{% endblock %}'
    )
    page = files.render_page("page.txt", title="<script>alert('1')</script>\"&.png")
    assert "<script>" not in page
    assert page.count("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&#34;&amp;.png") == 3


def test_a_missing_value_is_an_error(templates):
    templates["page.html"] = "{{ title }}{{ sub_title }}"
    with pytest.raises(jinja2.UndefinedError, match="sub_title"):
        files.render_page("page.html", title="a")
