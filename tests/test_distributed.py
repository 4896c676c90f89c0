"""Several processes: parts in one process; forked ranks that meet over gloo; ranks started by torchrun (slow)."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, differences, tiny_model
from tiny_runs import save_run, state_of

import train
import utils
from cyclegan import generator_loss
from datasets import EpochSampler
from toolkit import checkpoints, distributed, files
from toolkit.distributed import rank_slice
from toolkit.logs import Meter, read_losses
from toolkit.process import StopRequest
from utils import InputError, RunError

ROOT = Path(train.__file__).parent
LIMIT = 300  # seconds; a test waits for a condition, and fails after so long without it


# -- parts, in one process ---------------------------------------------------------------------


@pytest.fixture
def as_rank(monkeypatch):
    """Let this process be a rank of several. A value of the other ranks is twice that of this one."""

    def all_reduce(x, op=dist.ReduceOp.SUM):
        return x.mul_(2) if op == dist.ReduceOp.MAX else x.mul_(3)

    def patch(rank, world_size):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)

    return patch


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_the_slices_of_all_ranks_make_up_the_batches_of_one_process(as_rank, world_size):
    as_rank(0, 1)
    whole = list(EpochSampler((15, 11), 12, seed=3))
    parts = []
    for rank in range(world_size):
        as_rank(rank, world_size)
        parts.append(list(EpochSampler((15, 11), 12, seed=3)))
    assert [list(itertools.chain(*batches)) for batches in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize(("batch_size", "world_size"), [(10, 4), (1, 4), (7, 2)])
def test_a_batch_that_ranks_cannot_share_is_refused(as_rank, batch_size, world_size):
    as_rank(0, world_size)
    error = f"--batch_size {batch_size}: {world_size} ranks cannot share it; expected a multiple of {world_size}$"
    with pytest.raises(InputError, match=error):
        rank_slice(batch_size)


def test_tensors_are_averaged_over_the_ranks_in_one_message(as_rank, monkeypatch):
    as_rank(1, 2)
    messages = []
    plain = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda x, *op: (messages.append(x.numel()), plain(x, *op)))
    tensors = [torch.tensor([[2.0, 4.0]]), torch.tensor(6.0), torch.ones(2, 1, requires_grad=True)]
    distributed.average(tensors)
    assert messages == [5]
    assert [x.tolist() for x in tensors] == [[[3, 6]], 9, [[1.5], [1.5]]]  # (x + 2 x) / 2
    distributed.average([])
    assert messages == [5]


def test_every_rank_knows_the_largest_number_of_all_and_the_signal_of_another(as_rank):
    assert distributed.max_over_ranks(7) == 7  # a single process
    as_rank(1, 2)
    assert distributed.max_over_ranks(True) == 2
    stop = StopRequest()
    assert stop.agreed() == 0
    stop.signum = 2
    assert stop.agreed() == 4


def test_a_lost_rank_is_one_line_that_says_how_to_continue(as_rank, monkeypatch):
    def lose(*args):
        raise RuntimeError(f"connection closed by peer {'x' * 200}\nat line 7")

    as_rank(1, 2)
    monkeypatch.setattr(dist, "all_reduce", lose)
    for call in (lambda: distributed.average([torch.ones(1)]), lambda: distributed.max_over_ranks(0)):
        with pytest.raises(RunError, match=r"lost another rank.*closed by peer.*--start_from latest") as error:
            call()
        assert len(str(error.value)) < 200
        assert "\n" not in str(error.value)


def test_only_the_first_rank_writes_files_and_prints_on_stdout(as_rank, capsys):
    @distributed.first_rank
    def double(number):
        """Double it."""
        return 2 * number

    assert (double(3), double.__doc__) == (6, "Double it.")
    as_rank(1, 2)
    assert double(number=3) is None
    utils.say("hello")
    utils.warn("a problem")
    files.write_text(Path("x.txt"), "hello")
    assert capsys.readouterr() == ("", "warning: a problem\n")
    assert not Path("x.txt").exists()


@pytest.mark.parametrize(("rank", "expected"), [(0, ["block", "meet"]), (1, ["meet", "block"])])
def test_the_first_rank_runs_a_block_before_the_others(as_rank, monkeypatch, rank, expected):
    order = []
    as_rank(rank, 2)
    monkeypatch.setattr(distributed, "max_over_ranks", lambda _: order.append("meet"))
    with distributed.first_rank_first():
        order.append("block")
    assert order == expected


@pytest.mark.parametrize(("gpus", "backend"), [(2, "cpu:gloo,cuda:nccl"), (1, "gloo"), (0, "gloo")])
def test_ranks_that_share_a_gpu_do_not_use_nccl_which_refuses_that(monkeypatch, capsys, gpus, backend):
    used = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: used.append(backend))
    distributed.join_ranks()
    assert used == [backend]
    assert ("2 ranks share 1 of this machine's GPUs" in capsys.readouterr().out) == (gpus == 1)


def test_with_another_number_of_ranks_new_ones_start_with_empty_buffers_and_it_is_said(as_rank, capsys):
    save_run(epochs=1)
    state = state_of("tiny")
    assert checkpoints.own_rank_state(state)["buffers"] is state["buffers"]
    assert capsys.readouterr().out == ""
    as_rank(0, 2)
    own = checkpoints.own_rank_state(state)
    assert "saved by 1 rank, resumed with 2" in capsys.readouterr().out
    assert (own["buffers"], own["rng"]) == (state["buffers"], state["rng"])
    as_rank(1, 2)
    own = checkpoints.own_rank_state(state)
    assert own["buffers"] is None
    model = tiny_model()
    model.load_state_dict({**state, **own})
    assert model.buffers["A"].images == []


# -- forked ranks ------------------------------------------------------------------------------


def in_ranks(function, world_size):
    """Run a function in forked processes that are ranks of one group; returns their results."""

    def child(number):
        store = dist.FileStore(str(Path("store").absolute()), world_size)
        dist.init_process_group("gloo", store=store, rank=number, world_size=world_size)
        torch.save(function(), f"rank_{number}.pt")
        distributed.leave_ranks()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(number,)) for number in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=LIMIT)
        assert process.exitcode == 0
    return [torch.load(f"rank_{number}.pt", weights_only=True) for number in range(world_size)]


def learn(batch=4, **changes):
    """Five steps of a tiny float64 model on this rank's slice of some batches: its losses and weights."""
    model = tiny_model(dtype=torch.float64, lr=1e-3, **changes)
    own = rank_slice(batch)
    meter = Meter()
    for step in range(5):
        noise = torch.Generator().manual_seed(step)
        A, B = torch.rand(2, batch, 3, 16, 16, dtype=torch.float64, generator=noise) * 2 - 1
        meter.add(model.step(A[own], B[own]))
    weights = {name: net.state_dict() for name, net in model.networks.items()}
    return {"losses": meter.means(), "weights": weights, "micro_batch_size": model.executor.micro_batch_size}


def largest_difference(one, other):
    values = [abs(one["losses"][name] - other["losses"][name]) for name in one["losses"]]
    for net, tensors in one["weights"].items():
        values += [(tensors[name] - other["weights"][net][name]).abs().max().item() for name in tensors]
    return max(values)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_two_ranks_learn_what_one_process_learns_from_the_same_batches(norm):
    """Equal while the image buffers are not full: after that each rank exchanges its own images."""
    alone = learn(norm=norm)
    first, second = in_ranks(lambda: learn(norm=norm), 2)
    assert differences(first, second) == []
    if norm != "batch":  # whose statistics are those of a rank's slice, and averaged
        assert largest_difference(alone, first) < 1e-9


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_when_one_of_two_ranks_runs_out_of_memory_both_still_learn_the_same():
    """The other waits; gradients are averaged after the repeated step."""

    def loss(networks, direction, real, config):
        if distributed.rank() == 1 and len(real) > 1:
            raise torch.OutOfMemoryError("injected")
        return generator_loss(networks, direction, real, config)

    first, second = in_ranks(lambda: learn(objective=loss), 2)
    assert (first["micro_batch_size"], second["micro_batch_size"]) == (0, 1)
    assert differences(first["weights"], second["weights"]) == []
    assert largest_difference(learn(), first) < 1e-9


# -- torchrun ----------------------------------------------------------------------------------


def launch(*argv):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    call = [*torchrun, str(ROOT / "train.py"), "--dataset_name", "tiny", *map(str, argv)]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process):
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


@pytest.mark.slow
def test_a_run_of_two_ranks_resumes_bit_for_bit(tiny):
    common = (*TINY, "--num_epochs", 3, "--buffer_size", 2, "--checkpoint_interval", 1, "--batch_size", 4)
    code, out, err = finish(launch("--run_name", "whole", *common))
    assert code == 0, err
    assert out.count("parameters:") == 1  # only the first rank prints
    whole = state_of("whole")
    assert len(whole["other_ranks"]) == 1
    code, _, err = finish(launch("--run_name", "whole", "--start_from", 1, "--device", "cpu"))
    assert code == 0, err
    again = state_of("whole")
    for key in ("nets", "optims", "buffers", "rng", "other_ranks", "meter"):
        assert differences(again[key], whole[key]) == [], key
    assert [row["step"] for row in read_losses(Path("saved_models/whole/losses.csv"))] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_that_dies_ends_the_others_and_a_rank_that_is_asked_to_stop_saves_for_all(tiny, signum):
    process = launch(*TINY, "--num_epochs", 10**6, "--steps_per_epoch", 2)
    try:
        while not Path("saved_models/tiny/latest.pt").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(max(map(int, workers.stdout.split())), signum)
        code, out, err = finish(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert code != 0
    if signum == signal.SIGKILL:
        assert "lost another rank" in err
        assert "--start_from latest" in err
    else:
        assert "stopped and saved after step" in out
    assert state_of("tiny")["step"] > 0


@pytest.mark.slow
def test_a_batch_that_two_ranks_cannot_share_ends_both_with_code_2(tiny):
    for _ in range(3):  # ranks that end at the same time once ended in an abort, but not always
        code, _, err = finish(launch(*TINY, "--batch_size", 3))
        assert "--batch_size 3: 2 ranks cannot share it" in err
        assert "terminate called" not in err
        assert "exitcode  : 2" in err
        assert code == 1  # torchrun's own
