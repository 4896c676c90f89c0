"""Where data sets come from: layouts of folders, patterns, archives, parquet files."""

import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY, make_dataset, noise_image
from PIL import Image

import datasets
import prepare
import test as test_command
import train
from toolkit import checks
from toolkit.images import list_images

ADDED = ["--dataset_name", "a2b"]


def png(seed):
    data = io.BytesIO()
    noise_image(seed, (8, 8)).save(data, format="PNG")
    return data.getvalue()


def seeds_in(folder, most=12):
    """Which of the images 0, 1, … are in a folder."""
    known = {noise_image(seed, (8, 8)).tobytes(): seed for seed in range(most)}
    found = []
    for path in list_images(Path(folder)):
        with Image.open(path) as image:
            found.append(known[image.tobytes()])
    return sorted(found)


def make_tar(path, names, mode="w:gz", extra=()):
    with tarfile.open(path, mode) as file:
        for seed, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(png(seed))
            file.addfile(info, io.BytesIO(png(seed)))
        for info in extra:
            file.addfile(info, io.BytesIO(b"\0" * info.size))
    return path


def split(*argv):
    prepare.main(["split", *map(str, argv), *ADDED])
    made = Path("datasets/a2b")
    return {domain: sorted(seeds_in(made / f"train{domain}") + seeds_in(made / f"test{domain}")) for domain in "AB"}


# -- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["{}/{}", "{}_{}"])
def test_other_names_of_the_four_folders_are_understood(tmp_path, layout, capsys):
    made = make_dataset(tmp_path / "datasets" / "tiny")
    before = {name: list_images(made / name)[0].read_bytes() for name in ("trainA", "testB")}
    for name in ("trainA", "trainB", "testA", "testB"):
        target = made / layout.format(name[:-1], name[-1])
        target.parent.mkdir(exist_ok=True)
        (made / name).rename(target)
    assert datasets.split_images(made, "trainA")[0].read_bytes() == before["trainA"]
    assert datasets.split_images(made, "testB")[0].read_bytes() == before["testB"]
    assert datasets.held_out_split(made) == "test"
    assert datasets.held_out_folders(made, paired=True)["A"] == made / layout.format("test", "A")
    first = datasets.split_images(made, "trainA")[0]
    first.with_name("copy.png").write_bytes(first.read_bytes())
    prepare.main(["check", "tiny", "--remove_twins"])
    assert "trainA: 6 images, 0 unreadable" in capsys.readouterr().out
    assert (made / "removed/trainA/copy.png").is_file()
    assert not first.with_name("copy.png").exists()


@pytest.mark.slow
def test_a_run_on_another_layout_trains_and_is_tested(tiny):
    (tiny / "train").mkdir()
    (tiny / "trainA").rename(tiny / "train" / "A")
    (tiny / "trainB").rename(tiny / "train" / "B")
    (tiny / "testA").rename(tiny / "test_A")
    train.main(["--dataset_name", "tiny", *TINY, "--num_epochs", "1"])
    scores = test_command.main(["--dataset_name", "tiny", "--metrics", "paired,identity", "--device", "cpu"])
    assert scores.keys() == {"AtoB", "BtoA"}


@pytest.mark.slow
@pytest.mark.parametrize(("removed", "results"), [("B", {"fake_B"}), ("A", {"fake_A"}), ("AB", {"fake_B"})])
def test_the_command_that_train_py_prints_works_without_test_images(tiny, capsys, removed, results):
    for domain in removed:
        for path in (tiny / f"test{domain}").iterdir():
            path.unlink()
        (tiny / f"test{domain}").rmdir()
    train.main(["--dataset_name", "tiny", *TINY, "--num_epochs", "1"])
    argv = re.search(r"then: python \S*test.py (.*)", capsys.readouterr().out)[1].split()
    test_command.main([*argv, "--device", "cpu"])
    out = capsys.readouterr().out
    assert ("has test images of" in out) == (len(removed) == 1)
    assert {path.parent.name for path in Path("generated_images/tiny").rglob("fake_*/0.png")} == results


def test_one_image_in_a_domain_is_enough():
    for name, count in (("one", 1), ("many", 5)):
        Path(name).mkdir()
        for i in range(count):
            noise_image(i, (8, 8)).save(f"{name}/{i}.png")
    assert split("--A", "one", "--B", "many") == {"A": [0], "B": [0, 1, 2, 3, 4]}
    assert seeds_in("datasets/a2b/trainA") == [0]
    assert not Path("datasets/a2b/testA").exists()


def test_held_out_images_are_partners_by_the_suffix_of_their_domain():
    paths = [
        Path(name) for name in ("testA/1_A.png", "testA/2_A.png", "testB/1_B.jpg", "testB/2_B.jpg", "testB/2_A.png")
    ]
    assert checks.left_without_partner(paths, {Path("testB/1_B.jpg")}) == [Path("testA/1_A.png")]
    assert checks.left_without_partner(paths, {Path("testB/2_B.jpg")}) == []  # 2_A is in both
    assert checks.left_without_partner(paths, {Path("testA/1_A.png")}) == [Path("testB/1_B.jpg")]


# -- patterns ----------------------------------------------------------------------------------


def test_patterns_choose_images_of_one_folder(capsys):
    Path("pets/sub").mkdir(parents=True)
    for seed, name in enumerate(("cat_1.png", "cat_2.png", "dog_1.png", "sub/dog_2.png")):
        Path("pets", name).write_bytes(png(seed))
    Path("pets/cat_notes.txt").touch()
    assert split("--A", "pets/cat_*", "--B", "pets/**/dog_*.png") == {"A": [0, 1], "B": [2, 3]}
    assert "left out 1 file that are no images" in capsys.readouterr().out.replace("1 files", "1 file")


def test_patterns_may_name_folders_as_on_kaggle():
    for seed, name in enumerate(("monet_jpg/1.jpg", "photo_jpg/1.jpg")):
        Path("gan", name).parent.mkdir(parents=True)
        Path("gan", name).write_bytes(png(seed))
    assert split("--A", "gan/monet_*", "--B", "gan/photo_jpg/*") == {"A": [0], "B": [1]}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--A", "pets/*", "--B", "pets/cat_*"], "both hold "),
        (["--A", "pets/*", "--B", "pets/*"], "the same folder"),
        (["--A", "pets/cow*", "--B", "pets/cat*"], "--A pets/cow*: no image inside"),
        (["--A", "pets/cat*", "--B", "pets/dog*", "--rows_A", "x=1"], "is no parquet file"),
        (["--A", "pets/cat*", "--B", "pets/dog*", "--rows_A", "x"], "expected COLUMN=VALUE"),
        (["--A", "pets/cat*", "--B", "notes.txt"], "--B notes.txt: no usable archive"),
        (["--A", "pets/cat*", "--B", "torn.parquet"], "torn.parquet: not a readable parquet file"),
        (["--A", "pets/cat*", "--B", "torn.zip"], "--B torn.zip: no usable archive"),
    ],
)
def test_wrong_sources_are_refused_and_nothing_is_left(refused, argv, expected):
    Path("pets").mkdir()
    for name in ("cat_1.png", "dog_1.png"):
        Path("pets", name).write_bytes(png(1))
    for name in ("notes.txt", "torn.parquet", "torn.zip"):
        Path(name).write_bytes(b"PAR1 or no archive at all")
    assert expected in refused(prepare.main, "split", *argv, *ADDED)
    assert not list(Path().glob("datasets/*"))


# -- archives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_is_unpacked_like_a_zip(tmp_path, mode):
    names = (
        "set/trainA/0.png",
        "set/train/B/sub/1.png",
        "x/test_A/2.png",
        "x/other/3.png",
        "trainA/.hidden.png",
        "trainB/a.txt",
    )
    assert prepare.unpack(make_tar(tmp_path / "set.tar", names, mode), tmp_path) == {
        "trainA": 1, "trainB": 1, "testA": 1, "testB": 0, "valA": 0, "valB": 0,
    }  # fmt: skip
    assert seeds_in(tmp_path / "trainB/sub") == [1]


def entry(name="trainA/x.png", kind=tarfile.REGTYPE, target="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (entry("../x.png"), "outside"),
        (entry("/x/trainA/x.png"), "would write outside"),
        (entry(kind=tarfile.SYMTYPE, target="0.png"), "would write outside"),
        (entry(kind=tarfile.SYMTYPE, target="/etc/passwd"), "link to an absolute path"),
        (entry(kind=tarfile.LNKTYPE, target="trainA/0.png"), "would write outside"),
        (entry(kind=tarfile.CHRTYPE), "special file"),
        (entry(kind=tarfile.FIFOTYPE), "special file"),
        (entry(size=3000), "claims"),
        (entry(name=f"trainA/{'x' * 5000}.png"), "larger than"),
        ([entry(f"{i}.txt") for i in range(9)], "more headers"),
    ],
)
def test_hostile_tars_are_refused(tmp_path, monkeypatch, extra, expected):
    monkeypatch.setattr(prepare, "MOST_BYTES", 2000)
    monkeypatch.setattr(prepare, "MOST_BYTES_AT_ONCE", 4096)
    monkeypatch.setattr(prepare, "MOST_HEADERS", 5000)
    archive = make_tar(
        tmp_path / "set.tgz", ("trainA/0.png", "trainB/1.png"), extra=extra if isinstance(extra, list) else [extra]
    )
    folder = tmp_path / "into"
    folder.mkdir()
    with pytest.raises(Exception, match=expected):
        prepare.unpack(archive, folder)
    assert not (tmp_path / "x.png").exists()


def test_archives_of_each_domain_are_split():
    make_tar(Path("cats.tar.gz"), ("cats/0.png", "cats/more/1.png"))
    with zipfile.ZipFile("dogs.zip", "w") as file:
        file.writestr("2.png", png(2))
        file.writestr("readme.md", "")
    assert split("--A", "cats.tar.gz", "--B", "dogs.zip") == {"A": [0, 1], "B": [2]}
    assert json.loads(Path("datasets/a2b/domains.json").read_text(encoding="utf-8")) == ["cats", "dogs"]
    assert not Path("datasets/a2b/.sources").exists()


# -- parquet -----------------------------------------------------------------------------------


def write_parquet(name, columns, labels=None, names=()):
    """Write images by column: seeds, None for a row without bytes."""
    table = {}
    for column, seeds in columns.items():
        table[column] = [
            {"bytes": None if seed is None else png(seed), "path": f"/home/them/{i}.png"}
            for i, seed in enumerate(seeds)
        ]
    if labels:
        table["label"] = labels
    found = pa.table(table)
    features = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
    pq.write_table(found.replace_schema_metadata({"huggingface": json.dumps(features)}) if names else found, name)


def test_images_of_parquet_files_are_split_and_rows_without_bytes_are_counted(capsys):
    write_parquet("a-0.parquet", {"image": [0, None, 1]})
    write_parquet("a-1.parquet", {"image": [2]})
    write_parquet("b.parquet", {"image": [3, 4]})
    assert split("--A", "a-*.parquet", "--B", "b.parquet") == {"A": [0, 1, 2], "B": [3, 4]}
    assert "a-0.parquet: left out 1 row without the bytes of an image" in capsys.readouterr().err
    assert {path.suffix for path in list_images(Path("datasets/a2b"))} == {".png"}


@pytest.mark.parametrize("value", ["cat=dog", "0=1"])
def test_a_label_chooses_the_rows_of_a_domain(value):
    write_parquet("all.parquet", {"image": [0, 1, 2, 3]}, [0, 1, 1, 0], ("cat", "dog"))
    first, _, second = value.partition("=")
    rows = ["--rows_A", f"label={first}", "--rows_B", f"label={second}"]
    assert split("--A", "all.parquet", "--B", "all.parquet", *rows) == {"A": [0, 3], "B": [1, 2]}
    assert json.loads(Path("datasets/a2b/domains.json").read_text(encoding="utf-8")) == [first, second]


def test_of_two_image_columns_each_domain_has_its_own():
    write_parquet("all.parquet", {"imageA": [0, 1], "imageB": [2, 3]})
    assert split("--A", "all.parquet", "--B", "all.parquet") == {"A": [0, 1], "B": [2, 3]}


@pytest.mark.parametrize(
    ("columns", "argv", "expected"),
    [
        ({"image": [0, 1]}, [], "the same images; choose rows"),
        ({"one": [0], "two": [1]}, [], "columns one, two; expected one of images, or one whose name ends with A"),
        ({"image": [0, 1]}, ["--rows_A", "kind=cat"], "no column kind; expected one of image"),
        ({"image": [None, None]}, [], "no image inside"),
    ],
)
def test_parquet_files_that_do_not_tell_the_domains_are_refused(refused, columns, argv, expected):
    write_parquet("all.parquet", columns)
    given = ["split", "--A", "all.parquet", "--B", "all.parquet", *argv, *ADDED]
    assert expected in refused(prepare.main, *given)


def test_a_parquet_file_that_claims_too_much_is_refused(refused, monkeypatch):
    monkeypatch.setattr(prepare, "MOST_BYTES", 100)
    write_parquet("a.parquet", {"image": [0, 1]})
    assert "claims" in refused(prepare.main, "split", "--A", "a.parquet", "--B", "a.parquet", *ADDED)


def test_without_pyarrow_the_command_that_installs_it_is_named(refused, monkeypatch):
    monkeypatch.setattr("utils.importlib.util.find_spec", lambda name: None)
    Path("a.parquet").touch()
    line = refused(prepare.main, "split", "--A", "a.parquet", "--B", "a.parquet", *ADDED)
    assert "pip install -r requirements-parquet.txt" in line
