import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset, noise_picture
from PIL import Image

import test as test_stage
import train
from datasets import draw_scene, load_picture
from models import GeneratorConfig, build_generator
from utils import load_state, range_to_bytes, save_state
from weights import load_generator, save_generator, to_junyanz

FP32 = ["--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set of test pairs with a short run, made once."""
    root, here = tmp_path_factory.mktemp("trained"), Path.cwd()
    make_dataset(root / "datasets" / "tiny", (4, 4, 3, 3))
    os.chdir(root)
    train.main(["--dataset_name", "tiny", *TINY, "--num_epochs", "2", "--checkpoint_interval", "1"])
    os.chdir(here)
    return root


@pytest.fixture
def run(trained, tmp_path):
    """The run, copied into the test's own folder; returns test.main with its flags."""
    for name in ("datasets", "saved_models"):
        shutil.copytree(trained / name, tmp_path / name)
    return lambda *argv: test_stage.main(["--run_name", "tiny", *FP32, *map(str, argv)])


def opened(path):
    with Image.open(path) as picture:
        picture.load()
        return picture


def pixels(path):
    return np.asarray(opened(path))


def test_a_run_is_tested_on_the_whole_test_split(run):
    run()
    output = Path("generated_images/tiny/test")
    for folder in ("real_A", "fake_B", "rec_A", "real_B", "fake_A", "rec_B"):
        assert sorted(p.name for p in (output / folder).iterdir()) == ["0.png", "1.png", "2.png"]
        assert opened(output / folder / "0.png").size == (20, 18)  # as the input
    assert (output / "index.html").is_file()
    assert opened(output / "grid.png").height > 6 * 100


def test_a_translation_is_what_the_generator_answers_at_the_size_of_training(run):
    run("--direction", "AtoB", "--output_size", "net")
    net, _ = load_generator(Path("saved_models/tiny/G_AB.safetensors"))
    x = load_picture(Path("datasets/tiny/testA/1.png"), (16, 16))[None]
    with torch.no_grad():
        expected = range_to_bytes(net(x)[0]).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels("generated_images/tiny/test/fake_B/1.png"), expected)
    assert not Path("generated_images/tiny/test/fake_A").exists()


def test_native_scale_translates_each_picture_at_its_own_size(run):
    Path("photos").mkdir()
    noise_picture(1, (33, 21)).save("photos/wide.png")
    noise_picture(2, (8, 8)).save("photos/least.png")
    run("--input", "photos", "--direction", "BtoA", "--scale", "native")
    net, _ = load_generator(Path("saved_models/tiny/G_BA.safetensors"))
    with torch.no_grad():
        expected = range_to_bytes(net(load_picture(Path("photos/wide.png"), None)[None])[0]).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels("generated_images/tiny/test/fake_A/wide.png"), expected)


def test_any_epoch_can_be_tested(run):
    run("--epoch", 1, "--direction", "AtoB", "--output_size", "net", "--output", "first")
    run("--epoch", 2, "--direction", "AtoB", "--output_size", "net", "--output", "second")
    run("--direction", "AtoB", "--output_size", "net", "--output", "latest")
    assert np.array_equal(pixels("second/fake_B/0.png"), pixels("latest/fake_B/0.png"))
    assert not np.array_equal(pixels("first/fake_B/0.png"), pixels("latest/fake_B/0.png"))


def test_one_file_of_weights_and_one_picture_are_enough(run):
    shutil.move("saved_models/tiny/G_BA.safetensors", "student.safetensors")
    shutil.rmtree("saved_models")
    noise_picture(1, (30, 40)).save("cat.photo.jpg")
    test_stage.main(["--weights", "student.safetensors", "--input", "cat.photo.jpg", *FP32])
    output = Path("generated_images/tiny/test")
    assert [p.name for p in output.rglob("*.png")].count("cat.photo.png") == 2  # the input and its translation
    assert opened(output / "fake_A/cat.photo.png").size == (30, 40)
    assert not (output / "rec_B").exists()


def test_the_student_that_comes_with_the_project_turns_day_into_night():
    examples = Path(test_stage.__file__).parent / "examples"
    assert (examples / "day2night.safetensors").stat().st_size <= 1.2e6
    Path("day").mkdir()
    for seed in range(900_000, 900_004):  # neither trained on nor tested with
        draw_scene(seed, "day").save(f"day/{seed}.png")
    shutil.copy(examples / "day.png", "day")
    argv = ["--weights", examples / "day2night.safetensors", "--input", "day", "--output", "out", *FP32]
    test_stage.main([*map(str, argv)])
    errors = [
        np.square(pixels(f"out/fake_B/{seed}.png") / 255.0 - np.asarray(draw_scene(seed, "night")) / 255.0).mean()
        for seed in range(900_000, 900_004)
    ]
    assert -10 * np.log10(errors).mean() > 20  # dB; the best recolouring of all pictures by one rule has 18.4
    assert pixels("out/fake_B/day.png").mean() < 0.6 * pixels(examples / "day.png").mean()


def test_names_and_sub_folders_are_kept_and_never_collide(run):
    names = ["a.jpg", "a.png", "b.png", "sub/a.png", "a.jpg.bmp", "<script>&.png", "ü 猫.png", "-dash.png", "50%#?.png"]
    for i, name in enumerate(names):
        Path("in", name).parent.mkdir(parents=True, exist_ok=True)
        noise_picture(i).save(Path("in", name))
    run("--input", "in", "--direction", "AtoB", "--output", "out")
    found = {str(p.relative_to("out/fake_B")) for p in Path("out/fake_B").rglob("*.png")}
    assert found >= {
        "a.jpg.png",
        "a.png.png",
        "b.png",
        "sub/a.png",
        "<script>&.png",
        "ü 猫.png",
        "-dash.png",
        "50%#?.png",
    }
    assert len(found) == len(names)
    page = Path("out/index.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;&amp;" in page
    sources = [unquote(address) for address in re.findall(r'src="([^"]*)"', page)]
    assert len(sources) == 3 * len(names)
    assert all(Path("out", source).is_file() for source in sources)  # relative: the page opens from disk


def test_num_test_limits_and_small_or_torn_pictures_are_skipped(run, capsys):
    run("--num_test", 2, "--direction", "AtoB", "--output", "two")
    assert len(list(Path("two/fake_B").iterdir())) == 2
    Path("in").mkdir()
    for i in range(3):
        noise_picture(i).save(f"in/{i}.png")
    noise_picture(9, (6, 20)).save("in/thin.png")
    run("--input", "in", "--direction", "AtoB", "--scale", "native", "--output", "thin")
    assert len(list(Path("thin/fake_B").iterdir())) == 3
    assert "thin.png (6x20 px, the generator needs 8 px a side)" in capsys.readouterr().err


def test_grey_networks_take_colour_pictures(tmp_path):
    net = build_generator(GeneratorConfig(channels=1, ngf=4, num_residual=1))
    save_generator(Path("grey.safetensors"), net, {"direction": "AtoB", "size": [16, 16], "run_name": "../../x"})
    noise_picture(1).save("cat.png")
    test_stage.main(["--weights", "grey.safetensors", "--input", "cat.png", *FP32])
    assert opened("generated_images/grey/test/fake_B/cat.png").mode == "L"  # a name that leads elsewhere is not used


def test_weights_of_another_project_translate_at_the_pictures_own_size(run, capsys):
    net, _ = load_generator(Path("saved_models/tiny/G_BA.safetensors"))
    torch.save(to_junyanz(net), "9_net_G.pth")
    argv = ["--weights", "9_net_G.pth", "--dataset_name", "tiny", *FP32]
    test_stage.main([*argv, "--direction", "BtoA", "--metrics", "paired,identity", "--output", "there"])
    run("--direction", "BtoA", "--scale", "native", "--output", "here")
    assert np.array_equal(pixels("there/fake_A/0.png"), pixels("here/fake_A/0.png"))
    test_stage.main([*argv, "--num_test", "1"])
    assert "taken for AtoB" in capsys.readouterr().out
    assert Path("generated_images/9_net_G/test/fake_B/0.png").is_file()


# -- measures --------------------------------------------------------------------------------


def test_all_measures_are_printed_and_written(run, capsys):
    scores = run("--metrics", "losses,cycle,identity,paired")
    out = capsys.readouterr().out
    for word in ("PSNR", "match@1", "copy", "mean picture", "cycle", "identity", "loss_D_B"):
        assert word in out
    written = json.loads(Path("generated_images/tiny/test/metrics.json").read_text())
    assert written["AtoB"]["paired"]["model"] == pytest.approx(scores["AtoB"]["paired"]["model"])
    assert written["pictures"] == {"AtoB": 3, "BtoA": 3}
    assert written["step"] == 4


def test_paired_scores_compare_the_written_picture_with_its_truth(run):
    scores = run("--metrics", "paired", "--direction", "AtoB")["AtoB"]["paired"]
    levels = [
        np.abs(
            pixels(f"generated_images/tiny/test/fake_B/{i}.png").astype(float) - pixels(f"datasets/tiny/testB/{i}.png")
        ).mean()
        for i in range(3)
    ]
    assert scores["model"]["L1"] == pytest.approx(np.mean(levels), abs=1e-6)
    copies = [
        np.abs(pixels(f"datasets/tiny/testA/{i}.png").astype(float) - pixels(f"datasets/tiny/testB/{i}.png")).mean()
        for i in range(3)
    ]
    assert scores["copy"]["L1"] == pytest.approx(np.mean(copies), abs=1e-6)


def test_losses_on_the_test_set_equal_those_of_training(run):
    """One test pair, judged by train.py's own objective."""
    scores = run("--metrics", "losses,cycle,identity", "--num_test", 1)
    args = train.settle(train.parse_args(["--dataset_name", "tiny", *TINY]))
    reference = train.make_run(args, train.make_nets(args, {}), Path("datasets/tiny"), torch.device("cpu"))
    for name, net in reference.nets.items():
        net.load_state_dict(load_state(Path("saved_models/tiny/latest.pt"))["nets"][name])
    A, B = (load_picture(Path(f"datasets/tiny/test{d}/0.png"), (16, 16))[None] for d in "AB")
    expected = train.train_step(reference, A, B, train.cyclegan_objective)
    for name in (
        "loss_G",
        "gan_AB",
        "gan_BA",
        "cycle_A",
        "cycle_B",
        "identity_A",
        "identity_B",
        "loss_D_A",
        "loss_D_B",
    ):
        tolerance = 0.01 if name.startswith("loss_D") else 1e-5  # training updates the generators before it judges
        assert scores["losses"][name] == pytest.approx(expected[name].item(), rel=tolerance)
    assert scores["AtoB"]["cycle"] == pytest.approx(expected["cycle_A"].item(), rel=1e-5)
    assert scores["AtoB"]["identity"] == pytest.approx(expected["identity_B"].item(), rel=1e-5)


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--run_name", "other"], "no such run; runs found: tiny"),
        (["--run_name", "../tiny"], "expected one folder name"),
        (["--run_name", "tiny", "--epoch", "9"], "expected one of: 1, 2, latest"),
        (["--run_name", "tiny", "--input", "nowhere"], "no such file or folder"),
        (["--run_name", "tiny", "--input", "saved_models"], "no picture inside"),
        (["--run_name", "tiny", "--dataset_name", "other"], "nearest existing: tiny"),
        (["--run_name", "tiny", "--metrics", "psnr"], "given 'psnr', expected some of losses,cycle,identity,paired"),
        (["--run_name", "tiny", "--metrics", "paired", "--input", "x"], "--input and --metrics contradict each other"),
        (["--weights", "no.safetensors"], "no such file"),
        (["--weights", "saved_models/tiny/latest.pt"], "holds a whole training state"),
        (["--weights", "saved_models/tiny/G_AB.safetensors", "--direction", "BtoA"], "translates AtoB"),
        (["--weights", "saved_models/tiny/G_AB.safetensors", "--run_name", "tiny"], "contradict each other"),
        (
            ["--weights", "saved_models/tiny/G_AB.safetensors", "--metrics", "cycle"],
            "needs the generators of both directions",
        ),
        (["--run_name", "tiny", "--num_test", "0"], "of at least 1"),
        ([], "saved_models/horse2zebra: no such run; runs found: tiny"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(run, refused, flags, words):
    assert words in refused(test_stage.main, *flags, *FP32)
    assert not Path("generated_images").exists()


def test_unpaired_sets_and_torn_inputs_are_refused(run, refused):
    for path in Path("datasets/tiny/testB").iterdir():
        path.rename(path.with_name(f"other{path.name}"))
    assert "no picture in datasets/tiny/testB has the name" in refused(
        test_stage.main, "--run_name", "tiny", "--metrics", "paired"
    )
    Path("torn.png").write_bytes(b"torn")
    assert "can be read" in refused(test_stage.main, "--run_name", "tiny", "--input", "torn.png")
    shutil.rmtree("datasets/tiny/testA")
    assert "no testA/ inside" in refused(test_stage.main, "--run_name", "tiny")


def test_a_state_of_another_shape_is_refused(run, refused):
    path = Path("saved_models/tiny/latest.pt")
    state = load_state(path)
    state["config"]["D_A"]["ndf"] = 8
    save_state(path, state)
    assert "does not fit the network" in refused(test_stage.main, "--run_name", "tiny", "--metrics", "losses")
    del state["config"]["D_A"]["ndf"]
    save_state(path, state)
    assert "no DiscriminatorConfig" in refused(test_stage.main, "--run_name", "tiny", "--metrics", "losses")
    del state["config"]
    save_state(path, state)
    assert "no whole training state" in refused(test_stage.main, "--run_name", "tiny", "--metrics", "losses")


def test_inputs_are_never_overwritten(run, refused):
    Path("pics/real_A").mkdir(parents=True)
    noise_picture(1).save("pics/real_A/x.png")
    before = Path("pics/real_A/x.png").read_bytes()
    argv = ["--run_name", "tiny", "--input", "pics/real_A", "--output", "pics", "--direction", "AtoB"]
    assert "would overwrite the input" in refused(test_stage.main, *argv)
    assert Path("pics/real_A/x.png").read_bytes() == before
    Path("file").write_text("mine")
    assert "file" in refused(test_stage.main, *argv[:4], "--output", "file")
    assert Path("file").read_text() == "mine"


def test_torn_test_pictures_are_left_out_of_every_measure(run, capsys):
    make_more = Path("datasets/tiny")
    for split in ("testA", "testB", "trainB"):
        whole = (make_more / split / "0.png").read_bytes()
        (make_more / split / "0.png").write_bytes(whole[:400])
    scores = run("--metrics", "losses,cycle,identity,paired")
    assert scores["AtoB"]["paired"]["model"]["PSNR"] > 0
    assert "skipped, unreadable" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s["args"].update(img_height="abc"),
        lambda s: s["args"].update(img_height=10**9),
        lambda s: s["args"].update(gan_loss="zzz"),
        lambda s: s["args"].clear(),
        lambda s: (s["nets"].pop("D_A"), s["config"].pop("D_A")),
        lambda s: (s["nets"].clear(), s["config"].clear()),
    ],
)
def test_a_state_edited_by_hand_is_refused(run, refused, spoil):
    state = load_state(Path("saved_models/tiny/latest.pt"))
    spoil(state)
    save_state(Path("saved_models/tiny/latest.pt"), state)
    refused(test_stage.main, "--run_name", "tiny", "--metrics", "losses")


def test_a_generator_under_the_other_ones_name_is_refused(run, refused):
    shutil.copy("saved_models/tiny/G_AB.safetensors", "saved_models/tiny/G_BA.safetensors")
    assert "its recipe says AtoB, its name BtoA" in refused(test_stage.main, "--run_name", "tiny")


# -- many pictures, large pictures --------------------------------------------------------------


def numbers(path):
    return np.asarray(opened(path)).astype(int)


def test_pictures_of_several_sizes_come_out_as_they_do_one_by_one(run, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(40):
        noise_picture(i, (20, 18) if i % 7 else (24, 16)).save(tmp_path / "in" / f"{i:02d}.png")
    run("--input", "in", "--scale", "native", "--output", "many")
    monkeypatch.setattr(test_stage, "BATCH", 1)
    run("--input", "in", "--scale", "native", "--output", "single")
    names = sorted(p.relative_to("many") for p in Path("many").rglob("*.png") if p.name != "grid.png")
    assert len(names) > 200
    for name in names:
        assert np.abs(numbers(Path("many", name)) - numbers(Path("single", name))).max() <= 1, name


def test_what_is_there_is_skipped_and_what_is_missing_is_finished(run, capsys):
    run()
    folder = Path("generated_images/tiny/test")
    Path(folder / "fake_B/0.png").unlink()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png") if p.name != "grid.png"}
    capsys.readouterr()
    run("--skip_existing")
    out = capsys.readouterr().out
    assert "AtoB: 1 pictures in" in out
    assert "2 were there already" in out
    changed = {str(p.relative_to(folder)) for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert changed == {"real_A/0.png", "rec_A/0.png"}
    assert (folder / "fake_B/0.png").exists()
    assert (folder / "index.html").read_text().count("<figure>") == 18


def test_tiles_cover_a_picture_overlap_and_leave_what_does_not_depend_on_them():
    for length, tile in ((100, 32), (64, 64), (65, 64), (40, 64), (1000, 96)):
        starts = test_stage.tile_starts(length, tile)
        assert starts[0] == 0
        assert starts[-1] + min(tile, length) == length
        assert all(0 < b - a <= tile - tile // 4 for a, b in pairwise(starts))
    pictures = torch.rand(2, 3, 50, 131) * 2 - 1
    assert torch.allclose(test_stage.blend_tiles(lambda x: x * 2, pictures, 32), pictures * 2, atol=1e-6)


def test_a_picture_in_tiles_equals_the_whole_where_no_norm_looks_further_than_the_network():
    config = GeneratorConfig(ngf=4, num_residual=1, n_downsampling=1, norm="none")
    net = build_generator(config, "kaiming").eval()
    picture, inner = torch.rand(1, 3, 120, 100) * 2 - 1, []

    def answer(x):
        y = net(x)
        inner.append(x.shape)
        return y

    with torch.no_grad():
        whole, tiled = net(picture), test_stage.blend_tiles(answer, picture, 80)
    assert inner == [(1, 3, 80, 80)] * 4
    assert (whole - tiled).abs().mean() < 0.02 * whole.abs().mean()  # a tile's border is padded by reflection


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("upsample", ["deconv", "resize"])
def test_the_receptive_field_is_where_an_output_pixel_looks(blocks, upsample):
    config = GeneratorConfig(ngf=4, num_residual=blocks, norm="none", upsample=upsample)
    net = build_generator(config, "kaiming").double()
    picture = torch.rand(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    sides = []
    for place in range(78, 84):  # the field varies with the place on the grid of the halvings
        (slope,) = torch.autograd.grad(net(picture)[0, :, place, place].sum(), picture)
        seen = slope[0].abs().sum(0).nonzero()
        sides.append((seen.amax(0) - seen.amin(0) + 1).max().item())
    assert max(sides) <= config.receptive_field <= max(sides) + 4


def lopsided_picture():
    """One half nearly flat, the other noise: tiles of very different statistics."""
    picture = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture[..., :48] = 0.01 * picture[..., :48] + 0.5
    return picture


def test_all_tiles_are_normalised_alike_so_that_a_flat_one_does_not_stand_out():
    net = build_generator(GeneratorConfig(ngf=8, num_residual=2), "normal").eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.normal_(module.weight, 0, 0.2)
    picture = lopsided_picture()
    with torch.no_grad():
        whole, alone = net(picture), test_stage.blend_tiles(net, picture, 48)
        shared = test_stage.translate_tiled(net, net, picture, 48)
    assert (shared - whole).abs().mean() < 0.6 * (alone - whole).abs().mean()
    assert all(not module._forward_hooks for module in net.modules())


def test_one_tile_that_holds_the_picture_gives_what_the_whole_gives():
    net = build_generator(GeneratorConfig(ngf=4, num_residual=1), "normal").eval()
    with torch.no_grad():
        whole = net(lopsided_picture())
        assert torch.allclose(test_stage.translate_tiled(net, net, lopsided_picture(), 96), whole, atol=1e-5)


def test_a_tile_smaller_than_the_receptive_field_is_warned_about(run, capsys):
    run("--tile", "16", "--scale", "native")
    assert "warning: --tile 16: a pixel depends on 41 px around it" in capsys.readouterr().err
    picture = numbers(Path("generated_images/tiny/test/fake_B/0.png"))
    assert picture.shape == (18, 20, 3)
