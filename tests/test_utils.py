"""Messages, names, and the buffer of translated images."""

import sys

import pytest
import torch

import utils
from utils import FakeImageBuffer, InputError, domain_names, one_line

CPU = torch.device("cpu")


# -- messages --------------------------------------------------------------------------------


def test_one_line_escapes_control_characters_and_broken_unicode():
    assert one_line("é 猫 a\nb\r\x1b[31m\udcff") == "é 猫 a\\nb\\r\\x1b[31m\\udcff"


def test_messages_go_to_stdout_and_warnings_to_stderr_each_on_one_line(capsys):
    utils.say("a\nb")
    utils.say("an error", file=sys.stderr)
    utils.warn("c\nd")
    assert capsys.readouterr() == ("a\\nb\n", "an error\nwarning: c\\nd\n")


def test_counted_is_a_number_with_its_noun():
    assert [utils.counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]


@pytest.mark.parametrize(
    ("dataset_name", "names"),
    [
        ("horse2zebra", ("horse", "zebra")),
        ("summer2winter_yosemite", ("summer", "winter_yosemite")),
        ("my_Äpfel2Birnen", ("my_Äpfel", "Birnen")),
        *((name, ("A", "B")) for name in ("maps", "photos2", "2cats", "set2023", "a2b2c", "cat_2_dog", "v2.1", "")),
    ],
)
def test_the_name_of_a_data_set_may_name_its_domains(dataset_name, names):
    assert domain_names(dataset_name) == names
    assert domain_names(dataset_name, ["dogs", "cats\n"]) == ("dogs", "cats\\n")
    for damaged in ([], ["dogs"], ["dogs", 3], ["dogs", ""], "ab", {"A": "dogs", "B": "cats"}):
        assert domain_names(dataset_name, damaged) == names


def test_a_missing_package_is_an_error_with_the_command_that_installs_it():
    utils.need_package("torch", "--log", "pip install torch")
    with pytest.raises(InputError, match=r"--log x: the package no_such is missing; install it with: pip install it"):
        utils.need_package("no_such", "--log x", "pip install it")


# -- the buffer of translated images ---------------------------------------------------------


def numbered(*values):
    return torch.tensor([float(v) for v in values]).reshape(-1, 1, 1, 1)


def stored(buffer):
    return [x.item() for x in buffer.images]


@pytest.mark.parametrize(("size", "kept"), [(4, [1, 2, 3]), (0, [])])
def test_a_buffer_that_is_not_full_or_of_size_zero_returns_the_images_that_it_gets(size, kept):
    buffer = FakeImageBuffer(size, seed=0)
    assert torch.equal(buffer.exchange(numbered(1, 2, 3)), numbered(1, 2, 3))
    assert stored(buffer) == kept


def test_a_full_buffer_exchanges_half_of_the_images_and_loses_none():
    buffer = FakeImageBuffer(50, seed=0)
    buffer.exchange(numbered(*range(50)))
    returned = buffer.exchange(numbered(*range(50, 1050))).flatten().tolist()
    exchanged = sum(new != old for new, old in zip(range(50, 1050), returned, strict=True))
    assert 430 < exchanged < 570
    assert sorted(returned + stored(buffer)) == list(range(1050))


def test_a_buffer_stores_copies_without_gradient():
    buffer = FakeImageBuffer(2, seed=0)
    x = numbered(1).requires_grad_()
    output = buffer.exchange(x)
    assert not output.requires_grad
    with torch.no_grad():
        x.fill_(9)
    assert stored(buffer) == [1]


def test_a_buffer_continues_from_its_state_and_a_smaller_one_keeps_the_first_images():
    first = FakeImageBuffer(3, seed=0)
    first.exchange(numbered(*range(10)))
    second = FakeImageBuffer(3, seed=1)
    second.load_state_dict(first.state_dict(), CPU)
    smaller = FakeImageBuffer(2, seed=1)
    smaller.load_state_dict(first.state_dict(), CPU)
    assert stored(smaller) == stored(first)[:2]
    assert torch.equal(first.exchange(numbered(*range(20))), second.exchange(numbered(*range(20))))


def test_a_buffer_can_be_restored_to_a_snapshot_more_than_once():
    buffer = FakeImageBuffer(3, seed=0)
    buffer.exchange(numbered(*range(5)))
    snapshot = buffer.snapshot()
    before = stored(buffer)
    outputs = []
    for _ in range(2):
        outputs.append(buffer.exchange(numbered(*range(5, 25))))
        buffer.load_state_dict(snapshot, CPU)
        assert stored(buffer) == before
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.1312, "0.13 s"),
        (206.4, "206 s"),
        (2700, "45 minutes"),
        (9000, "2.5 hours"),
        (69 * 3600, "69 hours"),
        (95.2 * 86400, "95 days"),
    ],
)
def test_durations_are_easy_to_read(seconds, text):
    assert utils.duration(seconds) == text
