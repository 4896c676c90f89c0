import functools
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image

import app
import test as test_stage
from models import GeneratorConfig, build_generator
from toolkit import images
from toolkit.converters import to_junyanz
from toolkit.weights import save_generator
from utils import InputError

ROOT = Path(app.__file__).parent
EXACT = ["--device", "cpu", "--precision", "fp32"]


def write_run(name="tiny", directions=("AtoB", "BtoA"), first_seed=0, step=None, **lesson):
    """Generators of a run, and of a student the flags that say so."""
    folder = Path("saved_models", name)
    folder.mkdir(parents=True)
    for seed, direction in enumerate(directions, first_seed):
        torch.manual_seed(seed)
        net = build_generator(GeneratorConfig(ngf=4, num_residual=1), "kaiming")
        file = folder / f"G_{direction[0]}{direction[-1]}.safetensors"
        save_generator(file, net, {"direction": direction, "size": [16, 24], "dataset_name": "tiny", "step": step})
    if lesson:
        (folder / "run.json").write_text(json.dumps({"flags": lesson}))
    return net


def opened(name="tiny", *flags):
    return app.open_run(app.parse_args([*EXACT, *flags]), name)


@pytest.fixture
def photo():
    noise_image(3, (30, 20)).save("photo.png")
    return Path("photo.png")


def pixels(image):
    return np.asarray(image).astype(int)


def test_a_photo_is_translated_as_test_py_does_it(photo):
    write_run()
    image, fake, rec = app.translate(opened(), "BtoA", photo)
    test_stage.main(["--run_name", "tiny", "--input", "photo.png", "--direction", "BtoA", "--round_trip", *EXACT])
    for shown, folder in ((image, "real_B"), (fake, "fake_A"), (rec, "rec_B")):
        written = Image.open(f"generated_images/tiny/test/{folder}/photo.png")
        assert shown.size == (30, 20)
        assert np.array_equal(pixels(shown), pixels(written))
    assert not np.array_equal(pixels(fake), pixels(app.translate(opened(), "AtoB", photo)[1]))


def test_a_run_that_goes_on_training_shows_its_newest_weights(photo):
    net = write_run()
    before = pixels(app.translate(opened(), "BtoA", photo)[1])
    assert opened() is opened()
    torch.nn.init.zeros_(net.head[1].weight)
    save_generator(Path("saved_models/tiny/G_BA.safetensors"), net, {"direction": "BtoA", "size": [16, 24]})
    assert not np.array_equal(pixels(app.translate(opened(), "BtoA", photo)[1]), before)


def test_one_generator_file_has_no_round_trip(photo):
    net = write_run()
    torch.save(to_junyanz(net), "latest_net_G_A.pth")
    translator = opened(None, "--weights", "latest_net_G_A.pth")
    _, fake, rec = app.translate(translator, "AtoB", photo)
    assert (fake.size, rec) == ((30, 20), None)
    assert translator.size == (256, 256)  # not recorded in such files
    with pytest.raises(InputError, match="translate AtoB only"):
        app.translate(translator, "BtoA", photo)


def test_without_a_run_the_app_says_how_to_train_one():
    assert app.find_runs() == []
    with pytest.raises(InputError, match=r"saved_models.*--weights examples.*python train\.py"):
        opened(None)


def test_uploads_that_are_no_image_or_too_large_get_one_line(photo, monkeypatch):
    write_run()
    Path("bad.png").write_text("hello")
    with pytest.raises(InputError, match=r"^bad\.png: [^/]*cannot identify[^/]*PNG or JPEG$"):
        app.translate(opened(), "AtoB", Path("bad.png").resolve())
    monkeypatch.setattr(images, "max_pixels", 100)
    with pytest.raises(InputError, match="30x20 px"):
        app.translate(opened(), "AtoB", photo)


def test_a_batch_becomes_a_zip_and_what_is_no_image_is_named(photo):
    write_run()
    Path("bad.png").write_text("hello")
    for name in ("x/photo.jpg", "y/Photo.png"):
        Path(name).parent.mkdir()
        noise_image(name, (12, 40)).save(name)
    faults = app.translate_batch(
        opened(), "AtoB", map(Path, ("photo.png", "bad.png", "x/photo.jpg", "y/Photo.png")), Path("out.zip")
    )
    assert [fault.split(":")[0] for fault in faults] == ["bad.png"]
    with zipfile.ZipFile("out.zip") as archive:
        names = archive.namelist()
        sizes = [Image.open(io.BytesIO(archive.read(name))).size for name in names]
        first = Image.open(io.BytesIO(archive.read(names[0])))
    assert names == ["fake_B/photo.png", "fake_B/photo_.png", "fake_B/Photo__.png"]
    assert sizes == [(30, 20), (12, 40), (12, 40)]
    assert np.array_equal(pixels(first), pixels(app.translate(opened(), "AtoB", photo)[1]))
    for paths, words in (([], "no file given"), ([Path("bad.png")], r"^bad\.png")):
        with pytest.raises(InputError, match=words):
            app.translate_batch(opened(), "AtoB", paths, Path("none.zip"))
        assert not Path("none.zip").exists()


def test_each_call_writes_a_zip_of_its_own(photo):
    pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-app.txt")
    write_run()
    Path("zips").mkdir()
    args = app.parse_args(EXACT)
    noise_image(1).save("other.png")
    names = ("photo.png", "other.png")
    packed = [app.pack(args, Path("zips"), "tiny", "AtoB", "train", [name, "bad.png"]) for name in names]
    for (path, faults), name in zip(packed, names, strict=True):
        with zipfile.ZipFile(path) as archive:
            assert archive.namelist() == [f"fake_B/{name}"]
        assert "left out: bad.png" in faults
        assert len(Path(path).parent.name) >= 40
    with pytest.raises(InputError, match="no file given"):
        app.pack(args, Path("zips"), "tiny", "AtoB", "train", None)
    assert len(list(Path("zips").rglob("*.*"))) == 2


def at_once(call, questions, rounds=3):
    """What a function answers to several clients who ask in the same moment, by question."""
    start = threading.Barrier(len(questions))

    def ask(question):
        start.wait(10)
        return call(*question)

    answers = {question: [] for question in questions}
    with ThreadPoolExecutor(len(questions)) as clients:
        for _ in range(rounds):
            for question, answer in zip(questions, clients.map(ask, questions), strict=True):
                answers[question].append(answer)
    return answers


QUESTIONS = [  # run, direction, scale, photo: two clients who differ in all, and two in one thing each
    ("teacher", "AtoB", "train", "photo.png"),
    ("thin", "BtoA", "native", "other.png"),
    ("teacher", "BtoA", "train", "photo.png"),
    ("teacher", "AtoB", "train", "other.png"),
]


@pytest.fixture
def two_clients(photo):
    """Two runs, teacher and student, and two photos; returns the flags of the app."""
    pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-app.txt")
    noise_image(4, (40, 28)).save("other.png")
    write_run("teacher", step=20)
    write_run("thin", first_seed=5, step=10, teacher="teacher", direction="both")
    app.load_translator.cache_clear()  # the first clients of all load the networks at once, too
    return app.parse_args(EXACT)


def test_clients_who_translate_at_once_get_each_their_own_images(two_clients):
    answers = at_once(functools.partial(app.show, two_clients), QUESTIONS)
    for (run_name, direction, scale, photo), given in answers.items():
        expected = app.translate(app.open_run(two_clients, run_name, scale), direction, Path(photo))
        relatives = [app.open_run(two_clients, name, scale) for name in ("teacher", "thin")]
        beside = [app.translate(relative, direction, Path(photo))[1] for relative in relatives]
        for fake, rec, (image, after), gallery in given:
            shown = (image, fake, rec)
            assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(shown, expected, strict=True))
            assert np.array_equal(pixels(after), pixels(fake))
            assert [caption.split(":")[0] for _, caption in gallery["value"]] == ["teacher", "thin"]
            for (relative, _), wanted in zip(gallery["value"], beside, strict=True):
                assert np.array_equal(pixels(relative), pixels(wanted))


def test_clients_who_pack_at_once_get_each_their_own_zip(two_clients):
    Path("zips").mkdir()

    def pack(run_name, direction, scale, photo):
        return app.pack(two_clients, Path("zips"), run_name, direction, scale, [photo])[0]

    answers = at_once(pack, QUESTIONS)
    assert len({path for paths in answers.values() for path in paths}) == 3 * len(QUESTIONS)
    for (run_name, direction, scale, photo), paths in answers.items():
        _, fake, _ = app.translate(app.open_run(two_clients, run_name, scale), direction, Path(photo))
        for path in paths:
            with zipfile.ZipFile(path) as archive:
                (name,) = archive.namelist()
                assert name == f"fake_{direction[-1]}/{photo}"
                assert np.array_equal(pixels(Image.open(io.BytesIO(archive.read(name)))), pixels(fake))


def test_clients_who_load_the_page_while_another_is_served_see_all_runs(two_clients):
    def load_or_translate(what):
        if what == "show":
            return app.show(two_clients, *QUESTIONS[0])
        return app.refresh(two_clients)

    for notice, runs in at_once(load_or_translate, [("refresh",), ("refresh again",), ("show",)])[("refresh",)]:
        assert not notice.visible
        assert [name for name, _ in runs.choices] == ["teacher", "thin"]
        assert runs.value == "teacher"


def test_the_page_opens_the_run_that_was_trained_longest():
    for name, step in (("long", 4800), ("short", 20), ("unsaid", None)):
        write_run(name, step=step)
    write_run("damaged")
    for path in Path("saved_models/damaged").iterdir():
        path.write_bytes(b"no weights")
    times = {"long": 1, "short": 4, "unsaid": 2, "damaged": 3}
    for path in Path("saved_models").glob("*/*"):
        os.utime(path, (times[path.parent.name],) * 2)
    assert app.find_runs() == ["long", "short", "damaged", "unsaid"]
    assert app.find_runs("AtoB") == ["long", "short", "damaged", "unsaid"]


def test_at_its_own_size_a_photo_is_translated_as_by_the_native_scale_of_test_py(photo):
    write_run()
    fake = app.translate(opened(), "AtoB", photo)[1]
    native = app.translate(app.open_run(app.parse_args(EXACT), "tiny", "native"), "AtoB", photo)[1]
    argv = ["--run_name", "tiny", "--input", "photo.png", "--direction", "AtoB", "--scale", "native", *EXACT]
    test_stage.main(argv)
    assert np.array_equal(pixels(native), pixels(Image.open("generated_images/tiny/test/fake_B/photo.png")))
    assert not np.array_equal(pixels(native), pixels(fake))


def test_at_its_own_size_a_large_photo_comes_in_tiles_and_is_timed_once(monkeypatch):
    write_run()
    monkeypatch.setattr(app, "TILE", 32)
    app.load_translator.cache_clear()
    noise_image(1, (70, 40)).save("large.png")
    translator = app.open_run(app.parse_args(EXACT), "tiny", "native")
    sizes = []
    for net in translator.nets.values():
        net.register_forward_hook(lambda net, inputs, output: sizes.append(max(output.shape[-2:])))
    ((image, caption),) = app.compare({"tiny": translator}, "AtoB", Path("large.png"))
    assert image.size == (70, 40)
    assert 16 < max(sizes) <= 32
    assert len(sizes) == 3 * 2  # tiles; the pass before them ends at the last norm
    assert float(caption.split()[1]) > 0
    app.load_translator.cache_clear()


def test_a_network_that_takes_large_images_whole_is_timed_by_several_passes(monkeypatch):
    write_run()
    monkeypatch.setattr(app, "TILE", 8)  # below the size of the training
    noise_image(1, (40, 40)).save("large.png")
    translator = opened()
    passes = []
    translator.nets["G_AB"].register_forward_hook(lambda net, inputs, output: passes.append(output.shape))
    app.compare({"tiny": translator}, "AtoB", Path("large.png"))
    assert len(passes) > app.REPEATS  # with those that warm up


def test_a_name_that_leads_out_of_the_folder_of_runs_is_refused(photo):
    write_run()
    shutil.copytree("saved_models/tiny", "elsewhere")
    with pytest.raises(InputError, match=r"\.\./elsewhere"):
        opened("../elsewhere")


def test_networks_that_do_not_fit_together_are_one_line_in_the_page(photo):
    write_run()
    net = build_generator(GeneratorConfig(ngf=4, num_residual=1, channels=1))
    save_generator(Path("saved_models/tiny/G_BA.safetensors"), net, {"direction": "BtoA", "size": [16, 24]})
    with pytest.raises(InputError, match=r"saved_models/tiny: .*channels"):
        opened()


def test_teacher_and_students_stand_beside_each_other_with_milliseconds(photo):
    for name in ("alone", "teacher"):
        write_run(name)
    write_run("thin", teacher="teacher", direction="BtoA")
    write_run("both", teacher="saved_models/teacher/epoch_0001.pt", direction="both")
    write_run("orphan", teacher="gone", direction="AtoB")
    write_run("one_way", ("BtoA",), teacher="teacher", direction="AtoB")
    for name, text in (("broken", '{"flags": 3'), ("deep", "[" * 10**5)):
        write_run(name)
        Path(f"saved_models/{name}/run.json").write_text(text)
    for run_name in ("teacher", "thin", "both"):
        assert app.family(run_name, "BtoA")[0] == "teacher"
        assert sorted(app.family(run_name, "BtoA")) == ["both", "teacher", "thin"]
    assert app.family("teacher", "AtoB") == ["teacher", "both"]
    for run_name, direction in (
        ("thin", "AtoB"),
        ("alone", "AtoB"),
        ("orphan", "AtoB"),
        ("broken", "BtoA"),
        ("deep", "AtoB"),
    ):
        assert app.family(run_name, direction) == [run_name]
    shown = app.compare({name: opened(name) for name in app.family("both", "AtoB")}, "AtoB", photo)
    assert [caption.split(":")[0] for _, caption in shown] == ["teacher", "both"]
    assert all(float(caption.split()[1]) > 0 and " ms, 0.0" in caption for _, caption in shown)
    assert np.array_equal(pixels(shown[0][0]), pixels(app.translate(opened("teacher"), "AtoB", photo)[1]))


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_taken_port_and_a_strange_address_are_refused_in_one_line(refused):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        words = refused(app.main, "--port", port)
        assert f"--port {port}: Address already in use" in words
        assert "such as --port" in words
    assert "--host 203.0.113.7" in refused(app.main, "--host", "203.0.113.7")
    assert "--port" in refused(app.main, "--port", 70000)
    assert "--max_mb" in refused(app.main, "--max_mb", 0)


def test_a_missing_gradio_is_named_with_the_command_that_installs_it(refused, monkeypatch, free_port):
    monkeypatch.setitem(sys.modules, "gradio", None)
    words = refused(app.main, "--port", free_port)
    assert "gradio" in words
    assert "pip install -r requirements-app.txt" in words


def test_only_this_machine_is_let_in_unless_asked_otherwise():
    assert app.parse_args([]).host == "127.0.0.1"


def test_the_console_says_in_one_line_whether_the_whole_network_can_use_the_page():
    for host in ("127.0.0.1", "127.9.9.9", "localhost"):
        assert app.invitation(host, 7860) == f"open http://{host}:7860 ; Ctrl-C ends it"
    assert app.invitation("::1", 7860) == "open http://[::1]:7860 ; Ctrl-C ends it"
    for host in ("0.0.0.0", "192.0.2.7", "localhost.example.org", "127.example.org"):
        words = f"open http://{host}:7860, which everyone in the network can use ; Ctrl-C ends it"
        assert app.invitation(host, 7860) == words
    assert app.invitation("::", 7860).startswith("open http://[::]:7860, which everyone")


def test_an_address_of_ipv6_can_be_listened_at(refused, free_port):
    try:
        server = socket.create_server(("::1", free_port), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        assert "Address already in use" in refused(app.main, "--host", "::1", "--port", free_port)
    app.refuse_taken("::1", free_port)


# ---------------------------------------------------------------------------------------------
# In a browser

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


@pytest.fixture
def server(free_port):
    """A served app that starts without any run: its process, and its address."""
    pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-app.txt")
    words = [sys.executable, ROOT / "app.py", "--port", str(free_port), "--max_mb", "0.1", *EXACT]
    with Path("app.log").open("w") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            until = time.monotonic() + 120
            while "Ctrl-C ends it" not in Path("app.log").read_text():
                assert process.poll() is None, Path("app.log").read_text()
                assert time.monotonic() < until
                time.sleep(0.2)
            yield process, f"http://127.0.0.1:{free_port}"
        finally:
            process.kill()


@pytest.fixture
def page(server):
    """The page in a browser."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r requirements-dev.txt")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs Chromium: apt-get install chromium")
    with driver.sync_playwright() as play, play.chromium.launch(executable_path=browser, args=QUIET) as chromium:
        page = chromium.new_page(viewport={"width": 1000, "height": 900})
        page.set_default_timeout(60_000)
        page.process, page.address = server
        yield page


@pytest.mark.slow
def test_two_visitors_at_once_get_their_own_zips_which_nobody_guesses(server):
    client = pytest.importorskip("gradio_client", reason="comes with gradio")
    process, address = server
    write_run()
    noise_image(1).save("one.png")
    noise_image(2).save("two.png")

    def ask(name):
        visitor = client.Client(address, verbose=False, download_files=False)
        visitor.predict(api_name="/refresh")
        files = [client.handle_file(f"{name}.png")]
        return visitor.submit("tiny", "AtoB", "train", files, api_name="/pack")

    jobs = {name: ask(name) for name in ("one", "two")}
    addresses = {name: job.result()[0]["url"] for name, job in jobs.items()}
    for name, url in addresses.items():
        with zipfile.ZipFile(io.BytesIO(urllib.request.urlopen(url).read())) as archive:
            assert archive.namelist() == [f"fake_B/{name}.png"]
    folders = [url.split("/")[-2] for url in addresses.values()]
    assert folders[0] != folders[1]
    assert all(len(folder) >= 40 for folder in folders)
    assert all(url.endswith("/AtoB.zip") for url in addresses.values())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert "Traceback" not in Path("app.log").read_text()


@pytest.mark.slow
def test_two_visitors_at_once_get_their_own_translations(server, two_clients):
    client = pytest.importorskip("gradio_client", reason="comes with gradio")
    _, address = server
    visitors = [client.Client(address, verbose=False, download_files=False) for _ in QUESTIONS[:2]]
    for visitor in visitors:
        visitor.predict(api_name="/refresh")  # as a browser does that opens the page
    for _ in range(2):
        jobs = []
        for visitor, (*choice, photo) in zip(visitors, QUESTIONS, strict=False):
            jobs.append(visitor.submit(*choice, client.handle_file(photo), api_name="/show"))
        pages = [visitor.submit(api_name="/refresh") for visitor in visitors]
        for job, page, (run_name, direction, scale, photo) in zip(jobs, pages, QUESTIONS, strict=False):
            shown = [Image.open(io.BytesIO(urllib.request.urlopen(file["url"]).read())) for file in job.result()[:2]]
            expected = app.translate(app.open_run(two_clients, run_name, scale), direction, Path(photo))[1:]
            for image, wanted in zip(shown, expected, strict=True):
                assert np.array_equal(pixels(image), pixels(wanted))
            assert "teacher" in str(page.result()[1])
    assert "Traceback" not in Path("app.log").read_text()


@pytest.mark.slow
def test_in_a_browser_a_photo_is_uploaded_translated_and_a_wrong_file_does_no_harm(page, photo):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page.address)
    page.get_by_text("No run in saved_models yet").wait_for()
    write_run()
    page.goto(page.address)
    upload, button = page.locator("input[type=file]").first, page.get_by_role("button", name="Translate", exact=True)

    def complaint(words):
        page.locator(".toast-body", has_text=words).wait_for()
        page.locator(".toast-close").first.click()

    button.click()
    complaint("no image given")
    Path("bad.png").write_text("hello")
    upload.set_input_files("bad.png")
    page.locator(f"img[src*='{page.address}']").wait_for(state="attached")
    button.click()
    complaint("bad.png: UnidentifiedImageError")
    page.get_by_label("Clear").first.click()
    Path("large.png").write_bytes(bytes(200_000))
    upload.set_input_files("large.png")
    complaint("exceed the maximum allowed size")
    upload.set_input_files("photo.png")
    page.locator(f"img[src*='{page.address}']").wait_for()
    button.click()
    page.wait_for_function("document.querySelectorAll('img[src*=\"/file=\"]').length >= 5")
    sources = [image.get_attribute("src") for image in page.locator("img[src*='/file=']").all()]
    shown = [Image.open(io.BytesIO(urllib.request.urlopen(source).read())) for source in sources[:3]]
    for image, expected in zip(shown, app.translate(opened(), "AtoB", photo), strict=True):
        assert np.array_equal(pixels(image), pixels(expected))
    screen = Image.open(io.BytesIO(page.screenshot(path="page.png", full_page=True)))
    assert screen.width == 1000
    page.get_by_role("tab", name="Many images").click()
    page.locator("input[type=file]").last.set_input_files(["photo.png", "bad.png"])
    page.get_by_role("button", name="Translate into a zip").click()
    page.get_by_text("left out: bad.png").wait_for()
    with page.expect_download() as download:
        page.locator("a[download]").last.click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.namelist() == ["fake_B/photo.png"]
    assert [url for url in asked if not url.startswith((page.address, "data:", "blob:"))] == []
    page.process.send_signal(signal.SIGTERM)
    assert page.process.wait(20) == 143
    assert "Traceback" not in Path("app.log").read_text()
