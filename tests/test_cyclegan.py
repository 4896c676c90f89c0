"""The losses, the objective, one training step, and the state of a model."""

import copy
import importlib
import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import differences, tiny_model, tiny_networks
from tiny_steps import NAMES, assert_close, batch, double_model, five_steps, weights_of
from torch import nn

import cyclegan
from cyclegan import (
    GAN_LOSSES,
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
    loss_names,
    translate,
)
from models import DIRECTIONS, NORMS, VIT_SIZES, GeneratorConfig, VitSize, build_generator, freeze
from utils import FakeImageBuffer

A_TO_B, B_TO_A = DIRECTIONS

# -- losses by hand --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "loss_G", "loss_D"),
    [
        ("lsgan", (1 + 1) / 2, ((0.25 + 0) / 2 + (0 + 4) / 2) / 2),
        (
            "bce",
            (math.log(2) + math.log1p(math.exp(-2))) / 2,
            (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1)) + math.log(2) + math.log1p(math.exp(2))) / 4,
        ),
        ("hinge", -1, (0.25 + (1 + 3) / 2) / 2),
    ],
)
def test_adversarial_losses_by_hand(kind, loss_G, loss_D):
    real = torch.tensor([0.5, 1.0])
    fake = torch.tensor([0.0, 2.0])
    assert gan_loss_G(fake, kind).item() == pytest.approx(loss_G)
    assert gan_loss_D(real, fake, kind).item() == pytest.approx(loss_D)


def test_adversarial_losses_at_their_limits():
    undecided = torch.full((4,), 0.5)
    assert gan_loss_D(undecided, undecided).item() == gan_loss_G(undecided).item() == pytest.approx(0.25)  # lsgan
    certain = torch.tensor([-1e4, 1e4])
    assert gan_loss_G(certain, "bce").item() == gan_loss_D(certain, certain, "bce").item() == pytest.approx(5000)
    with pytest.raises(ValueError, match="gan_loss 'wgan'"):
        gan_loss_G(certain, "wgan")
    with pytest.raises(ValueError, match="gan_loss 'wgan'"):
        gan_loss_D(certain, certain, "wgan")


def test_image_loss_by_hand_and_images_that_would_broadcast_are_refused():
    assert image_loss(torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[[0.5, 1.0]]]])).item() == 1.25
    with pytest.raises(ValueError, match="shapes differ"):
        image_loss(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("kind", GAN_LOSSES)
def test_losses_of_half_precision_are_computed_in_float32(kind):
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x = torch.full((1, 3, 8, 8), 0.1, dtype=dtype)
        assert {loss.dtype for loss in (image_loss(x, x), gan_loss_D(x, x, kind), gan_loss_G(x, kind))} == {expected}


@pytest.mark.parametrize(
    ("num_epochs", "decay_epoch", "epochs", "factors"),
    [(200, None, (0, 100, 150, 199, 200), [1, 1, 0.5, 0.01, 0]), (4, 4, (3,), [1]), (4, 0, (0, 1), [1, 0.75])],
)
def test_the_learning_rate_falls_linearly_after_the_decay_epoch(num_epochs, decay_epoch, epochs, factors):
    config = OptimConfig(num_epochs=num_epochs, decay_epoch=decay_epoch)
    assert [config.learning_rate_factor(epoch) for epoch in epochs] == pytest.approx(factors)


# -- gradient penalty ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "target", "expected"),
    [([3.0, 4.0], 0.0, 25.0), ([3.0, 4.0], 10.0, 0.25), ([3.0, 4.0], 5.0, 0.0), ([0.0, 0.0], 0.0, 0.0)],
)
def test_gradient_penalty_of_a_linear_discriminator(weight, target, expected):
    D = nn.Sequential(nn.Flatten(), nn.Linear(2, 1, bias=False))
    D[1].weight.data = torch.tensor([weight])  # its gradient everywhere
    penalty = gradient_penalty(D, torch.rand(3, 2, 1, 1), torch.rand(3, 2, 1, 1), target)
    assert penalty.item() == pytest.approx(expected, abs=1e-5)
    penalty.backward()
    assert torch.isfinite(D[1].weight.grad).all()
    assert bool(D[1].weight.grad.abs().max() > 1e-5) == (expected > 0)


def test_gradient_penalty_is_taken_between_real_and_translated_images():
    seen = []

    def D(x):
        seen.append(x.detach())
        return x.square().sum()

    gradient_penalty(D, torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2), 0.0)
    weights = seen[0].flatten(1)
    assert torch.equal(weights.amin(1), weights.amax(1))  # one weight for each image
    assert 0 < weights.min() < weights.max() < 1


# -- the objective ---------------------------------------------------------------------------


class Table(nn.Module):
    """A network that maps flat images to flat images by a table, and records its inputs."""

    config = SimpleNamespace(norm="instance")

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.seen = []

    def forward(self, x):
        values = [round(image.mean().item(), 4) for image in x]
        self.seen.append(values)
        return torch.stack([torch.full_like(x[0], self.table[value]) for value in values])


def flat(value):
    return torch.full((1, 3, 4, 4), value)


def table_networks():
    """Networks for real_A = 0 and real_B = 1; all other images have values of their own."""
    return {
        "G_AB": Table({0.0: 0.7, 1.0: 0.6, 0.2: 0.8}),  # fake_B, idt_B, rec_B
        "G_BA": Table({1.0: 0.2, 0.0: 0.3, 0.7: 0.1}),  # fake_A, idt_A, rec_A
        "D_A": Table({0.2: 0.5}),
        "D_B": Table({0.7: 0.0}),
    }


def full_objective(networks, real_A, real_B, config):
    """The objective of both generators, its terms, and the translated images by domain."""
    loss_A, terms_A, translation_A = generator_loss(networks, A_TO_B, real_A, config)
    loss_B, terms_B, translation_B = generator_loss(networks, B_TO_A, real_B, config)
    return loss_A + loss_B, terms_A | terms_B, {"A": translation_B.fake, "B": translation_A.fake}


@pytest.mark.parametrize("kind", GAN_LOSSES)
def test_generator_loss_is_the_weighted_sum_of_its_terms(kind):
    config = LossConfig(lambda_gan=2, lambda_cycle=10, lambda_identity=5, gan_loss=kind)
    loss, terms, fakes = full_objective(table_networks(), flat(0.0), flat(1.0), config)
    by_hand = {"cycle_A": 0.1, "cycle_B": 0.2, "identity_A": 0.3, "identity_B": 0.4}
    by_hand |= {"gan_AB": gan_loss_G(flat(0.0), kind).item(), "gan_BA": gan_loss_G(flat(0.5), kind).item()}
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(by_hand)
    assert loss.item() == pytest.approx(2 * (by_hand["gan_AB"] + by_hand["gan_BA"]) + 10 * 0.3 + 5 * 0.7)
    assert torch.equal(fakes["A"], flat(0.2))
    assert torch.equal(fakes["B"], flat(0.7))
    loss_D = discriminator_loss(Table({0.5: 0.5, 0.0: 2.0}), flat(0.5), flat(0.0), config)
    assert loss_D.item() == pytest.approx(gan_loss_D(flat(0.5), flat(2.0), kind).item())


@pytest.mark.parametrize(
    ("without", "expected", "seen_by_G_AB", "seen_by_D_B"),
    [
        ("identity", 1.25 + 3, [[0.0], [0.2]], [[0.7]]),
        ("cycle", 1.25 + 3.5, [[0.0], [1.0]], [[0.7]]),
        ("gan", 3 + 3.5, [[0.0], [0.2, 1.0]], []),
    ],
)
def test_a_term_of_weight_zero_is_not_computed(without, expected, seen_by_G_AB, seen_by_D_B):
    networks = table_networks()
    loss, terms, _ = full_objective(networks, flat(0.0), flat(1.0), LossConfig(**{f"lambda_{without}": 0.0}))
    assert {name.split("_")[0] for name in terms} == {"gan", "cycle", "identity"} - {without}
    assert loss.item() == pytest.approx(expected)
    assert [sorted(values) for values in networks["G_AB"].seen] == seen_by_G_AB
    assert networks["D_B"].seen == seen_by_D_B


# a penalty, micro-batches and each norm; a batch norm keeps the statistics of real and translated images apart
STEPS = [{"lambda_gp": 0.5, "gp_target": 2.0}, {"micro_batch": 3}, *({"norm": norm} for norm in NORMS)]


@pytest.mark.parametrize("changes", STEPS)
def test_each_network_gets_the_gradients_of_its_own_loss_computed_plainly(changes):
    model = double_model(**changes)
    G_AB, G_BA, D_A, D_B = (double_model(**changes).networks[name] for name in NAMES)
    real_A, real_B = batch(0, 8, torch.float64)
    fake_B = G_AB(real_A)
    fake_A = G_BA(real_B)
    cycle = image_loss(G_BA(fake_B), real_A) + image_loss(G_AB(fake_A), real_B)
    identity = image_loss(G_BA(real_A), real_A) + image_loss(G_AB(real_B), real_B)
    loss_G = (D_B(fake_B) - 1).square().mean() + (D_A(fake_A) - 1).square().mean() + 10 * cycle + 5 * identity
    expected = list(torch.autograd.grad(loss_G, [*G_AB.parameters(), *G_BA.parameters()]))
    torch.manual_seed(0)  # the penalty mixes images at random
    for D, real, fake in ((D_A, real_A, fake_A.detach()), (D_B, real_B, fake_B.detach())):
        loss_D = ((D(real) - 1).square().mean() + D(fake).square().mean()) / 2
        if model.loss_config.lambda_gp:
            loss_D = loss_D + 0.5 * gradient_penalty(D, real, fake, 2.0)
        expected += torch.autograd.grad(loss_D, list(D.parameters()))
    torch.manual_seed(0)
    losses = model.step(real_A, real_B)
    assert losses["loss_G"].item() == pytest.approx(loss_G.item(), abs=1e-12)
    found = [p.grad for name in NAMES for p in model.networks[name].parameters()]
    assert len(found) == len(expected)
    assert all(torch.allclose(own, gradient, atol=1e-10) for own, gradient in zip(found, expected, strict=True))


# -- one step --------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_paper():
    loss = LossConfig(lambda_cycle=10, lambda_identity=5, lambda_gan=1, gan_loss="lsgan", lambda_gp=0, gp_target=100)
    optim = OptimConfig(num_epochs=200, lr=2e-4, lr_D=None, beta1=0.5, beta2=0.999, ema=0, buffer_size=50)
    assert (LossConfig(), OptimConfig()) == (loss, optim)
    assert CycleGAN(tiny_networks(), LossConfig(), OptimConfig()).step(*batch(0))["loss_G"] > 0


@pytest.mark.parametrize("config", [{}, {"lambda_gp": 1.0}])
def test_a_step_returns_the_columns_of_losses_csv(config):
    losses = tiny_model(**config).step(*batch(0))
    assert set(losses) == set(loss_names(LossConfig(**config)))
    assert all(value.ndim == 0 and value > 0 and not value.requires_grad for value in losses.values())


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
        {"generator": "unet_vit"},
    ],
)
def test_every_weight_of_all_four_networks_learns(changes, monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, uvcgan_layers=False))
    model = tiny_model(**changes)
    before = weights_of(model)
    for step in range(3):  # the scales of transformer blocks leave 0 in the first step, the weights behind them later
        model.step(*batch(step, 2, channels=changes.get("channels", 3)))
    for name, net in model.networks.items():
        for key, p in net.named_parameters():
            if not key.endswith("bias") or changes.get("norm") in ("batch", "none"):  # an instance norm cancels biases
                assert not torch.equal(before[name][key], p), f"{name} {key} did not change"


def test_a_step_equals_that_of_a_plain_implementation_over_20_steps_in_float64(monkeypatch):
    """The plain one is in benchmarks/step.py and shares no code with ours."""
    monkeypatch.syspath_prepend(Path(cyclegan.__file__).parent / "benchmarks")
    step = importlib.import_module("step")
    config = step.parse_args([])
    config.size = 16
    config.batch = 2
    config.ngf = 4
    config.blocks = 1
    config.n_layers_D = 1
    assert step.check(config) < 1e-9


def test_the_same_seed_gives_the_same_steps():
    def train(seed):
        model = tiny_model(seed=seed, buffer_size=3, lambda_gp=0.1)
        losses = [model.step(*batch(step)) for step in range(3)]
        return losses, model.state_dict()

    assert differences(train(0), train(0)) == []
    assert differences(train(0), train(1))


def test_discriminators_also_learn_from_older_images():
    model = tiny_model(buffer_size=4)
    shown = []
    model.networks["D_A"].register_forward_pre_hook(lambda net, inputs: shown.append(inputs[0]))
    fakes = []
    for step in range(6):
        real_A, real_B = batch(step, 2)
        fakes += model.translate("G_BA", real_B)
        shown.clear()
        model.step(real_A, real_B)
    real, buffered = shown[1].chunk(2)  # the first call is the generators'
    assert torch.equal(real, real_A)
    sources = [[torch.allclose(image, fake, atol=1e-6) for fake in fakes] for image in buffered]
    assert [sum(found) for found in sources] == [1, 1]
    assert any(any(found[:-2]) for found in sources)
    assert len(model.buffers["A"].images) == len(model.buffers["B"].images) == 4


def test_each_buffer_of_each_rank_has_its_own_random_numbers(monkeypatch):
    states = []
    for rank in (0, 1):
        monkeypatch.setattr(cyclegan, "rank", lambda rank=rank: rank)
        states += [buffer.state_dict()["rng"] for buffer in tiny_model(seed=3).buffers.values()]
    assert len(set(states)) == 4
    assert states[0] == FakeImageBuffer(1, "3-buffer-A").state_dict()["rng"]


@pytest.mark.parametrize("scaled", [False, True])
def test_discriminators_are_skipped_without_an_adversarial_loss_and_learn_again_with_one(scaled):
    """Weights, moments and buffers do not change; nor with the scaler of fp16, which finds no gradients of them."""
    model = double_model(lambda_gan=0.0)
    model.executor.scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    before = copy.deepcopy(model.state_dict())
    losses = model.step(*batch(0, 2, torch.float64))
    after = copy.deepcopy(model.state_dict())
    assert not {"loss_D_A", "loss_D_B", "gan_AB", "gan_BA"} & losses.keys()
    changed = differences(before, after)
    assert changed
    assert not any("D" in path or "buffers" in path for path in changed)
    again = double_model(networks=model.networks)
    again.load_state_dict(after)
    assert "loss_D_A" in again.step(*batch(1, 2, torch.float64))
    assert any("D_A" in path for path in differences(after, again.state_dict()))


# -- EMA weights -----------------------------------------------------------------------------


def test_ema_weights_follow_the_weights_by_the_documented_rule():
    model = tiny_model(ema=0.5)
    expected = {k: v.clone() for k, v in model.networks["G_AB"].state_dict().items()}
    for step in range(4):
        model.step(*batch(step, 2))
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.networks["G_AB"].state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in model.ema["G_AB"].state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-7)
        assert not torch.equal(value, model.networks["G_AB"].state_dict()[name])


def test_ema_networks_copy_running_statistics_have_no_gradient_and_are_used_to_translate():
    model = tiny_model(ema=0.9, norm="batch")
    for step in range(3):
        model.step(*batch(step))
    real_A = batch(0, 2)[0]
    for name, net in model.ema.items():
        assert not any(p.requires_grad for p in net.parameters())
        assert differences(dict(net.named_buffers()), dict(model.networks[name].named_buffers())) == []
        assert net.stem[2].running_mean.any()
        assert torch.equal(model.translate(name, real_A), translate(net, real_A, "fp32"))
        assert not torch.equal(model.translate(name, real_A), translate(model.networks[name], real_A, "fp32"))
    assert model.ema_networks == {**model.networks, **model.ema}
    assert tiny_model().ema == {}


# -- frozen parts, precision, learning rates -------------------------------------------------


@pytest.mark.parametrize("lambda_gp", [0.0, 1.0])
@pytest.mark.parametrize("parts", [("stem", "down", "blocks"), ("head",), ("D",)])
def test_frozen_parts_and_their_running_statistics_do_not_change_and_the_others_learn(parts, lambda_gp):
    networks = tiny_networks(norm="batch")
    freeze(networks, parts)
    model = tiny_model(networks=networks, lambda_gp=lambda_gp)
    before = weights_of(model)
    losses = [model.step(*batch(step)) for step in range(2)]
    for name, values in before.items():
        for key, value in values.items():
            frozen = "D" in parts if name.startswith("D") else key.split(".")[0] in parts
            assert torch.equal(value, networks[name].state_dict()[key]) == frozen, f"{name} {key}"
    assert any(p.requires_grad for p in networks["D_A"].parameters()) == ("D" not in parts)  # as before the step
    without_penalty = LossConfig(lambda_gp=0 if "D" in parts else lambda_gp)  # frozen discriminators need none
    assert losses[0].keys() == set(loss_names(without_penalty))


def test_half_precision_learns_with_losses_and_weights_in_float32():
    def half(*args):  # as of generators that end in half precision
        loss, terms, translation = generator_loss(*args)
        return loss, terms, translation._replace(fake=translation.fake.bfloat16())

    model = tiny_model(precision="bf16", lambda_gp=0.1, objective=half)
    seen = []
    model.networks["D_A"].register_forward_hook(lambda net, inputs, output: seen.append(output.dtype))
    losses = model.step(*batch(0))
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]  # generators' loss, own loss, penalty
    assert {p.grad.dtype for net in model.networks.values() for p in net.parameters()} == {torch.float32}
    assert {image.dtype for buffer in model.buffers.values() for image in buffer.images} == {torch.float32}
    x = batch(0, 2)[0]
    for name in ("G_AB", "G_BA"):
        assert torch.equal(model.translate(name, x), translate(model.networks[name], x, "bf16"))
        assert model.translate(name, x).dtype == torch.float32
        assert model.networks[name].training


def test_scaled_losses_give_the_same_steps_and_a_step_without_finite_gradients_is_skipped():
    """The scaler of fp16, run in float64 on the CPU."""
    assert [tiny_model(precision=p).executor.scaler.is_enabled() for p in ("fp32", "bf16", "fp16")] == [0, 0, 1]
    scaled = double_model()
    scaled.executor.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    assert_close(five_steps(double_model()), five_steps(scaled))
    before = [p.clone() for p in scaled.networks["G_AB"].parameters()]

    def overflows(*args):
        loss, terms, translation = generator_loss(*args)
        return loss * math.inf, terms, translation

    scaled.objective = overflows
    scaled.step(*batch(0, 2, torch.float64))
    assert all(map(torch.equal, before, scaled.networks["G_AB"].parameters()))
    assert scaled.executor.scaler.get_scale() == 2.0**15


@pytest.mark.parametrize(("lr_D", "expected"), [(4e-3, 2e-3), (None, 0.5e-3)])
def test_a_state_restores_moments_but_learning_rates_and_betas_are_those_of_the_config(lr_D, expected):
    old = tiny_model(lr=1.0, beta1=0.1)
    old.step(*batch(0))
    new = tiny_model(lr=1e-3, lr_D=lr_D, beta1=0.9, beta2=0.99)
    new.load_state_dict(old.state_dict())
    new.set_learning_rate(0.5)
    for name, lr in (("G", 0.5e-3), ("D", expected)):
        (group,) = new.optimizers[name].param_groups
        assert (group["lr"], group["betas"]) == (lr, (0.9, 0.99))
        moments = new.optimizers[name].state_dict()["state"]
        assert moments
        assert differences(moments, old.optimizers[name].state_dict()["state"]) == []


# -- the state -------------------------------------------------------------------------------


def through_a_file(state):
    """A state as it is read from a file in which no code may be executed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


FULL = {"ema": 0.9, "lambda_gp": 0.1, "buffer_size": 3, "norm": "batch", "lr_D": 4e-4, "beta1": 0.9}


@pytest.mark.parametrize("changes", [{}, FULL, {"precision": "fp16", "norm": "none"}])
def test_a_model_continues_from_its_state_bit_for_bit(changes, monkeypatch):
    monkeypatch.setattr("toolkit.executor.autocast", lambda device, precision: torch.autocast("cpu", enabled=False))
    first = tiny_model(**changes)
    for step in range(3):
        first.step(*batch(step))
    state = through_a_file(first.state_dict())
    expected = [first.step(*batch(step)) for step in range(3, 6)]
    after = through_a_file(first.state_dict())
    second = tiny_model(**changes, seed=7)
    assert differences(second.state_dict()["nets"], state["nets"])
    second.load_state_dict(state)
    assert differences(second.state_dict(), state) == []
    found = [second.step(*batch(step)) for step in range(3, 6)]
    assert differences(expected, found) == []
    assert differences(after, second.state_dict()) == []


def test_ema_can_be_switched_on_and_off_when_a_model_continues():
    plain = tiny_model()
    plain.step(*batch(0))
    averaged = tiny_model(ema=0.9)
    averaged.load_state_dict(plain.state_dict())
    for name, net in averaged.ema.items():
        assert differences(net.state_dict(), plain.networks[name].state_dict()) == []
    averaged.step(*batch(1))
    plain.load_state_dict(averaged.state_dict())
    assert differences(plain.state_dict()["nets"], averaged.state_dict()["nets"]) == []
    assert plain.state_dict()["ema"] is None


# -- networks that are used without training them --------------------------------------------


def modes(*networks):
    return [module.training for net in networks for module in net.modules()]


def batch_norm_net():
    net = build_generator(GeneratorConfig(ngf=2, num_residual=1, norm="batch"))
    for step in range(3):
        net(batch(step)[0])
    net.blocks.eval()  # as a frozen part
    return net


def test_eval_mode_changes_no_mode_and_no_running_statistic_even_after_an_error():
    net = batch_norm_net()
    other = copy.deepcopy(net).eval()
    before = (copy.deepcopy(dict(net.state_dict())), modes(net, other))

    def fail():
        with eval_mode(net, other):
            with eval_mode(net, net):
                pass
            assert not any(modes(net, other))
            assert not net(torch.rand(2, 3, 16, 16)).requires_grad
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert differences(before, (dict(net.state_dict()), modes(net, other))) == []
    assert net(torch.rand(2, 3, 16, 16)).requires_grad


def test_translate_returns_float32_in_eval_mode():
    net = batch_norm_net()
    before = (copy.deepcopy(dict(net.state_dict())), modes(net))
    x = batch(9, 2)[0]
    full = translate(net, x, "fp32")
    half = translate(net, x, "bf16")
    assert full.dtype == half.dtype == translate(nn.Conv2d(3, 3, 1), x, "bf16").dtype == torch.float32
    assert not torch.equal(full, half)
    assert torch.allclose(full, half, atol=0.1)
    assert differences(before, (dict(net.state_dict()), modes(net))) == []
    assert torch.allclose(full[:1], translate(net, x[:1], "fp32"), atol=1e-6)  # images do not affect each other
