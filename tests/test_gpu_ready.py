"""What can be tested for a GPU without one: a step leaves no tensor on the host, networks compile, fp16 is scaled."""

import contextlib
import copy
import functools

import pytest
import torch
from conftest import differences, tiny_model, tiny_networks
from tiny_runs import run_tiny, state_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cyclegan
import distill
import train
from cyclegan import gradient_penalty
from models import (
    DIRECTIONS,
    VIT_SIZES,
    DiscriminatorConfig,
    GeneratorConfig,
    VitSize,
    build_discriminator,
    build_generator,
)
from toolkit import executor

META = torch.device("meta")


def batch(seed, size=4, dtype=torch.float32, device="cpu"):
    """real_A and real_B of 16 px."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(2, size, 3, 16, 16, dtype=dtype, generator=generator) * 2 - 1).to(device)


@pytest.fixture
def tiny_vit(monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, uvcgan_layers=False))


# -- a step leaves no tensor on the host -----------------------------------------------------


class OnlyOn(TorchDispatchMode):
    """Fails at the first operation with a tensor on another device, except inside Adam.

    The meta device itself rejects `.item()` and `.cpu()`, but accepts tensors that were computed on the host and
    copied, and tensors without dimensions, for which a GPU has to wait, too.
    """

    def __init__(self, device, optimizers):
        super().__init__()
        self.device = device
        self.operations = 0
        self.in_adam = False  # its fused kernel does not support meta
        for optimizer in optimizers.values():
            optimizer.register_step_pre_hook(functools.partial(self.enter, True))
            optimizer.register_step_post_hook(functools.partial(self.enter, False))

    def enter(self, inside, *_):
        self.in_adam = inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.operations += 1
        for value in tree_leaves((args, kwargs, output)):
            if isinstance(value, Tensor) and not self.in_adam:
                assert value.device == self.device, f"{func}: {tuple(value.shape)} on {value.device}"
        return output


def step_on_meta(monkeypatch, networks, **changes):
    """The losses of a step on the meta device, where tensors have no values."""
    for module in (executor, cyclegan):  # torch.autocast does not know the device
        monkeypatch.setattr(module, "autocast", lambda device, precision: contextlib.nullcontext())
    for net in networks.values():
        net.to(META)
    model = tiny_model(networks=networks, ema=0.9, buffer_size=3, **changes)
    guard = OnlyOn(META, model.optimizers)
    reals = batch(0, device=META)
    with guard:
        losses = model.step(*reals)
    assert guard.operations > 500
    assert {value.device for value in losses.values()} == {META}
    return losses


STEPS = [
    {"lambda_gp": 0.1},
    {"generator": "unet_vit", "lambda_gp": 0.1, "gan_loss": "hinge"},
    {"norm": "batch", "skips": True, "upsample": "resize", "discriminator": "pixel", "pool": True, "gan_loss": "bce"},
    {"norm": "instance_affine", "micro_batch": 3, "lambda_identity": 0.0, "norm_output": True},
]


@pytest.mark.parametrize("changes", STEPS)
def test_a_step_leaves_no_tensor_on_the_host(changes, tiny_vit, monkeypatch):
    losses = step_on_meta(monkeypatch, tiny_networks(**changes), **changes)
    assert ("gp_A" in losses) == ("lambda_gp" in changes)


@pytest.mark.parametrize("changes", [{"ngf": 8, "num_residual": 2}, {"generator": "unet_vit"}])
def test_a_step_of_a_distillation_leaves_no_tensor_on_the_host(changes, tiny_vit, monkeypatch):
    networks = tiny_networks(**changes)
    teachers = {d.generator: networks[d.generator].requires_grad_(False).eval().to(META) for d in DIRECTIONS}
    students = tiny_networks(generator=changes.get("generator", "resnet"), vit_blocks=1)
    pairs = distill.pair_blocks(teachers["G_AB"].config.blocks, students["G_AB"].config.blocks)
    blocks = dict.fromkeys(teachers, pairs)
    adapters = distill.make_adapters(teachers, students, blocks).to(META)
    assert len(adapters) == (2 if "ngf" in changes else 0)
    loss = distill.DistillationLoss(teachers, adapters, blocks, 1.0, 10.0)
    losses = step_on_meta(monkeypatch, students, adapters=adapters, objective=loss)
    assert {"output_AB", "hidden_AB", "output_BA", "hidden_BA"} <= losses.keys()


# -- every network compiles ------------------------------------------------------------------
# In one graph (fullgraph). --compile makes a graph for each size (dynamic=False), and none for a size seen before.
# With dynamic=None the second size makes one graph for all sizes, and a third size makes none.


@pytest.fixture
def compiled(tiny_vit):
    """torch.compile with a backend that generates no machine code: everything that Dynamo and autograd do."""
    torch.compiler.reset()
    yield functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


def call(net, size, hidden, device="cpu"):
    """Results of a forward pass, in training mode also of a backward pass, for images of size (N, height, width)."""
    torch.manual_seed(0)
    x = (torch.rand(size[0], 3, *size[1:], dtype=torch.float64) * 2 - 1).to(device)
    with contextlib.nullcontext() if net.training else torch.no_grad():
        output = net(x, return_hidden=True) if hidden else net(x)
    tensors = tree_leaves(output)
    if not net.training:
        return tensors
    weights = list(net.parameters())
    return [*tensors, *torch.autograd.grad(sum(y.square().sum() for y in tensors), weights, allow_unused=True)]


def assert_same(found, expected):
    for own, other in zip(found, expected, strict=True):
        assert (own is None) == (other is None)
        assert own is None or torch.allclose(own, other, atol=1e-9)


def assert_compiles(compiled, net, dynamic=False, hidden=False, modes=(True, False)):
    """A compiled network equals the plain one, in training and eval mode, for two sizes; a size seen before does not recompile."""
    sizes = [(2, 16, 16), (3, 20, 24)]
    later = [*sizes, (4, 28, 32)] if dynamic is None else sizes
    run = compiled(net, dynamic=dynamic)
    for training in modes:
        net.train(training)
        for size in sizes:
            assert_same(call(run, size, hidden), call(net, size, hidden))
    with torch.compiler.set_stance("fail_on_recompile"):
        for training in modes:
            net.train(training)
            for size in later:
                assert_same(call(run, size, hidden), call(net, size, hidden))


def tiny_generator(**changes):
    return build_generator(GeneratorConfig(**{"ngf": 4, "num_residual": 1, "vit_blocks": 1, **changes})).double()


def tiny_discriminator(**changes):
    return build_discriminator(DiscriminatorConfig(ndf=4, n_layers=1, **changes)).double()


def test_networks_compile_into_one_graph_per_size(compiled):
    assert_compiles(compiled, tiny_discriminator())
    assert_compiles(
        compiled, tiny_generator(n_downsampling=1), hidden=True, modes=(False,)
    )  # training: see steps below


GENERATORS = [
    {},
    {"norm": "batch"},
    {"norm": "instance_affine", "skips": True},
    {"norm": "group", "skips": True},
    {"norm": "none", "upsample": "resize", "norm_output": True},
    {"generator": "unet_vit"},
]
DISCRIMINATORS = [
    {"norm": "instance"},
    {"norm": "instance_affine"},
    {"norm": "batch"},
    {"norm": "none"},
    {"discriminator": "pixel", "norm": "instance"},
    {"discriminator": "pixel", "norm": "batch"},
    {"pool": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", GENERATORS)
def test_every_generator_compiles_into_one_graph_per_size(compiled, changes):
    for hidden in (False, True):
        assert_compiles(compiled, tiny_generator(**changes), hidden=hidden)


@pytest.mark.slow
@pytest.mark.parametrize("changes", DISCRIMINATORS)
def test_every_discriminator_compiles_into_one_graph_per_size(compiled, changes):
    assert_compiles(compiled, tiny_discriminator(**changes))


@pytest.mark.slow
@pytest.mark.parametrize("make", [functools.partial(tiny_generator, generator="unet_vit"), tiny_discriminator])
def test_with_dynamic_sizes_a_third_size_does_not_recompile(compiled, make):
    assert_compiles(compiled, make(), dynamic=None)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["instance", "instance_affine", "batch"])
def test_layers_that_differ_on_a_gpu_compile_too(compiled, norm):
    nets = [tiny_generator(norm=norm), tiny_generator(norm=norm, generator="unet_vit"), tiny_discriminator(norm=norm)]
    for net in nets:
        run = compiled(net.to(META), dynamic=False)
        for _ in range(2):
            found = call(run, (2, 16, 16), hidden=False, device=META)
            assert [x.shape for x in found] == [x.shape for x in call(net, (2, 16, 16), hidden=False, device=META)]


@pytest.mark.slow
def test_more_than_eight_sizes_of_micro_batches_are_compiled(compiled, monkeypatch):
    """By default torch makes at most 8 graphs and runs further sizes uncompiled."""
    monkeypatch.setattr(torch, "compile", lambda net, mode, dynamic: compiled(net, dynamic=dynamic))
    net = tiny_discriminator()
    sizes = range(2, 12)
    with torch._dynamo.config.patch(recompile_limit=8):
        run = executor.compile_networks({"D_A": net}, torch.device("cuda"))["D_A"]
        for size in sizes:
            run(torch.zeros(size, 3, 16, 16, dtype=torch.float64))
        with torch.compiler.set_stance("fail_on_recompile"):
            for size in sizes:
                run(torch.zeros(size, 3, 16, 16, dtype=torch.float64))


# Dynamo reads .grad of a generated image, and torch 2.11 loads a module that it deprecates
ignore_torch_warnings = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
)


def assert_steps_agree(compiled, **changes):
    """Losses and weights of a compiled and a plain model agree over three steps; only the first step compiles."""
    plain = tiny_model(dtype=torch.float64, **changes)
    model = tiny_model(dtype=torch.float64, **changes)
    model.executor.compiled = {name: compiled(net, dynamic=False) for name, net in model.networks.items()}
    model.executor.networks = {**model.networks, **model.executor.compiled}
    for step in range(3):
        reals = batch(step, 4, torch.float64)
        torch.manual_seed(step)
        expected = plain.step(*reals)
        torch.manual_seed(step)
        with torch.compiler.set_stance("fail_on_recompile") if step else contextlib.nullcontext():
            losses = model.step(*reals)
        assert losses.keys() == expected.keys()
        assert_same(losses.values(), expected.values())
    for name, net in model.networks.items():
        assert_same(net.state_dict().values(), plain.networks[name].state_dict().values())


@ignore_torch_warnings
@pytest.mark.parametrize(
    "changes",
    [
        {"n_downsampling": 1},
        pytest.param({"lambda_gp": 0.1, "ema": 0.9}, marks=pytest.mark.slow),
        pytest.param({"generator": "unet_vit", "vit_blocks": 1}, marks=pytest.mark.slow),
        pytest.param({"norm": "batch"}, marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_give_the_losses_of_plain_ones_and_only_the_first_compiles(compiled, changes):
    assert_steps_agree(compiled, **changes)


# -- fp16: losses are scaled, so that small gradients do not vanish ---------------------------


def fp16_model(scale=2.0**10, **changes):
    """A model whose networks compute in half precision on the CPU; scale: the initial one of its losses."""
    model = tiny_model(precision="fp16", **changes)
    assert model.executor.scaler.is_enabled()
    model.executor.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return model


def gradient_of(model, name):
    return torch.cat([p.grad.flatten() for p in model.networks[name].parameters()])


@pytest.mark.parametrize("changes", [{}, {"lambda_gp": 10.0, "gp_target": 1.0}, {"norm": "batch"}, {"micro_batch": 3}])
def test_fp16_gradients_do_not_depend_on_the_scale_and_are_close_to_those_of_float32(changes):
    """A penalty of weight 10 dominates the loss: its second derivative must be scaled once, too.

    Gradients of the generators differ by a tenth at any scale, because half precision flips signs of |x|'.
    """
    gradients = []
    for model in (tiny_model(**changes), fp16_model(2.0**4, **changes), fp16_model(2.0**12, **changes)):
        torch.manual_seed(0)
        losses = model.step(*batch(0))
        gradients.append({name: gradient_of(model, name) for name in model.networks})
        assert all(torch.isfinite(value) for value in losses.values())
    for name, expected in gradients[0].items():
        low = gradients[1][name]
        high = gradients[2][name]
        assert (low - high).norm() < 0.005 * high.norm(), name
        assert (high - expected).norm() < (0.2 if name.startswith("G") else 0.05) * expected.norm(), name
        assert high.dot(expected) / expected.dot(expected) == pytest.approx(1, abs=0.05), name


def test_only_the_gradient_penalty_is_computed_in_float32(monkeypatch):
    types = []

    def watched(D, real, fake, target):
        hook = D.register_forward_hook(lambda net, inputs, output: types.append((output.dtype, fake.dtype)))
        penalty = gradient_penalty(D, real, fake, target)
        hook.remove()
        return penalty

    monkeypatch.setattr(cyclegan, "gradient_penalty", watched)
    model = fp16_model(lambda_gp=0.1)
    halves = []
    model.networks["G_AB"].stem[1].register_forward_hook(lambda net, inputs, output: halves.append(output.dtype))
    model.step(*batch(0))
    assert types == [(torch.float32, torch.float32)] * 2
    assert torch.float16 in halves


def learnt(model, letter):
    """Copies of weights, moments and step counters of the generators ("G") or the discriminators ("D")."""
    networks = {name: dict(net.named_parameters()) for name, net in model.networks.items() if name.startswith(letter)}
    return copy.deepcopy({"networks": networks, "optimizer": model.optimizers[letter].state_dict()["state"]})


def step_counters(model, letter):
    return {int(state["step"]) for state in model.optimizers[letter].state_dict()["state"].values()}


@pytest.mark.parametrize("name", ["G_BA", "D_A"])
def test_an_overflow_skips_the_step_of_its_own_optimizer_and_halves_the_scale_once(name):
    model = fp16_model(ema=0.9, lambda_gp=0.1, norm="batch")
    model.step(*batch(0))
    scaler = model.executor.scaler
    assert scaler.state_dict()["_growth_tracker"] == 1
    skipped = name[0]
    stepped = "D" if skipped == "G" else "G"
    before = {letter: learnt(model, letter) for letter in "GD"}
    G_AB = model.networks["G_AB"]
    ema = model.ema["G_AB"]
    ema_before = [p.clone() for p in ema.parameters()]
    weight = next(model.networks[name].parameters())
    weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    losses = model.step(*batch(1))
    assert all(torch.isfinite(value) for value in losses.values()), "else train.py would end the run"
    assert differences(before[skipped], learnt(model, skipped)) == []
    assert differences(before[stepped], learnt(model, stepped))
    assert (step_counters(model, skipped), step_counters(model, stepped)) == ({1}, {2})
    assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == (2.0**9, 0)
    assert all(torch.isfinite(x).all() for net in model.networks.values() for x in net.buffers())
    assert {int(x) for key, x in G_AB.named_buffers() if key.endswith("tracked")} == {6}  # 3 calls a step
    # EMA weights are updated in any case: to know whether the weights changed, the host would have to wait
    for old, p, new in zip(ema_before, G_AB.parameters(), ema.parameters(), strict=True):
        assert torch.allclose(new, old + (1 - 2 / 11) * (p - old), atol=1e-6)
    assert differences(dict(G_AB.named_buffers()), dict(ema.named_buffers())) == []


def test_after_a_first_step_that_overflows_the_next_counts_as_the_first():
    model = fp16_model()
    twin = fp16_model(2.0**9)
    before = [learnt(model, letter)["networks"] for letter in "GD"]
    hooks = []
    for net in model.networks.values():
        hooks.append(next(net.parameters()).register_hook(lambda gradient: gradient * float("nan")))
    model.step(*batch(0))
    assert differences(before, [learnt(model, letter)["networks"] for letter in "GD"]) == []
    for hook in hooks:
        hook.remove()
    assert model.executor.scaler.get_scale() == 2.0**9
    for domain, buffer in model.buffers.items():
        buffer.load_state_dict(twin.buffers[domain].snapshot(), torch.device("cpu"))
    model.step(*batch(1))
    twin.step(*batch(1))
    twin.finished_steps += 1  # the model has counted the step that overflowed
    assert differences(model.state_dict(), twin.state_dict()) == []


def test_an_overflow_of_the_forward_pass_shows_in_the_losses():
    """No scale can repair it, and running statistics and image buffers contain it: train.py ends the run."""
    model = fp16_model(norm="batch")
    before = learnt(model, "G")
    with torch.no_grad():
        model.networks["D_B"].layers[0].weight.mul_(1e9)
        model.networks["D_B"].layers[2].weight.mul_(1e9)
    losses = model.step(*batch(0))
    assert not torch.isfinite(losses["loss_G"])
    assert not torch.isfinite(losses["loss_D_B"])
    assert differences(before["networks"], learnt(model, "G")["networks"]) == []


def test_an_fp16_run_continues_after_overflows_and_resumes_with_its_scale(tiny, monkeypatch, no_plots):
    monkeypatch.setattr("toolkit.devices.pick_precision", lambda name, device: "fp16")
    run_tiny("--num_epochs", 2, "--steps_per_epoch", 6, "--run_name", "whole")
    run_tiny("--num_epochs", 1, "--steps_per_epoch", 6, "--decay_epoch", 1)
    scaler = state_of("tiny")["scaler"]
    assert scaler["scale"] < 2.0**16
    assert scaler["_growth_tracker"] > 0
    train.main(["--dataset_name", "tiny", "--device", "cpu", "--start_from", "latest", "--num_epochs", "2"])
    states = [state_of(name) for name in ("whole", "tiny")]
    for part in ("nets", "optims", "scaler", "buffers", "rng"):
        assert differences(states[0][part], states[1][part]) == [], part
    assert states[1]["scaler"] != scaler
    assert all(torch.isfinite(x).all() for net in states[1]["nets"].values() for x in net.values())
