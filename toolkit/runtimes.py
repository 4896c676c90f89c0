"""Write an exported generator in the format of a runtime, and run that file: onnxruntime, OpenCV, ncnn and others.

Each `to_…` function writes its files into a folder; it returns them, the main file first, and a function that runs them.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import InputError, RunError

Run = Callable[[Tensor], Tensor]  # images (N, C, H, W) in [-1, 1] → translations of the same shape


@dataclass(frozen=True)
class Source:
    """A generator in the forms from which it can be converted."""

    net: nn.Module
    onnx: Callable[[], bytes]  # its ONNX model; called only where it is needed, since that takes seconds
    program: Callable[[], Any]  # its torch.export program
    weights_as: str
    names: tuple[str, str]  # of the ONNX model's input and output
    shape: tuple[int, ...]  # of a batch of images


def run_tool(name: str, *words: object) -> None:
    """Run a command of a converter, from this environment or the PATH; raise RunError with its last line if it fails.

    Converters run as processes of their own, since some of them need versions of numpy that torch does not.
    """
    command = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run([command or name, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise RunError(f"{name} failed with exit code {done.returncode}: {lines[-1][:300]}")


def open_session(model: bytes) -> Run:
    """Load an ONNX model into onnxruntime, with as many CPU threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def compress(model: Any, weights_as: str) -> None:
    """Store the weights of an ONNX model in 16 or 8 bits; nodes before their use restore float32.

    int8: one scale for each output channel; activations remain float32
    """
    if weights_as == "fp32":
        return
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    transposed = {node.input[1] for node in graph.node if node.op_type in ("ConvTranspose", "MatMul")}
    nodes = []
    for tensor in [t for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) >= 2]:
        name, values = tensor.name, numpy_helper.to_array(tensor)
        axis = (1 if values.ndim > 2 else values.ndim - 1) if name in transposed else 0
        if weights_as == "fp16":
            stored = [values.astype(np.float16)]
            nodes.append(helper.make_node("Cast", [f"{name}_fp16"], [name], to=TensorProto.FLOAT))
        else:
            others = tuple(i for i in range(values.ndim) if i != axis)
            scale = np.maximum(np.abs(values).max(others, keepdims=True), 1e-12) / 127
            stored = [np.rint(values / scale).astype(np.int8), scale.reshape(-1).astype(np.float32)]
            inputs = [f"{name}_int8", f"{name}_scale"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [name], axis=axis))
        graph.initializer.remove(tensor)
        graph.initializer.extend(map(numpy_helper.from_array, stored, nodes[-1].input))
    for node in reversed(nodes):
        graph.node.insert(0, node)
    kept = [value for value in graph.value_info if not any(value.name == node.output[0] for node in nodes)]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def write_onnx(source: Source, folder: Path) -> Path:
    """Write the ONNX model as a file; returns its path."""
    path = folder / "net.onnx"
    path.write_bytes(source.onnx())
    return path


def to_onnxruntime(source: Source, folder: Path) -> tuple[list[Path], Run]:
    """Write the ONNX model."""
    path = write_onnx(source, folder)
    return [path], open_session(path.read_bytes())


def to_opencv(source: Source, folder: Path) -> tuple[list[Path], Run]:
    """Write the ONNX model, and run it with the OpenCV that is installed."""
    import cv2

    path = write_onnx(source, folder)
    try:
        net = cv2.dnn.readNetFromONNX(str(path))
    except cv2.error as error:
        raise RunError(
            f"OpenCV {cv2.__version__} cannot read the network: {' '.join(str(error).split())[:200]}"
        ) from error

    def run(images: Tensor) -> Tensor:
        net.setInput(images.numpy())
        return torch.from_numpy(net.forward())

    return [path], run


def to_openvino(source: Source, folder: Path) -> tuple[list[Path], Run]:
    """Write OpenVINO's own format, which can store weights in fp16."""
    import openvino

    path = folder / "net.xml"
    openvino.save_model(openvino.convert_model(write_onnx(source, folder)), path, source.weights_as == "fp16")
    # newer CPUs would compute in bfloat16
    net = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [path, path.with_suffix(".bin")], lambda images: torch.from_numpy(net(images.numpy())[0])


def to_ncnn(source: Source, folder: Path) -> tuple[list[Path], Run]:
    """Convert by pnnx, for batch 1."""
    import ncnn
    import numpy as np

    shape = str(list(source.shape)).replace(" ", "")
    run_tool("pnnx", write_onnx(source, folder), f"inputshape={shape}", f"fp16={int(source.weights_as == 'fp16')}")
    files = [folder / "net.ncnn.param", folder / "net.ncnn.bin"]
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(files[0])) or net.load_model(str(files[1])):  # to run it in spite of that would be a crash
        raise RunError("ncnn cannot load the converted network: it lacks one of its layers")

    def run(images: Tensor) -> Tensor:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(images[0].numpy()).clone())
        return torch.from_numpy(np.array(extractor.extract("out0")[1]))[None]

    return files, run


def to_mnn(source: Source, folder: Path) -> tuple[list[Path], Run]:
    """Convert by mnnconvert."""
    import numpy as np
    from MNN import expr
    from MNN import nn as mnn

    path = folder / "net.mnn"
    words = ["--fp16"] if source.weights_as == "fp16" else []
    model = write_onnx(source, folder)
    run_tool("mnnconvert", "-f", "ONNX", "--modelFile", model, "--MNNModel", path, "--bizCode", "x", *words)
    net = mnn.load_module_from_file(str(path), [source.names[0]], [source.names[1]])

    def run(images: Tensor) -> Tensor:
        image = expr.placeholder(list(images.shape), expr.NCHW)
        image.write(np.ascontiguousarray(images.numpy()))
        return torch.from_numpy(np.array(expr.convert(net.forward([image])[0], expr.NCHW).read()))

    return [path], run


def to_torch(source: Source, folder: Path) -> tuple[list[Path], Run]:
    """Write a torch.export program."""
    path = folder / "net.pt2"
    torch.export.save(source.program(), path)
    return [path], torch.export.load(path).module(check_guards=False)


def to_aoti(source: Source, folder: Path) -> tuple[list[Path], Run]:
    """Compile an AOTInductor package, which needs a C++ compiler."""
    path = folder / "net.pt2"
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise InputError("--for aoti: needs a C++ compiler; install g++, or take --for torch")
    options = {"aot_inductor.check_lowerbound": False}  # else a batch of 1 would be refused where inputs are checked
    torch._inductor.aoti_compile_and_package(source.program(), package_path=str(path), inductor_configs=options)
    return [path], torch._inductor.aoti_load_package(str(path))


# -- What each runtime needs -----------------------------------------------------------------------
@dataclass(frozen=True)
class Runtime:
    """What a runtime needs, and what its user must know."""

    convert: Callable[[Source, Path], tuple[list[Path], Run]]
    suffixes: tuple[str, ...]  # of its files, the main one first
    is_fixed: bool  # whether it needs a fixed image size
    weights: tuple[str, ...]  # what --weights_as can be
    packages: tuple[str, ...]  # modules that the conversion and the check import
    install: str
    hint: str


ONNX = ("onnx", "onnxscript", "onnxruntime")
EXTRA = "pip install -r requirements-export.txt"
RUNTIMES = {
    "onnxruntime": Runtime(
        to_onnxruntime, (".onnx",), False, ("fp32", "fp16", "int8"), ONNX, EXTRA, "input (N, C, H, W) in [-1, 1]"
    ),
    "web": Runtime(
        to_onnxruntime,
        (".onnx",),
        False,
        ("fp32", "fp16"),
        ONNX,
        EXTRA,
        "for examples/web: save it there as model.onnx",
    ),
    "opencv": Runtime(
        to_opencv,
        (".onnx",),
        True,
        ("fp32",),
        (*ONNX, "cv2"),
        f"{EXTRA} opencv-python-headless",
        "OpenCV reads images as BGR: the network needs RGB in [-1, 1]; OpenCV 4 needs this fixed size",
    ),
    "openvino": Runtime(
        to_openvino,
        (".xml", ".bin"),
        False,
        ("fp32", "fp16"),
        (*ONNX, "openvino"),
        f"{EXTRA} openvino",
        'compile it with {"INFERENCE_PRECISION_HINT": "f32"}, else newer CPUs compute in bfloat16',
    ),
    "ncnn": Runtime(
        to_ncnn,
        (".ncnn.param", ".ncnn.bin"),
        True,
        ("fp32", "fp16"),
        (*ONNX, "ncnn", "pnnx"),
        f"{EXTRA} ncnn pnnx",
        "its input is in0, its output out0; checked with fp16 arithmetic off, which is on by default on phones",
    ),
    "mnn": Runtime(
        to_mnn, (".mnn",), True, ("fp32", "fp16"), (*ONNX, "MNN"), f"{EXTRA} MNN", "input and output are NCHW"
    ),
    "torch": Runtime(
        to_torch,
        (".pt2",),
        False,
        ("fp32",),
        (),
        "",
        "load it with torch.export.load(FILE).module(check_guards=False), for any size and batch",
    ),
    "aoti": Runtime(
        to_aoti,
        (".aoti.pt2",),
        False,
        ("fp32",),
        (),
        "",
        "set AOTI_RUNTIME_CHECK_INPUTS=1 where it runs: without it inputs of a wrong shape give wrong images silently",
    ),
}
