import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, noise_image, tiny_networks
from PIL import Image
from profiles import D50, icc_profile, rgb_profile
from tiny_runs import save_pair

import export
import test as test_command
from models import DIRECTIONS, VIT_SIZES, GeneratorConfig, VitSize, build_generator
from toolkit import runtimes
from toolkit.converters import to_junyanz
from toolkit.images import PREPROCESS, fitted_size, read_image
from toolkit.runtimes import run_tool
from toolkit.weights import load_generator, save_generator
from utils import RunError

onnxruntime = pytest.importorskip("onnxruntime")
ROOT = Path(export.__file__).parent


def write_generator(path="G_AB.safetensors", direction="AtoB", **config):
    """Write a generator file with random weights, also where a fresh network has 0 or 1."""
    torch.manual_seed(1)
    net = build_generator(GeneratorConfig(**config), "kaiming")
    for name, value in net.named_parameters():
        if name.endswith("scale"):
            torch.nn.init.constant_(value, 0.5)  # at 0 a transformer block would do nothing
        elif value.dim() == 1:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    save_generator(path, net, {"direction": direction, "size": [20, 24], "dataset_name": "tiny"})
    return net.eval()


TINY_RESNET = {"ngf": 2, "num_residual": 1}
CONFIGS = [
    TINY_RESNET,
    TINY_RESNET | {"norm": "instance_affine"},
    TINY_RESNET | {"upsample": "resize", "norm": "batch", "channels": 1, "n_downsampling": 3},
    TINY_RESNET | {"skips": True},
    {"ngf": 16, "num_residual": 1, "norm": "group", "skips": True},
    {"generator": "unet_vit", "vit_blocks": 1},
    {"generator": "unet_vit", "vit_size": "uvcgan", "vit_blocks": 1, "vit_heads": 3, "norm": "none"},
]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_an_onnx_file_gives_what_pytorch_gives_at_any_size_and_batch(config, monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, uvcgan_layers=False))
    monkeypatch.setitem(VIT_SIZES, "uvcgan", VitSize((4, 4, 8, 12), ffn=24, blocks=12, heads=6, uvcgan_layers=True))
    net = write_generator(**config)
    assert export.main(["--weights", "G_AB.safetensors"]) == Path("G_AB.onnx")
    session = onnxruntime.InferenceSession("G_AB.onnx", providers=["CPUExecutionProvider"])
    assert [session.get_inputs()[0].name, session.get_outputs()[0].name] == ["real_A", "fake_B"]
    for n, height, width in ((1, 32, 32), (3, 33, 50), (2, 64, 47)):
        images = torch.rand(n, net.config.channels, height, width) * 2 - 1
        (output,) = session.run(None, {"real_A": images.numpy()})
        with torch.no_grad():
            assert np.abs(output - net(images).numpy()).max() < 1e-4
    facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    expected = {"range": [-1, 1], "direction": "AtoB", "size": [20, 24], "channels": net.config.channels}
    expected["domains"] = ["A", "B"]
    assert {name: facts[name] for name in expected} == expected


@pytest.mark.slow
def test_outputs_that_differ_are_not_written(refused, monkeypatch):
    write_generator(**TINY_RESNET)
    run = runtimes.open_session
    monkeypatch.setattr(runtimes, "open_session", lambda model: lambda x: run(model)(x) + 2e-3)
    assert "0.001" in refused(export.main, "--weights", "G_AB.safetensors", code=1)
    assert not Path("G_AB.onnx").exists()


@pytest.mark.slow
def test_a_run_is_exported_and_the_example_translates_without_torch(tiny, monkeypatch):
    import train

    given = ["--num_epochs", "2", "--checkpoint_interval", "1", "--img_width", "24"]
    train.main(["--dataset_name", "tiny", *TINY, *given])
    assert export.main(["--run_name", "tiny", "--direction", "BtoA"]) == Path("saved_models/tiny/G_BA.onnx")
    noise_image(3, (30, 20)).save("photo.png")
    monkeypatch.setattr(sys, "argv", ["onnx_translate.py", "saved_models/tiny/G_BA.onnx", "photo.png", "output.png"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "examples" / "onnx_translate.py"), run_name="__main__")
    assert exit_.value.code == 0
    options = ["--direction", "BtoA", "--device", "cpu", "--precision", "fp32"]
    test_command.main(["--run_name", "tiny", "--input", "photo.png", *options])
    output = np.asarray(Image.open("output.png")).astype(int)
    expected = np.asarray(Image.open("generated_images/tiny/translated/fake_A/photo.png")).astype(int)
    assert np.abs(output - expected).max() <= 1
    first = export.main(["--run_name", "tiny", "--epoch", "1", "--output", "first.onnx"])
    assert first.read_bytes() != Path("saved_models/tiny/G_BA.onnx").read_bytes()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny generator with the bytes of its ONNX files: of a fixed size, with weights in each precision."""
    net = write_generator(tmp_path_factory.mktemp("exported") / "G_AB.safetensors", **TINY_RESNET, skips=True)
    metadata = {"size": [20, 24]}
    forms = {kind: export.Form((18, 22), 1, kind) for kind in ("fp32", "fp16", "int8")}
    return net, {kind: export.onnx_bytes(net, DIRECTIONS[0], metadata, form) for kind, form in forms.items()}


def in_opencv(model):
    cv2 = pytest.importorskip("cv2")
    net = cv2.dnn.readNetFromONNX(np.frombuffer(model, np.uint8))

    def run(image):
        net.setInput(image)
        return net.forward()

    return run


def in_openvino(model):
    openvino = pytest.importorskip("openvino")
    net = openvino.Core().compile_model(openvino.Core().read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: net(image)[0]


def in_onnxruntime(model):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"real_A": image})[0]


@pytest.mark.slow
@pytest.mark.parametrize("load", [in_onnxruntime, in_opencv, in_openvino])
def test_a_file_of_a_fixed_size_gives_in_each_runtime_what_pytorch_gives(exported, load):
    net, models = exported
    image = torch.rand(1, 3, 18, 22) * 2 - 1
    with torch.no_grad():
        assert np.abs(load(models["fp32"])(image.numpy()) - net(image).numpy()).max() < 1e-4


@pytest.mark.slow
def test_a_file_of_a_fixed_size_has_no_arithmetic_with_shapes(exported):
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(exported[1]["fp32"])
    found = {node.op_type for node in model.graph.node}
    assert found == {"Slice", "Concat", "Conv", "ConvTranspose", "InstanceNormalization", "Relu", "Add", "Tanh"}
    facts = {prop.key: json.loads(prop.value) for prop in model.metadata_props}
    assert (facts["form"], facts["size"], facts["weights_as"]) == ("fixed", [18, 22], "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bits", "error"), [("fp16", 16, 0.01), ("int8", 8, 0.1)])
def test_rounded_weights_take_less_space_and_change_little(exported, kind, bits, error):
    onnx = pytest.importorskip("onnx")
    net, models = exported
    image = torch.rand(1, 3, 18, 22) * 2 - 1
    with torch.no_grad():
        assert np.abs(in_onnxruntime(models[kind])(image.numpy()) - net(image).numpy()).max() < error
    stored = onnx.load_from_string(models[kind]).graph.initializer
    weights = [t for t in stored if len(t.dims) == 4]
    assert weights
    assert {8 * onnx.numpy_helper.to_array(t).itemsize for t in weights} == {bits}


@pytest.mark.slow
def test_a_torch_program_takes_any_size_and_batch():
    net = write_generator(**TINY_RESNET)
    assert export.main(["--weights", "G_AB.safetensors", "--for", "torch"]) == Path("G_AB.pt2")
    program = torch.export.load("G_AB.pt2").module(check_guards=False)
    for shape in ((1, 3, 16, 16), (3, 3, 33, 50)):
        images = torch.rand(shape) * 2 - 1
        with torch.no_grad():
            assert torch.allclose(program(images), net(images), atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--for", "opencv"], "--for opencv: not possible for a unet_vit, OpenCV's importer cannot read it"),
        (["--for", "ncnn"], "--for ncnn: not possible for a unet_vit"),
        (["--for", "ncnn", "--size", "free"], "--size free: --for ncnn needs a fixed size"),
        (["--for", "ncnn", "--weights_as", "int8"], "--weights_as int8: --for ncnn takes fp32, fp16"),
        (["--for", "onnxruntime", "--to", "onnx"], "--to and --for contradict each other"),
        (["--to", "junyanz", "--size", "64x64"], "--to and --size contradict each other"),
        (["--size", "64"], "given '64', expected free, or height and width in px such as 256x384"),
        (["--size", "4x64"], "--size 4x64: the generator needs 8 px a side"),
        (["--batch", "2"], "--batch 2: has no effect on a free size"),
        (["--for", "mnn", "--output", "a.onnx"], "expected a file that ends in .mnn"),
    ],
)
def test_a_form_that_is_not_possible_is_refused(refused, monkeypatch, given, message):
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, uvcgan_layers=False))
    write_generator(generator="unet_vit", vit_blocks=1)
    assert message in refused(export.main, "--weights", "G_AB.safetensors", *given)


def test_a_converter_that_fails_is_named_with_its_last_line():
    with pytest.raises(RunError, match="python failed with exit code 3: last"):
        run_tool("python", "-c", "import sys; print('first\\nlast', file=sys.stderr); sys.exit(3)")


def write_identity(path, **facts):
    """Write an ONNX network that returns its input, with this metadata."""
    onnx = pytest.importorskip("onnx")
    values = [onnx.helper.make_tensor_value_info(name, 1, ["n", 3, "h", "w"]) for name in ("real_A", "fake_B")]
    node = onnx.helper.make_node("Identity", ["real_A"], ["fake_B"])
    graph = onnx.helper.make_graph([node], "identity", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    onnx.save(model, path)


def translate_onnx(*argv):
    """Run the example."""
    return runpy.run_path(str(ROOT / "examples" / "onnx_translate.py"))["main"](argv)


def test_the_example_returns_an_image_at_its_own_size(capsys):
    write_identity("net.onnx", channels=3, size=None)
    noise_image(3, (30, 20)).save("photo.png")
    assert translate_onnx("net.onnx", "photo.png", "output.png") == 0
    assert capsys.readouterr().err == ""
    assert Image.open("output.png").tobytes() == noise_image(3, (30, 20)).tobytes()


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (9, 9), (101, 37)])
@pytest.mark.parametrize("preprocess", PREPROCESS)
def test_the_example_gives_a_network_images_of_the_same_size_as_test_py(preprocess, shape):
    example = runpy.run_path(str(ROOT / "examples" / "onnx_translate.py"))
    facts = {"size": (24, 32), "preprocess": preprocess}
    expected = fitted_size(shape, (32, 24), preprocess, to_crop=False)
    assert example["network_size"](Image.new("L", shape), facts) == expected


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGBA", {}),
        ("LA", {}),
        ("L", {"transparency": 2}),
        ("P", {"transparency": bytes(range(256))}),
        ("RGB", {"transparency": (1, 2, 3)}),
        ("RGB", {"icc_profile": rgb_profile("P3")}),
        ("RGBA", {"icc_profile": rgb_profile("Adobe")}),
        ("RGB", {"icc_profile": b"damaged"}),
        ("P", {"icc_profile": rgb_profile("P3")}),
        ("L", {"icc_profile": icc_profile("GRAY", [("wtpt", D50)], 1.0)}),
        ("LA", {"icc_profile": icc_profile("GRAY", [("wtpt", D50)], 1.0)}),
        ("1", {}),
    ],
)
def test_the_example_reads_images_as_test_py_does(mode, options):
    write_identity("net.onnx", channels=3, size=None)
    photo = noise_image(3, (30, 20), "RGBA")
    photo.putpixel((4, 5), (1, 2, 3, 255))
    (photo if "A" in mode else photo.convert("RGB")).convert(mode).save("photo.png", **options)
    assert translate_onnx("net.onnx", "photo.png", "output.png") == 0
    assert Image.open("output.png").tobytes() == read_image(Path("photo.png")).tobytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "usage: python examples/onnx_translate.py MODEL.onnx IMAGE RESULT.png"),
        ("none.onnx photo.png output.png", "none.onnx: no such file; expected a network written by"),
        ("photo.png photo.png output.png", "photo.png: not a network written by export.py"),
        ("foreign.onnx photo.png output.png", "foreign.onnx: not a network written by export.py"),
        ("flat.onnx photo.png output.png", "flat.onnx: not a network written by export.py"),
        ("grey.onnx photo.png output.png", "photo.png: grey.onnx cannot translate 30x20 px ("),
        ("net.onnx none.png output.png", "none.png: no such file; expected an image"),
        ("net.onnx torn.png output.png", "torn.png: cannot be read"),
        ("net.onnx clear.png output.png", "clear.png: one colour alone"),
        ("net.onnx deep.png output.png", "deep.png: cannot be read (its mode is I;16; convert it to 8 bits"),
        ("net.onnx float.tif output.png", "float.tif: cannot be read (its mode is F; convert it to 8 bits"),
        ("net.onnx photo.jp2 output.png", "photo.jp2: cannot be read (JPEG 2000; convert it"),
        ("net.onnx planes.tif output.png", "planes.tif: cannot be read (a TIFF file of separate planes"),
        ("net.onnx photo.png none/output.png", "none/output.png: cannot be written"),
        ("net.onnx photo.png output.what", "output.what: cannot be written"),
        ("net.onnx photo.png ./photo.png", "./photo.png: is the image that is read"),
    ],
)
def test_the_example_refuses_in_one_line(capsys, argv, message):
    # grey.onnx says one channel, but the network takes three
    facts = {"net": {"channels": 3, "size": [20, 24]}, "foreign": {}, "flat": {"channels": 3, "size": 5}}
    for name, values in {**facts, "grey": {"channels": 1, "size": None}}.items():
        write_identity(f"{name}.onnx", **values)
    for suffix in ("png", "jp2"):
        noise_image(3, (30, 20)).save(f"photo.{suffix}")
    for name, mode in {"deep.png": "I;16", "float.tif": "F"}.items():
        Image.new(mode, (30, 20)).save(name)
    Image.new("RGBA", (30, 20)).save("clear.png")
    noise_image(3, (30, 20)).save("planes.tif")
    data = bytearray(Path("planes.tif").read_bytes())
    data[data.find(b"\x1c\x01\x03\x00\x01\x00\x00\x00") + 8] = 2  # tag 284: planes one after the other
    bits = data.find(b"\x08\x00\x08\x00\x08\x00")
    data[bits : bits + 6] = b"\x10\x00\x10\x00\x10\x00"
    Path("planes.tif").write_bytes(data)
    Path("torn.png").write_bytes(Path("photo.png").read_bytes()[:500])
    assert translate_onnx(*argv.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(Path().glob("output.*"))


def test_the_junyanz_layout_can_be_written_and_read_again(capsys):
    net = write_generator("G_BA.safetensors", "BtoA", ngf=2, num_residual=2)
    path = export.main(["--weights", "G_BA.safetensors", "--to", "junyanz"])
    assert path == Path("latest_net_G_B.pth")
    assert "latest_net_G_B.pth, in pytorch-CycleGAN-and-pix2pix: its code builds 6 or 9" in capsys.readouterr().out
    loaded, metadata = load_generator(path)
    assert metadata["direction"] == "BtoA"
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--run_name", "none"], "saved_models/none"),
        (["--run_name", "pair", "--epoch", "3"], "--epoch 3"),
        (["--run_name", "one_way", "--direction", "AtoB"], "--direction AtoB"),
        (["--run_name", "one_way"], "--direction AtoB"),
        (["--weights", "G_AB.safetensors", "--epoch", "3"], "--weights and --epoch"),
        (["--weights", "G_AB.safetensors", "--run_name", "pair"], "--weights and --run_name"),
        (["--weights", "G_AB.safetensors", "--direction", "BtoA"], "--direction BtoA"),
        (["--weights", "G_AB.safetensors", "--output", "a.pth"], "--output a.pth"),
        (["--weights", "G_AB.safetensors", "--output", "no/a.onnx"], "--output no/a.onnx"),
        (["--weights", "none.safetensors"], "none.safetensors"),
        (["--weights", "latest_net_G_A.pth", "--to", "junyanz"], "latest_net_G_A.pth: would overwrite the weights"),
    ],
)
def test_wrong_options_are_refused_in_one_line(refused, given, message):
    for name in ("G_AB.safetensors", "latest_net_G_A.pth"):
        write_generator(name, **TINY_RESNET)
    before = Path("latest_net_G_A.pth").read_bytes()
    nets = tiny_networks()
    save_pair(G_AB=nets["G_AB"], G_BA=nets["G_BA"])
    save_pair("one_way", G_BA=nets["G_BA"])
    assert message in refused(export.main, *given)
    assert Path("latest_net_G_A.pth").read_bytes() == before


def test_networks_that_do_not_fit_together_are_refused(refused):
    save_pair(G_AB=tiny_networks(channels=1)["G_AB"], G_BA=tiny_networks()["G_BA"])
    assert "saved_models/pair" in refused(export.main, "--run_name", "pair")


def test_a_direction_that_a_file_does_not_record_is_that_of_the_option():
    net = write_generator(**TINY_RESNET)
    torch.save(to_junyanz(net), "9_net_G.pth")
    argv = ["--weights", "9_net_G.pth", "--to", "junyanz", "--output", "out.pth"]
    assert str(export.find_generator(export.parse_args([*argv, "--direction", "BtoA"]))[1]) == "BtoA"
    assert str(export.find_generator(export.parse_args(argv))[1]) == "AtoB"


def test_a_missing_package_is_named_with_the_command_that_installs_it(refused, monkeypatch):
    write_generator(**TINY_RESNET)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    message = "the package onnxscript is missing; install it with: pip install -r requirements-export.txt"
    assert message in refused(export.main, "--weights", "G_AB.safetensors")


def test_the_networks_of_a_file_are_listed(capsys, refused):
    weights = {"model.1.weight": torch.zeros(4, 3, 7, 7), "model.5.weight": torch.zeros(3, 4, 7, 7)} | {
        "model.5.bias": torch.zeros(3)
    }
    mobile = {"model.10.conv_block.1.conv.0.weight": torch.zeros(4, 1, 3, 3)}
    parts = {"down.0.weight": torch.zeros(4, 3, 3, 3), "up.0.weight": torch.zeros(3, 4, 3, 3)}
    odd = weights | {"model.9.weight": torch.zeros(2, 2, 2, 2)}
    networks = {
        "G_AB": weights,
        "G_AB_ema": weights,
        "netG_B2A": mobile,
        "D_A": {"model.0.weight": torch.zeros(4, 3, 4, 4)},
    }
    torch.save({**networks, "parts": parts, "odd": odd, "epoch": 3}, "x.pth")
    assert export.main(["--list", "x.pth"]) == Path("x.pth")
    rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["network", "layout", "direction", "parameters", "channels", "readable"]
    assert rows[1:] == [
        ["G_AB", "pytorch-CycleGAN-and-pix2pix", "AtoB", "1,179", "3", "yes"],
        ["G_AB_ema", "pytorch-CycleGAN-and-pix2pix", "AtoB", "1,179", "3", "yes, averaged weights"],
        ["netG_B2A", "a mobile generator of gan-compression, of separable convolutions", "BtoA", "36", "-", "no"],
        ["D_A", "a discriminator", "-", "192", "-", "no"],
        ["parts", "a network in named parts (down, up)", "-", "216", "-", "no"],
        ["odd", rows[6][1], "-", "1,195", "-", rows[6][5]],
    ]
    assert rows[6][5] == "no: 3 convolutions outside of blocks; expected those of a ResNet generator"
    assert "--list and --weights contradict each other" in refused(export.main, "--list", "x.pth", "--weights", "x.pth")
    assert "no such file" in refused(export.main, "--list", "none.pth")


def test_files_of_this_project_are_listed_too(capsys):
    net = write_generator(**TINY_RESNET)
    state = {"format": 1, "nets": {"G_BA": net.state_dict()}, "config": {"G_BA": dataclasses.asdict(net.config)}}
    torch.save(state, "latest.pt")
    size = f"{sum(x.numel() for x in net.parameters()):,}"
    rows = {"G_AB.safetensors": f"the file this project AtoB {size} 3 yes"}
    rows["latest.pt"] = f"G_BA this project BtoA {size} 3 with --run_name"
    for file, row in rows.items():
        export.main(["--list", file])
        assert " ".join(capsys.readouterr().out.splitlines()[1].split()) == row


def test_a_file_with_both_generators_is_exported_by_direction(refused):
    nets = {f"G_{way}": to_junyanz(build_generator(GeneratorConfig(**TINY_RESNET))) for way in ("AB", "BA")}
    torch.save(nets, "x.pth")
    given = ["--weights", "x.pth", "--to", "junyanz"]
    assert "x.pth: holds generators of both directions; choose one with --direction" in refused(export.main, *given)
    assert export.main([*given, "--direction", "BtoA"]) == Path("latest_net_G_B.pth")
    assert torch.equal(torch.load("latest_net_G_B.pth")["model.1.weight"], nets["G_BA"]["model.1.weight"])
