"""Several processes: torchrun starts them, gloo connects them; the slow tests do it, the others look at the parts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY

import train
import utils
from datasets import EpochSampler
from utils import load_state, read_losses

ROOT = Path(train.__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

FIVE_STEPS = """
import sys
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import train, utils
from conftest import TINY

def five_steps():
    args = train.settle(train.parse_args(["--dataset_name", "tiny", *TINY, "--batch_size", "4", "--lr", "1e-3"]))
    run = train.make_run(args, train.make_nets(args, {{}}), None, torch.device("cpu"))
    for net in run.nets.values():
        net.double()
    run.optims = train.make_optims(run.nets, args, run.device)
    for step in range(5):
        A, B = torch.rand(2, 4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) * 2 - 1
        share = utils.own_share(4)
        run.meter.add(train.train_step(run, A[share], B[share], train.cyclegan_objective))
    losses = run.meter.means()
    return {{"losses": losses, "nets": {{name: net.state_dict() for name, net in run.nets.items()}}}}

@utils.stage
def main(argv):
    torch.save(five_steps(), f"rank_{{utils.rank()}}_of_{{utils.world()}}.pt")

if __name__ == "__main__":
    main()
"""


def largest_difference(one, other):
    values = [(one["losses"][name], other["losses"][name]) for name in one["losses"]]
    worst = max(abs(a - b) for a, b in values)
    pairs = [(one["nets"][net][k], other["nets"][net][k]) for net in one["nets"] for k in one["nets"][net]]
    return max(worst, *((a - b).abs().max().item() for a, b in pairs))


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns_from_the_same_batches(tmp_path):
    """Equal while the buffers of pictures are not full: after that each rank exchanges its own."""
    Path("five.py").write_text(FIVE_STEPS.format(root=str(ROOT)))
    subprocess.run([sys.executable, "five.py"], check=True, timeout=120)
    subprocess.run([*LAUNCH, "five.py"], check=True, timeout=120, stderr=subprocess.DEVNULL)
    alone, first, second = (torch.load(f"rank_{name}.pt") for name in ("0_of_1", "0_of_2", "1_of_2"))
    assert largest_difference(alone, first) < 1e-9
    assert largest_difference(first, second) == 0
    assert alone["losses"]["loss_G"] > 0


def launch(*argv, wait=True):
    words = [*LAUNCH, str(ROOT / "train.py"), "--dataset_name", "tiny", *map(str, argv)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return (process.communicate(timeout=120), process.returncode) if wait else process


@pytest.mark.slow
def test_a_run_of_two_ranks_resumes_bit_for_bit_and_says_what_another_world_changes(tiny):
    common = (*TINY, "--num_epochs", 3, "--buffer_size", 2, "--checkpoint_interval", 1, "--batch_size", 4)
    (out, err), code = launch("--run_name", "whole", *common)
    assert code == 0, err
    assert out.count("parameters:") == 1  # the first rank speaks
    whole = load_state(Path("saved_models/whole/latest.pt"))
    assert len(whole["other_ranks"]) == 1
    (_, err), code = launch("--run_name", "whole", "--start_from", 1, "--device", "cpu")
    assert code == 0, err
    again = load_state(Path("saved_models/whole/latest.pt"))
    for key in ("nets", "optims", "buffers", "rng", "other_ranks", "loader"):
        assert str(again[key]) == str(whole[key])
    for net in whole["nets"]:
        assert all(torch.equal(again["nets"][net][k], value) for k, value in whole["nets"][net].items())
    assert [row["step"] for row in read_losses(Path("saved_models/whole/losses.csv"))] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_that_dies_ends_the_others_and_one_that_is_asked_to_stop_saves_for_all(tiny, signum):
    process = launch(*TINY, "--num_epochs", 10**6, "--steps_per_epoch", 2, wait=False)
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
def test_a_rank_that_falls_silent_is_given_up_by_the_others(tiny):
    """Without torchrun's agent, which would end both: as on two machines."""
    code = "import sys, utils, train; utils.BEAT, utils.SILENCE = 0.2, 3; train.main(sys.argv[1:])"
    argv = [sys.executable, "-c", code, "--dataset_name", "tiny", *TINY, "--num_epochs", "1000000"]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "TORCHELASTIC_RUN_ID": "none"}
    ranks = []
    for rank in range(2):
        env = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)}
        with Path(f"rank_{rank}.txt").open("w") as file:
            ranks.append(subprocess.Popen(argv, env=env, stdout=file, stderr=file))
    try:
        while not Path("saved_models/tiny/latest.pt").exists():
            assert ranks[0].poll() is None, Path("rank_0.txt").read_text()
            time.sleep(0.1)
        ranks[1].send_signal(signal.SIGSTOP)  # its connections stay open
        ranks[0].wait(timeout=60)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert "rank 0: rank 1 has given no sign of life for 3 s" in Path("rank_0.txt").read_text()
    assert ranks[0].returncode == 1


# -- the parts, in one process ----------------------------------------------------------------


def test_the_shares_of_all_ranks_make_up_the_batches_of_one_process(monkeypatch):
    def keys(rank, world):
        monkeypatch.setattr(utils, "rank", lambda: rank)
        monkeypatch.setattr(utils, "world", lambda: world)
        return list(EpochSampler((7, 5), 4, None, 3, utils.own_share(4)))

    whole, first, second = keys(0, 1), keys(0, 2), keys(1, 2)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert [len(batch) for batch in first] == [2, 2]


def test_a_batch_that_the_ranks_cannot_share_is_refused(tiny, refused, monkeypatch):
    monkeypatch.setattr(utils, "world", lambda: 4)
    error = refused(train.main, "--dataset_name", "tiny", *TINY, "--batch_size", "10")
    assert "--batch_size 10: cannot be shared by 4 ranks; expected such as 8" in error


def test_in_another_world_buffers_start_anew_and_it_is_said(tiny, capsys, monkeypatch):
    train.main(["--dataset_name", "tiny", *TINY, "--num_epochs", "1"])
    args = train.settle(train.parse_args(["--dataset_name", "tiny", *TINY]))
    state = load_state(Path("saved_models/tiny/latest.pt"))
    state["other_ranks"] = [{"buffers": {"A": {}, "B": {}}, "rng": None, "meter": None}]  # of a world of two
    run = train.make_run(args, train.make_nets(args, {}), None, torch.device("cpu"))
    train.load_run(run, state, Path("x.pt"))
    assert "saved by 2 ranks, going on with 1" in capsys.readouterr().out
    assert len(run.buffers["A"].images) == 6  # the first rank keeps what is its own


def test_only_the_first_rank_writes_and_speaks(monkeypatch, capsys):
    monkeypatch.setattr(utils, "rank", lambda: 1)
    utils.say("hello")
    utils.write_text(Path("x.txt"), "hello")
    utils.say("a fault", file=sys.stderr)
    assert capsys.readouterr() == ("", "a fault\n")
    assert not Path("x.txt").exists()
