"""ResNet generators of Keras: those of LynnHo's CycleGAN for TensorFlow 2 and of the example of Keras, without TensorFlow.

At even sizes TensorFlow pads before a strided convolution at the end of each row and column, torch at the start. That is
the same for images turned by 180°, so all kernels are turned, and the config says `rotated`: the network turns its images.
A norm of another epsilon is one of ours behind a kernel that is multiplied by sqrt(1e-5 / epsilon).
source: LynnHo/CycleGAN-Tensorflow-2, module.py; keras-team/keras-io, examples/generative/cyclegan.py
"""

import io
import json
import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models import GeneratorConfig, meta_network
from toolkit.files import check_tensors
from utils import InputError, need_package, one_line, say

HDF5 = b"\x89HDF\r\n\x1a\n"  # how its files begin
KERAS_WEIGHTS = "model.weights.h5"  # in a .keras file
EPSILON = 1e-3  # of the norms of Keras and of TensorFlow Addons, unless their config says otherwise
Arrays = list[np.ndarray]  # of a network, in the order of its layers


class Layer(NamedTuple):
    """A convolution, perhaps with an instance norm behind it."""

    kernel: np.ndarray  # (height, width, in, out), of a transposed convolution (height, width, out, in)
    bias: np.ndarray | None
    norm: Arrays  # scale and shift, or nothing


def is_keras(path: Path) -> bool:
    """Whether a file is one of Keras, or of numpy arrays, by its content."""
    with path.open("rb") as file:
        if file.read(len(HDF5)) == HDF5:
            return True
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
    return KERAS_WEIGHTS in names or (bool(names) and all(name.endswith(".npy") for name in names))


def read_keras(path: Path) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """Read a generator from an .h5, .keras or .npz file; returns its config and the state dict with our names.

    raises: InputError for a file that cannot be read or holds something else, and where h5py is missing
    """
    with path.open("rb") as file:
        is_hdf5 = file.read(len(HDF5)) == HDF5
    if is_hdf5 or zipfile.Path(path, KERAS_WEIGHTS).exists():
        need_package("h5py", str(path), "pip install -r requirements-keras.txt")
    try:
        networks, architecture = _read_hdf5(path, path.stat().st_size) if is_hdf5 else _read_zip(path)
        parts = list(_configs_in(json.loads(architecture))) if architecture else None
        norms = None if parts is None else list(_norms_in(parts))
    except Exception as error:  # h5py, numpy and json raise a dozen types on hostile files
        reason = one_line(str(error).strip().split("\n")[0][:120]) or type(error).__name__
        raise InputError(f"{path}: not a readable file of Keras weights ({reason})") from error
    generators = [
        arrays for arrays in networks.values() if arrays and arrays[0].ndim == 4 and arrays[0].shape[:2] == (7, 7)
    ]
    if len(generators) != 1:
        inside = ", ".join(one_line(name) or "one network" for name in networks)[:120] or "no layers with weights"
        raise InputError(
            f"{path}: holds {inside}; expected one ResNet generator, saved alone: generator.save_weights(FILE)"
        )
    _check_parts(path, parts or [])
    layers = _layers_of(path, generators[0])
    config = _infer_config(path, [layer.kernel.shape for layer in layers])
    return config, _convert(path, config, layers, _epsilons(path, layers, norms))


def _read_zip(path: Path) -> tuple[dict[str, Arrays], str]:
    """Read a .keras or .npz file: as _read_hdf5."""
    with zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > 8 * path.stat().st_size:  # floats hardly shrink
            raise ValueError("it would unpack to more than weights do")
        if KERAS_WEIGHTS in archive.namelist():
            weights = archive.read(KERAS_WEIGHTS)
            networks, _ = _read_hdf5(io.BytesIO(weights), len(weights))
            return networks, archive.read("config.json").decode()
    with np.load(path, allow_pickle=False) as arrays:
        if any(name.endswith(".weight") for name in arrays.files):
            raise ValueError("its arrays have names of PyTorch; save them with torch.save or safetensors instead")
        return {"": [_to_float32(x) for x in map(arrays.get, arrays.files) if x.dtype.kind == "f"]}, ""


def _read_hdf5(source: Path | io.BytesIO, size: int) -> tuple[dict[str, Arrays], str]:
    """Read an HDF5 file of `size` bytes; returns the arrays of its networks by name, and the architecture as JSON or ""."""
    import h5py

    found: dict[str, Any] = {}
    with h5py.File(source, "r") as file:
        file.visititems(lambda name, x: found.update({name: x}))  # follows no link to another file
        tensors = {name: x for name, x in found.items() if isinstance(x, h5py.Dataset) and x.dtype.kind == "f"}
        tensors = {name: x for name, x in tensors.items() if not (x.external or x.is_virtual)}
        if sum(x.nbytes for x in tensors.values()) > size:  # Keras does not compress
            raise ValueError("it would unpack to more than its own size")
        arrays = {name: _to_float32(x[()]) for name, x in tensors.items()}
        prefix = "model_weights/" if "model_weights" in found else ""
        root = found.get("model_weights", file)
        if "layer_names" not in root.attrs:
            return _networks_of_keras_3(arrays), ""
        layers = {}
        for layer in map(_text, root.attrs["layer_names"]):
            names = (f"{prefix}{layer}/{_text(name)}" for name in found[prefix + layer].attrs["weight_names"])
            layers[layer] = [arrays[name] for name in names if name in arrays]
        architecture = _text(file.attrs.get("model_config", ""))
    models = {name: found for name, found in layers.items() if sum(x.ndim == 4 for x in found) > 1}
    return models or {"": [x for found in layers.values() for x in found]}, architecture


def _to_float32(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinite numbers are refused later
        return np.asarray(x, dtype=np.float32)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _networks_of_keras_3(arrays: dict[str, np.ndarray]) -> dict[str, Arrays]:
    """Return the arrays of each network, named NETWORK/layers/KIND_NUMBER/vars/NUMBER, in the order of a ResNet's layers."""
    networks: dict[str, dict[tuple[str, int], dict[int, np.ndarray]]] = {}
    for name, x in arrays.items():
        match = re.fullmatch(r"(?:(.+)/)?layers/(\w+?)(?:_([0-9]{1,4}))?/vars/([0-9])", name)
        if match:
            network = networks.setdefault(match[1] or "", {})
            network.setdefault((match[2], int(match[3] or 0)), {})[int(match[4])] = x
    return {name: _in_order(network) for name, network in networks.items()}


def _in_order(network: dict[tuple[str, int], dict[int, np.ndarray]]) -> Arrays:
    """Sort layers that are numbered by kind: transposed convolutions come before the last other one, norms after each."""
    layers = {key: [layer[i] for i in sorted(layer)] for key, layer in sorted(network.items())}
    convs = [x for (kind, _), x in layers.items() if x[0].ndim == 4 and "transpose" not in kind]
    transposed = [x for (kind, _), x in layers.items() if x[0].ndim == 4 and "transpose" in kind]
    norms = [x for x in layers.values() if x[0].ndim != 4]
    arrays = []
    for conv in convs[:-1] + transposed + convs[-1:]:
        arrays += conv + (norms.pop(0) if norms else [])
    return arrays + [x for norm in norms for x in norm]


def _configs_in(value: Any) -> Iterator[tuple[str, dict]]:
    """Yield class and config of all layers, and of whatever else has them, in an architecture, in order."""
    if isinstance(value, dict):
        if isinstance(value.get("config"), dict):
            yield str(value.get("class_name")), value["config"]
        for inner in value.values():
            yield from _configs_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _configs_in(inner)


def _norms_in(parts: Iterable[tuple[str, dict]]) -> Iterator[tuple[str, float, Any]]:
    """Yield class, epsilon and number of groups (None if it has no such option) of all norms."""
    for kind, config in parts:
        if "epsilon" in config and "Norm" in kind:  # an optimizer has an epsilon, too
            yield kind, float(config["epsilon"]), config.get("groups")


def _check_parts(path: Path, parts: Iterable[tuple[str, dict]]) -> None:
    """Raise InputError for activations and padding that a ResNet generator of ours does not have; weights do not show them."""
    for kind, config in parts:
        activation = config.get("activation", "linear")
        is_leaky = kind in ("LeakyReLU", "PReLU", "ELU") or (kind == "ReLU" and config.get("negative_slope"))
        found = f"{kind} with a slope" if is_leaky else one_line(activation)[:40]
        if found not in ("linear", "relu", "tanh", "None"):
            raise InputError(f"{path}: has the activation {found}; expected ReLU, and tanh at the end")
        sides = (config.get("kernel_size"), config.get("strides"))
        if (
            kind == "Conv2D"
            and config.get("padding") == "same"
            and sides[1] in ([1, 1], 1)
            and sides[0] not in ([1, 1], 1)
        ):
            raise InputError(f"{path}: pads with zeros before a convolution of stride 1; expected reflection")


def _layers_of(path: Path, arrays: Arrays) -> list[Layer]:
    """Group the arrays of a network by its convolutions; raise InputError if they are not those of a ResNet generator."""
    starts = [i for i, x in enumerate(arrays) if x.ndim == 4]
    groups = [arrays[start:end] for start, end in zip(starts, [*starts[1:], len(arrays)], strict=True)]
    *inner, last = [len(group) for group in groups]
    if any(x.ndim not in (1, 4) for x in arrays) or any(count not in (3, 4) for count in inner) or last > 2:
        shapes = ", ".join(str(x.shape) for x in arrays[:4])
        expected = "for each convolution a kernel, a bias or none, and, but for the last, scale and shift of a norm"
        raise InputError(f"{path}: {len(arrays)} arrays ({shapes} ...); expected {expected}")
    norms = [*(group[-2:] for group in groups[:-1]), []]
    layers = []
    for group, norm in zip(groups, norms, strict=True):
        layers.append(Layer(group[0], group[1] if len(group) - len(norm) == 2 else None, norm))
    return layers


def _epsilons(path: Path, layers: Sequence[Layer], norms: list[tuple[str, float, Any]] | None) -> list[float]:
    """Return the epsilon of each norm of a network; norms: those of the architecture, None if the file does not have it."""
    widths = [len(layer.norm[0]) for layer in layers if layer.norm]
    if norms is None:
        say(
            f"{path}: does not show its norms; read as instance norms with an epsilon of {EPSILON:g}, the default of Keras"
        )
        return [EPSILON] * len(widths)
    for kind, epsilon, _ in norms:
        if not ("Instance" in kind or kind == "GroupNormalization") or not 0 < epsilon < 1:
            raise InputError(f"{path}: has a {one_line(kind)[:40]} of epsilon {epsilon:g}; expected instance norms")
    if len(norms) != len(widths) or any(g not in (None, -1, w) for (_, _, g), w in zip(norms, widths, strict=True)):
        raise InputError(
            f"{path}: its norms are not instance norms behind each convolution but the last; expected such"
        )
    return [epsilon for _, epsilon, _ in norms]


def _infer_config(path: Path, shapes: Sequence[tuple[int, ...]]) -> GeneratorConfig:
    """Infer the config from the shapes of all kernels: those of down- and upsampling layers have one side twice the other."""
    inner = [shape[3] / max(1, shape[2]) for shape in shapes[1:-1]]
    resampling = inner.count(2)
    if resampling % 2 or len(inner) % 2 or resampling + inner.count(1) < len(inner):
        found = ", ".join(map(str, shapes[:4]))
        raise InputError(f"{path}: {len(shapes)} kernels ({found} ...); expected those of a ResNet generator")
    try:
        return GeneratorConfig(
            channels=1 if shapes[0][2] == 1 else 3,
            ngf=shapes[0][3],
            num_residual=(len(inner) - resampling) // 2,
            n_downsampling=resampling // 2,
            norm="instance_affine",
            rotated=True,
        )
    except ValueError as error:
        raise InputError(f"{path}: its shapes give {error}") from error


def _convert(
    path: Path, config: GeneratorConfig, layers: Sequence[Layer], epsilons: Sequence[float]
) -> dict[str, Tensor]:
    """Return the state dict of the network of a config with the weights of all its convolutions and norms, in order."""
    net = meta_network(config)
    convs = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    state = {}
    for name, layer, epsilon in zip(convs, layers, [*epsilons, None], strict=True):
        scale = math.sqrt(nn.InstanceNorm2d(1).eps / epsilon) if epsilon else 1
        kernel = torch.tensor(layer.kernel) * scale
        state[f"{name}.weight"] = kernel.permute(3, 2, 0, 1).flip(2, 3).contiguous()
        out = net.get_parameter(f"{name}.bias")  # in front of a norm it has no effect
        state[f"{name}.bias"] = torch.zeros(out.shape) if layer.bias is None else torch.tensor(layer.bias)
        container, _, index = name.rpartition(".")
        for leaf, vector in zip(("weight", "bias"), layer.norm, strict=False):
            state[f"{container}.{int(index) + 1}.{leaf}"] = torch.tensor(vector)
    check_tensors(net.state_dict(), state, path)
    return state
