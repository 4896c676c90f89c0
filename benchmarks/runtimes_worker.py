"""Run one ONNX file in one runtime, without torch, and print the largest difference; started by benchmarks/runtimes.py."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np


def tool(name, *words):
    subprocess.run([Path(sys.executable).with_name(name), *words], check=True, capture_output=True)


def onnxruntime(path, image):
    import onnxruntime

    return onnxruntime.InferenceSession(path).run(None, {"real_A": image})[0]


def opencv(path, image):
    import cv2

    net = cv2.dnn.readNetFromONNX(str(path))
    net.setInput(image)
    return net.forward()


def openvino(path, image):
    import openvino

    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image)[0]


def mnn(path, image):
    from MNN import expr, nn

    tool("mnnconvert", "-f", "ONNX", "--modelFile", path, "--MNNModel", f"{path}.mnn", "--bizCode", "x")
    net = nn.load_module_from_file(f"{path}.mnn", ["real_A"], ["fake_B"])
    placeholder = expr.placeholder(list(image.shape), expr.NCHW)
    placeholder.write(image)
    return np.array(expr.convert(net.forward([placeholder])[0], expr.NCHW).read())


def ncnn(path, image):
    import ncnn

    tool("pnnx", path, f"inputshape={str(list(image.shape)).replace(' ', '')}", "fp16=0")
    stem = str(path.with_name(path.stem.translate(str.maketrans("-. ", "___"))))
    net = ncnn.Net()
    if net.load_param(f"{stem}.ncnn.param") or net.load_model(f"{stem}.ncnn.bin"):
        raise ValueError("ncnn lacks a layer")
    extractor = net.create_extractor()
    extractor.input("in0", ncnn.Mat(image[0]).clone())
    return np.array(extractor.extract("out0")[1])[None]


def iree(path, image):
    from iree import runtime
    from iree.compiler import tools

    tool("iree-import-onnx", path, "-o", f"{path}.mlir")
    options = ["--iree-llvmcpu-target-cpu=host"]
    binary = tools.compile_file(f"{path}.mlir", target_backends=["llvm-cpu"], extra_args=options)
    context = runtime.SystemContext(config=runtime.Config("local-task"))
    module = runtime.VmModule.copy_buffer(context.instance, binary)
    context.add_vm_module(module)
    (name,) = [name for name in module.function_names if "async" not in name and "init" not in name]
    return np.asarray(context.modules[module.name][name](image))


RUNTIMES = {"onnxruntime": onnxruntime, "opencv": opencv, "openvino": openvino, "mnn": mnn, "ncnn": ncnn, "iree": iree}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", help="one of them; opencv4 and opencv5 are run alike")
    parser.add_argument("file", type=Path, help="an ONNX file; beside it a .npz file with an image and its translation")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    case = np.load(args.file.with_suffix(".npz"))
    output = RUNTIMES[args.runtime.rstrip("45")](args.file.resolve(), case["image"])
    assert output.shape == case["translation"].shape, output.shape
    print(f"{np.abs(output - case['translation']).max():.0e}")


if __name__ == "__main__":
    main()
