import asyncio
import functools
import io
import json
import os
import re
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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image

import app
import test as test_command
from models import DIRECTIONS, Direction, GeneratorConfig, build_generator
from toolkit import cli, images, inference
from toolkit.checkpoints import set_aside
from toolkit.converters import to_junyanz
from toolkit.weights import save_generator
from utils import InputError

ROOT = Path(app.__file__).parent
INCLUDED = [f"examples/{name}.safetensors" for name in ("horse2zebra", "zebra2horse", "day2night")]
HORSE = ROOT / "examples" / "horse.jpg"
EXACT = ["--device", "cpu", "--precision", "fp32"]
A_TO_B, B_TO_A = DIRECTIONS


def write_run(name="tiny", directions=DIRECTIONS, first_seed=0, **flags):
    """The generators of a run and, of a student, the options that name its teacher; returns the last generator."""
    folder = Path("saved_models", name)
    folder.mkdir(parents=True)
    for seed, direction in enumerate(directions, first_seed):
        torch.manual_seed(seed)
        net = build_generator(GeneratorConfig(ngf=4, num_residual=1), "kaiming")
        metadata = {"direction": str(direction), "size": [16, 24], "dataset_name": "tiny"}
        save_generator(folder / f"{direction.generator}.safetensors", net, metadata)
    if flags:
        (folder / "run.json").write_text(json.dumps({"flags": flags}))
    return net


def app_config(*flags):
    return cli.config_of(app.AppConfig, app.parse_args([*EXACT, *flags]))


def opened(name="tiny", *flags, scale="train"):
    return app.open_network(app_config(*flags), name, scale)


@pytest.fixture
def photo():
    noise_image(3, (30, 20)).save("photo.png")
    return Path("photo.png")


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-app.txt")


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.fixture
def components(gradio, monkeypatch):
    """A function that builds the page of some options, and returns its parts by their labels."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(Path.cwd()))

    async def build(config):
        return app.build_page(config, Path())

    def parts(config):
        page = asyncio.run(build(config))  # without a running loop gradio makes some that it never closes
        return {getattr(part, "label", None): part for part in page.blocks.values()}

    return parts


# -- runs ------------------------------------------------------------------------------------


def test_a_run_that_is_being_trained_shows_its_newest_weights(photo):
    net = write_run()
    before = pixels(app.translate_file(opened(), B_TO_A, photo)[1])
    assert opened() is opened()
    torch.nn.init.zeros_(net.head[1].weight)
    save_generator(Path("saved_models/tiny/G_BA.safetensors"), net, {"direction": "BtoA", "size": [16, 24]})
    assert not np.array_equal(pixels(app.translate_file(opened(), B_TO_A, photo)[1]), before)


def test_the_list_has_weights_then_runs_newest_first_then_the_included_students():
    assert list(app.list_networks(app_config())) == INCLUDED
    for time_, name in enumerate(("old", "new", "newest")):
        write_run(name)
        for path in Path("saved_models", name).iterdir():
            os.utime(path, (time_, time_))
    assert app.find_runs() == app.find_runs("G_AB") == ["newest", "new", "old"]
    assert list(app.list_networks(app_config())) == ["newest", "new", "old", *INCLUDED]
    file = "saved_models/old/G_BA.safetensors"
    assert list(app.list_networks(app_config("--weights", file))) == [file, "newest", "new", "old", *INCLUDED]
    assert list(app.list_networks(app_config("--weights", INCLUDED[1])))[:2] == [INCLUDED[1], "newest"]


def test_a_run_whose_overwriting_was_killed_is_in_the_list():
    write_run("old")
    set_aside("old")
    assert app.find_runs() == ["old"]


def test_a_given_file_is_used_rather_than_an_included_one_of_its_name():
    write_run()
    Path("examples").mkdir()
    shutil.copy("saved_models/tiny/G_BA.safetensors", INCLUDED[0])
    assert opened(INCLUDED[0]).size == (128, 128)
    assert opened(INCLUDED[0], "--weights", INCLUDED[0]).size == (16, 24)


def test_a_typed_path_opens_a_generator_file_of_this_or_another_project():
    net = write_run()
    torch.save(to_junyanz(net), "latest_net_G_B.pth")
    for path in ("saved_models/tiny/G_BA.safetensors", str(Path("latest_net_G_B.pth").resolve())):
        for host in ("127.0.0.1", "localhost", "::1"):
            assert opened(path, "--host", host).directions == [B_TO_A]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("photo.png", "photo.png: "),
        ("gone.pth", "gone.pth: no such file"),
        ("saved_models/../elsewhere", "elsewhere: no such file"),
        ("saved_models", "saved_models: no such file"),
        ("", "not in the list"),
        (None, "not in the list"),
    ],
)
def test_a_typed_path_that_is_no_generator_file_is_one_line_in_the_page(gradio, photo, name, words):
    write_run()
    shutil.copytree("saved_models/tiny", "elsewhere")
    choose = app.in_page(functools.partial(app.choose_network, app_config()))
    with pytest.raises(gradio.Error, match=words) as error:
        choose(name, "AtoB")
    assert "\n" not in error.value.message


def test_where_others_can_open_the_page_a_typed_path_is_refused_whether_it_exists_or_not(gradio):
    write_run()
    complaints = set()
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        for path in ("saved_models/tiny/G_AB.safetensors", "saved_models/tiny/G_ZZ.safetensors", "/etc/passwd"):
            with pytest.raises(InputError) as error:
                opened(path, "--host", host)
            complaints.add(str(error.value).replace(path, "PATH"))
        assert opened("tiny", "--host", host).directions == [A_TO_B, B_TO_A]
    assert complaints == {"network PATH: not in the list; choose one of the list, or reload the page"}


def test_only_on_this_machine_the_page_accepts_a_typed_path(components):
    for host, accepted in (("localhost", True), ("0.0.0.0", False)):
        config = app_config("--host", host)
        assert components(config)["network"].allow_custom_value == accepted
        assert ("path" in str(app.refresh(config).info)) == accepted


def test_the_photo_of_a_horse_is_there_from_the_start(components):
    shown = components(app_config())["input"].value["path"]
    assert np.array_equal(pixels(Image.open(shown)), pixels(Image.open(HORSE)))


def test_a_network_brings_its_directions_and_hides_the_round_trip_if_there_is_no_way_back(gradio):
    write_run()
    config = app_config()
    both = ["AtoB", "BtoA"]
    for name, before, names, value in (
        (INCLUDED[0], "AtoB", ["AtoB"], "AtoB"),
        ("saved_models/tiny/G_BA.safetensors", "AtoB", ["BtoA"], "BtoA"),
        ("tiny", "BtoA", both, "BtoA"),
        ("tiny", "AtoB", both, "AtoB"),
        ("tiny", None, both, "AtoB"),
    ):
        radio, rec = app.choose_network(config, name, before)
        assert radio.choices[0][0] == ("horse → zebra" if name == INCLUDED[0] else " → ".join(names[0].split("to")))
        assert [direction for _, direction in radio.choices] == names
        assert radio.value == value
        assert rec["visible"] == (names == both)


def test_networks_that_do_not_fit_together_are_one_line_in_the_page():
    write_run()
    net = build_generator(GeneratorConfig(ngf=4, num_residual=1, channels=1))
    save_generator(Path("saved_models/tiny/G_BA.safetensors"), net, {"direction": "BtoA", "size": [16, 24]})
    with pytest.raises(InputError, match=r"saved_models/tiny: .*channels"):
        opened()


def test_teacher_and_students_are_compared_with_milliseconds(photo):
    for name in ("alone", "teacher"):
        write_run(name)
    write_run("thin", teacher="teacher", direction="BtoA")
    write_run("both", teacher="saved_models/teacher/epoch_0001.pt", direction="both")
    write_run("orphan", teacher="gone", direction="AtoB")
    write_run("one_way", [B_TO_A], teacher="teacher", direction="AtoB")
    write_run("broken")
    Path("saved_models/broken/run.json").write_text('{"flags": 3')
    for name in ("first", "second"):
        write_run(name, teacher=INCLUDED[0], direction="AtoB")
    for run_name in ("teacher", "thin", "both"):
        assert app.related_runs(run_name, B_TO_A)[0] == "teacher"
        assert sorted(app.related_runs(run_name, B_TO_A)) == ["both", "teacher", "thin"]
    assert app.related_runs("teacher", A_TO_B) == ["teacher", "both"]
    assert sorted(app.related_runs("first", A_TO_B)) == ["first", "second"]
    for run_name in ("thin", "alone", "orphan", "broken", INCLUDED[0], "saved_models/teacher/G_AB.safetensors"):
        assert app.related_runs(run_name, A_TO_B) == []
    translators = {name: opened(name) for name in app.related_runs("both", A_TO_B)}
    compared = app.compare_runs(translators, A_TO_B, photo)
    assert [caption.split(":")[0] for _, caption in compared] == ["teacher", "both"]
    assert all(float(caption.split()[1]) > 0 and " ms, 0.0" in caption for _, caption in compared)
    expected = app.translate_file(opened("teacher"), A_TO_B, photo)[1]
    assert np.array_equal(pixels(compared[0][0]), pixels(expected))


# -- translating -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["train", "native"])
def test_a_photo_is_translated_as_test_py_does_it(photo, scale):
    write_run()
    shown = app.translate_file(opened(scale=scale), B_TO_A, photo)
    argv = ["--run_name", "tiny", "--input", "photo.png", "--direction", "BtoA", "--round_trip", "--scale", scale]
    test_command.main([*argv, *EXACT])
    for image, folder in zip(shown, ("real_B", "fake_A", "rec_B"), strict=True):
        written = Image.open(f"generated_images/tiny/translated/{folder}/photo.png")
        assert image.size == (30, 20)
        assert np.array_equal(pixels(image), pixels(written))
    other = "native" if scale == "train" else "train"
    for different in (
        app.translate_file(opened(), A_TO_B, photo),
        app.translate_file(opened(scale=other), B_TO_A, photo),
    ):
        assert not np.array_equal(pixels(shown[1]), pixels(different[1]))


def test_one_generator_file_has_no_round_trip(photo):
    net = write_run()
    torch.save(to_junyanz(net), "latest_net_G_A.pth")
    translator = opened("latest_net_G_A.pth", "--weights", "latest_net_G_A.pth")
    _, fake, rec = app.translate_file(translator, A_TO_B, photo)
    assert (fake.size, rec) == ((30, 20), None)
    assert translator.size == (256, 256)  # not in such files
    with pytest.raises(InputError, match="translate AtoB only"):
        app.translate_file(translator, B_TO_A, photo)


def test_only_uploads_are_opened_whatever_path_a_client_names(photo, gradio):
    folder = Path("uploads")
    folder.mkdir()
    shutil.copy(photo, folder)
    assert app.uploaded_path(folder, SimpleNamespace(path="uploads/photo.png")) == "uploads/photo.png"
    assert app.uploaded_path(folder, None) is None
    (folder / "link.png").symlink_to(photo.resolve())
    for path in ("photo.png", "uploads/../photo.png", "uploads/link.png", "/etc/hostname", "none.png"):
        with pytest.raises(gradio.Error, match="no uploaded image"):
            app.uploaded_path(folder, SimpleNamespace(path=path))


def test_uploads_that_are_no_image_or_too_large_get_one_line(photo, monkeypatch):
    write_run()
    Path("bad.png").write_text("hello")
    with pytest.raises(InputError, match=r"^bad\.png: [^/]*cannot identify[^/]*PNG or JPEG$"):
        app.translate_file(opened(), A_TO_B, Path("bad.png").resolve())
    monkeypatch.setattr(images, "max_pixels", 100)
    with pytest.raises(InputError, match="30x20 px"):
        app.translate_file(opened(), A_TO_B, photo)


def test_hints_about_an_image_are_shown_in_the_page_each_time(gradio, monkeypatch):
    write_run()
    noise_image(1, (70, 40)).save("large.png")
    said = []
    monkeypatch.setattr(gradio, "Info", said.append)
    for _ in range(2):
        app.translate_photo(app_config(), "tiny", "AtoB", "native", "large.png")
    finer = "textures such as stripes become that much finer; compare both sizes"
    assert said == [f"translated at 3 times the size of the training images: {finer}"] * 2


@pytest.mark.parametrize(("scale", "passes"), [("native", 2 + 3 * 2), ("train", 2)])  # statistics, tiles
def test_an_image_in_tiles_is_translated_once_and_a_whole_one_twice_to_warm_up(monkeypatch, scale, passes):
    write_run()
    monkeypatch.setattr(inference, "TILE", 32)
    monkeypatch.setattr(inference, "WHOLE_BYTES", 1e5)
    app.load_translator.cache_clear()
    noise_image(1, (70, 40)).save("large.png")
    translator = opened(scale=scale)
    sizes = []
    translator.networks["G_AB"].register_forward_hook(lambda net, inputs, output: sizes.append(max(output.shape[-2:])))
    ((image, caption),) = app.compare_runs({"tiny": translator}, A_TO_B, Path("large.png"))
    app.load_translator.cache_clear()
    assert image.size == (70, 40)
    assert float(caption.split()[1]) > 0
    sizes = [size for size in sizes if size != 128]  # its time was estimated with such an image
    assert len(sizes) == passes
    assert 16 < max(sizes) <= 32


def test_many_photos_become_a_zip_and_what_is_no_image_is_named(photo, gradio):
    write_run()
    config = app_config()
    Path("bad.png").write_text("hello")
    for name in ("x/photo.jpg", "y/Photo.png"):
        Path(name).parent.mkdir()
        noise_image(name, (12, 40)).save(name)
    paths = ["photo.png", "bad.png", "x/photo.jpg", "y/Photo.png"]
    packed, errors = app.translate_to_zip(config, Path(), "tiny", "AtoB", "train", paths)
    assert re.fullmatch(r"\* left out: bad\.png: .*", errors)
    with zipfile.ZipFile(packed) as archive:
        names = archive.namelist()
        zipped = [Image.open(io.BytesIO(archive.read(name))) for name in names]
        first = pixels(zipped[0])
    assert names == ["fake_B/photo.png", "fake_B/photo_.png", "fake_B/Photo__.png"]
    assert [image.size for image in zipped] == [(30, 20), (12, 40), (12, 40)]
    assert np.array_equal(first, pixels(app.translate_file(opened(), A_TO_B, photo)[1]))
    for paths, words in (([], "no file given"), (["bad.png"], r"^bad\.png")):
        with pytest.raises(InputError, match=words):
            app.translate_to_zip(config, Path(), "tiny", "AtoB", "train", paths)
    assert len(list(Path().rglob("*.zip"))) == 1


# -- several visitors ------------------------------------------------------------------------


def at_once(call, questions, rounds=3):
    """The answers of a function to several clients who ask at the same moment, by question."""
    start = threading.Barrier(len(questions))

    def ask(question):
        start.wait(120)
        return call(*question)

    answers = {question: [] for question in questions}
    with ThreadPoolExecutor(len(questions)) as clients:
        for _ in range(rounds):
            for question, answer in zip(questions, clients.map(ask, questions), strict=True):
                answers[question].append(answer)
    return answers


QUESTIONS = [  # run, direction, scale, photo: two clients who differ in all, and two who differ in one thing each
    ("teacher", "AtoB", "train", "photo.png"),
    ("thin", "BtoA", "native", "other.png"),
    ("teacher", "BtoA", "train", "photo.png"),
    ("teacher", "AtoB", "train", "other.png"),
]


@pytest.fixture
def two_clients(photo, gradio):
    """Two runs, teacher and student, and two photos; returns the options of the app."""
    noise_image(4, (40, 28)).save("other.png")
    write_run("teacher")
    write_run("thin", first_seed=5, teacher="teacher", direction="both")
    app.load_translator.cache_clear()  # so that the first clients also load the networks at the same moment
    return app_config()


def test_clients_who_translate_at_once_each_get_their_own_images(two_clients):
    answers = at_once(functools.partial(app.translate_photo, two_clients), QUESTIONS)
    for (run_name, name, scale, photo), given in answers.items():
        direction = Direction.named(name)
        expected = app.translate_file(app.open_network(two_clients, run_name, scale), direction, Path(photo))
        related = [app.open_network(two_clients, other, scale) for other in ("teacher", "thin")]
        beside = [app.translate_file(translator, direction, Path(photo))[1] for translator in related]
        for fake, rec, (image, after), shown in given:
            assert [caption.split(":")[0] for _, caption in shown["value"]] == ["teacher", "thin"]
            found = [image, fake, rec, after, *(image for image, _ in shown["value"])]
            wanted = [*expected, expected[1], *beside]
            assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(found, wanted, strict=True))


def test_clients_who_pack_at_once_each_get_their_own_zip_which_nobody_guesses(two_clients):
    Path("zips").mkdir()
    Path("bad.png").write_text("hello")

    def pack(run_name, direction, scale, photo):
        return app.translate_to_zip(two_clients, Path("zips"), run_name, direction, scale, [photo, "bad.png"])

    answers = at_once(pack, QUESTIONS)
    paths = {path for packed in answers.values() for path, _ in packed}
    assert len(paths) == 3 * len(QUESTIONS)
    assert all(len(Path(path).parent.name) >= 40 for path in paths)
    for (run_name, name, scale, photo), packed in answers.items():
        direction = Direction.named(name)
        _, fake, _ = app.translate_file(app.open_network(two_clients, run_name, scale), direction, Path(photo))
        for path, errors in packed:
            assert "left out: bad.png" in errors
            with zipfile.ZipFile(path) as archive:
                assert archive.namelist() == [f"fake_{direction.target}/{photo}"]
                zipped = Image.open(io.BytesIO(archive.read(archive.namelist()[0])))
                assert np.array_equal(pixels(zipped), pixels(fake))
    with pytest.raises(InputError, match="no file given"):
        app.translate_to_zip(two_clients, Path("zips"), "thin", "AtoB", "train", None)
    assert len(list(Path("zips").rglob("*.*"))) == len(paths)


def test_clients_who_load_the_page_while_another_is_served_see_all_runs(two_clients):
    def load_or_translate(what):
        if what == "translate":
            return app.translate_photo(two_clients, *QUESTIONS[0])
        return app.refresh(two_clients)

    answers = at_once(load_or_translate, [("refresh",), ("refresh again",), ("translate",)])
    for runs in answers[("refresh",)]:
        assert [name for name, _ in runs.choices] == ["thin", "teacher", *INCLUDED]
        assert runs.value == "thin"


# -- the server ------------------------------------------------------------------------------


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_an_address_that_cannot_be_used_is_refused_in_one_line(refused, free_port):
    assert app.parse_args([]).host == "127.0.0.1"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        words = refused(app.main, "--port", port)
        assert f"--port {port}: Address already in use" in words
        assert "take a free port of this machine" in words
    assert "--host 203.0.113.7" in refused(app.main, "--host", "203.0.113.7", "--port", free_port)
    assert "--port" in refused(app.main, "--port", 70000)
    assert "--max_mb" in refused(app.main, "--max_mb", 0)
    if socket.has_dualstack_ipv6():
        with socket.create_server(("::1", free_port), family=socket.AF_INET6):
            assert "Address already in use" in refused(app.main, "--host", "::1", "--port", free_port)
        app.refuse_taken("::1", free_port)


def test_given_weights_that_cannot_be_used_are_refused_in_one_line(refused, free_port):
    assert "gone.pth: no such file" in refused(app.main, "--weights", "gone.pth", "--port", free_port)
    assert "--assume: has no effect without --weights" in refused(app.main, "--assume", "zeros", "--port", free_port)


def test_a_missing_gradio_is_named_with_the_command_that_installs_it(refused, monkeypatch, free_port):
    monkeypatch.setitem(sys.modules, "gradio", None)
    words = refused(app.main, "--port", free_port)
    assert "gradio" in words
    assert "pip install -r requirements-app.txt" in words


QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


@pytest.fixture
def server(free_port, gradio):
    """A served app that starts without any run: its process, and its address."""
    command = [sys.executable, ROOT / "app.py", "--port", str(free_port), "--max_mb", "0.1", *EXACT]
    with Path("app.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            until = time.monotonic() + 300
            while "Ctrl-C ends it" not in Path("app.log").read_text():
                assert process.poll() is None, Path("app.log").read_text()
                assert time.monotonic() < until
                time.sleep(0.2)
            yield process, f"http://127.0.0.1:{free_port}"
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 143
            assert "Traceback" not in Path("app.log").read_text()
        finally:
            process.kill()


def fetched(url):
    return io.BytesIO(urllib.request.urlopen(url).read())


@pytest.mark.slow
def test_two_visitors_at_once_get_their_own_images(server, two_clients):
    client = pytest.importorskip("gradio_client", reason="gradio installs it")
    _, address = server
    visitors = [client.Client(address, verbose=False, download_files=False) for _ in range(2)]
    for visitor, (run_name, *_) in zip(visitors, QUESTIONS, strict=False):
        visitor.predict(api_name="/refresh")  # as a browser does that opens the page
        visitor.predict(run_name, "AtoB", api_name="/choose")
    jobs = []
    for visitor, (*choice, photo) in zip(visitors, QUESTIONS, strict=False):
        shown = visitor.submit(*choice, client.handle_file(photo), api_name="/show")
        packed = visitor.submit(*choice, [client.handle_file(photo)], api_name="/pack")
        jobs.append((shown, packed, visitor.submit(api_name="/refresh")))
    for (shown, packed, refreshed), (run_name, name, scale, photo) in zip(jobs, QUESTIONS, strict=False):
        images = [Image.open(fetched(file["url"])) for file in shown.result()[:2]]
        expected = app.translate_file(
            app.open_network(two_clients, run_name, scale), Direction.named(name), Path(photo)
        )
        assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(images, expected[1:], strict=True))
        with zipfile.ZipFile(fetched(packed.result()[0]["url"])) as archive:
            assert archive.namelist() == [f"fake_{name[-1]}/{photo}"]
        assert "teacher" in str(refreshed.result())


@pytest.fixture
def page(server):
    """The page in a browser that may ask no other server; `page.address` is its address."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r requirements-dev.txt")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs Chromium: apt-get install chromium")
    with driver.sync_playwright() as play, play.chromium.launch(executable_path=browser, args=QUIET) as chromium:
        page = chromium.new_page(viewport={"width": 1000, "height": 900})
        page.set_default_timeout(120_000)
        _, page.address = server
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        yield page
        assert [url for url in asked if not url.startswith((page.address, "data:", "blob:"))] == []


def complaint(page, words):
    page.locator(".toast-body", has_text=words).wait_for()
    page.locator(".toast-close").first.click()


def translated(page, count):
    """The images of the page, input and translation first, when there are so many after a click on the button."""
    page.get_by_role("button", name="Translate", exact=True).click()
    page.wait_for_function(f"document.querySelectorAll('img[src*=\"/file=\"]').length >= {count}")
    sources = [image.get_attribute("src") for image in page.locator("img[src*='/file=']").all()]
    return [Image.open(fetched(source)) for source in sources]


@pytest.mark.slow
def test_in_a_browser_one_click_gives_a_zebra_and_a_typed_path_is_opened(page):
    from playwright.sync_api import expect

    page.goto(page.address)
    network = page.get_by_label("network", exact=True)
    directions = page.locator("label", has_text="→")
    round_trip = page.get_by_text("round trip")
    page.locator(f"img[src*='{page.address}']").wait_for()
    expect(network).to_have_value(INCLUDED[0])
    expect(directions).to_have_text(["horse → zebra"])
    assert round_trip.count() == 0
    zebra = app.translate_file(opened(INCLUDED[0]), A_TO_B, HORSE)[1]
    assert np.array_equal(pixels(translated(page, 4)[1]), pixels(zebra))
    write_run()
    network.fill("saved_models/tiny/G_BA.safetensors")
    network.press("Enter")
    expect(directions).to_have_text(["B → A"])
    network.fill("photo.txt")
    network.press("Enter")
    complaint(page, "photo.txt: no such file")
    page.goto(page.address)
    round_trip.wait_for()
    expect(network).to_have_value("tiny")
    expect(directions).to_have_text(["A → B", "B → A"])


@pytest.mark.slow
def test_in_a_browser_a_photo_is_uploaded_translated_and_a_wrong_file_does_no_harm(page, photo):
    write_run()
    page.goto(page.address)
    page.get_by_text("round trip").wait_for()
    upload = page.locator("input[type=file]").first
    button = page.get_by_role("button", name="Translate", exact=True)
    page.get_by_label("Remove Image").click()
    button.click()
    complaint(page, "no image given")
    Path("bad.png").write_text("hello")
    upload.set_input_files("bad.png")
    page.locator(f"img[src*='{page.address}']").wait_for(state="attached")
    button.click()
    complaint(page, "bad.png: UnidentifiedImageError")
    page.get_by_label("Remove Image").click()
    Path("large.png").write_bytes(bytes(200_000))
    upload.set_input_files("large.png")
    complaint(page, "exceed the maximum allowed size")
    upload.set_input_files("photo.png")
    page.locator(f"img[src*='{page.address}']").wait_for()
    expected = app.translate_file(opened(), A_TO_B, photo)
    for image, wanted in zip(translated(page, 5)[:3], expected, strict=True):
        assert np.array_equal(pixels(image), pixels(wanted))
    assert Image.open(io.BytesIO(page.screenshot(full_page=True))).width == 1000
    page.get_by_role("tab", name="Many images").click()
    page.locator("input[type=file]").last.set_input_files(["photo.png", "bad.png"])
    page.get_by_role("button", name="Translate into a zip").click()
    page.get_by_text("left out: bad.png").wait_for()
    with page.expect_download() as download:
        page.locator("a[download]").last.click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.namelist() == ["fake_B/photo.png"]
