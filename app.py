"""Translate photos in the browser: before and after, round trip, teacher beside students, many files as a zip.

python app.py
python app.py --weights saved_models/horse2zebra/G_AB.safetensors
python app.py --host 0.0.0.0 --port 8080 --max_mb 8

Uploads are kept in a temporary folder, which is deleted when the app ends. Nothing is sent anywhere.
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import functools
import json
import os
import secrets
import socket
import tempfile
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from datasets import MAX_MEGAPIXELS
from models import Direction
from toolkit import cli, images, process
from toolkit.converters import ASSUME
from toolkit.checkpoints import ASIDE, RUNS, recover
from toolkit.devices import DeviceConfig
from toolkit.files import atomic_write
from toolkit.inference import Translator, load_networks, output_image, unique_name
from utils import InputError, domain_names, need_package, one_line, option, say

HERE = Path(__file__).parent
LOCAL = ("127.0.0.1", "localhost", "::1")  # hosts that only this machine reaches
CSS = """
img { object-fit: contain !important; width: 100% !important; height: 100% !important }  /* also small images */
.caption-label { white-space: normal !important; max-width: 100% !important }  /* the milliseconds are at its end */
"""


@dataclass(frozen=True)
class AppConfig(DeviceConfig):
    """Which networks are shown, and to whom."""

    weights: Path | None = option(None, "generator file to list first", metavar="FILE")
    assume: tuple[str, ...] = ASSUME
    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0 admits the whole network")
    port: int = option(7860, "port to listen at", least=1, most=65535)
    max_mb: float = option(20.0, "largest file to upload, in MiB", above=0, most=10**4)
    max_megapixels: float = MAX_MEGAPIXELS


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="app.py", description=__doc__)
    cli.add_options(parser, "app", AppConfig)
    args = parser.parse_args(argv)
    if args.assume and not args.weights:
        parser.error("--assume: has no effect without --weights; give both or none")
    return args


def find_runs(generator: str = "G_??") -> list[str]:
    """Return the names of the runs that hold a generator, the newest first."""
    for folder in RUNS.glob(f"*/{ASIDE}"):  # of a run whose overwriting was killed
        with suppress(InputError, OSError):
            recover(folder.parent.name)
    paths = sorted(RUNS.glob(f"*/{generator}.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    return list(dict.fromkeys(path.parent.name for path in paths))


@functools.lru_cache(maxsize=4)
def load_translator(config: AppConfig, name: str, file: Path | None, scale: str, times: tuple[int, ...]) -> Translator:
    """Load networks as test.py does; `times` are those of their files, so that a run in training is loaded again."""
    networks, metadata = load_networks(file, name, assumed=config.assume if file == config.weights else ())
    return Translator(networks, metadata, config.device, config.precision, scale, hint=show_hint)


def show_hint(path: Path, text: str) -> None:
    """Show something about the image in the page."""
    import gradio as gr

    gr.Info(text)


def list_networks(config: AppConfig) -> dict[str, Path | None]:
    """Return the generator file, or None for a run, of each name in the list: --weights, runs, the included students."""
    given = {str(config.weights): config.weights} if config.weights else {}
    included = [f"examples/{name}.safetensors" for name in ("horse2zebra", "zebra2horse", "day2night")]
    # twice: the first in the list, and before others of the same name
    return given | dict.fromkeys(find_runs()) | {name: HERE / name for name in included} | given


def open_network(config: AppConfig, name: str | None, scale: str = "train") -> Translator:
    """Return the networks of a name in the list, or of a typed path; scale: "train", or "native" for images' own size."""
    listed = list_networks(config)
    may_type = config.host in LOCAL  # visitors of an open app must not learn which files exist
    if not name or not isinstance(name, str) or not (may_type or name in listed):
        raise InputError(f"network {name}: not in the list; choose one of the list, or reload the page")
    file = listed.get(name, Path(name))
    paths = [file] if file else sorted((RUNS / name).glob("G_??.safetensors"))
    return load_translator(config, name, file, scale, tuple(path.stat().st_mtime_ns for path in paths if path.exists()))


def teacher_of(run_name: str, direction: Direction) -> str | None:
    """Return the teacher of a run that was distilled in a direction; None for other runs."""
    try:
        flags = json.loads((RUNS / run_name / "run.json").read_text(encoding="utf-8"))["flags"]
        teacher = Path(flags["teacher"])  # a run, or a file, possibly of a run
        if flags["direction"] not in (str(direction), "both"):
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # no student, or a run without its run.json
        return None
    return teacher.parent.name if teacher.parent.parent == RUNS else str(teacher)


def related_runs(name: str, direction: Direction) -> list[str]:
    """Return a teacher, first, and its students in a direction, among which a run is; none for a run without, or a file."""
    teachers = {run: teacher_of(run, direction) for run in find_runs(direction.generator)}
    teacher = teachers.get(name) or name
    related = sorted((run for run in teachers if teacher in (run, teachers[run])), key=lambda run: run != teacher)
    return related if name in related and len(related) > 1 else []


def uploaded_path(folder: Path, upload: Any) -> str | None:
    """Return the path of an upload, which gradio keeps in a folder; a client may name any other file of this machine."""
    if upload and not Path(upload.path).resolve().is_relative_to(folder.resolve()):
        import gradio as gr

        raise gr.Error("no uploaded image; upload it first", print_exception=False)
    return upload and upload.path


def load_upload(translator: Translator, direction: Direction, path: Path) -> tuple[Image.Image, Tensor]:
    """Read an uploaded file as an image and as (1, C, H, W) in [-1, 1] for the networks; InputError if it cannot be."""
    loaded = translator.load(path, direction.source)
    if loaded.reason:
        reason = str(loaded.reason).replace(str(path), path.name)
        raise InputError(f"{path.name}: {reason}; expected an image such as PNG or JPEG")
    count = images.pages_in(path)
    if count > 1:
        translator.say_once("pages", path, f"holds {count} images, of which the first is translated")
    return images.to_8_bit(loaded.image), images.image_to_tensor(loaded.network_input, translator.channels)[None]


def translate_file(
    translator: Translator, direction: Direction, path: Path
) -> tuple[Image.Image, Image.Image, Image.Image | None]:
    """Return image, translation and, if there is a network for it, round trip, at the image's own size."""
    net, back = translator.generators(direction)
    image, real = load_upload(translator, direction, path)
    fake = translator(net, real)
    rec = output_image(translator(back, fake)[0], image.size) if back else None
    return image, output_image(fake[0], image.size), rec


def compare_runs(
    translators: Mapping[str, Translator], direction: Direction, path: Path
) -> list[tuple[Image.Image, str]]:
    """Translate a file with several runs; each caption has the run's name, its milliseconds and its size."""
    compared = []
    for name, translator in translators.items():
        net, _ = translator.generators(direction)
        image, real = load_upload(translator, direction, path)
        if not translator.tile_for(*real.shape[-2:]):
            translator(net, real).cpu()  # warms up; tiles take long enough without
        start = time.perf_counter()
        fake = translator(net, real).cpu()
        milliseconds = 1000 * (time.perf_counter() - start)
        millions = sum(weight.numel() for weight in net.parameters()) / 1e6
        caption = f"{name}: {milliseconds:.1f} ms, {millions:.2f} M weights"
        compared.append((output_image(fake[0], image.size), caption))
    return compared


def in_page(function: Callable) -> Callable:
    """Show a visitor's error in the page, in one sentence, instead of ending the app."""
    import gradio as gr

    @functools.wraps(function)
    def run(*inputs: object) -> object:
        try:
            return function(*inputs)
        except InputError as error:
            message = str(error)
        except OSError as error:
            message = error.strerror or str(error)
        except (MemoryError, torch.OutOfMemoryError):
            message = "out of memory; take a smaller image"
        raise gr.Error(one_line(message), print_exception=False)

    return run


def refresh(config: AppConfig) -> Any:
    """Return the list of networks, the first one chosen."""
    import gradio as gr

    names = list(list_networks(config))
    return gr.Dropdown(names, value=names[0], info="or the path of a generator file" if config.host in LOCAL else None)


def choose_network(config: AppConfig, name: str | None, direction: str | None) -> list:
    """Return the choice among the directions of a network, and whether the round trip is visible."""
    import gradio as gr

    translator = open_network(config, name)
    names = domain_names(str(translator.metadata.get("dataset_name")), translator.metadata.get("domains"))
    domains = dict(zip("AB", names, strict=True))
    choices = [(f"{domains[way.source]} → {domains[way.target]}", str(way)) for way in translator.directions]
    value = direction if direction in dict(choices).values() else choices[0][1]
    return [gr.Radio(choices, value=value), gr.update(visible=len(choices) == 2)]


def translate_photo(config: AppConfig, name: str | None, direction: str, scale: str, photo: str | None) -> list:
    """Return translation, round trip, before and after, and the translations of related runs."""
    import gradio as gr

    translator = open_network(config, name, scale)
    translator.said.clear()  # hints about this image
    if not photo:
        raise InputError("no image given; drop one, or take a photo")
    chosen = Direction.named(direction)
    image, fake, rec = translate_file(translator, chosen, Path(photo))
    translators = {other: open_network(config, other, scale) for other in related_runs(name or "", chosen)}
    compared = compare_runs(translators, chosen, Path(photo))
    related = gr.update(value=compared, visible=bool(compared))  # a new Gallery would also write them as lossy WebP
    return [fake, rec, (image, fake), related]


def translate_to_zip(
    config: AppConfig, folder: Path, name: str | None, direction: str, scale: str, paths: list[str] | None
) -> list:
    """Return a zip of the translations, under the names of their files, and a list of the files that were left out.

    folder: where gradio deletes old files; each zip has a sub-folder of its own, whose name nobody can guess
    """
    import gradio as gr

    translator = open_network(config, name, scale)
    chosen = Direction.named(direction)
    net, _ = translator.generators(chosen)
    output = folder / secrets.token_urlsafe() / f"{direction}.zip"
    output.parent.mkdir()
    errors = []
    taken: set[str] = set()
    with atomic_write(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:  # PNGs cannot be compressed
        for path in gr.Progress().tqdm([Path(path) for path in paths or []], unit="images"):
            try:
                image, real = load_upload(translator, chosen, path)
            except InputError as error:
                errors.append(one_line(error))
                continue
            fake = output_image(translator(net, real)[0], image.size)
            result = unique_name(Path(path.stem), taken.__contains__)
            taken.add(str(result).lower())
            with archive.open(f"fake_{chosen.target}/{result}", "w") as file:
                fake.save(file, format="PNG")
        if not taken:
            raise InputError(errors[0] if errors else "no file given; drop some images first")
    return [str(output), "\n".join(f"* left out: {error}" for error in errors)]


def build_page(config: AppConfig, folder: Path) -> Any:
    """Lay out the page and connect its buttons; folder: for the zips."""
    import gradio as gr

    title = "CycleGAN: translate images"
    scales = [("training size", "train"), ("own size", "native")]
    look: dict[str, Any] = {"format": "png", "height": 300, "buttons": ["download", "fullscreen"]}  # PNG: lossless
    with gr.Blocks(title=title, fill_width=True, delete_cache=(600, 3600)) as page:  # s; each 10 min, after an hour
        gr.Markdown(f"# {title}")
        with gr.Row():
            network = gr.Dropdown([], label="network", allow_custom_value=config.host in LOCAL)
            direction = gr.Radio([("A → B", "AtoB")], value="AtoB", label="direction")  # until choose_network
            scale = gr.Radio(scales, value="train", label="size in the network")
        with gr.Tab("One image"):
            with gr.Row():
                horse = None if config.weights or find_runs() else str(HERE / "examples/horse.jpg")
                photo = gr.Image(horse, height=340, label="input")  # with a bar of 40 px
                fake = gr.Image(label="translation", interactive=False, **look)
                rec = gr.Image(label="round trip", interactive=False, visible=False, **look)
            button = gr.Button("Translate", variant="primary")
            with gr.Row():
                slider = gr.ImageSlider(label="before and after", interactive=False, **look)
                related = gr.Gallery(label="teacher and students", visible=False, columns=2, **look)
        with gr.Tab("Many images"):
            paths = gr.File(file_count="multiple", file_types=sorted(images.SUFFIXES), label="images")
            zip_button = gr.Button("Translate into a zip", variant="primary")
            zipped = gr.File(label="zip", interactive=False)
            errors = gr.Markdown()
        photo.preprocess = functools.partial(uploaded_path, folder)  # ty: ignore  # gradio's own fails with a traceback
        page.load(functools.partial(refresh, config), None, network, api_name="refresh")
        choose = in_page(functools.partial(choose_network, config))
        network.change(choose, [network, direction], [direction, rec], api_name="choose")  # also when refresh sets it
        alone: dict[str, Any] = {"concurrency_id": "networks", "concurrency_limit": 1}  # or times would include others
        show = in_page(functools.partial(translate_photo, config))
        button.click(show, [network, direction, scale, photo], [fake, rec, slider, related], api_name="show", **alone)
        pack = in_page(functools.partial(translate_to_zip, config, folder))
        zip_button.click(pack, [network, direction, scale, paths], [zipped, errors], api_name="pack", **alone)
    return page


def refuse_taken(host: str, port: int) -> None:
    """Raise InputError if a program cannot listen at an address."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}; take a free port of this machine") from None


@process.command
def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    config = cli.config_of(AppConfig, parse_args(argv))
    refuse_taken(config.host, config.port)
    if config.weights:
        open_network(config, str(config.weights))  # refused here rather than in the page
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    need_package("gradio", "app.py", "pip install -r requirements-app.txt")
    images.limit_pixels(1e6 * config.max_megapixels)
    host = f"[{config.host}]" if ":" in config.host else config.host  # IPv6 as in an address
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(config, Path(folder))
        page.launch(
            server_name=host,
            server_port=config.port,
            max_file_size=round(2**20 * config.max_mb),
            share=False,
            ssr_mode=False,
            footer_links=[],
            css=CSS,
            prevent_thread_lock=True,
            quiet=True,
        )
        others = "" if config.host in LOCAL else ", which everyone in the network can use"
        say(f"open http://{host}:{config.port}{others} ; Ctrl-C ends it")
        try:
            while True:
                time.sleep(1)  # gradio's own wait would swallow Ctrl-C and SIGTERM
        finally:
            page.close()


if __name__ == "__main__":
    main()
