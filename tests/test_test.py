import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset, noise_image, tiny_model, tiny_networks
from PIL import Image
from tiny_runs import save_pair, save_run

import test as test_stage
from models import GeneratorConfig, build_generator
from toolkit import images, inference, metrics
from toolkit.checkpoints import load_state, networks_of, save_state
from toolkit.converters import to_junyanz
from toolkit.gallery import WRITTEN
from toolkit.images import load_image, range_to_bytes
from toolkit.weights import load_generator, save_generator

FP32 = ["--precision", "fp32", "--device", "cpu"]
STATE = Path("saved_models/tiny/latest.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set of test pairs with a short run, made once."""
    root = tmp_path_factory.mktemp("trained")
    here = Path.cwd()
    make_dataset(root / "datasets" / "tiny", (4, 4, 3, 3))
    os.chdir(root)
    save_run()
    os.chdir(here)
    return root


@pytest.fixture
def run(trained, tmp_path):
    """The run, copied into the test's own folder; returns test.main with its flags."""
    for name in ("datasets", "saved_models"):
        shutil.copytree(trained / name, tmp_path / name)
    return lambda *argv: test_stage.main(["--run_name", "tiny", *FP32, *map(str, argv)])


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image


def pixels(path):
    return np.asarray(opened(path))


def numbers(path):
    return pixels(path).astype(int)


def strict_json(path):
    """JSON as other programs read it."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def test_a_run_is_tested_on_the_whole_test_split(run):
    run()
    output = Path("generated_images/tiny/test")
    for folder in ("real_A", "fake_B", "rec_A", "real_B", "fake_A", "rec_B"):
        assert sorted(p.name for p in (output / folder).iterdir()) == ["0.png", "1.png", "2.png"]
        assert opened(output / folder / "0.png").size == (20, 18)  # as the input
    assert (output / "index.html").is_file()
    assert opened(output / "grid.png").height > 6 * 100


@pytest.mark.slow
def test_a_run_that_train_py_left_is_tested(tiny):
    import train

    train.main(["--dataset_name", "tiny", *TINY, "--num_epochs", "2", "--checkpoint_interval", "1"])
    scores = test_stage.main(["--dataset_name", "tiny", *FP32, "--metrics", "losses,cycle,identity,paired"])
    assert scores.keys() == {"AtoB", "BtoA", "losses"}
    written = strict_json("generated_images/tiny/test/metrics.json")
    assert (written["epoch"], written["images"]) == (2, {"AtoB": 2, "BtoA": 2})


def test_a_translation_is_what_the_generator_gives_at_the_size_of_training(run):
    run("--direction", "AtoB", "--output_size", "net")
    net, _ = load_generator(Path("saved_models/tiny/G_AB.safetensors"))
    x = load_image(Path("datasets/tiny/testA/1.png"), (16, 16))[None]
    with torch.no_grad():
        expected = range_to_bytes(net(x)[0]).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels("generated_images/tiny/test/fake_B/1.png"), expected)
    assert not Path("generated_images/tiny/test/fake_A").exists()


def test_native_scale_translates_each_image_at_its_own_size(run):
    Path("photos").mkdir()
    noise_image(1, (33, 21)).save("photos/wide.png")
    noise_image(2, (8, 8)).save("photos/least.png")
    run("--input", "photos", "--direction", "BtoA", "--scale", "native")
    net, _ = load_generator(Path("saved_models/tiny/G_BA.safetensors"))
    with torch.no_grad():
        expected = range_to_bytes(net(load_image(Path("photos/wide.png"), None)[None])[0]).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels("generated_images/tiny/test/fake_A/wide.png"), expected)


def test_any_epoch_can_be_tested(run):
    run("--epoch", 1, "--direction", "AtoB", "--output_size", "net", "--output", "first")
    run("--epoch", 2, "--direction", "AtoB", "--output_size", "net", "--output", "second")
    run("--direction", "AtoB", "--output_size", "net", "--output", "latest")
    assert np.array_equal(pixels("second/fake_B/0.png"), pixels("latest/fake_B/0.png"))
    assert not np.array_equal(pixels("first/fake_B/0.png"), pixels("latest/fake_B/0.png"))


def test_one_file_of_weights_and_one_image_are_enough(run):
    shutil.move("saved_models/tiny/G_BA.safetensors", "student.safetensors")
    shutil.rmtree("saved_models")
    noise_image(1, (30, 40)).save("cat.photo.jpg")
    test_stage.main(["--weights", "student.safetensors", "--input", "cat.photo.jpg", *FP32])
    output = Path("generated_images/student/test")
    assert [p.name for p in output.rglob("*.png")].count("cat.photo.png") == 2  # the input and its translation
    assert opened(output / "fake_A/cat.photo.png").size == (30, 40)
    assert not (output / "rec_B").exists()


def test_the_student_that_comes_with_the_project_turns_day_into_night():
    from toolkit.synthetic import draw_scene

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
    assert -10 * np.log10(errors).mean() > 20  # dB; the best recolouring of all images by one rule has 18.4
    assert pixels("out/fake_B/day.png").mean() < 0.6 * pixels(examples / "day.png").mean()


def test_the_students_that_come_with_the_project_give_a_horse_stripes_and_take_them_away():
    """Of the photo that comes along: colour goes into black and white, and back."""
    examples = Path(test_stage.__file__).parent / "examples"
    for name, source in (("horse2zebra", examples / "horse.jpg"), ("zebra2horse", "horse2zebra/fake_B/horse.png")):
        weights = examples / f"{name}.safetensors"
        assert weights.stat().st_size <= 1.2e6
        test_stage.main([*map(str, ["--weights", weights, "--input", source, "--output", name, *FP32])])
    paths = {"horse": examples / "horse.jpg", "zebra": "horse2zebra/fake_B/horse.png"}
    paths["back"] = "zebra2horse/fake_A/horse.png"
    patches = {name: pixels(path).astype(float)[55:125, 100:160] for name, path in paths.items()}  # neck and shoulder
    colour = {name: np.ptp(x, axis=2).mean() for name, x in patches.items()}
    steps = {name: np.diff(x.mean(2)[::2, ::2], axis=1) for name, x in patches.items()}  # to the next pixel but one
    stripes = {name: np.abs(x).mean() for name, x in steps.items()}
    assert colour["zebra"] < 0.7 * min(colour["horse"], colour["back"])
    assert stripes["zebra"] > 2 * max(stripes["horse"], stripes["back"])


@pytest.mark.parametrize(
    ("name", "dataset", "direction"),
    [
        ("day2night", "day2night", "AtoB"),
        ("horse2zebra", "horse2zebra", "AtoB"),
        ("zebra2horse", "horse2zebra", "BtoA"),
    ],
)
def test_a_student_that_comes_with_the_project_is_called_as_its_file(name, dataset, direction):
    metadata = load_generator(Path(test_stage.__file__).parent / "examples" / f"{name}.safetensors")[1]
    found = tuple(metadata[key] for key in ("run_name", "dataset_name", "direction"))
    assert found == (name, dataset, direction)


def test_names_and_sub_folders_are_kept_and_never_collide(run):
    names = ["a.jpg", "a.png", "b.png", "sub/a.png", "a.jpg.bmp", "<script>&.png", "ü 猫.png", "-dash.png", "50%#?.png"]
    for i, name in enumerate(names):
        Path("in", name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(i).save(Path("in", name))
    run("--input", "in", "--direction", "AtoB", "--output", "out")
    found = {str(p.relative_to("out/fake_B")) for p in Path("out/fake_B").rglob("*.png")}
    assert found >= {"a.jpg.png", "a.png.png", "b.png", "sub/a.png", "<script>&.png"}
    assert found >= {"ü 猫.png", "-dash.png", "50%#?.png"}
    assert len(found) == len(names)
    page = Path("out/index.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;&amp;" in page
    sources = [unquote(address) for address in re.findall(r'src="([^"]*)"', page)]
    assert len(sources) == 2 * len(names)
    assert all(Path("out", source).is_file() for source in sources)  # relative: the page opens from disk


def test_num_test_limits_and_small_or_torn_images_are_skipped(run, capsys):
    run("--num_test", 2, "--direction", "AtoB", "--output", "two")
    assert len(list(Path("two/fake_B").iterdir())) == 2
    Path("in").mkdir()
    for i in range(3):
        noise_image(i).save(f"in/{i}.png")
    noise_image(9, (6, 20)).save("in/thin.png")
    run("--input", "in", "--direction", "AtoB", "--scale", "native", "--output", "thin")
    assert len(list(Path("thin/fake_B").iterdir())) == 3
    assert "thin.png (6x20 px, the generator needs 8 px a side)" in capsys.readouterr().err


def test_grey_networks_take_colour_images(tmp_path):
    net = build_generator(GeneratorConfig(channels=1, ngf=4, num_residual=1))
    save_generator(Path("grey.safetensors"), net, {"direction": "AtoB", "size": [16, 16], "run_name": "../../x"})
    noise_image(1).save("cat.png")
    test_stage.main(["--weights", "grey.safetensors", "--input", "cat.png", *FP32])
    assert opened("generated_images/grey/test/fake_B/cat.png").mode == "L"  # a name that leads elsewhere is not used


def test_weights_of_another_project_translate_at_the_images_own_size(run, capsys):
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
    written = strict_json("generated_images/tiny/test/metrics.json")
    assert written["AtoB"]["paired"]["model"] == pytest.approx(scores["AtoB"]["paired"]["model"])
    assert written["images"] == {"AtoB": 3, "BtoA": 3}
    assert written["step"] == 4
    page = Path("generated_images/tiny/test/index.html").read_text(encoding="utf-8")
    assert "match@1" in page


def test_a_run_is_tested_on_the_images_it_was_trained_on_unless_others_are_named(trained, tmp_path, refused, capsys):
    shutil.copytree(trained / "datasets", tmp_path / "my sets")
    shutil.copytree(trained / "datasets", tmp_path / "other")
    save_run(argv=("--data_root", "my sets"))
    argv = ["--run_name", "tiny", *FP32, "--direction", "AtoB"]
    for given in ([], ["--epoch", "1"], ["--metrics", "losses"]):
        test_stage.main([*argv, *given])
    shutil.rmtree("my sets")
    for given in ([], ["--epoch", "1"]):
        error = refused(test_stage.main, *argv, *given)
        assert "my sets: held the data sets when the run was trained, and is gone; give their --data_root" in error
    test_stage.main([*argv, "--data_root", "other"])
    test_stage.main([*argv, "--input", "other/tiny/testA"])
    weights = ["--weights", "saved_models/tiny/G_AB.safetensors", *FP32]  # may be a stranger's: no path of its counts
    assert "datasets/tiny: no such data set" in refused(test_stage.main, *weights)


def test_a_model_below_the_mean_image_is_told_so_where_its_scores_are(run, capsys):
    for path in Path("datasets/tiny").glob("t*B/*.png"):
        Image.new("RGB", (20, 18), (9, 9, 9)).save(path)  # so that their mean is each of them
    scores = run("--metrics", "paired", "--direction", "AtoB")["AtoB"]["paired"]
    assert scores["model"]["PSNR"] < scores["mean picture"]["PSNR"]
    line = f"PSNR {scores['model']['PSNR']:.3g} dB is below"
    assert capsys.readouterr().out.count(line) == 1
    assert line in Path("generated_images/tiny/test/index.html").read_text()


def test_paired_scores_compare_the_written_image_with_its_truth(run):
    scores = run("--metrics", "paired", "--direction", "AtoB")["AtoB"]["paired"]
    levels = []
    copies = []
    for i in range(3):
        truth = numbers(f"datasets/tiny/testB/{i}.png")
        levels.append(np.abs(numbers(f"generated_images/tiny/test/fake_B/{i}.png") - truth).mean())
        copies.append(np.abs(numbers(f"datasets/tiny/testA/{i}.png") - truth).mean())
    assert scores["model"]["L1"] == pytest.approx(np.mean(levels), abs=1e-6)
    assert scores["copy"]["L1"] == pytest.approx(np.mean(copies), abs=1e-6)


def test_truths_are_resized_as_training_resizes_them(run):
    """Pillow and torch disagree: by 2 levels on such images."""
    scores = run("--metrics", "paired", "--output_size", "net")
    nets = networks_of(load_state(STATE), STATE)
    reals = {}
    for domain in "AB":
        paths = [Path(f"datasets/tiny/test{domain}/{i}.png") for i in range(3)]
        reals[domain] = {Path(path.stem): load_image(path, (16, 16))[None] for path in paths}
    expected = metrics.measure_nets(nets, reals, ["paired"], None, "fp32")
    for direction, target in (("AtoB", "B"), ("BtoA", "A")):
        model = scores[direction]["paired"]["model"]
        for name in ("PSNR", "SSIM", "match@1"):
            assert model[name] == pytest.approx(expected[f"{name}_{target}"], abs=1e-3), name


def test_the_mean_image_is_that_of_the_training_images(run):
    scores = run("--metrics", "paired", "--direction", "AtoB", "--output_size", "net")["AtoB"]["paired"]
    train = [range_to_bytes(load_image(path, (16, 16))).double() for path in Path("datasets/tiny/trainB").iterdir()]
    mean = torch.stack(train).mean(0).round()
    errors = []
    for i in range(3):
        truth = range_to_bytes(load_image(Path(f"datasets/tiny/testB/{i}.png"), (16, 16)))
        errors.append((mean - truth).abs().mean().item())
    assert scores["mean picture"]["L1"] == pytest.approx(np.mean(errors), abs=1e-6)


def test_what_is_no_number_is_null_in_json(run):
    for path in Path("datasets/tiny").rglob("*.png"):
        noise_image(str(path), (8, 8)).save(path)
    scores = run("--metrics", "paired,cycle", "--direction", "AtoB")
    assert np.isnan(scores["AtoB"]["paired"]["model"]["SSIM"])  # its window has 11 px
    written = strict_json("generated_images/tiny/test/metrics.json")
    assert written["AtoB"]["paired"]["model"]["SSIM"] is None
    assert written["AtoB"]["paired"]["model"]["PSNR"] > 0
    assert written["AtoB"]["cycle"] > 0


def test_losses_on_the_test_set_equal_those_of_training(run):
    """One test pair, looked at by the step of training itself."""
    scores = run("--metrics", "losses,cycle,identity", "--num_test", 1)
    reference = tiny_model(nets=networks_of(load_state(STATE), STATE))
    A, B = (load_image(Path(f"datasets/tiny/test{d}/0.png"), (16, 16))[None] for d in "AB")
    expected = reference.step(A, B)
    terms = ("gan_AB", "gan_BA", "cycle_A", "cycle_B", "identity_A", "identity_B")
    for name in ("loss_G", *terms, "loss_D_A", "loss_D_B"):
        assert scores["losses"][name] == pytest.approx(expected[name].item(), rel=1e-5), name
    assert scores["AtoB"]["cycle"] == pytest.approx(expected["cycle_A"].item(), rel=1e-5)
    assert scores["AtoB"]["identity"] == pytest.approx(expected["identity_B"].item(), rel=1e-5)


def test_losses_are_those_that_the_run_was_trained_with(run):
    plain = run("--metrics", "losses")["losses"]
    shutil.rmtree("saved_models")
    save_run(argv=["--lambda_cycle", 3, "--lambda_identity", 0, "--gan_loss", "hinge"])
    other = run("--metrics", "losses")["losses"]
    assert plain["loss_G"] != pytest.approx(other["loss_G"])
    assert "identity_A" in plain
    assert "identity_A" not in other
    total = other["gan_AB"] + other["gan_BA"] + 3 * (other["cycle_A"] + other["cycle_B"])
    assert other["loss_G"] == pytest.approx(total)


def test_weights_of_inception_are_read_before_anything_is_done_with_them(run, refused):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    Path("hostile.pth").write_bytes(pickle.dumps(Hostile()))
    argv = ["--run_name", "tiny", *FP32, "--metrics", "kid", "--inception_weights"]
    assert "hostile.pth" in refused(test_stage.main, *argv, "hostile.pth")
    assert "none.pth" in refused(test_stage.main, *argv, "none.pth")
    assert not Path("executed").exists()
    assert not Path("generated_images").exists()


def test_images_are_measured_one_at_a_time(run, monkeypatch):
    alive = []
    plain = images.LazyImages.__getitem__

    def get(lazy, path):
        alive[:] = [reference for reference in alive if reference() is not None]
        assert len(alive) < 3, path  # a pair, and the one that follows
        x = plain(lazy, path)
        alive.append(weakref.ref(x))
        return x

    for path in Path("datasets/tiny").glob("test?/0.png"):
        for i in range(3, 9):
            shutil.copy(path, path.with_name(f"{i}.png"))
    monkeypatch.setattr(images.LazyImages, "__getitem__", get)
    scores = run("--metrics", "cycle,identity,losses")
    assert scores["AtoB"].keys() == {"cycle", "identity"}
    assert len(alive) > 0  # they were counted


def test_a_measure_of_one_domain_needs_no_images_of_the_other(run):
    shutil.rmtree("datasets/tiny/testB")
    assert run("--metrics", "cycle", "--direction", "AtoB")["AtoB"]["cycle"] > 0


def test_lazy_images_are_a_mapping_that_knows_its_paths():
    noise_image(1, (20, 18)).save("a.png")
    noise_image(2, (20, 18)).save("b.png")
    lazy = images.LazyImages([Path("a.png"), Path("gone.png")], (16, 16))
    assert (len(lazy), list(lazy)) == (2, [Path("a.png"), Path("gone.png")])
    assert torch.equal(lazy[Path("a.png")], load_image(Path("a.png"), (16, 16))[None])
    assert Path("b.png") not in lazy
    with pytest.raises(images.UnreadableImage):
        lazy[Path("gone.png")]


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--run_name", "other"], "runs found: tiny"),
        (["--run_name", "../tiny"], "--run_name"),
        (["--run_name", "tiny", "--epoch", "9"], "expected one of: 1, 2, latest"),
        (["--run_name", "tiny", "--input", "nowhere"], "--input nowhere"),
        (["--run_name", "tiny", "--input", "saved_models"], "--input saved_models"),
        (["--run_name", "tiny", "--dataset_name", "other"], "nearest existing: tiny"),
        (["--run_name", "tiny", "--metrics", "psnr"], "'psnr', expected some of losses,cycle,identity,paired"),
        (["--run_name", "tiny", "--metrics", "paired", "--input", "x"], "--input and --metrics"),
        (["--run_name", "tiny", "--inception_weights", "x"], "--inception_weights"),
        (["--run_name", "tiny", "--tile", "8"], "--tile"),
        (["--weights", "no.safetensors"], "no.safetensors"),
        (["--weights", "saved_models/tiny/latest.pt"], "saved_models/tiny/latest.pt"),
        (["--weights", "saved_models/tiny/G_AB.safetensors", "--direction", "BtoA"], "translates AtoB"),
        (["--weights", "saved_models/tiny/G_AB.safetensors", "--run_name", "tiny"], "--weights and --run_name"),
        (["--weights", "saved_models/tiny/G_AB.safetensors", "--metrics", "cycle"], "--metrics cycle"),
        (["--weights", "saved_models/tiny/G_AB.safetensors", "--metrics", "losses"], "--metrics losses"),
        (["--run_name", "tiny", "--num_test", "0"], "--num_test"),
        ([], "saved_models/horse2zebra"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(run, refused, given, words):
    assert words in refused(test_stage.main, *given, *FP32)
    assert not Path("generated_images").exists()


def test_unpaired_sets_and_torn_inputs_are_refused(run, refused):
    for path in Path("datasets/tiny/testB").iterdir():
        path.rename(path.with_name(f"other{path.name}"))
    assert "datasets/tiny/testB" in refused(test_stage.main, "--run_name", "tiny", "--metrics", "paired")
    Path("torn.png").write_bytes(b"torn")
    assert "error: torn.png: cannot be read" in refused(test_stage.main, "--run_name", "tiny", "--input", "torn.png")
    shutil.rmtree("datasets/tiny/testA")
    assert "no testA/ inside" in refused(test_stage.main, "--run_name", "tiny")


def test_a_state_of_another_shape_is_refused(run, refused):
    state = load_state(STATE)
    state["config"]["D_A"]["ndf"] = 8
    save_state(STATE, state)
    assert "does not fit the network" in refused(test_stage.main, "--run_name", "tiny", "--metrics", "losses")
    del state["config"]["D_A"]["ndf"]
    save_state(STATE, state)
    assert "no DiscriminatorConfig" in refused(test_stage.main, "--run_name", "tiny", "--metrics", "losses")
    del state["config"]
    save_state(STATE, state)
    assert str(STATE) in refused(test_stage.main, "--run_name", "tiny", "--metrics", "losses")


def test_inputs_are_never_overwritten(run, refused):
    Path("pics/real_A").mkdir(parents=True)
    noise_image(1).save("pics/real_A/x.png")
    before = Path("pics/real_A/x.png").read_bytes()
    argv = ["--run_name", "tiny", "--input", "pics/real_A", "--output", "pics", "--direction", "AtoB"]
    assert "--output pics" in refused(test_stage.main, *argv)
    assert Path("pics/real_A/x.png").read_bytes() == before
    Path("file").write_text("mine")
    assert "file" in refused(test_stage.main, *argv[:4], "--output", "file")
    assert Path("file").read_text() == "mine"


def test_torn_test_images_are_left_out_of_every_measure(run, capsys):
    for split in ("testA", "testB", "trainB"):
        path = Path("datasets/tiny", split, "0.png")
        path.write_bytes(path.read_bytes()[:400])
    scores = run("--metrics", "losses,cycle,identity,paired")
    assert scores["AtoB"]["paired"]["model"]["PSNR"] > 0
    assert "skipped, unreadable" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s["args"].update(img_height="abc"),
        lambda s: s["args"].update(img_height=10**9),
        lambda s: s["args"].update(img_height=4),
        lambda s: s["args"].update(gan_loss="zzz"),
        lambda s: s["args"].clear(),
        lambda s: (s["nets"].pop("D_A"), s["config"].pop("D_A")),
        lambda s: (s["nets"].clear(), s["config"].clear()),
        lambda s: ([s["nets"].pop(name) for name in ("G_AB", "G_BA")], [s["config"].pop(n) for n in ("G_AB", "G_BA")]),
    ],
)
def test_a_state_edited_by_hand_is_refused(run, refused, spoil):
    state = load_state(STATE)
    spoil(state)
    save_state(STATE, state)
    refused(test_stage.main, "--run_name", "tiny", "--metrics", "losses")


def test_a_state_whose_networks_need_larger_images_is_refused(tiny, refused):
    save_run(argv=["--img_height", 32, "--img_width", 32], n_downsampling=4)
    state = load_state(STATE)
    state["args"].update(img_height=16, img_width=16)
    save_state(STATE, state)
    words = refused(test_stage.main, "--run_name", "tiny", "--metrics", "losses", *FP32)
    assert "saved_models/tiny/latest.pt" in words
    assert "16x16 px" in words


def test_networks_of_other_channels_are_refused(run, refused):
    grey = tiny_networks(channels=1)
    save_pair(G_AB=grey["G_AB"], G_BA=tiny_networks()["G_BA"])
    assert "saved_models/pair" in refused(test_stage.main, "--run_name", "pair", "--input", "datasets/tiny/testA")
    state = load_state(STATE)
    state["nets"]["D_B"] = grey["D_B"].state_dict()
    state["config"]["D_B"]["channels"] = 1
    save_state(STATE, state)
    assert "saved_models/tiny/latest.pt" in refused(test_stage.main, "--run_name", "tiny", "--metrics", "losses")


def test_a_generator_under_the_other_ones_name_is_refused(run, refused):
    shutil.copy("saved_models/tiny/G_AB.safetensors", "saved_models/tiny/G_BA.safetensors")
    words = refused(test_stage.main, "--run_name", "tiny")
    assert "saved_models/tiny/G_BA.safetensors" in words
    assert "AtoB" in words


# -- many images, large images ---------------------------------------------------------------


def test_images_of_several_sizes_come_out_as_they_do_one_by_one(run, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(40):
        noise_image(i, (20, 18) if i % 7 else (24, 16)).save(tmp_path / "in" / f"{i:02d}.png")
    how = ["--input", "in", "--direction", "both", "--round_trip", "--scale", "native", "--output"]
    run(*how, "many")
    monkeypatch.setattr(inference, "BATCH", 1)
    run(*how, "single")
    names = sorted(p.relative_to("many") for p in Path("many").rglob("*.png") if p.name != "grid.png")
    assert len(names) > 200
    for name in names:
        assert np.abs(numbers(Path("many", name)) - numbers(Path("single", name))).max() <= 1, name


def test_what_exists_is_skipped_and_what_is_missing_is_finished(run, capsys):
    run()
    folder = Path("generated_images/tiny/test")
    Path(folder / "fake_B/0.png").unlink()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png") if p.name != "grid.png"}
    capsys.readouterr()
    run("--skip_existing")
    out = capsys.readouterr().out
    assert "AtoB: 1 image in" in out
    assert "2 existed already" in out
    changed = {str(p.relative_to(folder)) for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert changed == {"real_A/0.png", "rec_A/0.png", "truth_B/0.png"}
    assert (folder / "fake_B/0.png").exists()
    assert (folder / "index.html").read_text().count("<figure>") == 24


@pytest.mark.parametrize("content", [b"torn", None])
def test_a_result_that_cannot_be_read_does_not_count_as_existing(run, content):
    run()
    path = Path("generated_images/tiny/test/fake_B/0.png")
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2] if content is None else content)
    run("--skip_existing", "--metrics", "paired")
    assert path.read_bytes() == before


def test_what_a_measure_lacks_is_said_before_anything_is_translated(run, refused):
    for path in Path("datasets/tiny/testB").iterdir():
        path.rename(path.with_stem(f"b{path.stem}"))
    argv = ["--run_name", "tiny", *FP32, "--metrics"]
    assert "has the name of one in testA" in refused(test_stage.main, *argv, "paired")
    shutil.rmtree("datasets/tiny/trainB")
    assert "no trainB/ inside" in refused(test_stage.main, *argv, "paired", "--direction", "AtoB")
    shutil.rmtree("datasets/tiny/testB")
    for measure in ("identity", "losses"):
        assert "no testB/ inside" in refused(test_stage.main, *argv, measure, "--direction", "AtoB")
    assert not Path("generated_images").exists()


def test_truths_of_unreadable_images_alone_are_none(run, refused):
    for path in Path("datasets/tiny/testB").iterdir():
        if path.stem != "0":
            path.rename(path.with_stem(f"b{path.stem}"))
    Path("datasets/tiny/testA/0.png").write_bytes(b"torn")
    argv = ["--run_name", "tiny", *FP32, "--metrics", "paired", "--direction", "AtoB"]
    assert "has the name of one in testA" in refused(test_stage.main, *argv)


def test_the_gallery_is_there_when_a_measure_fails(run, monkeypatch):
    def fail(*_):
        raise OSError(5, "gone")

    monkeypatch.setattr(test_stage, "measure", fail)
    with pytest.raises(SystemExit):
        run("--metrics", "cycle")
    assert (Path("generated_images/tiny/test") / "index.html").is_file()


def test_the_spike_is_that_of_the_maps_of_the_test_images(run):
    scores = run("--metrics", "spike")
    nets = networks_of(load_state(STATE), STATE)
    for direction, net in (("AtoB", "G_AB"), ("BtoA", "G_BA")):
        paths = sorted(Path(f"datasets/tiny/test{direction[0]}").iterdir())
        reals = images.LazyImages(paths, (16, 16))
        assert scores[direction]["spike"] == pytest.approx(metrics.mean_spike(nets[net], reals, "fp32"), rel=1e-5)
        assert 0 < scores[direction]["spike"] < 1


def test_scores_stay_as_long_as_their_images_do(run):
    path = Path("generated_images/tiny/test/metrics.json")
    run("--metrics", "cycle")
    run()
    assert path.is_file(), "the same images again"
    weights = ["--weights", "saved_models/tiny/G_AB.safetensors", "--dataset_name", "tiny", *FP32]
    test_stage.main([*weights, "--output", str(path.parent)])
    assert not path.exists()
    run("--metrics", "cycle")
    run("--scale", "native")
    assert not path.exists()
    for text in ("[]", '{"accuracy": 0.93}'):
        path.write_text(text)  # of somebody else
        run()
        assert path.read_text() == text


def test_a_tile_smaller_than_the_receptive_field_is_warned_about(run, capsys):
    run("--tile", "16", "--scale", "native")
    assert "warning: --tile 16: a pixel depends on 41 px around it" in capsys.readouterr().err
    assert numbers("generated_images/tiny/test/fake_B/0.png").shape == (18, 20, 3)


def test_a_tile_smaller_than_the_network_takes_is_refused(tiny, refused):
    save_run(argv=["--img_height", 32, "--img_width", 32], n_downsampling=4)
    noise_image(1, (64, 48)).save("a.png")
    argv = ["--run_name", "tiny", "--input", "a.png", "--scale", "native", *FP32, "--tile"]
    words = refused(test_stage.main, *argv, "16")
    assert "--tile 16" in words
    assert "32 px" in words
    refused(test_stage.main, *argv, "31")
    test_stage.main([*argv, "32"])
    assert opened("generated_images/tiny/test/fake_B/a.png").size == (64, 48)


def test_one_large_photo_does_not_make_a_large_grid(run, monkeypatch):
    Path("in").mkdir()
    noise_image(0, (1500, 400)).save("in/0.png")
    for i in range(1, 4):
        noise_image(i, (30, 40)).save(f"in/{i}.png")
    held = []
    plain = test_stage.images.draw_grid
    monkeypatch.setattr(test_stage.images, "draw_grid", lambda rows: held.extend(rows) or plain(rows))
    run("--input", "in", "--direction", "AtoB")
    assert [(label, tuple(x.shape)) for label, x in held] == [
        (folder, (4, 3, 68, 256)) for folder in ("real_A", "fake_B")
    ]
    assert opened("generated_images/tiny/test/grid.png").width < 4 * 300


def test_of_many_images_the_grid_shows_some_that_lie_apart(run):
    Path("in").mkdir()
    for i in range(13):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(f"in/{i}.png")
    run("--input", "in", "--direction", "AtoB")
    grid = numbers("generated_images/tiny/test/grid.png")
    middle = grid[60, :, :]
    shown = {red for red, green, blue in map(tuple, middle) if green == blue == 0 and red % 40 == 0}
    assert shown >= {40, 80, 120, 160, 200}
    assert len(shown) == 6


def test_the_gallery_shows_small_copies_that_lead_to_the_full_images(run):
    Path("in").mkdir()
    noise_image(0, (600, 300)).save("in/large.png")
    noise_image(1).save("in/small.png")
    run("--input", "in")
    output = Path("generated_images/tiny/test")
    page = Path(output / "index.html").read_text()
    for kind in ("real_A", "fake_B"):
        assert f'href="{kind}/large.png"><img loading="lazy" src="thumbnails/{kind}/large.jpg"' in page
        assert opened(output / "thumbnails" / kind / "large.jpg").size == (256, 128)
        assert f'src="{kind}/small.png"' in page
        assert opened(output / kind / "large.png").size == (600, 300)
    assert page.count("<img") == 4
    shutil.rmtree(output / "thumbnails")  # as an earlier version left it
    run("--input", "in", "--skip_existing")
    assert Path(output / "thumbnails/fake_B/large.jpg").is_file()


def test_the_gallery_names_the_domains_and_shows_the_truth(run):
    Path("datasets/tiny").rename("datasets/horse2zebra")
    Path("datasets/horse2zebra/testB/1.png").write_bytes(b"torn")
    run("--dataset_name", "horse2zebra", "--direction", "AtoB")
    output = Path("generated_images/tiny/test")
    page = Path(output / "index.html").read_text()
    assert "<h2>horse → zebra: 3 images</h2>" in page
    assert "<h1>tiny, epoch 2, step 4</h1>" in page
    for words in ("horse as it was given", "the translation to zebra", "translated back to horse"):
        assert words in page
    assert sorted(path.name for path in Path(output / "truth_B").iterdir()) == ["0.png", "2.png"]
    assert np.array_equal(pixels(output / "truth_B/2.png"), pixels("datasets/horse2zebra/testB/2.png"))
    assert page.count("<figcaption>truth_B") == 2


def test_photos_are_translated_one_way_and_not_back_unless_that_is_wanted(run, capsys):
    noise_image(1).save("a.png")
    output = Path("generated_images/tiny/test")

    def folders(*argv):
        shutil.rmtree(output, ignore_errors=True)
        run("--input", "a.png", *argv)
        return {path.name for path in output.iterdir() if path.is_dir()}

    assert folders() == {"real_A", "fake_B"}
    assert "translated AtoB; --direction chooses another" in capsys.readouterr().out
    assert folders("--round_trip", "--direction", "BtoA") == {"real_B", "fake_A", "rec_B"}
    assert folders("--direction", "both") == {"real_A", "fake_B", "real_B", "fake_A"}
    run("--no-round_trip", "--output", "plain")
    assert not Path("plain/rec_A").exists()


def test_tiles_are_cut_at_the_images_own_size(run, refused):
    noise_image(1, (64, 48)).save("a.png")
    run("--input", "a.png", "--tile", 48, "--output", "tiles")
    run("--input", "a.png", "--output", "train")
    run("--input", "a.png", "--scale", "native", "--output", "native")
    result = {name: numbers(f"{name}/fake_B/a.png") for name in ("tiles", "train", "native")}
    assert np.abs(result["tiles"] - result["native"]).mean() < np.abs(result["train"] - result["native"]).mean()
    words = refused(test_stage.main, "--run_name", "tiny", "--input", "a.png", "--tile", 48, "--scale", "train")
    assert "--tile" in words
    assert "--scale train" in words


def test_a_test_clears_what_the_one_before_left(run, capsys):
    run("--metrics", "cycle")
    output = Path("generated_images/tiny/test")
    Path(output / "fake_B/mine.png").write_text("mine")
    capsys.readouterr()
    run("--num_test", 1, "--direction", "AtoB", "--no-round_trip")
    left = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    results = {"real_A/0.png", "fake_B/0.png", "truth_B/0.png", "fake_B/mine.png"}
    assert left == {"grid.png", "index.html", WRITTEN, *results}
    out = capsys.readouterr().out
    assert "removed 21 files of an earlier test" in out
    assert "files that this test did not write: 1, such as" in out


def test_a_result_of_the_test_before_can_be_the_input_of_this_one(run):
    run("--direction", "AtoB")
    output = Path("generated_images/tiny/test")
    before = {path: path.read_bytes() for path in output.glob("*/*.png")}
    run("--direction", "BtoA", "--input", output)
    assert len(before) == 12
    assert all(path.read_bytes() == content for path, content in before.items())


def test_paired_images_are_scored_one_at_a_time(run, monkeypatch):
    alive = []
    plain = test_stage.as_bytes

    def as_bytes(*args, **kwargs):
        alive[:] = [reference for reference in alive if reference() is not None]
        assert len(alive) <= 5  # three that belong together, while those before are let go
        x = plain(*args, **kwargs)
        alive.append(weakref.ref(x))
        return x

    for split in ("testA", "testB"):
        for i in range(12):  # larger than the copies that match@1 compares
            noise_image(f"{split}{i}", (90, 80)).save(f"datasets/tiny/{split}/{i}.png")
    monkeypatch.setattr(test_stage, "as_bytes", as_bytes)
    scores = run("--metrics", "paired", "--direction", "AtoB")
    assert scores["AtoB"]["paired"]["model"]["PSNR"] > 0
    assert len(alive) > 0


MEASURED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import inference, metrics, test
metrics.ssim = lambda output, target: 0.5  # takes most of the time
inference.AHEAD_PIXELS = 0  # few wait for a busy network in any case; here none
inference.THREADS = 1
peaks = []
for name in ("few", "many"):
    test.main(["--run_name", "tiny", "--dataset_name", name, "--metrics", "paired", "--direction", "AtoB"])
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks)
assert peaks[1] - peaks[0] < 40, peaks
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="resource")
def test_memory_does_not_grow_with_the_number_of_photos(run):
    """A photo takes 2.4 MB in bytes; twelve more, with their translations and truths, would take 86 at least."""
    for name, count in (("few", 3), ("many", 15)):
        make_dataset(Path("datasets", name), (2, 2, 0, 0))
        for i in range(count):
            for domain in "AB":
                Image.effect_noise((1000, 800), 50).convert("RGB").save(f"datasets/{name}/test{domain}/{i}.jpg")
    root = str(Path(test_stage.__file__).parent)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}  # else what is freed stays with the process
    subprocess.run([sys.executable, "-c", MEASURED, root], check=True, env=environment)


# -- FID and KID -----------------------------------------------------------------------------


@pytest.mark.slow
def test_kid_is_taken_against_the_test_and_the_training_images(tiny, inception):
    save_run()
    argv = ["--dataset_name", "tiny", "--metrics", "kid", "--inception_weights", str(inception), *FP32]
    table = test_stage.main(argv)["AtoB"]["distribution"]
    assert table.keys() == {"testB", "trainB"}
    assert (table["testB"]["translated"], table["testB"]["real"], table["trainB"]["real"]) == (2, 2, 4)
    assert table["testB"]["KID"] != table["trainB"]["KID"]
