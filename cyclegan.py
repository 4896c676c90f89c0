"""The paper (Zhu et al. 2017, CycleGAN, arXiv:1703.10593): its losses, and the model that takes steps on them.

loss, terms, images = generator_loss(nets, "A", real_A, LossConfig())
model = CycleGAN(nets, LossConfig(), OptimConfig(), precision="fp32")
values = model.step(real_A, real_B)
"""

import copy
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import GAN_LOSSES, LEGACY_DIRECTIONS, Nets
from toolkit.devices import autocast, rng_state, set_rng_state
from toolkit.distributed import average, rank
from toolkit.executor import in_threads
from utils import FakeImageBuffer, InputError, warn

OTHER = {"A": "B", "B": "A"}  # the domain that images of one are translated to
TERMS = ("loss_G", "loss_D_A", "loss_D_B", "gan_AB", "gan_BA", "cycle_A", "cycle_B", "identity_A", "identity_B")


@dataclass(frozen=True)
class LossConfig:
    """Weights (0 leaves a term out) and form of the objective, as in the paper but for the gradient penalty."""

    gan_loss: str = "lsgan"
    lambda_gan: float = 1.0
    lambda_cycle: float = 10.0
    lambda_identity: float = 5.0
    lambda_gp: float = 0.0  # of the discriminators' gradient penalty; 0: none
    gp_target: float = 100.0  # wanted norm of a discriminator's gradient


@dataclass(frozen=True)
class OptimConfig:
    """Adam (Zhu et al. 2017, section 4), the image buffers, the averages, and how a batch is processed."""

    lr: float = 2e-4
    lr_D: float | None = None  # of the discriminators; None: lr
    beta1: float = 0.5
    beta2: float = 0.999
    ema: float = 0.0  # decay of the averaged generator weights; 0: none
    buffer_size: int = 50
    micro_batch: int | str = "auto"  # images processed at once; auto: the batch, halved when memory runs out


def loss_names(config: LossConfig) -> tuple[str, ...]:
    """The columns of losses.csv; a step leaves out those that the config or --freeze D switches off."""
    return (*TERMS, "gp_A", "gp_B") if config.lambda_gp else TERMS


def linear_decay(epoch: int, num_epochs: int, decay_epoch: int) -> float:
    """Factor of the learning rate in an epoch, counted from 0.

    1 up to and including decay_epoch, then falling in equal steps that would reach 0 at num_epochs.
    source: Zhu et al. 2017, section 4, "Training details"
    """
    return 1 - max(0, epoch - decay_epoch) / max(1, num_epochs - decay_epoch)


# ---------------------------------------------------------------------------------------------
# Losses of images and predictions: always in float32 (or float64), also where the networks computed in half precision


def to_float(x: Tensor) -> Tensor:
    """Half precision → float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def gan_loss_G(prediction: Tensor, kind: str = "lsgan") -> Tensor:
    """Loss of a generator, from a discriminator's `prediction` for its images: low when they are called real.

    prediction: any shape, unbounded
    returns:    scalar; lsgan and bce are 0 when every prediction says real, hinge has no lower bound
    source:     Mao et al. 2017 (lsgan, the paper's choice), Goodfellow et al. 2014 (bce, not saturating),
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
    """Loss of a discriminator, halved as in Zhu et al. 2017 to slow it down against the generator.

    on_real, on_fake: its predictions for real and for translated images, unbounded
    returns:          scalar; 0.25 for an lsgan discriminator that cannot decide
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
    """Mean absolute error between two batches of images (cycle, identity and output losses).

    image, target: (N, C, H, W) in [-1, 1], same shape
    returns:       scalar in [0, 2]
    raises:        ValueError if the shapes differ (l1_loss would only warn and broadcast)
    source:        Zhu et al. 2017, eq. 2 and section 5.2
    """
    if image.shape != target.shape:
        raise ValueError(f"shapes differ: {tuple(image.shape)} and {tuple(target.shape)}")
    return F.l1_loss(to_float(image), to_float(target))


def gradient_penalty(D: nn.Module, real: Tensor, fake: Tensor, target: float) -> Tensor:
    """How far the norm of a discriminator's gradient is from `target`, at images between real and translated ones.

    real, fake: (N, C, H, W) in [-1, 1]; each pair is mixed at random, so torch's random state moves
    target:     wanted norm; where it is not 0, the distance is divided by it
    returns:    scalar, with a graph that reaches the discriminator's weights (double backward)
    source:     Gulrajani et al. 2017; relative to the target as in UVCGAN (0.1 and 100), centred at zero
                as in UVCGAN2 (0.01 and 0)
    """
    weight = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
    mixed = (weight * real + (1 - weight) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
    norms = (gradient.flatten(1).square().sum(1) + 1e-12).sqrt()  # (N,); the root of 0 has no gradient
    return ((norms - target) / (target or 1.0)).square().mean()


# ---------------------------------------------------------------------------------------------
# The objective


def run_as_one(net: Any, *batches: Tensor) -> Sequence[Tensor]:
    """Run equally large batches through a network in one call, 6-13 % faster on a CPU than in several.

    A batch norm would mix their statistics, so it gets them one by one.
    """
    if net.config.norm == "batch":
        return [net(batch) for batch in batches]
    return net(torch.cat(batches)).chunk(len(batches))


def generator_loss(
    nets: Nets, domain: str, real: Tensor, config: LossConfig, with_hidden: bool = False
) -> tuple[Tensor, dict[str, Tensor], dict]:
    """What the images of one domain ask of both generators; the whole objective is the sum over both domains.

    The two sums share weights, but no image, so a step can forget the graph of the first before it makes the second.
    nets:        G_AB, G_BA, D_A, D_B
    domain:      "A" or "B", where `real` comes from
    real:        (N, C, H, W) in [-1, 1]
    with_hidden: a compiled network would compute gradients, all 0, of hidden states that nobody looks at
    returns:     the loss; its unweighted terms; what distillation looks at: "fake", the translated images, and
                 "hidden", the list of what the blocks made of them on their way
    source:      Zhu et al. 2017, eq. 3; identity loss section 5.2
    """
    other = OTHER[domain]
    G = nets[f"G_{domain}{other}"]
    G_back = nets[f"G_{other}{domain}"]
    fake, hidden = G(real, return_hidden=True) if with_hidden else (G(real), [])
    weights = {"gan": config.lambda_gan, "cycle": config.lambda_cycle, "identity": config.lambda_identity}
    terms = {}
    if weights["gan"]:
        terms[f"gan_{domain}{other}"] = gan_loss_G(nets[f"D_{other}"](fake), config.gan_loss)
    inputs = {name: x for name, x in {"cycle": fake, "identity": real}.items() if weights[name]}
    outputs = run_as_one(G_back, *inputs.values()) if inputs else []
    for name, output in zip(inputs, outputs, strict=True):
        terms[f"{name}_{domain}"] = image_loss(output, real)
    loss = sum((weights[name.split("_")[0]] * term for name, term in terms.items()), to_float(fake.new_zeros(())))
    return loss, terms, {"fake": fake, "hidden": hidden}


def discriminator_loss(D: Any, real: Tensor, fake: Tensor, config: LossConfig) -> Tensor:
    """The objective of one discriminator; in training `fake` comes out of the image buffer."""
    on_real, on_fake = run_as_one(D, real, fake)
    return gan_loss_D(on_real, on_fake, config.gan_loss)


# ---------------------------------------------------------------------------------------------
# Looking at networks: running them without training them


@contextmanager
def eval_mode(*nets: nn.Module) -> Iterator[None]:
    """No gradients, all layers in eval mode, so that running statistics stay; afterwards each has its own mode again."""
    modes = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def translate(net: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Run images (N, C, H, W) through a generator, on its device; float32 out."""
    device = next(net.parameters()).device
    with eval_mode(net), autocast(device, precision):
        return net(images.to(device)).float()


# ---------------------------------------------------------------------------------------------
# What learns


def make_optims(nets: Nets, config: OptimConfig) -> dict[str, torch.optim.Optimizer]:
    """One Adam for all networks whose names begin with G, one for the discriminators; frozen weights stay out."""
    optims = {}
    for letter in "GD":
        own = [net for name, net in nets.items() if name.startswith(letter)]
        weights = [p for net in own for p in net.parameters() if p.requires_grad]
        if weights:
            fused = weights[0].device.type in ("cpu", "cuda")
            optims[letter] = torch.optim.Adam(weights, config.lr, (config.beta1, config.beta2), fused=fused)
    return optims


class CycleGAN:
    """Two generators, two discriminators, and all that learns or is random about them.

    nets:           G_AB, G_BA, D_A, D_B, on one device
    adapters:       modules that a distillation trains along with the generators and does not keep
    seed:           of the image buffers
    generator_loss: the generators' objective; distillation brings its own
    """

    def __init__(
        self,
        nets: Nets,
        loss_config: LossConfig,
        optim_config: OptimConfig,
        precision: str = "fp32",
        seed: object = 0,
        adapters: nn.ModuleDict | None = None,
        generator_loss: Callable = generator_loss,
    ):
        if nets["G_AB"].config.norm == "batch" and optim_config.micro_batch != "auto":
            words = "a batch norm would see the micro-batch, not the batch"
            raise InputError(f"--micro_batch {optim_config.micro_batch}: {words}; leave it out, or lower --batch_size")
        self.nets = nets
        self.adapters = nn.ModuleDict() if adapters is None else adapters
        self.averages = {}
        if optim_config.ema:
            self.averages = {name: copy.deepcopy(nets[name]).requires_grad_(False) for name in LEGACY_DIRECTIONS}
        self.compiled: Nets = {}  # with --compile: the compiled form of a network, by its name
        self.optims = make_optims(nets | {"G_adapters": self.adapters}, optim_config)  # the G puts them with the Gs
        size = optim_config.buffer_size
        self.buffers = {x: FakeImageBuffer(size, f"{seed}-buffer-{x}{rank() or ''}") for x in "AB"}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.precision = precision
        self.loss_config = loss_config
        self.optim_config = optim_config
        self.generator_loss = generator_loss
        fixed = optim_config.micro_batch
        self.micro_batch_size = 0 if isinstance(fixed, str) else fixed  # 0: the whole batch

    @property
    def device(self) -> torch.device:
        return next(self.nets["G_AB"].parameters()).device

    @property
    def calls(self) -> Nets:
        """What a step runs: the networks, compiled where that was asked for."""
        return {**self.nets, **self.compiled}

    @property
    def averaged_nets(self) -> Nets:
        """The networks to look at, test and ship: generators as their averages where these are kept."""
        return {**self.nets, **self.averages}

    def translate(self, name: str, images: Tensor) -> Tensor:
        """Run images (N, C, H, W) through a generator as testing will."""
        return translate(self.averaged_nets[name], images, self.precision)

    def step(self, real_A: Tensor, real_B: Tensor, finished_steps: int = 0) -> dict[str, Tensor]:
        """One step: the gradients of all networks, their means over the ranks, then one Adam step each for G and D.

        real_A, real_B: (N, C, H, W) in [-1, 1], on the networks' device
        finished_steps: taken before this one, for the warm-up of the averages
        returns:        losses and terms by name, on the device
        """
        losses = self._gradients_within_memory(real_A, real_B)
        learning = [p for optim in self.optims.values() for group in optim.param_groups for p in group["params"]]
        statistics = [x for net in self.nets.values() for x in net.buffers() if x.is_floating_point()]  # of batch norms
        average([*(p.grad for p in learning if p.grad is not None), *statistics])
        for optim in self.optims.values():
            self.scaler.step(optim)
        self.scaler.update()
        self._update_averages(finished_steps)
        return losses

    def _gradients_within_memory(self, real_A: Tensor, real_B: Tensor) -> dict[str, Tensor]:
        """Compute the gradients of a batch; out of memory, start over with micro-batches half as large.

        Starting over puts back image buffers and random state; weights and optimisers were not touched yet.
        """
        marks = {domain: buffer.mark() for domain, buffer in self.buffers.items()}
        random_state = rng_state()
        may_not_shrink = self.optim_config.micro_batch != "auto" or self.nets["G_AB"].config.norm == "batch"
        while True:
            try:
                if self.compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                return self._gradients(real_A, real_B)
            except torch.OutOfMemoryError:
                size = self.micro_batch_size or len(real_A)
                if size == 1 or may_not_shrink:
                    raise
            self.micro_batch_size = math.ceil(size / 2)  # not inside `except`, where the traceback holds the tensors
            if self.compiled:
                torch.compiler.reset()  # CUDA graphs keep the memory that they were recorded with
            torch.cuda.empty_cache()
            words = f"the batch of {len(real_A)} is processed in micro-batches of {self.micro_batch_size} from now on"
            warn(f"out of memory: {words}")
            for domain, buffer in self.buffers.items():
                buffer.back_to(marks[domain])
            set_rng_state(random_state)

    def _gradients(self, real_A: Tensor, real_B: Tensor) -> dict[str, Tensor]:
        """Compute the gradients of a batch: of loss_G for the generators, of loss_D_A and loss_D_B for their own."""
        for optim in self.optims.values():
            optim.zero_grad(set_to_none=True)
        reals = {"A": real_A, "B": real_B}
        fakes: dict[str, list[Tensor]] = {"A": [], "B": []}

        def loss_G(domain: str, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with autocast(self.device, self.precision):
                loss, terms, images = self.generator_loss(self.calls, domain, real, self.loss_config)
            fakes[OTHER[domain]].append(images["fake"].detach().clone())  # a CUDA graph overwrites its output
            return loss, {"loss_G": loss, **terms}

        def gradients_G(domain: str) -> dict[str, Tensor]:
            return self._accumulate(functools.partial(loss_G, domain), reals[domain])

        def gradients_D(domain: str) -> dict[str, Tensor]:
            fake = self.buffers[domain].exchange(torch.cat(fakes[domain]).to(reals[domain].dtype))
            return self._accumulate(functools.partial(self._loss_D, domain), reals[domain], fake)

        discriminators = nn.ModuleList([self.nets["D_A"], self.nets["D_B"]])
        discriminators.requires_grad_(False)  # the generators' loss needs no gradient of their weights
        of_A, of_B = self._of_both(gradients_G)
        losses = of_A | of_B | {"loss_G": of_A["loss_G"] + of_B["loss_G"]}
        discriminators.requires_grad_("D" in self.optims)  # not with --freeze D
        of_A, of_B = self._of_both(gradients_D) if self.loss_config.lambda_gan else ({}, {})  # nobody asks: they rest
        return losses | of_A | of_B

    def _of_both(self, compute: Callable) -> list:
        """What `compute` gives for "A" and for "B"; on a CPU at once, where sums and random numbers keep their order.

        Two gradients of a weight may be added in either order; of three or more the rounding would tell the order.
        """
        calls = [functools.partial(compute, domain) for domain in "AB"]
        if self.device.type != "cpu":
            return [call() for call in calls]
        ordered = self.micro_batch_size or self.loss_config.lambda_gp or self.nets["G_AB"].config.norm == "batch"
        return in_threads(calls, at_once=not ordered and not self.compiled)

    def _loss_D(self, domain: str, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What a discriminator minimises, and its loss and gradient penalty by name."""
        config = self.loss_config
        D = f"D_{domain}"
        with autocast(self.device, self.precision):
            loss = discriminator_loss(self.calls[D], real, fake, config)
        values = {f"loss_{D}": loss}
        if config.lambda_gp and "D" in self.optims:  # in float32: second derivatives lose too much in bfloat16
            penalty = gradient_penalty(self.nets[D], real, fake, config.gp_target)
            loss = loss + config.lambda_gp * penalty
            values[f"gp_{domain}"] = penalty
        return loss, values

    def _accumulate(self, loss_of: Callable, *batches: Tensor) -> dict[str, Tensor]:
        """Add up the gradients of a loss over a batch, micro-batch by micro-batch; returns its values, weighted by size.

        loss_of: (micro-batch of each of `batches`) → what to minimise, and values by name
        """
        size = self.micro_batch_size or len(batches[0])
        means: dict[str, Any] = defaultdict(float)
        for micro_batches in zip(*(batch.split(size) for batch in batches), strict=True):
            loss, values = loss_of(*micro_batches)
            weight = len(micro_batches[0]) / len(batches[0])
            if loss.requires_grad:
                self.scaler.scale(weight * loss).backward()
            for name, value in values.items():
                means[name] = means[name] + weight * value.detach()
            del loss, values  # the next micro-batch shall not have to fit beside them
        return dict(means)

    @torch.no_grad()
    def _update_averages(self, finished_steps: int) -> None:
        """Move the averages towards the weights; faster at first, so that the start is soon forgotten."""
        weight = 1 - min(self.optim_config.ema, (1 + finished_steps) / (10 + finished_steps))
        for name, averaged in self.averages.items():
            net = self.nets[name]
            torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), weight)
            for mean, value in zip(averaged.buffers(), net.buffers(), strict=True):
                mean.copy_(value)

    def set_learning_rate(self, factor: float) -> None:
        """Set rates (config times `factor`) and betas anew, since a resumed run may have other flags."""
        config = self.optim_config
        rates = {"G": config.lr, "D": config.lr_D or config.lr}
        for name, optim in self.optims.items():
            for group in optim.param_groups:
                group["lr"] = rates[name] * factor
                group["betas"] = (config.beta1, config.beta2)

    def state_dict(self) -> dict:
        """What is equal on all ranks; image buffers and random states, one set a rank, are saved by checkpoints.py."""
        return {
            "nets": {name: net.state_dict() for name, net in self.nets.items()},
            "adapters": self.adapters.state_dict(),
            "ema": {name: net.state_dict() for name, net in self.averages.items()} or None,
            "optims": {name: optim.state_dict() for name, optim in self.optims.items()},
            "scaler": self.scaler.state_dict() or None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Put back what state_dict gave; averages that it does not hold start as copies of the weights."""
        for name, net in self.nets.items():
            net.load_state_dict(state["nets"][name])
        for name, net in self.averages.items():
            net.load_state_dict((state["ema"] or state["nets"])[name])
        self.adapters.load_state_dict(state.get("adapters") or {})
        for name, optim in self.optims.items():  # moments from the state, rates and betas from the config
            groups = optim.state_dict()["param_groups"]
            optim.load_state_dict({"state": state["optims"][name]["state"], "param_groups": groups})
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
