"""The page of examples/web: its server, and its behaviour in headless Chromium."""

import base64
import functools
import http.server
import importlib.util
import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image
from profiles import rgb_profile

import export
import test as test_command
from models import GeneratorConfig, build_generator
from toolkit.images import PREPROCESS, fitted_size, image_to_tensor, load_image, read_image, tensor_to_image
from toolkit.weights import save_generator

WEB = Path(export.__file__).parent / "examples" / "web"
RUNTIME = Path("node_modules/onnxruntime-web/dist")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
QUIET += ["--disable-quic"]
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
SOFTWARE_GPU += ["--use-vulkan=swiftshader"]


def load_serve():
    spec = importlib.util.spec_from_file_location("serve", WEB / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def serving(server):
    """Run a server within the block; yields its address."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_the_page_is_served_to_this_machine_alone_with_isolating_headers_and_mime_types(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mimetypes.guess_type", lambda *a, **k: ("text/plain", None))  # as some Windows registries say
    types = {"page.js": "text/javascript", "runtime.mjs": "text/javascript", "runtime.wasm": "application/wasm"}
    for name in types:
        Path(name).write_text("")
    server = load_serve().make_server(0, tmp_path)
    assert server.server_address[0] == "127.0.0.1"
    with serving(server) as home:
        for name, mime_type in types.items():
            with urllib.request.urlopen(home + name) as response:
                assert response.headers["Content-Type"] == mime_type
                assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
                assert response.headers["Content-Security-Policy"] == "connect-src 'self'"
        for missing in ("model.onnx", "%00", "%ED%A0%80"):  # a file name has neither zero bytes nor surrogates
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(home + missing)
    assert len(capsys.readouterr().err.splitlines()) == 3  # no traceback


@pytest.mark.parametrize("port", ["http", "70000", "taken"])
def test_a_port_that_cannot_be_used_is_refused_in_one_line(port, capsys):
    serve = load_serve()
    with serve.make_server(0) as server, pytest.raises(SystemExit) as exit_:
        serve.main([str(server.server_port) if port == "taken" else port])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "expected a free port, such as 8080" in line


# ---------------------------------------------------------------------------------------------
# In a browser


def in_browser(test):
    test = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")(test)
    reason = "no node_modules: npm ci --ignore-scripts in examples/web"
    return pytest.mark.slow(pytest.mark.skipif(not (WEB / RUNTIME).is_dir(), reason=reason)(test))


@pytest.fixture
def site(tmp_path):
    """A copy of the page's folder, to which a test can add a model."""
    pytest.importorskip("onnx", reason="onnx is missing: pip install -r requirements-export.txt")
    site = tmp_path / "site"
    shutil.copytree(WEB, site, ignore=shutil.ignore_patterns("node_modules", "*.onnx"))
    (site / RUNTIME).mkdir(parents=True)
    for path in (WEB / RUNTIME).glob("*.*m*"):
        (site / RUNTIME / path.name).symlink_to(path)  # one by one, so that a test can replace one
    return site


@pytest.fixture
def open_page(site):
    """Serve the site; yields a function that opens it. Fails if the page asks another server or throws an error."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    asked = []
    with serving(load_serve().make_server(0, site)) as home, driver.sync_playwright() as play:
        browsers = []

        def open_(model=None, flags=("--disable-gpu",), address=home, query="", script=""):
            browsers.append(play.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *flags]))
            page = browsers[-1].new_page(viewport={"width": 860, "height": 800})
            page.set_default_timeout(120_000)  # WebGPU in software is slow
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: asked.append(f"error: {error}"))
            page.add_init_script(script)
            if model:
                shutil.copy(model, site / "model.onnx")
            page.goto(address + query)
            page.wait_for_selector("#inputs:enabled")
            return page

        yield open_
        for browser in browsers:
            browser.close()
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:"))] == []


def choose(page, field, path):
    """Choose a file and wait; returns the page's message."""
    page.set_input_files(field, path)
    page.wait_for_selector("#inputs:enabled")
    return page.inner_text("#message")


def download(page):
    with page.expect_download() as waiting:
        page.click("#download")
    with Image.open(waiting.value.path()) as image:
        return image.convert("RGB"), waiting.value.suggested_filename


@functools.cache
def exported(channels, norm, size):
    """A random generator for images of (height, width): the network, its file and its ONNX file."""
    torch.manual_seed(1)
    net = build_generator(GeneratorConfig(ngf=4, num_residual=1, channels=channels, norm=norm), "kaiming").eval()
    save_generator(Path("G_AB.safetensors"), net, {"direction": "AtoB", "size": list(size), "run_name": "tiny"})
    export.main(["--weights", "G_AB.safetensors"])
    return net, Path("G_AB.safetensors").read_bytes(), Path("G_AB.onnx").read_bytes()


def export_generator(channels=3, norm="instance", size=(40, 48)):
    """Write a random generator and its ONNX file, which takes seconds to make; returns the network."""
    net, weights, model = exported(channels, norm, size)
    Path("G_AB.safetensors").write_bytes(weights)
    Path("G_AB.onnx").write_bytes(model)
    return net


def mean_difference(one, other):
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).mean()


@in_browser
@pytest.mark.parametrize(("channels", "norm"), [(3, "instance"), (1, "none")])  # a norm hides a wrong range
def test_the_browser_translates_as_pytorch_does(open_page, channels, norm):
    net = export_generator(channels, norm)
    page = open_page("G_AB.onnx")
    assert page.inner_text("#about") == "model.onnx: AtoB, of tiny, trained at 48×40 px"
    noise_image(1, (48, 40)).save("same.png")
    assert choose(page, "#image", "same.png").startswith("translated in ")
    with torch.no_grad():
        wanted = tensor_to_image(net(load_image(Path("same.png"), None, channels)[None])[0])
    output, name = download(page)
    assert name == "same_AtoB.png"
    assert mean_difference(output, wanted.convert("RGB")) < 0.1  # of 255
    noise_image(1, (150, 90)).save("larger.png")
    noise_image(2, (20, 30), "RGBA").save("clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # taken in portrait orientation
    noise_image(3, (64, 30)).save("turned.png", exif=turned)
    for name in ("larger", "clear", "turned"):
        argv = ["--weights", "G_AB.safetensors", "--input", f"{name}.png", "--device", "cpu", "--precision", "fp32"]
        test_command.main(argv)
        assert choose(page, "#image", f"{name}.png").startswith("translated in ")
        wanted = Image.open(f"generated_images/G_AB/translated/fake_B/{name}.png")
        output = download(page)[0]
        assert output.size == wanted.size
        assert mean_difference(output, wanted.convert("RGB")) < 0.3


READ_AND_RESIZE = """async ([name, text, channels, sizes]) => {
    const { readImage, resize } = await import("./images.js");
    const file = new File([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], name);
    const image = await readImage(file, channels, document.createElement("canvas"));
    const results = [image, ...sizes.map(([width, height]) => resize(image, width, height))];
    return results.map(({ width, height, data }) => [height, width, btoa(Array.from(data, (x) => String.fromCharCode(x)).join(""))]);
}"""


def read_in_browser(page, path, channels=3, sizes=()):
    """Return an image as the page reads it, and resized, as arrays."""
    text = base64.b64encode(path.read_bytes()).decode()
    results = page.evaluate(READ_AND_RESIZE, [path.name, text, channels, sizes])
    return [
        np.frombuffer(base64.b64decode(x), np.uint8).reshape(height, width, 4)[..., :3] for height, width, x in results
    ]


@in_browser
def test_images_are_read_and_resized_as_test_py_does(open_page):
    clear, photo = noise_image(1, (45, 31), "RGBA"), noise_image(2, (45, 31))
    for orientation in range(1, 9):
        turned = Image.Exif()
        turned[0x0112] = orientation
        for suffix in ("jpg", "png", "webp"):
            photo.save(f"turned{orientation}.{suffix}", exif=turned, lossless=True, quality=95)
    exif = turned.tobytes().removeprefix(b"Exif\0\0")
    photo.save("prefix.webp", exif=2 * b"Exif\0\0" + exif, lossless=True)  # Pillow removes one
    photo.save("torn.webp", exif=exif[:4] + b"\0\1\0\0" + exif[8:], lossless=True)  # the directory is beyond the end
    clear.save("clear.webp", lossless=True, exact=True)
    clear.save("turned_clear.webp", exif=turned)
    clear.save("clear.png")
    photo.save("p3.jpg", icc_profile=rgb_profile("P3"), quality=95)
    clear.save("p3.webp", icc_profile=rgb_profile("P3"), lossless=True)
    page = open_page()
    for path in sorted(Path().glob("*.*")):
        if path.suffix not in (".jpg", ".png", ".webp"):
            continue
        for channels in (3, 1):
            (read,) = read_in_browser(page, path, channels)
            wanted = np.asarray(read_image(path, channels).convert("RGB")).astype(int)
            assert read.shape == wanted.shape, path
            assert np.abs(read - wanted).max() <= (2 if path.stem == "p3" else 0), (path, channels)
    sizes = [(64, 64), (128, 40), (97, 61), (31, 200), (45, 31), (1, 1)]
    ramp = Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64).astype(np.uint8))
    ramp.save("ramp.png")
    for path in (Path("ramp.png"), Path("clear.png")):
        for size, resized in zip(sizes, read_in_browser(page, path, 3, sizes)[1:], strict=True):
            assert np.array_equal(resized, read_image(path).resize(size, Image.Resampling.BICUBIC)), (path, size)


@in_browser
def test_a_network_gets_images_of_the_same_size_as_in_test_py(open_page):
    page = open_page()
    shapes = [(40, 20), (20, 40), (9, 9), (101, 37), (64, 25), (48, 27)]  # 32 / 64 of 25 is 12.5, 24 / 48 of 27 is 13.5
    for preprocess in PREPROCESS:
        sizes = page.evaluate(
            """async ([shapes, facts]) => {
                const { networkSize } = await import("./images.js");
                return shapes.map(([width, height]) => networkSize({ width, height }, facts));
            }""",
            [shapes, {"size": [12, 32], "preprocess": preprocess}],
        )
        expected = [fitted_size(shape, (32, 12), preprocess, to_crop=False) for shape in shapes]
        assert [(width, height) for height, width in sizes] == expected


@in_browser
def test_a_file_that_cannot_be_used_is_refused_in_one_line_and_the_page_goes_on(open_page):
    page = open_page()
    assert "no model.onnx beside this page" in page.inner_text("#message")
    noise_image(1, (48, 40)).save("good.png")
    assert "no generator yet" in choose(page, "#image", "good.png")
    export_generator()
    Path("text.onnx").write_text("no model")
    Path("half.onnx").write_bytes(Path("G_AB.onnx").read_bytes()[:9000])
    onnx = pytest.importorskip("onnx")
    model = onnx.load("G_AB.onnx")
    refusals = {
        "text": "no ONNX file",
        "half": "no ONNX file, or a part of one",
        "foreign": "does not say its channels",
        "two": "has 2 channels, the page shows 1 or 3",
        "huge": "says it was trained at [1,99999]",
        "sizeless": "does not say its size",
        "padded": 'says preprocess "pad", which the page cannot do',
        "unsigned": "takes values in [0,1], the page has them in [-1,1]",
    }
    metadata = {"foreign": {}, "two": {"channels": "2"}, "huge": {"channels": "3", "size": "[1, 99999]"}}
    metadata["sizeless"] = {"channels": "3"}
    metadata["padded"] = {"channels": "3", "size": "[40, 48]", "preprocess": '"pad"'}
    metadata["unsigned"] = {"channels": "3", "size": "[40, 48]", "range": "[0, 1]"}
    for name, values in metadata.items():
        onnx.helper.set_model_props(model, values)
        onnx.save(model, f"{name}.onnx")
    for name, reason in refusals.items():
        assert f"{name}.onnx: not a model for this page: {reason}" in choose(page, "#model", f"{name}.onnx")
    assert "translated in " in choose(page, "#model", "G_AB.onnx")
    assert page.is_visible("#after")
    Path("text.png").write_text("no image")
    assert "text.png: no image that this browser can read" in choose(page, "#image", "text.png")
    assert page.is_hidden("#after")  # an older result could be mistaken for this one's
    images = {"red.png": Image.new("RGB", (48, 40), "red"), "deep.png": Image.new("I;16", (48, 40))}
    images["scan.tif"] = noise_image(1, (48, 40), "L")
    for name, image in images.items():
        image.save(name)
    assert "red.png: one colour alone, of which normalisation would enlarge" in choose(page, "#image", "red.png")
    for name in ("deep.png", "scan.tif"):
        assert f"{name}: may have more than 8 bits" in choose(page, "#image", name)
    Image.new("L", (8000, 5000)).save("large.png")
    assert "large.png: 8000×5000 px are too large" in choose(page, "#image", "large.png")
    assert "translated in " in choose(page, "#image", "good.png")


def drop(page, path):
    """Drop a file on the page and wait; returns the page's message."""
    page.set_input_files("#image", [])
    page.evaluate("""() => {
        const field = Object.assign(document.createElement("input"), { type: "file", id: "dropped", hidden: true });
        document.body.append(field);
    }""")
    page.set_input_files("#dropped", path)
    page.evaluate("""() => {
        const field = document.getElementById("dropped"), dataTransfer = new DataTransfer();
        dataTransfer.items.add(field.files[0]);
        field.remove();
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
    }""")
    page.wait_for_selector("#inputs:enabled")
    return page.inner_text("#message")


@in_browser
def test_files_can_be_dropped_and_a_wrong_one_leaves_the_model_in_use(open_page):
    export_generator()
    page = open_page("G_AB.onnx")
    noise_image(1, (48, 40)).save("good.png")
    assert drop(page, "good.png").startswith("translated in ")
    about = page.inner_text("#about")
    Path("text.onnx").write_text("no model")
    Path("notes.txt").write_text("no model")
    onnx = pytest.importorskip("onnx")
    model = onnx.load("G_AB.onnx")
    model.graph.output[0].name = next(node.output[0] for node in model.graph.node if node.op_type == "Conv")
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    onnx.save(model, "cut.onnx")  # runs, but its output is no image
    assert "text.onnx: not a model for this page: no ONNX file" in drop(page, "text.onnx")
    assert "cut.onnx: not a model for this page: " in drop(page, "cut.onnx")
    assert "notes.txt: neither an image nor a generator" in drop(page, "notes.txt")
    assert page.inner_text("#about") == about
    assert drop(page, "good.png").startswith("translated in ")
    shutil.copy("G_AB.onnx", "other.onnx")
    drop(page, "other.onnx")
    assert page.inner_text("#about") == "other.onnx: AtoB, of tiny, trained at 48×40 px"


@in_browser
@pytest.mark.parametrize("with_model", [True, False])
def test_without_the_runtime_the_page_says_what_to_do(open_page, site, with_model):
    shutil.rmtree(site / "node_modules")
    if with_model:
        export_generator()
        assert "run npm ci" in open_page("G_AB.onnx").inner_text("#message")
        return
    page = open_page()
    assert "no model.onnx beside this page" in page.inner_text("#message")
    Path("any.onnx").write_bytes(b"")  # nothing can read it
    for _ in range(2):
        assert "run npm ci" in choose(page, "#model", "any.onnx")


# ---------------------------------------------------------------------------------------------
# The camera


def write_film(path, frames=30, size=(96, 80)):
    """Write what the fake camera films: dark on the left, bright on the right, and a bar that moves down."""
    width, height = size
    chroma = bytes([90]) * (width * height // 4) + bytes([150]) * (width * height // 4)
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{width} H{height} F30:1 Ip A1:1 C420mpeg2\n".encode())
        for i in range(frames):
            luma = np.tile(np.linspace(20, 180, width, dtype=np.uint8), (height, 1))
            luma[i * height // frames :][:8] = 230
            file.write(b"FRAME\n" + luma.tobytes() + chroma)


@pytest.fixture
def camera():
    """Options of a browser with a camera."""
    write_film(Path("camera.y4m"))
    return [*CAMERA, "--disable-gpu", f"--use-file-for-fake-video-capture={Path('camera.y4m').resolve()}"]


def start_camera(page):
    page.click("#camera")
    page.wait_for_selector("#live:not([hidden])")
    page.locator("#speed", has_text=re.compile("[1-9].* frames")).wait_for()


def save_still(page):
    """Save the newest frame and its translation; returns both as arrays."""
    with page.expect_download() as waiting:
        page.click("#still")
    page.wait_for_selector("#inputs:enabled")
    with Image.open(waiting.value.path()) as image:
        pixels = np.asarray(image.convert("RGB"))
    return np.split(pixels, 2, axis=1)


def other_still(page, still):
    """Save stills until the camera's frame is another one; the film has a second frame within a second."""
    for _ in range(1000):
        newer = save_still(page)
        if not np.array_equal(newer[0], still[0]):
            return newer
    raise AssertionError("the camera stands still")


def largest_difference(net, frame, translation):
    """Between a frame's translation and PyTorch's, in levels of 255."""
    with torch.no_grad():
        expected = tensor_to_image(net(image_to_tensor(Image.fromarray(frame))[None])[0])
    return np.abs(np.asarray(expected).astype(int) - translation).max()


@in_browser
def test_camera_frames_are_mirrored_and_translated_as_pytorch_does(open_page, camera):
    net = export_generator()
    page = open_page("G_AB.onnx", camera)
    start_camera(page)
    cores = page.evaluate("navigator.hardwareConcurrency")
    threads = f"{min(cores, 4)} threads" if cores > 1 else "one thread"
    speed = page.inner_text("#speed")
    assert re.fullmatch(rf"[\d.]+ frames a second, 48×40 px, WebAssembly, {threads}", speed), speed
    first = save_still(page)
    second = other_still(page, first)
    for frame, translation in (first, second):
        assert frame.shape == translation.shape == (40, 48, 3)
        assert largest_difference(net, frame, translation) <= 2
        assert frame[:, :8].mean() > frame[:, -8:].mean() + 40  # mirrored: the bright side is on the left
    assert not np.array_equal(first[1], second[1])
    page.select_option("#side", json.dumps({"width": 128, "height": 107}, separators=(",", ":")))
    page.locator("#speed", has_text="128×107 px").wait_for()
    assert largest_difference(net, *save_still(page)) <= 2
    for state in ("off", "on", "off"):
        page.click("#camera")
        page.wait_for_selector("#inputs:enabled")
        assert page.inner_text("#message") == f"the camera is {state}"
    assert page.is_hidden("#live")
    noise_image(1, (48, 40)).save("still.png")
    assert choose(page, "#image", "still.png").startswith("translated in ")


COUNT_FRAMES = """
const { postMessage } = Worker.prototype, { start, stop } = MediaRecorder.prototype;
let frames = 0;
globalThis.counts = [];  // frames sent to the worker: when recording starts, and when it stops
Worker.prototype.postMessage = function (message, ...rest) {
  const send = () => postMessage.call(this, message, ...rest);
  if (message.task !== "translate") return send();
  frames += 1;
  setTimeout(send, 60);  // longer than a camera frame takes, so that one is always being translated
};
MediaRecorder.prototype.start = function () { counts.push(frames); start.call(this); };
MediaRecorder.prototype.stop = function () { counts.push(frames); stop.call(this); };
"""


@in_browser
def test_the_last_two_seconds_are_saved_as_a_video_and_the_camera_goes_on(open_page, camera):
    export_generator()
    page = open_page("G_AB.onnx", camera, script=COUNT_FRAMES)
    start_camera(page)
    page.wait_for_timeout(2500)
    with page.expect_download() as waiting:
        page.click("#film")
    page.wait_for_selector("#inputs:enabled")
    assert waiting.value.suggested_filename == "camera.webm"
    film = Path(waiting.value.path()).read_bytes()
    assert film[:4] == b"\x1a\x45\xdf\xa3"  # Matroska, and so WebM
    begin, end = page.evaluate("counts")
    assert begin == end > 0  # no frame is translated during the recording
    other_still(page, save_still(page))
    player = page.context.browser.new_page()
    width, height, seconds = player.evaluate(
        """async (text) => {
            const film = document.createElement("video");
            film.src = URL.createObjectURL(new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))]));
            await new Promise((resolve, reject) => { film.onloadeddata = resolve; film.onerror = reject; });
            const end = new Promise((resolve) => { film.onseeked = resolve; });
            film.currentTime = 60;  // seeks to the end; the header does not have the length
            await end;
            return [film.videoWidth, film.videoHeight, film.currentTime];
        }""",
        base64.b64encode(film).decode(),
    )
    assert (width, height) == (2 * 48 * 6, 40 * 6)
    assert 1.3 < seconds < 3


@in_browser
def test_a_page_without_the_isolating_headers_runs_one_thread_and_says_so(open_page, site, camera):
    class Plain(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(site))

        def log_message(self, *args):
            pass

    net = export_generator()
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Plain)) as address:
        page = open_page("G_AB.onnx", camera, address)
        start_camera(page)
        reason = "WebAssembly, one thread, since this page came without the headers that serve.py sends"
        assert reason in page.inner_text("#speed")
        assert largest_difference(net, *save_still(page)) <= 2


@in_browser
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("NotAllowedError", "refused"),
        ("NotFoundError", "no camera was found"),
        ("NotReadableError", "close what else uses it"),
    ],
)
def test_a_camera_that_cannot_be_used_is_one_line_on_the_page(open_page, fault, reason):
    export_generator()
    refuse = f"navigator.mediaDevices.getUserMedia = async () => {{ throw new DOMException('', '{fault}'); }}"
    page = open_page("G_AB.onnx", script=refuse)
    page.click("#camera")
    page.wait_for_selector("#message.error")
    assert reason in page.inner_text("#message")
    assert page.inner_text("#camera") == "Start the camera"
    noise_image(1, (48, 40)).save("good.png")
    assert choose(page, "#image", "good.png").startswith("translated in ")


# ---------------------------------------------------------------------------------------------
# WebGPU

FAKE_GPU = """
import * as real from "./ort.wasm.bundle.min.mjs";
export const env = { wasm: {} };
export const InferenceSession = { async create(buffer) {
  const session = await real.InferenceSession.create(buffer), { inputNames, outputNames, release } = session;
  async function run(feeds) {
    const { [outputNames[0]]: output } = await session.run(feeds);
    FAULT
    return { [outputNames[0]]: output };
  }
  return { inputNames, outputNames, run, release: () => session.release() };
} };
"""
FAULTS = {
    "": "WebGPU",
    "throw new Error('Only Conv2d or Conv1d are supported.');": "WebAssembly",
    "output.data[7] += 0.1;": "WebAssembly",  # wrong in one pixel
    "output.data.fill(NaN);": "WebAssembly",
}


def device_of(page):
    """Which device translates the camera's frames."""
    start_camera(page)
    return re.search("WebGPU|WebAssembly", page.inner_text("#speed"))[0]


@pytest.fixture
def gpu_flags(camera):
    return [flag for flag in camera if flag != "--disable-gpu"] + SOFTWARE_GPU


@in_browser
def test_webgpu_is_used_only_if_its_outputs_equal_those_of_webassembly(open_page, site, gpu_flags):
    net = export_generator()
    page = open_page("G_AB.onnx", gpu_flags)
    assert device_of(page) == "WebAssembly"  # chosen automatically: there is no graphics card
    for fault, device in FAULTS.items():
        runtime = site / RUNTIME / "ort.webgpu.bundle.min.mjs"
        runtime.unlink()
        runtime.write_text(FAKE_GPU.replace("FAULT", fault))
        page.goto(page.url.split("?")[0] + "?device=webgpu")
        page.wait_for_selector("#inputs:enabled")
        assert device_of(page) == device, fault
        assert largest_difference(net, *save_still(page)) <= 2


@in_browser
def test_on_webgpu_frames_are_translated_as_pytorch_does(open_page, gpu_flags):
    net = export_generator(size=(16, 16))  # in software, but with the same shaders
    page = open_page("G_AB.onnx", gpu_flags, query="?device=webgpu")
    if page.evaluate("navigator.gpu?.requestAdapter().then((adapter) => !adapter) ?? true"):
        pytest.skip("this Chromium has no WebGPU in software")
    assert device_of(page) == "WebGPU"
    assert largest_difference(net, *save_still(page)) <= 2
