"""Damaged and invented input never ends in a traceback; hypothesis looks for the one that does."""

import io
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_dataset, noise_picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import datasets
import distill
import test as test_stage
import train
import utils
import weights
from models import GeneratorConfig, build_generator
from utils import InputError

pytestmark = pytest.mark.slow
ROOT = Path(train.__file__).parent
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FUZZ = settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=FIXTURES)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat"]), st.floats(0, 1), st.binary(min_size=1, max_size=40)
    ),
    min_size=1,
    max_size=6,
)


def edited(data, edits):
    """Apply edits at relative places, so that they mean something in a file of any length."""
    data = bytearray(data)
    for kind, where, piece in edits:
        i = int(where * len(data))
        if kind == "flip" and i < len(data):
            data[i] ^= piece[0] or 1
        elif kind == "cut":
            del data[i : i + 1 + len(piece) ** 2]
        elif kind == "insert":
            data[i:i] = piece
        elif kind == "repeat":
            data[i:i] = data[max(0, i - 50 * len(piece)) : i]
    return bytes(data)


def is_one_line(error, name):
    """A refusal names what it is about and fits on a line that nobody has to scroll."""
    assert str(name) in str(error)
    assert len(utils.one_line(error)) < 1000


def encoded(kind, mode="RGB", **options):
    buffer = io.BytesIO()
    noise_picture(1, (24, 24), "RGB").convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@FUZZ
@given(edits=EDITS, number=st.integers(0, 9))
def test_pictures_are_read_or_called_unreadable(tmp_path, edits, number):
    kinds = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "1"), ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK")]
    kinds += [("WEBP", "RGBA"), ("BMP", "RGB"), ("TIFF", "F"), ("GIF", "P")]
    path = tmp_path / "x.png"
    path.write_bytes(edited(encoded(*kinds[number]), edits))
    try:
        x = datasets.load_picture(path, (8, 8))
    except datasets.UnreadablePicture:
        return
    assert x.shape == (3, 8, 8)
    assert x.min() >= -1
    assert x.max() <= 1


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A whole state, a generator file, and a foreign one in both of torch's formats, as bytes by suffix."""
    folder = tmp_path_factory.mktemp("sources")
    dataset = make_dataset(folder / "tiny")
    args = train.settle(train.parse_args(["--dataset_name", "tiny", *TINY]))
    run = train.make_run(args, train.make_nets(args, {}), dataset, torch.device("cpu"))
    utils.save_state(folder / "a.pt", train.state_of(run, [train.own_parts(run)]))
    weights.save_generator(folder / "b.safetensors", run.nets["G_AB"], {"direction": "AtoB", "size": [16, 16]})
    foreign = weights.to_junyanz(run.nets["G_AB"])
    torch.save(foreign, folder / "c.pth")
    torch.save(foreign, folder / "d.pth", _use_new_zipfile_serialization=False)
    return run, [path.read_bytes() for path in sorted(folder.glob("?.*"))]


@FUZZ
@given(edits=EDITS, number=st.integers(0, 3))
def test_damaged_files_of_weights_are_read_or_refused(tmp_path, sources, edits, number):
    run, contents = sources
    path = tmp_path / ("a.pt", "b.safetensors", "c.pth", "d.pth")[number]
    path.write_bytes(edited(contents[number], edits))
    try:
        if number:
            weights.load_generator(path)
        else:
            train.load_run(run, utils.load_state(path, "train"), path)
    except InputError as error:
        is_one_line(error, path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(torch.zeros(2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(value=VALUES, path=st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_states_with_any_value_in_any_place_are_read_or_refused(tmp_path, sources, value, path):
    run, contents = sources
    (tmp_path / "a.pt").write_bytes(contents[0])
    state = utils.load_state(tmp_path / "a.pt")
    place = state
    for i, number in enumerate(path):
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = keys[number % len(keys)]
        if i == len(path) - 1 or not isinstance(place[key], dict | list) or not place[key]:
            place[key] = value
            break
        place = place[key]
    torch.save(state, tmp_path / "b.pt")
    given_ = train.parse_args(["--dataset_name", "tiny", "--start_from", "latest"])
    try:
        found = utils.load_state(tmp_path / "b.pt", "train")
        train.settle(train.resume_args(train.make_parser(), given_, found.get("args"), tmp_path / "b.pt"))
        weights.networks_of(found, tmp_path / "b.pt")
        train.load_run(run, found, tmp_path / "b.pt")
    except InputError as error:
        is_one_line(error, "b.pt")


@FUZZ
@given(
    names=st.lists(
        st.sampled_from(["model.1", "model.4", "model.10.conv_block.1", "model.26", "net.0", "x"]), max_size=5
    ),
    leaf=st.sampled_from(["weight", "bias", "running_mean"]),
    shape=st.lists(st.integers(0, 9), max_size=4),
    base=st.booleans(),
)
def test_invented_weights_are_read_or_refused(tmp_path, names, leaf, shape, base):
    net = build_generator(GeneratorConfig(ngf=4, num_residual=1))
    state = weights.to_junyanz(net) if base else {}
    state |= {f"{name}.{leaf}": torch.zeros(shape) for name in names}
    torch.save(state, tmp_path / "x.pth")
    try:
        weights.load_generator(tmp_path / "x.pth")
    except InputError as error:
        is_one_line(error, "x.pth")


FLAGS = sorted({o for a in train.make_parser()._actions for o in a.option_strings} - {"-h", "--help"})
WORDS = st.sampled_from(FLAGS) | st.text(string.printable, max_size=8) | st.integers().map(str) | st.floats().map(str)


@FUZZ
@given(argv=st.lists(WORDS, max_size=8))
def test_any_command_line_is_understood_or_refused_in_one_line(argv):
    if {"-h", "--help"} & set(argv):
        return
    for stage in (train, distill, test_stage):
        try:
            stage.parse_args(argv)
        except InputError as error:
            is_one_line(error, "python")


def test_killed_runs_end_as_uninterrupted_ones(tmp_path):
    """Three SIGKILLs at random moments; the benchmark does fifty."""
    words = [sys.executable, ROOT / "benchmarks" / "faults.py", "kills", "--count", "3", "--folder", tmp_path]
    result = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills" in result.stdout
