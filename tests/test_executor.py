"""Micro-batches, out of memory, CPU threads and compiled networks: none of them changes what a step computes."""

import copy
import functools
import itertools
import random
import signal
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import differences, tiny_model, tiny_networks
from tiny_steps import NAMES, assert_close, batch, double_model, five_steps, weights_of

import cyclegan
from cyclegan import generator_loss
from models import VIT_SIZES, Discriminator, ResnetGenerator, VitSize, freeze
from toolkit import executor
from toolkit.executor import compile_networks, parse_micro_batch, pick_memory_format, run_in_threads
from utils import FakeImageBuffer, InputError

LIMIT = 120  # seconds; a test waits for a condition, and fails after so long without it


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# -- micro-batches ---------------------------------------------------------------------------


def test_micro_batch_is_auto_or_a_number_of_images():
    assert (parse_micro_batch("auto"), parse_micro_batch("12")) == ("auto", 12)
    for text in ("0", "-1", "1.5", "all", ""):
        with pytest.raises(ValueError, match="expected auto or an integer of at least 1"):
            parse_micro_batch(text)


@pytest.mark.parametrize(
    ("changes", "micro_batch"),
    [
        ({}, 3),
        ({}, 1),
        ({"lambda_gp": 0.1, "buffer_size": 4}, 3),
        ({"frozen": ("D",)}, 3),
        ({"norm": "none", "gan_loss": "bce", "ema": 0.9}, 3),
        ({"generator": "unet_vit"}, 3),
    ],
)
def test_micro_batches_give_the_same_steps_as_the_whole_batch(changes, micro_batch, monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, uvcgan_layers=False))

    def model(**more):
        networks = tiny_networks(**changes)
        freeze(networks, changes.get("frozen", ()))
        others = {name: value for name, value in changes.items() if name != "frozen"}
        return double_model(networks=networks, **others, **more)

    assert_close(five_steps(model()), five_steps(model(micro_batch=micro_batch)))


def test_networks_get_no_more_than_a_micro_batch_at_once():
    model = tiny_model(micro_batch=3)
    sizes = {name: [] for name in NAMES}
    for name, net in model.networks.items():
        net.register_forward_pre_hook(lambda net, inputs, name=name: sizes[name].append(len(inputs[0])))
    model.step(*batch(0))
    assert sizes["G_AB"] == [3, 3, 2, 6, 6, 4]  # the translation, then cycle and identity in one call
    assert sizes["D_A"] == [3, 3, 2, 6, 6, 4]


@pytest.mark.parametrize(("changes", "parts"), [({"micro_batch": 3}, 6), ({}, 2)])
def test_the_graph_of_a_part_is_freed_before_the_next_one_is_computed(changes, parts):
    """Of a micro-batch, and of a direction."""
    images = []

    def watched(*args):
        assert all(image() is None for image in images)
        loss, terms, translation = generator_loss(*args)
        images.append(weakref.ref(translation.fake))
        return loss, terms, translation

    tiny_model(objective=watched, **changes).step(*batch(0))
    assert len(images) == parts


def test_micro_batches_with_a_batch_norm_are_refused():
    with pytest.raises(InputError, match="--micro_batch 1: not with --norm batch"):
        tiny_model(norm="batch", micro_batch=1)


# -- both directions at the same time ----------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch, two_threads):
    """For each pair of calls, whether they were made at the same time."""
    found = []

    def watched(calls, at_once):
        found.append(at_once)
        return run_in_threads(calls, at_once)

    monkeypatch.setattr(executor, "run_in_threads", watched)
    return found


def test_directions_at_the_same_time_give_bit_for_bit_the_results_of_one_after_the_other(at_once):
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        model = tiny_model(ema=0.9, buffer_size=3)
        losses = [model.step(*batch(step, 4)) for step in range(20)]
        found.append({"losses": losses, **model.state_dict()})
    assert differences(*found) == []
    assert at_once == [True] * 80


@pytest.mark.parametrize("changes", [{"lambda_gp": 0.1}, {"norm": "batch"}, {"micro_batch": 3}])
def test_directions_run_one_after_the_other_where_their_order_matters(changes, at_once):
    """For random numbers, running statistics, and sums of three gradients."""
    tiny_model(**changes).step(*batch(0, 4))
    assert at_once == [False, False]


@pytest.mark.parametrize(("threads", "at_once", "meet", "share"), [(2, True, 2, 1), (2, False, 1, 2), (1, True, 1, 1)])
def test_calls_at_the_same_time_share_the_threads_of_the_cpu(two_threads, threads, at_once, meet, share):
    torch.set_num_threads(threads)
    both_are_here = threading.Barrier(meet, timeout=LIMIT)
    started = []

    def call(name):
        both_are_here.wait()
        started.append(name)
        return name, torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    calls = [functools.partial(call, name) for name in "AB"]
    assert run_in_threads(calls, at_once) == [("A", share, False), ("B", share, False)]
    assert meet == 2 or started == ["A", "B"]
    assert torch.get_num_threads() == threads


def test_nothing_continues_in_the_background_when_one_of_two_calls_fails(two_threads):
    failed = threading.Event()
    ended = []

    def fail():
        failed.set()
        raise torch.OutOfMemoryError

    def slow():
        assert failed.wait(LIMIT)
        time.sleep(0.1)  # in which a caller that does not wait would return
        ended.append(True)

    with pytest.raises(torch.OutOfMemoryError):
        run_in_threads([fail, slow], at_once=True)
    assert ended == [True]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that sends a signal")
@pytest.mark.parametrize("at_once", [True, False])
def test_signals_arrive_while_calls_compute(at_once, two_threads):
    arrived = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda signum, frame: arrived.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert run_in_threads([lambda: arrived.wait(LIMIT)] * 2, at_once) == [True, True]
    finally:
        signal.signal(signal.SIGALRM, before)


# -- out of memory ---------------------------------------------------------------------------


def loss_with_memory_for(most):
    """The generators' loss on a device without memory for more than `most` images; and the batch sizes it was given."""
    sizes = []

    def loss(networks, direction, real, config):
        sizes.append(len(real))
        random.random()
        torch.rand(3)  # changes the random state before memory runs out
        if len(real) > most:
            raise torch.OutOfMemoryError
        return generator_loss(networks, direction, real, config)

    return loss, sizes


def test_when_memory_runs_out_the_step_starts_over_with_smaller_micro_batches(capsys):
    enough = double_model(buffer_size=4, objective=loss_with_memory_for(8)[0])
    loss, sizes = loss_with_memory_for(3)
    scarce = double_model(buffer_size=4, objective=loss)
    whole = five_steps(enough)
    torch.manual_seed(0)
    assert_close(whole, five_steps(scarce))
    assert sizes[:10] == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert set(sizes[10:]) == {2}
    err = capsys.readouterr().err
    for size in (4, 2):
        assert f"warning: out of memory: the batch of 8 now runs in micro-batches of {size}\n" in err
    assert enough.buffers["A"].state_dict()["rng"] == scarce.buffers["A"].state_dict()["rng"]


class Memory:
    """Counts the calls of a step that take memory, and lets one of them fail."""

    def __init__(self, monkeypatch, model, failing):
        self.calls = 0
        self.failing = failing  # number of the call; 0: none
        methods = [(ResnetGenerator, "forward"), (Discriminator, "forward"), (torch.Tensor, "backward")]
        methods += [(FakeImageBuffer, "exchange"), (cyclegan, "gradient_penalty")]
        for owner, name in methods:
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))
        during_backward = self.watched(lambda gradient: None)  # other gradients are already there
        for net in model.networks.values():
            next(net.parameters()).register_hook(during_backward)

    def watched(self, plain):
        @functools.wraps(plain)
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.failing:
                raise torch.OutOfMemoryError
            return plain(*args, **kwargs)

        return call


def test_wherever_memory_runs_out_the_step_is_that_of_smaller_micro_batches_from_the_start(monkeypatch):
    def one_step(failing, **more):
        with monkeypatch.context() as patch:
            model = double_model(lambda_gp=0.1, buffer_size=2, num_residual=0, ema=0.9, **more)
            memory = Memory(patch, model, failing)
            losses = model.step(*batch(0, 4, torch.float64))
        return model.executor.micro_batch_size, {"losses": losses, **model.state_dict()}, memory.calls

    micro_batch_size, _, calls = one_step(failing=0)
    assert micro_batch_size == 0
    # 4 of generators, 2 + 2 + 2 of discriminators, 4 backward, 6 during them, 2 exchanges, 2 penalties
    assert calls == 24
    _, expected, _ = one_step(failing=0, micro_batch=2)
    for failing in range(1, calls + 1):
        micro_batch_size, found, _ = one_step(failing)
        assert micro_batch_size == 2, failing
        assert differences(expected, found) == [], failing


@pytest.mark.parametrize(
    ("changes", "most", "sizes"), [({"micro_batch": 8}, 3, [8]), ({"norm": "batch"}, 3, [8]), ({}, 0, [8, 4, 2, 1])]
)
def test_out_of_memory_is_an_error_where_micro_batches_cannot_be_smaller(changes, most, sizes):
    """With a given --micro_batch, with a batch norm, and for one image."""
    loss, found = loss_with_memory_for(most)
    model = tiny_model(**changes, objective=loss)
    before = weights_of(model)
    with pytest.raises(torch.OutOfMemoryError):
        model.step(*batch(0))
    assert found == sizes
    assert differences(before, weights_of(model)) == []


# -- compiled networks -----------------------------------------------------------------------


def test_networks_are_compiled_into_cuda_graphs_of_one_size(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net, **options: (net, options))
    networks = {"G_AB": torch.nn.Linear(1, 1), "D_A": torch.nn.Linear(1, 1)}
    with torch._dynamo.config.patch(recompile_limit=8):
        compiled = compile_networks(networks, torch.device("cuda"))
    options = {"mode": "reduce-overhead", "dynamic": False}
    assert compiled == {name: (net, options) for name, net in networks.items()}
    with pytest.raises(InputError, match=r"--compile: no gain on cpu .*; leave the flag out"):
        tiny_model(compile=True)


@pytest.mark.parametrize("most", [8, 4])
def test_compiled_networks_give_the_same_steps_and_release_their_graphs_when_memory_runs_out(monkeypatch, most):
    class Compiled:
        def __init__(self, net):
            self.net = net
            self.calls = 0

        def __getattr__(self, name):
            return getattr(self.net, name)

        def __call__(self, *args, **kwargs):
            self.calls += 1
            return self.net(*args, **kwargs)

    calls = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: calls.append("begin"))
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    loss = loss_with_memory_for(most)[0]
    plain = five_steps(double_model(objective=loss))
    monkeypatch.setattr(executor, "compile_networks", lambda networks, _: {k: Compiled(v) for k, v in networks.items()})
    model = double_model(compile=True, objective=loss)
    assert_close(five_steps(model), plain)
    assert calls == ["begin", *(["reset", "begin"] if most == 4 else []), *["begin"] * 4]
    assert all(net.calls >= 10 for net in model.executor.compiled.values())
    assert model.ema_networks["G_AB"] is model.networks["G_AB"]


def test_images_that_the_next_run_of_a_graph_overwrites_are_copied():
    outputs = []

    def overwriting(*args):
        for image in outputs:
            image.data.fill_(float("nan"))
        outputs.clear()
        loss, terms, translation = generator_loss(*args)
        outputs.append(translation.fake)
        return loss, terms, translation

    whole = five_steps(double_model(micro_batch=3))
    assert_close(whole, five_steps(double_model(micro_batch=3, objective=overwriting)))


def test_the_faster_memory_format_is_measured_without_a_trace(monkeypatch, capsys):
    model = tiny_model(ngf=16)
    before = (torch.get_rng_state(), copy.deepcopy(model.state_dict()["nets"]))
    monkeypatch.setattr(executor, "run_in_threads", lambda calls, at_once: [call() for call in calls])
    for seconds, expected in (((3.0, 1.0), "channels_last"), ((1.0, 3.0), "contiguous"), ((1.0, 1.0), "contiguous")):
        turns = [x for side in 2 * seconds for x in (0.0, side)]
        ends = itertools.accumulate([0.0, 0.0, *turns])  # the first turn has no end
        monkeypatch.setattr(executor, "time", SimpleNamespace(perf_counter=functools.partial(next, ends)))
        networks = model.networks
        assert pick_memory_format(networks["G_AB"], networks["D_B"], (1, 3, 16, 16), "fp32", True) == expected
        assert f"memory format: {expected}; channels_last is" in capsys.readouterr().out
    assert torch.equal(before[0], torch.get_rng_state())
    for name, state in before[1].items():
        for key, value in model.networks[name].state_dict().items():
            assert torch.equal(state[key], value)
    assert all(p.grad is None for net in model.networks.values() for p in net.parameters())


def test_narrow_networks_are_not_measured(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(executor, "run_in_threads", None)
    networks = model.networks
    assert pick_memory_format(networks["G_AB"], networks["D_B"], (1, 3, 16, 16), "fp32", True) == "contiguous"


def test_a_step_in_channels_last_is_that_of_contiguous_networks():
    models = [double_model(ngf=16, ema=0.9), double_model(ngf=16, ema=0.9)]
    models[1].set_memory_format("channels_last")
    assert_close(*(five_steps(model) for model in models))
    weight = models[1].ema["G_AB"].blocks[0].body[1].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
