"""What needs a CUDA GPU: pytest -m gpu, part of make gpu. Tiny networks; every flag of speed, every stage."""

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
import test as test_stage
import train
from toolkit import devices, executor
from toolkit.monitor import read_losses
from toolkit.weights import load_generator
from utils import InputError

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, before its first product
ROOT = Path(train.__file__).parent
GPU = [*TINY, "--device", "cuda", "--num_workers", "0"]
RESNET = ["--skips", "--upsample", "resize"]
VIT = ["--generator", "unet_vit", "--vit_blocks", "1"]
CUDA = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.usefixtures("no_plots"),
    pytest.mark.filterwarnings("ignore:::torch"),  # its compiler's own; ours stay errors
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture
def trained(tiny):
    """A run of one epoch on the GPU."""
    train.main(["--dataset_name", "tiny", *GPU, "--num_epochs", "1"])


def run(*argv):
    """Train for two epochs, three steps each; returns the whole state."""
    words = ["--dataset_name", "tiny", *GPU, "--num_epochs", "2", *map(str, argv)]
    if "unet_vit" in argv:
        for flag in ("--num_residual", "--ngf"):  # which only a ResNet has
            at = words.index(flag)
            del words[at : at + 2]
    train.main(words)
    rows = read_losses(Path("saved_models/tiny/losses.csv"))
    assert rows
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return state_of("tiny")


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("generator", ["resnet", "unet_vit"])
def test_both_generators_learn_in_every_precision(tiny, precision, generator):
    argv = RESNET if generator == "resnet" else VIT
    state = run(*argv, "--precision", precision, "--ema", 0.9, "--num_workers", 2)
    assert state["step"] == 6
    assert (state["scaler"] is not None) == (devices.pick_precision(precision, CUDA) == "fp16")
    assert all(x.device.type == "cpu" for x in state["nets"]["G_AB"].values())


@pytest.mark.parametrize("argv", [[], [*RESNET, "--norm", "batch"], VIT], ids=["resnet", "batch norm", "unet_vit"])
def test_a_deterministic_run_that_is_resumed_equals_one_that_was_not(tiny, argv):
    common = [*argv, "--deterministic", "--precision", "bf16", "--num_epochs", 3, "--checkpoint_interval", 1]
    whole = run(*common)
    train.main(["--dataset_name", "tiny", "--device", "cuda", "--precision", "bf16", "--start_from", "1"])
    again = state_of("tiny")
    for key in ("nets", "optims", "buffers", "rng", "ema"):
        assert differences(whole[key], again[key]) == [], key


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_gradient_penalty_is_paid(tiny, precision):
    run("--lambda_gp", 0.1, "--precision", precision)
    assert all(row["gp_A"] > 0 for row in read_losses(Path("saved_models/tiny/losses.csv")))


@pytest.mark.parametrize("compiled", [[], ["--compile"]], ids=["eager", "compiled"])
def test_micro_batches_learn_what_the_batch_teaches(tiny, compiled):
    common = ["--precision", "fp32", "--num_epochs", 1, *compiled]
    run(*common)
    whole = read_losses(Path("saved_models/tiny/losses.csv"))[0]
    run(*common, "--micro_batch", 1, "--overwrite")
    for name, value in read_losses(Path("saved_models/tiny/losses.csv"))[0].items():
        assert value == pytest.approx(whole[name], rel=0.02), name


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_images_are_read_by_other_processes_into_pinned_memory(tiny, cache):
    argv = ["--cache", cache, "--deterministic", "--num_epochs", 1]
    alone = run(*argv)
    beside = run(*argv, "--num_workers", 2, "--overwrite")
    assert differences(alone["nets"], beside["nets"]) == []


def test_frozen_parts_stay_and_the_others_learn_on_the_gpu(tiny):
    state = run("--freeze", "stem,down", "--norm", "instance_affine", "--discriminator", "pixel", "--gan_loss", "hinge")
    moments = state["optims"]["G"]["state"]
    weights = len(state["nets"]["G_AB"])
    assert 0 < len(moments) < 2 * weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("argv", [RESNET, VIT], ids=["resnet", "unet_vit"])
def test_a_compiled_run_learns_what_an_eager_one_learns(tiny, argv, precision):
    common = [*argv, "--precision", precision, "--seed", 3, "--num_epochs", 1]
    run(*common)
    eager = read_losses(Path("saved_models/tiny/losses.csv"))[0]
    run(*common, "--compile", "--overwrite")
    compiled = read_losses(Path("saved_models/tiny/losses.csv"))[0]
    for name, value in eager.items():
        assert compiled[name] == pytest.approx(value, rel=0.02 if precision == "fp32" else 0.1), name


def test_compiled_networks_survive_a_resume_a_grid_and_an_evaluation(tiny):
    argv = ["--compile", "--precision", "bf16", "--ema", 0.9, "--eval_interval", 1, "--sample_interval", 2]
    run(*argv, "--watch", "datasets/tiny/testA/0.png")
    train.main(
        ["--dataset_name", "tiny", "--device", "cuda", "--compile", "--start_from", "latest", "--num_epochs", "3"]
    )
    assert state_of("tiny")["step"] == 9


def test_fp16_skips_a_step_with_an_overflow_and_halves_the_scale():
    nets = tiny_model().nets
    model = tiny_model(nets={name: net.to(CUDA) for name, net in nets.items()}, precision="fp16")
    before = {name: value.clone() for name, value in nets["G_AB"].state_dict().items()}
    model.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)  # overflows in the first backward pass
    real_A, real_B = torch.rand(2, 2, 3, 16, 16, device=CUDA) * 2 - 1
    model.step(real_A, real_B)
    assert differences(before, nets["G_AB"].state_dict()) == []
    assert model.scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("compiled", [False, True])
def test_out_of_memory_on_the_card_is_survived_with_micro_batches(capsys, monkeypatch, compiled):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # what it tries takes memory, too
    real_A, real_B = torch.rand(2, 16, 3, 128, 128, device=CUDA) * 2 - 1

    def model_and_losses():
        nets = tiny_networks(ngf=16, ndf=16, num_residual=2)
        model = tiny_model(nets={name: net.to(CUDA) for name, net in nets.items()})
        if compiled:
            model.compiled = executor.compile_nets(model.nets, CUDA)
        return model, {name: float(value) for name, value in model.step(real_A, real_B).items()}

    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, plenty = model_and_losses()
    assert model.micro_batch_size == 0
    needed = torch.cuda.max_memory_allocated() - before
    del model
    torch.compiler.reset()
    torch.cuda.empty_cache()
    try:
        limit = torch.cuda.memory_reserved() + 0.6 * needed
        torch.cuda.set_per_process_memory_fraction(limit / devices.total_memory(CUDA))
        model, scarce = model_and_losses()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < model.micro_batch_size < 16
    assert "out of memory: the batch of 16 is processed in micro-batches" in capsys.readouterr().err
    for name, value in plenty.items():
        assert scarce[name] == pytest.approx(value, rel=0.02), name


def ranks_that_train(count, run_name, *argv):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    words = ["--dataset_name", "tiny", *GPU, "--run_name", run_name, "--num_epochs", "2", *argv]
    subprocess.run([*launch, str(ROOT / "train.py"), *words], check=True, timeout=300)


def test_one_nccl_rank_learns_what_one_process_learns(tiny):
    """Its gradients go through an all-reduce of one."""
    train.main(["--dataset_name", "tiny", *GPU, "--num_epochs", "2", "--deterministic", "--run_name", "alone"])
    ranks_that_train(1, "rank", "--deterministic")
    for key in ("nets", "buffers"):
        assert differences(state_of("alone")[key], state_of("rank")[key]) == [], key


def test_two_ranks_share_a_card_and_learn_what_one_process_learns(tiny):
    train.main(["--dataset_name", "tiny", *GPU, "--num_epochs", "2", "--run_name", "alone"])
    ranks_that_train(2, "ranks")
    rows = [read_losses(Path(f"saved_models/{name}/losses.csv"))[0] for name in ("alone", "ranks")]
    for name, value in rows[0].items():
        assert rows[1][name] == pytest.approx(value, rel=0.02), name


# -- the other stages --------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [[], ["--compile"]], ids=["eager", "compiled"])
def test_a_student_learns_beside_its_teacher_and_is_reported(trained, compiled):
    argv = ["--dataset_name", "tiny", "--device", "cuda", "--precision", "bf16"]
    argv += ["--student_residual", "1", "--student_ngf", "2", "--num_epochs", "2", *compiled]
    distill.main(argv)
    assert (state_of("tiny_student")["nets"]["G_AB"]["head.1.weight"].shape[1]) == 2
    if not compiled:
        distill.main(["--dataset_name", "tiny", "--device", "cuda", "--report"])
        report = json.loads(Path("generated_images/tiny_student/report.json").read_text())
        assert report.keys() == {"G_AB", "G_BA"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_testing_on_the_gpu_gives_what_the_cpu_gives(trained, precision):
    def test_images(folder, *argv):
        test_stage.main(["--dataset_name", "tiny", "--output", folder, *argv])
        return np.stack(
            [np.asarray(Image.open(path)).astype(int) for path in sorted(Path(folder).glob("fake_?/*.png"))]
        )

    on_gpu = test_images("cuda", "--device", "cuda", "--precision", precision, "--metrics", "paired,cycle,identity")
    on_cpu = test_images("cpu", "--device", "cpu", "--precision", "fp32")
    assert np.abs(on_gpu - on_cpu).mean() < (0.5 if precision == "fp32" else 2)
    assert (Path("cuda") / "metrics.json").is_file()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_tiles_on_the_gpu_cover_a_large_image(trained, precision):
    Path("photos").mkdir()
    noise_image(1, (150, 90)).save("photos/large.png")
    argv = [
        "--run_name",
        "tiny",
        "--device",
        "cuda",
        "--precision",
        precision,
        "--input",
        "photos",
        "--direction",
        "AtoB",
    ]
    whole_and_tiled = []
    for output, more in (("whole", ["--scale", "native"]), ("tiled", ["--tile", "64"])):
        test_stage.main([*argv, "--output", output, *more])
        whole_and_tiled.append(np.asarray(Image.open(f"{output}/fake_B/large.png")).astype(int))
    assert whole_and_tiled[0].shape == whole_and_tiled[1].shape == (90, 150, 3)
    assert np.abs(whole_and_tiled[0] - whole_and_tiled[1]).mean() < 10


def test_an_image_too_large_for_the_card_is_one_line(trained, monkeypatch, refused):
    noise_image(1, (800, 600)).save("large.png")
    torch.cuda.empty_cache()
    try:
        limit = torch.cuda.memory_reserved() + 8e6
        torch.cuda.set_per_process_memory_fraction(limit / devices.total_memory(CUDA))
        argv = ["--run_name", "tiny", "--device", "cuda", "--input", "large.png", "--direction", "AtoB"]
        line = refused(test_stage.main, *argv, "--scale", "native", "--precision", "fp32", code=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory" in line
    assert "--tile" in line or "--img_height" in line


def test_the_app_translates_compares_and_packs(trained):
    noise_image(3, (30, 20)).save("photo.png")
    translator = app.open_run(app.parse_args(["--device", "cuda"]), "tiny")
    image, fake, rec = app.translate(translator, "AtoB", Path("photo.png"))
    assert image.size == fake.size == rec.size == (30, 20)
    [(_, caption)] = app.compare({"tiny": translator}, "AtoB", Path("photo.png"))
    assert " ms, " in caption
    app.translate_batch(translator, "AtoB", [Path("photo.png")], Path("out.zip"))
    with zipfile.ZipFile("out.zip") as archive:
        assert Image.open(io.BytesIO(archive.read("fake_B/photo.png"))).size == (30, 20)


def test_what_was_trained_on_the_gpu_is_exported(trained):
    onnxruntime = pytest.importorskip("onnxruntime")
    export.main(["--run_name", "tiny", "--direction", "AtoB", "--output", "G_AB.onnx"])
    net, _ = load_generator(Path("saved_models/tiny/G_AB.safetensors"))
    x = torch.rand(2, 3, 20, 24) * 2 - 1
    session = onnxruntime.InferenceSession("G_AB.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = net.eval()(x).numpy()
    assert np.abs(session.run(None, {"real_A": x.numpy()})[0] - expected).max() < 1e-4


def test_a_card_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"--device cuda:99: not on this machine; expected auto or one of cpu, cuda:0"):
        devices.pick_device("cuda:99")
