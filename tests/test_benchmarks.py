"""The benchmarks: tiny runs of those that train, and the scores of the others."""

import itertools
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import make_dataset
from PIL import Image
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import common
import compare_generators
import comparison
import discriminators
import domain_score
import gpu
import label_score
import reference
import shared_cores
import step

from toolkit.images import load_image, read_image

BENCHMARKS = sorted(path for path in Path(step.__file__).parent.glob("*.py") if path.stem != "common")


@pytest.fixture
def pairs(tmp_path):
    """A data set whose test images have each other's names."""
    return make_dataset(tmp_path / "datasets" / "tiny", (3, 3, 2, 2))


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots", "pairs")
def test_generators_are_compared_at_equal_steps_and_at_equal_minutes(monkeypatch, capsys):
    thin = ["--num_residual", "1", "--ngf", "2", "--ndf", "4", "--n_layers_D", "1"]
    monkeypatch.setattr(compare_generators, "SIDE", 16)
    monkeypatch.setattr(compare_generators, "VARIANTS", {"resnet": thin, "resnet_skips": [*thin, "--skips"]})
    monkeypatch.setattr(compare_generators, "seconds_per_step", lambda args: {"resnet": 0.5, "resnet_skips": 0.75})
    argv = ["--dataset_name", "tiny", "--steps", "9", "--seeds", "0", "1", "--equal_minutes"]
    compare_generators.main(argv)
    folder = Path("generated_images/compare_tiny")
    rows = common.read_csv(folder / "runs.csv")
    assert [(row["budget"], row["variant"], row["seed"], row["steps"]) for row in rows] == [
        (budget, variant, seed, "12" if (budget, variant) == ("0.1 minutes", "resnet") else "8")
        for seed in "01"
        for budget in ("8 steps", "0.1 minutes")
        for variant in ("resnet", "resnet_skips")
    ]
    assert len(list(Path("saved_models").iterdir())) == 2 * 3, "the slowest network has one run for both"
    lines = (folder / "compare.md").read_text().splitlines()
    assert len(lines) == 2 + 4
    assert lines[4].startswith("| 0.1 minutes | resnet | 2 |")
    first, second = (float(row["PSNR_B"]) for row in rows if row["steps"] == "12")
    assert f"| {(first + second) / 2:.2f} ± {abs(first - second) / 2**0.5:.2f} |" in lines[4]
    for name in ("compare.png", "rows.png"):
        assert min(read_image(folder / name).size) > 50
    capsys.readouterr()
    compare_generators.main(argv)
    assert capsys.readouterr().out.count("nothing left to do") == len(rows)
    assert common.read_csv(folder / "runs.csv") == rows


@pytest.mark.usefixtures("pairs")
def test_both_sides_of_the_comparison_with_the_reference_learn_and_are_not_repeated(monkeypatch, capsys):
    clock = itertools.count(0, 0.125)  # a step takes so many seconds
    monkeypatch.setattr(reference, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    ours = f"{gpu.TINY} --batch_size 1 --lr 1e-3 --num_epochs 2 --ema 0.9"
    argv = ["--ours", ours, "--size", "16", "--ngf", "4", "--blocks", "1", "--n_layers_D", "1"]
    argv += ["--dataset_name", "tiny", "--minutes", "0.025", "--every", "0.5", "--threads", "1", "--output", "out"]
    reference.main(argv)
    rows = common.read_csv(Path("out/reference.csv"))
    for which, steps in (("reference", ["0", "4", "8", "12"]), ("ours", ["0", "4", "6"])):
        own = [row for row in rows if row["which"] == which]
        assert [row["step"] for row in own] == steps
        assert own[0]["PSNR_B"] != own[-1]["PSNR_B"]
    assert "A → B: the reference has" in capsys.readouterr().out
    assert min(read_image(Path("out/reference.png")).size) > 50
    monkeypatch.setattr(reference, "make_run", lambda args, key: pytest.fail(f"{key} is repeated"))
    reference.main(argv)
    assert common.read_csv(Path("out/reference.csv")) == rows


def test_our_time_to_reach_the_reference_is_reported(tmp_path):
    rows = []
    for seed, late in (("0", 0), ("1", 2)):
        for minute in range(11):
            level = {"PSNR_B": 10.0 + minute, "PSNR_A": 30.0}
            rows.append({"which": "reference", "seed": seed, "minutes": minute, **level})
            if minute <= 6:
                level = {"PSNR_B": 14.0 + 2 * (minute - late), "PSNR_A": 20.0}
                rows.append({"which": "ours", "seed": seed, "minutes": minute, **level})
    lines = reference.draw_curves(rows, 10, 60, tmp_path / "plot.png")
    assert lines[0] == "A → B: the reference has 20.00 dB after 10 minutes, ours after 4.0 (its seeds after 3.0, 5.0)"
    assert "ours after more than 6.0 (its seeds after more than 6.0, more than 6.0)" in lines[1]


def test_the_demo_has_one_recipe():
    ours = shlex.split(reference.parse_args([]).ours)
    assert ours == common.recipe("day2night") == common.expand(["@recipes/day2night.txt"])
    assert "\nDEMO := @recipes/day2night.txt\n" in (common.ROOT / "Makefile").read_text()
    assert "python train.py @recipes/day2night.txt" in (common.ROOT / "README.md").read_text()


@pytest.mark.slow
def test_steps_and_translations_are_timed_beside_busy_neighbours(capsys):
    shared_cores.main(["--neighbours", "0", "1", "--turns", "1"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["busy neighbours", "task", "default, ms", "ours, ms", "ratio"]
    assert [row[:2] for row in rows[2:]] == [["0", "step"], ["0", "image"], ["1", "step"], ["1", "image"]]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[2:])


# -- beside the code of others -----------------------------------------------------------------

CHECKOUT = {
    "options/train_options.py": """
import argparse
class TrainOptions:
    def parse(self):
        parser = argparse.ArgumentParser()
        for name in ("dataroot", "checkpoints_dir"):
            parser.add_argument(f"--{name}")
        for name in ("num_threads", "crop_size"):
            parser.add_argument(f"--{name}", type=int)
        return parser.parse_args()
""",
    "data/__init__.py": """
import torch
def create_dataset(options):
    return [{"A": torch.ones(1, 3, options.crop_size, options.crop_size), "B": torch.zeros(1, 3, 4, 4)}] * 3
""",
    "models/__init__.py": """
import importlib
def create_model(options):
    return importlib.import_module("models.cycle_gan_model").CycleGANModel()
""",
    "models/cycle_gan_model.py": """
import torch
class CycleGANModel:
    netG_A, netG_B = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)
    epochs = 1
    def setup(self, options):
        torch.nn.init.zeros_(self.netG_A.weight)
    def set_input(self, batch):
        assert batch["A"].mean() == 1 and batch["B"].mean() == 0 and len(batch["A_paths"]) == 0
    def optimize_parameters(self):
        self.netG_A.bias.data += 0.01
    def update_learning_rate(self):
        self.epochs += 1
""",
}


@pytest.fixture
def checkout(tmp_path):
    """What the comparison uses of the other project, without its networks."""
    for name, text in CHECKOUT.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "checkout"


@pytest.fixture
def short_comparison(pairs, checkout, monkeypatch):
    """The flags of a comparison of tiny systems, whose steps take an eighth of a second each."""
    ours = f"{gpu.TINY} --batch_size 1 --lr 1e-3 --num_epochs 2 --ema 0.9"
    plain = "--ngf 4 --blocks 1 --n_layers_D 1 --size 16"
    systems = {"ours": ours, "plain": plain, "junyanz": "--crop_size 16"}
    monkeypatch.setattr(comparison, "TASKS", {"tiny": comparison.Task(systems, (0.01, 0.02), has_pairs=True)})
    clock = itertools.count(0, 0.125)
    monkeypatch.setattr(comparison, "time", types.SimpleNamespace(process_time=lambda: next(clock)))
    monkeypatch.setattr(comparison.torch.cuda, "is_available", lambda: False)
    argv = ["--junyanz", str(checkout), "--dataset_name", "tiny", "--seeds", "0", "1"]
    return [*argv, "--minutes", "0.02", "--every", "0.5", "--output", "out"]


def test_our_recipe_is_compared_with_the_plain_step_and_with_the_code_of_others(short_comparison, monkeypatch, capsys):
    imported = sys.modules["models"]
    Path("out").mkdir()
    Path("out/comparison.md").write_text("# Title\n<!-- tiny -->\n<!-- end of tiny -->\nThe end")
    comparison.main(short_comparison)
    assert sys.modules["models"] is imported
    assert "options" not in sys.modules
    rows = common.read_csv(Path("out/comparison_tiny.csv"))
    runs = [(row["seed"], row["system"], row["step"]) for row in rows if row["finished"] == "1"]
    ended = {"ours": "6", "plain": "10", "junyanz": "10"}  # ours after two epochs of three steps
    assert runs == [(seed, system, step) for seed in "01" for system, step in ended.items()]
    learned = [row for row in rows if row["system"] == "junyanz" and row["seed"] == "0"]
    assert len({row["PSNR_B"] for row in learned}) == len(learned) == 4
    text = Path("out/comparison.md").read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\nThe end")
    table = "\n".join(comparison.table(rows, comparison.TASKS["tiny"]))
    assert table in text
    assert text.count("| fp32 | 2 |") == 3
    assert min(read_image(Path("out/comparison_tiny.jpg")).size) > 50
    monkeypatch.setattr(comparison, "make_run", lambda args, key, finished: pytest.fail(f"{key} is repeated"))
    comparison.main(short_comparison)
    assert common.read_csv(Path("out/comparison_tiny.csv")) == rows
    assert capsys.readouterr().out.endswith(table + "\n")


@pytest.mark.usefixtures("short_comparison")
def test_without_test_pairs_systems_are_compared_by_what_classifiers_predict(monkeypatch):
    systems = {"plain": "--ngf 4 --blocks 1 --n_layers_D 1 --size 16"}
    monkeypatch.setattr(comparison, "TASKS", {"tiny": comparison.Task(systems, (0.01,), has_pairs=False)})
    seen = []

    def predict(dataset, folder, target, channels):
        seen.append([load_image(path, None, channels) for path in sorted(folder.iterdir())])
        return 0.25 * channels + (target == "A") / 8

    monkeypatch.setattr(domain_score, "folder_score", predict)
    comparison.main(["--dataset_name", "tiny", "--minutes", "0.01", "--every", "9", "--output", "out"])
    row = common.read_csv(Path("out/comparison_tiny.csv"))[-1]
    scores = {name: float(row[name]) for name in row if name.startswith("as ")}
    assert scores == {"as B": 0.75, "as B in greyscale": 0.25, "as A": 0.875, "as A in greyscale": 0.375}
    assert [len(images) for images in seen[:4]] == [2, 2, 2, 2]
    assert not torch.equal(seen[0][0], seen[4][0])  # translated anew after training
    assert min(read_image(Path("out/comparison_tiny.jpg")).size) > 50


def test_a_comparison_that_was_stopped_continues_with_the_run_that_was_not_finished(short_comparison, monkeypatch):
    translations = comparison.save_translations
    calls = itertools.count()

    def stop_in_the_third_run(*args):
        if next(calls) == 1:
            monkeypatch.setattr(reference.Reference, "step", lambda *_: pytest.fail("stopped"))
        return translations(*args)

    monkeypatch.setattr(comparison, "save_translations", stop_in_the_third_run)
    step_of_reference = reference.Reference.step
    systems = comparison.TASKS["tiny"].systems
    for name in ("ours", "plain"):  # last
        systems[name] = systems.pop(name)
    with pytest.raises(pytest.fail.Exception, match="stopped"):
        comparison.main(short_comparison)
    rows = common.read_csv(Path("out/comparison_tiny.csv"))
    assert [row["system"] for row in rows if row["finished"] == "1"] == ["junyanz", "ours"]
    assert rows[-1]["system"] == "plain"
    assert len(comparison.finished_rows(rows)) == len(rows) - 1
    monkeypatch.setattr(reference.Reference, "step", step_of_reference)
    comparison.main(short_comparison)
    later = common.read_csv(Path("out/comparison_tiny.csv"))
    assert later[: len(rows) - 1] == rows[:-1]
    assert len({comparison.key_of(row) for row in comparison.finished_rows(later)}) == 6


def test_the_table_has_the_mean_of_the_seeds_at_a_minute_and_no_unfinished_run():
    rows = []
    for seed, level in (("0", 10.0), ("1", 13.0)):
        for minutes, gain in (("0", 0.0), ("1.5", 3.0), ("4", 4.0)):
            scores = {"minutes": minutes, "step": "1000", "PSNR_B": str(level + gain), "PSNR_A": "20"}
            finished = "1" if minutes == "4" else "0"
            rows.append(dict(zip(comparison.KEYS, ("ours", "", "10", seed), strict=True)) | scores)
            rows[-1] |= {"precision": "fp32", "finished": finished}
    unfinished = dict.fromkeys(rows[0], "7") | {"system": "plain", "seed": "2", "finished": "0"}
    task = comparison.TASKS["day2night"]
    lines = comparison.table([*rows, unfinished], task)
    assert lines[2:] == ["| ours | fp32 | 2 | 13.5 / 20.0 | 14.7 / 20.0 | 15.5 / 20.0 | 15.5 / 20.0 | 1,000 | 4.0 |"]
    assert comparison.table([unfinished], task) == []


def test_a_folder_that_is_no_checkout_is_refused(short_comparison, refused):
    error = refused(comparison.main, *short_comparison, "--junyanz", "datasets")
    assert "datasets: no models/cycle_gan_model.py inside" in error


# -- benchmarks of a GPU -----------------------------------------------------------------------

REPORT = ["--device", "cpu", "--tiny", "--output", "report"]


@pytest.mark.slow
def test_all_gpu_benchmarks_run_on_a_cpu_with_tiny_networks_and_write_their_report(monkeypatch):
    gpu.main(REPORT)
    results = json.loads(Path("report/gpu.json").read_text())
    [done] = results.values()
    assert done.keys() == gpu.BENCHMARKS.keys()
    text = Path("report/gpu.md").read_text()
    for name, benchmark in done.items():
        assert benchmark["ok"], name
        assert gpu.BENCHMARKS[name][1] in text
    assert done["tests"]["rows"][0]["skipped" if not torch.cuda.is_available() else "passed"] > 30
    assert any("equal, bit for bit" in row["what"] for row in done["memory"]["rows"])
    losses = [row["loss_G of the first rank's first images"] for row in done["ranks"]["rows"]]
    assert losses[0] == losses[1] > 0
    assert {row["recipe"] for row in done["training"]["rows"]} == {"paper", "ours"}
    for row in done["training"]["rows"]:
        assert Path("report", row["image"]).is_file()
        assert f"({row['image']})" in text
    monkeypatch.setattr(gpu, "BENCHMARKS", {name: (None, title) for name, (_, title) in gpu.BENCHMARKS.items()})
    gpu.main(REPORT)  # nothing is left to do
    assert json.loads(Path("report/gpu.json").read_text()) == results


def test_a_gpu_benchmark_that_fails_is_reported_and_repeated_and_the_next_one_runs(monkeypatch, refused):
    calls = []

    def failing(args):
        calls.append("failing")
        gpu.run("-c", "import sys; sys.exit('no card')")

    def working(args):
        calls.append("working")
        return [{"ms": 1}]

    monkeypatch.setattr(gpu, "BENCHMARKS", {"step": (failing, "A step"), "loader": (working, "A loader")})
    assert "failed: step; see report/gpu.md" in refused(gpu.main, *REPORT, code=1)
    assert "no card" in Path("report/gpu.md").read_text()
    refused(gpu.main, *REPORT, code=1)
    assert calls == ["failing", "working", "failing"]


def test_a_missing_data_set_or_gpu_is_reported_before_any_benchmark(monkeypatch, refused):
    monkeypatch.setattr(gpu, "BENCHMARKS", {"training": (None, "Training")})
    assert "horse2zebra" in refused(gpu.main, "--device", "cpu", "--output", "report")
    assert "--device cuda:77: not on this machine" in refused(gpu.main, "--device", "cuda:77")


def test_two_runs_that_differ_in_one_weight_are_not_the_same(tmp_path):
    for name, value in (("one", 1.0), ("same", 1.0), ("other", 2.0)):
        Path("saved_models", name).mkdir(parents=True)
        nets = {"G": {"w": torch.tensor([value, 0.0])}}
        state = {"nets": nets, "optims": {"G": [1]}, "buffers": {}, "rng": (1, None)}
        torch.save(state, f"saved_models/{name}/latest.pt")
    assert gpu.same_state("one", "same")
    assert not gpu.same_state("one", "other")


def test_the_gpu_page_is_written_from_the_stored_figures():
    figures = common.ROOT / "docs/gpu.json"
    gpu.write(Path("report"), json.loads(figures.read_text()) if figures.exists() else {})
    text = Path("report/gpu.md").read_text()
    assert ("No GPU has been measured yet" in text) != figures.exists()
    assert text == (common.ROOT / "docs/gpu.md").read_text()


def test_the_notes_name_every_variant_of_a_step():
    config = step.parse_args(["--precisions", "bf16", "--choices", "--compile"])
    names = step.make_variants(config, torch.device("cuda"))
    assert list(names) == ["reference", "bf16", "bf16 compiled", "bf16 channels_last"]
    notes = (common.ROOT / "benchmarks/NOTES.md").read_text()
    for name in (*names, "bf16 untried"):
        assert name == "reference" or f"`{name}`" in notes


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.stem)
def test_each_benchmark_starts_as_a_script_and_has_a_help_text(script, tmp_path):
    argv = [sys.executable, str(script), "--help"]
    found = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (found.returncode, found.stderr) == (0, "")
    assert "usage:" in found.stdout
    assert list(tmp_path.iterdir()) == []


# -- scores ------------------------------------------------------------------------------------


def test_label_maps_are_scored_by_pixel_and_by_class():
    """Class 0 fills three quarters and is right in two thirds of it; class 9 is right; colours are only near the palette."""
    truth = torch.zeros(3, 4, 4, dtype=torch.uint8)
    truth[:] = label_score.PALETTE[0].view(3, 1, 1)
    truth[:, :, 3] = label_score.PALETTE[9].view(3, 1)
    output = truth.clone()
    output[:, :, 0] = label_score.PALETTE[9].view(3, 1)
    near = (output.int() + torch.tensor([9, -12, 7]).view(3, 1, 1)).clamp(0, 255).to(torch.uint8)
    scores = label_score.label_scores([(near, truth)])
    assert scores == pytest.approx({"pixel accuracy": 0.75, "mean accuracy": (2 / 3 + 1) / 2, "mean IoU": 7 / 12})
    large = truth.repeat_interleave(3, 1).repeat_interleave(3, 2)
    assert label_score.label_scores([(near, large)]) == pytest.approx(scores)  # enlarged without blurring


def test_label_maps_are_paired_by_name_whatever_their_format(tmp_path, refused):
    colours = [tuple(label_score.PALETTE[i].tolist()) for i in (0, 5)]
    for folder, names in (("fake", "ab"), ("truth", "bc")):
        (tmp_path / folder).mkdir()
        for name, colour in zip(names, colours, strict=True):
            suffix = "png" if folder == "fake" else "jpg"
            Image.new("RGB", (16, 16), colour).save(tmp_path / folder / f"{name}.{suffix}", quality=95)
    found = label_score.folder_scores(tmp_path / "fake", tmp_path / "truth")
    assert found == {"pixel accuracy": 0, "mean accuracy": 0, "mean IoU": 0}  # b: class 5 instead of 0
    (tmp_path / "truth" / "b.jpg").unlink()
    assert "no image has a name that is also in" in refused(label_score.main, "--fake", "fake", "--truth", "truth")


def test_a_discriminator_that_learns_ranks_one_domain_above_the_other(tmp_path, capsys, refused):
    for split, count in (("train", 4), ("test", 3)):
        for domain, level in (("A", 40), ("B", 200)):
            (tmp_path / f"{split}{domain}").mkdir()
            for i in range(count):
                Image.new("RGB", (40, 32), (level + i, level, level)).save(tmp_path / f"{split}{domain}/{i}.png")
    argv = ["--dataset", tmp_path, "--size", 32, "--ndf", 4, "--n_layers_D", 2, "--lr", 0.01]
    argv += ["--steps", 60, "--every", 60, "--norms", "none", "spectral"]
    discriminators.main([str(word) for word in argv])
    none, spectral = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"none: step 60, loss \d\.\d{3}, ranked 1\.000", none)
    assert re.fullmatch(r"spectral: step 60, loss \d\.\d{3}, ranked 1\.000", spectral)
    assert [isinstance(m, nn.InstanceNorm2d) for m in discriminators.build("instance", 4, 2).layers].count(True) == 2
    error = refused(discriminators.main, "--dataset", tmp_path, "--size", 16, "--n_layers_D", 3)
    assert "--n_layers_D 3: expected at most 2 for --size 16" in error


def test_a_domain_score_is_the_mean_of_several_classifiers(tmp_path, monkeypatch):
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(tmp_path / f"{i}.png")
    brighter_than = [lambda x, level=level: x.mean((1, 2, 3))[:, None] - level for level in (-0.9, -0.2, 0.3)]
    monkeypatch.setattr(domain_score, "classifiers", lambda *_: brighter_than)
    assert domain_score.folder_score(tmp_path, tmp_path, "B", 1) == pytest.approx((3 + 2 + 1) / 3 / 4)
    assert domain_score.folder_score(tmp_path, tmp_path, "A", 1) == pytest.approx((1 + 2 + 3) / 3 / 4)


@pytest.mark.slow
def test_domains_are_predicted_from_colours_and_from_greyscale(tmp_path, capsys, refused, monkeypatch):
    """Red against blue of the same luminance: without colour, a classifier predicts one domain for all images."""
    monkeypatch.setattr(domain_score, "CLASSIFIERS", 1)
    for split, count in (("train", 12), ("test", 3)):
        for domain, colour in (("A", (162, 40, 40)), ("B", (60, 60, 200))):
            (tmp_path / f"{split}{domain}").mkdir()
            for i in range(count):
                image = Image.new("RGB", (48, 40), colour)
                image.paste((i * 9,) * 3, (0, 0, 8 + i % 5, 8))
                image.save(tmp_path / f"{split}{domain}/{i}.png")

    def score(domain, target, channels):
        return domain_score.folder_score(tmp_path, tmp_path / f"test{domain}", target, channels)

    assert [score(domain, target, 3) for domain, target in ("AA", "BB", "AB", "BA")] == [1, 1, 0, 0]
    assert score("A", "A", 1) + score("B", "B", 1) == pytest.approx(1)
    domain_score.main(["--dataset", str(tmp_path), "--fake_B", str(tmp_path / "testB")])
    colour, grey = capsys.readouterr().out.splitlines()
    assert colour == "fake_B: 1.000 predicted as B (untranslated A images 0.000, real B images 1.000)"
    assert grey.startswith("fake_B in greyscale: ")
    assert "nothing to score" in refused(domain_score.main, "--dataset", tmp_path)
    assert "nowhere" in refused(domain_score.main, "--dataset", tmp_path, "--fake_A", tmp_path / "nowhere")
