"""Translate photos in the browser: before and after, round trip, teacher beside students, many files as a zip.

python app.py
python app.py --weights saved_models/horse2zebra/G_AB.safetensors
python app.py --host 0.0.0.0 --port 8080 --max_mb 8

Uploads are kept in a temporary folder, which is deleted when the app ends. Nothing is sent anywhere.
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import functools
import ipaddress
import json
import os
import secrets
import socket
import tempfile
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from datasets import MAX_MEGAPIXELS
from models import DIRECTIONS, Direction
from toolkit import cli, images, metrics, process
from toolkit.checkpoints import RUNS
from toolkit.devices import DeviceConfig
from toolkit.files import atomic_write
from toolkit.inference import LoadedImage, Translator, load_networks, output_image, unique_name
from toolkit.weights import METADATA_KEY
from utils import InputError, RunError, existing_or_new_path, folder_name, need_package, one_line, option, say

NO_RUN = (
    "no run in saved_models yet; try --weights examples/horse2zebra.safetensors, or train one with make demo, "
    "or python train.py --dataset_name NAME, then reload"
)
SIZE = [256, 256]  # height and width in px for networks whose file does not say their training size: the paper's
TITLE = "CycleGAN: translate images"
TILE = 512  # px a side; at its own size a larger image is translated in tiles, to limit memory
REPEATS = 3  # timed passes, whose median is shown
KEEP = 3600  # seconds until an upload or a zip is deleted
CSS = """
img { object-fit: contain !important; width: 100% !important; height: 100% !important }  /* also small images */
.caption-label { white-space: normal !important; max-width: 100% !important }  /* the milliseconds are at its end */
"""


@dataclass(frozen=True)
class AppOptions:
    """Which networks are shown, and to whom."""

    weights: Path | None = option(None, "generator file, instead of runs", parse=existing_or_new_path, metavar="FILE")
    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0 admits the whole network")
    port: int = option(7860, "port to listen at", least=1, most=65535)
    max_mb: float = option(20.0, "largest file to upload, in MiB", above=0, most=10**4)
    max_megapixels: float = MAX_MEGAPIXELS


@dataclass(frozen=True)
class AppConfig(AppOptions, DeviceConfig):
    """All options of the app."""


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="app.py", description=__doc__)
    cli.add_options(parser, "app", AppOptions)
    cli.add_options(parser, "speed", DeviceConfig)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------
# Runs and their networks


def trained_steps(path: Path) -> int:
    """Return after how many steps a generator file was saved; 0 if it does not say, or cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return int(json.loads((file.metadata() or {})[METADATA_KEY])["step"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def find_runs(directions: Sequence[Direction] = DIRECTIONS) -> list[str]:
    """Return the names of runs with a generator of one of the directions: longest training first, then newest."""
    ranks: dict[str, tuple[int, float]] = {}
    for direction in directions:
        for path in RUNS.glob(f"*/{direction.generator}.safetensors"):
            rank = (trained_steps(path), path.stat().st_mtime)
            ranks[path.parent.name] = max(rank, ranks.get(path.parent.name, rank))
    return sorted(ranks, key=lambda name: ranks[name], reverse=True)


@functools.lru_cache(maxsize=4)
def load_translator(
    weights: Path | None, run_name: str, device: str, precision: str, scale: str, times: tuple[int, ...]
) -> Translator:
    """Load networks as test.py does; `times` are those of their files, so that a run in training is loaded again."""
    networks, metadata = load_networks(weights, run_name)
    metadata["size"] = metadata["size"] or SIZE
    return Translator(networks, metadata, device, precision, scale, TILE if scale == "native" else None)


def open_run(config: AppConfig, run_name: str | None, scale: str = "train") -> Translator:
    """Return the networks of --weights or of a run; scale: "train", or "native" for images at their own size."""
    if config.weights:
        paths = [config.weights]
    elif run_name:
        try:
            paths = sorted((RUNS / folder_name(run_name)).glob("G_??.safetensors"))
        except ValueError as error:  # a name that is not from the page's list
            raise InputError(f"run: {error}") from None
    else:
        raise InputError(NO_RUN)
    times = tuple(path.stat().st_mtime_ns for path in paths if path.is_file())
    return load_translator(config.weights, run_name or "", config.device, config.precision, scale, times)


def teacher_of(run_name: str, direction: Direction) -> str | None:
    """Return the teacher of a run that was distilled in a direction; None for other runs."""
    try:
        saved = json.loads((RUNS / run_name / "run.json").read_text(encoding="utf-8"))["flags"]
        teacher = Path(saved["teacher"])  # a run, or a file, possibly of a run
        if saved["direction"] not in (str(direction), "both"):
            return None
        return teacher.parent.name if teacher.parent.parent == RUNS else str(teacher)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # a run can be shown without its run.json
        return None


def related_runs(run_name: str, direction: Direction) -> list[str]:
    """Return a teacher and its students in a direction, among which a run is; the run alone if it has neither."""
    runs = find_runs([direction])
    teachers = {name: teacher_of(name, direction) for name in runs}
    teacher = teachers.get(run_name) or run_name
    related = [name for name in runs if teachers[name] == teacher]
    if teacher in runs:
        related.insert(0, teacher)
    return related or [run_name]


# ---------------------------------------------------------------------------------------------
# Translating


def load_upload(translator: Translator, path: Path) -> LoadedImage:
    """Read an uploaded file; raise InputError if it is no image, or is too large or too small."""
    loaded = translator.load(path)
    if loaded.reason:
        reason = str(loaded.reason).replace(str(path), path.name)
        raise InputError(f"{path.name}: {reason}; expected an image such as PNG or JPEG")
    return loaded


def translate_file(
    translator: Translator, direction: Direction, path: Path
) -> tuple[Image.Image, Image.Image, Image.Image | None]:
    """Return image, translation and, if there is a network for it, round trip, at the image's own size."""
    net, back = translator.generators(direction)
    loaded = load_upload(translator, path)
    fake = translator(net, images.image_to_tensor(loaded.network_input)[None])
    rec = output_image(translator(back, fake)[0], loaded.image.size) if back else None
    return loaded.image, output_image(fake[0], loaded.image.size), rec


def timed(translator: Translator, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Return the output of a network and its milliseconds: the median of several passes, with tiles those of one."""
    before = translator.seconds
    output = run()
    if translator.tile and max(output.shape[-2:]) > translator.tile:
        return output, 1000 * (translator.seconds - before)
    return output, metrics.median_ms(run, REPEATS)


def compare_runs(
    translators: Mapping[str, Translator], direction: Direction, path: Path
) -> list[tuple[Image.Image, str]]:
    """Translate a file with several runs; each caption has the run's name, its milliseconds and its size."""
    compared = []
    for name, translator in translators.items():
        net, _ = translator.generators(direction)
        loaded = load_upload(translator, path)
        run = functools.partial(translator, net, images.image_to_tensor(loaded.network_input)[None])
        millions = sum(weight.numel() for weight in net.parameters()) / 1e6
        fake, milliseconds = timed(translator, run)
        caption = f"{name}: {milliseconds:.1f} ms, {millions:.2f} M weights"
        compared.append((output_image(fake[0], loaded.image.size), caption))
    return compared


def translate_batch(translator: Translator, direction: Direction, paths: Iterable[Path], output: Path) -> list[str]:
    """Write the translations of files into a zip, under the names of their files; return what is wrong with others.

    raises: InputError if no file can be translated; no zip is written then
    """
    net, _ = translator.generators(direction)
    errors = []
    taken: set[str] = set()
    with atomic_write(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:  # PNGs cannot be compressed
        for path in paths:
            try:
                loaded = load_upload(translator, path)
            except InputError as error:
                errors.append(str(error))
                continue
            name = unique_name(Path(path.stem), taken)
            fake = translator(net, images.image_to_tensor(loaded.network_input)[None])
            with archive.open(f"fake_{direction.target}/{name}", "w") as file:
                output_image(fake[0], loaded.image.size).save(file, format="PNG")
        if not taken:
            raise InputError(errors[0] if errors else "no file given; drop some images first")
    return errors


# ---------------------------------------------------------------------------------------------
# What the buttons of the page do


def in_page(function: Callable) -> Callable:
    """Show a visitor's error in the page, in one sentence, instead of ending the app."""
    import gradio

    @functools.wraps(function)
    def run(*inputs: object) -> object:
        try:
            return function(*inputs)
        except (InputError, RunError) as error:
            message = str(error)
        except OSError as error:
            message = f"{Path(error.filename or 'output').name}: {error.strerror or error}"
        except (MemoryError, torch.OutOfMemoryError):
            message = "out of memory; take a smaller image"
        raise gradio.Error(one_line(message), print_exception=False)

    return run


def refresh(config: AppConfig) -> list:
    """Return the notice, which is hidden if there is a run, and the list of runs."""
    import gradio as gr

    runs = [config.weights.name] if config.weights else find_runs()
    notice = gr.Markdown(f"**{NO_RUN[0].upper()}{NO_RUN[1:]} this page.**", visible=not runs)
    return [notice, gr.Dropdown(runs, value=runs[0] if runs else None)]


def translate_photo(config: AppConfig, run_name: str | None, direction: str, scale: str, photo: str | None) -> list:
    """Return translation, round trip, before and after, and the translations of related runs."""
    import gradio as gr

    translator = open_run(config, run_name, scale)
    if not photo:
        raise InputError("no image given; drop one, or take a photo")
    chosen = Direction.named(direction)
    image, fake, rec = translate_file(translator, chosen, Path(photo))
    names = related_runs(run_name, chosen) if run_name and not config.weights else []
    translators = {name: open_run(config, name, scale) for name in names if len(names) > 1}
    compared = compare_runs(translators, chosen, Path(photo))
    related = gr.update(value=compared, visible=bool(translators))  # a new Gallery would also write them as lossy WebP
    return [fake, rec, (image, fake), related]


def translate_to_zip(
    config: AppConfig, folder: Path, run_name: str | None, direction: str, scale: str, paths: list[str] | None
) -> list:
    """Return a zip of many translations, and a list of the files that were left out.

    folder: where gradio deletes old files; each zip has a sub-folder of its own, whose name nobody can guess
    """
    import gradio as gr

    output = folder / secrets.token_urlsafe() / f"{direction}.zip"
    output.parent.mkdir()
    uploads = gr.Progress().tqdm([Path(path) for path in paths or []], unit="images")
    errors = translate_batch(open_run(config, run_name, scale), Direction.named(direction), uploads, output)
    return [str(output), "\n".join(f"* left out: {one_line(error)}" for error in errors)]


# ---------------------------------------------------------------------------------------------
# The page


def build_page(config: AppConfig, folder: Path) -> Any:
    """Lay out the page and connect its buttons; folder: for the zips."""
    import gradio as gr

    directions = open_run(config, None).directions if config.weights else DIRECTIONS
    choices = [(f"{direction.source} → {direction.target}", str(direction)) for direction in directions]
    scales = [("training size", "train"), ("own size", "native")]
    look: dict[str, Any] = {"format": "png", "height": 300, "buttons": ["download", "fullscreen"]}  # PNG: lossless
    with gr.Blocks(title=TITLE, fill_width=True, delete_cache=(KEEP // 6, KEEP)) as page:
        gr.Markdown(f"# {TITLE}")
        notice = gr.Markdown(visible=False)
        with gr.Row():
            run = gr.Dropdown([], label="run")
            direction = gr.Radio(choices, value=choices[0][1], label="direction")
            scale = gr.Radio(scales, value="train", label="size in the network")
        with gr.Tab("One image"):
            with gr.Row():
                photo = gr.Image(height=340, label="input")  # with a bar of 40 px
                fake = gr.Image(label="translation", interactive=False, **look)
                rec = gr.Image(label="round trip", interactive=False, visible=not config.weights, **look)
            button = gr.Button("Translate", variant="primary")
            with gr.Row():
                slider = gr.ImageSlider(label="before and after", interactive=False, **look)
                related = gr.Gallery(label="teacher and students", visible=False, columns=2, **look)
        with gr.Tab("Many images"):
            paths = gr.File(file_count="multiple", file_types=sorted(images.SUFFIXES), label="images")
            zip_button = gr.Button("Translate into a zip", variant="primary")
            zipped = gr.File(label="zip", interactive=False)
            errors = gr.Markdown()
        photo.preprocess = lambda upload: upload and upload.path  # ty: ignore  # gradio's own fails with a traceback
        page.load(functools.partial(refresh, config), None, [notice, run], api_name="refresh")
        alone: dict[str, Any] = {"concurrency_id": "networks", "concurrency_limit": 1}  # or times would include others
        show = in_page(functools.partial(translate_photo, config))
        button.click(show, [run, direction, scale, photo], [fake, rec, slider, related], api_name="show", **alone)
        pack = in_page(functools.partial(translate_to_zip, config, folder))
        zip_button.click(pack, [run, direction, scale, paths], [zipped, errors], api_name="pack", **alone)
    return page


def refuse_taken(host: str, port: int) -> None:
    """Raise InputError if a program cannot listen at an address."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        reason = str(error.strerror).split(" (while")[0]  # Python repeats the address there
        free = port + 1 if 1024 <= port < 65535 else 7860
        raise InputError(
            f"--host {host} --port {port}: {reason}; "
            f"expected an address of this machine and a free port, such as --port {free}"
        ) from None


def url_host(host: str) -> str:
    """Return a host as URLs write it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def is_local(host: str) -> bool:
    """Whether only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def invitation(host: str, port: int) -> str:
    """Return the line that says where the page is, and who else can use it."""
    others = "" if is_local(host) else ", which everyone in the network can use"
    return f"open http://{url_host(host)}:{port}{others} ; Ctrl-C ends it"


@process.command
def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    config = cli.config_of(AppConfig, parse_args(argv))
    refuse_taken(config.host, config.port)
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    need_package("gradio", "app.py", "pip install -r requirements-app.txt")
    images.limit_pixels(1e6 * config.max_megapixels)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(config, Path(folder))
        page.launch(
            server_name=url_host(config.host),
            server_port=config.port,
            max_file_size=round(2**20 * config.max_mb),
            share=False,
            ssr_mode=False,
            footer_links=[],
            css=CSS,
            prevent_thread_lock=True,
            quiet=True,
        )
        say(invitation(config.host, config.port))
        try:
            while True:
                time.sleep(1)  # gradio's own wait would swallow Ctrl-C and SIGTERM
        finally:
            page.close()


if __name__ == "__main__":
    main()
