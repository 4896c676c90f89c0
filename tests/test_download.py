"""datasets.py download, against a server on this machine that also misbehaves."""

import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import noise_picture

import datasets


def make_zip(names=("set/trainA/1.png", "set/trainB/2.png", "set/testA/3.png"), extra=()):
    data, picture = io.BytesIO(), io.BytesIO()
    noise_picture(1).save(picture, format="PNG")
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, picture.getvalue())
        for name, content in extra:
            archive.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def server():
    """Serve `answer(handler)`; returns what is to be set, and the address."""
    place = {"answer": None, "asked": []}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            place["asked"].append(self.headers.get("Range"))
            place["answer"](self)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        place["url"] = f"http://127.0.0.1:{http.server_port}/set.zip"
        yield place
        http.shutdown()
        thread.join()


def send(data, status=200, claims=None, kind="application/zip"):
    def answer(handler):
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data) if claims is None else claims))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def with_ranges(data):
    """A server that can go on, as real ones do."""

    def answer(handler):
        asked = handler.headers.get("Range")
        first = int(asked[6:-1]) if asked else 0
        if first >= len(data):
            return send(b"", 416)(handler)
        return send(data[first:], 206 if asked else 200)(handler)

    return answer


def download(server, *argv):
    return ["download", "set", "--url", server["url"], *argv]


def left():
    """What stands below the current folder; nothing may ever be written beside it."""
    return sorted(str(p) for p in Path().rglob("*") if p.is_file())


def test_a_set_arrives_whole_without_what_lies_around_it(server, capsys):
    extra = [("set/readme.txt", "x"), ("__MACOSX/set/trainA/._1.png", "x"), ("set/trainA/run.sh", "x")]
    server["answer"] = send(make_zip(extra=extra))
    datasets.main(download(server))
    assert left() == ["datasets/set/testA/3.png", "datasets/set/trainA/1.png", "datasets/set/trainB/2.png"]
    assert "1 pictures in trainA" in capsys.readouterr().out


@pytest.mark.parametrize("resumes", [True, False])
def test_a_broken_download_goes_on_where_it_ended(server, refused, resumes):
    data = make_zip()
    server["answer"] = send(data[:100], claims=len(data))
    assert "run it again to go on" in refused(datasets.main, *download(server), code=1)
    assert left() == ["datasets/.set.zip.part"]
    server["answer"] = with_ranges(data) if resumes else send(data)
    datasets.main(download(server))
    assert server["asked"] == [None, "bytes=100-"]
    assert left() == ["datasets/set/testA/3.png", "datasets/set/trainA/1.png", "datasets/set/trainB/2.png"]


def test_a_download_that_was_whole_already_is_not_fetched_again(server):
    data = make_zip()
    Path("datasets").mkdir()
    Path("datasets/.set.zip.part").write_bytes(data)
    server["answer"] = with_ranges(data)
    datasets.main(download(server))
    assert len(left()) == 3


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (send(b"gone", 404), "the server answers 404"),
        (send(b"later", 503), "the server answers 503"),
        (send(b"<html>please log in</html>", kind="text/html"), "sent no whole zip"),
        (send(make_zip()[:-30]), "sent no whole zip"),
        (send(make_zip(), claims=50), "sent no whole zip"),  # a length that lies: the rest is never read
        (send(make_zip(extra=[("../../evil.png", "x")])), "wants to write outside"),
        (send(make_zip(extra=[("/tmp/evil.png", "x")])), "wants to write outside"),
        (send(make_zip(extra=[("set\\..\\..\\evil.png", "x")])), "wants to write outside"),
        (send(make_zip(names=["set/photos/1.png"])), "no trainA and trainB"),
    ],
)
def test_servers_that_misbehave_end_in_one_line_and_leave_nothing(server, refused, answer, words):
    server["answer"] = answer
    assert words in refused(datasets.main, *download(server))
    assert left() == []
    assert not Path("../evil.png").exists()
    assert not Path("/tmp/evil.png").exists()


def test_links_and_bombs_are_not_unpacked(server, refused, monkeypatch):
    link = zipfile.ZipInfo("set/trainA/link.png")
    link.external_attr = 0o120777 << 16
    server["answer"] = send(make_zip(extra=[(link, "/etc/passwd")]))
    assert "wants to write outside" in refused(datasets.main, *download(server))
    monkeypatch.setattr(datasets, "MOST_BYTES", 1000)
    server["answer"] = send(make_zip())
    assert "more than fit; not unpacked" in refused(datasets.main, *download(server))
    assert left() == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["download", "cat2dog"], "no official set; expected one of ae_photos"),
        (["download", "x", "--url", "file:///etc/passwd"], "begins with http"),
        (["download", "set", "--url", "http://127.0.0.1:9/set.zip"], "draw day2night"),
    ],
)
def test_wrong_names_addresses_and_no_connection(refused, argv, words):
    assert words in refused(datasets.main, *argv)
    assert left() == []


def test_an_existing_set_is_never_touched(server, refused, tiny):
    before = left()
    assert "exists already" in refused(datasets.main, "download", "tiny", "--url", server["url"])
    assert (left(), server["asked"]) == (before, [])
