"""Several processes: some are forked and meet over gloo in every run of the tests, some started by torchrun (slow)."""

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

import train
import utils
from datasets import EpochSampler
from toolkit import checkpoints, devices, distributed, files
from toolkit.checkpoints import load_state
from toolkit.monitor import Meter, read_losses

ROOT = Path(train.__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


# -- two processes that meet over gloo ---------------------------------------------------------


def in_ranks(function, world):
    """Run a function in so many forked processes that know each other; returns what each gave."""

    def child(number):
        store = dist.FileStore(str(Path("store").absolute()), world)
        dist.init_process_group("gloo", store=store, rank=number, world_size=world)
        torch.save(function(), f"rank_{number}.pt")
        distributed.leave_ranks()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(number,)) for number in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return [torch.load(f"rank_{number}.pt", weights_only=True) for number in range(world)]


def learn(steps=5, batch=4, **changes):
    """What a tiny model learns from its rank's slice of a few batches, in float64."""
    model = tiny_model(dtype=torch.float64, lr=1e-3, **changes)
    own = distributed.rank_slice(batch)
    meter = Meter()
    for step in range(steps):
        noise = torch.Generator().manual_seed(step)
        A, B = torch.rand(2, batch, 3, 16, 16, dtype=torch.float64, generator=noise) * 2 - 1
        meter.add(model.step(A[own], B[own], step))
    nets = {name: net.state_dict() for name, net in model.nets.items()}
    return {"losses": meter.means(), "nets": nets, "micro_batch_size": model.micro_batch_size}


def largest_difference(one, other):
    values = [abs(one["losses"][name] - other["losses"][name]) for name in one["losses"]]
    for net, tensors in one["nets"].items():
        values += [(tensors[name] - other["nets"][net][name]).abs().max().item() for name in tensors]
    return max(values)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_ranks_learn_what_one_process_learns_from_the_same_batches():
    """Equal while the buffers of images are not full: after that each rank exchanges its own."""
    alone = learn()
    first, second = in_ranks(learn, 2)
    assert largest_difference(alone, first) < 1e-9
    assert differences(first, second) == []
    assert alone["losses"]["loss_G"] > 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_one_of_two_ranks_runs_out_of_memory_and_both_learn_the_same():
    """The other waits; gradients are averaged after the repeated step."""

    def memory_of_the_second_is_full():
        model = tiny_model(dtype=torch.float64, lr=1e-3)
        whole = model.generator_loss

        def loss(nets, domain, real, config):
            if distributed.rank() == 1 and len(real) > 1:
                raise torch.OutOfMemoryError("injected")
            return whole(nets, domain, real, config)

        return learn(generator_loss=loss)

    first, second = in_ranks(memory_of_the_second_is_full, 2)
    assert (first["micro_batch_size"], second["micro_batch_size"]) == (0, 1)
    assert differences(first["nets"], second["nets"]) == []
    assert largest_difference(learn(), first) < 1e-9


# -- torchrun ----------------------------------------------------------------------------------


def launch(*argv):
    words = [*LAUNCH, str(ROOT / "train.py"), "--dataset_name", "tiny", *map(str, argv)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
def test_a_run_of_two_ranks_resumes_bit_for_bit_and_says_what_another_world_changes(tiny):
    common = (*TINY, "--num_epochs", 3, "--buffer_size", 2, "--checkpoint_interval", 1, "--batch_size", 4)
    code, out, err = finish(launch("--run_name", "whole", *common))
    assert code == 0, err
    assert out.count("parameters:") == 1  # the first rank speaks
    whole = load_state(Path("saved_models/whole/latest.pt"))
    assert len(whole["other_ranks"]) == 1
    code, _, err = finish(launch("--run_name", "whole", "--start_from", 1, "--device", "cpu"))
    assert code == 0, err
    again = load_state(Path("saved_models/whole/latest.pt"))
    for key in ("nets", "optims", "buffers", "rng", "other_ranks", "loader"):
        assert differences(again[key], whole[key]) == [], key
    assert [row["step"] for row in read_losses(Path("saved_models/whole/losses.csv"))] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_that_dies_ends_the_others_and_one_that_is_asked_to_stop_saves_for_all(tiny, signum):
    process = launch(*TINY, "--num_epochs", 10**6, "--steps_per_epoch", 2)
    try:
        while not Path("saved_models/tiny/latest.pt").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        victim = max(map(int, workers.stdout.split()))
        os.kill(victim, signum)
        start = time.monotonic()
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert time.monotonic() - start < 60
    assert process.returncode != 0
    if signum == signal.SIGKILL:
        assert "lost another rank" in err
        assert "--start_from latest" in err
    else:
        assert "stopped and saved after step" in out
    assert load_state(Path("saved_models/tiny/latest.pt"))["step"] > 0


@pytest.mark.slow
def test_a_batch_that_two_ranks_cannot_share_ends_both_with_code_2(tiny):
    for _ in range(3):
        code, _, err = finish(launch(*TINY, "--batch_size", 3))
        assert "--batch_size 3: cannot be shared by 2 ranks" in err
        assert "terminate called" not in err
        assert "exitcode  : 2" in err
        assert code == 1  # torchrun's own


# -- the parts, in one process -----------------------------------------------------------------


def test_the_slices_of_all_ranks_make_up_the_batches_of_one_process(monkeypatch):
    def keys(rank, world):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(utils, "world", lambda: world)
        return list(EpochSampler((7, 5), 4, None, 3, distributed.rank_slice(4)))

    whole, first, second = keys(0, 1), keys(0, 2), keys(1, 2)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert [len(batch) for batch in first] == [2, 2]


def test_a_batch_that_the_ranks_cannot_share_is_refused(tiny, refused, monkeypatch):
    monkeypatch.setattr(utils, "world", lambda: 4)
    error = refused(train.main, "--dataset_name", "tiny", *TINY, "--batch_size", "10")
    assert "--batch_size 10" in error
    assert "such as 8" in error


def test_in_another_world_buffers_start_anew_and_it_is_said(tiny, capsys):
    train.main(["--dataset_name", "tiny", *TINY, "--num_epochs", "1"])
    state = load_state(Path("saved_models/tiny/latest.pt"))
    state["other_ranks"] = [{"buffers": {"A": {}, "B": {}}, "rng": None, "meter": None}]  # of a world of two
    model = tiny_model()
    checkpoints.restore(state, Path("x.pt"), model, Meter(), (3, 16, 16))
    assert "saved by 2 ranks, going on with 1" in capsys.readouterr().out
    assert len(model.buffers["A"].images) == 6  # the first rank keeps what is its own


def test_only_the_first_rank_writes_and_speaks(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    utils.say("hello")
    files.write_text(Path("x.txt"), "hello")
    utils.say("a fault", file=sys.stderr)
    assert capsys.readouterr() == ("", "a fault\n")
    assert not Path("x.txt").exists()


@pytest.mark.parametrize(("cards", "backend"), [(2, "cpu:gloo,cuda:nccl"), (1, "gloo"), (0, "gloo")])
def test_ranks_that_share_a_card_do_not_meet_over_nccl_which_refuses_that(monkeypatch, capsys, cards, backend):
    asked = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: asked.append(backend))
    distributed.join_ranks()
    assert asked == [backend]
    assert ("2 ranks share 1 of this machine's GPUs" in capsys.readouterr().out) == (cards == 1)


def test_each_rank_takes_its_own_card_and_shares_one_where_there_are_too_few(monkeypatch):
    taken = []
    monkeypatch.setattr(devices, "world", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(str(device)))
    for cards in (2, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: cards)
        for rank in "01":
            monkeypatch.setenv("LOCAL_RANK", rank)
            devices.pick_device("cuda")
    assert taken == ["cuda:0", "cuda:1", "cuda:0", "cuda:0"]
