import hashlib
import os
import types

import numpy as np
import pytest
import torch
from conftest import make_dataset, noise_picture
from PIL import Image

import datasets
from datasets import (
    BadPictures,
    EpochSampler,
    UnpairedDataset,
    UnreadablePicture,
    draw_scene,
    held_out_split,
    list_pictures,
    load_picture,
    make_caches,
    make_loader,
    read_picture,
)
from utils import InputError

# -- reading ---------------------------------------------------------------------------------


def ramp(size=(16, 12)):
    """A grey ramp from left to right as floats in [0, 1], (height, width)."""
    return np.tile(np.linspace(0, 1, size[0]), (size[1], 1))


def test_grey_and_deep_pictures_come_out_with_the_same_greys(tmp_path):
    grey = ramp()
    expected = (grey * 255).round().astype(int)
    Image.fromarray((grey * 255).round().astype(np.uint8)).save(tmp_path / "L.png")
    Image.fromarray((grey * 65535).round().astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((grey * 65535).round().astype(np.uint16)).save(tmp_path / "16.tif")
    Image.fromarray((grey * 65535).round().astype(np.int32)).save(tmp_path / "32.tif")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "unit.tiff")
    Image.fromarray((grey * 255).astype(np.float32)).save(tmp_path / "levels.tiff")
    for path in list_pictures(tmp_path):
        for channels, mode in ((1, "L"), (3, "RGB")):
            picture = read_picture(path, channels)
            assert picture.mode == mode
            values = np.asarray(picture).astype(int).reshape(12, 16, channels)
            assert np.abs(values - expected[..., None]).max() <= 1, path.name


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff"])
def test_every_format_reads_as_the_colour_it_was_saved_as(tmp_path, suffix):
    Image.new("RGB", (16, 16), (200, 30, 90)).save(tmp_path / f"x.{suffix}")
    pixels = np.asarray(read_picture(tmp_path / f"x.{suffix}")).astype(int)
    assert np.abs(pixels - (200, 30, 90)).max() <= 6
    assert list_pictures(tmp_path) == [tmp_path / f"x.{suffix}"]


def test_palette_cmyk_and_one_bit_pictures_read_as_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    red.convert("P").save(tmp_path / "palette.png")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    assert np.abs(np.asarray(read_picture(tmp_path / "palette.png")).astype(int) - (255, 0, 0)).max() <= 5
    assert np.abs(np.asarray(read_picture(tmp_path / "cmyk.jpg")).astype(int) - (255, 0, 0)).max() <= 12
    assert read_picture(tmp_path / "bit.png").getpixel((0, 0)) == (255, 255, 255)


def test_transparency_is_laid_over_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "grey.png")
    palette = Image.new("P", (8, 8), 0)
    palette.save(tmp_path / "index.png", transparency=0)
    assert read_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert read_picture(tmp_path / "half.png").getpixel((0, 0)) == (255, 127, 127)
    assert read_picture(tmp_path / "grey.png").getpixel((0, 0)) == (255, 255, 255)
    assert read_picture(tmp_path / "index.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_turned_camera_is_turned_back(tmp_path):
    upright = Image.new("RGB", (20, 10), "white")
    upright.paste("black", (0, 0, 5, 10))  # the left edge is black
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees against the clock
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.png", exif=exif)
    picture = read_picture(tmp_path / "x.png")
    assert picture.size == (20, 10)
    assert picture.getpixel((1, 5)) == (0, 0, 0)
    assert picture.getpixel((18, 5)) == (255, 255, 255)


@pytest.mark.parametrize("damage", ["empty", "text", "half", "header"])
def test_a_damaged_picture_raises_one_kind_of_error(tmp_path, damage):
    noise_picture(0, (64, 64)).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    broken = {
        "empty": b"",
        "text": b"no picture",
        "half": whole[: len(whole) // 2],
        "header": b"\x89PNG\r\n\x1a\n" + b"\xff" * 99,
    }
    (tmp_path / "x.png").write_bytes(broken[damage])
    with pytest.raises(UnreadablePicture):
        read_picture(tmp_path / "x.png")


def test_pictures_are_found_in_nested_folders_in_natural_order(tmp_path):
    for name in ("10.png", "9.PNG", "sub/2.jpeg", "sub/.hidden.png", ".cache/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [str(p.relative_to(tmp_path)) for p in list_pictures(tmp_path)] == ["9.PNG", "10.png", "sub/2.jpeg"]


def test_load_picture_resizes_to_height_and_width(tmp_path):
    noise_picture(0, (20, 18)).save(tmp_path / "x.png")
    assert load_picture(tmp_path / "x.png", (8, 12)).shape == (3, 8, 12)
    assert load_picture(tmp_path / "x.png", None, 1).shape == (1, 18, 20)


# -- batches ---------------------------------------------------------------------------------


def dataset_of(root, **kwargs):
    paths = {domain: list_pictures(root / f"train{domain}") for domain in "AB"}
    return UnpairedDataset(paths, kwargs.pop("size", (16, 14)), **kwargs)


def all_batches(root, num_workers, epochs=2, first_step=0, seed=0):
    dataset = dataset_of(root, seed=seed)
    order = EpochSampler((5, 4), 2, seed=seed)
    loader, batches = make_loader(dataset, order, num_workers, pin_memory=False), []
    for epoch in range(epochs):
        order.epoch, order.first_step = epoch, first_step
        batches.append([torch.cat([batch["A"], batch["B"]]) for batch in loader])
    return batches


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_batches_do_not_depend_on_the_number_of_workers(tiny):
    alone, helped = all_batches(tiny, 0), all_batches(tiny, 2)
    assert [len(epoch) for epoch in alone] == [3, 3]
    for one, two in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])  # persistent workers do not freeze the epoch
    assert not torch.equal(alone[0][0], all_batches(tiny, 0, seed=1)[0][0])


def test_an_epoch_can_be_entered_at_any_step(tiny):
    whole, rest = all_batches(tiny, 0, 1)[0], all_batches(tiny, 0, 1, first_step=1)[0]
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))


def test_an_epoch_shows_the_larger_domain_whole_and_the_domains_are_drawn_apart():
    order = EpochSampler((7, 3), 2, seed=3)
    keys = [key for batch in order for key in batch]
    assert len(order) == 4
    assert all(len(batch) == 2 for batch in order)
    assert {key[2] for key in keys} == set(range(7))
    assert sorted(sum(key[3] == i for key in keys) for i in range(3)) == [2, 3, 3]
    assert [key[2] % 3 for key in keys] != [key[3] for key in keys]
    assert len(EpochSampler((7, 3), 2, steps=9)) == 9


def test_a_set_smaller_than_the_batch_is_drawn_with_repetition():
    (batch,) = list(EpochSampler((2, 1), 4))
    assert len(batch) == 4
    assert {key[3] for key in batch} == {0}


def test_crops_stay_inside_and_flips_mirror_half(tmp_path):
    root = make_dataset(tmp_path / "x", (1, 1, 1, 1), size=(16, 16))
    still = dataset_of(root, size=(16, 16), load_scale=1.0, flip=False)
    plain = load_picture(root / "trainA" / "0.png", None)
    assert all(torch.equal(still[0, i, 0, 0]["A"], plain) for i in range(5))
    flipping = dataset_of(root, size=(16, 16), load_scale=1.0, flip=True)
    answers = [flipping[0, i, 0, 0]["A"] for i in range(40)]
    mirrored = sum(torch.equal(x, plain.flip(2)) for x in answers)
    assert sum(torch.equal(x, plain) for x in answers) + mirrored == 40
    assert 8 <= mirrored <= 32
    cropping = dataset_of(root, size=(8, 12), load_scale=2.0, flip=False)
    crops = [cropping[0, i, 0, 0]["A"] for i in range(20)]
    assert all(x.shape == (3, 8, 12) for x in crops)
    assert len({hashlib.sha256(x.numpy().tobytes()).digest() for x in crops}) > 10


def test_an_unreadable_picture_is_replaced_and_reported(tiny):
    whole = (tiny / "trainA" / "2.png").read_bytes()
    (tiny / "trainA" / "2.png").write_bytes(whole[:300])
    item = dataset_of(tiny)[0, 0, 2, 0]
    assert [(domain, path.name) for domain, path, _ in item["bad"]] == [("A", "2.png")]
    assert item["A"].shape == (3, 16, 14)


def test_bad_pictures_are_named_once_and_stop_above_five_percent(tmp_path, capsys):
    bad = BadPictures(tmp_path / "trainA", 60)
    for i in (0, 0, 1, 2):
        bad.note(tmp_path / f"{i}\n.png", "torn")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"skipped, unreadable ({i} of 60)" for i in (1, 2, 3)]
    with pytest.raises(InputError, match="4 or more of 60 pictures are unreadable, more than 5%"):
        bad.note(tmp_path / "3.png", "torn")
    lenient = BadPictures(tmp_path, 3)
    lenient.note(tmp_path / "one.png", "a single one never stops")
    with pytest.raises(InputError):
        lenient.note(tmp_path / "two.png", "torn")


def test_held_out_split_prefers_test_then_val_then_train(tmp_path):
    root = make_dataset(tmp_path / "x")
    assert held_out_split(root) == "test"
    (root / "testA").rename(root / "valA")
    assert held_out_split(root) == "train"
    (root / "testB").rename(root / "valB")
    assert held_out_split(root) == "val"


# -- drawing, splitting, checking ------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "time", "digest"),
    [
        (0, "day", "e8312da6f231"),
        (100_000, "night", "6de63227faad"),
        (200_007, "day", "8b11213cbf49"),
        (200_007, "night", "081b3211059f"),
    ],
)
def test_demo_scenes_are_fixed(seed, time, digest):
    assert hashlib.sha256(draw_scene(seed, time, 64).tobytes()).hexdigest()[:12] == digest


def test_draw_makes_the_whole_set_once(tmp_path, monkeypatch, refused):
    small = {name: (time, first, 3) for name, (time, first, _) in datasets.DEMO_FOLDERS.items()}
    monkeypatch.setattr(datasets, "DEMO_FOLDERS", small)
    datasets.main(["draw", "day2night", "--size", "32"])
    assert [p.name for p in sorted(tmp_path.glob("datasets/*"))] == ["day2night"]
    assert len(list_pictures(tmp_path / "datasets")) == 12
    assert read_picture(tmp_path / "datasets/day2night/testB/0002.png").size == (32, 32)
    assert "exists already" in refused(datasets.main, "draw", "day2night")


def test_a_failed_drawing_leaves_nothing(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(datasets, "draw_scene", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    assert "disk full" in refused(datasets.main, "draw", "day2night", code=1)
    assert list((tmp_path / "datasets").iterdir()) == []


def two_folders(tmp_path, counts=(10, 7)):
    for name, count in zip(("faces", "drawings"), counts, strict=True):
        (tmp_path / name / "more").mkdir(parents=True)
        for i in range(count):
            noise_picture(f"{name}{i}").save(tmp_path / name / ("more" if i % 2 else ".") / f"{i}.png")
    return ["split", "--A", str(tmp_path / "faces"), "--B", str(tmp_path / "drawings"), "--dataset_name", "f2d"]


def test_split_makes_the_layout_from_two_folders(tmp_path):
    datasets.main([*two_folders(tmp_path), "--test_fraction", "0.2"])
    root = tmp_path / "datasets" / "f2d"
    counts = {split: len(list_pictures(root / split)) for split in ("trainA", "trainB", "testA", "testB")}
    assert counts == {"trainA": 8, "trainB": 5, "testA": 2, "testB": 2}
    for domain, source in (("A", "faces"), ("B", "drawings")):
        copied = {p.read_bytes() for part in ("train", "test") for p in list_pictures(root / f"{part}{domain}")}
        assert copied == {p.read_bytes() for p in list_pictures(tmp_path / source)}  # nothing lost, nothing in both


def test_split_takes_at_most_max_images(tmp_path):
    datasets.main([*two_folders(tmp_path), "--max_images", "4", "--test_fraction", "0.5"])
    assert (
        len(list_pictures(tmp_path / "datasets/f2d/trainA")) == len(list_pictures(tmp_path / "datasets/f2d/testB")) == 2
    )


def test_split_refuses_in_one_line(tmp_path, refused):
    argv = two_folders(tmp_path)
    (tmp_path / "empty").mkdir()
    replaced = [str(tmp_path / "empty") if word.endswith("faces") else word for word in argv]
    assert "no picture inside" in refused(datasets.main, *replaced)
    assert "no such folder" in refused(datasets.main, *[w.replace("faces", "face") for w in argv])
    assert "one lies inside the other" in refused(datasets.main, *[w.replace("drawings", "faces/more") for w in argv])
    assert "the same folder" in refused(datasets.main, *[w.replace("drawings", "faces") for w in argv])
    assert "one folder name" in refused(datasets.main, *argv[:-1], "../../elsewhere")
    assert "at most 0.9" in refused(datasets.main, *argv, "--test_fraction", "1.5")
    assert not (tmp_path / "datasets").exists()
    datasets.main(argv)
    assert "exists already" in refused(datasets.main, *argv)


def test_check_counts_measures_and_finds_leaks(tiny, capsys):
    (tiny / "testA" / "copy.png").write_bytes((tiny / "trainA" / "0.png").read_bytes())
    (tiny / "trainB" / "torn.png").write_bytes(b"torn")
    noise_picture(1, (40, 30)).save(tiny / "trainB" / "large.png")
    datasets.main(["check", "tiny", "--sheet"])
    out = capsys.readouterr().out
    assert "trainA: 5 pictures, 0 unreadable; 5 of 20x18 px" in out
    assert "trainB: 6 pictures, 1 unreadable; 4 of 20x18, 1 of 40x30 px" in out
    assert "trainA/0.png = testA/copy.png" in out
    assert "1 pictures stand in more than one part" in out
    sheet = read_picture(tiny.parents[1] / "generated_images/tiny/check/trainB.png")
    assert sheet.width > 400


def test_check_refuses_what_cannot_be_trained_on(tiny, refused):
    assert "nearest existing: tiny" in refused(datasets.main, "check", "tinny")
    for path in list_pictures(tiny / "trainB")[:3]:
        path.write_bytes(b"torn")
    assert "3 of 4 pictures in trainB are unreadable" in refused(datasets.main, "check", "tiny")
    for path in list_pictures(tiny / "trainB"):
        path.unlink()
    assert "no picture inside" in refused(datasets.main, "check", "tiny")
    (tiny / "trainB").rmdir()
    assert "no trainB/ inside (found: testA, testB, trainA)" in refused(datasets.main, "check", "tiny")


def test_a_sub_command_is_required(refused):
    assert "required" in refused(datasets.main)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_folders_named_like_pictures_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    noise_picture(0).save(tmp_path / "real.png")
    assert list_pictures(tmp_path) == [tmp_path / "real.png"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_domain_that_became_unreadable_is_reported_through_the_workers(tiny, workers):
    paths = list_pictures(tiny / "trainA")
    loader = make_loader(dataset_of(tiny), EpochSampler((5, 4), 2), workers, pin_memory=False)
    for path in paths:
        path.write_bytes(path.read_bytes()[:300])
    bad = BadPictures(tiny / "trainA", len(paths))

    def read_all():
        for batch in loader:
            for _, path, reason in batch["bad"]:
                bad.note(path, reason)

    with pytest.raises(InputError, match="of 5 pictures are unreadable"):
        read_all()


# -- the cache ---------------------------------------------------------------------------------


def cached(dataset, root, kind, workers=0):
    dataset.caches = make_caches(kind, dataset.paths, dataset.load_size, dataset.channels, root, workers)
    return dataset


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_cache_changes_no_sample_and_reads_each_file_once(tiny, kind, workers, monkeypatch):
    def passes(dataset):
        order, found = EpochSampler((5, 4), 2), []
        loader = make_loader(dataset, order, workers, pin_memory=False)
        for epoch in range(3):
            order.epoch = epoch
            found += [batch[domain].clone() for batch in loader for domain in "AB"]
        return found

    plain, dataset = passes(dataset_of(tiny)), cached(dataset_of(tiny), tiny, kind, workers)
    assert all(map(torch.equal, plain, passes(dataset)))
    monkeypatch.setattr(datasets, "read_picture", None)  # whoever reads now, fails
    assert all(map(torch.equal, plain, passes(dataset)))
    if kind == "disk":
        assert all(map(torch.equal, plain, passes(cached(dataset_of(tiny), tiny, kind, workers))))


def test_a_damaged_cache_is_read_anew_and_a_changed_picture_gets_a_new_one(tiny):
    key = (0, 0, 2, 1)
    before = cached(dataset_of(tiny), tiny, "disk")[key]
    (file, other) = sorted((tiny / ".cache").iterdir())
    for path in (file, other):
        path.write_bytes(b"\1" * (path.stat().st_size // 2))  # half-written
    assert torch.equal(cached(dataset_of(tiny), tiny, "disk")[key]["A"], before["A"])
    noise_picture("new").save(tiny / "trainA" / "2.png")
    changed = cached(dataset_of(tiny), tiny, "disk")[key]
    assert torch.equal(changed["A"], dataset_of(tiny)[key]["A"])
    assert not torch.equal(changed["A"], before["A"])
    assert torch.equal(changed["B"], before["B"])


def test_an_unreadable_picture_is_never_kept(tiny):
    (tiny / "trainA" / "1.png").write_bytes(b"torn")
    dataset = cached(dataset_of(tiny), tiny, "ram")
    for _ in range(2):
        assert [path.name for _, path, _ in dataset[0, 0, 1, 0]["bad"]] == ["1.png"]


def test_grey_pictures_are_cached_too(tiny):
    dataset = cached(dataset_of(tiny, channels=1), tiny, "ram")
    first = dataset[0, 0, 1, 1]["A"]
    assert first.shape == (1, 16, 14)
    assert torch.equal(dataset[0, 0, 1, 1]["A"], first)


def test_a_cache_that_does_not_fit_is_refused_with_the_numbers(tiny, monkeypatch):
    monkeypatch.setattr(datasets, "free_memory", lambda: 2**20)
    paths = {"A": [tiny] * 1000, "B": [tiny]}
    with pytest.raises(InputError, match=r"--cache ram: needs 0\.18 GiB, and memory has 0\.00 left; take --cache disk"):
        make_caches("ram", paths, (256, 256), 3, tiny, 0)
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    with pytest.raises(InputError, match="--cache disk: needs"):
        make_caches("disk", {"A": [tiny] * 9, "B": [tiny]}, (256, 256), 3, tiny, 0)
