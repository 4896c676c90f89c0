import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, noise_image, tiny_networks
from PIL import Image
from tiny_runs import save_pair, save_run

import export
import test as test_stage
from models import VIT_SIZES, GeneratorConfig, VitSize, build_generator
from toolkit.checkpoints import load_state, save_state
from toolkit.converters import to_junyanz
from toolkit.weights import load_generator, save_generator

onnxruntime = pytest.importorskip("onnxruntime")
ROOT = Path(export.__file__).parent


def write_generator(path=Path("G_AB.safetensors"), direction="AtoB", **flags):
    torch.manual_seed(1)
    net = build_generator(GeneratorConfig(**flags), "kaiming")
    for name, value in net.named_parameters():
        if name.endswith("scale"):
            torch.nn.init.constant_(value, 0.5)  # at 0 a transformer block would do nothing
        elif value.dim() == 1:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    save_generator(path, net, {"direction": direction, "size": [20, 24], "dataset_name": "tiny"})
    return net.eval()


@pytest.mark.parametrize(
    "flags",
    [
        {"ngf": 2, "num_residual": 1, "norm": "instance_affine"},
        pytest.param({"ngf": 2, "num_residual": 1}, marks=pytest.mark.slow),
        pytest.param(
            {"ngf": 2, "num_residual": 1, "upsample": "resize", "norm": "batch", "channels": 1, "n_downsampling": 3},
            marks=pytest.mark.slow,
        ),
        pytest.param({"ngf": 2, "num_residual": 1, "skips": True}, marks=pytest.mark.slow),
        pytest.param({"ngf": 16, "num_residual": 1, "norm": "group", "skips": True}, marks=pytest.mark.slow),
        pytest.param({"generator": "unet_vit", "vit_blocks": 1}, marks=pytest.mark.slow),
        pytest.param(
            {"generator": "unet_vit", "vit_size": "uvcgan", "vit_blocks": 1, "vit_heads": 3, "norm": "none"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_onnx_file_gives_what_pytorch_gives_at_any_size_and_batch(flags, monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, full=False))
    monkeypatch.setitem(VIT_SIZES, "uvcgan", VitSize((4, 4, 8, 12), ffn=24, blocks=12, heads=6, full=True))
    net = write_generator(**flags)
    assert export.main(["--weights", "G_AB.safetensors"]) == Path("G_AB.onnx")
    session = onnxruntime.InferenceSession("G_AB.onnx", providers=["CPUExecutionProvider"])
    assert [session.get_inputs()[0].name, session.get_outputs()[0].name] == ["real_A", "fake_B"]
    for n, height, width in ((1, 32, 32), (3, 33, 50), (2, 64, 47)):
        images = torch.rand(n, net.config.channels, height, width) * 2 - 1
        (output,) = session.run(None, {"real_A": images.numpy()})
        with torch.no_grad():
            assert np.abs(output - net(images).numpy()).max() < 1e-4
    facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert (facts["range"], facts["direction"], facts["size"]) == ([-1, 1], "AtoB", [20, 24])
    assert facts["channels"] == net.config.channels


def test_an_export_does_not_replace_the_weights_that_it_reads(refused):
    write_generator(Path("latest_net_G_A.pth"), ngf=2, num_residual=1)
    before = Path("latest_net_G_A.pth").read_bytes()
    assert "would overwrite" in refused(export.main, "--weights", "latest_net_G_A.pth", "--to", "junyanz")
    assert Path("latest_net_G_A.pth").read_bytes() == before


@pytest.mark.slow
def test_outputs_that_differ_are_not_written(refused, monkeypatch):
    write_generator(ngf=2, num_residual=1)
    run = export.open_session
    monkeypatch.setattr(export, "open_session", lambda model: lambda x: run(model)(x) + 2e-3)
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
    flags = ["--direction", "BtoA", "--device", "cpu", "--precision", "fp32"]
    test_stage.main(["--run_name", "tiny", "--input", "photo.png", *flags])
    outputs = [Image.open(p) for p in ("output.png", "generated_images/tiny/test/fake_A/photo.png")]
    ours, theirs = (np.asarray(output).astype(int) for output in outputs)
    assert np.abs(ours - theirs).max() <= 1
    first = export.main(["--run_name", "tiny", "--epoch", "1", "--output", "first.onnx"])
    assert first.read_bytes() != Path("saved_models/tiny/G_BA.onnx").read_bytes()


def write_identity(path, **facts):
    """An ONNX network that changes nothing, with this metadata."""
    onnx = pytest.importorskip("onnx")
    values = [onnx.helper.make_tensor_value_info(name, 1, ["n", 3, "h", "w"]) for name in ("real_A", "fake_B")]
    node = onnx.helper.make_node("Identity", ["real_A"], ["fake_B"])
    graph = onnx.helper.make_graph([node], "identity", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    onnx.save(model, path)


@pytest.fixture
def translate_onnx():
    """The command line of the example."""
    return runpy.run_path(str(ROOT / "examples" / "onnx_translate.py"))["main"]


def test_the_example_returns_an_image_at_its_own_size(translate_onnx, capsys):
    write_identity("net.onnx", channels=3, size=None)
    noise_image(3, (30, 20)).save("photo.png")
    assert translate_onnx(["net.onnx", "photo.png", "output.png"]) == 0
    assert capsys.readouterr().err == ""
    assert Image.open("output.png").tobytes() == noise_image(3, (30, 20)).tobytes()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "usage: python examples/onnx_translate.py MODEL.onnx IMAGE RESULT.png"),
        (["none.onnx", "photo.png", "output.png"], "none.onnx: no such file; expected a network written by"),
        (["photo.png", "photo.png", "output.png"], "photo.png: no network written by export.py"),
        (["foreign.onnx", "photo.png", "output.png"], "foreign.onnx: no network written by export.py"),
        (["flat.onnx", "photo.png", "output.png"], "flat.onnx: no network written by export.py"),
        (["grey.onnx", "photo.png", "output.png"], "photo.png: 30x20 px do not go through grey.onnx ("),
        (["net.onnx", "none.png", "output.png"], "none.png: no such file; expected an image"),
        (["net.onnx", "torn.png", "output.png"], "torn.png: no image that can be read"),
        (["net.onnx", "photo.png", "none/output.png"], "none/output.png: cannot be written"),
        (["net.onnx", "photo.png", "output.what"], "output.what: cannot be written"),
    ],
)
def test_the_example_refuses_in_one_line(translate_onnx, capsys, argv, words):
    write_identity("net.onnx", channels=3, size=[20, 24])
    write_identity("foreign.onnx")
    write_identity("flat.onnx", channels=3, size=5)
    write_identity("grey.onnx", channels=1, size=None)  # but the network takes three
    noise_image(3, (30, 20)).save("photo.png")
    Path("torn.png").write_bytes(Path("photo.png").read_bytes()[:500])
    assert translate_onnx(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not list(Path().glob("output.*"))


def test_the_junyanz_layout_goes_out_and_comes_back(capsys):
    net = write_generator(ngf=2, num_residual=2, direction="BtoA", path=Path("G_BA.safetensors"))
    path = export.main(["--weights", "G_BA.safetensors", "--to", "junyanz"])
    assert path == Path("latest_net_G_B.pth")
    back, metadata = load_generator(path)
    assert metadata["direction"] == "BtoA"
    for name, value in back.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


@pytest.mark.parametrize(
    ("given", "words"),
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
    ],
)
def test_wrong_flags_are_refused_in_one_line(refused, given, words):
    write_generator(ngf=2, num_residual=1)
    nets = tiny_networks()
    save_pair(G_AB=nets["G_AB"], G_BA=nets["G_BA"])
    save_pair("one_way", G_BA=nets["G_BA"])
    assert words in refused(export.main, *given)


def test_networks_that_do_not_fit_together_are_refused(refused):
    save_pair(G_AB=tiny_networks(channels=1)["G_AB"], G_BA=tiny_networks()["G_BA"])
    assert "saved_models/pair" in refused(export.main, "--run_name", "pair")
    save_run(argv=["--img_height", 32, "--img_width", 32], n_downsampling=4)
    path = Path("saved_models/tiny/epoch_0001.pt")
    state = load_state(path)
    state["args"].update(img_height=16, img_width=16)
    save_state(path, state)
    for layout in ("onnx", "junyanz"):
        assert str(path) in refused(export.main, "--run_name", "tiny", "--epoch", 1, "--to", layout)


def test_a_direction_that_a_file_does_not_say_is_that_of_the_flag():
    net = write_generator(ngf=2, num_residual=1)
    torch.save(to_junyanz(net), "9_net_G.pth")
    argv = ["--weights", "9_net_G.pth", "--to", "junyanz", "--output", "out.pth"]
    assert export.find_generator(export.parse_args([*argv, "--direction", "BtoA"]))[1]["direction"] == "BtoA"
    assert export.find_generator(export.parse_args(argv))[1]["direction"] == "AtoB"


def test_a_missing_package_is_named_with_the_command_that_installs_it(refused, monkeypatch):
    write_generator(ngf=2, num_residual=1)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    words = refused(export.main, "--weights", "G_AB.safetensors")
    assert "onnxscript" in words
    assert "pip install -r requirements-export.txt" in words
