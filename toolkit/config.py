"""The options of a training run, as dataclasses from which the command line is generated."""

from dataclasses import dataclass, field
from pathlib import Path

from cyclegan import LossConfig, OptimConfig
from datasets import DataConfig
from models import GENERATOR_PARTS, INITS, DiscriminatorConfig, GeneratorConfig
from toolkit.devices import DeviceConfig
from toolkit.executor import ExecutorConfig
from toolkit.metrics import BEST_BY, MEASURES
from utils import epoch_name, folder_name, option, some_of

FREEZABLE = (*GENERATOR_PARTS, "D")  # parts of the generators, and the discriminators


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
        ["cycle", "identity"], "(default: cycle,identity)", parse=some_of(MEASURES), metavar=",".join(MEASURES)
    )
    best_by: str | None = option(None, "keep the best epoch by this measure as best.pt", choices=tuple(BEST_BY))
    save_minutes: float = option(10.0, "minutes between saves; 0: after each epoch only", least=0)
    watch: list[Path] = option([], "photos to translate after each epoch", nargs="*", metavar="PHOTO")
    log: str = option("none", "also log to saved_models/RUN/tensorboard", choices=("none", "tensorboard"))
    seed: int = option(0, "seed of all random choices", least=0, most=2**32 - 1)
    deterministic: bool = option(False, "use only algorithms that repeat bit for bit (a CPU needs no flag)")

    @property
    def is_new(self) -> bool:
        return self.start_from == "0"


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
