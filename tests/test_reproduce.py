"""benchmarks/reproduce.py: its recipes are valid, and it replaces only its own part of a page."""

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
def test_the_flags_of_every_run_parse(task):
    runs = {name for task in reproduce.TASKS.values() for name in task.runs}
    for run, recipe in reproduce.TASKS[task].runs.items():
        command, *words = recipe.replace(" then ", " ").split()
        args = {"train": train, "distill": distill}[command].parse_args([*reproduce.expand(words), "--run_name", run])
        assert command == "train" or str(args.teacher) in runs


def test_a_row_is_written_with_its_command_and_the_rest_of_the_page_is_unchanged(page):
    reproduce.write_results("maps", {"machine": "one core", "rows": {"maps_64": ROW}})
    reproduce.write_results("maps_128", {"machine": "one core", "rows": {"maps_128": ROW}})
    reproduce.write_results("maps", {"machine": "two cores", "rows": {"maps_64": ROW | {"minutes": 4.5}}})
    text = page.read_text()
    assert text.startswith("# Results\n\nBy hand.\n")
    assert text.count("| maps_64 | 1 / 2 | 4.5 | abc |") == 1
    assert text.count("| maps_128 | 1 / 2 | 3.0 | abc |") == 1
    assert "3.0 | abc |" not in text.split("<!-- end of maps -->")[0]
    recipe = reproduce.TASKS["maps"].runs["maps_64"].removeprefix("train ")
    assert f"python train.py {recipe} --run_name maps_64" in text
    assert set(json.loads(reproduce.STORE.read_text())) == {"maps", "maps_128"}


@pytest.mark.parametrize("task", reproduce.TASKS)
def test_the_pages_contain_the_stored_results(task):
    page = reproduce.PAGES / f"{reproduce.TASKS[task].page or task}.md"
    block = page.read_text(encoding="utf-8").split(f"<!-- {task} -->\n")[1].split(f"\n<!-- end of {task} -->")[0]
    assert block == reproduce.layout_block(task, reproduce.read_store()[task])


def test_a_checkerboard_has_its_energy_at_the_highest_frequency(tmp_path):
    columns = torch.arange(64).expand(64, 64)
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    for name, pattern in (("fine", columns % 2), ("coarse", columns // 8 % 2)):
        (tmp_path / f"{name}A").mkdir()
        image = (0.8 * (pattern * 2.0 - 1) + 0.1 * noise).clamp(-1, 1)
        images.save_image(images.tensor_to_image(image), tmp_path / f"{name}A" / "0.png")
    assert reproduce.nyquist(tmp_path / "fineA") > 0.95
    assert reproduce.nyquist(tmp_path / "coarseA") < 0.05


def test_minutes_of_an_interrupted_run_add_up(monkeypatch):
    calls = []
    clock = iter([0, 60, 100, 220])
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: next(clock))

    def train_main(argv):
        calls.append(argv)
        Path("saved_models/run").mkdir(parents=True, exist_ok=True)
        Path("saved_models/run/latest.pt").touch()
        if len(calls) == 1:
            raise SystemExit(130)

    monkeypatch.setattr(reproduce.train, "main", train_main)
    with pytest.raises(SystemExit):
        reproduce.train_run("run", "train --dataset_name maps", Path("data"))
    assert reproduce.train_run("run", "train --dataset_name maps", Path("data")) == 3.0
    assert calls == [
        ["--dataset_name", "maps", "--run_name", "run", "--data_root", "data"],
        ["--run_name", "run", "--start_from", "latest"],
    ]


def test_flags_after_then_are_used_once_the_first_epochs_are_done(monkeypatch):
    calls = []
    monkeypatch.setattr(reproduce.train, "main", calls.append)
    recipe = "train --dataset_name maps --num_epochs 2 then --lambda_cycle 2 --num_epochs 3"
    new = ["--dataset_name", "maps", "--num_epochs", "2", "--run_name", "run", "--data_root", "data"]
    again = ["--run_name", "run", "--start_from", "latest"]
    then = [*again, "--lambda_cycle", "2", "--num_epochs", "3"]
    reproduce.train_run("run", recipe, Path("data"))
    latest = Path("saved_models/run/latest.pt")
    latest.parent.mkdir(parents=True)
    latest.touch()
    reproduce.train_run("run", recipe, Path("data"))
    assert calls == [new, then, again, then]
    monkeypatch.setitem(reproduce.TASKS, "maps", reproduce.Task("Title", {"run": recipe}, None, None, drawn=None))
    commands = reproduce.layout_block("maps", {"machine": "one", "rows": {"run": {"cells": {}}}}).splitlines()[-3:-1]
    assert commands == [
        "python train.py --dataset_name maps --num_epochs 2 --run_name run",
        "python train.py --run_name run --start_from latest --lambda_cycle 2 --num_epochs 3",
    ]


def test_whole_photos_are_translated_and_classified_at_one_size(tmp_path, monkeypatch):
    """A run that was trained on crops of 16 px gets each test photo once, at 24 px."""
    dataset = make_dataset(tmp_path / "elsewhere" / "photos", (2, 2, 3, 2), size=(40, 36))
    save_run("trained", argv=["--img_height", "16", "--img_width", "16"])
    monkeypatch.setattr(reproduce, "PHOTO", 24)
    sizes = {}

    def folder_score(dataset, folder, target, channels):
        sizes[target, channels] = [images.read_image(path).size for path in images.list_images(folder)]
        return 0.5 if channels == 3 else 0.25

    monkeypatch.setattr(reproduce.domain_score, "folder_score", folder_score)
    cells = reproduce.photo_cells("trained", dataset)
    for channels in (3, 1):
        assert sizes["B", channels] == [(24, 24)] * 3
        assert sizes["A", channels] == [(24, 24)] * 2
    assert cells["predicted as the target A→B / B→A"] == "0.50 / 0.50"
    assert cells["predicted as the target in greyscale A→B / B→A"] == "0.25 / 0.25"
    scores = json.loads((reproduce.IMAGES / "trained" / "test" / "metrics.json").read_text())
    assert cells["cycle A / B"] == f"{scores['AtoB']['cycle']:.3f} / {scores['BtoA']['cycle']:.3f}"
    assert scores["scale"] == "native"
    assert len(list(dataset.rglob("*.png"))) == 2 + 2 + 3 + 2, "the data set itself is unchanged"


def test_a_film_shows_the_kept_epochs_with_the_last_one(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path / "photos", (1, 1, 3, 1), size=(24, 24))
    save_run("trained", epochs=5)
    rows = {}
    monkeypatch.setattr(reproduce.images, "draw_grid", rows.update)
    monkeypatch.setattr(reproduce, "FILM_ROWS", 3)
    reproduce.film(reproduce.Task("", {}, lambda *_: {}, lambda *_: {}, side=24, filmed="trained"), dataset)
    assert list(rows) == ["photo", "2 steps", "6 steps", "10 steps"]
    G_AB = reproduce.load_run("trained")[0]["G_AB"].eval()
    assert torch.equal(rows["10 steps"], torch.cat([G_AB(x[None]) for x in rows["photo"]]))
    assert not torch.equal(rows["10 steps"], rows["6 steps"])
