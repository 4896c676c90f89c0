"""Drawing, downloading from a mock server, splitting, checking."""

import errno
import io
import lzma
import os
import signal
import sys
import threading
import types
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import noise_image
from PIL import Image

import prepare
from datasets import domain_names
from toolkit import images, synthetic
from toolkit.images import list_images, read_image


def fails_with(error):
    """A function that only raises."""

    def fail(*_, **__):
        raise error

    return fail


def test_draw_makes_the_whole_set_once(tmp_path, monkeypatch, refused):
    small = {name: (time, first, 3) for name, (time, first, _) in synthetic.DEMO_FOLDERS.items()}
    monkeypatch.setattr("toolkit.synthetic.DEMO_FOLDERS", small)
    prepare.main(["draw", "day2night", "--size", "32"])
    assert [p.name for p in sorted(tmp_path.glob("datasets/*"))] == ["day2night"]
    assert len(list_images(tmp_path / "datasets")) == 12
    drawn = read_image(tmp_path / "datasets/day2night/testB/0002.png")
    assert drawn.size == (32, 32)
    assert drawn.tobytes() == synthetic.draw_scene(200_002, "night", 32).tobytes()
    assert "datasets/day2night" in refused(prepare.main, "draw", "day2night")


@pytest.mark.parametrize(
    ("code", "fail"), [(1, fails_with(OSError(28, "full"))), (143, lambda *_: signal.raise_signal(15))]
)
def test_a_drawing_that_fails_or_is_stopped_leaves_nothing(monkeypatch, code, fail):
    monkeypatch.setattr("toolkit.synthetic.draw_scene", fail)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        prepare.main(["draw", "day2night"])
    assert exit_.value.code == code
    assert list(Path("datasets").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


NAMES = ("set/trainA/1.png", "set/trainB/2.png", "set/testA/3.png")
WHOLE = ["datasets/set/testA/3.png", "datasets/set/trainA/1.png", "datasets/set/trainB/2.png"]


def make_zip(names=NAMES, extra=(), compression=zipfile.ZIP_STORED):
    data = io.BytesIO()
    image = io.BytesIO()
    noise_image(1).save(image, format="PNG")
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name in names:
            archive.writestr(name, image.getvalue())
        for name, content in extra:
            archive.writestr(name, content)
    return data.getvalue()


def flipped(data, offset):
    """A zip with one wrong byte in the first entry's data, at an offset."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = archive.infolist()[0].header_offset + 30 + len(NAMES[0])
    data = bytearray(data)
    data[start + offset] ^= 0xFF
    return bytes(data)


@pytest.fixture
def server():
    """A mock server that answers with state["respond"](handler)."""
    state = {"respond": None, "ranges": []}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state["ranges"].append(self.headers.get("Range"))
            state["respond"](self)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,)).start()
        state["url"] = f"http://127.0.0.1:{http.server_port}/set.zip"
        yield state
        http.shutdown()


def send(data, status=200, claims=None, kind="application/zip"):
    def respond(handler):
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data) if claims is None else claims))
        handler.end_headers()
        handler.wfile.write(data)

    return respond


def with_ranges(data):
    """A server that can continue a download, as real ones do."""

    def respond(handler):
        wanted = handler.headers.get("Range")
        first = int(wanted[6:-1]) if wanted else 0
        if first >= len(data):
            return send(b"", 416)(handler)
        return send(data[first:], 206 if wanted else 200)(handler)

    return respond


def download(server, *argv):
    return ["download", "set", "--url", server["url"], *argv]


def left():
    """The files below the current folder."""
    return sorted(str(p) for p in Path().rglob("*") if p.is_file())


def test_a_data_set_is_unpacked_without_the_files_around_it(server, capsys):
    extra = [("set/readme.txt", "x"), ("__MACOSX/set/trainA/._1.png", "x"), ("set/trainA/run.sh", "x")]
    server["respond"] = send(make_zip(extra=extra))
    prepare.main(download(server))
    assert left() == WHOLE
    assert "1 image in trainA" in capsys.readouterr().out


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_compression_is_unpacked_and_names_with_backslashes_are_paths(server, compression):
    server["respond"] = send(make_zip([name.replace("/", "\\") for name in NAMES], compression=compression))
    prepare.main(download(server))
    assert left() == WHOLE
    assert read_image(Path(WHOLE[0])).tobytes() == noise_image(1).tobytes()


@pytest.mark.parametrize("resumes", [True, False])
def test_a_broken_download_continues_where_it_ended(server, refused, monkeypatch, resumes):
    data = make_zip()
    received = []
    unpack = prepare.unpack
    monkeypatch.setattr(
        prepare, "unpack", lambda part, folder: received.append(part.read_bytes()) or unpack(part, folder)
    )
    server["respond"] = send(data[:100], claims=len(data))
    assert server["url"] in refused(prepare.main, *download(server), code=1)
    assert left() == ["datasets/.set.zip.part"]
    server["respond"] = with_ranges(data) if resumes else send(data)
    prepare.main(download(server))
    assert server["ranges"] == [None, "bytes=100-"]
    assert received == [data]
    assert left() == WHOLE


def link_entry():
    link = zipfile.ZipInfo("set/trainA/link.png")
    link.external_attr = 0o120777 << 16
    return link


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (send(b"gone", 404), "404"),
        (send(b"later", 503), "503"),
        (send(b"<html>please log in</html>", kind="text/html"), "set.zip"),
        (send(make_zip()[:-30]), "set.zip"),
        (send(make_zip(), claims=50), "set.zip"),  # a wrong length: the rest is never read
        (send(make_zip(extra=[("../../evil.png", "x")])), "../../evil.png"),
        (send(make_zip(extra=[("/tmp/evil.png", "x")])), "/tmp/evil.png"),
        (send(make_zip(extra=[("set\\..\\..\\evil.png", "x")])), "set\\..\\..\\evil.png"),
        (send(make_zip(names=["set/photos/1.png"])), "trainA"),
        (send(make_zip(extra=[(link_entry(), "/etc/passwd")])), "set/trainA/link.png"),
    ],
)
def test_wrong_answers_end_in_one_line_and_leave_nothing(server, refused, response, expected):
    server["respond"] = response
    assert expected in refused(prepare.main, *download(server))
    assert left() == []
    assert not Path("../evil.png").exists()
    assert not Path("/tmp/evil.png").exists()


LONG = f"set/trainA/{'a' * 300}.png"


def bad_utf8():
    data = make_zip(extra=[("set/trainA/é.png", "x")])
    assert data.count("é".encode()) == 2
    return data.replace("é".encode(), b"\xff\xa9")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(flipped(make_zip(compression=zipfile.ZIP_DEFLATED), 0), id="deflate"),
        pytest.param(flipped(make_zip(compression=zipfile.ZIP_LZMA), 9), id="lzma"),
        pytest.param(flipped(make_zip(compression=zipfile.ZIP_BZIP2), 0), id="bz2"),
        pytest.param(flipped(make_zip(), 50), id="checksum"),
        pytest.param(bad_utf8(), id="bad UTF-8 name"),
        pytest.param(make_zip(extra=[(LONG, "x")]), id="overlong name"),
        pytest.param(make_zip(extra=[("set/trainA/1.png/4.png", "x")]), id="file where a folder is needed"),
        pytest.param(make_zip(["set/trainA/1.png/4.png", *NAMES]), id="folder where a file is needed"),
    ],
)
def test_a_zip_that_cannot_be_unpacked_is_deleted_and_the_next_attempt_starts_again(server, refused, data):
    server["respond"] = send(data)
    assert server["url"] in refused(prepare.main, *download(server))
    assert left() == []
    server["respond"] = with_ranges(make_zip())
    prepare.main(download(server))
    assert server["ranges"] == [None, None]
    assert left() == WHOLE


@pytest.mark.parametrize(
    "error", [MemoryError(), lzma.LZMAError("Corrupt input data"), PermissionError(errno.EACCES, "denied"), KeyError(1)]
)
def test_whatever_unpacking_raises_the_download_is_deleted(server, refused, monkeypatch, error):
    server["respond"] = send(make_zip())
    monkeypatch.setattr(prepare, "unpack", fails_with(error))
    assert server["url"] in refused(prepare.main, *download(server))
    assert left() == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
    ],
)
def test_a_full_disk_and_a_stop_keep_the_download(server, monkeypatch, error, code):
    data = make_zip()
    server["respond"] = send(data)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "unpack", fails_with(error))
        with pytest.raises(SystemExit) as exit_:
            prepare.main(download(server))
    assert exit_.value.code == code
    assert left() == ["datasets/.set.zip.part"]
    server["respond"] = with_ranges(data)
    prepare.main(download(server))
    assert server["ranges"] == [None, f"bytes={len(data)}-"]
    assert left() == WHOLE


def test_a_zip_that_does_not_fit_on_the_disk_or_claims_too_much_is_not_fetched_or_unpacked(
    server, refused, monkeypatch
):
    data = make_zip()
    server["respond"] = send(data)
    free = {"datasets": len(data) - 1}
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free.get(str(path), 9)))
        assert "datasets: no space for 0 MB; free some" in refused(prepare.main, *download(server), code=1)
        assert left() == []
        free["datasets"] = len(data)
        assert "datasets/.set.zip.part: no space" in refused(prepare.main, *download(server), code=1)
        assert left() == ["datasets/.set.zip.part"]
    monkeypatch.setattr(prepare, "MOST_BYTES", 1000)
    assert "set.zip: sent no usable zip (claims" in refused(prepare.main, *download(server))
    assert left() == []


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["download", "cat2dog"], "cat2dog: no official set; expected one of ae_photos, "),
        (["download", "x", "--url", "file:///etc/passwd"], "--url file:///etc/passwd"),
        (["download", "l", "--url", "http://[bad"], "http://[bad"),
        (["download", "l", "--url", "http://host:port/x.zip"], "http://host:port/x.zip"),
        (["download", "l", "--url", "http:///x.zip"], "http:///x.zip"),
        (["download", "set", "--url", "http://127.0.0.1:9/set.zip"], "draw day2night"),
        (["download", "../x"], "'../x'"),
    ],
)
def test_wrong_names_and_addresses_are_refused_in_one_line(refused, argv, expected):
    assert expected in refused(prepare.main, *argv)
    assert left() == []


def test_an_official_data_set_is_downloaded_from_the_authors(monkeypatch):
    fetched = []
    monkeypatch.setattr(prepare, "fetch", lambda url, part: fetched.append(url) or part.write_bytes(make_zip()))
    prepare.main(["download", "horse2zebra"])
    assert fetched == [f"{prepare.ADDRESS}/horse2zebra.zip"]
    assert len(left()) == 3


def two_folders(tmp_path, counts=(10, 7)):
    for name, count in zip(("faces", "drawings"), counts, strict=True):
        (tmp_path / name / "more").mkdir(parents=True)
        for i in range(count):
            noise_image(f"{name}{i}").save(tmp_path / name / ("more" if i % 2 else ".") / f"{i}.png")
    return ["split", "--A", str(tmp_path / "faces"), "--B", str(tmp_path / "drawings"), "--dataset_name", "f2d"]


def test_split_makes_the_layout_from_two_folders(tmp_path):
    prepare.main([*two_folders(tmp_path), "--test_fraction", "0.2"])
    root = tmp_path / "datasets" / "f2d"
    counts = {split: len(list_images(root / split)) for split in ("trainA", "trainB", "testA", "testB")}
    assert counts == {"trainA": 8, "trainB": 5, "testA": 2, "testB": 2}
    for domain, source in (("A", "faces"), ("B", "drawings")):
        copied = {p.read_bytes() for part in ("train", "test") for p in list_images(root / f"{part}{domain}")}
        assert copied == {p.read_bytes() for p in list_images(tmp_path / source)}  # nothing lost, nothing in both
    assert domain_names(root) == ("faces", "drawings")


@pytest.mark.parametrize(("seed", "names"), [("0", ["8.png", "1.png", "9.png"]), ("4", ["4.png", "3.png", "5.png"])])
def test_the_seed_chooses_the_test_images_as_in_earlier_versions(tmp_path, seed, names):
    prepare.main([*two_folders(tmp_path), "--test_fraction", "0.3", "--seed", seed])
    assert [path.name for path in list_images(Path("datasets/f2d/testA"))] == names


@pytest.mark.parametrize(
    ("counts", "flags", "trains", "tests"),
    [
        ((10, 7), ("--max_images", "4", "--test_fraction", "0.5"), 2, 2),
        ((2, 2), ("--test_fraction", "0.9"), 1, 1),  # at least one to train
        ((2, 2), ("--test_fraction", "0"), 2, 0),
    ],
)
def test_split_divides_as_many_images_as_wanted(tmp_path, counts, flags, trains, tests):
    prepare.main([*two_folders(tmp_path, counts), *flags])
    for name, count in (("trainA", trains), ("trainB", trains), ("testA", tests), ("testB", tests)):
        assert len(list_images(tmp_path / "datasets/f2d" / name)) == count


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--A", "empty"), "--A empty: no image inside; expected "),
        (("--A", "gone"), "--A gone: no such folder; expected "),
        (("--B", "faces/more"), "--B faces/more: the same folder, or one in the other"),
        (("--B", "faces"), "the same folder"),
        (("--dataset_name", "../../elsewhere"), "--dataset_name"),
        (("--test_fraction", "1.5"), "--test_fraction"),
        (("--max_megapixels", "0.0003"), "faces: "),  # 20x18 px are more
    ],
)
def test_split_refuses_in_one_line_and_leaves_nothing(tmp_path, refused, flags, expected):
    argv = two_folders(tmp_path)
    for name, count in (("empty", 0), ("single", 1)):
        Path(name).mkdir()
        for i in range(count):
            noise_image(i).save(Path(name, f"{i}.png"))
    assert expected in refused(prepare.main, *argv, *flags)
    assert not list(Path().glob("datasets/*"))


@pytest.mark.parametrize("other", ["empty", "gone"])
def test_both_folders_of_a_split_are_checked_before_an_image_is_read(tmp_path, refused, monkeypatch, other):
    Path("empty").mkdir()
    monkeypatch.setattr(images, "read_image", fails_with(AssertionError("an image was read")))
    assert f"--B {other}: no " in refused(prepare.main, *two_folders(tmp_path), "--B", other)


def test_a_split_that_fails_leaves_nothing(tmp_path, refused, monkeypatch):
    argv = two_folders(tmp_path)
    monkeypatch.setattr(prepare.shutil, "copyfile", fails_with(OSError(28, "disk full")))
    assert "disk full" in refused(prepare.main, *argv, code=1)
    assert list(Path("datasets").iterdir()) == []


def half_a_photo(path):
    """Write half of a JPEG; its header is intact."""
    data = io.BytesIO()
    noise_image(1, (64, 64)).save(data, format="JPEG")
    path.write_bytes(data.getvalue()[: len(data.getvalue()) // 2])


def test_split_names_and_skips_images_that_are_incomplete_and_refuses_too_many(tmp_path, capsys, refused):
    argv = two_folders(tmp_path, (40, 7))
    (tmp_path / "faces" / "torn.png").write_bytes(b"torn")
    half_a_photo(tmp_path / "faces" / "half.jpg")
    prepare.main(argv)
    named = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines() if line.startswith("skipped, ")]
    assert sorted(line.split(" (")[0] for line in named) == [f"{tmp_path}/faces/half.jpg", f"{tmp_path}/faces/torn.png"]
    assert not [path for path in left() if path.startswith("datasets") and path.endswith(("torn.png", "half.jpg"))]
    half_a_photo(tmp_path / "faces" / "another.jpg")
    error = refused(prepare.main, *argv[:-1], "again")
    assert f"{tmp_path / 'faces'}: 3 or more of 43 images are unreadable" in error
    assert not Path("datasets/again").exists()


def test_an_existing_data_set_is_refused_before_anything_is_read(tmp_path, refused, server, monkeypatch):
    Path("datasets/f2d").mkdir(parents=True)
    monkeypatch.setattr(images, "read_image", fails_with(AssertionError("an image was read")))
    assert "datasets/f2d: exists already" in refused(prepare.main, *two_folders(tmp_path))
    assert "datasets/f2d: exists already" in refused(prepare.main, "download", "f2d", "--url", server["url"])
    assert server["ranges"] == []


def test_check_counts_measures_and_finds_leaks(tiny, capsys):
    (tiny / "testA" / "copy.png").write_bytes((tiny / "trainA" / "0.png").read_bytes())
    (tiny / "testB" / "twin.png").write_bytes((tiny / "testB" / "0.png").read_bytes())
    (tiny / "trainB" / "torn.png").write_bytes(b"torn")
    noise_image(1, (40, 30)).save(tiny / "trainB" / "large.png")
    prepare.main(["check", "tiny", "--sheet"])
    out = capsys.readouterr().out
    assert "trainA: 5 images, 0 unreadable; 5 of 20x18 px" in out
    assert "trainB: 6 images, 1 unreadable; 4 of 20x18, 1 of 40x30 px" in out
    assert "trainB/torn.png (" in out
    assert "trainA/0.png = testA/copy.png" in out
    assert "images that occur more than once: 2; in train and also in test or val: 1" in out
    assert "--remove_twins" in out
    sheet = read_image(tiny.parents[1] / "generated_images/tiny/check.png")
    assert sheet.width > 1000


def test_check_prints_the_most_common_sizes_and_counts_the_others(tiny, capsys):
    (tiny / "valA").mkdir()
    for width in range(31, 36):
        noise_image(width, (width, 30)).save(tiny / "valA" / f"{width}.png")
    for path in list_images(tiny / "testA"):  # not trained on
        path.write_bytes(b"torn")
    prepare.main(["check", "tiny", "--max_megapixels", "0.001"])
    out = capsys.readouterr().out
    assert "valA: 5 images, 2 unreadable; 1 of 31x30, 1 of 32x30, 1 of 33x30 px" in out
    assert "testA: 2 images, 2 unreadable; nothing readable px" in out
    prepare.main(["check", "tiny"])
    assert "1 of 33x30, 2 other sizes px" in capsys.readouterr().out
    assert not Path("generated_images").exists()


def test_check_refuses_what_cannot_be_trained_on(tiny, refused):
    error = refused(prepare.main, "check", "tinny")
    assert "datasets/tinny" in error
    assert ": tiny;" in error
    for path in list_images(tiny / "trainB")[:3]:
        path.write_bytes(b"torn")
    assert "3 of 4 images in trainB " in refused(prepare.main, "check", "tiny")
    for path in list_images(tiny):
        path.write_bytes(b"torn")
    assert "trainB holds no readable image" in refused(prepare.main, "check", "tiny", "--sheet")
    assert not Path("generated_images").exists()
    for path in list_images(tiny / "trainB"):
        path.unlink()
    assert "datasets/tiny/trainB" in refused(prepare.main, "check", "tiny")
    (tiny / "trainB").rmdir()
    assert "datasets/tiny: no trainB/ inside (found: testA, testB, trainA)" in refused(prepare.main, "check", "tiny")


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        ([], "prepare.py"),
        (["draw", "night2day"], "night2day"),
        (["draw", "day2night", "--size", "8"], "--size"),
        (["split", "--A", "", "--B", "x", "--dataset_name", "y"], "--A"),
        (["split", "--A", "x", "--B", "y"], "--dataset_name"),
        (["check", "tiny", "--sheets"], "--sheets"),
        (["check", "tiny", "--max_megapixels", "0"], "--max_megapixels"),
    ],
)
def test_wrong_flags_are_named(refused, argv, flag):
    assert flag in refused(prepare.main, *argv)


def test_data_sets_may_be_elsewhere(tmp_path, monkeypatch):
    assert prepare.parse_args(["check", "x"]).data_root == Path("datasets")
    prepare.main([*two_folders(tmp_path), "--data_root", "else where"])
    assert len(list_images(Path("else where/f2d"))) == 17
    prepare.main(["check", "f2d", "--data_root", "else where"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that allows any bytes in names")
def test_names_that_are_not_valid_text_are_split_and_checked(tmp_path, capsys):
    argv = two_folders(tmp_path)
    (tmp_path / "faces" / "0.png").rename(tmp_path / "faces" / os.fsdecode(b"\xff.png"))
    prepare.main(argv)
    prepare.main(["check", "f2d", "--sheet"])
    assert "trainA: 9 images, 0 unreadable" in capsys.readouterr().out


def draw_pair(path, seed, mode="RGB"):
    """Two images of noise side by side; returns them."""
    halves = [noise_image(f"{seed}{side}", (6, 5), mode) for side in "lr"]
    pair = Image.new(mode, (12, 5))
    pair.paste(halves[0], (0, 0))
    pair.paste(halves[1], (6, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    pair.save(path)
    return halves


@pytest.mark.parametrize("sides", ["AB", "BA"])
def test_pairs_side_by_side_are_cut_and_keep_their_split(tmp_path, sides):
    drawn = {kind: draw_pair(tmp_path / "both" / kind / "sub/1.png", kind) for kind in ("train", "val", "test")}
    prepare.main(["split", "--pairs", str(tmp_path / "both"), "--sides", sides, "--dataset_name", "cut"])
    for kind, halves in drawn.items():
        for domain, half in zip(sides, halves, strict=True):
            with Image.open(f"datasets/cut/{kind}{domain}/sub/1.png") as found:
                assert found.tobytes() == half.tobytes()


def test_pairs_without_a_split_are_divided_by_chance_and_stay_pairs(tmp_path):
    drawn = {f"{i}.png": draw_pair(tmp_path / "both" / f"{i}.png", i) for i in range(10)}
    deep = np.arange(60, dtype=np.uint16).reshape(5, 12) * 500
    Image.fromarray(deep).save(tmp_path / "both/deep.png")
    prepare.main(["split", "--pairs", str(tmp_path / "both"), "--test_fraction", "0.3", "--dataset_name", "cut"])
    root = Path("datasets/cut")
    for split, count in (("train", 7), ("test", 4)):
        names = [sorted(path.name for path in (root / f"{split}{domain}").iterdir()) for domain in "AB"]
        assert names[0] == names[1]
        assert len(names[0]) == count
    for name, halves in drawn.items():
        for domain, half in zip("AB", halves, strict=True):
            (path,) = root.glob(f"*{domain}/{name}")
            with Image.open(path) as found:
                assert found.tobytes() == half.tobytes()
    (left,) = root.glob("*A/deep.tif")
    with Image.open(left) as found:
        assert np.array_equal(np.asarray(found), deep[:, :6])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--pairs", "none"], "--pairs none: no such folder"),
        (["--pairs", "empty"], "--pairs empty: no image inside"),
        (["--pairs", "empty", "--A", "x", "--B", "y"], "--pairs contradicts --A and --B"),
        (["--A", "x"], "needs --A and --B, or --pairs alone"),
    ],
)
def test_wrong_sources_of_a_split_are_refused(refused, argv, expected):
    Path("empty").mkdir()
    assert expected in refused(prepare.main, "split", *argv, "--dataset_name", "cut")
    assert not Path("datasets/cut").exists()
