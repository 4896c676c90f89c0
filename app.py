"""Translate photos in the browser: before and after, the round trip, teacher beside student, a batch into a zip.

python app.py
python app.py --weights saved_models/horse2zebra/G_AB.safetensors
python app.py --host 0.0.0.0 --port 8080 --max_mb 8

Uploads live in a temporary folder that goes with the program; nothing is sent anywhere.
"""

import toolkit.startup  # noqa: F401, I001  (must come before torch)

import argparse
import functools
import ipaddress
import json
import os
import secrets
import socket
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

import utils
from toolkit import cli, images, metrics, process
from toolkit.checkpoints import RUNS
from toolkit.files import atomic_write
from toolkit.inference import DOMAINS, Source, Translator, free_name, load_networks, output_image
from toolkit.weights import METADATA_KEY
from utils import InputError

NO_RUN = (
    "no run in saved_models yet; try --weights examples/horse2zebra.safetensors, or train one with make demo, "
    "or python train.py --dataset_name NAME, then reload"
)
SIZE = [256, 256]  # height and width in px that a network sees whose file does not record it: those of the paper
TITLE = "CycleGAN: translate images"
SCALES = [("training size", "train"), ("own size", "native")]
TILE = 512  # px a side; at its own size a larger image comes in tiles, lest it fill the memory
REPEATS = 3  # timed passes; their median is shown
CSS = """
img { object-fit: contain !important; width: 100% !important; height: 100% !important }  /* small ones, too */
.caption-label { white-space: normal !important; max-width: 100% !important }  /* the milliseconds stand at its end */
"""
FORGET = 3600  # seconds after which an upload or a zip is deleted


# ---------------------------------------------------------------------------------------------
# Runs and their networks


def trained_steps(path: Path) -> int:
    """After how many steps a generator file was saved; 0 where it does not say, or cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return int(json.loads((file.metadata() or {})[METADATA_KEY])["step"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def find_runs(direction: str = "?To?") -> list[str]:
    """Names of the runs that have generators, or that of a direction: the longest-trained first, of equals the newest."""
    ranks: dict[str, tuple[int, float]] = {}
    for path in RUNS.glob(f"*/G_{direction[0]}{direction[-1]}.safetensors"):
        rank = (trained_steps(path), path.stat().st_mtime)
        ranks[path.parent.name] = max(rank, ranks.get(path.parent.name, rank))
    return sorted(ranks, key=lambda name: ranks[name], reverse=True)


@functools.lru_cache(maxsize=4)
def load_translator(
    weights: Path | None, run_name: str, device: str, precision: str, scale: str, stamps: tuple[int, ...]
) -> Translator:
    """Load networks as test.py does; stamps: times of their files, so that a training run shows its newest."""
    nets, metadata = load_networks(weights, run_name)
    metadata = {**metadata, "size": metadata["size"] or SIZE}
    return Translator(nets, metadata, device, precision, scale, TILE if scale == "native" else None)


def open_run(args: argparse.Namespace, run_name: str | None, scale: str = "train") -> Translator:
    """The networks of a run, or those of --weights; scale: "train", or "native" for images at their own size."""
    if not (args.weights or run_name):
        raise InputError(NO_RUN)
    paths = [args.weights]
    try:
        if run_name and not args.weights:
            paths = sorted((RUNS / cli.folder_name(run_name)).glob("G_??.safetensors"))
    except argparse.ArgumentTypeError as error:  # not out of the list in the page
        raise InputError(f"run: {error}") from None
    stamps = tuple(path.stat().st_mtime_ns for path in paths if path.is_file())
    return load_translator(args.weights, run_name or "", args.device, args.precision, scale, stamps)


def read_lesson(run_name: str) -> tuple[str | None, str | None]:
    """The teacher of a run and which direction was distilled; None, None of a run that is no student."""
    try:
        saved = json.loads((RUNS / run_name / "run.json").read_text(encoding="utf-8"))["flags"]
        teacher = Path(saved["teacher"])  # a run, or a file, maybe of a run
        return teacher.parent.name if teacher.parent.parent == RUNS else str(teacher), str(saved["direction"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # without run.json a run can still be shown
        return None, None


def family(run_name: str, direction: str) -> list[str]:
    """A run beside its relatives: the teacher, then all its students in this direction; or the run alone."""
    lessons = {name: read_lesson(name) for name in find_runs(direction)}
    taught = {name: teacher for name, (teacher, way) in lessons.items() if way in (direction, "both")}
    teacher = taught.get(run_name, run_name)
    relatives = [name for name in taught if taught[name] == teacher]
    if teacher in lessons:
        relatives.insert(0, teacher)
    return relatives or [run_name]


# ---------------------------------------------------------------------------------------------
# Translating


def read_photo(translator: Translator, path: Path) -> Source:
    """Read an upload.

    raises: InputError if it is no image, or too large or too small
    """
    source = translator.read_seen(path)
    if source.fault:
        reason = str(source.fault).replace(str(path), path.name)
        raise InputError(f"{path.name}: {reason}; expected an image such as PNG or JPEG")
    return source


def translate(
    translator: Translator, direction: str, path: Path
) -> tuple[Image.Image, Image.Image, Image.Image | None]:
    """Input, translation and round trip of one file, all at the image's own size; no way back: no round trip."""
    net, back = translator.generators(direction)
    source = read_photo(translator, path)
    fake = translator(net, images.image_to_tensor(source.seen)[None])
    rec = output_image(translator(back, fake)[0], source.image.size) if back else None
    return source.image, output_image(fake[0], source.image.size), rec


def timed(translator: Translator, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Output of a network and its milliseconds: the median of some passes, those of the one where an image needs tiles."""
    busy = translator.busy
    output = run()
    if translator.tile and max(output.shape[-2:]) > translator.tile:
        return output, 1000 * (translator.busy - busy)
    return output, metrics.median_ms(run, REPEATS)


def compare(translators: dict[str, Translator], direction: str, path: Path) -> list[tuple[Image.Image, str]]:
    """What several runs make of one file, each with its name, the milliseconds in the network and its size."""
    shown = []
    for name, translator in translators.items():
        net, _ = translator.generators(direction)
        source = read_photo(translator, path)
        run = functools.partial(translator, net, images.image_to_tensor(source.seen)[None])
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        fake, milliseconds = timed(translator, run)
        caption = f"{name}: {milliseconds:.1f} ms, {millions:.2f} M weights"
        shown.append((output_image(fake[0], source.image.size), caption))
    return shown


def translate_batch(translator: Translator, direction: str, paths: Iterable[Path], output: Path) -> list[str]:
    """Write the translations of files into a zip, each under its input's name; returns what is wrong with the others.

    raises: InputError if none can be translated; there is no zip then
    """
    net, _ = translator.generators(direction)
    folder = f"fake_{DOMAINS[direction][1]}"
    faults = []
    taken = set()
    with atomic_write(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:  # PNGs pack no smaller
        for path in paths:
            try:
                source = read_photo(translator, path)
            except InputError as error:
                faults.append(str(error))
                continue
            name = free_name(Path(path.stem), taken)
            fake = translator(net, images.image_to_tensor(source.seen)[None])
            with archive.open(f"{folder}/{name}", "w") as file:
                output_image(fake[0], source.image.size).save(file, format="PNG")
        if not taken:
            raise InputError(faults[0] if faults else "no file given; drop some images first")
    return faults


# ---------------------------------------------------------------------------------------------
# What the buttons of the page do


def in_page(function: Callable) -> Callable:
    """Let what a visitor did wrong end in one sentence in the page, after which the app goes on."""
    import gradio

    @functools.wraps(function)
    def run(*inputs: object) -> object:
        try:
            return function(*inputs)
        except (InputError, utils.RunError) as error:
            words = error
        except OSError as error:
            words = f"{Path(error.filename or 'output').name}: {error.strerror or error}"
        except (MemoryError, torch.OutOfMemoryError):
            words = "out of memory; take a smaller image"
        raise gradio.Error(utils.one_line(words), print_exception=False)

    return run


def refresh(args: argparse.Namespace) -> list:
    """The notice, which is hidden where there is a run, and the choice of runs."""
    import gradio as gr

    runs = [args.weights.name] if args.weights else find_runs()
    notice = gr.Markdown(f"**{NO_RUN[0].upper()}{NO_RUN[1:]} this page.**", visible=not runs)
    return [notice, gr.Dropdown(runs, value=runs[0] if runs else None)]


def show(args: argparse.Namespace, run_name: str | None, direction: str, scale: str, photo: str | None) -> list:
    """Translation, round trip, before and after, and what the relatives of the run make of it."""
    import gradio as gr

    translator = open_run(args, run_name, scale)
    if not photo:
        raise InputError("no image given; drop one, or take a photo")
    image, fake, rec = translate(translator, direction, Path(photo))
    names = family(run_name, direction) if run_name and not args.weights else []
    translators = {name: open_run(args, name, scale) for name in names if len(names) > 1}
    beside = compare(translators, direction, Path(photo))
    relatives = gr.update(value=beside, visible=bool(translators))  # a new Gallery would also write them as lossy WebP
    return [fake, rec, (image, fake), relatives]


def pack(
    args: argparse.Namespace, folder: Path, run_name: str | None, direction: str, scale: str, paths: list[str] | None
) -> list:
    """A zip of many translations, and what was left out.

    It lies where no other visitor overwrites it or guesses its address, below the folder whose files gradio deletes.
    """
    import gradio as gr

    output = folder / secrets.token_urlsafe() / f"{direction}.zip"
    output.parent.mkdir()
    progress = gr.Progress().tqdm([Path(path) for path in paths or []], unit="images")
    faults = translate_batch(open_run(args, run_name, scale), direction, progress, output)
    return [str(output), "\n".join(f"* left out: {utils.one_line(fault)}" for fault in faults)]


def build_page(args: argparse.Namespace, folder: Path) -> Any:
    """Lay out the page and say what its buttons do; folder: for the zips."""
    import gradio as gr

    directions = open_run(args, None).directions if args.weights else list(DOMAINS)
    choices = [(f"{direction[0]} → {direction[-1]}", direction) for direction in directions]
    with gr.Blocks(title=TITLE, fill_width=True, delete_cache=(FORGET // 6, FORGET)) as page:
        gr.Markdown(f"# {TITLE}")
        notice = gr.Markdown(visible=False)
        with gr.Row():
            run = gr.Dropdown([], label="run")
            direction = gr.Radio(choices, value=directions[0], label="direction")
            scale = gr.Radio(SCALES, value="train", label="size in the network")
        look: dict[str, Any] = {
            "format": "png",
            "height": 300,
            "buttons": ["download", "fullscreen"],
        }  # other formats lose
        with gr.Tab("One image"):
            with gr.Row():
                photo = gr.Image(height=340, label="input")  # with a bar of 40 px
                fake = gr.Image(label="translation", interactive=False, **look)
                rec = gr.Image(label="round trip", interactive=False, visible=not args.weights, **look)
            button = gr.Button("Translate", variant="primary")
            with gr.Row():
                slider = gr.ImageSlider(label="before and after", interactive=False, **look)
                relatives = gr.Gallery(label="teacher and students", visible=False, columns=2, **look)
        with gr.Tab("Many images"):
            paths = gr.File(file_count="multiple", file_types=sorted(images.SUFFIXES), label="images")
            pack_button = gr.Button("Translate into a zip", variant="primary")
            packed = gr.File(label="zip", interactive=False)
            faults = gr.Markdown()
        photo.preprocess = lambda upload: upload and upload.path  # ty: ignore  # gradio's own fails with a traceback
        page.load(functools.partial(refresh, args), None, [notice, run], api_name="refresh")
        one: dict[str, Any] = {
            "concurrency_id": "networks",
            "concurrency_limit": 1,
        }  # else the milliseconds would count the neighbours
        shown = [fake, rec, slider, relatives]
        show_it = in_page(functools.partial(show, args))
        button.click(show_it, [run, direction, scale, photo], shown, api_name="show", **one)
        pack_them = in_page(functools.partial(pack, args, folder))
        pack_button.click(pack_them, [run, direction, scale, paths], [packed, faults], api_name="pack", **one)
    return page


# ---------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="app.py", description=__doc__)
    add = cli.flag_group(parser, "what")
    add("--weights", type=cli.path_name, default=None, metavar="FILE", help="a generator file, in place of the runs")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets the whole network in")
    add("--port", type=cli.int_between(1, 65535), default=7860, help="port to listen at")
    add("--max_mb", type=cli.float_between(0, 10**4, above=True), default=20.0, help="largest file to upload, MiB")
    cli.add_pixel_flag(add)
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


def refuse_taken(host: str, port: int) -> None:
    """Raise InputError if one cannot listen there."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        hint = f"such as --port {port + 1 if 1024 <= port < 65535 else 7860}"
        reason = str(error.strerror).split(" (while")[0]  # Python names the address once more
        words = f"{reason}; expected an address of this machine and a free port, {hint}"
        raise InputError(f"--host {host} --port {port}: {words}") from None


def url_host(host: str) -> str:
    """A host as it stands in the address of a page: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def is_local(host: str) -> bool:
    """Can only this machine reach it?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def invitation(host: str, port: int) -> str:
    """The line that says where the page is, and who else can use it."""
    others = "" if is_local(host) else ", which everyone in the network can use"
    return f"open http://{url_host(host)}:{port}{others} ; Ctrl-C ends it"


@process.command
def main(argv: Sequence[str] | None = None) -> None:
    """Open the page and serve it until Ctrl-C."""
    args = parse_args(argv)
    refuse_taken(args.host, args.port)
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    utils.need_package("gradio", "app.py", "pip install -r requirements-app.txt")
    images.limit_pixels(1e6 * args.max_megapixels)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(args, Path(folder))
        address = {"server_name": url_host(args.host), "server_port": args.port}
        limits = {"max_file_size": round(2**20 * args.max_mb)}
        alone = {"share": False, "ssr_mode": False, "footer_links": [], "css": CSS}
        page.launch(**address, **limits, **alone, prevent_thread_lock=True, quiet=True)
        utils.say(invitation(args.host, args.port))
        try:
            while True:
                time.sleep(1)  # gradio's own wait would swallow Ctrl-C and SIGTERM
        finally:
            page.close()


if __name__ == "__main__":
    main()
