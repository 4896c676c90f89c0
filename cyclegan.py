"""CycleGAN (Zhu et al. 2017, arXiv:1703.10593): its losses, its objective, and one training step.

    model = CycleGAN(networks, LossConfig(), OptimConfig())
    losses = model.step(real_A, real_B)

fake_B = G_AB(real_A), rec_A = G_BA(fake_B), idt_A = G_BA(real_A); D_A sees images of domain A.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import DIRECTIONS, Direction, Networks
from toolkit.devices import autocast, rng_state, set_rng_state
from toolkit.distributed import average, rank
from toolkit.executor import MEMORY_FORMATS, Executor, ExecutorConfig, retry_in_micro_batches
from utils import FakeImageBuffer, option

GAN_LOSSES = ("lsgan", "bce", "hinge")
LOSSES = ("loss_G", "loss_D_A", "loss_D_B")
TERMS = ("gan_AB", "gan_BA", "cycle_A", "cycle_B", "identity_A", "identity_B")


@dataclass(frozen=True)
class LossConfig:
    """The objective. The defaults are the paper's for paintings; for photos it has no identity loss."""

    lambda_cycle: float = option(10.0, "weight of the cycle loss; 0 leaves it out", least=0)
    lambda_identity: float = option(5.0, "weight of the identity loss; 0 leaves it out", least=0)
    lambda_gan: float = option(1.0, "weight of the adversarial loss; 0 skips the discriminators", least=0)
    gan_loss: str = option("lsgan", "form of the adversarial loss", choices=GAN_LOSSES)
    lambda_gp: float = option(0.0, "weight of the discriminators' gradient penalty; 0: none", least=0)
    gp_target: float = option(100.0, "gradient norm it aims at; UVCGAN has weight .1, norm 100", least=0)


@dataclass(frozen=True)
class OptimConfig:
    """Adam and its schedule (section 4 of the paper), EMA weights, and the buffer of translated images."""

    num_epochs: int = option(200, "epochs in total", least=1)
    decay_epoch: int | None = option(None, "epoch from which the rates decay to 0 (default: the middle)", least=0)
    lr: float = option(2e-4, "learning rate of Adam", above=0)
    lr_D: float | None = option(None, "learning rate of the discriminators (default: --lr; TTUR: 4 times)", above=0)
    beta1: float = option(0.5, "Adam's decay of the first moment", least=0, most=0.999999)
    beta2: float = option(0.999, "Adam's decay of the second moment", least=0, most=0.999999)
    ema: float = option(0.0, "decay of the generators' EMA weights, which are tested; 0: none", least=0, most=0.999999)
    buffer_size: int = option(50, "translated images kept to train each discriminator", least=0)

    @property
    def first_decay_epoch(self) -> int:
        return self.num_epochs // 2 if self.decay_epoch is None else self.decay_epoch

    def learning_rate_factor(self, epoch: int) -> float:
        """Return the factor of the learning rates in an epoch, counted from 0.

        1 up to and including first_decay_epoch, then linearly towards 0 at num_epochs.
        source: section 4, "Training details"
        """
        decay_epochs = self.num_epochs - self.first_decay_epoch
        return 1 - max(0, epoch - self.first_decay_epoch) / max(1, decay_epochs)


# -- Losses, computed in float32 (or float64) even where the networks ran in half precision --------
def to_float(x: Tensor) -> Tensor:
    """Convert half precision to float32; float64 is preserved."""
    return x if x.dtype == torch.float64 else x.float()


def gan_loss_G(prediction: Tensor, kind: str = "lsgan") -> Tensor:
    """Adversarial loss of a generator: low when the discriminator predicts "real" for its images.

    prediction: output of the discriminator, any shape, unbounded
    returns:    scalar; 0 for lsgan and bce when every prediction is "real"; hinge has no lower bound
    source:     Mao et al. 2017 (lsgan, the paper's choice), Goodfellow et al. 2014 (bce, non-saturating),
                Lim and Ye 2017 (hinge)
    """
    prediction = to_float(prediction)
    if kind == "lsgan":
        return F.mse_loss(prediction, torch.ones_like(prediction))
    if kind == "bce":
        return F.softplus(-prediction).mean()
    if kind == "hinge":
        return -prediction.mean()
    raise ValueError(f"gan_loss {kind!r}: expected one of {', '.join(GAN_LOSSES)}")


def gan_loss_D(on_real: Tensor, on_fake: Tensor, kind: str = "lsgan") -> Tensor:
    """Adversarial loss of a discriminator, halved to slow it down relative to the generator (section 7.1).

    on_real, on_fake: its predictions for real and for translated images, unbounded
    returns:          scalar; 0.25 for an lsgan discriminator that cannot tell them apart
    """
    on_real = to_float(on_real)
    on_fake = to_float(on_fake)
    if kind == "lsgan":
        loss = F.mse_loss(on_real, torch.ones_like(on_real)) + F.mse_loss(on_fake, torch.zeros_like(on_fake))
    elif kind == "bce":
        loss = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
    elif kind == "hinge":
        loss = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
    else:
        raise ValueError(f"gan_loss {kind!r}: expected one of {', '.join(GAN_LOSSES)}")
    return loss / 2


def image_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of two batches of images: the cycle and identity losses.

    image, target: (N, C, H, W) in [-1, 1], of the same shape
    returns:       scalar in [0, 2]
    raises:        ValueError if the shapes differ (l1_loss would only warn, and broadcast)
    source:        eq. 2 (cycle), section 5.2 (identity)
    """
    if image.shape != target.shape:
        raise ValueError(f"shapes differ: {tuple(image.shape)} and {tuple(target.shape)}")
    return F.l1_loss(to_float(image), to_float(target))


def gradient_penalty(D: nn.Module, real: Tensor, fake: Tensor, target: float) -> Tensor:
    """Distance of the norm of a discriminator's gradient from `target`, at random mixtures of real and fake images.

    real, fake: (N, C, H, W) in [-1, 1]; draws from torch's random state
    target:     the norm aimed at; unless it is 0, the distance is divided by it
    returns:    scalar that can be differentiated with respect to the discriminator's weights (double backward)
    source:     Gulrajani et al. 2017; relative to the target as in UVCGAN (0.1 and 100), zero-centred
                as in UVCGAN2 (0.01 and 0)
    """
    weight = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
    mixed = (weight * real + (1 - weight) * fake).detach().requires_grad_()
    with autocast(real.device, "fp32"):  # bfloat16 is too coarse for second derivatives
        (gradient,) = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
    norms = (gradient.flatten(1).square().sum(1) + 1e-12).sqrt()  # (N,); sqrt has no gradient at 0
    return ((norms - target) / (target or 1.0)).square().mean()


# -- The objective ---------------------------------------------------------------------------------
class Translation(NamedTuple):
    """Output of a generator, which distillation compares with its teacher's."""

    fake: Tensor  # (N, C, H, W) in [-1, 1]
    hidden: Sequence[Tensor]  # outputs of its blocks, if they were asked for


def run_together(net: Any, first: Tensor, second: Tensor) -> Sequence[Tensor]:
    """Run two equally large batches through a network in one call, which is faster than two calls.

    A batch norm would mix their statistics, so it gets them one after the other; so do images of two sizes.
    """
    if net.config.norm == "batch" or first.shape != second.shape:
        return net(first), net(second)
    return net(torch.cat([first, second])).chunk(2)


def generator_loss(
    networks: Networks, direction: Direction, real: Tensor, config: LossConfig, return_hidden: bool = False
) -> tuple[Tensor, dict[str, Tensor], Translation]:
    """Compute the generators' objective in one direction; the full objective is the sum over both.

    networks: G_AB, G_BA, D_A, D_B
    real:     (N, C, H, W) in [-1, 1], of the direction's source domain
    returns:  loss (scalar), its unweighted terms by name, and the translation
    source:   eq. 3; identity loss section 5.2
    """
    source, target = direction
    G = networks[direction.generator]
    G_back = networks[direction.reverse.generator]
    gan, cycle, identity = f"gan_{source}{target}", f"cycle_{source}", f"identity_{source}"
    weights = {gan: config.lambda_gan, cycle: config.lambda_cycle, identity: config.lambda_identity}
    terms = {}
    fake, hidden = G(real, return_hidden=True) if return_hidden else (G(real), [])
    if config.lambda_gan:
        terms[gan] = gan_loss_G(networks[f"D_{target}"](fake), config.gan_loss)
    if config.lambda_cycle and config.lambda_identity:
        rec, idt = run_together(G_back, fake, real)
        terms[cycle] = image_loss(rec, real)
        terms[identity] = image_loss(idt, real)
    elif config.lambda_cycle:
        terms[cycle] = image_loss(G_back(fake), real)
    elif config.lambda_identity:
        terms[identity] = image_loss(G_back(real), real)
    loss = sum((weights[name] * term for name, term in terms.items()), real.new_zeros(()))
    return loss, terms, Translation(fake, hidden)


def discriminator_loss(D: Any, real: Tensor, fake: Tensor, config: LossConfig) -> Tensor:
    """Compute the objective of one discriminator; in training `fake` comes from the image buffer."""
    on_real, on_fake = run_together(D, real, fake)
    return gan_loss_D(on_real, on_fake, config.gan_loss)


def loss_names(config: LossConfig) -> tuple[str, ...]:
    """Return the loss columns of losses.csv; a step leaves out the terms that the config switches off."""
    return (*LOSSES, *TERMS, *(("gp_A", "gp_B") if config.lambda_gp else ()))


# -- Using networks without training them ----------------------------------------------------------
@contextmanager
def eval_mode(*networks: nn.Module) -> Iterator[None]:
    """Switch off gradients and put all layers into eval mode, so that running statistics do not change.

    Afterwards each layer has its own mode again.
    """
    modes = [(module, module.training) for net in networks for module in net.modules()]
    for net in networks:
        net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def translate(net: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Run images (N, C, H, W) in [-1, 1] through a generator, on its device; returns float32."""
    device = next(net.parameters()).device
    with eval_mode(net), autocast(device, precision):
        return net(images.to(device)).float()


# -- The model -------------------------------------------------------------------------------------
def make_adam(networks: Iterable[nn.Module], config: OptimConfig) -> torch.optim.Adam | None:
    """Make one optimiser for all weights of some networks that learn; None if all are frozen."""
    weights = [p for net in networks for p in net.parameters() if p.requires_grad]
    if not weights:
        return None
    fused = weights[0].device.type in ("cpu", "cuda")
    return torch.optim.Adam(weights, config.lr, (config.beta1, config.beta2), fused=fused)


def match_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments of an Adam the memory layout of its weights, which its fused kernels rely on.

    raises: ValueError if a shape differs: the kernels would read out of bounds
    """
    for weight, moments in optimizer.state.items():
        for name, like in {"step": torch.tensor(0.0), "exp_avg": weight, "exp_avg_sq": weight}.items():
            if moments[name].shape != like.shape:
                raise ValueError(f"{name} has the shape {tuple(moments[name].shape)}, expected {tuple(like.shape)}")
            moments[name] = torch.empty_like(like, requires_grad=False).copy_(moments[name])  # with the same strides


GeneratorLoss = Callable[[Networks, Direction, Tensor, LossConfig], tuple[Tensor, dict[str, Tensor], Translation]]


class CycleGAN:
    """Two generators, two discriminators, and everything about them that learns or is random.

    networks:        G_AB, G_BA, D_A, D_B, on one device
    loss_config:     weights and form of the objective
    optim_config:    Adam, its schedule, EMA weights and image buffers
    executor_config: how a batch is run
    precision:       of the forward passes: fp32, bf16, fp16
    seed:            of the image buffers
    adapters:        further modules that learn with the generators; only a distillation has some
    objective:       of the generators in one direction; a distillation has its own
    """

    def __init__(
        self,
        networks: Networks,
        loss_config: LossConfig,
        optim_config: OptimConfig,
        *,
        executor_config: ExecutorConfig | None = None,
        precision: str = "fp32",
        seed: object = 0,
        adapters: nn.ModuleDict | None = None,
        objective: GeneratorLoss = generator_loss,
    ):
        self.networks = networks
        self.loss_config = loss_config
        self.optim_config = optim_config
        self.objective = objective
        self.finished_steps = 0
        self.precision = precision
        self.memory_format = "contiguous"
        self.generators = nn.ModuleList([networks["G_AB"], networks["G_BA"]])
        self.discriminators = nn.ModuleList([networks["D_A"], networks["D_B"]])
        self.adapters = nn.ModuleDict() if adapters is None else adapters
        self.ema: Networks = {}
        if optim_config.ema:
            for direction in DIRECTIONS:
                name = direction.generator
                self.ema[name] = copy.deepcopy(networks[name]).requires_grad_(False)
        self.make_optimizers()
        self.buffers = {}
        for domain in "AB":
            self.buffers[domain] = FakeImageBuffer(optim_config.buffer_size, f"{seed}-buffer-{domain}{rank() or ''}")
        norm = networks["G_AB"].config.norm
        # where random numbers are drawn or statistics change, the two directions must not run at the same time
        in_order = bool(loss_config.lambda_gp) or norm == "batch"
        self.executor = Executor(networks, executor_config or ExecutorConfig(), precision, norm, in_order)

    def make_optimizers(self) -> None:
        """Make one Adam for the generators and one for the discriminators; networks that are frozen have none."""
        optimizers = {
            "G": make_adam([*self.generators, self.adapters], self.optim_config),
            "D": make_adam(self.discriminators, self.optim_config),
        }
        self.optimizers = {name: optimizer for name, optimizer in optimizers.items() if optimizer}

    @property
    def device(self) -> torch.device:
        return next(self.networks["G_AB"].parameters()).device

    @property
    def ema_networks(self) -> Networks:
        """The networks to show, test and ship: the generators with their EMA weights, if there are any."""
        return {**self.networks, **self.ema}

    def translate(self, name: str, images: Tensor) -> Tensor:
        """Run images (N, C, H, W) through a generator, by name, as testing does."""
        return translate(self.ema_networks[name], images, self.precision)

    def step(self, real_A: Tensor, real_B: Tensor) -> dict[str, Tensor]:
        """Take one training step (sections 3 and 4): gradients of all networks, then an Adam step for G and one for D.

        This equals a step of G before the gradients of D: D learns from images that were translated before the step of G.
        real_A, real_B: (N, C, H, W) in [-1, 1], on the networks' device
        returns:        losses and their terms by name, scalars on the device
        """
        losses = self.compute_gradients(real_A, real_B)
        self.average_over_ranks()
        for optimizer in self.optimizers.values():
            self.executor.scaler.step(optimizer)
        self.executor.scaler.update()
        self.update_ema()
        self.finished_steps += 1
        return losses

    @retry_in_micro_batches
    def compute_gradients(self, real_A: Tensor, real_B: Tensor) -> dict[str, Tensor]:
        """Compute the gradients of the generators, then of the discriminators; returns the losses by name.

        executor.backward calls a loss function for both directions (on a CPU at once; in micro-batches and half precision
        where configured), runs backward(), and returns the losses and the translated images without their graphs.
        """
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

        # generators: the loss passes through the discriminators, but their weights get no gradient
        self.discriminators.requires_grad_(False)
        A_to_B, B_to_A = DIRECTIONS
        losses, (fake_B, fake_A) = self.executor.backward(self.compute_loss_G, (A_to_B, real_A), (B_to_A, real_B))
        self.discriminators.requires_grad_("D" in self.optimizers)  # False where they are frozen

        # discriminators: the translated images, perhaps in half precision, come from buffers that also return older ones
        if self.loss_config.lambda_gan:
            older_A = self.buffers["A"].exchange(fake_A.to(real_A.dtype))
            older_B = self.buffers["B"].exchange(fake_B.to(real_B.dtype))
            losses_D, _ = self.executor.backward(self.compute_loss_D, ("A", real_A, older_A), ("B", real_B, older_B))
            losses |= losses_D
        return losses

    def compute_loss_G(self, direction: Direction, real: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the generators' loss in one direction, its terms, and the translated images."""
        # executor.networks: compiled, if that was asked for
        loss, terms, translation = self.objective(self.executor.networks, direction, real, self.loss_config)
        return loss, {"loss_G": loss, **terms}, translation.fake

    def compute_loss_D(self, domain: str, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor], None]:
        """Return the loss of one discriminator, with its gradient penalty, and the terms."""
        config = self.loss_config
        name = f"D_{domain}"
        loss = discriminator_loss(self.executor.networks[name], real, fake, config)
        terms = {f"loss_{name}": loss}
        if config.lambda_gp and "D" in self.optimizers:  # not frozen
            terms[f"gp_{domain}"] = gradient_penalty(self.networks[name], real, fake, config.gp_target)
            loss = loss + config.lambda_gp * terms[f"gp_{domain}"]
        return loss, terms, None

    def average_over_ranks(self) -> None:
        """Average gradients, and the running statistics of batch norms, over the ranks of torchrun."""
        weights = [p for optim in self.optimizers.values() for group in optim.param_groups for p in group["params"]]
        statistics = [x for net in self.networks.values() for x in net.buffers() if x.is_floating_point()]
        average([*(p.grad for p in weights if p.grad is not None), *statistics])

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the EMA weights towards the weights; faster during the first steps, as TensorFlow's moving averages do."""
        weight = 1 - min(self.optim_config.ema, (1 + self.finished_steps) / (10 + self.finished_steps))
        for name, ema in self.ema.items():
            net = self.networks[name]
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), weight)
            for target, value in zip(ema.buffers(), net.buffers(), strict=True):
                target.copy_(value)

    def set_memory_format(self, name: str) -> None:
        """Lay out all weights and their moments in a format of MEMORY_FORMATS; the results are the same but for rounding."""
        for net in (*self.networks.values(), *self.ema.values()):
            net.to(memory_format=MEMORY_FORMATS[name])
        for optimizer in self.optimizers.values():
            match_moments(optimizer)
        self.memory_format = name

    def set_learning_rate(self, factor: float) -> None:
        """Set the learning rates to `factor` times those of the config."""
        rates = {"G": self.optim_config.lr, "D": self.optim_config.lr_D or self.optim_config.lr}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * factor

    def state_dict(self) -> dict:
        """Return everything that learns or is random, as plain values and tensors."""
        return {
            "nets": {name: net.state_dict() for name, net in self.networks.items()},
            "adapters": self.adapters.state_dict(),
            "ema": {name: net.state_dict() for name, net in self.ema.items()} or None,
            "optims": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.executor.scaler.state_dict() or None,
            "step": self.finished_steps,
            "memory_format": self.memory_format,
            "buffers": {domain: buffer.state_dict() for domain, buffer in self.buffers.items()},  # of this rank
            "rng": rng_state(),  # of this rank
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict returned. EMA weights that it lacks start as copies of the weights.

        Learning rates and betas are those of the config; the memory format is the state's, since it changes the rounding.
        Without buffers (of a new rank) the present ones are kept.
        raises: an exception of any kind if the state belongs to other networks
        """
        self.set_memory_format(state.get("memory_format", "contiguous"))
        for name, net in self.networks.items():
            net.load_state_dict(state["nets"][name])
        for name, net in self.ema.items():
            net.load_state_dict((state["ema"] or state["nets"])[name])
        self.adapters.load_state_dict(state.get("adapters") or {})
        for name, optimizer in self.optimizers.items():
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state["optims"][name]["state"], "param_groups": groups})
            match_moments(optimizer)
        if state["scaler"] and self.executor.scaler.is_enabled():
            self.executor.scaler.load_state_dict(state["scaler"])
        for domain, buffer in self.buffers.items():
            if state["buffers"]:
                buffer.load_state_dict(state["buffers"][domain], self.device)
        self.finished_steps = int(state["step"])
        set_rng_state(state["rng"])
