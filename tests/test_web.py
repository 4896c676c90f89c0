"""The page of examples/web, in headless Chromium."""

import functools
import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image

import export
import test as test_stage
from images import load_image, tensor_to_image
from models import GeneratorConfig, build_generator
from weights import save_generator

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
onnx = pytest.importorskip("onnx", reason="onnx is missing: pip install -r requirements-export.txt")
WEB = Path(export.__file__).parent / "examples" / "web"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RUNTIME = WEB / "node_modules" / "onnxruntime-web"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed"),
    pytest.mark.skipif(not RUNTIME.is_dir(), reason="no node_modules: npm ci --ignore-scripts in examples/web"),
]
QUIET = ("background-networking", "component-update", "sync", "quic", "gpu")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture
def open_page(tmp_path):
    """Serve a copy of the page as `python -m http.server` does, and open it; nothing may be asked of another server."""
    site = tmp_path / "site"
    shutil.copytree(WEB, site, ignore=shutil.ignore_patterns("node_modules", "*.onnx"))
    (site / "node_modules").symlink_to(WEB / "node_modules")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    asked = []
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", *(f"--disable-{name}" for name in QUIET)]
        )
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: asked.append(f"error: {error}"))

        def open_(model=None):
            if model:
                shutil.copy(model, site / "model.onnx")
            page.goto(home)
            page.wait_for_selector("#inputs:enabled")
            return page

        yield open_
        browser.close()
    server.shutdown()
    server.server_close()
    assert [url for url in asked if not url.startswith((home, f"blob:{home}", "data:"))] == []


def choose(page, field, path):
    """Choose a file and wait; returns what the page says."""
    page.set_input_files(field, path)
    page.wait_for_selector("#inputs:enabled")
    return page.inner_text("#message")


def download(page):
    with page.expect_download() as waiting:
        page.click("#download")
    with Image.open(waiting.value.path()) as image:
        return image.convert("RGB"), waiting.value.suggested_filename


def export_generator(channels=3, norm="instance"):
    """Write a random generator for 48x40 px and its ONNX file; returns the network."""
    torch.manual_seed(1)
    net = build_generator(GeneratorConfig(ngf=4, num_residual=1, channels=channels, norm=norm), "kaiming").eval()
    save_generator(Path("G_AB.safetensors"), net, {"direction": "AtoB", "size": [40, 48], "run_name": "tiny"})
    export.main(["--weights", "G_AB.safetensors"])
    return net


def mean_difference(one, other):
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).mean()


@pytest.mark.parametrize(("channels", "norm"), [(3, "instance"), (1, "none")])  # a norm hides a wrong range
def test_the_browser_translates_as_pytorch_does(open_page, channels, norm):
    net = export_generator(channels, norm)
    page = open_page("G_AB.onnx")
    assert page.inner_text("#about") == "model.onnx: AtoB, of tiny, trained at 48×40 px"
    noise_image(1, (48, 40)).save("same.png")
    assert choose(page, "#picture", "same.png").startswith("translated in ")
    with torch.no_grad():
        wanted = tensor_to_image(net(load_image(Path("same.png"), None, channels)[None])[0])
    output, name = download(page)
    assert name == "same_AtoB.png"
    assert mean_difference(output, wanted.convert("RGB")) < 0.1  # of 255
    noise_image(1, (150, 90)).save("larger.png")
    noise_image(2, (20, 30), "RGBA").save("clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    noise_image(3, (64, 30)).save("turned.png", exif=turned)
    for name in ("larger", "clear", "turned"):
        argv = ["--weights", "G_AB.safetensors", "--input", f"{name}.png", "--device", "cpu", "--precision", "fp32"]
        test_stage.main(argv)
        assert choose(page, "#picture", f"{name}.png").startswith("translated in ")
        wanted = Image.open(f"generated_images/tiny/test/fake_B/{name}.png")
        output = download(page)[0]
        assert output.size == wanted.size
        assert mean_difference(output, wanted.convert("RGB")) < 0.3


def test_whatever_cannot_be_shown_is_refused_in_one_line_and_the_page_lives_on(open_page):
    page = open_page()
    assert "no model.onnx beside this page" in page.inner_text("#message")
    noise_image(1, (48, 40)).save("good.png")
    assert "no generator yet" in choose(page, "#picture", "good.png")
    export_generator()
    Path("text.onnx").write_text("no model")
    Path("half.onnx").write_bytes(Path("G_AB.onnx").read_bytes()[:9000])
    model = onnx.load("G_AB.onnx")
    for name, facts in (("foreign", {}), ("two", {"channels": "2"}), ("huge", {"channels": "3", "size": "[1, 99999]"})):
        onnx.helper.set_model_props(model, facts)
        onnx.save(model, f"{name}.onnx")
    for name, words in {
        "text": "no ONNX file",
        "half": "no ONNX file, or a part of one",
        "foreign": "does not say its channels",
        "two": "has 2 channels, the page shows 1 or 3",
        "huge": "says it was trained at [1,99999]",
    }.items():
        assert f"{name}.onnx: not a model for this page: {words}" in choose(page, "#model", f"{name}.onnx")
    assert "translated in " in choose(page, "#model", "G_AB.onnx")
    assert page.is_visible("#after")
    Path("text.png").write_text("no picture")
    assert "text.png: no picture that this browser can read" in choose(page, "#picture", "text.png")
    assert page.is_hidden("#after")  # an older answer would pass for this one
    Image.new("L", (8000, 5000)).save("large.png")
    assert "large.png: 8000×5000 px are too large" in choose(page, "#picture", "large.png")
    assert "translated in " in choose(page, "#picture", "good.png")
