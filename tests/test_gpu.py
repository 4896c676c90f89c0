"""Tests that need a CUDA GPU (pytest -m gpu, part of make gpu): tiny networks, every flag about speed, every command."""

import io
import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, differences, noise_image, tiny_model, tiny_networks
from PIL import Image
from tiny_runs import state_of

import app
import distill
import export
import test as test_command
import train
from models import DIRECTIONS
from toolkit import cli, devices
from toolkit.logs import read_losses
from toolkit.weights import load_generator
from utils import InputError

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it only once
ROOT = Path(train.__file__).parent
GPU = [*TINY, "--device", "cuda", "--num_workers", "0"]
RESNET = ["--skips", "--upsample", "resize"]
VIT = ["--generator", "unet_vit", "--vit_blocks", "1"]
CUDA = torch.device("cuda")
LOSSES = Path("saved_models/tiny/losses.csv")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.usefixtures("no_plots"),
    pytest.mark.filterwarnings("ignore:::torch"),  # warnings of its compiler; ours are errors
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture
def trained(tiny):
    """A run of one epoch on the GPU."""
    train.main(["--dataset_name", "tiny", *GPU, "--num_epochs", "1"])


def run(*argv):
    """Train for two epochs, three steps each; returns the state."""
    flags = ["--dataset_name", "tiny", *GPU, "--num_epochs", "2", *map(str, argv)]
    if "unet_vit" in argv:
        for flag in ("--num_residual", "--ngf"):  # only a resnet has them
            i = flags.index(flag)
            del flags[i : i + 2]
    train.main(flags)
    rows = read_losses(LOSSES)
    assert rows
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return state_of("tiny")


def first_losses(*argv):
    """Train for one epoch; returns the first row of losses.csv."""
    run(*argv, "--num_epochs", 1, "--overwrite")
    return read_losses(LOSSES)[0]


def assert_similar(row, other, tolerance=0.02):
    for name, value in row.items():
        assert other[name] == pytest.approx(value, rel=tolerance), name


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("generator", ["resnet", "unet_vit"])
def test_both_generators_train_in_every_precision(tiny, precision, generator):
    argv = RESNET if generator == "resnet" else VIT
    state = run(*argv, "--precision", precision, "--ema", 0.9, "--num_workers", 2)
    assert state["step"] == 6
    assert (state["scaler"] is not None) == (devices.pick_precision(precision, CUDA) == "fp16")
    assert all(x.device.type == "cpu" for x in state["nets"]["G_AB"].values())


@pytest.mark.parametrize("argv", [[], [*RESNET, "--norm", "batch"], VIT], ids=["resnet", "batch norm", "unet_vit"])
def test_a_resumed_deterministic_run_equals_an_uninterrupted_one(tiny, argv):
    common = [*argv, "--deterministic", "--precision", "bf16", "--num_epochs", 3, "--checkpoint_interval", 1]
    whole = run(*common)
    train.main(["--dataset_name", "tiny", "--device", "cuda", "--precision", "bf16", "--start_from", "1"])
    again = state_of("tiny")
    for key in ("nets", "optims", "buffers", "rng", "ema"):
        assert differences(whole[key], again[key]) == [], key


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_gradient_penalty_is_computed(tiny, precision):
    run("--lambda_gp", 0.1, "--precision", precision)
    assert all(row["gp_A"] > 0 for row in read_losses(LOSSES))


@pytest.mark.parametrize("compiled", [[], ["--compile"]], ids=["eager", "compiled"])
def test_micro_batches_give_the_losses_of_the_whole_batch(tiny, compiled):
    common = ["--precision", "fp32", *compiled]
    assert_similar(first_losses(*common), first_losses(*common, "--micro_batch", 1))


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_worker_processes_deliver_the_same_images(tiny, cache):
    argv = ["--cache", cache, "--deterministic", "--num_epochs", 1]
    without = run(*argv)
    with_workers = run(*argv, "--num_workers", 2, "--overwrite")
    assert differences(without["nets"], with_workers["nets"]) == []


def test_frozen_parts_do_not_learn(tiny):
    state = run("--freeze", "stem,down", "--norm", "instance_affine", "--discriminator", "pixel", "--gan_loss", "hinge")
    assert 0 < len(state["optims"]["G"]["state"]) < 2 * len(state["nets"]["G_AB"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("argv", [RESNET, VIT], ids=["resnet", "unet_vit"])
def test_a_compiled_run_has_the_losses_of_an_eager_one(tiny, argv, precision):
    common = [*argv, "--precision", precision, "--seed", 3]
    tolerance = 0.02 if precision == "fp32" else 0.1
    assert_similar(first_losses(*common), first_losses(*common, "--compile"), tolerance)


def test_a_compiled_run_can_be_sampled_evaluated_and_resumed(tiny):
    argv = ["--compile", "--precision", "bf16", "--ema", 0.9, "--eval_interval", 1, "--sample_interval", 2]
    run(*argv, "--watch", "datasets/tiny/testA/0.png")
    resume = ["--dataset_name", "tiny", "--device", "cuda", "--compile", "--start_from", "latest"]
    train.main([*resume, "--num_epochs", "3"])
    assert state_of("tiny")["step"] == 9


def networks_on_gpu(**changes):
    return {name: net.to(CUDA) for name, net in tiny_networks(**changes).items()}


def test_fp16_skips_a_step_with_an_overflow_and_halves_the_scale():
    model = tiny_model(networks=networks_on_gpu(), precision="fp16")
    G_AB = model.networks["G_AB"]
    before = {name: value.clone() for name, value in G_AB.state_dict().items()}
    model.executor.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)  # overflows in the first backward pass
    real_A, real_B = torch.rand(2, 2, 3, 16, 16, device=CUDA) * 2 - 1
    model.step(real_A, real_B)
    assert differences(before, G_AB.state_dict()) == []
    assert model.executor.scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_runs_out_of_memory_is_repeated_in_micro_batches(capsys, monkeypatch, compiled):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # it would need memory, too
    real_A, real_B = torch.rand(2, 16, 3, 128, 128, device=CUDA) * 2 - 1

    def model_and_losses():
        model = tiny_model(networks=networks_on_gpu(ngf=16, ndf=16, num_residual=2), compile=compiled)
        return model, {name: float(value) for name, value in model.step(real_A, real_B).items()}

    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, plenty = model_and_losses()
    assert model.executor.micro_batch_size == 0
    needed = torch.cuda.max_memory_allocated() - before
    del model
    torch.compiler.reset()
    torch.cuda.empty_cache()
    try:
        limit = torch.cuda.memory_reserved() + 0.6 * needed
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(CUDA).total_memory)
        model, scarce = model_and_losses()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < model.executor.micro_batch_size < 16
    assert "out of memory: " in capsys.readouterr().err
    assert_similar(plenty, scarce)


def train_with_ranks(count, run_name, *argv):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    flags = ["--dataset_name", "tiny", *GPU, "--run_name", run_name, "--num_epochs", "2", *argv]
    subprocess.run([*launch, str(ROOT / "train.py"), *flags], check=True, timeout=600)


def test_one_nccl_rank_equals_one_process(tiny):
    """Its gradients go through an all-reduce of one rank."""
    without = run("--deterministic")
    train_with_ranks(1, "rank", "--deterministic")
    for key in ("nets", "buffers"):
        assert differences(without[key], state_of("rank")[key]) == [], key


def test_two_ranks_that_share_a_gpu_have_the_losses_of_one_process(tiny):
    run()
    train_with_ranks(2, "ranks")
    assert_similar(read_losses(LOSSES)[0], read_losses(Path("saved_models/ranks/losses.csv"))[0])


# -- the other commands ------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [[], ["--compile"]], ids=["eager", "compiled"])
def test_a_student_is_distilled_and_reported(trained, compiled):
    argv = ["--dataset_name", "tiny", "--device", "cuda", "--precision", "bf16"]
    argv += ["--student_residual", "1", "--student_ngf", "2", "--num_epochs", "2", *compiled]
    distill.main(argv)
    assert state_of("tiny_student")["nets"]["G_AB"]["head.1.weight"].shape[1] == 2
    if not compiled:
        distill.main(["--dataset_name", "tiny", "--device", "cuda", "--report"])
        report = json.loads(Path("generated_images/tiny_student/report.json").read_text())
        assert report.keys() == {"G_AB", "G_BA"}


def read_pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_translations_on_the_gpu_equal_those_on_the_cpu(trained, precision):
    def translations(folder, *argv):
        test_command.main(["--dataset_name", "tiny", "--output", folder, *argv])
        return np.stack([read_pixels(path) for path in sorted(Path(folder).glob("fake_?/*.png"))])

    on_gpu = translations("cuda", "--device", "cuda", "--precision", precision, "--metrics", "paired,cycle,identity")
    on_cpu = translations("cpu", "--device", "cpu", "--precision", "fp32")
    assert np.abs(on_gpu - on_cpu).mean() < (0.5 if precision == "fp32" else 2)
    assert (Path("cuda") / "metrics.json").is_file()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_large_image_is_translated_in_tiles(trained, precision):
    noise_image(1, (150, 90)).save("large.png")
    argv = ["--run_name", "tiny", "--device", "cuda", "--precision", precision]
    argv += ["--input", "large.png", "--direction", "AtoB"]
    test_command.main([*argv, "--output", "whole", "--scale", "native"])
    test_command.main([*argv, "--output", "tiled", "--tile", "64"])
    whole = read_pixels("whole/fake_B/large.png")
    tiled = read_pixels("tiled/fake_B/large.png")
    assert whole.shape == tiled.shape == (90, 150, 3)
    assert np.abs(whole - tiled).mean() < 10


def test_an_image_that_is_too_large_for_the_gpu_is_refused_in_one_line(trained, monkeypatch, refused):
    noise_image(1, (800, 600)).save("large.png")
    torch.cuda.empty_cache()
    try:
        limit = torch.cuda.memory_reserved() + 8e6
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(CUDA).total_memory)
        argv = ["--run_name", "tiny", "--device", "cuda", "--input", "large.png", "--direction", "AtoB"]
        line = refused(test_command.main, *argv, "--scale", "native", "--precision", "fp32", code=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory" in line
    assert "--tile" in line or "--img_height" in line


def test_the_app_translates_and_compares(trained):
    pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-app.txt")
    noise_image(3, (30, 20)).save("photo.png")
    config = cli.config_of(app.AppConfig, app.parse_args(["--device", "cuda"]))
    translator = app.open_run(config, "tiny")
    image, fake, rec = app.translate_file(translator, DIRECTIONS[0], Path("photo.png"))
    assert image.size == fake.size == rec.size == (30, 20)
    [(_, caption)] = app.compare_runs({"tiny": translator}, DIRECTIONS[0], Path("photo.png"))
    assert " ms, " in caption
    packed, _ = app.translate_to_zip(config, Path(), "tiny", "AtoB", "train", ["photo.png"])
    with zipfile.ZipFile(packed) as archive:
        assert Image.open(io.BytesIO(archive.read("fake_B/photo.png"))).size == (30, 20)


def test_a_network_that_was_trained_on_the_gpu_is_exported(trained):
    onnxruntime = pytest.importorskip("onnxruntime")
    export.main(["--run_name", "tiny", "--direction", "AtoB", "--output", "G_AB.onnx"])
    net, _ = load_generator(Path("saved_models/tiny/G_AB.safetensors"))
    x = torch.rand(2, 3, 20, 24) * 2 - 1
    session = onnxruntime.InferenceSession("G_AB.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = net.eval()(x).numpy()
    assert np.abs(session.run(None, {"real_A": x.numpy()})[0] - expected).max() < 1e-4


def test_a_gpu_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"--device cuda:99: not on this machine; expected auto or one of cpu, cuda:0"):
        devices.pick_device("cuda:99")
