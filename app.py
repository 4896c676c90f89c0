"""Translate photos in the browser: before and after, the round trip, teacher beside student, a batch into a zip.

python app.py
python app.py --weights saved_models/horse2zebra/G_AB.safetensors
python app.py --host 0.0.0.0 --port 8080 --max_mb 8

Uploads live in a temporary folder that goes with the program; nothing is sent anywhere.
"""

import argparse
import functools
import json
import os
import socket
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import datasets
import metrics
import test  # as distill.py stands on train.py: a page shows what test.py answers
import utils

NO_RUN = (
    "no run in saved_models yet; try --weights examples/day2night.safetensors, or train one with make demo, "
    "or python train.py --dataset_name NAME, then reload"
)
SIZE = [256, 256]  # height and width in px that a network sees whose file does not record it: those of the paper
REPEATS = 3  # timed passes; their median is shown
CSS = """
img { object-fit: contain !important; width: 100% !important; height: 100% !important }  /* small ones, too */
.caption-label { white-space: normal !important; max-width: 100% !important }  /* the milliseconds stand at its end */
"""
FORGET = 3600  # seconds after which an upload is deleted


# ---------------------------------------------------------------------------------------------
# Runs and their networks


def find_runs(direction: str = "?To?") -> list[str]:
    """Names of the runs that have generators, or that of a direction, the newest first."""
    files = Path("saved_models").glob(f"*/G_{direction[0]}{direction[-1]}.safetensors")
    times = {path.parent.name: path.stat().st_mtime for path in files}
    return sorted(times, key=times.get, reverse=True)


@functools.lru_cache(maxsize=4)
def load_tester(flags: tuple[str, ...], stamps: tuple[int, ...]) -> test.Tester:
    """Load networks as test.py does; stamps: times of their files, so that a training run shows its newest."""
    tester = test.make_tester(test.parse_args(flags))
    tester.recipe["size"] = tester.recipe["size"] or SIZE  # a photo at its own size could fill the memory
    return tester


def open_run(args: argparse.Namespace, run_name: str | None) -> test.Tester:
    """The networks of a run, or those of --weights."""
    if not (args.weights or run_name):
        raise utils.InputError(NO_RUN)
    files = [args.weights] if args.weights else sorted(Path("saved_models", run_name).glob("G_??.safetensors"))
    what = f"--weights={args.weights}" if args.weights else f"--run_name={run_name}"
    flags = (what, f"--device={args.device}", f"--precision={args.precision}")
    return load_tester(flags, tuple(path.stat().st_mtime_ns for path in files if path.is_file()))


def directions(tester: test.Tester) -> list[str]:
    """The directions that its networks translate."""
    return [name for name, (source, target) in test.DIRECTIONS.items() if f"G_{source}{target}" in tester.nets]


def generators(tester: test.Tester, direction: str) -> tuple[nn.Module, nn.Module | None]:
    """The generator of a direction, and the one that leads back, if there is one."""
    if direction not in directions(tester):
        raise utils.InputError(f"these weights translate {', '.join(directions(tester))} only; choose that direction")
    return tester.generators(direction)


def read_lesson(run_name: str) -> tuple[str | None, str | None]:
    """The teacher of a run and which direction was distilled; None, None of a run that is no student."""
    try:
        flags = json.loads(Path("saved_models", run_name, "run.json").read_text(encoding="utf-8"))["flags"]
        return str(flags["teacher"]), str(flags["direction"])
    except (OSError, ValueError, KeyError, TypeError):  # without run.json a run can still be shown
        return None, None


def family(run_name: str, direction: str) -> list[str]:
    """A run beside its relatives: the teacher, then all its students in this direction; or the run alone."""
    lessons = {name: read_lesson(name) for name in find_runs(direction)}
    taught = {name: teacher for name, (teacher, way) in lessons.items() if way in (direction, "both")}
    teacher = taught.get(run_name, run_name)
    students = [name for name in taught if taught[name] == teacher]
    return [*([teacher] if teacher in lessons else []), *students] or [run_name]


# ---------------------------------------------------------------------------------------------
# Translating


def read_photo(tester: test.Tester, net: nn.Module, path: Path) -> tuple[Image.Image, Tensor]:
    """Read an upload: the picture, and (1, C, H, W) in [-1, 1] as the network shall see it.

    raises: InputError if it is no picture, or too large or too small
    """
    _, picture, seen = test.read_seen(tester, net, path)
    if picture is None:
        reason = str(seen).replace(str(path), path.name)
        raise utils.InputError(f"{path.name}: {reason}; expected a picture such as PNG or JPEG")
    return picture, utils.picture_to_tensor(seen)[None]


def to_picture(answer: Tensor, size: tuple[int, int]) -> Image.Image:
    """(1, C, H, W) in [-1, 1] → a picture of (width, height)."""
    return datasets.resize_picture(utils.tensor_to_picture(answer[0]), size)


def translate(tester: test.Tester, direction: str, path: Path) -> tuple[Image.Image, Image.Image, Image.Image | None]:
    """Input, translation and round trip of one file, all at the picture's own size; no way back: no round trip."""
    net, back = generators(tester, direction)
    picture, seen = read_photo(tester, net, path)
    fake = tester(net, seen)
    rec = to_picture(tester(back, fake), picture.size) if back else None
    return picture, to_picture(fake, picture.size), rec


def compare(testers: dict[str, test.Tester], direction: str, path: Path) -> list[tuple[Image.Image, str]]:
    """The answers of several runs to one file, each with its name, the median milliseconds in the network and its size."""
    shown = []
    for name, tester in testers.items():
        net, _ = generators(tester, direction)
        picture, seen = read_photo(tester, net, path)
        answer = functools.partial(tester, net, seen)
        size = sum(p.numel() for p in net.parameters()) / 1e6
        caption = f"{name}: {metrics.median_ms(answer, REPEATS):.1f} ms, {size:.2f} M weights"
        shown.append((to_picture(answer(), picture.size), caption))
    return shown


def translate_batch(tester: test.Tester, direction: str, paths: Iterable[Path], output: Path) -> list[str]:
    """Write the translations of files into a zip, each under its input's name; returns what is wrong with the others.

    raises: InputError if none can be translated
    """
    net, _ = generators(tester, direction)
    faults, taken = [], set()
    with zipfile.ZipFile(output, "w") as archive:  # PNGs cannot be packed any smaller
        for path in paths:
            try:
                picture, seen = read_photo(tester, net, path)
            except utils.InputError as error:
                faults.append(str(error))
                continue
            stem = path.stem
            while stem.lower() in taken:
                stem += "_"
            taken.add(stem.lower())
            with archive.open(f"fake_{test.DIRECTIONS[direction][1]}/{stem}.png", "w") as file:
                to_picture(tester(net, seen), picture.size).save(file, format="PNG")
    if not taken:
        raise utils.InputError(faults[0] if faults else "no file given; drop some pictures first")
    return faults


# ---------------------------------------------------------------------------------------------
# The page


def in_page(function: Callable) -> Callable:
    """Let what a visitor did wrong end in one sentence in the page, after which the app goes on."""
    import gradio

    @functools.wraps(function)
    def run(*inputs: object) -> object:
        try:
            return function(*inputs)
        except (utils.InputError, utils.RunError) as error:
            words = error
        except OSError as error:
            words = f"{Path(error.filename or 'output').name}: {error.strerror or error}"
        except (MemoryError, torch.OutOfMemoryError):
            words = "out of memory; take a smaller picture"
        raise gradio.Error(utils.one_line(words), print_exception=False)

    return run


def build_page(args: argparse.Namespace, folder: Path) -> object:
    """Lay out the page and say what its buttons do; folder: for the zip."""
    import gradio as gr

    ways = [
        (f"{way[0]} → {way[-1]}", way)
        for way in (directions(open_run(args, None)) if args.weights else test.DIRECTIONS)
    ]

    def refresh() -> list:
        runs = [args.weights.name] if args.weights else find_runs()
        notice = gr.Markdown(f"**{NO_RUN[0].upper()}{NO_RUN[1:]} this page.**", visible=not runs)
        return [notice, gr.Dropdown(runs, value=runs[0] if runs else None)]

    def show(run_name: str | None, direction: str, photo: str | None) -> list:
        tester = open_run(args, run_name)
        if not photo:
            raise utils.InputError("no picture given; drop one, or take a photo")
        picture, fake, rec = translate(tester, direction, Path(photo))
        names = [] if args.weights else family(run_name, direction)
        testers = {name: open_run(args, name) for name in names if len(names) > 1}
        relatives = gr.Gallery(compare(testers, direction, Path(photo)), visible=bool(testers))
        return [fake, rec, (picture, fake), relatives]

    def pack(run_name: str | None, direction: str, files: list[str] | None) -> list:
        output = folder / f"{direction}.zip"
        progress = gr.Progress().tqdm([Path(file) for file in files or []], unit="pictures")
        faults = translate_batch(open_run(args, run_name), direction, progress, output)
        return [str(output), "\n".join(f"* left out: {utils.one_line(fault)}" for fault in faults)]

    with gr.Blocks(title="CycleGAN", fill_width=True, delete_cache=(FORGET // 6, FORGET)) as page:
        notice = gr.Markdown(visible=False)
        with gr.Row():
            run = gr.Dropdown([], label="run")
            direction = gr.Radio(ways, value=ways[0][1], label="direction")
        look = {"format": "png", "height": 300, "buttons": ["download", "fullscreen"]}  # other formats lose
        with gr.Tab("One picture"):
            with gr.Row():
                photo = gr.Image(height=340, label="input")  # with a bar of 40 px
                fake, rec = (gr.Image(label=x, interactive=False, **look) for x in ("translation", "round trip"))
            button = gr.Button("Translate", variant="primary")
            with gr.Row():
                slider = gr.ImageSlider(label="before and after", interactive=False, **look)
                relatives = gr.Gallery(label="teacher and students", visible=False, columns=2, **look)
        with gr.Tab("Many pictures"):
            files = gr.File(file_count="multiple", file_types=sorted(datasets.SUFFIXES), label="pictures")
            pack_button = gr.Button("Translate into a zip", variant="primary")
            packed, faults = gr.File(label="zip", interactive=False), gr.Markdown()
        photo.preprocess = lambda upload: upload and upload.path  # gradio's own fails with a traceback
        page.load(refresh, None, [notice, run])
        one = {"concurrency_id": "networks", "concurrency_limit": 1}  # else the milliseconds would count the neighbours
        button.click(in_page(show), [run, direction, photo], [fake, rec, slider, relatives], **one)
        pack_button.click(in_page(pack), [run, direction, files], [packed, faults], **one)
    return page


# ---------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = utils.Parser(prog="app.py", description=__doc__)
    add = utils.flag_group(parser, "what")
    add("--weights", type=utils.path_name, default=None, metavar="FILE", help="a generator file, in place of the runs")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets the whole network in")
    add("--port", type=utils.whole(1, 65535), default=7860, help="port to listen at")
    add("--max_mb", type=utils.number(0, 10**4, above=True), default=20.0, help="largest file to upload, MiB")
    utils.add_pixel_flag(add)
    utils.add_device_flags(parser)
    return parser.parse_args(argv)


def refuse_taken(host: str, port: int) -> None:
    """Raise InputError if one cannot listen there."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        hint = f"such as --port {port + 1 if 1024 <= port < 65535 else 7860}"
        reason = str(error.strerror).split(" (while")[0]  # Python names the address once more
        words = f"{reason}; expected an address of this machine and a free port, {hint}"
        raise utils.InputError(f"--host {host} --port {port}: {words}") from None


@utils.stage
def main(argv: Sequence[str] | None = None) -> None:
    """Open the page and serve it until Ctrl-C."""
    args = parse_args(argv)
    refuse_taken(args.host, args.port)
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    utils.need_package("gradio", "app.py", "pip install -r requirements-app.txt")
    datasets.limit_pixels(1e6 * args.max_megapixels)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(args, Path(folder))
        address = {"server_name": args.host, "server_port": args.port, "max_file_size": round(2**20 * args.max_mb)}
        alone = {
            "share": False,
            "ssr_mode": False,
            "footer_links": [],
            "prevent_thread_lock": True,
            "quiet": True,
            "css": CSS,
        }
        page.launch(**address, **alone)
        utils.say(f"open http://{args.host}:{args.port} ; Ctrl-C ends it")
        try:
            while True:
                time.sleep(1)  # gradio's own wait would swallow Ctrl-C and SIGTERM
        finally:
            page.close()


if __name__ == "__main__":
    main()
