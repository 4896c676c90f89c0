"""How far each runtime's images are from PyTorch's, for every kind of generator; each runtime in an environment of its own.

python benchmarks/runtimes.py
python benchmarks/runtimes.py --only opencv4 iree --side 64

Exports each network at a fixed size, then installs each runtime with pip into .runtimes/NAME and runs the files there. The
shipped students, and one random network of each form. Writes the table into docs/deploy.md. Takes about 20 minutes.
"""

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, markdown_table

import export
from models import DIRECTIONS, GeneratorConfig, build_generator
from toolkit import cli, process
from toolkit.weights import load_generator

PAGE = ROOT / "docs" / "deploy.md"
START, END = "<!-- benchmarks/runtimes.py -->\n", "<!-- end -->\n"
SMALL = {"ngf": 16, "num_residual": 2}
FORMS = {
    "deconv": SMALL,
    "skips": SMALL | {"skips": True},
    "group": SMALL | {"norm": "group"},
    "affine": SMALL | {"norm": "instance_affine"},
    "batch": SMALL | {"norm": "batch"},
    "resize": SMALL | {"upsample": "resize"},
    "unet_vit": {"generator": "unet_vit", "vit_blocks": 1},
}
PACKAGES = {  # pip's requirements, the package that gives the version, the function of runtimes_worker.py
    "onnxruntime": (["onnxruntime"], "onnxruntime"),
    "opencv5": (["opencv-python-headless>=5"], "opencv-python-headless"),
    "opencv4": (["opencv-python-headless<5"], "opencv-python-headless"),
    "openvino": (["openvino"], "openvino"),
    "mnn": (["MNN"], "MNN"),
    "ncnn": (["ncnn", "pnnx"], "ncnn"),
    "iree": (["iree-base-compiler[onnx]", "iree-base-runtime"], "iree-base-runtime"),
}


def networks():
    """The shipped students, and one random network of each form, by name."""
    nets = {path.stem: load_generator(path)[0] for path in sorted((ROOT / "examples").glob("*.safetensors"))}
    for name, config in FORMS.items():
        torch.manual_seed(1)
        nets[name] = build_generator(GeneratorConfig(**config), "kaiming").eval()
        for parameter, value in nets[name].named_parameters():
            if parameter.endswith("scale"):
                torch.nn.init.constant_(value, 0.5)  # at 0 a transformer block would do nothing
            elif value.dim() == 1:
                torch.nn.init.uniform_(value, 0.5, 1.5)
    return nets


@torch.no_grad()
def write_cases(folder, side):
    """Write each network as ONNX, with noise and PyTorch's translation of it; returns the names."""
    noise = torch.Generator().manual_seed(0)
    names = []
    for name, net in networks().items():
        image = torch.rand(1, net.config.channels, side, side, generator=noise) * 2 - 1
        model = export.onnx_bytes(net, DIRECTIONS[0], {"size": None}, export.Form((side, side)))
        np.savez(folder / f"{name}.npz", image=image.numpy(), translation=net(image).numpy())
        (folder / f"{name}.onnx").write_bytes(model)
        names.append(name)
    return names


def install(name):
    """Make the environment of a runtime where there is none yet; returns its Python and the runtime's version."""
    requirements, package = PACKAGES[name]
    folder = ROOT / ".runtimes" / name
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", *requirements], check=True)
        (folder / "installed").touch()
    (site,) = folder.glob("lib/python*/site-packages")
    (found,) = importlib.metadata.distributions(name=package, path=[str(site)])
    return python, found.version


def difference(python, runtime, path):
    """The largest difference as text, or why there is none; a runtime that crashes takes down its own process alone."""
    if runtime.startswith("opencv") and path.stem == "unet_vit":
        return "refused"
    argv = [python, Path(__file__).with_name("runtimes_worker.py"), runtime, path]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{runtime}, {path.stem}: {(done.stderr.strip() or 'crashed').splitlines()[-1]}")
        return "fails"
    return done.stdout.split()[-1]


@process.command
def main(argv=None):
    parser = cli.Parser(prog="runtimes.py", description=__doc__)
    parser.add_argument("--side", type=int, default=256, help="side of the images, px")
    parser.add_argument("--only", nargs="+", choices=PACKAGES, default=list(PACKAGES), help="runtimes")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        names = write_cases(Path(folder), args.side)
        rows = {name: {"network": name} for name in names}
        for runtime in args.only:
            python, version = install(runtime)
            for name in names:
                column = f"{runtime.rstrip('45')} {version}"
                rows[name][column] = difference(python, runtime, Path(folder, f"{name}.onnx"))
    lines = [f"Fixed at {args.side} px, largest difference to PyTorch {torch.__version__} in [0, 2]:", ""]
    text = "\n".join([*lines, *markdown_table(list(rows.values()))]) + "\n"
    print(text)
    if args.only == list(PACKAGES):
        head, rest = PAGE.read_text().split(START)
        PAGE.write_text(f"{head}{START}{text}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
