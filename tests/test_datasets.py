import hashlib
import os
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_dataset, noise_image
from PIL import Image

import datasets
from toolkit import images
from toolkit.images import ImageReader
from utils import InputError


def test_an_outlook_calls_few_photos_and_few_steps_a_trial():
    assert datasets.outlook(1000, 20_000).endswith("of each kind")
    assert datasets.outlook(40).endswith("; 40 photos are a trial")
    assert datasets.outlook(40, 615).endswith("; 615 steps and 40 photos are a trial")


def test_a_data_set_is_found_or_the_most_similar_one_named(tiny):
    assert datasets.find_dataset(tiny.parent, "tiny") == tiny
    with pytest.raises(InputError, match=r"tinny: .* tiny; .*prepare\.py split"):
        datasets.find_dataset(tiny.parent, "tinny")
    with pytest.raises(InputError, match=r"none/x.*day2night"):
        datasets.find_dataset(tiny.parent / "none", "x")


def test_the_images_of_a_split_are_listed_and_missing_or_empty_splits_named(tiny):
    assert [path.name for path in datasets.split_images(tiny, "trainA")] == [f"{i}.png" for i in range(5)]
    assert [path.name for path in datasets.split_images(tiny, "trainA", 2)] == ["0.png", "1.png"]
    with pytest.raises(InputError, match=r"tiny: no valA/ .*testA, testB, trainA, trainB.*prepare\.py split"):
        datasets.split_images(tiny, "valA")
    (tiny / "valA").mkdir()
    with pytest.raises(InputError, match=r"valA: .*\.jpg"):
        datasets.split_images(tiny, "valA")


def test_held_out_split_prefers_test_then_val_then_train(tmp_path):
    root = make_dataset(tmp_path / "x")
    assert datasets.held_out_split(root) == "test"
    (root / "testA").rename(root / "valA")
    assert datasets.held_out_split(root) == "train"
    (root / "testB").rename(root / "valB")
    assert datasets.held_out_split(root) == "val"


def test_evaluation_uses_val_else_test_and_refuses_unpaired_images_as_pairs(tiny):
    assert datasets.held_out_folders(tiny, paired=True) == {"A": tiny / "testA", "B": tiny / "testB"}
    for path in images.list_images(tiny / "testB"):
        path.rename(path.with_stem(f"b{path.stem}"))
    assert datasets.held_out_folders(tiny, paired=False) == {"A": tiny / "testA", "B": tiny / "testB"}
    with pytest.raises(InputError, match=r"--eval_metrics paired.*testA.*testB"):
        datasets.held_out_folders(tiny, paired=True)
    for split in ("valA", "valB"):
        (tiny / split.replace("val", "test")).rename(tiny / split)
    assert datasets.held_out_folders(tiny, paired=False) == {"A": tiny / "valA", "B": tiny / "valB"}


def save_named(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(f"{folder.name}{name}").save(folder / name)
    return folder


def test_images_are_read_by_the_name_that_pairs_share(tmp_path, capsys):
    folder = save_named(tmp_path / "testA", ["1.png", "sub/2.jpg", "10.png"])
    loaded = datasets.named_images(folder, ImageReader((8, 6)))
    assert [str(name) for name in loaded] == ["1", "10", "sub/2"]
    assert torch.equal(loaded[Path("10")], images.load_image(folder / "10.png", (8, 6))[None])
    assert [str(name) for name in datasets.named_images(folder, ImageReader((8, 6)), most=2)] == ["1", "sub/2"]
    (folder / "10.png").write_bytes(b"torn")
    assert [str(name) for name in datasets.named_images(folder, ImageReader((8, 6), 1))] == ["1", "sub/2"]
    assert capsys.readouterr().err.count("skipped, unreadable") == 1
    with pytest.raises(InputError, match=r"10\.png"):
        datasets.named_images(folder, ImageReader((8, 6)), "stop")


def test_the_fingerprint_of_held_out_images_leaves_unreadable_ones_out(tiny):
    folders = [tiny / "testA", tiny / "testB"]
    before = datasets.fingerprint(folders)
    (tiny / "testA/broken.png").symlink_to("nowhere")
    assert datasets.fingerprint(folders) == before
    (tiny / "testA/0.png").rename(tiny / "testB/3.png")
    assert datasets.fingerprint(folders) != before


def test_a_limit_keeps_pairs_together(tmp_path):
    pairs = [f"p{i}" for i in range(6)]
    folders = {
        "A": save_named(tmp_path / "testA", [f"a{i}.png" for i in range(6)] + [f"{name}.jpg" for name in pairs]),
        "B": save_named(tmp_path / "testB", [f"{name}.png" for name in pairs] + ["q0.png", "q1.png", "q2.png"]),
    }
    for most, some, others_A, others_B in (
        (3, pairs[::2], [], []),
        (4, pairs[::2], ["a0"], ["q0"]),
        (10, pairs, ["a0", "a2", "a4"], ["q0", "q1", "q2"]),
        (None, pairs, [f"a{i}" for i in range(6)], ["q0", "q1", "q2"]),
    ):
        loaded = datasets.paired_images(folders, dict.fromkeys("AB", ImageReader((8, 6), 1)), most=most)
        names = {domain: [str(name) for name in by_name] for domain, by_name in loaded.items()}
        assert names == {"A": some + others_A, "B": some + others_B}
    alone = datasets.named_images(folders["A"], ImageReader((8, 6), 1))
    assert all(torch.equal(x, alone[name]) for name, x in loaded["A"].items())


def dataset_of(root, **kwargs):
    paths = {domain: images.list_images(root / f"train{domain}") for domain in "AB"}
    return datasets.UnpairedDataset(paths, kwargs.pop("size", (16, 14)), **kwargs)


CPU = torch.device("cpu")


def config_of(root, **changes):
    settings = {"img_height": 16, "img_width": 14, "batch_size": 2, "num_workers": 0, **changes}
    return datasets.DataConfig(dataset_name=root.name, data_root=root.parent, **settings)


def data_of(root, seed=0, **changes):
    return datasets.TrainingData(config_of(root, **changes), seed, CPU, {})


def epochs_of(data, epochs=2, first_step=0):
    """Batches as (2 * N, C, H, W), by epoch."""
    found = []
    for epoch in range(epochs):
        found.append([torch.cat(pair) for pair in data.batches(epoch, first_step, CPU)])
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_batches_do_not_depend_on_the_number_of_workers(tiny):
    data = data_of(tiny, num_workers=2)
    assert data.steps_per_epoch == 3
    assert data.counts == {"A": 5, "B": 4}
    helped = epochs_of(data)
    data.close()
    alone = epochs_of(data_of(tiny))
    assert [len(epoch) for epoch in alone] == [3, 3]
    for one, two in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])  # persistent workers follow the epoch
    assert not torch.equal(alone[0][0], epochs_of(data_of(tiny, seed=1))[0][0])


def test_order_crops_and_flips_are_those_of_earlier_versions(tmp_path):
    root = make_dataset(tmp_path / "x", size=(16, 18))  # at 112% of the training size: not resized
    order = datasets.EpochSampler((7, 3), 2, seed=3)
    order.epoch = 2
    keys = [key for batch in order for key in batch]
    assert keys[:3] == [(2, 0, 1, 2), (2, 1, 0, 1), (2, 2, 4, 0)]
    item = dataset_of(root, seed=3)[2, 5, 4, 1]
    x = images.bytes_to_range(torch.cat([item["A"], item["B"]]))
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest()[:12] == "0a42fd5f728d"


def test_an_epoch_can_be_entered_at_any_step(tiny):
    data = data_of(tiny)
    before = torch.get_rng_state()
    (whole,) = epochs_of(data, 1)
    (rest,) = epochs_of(data, 1, first_step=1)
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))
    assert torch.equal(torch.get_rng_state(), before)  # a resumed run draws the same numbers


def test_an_epoch_is_a_pass_over_the_larger_domain_and_the_domains_are_drawn_independently():
    order = datasets.EpochSampler((7, 3), 2, seed=3)
    keys = [key for batch in order for key in batch]
    assert [len(batch) for batch in order] == [2, 2, 2, 2]
    assert {key[2] for key in keys} == set(range(7))
    assert sorted(sum(key[3] == i for key in keys) for i in range(3)) == [2, 3, 3]
    assert [key[2] % 3 for key in keys] != [key[3] for key in keys]
    assert len(list(datasets.EpochSampler((7, 3), 2, steps=9))) == 9
    (batch,) = datasets.EpochSampler((2, 1), 4)  # images are repeated if a data set is smaller than a batch
    assert [key[3] for key in batch] == [0, 0, 0, 0]


def test_crops_stay_inside_and_flips_mirror_half(tmp_path):
    root = make_dataset(tmp_path / "x", (1, 1, 1, 1), size=(16, 16))
    still = dataset_of(root, size=(16, 16), load_scale=1.0, flip=False)
    plain = images.image_to_pixels(images.read_image(root / "trainA" / "0.png"))
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


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"flip_vertical": True}, 2),
        ({"flip": True, "flip_vertical": True}, 4),
        ({"rotate90": True}, 4),
        ({"flip": True, "flip_vertical": True, "rotate90": True}, 8),
    ],
)
def test_images_without_an_upside_are_shown_in_all_positions_equally_often(tmp_path, options, count):
    root = make_dataset(tmp_path / "x", (1, 1, 1, 1), size=(16, 16))
    data = dataset_of(root, size=(16, 16), load_scale=1.0, **{"flip": False, **options})
    plain = images.image_to_pixels(images.read_image(root / "trainA" / "0.png"))
    turned = [plain.rot90(turns, (1, 2)) for turns in range(4)]
    positions = [*turned, *(x.flip(2) for x in turned)]
    seen = Counter()
    for i in range(400):
        x = data[0, i, 0, 0]["A"]
        (position,) = (number for number, y in enumerate(positions) if torch.equal(x, y))
        seen[position] += 1
    assert len(seen) == count
    assert min(seen.values()) > 200 / count


def test_an_unreadable_image_is_replaced_and_reported(tiny):
    whole = (tiny / "trainA" / "2.png").read_bytes()
    (tiny / "trainA" / "2.png").write_bytes(whole[:300])
    item = dataset_of(tiny)[0, 0, 2, 0]
    assert [(domain, path.name) for domain, path, _ in item["bad"]] == [("A", "2.png")]
    assert item["A"].shape == (3, 16, 14)
    assert torch.equal(item["A"], dataset_of(tiny)[0, 0, 3, 0]["A"])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_domain_that_became_unreadable_ends_the_run(tiny, workers):
    data = data_of(tiny, num_workers=workers)
    for path in images.list_images(tiny / "trainA"):
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"tiny/trainA: . or more of 5"):
        list(data.batches(0, 0, CPU))
    assert not data.bad_images["B"].found
    data.close()


def test_unreadable_files_are_named_once_and_those_with_a_bad_header_left_out(tiny, capsys):
    (tiny / "trainB" / "1.png").write_bytes(b"torn")
    data = data_of(tiny)
    (tiny / "trainA" / "1.png").write_bytes((tiny / "trainA" / "1.png").read_bytes()[:300])
    assert data.counts == {"A": 5, "B": 3}
    for _ in range(2):
        assert all(x.shape == (4, 3, 16, 14) for epoch in epochs_of(data) for x in epoch)
    err = capsys.readouterr().err
    assert err.count("skipped, unreadable (1 of 4)") == err.count("skipped, unreadable (1 of 5)") == 1
    assert err.count("skipped") == 2


def test_the_files_of_a_step_are_those_that_this_rank_reads(tiny, monkeypatch):
    for i in range(5):
        Image.new("RGB", (20, 18), (10 * i, 0, 0)).save(tiny / "trainA" / f"{i}.png")
    monkeypatch.setattr(datasets, "rank_slice", lambda batch_size: slice(1, batch_size))
    data = data_of(tiny)
    for step, (real_A, _) in enumerate(list(data.batches(2, 0, CPU))):
        names = data.paths_of_step(step)
        assert [Path(name).parent for name in names] == [tiny / "trainA", tiny / "trainB"]
        red = images.range_to_bytes(real_A)[:, 0].float().mean()
        assert names[0] == str(tiny / "trainA" / f"{round(red.item() / 10)}.png")


def test_the_options_choose_images_size_and_steps(tiny):
    data = data_of(tiny, max_images=2, steps_per_epoch=7, channels=1, batch_size=3, img_height=8, cache="ram")
    assert (data.counts, data.steps_per_epoch) == ({"A": 2, "B": 2}, 7)
    real_A, real_B = next(data.batches(0, 0, CPU))
    assert real_A.shape == real_B.shape == (3, 1, 8, 14)
    assert data.loader.dataset.caches.keys() == {"A", "B"}


def test_workers_leave_signals_to_the_main_process_and_take_its_limit(monkeypatch):
    ignored = {}
    monkeypatch.setattr(signal, "signal", ignored.__setitem__)
    datasets.start_worker(0, max_pixels=300)
    assert ignored == dict.fromkeys([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], signal.SIG_IGN)
    assert images.max_pixels == 300


def cached(dataset, root, kind):
    dataset.caches = datasets.open_caches(kind, dataset, root)
    return dataset


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "workers", "channels"), [("ram", 0, 1), ("ram", 2, 3), ("disk", 0, 3), ("disk", 2, 1), ("none", 0, 3)]
)
def test_a_cache_changes_no_sample_and_reads_each_file_once(tiny, kind, workers, channels, monkeypatch):
    def passes(dataset):
        order = datasets.EpochSampler((5, 4), 2)
        found = []
        loader = datasets.make_loader(dataset, order, workers, pin_memory=False)
        for epoch in range(3):
            order.epoch = epoch
            found += [batch[domain].clone() for batch in loader for domain in "AB"]
        return found

    plain = passes(dataset_of(tiny, channels=channels))
    dataset = cached(dataset_of(tiny, channels=channels), tiny, kind)
    assert all(map(torch.equal, plain, passes(dataset)))
    assert (tiny / ".cache").exists() == (kind == "disk")
    if kind == "none":
        return
    monkeypatch.setattr(images, "read_image", None)  # reading now fails
    assert all(map(torch.equal, plain, passes(dataset)))
    if kind == "disk":
        again = cached(dataset_of(tiny, channels=channels), tiny, kind)
        assert all(map(torch.equal, plain, passes(again)))


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


def large_dataset(folder, count):
    return datasets.UnpairedDataset({"A": [folder] * count, "B": [folder]}, (256, 256), load_scale=1)


def test_a_cache_that_does_not_fit_is_refused_with_the_numbers(tiny, monkeypatch):
    monkeypatch.setattr(datasets.devices, "free_memory", lambda: 2**28)  # enough for one rank, not for two
    monkeypatch.setattr(datasets, "ImageCache", lambda *_: None)
    datasets.open_caches("ram", large_dataset(tiny, 1000), tiny)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"--cache ram: needs 0\.37 GiB, 0\.25 .*--cache disk"):
        datasets.open_caches("ram", large_dataset(tiny, 1000), tiny)


@pytest.mark.parametrize("module", ["os.posix_fallocate", "mmap.mmap"])
def test_a_cache_that_does_not_fit_on_the_disk_or_cannot_be_mapped_is_refused_in_one_line(tiny, monkeypatch, module):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, fail)
    with pytest.raises(InputError, match=r"--cache disk: 0\.0 GiB: No space left") as refusal:
        cached(dataset_of(tiny), tiny, "disk")
    assert "\n" not in str(refusal.value)
    assert list((tiny / ".cache").iterdir()) == []


def test_free_space_for_a_cache_is_checked_on_every_system(tiny, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    free = SimpleNamespace(free=4200)  # of trainA's 5 images of 18x16 px, 4360 bytes
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: free)
        with pytest.raises(InputError, match=r"--cache disk: 0\.0 GiB: No space left"):
            cached(dataset_of(tiny), tiny, "disk")
        assert list((tiny / ".cache").iterdir()) == []
        free.free = 4360
        cached(dataset_of(tiny), tiny, "disk")
        free.free = 0
        cached(dataset_of(tiny), tiny, "disk")  # nothing is missing


def test_an_existing_cache_that_cannot_be_mapped_is_kept(tiny, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    cached(dataset_of(tiny), tiny, "disk")
    files = sorted((tiny / ".cache").iterdir())
    monkeypatch.setattr("mmap.mmap", fail)
    with pytest.raises(InputError, match="Permission denied"):
        cached(dataset_of(tiny), tiny, "disk")
    assert sorted((tiny / ".cache").iterdir()) == files


@pytest.mark.parametrize("preprocess", images.PREPROCESS)
def test_training_crops_have_the_training_size_whatever_the_shape_of_the_images(preprocess):
    paths = {"A": [Path("a.png")], "B": [Path("b.png")]}
    noise_image(0, (50, 20)).save("a.png")
    noise_image(1, (9, 30)).save("b.png")
    dataset = datasets.UnpairedDataset(paths, (16, 12), preprocess=preprocess)
    crops = set()
    for i in range(8):
        item = dataset[0, i, 0, 0]
        if preprocess in images.WHOLE:
            expected = {"none": ((20, 52), (40, 12)), "scale_width": ((12, 32), (40, 12))}
            sizes = expected.get(preprocess, ((16, 40), (40, 12)))
            assert (item["A"].shape[1:], item["B"].shape[1:]) == sizes
            continue
        assert item["A"].shape == item["B"].shape == (3, 16, 12)
        crops.add(item["A"].numpy().tobytes())
    assert len(crops) > 4 or preprocess in images.WHOLE


def test_names_that_end_with_their_domain_are_pairs_unless_they_have_partners_of_the_full_name(tmp_path):
    names = {
        "A": ["1_A", "2-A", "sub/3_A", "mouse_A", "mouse_B", "x_A", "lone_A", "5_A", "5"],
        "B": ["1_B", "2-B", "sub/3_B", "mouse_A", "mouse_B", "y_B", "x", "5_B"],
    }
    folders = {domain: tmp_path / f"test{domain}" for domain in "AB"}
    for domain, folder in folders.items():
        for name in names[domain]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            noise_image(name, (8, 6)).save(folder / f"{name}.png")
    found = datasets.by_name(folders)
    shared = found["A"].keys() & found["B"].keys()
    assert {str(name) for name in shared} == {"1", "2", "sub/3", "mouse_A", "mouse_B"}
    assert [found[domain][Path("1")].name for domain in "AB"] == ["1_A.png", "1_B.png"]
    read = datasets.paired_images(folders, dict.fromkeys("AB", ImageReader((8, 6))))
    assert list(read["A"])[:5] == list(read["B"])[:5]
    assert len(read["A"]) == len(names["A"])
