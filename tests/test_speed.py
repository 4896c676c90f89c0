"""What makes a step faster or smaller must not change what is learnt."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

import train
import utils
from utils import load_state

ROOT = Path(train.__file__).parent


def wide_run(*flags):
    """A run in float64 without data, as train.main would start it."""
    args = train.settle(train.parse_args(["--dataset_name", "tiny", *TINY, *flags]))
    run = train.make_run(args, train.make_nets(args, {}), None, torch.device("cpu"))
    for net in run.nets.values():
        net.double()
    run.optims = train.make_optims(run.nets, args, run.device)
    return run


def five_steps(run, objective=train.cyclegan_objective, batch=8):
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        A, B = torch.rand(2, batch, 3, 16, 16, dtype=torch.float64, generator=generator) * 2 - 1
        losses = train.train_step(run, A, B, objective)
    weights = {f"{n} {k}": v.clone() for n, net in run.nets.items() for k, v in net.state_dict().items()}
    return weights, {name: value.item() for name, value in losses.items()}


def assert_close(one, other):
    for values, others in zip(one, other, strict=True):
        assert values.keys() == others.keys()
        for name, value in values.items():
            assert torch.as_tensor(value - others[name]).abs().max() < 1e-9, name


def load_benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_step_equals_the_plain_one_of_the_paper_over_20_steps_in_float64(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    step = load_benchmark("step")
    config = step.parse_args([])
    config.size, config.batch, config.ngf, config.blocks, config.n_layers_D = 16, 2, 4, 1, 1
    assert step.check(config) < 1e-9


# -- pieces of a batch ------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--lambda_gp", "0.1", "--buffer_size", "4"), ("--freeze", "D")])
def test_a_batch_of_8_in_pieces_of_3_teaches_what_the_whole_batch_teaches(flags):
    whole = five_steps(wide_run(*flags))
    assert_close(whole, five_steps(wide_run(*flags, "--micro_batch", "3")))


def objective_that_needs(most):
    """The CycleGAN objective on a machine that has no memory for more than `most` pictures."""
    asked, plain = [], train.cyclegan_objective

    def objective(run, A, B):
        asked.append(len(A))
        torch.rand(3)  # moves the random state before memory runs out
        if len(A) > most:
            raise torch.OutOfMemoryError
        return plain(run, A, B)

    return objective, asked


def test_out_of_memory_is_survived_with_smaller_pieces_and_nothing_is_learnt_or_kept_twice(capsys):
    plenty, scarce = wide_run("--buffer_size", "4"), wide_run("--buffer_size", "4")
    torch.manual_seed(1)
    whole = five_steps(plenty, objective_that_needs(8)[0])
    objective, asked = objective_that_needs(3)
    torch.manual_seed(1)
    assert_close(whole, five_steps(scarce, objective))
    assert asked[:6] == [8, 4, 2, 2, 2, 2]
    assert set(asked[6:]) == {2}
    err = capsys.readouterr().err
    assert "out of memory: the batch of 8 is worked off in pieces of 4 from now on" in err
    assert "pieces of 2 from now on" in err
    kept = [run.buffers["A"].state_dict() for run in (plenty, scarce)]
    assert kept[0]["rng"] == kept[1]["rng"]


def test_memory_that_runs_out_in_the_discriminators_half_does_not_fill_the_buffer_twice(monkeypatch):
    run, plain, calls = wide_run("--buffer_size", "50"), train.judge, []

    def judge(run, domain, real, fake):
        calls.append(domain)
        if calls == ["A", "B"]:
            raise torch.OutOfMemoryError
        return plain(run, domain, real, fake)

    whole = five_steps(wide_run("--buffer_size", "50"))
    monkeypatch.setattr(train, "judge", judge)
    assert_close(whole, five_steps(run))
    assert len(run.buffers["A"].images) == len(run.buffers["B"].images) == 40
    assert run.piece == 4


@pytest.mark.parametrize("flags", [("--micro_batch", "8"), ("--norm", "batch")])
def test_pieces_are_not_halved_against_the_users_word_or_a_batch_norm(flags):
    with pytest.raises(torch.OutOfMemoryError):
        five_steps(wide_run(*flags), objective_that_needs(3)[0])


def test_one_picture_that_does_not_fit_ends_the_run_in_one_line(tiny, refused, monkeypatch):
    monkeypatch.setattr(train, "cyclegan_objective", objective_that_needs(0)[0])
    assert "out of memory" in refused(train.main, "--dataset_name", "tiny", *TINY, code=1)


def test_the_size_of_the_pieces_is_kept_over_a_resume(tiny, monkeypatch):
    objective, asked = objective_that_needs(1)
    monkeypatch.setattr(train, "cyclegan_objective", objective)
    train.main(["--dataset_name", "tiny", *TINY, "--num_epochs", "1"])
    assert asked[:2] == [2, 1]
    assert load_state(Path("saved_models/tiny/latest.pt"))["loader"]["piece"] == 1
    asked.clear()
    train.main(["--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "2", "--device", "cpu"])
    assert set(asked) == {1}


def test_pieces_with_a_batch_norm_are_refused(tiny, refused):
    argv = ["--dataset_name", "tiny", *TINY, "--norm", "batch", "--micro_batch", "1"]
    assert "--micro_batch 1: a batch norm" in refused(train.main, *argv)


# -- precision --------------------------------------------------------------------------------


def test_scaled_losses_teach_the_same_and_a_step_without_finite_gradients_is_left_out():
    """The scaler of fp16, run in float64 on the CPU."""
    plain, scaled = wide_run(), wide_run()
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    assert_close(five_steps(plain), five_steps(scaled))
    before = [p.clone() for p in scaled.nets["G_AB"].parameters()]
    A, B = torch.rand(2, 2, 3, 16, 16, dtype=torch.float64)

    def overflows(run, A, B):
        loss, terms, seen = train.cyclegan_objective(run, A, B)
        return loss * float("inf"), terms, seen

    train.train_step(scaled, A, B, overflows)
    assert all(map(torch.equal, before, scaled.nets["G_AB"].parameters()))
    assert scaled.scaler.get_scale() == 2.0**15


def test_the_scale_of_the_losses_stands_in_the_state(tiny, monkeypatch):
    monkeypatch.setattr(utils, "pick_precision", lambda name, device: "fp16")
    monkeypatch.setattr(utils, "autocast", lambda device, precision: torch.autocast("cpu", enabled=False))
    train.main(["--dataset_name", "tiny", *TINY, "--num_epochs", "1"])
    assert load_state(Path("saved_models/tiny/latest.pt"))["scaler"]["scale"] == 2.0**16
    train.main(["--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "2", "--device", "cpu"])
    assert load_state(Path("saved_models/tiny/latest.pt"))["scaler"]["_growth_tracker"] == 6


def test_auto_takes_what_the_device_computes_natively(monkeypatch):
    cuda = torch.device("cuda")
    for capability, precision in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert utils.pick_precision("auto", cuda) == precision
    assert utils.pick_precision("fp16", cuda) == "fp16"


@pytest.mark.parametrize(("flag", "words"), [(("--precision", "fp16"), "needs a CUDA GPU"), (("--compile",), "gains")])
def test_what_the_device_cannot_is_refused_with_what_works(tiny, refused, flag, words):
    error = refused(train.main, "--dataset_name", "tiny", *TINY, *flag)
    assert flag[0] in error
    assert words in error
    assert "bf16" in error or "fp32" in error or "leave the flag out" in error


# -- memory format and compilation ------------------------------------------------------------


def test_moments_that_were_saved_in_another_memory_format_fit_their_weights():
    weight = torch.nn.Parameter(torch.rand(4, 3, 3, 3))
    optim = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.rand_like(weight)
    optim.step()
    saved = optim.state_dict()
    moments = {
        key: value.to(memory_format=torch.channels_last) for key, value in saved["state"][0].items() if value.ndim
    }
    saved["state"][0] |= moments
    other = torch.optim.Adam([weight], fused=True)
    train.load_optim(other, saved)
    assert other.state[weight]["exp_avg"].stride() == weight.stride()
    assert torch.equal(other.state[weight]["exp_avg"], moments["exp_avg"])


def test_compiled_networks_run_in_the_objective_alone_and_keep_their_names_in_the_state(monkeypatch):
    class Compiled:
        def __init__(self, net, **options):
            self.net, self.options, self.calls = net, options, 0

        def __getattr__(self, name):
            return getattr(self.net, name)

        def __call__(self, *args, **kwargs):
            self.calls += 1
            return self.net(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", Compiled)
    run = wide_run("--lambda_gp", "1")
    run.compiled = train.compile_nets(run.nets, torch.device("cuda"))
    assert [net.options for net in run.compiled.values()] == [{"mode": "reduce-overhead", "dynamic": False}] * 4
    assert_close(five_steps(run), five_steps(wide_run("--lambda_gp", "1")))
    assert {name: net.calls for name, net in run.compiled.items()} == {"G_AB": 10, "G_BA": 10, "D_A": 10, "D_B": 10}
    assert run.shown["G_AB"] is run.nets["G_AB"]
