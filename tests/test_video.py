"""Clips are drawn by the tests; where a network would hide what is tested, the translation is replaced by a copy."""

import io
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import noise_image, tiny_networks
from tiny_runs import save_pair

import test as test_command
from toolkit import gallery, video
from toolkit.images import bytes_to_range
from toolkit.inference import Translator

av = pytest.importorskip("av")
Colorspace = pytest.importorskip("av.video.reformatter").Colorspace
ColorRange = av.video.reformatter.ColorRange

PATCHES = np.array([[250, 250, 250], [20, 20, 20], [200, 30, 40], [30, 180, 60], [40, 60, 200], [196, 149, 124]])
OUTPUT = Path("out/clip_fake_B.mp4")


def patches(height=64, width=96):
    """A picture of six flat patches side by side."""
    return np.repeat(PATCHES[np.arange(width) * 6 // width][None].astype(np.uint8), height, axis=0)


def write_clip(path, pictures, matrix=None, tags=None, range_tag=1, times=None, audio=False, **facts):
    """Write pictures (H, W, 3), converted by a colour matrix; tags: (matrix, primaries, transfer), None for none."""
    with av.open(str(path), "w") as clip:
        stream = clip.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv444p"
        context = stream.codec_context
        if times:
            context.time_base = Fraction(1, 1000)
        if tags:
            context.colorspace, context.color_primaries, context.color_trc = tags
            context.color_range = range_tag
        if "aspect" in facts:
            context.sample_aspect_ratio = facts["aspect"]
        if "display" in facts:
            stream.set_display_matrix(facts["display"])
        sound = clip.add_stream("aac", rate=16000) if audio else None
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            color_range = ColorRange.JPEG if range_tag == 2 else ColorRange.MPEG
            frame = frame.reformat(
                format="yuv444p", dst_colorspace=matrix or Colorspace.ITU601, dst_color_range=color_range
            )
            frame.pts, frame.time_base = (times[i], Fraction(1, 1000)) if times else (i, Fraction(1, 25))
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode(None))
        for i in range(4 if sound else 0):
            tone = av.AudioFrame.from_ndarray(np.full((1, 1024), 0.1, np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 16000, 1024 * i
            clip.mux(sound.encode(tone))
        if sound:
            clip.mux(sound.encode(None))
    return path


def read_frames(path):
    with av.open(str(path)) as clip:
        return list(clip.decode(video=0))


def packets_of_sound(path):
    with av.open(str(path)) as clip:
        packets = [packet for packet in clip.demux(audio=0) if packet.dts is not None]
        return [(round(float(packet.pts * packet.time_base), 3), bytes(packet)) for packet in packets]


def first_picture(path):
    with video.ClipReader(path) as clip:
        return np.asarray(next(clip.frames())[0]).astype(int)


def patch_error(picture):
    """The largest error in the middles of the patches, in levels."""
    height, width = picture.shape[:2]
    columns = (np.arange(6) * 2 + 1) * width // 12
    return np.abs(picture[height // 2, columns].astype(int) - PATCHES).max()


@pytest.fixture
def weights():
    save_pair("pair", G_AB=tiny_networks()["G_AB"])
    return Path("saved_models/pair/G_AB.safetensors")


@pytest.fixture
def translate(weights):
    """Call test.py for clips, or whatever is given as its input."""

    def call(source, *argv):
        options = ["--precision", "fp32", "--device", "cpu"] + ([] if "--output" in argv else ["--output", "out"])
        return test_command.main(["--weights", str(weights), "--input", str(source), *map(str, argv), *options])

    return call


@pytest.fixture
def copying(monkeypatch):
    """Let networks return their input."""
    monkeypatch.setattr(Translator, "__call__", lambda self, net, x: bytes_to_range(x))


# -- a clip is read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "matrix", "tags", "color_range"),
    [
        (64, Colorspace.ITU601, None, 1),  # untagged
        (720, Colorspace.ITU709, None, 1),
        (64, Colorspace.ITU709, (1, 1, 1), 1),
        (64, Colorspace.ITU709, (1, 1, 1), 2),  # full range
        (720, Colorspace.ITU601, (6, 6, 6), 1),
    ],
)
def test_colours_are_read_by_the_tags_or_without_them_by_the_height(height, matrix, tags, color_range):
    clip = write_clip("clip.mp4", [patches(height)], matrix, tags, color_range)
    assert patch_error(first_picture(clip)) <= 3


@pytest.mark.parametrize("matrix", [(a, b, c, d) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1) for d in (-1, 0, 1) if abs(a) == abs(d) != abs(b) == abs(c)])  # fmt: skip
def test_turned_and_mirrored_clips_are_read_upright(matrix):
    picture = np.full((64, 96, 3), 40, np.uint8)
    picture[:20, :32] = (220, 40, 40)
    picture[40:, 60:] = (40, 200, 40)
    a, b, c, d = matrix
    one = 1 << 16
    clip = write_clip("clip.mp4", [picture], display=[a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30])
    y, x = np.mgrid[:64, :96]
    across, down = a * x + c * y, b * x + d * y  # QuickTime File Format: x' = a x + c y, y' = b x + d y
    expected = np.zeros((np.ptp(down) + 1, np.ptp(across) + 1, 3), int)
    expected[down - down.min(), across - across.min()] = picture
    found = first_picture(clip)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 3


def test_hdr_is_refused(translate, refused):
    for transfer, name in ((16, "PQ"), (18, "HLG")):
        clip = write_clip("clip.mp4", [patches()], Colorspace.ITU709, (9, 9, transfer))
        assert f"HDR ({name})" in refused(lambda argv: translate(*argv), clip)


# -- a clip is written -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_written_colours_are_right_and_tagged(translate, copying, suffix):
    write_clip("clip.mp4", [patches(256, 256)] * 3)
    translate("clip.mp4", "--scale", "native", "--output", f"new{suffix}")
    frames = read_frames(f"new{suffix}")
    assert len(frames) == 3
    assert (frames[0].colorspace, frames[0].color_primaries, frames[0].color_trc, frames[0].color_range) == (1, 1, 1, 1)
    assert max(patch_error(frame.to_ndarray(format="rgb24")) for frame in frames) <= 5


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_times_and_sound_are_those_of_the_clip(translate, copying, suffix):
    times = [0, 40, 47, 120, 333, 334]
    pictures = [patches() // (i + 1) for i in range(6)]
    write_clip("clip.mp4", pictures, times=times, audio=True, aspect=Fraction(4, 3))
    translate("clip.mp4", "--scale", "native", "--output", f"new{suffix}")
    frames = read_frames(f"new{suffix}")
    start = 0.064 if suffix == ".mkv" else 0.0  # Matroska has no negative times: all moves by the start-up of AAC
    assert [frame.time - start for frame in frames] == pytest.approx([t / 1000 for t in times], abs=0.001)
    assert [sound for _, sound in packets_of_sound(f"new{suffix}")] == [
        sound for _, sound in packets_of_sound("clip.mp4")
    ]
    heard = [time + start for time, _ in packets_of_sound("clip.mp4")]
    assert [time for time, _ in packets_of_sound(f"new{suffix}")] == pytest.approx(heard, abs=0.0011)
    for frame, picture in zip(frames, pictures, strict=True):
        assert np.abs(frame.to_ndarray(format="rgb24")[::8, 8::16].astype(int) - picture[::8, 8::16]).max() <= 8
    with av.open(f"new{suffix}") as clip:
        assert clip.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


def test_a_turned_clip_of_odd_size_is_padded_and_keeps_the_shape_of_its_pixels(translate, copying, capsys):
    one = 1 << 16
    display = [0, one, 0, -one, 0, 0, 0, 0, 1 << 30]
    write_clip("clip.mp4", [patches(75, 101)], display=display, aspect=Fraction(4, 3))
    translate("clip.mp4", "--scale", "native")
    assert "76x102 px" in capsys.readouterr().out
    (frame,) = read_frames(OUTPUT)
    assert (frame.width, frame.height) == (76, 102)
    assert frame.side_data.get("DISPLAYMATRIX") is None
    assert (
        np.abs(frame.to_ndarray(format="rgb24")[:, 75].astype(int) - frame.to_ndarray(format="rgb24")[:, 74]).max() <= 5
    )
    with av.open(str(OUTPUT)) as clip:
        assert clip.streams.video[0].sample_aspect_ratio == Fraction(3, 4)


def test_sound_that_the_file_cannot_hold_is_left_out_with_a_warning(translate, copying, capsys):
    with av.open("clip.avi", "w") as clip:
        stream = clip.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        sound = clip.add_stream("wmav2", rate=16000, options={"b": "32000"})
        clip.mux(stream.encode(av.VideoFrame.from_ndarray(patches(), format="rgb24")))
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 16000
        clip.mux(sound.encode(tone))
        for each in (stream, sound):
            clip.mux(each.encode(None))
    translate("clip.avi")
    assert "wmav2" in capsys.readouterr().err
    assert len(read_frames(OUTPUT)) == 1


# -- test.py -----------------------------------------------------------------------------------


def test_frames_pass_the_network_as_images_do_and_flicker_is_said(translate, capsys):
    write_clip("clip.mp4", [patches(), patches()[:, ::-1], patches()])
    translate("clip.mp4", "--num_test", "2")
    said = capsys.readouterr().out
    with video.ClipReader(Path("clip.mp4")) as clip:
        (first, _, _), (second, _, _), _ = clip.frames()
    Path("photos").mkdir()
    first.save("photos/0.png")
    second.save("photos/1.png")
    translate("photos", "--output", "images", "--output_size", "net")
    now, last = (np.asarray(gallery.load_image(f"images/fake_B/{i}.png", None)) * 127.5 for i in (1, 0))
    assert f"it changes by {np.abs(now - last).mean():.2f} levels" in said
    assert len(read_frames(OUTPUT)) == 2


def test_a_folder_of_clips_and_images_is_translated_whole(translate, capsys):
    Path("mixed/sub").mkdir(parents=True)
    for name in ("clip.mp4", "clip.mov", "sub/other.mkv"):
        write_clip(Path("mixed", name), [patches()])
    Path("mixed/broken.mp4").write_text("no clip")
    noise_image(0).save("mixed/photo.png")
    noise_image(1).save("mixed/moving.gif", save_all=True, append_images=[noise_image(2)])
    translate("mixed")
    streams = capsys.readouterr()
    assert "broken.mp4 (Invalid data" in streams.err
    assert "left out" not in streams.err
    for name in (
        "clip.mp4_fake_B.mp4",
        "clip.mov_fake_B.mp4",
        "sub/other_fake_B.mp4",
        "fake_B/photo.png",
        "fake_B/moving.png",
    ):
        assert Path("out", name).is_file()
    written = Path("out/clip.mov_fake_B.mp4").stat().st_mtime_ns
    shutil.rmtree("out/sub")
    translate("mixed", "--skip_existing")
    assert Path("out/clip.mov_fake_B.mp4").stat().st_mtime_ns == written
    assert Path("out/sub/other_fake_B.mp4").is_file()


def test_results_of_other_clips_and_files_of_others_are_never_replaced(translate, refused):
    for folder, value in (("one", 50), ("two", 200)):
        Path(folder).mkdir()
        write_clip(f"{folder}/clip.mp4", [np.full((64, 64, 3), value, np.uint8)])
        translate(f"{folder}/clip.mp4")
    assert OUTPUT.is_file()
    assert OUTPUT.with_stem("clip_fake_B_").is_file()
    Path("mine").mkdir()
    Path("mine/clip_fake_B.mp4").write_text("mine")
    refused(lambda argv: translate(*argv), "one/clip.mp4", "--output", "mine")
    refused(lambda argv: translate(*argv), "one/clip.mp4", "--output", "mine/clip_fake_B.mp4")
    assert Path("mine/clip_fake_B.mp4").read_text() == "mine"


def test_images_become_a_video(translate, copying, refused):
    Path("frames").mkdir()
    for i in (1, 2, 10):
        noise_image(i, (32, 32)).resize((64, 64)).save(f"frames/{i}.png")
    translate("frames", "--scale", "native", "--output", "new.mp4", "--fps", "12.5")
    frames = read_frames("new.mp4")
    assert [frame.time for frame in frames] == pytest.approx([0, 0.08, 0.16])
    for frame, i in zip(frames, (1, 2, 10), strict=True):
        picture = np.asarray(noise_image(i, (32, 32)).resize((64, 64)).convert("L")).astype(int)
        assert np.abs(np.asarray(frame.to_image().convert("L")) - picture).mean() < 12
    noise_image(3, (80, 64)).save("frames/3.png")
    message = refused(lambda argv: translate(*argv), "frames", "--scale", "native", "--output", "two.mp4")
    assert "from 64x64 to 80x64 px" in message
    assert not list(Path.cwd().glob("*two*")) + list(Path.cwd().glob(".cyclegan*"))


def damaged(kind):
    """Draw a file that is no clip, or not a whole one."""
    path = Path("clip.mkv" if kind in ("cut mkv", "no frames") else "clip.mp4")
    if kind == "text":
        path.write_text("no clip")
    elif kind == "playlist":
        path.write_text("#EXTM3U\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n")
    elif kind == "image":
        with io.BytesIO() as data:
            noise_image(0).save(data, "jpeg")
            path.write_bytes(data.getvalue())
    elif kind == "sound":
        with av.open(str(path), "w") as clip:
            clip.add_stream("aac", rate=16000)
            clip.start_encoding()
    elif kind == "no frames":
        with av.open(str(path), "w") as clip:
            stream = clip.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            clip.start_encoding()
    else:
        noise = [np.asarray(noise_image(i, (64, 64))) for i in range(6)]
        write_clip(path, noise, times=[1000 * i for i in range(6)])
    if kind.startswith("cut"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", "Invalid data"),
        ("playlist", "Invalid"),
        ("image", "Invalid"),
        ("sound", "no video stream"),
        ("no frames", "End of file"),
        ("cut mp4", "Invalid data"),
        ("cut mkv", "cut off after"),
        ("large", "64x64 px a frame; if you trust the file, raise --max_megapixels"),
        ("missing", "No such file"),
    ],
)
def test_what_is_no_whole_clip_is_refused_and_leaves_nothing(translate, refused, kind, reason):
    path = damaged(kind)
    if kind == "missing":
        path.unlink()
    options = ["--max_megapixels", "0.001"] if kind == "large" else []
    assert reason in refused(lambda argv: translate(*argv), path, *options)
    assert not {path.name for path in Path("out").iterdir()} - {gallery.RECORD, ".lock"}


@pytest.mark.parametrize("version", [None, "16.1.0"])
def test_a_missing_or_old_package_is_said_in_a_line(translate, refused, monkeypatch, capsys, version):
    def found(name):
        if version is None:
            raise video.importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(video.importlib.metadata, "version", found)
    Path("mixed").mkdir()
    write_clip("mixed/clip.mp4", [patches()])
    assert video.INSTALL in refused(lambda argv: translate(*argv), "mixed/clip.mp4")
    noise_image(0).save("mixed/photo.png")
    translate("mixed")
    assert "leaves out 1 clip" in capsys.readouterr().err
    assert Path("out/fake_B/photo.png").is_file()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--fps", "10"], "--output FILE.mp4"),
        (["--output", "new.webm"], ".mp4, .mov, .mkv"),
        (["--direction", "both", "--output", "new.mp4"], "one"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(translate, refused, argv, reason):
    Path("frames").mkdir()
    noise_image(1, (64, 64)).save("frames/1.png")
    if "both" in argv:
        save_pair("both", **{name: net for name, net in tiny_networks().items() if name.startswith("G")})
        argv = ["--run_name", "both", "--input", "frames", *argv]
        assert reason in refused(test_command.main, *argv)
    else:
        assert reason in refused(lambda argv: translate(*argv), "frames", *argv)
