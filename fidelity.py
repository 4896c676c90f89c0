"""FID and KID: how far two sets of images are from each other, through torch-fidelity, an optional extra.

row = fid_kid(fakes, reals, load, ["fid", "kid"], weights=None, device=torch.device("cpu"))
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils import InputError, counted, need_package, warn

FEW = 1000  # images; below, FID says more about their number than about the model


class ImageFiles(Dataset):
    """Files as torch-fidelity wants them: uint8 (3, H, W), all of one size."""

    def __init__(self, paths: Sequence[Path], load: Callable[[Path], Tensor]):
        self.paths = paths
        self.load = load

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return self.load(self.paths[i])


def need_torch_fidelity(wanted: Sequence[str]) -> None:
    """Raise InputError without the package; wanted: of --metrics."""
    need_package("torch_fidelity", f"--metrics {','.join(wanted)}", "pip install -r requirements-metrics.txt")


def fid_kid(
    fakes: Sequence[Path],
    reals: Sequence[Path],
    load: Callable[[Path], Tensor],
    wanted: Sequence[str],
    weights: Path | None,
    device: torch.device,
) -> dict[str, float]:
    """Distances between the Inception features of two sets of images, by torch-fidelity; 0 for equal sets.

    load:    path → uint8 (3, H, W), of one size
    wanted:  "fid", "kid" or both
    weights: Inception's, a file that the caller has read with files.read_archive, for torch-fidelity would
             execute what a hostile one holds; None: they are downloaded
    returns: FID and KID with the numbers of images; both are biased by few images, FID heavily
    raises:  InputError without torch-fidelity or weights, or with fewer than two images
    source:  Heusel et al. 2017, arXiv:1706.08500; Bińkowski et al. 2018, arXiv:1801.01401
    """
    flag = f"--metrics {','.join(wanted)}"
    need_torch_fidelity(wanted)
    from torch_fidelity import calculate_metrics

    least = min(len(fakes), len(reals))
    if least < 2:
        raise InputError(f"{flag}: {counted(least, 'image')} on one side, expected at least 2, better {FEW:,}")
    if least < FEW:
        warn(f"FID and KID of {len(fakes)} against {len(reals)} images are biased; compare equal numbers only")
    try:
        values = calculate_metrics(
            input1=ImageFiles(fakes, load),
            input2=ImageFiles(reals, load),
            **dict.fromkeys(wanted, True),
            cuda=device.type == "cuda",
            kid_subset_size=min(FEW, least),
            feature_extractor_weights_path=str(weights) if weights else None,
            save_cpu_ram=True,  # no worker processes
            verbose=False,
        )
    except (OSError, RuntimeError) as error:
        if weights:
            words = f"not the weights that torch-fidelity takes ({str(error)[:100]})"
            raise InputError(f"--inception_weights {weights}: {words}") from error
        if isinstance(error, RuntimeError):
            raise
        words = "give a file: --inception_weights FILE"
        raise InputError(f"{flag}: Inception's weights cannot be fetched ({error}); {words}") from error
    names = {"frechet_inception_distance": "FID", "kernel_inception_distance_mean": "KID"}
    row = {short: values[name] for name, short in names.items() if name in values}
    return row | {"translated": len(fakes), "real": len(reals)}
