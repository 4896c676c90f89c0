import copy
import functools
import importlib
import io
import math
import random
import signal
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import differences, tiny_model, tiny_networks
from torch import nn

import cyclegan
from cyclegan import (
    CycleGAN,
    LossConfig,
    OptimConfig,
    discriminator_loss,
    eval_mode,
    gan_loss_D,
    gan_loss_G,
    generator_loss,
    gradient_penalty,
    image_loss,
    linear_decay,
    loss_names,
    translate,
)
from models import (
    GAN_LOSSES,
    NORMS,
    VIT_SIZES,
    Discriminator,
    GeneratorConfig,
    ResnetGenerator,
    VitSize,
    build_generator,
)
from toolkit import devices
from utils import FakeImageBuffer, InputError

CPU = torch.device("cpu")
NAMES = ("G_AB", "G_BA", "D_A", "D_B")
wide_model = functools.partial(tiny_model, dtype=torch.float64)  # where equality is looked at


def batch(seed, size=8, dtype=torch.float32, channels=3):
    """real_A and real_B of 16 px."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, size, channels, 16, 16, dtype=dtype, generator=generator) * 2 - 1


def weights_of(model):
    return {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in model.nets.items()}


def five_steps(model, size=8):
    """What five steps teach, and the losses of the last."""
    for step in range(5):
        losses = model.step(*batch(step, size, torch.float64), step)
    return weights_of(model), {name: value.item() for name, value in losses.items()}


def assert_close(one, other):
    """Two results of five_steps are equal but for the order in which float64 adds."""
    for values, others in zip(one, other, strict=True):
        assert values.keys() == others.keys()
        for name, value in values.items():
            if isinstance(value, dict):
                assert value.keys() == others[name].keys()
                for key, tensor in value.items():
                    assert (tensor - others[name][key]).abs().max() < 1e-9, f"{name} {key}"
            else:
                assert abs(value - others[name]) < 1e-9, name


@pytest.fixture
def tiny_vit(monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, full=False))


# -- losses by hand --------------------------------------------------------------------------


def test_adversarial_losses_by_hand():
    real = torch.tensor([0.5, 1.0])
    fake = torch.tensor([0.0, 2.0])
    assert gan_loss_D(real, fake).item() == pytest.approx(((0.25 + 0) / 2 + (0 + 4) / 2) / 2)
    assert gan_loss_G(fake).item() == pytest.approx((1 + 1) / 2)
    log = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(2))]
    assert gan_loss_D(real, fake, "bce").item() == pytest.approx(sum(log) / 4)
    assert gan_loss_G(fake, "bce").item() == pytest.approx((math.log(2) + math.log1p(math.exp(-2))) / 2)
    assert gan_loss_D(real, fake, "hinge").item() == pytest.approx((0.25 + (1 + 3) / 2) / 2)
    assert gan_loss_G(fake, "hinge").item() == pytest.approx(-1)


def test_an_undecided_lsgan_discriminator_loses_a_quarter():
    half = torch.full((4,), 0.5)
    assert gan_loss_D(half, half).item() == pytest.approx(0.25)


def test_bce_stays_finite_for_a_discriminator_that_is_sure():
    sure = torch.tensor([-1e4, 1e4])
    assert gan_loss_G(sure, "bce").item() == pytest.approx(5000)
    assert gan_loss_D(sure, sure, "bce").item() == pytest.approx(5000)


def test_unknown_forms_of_the_adversarial_loss_are_refused():
    for loss in (
        lambda kind: gan_loss_G(torch.ones(1), kind),
        lambda kind: gan_loss_D(torch.ones(1), torch.ones(1), kind),
    ):
        for kind in GAN_LOSSES:
            loss(kind)
        with pytest.raises(ValueError, match="gan_loss 'wgan'"):
            loss("wgan")


def test_image_loss_by_hand():
    assert image_loss(torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[[0.5, 1.0]]]])).item() == 1.25


def test_image_loss_refuses_what_would_broadcast():
    with pytest.raises(ValueError, match="shapes differ"):
        image_loss(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))


def test_losses_are_computed_in_float32_from_half_precision():
    x = torch.full((1, 3, 64, 64), 0.1, dtype=torch.bfloat16)
    assert image_loss(x, torch.zeros(1, 3, 64, 64)).dtype == torch.float32
    assert gan_loss_D(x, x).dtype == torch.float32
    assert gan_loss_G(x).dtype == torch.float32
    assert gan_loss_D(x, x, "bce").dtype == torch.float32
    assert gan_loss_G(x.double()).dtype == torch.float64


def test_the_rate_is_full_until_the_decay_and_would_be_zero_at_the_end():
    assert [linear_decay(e, 200, 100) for e in (0, 100, 150, 199, 200)] == pytest.approx([1, 1, 0.5, 0.01, 0])
    assert linear_decay(3, 4, 4) == 1
    assert linear_decay(0, 4, 0) == 1


# -- gradient penalty ------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "expected"), [(0.0, 25.0), (10.0, 0.25), (5.0, 0.0)])
def test_gradient_penalty_of_a_known_slope(target, expected):
    D = nn.Linear(2, 1, bias=False)
    D.weight.data = torch.tensor([[3.0, 4.0]])  # slope 5 everywhere
    penalty = gradient_penalty(nn.Sequential(nn.Flatten(), D), torch.rand(3, 2, 1, 1), torch.rand(3, 2, 1, 1), target)
    assert penalty.item() == pytest.approx(expected, abs=1e-5)
    penalty.backward()
    assert (D.weight.grad.abs().max() > 0) == (target != 5)


def test_gradient_penalty_looks_between_real_and_translated_images():
    seen = []

    def D(x):
        seen.append(x.detach())
        return x.square().sum()

    gradient_penalty(D, torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2), 0.0)
    weights = seen[0].flatten(1)
    assert torch.equal(weights.amin(1), weights.amax(1))  # one weight for each image
    assert 0 < weights.min() < weights.max() < 1


def test_gradient_penalty_of_a_flat_discriminator_has_a_finite_gradient():
    D = nn.Linear(2, 1)
    nn.init.zeros_(D.weight)
    gradient_penalty(nn.Sequential(nn.Flatten(), D), torch.rand(3, 2, 1, 1), torch.rand(3, 2, 1, 1), 0.0).backward()
    assert torch.isfinite(D.weight.grad).all()


# -- the objective ---------------------------------------------------------------------------


class Table(nn.Module):
    """A generator that knows by heart which flat image becomes which; it notes what it is shown."""

    config = SimpleNamespace(norm="instance")

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.seen = []

    def forward(self, x, return_hidden=False):
        values = [round(image.mean().item(), 4) for image in x]
        self.seen.append(values)
        y = torch.stack([torch.full_like(image, self.table[value]) for image, value in zip(x, values, strict=True)])
        return (y, [x, y]) if return_hidden else y


def flat(value):
    return torch.full((1, 3, 4, 4), value)


def table_nets():
    """real_A is 0 and real_B is 1; their translations, round trips and identity images are further numbers."""
    return {
        "G_AB": Table({0.0: 0.7, 1.0: 0.6, 0.2: 0.8}),  # fake_B, idt_B, rec_B
        "G_BA": Table({1.0: 0.2, 0.0: 0.3, 0.7: 0.1}),  # fake_A, idt_A, rec_A
        "D_A": Table({0.2: 0.5}),
        "D_B": Table({0.7: 0.0}),
    }


def whole_loss(nets, real_A, real_B, config):
    """The objective of both generators, its terms, and the translated images by domain."""
    loss_A, terms_A, of_A = generator_loss(nets, "A", real_A, config)
    loss_B, terms_B, of_B = generator_loss(nets, "B", real_B, config)
    return loss_A + loss_B, terms_A | terms_B, {"fake_A": of_B["fake"], "fake_B": of_A["fake"]}


def test_generator_loss_is_the_weighted_sum_of_its_terms():
    config = LossConfig(lambda_gan=2, lambda_cycle=10, lambda_identity=5)
    loss, terms, images = whole_loss(table_nets(), flat(0.0), flat(1.0), config)
    by_hand = {"gan_AB": 1.0, "gan_BA": 0.25, "cycle_A": 0.1, "cycle_B": 0.2, "identity_A": 0.3, "identity_B": 0.4}
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(by_hand)
    assert loss.item() == pytest.approx(2 * 1.25 + 10 * 0.3 + 5 * 0.7)
    assert torch.equal(images["fake_B"], flat(0.7))
    assert torch.equal(images["fake_A"], flat(0.2))


@pytest.mark.parametrize(
    ("without", "expected", "seen_by_G_AB", "seen_by_D_B"),
    [
        ("identity", 1.25 + 3, [[0.0], [0.2]], [[0.7]]),
        ("cycle", 1.25 + 3.5, [[0.0], [1.0]], [[0.7]]),
        ("gan", 3 + 3.5, [[0.0], [0.2, 1.0]], []),
    ],
)
def test_without_its_weight_a_term_is_not_even_computed(without, expected, seen_by_G_AB, seen_by_D_B):
    nets = table_nets()
    loss, terms, _ = whole_loss(nets, flat(0.0), flat(1.0), LossConfig(**{f"lambda_{without}": 0.0}))
    assert {name.split("_")[0] for name in terms} == {"gan", "cycle", "identity"} - {without}
    assert loss.item() == pytest.approx(expected)
    assert [sorted(values) for values in nets["G_AB"].seen] == seen_by_G_AB
    assert nets["D_B"].seen == seen_by_D_B


@pytest.mark.parametrize("scaled", [False, True])
def test_discriminators_rest_while_no_generator_asks_them_and_learn_again_when_asked(scaled):
    """Neither weights, nor moments, nor older images; with the scaler of fp16, which finds no gradients, too."""
    model = tiny_model(lambda_gan=0.0, dtype=torch.float64)
    model.scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    before = copy.deepcopy(model.state_dict())
    losses = model.step(*batch(0, 2, torch.float64))
    after = copy.deepcopy(model.state_dict())
    assert not {"loss_D_A", "loss_D_B", "gan_AB", "gan_BA"} & losses.keys()
    changed = differences(before, after)
    assert changed
    assert not any("D" in path for path in changed)
    assert not any(buffer.images for buffer in model.buffers.values())
    asked = tiny_model(nets=model.nets, dtype=torch.float64)
    asked.load_state_dict(after)
    assert "loss_D_A" in asked.step(*batch(1, 2, torch.float64))
    assert any("D_A" in path for path in differences(after, asked.state_dict()))


@pytest.mark.parametrize("lambda_identity", [0.0, 5.0])
def test_hidden_states_are_those_of_the_real_images(lambda_identity):
    nets = table_nets()
    config = LossConfig(lambda_identity=lambda_identity)
    for domain, value, states in (("A", 0.0, [0.0, 0.7]), ("B", 1.0, [1.0, 0.2])):
        _, _, images = generator_loss(nets, domain, flat(value), config, with_hidden=True)
        assert [x.mean().item() for x in images["hidden"]] == pytest.approx(states)
        _, _, images = generator_loss(nets, domain, flat(value), config)  # nobody looks at them
        assert images["hidden"] == []


@pytest.mark.parametrize("kind", GAN_LOSSES)
def test_the_form_of_the_adversarial_loss_reaches_both_sides(kind):
    _, terms, _ = whole_loss(table_nets(), flat(0.0), flat(1.0), LossConfig(gan_loss=kind))
    assert terms["gan_BA"].item() == pytest.approx(gan_loss_G(torch.tensor([0.5]), kind).item())
    real = torch.tensor([0.5, 1.0]).view(2, 1, 1, 1)
    fake = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)
    D = Table({0.5: 0.5, 1.0: 1.0, 0.0: 0.0, 2.0: 2.0})
    expected = gan_loss_D(real, fake, kind).item()
    assert discriminator_loss(D, real, fake, LossConfig(gan_loss=kind)).item() == pytest.approx(expected)


def test_each_loss_weight_scales_its_term():
    nets = tiny_networks()
    lambdas = ("lambda_gan", "lambda_cycle", "lambda_identity")
    for name in ("none", *lambdas):
        config = LossConfig(**{key: 3.0 if key == name else 0.0 for key in lambdas})
        loss, terms, _ = whole_loss(nets, *batch(0, 2), config)
        if name == "none":
            assert loss.item() == 0
        else:
            parts = [value for key, value in terms.items() if key.startswith(name.removeprefix("lambda_"))]
            assert loss.item() == pytest.approx(3 * sum(parts).item(), rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_concatenated_calls_compute_what_six_plain_ones_do(norm):
    """Losses and gradients; a batch norm looks at real and translated images apart, as plain calls do."""
    nets = tiny_model(norm=norm, dtype=torch.float64).nets
    real_A, real_B = batch(0, 3, torch.float64)
    fake_B = nets["G_AB"](real_A)
    fake_A = nets["G_BA"](real_B)
    expected = (nets["D_B"](fake_B) - 1).square().mean() + (nets["D_A"](fake_A) - 1).square().mean()
    for image, target, weight in (
        *((nets["G_BA"](fake_B), real_A, 10), (nets["G_AB"](fake_A), real_B, 10)),
        *((nets["G_BA"](real_A), real_A, 5), (nets["G_AB"](real_B), real_B, 5)),
    ):
        expected = expected + weight * (image - target).abs().mean()
    loss, _, images = whole_loss(nets, real_A, real_B, LossConfig())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.allclose(images["fake_A"], fake_A, atol=1e-12)
    assert torch.allclose(images["fake_B"], fake_B, atol=1e-12)
    weights = [p for net in nets.values() for p in net.parameters()]
    gradients = zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True)
    assert all(torch.allclose(own, plain, atol=1e-10) for own, plain in gradients)
    fake_A = fake_A.detach()
    loss_D = discriminator_loss(nets["D_A"], real_A, fake_A, LossConfig())
    plain_D = ((nets["D_A"](real_A) - 1).square().mean() + nets["D_A"](fake_A).square().mean()) / 2
    assert loss_D.item() == pytest.approx(plain_D.item(), abs=1e-12)


# -- one step --------------------------------------------------------------------------------


def test_a_step_returns_what_losses_csv_shows():
    for config in ({}, {"lambda_gp": 1.0}):
        losses = tiny_model(**config).step(*batch(0))
        assert set(losses) == set(loss_names(LossConfig(**config)))
        assert all(value.dtype == torch.float32 and not value.requires_grad for value in losses.values())
        assert all(value.ndim == 0 and value > 0 for value in losses.values())
    assert loss_names(LossConfig())[:3] == ("loss_G", "loss_D_A", "loss_D_B")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "batch"},
        {"norm": "none"},
        {"norm": "instance_affine"},
        {"discriminator": "pixel", "pool": True},
        {"upsample": "resize", "channels": 1, "gan_loss": "hinge"},
        {"lambda_gp": 1.0, "gan_loss": "bce"},
        {"micro_batch": 3},
    ],
)
def test_every_weight_of_all_four_networks_learns(changes):
    model = tiny_model(**changes)
    before = weights_of(model)
    model.step(*batch(0, channels=changes.get("channels", 3)))
    after = weights_of(model)
    before_a_norm = ("stem.1", "down", "body", "up", "layers.2")  # biases there have no true gradient
    for name, net in model.nets.items():
        for key, _ in net.named_parameters():
            a_norms = isinstance(net.get_submodule(key.rpartition(".")[0]), nn.InstanceNorm2d)
            gradient_free = key.endswith("bias") and any(part in key for part in before_a_norm) and not a_norms
            if not gradient_free or not changes.get("norm", "instance").startswith("instance"):
                assert not torch.equal(before[name][key], after[name][key]), f"{name} {key} did not move"


def test_every_weight_of_a_unet_vit_learns(tiny_vit):
    model = tiny_model(generator="unet_vit")
    before = weights_of(model)
    for step in range(3):  # the blocks' scales leave 0 in the first step, the weights behind them in the second
        model.step(*batch(step, 2))
    after = weights_of(model)
    for net in ("G_AB", "G_BA"):
        still = [name for name in before[net] if torch.equal(before[net][name], after[net][name])]
        assert [name for name in still if not name.endswith("bias")] == []


def test_adapters_of_a_distillation_learn_with_the_generators():
    adapters = nn.ModuleDict({"G_BA_0": nn.Conv2d(3, 3, 1)})

    def adapted_loss(nets, domain, real, config):
        loss, terms, images = generator_loss(nets, domain, real, config)
        if domain == "B":
            terms["output_BA"] = image_loss(adapters["G_BA_0"](images["fake"]), real)
            loss = loss + terms["output_BA"]
        return loss, terms, images

    model = tiny_model(adapters=adapters, generator_loss=adapted_loss)
    before = adapters["G_BA_0"].weight.clone()
    losses = model.step(*batch(0))
    assert not torch.equal(adapters["G_BA_0"].weight, before)
    assert "output_BA" in losses


def test_the_generators_step_leaves_no_gradient_in_the_discriminators():
    seen = []

    def watched(nets, domain, real, config):
        loss, terms, images = generator_loss(nets, domain, real, config)
        loss.backward(retain_graph=True)
        seen.extend(p.grad is None for name in ("D_A", "D_B") for p in nets[name].parameters())
        return loss, terms, images

    model = tiny_model(generator_loss=watched)
    model.step(*batch(0, 2))
    assert seen
    assert all(seen)
    assert all(p.requires_grad for name in ("D_A", "D_B") for p in model.nets[name].parameters())


@pytest.mark.parametrize("changes", [{}, {"lambda_gp": 0.5, "gp_target": 2.0}, {"micro_batch": 3}, {"norm": "batch"}])
def test_gradients_are_those_of_each_networks_own_loss(changes):
    """Of loss_G for the generators alone, and of loss_D on detached images for each discriminator."""
    model = wide_model(**changes)
    twin = wide_model(**changes)
    real_A, real_B = batch(0, 8, torch.float64)
    twin_loss, _, images = whole_loss(twin.nets, real_A, real_B, twin.loss_config)
    generators = [p for name in ("G_AB", "G_BA") for p in twin.nets[name].parameters()]
    expected = {"G": torch.autograd.grad(twin_loss, generators)}
    torch.manual_seed(0)  # the penalty mixes at random
    for domain, real in (("A", real_A), ("B", real_B)):
        D = twin.nets[f"D_{domain}"]
        fake = images[f"fake_{domain}"].detach()
        loss = discriminator_loss(D, real, fake, twin.loss_config)
        if changes.get("lambda_gp"):
            loss = loss + 0.5 * gradient_penalty(D, real, fake, 2.0)
        expected[domain] = torch.autograd.grad(loss, list(D.parameters()))
    torch.manual_seed(0)
    model.step(real_A, real_B)
    found = {"G": [p.grad for name in ("G_AB", "G_BA") for p in model.nets[name].parameters()]}
    found |= {domain: [p.grad for p in model.nets[f"D_{domain}"].parameters()] for domain in "AB"}
    for name, gradients in expected.items():
        for gradient, own in zip(gradients, found[name], strict=True):
            assert torch.allclose(gradient, own, atol=1e-12), name


def test_discriminators_are_shown_buffered_images():
    model = tiny_model(buffer_size=4)
    shown = []
    D_A = model.nets["D_A"]
    D_A.register_forward_pre_hook(lambda net, inputs: shown.append(inputs[0]))
    fakes = []
    for step in range(6):
        real_A, real_B = batch(step, 2)
        fakes.append(model.translate("G_BA", real_B))
        shown.clear()
        model.step(real_A, real_B)
    buffered = shown[1][2:]  # the second call looks at two real images and two translated ones
    assert torch.equal(shown[1][:2], real_A)
    older = [fake for batch_ in fakes[:-1] for fake in batch_]
    own = [any(torch.allclose(image, fake, atol=1e-6) for fake in fakes[-1]) for image in buffered]
    earlier = [any(torch.allclose(image, fake, atol=1e-6) for fake in older) for image in buffered]
    assert [a != b for a, b in zip(own, earlier, strict=True)] == [True, True]
    assert any(earlier)
    assert len(model.buffers["A"].images) == len(model.buffers["B"].images) == 4


def test_both_buffers_and_those_of_each_rank_exchange_by_numbers_of_their_own(monkeypatch):
    def draws(rank):
        monkeypatch.setattr(cyclegan, "rank", lambda: rank)
        return [buffer.state_dict()["rng"] for buffer in tiny_model(seed=3).buffers.values()]

    first = draws(0)
    second = draws(1)
    assert len({str(state) for state in (*first, *second)}) == 4
    assert first == [FakeImageBuffer(1, f"3-buffer-{domain}").state_dict()["rng"] for domain in "AB"]


def test_the_same_seed_gives_the_same_steps():
    def trained(seed):
        model = tiny_model(seed=seed, buffer_size=3, lambda_gp=0.1)
        losses = [model.step(*batch(step), step) for step in range(3)]
        return losses, model.state_dict()

    assert differences(trained(0), trained(0)) == []
    assert differences(trained(0), trained(1))


def test_gradients_and_running_statistics_are_averaged_over_the_ranks(monkeypatch):
    sent = []
    monkeypatch.setattr(cyclegan, "average", lambda tensors: sent.append(len(tensors)))
    model = tiny_model(norm="batch")
    model.step(*batch(0))
    statistics = [x for net in model.nets.values() for x in net.buffers() if x.is_floating_point()]
    parameters = [p for net in model.nets.values() for p in net.parameters()]
    assert sent == [len(parameters) + len(statistics)]  # in one message
    assert statistics


def test_a_step_equals_the_plain_one_of_the_paper_over_20_steps_in_float64(monkeypatch):
    """The plain one is written in benchmarks/step.py and shares no code with ours."""
    monkeypatch.syspath_prepend(Path(cyclegan.__file__).parent / "benchmarks")
    step = importlib.import_module("step")
    config = step.parse_args([])
    config.size = 16
    config.batch = 2
    config.ngf = 4
    config.blocks = 1
    config.n_layers_D = 1
    assert step.check(config) < 1e-9


# -- micro-batches ---------------------------------------------------------------------------


CONFIGS = [{}, {"lambda_gp": 0.1, "buffer_size": 4}, {"frozen": True}, {"norm": "none", "gan_loss": "bce", "ema": 0.9}]


def maybe_frozen(frozen=False, **changes):
    """A model in float64, its discriminators frozen where that is asked for."""
    nets = tiny_networks(**changes)
    if frozen:
        nets["D_A"].requires_grad_(False)
        nets["D_B"].requires_grad_(False)
    return wide_model(nets=nets, **changes)


@pytest.mark.parametrize(("changes", "micro_batch"), [*((changes, 3) for changes in CONFIGS), ({}, 1)])
def test_a_batch_of_8_in_micro_batches_teaches_what_the_whole_batch_teaches(changes, micro_batch):
    whole = five_steps(maybe_frozen(**changes))
    assert_close(whole, five_steps(maybe_frozen(**changes, micro_batch=micro_batch)))


def test_micro_batches_of_a_unet_vit_teach_the_same(tiny_vit):
    whole = five_steps(wide_model(generator="unet_vit"))
    assert_close(whole, five_steps(wide_model(generator="unet_vit", micro_batch=3)))


def test_networks_are_shown_no_more_than_a_micro_batch():
    model = tiny_model(micro_batch=3)
    sizes = {name: [] for name in NAMES}
    for name, net in model.nets.items():
        net.register_forward_pre_hook(lambda net, inputs, name=name: sizes[name].append(len(inputs[0])))
    model.step(*batch(0))
    assert sizes["G_AB"] == [3, 3, 2, 6, 6, 4]  # the way there, then the way back and identity in one call
    assert sizes["D_A"] == [3, 3, 2, 6, 6, 4]


def test_a_micro_batch_need_not_fit_beside_the_one_before():
    losses = []

    def watched(*args):
        assert all(loss() is None for loss in losses)
        loss, terms, images = generator_loss(*args)
        losses.append(weakref.ref(loss))
        return loss, terms, images

    tiny_model(micro_batch=3, generator_loss=watched).step(*batch(0))
    assert len(losses) == 6


def test_micro_batches_with_a_batch_norm_are_refused():
    with pytest.raises(InputError, match="--micro_batch 1: a batch norm would see the micro-batch"):
        tiny_model(norm="batch", micro_batch=1)
    tiny_model(norm="batch")


def test_the_graph_of_one_half_is_gone_before_that_of_the_other_is_built():
    graphs = []

    def watched(*args):
        assert all(image() is None for image in graphs)
        loss, terms, images = generator_loss(*args)
        graphs.append(weakref.ref(images["fake"]))
        return loss, terms, images

    tiny_model(generator_loss=watched).step(*batch(0))
    assert len(graphs) == 2


@pytest.fixture
def ways(monkeypatch):
    """Whether the two halves were computed at once, call by call; with two threads, so that they can be."""
    found = []
    in_threads = cyclegan.in_threads

    def watched(calls, at_once):
        found.append(at_once)
        return in_threads(calls, at_once)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(cyclegan, "in_threads", watched)
    yield found
    torch.set_num_threads(before)


def test_both_halves_at_once_compute_to_the_last_bit_what_one_after_the_other_does(ways):
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        model = tiny_model(ema=0.9, buffer_size=3)
        losses = [model.step(*batch(step, 4), step) for step in range(20)]
        buffers = {domain: buffer.state_dict() for domain, buffer in model.buffers.items()}
        found.append({"losses": losses, "buffers": buffers, **model.state_dict()})
    assert differences(*found) == []
    assert ways == [True] * 80


@pytest.mark.parametrize("changes", [{"lambda_gp": 0.1}, {"norm": "batch"}, {"micro_batch": 3}])
def test_halves_wait_for_each_other_where_their_order_shows(changes, ways):
    """In random numbers, running statistics, and sums of three gradients."""
    tiny_model(**changes).step(*batch(0, 4))
    assert ways == [False, False]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that sends a signal")
def test_a_signal_is_heard_while_a_step_computes():
    heard = threading.Event()

    def waiting(*args):
        assert heard.wait(20)
        return generator_loss(*args)

    before = signal.signal(signal.SIGALRM, lambda signum, frame: heard.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        tiny_model(generator_loss=waiting).step(*batch(0, 2))
    finally:
        signal.signal(signal.SIGALRM, before)


# -- out of memory ---------------------------------------------------------------------------


def loss_that_needs(most):
    """The generators' loss on a machine that has no memory for more than `most` images."""
    asked = []

    def loss(nets, domain, real, config):
        asked.append(len(real))
        torch.rand(3)  # moves the random state before memory runs out
        if len(real) > most:
            raise torch.OutOfMemoryError
        return generator_loss(nets, domain, real, config)

    return loss, asked


def test_out_of_memory_is_survived_with_smaller_micro_batches_and_nothing_is_learnt_or_kept_twice(capsys):
    plenty = wide_model(buffer_size=4, generator_loss=loss_that_needs(8)[0])
    loss, asked = loss_that_needs(3)
    scarce = wide_model(buffer_size=4, generator_loss=loss)
    torch.manual_seed(1)
    whole = five_steps(plenty)
    torch.manual_seed(1)
    assert_close(whole, five_steps(scarce))
    assert asked[:10] == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert set(asked[10:]) == {2}
    err = capsys.readouterr().err
    assert "warning: out of memory: the batch of 8 is processed in micro-batches of 4 from now on" in err
    assert "micro-batches of 2 from now on" in err
    kept = [model.buffers["A"].state_dict() for model in (plenty, scarce)]
    assert kept[0]["rng"] == kept[1]["rng"]


def test_memory_that_runs_out_in_the_discriminators_half_does_not_fill_the_buffer_twice(monkeypatch):
    calls = []

    def scarce_loss(D, real, fake, config):
        calls.append(len(real))
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return discriminator_loss(D, real, fake, config)

    whole = five_steps(wide_model(buffer_size=50))
    model = wide_model(buffer_size=50)
    monkeypatch.setattr(cyclegan, "discriminator_loss", scarce_loss)
    assert_close(whole, five_steps(model))
    assert len(model.buffers["A"].images) == len(model.buffers["B"].images) == 40
    assert model.micro_batch_size == 4


class Memory:
    """Counts the calls that take memory in a step, and lets one of them fail."""

    def __init__(self, monkeypatch, model, failing):
        self.calls = 0
        self.failing = failing  # number of the call; 0: none
        for owner, name in (
            *((ResnetGenerator, "forward"), (Discriminator, "forward"), (torch.Tensor, "backward")),
            *((FakeImageBuffer, "exchange"), (cyclegan, "gradient_penalty")),
        ):
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))
        inside = self.watched(lambda gradient: None)  # of a backward pass that has left gradients behind already
        for net in model.nets.values():
            next(net.parameters()).register_hook(inside)

    def watched(self, plain):
        @functools.wraps(plain)
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.failing:
                raise torch.OutOfMemoryError
            return plain(*args, **kwargs)

        return call


def test_wherever_memory_runs_out_the_step_is_that_of_a_run_that_began_with_smaller_micro_batches(monkeypatch):
    changes = {"lambda_gp": 0.1, "buffer_size": 2, "num_residual": 0, "ema": 0.9}

    def one_step(failing, **more):
        with monkeypatch.context() as patch:
            model = wide_model(**changes, **more)
            memory = Memory(patch, model, failing)
            losses = model.step(*batch(0, 4, torch.float64))
        buffers = {domain: buffer.state_dict() for domain, buffer in model.buffers.items()}
        result = {"losses": losses, "buffers": buffers, "rng": devices.rng_state(), **model.state_dict()}
        return model, result, memory.calls

    plenty, _, calls = one_step(failing=0)
    assert plenty.micro_batch_size == 0
    # 4 of generators, 2 + 2 + 2 of discriminators, 4 backward, 6 inside of them, 2 exchanges, 2 penalties
    assert calls == 24
    _, expected, _ = one_step(failing=0, micro_batch=2)
    for failing in range(1, calls + 1):
        model, found, _ = one_step(failing)
        assert model.micro_batch_size == 2, failing
        assert differences(expected, found) == [], failing


def test_a_step_that_is_repeated_begins_from_the_same_random_state():
    states = []

    def random_loss(nets, domain, real, config):
        states.append((len(real), random.getstate(), torch.get_rng_state()))
        random.random()
        torch.rand(5)
        if len(real) > 2:
            raise torch.OutOfMemoryError
        return generator_loss(nets, domain, real, config)

    tiny_model(generator_loss=random_loss).step(*batch(0))
    firsts = [state for i, state in enumerate(states) if i == 0 or state[0] != states[i - 1][0]]
    assert [size for size, _, _ in firsts] == [8, 4, 2]
    assert all(differences(firsts[0][1:], state[1:]) == [] for state in firsts)
    assert differences(states[2][1:], states[3][1:])  # within an attempt it moves on


@pytest.mark.parametrize("changes", [{"micro_batch": 8}, {"norm": "batch"}])
def test_micro_batches_are_not_halved_against_the_users_word_or_a_batch_norm(changes):
    loss, asked = loss_that_needs(3)
    with pytest.raises(torch.OutOfMemoryError):
        five_steps(wide_model(**changes, generator_loss=loss))
    assert asked == [8]


def test_one_image_that_does_not_fit_is_not_survived():
    loss, asked = loss_that_needs(0)
    model = tiny_model(generator_loss=loss)
    before = weights_of(model)
    with pytest.raises(torch.OutOfMemoryError):
        model.step(*batch(0))
    assert asked == [8, 4, 2, 1]
    assert differences(before, weights_of(model)) == []


# -- averages --------------------------------------------------------------------------------


def test_averages_follow_the_weights_by_the_stated_rule():
    model = tiny_model(ema=0.5)
    expected = {k: v.clone() for k, v in model.nets["G_AB"].state_dict().items()}
    for step in range(4):
        model.step(*batch(step, 2), step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.nets["G_AB"].state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in model.averages["G_AB"].state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-7)
        assert not torch.equal(value, model.nets["G_AB"].state_dict()[name])


def test_averages_take_the_running_statistics_and_never_learn():
    model = tiny_model(ema=0.9, norm="batch")
    learning = {id(p) for optim in model.optims.values() for group in optim.param_groups for p in group["params"]}
    model.step(*batch(0))
    for name, averaged in model.averages.items():
        assert not any(p.requires_grad or id(p) in learning for p in averaged.parameters())
        assert differences(dict(averaged.named_buffers()), dict(model.nets[name].named_buffers())) == []
        assert averaged.stem[2].running_mean.any()


def test_averages_are_what_is_looked_at():
    model = tiny_model(ema=0.9)
    for step in range(3):
        model.step(*batch(step), step)
    assert model.averaged_nets["G_AB"] is model.averages["G_AB"]
    assert model.averaged_nets["D_A"] is model.nets["D_A"]
    real_A = batch(0, 2)[0]
    assert torch.equal(model.translate("G_AB", real_A), model.averages["G_AB"](real_A))
    assert not torch.equal(model.translate("G_AB", real_A), model.nets["G_AB"](real_A))
    assert tiny_model().averages == {}


# -- what is frozen, precision, compiled networks, rates --------------------------------------


@pytest.mark.parametrize("parts", [("stem", "down", "blocks"), ("head",), ("D",)])
def test_frozen_parts_do_not_move_and_the_rest_does(parts):
    nets = tiny_networks()
    for name, net in nets.items():
        for part, module in {"D": net}.items() if name.startswith("D") else net.named_children():
            module.requires_grad_(part not in parts)
    model = tiny_model(nets=nets)
    before = weights_of(model)
    losses = [model.step(*batch(step)) for step in range(2)]
    for name, net in nets.items():
        for key, p in net.named_parameters():
            frozen = "D" in parts if name.startswith("D") else key.split(".")[0] in parts
            assert p.requires_grad != frozen, f"{name} {key}"  # as before the step
            if frozen or key.endswith("weight"):
                assert torch.equal(before[name][key], p) == frozen, f"{name} {key}"
    assert losses[0].keys() == set(loss_names(LossConfig()))
    assert ("D" in model.optims) == ("D" not in parts)


def test_frozen_discriminators_need_no_penalty():
    model = maybe_frozen(frozen=True, lambda_gp=1.0)
    losses = model.step(*batch(0, 8, torch.float64))
    assert "gp_A" not in losses
    assert losses["loss_D_A"] > 0


def test_half_precision_learns_with_losses_in_float32():
    model = tiny_model(precision="bf16", lambda_gp=0.1)
    seen = []
    model.nets["D_A"].register_forward_hook(lambda net, inputs, output: seen.append(output.dtype))
    losses = model.step(*batch(0))
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]  # generators' side, its own, and the penalty
    assert {p.grad.dtype for net in model.nets.values() for p in net.parameters()} == {torch.float32}
    assert {image.dtype for image in model.buffers["A"].images} == {torch.float32}
    assert model.translate("G_AB", batch(0)[0]).dtype == torch.float32


def test_buffers_keep_the_precision_of_real_images():
    """Some generators end in a layer that gives half precision."""

    def half(*args):
        loss, terms, images = generator_loss(*args)
        return loss, terms, {"fake": images["fake"].bfloat16()}

    model = tiny_model(precision="bf16", generator_loss=half)
    model.step(*batch(0))
    assert {image.dtype for buffer in model.buffers.values() for image in buffer.images} == {torch.float32}


def test_scaled_losses_teach_the_same_and_a_step_without_finite_gradients_is_left_out():
    """The scaler of fp16, run in float64 on the CPU."""
    plain = wide_model()
    scaled = wide_model()
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    assert_close(five_steps(plain), five_steps(scaled))
    before = [p.clone() for p in scaled.nets["G_AB"].parameters()]

    def overflows(*args):
        loss, terms, images = generator_loss(*args)
        return loss * float("inf"), terms, images

    scaled.generator_loss = overflows
    scaled.step(*batch(0, 2, torch.float64))
    assert all(map(torch.equal, before, scaled.nets["G_AB"].parameters()))
    assert scaled.scaler.get_scale() == 2.0**15


def test_only_fp16_scales_its_losses():
    assert [tiny_model(precision=p).scaler.is_enabled() for p in ("fp32", "bf16", "fp16")] == [False, False, True]


def test_compiled_networks_run_in_the_losses_alone_and_keep_their_names_in_the_state(monkeypatch):
    class Compiled:
        def __init__(self, net):
            self.net = net
            self.calls = 0

        def __getattr__(self, name):
            return getattr(self.net, name)

        def __call__(self, *args, **kwargs):
            self.calls += 1
            return self.net(*args, **kwargs)

    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    model = wide_model(lambda_gp=1.0)
    model.compiled = {name: Compiled(net) for name, net in model.nets.items()}
    found = five_steps(model)
    plain = wide_model(lambda_gp=1.0)
    assert_close(found, five_steps(plain))
    assert {name: net.calls for name, net in model.compiled.items()} == {"G_AB": 10, "G_BA": 10, "D_A": 10, "D_B": 10}
    assert len(begun) == 5
    assert model.averaged_nets["G_AB"] is model.nets["G_AB"]
    assert model.state_dict()["nets"]["G_AB"].keys() == plain.nets["G_AB"].state_dict().keys()


def test_out_of_memory_frees_the_graphs_that_were_recorded_and_begins_the_next_attempt_as_a_step(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: calls.append("begin"))
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    loss, _ = loss_that_needs(4)
    model = tiny_model(generator_loss=loss)
    model.compiled = dict(model.nets)
    model.step(*batch(0))
    assert calls == ["begin", "reset", "begin"]


def test_images_that_a_graph_would_overwrite_are_copied():
    """A CUDA graph writes the output of its next run where that of the last one is."""
    outputs = []

    def overwriting(*args):
        for image in outputs:
            image.data.fill_(float("nan"))
        outputs.clear()
        loss, terms, images = generator_loss(*args)
        outputs.append(images["fake"])
        return loss, terms, images

    whole = five_steps(wide_model(micro_batch=3))
    assert_close(whole, five_steps(wide_model(micro_batch=3, generator_loss=overwriting)))


def test_rates_and_moments_are_those_of_the_config():
    model = tiny_model(lr=1e-3, lr_D=4e-3, beta1=0.9, beta2=0.99)
    for optim in model.optims.values():
        optim.param_groups[0]["betas"] = (0.1, 0.1)  # of a state that was put back
    model.set_learning_rate(0.5)
    rates = {name: [group["lr"] for group in optim.param_groups] for name, optim in model.optims.items()}
    assert rates == {"G": [0.5e-3], "D": [2e-3]}
    assert [group["betas"] for optim in model.optims.values() for group in optim.param_groups] == [(0.9, 0.99)] * 2
    model = tiny_model(lr=1e-3)
    model.set_learning_rate(1.0)
    assert model.optims["D"].param_groups[0]["lr"] == 1e-3


def test_a_rate_of_zero_teaches_nothing():
    model = tiny_model()
    before = {name: [p.clone() for p in net.parameters()] for name, net in model.nets.items()}
    model.set_learning_rate(0.0)
    model.step(*batch(0))
    assert all(map(torch.equal, before[name], net.parameters()) for name, net in model.nets.items())
    assert differences(before, {name: list(net.parameters()) for name, net in model.nets.items()}) == []


# -- its state -------------------------------------------------------------------------------


FULL = {"ema": 0.9, "lambda_gp": 0.1, "buffer_size": 3, "norm": "batch", "lr_D": 4e-4, "beta1": 0.9}


def written_and_read(state):
    """A state as it comes back from a file in which nothing may be executed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def whole_state(model):
    buffers = {domain: buffer.state_dict() for domain, buffer in model.buffers.items()}
    return written_and_read({**model.state_dict(), "buffers": buffers, "rng": devices.rng_state()})


@pytest.mark.parametrize("changes", [{}, FULL, {"precision": "fp16", "norm": "none"}])
def test_a_model_goes_on_from_its_state_bit_for_bit(changes, monkeypatch):
    monkeypatch.setattr(cyclegan, "autocast", lambda device, precision: torch.autocast("cpu", enabled=False))
    first = tiny_model(**changes)
    for step in range(3):
        first.step(*batch(step), step)
    state = whole_state(first)
    expected = [first.step(*batch(step), step) for step in range(3, 6)]
    second = tiny_model(**changes, seed=7)
    assert differences(second.state_dict()["nets"], state["nets"])
    second.load_state_dict(state)
    for domain, buffer in second.buffers.items():
        buffer.load_state_dict(state["buffers"][domain], CPU)
    devices.set_rng_state(state["rng"])
    found = [second.step(*batch(step), step) for step in range(3, 6)]
    assert differences(expected, found) == []
    assert differences(whole_state(first), whole_state(second)) == []


def test_adapters_stand_in_the_state():
    def with_adapters(seed):
        torch.manual_seed(seed)
        return tiny_model(adapters=nn.ModuleDict({"G_BA_0": nn.Conv2d(3, 3, 1)}))

    first = with_adapters(1)
    second = with_adapters(2)
    assert differences(first.state_dict()["adapters"], second.state_dict()["adapters"])
    second.load_state_dict(written_and_read(first.state_dict()))
    assert differences(first.state_dict(), second.state_dict()) == []
    state = first.state_dict()
    del state["adapters"]
    with pytest.raises(RuntimeError, match="G_BA_0"):
        second.load_state_dict(state)
    tiny_model().load_state_dict({**tiny_model().state_dict(), "adapters": None})  # older states of training have none


def test_an_average_can_begin_and_end_when_a_model_goes_on():
    plain = tiny_model()
    plain.step(*batch(0))
    averaged = tiny_model(ema=0.9)
    averaged.load_state_dict(plain.state_dict())
    for name, net in averaged.averages.items():
        assert differences(net.state_dict(), plain.nets[name].state_dict()) == []
    averaged.step(*batch(1), 1)
    plain.load_state_dict(averaged.state_dict())
    assert differences(plain.state_dict()["nets"], averaged.state_dict()["nets"]) == []
    assert plain.state_dict()["ema"] is None


def test_numbers_of_the_optimisers_come_from_the_config_and_not_from_the_state():
    old = tiny_model(lr=1.0, beta1=0.1)
    old.step(*batch(0))
    new = tiny_model(lr=1e-3, beta1=0.9)
    new.load_state_dict(old.state_dict())
    assert new.optims["G"].param_groups[0]["lr"] == 1e-3
    assert new.optims["G"].param_groups[0]["betas"] == (0.9, 0.999)
    moments = new.optims["G"].state_dict()["state"]
    assert differences(moments, old.optims["G"].state_dict()["state"]) == []
    assert moments


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state["nets"]["G_AB"].pop("stem.1.weight"),
        lambda state: state["nets"]["D_A"].update(more=torch.zeros(1)),
        lambda state: state["nets"].pop("D_B"),
        lambda state: state["optims"].pop("D"),
        lambda state: state["ema"]["G_AB"].pop("head.1.bias"),
    ],
)
def test_a_state_that_lacks_something_is_not_taken(spoil):
    model = tiny_model(ema=0.9)
    state = written_and_read(model.state_dict())
    spoil(state)
    with pytest.raises((KeyError, RuntimeError)):
        model.load_state_dict(state)


# -- looking at networks ---------------------------------------------------------------------


def modes(net):
    return {name: module.training for name, module in net.named_modules()}


def batch_norm_net():
    net = build_generator(GeneratorConfig(ngf=2, num_residual=1, norm="batch"))
    net.blocks.eval()  # frozen: its statistics stay also while the rest learns
    return net


def test_looking_changes_no_mode_and_no_running_statistic():
    net = batch_norm_net()
    other = build_generator(GeneratorConfig(ngf=2, num_residual=1, norm="batch")).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes_before = (modes(net), modes(other))
    with eval_mode(net, other):
        assert not any(module.training for both in (net, other) for module in both.modules())
        output = net(torch.rand(2, 3, 16, 16))
        assert not output.requires_grad
    assert (modes(net), modes(other)) == modes_before
    assert len(set(modes_before[0].values())) == 2
    assert differences(before, dict(net.state_dict())) == []
    assert net(torch.rand(2, 3, 16, 16)).requires_grad
    assert differences(before, dict(net.state_dict()))  # while learning they do move


def test_modes_are_put_back_after_an_error_and_when_looks_are_nested():
    net = batch_norm_net()
    before = modes(net)

    def fails():
        with eval_mode(net):
            with eval_mode(net, net):
                pass
            assert not any(modes(net).values())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert modes(net) == before
    assert torch.is_grad_enabled()


def test_translating_looks_and_gives_float32():
    net = batch_norm_net()
    for step in range(3):
        net(batch(step)[0])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes_before = modes(net)
    x = batch(9, 2)[0]
    outputs = {precision: translate(net, x, precision) for precision in ("fp32", "bf16")}
    for output in outputs.values():
        assert output.dtype == torch.float32
        assert output.shape == x.shape
        assert not output.requires_grad
    assert not torch.equal(*outputs.values())
    assert torch.allclose(*outputs.values(), atol=0.1)
    assert modes(net) == modes_before
    assert differences(before, dict(net.state_dict())) == []
    assert translate(nn.Conv2d(3, 3, 1), x, "bf16").dtype == torch.float32  # also where the last layer gives less
    one_by_one = torch.cat([translate(net, image[None], "fp32") for image in x])
    assert torch.allclose(outputs["fp32"], one_by_one, atol=1e-6)  # each image by itself: eval mode


def test_a_model_translates_both_ways_in_its_precision():
    model = tiny_model(precision="bf16")
    x = batch(0, 2)[0]
    for name in ("G_AB", "G_BA"):
        assert torch.equal(model.translate(name, x), translate(model.nets[name], x, "bf16"))
    assert model.nets["G_AB"].training


def test_a_model_needs_no_configs_but_the_papers():
    model = CycleGAN(tiny_networks(), LossConfig(), OptimConfig())
    assert model.device == CPU
    assert LossConfig() == LossConfig("lsgan", 1.0, 10.0, 5.0, 0.0, 100.0)
    assert OptimConfig() == OptimConfig(2e-4, None, 0.5, 0.999, 0.0, 50, "auto")
    assert model.step(*batch(0))["loss_G"] > 0
