import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset, noise_image, tiny_model, tiny_networks
from PIL import Image
from tiny_runs import save_pair, save_run

import test as test_command
import train
from models import DIRECTIONS, GeneratorConfig, build_generator
from toolkit import gallery, images, inference, metrics
from toolkit.checkpoints import load_state, networks_of, save_state
from toolkit.converters import to_junyanz
from toolkit.images import load_image, range_to_bytes
from toolkit.inference import Translator
from toolkit.synthetic import draw_scene
from toolkit.weights import load_generator, save_generator

FP32 = ["--precision", "fp32", "--device", "cpu"]
ROOT = Path(test_command.__file__).parent
EXAMPLES = ROOT / "examples"
STATE = Path("saved_models/tiny/latest.pt")
OUTPUT = Path("generated_images/tiny/test")
PHOTOS = Path("generated_images/tiny/translated")  # results of --input


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
    """The run, copied into the test's own folder; returns test.main with its options."""
    for name in ("datasets", "saved_models"):
        shutil.copytree(trained / name, tmp_path / name)
    return lambda *argv: call("--run_name", "tiny", *argv)


def call(*argv):
    return test_command.main([*map(str, argv), *FP32])


def save_noise(folder, *names, size=(20, 18)):
    """Write images under names, and return their folder."""
    for seed, name in enumerate(names):
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(seed, size).save(Path(folder, name))
    return folder


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image


def numbers(path):
    return np.asarray(opened(path)).astype(int)


def files_in(folder):
    """Without the record of results and the lock."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name not in (gallery.RECORD, ".lock")]
    return {str(path.relative_to(folder)) for path in paths}


def strict_json(path):
    """JSON as other programs read it."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


# -- what is translated ----------------------------------------------------------------------


def test_a_run_is_tested_on_the_whole_test_split(run):
    run()
    for folder in ("real_A", "fake_B", "rec_A", "real_B", "fake_A", "rec_B"):
        assert sorted(path.name for path in (OUTPUT / folder).iterdir()) == ["0.png", "1.png", "2.png"]
        assert opened(OUTPUT / folder / "0.png").size == (20, 18)  # as the input
    assert (OUTPUT / "index.html").is_file()
    assert opened(OUTPUT / "grid.png").height > 6 * 100


@pytest.mark.slow
def test_a_run_that_train_py_left_is_tested(tiny):
    import train

    train.main(["--dataset_name", "tiny", *TINY, "--num_epochs", "2", "--checkpoint_interval", "1"])
    scores = call("--dataset_name", "tiny", "--metrics", "losses,cycle,identity,paired")
    assert scores.keys() == {"AtoB", "BtoA", "losses"}
    written = strict_json(OUTPUT / "metrics.json")
    assert (written["epoch"], written["images"]) == (2, {"AtoB": 2, "BtoA": 2})


@pytest.mark.parametrize(
    ("direction", "options", "size"),
    [(DIRECTIONS[0], ["--output_size", "net"], (16, 16)), (DIRECTIONS[1], ["--scale", "native"], None)],
)
def test_a_translation_is_what_the_generator_gives_at_the_chosen_size(run, direction, options, size):
    save_noise("photos", "wide.png", size=(33, 21))
    save_noise("photos", "smallest.png", size=(8, 8))
    run("--input", "photos", "--direction", direction, *options)
    net, _ = load_generator(Path(f"saved_models/tiny/{direction.generator}.safetensors"))
    for name in ("wide.png", "smallest.png"):
        with torch.no_grad():
            expected = range_to_bytes(net(load_image(Path("photos", name), size)[None])[0]).permute(1, 2, 0)
        assert np.array_equal(numbers(PHOTOS / f"fake_{direction.target}" / name), expected.numpy())
    assert not (PHOTOS / f"fake_{direction.source}").exists()


def test_any_epoch_can_be_tested(run):
    outputs = {}
    for epoch in ("1", "2", "latest"):
        run("--epoch", epoch, "--direction", "AtoB", "--output_size", "net", "--output", epoch)
        outputs[epoch] = numbers(Path(epoch, "fake_B/0.png"))
    assert np.array_equal(outputs["2"], outputs["latest"])
    assert not np.array_equal(outputs["1"], outputs["latest"])


def test_one_file_of_weights_and_one_image_are_enough(run):
    shutil.move("saved_models/tiny/G_BA.safetensors", "student.safetensors")
    shutil.rmtree("saved_models")
    save_noise(".", "cat.photo.jpg", size=(30, 40))
    call("--weights", "student.safetensors", "--input", "cat.photo.jpg")
    output = Path("generated_images/student/translated")
    assert files_in(output) >= {"real_B/cat.photo.png", "fake_A/cat.photo.png"}
    assert opened(output / "fake_A/cat.photo.png").size == (30, 40)
    assert not (output / "rec_B").exists()


def test_photos_are_translated_one_way_and_not_back_unless_that_is_wanted(run, capsys):
    save_noise(".", "a.png")

    def folders(*argv):
        shutil.rmtree(PHOTOS, ignore_errors=True)
        run("--input", "a.png", *argv)
        return {path.name for path in PHOTOS.iterdir() if path.is_dir()}

    assert folders() == {"real_A", "fake_B"}
    assert "translates AtoB; --direction chooses the other way" in capsys.readouterr().out
    assert folders("--round_trip", "--direction", "BtoA") == {"real_B", "fake_A", "rec_B"}
    assert folders("--direction", "both") == {"real_A", "fake_B", "real_B", "fake_A"}
    run("--no-round_trip", "--output", "plain")
    assert not Path("plain/rec_A").exists()


def test_names_and_sub_folders_are_kept_and_shown_on_the_page(run):
    names = ["a.jpg", "a.png", "b.png", "sub/a.png", "a.jpg.bmp", "<script>&.png", "ü 猫.png", "-dash.png", "50%#?.png"]
    save_noise("in", *names)
    run("--input", "in", "--direction", "AtoB", "--output", "out")
    found = files_in("out/fake_B")
    assert found >= {"a.jpg.png", "a.png.png", "b.png", "sub/a.png", "<script>&.png", "ü 猫.png", "50%#?.png"}
    assert len(found) == len(names)
    sources = [unquote(x) for x in re.findall(r'src="([^"]*)"', Path("out/index.html").read_text(encoding="utf-8"))]
    assert len(sources) == 2 * len(names)
    assert all(Path("out", source).is_file() for source in sources)  # relative: the page can be opened from disk


def test_num_test_limits_and_small_images_are_skipped(run, capsys):
    run("--num_test", 2, "--direction", "AtoB", "--output", "two")
    assert len(list(Path("two/fake_B").iterdir())) == 2
    save_noise("in", "0.png", "1.png", "2.png")
    save_noise("in", "thin.png", size=(6, 20))
    run("--input", "in", "--direction", "AtoB", "--scale", "native", "--output", "thin")
    assert len(list(Path("thin/fake_B").iterdir())) == 3
    assert "thin.png (6x20 px, the generator needs 8 px a side)" in capsys.readouterr().err


def test_grey_networks_take_colour_images():
    net = build_generator(GeneratorConfig(channels=1, ngf=4, num_residual=1))
    save_generator(Path("grey.safetensors"), net, {"direction": "AtoB", "size": [16, 16], "run_name": "../../x"})
    save_noise(".", "cat.png")
    call("--weights", "grey.safetensors", "--input", "cat.png")
    assert opened("generated_images/grey/translated/fake_B/cat.png").mode == "L"  # the run_name in a file is not used


def test_weights_of_another_project_translate_at_256_px_unless_asked_otherwise(run, capsys):
    net, _ = load_generator(Path("saved_models/tiny/G_BA.safetensors"))
    torch.save(to_junyanz(net), "9_net_G.pth")
    argv = ["--weights", "9_net_G.pth", "--dataset_name", "tiny"]
    call(*argv, "--direction", "BtoA", "--metrics", "paired", "--scale", "native", "--output", "there")
    run("--direction", "BtoA", "--scale", "native", "--output", "here")
    assert np.array_equal(numbers("there/fake_A/0.png"), numbers("here/fake_A/0.png"))
    call(*argv, "--num_test", "1", "--output_size", "net")
    out = capsys.readouterr().out
    assert "used as AtoB" in out
    assert "do not say their training size: 256x256 px is assumed" in out
    assert opened("generated_images/9_net_G/test/fake_B/0.png").size == (256, 256)


def test_a_metric_whose_package_is_missing_is_refused_with_the_command(tiny, refused, monkeypatch):
    save_run()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    error = refused(test_command.main, "--run_name", "tiny", "--metrics", "kid")
    assert "--metrics kid: " in error
    assert "pip install -r requirements-metrics.txt" in error


def test_a_run_is_tested_on_the_data_set_it_was_trained_on_unless_another_is_given(trained, tmp_path, refused):
    shutil.copytree(trained / "datasets", tmp_path / "my sets")
    shutil.copytree(trained / "datasets", tmp_path / "other")
    save_run(argv=("--data_root", "my sets"))
    argv = ["--run_name", "tiny", "--direction", "AtoB"]
    for given in ([], ["--epoch", "1"], ["--metrics", "losses"]):
        call(*argv, *given)
    shutil.rmtree("my sets")
    for given in ([], ["--epoch", "1"]):
        error = refused(test_command.main, *argv, *given)
        assert "my sets/tiny: no such data set; found in my sets: none; give another --data_root" in error
    call(*argv, "--data_root", "other")
    call(*argv, "--input", "other/tiny/testA")
    weights = ["--weights", "saved_models/tiny/G_AB.safetensors"]  # may be a stranger's, so its data_root is not used
    assert "datasets/tiny: no such data set" in refused(test_command.main, *weights)


# -- the included students -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dataset", "direction"),
    [
        ("day2night", "day2night", "AtoB"),
        ("horse2zebra", "horse2zebra", "AtoB"),
        ("zebra2horse", "horse2zebra", "BtoA"),
    ],
)
def test_an_included_student_is_small_and_named_after_its_file(name, dataset, direction):
    path = EXAMPLES / f"{name}.safetensors"
    metadata = load_generator(path)[1]
    assert path.stat().st_size <= 1.2e6
    assert [metadata[key] for key in ("run_name", "dataset_name", "direction")] == [name, dataset, direction]


def test_the_included_student_turns_day_into_night():
    seeds = range(900_000, 900_004)  # of the scenes neither trained on nor tested with
    Path("day").mkdir()
    for seed in seeds:
        draw_scene(seed, "day").save(f"day/{seed}.png")
    shutil.copy(EXAMPLES / "day.png", "day")
    call("--weights", EXAMPLES / "day2night.safetensors", "--input", "day", "--output", "out")
    scores = []
    for seed in seeds:
        night = np.asarray(draw_scene(seed, "night")) / 255
        scores.append(-10 * np.log10(np.square(numbers(f"out/fake_B/{seed}.png") / 255 - night).mean()))
    assert np.mean(scores) > 20  # dB; the best recolouring of all images by one rule has 18.4
    assert numbers("out/fake_B/day.png").mean() < 0.6 * numbers(EXAMPLES / "day.png").mean()


def test_the_included_students_give_a_horse_stripes_and_take_them_away():
    """In the included photo, colour becomes black and white, and colour again."""
    for name, source in (("horse2zebra", EXAMPLES / "horse.jpg"), ("zebra2horse", "horse2zebra/fake_B/horse.png")):
        call("--weights", EXAMPLES / f"{name}.safetensors", "--input", source, "--output", name)
    paths = (EXAMPLES / "horse.jpg", "horse2zebra/fake_B/horse.png", "zebra2horse/fake_A/horse.png")
    patches = [numbers(path)[55:125, 100:160] for path in paths]  # neck and shoulder
    horse, zebra, back = (np.ptp(x, axis=2).mean() for x in patches)
    assert zebra < 0.7 * min(horse, back)
    steps = [np.diff(x.mean(2)[::2, ::2], axis=1) for x in patches]  # to the next pixel but one
    horse, zebra, back = (np.abs(x).mean() for x in steps)
    assert zebra > 2 * max(horse, back)


# -- scores ----------------------------------------------------------------------------------


def test_all_scores_are_printed_shown_and_written(run, capsys):
    scores = run("--metrics", "losses,cycle,identity,paired")
    out = capsys.readouterr().out
    for word in ("PSNR", "match@1", "copy", "mean image", "cycle", "identity", "loss_D_B"):
        assert word in out
    written = strict_json(OUTPUT / "metrics.json")
    assert written["AtoB"]["paired"]["model"] == pytest.approx(scores["AtoB"]["paired"]["model"])
    assert (written["network"], written["images"], written["step"]) == ("tiny", {"AtoB": 3, "BtoA": 3}, 4)
    assert "match@1" in (OUTPUT / "index.html").read_text(encoding="utf-8")


def test_paired_scores_compare_written_images_and_baselines_with_the_truth(run):
    scores = run("--metrics", "paired", "--direction", "AtoB")["AtoB"]["paired"]
    errors = {"model": [], "copy": []}
    for i in range(3):
        truth = numbers(f"datasets/tiny/testB/{i}.png")
        errors["model"].append(np.abs(numbers(OUTPUT / f"fake_B/{i}.png") - truth).mean())
        errors["copy"].append(np.abs(numbers(f"datasets/tiny/testA/{i}.png") - truth).mean())
    for name, values in errors.items():
        assert scores[name]["L1"] == pytest.approx(np.mean(values), abs=1e-6)


def test_truths_and_mean_image_are_resized_as_in_training(run):
    """Pillow and torch differ: by 2 levels on such images."""
    scores = run("--metrics", "paired", "--output_size", "net")
    networks = networks_of(load_state(STATE), STATE)
    reals = {}
    for domain in "AB":
        paths = [Path(f"datasets/tiny/test{domain}/{i}.png") for i in range(3)]
        reals[domain] = {Path(path.stem): load_image(path, (16, 16))[None] for path in paths}
    expected = metrics.measure_nets(networks, reals, ["paired"], None, "fp32")
    for direction in DIRECTIONS:
        table = scores[str(direction)]["paired"]
        for name in ("PSNR", "SSIM", "match@1"):
            assert table["model"][name] == pytest.approx(expected[f"{name}_{direction.target}"], abs=1e-3), name
        paths = Path(f"datasets/tiny/train{direction.target}").iterdir()
        mean = torch.stack([range_to_bytes(load_image(path, (16, 16))).double() for path in paths]).mean(0).round()
        truths = [range_to_bytes(x[0]) for x in reals[direction.target].values()]
        errors = [(mean - truth).abs().mean().item() for truth in truths]
        assert table["mean image"]["L1"] == pytest.approx(np.mean(errors), abs=1e-6)


def test_what_is_no_number_is_null_in_json(run):
    for path in Path("datasets/tiny").rglob("*.png"):
        noise_image(str(path), (8, 8)).save(path)
    scores = run("--metrics", "paired,cycle", "--direction", "AtoB")
    assert np.isnan(scores["AtoB"]["paired"]["model"]["SSIM"])  # its window has 11 px
    written = strict_json(OUTPUT / "metrics.json")["AtoB"]
    assert written["paired"]["model"]["SSIM"] is None
    assert written["paired"]["model"]["PSNR"] > 0
    assert written["cycle"] > 0


def test_losses_on_the_test_set_equal_those_of_training(run):
    scores = run("--metrics", "losses,cycle,identity", "--num_test", 1)
    reference = tiny_model(networks=networks_of(load_state(STATE), STATE))
    A, B = (load_image(Path(f"datasets/tiny/test{d}/0.png"), (16, 16))[None] for d in "AB")
    expected = reference.step(A, B)
    terms = ("gan_AB", "gan_BA", "cycle_A", "cycle_B", "identity_A", "identity_B")
    for name in ("loss_G", *terms, "loss_D_A", "loss_D_B"):
        assert scores["losses"][name] == pytest.approx(expected[name].item(), rel=1e-5), name
    assert scores["AtoB"]["cycle"] == pytest.approx(expected["cycle_A"].item(), rel=1e-5)
    assert scores["AtoB"]["identity"] == pytest.approx(expected["identity_B"].item(), rel=1e-5)


def test_losses_are_those_that_the_run_was_trained_with(run):
    assert "identity_A" in run("--metrics", "losses")["losses"]
    shutil.rmtree("saved_models")
    save_run(argv=["--lambda_cycle", 3, "--lambda_identity", 0, "--gan_loss", "hinge"])
    losses = run("--metrics", "losses")["losses"]
    assert "identity_A" not in losses
    total = losses["gan_AB"] + losses["gan_BA"] + 3 * (losses["cycle_A"] + losses["cycle_B"])
    assert losses["loss_G"] == pytest.approx(total)


def test_the_spike_is_that_of_the_feature_maps_of_the_test_images(run):
    scores = run("--metrics", "spike")
    networks = networks_of(load_state(STATE), STATE)
    for direction in DIRECTIONS:
        paths = sorted(Path(f"datasets/tiny/test{direction.source}").iterdir())
        expected = metrics.mean_spike(
            networks[direction.generator], images.LazyImages(paths, images.ImageReader((16, 16))), "fp32"
        )
        assert scores[str(direction)]["spike"] == pytest.approx(expected, rel=1e-5)
        assert 0 < expected < 1


def test_a_metric_of_one_domain_needs_no_images_of_the_other(run):
    shutil.rmtree("datasets/tiny/testB")
    assert run("--metrics", "cycle", "--direction", "AtoB")["AtoB"]["cycle"] > 0


def test_torn_test_images_are_left_out_of_every_score(run, capsys):
    for split in ("testA", "testB", "trainB"):
        path = Path("datasets/tiny", split, "0.png")
        path.write_bytes(path.read_bytes()[:400])
    scores = run("--metrics", "losses,cycle,identity,paired")
    assert scores["AtoB"]["paired"]["model"]["PSNR"] > 0
    assert "skipped, unreadable" in capsys.readouterr().err


def test_the_page_exists_even_if_a_score_fails(run, monkeypatch):
    def fail(*_):
        raise OSError(5, "gone")

    monkeypatch.setattr(metrics, "measure_direction", fail)
    with pytest.raises(SystemExit):
        run("--metrics", "cycle")
    assert (OUTPUT / "index.html").is_file()


MEASURED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import test
from toolkit import inference, metrics
metrics.ssim = lambda output, target: 0.5  # takes most of the time
inference.QUEUE_PIXELS = 0  # even a slow disk then keeps no image waiting
inference.THREADS = 1
peaks = []
for name in ("few", "many"):
    test.main(["--run_name", "tiny", "--dataset_name", name, "--metrics", "paired,cycle", "--direction", "AtoB"])
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks)
assert peaks[1] - peaks[0] < 40, peaks
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="resource")
def test_memory_does_not_grow_with_the_number_of_photos(run):
    """A photo takes 2.4 MB in bytes; twelve more, with their translations and truths, would take at least 86."""
    for name, count in (("few", 3), ("many", 15)):
        make_dataset(Path("datasets", name), (2, 2, 0, 0))
        for i in range(count):
            for domain in "AB":
                Image.effect_noise((1000, 800), 50).convert("RGB").save(f"datasets/{name}/test{domain}/{i}.jpg")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}  # else the process keeps freed memory
    subprocess.run([sys.executable, "-c", MEASURED, str(ROOT)], check=True, env=environment)


@pytest.mark.slow
def test_kid_is_computed_against_the_test_and_the_training_images(tiny, inception):
    save_run()
    scores = call("--dataset_name", "tiny", "--metrics", "kid", "--inception_weights", inception)
    table = scores["AtoB"]["distribution"]
    assert table.keys() == {"testB", "trainB"}
    assert (table["testB"]["translated"], table["testB"]["real"], table["trainB"]["real"]) == (2, 2, 4)
    assert table["testB"]["KID"] != table["trainB"]["KID"]


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--run_name other", "runs found: tiny"),
        ("--run_name ../tiny", "--run_name"),
        ("--run_name tiny --epoch 9", "expected one of: 1, 2, latest"),
        ("--run_name tiny --epoch x", "--epoch: given 'x', expected"),
        ("--run_name tiny --input nowhere", "--input nowhere"),
        ("--run_name tiny --input saved_models", "--input saved_models"),
        ("--run_name tiny --dataset_name other", "found in datasets: tiny;"),
        ("--run_name tiny --metrics psnr", "'psnr', expected some of losses,cycle,identity,paired"),
        ("--run_name tiny --metrics paired --input x", "--input and --metrics"),
        ("--run_name tiny --inception_weights x", "--inception_weights"),
        ("--run_name tiny --metrics kid --inception_weights none.pth", "none.pth"),
        ("--run_name tiny --tile 8", "--tile"),
        ("--run_name tiny --tile 48 --scale train", "--scale train"),
        ("--run_name tiny --num_test 0", "--num_test"),
        ("--weights no.safetensors", "no.safetensors"),
        ("--weights saved_models/tiny/latest.pt", "saved_models/tiny/latest.pt"),
        ("--weights saved_models/tiny/G_AB.safetensors --direction BtoA", "translates AtoB"),
        ("--weights saved_models/tiny/G_AB.safetensors --run_name tiny", "--weights and --run_name"),
        ("--weights saved_models/tiny/G_AB.safetensors --metrics cycle", "--metrics cycle: needs G_BA"),
        ("--weights saved_models/tiny/G_AB.safetensors --metrics losses", "--metrics losses: needs D_A, D_B, G_BA"),
        ("", "saved_models/horse2zebra"),
    ],
)
def test_wrong_options_are_refused_in_one_line(run, refused, given, words):
    assert words in refused(test_command.main, *given.split(), *FP32)
    assert not Path("generated_images").exists()


def test_a_torn_photo_and_a_missing_split_are_refused(run, refused):
    Path("torn.png").write_bytes(b"torn")
    argv = ["--run_name", "tiny", "--input", "torn.png"]
    assert "error: torn.png: cannot be read" in refused(test_command.main, *argv)
    shutil.rmtree("datasets/tiny/testA")
    for direction in ("AtoB", "both"):
        assert "no testA/ inside" in refused(test_command.main, "--run_name", "tiny", "--direction", direction)


def test_with_test_images_of_one_domain_the_direction_that_works_is_translated(run, capsys):
    shutil.rmtree("datasets/tiny/testA")
    run()
    assert "has test images of B alone, so BtoA is all that is translated" in capsys.readouterr().out
    assert sorted(path.name for path in OUTPUT.iterdir() if path.is_dir()) == ["fake_A", "real_B", "rec_B"]


def test_what_a_metric_lacks_is_said_before_anything_is_translated(run, refused):
    for path in Path("datasets/tiny/testB").iterdir():
        path.rename(path.with_stem(f"b{path.stem}"))
    argv = ["--run_name", "tiny", "--metrics"]
    assert "no name is in both testA and testB" in refused(test_command.main, *argv, "paired")
    shutil.rmtree("datasets/tiny/trainB")
    assert "no trainB/ inside" in refused(test_command.main, *argv, "paired", "--direction", "AtoB")
    shutil.rmtree("datasets/tiny/testB")
    for metric in ("identity", "losses"):
        assert "no testB/ inside" in refused(test_command.main, *argv, metric, "--direction", "AtoB")
    assert not Path("generated_images").exists()


def test_truths_of_unreadable_images_alone_are_none(run, refused):
    for path in Path("datasets/tiny/testB").iterdir():
        if path.stem != "0":
            path.rename(path.with_stem(f"b{path.stem}"))
    path = Path("datasets/tiny/testA/0.png")
    path.write_bytes(path.read_bytes()[:400])
    argv = ["--run_name", "tiny", *FP32, "--metrics", "paired", "--direction", "AtoB"]
    assert "no image that has a truth could be translated" in refused(test_command.main, *argv)


def test_hostile_weights_of_inception_are_not_executed(run, refused):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    Path("hostile.pth").write_bytes(pickle.dumps(Hostile()))
    argv = ["--run_name", "tiny", "--metrics", "kid", "--inception_weights", "hostile.pth"]
    assert "hostile.pth" in refused(test_command.main, *argv)
    assert not Path("executed").exists()
    assert not Path("generated_images").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state["args"].update(img_height="abc"),
        lambda state: state["args"].update(gan_loss="zzz"),
        lambda state: state["args"].clear(),
        lambda state: state["nets"].clear(),
        lambda state: state.pop("config"),
        lambda state: (state["config"].clear(), state["nets"].clear()),
        lambda state: [state["config"].pop(name) for name in ("G_AB", "G_BA")],
        lambda state: state["config"].pop("D_A"),
        lambda state: state["config"]["D_A"].update(ndf=8),
        lambda state: state["config"]["D_B"].update(channels=1),
    ],
)
def test_a_state_edited_by_hand_is_refused(run, refused, spoil):
    state = load_state(STATE)
    spoil(state)
    save_state(STATE, state)
    words = refused(test_command.main, "--run_name", "tiny", "--metrics", "losses", *FP32)
    assert "saved_models/tiny/latest.pt" in words or "--metrics losses: needs D_A" in words


def test_generator_files_that_do_not_belong_together_are_refused(run, refused):
    save_pair(G_AB=tiny_networks(channels=1)["G_AB"], G_BA=tiny_networks()["G_BA"])
    argv = ["--run_name", "pair", "--input", "datasets/tiny/testA"]
    assert "saved_models/pair: its networks differ in channels" in refused(test_command.main, *argv)


# -- many images, large images ---------------------------------------------------------------


def test_images_of_several_sizes_come_out_as_they_do_one_by_one(run, monkeypatch):
    save_noise("in", *(f"{i:02d}.png" for i in range(40)))
    save_noise("in", *(f"{i:02d}.png" for i in range(0, 40, 7)), size=(24, 16))
    options = ["--input", "in", "--direction", "both", "--round_trip", "--scale", "native", "--output"]
    run(*options, "many")
    monkeypatch.setattr(inference, "BATCH", 1)
    run(*options, "single")
    names = [name for name in files_in("many") if name.endswith(".png") and name != "grid.png"]
    assert len(names) == 6 * 40
    for name in names:
        assert np.abs(numbers(Path("many", name)) - numbers(Path("single", name))).max() <= 1, name


def test_tiles_are_cut_at_the_images_own_size(run):
    save_noise(".", "a.png", size=(64, 48))
    run("--input", "a.png", "--tile", 48, "--output", "tiles")
    run("--input", "a.png", "--output", "train")
    run("--input", "a.png", "--scale", "native", "--output", "native")
    tiles, train, native = (numbers(f"{name}/fake_B/a.png") for name in ("tiles", "train", "native"))
    assert np.abs(tiles - native).mean() < np.abs(train - native).mean()


# -- the folder of results -------------------------------------------------------------------


def test_a_test_removes_what_the_one_before_wrote_and_nothing_else(run, capsys):
    run("--metrics", "cycle")
    (OUTPUT / "fake_B/mine.png").write_text("mine")
    run("--num_test", 1, "--direction", "AtoB", "--no-round_trip")
    results = {"real_A/0.png", "fake_B/0.png", "truth_B/0.png"}
    assert files_in(OUTPUT) == {"grid.png", "index.html", "fake_B/mine.png"} | results
    assert set(gallery.read_record(OUTPUT)[0]) == {"grid.png", "index.html"} | results
    assert "removed 27 files of the last test" in capsys.readouterr().out
    (OUTPUT / "metrics.json").write_text('{"accuracy": 0.93}')  # somebody else's
    run()
    assert (OUTPUT / "metrics.json").read_text() == '{"accuracy": 0.93}'


def test_an_input_that_the_test_would_change_is_refused(run, refused):
    run("--direction", "AtoB")
    shutil.copytree(OUTPUT / "fake_B", "copy/fake_B")
    before = {path: path.read_bytes() for path in OUTPUT.rglob("*") if path.is_file()}
    argv = ["--run_name", "tiny", "--direction", "BtoA", "--input"]
    for path in (OUTPUT / "real_A", OUTPUT / "real_A/1.png"):
        words = refused(test_command.main, *argv, path, "--round_trip", "--direction", "AtoB", "--output", OUTPUT)
        assert f"--output {OUTPUT}: would remove or overwrite {OUTPUT / 'real_A'}" in words
    words = refused(test_command.main, *argv, "copy/fake_B", "--output", "copy", "--direction", "AtoB")
    assert "--output copy: fake_B/0.png is there, and not as test.py wrote it; choose another folder" in words
    Path("file").write_text("mine")
    assert "file" in refused(test_command.main, *argv, OUTPUT / "fake_B", "--output", "file")
    assert {path: path.read_bytes() for path in before} == before
    assert Path("file").read_text() == "mine"


def test_translations_can_be_translated_back_beside_their_inputs(run):
    save_noise(".", "a.png")
    run("--input", "a.png", "--direction", "AtoB")
    run("--input", PHOTOS / "fake_B/a.png", "--direction", "BtoA")
    assert files_in(PHOTOS) >= {"real_A/a.png", "fake_B/a.png", "real_B/a.png", "fake_A/a.png"}


def test_photos_add_up_beside_the_results_of_the_data_set(run, capsys):
    run("--num_test", 1)
    tested = files_in(OUTPUT)
    save_noise("one", "a.png")
    save_noise("two", "A.png", "b.png", size=(9, 12))
    for path in ("one/a.png", "two", "one/a.png"):
        run("--input", path, "--direction", "AtoB")
    assert "removed" not in capsys.readouterr().out
    assert files_in(OUTPUT) == tested
    assert sorted(path.name for path in (PHOTOS / "fake_B").iterdir()) == ["A_.png", "a.png", "b.png"]
    assert opened(PHOTOS / "fake_B/A_.png").size == (9, 12)
    page = (PHOTOS / "index.html").read_text()
    assert page.count("<h2>") == 1
    assert "3 images</h2>" in page
    run("--num_test", 1, "--direction", "AtoB", "--no-round_trip")
    assert len(list((PHOTOS / "fake_B").iterdir())) == 3
    assert not (OUTPUT / "fake_A").exists()  # nor any other empty folder


def test_with_skip_existing_only_what_is_missing_is_written(run, capsys):
    run()
    path = OUTPUT / "fake_B/0.png"
    content = path.read_bytes()
    path.unlink()
    (OUTPUT / "fake_B/mine.png").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in OUTPUT.glob("*/*.png")}
    capsys.readouterr()
    run("--skip_existing", "--metrics", "paired")
    out = capsys.readouterr().out
    assert "AtoB: 1 image in" in out
    assert "2 existed already" in out
    changed = {str(path.relative_to(OUTPUT)) for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed - {"fake_B/0.png"} == {"real_A/0.png", "rec_A/0.png", "truth_B/0.png"}
    assert path.read_bytes() == content
    assert (OUTPUT / "index.html").read_text().count("<figure>") == 24
    assert files_in(OUTPUT) - set(gallery.read_record(OUTPUT)[0]) == {"fake_B/mine.png"}


@pytest.mark.parametrize("folder", ["testA", "testB"])
def test_an_image_that_changes_while_it_is_translated_is_made_again(run, monkeypatch, folder):
    plain = Translator.load

    def load(self, path, domain):
        loaded = plain(self, path, domain)
        if path.parent.name == "testA":
            noise_image("changed", (20, 18)).save(Path("datasets/tiny", folder, path.name))
        return loaded

    argv = ["--run_name", "tiny", *FP32, "--direction", "AtoB"]
    with monkeypatch.context() as patch:
        patch.setattr(Translator, "load", load)
        test_command.main([*argv, "--output", "x"])
    test_command.main([*argv, "--output", "x", "--skip_existing"])
    test_command.main([*argv, "--output", "fresh"])
    for path in Path("fresh").glob("*/*.png"):
        assert path.read_bytes() == Path("x", path.relative_to("fresh")).read_bytes()


def test_a_result_that_is_edited_while_others_are_translated_is_not_replaced(run, monkeypatch, refused):
    monkeypatch.setattr(inference, "BATCH", 1)
    monkeypatch.setattr(inference, "THREADS", 1)
    run("--output", "x", "--direction", "AtoB")
    plain = gallery.ResultFolder.save

    def save(self, *args):
        Path("x/fake_B/2.png").write_text("mine")
        plain(self, *args)

    monkeypatch.setattr(gallery.ResultFolder, "save", save)
    argv = ["--run_name", "tiny", *FP32, "--output", "x", "--direction", "AtoB", "--skip_existing", "--epoch", "1"]
    assert "fake_B/2.png is there, and not as test.py wrote it" in refused(test_command.main, *argv)
    assert Path("x/fake_B/2.png").read_text() == "mine"


def test_a_truth_of_just_the_same_name_comes_before_one_of_another_suffix(run):
    for domain in "AB":
        noise_image(f"bmp {domain}", (18, 16)).save(f"datasets/tiny/test{domain}/0.bmp")
    run("--direction", "AtoB")
    for suffix in ("png", "bmp"):
        truth = np.asarray(opened(f"datasets/tiny/testB/0.{suffix}"))
        assert np.array_equal(numbers(OUTPUT / f"truth_B/0.{suffix}.png"), truth)


def test_results_that_get_another_name_since_other_images_have_it_are_named(run, capsys):
    for clip in ("one", "two"):
        Path(clip).mkdir()
        for number in range(3):
            noise_image(f"{clip}{number}").save(f"{clip}/{number}.png")
        capsys.readouterr()
        run("--input", clip)
    out = capsys.readouterr().out
    assert (
        "results of other images have these names already, so they are called two/0.png: 0_.png, and 2 more; or use"
        in out
    )


def test_a_truth_that_is_a_broken_link_is_left_out(run, capsys):
    path = Path("datasets/tiny/testB/0.png")
    path.unlink()
    path.symlink_to("nowhere")
    run("--direction", "AtoB")
    assert "testB/0.png: neither shown nor scored" in capsys.readouterr().err
    assert (OUTPUT / "fake_B/0.png").is_file()
    assert not (OUTPUT / "truth_B/0.png").exists()


def test_errors_are_measured_at_the_size_of_the_results(run):
    scores = {}
    for scale in ("train", "native"):
        argv = ["--run_name", "tiny", *FP32, "--output", scale, "--direction", "AtoB", "--scale", scale]
        scores[scale] = test_command.main([*argv, "--metrics", "cycle,identity"])["AtoB"]
        errors = [
            np.abs(numbers(f"{scale}/real_A/{name}.png").astype(float) - numbers(f"{scale}/rec_A/{name}.png")).mean()
            for name in range(3)
        ]
        if scale == "native":  # the others are resized
            assert scores[scale]["cycle"] == pytest.approx(np.mean(errors) / 127.5, abs=0.01)
    assert all(abs(scores["train"][name] - scores["native"][name]) > 1e-4 for name in ("cycle", "identity"))


@pytest.mark.parametrize("metric", ["losses", "spike"])
def test_what_is_measured_at_the_training_size_is_refused_at_another(run, refused, metric):
    argv = ["--run_name", "tiny", *FP32, "--metrics", f"paired,{metric}", "--scale", "native"]
    assert f"--metrics {metric}: is measured at the training size" in refused(test_command.main, *argv)


@pytest.mark.parametrize("name", ["input", "output", "weights", "data_root"])
def test_an_empty_path_is_refused(refused, name):
    assert f"--{name}: given '', expected a path" in refused(test_command.main, f"--{name}", "")


def change_input(content):
    noise_image(content, (20, 18)).save("datasets/tiny/testA/0.png")


CHANGES = {  # each makes results of before worthless: of how many of the three images
    "epoch": (["--epoch", "1"], None, 3),
    "scale": (["--scale", "native"], None, 3),
    "output_size": (["--output_size", "net"], None, 3),
    "precision": (["--precision", "bf16"], None, 3),
    "input": ([], change_input, 1),
    "nothing": ([], None, 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_results_of_another_network_setting_or_input_are_made_again(run, capsys, change):
    argv, act, count = CHANGES[change]
    argv = ["--direction", "AtoB", "--metrics", "paired", *argv]
    run("--direction", "AtoB", "--output", "x", "--metrics", "paired")
    if act:
        act("changed")
    capsys.readouterr()
    scores = test_command.main(["--run_name", "tiny", *FP32, *argv, "--output", "x", "--skip_existing"])
    assert f"AtoB: {count} image" in capsys.readouterr().out
    assert scores == test_command.main(["--run_name", "tiny", *FP32, *argv, "--output", "fresh"])
    for name in ("0.png", "2.png"):
        assert np.array_equal(numbers(f"x/fake_B/{name}"), numbers(f"fresh/fake_B/{name}"))
    assert strict_json("x/metrics.json") == strict_json("fresh/metrics.json")


def test_a_run_of_another_name_is_another_network_and_old_scores_go(run):
    shutil.copytree("saved_models/tiny", "saved_models/two")
    run("--direction", "AtoB", "--output", "x", "--metrics", "paired")
    call("--run_name", "two", "--direction", "AtoB", "--output", "x", "--num_test", 1, "--skip_existing")
    assert not Path("x/metrics.json").exists()
    page = Path("x/index.html").read_text()
    assert "<h1>two, epoch 2, step 4</h1>" in page
    assert (
        "2 images of an earlier test: tiny, epoch 2, step 4; dataset_name tiny, scale train, output_size input</h2>"
        in page
    )


def test_the_page_shows_thumbnails_that_lead_to_the_full_images(run):
    save_noise("in", "large.png", size=(600, 300))
    save_noise("in", "small.png")
    run("--input", "in")
    page = (PHOTOS / "index.html").read_text()
    for folder in ("real_A", "fake_B"):
        assert f'href="{folder}/large.png"><img loading="lazy" src="thumbnails/{folder}/large.jpg"' in page
        assert opened(PHOTOS / "thumbnails" / folder / "large.jpg").size == (256, 128)
        assert f'src="{folder}/small.png"' in page
        assert opened(PHOTOS / folder / "large.png").size == (600, 300)
    assert page.count("<img") == 4


def test_the_page_names_the_domains_and_shows_the_truth(run, capsys):
    Path("datasets/tiny").rename("datasets/horse2zebra")
    Path("datasets/horse2zebra/testB/1.png").write_bytes(b"torn")
    run("--dataset_name", "horse2zebra", "--direction", "AtoB")
    assert "horse2zebra/testB/1.png: neither shown nor scored" in capsys.readouterr().err
    page = (OUTPUT / "index.html").read_text()
    assert "<h2>horse → zebra: 3 images</h2>" in page
    assert "<h1>tiny, epoch 2, step 4</h1>" in page
    for words in ("horse as it was given", "the translation to zebra", "translated back to horse"):
        assert words in page
    assert sorted(path.name for path in (OUTPUT / "truth_B").iterdir()) == ["0.png", "2.png"]
    assert np.array_equal(numbers(OUTPUT / "truth_B/2.png"), numbers("datasets/horse2zebra/testB/2.png"))
    assert page.count("<figcaption>truth_B") == 2


def test_one_large_photo_does_not_make_a_large_grid(run):
    save_noise("in", "0.png", size=(1500, 400))
    save_noise("in", "1.png", "2.png", "3.png", size=(30, 40))
    run("--input", "in", "--direction", "AtoB")
    grid = opened(PHOTOS / "grid.png")
    assert 4 * 256 < grid.width < 4 * 300
    assert 2 * 68 < grid.height < 2 * 80


def test_of_many_images_the_grid_shows_six_that_are_evenly_spread(run):
    Path("in").mkdir()
    for i in range(13):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(f"in/{i}.png")
    run("--input", "in", "--direction", "AtoB")
    middle = numbers(PHOTOS / "grid.png")[60, :, :]
    shown = {red for red, green, blue in map(tuple, middle) if green == blue == 0 and red % 40 == 0}
    assert shown >= {40, 80, 120, 160, 200}
    assert len(shown) == 6


def test_a_run_that_keeps_shapes_translates_whole_images_without_stretching():
    folder = make_dataset(Path("datasets/tiny"), size=(40, 20))
    options = ["--dataset_name", "tiny", *TINY, "--num_epochs", "1", "--preprocess", "scale_shortside_and_crop"]
    train.main([*options, "--eval_interval", "1", "--eval_metrics", "cycle,paired"])
    seen = []
    plain = inference.Translator.load

    def load(self, path, domain):
        loaded = plain(self, path, domain)
        seen.append(loaded.network_input.size)
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference.Translator, "load", load)
        for source in (["--run_name", "tiny"], ["--weights", "saved_models/tiny/G_AB.safetensors"]):
            test_command.main([*source, "--input", str(folder / "testA"), "--output", f"out{len(seen)}"])
    assert set(seen) == {(32, 16)}
    with Image.open("out0/fake_B/0.png") as result:
        assert result.size == (40, 20)
    test_command.main(["--run_name", "tiny", "--metrics", "paired,cycle,losses,spike"])


def test_whole_images_of_several_sizes_train_resume_and_are_translated_at_the_sizes_of_training(capsys, no_plots):
    make_dataset(Path("datasets/tiny"), size=(40, 20))
    for i in range(5):  # so that D_A gets images of two sizes
        noise_image(i, (21, 50)).save(f"datasets/tiny/trainA/{i}.png")
    options = [
        "--dataset_name",
        "tiny",
        *TINY,
        "--batch_size",
        "1",
        "--steps_per_epoch",
        "3",
        "--preprocess",
        "scale_width",
    ]
    train.main([*options, "--num_epochs", "1", "--flip_vertical"])
    assert "images are whole; sides become multiples of 4 px" in capsys.readouterr().out
    train.main(["--dataset_name", "tiny", "--start_from", "latest", "--num_epochs", "2", "--device", "cpu"])
    assert "starts empty" not in capsys.readouterr().out
    test_command.main(["--run_name", "tiny", "--metrics", "cycle", "--output_size", "net"])
    with Image.open("generated_images/tiny/test/fake_B/0.png") as result:
        assert result.size == (32, 16)  # 16x8 px enlarged to a shorter side of 16


@pytest.mark.parametrize("options", [[], ["--batch_size", "1", "--lambda_gp", "1"]])
def test_what_needs_images_of_one_size_is_refused_with_whole_images(refused, options):
    line = refused(train.main, *TINY, "--preprocess", "none", *options)
    assert "--preprocess none: images have several sizes" in line


def test_a_cache_and_images_of_several_sizes_are_refused(refused):
    line = refused(train.main, *TINY, "--cache", "ram", "--preprocess", "crop")
    assert "--cache ram: keeps images of one size, and --preprocess crop has several" in line


def test_test_images_named_by_their_domain_are_scored_as_pairs(run):
    for domain in "AB":
        folder = Path("datasets/tiny", f"test{domain}")
        for path in list(folder.iterdir()):
            path.rename(folder / f"{path.stem}_{domain}{path.suffix}")
    scores = run("--metrics", "paired")
    assert scores["AtoB"]["paired"]["copy"]["PSNR"] < 20
    assert (Path("generated_images/tiny/test/truth_B/0_A.png")).is_file()


def test_label_images_are_resized_to_the_nearest_wherever_the_network_is_used(no_plots):
    make_dataset(Path("datasets/tiny"), size=(40, 40))
    train.main(
        ["--dataset_name", "tiny", *TINY, "--num_epochs", "1", "--steps_per_epoch", "1", "--resample_B", "nearest"]
    )
    weights = Path("saved_models/tiny/G_BA.safetensors")
    path = Path("datasets/tiny/testB/0.png")
    with Image.open(path) as image:
        expected = {"A": images.resize_image(image.convert("RGB"), (16, 16)).tobytes()}
        expected["B"] = image.resize((16, 16), Image.Resampling.NEAREST).tobytes()
    for found in (inference.load_networks(None, "tiny"), inference.load_networks(weights, "")):
        ours = inference.Translator(*found, "cpu", "fp32")
        for domain, pixels in expected.items():
            assert ours.load(path, domain).network_input.tobytes() == pixels
