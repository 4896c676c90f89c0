"""benchmarks/reproduce.py: its recipes are valid, and what it writes down replaces only its own."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_dataset
from tiny_runs import save_run

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import reproduce

import distill
import train
from toolkit import images

ROW = {"cells": {"PSNR": "1 / 2"}, "minutes": 3.0, "commit": "abc"}


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "STORE", tmp_path / "results.json")
    monkeypatch.setattr(reproduce, "PAGES", tmp_path)
    path = tmp_path / "maps.md"
    path.write_text("# Results\n\nBy hand.\n")
    return path


@pytest.mark.parametrize("task", reproduce.TASKS)
def test_every_recipe_parses(task):
    for run, recipe in reproduce.TASKS[task].runs.items():
        stage, *words = recipe.replace(" then ", " ").split()
        args = {"train": train, "distill": distill}[stage].parse_args([*words, "--run_name", run])
        if stage == "distill":
            assert str(args.teacher) in {name for task in reproduce.TASKS.values() for name in task.runs}


def test_a_row_is_written_with_its_command_and_the_rest_of_the_page_stays(page):
    reproduce.write_down("maps", {"machine": "one core", "rows": {"maps_64": ROW}})
    reproduce.write_down("maps_128", {"machine": "one core", "rows": {"maps_128": ROW}})
    reproduce.write_down("maps", {"machine": "two cores", "rows": {"maps_64": ROW | {"minutes": 4.5}}})
    text = page.read_text()
    assert text.startswith("# Results\n\nBy hand.\n")
    assert text.count("| maps_64 | 1 / 2 | 4.5 | abc |") == 1
    assert text.count("| maps_128 | 1 / 2 | 3.0 | abc |") == 1
    assert "3.0 | abc |" not in text.split("<!-- end of maps -->")[0]
    recipe = reproduce.TASKS["maps"].runs["maps_64"].removeprefix("train ")
    assert f"python train.py {recipe} --run_name maps_64" in text
    assert set(json.loads(reproduce.STORE.read_text())) == {"maps", "maps_128"}


@pytest.mark.parametrize("task", reproduce.TASKS)
def test_the_page_says_what_was_recorded(task):
    stored = reproduce.read_store()[task]
    page = reproduce.PAGES / f"{reproduce.TASKS[task].page or task}.md"
    part = page.read_text(encoding="utf-8").split(f"<!-- {task} -->\n")[1]
    assert part.split(f"\n<!-- end of {task} -->")[0] == reproduce.lay_out(task, stored)


def test_a_checkerboard_has_its_energy_at_the_highest_frequency(tmp_path):
    columns = torch.arange(64).expand(64, 64)
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    for name, pattern in (("fine", columns % 2), ("coarse", columns // 8 % 2)):
        (tmp_path / f"{name}A").mkdir()
        image = (0.8 * (pattern * 2.0 - 1) + 0.1 * noise).clamp(-1, 1)
        images.save_image(images.tensor_to_image(image), tmp_path / f"{name}A" / "0.png")
    assert reproduce.nyquist(tmp_path / "fineA") > 0.95
    assert reproduce.nyquist(tmp_path / "coarseA") < 0.05


def test_minutes_add_up_over_the_parts_of_a_stopped_run(tmp_path, monkeypatch):
    calls = []
    clock = iter([0, 60, 100, 220])
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: next(clock))

    def learn(argv):
        calls.append(argv)
        Path("saved_models/run").mkdir(parents=True, exist_ok=True)
        Path("saved_models/run/latest.pt").touch()
        if len(calls) == 1:
            raise SystemExit(130)

    monkeypatch.setattr(reproduce.train, "main", learn)
    with pytest.raises(SystemExit):
        reproduce.learn("run", "train --dataset_name maps", Path("data"))
    assert reproduce.learn("run", "train --dataset_name maps", Path("data")) == 3.0
    assert calls == [
        ["--dataset_name", "maps", "--run_name", "run", "--data_root", "data"],
        ["--run_name", "run", "--start_from", "latest"],
    ]


def test_what_changes_once_all_epochs_are_done_is_learnt_after_them_whatever_was_reached(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(reproduce.train, "main", calls.append)
    recipe = "train --dataset_name maps --num_epochs 2 then --lambda_cycle 2 --num_epochs 3"
    latest = Path("saved_models/run/latest.pt")
    latest.parent.mkdir(parents=True)
    again = ["--run_name", "run", "--start_from", "latest"]
    reproduce.learn("run", recipe, Path("data"))
    new = ["--dataset_name", "maps", "--num_epochs", "2", "--run_name", "run", "--data_root", "data"]
    assert calls == [new, [*again, "--lambda_cycle", "2", "--num_epochs", "3"]]
    latest.touch()
    calls.clear()
    reproduce.learn("run", recipe, Path("data"))
    assert calls == [again, [*again, "--lambda_cycle", "2", "--num_epochs", "3"]]
    task = reproduce.Task("Title", {"run": recipe}, None, None, drawn=None)
    monkeypatch.setitem(reproduce.TASKS, "maps", task)
    commands = reproduce.lay_out("maps", {"machine": "one", "rows": {"run": {"cells": {}}}}).splitlines()[-3:-1]
    assert commands == [
        "python train.py --dataset_name maps --num_epochs 2 --run_name run",
        "python train.py --run_name run --start_from latest --lambda_cycle 2 --num_epochs 3",
    ]


def test_photos_are_translated_and_judged_whole_at_one_size_whatever_the_crops_were(tmp_path, monkeypatch):
    """A run that learnt on crops of 16 px sees whole test photos of 24 px, each of them once."""
    dataset = make_dataset(tmp_path / "elsewhere" / "photos", (2, 2, 3, 2), size=(40, 36))
    save_run("learnt", argv=["--img_height", "16", "--img_width", "16"])
    monkeypatch.setattr(reproduce, "PHOTO", 24)
    shown = {}

    def folder_score(dataset, folder, target, channels):
        shown[target, channels] = [images.read_image(path).size for path in images.list_images(folder)]
        return 0.5 if channels == 3 else 0.25

    monkeypatch.setattr(reproduce.domain_score, "folder_score", folder_score)
    cells = reproduce.photo_cells("learnt", dataset)
    assert shown == {
        ("B", 3): [(24, 24)] * 3,
        ("A", 3): [(24, 24)] * 2,
        ("B", 1): [(24, 24)] * 3,
        ("A", 1): [(24, 24)] * 2,
    }
    assert cells["taken for the target A→B / B→A"] == "0.50 / 0.50"
    assert cells["taken for the target in grey A→B / B→A"] == "0.25 / 0.25"
    written = json.loads((reproduce.IMAGES / "learnt" / "test" / "metrics.json").read_text())
    assert cells["cycle A / B"] == " / ".join(f"{written[way]['cycle']:.3f}" for way in ("AtoB", "BtoA"))
    assert written["scale"] == "native"
    assert {path.parent for path in dataset.rglob("*.png")} == {
        dataset / f"{s}{x}" for s in ("train", "test") for x in "AB"
    }


def test_a_film_shows_what_the_kept_epochs_made_of_the_same_photos_the_last_one_among_them(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path / "photos", (1, 1, 3, 1), size=(24, 24))
    save_run("learnt", epochs=5)
    shown = {}
    monkeypatch.setattr(reproduce.images, "draw_grid", shown.update)
    monkeypatch.setattr(reproduce, "FILMED", 3)
    task = reproduce.Task("", {}, lambda *_: {}, lambda *_: {}, side=24, filmed="learnt")
    reproduce.film(task, dataset)
    assert list(shown) == ["photo", "2 steps", "6 steps", "10 steps"]
    photos = shown["photo"]
    nets, _ = reproduce.load_run("learnt")
    assert torch.equal(shown["10 steps"], torch.cat([nets["G_AB"].eval()(x[None]) for x in photos]))
    assert not torch.equal(shown["10 steps"], shown["6 steps"])
