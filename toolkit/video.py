"""Video: clips pass the networks frame by frame, in batches, and become clips with the same times and sound.

Needs PyAV (requirements-video.txt), which contains ffmpeg's libraries. Memory holds a few batches of frames, never a clip.
"""

import importlib.metadata
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from models import Direction
from toolkit import files, gallery, images
from toolkit.images import UnreadableImage
from toolkit.inference import THREADS, Inputs, LoadedImage, Translator, output_image, run_ahead, translate_images
from toolkit.readers import without_suffix
from utils import InputError, RunError, counted, say, warn

SUFFIXES = {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".webm"}
SUFFIXES |= {".wmv"}
WRITTEN = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}  # with ffmpeg's names
# ffmpeg would also read playlists, which name other files and addresses
READ_OPTIONS = {"format_whitelist": "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg", "protocol_whitelist": "file"}
OLDEST = 17  # PyAV; older ones convert BT.709 as BT.601, 23 levels of 255 wrong
INSTALL = "pip install -r requirements-video.txt"
HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273
BT709 = 1  # colour matrix, primaries and transfer of ITU-T H.273
LIMITED_RANGE = 1  # 16-235, as libav counts
UNTAGGED = 2  # colour matrix
MISSING_SECONDS = 1.0  # a clip that ends so much before its stated end was cut off
QUALITY = "18"  # crf of H.264: hardly to be told from the frames


def missing_package() -> str:
    """Return what is wrong with the installed PyAV, and the command that helps; "" if nothing is."""
    try:
        version = importlib.metadata.version("av")
    except importlib.metadata.PackageNotFoundError:
        return f"video needs the package av; install it with: {INSTALL}"
    if int(version.split(".")[0]) < OLDEST:
        return f"video needs the package av {OLDEST} or newer, {version} reads colours wrongly: {INSTALL} --upgrade"
    return ""


def is_clip(path: Path) -> bool:
    """Whether a file is a clip by its suffix; animated images are images."""
    return path.suffix.lower() in SUFFIXES


def list_clips(path: Path) -> list[Path]:
    """Return a clip, or all clips below a folder in natural order; hidden files are left out."""
    if is_clip(path) and not path.is_dir():
        return [path]
    found = [clip for clip in path.rglob("*") if is_clip(clip) and clip.is_file()]
    shown = [clip for clip in found if not any(part.startswith(".") for part in clip.relative_to(path).parts)]
    return sorted(shown, key=images.natural_order)


@dataclass
class Frame(LoadedImage):
    """A frame of a clip that was read, and later its translation."""

    pts: int = 0  # when it is shown, in units of the time base
    duration: int = 0  # in the same units; 0: not known
    fake: Any = None  # its translation: uint8 (C, H, W), at the size of the network
    output: Any = None  # the same as an image, at its final size


@dataclass
class VideoFormat:
    """What a written clip has from the one that was read, or from the command line."""

    rate: Fraction  # frames per second, on average
    time_base: Fraction  # seconds in a unit of time
    sample_aspect_ratio: Fraction | None = None  # width to height of a pixel
    audio: Sequence[Any] = ()  # streams to be copied


@contextmanager
def unreadable_on_error() -> Iterator[None]:
    """Turn what PyAV raises about a clip into UnreadableImage."""
    import av

    try:
        yield
    except (av.FFmpegError, ValueError) as error:
        raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error


def check_size(width: int, height: int) -> None:
    """Raise UnreadableImage for frames of more than max_pixels."""
    if width * height > images.max_pixels:
        raise UnreadableImage(f"{width}x{height} px a frame; if you trust the file, raise --max_megapixels")


class ClipReader:
    """A clip that is read frame by frame; packets of sound that lie between the frames wait in `sound`.

    raises: UnreadableImage, also for what would come out in wrong colours
    """

    def __init__(self, path: Path):
        import av

        self.path = path
        self.sound: deque[Any] = deque()
        with unreadable_on_error():
            self.container = av.open(str(path), options=READ_OPTIONS)
        self.stream = self.find_stream()
        self.stream.thread_type = "AUTO"
        rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        shape = self.stream.sample_aspect_ratio
        self.form = VideoFormat(rate, self.stream.time_base, shape, self.container.streams.audio)

    def __enter__(self) -> "ClipReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def find_stream(self) -> Any:
        """Choose the video stream, and say which others are left out."""
        from av.stream import Disposition

        streams = self.container.streams
        moving = [x for x in streams.video if not x.disposition & Disposition.attached_pic]  # no cover of an album
        if not moving:
            raise UnreadableImage("no video stream in it")
        best = streams.best("video")
        stream: Any = best if best in moving else moving[0]
        check_size(stream.width, stream.height)
        others = [x.type for x in streams if x is not stream and x.type != "audio"]
        if others:
            kinds = ", ".join(f"{others.count(kind)} {kind}" for kind in sorted(set(others)))
            say(f"{self.path}: leaves out {counted(len(others), 'stream')} besides picture and sound ({kinds})")
        return stream

    @property
    def expected_frames(self) -> int | None:
        """The number of frames that the clip states, or a guess; None without any."""
        if self.stream.frames or not (self.container.duration and self.stream.average_rate):
            return self.stream.frames or None
        return round(self.container.duration / 1e6 * self.stream.average_rate)

    def frames(self) -> Iterator[tuple[Image.Image, int, int]]:
        """Yield frames as RGB images, with time and duration in units of the stream's time base."""
        rate = self.stream.average_rate or Fraction(25)
        step = max(1, round(1 / (rate * self.stream.time_base)))
        last = None
        with unreadable_on_error():
            for frame in self.decode():
                time = frame.pts
                if time is None or (last is not None and time <= last):  # AVI files may lack times
                    time = 0 if last is None else last + (step if frame.pts is None else 1)
                last = time
                check_size(frame.width, frame.height)
                image = frame_to_image(frame)
                shape = self.stream.sample_aspect_ratio
                if shape and image.size == (frame.height, frame.width) != (frame.width, frame.height):  # turned
                    self.form.sample_aspect_ratio = Fraction(1) / shape
                yield image, time, frame.duration or 0
        if last is None:
            raise UnreadableImage("no frame in it")

    def decode(self) -> Iterator[Any]:
        """Yield the frames as PyAV has them, and keep the packets of sound; raises UnreadableImage for a cut-off clip."""
        end = 0.0
        damaged = "damaged or cut off after {:.1f} s; repair it, such as with: ffmpeg -i CLIP repaired.mp4"
        for packet in self.container.demux():
            if packet.is_corrupt:
                raise UnreadableImage(damaged.format(end))
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is self.stream:
                for frame in packet.decode():
                    if frame.is_corrupt:  # ty: ignore[missing-union-attribute]
                        raise UnreadableImage(damaged.format(end))
                    yield frame
            elif packet.stream.type == "audio" and packet.dts is not None:  # without: the mark of the end
                self.sound.append(packet)
        start = (self.container.start_time or 0) / 1e6
        stated = (self.container.duration or 0) / 1e6
        if self.container.format.name.startswith(("mov", "matroska")) and end - start < stated - MISSING_SECONDS:
            raise UnreadableImage(damaged.format(end - start))


def frame_to_image(frame: Any) -> Image.Image:
    """Convert a decoded frame to RGB, turned and mirrored as its display matrix says; raises UnreadableImage for HDR."""
    from av.video.reformatter import Colorspace

    if frame.color_trc in HDR:
        raise UnreadableImage(f"it is HDR ({HDR[frame.color_trc]}), which would come out grey; convert it to SDR")
    # what players assume of untagged clips: BT.709 from 720 lines on, else BT.601, libav's own choice
    is_hd = frame.colorspace == UNTAGGED and frame.height >= 720
    pixels = frame.to_ndarray(format="rgb24", **({"src_colorspace": Colorspace.ITU709} if is_hd else {}))
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        pixels = turn(pixels, np.frombuffer(bytes(matrix), np.int32))
    return Image.fromarray(np.ascontiguousarray(pixels))


def turn(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turn and mirror (H, W, C) by a display matrix of libav, by right angles."""
    a, b, _, c, d = matrix[:5]
    rows, columns = d, a
    if a == 0 and d == 0:
        pixels = pixels.transpose(1, 0, 2)
        rows, columns = b, c
    pixels = pixels[::-1] if rows < 0 else pixels
    return pixels[:, ::-1] if columns < 0 else pixels


class ClipWriter:
    """An H.264 clip that is written frame by frame, in BT.709 with tags that say so.

    path: a temporary one; name: that the file will have, with a suffix of WRITTEN; size: width and height of the frames
    """

    def __init__(self, path: Path, name: Path, form: VideoFormat, size: tuple[int, int]):
        import av

        self.name = name
        self.size = size
        self.time_base = form.time_base
        self.container = av.open(str(path), "w", format=WRITTEN[name.suffix.lower()])
        self.stream: Any = self.container.add_stream("libx264", rate=form.rate, options={"crf": QUALITY})
        width, height = (side + side % 2 for side in size)
        if (width, height) != size:
            say(f"{name}: {width}x{height} px, since H.264 needs even sides: the last column or row is repeated")
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        context = self.stream.codec_context
        context.time_base = form.time_base
        context.max_b_frames = 0  # else Matroska files begin later
        context.colorspace = context.color_primaries = context.color_trc = BT709  # beside the conversion of each frame
        context.color_range = LIMITED_RANGE
        if form.sample_aspect_ratio:
            context.sample_aspect_ratio = form.sample_aspect_ratio
        self.sound = {}
        for stream in form.audio:
            codec = stream.codec_context.name
            if codec in self.container.supported_codecs:
                self.sound[stream.index] = self.container.add_stream_from_template(stream)
            else:
                warn(f"{name}: without sound, since {name.suffix} files hold no {codec}; --output FILE.mkv keeps it")

    def __enter__(self) -> "ClipWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def write(self, frame: Frame) -> None:
        """Append a translated frame."""
        from av import VideoFrame
        from av.video.reformatter import ColorRange, Colorspace

        if frame.output.size != self.size:
            sizes = " to ".join(f"{width}x{height}" for width, height in (self.size, frame.output.size))
            raise UnreadableImage(f"the size of frames changes from {sizes} px, and a video has one size")
        pixels = np.asarray(frame.output.convert("RGB"))
        width, height = self.size
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        picture.pts, picture.time_base, picture.duration = frame.pts, self.time_base, frame.duration
        self.container.mux(self.stream.encode(picture))

    def write_sound(self, packets: deque[Any]) -> None:
        """Copy the packets of sound that wait."""
        while packets:
            packet = packets.popleft()
            stream = self.sound.get(packet.stream.index)
            if stream:
                packet.stream = stream
                self.container.mux(packet)

    def finish(self) -> None:
        """Write what the encoder still holds."""
        self.container.mux(self.stream.encode(None))


@dataclass
class Flicker:
    """How much successive frames differ: the mean absolute difference over pixels and channels, in levels of 255.

    It is measured at the size of the network, before the translations are resized and compressed.
    """

    sums: np.ndarray = field(default_factory=lambda: np.zeros(2))  # of the input, of the translation
    count: int = 0
    last: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, real: Image.Image, fake: Tensor) -> None:
        """Add a frame; fake: uint8 (C, H, W)."""
        now = (np.asarray(real).astype(np.int16), fake.numpy().astype(np.int16))
        if self.last and self.last[0].shape == now[0].shape:
            self.sums += [np.abs(x - before).mean() for x, before in zip(now, self.last, strict=True)]
            self.count += 1
        self.last = now

    def __str__(self) -> str:
        real, fake = self.sums / max(1, self.count)
        times = f", {fake / real:.2f} times as much as" if real else ";"
        return f"flicker: from frame to frame it changes by {fake:.2f} levels of 255{times} the input ({real:.2f})"


def translate_frames(
    translator: Translator, direction: Direction, loaded: Iterable[LoadedImage], bad: images.BadImages, pool: Executor
) -> Iterator[Frame]:
    """Yield frames with their translations."""
    net, _ = translator.generators(direction)

    def finish(item: tuple[Any, list[Tensor]]) -> Frame:
        frame, outputs = item
        image = frame.image if translator.output_size == "input" else frame.network_input
        frame.fake = outputs[0]
        frame.output = output_image(frame.fake, image.size)
        return frame

    frames: Iterator[Any] = run_ahead(pool, finish, translate_images(translator, [net], loaded, bad))
    yield from frames


@contextmanager
def unwritable_on_error(name: Path) -> Iterator[None]:
    """Turn what PyAV raises about a clip that is written into RunError, or OSError where the disk is at fault."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(name)) from error
        raise RunError(f"{name}: cannot be written ({error.strerror})") from error


def write_clip(
    frames: Iterator[Frame], path: Path, name: Path, form: VideoFormat, sound: deque[Any], total: int | None
) -> None:
    """Write translated frames, and the packets of sound that wait meanwhile, to a temporary path; say how it went."""
    flicker = Flicker()
    start = time.perf_counter()
    count = 0
    with unwritable_on_error(name), tqdm(desc=name.name, total=total, unit="frame", mininterval=0.5) as bar:
        first = next(frames)
        with ClipWriter(path, name, form, first.output.size) as clip:
            for frame in itertools.chain([first], frames):
                clip.write(frame)
                clip.write_sound(sound)
                flicker.add(frame.network_input, frame.fake)
                bar.update()
                count += 1
            clip.finish()
            clip.write_sound(sound)
    seconds = time.perf_counter() - start
    say(f"{name}: {counted(count, 'frame')} in {seconds:.1f} s, {count / seconds:.3g} a second; {flicker}")


def translate_clip(
    translator: Translator, direction: Direction, clip: Path, path: Path, name: Path, most: int | None = None
) -> None:
    """Translate a clip, or its first frames, to a temporary path; name: that the file will have; raises UnreadableImage."""

    def fit(item: tuple[Image.Image, int, int]) -> Frame:
        image, pts, duration = item
        loaded = translator.fit(clip, image.convert("RGB" if translator.channels == 3 else "L"), direction.source)
        if loaded.reason:
            raise UnreadableImage(loaded.reason)
        return Frame(**vars(loaded), pts=pts, duration=duration)

    with ClipReader(clip) as reader, ThreadPoolExecutor(THREADS) as pool:
        loaded = run_ahead(pool, fit, itertools.islice(reader.frames(), most))
        frames = translate_frames(translator, direction, loaded, images.BadImages(clip.parent, 1), pool)
        write_clip(frames, path, name, reader.form, reader.sound, most or reader.expected_frames)


def translate_clip_to(
    translator: Translator, direction: Direction, clip: Path, name: Path, most: int | None = None
) -> None:
    """Translate a clip to a file, which is written atomically; raises InputError if the clip cannot be read."""
    name.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(name) as path:
        try:
            translate_clip(translator, direction, clip, path, name, most)
        except UnreadableImage as error:
            images.BadImages(clip.parent, 1).note(clip, error)


def translate_clips(
    translator: Translator,
    direction: Direction,
    inputs: Inputs,
    folder: gallery.ResultFolder,
    most: int | None = None,
    skip_existing: bool = False,
) -> None:
    """Translate clips into a folder of results: clip_fake_B.mp4; those that cannot be read are noted as by BadImages.

    most: translate only so many frames of each
    """
    bad = images.BadImages(inputs.root, len(inputs.paths), inputs.on_bad)
    folder.known_settings[folder.key] = folder.settings
    folder.write_record()
    for clip in inputs.paths:
        digest = files.sha256(clip)
        name = clip_name(clip, inputs, direction, folder, digest)
        origin = {"settings": None if most else folder.key, "input": digest, "truth": None}
        if skip_existing and not most and folder.is_of(name, origin):
            say(f"{clip}: {folder.path / name} exists already")
            continue

        def write(path: Path, clip: Path = clip, name: Path = folder.path / name) -> None:
            translate_clip(translator, direction, clip, path, name, most)

        try:
            folder.write(name, write, origin)
        except UnreadableImage as error:
            bad.note(clip, error)


def clip_name(clip: Path, inputs: Inputs, direction: Direction, folder: gallery.ResultFolder, digest: str) -> Path:
    """Return the name of a translated clip: with its suffix where another clip has the same stem, never that of another's result."""
    relative = clip.relative_to(inputs.root)
    same = [other for other in inputs.paths if without_suffix(other) == without_suffix(clip)]
    stem = relative.stem if len(same) == 1 else relative.name
    name = relative.with_name(f"{stem}_fake_{direction.target}.mp4")
    while name.as_posix() in folder.files and folder.files[name.as_posix()]["input"] != digest:
        name = name.with_stem(f"{name.stem}_")
    if name.as_posix() not in folder.files:
        folder.refuse_other(name.as_posix())
    return name


def video_of_images(translator: Translator, direction: Direction, inputs: Inputs, name: Path, fps: float) -> None:
    """Translate images, which become the frames of a video without sound; it is written atomically."""
    rate = Fraction(fps).limit_denominator(1001)
    bad = images.BadImages(inputs.root, len(inputs.paths), inputs.on_bad)

    def read(item: tuple[int, Path]) -> Frame:
        return Frame(**vars(translator.load(item[1], direction.source)), pts=item[0], duration=1)

    name.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(name) as path, ThreadPoolExecutor(THREADS) as pool:
        loaded = run_ahead(pool, read, enumerate(inputs.paths))
        frames = translate_frames(translator, direction, loaded, bad, pool)
        try:
            write_clip(frames, path, name, VideoFormat(rate, 1 / rate), deque(), len(inputs.paths))
        except UnreadableImage as error:
            raise InputError(f"{inputs.root}: {error}; give the images one size") from error
