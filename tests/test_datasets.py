import hashlib
import os
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import make_dataset, noise_image
from PIL import Image

import datasets
from datasets import (
    EpochSampler,
    Feed,
    UnpairedDataset,
    find_dataset,
    held_out_folders,
    held_out_split,
    make_caches,
    make_loader,
    named_images,
    paired_images,
    split_images,
)
from toolkit import images
from toolkit.images import BadImages, list_images, load_image
from utils import InputError


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """What a stage sets for its process ends with the test."""
    monkeypatch.setattr(images, "max_pixels", images.max_pixels)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


# -- folders ---------------------------------------------------------------------------------


def test_a_data_set_is_found_or_the_nearest_one_named(tiny):
    root = tiny.parent
    assert find_dataset(root, "tiny") == tiny
    with pytest.raises(InputError, match=r"tinny.* tiny; .*prepare\.py split.* --dataset_name tinny"):
        find_dataset(root, "tinny")
    with pytest.raises(InputError, match=r"none/x.*day2night"):
        find_dataset(root / "none", "x")


def test_the_images_of_a_part_are_listed_and_missing_or_empty_ones_named(tiny):
    assert [path.name for path in split_images(tiny, "trainA")] == [f"{i}.png" for i in range(5)]
    assert [path.name for path in split_images(tiny, "trainA", 2)] == ["0.png", "1.png"]
    with pytest.raises(InputError, match=r"tiny: no valA/ .*testA, testB, trainA, trainB.*prepare\.py split"):
        split_images(tiny, "valA")
    (tiny / "valA").mkdir()
    with pytest.raises(InputError, match=r"valA: .*\.jpg"):
        split_images(tiny, "valA")


def test_held_out_split_prefers_test_then_val_then_train(tmp_path):
    root = make_dataset(tmp_path / "x")
    assert held_out_split(root) == "test"
    (root / "testA").rename(root / "valA")
    assert held_out_split(root) == "train"
    (root / "testB").rename(root / "valB")
    assert held_out_split(root) == "val"


def test_evaluation_looks_at_val_else_at_test_and_refuses_pairs_that_are_none(tiny):
    assert held_out_folders(tiny, paired=True) == {"A": tiny / "testA", "B": tiny / "testB"}
    for path in list_images(tiny / "testB"):
        path.rename(path.with_stem(f"b{path.stem}"))
    assert held_out_folders(tiny, paired=False) == {"A": tiny / "testA", "B": tiny / "testB"}
    with pytest.raises(InputError, match=r"--eval_metrics paired.*testA.*testB"):
        held_out_folders(tiny, paired=True)
    (tiny / "testA").rename(tiny / "valA")
    with pytest.raises(InputError, match="valB"):
        held_out_folders(tiny, paired=False)
    (tiny / "testB").rename(tiny / "valB")
    assert held_out_folders(tiny, paired=False) == {"A": tiny / "valA", "B": tiny / "valB"}


def save_named(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(f"{folder.name}{name}").save(folder / name)
    return folder


def test_images_are_read_by_the_name_that_pairs_share(tmp_path, capsys):
    folder = save_named(tmp_path / "testA", ["1.png", "sub/2.jpg", "10.png"])
    loaded = named_images(folder, (8, 6), 3)
    assert [str(name) for name in loaded] == ["1", "10", "sub/2"]
    assert all(x.shape == (1, 3, 8, 6) for x in loaded.values())
    assert torch.equal(loaded[folder.relative_to(folder) / "10"][0], load_image(folder / "10.png", (8, 6)))
    assert [str(name) for name in named_images(folder, (8, 6), 3, most=2)] == ["1", "sub/2"]
    assert [str(name) for name in named_images(folder, (8, 6), 3, most=3)] == ["1", "10", "sub/2"]
    (folder / "10.png").write_bytes(b"torn")
    assert [str(name) for name in named_images(folder, (8, 6), 1)] == ["1", "sub/2"]
    assert capsys.readouterr().err.count("skipped, unreadable") == 1
    with pytest.raises(InputError, match=r"10\.png"):
        named_images(folder, (8, 6), 3, "stop")


def names_of(loaded):
    return {domain: [str(name) for name in by_name] for domain, by_name in loaded.items()}


def test_pairs_are_thinned_together_and_stay_pairs(tmp_path):
    pairs = [f"p{i}" for i in range(6)]
    folders = {
        "A": save_named(tmp_path / "testA", [f"a{i}.png" for i in range(6)] + [f"{name}.jpg" for name in pairs]),
        "B": save_named(tmp_path / "testB", [f"{name}.png" for name in pairs] + ["q0.png", "q1.png", "q2.png"]),
    }
    assert names_of(paired_images(folders, (8, 8), 3, most=4)) == {
        "A": ["p0", "p2", "p4", "a0"],
        "B": ["p0", "p2", "p4", "q0"],
    }
    assert names_of(paired_images(folders, (8, 8), 3, most=3)) == {"A": ["p0", "p2", "p4"], "B": ["p0", "p2", "p4"]}
    assert names_of(paired_images(folders, (8, 8), 3, most=10)) == {
        "A": [*pairs, "a0", "a2", "a4"],
        "B": [*pairs, "q0", "q1", "q2"],
    }
    loaded = paired_images(folders, (8, 6), 1)
    assert names_of(loaded) == {"A": [*pairs, *(f"a{i}" for i in range(6))], "B": [*pairs, "q0", "q1", "q2"]}
    for name, x in loaded["A"].items():
        assert torch.equal(x, named_images(folders["A"], (8, 6), 1)[name])


@pytest.mark.parametrize("most", [None, 2, 3, 5, 7])
@pytest.mark.parametrize("prefix", ["", "b"])
def test_sets_of_pairs_and_sets_without_any_are_read_like_single_folders(tmp_path, prefix, most):
    folders = {
        "A": save_named(tmp_path / "testA", [f"{i}.png" for i in range(7)]),
        "B": save_named(tmp_path / "testB", [f"{prefix}{i}.png" for i in range(7)]),
    }
    loaded = paired_images(folders, (8, 8), 3, most=most)
    for domain, folder in folders.items():
        alone = named_images(folder, (8, 8), 3, most=most)
        assert list(loaded[domain]) == list(alone)
        assert all(torch.equal(loaded[domain][name], x) for name, x in alone.items())


# -- batches ---------------------------------------------------------------------------------


def dataset_of(root, **kwargs):
    paths = {domain: list_images(root / f"train{domain}") for domain in "AB"}
    return UnpairedDataset(paths, kwargs.pop("size", (16, 14)), **kwargs)


def all_batches(root, num_workers, epochs=2, first_step=0, seed=0):
    dataset = dataset_of(root, seed=seed)
    order = EpochSampler((5, 4), 2, seed=seed)
    order.first_step = first_step
    loader = make_loader(dataset, order, num_workers, pin_memory=False)
    batches = []
    for epoch in range(epochs):
        order.epoch = epoch
        batches.append([torch.cat([batch["A"], batch["B"]]) for batch in loader])
    return batches


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_batches_do_not_depend_on_the_number_of_workers(tiny):
    alone = all_batches(tiny, 0)
    helped = all_batches(tiny, 2)
    assert [len(epoch) for epoch in alone] == [3, 3]
    for one, two in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])  # persistent workers do not freeze the epoch
    assert not torch.equal(alone[0][0], all_batches(tiny, 0, seed=1)[0][0])


def test_orders_crops_and_flips_are_those_of_earlier_versions(tiny):
    order = EpochSampler((7, 3), 2, seed=3)
    order.epoch = 2
    keys = [key for batch in order for key in batch]
    assert keys[:3] == [(2, 0, 1, 2), (2, 1, 0, 1), (2, 2, 4, 0)]
    item = dataset_of(tiny, seed=3)[2, 5, 4, 1]
    assert hashlib.sha256(torch.cat([item["A"], item["B"]]).numpy().tobytes()).hexdigest()[:12] == "e05390ba0590"


def test_an_epoch_can_be_entered_at_any_step(tiny):
    whole = all_batches(tiny, 0, 1)[0]
    rest = all_batches(tiny, 0, 1, first_step=1)[0]
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))


def test_a_loader_takes_no_number_from_the_global_generator(tiny):
    before = torch.get_rng_state()
    all_batches(tiny, 0)
    assert torch.equal(torch.get_rng_state(), before)


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


def test_the_slices_of_the_ranks_make_up_each_batch():
    whole = list(EpochSampler((7, 5), 4, None, 3))
    parts = [list(EpochSampler((7, 5), 4, None, 3, rank_slice=slice(2 * r, 2 * r + 2))) for r in range(2)]
    assert [one + other for one, other in zip(*parts, strict=True)] == whole


def test_crops_stay_inside_and_flips_mirror_half(tmp_path):
    root = make_dataset(tmp_path / "x", (1, 1, 1, 1), size=(16, 16))
    still = dataset_of(root, size=(16, 16), load_scale=1.0, flip=False)
    plain = load_image(root / "trainA" / "0.png", None)
    assert all(torch.equal(still[0, i, 0, 0]["A"], plain) for i in range(5))
    flipping = dataset_of(root, size=(16, 16), load_scale=1.0, flip=True)
    results = [flipping[0, i, 0, 0]["A"] for i in range(40)]
    mirrored = sum(torch.equal(x, plain.flip(2)) for x in results)
    assert sum(torch.equal(x, plain) for x in results) + mirrored == 40
    assert 8 <= mirrored <= 32
    cropping = dataset_of(root, size=(8, 12), load_scale=2.0, flip=False)
    crops = [cropping[0, i, 0, 0]["A"] for i in range(20)]
    assert all(x.shape == (3, 8, 12) for x in crops)
    assert len({hashlib.sha256(x.numpy().tobytes()).digest() for x in crops}) > 10


def test_an_unreadable_image_is_replaced_and_reported(tiny):
    whole = (tiny / "trainA" / "2.png").read_bytes()
    (tiny / "trainA" / "2.png").write_bytes(whole[:300])
    item = dataset_of(tiny)[0, 0, 2, 0]
    assert [(domain, path.name) for domain, path, _ in item["bad"]] == [("A", "2.png")]
    assert item["A"].shape == (3, 16, 14)
    assert torch.equal(item["A"], dataset_of(tiny)[0, 0, 3, 0]["A"])


def feed_of(root, workers=0, **kwargs):
    dataset = dataset_of(root)
    counts = {domain: len(paths) for domain, paths in dataset.paths.items()}
    bad = {domain: BadImages(root / f"train{domain}", count) for domain, count in counts.items()}
    order = EpochSampler(tuple(counts.values()), 2, **kwargs)
    return Feed(make_loader(dataset, order, workers, pin_memory=False), order, bad, counts)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_domain_that_became_unreadable_is_reported_through_the_workers(tiny, workers):
    feed = feed_of(tiny, workers)
    for path in list_images(tiny / "trainA"):
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"tiny/trainA: . or more of 5"):
        list(feed.batches(0, 0, torch.device("cpu")))
    assert not feed.bad["B"].found


def test_a_feed_enters_any_epoch_at_any_step_and_names_bad_files_once(tiny, capsys):
    (tiny / "trainB" / "1.png").write_bytes(b"torn")
    feed = feed_of(tiny)
    cpu = torch.device("cpu")
    whole = list(feed.batches(3, 0, cpu))
    rest = list(feed.batches(3, 1, cpu))
    assert len(whole) == 3
    assert all(real_A.shape == real_B.shape == (2, 3, 16, 14) for real_A, real_B in whole)
    assert [list(map(torch.equal, *pair)) for pair in zip(whole[1:], rest, strict=True)] == [[True, True]] * 2
    assert not torch.equal(whole[0][0], next(feed.batches(4, 0, cpu))[0])
    assert capsys.readouterr().err.count("skipped, unreadable") == 1


def test_the_files_of_a_step_are_those_that_this_rank_reads(tiny):
    for i in range(5):
        Image.new("RGB", (20, 18), (10 * i, 0, 0)).save(tiny / "trainA" / f"{i}.png")
    feed = feed_of(tiny, rank_slice=slice(1, 2))
    for step, (real_A, _) in enumerate(list(feed.batches(2, 0, torch.device("cpu")))):
        names = feed.paths_of_step(step)
        assert [Path(name).parent for name in names] == [tiny / "trainA", tiny / "trainB"]
        red = images.range_to_bytes(real_A)[:, 0].float().mean()
        assert names[0] == str(tiny / "trainA" / f"{round(red.item() / 10)}.png")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_have_the_same_limit_of_pixels(tiny):
    images.limit_pixels(300)
    loader = make_loader(dataset_of(tiny), EpochSampler((5, 4), 2), 1, pin_memory=False)
    assert "20x18 px" in next(iter(loader))["bad"][0][2]


def test_workers_leave_signals_to_the_main_process_and_take_its_limit():
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    datasets.start_worker(0, pixels=300)
    assert all(signal.getsignal(getattr(signal, name)) == signal.SIG_IGN for name in names)
    assert images.max_pixels == 300
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


# -- the cache ---------------------------------------------------------------------------------


def cached(dataset, root, kind, workers=0):
    dataset.caches = make_caches(kind, dataset.paths, dataset.load_size, dataset.channels, root, workers)
    return dataset


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_cache_changes_no_sample_and_reads_each_file_once(tiny, kind, workers, monkeypatch):
    def passes(dataset):
        order = EpochSampler((5, 4), 2)
        found = []
        loader = make_loader(dataset, order, workers, pin_memory=False)
        for epoch in range(3):
            order.epoch = epoch
            found += [batch[domain].clone() for batch in loader for domain in "AB"]
        return found

    plain = passes(dataset_of(tiny))
    dataset = cached(dataset_of(tiny), tiny, kind, workers)
    assert all(map(torch.equal, plain, passes(dataset)))
    monkeypatch.setattr(images, "read_image", None)  # whoever reads now, fails
    assert all(map(torch.equal, plain, passes(dataset)))
    if kind == "disk":
        assert all(map(torch.equal, plain, passes(cached(dataset_of(tiny), tiny, kind, workers))))


def test_without_a_cache_nothing_is_kept(tiny):
    assert cached(dataset_of(tiny), tiny, "none").caches == {}
    assert not (tiny / ".cache").exists()


def test_a_damaged_cache_is_read_anew_and_a_changed_image_gets_a_new_one(tiny):
    key = (0, 0, 2, 1)
    before = cached(dataset_of(tiny), tiny, "disk")[key]
    files = list((tiny / ".cache").iterdir())
    assert len(files) == 2
    for path in files:
        path.write_bytes(b"\1" * (path.stat().st_size // 2))  # half-written
    assert torch.equal(cached(dataset_of(tiny), tiny, "disk")[key]["A"], before["A"])
    noise_image("new").save(tiny / "trainA" / "2.png")
    changed = cached(dataset_of(tiny), tiny, "disk")[key]
    assert torch.equal(changed["A"], dataset_of(tiny)[key]["A"])
    assert not torch.equal(changed["A"], before["A"])
    assert torch.equal(changed["B"], before["B"])


def test_an_unreadable_image_is_never_kept(tiny):
    (tiny / "trainA" / "1.png").write_bytes(b"torn")
    dataset = cached(dataset_of(tiny), tiny, "ram")
    for _ in range(2):
        assert [path.name for _, path, _ in dataset[0, 0, 1, 0]["bad"]] == ["1.png"]


def test_grey_images_are_cached_too(tiny):
    dataset = cached(dataset_of(tiny, channels=1), tiny, "ram")
    first = dataset[0, 0, 1, 1]["A"]
    assert first.shape == (1, 16, 14)
    assert torch.equal(dataset[0, 0, 1, 1]["A"], first)


def test_a_cache_that_does_not_fit_is_refused_with_the_numbers(tiny, monkeypatch):
    monkeypatch.setattr(datasets, "free_memory", lambda: 2**20)
    paths = {"A": [tiny] * 1000, "B": [tiny]}
    with pytest.raises(InputError, match=r"--cache ram: .*0\.18 GiB.* 0\.00 .*--cache disk"):
        make_caches("ram", paths, (256, 256), 3, tiny, 0)
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    with pytest.raises(InputError, match="--cache disk: needs"):
        make_caches("disk", {"A": [tiny] * 9, "B": [tiny]}, (256, 256), 3, tiny, 0)


def test_the_ranks_of_a_machine_share_its_memory(tiny, monkeypatch):
    paths = {"A": [tiny] * 1000, "B": [tiny]}
    monkeypatch.setattr(datasets, "free_memory", lambda: 2**28)  # enough for one, not for two
    monkeypatch.setattr(datasets, "ImageCache", lambda *_: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    make_caches("ram", paths, (256, 256), 3, tiny, 0)
    monkeypatch.setattr(datasets, "world", lambda: 2)
    with pytest.raises(InputError, match=r"--cache ram: .*0\.37 GiB"):
        make_caches("ram", paths, (256, 256), 3, tiny, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="a file system that takes any bytes as a name")
def test_a_folder_whose_name_is_no_text_cannot_hold_a_cache(tmp_path):
    root = make_dataset(tmp_path / os.fsdecode(b"r\xff") / "tiny")
    with pytest.raises(InputError, match=r"--cache disk: .*tiny/\.cache/.*--data_root"):
        cached(dataset_of(root), root, "disk")
    assert not (root / ".cache").exists()
    assert cached(dataset_of(root), root, "ram")[0, 0, 0, 0]["A"].shape == (3, 16, 14)


def test_a_file_that_cannot_be_mapped_is_refused_in_one_line(tiny, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("unable to mmap 99 bytes\nException raised from\nmany lines")

    monkeypatch.setattr(torch, "from_file", fail)
    with pytest.raises(InputError, match=r"--cache disk: .*unable to mmap") as refusal:
        cached(dataset_of(tiny), tiny, "disk")
    assert "\n" not in str(refusal.value)
