"""The options of a training run, as dataclasses from which the command line is generated."""

from dataclasses import dataclass, field
from pathlib import Path

from cyclegan import LossConfig, OptimConfig
from datasets import DataConfig
from models import GENERATOR_PARTS, INITS, DiscriminatorConfig, GeneratorConfig
from toolkit.converters import ASSUME
from toolkit.devices import DeviceConfig
from toolkit.executor import ExecutorConfig
from toolkit.images import PREPROCESS, WHOLE
from toolkit.metrics import BEST_BY, MEASURES
from utils import InputError, epoch_name, folder_name, need_package, option, some_of

FREEZABLE = (*GENERATOR_PARTS, "D")  # parts of the generators, and the discriminators
OPTIONS_OF = {  # those that other generators do not have
    "resnet": {"num_residual", "ngf", "n_downsampling", "skips"},
    "unet_vit": {"vit_size", "vit_blocks", "vit_heads"},
}
# the same on resume: of both networks, of the discriminators, of the generators
FIXED_OPTIONS = {"channels", "norm", "init", "freeze", "discriminator", "ndf", "n_layers_D", "max_mult_D", "pool_D"}
FIXED_OPTIONS |= {"generator", "upsample", *OPTIONS_OF["resnet"], *OPTIONS_OF["unet_vit"]}


@dataclass(frozen=True)
class InitConfig:
    """What the networks start from."""

    init: str = option("normal", "initialisation of the weights", choices=INITS)
    init_from: list[Path] = option([], "generators to start from, one for each direction", nargs="+", metavar="FILE")
    freeze: list[str] = option(
        [], "parts that do not learn (default: none)", parse=some_of(FREEZABLE), metavar=",".join(FREEZABLE)
    )


@dataclass(frozen=True)
class RunConfig:
    """Name, intervals and seed of a training run."""

    start_from: str = option("0", "0: a new run; N or latest: resume from epoch_N.pt or latest.pt", parse=epoch_name)
    run_name: str = option(None, "name of the run and its folders (default: --dataset_name)", parse=folder_name)
    overwrite: bool = option(False, "delete an earlier run of this name")
    dry_run: bool = option(False, "print the configuration, parameters, images and minutes, and start nothing")
    sample_interval: int = option(200, "steps between sample grids; also after a minute and each epoch", least=1)
    checkpoint_interval: int = option(10, "epochs between checkpoints that are kept", least=1)
    keep_checkpoints: int = option(0, "keep only the newest N epoch_NNNN.pt; 0: all", least=0)
    eval_interval: int = option(0, "epochs between evaluations on the val, else test images; 0: none", least=0)
    eval_metrics: list[str] = option(
        ["cycle", "identity"],
        "what to measure (default: cycle,identity)",
        parse=some_of(MEASURES),
        metavar=",".join(MEASURES),
    )
    best_by: str | None = option(None, "keep the best epoch by this measure as best.pt", choices=tuple(BEST_BY))
    save_minutes: float = option(10.0, "minutes between saves; 0: after each epoch only", least=0)
    watch: list[Path] = option([], "photos to translate after each epoch", nargs="*", metavar="PHOTO")
    assume: tuple[str, ...] = ASSUME  # of --init_from, or of a teacher
    log: str = option("none", "also log to saved_models/RUN/tensorboard", choices=("none", "tensorboard"))
    seed: int = option(0, "seed of all random choices", least=0, most=2**32 - 1)
    deterministic: bool = option(
        False, "use only algorithms that repeat bit for bit; on a CPU, do not measure --memory_format"
    )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that the command line says about a training run."""

    data: DataConfig
    loss: LossConfig
    optim: OptimConfig
    run: RunConfig
    device: DeviceConfig
    executor: ExecutorConfig
    flags: dict  # all options as plain values, as they are saved
    given: frozenset[str]  # names of the options on the command line
    # a distillation takes its networks from the teacher
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    init: InitConfig = field(default_factory=InitConfig)

    def check(self, **more_weights: float) -> None:
        """Raise InputError for options that need another one; more_weights: of further loss terms, by option."""
        run = self.run
        weights = {name: getattr(self.loss, name) for name in ("lambda_gan", "lambda_cycle", "lambda_identity")}
        weights |= more_weights
        needed = BEST_BY.get(run.best_by or "")
        evaluated = run.eval_interval and needed in run.eval_metrics
        if "gp_target" in self.given and not self.loss.lambda_gp:
            raise InputError(
                f"--gp_target {self.loss.gp_target:g}: has no effect without --lambda_gp; give both or none"
            )
        learns_D = self.loss.lambda_gan and "D" not in self.init.freeze
        if "lambda_gp" in self.given and self.loss.lambda_gp and not learns_D:
            raise InputError(
                f"--lambda_gp {self.loss.lambda_gp:g}: has no effect while the discriminators do not learn; leave it out"
            )
        if not any(weights.values()):
            raise InputError(f"--{', --'.join(weights)} are all 0: nothing is left to learn; raise one of them")
        if needed and not evaluated and (run.eval_interval or "best_by" in self.given):
            raise InputError(f"--best_by {run.best_by}: needs --eval_interval, and {needed} among --eval_metrics")
        self._check_images()
        if run.best_by == "SSIM" and min(self.data.size) < 11:
            raise InputError("--best_by SSIM: its window needs images of 11 px a side; take --best_by PSNR")
        if run.log == "tensorboard":
            need_package("tensorboard", "--log tensorboard", "pip install tensorboard")
        optim = self.optim
        if optim.first_decay_epoch > optim.num_epochs:
            raise InputError(f"--decay_epoch {optim.decay_epoch}: expected at most --num_epochs {optim.num_epochs}")

    def _check_images(self) -> None:
        """Raise InputError for options that need images of one size or shape."""
        if self.data.cache != "none" and self.data.preprocess != PREPROCESS[0]:
            raise InputError(
                f"--cache {self.data.cache}: keeps images of one size, and --preprocess {self.data.preprocess} has several; "
                "give --cache none"
            )
        if self.data.rotate90 and self.data.img_height != self.data.img_width:
            raise InputError("--rotate90: needs square images; give --img_height and --img_width one value")
        if self.data.preprocess not in WHOLE:
            return
        given = f"--preprocess {self.data.preprocess}: images have several sizes"
        if self.data.batch_size != 1:
            raise InputError(f"{given}, which make no batch; given --batch_size {self.data.batch_size}, give 1")
        if self.loss.lambda_gp:
            raise InputError(f"{given}, between which --lambda_gp does not interpolate; leave it out")
        if self.executor.compile:
            raise InputError(f"{given}, for each of which --compile would compile anew; leave it out")


SHARED_CONFIGS = {"data": DataConfig, "loss": LossConfig, "optim": OptimConfig}  # a student inherits these
NETWORK_CONFIGS = {"generator": GeneratorConfig, "discriminator": DiscriminatorConfig, "init": InitConfig}
RUN_CONFIGS = {"run": RunConfig, "device": DeviceConfig, "executor": ExecutorConfig}
