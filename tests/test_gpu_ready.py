"""What a GPU would show at once, shown without one: nothing of a step stands on the host, all compiles, fp16 scales."""

import contextlib
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
from models import VIT_SIZES, DiscriminatorConfig, GeneratorConfig, VitSize, build_discriminator, build_generator
from toolkit import executor

META = torch.device("meta")


def batch(seed, size=4, dtype=torch.float32, device="cpu"):
    """real_A and real_B of 16 px."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(2, size, 3, 16, 16, dtype=dtype, generator=generator) * 2 - 1).to(device)


@pytest.fixture
def tiny_vit(monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, full=False))


# -- nothing of a step stands on the host ----------------------------------------------------


class OnlyOn(TorchDispatchMode):
    """Fails at the first operation that sees or makes a tensor on another device, Adam's own apart.

    The meta device itself refuses `.item()` and `.cpu()`; it would let pass what is computed on the host and then
    sent over, and numbers without dimensions, for which a GPU waits, too.
    """

    def __init__(self, device, optims):
        super().__init__()
        self.device = device
        self.operations = 0
        self.in_adam = False  # its fused kernel, which keeps its step counters on a GPU, has no form for meta
        for optim in optims.values():
            optim.register_step_pre_hook(functools.partial(self.enter, True))
            optim.register_step_post_hook(functools.partial(self.enter, False))

    def enter(self, inside, *_):
        self.in_adam = inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.operations += 1
        for value in tree_leaves((args, kwargs, output)):
            if isinstance(value, Tensor) and not self.in_adam:
                assert value.device == self.device, f"{func}: {tuple(value.shape)} on {value.device}"
        return output


def steps_on_meta(monkeypatch, nets, **changes):
    """The losses of a step on the meta device, where no value exists."""
    monkeypatch.setattr(cyclegan, "autocast", lambda device, precision: contextlib.nullcontext())  # knows no meta
    for net in nets.values():
        net.to(META)
    model = tiny_model(nets=nets, ema=0.9, buffer_size=3, **changes)
    guard = OnlyOn(META, model.optims)
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
def test_a_step_copies_nothing_to_the_host_and_leaves_no_tensor_there(changes, tiny_vit, monkeypatch):
    losses = steps_on_meta(monkeypatch, tiny_networks(**changes), **changes)
    assert ("gp_A" in losses) == ("lambda_gp" in changes)


@pytest.mark.parametrize("changes", [{"ngf": 8, "num_residual": 2}, {"generator": "unet_vit"}])
def test_a_step_of_a_distillation_copies_nothing_to_the_host_and_leaves_no_tensor_there(changes, tiny_vit, monkeypatch):
    teachers = {name: net for name, net in tiny_networks(**changes).items() if name.startswith("G")}
    smaller = {"vit_blocks": 1} if "generator" in changes else {}
    nets = tiny_networks(**{"generator": changes.get("generator", "resnet"), **smaller})
    for net in teachers.values():
        net.requires_grad_(False).eval().to(META)
    blocks = [net.config.blocks for net in (teachers["G_AB"], nets["G_AB"])]
    pairs = distill.pair_blocks(*blocks)
    adapters = distill.make_adapters(teachers, nets, pairs).to(META)
    assert len(adapters) == (2 if "ngf" in changes else 0)
    loss = distill.DistillationLoss(teachers, adapters, pairs, 1.0, 10.0)
    losses = steps_on_meta(monkeypatch, nets, adapters=adapters, generator_loss=loss)
    assert {"output_AB", "hidden_AB", "output_BA", "hidden_BA"} <= losses.keys()


# -- every network compiles ------------------------------------------------------------------
# In one graph (fullgraph). --compile makes a graph for each size (dynamic=False), and none for a size that comes back.
# With torch's own choice the second size makes one graph for all sizes, so that a third makes none.


@pytest.fixture
def compiled(tiny_vit):
    """Compile without a compiler of machine code: all that Dynamo and autograd do, on the CPU."""
    torch.compiler.reset()
    yield functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


def call(net, size, hidden, device="cpu"):
    """Forward pass, while learning also backward, for images of size (N, height, width); what both give."""
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
    """As the uncompiled network, while training and not, for two sizes; for a size that comes back nothing compiles."""
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


def test_networks_compile_in_one_graph_a_size(compiled):
    assert_compiles(compiled, tiny_discriminator())
    assert_compiles(compiled, tiny_generator(n_downsampling=1), hidden=True, modes=(False,))  # trained in a step, below


GENERATORS = [
    {},
    {"norm": "batch"},
    {"norm": "instance_affine", "skips": True},
    {"norm": "group", "skips": True},
    {"norm": "none", "upsample": "resize", "norm_output": True},
    {"generator": "unet_vit"},
]
DISCRIMINATORS = [
    *({"norm": norm} for norm in ("instance", "instance_affine", "batch", "none")),
    *({"discriminator": "pixel", "norm": norm} for norm in ("instance", "batch")),
    {"pool": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", GENERATORS)
def test_every_generator_compiles_in_one_graph_a_size(compiled, changes):
    for hidden in (False, True):
        assert_compiles(compiled, tiny_generator(**changes), hidden=hidden)


@pytest.mark.slow
@pytest.mark.parametrize("changes", DISCRIMINATORS)
def test_every_discriminator_compiles_in_one_graph_a_size(compiled, changes):
    assert_compiles(compiled, tiny_discriminator(**changes))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"generator": "unet_vit"}, "patch"])
def test_with_free_sizes_a_second_size_compiles_once_more_and_a_third_does_not(compiled, changes):
    if isinstance(changes, str):
        net = tiny_discriminator(discriminator=changes)
    else:
        net = tiny_generator(**changes)
    assert_compiles(compiled, net, dynamic=None)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["instance", "instance_affine", "batch"])
def test_layers_that_are_other_ones_on_a_gpu_compile_too(compiled, norm):
    nets = [tiny_generator(norm=norm), tiny_generator(norm=norm, generator="unet_vit"), tiny_discriminator(norm=norm)]
    for net in nets:
        run = compiled(net.to(META), dynamic=False)
        for _ in range(2):
            found = call(run, (2, 16, 16), hidden=False, device=META)
            assert [x.shape for x in found] == [x.shape for x in call(net, (2, 16, 16), hidden=False, device=META)]


@pytest.mark.slow
def test_as_many_sizes_of_micro_batches_as_a_run_may_need_stay_compiled(compiled, monkeypatch):
    """Torch's own limit is 8 graphs; what comes then would run uncompiled."""
    monkeypatch.setattr(torch, "compile", lambda net, mode, dynamic: compiled(net, dynamic=dynamic))
    net = tiny_discriminator()
    sizes = range(2, 12)
    with torch._dynamo.config.patch(recompile_limit=8):
        run = executor.compile_nets({"D_A": net}, torch.device("cuda"))["D_A"]
        for size in sizes:
            run(torch.zeros(size, 3, 16, 16, dtype=torch.float64))
        with torch.compiler.set_stance("fail_on_recompile"):
            for size in sizes:
                run(torch.zeros(size, 3, 16, 16, dtype=torch.float64))


# warnings of torch about itself: Dynamo looks at .grad of an image that a generator made; 2.11 loads what it deprecates
of_torch = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
)


def assert_steps_agree(compiled, **changes):
    """Losses and weights of a compiled and an uncompiled twin over three steps; only the first step compiles."""
    plain = tiny_model(dtype=torch.float64, **changes)
    model = tiny_model(dtype=torch.float64, **changes)
    model.compiled = {name: compiled(net, dynamic=False) for name, net in model.nets.items()}
    for step in range(3):
        reals = batch(step, 4, torch.float64)
        torch.manual_seed(step)
        expected = plain.step(*reals, step)
        torch.manual_seed(step)
        with torch.compiler.set_stance("fail_on_recompile") if step else contextlib.nullcontext():
            losses = model.step(*reals, step)
        assert losses.keys() == expected.keys()
        assert_same(losses.values(), expected.values())
    weights = [list(net.state_dict().values()) for net in (*model.nets.values(), *plain.nets.values())]
    for own, other in zip(weights[:4], weights[4:], strict=True):
        assert_same(own, other)


@of_torch
def test_compiled_steps_give_the_losses_of_plain_ones_and_only_the_first_compiles(compiled):
    assert_steps_agree(compiled, n_downsampling=1)


@of_torch
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"lambda_gp": 0.1, "ema": 0.9}, {"generator": "unet_vit", "vit_blocks": 1}, {"norm": "batch"}]
)
def test_compiled_steps_of_other_networks_give_the_losses_of_plain_ones(compiled, changes):
    assert_steps_agree(compiled, **changes)


# -- fp16: losses are scaled, so that small gradients do not vanish ---------------------------


def fp16_model(scale=2.0**10, **changes):
    """A model whose networks compute in half precision on the CPU; scale: that of its losses at first."""
    model = tiny_model(precision="fp16", **changes)
    assert model.scaler.is_enabled()
    model.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return model


def gradient_of(model, name):
    return torch.cat([p.grad.flatten() for p in model.nets[name].parameters()])


@pytest.mark.parametrize("changes", [{}, {"lambda_gp": 10.0, "gp_target": 1.0}, {"norm": "batch"}, {"micro_batch": 3}])
def test_gradients_of_an_fp16_step_do_not_depend_on_the_scale_and_point_where_those_of_float32_do(changes):
    """A penalty of weight 10 outweighs all else: its second derivative, too, is scaled once.

    The generators' own differ by a tenth at any scale: half precision turns signs in the derivative of |x|.
    """
    seen = []
    for model in (tiny_model(**changes), fp16_model(2.0**4, **changes), fp16_model(2.0**12, **changes)):
        torch.manual_seed(0)
        losses = model.step(*batch(0))
        seen.append({name: gradient_of(model, name) for name in model.nets})
        assert all(torch.isfinite(value) for value in losses.values())
    for name, expected in seen[0].items():
        low = seen[1][name]
        high = seen[2][name]
        assert (low - high).norm() < 0.005 * high.norm(), name
        assert (high - expected).norm() < (0.2 if name.startswith("G") else 0.05) * expected.norm(), name
        assert high.dot(expected) / expected.dot(expected) == pytest.approx(1, abs=0.05), name


def test_the_penalty_is_computed_in_float32_while_the_rest_is_not(monkeypatch):
    types = []

    def watched(D, real, fake, target):
        with torch.no_grad():
            types.append((D(real).dtype, fake.dtype))
        return gradient_penalty(D, real, fake, target)

    monkeypatch.setattr(cyclegan, "gradient_penalty", watched)
    model = fp16_model(lambda_gp=0.1)
    halves = []
    model.nets["G_AB"].register_forward_hook(lambda net, inputs, output: halves.append(inputs[0].dtype))
    model.nets["G_AB"].stem[1].register_forward_hook(lambda net, inputs, output: halves.append(output.dtype))
    model.step(*batch(0))
    assert types == [(torch.float32, torch.float32)] * 2
    assert torch.float16 in halves


def learnt(model, letter):
    """Weights, moments and step counters of the generators ("G") or the discriminators ("D")."""
    nets = {name: dict(net.named_parameters()) for name, net in model.nets.items() if name.startswith(letter)}
    values = {"nets": nets, "optim": model.optims[letter].state_dict()["state"]}
    return torch.utils._pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, values)


def overflow_in(model, name):
    """Let one gradient of a network be infinite in the next backward pass through it, as one that was scaled too far."""
    weight = next(model.nets[name].parameters())
    weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))


@pytest.mark.parametrize("name", ["G_BA", "D_A"])
def test_an_overflow_leaves_out_the_step_of_its_own_optimiser_alone_and_halves_the_scale_once(name):
    model = fp16_model(ema=0.9, lambda_gp=0.1, norm="batch")
    model.step(*batch(0), 0)
    assert model.scaler.state_dict()["_growth_tracker"] == 1
    steady = name[0]
    moving = "D" if steady == "G" else "G"
    before = {letter: learnt(model, letter) for letter in "GD"}
    averages = [p.clone() for p in model.averages["G_AB"].parameters()]
    overflow_in(model, name)
    losses = model.step(*batch(1), 1)
    assert all(torch.isfinite(value) for value in losses.values())  # so that train.py does not end the run
    assert differences(before[steady], learnt(model, steady)) == []
    assert all(state["step"] == 1 for state in model.optims[steady].state_dict()["state"].values())
    assert all(state["step"] == 2 for state in model.optims[moving].state_dict()["state"].values())
    assert differences(before[moving], learnt(model, moving))
    assert model.scaler.get_scale() == 2.0**9
    assert model.scaler.state_dict()["_growth_tracker"] == 0
    statistics = [x for net in model.nets.values() for x in net.buffers()]
    assert all(torch.isfinite(x).all() for x in statistics)
    assert {int(x) for key, x in model.nets["G_AB"].named_buffers() if key.endswith("tracked")} == {6}  # 3 calls a step
    # an average counts the same weights once more, rather than wait for the device to tell whether they moved
    weight = 1 - 2 / 11
    for old, p, average in zip(
        averages, model.nets["G_AB"].parameters(), model.averages["G_AB"].parameters(), strict=True
    ):
        assert torch.allclose(average, old + weight * (p - old), atol=1e-6)
    buffers = [dict(nets["G_AB"].named_buffers()) for nets in (model.nets, model.averages)]
    assert differences(*buffers) == []


def test_a_first_step_that_overflows_teaches_nothing_and_the_next_counts_as_the_first():
    model = fp16_model()
    twin = fp16_model(2.0**9)
    before = {name: list(map(torch.clone, net.parameters())) for name, net in model.nets.items()}
    hooks = []
    for net in model.nets.values():
        hooks.append(next(net.parameters()).register_hook(lambda gradient: gradient * float("nan")))
    model.step(*batch(0))
    assert differences(before, {name: list(net.parameters()) for name, net in model.nets.items()}) == []
    for hook in hooks:
        hook.remove()
    assert model.scaler.get_scale() == 2.0**9
    for domain, buffer in model.buffers.items():
        buffer.back_to(twin.buffers[domain].mark())
    model.step(*batch(1))
    twin.step(*batch(1))
    assert differences(model.state_dict(), twin.state_dict()) == []


def test_an_overflow_of_the_forward_pass_shows_in_the_losses_so_that_a_run_ends_before_it_saves():
    """No scale mends it; running statistics, averages and image buffers have seen it, too."""
    model = fp16_model(norm="batch")
    before = learnt(model, "G")
    with torch.no_grad():
        model.nets["D_B"].layers[0].weight.mul_(1e9)
        model.nets["D_B"].layers[2].weight.mul_(1e9)
    losses = model.step(*batch(0))
    assert not torch.isfinite(losses["loss_G"])
    assert not torch.isfinite(losses["loss_D_B"])
    assert differences(before["nets"], learnt(model, "G")["nets"]) == []


def test_an_fp16_run_survives_its_first_overflows_and_goes_on_with_its_scale(tiny, monkeypatch, no_plots):
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
