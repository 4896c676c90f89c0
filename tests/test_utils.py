import errno
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import utils
from toolkit import distributed, process
from toolkit.distributed import rank_slice
from toolkit.process import StopRequest, command, explain
from utils import FakeImageBuffer, InputError, RunError, domain_names, one_line

CPU = torch.device("cpu")


# -- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code"), [(InputError("a\nb\x1b[31m"), 2), (RunError("a\nb\x1b[31m"), 1)])
def test_an_expected_error_is_one_safe_line_and_its_exit_code(capsys, error, code):
    @command
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == code
    assert capsys.readouterr().err == "error: a\\nb\\x1b[31m\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FileExistsError(17, "File exists", "runs"), 2, "runs: File exists"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x.pt"), 1, "x.pt: Disk quota exceeded"),
        (MemoryError(), 1, "out of memory; training, lower --batch_size"),
        (torch.OutOfMemoryError("CUDA"), 1, "out of memory; training, lower --batch_size"),
        (RuntimeError("DataLoader worker (pid 7) is killed.\nmore"), 1, "(DataLoader worker (pid 7) is killed.); is"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_machine_refuses_is_one_line_too(capsys, error, code, words):
    @command
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a slip"), RuntimeError("shapes differ"), AssertionError()])
def test_mistakes_of_ours_are_not_dressed_up(error):
    @command
    def main(argv):
        raise error

    assert explain(error) is None
    with pytest.raises(type(error)):
        main([])


def test_a_stage_hands_on_its_arguments_its_result_and_its_own_exit():
    @command
    def main(argv=None):
        if argv == ["stop"]:
            raise SystemExit(143)
        return argv

    assert main(["a"]) == ["a"]
    assert main.__name__ == "main"
    with pytest.raises(SystemExit) as exit_:
        main(["stop"])
    assert exit_.value.code == 143


def test_sigterm_ends_a_stage_with_143_after_its_cleaning_up():
    cleaned = []
    before = signal.getsignal(signal.SIGTERM)

    @command
    def main(argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 143
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_rank_that_is_not_the_first_says_which_it_is(capsys, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)

    @command
    def main(argv):
        raise InputError("wrong")

    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err == "error: rank 3: wrong\n"


def test_one_line_escapes_what_a_terminal_would_obey():
    assert one_line("é 猫 a\nb\r\udcff") == "é 猫 a\\nb\\r\\udcff"


@pytest.mark.parametrize(
    ("dataset_name", "names"),
    [
        ("horse2zebra", ("horse", "zebra")),
        ("summer2winter_yosemite", ("summer", "winter_yosemite")),
        ("my_Äpfel2Birnen", ("my_Äpfel", "Birnen")),
        *((name, ("A", "B")) for name in ("maps", "photos2", "2cats", "set2023", "a2b2c", "cat_2_dog", "v2.1", "")),
    ],
)
def test_domains_are_named_after_a_data_set_whose_name_says_what_becomes_what(dataset_name, names):
    assert domain_names(dataset_name) == names


def test_words_go_to_stdout_and_warnings_to_stderr_each_on_one_line(capsys):
    utils.say("a\nb")
    utils.warn("c\nd")
    assert capsys.readouterr() == ("a\\nb\n", "warning: c\\nd\n")


def test_only_the_first_rank_speaks_on_stdout(capsys, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    utils.say("hello")
    utils.warn("a fault")
    utils.say("an error", file=sys.stderr)
    assert capsys.readouterr() == ("", "warning: a fault\nan error\n")


def test_a_missing_package_is_named_with_its_remedy():
    utils.need_package("torch", "--log", "pip install torch")
    with pytest.raises(InputError, match=r"--log x: the package no_such is missing; install it with: pip install it"):
        utils.need_package("no_such", "--log x", "pip install it")


# -- ranks -----------------------------------------------------------------------------------


@pytest.fixture
def of_two(monkeypatch):
    """This process is the second of two ranks; what the other holds is twice as much."""

    def all_reduce(x, op=utils.dist.ReduceOp.SUM):
        x.mul_(2) if op == utils.dist.ReduceOp.MAX else x.mul_(3)

    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(utils, "world", lambda: 2)
    monkeypatch.setattr(utils.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(utils.dist, "all_reduce", all_reduce)


def test_the_slices_of_all_ranks_make_up_the_batch(monkeypatch):
    batch = list(range(12))
    for world in (1, 2, 3, 4, 6, 12):
        monkeypatch.setattr(utils, "world", lambda world=world: world)
        found = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            found += batch[rank_slice(12)]
        assert found == batch


@pytest.mark.parametrize(("batch_size", "world", "fitting"), [(10, 4, 8), (11, 4, 12), (1, 4, 4), (7, 2, 8)])
def test_a_batch_that_the_ranks_cannot_share_is_refused_with_one_that_fits(monkeypatch, batch_size, world, fitting):
    monkeypatch.setattr(utils, "world", lambda: world)
    words = f"--batch_size {batch_size}: cannot be shared by {world} ranks; expected such as {fitting}$"
    with pytest.raises(InputError, match=words):
        rank_slice(batch_size)
    assert fitting % world == 0


def test_alone_the_collectives_change_nothing():
    x = torch.tensor([1.0, 2.0])
    distributed.average([x])
    assert x.tolist() == [1, 2]
    assert distributed.max_over_ranks(7) == 7
    assert distributed.gather("mine") == ["mine"]
    distributed.barrier()
    with distributed.first_rank_first():
        pass


def test_tensors_are_averaged_over_the_ranks_in_one_message(of_two, monkeypatch):
    messages = []
    plain = utils.dist.all_reduce
    monkeypatch.setattr(utils.dist, "all_reduce", lambda x, *op: (messages.append(x.numel()), plain(x, *op)))
    tensors = [torch.tensor([[2.0, 4.0]]), torch.tensor(6.0), torch.ones(2, 1, requires_grad=True)]
    distributed.average(tensors)
    assert messages == [5]
    assert [x.tolist() for x in tensors] == [[[3, 6]], 9, [[1.5], [1.5]]]  # (x + 2 x) / 2
    distributed.average([])
    assert messages == [5]


def test_the_largest_number_of_all_ranks_is_known_to_each(of_two):
    assert distributed.max_over_ranks(True) == 2
    assert distributed.max_over_ranks(0) == 0
    stop = StopRequest()
    assert stop.agreed() == 0
    stop.signum = 2
    assert stop.agreed() == 4  # the other's is larger


def test_a_lost_rank_is_one_line_with_the_way_to_go_on(of_two, monkeypatch):
    def lost(*args):
        raise RuntimeError(f"connection closed by peer {'x' * 200}\nat line 7")

    monkeypatch.setattr(utils.dist, "all_reduce", lost)
    for call in (lambda: distributed.average([torch.ones(1)]), distributed.barrier):
        with pytest.raises(RunError, match=r"lost another rank.*closed by peer.*--start_from latest") as error:
            call()
        assert len(str(error.value)) < 200
        assert "\n" not in str(error.value)


def test_what_the_first_rank_writes_is_written_once(monkeypatch):
    @distributed.first_rank
    def write(text):
        """Write."""
        written.append(text)
        return text

    written = []
    assert write("a") == "a"
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert write(text="b") is None
    assert written == ["a"]
    assert write.__doc__ == "Write."


def test_the_first_rank_runs_a_block_before_the_others(monkeypatch):
    for rank, expected in ((0, ["block", "meet"]), (1, ["meet", "block"])):
        order = []
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(utils, "barrier", lambda order=order: order.append("meet"))
        with distributed.first_rank_first():
            order.append("block")
        assert order == expected


# -- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_answered_and_noted_once_and_obeyed_the_second_time(signum, capfd):
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        assert stop.signum is None
        signal.raise_signal(signum)
        assert stop.signum == signum
        assert stop.agreed() == signum
        assert capfd.readouterr().err == "\nfinishing this step, then saving; once more to leave without saving\n"
        with pytest.raises(SystemExit) as exit_:
            signal.raise_signal(signum)
        assert exit_.value.code == 128 + signum
    assert signal.getsignal(signum) is before


def test_of_several_ranks_a_second_signal_is_not_obeyed_at_once(monkeypatch, capfd):
    """Since torchrun hands on what the terminal sent to all of them already."""
    monkeypatch.setattr(utils, "world", lambda: 2)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
    assert capfd.readouterr().err == "\nfinishing this step, then saving\n"  # said once, and nothing that is not so


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals to lose")
@pytest.mark.parametrize(("handler", "noted"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_lost_terminal_asks_to_stop_unless_nohup_ignores_it(handler, noted):
    before = signal.signal(signal.SIGHUP, handler)  # the tests themselves may run under nohup
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signum == (signal.SIGHUP if noted else None)
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_signals_are_left_alone():
    def work():
        with StopRequest() as stop, process.exit_on_sigterm():
            found.append(stop.signum)

    found = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
    assert signal.getsignal(signal.SIGTERM) is before


# -- buffer ----------------------------------------------------------------------------------


def numbered(*values):
    return torch.tensor([float(v) for v in values]).reshape(-1, 1, 1, 1)


def test_the_buffer_hands_everything_back_until_it_is_full():
    buffer = FakeImageBuffer(4, seed=0)
    assert torch.equal(buffer.exchange(numbered(1, 2, 3)), numbered(1, 2, 3))
    assert len(buffer.images) == 3


def test_a_full_buffer_exchanges_half_and_loses_nothing():
    buffer = FakeImageBuffer(50, seed=0)
    buffer.exchange(numbered(*range(50)))
    seen = []
    older = 0
    for i in range(50, 1050):
        (output,) = buffer.exchange(numbered(i)).flatten().tolist()
        seen.append(output)
        older += output != i
    assert 430 < older < 570
    kept = [x.item() for x in buffer.images]
    assert sorted(seen + kept) == list(range(1050))


def test_a_buffer_of_size_zero_passes_images_through():
    buffer = FakeImageBuffer(0, seed=0)
    assert torch.equal(buffer.exchange(numbered(1, 2)), numbered(1, 2))
    assert buffer.images == []


def test_the_buffer_keeps_copies_without_gradient():
    buffer = FakeImageBuffer(2, seed=0)
    x = numbered(1).requires_grad_()
    output = buffer.exchange(x)
    assert not output.requires_grad
    with torch.no_grad():
        x.fill_(9)
    assert buffer.images[0].item() == 1


def test_a_restored_buffer_goes_on_as_the_first_would():
    first = FakeImageBuffer(3, seed=0)
    second = FakeImageBuffer(3, seed=1)
    first.exchange(numbered(*range(10)))
    second.load_state_dict(first.state_dict(), CPU)
    for i in range(20):
        assert torch.equal(first.exchange(numbered(i)), second.exchange(numbered(i)))


def test_a_smaller_buffer_keeps_the_first_images_of_a_larger_one():
    large = FakeImageBuffer(5, seed=0)
    large.exchange(numbered(*range(5)))
    small = FakeImageBuffer(2, seed=0)
    small.load_state_dict(large.state_dict(), CPU)
    assert [x.item() for x in small.images] == [0, 1]


def test_a_buffer_returns_to_the_state_that_was_marked():
    buffer = FakeImageBuffer(3, seed=0)
    buffer.exchange(numbered(*range(5)))
    mark = buffer.mark()
    kept = [x.item() for x in buffer.images]
    outputs = []
    for _ in range(2):  # a mark serves more than once
        outputs.append(buffer.exchange(numbered(*range(5, 25))))
        buffer.back_to(mark)
        assert [x.item() for x in buffer.images] == kept
    assert torch.equal(*outputs)


def test_buffers_of_other_seeds_exchange_other_images():
    outputs = [FakeImageBuffer(3, seed).exchange(numbered(*range(40))).tolist() for seed in ("0-A", "0-B", "0-A")]
    assert outputs[0] != outputs[1]
    assert outputs[0] == outputs[2]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc to see how far the imports are")
def test_ctrl_c_during_the_imports_ends_without_a_traceback():
    stage = str(Path(utils.__file__).with_name("train.py"))
    process = subprocess.Popen(
        [sys.executable, stage, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (-signal.SIGINT, "")  # which a shell calls 130
    assert "Traceback" not in err


def test_things_are_counted_in_words():
    assert [utils.counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
